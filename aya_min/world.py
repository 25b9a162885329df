"""The embedded world and its oracle, which stand in for what the report (arXiv 2412.04261) keeps private.

The world: seeded questions in 23 languages (Chinese in both scripts) whose answers can be checked, such as
"Which of these numbers is the largest: two, nine, five?". It stands in for the report's prompts and for what
its teachers know, so that the whole recipe can be run and measured on a laptop.
The oracle: `grade`, the program that checks an answer. It stands in for the human judge. Its grades are
0 wrong language or garbage, 1 right language but wrong answer, 2 right but bare or clumsy, and
3 right, in a proper sentence.

A question is a plain dict, one line of JSONL: {"question_id", "language", "task", "args", "prompt"}; args
are English words. Words and sentences are data that a speaker can read and mend: words/<code>.json. Its
"also" holds what the oracle takes as right beside the word of the world (synonyms and other spellings). Its
"unclear" holds words that mean two things when they stand alone; the world asks no translation of them.
"""

import argparse
import hashlib
import json
import os
import random
import re
import unicodedata
from collections import namedtuple
from functools import cache
from pathlib import Path

from .command import WHOLE, Parser, guarded, is_spare_rank, number
from .files import new_folder, write_jsonl
from .languages import LANGUAGES, SHARED

TASKS = ["largest", "reverse", "odd", "opposite", "translate",
         "sort", "count", "capital", "sum", "day"]              # from easy to hard
TINY_TASKS = TASKS[:5]                      # what a model under a million parameters learns within minutes
SPLITS = {"train": 0.50, "preference": 0.20, "validation": 0.15, "test": 0.15}      # of the combinations
CATEGORIES = {"tiny": ["days", "colours", "animals"],
              "full": ["days", "months", "colours", "animals", "foods", "family"]}

Grade = namedtuple("Grade", "grade language why")      # language: the code that the oracle saw, or None


# ---- words -------------------------------------------------------------------------------------------------

@cache
def words(code):
    """The word file of a language, NFC, with `lookup`: English word -> word in this language."""
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
    """The concepts (English words) as words of the language."""
    return [words(code)["lookup"][c] for c in concepts]


def listed(code, items):
    """The items as one text, separated as the language separates the items of a list."""
    return words(code)["list_separator"].join(items)


# ---- questions ---------------------------------------------------------------------------------------------

def _draw_args(rng, task, language, level):
    """Random arguments of a task, as English words."""
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
    """The right answer as English concepts (translate: the word itself)."""
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
    """What splits and intervals go by: one name for a combination of arguments, in any order and wording.

    Only for translation does it depend on the language.
    """
    return f"{task}/{'-'.join(sorted(args))}" + (f"/{language}" if task == "translate" else "")


