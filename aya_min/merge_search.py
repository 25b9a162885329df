"""The weights of a linear merge of many checkpoints, searched: "If You Can't Use Them, Recycle Them" (arXiv 2412.04144).

    theta = sum_i a_i theta_i, sum_i a_i = 1, the a_i by CMA-ES, fitness the macro average over tasks of what the merged model scores; no training

Beside it the paper's baselines: best single checkpoint, uniform soup, greedy soup (arXiv 2203.05482, recipe 1), all chosen on the fitness split and
measured on a held-out one. The paper's settings are not public; ours: the a_i are a softmax of the point that CMA-ES moves, which starts at the
better of the two soups with step size SIGMA, textbook defaults for the rest; the winner is the best of all its points and of each generation's mean.

Every measurement is on disk (OUT.partial) before the next one begins. The search is a function of the seed and of the measurements, so a killed one
goes through the same points again, finds them measured, and ends with the same bytes. search.json says of
which search it is, so that one killed after OUT was published knows its own.
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

SIGMA = 0.5                 # the first step of CMA-ES, ours (LOG.md)


def softmax(point):
    """Weights above 0 whose sum is 1."""
    powers = np.exp(point - point.max())
    return (powers / powers.sum()).tolist()


def affine(point):
    """Weights whose sum is 1, any of which may be negative; 0 is the uniform soup, as with softmax, and so is the slope there."""
    return ((1 + point - point.mean()) / len(point)).tolist()


def average(chosen, num):
    """The weights of the plain average of the chosen of `num` models."""
    return [1 / len(chosen) if i in chosen else 0.0 for i in range(num)]


def greedy_soup(value, num):
    """Greedy soup, recipe 1 of arXiv 2203.05482: from the best model down, each stays in the average if the value does not fall. value(weights) -> number."""
    alone = [value(average([i], num)) for i in range(num)]
    best, *others = sorted(range(num), key=lambda i: -alone[i])
    soup, reached = [best], alone[best]
    for i in others:
        if (found := value(average([*soup, i], num))) >= reached:
            soup, reached = [*soup, i], found
    return average(soup, num)


def optimise(value, begin, evaluations, seed, weights_of=softmax):
    """The best weights that CMA-ES finds from `begin` in so many evaluations: whole generations, one at least, and the mean after each."""
    num = len(begin)
    popsize, point = cmaes.default_popsize(num), num * np.array(begin) - 1
    if weights_of is softmax:                                   # which reaches no 0: a fifth of an equal share in its place
        point = np.log(np.maximum(begin, 0.2 / num))
    state, found = cmaes.start(point, SIGMA), [(value(weights_of(point)), weights_of(point))]
    for _ in range(max(1, (evaluations - 1) // (popsize + 1))):
        points = cmaes.ask(state, seed, popsize)
        values = [value(weights_of(point)) for point in points]
        state = cmaes.tell(state, points, values)
        found += [*zip(values, map(weights_of, points)), (value(weights_of(state.mean)), weights_of(state.mean))]
    return max(found, key=lambda pair: pair[0])[1]


def without(weights, i):
    """The weights without model i, divided by their sum."""
    rest = [0.0 if j == i else weight for j, weight in enumerate(weights)]
    if abs(sum(rest)) < 1e-6:
        raise ValueError(f"the weights without model {i + 1} sum to 0, so they cannot be divided by it; search without --allow-negative or --leave-one-out")
    return [weight / sum(rest) for weight in rest]


def compare(measured, num, evaluations, seed, weights_of, last, leave_one_out):
    """Baselines and search on the fitness split, then all that is chosen on the `last` split. measured(kind, weights, split) -> {task: number}.

    Returns rows, one for each baseline and for CMA-ES: {"name", "weights", "fitness", "held-out"}; and models, in order: {"weight", "fitness", "held-out"},
    and "without": the CMA-ES merge without it.
    """
    def value(kind):
        return lambda weights: macro(measured(kind, weights, "fitness"))

    singles = [average([i], num) for i in range(num)]
    alone = [value("single")(weights) for weights in singles]
    best, uniform, greedy = singles[alone.index(max(alone))], average(range(num), num), greedy_soup(value("greedy soup"), num)
    begin = max([uniform, greedy], key=value("uniform soup"))
    rows = [("best single", best), ("uniform soup", uniform), ("greedy soup", greedy), ("CMA-ES", optimise(value("CMA-ES"), begin, evaluations, seed, weights_of))]
    rows = [{"name": name, "weights": weights, "fitness": measured(name, weights, "fitness"), "held-out": measured(name, weights, last)} for name, weights in rows]
    found = rows[-1]["weights"]
    models = [{"weight": weight, "fitness": measured("single", single, "fitness"), "held-out": measured("single", single, last)} for weight, single in zip(found, singles)]
    if leave_one_out:
        models = [model | {"without": measured("leave one out", without(found, i), last)} for i, model in enumerate(models)]
    return rows, models


def search(folders, out, evaluate, *, evaluations=200, seed=0, allow_negative=False, leave_one_out=False,
           held_out=True, dtype=None, device="cpu",
           allow_config_differences=False, about=None):
    """Search, and leave the new folder `out`: model/ (the merge), search.json, evaluations.jsonl, report.html. Returns what search.json holds.

    held_out: whether `evaluate` has that split. about: JSON values that name what is measured; an OUT.partial of something else is refused.
    """
    folders, out = [Path(folder) for folder in folders], Path(out)
    headers, said = check(folders, out, evaluations, dtype, allow_config_differences)
    files = {}
    for folder, header in zip(folders, headers):
        files |= identity(folder, header)
    given = {"models": list(map(str, folders)), "model files": files, "dtype": dtype,
             "what is measured": about}
    settings = [given, evaluations, seed, allow_negative, leave_one_out, held_out]
    search_id = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    if os.path.lexists(out):
        return published(out, given, search_id)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Journal(partial_of(out), given) as journal:
        print_tolerated(said)
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
    """Every point, in order, and what search.json holds. What the journal holds is not measured again."""
    num, names, history = len(folders), names_of(folders), {}
    popsize = cmaes.default_popsize(num)
    generations = max(1, (evaluations - 1) // (popsize + 1))
    total = 2 * num + generations * (popsize + 1) + 1 + held_out * (num + 3) + leave_one_out * num                  # at most: some coincide

    with progress(total=total, desc="search", unit="evaluation", smoothing=0.1) as bar:
        def measured(kind, weights, split):
            key = json.dumps([split, weights])
            if key not in history:
                found = checked(journal.done[key] if key in journal.done else evaluate(weights, split),
                                history)
                if key not in journal.done:
                    journal.add(key, found)
                history[key] = {"kind": kind, "split": split, "macro": macro(found), "weights": weights,
                                "tasks": found}
                bar.set_postfix_str(f"best {max(row['macro'] for row in history.values() if row['split'] == 'fitness'):.4f}", refresh=False)
                bar.update()
            return history[key]["tasks"]
        rows, models = compare(measured, num, evaluations, seed, weights_of, "held-out" if held_out else "fitness", leave_one_out)

    history = list(history.values())
    tried = sum((row["kind"], row["split"]) == ("CMA-ES", "fitness") for row in history)
    models = [{"name": name, "folder": str(folder)} | model
              for name, folder, model in zip(names, folders, models)]
    return history, {"best": names[rows[0]["weights"].index(1.0)], "evaluations": tried, "popsize": popsize,
                     "seed": seed,
                     "weights": weights_of.__name__, "held-out": held_out, "rows": rows, "models": models}


def partial_of(out):
    return Path(f"{out}.partial")


def published(out, given, search_id):
    """The result in a folder that this very search published before it was killed; what it left beside goes.
    ValueError for any other."""
    try:
        there = out.is_dir() and not out.is_symlink() and partial_of(out).is_dir()
        path = own_file(out, "search.json") if there else None
        result = read_json(path) if path else {}
        if result.get("search") == search_id:
            if any(partial_of(out).iterdir()):
                with Journal(partial_of(out), given) as journal:
                    journal.remove()
            else:                               # a kill left no more of it
                partial_of(out).rmdir()
            return result
    except ValueError:                          # an OUT.partial that is not ours, or another search's
        pass
    raise already_exists(out)


def check(folders, out, evaluations, dtype, allow_config_differences=False):
    """Refuse what cannot be searched, before anything is measured. -> the headers of the models' files, and
    what to tell"""
    if len(folders) < 2:
        raise ValueError(f"search needs two models or more, not {len(folders)}")
    if evaluations < 1:
        raise ValueError(f"--evaluations {evaluations} must be at least 1")
    if os.path.lexists(out) and not partial_of(out).is_dir():
        raise already_exists(out)
    check_settings("linear", {}, len(folders), dtype)
    return read_sources(folders, allow_config_differences)[1:]


def checked(tasks, history):
    """The numbers of an evaluation: finite, and for the same tasks as those before."""
    def is_number(n):
        return isinstance(n, (int, float)) and not isinstance(n, bool) and in_range(n, "(-inf, inf)")
    values = list(tasks.values()) if isinstance(tasks, dict) else []
    if not values or not all(map(is_number, values)) or not is_number(sum(map(float, values))):
        raise ValueError(f"a measurement must be an object of finite numbers by task, the higher the better, "
                         f"got {shortened(tasks)}")
    before = next(iter(history.values()))["tasks"] if history else tasks
    if tasks.keys() != before.keys():
        raise ValueError(f"a measurement has the tasks {', '.join(tasks)}, the first had {', '.join(before)}; they must all have the same (with held-out data too)")
    return {name: float(number) for name, number in tasks.items()}


def names_of(folders):
    """What each is called: its folder, or the run of a folder named model; the whole path where two would be called alike."""
    names = [folder.resolve().parent.name if folder.resolve().name == "model" else folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]


# ---- the command -------------------------------------------------------------------------------------------------------------------

def search_folders(folders, out, *, prompts=None, eval_data=None, command=None, held_out=None, by=("task",), max_new_tokens=32, max_length=1024,
                   evaluations=200, seed=0, dtype=None, device="cpu", allow_config_differences=False,
                   reading=None, **settings):
    """What `merge.py search` does: the evaluate of the files or the command that were given, then the search.

    reading: {field of config.Reading: value}, those that were given.
    """
    if (prompts is not None) + (eval_data is not None) + (command is not None) != 1:
        raise ValueError("give one of --prompts F.jsonl, --eval-data F.jsonl and --command 'CMD {model}'")
    if command is not None and ("{model}" not in command or held_out or reading):
        raise ValueError("--command needs {model} in it, where the model folder goes, and takes no "
                         "--held-out and no flag that says how rows are read; "
                         "with {split} in it, it is told fitness or held-out")
    given = reading or {}
    reading = settings_from(Reading, {"too_long": "skip" if eval_data else "refuse"}, flags=given)
    folders, has_held_out, out = [Path(folder) for folder in folders], True, Path(out)
    check(folders, out, evaluations, dtype, allow_config_differences)
    if command is not None:
        evaluate = of_folders(folders, by_command(command), out, dtype, device, allow_config_differences)
        has_held_out = "{split}" in command
    elif prompts:
        questions = read_questions(prompts, reading, folders[0])
        if held_out:
            parts = questions, read_questions(held_out, reading, folders[0])
            refuse_shared("questions", *([{"id": row["question_id"], "prompt": str(row["prompt_messages"])}
                                          for row in part] for part in parts),
                          [row.get("prompt_where") or row["question_id"] for row in parts[1]])
        else:
            parts = halves(questions, seed, together(questions))
        tasks = [{task_of(row, by) for row in part} for part in parts]
        if tasks[0] != tasks[1]:
            raise ValueError(f"the fitness and the held-out questions differ in {', '.join(sorted(tasks[0] ^ tasks[1]))}; give more questions, or files with the same tasks")
        evaluate = of_models(folders, by_oracle(dict(zip(("fitness", "held-out"), parts)), by,
                                                max_new_tokens), dtype, device, allow_config_differences)
    else:
        if held_out and len(held_out) != len(eval_data):
            raise ValueError(f"{len(held_out)} files of --held-out for {len(eval_data)} of --eval-data; give one for each, in the same order")
        splits = loss_splits(folders[0], eval_data, held_out, max_length, seed, reading)
        parts = [[example for examples in splits[split].values() for example in examples]
                 for split in ("fitness", "held-out")]
        refuse_shared("examples", *([{"tokens": example.ids.tobytes()} for example in part]
                                    for part in parts), [example.where for example in parts[1]])
        evaluate = of_models(folders, by_loss(splits), dtype, device, allow_config_differences)
    about = {"prompts": [digest(path) for path in prompts or []], "eval_data": [digest(path) for path in eval_data or []], "command": command,
             "held_out": [digest(path) for path in held_out or []], "by": list(by), "max_new_tokens": max_new_tokens, "max_length": max_length,
             "halves by seed": None if held_out or command else seed}
    about |= {"reading": {name: getattr(reading, name) for name in given}} if given else {}
    return search(folders, out, evaluate, evaluations=evaluations, seed=seed, held_out=has_held_out,
                  dtype=dtype, device=device, about=about,
                  allow_config_differences=allow_config_differences, **settings)


def digest(path):
    return f"{path} {sha256(path)}"
