"""BAM! Just like that: simple and efficient parameter upcycling for mixture of experts (arXiv 2408.08274), on
the embedded world.

The seed is the recipe's base. Three dense experts are the seed trained on a domain each, with a tenth of
general text mixed in: source code and two clusters of languages (domains.py), whose questions are by turns
texts, all of whose tokens count, and conversations. General text is such as the seed was pretrained on,
conversations with answers of mixed quality, in the languages of no domain. A mixture has the experts and the
seed as a fourth, and is trained on equal parts of the domains and of general text. Parts are counted in
supervised tokens. BTX has experts of the MLP only, one for a token; BAM also of the attention, all for a
token.

Data-matched arms train on the same rows for the same steps. Compute-matched ones stop, at the end of a
schedule of their own, after as many steps as have the operations of BTX's training by loop.training_flops. It
counts all attention experts, with top-1 and top-2 routing too, because moe.py computes them all. BTX with six
experts has two more dense experts, on other rows of the two clusters, and more parameters than BAM with own
keys and values; with three of them for a token it also takes more operations.

Departures: a domain is a few languages, where the paper has code, law and mathematics; all arms have one
learning rate, chosen on seed 0; the weight of the z-loss is ours, as the paper says none. Losses are nats per
token of held-out rows, so a difference is the log of a ratio of perplexities; "all" is the mean over as many
rows of each domain, where the paper averages perplexities. The large models have twice the width and heads,
four times the weights in blocks, and a shorter pretraining.
"""

import random
import time
from statistics import median

import torch

from .. import weights, world_data
from ..data import load_examples
from ..domains import CODE, as_texts, rows_of
from ..experiments import Claim, Comparison, Figure
from ..files import write_jsonl
from ..fused import Fused
from ..languages import CLUSTERS, LANGUAGES
from ..loop import training_flops
from ..sampling import generate
from ..world import answer, questions

PAPER = "BAM, arXiv 2408.08274"
MINUTES = 8
GENERAL, DOMAINS = "general", (CODE, "slavic", "east-asia")
SECOND = DOMAINS[1:]                # of which the BTX with six experts has two
OTHER_LANGUAGES = tuple(code for code in LANGUAGES
                        if not any(code in CLUSTERS[domain] for domain in SECOND))
LENGTH = {GENERAL: 7, CODE: 69, "slavic": 15, "east-asia": 18}     # supervised tokens of a row, preset tiny
RATE = 1 / 2                        # of the base's learning rate; mixtures at 1/4 and 1 were worse
Z_WEIGHT = 1e-3
LARGE_SHARE = 1 / 24                # of the base's rows that the larger seed reads
PROMPT, NEW_TOKENS, PROMPTS = 256, 16, 4        # of the inference time; the first two are the paper's
ROUNDS, MEDIANS = 5, 5              # a value is the median of so many rounds, and there are so many values


# ---- data --------------------------------------------------------------------------------------------------

def of_domain(lab, domain, split, count, tag=""):
    """`count` rows of a domain, or of general text."""
    seed, level = f"bam{tag}/{lab.seed}", lab.recipe.level
    if domain == GENERAL:
        rng = random.Random(f"{GENERAL}/{split}/{seed}")
        asked = questions(split, count, seed, OTHER_LANGUAGES, level)
        return [{**q, "completion": answer(rng, q, world_data.CORPUS_MIX)[0]} for q in asked]
    rows = rows_of(domain, split, count, seed, level)
    return [text if i % 2 else row for i, (row, text) in enumerate(zip(rows, as_texts(rows), strict=True))]


def mixed(lab, shares, count, tag):
    """About `count` rows, of which the domains have these shares in supervised tokens, {domain: share}."""
    parts = {domain: share / LENGTH[domain] for domain, share in shares.items()}
    numbers = {domain: max(1, round(count * part / sum(parts.values()))) for domain, part in parts.items()}
    return [row for domain, number in numbers.items()
            for row in of_domain(lab, domain, "train", number, tag)]


