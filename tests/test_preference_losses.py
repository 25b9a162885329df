"""The losses on preference pairs and on labelled answers: each equation by hand, at its limits and against
TRL's formula; KTO's mismatched texts; what a loss refuses."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from small import CPU, language_model, logged, on_ranks, run, tokenizer

import train
from aya_min import config, kto, stages
from aya_min.config import DPO, KTO, SFT
from aya_min.data import collate_pairs, load_pairs, make_batches
from aya_min.distributed import Signals
from aya_min.files import write_jsonl
from aya_min.losses import (cdpo_loss, dpo_loss, hinge_loss, ipo_loss, kto_loss, preference_loss, simpo_loss,
                            unpaired_loss)
from aya_min.loop import gradients
from aya_min.loss_scale import LossScale
from aya_min.reference import store_reference

# What --loss needs beside its name.
LOSSES = {"sigmoid": {}, "ipo": {}, "hinge": {}, "cdpo": dict(label_smoothing=0.1),
          "simpo": dict(simpo_gamma=0.5)}


def logps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return -20 * torch.rand(*shape, generator=generator, dtype=torch.float64)


def nats_per_text(model, examples):
    """(N,) each example's log-prob from whole logits, without padding, and its number of tokens."""
    sums = []
    for example in examples:
        ids, mask = torch.from_numpy(example.ids).long(), torch.from_numpy(example.mask)[1:]
        every = model(ids[None])[0, :-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        sums.append(every[mask].sum())
    return torch.stack(sums), torch.tensor([int(example.mask.sum()) for example in examples])


# ---- equations on pairs ------------------------------------------------------------------------------------

POLICY, REFERENCE = torch.tensor([[-1.0], [-3.0]]), torch.tensor([[-2.0], [-2.0]])     # log ratios +1 and -1


def test_cdpo_by_hand():
    """beta 0.5, margin 1: nine tenths of log(1 + 1/e) and one tenth of log(1 + e)."""
    losses, rewards = cdpo_loss(POLICY, REFERENCE, 0.5, 0.1)
    by_hand = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.e)
    assert losses.tolist() == pytest.approx([by_hand]) and rewards.tolist() == [[0.5], [-0.5]]


def test_cdpo_without_smoothing_is_dpo_and_with_it_is_least_at_a_margin_of_its_log_odds():
    policy, ref = logps(2, 9), logps(2, 9, seed=1)
    torch.testing.assert_close(cdpo_loss(policy, ref, 0.3, 0.0), dpo_loss(policy, ref, 0.3), rtol=0, atol=0)
    policy = torch.tensor([[math.log(9)], [0.0]], dtype=torch.float64, requires_grad=True)
    cdpo_loss(policy, torch.zeros(2, 1), 1.0, 0.1)[0].sum().backward()
    torch.testing.assert_close(policy.grad, torch.zeros_like(policy.grad), rtol=0, atol=1e-12)


def test_ipo_by_hand():
    """h is 2 nats. beta 0.5 aims at 1 nat, so the loss is 1; beta 0.25 aims at 2, so it is 0."""
    assert ipo_loss(POLICY, REFERENCE, 0.5)[0].tolist() == [1.0]
    assert ipo_loss(POLICY, REFERENCE, 0.25)[0].tolist() == [0.0]
    assert ipo_loss(POLICY, REFERENCE, 0.5)[1].tolist() == [[0.5], [-0.5]]


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_pulls_the_margin_to_one_over_two_beta_from_both_sides(beta):
    aim = 1 / (2 * beta)
    policy = torch.tensor([[aim - 1, aim, aim + 1], [0.0] * 3], dtype=torch.float64, requires_grad=True)
    losses, _ = ipo_loss(policy, torch.zeros(2, 3, dtype=torch.float64), beta)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([1, 0, 1])
    assert policy.grad[0].tolist() == pytest.approx([-2, 0, 2])


