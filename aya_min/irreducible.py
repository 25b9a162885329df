"""Irreducible losses on disk: the loss of each supervised token under a model that was trained on held-out
rows of the same kind (arXiv 2206.07137, section 3). It is what no training on the other rows will take away:
the noise of a wrong label, for example.

They are computed once (`train.py irreducible`) and read by runs of --select. The file's keys name the
tokenizer, the greatest length and each example, so that no run takes those of other texts for its own.

    losses (tokens,) fp32 nats    counts (N,) supervised tokens of each example    examples (N,) print_of each
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import distributed
from .files import publish_file, refuse_pipe, scratch

TENSORS = ("losses", "counts", "examples")
FORMAT = "aya_min irreducible losses, 1"


def print_of(example):
    """63 bits that name an example: its ids and which of them are supervised."""
    content = len(example.ids).to_bytes(8, "little") + example.ids.tobytes() + example.mask.tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def prints_of(examples):
    """(N,) int64"""
    return torch.from_numpy(np.array([print_of(example) for example in examples], np.int64))


def sha256_of(*tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def tokenizer_print(tokenizer):
    return hashlib.sha256(tokenizer.bpe.to_str().encode()).hexdigest()


def write(path, losses, examples, tokenizer, limit, model_print):
    """Write the losses, a tensor (tokens,) for each example, in nats. limit: the most tokens of an example.
    ValueError if the file exists or cannot be written."""
    path, flat = Path(path), torch.cat(losses).float()
    tensors = {"losses": flat, "counts": torch.tensor([len(each) for each in losses]),
               "examples": prints_of(examples)}
    about = {"format": FORMAT, "tokenizer": tokenizer_print(tokenizer), "max_length": str(limit),
             "model": model_print, "sha256": sha256_of(*tensors.values())}
    with scratch(path) as folder:
        try:
            save_file(tensors, folder / "file", about)
        except SafetensorError as error:
            raise ValueError(f"{path}: the irreducible losses cannot be written ({error}); make room, or "
                             "give another file") from None
        publish_file(folder / "file", path)


def read(path, examples, tokenizer, limit):
    """[tensor (tokens,) of each example] of a file. ValueError, with what is other, for a file of another
    tokenizer, greatest length or other examples, and for a damaged one. A collective."""
    def load():
        refuse_pipe(path)
        try:
            with safe_open(path, "pt") as file:
                about, names = file.metadata() or {}, set(file.keys())
                found = names == set(TENSORS) and about.get("format") == FORMAT
                tensors = [file.get_tensor(name) for name in TENSORS] if found else []
        except (SafetensorError, OSError) as error:
            raise ValueError(f"--irreducible {path}: cannot be read ({error}); give a file that train.py "
                             "irreducible wrote") from None
        if not found or about.get("sha256") != sha256_of(*tensors):
            raise ValueError(f"--irreducible {path}: not as train.py irreducible writes it; write it again")
        if fault := what_is_other(about, tensors[2], examples, tokenizer, limit):
            raise ValueError(f"--irreducible {path}: {fault}")
        return tensors
    losses, counts, _ = distributed.from_main(load)
    return list(losses.split(counts.tolist()))


def what_is_other(about, prints, examples, tokenizer, limit):
    """A text that says why a file's losses are not those of these examples; None if they are."""
    again = "write it again with the --data, --max-length and tokenizer of this run"
    if about.get("tokenizer") != tokenizer_print(tokenizer):
        return ("its model has another tokenizer than --model, so its tokens are others; train the smaller "
                "model with this tokenizer (--tokenizer)")
    if about.get("max_length") != str(limit):
        return (f"examples of at most {about.get('max_length')} tokens, not {limit} (--max-length, or the "
                f"positions of a model); {again}")
    if len(prints) != len(examples):
        return f"losses of {len(prints)} examples, not of the {len(examples)} of --data; {again}"
    different = (prints != prints_of(examples)).nonzero()[:, 0].tolist()
    if different:
        return (f"other rows: {len(different)} of {len(prints)} examples, the first is "
                f"{examples[different[0]].where}; {again}")
    return None
