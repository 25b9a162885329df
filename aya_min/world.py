"""The embedded multilingual world: seeded questions in 23 languages with answers that can be checked, and the oracle that grades them.

Stands in for the prompts, the teachers' knowledge and the human judge of the Aya Expanse report (arXiv 2412.04261), so that the whole
recipe can be run and measured on a laptop. Words and sentences are data that a speaker can read and mend: words/<code>.json.
A question is a plain dict, one line of JSONL: {"question_id", "language", "task", "args", "prompt"}; args are the English words.
Grades: 0 wrong language or garbage, 1 right language but wrong answer, 2 right but bare or clumsy, 3 right, in a proper sentence.
"""

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

TASKS = ["largest", "reverse", "odd", "opposite", "translate", "sort", "count", "capital", "sum", "day"]    # easy to hard
TINY_TASKS = TASKS[:5]                      # what a model under a million parameters learns within minutes
SPLITS = {"train": 0.50, "preference": 0.20, "validation": 0.15, "test": 0.15}      # shares of the argument combinations
CATEGORIES = {"tiny": ["days", "colours", "animals"], "full": ["days", "months", "colours", "animals", "foods", "family"]}

Grade = namedtuple("Grade", "grade language why")      # language: the code that the oracle saw, or None


# ---- words -----------------------------------------------------------------------------------------------------------------------

@cache
def words(code):
    """The word file of a language, NFC, with `lookup`: English word -> word in this language."""
    if code not in LANGUAGES:
        raise ValueError(f"the world has no words in {code!r}; its languages: {' '.join(LANGUAGES)}")
    folder = Path(__file__).parent / "words"
    data, english = (json.loads(unicodedata.normalize("NFC", (folder / f"{c}.json").read_text(encoding="utf-8"))) for c in (code, "en"))
    flat = lambda d: [w for entries in d["words"].values() for e in entries for w in (e if isinstance(e, list) else [e])]
    data["lookup"] = dict(zip(flat(english), flat(data), strict=True))
    return data


def say(code, concepts):
    """The listed concepts (English words) as words of the language."""
    return [words(code)["lookup"][c] for c in concepts]


def join(code, items):
    return words(code)["list_separator"].join(items)


# ---- questions -------------------------------------------------------------------------------------------------------------------

def _draw_args(rng, task, language, level):
    """Random arguments of a task, as English words."""
    w = words("en")["words"]
    pool = {c: w[c] if level == "full" else w[c][:7] for c in CATEGORIES[level]}
    if task in ("largest", "sort"):
        return rng.sample(w["numbers"], 3)
    if task == "reverse":
        return rng.sample([x for items in pool.values() for x in items], 3)
    if task == "odd":
        home, away = rng.sample(list(pool), 2)
        items = rng.sample(pool[home], 3) + [rng.choice(pool[away])]
        return rng.sample(items, 4)
    if task == "opposite":
        return [rng.choice(pair) for pair in rng.sample(w["opposites"], 2)]
    if task == "translate":
        targets = SHARED if level == "tiny" else list(LANGUAGES)
        items = w["numbers"] + [x for group in pool.values() for x in group]
        return [rng.choice(items), rng.choice([code for code in targets if code != language])]
    if task == "count":
        target, *others = rng.sample([x for items in pool.values() for x in items], 3)
        times = rng.randint(1, 3)
        return [target] + rng.sample([target] * times + (others * 2)[:4 - times], 4)
    if task == "capital":
        return [country for country, _ in rng.sample(w["capitals"], 2)]
    if task == "sum":
        a = rng.randint(0, 12)
        return [w["numbers"][a], w["numbers"][rng.randint(0, 12 - a)]]
    return [rng.choice(w["days"]), w["numbers"][rng.randint(1, 6)]]


def solve(task, args):
    """The right answer as English concepts (translate: the word itself, to be said in the target language)."""
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
        other = {a: b for pair in w["opposites"] for a, b in (pair, pair[::-1])}
        return [other[a] for a in args]
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
    """The same for one combination of arguments in any order, wording and (but for translation) language: what splits and intervals go by."""
    return f"{task}/{'-'.join(sorted(args))}" + (f"/{language}" if task == "translate" else "")


def split_of(task, args, language):
    """train, preference, validation or test: by the argument COMBINATION, whatever its order, wording or (but for translation) language."""
    u = int.from_bytes(hashlib.sha256(question_id(task, args, language).encode()).digest()[:8], "big") / 2 ** 64
    for name, share in SPLITS.items():
        u -= share
        if u < 0:
            return name
    return "test"


