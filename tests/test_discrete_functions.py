"""Classes of Boolean functions: their sampling, the optimal learner against sums by hand, nearest neighbours
and teaching sequences."""

import itertools

import pytest
import torch

from aya_min.discrete_functions import (CLASSES, by_nearest, every_function, functions, labels,
                                        nearest_neighbour, num_functions, optimal, rate, sample,
                                        teaching_sequence, with_teaching)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def signs(*rows):
    """Vectors of +-1 of texts of 0 and 1."""
    return torch.tensor([[2.0 * int(bit) - 1 for bit in row] for row in rows])


# ---- functions ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, w, ones", [
    ("conjunction", [1, -1, 0], ["100", "101"]), ("conjunction", [0, 0, 0], None),
    ("disjunction", [1, -1, 0], ["000", "001", "100", "101", "110", "111"]), ("disjunction", [0, 0, 0], []),
    ("majority", [1, 1, 1], ["011", "101", "110", "111"]), ("majority", [1, 1, 0], ["110", "111"]),
    ("parity", [1, 1, 1], ["001", "010", "100", "111"]),
    ("sparse parity", [1, 0, 1], ["001", "011", "100", "110"]),
    ("dnf", [[1, 1, 0], [0, -1, -1], [1, -1, 1]], ["000", "100", "101", "110", "111"])])
def test_labels_of_all_inputs_by_hand(name, w, ones):
    every = ["".join(bits) for bits in itertools.product("01", repeat=3)]
    found = labels(name, torch.tensor(w).float(), signs(*every))
    assert [x for x, is_one in zip(every, found) if is_one] == (every if ones is None else ones)


def test_entries_are_drawn_with_the_probabilities_of_the_class():
    for name in ("conjunction", "dnf", "majority", "parity", "monotone"):
        w, about = functions(name, 4000, 10, seeded()), CLASSES[name]
        for value, share in ((0, about.absent), (1, about.positive), (-1, about.negated)):
            assert abs((w == value).float().mean() - share) < 0.01, name
    w = functions("sparse parity", 500, 10, seeded())
    assert (w.sum(1) == 2).all() and set(w.unique().tolist()) == {0, 1} and len(w.unique(dim=0)) == 45


@pytest.mark.parametrize("d", [5, 10])
def test_labels_are_balanced_as_the_forced_inputs_make_them(d):
    """A literal agrees with any input or is absent with 0.7 + 0.15, so a conjunction is satisfied by 0.85^d
    of the inputs that are not forced, and by all others: 0.3 + 0.7 0.85^d. A disjunction is its negation."""
    share = {"conjunction": 0.3 + 0.7 * 0.85 ** d, "disjunction": 1 - 0.3 - 0.7 * 0.85 ** d,
             "monotone": 0.4 + 0.6 * 0.85 ** d, "parity": (1 - 2.0 ** -d) / 2, "sparse parity": 0.5,
             "dnf": 0.35 + 0.65 * (1 - (1 - 0.9 ** d) ** 3)}
    for name, expected in share.items():
        _, ys, _ = sample(name, 8000, 4, d, seeded())
        assert abs(ys.float().mean() - expected) < 0.02, name


def test_without_forced_inputs_a_conjunction_of_28_entries_would_be_nearly_always_0():
    """The reason of the paper's sampling: 0.85^28 = 0.01."""
    _, ys, _ = sample("conjunction", 2000, 10, 28, seeded())
    assert abs(ys.float().mean() - (0.3 + 0.7 * 0.0106)) < 0.015


# ---- learners ----------------------------------------------------------------------------------------------

def test_the_optimal_learner_of_two_entries_by_hand():
    """Parities of subsets of 2 entries, 4 of them. After 11 -> 1 there are x1 and x2 (x1 + x2 gives 0, the
    empty one too). They say 1 and 0 of 10. After 10 -> 0 only x2 is left."""
    xs, ys = signs("11", "10", "01", "10")[None], torch.tensor([[1, 0, 1, 0]])
    torch.testing.assert_close(optimal("parity", xs, ys), torch.tensor([[0.5, 0.5, 1.0, 0.0]]))
    assert rate(optimal("parity", xs, ys), ys).tolist() == [[0.5, 0.5, 1.0, 1.0]]


def test_the_optimal_learner_reads_from_an_input_that_it_may_have_been_forced():
    """Conjunctions of one entry: absent (0.7) says 1 of both inputs, positive (0.15) of 1, negated (0.15) of
    0. Given the input 1 they count 0.7 (0.7 + 0.3), 0.15 (0.7 + 0.3 2) and 0.15 0.7, so 1 has 0.895 of
    1.0."""
    p = optimal("conjunction", signs("1")[None], torch.tensor([[1]]))
    torch.testing.assert_close(p, torch.tensor([[(0.7 + 0.15 * 1.3) / (0.7 + 0.15 * 1.3 + 0.15 * 0.7)]]))