def test_hinge_by_hand_and_silent_beyond_a_margin_of_1():
    """beta 0.25: the margin is 0.5, the loss 0.5. beta 1: the margin is 2."""
    policy = POLICY.clone().requires_grad_()
    losses, rewards = hinge_loss(policy, REFERENCE, 0.25)
    [gradient] = torch.autograd.grad(losses.sum(), policy)
    assert losses.tolist() == [0.5] and gradient.tolist() == [[-0.25], [0.25]]
    assert rewards.tolist() == [[0.25], [-0.25]] and not rewards.requires_grad
    losses, _ = hinge_loss(policy, REFERENCE, 1.0)
    [gradient] = torch.autograd.grad(losses.sum(), policy)
    assert losses.tolist() == [0.0] and gradient.tolist() == [[0.0], [0.0]]


def test_simpo_by_hand_and_without_a_margin_dpo_against_a_uniform_reference():
    """beta 2, mean log-probs -1 and -1.5: rewards -2 and -3, one apart; gamma 1 leaves log 2."""
    losses, rewards = simpo_loss(torch.tensor([[-1.0], [-1.5]]), 2.0, 1.0)
    assert losses.tolist() == pytest.approx([math.log(2)]) and rewards.tolist() == [[-2.0], [-3.0]]
    means = logps(2, 7)
    torch.testing.assert_close(simpo_loss(means, 0.7, 0.0)[0], dpo_loss(means, 0 * means, 0.7)[0])


def trl(loss, policy, ref, tokens, beta, label_smoothing=0.0, simpo_gamma=0.0):
    """The losses of TRL 1.16's trainers of DPO and (simpo, label smoothing) CPO, and of its ipo before it was
    divided by tokens, pair by pair and in plain Python."""
    log_sigmoid = lambda x: -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))
    losses = []
    for i in range(policy.shape[1]):
        (pw, pl), (rw, rl), (nw, nl) = (each[:, i].tolist() for each in (policy, ref, tokens))
        delta, mean_delta = (pw - rw) - (pl - rl), (pw - rw) / nw - (pl - rl) / nl
        losses.append({
            "sigmoid": lambda: -log_sigmoid(beta * delta), "hinge": lambda: max(0.0, 1 - beta * delta),
            "cdpo": lambda: (-log_sigmoid(beta * delta) * (1 - label_smoothing)
                             - log_sigmoid(-beta * delta) * label_smoothing),
            "ipo": lambda: (delta - 1 / (2 * beta)) ** 2,
            "ipo, length-normalized": lambda: (mean_delta - 1 / (2 * beta)) ** 2,
            "sigmoid, length-normalized": lambda: -log_sigmoid(beta * mean_delta),
            "simpo": lambda: -log_sigmoid(beta * (pw / nw - pl / nl - simpo_gamma / beta))}[loss]())
    return losses


@pytest.fixture(scope="module")
def pairs(world):
    return load_pairs([world / "pairs.jsonl"], tokenizer(), 256, SFT())[:6]


@pytest.mark.parametrize("name, beta", [
    ("sigmoid", 0.1), ("ipo", 0.1), ("cdpo", 0.3), ("hinge", 0.05), ("simpo", 2.0),
    ("sigmoid, length-normalized", 2.0), ("ipo, length-normalized", 0.5)])
def test_each_loss_of_a_batch_is_trls_formula_on_unpadded_texts(name, beta, pairs):
    loss, _, normalized = name.partition(", ")
    policy, reference = language_model(seed=5), language_model()
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    with torch.no_grad():
        own, tokens = nats_per_text(policy, sides)
        ref, _ = nats_per_text(reference, sides)
        for i, pair in enumerate(pairs):
            pair.ref_logps = ref[[i, i + 6]].numpy()
        batch = collate_pairs(pairs)
        batch.ref_logps = None if loss == "simpo" else batch.ref_logps
        made = preference_loss(beta, 0.0, loss, length_normalized=bool(normalized), **LOSSES[loss])
        total, metrics = made(policy, batch)
    both = (each.view(2, 6) for each in (own.double(), ref.double(), tokens))
    slow = trl(name, *both, beta, **LOSSES[loss])
    assert total.item() == pytest.approx(sum(slow), rel=1e-4)
    assert float(metrics["dpo_loss"][0].sum()) == pytest.approx(sum(slow), rel=1e-4)
    assert float(metrics["logps/chosen"][0].sum()) == pytest.approx(float(own[:6].sum()), rel=1e-5)


# ---- dpo --loss --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss, first", [("sigmoid", math.log(2)), ("cdpo", math.log(2)), ("ipo", 25.0),
                                         ("hinge", 1.0), ("simpo", None)])
