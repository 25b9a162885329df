"""Lexical diversity by hand, words in scripts with and without spaces."""

import pytest

from aya_min.text_statistics import (distinct_2, factors, mtld, statistics_table, text_statistics,
                                     words_of)


def test_mtld_of_the_example_of_its_paper():
    """of the people by the people: 4 of 6 is the first ratio below .72. for the people: no repeat, no part.
    Backwards people the for people the: 3 of 5. Both ways one factor of nine words."""
    words = "of the people by the people for the people".split()
    assert factors(words) == factors(words[::-1]) == 1 and mtld(words) == 9


def test_the_rest_counts_for_the_part_of_a_factor_that_its_ratio_has_fallen():
    """a b a: 2 of 3 ends a factor. Then c d e f c: 4 of 5, so that (1 - .8) / .28 of a factor remains.
    Backwards c f e d c a b a: 4 of 5, 6 of 8 at the end, .25 / .28 of a factor and none before."""
    words = "a b a c d e f c".split()
    assert factors(words) == pytest.approx(1 + 0.2 / 0.28)
    assert factors(words[::-1]) == pytest.approx(0.25 / 0.28)
    assert mtld(words) == pytest.approx((8 / (1 + 0.2 / 0.28) + 8 / (0.25 / 0.28)) / 2)


def test_a_ratio_of_exactly_the_factor_does_not_end_it():
    words = [*map(str, range(18)), *["0"] * 7]                  # 18 of 25 is .72
    assert factors(words) == pytest.approx(1)
    assert factors([*words, "0", "0"]) == 1                     # else the last two would end one more


def test_words_that_never_repeat_have_no_mtld():
    assert mtld("a b c".split()) is None and mtld([]) is None


def test_distinct_2_counts_pairs_within_texts():
    assert distinct_2([["a", "b", "a", "b"], ["a", "b"], ["c"]]) == 2 / 4       # ab ba ab, ab
    assert distinct_2([["a"]]) is None


@pytest.mark.parametrize("text, words", [
    ("The cat, the CAT!", ["the", "cat", "the", "cat"]),
    ("l'homme dit: 12 mots", ["l", "homme", "dit", "12", "mots"]),
    ("三月比五月早。", list("三月比五月早")),
    ("これはペンです", list("これはペンです")),
    ("น้ำดี", ["น้", "ำ", "ดี"]),
    ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),             # its vowel signs are marks, no separators
    ("한국어 말", ["한국어", "말"]),
    ("GPT模型 ok", ["gpt", "模", "型", "ok"]),
    ("e\u0301te\u0301", ["été"]), ("...", [])])
def test_words_are_found_in_every_script(text, words):
    assert words_of(text) == words


def test_statistics_are_by_language_and_over_all():
    rows = [{"language": "fr", "completion": "a b a b", "finish_reason": "stop"},
            {"language": "fr", "completion": "a b", "finish_reason": "length"},
            {"completion": "x y z"}]
    found = text_statistics(rows, lambda text: len(text.split()))
    assert found["fr"] == {"answers": 2, "tokens": 3, "distinct_2": 2 / 4, "cut": 0.5,
                           "mtld": mtld("a b a b a b".split())}
    assert found["other"]["mtld"] is None and found["other"]["distinct_2"] == 1
    assert found["all"] == {"answers": 3, "tokens": 3, "cut": pytest.approx(1 / 3), "distinct_2": 0.75,
                            "mtld": found["fr"]["mtld"]}
    assert statistics_table(found)[2].split() == ["other", "1", "3.0", "-", "1.000", "0.0%"]
    assert text_statistics([], len)["all"]["answers"] == 0
