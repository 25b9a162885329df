"""Seconds a step and peak memory of aya_min and of TRL: same weights, same data, fp32, each run a process of
its own, in turn.

    pip install trl && OMP_NUM_THREADS=2 python tests/bench/train_speed.py [--rounds 3] [--stages sft dpo
    rloo ppo] [--loaded]

The 5.6M-parameter Cohere model; prompts of 32 words, answers of 32-96 words; SFT with 16 examples a step, DPO
with 16 pairs (reference pass counted), RLOO with 4 prompts x 4 completions of 64 tokens, PPO with 16 prompts
x 1 completion, one gradient step on each batch, and a critic as small as the reward model. TRL runs without
gradient checkpointing, without dropout, AdamW. The last TRL with PPO is 1.12.0 (trl.experimental.ppo).
Figures: median seconds of the steps after the
third, over the rounds the median [least, most]; peak resident memory of the process. --loaded: another
process keeps a core busy meanwhile. "matmuls" is the time of one step's large matmuls alone
(forward and both halves of the backward, the tokens of a step without padding) by torch's F.linear.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from aya_min import rollouts, stages, weights                                              # noqa: E402
from aya_min.model_config import ModelConfig                                            # noqa: E402
from aya_min.model import CohereForCausalLM, RewardModel, init_weights                  # noqa: E402
from aya_min.tokenizer import load_tokenizer, train_tokenizer                           # noqa: E402
from aya_min.files import write_jsonl                                                   # noqa: E402
from tests.bench.step_speed import busy_process                                         # noqa: E402

SIZES = dict(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)
STEPS = {"sft": 16, "dpo": 10, "rloo": 10, "ppo": 10}
SYLLABLES = [a + b + c for a in "bcdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s", "l")]


def make(folder):
    """model/, reward/ (a small one, so that its time does not count) and sft.jsonl, pairs.jsonl,
    prompts.jsonl."""
    rng = random.Random(0)
    lexicon = ["".join(rng.choices(SYLLABLES, k=2)) for _ in range(3500)]
    say = lambda n: " ".join(rng.choices(lexicon, k=n))
    answer = lambda: say(rng.randint(32, 96))
    rows = [
        {"prompt": say(32), "completion": answer(), "chosen": answer(), "rejected": answer()}
        for _ in range(512)
    ]
    write_jsonl(folder / "sft.jsonl", [{k: row[k] for k in ("prompt", "completion")} for row in rows])
    write_jsonl(
        folder / "pairs.jsonl", [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
    )
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    tokenizer = train_tokenizer([" ".join(row.values()) for row in rows], 4096)
    sizes = dict(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.end_of_turn_id)
    weights.save(
        folder / "model",
        init_weights(
            CohereForCausalLM(ModelConfig(**SIZES, **sizes)), torch.Generator().manual_seed(0)
        ),
        tokenizer,
    )
    small = {
        **SIZES,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    weights.save(
        folder / "reward",
        init_weights(RewardModel(ModelConfig(**small, **sizes)), torch.Generator().manual_seed(0)),
        tokenizer,
    )


def run_ours(stage, folder, out, compile):
    settings = dict(
        batch_size=4 if stage == "rloo" else 16,
        max_steps=STEPS[stage],
        max_length=512,
        learning_rate=1e-5,
        save_every=0,
    )
    (model, tokenizer), more = weights.load(folder / "model"), {}
    if stage in ("rloo", "ppo"):
        settings |= dict(num_samples=4 if stage == "rloo" else 1, max_new_tokens=64, algorithm=stage)
        more["reward_model"] = weights.load(folder / "reward")[0]
        stage, answer_rows, sampled = "rl", rollouts.answer_rows, []

        def timed_answers(*args, **kwargs):
            begin = time.perf_counter()
            answers = answer_rows(*args, **kwargs)
            sampled.append(time.perf_counter() - begin)
            return answers
        rollouts.answer_rows = timed_answers
    settings_class, data = (
        stages.stage_named(stage).settings,
        {"sft": "sft", "dpo": "pairs", "rl": "prompts"}[stage],
    )
    if stage == "dpo":  # the reference pass over the pairs that the steps use, no more
        rows = (folder / "pairs.jsonl").read_text(encoding="utf-8").split("\n")[:16 * STEPS["dpo"]]
        (out.parent / "few.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        folder, data = out.parent, "few"
        reference = stages.store_reference

        def timed(*args):
            begin = time.perf_counter()
            reference(*args)
            more["reference"] = (time.perf_counter() - begin) / STEPS["dpo"]
        stages.store_reference = timed
    stages.train_stage(
        stage,
        model,
        tokenizer,
        [folder / f"{data}.jsonl"],
        settings_class(**settings),
        out,
        torch.device("cpu"),
        **{k: v for k, v in more.items() if k == "reward_model"},
    )
    seconds = [
        json.loads(line)["seconds"]
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        if '"seconds"' in line
    ]
    if stage == "rl":
        print(f"sampling is {median(sampled[3:]) / median(seconds[3:]):.0%} of a step")
    return [s + more.get("reference", 0) for s in seconds]


def run_trl(stage, folder, out, compile):
    import datasets
    import transformers
    import trl
    datasets.disable_progress_bars()
    seconds = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.start)

    common = dict(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=STEPS[stage],
        per_device_train_batch_size=16,
        learning_rate=1e-5,
    )
    rows = [
        json.loads(line)
        for line in (folder / {"sft": "sft", "dpo": "pairs"}.get(stage, "prompts"))
        .with_suffix(".jsonl")
        .read_text(encoding="utf-8")
        .split("\n")[:-1]
    ]
    turn = lambda role, text: [{"role": role, "content": text}]
    data = datasets.Dataset.from_list(
        [{k: turn("user" if k == "prompt" else "assistant", v) for k, v in row.items()} for row in rows]
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    start = time.perf_counter()
    if stage == "sft":
        trainer = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(max_length=512, **common),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
    elif stage == "dpo":
        trainer = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(max_length=512, beta=0.1, **common),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
    elif stage == "ppo":
        return run_trl_ppo(folder, common, data, tokenizer, model)
    else:
        trainer = trl.RLOOTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(len(c[0]["content"])) for c in completions],
            train_dataset=data,
            processing_class=tokenizer,
            args=trl.RLOOConfig(num_generations=4, max_completion_length=64, beta=0.03, **common),
            callbacks=[Clock()],
        )
    del start
    trainer.train()
    return seconds


def run_trl_ppo(folder, common, data, tokenizer, policy):
    """Seconds between the ends of TRL's PPO steps. transformers has no Cohere model with a score: its trunk
    and a linear layer make one, of our small reward model's size."""
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    ends = [time.perf_counter()]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    class Scored(torch.nn.Module):
        base_model_prefix = "model"

        def __init__(self):
            super().__init__()
            config = transformers.AutoConfig.from_pretrained(folder / "reward")
            self.config, self.model = config, transformers.AutoModel.from_config(config, dtype=torch.float32)
            self.score = torch.nn.Linear(config.hidden_size, 1, bias=False)

    data = data.map(lambda row: tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True,
                                                              return_dict=True), remove_columns=["prompt"])
    count = common.pop("max_steps")
    args = PPOConfig(total_episodes=16 * count, num_ppo_epochs=1, num_mini_batches=1, response_length=64,
                     temperature=1.0, num_sample_generations=0, local_rollout_forward_batch_size=16, **common)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    PPOTrainer(args=args, processing_class=tokenizer, model=policy, ref_model=reference,
               reward_model=Scored(), value_model=Scored(), train_dataset=data, callbacks=[Clock()]).train()
    return [b - a for a, b in zip(ends, ends[1:])]


