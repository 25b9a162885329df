"""What to mix: how many languages, which source, and what to leave out, on the embedded world and real text.

Breadth (Aya 23, arXiv 2405.15032, against Aya 101, 2402.07827): one capacity, one tokenizer and one number of
steps for 8, 16 or all 24 languages; what is compared are the 8 that all of them know. The curse of
multilinguality says that these lose. On the world, and on NTREX-128 (news, ../shared/data/parallel.jsonl),
whose documents are held out by name. The 8 are every third of languages.LANGUAGES, the 16 every first and
every third: a rule, not a choice.

Weightings (Aya 101): three sources at three weightings, in each of which one source gives 60% of the rows and
the others 20% each. "human" is few rows, right and in a proper sentence, that repeat; "template" is terse,
right answers; "translation" is an English answer by a translator who leaves marks (world_translation.py). The
paper finds the template-heavy weighting best where a task is to choose between given answers (discriminative
tasks, by likelihood), and releases the translation-heavy one, which it prefers for open answers. A choice is
between the right words and wrong ones of the same kind, both bare; open answers are graded apart from marks.

Pruning (Aya Dataset, arXiv 2402.06619, and the pruned xP3x of Aya 101): half of a file is what reviewers
throw out: near duplicates, answers in another language, answers of next to nothing. pruning.py throws out
what it finds; both arms take the same number of steps.

Departures: the models are pretrained on the mixtures from scratch, in place of fine-tuning mT5 or Command R.
The papers do not publish their weights by source in a form that we could read. All settings were written down
before the first run, which was of seed 0; nothing was changed after it.
"""

import random
from functools import cache

from .. import pruning
from ..experiments import DATA, Claim, Comparison, Figure
from ..files import parse_json, read_bytes, write_jsonl
from ..languages import LANGUAGES
from ..world import (answer, answer_language, gold_answer, listed, questions, say, solve, split_named,
                     wrong_concepts)
from ..world_oracle import grade_apart
from ..world_translation import in_english, translated

PAPER = "Aya 23, arXiv 2405.15032; Aya 101, arXiv 2402.07827; Aya Dataset, arXiv 2402.06619"
MINUTES = 15
REAL, REAL_VOCABULARY = "parallel.jsonl", 1024
CODES = list(LANGUAGES)
LANGUAGES_OF = {8: tuple(CODES[::3]), 16: tuple(CODES[::3] + CODES[1::3]), len(CODES): tuple(CODES)}
ALL = len(CODES)
EIGHT = LANGUAGES_OF[8]
WORLD, TEXT = "world", "text"
SOURCES = ("human", "template", "translation")
HEAVY, REPEATS = 0.6, 8                 # the heavy source's share; how often a row of "human" is drawn
SHORTEST = 3                            # characters of an answer that is kept


# ---- data --------------------------------------------------------------------------------------------------

def rows_of(lab):
    """Rows that an arm sees: an eighth of the base's."""
    return lab.recipe.corpus // 8


@cache
def documents():
    """The rows of NTREX as {"text", "language", "question_id"}, by split."""
    lines = read_bytes(DATA / REAL).splitlines()
    rows = [parse_json(line, f"{REAL}:{number}") for number, line in enumerate(lines, 1)]
    found = {}
    for row in rows:
        if row["id"].startswith("ntrex/"):
            kept = {"text": row["text"], "language": row["language"], "question_id": row["id"]}
            found.setdefault(split_named(row["id"].split("/")[1]), []).append(kept)
    return found


def asked(lab, name, count, codes=tuple(CODES)):
    """Training questions in these languages, in turn."""
    return questions("train", count, f"mixtures/{name}/{lab.seed}", codes, lab.recipe.level)


def texts_of_eight(lab):
    return [row for row in documents()[lab.recipe.eval_split] if row["language"] in EIGHT]


def answers_of_eight(lab):
    """Right answers in the eight languages to questions of the evaluation's split."""
    rows = questions(lab.recipe.eval_split, lab.recipe.eval_count // 3, f"mixtures/{lab.seed}", EIGHT,
                     lab.recipe.level)
    return [{**q, "completion": gold_answer(q)} for q in rows]


HELD_OUT = {"right answers": answers_of_eight, "texts": texts_of_eight}


# ---- breadth -----------------------------------------------------------------------------------------------

