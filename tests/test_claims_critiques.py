"""The claim on critiques: what each critic says, worked by hand, the rule of what a pair is worth, and the
whole way to figures and picture, with few steps of a small model."""

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from small import CPU

from aya_min.claims import critiques as claims
from aya_min.experiments import Lab, measured
from aya_min.world import gold_answer, make_question

LARGEST = make_question("largest", ["two", "nine", "five"], "de")
SORTED = make_question("opposite", ["big", "hot"], "en")


def test_the_oracles_critique_by_hand():
    rng = random.Random(0)
    said = [claims.programmed("oracle", rng, q, text) for q, text in [
        (LARGEST, gold_answer(LARGEST)), (LARGEST, "neun"), (LARGEST, "Die größte Zahl ist fünf."),
        (LARGEST, "The largest number is nine."), (SORTED, "hot, cold")]]
    assert said[:2] == ["It is right.", "It is right, but no sentence."]
    assert said[2] == "It is wrong: neun." and said[3] == "It is in a wrong language."
    assert said[4] == "It is wrong: small, cold."


def test_the_wrong_critic_is_never_right_the_noisy_one_as_often_as_it_says_and_the_random_one_a_quarter():
    rng, right = random.Random(0), "It is right."
    told = {by: Counter(claims.programmed(by, rng, LARGEST, gold_answer(LARGEST)) for _ in range(3000))
            for by in ("wrong", "noisy", "random")}
    assert len(told["random"]) == 4 and all(abs(n / 3000 - 1 / 4) < 0.04 for n in told["random"].values())
    assert right not in told["wrong"] and len(told["wrong"]) == 3
    assert all(abs(n / 3000 - 1 / 3) < 0.04 for n in told["wrong"].values())
    assert abs(told["noisy"][right] / 3000 - (1 - claims.NOISE)) < 0.03


def test_plain_pairs_by_hand(monkeypatch):
    monkeypatch.setattr(claims, "SIZES", (10, 100, 1000))
    curve = np.array([0.5, 0.6, 0.8])
    for accuracy, pairs in ((0.6, 100), (0.7, 100 * 10 ** 0.5), (0.4, 10), (0.9, 1000), (0.55, 10 ** 1.5)):
        assert claims.plain_pairs(curve, accuracy) == pytest.approx(pairs, rel=1e-3), accuracy
    dip = np.array([0.6, 0.5, 0.8])                     # the highest accuracy so far counts
    assert claims.plain_pairs(dip, 0.7) == pytest.approx(100 * 10 ** 0.5, rel=1e-3)


def test_what_a_pair_is_worth_by_hand(monkeypatch):
    """Four plain sizes answer 1, 2, 2 and 4 of four pairs; critiques at 15 pairs answer 3: halfway, on the
    logarithm, between 500 and 960 plain pairs."""
    right = {("none", size): np.arange(4) < n for size, n in zip(claims.SIZES, (1, 1, 2, 2, 2, 4))}
    right[("oracle", 15)] = np.arange(4) < 3
    monkeypatch.setattr(claims, "right", lambda lab, by, size: right[by, size].astype(float))
    monkeypatch.setattr(claims, "ids", lambda lab: list("abcd"))
    found = claims.worth("oracle", 15).of(SimpleNamespace(), resamples=50)
    assert found["value"] == pytest.approx((500 * 960) ** 0.5 / 15, rel=1e-3) and found["num"] == 4
    low, high = found["ci95"]
    assert 1 <= low <= found["value"] <= high <= 64


def test_the_critics_verdicts_are_counted_where_one_answer_is_right_and_the_other_wrong(monkeypatch):
    """Both verdicts hold, one of two, none; a pair of two right answers is left out."""
    right, wrong = claims.SENTENCES[3], claims.SENTENCES[1].format(right="six")
    grades = {"six!": 3, "two!": 1, "eight!": 1}
    monkeypatch.setattr(claims, "grade", lambda row, text: SimpleNamespace(grade=grades[text]))
    keys = "question_id", "chosen", "rejected", "chosen_critique", "rejected_critique"
    rows = [dict(zip(keys, row)) for row in (
        ("a", "six!", "two!", right, wrong), ("b", "six!", "eight!", right, right),
        ("c", "two!", "six!", right, wrong), ("d", "six!", "six!", right, right))]
    monkeypatch.setattr(claims, "with_critiques", lambda lab, name, by: rows)
    assert claims.tells(None) == [("a", 1.0), ("b", 0.5), ("c", 0.0)]


@pytest.mark.long
def test_the_claim_runs_to_its_figures_and_picture(tmp_path, monkeypatch):
    for name, value in {"STEPS": 2, "HELD_OUT": 48}.items():
        monkeypatch.setattr(claims, name, value)
    lab = Lab(tmp_path, "smoke", 0, CPU, claims)
    for claim in claims.CLAIMS:
        for comparison in claim.comparisons:
            found = measured(lab, comparison)
            assert found["ci95"][0] <= found["value"] <= found["ci95"][1]
            assert 0 < found["num"] <= 48 and (found["num"] == 48 or claim.name == "critiques-critic")
    pairs, told = claims.pairs_of(lab, "train"), claims.with_critiques(lab, "train", "trained")
    assert [{key: row[key] for key in plain} for row, plain in zip(told, pairs)] == pairs
    held_out = {row["question_id"] for row in claims.pairs_of(lab, "held-out")}
    assert not held_out & {row["question_id"] for row in pairs}
    drawn = claims.picture(lab)
    assert len(drawn["columns"]) == 6 and len(drawn["rows"]) == 8
    assert [cell is not None for cell, _ in drawn["rows"][-1][1]] == [False, True] * 3
