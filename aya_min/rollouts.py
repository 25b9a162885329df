"""On-policy training (RLOO, arXiv 2402.14740): sample k answers to each prompt of a batch, score them, and
turn them into a batch with advantages.

A plain fp32 copy of the policy, whole on each rank, samples the answers. Policy, reference and reward model
are sharded.
"""

import sys
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from tqdm import tqdm

from . import distributed
from .data import Example, Sampler, collate, load_prompts
from .lengths import cut_left, fit_prompts
from .loop import spread
from .losses import kl_shaped_rewards, rloo_advantages
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
    reward: float = 0.0
    logp: float = 0.0           # log-probs, summed over the answer, nats: under the policy that sampled it,
    ref_logp: float = 0.0       # and under the reference
    advantage: float = 0.0


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
    """A Batch of B rollouts; count is B."""
    return replace(collate(rollouts, pad_id, slots), count=len(rollouts), cut=column(rollouts, "cut"),
                   rewards=column(rollouts, "reward"), ref_logps=column(rollouts, "ref_logp"),
                   advantages=column(rollouts, "advantage"))


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

    def __post_init__(self):
        s = self.settings
        codes = {row["language"] for row in self.prompts if row.get("language")} - {"other"}
        self.slots = (*sorted(codes), "other")
        self.sampler = Sampler([len(row["prompt_ids"]) for row in self.prompts], s.batch_size, s.seed)
        self.reward_model = spread(self.reward_model, replace(s, dtype="float32"), self.device)
        self.reference = copy_of(self.model, s, self.device)
        positions = replace(self.model.config, max_position_embeddings=self.limit)
        self.whole_policy = CohereForCausalLM(positions).to(self.device)

    def batches(self, step):
        """This rank's micro-batches of a step; [] after a signal."""
        s, k = self.settings, self.settings.num_samples
        chosen = self.sampler.take(step * s.batch_size, s.batch_size)       # the same on every rank
        rollouts = self.sample([self.prompts[i] for i in chosen], k, s.seed * 1_000_003 + step)
        if rollouts is None:
            return []
        rewards, now, ref = (column(rollouts, name).view(-1, k) for name in ("reward", "logp", "ref_logp"))
        advantages = rloo_advantages(kl_shaped_rewards(rewards, now, ref, s.beta))      # (P, k)
        for rollout, advantage in zip(rollouts, advantages.flatten().tolist()):
            rollout.advantage = advantage
        mine = rollouts[distributed.rank()::distributed.num_ranks()]
        size = s.micro_batch_size * k or len(mine)
        return [collate_rollouts(mine[start:start + size], self.tokenizer.pad_id, self.slots)
                for start in range(0, len(mine), size)]

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
        groups = answer_rows(self.whole_policy, self.tokenizer, rows, k, s.max_new_tokens, seed=seed,
                             cut_left=cuts)
        if self.stop.any_rank(self.device):
            return None
        flat = [(row, answer) for row, group in zip(rows, groups) for answer in group]
        rollouts = [rollout_of(row, answer) for row, answer in flat]
        self.tell_cut(rollouts)
        rewards = score_texts(self.reward_model, self.tokenizer, [{**row, **answer} for row, answer in flat],
                              too_long="cut-left" if cuts else "refuse")
        ref_logps = self.logps_of(self.reference, "the reference", rollouts)
        # The sampler computes in fp32; the ratio needs both log-probs with the same rounding.
        logps = (column(rollouts, "logp") if s.dtype == "float32"
                 else self.logps_of(self.model, "the policy", rollouts))
        return [replace(rollout, reward=reward, logp=logp, ref_logp=ref_logp) for rollout, reward, logp,
                ref_logp in zip(rollouts, rewards, logps.tolist(), ref_logps.tolist(), strict=True)]

    def logps_of(self, model, name, examples):
        return answer_logps(model, examples, self.tokenizer.pad_id, self.device, self.settings, name=name)

    def tell_cut(self, rollouts):
        num_cut = sum(rollout.cut for rollout in rollouts)
        if num_cut and not self.told and distributed.is_main():
            tqdm.write(f"{num_cut} of {len(rollouts)} answers were cut at --max-new-tokens "
                       f"{self.settings.max_new_tokens}: they are kept and scored as they are; metrics.jsonl "
                       "gives their share of each step (cut)", file=sys.stderr)
        self.told = self.told or num_cut > 0
