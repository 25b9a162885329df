"""Pruning: training data without duplicates, unedited annotations, wrong languages and evaluation prompts.

    python -m aya_min.pruning A.jsonl B.jsonl --out kept.jsonl --removed removed.jsonl --duplicates 0.8

Exact duplicates (of the normalised texts of a row) always go, everything else by a flag, in this order:
length, approvals, edit distance of re-annotations (the Aya dataset kept those of at least 5, arXiv
2402.06619), wrong language, contamination with evaluation prompts, exact and near duplicates. Duplicates are
sought within a language, over all files; the first stays. Rows are of any shape that training reads, and
those that stay are as they were to the byte, but for white space around a line, in their order. --columns
renames keys for the reading of these files and of those of --against; what is written keeps its own.

The removed file holds each other row with "removed_because", "removed_from" (its file and line), "details"
and, for a duplicate or a contaminated row, "duplicate_of", the place of what it repeats.

Near duplicates are sought in the texts of whole rows. Rows that share a long template are slow to compare:
prune before templates are applied.
"""

import argparse
import hashlib
import os
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .command import Parser, guarded, is_spare_rank, number, printable, progress
from .config import Reading, add_flags, settings_from
from .files import check_out, dumps, parse_object, write_new
from .pruning_checks import Prompts, answer_in, edits, too_few_approvals, wrong_language
from .pruning_duplicates import minima, near_duplicates, normalised, shingles
from .rows import texts_in
from .rows_keys import renamed
from .rows_streamed import data_at, streamed

REASONS = ("too short", "too long", "few approvals", "few edits", "wrong language", "contaminated",
           "duplicate", "near duplicate", "small language")


class Removal(NamedTuple):
    reason: str             # one of REASONS
    details: str = ""
    place: str = ""         # of what the row repeats


class Place(NamedTuple):
    file: int
    line: int
    begin: int              # the byte at which the line begins


# ---- one row -----------------------------------------------------------------------------------------------

class Checks:
    """What is asked of a row by itself. args: as `main` parses them."""

    def __init__(self, args):
        self.args, self.prompts = args, Prompts(args.against or (), args.columns)
        self.unjudged, self.edited = Counter(), 0

    def removal(self, row, texts, where):
        """The Removal of a row, or None. texts: those of the row."""
        args, size = self.args, sum(map(len, texts))
        if args.min_length and size < args.min_length:
            return Removal("too short", f"{size} characters")
        if args.max_length and size > args.max_length:
            return Removal("too long", f"{size} characters")
        if args.min_answer and (size := len(answer_in(row, where))) < args.min_answer:
            return Removal("too short", f"an answer of {size} characters")
        if args.approvals and (why := too_few_approvals(row, where, args.approvals)):
            return Removal("few approvals", why)
        if args.edit_distance and (distance := edits(row, where, args.edit_distance)) is not None:
            self.edited += 1
            if distance < args.edit_distance:
                return Removal("few edits", f"edit distance {distance}")
        if args.wrong_language and (why := wrong_language(row, where, self.unjudged)):
            return Removal("wrong language", why)
        if found := self.prompts.seen_in(texts):
            return Removal("contaminated", *found)
        return None


# ---- all rows ----------------------------------------------------------------------------------------------

class Found(NamedTuple):
    places: list            # Place of each row
    languages: list         # code of each row, "other" without one
    removals: dict          # {row: Removal}


