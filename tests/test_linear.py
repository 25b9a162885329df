"""The CPU's matrix product with its two gradients against torch's own, and where it steps aside."""

import pytest
import torch
import torch.nn.functional as F

from aya_min import linear as module
from aya_min.linear import Linear, linear, outer, packed, product


@pytest.fixture(params=[False, True], ids=["oneDNN", "intel"], autouse=True)
def processor(request, monkeypatch):
    """Whatever processor the tests run on, both ways."""
    monkeypatch.setattr(module, "is_intel", lambda: request.param)


def test_intels_processors_take_torchs_own_product_and_others_onednn():
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    by_onednn = not module.is_intel() and torch.backends.mkldnn.is_available()
    assert ("Product" in linear(x, weight).grad_fn.name()) == by_onednn


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (1, 5), (4, 1, 5)])
@pytest.mark.parametrize("out", [3, 11])
def test_product_and_gradients_are_those_of_torch_for_wide_and_narrow_weights_and_views(shape, out):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape[:-1], 9)[..., :5].requires_grad_(), torch.randn(out, 5, requires_grad=True)
    upstream = torch.randn(*shape[:-1], out)
    results = [(y := function(x, weight), *torch.autograd.grad((y * upstream).sum(), (x, weight))) for function in (linear, F.linear)]
    for ours, theirs in zip(*results):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)


def test_a_frozen_weight_or_input_gets_no_gradient():
    x, weight = torch.randn(4, 5), torch.randn(3, 5, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad.is_contiguous()
    y = linear(x.requires_grad_(), weight.detach())
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(4, 5))


def test_outer_is_the_same_whichever_side_is_narrower():
    torch.manual_seed(0)
    for N, K in ((9, 4), (4, 9)):
        dy, x = torch.randn(20, N), torch.randn(20, K)
        torch.testing.assert_close(outer(dy, x), dy.t() @ x)


def test_no_rows_half_precision_and_autocast_go_to_torch():
    assert linear(torch.zeros(0, 5), torch.randn(3, 5)).shape == (0, 3)
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    assert torch.equal(linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.testing.assert_close(product(x, weight), x @ weight.t())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_a_packed_rows_result_is_the_same_to_the_last_bit_whatever_stands_beside_it():
    torch.manual_seed(0)
    for N, K in ((40, 24), (130, 96)):
        f, x = packed(torch.randn(N, K)), torch.randn(70, K)
        whole = f(x)
        torch.testing.assert_close(whole, f(x), rtol=0, atol=0)
        assert all(torch.equal(f(x[3:3 + n].contiguous()), whole[3:3 + n]) for n in (1, 2, 3, 5, 16, 31, 64))


def test_the_layer_is_torchs_layer_in_name_shape_and_value():
    torch.manual_seed(0)
    ours, theirs = Linear(5, 3, bias=False), torch.nn.Linear(5, 3, bias=False)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_it_is_used_in_training_on_the_cpu(monkeypatch):
    """A change of torch that takes the operator away must be noticed, not slow everything down in silence."""
    calls = []
    monkeypatch.setattr(module, "product", lambda x, weight: calls.append(1) or F.linear(x, weight))
    linear(torch.randn(4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)).sum().backward()
    assert len(calls) == (0 if module.is_intel() else 3)                              # forward, input, weight
