"""Merge model folders into one, with no training, or into a mixture of experts; or see how far two are apart.

    python merge.py linear A B C --weights 0.5 0.3 0.2 --out DIR
    python merge.py slerp A B --t 0.3 --out DIR
    python merge.py ties A B C --base BASE --density 0.2 --out DIR
    python merge.py --config merge.json --out DIR               mergekit's configuration, as JSON
    python merge.py diff A B --base BASE
    python merge.py search A B C D --prompts F.jsonl --out DIR  the weights of linear, searched by CMA-ES
    python merge.py embed --model M --data law=L.jsonl art=A.jsonl --out E.json     embeddings of domains
    python merge.py upcycle law=A art=B --seed-model S --kind nexus --domains E.json --out MOE
    python merge.py extend MOE code=C --domain code=F.jsonl --out DIR
    python merge.py quantize MODEL --scheme w4-g128 --out DIR   weights of 8 or 4 bits

Each method has only the flags that it uses (python merge.py METHOD --help). The methods are in
aya_min/merge_methods.py, the work on files is in aya_min/merge_folders.py, the search in
aya_min/merge_search.py, mixtures of experts in aya_min/merge_upcycle.py, quantization in
aya_min/merge_quantize.py.
"""

import argparse
import gc
import json
import os
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from aya_min.command import WHOLE, Parser, guarded, is_spare_rank, number, printable
from aya_min.config import Reading, add_flags
from aya_min.files import Digests, read_json
from aya_min.merge_config import METHODS, OUTPUT_DTYPES, RANGES, check_settings, from_config, to_config

# setting: what its flag takes; RANGES has the names and ranges of those that are numbers
FLAGS = {
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
                   "help": "whose choice to follow where they differ, see aya_min/merge_methods.py; "
                           "default: %(default)s"},
}
SUMMARIES = {
    "linear": "weighted average, the weights divided by their sum (what Aya Expanse uses)",
    "slerp": "spherical interpolation of two models",
    "task-arithmetic": "base + lambda * weighted sum of task vectors",
    "model-stock": "from the base towards the average, by the angle between the task vectors",
    "ties": "trim, elect a sign, average those that agree",
    "dare-linear": "random drop and rescale, then task-arithmetic",
    "dare-ties": "random drop and rescale, then elect a sign, average those that agree",
}
MODELS = "model folders: config.json and model.safetensors or shards"

DIFF = """Rows for each tensor, each kind of tensor over the layers, each layer, and all tensors together.

distance: |b - a| / |a|; cosine: of a and b. With a base, of the task vectors a - base and b - base: task
cosine, and same sign, the share of the parameters moved by both that moved in the same direction. A number
is - where a length is 0.
"""

SEARCH = """The weights of a linear merge by CMA-ES (arXiv 2412.04144), compared with the best single model,
the uniform soup and the greedy soup, on data that the search did not see.

The measure is one of: the embedded world's oracle on greedy answers (--prompts), a held-out loss
(--eval-data), any command (--command). A killed search is resumed by the same command."""
SEARCH_FLAGS = {
    "--prompts": {"nargs": "+", "metavar": "F.jsonl",
                  "help": "questions of the embedded world (python -m aya_min.world)"},
    "--eval-data": {"nargs": "+", "metavar": "F.jsonl",
                    "help": "examples; the tasks are the files, or the languages of a single file"},
    "--command": {"metavar": "'CMD {model}'",
                  "help": "its last line is a JSON object {task: number, the higher the better}; "
                          "{split}: fitness or held-out"},
    "--held-out": {"nargs": "+", "metavar": "F.jsonl",
                   "help": "data that the search does not see; default: half of the data, by --seed"},
    "--by": {"nargs": "+", "choices": ["task", "language", "cluster"], "default": ["task"],
             "help": "--prompts: what a task is; several: each combination; default: task"},
    "--max-new-tokens": {"type": number(int, "[1, inf)"), "metavar": "N", "default": 32,
                         "help": "--prompts: of an answer; default: %(default)s"},
    "--max-length": {"type": number(int, "[2, inf)"), "metavar": "N", "default": 1024,
                     "help": "--eval-data: tokens of an example; default: %(default)s"},
    "--evaluations": {"type": number(int, "[1, inf)"), "metavar": "N", "default": 200,
                      "help": "points that CMA-ES tries, in whole generations, besides the baselines; "
                              "default: %(default)s"},
    "--seed": {"type": number(int, WHOLE), "metavar": "N", "default": 0,
               "help": "of the search and the halves; default: %(default)s"},
    "--allow-negative": {"action": "store_true",
                         "help": "weights of any sign whose sum is 1; without it they are above 0"},
    "--leave-one-out": {"action": "store_true", "help": "measure the result without each model, too"},
    "--dtype": {"choices": OUTPUT_DTYPES, "help": "of the output; default: that of the first model"},
}

