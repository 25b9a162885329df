"""The rows that a mixture's spec draws. Their places are held in memory, and a row is read when it is needed.

    mixture = open_mixture("spec.json")
    where, row = mixture.row(0)

Commands that read files of rows take a mixture in place of a path (rows.read_jsonl): it has the spec's path
as its text. A drawn row takes about 30 bytes.
"""

import hashlib
import os

import numpy as np

from . import distributed
from .files import dumps
from .mixture_draw import Cell, count_rows, draw, table
from .mixture_index import NO_EXAMPLE, SPELLS, index_of, refuse_changed
from .mixture_spec import is_spec, read_spec, text_of_spec
from .rows import BLANK, learned_of, parse_row
from .rows_keys import NotRead

MOST_HANDLES = 200              # files that are open at a time


def open_mixture(path):
    """The Mixture of a spec's file. A collective: rank 0 makes the indexes that are not kept beside the files
    yet. ValueError for a wrong spec, a wrong line, and a source that runs dry."""
    spec = distributed.from_main(lambda: read_spec(path))
    places = [(file, source.columns) for source in spec.sources for file in source.files]
    made = []

    def index_all():
        made[:] = [index_of(*place) for place in places]

    distributed.patiently(index_all if distributed.is_main() else lambda: None)
    distributed.patiently(lambda: None if distributed.is_main() else index_all())
    for index in made if distributed.is_main() else ():
        for line in index.not_read:
            distributed.say(line, [index.path])
    return Mixture(spec, made)


def with_mixture(paths, settings, show=distributed.say):
    """The paths, or [the Mixture] of the one that is a spec, whose table is shown line by line."""
    if not any(map(is_spec, paths or ())):
        return paths
    if len(paths) > 1:
        raise ValueError(f"--data {' '.join(map(str, paths))}: a spec stands alone; name the other files in "
                         "its sources")
    if settings.columns:
        raise ValueError(f"--columns beside the spec {paths[0]}: its sources may have other keys each; write "
                         "\"columns\" into them")
    mixture = open_mixture(paths[0])
    examples = settings.max_steps * settings.batch_size // settings.gradient_steps
    passes = examples / len(mixture) if examples else settings.epochs
    for line in mixture.table():
        show(line)
    show(f"this run makes {passes:.3g} passes over these {len(mixture):,} rows, so many times the epochs "
         "above")
    return [mixture]