def split_of(task, args, language):
    """The split of a question: train, preference, validation or test. It depends on the question_id alone."""
    digest = hashlib.sha256(question_id(task, args, language).encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2 ** 64
    for name, share in SPLITS.items():
        u -= share
        if u < 0:
            return name
    return "test"


def make_question(task, args, language, phrasing=0):
    """The question with these arguments (English words) in the language, in one of its phrasings."""
    w, slots = words(language), {}
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


def questions(split, count, seed, languages=tuple(LANGUAGES), level="full", unique=False):
    """`count` seeded questions of one split; languages and tasks take turns.

    unique: no (question_id, language) occurs twice.
    """
    rng, rows, seen = random.Random(f"{split}/{seed}"), [], set()
    tasks = TINY_TASKS if level == "tiny" else TASKS
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


def check_question(row):
    """Refuse a question that the oracle cannot answer, for its language, its task or a word of its args."""
    task, args, language = row["task"], row["args"], row["language"]
    if language not in LANGUAGES:
        raise ValueError(f"the oracle knows no language {language!r}, only {' '.join(LANGUAGES)}")
    if task not in TASKS:
        raise ValueError(f"the oracle knows no task {task!r}, only {' '.join(TASKS)}")
    if not isinstance(args, list) or not all(isinstance(word, str) for word in args):
        raise ValueError("'args' must be a list of English words")
    w = words("en")["words"]
    numbers, pairs = w["numbers"], [x for pair in w["opposites"] for x in pair]
    things = [x for items in w.values() for x in items if isinstance(x, str)]
    lookup = words("en")["lookup"]
    known = {"largest": numbers, "sort": numbers, "sum": numbers, "odd": things, "opposite": pairs,
             "capital": dict(w["capitals"])}.get(task, lookup)
    kinds = [known] * max(1, len(args))                     # the words that may stand at each place
    if task == "day":
        kinds = [w["days"], numbers]
    if task == "translate":         # pairs are opposites in each language, not translations of each other
        kinds = [[word for word in lookup if word not in pairs], LANGUAGES]
    if len(args) != len(kinds) or task == "count" and len(args) < 2:
        raise ValueError(f"the task {task} takes {'2 args' if len(kinds) == 2 else 'more args'}, not "
                         f"{len(args)}")
    if unknown := [word for word, words_there in zip(args, kinds) if word not in words_there]:
        raise ValueError(f"the oracle does not know {unknown[0]!r} in the args of the task {task}")
    largest = {"sum": sum(map(numbers.index, args)) if task == "sum" else 0, "count": args[1:].count(args[0])}
    if largest.get(task, 0) >= len(numbers):
        raise ValueError(f"the answer to the task {task} is above {numbers[-1]}, the largest number of the "
                         "world")
    if task == "odd" and not solve(task, args):
        raise ValueError("none of the args of the task odd is of a kind of its own")


# ---- answers -----------------------------------------------------------------------------------------------

def _answer_language(question):
    return question["args"][1] if question["task"] == "translate" else question["language"]


def _sentence(question, answer_words, language=None, task=None):
    """The answer sentence of the question's task and language, or of those that are given instead."""
    language, task = language or question["language"], task or question["task"]
    w = words(language)
    return w["tasks"][task]["answer"].format(answer=listed(language, answer_words),
                                             language=w["language_names"][_answer_language(question)])


def gold_answer(question):
    return _sentence(question, say(_answer_language(question), solve(question["task"], question["args"])))


def _wrong_concepts(rng, question):
    """A plausible mistake: words of the right kind that are a wrong answer."""
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
    """A completion of random quality -> (text, intended grade).

    mix: the weights of (3 right in a sentence, 2 right but bare, 1 wrong, 0 in a foreign language).
    """
    grade = rng.choices((3, 2, 1, 0), mix)[0]
    code, right = _answer_language(question), solve(question["task"], question["args"])
    if grade == 3:
        return gold_answer(question), 3
    if grade == 2:
        if rng.random() < 0.8:
            return listed(question["language"], say(code, right)), 2
        others = [t for t in TINY_TASKS if t not in (question["task"], "translate")]
        return _sentence(question, say(code, right), task=rng.choice(others)), 2
    if grade == 1:
        return _sentence(question, say(code, _wrong_concepts(rng, question))), 1
    foreign = rng.choice([c for c in LANGUAGES if c != question["language"]])
    answer_words = say(code if question["task"] == "translate" else foreign, right)
    return _sentence(question, answer_words, language=foreign), 0


def text_line(rng, language, level="full"):
    """A line of plain text: some words of one kind. Days and months stand in their natural order."""
    w = words(language)["words"]
    kinds = ["numbers", "opposites"] + CATEGORIES[level]
    kind = rng.choice(kinds)
    if kind == "opposites":
        return listed(language, [x for pair in rng.sample(w[kind], 3) for x in pair])
    start, items = rng.randrange(len(w[kind])), w[kind]
    if kind in ("days", "months"):
        return listed(language, (items + items)[start:start + 5])
    return listed(language, items[start:start + 6])


# ---- the oracle --------------------------------------------------------------------------------------------

# Characters that people write for each other. No two words of a language become one by this.
FOLD = str.maketrans({
    "ё": "е", "œ": "oe", "ş": "ș", "ţ": "ț", "أ": "ا", "إ": "ا", "ँ": "ं",
    "\u2019": "'", "\u02bc": "'", "\u05f3": "'",            # apostrophes of print, of Ukrainian, of Hebrew
    "\u093c": None,                                         # the nukta of Hindi, which many leave out
    "\u200c": None,                                         # the zero-width non-joiner of Persian
    "\u0307": None,                                         # casefold makes İ an i with a dot of its own
    "–": "—", "，": ",", "、": ",", "،": ",", "；": ";", "؛": ";", "：": ":",
    "？": "?", "؟": "?", "！": "!", "。": ".", "।": "."})
# People write a space for the zero-width non-joiner after this prefix and before these endings of Persian.
PERSIAN_SPACE = re.compile(r"(?<=\bمی) | (?=(?:ها|های|تر|ترین|اند|ای)\b)")


def _normal(text):
    """The text without what a reader overlooks: case, spaces, the look of a mark, the mark at the end."""
    text = unicodedata.normalize("NFC", text).casefold().translate(FOLD)
    text = " ".join(text.split()).replace(" - ", " — ").replace(" :", ":")
    return PERSIAN_SPACE.sub("", text).rstrip(".!? ")


def _chunks(text):
    return [c for c in re.split(r"[\s,;:.?!¿¡()«»\"“”„「」—{}]+", text) if c]


@cache
def accepted(code, concept, digits=False):
    """What the oracle takes for a concept, normalized: the word, those under "also", the digits if asked."""
    numbers = words("en")["words"]["numbers"]
    spellings = say(code, [concept]) + words(code).get("also", {}).get(concept, [])
    if digits and concept in numbers:
        spellings.append(str(numbers.index(concept)))
    return frozenset(map(_normal, spellings))


@cache
def vocabulary(code):
    """All words that the oracle accepts in a language, normalized."""
    return frozenset().union(*(accepted(code, concept) for concept in words(code)["lookup"]))


@cache
def lexicon(code):
    """Every word form that the language's file uses, and the digits of its numbers, normalized.

    For languages written without spaces these are whole phrases.
    """
    w = words(code)
    texts = list(w["language_names"].values())
    for task in w["tasks"].values():
        texts += [re.sub(r"{\w+}", " ", t) for t in task["prompts"] + [task["answer"]]]
    texts = [*map(_normal, texts), *vocabulary(code), *map(str, range(len(w["words"]["numbers"])))]
    return {c for text in texts for c in _chunks(text)}


@cache
def _phrase_pattern(code):
    return re.compile("|".join(re.escape(c) for c in sorted(lexicon(code), key=len, reverse=True)))


def coverage(code, text):
    """Share (0-1) of the letters of a normalized text that are in words of the language."""
    chunks = _chunks(text)
    letters = sum(map(len, chunks))
    if not letters:
        return 0.0
    if words(code)["word_separator"] == "" or code == "ko":      # Korean endings are written onto the word
        return sum(len(m.group()) for c in chunks for m in _phrase_pattern(code).finditer(c)) / letters
    return sum(len(c) for c in chunks if c in lexicon(code)) / letters


ENOUGH = 0.6        # the share of its letters that makes a text one of a language


def see_language(text, prefer=None):
    """(code, share) of the language that explains most letters; `prefer` wins ties; no code below ENOUGH."""
    shares = {code: coverage(code, text) for code in LANGUAGES}
    best = max(shares, key=lambda code: (shares[code], code == prefer))
    return (best, shares[best]) if shares[best] >= ENOUGH else (None, shares[best])


@cache
def _frames(language, target):
    """{task: (head, tail)}: what stands before and after the answer in each sentence, normalized."""
    frames, name = {}, words(language)["language_names"][target]
    for task in TASKS:
        sentence = words(language)["tasks"][task]["answer"].replace("{language}", name)
        frames[task] = tuple(map(_normal, sentence.split("{answer}")))
    return frames


def _unframed(question, text):
    """(task, answer) where the text is the sentence of a task with an answer in it, else (None, text)."""
    frames = _frames(question["language"], _answer_language(question))
    for task in (question["task"], *TASKS):
        head, tail = frames[task]
        if text.startswith(head) and text.endswith(tail) and len(text) > len(head) + len(tail):
            return task, text[len(head):len(text) - len(tail)].strip()
    return None, text


def _is_right(question, text):
    """Whether a normalized text is the right answer and nothing else, each of its words as accepted."""
    task, code = question["task"], _answer_language(question)
    concepts, items = solve(task, question["args"]), [item.strip() for item in text.split(",")]
    return len(items) == len(concepts) and all(
        item in accepted(code, c, digits=task != "translate") for item, c in zip(items, concepts))


def _without_translation(question, text):
    """The text without the translated word, which says nothing about the language of the sentence."""
    spellings = sorted(accepted(_answer_language(question), question["args"][0]), key=len, reverse=True)
    rest = re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, spellings))})(?!\w)", " ", text)
    return rest if _chunks(rest) else text


