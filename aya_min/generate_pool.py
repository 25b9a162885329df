"""generate.py's arbitrage over a pool of models: its flags, what is checked before anything is read, and what
becomes of the answers.

    teachers answer -> language guard -> the arbiter scores -> length control -> a route chooses

With --route learned a router chooses first, and only its teacher answers.
"""

import os
from pathlib import Path

from . import weights
from .arbitrage import (control_length, fit_table, guard_table, language_guard, length_fit, route, wins_table,
                        worth, worth_table)
from .command import number
from .data import without_added_keys
from .endpoint_answers import tally, tally_line, without_control_tokens
from .files import dumps, read_json
from .languages import language_code
from .preferences import best_worst, cut_line
from .reward import score_texts
from .router import choices, prompt_example
from .sampling import cut_at
from .text_statistics import statistics_table, text_statistics
from .world_oracle import check_question, grade

# Flags of arbitrage only.
OF_POOL = ("arbiter", "critic", "pairs", "table", "route", "margin", "keep_cut", "router", "candidates",
           "summary", "language_guard", "length_control")
POOL_LINE = "--models A B ... --prompts F.jsonl"
FILES = ("out", "candidates", "pairs", "summary")       # what is written, if it is asked for, in this order


def add_flags(add):
    """The flags of arbitrage, but for those that --model has too. add: a parser's add_argument."""
    add("--arbiter", help="reward model folder that scores the pool's answers")
    add("--critic", metavar="C", help="arbitrage: model folder or endpoint that writes a critique of each "
                                      "answer, for an --arbiter that was trained with critiques")
    add("--route", choices=["reward", "random", "fixed", "learned"],
        help="arbitrage: how the answer is chosen (default reward)")
    add("--table", help="--route fixed: JSON file {language: model folder as given in --models}")
    add("--router", metavar="DIR", help="--route learned: the folder that generate.py route wrote. Only the "
                                        "teacher that it chooses answers a prompt")
    add("--pairs", help="arbitrage: JSONL file to write best/worst pairs to; must not exist")
    add("--margin", type=number(float, "[0, inf)"),
        help="--pairs: the rewards of a pair differ by more than this (default 0)")
    add("--candidates", help="arbitrage: JSONL file to write all answers and rewards to, from which "
                             "generate.py route trains a router; must not exist")
    add("--summary", help="arbitrage: JSON file to write the figures of all tables to; must not exist")
    add("--language-guard", nargs="?", const="text", choices=["text", "oracle"],
        help="arbitrage: drop answers in another language than their prompt's before they are scored. text "
             "(the default) looks at the text alone, oracle is for the embedded world's questions")
    add("--length-control", action="store_true", default=None,
        help="arbitrage: take the reward's linear regression on length away, language by language")


# ---- what is checked before anything is read ---------------------------------------------------------------

def check_pool(args):
    """Refuse flags that arbitrage cannot take, or that only arbitrage takes, and a model named twice."""
    if not args.chat:
        check_twice(args)
    given = [f"--{name.replace('_', '-')}" for name in OF_POOL if getattr(args, name) is not None]
    if not args.models or args.chat or args.serve:
        if given:
            raise ValueError(f"--arbiter, --pairs and --table go with {POOL_LINE}, and so does {given[0]}")
        return
    if not args.prompts:
        raise ValueError("arbitrage over --models needs --prompts F.jsonl --out G.jsonl")
    args.route = args.route or "reward"
    if (args.route == "reward" or args.pairs or args.length_control) and not args.arbiter:
        raise ValueError("--route reward and --pairs need --arbiter RM, and so does --length-control")
    if args.critic and not args.arbiter:
        raise ValueError("--critic writes critiques for an arbiter to read; give --arbiter RM")
    for how, name, what in (("fixed", "table", "FILE.json"), ("learned", "router", "DIR")):
        if (args.route == how) != bool(getattr(args, name)):
            raise ValueError(f"--route {how} needs --{name} {what}, and --{name} goes with --route {how}")
    if args.route == "learned" and args.pairs and args.num_samples == 1:
        raise ValueError("--route learned asks one teacher for each prompt, which makes no --pairs; give "
                         "--num-samples 2 or more")
    if args.margin is not None and not args.pairs:
        raise ValueError("--margin goes with --pairs FILE")
    if args.endpoints:
        check_endpoints(args)


def check_twice(args):
    """Refuse a model that is named twice, in one spelling or in two."""
    seen = {}
    for text in args.models or []:
        endpoint = args.endpoints.get(text)
        what = (endpoint.base_url, endpoint.model) if endpoint else os.path.realpath(text)
        if what in seen:
            other = "" if seen[what] == text else f", also as {seen[what]}"
            raise ValueError(f"--models names {text} twice{other}; name each once")
        seen[what] = text


def check_fields(args):
    """Refuse what an endpoint cannot be asked for."""
    for name, off in (("top_k", 0), ("min_p", 0.0), ("ignore_eos", False)):
        if getattr(args, name) != off:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: the endpoint {next(iter(args.endpoints))} has no such field by the "
                             f"protocol; leave it out, or give what the server takes by --extra, for example "
                             "'{\"top_k\": 40}'")


