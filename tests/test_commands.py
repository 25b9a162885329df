"""train.py and generate.py as a user types them. A mistake is one line on standard error and exit code 2, and
nothing is written.

Most calls run `main` in this process, to save its start; the last ones are real processes, torchrun among
them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import ROOT, TORCHRUN, language_model, logged, program, reward_model, tokenizer, write_world

import generate
import train
from aya_min import weights
from aya_min.journal import Journal
from aya_min.tokenizer import train_tokenizer
from aya_min.files import write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models A, B, C, a reward model RM and its copy, broken ones, data that are right and data that are
    wrong."""
    folder = write_world(tmp_path_factory.mktemp("commands"))
    for seed, name in enumerate("ABC"):
        weights.save(folder / name, language_model(seed), tokenizer())
    weights.save(folder / "RM", reward_model(), tokenizer())
    other = train_tokenizer(["one two three"] * 9, 280)
    weights.save(folder / "other-RM", reward_model(vocab_size=280), other)
    shutil.copytree(folder / "C", folder / "lacking")
    state = load_file(folder / "C" / "model.safetensors")
    state.pop("model.layers.1.self_attn.o_proj.weight")
    save_file(state, folder / "lacking" / "model.safetensors")
    shutil.copytree(folder / "C", folder / "llama")
    about = json.loads((folder / "C" / "config.json").read_text())
    (folder / "llama" / "config.json").write_text(
        json.dumps({**about, "architectures": ["GPT2LMHeadModel"]})
    )
    good = '{"prompt": "x", "completion": "y"}\n'
    for name, text in {
        "malformed": good + '{"prompt": "x", \n',
        "empty": "",
        "field": good + '{"prompt": "x"}\n',
        "answer": good + '{"prompt": "x", "completion": " "}\n',
        "language": good + '{"prompt": "x", "completion": "y", "language": "xx"}\n',
        "list": '["x"]\n',
        "no-prompt": '{"answer": "y"}\n',
    }.items():
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "latin.jsonl").write_bytes(
        good.encode() + '{"prompt": "é", "completion": "y"}\n'.encode("latin-1")
    )
    write_jsonl(folder / "long.jsonl", [{"prompt": "x"}, {"prompt": "word " * 600}])
    for name, settings in {
        "unknown": {"learning_rat": 1},
        "type": {"weight_decay": "0.1"},
        "choice": {"schedule": "linear"},
        "list": [1],
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
    (folder / "half.json").write_text("{")
    (folder / "table.json").write_text(json.dumps({"en": str(folder / "A")}))
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("mine")
    (folder / "taken.jsonl").write_text("mine\n")
    train.run_one_stage(
        train.make_parser().parse_args(
            words("sft --model A --data sft.jsonl --out old --batch-size 8 --max-steps 1", folder)
        ),
        torch.device("cpu"),
    )
    return folder


FILES = (".json", ".jsonl")
FOLDERS = ("A", "B", "C", "RM", "other-RM", "lacking", "llama", "taken", "old", "new", "nowhere")


def words(line, folder):
    """A command line with its file and folder names made paths in `folder`."""
    return [str(folder / word) if word in FOLDERS or word.endswith(FILES) else word for word in line.split()]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def call(folder, in_process):
    return lambda program, line: in_process(program, *words(line, folder))


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


# mistakes

SFT = "sft --model A --out new --batch-size 2"
TRAIN_MISTAKES = {
    "--frobnicate": "unrecognized arguments: --frobnicate",
    "sft --frobnicate 3": "unrecognized arguments: --frobnicate 3",
    "dance": "invalid choice: 'dance'",
    "sft": "sft needs --model --data --out",
    "rl --model A --data prompts.jsonl --out new": "rl needs --reward-model",
    "rl --num-samples 1 --model A --data prompts.jsonl --reward-model RM --out new": "--num-samples 1: rloo",
    "rl --algorithm raft --gae-lambda 1 --model A --data prompts.jsonl --reward-model RM --out new": (
        "--gae-lambda 1.0 is for ppo; raft does not read it"
    ),
    "rl --algorithm ppo --gae-lambda 1.5 --model A --data prompts.jsonl --reward-model RM --out new": (
        "argument --gae-lambda: '1.5' must be a finite number of at least 0 and at most 1"
    ),
    "rl --gradient-steps 2 --max-steps 3 --model nowhere --data prompts.jsonl --reward-model RM --out new": (
        "--max-steps 3 is no multiple of --gradient-steps 2"
    ),
    f"{SFT} --data nowhere.jsonl": "nowhere.jsonl: cannot be read",
    f"{SFT} --data sft.jsonl nowhere.jsonl": "nowhere.jsonl: cannot be read",
    f"{SFT} --data sft.jsonl --eval-data nowhere.jsonl": "nowhere.jsonl: cannot be read",
    f"{SFT} --data A": "A: not a plain file (a folder, a pipe or a device)",
    f"{SFT} --data sft.jsonl --select rho --irreducible A": (
        "A: not a plain file; give one that train.py irreducible wrote"
    ),
    f"{SFT} --data malformed.jsonl": "malformed.jsonl:2: not JSON",
    f"{SFT} --data empty.jsonl": "empty.jsonl: the file is empty",
    f"{SFT} --data latin.jsonl": "latin.jsonl:2: not UTF-8",
    f"{SFT} --data field.jsonl": "field.jsonl:2: no example in keys ['prompt']",
    f"{SFT} --data answer.jsonl": "answer.jsonl:2: 'completion' is empty",
    f"{SFT} --data language.jsonl": "language.jsonl:2: unknown language 'xx'; ",
    f"{SFT} --data list.jsonl": "list.jsonl:1: a JSON list, not an object",
    f"{SFT} --data sft.jsonl --max-length 5": (
        "nothing to train on is left of 36 examples: 36 of 36 examples are longer than --max-length 5"
    ),
    f"{SFT} --data sft.jsonl --batch-size 40": "36 examples are fewer than one batch of 40",
    f"{SFT} --data sft.jsonl --batch-size 8 --micro-batch-size 3": (
        "--micro-batch-size 3 does not divide a rank's share of 8 examples; use a divisor of 8"
    ),
    f"{SFT} --data sft.jsonl --micro-batch-size -1": (
        "argument --micro-batch-size: '-1' must be a whole number of at least 0"
    ),
    f"{SFT} --data sft.jsonl --batch-size 0": (
        "argument --batch-size: '0' must be a whole number of at least 1"
    ),
    f"{SFT} --data sft.jsonl --max-steps -1": (
        "argument --max-steps: '-1' must be a whole number of at least 0"
    ),
    f"{SFT} --data sft.jsonl --epochs 0": "argument --epochs: '0' must be a finite number above 0",
    f"{SFT} --data sft.jsonl --learning-rate nan": (
        "argument --learning-rate: 'nan' must be a finite number above 0"
    ),
    f"{SFT} --data sft.jsonl --learning-rate fast": (
        "argument --learning-rate: 'fast' must be a finite number above 0"
    ),
    f"{SFT} --data sft.jsonl --schedule linear": "invalid choice: 'linear'",
    f"{SFT} --data sft.jsonl --config nowhere.json": "nowhere.json: cannot be read",
    f"{SFT} --data sft.jsonl --config half.json": "half.json: not JSON",
    f"{SFT} --data sft.jsonl --config unknown.json": (
        "unknown setting learning_rat; known: activation_checkpointing"
    ),
    f"{SFT} --data sft.jsonl --config list.json": "list.json: a JSON list, not an object",
    f"{SFT} --data sft.jsonl --config type.json": (
        "setting weight_decay (--weight-decay) must be a finite number of at least 0, got '0.1'"
    ),
    f"{SFT} --data sft.jsonl --config choice.json": (
        "setting schedule (--schedule) must be one of cosine constant, got 'linear'"
    ),
    "sft --model A --data sft.jsonl --out taken": (
        "taken exists and is not empty; give a new folder, or --resume"
    ),
    "sft --model A --data sft.jsonl --out old": "old exists and is not empty; give a new folder, or --resume",
    "sft --model A --data sft.jsonl --out taken.jsonl --batch-size 8": (
        "taken.jsonl exists and is no folder; give a new folder"
    ),
    "sft --model nowhere --data sft.jsonl --out new": "nowhere: not a model folder (no config.json)",
    "sft --model lacking --data sft.jsonl --out new": "model.layers.1.self_attn.o_proj.weight is missing",
    "sft --model llama --data sft.jsonl --out new": "architecture 'GPT2LMHeadModel' is not supported",
    "sft --model RM --data sft.jsonl --out new": "a reward model; sft trains language models",
    "sft --model A --tokenizer B --data sft.jsonl --out new": "--tokenizer goes with a preset",
    "sft --model smoke --tokenizer taken --data sft.jsonl --out new": "no tokenizer.json",
    "dpo --model A --data sft.jsonl --out new --batch-size 2": "sft.jsonl:1: no preference pair in keys",
    "rloo --model A --data prompts.jsonl --out new --reward-model B": (
        "B: a language model; give a folder that the reward stage wrote"
    ),
    "rloo --model A --data prompts.jsonl --out new --reward-model other-RM": "another tokenizer than --model",
    "rloo --model A --data long.jsonl --out new --reward-model RM --batch-size 2": "long.jsonl:2: ",
    "sft --resume nowhere": "no config.json in it",
    "dpo --resume old": "that is a run of 'sft', not 'dpo'",
    "sft --resume old --model B": "that run had another model",
    "sft --resume old --data held-out-sft.jsonl": "that run had other data: ",
    "sft --resume old --seed 3": "that run had seed 0, not 3",
    "recipe --out new --base A --prompts prompts.jsonl --teachers A B": (
        "your own pipeline also needs --arbiter"
    ),
    "recipe --out new --judge RM": "--judge, --eval-prompts and --columns go with --base",
    "recipe --out new --base A --prompts prompts.jsonl --teachers A B --arbiter RM --judge RM": (
        "--judge must not be the arbiter"
    ),
    "recipe --out taken": "taken exists and is not a run of the recipe",
    "--preset huge": "invalid choice: 'huge'",
}
ASK, POOL = (
    "--model A --prompts prompts.jsonl --out new.jsonl",
    "--models A B C --arbiter RM --prompts prompts.jsonl --out new.jsonl",
)
GENERATE_MISTAKES = {
    f"{ASK} --frobnicate": "unrecognized arguments: --frobnicate",
    "--prompt hello": "give either --model DIR or --models A B",
    f"{POOL} --model A": "give either --model DIR or --models A B",
    "--model A": "give one of --prompt TEXT, --prompts F.jsonl, --chat and --serve",
    "--model A --chat --prompt hello": "give one of --prompt TEXT, --prompts F.jsonl, --chat and --serve",
    "--model A --chat --serve": "give one of --prompt TEXT, --prompts F.jsonl, --chat and --serve",
    "--models A B C --serve": "--serve is for one process and one or two models",
    "--model A --serve --stop x": "without --out, --num-samples, --stop and --ignore-eos",
    "--model A --chat --port 8000": "--host, --port and --max-length go with --serve",
    "--model A --serve --port 99999": "argument --port: '99999' must be a whole number",
    "--model A --serve --host no.host.of.ours.invalid": "--host no.host.of.ours.invalid --port 8000: ",
    "--model A --serve --port 0 --max-length 513": "A has 512 positions",
    "--model A --serve --port 0 --batch-size 100000000": "are free; lower --batch-size to ",
    "--model RM --serve": "a reward model cannot generate",
    "--models A B --serve --arbiter RM": "--arbiter, --pairs and --table go with",
    "--models A B C --chat": "--chat is for one process and one or two models",
    "--model A --chat --num-samples 2": "--chat is for one process and one or two models",
    f"{ASK} --max-new-tokens 500": "A (512 positions, --max-new-tokens 500)",
    f"{ASK} --max-new-tokens 511": (
        "A (512 positions, --max-new-tokens 511) for a prompt; lower --max-new-tokens"
    ),
    f"{ASK} --temperature nan": "argument --temperature: 'nan' must be a finite number of at least 0",
    f"{ASK} --temperature 1e-40": "temperature 1e-40 must be 0 (greedy) or at least 1e-06",
    "--model A --prompts prompts.jsonl": "--prompts needs --out",
    "--model A --prompts nowhere.jsonl --out new.jsonl": "nowhere.jsonl: cannot be read",
    "--model A --prompts malformed.jsonl --out new.jsonl": "malformed.jsonl:2: not",
    "--model A --prompts empty.jsonl --out new.jsonl": "empty.jsonl: the file is empty",
    "--model A --prompts no-prompt.jsonl --out new.jsonl": "no-prompt.jsonl:1: no prompt in keys ['answer']",
    "--model A --prompts long.jsonl --out new.jsonl": "long.jsonl:2: ",
    "--model A --prompts prompts.jsonl --out taken.jsonl": (
        "taken.jsonl exists; give a new file, nothing is overwritten"
    ),
    f"{POOL} --pairs taken.jsonl": "taken.jsonl exists",
    f"{POOL} --pairs new.jsonl": "--pairs and --out are the same file",
    "--model nowhere --prompt hello": "nowhere: not a model folder",
    "--model lacking --prompt hello": "model.layers.1.self_attn.o_proj.weight is missing",
    "--model RM --prompt hello": "a reward model cannot generate",
    f"{POOL} --arbiter C": "--arbiter",
    "--models A B lacking --arbiter RM --prompts prompts.jsonl --out new.jsonl": (
        "lacking: the tensors do not fit config.json: model.layers.1"
    ),
    "--models A RM --prompts prompts.jsonl --out new.jsonl --route random": "a reward model cannot generate",
    "--models A B --prompts prompts.jsonl --out new.jsonl": "--route reward and --pairs need --arbiter RM",
    "--models A B --prompts prompts.jsonl --out new.jsonl --route random --pairs pairs-new.jsonl": (
        "--route reward and --pairs need --arbiter RM"
    ),
    "--models A B --prompts prompts.jsonl --out new.jsonl --route fixed": "--route fixed needs --table",
    "--models A B --prompts prompts.jsonl --out new.jsonl --route fixed --table table.json": (
        "table.json: names none of --models for ar"
    ),
    "--models A B --prompts prompts.jsonl --out new.jsonl --route fixed --table half.json": (
        "half.json: not JSON"
    ),
    f"{ASK} --arbiter RM": "--arbiter, --pairs and --table go with --models",
    f"{ASK} --num-samples 0": "argument --num-samples: '0' must be a whole number of at least 1",
    f"{ASK} --temperature -1": "argument --temperature: '-1' must be a finite number of at least 0",
    f"{ASK} --top-p 0": "argument --top-p: '0' must be a finite number above 0 and at most 1",
}


def assert_refused(call, folder, program, line, says):
    before = snapshot(folder)
    code, out, err = call(program, line)
    assert code == 2 and out == ""
    assert len(err) == 1 and err[0].startswith("error: ") and says in err[0], err
    after = snapshot(folder)
    shutil.rmtree(folder / "new", ignore_errors=True)                   # so that one failure is not all
    assert after == before


@pytest.mark.parametrize("line", TRAIN_MISTAKES)
def test_train_refuses_with_one_line_and_writes_nothing(line, call, folder):
    assert_refused(call, folder, train, line, TRAIN_MISTAKES[line])


@pytest.mark.parametrize("line", GENERATE_MISTAKES)
def test_generate_refuses_with_one_line_and_writes_nothing(line, call, folder):
    assert_refused(call, folder, generate, line, GENERATE_MISTAKES[line])


def test_an_output_in_a_folder_that_does_not_exist_is_refused_before_anything_is_sampled(call, folder):
    code, _, err = call(generate, f"--model A --prompts prompts.jsonl --out {folder}/no/such/new.txt")
    assert code == 2 and len(err) == 1 and "its folder does not exist; make it first" in err[0]


# train

def test_a_dry_run_prints_the_settings_and_writes_nothing(call, folder):
    before = snapshot(folder)
    code, out, err = call(
        train, "dpo --model A --data pairs.jsonl --out new --batch-size 4 --beta 0.5 --dry-run"
    )
    assert (
        code == 0
        and err == []
        and out.startswith(f"dpo of {folder}/A: ")
        and " parameters on 1 ranks, float32" in out
    )
    assert json.loads(out.split("\nsettings ")[1])["beta"] == 0.5
    assert snapshot(folder) == before


def test_flags_win_over_the_config_file_and_that_over_the_defaults(call, folder, tmp_path):
    (tmp_path / "settings.json").write_text(
        json.dumps({"batch_size": 4, "learning_rate": 2, "schedule": "constant"})
    )
    _, out, _ = call(
        train,
        f"sft --model A --data sft.jsonl --out new --config {tmp_path}/settings.json --batch-size 6"
        " --dry-run",
    )
    settings = json.loads(out.split("\nsettings ")[1])
    assert (settings["batch_size"], settings["learning_rate"], settings["schedule"], settings["epochs"]) == (
        6,
        2,
        "constant",
        2.0,
    )


@pytest.mark.parametrize(
    "line",
    [
        "pretrain --model smoke --data sft.jsonl",
        "sft --model A --data sft.jsonl --eval-data held-out-sft.jsonl",
        "reward --model A --data pairs.jsonl",
        "dpo --model B --data pairs.jsonl pairs.jsonl",
        "rl --model A --data prompts.jsonl --reward-model RM --num-samples 2 --max-new-tokens 4",
        "rloo --model A --data prompts.jsonl --reward-model RM --num-samples 2 --max-new-tokens 4",
        "rl --model A --data prompts.jsonl --reward-model RM --max-new-tokens 4 --algorithm ppo "
        "--gae-lambda 1 --num-samples 1 --clip 0.3",
    ],
)
def test_every_stage_runs_from_its_command_and_prints_the_model_folder(line, call, folder, tmp_path):
    code, out, err = call(train, f"{line} --out {tmp_path}/run --batch-size 4 --max-steps 2")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "run" / "model")
    model, _ = weights.load(tmp_path / "run" / "model")
    assert isinstance(model, weights.RewardModel) == line.startswith("reward")
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["model"].endswith(line.split()[2]) and about["settings"]["max_steps"] == 2


