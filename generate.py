"""Generate: answers of one model, a talk with one or two, or multilingual data arbitrage over several.

    python generate.py --model DIR --prompt "..."
    python generate.py --model DIR --chat           (or --models A B --chat: they answer side by side)
    torchrun generate.py --model DIR --prompts F.jsonl --out G.jsonl --num-samples 4 --temperature 0.7
    torchrun generate.py --models A B C --arbiter RM --prompts F.jsonl --out best.jsonl --pairs pairs.jsonl
"""

import gc

gc.disable()        # importing torch makes many objects that all stay: not to look through them saves 1.1 s

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

import torch

from aya_min import distributed, weights
from aya_min.alike import identity
from aya_min.arbitrage import candidates_from, route, wins_table
from aya_min.chat import chat
from aya_min.command import WHOLE, Parser, is_text, number, printable
from aya_min.config import TEMPERATURE, Reading, add_flags, settings_from
from aya_min.data import load_prompts, without_added_keys
from aya_min.engine import LEAST_TEMPERATURE, Fused, check_sampling
from aya_min.files import dumps, jsonl, marked, read_json, taken
from aya_min.journal import PURPOSE, Journal
from aya_min.languages import language_code
from aya_min.lengths import cut_left, fit_prompts
from aya_min.preferences import ANSWER, best_worst, cut_line
from aya_min.reward import score_texts
from aya_min.sampling import answer_rows, engine_size, stream

gc.freeze()
gc.enable()

SAMPLING = ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "ignore_eos",
            "seed", "dtype")
OF_POOL = ("arbiter", "pairs", "table", "route", "margin", "keep_cut")     # how --models' answers are chosen
POOL_LINE = "--models A B ... --prompts F.jsonl"


