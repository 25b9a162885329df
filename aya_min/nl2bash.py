"""The pairs of English and Bash in results/data/nl2bash.jsonl: how they were kept, and how they are read.

They are of NL2Bash (MIT; github.com/TellinaTool/nl2bash, commit 466c5fe873ab08c7cc0112ea1521cc6ad9c20992,
data/bash/all.nl and all.cm), whose licence stands beside them. The rule: line by line, white space around
both sides is removed; a pair is kept if both sides are printable ASCII of 1 to LONGEST characters, and if it
did not come before; of these NUM are drawn with seed 0, in their order.

    python -m aya_min.nl2bash all.nl all.cm NEW_FILE
"""

import random
from pathlib import Path

from .command import Parser, guarded
from .files import jsonl, parse_json, read_bytes, write_new
from .world import split_named

FILE = Path(__file__).parent.parent / "results" / "data" / "nl2bash.jsonl"
LONGEST, NUM = 120, 3000


def kept(sentences, commands, num=NUM):
    """[{"prompt", "completion"}] of lines, by the rule above."""
    if len(sentences) != len(commands):
        raise ValueError(f"{len(sentences)} sentences and {len(commands)} commands; give files of equally "
                         "many lines")
    pairs = dict.fromkeys((e.strip(), f.strip()) for e, f in zip(sentences, commands))
    fits = lambda text: 0 < len(text) <= LONGEST and text.isascii() and text.isprintable()
    pairs = [pair for pair in pairs if all(map(fits, pair))]
    order = sorted(random.Random(0).sample(range(len(pairs)), min(num, len(pairs))))
    return [dict(zip(("prompt", "completion"), pairs[i])) for i in order]


def rows(split):
    """The pairs of one split of the world's, with "question_id". A command is in one split with all its
    sentences, and is the question."""
    lines = read_bytes(FILE).splitlines()
    found = [parse_json(line, f"{FILE}:{number}") for number, line in enumerate(lines, 1)]
    return [{**row, "question_id": row["completion"]} for row in found
            if split_named(row["completion"]) == split]


def main(argv=None):
    parser = Parser(prog="python -m aya_min.nl2bash", description="Write the kept pairs to a new file.")
    for name in ("sentences", "commands", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args(argv)
    lines = (read_bytes(path).decode("utf-8").split("\n") for path in (args.sentences, args.commands))
    write_new({args.out: jsonl(kept(*lines))})


if __name__ == "__main__":
    guarded(main, "aya_min.nl2bash")
