"""What comes in and goes out of training: numbers that are not finite, other people's files
in a run folder, flags and environment.

Each test is a sentence about one kind of mistake, tried with several instances.
"""

import ast
import json
import math
import os
import shutil
import sys
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import (CPU, EVERY, FRESH, ROOT, classifier, language_model, logged, on_ranks, reward_model, run,
                   tokenizer)

import train
from aya_min import checkpoint, config, distributed, estimate, files, loop, reference, stages, weights
from aya_min.losses import sft_loss
from aya_min.data import batches_in_order, collate, load_examples, make_batches
from aya_min.loop import make_optimizer



@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    weights.save(folder / "A", language_model(), tokenizer())
    weights.save(folder / "RM", reward_model(), tokenizer())
    weights.save(folder / "C", classifier(), tokenizer())
    return folder


@pytest.fixture
def command(in_process):
    return lambda line: in_process(train, *line.split())


def line_of(stage, models, world, out):
    more = f" --reward-model {models}/RM --num-samples 2 --max-new-tokens 6" if stage == "rl" else ""
    model = "C" if stage == "sidenet" else "A"
    return (
        f"{stage} --model {models}/{model} --data {world}/{EVERY[stage][2]} --out {out} --batch-size 8"
        f" --max-steps 2{more}"
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", EVERY)
def test_weights_that_became_nan_in_the_last_step_are_neither_kept_nor_published(
    stage, models, world, tmp_path, command
):
    code, out, err = command(
        line_of(stage, models, world, tmp_path / "run").replace("steps 2", "steps 1")
        + " --learning-rate 1e38 --warmup-steps 0 --publish-every 1"
    )
    assert code == 2 and out == "" and "is not finite" in err[-1] and err[-1].startswith("error: "), err
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "checkpoints").exists()
    assert not list(tmp_path.glob("run/state/step-*"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("stage", EVERY)
def test_a_model_that_holds_nan_is_named_with_its_tensor_before_any_row_is_blamed(
    stage, value, models, world, tmp_path, command
):
    """The message named the rows of the first step."""
    model, layer = (classifier(), 0) if stage == "sidenet" else (language_model(), 1)
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[3, 5] = value
    weights.save(tmp_path / "spoiled", model, tokenizer())
    line = line_of(stage, models, world, tmp_path / "run")
    line = line.replace(f"{models}/A", f"{tmp_path}/spoiled").replace(f"{models}/C", f"{tmp_path}/spoiled")
    code, out, err = command(line)
    assert code == 2 and out == "" and err[-1].startswith("error: "), err
    assert f"its parameter model.layers.{layer}.mlp.down_proj.weight" in err[-1], err
    assert str(tmp_path / "spoiled") in err[-1] and "again" in err[-1] and "data order" not in err[-1], err


def test_weights_that_an_earlier_step_spoiled_are_named_before_the_rows(world, tmp_path):
    items = load_examples([world / "sft.jsonl"], tokenizer(), 256, config.SFT())
    settings = config.SFT(batch_size=8, max_steps=2, learning_rate=1e38, warmup_steps=0)
    num_steps, batches = make_batches(items, collate, settings)
    with pytest.raises(ValueError, match="step 1: loss nan: before the step its parameter .* is not"):
        loop.train(language_model(), num_steps, batches, sft_loss, settings, tmp_path, CPU)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["weight", "exp_avg", "exp_avg_sq"])
def test_a_state_with_one_number_that_is_not_finite_is_refused_and_the_state_before_is_kept(
    what, value, tmp_path
):
    model = language_model()
    optimizer = make_optimizer(model, config.SFT())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    checkpoint.save_state(tmp_path / "state", model, optimizer, 1)
    name, p = list(model.named_parameters())[3]
    with torch.no_grad():
        (p if what == "weight" else optimizer.state[p][what]).view(-1)[7] = value
    with pytest.raises(
        ValueError, match=f"after step 1: {name}.* is not finite .*The last saved state is step-1"
    ):
        checkpoint.save_state(tmp_path / "state", model, optimizer, 2)
    assert names(tmp_path / "state") == ["step-1"]


def test_large_but_finite_weights_whose_sum_is_not_are_no_mistake():
    fine = {"w": torch.full((9,), 3e38)}
    assert not fine["w"].sum().isfinite() and checkpoint.not_finite(fine) is None
    assert checkpoint.not_finite({"v": torch.ones(2), "w": torch.tensor([math.inf, -math.inf])}) == "w"


def test_a_nan_on_the_last_of_two_ranks_stops_both(tmp_path):
    def program():
        model = distributed.shard(language_model())
        if distributed.rank() == 1:
            with torch.no_grad():
                distributed.own_rows(model.model.embed_tokens.weight)[0][-1, 0] = math.nan
        try:
            checkpoint.save_state(tmp_path / "state", model, make_optimizer(model, config.SFT()), 1)
        except ValueError as error:
            return str(error)

    one, two = on_ranks(2, program)
    assert one == two and "after step 0: model.embed_tokens.weight is not finite" in one


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_an_older_version_saved_with_nan_is_left_for_the_one_before_it(
    value, world, tmp_path, capsys
):
    """It was sealed with its SHA-256, and each resume stopped at once with the same line."""
    always = dict(save_every=1, schedule="constant", warmup_steps=0)
    folder = run("sft", world, tmp_path / "run", max_steps=3, **always)
    spoil(folder / "state" / "step-3", value)
    capsys.readouterr()
    run("sft", world, folder, resume=True, max_steps=3, **always)
    assert (
        "step-3 is damaged (" in (err := capsys.readouterr().err)
        and "is not finite); resuming from the state before it" in err
    )
    assert "resumes after step 2" in err and names(folder / "state") == ["step-2", "step-3"]


def spoil(state, value):
    """Put a value into a tensor of a state, and seal it again."""
    [file] = state.glob("*.safetensors")
    text = bytearray(file.read_bytes())
    text[-4:] = torch.tensor([value]).numpy().tobytes()
    file.write_bytes(text)
    about = json.loads((state / "manifest.json").read_text())
    about["files"] = {file.name: [len(text), files.sha256(file)]}
    (state / "manifest.json").write_text(json.dumps(about))


def test_a_reference_with_nan_is_named_with_its_row_before_anything_is_trained(world, tmp_path):
    model = language_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(
        ValueError, match=r"pairs.jsonl:\d+: its log-prob under the reference is \[nan, nan\], not finite"
    ):
        stages.train_stage(
            "dpo",
            model, tokenizer(), [world / "pairs.jsonl"], config.DPO(batch_size=8), tmp_path / "run", CPU
        )
    assert not (tmp_path / "run").exists()


def test_a_kept_reference_with_nan_is_refused_by_file_and_row(world, tmp_path, monkeypatch):
    run("dpo", world, tmp_path / "run", reference_logps=tmp_path / "kept")
    logps = load_file(tmp_path / "kept")["ref_logps"]
    with reference.safe_open(tmp_path / "kept", "pt") as file:
        about = file.metadata()
    logps[3, 1] = math.inf
    save_file({"ref_logps": logps}, tmp_path / "kept", {**about, "sha256": reference.sha256_of(logps)})
    with pytest.raises(
        ValueError, match=r"pairs.jsonl:\d+: its log-prob under the reference \(.*kept\) is .*inf"
    ):
        run("dpo", world, tmp_path / "again", reference_logps=tmp_path / "kept")


@pytest.mark.parametrize(
    "spoiled, says",
    [
        (
            lambda loss: loss * math.nan,
            "the held-out loss of this model is not finite in a batch with held-out-sft.jsonl:",
        ),
        (lambda loss: loss, "the held-out margin of this model is not finite; "),
    ],
)
def test_a_held_out_metric_that_is_not_finite_is_refused_by_name(spoiled, says, world):
    items = load_examples([world / "held-out-sft.jsonl"], tokenizer(), 256, config.SFT())
    for item in items:
        item.where = item.where.rpartition("/")[2]

    def loss_fn(model, batch):
        loss, metrics = sft_loss(model, batch)
        return spoiled(loss), {**metrics, "margin": metrics["loss"] * math.inf}

    with pytest.raises(ValueError, match=says):
        loop.evaluate(language_model(), loss_fn, batches_in_order(items, collate), CPU)


# ---- held-out data in bfloat16 -----------------------------------------------------------------------------


def test_held_out_dpo_in_bfloat16_starts_at_ln_2_without_margins(world, tmp_path):
    """The policy was evaluated in fp32 on one device, and compared with a reference in bfloat16."""
    first = logged(
        run("dpo", world, tmp_path / "run", held_out=True, dtype="bfloat16", max_steps=1, nll_weight=0.0)
    )[0]
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-2)
    assert first["eval/rewards/margins"] == pytest.approx(0, abs=1e-2)