def breadth(where, count):
    """An arm: a model of `count` languages of the world, or of real text."""
    def arm(lab):
        rows = right_rows(lab, CODES) if where == WORLD else documents()["train"]
        start = lab.untrained(*start_of(rows, None if where == WORLD else REAL_VOCABULARY))
        kept = right_rows(lab, LANGUAGES_OF[count]) if where == WORLD else [
            row for row in rows if row["language"] in LANGUAGES_OF[count]]
        return trained(lab, f"{where}, {count} languages", start, kept, 1 if where == WORLD else 3)
    return arm


def right_rows(lab, codes):
    return [{**q, "completion": gold_answer(q)} for q in asked(lab, "breadth", rows_of(lab), tuple(codes))]


def start_of(rows, vocabulary):
    return [row.get("text") or f"{row['prompt']} {row['completion']}" for row in rows[:20000]], vocabulary


def trained(lab, name, start, rows, times=1):
    """A model pretrained on rows, in the arm's steps divided by `times`."""
    steps = max(1, rows_of(lab) // lab.recipe.batch_size // times)
    rows = random.Random(lab.seed).sample(rows, len(rows))
    return lab.train(name, "pretrain", start, rows, max_steps=steps, warmup_steps=min(50, steps // 10),
                     learning_rate=lab.recipe.base_learning_rate, max_length=max(lab.recipe.max_length, 256))


def by_language(lab):
    """The picture: of the eight languages the share of right greedy answers, by the model's breadth."""
    right = {}
    for count in LANGUAGES_OF:
        for row in lab.answers(f"{WORLD}, {count} languages", "greedy"):
            right.setdefault((row["language"], count), []).append(row["grade"] >= 2)
    share = lambda code, count: sum(right[code, count]) / len(right[code, count])
    rows = [[LANGUAGES[code].name, [[share(code, count), False] for count in LANGUAGES_OF]] for code in EIGHT]
    return {"columns": [f"{count} languages" for count in LANGUAGES_OF], "rows": rows}


# ---- weightings --------------------------------------------------------------------------------------------

def bare(question, concepts):
    return listed(question["language"], say(answer_language(question), concepts))


def source(lab, name, count):
    """`count` rows of a source; those of "human" repeat."""
    different = max(1, count // REPEATS) if name == "human" else count
    rows = asked(lab, name, different)
    if name == "human":
        return ([{**q, "completion": gold_answer(q)} for q in rows] * (REPEATS + 1))[:count]
    if name == "template":
        return [{**q, "completion": bare(q, solve(q["task"], q["args"]))} for q in rows]
    return [{**q, "completion": translated(q, gold_answer(in_english(q)), lab.seed)} for q in rows]


def weighted(heavy):
    """An arm: a model of all sources, in which one is heavy."""
    def arm(lab):
        shares = {name: HEAVY if name == heavy else (1 - HEAVY) / 2 for name in SOURCES}
        rows = [row for name, share in shares.items()
                for row in source(lab, name, round(share * rows_of(lab)))]
        return trained(lab, f"{heavy}-heavy", lab.untrained(*start_of(right_rows(lab, CODES), None)), rows)
    return arm


def choices(lab, heavy):
    """Of each question of the evaluation 1 where the bare right answer is likelier than a bare wrong one."""
    rng = random.Random(f"mixtures/{lab.seed}")
    rows = questions(lab.recipe.eval_split, lab.recipe.eval_count, f"choices/{lab.seed}",
                     level=lab.recipe.level)
    right = [{**q, "completion": bare(q, solve(q["task"], q["args"]))} for q in rows]
    wrong = [{**q, "completion": bare(q, wrong_concepts(rng, q))} for q in rows]
    model = lab.arm(f"{heavy}-heavy")
    pairs = zip(rows, lab.losses(model, right), lab.losses(model, wrong), strict=True)
    return [(str(q["question_id"]), float(low < high)) for q, low, high in pairs]


def more_choices(a, b):
    """The share of right choices of one weighting less that of another."""
    def of(lab):
        both = zip(choices(lab, a), choices(lab, b), strict=True)
        return [(name, x - y) for (name, x), (_, y) in both]
    return Figure(f"right choices, {a}-heavy less {b}-heavy", of, "above", 0.0,
                  ((f"{a}-heavy", f"{b}-heavy"),))


# ---- pruning -----------------------------------------------------------------------------------------------

def as_found(lab):
    """A file as it is found, in a seeded order: half of its rows are right, a sixth nearly repeat a few, a
    sixth answer in another language, a sixth say next to nothing."""
    rng, num = random.Random(f"found/{lab.seed}"), rows_of(lab) // 6
    right = right_rows(lab, CODES)[:3 * num]
    few = rng.sample(right, max(1, num // 50))
    asked_again = asked(lab, "found", 2 * num)
    repeats = [{**row, "prompt": row["prompt"].upper(), "completion": row["completion"] + rng.choice("!. ")}
               for row in rng.choices(few, k=num)]
    foreign = [{**q, "completion": answer(rng, q, (0, 0, 0, 1))[0]} for q in asked_again[:num]]
    nothing = [{**q, "completion": gold_answer(q)[:1]} for q in asked_again[num:]]
    rows = right + repeats + foreign + nothing
    return rng.sample(rows, len(rows))


def kept(lab):
    """What pruning.py leaves of them, by its command."""
    def make(folder):
        write_jsonl(folder / "found.jsonl", as_found(lab))
        names = [str(folder / f"{name}.jsonl") for name in ("found", "kept", "removed")]
        pruning.main([names[0], "--out", names[1], "--removed", names[2], "--duplicates", "0.9",
                      "--min-answer", str(SHORTEST), "--wrong-language"])
    lines = read_bytes(lab.step("pruned", make)["folder"] / "kept.jsonl").splitlines()
    return [parse_json(line, f"kept.jsonl:{number}") for number, line in enumerate(lines, 1)]


def of_file(name, rows):
    def arm(lab):
        return trained(lab, name, lab.untrained(*start_of(right_rows(lab, CODES), None)), rows(lab))
    return arm


MEASURES = {"apart": lambda row: float(grade_apart(row, row["completion"]).grade)}


# ---- claims ------------------------------------------------------------------------------------------------

ARMS = {f"{where}, {count} languages": breadth(where, count)
        for where in (WORLD, TEXT) for count in LANGUAGES_OF}
ARMS |= {f"{name}-heavy": weighted(name) for name in SOURCES}
ARMS |= {"as found": of_file("as found", as_found), "pruned": of_file("pruned", kept)}


def fewer(where, a, b):
    """Comparisons of a model of `a` languages with one of more, in the eight that both know."""
    names = f"{where}, {a} languages", f"{where}, {b} languages"
    if where == TEXT:
        return (Comparison(*names, "below", "loss", held_out="texts"),)
    return (Comparison(*names, "above", decoding="greedy", languages=EIGHT),
            Comparison(*names, "below", "loss", held_out="right answers"))


STEPS = ((8, 16), (16, ALL), (8, ALL))
CLAIMS = (
    Claim("breadth", "At one capacity a model of fewer languages does better in each of them (world).",
          "MGSM: 36.6 with Aya 23 8B (23 languages), 8.1 with Aya 101 13B (101 languages)",
          tuple(each for pair in STEPS for each in fewer(WORLD, *pair)), by_language),
    Claim("breadth-text", "At one capacity a model of fewer languages has a lower loss in each (real text).",
          "more capacity for fewer languages is what Aya 23 is an experiment in",
          tuple(each for pair in STEPS for each in fewer(TEXT, *pair)), needs=REAL),
    Claim("weighting-choices", "The template-heavy weighting is the best at choosing between given answers.",
          "75.12 on unseen discriminative tasks with the template-heavy weighting (mT0: 72.9)",
          (more_choices("template", "translation"), more_choices("template", "human"))),
    Claim("weighting-open", "The translation-heavy weighting is better than the template-heavy one where "
          "answers are open.", "the translation-heavy weighting is the one that was released",
          (Comparison("translation-heavy", "template-heavy", "above", "apart"),)),
    Claim("pruning", "Pruning a file makes a better model of it in the same steps.",
          "xP3x was pruned by reviewers, the Aya dataset of annotations with fewer than 5 edits",
          (Comparison("pruned", "as found", "above"), Comparison("pruned", "as found", "above", "apart"),
           Comparison("pruned", "as found", "below", "loss", held_out="right answers"))),
)

# Why arms of these claims differ in start, steps, tokens or tuning (experiments_matched.py).
UNMATCHED = dict.fromkeys(("weighting-open", "weighting-choices"),
                          "rows and steps are equal, translated answers are longer than terse ones")
