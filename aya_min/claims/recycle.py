"""If You Can't Use Them, Recycle Them (arXiv 2412.04144): a linear merge of checkpoints that trade off tasks,
its weights searched by CMA-ES, on the embedded world.

The pool: the base, the teachers, the students of this lab, and one specialist for each task family (a short
SFT of the student on right answers to that family alone). Fitness: the oracle's mean grade on validation
questions, macro average over the task families; compared on the test questions. Departures: ours are small
models of one size, the number of points tried is small, the search starts at the better of the two soups.
"""

from .. import world_data
from ..arbitrage import route
from ..experiments import Claim, Comparison, Figure
from ..merge_fitness import by_oracle, halves, of_models
from ..merge_search import compare, softmax
from ..world import TINY_TASKS, questions

PAPER = "If You Can't Use Them, Recycle Them, arXiv 2412.04144"
MINUTES = 8
QUESTIONS = 690         # of the validation split


def specialist(lab, task):
    """60 steps of SFT at preset tiny. The learning rate is the first guess, with which each gains."""
    steps = max(2, lab.recipe.num_prompts // 100)
    size = steps * lab.recipe.batch_size
    gold = world_data.gold(size * 5, f"recycle/{lab.seed}", "tiny")
    rows = [row for row in gold if row["task"] == task][:size]
    return lab.train(f"specialist of {task}", "sft", lab.sft, rows, max_steps=steps, learning_rate=1e-3,
                     warmup_steps=steps // 10)


def pool(lab):
    """{name: model folder}"""
    r = lab.recipe
    random, _ = route(lab.candidates, "random", r.seed, None, r.keep_cut, lab.tokenizer.key)
    student = lab.train("SFT on random answers", "sft", lab.base, random, epochs=r.sft_epochs,
                        learning_rate=r.sft_learning_rate)
    dpo = lab.train("offline DPO", "dpo", lab.sft, lab.pool_pairs, epochs=r.offline_epochs,
                    learning_rate=r.offline_learning_rate, beta=r.offline_beta,
                    nll_weight=r.offline_nll_weight)
    return {"base": lab.base, **lab.teachers, "random": student, "sft": lab.sft, "offline": dpo,
            **{task: specialist(lab, task) for task in TINY_TASKS}}


def searched(lab):
    """{"rows": [{"name", "weights", ...}], "models": [...]}, see merge_search.compare. Half of the questions
    are the search's, and the other half measure what it chose."""
    folders, count = list(pool(lab).values()), min(QUESTIONS, lab.recipe.eval_count)
    evaluations = min(10 * len(folders), lab.recipe.num_prompts // 10)

    def make(folder):
        asked = questions("validation", count, f"recycle/{lab.seed}", level=lab.recipe.level, unique=True)
        splits = dict(zip(("fitness", "held-out"), halves(asked, lab.seed, lambda row: row["question_id"])))
        measure = by_oracle(splits, ("task",), lab.recipe.max_new_tokens)
        evaluate, known = of_models(folders, measure, device=lab.device), {}

        def measured(kind, weights, split):
            key = split, *weights
            if key not in known:
                known[key] = evaluate(weights, split)
            return known[key]
        rows, models = compare(measured, len(folders), evaluations, lab.seed, softmax, "held-out", True)
        return {"rows": rows, "models": models}
    return lab.step("search", make, [lab.name_of(folder) for folder in folders])


def found(name):
    """An arm: the merge with the weights of this row of the search."""
    def arm(lab):
        [weights] = [row["weights"] for row in searched(lab)["rows"] if row["name"] == name]
        return lab.merge(name, list(pool(lab).values()), "linear", weights=weights)
    return arm


def falls(lab):
    """For each checkpoint how far the merge's grade falls without it, on the half of the validation questions
    that the search did not see."""
    found = searched(lab)
    macro = lambda grades: sum(grades.values()) / len(grades)
    whole = macro(found["rows"][-1]["held-out"])
    return [whole - macro(model["without"]) for model in found["models"]]


def weights_of(lab):
    return [model["weight"] for model in searched(lab)["models"]]


ARMS = {name: found(name) for name in ("best single", "uniform soup", "greedy soup", "CMA-ES")}


def graded(a, b):
    return (Comparison(a, b, measure="grade", decoding="greedy"),)


CLAIMS = (
    Claim("search-beats-single", "The optimised merge beats the best single checkpoint", "Pareto-optimal",
          graded("CMA-ES", "best single")),
    Claim("search-beats-soups", "The optimised merge beats the uniform and the greedy soup",
          "beats merge baselines", graded("CMA-ES", "uniform soup") + graded("CMA-ES", "greedy soup")),
    Claim("dense-weights", "Almost all checkpoints get weight, bad ones too",
          "almost all checkpoints receive non-zero weight",
          (Figure("share of checkpoints with a weight above 0.01",
                  lambda lab: [float(weight > 0.01) for weight in weights_of(lab)], "above", 0.8, ()),
           Figure("fall of the grade when one is left out", falls, "above", 0.0, ()))),
)
