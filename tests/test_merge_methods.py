"""aya_min/merge_methods.py: hand-worked values, identities, slow versions, and that a tensor merged in
pieces is the tensor merged whole."""

import inspect
import math

import numpy as np
import pytest
import torch

from aya_min import merge_methods
from aya_min.merge_methods import (
    BINS,
    DRAWS,
    SAMPLED,
    bernoulli,
    count_magnitudes,
    dare_linear,
    dare_ties,
    drop,
    gram,
    linear,
    merge,
    model_stock,
    bin_of,
    slerp,
    task_arithmetic,
    thresholds,
    ties,
    trim,
)

SPARSE = [ties, dare_linear, dare_ties]
WITH_BASE = [task_arithmetic, model_stock, *SPARSE]
WITH_CONVENTION = [slerp, model_stock, *SPARSE]


def models(num=3, shape=(40, 50), scale=0.01, dtype=torch.float32, seed=0):
    """A base and `num` models trained a little away from it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [(base + scale * torch.randn(shape, generator=generator)).to(dtype) for _ in range(num)], base.to(
        dtype
    )


def settings(method, num, weight=1.0, density=0.5, **more):
    """Those of the given settings that the method takes."""
    values = {"weights": [weight] * num, "density": [density] * num, "t": 0.3, "name": "x", **more}
    return {key: value for key, value in values.items() if key in inspect.signature(method).parameters}


def in_pieces(method, tensors, base=None, piece=7, **options):
    """A method on flat tensors, by pieces of a few elements."""
    tensors = [tensor.flatten().float() for tensor in [*tensors, *([] if base is None else [base])]]
    spans = range(0, len(tensors[0]), piece)
    over = lambda work, every=1: (
        work(start, [tensor[start : start + piece] for tensor in tensors]) for start in spans[::every]
    )  # noqa: E731
    return torch.cat(list(over(method(over, **options))))


@pytest.mark.parametrize("method", [linear, slerp, *WITH_BASE], ids=lambda method: method.__name__)
@pytest.mark.parametrize(
    "dtypes",
    [[torch.bfloat16] * 3, [torch.float16] * 3, [torch.bfloat16, torch.float16, torch.float32]],
    ids=["bf16", "fp16", "mixed"],
)
def test_half_precision_is_merged_as_its_copy_in_fp32_is_bit_for_bit(method, dtypes):
    given, base = models(2)
    *given, base = [tensor.to(dtype) for tensor, dtype in zip([*given, base], dtypes)]
    options = settings(method, 2, weight=0.7)
    inputs, base = (given, base) if method in WITH_BASE else (given, None)
    merged = merge(method, inputs, base, **options)
    assert merged.dtype == torch.float32
    assert torch.equal(
        merged,
        merge(
            method, [tensor.float() for tensor in inputs], None if base is None else base.float(), **options
        ),
    )


# linear

def test_linear_is_the_weighted_average_and_without_normalising_the_weighted_sum():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])
    assert merge(linear, [a, b], weights=[3, 1]).tolist() == [2.0, 1.0]
    assert merge(linear, [a, b], weights=[3, 1], normalize=False).tolist() == [8.0, 4.0]


def test_linear_with_weights_one_and_zero_is_that_model():
    (a, b, _), _ = models()
    assert torch.equal(merge(linear, [a, b], weights=[1, 0]), a) and torch.equal(
        merge(linear, [a, b], weights=[0, 1]), b
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num", [2, 3, 5, 7])
def test_copies_of_one_half_precision_model_merge_to_exactly_that_model(num, dtype):
    """Accumulated in bf16, 13-52% of the weights change."""
    model = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    for weights in ([1] * num, [0.2 + i for i in range(num)]):
        assert torch.equal(merge(linear, [model] * num, weights=weights).to(dtype), model)
    assert torch.equal(merge(slerp, [model] * 2, t=0.3).to(dtype), model)
    base = (model + 0.01).to(dtype)
    for method in WITH_BASE:
        assert torch.equal(
            merge(method, [model] * num, base, **settings(method, num, 1 / num, density=1.0)).to(dtype), model
        ), method


@pytest.mark.parametrize("method", WITH_BASE)
def test_copies_merge_to_exactly_that_model_where_its_weights_are_far_smaller_than_the_base_s(method):
    """base + (theta - base) in fp32 has lost the digits of theta: 1 + (1e-6 - 1) is 9.5e-7."""
    small = torch.tensor([1e-6, -3e-7, 2e-8, 1e-9]).repeat(4).bfloat16()
    base = torch.tensor([1.0, -0.5, 0.02, 3.0]).repeat(4).bfloat16()
    for num in (2, 4):
        assert torch.equal(
            merge(method, [small] * num, base, **settings(method, num, 1 / num, density=1.0)).bfloat16(),
            small,
        )
    assert not torch.equal((base.float() + (small.float() - base.float())).bfloat16(), small)


# slerp

def test_slerp_of_perpendicular_tensors_walks_the_arc():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(
        merge(slerp, [a, b], t=1 / 3), torch.tensor([[2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)]])
    )


def test_slerp_weighs_tensors_of_other_lengths_by_the_angle_of_their_directions():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor(
        [0.5, 0.5]
    )  # 45 degrees apart: at t=1/2 both get sin(22.5)/sin(45)
    torch.testing.assert_close(
        merge(slerp, [a, b], t=0.5), (a + b) * math.sin(math.pi / 8) / math.sin(math.pi / 4)
    )


def test_slerp_at_t_zero_and_one_is_the_first_and_the_second_model():
    (a, b, _), _ = models(scale=1.0)
    torch.testing.assert_close(merge(slerp, [a, b], t=0), a, rtol=1e-6, atol=0)
    torch.testing.assert_close(merge(slerp, [a, b], t=1), b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("convention", ["paper", "mergekit"])
def test_slerp_of_colinear_opposite_and_zero_tensors_is_linear(convention):
    a, zero = torch.tensor([1.0, -2.0, 4.0]), torch.zeros(3)
    for other, expected in ((3 * a, 1.5 * a), (-a, 0.5 * a), (zero, 0.75 * a)):
        torch.testing.assert_close(merge(slerp, [a, other], t=0.25, convention=convention), expected)
    assert torch.equal(merge(slerp, [zero, zero], t=0.5, convention=convention), zero)


@pytest.mark.parametrize("length", [1.0, 1.0000001, 0.5])
@pytest.mark.parametrize("one_plus_cosine", [1e-12, 1e-11, 1e-9, 1e-7, 1e-6, 1e-4, 9e-3, 1.1e-2, 0.5, 1.0,
                                             1.999, 2 - 1e-6, 2 - 1e-12])
def test_slerp_is_fp64_s_at_every_angle(one_plus_cosine, length):
    """Within 1e-3 of opposite the digits of 1 + cos(W) and of the sum of the tensors cancelled, and linear
    took the place of the arc."""
    draws = torch.Generator().manual_seed(1)
    u, side = torch.randn(2, 300, generator=draws, dtype=torch.float64)
    u /= u.norm()
    side -= u * (u @ side)
    across = math.sqrt(one_plus_cosine * (2 - one_plus_cosine))
    a, b = u.float(), (length * ((one_plus_cosine - 1) * u + across * side / side.norm())).float()
    # of the fp32 tensors, to the last bit
    lengths = [math.sqrt(math.fsum(x * x for x in part.tolist())) for part in (a, b)]
    units = [part.double() / part_length for part, part_length in zip((a, b), lengths)]
    together, apart = (math.sqrt(math.fsum(x * x for x in part.tolist()))
                       for part in (units[0] + units[1], units[0] - units[1]))
    angle = 2 * math.atan2(apart, together)
    for t in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0):
        expected = (math.sin((1 - t) * angle) * a.double()
                    + math.sin(t * angle) * b.double()) / (together * apart / 2)
        error = (merge(slerp, [a, b], t=t).double() - expected).norm() / expected.norm()
        assert error < 1e-6, (t, error)


def test_slerp_halfway_between_almost_opposite_tensors_of_one_length_keeps_that_length():
    """By hand: angles 0 and pi - 2e-3, so that halfway is pi/2 - 1e-3. fp32 knows the lengths to 6e-8, which
    the angle makes 3e-5."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(math.pi - 2e-3), math.sin(math.pi - 2e-3)])
    torch.testing.assert_close(merge(slerp, [a, b], t=0.5),
                               torch.tensor([math.cos(math.pi / 2 - 1e-3), math.sin(math.pi / 2 - 1e-3)]),
                               rtol=0, atol=3e-5)


