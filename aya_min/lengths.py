"""What is too long, and what else is left out: counted, and said with the first place of each reason.

--too-long is one policy for all commands: refuse, skip, or cut-left (the oldest tokens of a prompt go).
"""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from . import distributed
from .config import Reading

# ---- examples to learn from --------------------------------------------------------------------------------

NOT_LEARNT = "have no answer that is learnt (weight 0, train false) and are left out"
WAS_CUT = "have an answer that was cut at its limit (finish_reason) and are left out, --keep-cut keeps them"
EARLIER_CUT = "have an earlier answer that was cut at its limit, which is context only"


@dataclass
class LeftOut:
    """What is not trained on: each reason is said in one line, with the count and the first place.

    limit: the tokens that fit, the smaller of the settings' max_length and the model's positions."""
    paths: list
    reading: Reading
    limit: int
    total: int = 0
    places: dict = field(default_factory=dict)              # reason -> [where, ...]
    languages: Counter = field(default_factory=Counter)     # of the answers that were cut, left out for that

    def add(self, reason, where):
        self.places.setdefault(reason, []).append(where)

    def add_long(self, where, num_tokens, fits):
        """Count an example of too many tokens, which was made to fit or was not, or refuse it."""
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
        """Say what was left out; ValueError if nothing is left."""
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
    """The last ids of a text that is too long, after its first, which begins every text (BOS)."""
    if len(ids) <= room:
        return ids
    first, last = ids[:1], ids[len(ids) - room + 1:]
    return np.concatenate([first, last]) if isinstance(ids, np.ndarray) else first + last


def without_oldest(example, tokenizer, answer, room):
    """The example in `room` tokens: the oldest of its prompt go, BOS and the whole answer (its text) stay.
    None if there is no room for that.

    What is left of an earlier answer that the cut goes through is not learnt."""
    if 1 + len(tokenizer.opening["assistant"]) + len(tokenizer.encode_answer(answer)) > room:
        return None
    mask, gone = cut_left(example.mask, room), len(example.mask) - room
    if example.mask[gone] and mask[1]:
        mask[1:1 + int(np.argmin(mask[1:]))] = False
    return replace(example, ids=cut_left(example.ids, room), mask=mask) if mask.any() else None


def fitting_example(tokenizer, example, answer, left_out):
    """[the example], with its prompt cut where that is the policy, or [] if it is too long."""
    num_tokens, fits = len(example.ids), example
    if num_tokens > left_out.limit:
        cut = left_out.reading.too_long == "cut-left"
        fits = without_oldest(example, tokenizer, answer, left_out.limit) if cut else None
        left_out.add_long(example.where, num_tokens, fits)
    return [fits] if fits else []


def fitting_pair(tokenizer, sides, answers, left_out):
    """The sides of a pair, both prompts cut alike where that is the policy; [] if one is too long."""
    longest, fits = max(len(side.ids) for side in sides), sides
    if longest > left_out.limit:
        gone, cut = longest - left_out.limit, left_out.reading.too_long == "cut-left"
        fits = [without_oldest(side, tokenizer, answer, len(side.ids) - gone) if cut else None
                for side, answer in zip(sides, answers)]
        left_out.add_long(sides[0].where, longest, None not in fits)
    return [] if None in fits else fits


# ---- prompts to answer -------------------------------------------------------------------------------------

def fit_prompts(rows, length_of, room, policy, what):
    """The rows whose prompts, length_of(row) tokens long, have room. The policy (--too-long) is for the rest.

    refuse: ValueError with the first one's place. skip: they are left out. cut-left: they stay, and the
    caller cuts them (cut_left). what: the room in words."""
    if room < 1:
        raise ValueError(f"{what}: no room for a prompt; lower the number of new tokens")
    long = {i: length for i, length in enumerate(map(length_of, rows)) if length > room}
    if not long:
        return rows
    first, length = next(iter(long.items()))
    place, count = rows[first].get("prompt_where") or f"prompt {first + 1}", f"{len(long)} of {len(rows)}"
    if policy == "refuse" or (policy == "skip" and len(long) == len(rows)):
        raise ValueError(f"{place}: the prompt has {length} tokens; {what}: {room} ({count} prompts are "
                         "longer). Shorten it, or give --too-long skip or cut-left")
    does = "are left out" if policy == "skip" else "lose their oldest tokens"
    distributed.say(f"{count} are longer than {room} tokens ({what}) and {does}; the first: {place}, "
                    f"{length} tokens", ["prompts"])
    return rows if policy == "cut-left" else [row for i, row in enumerate(rows) if i not in long]
