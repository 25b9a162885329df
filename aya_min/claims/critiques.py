"""Improving reward models with synthetic critiques (arXiv 2405.20850), on the embedded world.

A reward model reads prompt, answer and a critique of the answer (critiques.py), in training and on held-out
pairs, and is compared with one that reads no critiques. The critics:

    oracle      says what the oracle's grade says: right, right but no sentence, wrong and what is right, in a
                wrong language
    noisy       the oracle's, but for a share NOISE of the answers the sentence of another grade
    random      for every answer the sentence of a grade that is drawn, whatever its own; where it says
                "wrong" it names what is right, as all do
    wrong       wrong on purpose: for every answer the sentence of another grade than its own
    trained     a language model that learned the oracle's critiques of other answers, to questions of another
                split; it starts from the strong start and criticises greedily

The start of the reward models is weak, a base that read few noisy rows, or strong, the same after right
answers. All arms take as many steps at one learning rate; arms of one size see the same pairs in the same
order. A pair is worth w plain ones if as many plain pairs as w times those with critiques
give the same held-out accuracy, interpolated between SIZES on the logarithm of the size; an accuracy above
the plain curve counts as its end, so that a large worth is a lower bound.

The comparisons were written before the first run, but for two that seed 0 suggested. There the trained critic
called almost every answer right (critiques-critic). It told right from wrong no better when it started from a
base that had read half of the corpus, with five times the lessons, or when it had to give the right answer
first. And there critiques that are wrong on purpose helped, since they are never true and so tell the grade
by exclusion: the poor critic became the random one, and what is wrong on purpose a claim of its own.

Departures: critiques are short sentences in English, four of them but for the right words; the paper's are by
language models and at length. The held-out pairs are those of the world, not RewardBench.
"""

import random
from functools import partial

import numpy as np

from .. import world_data
from ..critiques import JOIN
from ..experiments import Claim, Figure
from ..world import answer, answer_language, listed, say, solve
from ..world_data import graded_pairs
from ..world_oracle import grade

PAPER = "Synthetic critiques for reward models, arXiv 2405.20850"
MINUTES = 8
SIZES = (15, 40, 100, 250, 500, 960)        # pairs
SMALL, LARGE = SIZES[:3], SIZES[3:]
STRONG = SIZES[1::2]                        # the sizes that the strong start is trained with
STEPS, BATCH, RATE = 60, 16, 2e-3           # of every reward model
HELD_OUT = 240                              # pairs
SHARE = 8                                   # the weak start reads the recipe's corpus divided by this
LESSONS = 9600                              # right answers of the strong start, two thirds as many critiques
NOISE = 0.3
CRITICS = ("none", "oracle", "noisy", "random", "wrong", "trained")
SENTENCES = {3: "It is right.", 2: "It is right, but no sentence.", 1: "It is wrong: {right}.",
             0: "It is in a wrong language."}
REQUEST = "{prompt}\n{answer}"              # what the trained critic is asked


# ---- critiques ---------------------------------------------------------------------------------------------

def sentence(question, given):
    """The critique of an answer with this grade."""
    right = say(answer_language(question), solve(question["task"], question["args"]))
    return SENTENCES[given].format(right=listed(question["language"], right))


def other_grade(rng, given):
    return rng.choice([one for one in SENTENCES if one != given])


def programmed(critic, rng, question, text):
    """The critique of an answer by the critic "oracle", "noisy", "random" or "wrong"."""
    given = grade(question, text).grade
    if critic == "random":
        return sentence(question, rng.choice(list(SENTENCES)))
    share = {"oracle": 0.0, "noisy": NOISE, "wrong": 1.0}[critic]
    return sentence(question, other_grade(rng, given) if rng.random() < share else given)


def asked(question, text):
    """The row that asks the trained critic."""
    return {**question, "prompt": REQUEST.format(prompt=question["prompt"], answer=text)}


# ---- starts and data ---------------------------------------------------------------------------------------