def child(tool, stage, folder, out, compile):
    seconds = {"aya_min": run_ours, "TRL": run_trl}[tool](stage, Path(folder), Path(out), compile)
    print(
        json.dumps(
            {
                "seconds": median(seconds[3:]),
                "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            }
        )
    )


def matmul_seconds(tokens, supervised, vocab_size):
    """Forward and backward (three products of the same size) of all large matrices for a step's tokens;
    the median of 5."""
    heads = (SIZES["num_attention_heads"] + 2 * SIZES["num_key_value_heads"]) * 32
    shapes = [(heads + 2 * 768, 256, tokens), (256, 256 + 768, tokens)] * 6 + [(vocab_size, 256, supervised)]
    data = [(torch.randn(n, k), torch.randn(m, k), torch.randn(m, n)) for n, k, m in shapes]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for weight, x, gradient in data:
            torch.nn.functional.linear(x, weight), gradient @ weight, gradient.t() @ x
        times.append(time.perf_counter() - start)
    return median(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", default=list(STEPS))
    parser.add_argument("--child", nargs=5)
    parser.add_argument("--loaded", action="store_true")
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    import trl
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch"
        f" {torch.__version__}, TRL {trl.__version__}, fp32{', beside a busy process' if args.loaded else ''}"
    )
    with tempfile.TemporaryDirectory() as folder, busy_process(args.loaded):
        folder = Path(folder)
        make(folder)
        tokenizer = load_tokenizer(folder / "model")
        rows = [
            json.loads(line) for line in (folder / "sft.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        ]
        supervised = sum(len(tokenizer.encode(row["completion"])) + 1 for row in rows) / len(rows)
        tokens = supervised + sum(len(tokenizer.encode_prompt(row["prompt"])) for row in rows) / len(rows)
        print(
            f"{tokens:.0f} tokens an example, {supervised:.0f} of them supervised; their matmuls for 16"
            " examples alone:"
            f" {matmul_seconds(round(16 * tokens), round(16 * supervised), tokenizer.vocab_size):.3f} s"
        )
        for stage in args.stages:
            results = {"TRL": [], "aya_min": []}
            for i in range(args.rounds):
                for tool, made in results.items():
                    with tempfile.TemporaryDirectory() as out:
                        done = subprocess.run(
                            [sys.executable, __file__, "--child", tool, stage, folder, f"{out}/run", ""],
                            capture_output=True,
                            text=True,
                        )
                    if done.returncode:
                        sys.exit(done.stderr[-3000:])
                    *said, found = done.stdout.strip().split("\n")
                    made.append(json.loads(found) | {"said": [line for line in said if "sampling" in line]})
            text, middle = [], {}
            for tool, made in results.items():
                seconds = sorted(m["seconds"] for m in made)
                middle[tool] = median(seconds)
                text.append(
                    f"{tool} {middle[tool]:.3f} [{seconds[0]:.3f}, {seconds[-1]:.3f}] s a step,"
                    f" {max(m['gigabytes'] for m in made):.2f} GB {' '.join(made[0]['said'])}"
                )
            print(
                f"{stage:5} {text[0]}   {text[1]}   ratio {middle['TRL'] / middle['aya_min']:.2f}", flush=True
            )


if __name__ == "__main__":
    main()
