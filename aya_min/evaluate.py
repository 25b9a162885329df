"""Win rates with intervals, mean grades, language checks: per language, per cluster, overall.

Follows the evaluation of Aya Expanse (pairwise win rates on m-ArenaHard, 23 languages). Departures: the judge is the embedded world's
oracle (or a reward model that had no part in training), not an LLM; a tie is half a win, and win, tie and loss are always counted apart;
the interval resamples questions. The same question in 23 languages is one draw, not 23: a bootstrap over rows, as in Arena-Hard, is
several times too narrow (Miller, arXiv 2411.00640, finds clustered standard errors of more than three times the naive ones).

Answers are JSONL rows: the question's keys and "completion". Two files are joined by ("question_id", "language").

    python -m aya_min.evaluate arena --answers A.jsonl --baseline B.jsonl --judge oracle|RM_FOLDER --out eval.json
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from .data import read_jsonl
from .languages import CLUSTERS, LANGUAGES, SHARED
from .model import RewardModel
from .reward import score_texts
from .weights import load, read_config
from .world import TASKS, grade

VERDICT = ["grade", "seen_language", "why", "score"]  # what a judge adds to a row


def bootstrap_mean(values, question_ids, num_resamples=2000, seed=0):
    """The mean of values (N,) and its 95% percentile interval (lo, hi), resampling questions with all their rows.

    Known gap: values that are all alike (60 wins of 60) give an interval of width 0, which is not certainty.
    """
    values, order = np.asarray(values, dtype=np.float64), {}
    cluster = np.array([order.setdefault(question, len(order)) for question in question_ids])  # (N,) in 0..Q-1
    assert values.shape == cluster.shape and len(values) > 0, (values.shape, cluster.shape)
    sums, counts = np.bincount(cluster, weights=values), np.bincount(cluster)  # (Q,)
    rng, means = np.random.default_rng(seed), []
    piece = max(1, 1_000_000 // len(sums))  # resamples at a time: 8 MB of indices
    for start in range(0, num_resamples, piece):
        draws = rng.integers(len(sums), size=(min(piece, num_resamples - start), len(sums)))  # (piece, Q)
        means.append(sums[draws].sum(1) / counts[draws].sum(1))  # (piece,)
    return float(values.mean()), [float(bound) for bound in np.percentile(np.concatenate(means), [2.5, 97.5])]


def win_rates(scores_a, scores_b, question_ids, num_resamples=2000, seed=0):
    """How often A's score is above B's, in percent, a tie counting half. A score of None or NaN: unjudged, counted and left out.

    "num" is the number of judged pairs; without any, "win_rate" and both ends of "ci95" are None.
    """
    a, b = np.array(scores_a, dtype=np.float64), np.array(scores_b, dtype=np.float64)  # (N,), None becomes NaN
    judged = ~(np.isnan(a) | np.isnan(b))
    win, tie = (a > b)[judged], (a == b)[judged]
    rate, ci95 = None, [None, None]
    if judged.any():
        ids = [question for question, kept in zip(question_ids, judged, strict=True) if kept]
        rate, ci95 = bootstrap_mean(100 * win + 50 * tie, ids, num_resamples, seed)
    num, wins, ties = int(judged.sum()), int(win.sum()), int(tie.sum())
    return {"win": wins, "tie": ties, "loss": num - wins - ties, "unjudged": len(a) - num, "win_rate": rate, "ci95": ci95, "num": num}


def grade_answers(rows):
    """The oracle's verdict beside each answer: "grade" 0-3, "seen_language", "why"."""
    verdicts = [grade(row, row["completion"]) for row in rows]
    return [{**row, "grade": v.grade, "seen_language": v.language, "why": v.why} for row, v in zip(rows, verdicts)]


def score_answers(model, tokenizer, sides):
    """Each side's rows with a reward model's "score". Every different text is scored once, whichever side it is on: padded to
    another batch's length, the same text differs in the last bits, and equal answers would win or lose by chance instead of tying."""
    texts = {(row["prompt"], row["completion"]): row for rows in sides for row in rows}
    scores = dict(zip(texts, score_texts(model, tokenizer, list(texts.values()))))
    return [[{**row, "score": scores[row["prompt"], row["completion"]]} for row in rows] for rows in sides]


def group(rows, key):
    """Rows by key(row), the names in order."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items()))


def averages(rows):
    """Mean grade (0-3), share in the prompt's language (0-1), mean length (characters). What no judge gave is left out."""
    grades = [row["grade"] for row in rows if row.get("grade") is not None]
    right = [row["seen_language"] == row["language"] for row in rows if "seen_language" in row]
    means = {"grade": grades, "right_language": right, "length": [len(row["completion"]) for row in rows]}
    return {"num": len(rows)} | {name: float(np.mean(values)) for name, values in means.items() if values}


def summarize(rows):
    """One model's answers: averages with the interval of the grade, by language and by task (rows that have one)."""
    if not rows:
        raise ValueError("no answers to summarize: give at least one row with a completion")
    graded = [row for row in rows if row.get("grade") is not None]
    interval = {"grade_ci95": bootstrap_mean([row["grade"] for row in graded], [row["question_id"] for row in graded])[1]} if graded else {}

    def by(key):
        return {name: averages(part) for name, part in group([row for row in rows if key in row], lambda row: row[key]).items()}

    return averages(rows) | interval | {"by_language": by("language"), "by_task": by("task")}


