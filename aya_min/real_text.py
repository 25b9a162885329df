"""Real text for claims: parallel sentences, sentences with topics (SIB-200), and a base pretrained on them.

The files are not part of this repository, because their licences are others' (NTREX-128 and SIB-200 are
CC BY-SA, Tatoeba is CC BY). They stand in `shared/data` beside the repository's folder:

    parallel.jsonl          {"id", "language", "text"}
    classification.jsonl    {"id", "language", "text", "label"}

Rows of one id are translations of each other, so an id is in one split only. Splits are those of the world.
"""

import hashlib
import random
from pathlib import Path

import torch

from .config import Pretrain
from .files import dumps, parse_json, read_bytes
from .model import CohereForCausalLM, init_weights
from .model_config import model_preset
from .pipeline_steps import data_file, stage_settings, step
from .stages import train_stage
from .tokenizer import train_tokenizer
from .world import split_named

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
# Sentences with topics are few: of seven ids of a topic so many are in each split.
TURNS = ("train", "test", "train", "preference", "train", "validation", "train")
TOPICS = ("entertainment", "geography", "health", "politics", "science/technology", "sports", "travel")
MAX_LENGTH = 192                # tokens; the longest sentence with a topic has 176 at preset tiny


def check(name):
    """ValueError where a file is not there. name: "parallel" or "classification"."""
    if not (FOLDER / f"{name}.jsonl").is_file():
        raise ValueError(f"{FOLDER / name}.jsonl: not there, and no part of this repository "
                         "(aya_min/real_text.py says what it holds); put it there, or try claims without it "
                         "by their names")


def rows(name):
    """All rows of a file, in its order."""
    check(name)
    path = FOLDER / f"{name}.jsonl"
    lines = read_bytes(path).splitlines()
    return [parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def sentences(split, count, seed):
    """`count` parallel sentences, or all there are, of one split, in which languages take turns."""
    found = [row for row in rows("parallel") if split_named(row["id"]) == split]
    random.Random(f"{split}/{seed}").shuffle(found)
    turn, places = {}, []
    for row in found:
        turn[row["language"]] = turn.get(row["language"], 0) + 1
        places.append((turn[row["language"]], row["language"]))
    order = sorted(range(len(found)), key=places.__getitem__)
    return [found[i] for i in order[:count]]


def languages(split, count, seed):
    """The same with the language as the label."""
    return [{**row, "label": row["language"]} for row in sentences(split, count, seed)]


def translations(source, target, split):
    """The pairs of two languages in one split, {"prompt", "completion", "question_id"}, in file order."""
    found = {}
    for row in rows("parallel"):
        if split_named(row["id"]) == split:
            found.setdefault(row["id"], {})[row["language"]] = row["text"]
    return [{"prompt": both[source], "completion": both[target], "question_id": name}
            for name, both in found.items() if {source, target} <= both.keys()]


def topics(split):
    """The sentences with topics of one split. Each topic's ids are dealt to the splits in TURNS."""
    found, dealt = rows("classification"), {}
    for number, (_, name) in enumerate(sorted({(row["label"], row["id"]) for row in found})):
        dealt[name] = TURNS[number % len(TURNS)]
    return [row for row in found if dealt[row["id"]] == split]


def base(run):
    """Tokenizer and base of the recipe's size, pretrained from scratch on parallel sentences of the training
    split, as pipeline.build_base does it on the world's text. -> its folder"""
    r, texts = run.recipe, sentences("train", run.recipe.corpus // 10, run.recipe.seed)
    name = f"real-base-{hashlib.sha256(dumps(texts).encode()).hexdigest()[:10]}"

    def make(folder, resume):
        tokenizer = train_tokenizer((row["text"] for row in texts), r.vocab_size)
        model = CohereForCausalLM(model_preset(r.model, tokenizer.vocab_size))
        model = init_weights(model, torch.Generator().manual_seed(r.seed))
        settings = stage_settings(run, Pretrain, learning_rate=r.base_learning_rate, warmup_steps=50,
                                  max_length=MAX_LENGTH)
        train_stage("pretrain", model, tokenizer, [data_file(run, name, texts)], settings, folder, run.device,
                    resume=resume)
    step(run, name, f"pretraining a base on {len(texts)} real sentences", make)
    return run.folder / "steps" / name / "model"
