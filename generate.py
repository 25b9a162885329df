"""Generate: answers of one model, a conversation with one or two, a server, data arbitrage over several.

    python generate.py --model DIR --prompt "..."
    python generate.py --model DIR --chat           (or --models A B --chat: they answer side by side)
    python generate.py --model DIR --serve          (or --models A B --serve: OpenAI's chat API, and a page)
    torchrun generate.py --model DIR --prompts F.jsonl --out G.jsonl --num-samples 4 --temperature 0.7
    torchrun generate.py --models A B C --arbiter RM --prompts F.jsonl --out best.jsonl --pairs pairs.jsonl
    torchrun generate.py --models A http://host/v1#model --arbiter RM --prompts F.jsonl --out best.jsonl
    python generate.py route --train candidates.jsonl --model DIR --out RUN       a router for --route learned
    python generate.py --answers G.jsonl --contrast translated.jsonl --out pairs.jsonl
    torchrun generate.py critique --model C --answers G.jsonl --out H.jsonl     critiques, for reward models
"""

import gc
import signal

# Ctrl-C while torch is imported ends the command, without a traceback.
on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
gc.disable()        # while importing torch, whose objects are permanent anyway: start-up is 1.1 s faster

import argparse
import hashlib
import os
import sys
import time
from operator import itemgetter
from pathlib import Path

import torch

from aya_min import contrast, critiques, distributed, generate_critique, weights
from aya_min.alike import identity
from aya_min.chat import chat
from aya_min.command import WHOLE, Parser, is_text, number, printable
from aya_min.config import TEMPERATURE, Reading, add_flags, settings_from
from aya_min.data import load_prompts, without_added_keys
from aya_min.engine import LEAST_TEMPERATURE, check_sampling
from aya_min.endpoint import is_endpoint
from aya_min.endpoint_answers import (add_flags as add_endpoint_flags, answer_rows as ask_rows,
                                      check_all_there, endpoints_of, is_answer as is_endpoint_answer)
from aya_min.files import check_place, dumps, jsonl, marked, taken
from aya_min.generate_pool import FILES, OF_POOL, add_flags as add_pool_flags
from aya_min.generate_pool import answers_of_pool, check_pool, check_router, detector, read_table
from aya_min.journal import PURPOSE, Journal
from aya_min.lengths import cut_left, fit_prompts
from aya_min.preferences import ANSWER, cut_line
from aya_min.sampling import answer_rows, engine_size, fused_of, stream
from aya_min.serve import MAX_LENGTH, serve_models

gc.freeze()
gc.enable()
signal.signal(signal.SIGINT, on_interrupt)

SAMPLING = ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "ignore_eos",
            "seed", "dtype")


