import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from aya_min.languages import CLUSTERS, LANGUAGES, SHARED
from aya_min.world import SPLITS, TASKS, answer, gold_answer, grade, make_question, questions, split_of, words

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
    subprocess.run([sys.executable, "-m", "aya_min.world", "--out", out, "--count", "480", "--level", "tiny"], check=True, cwd=CASES.parent.parent, capture_output=True)
    rows = {path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in out.glob("*.jsonl")}
    assert set(SPLITS) | {"sft", "pairs", "text"} == set(rows) and all(len(rows[name]) == 480 for name in SPLITS)
    for name in ("validation", "test"):
        assert len({(q["question_id"], q["language"]) for q in rows[name]}) == 480
    again = subprocess.run([sys.executable, "-m", "aya_min.world", "--out", out], cwd=CASES.parent.parent, capture_output=True, text=True)
    assert again.returncode == 2 and len(again.stderr.strip().splitlines()) == 1
