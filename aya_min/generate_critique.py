"""`generate.py critique`: a model, or an endpoint, writes critiques of answers, for reward models that read
them (critiques.py, arXiv 2405.20850).

    generate.py critique --model C --answers F.jsonl --out G.jsonl

Rows of F are preference pairs, prompts with completions, or prompts with candidates; G holds them with
chosen_critique and rejected_critique, with critique, or with a critique in each candidate. The model is asked
in the row's language, by the texts of critique_prompts.json, which a speaker can mend. In arbitrage --critic
does the same for each candidate, before the arbiter scores.
"""

import hashlib
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

from . import distributed
from .control_tokens import Spelled
from .endpoint_answers import tally, tally_line, without_control_tokens
from .generate_pool import OF_POOL, check_fields
from .judges import question_text
from .languages import home_language
from .rows import conversation_of, is_cut, pair_of, prompt_of, read_jsonl, shapes_in
from .rows_keys import CRITIQUES, is_empty

LINE = "generate.py critique --model C --answers F.jsonl --out G.jsonl"
NOT_HERE = ("models", "prompts", "prompt", "chat", "serve", "host", "port", "max_length", "contrast",
            "ignore_eos", *OF_POOL)
WRITTEN = (*CRITIQUES, "critic")    # the keys that the command writes
KEYS = "critiques by "              # how the keys of critiques in a journal begin


@cache
def prompts():
    """{language: the text that asks for a critique, with {prompt} and {answer} in it}."""
    return json.loads((Path(__file__).parent / "critique_prompts.json").read_text(encoding="utf-8"))


