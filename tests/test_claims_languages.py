"""The data of the claims on languages: mixtures of one total, and contrasts whose arms differ in the rejected
side alone. A stand-in answers the questions, so that no model is trained."""

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

from small import tokenizer

from aya_min.claims import languages
from aya_min.arbitrage import route
from aya_min.config import RECIPES, Recipe
from aya_min.experiments import Lab
from aya_min.world import _sentence, wrong_concepts, gold_answer, questions, say
from aya_min.world_oracle import grade, naturalness


class StandIn(SimpleNamespace):
    """A lab in which "weak" answers wrongly in a sentence and every other model rightly."""

    def __init__(self):
        smoke = replace(Recipe(), **RECIPES["smoke"])
        super().__init__(recipe=smoke, seed=0, sft="strong", base="base", arbiter="rm",
                         tokenizer=tokenizer(), teachers={"strong": "strong", "weak": "weak"}, trained={},
                         done={})
        self.candidates = [
            {**q, "candidates": [{"teacher": "strong", "completion": gold_answer(q), "reward": 1.0}]}
            for q in self.questions("train", 96, "candidates")]

    def questions(self, split, count, tag):
        return questions(split, count, tag, level="tiny")

    def sample(self, name, model, rows, num_samples, temperature, seed=0):
        rng = random.Random(name)

        def answered(row):
            if "weak" not in model or row["task"] == "translate":
                return gold_answer(row)
            return _sentence(row, say(row["language"], wrong_concepts(rng, row)))
        return [[{"completion": answered(row), "finish_reason": "stop"}] for row in rows]

    def scores(self, name, rows):
        return self.step(name, lambda _: [float(grade(row, row["completion"]).grade) for row in rows])

    def step(self, name, make):
        if name not in self.done:
            self.done[name] = make(None)
        return self.done[name]

    @property
    def best_answers(self):
        return route(self.candidates, "reward", 0)[0]

    batch_of = Lab.batch_of

    def train(self, name, stage, start, rows, **settings):
        self.trained[name] = rows
        return name


def test_mixtures_have_equally_many_pairs_in_their_languages():
    lab = StandIn()
    made = {name: languages.pairs(lab, name) for name in languages.MIXTURES}
    total = len(made["one"])
    assert total == len(made["five"]) == len(made["all"]) > 40
    assert {row["language"] for row in made["one"]} == {"en"}
    assert {row["language"] for row in made["five"]} == set(languages.FIVE)
    assert len(Counter(row["language"] for row in made["all"])) == 24 and len(made["large"]) > 2 * total
    languages.online("one")(lab)
    asked = lab.trained["languages-rloo-one"]
    assert [row["prompt"] for row in asked] == [row["prompt"] for row in made["one"]]
    assert "chosen" not in asked[0] and "rejected" not in asked[0]


def test_the_contrasts_differ_in_the_rejected_side_alone():
    lab = StandIn()
    for name in ("contrast", "in-language", "translated strong"):
        languages.contrasted(name)(lab)
    contrast, own, strong = (lab.trained[f"languages-{name}"]
                             for name in ("contrast", "in-language", "translated-strong"))
    assert len(contrast) > 40
    for a, b, c in zip(contrast, own, strong, strict=True):
        assert a["prompt"] == b["prompt"] == c["prompt"] and a["language"] != "en"
        assert a["chosen"] == b["chosen"] == c["chosen"] == gold_answer(a)
        assert [naturalness(row, row["rejected"])[0] for row in (a, b, c)] == [False, True, False]
    assert languages.MEASURES["apart"]({**strong[0], "completion": strong[0]["rejected"]}) == 3
    assert languages.MEASURES["apart"]({**contrast[0], "completion": contrast[0]["rejected"]}) == 1


def test_about_half_of_the_answers_that_the_marked_student_learns_are_translated():
    lab = StandIn()
    languages.marked(lab)
    rows = [row for row in lab.trained["languages-marked"] if row["language"] != "en"]
    share = sum(naturalness(row, row["completion"])[0] is False for row in rows) / len(rows)
    assert 0.3 < share < 0.7
