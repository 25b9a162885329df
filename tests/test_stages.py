"""The stages side by side: their loss functions by hand, the reference of DPO, what a run folder holds,
and what is refused."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small import (
    CPU,
    FRESH,
    STAGES,
    assert_close,
    language_model,
    logged,
    reward_model,
    run,
    state_of,
    tokenizer,
    write_world,
)

from aya_min import reference, stages, weights
from aya_min.losses import policy_gradient_loss, preference_loss, reward_loss, sft_loss
from aya_min.config import DPO, RL, SFT
from aya_min.data import collate, collate_pairs, load_examples, load_pairs, slots_of
from aya_min.losses import rloo_advantages
from aya_min.sampling import generate
from aya_min.merge_folders import merge_folders
from aya_min.files import write_jsonl


@pytest.fixture(scope="module")
def pairs(world, tmp_path_factory):
    loaded = load_pairs([world / "pairs.jsonl"], tokenizer(), 256, SFT())[:6]
    reference.store_reference(
        language_model(), loaded, 0, CPU, DPO(), tmp_path_factory.mktemp("reference") / "file", ""
    )
    return loaded


def full_logps(model, example):
    """Sum of the supervised tokens' log-probs of one unpadded example, from its whole logits."""
    ids = torch.from_numpy(example.ids).long()
    logps = model(ids[None])[0, :-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    return logps[torch.from_numpy(example.mask)[1:]].sum()


def overall(metric):
    return float(metric[0].sum() / metric[1].sum())


# loss functions

def test_sft_is_the_summed_nats_of_the_supervised_tokens(world):
    examples, model = load_examples([world / "sft.jsonl"], tokenizer(), 256, SFT())[:5], language_model()
    slots = slots_of(examples)
    loss, metrics = sft_loss(model, collate(examples, slots=slots))
    torch.testing.assert_close(loss, -sum(full_logps(model, e) for e in examples), rtol=1e-5, atol=0)
    assert metrics["loss"][1].sum() == sum(e.mask.sum() for e in examples)
    same = [e for e in examples if e.language == examples[0].language]
    assert float(metrics["loss"][0, slots.index(examples[0].language)]) == pytest.approx(
        -sum(full_logps(model, e).item() for e in same), rel=1e-5
    )


def test_dpo_is_minus_log_sigmoid_of_beta_times_the_difference_of_log_ratios(pairs):
    policy, reference, beta = language_model(seed=5), language_model(), 0.3
    loss, metrics = preference_loss(beta, 0.0)(policy, collate_pairs(pairs))
    ratio = torch.stack(
        [
            torch.stack(
                [full_logps(policy, side) - full_logps(reference, side) for side in (p.chosen, p.rejected)]
            )
            for p in pairs
        ]
    )
    expected = -F.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1]))
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-4, atol=1e-4)
    assert overall(metrics["rewards/chosen"]) == pytest.approx(
        (beta * ratio[:, 0].mean()).item(), rel=1e-4, abs=1e-4
    )
    assert overall(metrics["rewards/margins"]) == pytest.approx(
        (beta * (ratio[:, 0] - ratio[:, 1]).mean()).item(), rel=1e-4, abs=1e-4
    )
    accuracy = (ratio[:, 0] > ratio[:, 1]).double().mean().item()
    assert overall(metrics["rewards/accuracies"]) == pytest.approx(accuracy)
    assert overall(metrics["logps/rejected"]) == pytest.approx(
        sum(full_logps(policy, p.rejected).item() for p in pairs) / 6, rel=1e-5
    )


def test_the_nll_beside_dpo_is_the_chosen_answers_nats_per_token(pairs):
    model, batch = language_model(seed=5), collate_pairs(pairs)
    plain, with_nll = (preference_loss(0.1, weight)(model, batch)[0] for weight in (0.0, 2.0))
    expected = sum(-full_logps(model, p.chosen) / int(p.chosen.mask.sum()) for p in pairs)
    torch.testing.assert_close((with_nll - plain) / 2, expected, rtol=1e-4, atol=1e-4)


