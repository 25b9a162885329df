"""Win rates with intervals, mean grades, right languages, out of rows that a judge has graded.

A tie is half a win; wins, ties and losses are counted apart. The interval resamples questions: the same
question in 23 languages is one draw, not 23. A bootstrap over rows, as in Arena-Hard, is several times too
narrow (Miller, arXiv 2411.00640, finds clustered standard errors of more than three times the naive ones).
"""

from collections import defaultdict
from functools import lru_cache

import numpy as np

from .languages import CLUSTERS, home_clusters, home_language
from .rows import is_cut


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


def rank_correlation(xs, ys, num_resamples=2000, seed=0):
    """(Spearman's rank correlation of xs and ys (N,), its 95% interval [lo, hi]): the bootstrap resamples the
    pairs. It is 0 where all values of one are equal."""
    drawn = np.random.default_rng(seed).integers(len(xs), size=(num_resamples, len(xs)))

    def ranks(values):                          # (R, N) -> their ranks about 0, equal ones share theirs
        above = values[:, :, None] > values[:, None, :]                                     # (R, N, N)
        return (above.sum(2) - above.sum(1)) / 2

    def rho(some):                              # (R, N) places -> (R,)
        x, y = (ranks(np.asarray(values)[some]) for values in (xs, ys))
        norm = np.sqrt((x ** 2).sum(1) * (y ** 2).sum(1))
        return (x * y).sum(1) / np.where(norm == 0, 1, norm)
    low, high = np.quantile(rho(drawn), [0.025, 0.975])
    return float(rho(np.arange(len(xs))[None])[0]), [float(low), float(high)]


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


def join(rows_a, rows_b, sides=("answers", "baseline")):
    """[(a, b), ...] in A's order: the two answers to each question in each language. sides: what messages
    call them.

    ValueError if a side answers a question twice or not at all, or if the two prompts differ.
    """
    a, b = map(by_question, (rows_a, rows_b), sides)
    for key in [*a, *b]:
        question = f"{prefix_of(a.get(key) or b[key])}question {key[0]!r} ({key[1]})"
        remedy = "generate both files from the same prompts"
        if key not in a or key not in b:
            raise ValueError(f"{question} has no row in the {sides[key in a]}: {remedy}")
        if asked(a[key]) != asked(b[key]):
            raise ValueError(f"{question} has another prompt in the {sides[1]}: {remedy}")
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

    return {"overall": rates(pairs), **by_cluster_and_language(pairs, lambda pair: pair[0]["language"], rates,
                                                               clusters)}


def by_cluster_and_language(items, language_of, figures, clusters=CLUSTERS):
    """{"by_language": {code: figures(its items)}, "by_cluster": ...}; languages of no cluster are "other"."""
    home = home_clusters(clusters)

    def by(name_of):
        parts = group(items, lambda item: name_of(language_of(item)))
        return {name: figures(part) for name, part in parts.items()}

    def cluster_of(code):
        return home.get(home_language(code, home), "other")
    return {"by_language": by(str), "by_cluster": by(cluster_of)}
