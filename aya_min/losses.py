"""Losses: first the papers' equations as pure tensor functions, then what each stage minimises.

An equation gives one value per token, pair or completion, never a mean. A stage's loss adds them up:
(model, batch) -> (sum over the batch's units, {name: (2, languages) sums and counts}), and the loop divides
once. Log-probs are natural logarithms (nats), computed in fp32.
From logits to loss: model.CohereForCausalLM.forward with a mask gives log p of each supervised token
(token_logps.py, without a tensor of all logits); `sum_by_row` adds them up for each answer; an equation below
makes the loss of each pair; loop.gradients divides the sum by the step's count. The reference's log-probs
were stored with the pairs before training (reference.py).

DPO: arXiv 2305.18290 eq. 7.  Bradley-Terry: eq. 2 there.  Policy gradients: arXiv 2402.14740, section 2.
IPO: arXiv 2310.12036.  SimPO: arXiv 2405.14734.  Hinge: arXiv 2305.10425, 2309.06657.  KTO: arXiv 2402.01306.
Router: arXiv 2408.14960, learned routing.  Mixtures of experts: arXiv 2408.08274.
"""

from functools import partial

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


def cdpo_loss(policy_logps, ref_logps, beta, label_smoothing):
    """Conservative DPO, eq. 3 of ericmitchell.ai/cdpo.pdf: a share `label_smoothing` of the pairs is taken to
    be labelled the wrong way round. It aims at a finite margin: log((1 - label_smoothing) / label_smoothing).

    Arguments and results are those of dpo_loss.
    """
    losses, rewards = dpo_loss(policy_logps, ref_logps, beta)
    flipped, _ = dpo_loss(policy_logps.flip(0), ref_logps.flip(0), beta)
    return (1 - label_smoothing) * losses + label_smoothing * flipped, rewards


def ipo_loss(policy_logps, ref_logps, beta):
    """IPO, eq. 17 of arXiv 2310.12036: (h - 1 / (2 beta))^2, where h is the difference of the log ratios and
    beta is the paper's tau. Least where h is 1 / (2 beta) nats: a margin that is reached, not exceeded.

    h is made of log pi(y|x), so of sums over tokens, as in the paper and in the code of DPO's authors. TRL
    (1.16) divides each log ratio by the answer's tokens, and says that the paper's authors confirmed it: that
    is --length-normalized. Arguments and results are those of dpo_loss.
    """
    ratios = policy_logps - ref_logps                                       # (2, B)
    return (ratios[0] - ratios[1] - 1 / (2 * beta)) ** 2, beta * ratios.detach()


def hinge_loss(policy_logps, ref_logps, beta):
    """max(0, 1 - margin): the hinge of SLiC-HF (arXiv 2305.10425) on DPO's margin, which arXiv 2309.06657
    calls hinge-norm and TRL computes. A pair with a margin of 1 or more is left alone.

    SLiC-HF itself has no reference in the hinge, and a next-token loss beside it (--nll-weight).
    Arguments and results are those of dpo_loss.
    """
    rewards = beta * (policy_logps - ref_logps)                             # (2, B)
    return F.relu(1 - (rewards[0] - rewards[1])), rewards.detach()


def simpo_loss(mean_logps, beta, gamma):
    """SimPO, eq. 6 of arXiv 2405.14734. mean_logps: (2, B) nats per token, row 0 chosen, row 1 rejected.

    Returns the losses (B,) and the rewards beta * mean log pi, (2, B), detached. TRL's simpo is the same.
    """
    rewards = beta * mean_logps
    return -F.logsigmoid(rewards[0] - rewards[1] - gamma), rewards.detach()


def kto_loss(policy_logps, ref_logps, labels, kl, beta, desirable_weight, undesirable_weight):
    """KTO, arXiv 2402.01306 section 4.1: lambda_y - v(x, y), with the log ratio r and z0 = max(0, kl):

        v = lambda_D sigmoid(beta (r - z0)) if y is wanted, lambda_U sigmoid(beta (z0 - r)) if not.

    policy_logps, ref_logps: (B,) sums over response tokens. labels: (B,) bool. kl: () nats, of the step.
    Returns the losses (B,) and, detached, the rewards beta * r (B,) and the values v / lambda_y (B,).
    """
    rewards = beta * (policy_logps - ref_logps)                             # (B,)
    sides = torch.where(labels, 1.0, -1.0)
    values = torch.sigmoid(sides * (rewards - beta * kl.clamp(min=0)))      # (B,)
    weights = torch.where(labels, desirable_weight, undesirable_weight)
    return weights * (1 - values), rewards.detach(), values.detach()


