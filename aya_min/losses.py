"""Losses: first the papers' equations as pure tensor functions, then what each stage minimises.

An equation gives one value per token, pair or completion, never a mean. A stage's loss adds them up:
(model, batch) -> (sum over the batch's units, {name: (2, languages) sums and counts}), and the loop divides
once. Log-probs are natural logarithms (nats), computed in fp32.
DPO: arXiv 2305.18290 eq. 7.  Bradley-Terry: eq. 2 there.  RLOO: arXiv 2402.14740, section 2.
"""

import torch
import torch.nn.functional as F

from .linear import outer, product


# The largest number of logits in a chunk: 0.5 GB in fp32.
CHUNK_LOGITS = 2 ** 27


class TokenLogps(torch.autograd.Function):
    """log p(target), chunk by chunk, computed in place in a chunk's logits z. With log_z = log sum_v exp z_v:

        log p = z_target - log_z        d log p / d z = onehot(target) - softmax(z)

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
    def exponentials(hidden, weight, targets):
        """exp(z - max z) (n, V) in fp32, its sums (n, 1) and log p(target) (n,) of a chunk of n rows."""
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
            # Free this chunk before the next one is allocated.
            del exps
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
            exps, sums = ctx.only or TokenLogps.exponentials(h, cast, t)[:2]
            dz = exps.mul_(-g[:, None] / sums)                              # (n, V)
            dz.scatter_add_(1, t[:, None], g[:, None])
            dz = dz.to(ctx.dtype)
            d_hidden.append(product(dz, cast.t()))
            part = outer(dz, h)
            d_weight = part if d_weight is None else d_weight.add_(part)
        ctx.only = None
        d_hidden = torch.cat(d_hidden).mul_(ctx.scale).to(hidden.dtype)
        return d_hidden, d_weight.to(weight.dtype), None, None, None


def token_logps(hidden, weight, targets, logit_scale=1.0, chunk_size=None):
    """log p(target) at each position. At most `chunk_size` rows of logits are in memory at a time, in the
    backward too (default: as many rows as CHUNK_LOGITS allows).

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
    return TokenLogps.apply(hidden, weight, targets, logit_scale, rows)[:N].clone()


def sum_by_row(values, mask):
    """Sums over each row's masked positions. values (N,) in the order of mask (B, T).nonzero() -> (B,)."""
    rows = mask.nonzero()[:, 0]                                             # (N,)
    return values.new_zeros(len(mask)).index_add(0, rows, values)


def dpo_loss(policy_logps, ref_logps, beta):
    """DPO, eq. 7 of arXiv 2305.18290. Log-probs are sums over response tokens, in nats.

    policy_logps, ref_logps: (2, B), row 0 chosen, row 1 rejected.
    Returns the losses (B,) and the implicit rewards beta * log(pi / ref), (2, B), detached, for logging.
    """
    rewards = beta * (policy_logps - ref_logps)                             # (2, B)
    return -F.logsigmoid(rewards[0] - rewards[1]), rewards.detach()


def bradley_terry_loss(chosen_scores, rejected_scores):
    """-log sigmoid(r_chosen - r_rejected): the negative log-likelihood that the chosen answer wins.

    (B,), (B,) -> (B,)
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)


def rloo_advantages(rewards):
    """REINFORCE leave-one-out (arXiv 2402.14740): each reward minus the mean of its k - 1 siblings'.

    (P, k) -> (P, k); ValueError for k < 2.
    """
    num_prompts, k = rewards.shape
    if k < 2:
        raise ValueError(f"RLOO needs at least 2 samples a prompt for its baseline, got {k}")
    baseline = (rewards.sum(1, keepdim=True) - rewards) / (k - 1)
    return rewards - baseline


def kl_shaped_rewards(rewards, policy_logps, ref_logps, beta):
    """R(x, y) = r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)), with the whole completion as one action
    (arXiv 2402.14740). All arguments have the same shape; log-probs are sums over the completion."""
    return rewards - beta * (policy_logps - ref_logps)


# ---- what each stage minimises -----------------------------------------------------------------------------

def by_language(batch, sums, counts):
    """Sums and counts by language, (2, slots), of one value per row or per pair. The language of a pair is
    that of its chosen answer; the chosen answers are the batch's first rows."""
    dtype = torch.float64 if sums.device.type == "cpu" else torch.float32
    out = torch.zeros(2, len(batch.slots), dtype=dtype, device=sums.device)
    languages = batch.languages[:len(sums)]
    out[0].index_add_(0, languages, sums.detach().to(out.dtype))
    out[1].index_add_(0, languages, counts.to(out.dtype))
    return out


