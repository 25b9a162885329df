"""Adafactor (arXiv 1804.04235, algorithms 4 and 5), which mT5 and Aya 101 were trained with: of a matrix's
second moments it keeps the means of the rows and of the columns alone, and a step is relative to the size of
the weights that it moves.

    V = rows columns / mean(rows)           u = g / sqrt(V)
    w -= max(eps2, rms(w)) min(lr, t^-1/2) u / max(1, rms(u))

rows and columns are means of g^2, averaged over steps with beta2 = 1 - t^-0.8.

torch (2.13) has this as torch.optim.Adafactor, with the same numbers (tests/test_adafactor.py), but not for
sharded parameters: DTensor refuses its operations. Here each rank works on its rows, and what runs over all
rows is summed over the ranks.
"""

import torch
import torch.distributed as dist

from . import distributed

DECAY, LEAST_SIZE = -0.8, 1e-3              # of beta2; eps2


class Adafactor(torch.optim.Optimizer):
    """weight_decay is per step and times the learning rate, as AdamW's. A stack of matrices, (E, out, in), is
    that many matrices, but for their one size."""

    def __init__(self, groups, lr):
        super().__init__(groups, dict(lr=lr, weight_decay=0.0))

    def begin(self, p, steps=0.0):
        """The state of a parameter before its first step. What is cut like the parameter is sharded as it
        is."""
        state = {"step": torch.tensor(steps, device=p.device)}
        if p.dim() == 1:
            return state | {"variance": torch.zeros_like(p)}
        columns = torch.zeros_like(p.detach().select(-2, 0).unsqueeze(-2)) if cut(p) != p.dim() - 2 else \
            torch.zeros((*p.shape[:-2], 1, p.shape[-1]), device=p.device, dtype=p.dtype)
        return state | {"rows": torch.zeros_like(p.detach()[..., :1]), "columns": columns}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = self.state[p] or self.begin(p)
                    update(p, p.grad, self.state[p], group["lr"], group["weight_decay"])


def cut(p):
    """The dimension that a sharded parameter is cut along, or None."""
    return p.placements[-1].dim if distributed.is_sharded(p) else None


def local(tensor):
    return tensor.to_local() if distributed.is_sharded(tensor) else tensor


def summed(p, tensor):
    """The sum of a tensor over the ranks that share the rows of p; a plain parameter's as it is."""
    if cut(p) is not None:
        dist.all_reduce(tensor, group=p.device_mesh.get_group(p.device_mesh.ndim - 1))
    return tensor


def update(p, gradient, state, lr, weight_decay):
    """One step of a parameter, in place."""
    w, g, state = local(p), local(gradient), {name: local(value) for name, value in state.items()}
    over_ranks = cut(p) == p.dim() - 2                      # each rank has some of a matrix's rows
    t = state["step"].add_(1)
    share = t ** DECAY                                      # 1 - beta2
    size = (summed(p, w.square().sum()) / p.numel()).sqrt().clamp(min=LEAST_SIZE)
    w.mul_(1 - lr * weight_decay)
    if p.dim() == 1:
        u = state["variance"].lerp_(g.square(), share).clone()
    else:
        squares = g.square()
        column_sums = squares.sum(-2, keepdim=True)
        column_sums = summed(p, column_sums) if over_ranks else column_sums
        rows = state["rows"].lerp_(squares.mean(-1, keepdim=True), share)
        columns = state["columns"].lerp_(column_sums / p.shape[-2], share)
        total = rows.sum(-2, keepdim=True)
        mean = (summed(p, total) if over_ranks else total) / p.shape[-2]
        u = rows @ columns / mean.clamp(min=torch.finfo(w.dtype).eps)
    u = u.clamp_(min=torch.finfo(w.dtype).eps ** 2).rsqrt_().mul_(g)
    length = (summed(p, u.square().sum()) / p.numel()).sqrt().clamp(min=1)
    w.sub_(u.mul_(size * t.rsqrt().clamp(max=lr) / length))
