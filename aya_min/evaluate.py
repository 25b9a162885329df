"""Win rates with intervals, mean grades, language checks: per language, per cluster, overall.

Follows the evaluation of Aya Expanse (pairwise win rates on m-ArenaHard, 23 languages). Departures: the judge
is the embedded world's oracle (or a reward model that had no part in training), not an LLM; a tie is half a
win, and wins, ties and losses are counted apart; the interval resamples questions. The same question in 23
languages is one draw, not 23: a bootstrap over rows, as in Arena-Hard, is several times too narrow (Miller,
arXiv 2411.00640, finds clustered standard errors of more than three times the naive ones).

Answers are JSONL rows: the question's keys and "completion". Rows of two files are matched by ("question_id",
"language"). Ids are compared as text; a row without "question_id" is identified by its "id" or its prompt,
and a row without a language counts as "other". An answer that was cut at its limit (rows.CUT) is judged as it
is, and counted.

    python -m aya_min.evaluate arena --answers A.jsonl --baseline B.jsonl --judge oracle --out eval.json
    python -m aya_min.evaluate arena --answers A.jsonl --baseline B.jsonl --judge RM_FOLDER --out eval.json
    python -m aya_min.evaluate languages --answers A.jsonl          # evaluate_languages.py
"""

import json
import os
import sys
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from . import evaluate_languages
from .command import Parser, guarded, is_spare_rank, printable
from .config import Reading, add_flags, settings_from
from .files import dumps, write_new
from .languages import CLUSTERS, LANGUAGES, home_clusters, home_language
from .model import RewardModel
from .reward import score_texts
from .rows import finish_reason, is_cut, prompt_of, read_jsonl
from .weights import load, load_meta, read_config
from .world_oracle import check_question, grade

VERDICT = ["grade", "seen_language", "why", "score", "reward"]          # keys that a judge adds to a row


# ---- figures -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def draws(num_questions, num_resamples, seed, start):
    """How often each question is drawn in each resample, (num_resamples, num_questions); start: the number of
    resamples before these. Kept, because a run compares answers to the same questions a thousand times."""
    rng = np.random.default_rng([seed, start] if start else seed)
    drawn = rng.integers(num_questions, size=(num_resamples, num_questions))
    drawn += num_questions * np.arange(num_resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=drawn.size)
    return counts.reshape(drawn.shape).astype(np.float64)