def make_question(task, args, language, phrasing=0):
    w = words(language)
    slots = {"list": join(language, say(language, args[1:] if task == "count" else args)) if task not in ("translate", "day") else ""}
    if task == "translate":
        slots |= {"word": say(language, args[:1])[0], "language": w["language_names"][args[1]]}
    if task == "count":
        slots |= {"word": say(language, args[:1])[0]}
    if task == "day":
        slots |= dict(zip(("day", "number"), say(language, args)))
    prompts = w["tasks"][task]["prompts"]
    return {"question_id": question_id(task, args, language), "language": language, "task": task, "args": list(args), "prompt": prompts[phrasing % len(prompts)].format(**slots)}


def questions(split, count, seed, languages=tuple(LANGUAGES), level="full", unique=False):
    """`count` seeded questions of one split, languages and tasks in turn. `unique`: no (question_id, language) twice."""
    rng, rows, seen = random.Random(f"{split}/{seed}"), [], set()
    tasks = TINY_TASKS if level == "tiny" else TASKS
    turn, misses, used_up = 0, 0, set()
    while len(rows) < count:
        language, task = languages[turn % len(languages)], tasks[turn // len(languages) % len(tasks)]
        if (language, task) in used_up:                                     # its turns go to the others
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
                    raise ValueError(f"the world has only {len(rows)} different {split} questions at level {level}; ask for fewer than {count}")
            continue
        turn, misses = turn + 1, 0
        seen.add(key)
        rows.append(make_question(task, args, language, rng.randrange(100)))
    return rows


def check_question(row):
    """Refuse a question from elsewhere that the oracle cannot answer: its task, its language, each word of
    its args."""
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
    if task in ("translate", "day"):
        kinds = [lookup, LANGUAGES] if task == "translate" else [w["days"], numbers]
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


# ---- answers ---------------------------------------------------------------------------------------------------------------------

def _sentence(question, answer_words, language=None, task=None):
    """The answer sentence of the question's task (or another task) in the question's language (or another)."""
    language, task = language or question["language"], task or question["task"]
    w = words(language)
    target = question["args"][1] if question["task"] == "translate" else question["language"]
    return w["tasks"][task]["answer"].format(answer=join(language, answer_words), language=w["language_names"][target])


def _answer_language(question):
    return question["args"][1] if question["task"] == "translate" else question["language"]


def gold_answer(question):
    return _sentence(question, say(_answer_language(question), solve(question["task"], question["args"])))


def _wrong_concepts(rng, question):
    """A plausible mistake: right kind of words, wrong answer."""
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
    """A completion of chosen quality. mix: weights of (3 gold, 2 bare, 1 wrong, 0 foreign) -> (text, intended grade)."""
    grade = rng.choices((3, 2, 1, 0), mix)[0]
    code, right = _answer_language(question), solve(question["task"], question["args"])
    if grade == 3:
        return gold_answer(question), 3
    if grade == 2:
        if rng.random() < 0.8:
            return join(question["language"], say(code, right)), 2
        others = [t for t in TINY_TASKS if t not in (question["task"], "translate")]
        return _sentence(question, say(code, right), task=rng.choice(others)), 2
    if grade == 1:
        return _sentence(question, say(code, _wrong_concepts(rng, question))), 1
    foreign = rng.choice([c for c in LANGUAGES if c != question["language"]])
    answer_words = say(code if question["task"] == "translate" else foreign, right)
    return _sentence(question, answer_words, language=foreign), 0


def text_line(rng, language, level="full"):
    """A line of plain text: a few words of one kind, in their natural order (numbers, days) or any."""
    w = words(language)["words"]
    kinds = ["numbers", "opposites"] + CATEGORIES[level]
    kind = rng.choice(kinds)
    if kind == "opposites":
        return join(language, [x for pair in rng.sample(w[kind], 3) for x in pair])
    start, items = rng.randrange(len(w[kind])), w[kind]
    return join(language, (items + items)[start:start + 5] if kind in ("days", "months") else items[start:start + 6])


# ---- the oracle ------------------------------------------------------------------------------------------------------------------

def _normal(text):
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip().casefold()
    return text.rstrip(".。।!！ ")


def _chunks(text):
    return [c for c in re.split(r"[\s,،、;:：.?!。？！।()«»\"“”「」—–{}]+", text) if c]


@cache
def lexicon(code):
    """Every word form that the language's file uses, casefolded; for languages written without spaces, whole phrases."""
    w = words(code)
    texts = list(w["lookup"].values()) + list(w["language_names"].values())
    for task in w["tasks"].values():
        texts += [re.sub(r"{\w+}", " ", t) for t in task["prompts"] + [task["answer"]]]
    return {c for text in texts for c in _chunks(_normal(text))}


@cache
def _phrase_pattern(code):
    return re.compile("|".join(re.escape(c) for c in sorted(lexicon(code), key=len, reverse=True)))


def coverage(code, text):
    """Share (0-1) of the text's letters that are words of the language."""
    chunks = _chunks(text)
    letters = sum(map(len, chunks))
    if not letters:
        return 0.0
    if words(code)["word_separator"] == "" or code == "ko":      # Korean endings are written onto the word
        return sum(len(m.group()) for c in chunks for m in _phrase_pattern(code).finditer(c)) / letters
    return sum(len(c) for c in chunks if c in lexicon(code)) / letters


def see_language(text, prefer=None):
    """(code or None, share): the language that explains most letters; `prefer` wins ties; None below 60%."""
    shares = {code: coverage(code, text) for code in LANGUAGES}
    best = max(shares, key=lambda code: (shares[code], code == prefer))
    return (best, shares[best]) if shares[best] >= 0.6 else (None, shares[best])


def grade(question, completion):
    """Grade a completion 0-3, say the language seen and why."""
    language, task, text = question["language"], question["task"], _normal(completion)
    if text == _normal(gold_answer(question)):
        return Grade(3, language, "right, in a proper sentence")
    target = _answer_language(question)
    right = _normal(join(language, say(target, solve(task, question["args"]))))
    if text == right:
        return Grade(2, language, "right but bare")
    body, sentence_of = text, None
    for name in TASKS:
        head, tail = (_normal(x) if x.strip() else "" for x in _sentence(question, ["\0"], task=name).split("\0"))
        if text.startswith(head) and text.endswith(tail) and len(text) > len(head) + len(tail):
            body, sentence_of = text[len(head):len(text) - len(tail)].strip(), name
            break
    if sentence_of:
        if body == right:
            return Grade(2, language, f"right but clumsy: the sentence of {sentence_of}")
        seen, _ = see_language(body, prefer=target)
        return Grade(1, language, f"wrong answer: {body!r}, not {right!r}") if seen else Grade(0, None, "garbage inside the sentence")
    rest = text
    if target != language:                                     # the translated word itself says nothing about the sentence
        rest = re.sub(r"(?<!\w)" + re.escape(right) + r"(?!\w)", " ", text) if right in text else text
        if not _chunks(rest):
            rest = text
    seen, share = see_language(rest, prefer=language)
    if seen is None:
        return Grade(0, None, f"garbage: no language explains more than {share:.0%} of it")
    if seen != language and coverage(language, rest) < share:
        if target != language and seen == target and text in {_normal(x) for x in words(target)["lookup"].values()}:
            return Grade(1, language, f"wrong word: {text!r}, not {right!r}")
        return Grade(0, seen, f"wrong language: {LANGUAGES[seen].name}")
    return Grade(1, language, "wrong answer")


# ---- files -----------------------------------------------------------------------------------------------------------------------

def write_world(out, count, seed, level):
    """The world as JSONL files in the new folder `out`, which appears whole or not at all. -> {file: its
    rows}"""
    # the splits that can be too small come first
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


def main(argv=None):
    parser = Parser(prog="python -m aya_min.world", description="Write the embedded world as JSONL.")
    parser.add_argument("--out", required=True, help="folder to write into; must not exist")
    parser.add_argument("--count", type=number(int, "[1, inf)"), default=2400, metavar="N",
                        help="questions per split (default 2400)")
    parser.add_argument("--seed", type=number(int, WHOLE), default=0, metavar="N")
    parser.add_argument("--level", choices=["tiny", "full"], default="full",
                        help="tiny: five task families and fewer words")
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    if os.path.lexists(args.out):
        raise ValueError(f"{args.out} exists; give a new folder")
    for path, rows in write_world(Path(args.out), args.count, args.seed, args.level).items():
        print(f"{path}  {len(rows)} rows")


if __name__ == "__main__":
    guarded(main, "aya_min.world")