def test_held_out_figures_in_bfloat16_are_computed_in_bfloat16_and_do_not_depend_on_the_ranks(
    world, tmp_path
):
    on_ranks(
        2, lambda: run("sft", world, tmp_path / "two", held_out=True, dtype="bfloat16", max_steps=1) and None
    )
    two = logged(tmp_path / "two")[0]["eval/loss"]
    one, exact = (
        logged(run("sft", world, tmp_path / dtype, held_out=True, dtype=dtype, max_steps=1))[0]["eval/loss"]
        for dtype in ("bfloat16", "float32")
    )
    assert one != exact and one == pytest.approx(exact, rel=0.02)
    assert two == pytest.approx(one, rel=2e-3)


# ---- rloo: held-out prompts, cut answers, room -------------------------------------------------------------


def test_rloo_evaluates_its_held_out_prompts_before_in_between_and_after(models, world, tmp_path, command):
    line = (
        line_of("rl", models, world, tmp_path / "run")
        + f" --eval-data {world}/held-out-prompts.jsonl --eval-every 1 --warmup-steps 0"
    )
    code, _, err = command(line)
    assert code == 0, err
    rows = [row for row in logged(tmp_path / "run") if "lr" not in row]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all({"eval/reward", "eval/kl", "eval/length", "eval/cut"} <= row.keys() for row in rows)
    assert abs(rows[0]["eval/kl"]) < 1e-4 and any(key.startswith("eval/reward/") for key in rows[0])
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["reward"] == rows[-1]["eval/reward"]
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["eval_data"] == [f"{world}/held-out-prompts.jsonl"]
    code, _, err = command(f"rloo --resume {tmp_path}/run --max-steps 3 --save-every 1")
    assert code == 0 and [row["step"] for row in logged(tmp_path / "run") if "lr" not in row] == [
        0,
        1,
        2,
        3,
    ], err


