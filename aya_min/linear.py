"""x W^T. On the CPU in fp32 torch's default is MKL, whose path for processors that are not Intel's is 2.5 times as slow as oneDNN, which torch brings too;
on Intel's own it is the faster one (LOG.md). Everywhere but on those others this is F.linear."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def product(x, weight):
    """x W^T without a derivative. x (..., K), weight (N, K) -> (..., N)."""
    if not by_onednn(x, weight):
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def by_onednn(x, weight):
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32
    return not plain and not torch.compiler.is_compiling() and not is_intel() and torch.backends.mkldnn.is_available() and x.numel() > 0


@cache
def is_intel():
    about = Path("/proc/cpuinfo")
    return about.is_file() and "GenuineIntel" in about.read_text()


def outer(dy, x):
    """dy^T x: the gradient of W. dy (M, N), x (M, K) -> (N, K). oneDNN copies its first argument when it is transposed, so that is the narrower one."""
    if x.shape[1] < dy.shape[1] and by_onednn(x, dy):
        return product(x.t(), dy.t()).t().contiguous()
    return product(dy.t(), x.t())


class Product(torch.autograd.Function):
    """y = x W^T, with dx = dy W and dW = dy^T x by the same product."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy, dx, dw = dy.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            dx = product(dy, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = outer(dy, x.flatten(0, -2))
        return dx, dw


def linear(x, weight):
    """x W^T. x (..., K), weight (N, K) -> (..., N)."""
    if torch.is_autocast_enabled("cpu") or not by_onednn(x, weight):
        return F.linear(x, weight)
    return Product.apply(x, weight)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight)


def packed(weight):
    """x -> x W^T for a weight that does not change, kept once more in oneDNN's own layout. Each row's result does not depend on how many there are."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], "")
