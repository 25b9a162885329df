"""Endpoints as teachers: their flags and keys, what is checked before any work, their answers to rows on all
ranks, resumed from a journal, and what is counted of them."""

import argparse
import os
import re
import time
from collections import Counter
from urllib.parse import urlsplit

from . import distributed
from .command import number
from .control_tokens import Spelled
from .endpoint import USAGE, Endpoint, ask, is_endpoint
from .endpoint_http import LOOPBACK, check_there
from .files import parse_object
from .rows import is_cut

KEY = "AYA_MIN_API_KEY"     # the environment variable of the key unless --key-from names another
OUR_FIELDS = {"model": "the URL's #model", "messages": "the prompts", "n": "--num-samples",
              "stream": "nothing: replies are read whole", "temperature": "a flag", "top_p": "a flag",
              "seed": "a flag", "stop": "a flag"}


# ---- flags -------------------------------------------------------------------------------------------------

def extra_fields(text):
    """An argparse type: a JSON object of fields. A field that this program sends may only be taken away, but
    for the limit of tokens, which a model that reasons may need higher."""
    try:
        found = parse_object(text.encode(), "--extra")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; give '{{\"FIELD\": VALUE}}'") from None
    for name in found.keys() & OUR_FIELDS.keys():
        if found[name] is not None or name in ("model", "messages"):
            raise argparse.ArgumentTypeError(f"{name!r} is set by {OUR_FIELDS[name]}; null leaves a field "
                                             "out")
    return found


def add_flags(add):
    """The flags that go with endpoints. add: a parser's add_argument."""
    add("--key-from", nargs="+", metavar="VARIABLE",
        help=f"the environment variable that holds the key of the endpoint (default {KEY}); of endpoints on "
             "several hosts HOST=VARIABLE for each that has one. A key is never given itself")
    add("--concurrency", type=number(int, "[1, 256]"), metavar="N",
        help="requests that endpoints are asked at the same time, over all ranks (default 8)")
    add("--extra", type=extra_fields, metavar="JSON",
        help="fields that endpoints are also sent, for example '{\"top_k\": 40}'; null leaves a field out, "
             "for example '{\"temperature\": null}' where a server refuses it")


def endpoints_of(texts, args, environment=os.environ):
    """{text: Endpoint} of those of the texts that name one, with their keys. ValueError if one is written
    wrongly, for a key that is not there, and for flags that go with endpoints without one."""
    texts = [text for text in texts if is_endpoint(text)]
    if not texts:
        for name in ("key_from", "concurrency", "extra"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} goes with an endpoint, http(s)://host/v1#model")
        return {}
    plain = {text: Endpoint.of(text) for text in texts}
    keys = keys_of({endpoint.host for endpoint in plain.values()}, args.key_from, environment)
    made = {}
    for text, endpoint in plain.items():
        key_from, key = keys.get(endpoint.host, (KEY, None))
        made[text] = Endpoint(endpoint.base_url, endpoint.model, key, key_from, args.extra or {})
    return made


def keys_of(hosts, words, environment):
    """{host: (variable, key)} from the words of --key-from. A key goes to the host that it is named for: one
    variable for several hosts is refused."""
    if not words and not environment.get(KEY):
        return {}
    found = {}
    for word in words or [KEY]:
        host, equals, variable = word.rpartition("=")
        if not equals and len(hosts) > 1:
            raise ValueError(f"--key-from: the endpoints are on several hosts ({' '.join(sorted(hosts))}); "
                             "say whose the key is, HOST=VARIABLE")
        host = host.lower() if equals else next(iter(hosts))
        if host not in hosts:
            raise ValueError(f"--key-from: no endpoint is on the host that a word names; they are on "
                             f"{' '.join(sorted(hosts))}")
        if host in found:
            raise ValueError(f"--key-from: {host} is given twice; give it one variable")
        key = environment.get(variable, "").strip()
        if not key:
            # the word may be the key itself, which no message shows
            named = variable if re.fullmatch(r"[A-Z][A-Z0-9_]{0,40}", variable) else "the variable it names"
            raise ValueError(f"--key-from: {named} is not set in the environment; give the name of a "
                             "variable that holds the key, never the key")
        found[host] = variable, key
    return found


def check_all_there(endpoints):
    """Raise ValueError unless every endpoint is there and takes its key. What may be wrong is said. A
    collective."""
    def check():
        for endpoint in endpoints.values():
            url = urlsplit(endpoint.base_url)
            if endpoint.key and url.scheme == "http" and url.hostname not in LOOPBACK:
                distributed.say(f"{endpoint.name}: the key is sent without encryption, as the URL begins "
                                "with http:")
            listed = check_there(endpoint)
            if listed is not None and endpoint.model not in listed:
                names = " ".join(sorted(listed)[:8]) or "none"
                distributed.say(f"{endpoint.name}: the server does not list this model ({len(listed)}: "
                                f"{names[:200]}), and may not have it")
    distributed.from_main(check)


# ---- answers -----------------------------------------------------------------------------------------------