def test_every_loss_starts_at_its_value_trains_and_reports_held_out_pairs(loss, first, world, tmp_path):
    rows = logged(run("dpo", world, tmp_path / "run", loss=loss, held_out=True, max_steps=12, nll_weight=0.0,
                      learning_rate=3e-3, **LOSSES[loss]))
    steps = [row for row in rows if "lr" in row]
    assert first is None or steps[0]["dpo_loss"] == pytest.approx(first, rel=1e-5)
    assert first is None or rows[0]["eval/dpo_loss"] == pytest.approx(first, rel=1e-5)
    before, after = (sum(row["rewards/margins"] for row in part) for part in (steps[:3], steps[-3:]))
    assert after > before and (tmp_path / "run" / "reference.safetensors").exists() == (loss != "simpo")


@pytest.mark.parametrize("stage, changes, says", [
    ("dpo", {}, r"the first DPO loss is 0\.\d+, not ln 2 = 0.693147"),
    ("dpo", dict(loss="cdpo", label_smoothing=0.1), r"the first cDPO loss is 0\.\d+, not ln 2 = 0.693147"),
    ("dpo", dict(loss="ipo"), r"the first IPO loss is \d+\.\d+, not \(1 / \(2 beta\)\)\^2 = 25.000000"),
    ("dpo", dict(loss="hinge", length_normalized=True, beta=9.0), r"the first hinge loss is \d.*, not 1 = "),
    ("kto", {}, r"the first KTO value is 0\.\d+, not sigmoid\(0\) = 0.500000")])
def test_a_start_where_policy_and_reference_differ_is_refused_by_the_losss_name(
    stage, changes, says, world, tmp_path
):
    model = language_model()
    model.model.norm.register_forward_hook(
        lambda module, inputs, output: output * 1.1 if module.training else output)
    data = world / ("pairs.jsonl" if stage == "dpo" else "labelled.jsonl")
    settings = stages.STAGES[stage].settings(batch_size=8, max_steps=1, **changes)
    with pytest.raises(ValueError, match=says + ".*policy and reference differ at the start"):
        stages.train_stage(stage, model, tokenizer(), [data], settings, tmp_path / "run", CPU)


@pytest.mark.parametrize("flags, says", [
    ("--loss ipo --label-smoothing 0.1", "--label-smoothing 0.1 goes with --loss cdpo; ipo does not read it"),
    ("--label-smoothing 0", "--label-smoothing 0.0 goes with --loss cdpo; sigmoid does not read it"),
    ("--loss hinge --simpo-gamma 1", "--simpo-gamma 1.0 goes with --loss simpo; hinge does not read it"),
    ("--loss cdpo", "--loss cdpo needs --label-smoothing, for example 0.1"),
    ("--loss simpo", "--loss simpo needs --simpo-gamma, for example 1"),
    ("--loss simpo --simpo-gamma 1 --length-normalized", "simpo always divides by the answer's tokens"),
    ("--loss simpo --simpo-gamma 1 --reference-logps FILE", "--reference-logps FILE: --loss simpo has no "),
    ("--loss cdpo --label-smoothing 0.5", "argument --label-smoothing: '0.5' must be"),
    ("--loss dance", "argument --loss: invalid choice: 'dance'"),
    ("--beta 0", "argument --beta: '0' must be")])
def test_what_a_loss_does_not_read_is_refused_before_the_model_is_looked_for(
    flags, says, world, tmp_path, in_process
):
    code, _, err = in_process(train, *f"dpo --model nowhere --data {world}/pairs.jsonl --out {tmp_path}/run "
                              f"{flags}".split())
    assert code == 2 and says in err[-1] and not (tmp_path / "run").exists(), err


# ---- KTO's equation ----------------------------------------------------------------------------------------

def test_kto_by_hand():
    """beta 0.5, z0 1. A wanted answer 3 nats up: value sigmoid(1). An unwanted one 3 nats up: sigmoid(-1); 1
    down: sigmoid(1). The weights 2 and 3 multiply the loss, not the value."""
    policy, labels = torch.tensor([3.0, 3.0, -1.0]), torch.tensor([True, False, False])
    losses, rewards, values = kto_loss(policy, torch.zeros(3), labels, torch.tensor(1.0), 0.5, 2.0, 3.0)
    up = 1 / (1 + math.exp(-1))
    assert values.tolist() == pytest.approx([up, 1 - up, up])
    assert losses.tolist() == pytest.approx([2 * (1 - up), 3 * up, 3 * (1 - up)])
    assert rewards.tolist() == [1.5, 1.5, -0.5]