def bradley_terry_loss(chosen_scores, rejected_scores):
    """-log sigmoid(r_chosen - r_rejected): the negative log-likelihood that the chosen answer wins.

    (B,), (B,) -> (B,)
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)


# ---- policy gradients: "Back to Basics", arXiv 2402.14740 --------------------------------------------------

def kl_shaped_rewards(rewards, policy_logps, ref_logps, beta):
    """R(x, y) = r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)), with the whole completion as one action
    (arXiv 2402.14740). All arguments have the same shape; log-probs are sums over the completion."""
    return rewards - beta * (policy_logps - ref_logps)


def rloo_advantages(rewards, kept=None):
    """REINFORCE leave-one-out (arXiv 2402.14740): each reward minus the mean of its k - 1 siblings'.

    (P, k) -> (P, k); ValueError for k < 2. kept (P, k): 1.0 for the samples that count, by default all; the
    others, and one that is alone, have advantage 0.
    """
    num_prompts, k = rewards.shape
    if k < 2:
        raise ValueError(f"RLOO needs at least 2 samples a prompt for its baseline, got {k}")
    kept = torch.ones_like(rewards) if kept is None else kept
    num_kept = kept.sum(1, keepdim=True)
    baseline = ((rewards * kept).sum(1, keepdim=True) - rewards) / (num_kept - 1).clamp(min=1)
    return (rewards - baseline) * kept * (num_kept > 1)


def group_advantages(rewards, kept=None, normalize=False):
    """GRPO (arXiv 2402.03300, section 4.1.2): each reward minus the mean of its group, which is RLOO's
    advantage times (k - 1)/k. normalize: divided by the group's standard deviation, with k - 1 below the root
    and 1e-4 added, as TRL does.

    (P, k) -> (P, k); kept as in rloo_advantages.
    """
    kept = torch.ones_like(rewards) if kept is None else kept
    num_kept = kept.sum(1, keepdim=True)
    mean = (rewards * kept).sum(1, keepdim=True) / num_kept.clamp(min=1)
    advantages = (rewards - mean) * kept
    deviation = (advantages.square().sum(1, keepdim=True) / (num_kept - 1).clamp(min=1)).sqrt()
    return advantages / (deviation + 1e-4) if normalize else advantages


def raft_weights(rewards, kept=None):
    """RAFT (arXiv 2304.06767): 1 for the best of a prompt's k samples, 0 for the others. With these as
    advantages a policy gradient is the cross-entropy of the best. Of equal samples the first is the best.

    (P, k) -> (P, k); kept as in rloo_advantages, a prompt without a kept sample has no best.
    """
    kept = torch.ones_like(rewards) if kept is None else kept
    best = rewards.masked_fill(kept == 0, float("-inf")).argmax(1)                      # (P,)
    return F.one_hot(best, rewards.shape[1]) * kept


def moving_average_advantages(rewards, total, count):
    """REINFORCE with a moving-average baseline (arXiv 2402.14740): each reward minus b = total / count, the
    mean of the rewards of all batches before this one. In the first batch b is 0."""
    return rewards - total / max(count, 1)


def token_rewards(reward, logps, ref_logps, beta):
    """PPO's reward of each token of a completion (arXiv 2402.14740, on PPO): -beta * log(pi / pi_ref) of the
    token, and the reward model's score on top at the last one. logps, ref_logps (n,) -> (n,)"""
    rewards = -beta * (logps - ref_logps)
    rewards[-1] += reward
    return rewards


