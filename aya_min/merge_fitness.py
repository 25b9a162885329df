"""What a search over merges measures: {task: number} of a merged model on the fitness or the held-out split.

Higher is better. An `evaluate` is any function (weights, split) -> {task: number}; split is "fitness" or
"held-out". of_models and of_folders make one from a `measure`, which gets the merged model in memory or as a
folder. Three measures are here: the embedded world's oracle, a held-out loss, any command.
"""

import random
import shlex
import subprocess
from pathlib import Path

import torch
from tqdm import tqdm

from . import merge_methods, weights as model_folders
from .config import Reading
from .data import batches_in_order, collate, load_examples, load_prompts, slots_of
from .evaluate_answers import grade_answers
from .evaluate_rates import group
from .files import parse_json, scratch
from .languages import CLUSTERS, home_clusters
from .loop import evaluate as held_out_metrics
from .merge_config import OUTPUT_DTYPES
from .model import CohereForCausalLM
from .sampling import answer_rows
from .merge_folders import (averaged_names, is_finite, merge_folders, over_pieces_of, read_sources,
                            refuse_infinite, workers)
from .stages import sft_loss
from .tensorfiles import DTYPES, places
from .world_oracle import check_question

HOME = home_clusters(CLUSTERS)
BY = {"task": lambda row: row["task"], "language": lambda row: row["language"],
      "cluster": lambda row: HOME[row["language"]]}


def of_models(folders, measure, dtype=None, device="cpu", allow_config_differences=False):
    """An `evaluate` that merges into one model in memory. measure(model, tokenizer, split) -> {task: number}.

    Each call reads the folders piece by piece. Memory holds one fp32 model; the system's file cache holds as
    much of the pool as fits. The numbers are those of the folder that merge_folders would write: same sums,
    rounded to the same dtype. Raises ValueError if the models do not match or one is no language model.
    """
    headers = read_sources([Path(folder) for folder in folders], allow_config_differences)[1]
    kinds = [type(model_folders.load_meta(folder)[0]) for folder in folders]
    if other := [kind for kind in kinds if kind is not CohereForCausalLM]:
        raise ValueError(f"{model_folders.ONE[other[0]]} is among the models; a search by --prompts or "
                         "--eval-data takes language models only")
    model, tokenizer = model_folders.load(folders[0], device)
    inputs = [places(header) for header in headers]

    def evaluate(weights, split):
        used = [place for place, weight in zip(inputs, weights) if weight]
        used_weights = [weight for weight in weights if weight]
        with torch.no_grad(), workers() as pool, tqdm(disable=True) as bar:
            state = model.state_dict()
            for name in averaged_names(headers[0]):
                over_pieces = over_pieces_of([name], used, pool, device, bar)
                merge_piece = merge_methods.linear(over_pieces, used_weights)
                output_dtype = DTYPES[OUTPUT_DTYPES.get(dtype, headers[0][name][1])]
                flat = state[name].view(-1)

                def write(start, tensors):
                    piece = merge_piece(start, tensors).to(output_dtype)
                    if not is_finite(piece):
                        refuse_infinite(name, used, f"{name}, merged, as {piece.dtype},")
                    flat[start:start + len(piece)] = piece
                for _ in over_pieces(write):
                    pass
        return measure(model, tokenizer, split)
    return evaluate


def of_folders(folders, measure, out, dtype=None, device="cpu", allow_config_differences=False):
    """An `evaluate` that writes each merge to a folder next to `out` and removes it afterwards.

    measure(folder, split) -> {task: number}.
    """
    def evaluate(weights, split):
        with scratch(out) as place:
            folder = merge_folders(folders, place / "model", "linear", weights=weights, dtype=dtype,
                                   device=device, progress=False,
                                   allow_config_differences=allow_config_differences)
            return measure(folder, split)
    return evaluate


def graded(model, tokenizer, rows, max_new_tokens):
    """The rows with the model's greedy answers and the oracle's verdicts."""
    answers = answer_rows(model, tokenizer, rows, 1, max_new_tokens, 0.0)
    return grade_answers([{**row, "completion": answer["completion"]}
                          for row, (answer,) in zip(rows, answers)])


def task_of(row, by):
    """The task of a question. by: names in BY; several make each combination a task."""
    return " ".join(BY[kind](row) for kind in by)


def by_oracle(splits, by, max_new_tokens):
    """measure(model, tokenizer, split): the oracle's mean grade (0-3) for each task.

    splits: {split: questions}.
    """
    def measure(model, tokenizer, split):
        rows = graded(model, tokenizer, splits[split], max_new_tokens)
        parts = group(rows, lambda row: task_of(row, by))
        return {task: sum(row["grade"] for row in part) / len(part) for task, part in parts.items()}
    return measure


def loss_by_language(model, examples, device):
    """{"loss": ..., "loss/fr": ..., ...} of the examples, in nats per token."""
    slots = slots_of(examples)
    batches = batches_in_order(examples, lambda some: collate(some, slots=slots))
    return held_out_metrics(model, sft_loss, batches, device)