def test_kto_takes_a_kl_below_0_for_0_and_gives_it_no_gradient():
    policy, labels = torch.tensor([0.3, -2.0], requires_grad=True), torch.tensor([True, False])
    at = lambda kl: kto_loss(policy, torch.zeros(2), labels, torch.tensor(kl), 0.5, 1.0, 1.0)[0]
    assert at(-7.0).tolist() == at(0.0).tolist() != at(0.5).tolist()
    at(0.0).sum().backward()
    slopes = [torch.sigmoid(torch.tensor(0.5 * r)).item() for r in (0.3, -2.0)]
    expected = [-0.5 * slopes[0] * (1 - slopes[0]), 0.5 * slopes[1] * (1 - slopes[1])]
    assert policy.grad.tolist() == pytest.approx(expected)


def test_a_large_beta_makes_kto_indifferent_to_what_is_already_far_on_its_side():
    policy = torch.tensor([9.0, -9.0, -9.0, 9.0], requires_grad=True)
    labels = torch.tensor([True, False, True, False])
    losses, _, _ = kto_loss(policy, torch.zeros(4), labels, torch.tensor(0.0), 100.0, 1.0, 1.0)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0, 1.0, 1.0] and (policy.grad == 0).all()


def trl_kto(policy, ref, labels, kl, beta, desirable_weight, undesirable_weight):
    """The losses as TRL 1.16 documents them, in plain Python. kl: the mean log ratio of the mismatched."""
    sigmoid, z0 = lambda x: 1 / (1 + math.exp(-x)), max(0.0, kl)
    ratios = [p - r for p, r in zip(policy, ref)]
    return [desirable_weight * (1 - sigmoid(beta * (ratio - z0))) if label else
            undesirable_weight * (1 - sigmoid(beta * (z0 - ratio))) for ratio, label in zip(ratios, labels)]


@pytest.fixture(scope="module")
def labelled(world, tmp_path_factory):
    """36 labelled answers with log-probs of a reference under which the mismatched are 5 nats less likely, so
    that z0 is not 0."""
    items = kto.load_labelled([world / "labelled.jsonl"], tokenizer(), 256, SFT())
    path = tmp_path_factory.mktemp("reference") / "file"
    store_reference(language_model(), items, 0, CPU, KTO(), path, "")
    for item in items:
        item.ref_logps = item.ref_logps - np.float32([0, 5])
    return items


def test_a_batch_of_kto_is_trls_formula_on_unpadded_texts_with_the_kl_of_the_whole_batch(labelled):
    policy, some = language_model(seed=5), labelled[:8]
    batch = kto.collate_labelled(some)
    with torch.no_grad():
        kto.measure_kl(policy, [([0], batch)], KTO(), CPU)
        total, metrics = unpaired_loss(0.1, 1.3, 0.7)(policy, batch)
        sides = zip(*(item.sides for item in some))
        own, other = (nats_per_text(policy, texts)[0].tolist() for texts in sides)
    ref, other_ref = np.stack([item.ref_logps for item in some], 1).tolist()
    kl = sum(a - b for a, b in zip(other, other_ref)) / 8
    assert kl > 1 and batch.kl.item() == pytest.approx(kl, rel=1e-4)
    labels = [item.label for item in some]
    slow = trl_kto(own, ref, labels, kl, 0.1, 1.3, 0.7)
    assert total.item() == pytest.approx(sum(slow), rel=1e-4)
    wanted = [0.1 * (p - r) for p, r, label in zip(own, ref, labels) if label]
    assert float(metrics["rewards/chosen"][0].sum()) == pytest.approx(sum(wanted), rel=1e-3)
    assert int(metrics["rewards/chosen"][1].sum()) == len(wanted) and int(metrics["loss"][1].sum()) == 8