def test_slerp_has_no_step_where_it_turns_linear_and_mergekit_s_has_one():
    def halfway(angle, convention):
        return merge(
            slerp,
            [torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])],
            t=0.5,
            convention=convention,
        )
    for angle in (0.9e-4, 1.1e-4, 1e-3, 0.03, 0.05):
        torch.testing.assert_close(
            halfway(angle, "paper"), torch.tensor([math.cos(angle / 2), math.sin(angle / 2)])
        )
    assert halfway(0.030, "mergekit").norm() < 1 - 1e-4 and halfway(0.033, "mergekit").norm() > 1 - 1e-6


def test_inner_products_of_large_tensors_are_exact():
    """torch's fp32 norm of 20 million numbers on one thread was seen to be off by 1e-3."""
    large = torch.randn(20_000_000, generator=torch.Generator().manual_seed(0))
    assert gram([large]).item() == pytest.approx(
        sum(part.double().square().sum().item() for part in large.split(1_000_000)), rel=1e-9
    )


# task arithmetic, model stock

def test_task_arithmetic_adds_and_negates_task_vectors():
    base, a, b = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0]), torch.tensor([1.0, 5.0])
    assert merge(task_arithmetic, [a, b], base, weights=[1, 1]).tolist() == [2.0, 5.0]
    assert merge(task_arithmetic, [a, b], base, weights=[1, -0.5], lam=2).tolist() == [3.0, -3.0]
    assert merge(task_arithmetic, [a, b], base, weights=[2, 6], normalize=True).tolist() == [1.25, 4.0]


