"""Merge model folders into one, with no training: a weighted average, SLERP, task arithmetic, TIES or DARE.

    python merge.py linear A B C --weights 0.5 0.3 0.2 --out DIR
    python merge.py slerp A B --t 0.3 --out DIR
    python merge.py ties A B C --base BASE --density 0.2 --out DIR

Each method has only the flags that it uses (python merge.py METHOD --help). The methods: aya_min/merging.py; the files: aya_min/soups.py.
"""

import argparse
import sys

from aya_min.soups import METHODS, OUTPUT_DTYPES, merge_folders

FLAGS = {    # setting: its flag
    "base": ("--base", {"metavar": "DIR", "required": True, "help": "the model that the others were trained from"}),
    "weights": ("--weights", {"type": float, "nargs": "+", "metavar": "W", "help": "one for each model, in order; default: all 1"}),
    "t": ("--t", {"type": float, "help": "0 is the first model, 1 the second; default: %(default)s"}),
    "density": ("--density", {"type": float, "help": "the share of each task vector to keep, above 0 and at most 1; default: %(default)s"}),
    "lam": ("--lambda", {"type": float, "metavar": "L", "help": "scale of the merged task vector; default: %(default)s"}),
    "seed": ("--seed", {"type": int, "help": "of the random drops; default: %(default)s"}),
}
SUMMARIES = {"linear": "weighted average, the weights divided by their sum (what Aya Expanse uses)",
             "slerp": "spherical interpolation of two models",
             "task-arithmetic": "base + lambda * weighted sum of task vectors",
             "ties": "trim, elect a sign, average those that agree",
             "dare-linear": "random drop and rescale, then task-arithmetic",
             "dare-ties": "random drop and rescale, then elect a sign, average those that agree"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")        # one line, without the usage


def parse(arguments):
    parser = Parser(prog="merge.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    methods = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    for method, settings in METHODS.items():
        command = methods.add_parser(method, help=SUMMARIES[method], description=SUMMARIES[method], allow_abbrev=False)
        command.add_argument("folders", nargs="+", metavar="MODEL", help="model folders: config.json and model.safetensors or shards")
        command.add_argument("--out", required=True, metavar="DIR", help="the new folder; it must not exist")
        command.add_argument("--dtype", choices=OUTPUT_DTYPES, help="of the output; default: that of the first model")
        for setting, default in settings.items():
            flag, options = FLAGS[setting]
            command.add_argument(flag, dest=setting, default=default, **options)
    return parser.parse_args(arguments)


def main(arguments=None):
    options = vars(parse(arguments))
    try:
        out = merge_folders(**options)
    except (ValueError, OSError) as error:
        print(f"merge.py: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {options['method']} of {len(options['folders'])} models")
    return 0


if __name__ == "__main__":
    sys.exit(main())