def test_rloo_logs_the_share_of_answers_that_were_cut_and_says_once_what_becomes_of_them(
    world, tmp_path, capsys
):
    rows = logged(run("rl", world, tmp_path / "short", max_new_tokens=1))
    err = capsys.readouterr().err
    assert rows[0]["cut"] > 0.5 and any(key.startswith("cut/") for key in rows[0])
    assert err.count("were cut at --max-new-tokens 1: they are kept and scored as they are") == 1


def test_max_length_bounds_an_rloo_prompt_and_its_answer_by_the_policy_of_too_long(world, tmp_path, capsys):
    longest = max(
        len(tokenizer().encode_prompt(json.loads(line)["prompt"]))
        for line in (world / "prompts.jsonl").read_text().splitlines()
    )
    with pytest.raises(ValueError, match=r"prompts.jsonl:\d+: the prompt has .* less --max-new-tokens 12: "):
        run("rl", world, tmp_path / "run", max_length=longest + 11)
    assert not (tmp_path / "run").exists()
    run("rl", world, tmp_path / "whole", max_length=longest + 12, max_steps=1)
    run("rl", world, tmp_path / "skip", max_length=longest + 11, max_steps=1, too_long="skip")
    capsys.readouterr()
    cut = run("rl", world, tmp_path / "cut", max_length=longest - 6, max_steps=1, too_long="cut-left")
    assert capsys.readouterr().err and logged(cut)[0]["kl"] == pytest.approx(
        0, abs=1e-4
    )  # what is trained is what was sampled from
    with pytest.raises(
        ValueError, match="the 256 tokens .* less --max-new-tokens 500.* no room for a prompt"
    ):
        run("rl", world, tmp_path / "none", max_new_tokens=500)


# ---- flags -------------------------------------------------------------------------------------------------


class Watched:
    """Settings that note which of their fields are read by name; asdict and replace do not count."""

    def __init__(self):
        self.read = set()

    def of(self, settings_class):
        read, known = self.read, {f.name for f in fields(settings_class)}

        def look(self, name):
            if name in known:
                caller = sys._getframe(1).f_globals["__name__"]
                if caller not in ("dataclasses", "copy") and sys._getframe(1).f_code.co_name != "__eq__":
                    read.add(name)
            return object.__getattribute__(self, name)

        return type(settings_class.__name__, (settings_class,), {"__getattribute__": look})


@pytest.mark.parametrize("stage", EVERY)
def test_every_setting_of_a_stage_is_read_by_its_code(stage, world, tmp_path):
    """rloo took --max-length, --eval-every and --eval-data, recorded them, and did nothing with them."""
    function, settings_class, file = EVERY[stage]
    watched = Watched()
    values = dict(batch_size=8, max_steps=2, save_every=1, max_length=256, warmup_steps=0) | (
        dict(num_samples=2, max_new_tokens=8) if stage == "rl" else {}
    )
    settings = watched.of(settings_class)(**values)
    more = {"reward_model": reward_model()} if stage == "rl" else {}
    model = FRESH.get(stage, language_model)()
    function(
        model,
        tokenizer(),
        [world / file],
        settings,
        tmp_path / "run",
        CPU,
        eval_data=[world / f"held-out-{file}"],
        **more,
    )
    parser = stage_parser(stage)
    flags = {action.dest for action in parser._actions} & {f.name for f in fields(settings_class)}
    unread = flags - watched.read
    # epochs counts only without --max-steps (and is refused beside it), the end of a cosine only in one, the
    # router's held-out share only without --eval-data, what is said of a head where the model is made
    only_sometimes = {"rl": {"final_learning_rate"}, "router": {"held_out"}, "reward": {"head"},
                      "classify": {"head", "labels"}, "sidenet": {"layer", "hidden"}}.get(stage, set())
    assert unread <= {"epochs", *READ_BY_DATA} | only_sometimes, unread
    assert "keep_cut" in flags or stage == "rl"


READ_BY_DATA = {
    "columns",
    "keep_cut",
    "allow_control_tokens",
    "too_long",
}  # of every reader of rows, see test_data.py


def stage_parser(stage):
    return next(action for action in train.make_parser()._actions if action.dest == "command").choices[stage]


