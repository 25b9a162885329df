"""Intriguing properties of quantization at scale (arXiv 2305.19268), on the embedded world.

A model of the recipe's size is pretrained from scratch by the paper's friendly settings: weight decay 0.1, no
dropout, gradients clipped to a norm of 1. Each other arm changes one of them, from the same weights, on the
same rows in the same order, for the same steps. What quantization costs is relative: the rise of the nats per
token of held-out rows, as a share of their mean before. Linear layers are rounded to nearest, with one scale
for each output of the weights and, where inputs are rounded too, one for each token.

The diagnostics are those of outliers.py, means over layers. Their rank correlation with the cost is over all
arms of a seed, and its interval of a bootstrap over these few arms, so it is a wide and rough one.

Departures: the paper has models of 410M to 52B and eight tasks; one of this size hardly loses by INT8 (W8A8)
and INT4 (W4), so fewer bits are tried too, W4A4 and W3, in claims without "-paper". The base trains in fp32,
where the paper's does in bf16: bf16 takes twice as long on a CPU, so there is one arm of bf16 beside that of
fp16. Dropout is on attention and residual stream alike. Training is as short as a claim's time allows.
"""

import random

import torch

from .. import held_out, outliers, quantized, weights, world_data
from ..data import batches_in_order, collate
from ..evaluate_rates import rank_correlation
from ..experiments import Claim, Figure
from ..files import write_jsonl
from ..quantization import Scheme, dequantize, round_to_nearest
from ..world import answer, questions

PAPER = "Intriguing Properties of Quantization at Scale, arXiv 2305.19268"
MINUTES = 8
BASE = "friendly"
CHANGES = {
    BASE: {}, "decay 0.001": {"weight_decay": 0.001},
    **{f"dropout {rate}": {"attention_dropout": rate, "residual_dropout": rate} for rate in (0.1, 0.4)},
    "no clipping": {"max_grad_norm": 0.0}, "bf16": {"dtype": "bfloat16"}, "fp16": {"dtype": "float16"}}
# {name: (bits of the weights, bits of the inputs)}; None: as they are
NUMBERS = {"W8A8": (8, 8), "W4": (4, None), "W4A4": (4, 4), "W3": (3, None)}
OF_PAPER, FEWER = ("W8A8", "W4"), ("W4A4", "W3")


# ---- data and arms -----------------------------------------------------------------------------------------

def num_steps(lab):
    return lab.recipe.corpus // 240


def rows_of(lab):
    return world_data.corpus(num_steps(lab) * lab.recipe.batch_size, f"friendly/{lab.seed}", lab.recipe.level)


def held_out_rows(lab):
    """Questions with answers of mixed quality, as pretraining has them."""
    seed = f"friendly/{lab.seed}"
    asked = questions(lab.recipe.eval_split, lab.recipe.eval_count, seed, level=lab.recipe.level)
    rng = random.Random(seed)
    return [{**q, "completion": answer(rng, q, world_data.CORPUS_MIX)[0]} for q in asked]


