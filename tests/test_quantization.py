"""Quantization after training: the numbers, the folders, the engine's products, the command."""

import math

import pytest
import torch

from aya_min.quantization import (NF4, SCHEMES, dequantize, from_tensors, gptq, loss, nearest, pack,
                                  round_to_nearest, scales_of, smoothing, specs_of, tensors_of, unpack, values)

EACH = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the numbers -------------------------------------------------------------------------------------------

def test_weights_of_four_bits_worked_by_hand():
    weight = torch.tensor([[7.0, -3.0, 0.6, -0.4], [0.0, 0.0, 0.0, 0.0], [-1.4, 0.5, 0.31, 0.29]])
    codes, scales = round_to_nearest(weight, SCHEMES["w4"])
    torch.testing.assert_close(scales, torch.tensor([[1.0], [1.0], [0.2]]))
    assert codes.tolist() == [[7, -3, 1, 0], [0, 0, 0, 0], [-7, 2, 2, 1]]
    found = dequantize(codes, scales, SCHEMES["w4"])
    torch.testing.assert_close(found[2], torch.tensor([-1.4, 0.4, 0.4, 0.2]))


@EACH
def test_weights_on_the_grid_are_kept_exactly(scheme):
    levels = values(torch.arange(16, dtype=torch.int8), scheme) if scheme.name == "nf4" else torch.arange(
        -scheme.largest, scheme.largest + 1.0)
    weight = torch.cat([levels[torch.randint(len(levels), (5, 256))], levels[-1:].expand(5, 128)], 1)
    weight[:, ::32] = levels[-1]                        # each group holds its largest number
    weight *= torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])[:, None]
    codes, scales = round_to_nearest(weight, scheme)
    assert torch.equal(dequantize(codes, scales, scheme), weight)


@EACH
def test_an_error_is_at_most_half_a_step(scheme):
    weight = normal(7, 384)
    codes, scales = round_to_nearest(weight, scheme)
    errors = ((dequantize(codes, scales, scheme) - weight).unflatten(1, (scales.shape[1], -1))
              / scales[..., None]).abs()
    levels = torch.tensor(NF4)
    step = levels.diff().max() if scheme.name == "nf4" else 1.0
    assert step / 2 * 0.95 < errors.max() <= step / 2 + 1e-4


def test_a_smaller_group_has_a_smaller_error_and_nf4_is_better_for_normal_weights():
    weight = normal(64, 384)
    errors = {name: (dequantize(*round_to_nearest(weight, scheme), scheme) - weight).square().mean().item()
              for name, scheme in SCHEMES.items()}
    assert errors["w8"] < errors["w4-g32"] < errors["w4-g64"] < errors["w4-g128"] < errors["w4"]
    assert errors["nf4"] < errors["w4-g64"]


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_stand_in_the_lowest_bits_first(bits):
    codes = [[0, -4, -7, -5, -3, -1, 0, 1, -3, -2]] if bits == 4 else [[117, 115, 116, 115, -1]]
    codes = torch.tensor(codes, dtype=torch.int8)
    packed, raised = pack(codes, bits), codes[0].int() + 2 ** (bits - 1)
    each = 32 // bits
    whole = [sum(int(n) << bits * i for i, n in enumerate(raised[start:start + each]))
             for start in range(0, len(raised), each)]
    assert [word % 2 ** 32 for word in packed[0].tolist()] == whole
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


@EACH
def test_what_is_written_is_what_is_read(scheme):
    weight = normal(6, 128)
    codes, scales = round_to_nearest(weight, scheme)
    found, specs = tensors_of("x", codes, scales, scheme), specs_of("x", weight.shape, scheme, "F32")
    assert {name: tuple(t.shape) for name, t in found.items()} == {name: s for name, (_, s) in specs.items()}
    again = from_tensors("x", found, weight.shape, scheme)
    assert torch.equal(again[0], codes)
    torch.testing.assert_close(again[1], scales, rtol=1e-6, atol=0)