def functions_of(path, names=None):
    """The syntax trees of a file's functions of these names, or of the whole file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [node for node in tree.body if getattr(node, "name", None) in names] if names else [tree]


# Rooms that read the flags of endpoints and judges, wherever these stand.
OF_ANY_COMMAND = ["aya_min/endpoint_answers.py", "aya_min/evaluate_judges.py"]


def read_in(trees):
    """The attributes that some code reads, and the texts in it, of which lists of names of arguments are
    made."""
    trees = trees + sum(map(functions_of, OF_ANY_COMMAND), [])
    nodes = [node for tree in trees for node in ast.walk(tree)]
    attributes = [
        node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    ]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts | {node.attr for node in attributes}


def flags_in(tree):
    """The names under which argparse keeps what a file's add_argument calls take."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "attr", "") == "add_argument" and call.args]
    dests = [[word.value for word in call.keywords if word.arg == "dest"] or call.args for call in calls]
    dests = [given[0] for given in dests]
    return {dest.value.lstrip("-").replace("-", "_") for dest in dests if isinstance(dest, ast.Constant)}


@pytest.mark.parametrize(
    "path",
    ["train.py", "generate.py", "merge.py", "aya_min/evaluate.py", "aya_min/world.py", "aya_min/report.py"],
)
def test_every_flag_of_a_command_is_read_by_its_code(path):
    """An argument is read as args.NAME, or by its name in a list of names of arguments."""
    trees = functions_of(path)
    assert not (unread := flags_in(trees[0]) - read_in(trees)), unread


@pytest.mark.parametrize("name", ["recipe", *EVERY])
def test_every_flag_of_train_is_read_by_the_functions_of_its_command(name):
    """--eval-data of rloo was read by run_one_stage, for the other stages."""
    one = ["run_one_stage", "resumed_from", "check_flags", "load_model", "run_command"]
    functions = ["run_whole_recipe", "check_own", "run_command"] if name == "recipe" else one
    settings = {f.name for f in fields(config.Recipe if name == "recipe" else EVERY[name][1])}
    parser = stage_parser(name)
    flags = {action.dest for action in parser._actions} - {"help"} - settings
    assert not (unread := flags - read_in(functions_of("train.py", functions))), unread


def test_every_setting_of_the_recipe_is_read_by_its_code():
    paths = [path.relative_to(ROOT) for path in (ROOT / "aya_min").glob("*.py") if path.stem != "config"]
    trees = [tree for path in [*paths, "train.py"] for tree in functions_of(path)]
    read = read_in(trees)                       # also as f"{stage}_beta"
    unread = {f.name for f in fields(config.Recipe) if not {f.name, "_" + f.name.partition("_")[2]} & read}
    assert not unread


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--gpus 2", "--gpus goes with --dry-run"),
        ("--profile 2", "--profile 2: steps are counted from 0, and there are 2"),
        ("--tokenizer {models}/RM", "--tokenizer goes with a preset"),
        ("--resume {models} --out {tmp}/run", "no config.json in it"),
    ],
)
def test_flags_that_would_be_ignored_are_refused_by_name(flags, says, models, world, tmp_path, command):
    line = (
        line_of("sft", models, world, tmp_path / "run")
        + " "
        + flags.format(models=models / "no", tmp=tmp_path)
    )
    code, out, err = command(line)
    assert code == 2 and out == "" and len(err) == 1 and says in err[0], err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--eval-every 2", "--eval-every has no effect without --eval-data"),
        ("--epochs 3", "--epochs has no effect beside --max-steps 2"),
        ("--final-learning-rate 0.1 --schedule constant", "--final-learning-rate has no effect beside"),
    ],
)
def test_flags_that_another_outdoes_are_said_and_the_run_goes_on(
    flags, says, models, world, tmp_path, command
):
    code, _, err = command(line_of("sft", models, world, tmp_path / "run") + " " + flags)
    assert code == 0 and any(line.startswith(says) for line in err), err


NUMBERS = [
    "--seed -1",
    "--seed 9223372036854775808",
    "--epochs inf",
    "--epochs 1e308",
    "--epochs nan",
    "--epochs 0",
    "--adam-beta2 1",
    "--weight-decay -1",
    "--weight-decay nan",
    "--final-learning-rate 2",
    "--final-learning-rate nan",
    "--learning-rate inf",
    "--collective-timeout 0",
    "--collective-timeout nan",
    "--collective-timeout inf",
    "--collective-timeout 1e30",
    "--gpus 0",
    "--gpus -1",
    "--replicate 0",
    "--profile -1",
    "--max-length 1",
    "--max-grad-norm -1",
]


