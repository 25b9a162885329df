"""Translation contrast: pairs of an answer written in the language and one translated from English.

"RLHF Can Speak Many Languages" (arXiv 2407.02552) trains on such pairs, so that the policy is pushed away
from the marks that translation leaves. Both sides come from files: chosen from --answers, rejected from
--contrast. Nothing checks that the second were translated. `python generate.py --contrast`
"""

from dataclasses import fields

from . import distributed
from .arbitrage import read_answers
from .config import Reading, flag_of
from .data import load_prompts, without_added_keys
from .files import check_out, jsonl, write_new
from .preferences import contrast_pairs, cut_line

# What generate.py writes beside an answer; it is not true of the pair.
OF_ONE_ANSWER = ("num_tokens", "logp", "model", "seed", "sample", "teacher", "scores")


def check(args):
    """ValueError for flags that are missing or go with a model, or an output that cannot be written.

    args: those of generate.py; args.given: the names of the flags that were given.
    """
    if not (args.answers and args.contrast and args.out):
        raise ValueError("give --answers G.jsonl, --contrast translated.jsonl and --out pairs.jsonl together")
    mine = {"answers", "contrast", "out", *(field.name for field in fields(Reading))} - {"too_long"}
    if others := [name for name in args.given if name not in mine]:
        raise ValueError("--contrast takes two files of answers and no model; leave out "
                         f"{flag_of(others[0])}")
    check_out(args.out)


def pairs_of_files(answers, translated, reading):
    """(pairs, counts, a line about cut answers) of two files of answers to the same prompts.

    A pair has the keys of its row in `answers`. Of several answers to a prompt the first is taken. Answers in
    `translated` to other prompts are counted; ValueError if a prompt has none there.
    """
    rows = {}
    for row in load_prompts([answers], reading):
        rows.setdefault((repr(row["prompt_messages"]), row.get("language")), row)
    rows = list(rows.values())
    chosen, rejected = (read_answers(path, rows, reading) for path in (answers, translated))
    kept = [{key: value for key, value in row.items() if key not in OF_ONE_ANSWER}
            for row in map(without_added_keys, rows)]
    pairs, counts = contrast_pairs(kept, chosen, rejected, reading.keep_cut)
    cut = [{**row, "candidates": both} for row, *both in zip(rows, chosen, rejected)]
    return pairs, counts, cut_line(cut)


def write_pairs(answers, translated, out, reading):
    """Write the pairs to `out`. Returns lines of text that count them; ValueError if there is no pair."""
    pairs, counts, cut = pairs_of_files(answers, translated, reading)
    line = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
    if not pairs:
        raise ValueError(f"{translated}: no pair is left ({line}); give answers that differ, or --keep-cut")
    distributed.from_main(lambda: write_new({out: jsonl(pairs)}))
    return [line, cut]
