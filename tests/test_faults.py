"""What can end or spoil a run, and what must be left of it. The faults, F1 to F20, are listed with what was
tried in results/README.md.

A "program" here is distributed.launch in a process forked from this one, which has torch imported; the last
tests start torchrun and train.py.
AYA_MIN_LONG=1 makes more trials. At the end the counts are printed: faults tried, faults survived, bytes of
published states lost.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import (
    CPU,
    ROOT,
    EVERY,
    STAGES,
    TORCHRUN,
    assert_close,
    language_model,
    logged,
    run,
    state_of,
    tokenizer,
    write_world,
)

from aya_min import checkpoint, config, distributed, stages, weights
from aya_min.losses import sft_loss
from aya_min.data import Sampler, collate, load_examples, load_pairs, make_batches, read_jsonl
from aya_min.loop import make_optimizer, train
from aya_min.tokenizer import train_tokenizer
from aya_min.files import write_jsonl

LONG = os.environ.get("AYA_MIN_LONG") == "1"
RUNNING, TRIED, SURVIVED, LOST = set(), Counter(), Counter(), Counter()
SLOW = 10 if LONG else 1


@pytest.fixture(scope="module", autouse=True)
def warm_and_count(world, tmp_path_factory, request):
    """Import what torch imports late, before anything is forked; print the counts at the end. One thread,
    as in the programs: two add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    STAGES.update(EVERY)
    run("sft", world, tmp_path_factory.mktemp("warm") / "run", max_steps=1)
    yield
    torch.set_num_threads(threads)
    STAGES.pop("pretrain")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{'fault':6} {'tried':>6} {'survived':>9} {'bytes lost':>11}")
        for name in [*sorted(TRIED, key=lambda name: int(name[1:])), "all"]:
            tried, survived, lost = (
                sum(c.values()) if name == "all" else c[name] for c in (TRIED, SURVIVED, LOST)
            )
            print(f"{name:6} {tried:6} {survived:9} {lost:11}")


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    for pid in list(RUNNING):
        os.kill(pid, signal.SIGKILL)
        finish(pid)


# ---- programs ----------------------------------------------------------------------------------------------

def start(function, log, rank=0, ranks=1, port=0, timeout=30):
    """Run function() as a program of its own, which writes to the file log. -> its pid"""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        RUNNING.add(pid)
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(
            2, "w", buffering=1, closefd=False
        )
        if ranks > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        distributed.launch(lambda device: function(), timeout)
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start_ranks(ranks, function, log, timeout=30):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(function, f"{log}{rank}", rank, ranks, port, timeout) for rank in range(ranks)]


def finish(pid, seconds=60):
    """Wait for a program. -> its exit code, or minus the signal that ended it"""
    deadline = time.time() + seconds
    while time.time() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            RUNNING.discard(pid)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    raise AssertionError(f"still running after {seconds} s")