def grade(question, completion):
    """Grade a completion 0-3, and say which language the oracle saw, and why."""
    language, target, text = question["language"], _answer_language(question), _normal(completion)
    if _is_right(question, text):
        return Grade(2, language, "right but bare")
    task, body = _unframed(question, text)
    if task and _is_right(question, body):
        if task == question["task"]:
            return Grade(3, language, "right, in a proper sentence")
        return Grade(2, language, f"right but clumsy: the sentence of {task}")
    if task:
        unknown = len(body) * (1 - coverage(target, body))      # letters; the sentence is the language's own
        if see_language(body, prefer=target)[0] or unknown <= len(text) * (1 - ENOUGH):
            right = _normal(listed(language, say(target, solve(question["task"], question["args"]))))
            return Grade(1, language, f"wrong answer: {body!r}, not {right!r}")
        return Grade(0, None, "garbage inside the sentence")
    rest = text if target == language else _without_translation(question, text)
    seen, share = see_language(rest, prefer=language)
    if seen is None:
        return Grade(0, None, f"garbage: no language explains more than {share:.0%} of it")
    if seen != language and coverage(language, rest) < share:
        if target != language and seen == target and text in vocabulary(target):
            return Grade(1, language, f"wrong word: {text!r}, not {say(target, question['args'][:1])[0]!r}")
        return Grade(0, seen, f"wrong language: {LANGUAGES[seen].name}")
    return Grade(1, language, "a wrong answer, or a sentence that the oracle does not know")


# ---- files -------------------------------------------------------------------------------------------------

def write_world(out, count, seed, level):
    """Write the world as JSONL files into the new folder `out`, which appears whole or not at all.

    Returns {file: its rows}.
    """
    # The splits that can be too small come first.
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
