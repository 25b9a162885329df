"""Merge model folders into one, with no training; or see how far two are apart.

    python merge.py linear A B C --weights 0.5 0.3 0.2 --out DIR
    python merge.py slerp A B --t 0.3 --out DIR
    python merge.py ties A B C --base BASE --density 0.2 --out DIR
    python merge.py --config merge.json --out DIR               mergekit's configuration, as JSON
    python merge.py diff A B --base BASE
    python merge.py search A B C D --prompts F.jsonl --out DIR  the weights of linear, searched by CMA-ES

Each method has only the flags that it uses (python merge.py METHOD --help). The methods: aya_min/merge_methods.py; the files: aya_min/merge_folders.py; the search: aya_min/merge_search.py.
"""

import argparse
import gc
import json
import sys
from dataclasses import fields
from pathlib import Path

from aya_min.command import WHOLE, Parser, guarded, is_spare_rank, number, printable
from aya_min.config import Reading, add_flags
from aya_min.files import Digests, read_json
from aya_min.merge_config import METHODS, OUTPUT_DTYPES, RANGES, check_settings, from_config, to_config

FLAGS = {    # setting: what its flag takes; names and ranges of those that are numbers are RANGES
    "base": {"metavar": "DIR", "required": True, "help": "the model that the others were trained from"},
    "weights": {"nargs": "+", "metavar": "W", "help": "one for each model, in order; default: all 1"},
    "normalize": {"action": argparse.BooleanOptionalAction,
                  "help": "divide by the sum of the weights; default: %(default)s"},
    "t": {"nargs": "+", "help": "0 is the first model, 1 the second; several: a gradient over the layers; "
                                "default: %(default)s"},
    "density": {"nargs": "+", "metavar": "D",
                "help": "the share of each task vector to keep, above 0 and at most 1: one, or one for each "
                        "model; default: %(default)s"},
    "lam": {"metavar": "L", "help": "scale of the merged task vector; default: %(default)s"},
    "seed": {"help": "of the random drops; default: %(default)s"},
    "convention": {"choices": ["paper", "mergekit"],
                   "help": "where they differ, see aya_min/merge_methods.py; default: %(default)s"},
}
SUMMARIES = {"linear": "weighted average, the weights divided by their sum (what Aya Expanse uses)",
             "slerp": "spherical interpolation of two models",
             "task-arithmetic": "base + lambda * weighted sum of task vectors",
             "model-stock": "from the base towards the average, by the angle between the task vectors",
             "ties": "trim, elect a sign, average those that agree",
             "dare-linear": "random drop and rescale, then task-arithmetic",
             "dare-ties": "random drop and rescale, then elect a sign, average those that agree"}

DIFF = """Rows for each tensor, each kind of tensor over the layers, each layer, and all together.

distance: |b - a| / |a|; cosine: of a and b. With a base, of the task vectors a - base and b - base: task cosine, and same sign, the share
of the parameters moved by both that were moved to the same side. - where a length is 0.
"""


SEARCH = """The weights of a linear merge by CMA-ES (arXiv 2412.04144), beside the best single model, the uniform soup and the greedy soup, on data that the search did not see.

Measured, one of: the embedded world's oracle on greedy answers (--prompts), a held-out loss (--eval-data), any command (--command). The same command goes on where a killed one stopped."""
SEARCH_FLAGS = {
    "--prompts": {"nargs": "+", "metavar": "F.jsonl", "help": "questions of the embedded world (python -m aya_min.world)"},
    "--eval-data": {"nargs": "+", "metavar": "F.jsonl", "help": "examples; the tasks are the files, or the languages of a single one"},
    "--command": {"metavar": "'CMD {model}'", "help": "its last line is a JSON object {task: number, the higher the better}; {split}: fitness or held-out"},
    "--held-out": {"nargs": "+", "metavar": "F.jsonl", "help": "data that the search does not see; default: half of the data, by --seed"},
    "--by": {"nargs": "+", "choices": ["task", "language", "cluster"], "default": ["task"], "help": "--prompts: what a task is; several: each combination; default: task"},
    "--max-new-tokens": {"type": number(int, "[1, inf)"), "metavar": "N", "default": 32,
                         "help": "--prompts: of an answer; default: %(default)s"},
    "--max-length": {"type": number(int, "[2, inf)"), "metavar": "N", "default": 1024,
                     "help": "--eval-data: tokens of an example; default: %(default)s"},
    "--evaluations": {"type": number(int, "[1, inf)"), "metavar": "N", "default": 200,
                      "help": "points that CMA-ES tries, in whole generations; the baselines come on top; "
                              "default: %(default)s"},
    "--seed": {"type": number(int, WHOLE), "metavar": "N", "default": 0},
    "--allow-negative": {"action": "store_true", "help": "weights of any sign whose sum is 1; without it they are above 0"},
    "--leave-one-out": {"action": "store_true", "help": "measure the result without each model, too"},
    "--dtype": {"choices": OUTPUT_DTYPES, "help": "of the output; default: that of the first model"}}


def device(name):
    """The name, if the device holds numbers and gives them back, which "meta" does not."""
    import torch
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here "
                                         f"({(str(error).splitlines() or ['no such device'])[0]})") from None


