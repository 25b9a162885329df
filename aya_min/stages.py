"""The training stages side by side: pretrain, sft, reward, dpo, rloo. Each is (model, batches, loss function, evaluation); loop.train does the rest.

Every stage takes a model (with its tokenizer), JSONL files, settings and a run folder, leaves config.json, metrics.jsonl, eval.json, state/ and
model/ in the folder, and returns the path of model/.
"""

import json
import math
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from . import __version__, distributed, weights
from .config import check_training
from .data import (Example, Sampler, batches_in_order, by_language, collate, collate_pairs, count_steps, language_slot, load_examples,
                   load_pairs, load_prompts, make_batches)
from .loop import evaluate, train
from .losses import bradley_terry_loss, dpo_loss, kl_shaped_rewards, rloo_advantages, sum_by_row
from .model import CohereForCausalLM
from .reward import score_texts
from .sampling import answer_rows, check_lengths


# ---- loss functions: (model, batch) -> (sum over the batch's units, {name: (2, languages) sums and counts}) -------------------------

def sft_loss(model, batch):
    """Next-token negative log-likelihood of the supervised tokens, in nats; also the whole of pretraining."""
    logps = model(batch.input_ids, batch.mask, batch.lengths)                                        # (N,)
    nll, tokens = sum_by_row(-logps, batch.mask), batch.mask.sum(1)                        # (B,)
    return -logps.sum(), {"loss": by_language(batch, nll, tokens)}


def reward_loss(lm_weight):
    """Bradley-Terry on pairs, plus lm_weight times the mean next-token loss (nats per token) of each chosen answer."""
    def loss_fn(model, batch):
        P = batch.count
        scores, logps = model(batch.input_ids, batch.lengths, batch.mask)
        nll = sum_by_row(-logps, batch.mask)[:P] / batch.mask.sum(1)[:P]                   # (P,) nats per token of the chosen answers
        chosen, rejected = scores[:P], scores[P:]
        losses, ones = bradley_terry_loss(chosen, rejected), torch.ones_like(chosen)
        metrics = {"loss": by_language(batch, losses + lm_weight * nll, ones), "bt_loss": by_language(batch, losses, ones),
                   "lm_loss": by_language(batch, nll, ones), "accuracy": by_language(batch, (chosen > rejected).float(), ones),
                   "margin": by_language(batch, chosen - rejected, ones), "mean_reward": by_language(batch, (chosen + rejected) / 2, ones)}
        return (losses + lm_weight * nll).sum(), metrics
    return loss_fn


def preference_loss(beta, nll_weight):
    """DPO on pairs with stored reference log-probs, plus nll_weight times the chosen answer's nats per token."""
    def loss_fn(model, batch):
        P, tokens = batch.count, batch.mask.sum(1)
        logps = sum_by_row(model(batch.input_ids, batch.mask, batch.lengths), batch.mask).view(2, P)     # chosen, rejected
        losses, rewards = dpo_loss(logps, batch.ref_logps, beta)
        nll, ones = -logps[0] / tokens[:P], torch.ones_like(losses)
        log = {"rewards/accuracies": (rewards[0] > rewards[1]).float(), "rewards/margins": rewards[0] - rewards[1], "rewards/chosen": rewards[0],
               "rewards/rejected": rewards[1], "logps/chosen": logps[0], "logps/rejected": logps[1], "dpo_loss": losses}
        losses = losses + nll_weight * nll
        return losses.sum(), {"loss": by_language(batch, losses, ones), **{k: by_language(batch, v, ones) for k, v in log.items()}}
    return loss_fn


def policy_gradient_loss(model, batch):
    """REINFORCE with given advantages: -A * log pi(completion), per completion (arXiv 2402.14740)."""
    logps = sum_by_row(model(batch.input_ids, batch.mask, batch.lengths), batch.mask)                # (B,)
    losses, ones = -batch.advantages * logps, torch.ones_like(logps)
    log = {"reward": batch.rewards, "kl": logps - batch.ref_logps, "entropy": -logps}      # kl and entropy: per completion, nats, estimated from the samples
    return losses.sum(), {k: by_language(batch, v, ones) for k, v in log.items()}


# ---- reference log-probs -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def answer_logps(model, examples, pad_id, device, dtype="float32", size=64):
    """Log-prob (nats, summed over supervised tokens) of each example under a plain model, on every rank; work split over ranks.

    dtype: the compute dtype of the training that compares itself with them; another one would put the rounding of every token into the ratio."""
    model.eval()
    done = []
    for indices, batch in batches_in_order(examples, lambda items: collate(items, pad_id), size):
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logps = model(batch.input_ids, batch.mask, batch.lengths)                                # (N,)
        done += zip(indices, sum_by_row(logps, batch.mask).tolist())
    logps = dict(sum(distributed.gather_objects(done), []))
    return [logps[i] for i in range(len(examples))]


