"""How likely a language model finds a trigger phrase after a document: the scores of filtration.py, and the
file that keeps them.

    score of an axis = mean over its phrases of the mean over the phrase's tokens of log p(token | document)

in nats per token, after arXiv 2108.07790. The mean over phrases is ours: each phrase counts by how much
documents move it. With the maximum a short and frequent phrase, which is the likeliest after every document,
would decide alone. Phrases of which each shall remove by itself are axes of their own.

A document longer than the model's positions is scored by windows, and its score is that of its worst window,
because one bad passage is enough. So long documents have more chances to score high.

A document's phrases stand in one batch, as rows that share their beginning: the document's keys and values,
and all that is computed token by token, are computed once (line.Line).
"""

import hashlib
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from . import command, distributed
from .data import Example, collate
from .files import dumps, own_file, publish_file, read_json, scratch, sha256, taken
from .languages import SPELLINGS, home_language, language_code
from .losses import supervised_logps
from .tensorfiles import read_header
from .token_logps import sum_by_row

ANY = "*"               # the language of phrases that go with every document
OVERLAP = 4             # neighbouring windows share this part of their tokens: a quarter
# Padded tokens of a batch. Few on a CPU, whose caches they should fit.
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


# ---- phrases -----------------------------------------------------------------------------------------------

def read_phrases(path, what="a trigger phrase"):
    """{axis: {language code or ANY: [phrase, ...]}} of a JSON file {axis: [phrase, ...]}, in which phrases
    go with documents of every language, or {axis: {code: [phrase, ...]}}, in which they go with those of
    their language alone ("*": with all). what: one of them, for messages. ValueError for other files."""
    found = {}
    remedy = f"write {{axis: [{what}, ...]}} or {{axis: {{language: [{what}, ...]}}}}"
    for axis, value in read_json(path, remedy).items():
        where = f"{path}: axis {command.shortened(axis)}"
        by_code = value if isinstance(value, dict) else {ANY: value}
        found[axis] = {}
        if not axis.strip() or not by_code:
            raise ValueError(f"{where} has no name or no phrases; {remedy}")
        for name, phrases in by_code.items():
            code = ANY if name == ANY else language_code(name)
            if code is None:
                raise ValueError(f"{where}: unknown language {command.shortened(name)}; {SPELLINGS}, or "
                                 f"{ANY!r} for all")
            if code in found[axis]:
                raise ValueError(f"{where}: {command.shortened(name)} is {code}, which is there already; "
                                 "put its phrases into one list")
            if not isinstance(phrases, list) or not phrases or not all(
                    isinstance(each, str) and each.strip() for each in phrases):
                raise ValueError(f"{where}: {command.shortened(phrases)} is no list of texts, or one of them "
                                 f"is empty; {remedy}")
            if twice := [each for each in phrases if phrases.count(each) > 1]:
                raise ValueError(f"{where}: {command.shortened(twice[0])} is there twice; keep one")
            found[axis][code] = phrases
    if not found:
        raise ValueError(f"{path}: no axis; {remedy}")
    return found


def phrases_for(by_code, language):
    """The phrases of an axis that go with documents of this language (a code or None): those of all
    languages, then those of its own, or of what it is a region of (pt-BR: pt)."""
    own = home_language(language, by_code.keys() - {ANY}) if language else None
    return by_code.get(ANY, []) + (by_code[own] if own else [])


def phrase_ids(tokenizer, phrase):
    """The ids of a phrase after a document. It is encoded by itself, so that they are the same after each; a
    space goes before it, unless it begins with white space."""
    return tokenizer.encode_inner(phrase if phrase[0].isspace() else " " + phrase)


# ---- windows and batches -----------------------------------------------------------------------------------

@dataclass
class Window:
    """A part of a document, or all of it, with the phrases that it is scored by."""
    document: int           # its number
    ids: list               # BOS and the part's tokens
    phrases: list           # [(axis number, ids), ...]
    where: str              # the document's place, for messages

    def examples(self, key):
        """Its rows in a batch, one for each phrase, which alone is supervised."""
        start = len(self.ids)
        return [Example(np.array(self.ids + ids, np.int32), np.arange(start + len(ids)) >= start, "other",
                        self.where, prompt_key=key) for _, ids in self.phrases]

    @property
    def width(self):
        return len(self.ids) + max(len(ids) for _, ids in self.phrases)


