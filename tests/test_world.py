import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from small import ROOT, program

from aya_min.command import guarded
from aya_min.languages import CLUSTERS, LANGUAGES, SHARED
from aya_min.world import (SPLITS, TASKS, _sentence, wrong_concepts, answer, gold_answer, listed, main,
                           make_question, questions, say, solve, split_of, words)
from aya_min.world_oracle import accepted, check_question, coverage, grade, lexicon

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
        assert grade(question, gold_answer(question)).grade == 3, question
        text, intended = answer(rng, question, (1, 1, 1, 1))
        if grade(question, text).grade != intended:
            wrong.append((question["language"], question["task"], text, intended, grade(question, text)))
    assert not wrong, wrong[:20]


def spellings(code, concept):
    """The word and its synonyms as the file writes them."""
    return say(code, [concept]) + words(code).get("also", {}).get(concept, [])


def asked(code):
    """Questions of all tasks with answers in a language; every word that has synonyms is in an answer."""
    opposite = {a: b for pair in words("en")["words"]["opposites"] for a, b in (pair, pair[::-1])}
    country = {city: country for country, city in words("en")["words"]["capitals"]}
    for concept in words(code).get("also", {}):
        others = [c for c in ("dog", "red", "salt") if c != concept]
        yield make_question("reverse", [concept, *others[:2]], code)
        yield make_question("reverse", [others[0], concept, others[1]], code)
        if concept in opposite:
            yield make_question("opposite", ["night", opposite[concept]], code)
        elif concept in country:
            yield make_question("capital", ["Turkey", country[concept]], code)
        else:
            yield make_question("translate", [concept, code], "fr" if code == "en" else "en")
    yield from (q for q in questions("train", 60, 4, languages=(code,)) if q["task"] != "translate")


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_right_answer_with_an_accepted_synonym_never_grades_below_a_wrong_one(code):
    """Some 150 right answers got 0, "garbage", where a wrong one got 1: en -> el "λευκό", fr "oeuf"."""
    rng = random.Random(0)
    for question in asked(code):
        right = solve(question["task"], question["args"])
        for place, concept in enumerate(right):
            for word in spellings(code, concept):
                said = say(code, right)
                said[place] = word
                for text, least in ((_sentence(question, said), 3), (listed(question["language"], said), 2)):
                    assert grade(question, text).grade == least, (question, text, grade(question, text))
        wrong = [rng.choice(spellings(code, concept)) for concept in wrong_concepts(rng, question)]
        for text in (_sentence(question, wrong), listed(question["language"], wrong)):
            assert grade(question, text).grade <= 1, (question, text)


@pytest.mark.parametrize("code", LANGUAGES)
def test_no_accepted_spelling_of_a_language_stands_for_two_words(code):
    """Persian had one word for lion and milk, so that some questions had no odd word out."""
    owner, w = {}, words(code)
    for concept in w["lookup"]:
        for spelling in accepted(code, concept):
            assert owner.setdefault(spelling, concept) == concept, spelling
            assert spelling and "," not in spelling
    assert {*w.get("also", {}), *w.get("unclear", [])} <= w["lookup"].keys()
    for concept in w.get("also", {}):
        assert len(accepted(code, concept)) == len(spellings(code, concept)), concept


def test_no_animal_of_the_world_is_a_food_as_well():
    """Of bread, milk, fish and cheese no word was the odd one out: fish stood for an animal."""
    assert not {"fish", "chicken", "duck", "goose", "lamb", "shrimp"} & set(words("en")["words"]["animals"])


def test_a_word_that_means_two_things_when_it_stands_alone_is_not_asked_to_be_translated():
    """fr "fille" is a girl as well as a daughter, and "girl" was graded as garbage."""
    for code in LANGUAGES:
        for q in questions("train", 300, 2, languages=(code,)):
            assert q["task"] != "translate" or q["args"][0] not in words(code).get("unclear", []), q
    assert "daughter" in words("fr")["unclear"]


@pytest.mark.parametrize("code", LANGUAGES)
def test_no_word_of_the_lexicon_has_a_mark_at_its_edge(code):
    """The lexicon held "¿qué" and "تصل؟", so that the words without the mark were unknown to the oracle."""
    edges = {end for word in lexicon(code) for end in (word[0], word[-1])} - {"'"}
    assert not [end for end in edges if unicodedata.category(end).startswith("P")]
    assert coverage("es", "qué día será") == 1


def test_splits_share_no_argument_combination():
    """Splits are disjoint by the sorted arguments, not only by the wording."""
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
    command = ["-m", "aya_min.world", "--out", out, "--count", "480", "--level", "tiny"]
    program(*command, check=True)
    rows = {path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for path in out.glob("*.jsonl")}
    assert set(SPLITS) | {"sft", "pairs", "text"} == set(rows)
    assert all(len(rows[name]) == 480 for name in SPLITS)
    for name in ("validation", "test"):
        assert len({(q["question_id"], q["language"]) for q in rows[name]}) == 480
    again = program(*command)
    assert again.returncode == 2 and len(again.stderr.strip().splitlines()) == 1


def run_command(*args, code=0, capsys=None):
    """Standard error of the command, run in this process. It must exit with `code`; a mistake is one line."""
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


def test_a_path_that_is_taken_is_refused_in_one_line_and_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("file", "link", "folder", "file/below"):
        assert name.split("/")[0] in run_command("--out", tmp_path / name, "--count", 1, code=2,
                                                 capsys=capsys)
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize(
    "delay", [pytest.param(0.0, marks=pytest.mark.long), 0.02, pytest.param(0.05, marks=pytest.mark.long)]
)
def test_a_killed_world_leaves_no_folder_of_that_name_and_the_next_run_makes_it(delay, tmp_path, capsys):
    """14 of 15 kills left a folder with half of the files, and the next run refused it."""
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
    """A translation with the args ["one", "../../../../SCRATCH"] opened that file and parsed it."""
    with pytest.raises(ValueError, match="no words in"):
        words(code)


def test_the_help_says_what_the_world_and_the_oracle_are(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "The world is a set of seeded questions" in said
    assert "The oracle is the program that checks" in said


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
    ("translate", ["xyzzy", "de"], "'xyzzy'"), ("translate", ["hot", "nl"], "'hot'"),
    ("count", ["dog"] * 15, "above twelve"),
    ("capital", ["Paris"], "'Paris'"),
    ("day", ["three", "Monday"], "'three'"), ("day", ["Monday"], "2 args"), ("reverse", ["xyzzy"], "'xyzzy'"),
    ("largest", "three", "list of English words"), ("poem", ["one"], "no task 'poem'"),
    ("reverse", {"dog": 1}, "list of")])
def test_a_question_that_the_oracle_cannot_answer_is_refused_with_the_reason(task, args, says):
    """8 of 17 such questions ended in a traceback, the rest in a line that named neither task nor word."""
    with pytest.raises(ValueError, match=says):
        check_question({"task": task, "args": args, "language": "en"})
    with pytest.raises(ValueError, match="no language 'sw'"):
        check_question({"task": "largest", "args": ["one", "two"], "language": "sw"})


def test_questions_of_given_tasks_are_of_these_alone():
    rows = questions("test", 60, 0, ("en", "tr"), "tiny", tasks=["sort", "sum"])
    assert [(row["language"], row["task"]) for row in rows[:4]] == [
        ("en", "sort"), ("tr", "sort"), ("en", "sum"), ("tr", "sum")]
    assert {row["task"] for row in rows} == {"sort", "sum"}
