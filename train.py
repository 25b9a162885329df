"""Train: the whole recipe, or one stage on your own files.

    torchrun train.py                                            the recipe on the embedded world, runs/tiny
    torchrun train.py recipe --preset smoke --out runs/smoke     a smaller recipe, under a minute
    torchrun train.py sft --model DIR --data F.jsonl --out RUN   one stage: pretrain sft reward dpo kto rl
                                                                 router classify sidenet
    torchrun train.py sft --resume RUN                           continue a stage that was stopped
    torchrun train.py irreducible --model SMALL --data F.jsonl --out F.safetensors
                                                                 losses for --select rho
    torchrun train.py claim NAME --seeds 1 2 3                   what a paper says, tried; `claims` lists them
"""

import gc
import signal

# Ctrl-C while torch is imported ends the command, without a traceback.
on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
# Garbage collection is disabled while torch is imported, because its objects are permanent: start-up takes
# 1.1 s less.
gc.disable()

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from aya_min import (config, distributed, encoder_decoder_config, linear, model_config, pipeline,
                     pipeline_checks, pipeline_steps, runs, stages, weights)
from aya_min.command import Parser, guarded, is_spare_rank, number, printable
from aya_min.data import read_jsonl
from aya_min.encoder_decoder import EncoderDecoder
from aya_min.endpoint_answers import add_flags as add_endpoint_flags, check_all_there, endpoints_of
from aya_min.evaluate_judges import check_judge_fits, judging_of_recipe
from aya_min.files import check_place, read_json, refuse_pipe, write_json
from aya_min.irreducible_command import add_irreducible, run_irreducible
from aya_min.languages import CLUSTERS, read_clusters
from aya_min.mixture_rows import Mixture, with_mixture
from aya_min.mixture_spec import is_spec
from aya_min.model import init_weights
from aya_min.report_table import results_table
from aya_min.rows import texts_in
from aya_min.tokenizer import load_tokenizer, read_bpe, train_tokenizer
from aya_min.tokenizer_text import TextTokenizer, load_text_tokenizer, train_text_tokenizer

gc.freeze()
gc.enable()
signal.signal(signal.SIGINT, on_interrupt)

# {setting: where its file comes from}
FILES_OF = {"irreducible": "train.py irreducible wrote", "replay": "a run with --select wrote"}
# A timeout of up to a year.
SECONDS = number(float, "[0.001, 31536000]")

# The drawn rows of a mixture on which a tokenizer is trained.
TOKENIZER_ROWS = 200_000


