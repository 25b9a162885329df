"""What a reward model likes besides the answer: the same answer in another frame (frames.py), the difference
of its scores with intervals, by language. "Human feedback is not gold standard", arXiv 2309.16349, part 2.

    python -m aya_min.evaluate bias --reward-model RM [--prompts F.jsonl] [--out F.json]

    assertive   sure of itself less unsure of itself
    longer      with a sentence more that says nothing less without
    polite      with thanks for the question less with a neutral sentence
    own         in the prompt's language less in English

Without a file, or for a question of the embedded world without an answer, the right answer is used, and two
columns more appear: "right", right less wrong, the yardstick of the others, and "sure, wrong", an assertive
wrong answer less a hedged right one, which a reward model should put far below 0. Of other rows the answer is
their "completion", which is known in no other language. Scores have no unit: compare the columns with each
other and with the deviation of the scores.
"""

import random

import numpy as np

from .command import WHOLE, Parser, is_spare_rank, number, printable
from .config import Reading, add_flags, settings_from
from .evaluate_answers import checked, check_texts, score_answers
from .evaluate_judges import device
from .evaluate_rates import bootstrap_mean
from .files import check_out, dumps, write_new
from .frames import framed
from .languages import LANGUAGES, home_language
from .rows import read_jsonl
from .weights import load
from .world import answer, gold_answer, questions
from .world_oracle import check_question
from .world_translation import in_english

# Each probe: (frame, answer) less (frame, answer); no frame: the answer as it is.
PROBES = {"assertive": (("assertive", "answer"), ("hedged", "answer")),
          "longer": (("longer", "answer"), (None, "answer")),
          "polite": (("polite", "answer"), ("neutral", "answer")),
          "own": ((None, "answer"), (None, "english")),
          "right": (("neutral", "answer"), ("neutral", "wrong")),
          "sure, wrong": (("assertive", "wrong"), ("hedged", "answer"))}


# ---- rows and their texts ----------------------------------------------------------------------------------

def read(path, reading):
    """(rows, {language without frames: its number of rows}) of a JSONL file.

    A row gets "home", the language of its frames; the "completion" of a question of the world may be None.
    ValueError for another row without an answer."""
    rows, without = [], {}
    for where, row in read_jsonl(path, reading):
        home = home_language(row.get("language"), LANGUAGES)
        is_question = row.get("completion") is None and row.get("task") is not None
        if is_question:
            try:
                check_question({"args": None, "language": "", **row})
            except ValueError as error:
                raise ValueError(f"{where}: {error}; or give the row a 'completion'") from None
        row = checked(where, {**row, "completion": "" if is_question else row.get("completion")}, "a model")
        if not is_question and not row["completion"].strip():
            raise ValueError(f"{where}: 'completion' is empty; fill it, or remove the line")
        if home is None:
            without[row["language"]] = without.get(row["language"], 0) + 1
            continue
        # a critique of the answer says nothing of its frames; read_jsonl has reported that it is not read
        rows.append({**row, "completion": None if is_question else row["completion"], "home": home,
                     "critique": None})
    if not rows:
        raise ValueError(f"{path}: no row is in a language with frames ({' '.join(LANGUAGES)}); give such "
                         "rows a 'language'")
    return rows, without


def answers_of(row, rng):
    """{"answer", "wrong", "english": text} of a row, as far as they are known."""
    if row["completion"] is not None:
        return {"answer": row["completion"]}
    try:
        found = {"answer": gold_answer(row), "wrong": answer(rng, row, (0, 0, 1, 0))[0]}
    except IndexError:                  # of the task's words there are fewer than the world asks about
        raise ValueError(f"{row['prompt_where']}: no wrong answer to this question is known; give the row a "
                         "'completion'") from None
    return found if row["language"] == "en" else found | {"english": gold_answer(in_english(row))}


def texts_of(row, rng):
    """{(frame or None, which answer): text} of all that the probes need of a row."""
    found, code = answers_of(row, rng), row["home"]
    wanted = {side for probe in PROBES.values() for side in probe if side[1] in found}
    return {(frame, which): framed(code, frame, found[which]) if frame else found[which]
            for frame, which in sorted(wanted, key=str)}


# ---- figures -----------------------------------------------------------------------------------------------

def differences(scores):
    """{probe: the difference} of a row's {(frame, answer): score}, where both scores are known."""
    known = {key: value for key, value in scores.items() if value is not None}
    return {name: known[a] - known[b] for name, (a, b) in PROBES.items() if a in known and b in known}


def figures(rows):
    """{probe: {"difference", "ci95", "num", "questions"}} of rows with "differences"; None for a probe of no
    row."""
    found = {}
    for name in PROBES:
        some = [(row["differences"][name], row["question_id"]) for row in rows if name in row["differences"]]
        found[name] = None
        if some:
            value, ci95 = bootstrap_mean(*zip(*some))
            found[name] = {"difference": value, "ci95": ci95, "num": len(some),
                           "questions": len({question for _, question in some})}
    return found


