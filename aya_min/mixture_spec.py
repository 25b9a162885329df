"""The spec of a mixture: a JSON file that says which files to train on, and how much of each.

    {"seed": 0, "total": 20000, "temperature": 0.5, "cap_language": 4000, "languages": ["en", "tr"],
     "sources": {
         "human": {"files": ["human.jsonl"], "weight": 3, "epochs": 2},
         "templates": {"files": ["a.jsonl", "b.jsonl"], "weight": 1, "cap_dataset": 20000,
                       "cap_dataset_language": 3000, "columns": {"prompt": "question"},
                       "template_weights": {"xsum-3": 0.5, "translation": 0}}}}

Only "sources", with "files" and "weight" in each, is needed. Files are relative to the spec's folder.

- "weight": a source's share of the rows, as a part of the sum of weights (Aya 101, arXiv 2402.07827).
- "total": rows of one pass over the mixture. Without it, as many as no source is too small for.
- "temperature": within a source a language's share is proportional to size^T (1: as the files, 0: equal).
- Caps make a smaller corpus of the files, on which "total" and "epochs" count: "cap_dataset" of each dataset
  (Data Provenance: 20,000), "cap_dataset_language" of each language of each dataset (Aya 23, arXiv
  2405.15032: 3,000 of what is translated), "cap_language" of each language over all sources.
- "epochs": how often a row may come in one pass over the mixture, on average over a source: 1, unless the
  spec says more. A source that has too few rows is refused.
- "template_weights": how likely rows are whose "template_id", or else whose "task_type", it names, beside
  all other rows, which count 1. 0 leaves them out.
- "columns": {our key: the file's}, as --columns.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from .command import WHOLE, describe, in_range, shortened
from .files import dumps, read_json, refuse_pipe
from .languages import SPELLINGS, language_code
from .mixture_draw import EPOCHS
from .rows_keys import check_columns

COUNT = (int, "[1, 1000000000000]")
WEIGHT = "[0, 1000000000]"
# {key: (kind, interval) of a number, or the type of another value}
OF_SPEC = {"seed": (int, WHOLE), "total": COUNT, "temperature": (float, "[0, 10]"), "cap_language": COUNT,
           "languages": list, "sources": dict}
OF_SOURCE = {"files": list, "weight": (float, WEIGHT), "cap_dataset": COUNT,
             "cap_dataset_language": COUNT, "epochs": (float, EPOCHS), "columns": dict,
             "template_weights": dict}
REMEDY = "give the spec of a mixture, as aya_min/mixture_spec.py describes it"


@dataclass(frozen=True)
class Source:
    name: str
    files: tuple                                    # of Path
    weight: float
    cap_dataset: Optional[int] = None
    cap_dataset_language: Optional[int] = None
    epochs: float = 1.0
    columns: Optional[dict] = None
    template_weights: Optional[dict] = None


@dataclass(frozen=True)
class Spec:
    path: Path
    sources: tuple                                  # of Source, those of weight 0 left out
    seed: int = 0
    total: Optional[int] = None
    temperature: float = 1.0
    cap_language: Optional[int] = None
    languages: Optional[tuple] = None               # codes; None takes all


def is_spec(path):
    """Whether a path is a spec: a .json file, unless its first line is a whole row of JSONL."""
    if not (str(path).endswith(".json") and Path(path).is_file()):
        return False
    with open(path, "rb") as file:
        first = file.readline(1 << 24)
    try:
        value = json.loads(first)
    except ValueError:
        return True
    return isinstance(value, dict) and "sources" in value


def read_spec(path):
    """The Spec in a JSON file. ValueError, in one line with the file and the key, for all that is wrong."""
    path = Path(path)
    value = read_json(path, REMEDY)
    check_values(value, OF_SPEC, str(path))
    if not value.get("sources"):
        raise ValueError(f"{path}: no sources; {REMEDY}")
    sources = [read_source(name, about, path) for name, about in value["sources"].items()]
    if not any(source.weight for source in sources):
        raise ValueError(f"{path}: the weights of all sources are 0; give one of them a weight above 0")
    files = [file.resolve() for source in sources for file in source.files]
    if twice := next((file for file in files if files.count(file) > 1), None):
        raise ValueError(f"{path}: the file {twice} is given twice, and its rows would be; give it once")
    more = {key: value[key] for key in ("seed", "total", "temperature", "cap_language") if key in value}
    used = tuple(source for source in sources if source.weight)
    return Spec(path, used, languages=codes_of(value.get("languages"), path), **more)


def read_source(name, about, path):
    place = f"{path}: source {name!r}"
    if not isinstance(about, dict):
        raise ValueError(f"{place} must be an object with files and weight, got {shortened(about)}")
    check_values(about, OF_SOURCE, place)
    for key in ("files", "weight"):
        if key not in about:
            raise ValueError(f"{place} has no {key!r}; {REMEDY}")
    names = about["files"]
    if not names or not all(isinstance(each, str) and each for each in names):
        raise ValueError(f"{place}: files must be a list of one or more file names, got {shortened(names)}")
    files = tuple(path.parent / each for each in names)
    for file in files:
        refuse_pipe(file)
        if not file.is_file():
            raise ValueError(f"{place}: {file} does not exist; file names are relative to the spec's folder")
    try:
        check_columns(about.get("columns"))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    check_weights(about.get("template_weights"), f"{place}: template_weights")
    return Source(name, files, **{key: about[key] for key in about if key != "files"})


def check_values(value, known, place):
    """ValueError unless each key of the object is known and its value of the right type, in its range."""
    if unknown := sorted(value.keys() - known.keys()):
        raise ValueError(f"{place}: unknown key {unknown[0]!r}; known: {' '.join(known)}")
    for key, found in value.items():
        right = known[key]
        if isinstance(right, tuple):
            check_number(found, *right, f"{place}: {key}")
        elif not isinstance(found, right):
            what = "an object" if right is dict else "a list"
            raise ValueError(f"{place}: {key} must be {what}, got {shortened(found)}")
    for ours, theirs in (value.get("columns") or {}).items():
        if not isinstance(theirs, str):
            raise ValueError(f"{place}: columns: {ours!r} must be the name of a key, got {shortened(theirs)}")


def check_number(found, kind, interval, place):
    fits = type(found) is kind or kind is float and type(found) is int
    if not fits or not in_range(found, interval):
        raise ValueError(f"{place} must be {describe(kind, interval)}, got {shortened(found)}")


def check_weights(weights, place):
    for name, weight in (weights or {}).items():
        check_number(weight, float, WEIGHT, f"{place}: {name!r}")


def codes_of(names, path):
    """The codes of "languages", or None. ValueError for an unknown language, and for one named twice."""
    if names is None:
        return None
    codes = []
    for name in names:
        code = "other" if name == "other" else language_code(name) if isinstance(name, str) else None
        if code is None:
            raise ValueError(f"{path}: unknown language {shortened(name)}; {SPELLINGS}")
        if code in codes:
            raise ValueError(f"{path}: languages: {name!r} is given twice; give it once")
        codes.append(code)
    if not codes:
        raise ValueError(f"{path}: languages is empty; name some, or leave the key out")
    return tuple(codes)


def text_of_spec(spec):
    """What the draw depends on besides the files' contents, as a text for digests."""
    sources = [{**vars(source), "files": [file.name for file in source.files]} for source in spec.sources]
    about = {**vars(spec), "path": "", "sources": sources}
    return dumps(about, sort_keys=True)
