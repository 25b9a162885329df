"""What a model does with held-out rows, row by row: the loss on their supervised tokens, and to which experts
a mixture sends their tokens."""

import torch

from .config import Training
from .data import collate, load_examples
from .reference import answer_logps

# Nothing is left out, so that the values stand in the order of the rows.
WHOLE = Training(too_long="refuse", keep_cut=True, allow_control_tokens=True)


def examples_of(model, tokenizer, path):
    """An Example of each row of a JSONL file. ValueError for a row beyond the model's positions."""
    return load_examples([path], tokenizer, model.config.max_position_embeddings, WHOLE)


def losses(model, tokenizer, path, device):
    """[nats per supervised token of each row of a JSONL file]: of an answer its tokens, of a {"text"} all but
    the first. exp(their mean) is the perplexity, with each row counting once."""
    examples = examples_of(model, tokenizer, path)
    logps = answer_logps(model, examples, tokenizer.pad_id, device, WHOLE, name="the model")     # (rows,)
    return [-logp / int(example.mask[1:].sum()) for logp, example in zip(logps.tolist(), examples)]


@torch.no_grad()
def routing(model, tokenizer, path, device):
    """For each row of a JSONL file the share of its tokens, those of its prompt too, that each layer sends to
    each expert. With top_k above 1 they sum to top_k. -> lists (rows, layers, E)"""
    examples = examples_of(model, tokenizer, path)
    model.eval()
    E, shares = len(model.config.mixture.experts), []
    for example in examples:
        batch = collate([example], tokenizer.pad_id).to(device)
        model.model(batch.input_ids, batch.lengths)
        sent = model.model.routing[:, :E]                                   # (layers, E)
        shares.append((sent / len(example.ids)).tolist())
    return shares