def bootstrap_mean(values, question_ids, num_resamples=2000, seed=0):
    """(mean of values (N,), its 95% interval [lo, hi]): the bootstrap resamples questions, with all rows.

    Known gap: N equal values (for example 60 wins of 60) give an interval of width 0, which is not certainty.
    """
    values = np.asarray(values, dtype=np.float64)
    order = {}
    question = np.array([order.setdefault(name, len(order)) for name in question_ids])      # (N,) in 0..Q-1
    assert values.shape == question.shape and len(values) > 0, (values.shape, question.shape)
    sums = np.bincount(question, weights=values)                                            # (Q,)
    counts = np.bincount(question)                                                          # (Q,)
    means = []
    piece = max(1, 250_000 // len(sums))        # resamples at a time: 2 MB of counts
    for start in range(0, num_resamples, piece):
        drawn = draws(len(sums), min(piece, num_resamples - start), seed, start)            # (piece, Q)
        means.append((drawn @ sums) / (drawn @ counts))                                     # (piece,)
    bounds = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(values.mean()), [float(bound) for bound in bounds]


def win_rates(scores_a, scores_b, question_ids, num_resamples=2000, seed=0):
    """How often A's score is above B's, in percent; a tie counts half.

    A pair with a score of None or NaN is counted under "unjudged" and otherwise left out. "num" is the number
    of judged pairs; if it is 0, "win_rate" and both ends of "ci95" are None.
    """
    a = np.array(scores_a, dtype=np.float64)        # (N,), None becomes NaN
    b = np.array(scores_b, dtype=np.float64)        # (N,)
    judged = ~(np.isnan(a) | np.isnan(b))
    win, tie = (a > b)[judged], (a == b)[judged]
    rate, ci95 = None, [None, None]
    if judged.any():
        ids = [question for question, kept in zip(question_ids, judged, strict=True) if kept]
        rate, ci95 = bootstrap_mean(100 * win + 50 * tie, ids, num_resamples, seed)
    num, wins, ties = int(judged.sum()), int(win.sum()), int(tie.sum())
    return {"win": wins, "tie": ties, "loss": num - wins - ties, "unjudged": len(a) - num, "win_rate": rate,
            "ci95": ci95, "num": num}


def group(rows, key):
    """{key(row): its rows}, sorted by key."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items()))


def averages(rows):
    """Mean grade (0-3), share in the prompt's language (0-1), mean length (characters), number of cut ones.

    A figure that the rows do not hold is left out.
    """
    grades = [row["grade"] for row in rows if row.get("grade") is not None]
    right = [row["seen_language"] == row["language"] for row in rows if "seen_language" in row]
    means = {"grade": grades, "right_language": right, "length": [len(row["completion"]) for row in rows]}
    said = any(row.get("finish_reason") is not None for row in rows)
    figures = {"num": len(rows)} | {name: float(np.mean(values)) for name, values in means.items() if values}
    return figures | ({"cut": sum(map(is_cut, rows))} if said else {})


def summarize(rows):
    """One model's answers: averages with the grade's interval, also by language and by task.

    ValueError without rows.
    """
    if not rows:
        raise ValueError("no answers to summarize: give at least one row with a completion")
    graded = [row for row in rows if row.get("grade") is not None]
    interval = {}
    if graded:
        _, ci95 = bootstrap_mean([row["grade"] for row in graded], [row["question_id"] for row in graded])
        interval = {"grade_ci95": ci95}

    def by(key):
        named = [row for row in rows if isinstance(row.get(key), str)]
        return {name: averages(part) for name, part in group(named, lambda row: row[key]).items()}

    return averages(rows) | interval | {"by_language": by("language"), "by_task": by("task")}


def join(rows_a, rows_b):
    """[(a, b), ...] in A's order: the two answers to each question in each language.

    ValueError if a side answers a question twice or not at all, or if the two prompts differ.
    """
    a = by_question(rows_a, "answers")
    b = by_question(rows_b, "baseline")
    for key in [*a, *b]:
        question = f"{prefix_of(a.get(key) or b[key])}question {key[0]!r} ({key[1]})"
        remedy = "generate both files from the same prompts"
        if key not in a or key not in b:
            side = "answers" if key not in a else "baseline"
            raise ValueError(f"{question} has no row in the {side}: {remedy}")
        if asked(a[key]) != asked(b[key]):
            raise ValueError(f"{question} has another prompt in the baseline: {remedy}")
    return [(a[key], b[key]) for key in a]


def by_question(rows, side):
    """{(question id, language): row}; ValueError for a second answer. side: the file's name in messages."""
    found = {}
    for row in rows:
        key = str(row["question_id"]), row["language"]
        if key in found:
            raise ValueError(f"{prefix_of(row) or side + ': '}question {key[0]!r} ({key[1]}) is answered "
                             "twice: keep one answer to each question")
        found[key] = row
    return found


def prefix_of(row):
    """"file:line: " of a row that was read from a file, to begin a message with, else ""."""
    return f"{row['prompt_where']}: " if "prompt_where" in row else ""


def asked(row):
    return row.get("prompt_messages", row.get("prompt"))


def compare(rows_a, rows_b, key="grade", clusters=CLUSTERS, num_resamples=2000, seed=0):
    """Win rates of A against B: overall, by language and by cluster.

    Languages that all clusters share are counted under "shared", so that the clusters add up to the whole.
    key: "grade" (the oracle's verdict) or "score" (a reward model's); the caller names it, so that neither is
    taken for the other. ValueError for a row without it, and as in `join`.
    """
    pairs = join(rows_a, rows_b)
    for row in (row for pair in pairs for row in pair):
        if key not in row:
            raise ValueError(f"question {row['question_id']!r} ({row['language']}) has no {key!r}: judge "
                             "both sides' answers before comparing")

    def rates(part):
        return win_rates([a[key] for a, _ in part], [b[key] for _, b in part],
                         [str(a["question_id"]) for a, _ in part], num_resamples, seed)

    def by(name_of):
        parts = group(pairs, lambda pair: name_of(pair[0]["language"]))
        return {name: rates(part) for name, part in parts.items()}

    def cluster_of(code):
        return home.get(home_language(code, home), "other")

    home = home_clusters(clusters)
    return {"overall": rates(pairs), "by_language": by(str), "by_cluster": by(cluster_of)}


# ---- judges ------------------------------------------------------------------------------------------------

def grade_answers(rows):
    """The rows with the oracle's verdict: "grade" 0-3, "seen_language", "why"."""
    graded = []
    for row in rows:
        verdict = grade(row, row["completion"])
        graded.append({**row, "grade": verdict.grade, "seen_language": verdict.language, "why": verdict.why})
    return graded


def judged_ids(tokenizer, row):
    """(prompt ids, answer ids), which a reward model reads of a row."""
    prompt = row.get("prompt_messages") or row["prompt"]
    return tuple(tokenizer.encode_prompt(prompt)), tuple(tokenizer.encode_answer(row["completion"]))


def score_answers(model, tokenizer, sides, name="the reward model", too_long="refuse"):
    """Each side's rows with a reward model's "score", None for a row that --too-long skip leaves out.

    Answers with the same ids are scored once, on whichever side they are. Padding to another length changes
    the last bits of a score, so that equal answers in different batches would win or lose by chance.
    """
    keys = [[judged_ids(tokenizer, row) for row in rows] for rows in sides]
    different = {key: row for side, rows in zip(keys, sides) for key, row in zip(side, rows)}
    scored = score_texts(model, tokenizer, list(different.values()), name=name, too_long=too_long)
    scores = dict(zip(different, scored))
    return [[{**row, "score": scores[key]} for key, row in zip(side, rows)]
            for side, rows in zip(keys, sides)]


# ---- the arena ---------------------------------------------------------------------------------------------

def answers_to_judge(path, judge, reading=None):
    """The rows of a JSONL file as the judge reads them."""
    return [checked(where, row, judge) for where, row in read_jsonl(path, reading)]


def checked(where, row, judge):
    """The row without an earlier judge's verdict, with "question_id" (a text), "language" and "prompt_where".

    ValueError, which names file and line (where), if the judge cannot read it.
    """
    row = {key: value for key, value in row.items() if key not in VERDICT} | {"prompt_where": where}
    row["language"] = row.get("language") or "other"
    if not isinstance(row.get("completion"), str):
        raise ValueError(f"{where}: 'completion' is missing or no text; give the answer, or name its key "
                         "with --columns completion=...")
    row["finish_reason"] = finish_reason(row, where)
    if judge == "oracle":
        missing = [key for key in ("task", "args") if row.get(key) is None]
        if missing:
            raise ValueError(f"{where}: {missing[0]!r} is missing; --judge oracle grades only the embedded "
                             "world's questions, judge others with a reward model")
        try:
            check_question(row)
        except ValueError as error:
            remedy = "judge questions from elsewhere with a reward model"
            raise ValueError(f"{where}: {error}; {remedy}") from None
    else:
        question = {key: value for key, value in row.items() if key != "completion"}
        row["prompt_messages"] = prompt_of(question, where)
    row["question_id"] = question_of(where, row)
    return row


def question_of(where, row):
    """The id of a row's question as text: its "question_id", else its "id", else its prompt."""
    name = next((row[key] for key in ("question_id", "id") if row.get(key) is not None), None)
    if name is None and asked(row) is not None:
        return dumps(asked(row))
    if type(name) not in (str, int, float):
        raise ValueError(f"{where}: 'question_id' must be a text or a number, got {name!r}")
    return str(name)


def check_texts(rows, folder, reading):
    """Refuse texts that the judge cannot score, before its weights are read.

    ValueError for a folder without a reward model, a text that spells a control token, or more tokens than
    the judge has positions.
    """
    if not issubclass(read_config(folder)[1], RewardModel):
        raise ValueError(f"--judge {folder}: a language model, not a reward model; give 'oracle' or a folder "
                         "that the reward stage wrote")
    model, tokenizer, _ = load_meta(folder)
    room = model.config.max_position_embeddings
    for row in rows:
        texts = [message["content"] for message in row["prompt_messages"]] + [row["completion"]]
        name = next(filter(None, map(tokenizer.spelled, texts)), None)
        if name and not reading.allow_control_tokens:
            raise ValueError(f"{prefix_of(row)}a text spells the control token {name}; give the text without "
                             "the template, or read it as letters with --allow-control-tokens")
        size = sum(map(len, judged_ids(tokenizer, row)))
        if size > room and reading.too_long == "refuse":
            raise ValueError(f"{prefix_of(row)}question and answer have {size} tokens, the judge {room} "
                             "positions; leave such answers unjudged with --too-long skip, or drop the "
                             "oldest tokens of their prompts with --too-long cut-left")


def win_rate_table(result):
    """The terminal's table of a comparison: overall, by cluster, by language."""
    judge, a, b = result["judge"], result["answers"], result["baseline"]
    lines = [f"{a['path']} against {b['path']}, judged by the {judge}"]
    if judge != "oracle":
        lines.append("A reward model's taste is not correctness: never judge a model by the reward model "
                     "that trained it.")
    labels = {"grade": "mean grade 0-3", "right_language": "right language", "length": "characters"}
    for name, label in labels.items():
        if name in a and name in b:
            lines.append(f"{label:16}{a[name]:9.2f} against {b[name]:.2f}")
    cut = "cut" in a or "cut" in b              # "3/0": three answers of A and none of B were cut
    lines.append(f"{'':32}{'win rate':>9}{'95% interval':>16}{'win':>7}{'tie':>7}{'loss':>7}{'unjudged':>10}"
                 f"{'cut' if cut else '':>10}")
    overall = result["overall"]
    for name, r in [("overall", overall), *result["by_cluster"].items(), *result["by_language"].items()]:
        rate = f"{r['win_rate']:.1f}" if r["num"] else "-"
        interval = "[{:.1f}, {:.1f}]".format(*r["ci95"]) if r["num"] else "-"
        title = f"{name:8}{LANGUAGES[name].name}" if name in LANGUAGES else name
        sides = [side if r is overall else side.get("by_language", {}).get(name) for side in (a, b)]
        both = "/".join(str(side.get("cut", "-")) for side in sides) if cut and all(sides) else ""
        lines.append(f"{title:32}{rate:>9}{interval:>16}{r['win']:7}{r['tie']:7}{r['loss']:7}"
                     f"{r['unjudged']:10}{both:>10}")
    return printable("\n".join(line.rstrip() for line in lines))


def check_out(path):
    """Refuse, before any work, an output that exists (even as a dangling link) or that cannot be written."""
    if os.path.lexists(path):
        raise ValueError(f"{path} exists: remove it, or name another --out")
    above = next(folder for folder in Path(path).absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK):
        fault = "a folder that you cannot write to" if above.is_dir() else "no folder"
        raise ValueError(f"{path}: {above} is {fault}; name another --out")


def arena(answers, baseline, judge, out, reading):
    """Compare two files of answers, write the figures to `out`, print the table."""
    check_out(out)
    sides = [answers_to_judge(path, judge, reading) for path in (answers, baseline)]
    # refuses rows that do not match before a model is loaded
    for a, b in join(*sides):
        if judge == "oracle" and (a["task"], a["args"]) != (b["task"], b["args"]):
            raise ValueError(f"{prefix_of(b)}question {b['question_id']!r} ({b['language']}) has another "
                             "task or other args than in the answers, so another right answer: generate "
                             "both files from the same prompts")
    if judge == "oracle":
        sides = [grade_answers(rows) for rows in sides]
        key, title = "grade", "oracle"
    else:
        check_texts(sum(sides, []), judge, reading)
        model, tokenizer = load(judge, device="cuda" if torch.cuda.is_available() else "cpu")
        sides = score_answers(model, tokenizer, sides, f"--judge {judge}", reading.too_long)
        key, title = "score", f"reward model: {Path(judge).resolve().name}"
    summaries = [{"path": str(path)} | summarize(rows) for path, rows in zip((answers, baseline), sides)]
    result = {"judge": title, "answers": summaries[0], "baseline": summaries[1]} | compare(*sides, key=key)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_new({out: json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"})
    print(win_rate_table(result), printable(f"written: {out}"), sep="\n")


def main(argv=None):
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["languages"]:
        return evaluate_languages.main(given[1:])
    parser = Parser(prog="aya_min.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["arena", "languages"],
                        help="languages has flags of its own: evaluate languages --help")
    parser.add_argument("--answers", required=True, help="JSONL of the model's answers")
    parser.add_argument("--baseline", required=True, help="JSONL of the answers to compare with")
    parser.add_argument("--judge", required=True,
                        help="'oracle' (of the embedded world), or a reward model's folder")
    parser.add_argument("--out", required=True, help="JSON file to write the figures to; must not exist")
    add_flags(parser, Reading, only=("columns", "too_long", "allow_control_tokens"))
    args = parser.parse_args(given)
    if not is_spare_rank():
        arena(args.answers, args.baseline, args.judge, args.out, settings_from(Reading, flags=vars(args)))


if __name__ == "__main__":
    guarded(main, "aya_min.evaluate")
