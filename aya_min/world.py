"""The embedded world: questions in 23 languages (Chinese in both scripts) whose answers a program can check.

For example: "Which of these numbers is the largest: two, nine, five?". The world stands in for the prompts of
the report (arXiv 2412.04261) and for what its teachers know, which are private, so that the whole recipe can
be run and measured on a laptop. world_oracle.py grades the answers.

A question is a dict, one line of JSONL: {"question_id", "language", "task", "args", "prompt"}; args are
English words. Words and sentences are data that a speaker can read and correct: words/<code>.json. Its "also"
holds what the oracle accepts beside the word of the world (synonyms and other spellings). Its "unclear" holds
words that mean two things when they stand alone; the world does not ask for translations of them. Its
"translated" sentences and its "and" are for world_translation.py alone.
"""

import argparse
import hashlib
import json
import os
import random
import unicodedata
from functools import cache
from pathlib import Path

from .command import WHOLE, Parser, guarded, is_spare_rank, number
from .files import new_folder, write_jsonl
from .languages import LANGUAGES, SHARED

TASKS = ["largest", "reverse", "odd", "opposite", "translate",
         "sort", "count", "capital", "sum", "day"]              # from easy to hard
TINY_TASKS = TASKS[:5]                      # a model under a million parameters learns these within minutes
# The share of each split in the combinations of task and arguments.
SPLITS = {"train": 0.50, "preference": 0.20, "validation": 0.15, "test": 0.15}
CATEGORIES = {"tiny": ["days", "colours", "animals"],
              "full": ["days", "months", "colours", "animals", "foods", "family"]}


# ---- words -------------------------------------------------------------------------------------------------

@cache
def words(code):
    """The word file of a language, in NFC. Its added "lookup" maps English words to words of the language."""
    if code not in LANGUAGES:
        raise ValueError(f"the world has no words in {code!r}; its languages: {' '.join(LANGUAGES)}")
    folder = Path(__file__).parent / "words"

    def read(code):
        text = (folder / f"{code}.json").read_text(encoding="utf-8")
        return json.loads(unicodedata.normalize("NFC", text))

    def flat(data):
        entries = [entry for items in data["words"].values() for entry in items]
        return [word for entry in entries for word in (entry if isinstance(entry, list) else [entry])]

    data = read(code)
    data["lookup"] = dict(zip(flat(read("en")), flat(data), strict=True))
    return data


def say(code, concepts):
    """The words of the language for concepts, which are English words."""
    return [words(code)["lookup"][c] for c in concepts]


def listed(code, items):
    """The items as one text, with the language's separator between them."""
    return words(code)["list_separator"].join(items)


# ---- questions ---------------------------------------------------------------------------------------------

def _draw_args(rng, task, language, level):
    """Random arguments of a task, as English words. level: tiny or full, see CATEGORIES."""
    w = words("en")["words"]
    pool = {c: w[c] if level == "full" else w[c][:7] for c in CATEGORIES[level]}
    everything = [x for items in pool.values() for x in items]
    if task in ("largest", "sort"):
        return rng.sample(w["numbers"], 3)
    if task == "reverse":
        return rng.sample(everything, 3)
    if task == "odd":
        home, away = rng.sample(list(pool), 2)
        items = rng.sample(pool[home], 3) + [rng.choice(pool[away])]
        return rng.sample(items, 4)
    if task == "opposite":
        return [rng.choice(pair) for pair in rng.sample(w["opposites"], 2)]
    if task == "translate":
        targets = SHARED if level == "tiny" else list(LANGUAGES)
        unclear = words(language).get("unclear", [])
        items = [x for x in w["numbers"] + everything if x not in unclear]
        return [rng.choice(items), rng.choice([code for code in targets if code != language])]
    if task == "count":
        target, *others = rng.sample(everything, 3)
        times = rng.randint(1, 3)
        return [target] + rng.sample([target] * times + (others * 2)[:4 - times], 4)
    if task == "capital":
        return [country for country, _ in rng.sample(w["capitals"], 2)]
    if task == "sum":
        a = rng.randint(0, 12)
        return [w["numbers"][a], w["numbers"][rng.randint(0, 12 - a)]]
    return [rng.choice(w["days"]), w["numbers"][rng.randint(1, 6)]]