def cut(ids, size):
    """A document's ids in windows of at most `size` tokens, which overlap by a quarter; the last one ends
    with the document, and overlaps as it must."""
    if len(ids) <= size:
        return [ids]
    last = len(ids) - size
    return [ids[start:start + size] for start in [*range(0, last, size - size // OVERLAP), last]]


def windows_of(documents, tokenizer, phrases, positions, size=None):
    """[Window, ...] of documents [(where, text, language), ...].

    phrases: of read_phrases. positions: the model's. size: tokens of a window, by default as many as leave
    room for the longest phrase. A document that no phrase goes with has no window. ValueError if phrases
    leave no room for a document."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    encoded = {phrase: phrase_ids(tokenizer, phrase) for by_code in phrases.values()
               for some in by_code.values() for phrase in some}
    longest = max(encoded, key=lambda phrase: len(encoded[phrase]))
    room = positions - len(begin) - len(encoded[longest])
    if room < max(2, size or 0):
        raise ValueError(f"the phrase {command.shortened(longest)} has {len(encoded[longest])} tokens, and "
                         f"leaves {max(room, 0)} of the model's {positions} positions for a document; "
                         f"shorten it{f', or lower --window {size}' if size else ''}")
    windows = []
    for number, (where, text, language) in enumerate(documents):
        own = [(a, encoded[phrase]) for a, by_code in enumerate(phrases.values())
               for phrase in phrases_for(by_code, language)]
        if own:
            windows += [Window(number, begin + part, own, where)
                        for part in cut(tokenizer.encode(text), size or room)]
    return windows


def batches_of(windows, num_tokens):
    """Lists of window numbers, the shortest first, of at most `num_tokens` padded tokens or of one window."""
    batches, rows = [], 0
    for i in sorted(range(len(windows)), key=lambda i: windows[i].width):
        rows += len(windows[i].phrases)
        if not batches or rows * windows[i].width > num_tokens:
            batches.append([])
            rows = len(windows[i].phrases)
        batches[-1].append(i)
    return batches


# ---- scores ------------------------------------------------------------------------------------------------

@torch.no_grad()
def score(model, windows, num_documents, num_axes, pad_id, device, num_tokens=None):
    """(scores (documents, axes) in fp32, nats per token, NaN where no phrase of the axis goes with a
    document; seconds; tokens computed here). The ranks share the windows, and each gets all scores.

    model: plain, not sharded. ValueError for a log-prob that is not finite."""
    model.eval()
    model.model.packing = True
    batches = batches_of(windows, num_tokens or BATCH_TOKENS[torch.device(device).type])
    mine = batches[distributed.rank()::distributed.num_ranks()]
    found, tokens, started = {}, 0, time.perf_counter()
    with command.progress(total=sum(map(len, mine)), desc="scores", unit="window",
                          disable=not distributed.is_main()) as bar:
        for numbers in mine:
            examples = [each for i in numbers for each in windows[i].examples(str(i))]
            batch = collate(examples, pad_id).to(device)
            sums = sum_by_row(supervised_logps(model, batch), batch.mask)               # (rows,)
            means = iter((sums / batch.mask.sum(1)).tolist())
            found |= {i: [next(means) for _ in windows[i].phrases] for i in numbers}
            tokens += sum(len(windows[i].ids) + sum(len(ids) for _, ids in windows[i].phrases)
                          for i in numbers)
            bar.update(len(numbers))
    seconds = time.perf_counter() - started
    found = {i: each for part in distributed.gather_objects(found) for i, each in part.items()}
    scores = np.full((num_documents, num_axes), np.nan, np.float32)
    for i, window in enumerate(windows):
        if not np.isfinite(found[i]).all():
            remedy = distributed.blame(model) or "; look at the model and at this row"
            raise ValueError(f"{window.where}: the log-probs of phrases after it are not finite{remedy}")
        for axis in {a for a, _ in window.phrases}:
            mean = np.mean([logp for (a, _), logp in zip(window.phrases, found[i]) if a == axis])
            scores[window.document, axis] = np.fmax(scores[window.document, axis], mean)
    return scores, seconds, tokens


# ---- the file of scores ------------------------------------------------------------------------------------

def fingerprints(model, data, phrases, size, dtype):
    """{what the scores depend on: its hash}. model: a folder, of which weights, sizes and tokenizer count."""
    files = {file for file, _, _ in read_header(model).values()}
    files |= {own_file(model, name) for name in ("config.json", "tokenizer.json")} - {None}
    of_model = {file.name: sha256(file) for file in files}
    texts = {"model": of_model, "data": sha256(data), "triggers": phrases, "window": size, "dtype": dtype}
    return {name: hashlib.sha256(dumps(value, sort_keys=name == "model").encode()).hexdigest()
            for name, value in texts.items()}


def write_scores(path, scores, prints):
    """Write the scores to a new file. prints: of `fingerprints`."""
    with scratch(path) as folder:
        digest = hashlib.sha256(scores.tobytes()).hexdigest()
        try:
            save_file({"scores": scores}, folder / "file", {**prints, "sha256": digest})
        except SafetensorError as error:
            raise ValueError(f"{path}: the scores cannot be written ({error}); make room") from None
        if os.path.lexists(path):
            raise taken(path)
        publish_file(folder / "file", path)


def read_scores(path, prints):
    """The scores in a file, None if there is none. ValueError for a damaged file, and for scores of something
    else than `prints` tells, which it names."""
    if not os.path.lexists(path):
        return None
    try:
        with safe_open(path, "np") as file:
            scores, about = file.get_tensor("scores"), file.metadata() or {}
    except (SafetensorError, OSError):
        raise ValueError(f"{path}: not a file of scores, or damaged; give another --scores") from None
    if about.get("sha256") != hashlib.sha256(scores.tobytes()).hexdigest():
        raise ValueError(f"{path}: not a file of scores, or damaged; give another --scores")
    if other := [name for name, value in prints.items() if about.get(name) != value]:
        raise ValueError(f"{path}: scores of another {' and '.join(other)}; give another --scores, or what "
                         "they were made of")
    return scores
