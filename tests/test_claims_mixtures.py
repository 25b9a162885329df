"""The claims on mixtures: the data of each arm, choices worked by hand, a tiny run."""

from types import SimpleNamespace

import pytest
from small import CPU

from aya_min import experiments
from aya_min.claims import mixtures
from aya_min.experiments import measured
from aya_min.experiments_records import run_claims
from aya_min.languages import LANGUAGES
from aya_min.world_oracle import grade, naturalness

LAB = SimpleNamespace(seed=0, module=mixtures, recipe=SimpleNamespace(
    corpus=2400, level="tiny", eval_split="validation", eval_count=96, batch_size=32))


def test_the_languages_of_a_narrower_model_are_among_those_of_a_broader_one():
    eight, sixteen, everything = (set(mixtures.LANGUAGES_OF[count]) for count in (8, 16, len(LANGUAGES)))
    assert len(eight) == 8 and len(sixteen) == 16 and eight < sixteen < everything == set(LANGUAGES)


def test_rows_of_people_repeat_and_are_right_in_a_proper_sentence():
    rows = mixtures.source(LAB, "human", 80)
    assert len(rows) == 80 and len({str(row) for row in rows}) <= 10
    assert {grade(row, row["completion"]).grade for row in rows} == {3}


def test_rows_of_templates_are_right_and_bare():
    rows = mixtures.source(LAB, "template", 96)
    assert {grade(row, row["completion"]).grade for row in rows} == {2}


def test_translated_rows_are_right_apart_from_their_marks_and_often_marked():
    rows = mixtures.source(LAB, "translation", 96)
    apart = [mixtures.MEASURES["apart"]({**row}) for row in rows]
    marked = [naturalness(row, row["completion"])[0] is False for row in rows]
    assert min(apart) >= 2 and sum(marked) > 48


def test_each_weighting_has_all_sources_and_the_same_number_of_rows(monkeypatch):
    drawn = {}
    monkeypatch.setattr(mixtures, "right_rows", lambda lab, codes: [])
    monkeypatch.setattr(mixtures, "source", lambda lab, name, count: [name] * count)
    lab = SimpleNamespace(**vars(LAB), untrained=lambda texts, vocabulary: None)
    for heavy in mixtures.SOURCES:
        monkeypatch.setattr(mixtures, "trained", lambda lab, name, start, rows: rows)
        rows = mixtures.weighted(heavy)(lab)
        drawn[heavy] = {name: rows.count(name) for name in mixtures.SOURCES}
    assert drawn["human"] == {"human": 180, "template": 60, "translation": 60}
    assert drawn["translation"] == {"human": 60, "template": 60, "translation": 180}


def test_a_choice_is_right_where_the_right_answer_is_likelier(monkeypatch):
    """The model likes the right answers of the first third of the questions, and those of the other weighting
    half of them: the difference is a sixth less."""
    def losses(model, rows):
        right = [grade(row, row["completion"]).grade == 2 for row in rows]
        share = {"template": 1 / 3, "human": 1 / 2}[model]
        likes = [i < share * len(rows) for i in range(len(rows))]
        return [1.0 if ok == like else 2.0 for ok, like in zip(right, likes)]
    lab = SimpleNamespace(**vars(LAB), losses=losses, arm=lambda name: name.removesuffix("-heavy"))
    found = measured(lab, mixtures.more_choices("template", "human"))
    assert found["value"] == pytest.approx(1 / 3 - 1 / 2)


@pytest.mark.long
def test_the_claims_run_whole_in_miniature(tmp_path, monkeypatch):
    small = {**experiments.RECIPES["smoke"], "corpus": 960, "eval_count": 48}
    monkeypatch.setitem(experiments.RECIPES, "smoke", small)
    record = run_claims("mixtures", (0,), "smoke", tmp_path / "out", CPU)
    names = [claim["name"] for claim in record["results"]]
    assert {claim.name for claim in mixtures.CLAIMS if not claim.skipped} == set(names)
    picture = record["results"][0]["pictures"][0]
    assert len(picture["rows"]) == 8 and all(len(cells) == 3 for _, cells in picture["rows"])