def solve(task, args):
    """The right answer as concepts, which are English words. Of translate it is the word itself."""
    w = words("en")["words"]
    value = w["numbers"].index
    if task == "largest":
        return [max(args, key=value)]
    if task == "sort":
        return sorted(args, key=value)
    if task == "reverse":
        return args[::-1]
    if task == "odd":
        home = {x: c for c, items in w.items() for x in items if isinstance(x, str)}
        kinds = [home[a] for a in args]
        return [a for a, kind in zip(args, kinds) if kinds.count(kind) == 1]
    if task == "opposite":
        opposite = {a: b for pair in w["opposites"] for a, b in (pair, pair[::-1])}
        return [opposite[a] for a in args]
    if task == "translate":
        return args[:1]
    if task == "count":
        return [w["numbers"][args[1:].count(args[0])]]
    if task == "capital":
        return [dict(w["capitals"])[a] for a in args]
    if task == "sum":
        return [w["numbers"][sum(map(value, args))]]
    return [w["days"][(w["days"].index(args[0]) + value(args[1])) % 7]]


def question_id(task, args, language):
    """One name for a combination of arguments, in any order and wording. Splits and intervals are made by it.

    It is the same in all languages, except for translation.
    """
    return f"{task}/{'-'.join(sorted(args))}" + (f"/{language}" if task == "translate" else "")


def split_of(task, args, language):
    """The split of a question (a key of SPLITS), which depends on its question_id alone."""
    return split_named(question_id(task, args, language))


def split_named(name):
    """The split (a key of SPLITS) of what has this name."""
    digest = hashlib.sha256(name.encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2 ** 64
    for split, share in SPLITS.items():
        u -= share
        if u < 0:
            return split
    return "test"


def make_question(task, args, language, phrasing=0):
    """The question with these arguments (English words), in one of the language's phrasings."""
    w = words(language)
    if task == "day":
        slots = dict(zip(("day", "number"), say(language, args)))
    elif task == "translate":
        slots = {"word": say(language, args[:1])[0], "language": w["language_names"][args[1]]}
    elif task == "count":
        word, *items = say(language, args)
        slots = {"word": word, "list": listed(language, items)}
    else:
        slots = {"list": listed(language, say(language, args))}
    prompts = w["tasks"][task]["prompts"]
    return {"question_id": question_id(task, args, language), "language": language, "task": task,
            "args": list(args), "prompt": prompts[phrasing % len(prompts)].format(**slots)}


def questions(split, count, seed, languages=tuple(LANGUAGES), level="full", unique=False, tasks=None):
    """`count` seeded questions of one split, in which languages and tasks take turns.

    unique: no (question_id, language) occurs twice. tasks: of these, by default of the level's. ValueError if
    the world has too few such questions.
    """
    rng, rows, seen = random.Random(f"{split}/{seed}"), [], set()
    tasks = tasks or (TINY_TASKS if level == "tiny" else TASKS)
    turn, misses, used_up = 0, 0, set()
    while len(rows) < count:
        language, task = languages[turn % len(languages)], tasks[turn // len(languages) % len(tasks)]
        if (language, task) in used_up:
            turn += 1
            continue
        args = _draw_args(rng, task, language, level)
        key = (question_id(task, args, language), language)
        if split_of(task, args, language) != split or (unique and key in seen):
            misses += 1
            if misses > 1000:
                used_up.add((language, task))
                misses = 0
                if len(used_up) == len(languages) * len(tasks):
                    raise ValueError(f"the world has only {len(rows)} different {split} questions at level "
                                     f"{level}; ask for fewer than {count}")
            continue
        turn, misses = turn + 1, 0
        seen.add(key)
        rows.append(make_question(task, args, language, rng.randrange(100)))
    return rows


# ---- answers -----------------------------------------------------------------------------------------------

def answer_language(question):
    """The language of the answer's words, which for translate is not that of the question."""
    return question["args"][1] if question["task"] == "translate" else question["language"]


def _sentence(question, answer_words, language=None, task=None):
    """The answer in a sentence. language, task: of another sentence than the question's own."""
    language, task = language or question["language"], task or question["task"]
    w = words(language)
    return w["tasks"][task]["answer"].format(answer=listed(language, answer_words),
                                             language=w["language_names"][answer_language(question)])


def gold_answer(question):
    """The right answer in the proper sentence, which the oracle grades 3."""
    return _sentence(question, say(answer_language(question), solve(question["task"], question["args"])))


def wrong_concepts(rng, question):
    """A plausible wrong answer as concepts: words of the right kind."""
    task, args = question["task"], question["args"]
    right, w = solve(task, args), words("en")["words"]
    if task in ("reverse", "sort"):
        orders = [list(p) for p in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1))]
        return rng.choice([o for o in ([args[i] for i in order] for order in orders) if o != right])
    if task in ("largest", "odd"):
        return [rng.choice([a for a in args if a not in right])]
    if task == "opposite":
        spoiled, i = list(right), rng.randrange(2)
        spoiled[i] = rng.choice([x for pair in w["opposites"] for x in pair if x not in right])
        return spoiled
    if task == "capital":
        spoiled, i = list(right), rng.randrange(2)
        spoiled[i] = rng.choice([city for _, city in w["capitals"] if city not in right])
        return spoiled
    category = next(items for items in w.values() if right[0] in items)
    return [rng.choice([x for x in category if x not in right])]