def read_and_check(paths, checks, threshold=None):
    """(Found, rows to compare, their signatures): the removals of all but near duplicates.

    Signatures are (rows, HASHES), or empty without a threshold.
    """
    found, firsts, compared, signatures = Found([], [], {}), {}, [], []
    size = sum(os.path.getsize(path) for path in paths)
    bar = progress(total=size, unit="B", unit_scale=True, desc="reading")
    for file, path in enumerate(paths):
        for where, row, data, begin in streamed(path, checks.args.columns):
            bar.update(len(data) + 1)
            i, texts = len(found.places), texts_in(row, where)
            language, text = row.get("language") or "other", "\n".join(texts)
            found.places.append(Place(file, int(where.rpartition(":")[2]), begin))
            found.languages.append(language)
            removal = checks.removal(row, texts, where)
            if removal is None:
                key = hashlib.blake2b(f"{language}\n{normalised(text)}".encode(), digest_size=16).digest()
                first = firsts.setdefault(key, i)
                removal = None if first == i else Removal("duplicate", "", first)
            if removal is not None:
                found.removals[i] = removal
            elif threshold is not None:
                compared.append(i)
                signatures.append(minima(shingles(text)))
    bar.close()
    return found, compared, np.array(signatures)


def compare(paths, found, compared, signatures, threshold, columns=None):
    """Add the removals of near duplicates to found.removals. columns: as in `rows_streamed.streamed`."""
    codes = {code: i for i, code in enumerate(dict.fromkeys(found.languages))}
    groups = np.array([codes[found.languages[i]] for i in compared])
    files = [open(path, "rb") for path in paths]

    @lru_cache(maxsize=4096)
    def shingles_of(i):
        place = found.places[compared[i]]
        where = f"{paths[place.file]}:{place.line}"
        row = renamed(parse_object(data_at(files[place.file], place.begin), where), columns or {}, where)
        return shingles("\n".join(texts_in(row, where)))

    for i, (first, similarity) in near_duplicates(signatures, groups, threshold, shingles_of).items():
        found.removals[compared[i]] = Removal("near duplicate", f"Jaccard {similarity:.3f}", compared[first])
    for file in files:
        file.close()


def name_places(paths, found):
    """Give the removals of duplicates the place of the row that stays, in place of its number."""
    for i, removal in found.removals.items():
        first = found.removals.get(removal.place)
        if removal.reason == "duplicate" and first is not None:     # its first went as a near duplicate
            removal = first
        if type(removal.place) is int:
            place = found.places[removal.place]
            removal = removal._replace(place=f"{paths[place.file]}:{place.line}")
        found.removals[i] = removal


def drop_small_languages(found, least):
    """Remove what is left of languages of which fewer than `least` rows stay."""
    left = Counter(code for i, code in enumerate(found.languages) if i not in found.removals)
    for i, code in enumerate(found.languages):
        if i not in found.removals and left[code] < least:
            found.removals[i] = Removal("small language", f"{left[code]} rows")


# ---- what is written and printed ---------------------------------------------------------------------------

def kept_lines(paths, found):
    """Yield the lines that stay."""
    for i, (_, data) in enumerate(lines_of(paths, found)):
        if i not in found.removals:
            yield data.decode("utf-8") + "\n"


def removed_lines(paths, found):
    """Yield the lines of the removed file."""
    for i, (where, data) in enumerate(lines_of(paths, found)):
        if i in found.removals:
            reason, details, place = found.removals[i]
            row = parse_object(data, where)
            about = {"removed_because": reason, "removed_from": where, "details": details,
                     "duplicate_of": place}
            if twice := row.keys() & about.keys():
                raise ValueError(f"{where}: the row has a key {min(twice)!r} already; rename it")
            yield dumps(row | {key: value for key, value in about.items() if value}) + "\n"


def lines_of(paths, found):
    """Yield (where, bytes) of all rows."""
    file, opened = None, None
    for place in found.places:
        if place.file != opened:
            if file:
                file.close()
            file, opened = open(paths[place.file], "rb"), place.file
        yield f"{paths[place.file]}:{place.line}", data_at(file, place.begin)
    file.close()


