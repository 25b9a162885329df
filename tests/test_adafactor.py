"""Adafactor: torch's numbers, on one rank and on two, and states that it resumes from."""

import pytest
import torch
from small import assert_close, logged, on_ranks, run, state_of, write_world
from torch import nn

from aya_min import checkpoint, config
from aya_min.adafactor import Adafactor


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 7), (4,), (3, 6, 2), (1, 4)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_its_steps_are_those_of_torch():
    """Also where the rate is above 1/sqrt(t), for a gradient of zeros, and for weights that are nearly 0."""
    for lr, weight_decay in ((0.02, 0.1), (0.9, 0.0)):
        ours, theirs = parameters(), parameters()
        optimizers = [Adafactor([{"params": ours, "weight_decay": weight_decay}], lr=lr),
                      torch.optim.Adafactor(theirs, lr=lr, weight_decay=weight_decay)]
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for p, q in zip(ours, theirs):
                p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step - 2)
                p.grad[0] = 0
                q.grad = p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
            for p, q in zip(ours, theirs):
                torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-7)


def test_a_first_step_by_hand():
    """g = ((3, 4), (0, 0)): rows 12.5, 0 and columns 4.5, 8 are the means of squares; V of the first row is
    rows columns / mean(rows) = 12.5 (4.5, 8) / 6.25 = (9, 16), so u = (1, 1, 0, 0), of size sqrt(1/2) < 1.
    The weights' size is 2, the rate 0.1: they move by 0.2."""
    p = nn.Parameter(torch.full((2, 2), 2.0))
    p.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    Adafactor([{"params": [p]}], lr=0.1).step()
    torch.testing.assert_close(p.detach(), torch.tensor([[1.8, 1.8], [2.0, 2.0]]))


def trained_on(world, out, **changes):
    run("sft", world, out, optimizer="adafactor", learning_rate=0.02, max_steps=4, **changes)
    return logged(out), {name: tensor.tolist() for name, tensor in state_of(out).items()}


def test_two_ranks_take_the_steps_of_one(world, tmp_path):
    alone, state = trained_on(world, tmp_path / "one")
    both = on_ranks(2, lambda: (run("sft", world, tmp_path / "two", optimizer="adafactor", learning_rate=0.02,
                                    max_steps=4), None)[1])
    assert both == [None, None]
    assert_close(logged(tmp_path / "two"), alone, rtol=1e-4, atol=1e-5)
    of_two = state_of(tmp_path / "two")
    assert of_two.keys() == state.keys() and any(name.endswith("|columns") for name in state)
    for name, tensor in of_two.items():
        torch.testing.assert_close(tensor, torch.tensor(state[name]), rtol=2e-3, atol=1e-6, msg=name)


def test_a_resumed_run_is_one_that_never_stopped(world, tmp_path):
    whole, state = trained_on(world, tmp_path / "whole", schedule="constant")
    run("sft", world, tmp_path / "part", optimizer="adafactor", learning_rate=0.02, max_steps=2,
        schedule="constant")
    run("sft", world, tmp_path / "part", optimizer="adafactor", learning_rate=0.02, max_steps=4,
        schedule="constant", resume=True)
    assert logged(tmp_path / "part") == whole
    resumed = state_of(tmp_path / "part")
    assert all(torch.equal(tensor, torch.tensor(state[name])) for name, tensor in resumed.items())


def test_a_state_is_smaller_than_adamws_and_its_size_is_known_before():
    p = nn.Linear(30, 20, bias=True)
    optimizer = Adafactor([{"params": list(p.parameters())}], lr=0.1)
    checkpoint.begin_moments(p, optimizer)
    held = sum(t.nbytes for t in checkpoint.state_tensors(p, optimizer).values())
    assert held == checkpoint.state_bytes(p, "adafactor") == 4 * (620 + 20 + 30 + 20)
    assert checkpoint.state_bytes(p) == 4 * 3 * 620


def test_a_beta_of_adamw_is_refused():
    with pytest.raises(ValueError, match="--adam-beta2 0.9 goes with --optimizer adamw"):
        config.check_training(config.SFT(optimizer="adafactor", adam_beta2=0.9), 1)
