"""Generate: answers of one model, a conversation with one or two, or multilingual data arbitrage over several.

    python generate.py --model DIR --prompt "..."
    python generate.py --model DIR --chat           (or --models A B --chat: they answer side by side)
    torchrun generate.py --model DIR --prompts F.jsonl --out G.jsonl --num-samples 4 --temperature 0.7
    torchrun generate.py --models A B C --arbiter RM --prompts F.jsonl --out best.jsonl --pairs pairs.jsonl
"""

import gc

gc.disable()                # importing torch makes many objects that all stay: they are not looked through as they come, nor at the end, 1.1 s less

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch

from aya_min import distributed, weights
from aya_min.arbitrage import candidates_from, route, wins_table
from aya_min.chat import chat
from aya_min.command import Parser
from aya_min.data import load_prompts
from aya_min.journal import Journal
from aya_min.preferences import best_worst
from aya_min.reward import score_texts
from aya_min.sampling import Fused, answer_rows, check_lengths, check_sampling, plan, stream
from aya_min.files import write_jsonl

gc.freeze()
gc.enable()

SAMPLING = ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "ignore_eos", "seed", "dtype")


def make_parser():
    parser = Parser(prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder")
    parser.add_argument("--models", nargs="+", help="model folders of the pool, for arbitrage; or two, with --chat")
    parser.add_argument("--arbiter", help="reward model folder that scores the pool's answers")
    parser.add_argument("--prompt", help="one prompt; the answer goes to standard output as it is made")
    parser.add_argument("--chat", action="store_true", help="talk in the terminal; /help there lists the commands")
    parser.add_argument("--prompts", nargs="+", help="JSONL files of prompts")
    parser.add_argument("--out", help="JSONL to write; must not exist. Until it is whole, what is finished is in OUT.partial, and the same command goes on from there")
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
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="end an answer before any of these texts too")
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-new-tokens whatever the model says, for timing")
    parser.add_argument("--batch-size", type=int, default=256, help="sequences decoded together; a finished one makes room for the next prompt (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser


def check(args):
    """Refuse what cannot work before any model is loaded."""
    if bool(args.model) == bool(args.models):
        raise ValueError("give either --model DIR or --models A B ...")
    if bool(args.prompt) + bool(args.prompts) + args.chat != 1:
        raise ValueError("give one of --prompt TEXT, --prompts F.jsonl and --chat")
    if args.prompts and not args.out:
        raise ValueError("--prompts needs --out G.jsonl")
    if args.chat and (distributed.num_ranks() > 1 or args.out or args.num_samples != 1 or args.stop or args.ignore_eos or len(args.models or [""]) > 2):
        raise ValueError("--chat is for one process and one or two models, without --out, --num-samples, --stop and --ignore-eos")
    check_sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    if args.num_samples < 1 or args.max_new_tokens < 1 or args.batch_size < 1:
        raise ValueError("--num-samples, --max-new-tokens and --batch-size must be at least 1")
    if args.models and not args.chat:
        if not args.prompts:
            raise ValueError("arbitrage over --models needs --prompts F.jsonl --out G.jsonl")
        if args.route == "reward" and not args.arbiter or args.pairs and not args.arbiter:
            raise ValueError("--route reward and --pairs need --arbiter RM")
        if args.route == "fixed" and not args.table:
            raise ValueError("--route fixed needs --table FILE.json")
        if args.num_samples != 1:
            raise ValueError("arbitrage takes one answer from each of --models; leave --num-samples out")
    elif args.arbiter or args.pairs or args.table:
        raise ValueError("--arbiter, --pairs and --table go with --models A B ... --prompts F.jsonl")
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


def stop_ids_of(folder, tokenizer, args):
    return [] if args.ignore_eos else sorted({*tokenizer.stop_ids, *weights.read_stop_ids(folder)})


def look_at_prompts(folder, rows, args, device):
    """(rows, tokens of a row, bytes) of the KV cache that this rank needs. Refuses, before any weights are read, prompts and caches that are too long."""
    model, tokenizer, _ = weights.look_into(folder)
    lengths = [len(tokenizer.encode_prompt(row["prompt_messages"])) for row in rows]
    check_lengths(model.config, lengths, [args.max_new_tokens] * len(rows))
    mine = lengths[distributed.rank()::distributed.num_ranks()]
    return plan(model.config, mine, [args.max_new_tokens] * len(mine), args.num_samples, args.batch_size, device, getattr(torch, args.dtype))


def open_journal(rows, folders, args):
    """What is finished of this very work: the same prompts, models and settings; the batch size and the number of ranks may differ."""
    files = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for folder in folders for file in {f for f, *_ in weights.look_into(folder)[2].values()}}
    prompts = hashlib.sha256(json.dumps([row["prompt_messages"] for row in rows]).encode()).hexdigest()
    journal = Journal(f"{args.out}.partial", {"models": folders, "model files": files, "prompts": prompts, **{k: getattr(args, k) for k in SAMPLING}})
    if journal.done and distributed.is_main():
        print(f"goes on: {len(journal.done)} of {len(rows) * len(folders)} prompts were finished before", file=sys.stderr)
    return journal


