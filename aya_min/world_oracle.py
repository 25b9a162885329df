"""The oracle: a program that grades the answers to the questions of the embedded world (world.py).

It stands in for the human judge of the report (arXiv 2412.04261). Its grades are
0 wrong language or garbage, 1 right language but wrong answer, 2 right but bare or clumsy, and
3 right, in a proper sentence.

Apart from the grade it says whether an answer sounds translated from English (`naturalness`).
"""

import re
import unicodedata
from collections import namedtuple
from functools import cache

from .languages import LANGUAGES
from .world import TASKS, answer_language, listed, say, solve, words

Grade = namedtuple("Grade", "grade language why")      # language: the code that the oracle saw, or None
Reading = namedtuple("Reading", "task items marks")     # see `read_marks`
ENOUGH = 0.6        # the share of letters in words of a language that makes a text one of that language


# ---- which questions it can grade --------------------------------------------------------------------------

def check_question(row):
    """ValueError at a question that the oracle cannot grade: for its language, its task or its args."""
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
    kinds = [known] * max(1, len(args))         # for each arg the words that it may be
    if task == "day":
        kinds = [w["days"], numbers]
    # Words of opposites are chosen in each language as pairs; they do not translate each other.
    if task == "translate":
        kinds = [[word for word in lookup if word not in pairs], LANGUAGES]
    if len(args) != len(kinds) or task == "count" and len(args) < 2:
        raise ValueError(f"the task {task} takes {'2 args' if len(kinds) == 2 else 'more args'}, not "
                         f"{len(args)}")
    if unknown := [word for word, allowed in zip(args, kinds) if word not in allowed]:
        raise ValueError(f"the oracle does not know {unknown[0]!r} in the args of the task {task}")
    result = sum(map(numbers.index, args)) if task == "sum" else 0
    if task == "count":
        result = args[1:].count(args[0])
    if result >= len(numbers):
        raise ValueError(f"the answer to the task {task} is above {numbers[-1]}, the largest number of the "
                         "world")
    if task == "odd" and not solve(task, args):
        raise ValueError("none of the args of the task odd is of a kind of its own")


# ---- words of a language -----------------------------------------------------------------------------------

# Characters that people write for each other. This makes no two words of a language equal.
FOLD = str.maketrans({
    "ё": "е", "œ": "oe", "ş": "ș", "ţ": "ț", "أ": "ا", "إ": "ا", "ँ": "ं",
    "\u2019": "'", "\u02bc": "'", "\u05f3": "'",            # apostrophes of print, of Ukrainian, of Hebrew
    "\u093c": None,                                         # the nukta of Hindi, which many leave out
    "\u200c": None,                                         # the zero-width non-joiner of Persian
    "\u0307": None,                                         # casefold turns İ into i and this combining dot
    "–": "—", "，": ",", "、": ",", "،": ",", "；": ";", "؛": ";", "：": ":",
    "？": "?", "؟": "?", "！": "!", "。": ".", "।": "."})
# After this prefix and before these endings of Persian, people write a space for the zero-width non-joiner.
PERSIAN_SPACE = re.compile(r"(?<=\bمی) | (?=(?:ها|های|تر|ترین|اند|ای)\b)")


def _normal(text):
    """The text without what a reader overlooks: case, spaces, shapes of marks, marks at the end."""
    text = unicodedata.normalize("NFC", text).casefold().translate(FOLD)
    text = " ".join(text.split()).replace(" - ", " — ").replace(" :", ":")
    return PERSIAN_SPACE.sub("", text).rstrip(".!? ")


def _chunks(text):
    """The parts of a text between spaces and punctuation marks."""
    return [c for c in re.split(r"[\s,;:.?!¿¡()«»\"“”„「」—{}]+", text) if c]


@cache
def accepted(code, concept, digits=False):
    """The normalized spellings that stand for a concept: its word, those under "also" and, with `digits`, the
    digits of a number."""
    numbers = words("en")["words"]["numbers"]
    spellings = say(code, [concept]) + words(code).get("also", {}).get(concept, [])
    if digits and concept in numbers:
        spellings.append(str(numbers.index(concept)))
    return frozenset(map(_normal, spellings))


@cache
def vocabulary(code):
    """All spellings that the oracle accepts in a language, normalized."""
    return frozenset().union(*(accepted(code, concept) for concept in words(code)["lookup"]))


