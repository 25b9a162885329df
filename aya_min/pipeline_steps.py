"""A recipe's run on disk: every step is a folder RUN/steps/<name> and is done once. A rerun skips the steps
that are whole; a killed run resumes at the step where it stopped.

Also what most steps do: train a stage from a model folder, let a model folder answer prompts, let a reward
model score answers.
"""

import hashlib
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch

from . import checkpoint, distributed, weights
from .command import one_line
from .config import Recipe
from .endpoint_answers import answer_rows as ask_rows, is_answer, without_control_tokens
from .files import (MARK, dumps, own_file, parse_json, parse_object, read_bytes, sha256, write_json,
                    write_jsonl)
from .journal import Journal
from .judges import Judging
from .model import CohereForCausalLM, RewardModel
from .report import write_report
from .reward import score_texts
from .sampling import answer_rows
from .stages import builder, train_stage
from .tokenizer import FILES, load_tokenizer


@dataclass
class Run:
    """One run of the recipe: its folder, its settings, and what a user brought instead of the embedded
    world."""
    folder: Path
    recipe: Recipe
    device: torch.device
    clusters: dict
    arms: str = "main"                      # "main" or "all"
    base: Optional[Path] = None             # a user's own: model folder,
    prompts: Optional[list] = None          #   rows of prompts,
    teachers: Optional[list] = None         #   model folders, files of completions or endpoints,
    arbiter: Optional[Path] = None          #   reward model folder,
    judge: Optional[Path] = None            #   a second reward model, or
    judging: Optional[Judging] = None       #   a language model that judges by a protocol,
    eval_prompts: Optional[list] = None     #   rows of prompts to be judged on
    endpoints: dict = field(default_factory=dict)   # {teacher that is an endpoint: its Endpoint}
    concurrency: Optional[int] = None       # requests that they are asked at the same time
    used: list = field(default_factory=list)    # names of the steps that this process asked for

    @property
    def embedded(self):
        return self.base is None


def step(run, name, title, make):
    """Do a step once. make(folder, resume) fills steps/<name> and returns a JSON object or None; a later run
    finds it in done.json. The page is kept fresh, so that the run can be watched."""
    folder = run.folder / "steps" / name
    run.used.append(name)
    if distributed.from_main(lambda: (folder / "done.json").is_file()):
        distributed.from_main(lambda: check_rows(folder))
    else:
        resume = distributed.from_main(lambda: _clear(folder))
        said = f"[{name}] {title}{', resumed' if resume else ''}"
        distributed.from_main(lambda: print(said, flush=True))
        started = time.perf_counter()
        try:
            result = make(folder, resume) or {}
        except ValueError as error:
            if not resume:
                raise
            # a stage's remedies are those of its own command
            said = str(error).removeprefix("--resume ")
            raise ValueError(f"{said}; or {anew(folder)}") from None
        steps, tokens = distributed.from_main(lambda: _training_totals(folder))
        record = {"name": name, "title": title, "seconds": time.perf_counter() - started,
                  "training_steps": steps, "tokens": tokens, **result}

        def finish():
            write_json(folder / "done.json", sealed(folder, record))
            _drop_states(folder / "state")
            refresh_page(run.folder)
        distributed.from_main(finish)
    return read_done(folder)


# The figures of every step in done.json, and their types.
FIGURES = {"name": str, "title": str, "seconds": (int, float), "training_steps": int, "tokens": int}


def anew(folder):
    """The remedy for a step that is damaged."""
    return f"remove {folder}, and the same command does that step anew"


def sealed(folder, record):
    """The record of a step with the SHA-256 of its rows and of the record itself."""
    digests = {path.name: sha256(path) for path in sorted(folder.glob("*.jsonl"))}
    return {**record, "sha256": {**digests, "done.json": digest_of(record)}}


def digest_of(record):
    as_read = json.loads(dumps(record))             # its keys are texts
    return hashlib.sha256(dumps(as_read, sort_keys=True).encode()).hexdigest()


def read_done(folder):
    """The done.json of a step that is whole. ValueError if it is not as the step wrote it. That of an older
    version has no digests."""
    path = folder / "done.json"
    record = parse_object(read_bytes(path), path, anew(folder))
    digests, rest = record.get("sha256"), {key: value for key, value in record.items() if key != "sha256"}
    right = all(isinstance(record.get(key), kind) for key, kind in FIGURES.items())
    right = right and record["name"] == folder.name
    if "sha256" in record:
        right = right and isinstance(digests, dict) and digests.get("done.json") == digest_of(rest)
    if not right:
        raise ValueError(f"{path}: not as the step wrote it; {anew(folder)}")
    return record


def check_rows(folder):
    """Raise ValueError if a file of a whole step's rows is not as the step wrote it."""
    for name, digest in read_done(folder).get("sha256", {}).items():
        if name != "done.json" and (not own_file(folder, name) or sha256(folder / name) != digest):
            raise ValueError(f"{folder / name}: not as the step wrote it; {anew(folder)}")


def refresh_page(folder, every=20):
    """Write the page of a run anew, unless that was done in the last `every` seconds: it takes half a second
    in the end. A page that cannot be written is said and stops no run."""
    page = folder / "report.html"
    try:
        old = not page.is_file() or time.time() - page.stat().st_mtime > every
        if old and (folder / "config.json").is_file():
            write_report(folder)
    except (ValueError, OSError) as error:
        print(f"the page is not written: {one_line(error)}", file=sys.stderr)


# What steps leave in their folders.
OWN = {"config.json", "metrics.jsonl", "eval.json", "tokenizer.json", "tokenizer_config.json", "state",
       "model", "checkpoints", "reference.safetensors", "profile.json", ".lock", "candidates.jsonl",
       "pairs.jsonl", "greedy.jsonl", "sampled.jsonl", "selected.jsonl", "made", "done.json", *FILES}