def sample(folder, rows, args, device, journal=None):
    """([rows' samples], new tokens, seconds) of one model folder; what the journal has is not made again."""
    done = journal.done if journal else {}
    left = [i for i in range(len(rows)) if f"{folder} {i}" not in done]
    tokens, seconds = 0, 0.0
    if left:
        slots, max_tokens, size = look_at_prompts(folder, [rows[i] for i in left], args, device)
        if distributed.is_main():
            print(f"{Path(folder).name}: KV cache of {slots} rows x {max_tokens} tokens, {size / 1e6:,.1f} MB a rank", file=sys.stderr)
        model, tokenizer = weights.load(folder, device, getattr(torch, args.dtype))
        started = []
        made = answer_rows(model, tokenizer, [rows[i] for i in left], args.num_samples, args.max_new_tokens, args.temperature, args.seed, args.batch_size,
                           progress=Path(folder).name, stop_ids=stop_ids_of(folder, tokenizer, args), stop_strings=args.stop, numbers=left,
                           on_done=journal and (lambda j, answers: journal.add(f"{folder} {left[j]}", answers)), on_ready=lambda: started.append(time.perf_counter()),
                           top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
        seconds, tokens = time.perf_counter() - (started or [time.perf_counter()])[0], sum(len(a["ids"]) for group in made for a in group)
        done = {**done, **{f"{folder} {i}": group for i, group in zip(left, made)}}
    return [done[f"{folder} {i}"] for i in range(len(rows))], tokens, seconds


def say(args, device):
    """Stream the answer to --prompt to standard output. Returns (new tokens, seconds)."""
    model, tokenizer = weights.load(args.model, device, getattr(torch, args.dtype))
    started, ids = time.perf_counter(), []

    def counted():
        for i in stream(model, tokenizer.encode_prompt(args.prompt), args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p,
                        stop_ids_of(args.model, tokenizer, args), args.seed):
            ids.append(i)
            yield i
    for piece in tokenizer.stream(counted()):
        print(piece, end="", flush=True)
    print()
    return len(ids), time.perf_counter() - started


def talk(args, device):
    models = []
    for folder in args.models or [args.model]:
        model, tokenizer = weights.load(folder, device, getattr(torch, args.dtype))
        models.append((Path(folder).name if Path(folder).name != "model" else Path(folder).parent.name, Fused(model), tokenizer, stop_ids_of(folder, tokenizer, args)))
    chat(models, max_new_tokens=args.max_new_tokens, seed=args.seed, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)


def plain(row):
    return {k: v for k, v in row.items() if k not in ("prompt_messages", "candidates")}


def arbitrage(rows, args, device, journal, table):
    """All models answer all prompts, the arbiter scores, one answer is kept. Returns (new tokens, seconds)."""
    answers, scores, tokens, seconds = {}, {} if args.arbiter else None, 0, 0.0
    for folder in args.models:
        groups, n, s = sample(folder, rows, args, device, journal)
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
    if args.chat:
        return talk(args, device)
    rows = load_prompts(args.prompts) if args.prompts else [{"prompt": args.prompt, "prompt_messages": [{"role": "user", "content": args.prompt}]}]
    folders = args.models or [args.model]
    for folder in folders:
        look_at_prompts(folder, rows, args, device)
    table = read_table(args.table, rows, args.models) if args.route == "fixed" else None
    journal = open_journal(rows, folders, args) if args.out else None
    if args.models:
        tokens, seconds = arbitrage(rows, args, device, journal, table)
    elif not args.out and args.num_samples == 1 and not args.stop and distributed.num_ranks() == 1:
        tokens, seconds = say(args, device)
    else:
        groups, tokens, seconds = sample(args.model, rows, args, device, journal)
        if distributed.is_main() and args.out:
            write_jsonl(args.out, [{**plain(row), "completion": a["completion"], "num_tokens": len(a["ids"]), "finish_reason": a["finish_reason"],
                                    "logp": round(a["logp"], 4), "model": args.model, "seed": args.seed, "sample": i}
                                   for row, group in zip(rows, groups) for i, a in enumerate(group)])
        elif distributed.is_main():
            print("\n".join(a["completion"] for a in groups[0]))
    if journal:
        journal.remove()
    if distributed.is_main():
        print(f"{len(rows)} prompts, {tokens} new tokens, {seconds:.2f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s, "
              f"and {time.perf_counter() - started - seconds:.1f} s for files, loading, compiling and scores", file=sys.stderr)


def main():
    args = make_parser().parse_args()
    try:
        distributed.launch(lambda device: run(args, device))
    except KeyboardInterrupt:
        print("stopped" + (f"; what is finished is in {args.out}.partial, and the same command goes on from there" if args.out else ""), file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
