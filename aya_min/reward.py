"""Scores of a reward model (model.RewardModel): one number for a prompt and its completion."""

import math

import torch

from . import critiques, distributed
from .data import batches_in_order, collate, encode_example, in_step
from .lengths import cut_left


@torch.no_grad()
def score_texts(model, tokenizer, rows, batch_size=64, name="the reward model", too_long="refuse"):
    """Reward of each row's "completion" given its "prompt" (or "prompt_messages"): a list of floats.

    The ranks share the work, and each gets the whole list. An empty completion is scored like any other text.
    A model that was trained with critiques reads each row's "critique"; see critiques.check.
    model: a RewardModel, plain or sharded; name: what messages call it. too_long decides on texts that exceed
    the model's positions: "refuse" (ValueError), "skip" (the score is None), or "cut-left" (the oldest tokens
    of the prompt are dropped; an answer that is too long by itself gets None). Their number is printed.
    ValueError for a score that is not finite.
    """
    critiques.check(model, rows, name)
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
                          row.get("prompt_where") or "", str(messages), row.get("critique"))


def fitted(examples, long, positions, too_long, name, places):
    """The examples; those at the indices `long` are cut to the positions or None, see score_texts."""
    first = f"the first, of {places[long[0]]}, has {len(examples[long[0]].ids)} tokens"
    found = f"{name}: {len(long)} of {len(examples)} texts to score pass its {positions} positions ({first})"
    if too_long == "refuse":
        raise ValueError(f"{found}; shorten them, or give --too-long skip or cut-left")
    answer_tokens = {i: len(examples[i].ids) - int(examples[i].mask.argmax()) for i in long}
    unscored = [i for i in long if too_long == "skip" or answer_tokens[i] > positions - 2]
    fates = []
    if too_long == "cut-left":
        fates.append(f"{len(long) - len(unscored)} lose the oldest tokens of their prompts")
    if unscored:
        fates.append(f"{len(unscored)} are not scored")
    distributed.say(f"{found}; {', '.join(fates)}")
    examples = list(examples)
    for i in long:
        examples[i] = None if i in unscored else within_positions(examples[i], positions, answer_tokens[i])
    return examples


def within_positions(example, positions, answer_tokens):
    """The example in `positions` tokens: its prompt loses the oldest, its answer stays whole."""
    prompt = cut_left(example.ids[:-answer_tokens].tolist(), positions - answer_tokens)
    ids = example.ids[-positions:].copy()
    mask = example.mask[-positions:]
    ids[:len(prompt)] = prompt
    return type(example)(ids, mask, example.language, "")
