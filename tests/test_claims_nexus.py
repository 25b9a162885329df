"""The claims on Nexus: the data of domains, held-out losses and routing row by row, arms that share rows and
steps. A stand-in answers, so that no model is trained."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small import CPU, language_model, tokenizer

from aya_min import domains, held_out
from aya_min.claims import nexus
from aya_min.config import RECIPES, Recipe
from aya_min.data import collate
from aya_min.experiments import Comparison, measured
from aya_min.experiments_page import drawn
from aya_min.experiments_records import joined, seeds_in
from aya_min.files import write_jsonl
from aya_min.languages import CLUSTERS, LANGUAGES
from aya_min.model_config import Mixture
from aya_min.world import TINY_TASKS, split_named
from aya_min.world_oracle import grade


class StandIn(SimpleNamespace):
    """A lab that returns what it was given. Its losses of an arm's rows are `nats` of the arm, and its
    mixtures send a quarter of the tokens to the first expert and the rest to the second."""

    def __init__(self, nats=()):
        smoke = replace(Recipe(), **RECIPES["smoke"])
        super().__init__(recipe=smoke, seed=0, base="base", module=nexus, nats=dict(nats))

    def train(self, name, stage, start, rows, **settings):
        return {"start": start, "rows": rows, **settings}

    def base_of_width(self, times, share):
        return f"base of {times}"

    def upcycle(self, experts, kind, seed_model, domains=None):
        return {"kind": kind, "experts": list(experts), "domains": domains and list(domains),
                "seed_model": seed_model}

    def extend(self, mixture, new, name, vector):
        return {"mixture": mixture, "new": new, "vector": vector}

    def merge(self, name, folders, method):
        return method

    def embeddings(self, model, texts):
        return {name: [1.0] for name in texts}

    def arm(self, name):
        return name

    def losses(self, arm, rows):
        return [self.nats[arm]] * len(rows)

    def routing(self, arm, rows):
        return [[[0.25, 0.75], [0.75, 0.25]]] * len(rows)


@pytest.mark.parametrize("domain", [*CLUSTERS, *TINY_TASKS])
def test_a_domain_of_the_world_is_its_languages_or_its_task_rightly_answered(domain):
    rows = domains.rows_of(domain, "train", 40, 0, "tiny")
    assert len(rows) == 40 and rows == domains.rows_of(domain, "train", 40, 0, "tiny")
    assert all(grade(row, row["completion"]).grade == 3 for row in rows)
    if domain in CLUSTERS:
        assert {row["language"] for row in rows} == set(CLUSTERS[domain])
    else:
        assert {row["task"] for row in rows} == {domain}


def test_code_is_whole_lines_of_the_standard_library_and_a_file_is_in_one_split():
    assert domains.cut("a.py", "x = 1\n" * 40 + "y" * 300 + "\n\n\n") == [
        ("a.py:1", "x = 1\n" * 20), ("a.py:21", "x = 1\n" * 20)]
    rows = domains.rows_of("code", "test", 50, 1, "tiny")
    assert rows != domains.rows_of("code", "test", 50, 2, "tiny")
    files = [row["question_id"].split(":")[0] for row in rows]
    assert {split_named(file) for file in files} == {"test"}
    assert max(len(row["text"]) for row in rows) <= domains.PIECE and "def " in "".join(
        row["text"] for row in rows)


def mixture(**changes):
    about = Mixture(["a", "b", "c"], **changes)
    return language_model(mixture=about)


def test_losses_and_routing_row_by_row_are_those_of_all_rows_together(tmp_path):
    rows = domains.rows_of("slavic", "train", 6, 0, "tiny")
    rows += domains.as_texts(rows[:1]) + domains.rows_of("code", "train", 1, 0, "tiny")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    model = mixture().eval()
    examples = held_out.examples_of(model, tokenizer(), tmp_path / "rows.jsonl")
    batch = collate(examples, tokenizer().pad_id)
    with torch.no_grad():
        logps = model(batch.input_ids, batch.mask, batch.lengths)
    sent = model.model.routing[:, :3]
    nats = [-each.mean().item() for each in logps.split(batch.mask.sum(1).tolist())]
    assert held_out.losses(model, tokenizer(), tmp_path / "rows.jsonl", CPU) == pytest.approx(nats, rel=1e-5)
    shares = torch.tensor(held_out.routing(model, tokenizer(), tmp_path / "rows.jsonl", CPU))
    assert shares.shape == (8, 2, 3) and shares.sum(2).allclose(torch.ones(8, 2))
    torch.testing.assert_close((shares * batch.lengths[:, None, None]).sum(0), sent)


def test_a_comparison_of_losses_is_the_log_of_the_ratio_of_perplexities():
    lab = StandIn({"nexus": math.log(3), "linear": math.log(4)})
    found = measured(lab, Comparison("nexus", "linear", "below", "loss", held_out="clusters"))
    assert found["value"] == pytest.approx(math.log(3 / 4)) and found["verdict"] == "shown"
    assert math.exp(found["of_a"]) == pytest.approx(3) and found["num"] == 13 * len(CLUSTERS)


def test_arms_that_are_compared_train_on_the_same_rows_for_the_same_steps():
    made = {name: arm(StandIn()) for name, arm in nexus.ARMS.items() if name not in ("seed", "merge")}
    compared = "rows", "max_steps", "warmup_steps", "learning_rate"
    of = lambda *names: [{key: made[name][key] for key in compared} for name in names]
    first, *rest = of("dense", "nexus", "linear", "nexus, low", "linear, low", "dense, tasks",
                      "nexus, tasks", "linear, tasks", "dense, large", "nexus, large", "linear, large")
    assert first["max_steps"] == 3 and all(each == first for each in rest)
    assert made["linear, low"]["balance_weight"] == 0.0005 and "balance_weight" not in made["linear"]
    wanted = {"kind": "nexus", "experts": list(CLUSTERS), "domains": list(CLUSTERS)}
    assert made["nexus"]["start"] == {**wanted, "seed_model": "base"}
    assert made["nexus, large"]["start"] == {**wanted, "seed_model": "base of 2"}
    forms = {(row["language"], "text" in row) for row in first["rows"]}
    assert forms == {(code, is_text) for code in LANGUAGES for is_text in (True, False)}
    for name in nexus.BUDGETS:
        one, other = of(f"nexus + code, {name}", f"linear + code, {name}")
        assert one == other and len(one["rows"]) == 32 * one["max_steps"]
        assert sum("language" not in row for row in one["rows"]) == 16 * one["max_steps"]     # code
        assert made[f"nexus + code, {name}"]["start"]["vector"] == [1.0]
        assert made[f"linear + code, {name}"]["start"]["vector"] is None


def test_the_share_of_a_domain_to_its_expert_and_the_picture_by_hand():
    lab = StandIn()
    assert {share for _, share in nexus.to_own("nexus", "slavic", 1, 0.25).of(lab)} == {0.5}
    picture = nexus.by_layer(["nexus"], ["slavic", "west-asia"])(lab)
    assert picture["columns"] == ["slavic", "west-asia"]
    assert picture["rows"] == ["nexus, layer 0", ("slavic", [(0.25, True), (0.75, False)]),
                               ("west-asia", [(0.25, False), (0.75, True)]),
                               "nexus, layer 1", ("slavic", [(0.75, True), (0.25, False)]),
                               ("west-asia", [(0.75, False), (0.25, True)])]


def test_the_picture_of_each_seed_stays_in_the_record_and_is_drawn():
    [claim] = [each for each in nexus.CLAIMS if each.name == "nexus-routing"]
    row = {"value": 0.3, "ci95": [0.2, 0.4], "none": 0.25, "num": 4, "verdict": "not shown"}
    seeds = {seed: {"arms": {}, "minutes": 1.0, "found": {claim.name: [row] * len(claim.comparisons)},
                    "pictures": {claim.name: {"columns": ["a"], "rows": ["layer 7", ["b", [[share, True]]]]}}}
             for seed, share in ((1, 0.12), (2, 0.34))}
    record = joined({"claims": "nexus", "preset": "smoke"}, (claim,), seeds)
    assert seeds_in({**record, "arms": record["arms"]}) == seeds
    page = drawn(record["results"][0], record["seeds"])
    assert ">12<" in page and ">34<" in page and "seed 2" in page and page.count("layer 7") == 2
