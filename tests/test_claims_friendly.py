"""The claims on friendly training: arms that differ in one setting, models rounded in memory, costs worked by
hand; a tiny run."""

from types import SimpleNamespace

import pytest
import torch
from small import CPU, language_model

from aya_min import experiments, quantized
from aya_min.claims import friendly
from aya_min.config import RECIPES, Recipe, settings_from
from aya_min.experiments import Figure, measured
from aya_min.experiments_records import page, run_claims
from aya_min.outliers import quantized_products

SMOKE = settings_from(Recipe, RECIPES["smoke"])


class StandIn(SimpleNamespace):
    """A lab that returns what an arm is trained on."""

    def untrained(self, texts, vocab_size=None):
        return len(texts)

    def train(self, name, stage, start, rows, **settings):
        return {"start": start, "rows": rows, **settings}


def test_each_arm_changes_one_setting_of_the_friendly_ones():
    lab = StandIn(seed=0, recipe=SMOKE)
    made = {name: arm(lab) for name, arm in friendly.ARMS.items()}
    base = made[friendly.BASE]
    assert base["weight_decay"] == 0.1 and base["max_steps"] * SMOKE.batch_size == len(base["rows"]) > 0
    for name, changes in friendly.CHANGES.items():
        assert made[name] == {**base, **changes}
    assert [len(changes) for changes in friendly.CHANGES.values()] == [0, 1, 2, 2, 1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("bits, name", [((8, 8), "int8"), ((4, None), "int4")])
def test_a_model_rounded_in_memory_multiplies_as_the_diagnostics_do(bits, name):
    plain, model = language_model(), language_model()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    friendly.quantize(model, *bits)
    for place, layer in quantized.linears(plain).items():
        if layer.weight.shape[1] == 32:
            found = quantized_products(x.flatten(0, 1), layer.weight)[name].view(2, 5, -1)
            torch.testing.assert_close(model.get_submodule(place)(x), found)
            assert not torch.equal(found, layer(x))
    assert torch.equal(plain.model.embed_tokens.weight, model.model.embed_tokens.weight)


NATS = {"friendly": [1.0, 3.0], "fp16": [2.0, 2.0], "bf16": [1.0, 1.0]}


@pytest.fixture
def lab(monkeypatch):
    """Quantized, the arms' rows have these nats and a part more."""
    rises = {"friendly": [0.2, 0.2], "fp16": [0.4, 0.8], "bf16": [0.0, 0.1]}
    diagnostics = {"friendly": 2.0, "fp16": 3.0, "bf16": 1.0}
    found = {arm: {"nats": {"full": NATS[arm],
                            **{name: [x + y for x, y in zip(NATS[arm], rises[arm])]
                               for name in friendly.NUMBERS}},
                   "diagnostics": {"spectral norm": diagnostics[arm], "none": 0.0}} for arm in NATS}
    monkeypatch.setattr(friendly, "looked_at", lambda lab, arm: found[arm])
    monkeypatch.setattr(friendly, "held_out_rows", lambda lab: [{"question_id": "a"}, {"question_id": "b"}])
    monkeypatch.setattr(friendly, "ARMS", dict.fromkeys(NATS))
    return SimpleNamespace(seed=0)


def test_a_cost_is_the_rise_as_a_share_of_the_mean_before(lab):
    assert friendly.cost(lab, "friendly", "W3") == pytest.approx([0.1, 0.1])
    found = measured(lab, friendly.costlier("fp16", "bf16", "W3"))
    assert found["value"] == pytest.approx(0.3 - 0.05) and found["verdict"] == "shown" and found["num"] == 2
    assert measured(lab, friendly.costlier("friendly", "fp16", "W3"))["verdict"] == "reversed"


def test_a_diagnostic_in_the_order_of_the_costs_has_the_rank_correlation_1(lab):
    found = measured(lab, friendly.correlation("spectral norm", "W3"))
    assert found["value"] == pytest.approx(1) and found["num"] == 3
    assert measured(lab, friendly.correlation("none", "W3"))["value"] == 0


def test_the_picture_shows_every_arm_beside_the_base(lab):
    picture = friendly.of_arms(lab)
    assert picture["columns"][:2] == ["nats", "cost of W8A8"] and picture["columns"][-1] == "none"
    rows = {arm: [share for share, _ in cells] for arm, cells in picture["rows"]}
    assert rows["friendly"][:-1] == [1.0] * 6 and rows["fp16"][0] == 1.0 and rows["bf16"][0] == 0.5
    assert rows["fp16"][-1] is None and rows["fp16"][-2] == 1.5


def test_a_summary_is_a_mean_over_layers_and_projections():
    each = lambda std: {"std": std, "spectral_norm": 2 * std, "int8": {"relative": std / 10},
                        "int4": {"relative": std}}
    layer = lambda std, above: {"projections": {"a": each(std), "b": each(3 * std)},
                                "norms": {"n": {"std": std}}, "dimensions_above": above}
    found = friendly.summary({"layers": [layer(1.0, 4), layer(2.0, 0)], "final_norm": {"std": 6.0}})
    assert found == pytest.approx({"activation std": 3.0, "std of norm gains": 3.0, "spectral norm": 6.0,
                                   "error of INT8 products": 0.3, "error of INT4 products": 3.0,
                                   "dimensions above 6": 2.0})


def test_every_claim_is_above_nothing():
    assert all(isinstance(c, Figure) and (c.side, c.bound) == ("above", 0.0)
               for claim in friendly.CLAIMS for c in claim.comparisons)


@pytest.mark.long
def test_a_tiny_run_tries_every_claim(tmp_path, monkeypatch):
    small = {**experiments.RECIPES["smoke"], "corpus": 960, "eval_count": 48}
    monkeypatch.setitem(experiments.RECIPES, "smoke", small)
    record = run_claims("friendly", (0,), "smoke", tmp_path / "out", CPU)
    assert [claim["name"] for claim in record["results"]] == [claim.name for claim in friendly.CLAIMS]
    assert record["arms"]["0"].keys() == friendly.ARMS.keys() and "cost of W4A4" in page(record, {})
