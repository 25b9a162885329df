"""Losses on preference pairs beside each other, and pairs from where: DPO (arXiv 2305.18290) and what was
proposed after it, offline and online.

Tested: offline then online DPO against either alone (Aya Expanse, arXiv 2412.04261); SFT on the chosen
answers as the control (2508.18312); rejected answers of the student itself against the pool's; that
log p(chosen) falls in plain DPO, and what holds it; six online rounds, under the recipe's arbiter and under a
weak one; each loss against the start: IPO (2310.12036), hinge (2305.10425), cDPO, SimPO (2405.14734) and KTO
(2402.01306).

Matched conditions: all arms start from lab.sft. The offline ones see the same pairs, the arbiter's best and
worst of the pool, in the same order and batches for the same number of steps (KTO: both answers of each pair,
in batches of twice as many). "both-3", "offline-long" and "alone-5" take the same number of steps in all, on
offline pairs and three online rounds, on offline pairs, and on five online rounds. The rounds of "both" and
"weak" differ in the arbiter only. The arms about rejected answers share prompts, chosen answers and steps.
The losses are compared with the start at a third of the recipe's learning rate, at which more of them gained,
and for log p(chosen) also at the recipe's (-fast), at which it moves. The rounds begin with the recipe's own
offline DPO, dpo-nll-fast.
Departures: the oracle judges, not GPT-4; online rounds have half as many prompts as the recipe's. A win at
similar length is one among the questions whose two answers differ in length by at most a fifth.
"""

from ..experiments import Claim, Comparison, Figure
from ..preferences import best_worst
from ..world_data import graded_pairs

PAPER = "Preference losses, arXiv 2305.18290, 2310.12036, 2305.10425, 2405.14734, 2402.01306"
MINUTES = 17

# What each loss has beside the recipe's settings of offline DPO without --nll-weight. Log-probs of one token
# want a larger beta; IPO aims at a margin of 1 / (2 beta) nats.
LOSSES = {"dpo": {}, "dpo-nll": dict(nll_weight=0.2),
          "length-normalized": dict(length_normalized=True, beta=1.0), "ipo": dict(loss="ipo"),
          "hinge": dict(loss="hinge"), "cdpo": dict(loss="cdpo", label_smoothing=0.1),
          "simpo": dict(loss="simpo", beta=2.0, simpo_gamma=1.0)}
# Shares of the recipe's learning rate of offline DPO. Of 1 and 1/3 for the losses, and of 1 and 10/3 for SFT,
# these were better on the validation split of seed 0.
GENTLE, OF_CHOSEN = 1 / 3, 10 / 3
FAST = ("dpo", "dpo-nll", "length-normalized", "ipo", "hinge")
WEAK = 32                   # the weak arbiter learns from the recipe's number of pairs divided by this,
WEAK_FLIP = 0.2             # and a fifth of them are labelled the wrong way round
ALONE_ROUNDS = 5
SIMILAR = 0.2               # by how much the lengths of two answers may differ, as a share of the longer one


# ---- offline -----------------------------------------------------------------------------------------------

def offline_settings(lab, rows, share=1.0):
    r = lab.recipe
    size = lab.batch_of(rows, "offline preference training")
    return dict(learning_rate=share * r.offline_learning_rate, batch_size=size,
                max_steps=max(1, round(r.offline_epochs * len(rows) / size)))


def offline(name, share, **more):
    def arm(lab):
        rows = lab.pool_pairs
        settings = offline_settings(lab, rows, share) | dict(beta=lab.recipe.offline_beta) | more
        return lab.train(f"preference-{name}", "dpo", lab.sft, rows, **settings)
    return arm


def offline_long(lab):
    rows = lab.pool_pairs
    settings = offline_settings(lab, rows) | dict(max_steps=all_steps(lab), beta=lab.recipe.offline_beta)
    return lab.train("preference-offline-long", "dpo", lab.sft, rows, **settings | LOSSES["dpo-nll"])


def answers_of(row, *sides):
    """The prompt of a pair with each of its answers as a completion."""
    prompt = {key: value for key, value in row.items() if not key.startswith(("chosen", "rejected"))}
    return [{**prompt, "completion": row[side], "label": side == "chosen"} for side in sides]


def kto(lab):
    rows = lab.pool_pairs
    settings = offline_settings(lab, rows, GENTLE)
    labelled = [answer for row in rows for answer in answers_of(row, "chosen", "rejected")]
    return lab.train("preference-kto", "kto", lab.sft, labelled, beta=lab.recipe.offline_beta,
                     **settings | dict(batch_size=2 * settings["batch_size"]))


