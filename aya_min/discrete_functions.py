"""Classes of Boolean functions, to be learned from examples in context: the sampling of arXiv 2310.03016 (as
its official code has it), the learner that is optimal for it, nearest neighbours, teaching sequences.

    conjunction     literals, each absent, positive or negated with 0.7, 0.15, 0.15; an input is made to
                    satisfy all with 0.3, as hardly any does by chance
    disjunction     the same literals; an input is made to satisfy none with 0.3
    monotone        a conjunction of positive literals, each with 0.3; an input is made to satisfy all with
                    0.4
    majority        of a subset, each entry with 0.3; a tie is 0 ("sparse majority")
    parity          of a subset, each with the same probability: whether an odd number of its entries is 1
    sparse parity   of 2 entries
    dnf             3 conjunctions with 0.8, 0.1, 0.1; an input is made to satisfy one of them, the same in
                    a whole sequence, with 0.35
    nearest         no function: the first of the examples have labels by chance, a copy that of its
                    original, and all later ones that of the nearest example before

Inputs are vectors of +-1, uniform where nothing forces them; labels are 0 and 1. A function is a tensor w of
0, 1 and -1: (d,), or (3, d) of a DNF. B functions, n examples, d entries, F functions of a class.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

PAIR = 2                        # entries of a sparse parity
CLAUSES = 3                     # of a DNF
MANY = 100_000                  # functions that the optimal learner enumerates at most


@dataclass(frozen=True)
class FunctionClass:
    """absent, positive, negated: probabilities of an entry of w. forced: with which probability an input is
    made an example of the rarer label."""
    absent: float
    positive: float
    negated: float = 0.0
    forced: float = 0.0


CLASSES = {
    "conjunction": FunctionClass(0.7, 0.15, 0.15, 0.3), "disjunction": FunctionClass(0.7, 0.15, 0.15, 0.3),
    "monotone": FunctionClass(0.7, 0.3, forced=0.4), "majority": FunctionClass(0.7, 0.3),
    "parity": FunctionClass(0.5, 0.5), "sparse parity": FunctionClass(0.0, 0.0),
    "dnf": FunctionClass(0.8, 0.1, 0.1, 0.35), "nearest": FunctionClass(0.0, 0.0)}


def chance(generator, *shape):
    return torch.rand(shape, generator=generator)


def functions(name, num, d, generator):
    """`num` functions of a class on d entries: (num, d), or (num, CLAUSES, d)."""
    if name == "sparse parity":
        return F.one_hot(chance(generator, num, d).argsort(1)[:, :PAIR], d).sum(1).float()
    about, shape = CLASSES[name], (num, CLAUSES, d) if name == "dnf" else (num, d)
    drawn = chance(generator, *shape)
    w = (drawn >= about.absent).float()
    return w - 2 * (drawn >= about.absent + about.positive) if about.negated else w


def said(name, sums, size):
    """Whether functions of `size` entries say 1 of inputs, by the sums of x w over the entries."""
    return {"disjunction": lambda: sums > -size, "majority": lambda: sums > 0,
            "parity": lambda: (sums + size) / 2 % 2 == 1, "sparse parity": lambda: (sums + size) / 2 % 2 == 1,
            "conjunction": lambda: sums == size, "monotone": lambda: sums == size}[name]()


def labels(name, w, xs):
    """w (..., d) or (..., CLAUSES, d), xs (..., n, d) -> whether each is 1, (..., n)."""
    if name == "dnf":
        return torch.stack([labels("conjunction", w[..., i, :], xs) for i in range(CLAUSES)]).any(0)
    return said(name, (xs @ w[..., None])[..., 0], w.abs().sum(-1, keepdim=True))


def targets(name, w, generator):
    """What a forced input agrees with in the entries that are not 0, (num, d); None where nothing is
    forced."""
    if not CLASSES[name].forced:
        return None
    if name == "dnf":
        clause = torch.randint(CLAUSES, (len(w),), generator=generator)
        return w[torch.arange(len(w)), clause]
    return -w if name == "disjunction" else w


def sample(name, num, n, d, generator, first=0):
    """(xs (num, n, d), ys (num, n) of 0 and 1, w or None) of functions of a class, n examples each. first: of
    nearest, the examples with labels by chance."""
    xs = 2.0 * torch.randint(2, (num, n, d), generator=generator) - 1
    if name == "nearest":
        return xs, by_nearest(xs, torch.randint(2, (num, n), generator=generator), first), None
    w = functions(name, num, d, generator)
    target = targets(name, w, generator)
    if target is not None:
        forced = chance(generator, num, n, 1) < CLASSES[name].forced
        target = target[:, None].expand_as(xs)
        xs = torch.where(forced & (target != 0), target, xs)
    return xs, labels(name, w, xs).long(), w


# ---- nearest neighbours ------------------------------------------------------------------------------------

def by_nearest(xs, ys, first):
    """The labels (B, n) of which only the `first` are used: all others are those of the nearest example
    before, the earliest of several. A copy among the first ones has its original's label."""
    likeness, ys = xs @ xs.transpose(1, 2), ys.clone()                              # (B, n, n)
    for i in range(1, xs.shape[1]):
        best = likeness[:, i, :i].amax(-1)
        at = (likeness[:, i, :i] == best[:, None]).int().argmax(-1)                 # the earliest
        found = ys.gather(1, at[:, None])[:, 0]
        same = best == xs.shape[2]
        ys[:, i] = torch.where(same, found, ys[:, i]) if i < first else found
    return ys