def num_steps(lab):
    """Steps of a mixture, and of an expert but that of code, which takes half as many of twice the tokens."""
    return max(2, lab.recipe.lessons // 3 // lab.recipe.batch_size)


def mix(lab):
    """The rows that every mixture is trained on."""
    shares = dict.fromkeys((GENERAL, *DOMAINS), 1 / 4)
    return mixed(lab, shares, num_steps(lab) * lab.recipe.batch_size, "/mix")


def held_out(*domains):
    return lambda lab: [row for domain in domains for row in
                        of_domain(lab, domain, lab.recipe.eval_split, max(4, lab.recipe.eval_count // 9))]


def conversations(domain):
    return lambda lab: [row for row in held_out(domain)(lab) if "text" not in row]


BY_DOMAIN = {"all": held_out(GENERAL, *DOMAINS), **{name: held_out(name) for name in (GENERAL, *DOMAINS)}}
# What the seed knows: it has read no code, and of the clusters' languages conversations alone.
KNOWN = {GENERAL: GENERAL, **{name: f"{name}, conversations" for name in SECOND}}
HELD_OUT = BY_DOMAIN | {f"{name}, conversations": conversations(name) for name in SECOND}


# ---- arms --------------------------------------------------------------------------------------------------

def tuned(lab, name, start, rows, steps):
    mixture = weights.load_meta(start)[0].config.mixture
    more = {"router_z_weight": Z_WEIGHT} if mixture else {}
    return lab.train(name, "pretrain", start, rows, max_steps=steps, warmup_steps=steps // 10,
                     learning_rate=RATE * lab.recipe.base_learning_rate, **more)


def expert(lab, domain, start, tag=""):
    """A dense expert. tag: " 2" is another one of the same domain."""
    steps = num_steps(lab) // (2 if domain == CODE else 1)
    rows = mixed(lab, {domain: 0.9, GENERAL: 0.1}, steps * lab.recipe.batch_size, f"/expert{tag}")
    return tuned(lab, f"expert of {domain}{tag}", start, rows, steps)


def experts(lab, seed_model, second=False):
    """{name: folder}"""
    return {f"{domain}{tag}": expert(lab, domain, seed_model, tag)
            for tag in ("", " 2") if second or not tag for domain in (SECOND if tag else DOMAINS)}


def average(lab):
    return lab.merge("average", [*experts(lab, lab.base).values(), lab.base], "linear")


def trained_average(lab):
    return tuned(lab, "average, trained", average(lab), mix(lab), num_steps(lab))


def untrained(lab, kind, seed_model=None, second=False, **more):
    seed_model = seed_model or lab.base
    return lab.upcycle(experts(lab, seed_model, second), kind, seed_model, **more)


def data_matched(kind, of_seed=lambda lab: lab.base, **more):
    """An arm: a mixture of this kind, trained on the whole mix. of_seed: lab -> the seed model's folder."""
    def arm(lab):
        return tuned(lab, f"{kind} mixture", untrained(lab, kind, of_seed(lab), **more), mix(lab),
                     num_steps(lab))
    return arm


def compute_matched(kind, **more):
    """An arm: the same, for as many steps as have the operations of BTX's training."""
    def arm(lab):
        start, rows = untrained(lab, kind, **more), mix(lab)
        share = operations(lab, untrained(lab, "btx"), rows) / operations(lab, start, rows)
        return tuned(lab, f"{kind} mixture, compute-matched", start, rows,
                     max(1, round(share * num_steps(lab))))
    return arm


def operations(lab, folder, rows):
    """Floating-point operations of training the model in a folder once on rows, see loop.training_flops."""
    def make(made):
        model, tokenizer, _ = weights.load_meta(folder)
        write_jsonl(made / "rows.jsonl", rows)
        examples = load_examples([made / "rows.jsonl"], tokenizer, lab.recipe.max_length)
        supervised = sum(int(each.mask.sum()) for each in examples)
        return {"flops": training_flops(model.config, [len(each.ids) for each in examples], supervised)}
    return lab.step("operations", make, lab.name_of(folder), rows)["flops"]


def large_seed(lab):
    return lab.base_of_width(2, LARGE_SHARE)


BTX, OWN, SHARED = "BTX", "BAM own", "BAM shared"
SIX = dict(kind="btx", second=True)
ARMS = {"seed": lambda lab: lab.base, "average": average, "average, trained": trained_average,
        **{f"expert of {domain}": lambda lab, domain=domain: expert(lab, domain, lab.base)
           for domain in DOMAINS},
        BTX: data_matched("btx"), OWN: data_matched("bam"), SHARED: data_matched("bam", kv="shared"),
        f"{OWN}, compute": compute_matched("bam"), f"{SHARED}, compute": compute_matched("bam", kv="shared"),
        **{f"{OWN}, top-{k}": data_matched("bam", attention_top_k=k) for k in (1, 2)},
        f"{BTX} of six": data_matched(**SIX), f"{BTX} of six, top-3": data_matched(**SIX, top_k=3),
        f"{BTX}, large": data_matched("btx", large_seed), f"{OWN}, large": data_matched("bam", large_seed)}


# ---- inference time ----------------------------------------------------------------------------------------

TIMED = ("seed", BTX, OWN, SHARED, f"{BTX} of six", f"{BTX} of six, top-3")


def times(lab):
    """{arm: [seconds of each round]} to answer PROMPTS prompts of random tokens on the engine. The arms take
    turns in a round, after one that is not counted."""
    folders = {arm: lab.arm(arm) for arm in TIMED}

    def make(made):
        models = {arm: Fused(weights.load(folder, lab.device)[0]) for arm, folder in folders.items()}
        generator = torch.Generator().manual_seed(lab.seed)
        prompts = torch.randint(lab.tokenizer.vocab_size, (PROMPTS, PROMPT), generator=generator).tolist()
        seconds = {arm: [] for arm in models}
        for _ in range(1 + ROUNDS * MEDIANS):
            for arm, model in models.items():
                begin = time.perf_counter()
                generate(model, prompts, 1, NEW_TOKENS, temperature=0)
                seconds[arm].append(time.perf_counter() - begin)
        return {"seconds": {arm: each[1:] for arm, each in seconds.items()}}
    names = {arm: lab.name_of(folder) for arm, folder in folders.items()}
    return lab.step("inference", make, names)["seconds"]


def slower(a, b, side="above"):
    """The time of an arm as a multiple of another's, MEDIANS values."""
    def of(lab):
        seconds = times(lab)
        ratios = [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
        return [median(ratios[i:i + ROUNDS]) for i in range(0, len(ratios), ROUNDS)]
    return Figure(f"inference time of {a} over that of {b}", of, side, 1.0, ((a, b),))


# ---- claims ------------------------------------------------------------------------------------------------

def by_loss(a, b, where=("all",), side="below"):
    return tuple(Comparison(a, b, side, "loss", held_out=name) for name in where)


def by_wins(a, b, side="above"):
    return tuple(Comparison(a, b, side, decoding=decoding) for decoding in ("greedy", "sampled"))


def others(domain):
    return [where for name, where in KNOWN.items() if name != domain]


CLAIMS = (
    Claim("bam-data", "At equal data BAM beats BTX, own keys and values before shared ones",
          "perplexity 9.70 (own), 10.32 (shared), 10.72 (BTX)",
          by_loss(OWN, BTX, BY_DOMAIN) + by_loss(SHARED, BTX, BY_DOMAIN)
          + by_loss(OWN, SHARED, BY_DOMAIN)
          + by_wins(OWN, BTX) + by_wins(SHARED, BTX)),
    Claim("bam-compute", "At equal compute BAM beats BTX, own keys and values before shared ones",
          "perplexity 10.00 (own), 10.46 (shared), 10.72 (BTX)",
          by_loss(f"{OWN}, compute", BTX) + by_loss(f"{SHARED}, compute", BTX)
          + by_loss(f"{OWN}, compute", f"{SHARED}, compute") + by_wins(f"{OWN}, compute", BTX)),
    Claim("bam-dense", "A mixture of the experts beats the seed, their average, and each of them",
          "perplexity 10.72 (BTX), 13.91 (seed)",
          sum((by_loss(BTX, arm) for arm in ("seed", "average", "average, trained",
                                             *(f"expert of {name}" for name in DOMAINS))), ())),
    Claim("bam-collapse", "A dense expert gains on its own domain and loses on others that the seed knows",
          "dense experts collapse off their domain",
          sum((by_loss(f"expert of {name}", "seed", [name])
               + by_loss(f"expert of {name}", "seed", others(name), "above") for name in DOMAINS), ())),
    Claim("bam-soft", "All attention experts for a token are better than its best one or two",
          "perplexity 10.47 (soft), 10.72 (top-2), 10.81 (top-1)",
          by_loss(OWN, f"{OWN}, top-1") + by_loss(OWN, f"{OWN}, top-2")),
    Claim("bam-parameters", "Attention experts are worth more than as many parameters in MLP experts",
          "BTX with 5 to 8 experts, or with top-3, stays worse",
          by_loss(OWN, f"{BTX} of six") + by_loss(f"{OWN}, compute", f"{BTX} of six")
          + by_loss(OWN, f"{BTX} of six, top-3")),
    Claim("bam-time", "BAM takes longer to answer than BTX, with shared keys and values less so",
          "6.17 s (own), 5.96 s (shared), 4.81 s (BTX)",
          (slower(OWN, BTX), slower(SHARED, BTX), slower(SHARED, OWN, "below"), slower(BTX, "seed"),
           slower(OWN, f"{BTX} of six"), slower(OWN, f"{BTX} of six, top-3"))),
    Claim("bam-large", "At equal data BAM beats BTX with a larger seed too",
          "perplexity 3.19 (own), 3.27 (BTX)", by_loss(f"{OWN}, large", f"{BTX}, large", BY_DOMAIN)),
)

# Why arms of these claims differ in start, steps, tokens or tuning (experiments_matched.py).
UNMATCHED = {
    **dict.fromkeys(("bam-data", "bam-soft", "bam-large"),
                    "what one seed and its experts are put together into is what is compared"),
    "bam-compute": "equal operations are compared, so that the dearer arm takes fewer steps",
    "bam-dense": "experts and the seed are parts of the mixture; they are what it is made of, not "
                 "rivals at its cost",
    "bam-collapse": "an expert is the seed, trained further: what training changes is asked",
    "bam-time": "the seed is timed too, which mixtures are trained from; time does not depend on training",
    "bam-parameters": "one comparison is at equal operations",
}