def test_task_arithmetic_with_weights_that_sum_to_one_is_linear():
    tensors, base = models()
    torch.testing.assert_close(
        merge(task_arithmetic, tensors, base, weights=[0.5, 0.3, 0.2]),
        merge(linear, tensors, weights=[0.5, 0.3, 0.2]),
    )


def test_model_stock_worked_by_hand():
    base = torch.tensor([1.0, 1.0, 1.0])
    right, up, out = (
        base + torch.tensor([3.0, 0, 0]),
        base + torch.tensor([0, 2.0, 0]),
        base + torch.tensor([4.0, 4.0, 0]),
    )
    assert torch.equal(merge(model_stock, [right, up], base), base)  # 90 degrees: t = 0
    torch.testing.assert_close(merge(model_stock, [right, right], base), right)  # 0 degrees: t = 1
    # 45 degrees: t = 2 c / (1 + c), c = sqrt(1/2), of the average (3.5, 2, 0)
    t = math.sqrt(2) / (1 + math.sqrt(0.5))
    torch.testing.assert_close(merge(model_stock, [right, out], base), base + t * torch.tensor([3.5, 2.0, 0]))
    # 90, 45, 45: c = sqrt(2)/3, t = 3 c / (1 + 2 c), of the average (7/3, 2, 0)
    t = math.sqrt(2) / (1 + 2 * math.sqrt(2) / 3)
    torch.testing.assert_close(
        merge(model_stock, [right, up, out], base), base + t * torch.tensor([7 / 3, 2.0, 0])
    )


def test_model_stock_of_task_vectors_that_point_apart_is_the_base_and_mergekit_s_goes_beyond_it():
    base = torch.zeros(2)
    a, b = torch.tensor([1.0, 1.0]), torch.tensor([-2.0, 1.0])  # cos = -1 / sqrt(10)
    assert torch.equal(merge(model_stock, [a, b], base), base)
    t = 2 * -math.sqrt(0.1) / (1 - math.sqrt(0.1))
    torch.testing.assert_close(merge(model_stock, [a, b], base, convention="mergekit"), t * (a + b) / 2)
    assert torch.equal(merge(model_stock, [base, base], base), base)


# TIES

def test_trim_keeps_the_magnitudes_from_the_threshold_on():
    delta = torch.tensor([0.1, -5.0, 0.3, 2.0, -0.3, 0.0])
    assert torch.equal(trim(delta, 2.0), torch.tensor([0.0, -5.0, 0.0, 2.0, 0.0, 0.0]))
    assert torch.equal(
        trim(delta, delta[2].item()), torch.tensor([0.0, -5.0, 0.3, 2.0, -0.3, 0.0])
    )  # both that equal it
    assert torch.equal(trim(delta, 0.0), delta)


