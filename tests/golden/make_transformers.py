"""Makes transformers.zip: small sharded model folders as transformers writes them, bf16 and fp16, of three
families, a base and two models near it each.

    python tests/golden/make_transformers.py          (needs transformers, which nothing else here does;
    versions.json in it says which)

Before it writes, it merges them by every method with merge.py, loads what comes out with transformers, and
compares tensors and logits with a merge by hand.
Run by hand; the tests read only what it made and compare with `by_hand` too.
"""

import json
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
ZIP = HERE / "transformers.zip"
SIZES = dict(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CASES = {    # folder: (model type, dtype, more)
    "cohere-bf16": ("cohere", torch.bfloat16, dict(use_qk_norm=True)),
    "cohere-fp16": ("cohere", torch.float16, {}),
    "llama-bf16": ("llama", torch.bfloat16, dict(tie_word_embeddings=False)),
    "qwen2-fp16": ("qwen2", torch.float16, dict(tie_word_embeddings=True)),
}
FLAGS = {  # method: its flags; density 1 drops nothing at random
    "linear": "--weights 3 1",
    "slerp": "--t 0.3",
    "task-arithmetic": "--weights 0.5 0.3",
    "model-stock": "",
    "ties": "--density 0.4",
    "dare-linear": "--density 1 --weights 0.5 0.3",
    "dare-ties": "--density 1",
}


def command(method, place, out):
    """The arguments of merge.py for the models of a case."""
    base = [] if method in ("linear", "slerp") else ["--base", str(place / "base")]
    return [method, str(place / "A"), str(place / "B"), *base, *FLAGS[method].split(), "--out", str(out)]


def state_of(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def by_hand(method, a, b, base):
    """{name: merged tensor, fp64} of whole state dicts, written out for two models and the settings of
    FLAGS."""
    a, b, base = ({name: tensor.double() for name, tensor in state.items()} for state in (a, b, base))
    moves = {name: (a[name] - base[name], b[name] - base[name]) for name in base}
    limits = [
        torch.cat([move[i].flatten().abs() for move in moves.values()]).sort(descending=True).values
        for i in (0, 1)
    ]
    limits = [values[int(0.4 * len(values)) - 1] if method == "ties" else 0 for values in limits]
    merged = {}
    for name, (one, two) in moves.items():
        if method == "linear":
            merged[name] = (3 * a[name] + b[name]) / 4
        elif method == "slerp":
            angle = torch.acos((a[name] * b[name]).sum() / (a[name].norm() * b[name].norm()))
            merged[name] = (
                (torch.sin(0.7 * angle) * a[name] + torch.sin(0.3 * angle) * b[name]) / torch.sin(angle)
                if angle > 1e-4
                else 0.7 * a[name] + 0.3 * b[name]
            )
        elif method in ("task-arithmetic", "dare-linear"):
            merged[name] = base[name] + 0.5 * one + 0.3 * two
        elif method == "model-stock":
            cosine = (one * two).sum() / (one.norm() * two.norm()).clamp(min=1e-300)
            t = (2 * cosine / (1 + cosine)).clamp(min=0)
            merged[name] = base[name] + t * (one + two) / 2
        else:
            one, two = one * (one.abs() >= limits[0]), two * (two.abs() >= limits[1])
            sign = (one + two).sign()
            agree = [(move.sign() * sign > 0).double() for move in (one, two)]
            merged[name] = base[name] + (agree[0] * one + agree[1] * two) / (agree[0] + agree[1]).clamp(min=1)
    return merged


def check(place, method, dtype):
    """Merge the models of a case, load the outcome with transformers -> the largest difference of its
    logits from those of the merge by hand."""
    import merge
    from transformers import AutoModelForCausalLM
    out = place / method
    assert merge.main(command(method, place, out)) == 0
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()) and model.dtype == dtype, report
    other = AutoModelForCausalLM.from_pretrained(place / "A")
    hand = {
        name: tensor.to(dtype)
        for name, tensor in by_hand(method, *(state_of(place / name) for name in ("A", "B", "base"))).items()
    }
    missing, unexpected = other.load_state_dict(hand, strict=False)
    assert not unexpected and missing == ["lm_head.weight"] * other.config.tie_word_embeddings
    for name, tensor in state_of(out).items():          # rounded once here, twice there
        torch.testing.assert_close(tensor, hand[name], rtol=torch.finfo(dtype).eps, atol=1e-6)
    ids = torch.arange(24).view(2, 12) % SIZES["vocab_size"]
    with torch.no_grad():
        one, two = (net.float()(input_ids=ids).logits for net in (model, other))
    assert one.std() > 1e-3
    return ((one - two).abs().max() / one.std()).item()


def main():
    import transformers
    sys.path.insert(0, str(ROOT))
    with TemporaryDirectory() as temporary, zipfile.ZipFile(
        ZIP, "w", zipfile.ZIP_DEFLATED, compresslevel=9
    ) as packed:
        for case, (model_type, dtype, more) in CASES.items():
            place = Path(temporary) / case
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(model_type, **SIZES, initializer_range=0.2, **more)
            )
            start = {name: tensor.clone() for name, tensor in model.named_parameters()}
            for seed, name in enumerate(["base", "A", "B"]):
                torch.manual_seed(seed)
                with torch.no_grad():
                    for parameter, tensor in model.named_parameters():
                        tensor.copy_(start[parameter] + (0.05 if seed else 0) * torch.randn_like(tensor))
                model.to(dtype).save_pretrained(place / name, max_shard_size="1KB")
                model.float()
                for file in sorted((place / name).iterdir()):
                    packed.write(file, f"{case}/{name}/{file.name}")
            print(
                case,
                len(list((place / "A").glob("*.safetensors"))),
                "shards;",
                {method: f"{check(place, method, dtype):.1e}" for method in FLAGS},
            )
        packed.writestr(
            "versions.json",
            json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}),
        )


if __name__ == "__main__":
    main()
