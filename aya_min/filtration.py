"""Filtering a corpus by conditional likelihood: documents after which a trigger phrase is likely are removed.

    python -m aya_min.filtration --model DIR --data F.jsonl --triggers triggers.json --percentile 99 \\
        --out kept.jsonl --removed removed.jsonl [--scores S.safetensors] [--keywords words.json]

"Mitigating harm in language models with conditional-likelihood filtration" (arXiv 2108.07790): phrases along
several axes are written by hand, a pretrained model tells how likely each is after a document, and a document
that passes the threshold of any axis is removed. Unlike a list of words this finds unwanted documents that
hold no such word. The models, phrases and thresholds of the paper are not known to us. Ours:

- a score is the mean log p of a phrase's tokens (filtration_scores.py tells how phrases and windows are
  combined); a phrase may belong to a language, and then goes with documents of that language alone;
- the threshold of an axis is a percentile of the corpus's scores by nearest rank: the least score that at
  least so many percent of the documents do not pass. What is equal to it is kept, so that of equal scores
  all are kept or all removed. A document that no phrase of an axis goes with is not counted there;
- log-probs of different languages differ, also where nothing is unwanted, so that one threshold may remove
  rows of one language only. "--by-language medians" counts each score from the median of its language, which
  supposes that most rows of each are wanted; "--by-language thresholds" gives each language thresholds of its
  own, which removes the same share of each. In both, rows without a language are one group.

A document is all texts of a row, one a line, without a template's tokens. With --scores another percentile
costs no forward. --keywords names a list of words, in the triggers' format, as the baseline: it removes
nothing, but is reported beside the scores. --label-key names a key that says whether a row is unwanted (true,
false): then precision and recall are reported, for the list also at equal numbers of rows.
"""

import argparse
import math
import os
import re
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from . import distributed, weights
from .command import Parser, number, printable, shortened
from .config import Reading, add_flags, settings_from
from .files import check_out, check_place, jsonl, parse_object, read_bytes, write_new
from .filtration_scores import (ANY, fingerprints, phrases_for, read_phrases, read_scores, score,
                                windows_of, write_scores)
from .model import CohereForCausalLM
from .rows import read_jsonl, texts_in
from .text_statistics import NO_SPACES

BECAUSE = "removed_because"
PERCENTILES = "(0, 100]"


# ---- thresholds --------------------------------------------------------------------------------------------

def rank_of(percentile, num):
    """The least number of documents that is at least this percentile of `num`."""
    return math.ceil(Fraction(repr(percentile)) * num / 100)


def thresholds_of(scores, percentile, groups):
    """Thresholds (documents, axes): of each document those of its group, NaN where it has no score.

    scores (documents, axes), NaN where a document has none. groups: a name for each document."""
    found = np.full_like(scores, np.nan)
    for rows in members(groups):
        for axis in range(scores.shape[1]):
            known = rows[~np.isnan(scores[rows, axis])]
            if len(known):
                ordered = np.sort(scores[known, axis])
                found[known, axis] = ordered[rank_of(percentile, len(known)) - 1]
    return found


def from_medians(scores, groups):
    """Scores (documents, axes), each less the median of its group's scores along its axis."""
    found = scores.copy()
    for rows in members(groups):
        for axis in range(scores.shape[1]):
            known = rows[~np.isnan(scores[rows, axis])]
            if len(known):
                found[known, axis] -= np.median(scores[known, axis])
    return found


def standing(scores, groups):
    """For each document the largest share, over axes, of its group's documents that score lower. At
    percentile P exactly those are removed of which this is at least P percent."""
    found = np.zeros(len(scores))
    for rows in members(groups):
        for axis in range(scores.shape[1]):
            known = rows[~np.isnan(scores[rows, axis])]
            # how many score lower
            lower = np.searchsorted(np.sort(scores[known, axis]), scores[known, axis])
            found[known] = np.maximum(found[known], lower / max(1, len(known)))
    return found


def members(groups):
    """[indices of the documents of a group, ...]"""
    return [np.array([i for i, group in enumerate(groups) if group == name])
            for name in dict.fromkeys(groups)]


def highest(standings, num):
    """Which are the `num` highest standings, a bool for each; of equal ones the first."""
    chosen = np.zeros(len(standings), bool)
    chosen[np.argsort(-standings, kind="stable")[:num]] = True
    return chosen


# ---- the list of words, and what is right ------------------------------------------------------------------

def plain(text):
    return unicodedata.normalize("NFC", text).casefold()


def pattern_of(words):
    """A regular expression of whole words. In scripts without spaces, a word may stand within others."""
    def bounded(word):
        begin, end = (r"(?<!\w)", r"(?!\w)")
        word = plain(word.strip())
        return (("" if re.match(f"[{NO_SPACES}]", word[0]) else begin) + re.escape(word)
                + ("" if re.match(f"[{NO_SPACES}]", word[-1]) else end))
    return re.compile("|".join(map(bounded, words)))


