"""train.py irreducible: the losses of a smaller model on the rows that another one will choose from
(irreducible.py, selection.py). The smaller model has been trained, with any stage, on other rows of the same
kind."""

from pathlib import Path

import torch

from . import config, distributed, irreducible, weights
from .data import load_examples
from .files import check_out, refuse_pipe
from .mixture_spec import is_spec
from .model import CohereForCausalLM
from .reference import answer_logps
from .stages import fitting

USED = ("columns", "too_long", "keep_cut", "allow_control_tokens", "max_length", "micro_batch_size", "dtype",
        "packing")


def add_irreducible(commands):
    """The command's parser."""
    parser = commands.add_parser("irreducible", help="irreducible losses, by which pretrain and sft --select "
                                                     "rho choose what to train on")
    parser.add_argument("--model", required=True,
                        help="folder of a smaller language model, trained on rows that are not in --data, "
                             "with the tokenizer of the model to be trained")
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files, as the training will get them")
    parser.add_argument("--out", required=True, help="file to write, which must not exist")
    parser.add_argument("--config", help="JSON file of settings")
    config.add_flags(parser, config.Training, USED)
    return parser


def run_irreducible(args, device):
    settings = config.settings_from(config.Training, None, args.config, vars(args))
    path = Path(args.out)
    distributed.from_main(lambda: check_out(path))
    for name in args.data:
        refuse_pipe(name)
        if is_spec(name):
            raise ValueError(f"--data {name}: the spec of a mixture; python -m aya_min.mixture writes its "
                             "rows to a JSONL file, which takes its place here")
    kind = weights.read_config(args.model)[1]
    if kind is not CohereForCausalLM:
        raise ValueError(f"--model {args.model}: {weights.ONE[kind]}; irreducible losses are those of a "
                         "language model")
    model, tokenizer = weights.load(args.model, device, sharded=True,
                                    compute_dtype=getattr(torch, settings.dtype))
    limit = fitting(settings, model)
    examples = load_examples(args.data, tokenizer, limit, settings)
    logps = answer_logps(model, examples, tokenizer.pad_id, device, settings, name="the model", by_token=True)
    losses = [-each for each in logps]
    print_of_model = distributed.fingerprint(model)
    distributed.from_main(lambda: irreducible.write(path, losses, examples, tokenizer, limit, print_of_model))
    mean = sum(float(each.mean()) for each in losses) / len(losses)
    distributed.say(f"{len(losses)} examples, {sum(map(len, losses))} supervised tokens, "
                    f"{mean:.3f} nats per token on average over the examples", [path])
    if distributed.is_main():
        print(path)
