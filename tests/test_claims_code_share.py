"""The claims on code in the mixture: shares in tokens, what is held out, who is right; a tiny run."""

from itertools import islice
from types import SimpleNamespace

import pytest
from small import CPU, tokenizer

from aya_min import code_data
from aya_min.claims import code_share
from aya_min.config import RECIPES, Recipe, settings_from
from aya_min.data import load_examples
from aya_min.experiments import Comparison, measured
from aya_min.experiments_records import run_claims
from aya_min.files import write_jsonl
from aya_min.world import split_named
from aya_min.world_oracle import grade

SMOKE = settings_from(Recipe, RECIPES["smoke"])


class StandIn(SimpleNamespace):
    """A lab that returns what an arm is trained on."""
    module = code_share

    def arm(self, name):
        return code_share.ARMS[name](self)

    def train(self, name, stage, start, rows, **settings):
        return {"start": start, "rows": rows, **settings}


@pytest.fixture(autouse=True)
def asyncio(monkeypatch):
    """One package of the real library, as all of it takes some seconds to read."""
    folder = code_data.library() / "asyncio"
    monkeypatch.setattr(code_data, "library", lambda: folder)
    code_share.code_rows.cache_clear()
    yield
    code_share.code_rows.cache_clear()


@pytest.fixture
def lab(monkeypatch, tmp_path):
    tokenizer().save(tmp_path)
    monkeypatch.setattr(code_share, "start", lambda lab: tmp_path)
    return StandIn(seed=0, recipe=SMOKE)


def of_source(rows):
    """{source: its rows}"""
    found = {"text": [], "stdlib": [], "verified": [], "markup": []}
    for row in rows:
        dataset = row.get("dataset_name") or ("text" if "/" in row["question_id"] else "verified-programs")
        found[{"python-stdlib": "stdlib", "verified-programs": "verified"}.get(dataset, dataset)].append(row)
    return found


def test_the_tokens_that_are_counted_are_those_that_a_stage_supervises(tmp_path):
    rows = [*code_share.text_rows(0, "train", 12), *code_share.code_rows("verified", "0", "train", 6)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    examples = load_examples([tmp_path / "rows.jsonl"], tokenizer(), 10000)
    assert {"text" in row for row in rows} == {True, False}
    assert [code_share.counting(tokenizer(), row) for row in rows] == [int(e.mask.sum()) for e in examples]


def test_all_shares_have_the_same_tokens_and_steps_and_their_share_of_code(lab):
    sizes = {}
    for percent in code_share.SHARES:
        made = lab.arm(f"{percent}% code")
        tokens = {name: sum(code_share.counting(tokenizer(), row) for row in rows)
                  for name, rows in of_source(made["rows"]).items()}
        total = sum(tokens.values())
        assert (tokens["stdlib"] + tokens["verified"]) / total == pytest.approx(percent / 100, abs=0.05)
        assert tokens["stdlib"] == pytest.approx(tokens["verified"], abs=500) and tokens["markup"] == 0
        sizes[percent] = total
        steps = made["max_steps"]
        assert steps == 10 and 0 <= len(made["rows"]) - steps * made["batch_size"] < steps
    assert all(6400 <= size <= 6400 * 1.1 for size in sizes.values()), sizes


def test_a_larger_share_of_a_source_begins_with_the_rows_of_a_smaller_one(lab):
    less, more = (of_source(lab.arm(f"{percent}% code")["rows"])["text"] for percent in (75, 25))
    assert 0 < len(less) < len(more) and all(row in more for row in less)


def test_phases_quality_and_cooldown_are_as_the_paper_has_them(lab):
    second = lab.arm(code_share.BALANCED)
    first = second["start"]
    parts = {name: rows for name, rows in of_source(first["rows"]).items() if rows}
    assert set(parts) == {"text", "stdlib", "verified"} and first["max_steps"] == second["max_steps"] == 5
    assert all(not rows for name, rows in of_source(second["rows"]).items() if name != "text")
    assert not of_source(lab.arm(code_share.CODE)["start"]["rows"])["text"]
    markup = of_source(lab.arm("25% markup")["rows"])
    assert {row["kind"] for row in markup["markup"]} == {"html", "json", "markdown"}
    assert markup["text"] and not markup["stdlib"] and not markup["verified"]
    cooled = lab.arm(code_share.WITH)
    assert cooled["start"] == second and cooled["max_steps"] == 1 and cooled["final_learning_rate"] == 0
    assert cooled["learning_rate"] == SMOKE.base_learning_rate / 4
    assert not of_source(lab.arm(code_share.WITHOUT)["rows"])["stdlib"]


def test_no_module_program_or_question_of_the_evaluation_was_trained_on():
    """But for translations, which are facts."""
    for kind in ("stdlib", "verified"):
        place = 0 if kind == "stdlib" else 1            # the module, or the body
        names = [{row["question_id"].split(":")[place]
                  for row in code_share.code_rows(kind, "0", split, 60)} for split in ("train", "validation")]
        assert all(names) and not names[0] & names[1]
    lab = StandIn(seed=0, recipe=SMOKE)
    for measure in ("reasoning", "sums", "days", "knowledge"):
        for row in code_share.asked_about(lab, measure):
            fact = row["task"] == "translate"
            assert split_named(row["question_id"]) == ("train" if fact else SMOKE.eval_split)
            assert grade(row, row["completion"]).grade == 3


def test_a_program_is_asked_up_to_its_last_result():
    row = {"text": "def f(x):\n    return x\n\nassert f(1) == 1\nassert f(11) == 11\n", "id": "a",
           "results": ["1", "11"]}
    assert code_share.as_question(row) == {
        "prompt": "def f(x):\n    return x\n\nassert f(1) == 1\nassert f(11) ==", "completion": "11",
        "question_id": "a"}
    for row in islice(code_share.rows_of("verified", 0), 40):
        asked = code_share.as_question(row)
        assert f"{asked['prompt']} {asked['completion']}\n" == row["text"]


def test_right_answers_are_compared_question_by_question():
    """Of four programs one arm knows two and the other one."""
    lab = StandIn(seed=0, recipe=settings_from(Recipe, {**RECIPES["smoke"], "eval_count": 40}))
    asked = code_share.asked_about(lab, "programs")
    known = {"a": [0, 1], "b": [1]}
    lab.arm = lambda name: name

    def sample(name, model, rows, num, temperature):
        assert temperature == 0 and all("completion" not in row for row in rows)
        return [[{"completion": f" {row['completion']}" if i in known[model] else "?"}]
                for i, row in enumerate(asked)]
    lab.sample = sample
    found = measured(lab, code_share.by_right("programs", "a", "b"))
    assert found["value"] == pytest.approx(1 / len(asked)) and found["num"] == len(asked)


def test_every_arm_is_compared_and_every_comparison_has_its_arms():
    named = {arm for claim in code_share.CLAIMS for c in claim.comparisons for arm in
             ((c.a, c.b) if isinstance(c, Comparison) else c.label.partition(": right answers of ")[2]
              .split(" less those of "))}
    assert named == set(code_share.ARMS)


@pytest.mark.long
def test_a_tiny_run_tries_every_claim(tmp_path):
    record = run_claims("code_share", (0,), "smoke", tmp_path / "out", CPU)
    assert [claim["name"] for claim in record["results"]] == [claim.name for claim in code_share.CLAIMS]
    assert record["arms"]["0"].keys() == code_share.ARMS.keys()
    assert "25% code" in (tmp_path / "out" / "code_share" / "report.html").read_text(encoding="utf-8")
