"""How does quantization affect multilingual LLMs? (arXiv 2407.03211), on the embedded world and on real text.

Two models of the recipe's size are pretrained from scratch. One learns right answers to the embedded world's
questions: its five easy task families and sorting, the hard one. The other reads NTREX-128 (news in 24
languages, the rows ntrex/DOCUMENT/LINE of ../shared/data/parallel.jsonl, LINE being the same in all); whole
documents are held out by name, as the world's questions are. Without that file its claims are skipped. Each
is quantized after training: linear layers alone, to nearest or by GPTQ, calibrated with as many tokens of
every language, or with English alone.

What is lost is relative: of the mean oracle's grade of greedy answers, and of the nats per token of right
answers or texts. A benchmark of likelihood, as the paper's automatic metrics are, is the share of questions
whose right answer is likelier, per token, than a plausible wrong one.

Departures: models of this size hardly lose by 4 bits, so everything is tried with 3 bits too, by the same
scales and rounding, as plain weights; claims with "-w4" have the paper's 4. W8A8 has no outlier columns.
Groups are of 32 inputs, as the model's 96 are no multiple of 64. Sums are left out of the hard family,
because a model of this size does not learn those of numbers that it has not seen added (8% right, as by
chance). The paper asks people too; here the oracle alone judges. Scripts are held against each other at their
own numbers of tokens and grades before quantization, which differ: relative losses do not undo that.
"""

import random
from functools import cache

from ..experiments import DATA, Claim, Comparison, Figure
from ..files import parse_json, read_bytes
from ..languages import LANGUAGES
from ..quantization import Scheme
from ..world import answer, gold_answer, questions, split_named
from ..world_oracle import grade

PAPER = "How Does Quantization Affect Multilingual LLMs?, arXiv 2407.03211"
MINUTES = 7
REAL, REAL_VOCABULARY = "parallel.jsonl", 1024
HARD = "sort"
RATE = 5e-3                         # the base's
OTHERS = tuple(code for code in LANGUAGES if code != "en")
WORLD, TEXT = "world", "text"


def three(group=None):
    return Scheme(f"w3-g{group}" if group else "w3", 3, "rounded", group)


# {name: (scheme, settings of merge_quantize.quantize_folder, languages of the calibration text)}
WAYS = {"w8": ("w8", {}, ()), "w8a8": ("w8a8", {}, ())}
for bits, plain, grouped in (("w4", "w4", "w4-g32"), ("w3", three(), three(32))):
    WAYS |= {bits: (plain, {}, ()), f"{bits}, groups": (grouped, {}, ()),
             f"{bits}, gptq": (plain, {"method": "gptq"}, tuple(LANGUAGES)),
             f"{bits}, gptq, english": (plain, {"method": "gptq"}, ("en",))}


# ---- data --------------------------------------------------------------------------------------------------

