import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import ROOT, program

from aya_min.command import guarded
from aya_min.languages import CLUSTERS, LANGUAGES, SHARED
from aya_min.world import (SPLITS, TASKS, answer, check_question, gold_answer, grade, main, make_question,
                           questions,
                           split_of, words)

CASES = Path(__file__).parent / "world_cases"


@pytest.mark.parametrize("code", LANGUAGES)
def test_the_oracle_grades_hand_written_answers_as_their_writer_did(code):
    for case in json.loads((CASES / f"{code}.json").read_text(encoding="utf-8")):
        verdict = grade(make_question(case["task"], case["args"], code), case["completion"])
        assert verdict.grade == case["grade"], (case, verdict)
        assert verdict.language == case["sees"], (case, verdict)
        assert verdict.why


def test_the_oracle_gives_generated_answers_their_intended_grade():
    rng, wrong = random.Random(0), []
    for question in questions("train", 2400, 1):
        text, intended = answer(rng, question, (1, 1, 1, 1))
        if grade(question, text).grade != intended:
            wrong.append((question["language"], question["task"], text, intended, grade(question, text)))
    assert len(wrong) <= 0.02 * 2400, wrong[:20]


def test_splits_share_no_argument_combination():
    """Disjoint by the combination of arguments, not only by wording: sorted arguments of one split never occur in another."""
    seen = {}
    for split in SPLITS:
        for q in questions(split, 1200, 3):
            key = (q["task"], tuple(sorted(q["args"])), q["language"] if q["task"] == "translate" else "")
            assert seen.setdefault(key, split) == split
            assert split_of(q["task"], q["args"], q["language"]) == split


def test_every_language_has_every_task_in_two_phrasings_and_sixty_concepts():
    for code in LANGUAGES:
        w = words(code)
        assert len(set(w["lookup"].values())) == len(w["lookup"]) >= 60
        for task in TASKS:
            assert len(set(w["tasks"][task]["prompts"])) >= 2


def test_chinese_and_japanese_questions_have_no_spaces():
    for q in questions("train", 300, 0, languages=("zh", "zh-Hant", "ja")):
        foreign = q["task"] == "translate"      # the translated word itself may have a space
        assert " " not in q["prompt"] + ("" if foreign else gold_answer(q)), q


def test_questions_depend_only_on_the_seed():
    assert questions("test", 100, 5) == questions("test", 100, 5) != questions("test", 100, 6)


def test_every_language_is_in_one_cluster_or_shared():
    assert sorted(sum(CLUSTERS.values(), []) + SHARED) == sorted(LANGUAGES)


def test_the_command_writes_every_split_and_asks_no_test_question_twice(tmp_path):
    """The arena refused answers to a test file in which some questions stood twice."""
    out = tmp_path / "world"
    program("-m", "aya_min.world", "--out", out, "--count", "480", "--level", "tiny", check=True)
    rows = {path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in out.glob("*.jsonl")}
    assert set(SPLITS) | {"sft", "pairs", "text"} == set(rows) and all(len(rows[name]) == 480 for name in SPLITS)
    for name in ("validation", "test"):
        assert len({(q["question_id"], q["language"]) for q in rows[name]}) == 480
    again = program("-m", "aya_min.world", "--out", out)
    assert again.returncode == 2 and len(again.stderr.strip().splitlines()) == 1


def run_command(*args, code=0, capsys=None):
    """Standard error of the command, run in this process; its exit code must be `code`, and a mistake one
    line."""
    with pytest.raises(SystemExit) as ended:
        guarded(lambda: main([str(arg) for arg in args]), "aya_min.world")
    said = capsys.readouterr().err
    assert (ended.value.code or 0) == code and said.count("\n") == (code != 0), (ended.value.code, said)
    return said


@pytest.mark.parametrize("flag, value, says", [
    ("--count", "0", "of at least 1"), ("--count", "-5", "of at least 1"), ("--count", "1e3", "whole number"),
    ("--count", "9" * 400, "whole number"), ("--seed", "-1", "of at least 0"),
    ("--seed", "0.5", "whole number"),
    ("--level", "huge", "invalid choice"), ("--out", "a\udcffb", "not UTF-8"),
    pytest.param("--count", "60000", "has only", marks=pytest.mark.long)])