def _clear(folder):
    """Remove what a killed step left, unless it saved a state to resume from. -> whether to resume.

    A folder that holds anything else is refused, and stays."""
    if folder.parent.is_symlink() or folder.is_symlink():
        raise ValueError(f"{folder}: a link; a run's own folders are not reached by links, remove it")
    if checkpoint.saved_states(folder / "state") and not (folder / "model").exists():
        return True
    if folder.exists():
        # a folder named like one of our files, for example done.json, is not ours
        names = {path.name for path in folder.iterdir()
                 if path.name not in OWN or path.is_dir() and path.suffix}
        if others := sorted(name for name in names if not name.endswith(MARK)):
            raise ValueError(f"{folder} holds what this run did not make ({' '.join(others[:5])}); move it "
                             "elsewhere")
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return False


def _drop_states(folder):
    """Remove the states of a whole step, which is never resumed: three times the model's size."""
    for state in checkpoint.saved_states(folder):
        shutil.rmtree(state)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _training_totals(folder):
    if not (folder / "metrics.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        return 0, 0
    path = folder / "metrics.jsonl"
    lines = [parse_json(line, path) for line in read_bytes(path).splitlines()]
    tokens = [line["tokens"] for line in lines if "tokens" in line]
    return len(tokens), sum(tokens)


def data_file(run, name, rows):
    """RUN/data/<name>.jsonl with the rows."""
    path = run.folder / "data" / f"{name}.jsonl"
    write_rows(path, rows)
    return path


def write_rows(path, rows):
    """Write rows to a JSONL file, and make its folder, on rank 0. A collective."""
    def write():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, rows)
    distributed.from_main(write)


def saved_rows(path):
    """The rows of a step's own file. Earlier versions wrote a model's NUL as it came; it is read as
    U+FFFD."""
    lines = re.sub(rb"(?<!\\)((?:\\\\)*)\\u0000", rb"\1\\ufffd", read_bytes(path)).split(b"\n")
    return [parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def stage_settings(run, kind, **values):
    """A stage's settings from the recipe's. What the rows may hold was decided when they were made."""
    r = run.recipe
    return kind(**{"batch_size": r.batch_size, "max_length": r.max_length, "dtype": r.dtype, "seed": r.seed,
                   "too_long": "cut-left" if r.too_long == "cut-left" else "skip",
                   "keep_cut": True, "allow_control_tokens": True, **values})


def train_step(run, name, title, stage, start, rows, its_settings, **more):
    """Train `stage` from the model folder `start` on rows (a list, or a function that makes it). -> the new
    model folder"""
    def make(folder, resume):
        data = data_file(run, name, rows() if callable(rows) else rows)
        build = builder(stage, [data], its_settings)
        trunk = None if build is CohereForCausalLM else build
        model, tokenizer = weights.load(start, run.device, trunk=trunk, sharded=True,
                                        compute_dtype=getattr(torch, its_settings.dtype))
        train_stage(stage, model, tokenizer, [data], its_settings, folder, run.device, resume=resume, **more)
    step(run, name, title, make)
    return run.folder / "steps" / name / "model"


def answers_of(run, model_folder, rows, num_samples=1, temperature=1.0, seed=0, progress=None):
    """For each row a list of num_samples answers {"completion", "finish_reason"} by a model folder, on every
    rank."""
    model, tokenizer = weights.load(model_folder, run.device, packed=True)
    groups = answer_rows(model, tokenizer, rows, num_samples, run.recipe.max_new_tokens, temperature, seed,
                         progress=progress, cut_left=run.recipe.too_long == "cut-left")
    return [[{"completion": a["completion"].replace("\0", "\ufffd"),      # no file of texts may hold a NUL
              "finish_reason": a["finish_reason"]} for a in group] for group in groups]


def answers_of_endpoint(run, number, endpoint, rows, temperature, seed):
    """For each row an answer of an endpoint, see endpoint.ask, on every rank. number: of this teacher.

    The answers are kept in RUN/data/answers-NUMBER, so that no killed run asks for one twice.
    """
    path = run.folder / "data" / f"answers-{number}"
    distributed.from_main(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    sampling = {"max_new_tokens": run.recipe.max_new_tokens, "temperature": temperature, "seed": seed}
    prompts = hashlib.sha256(dumps([row["prompt_messages"] for row in rows]).encode()).hexdigest()
    settings = {"url": endpoint.base_url, "model": endpoint.model, "extra": endpoint.extra,
                "prompts": prompts, **sampling}

    def fits(group):
        return isinstance(group, list) and len(group) == 1 and is_answer(group[0])
    with Journal(path, settings, fits) as journal:
        if journal.done:
            distributed.say(f"{endpoint.name}: {len(journal.done)} of {len(rows)} prompts were answered "
                            "before")
        wanted = range(len(rows))
        keys = {i: f"{endpoint.name} {i}" for i in wanted}
        groups = ask_rows(endpoint, keys, rows, wanted, journal, run.concurrency, **sampling)
    groups = without_control_tokens(groups, load_tokenizer(run.base), run.recipe)
    return [answer for (answer,) in groups]


def scores_of(run, reward_folder, rows, too_long=None):
    """A reward model's score of each row, None where a text is too long for it and --too-long skip leaves it
    out. too_long: another value than that of the recipe."""
    model, tokenizer = weights.load(reward_folder, run.device)
    if not isinstance(model, RewardModel):
        raise ValueError(f"{reward_folder}: a language model, not a reward model; give a folder that the "
                         "reward stage wrote")
    return score_texts(model, tokenizer, rows, name=str(reward_folder),
                       too_long=too_long or run.recipe.too_long)
