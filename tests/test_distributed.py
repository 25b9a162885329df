"""Two ranks (gloo, FSDP2) against one: the same numbers, the same weights, the same answers, the same
refusals. One launch for all tests."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small import (
    CPU,
    STAGES,
    TORCHRUN,
    VARIANTS,
    assert_close,
    language_model,
    logged,
    on_ranks,
    on_these_ranks,
    program,
    run,
    state_of,
    tokenizer,
    write_world,
)

from aya_min import distributed, weights
from aya_min.command import one_line
from aya_min.config import Recipe
from aya_min.experiments import Lab
from aya_min.files import write_new
from aya_min.languages import CLUSTERS
from aya_min.pipeline_results import Results
from aya_min.pipeline_steps import Run, data_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """world/ data; one/ and two/ what one and two ranks made of it; resumed/ stopped at one rank, again at
    two, ended at one; whole/ never stopped."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "world").mkdir()
    world, resumed = write_world(folder / "world"), dict(schedule="constant", held_out=True, eval_every=4)
    run("sft", world, folder / "resumed", max_steps=4, **resumed)
    done = program(*TORCHRUN, "tests/small.py", world, folder / "two")
    assert done.returncode == 0, done.stderr[-4000:]
    run("sft", world, folder / "resumed", resume=True, max_steps=12, **resumed)
    run("sft", world, folder / "whole", max_steps=12, **resumed)
    results = on_these_ranks(world, folder / "one")
    (folder / "one" / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one_and_two(folder):
    return [
        json.loads((folder / name / "results.json").read_text(encoding="utf-8")) for name in ("one", "two")
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_log_the_losses_norms_and_metrics_of_one(stage, folder):
    """The global batch of 8 is cut 4 + 4 over the ranks, and there in micro-batches of 2, with very
    different numbers of supervised tokens."""
    one, two = logged(folder / "one" / stage), logged(folder / "two" / stage)
    for row in (
        one[0],
        two[0],
        one[1],
        two[1],
    ):  # before the first step chosen = rejected, and rounding decides who is ahead
        for key in [key for key in row if "rewards/accuracies" in key]:
            del row[key]
    assert_close(one, two, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_so_they_do_with_recomputed_activations_an_untied_head_and_bfloat16(variant, folder):
    one, two = logged(folder / "one" / variant), logged(folder / "two" / variant)
    rough = variant.endswith("bfloat16")  # 8 bits: kl, margins and accuracies start from rounding alone
    for rows in (one, two):
        rows[:] = [
            {
                k: v
                for k, v in row.items()
                if not rough
                or k in ("loss", "grad_norm", "lr", "tokens", "step", "lm_loss", "logps/chosen", "entropy")
            }
            for row in rows
        ]
        for row in rows if variant == "rl-bfloat16" else []:
            del row["loss"]                             # near 0, a difference of large numbers
    assert_close(one, two, rtol=0.05 if rough else 2e-4, atol=2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_publish_the_weights_of_one(stage, folder):
    one, two = (load_file(folder / name / stage / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("what", ["language model", "reward model", "trunk"])
def test_a_folder_loaded_sharded_is_whole_and_each_rank_reads_its_rows_only(what, one_and_two):
    """Odd numbers of rows, one row for two ranks, several files, memory full of NaN. The trunk's head is
    new: it is held and not read."""
    one, two = (results["loaded"][what] for results in one_and_two)
    num_new = 32 + 2 if what == "trunk" else 0
    for loaded in (one, two):
        assert loaded["differ"] == [] and loaded["not finite"] == []
        assert (
            sum(held for held, _ in loaded["held and read"])
            == loaded["all"]
            == sum(read for _, read in loaded["held and read"]) + num_new
        )
    assert len(two["held and read"]) == 2 and all(
        0.48 < held / two["all"] < 0.52 for held, _ in two["held and read"]
    )


def test_training_from_a_folder_loaded_sharded_is_training_from_the_same_plain_model(folder):
    one, two = logged(folder / "one" / "sft"), logged(folder / "two" / "sft-loaded")
    assert_close(one, two, rtol=2e-4, atol=2e-5)
    one, two = (
        load_file(folder / name / "model" / "model.safetensors") for name in ("one/sft", "two/sft-loaded")
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=lambda m: f"{name}: {m}")


def test_a_run_stopped_at_one_rank_then_at_two_then_ended_at_one_is_a_run_never_stopped(folder):
    assert_close(logged(folder / "whole"), logged(folder / "resumed"), rtol=2e-4, atol=2e-5)
    whole, resumed = (state_of(folder / name) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        torch.testing.assert_close(
            resumed[name], whole[name], rtol=0, atol=1e-5, msg=lambda m: f"{name}: {m}"
        )


def test_the_state_on_disk_is_the_same_tensors_at_any_number_of_ranks_and_each_rank_writes_its_half(folder):
    one, two = (state_of(folder / name / "sft") for name in ("one", "two"))
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    sizes = [
        path.stat().st_size
        for path in sorted((folder / "two" / "sft" / "state" / "step-3").glob("*.safetensors"))
    ]
    assert len(sizes) == 2 and min(sizes) > 0.45 * sum(sizes)


def test_reference_log_probs_of_a_sharded_model_are_those_of_a_plain_one_where_one_rank_has_more_batches(
    one_and_two,
):
    one, two = (result["logps"] for result in one_and_two)
    assert len(one) == 5 and two == pytest.approx(one, rel=1e-5)


def test_answers_do_not_depend_on_the_number_of_ranks(one_and_two):
    one, two = (
        [[(a["ids"], a["completion"], a["finish_reason"]) for a in group] for group in results["answers"]]
        for results in one_and_two
    )
    assert one == two and len({str(group) for group in one}) == 9
    for first, second in zip(*(sum(results["answers"], []) for results in one_and_two)):
        assert first["logp"] == pytest.approx(second["logp"], rel=1e-5)


def test_scores_do_not_depend_on_the_number_of_ranks_nor_on_the_batch(one_and_two):
    assert one_and_two[0]["scores"] == pytest.approx(one_and_two[1]["scores"], abs=1e-5)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_ranks_before_any_weight_moves(one_and_two):
    for results, ranks in zip(one_and_two, (1, 2)):
        assert len(results["not_finite"]) == ranks and len(set(results["not_finite"])) == 1
        assert "step 0: loss nan" in results["not_finite"][0] and results["moved"] == []


def test_a_prompt_that_is_too_long_is_refused_by_all_ranks_with_its_own_number(one_and_two):
    """It used to be refused by the one rank that had it, which prints nothing, and numbered within that
    rank's share."""
    for results, ranks in zip(one_and_two, (1, 2)):
        assert len(results["too_long"]) == ranks and len(set(results["too_long"])) == 1
        assert "prompt 1 has" in results["too_long"][0]


def test_an_error_of_the_main_rank_is_raised_on_all(one_and_two):
    assert [len(results["main"]) for results in one_and_two] == [1, 2]
    assert all("invalid literal" in text for results in one_and_two for text in results["main"])


@pytest.mark.parametrize("case, num_examples", [(0, 1), (1, 3)])
def test_held_out_examples_that_do_not_divide_over_the_ranks_are_each_counted_once(
    case, num_examples, one_and_two
):
    """A rank without an example used to fail, and the others to wait for it."""
    one, two = (results["few_held_out"][case] for results in one_and_two)
    assert len(one) == 1 + num_examples and two == pytest.approx(one, rel=1e-6)


def test_without_torchrun_every_function_is_the_identity():
    assert (distributed.rank(), distributed.num_ranks(), distributed.is_main()) == (0, 1, True)
    t = torch.ones(2)
    assert distributed.sum_over_ranks(t) is t and distributed.full(t) is t
    assert distributed.gather_objects("x") == ["x"] and distributed.from_main(lambda: 3) == 3


def test_half_of_torchruns_variables_are_refused_by_name(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="WORLD_SIZE LOCAL_RANK"):
        distributed.setup()


def test_the_rotary_angles_of_a_sharded_model_in_bfloat16_stay_fp32():
    """FSDP cast what goes into a block to the compute dtype: cosines and sines were rounded to 8 bits."""
    seen = []
    try:
        model = distributed.shard(
            language_model(), torch.bfloat16, mesh=distributed.make_mesh(device_type="cpu")
        )
        model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args: seen.extend(each.dtype for each in args[:3])
        )
        model(torch.tensor([[1, 2, 3]]))
    finally:
        distributed.close()
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


def refused_on_these_ranks(folder):
    """{what: the error of each rank} where a file is in the way of what rank 0 writes alone."""
    model = distributed.shard(language_model())
    run = Run(folder / "a-file", Recipe(), CPU, CLUSTERS)
    results = Results(replace(run, folder=folder))
    results.summary = dict
    lab = SimpleNamespace(folder=run.folder, module=distributed, _done=lambda name, fill, *_: fill(0))
    calls = {
        "model": lambda: weights.save(folder / "a-file" / "model", model, tokenizer()),
        "taken": lambda: weights.save(folder / "in the way", model, tokenizer()),
        "data": lambda: data_file(run, "base", [{}]),
        "summary": results.show,
        "lab": lambda: Lab.step(lab, "name", None),
        "pairs": lambda: write_new({folder / "a-file" / "pairs": ""}),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            error = None
        except (ValueError, OSError) as raised:
            error = one_line(raised)
        found[name] = distributed.gather_objects(error)
    return found


def test_what_rank_0_cannot_write_is_refused_by_all_ranks_with_the_path_that_the_user_knows(tmp_path):
    """The other ranks waited in a barrier, and ended with a traceback of their own."""
    (tmp_path / "a-file").write_text("")
    (tmp_path / "summary.json").mkdir()
    (tmp_path / "in the way").mkdir()
    (tmp_path / "in the way" / "thesis.txt").write_text("")
    of_ranks = on_ranks(2, refused_on_these_ranks, tmp_path)
    assert of_ranks[0] == of_ranks[1]
    for name, errors in of_ranks[0].items():
        assert errors[0] and errors[0] == errors[1], name
        assert ".aya_min" not in errors[0], name
    said = {name: errors[0] for name, errors in of_ranks[0].items()}
    assert said["summary"] == f"{tmp_path / 'summary.json'}: Is a directory"
    assert said["pairs"] == f"{tmp_path / 'a-file' / 'pairs'}: Not a directory"
    assert "move it elsewhere" in said["taken"]