def supervised_logps(model, batch):
    """log p of each supervised token of a batch: (N,) nats, in the order of batch.mask.nonzero()."""
    return model(batch.input_ids, batch.mask, batch.lengths, batch.repeats)


def sft_loss(model, batch):
    """Next-token negative log-likelihood of the supervised tokens. Pretraining minimises it too."""
    logps = supervised_logps(model, batch)                                  # (N,)
    nll, tokens = sum_by_row(-logps, batch.mask), batch.mask.sum(1)         # (B,)
    return -logps.sum(), {"loss": by_language(batch, nll, tokens)}


def reward_loss(lm_weight):
    """Bradley-Terry on pairs, plus lm_weight times the chosen answer's mean next-token loss in nats."""
    def loss_fn(model, batch):
        P = batch.count
        scores, logps = model(batch.input_ids, batch.lengths, batch.mask, batch.repeats)
        nll = sum_by_row(-logps, batch.mask)[:P] / batch.mask.sum(1)[:P]    # (P,) of the chosen answers
        chosen, rejected = scores[:P], scores[P:]
        bt = bradley_terry_loss(chosen, rejected)                           # (P,)
        losses = bt + lm_weight * nll
        log = {"loss": losses, "bt_loss": bt, "lm_loss": nll, "accuracy": (chosen > rejected).float(),
               "margin": chosen - rejected, "mean_reward": (chosen + rejected) / 2}
        return losses.sum(), means_by_language(batch, log)
    return loss_fn


def preference_loss(beta, nll_weight):
    """DPO on pairs with stored reference log-probs + nll_weight times the chosen answer's nats per token."""
    def loss_fn(model, batch):
        P, tokens = batch.count, batch.mask.sum(1)
        logps = sum_by_row(supervised_logps(model, batch), batch.mask).view(2, P)       # (2, P) nats
        dpo, rewards = dpo_loss(logps, batch.ref_logps, beta)
        losses = dpo + nll_weight * (-logps[0] / tokens[:P])                            # (P,)
        log = {"loss": losses, "rewards/accuracies": (rewards[0] > rewards[1]).float(),
               "rewards/margins": rewards[0] - rewards[1], "rewards/chosen": rewards[0],
               "rewards/rejected": rewards[1], "logps/chosen": logps[0], "logps/rejected": logps[1],
               "dpo_loss": dpo}
        return losses.sum(), means_by_language(batch, log)
    return loss_fn


def policy_gradient_loss(model, batch):
    """REINFORCE with given advantages: -A * log pi(completion), per completion (arXiv 2402.14740)."""
    logps = sum_by_row(supervised_logps(model, batch), batch.mask)          # (B,)
    # kl and entropy are estimates from the samples, in nats per completion.
    log = {"reward": batch.rewards, "kl": logps - batch.ref_logps, "entropy": -logps}
    if batch.cut is not None:
        log["cut"] = batch.cut
    return (-batch.advantages * logps).sum(), means_by_language(batch, log)


def means_by_language(batch, values):
    """{name: (2, slots) sums and counts} from {name: one value per pair or completion}."""
    return {name: by_language(batch, each, torch.ones_like(each)) for name, each in values.items()}