def join(rows_a, rows_b):
    """[(a, b)] in A's order: the two answers to each question in each language. Refuses questions that only one side answers."""
    sides = []
    for side, rows in (("answers", rows_a), ("baseline", rows_b)):
        sides.append({})
        for row in rows:
            key = row["question_id"], row["language"]
            if key in sides[-1]:
                raise ValueError(f"{side}: question {key[0]!r} ({key[1]}) is answered twice: keep one answer to each question")
            sides[-1][key] = row
    a, b = sides
    for key in [*a, *b]:
        where = f"question {key[0]!r} ({key[1]})"
        if key not in a or key not in b:
            side = "answers" if key not in a else "baseline"
            raise ValueError(f"{where} has no row in the {side}: generate both files from the same prompts")
        if a[key].get("prompt") != b[key].get("prompt"):
            raise ValueError(f"{where} has another prompt in the baseline: generate both files from the same prompts")
    return [(a[key], b[key]) for key in a]


def compare(rows_a, rows_b, key="grade", clusters=CLUSTERS, num_resamples=2000, seed=0):
    """Win rates of A against B: overall, by language, by cluster (the languages shared by all clusters apart, so that counts add up).

    key: "grade" for the oracle's verdict, "score" for a reward model's; the caller says which, so that neither is taken for the other.
    """
    pairs = join(rows_a, rows_b)
    for row in (row for pair in pairs for row in pair):
        if key not in row:
            raise ValueError(f"question {row['question_id']!r} ({row['language']}) has no {key!r}: judge both sides' answers before comparing")

    def rates(part):
        return win_rates([a[key] for a, _ in part], [b[key] for _, b in part], [a["question_id"] for a, _ in part], num_resamples, seed)

    def by(name_of):
        return {name: rates(part) for name, part in group(pairs, lambda pair: name_of(pair[0]["language"])).items()}

    home = {code: "shared" for code in SHARED} | {code: name for name, codes in clusters.items() for code in codes}
    return {"overall": rates(pairs), "by_language": by(str), "by_cluster": by(lambda code: home.get(code, "other"))}


def read_answers(path, judge):
    """The rows of a JSONL file, each with what the judge reads, without the verdicts of an earlier judge."""
    fields = ["question_id", "language", "completion"] + (["task", "args"] if judge == "oracle" else ["prompt"])
    rows = []
    for where, row in read_jsonl(path):
        wrong = [name for name in fields if not isinstance(row.get(name), list if name == "args" else str)]
        if wrong:
            raise ValueError(f"{where}: {wrong[0]!r} is missing or of the wrong type; --judge {judge} reads {', '.join(fields)}")
        if judge == "oracle" and row["task"] not in TASKS:
            raise ValueError(f"{where}: the oracle knows no task {row['task']!r}; judge questions from elsewhere with a reward model")
        rows.append({key: value for key, value in row.items() if key not in VERDICT})
    return rows


def table(result):
    """The terminal's table of a comparison: overall, clusters, languages."""
    judge, a, b = result["judge"], result["answers"], result["baseline"]
    lines = [f"{a['path']} against {b['path']}, judged by the {judge}"]
    if judge != "oracle":
        lines.append("A reward model's taste is not correctness: never judge a model by the reward model that trained it.")
    lines += [f"{label:16}{a[name]:9.2f} against {b[name]:.2f}" for name, label in
              (("grade", "mean grade 0-3"), ("right_language", "right language"), ("length", "characters")) if name in a]
    lines.append(f"{'':32}{'win rate':>9}{'95% interval':>16}{'win':>7}{'tie':>7}{'loss':>7}{'unjudged':>10}")
    for name, r in [("overall", result["overall"]), *result["by_cluster"].items(), *result["by_language"].items()]:
        shown = f"{r['win_rate']:9.1f}{'[{:.1f}, {:.1f}]'.format(*r['ci95']):>16}" if r["num"] else f"{'-':>9}{'-':>16}"
        title = f"{name:8}{LANGUAGES[name].name}" if name in LANGUAGES else name
        lines.append(f"{title:32}{shown}{r['win']:7}{r['tie']:7}{r['loss']:7}{r['unjudged']:10}")
    return "\n".join(lines)


def arena(answers, baseline, judge, out):
    """Compares two files of answers, writes eval.json, prints the table."""
    if Path(out).exists():
        raise ValueError(f"{out} exists: remove it, or name another --out")
    if judge != "oracle" and read_config(judge)[1] is not RewardModel:
        raise ValueError(f"--judge {judge}: a language model, not a reward model; give 'oracle' or a folder that the reward stage wrote")
    sides = [read_answers(path, judge) for path in (answers, baseline)]
    join(*sides)  # what does not match is refused before any model is loaded
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    if judge == "oracle":
        sides, key, title = [grade_answers(rows) for rows in sides], "grade", "oracle"
    else:
        model, tokenizer = load(judge, device="cuda" if torch.cuda.is_available() else "cpu")
        sides, key, title = score_answers(model, tokenizer, sides), "score", f"reward model: {Path(judge).resolve().name}"
    summaries = [{"path": str(path)} | summarize(rows) for path, rows in zip((answers, baseline), sides)]
    result = {"judge": title, "answers": summaries[0], "baseline": summaries[1]} | compare(*sides, key=key)
    Path(out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(result), f"written: {out}", sep="\n")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="aya_min.evaluate", usage=argparse.SUPPRESS, description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["arena"])
    parser.add_argument("--answers", required=True, help="JSONL of the model's answers")
    parser.add_argument("--baseline", required=True, help="JSONL of the answers to compare with")
    parser.add_argument("--judge", required=True, help="'oracle' (the embedded world's), or a reward model's folder")
    parser.add_argument("--out", required=True, help="where to write the figures, as JSON")
    args = parser.parse_args(argv)
    try:
        arena(args.answers, args.baseline, args.judge, args.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
