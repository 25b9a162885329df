"""Losses: first the papers' equations as pure tensor functions, then what each stage minimises.

An equation gives one value per token, pair or completion, never a mean. A stage's loss adds them up:
(model, batch) -> (sum over the batch's units, {name: (2, languages) sums and counts}), and the loop divides
once. Log-probs are natural logarithms (nats), computed in fp32.
DPO: arXiv 2305.18290 eq. 7.  Bradley-Terry: eq. 2 there.  RLOO: arXiv 2402.14740, section 2.
Router: arXiv 2408.14960, learned routing.
"""

import torch
import torch.nn.functional as F

from .token_logps import sum_by_row


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


def router_targets(rewards, tau):
    """softmax(rewards / tau) over the teachers: what a router shall predict (arXiv 2408.14960, which gives
    neither tau nor the construction). -inf stands for no usable answer and gets probability 0.

    (B, M) -> (B, M). tau to 0: all on the best teacher; tau to infinity: uniform over those with an answer.
    """
    return torch.softmax(rewards / tau, -1)


def router_kl(targets, logps):
    """KL(target || router) = sum over teachers of t (log t - log p), in nats; a teacher with t = 0 adds 0.

    targets, logps: (B, M) -> (B,)
    """
    return (torch.xlogy(targets, targets) - targets * logps).sum(-1)


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
    log = {"reward": batch.rewards, "kl": logps - batch.ref_logps, "entropy": -logps, "cut": batch.cut}
    return (-batch.advantages * logps).sum(), means_by_language(batch, log)


def router_loss(tau):
    """KL of a router's choice among teachers from softmax(rewards / tau). Beside it stands what the choice
    is worth: how often the likeliest teacher is that of the best reward, its reward, and what that is short
    of the best. A choice without a usable answer has no reward (it counts in `answered` alone)."""
    def loss_fn(model, batch):
        logps = model(batch.input_ids, batch.lengths, batch.repeats)        # (B, M)
        losses = router_kl(router_targets(batch.rewards, tau), logps)       # (B,)
        reward = batch.rewards.gather(1, logps.argmax(1, keepdim=True))[:, 0]
        best, answered = batch.rewards.amax(1), reward.isfinite()
        reward = reward.where(answered, 0)
        log = {"loss": losses, "agreement": (answered & (reward == best)).float(),
               "answered": answered.float()}
        of_answered = {"reward": reward, "regret": (best - reward).where(answered, 0)}
        return losses.sum(), means_by_language(batch, log) | {
            name: by_language(batch, values, answered) for name, values in of_answered.items()}
    return loss_fn


def means_by_language(batch, values):
    """{name: (2, slots) sums and counts} from {name: one value per pair or completion}."""
    return {name: by_language(batch, each, torch.ones_like(each)) for name, each in values.items()}