def test_the_reward_loss_is_bradley_terry_of_the_scores_and_the_chosen_answers_nats_per_token(pairs):
    model, batch = reward_model(), collate_pairs(pairs)
    scores, _ = model(batch.input_ids, batch.lengths, batch.mask)
    loss, metrics = reward_loss(0.5)(model, batch)
    preferred = -F.logsigmoid(scores[:6] - scores[6:])
    as_language_model = language_model()
    as_language_model.model = model.model
    nll = torch.stack([-full_logps(as_language_model, p.chosen) / int(p.chosen.mask.sum()) for p in pairs])
    torch.testing.assert_close(loss, (preferred + 0.5 * nll).sum(), rtol=1e-4, atol=1e-4)
    assert overall(metrics["accuracy"]) == pytest.approx(float((scores[:6] > scores[6:]).float().mean()))
    assert overall(metrics["bt_loss"]) == pytest.approx(preferred.mean().item(), rel=1e-4)
    assert overall(metrics["lm_loss"]) == pytest.approx(nll.mean().item(), rel=1e-4)


def test_the_policy_gradient_raises_what_did_better_than_its_siblings(pairs):
    """The gradient of the loss is that of -sum A log pi; rewards that are all equal give none."""
    model, batch = language_model(), collate([p.chosen for p in pairs[:2]] + [p.rejected for p in pairs[:2]])
    batch.ref_logps, batch.rewards, batch.count = torch.zeros(4), torch.tensor([3.0, 1.0, 1.0, 1.0]), 4
    batch.cut = torch.zeros(4)
    for rewards, silent in ((batch.rewards, False), (torch.full((4,), 2.5), True)):
        batch.advantages = rloo_advantages(rewards.view(2, 2)).flatten()
        model.zero_grad()
        policy_gradient_loss(model, batch)[0].backward()
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        if silent:
            assert all((g == 0).all() for g in got)
            continue
        assert batch.advantages.tolist() == [2.0, -2.0, 0.0, 0.0]
        (-2 * full_logps(model, pairs[0].chosen) + 2 * full_logps(model, pairs[1].chosen)).backward()
        for g, p in zip(got, model.parameters()):
            torch.testing.assert_close(g, p.grad, rtol=1e-3, atol=1e-4)


def test_the_kl_of_a_batch_is_log_policy_minus_log_reference_per_completion(pairs):
    model, batch = language_model(), collate([p.chosen for p in pairs])
    batch.ref_logps, batch.rewards, batch.advantages = torch.arange(6.0), torch.zeros(6), torch.zeros(6)
    batch.cut = torch.zeros(6)
    _, metrics = policy_gradient_loss(model, batch)
    logps = torch.stack([full_logps(model, p.chosen) for p in pairs])
    assert overall(metrics["kl"]) == pytest.approx((logps - batch.ref_logps).mean().item(), rel=1e-5)
    assert overall(metrics["entropy"]) == pytest.approx(-logps.mean().item(), rel=1e-5)


def test_padding_changes_no_loss(pairs):
    model = language_model(seed=5)
    plain, padded = collate_pairs(pairs), collate_pairs(pairs)
    padded.input_ids, padded.mask = F.pad(plain.input_ids, (0, 37)), F.pad(plain.mask, (0, 37))
    for loss_fn, net in (
        (preference_loss(0.1, 0.2), model),
        (reward_loss(0.3), reward_model()),
        (sft_loss, model),
    ):
        torch.testing.assert_close(loss_fn(net, padded)[0], loss_fn(net, plain)[0], rtol=1e-5, atol=1e-5)


# the reference of DPO

@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 3e-4)])
def test_the_first_dpo_loss_is_ln_2(dtype, tolerance, world, tmp_path):
    """In bfloat16 the reference used to be computed in fp32: off by the rounding of every token of the
    answer."""
    row = logged(run("dpo", world, tmp_path / "run", dtype=dtype, max_steps=1))[0]
    assert row["dpo_loss"] == pytest.approx(math.log(2), abs=tolerance)
    assert row["rewards/margins"] == pytest.approx(0, abs=10 * tolerance)


def test_a_policy_that_differs_from_its_reference_at_the_start_is_refused_before_it_moves(world, tmp_path):
    """As with dropout: the model that trains is not the one that was asked for the reference's log-probs."""
    model = language_model()
    model.model.norm.register_forward_hook(
        lambda module, inputs, output: output * 1.1 if module.training else output
    )
    with pytest.raises(
        ValueError, match=r"the first DPO loss is \d.*not ln 2 = 0.693147: policy and reference differ"
    ):
        stages.train_stage(
            "dpo",
            model,
            tokenizer(),
            [world / "pairs.jsonl"],
            DPO(batch_size=8, max_steps=2),
            tmp_path / "run",
            CPU,
        )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), language_model().parameters()))