UPCYCLE = """A mixture of experts out of dense models that were trained from one seed.

nexus (arXiv 2408.15901): a router on the embeddings of the experts' domains, and the seed's MLP for every
token; linear: the same with a linear router; btx: a linear router, the seed's MLP is one more expert; bam
(arXiv 2408.08274): as btx, and the attentions are experts too. Routers are drawn at random: train the
result."""
EXTEND = """A mixture with one more expert (arXiv 2408.15901, section 3).

With n experts before, what is neither expert nor router is averaged with weights n and 1. Nexus' routers
stay, linear routers are drawn anew."""
EMBED = """The embeddings of domains, for upcycle and extend.

Each is the mean over a domain's texts of the mean of a model's last hidden states over the text's tokens."""
SEED = {"type": number(int, WHOLE), "metavar": "N", "default": 0, "help": "of the routers; default: 0"}
DOMAINS = {"metavar": "E.json", "help": "a file of merge.py embed, or of the same form"}
QUANTIZE = """A language model with weights of 8 or 4 bits, for generate.py, transformers and vLLM.

w8, w8a8, w4 and w4-g32/64/128 are written as compressed-tensors writes them, llm-int8 and nf4 as bitsandbytes
does (aya_min/quantization.py). gptq and --smooth look at what the layers read of a text, --calibration."""
SCHEMES = ["w8", "w8a8", "llm-int8", "w4", "w4-g32", "w4-g64", "w4-g128", "nf4"]


def language(text):
    """An argparse type: the code of a language."""
    from aya_min.mixture import code_of             # which imports torch
    return code_of(text)


# command beside the methods: (description, {argument: options})
OTHERS = {
    "upcycle": (UPCYCLE, {
        "folders": {"nargs": "+", "metavar": "[NAME=]MODEL",
                    "help": "the experts; NAME is the domain, default: the folder's name"},
        "--seed-model": {"metavar": "DIR", "required": True, "help": "the model that the others began from"},
        "--kind": {"choices": ["nexus", "linear", "btx", "bam"], "required": True},
        "--kv": {"choices": ["own", "shared"],
                 "help": "bam: each attention expert's own keys and values, or one mean; default: own"},
        "--domains": {**DOMAINS, "help": f"nexus: {DOMAINS['help']}"},
        "--top-k": {"type": number(int, "[1, inf)"), "metavar": "K", "default": 1,
                    "help": "experts of the MLP that a token is sent to; default: 1"},
        "--attention-top-k": {"type": number(int, "[0, inf)"), "metavar": "K", "default": 0,
                              "help": "bam: experts of the attention that count; default: 0, all"},
        "--seed": SEED,
        "--dtype": {"choices": OUTPUT_DTYPES, "help": "of the output; default: that of the seed model"}}),
    "extend": (EXTEND, {
        "mixture": {"metavar": "MOE", "help": "a mixture, trained or not"},
        "model": {"metavar": "[NAME=]NEW", "help": "the new expert, a dense model"},
        "--domain": {"metavar": "NAME=F.jsonl",
                     "help": "nexus: texts, embedded by the model that embedded the other domains"},
        "--domains": {**DOMAINS, "help": f"nexus, instead of --domain: {DOMAINS['help']}"},
        "--model": {"dest": "embedder", "metavar": "DIR",
                    "help": "--domain: where that model is, if the mixture does not say"},
        "--seed": SEED}),
    "embed": (EMBED, {
        "--model": {"metavar": "DIR", "required": True, "help": "the model whose hidden states are taken"},
        "--data": {"nargs": "+", "metavar": "NAME=F.jsonl", "required": True,
                   "help": "conversations or texts of each domain"},
        "--max-length": {"type": number(int, "[2, inf)"), "metavar": "N", "default": 1024,
                         "help": "tokens; longer conversations are left out; default: %(default)s"}}),
    "quantize": (QUANTIZE, {
        "folders": {"nargs": 1, "metavar": "MODEL", "help": "the folder of a language model"},
        "--scheme": {"choices": SCHEMES, "required": True,
                     "help": "8 or 4 bits; a8: inputs of 8 bits too; g: inputs that share a scale"},
        "--method": {"choices": ["rtn", "gptq"], "default": "rtn", "dest": "rounding",
                     "help": "round to nearest, or GPTQ; default: %(default)s"},
        "--smooth": {"type": number(float, "[0, 1]"), "metavar": "A",
                     "help": "SmoothQuant with this alpha: how much of the inputs' size goes to the weights"},
        "--calibration": {"nargs": "+", "metavar": "F.jsonl", "help": "texts for gptq and --smooth"},
        "--calibration-languages": {"nargs": "+", "type": language, "metavar": "CODE",
                                    "help": "equally many tokens of each; default: of each that the files "
                                            "have"},
        "--calibration-tokens": {"type": number(int, "[1, inf)"), "metavar": "N",
                                 "help": "of all languages together; default: 16384"},
        "--head": {"action": "store_true",
                   "help": "quantize the head, too; a tied one gets a matrix of its own"},
        "--embedding": {"action": "store_true",
                        "help": "quantize the embedding, too; transformers cannot load that"}}),
}


