"""What a quantized model loses, by language, script and task (arXiv 2407.03211): averages hide who pays.

    python -m aya_min.evaluate quantized --model QUANTIZED --against MODEL --data F.jsonl [--judge RM]
        [--out F.json]

Of rows with an answer, conversations and texts: the relative change of the log-likelihood in percent,
negative where the model finds the answers less likely. Of rows with a prompt: the share of greedy answers
that are the same text, the language pass rate (evaluate_languages.py), and the mean grade: the oracle's where
the row is a question of the embedded world, or with --judge a reward model's score. The models are loaded one
after the other. A language model judges by `evaluate arena`, on the answers that generate.py writes.
"""


import torch

from . import critiques
from .command import Parser, is_spare_rank, number, printable
from .config import SFT, Reading, add_flags, settings_from
from .data import load_examples, load_prompts
from .evaluate_judges import device
from .evaluate_judges import scored as scored_by
from .evaluate_languages import verdict
from .files import check_out, dumps, write_new
from .language_id import profile_of
from .languages import LANGUAGES
from .reference import answer_logps
from .rows import is_plain_text, read_jsonl, shapes_in
from .sampling import answer_rows
from .weights import ONE, CohereForCausalLM, RewardModel, load, load_meta, read_config
from .world_oracle import check_question, grade

# Title, width, key and format of each column.
COLUMNS = [("texts", 7, "texts", "d"), ("nats/token", 12, "nats_per_token", ".3f"),
           ("change %", 10, "change", "+.3f"), ("answers", 9, "answers", "d"), ("same %", 8, "same", ".1f"),
           ("grade", 7, "grade", ".2f"), ("(against)", 11, "grade_against", ".2f"),
           ("LPR", 7, "lpr", ".1f"), ("(against)", 11, "lpr_against", ".1f")]


def read(path, reading):
    """([row of each text to score], [row of each prompt to answer]): the rows with an answer, and those with
    a prompt. A row may be both; a text is only the first."""
    scored, asked = [], []
    for where, row in read_jsonl(path, reading):
        shapes = shapes_in(row)
        plain = is_plain_text(row)
        if plain or {"completion", "targets", "messages"} & shapes:
            scored.append(row | {"where": where})
        if not plain:
            asked.append(row)
    return scored, asked


def measured(folder, path, reading, dtype, max_new_tokens):
    """({where: (tokens, nats) of its texts}, [row with "completion" of each prompt]) of one model."""
    model, tokenizer = load(folder, device(), dtype, packed=True)
    model.eval()
    scored, asked = read(path, reading)
    texts, answers = {}, []
    if scored:
        examples = load_examples([path], tokenizer, model.config.max_position_embeddings, reading)
        settings = SFT(dtype=str(dtype).removeprefix("torch."))
        logps = answer_logps(model, examples, tokenizer.pad_id, torch.device(device()), settings,
                             name=str(folder))
        for example, logp in zip(examples, logps.tolist()):
            tokens, nats = texts.get(example.where, (0, 0.0))       # a long text is several examples
            texts[example.where] = tokens + int(example.mask.sum()), nats + logp
    if asked:
        rows = load_prompts([path], reading, tokenizer)
        made = answer_rows(model, tokenizer, rows, max_new_tokens=max_new_tokens, temperature=0,
                           name=str(folder), progress=f"answers of {folder}")
        answers = [row | {"completion": group[0]["completion"]} for row, group in zip(rows, made)]
    return texts, answers


def graded(row):
    """The oracle's grade of an answer, None where the row is no question of the embedded world."""
    if row.get("task") is None or row.get("args") is None or row.get("language") is None:
        return None
    try:
        check_question(row)
    except ValueError:
        return None
    return grade(row, row["completion"]).grade


def passes(row):
    """Whether an answer is in its row's language, None where no line of it can be told."""
    code = profile_of(row["language"]) if row.get("language") else None
    kind = verdict(row["completion"], code)["kind"] if code else None
    return None if kind in (None, "short", "empty") else kind == "right"


def places_of(row):
    """(the kind of group, its name) of each group that a row counts in."""
    language = row.get("language")
    script = LANGUAGES[language].script if language in LANGUAGES else None
    named = ("language", language), ("script", script), ("task", row.get("task"))
    return [("overall", "overall"), *((kind, str(name)) for kind, name in named if name is not None)]