def test_the_reference_is_stored_with_the_pair_it_belongs_to_whatever_its_length(pairs):
    model = language_model()
    for pair in pairs:
        assert pair.ref_logps == pytest.approx(
            [full_logps(model, side).item() for side in (pair.chosen, pair.rejected)], rel=1e-5
        )


# that they train

def test_a_model_overfitted_on_one_answer_says_it_and_stops(tmp_path):
    """The end token is supervised: what never learns to stop has lost it, or padding took its place."""
    write_jsonl(
        tmp_path / "one.jsonl", [{"prompt": "Name three colours.", "completion": "red, green, blue"}] * 8
    )
    model = language_model(initializer_range=0.08)
    settings = SFT(batch_size=8, max_steps=40, learning_rate=1e-2, warmup_steps=0)
    stages.train_stage("sft", model, tokenizer(), [tmp_path / "one.jsonl"], settings, tmp_path / "run", CPU)
    [[completion]] = generate(
        model,
        [tokenizer().encode_prompt("Name three colours.")],
        max_new_tokens=40,
        temperature=0,
        stop_ids=[tokenizer().end_of_turn_id],
    )
    assert tokenizer().decode(completion.ids) == "red, green, blue" and completion.finish_reason == "stop"


def test_dpo_and_the_reward_model_learn_to_tell_chosen_from_rejected(world, tmp_path):
    dpo = logged(run("dpo", world, tmp_path / "dpo", max_steps=25, learning_rate=3e-3, schedule="constant"))
    reward = logged(
        run("reward", world, tmp_path / "reward", max_steps=25, learning_rate=3e-3, schedule="constant")
    )
    assert min(row["rewards/accuracies"] for row in dpo[-3:]) > 0.8 and dpo[-1]["dpo_loss"] < 0.4
    assert min(row["accuracy"] for row in reward[-3:]) > 0.8 and reward[-1]["bt_loss"] < 0.5


def test_rloo_raises_the_reward_of_its_own_samples(world, tmp_path):
    rows = logged(
        run(
            "rl",
            world,
            tmp_path / "run",
            max_steps=25,
            learning_rate=1e-2,
            warmup_steps=0,
            num_samples=4,
            max_new_tokens=1,
            beta=0.0,
        )
    )
    mean = lambda part: sum(row["reward"] for row in part) / len(part)
    assert mean(rows[-4:]) > mean(rows[:4]) + 0.5
    assert abs(rows[0]["kl"]) < 1e-4 < rows[-1]["kl"]


def test_a_larger_beta_keeps_rloo_nearer_to_where_it_started(world, tmp_path):
    free, held = (
        logged(
            run(
                "rl",
                world,
                tmp_path / str(beta),
                max_steps=12,
                learning_rate=1e-2,
                num_samples=4,
                max_new_tokens=1,
                beta=beta,
            )
        )
        for beta in (0.0, 1.0)
    )
    assert free[0]["loss"] == pytest.approx(
        held[0]["loss"], rel=1e-4
    )  # at the start there is no distance (but rounding: sampler against trainer)
    assert sum(row["kl"] for row in held[-4:]) < 0.7 * sum(row["kl"] for row in free[-4:])


def test_reference_log_probs_on_disk_spare_the_next_run_its_pass_and_are_refused_for_any_other(
    world, tmp_path, monkeypatch
):
    """Of the same model, pairs and dtype they are taken to the last bit; of others, or damaged, they are
    named and left as they are."""
    file, passes, of_model = tmp_path / "reference.safetensors", [], reference.answer_logps
    monkeypatch.setattr(reference, "answer_logps", lambda *args: passes.append(args) or of_model(*args))
    dpo = lambda name, data=world, **changes: logged(
        run("dpo", data, tmp_path / name, reference_logps=file, **changes)
    )
    assert dpo("first") == dpo("second") == logged(run("dpo", world, tmp_path / "own")) and len(passes) == 2
    assert (
        dpo("another beta", beta=0.5)[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
        and len(passes) == 2
    )
    kept, says = file.read_bytes(), f"^{file}: not the reference log-probs of this model, these pairs and "
    (tmp_path / "other").mkdir()
    for name, changes in {
        "model": dict(architecture=dict(num_hidden_layers=1)),
        "pairs": dict(data=write_world(tmp_path / "other", count=40)),
        "dtype": dict(dtype="bfloat16"),
    }.items():
        with pytest.raises(ValueError, match=says):
            dpo(name, **changes)
    assert file.read_bytes() == kept
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match=says + "float32; remove it, or give another file"):
        dpo("damaged")


