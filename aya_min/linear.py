"""x W^T and its two gradients. On a CPU in fp32 torch has two libraries for them: its default (MKL on x86)
and oneDNN.

Which one is faster depends on the processor: on one kind oneDNN took two fifths of MKL's time, on others
MKL is faster by a tenth to two fifths (LOG.md). Neither the vendor nor AVX-512 decides it, so both are
raced once in a process, at its first product. Everywhere else (GPUs, half precision, torch.compile) this is
F.linear.

The two round differently. A run is therefore the same to the last bit only under one choice: a stage
records chosen() in its config.json, a resume and the other ranks take that one by choose(). Two commands on
one machine choose alike unless both libraries are within a few hundredths of LEAD there.
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

LIBRARIES = ("default", "onednn")
# oneDNN is chosen when it takes less than this share of the default's time.
LEAD = 0.9
# Rows, in, out: the MLPs of models of 1M and 6M parameters, and a head.
RACES = [(512, 96, 256), (512, 256, 768), (64, 96, 6144)]
ROUNDS = 4
# The one state of this module: every layer asks for it, and within a run it must not change.
_chosen = None


def choose(library):
    """Take this library from here on: what chosen() was in an earlier process, or on rank 0."""
    global _chosen
    if library not in LIBRARIES:
        raise ValueError(f"matrix products by {library!r:.80} are not known; known: {' '.join(LIBRARIES)}")
    _chosen = library
    # To set the number of threads, as race() does, also tells MKL to use them all for small products too.
    torch.set_num_threads(torch.get_num_threads())


def chosen():
    """The library of this process's products. The first call races both, in a tenth of a second."""
    if _chosen is None:
        seconds = race() if torch.backends.mkldnn.is_available() else dict.fromkeys(LIBRARIES, 0.0)
        choose("onednn" if seconds["onednn"] < LEAD * seconds["default"] else "default")
    return _chosen


@torch.no_grad()
def race():
    """{library: seconds} of forward and backward of all RACES, each product at its fastest of ROUNDS.

    One thread and the fastest time, because other processes can then hardly change the result. Draws no
    random numbers.
    """
    products = {"default": (F.linear, outer_by_default), "onednn": (by_onednn, outer_by_onednn)}
    seconds = dict.fromkeys(LIBRARIES, 0.0)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fastest = {}
        for _ in range(ROUNDS):                 # the products in turn, so that a burst hits no whole product
            for M, K, N in RACES:
                shapes = (M, K), (N, K), (M, N)
                x, weight, dy = (torch.ones(shape, device="cpu", dtype=torch.float32) for shape in shapes)
                for which, *arguments in ((0, x, weight), (0, dy, weight.t()), (1, dy, x)):
                    for library in LIBRARIES:
                        start = time.perf_counter()
                        products[library][which](*arguments)
                        took = time.perf_counter() - start
                        key = library, which, *(tuple(each.shape) for each in arguments)
                        fastest[key] = min(fastest.get(key, took), took)
        for (library, *_), took in fastest.items():
            seconds[library] += took
    finally:
        torch.set_num_threads(num_threads)
    return seconds


def by_onednn(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def outer_by_default(dy, x):
    return F.linear(dy.t(), x.t())


def outer_by_onednn(dy, x):
    """oneDNN copies its first argument when it is transposed, so that is the narrower one."""
    if x.shape[1] < dy.shape[1]:
        return by_onednn(x.t(), dy.t()).t().contiguous()
    return by_onednn(dy.t(), x.t())


def is_onednn(x, weight):
    """Whether oneDNN computes this product. The dry run's fake tensors start no race."""
    if type(x) is not torch.Tensor or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return x.dtype == weight.dtype == torch.float32 and x.numel() > 0 and chosen() == "onednn"


def product(x, weight):
    """x W^T without a derivative. x (..., K), weight (N, K) -> (..., N)."""
    return by_onednn(x, weight) if is_onednn(x, weight) else F.linear(x, weight)


def outer(dy, x):
    """dy^T x: the gradient of W. dy (M, N), x (M, K) -> (N, K)."""
    return outer_by_onednn(dy, x) if is_onednn(dy, x) else outer_by_default(dy, x)


class Product(torch.autograd.Function):
    """y = x W^T, with dx = dy W and dW = dy^T x by the same library."""

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
    if torch.is_autocast_enabled("cpu") or not is_onednn(x, weight):
        return F.linear(x, weight)
    return Product.apply(x, weight)


class Linear(nn.Linear):
    def forward(self, x):
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def grouped(x, weight, ends):
    """Each group of rows times its own matrix, without a derivative. x (M, K), weight (E, K, N), ends (E,) ->
    (M, N). The dry run's fake tensors have no groups, and torch's own have no fake kernel in fp32."""
    if type(x) is not torch.Tensor:
        return x.new_empty(len(x), weight.shape[2])
    if not is_onednn(x, weight):
        return F.grouped_mm(x, weight, offs=ends)
    return torch.cat([by_onednn(part, own.t()) for part, own in zip(split(x, ends), weight)])


def split(x, ends):
    return x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())


class GroupedProduct(torch.autograd.Function):
    """grouped_linear and its derivatives by the same library."""

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, weight, ends)
        return grouped(x, weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx, dy):
        x, weight, ends = ctx.saved_tensors
        dy = dy.contiguous()
        if type(x) is not torch.Tensor:
            dw = torch.empty_like(weight)
        elif is_onednn(x, weight):
            dw = torch.stack([outer(*both) for both in zip(split(dy, ends), split(x, ends))])
        else:
            dw = F.grouped_mm(dy.t(), x, offs=ends)
        return grouped(dy, weight, ends), dw, None


def grouped_linear(x, weight, ends):
    """Each group of rows times the transpose of its own matrix.

    x (M, K), the rows of the first group first; weight (E, N, K); ends (E,) int32, where each group ends ->
    (M, N).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):       # which does not know grouped_mm
        x, weight = (each.to(torch.get_autocast_dtype(device)) for each in (x, weight))
    if torch.compiler.is_compiling():
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return GroupedProduct.apply(x, weight, ends)


def packed(weight, bias=None):
    """x -> x W^T + bias for a weight that does not change, kept once more in oneDNN's own layout.

    Decoding uses it whatever is chosen(): each row's result does not depend on how many rows there are.
    """
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    multiply = torch.ops.mkldnn._linear_pointwise.default       # found once, not at each call
    return lambda x: multiply(x, blocked, bias, "none", [], "")