@pytest.mark.parametrize(
    "flags",
    [
        *(f"sft {each}" for each in NUMBERS),
        "dpo --beta -1",
        "dpo --beta 0",
        "dpo --nll-weight -1",
        "reward --lm-weight -1",
        "reward --lm-weight nan",
        "rl --beta -1",
        "rl --beta nan",
        "rl --max-new-tokens 0",
        "rl --max-new-tokens -1",
        "rl --num-samples 0",
        "rl --gae-lambda -0.1",
        "rl --gae-lambda 1.01",
        "rl --gradient-steps 0",
        "rl --cut-penalty -1",
        "rl --reward-noise inf",
        "rl --num-samples inf",
        "rloo --num-samples 99999999999999",
    ],
)
def test_a_number_out_of_its_range_is_refused_by_the_name_of_its_flag_before_anything_is_read(
    flags, tmp_path, command
):
    stage, flag, _ = flags.split()
    code, out, err = command(
        f"{flags} --model {tmp_path}/nowhere --data {tmp_path}/nowhere --out {tmp_path}/run"
    )
    assert (
        code == 2 and out == "" and len(err) == 1 and f"argument {flag}: " in err[0] and "must be a" in err[0]
    ), err
    assert names(tmp_path) == []


@pytest.mark.parametrize("stage", EVERY)
def test_the_largest_seed_trains_every_stage(stage, world, tmp_path):
    function, settings_class, file = EVERY[stage]
    more = {"reward_model": reward_model()} if stage == "rl" else {}
    settings = (
        settings_class(batch_size=8, max_steps=1, seed=2**63 - 1, max_length=256)
        if stage != "rl"
        else settings_class(batch_size=8, max_steps=1, seed=2**63 - 1, max_new_tokens=4, num_samples=2)
    )
    function(
        FRESH.get(stage, language_model)(),
        tokenizer(),
        [world / file],
        settings,
        tmp_path / "run",
        CPU,
        **more,
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("RANK", "x"),
        ("RANK", "-1"),
        ("RANK", "2"),
        ("RANK", "1.5"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "two"),
        ("WORLD_SIZE", "1e3"),
        ("LOCAL_RANK", "x"),
        ("LOCAL_RANK", "9"),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "65536"),
        ("MASTER_PORT", ""),
        ("TORCHELASTIC_RESTART_COUNT", "x"),
        ("TORCHELASTIC_RESTART_COUNT", "-1"),
    ],
)
def test_a_variable_of_torchrun_that_is_no_number_of_its_range_is_refused_by_name(name, value, monkeypatch):
    for variable, right in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }.items():
        monkeypatch.setenv(variable, right)
    monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=f"^the environment variable {name}='{value}' must be a whole number of at least"
    ):
        distributed.setup(1)


def test_an_unknown_stage_is_refused_by_the_estimate_which_knows_those_of_train():
    """It was given rloo's items and sft's loss."""
    says = "unknown stage 'dance'; known: pretrain sft reward dpo kto rl router classify sidenet"
    with pytest.raises(ValueError, match=says):
        estimate.dry_run("dance", "M", language_model(), config.SFT(), None, None, None, 1)
    with pytest.raises(ValueError, match=says):
        stages.train_stage("dance", language_model(), tokenizer(), [], config.SFT(), "out", CPU)
    for stage in stages.STAGES.values():
        settings = stage.settings(max_length=256)
        assert estimate.items_of(stage, settings, None, None) and stage.loss(settings)


# ---- data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "kto"])
@pytest.mark.parametrize("policy", ["skip", "cut-left", "refuse"])
def test_what_passes_the_models_positions_is_not_trained_whatever_max_length_says(
    policy, stage, models, world, tmp_path, command
):
    """With --max-length 4000 a model of 512 positions was trained on examples of thousands of tokens."""
    row = json.loads((world / EVERY[stage][2]).read_text().splitlines()[0])
    long = json.dumps({**row, "prompt": "word " * 600})
    (tmp_path / "data.jsonl").write_text((world / EVERY[stage][2]).read_text() + long + "\n")
    line = line_of(stage, models, world, tmp_path / "run")
    line = line.replace(f"{world}/{EVERY[stage][2]}", f"{tmp_path}/data.jsonl")
    code, _, err = command(f"{line} --max-length 4000 --too-long {policy} --max-steps 5")
    assert code == (2 if policy == "refuse" else 0), err
    assert policy == "cut-left" or any("512" in text and "data.jsonl:37" in text for text in err), err
    if policy != "refuse":
        assert max(row["tokens"] for row in logged(tmp_path / "run")) <= 16 * 512


@pytest.mark.parametrize("model", ["smoke", "A"])
@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_data_from_a_pipe_are_refused_by_name_before_they_are_read(
    flag, model, models, world, tmp_path, command
):
    os.mkfifo(tmp_path / "pipe")
    data = (
        f"--data {tmp_path}/pipe"
        if flag == "--data"
        else f"--data {world}/sft.jsonl --eval-data {tmp_path}/pipe"
    )
    code, _, err = command(
        f"sft --model {models / 'A' if model == 'A' else model} {data} --out {tmp_path}/run --batch-size 8"
        " --max-steps 1"
    )
    assert code == 2 and len(err) == 1 and f"{tmp_path}/pipe: not a plain file" in err[0], err
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("path", ["no/such/file", "pairs.jsonl/file"])
def test_a_place_for_the_reference_that_is_not_there_is_refused_before_the_model_is_read(
    path, models, world, tmp_path, command
):
    shutil.copy(world / "pairs.jsonl", tmp_path)
    code, _, err = command(
        line_of("dpo", models, world, tmp_path / "run").replace(str(models), "nowhere")
        + f" --reference-logps {tmp_path}/{path}"
    )
    assert (
        code == 2
        and len(err) == 1
        and f"{tmp_path}/{path}: its folder does not exist" in err[0]
    ), err
    assert names(tmp_path) == ["pairs.jsonl"]


