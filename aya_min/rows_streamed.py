"""A JSONL file's rows one after another, each with the bytes of its line, for commands that hold no file in
memory (pruning.py) or read rows that are no examples yet (templates.py)."""

from pathlib import Path
from typing import NamedTuple

from .files import parse_object, refuse_pipe
from .rows import BLANK, OTHER_FILES, name_language


class Line(NamedTuple):
    where: str      # "file:line"
    row: dict       # its "language" is a code used here
    data: bytes     # the row's JSON as it stands in the file
    begin: int      # the byte at which the line begins


def streamed(path):
    """Yield a Line for each row of a JSONL file. ValueError at the first wrong line, and without any row."""
    path, begin, empty = Path(path), 0, True
    refuse_pipe(path)
    with open(path, "rb") as file:
        head = file.read(8)
        for start, what in OTHER_FILES.items():
            if head.startswith(start):
                raise ValueError(f"{path}: {what}; it needs one JSON object a line")
        file.seek(0)
        for number, line in enumerate(file, 1):
            if data := line.strip(BLANK + b"\n"):
                where = f"{path}:{number}"
                row = parse_object(data, where, "one whole object a line")
                name_language(row, where)
                yield Line(where, row, data, begin)
                empty = False
            begin += len(line)
    if empty:
        raise ValueError(f"{path}: the file is empty; it needs one JSON object a line")


def data_at(file, begin):
    """The bytes of the row whose line begins at a byte of a file that is open for reading in binary."""
    file.seek(begin)
    return file.readline().strip(BLANK + b"\n")
