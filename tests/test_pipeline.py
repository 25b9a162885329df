"""The whole recipe at the smoke preset, once; then what a rerun, a killed run and a user's own models do
with it."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from small import CPU, ROOT, program

import train
from aya_min import config, pipeline_steps
from aya_min.files import write_jsonl
from aya_min.world import gold_answer, questions


def recipe(*words):
    """What the recipe at the smoke preset prints, run to its end in a process of its own."""
    done = program("train.py", "--preset", "smoke", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(folder, what was printed) of a run of one round that was killed after a teacher and then went on."""
    run = tmp_path_factory.mktemp("recipe") / "smoke"
    process = subprocess.Popen(
        [sys.executable, "train.py", "--preset", "smoke", "--rounds", "1", "--out", run],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (run / "steps" / "teacher-slavic" / "done.json").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return run, recipe("--rounds", "1", "--out", run)


def assert_whole(run, printed, rounds, arms):
    """The run has every stage, these rounds and arms, a table and a page."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    names = [m["name"] for m in summary["models"]]
    stages = ["base", "sft", "offline", *rounds]
    assert set(stages + arms) <= set(names)
    for model in summary["models"]:
        for decoding in ("greedy", "sampled"):
            part = model[decoding]
            assert part["num"] == 120 and 0 <= part["grade"] <= 3
            for versus in part["versus"].values():
                assert versus["win"] + versus["tie"] + versus["loss"] == 120
    assert "arbitrage of 4 teachers: prompts 240" in printed and "cut by language" in printed
    assert set(summary["pairs"]) >= {"offline", *rounds} and summary["arbitrage"]["cut"] > 0
    assert printed.strip().endswith(str(run / "report.html")) and (run / "report.html").is_file()
    assert "| model" in printed
    shares = summary["teacher_wins"]["ar"]
    assert abs(sum(shares.values()) - 1) < 1e-6


def test_the_recipe_leaves_every_stage_a_table_and_a_page(smoke):
    assert_whole(*smoke, ["online-1"], ["single", "random", "family", "mix"])


def test_offline_dpo_starts_at_ln_2_in_the_recipe_too(smoke):
    first = json.loads(
        (smoke[0] / "steps" / "offline-slavic" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
    )
    assert abs(first["dpo_loss"] - 0.693147) < 1e-4


def test_a_merged_stage_is_the_plain_average_of_its_clusters(smoke):
    import torch
    from safetensors.torch import load_file
    steps = smoke[0] / "steps"
    merged = load_file(steps / "sft" / "model" / "model.safetensors")
    parts = [load_file(path / "model" / "model.safetensors") for path in sorted(steps.glob("sft-*"))]
    assert len(parts) == 4
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, sum(p[name] for p in parts) / 4)


def test_a_rerun_skips_what_is_whole(smoke, in_process):
    run, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in run.glob("steps/*/done.json")}
    code, printed, _ = in_process(train, "--preset", "smoke", "--rounds", "1", "--out", run)
    assert code == 0 and "pretraining" not in printed
    assert before == {p: p.stat().st_mtime_ns for p in run.glob("steps/*/done.json")}


@pytest.mark.long
def test_a_killed_run_ends_like_one_of_all_arms_that_was_never_killed(smoke, tmp_path):
    printed = recipe("--arms", "all", "--out", tmp_path / "whole")
    assert_whole(tmp_path / "whole", printed, ["online-1", "online-2", "online-3"],
                 ["single", "random", "family", "mix", "online-only-3", "rloo", "no-shared"])
    killed, whole = ({m["name"]: (m["greedy"]["grade"], m["sampled"]["reward"])
                      for m in json.loads((run / "summary.json").read_text(encoding="utf-8"))["models"]}
                     for run in (smoke[0], tmp_path / "whole"))
    assert len(killed) == 12 and killed.items() < whole.items()


def test_other_settings_in_the_same_folder_are_refused_in_one_line(smoke, in_process):
    before = (smoke[0] / "config.json").read_bytes()
    code, _, err = in_process(train, "--preset", "smoke", "--rounds", "1", "--out", smoke[0], "--seed", "5")
    assert code == 2 and len(err) == 1 and "seed" in err[0]
    assert (smoke[0] / "config.json").read_bytes() == before


@pytest.fixture
def own(smoke, tmp_path):
    """The flags of a recipe on a user's own models, prompts, completions and clusters."""
    steps = smoke[0] / "steps"
    rows = questions("train", 240, 11, level="tiny")
    theirs = [{"question": q["prompt"], "lang": "pt-BR" if q["language"] == "pt" else q["language"]}
              for q in rows]
    # not the judge's
    verdicts = {"grade": "y", "score": 9, "reward": [7], "seen_language": "de", "task": None}
    write_jsonl(tmp_path / "prompts.jsonl", [{**row, **verdicts, "id": i} for i, row in enumerate(theirs)])
    reasons = [{"finish_reason": "length"} if i % 8 == 0 else {} for i in range(len(rows))]
    write_jsonl(tmp_path / "elsewhere.jsonl", [{**row, "completion": gold_answer(q), **reason}
                                               for q, row, reason in zip(rows, theirs, reasons)])
    columns = ["--columns", "prompt=question", "language=lang"]
    (tmp_path / "clusters.json").write_text(
        json.dumps(
            {
                "west": ["it", "pt", "ro", "de", "nl", "el", "cs", "pl", "ru", "uk"],
                "east": ["ar", "he", "fa", "tr", "hi", "zh", "zh-Hant", "ja", "ko", "vi", "id"],
            }
        )
    )
    return ["--base", steps / "base" / "model", "--prompts", tmp_path / "prompts.jsonl", "--teachers",
            steps / "teacher-slavic" / "model", tmp_path / "elsewhere.jsonl", "--arbiter",
            steps / "arbiter" / "model", "--clusters", tmp_path / "clusters.json", "--rounds", "1", *columns]


@pytest.mark.long
def test_the_pipeline_takes_a_users_own_models_prompts_and_completions(own, tmp_path):
    assert "not a win rate" in recipe("--out", tmp_path / "own", *own)
    summary = json.loads((tmp_path / "own" / "summary.json").read_text(encoding="utf-8"))
    assert not any("grade" in m[d] or "right_language" in m[d] for m in summary["models"]
                   for d in ("greedy", "sampled"))
    assert "grade" not in (tmp_path / "own" / "data" / "sft-west.jsonl").read_text(encoding="utf-8")
    assert summary["arbitrage"]["cut"] >= 30 and "pt-BR" in summary["arbitrage"]["cut_by_language"]
    base = summary["models"][0]["greedy"]
    assert "pt-BR" in base["by_language"] and base["cut"] > 0
    assert [m["name"] for m in summary["models"]] == [
        "base",
        "single",
        "random",
        "mix",
        "sft",
        "offline",
        "online-1",
    ]


@pytest.mark.long
def test_a_users_own_judge_grades_the_users_models(own, smoke, tmp_path):
    shutil.copytree(smoke[0] / "steps" / "arbiter" / "model", tmp_path / "judge")
    printed = recipe("--out", tmp_path / "judged", *own, "--judge", tmp_path / "judge")
    assert "reward model" in printed.lower()
    summary = json.loads((tmp_path / "judged" / "summary.json").read_text(encoding="utf-8"))
    assert all(isinstance(m["greedy"]["grade"], float) for m in summary["models"])


def test_what_a_user_brings_is_looked_at_before_any_work(smoke, tmp_path, in_process):
    steps, run = smoke[0] / "steps", tmp_path / "own"
    good = {
        "--base": steps / "base" / "model",
        "--prompts": tmp_path / "p.jsonl",
        "--teachers": steps / "base" / "model",
        "--arbiter": steps / "arbiter" / "model",
    }
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "eins", "language": "de"}\n{"prompt": "zwei", "language": "de"}\n', encoding="utf-8"
    )
    (tmp_path / "short.jsonl").write_text('{"prompt": "eins", "completion": "1"}\n', encoding="utf-8")
    (tmp_path / "clusters.json").write_text('{"east": ["ja"], "west": ["nl"]}')
    wrong = {
        "no answer for 1 of 2": {"--teachers": tmp_path / "short.jsonl"},
        "not a reward model": {"--arbiter": steps / "base" / "model"},
        "not a language model": {"--base": steps / "arbiter" / "model"},
        "in no cluster": {"--clusters": tmp_path / "clusters.json"},
        "p.jsonl.missing": {"--prompts": tmp_path / "p.jsonl.missing"},
        "must not be the arbiter": {"--judge": good["--arbiter"]},
    }
    for message, change in wrong.items():
        words = (word for pair in {**good, **change}.items() for word in pair)
        code, _, err = in_process(train, "--out", run, *words)
        assert code == 2 and len(err) == 1 and message in err[0], err
        assert not run.exists()


