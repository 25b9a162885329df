"""Human feedback is not gold standard (arXiv 2309.16349): what raters weigh, what assertive phrasing hides.

Part 1, on the authors' 900 rated outputs, and so the same for every seed. The lasso of overall quality on the
errors that other raters found, from sums (results/data/human_feedback.json; the ratings have no licence and
are not copied). The weights that their notebook prints are of inputs from 0 to 1, with R^2 0.22; with each
input divided by its deviation the same alpha gives others (refusal .185, formatting .141, factuality .099),
with R^2 0.24. Intervals are of a parametric bootstrap.

Part 2, on the embedded world. An answer is right or wrong and stands in an assertive, a neutral or a hedged
frame (frames.py). A rater holds it for wrong with the probability

    sigmoid(SHARPNESS * (1 if it is wrong else -1) - damping * (1 assertive, 0 neutral, -1 hedged))

and prefers the answer of two that is held for right, or either by a coin. Damping is 0 for honest raters.
Both kinds rate the same pairs with the same draws, so that arms differ in the damping alone. A reward model
is trained on each, and RLOO and one round of online DPO optimise it from the same start. The policy is
trained on answers of which a third are wrong, with frames drawn apart from that; "overconfident" on the same
answers, each frame as frequent, but wrong ones mostly assertive and right ones mostly hedged. Frames are
taken off before the oracle grades; an error is a grade below 2. Answers in Hindi are left out of comparisons:
framed they take up to 55 tokens of the recipe's tokenizer, and 32 are sampled.

Departures: the paper's raters are people and its models are large. It shows that assertive outputs hide
errors and that models trained on preferences are more assertive, and trains none itself, so that hf-reward,
hf-perceived and hf-errors follow from what it says and are not in it. SHARPNESS and DAMPING were set by hand,
before any run, so that an assertive wrong answer is held for right more often than a hedged right one. The
paper's crowd finds errors in 2.5% of assertive and 6.7% of unassertive outputs: a damping of about 0.5.
Seed 0 was looked at once, with half of the recipe's corpus, all its pairs of raters and its steps of RLOO. To
save time these are now a third, half and two thirds, which was not looked at.
"""

import math
import random
from pathlib import Path

import numpy as np

from ..evaluate_bias import PROBES, differences, texts_of
from ..experiments import Claim, Comparison, Figure
from ..files import read_json
from ..frames import ASSERTIVENESS, assertiveness, framed, grade_unframed
from ..languages import LANGUAGES
from ..lasso import Sums, lasso, resampled
from ..preferences import best_worst
from ..world import answer, gold_answer
from ..world_data import corpus, gold

PAPER = "Human feedback is not gold standard, arXiv 2309.16349"
MINUTES = 18
RATINGS = Path(__file__).resolve().parents[2] / "results" / "data" / "human_feedback.json"
SHORT = tuple(code for code in LANGUAGES if code != "hi")       # languages whose answers are not cut
ALPHA = 0.01                                    # of the authors' lasso
SHARPNESS = 1.0
DAMPING = {"honest": 0.0, "damped": 1.5}
WRONG = 1 / 3                                   # of the answers that the policy is trained on
# {wrong: how frequent assertive, neutral and hedged frames are}. Over all answers each is a third.
APART = {False: (1 / 3, 1 / 3, 1 / 3), True: (1 / 3, 1 / 3, 1 / 3)}
OVERCONFIDENT = {False: (0.20, 0.35, 0.45), True: (0.60, 0.30, 0.10)}


# ---- part 1 ------------------------------------------------------------------------------------------------

def ratings():
    """(Sums over the authors' ratings, names of the errors, what their notebook printed)."""
    found = read_json(RATINGS, "get it from the repository again")
    x, xx, xy = (np.array(found[key], dtype=float) for key in ("sum_x", "xx", "xy"))
    return Sums(found["num"], x, found["sum_y"], xx, xy, found["yy"]), found["errors"], found["printed"]


