"""The claim of "If You Can't Use Them, Recycle Them" (arXiv 2412.04144) on the recipe's own checkpoints, for
the README's table.

    python train.py --seed 1 --arms all --out runs/seed-1
    python tests/bench/recycle.py runs/seed-1 [runs/seed-2 ...] --out runs/recycle

The pool of each run: 15 checkpoints that the recipe leaves anyway, and 5 specialists trained here (a short
SFT of the merged SFT model on right answers to
one task family each), because the recipe's own checkpoints are better or worse on all tasks together.
Fitness: the oracle's mean grade, 0-3, macro average over
the task families, on validation questions; held out: test questions, both drawn by the run's seed. About 5
minutes of one core a run. A killed one goes on.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from aya_min import merge_front, stages, weights, world_data
from aya_min.config import SFT
from aya_min.evaluate import bootstrap_mean
from aya_min.merge_fitness import graded, of_models
from aya_min.merge_search import search_folders
from aya_min.files import write_jsonl                                                   # noqa: E402
from aya_min.world import TINY_TASKS, questions                                         # noqa: E402

POOL = [
    "base",
    "teacher-west-europe",
    "teacher-slavic",
    "teacher-west-asia",
    "teacher-east-asia",
    "single",
    "random",
    "family",
    "mix",
    "sft",
    "no-shared",
    "offline",
    "online-3",
    "online-only-3",
    "rloo",
]
STEPS, BATCH_SIZE, LEARNING_RATE = (
    60,
    32,
    1e-3,
)  # of a specialist: the first guess, with which each gains on its own family and loses elsewhere


def specialists(run, seed, out):
    """{name: model folder} of the merged SFT model trained on one task family each; done once."""
    made = {}
    for task in TINY_TASKS:
        folder = out / f"only-{task}"
        if not (folder / "model").exists():
            rows = [
                row
                for row in world_data.gold(STEPS * BATCH_SIZE * 5, f"recycle/{seed}", "tiny")
                if row["task"] == task
            ][: STEPS * BATCH_SIZE]
            write_jsonl(out / f"only-{task}.jsonl", rows)
            model, tokenizer = weights.load(run / "steps" / "sft" / "model")
            settings = SFT(
                batch_size=BATCH_SIZE,
                max_steps=STEPS,
                learning_rate=LEARNING_RATE,
                max_length=128,
                warmup_steps=STEPS // 10,
                seed=seed,
            )
            stages.train_stage(
                "sft", model, tokenizer, [out / f"only-{task}.jsonl"], settings, folder, torch.device("cpu")
            )
        made[folder.name] = folder / "model"
    return made


def answers_of(result, folders, rows, max_new_tokens):
    """{row's name: (grades (N,), question ids)} on the held-out questions, each grade scaled so that their
    mean is the macro average over the tasks."""
    share = {
        task: sum(row["task"] == task for row in rows) / len(rows) * len(TINY_TASKS) for task in TINY_TASKS
    }
    found = []
    evaluate = of_models(
        folders, lambda model, tokenizer, split: found.append(graded(model, tokenizer, rows, max_new_tokens))
    )
    for row in result["rows"]:
        evaluate(row["weights"], "held-out")
    return {
        row["name"]: [answer["grade"] / share[answer["task"]] for answer in answers]
        for row, answers in zip(result["rows"], found)
    }


def search_one(run, out, args):
    """One run's column of the table: {row: cell}."""
    seed, started = json.loads((run / "config.json").read_text(encoding="utf-8"))["seed"], time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, count in (("validation", args.fitness), ("test", args.held_out)):
        splits[split] = out / f"{split}.jsonl"
        write_jsonl(splits[split], questions(split, count, f"recycle/{seed}", level="tiny", unique=True))
    pool = {name: run / "steps" / name / "model" for name in args.pool}
    if missing := [str(folder) for folder in pool.values() if not folder.is_dir()]:
        raise SystemExit(
            f"no {' '.join(missing)}: give finished runs of train.py --arms all, or name what there is with"
            " --pool"
        )
    folders = [*pool.values(), *([] if args.no_specialists else specialists(run, seed, out).values())]
    trained = time.perf_counter()
    if not (out / "search" / "search.json").exists():
        search_folders(
            folders,
            out / "search",
            prompts=[splits["validation"]],
            held_out=[splits["test"]],
            evaluations=args.evaluations,
            seed=seed,
            allow_negative=args.allow_negative,
            leave_one_out=True,
        )
    searched = time.perf_counter()
    result = json.loads((out / "search" / "search.json").read_text(encoding="utf-8"))
    print(f"\n{run}\n{merge_front.search_table(result)}\n", flush=True)
    rows = questions("test", args.held_out, f"recycle/{seed}", level="tiny", unique=True)
    ids, grades = [row["question_id"] for row in rows], answers_of(result, folders, rows, 32)

    def cell(values, digits=3, sign=""):
        mean, (low, high) = bootstrap_mean(values, ids)
        return f"{mean:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"

    column = {f"held-out: {name}": cell(values) for name, values in grades.items()}
    column["held-out: best single"] += f" ({result['best']})"
    for a, b in (
        ("CMA-ES", "greedy soup"),
        ("CMA-ES", "uniform soup"),
        ("CMA-ES", "best single"),
        ("greedy soup", "uniform soup"),
        ("uniform soup", "best single"),
    ):
        column[f"{a} minus {b}"] = cell([x - y for x, y in zip(grades[a], grades[b])], sign="+")
    column |= {
        f"fitness: {row['name']}": f"{merge_front.macro(row['fitness']):.3f}" for row in result["rows"]
    }
    models, whole = sorted(result["models"], key=lambda model: -model["weight"]), merge_front.macro(
        result["rows"][-1]["held-out"]
    )
    hurt = {model["name"]: whole - merge_front.macro(model["without"]) for model in models}
    pair = merge_front.trade_off([model["fitness"] for model in models])
    column["checkpoints in the greedy soup"] = str(sum(weight > 0 for weight in result["rows"][2]["weights"]))
    column["weights above 0.01"] = f"{sum(model['weight'] > 0.01 for model in models)} of {len(models)}"
    column["largest weights"] = ", ".join(f"{model['name']} {model['weight']:.2f}" for model in models[:5])
    column["left out one by one, the held-out average falls for"] = (
        f"{sum(fall > 0 for fall in hurt.values())} of {len(hurt)}; most for {max(hurt, key=hurt.get)}:"
        f" {max(hurt.values()):.3f}"
    )
    column["weight of the weakest five checkpoints (fitness) together"] = (
        f"{sum(m['weight'] for m in sorted(models, key=lambda m: merge_front.macro(m['fitness']))[:5]):.2f}"
    )
    column["tasks that trade off most (correlation over the checkpoints)"] = (
        f"{pair[0]}, {pair[1]} ({pair[2]:.2f})"
    )
    column["on the Pareto front over all tasks, held-out"] = (
        ", ".join(name for name, _, on in merge_front.contenders(result)[:4] if on) or "none of the four"
    )
    column["points tried; seconds: specialists, search"] = (
        f"{result['evaluations']}; {trained - started:.0f}, {searched - trained:.0f}"
    )
    return column


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of train.py --arms all")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a folder for what is made; what is there already is not made again",
    )
    parser.add_argument("--pool", nargs="+", default=POOL, help="names under RUN/steps; default: %(default)s")
    parser.add_argument("--no-specialists", action="store_true")
    parser.add_argument("--allow-negative", action="store_true")
    parser.add_argument("--evaluations", type=int, default=145)
    parser.add_argument("--fitness", type=int, default=345, help="validation questions; default: %(default)s")
    parser.add_argument("--held-out", type=int, default=690, help="test questions; default: %(default)s")
    args = parser.parse_args()
    columns = {run.name: search_one(run, args.out / run.name, args) for run in args.runs}
    print(
        "| oracle's grade 0-3, macro average over task families [95% interval] | "
        + " | ".join(columns)
        + " |\n|---|"
        + "---|" * len(columns)
    )
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
