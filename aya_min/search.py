"""The weights of a linear merge of many checkpoints, searched: "If You Can't Use Them, Recycle Them" (arXiv 2412.04144).

    theta = sum_i a_i theta_i, sum_i a_i = 1, the a_i by CMA-ES, fitness the macro average over tasks of what the merged model scores; no training

Beside it the paper's baselines: best single checkpoint, uniform soup, greedy soup (arXiv 2203.05482, recipe 1), all chosen on the fitness split and
measured on a held-out one. The paper's settings are not public; ours: the a_i are a softmax of the point that CMA-ES moves, which starts at the
better of the two soups with step size SIGMA, textbook defaults for the rest; the winner is the best of all its points and of each generation's mean.

Every measurement is on disk (OUT.partial) before the next one begins. The search is a function of the seed and of the measurements, so a killed one
goes through the same points again, finds them measured, and ends with the same bytes.
"""

import json
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import cmaes
from .files import sha256, write_json
from .fitness import by_command, by_loss, by_oracle, halves, loss_splits, of_folders, of_models, read_questions, task_of
from .front import macro
from .journal import Journal
from .mergeconfig import check_settings
from .report import write_report
from .soups import look_into, merge_folders, partial_folder

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


def search(folders, out, evaluate, *, evaluations=200, seed=0, allow_negative=False, leave_one_out=False, held_out=True, dtype=None, device="cpu", about=None):
    """Search, and leave the new folder `out`: model/ (the merge), search.json, evaluations.jsonl, report.html. Returns what search.json holds.

    held_out: whether `evaluate` has that split. about: JSON values that name what is measured; an OUT.partial of something else is refused.
    """
    folders, out, num = [Path(folder) for folder in folders], Path(out), len(folders)
    headers, weights_of = check(folders, out, evaluations, dtype), affine if allow_negative else softmax
    files = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for header in headers for path in sorted({entry[0] for entry in header.values()})}
    out.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(f"{out}.partial", {"models": list(map(str, folders)), "model files": files, "dtype": dtype, "what is measured": about})
    popsize, history = cmaes.default_popsize(num), {}
    generations = max(1, (evaluations - 1) // (popsize + 1))
    total = 2 * num + generations * (popsize + 1) + 1 + held_out * (num + 3) + leave_one_out * num                  # at most: some coincide

    with tqdm(total=total, desc="search", unit="evaluation", smoothing=0.1) as bar:
        def measured(kind, weights, split):
            key = json.dumps([split, weights])
            if key not in journal.done:
                journal.add(key, checked(evaluate(weights, split), journal.done))
            tasks = journal.done[key]
            if key not in history:
                history[key] = {"kind": kind, "split": split, "macro": macro(tasks), "weights": weights, "tasks": tasks}
                bar.set_postfix_str(f"best {max(row['macro'] for row in history.values() if row['split'] == 'fitness'):.4f}", refresh=False)
                bar.update()
            return tasks
        rows, models = compare(measured, num, evaluations, seed, weights_of, "held-out" if held_out else "fitness", leave_one_out)

    names = names_of(folders)
    tried = sum((row["kind"], row["split"]) == ("CMA-ES", "fitness") for row in history.values())
    result = {"best": names[rows[0]["weights"].index(1.0)], "evaluations": tried, "popsize": popsize, "seed": seed, "weights": weights_of.__name__, "held-out": held_out,
              "what is measured": about, "rows": rows, "models": [{"name": name, "folder": str(folder)} | model for name, folder, model in zip(names, folders, models)]}
    with partial_folder(out) as partial:
        merge_folders(folders, partial / "model", "linear", weights=rows[-1]["weights"], dtype=dtype, device=device, progress=False)
        write_json(partial / "search.json", result)
        (partial / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history.values()), encoding="utf-8")
    journal.remove()
    write_report(out)
    return result


