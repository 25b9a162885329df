"""Small grammars of questions and commands, for what is shared between two tasks of translation: the lexicon,
the structure, both or neither (in the spirit of arXiv 2307.16795, whose own construction is not known to us).

A Query is a verb, a place, one or two pairs of attribute and value, and perhaps a second verb with an
attribute. A lexicon gives each of them a word and a token; no two lexicons share any. A structure writes a
query as a question and as a command, with function words and symbols of its own:

    pipes    hide in barn whose size is big and age is old , then sort by size
             HIDE BARN -SIZE BIG -AGE OLD | SORT -SIZE
    frames   please for old of age plus for big of size from barn do hide after sort on size
             ( SORT : SIZE ( BIG = SIZE ; OLD = AGE @ BARN ) HIDE )

with made-up words in place of these. What holds of a command can be read back (`read`).
"""

import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Optional

from .world import split_named

NUM = {"verb": 12, "place": 12, "attribute": 12, "value": 24}
LEXICONS = 2


@dataclass(frozen=True)
class Query:
    """Numbers below NUM. conditions: ((attribute, value), ...); then: (verb, attribute) or None."""
    verb: int
    place: int
    conditions: tuple
    then: Optional[tuple] = None


@cache
def lexicon(number):
    """{kind: [(word of the question, token of the command), ...]}: made-up words of two syllables, and tokens
    of two others in capitals."""
    syllables = ["".join(pair) for pair in product("bdfgklmnprst", "aeiou")]
    words = ["".join(pair) for pair in product(syllables, syllables)]
    random.Random("lexicon").shuffle(words)
    size = 2 * sum(NUM.values())
    own = iter(words[number * size:(number + 1) * size])
    return {kind: [(next(own), next(own).upper()) for _ in range(num)] for kind, num in NUM.items()}


# ---- structures --------------------------------------------------------------------------------------------

def ask_pipes(w, q):
    """The question. w: kind, number -> word."""
    conditions = " and ".join(f"{w('attribute', a)} is {w('value', v)}" for a, v in q.conditions)
    end = f" , then {w('verb', q.then[0])} by {w('attribute', q.then[1])}" if q.then else ""
    return f"{w('verb', q.verb)} in {w('place', q.place)} whose {conditions}{end}"


def command_pipes(w, q):
    conditions = "".join(f" -{w('attribute', a)} {w('value', v)}" for a, v in q.conditions)
    end = f" | {w('verb', q.then[0])} -{w('attribute', q.then[1])}" if q.then else ""
    return f"{w('verb', q.verb)} {w('place', q.place)}{conditions}{end}"


def ask_frames(w, q):
    conditions = " plus ".join(f"for {w('value', v)} of {w('attribute', a)}" for a, v in q.conditions[::-1])
    end = f" after {w('verb', q.then[0])} on {w('attribute', q.then[1])}" if q.then else ""
    return f"please {conditions} from {w('place', q.place)} do {w('verb', q.verb)}{end}"


def command_frames(w, q):
    conditions = " ; ".join(f"{w('value', v)} = {w('attribute', a)}" for a, v in q.conditions)
    begin = f"{w('verb', q.then[0])} : {w('attribute', q.then[1])} " if q.then else ""
    return f"( {begin}( {conditions} @ {w('place', q.place)} ) {w('verb', q.verb)} )"


# {structure: (question, command, what a command is)}
STRUCTURES = {
    "pipes": (ask_pipes, command_pipes,
              r"(?P<verb>\w+) (?P<place>\w+)(?P<conditions>(?: -\w+ \w+){1,2})"
              r"(?: \| (?P<then_verb>\w+) -(?P<then_attribute>\w+))?"),
    "frames": (ask_frames, command_frames,
               r"\( (?:(?P<then_verb>\w+) : (?P<then_attribute>\w+) )?"
               r"\( (?P<conditions>\w+ = \w+(?: ; \w+ = \w+)?) @ (?P<place>\w+) \) (?P<verb>\w+) \)"),
}


def texts(query, words, structure):
    """(question, command) of a query in the lexicon of this number and in a structure."""
    own = lexicon(words)
    ask, command, _ = STRUCTURES[structure]
    return tuple(write(lambda kind, number: own[kind][number][side], query)
                 for side, write in enumerate((ask, command)))


def is_of(command, structure):
    """Whether a command is of this structure, with any words."""
    return bool(re.fullmatch(STRUCTURES[structure][2], command, re.ASCII))


# ---- queries -----------------------------------------------------------------------------------------------

def queries(split, count, seed):
    """`count` different queries of one split of the world's, which depends on the query alone."""
    rng, found = random.Random(f"grammars/{split}/{seed}"), {}
    draw = lambda kind: rng.randrange(NUM[kind])
    while len(found) < count:
        attributes = rng.sample(range(NUM["attribute"]), rng.choice((1, 2)))
        conditions = tuple((a, draw("value")) for a in attributes)
        then = (draw("verb"), draw("attribute")) if rng.random() < 0.5 else None
        query = Query(draw("verb"), draw("place"), conditions, then)
        if split_named(repr(query)) == split:
            found[query] = None
    return list(found)


@cache
def rows(split, count, seed, words, structure):
    """Queries as {"prompt", "completion", "question_id"}."""
    made = [(*texts(query, words, structure), repr(query)) for query in queries(split, count, seed)]
    return [dict(zip(("prompt", "completion", "question_id"), each)) for each in made]