def until(condition, pid, seconds=60):
    """Wait until condition() is true; False if the program ended before."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        if condition():
            return True
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return condition()
        time.sleep(0.0005)
    raise AssertionError(f"nothing after {seconds} s")


def steps_logged(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'"lr"') if path.exists() else 0


def saving(folder):
    return any(folder.glob("state/.state.*"))


def go_on(stage, world, out, **changes):
    """What a program does: begin the run, or go on with it."""
    return lambda: run(stage, world, out, resume=(out / "config.json").is_file(), **changes)


def lost_bytes(folder):
    """Of what was published: the bytes of states that are not whole."""
    return sum(
        file.stat().st_size
        for path in checkpoint.saved_states(folder / "state")
        if checkpoint.damage(path)
        for file in path.iterdir()
    )


def assert_same_run(folder, whole):
    """Metrics, weights and moments, to the last bit."""
    assert logged(folder) == logged(whole)
    for read in (state_of, lambda run_folder: load_file(run_folder / "model" / "model.safetensors")):
        one, other = read(folder), read(whole)
        assert (
            one.keys() == other.keys()
            and [name for name in one if not torch.equal(one[name], other[name])] == []
        )


def assert_tidy(folder):
    """No more than the last two states, and nothing half done."""
    assert len(list((folder / "state").iterdir())) <= 2 and lost_bytes(folder) == 0
    assert {path.name for path in folder.iterdir()} <= {
        ".lock",
        "config.json",
        "eval.json",
        "metrics.jsonl",
        "model",
        "reference.safetensors",
        "state",
        "tokenizer.json",
        "tokenizer_config.json",
    }


# ---- F1, F2: kill -9 ---------------------------------------------------------------------------------------


def test_kill_9_at_random_moments_and_inside_saves_loses_no_more_than_the_steps_since_the_last_save(
    world, tmp_path
):
    """F1. One run, killed again and again, every second time while it saves; the last bit of it is that of
    a run never killed."""
    rng, trials, every, steps = random.Random(0), 24 if LONG else 3, 4, 120 if LONG else 24
    settings = dict(max_steps=steps, save_every=every, eval_every=10, held_out=True)
    finish(start(go_on("sft", world, tmp_path / "whole", **settings), tmp_path / "log"))
    folder, in_a_save = tmp_path / "killed", 0
    for trial in range(trials):
        TRIED["F1"] += 1
        pid = start(go_on("sft", world, folder, **settings), tmp_path / "log")
        target = (trial + 1) * steps // (trials + 1)                    # so that no trial comes after the end
        until(lambda: steps_logged(folder) >= target, pid)
        if trial % 2 == 0:
            until(lambda: saving(folder), pid)
        time.sleep(rng.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        assert finish(pid) == -signal.SIGKILL, (tmp_path / "log").read_text()
        in_a_save += saving(folder)
        saved = [checkpoint.step_of(path) for path in checkpoint.saved_states(folder / "state")]
        assert (
            steps_logged(folder) - max(saved, default=0) <= every + 1
        ), "the step that is logged before its save comes on top"
        LOST["F1"] += lost_bytes(folder)
        SURVIVED["F1"] += 1
    assert finish(start(go_on("sft", world, folder, **settings), tmp_path / "log")) == 0, (
        tmp_path / "log"
    ).read_text()
    assert in_a_save >= trials // 4 and LOST["F1"] == 0
    assert_same_run(folder, tmp_path / "whole")
    assert_tidy(folder)


def trained_a_little(folder, steps=(1, 2)):
    """A model and optimizer with states published in folder/state."""
    model = language_model()
    optimizer = make_optimizer(model, config.SFT(learning_rate=1e-2))
    for step in steps:
        for p in model.parameters():
            p.grad = torch.ones_like(p) * step
        optimizer.step()
        checkpoint.save_state(folder / "state", model, optimizer, step)
    return model, optimizer


def killed_at(point, folder, function):
    """Run function, and be killed at its point-th call that changes files below folder (or syncs one)."""
    left, sync = [point], os.fsync

    def tick():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        changes = (
            event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
            or event == "open"
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if changes and str(folder) in str(arguments[0]) or event == "os.rmdir" or event == "os.remove":
            tick()

    def fsync(number):
        tick()
        sync(number)
    os.fsync = fsync
    sys.addaudithook(hook)
    function()


def test_kill_9_at_each_point_of_a_save_leaves_two_whole_states(world, tmp_path):
    """F2: before every file that is opened, synced, renamed or removed."""
    trained_a_little(tmp_path / "first")
    model, optimizer = trained_a_little(tmp_path / "other", steps=(1, 2, 3))
    newest, points = [], 0
    while True:
        folder = tmp_path / f"killed-{points}"
        shutil.copytree(tmp_path / "first", folder)
        code = finish(
            start(
                lambda: killed_at(
                    points + 1, folder, lambda: checkpoint.save_state(folder / "state", model, optimizer, 3)
                ),
                tmp_path / "log",
            )
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
        points += 1
        TRIED["F2"] += 1
        LOST["F2"] += lost_bytes(folder)
        state = checkpoint.newest_state(folder / "state")
        newest.append(checkpoint.step_of(state))
        assert len(checkpoint.saved_states(folder / "state")) >= 2
        checkpoint.load_state(state, language_model(), make_optimizer(language_model(), config.SFT()))
        if newest[-1] == 2:
            checkpoint.save_state(folder / "state", model, optimizer, 3)
            assert sorted(path.name for path in (folder / "state").iterdir()) == ["step-2", "step-3"]
        SURVIVED["F2"] += 1
    assert newest == sorted(newest) and set(newest) == {2, 3} and points >= 12 and LOST["F2"] == 0


@pytest.mark.parametrize("every", [pytest.param(1 if LONG else 5, marks=pytest.mark.long)])
def test_kill_9_at_any_point_of_a_resume_from_its_last_step_to_the_end_is_made_up_for_by_the_same_resume(
        every, world, tmp_path):
    """F2. The evaluation, eval.json, the model beside an older one, the renames: the same command
    finishes."""
    settings = dict(max_steps=2, schedule="constant", warmup_steps=0, held_out=True, eval_every=1)
    first = run("sft", world, tmp_path / "first", **settings)
    whole = run("sft", world, tmp_path / "whole", **{**settings, "max_steps": 3})
    point = 1
    while True:
        folder = tmp_path / f"killed-{point}"
        shutil.copytree(first, folder)
        again = lambda: run("sft", world, folder, resume=True, **{**settings, "max_steps": 3})
        code = finish(start(lambda: killed_at(point, folder, again), tmp_path / "log"))
        assert code in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        TRIED["F2"] += 1
        assert finish(start(again, tmp_path / "log2")) == 0, (tmp_path / "log2").read_text()
        assert_same_run(folder, whole) if code else None
        assert lost_bytes(folder) == 0 and len(checkpoint.saved_states(folder / "state")) == 2
        assert (folder / "eval.json").read_text() == (whole / "eval.json").read_text()
        SURVIVED["F2"] += 1
        shutil.rmtree(folder)
        if code == 0:
            break
        point += every


# ---- F3, F4: damaged files ---------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    """A folder with states of step 1 and 2, and a way to put it back as it was."""
    trained_a_little(tmp_path / "kept")
    folder = tmp_path / "run"

    def fresh():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", folder)
        return folder / "state" / "step-2"
    return fresh


def falls_back(newest, capsys):
    """The line that names the damage, after the state before was taken."""
    started = time.time()
    state = checkpoint.newest_state(newest.parent)
    err = capsys.readouterr().err
    assert (
        state.name == "step-1"
        and err.count("\n") == 1
        and err.startswith(f"{newest} is damaged (")
        and err.endswith("resuming from the state before it\n")
    ), err
    assert time.time() - started < 5
    return err


def test_a_truncated_or_missing_file_of_the_newest_state_is_named_with_its_sizes_and_the_state_before_is_used(
    saved, capsys
):
    """F3."""
    names = [path.name for path in saved().iterdir()]
    assert len(names) == 2
    for name in names:
        size = (saved() / name).stat().st_size
        header = (
            8 + int.from_bytes((saved() / name).read_bytes()[:8], "little")
            if name.endswith(".safetensors")
            else 10
        )
        for cut in (0, 1, 7, 8, 9, header // 2, header, size - 1):
            TRIED["F3"] += 1
            newest = saved()
            os.truncate(newest / name, cut)
            err = falls_back(newest, capsys)
            assert name in err and (
                name == "manifest.json" or f"{cut:,} bytes instead of {size:,}" in err
            ), err
            SURVIVED["F3"] += 1
        TRIED["F3"] += 1
        newest = saved()
        (newest / name).unlink()
        assert name in falls_back(newest, capsys)
        SURVIVED["F3"] += 1


def test_a_flipped_bit_anywhere_in_weights_moments_or_manifest_is_noticed(saved, capsys):
    """F4."""
    rng, newest = random.Random(0), saved()
    contents = {path: path.read_bytes() for path in newest.iterdir()}
    for path, content in contents.items():
        for bit in rng.sample(range(8 * len(content)), (200 if LONG else 20)):
            TRIED["F4"] += 1
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            assert checkpoint.damage(newest), (path.name, bit)
            path.write_bytes(content)
            SURVIVED["F4"] += 1
    assert checkpoint.damage(newest) is None
    path.write_bytes(changed)
    falls_back(newest, capsys)


def test_where_no_state_is_whole_one_line_says_so_each_time_and_a_damaged_one_is_kept_until_the_next_save(
    saved, capsys
):
    newest = saved()
    os.truncate(newest / "manifest.json", 5)
    falls_back(newest, capsys)
    assert newest.with_name("step-2.damaged").is_dir()
    for path in checkpoint.saved_states(newest.parent):
        os.truncate(next(path.glob("*.safetensors")), 100)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match="no state is whole .step-1: .* has 100 bytes instead of .*; start anew with another --out",
        ):
            checkpoint.newest_state(newest.parent)


def test_a_pickle_or_any_other_file_that_was_put_into_a_state_is_not_read(saved, capsys):
    for name in (".metadata", "more.safetensors"):
        newest = saved()
        (newest / name).write_bytes(b"cos\nabort\n(tR.")  # a pickle that ends the process that reads it
        assert name in falls_back(newest, capsys)


# ---- F7: a full disk ---------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_while_saving_leaves_the_states_before_and_says_needed_and_free_bytes(
    world, tmp_path
):
    """F7. A limit on file size stands for the full disk; with room again the run goes on as if nothing had
    been."""
    settings = dict(max_steps=9, save_every=2)
    run("sft", world, tmp_path / "whole", **settings)
    folder, log = tmp_path / "run", tmp_path / "log"

    def with_small_files():
        size, steps = checkpoint.state_bytes(language_model()) // 2, stages.train

        def until_two_states_are_saved(*arguments, **more):
            save = checkpoint.save_state

            def save_state(out, model, optimizer, step, scale):
                if step > 4:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                save(out, model, optimizer, step, scale)
            checkpoint.save_state = save_state
            return steps(*arguments, **more)
        stages.train = until_two_states_are_saved
        run("sft", world, folder, **settings)

    TRIED["F7"] += 1
    assert finish(start(with_small_files, log)) == 2
    error = [line for line in log.read_text().splitlines() if "error: " in line]
    needed = checkpoint.state_bytes(language_model())
    assert len(error) == 1 and "Traceback" not in log.read_text()
    assert (
        f"the state of step 6 could not be written ([Errno 27] File too large); it needs {needed:,} bytes"
        " and "
        in error[0]
        and " are free. The last saved state is step-4; make room and --resume" in error[0]
    )
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["step-2", "step-4"]
    LOST["F7"] += lost_bytes(folder)
    assert finish(start(go_on("sft", world, folder, **settings), log)) == 0
    assert_same_run(folder, tmp_path / "whole")
    SURVIVED["F7"] += 1


def test_a_disk_without_room_for_a_state_is_refused_before_the_first_step_and_before_a_save(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(
        ValueError,
        match=f"a state needs {10 * free:,} bytes and [0-9,]+ are free. No state was saved before; make room",
    ):
        checkpoint.check_room(tmp_path / "not" / "yet" / "there", 10 * free)
    trained_a_little(tmp_path)
    with pytest.raises(ValueError, match="are free. The last saved state is step-2; make room and --resume"):
        checkpoint.check_room(tmp_path / "state", 10 * free)


# ---- F9, F10: signals --------------------------------------------------------------------------------------

def in_an_evaluation(folder):
    """The last line is a step after which an evaluation comes."""
    rows = logged(folder) if (folder / "metrics.jsonl").exists() else []
    return bool(rows) and "lr" in rows[-1] and (rows[-1]["step"] + 1) % 5 == 0


MOMENTS = {
    "first step": ("sft", lambda folder: (folder / "tokenizer_config.json").exists()),
    "step": ("sft", lambda folder: steps_logged(folder) >= 3),
    "save": ("sft", saving),
    "evaluation": ("sft", in_an_evaluation),
    "generation": ("rl", lambda folder: steps_logged(folder) >= 2),
}


@pytest.mark.parametrize("moment, number", [
    ("step", signal.SIGTERM), ("save", signal.SIGTERM), ("evaluation", signal.SIGTERM),
    ("generation", signal.SIGTERM), ("step", signal.SIGINT),
    pytest.param("first step", signal.SIGTERM, marks=pytest.mark.long),
    *(pytest.param(moment, signal.SIGINT, marks=pytest.mark.long) for moment in MOMENTS if moment != "step")])
def test_a_signal_ends_the_run_after_a_save_with_a_code_that_says_so_and_it_can_go_on(
    moment, number, world, tmp_path
):
    """F9."""
    stage, reached = MOMENTS[moment]
    settings = (
        dict(max_steps=12, save_every=4, eval_every=5, held_out=stage == "sft")
        if stage == "sft"
        else dict(max_steps=6)
    )
    run(stage, world, tmp_path / "whole", **settings)
    for trial in range(SLOW):
        TRIED["F9"] += 1
        folder, log = tmp_path / f"run{trial}", tmp_path / f"log{trial}"
        pid = start(go_on(stage, world, folder, **settings), log)
        assert until(lambda: reached(folder), pid)
        os.kill(pid, number)
        code = finish(pid)
        assert code == 128 + number or moment == "first step" and code in (-number, 1), (
            code,
            log.read_text(),
        )
        if code == 128 + number:
            assert (
                f"stopped by {number.name} after {steps_logged(folder)} of {settings['max_steps']} steps."
                in log.read_text()
            )
            assert [checkpoint.step_of(path) for path in checkpoint.saved_states(folder / "state")][-1:] == [
                steps_logged(folder)
            ][: steps_logged(folder)]
        LOST["F9"] += lost_bytes(folder)
        assert finish(start(go_on(stage, world, folder, **settings), log)) == 0, log.read_text()
        assert_same_run(folder, tmp_path / "whole")
        SURVIVED["F9"] += 1


@pytest.mark.parametrize(
    "at", [pytest.param(0, marks=pytest.mark.long), 4, pytest.param(8, marks=pytest.mark.long)]
)
def test_an_evaluation_is_left_at_once_and_made_up_for_by_the_resumed_run(at, world, tmp_path):
    """F9. The signal comes in the second of three batches; the weights are saved as they are. Before the
    first step there is nothing to save."""
    TRIED["F9"] += 1
    (tmp_path / "world").mkdir()
    shutil.copy(world / "sft.jsonl", tmp_path / "world")
    (tmp_path / "world" / "held-out-sft.jsonl").write_text(
        (world / "held-out-sft.jsonl").read_text(encoding="utf-8") * 15, encoding="utf-8"
    )
    settings, batches = dict(max_steps=8, eval_every=4, held_out=True), []

    def program():
        loss_fn = sft_loss

        def signalled(model, batch):
            batches.append(model.training)
            if batches == ([False] * 3 + [True] * 4) * (at // 4) + [False] * 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss_fn(model, batch)
        stages.sft_loss = signalled
        go_on("sft", tmp_path / "world", tmp_path / "run", **settings)()

    assert finish(start(program, tmp_path / "log")) == 143, (tmp_path / "log").read_text()
    assert [path.name for path in checkpoint.saved_states(tmp_path / "run" / "state")] == [f"step-{at}"][
        :at
    ] and not (tmp_path / "run" / "model").exists()
    assert not at or [row["step"] for row in logged(tmp_path / "run") if "lr" not in row] == [0, 4][:at // 4]
    assert (
        finish(start(go_on("sft", tmp_path / "world", tmp_path / "run", **settings), tmp_path / "log")) == 0
    )
    assert (
        finish(start(go_on("sft", tmp_path / "world", tmp_path / "whole", **settings), tmp_path / "log")) == 0
    )
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    SURVIVED["F9"] += 1


def test_a_second_sigint_ends_the_run_at_once(world, tmp_path):
    def program():
        def stuck(model, batch):
            (tmp_path / "stuck").touch()
            time.sleep(60)
        stages.sft_loss = stuck
        run("sft", world, tmp_path / "run")
    pid = start(program, tmp_path / "log")
    until((tmp_path / "stuck").exists, pid)
    os.kill(pid, signal.SIGINT)
    until(lambda: "SIGINT: finishing the step, then saving" in (tmp_path / "log").read_text(), pid)
    os.kill(pid, signal.SIGINT)
    assert finish(pid, 2) == -signal.SIGINT


def test_a_signal_to_one_rank_of_four_stops_all_at_the_same_step_with_one_state(world, tmp_path):
    """F10. The run goes on with one rank."""
    settings = dict(max_steps=14)
    run("sft", world, tmp_path / "whole", **settings)
    for trial in range(SLOW):
        TRIED["F10"] += 1
        folder = tmp_path / f"run{trial}"
        pids = start_ranks(4, go_on("sft", world, folder, **settings), tmp_path / f"log{trial}-")
        until(lambda: steps_logged(folder) >= 2, pids[0])
        os.kill(pids[2], signal.SIGTERM)
        assert [finish(pid) for pid in pids] == [143] * 4
        done = steps_logged(folder)
        assert [path.name for path in (folder / "state").iterdir()] == [f"step-{done}"] and 2 <= done < 14
        assert (
            f"stopped by SIGTERM after {done} of 14 steps. The last saved state is step-{done}"
            in (tmp_path / f"log{trial}-0").read_text()
        )
        run("sft", world, folder, resume=True, **settings)
        assert_close(logged(folder), logged(tmp_path / "whole"), rtol=2e-4, atol=2e-5)
        SURVIVED["F10"] += 1


# ---- F11: a rank dies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, moment",
    [
        ("sft", "step"),
        *(pytest.param(*each, marks=pytest.mark.long) for each in (("sft", "save"), ("rl", "generation"))),
    ],
)
def test_when_a_rank_is_killed_the_others_end_and_the_run_goes_on_from_the_last_state(
    stage, moment, world, tmp_path
):
    """F11, without torchrun, which would only end the others sooner."""
    settings = dict(max_steps=8, save_every=2, micro_batch_size=1)
    for trial in range(3 if LONG else 1):
        TRIED["F11"] += 1
        folder, log = tmp_path / f"run{trial}", str(tmp_path / f"log{trial}-")
        pids = start_ranks(4 if LONG else 2, go_on(stage, world, folder, **settings), log)
        until(lambda: checkpoint.saved_states(folder / "state") and MOMENTS[moment][1](folder), pids[0])
        os.kill(pids[1], signal.SIGKILL)
        started = time.time()
        codes = [finish(pid) for pid in pids]
        assert codes[1] == -signal.SIGKILL and all(codes) and time.time() - started < 60, codes
        assert "Traceback" in Path(log + "0").read_text()
        LOST["F11"] += lost_bytes(folder)
        assert checkpoint.saved_states(folder / "state")
        assert [finish(pid) for pid in start_ranks(2, go_on(stage, world, folder, **settings), log)] == [
            0,
            0,
        ], Path(log + "0").read_text()
        assert steps_logged(folder) == 8
        assert_tidy(folder)
        SURVIVED["F11"] += 1


@pytest.mark.long
def test_a_rank_that_hangs_takes_the_run_down_after_the_collective_timeout(world, tmp_path):
    TRIED["F11"] += 1
    folder = tmp_path / "run"
    pids = start_ranks(
        2, go_on("sft", world, folder, max_steps=500, save_every=1), tmp_path / "log", timeout=3
    )
    until(lambda: steps_logged(folder) >= 2, pids[0])
    os.kill(pids[1], signal.SIGSTOP)
    started = time.time()
    assert finish(pids[0], 30) == 1 and time.time() - started > 2
    assert "imed out" in Path(tmp_path / "log0").read_text()
    LOST["F11"] += lost_bytes(folder)
    SURVIVED["F11"] += 1


# ---- F12-F15: going on -------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["dpo", *(pytest.param(stage, marks=pytest.mark.long)
                                            for stage in EVERY if stage != "dpo")])
def test_a_run_stopped_twice_by_a_signal_is_one_never_stopped_bit_for_bit(stage, world, tmp_path):
    """F12. Steps, weights, moments, metrics; 36 examples in batches of 8, so the first epoch ends inside a
    batch."""
    TRIED["F12"] += 1
    settings = dict(max_steps=20 if LONG else 12, weight_decay=0.1)
    finish(start(go_on(stage, world, tmp_path / "whole", **settings), tmp_path / "log"))
    folder = tmp_path / "run"
    for stop in (7, 13) if LONG else (4, 8):
        pid = start(go_on(stage, world, folder, **settings), tmp_path / "log")
        until(lambda: steps_logged(folder) >= stop, pid)
        os.kill(pid, signal.SIGTERM)
        assert finish(pid) == 143, (tmp_path / "log").read_text()
    assert finish(start(go_on(stage, world, folder, **settings), tmp_path / "log")) == 0
    assert (tmp_path / "log").read_text().count("resumes after step") == 2
    assert_same_run(folder, tmp_path / "whole")
    SURVIVED["F12"] += 1


def load_and_compare(folder):
    """On these ranks: what is loaded is what is on disk, to the bit."""
    model = distributed.shard(language_model(seed=5))
    optimizer = make_optimizer(model, config.SFT())
    step = checkpoint.load_state(checkpoint.newest_state(folder / "state"), model, optimizer)
    on_disk = state_of(folder)
    loaded = {
        name: distributed.full(tensor) for name, tensor in checkpoint.state_tensors(model, optimizer).items()
    }
    assert loaded.keys() == on_disk.keys() and len(loaded) == 3 * len(list(model.parameters()))
    assert [name for name in loaded if not torch.equal(loaded[name], on_disk[name])] == []
    assert all(float(optimizer.state[p]["step"]) == step for p in model.parameters())


@pytest.mark.long
def test_one_rank_two_four_and_one_again_are_one_rank(world, tmp_path):
    """F13."""
    TRIED["F13"] += 1
    settings, folder = dict(schedule="constant", weight_decay=0.1), tmp_path / "run"
    run("sft", world, tmp_path / "whole", max_steps=12, **settings)
    for ranks, steps in ((1, 3), (2, 6), (4, 9), (1, 12)):
        assert [
            finish(pid)
            for pid in start_ranks(
                ranks, go_on("sft", world, folder, max_steps=steps, **settings), tmp_path / "log"
            )
        ] == [0] * ranks
        for pid in start_ranks(4 if ranks < 4 else 2, lambda: load_and_compare(folder), tmp_path / "log"):
            assert finish(pid) == 0, (tmp_path / "log0").read_text()
    parts, whole = logged(folder), logged(tmp_path / "whole")
    assert [row["tokens"] for row in parts] == [row["tokens"] for row in whole]  # the same examples
    assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    SURVIVED["F13"] += 1


@pytest.mark.long
def test_a_batch_of_8_is_the_same_however_it_is_cut_over_micro_batches_and_ranks(world, tmp_path):
    """F14."""
    rows = []
    for ranks, size in ((1, 0), (1, 1), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)):
        TRIED["F14"] += 1
        folder = tmp_path / f"{ranks}-{size}"
        assert {
            finish(pid)
            for pid in start_ranks(
                ranks, go_on("sft", world, folder, max_steps=1, micro_batch_size=size), tmp_path / "log"
            )
        } == {0}
        rows += logged(folder)
        assert rows[-1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6) and rows[-1][
            "grad_norm"
        ] == pytest.approx(rows[0]["grad_norm"], rel=1e-6)
        SURVIVED["F14"] += 1


def test_resuming_with_other_data_model_tokenizer_or_seed_is_refused_by_name_and_a_learning_rate_is_told(
    world, tmp_path, capsys
):
    """F15."""
    folder, smaller = run("dpo", world, tmp_path / "run", max_steps=2, schedule="constant"), dict(
        num_hidden_layers=1
    )
    (tmp_path / "other").mkdir()
    other = write_world(tmp_path / "other", count=40)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def with_another(what):
        model = language_model(seed=9) if what == "weights" else language_model()
        words = (
            train_tokenizer(["one two three"] * 9, tokenizer().vocab_size)
            if what == "tokenizer"
            else tokenizer()
        )
        stages.train_stage(
            "dpo",
            model,
            words,
            [world / "pairs.jsonl"],
            config.DPO(
                batch_size=8,
                max_steps=4,
                learning_rate=1e-3,
                warmup_steps=2,
                max_length=256,
                nll_weight=0.2,
                schedule="constant",
            ),
            folder,
            CPU,
            resume=True,
        )
    for attempt, says in (
        (
            lambda: run("dpo", world, folder, resume=True, max_steps=4, schedule="constant", seed=3),
            "that run had seed 0, not 3. Give the same",
        ),
        (
            lambda: run("dpo", other, folder, resume=True, max_steps=4, schedule="constant"),
            "that run had other data: .*other/pairs.jsonl. Give",
        ),
        (
            lambda: run(
                "dpo", world, folder, resume=True, max_steps=4, schedule="constant", architecture=smaller
            ),
            "that run had another model. Give",
        ),
        (lambda: with_another("weights"), "that run had another model. Give"),
        (lambda: with_another("tokenizer"), "that run had another tokenizer. Give"),
    ):
        TRIED["F15"] += 1
        with pytest.raises(ValueError, match=f"--resume {folder}: {says}"):
            attempt()
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        SURVIVED["F15"] += 1
    capsys.readouterr()
    run("dpo", world, folder, resume=True, max_steps=4, schedule="constant", learning_rate=5e-4)
    assert (
        f"{folder}: resumes after step 2 with max_steps 4 (was 2), learning_rate 0.0005 (was 0.001)"
        in capsys.readouterr().err
    )
    about = json.loads((folder / "config.json").read_text())
    assert about["settings"]["learning_rate"] == 5e-4 and [
        resumed["step"] for resumed in about["resumed"]
    ] == [
        2
    ]  # a later resume goes on from there
    assert [row["lr"] for row in logged(folder) if "lr" in row][2:] == [5e-4, 5e-4]


# ---- F16: numbers that are not finite ----------------------------------------------------------------------

@pytest.mark.parametrize("where", ["loss", pytest.param("gradient", marks=pytest.mark.long)])
def test_one_ranks_poisoned_step_stops_all_ranks_before_the_weights_move_and_is_named(where, world, tmp_path):
    """F16."""
    TRIED["F16"] += 1
    settings = config.SFT(
        batch_size=8,
        micro_batch_size=2,
        max_steps=9,
        save_every=2,
        learning_rate=1e-2,
        warmup_steps=0,
        max_length=256,
    )
    examples = load_examples([world / "sft.jsonl"], tokenizer(), 256, config.SFT())

    def program():
        calls = iter(range(1000))

        def poisoned(model, batch):
            loss, metrics = sft_loss(model, batch)
            if (
                next(calls) == 4 * 2 + 1 and distributed.rank() == 1
            ):  # step 4, the second of two micro-batches
                loss = (
                    loss * float("nan")
                    if where == "loss"
                    else loss + (0 * model.model.norm.weight.sum()).sqrt()
                )
            return loss, metrics
        model = language_model()
        num_steps, batches = make_batches(examples, collate, settings)
        try:
            train(model, num_steps, batches, poisoned, settings, tmp_path, CPU)
        except ValueError:
            saved = state_of(tmp_path)
            assert all(
                torch.equal(tensor, saved[name]) for name, tensor in distributed.full_state(model).items()
            )
            raise

    pids = start_ranks(2, program, tmp_path / "log")
    assert [finish(pid) for pid in pids] == [2, 2], (tmp_path / "log0").read_text() + (
        tmp_path / "log1"
    ).read_text()
    chosen = Sampler([len(e.ids) for e in examples], 8, 0).take(32, 8)[1::2][2:]
    line = next(line for line in (tmp_path / "log0").read_text().splitlines() if "error: " in line)
    origin = (
        f"rank 1, examples {' '.join(examples[i].where for i in chosen)}"
        if where == "loss"
        else "the losses are finite, the gradient of model.norm.weight is not"
    )
    assert (
        f"error: step 4: loss {'nan' if where == 'loss' else ''}" in line
        and f"({origin}; positions 32 to 39 of the data order)" in line
    )
    assert "stopped before the weights moved. The last saved state is step-4" in line
    assert [row["step"] for row in logged(tmp_path)] == [0, 1, 2, 3]
    SURVIVED["F16"] += 1


# ---- F18-F20: data -----------------------------------------------------------------------------------------

GOOD = b'{"prompt": "hi", "completion": "secret"}\n'
LINES = {
    "cut": GOOD[:20],
    "array": b'["secret"]\n',
    "missing key": b'{"prompt": "secret"}\n',
    "wrong type": b'{"prompt": "hi", "completion": 5}\n',
    "null": b'{"prompt": "hi", "completion": null}\n',
    "invalid UTF-8": b'{"prompt": "\xff", "completion": "secret"}\n',
    "bare NaN": b'{"prompt": "hi", "completion": "secret", "score": NaN}\n',
    "lone surrogate": b'{"prompt": "hi", "completion": "secret \\ud83d"}\n',
    "10 MB": b'{"prompt": "hi", "completion": "' + b"secret " * 1_500_000 + b"\n",
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("name", LINES)
def test_a_malformed_line_is_refused_with_its_place_within_a_second_and_without_its_content(name, tmp_path):
    """F18."""
    TRIED["F18"] += 1
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD * 2 + LINES[name] + (GOOD if LINES[name].endswith(b"\n") else b""))
    started = time.time()
    with pytest.raises(ValueError, match=f"^{path}:3: ") as error:
        load_examples([path], tokenizer(), 256, config.SFT())
    assert time.time() - started < 1 and "secret" not in str(error.value) and len(str(error.value)) < 300
    SURVIVED["F18"] += 1


def test_windows_line_ends_and_a_repeated_id_are_no_mistakes_and_an_empty_file_is_one(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "hi", "completion": "a", "id": 1}\r\n' * 3)
    TRIED["F18"] += 3
    assert len(load_examples([path], tokenizer(), 256, config.SFT())) == 3
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"^{path}: the file is empty"):
        read_jsonl(path)
    SURVIVED["F18"] += 3


def test_data_that_vanish_during_a_run_do_not_harm_it_and_are_named_when_it_is_resumed(tmp_path):
    TRIED["F18"] += 1
    (tmp_path / "world").mkdir()
    world, folder, log = write_world(tmp_path / "world"), tmp_path / "run", tmp_path / "log"
    pid = start(go_on("sft", world, folder, max_steps=30), log)
    until(lambda: steps_logged(folder) >= 1, pid)
    (world / "sft.jsonl").unlink()
    assert finish(pid) == 0
    assert finish(start(go_on("sft", world, folder, max_steps=40), log)) == 2
    assert log.read_text().endswith(
        f"error: {world / 'sft.jsonl'}: cannot be read (No such file or directory); give an existing file\n"
    )
    SURVIVED["F18"] += 1


def test_pairs_of_equal_answers_are_counted_named_and_left_out_and_many_are_refused(tmp_path, capsys):
    """F19. What has nothing to learn from cannot get in otherwise: an empty answer is a malformed line,
    and every answer's end is supervised."""
    TRIED["F19"] += 1
    path, pair, equal = (
        tmp_path / "pairs.jsonl",
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": "hi", "chosen": "yes", "rejected": "yes"},
    )
    write_jsonl(path, [pair] * 30 + [equal] + [pair] * 9)
    assert len(load_pairs([path], tokenizer(), 256, config.SFT())) == 39
    assert (
        capsys.readouterr().err
        == f"{path}: 1 of 40 pairs have the same answer as chosen and rejected: {path}:31; they are left"
        " out\n"
    )
    write_jsonl(path, [pair] + [equal] * 2)
    with pytest.raises(
        ValueError,
        match=(
            f"2 of 3 pairs have the same answer as chosen and rejected: {path}:2 {path}:3; that is more"
            " than 50%"
        ),
    ):
        load_pairs([path], tokenizer(), 256, config.SFT())
    SURVIVED["F19"] += 1


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.long)])
def test_fewer_examples_than_a_batch_are_refused_on_all_ranks_and_a_rest_is_used_once_an_epoch(
        ranks, world, tmp_path):
    """F20."""
    TRIED["F20"] += 2
    lines = (world / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    small = tmp_path / "small"
    small.mkdir()
    (small / "sft.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    assert [
        finish(pid)
        for pid in start_ranks(
            ranks, go_on("sft", small, tmp_path / "refused", batch_size=4), tmp_path / "log"
        )
    ] == [2] * ranks
    assert (
        "error: 3 examples are fewer than one batch of 4" in (tmp_path / "log0").read_text()
        and not (tmp_path / "refused").exists()
    )
    SURVIVED["F20"] += 1
    (small / "sft.jsonl").write_text("".join(lines[:11]), encoding="utf-8")
    each = [len(e.ids) for e in load_examples([small / "sft.jsonl"], tokenizer(), 256, config.SFT())]
    assert [
        finish(pid)
        for pid in start_ranks(
            ranks, go_on("sft", small, tmp_path / "run", batch_size=4, max_steps=11), tmp_path / "log"
        )
    ] == [0] * ranks
    assert sum(row["tokens"] for row in logged(tmp_path / "run")) == 4 * sum(
        each
    )  # 11 steps of 4 are four epochs of 11
    assert sorted(Sampler(range(1001), 8, 0).take(1001, 1001).tolist()) == list(range(1001))
    SURVIVED["F20"] += 1


# ---- two runs in a folder, and torchrun --------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_with_the_firsts_process_and_host_but_not_after_kill_9(
    world, tmp_path
):
    folder, log = tmp_path / "run", tmp_path / "log"
    first = start(
        go_on("sft", world, folder, max_steps=500, save_every=5, schedule="constant"), tmp_path / "first"
    )
    until(lambda: steps_logged(folder) >= 6, first)
    says = (
        f"error: {folder}: another run is writing here (process {first} on {socket.gethostname()}); wait for"
        " it or stop it, or give another folder\n"
    )
    for resume in (True, False):
        assert (
            finish(
                start(
                    lambda: run(
                        "sft", world, folder, resume=resume, max_steps=500, save_every=5, schedule="constant"
                    ),
                    log,
                )
            )
            == 2
        )
        assert log.read_text().endswith(says)
    os.kill(first, signal.SIGKILL)
    finish(first)
    assert finish(
        start(go_on("sft", world, folder, max_steps=20, save_every=5, schedule="constant"), log)
    ) in (0, 2)
    assert "resumes after step" in log.read_text() or "raise --max-steps" in log.read_text()