def nearest_neighbour(xs, ys):
    """The probability of label 1 (B, n) by one nearest neighbour among the examples before: 0, 1, and 1/2
    where there is none."""
    likeness = xs @ xs.transpose(1, 2)
    before = torch.ones(xs.shape[1], xs.shape[1], dtype=torch.bool).tril(-1)
    at = likeness.masked_fill(~before, -torch.inf)
    at = (at == at.amax(-1, keepdim=True)).int().argmax(-1)
    found = ys.gather(1, at).float()
    found[:, 0] = 0.5
    return found


# ---- the optimal learner -----------------------------------------------------------------------------------

def num_functions(name, d):
    """How many functions a class has by its parameters; None of nearest."""
    if name == "nearest":
        return None
    if name == "sparse parity":
        return d * (d - 1) // 2
    return (3 if CLASSES[name].negated else 2) ** (d * (CLAUSES if name == "dnf" else 1))


@cache
def every_function(name, d):
    """(all w of a class (F, d), the log of each one's probability (F,)). ValueError for too many."""
    num = num_functions(name, d)
    if num is None or name == "dnf" or num > MANY:
        raise ValueError(f"{name} of {d} entries has too many functions to enumerate; give fewer entries, or "
                         "compare with the nearest neighbour")
    if name == "sparse parity":
        w = F.one_hot(torch.combinations(torch.arange(d), PAIR), d).sum(1).float()
        return w, torch.zeros(len(w))
    about = CLASSES[name]
    values = torch.tensor([0.0, 1.0, -1.0] if about.negated else [0.0, 1.0])
    w = torch.cartesian_prod(*[values] * d).view(-1, d)
    log_prob = torch.tensor([about.absent, about.positive, about.negated])[:len(values)].log()
    return w, sum(log_prob[i] * (w == value).sum(1) for i, value in enumerate(values))


def optimal(name, xs, ys):
    """The probability of label 1 (B, n) given the examples before and the input, by Bayes' rule over all
    functions of the class with their probabilities. No learner is right more often on average.

    An input tells of the function too, as some are forced: p(x | w) is (1 - forced) 2^-d, and where x agrees
    with the w that it would be forced to, in L entries, forced 2^(L - d) more.
    """
    w, prior = every_function(name, xs.shape[-1])
    size, forced, found = w.abs().sum(1, keepdim=True), CLASSES[name].forced, []        # size (F, 1)
    for x, y in zip(xs, ys):                                            # (n, d), (n,)
        says = said(name, w @ x.T, size)                                # (F, n)
        agrees = ~says if name == "disjunction" else says
        of_input = torch.log(1 - forced + forced * agrees * 2 ** size)
        seen = of_input.masked_fill(says != y.bool(), -torch.inf).cumsum(1)
        before = torch.cat((torch.zeros(len(w), 1), seen[:, :-1]), 1)   # of the examples before each
        weight = (prior[:, None] + before + of_input).softmax(0)        # (F, n)
        found.append((weight * says).sum(0))
    return torch.stack(found)


def rate(probability, ys):
    """How often (0, 1/2, 1) who says 1 with this probability above 1/2 is right: half where it is 1/2."""
    return torch.where((probability - 0.5).abs() < 1e-4, 0.5, ((probability > 0.5) == ys.bool()).float())


# ---- teaching sequences ------------------------------------------------------------------------------------

def teaching_sequence(w):
    """The inputs (L + 1, d) that tell one monotone conjunction w (d,) of L literals from all others: the
    literals alone are 1, then each time one of them is 0 too."""
    alone = 2 * w - 1
    return torch.cat((alone[None], alone - 2 * F.one_hot(w.nonzero()[:, 0], len(w))))


def with_teaching(xs, w, taught):
    """(xs, ys) of monotone conjunctions w (B, d), where the first examples are the teaching sequence in those
    rows that are `taught` (B,). What does not fit is cut."""
    xs = xs.clone()
    for i in taught.nonzero()[:, 0].tolist():
        lesson = teaching_sequence(w[i])[:xs.shape[1]]
        xs[i, :len(lesson)] = lesson
    return xs, labels("monotone", w, xs).long()
