"""The claims on choosing what to train on: the data, the steps to a loss worked by hand, a tiny run."""

from types import SimpleNamespace

import numpy as np
import pytest
from small import CPU

from aya_min.claims import selection
from aya_min.config import RECIPES, Recipe, settings_from
from aya_min.experiments import Comparison
from aya_min.experiments_records import run_claims
from aya_min.files import write_jsonl
from aya_min.world_oracle import grade

LAB = SimpleNamespace(seed=3, recipe=settings_from(Recipe, RECIPES["smoke"] | {"corpus": 16000}))


# ---- data --------------------------------------------------------------------------------------------------

def test_a_tenth_of_the_answers_is_wrong_and_says_so():
    rows = selection.data_of(LAB, "noise")
    assert [row["noisy"] for row in rows] == [grade(row, row["completion"]).grade < 3 for row in rows]
    assert 0.06 < np.mean([row["noisy"] for row in rows]) < 0.14


def test_half_of_the_questions_stand_five_times_in_the_redundant_data_and_the_others_once():
    rows, plain = selection.data_of(LAB, "redundancy"), selection.half(LAB, 0)
    size = len(plain) // 6
    assert len(rows) == len(plain) == 6 * size + len(plain) % 6
    assert rows[:5 * size] == plain[:size] * 5 and rows[5 * size:6 * size] == plain[size:2 * size]


def test_data_and_hold_out_are_halves_of_one_draw_and_no_held_out_question_is_in_either():
    ours, theirs = selection.half(LAB, 0), selection.half(LAB, 1)
    assert len(ours) == len(theirs) == selection.num_steps(LAB) * selection.BATCH
    for rows in (ours, theirs):         # all tasks and languages in each
        assert len({row["task"] for row in rows}) == 5
        assert len({row["language"] for row in rows}) == len(selection.CODES)
    asked = {row["question_id"] for which in selection.HELD_OUT.values() for row in which(LAB)}
    assert asked and not asked & {row["question_id"] for row in ours + theirs}


def test_the_unknown_hold_out_has_no_question_of_the_data():
    data = {row["question_id"] for row in selection.data_of(LAB, "noise")}
    assert not data & {row["question_id"] for row in selection.hold_out(LAB, "unknown")}
    assert data & {row["question_id"] for row in selection.hold_out(LAB, "noise")}


# ---- figures -----------------------------------------------------------------------------------------------

def test_the_cost_to_a_loss_is_read_off_the_line_between_two_checkpoints():
    losses, costs = np.array([4.0, 3.0, 1.0, 2.0]), np.array([10.0, 20.0, 30.0, 40.0])
    assert selection.reach(losses, costs, 2.0) == 25.0
    assert selection.reach(losses, costs, 3.5) == 15.0
    assert selection.reach(losses, costs, 4.0) == selection.reach(losses, costs, 5.0) == 10.0
    assert selection.reach(losses, costs, 1.0) == 30.0
    assert selection.reach(losses, costs, 0.9) == 80.0              # never: NEVER times its own


@pytest.fixture
def lab(monkeypatch):
    """Two questions. Arm a has the loss of b's last step, 1, halfway between its checkpoints 1 and 2, after
    15 of 80 steps; its steps cost twice as much."""
    curves = {"a": [1.5, 0.5] + [0.5] * 6, "b": [3.0] * 7 + [1.0]}
    steps = np.arange(10.0, 90.0, 10.0)
    monkeypatch.setattr(selection, "curve", lambda lab, arm, rows: (
        np.array(curves[arm])[:, None].repeat(2, 1),
        {"steps": steps, "seconds": steps * (2 if arm == "a" else 1)}))
    monkeypatch.setitem(selection.HELD_OUT, "rule", lambda lab: [{}, {}])
    return SimpleNamespace(seed=1)


@pytest.mark.parametrize("cost, share", [("steps", 15 / 80), ("seconds", 30 / 80)])
def test_steps_and_seconds_are_shares_of_the_others(cost, share, lab):
    found = selection.sooner("a", "b", "rule", cost).of(lab)
    assert found["value"] == pytest.approx(share) and found["ci95"] == pytest.approx([share, share])
    assert selection.sooner("b", "b", "rule", cost).of(lab)["value"] == 1.0
    assert selection.sooner("b", "a", "rule", cost).of(lab)["value"] == {"steps": 2.0, "seconds": 1.0}[cost]


def test_seconds_are_counted_in_steps_without_scoring_whatever_slows_an_arm_down(tmp_path):
    """A step of 0.1 s trains 0.04 s; later ones take three times as long."""
    rows = [{"loss": 1.0, "seconds": 0.1 * slow, "scoring_seconds": 0.06 * slow}
            for slow in [1] * 8 + [3] * 8]
    lab = SimpleNamespace(recipe=SimpleNamespace(corpus=9600), arm=lambda name: tmp_path / "model",
                          metrics=lambda arm: [{"eval/loss": 1.0}, *rows], losses=lambda model, rows: [1.0])
    losses, costs = selection.curve(lab, "an arm", [{}])
    assert losses.shape == (8, 1) and costs["seconds"] == pytest.approx(2.5 * costs["steps"])
    assert costs["steps"].tolist() == [selection.num_steps(lab) // 8 * n for n in range(1, 9)]


def test_what_an_arm_chose_is_read_from_its_file_by_the_lines_of_its_rows(monkeypatch, tmp_path):
    rows = [{"question_id": str(i), "noisy": i == 1} for i in range(3)]
    monkeypatch.setattr(selection, "data_of", lambda lab, which: rows)
    write_jsonl(tmp_path / "selected.jsonl", [{"of": 3}, {"step": 0, "where": ["a/b.jsonl:2", "a/b.jsonl:3"]},
                                              {"step": 1, "where": ["a/b.jsonl:2", "a/b.jsonl:1"]}])
    lab = SimpleNamespace(arm=lambda name: tmp_path / "model")
    figure = selection.noise_share("an arm", "below")
    assert figure.of(lab) == [("1", 1.0), ("2", 0.0), ("1", 1.0), ("0", 0.0)] and figure.bound == 0.1


def test_every_claim_compares_arms_and_sets_that_are_there():
    for claim in selection.CLAIMS:
        assert set(claim.arms) <= selection.ARMS.keys() and claim.comparisons
        assert all(c.held_out in selection.HELD_OUT for c in claim.comparisons if isinstance(c, Comparison))


@pytest.mark.long
def test_a_tiny_run_tries_every_claim(tmp_path):
    record = run_claims("selection", (0,), "smoke", tmp_path, CPU, {"corpus": 400, "eval_count": 40})
    assert [claim["name"] for claim in record["results"]] == [claim.name for claim in selection.CLAIMS]
    assert record["arms"]["0"].keys() <= selection.ARMS.keys()
