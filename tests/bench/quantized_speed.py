"""A quantized model beside the same in fp32 and bf16: size of the folder, peak memory, tokens a second of
decoding 1 and 16 rows.

    python tests/bench/quantized_speed.py [--hidden 1280 --layers 16 --vocabulary 32000] [--rounds 3]
        [--schemes w8 w8a8 w4 w4-g128 nf4] [--tokens 24] [--device cpu]

Random weights of more than 300M parameters, which fit no cache. Each side is a process of its own, so that
its peak memory is its own; the sides run in turn, `rounds` times, and a figure is the fastest. The ratios to
bf16 are those of one run on one machine, with nothing beside it. Quantized models compute in bf16; --float32
adds w8 in fp32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SIDES = {"fp32": "float32", "bf16": "bfloat16"}


def model_folder(args, place):
    """The folder of the random model, in bf16; what it is made of is freed with this function."""
    import torch
    from small import tokenizer

    from aya_min import weights
    from aya_min.model import CohereForCausalLM
    from aya_min.model_config import ModelConfig
    config = ModelConfig(vocab_size=args.vocabulary, hidden_size=args.hidden,
                         intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
                         num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 256,
                         max_position_embeddings=512,
                         eos_token_id=tokenizer().end_of_turn_id)
    model, generator = CohereForCausalLM(config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    weights.save(place, model, tokenizer(), torch.bfloat16)
    return sum(p.numel() for p in model.parameters())


def one_side(folder, dtype, tokens, device):
    """Print the figures of one side as JSON, in its own process."""
    import torch

    from aya_min import weights
    from aya_min.fused import Fused
    from aya_min.sampling import generate
    model, _ = weights.load(folder, device, getattr(torch, dtype), packed=True)
    fused, found = Fused(model), {}
    for rows in (1, 16):
        for _ in range(2):                      # the first also warms up
            start = time.perf_counter()
            made = generate(fused, [[5 + i, 6, 7, 8] for i in range(rows)], max_new_tokens=tokens,
                            temperature=0, batch_size=rows)
            seconds = time.perf_counter() - start
        assert all(len(c.ids) == tokens for (c,) in made)
        found[f"{rows} rows"] = rows * tokens / seconds
    # ru_maxrss would be the parent's where that had more when it forked.
    status = Path("/proc/self/status").read_text()
    peak = torch.cuda.max_memory_allocated() if "cuda" in device else int(
        status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps({**found, "peak": peak}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--schemes", nargs="+", default=["w8", "w8a8", "w4", "w4-g128", "nf4"])
    parser.add_argument("--head", action="store_true", help="quantize the head where the scheme can")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return one_side(*args.side, args.tokens, args.device)
    from aya_min.merge_quantize import quantize_folder
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        print(f"{model_folder(args, place / 'model') / 1e6:,.0f}M parameters on {args.device}")
        sides = {name: (place / "model", dtype) for name, dtype in SIDES.items()}
        for scheme in args.schemes:
            head = args.head and scheme not in ("w8a8", "llm-int8", "nf4")
            out = quantize_folder(place / "model", place / scheme, scheme, head=head, hashes=False)
            sides[scheme + " +head" * head] = out, "bfloat16"
        if args.float32:
            sides["w8 in fp32"] = place / "w8", "float32"
        found = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                words = [sys.executable, __file__, "--tokens", str(args.tokens), "--device", args.device,
                         "--side", *map(str, side)]
                found[name].append(json.loads(subprocess.run(words, check=True, capture_output=True).stdout))
        print(f"{'':12}{'folder MB':>10}{'peak MB':>9}{'1 row tok/s':>13}{'/ bf16':>8}{'16 rows tok/s':>15}"
              f"{'/ bf16':>8}")
        best = {name: {key: (min if key == "peak" else max)(each[key] for each in runs) for key in runs[0]}
                for name, runs in found.items()}
        for name, (folder, _) in sides.items():
            size, own, half = sum(f.stat().st_size for f in folder.iterdir()), best[name], best["bf16"]
            print(f"{name:12}{size / 1e6:10,.0f}{own['peak'] / 1e6:9,.0f}{own['1 rows']:13.1f}"
                  f"{own['1 rows'] / half['1 rows']:8.2f}{own['16 rows']:15.1f}"
                  f"{own['16 rows'] / half['16 rows']:8.2f}")


if __name__ == "__main__":
    main()
