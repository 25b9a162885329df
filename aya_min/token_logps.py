"""Log-probs of given tokens without a tensor of all logits: the head's product and the log-softmax of the
vocabulary, chunk by chunk, with their backward. Every loss reads its log-probs from here, by way of
model.CohereForCausalLM.forward.
"""

import torch
import torch.nn.functional as F

from .linear import outer, product

# The largest number of logits in a chunk: 0.5 GB in fp32.
CHUNK_LOGITS = 2 ** 27


def capped(logits, cap):
    """cap tanh(logits / cap), or the logits where cap is None."""
    return torch.tanh(logits / cap) * cap if cap else logits


class TokenLogps(torch.autograd.Function):
    """log p(target), chunk by chunk, computed in place in a chunk's logits z. With log_z = log sum_v exp z_v:

        log p = z_target - log_z        d log p / d z = onehot(target) - softmax(z)

    With a soft cap c, z = c tanh(y / c) of the product y, and d log p / d y has the slope 1 - (z / c)^2 more.

    A single chunk keeps its exp(z) for the backward. Several chunks recompute theirs in the backward, so that
    only one is in memory at a time.

    torch 2.13 has F.linear_cross_entropy; torch 2.11, which must work too, has not. Forward and backward of
    N x D x V in fp32, in turn on two Xeon cores that other jobs shared: the fastest of 15 runs, and the peak
    memory above the inputs.
                                    2048 x 96 x 6144      512 x 4096 x 32000
        TokenLogps                  0.17 s,  87 MB        3.8 s,  754 MB
        torch's, whole logits       0.22 s, 163 MB        4.4 s,  680 MB
        torch's, in chunks          0.43 s,  89 MB        6.8 s, 1112 MB
    """

    @staticmethod
    def exponentials(hidden, weight, targets, cap):
        """exp(z - max z) (n, V) in fp32, its sums (n, 1), the cap's slope (n, V) or None, and log p(target)
        (n,) of a chunk of n rows."""
        z, slope = product(hidden, weight).float(), None
        if cap:
            z = torch.tanh(z / cap)
            slope = 1 - z.square()
            z *= cap
        top = z.amax(-1, keepdim=True)
        chosen = z.gather(1, targets[:, None]) - top
        sums = z.sub_(top).exp_().sum(-1, keepdim=True)
        return z, sums, slope, (chosen - sums.log())[:, 0]

    @staticmethod
    def forward(ctx, hidden, weight, targets, logit_scale, rows, cap):
        device, dtype = hidden.device.type, weight.dtype
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        ctx.scale, ctx.rows, ctx.cap = logit_scale, rows, cap
        ctx.only, logps = None, []
        scaled, cast = (hidden * logit_scale).to(ctx.dtype), weight.to(ctx.dtype)
        for h, t in zip(scaled.split(rows), targets.split(rows)):
            *computed, part = TokenLogps.exponentials(h, cast, t, cap)
            ctx.only = computed if len(hidden) <= rows else None
            # Free this chunk before the next one is allocated.
            del computed
            logps.append(part)
        ctx.save_for_backward(hidden, weight, targets)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, targets = ctx.saved_tensors
        scaled, cast = (hidden * ctx.scale).to(ctx.dtype), weight.to(ctx.dtype)
        d_hidden, d_weight = [], None
        if len(hidden) > ctx.rows:
            # Several chunks are added up in fp32.
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for h, t, g in zip(scaled.split(ctx.rows), targets.split(ctx.rows), gradient.split(ctx.rows)):
            exps, sums, slope = ctx.only or TokenLogps.exponentials(h, cast, t, ctx.cap)[:3]
            dz = exps.mul_(-g[:, None] / sums)                              # (n, V)
            dz.scatter_add_(1, t[:, None], g[:, None])
            dz = (dz if slope is None else dz.mul_(slope)).to(ctx.dtype)
            d_hidden.append(product(dz, cast.t()))
            part = outer(dz, h)
            d_weight = part if d_weight is None else d_weight.add_(part)
        ctx.only = None
        d_hidden = torch.cat(d_hidden).mul_(ctx.scale).to(hidden.dtype)
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None


def token_logps(hidden, weight, targets, logit_scale=1.0, chunk_size=None, cap=None):
    """log p(target) at each position. At most `chunk_size` rows of logits are in memory at a time, in the
    backward too (default: as many rows as CHUNK_LOGITS allows). cap: of the logits (Gemma), see `capped`.

    hidden (N, D), weight (V, D), targets (N,) -> (N,) nats.

    Known gap: in bf16 the product rounds each logit before it becomes fp32, as in transformers. Where the
    target's logit is near 11 this was measured as 0.010 nats per token on average and 0.028 at most.
    torch.mm(out_dtype=torch.float32) would not round, but has no CPU kernel in torch 2.13.
    """
    N, V = len(hidden), len(weight)
    # Few different shapes, because matmul libraries keep code for each.
    hidden, targets = F.pad(hidden, (0, 0, 0, -N % 128)), F.pad(targets, (0, -N % 128))
    rows = chunk_size or max(128, CHUNK_LOGITS // V // 128 * 128)
    # FSDP warns when an output is a view.
    return TokenLogps.apply(hidden, weight, targets, logit_scale, rows, cap)[:N].clone()


def sum_by_row(values, mask):
    """Sums over each row's masked positions. values (N,) in the order of mask (B, T).nonzero() -> (B,)."""
    rows = mask.nonzero()[:, 0]                                             # (N,)
    return values.new_zeros(len(mask)).index_add(0, rows, values)