class Mixture:
    """The drawn rows of a spec, in their seeded order.

    cells: [mixture_draw.Cell, ...] with their counts. languages: (N,) numbers of codes. bits: (N,) what the
    index says of each row. sizes: (N,) bytes of each row.
    """

    def __init__(self, spec, indexes):
        self.spec = spec
        self.paths, self.stamps = [index.path for index in indexes], [index.stamp for index in indexes]
        self.columns = [source.columns for source in spec.sources for _ in source.files]
        self.sha256, self.handles = digest_of(spec, indexes), {}
        self.cells, cell_of_group, bits, codes = cells_of(spec, indexes)
        self.codes = sorted(set(codes))
        offsets = np.cumsum([0] + [len(index.groups) for index in indexes])
        groups = np.concatenate([index.group + offset for index, offset in
                                 zip(indexes, offsets.astype(np.int32))])           # (R,) int32
        count_rows(self.cells, spec)
        drawn = draw(cell_of_group[groups], self.cells, spec.seed)              # (N,) int32
        groups = groups[drawn]
        self.bits = np.array(bits, np.uint8)[groups]
        self.languages = np.array([self.codes.index(code) for code in codes], np.int16)[groups]
        counts = [len(index.start) for index in indexes]
        self.files = np.repeat(np.arange(len(indexes), dtype=np.int16), counts)[drawn]
        self.starts, self.sizes, self.lines = (
            np.concatenate([getattr(index, name) for index in indexes])[drawn]
            for name in ("start", "size", "line"))

    def __len__(self):
        return len(self.files)

    def __str__(self):
        return str(self.spec.path)

    def __fspath__(self):
        return str(self.spec.path)

    def table(self):
        """Text lines: what one pass over the mixture holds."""
        return table(self.cells, self.spec)

    def where(self, i):
        return f"{self.paths[self.files[i]]}:{self.lines[i]}"

    def line(self, i):
        """The bytes of a drawn row's line."""
        file = self.handle(int(self.files[i]))
        return os.pread(file.fileno(), int(self.sizes[i]), int(self.starts[i]))

    def handle(self, number):
        """An open file, which is still as it was indexed. A file that another replaces is read on."""
        if number not in self.handles:
            if len(self.handles) == MOST_HANDLES:
                self.handles.pop(next(iter(self.handles))).close()
            self.handles[number] = open(self.paths[number], "rb", buffering=0)
        file = self.handles[number]
        refuse_changed(self.paths[number], self.stamps[number], file.fileno())
        return file

    def text(self, i):
        """A drawn row's line as it is or, where columns are renamed, with our names."""
        if self.columns[self.files[i]]:
            return dumps(self.row(i)[1]).encode()
        return self.line(i).strip(BLANK + b"\n")

    def row(self, i):
        """("file:line", row) of a drawn row."""
        where = self.where(i)
        return where, parse_row(self.line(i).rstrip(b"\n"), where, self.columns[self.files[i]], NotRead())

    def read_rows(self):
        """[(where, row), ...] of all drawn rows, in memory: what rows.read_jsonl gives for a file."""
        distributed.say(f"{len(self):,} rows, {self.sizes.sum(dtype=np.int64) / 1e6:,.0f} MB, are read into "
                        "memory", [self])
        return [self.row(i) for i in range(len(self))]

    def first(self, most):
        """Yield (where, row) of the first drawn rows, and say so if they are not all."""
        if most < len(self):
            distributed.say(f"the tokenizer is trained on the first {most:,} of {len(self):,} drawn rows",
                            [self])
        return (self.row(i) for i in range(min(most, len(self))))

    def refuse_no_examples(self, reading):
        """ValueError, with its place, for the first row that pretrain and sft would refuse when they reach
        it; and for texts that spell control tokens, unless they are allowed."""
        if (bad := np.flatnonzero(self.bits & NO_EXAMPLE)).size:
            refuse_row(self, int(bad[0]), len(bad))
        if (spells := np.flatnonzero(self.bits & SPELLS)).size:
            text = (f"{len(spells):,} of {len(self):,} rows spell control tokens (the first: "
                    f"{self.where(spells[0])}), which are read as letters")
            if not reading.allow_control_tokens:
                raise ValueError(f"{self}: {text}; give texts without a chat template's tokens, or "
                                 "--allow-control-tokens")
            distributed.say(text, [self])


def refuse_row(mixture, i, count):
    """Raise the ValueError of a row that is no example. count: of such rows."""
    where, row = mixture.row(i)
    try:
        learned_of(row, where)
    except ValueError as error:
        raise ValueError(f"{error} ({count:,} of {len(mixture):,} drawn rows are no examples)") from None
    raise AssertionError(where)


def digest_of(spec, indexes):
    """The SHA-256 of all that decides which rows come when."""
    parts = [text_of_spec(spec), *(index.sha256 for index in indexes)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cells_of(spec, indexes):
    """(cells, (G,) the cell of each group of all indexes, their bits, their languages).

    A file's name is the dataset of rows that name none. Templates are told apart where the source weights
    them. ValueError for a template weight that no row has."""
    numbers = [number for number, source in enumerate(spec.sources) for _ in source.files]
    cells, cell_of_group, bits, codes, named = {}, [], [], [], set()
    for number, index in zip(numbers, indexes):
        weights = spec.sources[number].template_weights or {}
        sizes = np.bincount(index.group, minlength=len(index.groups)).tolist()
        for (language, dataset, template, task, bit), size in zip(index.groups, sizes):
            kind = next((name for name in (template, task) if name in weights), "")
            named.add((number, kind))
            key = number, dataset or index.path.name, language, kind
            cell = cells.setdefault(key, Cell(*key, size=0))
            cell.size += size
            cell_of_group.append(key)
            bits.append(bit)
            codes.append(language)
    for number, source in enumerate(spec.sources):
        for name in source.template_weights or ():
            if (number, name) not in named:
                raise ValueError(f"{spec.path}: source {source.name!r}: template_weights: no row has the "
                                 f"template_id or task_type {name!r}; remove it")
    order = {key: place for place, key in enumerate(sorted(cells))}
    places = np.array([order[key] for key in cell_of_group], np.int32)
    return [cells[key] for key in order], places, bits, codes
