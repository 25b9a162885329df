"""IBM model 1 (Brown et al. 1993, section 4.1): which word of one side stands for which word of the other.

    p(f | e) = prod_j 1 / (l + 1) sum_{i = 0..l} t(f_j | e_i)

e has l words and the empty word e_0; order counts on neither side, so the model tells how much of f a table
of words can tell. t is learned by EM, which for this model has one best likelihood. The length of f is not
modelled. Log-probs are sums over the words of f, in nats, in fp64.

Beside it stands the unigram model, p(f_j) = (count + 1) / (N + V + 1), whose last place is for unknown words.
"""

import re
from collections import Counter
from dataclasses import dataclass

import torch

EMPTY = 0                       # the number of e_0
SHARES = (0.05, 0.1, 0.2, 0.4)  # of the unigram model beside model 1, that `explained` tries


def words(text):
    """Runs of letters and digits, and all other signs one by one."""
    return re.findall(r"\w+|[^\w\s]", text)


@dataclass
class Table:
    """t(f | e) of the pairs of words that stand in one pair of sentences; all others are 0.

    sources, targets: {word: number}; the empty word has EMPTY. keys (K,): e F + f, ascending; values (K,)."""
    sources: dict
    targets: dict
    keys: torch.Tensor
    values: torch.Tensor

    def at(self, keys):
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return self.values[places].where(self.keys[places] == keys, torch.zeros((), dtype=torch.float64))


def cells_of(pairs, sources, targets):
    """Every (e_i, f_j) of every pair, flat: (key of the cell, number of the f_j among all, words of e with
    the empty one). Words of e that are not in sources are left out, but count as words."""
    keys, place, lengths, number = [], [], [], 0
    for e, f in pairs:
        known = [EMPTY] + [sources[word] for word in e if word in sources]
        for word in f:
            if word in targets:
                keys += [each * len(targets) + targets[word] for each in known]
                place += [number] * len(known)
            number += 1
            lengths.append(len(e) + 1)
    return torch.tensor(keys).long(), torch.tensor(place).long(), torch.tensor(lengths).double()


def check(pairs):
    if not any(f for _, f in pairs):
        raise ValueError("the pairs have no word on the side to be explained; give pairs of lists of words")


def fit(pairs, rounds=10):
    """The Table of pairs (words of e, words of f) after rounds of EM from equal values, and the
    log-likelihood of all pairs before each round."""
    check(pairs)
    sources = {word: number for number, word in enumerate(dict.fromkeys(w for e, _ in pairs for w in e), 1)}
    targets = {word: number for number, word in enumerate(dict.fromkeys(w for _, f in pairs for w in f))}
    every, place, lengths = cells_of(pairs, sources, targets)
    keys, cell = every.unique(return_inverse=True)                          # (K,), (cells,)
    values = torch.full((len(keys),), 1 / len(targets), dtype=torch.float64)
    likelihoods = []
    for _ in range(rounds):
        each = values[cell]
        total = torch.zeros_like(lengths).index_add(0, place, each)         # (words of f,)
        likelihoods.append((total / lengths).log().sum().item())
        counts = torch.zeros_like(values).index_add(0, cell, each / total[place])           # E step
        sums = torch.zeros(len(sources) + 1, dtype=torch.float64).index_add(0, keys // len(targets), counts)
        values = counts / sums[keys // len(targets)]                        # M step
    return Table(sources, targets, keys, values), likelihoods


def unigrams(pairs):
    """word -> its probability on the side of f, by the counts in these pairs and one more of each."""
    check(pairs)
    counts = Counter(word for _, f in pairs for word in f)
    total = sum(counts.values()) + len(counts) + 1
    return lambda word: (counts[word] + 1) / total


def log_probs(table, unigram, pairs, share):
    """[log p(f | e) of each pair], where each word's probability is `share` of the unigram model's and the
    rest of model 1's. With a share of 1 it is the unigram model. A word of e that the table does not know
    speaks for no word, so that its part goes to the unigram model too."""
    keys, place, lengths = cells_of(pairs, table.sources, table.targets)
    found = torch.zeros_like(lengths).index_add(0, place, table.at(keys)) / lengths
    known = torch.tensor([1 + sum(word in table.sources for word in e) for e, f in pairs for _ in f]).double()
    plain = torch.tensor([unigram(word) for _, f in pairs for word in f], dtype=torch.float64)
    mixed = share * plain + (1 - share) * (found + (1 - known / lengths) * plain)
    return [some.log().sum().item() for some in mixed.split([len(f) for _, f in pairs])]


def explained(train, other, pairs):
    """([nats of each f under the unigram model], [under model 1]), both learned from the pairs of train, with
    that one of SHARES beside model 1 which is best on other pairs."""
    table, unigram = fit(train)[0], unigrams(train)
    nats = lambda some, share: [-value for value in log_probs(table, unigram, some, share)]
    share = min(SHARES, key=lambda each: sum(nats(other, each)))
    return nats(pairs, 1.0), nats(pairs, share)