@cache
def world_rows(seed, split, count):
    """`count` questions of the easy families, a third as many of the hard one, and their right answers."""
    asked = questions(split, count, f"quantization/{seed}", level="tiny")
    asked += questions(split, count // 3, f"quantization/{seed}", level="tiny", tasks=[HARD])
    return [{**q, "completion": gold_answer(q)} for q in asked]


@cache
def documents():
    """The rows of NTREX as {"text", "language", "question_id", "split"}."""
    lines = read_bytes(DATA / REAL).splitlines()
    rows = [parse_json(line, f"{REAL}:{number}") for number, line in enumerate(lines, 1)]
    return [{"text": row["text"], "language": row["language"], "question_id": row["id"],
             "split": split_named(row["id"].split("/")[1])}
            for row in rows if row["id"].startswith("ntrex/")]


def text_rows(*splits):
    return [row for row in documents() if row["split"] in splits]


def training_rows(lab, where):
    rows = (world_rows(lab.seed, "train", lab.recipe.corpus // 2) if where == WORLD
            else text_rows("train", "preference"))
    return random.Random(lab.seed).sample(rows, len(rows))


def held_out(where):
    def rows(lab):
        if where == WORLD:
            return world_rows(lab.seed, lab.recipe.eval_split, lab.recipe.eval_count)
        return text_rows(lab.recipe.eval_split)[:lab.recipe.eval_count * 2]
    return rows


def other_languages(where):
    return lambda lab: [row for row in held_out(where)(lab) if row["language"] != "en"]


HELD_OUT = {where: held_out(where) for where in (WORLD, TEXT)}
HELD_OUT |= {f"{where}, not English": other_languages(where) for where in (WORLD, TEXT)}


# ---- arms --------------------------------------------------------------------------------------------------

def full(where):
    """An arm: the model as it was trained, each row of the world once, each text four times."""
    def arm(lab):
        rows = training_rows(lab, where)
        texts = [row.get("text") or f"{row['prompt']} {row['completion']}" for row in rows[:20000]]
        start = lab.untrained(texts, None if where == WORLD else REAL_VOCABULARY)
        steps = lab.recipe.corpus * 2 // 3 // lab.recipe.batch_size // (1 if where == WORLD else 4)
        return lab.train(f"a model of the {where}", "pretrain", start, rows, max_steps=steps,
                         warmup_steps=min(50, steps // 10), learning_rate=RATE,
                         max_length=max(lab.recipe.max_length, 256))
    return arm


def quantized(where, way):
    scheme, settings, languages = WAYS[way]

    def arm(lab):
        start, more = lab.arm(f"{where}, full"), {}
        if languages:
            rows = [row for row in training_rows(lab, where) if row["language"] in languages]
            more = {"rows": rows[:2000], "languages": languages, "tokens": lab.recipe.corpus // 18}
        return lab.quantize(start, scheme, **more, **settings)
    return arm


ARMS = {f"{where}, full": full(where) for where in (WORLD, TEXT)}
ARMS |= {f"{where}, {way}": quantized(where, way) for where in (WORLD, TEXT) for way in WAYS}


# ---- what is lost ------------------------------------------------------------------------------------------

def nats(lab, way, where=WORLD):
    """Of each held-out row its nats per token."""
    return lab.losses(lab.arm(f"{where}, {way}"), HELD_OUT[where](lab))


def grades(lab, way):
    """Of each question the oracle's grade of the greedy answer."""
    rows = [{key: value for key, value in row.items() if key != "completion"} for row in HELD_OUT[WORLD](lab)]
    groups = lab.sample(way, lab.arm(f"{WORLD}, {way}"), rows, 1, 0.0)
    return [grade(row, made["completion"]).grade for row, (made,) in zip(rows, groups, strict=True)]


def choices(lab, way):
    """Of each question 1 where the right answer is likelier than a wrong one, else 0."""
    rng = random.Random(f"quantization/{lab.seed}")
    wrong = [{**row, "completion": answer(rng, row, (0, 0, 1, 0))[0]} for row in HELD_OUT[WORLD](lab)]
    pairs = zip(nats(lab, way), lab.losses(lab.arm(f"{WORLD}, {way}"), wrong), strict=True)
    return [float(right < other) for right, other in pairs]


MEASURES = {"grade": grades, "nats": nats, "choices": choices}


def lost(lab, measure, way, rows, wanted=lambda row: True, where=WORLD):
    """[(question id, what a row loses as a share of the mean before)] of the wanted rows. Nats are lost where
    they rise. Of nothing nothing can be lost."""
    of = MEASURES[measure]
    before, after = ((nats(lab, each, where) if measure == "nats" else of(lab, each))
                     for each in ("full", way))
    found = [(row["question_id"], x, y) for row, x, y in zip(rows, before, after, strict=True) if wanted(row)]
    mean = sum(x for _, x, _ in found) / len(found) * (-1 if measure == "nats" else 1)
    return [(name, (x - y) / (mean or 1)) for name, x, y in found]


def less(a, b):
    """Pairs (question id, value) whose mean is the mean of a less that of b."""
    num = len(a) + len(b)
    return [(name, value * num / len(a)) for name, value in a] + [
        (name, -value * num / len(b)) for name, value in b]


def to_full(where, way):
    return ((f"{where}, {way}", f"{where}, full"),)


def by_group(way, measure, name, wanted, other, where=WORLD):
    """What the wanted rows lose less what the other ones lose."""
    def of(lab):
        rows = HELD_OUT[where](lab)
        return less(*(lost(lab, measure, way, rows, each, where) for each in (wanted, other)))
    return Figure(f"{name}, {where}, {measure}, {way}", of, "above", 0.0, to_full(where, way))


def by_script(way, measure, where=WORLD):
    is_latin = lambda row: LANGUAGES[row["language"]].script == "Latin"
    return by_group(way, measure, "loss of non-Latin scripts less that of Latin",
                    lambda row: not is_latin(row), is_latin, where)


def by_task(way, measure):
    return by_group(way, measure, "loss of sorting less that of easy tasks",
                    lambda row: row["task"] == HARD, lambda row: row["task"] != HARD)


def by_metric(way, metric):
    """What the grade of answers loses less what a metric of likelihood loses."""
    def of(lab):
        rows = HELD_OUT[WORLD](lab)
        return [(name, x - y) for (name, x), (_, y) in zip(lost(lab, "grade", way, rows),
                                                           lost(lab, metric, way, rows), strict=True)]
    return Figure(f"loss of grade less that of {metric}, {way}", of, "above", 0.0, to_full(WORLD, way))


def by_grade(a, b, wanted=lambda row: True, where="all languages"):
    """The grade of one way less that of another."""
    def of(lab):
        rows = zip(HELD_OUT[WORLD](lab), grades(lab, a), grades(lab, b), strict=True)
        return [(row["question_id"], x - y) for row, x, y in rows if wanted(row)]
    return Figure(f"grade of {a} less that of {b}, {where}", of, "above", 0.0,
                  ((f"{WORLD}, {a}", f"{WORLD}, {b}"),))


def by_loss(a, b, where, side="below", rows=""):
    return Comparison(f"{where}, {a}", f"{where}, {b}", side, "loss", held_out=where + rows)


# ---- claims ------------------------------------------------------------------------------------------------

def mitigated(bits, where):
    """Groups and GPTQ are better than W4, and worse than the full model: they win back a part."""
    ways = f"{bits}, groups", f"{bits}, gptq"
    return sum(((by_loss(way, bits, where), by_loss(way, "full", where, "above")) for way in ways), ())


def calibrated(bits, where):
    return (by_loss(f"{bits}, gptq, english", f"{bits}, gptq", where, "above", ", not English"),)


def claims_of(bits, end):
    """The claims in so many bits. end: of their names."""
    gptq, english = f"{bits}, gptq", f"{bits}, gptq, english"
    is_other = lambda row: row["language"] != "en"
    of_text = {"needs": REAL}
    said = "" if bits == "w4" else ", in 3 bits"
    return (
        Claim(f"quantization-scripts{end}", f"Non-Latin scripts lose more than Latin{said}",
              "non-Latin scripts are hurt most",
              (by_script(bits, "grade"), by_script(bits, "nats"))),
        Claim(f"quantization-scripts-text{end}", f"The same of the likelihood of real text{said}",
              "non-Latin scripts are hurt most", (by_script(bits, "nats", TEXT),), **of_text),
        Claim(f"quantization-metrics{end}",
              f"Answers lose more than metrics of likelihood tell{said}",
              "Japanese: 1.7% by automatic metrics, 16.0% by people",
              (by_metric(bits, "choices"), by_metric(bits, "nats"))),
        Claim(f"quantization-tasks{end}", f"The hard task loses more than the easy ones{said}",
              "mathematics degrades fastest", (by_task(bits, "grade"), by_task(bits, "nats"))),
        Claim(f"quantization-mitigated{end}",
              f"Groups and GPTQ win back a part of what plain rounding loses{said}",
              "group-wise scaling helps in part",
              (*mitigated(bits, WORLD), by_grade(f"{bits}, groups", bits), by_grade(gptq, bits))),
        Claim(f"quantization-mitigated-text{end}", f"The same of the likelihood of real text{said}",
              "ours, no paper's", mitigated(bits, TEXT), **of_text),
        Claim(f"quantization-calibration{end}",
              f"Calibration in English alone costs the other languages{said}", "ours, no paper's",
              (*calibrated(bits, WORLD), by_grade(gptq, english, is_other, "not English"))),
        Claim(f"quantization-calibration-text{end}", f"The same of the likelihood of real text{said}",
              "ours, no paper's", calibrated(bits, TEXT), **of_text))


CLAIMS = (
    Claim("quantization-bits", "8 bits cost next to nothing, and fewer bits more",
          "W8 close to FP16, W4 below",
          (*(by_loss(way, "full", WORLD, "level") for way in ("w8", "w8a8")),
           by_loss("w4", "w8", WORLD, "above"), by_loss("w3", "w4", WORLD, "above"), by_grade("w4", "w3"))),
    *claims_of("w3", ""), *claims_of("w4", "-w4"))

# Why arms of these claims differ in start, steps, tokens or tuning (experiments_matched.py).
UNMATCHED = dict.fromkeys(
    (claim.name for claim in CLAIMS if not claim.name.startswith("quantization-calibration")),
    "a quantized model is held against the one that it was made of")
