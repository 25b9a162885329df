"""What the table of the merging questions rests on: SLERP of more than two models, the verdicts, and
clusters that each start from their own model."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import CPU, language_model, tokenizer

from aya_min import config, weights
from aya_min.pipeline import sft_settings, train_clusters_and_merge
from aya_min.pipeline_steps import Run
from aya_min.world import gold_answer, questions

SCRIPT = runpy.run_path(str(Path(__file__).parent / "bench" / "merging_questions.py"))


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


def test_slerp_of_several_models_is_a_tree_in_which_each_weighs_the_same(models, tmp_path):
    a, b, _ = models
    for name, folders in (("same", [a] * 5), ("three", [a, b, b])):
        SCRIPT["slerp_tree"](folders, tmp_path / name)
    assert all(torch.allclose(x, state(a)[key], atol=1e-6) for key, x in state(tmp_path / "same").items())
    key = "model.layers.0.mlp.up_proj.weight"  # random, so of about the same length and at a right angle
    angles = [
        torch.cosine_similarity(state(tmp_path / "three")[key].flatten(), state(m)[key].flatten(), 0).item()
        for m in (a, b)
    ]
    torch.testing.assert_close(
        angles, [0.5, 0.75**0.5], atol=0.05, rtol=0
    )  # 60 degrees from the one, 30 from the two


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


def test_a_verdict_needs_the_intervals_of_all_seeds_on_one_side():
    verdict = SCRIPT["verdict"]
    assert verdict([seed(50.1, 52), seed(51, 53)], "a against b") == "better greedy, not shown sampled"
    assert verdict([seed(47, 49.9), seed(45, 48)], "a against b") == "worse greedy, not shown sampled"
    assert (
        verdict([seed(50.1, 52), seed(47, 49.9)], "a against b")
        == verdict([seed(50.1, 52), seed(49, 53)], "a against b")
        == "not shown"
    )
    assert verdict([seed(50.1, 52), seed(51, 53, "c against d")], "a against b") == "not done"


def test_a_gain_grows_with_size_when_the_intervals_of_smallest_and_largest_are_apart_in_all_seeds():
    def both(small, large):
        return {
            "win_rates": {
                **seed(*small, "s/sft against s/mix")["win_rates"],
                **seed(*large, "l/sft against l/mix")["win_rates"],
            }
        }
    apart, touching = both((48, 49), (49.5, 51)), both((48, 50), (49.5, 51))
    assert (
        SCRIPT["size_verdict"]([apart, apart], ["s", "l"])
        == "gain with size: larger greedy, not shown to change sampled"
    )
    assert (
        SCRIPT["size_verdict"]([apart, touching], ["s", "l"])
        == "gain with size: not shown to change greedy, not shown to change sampled"
    )


def test_consistency_is_the_range_over_seeds_the_mean_and_the_largest_shortfall_from_the_best_method():
    def rates(value):
        return {d: {"win_rate": value, "ci95": [value - 1, value + 1]} for d in SCRIPT["DECODINGS"]}
    starts, methods = SCRIPT["STARTS"], SCRIPT["METHODS"]
    seeds = []
    for value in (52.0, 58.0):  # ties wins one seed and loses the other; linear is near the best in both
        linear = {f"recipe/{stage} against recipe/{start}": rates(55.0) for stage, start in starts.items()}
        others = {
            f"methods/{stage}-{method} against recipe/{start}": rates(value if method == "ties" else 40.0)
            for stage, start in starts.items()
            for method in methods
        }
        seeds.append({"win_rates": linear | others})
    assert SCRIPT["consistency"]([*seeds, {"win_rates": linear}]) == {}     # one seed lacks the other methods
    found = SCRIPT["consistency"](seeds)
    assert (
        found["linear"]["greedy"] == (0.0, 55.0, 3.0)
        and found["ties"]["greedy"] == (6.0, 55.0, 3.0)
        and found["slerp"]["sampled"] == (0.0, 40.0, 18.0)
    )
