"""Dropout of attention probabilities and of what a block adds to the residual stream, for the study of
training that quantizes well (arXiv 2305.19268, which varies both). Embeddings are not dropped.

The masks are no draws of a generator: a mask is a hash of the seed, the step, the layer and the text up to
and including the token. So a step has the same masks however it is cut into micro-batches or ranks, packed or
not, recomputed in the backward or resumed, on a CPU and on a GPU, and nothing about them needs a state.

Departure: two texts of one step share their masks as far as they begin alike (a pair's prompt, the tokens of
a template before a prompt), and a text that a batch holds twice has them twice. Each value is still dropped
with the given probability, anew in every step.
B batch, T tokens, N tokens of a packed line, H heads, K key-value heads, h hidden_size.
"""

import hashlib
from typing import NamedTuple

import torch

# Odd numbers whose multiples are spread over 32 bits, as int32: 2^32 / golden ratio, and the two factors of
# lowbias32 (nullprogram.com/blog/2018/07/31).
SPREAD, FIRST, SECOND = 0x9E3779B9 - (1 << 32), 0x7FEB352D, 0x846CA68B - (1 << 32)


def mixed(x):
    """lowbias32, a hash of 32 bits to 32 bits, of each element of an int32 tensor, whose products wrap. The
    masks make the shifts of negative numbers unsigned ones."""
    x = (x ^ (x >> 16 & 0xFFFF)) * FIRST
    x = (x ^ (x >> 15 & 0x1FFFF)) * SECOND
    return x ^ (x >> 16 & 0xFFFF)


def numbers(count, device):
    """0, SPREAD, 2 SPREAD, ... as int32."""
    return torch.arange(count, device=device, dtype=torch.int32) * SPREAD


def keep_mask(keys, width, rate):
    """Which of `width` values are kept at each key: each is dropped with probability `rate`. keys (...) int32
    -> bool (..., width)"""
    drawn = mixed(keys[..., None] + numbers(width, keys.device))            # even over [-2^31, 2^31)
    return drawn >= int(rate * 2 ** 32) - 2 ** 31


class Dropout(NamedTuple):
    """The two rates, and the key of each token: (B, T), or (N,) of a line, int32; None until the text is
    known."""
    attention: float
    residual: float
    seed: int
    keys: torch.Tensor = None

    def of_text(self, input_ids):
        """With the key of each token (B, T): of the seed and the ids up to the token."""
        ids = mixed(input_ids.int() + numbers(input_ids.shape[1], input_ids.device))
        return self._replace(keys=mixed(ids.cumsum(1, dtype=torch.int64).int() ^ self.seed))

    def of_layer(self, number):
        return self._replace(keys=mixed(self.keys + number))

    def packed(self, line):
        return self._replace(keys=line.pack(self.keys))

    def unpacked(self, line):
        return self._replace(keys=line.unpack(self.keys))


def of_step(settings, step):
    """The Dropout of one step, None without dropout."""
    if not (settings.attention_dropout or settings.residual_dropout):
        return None
    digest = hashlib.sha256(f"{settings.seed} {step}".encode()).digest()
    return Dropout(settings.attention_dropout, settings.residual_dropout,
                   int.from_bytes(digest[:4], "little", signed=True))


def dropped(y, dropout, place):
    """What a block adds to the residual stream, (..., h), with a share of its values 0 and the others scaled
    up. place: 1 attention, 2 MLP. Without dropout y itself."""
    if dropout is None or not dropout.residual:
        return y
    keep = keep_mask(mixed(dropout.keys + place), y.shape[-1], dropout.residual)
    return torch.where(keep, y, 0) * (1 / (1 - dropout.residual))


def dropped_attention(probs, dropout):
    """Attention probabilities (B, K, H/K, T, T), those of a query last, with a share of them 0 and the others
    scaled up. dropout: with keys (B, T)."""
    if dropout is None or not dropout.attention:
        return probs
    K, per_key, T = probs.shape[1:4]
    of_heads = mixed(dropout.keys[:, None] + numbers(K * per_key, probs.device)[:, None])   # (B, H, T)
    keep = keep_mask(of_heads, T, dropout.attention).unflatten(1, (K, per_key))
    return torch.where(keep, probs, 0) * (1 / (1 - dropout.attention))
