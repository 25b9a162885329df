"""Recurrent layers in their two forms, the tasks that tell models apart, and the one-layer transformer whose
weights are written down."""

import math
from types import SimpleNamespace

import pytest
import torch

from aya_min import separations
from aya_min.claims import separations as claims
from aya_min.config import Recipe, settings_from
from aya_min.experiments_records import run_claims
from aya_min.recurrent import DiagonalStateSpace, Retention
from aya_min.separations import (BRACKETS, SYMBOLS, dyck, equality, index_lookup, lookup, mistakes, nearest,
                                 position_vectors, prefixes, width_bound, words)
from aya_min.sequence_models import KINDS, NONE, fit, in_batches, new_model, right


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- recurrent layers --------------------------------------------------------------------------------------

def grads(loss, layer, without=()):
    """The gradients of a loss by all parameters of a layer, flat, but those named."""
    wanted = [parameter for name, parameter in layer.named_parameters() if name not in without]
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, wanted)])


@torch.no_grad()
def test_the_kernel_of_one_state_by_hand():
    """A = -ln 2 and a step of 1 halve the state each token: (decay - 1) / A = 1 / (2 ln 2), C = ln 2, so that
    the kernel is 1/2, 1/4, 1/8 and the inputs 2, 0, 4 become 1, 1/2, 2 + 1/4 (and D u)."""
    layer = DiagonalStateSpace(1, num_states=1)
    layer.log_rate.fill_(math.log(math.log(2)))
    layer.frequency.zero_()
    layer.log_step.zero_()
    layer.C.copy_(torch.tensor([[[math.log(2), 5.0]]]))
    layer.D.fill_(10.0)
    torch.testing.assert_close(layer.kernel(3), torch.tensor([[0.5, 0.25, 0.125]]))
    y = layer.convolved(torch.tensor([[[2.0], [0.0], [4.0]]]))
    torch.testing.assert_close(y, torch.tensor([[[21.0], [0.5], [42.25]]]))


def test_a_state_space_gives_the_same_as_a_convolution_a_recurrence_and_a_slow_loop():
    torch.manual_seed(0)
    layer, x = DiagonalStateSpace(6, num_states=3), torch.randn(2, 11, 6)
    whole, state, one_by_one = layer.convolved(x), layer.first_state(x[:, 0]), []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        one_by_one.append(y)
    recurrent = torch.stack(one_by_one, 1)
    torch.testing.assert_close(recurrent, whole)
    of_both = (grads(y.square().sum(), layer, ("mix.weight", "mix.bias")) for y in (recurrent, whole))
    torch.testing.assert_close(*of_both, rtol=1e-4, atol=1e-4)
    slow = torch.zeros_like(x)
    step = layer.log_step.exp()
    for b in range(2):
        for c in range(6):
            A = torch.complex(-layer.log_rate[c].exp(), layer.frequency[c])
            decay, states = torch.exp(step[c] * A), torch.zeros(3, dtype=torch.complex64)
            for t in range(11):
                states = decay * states + x[b, t, c]
                C = torch.complex(*layer.C[c].unbind(-1))
                slow[b, t, c] = (C * (decay - 1) / A * states).sum().real + layer.D[c] * x[b, t, c]
    torch.testing.assert_close(slow, whole)


def test_retention_gives_the_same_in_parallel_and_token_by_token():
    torch.manual_seed(0)
    layer, x = Retention(12, num_heads=3), torch.randn(2, 9, 12)
    whole, state, one_by_one = layer(x), layer.first_state(x), []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state, t)
        one_by_one.append(y)
    recurrent = torch.stack(one_by_one, 1)
    torch.testing.assert_close(recurrent, whole)
    torch.testing.assert_close(grads(recurrent.square().sum(), layer), grads(whole.square().sum(), layer))