def test_a_wrong_flag_of_the_world_is_one_line_and_leaves_nothing(flag, value, says, tmp_path, capsys,
                                                                  monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"--out": "new/world", "--level": "tiny"} | {flag: value}
    assert says in run_command(*(x for pair in flags.items() for x in pair), code=2, capsys=capsys)
    assert list(tmp_path.iterdir()) == []


def test_what_stands_where_the_world_is_to_go_stays_and_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("file", "link", "folder", "file/below"):
        assert name.split("/")[0] in run_command("--out", tmp_path / name, "--count", 1, code=2,
                                                 capsys=capsys)
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize("delay", [pytest.param(0.0, marks=pytest.mark.long), 0.02, pytest.param(0.05, marks=pytest.mark.long)])
def test_a_killed_world_leaves_no_folder_of_that_name_and_the_next_run_makes_it(delay, tmp_path, capsys):
    """14 of 15 kills left half a folder, which the next run refused."""
    command = [sys.executable, "-m", "aya_min.world", "--out", tmp_path / "world", "--count", "2400",
               "--level", "tiny"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".world.*/world")):
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "world").exists():
        run_command("--out", tmp_path / "world", "--count", 48, capsys=capsys)
        assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert len(list((tmp_path / "world").iterdir())) == 7


def test_under_torchrun_rank_0_alone_writes_the_world_and_the_others_end_well(tmp_path):
    world = ["-m", "aya_min.world", "--out", tmp_path / "world", "--count", "24"]
    for rank in "10":
        environment = os.environ | {"TORCHELASTIC_RUN_ID": "none", "RANK": rank, "WORLD_SIZE": "2",
                                    "LOCAL_RANK": rank}
        done = program(*world, env=environment)
        assert done.returncode == 0 and not done.stderr and bool(done.stdout) == (rank == "0")


@pytest.mark.parametrize("code", ["../../secret", "other", "pt-BR", "sw", "", "en.json"])
def test_only_the_word_files_that_ship_are_opened(code):
    """args ["one", "../../../../SCRATCH"] of the task translate opened and parsed that file."""
    with pytest.raises(ValueError, match="no words in"):
        words(code)


def test_the_oracle_takes_every_question_of_the_world():
    for level in ("tiny", "full"):
        for question in questions("test", 480, 2, level=level):
            check_question(question)


@pytest.mark.parametrize("task, args, says", [
    ("largest", ["three", "elf"], "'elf'"), ("largest", [], "more args, not 0"), ("sort", ["dog"], "'dog'"),
    ("sum", ["twelve", "one"], "above twelve"), ("sum", ["one", 2], "English words"),
    ("odd", ["dog", "cat"], "of its own"),
    ("odd", ["Paris", "dog"], "'Paris'"), ("opposite", ["Paris"], "'Paris'"),
    ("opposite", [["big", "small"]], "English words"),
    ("translate", ["one"], "2 args, not 1"), ("translate", ["one", "../../x"], "'../../x'"),
    ("count", ["dog"], "more args"),
    ("translate", ["xyzzy", "de"], "'xyzzy'"), ("count", ["dog"] * 15, "above twelve"),
    ("capital", ["Paris"], "'Paris'"),
    ("day", ["three", "Monday"], "'three'"), ("day", ["Monday"], "2 args"), ("reverse", ["xyzzy"], "'xyzzy'"),
    ("largest", "three", "list of English words"), ("poem", ["one"], "no task 'poem'"),
    ("reverse", {"dog": 1}, "list of")])
def test_a_question_that_the_oracle_cannot_answer_is_refused_with_the_reason(task, args, says):
    """8 of 17 such questions were tracebacks, the rest lines that named neither task nor word."""
    with pytest.raises(ValueError, match=says):
        check_question({"task": task, "args": args, "language": "en"})
    with pytest.raises(ValueError, match="no language 'sw'"):
        check_question({"task": "largest", "args": ["one", "two"], "language": "sw"})