def scale(lab, number):
    """`number` at preset tiny, less where the preset has less."""
    return max(32, number * lab.recipe.corpus // 144000)


def weak(lab):
    r = lab.recipe
    rows = world_data.corpus(r.corpus // SHARE, r.seed, r.level)
    texts = [row[key] for row in rows for key in ("text", "prompt", "completion") if key in row]
    texts += [JOIN + text for text in SENTENCES.values()] * 50
    return lab.train("a weak start", "pretrain", lab.untrained(texts), rows, warmup_steps=20,
                     learning_rate=r.base_learning_rate, batch_size=min(r.batch_size, len(rows)))


def strong(lab):
    rows = world_data.gold(scale(lab, LESSONS), lab.seed, lab.recipe.level)
    return lab.train("a strong start", "sft", lab.arm("weak"), rows, epochs=1.0, learning_rate=2e-3)


def critic(lab):
    """A model trained to criticise: SFT on the oracle's critiques of answers to other questions."""
    rng, rows = random.Random(f"critic/{lab.seed}"), []
    for q in lab.questions("train", scale(lab, LESSONS * 2 // 3), "critic"):
        text, _ = answer(rng, q, (2, 1, 2, 1))
        rows.append({**asked(q, text), "completion": programmed("oracle", rng, q, text)})
    return lab.train("a critic", "sft", lab.arm("strong"), rows, epochs=1.0, learning_rate=2e-3)


def pairs_of(lab, name):
    """The pairs without critiques: "train", of which each size takes the first, or "held-out"."""
    split, count, flip = {"train": ("preference", SIZES[-1], 0.05),
                          "held-out": (lab.recipe.eval_split, HELD_OUT, 0.0)}[name]
    asked_of = lab.questions(split, count, f"critiques-{name}")
    return graded_pairs(asked_of, [None] * count, f"critiques-{name}/{lab.seed}", flip)


def with_critiques(lab, name, by):
    """The pairs with the critiques of a critic."""
    def make(folder):
        rows, sides = pairs_of(lab, name), ("chosen", "rejected")
        if by == "trained":
            requests = [asked(row, row[side]) for row in rows for side in sides]
            groups = lab.sample(f"critiques-{name}", lab.arm("critic"), requests, 1, 0.0)
            told = iter([group[0]["completion"].strip() or "-" for group in groups])
        else:
            rng = random.Random(f"{by}/{name}/{lab.seed}")
            told = (programmed(by, rng, row, row[side]) for row in rows for side in sides)
        return {"rows": [{**row, **{f"{side}_critique": next(told) for side in sides}} for row in rows]}
    if by == "none":
        return pairs_of(lab, name)
    its_model = by == "trained" and lab.name_of(lab.arm("critic"))
    return lab.step(f"critiques-{by}-{name}", make, its_model)["rows"]


# ---- reward models -----------------------------------------------------------------------------------------

def reward_model(start, by, size, lab):
    rows = with_critiques(lab, "train", by)[:size]
    return lab.train(f"{size} pairs, critic {by}, {start} start", "reward", lab.arm(start), rows,
                     max_steps=STEPS, batch_size=min(BATCH, size), warmup_steps=10, learning_rate=RATE)


ARMS = {"weak": weak, "strong": strong, "critic": critic}
ARMS |= {f"weak, {by}, {size}": partial(reward_model, "weak", by, size) for by in CRITICS for size in SIZES}
ARMS |= {f"strong, {by}, {size}": partial(reward_model, "strong", by, size)
         for by in ("none", "oracle") for size in STRONG}


def right(lab, by, size, start="weak"):
    """(pairs,) 1 where a reward model prefers the better answer of a held-out pair, 0.5 where it ties."""
    rows = with_critiques(lab, "held-out", by)
    told = lambda row, side: {} if by == "none" else {"critique": row[f"{side}_critique"]}
    texts = [{**row, "completion": row[side], **told(row, side)} for side in ("chosen", "rejected")
             for row in rows]
    scores = lab.scores("critiques-held-out", texts, lab.arm(f"{start}, {by}, {size}"))
    chosen, rejected = np.array(scores).reshape(2, len(rows))
    return np.where(chosen == rejected, 0.5, chosen > rejected)


def ids(lab):
    return [row["question_id"] for row in pairs_of(lab, "held-out")]


# ---- figures -----------------------------------------------------------------------------------------------

def mean_right(lab, by, sizes, start="weak"):
    """(pairs,) the mean over sizes."""
    return np.mean([right(lab, by, size, start) for size in sizes], 0)


def held(a, b, sizes, start="weak"):
    """The pairs of arms of two critics, one a size."""
    return tuple((f"{start}, {a}, {size}", f"{start}, {b}, {size}") for size in sizes)


def more(a, b, sizes, what, side="above"):
    """The held-out accuracy with critic a less that with critic b, mean over the sizes."""
    def of(lab):
        return list(zip(ids(lab), (mean_right(lab, a, sizes) - mean_right(lab, b, sizes)).tolist()))
    return Figure(f"accuracy with {a} less with {b}, {what}", of, side, 0.0, held(a, b, sizes))


def tells(lab):
    """Where one answer of a pair is right and the other wrong, the share of both that the trained critic
    calls what it is. A critic that says the same of all has a half."""
    found = []
    for row in with_critiques(lab, "held-out", "trained"):
        given = {side: grade(row, row[side]).grade for side in ("chosen", "rejected")}
        if sorted(given.values()) == [1, 3]:
            holds = [(row[f"{side}_critique"] == SENTENCES[3]) == (of == 3) for side, of in given.items()]
            found.append((row["question_id"], sum(holds) / 2))
    return found


def fades(by):
    """The gain of a critic with few pairs less that with many."""
    def of(lab):
        few, many = (mean_right(lab, by, sizes) - mean_right(lab, "none", sizes) for sizes in (SMALL, LARGE))
        return list(zip(ids(lab), (few - many).tolist()))
    return Figure(f"gain of {by} with few pairs less with many", of, "above", 0.0, held(by, "none", SIZES))


def stronger(lab):
    """The gain of the oracle's critiques from the weak start less that from the strong one."""
    gains = [mean_right(lab, "oracle", STRONG, start) - mean_right(lab, "none", STRONG, start)
             for start in ("weak", "strong")]
    return list(zip(ids(lab), (gains[0] - gains[1]).tolist()))


def plain_pairs(curve, accuracy):
    """How many plain pairs give this accuracy. curve: the accuracies at SIZES, of which the highest so far
    counts. Below the curve it is the smallest size, above it the largest."""
    curve = np.maximum.accumulate(curve) + 1e-9 * np.arange(len(SIZES))         # rising, to interpolate
    return float(np.exp(np.interp(accuracy, curve, np.log(SIZES))))


def worth(by, size):
    """How many plain pairs one with a critique is worth; its interval by the bootstrap over questions."""
    def of(lab, resamples=1000):
        plain = np.array([right(lab, "none", each) for each in SIZES])                  # (sizes, pairs)
        told, names = right(lab, by, size), ids(lab)
        places = {name: [i for i, other in enumerate(names) if other == name] for name in names}
        groups, rng = list(places.values()), np.random.default_rng(0)
        found = []
        for _ in range(resamples):
            drawn = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
            found.append(plain_pairs(plain[:, drawn].mean(1), told[drawn].mean()) / size)
        value = plain_pairs(plain.mean(1), told.mean()) / size
        return {"value": value, "ci95": np.percentile(found, [2.5, 97.5]).tolist(), "num": len(names)}
    return Figure(f"plain pairs that one of {size} with a critique by {by} is worth", of, "above", 1.0,
                  held(by, "none", [size]))


def picture(lab):
    """Held-out accuracy by critic and number of pairs."""
    def cell(start, by, size):
        there = f"{start}, {by}, {size}" in ARMS
        return (float(right(lab, by, size, start).mean()) if there else None), False
    lines = [("weak", by) for by in CRITICS] + [("strong", "none"), ("strong", "oracle")]
    return {"columns": [f"{size} pairs" for size in SIZES],
            "rows": [(f"{start} start, {by}", [cell(start, by, size) for size in SIZES])
                     for start, by in lines]}


FEW, ALL = (SMALL, "few pairs"), (SIZES, "all sizes")
CLAIMS = (
    Claim("critiques-help", "Critiques of good quality raise held-out accuracy where pairs are few",
          "critiques raise the accuracy of reward models, most with weak starts and little data",
          tuple(more(by, "none", *FEW) for by in ("oracle", "noisy", "trained")), picture),
    Claim("critiques-worth", "A pair with a good critique is worth more than one plain pair (64, 24 and "
          "9.6 are the end of the curve: at least that)",
          "one pair with a good critique is worth up to about 40 plain pairs",
          tuple(worth(by, size) for by in ("oracle", "trained") for size in SMALL)),
    Claim("critiques-quality", "The better the critic, the better the reward model",
          "gains depend on the quality of the critiques",
          (more("oracle", "noisy", *ALL), more("noisy", "random", *ALL))),
    Claim("critiques-poor", "Poor critiques hurt", "critiques of low quality hurt",
          (more("random", "none", *ALL, side="below"),)),
    Claim("critiques-wrong", "Critiques that are wrong on purpose hurt", "ours, no paper's",
          (more("wrong", "none", *ALL, side="below"),)),
    Claim("critiques-critic", "The model trained to criticise tells right answers from wrong ones",
          "ours, no paper's", (Figure("right verdicts of the trained critic", tells, "above", 0.5, ()),)),
    Claim("critiques-fade", "The gains shrink with much data and with a strong start",
          "gains fade with strong starts or much data",
          (fades("oracle"), fades("trained"),
           Figure("gain of oracle from the weak start less from the strong one", stronger, "above", 0.0,
                  held("oracle", "none", STRONG) + held("oracle", "none", STRONG, "strong")))),
)

# Why arms of these claims differ in start, steps, tokens or tuning (experiments_matched.py).
UNMATCHED = dict.fromkeys(("critiques-help", "critiques-worth", "critiques-poor", "critiques-wrong",
                           "critiques-fade"), "the critiques are read as well, which is what is asked")
