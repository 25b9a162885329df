"""Scores of a reward model: prompt and completion in, one number out, by model.RewardModel."""

import math

import numpy as np
import torch

from . import distributed
from .data import batches_in_order, collate, encode_example, in_step


@torch.no_grad()
def score_texts(model, tokenizer, rows, batch_size=64, name="the reward model", too_long="refuse"):
    """Reward of each row's "completion" given its "prompt" (or "prompt_messages"), the work split over the ranks; a list of floats on every rank.

    An empty completion is scored like any other text. model: a RewardModel, plain or sharded.
    """
    model.eval()
    device = next(model.parameters()).device
    prompts = [r.get("prompt_messages") or [{"role": "user", "content": r["prompt"]}] for r in rows]
    room = model.config.max_position_embeddings
    examples = [encode_example(tokenizer, p + [{"role": "assistant", "content": r["completion"]}], {}, where=str(p))          # one place, one computation:
                for p, r in zip(prompts, rows)]                                                                            # see data.repeats_of
    fits = [i for i, e in enumerate(examples) if too_long == "cut-left" or len(e.ids) <= room]
    if len(fits) < len(rows) and too_long == "refuse":
        first = next(i for i in range(len(rows)) if i not in fits)
        raise ValueError(f"{rows[first].get('prompt_where', f'row {first}')}: {len(examples[first].ids)} tokens, {name} has {room} positions")
    for e in examples:
        e.ids = e.ids[:1].tolist() + e.ids[-room + 1:].tolist() if len(e.ids) > room else e.ids
        e.ids, e.mask = np.array(e.ids, np.int32), e.mask[-len(e.ids):]
        e.mask[0] = False
    examples, done = [examples[i] for i in fits] or examples[:0], []
    for indices, batch in in_step(batches_in_order(examples, collate, batch_size)):
        batch = batch.to(device)
        done += zip(indices, model(batch.input_ids, batch.lengths, batch.mask, batch.repeats)[0].tolist())
    scores = dict(sum(distributed.gather_objects(done), []))
    bad = [i for i, score in scores.items() if not math.isfinite(score)]
    if bad:
        raise ValueError(f"{name}: the score of row {fits[bad[0]]} is {scores[bad[0]]}, which is not finite")
    scores = {fits[i]: score for i, score in scores.items()}
    return [scores.get(i) for i in range(len(rows))]
