"""Figures out of the verdicts of judges.py: win rates and the bounds that unjudged games leave, the same with
length and style held equal, what the judge is worth, and arena-hard-auto's own figures for comparison.

A question counts as judged if both its games are, as one order alone would carry the judge's love of a
position. Its value is the mean of its two games.

The control follows arena-hard-auto (commit 196f6b8, show_result.py): a logistic regression of the outcome on
who answers, and on differences in length and in the density of headers, lists and bold text. The differences
are divided by their standard deviation. That code also subtracts their mean: the rate of a single model is
then the one at the mean difference, where nothing is controlled; ours is at no difference. Its other slips
that we do not follow: with one feature alone it drops the wrong column, a feature that never varies ends it,
a second category finds no battles, and its resamples take the three copies of a ">>" for three questions.
We count characters instead of tokens: relative differences in length are nearly the same.
"""

import re
from collections import Counter

import numpy as np

from .evaluate_rates import bootstrap_mean, by_cluster_and_language, draws
from .judges import MARKS, used, why_unjudged
from .languages import CLUSTERS

PENALTY = 0.1           # of each squared coefficient, halved; keeps a judge of length alone finite
RESAMPLES = 1000        # of the regressions
LEAST = 10              # games from which on a judge is named for what it does
NEARLY_ALWAYS = 95.0    # percent
FEATURES = ("length", "headers", "lists", "bold")


# ---- win rates ---------------------------------------------------------------------------------------------

def is_judged(verdict):
    return all(game["label"] for game in verdict["games"])


def value_of(verdict):
    """A judged question's value in [0, 1]: the mean score of the answers in its two games."""
    return sum(game["score"] for game in verdict["games"]) / 2


def bounds(verdicts):
    """The win rates in percent if the answers lost, or won, all games that are unjudged."""
    games = [game for v in verdicts for game in v["games"]]
    known = sum(game["score"] for game in games if game["label"])
    unjudged = sum(game["label"] is None for game in games)
    return [100 * known / len(games), 100 * (known + unjudged) / len(games)]


def ids_of(verdicts):
    return [v["a"]["question_id"] for v in verdicts]


def rates(verdicts, seed=0):
    """Win rate in percent with its 95% interval over questions, and counts.

    win, tie, loss: games, two a judged question. num, unjudged: questions. unjudged_games: by themselves.
    """
    judged = [v for v in verdicts if is_judged(v)]
    scores = Counter(game["score"] for v in judged for game in v["games"])
    rate, ci95 = None, [None, None]
    if judged:
        rate, ci95 = bootstrap_mean([100 * value_of(v) for v in judged], ids_of(judged), seed=seed)
    return {"win": scores[1.0], "tie": scores[0.5], "loss": scores[0.0], "num": len(judged),
            "unjudged": len(verdicts) - len(judged), "win_rate": rate, "ci95": ci95,
            "unjudged_games": sum(game["label"] is None for v in verdicts for game in v["games"]),
            "bounds": bounds(verdicts) if verdicts else [None, None]}


def battles(judged):
    """(scores, question ids) of all games, each as often as its label weighs; game 2 first, as there."""
    rows = [(game["score"], v["a"]["question_id"]) for v in judged for game in reversed(v["games"])
            for _ in range(game["weight"])]
    return [score for score, _ in rows], [name for _, name in rows]


def weighted(judged, seed=0):
    """The win rate whose games count as their labels weigh, with our interval over questions and with
    arena-hard-auto's: the 5th and 95th percentile of 100 samples of all battles."""
    if not judged:
        return {"win_rate": None, "ci95": [None, None], "arena_hard_ci90": [None, None]}
    scores, names = battles(judged)
    rate, ci95 = bootstrap_mean([100 * score for score in scores], names, seed=seed)
    drawn = np.random.default_rng(seed).integers(len(scores), size=(100, len(scores)))
    means = 100 * np.asarray(scores)[drawn].mean(axis=1)                            # (100,)
    return {"win_rate": rate, "ci95": ci95,
            "arena_hard_ci90": [float(end) for end in np.percentile(means, [5, 95])]}


