"""Losses as pure tensor functions: one value per token, pair or completion, never a mean; the stages sum, the loop divides once.

Log-probs are in nats, of natural logarithms, and computed in fp32.
DPO: arXiv 2305.18290 eq. 7.  Bradley-Terry: eq. 2 there.  RLOO: arXiv 2402.14740, section 2.
"""

import torch
import torch.nn.functional as F

from .linear import outer, product


LOGITS = 2 ** 27            # numbers that a chunk may have


class TokenLogps(torch.autograd.Function):
    """log p(target) chunk by chunk, every step on a chunk's logits in place: with log_z = log sum_v exp z_v,

        log p = z_target - log_z        d log p / d z = onehot(target) - softmax(z)

    One chunk keeps its exp(z) for the backward; several are computed again there, so that one is held at a time. torch 2.13 has
    F.linear_cross_entropy, which 2.11 lacks.
    """

    @staticmethod
    def exponentials(hidden, weight, targets):
        """exp(z - max z) (n, V) in fp32, its sums (n, 1) and log p(target) (n,) of a chunk."""
        z = product(hidden, weight).float()
        top = z.amax(-1, keepdim=True)
        chosen = z.gather(1, targets[:, None]) - top
        sums = z.sub_(top).exp_().sum(-1, keepdim=True)
        return z, sums, (chosen - sums.log())[:, 0]

    @staticmethod
    def forward(ctx, hidden, weight, targets, logit_scale, rows):
        device, dtype = hidden.device.type, weight.dtype
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        ctx.scale, ctx.rows = logit_scale, rows
        ctx.only, logps = None, []
        scaled, cast = (hidden * logit_scale).to(ctx.dtype), weight.to(ctx.dtype)
        for h, t in zip(scaled.split(rows), targets.split(rows)):
            exps, sums, part = TokenLogps.exponentials(h, cast, t)
            ctx.only = (exps, sums) if len(hidden) <= rows else None
            del exps                                                    # before the next chunk is made
            logps.append(part)
        ctx.save_for_backward(hidden, weight, targets)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, targets = ctx.saved_tensors
        scaled, cast = (hidden * ctx.scale).to(ctx.dtype), weight.to(ctx.dtype)
        d_hidden, d_weight = [], torch.zeros_like(weight, dtype=torch.float32) if len(hidden) > ctx.rows else None
        for h, t, g in zip(scaled.split(ctx.rows), targets.split(ctx.rows), gradient.split(ctx.rows)):
            exps, sums = ctx.only or TokenLogps.exponentials(h, cast, t)[:2]
            dz = exps.mul_(-g[:, None] / sums)
            dz.scatter_add_(1, t[:, None], g[:, None])
            dz = dz.to(ctx.dtype)
            d_hidden.append(product(dz, cast.t()))
            part = outer(dz, h)
            d_weight = part if d_weight is None else d_weight.add_(part)
        ctx.only = None
        return torch.cat(d_hidden).mul_(ctx.scale).to(hidden.dtype), d_weight.to(weight.dtype), None, None, None


def token_logps(hidden, weight, targets, logit_scale=1.0, chunk_size=None):
    """log p(target) of each position, without ever holding more than `chunk_size` rows of logits, in backward too (default: as many rows as make 0.5 GB in fp32).

    hidden (N, D), weight (V, D), targets (N,) -> (N,) nats.

    Known gap: in bf16 the matmul rounds each logit before it becomes fp32, as in transformers. Measured where the target's logit is near 11: 0.010
    nats a token on average, 0.028 at most. torch.mm(out_dtype=torch.float32) would not round, but has no CPU kernel in torch 2.13.
    """
    N = len(hidden)
    hidden, targets = F.pad(hidden, (0, 0, 0, -N % 128)), F.pad(targets, (0, -N % 128))            # few shapes: matmul libraries keep code for each
    return TokenLogps.apply(hidden, weight, targets, logit_scale, chunk_size or max(128, LOGITS // len(weight) // 128 * 128))[:N].clone()       # a view would have FSDP warn


def sum_by_row(values, mask):
    """Sums of per-token values over each row's masked positions. values (N,) in the order of mask (B, T).nonzero() -> (B,)."""
    rows = mask.nonzero()[:, 0]                                                                    # (N,)
    return values.new_zeros(len(mask)).index_add(0, rows, values)


def dpo_loss(policy_logps, ref_logps, beta):
    """DPO, eq. 7 of arXiv 2305.18290. Log-probs are sums over response tokens.

    policy_logps, ref_logps: (2, B), row 0 chosen, row 1 rejected.
    Returns the per-pair losses (B,) and the implicit rewards beta * log(pi / ref), (2, B), detached, for logging.
    """
    rewards = beta * (policy_logps - ref_logps)                                                    # (2, B)
    return -F.logsigmoid(rewards[0] - rewards[1]), rewards.detach()


def bradley_terry_loss(chosen_scores, rejected_scores):
    """Per-pair negative log-likelihood that the chosen answer wins, -log sigmoid(r_chosen - r_rejected). (B,), (B,) -> (B,)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def rloo_advantages(rewards):
    """REINFORCE leave-one-out (arXiv 2402.14740): each sample against the mean of its k-1 siblings. (P, k) -> (P, k)."""
    num_prompts, k = rewards.shape
    if k < 2:
        raise ValueError(f"RLOO needs at least 2 samples a prompt for its baseline, got {k}")
    baseline = (rewards.sum(1, keepdim=True) - rewards) / (k - 1)
    return rewards - baseline


def kl_shaped_rewards(rewards, policy_logps, ref_logps, beta):
    """R(x, y) = r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)), the whole completion as one action (arXiv 2402.14740)."""
    return rewards - beta * (policy_logps - ref_logps)
