"""The claims on quantization: what is lost, by group and by metric, worked by hand; the data; a tiny run."""

from types import SimpleNamespace

import pytest
from small import CPU

from aya_min import experiments
from aya_min.claims import quantization
from aya_min.experiments import Comparison, Figure, measured
from aya_min.experiments_records import run_claims
from aya_min.files import write_jsonl
from aya_min.languages import LANGUAGES
from aya_min.world import split_named
from aya_min.world_oracle import grade

# id, language, task; then by way: nats of the right answer, of a wrong one, grade
ROWS = [("a", "en", "odd"), ("a", "hi", "odd"), ("b", "fr", "sort"), ("b", "ru", "sort")]
FOUND = {"full": [(1.0, 3.0, 3), (2.0, 3.0, 2), (1.0, 3.0, 3), (2.0, 3.0, 2)],
         "w3": [(1.2, 3.0, 3), (3.0, 2.0, 1), (1.2, 3.0, 2), (3.0, 4.0, 1)]}


@pytest.fixture
def lab(monkeypatch):
    rows = [dict(zip(("question_id", "language", "task"), row)) for row in ROWS]
    monkeypatch.setitem(quantization.HELD_OUT, "world", lambda lab: rows)
    of = lambda place: lambda lab, way, where="world": [row[place] for row in FOUND[way]]
    chosen = lambda lab, way: [float(row[0] < row[1]) for row in FOUND[way]]
    monkeypatch.setattr(quantization, "nats", of(0))
    monkeypatch.setattr(quantization, "grades", of(2))
    monkeypatch.setattr(quantization, "MEASURES", {"nats": of(0), "grade": of(2), "choices": chosen})
    return SimpleNamespace(seed=0, module=quantization)


def values(figure, lab):
    return measured(lab, figure)["value"]


def test_losses_of_scripts_and_tasks_are_relative_to_their_own_means(lab):
    """English and French lose 1 of 6 of the grade and 0.2 of 1 of the nats, the others 2 of 4 and 1 of 2."""
    assert values(quantization.by_script("w3", "grade"), lab) == pytest.approx(1 / 2 - 1 / 6)
    assert values(quantization.by_script("w3", "nats"), lab) == pytest.approx(1 / 2 - 0.2)
    assert values(quantization.by_task("w3", "grade"), lab) == pytest.approx(2 / 5 - 1 / 5)
    assert values(quantization.by_task("w3", "nats"), lab) == pytest.approx(0)


def test_groups_of_unequal_size_count_by_their_means():
    found = quantization.less([("a", 0.5)], [("b", 0.1), ("c", 0.3), ("d", 0.2)])
    assert [name for name, _ in found] == ["a", "b", "c", "d"]
    assert [value for _, value in found] == pytest.approx([2.0, -0.4 / 3, -0.4, -0.8 / 3])


def test_what_answers_lose_is_held_against_what_likelihood_tells(lab):
    """The grade falls by 3 of 10, the nats rise by 2.4 of 6, one of four choices is lost."""
    assert values(quantization.by_metric("w3", "nats"), lab) == pytest.approx(0.3 - 0.4)
    assert values(quantization.by_metric("w3", "choices"), lab) == pytest.approx(0.3 - 0.25)
    assert values(quantization.by_grade("full", "w3"), lab) == pytest.approx(3 / 4)


def test_of_nothing_nothing_is_lost(lab, monkeypatch):
    monkeypatch.setattr(quantization, "MEASURES", {"grade": lambda lab, way: [0] * 4})
    assert values(quantization.by_task("w3", "grade"), lab) == 0


def test_the_world_s_rows_are_easy_tasks_and_sorting_rightly_answered():
    rows = quantization.world_rows(0, "validation", 120)
    assert len(rows) == 160 and sum(row["task"] == "sort" for row in rows) == 40
    assert all(grade(row, row["completion"]).grade == 3 for row in rows)
    assert rows != quantization.world_rows(1, "validation", 120)