def pretrained(changes):
    def arm(lab):
        rows, steps = rows_of(lab), num_steps(lab)
        start = lab.untrained([row.get("text") or f"{row['prompt']} {row['completion']}" for row in rows])
        settings = {"weight_decay": 0.1, **changes}
        return lab.train("pretraining", "pretrain", start, rows, max_steps=steps,
                         warmup_steps=min(50, steps // 10), learning_rate=lab.recipe.base_learning_rate,
                         **settings)
    return arm


ARMS = {name: pretrained(changes) for name, changes in CHANGES.items()}


# ---- what quantization costs -------------------------------------------------------------------------------

def to_nearest(matrix, bits):
    """A matrix (N, K) in so many bits, one scale for each row."""
    scheme = Scheme(f"{bits} bits", bits)
    return dequantize(*round_to_nearest(matrix, scheme), scheme)


@torch.no_grad()
def quantize(model, weight_bits, input_bits):
    """Round the weights of a model's linear layers in place, and from now on what they read."""
    for layer in quantized.linears(model).values():
        layer.weight.copy_(to_nearest(layer.weight, weight_bits))
        if input_bits:
            layer.register_forward_pre_hook(
                lambda _, inputs: to_nearest(inputs[0].flatten(0, -2), input_bits).view_as(inputs[0]))


def looked_at(lab, arm):
    """{"nats": {numbers, or "full": [nats per token of each held-out row]}, "diagnostics": {name: figure}}"""
    folder, rows = lab.arm(arm), held_out_rows(lab)

    def make(made):
        write_jsonl(made / "rows.jsonl", rows)
        nats = {}
        for name, bits in {"full": None, **NUMBERS}.items():
            model, tokenizer = weights.load(folder, lab.device)
            if bits:
                quantize(model, *bits)
            nats[name] = held_out.losses(model, tokenizer, made / "rows.jsonl", lab.device)
        model, tokenizer = weights.load(folder, lab.device)
        examples = held_out.examples_of(model, tokenizer, made / "rows.jsonl")[::4]
        batches = batches_in_order(examples, lambda some: collate(some, tokenizer.pad_id), size=16)
        return {"nats": nats, "diagnostics": summary(outliers.figures_of(model, batches, lab.device))}
    return lab.step(f"costs of {arm}", make, lab.name_of(folder), rows)


def mean(values):
    return sum(values) / len(values)


def summary(found):
    """{name of a diagnostic: its mean over layers and projections, or norms} of outliers.figures_of."""
    projections = [each for row in found["layers"] for each in row["projections"].values()]
    norms = [each for row in found["layers"] for each in row["norms"].values()] + [found["final_norm"]]
    return {"activation std": mean([each["std"] for each in projections]),
            "std of norm gains": mean([each["std"] for each in norms]),
            "spectral norm": mean([each["spectral_norm"] for each in projections]),
            "error of INT8 products": mean([each["int8"]["relative"] for each in projections]),
            "error of INT4 products": mean([each["int4"]["relative"] for each in projections]),
            "dimensions above 6": mean([row["dimensions_above"] for row in found["layers"]])}


def cost(lab, arm, numbers):
    """[relative rise of each held-out row's nats]: their mean is that of all."""
    nats = looked_at(lab, arm)["nats"]
    whole = mean(nats["full"])
    return [(after - before) / whole for before, after in zip(nats["full"], nats[numbers], strict=True)]


def costlier(a, b, numbers):
    """What quantization costs one arm less what it costs another."""
    def of(lab):
        both = zip(held_out_rows(lab), cost(lab, a, numbers), cost(lab, b, numbers), strict=True)
        return [(row["question_id"], x - y) for row, x, y in both]
    return Figure(f"cost of {numbers}, {a} less {b}", of, "above", 0.0, ((a, b),))


def correlation(diagnostic, numbers):
    """The rank correlation of a diagnostic with the cost over all arms."""
    def of(lab):
        value, ci95 = rank_correlation([looked_at(lab, arm)["diagnostics"][diagnostic] for arm in ARMS],
                                       [mean(cost(lab, arm, numbers)) for arm in ARMS])
        return {"value": value, "ci95": ci95, "num": len(ARMS)}
    return Figure(f"rank correlation of {diagnostic} with the cost of {numbers}", of, "above", 0.0,
                  tuple((arm, BASE) for arm in ARMS if arm != BASE))


def of_arms(lab):
    """The picture: every arm's nats, costs and diagnostics as a share of the base's."""
    rows = {arm: looked_at(lab, arm) for arm in ARMS}
    figures = {arm: {"nats": mean(found["nats"]["full"]),
                     **{f"cost of {numbers}": mean(cost(lab, arm, numbers)) for numbers in NUMBERS},
                     **found["diagnostics"]} for arm, found in rows.items()}
    return {"columns": list(figures[BASE]), "ends": [0, 2],
            "rows": [(arm, [(value / figures[BASE][name] if figures[BASE][name] else None, False)
                            for name, value in each.items()]) for arm, each in figures.items()]}


# ---- claims ------------------------------------------------------------------------------------------------

DIAGNOSTICS = {8: ("activation std", "std of norm gains", "spectral norm", "error of INT8 products"),
               4: ("activation std", "std of norm gains", "spectral norm", "error of INT4 products")}


def claims_of(numbers, end):
    """The claims on these numbers. end: of their names."""
    said = f", in {' and '.join(numbers)}"

    def against(*pairs):
        return tuple(costlier(a, b, name) for a, b in pairs for name in numbers)
    with_inputs, without = numbers
    return (
        Claim(f"friendly-decay{end}", f"Less weight decay makes quantization cost more{said}",
              "0.09% at 0.1, 1.36% at 0.001", against(("decay 0.001", BASE))),
        Claim(f"friendly-dropout{end}", f"Dropout makes quantization cost more{said}", "worse up to 0.8",
              against(("dropout 0.1", BASE), ("dropout 0.4", BASE), ("dropout 0.4", "dropout 0.1"))),
        Claim(f"friendly-clipping{end}", f"Without clipping quantization costs more{said}", "worse",
              against(("no clipping", BASE))),
        Claim(f"friendly-half{end}", f"After fp16 quantization costs more than after bf16{said}", "worse",
              against(("fp16", "bf16"))),
        Claim(f"friendly-diagnostics{end}",
              f"Activations, norm gains, spectral norms and errors of products track the cost{said}",
              "they track it better than the number of outliers",
              tuple(correlation(name, with_inputs) for name in DIAGNOSTICS[8])
              + tuple(correlation(name, without) for name in DIAGNOSTICS[4]),
              picture=None if end else of_arms))


CLAIMS = (*claims_of(FEWER, ""), *claims_of(OF_PAPER, "-paper"))