def kto_step(items, size):
    """(loss, gradient norm, kl) of one step on all items, in micro-batches, on these ranks."""
    model, settings = language_model(seed=5), KTO(batch_size=len(items), micro_batch_size=size)
    model = stages.spread(model, settings, CPU)
    _, batches = make_batches(items, kto.collate_labelled, settings)
    some = stages.prepared(batches, lambda some: kto.measure_kl(model, some, settings, CPU))(0)
    loss_fn = unpaired_loss(0.1, 1.0, 1.0)
    scale = LossScale("float32")
    loss, _, norm, *_ = gradients(model, some, loss_fn, len(items), settings, Signals(), CPU, scale)
    return loss, float(getattr(norm, "full_tensor", lambda: norm)()), some[0].kl.item()


def test_the_kl_of_a_step_is_that_of_all_its_micro_batches_and_ranks(labelled):
    whole = kto_step(labelled[:8], 0)
    assert whole[2] > 1
    for size in (1, 2, 4):
        assert kto_step(labelled[:8], size) == pytest.approx(whole, rel=2e-5)
    for got in on_ranks(2, partial(kto_step, labelled[:8], 2)):
        assert got == pytest.approx(whole, rel=2e-5)
    # and it counts: a step whose kl were 0 has another loss
    assert kto_step([replace(item, ref_logps=item.ref_logps + np.float32([0, 99])) for item in labelled[:8]],
                    0)[0] != pytest.approx(whole[0], rel=1e-2)


def test_kto_learns_to_tell_wanted_from_unwanted(world, tmp_path):
    rows = logged(run("kto", world, tmp_path / "run", max_steps=25, learning_rate=3e-3, schedule="constant"))
    assert min(row["rewards/accuracies"] for row in rows[-3:]) > 0.7
    assert rows[0]["kto_value"] == pytest.approx(0.5, abs=1e-5) and rows[-1]["kto_value"] > 0.6
    assert rows[-1]["rewards/chosen"] > 0 > rows[-1]["rewards/rejected"]


# ---- KTO's rows --------------------------------------------------------------------------------------------

GOOD = {"prompt": "Name a colour.", "completion": "red", "label": True}
BAD = {"prompt": "Name a fruit.", "completion": "stone", "label": False}


def loaded(tmp_path, *rows, limit=256, reading=SFT()):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    return kto.load_labelled([path], tokenizer(), limit, reading)


def text_of(example):
    return tokenizer().decode(example.ids[example.mask][:-1].tolist())


def test_a_partner_has_the_same_prompt_and_another_prompts_answer_and_each_answer_is_one(tmp_path):
    """Two answers to a prompt follow each other, as in a file of pairs: at a distance of 1 they would
    meet."""
    rows = [{"prompt": f"Say {word}.", "completion": answer, "label": answer == word}
            for word in ("one", "two", "three") for answer in (word, f"not {word}")]
    items = loaded(tmp_path, *rows)
    assert [text_of(item.example) for item in items] == [row["completion"] for row in rows]
    partners = [text_of(item.mismatched) for item in items]
    assert partners == ["two", "not two", "three", "not three", "one", "not one"]
    for item in items:
        own, other = item.sides
        assert own.ids[~own.mask].tolist() == other.ids[~other.mask].tolist()
    assert [item.label for item in items] == [True, False] * 3


def test_a_partner_is_cut_at_the_limit_and_never_loses_its_prompt(tmp_path):
    rows = {**GOOD, "prompt": "Name a colour, " * 8}, {**BAD, "completion": "stone " * 20}
    limit = max(len(item.example.ids) for item in loaded(tmp_path, *rows))
    items = loaded(tmp_path, *rows, limit=limit)
    other = items[0].mismatched
    assert len(other.ids) == limit and 0 < other.mask.sum() < items[1].example.mask.sum()
    assert (other.mask[1:] >= other.mask[:-1]).all()


def test_a_prompt_of_messages_a_system_turn_and_renamed_keys_are_read(tmp_path):
    turns = [{"role": "user", "content": "Name a colour."}]
    row = {"prompt": turns, "completion": [{"role": "assistant", "content": "red"}], "label": True}
    plain, same, _ = loaded(tmp_path, GOOD, row, BAD)
    assert plain.example.ids.tolist() == same.example.ids.tolist()
    other, _ = loaded(tmp_path, {**GOOD, "system": "Be brief."}, BAD)
    assert len(other.example.ids) > len(plain.example.ids)
    theirs = {"question": "Name a colour.", "answer": "red", "thumb": True}
    columns = {"prompt": "question", "completion": "answer", "label": "thumb"}
    [one, _] = loaded(tmp_path, theirs, {"question": "b", "answer": "c", "thumb": False},
                      reading=SFT(columns=columns))
    assert one.example.ids.tolist() == plain.example.ids.tolist() and one.label is True


