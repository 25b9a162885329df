"""merge_upcycle.py and merge_embed.py: dense models made into a mixture of experts, and one that grows."""

import pytest
import torch
from safetensors.torch import load_file
from small import language_model, tokenizer

from aya_min import weights
from aya_min.merge_upcycle import KINDS, extend, upcycle

NAMES = ["law", "code", "maths"]
VECTORS = {name: [1.0 * i, -0.5, 0.25 * i] for i, name in enumerate([*NAMES, "art"], 1)}


def published(folder, seed, **changes):
    weights.save(folder, language_model(seed, **changes), tokenizer())
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """{name: folder} of three models, their seed and a fourth."""
    place = tmp_path_factory.mktemp("dense")
    return {name: published(place / name, i) for i, name in enumerate([*NAMES, "seed", "art"])}


def made(dense, out, kind, **more):
    if kind == "nexus":
        more = {"domains": VECTORS} | more
    return upcycle({name: dense[name] for name in NAMES}, dense["seed"], out, kind, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_made_loads_and_grows(dense, tmp_path, kind):
    out = made(dense, tmp_path / "out", kind)
    model, _ = weights.load(out)
    vector = {"vector": VECTORS["art"]} if kind == "nexus" else {}
    grown, _ = weights.load(extend(out, dense["art"], tmp_path / "grown", "art", **vector))
    assert grown.config.mixture.experts == [*model.config.mixture.experts, "art"]
    assert grown(torch.tensor([[5, 6, 7]])).isfinite().all()