def slow_gptq(weight, hessian, scheme):
    """One input after the other; the others make good its error by the inverse of what is left of the
    Hessian, inverted anew (the optimal brain surgeon, which GPTQ computes faster)."""
    W, H = weight.double().clone(), hessian.double().clone()
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.double)
    codes, scales = torch.empty(W.shape), torch.empty(len(W), scheme.groups(len(H)))
    width = scheme.group or len(H)
    first = scales_of(W, scheme)
    for j in range(len(H)):
        if j % width == 0:
            scales[:, j // width] = scales_of(W[:, j:j + width], scheme)[:, 0] if scheme.group else first[:, 0]
        inverse = torch.linalg.inv(H[j:, j:])
        scale = scales[:, j // width].double()
        codes[:, j] = nearest(W[:, j] / scale, scheme).float()
        error = W[:, j] - values(codes[:, j].to(torch.int8), scheme, torch.double) * scale
        W[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes.to(torch.int8), scales


def correlated(num, width):
    x = normal(num, width, seed=1) @ (normal(width, width, seed=2) * 0.3 + torch.eye(width))
    return x.T @ x


@pytest.mark.parametrize("name, block", [("w4", 24), ("w4-g32", 24), ("w4-g32", 128), ("nf4", 128), ("w8", 128)])
def test_gptq_is_the_slow_one(name, block):
    """block 24: groups that reach over the end of a block of inputs."""
    scheme, weight, H = SCHEMES[name], normal(6, 128), correlated(300, 128)
    codes, scales = gptq(weight, H.clone(), scheme, block=block)
    slow, slow_scales = slow_gptq(weight, H, scheme)
    won = loss(weight, dequantize(slow, slow_scales, scheme), H) < loss(
        weight, dequantize(*round_to_nearest(weight, scheme), scheme), H)
    assert won.any()
    same = (codes == slow)[won].float().mean()              # a number in the middle of a step may go elsewhere
    assert same > 0.99
    torch.testing.assert_close(scales[won], slow_scales[won], rtol=2e-2, atol=0)


@EACH
def test_gptq_is_never_worse_than_rounding_on_its_own_loss(scheme):
    for seed in range(3):
        weight, H = normal(16, 128, seed=seed), correlated(40 * (seed + 1), 128)
        of = {method: loss(weight, dequantize(*found, scheme), H) for method, found in (
            ("gptq", gptq(weight, H.clone(), scheme)), ("rtn", round_to_nearest(weight, scheme)))}
        assert (of["gptq"] <= of["rtn"] * (1 + 1e-5)).all() and of["gptq"].sum() < 0.95 * of["rtn"].sum()


def test_gptq_bears_inputs_that_are_always_zero_and_no_inputs_at_all():
    weight, H = normal(4, 64), correlated(100, 64)
    H[3], H[:, 3] = 0, 0
    codes, scales = gptq(weight, H, SCHEMES["w4"])
    assert dequantize(codes, scales, SCHEMES["w4"]).isfinite().all()
    codes, scales = gptq(weight, torch.zeros(64, 64), SCHEMES["w4"])
    assert torch.equal(codes, round_to_nearest(weight, SCHEMES["w4"])[0])


def test_smoothing_moves_what_is_large_from_inputs_to_weights():
    """alpha 0.5 gives both the same largest number, sqrt(a b); 1 gives all inputs 1; by hand."""
    inputs, weights = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 2.0])
    factors = smoothing(inputs, weights, 0.5)
    torch.testing.assert_close(factors, torch.tensor([4.0, 0.5, 1.0]))
    torch.testing.assert_close(inputs[:2] / factors[:2], weights[:2] * factors[:2])
    torch.testing.assert_close((inputs / smoothing(inputs, weights, 1.0))[:2], torch.ones(2))
    assert math.isclose(smoothing(inputs, weights, 0.75)[0].item(), 8.0)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="x.weight has 96 inputs, which groups of 64 do not divide"):
        specs_of("x", (8, 96), SCHEMES["w4-g64"], "F32")