def is_answer(value):
    """Whether a value is an answer of `ask`, as a journal keeps it."""
    kinds = {"completion": str, "finish_reason": (str, type(None)), "model": (str, type(None)),
             "thought": bool, "usage": dict, "tries": int}
    return isinstance(value, dict) and value.keys() == kinds.keys() and all(
        isinstance(value[key], kind) for key, kind in kinds.items()) and all(
        type(count) is int for count in value["usage"].values())


def answer_rows(endpoint, keys, rows, wanted, journal, concurrency=None, **sampling):
    """For each index of `wanted` the list of answers to that row, as `ask` gives them. A collective.

    The ranks share the requests. journal: the answers to row i are kept under keys[i] and not asked for
    again; where one is missing, the row is asked again by the next command.
    """
    done = {i: journal.done[keys[i]] for i in wanted if keys[i] in journal.done}
    left = [i for i in wanted if i not in done]
    threads, mine = share(left, concurrency or 8, distributed.rank(), distributed.num_ranks())

    def work():
        groups = ask(endpoint, [rows[i]["prompt_messages"] for i in mine], numbers=mine, concurrency=threads,
                     kept=lambda j, group: journal.add(keys[mine[j]], group), answered=len(done),
                     progress=endpoint.name if distributed.is_main() else None, **sampling)
        return dict(zip(mine, groups))
    for part in distributed.patiently(work):
        done |= part
    return [done[i] for i in wanted]


def share(items, concurrency, rank, num_ranks):
    """(threads, items) of a rank, of so many threads over all ranks; a rank without a thread has no item."""
    working = min(concurrency, num_ranks)
    if rank >= working:
        return 0, []
    return concurrency // working + (rank < concurrency % working), items[rank::working]


def without_control_tokens(groups, tokenizer, reading):
    """The groups of answers, in which an answer that spells a control token, and so holds the rest of a
    template, is missing, unless `reading` allows control tokens."""
    def checked(answer):
        spelled = Spelled(tokenizer)
        spelled.look([answer["completion"] or ""], "")
        if not spelled.found or reading.allow_control_tokens:
            return answer
        return {**answer, "completion": None, "missing": "control tokens", "said": next(iter(spelled.found))}
    return [[checked(answer) for answer in group] for group in groups]


# ---- what is counted ---------------------------------------------------------------------------------------

def tally(endpoint, rows, groups):
    """What became of the requests of an endpoint, for a record: a JSON object.

    "missing" {kind: {language: number}} are without an answer. Of the answers, "cut" {finish_reason:
    {language: number}} were not finished, and "reasoning" {language: number} came with reasoning, which was
    left out. "usage": tokens; "unknown": replies that do not tell theirs.
    """
    answers = [(row.get("language") or "other", answer) for row, group in zip(rows, groups, strict=True)
               for answer in group]
    missing, cut, said, thought, models, usage = {}, {}, {}, Counter(), Counter(), Counter()
    for code, answer in answers:
        usage.update(answer["usage"])
        if answer["completion"] is None:
            missing.setdefault(answer["missing"], Counter())[code] += 1
            said.setdefault(answer["missing"], answer["said"])
            continue
        models[answer["model"] or "not named"] += 1
        thought[code] += answer["thought"]
        if is_cut(answer):
            cut.setdefault(answer["finish_reason"], Counter())[code] += 1
    return {"host": endpoint.host, "model": endpoint.model, "models_returned": dict(models),
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "extra": endpoint.extra,
            "answers": models.total(), "of": len(answers), "requests": sum(a["tries"] for _, a in answers),
            "missing": {kind: dict(sorted(by.items())) for kind, by in sorted(missing.items())}, "said": said,
            "cut": {kind: dict(sorted(by.items())) for kind, by in sorted(cut.items())},
            "reasoning": {code: n for code, n in sorted(thought.items()) if n},
            "usage": {name: usage[name] for name in (*USAGE, "unknown") if usage[name]}}


def num_missing(found):
    """How many answers are missing in a `tally`."""
    return found["of"] - found["answers"]


def tally_line(found):
    """One line of text of a `tally`."""
    def counted(by_kind):
        return ", ".join(f"{kind} {sum(by.values())} ({' '.join(f'{code} {n}' for code, n in by.items())})"
                         for kind, by in by_kind.items())
    parts = [f"{found['answers']} of {found['of']} answers"]
    if found["missing"]:
        parts.append(f"no answer, left out: {counted(found['missing'])}")
    if found["cut"]:
        parts.append(f"cut: {counted(found['cut'])}")
    if found["reasoning"]:
        parts.append(f"reasoning left out of {sum(found['reasoning'].values())}")
    usage = found["usage"]
    tokens = " + ".join(str(usage.get(name, 0)) for name in USAGE)
    unknown = f", {usage['unknown']} replies do not tell" if "unknown" in usage else ""
    parts.append(f"{found['requests']} requests, {tokens} tokens (prompts + answers{unknown})")
    return f"{found['host']}/{found['model']}: {'; '.join(parts)}"