def make_parser():
    parser = Parser(prog="train.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    add_recipe(commands)
    add_claim(commands)
    for name, stage in stages.STAGES.items():
        add_stage(commands, name, stage)
    add_timeout(add_irreducible(commands), 600)
    return parser


def add_timeout(parser, seconds):
    parser.add_argument("--collective-timeout", type=SECONDS, default=seconds, metavar="SECONDS",
                        help="how long a rank waits for another before it takes it for dead "
                             f"(default {seconds})")


def add_recipe(commands):
    recipe = commands.add_parser("recipe", help="the whole recipe (the default)")
    recipe.add_argument("--preset", choices=list(config.RECIPES), default="tiny")
    recipe.add_argument("--out", help="run folder (default runs/PRESET); the same command continues its run")
    recipe.add_argument("--arms", choices=["main", "all"], default="main",
                        help="all: also online only, RLOO, no shared languages")
    recipe.add_argument("--base", help="your own model folder, instead of the embedded world's base")
    recipe.add_argument("--prompts", nargs="+", help="your own prompt files (JSONL with language)")
    recipe.add_argument("--teachers", nargs="+",
                        help="model folders, JSONL files of completions made elsewhere, or OpenAI-compatible "
                             "endpoints, http(s)://host/v1#model")
    recipe.add_argument("--arbiter", help="reward model folder")
    recipe.add_argument("--judge", help="another reward model folder, which judges the results, or with "
                                        "--protocol a language model's folder or an endpoint, which compares "
                                        "each model with the one before and with the base")
    recipe.add_argument("--protocol", help="how a language model judges: arena-hard or scores "
                                           "(aya_min/judges.py)")
    recipe.add_argument("--judge-max-new-tokens", type=number(int, "[1, inf)"),
                        help="of a verdict (default as evaluate arena's)")
    recipe.add_argument("--eval-prompts", nargs="+",
                        help="prompts whose answers are judged (default: --prompts)")
    recipe.add_argument("--clusters", help="JSON file {cluster: [languages]}")
    recipe.add_argument("--config", help="JSON file of recipe settings")
    add_endpoint_flags(recipe.add_argument)
    add_timeout(recipe, 1800)
    config.add_flags(recipe, config.Recipe)


def add_claim(commands):
    commands.add_parser("claims", help="list the claims: paper, statement, minutes, last verdict")
    claim = commands.add_parser("claim", help="try a paper's claim on the embedded world, with a verdict")
    claim.add_argument("name", help="a claim file, or one of its claims; train.py claims lists both")
    claim.add_argument("--seeds", nargs="+", type=number(int, config.WHOLE), default=[1, 2, 3],
                       help="the runs (default 1 2 3); seed 0, to choose settings on, answers the "
                            "validation questions")
    claim.add_argument("--preset", choices=list(config.RECIPES), default="tiny")
    claim.add_argument("--out", default="runs/claims",
                       help="folder of all claims; the same command continues (default runs/claims)")
    claim.add_argument("--config", help="JSON file of recipe settings, to try a claim under others than the "
                                        "preset's")
    claim.add_argument("--record", action="store_true",
                       help="also keep the record as results/NAME.json of this repository")
    add_timeout(claim, 1800)


def add_stage(commands, name, stage):
    """The command of a stage of stages.STAGES."""
    olds = [old for old, new in runs.OLD_STAGES.items() if new == name]
    parser = commands.add_parser(name, aliases=olds, help=stage.about)
    presets = " ".join([*model_config.MODEL_PRESETS, *encoder_decoder_config.PRESETS])
    parser.add_argument("--model", help=f"model folder, or a preset's name for random weights ({presets})")
    parser.add_argument("--tokenizer", help="for a preset: folder with tokenizer.json (default: train one on "
                                            "the data)")
    parser.add_argument("--data", nargs="+", help="JSONL files, or the spec of a mixture of them "
                                                   "(.json, see aya_min/mixture_spec.py)")
    parser.add_argument("--eval-data", nargs="+", default=[],
                        help="held-out JSONL files; reported per language (rl: prompts, answered once)")
    parser.add_argument("--out", help="run folder; must be new")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    parser.add_argument("--config", help="JSON file of settings")
    add_timeout(parser, 600)
    parser.add_argument("--dry-run", action="store_true",
                        help="check everything, print the memory, communication and operations it needs, and "
                             "train nothing")
    parser.add_argument("--gpus", type=number(int, "[1, 16384]"), metavar="N",
                        help="with --dry-run: the number of GPUs (default: the ranks of this command)")
    for beside, text in stage.beside.items():
        parser.add_argument(config.flag_of(beside), metavar="PATH", help=text)
    used = [f.name for f in fields(stage.settings) if not (stage.samples and f.name == "keep_cut")]
    config.add_flags(parser, stage.settings, used)


def texts_of(paths, reading):
    """Yield every text in the files, to train a tokenizer; of a mixture those of its first rows."""
    for path in paths:
        rows = path.first(TOKENIZER_ROWS) if isinstance(path, Mixture) else read_jsonl(path, reading)
        for where, row in rows:
            yield from texts_in(row, where)


def load_model(args, device, settings):
    """(model, tokenizer) of --model: a folder, or a preset with random weights and a given or newly trained
    tokenizer. A dry run gets a model on the meta device, and no tokenizer if it has a preset and no data.

    A folder is read directly into the ranks' shards."""
    if is_preset(args.model) and args.model in encoder_decoder_config.PRESETS:
        return encoder_decoder_of_preset(args, settings)
    kind = None if is_preset(args.model) else weights.read_config(args.model)[1]
    if kind is EncoderDecoder:
        stages.check_encoder_decoder(args.command, settings)
    architecture = stages.builder(args.command, args.data, settings)
    if is_preset(args.model):
        preset = model_config.model_preset(args.model)
        if args.dry_run and not args.tokenizer and not args.data:
            return on_meta(architecture, preset), None
        if args.tokenizer:
            tokenizer = load_tokenizer(args.tokenizer)
        else:
            tokenizer = train_tokenizer(texts_of(args.data, settings), preset.vocab_size)
        preset.vocab_size, preset.eos_token_id = tokenizer.vocab_size, tokenizer.end_of_turn_id
        if args.dry_run:
            return on_meta(architecture, preset), tokenizer
        return init_weights(architecture(preset), torch.Generator().manual_seed(settings.seed)), tokenizer
    trunk = None if architecture is weights.CohereForCausalLM else architecture
    if not trunk and kind not in weights.SPEAKERS:
        raise ValueError(f"--model {args.model}: {weights.ONE[kind]}; {args.command} trains language "
                         "models")
    if kind is weights.SequenceClassifier and args.command == "reward" and args.head is None:
        distributed.say(f"--model {args.model} is a classifier on the last token; --head last-token keeps it "
                        "one, without it it becomes a reward model of ours")
    if args.dry_run:
        return weights.load_meta(args.model, trunk)[:2]
    place = "cpu" if settings.cpu_offload else device
    return weights.load(args.model, place, trunk=trunk, sharded=True, replicate=settings.replicate,
                        compute_dtype=getattr(torch, settings.dtype), cpu_offload=settings.cpu_offload)


def encoder_decoder_of_preset(args, settings):
    """(model, tokenizer) of an encoder-decoder's preset, see load_model."""
    stages.check_encoder_decoder(args.command, settings)
    preset = encoder_decoder_config.EncoderDecoderConfig(**encoder_decoder_config.PRESETS[args.model])
    tokenizer = None
    if args.tokenizer:
        tokenizer = load_text_tokenizer(args.tokenizer)
    elif args.data:
        # Two trainings differ in the last digits of the scores, so rank 0's is everybody's.
        made = distributed.from_main(lambda: train_text_tokenizer(
            texts_of(args.data, settings), preset.vocab_size).bpe.to_str())
        tokenizer = TextTokenizer(read_bpe(made, "the trained tokenizer"))
    if tokenizer:
        preset = replace(preset, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id,
                         decoder_start_token_id=tokenizer.pad_id, eos_token_id=tokenizer.end_of_turn_id)
    if args.dry_run:
        return on_meta(EncoderDecoder, preset), tokenizer
    return init_weights(EncoderDecoder(preset), torch.Generator().manual_seed(settings.seed)), tokenizer


def load_reward_model(args, device, settings, tokenizer):
    """The model of --reward-model, on the meta device for a dry run. Raises ValueError if it does not fit
    --model."""
    if args.dry_run:
        model, its_tokenizer = weights.load_meta(args.reward_model)[:2]
    else:
        place = "cpu" if settings.cpu_offload else device
        model, its_tokenizer = weights.load(args.reward_model, place, sharded=True,
                                            replicate=settings.replicate, cpu_offload=settings.cpu_offload)
    if not isinstance(model, weights.RewardModel):
        raise ValueError(f"--reward-model {args.reward_model}: {weights.ONE[type(model)]}; give a folder "
                         "that the reward stage wrote")
    if tokenizer and its_tokenizer.meaning != tokenizer.meaning:
        raise ValueError(f"--reward-model {args.reward_model}: another tokenizer than --model; both must be "
                         "the same")
    return model


def on_meta(architecture, model_config):
    with torch.device("meta"):
        return architecture(model_config)


def is_preset(name):
    names = *model_config.MODEL_PRESETS, *encoder_decoder_config.PRESETS
    return name in names and not Path(name).is_dir()


def resumed_from(args):
    """The config.json of the run that --resume names, {} without --resume. Flags that are not given are set
    from it, in args."""
    if not args.resume:
        return {}
    kind = stages.STAGES[args.command].settings
    before = distributed.from_main(lambda: runs.read_run(Path(args.resume), args.command, kind))
    if args.out and Path(args.out).resolve() != Path(args.resume).resolve():
        raise ValueError(f"--out {args.out}: --resume {args.resume} continues in its own folder; remove "
                         "--out")
    args.out, args.data = args.resume, args.data or before["data"]
    args.model = args.model or before.get("model")
    args.eval_data = args.eval_data or before.get("eval_data") or []
    if is_preset(args.model) and (Path(args.resume) / "tokenizer.json").is_file():
        args.tokenizer = args.tokenizer or args.resume
    if "reward_model" in stages.STAGES[args.command].needs:
        args.reward_model = args.reward_model or before.get("reward_model")
    return before


def check_flags(args, settings, device, ranks):
    """Raise ValueError, before heavy work, for flags that exclude each other and for paths that are no files.
    Flags without effect are named on standard error."""
    config.check_training(settings, ranks)
    if args.gpus and not args.dry_run:
        raise ValueError("--gpus goes with --dry-run; torchrun --nproc-per-node sets the number of ranks")
    if settings.cpu_offload and device.type == "cpu" and not args.dry_run:
        raise ValueError("--cpu-offload needs a GPU to offload from; remove it on a CPU")
    runs.tell_no_effect(args, settings)
    if args.final_learning_rate is not None and settings.schedule == "constant":
        distributed.say("--final-learning-rate has no effect beside --schedule constant")
    if args.command == "dpo" and settings.loss == "simpo" and args.length_normalized is False:
        raise ValueError("--no-length-normalized: simpo always divides by the answer's tokens; leave it out")
    if args.tokenizer and not is_preset(args.model):
        raise ValueError("--tokenizer goes with a preset; a model folder brings its own")
    for path in [*(args.data or []), *args.eval_data]:
        refuse_pipe(path)
    for name in ("irreducible", "replay"):
        path = getattr(settings, name, None)
        if path and not Path(path).is_file():
            what = "not a plain file" if Path(path).exists() else "no such file"
            raise ValueError(f"--{name} {path}: {what}; give one that {FILES_OF[name]}")
    if getattr(args, "reference_logps", None) and stages.has_reference(settings, args.reference_logps):
        check_place(args.reference_logps)


def run_one_stage(args, device):
    stage = stages.STAGES[args.command]
    restarted = args.out and not args.resume and distributed.restart_count()
    if restarted and (Path(args.out) / "config.json").is_file():
        # torchrun --max-restarts started the same command again.
        args.resume = args.out
    before = resumed_from(args)
    needed = ["model"] if args.dry_run else ["model", "data", "out", *stage.needs]
    missing = ["--" + name.replace("_", "-") for name in needed if not getattr(args, name)]
    if missing:
        raise ValueError(f"{args.command} needs {' '.join(missing)}")
    old = {**runs.AS_BEFORE, **before["settings"]} if before else None
    settings = config.settings_from(stage.settings, old, args.config, vars(args))
    ranks = args.gpus or distributed.num_ranks()
    distributed.from_main(lambda: check_flags(args, settings, device, ranks))
    if not args.resume and args.out:
        distributed.from_main(lambda: runs.check_new(Path(args.out)))
    if any(map(is_spec, args.eval_data)):
        raise ValueError("--eval-data takes JSONL files; python -m aya_min.mixture writes a spec's rows to "
                         "one")
    if not is_preset(args.model) and any(map(is_spec, args.data or ())):
        weights.load_meta(args.model)               # an index may take minutes: a folder at fault is said now
    args.data = with_mixture(args.data, settings)
    model, tokenizer = load_model(args, device, settings)
    source = {"model": args.model, "eval_data": list(args.eval_data)}
    beside = {name: getattr(args, name) for name in stage.beside}
    if beside.get("reward_model"):
        source["reward_model"] = args.reward_model
        beside["reward_model"] = load_reward_model(args, device, settings, tokenizer)
    if args.dry_run:
        is_main = distributed.is_main()
        # The dry run makes a process group of simulated ranks, so the real one must end.
        distributed.close()
        if is_main:
            from aya_min.estimate import dry_run            # torch's fake tensors and groups take a while
            print(dry_run(args.command, args.model, model, settings, args.data, args.eval_data, tokenizer,
                          ranks, beside.get("reward_model")))
        return
    folder = stages.train_stage(args.command, model, tokenizer, args.data, settings, args.out, device,
                                args.eval_data, bool(args.resume), source, **beside)
    if getattr(settings, "head", None) == "log-probs":
        distributed.say("transformers loads the language model in it; the score: head of aya_min/weights.py",
                        [folder])
    if distributed.is_main():
        print(folder)


def run_whole_recipe(args, device):
    preset = dict(config.RECIPES[args.preset])
    if args.base:
        # This setting is for the models of the embedded world, not for a user's own.
        preset.pop("keep_cut", None)
    recipe = config.settings_from(config.Recipe, preset, args.config, vars(args))
    own = {"base": args.base, "prompts": args.prompts, "teachers": args.teachers, "arbiter": args.arbiter}
    missing = ["--" + name for name, value in own.items() if not value]
    if any(own.values()) and missing:
        raise ValueError(f"your own pipeline also needs {' '.join(missing)}")
    if missing and (args.judge or args.eval_prompts or args.columns):
        raise ValueError("--judge, --eval-prompts and --columns go with --base, --prompts, --teachers and "
                         "--arbiter")
    if args.judge and Path(args.judge).resolve() == Path(args.arbiter).resolve():
        raise ValueError("--judge must not be the arbiter: a model would be judged by what trained it")
    endpoints = endpoints_of([*(args.teachers or []), *([args.judge] if args.judge else [])], args)
    judging = judging_of_recipe(args, endpoints)
    clusters = read_clusters(args.clusters) if args.clusters else CLUSTERS
    own |= {"judge": None if judging else args.judge, "eval_prompts": args.eval_prompts}
    out = Path(args.out or f"runs/{args.preset}")
    record = {"preset": args.preset, "arms": args.arms, "seed": recipe.seed, "recipe": asdict(recipe),
              "clusters": clusters, **{k: v for k, v in own.items() if v},
              **({"extra": args.extra} if args.extra else {}),
              **({"judge": args.judge, "protocol": judging.record()} if judging else {})}
    distributed.from_main(lambda: runs.check_writable(
        out, ("config.json", "summary.json", "report.html", "report.md"), ("steps", "data")))
    distributed.from_main(lambda: check_run_folder(out, record, preset))
    pipeline_checks.check_clusters(clusters, own=bool(args.base))
    if args.base:
        brought = own | {"judge": None if args.judge in endpoints else args.judge}
        own["prompts"], own["eval_prompts"] = pipeline_checks.check_own(recipe, clusters, args.arms, **own)
        check_judge_fits(judging, own["eval_prompts"])
        answered = distributed.from_main(lambda: (out / "steps" / "arbitrage" / "done.json").is_file())
        check_all_there({text: endpoint for text, endpoint in endpoints.items()
                         if text == args.judge or not answered})
    else:
        pipeline_checks.check_world(recipe, clusters)
    num_prompts = len(own["prompts"]) if args.base else None
    pipeline_checks.check_sizes(recipe, clusters, distributed.num_ranks(), num_prompts)
    if args.base:
        record["sha256"] = distributed.from_main(lambda: pipeline_checks.contents(**brought))
        distributed.from_main(lambda: pipeline_checks.check_contents(out, record["sha256"]))

    def open_folder():
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(runs.lock(out))
        before = out / "config.json"
        products = runs.products_before(before) if before.is_file() else linear.chosen()
        about = {**record, "products": products, "versions": runs.versions(), "command": " ".join(sys.argv)}
        write_json(before, about)
        return products
    own |= {k: Path(own[k]) for k in ("base", "arbiter", "judge") if own[k]}
    with ExitStack() as held:
        linear.choose(distributed.from_main(open_folder))
        own |= {"endpoints": endpoints, "concurrency": args.concurrency, "judging": judging}
        summary = pipeline.run_recipe(pipeline_steps.Run(out, recipe, device, clusters, args.arms, **own))
    if distributed.is_main():
        print(printable(f"\n{results_table(summary)}\n\n{out / 'report.html'}"))


def run_claim(args, device):
    from aya_min import experiments_records     # imports every claim file
    distributed.from_main(lambda: experiments_records.check(args.name, args.seeds, args.preset,
                                                            Path(args.out), args.record, args.config))
    changed = args.config and distributed.from_main(lambda: experiments_records.read_changes(args.config))
    if changed:
        recipe = config.settings_from(config.Recipe, config.RECIPES[args.preset] | changed)
        pipeline_checks.check_sizes(recipe, CLUSTERS, distributed.num_ranks())
        pipeline_checks.check_world(recipe, CLUSTERS)
    distributed.from_main(lambda: runs.check_writable(Path(args.out)))
    distributed.from_main(lambda: runs.check_writable(Path(args.out) / args.name,
                                                      ("claim.json", "report.html")))
    record = experiments_records.run_claims(args.name, args.seeds, args.preset, Path(args.out), device,
                                            changed)
    if distributed.is_main():
        print(experiments_records.table(record), Path(args.out) / args.name / "report.html", sep="\n")
        if args.record:
            experiments_records.keep(record)


def list_claims():
    from aya_min import experiments_records
    if not is_spare_rank():
        print(experiments_records.listing())


# {start of a setting's name: the steps that read it}. Such a setting may change until one of them begins.
LATE = {"offline_": "offline*", "rounds": "online*", "online_": "online*", "rloo_": "rloo*",
        "eval_count": "eval-*"}


def check_run_folder(out, record, preset):
    """Raise ValueError if the folder holds anything but this run of the recipe. A setting that an older run's
    config.json lacks takes the preset's value. Settings of LATE may change while none of their steps has
    begun, for example after one failed."""
    path = out / "config.json"
    if not path.is_file():
        if out.exists() and {path.name for path in out.iterdir()} - {".lock"}:
            raise ValueError(f"{out} exists and is not a run of the recipe; give another --out")
        return
    before, now = read_json(path), json.loads(json.dumps(record))
    defaults = json.loads(json.dumps(asdict(config.Recipe(**preset))))
    recipes = now.pop("recipe"), before.pop("recipe", None)
    if not isinstance(recipes[1], dict):
        raise ValueError(f"{out} exists and is not a run of the recipe; give another --out")
    theirs = defaults | recipes[1]
    runs.tell_missing(path, defaults, recipes[1])

    def may_change(name):
        begun = (step for start, steps in LATE.items() if name.startswith(start)
                 for step in [*out.glob(f"steps/{steps}/done.json"), *out.glob(f"steps/{steps}/state")])
        return name.startswith(tuple(LATE)) and not any(begun)
    skipped = {"versions", "command", "arms", "products", "sha256"}
    changed = [k for k in sorted((now.keys() | before.keys()) - skipped) if now.get(k) != before.get(k)]
    changed += [f"{config.flag_of(k)} ({theirs.get(k)!r})" for k in sorted(theirs.keys() | recipes[0].keys())
                if theirs.get(k) != recipes[0].get(k) and not may_change(k)]
    if changed:
        raise ValueError(f"{out} holds a run with other {' '.join(changed)}; give another --out, or the same "
                         "settings to continue it")


def run_command():
    argv = sys.argv[1:]
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["recipe"] + argv
    args = make_parser().parse_args(argv)
    if args.command == "claims":
        guarded(list_claims, "train.py")
    args.command = runs.OLD_STAGES.get(args.command, args.command)          # rloo: rl, whose default it is
    work = {"recipe": run_whole_recipe, "claim": run_claim,
            "irreducible": run_irreducible}.get(args.command, run_one_stage)
    distributed.launch(lambda device: work(args, device), args.collective_timeout)


def main():
    try:
        run_command()
    except KeyboardInterrupt:
        print("stopped; what was saved before is kept", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    try:
        main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # in Python's own end it would be a traceback
