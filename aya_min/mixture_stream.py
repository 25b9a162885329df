"""A mixture as the examples of pretrain and sft: rows are read and tokenized when a batch needs them.

An item is one example. A {"text"} of more tokens than fit is several items, each with its part of the text:
how many parts it needs is estimated from its bytes. What a row is, is data.examples_of, as for files. That a
row is too long, or was cut, is found when it is read: then the next item of the drawn order stands in, which
is the same at any number of ranks and micro-batches, and after a resume.
"""

from contextlib import contextmanager

import numpy as np

from . import distributed
from .control_tokens import Spelled
from .data import SKIP, examples_of, load_examples
from .lengths import LeftOut
from .mixture_index import PLAIN
from .mixture_rows import Mixture

TRIED = 16              # rows of each language, and texts apart, that are tokenized to estimate lengths
FULL = 0.8              # of the tokens that fit, how many a part of a text should have by the estimate
MOST_TRIES = 1000       # items in a row that may be left out


def load_or_stream(paths, tokenizer, limit, reading=SKIP):
    """The examples of files (data.load_examples), or the Stream of a mixture.

    For an encoder-decoder, of which a row may be several examples, a mixture is read into memory."""
    if isinstance(paths[0], Mixture) and not getattr(tokenizer, "one_answer", False):
        return Stream(paths[0], tokenizer, limit, reading)
    return load_examples(paths, tokenizer, limit, reading)


class Stream:
    """A list of Examples, of which none is held.

    lengths: (N,) estimated tokens. languages: the set of codes. ValueError, before anything trains, for rows
    that are no examples, and if none of the rows that are tried fits.
    """

    def __init__(self, mixture, tokenizer, limit, reading):
        self.mixture, self.tokenizer, self.limit, self.reading = mixture, tokenizer, limit, reading
        mixture.refuse_no_examples(reading)
        self.languages = {mixture.codes[number] for number in np.unique(mixture.languages)}
        kinds = mixture.languages.astype(np.int32) * 2 + (mixture.bits & PLAIN > 0)         # (rows,)
        tokens = (mixture.sizes / self.bytes_of_token(kinds)[kinds]).astype(np.float32)     # (rows,)
        parts = np.where(kinds % 2, np.ceil(tokens / (FULL * limit)), 1).clip(1).astype(np.int32)
        self.rows = np.repeat(np.arange(len(mixture), dtype=np.int32), parts)               # (N,)
        self.parts = parts[self.rows]
        self.firsts = (np.cumsum(parts) - parts).astype(np.int32)                           # (rows,)
        self.lengths = np.minimum(np.ceil(tokens / parts), limit).astype(np.int32)[self.rows]
        self.begin()

    def begin(self):
        """Count what is left out from here on."""
        self.left_out = LeftOut([self.mixture], self.reading, self.limit)
        self.spelled = Spelled(self.tokenizer)

    def bytes_of_token(self, kinds):
        """(K,) bytes of a line that make a token, by kind, from the first rows of each kind. 4 where none of
        them can be used."""
        self.begin()
        found, kept = np.full(int(kinds.max()) + 1, 4.0), 0
        order = np.argsort(kinds, kind="stable")
        begins = np.searchsorted(kinds[order], np.arange(len(found) + 1))
        for kind, (first, end) in enumerate(zip(begins, begins[1:])):
            num_bytes = num_tokens = 0
            for i in order[first:min(end, first + TRIED)]:
                if examples := self.examples_of_row(*self.mixture.row(i)):
                    num_bytes += int(self.mixture.sizes[i])
                    num_tokens += sum(len(example.ids) for example in examples)
            kept += num_tokens
            found[kind] = num_bytes / num_tokens if num_tokens else 4.0
        if not kept:
            self.left_out.report(0, "rows that were tried")
        for reason, places in self.left_out.places.items():
            distributed.say(f"of the {self.left_out.total:,} rows that were tried, {len(places):,} {reason}; "
                            f"the first: {places[0]}. Where a row is left out, the next drawn one stands in",
                            [self.mixture])
        return found

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)                     # it ends a loop over the list
        for j in range(i, i + MOST_TRIES):
            if example := self.example(j % len(self)):
                return example
        raise ValueError(f"{self.mixture}: {MOST_TRIES:,} examples in a row are left out, the last: "
                         f"{self.mixture.where(self.rows[j % len(self)])}; see --max-length, --too-long, "
                         "--keep-cut")

    def example(self, i):
        """The Example of an item, or None if its row is left out."""
        number, many = self.rows[i], self.parts[i]
        where, row = self.mixture.row(number)
        if many == 1:
            examples = self.examples_of_row(where, row)
        else:
            part, size = i - self.firsts[number], len(row["text"])
            begin, end = (int(size * place // many) for place in (part, part + 1))
            text = row["text"][begin:end]
            examples = self.examples_of_row(where, {**row, "text": text}) if text.strip() else []
            if part + 1 < many and len(examples) == 1:
                # The token that ends a text is for its last part.
                examples[0].ids, examples[0].mask = examples[0].ids[:-1], examples[0].mask[:-1]
        if len(examples) > 1:
            self.left_out.add(f"have a text, or a part of one, that is longer than {self.limit} tokens "
                              "against the estimate, and lose the end of it", where)
        return examples[0] if examples else None

    def examples_of_row(self, where, row):
        examples = examples_of(row, where, self.tokenizer, self.limit, self.reading, self.left_out,
                               self.spelled)
        if self.spelled.found and not self.reading.allow_control_tokens:
            self.spelled.report([self.mixture], self.left_out.total, self.reading)
        return examples

    def sample(self, count):
        """[Example, ...] at most `count`, spread over all items."""
        places = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int))
        return [self[i] for i in places]

    @contextmanager
    def reported(self):
        """Report at the end what was left out, also where a signal ends the run. A collective."""
        try:
            yield
        except distributed.Stopped:
            self.report()
            raise
        self.report()

    def report(self):
        """Say what was left out since `begin`, on all ranks together. A collective."""
        mine = self.left_out.total, self.left_out.places, self.spelled.found
        all_places, reads, spelled = {}, 0, 0
        for total, places, found in distributed.gather_objects(mine):
            reads, spelled = reads + total, spelled + sum(found.values())
            for reason, some in places.items():
                all_places.setdefault(reason, {}).update(dict.fromkeys(some))
        for reason, places in all_places.items():
            distributed.say(f"{len(places):,} rows, in {reads:,} readings of rows, {reason}; the first: "
                            f"{min(places)}", [self.mixture])
        if spelled:
            distributed.say(f"{spelled:,} of {reads:,} readings met control tokens spelled in a text, which "
                            "are read as letters", [self.mixture])
