"""Win rates with intervals, mean grades, language checks: per language, per cluster, overall.

Follows the evaluation of Aya Expanse (pairwise win rates on m-ArenaHard, 23 languages). Departures: the judge is the embedded world's
oracle (or a reward model that had no part in training), not an LLM; a tie is half a win, and win, tie and loss are always counted apart;
the interval resamples questions. The same question in 23 languages is one draw, not 23: a bootstrap over rows, as in Arena-Hard, is
several times too narrow (Miller, arXiv 2411.00640, finds clustered standard errors of more than three times the naive ones).

Answers are JSONL rows: the question's keys and "completion". Two files are joined by ("question_id",
"language"); ids are compared as text, a row without one is known by its "id" or its prompt, and one without a
language counts as "other". An answer that was cut at its limit (rows.CUT) is judged as it stands, and
counted.

    python -m aya_min.evaluate arena --answers A.jsonl --baseline B.jsonl --judge oracle|RM_FOLDER --out eval.json
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from .command import Parser, guarded, is_spare_rank, printable
from .config import Reading, add_flags, settings_from
from .files import dumps, write_new
from .languages import CLUSTERS, LANGUAGES, home_clusters, home_language
from .model import RewardModel
from .reward import score_texts
from .rows import finish_reason, is_cut, prompt_of, read_jsonl
from .weights import load, load_meta, read_config
from .world_oracle import check_question, grade

VERDICT = ["grade", "seen_language", "why", "score", "reward"]          # what a judge adds to a row


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


def judged_ids(tokenizer, row):
    """The ids that a reward model reads of a row, (those of the prompt, those of the answer)."""
    prompt = row.get("prompt_messages") or row["prompt"]
    return tuple(tokenizer.encode_prompt(prompt)), tuple(tokenizer.encode_answer(row["completion"]))


def score_answers(model, tokenizer, sides, name="the reward model", too_long="refuse"):
    """Each side's rows with a reward model's "score", None for one that --too-long skip leaves out.

    Answers that are the same ids are scored once, whichever side they are on: padded to another batch's
    length, the same text differs in the last bits, and equal answers would win or lose by chance instead of
    tying.
    """
    keys = [[judged_ids(tokenizer, row) for row in rows] for rows in sides]
    different = {key: row for side, rows in zip(keys, sides) for key, row in zip(side, rows)}
    scored = score_texts(model, tokenizer, list(different.values()), name=name, too_long=too_long)
    scores = dict(zip(different, scored))
    return [[{**row, "score": scores[key]} for key, row in zip(side, rows)]
            for side, rows in zip(keys, sides)]


def group(rows, key):
    """Rows by key(row), the names in order."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items()))


def averages(rows):
    """Mean grade (0-3), share in the prompt's language (0-1), mean length (characters), how many answers were
    cut at their limit. What no judge gave, and what the rows do not say, is left out."""
    grades = [row["grade"] for row in rows if row.get("grade") is not None]
    right = [row["seen_language"] == row["language"] for row in rows if "seen_language" in row]
    means = {"grade": grades, "right_language": right, "length": [len(row["completion"]) for row in rows]}
    said = any(row.get("finish_reason") is not None for row in rows)
    return ({"num": len(rows)} | {name: float(np.mean(values)) for name, values in means.items() if values}
            | ({"cut": sum(map(is_cut, rows))} if said else {}))


def summarize(rows):
    """One model's answers: averages with the interval of the grade, by language and by task (rows that have one)."""
    if not rows:
        raise ValueError("no answers to summarize: give at least one row with a completion")
    graded = [row for row in rows if row.get("grade") is not None]
    interval = {"grade_ci95": bootstrap_mean([row["grade"] for row in graded], [row["question_id"] for row in graded])[1]} if graded else {}

    def by(key):
        named = [row for row in rows if isinstance(row.get(key), str)]
        return {name: averages(part) for name, part in group(named, lambda row: row[key]).items()}

    return averages(rows) | interval | {"by_language": by("language"), "by_task": by("task")}


