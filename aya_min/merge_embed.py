"""Embeddings of domains, of which Nexus' router makes those of the experts (arXiv 2408.15901, section 2).

The paper takes the mean of a text embedder's vectors over a domain's data. Ours are hidden states of a model
that is at hand: h(x), the mean over a text's tokens of the last hidden states, after the norm; then the mean
of h over the texts. A file of embeddings, which may be made elsewhere, is a JSON object

    {"domains": {NAME: [number, ...]}, "model": FOLDER, "sha256": {FILE: SHA-256 of the model's weights}}

The last two say which model made them. `merge.py upcycle` keeps them as EMBEDDER in the mixture's folder,
which training copies along, so that the embedding of a new domain is made by the same model.
"""

from pathlib import Path

import torch

from . import weights
from .command import shortened
from .config import Reading
from .data import batches_in_order, collate, load_examples
from .files import own_file, read_json, sha256
from .tensorfiles import read_header

EMBEDDER = "embedder.json"


@torch.no_grad()
def embed(folder, data, reading=None, max_length=1024, device="cpu", batch_size=32):
    """{name: embedding} of domains, lists of hidden_size numbers. data: {name: path of a JSONL file of
    conversations or {"text"}}, read as `reading` (a config.Reading) says.

    What is longer than max_length tokens is left out and counted; {"text"} is cut into several texts.
    ValueError for a row that cannot be read, and if nothing is left.
    """
    if (kind := weights.read_config(folder)[1]) is weights.EncoderDecoder:
        raise ValueError(f"{folder}: {weights.ONE[kind]}; embeddings are those of a language model of a "
                         "decoder alone")
    model, tokenizer = weights.load(folder, device)
    limit = min(max_length, model.config.max_position_embeddings)
    reading, found = reading or Reading(too_long="skip"), {}
    examples = {name: load_examples([path], tokenizer, limit, reading) for name, path in data.items()}
    for name, some in examples.items():
        total = torch.zeros(model.config.hidden_size, dtype=torch.float64)
        for _, batch in batches_in_order(some, collate, batch_size):
            ids, lengths = batch.input_ids.to(device), batch.lengths.to(device)
            states = model.model(ids, lengths)                              # (B, T, hidden_size)
            real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            sums = torch.where(real[..., None], states, 0).sum(1)           # (B, hidden_size)
            total += (sums / lengths[:, None]).sum(0).double().cpu()
        if not total.isfinite().all():
            raise ValueError(f"{data[name]}: its embedding by {folder} is not finite; mend that model")
        found[name] = (total / len(some)).tolist()
    return found


def embedder_of(folder):
    """{"model", "sha256"} of a file of embeddings that the model in a folder makes."""
    files = sorted({file for file, _, _ in read_header(folder).values()})
    return {"model": str(folder), "sha256": {file.name: sha256(file) for file in files}}


def read_domains(path):
    """({name: embedding}, {"model", "sha256"} or {}) of a file. ValueError if it has no "domains"."""
    raw = read_json(path, "give a file of merge.py embed")
    domains = raw.get("domains")
    if not isinstance(domains, dict) or not domains:
        raise ValueError(f'{path}: no "domains" in it, an object of embeddings by name; give a file of '
                         "merge.py embed")
    return domains, {key: raw[key] for key in ("model", "sha256") if raw.get(key) is not None}


def recorded(folder):
    """{"model", "sha256"} of the model that made the embeddings of a mixture; {} where that is unknown."""
    path = own_file(folder, EMBEDDER)
    return read_json(path) if path else {}


def refuse_other_embedder(folder, embedder):
    """ValueError if the embeddings of a mixture are known to be of another model than this one's."""
    known = recorded(folder)
    if known.get("sha256") and embedder.get("sha256") and known["sha256"] != embedder["sha256"]:
        raise ValueError(f"the domains of {folder} were embedded by {known.get('model')}, not by "
                         f"{embedder.get('model')} as it is now; embed the new domain with that model")


def embed_like(folder, name, path, model=None, reading=None, device="cpu"):
    """The embedding of a new domain of the mixture in a folder, by the model that made those of the others.

    model: where that model is, if it is unknown or moved. reading: see `embed`. ValueError if the model is
    unknown or another.
    """
    model = model or recorded(folder).get("model")
    if not isinstance(model, str):
        raise ValueError(f"{folder} does not say which model embedded its domains ({EMBEDDER}, "
                         f"{shortened(model)}); give it with --model, or the new embedding with --domains")
    if not (Path(model) / "config.json").exists():
        raise ValueError(f"{model}, which embedded the domains of {folder}, is no model folder; say with "
                         "--model where it is")
    refuse_other_embedder(folder, embedder_of(model))
    return embed(model, {name: path}, reading, device=device)[name]