def test_a_run_of_a_preset_is_resumed_with_the_tokenizer_that_it_trained(call, folder, tmp_path):
    line = "pretrain --model smoke --data sft.jsonl --batch-size 4 --schedule constant --warmup-steps 0"
    for name, steps in (("whole", 4), ("parts", 2)):
        assert call(train, f"{line} --out {tmp_path}/{name} --max-steps {steps}")[0] == 0
    assert call(train, f"pretrain --resume {tmp_path}/parts --max-steps 4")[0] == 0
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole) and logged(
        tmp_path / "whole"
    ) == logged(tmp_path / "parts")


# generate

def test_one_prompt_is_answered_on_standard_output_with_one_line_of_speed_on_standard_error(call):
    code, out, err = call(generate, "--model A --prompt colours? --max-new-tokens 8 --temperature 0")
    assert code == 0 and out.strip()
    assert err[-1].startswith("1 prompts, 8 new tokens, ") and err[-1].endswith(
        "loading, compiling and scores"
    )
    assert call(generate, "--model A --prompt colours? --max-new-tokens 8 --temperature 0")[1] == out


def test_the_answers_keep_the_keys_of_their_prompts_and_say_how_they_were_made(call, folder, tmp_path):
    code, _, err = call(
        generate,
        f"--model A --prompts prompts.jsonl --out {tmp_path}/out.txt --num-samples 3 --max-new-tokens 6"
        " --seed 5",
    )
    assert code == 0 and err[-1].startswith("36 prompts, ")
    rows, prompts = read(tmp_path / "out.txt"), read(folder / "prompts.jsonl")
    assert len(rows) == 108 and [row["sample"] for row in rows[:6]] == [0, 1, 2, 0, 1, 2]
    for i, row in enumerate(rows):
        assert {k: row[k] for k in prompts[i // 3]} == prompts[i // 3]
        assert row.keys() - prompts[i // 3].keys() == {
            "completion",
            "num_tokens",
            "finish_reason",
            "logp",
            "model",
            "seed",
            "sample",
        }
        assert row["seed"] == 5 and row["finish_reason"] in ("stop", "length") and row["num_tokens"] <= 6
    assert len({row["completion"] for row in rows}) > 50


def test_greedy_twice_gives_the_same_file_and_so_does_the_same_seed_but_not_another(call, tmp_path):
    for name, flags in (
        ("g1", "--temperature 0"),
        ("g2", "--temperature 0 --seed 0"),
        ("s1", "--temperature 0.7 --seed 1"),
        ("s1-again", "--temperature 0.7 --seed 1 --batch-size 5"),
        ("s2", "--temperature 0.7 --seed 2"),
    ):
        assert (
            call(
                generate,
                f"--model A --prompts prompts.jsonl --out {tmp_path}/{name} --max-new-tokens 8 {flags}",
            )[0]
            == 0
        )
    texts = {
        name: [row["completion"] for row in read(tmp_path / name)]
        for name in ("g1", "g2", "s1", "s1-again", "s2")
    }
    assert (tmp_path / "g1").read_bytes() == (tmp_path / "g2").read_bytes()
    assert texts["s1"] == texts["s1-again"] != texts["s2"] and texts["g1"] != texts["s1"]


def test_several_models_and_an_arbiter_give_the_best_answers_and_the_pairs(call, folder, tmp_path):
    code, out, err = call(
        generate,
        f"--models A B C --arbiter RM --prompts prompts.jsonl --out {tmp_path}/best --pairs {tmp_path}/pairs"
        " --max-new-tokens 6 --temperature 1 --keep-cut",
    )
    assert code == 0 and err[-1].startswith("36 prompts, ")
    best, pairs, prompts = read(tmp_path / "best"), read(tmp_path / "pairs"), read(folder / "prompts.jsonl")
    assert [row["question_id"] for row in best] == [row["question_id"] for row in prompts]
    for row in best:
        assert set(row["scores"]) == {str(folder / name) for name in "ABC"} and row["teacher"] == max(
            row["scores"], key=row["scores"].get
        )
    assert len({row["teacher"] for row in best}) > 1 and 30 <= len(pairs) <= 36
    by_question = {row["question_id"] + row["language"]: row for row in best}
    for pair in pairs:
        kept = by_question[pair["question_id"] + pair["language"]]
        assert (
            pair["chosen"] == kept["completion"]
            and pair["rejected_reward"] == min(kept["scores"].values()) < pair["chosen_reward"]
        )
    assert "language" in out and "ties: 0" in out and f"pairs: {len(pairs)}" in out
    code, _, _ = call(
        train,
        f"dpo --model A --data {tmp_path}/pairs --out {tmp_path}/dpo --batch-size 4 --max-steps 1 --keep-cut",
    )
    assert code == 0  # what it writes is what the stages read
    assert (
        call(
            train,
            f"sft --model A --data {tmp_path}/best --out {tmp_path}/sft --batch-size 4 --max-steps 1"
            " --keep-cut",
        )[0]
        == 0
    )


def test_a_fixed_table_takes_each_languages_teacher_without_an_arbiter(call, folder, tmp_path):
    codes = {row["language"] for row in read(folder / "prompts.jsonl")}
    table = {code: str(folder / ("A" if code < "fr" else "B")) for code in codes}
    (tmp_path / "table").write_text(json.dumps(table))
    assert (
        call(
            generate,
            f"--models A B --route fixed --table {tmp_path}/table --prompts prompts.jsonl --out"
            f" {tmp_path}/out --max-new-tokens 4 --keep-cut",
        )[0]
        == 0
    )
    rows = read(tmp_path / "out")
    assert rows and all(row["teacher"] == table[row["language"]] for row in rows)


def test_every_prompt_format_is_read_and_its_keys_are_kept(call, tmp_path):
    """The Aya collection's inputs, m-ArenaHard's question_id, cluster and category, conversations with a
    system turn."""
    rows = [
        {"inputs": "Quelle couleur ?", "targets": "rouge", "language": "fr"},
        {"prompt": "colour?", "question_id": "q1", "cluster": "c", "category": "arena-hard-v0.1"},
        {
            "messages": [{"role": "system", "content": "brief"}, {"role": "user", "content": "colour?"}],
            "id": 7,
        },
    ]
    write_jsonl(tmp_path / "in", rows)
    assert (
        call(generate, f"--model A --prompts {tmp_path}/in --out {tmp_path}/out --max-new-tokens 4")[0] == 0
    )
    made = read(tmp_path / "out")
    assert [row["prompt"] for row in made[:2]] == ["Quelle couleur ?", "colour?"] and made[0][
        "language"
    ] == "fr"
    assert {k: made[1][k] for k in rows[1]} == rows[1] and made[2]["id"] == 7
    assert made[2]["prompt"] == rows[2]["messages"]


def test_ignore_eos_goes_on_to_the_limit_and_a_stop_text_ends_before_it(call, tmp_path):
    line = "--model A --prompts prompts.jsonl --max-new-tokens 60 --temperature 1"
    for name, flags in (("free", ""), ("on", "--ignore-eos"), ("cut", "--stop a e")):
        assert call(generate, f"{line} --out {tmp_path}/{name} {flags}")[0] == 0
    free, on, cut = (read(tmp_path / name) for name in ("free", "on", "cut"))
    assert (
        {row["num_tokens"] for row in on} == {60}
        and {row["finish_reason"] for row in on} == {"length"}
        and {row["finish_reason"] for row in free} == {"stop", "length"}
    )
    for whole, ended in zip(free, cut):
        first = min(
            [whole["completion"].find(s) for s in "ae" if s in whole["completion"]],
            default=len(whole["completion"]),
        )
        assert ended["completion"] == whole["completion"][:first]


def test_the_stop_ids_are_those_of_generation_config_and_the_end_of_turn(call, folder, tmp_path):
    shutil.copytree(folder / "A", tmp_path / "model")
    line = f"--model {tmp_path}/model --prompts prompts.jsonl --max-new-tokens 30 --temperature 1"
    assert call(generate, f"{line} --out {tmp_path}/before")[0] == 0
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [9, *range(100, 250)]})
    )
    assert call(generate, f"{line} --out {tmp_path}/after")[0] == 0
    before, after = read(tmp_path / "before"), read(tmp_path / "after")
    assert sum(row["num_tokens"] for row in after) < sum(row["num_tokens"] for row in before) / 2
    assert all(b["completion"].startswith(a["completion"]) for a, b in zip(after, before))


