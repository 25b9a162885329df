"""Dropout (aya_min/dropout.py) and float16 with loss scaling (aya_min/loss_scale.py)."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import CPU, assert_close, language_model, logged, on_ranks, run, state_of, tokenizer

from aya_min import config, dropout, estimate, loss_scale, stages
from aya_min.config import SFT, check_training
from aya_min.data import collate, load_examples, make_batches
from aya_min.dropout import SPREAD, Dropout
from aya_min.loop import train
from aya_min.loss_scale import LossScale
from aya_min.losses import sft_loss
from aya_min.model import explicit_attention

BOTH = dict(attention_dropout=0.3, residual_dropout=0.2)


def lowbias32(x):
    """With Python's whole numbers, as its author prints it."""
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def keeps(key, place, rate):
    """Whether the value at this place is kept: its hash as a signed number, on a scale from 0 to 1."""
    drawn = lowbias32(key + place * SPREAD)
    signed = drawn - 2 ** 32 if drawn >= 2 ** 31 else drawn
    return (signed + 2 ** 31) / 2 ** 32 >= rate


def same_bits(run_folder, other):
    first, second = state_of(run_folder), state_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# dropout's masks

def test_the_hash_is_lowbias32_and_the_masks_are_its_shares():
    x = torch.tensor([0, 1, -1, 123456789, -2 ** 31, 2 ** 31 - 1], dtype=torch.int32)
    assert [value & 0xFFFFFFFF for value in dropout.mixed(x).tolist()] == list(map(lowbias32, x.tolist()))
    mask = dropout.keep_mask(x, 5, 0.4)
    assert mask.tolist() == [[keeps(key, place, 0.4) for place in range(5)] for key in x.tolist()]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_mask_drops_its_share_of_each_place_and_masks_of_other_tokens_are_unrelated(rate):
    ids = torch.arange(4000)[None]
    keys = Dropout(rate, rate, 7).of_text(ids).of_layer(1).keys[0]
    mask = dropout.keep_mask(keys, 64, rate).double()                       # (4000, 64)
    deviation = math.sqrt(rate * (1 - rate))
    assert mask.mean().item() == pytest.approx(1 - rate, abs=4 * deviation / 4000 ** 0.5 / 8)
    assert (mask.mean(0) - (1 - rate)).abs().max() < 5 * deviation / 4000 ** 0.5
    centred = (mask - (1 - rate)) / deviation
    for other in (centred.roll(1, 0), centred.roll(1, 1)):
        assert abs((centred * other).mean().item()) < 5 / (4000 * 64) ** 0.5


def test_what_is_kept_is_scaled_up_and_the_rest_is_0():
    keys = torch.tensor([[3, -8]], dtype=torch.int32)
    y = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    found = dropout.dropped(y, Dropout(0.0, 0.5, 0, keys), 2)
    expected = [[2 * value * keeps(lowbias32(key + 2), place, 0.5) for place, value in enumerate(row)]
                for key, row in zip((3, -8), y[0].tolist())]
    assert found[0].tolist() == expected
    assert dropout.dropped(y, None, 2) is y and dropout.dropped(y, Dropout(0.5, 0.0, 0, keys), 2) is y


