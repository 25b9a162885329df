"""The norms of the families: LayerNorm without bias (Cohere), and RMSNorm with a weight of w or of 1 + w."""

import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.Module):
    """LayerNorm without bias, in fp32 inside.

    The weight is (D,), or (H, D) for the optional query-key norm, which nn.LayerNorm cannot have: it would
    normalise over both dimensions.
    """

    def __init__(self, shape, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x):
        if self.weight.dim() == 1:
            return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), None, self.eps).to(x.dtype)
        return (F.layer_norm(x.float(), x.shape[-1:], None, None, self.eps) * self.weight.float()).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, times w (rms), or times 1 + w before the cast (rms + 1). The weight is (D,)."""

    def __init__(self, shape, eps, plus=0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((shape,), 1.0 - plus))
        self.eps, self.plus = eps, plus

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps, self.plus)


def rms_norm(x, weight, eps, plus=0):
    y = F.rms_norm(x.float(), x.shape[-1:], None, eps)
    return (y * (1 + weight.float())).to(x.dtype) if plus else y.to(x.dtype) * weight.to(x.dtype)


def norm_of(config, shape):
    """A norm of the config's family, over the last dimension."""
    if config.family.norm == "layer":
        return LayerNorm(shape, config.norm_eps)
    return RMSNorm(shape, config.norm_eps, int(config.family.norm == "rms + 1"))