# ---- going on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first, then",
    [
        (dict(max_steps=4), dict(max_steps=6)),
        (dict(max_steps=2, warmup_steps=9), dict(max_steps=4, warmup_steps=9)),
        (dict(max_steps=4, warmup_steps=0), dict(max_steps=4, warmup_steps=3)),
        (dict(max_steps=4, warmup_steps=0), dict(max_steps=4, schedule="constant", warmup_steps=0)),
        (dict(max_steps=0, epochs=0.5, warmup_steps=0), dict(max_steps=0, epochs=1.0, warmup_steps=0)),
    ],
)
def test_a_run_resumed_with_another_schedule_for_the_steps_that_are_done_is_refused(
    first, then, world, tmp_path
):
    """With more --max-steps the rate fell back: 1e-5 at the end of the warm-up, then 5e-6."""
    folder = run("sft", world, tmp_path / "run", **first)
    before = {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    }
    with pytest.raises(
        ValueError,
        match=(
            f"--resume {folder}: the schedule of these settings .* is not that of the run .*Start anew"
            f" from {folder}/model; .*--schedule constant"
        ),
    ):
        run("sft", world, folder, resume=True, **then)
    assert {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    } == before


def test_a_constant_run_is_made_longer_and_has_the_rates_of_a_long_one_from_the_start(world, tmp_path):
    always = dict(schedule="constant", warmup_steps=2)
    for steps in (3, 5):
        parts = run("sft", world, tmp_path / "parts", resume=steps == 5, max_steps=steps, **always)
    assert logged(parts) == logged(run("sft", world, tmp_path / "whole", max_steps=5, **always))


def test_a_setting_that_an_older_run_lacks_takes_its_default(world, tmp_path):
    folder = run("sft", world, tmp_path / "run", max_steps=2, schedule="constant")
    about = json.loads((folder / "config.json").read_text())
    for name in ("columns", "too_long", "keep_cut", "allow_control_tokens", "packing", "adam_beta2"):
        about["settings"].pop(name)
    (folder / "config.json").write_text(json.dumps(about))
    run("sft", world, folder, resume=True, max_steps=3, schedule="constant")
    assert [row["step"] for row in logged(folder)] == [0, 1, 2]


DEEP = "[" * 5000 + "]" * 5000


def change(**changes):
    return lambda text: json.dumps({k: v for k, v in {**json.loads(text), **changes}.items() if v != "gone"})


CONFIGS = {
    "list": lambda text: "[]",
    "number": lambda text: "5",
    "null": lambda text: "null",
    "deep": lambda text: '{"stage": ' + DEEP + "}",
    "half": lambda text: text[:40],
    "empty": lambda text: "",
    "no stage": change(stage="gone"),
    "stage list": change(stage=["sft"]),
    "no settings": change(settings="gone"),
    "settings list": change(settings=[1]),
    "no data": change(data="gone"),
    "data text": change(data="x.jsonl"),
    "data numbers": change(data=[5]),
    "model number": change(model=5),
    "eval text": change(eval_data="x"),
    "sha list": change(sha256=[]),
    "no sha": change(sha256="gone"),
    "resumed text": change(resumed="x"),
    "a setting's type": change(settings={"learning_rate": "x"}),
    "a setting's range": change(settings={"batch_size": -8}),
    "10^400": lambda text: text.replace('"adam_beta2": 0.98', '"adam_beta2": 1' + "0" * 400),
    "unknown setting": change(settings={"warmth": 3}),
    "twice": lambda text: text.replace("{", '{"stage": "sft", ', 1),
}