def stop_text(text):
    if not text or not is_text(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a text of at least one character")
    return text


def make_parser():
    parser = Parser(prog="generate.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="model folder")
    add("--models", nargs="+", help="model folders of the pool, for arbitrage; or two, with --chat")
    add("--arbiter", help="reward model folder that scores the pool's answers")
    add("--prompt", help="one prompt; the answer goes to standard output as it is made")
    add("--chat", action="store_true", help="talk in the terminal; /help there lists the commands")
    add("--prompts", nargs="+", help="JSONL files of prompts")
    add("--out", help="JSONL to write; must not exist. Until it is whole, what is finished is in "
                      "OUT.partial, and the same command goes on from there")
    add("--pairs", help="arbitrage: also write best/worst pairs here")
    add("--margin", type=number(float, "[0, inf)"),
        help="arbitrage: least difference of reward in a pair (default 0)")
    add("--route", choices=["reward", "random", "fixed"],
        help="arbitrage: how the answer is chosen (default reward)")
    add("--table", help="--route fixed: JSON file {language: model folder as given in --models}")
    add("--num-samples", type=number(int, "[1, 1000000]"), default=1,
        help="answers to each prompt (default 1)")
    add("--temperature", type=number(float, TEMPERATURE), default=0.3,
        help=f"0 is greedy, else {LEAST_TEMPERATURE} to 1000 (default 0.3, the model card's)")
    add("--top-k", type=number(int, "[0, inf)"), default=0, help="0 keeps all (default 0)")
    add("--top-p", type=number(float, "(0, 1]"), default=1.0, help="1 keeps all (default 1)")
    add("--min-p", type=number(float, "[0, 1]"), default=0.0, help="0 keeps all (default 0)")
    add("--max-new-tokens", type=number(int, "[1, inf)"), default=256, help="per answer (default 256)")
    add("--stop", nargs="+", default=[], metavar="TEXT", type=stop_text,
        help="end an answer before any of these texts too")
    add("--ignore-eos", action="store_true",
        help="go on to --max-new-tokens whatever the model says, for timing")
    add("--batch-size", type=number(int, "[1, inf)"), default=256,
        help="sequences decoded together; a finished one makes room for the next prompt (default 256)")
    add("--seed", type=number(int, WHOLE), default=0)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add_flags(parser, Reading)
    return parser


# ---- what is checked before anything is read ---------------------------------------------------------------

def check(args):
    """Refuse flags that do not go together and outputs that cannot be written."""
    if bool(args.model) == bool(args.models):
        raise ValueError("give either --model DIR or --models A B ...")
    if (args.prompt is not None) + bool(args.prompts) + args.chat != 1:
        raise ValueError("give one of --prompt TEXT, --prompts F.jsonl and --chat")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty; give a text")
    if args.prompts and not args.out:
        raise ValueError("--prompts needs --out G.jsonl")
    if args.chat and (distributed.num_ranks() > 1 or args.out or args.num_samples != 1 or args.stop
                      or args.ignore_eos or len(args.models or [""]) > 2):
        raise ValueError("--chat is for one process and one or two models, without --out, --num-samples, "
                         "--stop and --ignore-eos")
    check_sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    check_pool(args)
    of_files = args.columns or args.allow_control_tokens is not None or args.chat and args.too_long
    if of_files and not args.prompts:
        raise ValueError("--columns, --too-long and --allow-control-tokens go with --prompts F.jsonl")
    outputs = [path for path in (args.out, args.pairs) if path]
    for path in outputs:
        folder = Path(path).absolute().parent
        if os.path.lexists(path) and not marked(f"{args.out}.partial", PURPOSE):
            raise taken(path)
        if not folder.is_dir():
            raise ValueError(f"{path}: there is no such folder; make it first")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{path}: nothing can be written into that folder; give another")
    names = [Path(path).resolve() for path in outputs + [f"{args.out}.partial"] * bool(args.out)]
    if len(set(names)) < len(names):
        raise ValueError("--pairs and --out are the same file; give two, neither named OUT.partial")


def check_pool(args):
    """Refuse what arbitrage cannot do, or what only it does."""
    given = [f"--{name.replace('_', '-')}" for name in OF_POOL if getattr(args, name) is not None]
    if not args.models or args.chat:
        if given:
            raise ValueError(f"--arbiter, --pairs and --table go with {POOL_LINE}, and so does {given[0]}")
        return
    if not args.prompts:
        raise ValueError("arbitrage over --models needs --prompts F.jsonl --out G.jsonl")
    args.route = args.route or "reward"
    if args.route == "reward" and not args.arbiter or args.pairs and not args.arbiter:
        raise ValueError("--route reward and --pairs need --arbiter RM")
    if args.route == "fixed" and not args.table:
        raise ValueError("--route fixed needs --table FILE.json")
    if args.table and args.route != "fixed":
        raise ValueError("--table goes with --route fixed")
    if args.margin is not None and not args.pairs:
        raise ValueError("--margin goes with --pairs FILE")
    if args.num_samples != 1:
        raise ValueError("arbitrage takes one answer from each of --models; leave --num-samples out")
    if twice := [folder for folder in args.models if args.models.count(folder) > 1]:
        raise ValueError(f"--models names {twice[0]} twice; name each once")


# ---- what is checked before any weights are read -----------------------------------------------------------

def look_at_models(args):
    """({folder: (model without weights, tokenizer, header)} of the models, the same of the arbiter)."""
    looked = {folder: weights.load_meta(folder) for folder in args.models or [args.model]}
    for folder, (model, *_) in looked.items():
        if isinstance(model, weights.RewardModel):
            raise ValueError(f"{folder}: a reward model cannot generate; give a language model")
    arbiter = weights.load_meta(args.arbiter) if args.arbiter else None
    if arbiter and not isinstance(arbiter[0], weights.RewardModel):
        raise ValueError(f"--arbiter {args.arbiter}: a language model, not a reward model; give a folder "
                         "that the reward stage wrote")
    return looked, arbiter


def read_rows(args, reading, tokenizer):
    if args.prompts:
        return load_prompts(args.prompts, reading, tokenizer)
    return [{"prompt": args.prompt, "prompt_messages": [{"role": "user", "content": args.prompt}],
             "prompt_where": "--prompt"}]


def fit(rows, looked, arbiter, args, reading):
    """(the rows for which every model has room, and the arbiter for their answers too; their lengths in
    tokens, {model folder: [length, ...]}). What becomes of the others is --too-long.
    """
    readers = [(folder, *about[:2], 0) for folder, about in looked.items()]
    if arbiter:
        readers.append((args.arbiter, *arbiter[:2], len(arbiter[1].closing["assistant"])))
    lengths = {}
    for folder, model, tokenizer, ending in readers:
        positions = model.config.max_position_embeddings
        room = positions - args.max_new_tokens - ending
        what = f"room in {folder} ({positions} positions, --max-new-tokens {args.max_new_tokens})"
        if room < 2:
            raise ValueError(f"there is no {what} for a prompt; lower --max-new-tokens")
        found = {id(row): len(tokenizer.encode_prompt(row["prompt_messages"])) for row in rows}
        rows = fit_prompts(rows, lambda row: found[id(row)], room, reading.too_long, what)
        lengths[folder] = {key: min(room, length) for key, length in found.items()}
    if not rows:
        raise ValueError("all prompts are too long; give shorter ones, or a lower --max-new-tokens")
    return rows, {folder: [lengths[folder][id(row)] for row in rows] for folder in looked}


def plan_cache(model, lengths, args, device):
    """(slots, tokens of a slot, bytes) of the KV cache that this rank needs; too large a one is refused."""
    mine = lengths[distributed.rank()::distributed.num_ranks()]
    limits, dtype = [args.max_new_tokens] * len(mine), getattr(torch, args.dtype)
    return engine_size(model.config, mine, limits, args.num_samples, args.batch_size, device, dtype)


def read_table(path, rows, models):
    """The teacher of each language, for --route fixed: {language: one of --models} for every language of the
    rows, None for rows without one."""
    table = {}
    for name, folder in read_json(path).items():
        if (code := language_code(name)) is None:
            raise ValueError(f"--table {path}: unknown language {name!r}")
        if table.setdefault(code, folder) != folder:
            raise ValueError(f"--table {path}: {name!r} is {code}, which has another model already; keep one")
    table[None] = table.get("other")
    codes = {row.get("language") for row in rows}
    wrong = sorted(code or "other" for code in codes if table.get(code) not in models)
    if wrong:
        raise ValueError(f"--table {path}: names none of --models for {' '.join(wrong)}; it needs "
                         "a model folder for each language of the prompts (other: those without one)")
    return table


# ---- answers -----------------------------------------------------------------------------------------------

def open_journal(rows, looked, args, reading):
    """What is finished of this very work: the same prompts, models and settings; the batch size and the
    number of ranks may differ."""
    made_by = {}
    for folder, (*_, header) in looked.items():
        made_by |= identity(folder, header)
    prompts = hashlib.sha256(dumps([row["prompt_messages"] for row in rows]).encode()).hexdigest()
    settings = {"models": list(looked), "model files": made_by, "prompts": prompts,
                "cut-left": reading.too_long == "cut-left", **{k: getattr(args, k) for k in SAMPLING}}

    def fits(group):
        return isinstance(group, list) and len(group) == args.num_samples and all(map(is_answer, group))
    return Journal(f"{args.out}.partial", settings, fits)


def is_answer(value):
    kinds = {"completion": str, "ids": list, "finish_reason": str, "logp": float}
    return isinstance(value, dict) and value.keys() == kinds.keys() and all(
        isinstance(value[key], kind) for key, kind in kinds.items())


def stop_ids_of(tokenizer, args):
    return [] if args.ignore_eos else tokenizer.stop_ids


def sample(folder, rows, lengths, args, device, reading, journal=None):
    """([rows' samples], new tokens, seconds) of one model folder; what the journal has is not made again."""
    done = journal.done if journal else {}
    left = [i for i in range(len(rows)) if f"{folder} {i}" not in done]
    tokens, seconds = 0, 0.0
    if left:
        model, tokenizer = weights.load(folder, device, getattr(torch, args.dtype))
        slots, max_tokens, size = plan_cache(model, [lengths[folder][i] for i in left], args, device)
        distributed.say(f"{Path(folder).name}: KV cache of {slots} rows x {max_tokens} tokens, "
                        f"{size / 1e6:,.1f} MB a rank")
        started = []
        made = answer_rows(
            model, tokenizer, [rows[i] for i in left], args.num_samples, args.max_new_tokens,
            args.temperature, args.seed, args.batch_size, progress=Path(folder).name,
            stop_ids=stop_ids_of(tokenizer, args), stop_strings=args.stop, numbers=left, name=folder,
            cut_left=reading.too_long == "cut-left",
            on_done=journal and (lambda j, answers: journal.add(f"{folder} {left[j]}", answers)),
            on_ready=lambda: started.append(time.perf_counter()),
            top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
        seconds = time.perf_counter() - (started or [time.perf_counter()])[0]
        tokens = sum(len(a["ids"]) for group in made for a in group)
        done = {**done, **{f"{folder} {i}": group for i, group in zip(left, made)}}
    return [done[f"{folder} {i}"] for i in range(len(rows))], tokens, seconds


def answer_prompt(args, device, reading):
    """Stream the answer to --prompt to standard output. Returns (new tokens, seconds)."""
    model, tokenizer = weights.load(args.model, device, getattr(torch, args.dtype))
    started, ids, stop_ids = time.perf_counter(), [], stop_ids_of(tokenizer, args)
    prompt = tokenizer.encode_prompt(args.prompt)
    if reading.too_long == "cut-left":
        prompt = cut_left(prompt, model.config.max_position_embeddings - args.max_new_tokens)

    def counted():
        for i in stream(model, prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                        args.min_p, stop_ids, args.seed, name=args.model):
            ids.append(i)
            yield i
    try:
        for piece in tokenizer.stream(counted()):
            print(printable(piece), end="", flush=True)
        print(flush=True)
    except OSError as error:                        # a full disk, a pipe that nobody reads
        raise OSError(error.errno, error.strerror, "standard output") from None
    if ids[-1] not in stop_ids and not args.ignore_eos:
        print(f"cut: the answer was not at its end after --max-new-tokens {args.max_new_tokens}",
              file=sys.stderr)
    return len(ids), time.perf_counter() - started


def talk(args, device):
    models = []
    for folder in args.models or [args.model]:
        model, tokenizer = weights.load(folder, device, getattr(torch, args.dtype))
        path = Path(folder)
        name = path.name if path.name != "model" else path.parent.name
        models.append((name, Fused(model), tokenizer, stop_ids_of(tokenizer, args)))
    chat(models, max_new_tokens=args.max_new_tokens, seed=args.seed, temperature=args.temperature,
         top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)


# ---- outputs -----------------------------------------------------------------------------------------------

def of_prompt(row):
    """The keys of a row that are its prompt's."""
    return {k: v for k, v in without_added_keys(row).items() if k not in ANSWER}


def answers_of(rows, lengths, args, device, reading, journal):
    """Every prompt is answered by one model. Returns ({path: rows}, text lines, new tokens, seconds)."""
    groups, tokens, seconds = sample(args.model, rows, lengths, args, device, reading, journal)
    made = [{**of_prompt(row), "completion": a["completion"], "num_tokens": len(a["ids"]),
             "finish_reason": a["finish_reason"], "logp": round(a["logp"], 4), "model": args.model,
             "seed": args.seed, "sample": i} for row, group in zip(rows, groups) for i, a in enumerate(group)]
    if not args.ignore_eos:
        line = cut_line([{**row, "candidates": group} for row, group in zip(rows, groups)])
        distributed.say(f"{line} answers, at --max-new-tokens {args.max_new_tokens}")
    return {args.out: made}, [] if args.out else [a["completion"] for a in groups[0]], tokens, seconds


def arbitrage(rows, lengths, args, device, reading, journal, table, same):
    """All models answer all prompts, the arbiter scores, one answer is kept. Returns as `answers_of` does."""
    answers, scores, tokens, seconds = {}, {} if args.arbiter else None, 0, 0.0
    for folder in args.models:
        groups, n, s = sample(folder, rows, lengths, args, device, reading, journal)
        answers[folder], tokens, seconds = [group[0] for group in groups], tokens + n, seconds + s
    if args.arbiter:
        arbiter, tokenizer = weights.load(args.arbiter, device)
        for folder in args.models:
            answered = [{**row, "completion": a["completion"]} for row, a in zip(rows, answers[folder])]
            scores[folder] = score_texts(arbiter, tokenizer, answered, name=args.arbiter,
                                         too_long=reading.too_long)
    candidates = candidates_from(rows, answers, scores)
    chosen, counts = route(candidates, args.route, args.seed, table, reading.keep_cut, same)
    rewards = {}                                        # by the messages' id: a file may be given twice
    for row in candidates:
        rewards[id(row["prompt_messages"])] = {c["teacher"]: c["reward"] for c in row["candidates"]}
    outputs = {args.out: [{**without_added_keys(row), "scores": rewards[id(row["prompt_messages"])]}
                          for row in chosen]}
    lines = [wins_table(counts["wins"], args.models), counted(counts), cut_line(candidates)]
    if args.pairs:
        pairs, pair_counts = best_worst(candidates, args.margin or 0.0, reading.keep_cut, same)
        outputs[args.pairs] = [without_added_keys(pair) for pair in pairs]
        lines.append("pairs  " + counted(pair_counts))
    for path, made in outputs.items():
        if not made:
            raise ValueError(f"{path}: not a row is left ({'; '.join(lines[1:])}); " + (
                f"give --keep-cut, or remove {args.out}.partial and give more of --max-new-tokens"
                if counts["cut"] and not reading.keep_cut else
                "lower --margin, or leave --pairs out" if path == args.pairs else "look at the models")
                + f". Nothing is written, the answers are in {args.out}.partial")
    return outputs, lines, tokens, seconds


def counted(counts):
    """One line of text: the counts that are numbers; that of cut answers has a line of its own."""
    numbers = {name: n for name, n in counts.items() if name != "cut" and type(n) is int}
    return "  ".join(f"{name.replace('_', ' ')}: {n}" for name, n in numbers.items())


def run(args, device):
    started = time.perf_counter()
    check(args)
    reading = settings_from(Reading, flags=vars(args))
    looked, arbiter = look_at_models(args)
    if args.chat:
        return talk(args, device)
    tokenizer = next(iter(looked.values()))[1]
    rows, lengths = fit(read_rows(args, reading, tokenizer), looked, arbiter, args, reading)
    for folder, (model, *_) in looked.items():
        plan_cache(model, lengths[folder], args, device)
    table = read_table(args.table, rows, args.models) if args.table else None
    if args.out:
        tokens, seconds = work(rows, lengths, looked, arbiter, table, args, device, reading)
    elif args.num_samples == 1 and not args.stop and distributed.num_ranks() == 1:
        tokens, seconds = answer_prompt(args, device, reading)
    else:
        _, lines, tokens, seconds = answers_of(rows, lengths, args, device, reading, None)
        tell(lines)
    if distributed.is_main():
        rest = time.perf_counter() - started - seconds
        print(f"{len(rows)} prompts, {tokens} new tokens, {seconds:.2f} s, {tokens / max(seconds, 1e-9):.0f} "
              f"tokens/s, and {rest:.1f} s for files, loading, compiling and scores", file=sys.stderr)


def work(rows, lengths, looked, arbiter, table, args, device, reading):
    """Answer the prompts, write --out and --pairs together. Returns (new tokens, seconds)."""
    outputs = [path for path in (args.out, args.pairs) if path]
    choice = {"table of languages": table and {str(k): v for k, v in table.items()},
              **{name: getattr(args, name) for name in OF_POOL}}
    with open_journal(rows, looked, args, reading) as journal:
        if journal.finish_publishing(outputs, choice):
            distributed.say(f"{' and '.join(outputs)} had been finished before; what was left in "
                            f"{args.out}.partial is removed")
            journal.remove()
            return 0, 0.0
        for path in filter(os.path.lexists, outputs):
            raise taken(path)
        if journal.done:
            distributed.say(f"goes on: {len(journal.done)} of {len(rows) * len(looked)} prompts were "
                            "finished before")
        if args.models:
            same = (arbiter or looked[args.models[0]])[1].key
            made, *said = arbitrage(rows, lengths, args, device, reading, journal, table, same)
        else:
            made, *said = answers_of(rows, lengths, args, device, reading, journal)
        journal.publish({path: jsonl(rows) for path, rows in made.items()}, choice)
        journal.remove()
    lines, tokens, seconds = said
    tell(lines)
    return tokens, seconds


def tell(lines):
    if distributed.is_main():
        for line in lines:
            print(printable(line))


def main():
    args = make_parser().parse_args()
    try:
        distributed.launch(lambda device: run(args, device))
    except KeyboardInterrupt:
        left = args.out and os.path.exists(f"{args.out}.partial")
        ways_on = f"; what is finished is in {args.out}.partial, and the same command goes on from there"
        print("stopped" + (ways_on if left else ""), file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
