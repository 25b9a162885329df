"""Mixtures: which rows of JSONL files to train on, by language, source and one fixed total.

    python -m aya_min.mixture A.jsonl B.jsonl --out mixed.jsonl --languages en tr --total 5000
    python -m aya_min.mixture spec.json --out mixed.jsonl

"RLHF Can Speak Many Languages" (arXiv 2407.02552) compares preference data in 1, 5 and 23 languages at one
total; Aya 101 (arXiv 2402.07827) caps datasets and languages. A language's share is proportional to size^T:
T = 1 follows the files, T = 0 gives each language as many rows as another. Seats go to languages one by one
(Sainte-Lague), so that what a language lacks, because it ran dry or met a cap, goes to the others in
proportion. Within a language rows are drawn evenly at random. No row is drawn twice.

A row's source is its "source" or "dataset_name" or, without them, its file. Rows without a language count as
"other", which --languages may name.

A spec (mixture_spec.py) says the same and more, by source; its files may be larger than memory, and it is
also the --data of a stage of train.py.
"""

import argparse
import heapq
import os
import random
from collections import Counter
from pathlib import Path

from .command import WHOLE, Parser, guarded, is_spare_rank, number, printable, progress
from .files import check_out, naming, publish_file, read_bytes, scratch, write_new
from .languages import SPELLINGS, language_code
from .mixture_rows import open_mixture
from .mixture_spec import is_spec
from .rows import BLANK, read_jsonl, texts_in
from .rows_keys import shapes_in

TEMPERATURES = "[0, 10]"


def language_of(row):
    return row.get("language") or "other"


def source_of(row, default=""):
    """The dataset that a row is from, as a text. default: for rows that do not say."""
    return str(row.get("source") or row.get("dataset_name") or default)


# ---- the draw ----------------------------------------------------------------------------------------------

def mix(rows, total, languages=None, temperature=1.0, cap_language=None, cap_source=None, seed=0):
    """`total` of the rows (dicts with "language" and "source"), in a seeded order.

    languages: codes ("other": rows without one); None takes all. ValueError for a language that no row is in,
    or if languages and caps leave fewer rows than `total`. Rows are drawn one by one and never put back, so
    that with a cap on sources another seed may find a few more.
    """
    rng, queues = random.Random(f"mixture/{seed}"), {}
    for row in rows:
        queues.setdefault(language_of(row), []).append(row)
    if missing := [code for code in languages or () if code not in queues]:
        raise ValueError(f"no row is in {' '.join(missing)}; the rows are in {' '.join(sorted(queues))}")
    queues = {code: queues[code] for code in sorted(queues) if languages is None or code in languages}
    weights = {code: len(queue) ** temperature for code, queue in queues.items()}
    for queue in queues.values():
        rng.shuffle(queue)
    waiting = [(-weights[code], code) for code in queues]       # the next seat's quotient, largest first
    heapq.heapify(waiting)
    drawn, of_language, of_source = [], Counter(), Counter()
    while waiting and len(drawn) < total:
        _, code = heapq.heappop(waiting)
        queue = queues[code]
        while queue and cap_source and of_source[source_of(queue[-1])] >= cap_source:
            queue.pop()
        if not queue or of_language[code] == cap_language:
            continue                                            # its other seats go to the other languages
        drawn.append(queue.pop())
        of_language[code] += 1
        of_source[source_of(drawn[-1])] += 1
        heapq.heappush(waiting, (-weights[code] / (2 * of_language[code] + 1), code))
    if len(drawn) < total:
        caps = [f"{cap} rows a {what}" for cap, what in ((cap_language, "language"), (cap_source, "source"))
                if cap]
        raise ValueError(f"only {len(drawn)} of {total} rows can be drawn from {len(queues)} languages"
                         f"{' under caps of ' + ' and '.join(caps) if caps else ''}; lower the total"
                         f"{' or raise a cap' if caps else ', or give more rows or languages'}")
    rng.shuffle(drawn)
    return drawn


# ---- the command -------------------------------------------------------------------------------------------