@pytest.fixture(scope="module")
def command(world, tmp_path_factory):
    """train.py sft on a model folder, 2 ranks; and what it makes without a fault."""
    folder = tmp_path_factory.mktemp("torchrun")
    weights.save(folder / "model", language_model(), tokenizer())
    line = (
        f"train.py sft --model {folder}/model --data {world}/sft.jsonl --batch-size 8 --max-steps 60"
        " --save-every 5 --learning-rate 1e-3 --max-length 256"
    )
    return folder, line.split()


def process_of_rank(rank, pid):
    """The process of a rank, among the children of torchrun's."""
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return next(
        child
        for child in children
        if f"\0LOCAL_RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes()
    )


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks' processes in /proc")
def test_torchrun_with_a_restart_resumes_after_kill_9_of_a_rank_to_the_weights_of_no_fault(
    command, world, tmp_path
):
    """F11. The first start dies, the second is the same command, which finds its own unfinished run in --out.

    On a busy machine the second start once found the addresses of the first one's ranks in torchrun's store,
    and could not connect.
    The rank that was left alone may fail too (connection closed), before torchrun ends it or even before
    torchrun has seen the other's end.
    """
    TRIED["F11"] += 1
    folder, line = command
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(
            [sys.executable, *TORCHRUN, "--max-restarts", "1", *line, "--out", str(tmp_path / "run")],
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: steps_logged(tmp_path / "run") >= 8, job.pid, 300)
        os.kill(process_of_rank(1, job.pid), signal.SIGKILL)
        assert job.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        job.terminate()                             # and torchrun its ranks, should they still be there
    text = (tmp_path / "log").read_text()
    assert "failed (exitcode: " in text and f"{tmp_path / 'run'}: resumes after step " in text
    settings = dict(max_steps=60, save_every=5, warmup_steps=10)
    for pid in start_ranks(2, lambda: run("sft", world, tmp_path / "whole", **settings), tmp_path / "log-"):
        assert finish(pid) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    SURVIVED["F11"] += 1
