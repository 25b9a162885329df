"""train.py, generate.py, merge.py and the evaluation on models of other families than Cohere's, as a user
types them; and a pool of several families, each with a tokenizer of its own."""

import json

import pytest
from small import TORCHRUN, logged, program
from test_families import SMALL, small
from test_serve import ask, running

import generate
import merge
import train
from aya_min import evaluate, weights
from aya_min.model import RewardModel, SequenceClassifier
from aya_min.sampling import answer_rows
from aya_min.serve_batch import Batch

BRIEF = "--max-new-tokens 6"


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run(in_process, tmp_path, world):
    """run(program, line) must end well; words with a slash are paths, world/... of the session's data.
    -> standard output"""
    def run(command, line):
        words = [str(world / word.removeprefix("world/")) if word.startswith("world/") else
                 str(tmp_path / word) if "/" in word else word for word in line.split()]
        code, out, err = in_process(command, *words)
        assert not code, (line, err)
        return out
    return run


def test_a_pool_of_three_families_and_an_arbiter_of_a_fourth_give_pairs_that_a_student_learns(run, tmp_path):
    """Each model reads and writes its own tokens; what passes between them is text."""
    teachers = ("llama", "qwen3", "mistral")
    for seed, family in enumerate(teachers):
        weights.save(tmp_path / "m" / family, *small(family, seed=seed))
    weights.save(tmp_path / "m" / "rm", *small("gemma3", SequenceClassifier, 3))
    run(generate, f"--models m/llama m/qwen3 m/mistral --arbiter m/rm --prompts world/prompts.jsonl "
                  f"--out m/best.jsonl --pairs m/pairs.jsonl --temperature 1 --keep-cut {BRIEF}")
    best = read(tmp_path / "m" / "best.jsonl")
    assert len(best) == 36 and len({row["teacher"] for row in best}) > 1
    assert all(len(row["scores"]) == 3 and row["scores"][row["teacher"]] == max(row["scores"].values())
               for row in best)
    run(train, "dpo --model m/qwen3 --data m/pairs.jsonl --out m/dpo --batch-size 4 --max-steps 1 --keep-cut")
    run(evaluate, "arena --answers m/best.jsonl --baseline m/best.jsonl --judge m/rm --out m/arena.json")
    assert "50" in (tmp_path / "m" / "arena.json").read_text()


STAGES = {"pretrain": "sft", "sft": "sft", "reward": "pairs", "dpo": "pairs", "kto": "labelled",
          "rl": "prompts"}


@pytest.mark.long
@pytest.mark.parametrize("family", SMALL)
def test_every_command_takes_a_family(family, run, tmp_path, world):
    for seed in (0, 1):
        weights.save(tmp_path / "m" / str(seed), *small(family, seed=seed))
    for name, architecture in (("rm", RewardModel), ("last", SequenceClassifier)):
        weights.save(tmp_path / "m" / name, *small(family, architecture, 3))
    config = weights.read_config(tmp_path / "m" / "0")[0]
    for stage, file in STAGES.items():
        beside = " --reward-model m/last --num-samples 2 --max-new-tokens 4" if stage == "rl" else ""
        line = (f"{stage} --model m/0 --data world/{file}.jsonl --out m/{stage} --batch-size 4 --max-steps 2 "
                f"--schedule constant --warmup-steps 0{beside}")
        assert "parameters" in run(train, f"{line} --dry-run")
        run(train, line)
        run(train, f"{stage} --resume m/{stage} --max-steps 3")
        assert len(logged(tmp_path / "m" / stage)) == 3
        made = weights.load(tmp_path / "m" / stage / "model")[0]
        assert vars(config).items() <= vars(made.config).items()        # a reward model's says more
        assert isinstance(made, RewardModel) == (stage == "reward")
    run(train, "reward --model m/0 --data world/pairs.jsonl --out m/reward-last --batch-size 4 --max-steps 1 "
               "--head last-token")
    assert type(weights.load(tmp_path / "m/reward-last/model")[0]) is SequenceClassifier
    run(generate, f"--model m/sft/model --prompts world/prompts.jsonl --out m/a.jsonl {BRIEF}")
    run(generate, f"--model m/1 --prompts world/prompts.jsonl --out m/b.jsonl {BRIEF}")
    for judge in ("rm", "reward-last/model"):
        run(evaluate, f"arena --answers m/a.jsonl --baseline m/b.jsonl --judge m/{judge} "
                      f"--out m/{judge.replace('/', '-')}.json")
    for method in ("linear m/0 m/1", "ties m/0 m/1 --base m/sft/model"):
        run(merge, f"{method} --out m/{method[:4]}")
        assert weights.load(tmp_path / "m" / method[:4])[0].config == config


@pytest.mark.long
@pytest.mark.parametrize("family", SMALL)
def test_two_ranks_the_terminal_and_the_server_answer_as_generate_does(family, run, tmp_path, world):
    model, own = small(family)
    weights.save(tmp_path / "m", model, own)
    line = ["--model", tmp_path / "m", *BRIEF.split(), "--temperature", "0"]
    for out, start in (("one.jsonl", []), ("two.jsonl", TORCHRUN)):
        done = program(*start, "generate.py", *line, "--prompts", world / "prompts.jsonl", "--out",
                       tmp_path / out)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    [[answer]] = answer_rows(model, own, [{"prompt": "red?"}], max_new_tokens=6, temperature=0)
    said = program("generate.py", *line, "--chat", input="red?\n")
    assert said.returncode == 0 and answer["completion"].strip() in said.stdout, (answer, said)
    with running(Batch("m0", model, own, 4, 256)) as port:
        made = ask(port, temperature=0, max_tokens=6)["choices"][0]["message"]["content"]
    assert made == answer["completion"]