def device(name):
    """An argparse type: a device that holds numbers and returns them, which "meta" does not."""
    import torch
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here "
                                         f"({(str(error).splitlines() or ['no such device'])[0]})") from None


def parse(arguments):
    """The command line as a dict; a mistake ends the program."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="merge.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE",
                        help="mergekit's configuration as JSON, instead of METHOD and its flags")
    commands = parser.add_subparsers(dest="method", metavar="METHOD")
    diff = commands.add_parser("diff", help="how far two models are apart", description=DIFF,
                               allow_abbrev=False, formatter_class=raw)
    diff.add_argument("folders", nargs=2, metavar="MODEL", help=MODELS)
    diff.add_argument("--base", metavar="DIR", help="the model that both were trained from")
    diff.add_argument("--json", action="store_true", help="print the rows as JSON")
    search = commands.add_parser("search", help="search the weights of linear by CMA-ES, and compare with "
                                                "the best single model and with soups",
                                 description=SEARCH, allow_abbrev=False, formatter_class=raw)
    search.add_argument("folders", nargs="+", metavar="MODEL",
                        help="the pool, 16 or more: checkpoints with one architecture and one tokenizer")
    for flag, options in SEARCH_FLAGS.items():
        search.add_argument(flag, **options)
    add_flags(search, Reading)
    methods = [add_method(commands, method) for method in METHODS]
    others = [commands.add_parser(name, help=about.split("\n")[0], description=about,
                                  allow_abbrev=False, formatter_class=raw)
              for name, (about, _) in OTHERS.items()]
    for command, (_, takes) in zip(others, OTHERS.values()):
        for name, more in takes.items():
            command.add_argument(name, **more)
    for command in others[1:]:
        add_flags(command, Reading, {field.name for field in fields(Reading)} - {"too_long"})
    for command in others:
        command.add_argument("--out", metavar="OUT", required=True,
                             help="the new folder, of embed a new file; it must not exist")
    for command in (parser, search, *methods):
        command.add_argument("--out", metavar="DIR", help="the new folder; it must not exist")
    for command in (parser, search, *methods):
        command.add_argument("--allow-config-differences", action="store_true", default=argparse.SUPPRESS,
                             help="accept differences of config.json that change the computation, and take "
                                  "the first model's values")
    for command in (parser, others[-1], *methods):
        command.add_argument("--no-hashes", dest="hashes", action="store_false", default=argparse.SUPPRESS,
                             help="leave the SHA-256 of the inputs out of merge.json or quantize.json: on a "
                                  "processor without instructions for it, it takes as long as the work")
    for command in (parser, *methods):
        command.add_argument("--print-config", action="store_true",
                             help="print mergekit's configuration of this merge, and merge nothing")
    for command in (parser, diff, search, *methods, *others[1:]):
        command.add_argument("--device", type=device, default=argparse.SUPPRESS,
                             help="where to compute, for example cuda; default: cpu")
    options = parser.parse_args(arguments)
    if (options.config is None) == (options.method is None):
        parser.error("give a method, or --config FILE, and not both")
    if options.method not in (None, "quantize", *METHODS) and (options.print_config or "hashes" in options):
        parser.error(f"{options.method} takes neither --print-config nor --no-hashes")
    if options.method in OTHERS and (options.print_config or "allow_config_differences" in options):
        parser.error(f"{options.method} takes neither --print-config nor --allow-config-differences")
    if options.method != "diff" and not (options.out or options.print_config):
        parser.error("the following arguments are required: --out")
    return vars(options)


def add_method(commands, method):
    """The parser of a merge method, with a flag for each of its settings."""
    command = commands.add_parser(method, help=SUMMARIES[method], description=SUMMARIES[method],
                                  allow_abbrev=False)
    command.add_argument("folders", nargs="+", metavar="MODEL", help=MODELS)
    command.add_argument("--dtype", choices=OUTPUT_DTYPES,
                         help="of the output; default: that of the first model")
    for setting, default in METHODS[method].settings.items():
        flag, *interval = RANGES.get(setting, [f"--{setting}"])
        more = {"type": number(*interval)} if interval else {}
        command.add_argument(flag, dest=setting, default=default, **FLAGS[setting], **more)
    return command


def weight_files(folders):
    """The files with the weights. Links are left out: a link is read only once it is known where it leads."""
    return [file for folder in folders for file in sorted(Path(folder).glob("model*.safetensors"))
            if file.is_file() and not file.is_symlink()]


def main(arguments=None):
    if is_spare_rank():
        return 0
    options = parse(arguments)
    is_search = options["method"] == "search"
    try:
        if options["method"] in OTHERS:
            return {"upcycle": upcycle, "extend": extend, "embed": embed,
                    "quantize": quantize}[options["method"]](options)
        return search(options) if is_search else merge_or_diff(options)
    except KeyboardInterrupt:
        kept = "nothing was kept"
        if is_search:
            kept = f"what was measured is in {options['out']}.partial, and the same command resumes from it"
        print(f"merge.py: stopped; {kept}", file=sys.stderr)
        return 130


def search(options):
    # models and training: two seconds that the other methods do not need
    from aya_min.merge_front import search_table
    from aya_min.merge_search import search_folders
    others = {"method", "config", "print_config", *(field.name for field in fields(Reading))}
    result = search_folders(**{key: value for key, value in options.items() if key not in others},
                            reading=reading_of(options))
    print(printable(search_table(result)))
    print(printable(f"{options['out']}: model, search.json, evaluations.jsonl, report.html"))
    return 0


def reading_of(options):
    return {f.name: options[f.name] for f in fields(Reading) if options.get(f.name) is not None}


def named(texts, what, name_of=None):
    """{name: path} of texts NAME=PATH; a path alone, which may hold a "=" if it exists, is named by name_of.
    ValueError for a name that occurs twice, and for none."""
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if name_of and (not equals or os.path.exists(text)):
            name, path = name_of(text), text
        if not (name and path):
            raise ValueError(f"{text!r} is not NAME=PATH, with the name of {what}")
        if name in found:
            raise ValueError(f"{what} {name} is given twice, as {found[name]} and {path}; give each its own "
                             "name, as NAME=PATH")
        found[name] = path
    return found


def reading_of_texts(options):
    """The Reading of domains and of a calibration text: what is too long is left out and counted."""
    from aya_min.config import settings_from
    return settings_from(Reading, {"too_long": "skip"}, flags=reading_of(options))


def embed(options):
    from aya_min.files import dumps, taken, write_new
    data, out = named(options["data"], "the domain"), Path(options["out"])
    if os.path.lexists(out):
        raise taken(out)
    from aya_min.merge_embed import embed, embedder_of
    domains = embed(options["model"], data, reading_of_texts(options), options["max_length"],
                    options.get("device", "cpu"))
    write_new({out: dumps({**embedder_of(options["model"]), "domains": domains}) + "\n"})
    size = len(next(iter(domains.values())))
    print(printable(f"{out}: {len(domains)} domains, {size} numbers each"))
    return 0


def upcycle(options):
    from aya_min.merge_embed import read_domains
    from aya_min.merge_upcycle import upcycle
    from aya_min.weights import name_of
    experts = named(options["folders"], "the domain", name_of)
    domains, embedder = read_domains(options["domains"]) if options["domains"] else (None, None)
    settings = {key: options[key] for key in ("kind", "kv", "top_k", "attention_top_k", "seed", "dtype")}
    out = upcycle(experts, options["seed_model"], options["out"], domains=domains, embedder=embedder,
                  **settings)
    print(printable(f"{out}: {options['kind']} of {', '.join(experts)} and {options['seed_model']}"))
    return 0


def extend(options):
    from aya_min.merge_embed import embed_like, read_domains
    from aya_min.merge_upcycle import extend
    from aya_min.weights import name_of
    texts = named([options["domain"]] if options["domain"] else [], "the domain")
    if texts and options["domains"] or (options["embedder"] or reading_of(options)) and not texts:
        raise ValueError("give --domain NAME=F.jsonl, where that is needed with --model and --columns, or "
                         "--domains E.json")
    ((name, folder),) = named([options["model"]], "the domain",
                              lambda folder: next(iter(texts), name_of(folder))).items()
    if texts and name not in texts:
        raise ValueError(f"the new expert is named {name}, --domain is of {next(iter(texts))}; give both one "
                         "name")
    vector, embedder = None, {}
    if options["domains"]:
        domains, embedder = read_domains(options["domains"])
        if name not in domains:
            raise ValueError(f"{options['domains']}: no embedding of the domain {name}; it has those of "
                             f"{', '.join(domains)}")
        vector = domains[name]
    if texts:
        vector = partial(embed_like, options["mixture"], name, texts[name], options["embedder"],
                         reading_of_texts(options), options.get("device", "cpu"))
    out = extend(options["mixture"], folder, options["out"], name, vector, options["seed"], embedder)
    print(printable(f"{out}: {options['mixture']} with {name}"))
    return 0


def quantize(options):
    from aya_min.merge_quantize import Calibration, quantize_folder
    (folder,), out = options["folders"], options["out"]
    keys = "scheme", "smooth", "head", "embedding", "device", "hashes"
    languages, tokens = options["calibration_languages"] or [], options["calibration_tokens"]
    calibration = None
    if options["calibration"]:
        calibration = Calibration(options["calibration"], languages, tokens or Calibration.tokens,
                                  reading_of_texts(options))
    elif languages or tokens or reading_of(options):
        raise ValueError("--calibration-languages, --calibration-tokens and --columns go with --calibration; "
                         "give it, or leave them out")
    given = {key: options[key] for key in keys if key in options}
    quantize_folder(folder, out, method=options["rounding"], calibration=calibration, **given)
    print(printable(f"{out}: {options['scheme']} of {folder}"))
    if options["embedding"]:
        print("its embedding is quantized, which aya_min reads, and transformers does not")
    return 0


def merge_or_diff(options):
    config, is_json, only_print = (options.pop(key, None) for key in ("config", "json", "print_config"))
    if config:
        allow = options.get("allow_config_differences", False)
        options |= from_config(read_json(config, "give mergekit's configuration as a JSON object"))
        if allow:
            options["allow_config_differences"] = True
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
            # while torch is imported
            digests.begin(weight_files([*folders, options["base"]] if "base" in options else folders))
        from aya_min.merge_folders import compare_folders, difference_table, merge_folders
        if method == "diff":
            rows = compare_folders(*folders, options["base"], options.get("device", "cpu"))
            print(json.dumps(rows, indent=1) if is_json else difference_table(rows))
            return 0
        out = merge_folders(**options, digests=digests)
    print(printable(f"{out}: {method} of {len(folders)} models"))
    return 0


def program():
    try:
        return main()
    finally:
        gc.freeze()                 # nothing is collected at exit: 0.4 s less


if __name__ == "__main__":
    # importing torch makes many objects that all stay; collecting them rarely is 0.3 s faster
    gc.set_threshold(100_000)
    guarded(program, "merge.py")