def test_explicit_attention_is_the_fused_one_and_drops_probabilities_after_the_softmax():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(explicit_attention(q, k, v, None, None), plain)
    keys = torch.arange(10, dtype=torch.int32).view(2, 5)
    found = explicit_attention(q, k, v, None, None, dropout=Dropout(0.4, 0.0, 0, keys))
    for b, head, t in ((0, 0, 4), (0, 3, 2), (1, 1, 4), (1, 2, 0)):
        probs = (k[b, head // 2, :t + 1] @ q[b, head, t] / math.sqrt(8)).softmax(0)
        key = lowbias32(int(keys[b, t]) + head * SPREAD)
        kept = torch.tensor([keeps(key, place, 0.4) for place in range(t + 1)])
        torch.testing.assert_close(found[b, head, t], (probs * kept / 0.6) @ v[b, head // 2, :t + 1])


def test_texts_have_the_same_masks_as_far_as_they_begin_alike_and_others_in_another_step_or_seed_or_layer():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8], [6, 5, 7, 8]])

    def keys(step=3, seed=0, layer=0):
        return dropout.of_step(SFT(**BOTH, seed=seed), step).of_text(ids).of_layer(layer).keys
    alike = keys()[0] == keys()[1]
    assert alike.tolist() == [True, True, False, False] and (keys()[0] != keys()[2]).all()
    for other in (keys(step=4), keys(seed=1), keys(layer=1)):
        assert (keys() != other).all()
    assert dropout.of_step(SFT(), 3) is None


# dropout in training

@pytest.mark.parametrize("stage", ["sft", "reward", "router", "classify"])
def test_a_step_with_dropout_is_the_same_packed_cut_and_recomputed(stage, world, tmp_path):
    whole = logged(run(stage, world, tmp_path / "whole", packing=True, **BOTH))
    assert whole[0]["loss"] != logged(run(stage, world, tmp_path / "without", max_steps=1))[0]["loss"]
    for name, more in (("padded", dict(packing=False)), ("cut", dict(micro_batch_size=2, packing=True)),
                       ("recomputed", dict(activation_checkpointing=1, packing=True))):
        assert_close(whole, logged(run(stage, world, tmp_path / name, **BOTH, **more)), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("architecture", [
    dict(model_type="cohere2", sliding_window=4),
    pytest.param(dict(model_type="gemma2", query_pre_attn_scalar=8, attn_logit_softcapping=20.0),
                 marks=pytest.mark.long)], ids=["window", "softcap"])
def test_so_it_is_within_a_window_and_with_capped_scores(architecture, world, tmp_path):
    more = dict(architecture=architecture, max_steps=1, **BOTH)
    whole = logged(run("sft", world, tmp_path / "whole", packing=True, **more))
    assert_close(whole, logged(run("sft", world, tmp_path / "padded", packing=False, **more)), rtol=2e-4,
                 atol=2e-5)


def test_two_ranks_drop_what_one_does(world, tmp_path):
    more = dict(**BOTH, max_steps=2)
    alone = logged(run("reward", world, tmp_path / "one", **more))
    on_ranks(2, lambda: run("reward", world, tmp_path / "two", micro_batch_size=2, **more))
    assert_close(alone, logged(tmp_path / "two"), rtol=2e-4, atol=2e-5)


def test_a_resumed_run_with_dropout_is_the_one_that_was_never_stopped(world, tmp_path):
    common = dict(schedule="constant", warmup_steps=1, save_every=1, **BOTH)
    run("sft", world, tmp_path / "whole", max_steps=3, **common)
    run("sft", world, tmp_path / "run", max_steps=1, **common)
    run("sft", world, tmp_path / "run", max_steps=3, resume=True, **common)
    assert same_bits(tmp_path / "whole", tmp_path / "run")
    with pytest.raises(ValueError, match="that run had residual_dropout 0.2, not 0.0"):
        run("sft", world, tmp_path / "run", max_steps=3, resume=True, **{**common, "residual_dropout": 0.0})


def test_an_evaluation_has_no_dropout(world, tmp_path):
    """The one before the first step is that of the same weights."""
    first = [logged(run("sft", world, tmp_path / name, held_out=True, max_steps=1, **more))[0]
             for name, more in (("with", BOTH), ("without", {}))]
    assert first[0] == first[1] and "eval/loss" in first[0]


@pytest.mark.parametrize("settings, other", [(config.DPO, "its reference"), (config.KTO, "its reference"),
                                             (config.RL, "the policy that sampled")])
def test_dropout_is_refused_where_the_loss_compares_with_log_probs_without_it(settings, other):
    with pytest.raises(ValueError, match=f"--attention-dropout 0.1: .* {other}"):
        check_training(settings(attention_dropout=0.1), 1)
    check_training(settings(), 1)
    check_training(config.DPO(loss="simpo", simpo_gamma=1.0, attention_dropout=0.1), 1)


def test_dropout_is_refused_by_a_sidenet_whose_layers_are_frozen():
    with pytest.raises(ValueError, match="--residual-dropout 0.2: the layers below a SideNet are frozen"):
        config.Side(residual_dropout=0.2)


def test_a_mixture_of_experts_drops_the_same_however_the_step_is_cut(world, tmp_path):
    mixture = dict(experts=["a", "b"], top_k=1, shared=True, attention="own")
    more = dict(architecture=dict(mixture=mixture), max_steps=1, **BOTH)
    whole = logged(run("sft", world, tmp_path / "whole", **more))
    assert_close(whole, logged(run("sft", world, tmp_path / "cut", micro_batch_size=2, **more)), rtol=2e-4,
                 atol=2e-5)


# float16

def test_the_scale_halves_at_an_overflow_and_doubles_after_enough_good_steps(monkeypatch, capsys):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    scale, seen = LossScale("float16"), []
    for norm in (math.inf, math.nan, 1.0, math.inf, 1.0, 1.0, 1.0):
        taken = scale.takes(0, 2.0, norm)
        seen.append((taken, scale.scale / loss_scale.START))
    assert seen == [(False, 0.5), (False, 0.25), (True, 0.25), (False, 0.125), (True, 0.125), (True, 0.25),
                    (True, 0.25)]
    assert scale.logged() == {"loss_scale": loss_scale.START / 4, "skipped_steps": 3}
    other = LossScale("float16")
    assert other.load(scale.tensors()) == 3 and vars(other) == vars(scale)
    scale.scale = 1.0
    # the two that the loop refuses
    assert scale.takes(0, 2.0, math.inf) and scale.takes(0, math.nan, math.nan)
    assert "step 0: skipped, its gradients overflowed in float16" in capsys.readouterr().err
    for dtype in ("float32", "bfloat16"):
        plain = LossScale(dtype)
        assert plain.scale == 1 and plain.takes(0, 2.0, math.inf) and not plain.tensors() | plain.logged()


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_float16_is_near_fp32_its_norm_is_unscaled_before_it_is_clipped(stage, world, tmp_path):
    exact = logged(run(stage, world, tmp_path / "exact", max_grad_norm=0.5))
    half = logged(run(stage, world, tmp_path / "half", max_grad_norm=0.5, dtype="float16"))
    assert [row.pop("loss_scale") for row in half] == [loss_scale.START] * 3
    assert [row.pop("skipped_steps") for row in half] == [0] * 3
    assert_close(exact, half, rtol=0.01, atol=0.01)
    assert {t.dtype for name, t in state_of(tmp_path / "half").items() if name != "loss_scale"} == {
        torch.float32}
    moments = [state_of(tmp_path / name)["model.norm.weight|exp_avg"] for name in ("exact", "half")]
    torch.testing.assert_close(*moments, rtol=0.02, atol=1e-4)


def test_skipped_steps_change_nothing_and_a_resumed_run_counts_as_one_never_stopped(world, tmp_path,
                                                                                     monkeypatch):
    """The first state holds no step of AdamW, whose count is that of the steps taken."""
    monkeypatch.setattr(loss_scale, "START", 2.0 ** 24)
    common = dict(schedule="constant", warmup_steps=1, save_every=1, dtype="float16")
    run("sft", world, tmp_path / "whole", max_steps=8, **common)
    rows = logged(tmp_path / "whole")
    skipped = [row["skipped_steps"] for row in rows]
    assert skipped[:2] == [1, 2] and skipped[-1] == skipped[-2] < 7 and rows[0]["grad_norm"] in ("inf", "nan")
    run("sft", world, tmp_path / "run", max_steps=1, **common)
    first = state_of(tmp_path / "run")
    assert first.pop("loss_scale").tolist() == [2.0 ** 23, 0, 1]
    assert all(torch.equal(p, first[name]) for name, p in language_model().named_parameters())
    assert all(not tensor.any() for name, tensor in first.items() if "|" in name)
    for steps in (skipped[-1] + 1, 8):
        run("sft", world, tmp_path / "run", max_steps=steps, resume=True, **common)
    assert logged(tmp_path / "run") == rows and same_bits(tmp_path / "whole", tmp_path / "run")


def test_a_sidenet_in_float16_has_moments_of_what_is_trained_alone_and_is_resumed(world, tmp_path):
    common = dict(schedule="constant", warmup_steps=1, save_every=1, dtype="float16")
    run("sidenet", world, tmp_path / "whole", max_steps=3, **common)
    moments = {name for name in state_of(tmp_path / "whole") if "|" in name}
    assert moments and all(name.startswith(("hidden.", "out.")) for name in moments)
    run("sidenet", world, tmp_path / "run", max_steps=1, **common)
    run("sidenet", world, tmp_path / "run", max_steps=3, resume=True, **common)
    assert same_bits(tmp_path / "whole", tmp_path / "run")


def overflowing(model, batch):
    """A finite loss whose gradient is not finite on the last rank, in its first step."""
    loss, metrics = sft_loss(model, batch)
    bad = model.model.norm.weight
    return (loss + (bad.sum() * 0).sqrt() if batch.where[0].endswith(":1") else loss), metrics


def test_an_overflow_on_one_rank_is_skipped_by_all_and_two_ranks_are_one(world, tmp_path):
    examples = load_examples([world / "sft.jsonl"], tokenizer(), 256, SFT())

    def train_on(name):
        settings = SFT(batch_size=8, max_steps=4, learning_rate=1e-3, dtype="float16", warmup_steps=0)
        num_steps, batches = make_batches(examples, collate, settings)
        (tmp_path / name).mkdir(exist_ok=True)

        def marked(step):
            found = batches(step)
            last = stages.distributed.rank() == stages.distributed.num_ranks() - 1
            for batch in found:
                batch.where = (f"file:{1 if step == 1 and last else 2}",)
            return found
        train(language_model(), num_steps, marked, overflowing, settings, tmp_path / name, CPU)

    train_on("one")
    on_ranks(2, train_on, "two")
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    assert [row["skipped_steps"] for row in one] == [0, 1, 1, 1]
    for rows in (one, two):
        assert rows[1].pop("grad_norm") == "nan"
    assert_close(one, two, rtol=0.01, atol=0.01)


def test_a_loss_that_is_not_finite_and_a_scale_that_cannot_fall_are_refused(world, tmp_path, monkeypatch):
    examples = load_examples([world / "sft.jsonl"], tokenizer(), 256, SFT())
    settings = SFT(batch_size=8, max_steps=1, dtype="float16")
    num_steps, batches = make_batches(examples, collate, settings)

    def infinite(model, batch):
        return sft_loss(model, batch)[0] * math.inf, {}
    with pytest.raises(ValueError, match="step 0: loss inf.*stopped before.*or take --dtype bfloat16"):
        train(language_model(), num_steps, batches, infinite, settings, tmp_path, CPU)

    def steep(model, batch):
        loss, metrics = sft_loss(model, batch)
        return loss + (model.model.norm.weight.sum() * 0).sqrt(), metrics
    monkeypatch.setattr(loss_scale, "START", 1.0)
    with pytest.raises(ValueError, match="the gradient of model.norm.weight is not"):
        train(language_model(), num_steps, batches, steep, settings, tmp_path, CPU)


# the dry run

def test_the_dry_run_counts_the_probabilities_that_attention_dropout_keeps():
    def activations(**changes):
        settings = config.Pretrain(batch_size=4, max_length=128, **changes)
        stage = stages.STAGES["pretrain"]
        batch = collate(estimate.items_of(stage, settings, None, None) * 4)
        model = language_model()
        return estimate.simulate(type(model), model.config, settings, sft_loss, batch, 1).peak["activations"]
    # The softmax's result in fp32, and the mask and the product that dropout adds.
    probs = 2 * 4 * 4 * 128 * 128
    assert activations(attention_dropout=0.1) > activations() + 4 * probs
    # A mask of one byte a value, for two places in each of two layers.
    assert activations(residual_dropout=0.1) == activations() + 2 * 2 * 4 * 128 * 32
    assert activations(dtype="float16") == activations(dtype="bfloat16") < activations()