@pytest.fixture(scope="module")
def done(models, world, tmp_path_factory):
    """A run of sft by the command, of two steps."""
    folder = tmp_path_factory.mktemp("done") / "run"
    line = line_of("sft", models, world, folder) + " --schedule constant --warmup-steps 0 --save-every 1"
    train.run_one_stage(train.make_parser().parse_args(line.split()), CPU)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_a_run_folder_that_no_stage_wrote_is_one_line(name, done, tmp_path, command):
    shutil.copytree(done, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(CONFIGS[name](path.read_text()))
    code, out, err = command(f"sft --resume {tmp_path}/run --max-steps 3")
    assert code == 2 and out == "" and len(err) == 1 and str(tmp_path / "run") in err[0], err


@pytest.mark.parametrize(
    "text, says",
    [
        ("[1]\n", "metrics.jsonl:3: not a row of metrics"),
        ("5\n", ":3: not a row"),
        ('{"loss": 1}\n', ":3: not a row"),
        ('{"step": "1"}\n', ":3: not a row"),
        (DEEP + "\n", ":3: not JSON"),
        ('{"step": 1, "loss": NaN}\n', "not JSON"),
        ("{\n", ":3: not JSON"),
        ("\n", ":3: not JSON"),
    ],
)
def test_a_line_of_metrics_that_no_stage_wrote_is_named(text, says, done, tmp_path, command):
    shutil.copytree(done, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(text)
    code, out, err = command(f"sft --resume {tmp_path}/run --max-steps 3")
    assert code == 2 and out == "" and len(err) == 1 and says in err[0], err


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        "[]",
        "5",
        "{}",
        '{"step": 2}',
        '{"step": 2, "files": []}',
        '{"step": 2, "files": {"x": 5}}',
        '{"step": "2", "files": {}}',
        '{"step": 2, "files": {"x": ["a", 5]}}',
    ],
)
def test_a_manifest_that_no_stage_wrote_makes_the_state_damaged_and_the_one_before_is_used(
    text, done, tmp_path, command
):
    shutil.copytree(done, tmp_path / "run")
    (tmp_path / "run" / "state" / "step-2" / "manifest.json").write_text(text)
    code, _, err = command(f"sft --resume {tmp_path}/run --max-steps 3")
    assert (
        code == 0 and "step-2 is damaged (manifest.json" in err[0] and "resumes after step 1" in err[1]
    ), err


def test_resume_continues_in_its_own_folder_only(done, tmp_path, command):
    code, _, err = command(f"sft --resume {done} --out {tmp_path}/other --max-steps 3")
    assert code == 2 and "remove --out" in err[0] and not (tmp_path / "other").exists()
    assert command(f"sft --resume {done} --out {done} --max-steps 2")[0] == 0


# ---- their files -------------------------------------------------------------------------------------------

THEIRS = [
    "backup.tmp-mine/thesis.txt",
    "model.tmp-1/thesis.txt",
    "model.old-7/thesis.txt",
    "x.tmp-1",
    "notes.tmp",
    "config.json.tmp",
    "reference.safetensors.tmp",
    ".model.abc.aya_min/thesis.txt",
    "state/step-notes.txt",
    "state/step-4.txt",
    "state/step-9",
    "state/step-3.tmp/thesis.txt",
    "state/step-1.gone/thesis.txt",
    "state/step-1.damaged/thesis.txt",
    "state/step-2.damaged",
    "state/.state.abc.aya_min/thesis.txt",
    "state/.state.file.aya_min",
]


def test_what_a_user_put_into_a_run_folder_is_never_removed_and_never_in_the_way(done, tmp_path, command):
    """--resume removed RUN/*.tmp-* and RUN/state/step-*.* with all in them; a file so named ended it."""
    shutil.copytree(done, tmp_path / "run")
    for name in THEIRS:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("thesis")
    code, _, err = command(f"sft --resume {tmp_path}/run --max-steps 6")
    assert code == 0, err
    assert [name for name in THEIRS if (tmp_path / "run" / name).read_text() != "thesis"] == []
    states = [
        name
        for name in names(tmp_path / "run" / "state")
        if not any(theirs.startswith(f"state/{name}") for theirs in THEIRS)
    ]
    assert states == ["step-5", "step-6"]


def test_a_folder_of_the_users_named_like_an_old_state_is_not_removed_with_the_old_ones(
    done, tmp_path, command
):
    shutil.copytree(done, tmp_path / "run")
    (tmp_path / "run" / "state" / "step-0").mkdir()
    (tmp_path / "run" / "state" / "step-0" / "thesis.txt").write_text("thesis")
    (tmp_path / "run" / "state" / "step-1" / "thesis.txt").write_text("thesis")  # in a state of ours
    assert command(f"sft --resume {tmp_path}/run --max-steps 5")[0] == 0
    assert names(tmp_path / "run" / "state") == ["step-0", "step-1", "step-4", "step-5"]
    assert (tmp_path / "run" / "state" / "step-1" / "thesis.txt").read_text() == "thesis"


def test_a_damaged_state_of_ours_is_set_aside_under_a_free_name_and_goes_with_the_next_save(
    done, tmp_path, command
):
    shutil.copytree(done, tmp_path / "run")
    state = tmp_path / "run" / "state"
    (state / "step-2.damaged").mkdir()
    (state / "step-2.damaged" / "thesis.txt").write_text("thesis")
    file = next((state / "step-2").glob("*.safetensors"))
    os.truncate(file, 100)
    assert command(f"sft --resume {tmp_path}/run --max-steps 3")[0] == 0
    assert names(state) == ["step-2", "step-2.damaged", "step-3"] and names(state / "step-2.damaged") == [
        "thesis.txt"
    ]