def by_loss(splits):
    """measure(model, tokenizer, split): minus the held-out loss in nats per token, for each file, or for each
    language of a single file.

    splits: {split: {task: examples}}.
    """
    def measure(model, tokenizer, split):
        device = next(model.parameters()).device
        with torch.no_grad():
            losses = {task: loss_by_language(model, some, device) for task, some in splits[split].items()}
        if len(losses) > 1:
            return {task: -found["loss"] for task, found in losses.items()}
        (found,) = losses.values()
        by_language = {key.removeprefix("loss/"): -loss
                       for key, loss in found.items() if key.startswith("loss/")}
        return by_language or {"loss": -found["loss"]}
    return measure


def by_command(command):
    """measure(folder, split): run the command with {model} and {split} filled in.

    The last line that it prints must be a JSON object of numbers by task; else ValueError.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--command {command!r} cannot be read ({error}); quote it for a shell") from None

    def measure(folder, split):
        filled = [word.replace("{model}", str(folder)).replace("{split}", split) for word in words]
        done = subprocess.run(filled, stdout=subprocess.PIPE)
        lines = done.stdout.strip().splitlines() or [b""]               # bytes: other lines need not be UTF-8
        try:
            found = parse_json(lines[-1], "the last line") if done.returncode == 0 else None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"--command: {shlex.join(filled)} ended with exit code {done.returncode} and "
                             f"the last line {lines[-1][:200]!r}; it must end with 0 and a JSON object of "
                             "numbers by task")
        return found
    return measure


def halves(items, seed, key):
    """Two halves of the items, drawn with the seed; items with the same key(item) stay together."""
    keys = sorted({key(item) for item in items})
    random.Random(seed).shuffle(keys)
    first = set(keys[:(len(keys) + 1) // 2])
    return [item for item in items if key(item) in first], [item for item in items if key(item) not in first]


def together(questions):
    """A key(question) for `halves`, equal for questions that must be in the same half.

    These share a question_id or a prompt, directly or through other questions.
    """
    home = {}

    def find(key):
        while home.setdefault(key, key) != key:
            key = home[key]
        return key
    for row in questions:
        ends = sorted((find(("id", row["question_id"])), find(("prompt", str(row["prompt_messages"])))))
        home[ends[1]] = ends[0]
    return lambda row: find(("id", row["question_id"]))[1]


def refuse_shared(what, fitness, held_out, held_out_places):
    """Raise ValueError if a held-out row shares a value with a fitness row under the same key.

    fitness, held_out: rows {key: value}. held_out_places: where each held-out row was read.
    """
    seen = {(key, value) for row in fitness for key, value in row.items()}
    both = [place for row, place in zip(held_out, held_out_places) if not seen.isdisjoint(row.items())]
    if both:
        raise ValueError(f"{len(both)} of {len(held_out)} held-out {what} are among the fitness data, the "
                         f"first is {both[0]}; remove them from one of the two")


def read_questions(paths, reading, folder):
    """The questions in files, read as `reading` (a config.Reading) says, for the model in a folder.

    Raises ValueError for a row that the oracle cannot grade.
    """
    rows = load_prompts(paths, reading, model_folders.load_meta(folder)[1])
    for row in rows:
        try:
            if not isinstance(row.get("question_id"), str) or not {"task", "args", "language"} <= row.keys():
                raise ValueError("a question has question_id (a text), language, task and args")
            check_question(row)
        except ValueError as error:
            raise ValueError(f"{row['prompt_where']}: not a question of the embedded world, which the oracle "
                             f"needs ({error}); measure others with --eval-data or --command") from None
    return rows


def loss_splits(folder, eval_data, held_out, max_length, seed, reading=None):
    """{split: {file's name: examples}}. Without held-out files each file is cut into halves, with identical
    examples in the same half. Raises ValueError if the two splits of a file differ in their languages."""
    splits = {"fitness": {}, "held-out": {}}
    stems = [Path(path).stem for path in eval_data]
    for i, path in enumerate(eval_data):
        examples = examples_of(path, reading, folder, max_length)
        if held_out:
            parts = examples, examples_of(held_out[i], reading, folder, max_length)
        else:
            parts = halves(examples, seed, lambda example: example.ids.tobytes())
        if {example.language for example in parts[0]} != {example.language for example in parts[1]}:
            raise ValueError(f"{path}: the fitness and the held-out examples are not of the same languages; "
                             "give more examples, or --held-out with the same languages")
        name = stems[i] if stems.count(stems[i]) == 1 else str(path)
        splits["fitness"][name], splits["held-out"][name] = parts
    return splits


def examples_of(path, reading, folder, max_length):
    """The examples of a file, read as `reading` (a config.Reading) says, for the model in a folder."""
    model, tokenizer, _ = model_folders.load_meta(folder)
    limit = min(max_length, model.config.max_position_embeddings)
    return load_examples([path], tokenizer, limit, reading or Reading(too_long="skip"))
