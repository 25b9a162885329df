"""What several tests share: a tokenizer of 400 tokens, random models of two layers, files of the embedded
world, each stage run on them, and programs that are started.

test_distributed.py starts this file under torchrun; then it runs what must not depend on the number of
ranks.
"""

import gc
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aya_min import checkpoint, config, distributed, model_config, stages, tensorfiles, weights
from aya_min.classifier import Classifier, ClassifierConfig, SideNet, SideNetConfig
from aya_min.data import batches_in_order, collate, load_examples, load_prompts, make_batches, slots_of
from aya_min.loop import evaluate, train
from aya_min.losses import sft_loss
from aya_min.model import CohereForCausalLM, RewardModel, Router, RouterConfig, init_weights
from aya_min.reference import answer_logps
from aya_min.reward import score_texts
from aya_min.sampling import answer_rows
from aya_min.tokenizer import train_tokenizer
from aya_min.files import write_jsonl
from aya_min.world import answer, gold_answer, questions

CPU = torch.device("cpu")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FILES = {"pretrain": "sft.jsonl", "sft": "sft.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl",
         "kto": "labelled.jsonl", "rl": "prompts.jsonl", "router": "candidates.jsonl",
         "classify": "classified.jsonl", "sidenet": "classified.jsonl"}
EVERY = {name: (partial(stages.train_stage, name), about.settings, FILES[name])
         for name, about in stages.STAGES.items()}
STAGES = {name: stage for name, stage in EVERY.items() if name != "pretrain"}       # sft does the same


@cache
def tokenizer():
    return train_tokenizer((q["prompt"] for q in questions("train", 480, 0, level="tiny")), 400)


def make(architecture, seed, **changes):
    """Weights large enough that what a token says depends on all tokens before it."""
    sizes = dict(vocab_size=tokenizer().vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, logit_scale=1.0, max_position_embeddings=512,
                 initializer_range=0.2, eos_token_id=tokenizer().end_of_turn_id)
    model = architecture(model_config.ModelConfig(**{**sizes, **changes}))
    return init_weights(model, torch.Generator().manual_seed(seed))


def language_model(seed=0, **changes):
    return make(CohereForCausalLM, seed, **changes)


def reward_model(seed=1, **changes):
    return make(RewardModel, seed, **changes)


def router(seed=2, teachers="TUV", **changes):
    """A router whose head is drawn, as one of zeros says nothing of the decoder."""
    own = dict(teachers=list(teachers), tau=1.0)
    model = make(lambda config: Router(RouterConfig.of(config, **own)), seed, **changes)
    torch.nn.init.normal_(model.router.weight, generator=torch.Generator().manual_seed(seed))
    return model


LABELS = ["largest", "odd", "opposite", "reverse", "translate"]         # the tasks of the embedded world


def classifier(seed=3, pooling="mean", **changes):
    return make(lambda config: Classifier(ClassifierConfig.of(config, labels=LABELS, pooling=pooling)), seed,
                **changes)