def stop_text(text):
    if not text or not is_text(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a text of at least one character")
    return text


def make_parser():
    parser = Parser(prog="generate.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="model folder")
    add("--models", nargs="+", help="the pool for arbitrage: model folders, and OpenAI-compatible endpoints "
                                    "as http(s)://host/v1#model; with --chat or --serve one or two folders")
    add("--prompt", help="one prompt; the answer is printed to standard output as it is generated")
    add("--chat", action="store_true", help="a conversation in the terminal; /help lists its commands")
    add("--serve", action="store_true", help="answer chat completions, and a page at /, over HTTP; the "
                                             "sampling flags are the defaults of requests")
    add("--host", help="address to serve at (default 127.0.0.1: this machine only)")
    add("--port", type=number(int, "[0, 65535]"), help="0 takes a free one (default 8000)")
    add("--max-length", type=number(int, "[2, inf)"),
        help="with --serve: tokens of a prompt and its answer (default the model's positions, at most "
             f"{MAX_LENGTH})")
    add("--prompts", nargs="+", help="JSONL files of prompts")
    add("--out", help="JSONL file to write; must not exist. Finished answers are kept in OUT.partial, from "
                      "which the same command resumes after an interruption")
    add_pool_flags(add)
    add_endpoint_flags(add)
    add("--answers", help="with --contrast: JSONL file of answers written in the prompts' languages; of "
                          "critique the answers to criticise: pairs, completions or candidates")
    add("--contrast", help="JSONL file of answers to the same prompts that were translated from English; "
                           "--out gets pairs, --answers chosen, --contrast rejected. Takes no model")
    add("--num-samples", type=number(int, "[1, 1000000]"), default=1,
        help="answers to each prompt, in arbitrage of each model that is asked (default 1)")
    add("--temperature", type=number(float, TEMPERATURE), default=0.3,
        help=f"0 is greedy, else {LEAST_TEMPERATURE} to 1000 (default 0.3, as in the model card)")
    add("--top-k", type=number(int, "[0, inf)"), default=0, help="0 keeps all (default 0)")
    add("--top-p", type=number(float, "(0, 1]"), default=1.0, help="1 keeps all (default 1)")
    add("--min-p", type=number(float, "[0, 1]"), default=0.0, help="0 keeps all (default 0)")
    add("--max-new-tokens", type=number(int, "[1, inf)"), default=256, help="per answer (default 256)")
    add("--stop", nargs="+", default=[], metavar="TEXT", type=stop_text,
        help="also end an answer before any of these texts")
    add("--ignore-eos", action="store_true",
        help="generate --max-new-tokens tokens even after the end token, for timing")
    add("--batch-size", type=number(int, "[1, inf)"), default=256,
        help="sequences decoded together; a finished one makes room for the next prompt (default 256)")
    add("--seed", type=number(int, WHOLE), default=0)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add_flags(parser, Reading)
    parser.set_defaults(critique=False)         # see `parsed`
    return parser


def parsed(words=None):
    """The arguments of a command line, and in `given` the names of those that stand in it, with any value.
    critique: whether its first word is that, see generate_critique.py."""
    words = sys.argv[1:] if words is None else words
    is_critique = words[:1] == ["critique"]
    words = words[is_critique:]
    args, parser = make_parser().parse_args(words), make_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args.given = [name for name in vars(parser.parse_args(words)) if name != "critique"]
    args.critique = is_critique
    return args


# ---- what is checked before anything is read ---------------------------------------------------------------

def check(args):
    """Refuse flags that exclude each other and outputs that cannot be written."""
    if bool(args.model) == bool(args.models):
        raise ValueError("give either --model DIR or --models A B ...")
    if (args.prompt is not None) + bool(args.prompts) + args.chat + args.serve != 1:
        raise ValueError("give one of --prompt TEXT, --prompts F.jsonl, --chat and --serve")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty; give a text")
    if args.prompts and not args.out:
        raise ValueError("--prompts needs --out G.jsonl")
    not_for_chat = args.out or args.num_samples != 1 or args.stop or args.ignore_eos
    talks = "--chat" if args.chat else "--serve" if args.serve else None
    if talks and (not_for_chat or distributed.num_ranks() > 1 or len(args.models or []) > 2):
        raise ValueError(f"{talks} is for one process and one or two models, without --out, --num-samples, "
                         "--stop and --ignore-eos")
    if is_endpoint(args.model or "") or talks and args.endpoints:
        raise ValueError("--model, --chat and --serve take model folders; an endpoint stands among --models, "
                         "with --prompts")
    if not args.serve and (args.host, args.port, args.max_length) != (None, None, None):
        raise ValueError("--host, --port and --max-length go with --serve")
    check_sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    check_pool(args)
    of_files = args.columns or args.allow_control_tokens is not None or talks and args.too_long
    if of_files and not args.prompts:
        raise ValueError("--columns, --too-long and --allow-control-tokens go with --prompts F.jsonl")
    check_outputs(args)


def check_outputs(args):
    """Refuse outputs that are in the way, that cannot be written, or that are the same."""
    outputs = outputs_of(args)
    for path in outputs.values():
        if os.path.lexists(path) and not marked(f"{args.out}.partial", PURPOSE):
            raise taken(path)
        check_place(path)
    seen = {Path(f"{args.out}.partial").resolve(): "--out"}
    for flag, path in outputs.items():
        if (other := seen.setdefault(Path(path).resolve(), flag)) != flag:
            raise ValueError(f"{flag} and {other} are the same file; give each its own, none named "
                             "OUT.partial")


def outputs_of(args):
    """{flag: path} of the files that the command writes."""
    return {f"--{name}": getattr(args, name) for name in FILES if getattr(args, name)}


# ---- what is checked before any weights are read -----------------------------------------------------------

def read_metas(args):
    """({folder: (model without weights, tokenizer, header)} of all folders; the arbiter's tuple or None).

    ValueError for a reward model that shall generate, or a language model that shall score.
    """
    folders = [*(args.models or [args.model]), *([args.critic] if args.critic else [])]
    metas = {folder: weights.load_meta(folder, packed=True) for folder in folders
             if folder not in args.endpoints}
    for folder, (model, *_) in metas.items():
        if not isinstance(model, weights.SPEAKERS):
            raise ValueError(f"{folder}: {weights.ONE[type(model)]} cannot generate; give a language "
                             "model")
    arbiter = weights.load_meta(args.arbiter) if args.arbiter else None
    if arbiter and not isinstance(arbiter[0], weights.RewardModel):
        raise ValueError(f"--arbiter {args.arbiter}: {weights.ONE[type(arbiter[0])]}, not a reward "
                         "model; give a folder that the reward stage wrote")
    if arbiter and critiques.reads_critiques(arbiter[0]) != bool(args.critic):
        raise ValueError(f"--arbiter {args.arbiter} was trained " + (
            "without critiques and reads none; leave --critic out" if args.critic else
            "with critiques; give --critic C, a model that writes them"))
    return metas, arbiter


def read_rows(args, reading, tokenizer):
    if args.prompts:
        rows = load_prompts(args.prompts, reading, tokenizer)
        if args.critic and (mine := next((row for row in rows if row.get("critic") is not None), None)):
            raise ValueError(f"{mine['prompt_where']}: 'critic' is there already, and --candidates names "
                             "--critic there; remove or rename it")
        return rows
    return [{"prompt": args.prompt, "prompt_messages": [{"role": "user", "content": args.prompt}],
             "prompt_where": "--prompt"}]


def fit(rows, metas, arbiter, router, args, reading):
    """(rows that fit, {model folder: [length of each row's prompt in tokens, ...]}).

    A row fits if the positions of each model and of the arbiter hold prompt and answer, and the router's the
    prompt. With --critic the arbiter's hold a critique too, and the critic's the text that asks for one, the
    answer and the critique. --too-long decides on the other rows. ValueError if no row is left.
    """
    def to_critic(row):
        text = generate_critique.request(row["prompt_messages"], "", row.get("language"))
        return [{"role": "user", "content": text}]
    prompt = itemgetter("prompt_messages")
    twice = args.max_new_tokens if args.critic else 0           # an answer and its critique
    readers = [(folder, *about[:2], 0, prompt) for folder, about in metas.items()]
    if arbiter:
        closing = len(arbiter[1].closing["assistant"])
        ending = twice + len(critiques.encode(arbiter[1], "")) if args.critic else 0
        readers.append((args.arbiter, *arbiter[:2], closing + ending, prompt))
    if args.critic in metas:
        readers.append((args.critic, *metas[args.critic][:2], twice, to_critic))
    if router:
        readers.append((args.router, *router[:2], -args.max_new_tokens, prompt))        # it reads no answer
    lengths = {}
    for folder, model, tokenizer, ending, asked in readers:
        positions = model.config.max_position_embeddings
        room = positions - args.max_new_tokens - ending
        of_critic = " for the critic's request, the answer and the critique" if asked is to_critic else ""
        what = f"room in {folder} ({positions} positions, --max-new-tokens {args.max_new_tokens}){of_critic}"
        if room < 2:
            raise ValueError(f"no {what} for a prompt; lower --max-new-tokens")
        found = {id(row): len(tokenizer.encode_prompt(asked(row), row["prompt_where"])) for row in rows}
        rows = fit_prompts(rows, lambda row: found[id(row)], room, reading.too_long, what)
        # a folder may be teacher and critic: its length is that of the prompt
        lengths.setdefault(folder, {key: min(room, length) for key, length in found.items()})
    if not rows:
        raise ValueError("all prompts are too long; give shorter ones, or a lower --max-new-tokens")
    return rows, {folder: [lengths[folder][id(row)] for row in rows] for folder in metas}


def plan_cache(model, lengths, args, device):
    """(slots, tokens per slot, bytes) of the KV cache that this rank needs; ValueError if it is too large."""
    mine = lengths[distributed.rank()::distributed.num_ranks()]
    limits = [args.max_new_tokens] * len(mine)
    dtype = getattr(torch, args.dtype)
    return engine_size(model.config, mine, limits, args.num_samples, args.batch_size, device, dtype)


# ---- answers -----------------------------------------------------------------------------------------------

def open_journal(rows, metas, args, reading):
    """The journal of finished answers. It belongs to these prompts, models and sampling settings; batch size
    and number of ranks may change between runs."""
    made_by = {}
    for folder, (*_, header) in metas.items():
        made_by |= identity(folder, header)
    prompts = hashlib.sha256(dumps([row["prompt_messages"] for row in rows]).encode()).hexdigest()
    settings = {"models": args.models or [args.model], "model files": made_by, "prompts": prompts,
                "cut-left": reading.too_long == "cut-left", **{k: getattr(args, k) for k in SAMPLING},
                **({"extra": args.extra} if args.extra else {}),
                **({"critic": args.critic} if args.critic else {})}

    def fits(group):
        return isinstance(group, list) and len(group) in (args.num_samples, 1 if args.critic else None) and (
            all(map(is_answer, group)) or all(map(is_endpoint_answer, group)))
    return Journal(f"{args.out}.partial", settings, fits)


def is_answer(value):
    kinds = {"completion": str, "ids": list, "finish_reason": str, "logp": float}
    return isinstance(value, dict) and value.keys() == kinds.keys() and all(
        isinstance(value[key], kind) for key, kind in kinds.items())


def stop_ids_of(tokenizer, args):
    return [] if args.ignore_eos else tokenizer.stop_ids


def sample(folder, wanted, rows, lengths, args, device, reading, journal=None, keys=None):
    """([samples of each row of these indices], new tokens, seconds) of one model; answers in the journal are
    not made again. keys: the journal's key of each row, if not the folder and the index."""
    done, keys = journal.done if journal else {}, keys or {i: f"{folder} {i}" for i in wanted}
    left = [i for i in wanted if keys[i] not in done]
    tokens, seconds = 0, 0.0
    if left:
        model, tokenizer = weights.load(folder, device, getattr(torch, args.dtype), packed=True)
        slots, max_tokens, size = plan_cache(model, [lengths[folder][i] for i in left], args, device)
        distributed.say(f"{Path(folder).name}: KV cache of {slots} rows x {max_tokens} tokens, "
                        f"{size / 1e6:,.1f} MB a rank")
        started = []
        made = answer_rows(
            model, tokenizer, [rows[i] for i in left], args.num_samples, args.max_new_tokens,
            args.temperature, args.seed, args.batch_size, progress=Path(folder).name,
            stop_ids=stop_ids_of(tokenizer, args), stop_strings=args.stop, numbers=left, name=folder,
            cut_left=reading.too_long == "cut-left",
            on_done=journal and (lambda j, answers: journal.add(keys[left[j]], answers)),
            on_ready=lambda: started.append(time.perf_counter()),
            top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
        seconds = time.perf_counter() - (started or [time.perf_counter()])[0]
        tokens = sum(len(a["ids"]) for group in made for a in group)
        done = {**done, **{keys[i]: group for i, group in zip(left, made)}}
    return [done[keys[i]] for i in wanted], tokens, seconds


def ask_critic(requests, metas, args, device, reading, journal):
    """(the requests that fit --critic, a group of one answer to each, new tokens, seconds)."""
    one = argparse.Namespace(**vars(args) | {"num_samples": 1, "stop": [], "ignore_eos": False,
                                             "critic": None})
    if args.critic in args.endpoints:
        wanted, keys = range(len(requests)), generate_critique.keys_of(args.critic, requests)
        return requests, *sample_endpoint(args.critic, wanted, requests, one, journal, keys)
    about = {args.critic: metas[args.critic]}
    requests, lengths = fit(requests, about, None, None, one, reading)
    wanted, keys = range(len(requests)), generate_critique.keys_of(args.critic, requests)
    return requests, *sample(args.critic, wanted, requests, lengths, one, device, reading, journal, keys)


def sample_endpoint(name, wanted, rows, args, journal, keys=None):
    """([answers to each row of these indices], new tokens, seconds) of an endpoint, see `sample`."""
    before, started = set(journal.done), time.perf_counter()
    keys = keys or {i: f"{name} {i}" for i in wanted}
    groups = ask_rows(args.endpoints[name], keys, rows, wanted, journal, args.concurrency,
                      num_samples=args.num_samples, max_new_tokens=args.max_new_tokens,
                      temperature=args.temperature, top_p=args.top_p, seed=args.seed, stop=args.stop)
    tokens = sum(answer["usage"].get("completion_tokens", 0) for i, group in zip(wanted, groups)
                 if keys[i] not in before for answer in group)
    return groups, tokens, time.perf_counter() - started


def answer_prompt(args, device, reading):
    """Stream the answer to --prompt to standard output. Returns (new tokens, seconds)."""
    model, tokenizer = weights.load(args.model, device, getattr(torch, args.dtype), packed=True)
    started, ids, stop_ids = time.perf_counter(), [], stop_ids_of(tokenizer, args)
    prompt = tokenizer.encode_prompt(args.prompt)
    if reading.too_long == "cut-left":
        prompt = cut_left(prompt, model.config.max_position_embeddings - args.max_new_tokens)

    def counted():
        for i in stream(model, prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                        args.min_p, stop_ids, args.seed, name=args.model):
            ids.append(i)
            yield i
    for piece in tokenizer.stream(counted()):
        print(printable(piece), end="", flush=True)
    print(flush=True)
    if ids[-1] not in stop_ids and not args.ignore_eos:
        print(f"cut: the answer was not finished after --max-new-tokens {args.max_new_tokens}",
              file=sys.stderr)
    return len(ids), time.perf_counter() - started


def talk(args, device):
    models = []
    for folder in args.models or [args.model]:
        model, tokenizer = weights.load(folder, device, getattr(torch, args.dtype), packed=True)
        models.append((weights.name_of(folder), fused_of(model), tokenizer, stop_ids_of(tokenizer, args)))
    chat(models, max_new_tokens=args.max_new_tokens, seed=args.seed, temperature=args.temperature,
         top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)


# ---- outputs -----------------------------------------------------------------------------------------------

def of_prompt(row):
    """A row without what this module added and without answers that it brought along."""
    return {k: v for k, v in without_added_keys(row).items() if k not in ANSWER}


def answers_of_model(rows, lengths, args, device, reading, journal):
    """One model answers every prompt. Returns ({path: rows}, text lines, new tokens, seconds)."""
    groups, tokens, seconds = sample(args.model, range(len(rows)), rows, lengths, args, device, reading,
                                     journal)
    made = [{**of_prompt(row), "completion": a["completion"], "num_tokens": len(a["ids"]),
             "finish_reason": a["finish_reason"], "logp": round(a["logp"], 4), "model": args.model,
             "seed": args.seed, "sample": i} for row, group in zip(rows, groups) for i, a in enumerate(group)]
    if not args.ignore_eos:
        line = cut_line([{**row, "candidates": group} for row, group in zip(rows, groups)])
        distributed.say(f"{line} answers, at --max-new-tokens {args.max_new_tokens}")
    lines = [] if args.out else [a["completion"] for a in groups[0]]
    return {args.out: made}, lines, tokens, seconds


def run_command(args, device):
    """What one rank does for a command line."""
    started = time.perf_counter()
    reading = settings_from(Reading, flags=vars(args))
    if not args.critique and (args.answers or args.contrast):
        contrast.check(args)
        return print_lines(contrast.write_pairs(args.answers, args.contrast, args.out, reading))
    asked = [*(args.models or []), args.critic, args.model if args.critique else None]
    args.endpoints = endpoints_of(list(filter(None, asked)), args)
    if args.critique:
        generate_critique.check(args)
        check_sampling(args.temperature, args.top_k, args.top_p, args.min_p)
        check_outputs(args)
    else:
        check(args)
    metas, arbiter = read_metas(args)
    check_all_there(args.endpoints)
    if args.chat:
        return talk(args, device)
    if args.serve:
        return serve_models(args, metas, device)
    tokenizer = (next(iter(metas.values()), None) or arbiter or (None, None))[1]
    router = check_router(args.router, args.models) if args.router else None
    rows = (generate_critique.requests_of(args.answers, reading, tokenizer) if args.critique
            else read_rows(args, reading, tokenizer))
    rows, lengths = fit(rows, metas, arbiter, router, args, reading)
    for folder, (model, *_) in metas.items():
        plan_cache(model, lengths[folder], args, device)
    table = read_table(args.table, rows, args.models) if args.table else None
    detect = detector(args.language_guard, rows)
    if args.out:
        tokens, seconds = write_answers(rows, lengths, metas, arbiter, table, detect, args, device, reading)
    elif args.num_samples == 1 and not args.stop and distributed.num_ranks() == 1:
        tokens, seconds = answer_prompt(args, device, reading)
    else:
        _, lines, tokens, seconds = answers_of_model(rows, lengths, args, device, reading, None)
        print_lines(lines)
    if distributed.is_main():
        rest = time.perf_counter() - started - seconds
        what = "answers" if args.critique else "prompts"
        print(f"{len(rows)} {what}, {tokens} new tokens, {seconds:.2f} s, {tokens / max(seconds, 1e-9):.0f} "
              f"tokens/s, and {rest:.1f} s for files, loading, compiling and scores", file=sys.stderr)


def write_answers(rows, lengths, metas, arbiter, table, detect, args, device, reading):
    """Answer the prompts and publish all outputs together. Returns (new tokens, seconds)."""
    outputs = list(outputs_of(args).values())
    choice = {"table of languages": table and {str(k): v for k, v in table.items()},
              **{name: getattr(args, name) for name in OF_POOL}}
    with open_journal(rows, metas, args, reading) as journal:
        if journal.finish_publishing(outputs, choice):
            distributed.say(f"{' and '.join(outputs)} had been finished before; the rest of "
                            f"{args.out}.partial is removed")
            journal.remove()
            return 0, 0.0
        for path in filter(os.path.lexists, outputs):
            raise taken(path)
        if journal.done:
            num_asked = len(rows) * (1 if args.route == "learned" else len(args.models or [args.model]))
            num_done = sum(not key.startswith(generate_critique.KEYS) for key in journal.done)
            distributed.say(f"resumes: {num_done} of {num_asked} prompts were finished before")

        def ask(folder, wanted):
            if folder in args.endpoints:
                return sample_endpoint(folder, wanted, rows, args, journal)
            return sample(folder, wanted, rows, lengths, args, device, reading, journal)
        if args.critique:
            result = generate_critique.written(rows, ask, args, reading)
        elif args.models:
            tokenizer = (arbiter or next(iter(metas.values())))[1]
            criticise = args.critic and (lambda candidates: generate_critique.criticise(
                candidates, lambda some: ask_critic(some, metas, args, device, reading, journal), reading))
            result = answers_of_pool(rows, ask, args, device, reading, table, detect, tokenizer, criticise)
        else:
            result = answers_of_model(rows, lengths, args, device, reading, journal)
        made, lines, tokens, seconds = result
        journal.publish({path: text if isinstance(text, str) else jsonl(text) for path, text in made.items()},
                        choice)
        journal.remove()
    print_lines(lines)
    return tokens, seconds


def print_lines(lines):
    if distributed.is_main():
        for line in lines:
            print(printable(line))


def main():
    if sys.argv[1:2] == ["route"]:
        from aya_min import generate_route          # it needs the stages, which the other commands do not
        return generate_route.main(sys.argv[2:])
    args = parsed()
    try:
        distributed.launch(lambda device: run_command(args, device))
    except KeyboardInterrupt:
        kept = args.out and os.path.exists(f"{args.out}.partial")
        remedy = f"; finished answers are in {args.out}.partial, from which the same command resumes"
        print("stopped" + (remedy if kept else ""), file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    try:
        main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # in Python's own end it would be a traceback