def gae(rewards, values, gae_lambda):
    """Generalised advantage estimation, eq. 16 of arXiv 1506.02438, with gamma 1:

        A_t = sum_l lambda^l delta_(t+l),    delta_t = r_t + V_(t+1) - V_t,    V after the last token = 0

    lambda 1: the rewards from t on, less V_t. lambda 0: delta_t. values: V_t is of the text before token t.
    rewards, values (n,) -> (n,)
    """
    advantages, after, next_value = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist()), strict=True):
        after = reward + next_value - value + gae_lambda * after
        next_value = value
        advantages.append(after)
    return torch.tensor(advantages[::-1], dtype=rewards.dtype)


def vanilla_pg_loss(logps, advantages):
    """The policy gradient theorem with tokens as actions: the gradient is that of -A_t log pi(y_t), the value
    is -A_t, which PPO's loss has at ratio 1. (N,), (N,) -> (N,)"""
    return -advantages * (logps - logps.detach()).exp()


def ppo_loss(logps, old_logps, advantages, clip=None):
    """PPO, eq. 7 of arXiv 1707.06347: -min(rho A, clamp(rho, 1 - clip, 1 + clip) A), where rho is the ratio
    of the policy to the one that sampled. clip None: the ratio is not clipped.

    (N,) each -> the losses (N,) and whether the clip binds (N,), so that the token has no gradient.
    """
    ratio = (logps - old_logps).exp()                                       # (N,)
    plain = -ratio * advantages
    if clip is None:
        return plain, torch.zeros_like(plain)
    clipped = -ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.maximum(plain, clipped), (clipped > plain).float()


def critic_loss(values, returns):
    """Half the squared error of a critic's values, token by token. (N,), (N,) -> (N,)"""
    return (values - returns).square() / 2


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


# ---- mixtures of experts: BAM, arXiv 2408.08274 ------------------------------------------------------------

def load_balance(shares, mean_gates):
    """L_LB = N sum_i f_i P_i of a layer of N experts (arXiv 2408.08274): f_i is the share of the tokens that
    is sent to expert i, P_i the mean of its gate over the tokens. 1 where both are even and top_k is 1.

    Only P has a gradient. (..., N), (..., N) -> (...)
    """
    return shares.shape[-1] * (shares.detach() * mean_gates).sum(-1)


def router_z(scores):
    """logsumexp(scores)^2 of each token; the mean over the tokens is L_z of a layer. (..., N) -> (...)"""
    return scores.logsumexp(-1).square()


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
        nll = scores.new_zeros(P)                                           # (P,) of the chosen answers
        if logps is not None:
            nll = sum_by_row(-logps, batch.mask)[:P] / batch.mask.sum(1)[:P]
        chosen, rejected = scores[:P], scores[P:]
        bt = bradley_terry_loss(chosen, rejected)                           # (P,)
        losses = bt + lm_weight * nll
        log = {"loss": losses, "bt_loss": bt, "lm_loss": nll, "accuracy": (chosen > rejected).float(),
               "margin": chosen - rejected, "mean_reward": (chosen + rejected) / 2}
        return losses.sum(), means_by_language(batch, log)
    return loss_fn


def preference_loss(beta, nll_weight, loss="sigmoid", label_smoothing=None, simpo_gamma=None,
                    length_normalized=False):
    """One of DPO's losses on pairs with stored reference log-probs (simpo: without) + nll_weight times the
    chosen answer's nats per token."""
    equation = {"sigmoid": dpo_loss, "ipo": ipo_loss, "hinge": hinge_loss,
                "cdpo": partial(cdpo_loss, label_smoothing=label_smoothing),
                "simpo": lambda logps, _, beta: simpo_loss(logps, beta, simpo_gamma)}[loss]
    per_token = length_normalized or loss == "simpo"

    def loss_fn(model, batch):
        P, tokens = batch.count, batch.mask.sum(1)
        logps = sum_by_row(supervised_logps(model, batch), batch.mask).view(2, P)       # (2, P) nats
        units = tokens.view(2, P) if per_token else 1
        ref_logps = None if loss == "simpo" else batch.ref_logps / units
        dpo, rewards = equation(logps / units, ref_logps, beta)
        losses = dpo + nll_weight * (-logps[0] / tokens[:P])                            # (P,)
        log = {"loss": losses, "rewards/accuracies": (rewards[0] > rewards[1]).float(),
               "rewards/margins": rewards[0] - rewards[1], "rewards/chosen": rewards[0],
               "rewards/rejected": rewards[1], "logps/chosen": logps[0], "logps/rejected": logps[1],
               "dpo_loss": dpo}
        return losses.sum(), means_by_language(batch, log)
    return loss_fn