@cache
def lexicon(code):
    """Every word form in the language's file, and the digits of its numbers, normalized.

    In languages written without spaces these are whole phrases.
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
    """The share (0-1) of the letters of a normalized text that belong to words of the language."""
    chunks = _chunks(text)
    letters = sum(map(len, chunks))
    if not letters:
        return 0.0
    # Korean writes endings onto the word, so that its words are searched as in languages without spaces.
    if words(code)["word_separator"] == "" or code == "ko":
        return sum(len(m.group()) for c in chunks for m in _phrase_pattern(code).finditer(c)) / letters
    return sum(len(c) for c in chunks if c in lexicon(code)) / letters


def see_language(text, prefer=None):
    """(code, share) of the language with the largest coverage of a text; `prefer` wins ties.

    code: None if the share is below ENOUGH.
    """
    shares = {code: coverage(code, text) for code in LANGUAGES}
    best = max(shares, key=lambda code: (shares[code], code == prefer))
    return (best, shares[best]) if shares[best] >= ENOUGH else (None, shares[best])


# ---- grades ------------------------------------------------------------------------------------------------

@cache
def _frames(language, name, kind="answer"):
    """{task: (head, tail)}: the normalized text before and after the answer in each task's sentence.

    name: of the language of the answer. kind: "answer", or "translated" for the sentences that follow the
    English ones.
    """
    frames = {}
    for task in TASKS:
        sentence = words(language)["tasks"][task][kind].replace("{language}", name)
        frames[task] = tuple(map(_normal, sentence.split("{answer}")))
    return frames


def _unframed(question, text, kind="answer", names="own"):
    """(task, answer) if the text is the sentence of a task with an answer in it, else (None, text).

    names: "own", or "en" for a sentence in which a language has its English name.
    """
    language = question["language"]
    name = words(language if names == "own" else names)["language_names"][answer_language(question)]
    frames = _frames(language, name, kind)
    for task in (question["task"], *TASKS):
        head, tail = frames[task]
        if text.startswith(head) and text.endswith(tail) and len(text) > len(head) + len(tail):
            return task, text[len(head):len(text) - len(tail)].strip()
    return None, text


def _is_right(question, text):
    """True if a normalized text is the right answer and nothing else, in accepted spellings."""
    task, code = question["task"], answer_language(question)
    concepts, items = solve(task, question["args"]), [item.strip() for item in text.split(",")]
    return len(items) == len(concepts) and all(
        item in accepted(code, c, digits=task != "translate") for item, c in zip(items, concepts))


def _without_translation(question, text):
    """The text without the translated word, which must not decide the language of the sentence."""
    spellings = sorted(accepted(answer_language(question), question["args"][0]), key=len, reverse=True)
    rest = re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, spellings))})(?!\w)", " ", text)
    return rest if _chunks(rest) else text


def grade(question, completion):
    """The Grade of a completion: 0-3, the language that the oracle saw (or None), and why."""
    language, target = question["language"], answer_language(question)
    text = _normal(completion)
    if _is_right(question, text):
        return Grade(2, language, "right but bare")
    task, body = _unframed(question, text)
    if task and _is_right(question, body):
        if task == question["task"]:
            return Grade(3, language, "right, in a proper sentence")
        return Grade(2, language, f"right but clumsy: the sentence of {task}")
    if task:
        # The sentence around the answer is the language's own, so that only the answer has unknown letters.
        unknown = len(body) * (1 - coverage(target, body))
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


# ---- marks of translation ----------------------------------------------------------------------------------

@cache
def concepts(code):
    """{accepted spelling: the English word that it stands for} of a language."""
    return {spelling: concept for concept in words(code)["lookup"] for spelling in accepted(code, concept)}


def read_items(question, completion):
    """(task, items): the sentence's task, or None for a bare answer, and the answer's normalized items."""
    task, body = _unframed(question, _normal(completion))
    return task, [item.strip() for item in body.split(",")]


def read_marks(question, completion):
    """The Reading of a completion: its sentence's task (or None), the answer's items in the words of the
    language, and the marks of a translation from English, {kind: what was seen}.

    The kinds: "sentence" (words and order of the English one), "list" (English commas, or a comma before the
    last "and"), "untranslated" (an English word).
    """
    language, target = question["language"], answer_language(question)
    text, marks = _normal(completion), {}
    task, items = read_items(question, completion)
    if language == "en":
        return Reading(task, items, marks)
    for kind, names in (("translated", "own"), ("answer", "en"), ("translated", "en")):
        if task is None:
            task, body = _unframed(question, text, kind, names)
            if task:
                items = [item.strip() for item in body.split(",")]
                marks |= {"sentence": words("en")["tasks"][task]["answer"]} if kind == "translated" else {}
                marks |= {"untranslated": words("en")["language_names"][target]} if names == "en" else {}
    last = words(language)["and"] + words(language)["word_separator"]
    if len(items) > 2 and items[-1].startswith(last) and items[-1] not in vocabulary(target):
        items[-1] = items[-1][len(last):]
        marks["list"] = f", {last.strip()}"
    if len(items) > 1 and "," in completion and "," not in words(language)["list_separator"]:
        marks["list"] = ","
    for i, item in enumerate(items):
        if question["task"] != "translate" and item in concepts("en") and item not in vocabulary(language):
            marks["untranslated"] = item
            items[i] = say(language, [concepts("en")[item]])[0]
    return Reading(task, items, marks)


def naturalness(question, completion):
    """(natural, why): False if the answer shows marks of a translation from English, True if it is a sentence
    of the language without them, None if the oracle cannot tell: it knows no other sentences."""
    task, items, marks = read_marks(question, completion)
    if marks:
        return False, "translated from English: " + ", ".join(f"{kind} {seen!r}"
                                                              for kind, seen in marks.items())
    known = vocabulary(answer_language(question))
    if task and all(item in known or item.isdecimal() for item in items):
        return True, "a sentence of the language itself"
    return None, "a sentence with words that the oracle does not know" if task else "no sentence it knows"


def grade_apart(question, completion):
    """The Grade of a completion apart from its marks of translation: that of the same answer without them."""
    task, items, marks = read_marks(question, completion)
    if not marks:
        return grade(question, completion)
    language, answer = question["language"], listed(question["language"], items)
    if task:
        name = words(language)["language_names"][answer_language(question)]
        answer = words(language)["tasks"][task]["answer"].format(answer=answer, language=name)
    return grade(question, answer)