def test_what_a_user_put_into_a_step_is_refused_and_kept_and_a_killed_steps_own_rest_goes(tmp_path):
    """A folder with any config.json, and the folder of a killed step, were removed with all that was in
    them."""
    run = pipeline_steps.Run(tmp_path / "run", config.Recipe(), CPU, {})

    def make(folder, resume):
        folder.mkdir(parents=True, exist_ok=True)
        assert not list(folder.iterdir())
        (folder / "pairs.jsonl").write_text("half")
        if not (tmp_path / "go").exists():
            raise KeyboardInterrupt
    (theirs := tmp_path / "run" / "steps" / "theirs").mkdir(parents=True)
    (theirs / "config.json").write_text("{}")
    (theirs / "thesis.txt").write_text("thesis")
    with pytest.raises(KeyboardInterrupt):
        pipeline_steps.step(run, "killed", "a step", make)
    (killed := tmp_path / "run" / "steps" / "killed" / "thesis.txt").write_text("thesis")
    for folder in (theirs, killed.parent):
        with pytest.raises(ValueError, match=r"holds what this run did not make \(thesis.txt\)"):
            pipeline_steps.step(run, folder.name, "a step", make)
        assert (folder / "thesis.txt").read_text() == "thesis"
    killed.unlink()
    (tmp_path / "go").touch()
    assert pipeline_steps.step(run, "killed", "a step", make)["name"] == "killed"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "steps" / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="linked: a link"):
        pipeline_steps.step(run, "linked", "a step", make)
    assert not list((tmp_path / "elsewhere").iterdir())