def table(found):
    """Text lines: rows, what stayed and what went and why, by language."""
    rows = Counter(found.languages)
    went = {code: Counter() for code in rows}
    for i, removal in found.removals.items():
        went[found.languages[i]][removal.reason] += 1
    shown = [reason for reason in REASONS if any(some[reason] for some in went.values())]
    width = max(8, *map(len, rows))
    lines = ["".join([f"{'language':<{width}}{'rows':>9}{'kept':>9}"] + [f"{name:>16}" for name in shown])]
    for code, count in sorted(rows.items(), key=lambda item: (-item[1], item[0])) + [("all", None)]:
        some = sum(went.values(), Counter()) if code == "all" else went[code]
        count = rows.total() if code == "all" else count
        lines.append(f"{code:<{width}}{count:9}{count - some.total():9}"
                     + "".join(f"{some[name]:16}" for name in shown))
    return lines


def main(argv=None):
    parser = Parser(prog="python -m aya_min.pruning", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add, whole = parser.add_argument, number(int, "[1, inf)")
    add("files", nargs="+", metavar="FILE.jsonl", help="JSONL files of any shape that training reads")
    add("--out", required=True, help="JSONL file for what stays; must not exist")
    add("--removed", required=True, help="JSONL file for what goes; must not exist")
    add("--duplicates", type=number(float, "[0.5, 1]"), metavar="S",
        help="remove texts whose shingles have at least this Jaccard similarity to an earlier one's, say 0.8")
    add("--edit-distance", type=whole, metavar="N",
        help="remove re-annotations that are fewer than N edits (characters) from original_inputs and "
             "original_targets; the paper: 5")
    add("--min-length", type=whole, metavar="N", help="remove rows of fewer characters, prompt and answer")
    add("--min-answer", type=whole, metavar="N",
        help="remove rows whose answer (the chosen one of a pair, or the text) has fewer characters")
    add("--max-length", type=whole, metavar="N", help="remove rows of more characters, prompt and answer")
    add("--wrong-language", action="store_true", help="remove rows whose answer is in another language")
    add("--approvals", type=whole, metavar="N", help="remove rows whose 'approvals' are fewer")
    add("--against", nargs="+", metavar="EVAL.jsonl", help="remove rows that contain these files' prompts")
    add("--least-rows", type=whole, metavar="N",
        help="remove languages of which fewer rows stay; the paper: 50")
    add_flags(parser, Reading, only=("columns",))
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    args.columns = settings_from(Reading, flags=vars(args)).columns
    check_paths(args)
    begin, checks = time.monotonic(), Checks(args)
    found, compared, signatures = read_and_check(args.files, checks, args.duplicates)
    if args.edit_distance and not checks.edited:
        raise ValueError("--edit-distance: no row has original_inputs or original_targets to compare with; "
                         "leave it out")
    if compared:
        compare(args.files, found, compared, signatures, args.duplicates, args.columns)
    name_places(args.files, found)
    if args.least_rows:
        drop_small_languages(found, args.least_rows)
    write_new({args.out: kept_lines(args.files, found), args.removed: removed_lines(args.files, found)})
    seconds = time.monotonic() - begin
    for line in table(found):
        print(printable(line))
    if checks.unjudged:
        print("language not judged:", ", ".join(f"{why} {n}" for why, n in sorted(checks.unjudged.items())))
    print(f"{len(found.places)} rows in {seconds:.1f} s, {len(found.places) / seconds:.0f} rows/s")


def check_paths(args):
    """Refuse outputs that exist or are one file, and a file that is given twice."""
    outputs = [Path(args.out), Path(args.removed)]
    for path in outputs:
        check_out(path)
    if outputs[0].resolve() == outputs[1].resolve():
        raise ValueError("--out and --removed are one file; give two")
    if len({Path(path).resolve() for path in args.files}) < len(args.files):
        raise ValueError("a file is given twice, and its rows would all be duplicates; give each file once")
    if args.min_length and args.max_length and args.min_length > args.max_length:
        raise ValueError(f"--min-length {args.min_length} is above --max-length {args.max_length}")


if __name__ == "__main__":
    guarded(main, "aya_min.pruning")