def test_scores_of_retention_fade_by_1_minus_a_power_of_2():
    torch.testing.assert_close(Retention(4, num_heads=2).gamma, torch.tensor([31 / 32, 63 / 64]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_says_does_not_depend_on_later_tokens(kind):
    model, x = new_model(0, kind, 2, 8, inputs=5, outputs=3, num_places=10), torch.randn(2, 10, 5)
    other = torch.cat((x[:, :6], torch.randn(2, 4, 5)), 1)
    torch.testing.assert_close(model(x)[:, :6], model(other)[:, :6])
    assert not torch.allclose(model(x)[:, 6:], model(other)[:, 6:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_learns_whether_the_vector_before_was_positive(kind):
    generator = seeded()

    def draw(num):
        x = torch.randn(num, 6, 1, generator=generator)
        targets = torch.full((num, 6), NONE)
        targets[:, 1:] = (x[:, :-1, 0] > 0).long()
        return x, targets
    model = new_model(0, kind, 2, 16, inputs=1, outputs=2, num_places=6)
    fitted = fit(model, in_batches(draw, 32), 250, 1e-2)
    assert fitted["training_steps"] == 250 and fitted["tokens"] == 250 * 32 * 6 and fitted["loss"] < 0.5
    found = right(model, *draw(100))
    assert found.nanmean() > 0.9 and found[:, 0].isnan().all()


def test_a_batch_has_its_share_of_both_halves_and_no_sequence_is_lost():
    numbers = in_batches(lambda num: (torch.arange(num), torch.arange(num) < num // 2), 4, pieces=3)
    seen = [next(numbers) for _ in range(3)]
    assert sorted(torch.cat([inputs for inputs, _ in seen]).tolist()) == list(range(12))
    assert [int(targets.sum()) for _, targets in seen] == [2, 2, 2]


# ---- tasks -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("string, marks", [
    ("()", "12"), ("([])[]", "111212"), ("(]", "10"), (")(", "00"), ("[()()]", "111112"),
    ("((()))", "110000"), ("([)]", "1100"), ("[]]", "120"), ("(())()", "111212")])
def test_prefixes_of_brackets_by_hand(string, marks):
    """0: no word of depth 2 begins so, 1: one may, 2: it is a word."""
    brackets = torch.tensor([[BRACKETS.index(each) for each in string]])
    assert "".join(map(str, prefixes(brackets, depth=2)[0].tolist())) == marks


def by_stack(string, depth=2):
    stack = []
    for each in string:
        if each in "([":
            stack.append(each)
        elif not stack or stack.pop() + each not in ("()", "[]"):
            return False
        if len(stack) > depth:
            return False
    return not stack


def test_strings_of_brackets_are_judged_as_a_stack_does_and_half_are_words():
    inputs, targets = dyck(400, 12, seeded())
    strings = ["".join(BRACKETS[i] for i in row) for row in inputs.argmax(-1).tolist()]
    assert [by_stack(string) for string in strings] == [bool(each) for each in targets[:, -1]]
    assert targets[:, -1].sum() == 200
    whole = words(400, 12, seeded())
    assert (prefixes(whole)[:, -1] == 2).all() and len(set(map(tuple, whole.tolist()))) > 300
    for string in strings:                              # an exchange keeps each bracket's number
        assert sum(string.count(each) for each in "([") == 6
        assert string.count("(") == string.count(")")


def test_lookup_asks_for_symbols_that_stand_at_the_places():
    inputs, targets = lookup(5, 7, seeded(), num_places=9)
    ids = inputs.argmax(-1)
    assert inputs.shape == (5, 7 + separations.QUERIES, SYMBOLS + 9) and (inputs.sum(-1) == 1).all()
    for row, answers in zip(ids.tolist(), targets.tolist()):
        assert answers[:7] == [NONE] * 7
        assert answers[7:] == [row[place - SYMBOLS] for place in row[7:]]


def test_unequal_strings_have_the_same_symbols_in_another_order():
    inputs, targets = equality(200, 6, seeded())
    ids = inputs.argmax(-1).tolist()
    assert [int(row[:6] == row[6:]) for row in ids] == targets[:, -1].tolist()
    assert all(sorted(row[:6]) == sorted(row[6:]) for row in ids)
    assert 90 <= 200 - targets[:, -1].sum() <= 100              # a string of one letter has no other order
    row, marks = ids[0], targets[0, 6:].tolist()
    assert marks == [int(row[:n] == row[6:6 + n]) for n in range(1, 7)]


def test_the_nearest_vector_s_label_by_a_slow_search():
    inputs, targets = nearest(20, 5, seeded())
    for row, answers in zip(inputs, targets):
        vectors, labels, asked = row[:10:2, :-1], row[1:10:2, -1], row[10:, :-1]
        assert (row[:10:2, -1] == 0).all() and (row[1:10:2, :-1] == 0).all()
        assert set(labels.tolist()) <= {-1, 1}
        for q, answer in zip(asked, answers[10:]):
            distances = [int((q != x).sum()) for x in vectors]
            assert min(distances) <= 1 and labels[distances.index(min(distances))] == 2 * answer - 1


# ---- the construction --------------------------------------------------------------------------------------

def test_the_bound_of_the_width_by_hand():
    """8 ln(20^2 / 2) = 42.4 and 8 ln(400^2 / 2) = 90.3."""
    assert [width_bound(20), width_bound(400)] == [43, 91]
    assert width_bound(400 ** 2) - width_bound(400) <= 8 * 2 * math.log(400) + 1        # logarithmic


@pytest.mark.parametrize("length", [2, 20, 75, 200])
def test_the_transformer_without_training_looks_up_every_place_of_every_length(length):
    model = index_lookup(length, width_bound(length), seeded())
    T = position_vectors(length, width_bound(length), seeded())
    assert (T @ T.T - 1e9 * torch.eye(length)).amax() <= separations.GAMMA * T.shape[1]
    for shorter in {2, length // 2, length - 1, length} - {0, 1}:
        assert mistakes(model, length, shorter, 2, seeded(1))[0] == 0


def test_too_small_a_width_fails():
    """With fewer signs than log2 of the length two places have one vector, and are one to the transformer."""
    wrong, num = mistakes(index_lookup(40, 5, seeded()), 40, 40, 2, seeded(1))
    assert 2 ** 5 < 40 and 0.1 * num < wrong < num


def test_places_asked_before_do_not_change_what_is_found():
    model = index_lookup(30, width_bound(30), seeded())
    inputs, targets = lookup(50, 30, seeded(2))
    assert right(model, inputs, targets).nanmean() == 1


# ---- the claim ---------------------------------------------------------------------------------------------

class StandIn(SimpleNamespace):
    """A lab without a folder."""

    def step(self, name, make, *content):
        return make(None)


def test_figures_take_the_longest_length_and_pair_strings(monkeypatch):
    rights = {("LSTM", 10, 32): [1.0, 1.0], ("LSTM", 40, 32): [1.0, 0.0], ("LSTM", 40, 8): [0.0, 0.0],
              ("transformer, 1 layer", 40, 32): [1.0, 1.0]}
    monkeypatch.setattr(claims, "cell",
                        lambda lab, model, task, length, width: {"folder": (model, length, width)})
    lab = StandIn(recipe=settings_from(Recipe, {}))
    lab.made = lambda arm: {"right": rights[claims.ARMS[arm](lab)]}
    assert claims.accuracy(claims.LSTM, "lookup").of(lab) == [1, 0]
    assert claims.accuracy(claims.LSTM, "lookup", claims.NARROW).of(lab) == [0, 0]
    assert claims.more(claims.ONE, claims.LSTM, "lookup").of(lab) == [0, 1]
    assert claims.shrinks(claims.LSTM, "lookup").of(lab) == [0, 1]


def test_all_models_train_on_the_same_strings_which_are_not_those_of_the_evaluation():
    lab = StandIn(seed=0)
    a, b, test = (separations.lookup(4, 9, claims.strings(lab, "lookup", 9, use))[0]
                  for use in ("train", "train", "test"))
    assert torch.equal(a, b) and not torch.equal(a, test)


def test_the_smallest_exact_width_is_the_least_above_the_last_mistake(monkeypatch):
    found = {0.05: (5, 9), 0.1: (9, 0), 0.2: (18, 1), 0.5: (45, 0), 1.0: (91, 0)}
    monkeypatch.setattr(claims, "built",
                        lambda lab, length, share: dict(zip(("width", "wrong"), found[share])))
    assert claims.smallest(None, 400) == 45


@pytest.mark.long
def test_the_claim_runs_from_nothing_to_its_pictures(tmp_path):
    record = run_claims("separations", [1], "smoke", tmp_path, torch.device("cpu"))
    first, *others = record["results"]
    assert first["comparisons"][0]["seeds"][0]["value"] == 0 and len(others) == 4
    for claim in record["results"]:
        picture = claim["pictures"][0]
        assert all(len(cells) == len(picture["columns"]) for _, cells in picture["rows"])
