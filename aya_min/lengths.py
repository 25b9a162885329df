"""Examples and prompts that are too long or left out for another reason. Each reason is reported in one line.

--too-long is one policy for all commands: refuse, skip, or cut-left (a prompt loses its oldest tokens).
"""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from . import distributed
from .config import Reading

# ---- examples to learn from --------------------------------------------------------------------------------

NOT_SUPERVISED = "have no answer that is supervised (weight 0, train false) and are left out"
WAS_CUT = "have an answer that was cut at its limit (finish_reason) and are left out, --keep-cut keeps them"
EARLIER_CUT = "have an earlier answer that was cut at its limit, which is context only"


@dataclass
class LeftOut:
    """Counts what is not trained on, and reports each reason with its count and its first place.

    limit: the number of tokens that fit, the smaller of the settings' max_length and the model's positions.
    """
    paths: list
    reading: Reading
    limit: int
    total: int = 0
    places: dict = field(default_factory=dict)              # reason -> [where, ...]
    languages: Counter = field(default_factory=Counter)     # of the rows that are left out for WAS_CUT

    def add(self, reason, where):
        """Count a row. reason: the end of a sentence that begins with "3 of 9 examples"."""
        self.places.setdefault(reason, []).append(where)

    def add_long(self, where, num_tokens, fits):
        """Count an example of too many tokens, or ValueError by policy. fits: whether it was cut to fit."""
        by_model = getattr(self.reading, "max_length", self.limit) > self.limit
        limit = f"the model's {self.limit} positions" if by_model else f"--max-length {self.limit} tokens"
        if fits:
            return self.add(f"are longer than {limit} and lose the oldest tokens of their prompts", where)
        if self.reading.too_long == "refuse":
            raise ValueError(f"{where}: {num_tokens} tokens, longer than {limit}; shorten it, or give "
                             "--too-long skip or cut-left")
        rest = ", even with their prompts cut," if self.reading.too_long == "cut-left" else ""
        self.add(f"are longer than {limit}{rest} and are left out", where)

    def report(self, kept, what):
        """Print what was left out. kept: the number of examples; ValueError if it is 0."""
        by_language = ", ".join(f"{code} {count}" for code, count in sorted(self.languages.items()))
        lines = [f"{len(places)} of {self.total} {what} {reason}; "
                 f"{f'by language: {by_language}; ' if reason == WAS_CUT else ''}the first: {places[0]}"
                 for reason, places in self.places.items()]
        if not kept:
            raise ValueError(f"{' '.join(map(str, self.paths))}: nothing to train on is left of {self.total} "
                             f"{what}: {'; '.join(lines)}. Give other data, or see --max-length, --too-long, "
                             "--keep-cut")
        for line in lines:
            distributed.say(line, self.paths)


def cut_left(ids, room):
    """The first of the ids (BOS) and the last ones, at most `room` together. ids: a list or an array."""
    if len(ids) <= room:
        return ids
    first, last = ids[:1], ids[len(ids) - room + 1:]
    return np.concatenate([first, last]) if isinstance(ids, np.ndarray) else first + last


def without_oldest(example, tokenizer, answer, room):
    """The example in `room` tokens, without the oldest tokens of its prompt.

    None if BOS and the whole last answer with its opening do not fit. answer: its text. If the cut goes
    through an earlier answer, the rest of that is not supervised.
    """
    answer = tokenizer.asks + tokenizer.encode_answer(answer) + tokenizer.after
    if 1 + len(answer) + example.critique > room:
        return None
    mask = cut_left(example.mask, room)
    num_removed = len(example.mask) - room
    if example.mask[num_removed] and mask[1]:
        mask[1:1 + int(np.argmin(mask[1:]))] = False
    return replace(example, ids=cut_left(example.ids, room), mask=mask) if mask.any() else None


def fitting_example(tokenizer, example, answer, left_out):
    """[the example], with its prompt cut if the policy is cut-left, or [] if it is too long."""
    num_tokens = len(example.ids)
    fits = example
    if num_tokens > left_out.limit:
        cut = left_out.reading.too_long == "cut-left"
        fits = without_oldest(example, tokenizer, answer, left_out.limit) if cut else None
        left_out.add_long(example.where, num_tokens, fits)
    return [fits] if fits else []


def fitting_pair(tokenizer, sides, answers, left_out):
    """The sides of a pair, with the same tokens cut from both prompts if the policy is cut-left, or [] if one
    is too long."""
    longest = max(len(side.ids) for side in sides)
    fits = sides
    if longest > left_out.limit:
        excess = longest - left_out.limit
        cut = left_out.reading.too_long == "cut-left"
        fits = [without_oldest(side, tokenizer, answer, len(side.ids) - excess) if cut else None
                for side, answer in zip(sides, answers)]
        left_out.add_long(sides[0].where, longest, None not in fits)
    return [] if None in fits else fits


# ---- prompts to answer -------------------------------------------------------------------------------------

def fit_prompts(rows, length_of, room, policy, what):
    """The rows whose prompts, length_of(row) tokens long, fit into `room` tokens. policy, for longer ones:

    refuse: ValueError with the place of the first. skip: they are left out (ValueError if all are longer).
    cut-left: they are kept, and the caller cuts them (cut_left). what: the room in words, for messages.
    """
    if room < 1:
        raise ValueError(f"{what}: no room for a prompt; lower the number of new tokens")
    long = {i: length for i, length in enumerate(map(length_of, rows)) if length > room}
    if not long:
        return rows
    first, length = next(iter(long.items()))
    place = rows[first].get("prompt_where") or f"prompt {first + 1}"
    count = f"{len(long)} of {len(rows)}"
    if policy == "refuse" or (policy == "skip" and len(long) == len(rows)):
        raise ValueError(f"{place}: the prompt has {length} tokens; {what}: {room} ({count} prompts are "
                         "longer). Shorten it, or give --too-long skip or cut-left")
    does = "are left out" if policy == "skip" else "lose their oldest tokens"
    distributed.say(f"{count} are longer than {room} tokens ({what}) and {does}; the first: {place}, "
                    f"{length} tokens", ["prompts"])
    return rows if policy == "cut-left" else [row for i, row in enumerate(rows) if i not in long]