# ---- the same, with length and style held equal ------------------------------------------------------------

def style_of(text):
    """(characters, headers, list items, bold texts) of an answer; markdown in blocks of code does not
    count."""
    plain = re.sub(r"```[^`]*```", "", text)
    counts = [r"^#{1,6}\s", r"^\s*(?:\d+\.|[-*+])\s", r"\*\*[^*\n]+\*\*|__[^_\n]+__"]
    return len(text), *(len(re.findall(pattern, plain, re.MULTILINE)) for pattern in counts)


def style_differences(verdicts):
    """(N, 4): each feature of the answers against the baseline's, in [-1, 1]."""
    a, b = (np.array([style_of(v[side]["completion"]) for v in verdicts], float) for side in "ab")
    lengths = (a[:, :1] - b[:, :1]) / np.maximum(a[:, :1] + b[:, :1], 1)
    a, b = a[:, 1:] / (a[:, :1] + 1), b[:, 1:] / (b[:, :1] + 1)                     # densities
    return np.concatenate([lengths, (a - b) / (a + b + 1)], axis=1)


def fit(features, wins, games, start=None):
    """Logistic regression by Newton's method with a small penalty: coefficients (B, P) of B data sets.

    features (N, P); wins, games (B, N): of `games` in row n, `wins` (a tie is a half) were won.
    """
    (num_sets, _), (_, size) = games.shape, features.shape
    coefs = np.zeros((num_sets, size)) if start is None else np.broadcast_to(start, (num_sets, size)).copy()
    squares = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)      # (N, P * P)
    for _ in range(100):
        chance = 1 / (1 + np.exp(-np.clip(coefs @ features.T, -500, 500)))                  # (B, N)
        gradient = (wins - games * chance) @ features - PENALTY * coefs                     # (B, P)
        curvature = (games * chance * (1 - chance)) @ squares                               # (B, P * P)
        curvature = curvature.reshape(num_sets, size, size) + PENALTY * np.eye(size)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        # Newton's step overshoots where chances are near 0 or 1
        step /= np.maximum(1, np.abs(step).max(axis=1, keepdims=True))
        coefs += step
        if np.abs(step).max() < 1e-9:
            break
    return coefs


def percent(logits):
    return 100 / (1 + np.exp(-logits))