@pytest.mark.parametrize("name", ["notes.txt", "sub", "weights", "link"])
def test_what_is_at_the_models_place_and_not_of_this_run_is_not_replaced(name, done, tmp_path, command):
    shutil.copytree(done, tmp_path / "run")
    model = tmp_path / "run" / "model"
    if name == "notes.txt":
        (model / name).write_text("thesis")
    elif name == "sub":
        (model / name).mkdir()
    elif name == "weights":
        (model / "model.safetensors").write_bytes(b"thesis")
    else:
        model.rename(tmp_path / "elsewhere")
        model.symlink_to(tmp_path / "elsewhere")
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    code, _, err = command(f"sft --resume {tmp_path}/run --max-steps 3")
    assert code == 2 and str(model) in err[-1] and ("is in the way" in err[-1] or "a link" in err[-1]), err
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
    if name == "notes.txt":
        (model / name).unlink()
        assert checkpoint.is_older(model, model)


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "config.json",
        "eval.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "state",
        "model",
        "checkpoints",
        "state/step-2",
        ".lock",
    ],
)
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_out_of_a_run_folder_is_refused_by_name_and_what_it_leads_to_is_as_it_was(
    name, dangling, done, tmp_path, command
):
    shutil.copytree(done, tmp_path / "run")
    path, outside = tmp_path / "run" / name, tmp_path / "outside"
    if path.exists() and not dangling:
        path.rename(outside)
    else:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        None if dangling else outside.write_text("thesis")
    path.symlink_to(outside)
    before = {each: each.read_bytes() for each in [outside, *outside.rglob("*")] if each.is_file()}
    code, _, err = command(f"sft --resume {tmp_path}/run --max-steps 3")
    assert code == 2 and len(err) == 1 and str(path) in err[0] and "link" in err[0], err
    assert {each: each.read_bytes() for each in [outside, *outside.rglob("*")] if each.is_file()} == before
    assert outside.exists() != dangling


def test_metrics_are_not_written_through_a_link(tmp_path):
    (tmp_path / "thesis").write_text("thesis")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError):
        loop.write_metrics(tmp_path / "metrics.jsonl", {"step": 1})
    assert (tmp_path / "thesis").read_text() == "thesis"


def test_a_lock_file_that_is_no_lock_of_ours_is_kept(models, world, tmp_path, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("thesis")
    code, _, err = command(line_of("sft", models, world, tmp_path / "run"))
    assert (
        code == 2
        and "not the lock of a run" in err[0]
        and (tmp_path / "run" / ".lock").read_text() == "thesis"
    )


# ---- nothing left behind -----------------------------------------------------------------------------------


def test_a_stage_that_fails_before_its_first_step_leaves_no_folder_in_the_way(
    models, world, tmp_path, command, monkeypatch
):
    line = line_of("sft", models, world, tmp_path / "run")

    def fail(*_, **__):
        raise ValueError("no room")

    monkeypatch.setattr(stages, "train", fail)
    for made_before in (False, True):
        (tmp_path / "run").mkdir() if made_before else None
        code, _, err = command(line)
        assert code == 2 and err == ["error: no room"] and names(tmp_path) == (["run"] if made_before else [])
        assert not made_before or names(tmp_path / "run") == []
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    train.main()
    assert (tmp_path / "run" / "model").is_dir()


def test_a_stage_that_fails_after_an_evaluation_keeps_its_folder_and_goes_on_with_resume(
    world, tmp_path, monkeypatch
):
    save = checkpoint.save_state
    monkeypatch.setattr(checkpoint, "save_state", lambda *_: (_ for _ in ()).throw(ValueError("no room")))
    with pytest.raises(ValueError, match="no room"):
        run("sft", world, tmp_path / "run", held_out=True)
    monkeypatch.setattr(checkpoint, "save_state", save)
    run("sft", world, tmp_path / "run", resume=True, held_out=True)
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("out", ["file/run", "file"])
def test_a_run_folder_that_cannot_be_made_is_refused_before_the_model_is_read(out, world, tmp_path, command):
    (tmp_path / "file").write_text("thesis")
    code, _, err = command(f"sft --model nowhere --data {world}/sft.jsonl --out {tmp_path}/{out}")
    assert code == 2 and len(err) == 1 and f"{tmp_path}/{out}" in err[0] and "folder" in err[0], err
    assert (tmp_path / "file").read_text() == "thesis"


def test_a_kill_between_the_publication_of_the_model_and_the_end_is_made_up_for_by_the_same_resume(
    done, tmp_path, command
):
    """Also one between the renames, and one that left the older model in a scratch folder."""
    for remove in ([], ["model"]):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(done, tmp_path / "run")
        for name in remove:
            shutil.rmtree(tmp_path / "run" / name)
        code, out, err = command(f"sft --resume {tmp_path}/run")
        assert code == 0 and out.strip() == str(tmp_path / "run" / "model"), err
        assert (
            load_file(tmp_path / "run" / "model" / "model.safetensors").keys()
            == load_file(done / "model" / "model.safetensors").keys()
        )