def weighs_less(a, b):
    """The weight of an error less that of another: points of quality that finding it takes off."""
    def of(lab):
        sums, names, _ = ratings()
        i, j = names.index(a), names.index(b)
        weights, drawn = -lasso(sums, ALPHA), -resampled(sums, ALPHA, 2000, seed=0)
        low, high = np.percentile(drawn[:, i] - drawn[:, j], [2.5, 97.5]).tolist()
        return {"value": float(weights[i] - weights[j]), "ci95": [low, high], "num": sums.num}
    return Figure(f"weight of {a} less that of {b}", of, "below", 0.0, ())


def off_print(name, bound):
    """How far our figures are from those printed, at most: "weights" (of two digits), "intercept", "r2"."""
    def of(lab):
        sums, names, printed = ratings()
        b = lasso(sums, ALPHA)
        ours = {"weights": (-b).round(2), "intercept": np.array([sums.intercept(b)]),
                "r2": np.array([sums.r2(b)])}
        theirs = [printed[name][key] for key in names] if name == "weights" else [printed[name]]
        far = float(np.abs(ours[name] - np.array(theirs)).max())
        return {"value": far, "ci95": [far, far], "num": len(theirs)}
    return Figure(f"{name}: largest difference to what is printed", of, "below", bound, ())


# ---- raters ------------------------------------------------------------------------------------------------

def held_for_wrong(wrong, style, damping):
    """The probability that a rater holds an answer for wrong. style: 1 assertive, 0 neutral, -1 hedged."""
    return 1 / (1 + math.exp(damping * style - SHARPNESS * (1 if wrong else -1)))


def choice(draws, sides, damping):
    """Which of two sides (wrong, style) a rater prefers, 0 or 1. draws: three numbers from 0 to 1."""
    flags = [draw < held_for_wrong(*side, damping) for draw, side in zip(draws, sides)]
    return int(flags[0]) if flags[0] != flags[1] else int(draws[2] < 0.5)


