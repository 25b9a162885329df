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
from .reference import answer_logps, twin
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
        self.model = spread(self.model, s, self.device)
        self.reward_model = spread(self.reward_model, replace(s, dtype="float32"), self.device)
        self.reference = twin(self.model, s, self.device)
        positions = replace(self.model.config, max_position_embeddings=self.limit)
        self.copy = CohereForCausalLM(positions).to(self.device)

    def batches(self, step):
        """This rank's micro-batches of a step; [] after a signal."""
        s, k = self.settings, self.settings.num_samples
        chosen = self.sampler.take(step * s.batch_size, s.batch_size)       # the same on every rank
        sampled = self.sample([self.prompts[i] for i in chosen], k, s.seed * 1_000_003 + step)
        if sampled is None:
            return []
        _, answers, examples, rewards, now, ref = sampled                   # (P k,) each
        cut = torch.tensor([float(answer["finish_reason"] == "length") for answer in answers])
        shaped = kl_shaped_rewards(rewards.view(-1, k), now.view(-1, k), ref.view(-1, k), s.beta)
        advantages = rloo_advantages(shaped).flatten()
        mine = torch.arange(len(examples))[distributed.rank()::distributed.num_ranks()]
        made = []
        for part in mine.split(s.micro_batch_size * k or len(mine)):
            batch = collate([examples[i] for i in part], self.tokenizer.pad_id, self.slots)
            batch.count, batch.ref_logps, batch.cut = len(part), ref[part], cut[part]
            batch.advantages, batch.rewards = advantages[part], rewards[part]
            made.append(batch)
        return made

    def evaluation(self):
        """{name: mean} over one answer to each held-out prompt, sampled with the same random numbers each
        time. None after a signal."""
        sampled = self.sample(self.held_out, 1, self.settings.seed)
        if sampled is None:
            return None
        rows, answers, _, rewards, now, ref = sampled
        by_row = {"reward": rewards.tolist(), "kl": (now - ref).tolist(),
                  "length": [len(answer["ids"]) for answer in answers],
                  "cut": [float(answer["finish_reason"] == "length") for answer in answers]}
        means = {name: sum(values) / len(values) for name, values in by_row.items()}
        for code in sorted({row["language"] for row in rows if row.get("language")}):
            for name in ("reward", "cut"):
                values = [value for row, value in zip(rows, by_row[name]) if row.get("language") == code]
                means[f"{name}/{code}"] = sum(values) / len(values)
        return means

    def sample(self, rows, k, seed):
        """Sample k answers to each of N rows, all samples of a row in succession.

        Returns lists and tensors of N k values: rows, answers, examples, rewards, the policy's and the
        reference's log-probs in nats, summed over the answer. None after a signal."""
        s = self.settings
        copies, shards = self.copy.state_dict().values(), self.model.state_dict().values()
        for own, theirs in zip(copies, shards, strict=True):
            own.copy_(distributed.full(theirs))                             # gathers one tensor at a time
        cuts = s.too_long == "cut-left"
        groups = answer_rows(self.copy, self.tokenizer, rows, k, s.max_new_tokens, seed=seed, cut_left=cuts)
        if self.stop.any_rank(self.device):
            return None
        flat = [(row, answer) for row, group in zip(rows, groups) for answer in group]
        rows, answers = [row for row, _ in flat], [answer for _, answer in flat]
        self.tell_cut(answers)
        examples = [sampled_example(answer, row) for row, answer in flat]
        scores = score_texts(self.reward_model, self.tokenizer, [{**row, **answer} for row, answer in flat],
                             too_long="cut-left" if cuts else "refuse")
        ref = self.logps_of(self.reference, "the reference", examples)
        now = torch.tensor([answer["logp"] for answer in answers])
        if s.dtype != "float32":
            # The sampler computes in fp32; the ratio needs both log-probs with the same rounding.
            now = self.logps_of(self.model, "the policy", examples)
        return rows, answers, examples, torch.tensor(scores), now, ref

    def logps_of(self, model, name, examples):
        return answer_logps(model, examples, self.tokenizer.pad_id, self.device, self.settings, name=name)

    def tell_cut(self, answers):
        num_cut = sum(answer["finish_reason"] == "length" for answer in answers)
        if num_cut and not self.told and distributed.is_main():
            tqdm.write(f"{num_cut} of {len(answers)} answers were cut at --max-new-tokens "
                       f"{self.settings.max_new_tokens}: they are kept and scored as they are; metrics.jsonl "
                       "gives their share of each step (cut)", file=sys.stderr)
        self.told = self.told or num_cut > 0


def sampled_example(answer, row):
    """A sampled answer as an example. All sampled tokens are supervised, the stop token included."""
    ids = row["prompt_ids"]
    mask = [False] * len(ids) + [True] * len(answer["ids"])
    return Example(np.array(ids + answer["ids"], np.int32), np.array(mask), row.get("language") or "other",
                   row["prompt_where"], prompt_key=row["prompt_where"])
