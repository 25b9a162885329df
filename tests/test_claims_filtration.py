"""The claims on filtration: the planted remarks, what the filter and the list remove, by hand; a tiny run."""

import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from small import CPU

from aya_min import experiments
from aya_min.claims import filtration
from aya_min.experiments import measured
from aya_min.experiments_records import run_claims
from aya_min.filtration import holds_word

LAB = SimpleNamespace(seed=0, module=filtration, recipe=SimpleNamespace(
    corpus=144000, eval_count=240, eval_split="validation", level="tiny"))


def words_of(text):
    return re.findall(r"\w+", text.casefold())


@pytest.mark.parametrize("code", filtration.CODES)
def test_phrases_share_no_long_word_with_unwanted_remarks_that_hold_none_of_the_list(code):
    for listed, phrases, with_word, without in filtration.REMARKS[code].values():
        assert all(set(listed) & set(words_of(remark)) for remark in with_word)
        assert not any(set(listed) & set(words_of(remark)) for remark in without)
        for phrase in phrases:
            assert not any(phrase in remark or remark in phrase for remark in with_word + without)
            assert len(set(listed) & set(words_of(phrase))) >= 2
            shared = {word for word in words_of(phrase) if len(word) > 3} & set(words_of(" ".join(without)))
            assert not shared, (phrase, shared)
    every = {word for listed, *_ in filtration.REMARKS[code].values() for word in listed}
    plain, holding = filtration.OTHERS[code]
    assert not any(every & set(words_of(remark)) for remark in plain)
    assert all(every & set(words_of(remark)) for remark in holding)


def test_the_corpus_holds_the_planted_share_in_every_language_and_the_list_finds_the_words():
    rows = filtration.corpus(LAB)
    counts = Counter((row["language"], row["unwanted"]) for row in rows 
                     if row["question_id"].split("/")[0] in filtration.CODES)
    assert len(rows) == 8000 and sum(counts.values()) == 4000
    for code in filtration.CODES:
        assert counts[code, True] / (4000 / 3) == pytest.approx(filtration.UNWANTED, abs=0.02)
    found = holds_word([("", row["text"], row["language"]) for row in rows], filtration.LIST)
    assert found.tolist() == [row["holds"] for row in rows]
    hidden = [row for row in rows if row["unwanted"] and not row["holds"]]
    assert len(hidden) / sum(row["unwanted"] for row in rows) == pytest.approx(0.47, abs=0.06)
    ids = {row["question_id"] for row in filtration.benchmark(LAB)}
    assert not ids & {row["question_id"] for row in rows}


# unwanted, holds a word
ROWS = [(True, True), (True, True), (True, False), (True, False), (False, True), (False, False)]


def mean_of(pairs):
    return np.mean([value for _, value in pairs])


@pytest.fixture
def lab(monkeypatch):
    """Six rows; the list removes the three with a word, the filter both kinds of unwanted ones but one."""
    rows = [{"question_id": str(i), "language": "en", "unwanted": unwanted, "holds": holds}
            for i, (unwanted, holds) in enumerate(ROWS)]
    ways = {"list": [holds for _, holds in ROWS], "as many": [True, True, True, False, False, False],
            "kept": [True, True, True, False, False, True]}
    monkeypatch.setattr(filtration, "corpus", lambda lab: rows)
    monkeypatch.setattr(filtration, "removed", lambda lab, way: np.array(ways[way]))
    return SimpleNamespace(seed=0, module=filtration)


def test_recall_and_f1_of_the_filter_less_those_of_the_list(lab):
    assert measured(lab, filtration.recall())["value"] == pytest.approx(3 / 4 - 2 / 4)
    assert measured(lab, filtration.recall("en"))["value"] == pytest.approx(1 / 4)
    found = filtration.f1().of(lab)
    assert found["value"] == pytest.approx(2 * 3 / (4 + 4) - 2 * 2 / (3 + 4))
    assert found["ci95"][0] < found["value"] < found["ci95"][1]
    assert mean_of(filtration.without_words(lab)) == pytest.approx(1 / 2 - 1 / 2)


def test_rises_are_relative_on_clean_text_and_compared_between_the_benchmark_and_its_clean_part(monkeypatch):
    """The loss of the clean rows rises from 2 to 2.1, that of the unwanted one by 1."""
    rows = [{"question_id": name, "unwanted": name == "c"} for name in "abc"]
    losses = {"all": {"a": 1.0, "b": 3.0, "c": 2.0}, "kept": {"a": 1.1, "b": 3.1, "c": 3.0}}
    lab = SimpleNamespace(seed=0, arm=lambda name: name,
                          losses=lambda arm, rows: [losses[arm][row["question_id"]] for row in rows])
    monkeypatch.setattr(filtration, "benchmark", lambda lab: rows)
    assert mean_of(filtration.cost(lab)) == pytest.approx(2.1 / 2)
    assert mean_of(filtration.of_benchmark(lab)) == pytest.approx(1.2 / 3 - 0.1)


@pytest.mark.long
def test_a_tiny_run_tries_every_claim(tmp_path, monkeypatch):
    small = {**experiments.RECIPES["smoke"], "corpus": 2400, "eval_count": 120}
    monkeypatch.setitem(experiments.RECIPES, "smoke", small)
    monkeypatch.setattr(filtration, "SAMPLES", 2)
    record = run_claims("filtration", (1,), "smoke", tmp_path / "out", CPU)
    assert [claim["name"] for claim in record["results"]] == [claim.name for claim in filtration.CLAIMS]
    assert record["arms"]["1"].keys() == filtration.ARMS.keys()
