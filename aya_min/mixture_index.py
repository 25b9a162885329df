"""Where the rows of a JSONL file are, and of which kind: so that files larger than memory can be mixed.

An index holds for each row its byte offset, size, line, and group: the language, the dataset, the template
and what was found in it. It is made in one pass, in memory of 20 bytes a row. That of a file of at least KEPT
bytes is kept beside it as FILE.KEY.index.safetensors. The key is made of the file's size, time, and pieces of
its content, and of the columns that were renamed: a changed file has another key, and is indexed anew.
"""

import glob
import hashlib
import json
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from . import distributed
from .command import progress
from .control_tokens import TEMPLATED
from .files import dumps, publish_file, refuse_pipe, scratch
from .rows import BLANK, is_plain_text, learned_of, parse_row, refuse_other_files
from .rows_keys import NotRead

KEPT = 64_000_000               # bytes of a file whose index is kept on disk
VERSION = 1                     # of what an index says of the same file
NUM_PIECES, PIECE = 16, 4096    # what a key reads of a file
MOST_GROUPS = 200_000
ARRAYS = {"start": np.int64, "size": np.int32, "line": np.int32, "group": np.int32}

# What a group says of its rows, beside language, dataset and template.
NO_EXAMPLE = 1                  # pretrain and sft refuse it (rows.learned_of)
SPELLS = 2                      # a text spells a control token's name (control_tokens.py)
PLAIN = 4                       # it is {"text"}, which may be cut into pieces


@dataclass
class Index:
    """Arrays have one entry a row. groups: [(language, dataset or "", template_id or "", task_type or "",
    NO_EXAMPLE, SPELLS, PLAIN as bits), ...]. not_read: lines that name keys that nothing reads."""
    path: Path
    sha256: str                 # of the whole file
    stamp: list                 # [bytes, time of the last change in ns]
    groups: list
    not_read: list
    start: np.ndarray
    size: np.ndarray
    line: np.ndarray
    group: np.ndarray


def stamp_of(file):
    """[bytes, time of the last change in ns] of a path or an open file's number."""
    about = os.stat(file)
    return [about.st_size, about.st_mtime_ns]


def key_of(path, columns):
    """Sixteen hex digits: twelve of the file's state, four of the columns."""
    size, time = stamp_of(path)
    state = hashlib.sha256(f"{VERSION} {size} {time}".encode())
    with open(path, "rb") as file:
        for i in range(NUM_PIECES):
            file.seek(max(0, size - PIECE) * i // (NUM_PIECES - 1))
            state.update(file.read(PIECE))
    of_columns = hashlib.sha256(dumps(columns or {}, sort_keys=True).encode())
    return state.hexdigest()[:12] + of_columns.hexdigest()[:4]


# ---- made in one pass --------------------------------------------------------------------------------------

def found_in(row, where):
    """The bits of a row, which pretrain and sft read."""
    try:
        messages = learned_of(row, where)[0]
    except ValueError:
        return NO_EXAMPLE
    texts = (message["content"] for message in messages)
    spells = any(TEMPLATED.search(text) for text in texts if "<" in text or "[" in text)
    return (SPELLS if spells else 0) + (PLAIN if is_plain_text(row) else 0)


def group_of(row, where):
    named = (row.get(name) for name in ("template_id", "task_type"))
    dataset = row.get("dataset_name") or row.get("source") or ""
    template, task = ("" if value is None else str(value) for value in named)
    return row.get("language") or "other", str(dataset), template, task, found_in(row, where)


def make_index(path, columns=None):
    """The Index of a file, read line by line. ValueError at the first line that is not a row."""
    stamp, not_read, digest = stamp_of(path), NotRead(columns=columns), hashlib.sha256()
    found, groups, start = {name: array("q" if name == "start" else "i") for name in ARRAYS}, {}, 0
    with open(path, "rb") as file, progress(total=stamp[0], desc=f"index of {Path(path).name}", unit="B",
                                            unit_scale=True, disable=not distributed.is_main()) as bar:
        for number, line in enumerate(file, 1):
            if number == 1:
                refuse_other_files(line, path)
            digest.update(line)
            if line.strip(BLANK + b"\n"):
                where = f"{path}:{number}"
                row = parse_row(line.rstrip(b"\n"), where, columns, not_read)
                group = groups.setdefault(group_of(row, where), len(groups))
                for name, value in zip(ARRAYS, (start, len(line), number, group)):
                    found[name].append(value)
                if len(groups) > MOST_GROUPS:
                    raise ValueError(f"{where}: more than {MOST_GROUPS:,} different datasets and templates; "
                                     "give the rows a dataset_name that many of them share")
            start += len(line)
            bar.update(len(line))
    if not groups:
        raise ValueError(f"{path}: the file is empty; it needs one JSON object a line")
    refuse_changed(path, stamp)
    arrays = {name: np.frombuffer(found[name], kind) for name, kind in ARRAYS.items()}
    return Index(Path(path), digest.hexdigest(), stamp, list(groups), not_read.lines(), **arrays)


def refuse_changed(path, stamp, file=None):
    """ValueError if a file, or its open handle, is not as it was when it was indexed."""
    if stamp_of(path if file is None else file) != stamp:
        raise ValueError(f"{path}: it changed while it was read; wait until it is written, and start again")


# ---- kept beside the file ----------------------------------------------------------------------------------

def index_of(path, columns=None):
    """The Index of a JSONL file: read from beside it, or made, and kept there if the file is large."""
    refuse_pipe(path)
    if os.stat(path).st_size < KEPT:
        return make_index(path, columns)
    key = key_of(path, columns)
    place = Path(f"{path}.{key}.index.safetensors")
    if os.path.lexists(place):
        return read_index(path, place, key)
    old = [name for name in sorted(glob.glob(glob.escape(str(path)) + ".*.index.safetensors"))
           if not name.removeprefix(f"{path}.").startswith(key[:12])]
    if old:
        distributed.say(f"the file changed since {' '.join(old)} was made; it is indexed anew, and that can "
                        "be removed", [path])
    index = make_index(path, columns)
    write_index(index, place, key)
    return index


def digest_of(arrays):
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def write_index(index, place, key):
    """Keep an index beside its file. Where that cannot be written, a line says so."""
    arrays = {name: getattr(index, name) for name in ARRAYS}
    about = {"key": key, "arrays": digest_of(arrays), "sha256": index.sha256, "groups": index.groups,
             "not_read": index.not_read}
    try:
        with scratch(place) as folder:
            save_file(arrays, folder / "file", {"aya_min index": dumps(about)})
            if not os.path.lexists(place):              # another run may have made it in the meantime
                publish_file(folder / "file", place)
    except (OSError, SafetensorError) as error:
        distributed.say(f"its index cannot be kept as {place} ({error}); it is made anew at each start",
                        [index.path])


def read_index(path, place, key):
    """The Index in a file. ValueError if it is not the index of this file, or damaged."""
    try:
        with safe_open(place, "np") as file:
            about = json.loads((file.metadata() or {})["aya_min index"])
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
        fits = about["key"] == key and about["arrays"] == digest_of(arrays)
        groups = [(*texts, int(bits)) for *texts, bits in about["groups"]]
        fits = fits and all(arrays[name].dtype == kind for name, kind in ARRAYS.items())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise ValueError(f"{place}: not the index of {path}, or damaged; remove it, it is made anew")
    return Index(Path(path), about["sha256"], stamp_of(path), groups, about["not_read"], **arrays)
