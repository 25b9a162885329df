"""Span corruption: a text worked by hand, what always holds, and rows that are read."""

import json

import numpy as np
import pytest
from small_t5 import tokenizer

from aya_min import config
from aya_min.data import load_examples
from aya_min.span_corruption import corrupt, corrupted, counts, longest_text, spans

SENTINELS, END = [99, 98, 97, 96], 1


def test_the_papers_sentence():
    """Thank you <for inviting> me to your party <last> week: figure 2 of arXiv 1910.10683."""
    ids = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    assert corrupt(ids, SENTINELS, END, [2, 4, 0], [2, 1, 1]) == (
        [10, 11, 99, 14, 15, 16, 17, 98, 97, END], [99, 12, 13, 98, 18, 97, 19, 96, END])


def test_15_percent_are_replaced_in_spans_of_3():
    assert [counts(n) for n in (2, 10, 20, 100, 1000)] == [(1, 1), (2, 1), (3, 1), (15, 5), (150, 50)]


@pytest.mark.parametrize("num_tokens", [2, 3, 7, 40, 333])
def test_source_and_target_together_are_the_text(num_tokens):
    rng = np.random.default_rng(0)
    for _ in range(20):
        kept, replaced = spans(num_tokens, rng)
        assert kept.min() >= 1 and replaced.min() >= 1 and kept.sum() + replaced.sum() == num_tokens
        ids = list(range(1000, 1000 + num_tokens))
        sentinels = list(range(500, 300, -1))
        source, target = corrupt(ids, sentinels, END, kept, replaced)
        assert source[0] >= 1000 and source[-1] == target[-1] == END and target[0] == 500
        parts = {}
        for i in target[:-1]:
            if i < 1000:
                parts[key] = [] if (key := i) is not None else None
            else:
                parts[key].append(i)
        back = [j for i in source[:-1] for j in (parts[i] if i < 1000 else [i])]
        assert back == ids


def test_all_cuts_are_equally_likely():
    """5 tokens that are kept in 2 spans: 1 + 4, 2 + 3, 3 + 2, 4 + 1, a quarter each."""
    from aya_min.span_corruption import cut_into
    rng = np.random.default_rng(0)
    drawn = np.array([cut_into(5, 2, rng)[0] for _ in range(4000)])
    assert set(drawn) == {1, 2, 3, 4} and all(abs((drawn == n).mean() - 0.25) < 0.03 for n in (1, 2, 3, 4))


def test_a_long_text_is_cut_into_pieces_that_fit_and_a_last_token_alone_is_left_out():
    for limit, num_sentinels in ((16, 4), (40, 100), (200, 5)):
        room = longest_text(limit, num_sentinels)
        sentinels = list(range(500, 500 - num_sentinels, -1))
        made = corrupted(list(range(1000, 1000 + 3 * room + 1)), sentinels, END, limit, 0, "f:1")
        assert len(made) == 3 and all(len(source) + len(target) <= limit for source, target in made)
        # one token more would not fit, or would need another sentinel
        _, num_spans = counts(room + 1)
        assert room + 1 + 2 * num_spans + 3 > limit or num_spans >= num_sentinels


def test_the_spans_depend_on_the_seed_and_the_texts_place_alone():
    ids = list(range(1000, 1100))
    first = corrupted(ids, list(range(500, 400, -1)), END, 200, 0, "f:1")
    assert first == corrupted(ids, list(range(500, 400, -1)), END, 200, 0, "f:1")
    assert first != corrupted(ids, list(range(500, 400, -1)), END, 200, 1, "f:1")
    assert first != corrupted(ids, list(range(500, 400, -1)), END, 200, 0, "f:2")


def test_texts_become_examples_whose_target_is_supervised(tmp_path):
    path = tmp_path / "f.jsonl"
    row = {"text": "one two three four five " * 20, "language": "en"}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    examples = load_examples([path], tokenizer(), 64, config.Pretrain())
    assert len(examples) > 2 and all(len(e.ids) <= 64 and e.language == "en" for e in examples)
    first = tokenizer().sentinels[0]
    for e in examples:
        source, target = e.ids[~e.mask], e.ids[e.mask]
        assert target[0] == first and first in source and source[-1] == target[-1] == 1
        assert e.mask.tolist() == sorted(e.mask.tolist())
    others = load_examples([path], tokenizer(), 64, config.Pretrain(seed=1))
    assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(examples, others))


@pytest.mark.parametrize("limit, sentinels, message", [
    (6, SENTINELS, "--max-length 6 leaves no room"), (40, [], "span corruption needs sentinels")])
def test_what_cannot_be_corrupted_is_refused(limit, sentinels, message):
    with pytest.raises(ValueError, match=message):
        corrupted([7, 8, 9], sentinels, END, limit, 0, "f:1")


def test_the_longest_text_is_found_at_once_under_any_limit():
    """It was looked for by counting down from the limit, which for these models is a thousand million: a
    command that read texts up to the model's positions never ended."""
    def fits(length):
        return length + 2 * counts(length)[1] + 3 <= 300 and counts(length)[1] < 100
    assert longest_text(300, 100) == max(filter(fits, range(2, 301)))
    assert longest_text(1 << 30, 100) == longest_text(10_000, 100)
    assert counts(longest_text(1 << 30, 100))[1] == 99