def side_net(seed=4, layer=1, size=16, **changes):
    """A SideNet whose output layer is drawn, as one of zeros says nothing."""
    own = dict(labels=LABELS, pooling="mean", sidenet_layer=layer, sidenet_size=size)
    model = make(lambda config: SideNet(SideNetConfig.of(config, **own)), seed, **changes)
    torch.nn.init.normal_(model.out.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return model


FRESH = {"reward": reward_model, "router": router, "classify": classifier,
         "sidenet": side_net}      # a stage's model; of the others a language model


def write_world(folder, count=36):
    """Write sft.jsonl, pairs.jsonl, labelled.jsonl, prompts.jsonl, classified.jsonl, candidates.jsonl and a
    short held-out file of each. An answer has from one word to several sentences."""
    rng = random.Random(0)
    for name, split, size in (("", "train", count), ("held-out-", "validation", 10)):
        rows = questions(split, size, 0, level="tiny")
        gold = [" ".join([gold_answer(q)] * rng.randint(1, 4)) if rng.random() < 0.5 else q["args"][0]
                for q in rows]
        write_jsonl(folder / f"{name}sft.jsonl", [{**q, "completion": text} for q, text in zip(rows, gold)])
        pairs = [{**q, "chosen": text, "rejected": answer(rng, q, (0, 1, 1, 1))[0]}
                 for q, text in zip(rows, gold)]
        write_jsonl(folder / f"{name}pairs.jsonl", pairs)
        write_jsonl(folder / f"{name}prompts.jsonl", rows)
        write_jsonl(folder / f"{name}labelled.jsonl",
                    [{**q, "completion": pair["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
                     for i, (q, pair) in enumerate(zip(rows, pairs))])
        write_jsonl(folder / f"{name}classified.jsonl", [
            {"text": q["prompt"], "label": q["task"], "language": q["language"], "id": q["question_id"]}
            for q in rows])
        rewards = random.Random(split)
        write_jsonl(folder / f"{name}candidates.jsonl", [{**q, "candidates": [
            {"teacher": t, "completion": text, "reward": rewards.gauss(0, 1)} for t in "TUV"]}
            for q, text in zip(rows, gold)])
    return folder


def program(*words, **options):
    """Run Python with these words in a process of its own, to its end. -> what subprocess.run returns"""
    options = dict(cwd=ROOT, capture_output=True, text=True, timeout=300) | options
    return subprocess.run([sys.executable, *map(str, words)], **options)


def on_ranks(ranks, function, *args, timeout=60):
    """Run function(*args) on this number of ranks (gloo), forked from this process, which has torch imported.
    All must end well. timeout: seconds of a collective. -> what each returns"""
    def one_rank(rank):
        # A group that this process's parent left as garbage would wait, when collected here, for its threads.
        gc.freeze()
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        distributed.setup(timeout)
        # a rank that refuses at once must not be gone before the others have connected to it
        distributed.gather_objects(None)
        results.put((rank, function(*args)))
        distributed.close()

    # of the meshes of this process's dry runs torch remembers that it was rank 0
    with suppress(AttributeError):                      # torch 2.11 has other names for it
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
        torch._C._clear_DTensor_sharding_propagator_cache()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    processes = [fork.Process(target=one_rank, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * ranks, codes
    return [result for _, result in sorted((results.get() for _ in processes), key=lambda pair: pair[0])]


VARIANTS = {"sft-recomputed": dict(activation_checkpointing=True),
            "sft-untied": dict(architecture=dict(tie_word_embeddings=False, use_qk_norm=True)),
            **{f"{stage}-bfloat16": dict(dtype="bfloat16", max_steps=1) for stage in STAGES},
            # Two batches of two steps: the second has what the first left in the critic and in the baseline.
            **{f"rl-{name}": dict(algorithm=name, max_steps=4, gradient_steps=2, max_new_tokens=8, **more)
               for name, more in (("reinforce", {}), ("vanilla-pg", {}), ("raft", {}),
                                  ("ppo", dict(cut_answers="penalize", clip=0.02)),
                                  ("grpo", dict(normalize_advantages=True, reward_noise=0.5)))}}


def run(stage, data, out, resume=False, held_out=False, architecture={}, start=None, device=CPU, **changes):
    """Run a stage on write_world's files in this process (or on these ranks), from a model folder or from
    fresh weights. -> its run folder"""
    function, settings_class, file = STAGES[stage]
    values = dict(batch_size=8, max_steps=3, learning_rate=1e-3, warmup_steps=2, max_length=256)
    values |= {"reward": dict(lm_weight=0.3), "dpo": dict(nll_weight=0.2),
               "rl": dict(num_samples=2, max_new_tokens=12), "router": dict(held_out=0.0)}.get(stage, {})
    if start:
        model, _ = weights.load(start, sharded=True)
    else:
        model = FRESH.get(stage, language_model)(**architecture)
    more = {}
    if stage == "rl":
        more["reward_model"] = reward_model()
    if "reference_logps" in changes:
        more["reference_logps"] = changes.pop("reference_logps")
    if held_out:
        more["eval_data"] = [data / f"held-out-{file}"]
    settings = settings_class(**{**values, **changes})
    function(model, tokenizer(), [data / file], settings, out, device, resume=resume, **more)
    return out


def logged(run_folder):
    """The rows of metrics.jsonl without what a clock says."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")}
            for line in lines]


def state_of(run_folder, step=None):
    """{name: whole tensor} of a run's saved state, the newest unless a step is given, put together from the
    ranks' files without the code under test."""
    states, pieces = run_folder / "state", {}
    folder = checkpoint.saved_states(states)[-1] if step is None else states / f"step-{step}"
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():
                pieces.setdefault(name, []).append((places[name]["saved_offsets"], file.get_tensor(name)))
    whole = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        whole[name] = torch.cat([tensor for _, tensor in parts])
        starts = [sum(len(t) for _, t in parts[:i]) for i in range(len(parts))]
        assert [offsets[0] for offsets, _ in parts] == starts, name
    return whole


def assert_close(rows, others, **tolerance):
    """The same keys, the same numbers, row by row."""
    assert len(rows) == len(others)
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        for key in row:
            torch.testing.assert_close(float(row[key]), float(other[key]), **tolerance,
                                       msg=lambda m: f"step {row['step']}, {key}: {m}")


# ---- what test_distributed.py compares between one rank and two --------------------------------------------

def refusal(function, *args, **kwargs):
    """The text of the ValueError that every rank must raise, rank by rank."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return distributed.gather_objects(str(error))
    return distributed.gather_objects(None)


def loaded_sharded(model, folder, **options):
    """Save a model on these ranks and load it sharded. -> for each rank how many parameters it holds and
    how many it read, and the names of what is not as it was"""
    weights.save(folder, model, tokenizer(), shard_bytes=30_000)
    numbers, read = [], tensorfiles.read

    def counting(header, name, rows, stored=None):
        numbers.append(read(header, name, rows, stored).numel())
        return read(header, name, rows, stored)

    torch.use_deterministic_algorithms(True)            # new memory is filled with NaN
    tensorfiles.read = counting
    loaded, _ = weights.load(folder, sharded=True, **options)
    tensorfiles.read = read
    torch.use_deterministic_algorithms(False)
    held = sum(distributed.own_rows(t)[0].numel() for t in loaded.state_dict().values())
    whole = distributed.full_state(loaded)
    return {"held and read": distributed.gather_objects([held, sum(numbers)]),
            "all": sum(t.numel() for t in whole.values()),
            "not finite": [name for name, t in whole.items() if not t.isfinite().all()],
            "differ": [name for name, t in model.state_dict().items()
                       if name not in whole or not torch.equal(t, whole[name])]}


def on_these_ranks(world, out):
    """Every stage, sampling, scoring and what must be refused by all ranks together. -> a JSON object of
    results, on every rank"""
    share = 2 if distributed.num_ranks() > 1 else 0     # two micro-batches a rank, or the whole batch at once
    for stage in STAGES:
        run(stage, world, out / stage, held_out=True, micro_batch_size=share)
    for name, changes in VARIANTS.items():
        run(name.split("-")[0], world, out / name, micro_batch_size=share, **changes)
    odd = dict(model_type="cohere2", sliding_window=4, vocab_size=401, tie_word_embeddings=False)
    loaded = {"language model": loaded_sharded(language_model(**odd), out / "language-model"),
              "reward model": loaded_sharded(reward_model(), out / "reward-model"),
              "trunk": loaded_sharded(language_model(), out / "start", trunk=True)}
    run("sft", world, out / "sft-loaded", micro_batch_size=share, held_out=True, start=out / "start")

    rows = load_prompts([world / "prompts.jsonl"])[:9]
    model, judge = language_model(), reward_model()
    answers = answer_rows(model, tokenizer(), rows, 2, 12, temperature=0.7, seed=3, batch_size=4)
    texts = [{**row, **group[0]} for row, group in zip(rows, answers)]
    scores = score_texts(judge, tokenizer(), texts, batch_size=2)
    long = [rows[0], {"prompt": "word " * 600}, *rows[1:]]

    def held_out(n):
        batches = batches_in_order(few[:n], lambda some: collate(some, slots=slots_of(few)), size=1)
        return evaluate(model, sft_loss, batches, CPU)

    few = load_examples([world / "held-out-sft.jsonl"], tokenizer(), 256, config.SFT())[:3]
    examples = load_examples([world / "sft.jsonl"], tokenizer(), 256, config.SFT())
    five = examples[:5]                                 # two batches of one rank, one of the other
    sharded = distributed.shard(language_model())
    logps = answer_logps(sharded, five, 0, CPU, config.SFT(), size=2).tolist()

    def nan_on_the_last_rank(model, batch):
        loss, metrics = sft_loss(model, batch)
        last = distributed.rank() == distributed.num_ranks() - 1
        return loss * (float("nan") if last else 1), metrics

    settings, trained = config.SFT(batch_size=8, max_steps=1, learning_rate=1.0), language_model()
    num_steps, batches = make_batches(examples, collate, settings)
    not_finite = refusal(train, trained, num_steps, batches, nan_on_the_last_rank, settings, out / "sft", CPU)
    after = {name: distributed.full(p.data) for name, p in trained.named_parameters()}
    moved = [name for name, p in language_model().named_parameters() if not torch.equal(p, after[name])]
    return {"loaded": loaded, "answers": answers, "scores": scores, "logps": logps, "not_finite": not_finite,
            "moved": moved, "too_long": refusal(answer_rows, model, tokenizer(), long, 1, 12),
            "main": refusal(distributed.from_main, lambda: int("x")),
            "few_held_out": [held_out(1), held_out(3)]}


def main():
    world, out = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.setup()
    results = on_these_ranks(world, out)
    run("sft", world, out.parent / "resumed", resume=True, max_steps=8, schedule="constant", held_out=True,
        eval_every=4)
    if distributed.is_main():
        (out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    distributed.leave(0)


if __name__ == "__main__":
    main()