def unpaired_loss(beta, desirable_weight, undesirable_weight):
    """KTO on labelled answers with stored reference log-probs and the step's kl."""
    def loss_fn(model, batch):
        logps = sum_by_row(supervised_logps(model, batch), batch.mask)                  # (B,) nats
        losses, rewards, values = kto_loss(logps, batch.ref_logps, batch.labels, batch.kl, beta,
                                           desirable_weight, undesirable_weight)
        log = {"loss": losses, "kto_value": values, "kl": batch.kl.expand_as(losses),
               "rewards/accuracies": (values > 0.5).float()}
        sides = {"chosen": batch.labels.float(), "rejected": (~batch.labels).float()}
        by_side = {f"{name}/{side}": by_language(batch, each * ones, ones)
                   for side, ones in sides.items() for name, each in (("rewards", rewards), ("logps", logps))}
        return losses.sum(), means_by_language(batch, log) | by_side
    return loss_fn


def policy_gradient_loss(model, batch):
    """REINFORCE with given advantages: -A * log pi(completion), per completion (arXiv 2402.14740)."""
    logps = sum_by_row(supervised_logps(model, batch), batch.mask)          # (B,)
    if batch.rewards_so_far is not None:
        # The totals move with the step that uses them: a step that a signal prevents leaves them as they are.
        model.rewards_so_far.copy_(batch.rewards_so_far)
    # kl and entropy are estimates from the samples, in nats per completion.
    log = {"reward": batch.rewards, "kl": logps - batch.ref_logps, "entropy": -logps, "cut": batch.cut}
    return (-batch.advantages * logps).sum(), means_by_language(batch, log)


def actor_critic_loss(clip, critic_weight):
    """Vanilla policy gradient (clip None) or PPO (a clip; 0: none) on tokens, plus critic_weight times the
    critic's loss. Both are summed over a completion's tokens. model: a critic.Learner."""
    def loss_fn(model, batch):
        tokens, trained = batch.mask.sum(1), batch.trained                  # (B,)
        logps, values = supervised_logps(model.policy, batch), supervised_logps(model.critic, batch)    # (N,)
        if clip is None:
            losses, binds = vanilla_pg_loss(logps, batch.advantages), torch.zeros_like(logps)
        else:
            losses, binds = ppo_loss(logps, batch.old_logps, batch.advantages, clip or None)
        policy_loss = sum_by_row(losses, batch.mask) * trained              # (B,)
        value_loss = sum_by_row(critic_loss(values, batch.returns), batch.mask) * trained
        total = sum_by_row(logps, batch.mask)                               # (B,)
        log = {"reward": batch.rewards, "kl": total - batch.ref_logps, "entropy": -total, "cut": batch.cut,
               "policy_loss": policy_loss, "critic_loss": value_loss}
        errors, spread = batch.critic_errors
        by_token = {"explained_variance": by_language(batch, spread - errors, spread)}
        if clip is not None:
            by_token["clip_fraction"] = by_language(batch, sum_by_row(binds, batch.mask) * trained,
                                                    tokens * trained)
        loss = policy_loss.sum() + critic_weight * value_loss.sum()
        return loss, means_by_language(batch, log) | by_token
    return loss_fn


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


def classification_loss(model, batch):
    """Cross-entropy of a text's label, -log p(label | text), with a classifier or a SideNet."""
    logits = model(batch.input_ids, batch.lengths, batch.repeats)           # (B, M)
    losses = F.cross_entropy(logits, batch.labels, reduction="none")        # (B,)
    log = {"loss": losses, "accuracy": (logits.argmax(1) == batch.labels).float()}
    return losses.sum(), means_by_language(batch, log)


def means_by_language(batch, values):
    """{name: (2, slots) sums and counts} from {name: one value per pair or completion}."""
    return {name: by_language(batch, each, torch.ones_like(each)) for name, each in values.items()}