def check_endpoints(args):
    """Refuse what endpoints of the pool cannot be asked for, and a pool without a tokenizer."""
    check_fields(args)
    if not args.arbiter and len(args.endpoints) == len(args.models):
        raise ValueError("--models: endpoints alone have no tokenizer to count lengths by; give --arbiter "
                         "RM, or a model folder among them")


def read_table(path, rows, models):
    """{language: model folder} for --route fixed; the key None is for rows without a language.

    ValueError for an unknown language, two models for one language, or a language of the rows that has none
    of --models.
    """
    table = {}
    for name, folder in read_json(path, "give a JSON object of language -> model").items():
        if (code := language_code(name)) is None:
            raise ValueError(f"--table {path}: unknown language {name!r}; give a code or an English name")
        if table.setdefault(code, folder) != folder:
            raise ValueError(f"--table {path}: {name!r} is {code}, which has another model already; keep one")
    table[None] = table.get("other")
    codes = {row.get("language") for row in rows}
    wrong = sorted(code or "other" for code in codes if table.get(code) not in models)
    if wrong:
        raise ValueError(f"--table {path}: names none of --models for {' '.join(wrong)}; it needs "
                         "a model folder for each language of the prompts (other: prompts without one)")
    return table


def router_folder(path):
    """The router's own folder, of a run folder its model/."""
    return Path(path) / "model" if (Path(path) / "model" / "config.json").is_file() else Path(path)


def check_router(path, models):
    """The (model, tokenizer, header) of --router without its weights. ValueError if it is no router, or one
    for other teachers than the models."""
    model, tokenizer, header = weights.load_meta(router_folder(path))
    if not isinstance(model, weights.Router):
        raise ValueError(f"--router {path}: {weights.ONE[type(model)]}, not a router; give the folder "
                         "that generate.py route wrote")
    if set(model.config.teachers) != set(models):
        raise ValueError(f"--router {path}: it chooses among {' '.join(model.config.teachers)}; give these "
                         f"as --models, not {' '.join(models)}")
    return model, tokenizer, header


def detector(kind, rows):
    """The function (row, text) -> language code or None of --language-guard, or None without the flag."""
    if kind == "oracle":
        for row in rows:
            try:
                check_question(row)
            except (KeyError, ValueError) as error:
                raise ValueError(f"{row['prompt_where']}: --language-guard oracle is for questions of the "
                                 f"embedded world: {error}") from None
        return lambda row, text: grade(row, text).language
    if kind == "text":
        from .language_id import identify           # its tables are read only if they are needed
        return lambda row, text: identify(text)[0]
    return None


# ---- the answers -------------------------------------------------------------------------------------------

def whom_to_ask(rows, args, device):
    """{model folder: indices of the rows that it answers}: all rows, or those that --router gives it."""
    if not args.router:
        return {folder: list(range(len(rows))) for folder in args.models}
    model, tokenizer = weights.load(router_folder(args.router), device)
    room = model.config.max_position_embeddings
    names = choices(model, [prompt_example(tokenizer, row, room) for row in rows], tokenizer.pad_id)
    return {folder: [i for i, name in enumerate(names) if name == folder] for folder in args.models}


def asked(rows, ask, args, device, reading, tokenizer):
    """(rows with "candidates", {endpoint: its tally}, new tokens, seconds). ask(folder, indices) -> what
    generate.sample returns. A missing answer of an endpoint is no candidate."""
    rows = [{**row, "candidates": []} for row in rows]
    answers, tallies, tokens, seconds = {}, {}, 0, 0.0
    plan = whom_to_ask(rows, args, device)
    # endpoints first: a wrong key is seen before a folder's model has worked for hours
    for folder in sorted(filter(plan.get, plan), key=lambda folder: folder not in args.endpoints):
        groups, new_tokens, its_seconds = ask(folder, plan[folder])
        tokens, seconds = tokens + new_tokens, seconds + its_seconds
        if folder in args.endpoints:
            groups = without_control_tokens(groups, tokenizer, reading)
            tallies[folder] = tally(args.endpoints[folder], [rows[i] for i in plan[folder]], groups)
        answers[folder] = dict(zip(plan[folder], groups))
    for folder in filter(answers.get, plan):
        for i, group in answers[folder].items():
            rows[i]["candidates"] += [
                {"teacher": folder, "completion": cut_at(a["completion"], args.stop), "reward": None,
                 "finish_reason": a["finish_reason"]} for a in group if a["completion"] is not None]
    return rows, tallies, tokens, seconds


