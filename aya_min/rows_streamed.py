"""A JSONL file's rows one after another, each with the bytes of its line, for commands that hold no file in
memory (pruning.py) or read rows that are no examples yet (templates.py)."""

from pathlib import Path
from typing import NamedTuple

from .files import parse_object, refuse_pipe
from .rows import BLANK, name_language, refuse_other_files
from .rows_keys import check_columns, renamed


class Line(NamedTuple):
    where: str      # "file:line"
    row: dict       # its keys are renamed, its "language" is a code used here
    data: bytes     # the row's JSON as it stands in the file
    begin: int      # the byte at which the line begins


def streamed(path, columns=None):
    """Yield a Line for each row of a JSONL file, its keys renamed by columns (rows_keys.renamed). ValueError
    at the first wrong line, and without any row."""
    path, begin, empty = Path(path), 0, True
    check_columns(columns)
    refuse_pipe(path)
    with open(path, "rb") as file:
        head = file.read(8)
        refuse_other_files(head, path)
        file.seek(0)
        for number, line in enumerate(file, 1):
            if data := line.strip(BLANK + b"\n"):
                where = f"{path}:{number}"
                row = parse_object(data, where, "one whole object a line")
                row = renamed(row, columns, where) if columns else row
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