def answer(rng, question, mix):
    """(text, the grade that it should get) of an answer of random quality.

    mix: the weights of (3 right in a sentence, 2 right but bare, 1 wrong, 0 in a foreign language).
    """
    grade = rng.choices((3, 2, 1, 0), mix)[0]
    code, right = answer_language(question), solve(question["task"], question["args"])
    if grade == 3:
        return gold_answer(question), 3
    if grade == 2:
        if rng.random() < 0.8:
            return listed(question["language"], say(code, right)), 2
        others = [t for t in TINY_TASKS if t not in (question["task"], "translate")]
        return _sentence(question, say(code, right), task=rng.choice(others)), 2
    if grade == 1:
        return _sentence(question, say(code, wrong_concepts(rng, question))), 1
    foreign = rng.choice([c for c in LANGUAGES if c != question["language"]])
    answer_words = say(code if question["task"] == "translate" else foreign, right)
    return _sentence(question, answer_words, language=foreign), 0


def text_line(rng, language, level="full"):
    """A line of text: some words of one kind. Days and months stand in their natural order."""
    w = words(language)["words"]
    kinds = ["numbers", "opposites"] + CATEGORIES[level]
    kind = rng.choice(kinds)
    if kind == "opposites":
        return listed(language, [x for pair in rng.sample(w[kind], 3) for x in pair])
    start, items = rng.randrange(len(w[kind])), w[kind]
    if kind in ("days", "months"):
        return listed(language, (items + items)[start:start + 5])
    return listed(language, items[start:start + 6])


# ---- files -------------------------------------------------------------------------------------------------

def write_world(out, count, seed, level):
    """Write the world as JSONL files into the new folder `out`, which appears whole or not at all.

    Returns {path: rows}.
    """
    # Test and validation can have too few questions; they are made first, so that this is refused at once.
    order = ("test", "validation", "preference", "train")
    data = {name: questions(name, count, seed, level=level, unique=name in order[:2]) for name in order}
    rng = random.Random(seed)
    data["pairs"] = [{**q, "chosen": gold_answer(q), "rejected": answer(rng, q, (0, 1, 1, 1))[0]}
                     for q in data["preference"]]
    data["text"] = [{"text": text_line(rng, code, level), "language": code}
                    for code in LANGUAGES for _ in range(max(1, count // len(LANGUAGES)))]
    data["sft"] = [{**q, "completion": gold_answer(q)} for q in data["train"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as made:
        for name, rows in data.items():
            write_jsonl(made / f"{name}.jsonl", rows)
    return {out / f"{name}.jsonl": rows for name, rows in sorted(data.items())}


DESCRIPTION = """\
Write the embedded world as JSONL files.

The world is a set of seeded questions in 23 languages whose answers can be checked, such as "Which of these
numbers is the largest: two, nine, five?". The oracle is the program that checks them: it grades an answer
0 (wrong language or garbage), 1 (right language, wrong answer), 2 (right, but not in a proper sentence) or
3 (right, in a proper sentence). python -m aya_min.evaluate arena --judge oracle uses it.

Files: train, preference, validation and test (questions; no question is in two of them), sft (the questions
of train with right answers), pairs (those of preference with a right and a worse answer), text (word lists).
"""


def main(argv=None):
    parser = Parser(prog="python -m aya_min.world", description=DESCRIPTION,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write into; must not exist")
    parser.add_argument("--count", type=number(int, "[1, inf)"), default=2400, metavar="N",
                        help="questions per split (default 2400)")
    parser.add_argument("--seed", type=number(int, WHOLE), default=0, metavar="N",
                        help="the same seed writes the same files (default 0)")
    parser.add_argument("--level", choices=["tiny", "full"], default="full",
                        help="tiny: five tasks and fewer words, for the smallest models (default full)")
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    if os.path.lexists(args.out):
        raise ValueError(f"{args.out} exists; give a new folder")
    for path, rows in write_world(Path(args.out), args.count, args.seed, args.level).items():
        print(f"{path}  {len(rows)} rows")


if __name__ == "__main__":
    guarded(main, "aya_min.world")