def store_reference(model, pairs, pad_id, device, dtype="float32"):
    """Compute the reference's log-probs once and keep them with the pairs, so that one model is in memory while training."""
    logps = answer_logps(model.to(device), [side for p in pairs for side in (p.chosen, p.rejected)], pad_id, device, dtype)
    for i, pair in enumerate(pairs):
        pair.ref_logps = torch.tensor(logps[2 * i:2 * i + 2]).numpy()


# ---- run folders -------------------------------------------------------------------------------------------------------------------

def versions():
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    return {"aya_min": __version__, "commit": commit, "python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


def open_run(out, stage, settings, data, resume, tokenizer, source):
    """Make the run folder and write config.json and the tokenizer before step 0; refuse a folder that belongs to another run.

    source: what else a resume needs to start from the same place ("model", "eval_data", "reward_model")."""
    check_training(settings, distributed.num_ranks())

    def prepare():
        folder, config = Path(out), {"stage": stage, "settings": asdict(settings), "data": [str(p) for p in data], **(source or {})}
        if resume:
            path = folder / "config.json"
            if not (folder / "state").is_dir() or not path.is_file():
                raise ValueError(f"--resume {folder}: no saved state there; use --save-every when starting the run, or start anew with --out")
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [k for k, v in {**before["settings"], "stage": stage}.items()
                       if {**config["settings"], "stage": before["stage"]}.get(k, v) != v and k not in ("learning_rate", "max_steps", "epochs", "save_every", "eval_every")]
            if changed or before["data"] != config["data"]:
                raise ValueError(f"--resume {folder}: that run had other {' '.join(changed) or 'data files'}; give the same, or start anew with --out")
            return
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} exists and is not empty; give another --out, or --resume {folder} to go on with it")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**config, "versions": versions(), "ranks": distributed.num_ranks(), "command": " ".join(sys.argv)},
                                                       indent=2, ensure_ascii=False), encoding="utf-8")
        tokenizer.save(folder)
    distributed.from_main(prepare)
    return Path(out)


