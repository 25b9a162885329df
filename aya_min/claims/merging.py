"""Merging: Mix Data or Merge Models? (arXiv 2410.10801) and Aya Expanse (2412.04261, section 2.2), on the
embedded world.

Clusters of languages stand in for the paper's mixes. All arms of a stage take the same number of optimizer
steps in all on the same rows, from the same start. The spill is the share of the other clusters' rows that a
cluster also trains on. Departures: judged by the oracle, no safety objective; SLERP of four models is a tree
of pairs.
"""

from ..experiments import Claim, Comparison
from ..languages import LANGUAGES
from ..pipeline import dpo_settings, sft_settings

PAPER = "Mix Data or Merge Models, arXiv 2410.10801; Aya Expanse, 2412.04261"
MINUTES = 11
OF_EACH = {code: [code] for code in LANGUAGES}


def by_cluster(start="base", **how):
    """An arm: SFT by cluster on the arbitrage's rows, merged by a plain average."""
    def arm(lab):
        return lab.clusters("SFT", "sft", lab.arm(start), lab.best_answers, sft_settings(lab.run),
                            lab.recipe.sft_epochs, **how)
    return arm


def other_method(method, **settings):
    """An arm: the clusters of "merged", merged by another method."""
    def arm(lab):
        parts = list(lab.parts(lab.arm("merged")).values())
        return lab.merge(method, parts, method, lab.base, **settings)
    return arm


def slerp(lab):
    """SLERP of the SLERPs of both halves."""
    a, b, c, d = lab.parts(lab.arm("merged")).values()
    halves = [lab.merge("slerp", pair, "slerp", t=0.5) for pair in ([a, b], [c, d])]
    return lab.merge("slerp", halves, "slerp", t=0.5)


def preferences_by_cluster(start):
    """An arm: offline DPO by cluster, merged. start: the function lab -> what each cluster starts from."""
    def arm(lab):
        return lab.clusters("offline DPO", "dpo", start(lab), lab.pool_pairs,
                            dpo_settings(lab.run, "offline"), lab.recipe.offline_epochs)
    return arm


def merge_then_dpo(lab):
    r = lab.recipe
    return lab.train("offline DPO of one model", "dpo", lab.arm("merged"), lab.pool_pairs,
                     epochs=r.offline_epochs, learning_rate=r.offline_learning_rate, beta=r.offline_beta,
                     nll_weight=r.offline_nll_weight)


def small_base(lab):
    """A base with half the heads, as wide each, pretrained as the recipe's on the same rows."""
    return lab.base_of_width(1 / 2)


def small_mix(lab):
    return lab.train("SFT of the small base on the mix", "sft", lab.arm("small base"), lab.best_answers,
                     epochs=lab.recipe.sft_epochs, learning_rate=lab.recipe.sft_learning_rate)


ARMS = {"base": lambda lab: lab.base, "mix": lambda lab: lab.sft, "merged": by_cluster(),
        "no shared languages": by_cluster(shared=[]), "no spill": by_cluster(spill=0.0),
        "no spill, no shared": by_cluster(spill=0.0, shared=[]),
        "one per language": by_cluster(clusters=OF_EACH, shared=[], spill=0.0),
        "slerp": slerp, "ties": other_method("ties"), "dare-ties": other_method("dare-ties"),
        "merge, DPO, merge": preferences_by_cluster(lambda lab: lab.arm("merged")),
        "DPO, then merge": preferences_by_cluster(lambda lab: lab.parts(lab.arm("merged"))),
        "merge, then DPO": merge_then_dpo,
        "small base": small_base, "small mix": small_mix, "small merged": by_cluster("small base")}


def both(a, b, side="above"):
    return tuple(Comparison(a, b, side, decoding=decoding) for decoding in ("greedy", "sampled"))


CLAIMS = (
    Claim("merge-or-mix", "Merged models beat one model on the mix of their data",
          "linear 76.0, SLERP 72.6 against 67.4 of the 15% mix", both("merged", "mix")),
    Claim("shared-languages", "Languages shared by all clusters make merging better",
          "English, Spanish and French in each cluster", both("merged", "no shared languages")
          + both("no spill", "no spill, no shared")),
    Claim("spill", "Merging needs clusters that saw a share of the others' rows", "ours, no paper's",
          both("merged", "no spill")),
    Claim("per-language", "One model per language, merged, is worse than one per family",
          "six monolingual models merged 71.2, three 77.0", both("one per language", "merged", "below")),
    Claim("slerp", "SLERP beats the plain average after SFT",
          "the only method above the mix on both axes", both("slerp", "merged")),
    Claim("ties", "TIES and DARE-TIES are behind the plain average after SFT", "74.9 and 70.0 against 76.0",
          both("ties", "merged", "below") + both("dare-ties", "merged", "below")),
    Claim("order", "DPO first, then merging, beats merging first, then DPO", "78.0 against 74.0",
          both("DPO, then merge", "merge, then DPO")),
    Claim("merge-after-each", "Merging after every stage beats merging once at the end",
          "Aya Expanse merges after every stage", both("merge, DPO, merge", "DPO, then merge")),
    Claim("size", "The gain from merging grows with the size of the model (here half the heads, and all)",
          "up to 3 times larger at 35B than at 8B", both("small merged", "small mix", "below")
          + both("merged", "mix")),
)

# Why arms of these claims differ in start, steps, tokens or tuning (experiments_matched.py).
UNMATCHED = {
    **dict.fromkeys(("order", "merge-after-each"), "where in the order of stages models are merged is asked"),
    "per-language": "one model per language has more last batches that are not whole: 2% more steps",
    "slerp": "a merge of the same models is no training",
    "ties": "a merge of the same models is no training",
}
