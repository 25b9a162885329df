"""Packing: a micro-batch as one line of tokens, without its padding and with shared prefixes once."""

import torch
import torch.nn.functional as F


class Line:
    """A micro-batch without its padding: the tokens of all rows one after the other, (N,).

        rows, B = 3, T = 5           the line, N = 10
        p p p a b                    p p p a b  c d  q q e
        p p p c d                    the prompt p of the second row is that of the first: computed once
        q q e - -                    padding (-) is not computed

    Only attention sees the tokens as rows, so each token attends within its own row; positions are counted
    within each row.

    lengths (B,): of right-padded rows of `num_tokens` tokens. repeats (2, B): see data.Batch.
    torch's nested tensors hold rows without padding too, but cannot share a prefix.
    """

    def __init__(self, lengths, num_tokens, repeats=None):
        positions = torch.arange(num_tokens, device=lengths.device)
        is_token = positions < lengths[:, None]                             # (B, T)
        is_own = is_token
        if repeats is not None:
            is_own = is_token & (positions >= repeats[1][:, None])
        self.shape, self.lengths = (len(lengths), num_tokens), lengths
        self.has_repeats = repeats is not None
        self.own = is_own.flatten().nonzero()[:, 0]                         # (N,) index in the flattened rows
        self.positions = self.own % num_tokens
        if self.has_repeats:
            indices = torch.arange(len(self.own), device=lengths.device)
            at = torch.zeros_like(is_token, dtype=torch.long).masked_scatter(is_own, indices)
            self.at = torch.where(is_own, at, at[repeats[0]])               # (B, T) index in the line
            # M tokens of all rows, repeated prefixes included.
            self.rows = self.at[is_token]                                   # (M,) index in the line
            self.is_first = is_own[is_token]                                # (M,) True once for each of the N

    def unpack(self, x):
        """(N, ...) -> (B, T, ...). The values in the padding have no meaning."""
        if self.has_repeats:
            return x.index_select(0, self.at.flatten()).unflatten(0, self.shape)
        rows = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return rows.index_copy(0, self.own, x).unflatten(0, self.shape)

    def pack(self, x):
        """(B, T, ...) -> (N, ...)"""
        # The backward of x[rows, positions] takes four times as long on a CPU.
        return x.flatten(0, 1).index_select(0, self.own)

    def attend(self, q, k, v, window, scale=None):
        """torch's variable-length attention, which exists on GPUs in half precision only.

        q (N, H, D), k and v (N, K, D) -> (N, H, D).
        """
        from torch.nn.attention.varlen import varlen_attn
        ends = F.pad(self.lengths.cumsum(0), (1, 0)).int()                  # (B + 1,) borders of the rows
        longest = self.shape[1]
        if self.has_repeats:
            q, k, v = q[self.rows], k[self.rows], v[self.rows]              # (M, H or K, D)
        before = window - 1 if window else -1                               # keys before the query, -1: all
        y = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(before, 0),
                        scale=scale, enable_gqa=k.shape[1] != q.shape[1])
        return y[self.is_first] if self.has_repeats else y

    def times(self):
        """How many rows each token of the line stands in: (N,) in fp32, or None where each stands in one."""
        if not self.has_repeats:
            return None
        ones = torch.ones(len(self.rows), device=self.rows.device)
        return torch.zeros(len(self.own), device=self.rows.device).index_add_(0, self.rows, ones)
