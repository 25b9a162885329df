"""Tokens a second of aya_min's engine and of transformers' generate: same weights, fp32, greedy, in turn in
one run.

    pip install transformers && OMP_NUM_THREADS=2 python tests/bench/generate_speed.py [--rounds 5] [--loaded]
    [--device cuda --dtype bfloat16] [--family llama]

A 5.6M-parameter Cohere model, or one of another family with as many layers; prompts of 32 tokens and 64 new
ones at batch 1, 16 and 64; then 256 requests with prompts of 8-128 and answers of 8-128
tokens, which transformers takes by 64 in the given order, each batch to its longest answer, and once more by
its continuous batching ("continuous": what generate_batch does, with a limit for each request, at most 64 at
a time). Each figure is the median over the rounds, with minimum and maximum.
--loaded: another process keeps a core busy meanwhile.
"matmuls" is the time of the two large products of each layer and the head alone, at the same numbers of rows,
with torch's F.linear and as the engine packs them.
"""

import argparse
import copy
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from aya_min.model_config import ModelConfig                              # noqa: E402
from aya_min.model import CohereForCausalLM, init_weights           # noqa: E402
from aya_min.fused import Fused, multiplier                         # noqa: E402
from aya_min.sampling import generate                               # noqa: E402
from tests.bench.step_speed import busy_process                     # noqa: E402

CONFIG = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.1,
)  # wide enough that no two tokens are almost equally likely


def timed(function, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def matmul_seconds(model, rows, pack):
    """One decode step's matmuls at this number of rows: the median of 30."""
    c, p = model.config, next(model.parameters())
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    shapes = [
        (heads + 2 * c.intermediate_size, c.hidden_size),
        (c.hidden_size, c.num_attention_heads * c.head_dim + c.intermediate_size),
    ] * c.num_hidden_layers
    products = [
        (multiplier(p.new_zeros(s).normal_(), pack), p.new_zeros(rows, s[1]))
        for s in shapes + [(c.vocab_size, c.hidden_size)]
    ]
    return sorted(timed(lambda: [f(x) for f, x in products], p.device.type)[0] for _ in range(30))[15]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--loaded", action="store_true")
    parser.add_argument("--family", default="cohere", help="a model_type of families.FAMILIES")
    args = parser.parse_args()
    import transformers
    dtype = getattr(torch, args.dtype)
    model = (
        init_weights(
            CohereForCausalLM(ModelConfig(**CONFIG, model_type=args.family)),
            torch.Generator().manual_seed(0),
        )
        .to(args.device, dtype)
        .eval()
    )
    config = transformers.AutoConfig.for_model(args.family, **CONFIG, eos_token_id=None)
    theirs = transformers.AutoModelForCausalLM.from_config(config)  # the same defaults, rope's among them
    theirs.load_state_dict({**model.state_dict(), "lm_head.weight": model.head_weight})
    theirs = theirs.to(args.device, dtype).eval()
    paged = copy.deepcopy(theirs)           # its attention becomes another
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()}"
        f" threads, torch {torch.__version__}, transformers {transformers.__version__}, {args.device}"
        f" {args.dtype},"
        f" {'beside a busy process, ' if args.loaded else ''}{sum(p.numel() for p in model.parameters()):,}"
        " parameters"
    )

    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(13, CONFIG["vocab_size"], size=n).tolist()
    cases = [(f"batch {b}", [draw(32) for _ in range(b)], [64] * b, b) for b in (1, 16, 64)]
    cases.append(
        (
            "256 mixed",
            [draw(n) for n in rng.integers(8, 129, size=256)],
            rng.integers(8, 129, size=256).tolist(),
            64,
        )
    )

    fused = Fused(model)  # as from_pretrained: once, before the clock

    def ours(prompts, limits, batch):
        return [
            c.ids for [c] in generate(fused, prompts, max_new_tokens=limits, temperature=0, batch_size=batch)
        ]

    def by_transformers(prompts, limits, batch):
        answers = []
        for start in range(0, len(prompts), batch):
            part, wanted = prompts[start:start + batch], limits[start:start + batch]
            longest = max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in part], device=args.device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=args.device)
            made = theirs.generate(
                ids, attention_mask=mask, max_new_tokens=max(wanted), do_sample=False, pad_token_id=0
            )
            answers += [row[longest:longest + n].tolist() for row, n in zip(made, wanted)]
        return answers

    def continuous(prompts, limits, batch):
        greedy = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=max(limits), eos_token_id=-1, pad_token_id=0
        )
        places = transformers.ContinuousBatchingConfig(
            page_size=32, num_blocks=8 * batch, max_batch_tokens=512, max_requests_per_batch=batch
        )
        with paged.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=places
        ) as manager:
            names = [
                manager.add_request(p, max_new_tokens=n, eos_token_id=-1) for p, n in zip(prompts, limits)
            ]
            answers = {}
            while len(answers) < len(names):
                made = manager.get_result(timeout=1)
                if made is not None and made.is_finished():
                    answers[made.request_id] = made.generated_tokens
                assert made is not None or manager.is_running(), "continuous batching ended"
        return [answers[name] for name in names]

    print(
        f"{'':10} {'transformers':>26} {'continuous':>26} {'aya_min':>26} {'ratio':>6} {'same tokens':>12}"
        f" {'matmuls: F.linear':>18} {'packed':>8} {'share of packed':>16}"
    )
    for name, prompts, limits, batch in cases:
        times = {by_transformers: [], ours: []} | ({continuous: []} if "mixed" in name else {})
        with busy_process(args.loaded):
            for _ in range(args.rounds + 1):
                for function in times:
                    seconds, result = timed(lambda: function(prompts, limits, batch), args.device)
                    times[function].append((seconds, result))
        new = sum(limits)
        rates = {f: sorted(new / s for s, _ in t[1:]) for f, t in times.items()}  # the first round warms up
        middle = {f: r[len(r) // 2] for f, r in rates.items()}
        same = np.mean([a == b for a, b in zip(times[ours][0][1], times[by_transformers][0][1])])
        text = {f: f"{middle[f]:8.0f} [{rates[f][0]:6.0f}, {rates[f][-1]:6.0f}]" for f in rates}
        matmul = [batch / matmul_seconds(model, batch, pack) for pack in (False, args.device == "cpu")]
        print(
            f"{name:10} {text[by_transformers]:>26} {text.get(continuous, ''):>26} {text[ours]:>26}"
            f" {middle[ours] / middle[by_transformers]:6.2f} {same:12.0%} {matmul[0]:18.0f} {matmul[1]:8.0f}"
            f" {middle[ours] / matmul[1]:16.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