def check(folders, out, evaluations, dtype):
    """Refuse what cannot be searched, before anything is measured. -> the headers of the models' files"""
    if len(folders) < 2:
        raise ValueError(f"search needs two models or more, not {len(folders)}")
    if evaluations < 1:
        raise ValueError(f"--evaluations {evaluations} must be at least 1")
    if out.exists():
        raise ValueError(f"{out} exists already; remove it or give another folder as the output")
    check_settings("linear", {}, len(folders), dtype)
    return look_into(folders)[1]


def checked(tasks, done):
    """The numbers of an evaluation: finite, and for the same tasks as those before."""
    before = next(iter(done.values()), tasks)
    if not tasks or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in tasks.values()):
        raise ValueError(f"a measurement must be an object of finite numbers by task, the higher the better, got {tasks}")
    if tasks.keys() != before.keys():
        raise ValueError(f"a measurement has the tasks {', '.join(tasks)}, the first had {', '.join(before)}; they must all have the same (with held-out data too)")
    return {name: float(number) for name, number in tasks.items()}


def names_of(folders):
    """What each is called: its folder, or the run of a folder named model; the whole path where two would be called alike."""
    names = [folder.resolve().parent.name if folder.resolve().name == "model" else folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]


# ---- the command -------------------------------------------------------------------------------------------------------------------

def search_folders(folders, out, *, prompts=None, eval_data=None, command=None, held_out=None, by=("task",), max_new_tokens=32, max_length=1024,
                   evaluations=200, seed=0, dtype=None, device="cpu", **settings):
    """What `merge.py search` does: the evaluate of the files or the command that were given, then the search."""
    if (prompts is not None) + (eval_data is not None) + (command is not None) != 1:
        raise ValueError("give one of --prompts F.jsonl, --eval-data F.jsonl and --command 'CMD {model}'")
    if command and ("{model}" not in command or held_out):
        raise ValueError("--command needs {model} in it, where the model folder goes, and takes no --held-out; with {split} in it, it is told fitness or held-out")
    folders, has_held_out = [Path(folder) for folder in folders], True
    check(folders, Path(out), evaluations, dtype)
    if command:
        evaluate, has_held_out = of_folders(folders, by_command(command), Path(f"{out}.partial") / "candidate", dtype, device), "{split}" in command
    elif prompts:
        parts = (read_questions(prompts), read_questions(held_out)) if held_out else halves(read_questions(prompts), seed, lambda row: row["question_id"])
        if both := {row["question_id"] for row in parts[0]} & {row["question_id"] for row in parts[1]}:
            raise ValueError(f"{len(both)} questions are in --prompts and in --held-out, such as {min(both)}; a held-out split shares none")
        tasks = [{task_of(row, by) for row in part} for part in parts]
        if tasks[0] != tasks[1]:
            raise ValueError(f"the fitness and the held-out questions differ in {', '.join(sorted(tasks[0] ^ tasks[1]))}; give more questions, or files with the same tasks")
        evaluate = of_models(folders, by_oracle(dict(zip(("fitness", "held-out"), parts)), by, max_new_tokens), dtype, device)
    else:
        if held_out and len(held_out) != len(eval_data):
            raise ValueError(f"{len(held_out)} files of --held-out for {len(eval_data)} of --eval-data; give one for each, in the same order")
        evaluate = of_models(folders, by_loss(loss_splits(folders[0], eval_data, held_out, max_length, seed)), dtype, device)
    about = {"prompts": [digest(path) for path in prompts or []], "eval_data": [digest(path) for path in eval_data or []], "command": command,
             "held_out": [digest(path) for path in held_out or []], "by": list(by), "max_new_tokens": max_new_tokens, "max_length": max_length,
             "halves by seed": None if held_out or command else seed}
    return search(folders, out, evaluate, evaluations=evaluations, seed=seed, held_out=has_held_out, dtype=dtype, device=device, about=about, **settings)


def digest(path):
    return f"{path} {sha256(path)}"
