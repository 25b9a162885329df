"""Multilingual arbitrage (arXiv 2408.14960): which answers of a pool of teachers a student should learn from.

Tested: the order of the routes (reward, fixed, learned, random, single teacher); how much of the reward
route's gain the learned router keeps, and what it costs; whether the gain grows with how unlike the teachers
are; whether the answers of one English teacher in translation are the worst.

Matched conditions: all students start at the same base and take the same steps of the same batch size on
answers to the same prompts (a route leaves out the few prompts whose answers are all empty or cut). The three
pools have four teachers of as many lessons each, and all lessons of a pool together are alike; "alike" deals
them out at random, "own" by home cluster, "half" does each for a half.

Departures: the pool are four teachers of one size on the embedded world, where the paper has nine published
models and 15 languages. The router learns from other prompts than those it routes, a quarter as many, and is
a copy of the base. The translation is world_translation's, which leaves marks on purpose; the oracle grades
sentences with marks 1 at most, so that "apart", the grade of the same answer without them, is compared as
well. The judge is the oracle, which never scored the answers (the paper is criticised for judging by what
routes).
"""

import random

from .. import weights, world_data
from ..arbitrage import candidates_from, route
from ..experiments import Claim, Comparison, Figure
from ..languages import LANGUAGES
from ..pipeline import best_teacher, teacher_of_family
from ..router import choices, prompt_example
from ..world_oracle import grade_apart
from ..world_translation import in_english, translated

PAPER = "Multilingual Arbitrage, arXiv 2408.14960"
MINUTES = 12
NOT_ENGLISH = tuple(code for code in LANGUAGES if code != "en")
# Chosen on seed 0 by the regret on held-out prompts of the train split, of tau 0.3, 1 and 3 and of rates 3e-4
# and 1e-3.
ROUTER = {"tau": 3.0, "learning_rate": 3e-4, "epochs": 3.0}


# ---- pools and their answers -------------------------------------------------------------------------------

def lessons_of(lab, kind):
    """{teacher: lessons} of a pool: "alike" or "half". Each teacher gets as many as in lab.teachers' pool,
    and the pool's lessons together are that pool's."""
    r, clusters = lab.recipe, lab.run.clusters
    own = {name: world_data.lessons(clusters, name, r.lessons, lab.seed, r.level) for name in clusters}
    rng, dealt, kept = random.Random(f"pools/{kind}/{lab.seed}"), [], {}
    for name, rows in own.items():
        rng.shuffle(rows)
        half = len(rows) // 2 if kind == "half" else 0
        kept[name], rest = rows[:half], rows[half:]
        dealt += rest
    rng.shuffle(dealt)
    return {name: kept[name] + dealt[i::len(own)] for i, name in enumerate(own)}


def pool(lab, kind):
    """{teacher: model folder} of a pool: "own" (lab.teachers), "half" or "alike"."""
    if kind == "own":
        return lab.teachers
    settings = dict(learning_rate=lab.recipe.teacher_learning_rate, epochs=1.0)
    return {name: lab.train(f"teacher-{kind}-{name}", "sft", lab.base, rows, seed=lab.seed + 1000 * i,
                            **settings)
            for i, (name, rows) in enumerate(lessons_of(lab, kind).items())}


def asked(lab, name, teachers, rows):
    """The rows with one scored candidate of each teacher."""
    answers, scores = {}, {}
    for i, (teacher, folder) in enumerate(teachers.items()):
        groups = lab.sample(f"{name}-{teacher}", folder, rows, 1, lab.recipe.teacher_temperature,
                            seed=1000 * lab.seed + i)
        answers[teacher] = [group[0] for group in groups]
        answered = [{**row, **answer} for row, answer in zip(rows, answers[teacher])]
        scores[teacher] = lab.scores(f"{name}-{teacher}", answered)
    return candidates_from(rows, answers, scores)


def without_candidates(rows):
    return [{key: value for key, value in row.items() if key != "candidates"} for row in rows]


def candidates(lab, kind):
    """The candidates of a pool for the prompts of lab.candidates."""
    if kind == "own":
        return lab.candidates
    return asked(lab, f"pool-{kind}", pool(lab, kind), without_candidates(lab.candidates))


# ---- the learned router ------------------------------------------------------------------------------------

