"""On-policy training (arXiv 2402.14740): sample k answers to each prompt of a batch, score them, and turn
them into a batch with advantages.

A plain fp32 copy of the policy, whole on each rank, samples the answers. Policy, reference, reward model and
critic are sharded. Each batch of samples is trained on for --gradient-steps steps. It is never stored: states
are saved only after the last of these steps.

What an answer that was cut at --max-new-tokens is worth (--cut-answers): keep takes its reward as it is;
penalize takes --cut-penalty off it; drop leaves it out of the gradient, the baseline and the count that the
loss is divided by. An answer that is then without siblings is left out with it by rloo. The logged rewards
are the reward model's own.
"""

import sys
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from tqdm import tqdm

from . import distributed
from .config import WITH_CRITIC
from .critic import Critic, Learner
from .data import Example, Sampler, collate, load_prompts
from .lengths import cut_left, fit_prompts
from .loop import spread
from .losses import (gae, group_advantages, kl_shaped_rewards, moving_average_advantages, raft_weights,
                     rloo_advantages, token_rewards)
from .model import CohereForCausalLM
from .reference import answer_logps, copy_of
from .reward import score_texts
from .sampling import answer_rows


def load_fitting_prompts(paths, tokenizer, limit, settings):
    """The rows of load_prompts with their "prompt_ids". Prompts that exceed `limit` tokens together with
    --max-new-tokens are refused, skipped or cut, as --too-long says."""
    new, room = settings.max_new_tokens, limit - settings.max_new_tokens
    what = f"the {limit} tokens (--max-length, or a model's positions) less --max-new-tokens {new}"
    rows = [{**row, "prompt_ids": tokenizer.encode_prompt(row["prompt_messages"])}
            for row in load_prompts(paths, settings, tokenizer)]
    rows = fit_prompts(rows, lambda row: len(row["prompt_ids"]), room, settings.too_long, what)
    return [{**row, "prompt_ids": cut_left(row["prompt_ids"], room)} for row in rows]


@dataclass
class Rollout(Example):
    """A sampled answer. All sampled tokens are supervised, the stop token included."""
    cut: bool = False           # whether it was cut at --max-new-tokens
    reward: float = 0.0         # of the reward model
    logp: float = 0.0           # log-probs, summed over the answer, nats: under the policy that sampled it,
    ref_logp: float = 0.0       # and under the reference
    advantage: float = 0.0
    trained: float = 1.0        # 0.0 if it has no gradient
    # With a critic, tensors (n,) of the answer's n tokens: old_logps, ref_logps, values (what the critic
    # says), returns (what it should say), advantages. And two sums of squares, see token_advantages.
    tokens: dict = field(default_factory=dict)
    critic_errors: tuple = (0.0, 0.0)


def rollout_of(row, answer):
    ids = row["prompt_ids"]
    mask = np.array([False] * len(ids) + [True] * len(answer["ids"]))
    return Rollout(np.array(ids + answer["ids"], np.int32), mask, row.get("language") or "other",
                   row["prompt_where"], row["prompt_where"], cut=answer["finish_reason"] == "length",
                   logp=answer["logp"])


def column(rollouts, name):
    """(B,) fp32, one field of B rollouts."""
    return torch.tensor([float(getattr(rollout, name)) for rollout in rollouts])


def collate_rollouts(rollouts, pad_id=0, slots=("other",)):
    """A Batch of B rollouts; count is the number of those that have a gradient."""
    batch = replace(collate(rollouts, pad_id, slots), count=int(sum(each.trained for each in rollouts)),
                    cut=column(rollouts, "cut"), rewards=column(rollouts, "reward"),
                    ref_logps=column(rollouts, "ref_logp"), advantages=column(rollouts, "advantage"))
    if not rollouts[0].tokens:
        return batch
    names = ("advantages", "returns", "old_logps")
    by_token = {name: torch.cat([each.tokens[name] for each in rollouts]) for name in names}       # (N,) each
    errors = torch.tensor([each.critic_errors for each in rollouts]).T                             # (2, B)
    return replace(batch, **by_token, trained=column(rollouts, "trained"), critic_errors=errors)


def token_advantages(rollouts, rewards, beta, gae_lambda):
    """Set the advantages and the critic's returns of each token of B rollouts. rewards (B,).

    critic_errors: the squares of what the critic is off from the sum of the rewards that came, and of what
    their mean over the batch is off, summed over the tokens: for the explained variance."""
    came = []
    for each, reward in zip(rollouts, rewards.tolist()):
        t = each.tokens
        own = token_rewards(reward, t["old_logps"], t["ref_logps"], beta)   # (n,)
        t["advantages"] = gae(own, t["values"], gae_lambda)
        t["returns"] = t["advantages"] + t["values"]
        came.append(own.flip(0).cumsum(0).flip(0))
    trained = [own for own, each in zip(came, rollouts) if each.trained]
    mean = torch.cat(trained).mean() if trained else 0.0
    for each, own in zip(rollouts, came):
        off, spread_of = (own - each.tokens["values"]).square().sum(), (own - mean).square().sum()
        each.critic_errors = (float(off) * each.trained, float(spread_of) * each.trained)


