"""The claims of BAM: parts of the mix, steps of equal operations, parameters of six experts, rounds of the
inference time. A stand-in trains nothing."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small import language_model, tokenizer

from aya_min import loop, merge_upcycle, model_config, weights
from aya_min.claims import bam
from aya_min.config import RECIPES, Recipe
from aya_min.domains import CODE
from aya_min.languages import CLUSTERS
from aya_min.model import CohereForCausalLM
from aya_min.model_config import Mixture


class StandIn(SimpleNamespace):
    """A lab that keeps what is trained, by name, and returns where it started."""

    def __init__(self, folder):
        recipe = replace(Recipe(), **RECIPES["smoke"] | {"lessons": 15 * 32 * 3})
        super().__init__(recipe=recipe, seed=0, tokenizer=tokenizer(), folder=folder, trained={},
                         base=folder / "base")

    def train(self, name, stage, start, rows, **settings):
        self.trained[name] = start, rows, settings
        return start

    def upcycle(self, experts, kind, seed_model, **more):
        out = self.folder / f"{len(list(self.folder.iterdir()))}"
        return merge_upcycle.upcycle(experts, seed_model, out, kind, **more)

    def step(self, name, make, *content):
        (self.folder / "made").mkdir(exist_ok=True)
        return make(self.folder / "made")

    def name_of(self, folder):
        return folder.name


def domain_of(row):
    return CODE if "text" in row else next((name for name in bam.SECOND
                                            if row["language"] in CLUSTERS[name]), bam.GENERAL)


def test_the_mix_has_equal_parts_and_an_expert_a_tenth_of_general_text():
    """444 rows are 12 of code, 144 of each other part; of an expert of a cluster 9 tenths are its own."""
    lab = SimpleNamespace(recipe=Recipe(), seed=0)
    shares = dict.fromkeys((bam.GENERAL, *bam.DOMAINS), 1 / 4)
    found = Counter(map(domain_of, bam.mixed(lab, shares, 444, "")))
    assert found == {CODE: 12, bam.GENERAL: 144, "slavic": 144, "east-asia": 144}
    found = Counter(map(domain_of, bam.mixed(lab, {"slavic": 0.9, bam.GENERAL: 0.1}, 100, "")))
    assert found == {"slavic": 90, bam.GENERAL: 10}
    of_code = Counter(map(domain_of, bam.mixed(lab, {CODE: 0.9, bam.GENERAL: 0.1}, 70, "")))
    assert of_code == {CODE: 30, bam.GENERAL: 40}           # 30 times 12 are 9 times 40


def test_compute_matched_arms_have_the_operations_of_btx(tmp_path):
    lab = StandIn(tmp_path)
    weights.save(lab.base, language_model(num_key_value_heads=4), tokenizer())
    for arm, kind, more in (("btx", "btx", {}), ("own", "bam", {}), ("shared", "bam", {"kv": "shared"})):
        bam.compute_matched(kind, **more)(lab)
        lab.trained[arm] = lab.trained.pop(f"{kind} mixture, compute-matched")
    steps = {arm: lab.trained[arm][2]["max_steps"] for arm in ("own", "shared", "btx")}
    assert bam.num_steps(lab) == 15 == steps["btx"] > steps["shared"] > steps["own"] > 5
    spent = {arm: steps[arm] * bam.operations(lab, start, rows)
             for arm, (start, rows, _) in lab.trained.items() if arm in steps}
    for arm in ("own", "shared"):
        assert spent[arm] == pytest.approx(spent["btx"], rel=0.5 / steps[arm])
    assert len({str(lab.trained[arm][1]) for arm in steps}) == 1        # the same rows


def test_btx_of_six_has_no_fewer_parameters_than_bam_and_with_top_3_no_fewer_operations():
    names = ["seed", *bam.DOMAINS]
    six = [*names, *(f"{name} 2" for name in bam.SECOND)]
    parameters, operations = [], []
    for mixture in (Mixture(names, attention="own"), Mixture(six, top_k=3)):
        config = replace(model_config.model_preset("tiny"), mixture=mixture)
        with torch.device("meta"):
            parameters.append(sum(p.numel() for p in CohereForCausalLM(config).parameters()))
        operations.append(loop.training_flops(config, [32], 32))
    assert parameters[0] <= parameters[1] < 1.1 * parameters[0]
    assert operations[0] <= operations[1] < 1.2 * operations[0]


def test_a_ratio_of_times_is_the_median_of_its_rounds(monkeypatch):
    """In one round of five the machine was busy."""
    slow = [3.0, 90.0, 4.0, 3.0, 3.0]
    monkeypatch.setattr(bam, "times", lambda lab: {"a": slow * 2, "b": [2.0] * 10})
    figure = bam.slower("a", "b")
    assert figure.of(None) == [1.5, 1.5] and figure.bound == 1.0