def sft_on_chosen(lab):
    rows = lab.pool_pairs
    chosen = [answer for row in rows for answer in answers_of(row, "chosen")]
    return lab.train("preference-chosen", "sft", lab.sft, chosen,
                     **offline_settings(lab, rows, OF_CHOSEN))


def pairs_with_own(lab):
    """The pairs whose chosen answer the arbiter prefers to a sample of the start too, with that as "own"."""
    rows = lab.pool_pairs
    prompts = [answers_of(row, "chosen")[0] for row in rows]
    groups = lab.sample("preference-own", lab.sft, prompts, 1, 1.0)
    own = [group[0]["completion"] for group in groups]
    answered = [{**row, "completion": text} for row, text in zip(prompts, own)]
    rewards = lab.scores("preference-own-scores", answered)
    return [{**row, "own": text} for row, text, score in zip(rows, own, rewards)
            if text.strip() and score is not None and score < row["chosen_reward"]]


def against(name, of):
    """DPO of the chosen answers against those that `of` names: "rejected", the pool's worst, or "own"."""
    def arm(lab):
        made = pairs_with_own(lab)
        rows = [{**{key: row[key] for key in row if key != "own"}, "rejected": row[of]} for row in made]
        settings = offline_settings(lab, rows) | dict(beta=lab.recipe.offline_beta) | LOSSES["dpo-nll"]
        return lab.train(f"preference-{name}", "dpo", lab.sft, rows, **settings)
    return arm


# ---- online ------------------------------------------------------------------------------------------------