def check(args):
    """Refuse flags that the command needs, and those that it does not read."""
    for name in ("model", "answers", "out"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing: {LINE}")
    others = [name for name in NOT_HERE if getattr(args, name) not in (None, False)]
    others += ["num_samples"] if args.num_samples != 1 else []
    if others:
        raise ValueError(f"--{others[0].replace('_', '-')} does not go with critique: {LINE}")
    if args.endpoints:
        check_fields(args)


# ---- what is asked -----------------------------------------------------------------------------------------

def request(messages, answer, language):
    """The text that asks for a critique of an answer to a prompt (messages), in a language or in English."""
    parts = {"{prompt}": question_text(messages), "{answer}": answer}       # an answer may hold {prompt}
    text = prompts()[home_language(language, prompts()) or "en"]
    return re.sub(r"\{prompt\}|\{answer\}", lambda found: parts[found[0]], text)


def in_english(languages, what):
    """[a line on those that have no text in their language, so that English asks], [] without any."""
    found = Counter(code or "none" for code in languages if not home_language(code, prompts()))
    if not found:
        return []
    by_language = ", ".join(f"{code} {n}" for code, n in sorted(found.items()))
    return [f"{found.total()} of {len(languages)} {what} are asked in English, as there is no text in their "
            f"language ({by_language})"]


def keys_of(critic, requests):
    """The journal's keys of critiques, made of what is asked: by the next start an endpoint may have given an
    answer that was missing, or other flags may drop some, so that an index would be another answer's."""
    seen, keys = Counter(), []
    for asked in requests:
        digest = hashlib.sha256(asked["prompt"].encode()).hexdigest()[:32]
        keys.append(f"{KEYS}{critic} {digest} {seen[digest]}")
        seen[digest] += 1
    return keys


def answers_in(row, where):
    """[(prompt messages, answer, the object that gets its critique, the critique's key), ...] of a row."""
    shapes, has_pool = shapes_in(row), not is_empty(row.get("candidates"))
    if "candidates" in row and not has_pool and shapes <= {"prompt"}:
        raise ValueError(f"{where}: 'candidates' is empty; fill it, or remove the line")
    if has_pool and (others := shapes & {"chosen", "rejected", "completion", "targets"}):
        raise ValueError(f"{where}: 'candidates' and {min(others)!r} in one row; leave one of them")
    if {"chosen", "rejected"} & shapes:
        prompt, chosen, rejected, *_ = pair_of(row, where)
        return [(prompt, chosen, row, "chosen_critique"), (prompt, rejected, row, "rejected_critique")]
    if has_pool:
        prompt, found = prompt_of(row, where), row["candidates"]
        if not (isinstance(found, list) and all(isinstance(c, dict) and isinstance(c.get("completion"), str)
                                                for c in found)):
            raise ValueError(f"{where}: 'candidates' must be a list of objects with a completion each")
        return [(prompt, c["completion"], c, "critique") for c in found]
    # an unwanted answer (a label of kto) has one too
    messages, *_ = conversation_of({key: value for key, value in row.items() if key != "label"}, where)
    return [(messages[:-1], messages[-1]["content"], row, "critique")]


def asking(text, where, language):
    return {"prompt": text, "prompt_messages": [{"role": "user", "content": text}], "prompt_where": where,
            "language": language}


def requests_of(path, reading, tokenizer):
    """The requests for a file's answers: rows with "prompt_messages", and with what `written` needs: the
    object that gets the critique, its key there, and of the whole file [(where, row, [(object, key), ...]),
    ...]."""
    found, spelled, file = [], Spelled(tokenizer), []
    lines = read_jsonl(path, reading, WRITTEN)
    for where, row in lines:
        language, answers = row.get("language"), answers_in(row, where)
        file.append((where, row, [(target, key) for *_, target, key in answers]))
        named = [(row, "critic"), (row, "critique")] if row.get("candidates") else [(row, "critic")]
        for each, key in [*named, *((target, key) for *_, target, key in answers)]:
            if each.get(key) is not None:
                raise ValueError(f"{where}: {key!r} is there already; remove it to have another written")
        for messages, answer, target, key in answers:
            spelled.look([*(message["content"] for message in messages), answer], where)
            text = request(messages, answer, language)
            place = f"{where}, the request for its {key}"
            found.append({**asking(text, place, language), "target": target, "key": key, "file": file})
    spelled.report([path], len(lines), reading)
    for line in in_english([row.get("language") for _, row, _ in file], "rows"):
        distributed.say(line, [path])
    return found


# ---- what is written ---------------------------------------------------------------------------------------

def written(requests, ask, args, reading):
    """The critiques of all requests in their rows. ask: see generate_pool.asked. A row without one of its
    critiques is left out, and counted, also where --too-long left the request out.
    -> ({path: rows}, text lines, new tokens, seconds)"""
    groups, tokens, seconds = ask(args.model, range(len(requests)))
    lines = []
    if args.endpoints:
        groups = without_control_tokens(groups, None, reading)
        lines = [tally_line(tally(args.endpoints[args.model], requests, groups))]
    told, file = 0, requests[0]["file"]
    for asked, (answer,) in zip(requests, groups):
        if text := (answer["completion"] or "").strip():
            asked["target"][asked["key"]] = text
            told += 1
    # of a dict, which keeps the order and is looked up at once
    missing = dict.fromkeys(where for where, _, parts in file if not all(one.get(key) for one, key in parts))
    # cut critiques say something too
    cut = sum(is_cut(answer) for (answer,) in groups)
    kept = [{**row, "critic": args.model} for where, row, _ in file if where not in missing]
    first = next(iter(missing), None)
    why = f", as a critique of theirs is missing or empty; the first: {first}" if missing else ""
    lines.append(f"{told} critiques, {cut} cut at --max-new-tokens {args.max_new_tokens}; {len(kept)} rows, "
                 f"{len(missing)} left out{why}")
    if not kept:
        raise ValueError(f"{args.out}: not a row is left ({'; '.join(lines)}); look at the critic, and "
                         f"remove {args.out}.partial to have it asked anew. Nothing is written")
    return {args.out: kept}, lines, tokens, seconds


def criticise(rows, ask, reading):
    """Set the "critique" of all candidates of arbitrage, in place, but for those in a wrong language. ask:
    requests -> (those that fit the critic, a group of one answer for each, new tokens, seconds). A candidate
    without a critique gets no score. -> text lines, new tokens, seconds"""
    requests = [{**asking(request(row["prompt_messages"], c["completion"], row.get("language")),
                          f"{row['prompt_where']}, the request for a critique", row.get("language")),
                 "target": c}
                for row in rows for c in row["candidates"] if not c.get("wrong_language")]
    asked, groups, tokens, seconds = ask(requests)
    told = 0
    for each, (answer,) in zip(asked, without_control_tokens(groups, None, reading), strict=True):
        if text := (answer["completion"] or "").strip():
            each["target"]["critique"] = text
            told += 1
    lines = [f"critiques: {told} of {len(requests)} candidates have one, the others are not scored"]
    return lines + in_english([each["language"] for each in requests], "candidates"), tokens, seconds
