"""Domains that dense experts of a mixture are trained on: clusters of languages and, apart from them, task
families of the embedded world, and source code as a domain that is real and new.

Rows of a cluster or task family are questions of a split with their right answers. The shared languages are
in no cluster's domain. Rows of code are {"text"}: whole lines of Python's own standard library, as it lies
beside the Python that runs, without its tests. Its docstrings and comments are kept, so that some of it is
English prose. Which text it is depends on the version of Python. A file belongs to one split, by its name.
"""

import random
import sysconfig
from functools import cache
from pathlib import Path

from .languages import CLUSTERS
from .world import TASKS, gold_answer, questions, split_named

CODE = "code"
PIECE = 120                     # characters of a row of code, at most


def rows_of(domain, split, count, seed, level):
    """`count` seeded rows of a domain: a name of languages.CLUSTERS, of world.TASKS, or CODE."""
    if domain == CODE:
        pieces = code_pieces(split)
        drawn = random.Random(f"{CODE}/{split}/{seed}").sample(range(len(pieces)), len(pieces))
        names_and_texts = [pieces[drawn[i % len(pieces)]] for i in range(count)]
        return [{"text": text, "question_id": name} for name, text in names_and_texts]
    tag = f"{domain}/{seed}"
    if domain in CLUSTERS:
        asked = questions(split, count, tag, tuple(CLUSTERS[domain]), level)
    else:
        # Languages and tasks take turns, so that each of the world's tasks has its share of the questions.
        asked = [q for q in questions(split, count * len(TASKS), tag, level=level) if q["task"] == domain]
    return [{**q, "completion": gold_answer(q)} for q in asked[:count]]


def as_texts(rows):
    """Questions and their answers as {"text"}, so that all of their tokens are trained on."""
    return [row if "text" in row else
            {"text": f"{row['prompt']} {row['completion']}", "language": row["language"],
             "question_id": row["question_id"]} for row in rows]


@cache
def code_pieces(split):
    """[(name, text), ...] of all code of a split: each file cut into pieces of whole lines of at most PIECE
    characters. Longer lines and blank pieces are left out. name: "file.py:first line"."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(library.glob("*.py")) if split_named(path.name) == split]
    return [piece for path in files for piece in cut(path.name, path.read_text(encoding="utf-8"))]


def cut(name, text):
    """[("name:first line", piece), ...] of a file's text."""
    pieces, begin, piece = [], 1, ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if len(piece) + len(line) > PIECE:
            pieces.append((f"{name}:{begin}", piece))
            begin, piece = number, ""
        piece += line if len(line) <= PIECE else ""
    return [(name, piece) for name, piece in [*pieces, (f"{name}:{begin}", piece)] if piece.strip()]
