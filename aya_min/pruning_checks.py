"""What is wrong with one row of training data, by itself or beside evaluation prompts: the texts that prune
rows in the Aya dataset (arXiv 2402.06619) and Aya 101 (arXiv 2402.07827).

Each check returns None or why the row goes. pruning.py calls them.
"""

import math

from .evaluate_languages import lines_of
from .language_id import posterior, profile_of
from .rows import is_plain_text, prompt_of, shapes_in, text_of, texts_in
from .rows_streamed import streamed
from .text_statistics import words_of

# Nats by which another language must be likelier, chosen on NTREX and Tatoeba: of their texts 0.14% then go,
# mostly short ones full of names and Indonesian that reads like Malay.
WRONG = 6.0
GRAM = 13               # words in a row that an evaluation prompt and a row may not share
RE_ANNOTATED = "re-annotations"         # the Aya dataset's annotation_type
EDITED = ("inputs", "targets")          # compared with original_inputs, original_targets


# ---- language ----------------------------------------------------------------------------------------------

def answer_in(row, where):
    """The text of a row that should be in its language: its answer, the chosen one of a pair, or its only
    text. The prompt of a translation may be in another."""
    for key in ("completion", "targets"):
        if isinstance(row.get(key), str):
            return row[key]                         # also an empty one, which texts_in leaves out
    texts = texts_in(row, where)
    return texts[-2] if "chosen" in shapes_in(row) else texts[-1]


def wrong_language(row, where, unjudged):
    """Why a row's answer is not in the row's language, or None. Lines of a few words, code and formulas are
    left out, as in evaluate_languages. unjudged: a Counter of why rows were not judged."""
    code = profile_of(row["language"]) if row.get("language") else None
    chances, _ = posterior("\n".join(lines_of(answer_in(row, where))[0])) if code else ({}, 0)
    if not chances:
        why = "too short" if code else "no profile of it" if row.get("language") else "none given"
        unjudged[why] += 1
        return None
    seen = max(chances, key=chances.get)
    is_right = chances.get(code, 0.0) * math.exp(WRONG) >= chances[seen]
    return None if is_right else f"in {seen}, not in {code}"


# ---- approvals, edits --------------------------------------------------------------------------------------

def too_few_approvals(row, where, least):
    count = row.get("approvals")
    if type(count) is not int or count < 0:
        raise ValueError(f"{where}: --approvals needs 'approvals', a whole number, in each row; got "
                         f"{'none' if count is None else repr(count)[:40]}")
    return f"{count} approvals" if count < least else None


def edit_distance(one, other, limit):
    """The edit distance (Levenshtein) of two texts in characters, or `limit` if it is not below it.

    Only cells of the table that are less than `limit` from the diagonal are computed.
    """
    begin = 0
    while begin < min(len(one), len(other)) and one[begin] == other[begin]:
        begin += 1
    one, other = one[begin:], other[begin:]
    if abs(len(one) - len(other)) >= limit:
        return limit
    before = {j: j for j in range(min(len(other), limit) + 1)}
    for i, letter in enumerate(one, 1):
        now = {0: i} if i < limit else {}
        for j in range(max(1, i - limit + 1), min(len(other), i + limit - 1) + 1):
            now[j] = min(before.get(j - 1, limit) + (letter != other[j - 1]), before.get(j, limit) + 1,
                         now.get(j - 1, limit) + 1)
        if min(now.values(), default=limit) >= limit:
            return limit
        before = now
    return min(before.get(len(other), limit), limit)


def edits(row, where, least):
    """The edit distance of a re-annotation from its original, at most `least`: that of its inputs plus that
    of its targets. None for a row that is no re-annotation; ValueError if its original, or what it became, is
    not there."""
    for key in EDITED:
        if row.get(f"original_{key}") is not None and row.get(key) is None:
            raise ValueError(f"{where}: --edit-distance compares original_{key} with {key}, which the row "
                             "lacks")
    pairs = [(text_of(row.get(key), key, where), text_of(row[f"original_{key}"], f"original_{key}", where))
             for key in EDITED if row.get(f"original_{key}") is not None]
    if not pairs and row.get("annotation_type") == RE_ANNOTATED:
        raise ValueError(f"{where}: a re-annotation without its original; --edit-distance compares inputs "
                         "and targets with original_inputs and original_targets, which the published Aya "
                         "dataset does not have: add one of them, or leave the flag out")
    return min(least, sum(edit_distance(one, other, least) for one, other in pairs)) if pairs else None


# ---- evaluation prompts ------------------------------------------------------------------------------------

class Prompts:
    """Evaluation prompts that training rows must not contain.

    A row contains one if a text of the row is the prompt or shares GRAM words in sequence with it. Words are
    those of text_statistics, without case and punctuation; in scripts without spaces characters.
    """

    def __init__(self, paths, columns=None):
        self.whole, self.grams = {}, {}
        for path in paths:
            for where, row, *_ in streamed(path, without_answer(columns or {})):
                texts = texts_in(row, where) if is_plain_text(row) else [
                    message["content"] for message in prompt_of(without_answer(row), where)
                    if message["role"] == "user"]
                for words in map(words_of, texts):
                    if words:
                        self.whole.setdefault(" ".join(words), where)
                    for gram in grams(words):
                        self.grams.setdefault(gram, where)

    def seen_in(self, texts):
        """(why, place of the prompt) if one of a row's texts contains a prompt, else None."""
        for words in map(words_of, texts if self.whole else ()):
            if where := self.whole.get(" ".join(words)):
                return "the whole prompt", where
            for gram in grams(words):
                if where := self.grams.get(gram):
                    return f"{GRAM} words of the prompt: {gram}", where
        return None


def grams(words):
    return (" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))


def without_answer(row):
    """A row, or columns, without the answers that `prompt_of` would refuse beside a prompt."""
    answers = ("completion", "targets", "chosen", "rejected")
    return {key: value for key, value in row.items() if key not in answers}
