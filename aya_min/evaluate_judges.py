"""The judge of the arena and of the leaderboard: its flags, what is checked before it judges, and the journal
from which a killed command resumes.
"""

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import torch

from .command import WHOLE, number
from .config import TEMPERATURE, Reading, add_flags, flag_of
from .distributed import say
from .endpoint import is_endpoint
from .endpoint_answers import add_flags as add_endpoint_flags
from .endpoint_answers import check_all_there, endpoints_of
from .evaluate_answers import check_texts, grade_answers, score_answers, with_seen_language
from .files import dumps, marked, taken
from .journal import PURPOSE, Journal
from .judges import PROTOCOLS, Judging, endpoint_judge, folder_judge, is_answer, judge, key_of, orders
from .weights import load

FOLDER_TOKENS = 2048        # of a model folder's verdict: the published limits pass many models' positions
OF_PROTOCOL = ("max_new_tokens", "temperature", "seed", "dtype", "batch_size")


def add_judge_flags(parser):
    add = parser.add_argument
    add("--judge", required=True, help="'oracle' (of the embedded world), a reward model's folder, or with "
                                       "--protocol a language model's folder or an endpoint's URL#model")
    add("--protocol", help=f"how a language model judges: {' or '.join(PROTOCOLS)} (judges.py)")
    add("--max-new-tokens", type=number(int, "[1, inf)"),
        help=f"of a verdict (default: of a folder {FOLDER_TOKENS}, of an endpoint as published, "
             f"{' or '.join(str(each.max_new_tokens) for each in PROTOCOLS.values())})")
    add("--temperature", type=number(float, TEMPERATURE), help="of the judge (default 0, as published)")
    add("--seed", type=number(int, WHOLE), help="of a judge that is not greedy (default 0)")
    add("--dtype", choices=["float32", "bfloat16"], help="of a judge's folder (default float32)")
    add("--batch-size", type=number(int, "[1, inf)"), help="verdicts decoded together (default 256)")
    add_endpoint_flags(add)
    add_flags(parser, Reading, only=("columns", "too_long", "allow_control_tokens"))


def judging_of(args, reading, endpoints=None):
    """The Judging of the flags, or None for the oracle and for reward models, which follow no protocol.
    endpoints: {text: Endpoint} of a command that has others too."""
    given = {name: getattr(args, name) for name in OF_PROTOCOL if getattr(args, name) is not None}
    if args.protocol is None:
        if is_endpoint(args.judge):
            raise ValueError(f"--judge {args.judge}: an endpoint judges by a published protocol; give "
                             "--protocol arena-hard or scores")
        if given:
            raise ValueError(f"{flag_of(next(iter(given)))} goes with --protocol, which the oracle and "
                             "reward models do not follow; leave it out")
        if endpoints is None:
            endpoints_of([], args)                  # refuses the flags that go with an endpoint
        return None
    if args.protocol not in PROTOCOLS:
        raise ValueError(f"--protocol {args.protocol}: unknown; give one of {', '.join(PROTOCOLS)}")
    if args.judge == "oracle":
        raise ValueError("--judge oracle follows no protocol; leave --protocol out")
    endpoints = endpoints_of([args.judge], args) if endpoints is None else endpoints
    endpoint = endpoints.get(args.judge)
    foreign = [name for name in ("dtype", "batch_size") if name in given]
    foreign += ["too_long"] if reading.too_long != "refuse" else []
    if endpoint and foreign:
        raise ValueError(f"{flag_of(foreign[0])} is for a model folder; the endpoint {endpoint.name} decides "
                         "that itself, leave it out")
    tokens = PROTOCOLS[args.protocol].max_new_tokens if endpoint else FOLDER_TOKENS
    return Judging(args.judge, args.protocol, endpoint, **{"max_new_tokens": tokens} | given,
                   concurrency=args.concurrency or 8, too_long=reading.too_long,
                   allow_control_tokens=bool(reading.allow_control_tokens))


