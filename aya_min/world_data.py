"""Rows of training data made from the embedded world (world.py), in place of the report's private data.

The base trains on a noisy corpus, the teachers on lessons of uneven quality, the reward model on graded
preference pairs. Every function takes a seed. A mix holds the weights of an answer's quality: (right in a
sentence, right but bare, wrong, in a foreign language).
"""

import random

from .languages import LANGUAGES, SHARED, cluster_languages
from .world import answer, gold_answer, questions, text_line
from .world_oracle import grade

CORPUS_MIX = (20, 66, 8, 6)         # mostly right but bare, which leaves room for post-training
HOME_MIX = (30, 60, 10, 0)          # a teacher's lessons in its cluster's languages and the shared ones
AWAY_MIX = (15, 50, 25, 10)         # its lessons in all other languages


def corpus(count, seed, level):
    """`count` rows for pretraining: one in twenty is a {"text"}, the rest are answered questions."""
    rng, languages = random.Random(f"corpus/{seed}"), list(LANGUAGES)
    codes = [languages[i % len(languages)] for i in range(count // 20)]
    lines = [{"text": text_line(rng, code, level), "language": code} for code in codes]
    asked = questions("train", count - len(lines), seed, level=level)
    return lines + [{**q, "completion": answer(rng, q, CORPUS_MIX)[0]} for q in asked]


def lessons(clusters, name, count, seed, level):
    """`count` rows for the teacher of the cluster `name`: 60% in its languages, 20% in the shared ones, and
    20% in all others, where the answers are of poorer quality."""
    rng, own = random.Random(f"lessons/{name}/{seed}"), clusters[name]
    away = [code for code in LANGUAGES if code not in cluster_languages(clusters, name)]
    rows = []
    for codes, share, mix in ((own, 0.6, HOME_MIX), (SHARED, 0.2, HOME_MIX), (away, 0.2, AWAY_MIX)):
        # If a cluster holds all languages, no language is left for the last share.
        num = int(count * share) if codes else 0
        for q in questions("train", num, f"{name}/{seed}", tuple(codes), level):
            rows.append({**q, "completion": answer(rng, q, mix)[0]})
    return rows


def gold(count, seed, level):
    """`count` questions with their right answers in proper sentences."""
    asked = questions("train", count, f"gold/{seed}", level=level)
    return [{**q, "completion": gold_answer(q)} for q in asked]


def graded_pairs(question_rows, sampled, seed, flip=0.05):
    """Preference pairs labelled by the oracle, at most one per question.

    A share `flip` of the labels is wrong, as labels by people are.
    sampled: for each question a list of teachers' answers, or None. With samples, half of the pairs hold two
    teachers' answers, because the arbiter will judge such. Most of the rest hold a right and a wrong answer
    in the same style (a sentence, or bare), so that the style alone does not decide.
    A row's "kind" names the grades of its pair, for example "3 vs 1".
    """
    rng, rows = random.Random(f"pairs/{seed}"), []
    for q, samples in zip(question_rows, sampled):
        u, gold_pair = rng.random(), (gold_answer(q), 3)
        if samples and u < 0.5:
            first, second = ((text, grade(q, text).grade) for text in rng.sample(samples, 2))
        elif u < 0.70:
            first, second = gold_pair, answer(rng, q, (0, 0, 1, 0))
        elif u < 0.83:
            first, second = answer(rng, q, (0, 1, 0, 0)), answer(rng, q, (0, 0, 1, 0))
        else:
            first, second = gold_pair, answer(rng, q, (0, 2, 0, 1))
        if first[1] == second[1] or not first[0].strip() or not second[0].strip():
            continue
        best, worst = sorted((first, second), key=lambda side: -side[1])
        kind = f"{best[1]} vs {worst[1]}"
        if rng.random() < flip:
            best, worst = worst, best
        rows.append({**q, "chosen": best[0], "rejected": worst[0], "kind": kind})
    return rows