def forget_after(metrics, step, num_steps):
    """Drop the lines of metrics.jsonl that a run resumed at `step` writes again: all from there on, but not the evaluation made just
    before the state was saved. A line that a kill cut short has no end."""
    lines = [line for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    rows = [json.loads(line) for line in lines]
    kept = [line for line, row in zip(lines, rows) if row["step"] < step or (row["step"] == step < num_steps and "loss" not in row)]
    metrics.write_text("".join(kept), encoding="utf-8")


def run_stage(stage, model, tokenizer, num_steps, batches, loss_fn, settings, run, device, eval_items=None, eval_collate=None, resume=False, **more):
    """Train, evaluate on the held-out items if there are any, publish. Returns the path of the model folder."""
    evaluation = None
    if eval_items:
        held_out = batches_in_order(eval_items, eval_collate)
        evaluation = lambda: evaluate(model, loss_fn, held_out, device)
    if resume:
        done = json.loads((run / "state" / "state.json").read_text(encoding="utf-8"))["step"]
        if done > num_steps:
            raise ValueError(f"--resume {run}: that run has done {done} steps, more than the {num_steps} that are asked for; raise --max-steps or --epochs")
        if distributed.is_main():
            forget_after(run / "metrics.jsonl", done, num_steps)
    distributed.barrier()
    model = train(model, num_steps, batches, loss_fn, settings, run, device, evaluation, resume, title=stage, **more)
    if distributed.is_main() and evaluation:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        last = [line for line in lines if "eval/loss" in line][-1]
        (run / "eval.json").write_text(json.dumps({k.removeprefix("eval/"): v for k, v in last.items() if k.startswith("eval/")}, indent=2), encoding="utf-8")
    weights.save(run / "model", model, tokenizer)
    return run / "model"


# ---- the stages --------------------------------------------------------------------------------------------------------------------

def pretrain(model, tokenizer, data, settings, out, device, eval_data=(), resume=False, source=None, stage="pretrain"):
    """Next-token training on {"text"} (every token) and on conversations (answers only). SFT is the same thing on conversations."""
    pad = lambda items: collate(items, tokenizer.pad_id)
    examples = load_examples(data, tokenizer, settings.max_length)
    held_out = load_examples(eval_data, tokenizer, settings.max_length) if eval_data else None
    num_steps, batches = make_batches(examples, pad, settings)
    run = open_run(out, stage, settings, data, resume, tokenizer, source)
    return run_stage(stage, model, tokenizer, num_steps, batches, sft_loss, settings, run, device, held_out, pad, resume)


def sft(*args, **kwargs):
    return pretrain(*args, stage="sft", **kwargs)


def reward(model, tokenizer, data, settings, out, device, eval_data=(), resume=False, source=None):
    """Bradley-Terry training of a reward model on preference pairs; accuracy per language in the metrics."""
    pad = lambda items: collate_pairs(items, tokenizer.pad_id)
    pairs = load_pairs(data, tokenizer, settings.max_length)
    held_out = load_pairs(eval_data, tokenizer, settings.max_length) if eval_data else None
    num_steps, batches = make_batches(pairs, pad, settings)
    run = open_run(out, "reward", settings, data, resume, tokenizer, source)
    return run_stage("reward", model, tokenizer, num_steps, batches, reward_loss(settings.lm_weight), settings, run, device, held_out, pad, resume)


def dpo(model, tokenizer, data, settings, out, device, eval_data=(), resume=False, source=None):
    """DPO against the model as it is at the start, whose log-probs are computed once. The first loss must be ln 2."""
    pad = lambda items: collate_pairs(items, tokenizer.pad_id)
    pairs = load_pairs(data, tokenizer, settings.max_length)
    held_out = load_pairs(eval_data, tokenizer, settings.max_length) if eval_data else []
    num_steps, batches = make_batches(pairs, pad, settings)
    run = open_run(out, "dpo", settings, data, resume, tokenizer, source)
    store_reference(model, pairs + held_out, tokenizer.pad_id, device, settings.dtype)

    def loss_is_ln2(metrics):
        tolerance = 1e-4 if settings.dtype == "float32" else 1e-2
        if abs(metrics["dpo_loss"] - math.log(2)) > tolerance:
            raise ValueError(f"the first DPO loss is {metrics['dpo_loss']:.6f}, not ln 2 = {math.log(2):.6f}: policy and reference differ at the start")
    return run_stage("dpo", model, tokenizer, num_steps, batches, preference_loss(settings.beta, settings.nll_weight), settings, run, device, held_out, pad,
                     resume, check_first=loss_is_ln2)


def rloo(model, tokenizer, data, settings, out, device, reward_model, resume=False, source=None):
    """Online RLOO: each step samples k completions of fresh prompts from a plain copy of the policy, scores them, subtracts the KL to
    the starting model, and takes one policy-gradient step. The reward model must share the policy's tokenizer."""
    prompts = load_prompts(data)
    prompt_ids = [tokenizer.encode_prompt(p["prompt_messages"]) for p in prompts]
    check_lengths(model.config, [len(ids) for ids in prompt_ids], [settings.max_new_tokens] * len(prompt_ids))
    if settings.num_samples < 2:
        raise ValueError(f"--num-samples {settings.num_samples}: RLOO needs at least 2 samples a prompt for its baseline")
    sampler = Sampler([len(ids) for ids in prompt_ids], settings.batch_size, settings.seed)
    num_steps = count_steps(len(prompts), settings)
    run = open_run(out, "rloo", settings, data, resume, tokenizer, source)
    k, policy, reference = settings.num_samples, CohereForCausalLM(model.config).to(device), CohereForCausalLM(model.config).to(device)
    reference.load_state_dict(model.state_dict())
    reward_model = reward_model.to(device)

    def sampled_example(ids, answer, row):
        mask = [False] * len(ids) + [True] * len(answer["ids"])                                # exactly the sampled tokens, the stop token included
        return Example(np.array(ids + answer["ids"], np.int32), np.array(mask), language_slot(row))

    def batches(step):
        policy.load_state_dict({name: distributed.full(t) for name, t in model.state_dict().items()})
        chosen = sampler.take(step * settings.batch_size, settings.batch_size)                 # the same on every rank
        rows = [prompts[i] for i in chosen]
        answers = answer_rows(policy, tokenizer, rows, k, settings.max_new_tokens, seed=settings.seed * 1_000_003 + step)
        flat = [(i, row, a) for i, row, group in zip(chosen, rows, answers) for a in group]
        examples = [sampled_example(prompt_ids[i], a, row) for i, row, a in flat]
        rewards = torch.tensor(score_texts(reward_model, tokenizer, [{**row, **a} for _, row, a in flat])).view(-1, k)      # (P, k)
        of_model = lambda m: torch.tensor(answer_logps(m, examples, tokenizer.pad_id, device, settings.dtype)).view(-1, k)
        ref = of_model(reference)                                                              # (P, k) nats
        now = torch.tensor([a["logp"] for _, _, a in flat]).view(-1, k) if settings.dtype == "float32" else of_model(policy)   # in bf16 both are rounded alike
        advantages = rloo_advantages(kl_shaped_rewards(rewards, now, ref, settings.beta))
        mine = torch.arange(len(flat))[distributed.rank()::distributed.num_ranks()]
        made = []
        for part in mine.split(settings.micro_batch_size * k or len(mine)):
            batch = collate([examples[i] for i in part], tokenizer.pad_id)
            batch.count, batch.ref_logps = len(part), ref.flatten()[part]
            batch.advantages, batch.rewards = advantages.flatten()[part], rewards.flatten()[part]
            made.append(batch)
        return made

    return run_stage("rloo", model, tokenizer, num_steps, batches, policy_gradient_loss, settings, run, device, resume=resume)


PLAIN_FIRST = (dpo, rloo)       # they compute with the whole model before they train it, so it must not come sharded
