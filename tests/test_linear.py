"""The CPU's matrix product with its two gradients against torch's own, and where it steps aside."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from aya_min import linear as module
from aya_min.linear import Linear, linear, outer, packed, product


@pytest.fixture(params=module.LIBRARIES, autouse=True)
def library(request, monkeypatch):
    """Whatever is faster where the tests run, both ways."""
    monkeypatch.setattr(module, "_chosen", None)
    module.choose(request.param)


def test_the_chosen_library_computes_the_product():
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    assert ("Product" in linear(x, weight).grad_fn.name()) == (module.chosen() == "onednn")


CLEARLY = [(0.5, "onednn"), (0.89, "onednn"), (0.91, "default"), (2.0, "default")]


@pytest.mark.parametrize("seconds, expected", CLEARLY)
def test_onednn_is_chosen_where_it_is_clearly_faster(monkeypatch, seconds, expected):
    races = []
    monkeypatch.setattr(module, "_chosen", None)
    monkeypatch.setattr(module, "race", lambda: races.append(1) or {"default": 1.0, "onednn": seconds})
    assert [module.chosen(), module.chosen()] == [expected] * 2 and len(races) == 1


def test_a_recorded_choice_is_taken_without_a_race_and_an_unknown_one_refused(monkeypatch, library):
    monkeypatch.setattr(module, "_chosen", None)
    monkeypatch.setattr(module, "race", None)
    module.choose("onednn")
    assert module.chosen() == "onednn"
    with pytest.raises(ValueError, match="'mkl' are not known; known: default onednn"):
        module.choose("mkl")


def test_the_race_times_both_libraries_and_leaves_threads_and_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(module, "RACES", [(8, 4, 6)])
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_num_threads(2)
        seconds = module.race()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(seconds) == set(module.LIBRARIES) and all(0 < s < 10 for s in seconds.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_raced_for_the_dry_runs_fake_tensors_and_half_precision(monkeypatch):
    monkeypatch.setattr(module, "_chosen", None)
    monkeypatch.setattr(module, "race", None)
    with FakeTensorMode():
        assert linear(torch.randn(4, 5), torch.randn(3, 5)).shape == (4, 3)
    assert linear(torch.randn(4, 5).bfloat16(), torch.randn(3, 5).bfloat16()).shape == (4, 3)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (1, 5), (4, 1, 5)])
@pytest.mark.parametrize("out", [3, 11])
def test_product_and_gradients_are_those_of_torch_for_wide_and_narrow_weights_and_views(shape, out):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape[:-1], 9)[..., :5].requires_grad_(), torch.randn(out, 5, requires_grad=True)
    upstream = torch.randn(*shape[:-1], out)
    results = [(y := function(x, weight), *torch.autograd.grad((y * upstream).sum(), (x, weight)))
               for function in (linear, F.linear)]
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
    monkeypatch.setattr(module, "by_onednn", lambda x, weight: calls.append(1) or F.linear(x, weight))
    linear(torch.randn(4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)).sum().backward()
    assert len(calls) == (3 if module.chosen() == "onednn" else 0)      # forward, input, weight