def join(rows_a, rows_b):
    """[(a, b)] in A's order: the two answers to each question in each language. Refuses questions that only one side answers."""
    sides = []
    for side, rows in (("answers", rows_a), ("baseline", rows_b)):
        sides.append({})
        for row in rows:
            key = str(row["question_id"]), row["language"]
            if key in sides[-1]:
                raise ValueError(f"{place(row) or side + ': '}question {key[0]!r} ({key[1]}) is answered "
                                 "twice: keep one answer to each question")
            sides[-1][key] = row
    a, b = sides
    for key in [*a, *b]:
        where = f"{place(a.get(key) or b[key])}question {key[0]!r} ({key[1]})"
        if key not in a or key not in b:
            side = "answers" if key not in a else "baseline"
            raise ValueError(f"{where} has no row in the {side}: generate both files from the same prompts")
        if asked(a[key]) != asked(b[key]):
            raise ValueError(f"{where} has another prompt in the baseline: generate both files from the same prompts")
    return [(a[key], b[key]) for key in a]


def place(row):
    """Where a row was read, to begin a message with; "" for one that was made here."""
    return f"{row['prompt_where']}: " if "prompt_where" in row else ""


def asked(row):
    return row.get("prompt_messages", row.get("prompt"))


def compare(rows_a, rows_b, key="grade", clusters=CLUSTERS, num_resamples=2000, seed=0):
    """Win rates of A against B: overall, by language, by cluster (the languages shared by all clusters apart, so that counts add up).

    key: "grade" for the oracle's verdict, "score" for a reward model's; the caller says which, so that neither is taken for the other.
    """
    pairs = join(rows_a, rows_b)
    for row in (row for pair in pairs for row in pair):
        if key not in row:
            raise ValueError(f"question {row['question_id']!r} ({row['language']}) has no {key!r}: judge both sides' answers before comparing")

    def rates(part):
        return win_rates([a[key] for a, _ in part], [b[key] for _, b in part],
                         [str(a["question_id"]) for a, _ in part], num_resamples, seed)

    def by(name_of):
        return {name: rates(part) for name, part in group(pairs, lambda pair: name_of(pair[0]["language"])).items()}

    home = home_clusters(clusters)
    return {"overall": rates(pairs), "by_language": by(str),
            "by_cluster": by(lambda code: home.get(home_language(code, home), "other"))}


def read_answers(path, judge, reading=None):
    """The rows of a JSONL file, each with what the judge reads, without the verdicts of an earlier judge."""
    return [checked(where, row, judge) for where, row in read_jsonl(path, reading)]


def checked(where, row, judge):
    """An answer as the judge reads it: "question_id" is a text, "language" is there, "prompt_where" says
    where the row stands."""
    row = {key: value for key, value in row.items() if key not in VERDICT} | {"prompt_where": where}
    row["language"] = row.get("language") or "other"
    if not isinstance(row.get("completion"), str):
        raise ValueError(f"{where}: 'completion' is missing or no text; give the answer, or name its key "
                         "with --columns completion=...")
    row["finish_reason"] = finish_reason(row, where)
    if judge == "oracle":
        missing = [key for key in ("task", "args") if row.get(key) is None]
        if missing:
            raise ValueError(f"{where}: {missing[0]!r} is missing; --judge oracle grades the embedded "
                             "world's questions only, judge others with a reward model")
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
    """The name of a row's question, as text: its "question_id", else its "id", else its prompt."""
    name = next((row[key] for key in ("question_id", "id") if row.get(key) is not None), None)
    if name is None and asked(row) is not None:
        return dumps(asked(row))
    if type(name) not in (str, int, float):
        raise ValueError(f"{where}: 'question_id' must be a text or a number, got {name!r}")
    return str(name)


def check_texts(rows, folder, reading):
    """Refuse, before the judge's weights are read, what it cannot score: texts beyond its positions, and
    control tokens in them."""
    if read_config(folder)[1] is not RewardModel:
        raise ValueError(f"--judge {folder}: a language model, not a reward model; give 'oracle' or a folder "
                         "that the reward stage wrote")
    model, tokenizer, _ = load_meta(folder)
    room = model.config.max_position_embeddings
    for row in rows:
        texts = [message["content"] for message in row["prompt_messages"]] + [row["completion"]]
        name = next(filter(None, map(tokenizer.spelled, texts)), None)
        if name and not reading.allow_control_tokens:
            raise ValueError(f"{place(row)}a text spells the control token {name}; give the text without the "
                             "template, or take it as letters with --allow-control-tokens")
        size = sum(map(len, judged_ids(tokenizer, row)))
        if size > room and reading.too_long == "refuse":
            raise ValueError(f"{place(row)}question and answer have {size} tokens, the judge {room} "
                             "positions; leave such answers unjudged with --too-long skip, or drop their "
                             "oldest tokens with --too-long cut-left")