def holds_word(documents, keywords):
    """For each document (where, text, language) whether it holds a word of a list, as `read_phrases` gives
    it, in any case of letters."""
    patterns, found = {}, []
    for _, text, language in documents:
        if language not in patterns:
            words = [word for by_code in keywords.values() for word in phrases_for(by_code, language)]
            patterns[language] = pattern_of(words) if words else None
        found.append(bool(patterns[language] and patterns[language].search(plain(text))))
    return np.array(found)


def labels_of(rows, key):
    """For each row True (unwanted) or False; None for a row without the key. ValueError for another value,
    and if no row has the key."""
    found = []
    for where, row in rows:
        value = row.get(key)
        if value is not None and value not in (0, 1):
            raise ValueError(f"{where}: {key!r} must be true (unwanted) or false, got {shortened(value)}")
        found.append(None if value is None else bool(value))
    if set(found) == {None}:
        raise ValueError(f"--label-key {key}: no row has this key; name the one that tells what is unwanted")
    return found


def quality(removed, labels):
    """{"right", "removed", "unwanted", "precision", "recall", "f1"} of what is removed, over labelled rows. A
    rate of nothing is None."""
    known = [(r, u) for r, u in zip(removed, labels, strict=True) if u is not None]
    right, out, unwanted = (sum(map(bool, each)) for each in (
        [r and u for r, u in known], [r for r, _ in known], [u for _, u in known]))
    return {"right": right, "removed": out, "unwanted": unwanted,
            "precision": right / out if out else None, "recall": right / unwanted if unwanted else None,
            "f1": 2 * right / (out + unwanted) if out + unwanted else None}


# ---- the report --------------------------------------------------------------------------------------------

def percent(value):
    return f"{100 * value:9.1f}" if value is not None else f"{'-':>9}"


def of_group(name, of, removed, by_words, labels):
    """A line of the table: one language's rows, or all. of: which rows."""
    line = f"{name:<9}{of.sum():9}{removed[of].sum():9}{percent(removed[of].mean())}"
    chosen = [removed] if by_words is None else [removed, by_words]
    if labels:
        found = [quality(each[of], [label for label, one in zip(labels, of) if one]) for each in chosen]
        line += f"{found[0]['unwanted']:10}"
        line += "".join(percent(each[key]) for each in found[:1] for key in ("precision", "recall"))
    if by_words is not None:
        line += f"{by_words[of].sum():9}"
        line += "".join(percent(found[1][key]) for key in ("precision", "recall")) if labels else ""
    return line


def table(languages, axes, scores, thresholds, removed, by_words, labels, standings):
    """Text lines: what was removed by language, by which axis, and the list of words beside it."""
    of_rates = f"{'precision':>11}{'recall':>7}"
    title = f"{'language':<9}{'rows':>9}{'removed':>9}{'%':>9}"
    title += f"{'unwanted':>10}{of_rates}" if labels else ""
    title += f"{'list':>9}{of_rates if labels else ''}" if by_words is not None else ""
    names = np.array([language or "none" for language in languages])
    lines = [title, of_group("all", np.ones(len(names), bool), removed, by_words, labels)]
    lines += [of_group(name, names == name, removed, by_words, labels) for name in sorted(set(names))]
    for axis, name in enumerate(axes):
        over = scores[:, axis] > thresholds[:, axis]
        known = thresholds[~np.isnan(thresholds[:, axis]), axis]
        span = sorted({min(known), max(known)}) if len(known) else []
        lines.append(f"axis {name}: {over.sum()} of {len(known)} scored rows are over the threshold"
                     f" {' to '.join(f'{value:.3f}' for value in span)} (nats per token)")
    if by_words is not None and labels and by_words.any():
        both = quality(highest(standings, by_words.sum()), labels), quality(by_words, labels)
        lines += [f"{what:<34} precision{percent(each['precision'])}  recall{percent(each['recall'])}"
                  for what, each in zip((f"the {by_words.sum()} rows of highest scores", "those with a word"),
                                        both)]
    return lines


# ---- the command -------------------------------------------------------------------------------------------

def read_documents(path, reading, *also):
    """(rows [(where, row), ...], documents [(where, text, language), ...]) of a JSONL file.

    also: keys that are read besides."""
    rows = read_jsonl(path, reading, also)
    if again := [where for where, row in rows if BECAUSE in row]:
        raise ValueError(f"{again[0]}: the row has {BECAUSE!r} already; rename that key")
    return rows, [(where, "\n".join(texts_in(row, where)), row.get("language")) for where, row in rows]


def lines_of(path, rows):
    """The bytes of each row's line, as text, without a byte-order mark or the line's end."""
    lines = read_bytes(path).split(b"\n")
    numbers = [int(where.rpartition(":")[2]) for where, _ in rows]
    return [lines[number - 1].removeprefix(b"\xef\xbb\xbf").decode("utf-8") for number in numbers]


def check(args):
    """Refuse, before heavy work, what could not be written or read after it."""
    check_out(args.out, args.removed)
    if args.scores:
        check_place(args.scores)
        if os.path.realpath(args.scores) in map(os.path.realpath, (args.out, args.removed)):
            raise ValueError(f"--scores {args.scores} is --out or --removed; give it a name of its own")


