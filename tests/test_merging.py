import math

import pytest
import torch

from aya_min.merging import dare, dare_linear, dare_ties, elect_and_average, linear, norm, slerp, task_arithmetic, ties, trim


def models(num=3, shape=(40, 50), scale=0.01, dtype=torch.float32, seed=0):
    """A base and `num` models trained a little away from it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [(base + scale * torch.randn(shape, generator=generator)).to(dtype) for _ in range(num)], base.to(dtype)


# linear

def test_linear_is_the_weighted_average_and_without_normalising_the_weighted_sum():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])
    assert linear([a, b], [3, 1]).tolist() == [2.0, 1.0]
    assert linear([a, b], [3, 1], normalize=False).tolist() == [8.0, 4.0]


def test_linear_with_weights_one_and_zero_is_that_model():
    (a, b, _), _ = models()
    assert torch.equal(linear([a, b], [1, 0]), a) and torch.equal(linear([a, b], [0, 1]), b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num", [2, 3, 5, 7])
def test_copies_of_one_half_precision_model_merge_to_exactly_that_model(num, dtype):
    """Accumulated in bf16, 13-52% of the weights change."""
    model = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(linear([model] * num, [1] * num).to(dtype), model)
    assert torch.equal(linear([model] * num, [0.2 + i for i in range(num)]).to(dtype), model)
    assert torch.equal(slerp(model, model, 0.3).to(dtype), model)
    base = (model + 0.01).to(dtype)
    for method in (task_arithmetic, ties, dare_linear, dare_ties):
        density = {} if method is task_arithmetic else {"density": 1.0}
        assert torch.equal(method([model] * num, base, [1 / num] * num, **density).to(dtype), model), method


# slerp

def test_slerp_of_perpendicular_tensors_walks_the_arc():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(slerp(a, b, 1 / 3), torch.tensor([[2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)]]))


def test_slerp_weighs_tensors_of_other_lengths_by_the_angle_of_their_directions():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.5, 0.5])                  # 45 degrees apart: at t=1/2 both get sin(22.5)/sin(45)
    torch.testing.assert_close(slerp(a, b, 0.5), (a + b) * math.sin(math.pi / 8) / math.sin(math.pi / 4))


def test_slerp_at_t_zero_and_one_is_the_first_and_the_second_model():
    (a, b, _), _ = models(scale=1.0)
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)


def test_slerp_of_colinear_opposite_and_zero_tensors_is_linear():
    a, zero = torch.tensor([1.0, -2.0, 4.0]), torch.zeros(3)
    torch.testing.assert_close(slerp(a, 3 * a, 0.25), 1.5 * a)
    torch.testing.assert_close(slerp(a, -a, 0.25), 0.5 * a)
    torch.testing.assert_close(slerp(a, zero, 0.25), 0.75 * a)
    assert torch.equal(slerp(zero, zero, 0.5), zero)


def test_slerp_has_no_step_where_it_turns_linear():
    for angle in (0.9e-4, 1.1e-4, 1e-3, 0.05):
        a, b = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])
        torch.testing.assert_close(slerp(a, b, 0.5), torch.tensor([math.cos(angle / 2), math.sin(angle / 2)]))


def test_norm_of_a_large_tensor_is_exact():
    """torch's fp32 norm of 20 million numbers on one thread was seen to be off by 1e-3."""
    large = torch.randn(20_000_000, generator=torch.Generator().manual_seed(0))
    assert norm(large) == pytest.approx(math.sqrt(sum(part.double().square().sum().item() for part in large.split(1_000_000))), rel=1e-9)


# task arithmetic

def test_task_arithmetic_adds_and_negates_task_vectors():
    base, a, b = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0]), torch.tensor([1.0, 5.0])
    assert task_arithmetic([a, b], base, [1, 1]).tolist() == [2.0, 5.0]
    assert task_arithmetic([a, b], base, [1, -0.5], lam=2).tolist() == [3.0, -3.0]


def test_task_arithmetic_with_weights_that_sum_to_one_is_linear():
    tensors, base = models()
    torch.testing.assert_close(task_arithmetic(tensors, base, [0.5, 0.3, 0.2]), linear(tensors, [0.5, 0.3, 0.2]))


# TIES

def test_trim_keeps_the_largest_magnitudes():
    delta = torch.tensor([[0.1, -5.0, 0.3], [2.0, -0.2, 0.0]])
    assert torch.equal(trim(delta, 1 / 3), torch.tensor([[0.0, -5.0, 0.0], [2.0, 0.0, 0.0]]))
    assert torch.equal(trim(delta, 0.01), torch.tensor([[0.0, -5.0, 0.0], [0.0, 0.0, 0.0]]))        # at least one
    assert torch.equal(trim(delta, 1.0), delta)


