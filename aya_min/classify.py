"""Texts with labels, {"text", "label"}: they become items and batches, for a classifier and for its SideNet.

A text has the ids that transformers' tokenizer gives it: BOS, if there is one, and the text, without an end.
"""

from dataclasses import dataclass, replace
from typing import Optional

import numpy as np
import torch

from .classifier import ClassifierConfig, SideNetConfig
from .config import Reading
from .control_tokens import Spelled
from .data import Batch, Example, collate
from .lengths import NOT_SUPERVISED, WAS_CUT, LeftOut, cut_left
from .rows import classified_of, is_cut, is_supervised, read_jsonl


@dataclass
class LabelledText(Example):
    """A text, of which no token is supervised."""
    label: str = ""
    number: Optional[int] = None    # of the label among the model's, set by `arrange`
    id: str = ""                    # the row's id, which parallel texts share, else its place


@dataclass
class LabelledBatch(Batch):
    labels: Optional[torch.Tensor] = None       # (B,) numbers of labels


def load_texts(paths, tokenizer, limit, reading=Reading()):
    """[LabelledText, ...] of the rows that fit into `limit` tokens; --too-long decides on the others.

    What is left out is counted and reported. ValueError at the first wrong row, or if nothing is left."""
    items, left_out, spelled = [], LeftOut(paths, reading, limit), Spelled(tokenizer)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for path in paths:
        for where, row in read_jsonl(path, reading):
            left_out.total += 1
            text, label = classified_of(row, where)
            spelled.look([text], where)
            if is_supervised(row, "", where) is False:
                left_out.add(NOT_SUPERVISED, where)
                continue
            if is_cut(row) and not reading.keep_cut:
                left_out.add(WAS_CUT, where)
                continue
            ids = np.array(begin + tokenizer.encode(text), np.int32)
            if not len(ids):
                raise ValueError(f"{where}: the tokenizer makes no token of this text; remove the line")
            cuts = reading.too_long == "cut-left"
            if len(ids) > limit:
                left_out.add_long(where, len(ids), cuts)
            if len(ids) <= limit or cuts:
                ids, language = cut_left(ids, limit), row.get("language") or "other"
                items.append(LabelledText(ids, np.zeros(len(ids), bool), language, where, where, label,
                                          id=str(row.get("id", where))))
    spelled.report(paths, left_out.total, reading)
    left_out.report(len(items), "texts")
    return items


def labels_in(paths, reading):
    """The labels of all rows in files, sorted. ValueError if there is only one."""
    rows = [row for path in paths for row in read_jsonl(path, reading)]
    names = sorted({classified_of(row, where)[1] for where, row in rows})
    if len(names) < 2:
        raise ValueError(f"{' '.join(map(str, paths))}: all labels are {names[0]!r:.80}, and a classifier "
                         "learns to tell two or more apart; give texts of other labels too")
    return names


def head(paths, settings):
    """The function config -> ClassifierConfig: with --labels, or those of these files. Without either (a dry
    run) there are two: the head is small beside the decoder."""
    names = settings.labels or (labels_in(paths, settings) if paths else ["A", "B"])

    def to_config(config):
        before = getattr(config, "labels", names)
        if before != names:
            raise ValueError(f"--model is a classifier of other labels ({' '.join(before):.200}) than "
                             f"{' '.join(names):.200}; give a language model, or --labels in its order")
        pooling = getattr(config, "pooling", settings.head)
        if pooling != settings.head:
            raise ValueError(f"--model is a classifier whose head reads {pooling}, not {settings.head}; give "
                             f"--head {pooling}, or a language model")
        return ClassifierConfig.of(config, labels=names, pooling=settings.head)
    return to_config


def sidenet_head(paths, settings):
    """The function config of a classifier -> SideNetConfig. In a dry run without data any decoder will do."""
    def to_config(config):
        labels = getattr(config, "labels", None if paths else ["A", "B"])
        if labels is None:
            raise ValueError("--model is no classifier, on which alone a SideNet is trained; give the folder "
                             "that train.py classify wrote")
        num = config.num_hidden_layers
        if settings.layer >= num:
            raise ValueError(f"--layer {settings.layer}: --model has {num} layers; give one from 0 (the "
                             f"embeddings) to {num - 1}, as after the last nothing is left to save")
        return SideNetConfig.of(config, labels=labels, pooling="mean", sidenet_layer=settings.layer,
                                sidenet_size=settings.hidden)
    return to_config


def blank(item, limit, settings):
    """The item, or a text of `limit` tokens, with the first label."""
    text = item or LabelledText(np.zeros(limit, np.int32), np.zeros(limit, bool), "other")
    return replace(text, number=0)


def numbered(items, labels):
    """The items with the numbers of their labels. ValueError for a label that is not among them."""
    places = {label: i for i, label in enumerate(labels)}
    for item in items:
        if item.label not in places:
            raise ValueError(f"{item.where}: label {item.label!r:.80} is none of the model's "
                             f"({' '.join(labels):.200}); correct or remove the line, or train a model with "
                             "it")
    return [replace(item, number=places[item.label]) for item in items]


def arrange(model, items, held_out, settings):
    """(items, held-out items) with the numbers of the model's labels. ValueError if the items, from which is
    learned, have one label only."""
    items, held_out = (numbered(some, model.config.labels) for some in (items, held_out))
    if len({item.number for item in items}) == 1:
        raise ValueError(f"all {len(items)} texts have the label {items[0].label!r:.80} (the first: "
                         f"{items[0].where}), from which nothing is learned; give texts of other labels too")
    return items, held_out


def collate_texts(items, pad_id=0, slots=("other",)):
    """A LabelledBatch of B texts; count is B."""
    batch = collate(items, pad_id, slots)
    batch.count = len(items)
    return LabelledBatch(**vars(batch), labels=torch.tensor([item.number for item in items]))