def figures(scored, pairs, texts):
    """The figures of a group. scored: its rows with a text; texts: {where: (tokens, nats)} of the model and
    of the other; pairs: (row, the other's row) of its answers."""
    both = [[of[row["where"]] for row in scored if row["where"] in of] for of in texts]
    tokens = sum(num for num, _ in both[0])
    nats, other = (sum(logp for _, logp in side) for side in both)
    found = {"texts": len(both[0]), "answers": len(pairs),
             "nats_per_token": nats / tokens if tokens else None,
             "change": 100 * (nats - other) / abs(other) if other else None,
             "same": percent([a["completion"] == b["completion"] for a, b in pairs])}
    for i, name in enumerate(("", "_against")):
        found["grade" + name] = mean([pair[i]["grade"] for pair in pairs])
        found["lpr" + name] = percent([passes(pair[i]) for pair in pairs])
    return found


def mean(found):
    known = [each for each in found if each is not None]
    return sum(known) / len(known) if known else None


def percent(found):
    share = mean(found)
    return None if share is None else 100 * share


def compare(scored, texts, answers):
    """{kind: {name: figures}} over all rows, by language, script and task."""
    groups = {}
    for row in scored:
        for place in places_of(row):
            groups.setdefault(place, ([], []))[0].append(row)
    for pair in zip(*answers, strict=True):
        for place in places_of(pair[0]):
            groups.setdefault(place, ([], []))[1].append(pair)
    result = {}
    for (kind, name), (some, pairs) in sorted(groups.items()):
        result.setdefault(kind, {})[name] = figures(some, pairs, texts)
    return result


def table(result):
    """The terminal's table: one line for each group."""
    lines = [f"{result['model']} against {result['against']}",
             f"{'':30}" + "".join(f"{title:>{width}}" for title, width, *_ in COLUMNS)]
    for kind in ("overall", "language", "script", "task"):
        for name, found in result["by"].get(kind, {}).items():
            title = name if kind == "overall" else f"{kind} {name}"
            lines.append(f"{title:30}" + "".join(
                f"{'-' if found[key] is None else format(found[key], how):>{width}}"
                for _, width, key, how in COLUMNS))
    lines.append("change: of the log-likelihood; same: greedy answers that are the same text; (against): of "
                 "the other model")
    return printable("\n".join(lines))


def main(argv):
    parser = Parser(prog="aya_min.evaluate quantized", description="What a quantized model loses, and where.")
    parser.add_argument("--model", required=True, help="the quantized folder (or any language model)")
    parser.add_argument("--against", required=True, help="the model that it was made of")
    parser.add_argument("--data", required=True, help="JSONL of prompts, conversations or texts")
    parser.add_argument("--judge", default="oracle",
                        help="a reward model's folder, whose score is the grade; default: the oracle of the "
                             "embedded world")
    parser.add_argument("--max-new-tokens", type=number(int, "[1, inf)"), default=64,
                        help="of a greedy answer; default: %(default)s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="what both models compute in; default: %(default)s")
    parser.add_argument("--out", help="JSON file to write the figures to; must not exist")
    add_flags(parser, Reading)
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    if args.out:
        check_out(args.out)
    reading = settings_from(Reading, flags=vars(args))
    folders, scored = (args.model, args.against), read(args.data, reading)[0]
    if args.judge != "oracle" and not issubclass(read_config(args.judge)[1], RewardModel):
        raise ValueError(f"--judge {args.judge} is no reward model's folder; a language model judges by "
                         "`evaluate arena`, on answers of generate.py")
    if args.judge != "oracle":
        critiques.refuse_unread(load_meta(args.judge)[0], f"--judge {args.judge}")
    tokenizers = []
    for folder in folders:
        model, tokenizer, _ = load_meta(folder, packed=True)
        if type(model) is not CohereForCausalLM:
            raise ValueError(f"{folder}: {ONE[type(model)]}; give a language model of a decoder alone")
        tokenizers.append(tokenizer)
    if tokenizers[0].meaning != tokenizers[1].meaning:
        raise ValueError(f"{args.model} and {args.against} have different tokenizers; compare a model with "
                         "the one that it was made of")
    dtype = getattr(torch, args.dtype)
    sides = [measured(folder, args.data, reading, dtype, args.max_new_tokens) for folder in folders]
    texts, answers = zip(*sides)
    if args.judge == "oracle":
        answers = [[row | {"grade": graded(row)} for row in rows] for rows in answers]
    elif any(answers):
        judged, key, _ = scored_by(list(answers), args.judge, reading)
        answers = [[row | {"grade": row[key]} for row in rows] for rows in judged]
    result = {"model": args.model, "against": args.against, "data": args.data, "judge": args.judge,
              "dtype": args.dtype, "max_new_tokens": args.max_new_tokens,
              "by": compare(scored, texts, answers)}
    if args.out:
        write_new({args.out: dumps(result, indent=1) + "\n"})
    print(table(result))
