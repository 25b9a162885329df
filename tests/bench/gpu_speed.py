"""What a GPU gives on models of real size: an SFT step's tokens a second, MFU and peak memory, and tokens a
second of decoding beside transformers' generate and beside the memory's bandwidth.

    python tests/bench/gpu_speed.py train --model tiny-aya [--layers 12] [--tokens 8192] [--steps 8]
    python tests/bench/gpu_speed.py generate --model aya-expanse-8b [--layers 8] [--batches 1 64] [--theirs]
        [--kernels]

Weights are drawn at random. train: rows of about --row tokens, 2 rows in a micro-batch, bf16, packed,
compiled, every block recomputed, fp32 master weights and Adam; medians of the steps after the third.
generate: bf16, prompts of 128 tokens and 128 new ones, greedy; each batch once before the clock.
"floor" is the time in which a copy on this device moves the bytes of all weights.
--layers: as many as this of the model's layers. --kernels: where a step's time on the device goes.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from aya_min import checkpoint, stages, weights                 # noqa: E402
from aya_min.config import SFT                                  # noqa: E402
from aya_min.fused import Fused                                # noqa: E402
from aya_min.files import write_jsonl                           # noqa: E402
from aya_min.model import CohereForCausalLM                     # noqa: E402
from aya_min.model_config import model_preset                   # noqa: E402
from aya_min.sampling import generate                           # noqa: E402
from aya_min.tokenizer import train_tokenizer                   # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(function):
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def drawn(name, layers, dtype):
    """A model of this preset, drawn on the device, with this number of layers."""
    config = model_preset(name)
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.layer_types = None if config.layer_types is None else config.layer_types[:config.num_hidden_layers]
    with torch.device("meta"):
        model = CohereForCausalLM(config)
    model = model.to(dtype).to_empty(device=DEVICE)
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0, 0.02)
    return model


def bandwidth(size=2 ** 30):
    """Bytes a second of a copy, read and written."""
    a = torch.empty(size if DEVICE.type == "cuda" else size // 16, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * len(a) / median(timed(lambda: b.copy_(a))[0] for _ in range(10))


def train(args):
    model = drawn(args.model, args.layers, torch.float32)
    words = [f"w{i:03d}" for i in range(500)]
    tokenizer = train_tokenizer([" ".join(words)], 400)
    per_word = len(tokenizer.encode_answer(" ".join(words))) / len(words)
    rows = args.tokens // args.row or 1
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        count = round(0.97 * args.row / per_word)
        write_jsonl(folder / "rows.jsonl", [{"prompt": f"{i}?", "completion": " ".join(
            words[(i * 7 + j) % 500] for j in range(count))} for i in range(rows * args.steps)])
        settings = SFT(batch_size=rows, micro_batch_size=2, max_steps=args.steps, max_length=2 * args.row,
                              learning_rate=1e-5, dtype="bfloat16", packing=True, activation_checkpointing=1,
                              save_every=0, epochs=1.0)
        # 54 GB to write are not what is measured.
        checkpoint.save_state = weights.save = lambda *args, **more: None
        data, out = [folder / "rows.jsonl"], folder / "run"
        try:
            stages.train_stage("sft", model, tokenizer, data, settings, out, DEVICE)
        except (ValueError, OSError) as error:
            print("ended by", str(error)[:300])
        steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    print(f"{args.model}, {model.config.num_hidden_layers} layers, "
          f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}e9 parameters, "
          f"{steps[-1]['tokens']} tokens a step; seconds {[round(s['seconds'], 2) for s in steps]}")
    late = steps[3:]
    print(f"{median(s['seconds'] for s in late):.3f} s a step, "
          f"{median(s['tokens_per_second'] for s in late):,.0f} tokens/s, "
          f"MFU {median(s.get('mfu', 0) for s in late):.1%}", end=", ")
    if DEVICE.type == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB", end="")
    print(flush=True)


def decode(args):
    model = drawn(args.model, args.layers, torch.bfloat16).eval()
    rate, num_bytes = bandwidth(), 2 * sum(p.numel() for p in model.parameters())
    floor = num_bytes / rate
    print(f"{args.model}, {model.config.num_hidden_layers} layers, {num_bytes / 1e9:.1f} GB; "
          f"{rate / 1e12:.2f} TB/s; floor {1000 * floor:.2f} ms a step", flush=True)
    generator = torch.Generator().manual_seed(0)
    new, prompt = (128, 128) if DEVICE.type == "cuda" else (8, 8)
    fused = Fused(model)
    theirs = None
    if args.theirs:
        import transformers
        c = model.config
        names = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
                 "num_key_value_heads max_position_embeddings rope_theta logit_scale").split()
        values = {name: getattr(c, name) for name in names}
        with torch.device(DEVICE):
            theirs = transformers.CohereForCausalLM(transformers.CohereConfig(**values, eos_token_id=None))
        theirs = theirs.to(torch.bfloat16).eval()
    for batch in args.batches:
        ids = torch.randint(13, 4000, (batch, prompt), generator=generator)

        def ours():
            return generate(fused, ids.tolist(), max_new_tokens=new, temperature=0, batch_size=batch)
        first, _ = timed(ours)
        seconds, _ = min((timed(ours) for _ in range(2)), key=lambda pair: pair[0])
        line = (f"batch {batch:4}: {batch * new / seconds:9,.0f} tokens/s, {1000 * seconds / new:6.2f} ms a "
                f"step ({seconds / new / floor:.2f} of the floor); the first call took {first:.1f} s")
        if args.kernels:
            with torch.profiler.profile() as profiler:
                ours()
            events = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)[:10]
            whole = sum(e.self_device_time_total for e in profiler.key_averages())
            print("\n".join(f"    {e.self_device_time_total / whole:6.1%} {e.count:6} x {e.key[:90]}"
                            for e in events))
        if theirs:
            on_device = ids.to(DEVICE)

            def by_transformers():
                return theirs.generate(on_device, attention_mask=torch.ones_like(on_device), do_sample=False,
                                       max_new_tokens=new, pad_token_id=0)
            timed(by_transformers)
            other, _ = timed(by_transformers)
            line += f"; transformers {batch * new / other:,.0f} tokens/s, ratio {other / seconds:.2f}"
        print(line, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["train", "generate"])
    parser.add_argument("--model", default="tiny-aya")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--row", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    for flag in ("--theirs", "--kernels"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    (train if args.what == "train" else decode)(args)


if __name__ == "__main__":
    main()