def judging_of_recipe(args, endpoints):
    """The Judging of train.py recipe's flags, or None for a reward model and without a judge. It leaves what
    is too long for the judge unjudged, as nobody knows the answers' lengths before they are there."""
    if not args.judge:
        if args.protocol or args.judge_max_new_tokens:
            raise ValueError("--protocol and --judge-max-new-tokens go with --judge")
        return None
    names = dict.fromkeys(OF_PROTOCOL) | {"judge": args.judge, "protocol": args.protocol,
                                          "max_new_tokens": args.judge_max_new_tokens,
                                          "concurrency": args.concurrency}
    about = judging_of(SimpleNamespace(**names), Reading(), endpoints)
    return about and about._replace(too_long="skip", allow_control_tokens=True)


def check_judge_fits(about, rows):
    """Refuse, before any work, a judge (or None) that cannot read these rows' questions even with empty
    answers."""
    rows = [{**row, "completion": ""} for row in rows]
    if about and not about.endpoint:
        folder_judge(about._replace(too_long="refuse"), list(zip(rows, rows)))


def verdicts_path(out):
    return str(out).removesuffix(".json") + ".verdicts.jsonl"


def check_out(path, partial=None):
    """Refuse, before any work, an output that exists (even as a dangling link) or that cannot be written.
    partial: a journal, whose outputs may be there already."""
    if os.path.lexists(path) and not (partial and marked(partial, PURPOSE)):
        raise ValueError(f"{path} exists: remove it, or name another --out")
    above = next(folder for folder in Path(path).absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK):
        fault = "a folder that you cannot write to" if above.is_dir() else "no folder"
        raise ValueError(f"{path}: {above} is {fault}; name another --out")


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def scored(sides, judge, reading):
    """(the sides' rows with the verdicts of the oracle or of a reward model's folder, the verdict's key, the
    judge's name)."""
    if judge == "oracle":
        return [grade_answers(rows) for rows in sides], "grade", "oracle"
    check_texts(sum(sides, []), judge, reading)
    model, tokenizer = load(judge, device=device())
    sides = score_answers(model, tokenizer, [with_seen_language(rows) for rows in sides], f"--judge {judge}",
                          reading.too_long)
    return sides, "score", f"reward model: {Path(judge).resolve().name}"


def prepared(about, pairs):
    """(settings of the journal of its verdicts, (device, verdicts that were there before) -> ask)."""
    identity, ready = endpoint_judge(about) if about.endpoint else folder_judge(about, pairs)
    keys = [key_of(each) for pair in pairs for each in orders(about.protocol, *pair)]
    digest = hashlib.sha256(dumps(sorted(set(keys))).encode()).hexdigest()
    # what changes a verdict; batch size and concurrency may change between runs
    kept = ("protocol", "max_new_tokens", "temperature", "seed", "dtype", "too_long")
    return {"judge": identity, "games": digest, **{name: getattr(about, name) for name in kept}}, ready


def judged_in(folder, about, pairs, device):
    """The verdicts on pairs of rows, kept in a journal that stays, for a step of the recipe. A collective."""
    settings, ready = prepared(about, pairs)
    with Journal(folder, settings, is_answer) as journal:
        return judge(*zip(*pairs), ready(device, len(journal.done)), about.protocol, journal)


def play(out, outputs, about, pairs, make):
    """A language model judges pairs of rows; make(verdicts) -> {path: text} is published under the names of
    `outputs`. A killed command resumes from out.partial."""
    if about.endpoint:
        check_all_there({about.judge: about.endpoint})
    settings, ready = prepared(about, pairs)
    settings |= {"outputs": [Path(path).name for path in outputs]}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with Journal(f"{out}.partial", settings, is_answer) as journal:
        if journal.finish_publishing(outputs, None):
            say(f"{out} had been finished before; the rest of {out}.partial is removed")
            return journal.remove()
        for path in filter(os.path.lexists, outputs):
            raise taken(path)
        if journal.done:
            say(f"resumes: {len(journal.done)} verdicts on {2 * len(pairs)} games were there before")
        verdicts = judge(*zip(*pairs), ready(device(), len(journal.done)), about.protocol, journal)
        journal.publish(make(verdicts), None)
        journal.remove()