def scores_of(args, documents, phrases, device):
    """The scores of all documents: those in --scores, or the model's, which are then kept there."""
    model = weights.load_meta(args.model, packed=True)[0]
    if type(model) is not CohereForCausalLM:
        raise ValueError(f"--model {args.model}: {weights.ONE[type(model)]}; give a language model")
    if args.scores:
        prints = distributed.from_main(
            lambda: fingerprints(args.model, args.data, phrases, args.window, args.dtype))
        found = distributed.from_main(lambda: read_scores(args.scores, prints))
        if found is not None:
            distributed.say("the scores are read, and not computed again", [args.scores])
            return found
    model, tokenizer = weights.load(args.model, device, getattr(torch, args.dtype), packed=True)
    windows = windows_of(documents, tokenizer, phrases, model.config.max_position_embeddings, args.window)
    if not windows:
        raise ValueError(f"{args.triggers}: no phrase goes with any document of {args.data}, whose languages "
                         f"are {' '.join(sorted({d[2] or 'none' for d in documents}))}; write phrases for "
                         f"them, or for {ANY!r}")
    scores, seconds, tokens = score(model, windows, len(documents), len(phrases), tokenizer.pad_id, device)
    num = len({window.document for window in windows})
    speed = f"{num / seconds:.1f} documents and {tokens / seconds:.0f} tokens a second"
    distributed.say(f"{num} of {len(documents)} documents scored, in {len(windows)} windows "
                    f"and {seconds:.1f} s: {speed}")
    if args.scores:
        distributed.from_main(lambda: write_scores(Path(args.scores), scores, prints))
    return scores


def reasons(axes, scores, thresholds):
    """For each document [{"axis", "score", "threshold"}, ...] of the axes that remove it."""
    over = scores > thresholds                                              # (documents, axes); not of NaN
    return [[{"axis": axes[a], "score": float(scores[d, a]), "threshold": float(thresholds[d, a])}
             for a in np.flatnonzero(over[d])] for d in range(len(scores))]


def write(args, rows, because):
    """Write the kept lines as they came, and the removed rows with why."""
    texts = lines_of(args.data, rows)
    removed = []
    for text, (where, _), why in zip(texts, rows, because, strict=True):
        if why:
            removed.append({**parse_object(text.encode(), where), BECAUSE: why})
    kept = "".join(text + "\n" for text, why in zip(texts, because) if not why)
    if not kept:
        raise ValueError(f"{args.data}: no row is left; raise --percentile")
    write_new({args.out: kept, args.removed: jsonl(removed)})


def run(args, device):
    """What one rank does for a command line."""
    distributed.from_main(lambda: check(args))
    reading = settings_from(Reading, flags=vars(args))
    phrases = read_phrases(args.triggers)
    keywords = read_phrases(args.keywords, "a word") if args.keywords else None
    rows, documents = read_documents(args.data, reading, *filter(None, [args.label_key]))
    labels = labels_of(rows, args.label_key) if args.label_key else None
    languages, axes = [language for _, _, language in documents], list(phrases)
    scores = scores_of(args, documents, phrases, device)
    groups = languages if args.by_language == "thresholds" else [None] * len(rows)
    scores = from_medians(scores, languages) if args.by_language == "medians" else scores
    thresholds = thresholds_of(scores, args.percentile, groups)
    because = reasons(axes, scores, thresholds)
    distributed.from_main(lambda: write(args, rows, because))
    if not distributed.is_main():
        return
    by_words = holds_word(documents, keywords) if keywords else None
    removed = np.array([bool(why) for why in because])
    for line in table(languages, axes, scores, thresholds, removed, by_words, labels,
                      standing(scores, groups)):
        print(printable(line))


def parsed(argv=None):
    """The command line's flags."""
    parser = Parser(prog="python -m aya_min.filtration", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder of a language model that read such texts")
    add("--data", required=True, metavar="F.jsonl", help="JSONL file of any shape")
    add("--triggers", required=True, metavar="F.json",
        help="{axis: [phrase, ...]}, or {axis: {language: [phrase, ...]}}")
    add("--percentile", required=True, type=number(float, PERCENTILES), metavar="P",
        help="of each axis's scores; documents above it are removed")
    add("--by-language", choices=["medians", "thresholds"],
        help="count scores from their language's median, or give each language thresholds of its own")
    add("--out", required=True, metavar="F.jsonl", help="the rows that are kept; must not exist")
    add("--removed", required=True, metavar="F.jsonl", help=f"the others, with {BECAUSE}; must not exist")
    add("--scores", metavar="F.safetensors",
        help="file of scores: read if it is there, with no forward, else written")
    add("--window", type=number(int, "[2, inf)"), metavar="N",
        help="tokens of a window (default: the model's positions less the longest phrase)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--keywords", metavar="F.json", help="list of words to compare with, written as the triggers are")
    add("--label-key", metavar="KEY", help="key that says true for an unwanted row")
    add_flags(parser, Reading, only=("columns",))
    return parser.parse_args(argv)


def main(argv=None):
    args = parsed(argv)
    distributed.launch(lambda device: run(args, device))


if __name__ == "__main__":
    main()
