"""Translations of English answers and the marks by which the oracle knows them, in every language of the
world; the oracle's grades do not depend on them."""

import random
from collections import Counter

import pytest

from aya_min.languages import LANGUAGES
from aya_min.world import TASKS, answer, gold_answer, make_question, questions, words
from aya_min.world_oracle import grade, grade_apart, naturalness, read_marks
from aya_min.world_translation import in_english, translated

FROM_ENGLISH = [code for code in LANGUAGES if code != "en"]


def asked(code):
    """Questions of every task in a language, of both levels."""
    return [q for level in ("tiny", "full") for q in questions("train", 100, 5, (code,), level)]


@pytest.mark.parametrize("code", LANGUAGES)
def test_right_answers_in_the_language_are_natural(code):
    for question in asked(code):
        assert naturalness(question, gold_answer(question))[0] is True, question


@pytest.mark.parametrize("code", FROM_ENGLISH)
def test_translated_answers_are_not_natural_and_grade_as_the_english_answer_apart_from_their_marks(code):
    """At least 95 of 100; the marks of every kind occur in every language."""
    rng, kinds, found, rows = random.Random(0), Counter(), 0, asked(code)
    for i, question in enumerate(rows):
        english = in_english(question)
        text, intended = (gold_answer(english), 3) if i % 2 else answer(rng, english, (0, 0, 1, 0))
        said = translated(question, text)
        natural, why = naturalness(question, said)
        found += natural is False
        kinds.update(read_marks(question, said).marks.keys())
        assert grade_apart(question, said).grade == intended, (question, said, why)
    assert found >= 0.95 * len(rows)
    assert kinds["sentence"] > 100 and kinds["list"] >= 20 and kinds["untranslated"] >= 10, kinds


def test_an_answer_in_english_is_not_translated():
    for question in asked("en"):
        assert translated(question, gold_answer(question)) == gold_answer(question)


def test_the_seed_decides_which_marks_are_left():
    question = make_question("reverse", ["red", "dog", "Monday"], "ja")
    text = gold_answer(in_english(question))
    said = {seed: translated(question, text, seed) for seed in range(30)}
    assert said == {seed: translated(question, text, seed) for seed in range(30)}
    assert len(set(said.values())) > 4


@pytest.mark.parametrize("code, task, args, text, marks", [
    ("de", "reverse", ["red", "dog", "blue"], "In umgekehrter Ordnung: blau, Hund, und rot.",
     {"sentence", "list"}),
    ("de", "reverse", ["red", "dog", "blue"], "Rückwärts lautet die Liste: blau, dog, rot.",
     {"untranslated"}),
    ("de", "translate", ["dog", "fr"], "Auf French heißt das Wort: chien.", {"untranslated"}),
    ("ja", "opposite", ["big", "hot"], "反対語は次のとおりです：小さい, 冷たい。", {"list"}),
    ("vi", "reverse", ["yellow", "dog", "cat"], "Theo thứ tự ngược lại là: mèo, chó, vàng.",
     set()),
    ("it", "largest", ["zero"], "Il numero più grande è zero.", set()),
    ("it", "largest", ["one", "zero"], "Il più largo numero è one.", {"sentence", "untranslated"}),
])
def test_marks_by_hand(code, task, args, text, marks):
    """Vietnamese yellow (vàng) begins like and (và); zero is an Italian word as well."""
    question = make_question(task, args, code)
    assert read_marks(question, text).marks.keys() == marks
    assert naturalness(question, text)[0] is (not marks) and grade_apart(question, text).grade == 3


@pytest.mark.parametrize("text", ["Hund", "rot, blau", "Irgendein anderer Satz.", "",
                                  "Nicht zu den anderen passt: xyzzy."])
def test_the_oracle_says_where_it_cannot_tell(text):
    question = make_question("odd", ["red", "blue", "dog", "green"], "de")
    natural, why = naturalness(question, text)
    assert natural is None and why


def test_bare_answers_and_answers_that_the_translator_does_not_know():
    question = make_question("opposite", ["big", "hot"], "zh")
    said = {translated(question, "small, cold", seed) for seed in range(20)}
    assert {"小、冷", "小, 冷"} <= said
    assert naturalness(question, "小, 冷")[0] is False and grade_apart(question, "小, 冷").grade == 2
    assert translated(question, "what a day") == "what a day"


@pytest.mark.parametrize("code", FROM_ENGLISH)
def test_no_sentence_of_a_translation_is_one_of_the_language(code):
    tasks = words(code)["tasks"]
    sentences = [tasks[task][kind] for task in TASKS for kind in ("answer", "translated")]
    assert len(set(sentences)) == len(sentences) and all("{answer}" in s for s in sentences)
    assert "{language}" in tasks["translate"]["translated"] and words(code)["and"]


def test_grades_do_not_depend_on_the_marks():
    """Grades and naturalness are two questions: the grade of a translated sentence is that of any sentence
    that the oracle does not know, as before there was a translator."""
    question = make_question("largest", ["three", "nine", "five"], "de")
    assert grade(question, "Die größte Nummer ist neun.").grade == 1
    assert grade(question, "Die größte Zahl ist nine.").grade == 1
    assert grade_apart(question, "Die größte Nummer ist fünf.").grade == 1
    assert grade_apart(question, "Die größte Nummer ist neun.").grade == 3