def test_trim_agrees_with_a_full_sort_and_keeps_all_that_equal_the_threshold():
    delta = torch.randn(10_001, generator=torch.Generator().manual_seed(0))
    for density in (0.001, 0.2, 0.5, 0.9):
        kept = trim(delta, density) != 0
        assert kept.sum() == round(density * 10_001)
        assert delta[kept].abs().min() > delta[~kept].abs().max()
    assert (trim(torch.tensor([1.0, -1.0, 1.0, 0.5]), 0.25) != 0).tolist() == [True, True, True, False]


def test_elect_and_average_worked_by_hand():
    deltas = torch.tensor([[3.0, 1.0, 2.0, 0.0, 1.0],
                           [-1.0, 2.0, -2.0, 0.0, 0.0],
                           [1.0, -4.0, 0.0, 0.0, 0.0]])
    # sums 3, -1, 0, 0, 1: mean of 3 and 1; of -4 alone; no sign; nothing there; of 1 alone, as zeros do not agree with +
    assert elect_and_average(list(deltas), [1, 1, 1]).tolist() == [2.0, -4.0, 0.0, 0.0, 1.0]
    # with weights 3, 1, 1 the election is the same, and the first mean is (3*3 + 1*1) / 4
    assert elect_and_average(list(deltas), [3, 1, 1]).tolist() == [2.5, -4.0, 0.0, 0.0, 1.0]
    # without the third model: sums 2, 3, 0, 0, 1
    assert elect_and_average(list(deltas), [1, 1, 0]).tolist() == [3.0, 1.5, 0.0, 0.0, 1.0]


def test_ties_worked_by_hand():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    a, b = base + torch.tensor([4.0, 0.1, 2.0, 0.0]), base + torch.tensor([2.0, 0.0, -3.0, 0.2])
    # half of each kept: [4, 0, 2, 0] and [2, 0, -3, 0]; signs +, none, -, none; means 3, 0, -3, 0
    torch.testing.assert_close(ties([a, b], base, [1, 1], density=0.5, lam=0.5), torch.tensor([2.5, 1.0, -0.5, 1.0]))


def test_ties_of_one_model_at_density_one_is_that_model():
    (a, *_), base = models()
    torch.testing.assert_close(ties([a], base, [1], density=1.0), a)
    (a, *_), base = models(dtype=torch.bfloat16)
    assert torch.equal(ties([a], base, [0.7], density=1.0).bfloat16(), a)


# DARE

def test_dare_at_density_one_is_task_arithmetic():
    tensors, base = models()
    assert torch.equal(dare_linear(tensors, base, [0.5, 0.3, 0.2], density=1.0, lam=0.7),
                       task_arithmetic(tensors, base, [0.5, 0.3, 0.2], lam=0.7))
    assert torch.equal(dare_ties(tensors, base, [1, 1, 1], density=1.0), ties(tensors, base, [1, 1, 1], density=1.0))


def test_dare_drops_a_share_and_divides_the_rest_by_the_density():
    delta = torch.ones(100, 1000)
    dropped = dare(delta, 0.25, seed=0, name="x")
    assert sorted(dropped.unique().tolist()) == [0.0, 4.0]
    assert abs((dropped != 0).float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 100_000)


def test_the_mean_of_dare_over_many_masks_is_the_delta():
    delta, num_masks, density = torch.linspace(-1, 1, 64), 4000, 0.3
    total = sum(dare(delta, density, seed, "x") for seed in range(num_masks))
    sigma = delta.abs() * math.sqrt((1 - density) / density / num_masks)
    assert ((total / num_masks - delta).abs() <= 4 * sigma + 1e-6).all()


def test_dare_masks_depend_on_the_seed_the_tensor_name_and_the_model_only():
    (a, b, _), base = models(num=3, shape=(10_000,))
    mask = dare(a - base, 0.5, 0, "x") != 0
    assert torch.equal(mask, dare(a - base, 0.5, 0, "x") != 0)
    for other in (dare(a - base, 0.5, 1, "x"), dare(a - base, 0.5, 0, "y"), dare(b - base, 0.5, 0, "x")):
        assert abs(((other != 0) == mask).float().mean() - 0.5) < 0.02                                # as independent masks


@pytest.mark.parametrize("method", [task_arithmetic, ties, dare_linear, dare_ties])
def test_the_order_of_the_models_does_not_matter(method):
    tensors, base = models(dtype=torch.bfloat16)
    weights = [0.5, 0.3, 0.2]
    torch.testing.assert_close(method(tensors, base, weights), method(tensors[::-1], base, weights[::-1]))
    torch.testing.assert_close(linear(tensors, weights), linear(tensors[::-1], weights[::-1]))
    torch.testing.assert_close(slerp(tensors[0], tensors[1], 0.3), slerp(tensors[1], tensors[0], 0.7))


def test_scalars_and_empty_tensors_merge_too():
    one, empty = torch.tensor(2.0), torch.zeros(0, 3)
    for tensor in (one, empty):
        for method in (task_arithmetic, ties, dare_linear, dare_ties):
            assert method([tensor, tensor], tensor, [1, 1]).shape == tensor.shape
        assert torch.equal(slerp(tensor, tensor, 0.5), tensor) and torch.equal(linear([tensor, tensor], [1, 1]), tensor)