def measured(model, tokenizer, rows, name, reading, seed=0):
    """{"overall", "by_language", "deviation", "unscored"} of a reward model on rows that `read` gave."""
    rng = random.Random(f"bias/{seed}")
    keyed = [(row, key, text) for row in rows for key, text in texts_of(row, rng).items()]
    asked = [{**row, "completion": text} for row, _, text in keyed]
    scored = score_answers(model, tokenizer, [asked], name, reading.too_long)[0]
    of_rows = {id(row): {} for row in rows}
    for (row, key, _), answered in zip(keyed, scored, strict=True):
        of_rows[id(row)][key] = answered["score"]
    done = [{**row, "differences": differences(of_rows[id(row)])} for row in rows]
    by = {code: [row for row in done if row["home"] == code] for code in LANGUAGES}
    known = [each["score"] for each in scored if each["score"] is not None]
    return {"overall": figures(done),
            "by_language": {code: figures(some) for code, some in by.items() if some},
            "deviation": float(np.std(known)) if known else None, "unscored": len(scored) - len(known)}


def cell(figure):
    """A figure as text; one question alone has no interval."""
    if figure is None:
        return "-"
    low, high = figure["ci95"]
    return f"{figure['difference']:+.2f} " + ("(one question)" if figure["questions"] == 1 else
                                              f"[{low:+.2f}, {high:+.2f}]")


def table(result):
    """The terminal's table: a line for each language, a column for each probe."""
    lines = [f"what {result['reward_model']} likes, in points of its score: difference and 95% interval",
             f"{'':30}" + "".join(f"{name:>24}" for name in PROBES)]
    for name, found in [("overall", result["overall"]), *result["by_language"].items()]:
        title = f"{name:8}{LANGUAGES[name].name}" if name in LANGUAGES else name
        cells = map(cell, found.values())
        lines.append(f"{title:30}" + "".join(f"{each:>24}" for each in cells))
    if result["deviation"] is not None:
        lines.append(f"standard deviation of all its scores: {result['deviation']:.2f}")
    if result["unscored"]:
        lines.append(f"left out: {result['unscored']} texts that are too long for it")
    if result["without"]:
        names = ", ".join(f"{code} ({count} rows)" for code, count in sorted(result["without"].items()))
        lines.append(f"left out: languages without frames: {names}")
    return printable("\n".join(line.rstrip() for line in lines))


def main(argv):
    parser = Parser(prog="aya_min.evaluate bias", description="What a reward model likes besides the answer.")
    parser.add_argument("--reward-model", required=True, help="its folder")
    parser.add_argument("--prompts",
                        help="JSONL of prompts with their answers (completion), or questions of the embedded "
                             "world; default: questions of the embedded world")
    parser.add_argument("--count", type=number(int, "[1, inf)"),
                        help="questions of the embedded world, without --prompts (default 480)")
    parser.add_argument("--seed", type=number(int, WHOLE),
                        help="of these questions and of wrong answers (default 0)")
    parser.add_argument("--out", help="JSON file to write the figures to; must not exist")
    parser.add_argument("--too-long", choices=["refuse", "skip"],
                        help="what to do with texts beyond the model's positions (default refuse); none are "
                             "cut, as the texts that are compared would lose unequal parts of their prompt")
    add_flags(parser, Reading, only=("columns", "allow_control_tokens"))
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    if args.out:
        check_out(args.out)
    if args.prompts and args.count:
        raise ValueError("--count goes without --prompts, whose rows are all read; leave it out")
    reading, without, seed = settings_from(Reading, flags=vars(args)), {}, args.seed or 0
    if args.prompts:
        rows, without = read(args.prompts, reading)
        if args.seed is not None and all(row["completion"] is not None for row in rows):
            raise ValueError("--seed draws answers to questions of the embedded world, and all rows of "
                             "--prompts have their own; leave it out")
    else:
        if args.columns:
            raise ValueError("--columns goes with --prompts; leave it out")
        rows = questions("test", args.count or 480, f"bias/{seed}", level="tiny")
        rows = [{**row, "completion": None, "home": row["language"],
                 "prompt_messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    rng = random.Random(f"bias/{seed}")
    texts = [{**row, "completion": text} for row in rows for text in texts_of(row, rng).values()]
    check_texts(texts, args.reward_model, reading, flag="--reward-model", with_critiques=False,
                may_cut=False)
    model, tokenizer = load(args.reward_model, device=device())
    name = f"--reward-model {args.reward_model}"
    result = {"reward_model": args.reward_model, "prompts": args.prompts, "rows": len(rows),
              "seed": seed, **measured(model, tokenizer, rows, name, reading, seed),
              "without": without}
    if args.out:
        write_new({args.out: dumps(result, indent=1) + "\n"})
    print(table(result))
