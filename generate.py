"""Generate: answers of one model, or multilingual data arbitrage over several.

    python generate.py --model DIR --prompt "..."
    torchrun generate.py --model DIR --prompts F.jsonl --out G.jsonl --num-samples 4 --temperature 0.7
    torchrun generate.py --models A B C --arbiter RM --prompts F.jsonl --out best.jsonl --pairs pairs.jsonl
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from aya_min import distributed, weights
from aya_min.arbitrage import candidates_from, route, wins_table
from aya_min.config import Parser
from aya_min.data import load_prompts
from aya_min.preferences import best_worst
from aya_min.reward import score_texts
from aya_min.sampling import answer_rows
from aya_min.world import write_jsonl


def make_parser():
    parser = Parser(prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder")
    parser.add_argument("--models", nargs="+", help="model folders of the pool, for arbitrage")
    parser.add_argument("--arbiter", help="reward model folder that scores the pool's answers")
    parser.add_argument("--prompt", help="one prompt; the answer goes to standard output")
    parser.add_argument("--prompts", nargs="+", help="JSONL files of prompts")
    parser.add_argument("--out", help="JSONL to write; must not exist")
    parser.add_argument("--pairs", help="arbitrage: also write best/worst pairs here")
    parser.add_argument("--margin", type=float, default=0.0, help="arbitrage: least difference of reward in a pair (default 0)")
    parser.add_argument("--route", default="reward", choices=["reward", "random", "fixed"], help="how the answer is chosen (default reward)")
    parser.add_argument("--table", help="--route fixed: JSON file {language: model folder as given in --models}")
    parser.add_argument("--num-samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.3, help="0 is greedy (default 0.3, the model card's)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=256, help="sequences decoded together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser


def check(args):
    """Refuse what cannot work before any model is loaded."""
    if bool(args.model) == bool(args.models):
        raise ValueError("give either --model DIR or --models A B ...")
    if bool(args.prompt) == bool(args.prompts):
        raise ValueError("give either --prompt TEXT or --prompts F.jsonl")
    if args.prompts and not args.out:
        raise ValueError("--prompts needs --out G.jsonl")
    if args.num_samples < 1 or args.max_new_tokens < 1 or args.batch_size < 1:
        raise ValueError("--num-samples, --max-new-tokens and --batch-size must be at least 1")
    if args.models:
        if not args.prompts:
            raise ValueError("arbitrage over --models needs --prompts F.jsonl --out G.jsonl")
        if args.route == "reward" and not args.arbiter or args.pairs and not args.arbiter:
            raise ValueError("--route reward and --pairs need --arbiter RM")
        if args.route == "fixed" and not args.table:
            raise ValueError("--route fixed needs --table FILE.json")
        if args.num_samples != 1:
            raise ValueError("arbitrage takes one answer from each of --models; leave --num-samples out")
    elif args.arbiter or args.pairs or args.table:
        raise ValueError("--arbiter, --pairs and --table go with --models A B ...")
    for path in (args.out, args.pairs):
        if path and Path(path).exists():
            raise ValueError(f"{path} exists; give a new file, nothing is overwritten")
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no such folder; make it first")
    if args.pairs and Path(args.pairs).resolve() == Path(args.out).resolve():
        raise ValueError("--pairs and --out are the same file; give two")
    for folder in filter(None, [args.model, *(args.models or [])]):
        if isinstance(weights.look_into(folder)[0], weights.RewardModel):
            raise ValueError(f"{folder}: a reward model cannot generate; give a language model")
    if args.arbiter and not isinstance(weights.look_into(args.arbiter)[0], weights.RewardModel):
        raise ValueError(f"--arbiter {args.arbiter}: a language model, not a reward model; give a folder that the reward stage wrote")


def read_table(path, rows, models):
    """The teacher of each language, for --route fixed: {language: one of --models} for every language of the prompts."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--table {path}: not JSON ({error})") from None
    wrong = sorted({str(row.get("language")) for row in rows if not isinstance(table, dict) or table.get(row.get("language")) not in models})
    if wrong:
        raise ValueError(f"--table {path}: names none of --models for {' '.join(wrong)}; it needs {{language: model folder}} for each language of the prompts")
    return table


def sample(folder, rows, args, device):
    """([rows' samples], new tokens, seconds) of one model folder."""
    model, tokenizer = weights.load(folder, device, getattr(torch, args.dtype))
    started = time.perf_counter()
    groups = answer_rows(model, tokenizer, rows, args.num_samples, args.max_new_tokens, args.temperature, args.seed, args.batch_size,
                         progress=Path(folder).name, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
    return groups, sum(len(a["ids"]) for group in groups for a in group), time.perf_counter() - started


def plain(row):
    return {k: v for k, v in row.items() if k not in ("prompt_messages", "candidates")}


def arbitrage(rows, args, device):
    """All models answer all prompts, the arbiter scores, one answer is kept. Returns (new tokens, seconds)."""
    table = read_table(args.table, rows, args.models) if args.route == "fixed" else None
    answers, scores, tokens, seconds = {}, {} if args.arbiter else None, 0, 0.0
    for folder in args.models:
        groups, n, s = sample(folder, rows, args, device)
        answers[folder], tokens, seconds = [group[0]["completion"] for group in groups], tokens + n, seconds + s
    if args.arbiter:
        arbiter, tokenizer = weights.load(args.arbiter, device)
        for folder in args.models:
            scores[folder] = score_texts(arbiter, tokenizer, [{**row, "completion": text} for row, text in zip(rows, answers[folder])])
    candidates = candidates_from(rows, answers, scores)
    chosen, counts = route(candidates, args.route, args.seed, table)
    if distributed.is_main():
        by_prompt = {id(row["prompt_messages"]): {c["teacher"]: c["reward"] for c in row["candidates"]} for row in candidates}
        write_jsonl(args.out, [{**plain(row), "scores": by_prompt[id(row["prompt_messages"])]} for row in chosen])
        print(wins_table(counts["wins"], args.models))
        print("  ".join(f"{k.replace('_', ' ')}: {v}" for k, v in counts.items() if k != "wins"))
        if args.pairs:
            pairs, pair_counts = best_worst(candidates, args.margin)
            write_jsonl(args.pairs, [plain(p) for p in pairs])
            print("pairs  " + "  ".join(f"{k.replace('_', ' ')}: {v}" for k, v in pair_counts.items()))
    return tokens, seconds


def run(args, device):
    started = time.perf_counter()
    check(args)
    rows = load_prompts(args.prompts) if args.prompts else [{"prompt": args.prompt, "prompt_messages": [{"role": "user", "content": args.prompt}]}]
    if args.models:
        tokens, seconds = arbitrage(rows, args, device)
    else:
        groups, tokens, seconds = sample(args.model, rows, args, device)
        if distributed.is_main():
            made = [{**plain(row), "completion": a["completion"], "num_tokens": len(a["ids"]), "finish_reason": a["finish_reason"], "logp": a["logp"],
                     "model": args.model, "seed": args.seed, "sample": i} for row, group in zip(rows, groups) for i, a in enumerate(group)]
            if args.out:
                write_jsonl(args.out, made)
            else:
                print("\n".join(row["completion"] for row in made))
    if distributed.is_main():
        print(f"{len(rows)} prompts, {tokens} new tokens, {seconds:.2f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s, "
              f"and {time.perf_counter() - started - seconds:.1f} s for files, loading and scores", file=sys.stderr)


def main():
    args = make_parser().parse_args()
    distributed.launch(lambda device: run(args, device))


if __name__ == "__main__":
    main()