@dataclass
class Rollouts:
    """Training batches of answers that the policy samples.

    limit: the most tokens that a prompt and its answer have together.
    stop: the distributed.Signals to poll after sampling."""
    model: torch.nn.Module              # the policy that is trained
    reward_model: torch.nn.Module
    tokenizer: object
    prompts: list
    held_out: list
    limit: int
    settings: object
    device: torch.device
    stop: distributed.Signals
    told: bool = field(default=False, init=False)       # whether the user was told of a cut answer
    current: list = field(default=None, init=False)     # the micro-batches of the batch that is trained on

    def __post_init__(self):
        s = self.settings
        codes = {row["language"] for row in self.prompts if row.get("language")} - {"other"}
        self.slots = (*sorted(codes), "other")
        self.sampler = Sampler([len(row["prompt_ids"]) for row in self.prompts], s.batch_size, s.seed)
        self.reward_model = spread(self.reward_model, replace(s, dtype="float32"), self.device)
        self.reference = copy_of(self.model, s, self.device)
        positions = replace(self.model.config, max_position_embeddings=self.limit)
        self.whole_policy = CohereForCausalLM(positions).to(self.device)
        self.learner = self.model                       # what is trained: the policy and what goes with it
        if s.algorithm in WITH_CRITIC:
            self.learner = Learner(self.model, copy_of(self.reward_model, s, self.device, Critic))
        elif s.algorithm == "reinforce":
            self.learner = Learner(self.model)

    def batches(self, step):
        """This rank's micro-batches of a step; [] after a signal."""
        s = self.settings
        if step % s.gradient_steps == 0:
            self.current = self.batch(step // s.gradient_steps)
        return self.current

    def batch(self, number):
        """This rank's micro-batches of fresh samples; [] after a signal."""
        s, k = self.settings, self.settings.num_samples
        chosen = self.sampler.take(number * s.batch_size, s.batch_size)     # the same on every rank
        rollouts = self.sample([self.prompts[i] for i in chosen], k, s.seed * 1_000_003 + number)
        if rollouts is None:
            return []
        so_far = self.give_advantages(rollouts, number)
        mine = rollouts[distributed.rank()::distributed.num_ranks()]
        size = s.micro_batch_size * k or len(mine)
        parts = [mine[start:start + size] for start in range(0, len(mine), size)]
        return [replace(collate_rollouts(part, self.tokenizer.pad_id, self.slots), rewards_so_far=so_far)
                for part in parts]

    def give_advantages(self, rollouts, number):
        """Set the advantages of a batch, which all ranks have whole, by --algorithm. Returns reinforce's sum
        and number of rewards, this batch included, or None."""
        s, so_far = self.settings, None
        columns = (column(rollouts, name).view(-1, s.num_samples) for name in
                   ("reward", "cut", "logp", "ref_logp"))
        rewards, cut, now, ref = columns                                    # (P, k) each
        if s.reward_noise:
            noise = np.random.default_rng([s.seed, number, 1]).normal(0, s.reward_noise, tuple(rewards.shape))
            rewards = rewards + torch.from_numpy(noise).float()
        if s.cut_answers == "penalize":
            rewards = rewards - s.cut_penalty * cut
        kept = 1 - cut if s.cut_answers == "drop" else torch.ones_like(cut)
        shaped = kl_shaped_rewards(rewards, now, ref, s.beta)
        advantages, trained = torch.zeros_like(shaped), kept
        if s.algorithm == "raft":
            advantages = trained = raft_weights(shaped, kept)
        elif s.algorithm == "reinforce":
            total, count = self.learner.rewards_so_far.tolist()
            advantages = moving_average_advantages(shaped, total, count) * kept
            so_far = torch.tensor([total, count], dtype=torch.float64)
            so_far += torch.stack([shaped * kept, kept]).double().sum((1, 2))
        elif s.algorithm in ("rloo", "grpo"):
            trained = kept * (kept.sum(1, keepdim=True) > 1)
            advantages = (rloo_advantages(shaped, kept) if s.algorithm == "rloo" else
                          group_advantages(shaped, kept, s.normalize_advantages))
        for rollout, advantage, counts in zip(rollouts, advantages.flatten().tolist(),
                                              trained.flatten().tolist(), strict=True):
            rollout.advantage, rollout.trained = advantage, counts
        if s.algorithm in WITH_CRITIC:
            gae_lambda = 1.0 if s.algorithm == "vanilla-pg" else s.gae_lambda
            token_advantages(rollouts, rewards.flatten(), s.beta, gae_lambda)
        if not trained.any():
            raise ValueError(f"batch {number}: all answers were cut at --max-new-tokens {s.max_new_tokens}, "
                             "or have no sibling that was not; raise it, or leave --cut-answers drop out")
        return so_far

    def evaluation(self):
        """{name: mean} over one answer to each held-out prompt, sampled with the same random numbers each
        time. None after a signal."""
        rollouts = self.sample(self.held_out, 1, self.settings.seed)
        if rollouts is None:
            return None
        by_row = {"reward": [r.reward for r in rollouts], "kl": [r.logp - r.ref_logp for r in rollouts],
                  "length": [int(r.mask.sum()) for r in rollouts], "cut": [float(r.cut) for r in rollouts]}
        means = {name: sum(values) / len(values) for name, values in by_row.items()}
        for code in sorted({r.language for r in rollouts} - {"other"}):
            for name in ("reward", "cut"):
                values = [value for r, value in zip(rollouts, by_row[name]) if r.language == code]
                means[f"{name}/{code}"] = sum(values) / len(values)
        return means

    def sample(self, rows, k, seed):
        """[Rollout, ...] of N k samples, those of a row in succession, without their advantages. None after a
        signal."""
        s = self.settings
        copies, shards = self.whole_policy.state_dict().values(), self.model.state_dict().values()
        for own, theirs in zip(copies, shards, strict=True):
            own.copy_(distributed.full(theirs))                             # gathers one tensor at a time
        cuts = s.too_long == "cut-left"
        name = f"the policy, which began as {getattr(self.model, 'came_from', 'fresh weights')}"
        groups = answer_rows(self.whole_policy, self.tokenizer, rows, k, s.max_new_tokens, seed=seed,
                             cut_left=cuts, name=name)
        if self.stop.any_rank(self.device):
            return None
        flat = [(row, answer) for row, group in zip(rows, groups) for answer in group]
        rollouts = [rollout_of(row, answer) for row, answer in flat]
        self.tell_cut(rollouts)
        rewards = score_texts(self.reward_model, self.tokenizer, [{**row, **answer} for row, answer in flat],
                              too_long="cut-left" if cuts else "refuse")
        for rollout, reward in zip(rollouts, rewards, strict=True):
            rollout.reward = reward
        if s.algorithm in WITH_CRITIC:
            self.look_at_tokens(rollouts)
            return rollouts
        ref_logps = self.logps_of(self.reference, "the reference", rollouts)
        # The sampler computes in fp32; the ratio needs both log-probs with the same rounding.
        logps = (column(rollouts, "logp") if s.dtype == "float32"
                 else self.logps_of(self.model, "the policy", rollouts))
        return [replace(rollout, logp=logp, ref_logp=ref_logp) for rollout, logp, ref_logp
                in zip(rollouts, logps.tolist(), ref_logps.tolist(), strict=True)]

    def look_at_tokens(self, rollouts):
        """Set the log-probs and values of each token, and the sums of the log-probs."""
        for name, model, called in (("ref_logps", self.reference, "the reference"),
                                    ("old_logps", self.model, "the policy"),
                                    ("values", self.learner.critic, "the critic")):
            for rollout, values in zip(rollouts, self.logps_of(model, called, rollouts, True), strict=True):
                rollout.tokens[name] = values
        for rollout in rollouts:
            rollout.logp = float(rollout.tokens["old_logps"].sum())
            rollout.ref_logp = float(rollout.tokens["ref_logps"].sum())

    def logps_of(self, model, name, examples, by_token=False):
        return answer_logps(model, examples, self.tokenizer.pad_id, self.device, self.settings, name=name,
                            by_token=by_token)

    def tell_cut(self, rollouts):
        num_cut, s = sum(rollout.cut for rollout in rollouts), self.settings
        if num_cut and not self.told and distributed.is_main():
            fate = {"keep": "kept and scored as they are",
                    "penalize": f"kept, and --cut-penalty {s.cut_penalty} is taken off their rewards",
                    "drop": "left out of the gradient and the baseline"}
            tqdm.write(f"{num_cut} of {len(rollouts)} answers were cut at --max-new-tokens "
                       f"{s.max_new_tokens}: they are {fate[s.cut_answers]}; metrics.jsonl gives their share "
                       "of each step (cut)", file=sys.stderr)
        self.told = self.told or num_cut > 0