@pytest.mark.parametrize("stage", STAGES)
def test_packing_changes_neither_loss_nor_gradient_norm_of_a_stage(stage, world, tmp_path):
    """In dpo, reward and rloo what the rows of one prompt have in common is computed once."""
    plain, packed = (
        logged(run(stage, world, tmp_path / str(packing), packing=packing)) for packing in (False, True)
    )
    assert_close(plain, packed, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_bits_and_another_seed_other_batches(stage, world, tmp_path):
    first, again, other = (
        run(stage, world, tmp_path / name, seed=seed)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    bits = [load_file(folder / "model" / "model.safetensors") for folder in (first, again)]
    assert all(torch.equal(bits[0][name], bits[1][name]) for name in bits[0])
    assert logged(first) == logged(again) and [row["tokens"] for row in logged(first)] != [
        row["tokens"] for row in logged(other)
    ]


# run folders

@pytest.mark.parametrize("stage", STAGES)
def test_a_run_folder_holds_what_the_design_says(stage, world, tmp_path):
    folder = run(stage, world, tmp_path / "run", held_out=True)
    expected = {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "model",
        "state",
        "tokenizer.json",
        "tokenizer_config.json",
        "eval.json",
    } | ({"reference.safetensors"} if stage in ("dpo", "kto") else set())
    assert {path.name for path in folder.iterdir()} == expected
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (
        about["stage"] == stage
        and about["settings"]["batch_size"] == 8
        and about["versions"]["torch"] == torch.__version__
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "lr" in row]
    assert all(
        {"step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second"} <= row.keys()
        for row in steps
    )
    model, _ = weights.load(folder / "model")
    state = state_of(folder)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert [row["step"] for row in rows if "lr" not in row] == [0, 3]
    last = {k.removeprefix("eval/"): v for k, v in rows[-1].items() if k.startswith("eval/")}
    assert json.loads((folder / "eval.json").read_text()) == last
    assert any(key.startswith("reward/" if stage == "rl" else "loss/") for key in last)


def test_published_checkpoints_are_the_model_at_their_steps_and_average_to_their_mean(world, tmp_path):
    folder = run("sft", world, tmp_path / "run", max_steps=6, publish_every=2, schedule="constant")
    parts = [folder / "checkpoints" / f"step-{step}" for step in (2, 4, 6)]
    assert sorted((folder / "checkpoints").iterdir()) == parts
    states = [load_file(part / "model.safetensors") for part in parts]
    short = load_file(
        run("sft", world, tmp_path / "short", max_steps=4, schedule="constant")
        / "model"
        / "model.safetensors"
    )
    assert all(torch.equal(states[1][name], t) for name, t in short.items()) and any(
        (states[0][name] != t).any() for name, t in short.items()
    )
    merged = load_file(merge_folders(parts[-2:], tmp_path / "merged", "linear") / "model.safetensors")
    assert all(
        torch.allclose(t, (states[1][name] + states[2][name]) / 2, rtol=0, atol=1e-7)
        for name, t in merged.items()
    )


def test_the_run_is_described_before_its_first_step_and_nothing_is_left_if_that_one_fails(world, tmp_path):
    model, seen = language_model(), []
    model.register_forward_pre_hook(
        lambda *_: seen.append({path.name for path in (tmp_path / "run").iterdir()})
    )
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="step 0: loss nan"):
        stages.train_stage(
            "sft", model, tokenizer(), [world / "sft.jsonl"], SFT(batch_size=8), tmp_path / "run", CPU
        )
    assert (
        seen == [{".lock", "config.json", "tokenizer.json", "tokenizer_config.json"}]
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize(
    "stage, line, says",
    [
        ("sft", '{"prompt": "x"}', "bad.jsonl:1: no example in keys"),
        ("sft", "{", "bad.jsonl:1: not JSON"),
        ("dpo", '{"prompt": "x", "chosen": "y"}', "bad.jsonl:1: no preference pair"),
        ("reward", '{"prompt": "x", "chosen": "", "rejected": "z"}', "'chosen' is empty"),
        ("rl", '{"question": "x"}', "bad.jsonl:1: no prompt"),
        ("sft", '{"prompt": "x", "completion": "y"}', "1 examples are fewer than one batch of 8"),
        ("rl", '{"prompt": "x"}', "fewer than one batch"),
        ("dpo", '{"prompt": "x", "chosen": "y", "rejected": "z"}', "fewer than one batch"),
    ],
)
def test_data_that_are_refused_leave_no_run_folder_in_the_way_of_the_next_attempt(
    stage, line, says, tmp_path
):
    """The folder used to be made first: with the data mended, the same command was refused because of it."""
    function, settings_class, _ = STAGES[stage]
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    more = {"reward_model": reward_model()} if stage == "rl" else {}
    with pytest.raises(ValueError, match=says):
        function(
            FRESH.get(stage, language_model)(),
            tokenizer(),
            [tmp_path / "bad.jsonl"],
            settings_class(batch_size=8),
            tmp_path / "run",
            CPU,
            **more,
        )
    assert not (tmp_path / "run").exists()


def test_a_folder_with_anything_in_it_is_not_written_into(world, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty; give a new folder, or --resume"):
        run("sft", world, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_with_other_settings_or_other_data_is_refused(world, tmp_path):
    folder = run("sft", world, tmp_path / "run")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="that run had batch_size 8, not 4; seed 0, not 7"):
        run("sft", world, folder, resume=True, batch_size=4, seed=7)
    with pytest.raises(ValueError, match="that is a run of 'sft', not 'dpo'"):
        run("dpo", world, folder, resume=True)
    (tmp_path / "copy").mkdir()
    run("sft", write_world(tmp_path / "copy"), folder, resume=True)             # the same content, elsewhere
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="that run had other data: .*other/sft.jsonl"):
        run("sft", write_world(tmp_path / "other", count=40), folder, resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_resuming_with_fewer_steps_than_were_done_is_refused(world, tmp_path):
    """The later weights used to be saved as those of the earlier step."""
    folder = run("sft", world, tmp_path / "run", max_steps=3)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="has done 3 steps, more than the 2 that are asked for"):
        run("sft", world, folder, resume=True, max_steps=2)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_resuming_what_was_never_started_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="no config.json in it"):
        run("sft", world, tmp_path / "run", resume=True)


def test_rloo_refuses_a_prompt_that_leaves_no_room_and_a_single_sample_before_it_starts(world, tmp_path):
    for changes, says in (
        (dict(max_new_tokens=500, max_length=600), r"prompts.jsonl:1: the prompt has .*: 12 "),
        (dict(max_new_tokens=250), r"prompts.jsonl:1: the prompt has .*: 6 "),
        (dict(num_samples=1), "at least 2 samples"),
    ):
        with pytest.raises(ValueError, match=says):
            run("rl", world, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()


def test_every_setting_of_rloo_is_one_that_it_uses():
    """--temperature was accepted and had no effect: samples are drawn at temperature 1, where the
    log-probs are taken."""
    assert "temperature" not in vars(RL())


def test_a_recipes_batch_holds_all_rows_where_some_are_too_long_for_a_whole_one(world, tmp_path):
    """A cluster as small as a batch, one of whose rows was longer than --max-length, ended the recipe."""
    with pytest.raises(ValueError, match="fewer than one batch of 500"):
        stages.train_stage("sft", language_model(), tokenizer(), [world / "sft.jsonl"],
                           SFT(batch_size=500, max_steps=1), tmp_path / "strict", CPU)
    stages.train_stage("sft", language_model(), tokenizer(), [world / "sft.jsonl"],
                       SFT(batch_size=500, max_steps=1), tmp_path / "run", CPU, smaller_batches=True)
    about = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert 1 < about["settings"]["batch_size"] < 500