def parallel(folder):
    """A file as parallel.jsonl is: 40 lines of 20 documents in all languages, and rows of another source."""
    rows = [{"id": f"ntrex/document{n // 2}/{n}", "language": code, "text": f"{code} line {n} of text"}
            for code in LANGUAGES for n in range(40)]
    folder.mkdir()
    write_jsonl(folder / "parallel.jsonl", [*rows, {"id": "tatoeba/a/1", "language": "en", "text": "x"}])
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = parallel(tmp_path / "data")
    for module in (experiments, quantization):
        monkeypatch.setattr(module, "DATA", folder)
    quantization.documents.cache_clear()
    yield folder
    quantization.documents.cache_clear()


def test_a_document_is_in_one_split_in_all_languages(data):
    parts = [quantization.text_rows(*splits)
             for splits in (("train", "preference"), ("validation",), ("test",))]
    assert sum(map(len, parts)) == 40 * len(LANGUAGES)
    named = [{row["question_id"] for row in part} for part in parts]
    documents = [{name.split("/")[1] for name in names} for names in named]
    assert not documents[0] & documents[1] and not documents[0] & documents[2]
    assert [len(part) for part in parts] == [len(names) * len(LANGUAGES) for names in named]
    assert all(split_named(name) == "test" for name in documents[2])


class StandIn(SimpleNamespace):
    def arm(self, name):
        return name

    def quantize(self, folder, scheme, rows=(), languages=(), tokens=0, **settings):
        return {"folder": folder, "scheme": scheme, "rows": rows, "languages": languages, "tokens": tokens,
                **settings}


def test_ways_that_are_compared_differ_in_one_thing():
    lab = StandIn(seed=0, recipe=SimpleNamespace(corpus=960))
    made = {way: quantization.ARMS[f"world, {way}"](lab) for way in quantization.WAYS}
    for bits in ("w4", "w3"):
        plain, gptq, english = made[bits], made[f"{bits}, gptq"], made[f"{bits}, gptq, english"]
        assert not plain["rows"] and "method" not in plain and gptq["method"] == "gptq"
        assert gptq["scheme"] == plain["scheme"] and gptq["tokens"] == english["tokens"] > 0
        assert {row["language"] for row in english["rows"]} == {"en"}
        assert set(gptq["languages"]) == set(LANGUAGES) == {row["language"] for row in gptq["rows"]}
        assert {**gptq, "rows": 0, "languages": 0} == {**english, "rows": 0, "languages": 0}
    grouped = made["w3, groups"]["scheme"]
    assert (grouped.bits, grouped.group, grouped.layout) == (3, 32, made["w3"]["scheme"].layout)
    assert {one["folder"] for one in made.values()} == {"world, full"}


def test_every_claim_compares_arms_that_are_there_and_names_its_side():
    for claim in quantization.CLAIMS:
        assert set(claim.arms) <= quantization.ARMS.keys()
        for c in claim.comparisons:
            assert isinstance(c, Figure) and c.side == "above" or c.held_out in quantization.HELD_OUT
        if claim.needs:                         # real text has no questions, so no answers
            assert all(c.label.startswith("text") or ", text, nats" in c.label for c in claim.comparisons)
    sides = {c.label: c.side for claim in quantization.CLAIMS for c in claim.comparisons
             if isinstance(c, Comparison)}
    assert sides["world, w3, groups below world, w3, loss, world"] == "below"
    assert sides["text, w4, gptq, english above text, w4, gptq, loss, text, not English"] == "above"


@pytest.mark.long
def test_a_tiny_run_tries_every_claim(data, tmp_path, monkeypatch):
    small = {**experiments.RECIPES["smoke"], "corpus": 960, "eval_count": 48}
    monkeypatch.setitem(experiments.RECIPES, "smoke", small)
    record = run_claims("quantization", (0,), "smoke", tmp_path / "out", CPU)
    assert [claim["name"] for claim in record["results"]] == [claim.name for claim in quantization.CLAIMS]
    assert record["arms"]["0"].keys() == quantization.ARMS.keys() - {"text, w8", "text, w8a8"}