def test_the_memory_of_the_cache_is_said_before_the_run(call, tmp_path):
    _, _, err = call(
        generate,
        f"--model A --prompts prompts.jsonl --out {tmp_path}/out --max-new-tokens 8 --batch-size 4"
        " --num-samples 2",
    )
    assert err[0].startswith("A: KV cache of 4 rows x 128 tokens, 0.1 MB a rank")


def test_a_killed_run_goes_on_without_redoing_finished_prompts(call, folder, tmp_path, monkeypatch):
    """The answers hold every kind of line end that Unicode has: a journal once read with splitlines() took
    them for its own."""
    line = (
        "--model A --prompts prompts.jsonl --num-samples 2 --max-new-tokens 20 --temperature 1 --batch-size"
        f" 6 --out {tmp_path}/"
    )
    assert call(generate, line + "whole")[0] == 0
    made, add = [], Journal.add

    def add_and_die(journal, key, answers):
        made.append(key)
        add(journal, key, [{**a, "completion": a["completion"] + "\u2028\x85"} for a in answers])
        if len(made) in (5, 12):
            journal.file.write('["half a li')
            journal.file.flush()
            raise KeyboardInterrupt
    monkeypatch.setattr(Journal, "add", add_and_die)
    for finished in (5, 12):
        code, _, err = call(generate, line + "killed")
        kept = f"finished answers are in {tmp_path}/killed.partial, from which the same command resumes"
        assert code == 130 and err[-1] == f"stopped; {kept}"
        assert len(set(made)) == len(made) == finished and not (tmp_path / "killed").exists()
    code, _, err = call(generate, line + "killed --seed 1")
    assert code == 2 and err == [
        f"error: {tmp_path}/killed.partial holds an unfinished run with other seed; give the same settings to"
        " resume it, or remove it"
    ]
    code, _, err = call(generate, line + "killed")
    assert code == 0 and err[0] == "resumes: 12 of 36 prompts were finished before"
    assert len(set(made)) == len(made) == 36
    assert not (tmp_path / "killed.partial").exists()
    whole, killed = read(tmp_path / "whole"), read(tmp_path / "killed")
    assert [{**row, "completion": row["completion"].removesuffix("\u2028\x85")} for row in killed] == whole