def rated_pairs(lab, raters):
    """Preference pairs of answers in frames, each side right or wrong by a coin."""
    rng, rows = random.Random(f"raters/{lab.seed}"), []
    for q in lab.questions("train", lab.recipe.arbiter_pairs // 2, "raters"):
        wrongs = [rng.random() < 0.5 for _ in range(2)]
        frames = [rng.choice(list(ASSERTIVENESS)) for _ in range(2)]
        texts = [framed(q["language"], frame, answer(rng, q, (0, 0, 1, 0))[0] if wrong else gold_answer(q))
                 for wrong, frame in zip(wrongs, frames)]
        sides = [(wrong, ASSERTIVENESS[frame]) for wrong, frame in zip(wrongs, frames)]
        best = choice([rng.random() for _ in range(3)], sides, DAMPING[raters])
        if texts[0] != texts[1]:
            rows.append({**q, "chosen": texts[best], "rejected": texts[1 - best]})
    return rows


# ---- models ------------------------------------------------------------------------------------------------

def in_frames(rows, seed):
    """The rows, their answers in frames drawn at random."""
    rng = random.Random(f"in-frames/{seed}")
    return [{**row, "completion": framed(row["language"], rng.choice(list(ASSERTIVENESS)), row["completion"])}
            if "completion" in row else row for row in rows]


def base(lab):
    """A base that has read frames: a third of the recipe's corpus."""
    r = lab.recipe
    rows = in_frames(corpus(r.corpus // 3, f"human-feedback/{r.seed}", r.level), r.seed)
    texts = [f"{row['prompt']} {row['completion']}" for row in rows[:20000] if "prompt" in row]
    steps = max(1, len(rows) // r.batch_size)
    return lab.train("a base that has read frames", "pretrain", lab.untrained(texts), rows,
                     warmup_steps=min(50, steps // 10), learning_rate=r.base_learning_rate)


def reward_model(raters):
    def train(lab):
        r = lab.recipe
        known = in_frames(gold(r.arbiter_gold // 2, f"human-feedback/{r.seed}", r.level), r.seed)
        reader = lab.train("right answers are read", "sft", lab.arm("base"), known, epochs=1.0,
                           learning_rate=r.arbiter_gold_learning_rate)
        return lab.train(f"the reward model of {raters} raters", "reward", reader, rated_pairs(lab, raters),
                         epochs=1.0, learning_rate=r.arbiter_learning_rate, lm_weight=r.arbiter_lm_weight)
    return train


def lessons(lab, shares):
    """Answers for the policy. shares: of the three frames, of right and of wrong answers."""
    rng, rows = random.Random(f"lessons/{lab.seed}"), []
    for q in lab.questions("train", lab.recipe.lessons, "human-feedback"):
        wrong, drawn = rng.random() < WRONG, rng.random()
        text = answer(rng, q, (0, 0, 1, 0))[0] if wrong else gold_answer(q)
        place = sum(drawn >= edge for edge in np.cumsum(shares[wrong])[:2])
        rows.append({**q, "completion": framed(q["language"], list(ASSERTIVENESS)[place], text)})
    return rows


def start(shares):
    return lambda lab: lab.train("the policy", "sft", lab.arm("base"), lessons(lab, shares), epochs=1.0,
                                 learning_rate=lab.recipe.sft_learning_rate)


def rloo(raters, begin="start"):
    def train(lab):
        r, steps = lab.recipe, -(-lab.recipe.rloo_steps * 2 // 3)
        return lab.train("rloo", "rl", lab.arm(begin),
                         lab.questions("preference", steps * r.batch_size, "human-feedback"),
                         reward_model=lab.arm(f"reward model, {raters}"), num_samples=r.rloo_samples,
                         beta=r.rloo_beta, learning_rate=r.rloo_learning_rate, max_steps=steps)
    return train


def dpo(raters):
    """One round of online DPO: the best against the worst of the start's samples."""
    def train(lab):
        r, begin = lab.recipe, lab.arm("start")
        rows = lab.questions("preference", max(1, r.online_prompts // 2), "human-feedback")
        scored = lab.scored_samples("of-start", begin, rows, r.online_samples, 1.0,
                                    reward_model=lab.arm(f"reward model, {raters}"))
        pairs, _ = best_worst(scored, keep_cut=r.keep_cut)
        return lab.train("dpo", "dpo", begin, pairs, beta=r.online_beta, nll_weight=r.online_nll_weight,
                         epochs=r.online_epochs, learning_rate=r.online_learning_rate,
                         batch_size=lab.batch_of(pairs, f"{raters}, dpo"))
    return train


ARMS = {
    "base": base, "start": start(APART), "overconfident start": start(OVERCONFIDENT),
    **{f"reward model, {raters}": reward_model(raters) for raters in DAMPING},
    **{f"{raters}, rloo": rloo(raters) for raters in DAMPING},
    **{f"{raters}, dpo": dpo(raters) for raters in DAMPING},
    **{f"{raters}, rloo, overconfident": rloo(raters, "overconfident start") for raters in DAMPING}}


# ---- what answers are like, and what reward models like ----------------------------------------------------

def is_error(row):
    return grade_unframed(row, row["completion"]).grade < 2


def style_of(row):
    return assertiveness(row["language"], row["completion"])


MEASURES = {"assertiveness": lambda row: float(style_of(row)), "errors": lambda row: float(is_error(row)),
            "errors that damped raters see":
                lambda row: held_for_wrong(is_error(row), style_of(row), DAMPING["damped"])}


def liked(lab, raters):
    """[(question id, {probe of evaluate_bias: difference of the reward model's scores})]."""
    r, rng = lab.recipe, random.Random(f"liked/{lab.seed}")
    rows = [{**q, "completion": None, "home": q["language"]}
            for q in lab.questions(r.eval_split, max(1, r.eval_count // 4), "liked")]
    texts = [texts_of(row, rng) for row in rows]
    flat = [{**row, "completion": text} for row, some in zip(rows, texts) for text in some.values()]
    scores = iter(lab.scores("liked", flat, lab.arm(f"reward model, {raters}")))
    return [(row["question_id"], differences({key: next(scores) for key in some}))
            for row, some in zip(rows, texts)]


def likes(raters, probe, side):
    def of(lab):
        return [(question, found[probe]) for question, found in liked(lab, raters)]
    names = {"sure, wrong": "an assertive wrong answer less a hedged right one",
             "assertive": "an answer in its assertive frame less in its hedged one"}
    return Figure(f"reward model of {raters} raters, {names[probe]}", of, side, 0.0, ())


def of_probes(lab):
    """The picture: every probe of both reward models, over what right has above wrong."""
    rows = []
    for raters in DAMPING:
        found = liked(lab, raters)
        means = {name: float(np.mean([each[name] for _, each in found if name in each])) for name in PROBES}
        whole = abs(means["right"])
        shown = [(means[name] / whole if whole else None, False) for name in PROBES]
        rows.append((f"{raters} raters", shown))
    return {"columns": list(PROBES), "ends": [-2, 2], "rows": rows}


# ---- claims ------------------------------------------------------------------------------------------------

def more(measure, side, *pairs):
    return tuple(Comparison(a, b, side, measure=measure, languages=SHORT) for a, b in pairs)


TO_START = tuple((f"damped, {how}", "start") for how in ("rloo", "dpo"))
TO_HONEST = tuple((f"damped, {how}", f"honest, {how}") for how in ("rloo", "dpo"))
SURE = "damped, rloo, overconfident"
CLAIMS = (
    Claim("hf-weights", "Factuality and inconsistency weigh less in quality than refusal and formatting",
          "weights .35 and .21 against .95 and .76",
          tuple(weighs_less(a, b) for a in ("factuality", "inconsistent")
                for b in ("refusal", "formatting"))),
    Claim("hf-digits", "The authors' regression, again from sums",
          "intercept 3.70898, R^2 0.22217, 10 weights",
          (off_print("weights", 0.005), off_print("intercept", 1e-6), off_print("r2", 1e-6))),
    Claim("hf-reward", "A reward model of raters whom assertive phrasing damps prefers sure wrong answers",
          "assertiveness skews the perceived rate of factuality errors (abstract)",
          (likes("damped", "sure, wrong", "above"), likes("honest", "sure, wrong", "below"),
           likes("damped", "assertive", "above")), picture=of_probes),
    Claim("hf-assertive", "Optimising it makes answers more assertive, and more so than with honest raters",
          "human feedback as objective disproportionately increases assertiveness (abstract, preliminary)",
          more("assertiveness", "above", *TO_START, *TO_HONEST)),
    Claim("hf-perceived", "The raters see fewer errors afterwards",
          "the crowd finds 2.5% in assertive outputs, 6.7% in unassertive ones",
          more("errors that damped raters see", "below", *TO_START)),
    Claim("hf-errors", "There are more errors than after honest raters", "not in the paper, follows from it",
          more("errors", "above", *TO_HONEST, (SURE, "honest, rloo, overconfident"))),
    Claim("hf-errors-rise", "There are more errors than before", "not in the paper",
          more("errors", "above", *TO_START)),
    Claim("hf-errors-rise-overconfident", "The same where the policy is surer of its wrong answers",
          "not in the paper", more("errors", "above", (SURE, "overconfident start"))),
)

# Why arms of these claims differ in start, steps, tokens or tuning (experiments_matched.py).
UNMATCHED = dict.fromkeys(("hf-assertive", "hf-perceived", "hf-errors-rise", "hf-errors-rise-overconfident"),
                          "what optimisation changes in its start is what is asked")