def parse(arguments):
    parser = Parser(prog="merge.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="mergekit's configuration as JSON, in the place of METHOD and its flags")
    commands = parser.add_subparsers(dest="method", metavar="METHOD")
    diff = commands.add_parser("diff", help="how far two models are apart", description=DIFF, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    diff.add_argument("folders", nargs=2, metavar="MODEL", help="model folders: config.json and model.safetensors or shards")
    diff.add_argument("--base", metavar="DIR", help="the model that both were trained from")
    diff.add_argument("--json", action="store_true", help="print the rows as JSON")
    search = commands.add_parser("search", help="search the weights of linear by CMA-ES, and compare with the best single model and with soups", allow_abbrev=False,
                                 description=SEARCH, formatter_class=argparse.RawDescriptionHelpFormatter)
    search.add_argument("folders", nargs="+", metavar="MODEL", help="the pool, 16 or more: checkpoints with one architecture and one tokenizer")
    for flag, options in SEARCH_FLAGS.items():
        search.add_argument(flag, **options)
    add_flags(search, Reading)
    methods = [commands.add_parser(method, help=SUMMARIES[method], description=SUMMARIES[method], allow_abbrev=False) for method in METHODS]
    for method, command in zip(METHODS, methods):
        command.add_argument("folders", nargs="+", metavar="MODEL", help="model folders: config.json and model.safetensors or shards")
        command.add_argument("--dtype", choices=OUTPUT_DTYPES, help="of the output; default: that of the first model")
        for setting, default in METHODS[method].settings.items():
            flag, *interval = RANGES.get(setting, [f"--{setting}"])
            more = {"type": number(*interval)} if interval else {}
            command.add_argument(flag, dest=setting, default=default, **FLAGS[setting], **more)
    for command in (parser, search, *methods):
        command.add_argument("--out", metavar="DIR", help="the new folder; it must not exist")
        command.add_argument("--allow-config-differences", action="store_true", default=argparse.SUPPRESS,
                             help="go on where config.json differs in what changes the computation, with the "
                                  "first model's")
    for command in (parser, *methods):
        command.add_argument("--no-hashes", dest="hashes", action="store_false", default=argparse.SUPPRESS, help="leave the SHA-256 of the inputs out of "
                             "merge.json: on a processor without instructions for it, it takes as long as the merge")
        command.add_argument("--print-config", action="store_true", help="print mergekit's configuration of this merge, and merge nothing")
    for command in (parser, diff, search, *methods):
        command.add_argument("--device", type=device, default=argparse.SUPPRESS, help="where to compute, such as cuda; default: cpu")
    options = parser.parse_args(arguments)
    if (options.config is None) == (options.method is None):
        parser.error("give a method, or --config FILE, and not both")
    if options.method != "diff" and not (options.out or getattr(options, "print_config", False)):
        parser.error("the following arguments are required: --out")
    return vars(options)


def weight_files(folders):
    """The files of weights, links apart: what a link leads to is not read before it is known where it leads."""
    return [file for folder in folders for file in sorted(Path(folder).glob("model*.safetensors")) if file.is_file() and not file.is_symlink()]


def main(arguments=None):
    if is_spare_rank():
        return 0
    options = parse(arguments)
    config, is_json, only_print = (options.pop(key, None) for key in ("config", "json", "print_config"))
    try:
        if options["method"] == "search":
            from aya_min import merge_front
            # models and training: two seconds that the other methods do not need
            from aya_min.merge_search import search_folders
            flags = {field.name: options.pop(field.name) for field in fields(Reading)}
            options["reading"] = {name: value for name, value in flags.items() if value is not None}
            result = search_folders(**{key: value for key, value in options.items() if key != "method"})
            print(printable(merge_front.search_table(result)))
            print(printable(f"{options['out']}: model, search.json, evaluations.jsonl, report.html"))
            return 0
        if config:
            options |= from_config(read_json(config)) | ({"allow_config_differences": True}
                                                         if options.get("allow_config_differences") else {})
        method, folders, dtype = (options.get(key) for key in ("method", "folders", "dtype"))
        if method != "diff":                # before anything is read
            given = {key: options[key] for key in METHODS[method].settings}
            settings = check_settings(method, given, len(folders), dtype)
        if only_print:
            allow = options.get("allow_config_differences", False)
            print(json.dumps(to_config(folders, method, settings, dtype, allow), indent=2))
            return 0
        with Digests() as digests:
            if options.get("hashes", method != "diff"):
                digests.begin(weight_files([*folders, options["base"]] if "base" in options else folders))      # while torch is imported
            from aya_min.merge_folders import compare_folders, difference_table, merge_folders
            if method == "diff":
                rows = compare_folders(*folders, options["base"], options.get("device", "cpu"))
                print(json.dumps(rows, indent=1) if is_json else difference_table(rows))
                return 0
            out = merge_folders(**options, digests=digests)
    except KeyboardInterrupt:
        kept = f"what was measured is in {options['out']}.partial, and the same command goes on from there" if options["method"] == "search" else "nothing was kept"
        print(f"merge.py: stopped; {kept}", file=sys.stderr)
        return 130
    print(printable(f"{out}: {options['method']} of {len(options['folders'])} models"))
    return 0


def program():
    try:
        return main()
    finally:
        gc.freeze()                 # nor at the end: 0.4 s less


if __name__ == "__main__":
    gc.set_threshold(100_000)       # importing torch makes many objects that all stay: look through them seldom, 0.3 s less
    guarded(program, "merge.py")