def chosen_by_router(lab):
    """The teacher that a router gives each prompt of lab.candidates. It has learnt from other prompts."""
    prompts = lab.questions("train", max(lab.recipe.batch_size, lab.recipe.num_prompts // 4), "router")
    rows = asked(lab, "router-pool", lab.teachers, prompts)
    trained = lab.train("router", "router", lab.base, rows, held_out=0.0, **ROUTER)

    def make(folder):
        model, tokenizer = weights.load(trained, lab.device)
        room = model.config.max_position_embeddings
        examples = [prompt_example(tokenizer, {**row, "prompt_messages": row["prompt"]}, room)
                    for row in lab.candidates]
        return {"teachers": choices(model, examples, tokenizer.pad_id)}
    return lab.step("router-choices", make, lab.name_of(trained), lab.candidates)["teachers"]


def only(rows, teachers):
    """The rows with the candidates of one teacher each."""
    return [{**row, "candidates": [c for c in row["candidates"] if c["teacher"] == teacher]}
            for row, teacher in zip(rows, teachers)]


# ---- arms --------------------------------------------------------------------------------------------------

def routed(lab, how, kind="own"):
    """The SFT rows of a route over the candidates of a pool."""
    rows, table = candidates(lab, kind), None
    if how == "learned":
        rows = only(rows, chosen_by_router(lab))
    if how == "single":
        table = dict.fromkeys((row.get("language") for row in rows), best_teacher(rows))
    if how == "fixed":
        table = teacher_of_family(lab.run, lab.teachers)
    how = "fixed" if table else how
    return route(rows, how, lab.seed, table, lab.recipe.keep_cut, lab.tokenizer.key)[0]


def student(lab, name, rows):
    """SFT from the base in the steps that all prompts would take, whatever a route left out."""
    r = lab.recipe
    steps = max(1, round(r.sft_epochs * r.num_prompts / r.batch_size))
    return lab.train(name, "sft", lab.base, rows, learning_rate=r.sft_learning_rate, max_steps=steps)


def arm(how, kind="own"):
    name = how if kind == "own" else f"{how}-{kind}"
    return name, lambda lab: student(lab, f"student-{name}", routed(lab, how, kind))


def translation(lab):
    """Answers of the teacher that is best in English, to the prompts in English, translated."""
    rows = without_candidates(lab.candidates)
    english = [row for row in lab.candidates if row["language"] == "en"]
    teacher = best_teacher(english)
    groups = lab.sample("english-answers", lab.teachers[teacher], [in_english(row) for row in rows], 1,
                        lab.recipe.teacher_temperature, seed=1000 * lab.seed)
    answers = [{**group[0], "completion": translated(row, group[0]["completion"], lab.seed)}
               for row, group in zip(rows, groups)]
    made = candidates_from(rows, {teacher: answers})
    chosen, _ = route(made, "random", lab.seed, keep_cut=lab.recipe.keep_cut)
    return student(lab, "student-translated", chosen)


ARMS = dict([arm("reward"), arm("fixed"), arm("learned"), arm("random"), arm("single"),
             arm("reward", "half"), arm("random", "half"), arm("reward", "alike"), arm("random", "alike"),
             ("translated", translation)])
MEASURES = {"apart": lambda row: float(grade_apart(row, row["completion"]).grade)}


# ---- figures -----------------------------------------------------------------------------------------------

def kept_of_gain(lab):
    """For each prompt the reward of the router's choice less that halfway between any teacher's and the best:
    above 0 on average, the router keeps more than half of what the reward route gains."""
    values = []
    for row, teacher in zip(lab.candidates, chosen_by_router(lab)):
        rewards = {c["teacher"]: c["reward"] for c in row["candidates"] if c["reward"] is not None}
        if teacher in rewards:
            mean = sum(rewards.values()) / len(rewards)
            kept = rewards[teacher] - mean - 0.5 * (max(rewards.values()) - mean)
            values.append((row["question_id"], kept))
    return values


def cost(lab):
    """For each prompt the tokens of the chosen teacher's answer as a share of those of all teachers."""
    def tokens(c):
        return len(lab.tokenizer.encode_answer(c["completion"]))
    return [(row["question_id"], sum(tokens(c) for c in row["candidates"] if c["teacher"] == teacher)
             / sum(map(tokens, row["candidates"])))
            for row, teacher in zip(lab.candidates, chosen_by_router(lab))]


def more_gain(unlike, like):
    """For each question by how much the reward route's gain in grade over the random one is larger in one
    pool than in another."""
    def of(lab):
        def grades(how, kind):
            return {(row["question_id"], row["language"]): row["grade"]
                    for row in lab.answers(arm(how, kind)[0], "sampled")}
        pools = [(grades("reward", kind), grades("random", kind)) for kind in (unlike, like)]
        (more, base), (less, base_of_less) = pools
        return [(q[0], (more[q] - base[q]) - (less[q] - base_of_less[q])) for q in more]
    (more, base), (less, base_of_less) = ([arm(how, kind)[0] for how in ("reward", "random")]
                                          for kind in (unlike, like))
    return Figure(f"gain in grade, {POOLS[unlike]} less {POOLS[like]}", of, "above", 0.0,
                  ((more, base), (less, base_of_less), (more, less)))


POOLS = {"own": "own clusters", "half": "half", "alike": "alike"}


CLAIMS = (
    Claim("routes", "students of the routes: reward > fixed > learned > random > single teacher",
          "reward > fixed > learned, all above random and single (open-ended)",
          (Comparison("reward", "fixed"), Comparison("fixed", "learned"), Comparison("learned", "random"),
           Comparison("random", "single"), Comparison("reward", "random"), Comparison("reward", "single"))),
    Claim("router", "a router on the prompt alone keeps most of the reward route's gain at 1/M of its cost",
          "learned routing recovers most of the gain; one of M teachers generates",
          (Figure("reward kept, less half of the gain", kept_of_gain, "above", 0.0, ()),
           Figure("tokens, as a share of asking four teachers", cost, "below", 0.3, ()),
           Comparison("learned", "random"))),
    Claim("diversity", "the gain of routing by reward grows with how unlike the teachers are",
          "larger gains where teachers differ more",
          (more_gain("own", "half"), more_gain("half", "alike"), more_gain("own", "alike"))),
    Claim("translation", "one English teacher's answers in translation are worse than any route's",
          "the translation setting is worst, below random routing",
          (*(Comparison("translated", other, "below", languages=NOT_ENGLISH)
             for other in ("random", "single", "reward")),
           *(Comparison("translated", other, "below", "apart", languages=NOT_ENGLISH)
             for other in ("random", "single", "reward")))),
)
