"""The one loop: what a step is must not depend on how the batch is cut, nor on whether the run was ever
stopped."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from small import CPU, STAGES, assert_close, language_model, logged, run, state_of, tokenizer

from aya_min import runs, stages
from aya_min.losses import sft_loss
from aya_min.config import SFT
from aya_min.data import batches_in_order, collate, load_examples, make_batches
from aya_min.loop import evaluate, json_line, learning_rate, make_optimizer, reduced, train


def weights_of(run_folder):
    return load_file(run_folder / "model" / "model.safetensors")


def assert_same_bits(folder, other):
    first, second = weights_of(folder), weights_of(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# cutting the batch

@pytest.mark.parametrize("stage", STAGES)
def test_one_micro_batch_of_8_is_8_of_1_in_loss_and_norm_and_every_metric(stage, world, tmp_path):
    """Answers have 2 to 100 supervised tokens: a mean of means would be far off."""
    whole = logged(run(stage, world, tmp_path / "whole", held_out=True))
    for size in (1, 2):
        cut = logged(run(stage, world, tmp_path / f"cut{size}", held_out=True, micro_batch_size=size))
        for rows in (
            whole,
            cut,
        ):  # before the first step chosen = rejected, and rounding decides who is ahead
            for row in rows[:2]:
                for key in [key for key in row if "rewards/accuracies" in key]:
                    del row[key]
        assert_close(whole, cut, rtol=2e-4, atol=2e-5)
    steps = [row for row in whole if "lr" in row]
    assert [row["step"] for row in steps] == [0, 1, 2] and all(row["grad_norm"] > 0 for row in steps)


def test_the_data_of_these_tests_have_very_different_numbers_of_supervised_tokens(world):
    counts = [int(e.mask.sum()) for e in load_examples([world / "sft.jsonl"], tokenizer(), 256, SFT())]
    assert min(counts) < 12 and max(counts) > 60


def test_the_logged_loss_is_the_mean_over_all_supervised_tokens_of_the_global_batch(world, tmp_path):
    row = logged(run("sft", world, tmp_path / "run", micro_batch_size=2))[0]
    settings = SFT(batch_size=8, max_steps=3)
    examples = load_examples([world / "sft.jsonl"], tokenizer(), 256, SFT())
    [batch] = make_batches(examples, collate, settings)[1](0)
    model = language_model()
    logps = (
        model(batch.input_ids).log_softmax(-1)[:, :-1].gather(2, batch.input_ids[:, 1:, None])[..., 0]
    )  # (B, T - 1)
    expected = -(logps * batch.mask[:, 1:]).sum() / batch.mask.sum()
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-6) and row["grad_norm"] == pytest.approx(
        norm.item(), rel=1e-5
    )
    assert row["tokens"] == batch.num_tokens


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_the_logged_loss_is_what_the_optimizer_minimizes_its_language_model_term_included(
    stage, world, tmp_path
):
    """It used to be the preference part alone, written over the loss by the metric of the same name."""
    weight = {"reward": "lm_weight", "dpo": "nll_weight"}[stage]
    without, with_term = (
        logged(run(stage, world, tmp_path / str(w), max_steps=1, **{weight: w}))[0] for w in (0.0, 0.5)
    )
    assert with_term["loss"] > without["loss"] + 0.5        # random models: several nats per token
    assert with_term["grad_norm"] != without["grad_norm"]


def test_activation_checkpointing_changes_nothing(world, tmp_path):
    plain = logged(run("sft", world, tmp_path / "plain"))
    recomputed = logged(run("sft", world, tmp_path / "recomputed", activation_checkpointing=True))
    assert_close(plain, recomputed, rtol=1e-6, atol=0)


def test_bfloat16_computes_in_bfloat16_and_keeps_fp32_weights(world, tmp_path):
    exact, rough = (
        logged(run("sft", world, tmp_path / dtype, dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    assert exact[0]["loss"] != rough[0]["loss"]
    assert_close(exact, rough, rtol=0.05, atol=0.05)
    assert {t.dtype for t in state_of(tmp_path / "bfloat16").values()} == {torch.float32}


def test_clipping_scales_the_gradient_and_logs_the_norm_before_it(world, tmp_path):
    """Adam hides a common factor of the gradient, but not from its second moments."""
    free, clipped = (
        run("sft", world, tmp_path / str(limit), max_steps=1, max_grad_norm=limit) for limit in (1e9, 0.5)
    )
    norm = logged(free)[0]["grad_norm"]
    assert norm > 1 and logged(clipped)[0]["grad_norm"] == norm
    moments = [state_of(folder)["model.norm.weight|exp_avg"] for folder in (free, clipped)]
    torch.testing.assert_close(moments[1], moments[0] * 0.5 / norm, rtol=1e-5, atol=1e-9)
    unbounded = state_of(run("sft", world, tmp_path / "0", max_steps=1, max_grad_norm=0.0))
    assert torch.equal(unbounded["model.norm.weight|exp_avg"], moments[0])


# learning rate and optimizer

def test_warm_up_rises_in_equal_parts_and_reaches_the_peak_at_its_last_step():
    settings = SFT(learning_rate=1.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(step, 10, settings) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_cosine_starts_at_the_peak_is_half_way_in_the_middle_and_ends_at_its_floor():
    settings = SFT(learning_rate=2.0, warmup_steps=2, final_learning_rate=0.1)
    rates = [learning_rate(step, 7, settings) for step in range(7)]
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2 * quarter, 2 * 0.55, 2 * (1.1 - quarter), 2 * 0.1])


def test_a_run_shorter_than_its_warm_up_still_reaches_the_peak():
    settings = SFT(learning_rate=1.0, warmup_steps=100)
    assert [learning_rate(step, 3, settings) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_without_warm_up_the_first_step_is_at_the_peak_and_a_single_step_too():
    settings = SFT(learning_rate=1.0, warmup_steps=0)
    assert learning_rate(0, 5, settings) == learning_rate(0, 1, settings) == 1.0


def test_the_learning_rate_of_each_step_is_logged(world, tmp_path):
    rows = logged(
        run(
            "sft",
            world,
            tmp_path / "run",
            max_steps=4,
            warmup_steps=2,
            learning_rate=0.01,
            final_learning_rate=0.5,
        )
    )
    assert [row["lr"] for row in rows] == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_weight_decay_is_for_matrices_only_and_tied_weights_are_one_parameter():
    model = language_model()
    optimizer = make_optimizer(model, SFT(weight_decay=0.1))
    groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert all(p.dim() == 1 for p in groups[0.0]) and all(p.dim() == 2 for p in groups[0.1])
    assert sum(len(params) for params in groups.values()) == len(list(model.parameters())) == 2 + 2 * 8


# logs

def test_metrics_are_sums_over_counts_overall_and_per_language():
    table = torch.zeros(2, 4, dtype=torch.float64)                      # ar fr tlh other
    table[:, 1], table[:, 0], table[:, 3] = (
        torch.tensor([6.0, 2.0]),
        torch.tensor([1.0, 1.0]),
        torch.tensor([3.0, 1.0]),
    )
    row = reduced({"loss": table, "margin": table}, ("ar", "fr", "tlh", "other"))
    assert row == {
        "loss": 2.5,
        "loss/fr": 3.0,
        "loss/ar": 1.0,
        "margin": 2.5,
    }  # "other" has no line of its own


def test_a_number_that_is_not_finite_is_written_as_a_string_because_json_has_no_nan():
    line = json_line({"step": 1, "loss": math.nan, "norm": math.inf, "lr": 1 / 3})
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": "nan",
        "norm": "inf",
        "lr": 0.3333333,
    }


# what must not reach the weights

def spoiled(at, spoil):
    """sft_loss whose call number `at` goes through `spoil`."""
    calls = iter(range(1000))

    def loss_fn(model, batch):
        loss, metrics = sft_loss(model, batch)
        return (spoil(model, loss) if next(calls) == at else loss), metrics
    return loss_fn


@pytest.mark.parametrize(
    "what, spoil",
    [
        ("loss nan", lambda model, loss: loss * math.nan),
        ("loss inf", lambda model, loss: loss + math.inf),
        ("gradient norm nan", lambda model, loss: loss + (0 * model.model.norm.weight.sum()).sqrt()),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_the_weights_move(
    what, spoil, world, tmp_path
):
    settings = SFT(
        batch_size=8, micro_batch_size=4, max_steps=4, learning_rate=1e-2, warmup_steps=0, schedule="constant"
    )
    num_steps, batches = make_batches(
        load_examples([world / "sft.jsonl"], tokenizer(), 256, SFT()), collate, settings
    )
    spoiled_model, whole_model = language_model(), language_model()
    with pytest.raises(ValueError, match=f"step 2: .*{what}.*stopped before the weights moved"):
        train(
            spoiled_model, num_steps, batches, spoiled(5, spoil), settings, tmp_path, CPU
        )  # the second micro-batch of step 2
    assert [row["step"] for row in logged(tmp_path)] == [0, 1] and not (tmp_path / "state").exists()
    (tmp_path / "whole").mkdir()
    train(whole_model, 2, batches, sft_loss, settings, tmp_path / "whole", CPU)
    for (name, p), q in zip(spoiled_model.named_parameters(), whole_model.parameters()):
        assert torch.equal(p, q), name


def test_a_first_step_that_its_stage_refuses_moves_nothing(world, tmp_path):
    settings = SFT(batch_size=8, max_steps=4)
    num_steps, batches = make_batches(
        load_examples([world / "sft.jsonl"], tokenizer(), 256, SFT()), collate, settings
    )
    model, untouched = language_model(), language_model()

    def refuse(metrics):
        raise ValueError(f"refused at {metrics['loss']:.3f}")
    with pytest.raises(ValueError, match=r"refused at \d"):
        train(model, num_steps, batches, sft_loss, settings, tmp_path, CPU, check_first=refuse)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters()))
    assert not (tmp_path / "metrics.jsonl").exists()


# stopping and going on


@pytest.mark.parametrize(
    "stage",
    [
        "sft",
        pytest.param("reward", marks=pytest.mark.long),
        pytest.param("dpo", marks=pytest.mark.long),
        "rl",
    ],
)
def test_stopped_twice_and_resumed_is_never_stopped_bit_for_bit(stage, world, tmp_path):
    """11 steps of 8 over 36 examples: three epochs, and a border inside a batch. The sampler's whole state
    is the step."""
    always = dict(schedule="constant", held_out=True, eval_every=2, weight_decay=0.1)
    whole = run(stage, world, tmp_path / "whole", max_steps=11, **always)
    for i, steps in enumerate((4, 9, 11)):
        parts = run(stage, world, tmp_path / "parts", resume=i > 0, max_steps=steps, **always)
    assert_same_bits(whole, parts)
    assert [row for row in logged(parts) if row["step"] != 9 or "lr" in row] == logged(
        whole
    )  # a part ends with an evaluation of its own


class Stopped(Exception):
    """Ctrl-C, a full disk, a lost machine."""


@pytest.mark.parametrize("eval_every", [0, 2, 3])
def test_a_run_killed_between_saves_writes_the_metrics_of_one_never_killed(eval_every, world, tmp_path):
    """The evaluation at a saved step was lost: resuming dropped its line, and did not evaluate again."""
    settings = SFT(
        batch_size=8, max_steps=9, learning_rate=1e-3, warmup_steps=2, save_every=3, eval_every=eval_every
    )
    examples = load_examples([world / "sft.jsonl"], tokenizer(), 256, SFT())
    held_out = load_examples([world / "held-out-sft.jsonl"], tokenizer(), 256, SFT())
    num_steps, batches = make_batches(examples, collate, settings)

    def part(folder, stop_at=None, resume=False):
        def stopping(step):
            if step == stop_at:
                raise Stopped
            return batches(step)
        with runs.open_run(folder, "sft", settings, [], resume, tokenizer(), None, {}, num_steps) as held:
            model, in_order = language_model(), batches_in_order(held_out, collate)
            stages.train_and_publish(
                "sft",
                model,
                tokenizer(),
                num_steps,
                stopping,
                sft_loss,
                settings,
                held,
                CPU,
                evaluation=lambda: evaluate(model, sft_loss, in_order, CPU),
            )

    part(tmp_path / "whole")
    for stop_at, resume in ((5, False), (8, True)):  # after the save at 3, after the one at 6
        with pytest.raises(Stopped):
            part(tmp_path / "killed", stop_at, resume)
    part(tmp_path / "killed", resume=True)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert_same_bits(tmp_path / "killed", tmp_path / "whole")
    assert (tmp_path / "killed" / "eval.json").read_text() == (tmp_path / "whole" / "eval.json").read_text()


def test_resuming_a_finished_run_changes_nothing(world, tmp_path):
    folder = run("sft", world, tmp_path / "run", held_out=True)
    rows, weights = logged(folder), weights_of(folder)
    run("sft", world, folder, resume=True, held_out=True)
    assert logged(folder) == rows
    assert all(torch.equal(weights[name], t) for name, t in weights_of(folder).items())


def test_a_line_cut_short_by_a_kill_is_dropped_on_resume(world, tmp_path):
    folder = run("sft", world, tmp_path / "run", max_steps=2, schedule="constant")
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "lo')
    run("sft", world, folder, resume=True, max_steps=3, schedule="constant")
    assert [row["step"] for row in logged(folder)] == [0, 1, 2]