def table(result):
    """The terminal's table of a comparison: overall, clusters, languages."""
    judge, a, b = result["judge"], result["answers"], result["baseline"]
    lines = [f"{a['path']} against {b['path']}, judged by the {judge}"]
    if judge != "oracle":
        lines.append("A reward model's taste is not correctness: never judge a model by the reward model that trained it.")
    lines += [f"{label:16}{a[name]:9.2f} against {b[name]:.2f}" for name, label in
              (("grade", "mean grade 0-3"), ("right_language", "right language"), ("length", "characters"))
              if name in a and name in b]
    cut = "cut" in a or "cut" in b              # "3/0": so many answers of each side were cut at their limit
    lines.append(f"{'':32}{'win rate':>9}{'95% interval':>16}{'win':>7}{'tie':>7}{'loss':>7}{'unjudged':>10}"
                 f"{'cut' if cut else '':>10}")
    for name, r in [("overall", result["overall"]), *result["by_cluster"].items(), *result["by_language"].items()]:
        shown = f"{r['win_rate']:9.1f}{'[{:.1f}, {:.1f}]'.format(*r['ci95']):>16}" if r["num"] else f"{'-':>9}{'-':>16}"
        title = f"{name:8}{LANGUAGES[name].name}" if name in LANGUAGES else name
        sides = [side if r is result["overall"] else side.get("by_language", {}).get(name) for side in (a, b)]
        both = "/".join(str(side.get("cut", "-")) for side in sides) if cut and all(sides) else ""
        lines.append(f"{title:32}{shown}{r['win']:7}{r['tie']:7}{r['loss']:7}{r['unjudged']:10}{both:>10}")
    return printable("\n".join(line.rstrip() for line in lines))


def check_out(path):
    """Refuse an output that exists, dangling links too, or that cannot be written, before any work."""
    if os.path.lexists(path):
        raise ValueError(f"{path} exists: remove it, or name another --out")
    above = next(folder for folder in Path(path).absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK):
        fault = "a folder that you cannot write to" if above.is_dir() else "no folder"
        raise ValueError(f"{path}: {above} is {fault}; name another --out")


def arena(answers, baseline, judge, out, reading):
    """Compares two files of answers, writes eval.json, prints the table."""
    check_out(out)
    sides = [read_answers(path, judge, reading) for path in (answers, baseline)]
    join(*sides)  # what does not match is refused before any model is loaded
    if judge == "oracle":
        sides, key, title = [grade_answers(rows) for rows in sides], "grade", "oracle"
    else:
        check_texts(sum(sides, []), judge, reading)
        model, tokenizer = load(judge, device="cuda" if torch.cuda.is_available() else "cpu")
        sides = score_answers(model, tokenizer, sides, f"--judge {judge}", reading.too_long)
        key, title = "score", f"reward model: {Path(judge).resolve().name}"
    summaries = [{"path": str(path)} | summarize(rows) for path, rows in zip((answers, baseline), sides)]
    result = {"judge": title, "answers": summaries[0], "baseline": summaries[1]} | compare(*sides, key=key)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_new({out: json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"})
    print(table(result), printable(f"written: {out}"), sep="\n")


def main(argv=None):
    parser = Parser(prog="aya_min.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["arena"])
    parser.add_argument("--answers", required=True, help="JSONL of the model's answers")
    parser.add_argument("--baseline", required=True, help="JSONL of the answers to compare with")
    parser.add_argument("--judge", required=True, help="'oracle' (the embedded world's), or a reward model's folder")
    parser.add_argument("--out", required=True, help="where to write the figures, as JSON")
    add_flags(parser, Reading, only=("columns", "too_long", "allow_control_tokens"))
    args = parser.parse_args(argv)
    if not is_spare_rank():
        arena(args.answers, args.baseline, args.judge, args.out, settings_from(Reading, flags=vars(args)))


if __name__ == "__main__":
    guarded(main, "aya_min.evaluate")
