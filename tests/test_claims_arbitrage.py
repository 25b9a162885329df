"""The data of the claims on arbitrage: pools of graded diversity, the router's share of the gain, rows that a
translator wrote. A stand-in answers, so that no model is trained."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from small import tokenizer

from aya_min import world_data
from aya_min.claims import arbitrage
from aya_min.config import RECIPES, Recipe
from aya_min.languages import CLUSTERS
from aya_min.world import gold_answer, questions

REWARDS = [(4.0, 0.0, 0.0, 0.0), (0.0, 2.0, 1.0, 1.0)]
ASKED = ["west-europe", "west-asia"]        # what the router of the stand-in chooses


class StandIn(SimpleNamespace):
    """A lab whose teachers answer rightly; training returns the rows that it was given."""

    def __init__(self):
        smoke = replace(Recipe(), **RECIPES["smoke"])
        super().__init__(recipe=smoke, seed=0, base="base", tokenizer=tokenizer(), device="cpu",
                         run=SimpleNamespace(clusters=CLUSTERS), teachers={name: name for name in CLUSTERS})
        rows = [q for q in questions("train", 480, 0, level="tiny") if q["language"] == "en"][:2]
        self.candidates = [{**q, "candidates": [
            {"teacher": name, "completion": gold_answer(q), "reward": reward, "finish_reason": "stop"}
            for name, reward in zip(CLUSTERS, rewards)]} for q, rewards in zip(rows, REWARDS)]

    def questions(self, split, count, tag):
        return questions(split, count, tag, level="tiny")[:8]

    def sample(self, name, model, rows, num_samples, temperature, seed=0):
        return [[{"completion": gold_answer(row), "finish_reason": "stop"}] for row in rows]

    def scores(self, name, rows):
        return [1.0] * len(rows)

    def train(self, name, stage, start, rows, **settings):
        return rows, settings

    def name_of(self, folder):
        return "folder"

    def step(self, name, make, *content):
        return {"teachers": ASKED}


def test_the_pools_have_the_same_lessons_dealt_out_in_another_way():
    lab, own = StandIn(), {name: world_data.lessons(CLUSTERS, name, 192, 0, "tiny") for name in CLUSTERS}
    key = lambda row: (row["question_id"], row["language"], row["completion"])
    of_own = Counter(key(row) for rows in own.values() for row in rows)
    shares = {}
    for kind in ("half", "alike"):
        dealt = arbitrage.lessons_of(lab, kind)
        assert {len(rows) for rows in dealt.values()} <= {len(rows) for rows in own.values()}
        assert Counter(key(row) for rows in dealt.values() for row in rows) == of_own
        home = [sum(row["language"] in CLUSTERS[name] for row in rows) / len(rows)
                for name, rows in dealt.items()]
        shares[kind] = sum(home) / len(home)
    assert 0.2 < shares["alike"] < 0.3 < shares["half"] < 0.5 and arbitrage.lessons_of(lab, "half") == (
        arbitrage.lessons_of(lab, "half"))


def test_what_the_router_keeps_of_the_gain_by_hand():
    """Prompt 1: it takes the best, 4 over a mean of 1, 1.5 above half of the gain. Prompt 2: it takes a 1 at
    a mean of 1, and half of the gain is .5."""
    lab = StandIn()
    assert [kept for _, kept in arbitrage.kept_of_gain(lab)] == [1.5, -0.5]
    assert [share for _, share in arbitrage.cost(lab)] == pytest.approx([0.25, 0.25])
    rows, _ = arbitrage.ARMS["learned"](lab)
    assert [row["teacher"] for row in rows] == ASKED


@pytest.mark.parametrize("name", [name for name in arbitrage.ARMS if name != "translated"])
def test_every_arm_takes_the_same_steps_from_an_answer_to_each_prompt(name):
    rows, settings = arbitrage.ARMS[name](StandIn())
    assert len(rows) == 2 and all(row["completion"] for row in rows)
    r = StandIn().recipe
    assert settings == {"learning_rate": r.sft_learning_rate,
                        "max_steps": round(r.sft_epochs * r.num_prompts / r.batch_size)}


def test_english_prompts_keep_the_english_answer_in_the_translation_arm():
    rows, settings = arbitrage.ARMS["translated"](StandIn())
    assert [row["completion"] for row in rows] == [gold_answer(q) for q in StandIn().candidates]
    assert {row["teacher"] for row in rows} == {"west-europe"}
