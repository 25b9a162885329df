"""`generate.py route`: train a router from candidates with rewards, and say what routing by it is worth.

    python generate.py route --train candidates.jsonl --model SMALL_MODEL --out RUN

It is the stage "router" (train.py router has the other flags of training, presets and the dry run as well),
with a comparison of routes on held-out prompts after it: RUN/routes.json. The router is RUN/model. The same
command continues a run that was stopped.
"""

import argparse
import sys
from pathlib import Path

import torch

from . import config, distributed, runs, weights
from .command import Parser, printable
from .config import Routing, add_flags, settings_from
from .files import refuse_pipe, taken, write_json
from .router import arrange, choices, compare_routes, load_candidates, routes_table
from .stages import builder, fitting, train_stage


# The settings of the stage that have a flag here.
SETTINGS = ("columns", "too_long", "keep_cut", "allow_control_tokens", "tau", "held_out", "epochs",
            "max_steps", "learning_rate", "warmup_steps", "batch_size", "micro_batch_size", "max_length",
            "eval_every", "save_every", "seed", "dtype")


def make_parser():
    parser = Parser(prog="generate.py route", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", nargs="+", required=True, help="JSONL files of candidates with rewards (generate.py "
                                                  "--models ... --candidates FILE)")
    add("--model", required=True, help="model folder, whose decoder becomes the router's")
    add("--out", required=True, help="run folder; must be new, or a run of the same command")
    add("--eval-data", nargs="+", default=[],
        help="JSONL files of candidates to compare the routes on, instead of --held-out")
    add_flags(parser, Routing, SETTINGS)
    return parser


def unfinished(out):
    """Whether `out` holds a run of the stage that goes on. ValueError if it is finished, or is in the way."""
    if (out / "routes.json").exists():
        raise taken(out)
    if not (out / "config.json").is_file():
        runs.check_new(out)
        return False
    runs.read_run(out, "router", Routing)
    return True


def run_command(args, device):
    settings, out = settings_from(Routing, flags=vars(args)), Path(args.out)
    config.check_training(settings, distributed.num_ranks())
    for path in [*args.train, *args.eval_data]:
        refuse_pipe(path)
    distributed.from_main(lambda: runs.tell_no_effect(args, settings))
    resume = distributed.from_main(lambda: unfinished(out))
    build = builder("router", args.train, settings)
    model, tokenizer = weights.load(args.model, device, trunk=build, sharded=True,
                                    compute_dtype=getattr(torch, settings.dtype))
    source = {"model": args.model, "eval_data": args.eval_data}
    train_stage("router", model, tokenizer, args.train, settings, out, device, args.eval_data, resume, source)
    report(args, settings, out, device)


def report(args, settings, out, device):
    """Compare the routes on the held-out prompts. Prints the table and writes RUN/routes.json."""
    model, tokenizer = weights.load(out / "model", device)
    limit = fitting(settings, model)
    items, held_out = (load_candidates(paths, tokenizer, limit, settings) if paths else []
                       for paths in (args.train, args.eval_data))
    items, held_out = arrange(model, items, held_out, settings)
    where = " ".join(args.eval_data) or f"--held-out {settings.held_out} of {' '.join(args.train)}"
    lines = ["no prompts were held out, so that nothing is compared (--held-out 0)"]
    found = {"items": len(items), "held_out": len(held_out), "teachers": model.config.teachers}
    if held_out:
        found["routes"] = compare_routes(items, held_out, choices(model, held_out, tokenizer.pad_id))
        lines = [f"{len(held_out)} held-out prompts ({where}), {len(model.config.teachers)} teachers",
                 *routes_table(found["routes"])]
    distributed.from_main(lambda: write_json(out / "routes.json", found))
    if distributed.is_main():
        print(printable("\n".join([*lines, str(out / "model")])))


def main(argv):
    args = make_parser().parse_args(argv)
    try:
        distributed.launch(lambda device: run_command(args, device))
    except KeyboardInterrupt:
        print("stopped; what was saved before is kept", file=sys.stderr)
        sys.exit(130)