# real processes

@pytest.mark.parametrize("file, line", [("train.py", f"{SFT} --data malformed.jsonl"),
                                        ("generate.py", "--model lacking --prompt hello")])
def test_a_mistake_in_a_process_of_its_own_is_exit_code_2_and_one_line_and_no_traceback(file, line, folder):
    done = program(file, *words(line, folder))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("file, line", [("train.py", "claims"), ("generate.py", "--model A --prompt hello")])
def test_ctrl_c_while_torch_is_imported_shows_no_traceback(file, line, folder, tmp_path):
    """It did and, worse, torch once swallowed it while it imported numpy, and trained with half of that."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: pass\n"
    )
    done = program(file, *words(line, folder), env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.long
def test_a_batch_that_does_not_divide_over_the_ranks_is_refused_once_for_all_ranks(folder):
    done = program(
        *TORCHRUN, "train.py", *words("sft --model A --data sft.jsonl --out new --batch-size 7", folder)
    )
    assert (
        done.returncode != 0
        and "error: --batch-size 7 does not divide over 2 ranks; use a multiple of 2" in done.stderr
    )
    assert done.stderr.count("error: ") == 1
    assert not (folder / "new").exists()


@pytest.mark.long
def test_torchrun_writes_the_file_of_one_process_to_the_last_byte(call, folder, tmp_path):
    """Also where a run of one process was killed; on the CPU in fp32 even the log-probs are the same."""
    line = "--model A --prompts prompts.jsonl --num-samples 3 --max-new-tokens 40 --temperature 0.7"
    assert call(generate, f"{line} --out {tmp_path}/one")[0] == 0
    assert (
        call(generate, f"{line} --out {tmp_path}/two --batch-size 2")[0] == 0
    )  # to learn where its journal lies
    (tmp_path / "two").unlink()
    command = [sys.executable, "generate.py", *words(f"{line} --out {tmp_path}/two --batch-size 1", folder)]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while (
        time.time() < deadline
        and started.poll() is None
        and not any(path.stat().st_size for path in (tmp_path / "two.partial").glob("*.jsonl"))
    ):
        time.sleep(0.002)
    started.send_signal(signal.SIGKILL)
    started.wait()
    done = program(*TORCHRUN, "generate.py", *words(f"{line} --out {tmp_path}/two", folder))
    assert done.returncode == 0 and "resumes: " in done.stderr, done.stderr[-3000:]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.long
def test_torchrun_generates_what_one_process_generates(call, folder, tmp_path):
    line = "--models A B --arbiter RM --prompts prompts.jsonl --max-new-tokens 8 --temperature 0.7 --keep-cut"
    assert call(generate, f"{line} --out {tmp_path}/one --pairs {tmp_path}/one-pairs")[0] == 0
    done = program(*TORCHRUN, "generate.py",
                   *words(f"{line} --out {tmp_path}/two --pairs {tmp_path}/two-pairs", folder))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("", "-pairs"):
        one, two = (
            [
                {k: v for k, v in row.items() if "reward" not in k and k != "scores"}
                for row in read(tmp_path / f"{ranks}{name}")
            ]
            for ranks in ("one", "two")
        )
        assert one == two
