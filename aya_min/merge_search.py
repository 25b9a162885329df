"""Search the weights of a linear merge of many checkpoints.

"If You Can't Use Them, Recycle Them" (arXiv 2412.04144): theta = sum_i a_i theta_i with sum_i a_i = 1; CMA-ES
finds the a_i without training. Fitness is the macro average over tasks of what the merged model scores.

The result is compared with the paper's baselines: best single checkpoint, uniform soup, greedy soup (arXiv
2203.05482, recipe 1). All are chosen on the fitness split and measured on a held-out one. The paper's
settings are not public. Ours: the a_i are a softmax of the point that CMA-ES moves; it starts at the better
of the two soups with step size SIGMA and textbook constants; the winner is the best of all its points and of
the mean of each generation.

Every measurement is on disk (OUT.partial) before the next one begins. The search is a function of the seed
and the measurements, so a killed search that is started again visits the same points, finds them measured,
and ends with the same bytes. search.json holds an id of the search, so that one killed after OUT was
published recognises its own result.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from . import cmaes
from .alike import identity
from .command import in_range, progress, shortened
from .config import Reading, settings_from
from .files import own_file, read_json, sha256, write_json, write_jsonl
from .merge_fitness import (by_command, by_loss, by_oracle, halves, loss_splits, of_folders, of_models,
                            read_questions, refuse_shared, task_of, together)
from .merge_front import macro
from .journal import Journal
from .merge_config import check_settings
from .report import write_report
from .merge_folders import already_exists, merge_folders, output_folder, print_tolerated, read_sources

SIGMA = 0.5                 # the first step size of CMA-ES, ours (LOG.md)


def softmax(point):
    """Weights above 0 whose sum is 1."""
    powers = np.exp(point - point.max())
    return (powers / powers.sum()).tolist()


def affine(point):
    """Weights whose sum is 1, any of which may be negative.

    At 0 they have the value (the uniform soup) and the slope of softmax.
    """
    return ((1 + point - point.mean()) / len(point)).tolist()


def average(chosen, num):
    """The weights of the plain average of the chosen ones of `num` models."""
    return [1 / len(chosen) if i in chosen else 0.0 for i in range(num)]


def greedy_soup(value, num):
    """Greedy soup, recipe 1 of arXiv 2203.05482. value(weights) -> number.

    Models join the average from the best to the worst; each stays if the value does not fall.
    """
    alone = [value(average([i], num)) for i in range(num)]
    best, *others = sorted(range(num), key=lambda i: -alone[i])
    soup, reached = [best], alone[best]
    for i in others:
        found = value(average([*soup, i], num))
        if found >= reached:
            soup.append(i)
            reached = found
    return average(soup, num)


def num_generations(num, evaluations):
    """The whole generations, at least one, that fit into the evaluations; each measures its mean too."""
    return max(1, (evaluations - 1) // (cmaes.default_popsize(num) + 1))


def optimise(value, begin, evaluations, seed, weights_of=softmax):
    """The best weights that CMA-ES finds. value(weights) -> number; begin: the weights of the first point.

    evaluations: at most this many, except that at least one whole generation is measured.
    """
    num = len(begin)
    popsize = cmaes.default_popsize(num)
    point = num * np.array(begin) - 1
    if weights_of is softmax:
        # A softmax cannot give 0; such weights start at 0.2 / n.
        point = np.log(np.maximum(begin, 0.2 / num))
    state = cmaes.start(point, SIGMA)
    found = [(value(weights_of(point)), weights_of(point))]
    for _ in range(num_generations(num, evaluations)):
        points = cmaes.ask(state, seed, popsize)
        values = [value(weights_of(point)) for point in points]
        found += zip(values, map(weights_of, points))
        state = cmaes.tell(state, points, values)
        found.append((value(weights_of(state.mean)), weights_of(state.mean)))
    return max(found, key=lambda pair: pair[0])[1]


def without(weights, i):
    """The weights without model i, divided by their sum. ValueError if that is 0."""
    rest = [0.0 if j == i else weight for j, weight in enumerate(weights)]
    if abs(sum(rest)) < 1e-6:
        raise ValueError(f"the weights without model {i + 1} sum to 0, so they cannot be divided by it; "
                         "search without --allow-negative or --leave-one-out")
    return [weight / sum(rest) for weight in rest]


def compare(measured, num, evaluations, seed, weights_of, last, leave_one_out):
    """Choose baselines and search on the fitness split, then measure the choices on the `last` split.

    measured(kind, weights, split) -> {task: number}.
    Returns rows {"name", "weights", "fitness", "held-out"}, one for each baseline and for CMA-ES; and models
    {"weight", "fitness", "held-out"} in order, with "without" (the CMA-ES merge without the model) if
    leave_one_out.
    """
    def value(kind):
        return lambda weights: macro(measured(kind, weights, "fitness"))

    singles = [average([i], num) for i in range(num)]
    alone = [value("single")(weights) for weights in singles]
    best = singles[alone.index(max(alone))]
    uniform = average(range(num), num)
    greedy = greedy_soup(value("greedy soup"), num)
    begin = max([uniform, greedy], key=value("uniform soup"))
    found = optimise(value("CMA-ES"), begin, evaluations, seed, weights_of)
    chosen = [("best single", best), ("uniform soup", uniform), ("greedy soup", greedy), ("CMA-ES", found)]
    rows = [{"name": name, "weights": weights, "fitness": measured(name, weights, "fitness"),
             "held-out": measured(name, weights, last)} for name, weights in chosen]
    models = [{"weight": weight, "fitness": measured("single", single, "fitness"),
               "held-out": measured("single", single, last)} for weight, single in zip(found, singles)]
    if leave_one_out:
        models = [model | {"without": measured("leave one out", without(found, i), last)}
                  for i, model in enumerate(models)]
    return rows, models


def search(folders, out, evaluate, *, evaluations=200, seed=0, allow_negative=False, leave_one_out=False,
           held_out=True, dtype=None, device="cpu", allow_config_differences=False, about=None):
    """Search, and write the new folder `out` with model/ (the merge), search.json, evaluations.jsonl and
    report.html. Returns what search.json holds.

    evaluate: see merge_fitness.py. held_out: whether `evaluate` has that split. about: JSON values that name
    what is measured. Raises ValueError for models that do not match, and for an `out` or an OUT.partial of
    something else.
    """
    folders, out = [Path(folder) for folder in folders], Path(out)
    headers, tolerated = check(folders, out, evaluations, dtype, allow_config_differences)
    model_files = {}
    for folder, header in zip(folders, headers):
        model_files |= identity(folder, header)
    given = {"models": list(map(str, folders)), "model files": model_files, "dtype": dtype,
             "what is measured": about}
    identifying = [given, evaluations, seed, allow_negative, leave_one_out, held_out]
    search_id = hashlib.sha256(json.dumps(identifying).encode()).hexdigest()
    if os.path.lexists(out):
        return published(out, given, search_id)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Journal(partial_of(out), given) as journal:
        print_tolerated(tolerated)
        history, result = measure(folders, evaluate, journal, evaluations, seed,
                                  affine if allow_negative else softmax, leave_one_out, held_out)
        result = {"search": search_id, **result, "what is measured": about}
        with output_folder(out) as made:
            merge_folders(folders, made / "model", "linear", weights=result["rows"][-1]["weights"],
                          dtype=dtype, device=device, progress=False,
                          allow_config_differences=allow_config_differences)
            write_json(made / "search.json", result)
            write_jsonl(made / "evaluations.jsonl", history)
            write_report(made)
        journal.remove()
    return result


def measure(folders, evaluate, journal, evaluations, seed, weights_of, leave_one_out, held_out):
    """(history, result): every measurement in order, and what search.json holds, but for its id.

    What the journal holds is not measured again.
    """
    num, names, history = len(folders), names_of(folders), {}
    popsize = cmaes.default_popsize(num)
    # an upper bound, because some points coincide
    most = 2 * num + num_generations(num, evaluations) * (popsize + 1) + 1
    most += held_out * (num + 3) + leave_one_out * num

    with progress(total=most, desc="search", unit="evaluation", smoothing=0.1) as bar:
        def measured(kind, weights, split):
            key = json.dumps([split, weights])
            if key not in history:
                found = journal.done[key] if key in journal.done else evaluate(weights, split)
                found = checked(found, history)
                if key not in journal.done:
                    journal.add(key, found)
                history[key] = {"kind": kind, "split": split, "macro": macro(found), "weights": weights,
                                "tasks": found}
                best = max(row["macro"] for row in history.values() if row["split"] == "fitness")
                bar.set_postfix_str(f"best {best:.4f}", refresh=False)
                bar.update()
            return history[key]["tasks"]
        rows, models = compare(measured, num, evaluations, seed, weights_of,
                               "held-out" if held_out else "fitness", leave_one_out)

    history = list(history.values())
    tried = sum((row["kind"], row["split"]) == ("CMA-ES", "fitness") for row in history)
    models = [{"name": name, "folder": str(folder)} | model
              for name, folder, model in zip(names, folders, models)]
    best = names[rows[0]["weights"].index(1.0)]
    return history, {"best": best, "evaluations": tried, "popsize": popsize, "seed": seed,
                     "weights": weights_of.__name__, "held-out": held_out, "rows": rows, "models": models}


def partial_of(out):
    return Path(f"{out}.partial")


def published(out, given, search_id):
    """The result in `out`, if this very search published it before it was killed; OUT.partial is removed.

    ValueError for any other folder.
    """
    try:
        may_be_ours = out.is_dir() and not out.is_symlink() and partial_of(out).is_dir()
        path = own_file(out, "search.json") if may_be_ours else None
        result = read_json(path) if path else {}
        if result.get("search") == search_id:
            if any(partial_of(out).iterdir()):
                with Journal(partial_of(out), given) as journal:
                    journal.remove()
            else:                               # a kill left it empty
                partial_of(out).rmdir()
            return result
    except ValueError:                          # an OUT.partial that is not ours, or another search's
        pass
    raise already_exists(out)


def check(folders, out, evaluations, dtype, allow_config_differences=False):
    """Refuse what cannot be searched, before anything is measured.

    Returns the headers of the models' files and the tolerated differences, see merge_folders.read_sources.
    """
    if len(folders) < 2:
        raise ValueError(f"search needs two models or more, not {len(folders)}")
    if evaluations < 1:
        raise ValueError(f"--evaluations {evaluations} must be at least 1")
    if os.path.lexists(out) and not partial_of(out).is_dir():
        raise already_exists(out)
    check_settings("linear", {}, len(folders), dtype)
    return read_sources(folders, allow_config_differences)[1:]


def checked(tasks, history):
    """The numbers of an evaluation as floats; ValueError unless they are finite and have the tasks of the
    first evaluation."""
    def is_number(n):
        return isinstance(n, (int, float)) and not isinstance(n, bool) and in_range(n, "(-inf, inf)")
    values = list(tasks.values()) if isinstance(tasks, dict) else []
    if not values or not all(map(is_number, values)) or not is_number(sum(map(float, values))):
        raise ValueError(f"a measurement must be an object of finite numbers by task, the higher the better, "
                         f"got {shortened(tasks)}")
    before = next(iter(history.values()))["tasks"] if history else tasks
    if tasks.keys() != before.keys():
        raise ValueError(f"a measurement has the tasks {', '.join(tasks)}, the first had "
                         f"{', '.join(before)}; they must all have the same (with held-out data too)")
    return {name: float(number) for name, number in tasks.items()}


def names_of(folders):
    """What each model is called: its folder, or the run if the folder is named model; its whole path where
    two models would have the same name."""
    names = []
    for folder in folders:
        resolved = folder.resolve()
        names.append(resolved.parent.name if resolved.name == "model" else resolved.name)
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]


# ---- the command -------------------------------------------------------------------------------------------

def search_folders(folders, out, *, prompts=None, eval_data=None, command=None, held_out=None, by=("task",),
                   max_new_tokens=32, max_length=1024, evaluations=200, seed=0, dtype=None, device="cpu",
                   allow_config_differences=False, allow_negative=False, leave_one_out=False, reading=None):
    """What `merge.py search` does: build the `evaluate` of the given files or command, then search.

    reading: {field of config.Reading: value} of the fields that were given. Raises ValueError for flags that
    do not go together, models that do not match, and held-out data that the search would see.
    """
    if (prompts is not None) + (eval_data is not None) + (command is not None) != 1:
        raise ValueError("give one of --prompts F.jsonl, --eval-data F.jsonl and --command 'CMD {model}'")
    if command is not None and ("{model}" not in command or held_out or reading):
        raise ValueError("--command needs {model} in it, where the model folder goes, and takes no "
                         "--held-out and no flag that says how rows are read; "
                         "with {split} in it, it is told fitness or held-out")
    given = reading or {}
    reading = settings_from(Reading, {"too_long": "skip" if eval_data else "refuse"}, flags=given)
    folders, out = [Path(folder) for folder in folders], Path(out)
    check(folders, out, evaluations, dtype, allow_config_differences)
    has_held_out = command is None or "{split}" in command
    if command is not None:
        evaluate = of_folders(folders, by_command(command), out, dtype, device, allow_config_differences)
    else:
        if prompts:
            splits = question_splits(folders[0], prompts, held_out, by, seed, reading)
            measure_model = by_oracle(splits, by, max_new_tokens)
        else:
            measure_model = by_loss(disjoint_loss_splits(folders[0], eval_data, held_out, max_length, seed,
                                                         reading))
        evaluate = of_models(folders, measure_model, dtype, device, allow_config_differences)
    about = {"prompts": [digest(path) for path in prompts or []],
             "eval_data": [digest(path) for path in eval_data or []], "command": command,
             "held_out": [digest(path) for path in held_out or []], "by": list(by),
             "max_new_tokens": max_new_tokens, "max_length": max_length,
             "halves by seed": None if held_out or command else seed}
    if given:
        about["reading"] = {name: getattr(reading, name) for name in given}
    return search(folders, out, evaluate, evaluations=evaluations, seed=seed, allow_negative=allow_negative,
                  leave_one_out=leave_one_out, held_out=has_held_out, dtype=dtype, device=device,
                  allow_config_differences=allow_config_differences, about=about)


def question_splits(folder, prompts, held_out, by, seed, reading):
    """{split: questions} of the files; without held-out files the questions are cut into halves.

    Raises ValueError if the splits share a question or differ in their tasks.
    """
    questions = read_questions(prompts, reading, folder)
    if held_out:
        parts = questions, read_questions(held_out, reading, folder)
        values = [[{"id": row["question_id"], "prompt": str(row["prompt_messages"])} for row in part]
                  for part in parts]
        held_out_places = [row.get("prompt_where") or row["question_id"] for row in parts[1]]
        refuse_shared("questions", *values, held_out_places)
    else:
        parts = halves(questions, seed, together(questions))
    tasks = [{task_of(row, by) for row in part} for part in parts]
    if tasks[0] != tasks[1]:
        raise ValueError(f"the fitness and the held-out questions differ in "
                         f"{', '.join(sorted(tasks[0] ^ tasks[1]))}; give more questions, or files with the "
                         "same tasks")
    return dict(zip(("fitness", "held-out"), parts))


def disjoint_loss_splits(folder, eval_data, held_out, max_length, seed, reading):
    """merge_fitness.loss_splits, without examples that both splits have: ValueError."""
    if held_out and len(held_out) != len(eval_data):
        raise ValueError(f"{len(held_out)} files of --held-out for {len(eval_data)} of --eval-data; give one "
                         "for each, in the same order")
    splits = loss_splits(folder, eval_data, held_out, max_length, seed, reading)
    parts = [[example for examples in splits[split].values() for example in examples]
             for split in ("fitness", "held-out")]
    values = [[{"tokens": example.ids.tobytes()} for example in part] for part in parts]
    refuse_shared("examples", *values, [example.where for example in parts[1]])
    return splits


def digest(path):
    return f"{path} {sha256(path)}"