@pytest.mark.parametrize("row, says", [
    ({"label": 1}, "rows.jsonl:2: label must be true .*got 1"),
    ({"label": "true"}, "rows.jsonl:2: label must be true .*got 'true'"),
    ({"label": None}, "rows.jsonl:2: label must be true .*got None"),
    ({"chosen": "a", "rejected": "b"}, r"rows.jsonl:2: a preference pair \(chosen \+ rejected\).*kto needs"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     "rows.jsonl:2: messages cannot be labelled; kto needs prompt"),
    ({"completion": ""}, "rows.jsonl:2: 'completion' is empty"),
    ({"prompt": None}, "rows.jsonl:2: 'prompt' must be a string"),
    ({"text": "a"}, "rows.jsonl:2: two shapes in one row")])
def test_rows_of_another_shape_and_labels_that_are_no_booleans_are_refused_with_file_and_line(
    row, says, tmp_path
):
    with pytest.raises(ValueError, match=says):
        loaded(tmp_path, GOOD, {**BAD, **row})


def test_prompts_that_meet_their_own_answers_are_counted(tmp_path, capsys):
    rows = [{"prompt": "a" if i < 8 else str(i), "completion": "b", "label": i % 2 == 0} for i in range(10)]
    loaded(tmp_path, *rows)
    assert "6 of 10 prompts meet an answer to themselves" in capsys.readouterr().err


def test_a_row_without_a_label_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows.jsonl:2: label must be true .*got none"):
        loaded(tmp_path, BAD, {"prompt": "a", "completion": "b"})


@pytest.mark.parametrize("rows, says", [
    ([GOOD, {**BAD, "label": True}], "all 2 labels are true, and kto learns from wanted and unwanted"),
    ([{**GOOD, "label": False}, BAD], "all 2 labels are false"),
    ([GOOD, {**GOOD, "completion": "stone", "label": False}], "all prompts are the same")])
def test_one_label_or_one_prompt_alone_is_refused(rows, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        loaded(tmp_path, *rows)


def test_cut_and_unsupervised_answers_are_left_out_and_counted(tmp_path, capsys):
    items = loaded(tmp_path, GOOD, BAD, {**BAD, "finish_reason": "length"}, {**BAD, "weight": 0})
    said = capsys.readouterr().err
    assert len(items) == 2 and "1 of 4 examples have an answer that was cut" in said and "weight 0" in said
    assert len(loaded(tmp_path, GOOD, {**BAD, "finish_reason": "length"}, reading=SFT(keep_cut=True))) == 2


def test_a_bad_label_ends_the_command_with_one_line_and_leaves_nothing(world, tmp_path, in_process):
    from aya_min import weights
    weights.save(tmp_path / "model", language_model(), tokenizer())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "label": "good"}\n')
    code, out, err = in_process(train, *f"kto --model {tmp_path}/model --data {tmp_path}/rows.jsonl --out "
                                f"{tmp_path}/run".split())
    assert code == 2 and out == "" and len(err) == 1 and "rows.jsonl:1: label must be true" in err[0]
    assert not (tmp_path / "run").exists()


def test_a_step_without_an_unwanted_answer_logs_nothing_of_such(world, tmp_path):
    """It logged rewards and log-probs of 0."""
    rows = [{"prompt": f"Say {i}.", "completion": f"{i}", "label": i > 0} for i in range(12)]
    write_jsonl(tmp_path / "labelled.jsonl", rows)
    steps = logged(run("kto", tmp_path, tmp_path / "run", batch_size=4, max_steps=3))
    assert sorted("logps/rejected" in row for row in steps) == [False, False, True]
    assert all(row["logps/chosen"] < 0 for row in steps)


def test_every_choice_of_loss_is_tested_here():
    [field] = [field for field in config.fields(DPO) if field.name == "loss"]
    assert set(field.metadata["choices"]) == set(LOSSES)
