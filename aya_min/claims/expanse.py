"""Aya Expanse (arXiv 2412.04261 and its launch blog) and Multilingual Arbitrage (2408.14960): what each step
of the recipe gains, on the embedded world.

All students of one model start from the same base and take the same number of examples and steps: sft is
reward routing, random and single are the other two ways to choose a teacher. merged trains one model per
cluster from the base, with as many steps in all, and averages them; offline and online go on from merged. The
win rates of the papers are judged by GPT-4 against other models; ours by the oracle, against the step before.
"""

from ..arbitrage import route
from ..experiments import Claim, Comparison
from ..pipeline import best_teacher, dpo_settings, online_rounds, sft_settings, teacher_of_family

PAPER = "Aya Expanse, arXiv 2412.04261"
MINUTES = 10


def student(lab, how, teacher_of=None):
    """One model, SFT on one answer to each prompt, chosen by `how`."""
    r = lab.recipe
    rows, _ = route(lab.candidates, how, r.seed, teacher_of, r.keep_cut, lab.tokenizer.key)
    return lab.train(f"SFT on {how} answers", "sft", lab.base, rows, epochs=r.sft_epochs,
                     learning_rate=r.sft_learning_rate)


def single(lab):
    teacher = best_teacher(lab.candidates)
    return student(lab, "fixed", {row["language"]: teacher for row in lab.candidates})


def family(lab):
    return student(lab, "fixed", teacher_of_family(lab.run, lab.teachers))


def merged(lab):
    return lab.clusters("SFT", "sft", lab.base, lab.best_answers, sft_settings(lab.run),
                        lab.recipe.sft_epochs)


def offline(lab):
    return lab.clusters("offline DPO", "dpo", lab.arm("merged"), lab.pool_pairs,
                        dpo_settings(lab.run, "offline"), lab.recipe.offline_epochs)


def after_round(t):
    def arm(lab):
        start = lab.arm("offline")
        prefix = f"online-{start.parent.name}"          # which is named after its content
        rounds = online_rounds(lab.run, prefix, start, lab.arbiter, lab.tokenizer.key)
        return next(folder for name, folder in rounds if name == f"{prefix}-{t}")
    return arm


ARMS = {"base": lambda lab: lab.base, "reward routing": lambda lab: lab.sft,
        "random routing": lambda lab: student(lab, "random"), "single teacher": single,
        "family routing": family, "merged": merged, "offline": offline,
        **{f"online {t}": after_round(t) for t in (1, 2, 3)}}


def both(a, b):
    return tuple(Comparison(a, b, decoding=decoding) for decoding in ("greedy", "sampled"))


def check(recipe, claims):
    """Refuse fewer rounds than the claims compare."""
    arms = {arm for claim in claims for arm in claim.arms}
    most = max(t if f"online {t}" in arms else 0 for t in (1, 2, 3))
    if recipe.rounds < most:
        raise ValueError(f"--config: rounds {recipe.rounds}, and {most} are compared; give as many")


CLAIMS = (
    Claim("reward-routing", "SFT on the answers that a reward model keeps beats SFT on random teachers' "
          "answers and on the single best teacher's", "up to 56.5% (relative) over the best single teacher",
          both("reward routing", "random routing") + both("reward routing", "single teacher")),
    Claim("family", "A teacher chosen by the family of the language beats a random one",
          "fixed routing above random routing", both("family routing", "random routing")),
    Claim("merging-clusters", "Models trained by cluster of languages and merged beat one model on the mix",
          "merging gains at the larger size", both("merged", "reward routing")),
    Claim("offline-dpo", "DPO on the pool's best against its worst gains over SFT",
          "each preference stage gains", both("offline", "merged")),
    Claim("online-dpo", "Three rounds of online DPO gain over offline DPO, and over SFT",
          "online after offline gains", both("online 3", "offline") + both("online 3", "merged")),
    Claim("later-rounds", "The second and third round each gain", "three rounds, each with a gain",
          both("online 2", "online 1") + both("online 3", "online 2")),
    Claim("recipe", "The whole recipe beats its base and the single teacher's student",
          "+25 to +30 points over the instruct model before",
          both("online 3", "base") + both("online 3", "single teacher")),
)

# Why arms of these claims differ in start, steps, tokens or tuning (experiments_matched.py).
UNMATCHED = {
    "offline-dpo": "each stage goes on from the one before: what the stage adds is asked",
    "online-dpo": "each stage goes on from the one before",
    "later-rounds": "each round goes on from the one before",
    "recipe": "the recipe is held against its own start and against less training",
}