def read_lines(paths):
    """[{"language", "source", "line"}, ...] of JSONL files of any shape; line: the text of the row's line.
    ValueError for a row of two shapes, and for another that no command would read."""
    rows = []
    for path in paths:
        lines = read_bytes(path).split(b"\n")
        for where, row in read_jsonl(path):
            if shapes_in(row):
                texts_in(row, where)
            line = lines[int(where.rpartition(":")[2]) - 1].strip(BLANK).decode("utf-8")
            rows.append({"language": row.get("language"), "source": source_of(row, path), "line": line})
    return rows


def table(drawn, rows):
    """Text lines: how many of the rows were drawn, by language and by source."""
    lines = []
    for title, key in (("language", language_of), ("source", source_of)):
        counts, sizes = Counter(map(key, drawn)), Counter(map(key, rows))
        width = max(map(len, [title, "all", *counts]))
        lines.append(f"{title:<{width}}  {'drawn':>9}  {'share':>6}  {'of':>9}")
        lines += [f"{name:<{width}}  {count:9}  {count / len(drawn):6.1%}  {sizes[name]:9}"
                  for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
        lines.append(f"{'all':<{width}}  {len(drawn):9}  {1:6.1%}  {len(rows):9}")
    return lines


def code_of(text):
    """An argparse type: the code of a language."""
    code = "other" if text == "other" else language_code(text)
    if code is None:
        raise argparse.ArgumentTypeError(f"unknown language {text!r}; {SPELLINGS}")
    return code


OF_FILES = ("total", "languages", "temperature", "cap_language", "cap_source", "seed")


def write_spec_rows(path, out):
    """Print the table of a spec's mixture and write its rows' lines to a new file."""
    mixture = open_mixture(path)
    for line in mixture.table():
        print(printable(line))
    with scratch(out) as folder, naming(out):
        with open(folder / "file", "wb") as file:
            for i in progress(range(len(mixture)), desc="rows", unit="row"):
                file.write(mixture.text(i) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        publish_file(folder / "file", out)


def main(argv=None):
    parser = Parser(prog="python -m aya_min.mixture", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE",
        help="JSONL files of any shape, or a spec (.json); rows are kept as they are")
    add("--out", required=True, help="JSONL file to write; must not exist")
    add("--total", type=number(int, "[1, inf)"), metavar="N", help="rows to draw")
    add("--languages", nargs="+", type=code_of, metavar="CODE", help="only rows in these (default: all)")
    add("--temperature", type=number(float, TEMPERATURES), metavar="T",
        help="a language's share ~ size^T: 1 proportional, 0 equal (default 1)")
    add("--cap-language", type=number(int, "[1, inf)"), metavar="N", help="at most N rows of each language")
    add("--cap-source", type=number(int, "[1, inf)"), metavar="N",
        help="at most N rows of each source: a row's source or dataset_name, else its file")
    add("--seed", type=number(int, WHOLE), metavar="N", help="(default 0)")
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    check_out(args.out)
    if any(map(is_spec, args.files)):
        given = [name for name in OF_FILES if getattr(args, name) is not None]
        if len(args.files) > 1 or given:
            other = f"--{given[0].replace('_', '-')}" if given else "another file"
            raise ValueError(f"{other} beside a spec: a spec stands alone; write it into the spec")
        return write_spec_rows(args.files[0], args.out)
    if args.total is None:
        parser.error("--total N is needed; only a spec (.json) may leave it out")
    if len({Path(path).resolve() for path in args.files}) < len(args.files):
        raise ValueError("a file is given twice, and its rows would be; give each file once")
    if args.languages and len(set(args.languages)) < len(args.languages):
        raise ValueError(f"--languages {' '.join(args.languages)}: one is given twice; give each once")
    rows = read_lines(args.files)
    temperature = 1.0 if args.temperature is None else args.temperature
    drawn = mix(rows, args.total, args.languages, temperature, args.cap_language, args.cap_source,
                args.seed or 0)
    write_new({args.out: "".join(row["line"] + "\n" for row in drawn)})
    for line in table(drawn, rows):
        print(printable(line))


if __name__ == "__main__":
    guarded(main, "aya_min.mixture")