DAMAGED = ["", "{", "[]", "{}", '{"name": "s"}', "null", "\ufffd"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_record_of_a_step_is_one_line_with_what_to_do(text, tmp_path):
    """Half of them were a KeyError, the others did not say what to do."""
    run = pipeline_steps.Run(tmp_path, config.Recipe(), CPU, {})
    made = {"rewards": {"greedy": [1.5]}, "by": {2: 1}}
    pipeline_steps.step(run, "s", "a step", lambda folder, resume: made)
    done = tmp_path / "steps" / "s" / "done.json"
    whole = done.read_text(encoding="utf-8")
    done.write_text(text, encoding="utf-8")
    for call in (lambda: pipeline_steps.step(run, "s", "a step", None),
                 lambda: pipeline_steps.read_done(done.parent)):
        with pytest.raises(ValueError, match=r"done.json: .*remove .*/s, and the same command does"):
            call()
    for wrong in ({"rewards": {"greedy": [1.25]}}, {"seconds": "1"}, {"tokens": None}, {"more": 1},
                  {"sha256": []}):
        done.write_text(json.dumps(json.loads(whole) | wrong))
        with pytest.raises(ValueError, match="not as the step wrote it"):
            pipeline_steps.step(run, "s", "a step", None)
    shutil.copytree(done.parent, tmp_path / "steps" / "t")
    with pytest.raises(ValueError, match="t/done.json: not as the step wrote it"):       # another step's
        (tmp_path / "steps" / "t" / "done.json").write_text(whole)
        pipeline_steps.step(run, "t", "a step", None)
    done.unlink()
    done.mkdir()
    with pytest.raises(ValueError, match=r"holds what this run did not make \(done.json\)"):
        pipeline_steps.step(run, "s", "a step", None)
    done.rmdir()
    done.write_text(whole)
    assert pipeline_steps.step(run, "s", "a step", None)["rewards"] == {"greedy": [1.5]}
    older = {key: value for key, value in json.loads(whole).items() if key != "sha256"}
    done.write_text(json.dumps(older))                      # of a version that recorded no digests
    assert pipeline_steps.step(run, "s", "a step", None) == older


def test_rows_that_changed_after_their_step_are_refused(tmp_path):
    """A recipe went on with half of its candidates."""
    run = pipeline_steps.Run(tmp_path, config.Recipe(), CPU, {})
    path = tmp_path / "steps" / "s" / "candidates.jsonl"

    def make(folder, resume):
        folder.mkdir(parents=True)
        write_jsonl(path, [{"n": 1}, {"n": 2}])
    for _ in range(2):
        pipeline_steps.step(run, "s", "a step", make)
    path.write_text('{"n": 1}\n')
    with pytest.raises(ValueError, match="candidates.jsonl: not as the step wrote it.*remove"):
        pipeline_steps.step(run, "s", "a step", make)
    path.unlink()
    with pytest.raises(ValueError, match="candidates.jsonl: not as the step wrote it.*remove"):
        pipeline_steps.step(run, "s", "a step", make)
    shutil.rmtree(path.parent)
    pipeline_steps.step(run, "s", "a step", make)
    assert len(pipeline_steps.saved_rows(path)) == 2


def test_a_killed_step_that_cannot_go_on_says_how_to_do_it_anew(tmp_path):
    """Its message was that of a stage's --resume, which the recipe does not have."""
    run = pipeline_steps.Run(tmp_path, config.Recipe(), CPU, {})
    (tmp_path / "steps" / "s" / "state" / "step-1").mkdir(parents=True)
    (tmp_path / "steps" / "s" / "state" / "step-1" / "manifest.json").write_text("{}")

    def make(folder, resume):
        assert resume
        raise ValueError(f"--resume {folder}: it is damaged")
    with pytest.raises(ValueError, match=r"^/.*/s: it is damaged. .*remove .*/s, and the same command"):
        pipeline_steps.step(run, "s", "a step", make)


def test_a_nul_that_an_earlier_version_wrote_into_a_step_is_read(tmp_path):
    (tmp_path / "candidates.jsonl").write_text('{"a": "x\\u0000y", "b": "\\\\u0000"}\n')
    assert pipeline_steps.saved_rows(tmp_path / "candidates.jsonl") == [{"a": "x\ufffdy", "b": "\\u0000"}]
