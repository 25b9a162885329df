"""The claims on Aya 101's architecture: as many parameters, the same rows, a tiny run."""

from types import SimpleNamespace

import pytest
import torch
from small import CPU

from aya_min import experiments
from aya_min.claims import aya_101
from aya_min.config import RECIPES, Recipe
from aya_min.encoder_decoder import EncoderDecoder
from aya_min.experiments_records import run_claims
from aya_min.model import CohereForCausalLM
from aya_min.model_config import model_preset


def test_both_kinds_have_as_many_parameters():
    recipe = Recipe(**RECIPES["tiny"])
    tokenizer = SimpleNamespace(vocab_size=recipe.vocab_size, pad_id=0, end_of_turn_id=1)
    config = aya_101.config_of(SimpleNamespace(recipe=recipe), tokenizer)
    with torch.device("meta"):
        decoder = CohereForCausalLM(model_preset(recipe.model, recipe.vocab_size))
        both = EncoderDecoder(config)
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(both) == pytest.approx(count(decoder), rel=0.02)


@pytest.mark.long
def test_the_claims_run_whole_in_miniature(tmp_path, monkeypatch):
    small = {**experiments.RECIPES["smoke"], "corpus": 960, "eval_count": 48}
    monkeypatch.setitem(experiments.RECIPES, "smoke", small)
    record = run_claims("aya_101", (0,), "smoke", tmp_path / "out", CPU)
    arms = record["arms"]["0"]
    assert {arm["steps"] for arm in arms.values()} == {960 // 5 // 32}
    assert [claim["name"] for claim in record["results"]] == ["architecture", "architecture-breadth"]
