"""Scores of a reward model: prompt and completion in, one number out, by model.RewardModel."""

import torch

from . import distributed
from .data import batches_in_order, collate, encode_example, in_step


@torch.no_grad()
def score_texts(model, tokenizer, rows, batch_size=64):
    """Reward of each row's "completion" given its "prompt" (or "prompt_messages"), the work split over the ranks; a list of floats on every rank.

    An empty completion is scored like any other text. model: a RewardModel, plain or sharded.
    """
    model.eval()
    device = next(model.parameters()).device
    prompts = [r.get("prompt_messages") or [{"role": "user", "content": r["prompt"]}] for r in rows]
    examples = [encode_example(tokenizer, p + [{"role": "assistant", "content": r["completion"]}], {}, where=str(p))          # one place, one computation:
                for p, r in zip(prompts, rows)]                                                                            # see data.repeats_of
    done = []
    for indices, batch in in_step(batches_in_order(examples, collate, batch_size)):
        batch = batch.to(device)
        done += zip(indices, model(batch.input_ids, batch.lengths, batch.mask, batch.repeats)[0].tolist())
    scores = dict(sum(distributed.gather_objects(done), []))
    return [scores[i] for i in range(len(rows))]
