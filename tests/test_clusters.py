"""Clusters of languages that each start from a model of their own."""

import pytest
import torch
from safetensors.torch import load_file
from small import CPU, language_model, tokenizer

from aya_min import config, weights
from aya_min.pipeline import sft_settings, train_clusters_and_merge
from aya_min.pipeline_steps import Run
from aya_min.world import gold_answer, questions


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models, the third the average of the first two."""
    folder = tmp_path_factory.mktemp("models")
    made = [language_model(seed) for seed in (0, 1, 2)]
    made[2].load_state_dict(
        {name: (made[0].state_dict()[name] + made[1].state_dict()[name]) / 2 for name in made[0].state_dict()}
    )
    for i, model in enumerate(made):
        weights.save(folder / str(i), model, tokenizer())
    return [folder / str(i) for i in range(3)]


def state(folder):
    return load_file(folder / "model.safetensors")


def test_clusters_may_each_start_from_a_model_of_their_own(models, tmp_path):
    """Almost without a learning rate, the merged model is the average of the starts."""
    clusters = {"one": ["de"], "two": ["ru"]}
    run = Run(tmp_path, config.Recipe(batch_size=4, sft_learning_rate=1e-12), CPU, clusters)
    rows = [{**q, "completion": gold_answer(q)} for q in questions("train", 48, 0, level="tiny")]
    merged = train_clusters_and_merge(
        run, "sft", "SFT", "sft", dict(zip(clusters, models)), rows, sft_settings(run), 0.1
    )
    assert all(torch.allclose(x, state(models[2])[key], atol=1e-5) for key, x in state(merged).items())


def seed(low, high, pair="a against b"):
    return {
        "win_rates": {
            pair: {
                "greedy": {"win_rate": (low + high) / 2, "ci95": [low, high]},
                "sampled": {"win_rate": 50.0, "ci95": [49.0, 51.0]},
            }
        }
    }