def controlled(judged, names, seed=0):
    """The win rate with these FEATURES held equal, with its interval over questions: {"win_rate", "ci95",
    "coefficients" (a standard deviation's worth, in logits), "left_out" (features that never differ enough
    to be told from who answers)}; win_rate is None without judged questions."""
    if not judged:
        return {"win_rate": None, "ci95": [None, None], "coefficients": {}, "left_out": list(names)}
    found = style_differences(judged)[:, [FEATURES.index(name) for name in names]]
    spread = found.std(axis=0)
    kept = spread > 1e-9
    features = np.concatenate([np.ones((len(judged), 1)), found[:, kept] / spread[kept]], axis=1)
    values = np.array([value_of(v) for v in judged])                                # (N,)
    order = {}
    question = np.array([order.setdefault(name, len(order)) for name in ids_of(judged)])
    coefs = fit(features, values[None], np.ones((1, len(values))))[0]
    rates, piece = [], max(1, 1_000_000 // len(values))
    for start in range(0, RESAMPLES, piece):
        games = draws(len(order), min(piece, RESAMPLES - start), seed, start)[:, question]
        rates.append(percent(fit(features, games * values, games, coefs)[:, 0]))
    ci95 = [float(end) for end in np.percentile(np.concatenate(rates), [2.5, 97.5])]
    kept_names = [name for name, keep in zip(names, kept) if keep]
    return {"win_rate": float(percent(coefs[0])), "ci95": ci95,
            "coefficients": dict(zip(kept_names, map(float, coefs[1:]))),
            "left_out": [name for name in names if name not in kept_names]}


# ---- what the judge is worth -------------------------------------------------------------------------------

def share(values, names):
    """{"percent", "ci95" over questions, "num"} of truth values; percent is None without any."""
    if not values:
        return {"percent": None, "ci95": [None, None], "num": 0}
    rate, ci95 = bootstrap_mean([100.0 * value for value in values], names)
    return {"percent": rate, "ci95": ci95, "num": len(values)}


def about_judge(verdicts):
    """How the judge judges, over pairs of different answers: the share of decided games that the first answer
    wins (50: no love of a position), of questions whose two games agree, of games that are ties, of decided
    questions that the longer answer wins; and why games are unjudged."""
    different = [v for v in verdicts if v["a"]["completion"] != v["b"]["completion"]]
    judged = [v for v in different if is_judged(v)]
    games = [(v, game) for v in judged for game in v["games"]]
    decided = [(v, game) for v, game in games if game["score"] != 0.5]
    lengths = [(v, len(v["a"]["completion"]) - len(v["b"]["completion"])) for v in judged]
    longer = [(v, difference) for v, difference in lengths if difference and value_of(v) != 0.5]
    reasons = Counter(why_unjudged(game) for v in verdicts for game in v["games"] if not game["label"])
    return {
        "first_wins": share([game["label"] in ("A>>B", "A>B") for _, game in decided],
                            ids_of(v for v, _ in decided)),
        "agrees": share([v["games"][0]["score"] == v["games"][1]["score"] for v in judged], ids_of(judged)),
        "ties": share([game["score"] == 0.5 for _, game in games], ids_of(v for v, _ in games)),
        "longer_wins": share([(value_of(v) > 0.5) == (difference > 0) for v, difference in longer],
                             ids_of(v for v, _ in longer)),
        "games": 2 * len(verdicts), "equal_answers": len(verdicts) - len(different),
        "labels": dict(Counter(game["label"] for _, game in games).most_common()),
        "asked_again": sum(len(game["tries"]) > 1 for v in verdicts for game in v["games"]),
        "unjudged": dict(reasons.most_common()), **used(verdicts)}


def warnings(found, sides):
    """What must be said before the win rates are believed, in sentences. found: what `about_judge` gives;
    sides: {what a side is called: its texts}."""
    said, labels = [], found["labels"]
    num = sum(labels.values())
    if num >= LEAST and len(labels) == 1:
        said.append(f"the judge is constant: its verdict is {next(iter(labels))} in all {num} games between "
                    "different answers, so the win rate says nothing")
    for name, least, what in (("first_wins", 100 - NEARLY_ALWAYS, "by position: the first answer wins"),
                              ("longer_wins", None, "by length: the longer answer wins")):
        each = found[name]
        rate = each["percent"]
        extreme = rate is not None and (rate >= NEARLY_ALWAYS or least is not None and rate <= least)
        if each["num"] >= LEAST and extreme:
            said.append(f"the judge decides {what} {rate:.0f}% of {each['num']}")
    for name, texts in sides.items():
        if len(texts) >= LEAST and len(set(texts)) == 1:
            said.append(f"{name} are one and the same text to all {len(texts)} questions")
        if spelled := sum(bool(MARKS.search(text)) for text in texts):
            said.append(f"{spelled} of {name} hold a mark or a verdict of the judge's protocol, which may "
                        "move it")
    games = sum(found["unjudged"].values())
    if games:
        why = ", ".join(f"{reason} {n}" for reason, n in found["unjudged"].items())
        said.append(f"{games} of {found['games']} games are unjudged ({why}); none counts as lost")
    return said


def compared(verdicts, clusters=CLUSTERS, seed=0):
    """All figures of a comparison: rates overall, by language and by cluster, and the rest overall."""
    judged = [v for v in verdicts if is_judged(v)]
    about = about_judge(verdicts)
    parts = by_cluster_and_language(verdicts, lambda v: v["a"]["language"], lambda part: rates(part, seed),
                                    clusters)
    return {"overall": rates(verdicts, seed), **parts, "weighted": weighted(judged, seed),
            "length_controlled": controlled(judged, FEATURES[:1], seed),
            "style_controlled": controlled(judged, FEATURES, seed),
            "about_judge": about, "warnings": warnings(about, {
                name: [v[side]["completion"] for v in verdicts]
                for side, name in (("a", "the answers"), ("b", "the baseline"))})}