def slowly(name, xs, ys):
    """The optimal learner for one sequence, with plain loops over functions and over the ways to draw
    inputs."""
    w, prior = every_function(name, xs.shape[1])
    forced, found = CLASSES[name].forced, []
    every = signs(*("".join(bits) for bits in itertools.product("01", repeat=xs.shape[1])))
    for i in range(len(xs)):
        says = {0: 0.0, 1: 0.0}
        for one, log_p in zip(w, prior):
            p = log_p.exp().item()
            for j in range(i + 1):
                agree = (every * one >= 0) if name != "disjunction" else (every * one <= 0)
                agree = agree.all(1)
                mine = bool((every[agree] == xs[j]).all(1).any())
                p *= (1 - forced) / len(every) + forced * mine / int(agree.sum())
                if j < i:
                    p *= float(labels(name, one, xs[j:j + 1])[0] == ys[j])
            says[int(labels(name, one, xs[i:i + 1])[0])] += p
        found.append(says[1] / (says[0] + says[1]))
    return torch.tensor(found)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("dnf", "nearest")])
def test_the_optimal_learner_is_bayes_rule_by_plain_loops(name):
    xs, ys, _ = sample(name, 3, 5, 3, seeded())
    for i in range(3):
        torch.testing.assert_close(optimal(name, xs, ys)[i], slowly(name, xs[i], ys[i]))


def test_no_learner_beats_the_optimal_one_which_ends_near_1():
    for name in ("conjunction", "disjunction", "parity"):
        xs, ys, _ = sample(name, 60, 25, 6, seeded())
        best, near = rate(optimal(name, xs, ys), ys), rate(nearest_neighbour(xs, ys), ys)
        assert best.mean() > near.mean() and best[:, -5:].mean() > 0.93


def test_the_class_has_as_many_functions_as_it_enumerates():
    for name in ("conjunction", "majority", "sparse parity"):
        w, log_p = every_function(name, 4)
        assert len(w) == len(w.unique(dim=0)) == num_functions(name, 4)
    assert every_function("conjunction", 4)[1].exp().sum().item() == pytest.approx(1)
    for name, d in (("dnf", 3), ("nearest", 3), ("conjunction", 28)):
        with pytest.raises(ValueError, match="too many functions"):
            every_function(name, d)


def test_nearest_neighbours_by_hand():
    """011 is nearest to 111 (one entry away, before 001, as near but later); the copy of 000 has its
    label."""
    xs = signs("111", "000", "001", "000", "011")[None]
    ys = by_nearest(xs, torch.tensor([[1, 0, 0, 1, 0]]), first=4)
    assert ys.tolist() == [[1, 0, 0, 0, 1]]
    assert nearest_neighbour(xs, ys).tolist() == [[0.5, 1, 0, 0, 1]]


def test_later_labels_of_nearest_are_what_one_nearest_neighbour_says():
    xs, ys, w = sample("nearest", 50, 12, 5, seeded(), first=6)
    assert w is None and (nearest_neighbour(xs, ys)[:, 6:] == ys[:, 6:]).all()
    assert not (nearest_neighbour(xs, ys)[:, 1:6] == ys[:, 1:6]).all()


# ---- teaching sequences ------------------------------------------------------------------------------------

def test_a_teaching_sequence_by_hand():
    assert teaching_sequence(torch.tensor([0.0, 1, 1])).tolist() == signs("011", "001", "010").tolist()
    assert teaching_sequence(torch.zeros(3)).tolist() == signs("000").tolist()


@pytest.mark.parametrize("d", [1, 4, 6])
def test_a_teaching_sequence_determines_the_function_and_none_shorter_does(d):
    every, _ = every_function("monotone", d)
    for w in every:
        lesson = teaching_sequence(w)
        assert len(lesson) == w.sum() + 1
        for kept, is_whole in ((lesson, True), *((lesson[torch.arange(len(lesson)) != i], False)
                                                 for i in range(len(lesson)))):
            says = labels("monotone", every, kept.expand(len(every), -1, -1))       # (F, n)
            agree = (says == labels("monotone", w, kept)).all(1)
            assert (int(agree.sum()) == 1) == is_whole or d == w.sum() and len(kept) == d


def test_only_the_rows_that_are_taught_begin_with_their_sequence():
    xs, ys, w = sample("monotone", 6, 4, 8, seeded())
    taught = torch.tensor([True, False] * 3)
    new_xs, new_ys = with_teaching(xs, w, taught)
    for i in range(6):
        lesson = teaching_sequence(w[i])[:4] if taught[i] else xs[i]
        assert torch.equal(new_xs[i, :len(lesson)], lesson)
        assert torch.equal(new_xs[i, len(lesson):], xs[i, len(lesson):])
        assert torch.equal(new_ys[i].bool(), labels("monotone", w[i], new_xs[i]))
    assert torch.equal(new_ys[~taught], ys[~taught])
