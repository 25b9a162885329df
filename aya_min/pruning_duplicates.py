"""Which texts are nearly the same as an earlier one: MinHash with bands (Broder, 1997), then the exact
Jaccard similarity.

A text is the set of its runs of SHINGLE characters, normalised; characters serve scripts without spaces as
well. Of each set HASHES hash functions keep their minima, and the share of equal minima estimates the Jaccard
similarity. Rows whose minima agree in a whole band are candidates. The sets of a candidate pair are then
compared themselves, so that no pair below the threshold is taken for a duplicate; one at the threshold is
missed with a probability of at most MISSED for the bands, and of some 1e-4 for SLACK.

A signature takes 512 bytes a row; texts are read again where they must be compared.
"""

import unicodedata
from collections import defaultdict
from functools import lru_cache

import numpy as np

SHINGLE = 5             # characters: about a word, in Chinese about three
HASHES = 128
MISSED = 1e-4
SLACK = 4.0             # standard deviations by which an estimate may be below the threshold
PIECE = 4096            # shingles hashed at once, to bound memory
BASE = np.uint64(0x9E3779B97F4A7C15)        # odd, 2^64 over the golden ratio


def normalised(text):
    """A text in lower case and NFC, its white space as single spaces. Punctuation and digits count."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def mixed(numbers):
    """64-bit numbers whose bits all depend on all bits (the end of SplitMix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def shingles(text):
    """The set of a text's shingles, as sorted 64-bit hashes. A shorter text is one shingle."""
    points = np.frombuffer(normalised(text).ljust(SHINGLE, "\0").encode("utf-32-le"), np.uint32)
    count = len(points) - SHINGLE + 1
    hashes = np.zeros(count, np.uint64)
    for i in range(SHINGLE):
        hashes = hashes * BASE + points[i : i + count] + np.uint64(1)
    return np.unique(mixed(hashes))


def jaccard(one, other):
    """The Jaccard similarity of two sets, as `shingles` makes them."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


@lru_cache(maxsize=1)
def hash_functions():
    """(multipliers, odd; summands) of x -> (a x + b) / 2^32, each (HASHES, 1)."""
    drawn = np.random.default_rng(0).integers(0, 1 << 64, (2, HASHES, 1), np.uint64, endpoint=False)
    return drawn[0] | np.uint64(1), drawn[1]


def minima(hashes):
    """The signature of a set: (HASHES,) uint32."""
    a, b = hash_functions()
    least = [((a * hashes[i : i + PIECE] + b) >> np.uint64(32)).min(axis=1)
             for i in range(0, len(hashes), PIECE)]
    return np.min(least, axis=0).astype(np.uint32)


def bands(threshold):
    """(number of bands, minima in each): the longest bands that miss a pair at the threshold with a
    probability (1 - threshold^minima)^bands of at most MISSED."""
    sizes = [size for size in range(1, HASHES + 1)
             if (1 - threshold**size) ** (HASHES // size) <= MISSED]
    return HASHES // max(sizes), max(sizes)


def shared_buckets(signatures, groups, threshold):
    """Yield (row, its buckets) in the rows' order, for rows that share a bucket with another row.

    A bucket is a group and the minima of a band. signatures: (N, HASHES). groups: (N,) whole numbers.
    """
    rows, buckets, made = [], [], 0
    num_bands, size = bands(threshold)
    for band in range(num_bands):
        keys = mixed(groups.astype(np.uint64))
        for column in range(band * size, (band + 1) * size):
            keys = mixed(keys * BASE + signatures[:, column])
        _, bucket, counts = np.unique(keys, return_inverse=True, return_counts=True)
        found = np.flatnonzero(counts[bucket] > 1)
        rows.append(found)
        buckets.append(bucket[found] + made)
        made += len(counts)
    rows, buckets = np.concatenate(rows), np.concatenate(buckets)
    order = np.argsort(rows, kind="stable")
    found, begins = np.unique(rows[order], return_index=True)
    yield from zip(found.tolist(), np.split(buckets[order], begins[1:]))


def near_duplicates(signatures, groups, threshold, shingles_of):
    """{row: (earlier row, Jaccard similarity)} of the rows that are to go.

    A row goes if its similarity to an earlier row of its group that stays is at least the threshold; the
    earliest of these is named. shingles_of(row): its set. Groups are languages.
    """
    members, gone = defaultdict(list), {}
    slack = SLACK * np.sqrt(threshold * (1 - threshold) / HASHES)
    for row, buckets in shared_buckets(signatures, groups, threshold):
        earlier = np.array(sorted(set().union(*(members[bucket] for bucket in buckets.tolist()))), np.int64)
        estimates = (signatures[earlier] == signatures[row]).mean(axis=1)
        for first in earlier[(estimates >= threshold - slack) & (groups[earlier] == groups[row])].tolist():
            if (similarity := jaccard(shingles_of(first), shingles_of(row))) >= threshold:
                gone[row] = first, similarity
                break
        else:
            for bucket in buckets.tolist():
                members[bucket].append(row)
    return gone
