"""However a step is computed, its loss and gradient norm are the same: cut, recomputed, compiled, packed,
sharded with copies. And what a step says of itself."""

import json
import shutil

import pytest
import torch
from small import CPU, EVERY, assert_close, language_model, logged, on_ranks, reward_model, run
from torch import nn
from torch._inductor import config as inductor

from aya_min import loop



pytestmark = pytest.mark.usefixtures("every_stage")


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """stage -> the rows of two steps by one rank, each batch of 8 at once."""
    folder, rows = tmp_path_factory.mktemp("plain"), {}

    def of(stage):
        if stage not in rows:
            rows[stage] = logged(run(stage, world, folder / stage, max_steps=2))
        return rows[stage]
    return of


def same_steps(rows, others, tolerance):
    keys = ("step", "loss", "grad_norm", "tokens", "lr")
    assert_close(
        *([{key: row[key] for key in keys} for row in each] for each in (rows, others)),
        rtol=tolerance,
        atol=1e-6
    )


# one step, however it is computed


@pytest.mark.parametrize("stage, ranks, changes", [
    ("pretrain", 1, dict(micro_batch_size=1)), ("sft", 2, dict(replicate=2)),
    pytest.param("pretrain", 2, dict(micro_batch_size=2), marks=pytest.mark.long),
    pytest.param("sft", 4, dict(replicate=2, micro_batch_size=1), marks=pytest.mark.long),
    pytest.param("dpo", 4, dict(replicate=2, micro_batch_size=2), marks=pytest.mark.long)])
def test_cutting_a_batch_over_micro_batches_ranks_and_copies_changes_neither_loss_nor_norm(
    stage, ranks, changes, world, plain, tmp_path
):
    """Answers have 2 to 100 supervised tokens. For the other stages see test_loop.py and
    test_distributed.py."""
    if ranks > 1:
        on_ranks(ranks, lambda: run(stage, world, tmp_path / "run", max_steps=2, **changes) and None)
    else:
        run(stage, world, tmp_path / "run", max_steps=2, **changes)
    same_steps(plain(stage), logged(tmp_path / "run"), 1e-5)


@pytest.mark.parametrize(
    "changes", [dict(activation_checkpointing=2), dict(packing=True, activation_checkpointing=1)], ids=str
)
@pytest.mark.parametrize("stage", EVERY)
def test_so_it_is_with_all_or_every_second_block_recomputed_and_without_the_padding(
    stage, changes, world, plain, tmp_path
):
    same_steps(plain(stage), logged(run(stage, world, tmp_path / "run", max_steps=2, **changes)), 1e-5)


@pytest.mark.parametrize("every, recomputed", [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_activation_checkpointing_n_recomputes_every_nth_block(every, recomputed):
    model, calls = language_model(num_hidden_layers=5).train(), [0] * 5
    model.model.activation_checkpointing = every
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda module, args, i=i: calls.__setitem__(i, calls[i] + 1))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert [i for i, n in enumerate(calls) if n == 2] == recomputed and {1, 2}.issuperset(calls)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_have_the_loss_and_norm_of_eager_ones(world, tmp_path):
    with inductor.patch(compile_threads=1):  # no pool of compilers for one small block
        eager, compiled = (
            run(
                "sft",
                world,
                tmp_path / str(on),
                max_steps=1,
                architecture=dict(num_hidden_layers=1),
                compile=on,
            )
            for on in (False, True)
        )
    same_steps(logged(eager), logged(compiled), 1e-5)


def test_nothing_is_dropped_out():
    for model in (language_model(), reward_model()):
        assert not [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.dropout._DropoutNd)
        ]


# what a step says of itself

def test_a_profiled_step_leaves_a_chrome_trace_and_a_table_of_ten_lines(world, tmp_path, capsys):
    folder = run("sft", world, tmp_path / "run", max_steps=2, profile=1)
    events = json.loads((folder / "profile.json").read_text(encoding="utf-8"))["traceEvents"]
    assert any(event.get("name") == "aten::mul" and event["dur"] > 0 for event in events)
    title, *table = capsys.readouterr().err.split("profile.json: ")[1].splitlines()[:11]
    assert "chrome://tracing" in title and len(table) == 10
    shares = [float(line.split()[2].rstrip("%")) for line in table]
    assert shares == sorted(shares, reverse=True) and 30 < sum(shares) <= 100.5
    assert not (run("sft", world, tmp_path / "other", max_steps=1) / "profile.json").exists()


def test_a_resume_refuses_to_profile_a_step_that_is_done(world, tmp_path):
    """It was ignored. The profile of the run itself is no reason to refuse its resume."""
    common = dict(schedule="constant", save_every=1)
    folder = run("sft", world, tmp_path / "run", max_steps=2, **common)
    with pytest.raises(ValueError, match="--profile 1: 2 steps of .* are done.*; profile step 2 or a later"):
        run("sft", world, folder, resume=True, max_steps=4, profile=1, **common)
    run("sft", world, folder, resume=True, max_steps=3, profile=2, **common)
    assert (folder / "profile.json").is_file()
    run("sft", world, folder, resume=True, max_steps=4, profile=2, **common)


@pytest.mark.parametrize(
    "name, dtype, peak",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("Something new", "bfloat16", None),
    ],
)
def test_the_peak_is_that_of_the_cards_data_sheet_and_unknown_for_others_and_in_fp32(
    name, dtype, peak, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert loop.peak_flops(torch.device("cuda"), dtype) == peak and loop.peak_flops(CPU, dtype) is None


def test_mfu_is_the_operations_of_all_ranks_over_seconds_ranks_and_peak(world, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(loop, "training_flops", lambda config, lengths, num_supervised: num_supervised)
    row = json.loads(
        (run("sft", world, tmp_path / "run", max_steps=1, micro_batch_size=2) / "metrics.jsonl").read_text(
            encoding="utf-8"
        )
    )
    supervised = row["mfu"] * row["seconds"] * 1e9
    assert supervised == pytest.approx(round(supervised), rel=1e-5) and 8 * 2 <= supervised <= row["tokens"]
