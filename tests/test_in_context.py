"""Functions that a model folder is asked in prompts: the text, what counts as an answer, the command; and the
claim on models that are trained on such sequences."""

import json
from types import SimpleNamespace

import pytest
import torch
from small import CPU, language_model, reward_model, tokenizer

from aya_min import weights
from aya_min.claims import in_context as claims
from aya_min.config import RECIPES, Recipe, settings_from
from aya_min.experiments_records import run_claims
from aya_min.in_context import INSTRUCTION, ask, figures_of, graded, main, prompt_of, read_answer, table
from aya_min.sequence_models import NONE



# ---- by text -----------------------------------------------------------------------------------------------

def test_a_prompt_by_hand():
    xs = torch.tensor([[1.0, -1, 1], [-1, -1, 1]])
    assert prompt_of(xs, torch.tensor([1, 0]), torch.tensor([1.0, 1, -1])) == (
        f"{INSTRUCTION}\n\nInput: 1 0 1\nOutput: 1\n\nInput: 0 0 1\nOutput: 0\n\nInput: 1 1 0\nOutput:")
    assert prompt_of(xs[:0], [], xs[0]) == f"{INSTRUCTION}\n\nInput: 1 0 1\nOutput:"


@pytest.mark.parametrize("text, answer", [
    (" 1", 1), ("0.\nInput: 1", 0), ("**1**", 1), ("", None), ("10", None), ("two", None), ("The 1", None)])
def test_what_counts_as_an_answer(text, answer):
    assert read_answer(text) == answer


def test_an_answer_that_is_none_is_half_right():
    assert graded(["1", " 0", "1", "what"], [1, 1, 0, 0]) == {"model": [1.0, 0.0, 0.0, 0.5],
                                                               "unreadable": [0.0, 0.0, 0.0, 1.0]}


def test_a_model_is_asked_after_each_number_of_examples_and_beside_it_stand_the_learners():
    model = language_model()
    model.came_from = "a model"
    found = ask(model, tokenizer(), "conjunction", 2, [0, 5], 30, seed=3)
    assert set(found) == {0, 5}
    assert all(len(values) == 30 for each in found.values() for values in each.values())
    assert set(found[0]["nearest neighbour"]) == {0.5}              # without an example
    assert sum(found[5]["optimal"]) > sum(found[0]["optimal"])
    assert "optimal" not in ask(model, tokenizer(), "dnf", 2, [1], 2, seed=3)[1]
    figures = figures_of(found)
    assert figures[0]["nearest neighbour"] == {"value": 0.5, "ci95": [0.5, 0.5]}
    assert "50.0% [50.0%, 50.0%]" in table(figures).splitlines()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    weights.save(path / "model", language_model(), tokenizer())
    weights.save(path / "reward", reward_model(), tokenizer())
    return path


def test_the_command_writes_what_it_shows(folder, tmp_path, capsys):
    out = tmp_path / "found.json"
    main(["--model", str(folder / "model"), "--function", "sparse parity", "--entries", "3", "--count", "4",
          "--examples", "2", "0", "2", "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["function"] == "sparse parity" and list(written["examples"]) == ["0", "2"]
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(ValueError, match="nothing is overwritten"):
        main(["--model", str(folder / "model"), "--out", str(out)])
    with pytest.raises(ValueError, match="a reward model; give a language model of a decoder alone"):
        main(["--model", str(folder / "reward")])


def test_a_prompt_that_is_too_long_is_refused_by_name(folder):
    with pytest.raises(ValueError, match="508 and an answer; give fewer --examples or --entr"):
        main(["--model", str(folder / "model"), "--examples", "200", "--count", "2"])
    with pytest.raises(ValueError, match="a prompt of 200 examples .*; of these --examples 0 5 fit"):
        main(["--model", str(folder / "model"), "--examples", "5", "200", "0", "--count", "2"])


# ---- the claim ---------------------------------------------------------------------------------------------

class StandIn(SimpleNamespace):
    """A lab without a folder."""

    def step(self, name, make, *content):
        return make(None)


def lab_of(**more):
    return StandIn(seed=0, recipe=settings_from(Recipe, RECIPES["smoke"] | more))


def test_a_label_is_asked_where_its_input_stands():
    xs, ys = torch.tensor([[[1.0, -1], [-1, 1]]]), torch.tensor([[1, 0]])
    inputs, targets = claims.batch("parity", xs, ys)
    assert inputs.tolist() == [[[1, -1, 0], [0, 0, 1], [-1, 1, 0], [0, 0, -1]]]
    assert targets.tolist() == [[1, NONE, 0, NONE]]
    assert claims.batch("nearest", xs, ys)[1].tolist() == [[NONE, NONE, 0, NONE]]


def test_taught_and_untaught_sequences_are_of_the_same_functions():
    lab = lab_of()
    (taught, _), (plain, _) = (claims.evaluated(lab, "monotone", share) for share in (1.0, 0.0))
    assert (taught[:, 8:] == plain[:, 8:]).all() and not (taught[:, 0] == plain[:, 0]).all()


def test_training_and_evaluation_have_other_sequences_and_so_have_the_splits():
    drawn = [claims.drawn(lab_of(), "parity", 4, claims.generator_of(lab_of(), "parity", use))[0]
             for use in ("train", "validation", "test")]
    assert not any(torch.equal(a, b) for a, b in zip(drawn, drawn[1:] + drawn[:1]))


def test_figures_by_hand(monkeypatch):
    """Two sequences of 4 examples; the last quarter is the last one."""
    rates = {("transformer", "conjunction"): [[0, 0, 0, 1.0], [0, 0, 0, 1]],
             ("optimal", "conjunction"): [[0, 0, 0, 1.0], [0, 0, 0, 1]],
             ("LSTM", "conjunction"): [[1, 1, 1, 1.0], [1, 1, 1, 0]],
             ("transformer", "parity"): [[0, 0, 0, 0.0], [0, 0, 0, 1]],
             ("optimal", "parity"): [[0, 0, 0, 1.0], [0, 0, 0, 1]]}
    monkeypatch.setattr(claims, "rights", lambda lab, who, name: torch.tensor(rates[who, name]))
    assert claims.less("transformer", "LSTM", "conjunction").of(None) == [0, 1]
    assert claims.as_transformer("LSTM", "conjunction").of(None) == [1, 0]
    assert claims.harder("parity", "conjunction").of(None) == [1, 0]


@pytest.mark.long
def test_the_claim_runs_from_nothing_to_a_picture(tmp_path):
    record = run_claims("in_context", [1], "smoke", tmp_path, CPU)
    assert [claim["name"] for claim in record["results"]] == [claim.name for claim in claims.CLAIMS]
    picture = record["results"][0]["pictures"][0]
    assert picture["rows"][0] == "conjunction" and len(picture["rows"][1][1]) == len(picture["columns"])
    before = {path: path.stat().st_mtime for path in tmp_path.glob("seed-*/steps/*/done.json")}
    run_claims("in_context", [1], "smoke", tmp_path, CPU)
    assert before == {path: path.stat().st_mtime for path in tmp_path.glob("seed-*/steps/*/done.json")}
