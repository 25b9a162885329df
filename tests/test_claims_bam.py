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
    return CODE if "language" not in row else next((name for name in bam.SECOND
                                                    if row["language"] in CLUSTERS[name]), bam.GENERAL)


def test_the_mix_has_equal_parts_and_an_expert_a_tenth_of_general_text():
    lab = SimpleNamespace(recipe=Recipe(), seed=0)

    def shares_of(wanted):
        found = Counter(map(domain_of, bam.mixed(lab, wanted, 1000, "")))
        tokens = {domain: number * bam.LENGTH[domain] for domain, number in found.items()}
        assert 990 <= found.total() <= 1010
        return {domain: number / sum(tokens.values()) for domain, number in tokens.items()}
    for wanted in (dict.fromkeys((bam.GENERAL, *bam.DOMAINS), 1 / 4), {CODE: 0.9, bam.GENERAL: 0.1},
                   {"slavic": 0.9, bam.GENERAL: 0.1}):
        assert shares_of(wanted) == pytest.approx(wanted, rel=0.02)


def test_rows_of_a_cluster_are_by_turns_texts_and_conversations():
    lab = SimpleNamespace(recipe=Recipe(), seed=0)
    rows = bam.of_domain(lab, "slavic", "validation", 4)
    assert ["text" in row for row in rows] == [False, True] * 2
    assert not any("text" in row for row in bam.of_domain(lab, bam.GENERAL, "validation", 4))


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