def test_the_counting_of_magnitudes_worked_by_hand():
    delta = torch.tensor([1.0, -1.0, 1.0 + 2 ** -23, 2.0, 0.0])
    coarse = count_magnitudes(delta)
    one, two = (127 << 8) + 1, (
        128 << 8
    ) + 1  # the exponent, then 8 bits of the fraction; bin 0 is what is below
    assert {bin: coarse[bin].item() for bin in coarse.nonzero().flatten().tolist()} == {1: 1, one: 3, two: 1}
    assert [bin_of(coarse, rank) for rank in range(5)] == [1, one, one, one, two]
    fine = count_magnitudes(delta, 127 << 23, 0)
    assert fine[:4].tolist() == [1, 2, 1, 0] and fine[-1] == 1 and fine.sum() == 5 and len(fine) == BINS + 2


@pytest.mark.parametrize("guess", ["good", "too high", "too low", "of nothing but zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1e-20, 1e10])
def test_thresholds_are_those_of_a_full_sort_whatever_the_guess_from_some_pieces(scale, dtype, guess):
    base = torch.zeros(10_001)
    tensors = [
        (scale * torch.randn(10_001, generator=torch.Generator().manual_seed(seed))).to(dtype).float()
        for seed in (0, 1)
    ]
    tensors[1][3000:] = 0  # most of its parameters did not move
    factor, passes = {"good": 1, "too high": 100, "too low": 0.01, "of nothing but zeros": 0}[guess], []

    def over(work, every=1):
        passes.append(every)
        return [
            work(start, [x[start : start + 999] * (factor if every > 1 else 1) for x in (*tensors, base)])
            for start in range(0, 10_001, 999 if every == 1 else 5 * 999)
        ]

    for density in (1e-9, 0.001, 0.2, 0.5, 0.9, 1.0):
        kept = max(1, int(density * 10_001))
        expected = [tensor.abs().sort(descending=True).values[kept - 1].item() for tensor in tensors]
        assert thresholds(over, [density, density]) == expected
        if dtype == torch.float32 and density < 1:
            assert (trim(tensors[0], expected[0]) != 0).sum() == kept
    assert guess == "good" or passes.count(1) > passes.count(
        SAMPLED
    )  # a wrong guess costs two passes more, and is not believed


def test_a_good_guess_of_a_threshold_saves_a_pass(monkeypatch):
    pieces, passes = torch.randn(40, 2, 50_000, generator=torch.Generator().manual_seed(0)), []
    monkeypatch.setattr(merge_methods, "SAMPLED", 4)

    def over(work, every=1):
        passes.append(every)
        return [work(0, [*piece, torch.zeros(50_000)]) for piece in pieces[::every]]

    expected = [
        tensor.abs().flatten().sort(descending=True).values[int(0.3 * 2_000_000) - 1].item()
        for tensor in pieces.transpose(0, 1)
    ]
    assert thresholds(over, [0.3, 0.3]) == expected and passes == [4, 1]


def elect_and_average(deltas, weights, convention="paper"):
    """Steps 2 and 3 alone: nothing is trimmed, and the base is 0."""
    return merge(
        ties,
        list(deltas),
        torch.zeros(deltas.shape[1]),
        weights=weights,
        density=[1.0] * len(deltas),
        convention=convention,
    ).tolist()


def test_elect_and_average_worked_by_hand():
    deltas = torch.tensor([[3.0, 1.0, 2.0, 0.0, 1.0],
                           [-1.0, 2.0, -2.0, 0.0, 0.0],
                           [1.0, -4.0, 0.0, 0.0, 0.0]])
    # sums 3, -1, 0, 0, 1: mean of 3 and 1; of -4 alone; no sign; nothing there; of 1 alone, as zeros do not
    # agree with +
    assert elect_and_average(deltas, [1, 1, 1]) == [2.0, -4.0, 0.0, 0.0, 1.0]
    # with weights 3, 1, 1 the election is the same, and the first mean is (3*3 + 1*1) / 4
    assert elect_and_average(deltas, [3, 1, 1]) == [2.5, -4.0, 0.0, 0.0, 1.0]
    # without the third model: sums 2, 3, 0, 0, 1
    assert elect_and_average(deltas, [1, 1, 0]) == [3.0, 1.5, 0.0, 0.0, 1.0]
    # mergekit, 3, 1, 1: sums 9 - 1 + 1, 3 + 2 - 4, 6 - 2, 0, 3; and with 1, 1, 1 a sum of 0 elects +
    assert elect_and_average(deltas, [3, 1, 1], "mergekit") == [2.5, 1.25, 2.0, 0.0, 1.0]
    assert elect_and_average(deltas, [1, 1, 1], "mergekit") == [2.0, -4.0, 2.0, 0.0, 1.0]


def test_the_signs_of_the_tiniest_task_vectors_agree():
    """Their products with each other are 0 in fp32."""
    deltas = torch.tensor([[1e-30, -1e-38], [2e-30, 1e-40]])
    assert elect_and_average(deltas, [1, 1]) == [
        pytest.approx(1.5e-30, rel=1e-6),
        pytest.approx(-1e-38, rel=1e-6),
    ]


def test_ties_worked_by_hand():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    a, b = base + torch.tensor([4.0, 0.1, 2.0, 0.0]), base + torch.tensor([2.0, 0.0, -3.0, 0.2])
    # half of each kept: [4, 0, 2, 0] and [2, 0, -3, 0]; signs +, none, -, none; means 3, 0, -3, 0
    torch.testing.assert_close(
        merge(ties, [a, b], base, weights=[1, 1], density=[0.5, 0.5], lam=0.5),
        torch.tensor([2.5, 1.0, -0.5, 1.0]),
    )
    # not normalised: sums 6, 0, -3, 0
    torch.testing.assert_close(
        merge(ties, [a, b], base, weights=[1, 1], density=[0.5, 0.5], normalize=False),
        torch.tensor([7.0, 1.0, -2.0, 1.0]),
    )
    # thresholds of the whole model, here higher than this tensor's own
    torch.testing.assert_close(
        merge(ties, [a, b], base, weights=[1, 1], density=[0.5, 0.5], limits=[3.0, 3.0]),
        torch.tensor([5.0, 1.0, -2.0, 1.0]),
    )


def test_ties_of_one_model_at_density_one_is_that_model():
    (a, *_), base = models()
    torch.testing.assert_close(merge(ties, [a], base, weights=[1], density=[1.0]), a)
    (a, *_), base = models(dtype=torch.bfloat16)
    assert torch.equal(merge(ties, [a], base, weights=[0.7], density=[1.0]).bfloat16(), a)


def slow_sparse_merge(sparse, base, weights, lam, elected, normalize, mergekit):
    """One parameter after the other, in Python's fp64, on task vectors."""
    merged = []
    for i, start in enumerate(base.tolist()):
        deltas = [delta[i].item() for delta in sparse]
        agree = [delta != 0 for delta in deltas]
        if elected:
            vote = sum(delta * (weight if mergekit else weight > 0) for delta, weight in zip(deltas, weights))
            sign = (1 if vote >= 0 else -1) if mergekit else (vote > 0) - (vote < 0)
            agree = [delta * sign > 0 for delta in deltas]
        total = sum(weight * delta for weight, delta, agrees in zip(weights, deltas, agree) if agrees)
        mass = sum(weight for weight, agrees in zip(weights, agree) if agrees) if elected else sum(weights)
        merged.append(start + lam * (total / mass if normalize and mass else total))
    return torch.tensor(merged)


@pytest.mark.parametrize("convention", ["paper", "mergekit"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", SPARSE)
def test_the_pipeline_is_a_slow_one_that_takes_parameter_after_parameter(method, normalize, convention):
    tensors, base = models(shape=(300,), scale=0.5)
    deltas, weights, density = [tensor - base for tensor in tensors], [0.5, 0.3, 0.4], [0.5, 0.8125, 0.3125]
    if method is ties:
        sparse = [
            delta * (delta.abs() >= delta.abs().sort(descending=True).values[int(share * 300) - 1])
            for delta, share in zip(deltas, density)
        ]
    else:
        dropped = [drop(delta, share, 3, "x") for delta, share in zip(deltas, density)]
        sparse = [
            kept * (delta.abs().sum() / kept.abs().sum() if convention == "mergekit" else 1 / share)
            for delta, kept, share in zip(deltas, dropped, density)
        ]
    expected = slow_sparse_merge(
        sparse, base, weights, 0.7, method is not dare_linear, normalize, convention == "mergekit"
    )
    given = {
        "weights": weights,
        "density": density,
        "lam": 0.7,
        "normalize": normalize,
        "convention": convention,
    } | ({} if method is ties else {"seed": 3, "name": "x"})
    torch.testing.assert_close(merge(method, tensors, base, **given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("convention", ["paper", "mergekit"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", [linear, slerp, task_arithmetic, model_stock, *SPARSE])
def test_what_is_not_finite_in_any_model_is_not_finite_in_the_merge(method, broken, convention):
    """So looking at what comes out is enough. Also where it is trimmed, dropped, outvoted or of a model of
    weight 0."""
    for bad in range(3):
        (a, b, _), base = models(shape=(301,))
        a[7], b[8] = base[7], base[8]                                           # nothing to keep
        given = [a, b, base]
        given[bad][[7, 8, 9, 10, 300]] = broken
        parts = [a, b] if method in (linear, slerp) else [a, b, base]
        if bad < len(parts):
            settings = {
                slerp: {"t": 1.0},
                model_stock: {},
                linear: {"weights": [1, 0]},
                task_arithmetic: {"weights": [1, 0]},
            }.get(method, {"weights": [1, 0], "density": [0.2, 0.2]}) | (
                {} if method in (linear, task_arithmetic) else {"convention": convention}
            )
            merged = merge(method, parts[:2], *parts[2:], **settings)
            assert not merged[[7, 8, 9, 10, 300]].isfinite().any(), (bad, merged[[7, 8, 9, 10, 300]])


# DARE

def test_bernoulli_has_the_probability_of_its_digits_and_no_other():
    for chances in (1, 2, 3, 1 << 15, 0x5555, 0xAAAA, 52429, 13107, DRAWS - 1):
        p, size = chances / DRAWS, 1_000_003
        mask = bernoulli(size, chances, np.random.SFC64(chances))
        assert mask.dtype == np.uint8 and len(mask) == size and set(np.unique(mask)) <= {0, 1}
        assert abs(mask.mean() - p) < 4.5 * math.sqrt(p * (1 - p) / size), chances
        together = (mask[1:] & mask[:-1]).mean()  # neighbours, and those of the next word, are independent
        assert abs(together - p * p) < 6 * math.sqrt(p * p / size) + 1e-6, chances
        assert abs((mask[64:] & mask[:-64]).mean() - p * p) < 6 * math.sqrt(p * p / size) + 1e-6, chances
    assert bernoulli(100, DRAWS, np.random.SFC64(0)).all()


def test_dare_at_density_one_is_task_arithmetic_and_ties():
    tensors, base = models()
    torch.testing.assert_close(
        merge(dare_linear, tensors, base, weights=[0.5, 0.3, 0.2], density=[1.0] * 3, lam=0.7),
        merge(task_arithmetic, tensors, base, weights=[0.5, 0.3, 0.2], lam=0.7),
    )
    for convention in ("paper", "mergekit"):
        given = {"weights": [1, 2, 1], "density": [1.0] * 3, "convention": convention}
        torch.testing.assert_close(
            merge(dare_ties, tensors, base, **given), merge(ties, tensors, base, **given)
        )


def test_dare_drops_a_share_and_divides_the_rest_by_the_density():
    base, model = torch.zeros(100, 1000), torch.ones(100, 1000)
    merged = merge(dare_linear, [model], base, weights=[1], density=[0.25])
    assert sorted(merged.unique().tolist()) == [0.0, 4.0]
    assert abs((merged != 0).float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 100_000)
    assert merge(dare_linear, [model], base, weights=[1], density=[0.3]).unique().tolist() == [
        0.0,
        pytest.approx(65536 / round(0.3 * 65536)),
    ]  # not 1 / 0.3
    rarely = merge(dare_linear, [model], base, weights=[1], density=[1e-12])  # as if 1 / 65536
    assert (rarely != 0).sum() < 10 and set(rarely.unique().tolist()) <= {0.0, 65536.0}


def test_mergekit_s_rescaling_keeps_the_sum_of_magnitudes_in_each_tensor():
    (a, *_), base = models(shape=(50,))
    delta = merge(dare_linear, [a], base, weights=[1], density=[0.3], convention="mergekit") - base
    assert delta.abs().sum().item() == pytest.approx((a - base).abs().sum().item(), rel=1e-4)
    assert (delta == 0).sum() > 20


def test_the_mean_of_dare_over_many_masks_is_the_delta():
    delta, num_masks, density = torch.linspace(-1, 1, 64), 4000, 0.3
    total = sum(
        merge(dare_linear, [delta], torch.zeros(64), weights=[1], density=[density], seed=seed)
        for seed in range(num_masks)
    )
    sigma = delta.abs() * math.sqrt((1 - density) / density / num_masks)
    assert ((total / num_masks - delta).abs() <= 4 * sigma + 1e-6).all()


def test_dare_masks_depend_on_the_seed_the_tensor_s_name_and_place_and_the_model_only():
    (a, b, _), base = models(num=3, shape=(10_000,))
    mask = drop(a - base, 0.5, 0, "x") != 0
    assert torch.equal(mask, drop(a - base, 0.5, 0, "x") != 0)
    for other in (
        drop(a - base, 0.5, 1, "x"),
        drop(a - base, 0.5, 0, "y"),
        drop(b - base, 0.5, 0, "x"),
        drop(a - base, 0.5, 0, "x", start=1),
    ):
        assert abs(((other != 0) == mask).float().mean() - 0.5) < 0.02  # as independent masks


def test_dare_masks_do_not_change_between_versions():
    """A merge can be made again: the first bits of masks as first written. Odd lengths too."""
    for density, bits in (
        (0.5, "011010111110101110011101011111110"),
        (0.3, "000101000100000110101101111100001"),
    ):
        assert "".join("01"[kept] for kept in (drop(torch.ones(33), density, 0, "x") != 0).tolist()) == bits


# all

@pytest.mark.parametrize("method", WITH_BASE)
def test_the_order_of_the_models_does_not_matter(method):
    tensors, base = models(dtype=torch.bfloat16)
    weights = [0.5, 0.3, 0.2]
    one, two = settings(method, 3, **{"weights": weights}), settings(method, 3, **{"weights": weights[::-1]})
    torch.testing.assert_close(merge(method, tensors, base, **one), merge(method, tensors[::-1], base, **two))
    torch.testing.assert_close(
        merge(linear, tensors, weights=weights), merge(linear, tensors[::-1], weights=weights[::-1])
    )
    torch.testing.assert_close(merge(slerp, tensors[:2], t=0.3), merge(slerp, tensors[1::-1], t=0.7))


@pytest.mark.parametrize("convention", ["paper", "mergekit"])
@pytest.mark.parametrize("method", [linear, slerp, task_arithmetic, model_stock, ties])
def test_a_tensor_merged_in_pieces_is_the_tensor_merged_whole(method, convention):
    """Not DARE's, whose masks are those of a piece."""
    tensors, base = models(num=2 if method is slerp else 3, shape=(20, 5), scale=0.5)
    given = settings(
        method, len(tensors), **({"convention": convention} if method in WITH_CONVENTION else {})
    )
    with_base = {"base": base} if method in WITH_BASE else {}
    torch.testing.assert_close(
        in_pieces(method, tensors, **with_base, **given).view(20, 5),
        merge(method, tensors, **with_base, **given),
    )


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_dare_in_pieces_rescales_by_the_whole_tensor_in_mergekit_s_convention(method):
    (a, *_), base = models(shape=(1000,), scale=0.5)
    delta = (
        in_pieces(method, [a], base, piece=100, weights=[1.0], density=[0.3], convention="mergekit") - base
    )
    ratios = (delta / (a - base))[delta.abs() > 1e-3]
    assert (
        len(ratios) > 200
        and ratios.max() - ratios.min() < 1e-2
        and delta.abs().sum().item() == pytest.approx((a - base).abs().sum().item(), rel=1e-4)
    )


def test_scalars_merge_too():
    one = torch.tensor(2.0)
    for method in WITH_BASE:
        assert merge(method, [one, one], one, **settings(method, 2)).shape == ()
    assert torch.equal(merge(slerp, [one, one], t=0.5), one) and torch.equal(
        merge(linear, [one, one], weights=[1, 1]), one
    )