def score(rows, args, reading, device):
    """Set the "reward" of all candidates, in place, but for those in a wrong language."""
    arbiter, tokenizer = weights.load(args.arbiter, device)
    for folder in args.models:
        some = [(row, c) for row in rows for c in row["candidates"]
                if c["teacher"] == folder and not c.get("wrong_language") and (
                    not args.critic or "critique" in c)]
        if not some:
            continue
        # nobody can shorten an endpoint's answer, whose limit is in tokens of its own
        too_long = "skip" if folder in args.endpoints and reading.too_long == "refuse" else reading.too_long
        texts = [{**row, "completion": c["completion"], "critique": c.get("critique")} for row, c in some]
        scores = score_texts(arbiter, tokenizer, texts,
                             name=args.arbiter, too_long=too_long)
        for (_, c), reward in zip(some, scores):
            c["reward"] = reward


def scores_of(row, models):
    """{teacher: the reward of its best answer, None without one} of a row of candidates."""
    by_teacher = {folder: [] for folder in models if any(c["teacher"] == folder for c in row["candidates"])}
    for c in row["candidates"]:
        by_teacher[c["teacher"]] += [c["reward"]] if c["reward"] is not None else []
    return {folder: max(rewards, default=None) for folder, rewards in by_teacher.items()}


def answers_of_pool(rows, ask, args, device, reading, table, detect, tokenizer, criticise=None):
    """Arbitrage: the models answer the prompts, and one answer is kept for each.

    table: {language: model folder} for --route fixed. detect: see `detector`. tokenizer:
    the arbiter's, or the first model's, by which lengths are counted and answers are equal. criticise:
    candidates -> (text lines, new tokens, seconds), with --critic. Returns
    ({path: rows or a text}, text lines, new tokens, seconds).
    """
    def count_tokens(text):
        return len(tokenizer.encode_answer(text))
    candidates, tallies, tokens, seconds = asked(rows, ask, args, device, reading, tokenizer)
    summary, lines = {"route": args.route, "models": args.models, "new_tokens": tokens}, []
    if tallies:
        summary["endpoints"] = tallies
        lines += map(tally_line, tallies.values())
    for c in (c for row in candidates for c in row["candidates"]):
        c["num_tokens"] = count_tokens(c["completion"])
    if detect:
        summary["language_guard"] = found = language_guard(candidates, detect)
        lines += guard_table(found, args.models)
    if criticise:
        told, new_tokens, its_seconds = criticise(candidates)
        lines, tokens, seconds = lines + told, tokens + new_tokens, seconds + its_seconds
        summary["new_tokens"] = tokens
    if args.arbiter:
        score(candidates, args, reading, device)
    if args.length_control:
        summary["length_control"] = found = length_fit(candidates, reading.keep_cut)
        control_length(candidates, found)
        lines += fit_table(found)
    chosen, counts = route(candidates, args.route, args.seed, table, reading.keep_cut, tokenizer.key)
    by_prompt = {id(row["prompt_messages"]): row for row in candidates}     # a file may be given twice
    outputs = {args.out: [{**without_added_keys(row), "scores": scores_of(
        by_prompt[id(row["prompt_messages"])], args.models)} for row in chosen]}
    summary |= {"counts": counts, "cut": cut_line(candidates),
                "reward_and_length": worth(candidates, chosen, reading.keep_cut),
                "text_statistics": text_statistics(chosen, count_tokens)}
    in_short = [counted(counts), cut_line(candidates)]
    lines = [wins_table(counts["wins"], args.models), *in_short, *lines,
             *worth_table(summary["reward_and_length"], args.models),
             f"the texts of the route {args.route}", *statistics_table(summary["text_statistics"])]
    if args.candidates:
        by = {"critic": args.critic} if args.critic else {}
        outputs[args.candidates] = [{**without_added_keys(row), "candidates": row["candidates"], **by}
                                    for row in candidates if row["candidates"]]
    if args.pairs:
        pairs, pair_counts = best_worst(candidates, args.margin or 0.0, reading.keep_cut, tokenizer.key)
        outputs[args.pairs] = [without_added_keys(pair) for pair in pairs]
        in_short.append("pairs  " + counted(pair_counts))
        lines.append(in_short[-1])
        summary["pairs"] = pair_counts
    refuse_empty(outputs, in_short, args, some_cut=counts["cut"] and not reading.keep_cut)
    if args.summary:
        outputs[args.summary] = dumps(summary, indent=2) + "\n"
    return outputs, lines, tokens, seconds


def refuse_empty(outputs, in_short, args, some_cut):
    """ValueError if an output of arbitrage ({path: rows}) has no row. in_short: the counts, for messages."""
    for path in (path for path, rows in outputs.items() if not rows):
        remedy = "look at the models"
        if some_cut:
            remedy = f"give --keep-cut, or remove {args.out}.partial and raise --max-new-tokens"
        elif path == args.pairs:
            remedy = "lower --margin, or leave --pairs out"
        raise ValueError(f"{path}: not a row is left ({'; '.join(in_short)}); {remedy}. Nothing is written, "
                         f"the answers are in {args.out}.partial")


def counted(counts):
    """The counts as one line of text, without cut answers, which `cut_line` counts."""
    numbers = {name: n for name, n in counts.items() if name != "cut" and type(n) is int}
    return "  ".join(f"{name.replace('_', ' ')}: {n}" for name, n in numbers.items())
