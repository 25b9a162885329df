"""KTO (arXiv 2402.01306): answers that are labelled as wanted or unwanted, without pairs, and the KL that
their rewards are compared with.

The KL is estimated on mismatched texts, each prompt with the answer of another row, and has no gradient. Two
departures: the paper takes the mismatched answer from the micro-batch, and the mean over the micro-batch.
Here the partner is fixed by the order of the data and the mean is that of the whole step, so that a step is
the same however it is cut, and the reference's log-probs are computed once.
"""

from dataclasses import dataclass, replace
from typing import Optional

import numpy as np
import torch

from . import distributed
from .control_tokens import Spelled
from .data import SKIP, Batch, Example, collate, encode_example, in_step
from .lengths import NOT_SUPERVISED, WAS_CUT, LeftOut, fitting_example
from .loop import autocast
from .losses import supervised_logps
from .rows import labelled_of, read_jsonl
from .token_logps import sum_by_row

MOST_SHIFTS = 1000          # the distances in a file at which partners are looked for


@dataclass
class Labelled:
    example: Example
    label: bool                                 # whether the answer is wanted
    mismatched: Optional[Example] = None        # the same prompt with another row's answer
    ref_logps: Optional[np.ndarray] = None      # (2,) the reference's log-probs of both answers, summed, nats

    @property
    def sides(self):
        return self.example, self.mismatched


@dataclass
class LabelledBatch(Batch):
    labels: Optional[torch.Tensor] = None       # (B,) bool
    mismatched: Optional[Batch] = None          # B rows, with their ref_logps
    kl: Optional[torch.Tensor] = None           # () nats, 0 until measure_kl has measured it

    @property
    def num_tokens(self):
        return int(self.lengths.sum()) + self.mismatched.num_tokens


def load_labelled(paths, tokenizer, limit, reading=SKIP):
    """[Labelled, ...] of the rows that fit into `limit` tokens.

    What is left out is counted and reported. ValueError at the first wrong row, if nothing is left, if all
    labels are the same, or if all prompts are.
    """
    items, left_out, spelled = [], LeftOut(paths, reading, limit), Spelled(tokenizer)
    for path in paths:
        for where, row in read_jsonl(path, reading):
            left_out.total += 1
            messages, label, cut, supervised = labelled_of(row, where)
            spelled.look([message["content"] for message in messages], where)
            example = encode_example(tokenizer, messages, row, where, prompt_key=where)
            if not supervised:
                left_out.add(NOT_SUPERVISED, where)
            elif cut and not reading.keep_cut:
                left_out.languages[example.language] += 1
                left_out.add(WAS_CUT, where)
            else:
                fits = fitting_example(tokenizer, example, messages[-1]["content"], left_out)
                items += [Labelled(one, label) for one in fits]
    spelled.report(paths, left_out.total, reading)
    left_out.report(len(items), "examples")
    if len({item.label for item in items}) == 1:
        said = str(items[0].label).lower()
        raise ValueError(f"{' '.join(map(str, paths))}: all {len(items)} labels are {said}, and kto learns "
                         "from wanted and unwanted answers; add the others, or give wanted ones to sft")
    shift = shift_of_partners([item.example.ids[~item.example.mask].tobytes() for item in items], paths)
    for i, item in enumerate(items):
        item.mismatched = mismatched(item.example, items[(i + shift) % len(items)].example, limit)
    return items


def shift_of_partners(prompts, paths):
    """How far down the file, cyclically, each prompt's partner stands: the smallest distance at which the
    fewest rows, usually none, meet a row of their own prompt. Each answer is then the partner of one prompt.

    At a distance of 1 the two answers to a prompt, which often follow each other, would meet."""
    numbers = {}
    codes = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])      # (N,)
    equal = []
    for shift in range(1, min(len(prompts), MOST_SHIFTS)):
        equal.append(int((codes == np.roll(codes, -shift)).sum()))
        if not equal[-1]:
            break
    if min(equal) == len(prompts):
        raise ValueError(f"{' '.join(map(str, paths))}: all prompts are the same, and kto compares each "
                         "answer with answers to other prompts; give rows of several prompts")
    if min(equal):
        distributed.say(f"{min(equal)} of {len(prompts)} prompts meet an answer to themselves as their "
                        "mismatched one, because too many rows share a prompt: kto's KL is too high by their "
                        "part; give more prompts", paths)
    return equal.index(min(equal)) + 1


def mismatched(example, other, limit):
    """The example's prompt with another's answer, whose end is cut off where both pass `limit` tokens."""
    prompt, answer = example.ids[~example.mask], other.ids[other.mask]
    ids = np.concatenate([prompt, answer])[:limit]
    return replace(example, ids=ids, mask=np.arange(len(ids)) >= len(prompt))


def collate_labelled(items, pad_id=0, slots=("other",)):
    """A LabelledBatch of B answers; count is B."""
    own, other = (collate([getattr(item, name) for item in items], pad_id, slots)
                  for name in ("example", "mismatched"))
    ref_logps = np.stack([item.ref_logps for item in items], 1).astype(np.float32)      # (2, B)
    own.ref_logps, other.ref_logps = torch.from_numpy(ref_logps)
    own.count = len(items)
    return LabelledBatch(**vars(own), labels=torch.tensor([item.label for item in items]), mismatched=other,
                         kl=torch.zeros(()))


@torch.no_grad()
def measure_kl(model, batches, settings, device):
    """Set the kl of all batches of a step, or of an evaluation: the mean of log pi(y'|x) - log pi_ref(y'|x)
    over the mismatched answers y' on all ranks. A collective.

    batches: this rank's [(indices, batch), ...]; one without indices is computed and does not count.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)              # sum of log ratios, their number
    for indices, batch in in_step(batches):
        other = batch.mismatched.to(device)
        with autocast(model, settings, device):
            logps = sum_by_row(supervised_logps(model, other), other.mask)  # (B,)
        if len(indices):
            total += torch.stack([(logps - other.ref_logps).double().sum(), total.new_tensor(len(logps))])
    ratios, count = distributed.sum_over_ranks(total)
    for _, batch in batches:
        batch.kl = (ratios / count).float()
