"""Span corruption, the pretraining of T5 and mT5 (arXiv 1910.10683 section 3.1.4, 2010.11934 section 3.2):
15% of the tokens, in spans of 3 on average, are replaced by one sentinel a span, and the target says what
they were.

    text      Thank you for inviting me to your party last week .
    source    Thank you <0> me to your party <1> week .
    target    <0> for inviting <1> last <2>                         and the end token after both

The target ends with one more sentinel, as in T5's own code and in transformers' examples. A text always
begins with tokens that are kept.

Departure: a text is corrupted once, when it is read, from the seed and its place in its file. Several epochs
therefore see the same spans; T5 draws them anew.
"""

import zlib
from bisect import bisect_left

import numpy as np

DENSITY, MEAN_SPAN = 0.15, 3.0
# The fewest tokens of a text that are corrupted: one is kept, one is replaced.
LEAST = 2


def cut_into(total, parts, rng):
    """(parts,) whole numbers of at least 1 that add up to `total`, all such lists equally likely."""
    borders = rng.permutation(total - 1)[:parts - 1] + 1
    return np.diff(np.concatenate([[0], np.sort(borders), [total]]))


def counts(num_tokens):
    """(tokens that are replaced, spans) of a text of num_tokens."""
    num_replaced = min(max(round(num_tokens * DENSITY), 1), num_tokens - 1)
    return num_replaced, min(max(round(num_replaced / MEAN_SPAN), 1), num_tokens - num_replaced)


def spans(num_tokens, rng):
    """(kept (K,), replaced (K,)): the lengths in tokens of K spans that are kept and of the K spans after
    them that are replaced; both together are num_tokens."""
    num_replaced, num_spans = counts(num_tokens)
    return cut_into(num_tokens - num_replaced, num_spans, rng), cut_into(num_replaced, num_spans, rng)


def corrupt(ids, sentinels, end, kept, replaced):
    """(source, target), two lists of ids, of a text's ids. sentinels: their ids, the first one's first; there
    is one more than spans. end: the id after both. kept, replaced: of `spans`."""
    source, target, place = [], [], 0
    for sentinel, keep, replace in zip(sentinels, kept, replaced):
        source += [*ids[place:place + keep], sentinel]
        target += [sentinel, *ids[place + keep:place + keep + replace]]
        place += keep + replace
    assert place == len(ids), (place, len(ids))
    return [*source, end], [*target, sentinels[len(kept)], end]


def longest_text(limit, num_sentinels):
    """The most tokens of a text whose source and target together have at most `limit`, and whose spans, and
    the target's end, find a sentinel each. ValueError if not even the shortest does."""
    def too_long(length):
        num_spans = counts(length)[1]
        # the text, a sentinel a span in both, one more, two ends
        return length + 2 * num_spans + 3 > limit or num_spans >= num_sentinels

    # A limit may be a thousand million, which no model of distances refuses.
    longest = LEAST - 1 + bisect_left(range(LEAST, max(limit, LEAST) + 1), True, key=too_long)
    if longest < LEAST:
        raise ValueError(f"--max-length {limit} leaves no room for span corruption: a text of {LEAST} tokens "
                         f"takes {LEAST + 5}, source and target together; raise it")
    return longest


def corrupted(ids, sentinels, end, limit, seed, where):
    """[(source, target), ...] of a text's ids in pieces of at most `limit` tokens, source and target
    together. A piece of a single token, in which nothing can be kept, is left out. ValueError without
    sentinels.

    seed, where: the random numbers follow from both, so that a text's spans depend on no other text.
    """
    if len(sentinels) < 2:
        raise ValueError("span corruption needs sentinels, <extra_id_0>, <extra_id_1> and so on, and this "
                         "tokenizer.json has none; give another tokenizer, or conversations")
    rng = np.random.default_rng([seed, zlib.crc32(where.encode())])
    room, made = longest_text(limit, len(sentinels)), []
    for start in range(0, len(ids), room):
        piece = ids[start:start + room]
        if len(piece) >= LEAST:
            made.append(corrupt(piece, sentinels, end, *spans(len(piece), rng)))
    return made
