"""Scores of a reward model: prompt and completion in, one number out, by model.RewardModel."""

import math

import torch

from . import distributed
from .data import batches_in_order, collate, encode_example, in_step
from .lengths import cut_left


@torch.no_grad()
def score_texts(model, tokenizer, rows, batch_size=64, name="the reward model", too_long="refuse"):
    """Reward of each row's "completion" given its "prompt" (or "prompt_messages"), the work split over the
    ranks; a list of floats on every rank.

    An empty completion is scored like any other text. model: a RewardModel, plain or sharded; name: what
    messages call it. too_long: what to do with texts that pass the model's positions: refuse, skip (their
    score is None, their number is said), or cut-left (the oldest tokens of their prompts are dropped; an
    answer that passes them alone is not scored).
    """
    model.eval()
    device = next(model.parameters()).device
    positions = model.config.max_position_embeddings
    places = [row.get("prompt_where") or f"row {i}" for i, row in enumerate(rows)]
    examples = [example_of(tokenizer, row) for row in rows]
    long = [i for i, example in enumerate(examples) if len(example.ids) > positions]
    if long:
        examples = fitted(examples, long, positions, too_long, name, places)
    kept = [i for i, example in enumerate(examples) if example is not None]
    if not kept:
        return [None] * len(rows)
    done = []
    for indices, batch in in_step(batches_in_order([examples[i] for i in kept], collate, batch_size)):
        batch = batch.to(device)
        scores = model(batch.input_ids, batch.lengths, batch.mask, batch.repeats)[0].tolist()
        done += zip(indices, scores)
    scores = {kept[i]: score for i, score in sum(distributed.gather_objects(done), [])}
    for i in kept:
        if not math.isfinite(scores[i]):
            raise ValueError(f"{name}: its score of the answer of {places[i]} is {scores[i]}, not finite"
                             + distributed.blame(model))
    return [scores.get(i) for i in range(len(rows))]


def example_of(tokenizer, row):
    messages = row.get("prompt_messages") or [{"role": "user", "content": row["prompt"]}]
    return encode_example(tokenizer, messages + [{"role": "assistant", "content": row["completion"]}], {},
                          prompt_key=str(messages))


def fitted(examples, long, positions, too_long, name, places):
    """The examples within the model's positions: those at the indices `long` are cut, or None, or refused."""
    first = f"the first, of {places[long[0]]}, has {len(examples[long[0]].ids)} tokens"
    found = f"{name}: {len(long)} of {len(examples)} texts to score pass its {positions} positions ({first})"
    if too_long == "refuse":
        raise ValueError(f"{found}; shorten them, or give --too-long skip or cut-left")
    answers = {i: int(examples[i].mask.sum()) for i in long}
    unscored = [i for i in long if too_long == "skip" or answers[i] > positions - 2]
    fates = []
    if too_long == "cut-left":
        fates = [f"{len(long) - len(unscored)} lose the oldest tokens of their prompts"]
    fates += [f"{len(unscored)} are not scored"] * bool(unscored)
    distributed.say(f"{found}; {', '.join(fates)}")
    examples = list(examples)
    for i in long:
        examples[i] = None if i in unscored else within_positions(examples[i], positions, answers[i])
    return examples


def within_positions(example, positions, answer):
    """An example whose prompt lost its oldest tokens."""
    prompt = cut_left(example.ids[:-answer].tolist(), positions - answer)
    ids = example.ids[-positions:].copy()
    mask = example.mask[-positions:]
    ids[:len(prompt)] = prompt
    return type(example)(ids, mask, example.language, "")