def round_prompts(lab):
    return max(lab.recipe.batch_size, lab.recipe.online_prompts // 2)


def round_steps(lab):
    return max(1, round(lab.recipe.online_epochs * round_prompts(lab) / lab.recipe.batch_size))


def all_steps(lab):
    """Those of offline DPO and three online rounds."""
    return offline_settings(lab, lab.pool_pairs)["max_steps"] + 3 * round_steps(lab)


def weak_arbiter(lab):
    """A reward model of few pairs, a part of them wrong, that has not read right answers first."""
    r = lab.recipe
    rows = lab.questions("train", max(2 * r.batch_size, r.arbiter_pairs // WEAK), "preference-weak")
    labelled = graded_pairs(rows, [None] * len(rows), f"weak/{lab.seed}", WEAK_FLIP)
    return lab.train("preference-weak-arbiter", "reward", lab.base, labelled, epochs=1.0,
                     batch_size=lab.batch_of(labelled, "the weak arbiter"),
                     learning_rate=r.arbiter_learning_rate)


def online(name, number, previous, steps=round_steps, judge=None):
    """A round of online DPO from the arm `previous`: its samples, the best against the worst."""
    def arm(lab):
        r, start = lab.recipe, lab.arm(previous)
        rows = lab.questions("preference", round_prompts(lab), f"preference-round-{number}")
        candidates = lab.scored_samples(f"preference-{name}", start, rows, r.online_samples,
                                        r.online_temperature, number, judge and judge(lab))
        found = best_worst(candidates, r.online_margin, r.keep_cut, lab.tokenizer.key)[0]
        return lab.train(f"preference-{name}", "dpo", start, found, beta=r.online_beta,
                         nll_weight=r.online_nll_weight, learning_rate=r.online_learning_rate,
                         batch_size=lab.batch_of(found, f"arm {name}"), max_steps=steps(lab))
    return arm


def alone_steps(lab):
    return max(1, round(all_steps(lab) / ALONE_ROUNDS))


def chain(prefix, start, rounds, **more):
    """{arm: a round of online DPO}, one after the other."""
    return {f"{prefix}-{i}": online(f"{prefix}-{i}", i, f"{prefix}-{i - 1}" if i > 1 else start, **more)
            for i in range(1, rounds + 1)}


ARMS = {
    "sft": lambda lab: lab.sft,
    **{name: offline(name, GENTLE, **more) for name, more in LOSSES.items()},
    **{f"{name}-fast": offline(f"{name}-fast", 1.0, **LOSSES[name]) for name in FAST},
    "kto": kto, "chosen": sft_on_chosen, "offline-long": offline_long,
    "own-rejected": against("own-rejected", "own"), "pool-rejected": against("pool-rejected", "rejected"),
    **chain("both", "dpo-nll-fast", 6), **chain("alone", "sft", ALONE_ROUNDS, steps=alone_steps),
    **chain("weak", "dpo-nll-fast", 6, judge=weak_arbiter)}


# ---- figures -----------------------------------------------------------------------------------------------

def late(lab, arm, name):
    """A metric of the second half of an arm's steps."""
    values = [row[name] for row in lab.metrics(arm) if "lr" in row]
    return values[len(values) // 2:]


def movement(lab):
    """By how many nats plain DPO has moved log p(chosen) from the reference's, step by step."""
    return [reward / lab.recipe.offline_beta for reward in late(lab, "dpo-fast", "rewards/chosen")]


def held(arm):
    """By how many nats log p(chosen) is above that of plain DPO on the same batches."""
    def of(lab):
        held, plain = (late(lab, f"{name}-fast", "logps/chosen") for name in (arm, "dpo"))
        return [a - b for a, b in zip(held, plain, strict=True)]
    return Figure(f"nats of log p(chosen), {arm} less dpo", of, "above", 0.0,
                  ((f"{arm}-fast", "dpo-fast"),))


def alike_in_length(text, other):
    return abs(len(text) - len(other)) <= SIMILAR * max(len(text), len(other))


def similar_length(a, b):
    """The win rate, in percent, of a over b where their answers are of similar length."""
    def wins(lab):
        both = zip(lab.answers(a, "sampled"), lab.answers(b, "sampled"), strict=True)
        return [(x["question_id"], 50.0 * (1 + (x["grade"] > y["grade"]) - (x["grade"] < y["grade"])))
                for x, y in both if alike_in_length(x["completion"], y["completion"])]
    return Figure(f"wins of {a} over {b} at similar length, percent", wins, "above", 50.0, ((a, b),))


def weak_rise(lab):
    """How much higher the weak arbiter scores the answers of its sixth round than those of its third."""
    third, sixth = (lab.scores(f"preference-{arm}-proxy", lab.answers(arm, "sampled"), weak_arbiter(lab))
                    for arm in ("weak-3", "weak-6"))
    ids = [row["question_id"] for row in lab.answers("weak-6", "sampled")]
    return [(question, b - a) for question, a, b in zip(ids, third, sixth, strict=True)
            if a is not None and b is not None]


CLAIMS = (
    Claim("pref-both", "Offline then online DPO beats offline alone and online alone",
          "the launch blog: offline and online beat either alone",
          (Comparison("both-3", "offline-long"), Comparison("both-3", "alone-5"),
           similar_length("both-3", "offline-long"), similar_length("both-3", "alone-5"))),
    Claim("pref-chosen", "DPO beats SFT on its chosen answers", "2508.18312 predicts near equality",
          (Comparison("dpo", "chosen"), Comparison("dpo-nll", "chosen"),
           similar_length("dpo-nll", "chosen"))),
    Claim("pref-rejected", "Rejected answers of the student itself teach more than the pool's worst",
          "on-policy contrast", (Comparison("own-rejected", "pool-rejected"),)),
    Claim("pref-displacement",
          "Plain DPO lowers log p(chosen); an NLL term, length normalisation, the hinge and IPO hold it",
          "likelihood displacement",
          (Figure("nats by which log p(chosen) moved in plain DPO", movement, "below", 0.0, ()),
           *map(held, FAST[1:]))),
    Claim("pref-proxy", "From round three to six the arbiter's reward rises and the oracle's grade does not",
          "the gain of online rounds shrinks after about three",
          (Comparison("both-6", "both-3", measure="reward"), Comparison("both-6", "both-3", "level"))),
    Claim("pref-weak", "Under a weak arbiter its own score rises on, and answers are worse than under the "
          "recipe's", "reward hacking",
          (Figure("weak arbiter's score, round 6 less round 3", weak_rise, "above", 0.0,
                  (("weak-6", "weak-3"),)),
           Comparison("weak-6", "weak-3", "below"), Comparison("weak-6", "both-6", "below"))),
    Claim("pref-losses", "Every preference loss improves on its start", "as each paper says of its own",
          tuple(Comparison(name, "sft") for name in (*LOSSES, "kto"))),
    Claim("pref-simpo", "SimPO beats DPO, without a reference", "AlpacaEval 2: up to 6.4 points more",
          (Comparison("simpo", "dpo"), similar_length("simpo", "dpo"))),
    Claim("pref-kto", "KTO does as well as DPO without pairs", "matches or exceeds DPO from 1B to 30B",
          (Comparison("kto", "dpo", "level"),)))

# Why arms of these claims differ in start, steps, tokens or tuning (experiments_matched.py).
UNMATCHED = {
    "pref-both": "steps are equal over all rounds; the record counts those of the last",
    "pref-chosen": "SFT reads one answer of a pair, DPO both; pairs and steps are equal",
    "pref-proxy": "later rounds are held against earlier ones",
    "pref-weak": "later rounds are held against earlier ones, and rounds of one arbiter against another's",
    "pref-losses": "a stage is held against its start",
    "pref-kto": "KTO runs a second pass for its baseline; answers and steps are equal",
}
