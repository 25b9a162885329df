"""The training stages side by side: pretrain, sft, reward, dpo, rloo. Each is (model, batches, loss function, evaluation); loop.train does the rest.

Every stage takes a model (with its tokenizer), JSONL files, settings and a run folder, leaves config.json, metrics.jsonl, eval.json, state/ and
model/ in the folder, and returns the path of model/.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule

from . import __version__, checkpoint, distributed, tensorfiles, weights
from .config import check_training
from .data import (Example, Pair, Sampler, batches_in_order, by_language, collate, collate_pairs, count_steps,
                   cut_left, fit_prompts, in_step, load_examples, load_pairs, load_prompts, make_batches,
                   slots_of)
from .files import sha256, write_json, write_whole
from .loop import evaluate, spread, train
from .losses import bradley_terry_loss, dpo_loss, kl_shaped_rewards, rloo_advantages, sum_by_row
from .model import CohereForCausalLM
from .reward import score_texts
from .sampling import answer_rows

MAY_CHANGE = ("learning_rate", "max_steps", "epochs", "save_every", "publish_every", "eval_every", "micro_batch_size", "packing", "compile",
              "activation_checkpointing", "replicate", "cpu_offload", "profile")         # on resume: what chooses neither examples nor their loss


# ---- loss functions: (model, batch) -> (sum over the batch's units, {name: (2, languages) sums and counts}) -------------------------

def sft_loss(model, batch):
    """Next-token negative log-likelihood of the supervised tokens, in nats; also the whole of pretraining."""
    logps = model(batch.input_ids, batch.mask, batch.lengths, batch.repeats)                                        # (N,)
    nll, tokens = sum_by_row(-logps, batch.mask), batch.mask.sum(1)                        # (B,)
    return -logps.sum(), {"loss": by_language(batch, nll, tokens)}


def reward_loss(lm_weight):
    """Bradley-Terry on pairs, plus lm_weight times the mean next-token loss (nats per token) of each chosen answer."""
    def loss_fn(model, batch):
        P = batch.count
        scores, logps = model(batch.input_ids, batch.lengths, batch.mask, batch.repeats)
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
        logps = sum_by_row(model(batch.input_ids, batch.mask, batch.lengths, batch.repeats), batch.mask).view(2, P)     # chosen, rejected
        losses, rewards = dpo_loss(logps, batch.ref_logps, beta)
        nll, ones = -logps[0] / tokens[:P], torch.ones_like(losses)
        log = {"rewards/accuracies": (rewards[0] > rewards[1]).float(), "rewards/margins": rewards[0] - rewards[1], "rewards/chosen": rewards[0],
               "rewards/rejected": rewards[1], "logps/chosen": logps[0], "logps/rejected": logps[1], "dpo_loss": losses}
        losses = losses + nll_weight * nll
        return losses.sum(), {"loss": by_language(batch, losses, ones), **{k: by_language(batch, v, ones) for k, v in log.items()}}
    return loss_fn


def policy_gradient_loss(model, batch):
    """REINFORCE with given advantages: -A * log pi(completion), per completion (arXiv 2402.14740)."""
    logps = sum_by_row(model(batch.input_ids, batch.mask, batch.lengths, batch.repeats), batch.mask)                # (B,)
    losses, ones = -batch.advantages * logps, torch.ones_like(logps)
    log = {"reward": batch.rewards, "kl": logps - batch.ref_logps, "entropy": -logps}      # kl and entropy: per completion, nats, estimated from the samples
    return losses.sum(), {k: by_language(batch, v, ones) for k, v in log.items()}


# ---- reference log-probs -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def answer_logps(model, items, pad_id, device, settings, size=64):
    """Log-probs (nats, summed over supervised tokens) of each example, (N,), or of each pair's two answers, (N, 2), under a plain or sharded model,
    on every rank; the work is split over ranks, `size` rows at a time.

    In the training's own dtype: another one would put the rounding of every token into the ratio."""
    was_training, done = model.training, []
    model.eval()
    model.model.packing = settings.packing
    in_pairs, autocast = isinstance(items[0], Pair), settings.dtype == "bfloat16" and not isinstance(model, FSDPModule)
    batches = batches_in_order(items, lambda some: (collate_pairs if in_pairs else collate)(some, pad_id), size // (1 + in_pairs))
    for indices, batch in in_step(batches):
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logps = model(batch.input_ids, batch.mask, batch.lengths, batch.repeats)       # (tokens,)
        sums = sum_by_row(logps, batch.mask)                                               # (rows,)
        done += zip(indices, (sums.view(2, -1).T if in_pairs else sums).tolist())
    model.train(was_training)
    logps = dict(sum(distributed.gather_objects(done), []))
    return torch.tensor([logps[i] for i in range(len(items))])


def reference_rows(settings):
    """Rows of a batch of DPO's reference pass: as nothing is kept for a backward, four times a micro-batch of pairs, 32 at most (64: slower on a CPU)."""
    return min(32, 8 * (settings.micro_batch_size or 4))


def store_reference(model, pairs, pad_id, device, settings, path, model_print):
    """Keep the reference's log-probs with the pairs, so that one model is in memory while training; and in the file `path`, from which another
    run takes them. Its key says of which model (model_print: its distributed.fingerprint), texts and compute dtype they are."""
    texts = hashlib.sha256()
    for side in (side for p in pairs for side in (p.chosen, p.rejected)):
        texts.update(len(side.ids).to_bytes(8, "little") + side.ids.tobytes() + side.mask.tobytes())
    key = f"{model_print} {texts.hexdigest()} {settings.dtype}"

    def read():
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                logps, about = file.get_tensor("ref_logps"), file.metadata() or {}
        except (SafetensorError, OSError):
            logps, about = torch.empty(0), {}
        if (about.get("key"), about.get("sha256")) != (key, sha256_of(logps)):
            raise ValueError(f"{path}: not the reference log-probs of this model, these pairs and {settings.dtype}; remove it, or give another file")
        return logps

    def write(logps):
        temporary = path.with_name(path.name + ".tmp")
        save_file({"ref_logps": logps}, temporary, {"key": key, "sha256": sha256_of(logps)})
        temporary.replace(path)

    logps = distributed.from_main(read)
    if logps is None:
        logps = answer_logps(model, pairs, pad_id, device, settings, reference_rows(settings))           # (pairs, 2)
        distributed.from_main(lambda: write(logps))
    for pair, both in zip(pairs, logps):
        pair.ref_logps = both.numpy()


def sha256_of(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


# ---- run folders -------------------------------------------------------------------------------------------------------------------

def versions():
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    return {"aya_min": __version__, "commit": commit, "python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


@dataclass
class OpenRun:
    """A run folder that this process holds. state: the folder of the state to go on from, or None; prints: the models' fingerprints."""
    folder: Path
    state: Optional[Path]
    prints: dict


def lock(folder):
    """Hold a run folder until the file that this returns is closed, or the process ends, by kill -9 too. The file says who holds it."""
    file = open(folder / ".lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{folder}: another run is writing here ({file.read()}); wait for it or stop it, or give another folder") from None
    except OSError as error:
        print(f"{folder}: no locks on this file system ({error.strerror}): two runs in one folder will not be noticed", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def check_new(folder):
    """Refuse a folder that a run is writing, or that holds anything."""
    if (folder / ".lock").is_file():
        lock(folder).close()
    if folder.exists() and {path.name for path in folder.iterdir()} - {".lock", "config.json.tmp"}:     # what a run killed in its first moment leaves
        raise ValueError(f"{folder} exists and is not empty; give a new folder, or --resume {folder} to go on with it")


def differences(before, now):
    """({setting: its value before} that a resume may change, [what it may not]) between the config.json of a run and what is given now."""
    if before["stage"] != now["stage"]:
        return {}, [f"stage {before['stage']}, not {now['stage']}"]
    changed = {name: before["settings"].get(name) for name, value in now["settings"].items() if before["settings"].get(name) != value}
    wrong = [f"{name} {value}, not {now['settings'][name]}" for name, value in changed.items() if name not in MAY_CHANGE]
    old, new = before.get("sha256", {}), now["sha256"]
    wrong += [f"another {name.replace('_', ' ')}" for name in new.keys() - {"data"} if old.get(name) != new[name]]
    if old.get("data") != new["data"]:
        other = [path for path, a, b in zip(now["data"], old.get("data", []), new["data"]) if a != b]
        wrong.append(f"other data: {' '.join(other) or 'another number of files'}")
    return {name: value for name, value in changed.items() if name in MAY_CHANGE}, wrong


@contextmanager
def open_run(out, stage, settings, data, resume, tokenizer, source, models, num_steps):
    """Hold a run folder while its stage runs. A new one gets config.json and the tokenizer before step 0; one to resume must be of the same run.

    source: what else a resume needs to start from the same place ("model", "eval_data", "reward_model"). models: {name: model as it is at the start}."""
    check_training(settings, distributed.num_ranks())
    folder, prints = Path(out), {name: distributed.fingerprint(model) for name, model in models.items()}

    def look():
        """(config.json as it was, what is given now, {setting: its value before}); refuses, and holds the folder."""
        if resume and not (folder / "config.json").is_file():
            raise ValueError(f"--resume {folder}: no config.json there; give the run folder of a stage, or start one with --out")
        digests = {**prints, "tokenizer": hashlib.sha256(tokenizer.bpe.to_str().encode()).hexdigest(), "data": [sha256(path) for path in data]}
        now = {"stage": stage, "settings": asdict(settings), "data": [str(p) for p in data], **(source or {}), "sha256": digests}
        before = tensorfiles.read_json(folder / "config.json") if resume else {}
        changes, wrong = differences(before, now) if resume else ({}, [])
        if wrong:
            raise ValueError(f"--resume {folder}: that run had {'; '.join(wrong)}. Give the same, or start anew with --out")
        if not resume:
            check_new(folder)
            folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(folder))
        return before, now, changes

    def begin(state):
        done = checkpoint.step_of(state) if state else 0
        if done > num_steps:
            raise ValueError(f"--resume {folder}: that run has done {done} steps, more than the {num_steps} that are asked for; raise --max-steps or --epochs")
        this = {"versions": versions(), "ranks": distributed.num_ranks(), "command": " ".join(sys.argv)}
        if resume:
            new = [f"{name} {now['settings'][name]} (was {value})" for name, value in changes.items()]
            print(f"{folder}: goes on {f'after step {done}' if state else 'from the start, no state was saved'}{' with ' if new else ''}{', '.join(new)}", file=sys.stderr)
            about = {**before, "settings": now["settings"], "resumed": before.get("resumed", []) + [{"step": done, **this}]}
            forget_after(folder / "metrics.jsonl", done, num_steps)
            for path in folder.glob("*.tmp-*"):
                shutil.rmtree(path)                                             # a model that was not yet published
        else:
            about = {**now, **this}
        write_json(folder / "config.json", about)
        tokenizer.save(folder)

    with ExitStack() as held:
        before, now, changes = distributed.from_main(look)
        state = checkpoint.newest_state(folder / "state") if resume else None
        distributed.from_main(lambda: begin(state))
        yield OpenRun(folder, state, prints)


def forget_after(metrics, step, num_steps):
    """Drop the lines of metrics.jsonl that a run resumed at `step` writes again: all from there on, but not the evaluation made just
    after the state was saved. A line that a kill cut short has no end."""
    if metrics.exists():
        lines = [line for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        rows = [json.loads(line) for line in lines]
        kept = [line for line, row in zip(lines, rows) if row["step"] < step or (row["step"] == step < num_steps and "loss" not in row)]
        write_whole(metrics, "".join(kept))


def run_stage(stage, model, tokenizer, num_steps, batches, loss_fn, settings, run, device, eval_items=None, eval_collate=None, stop=None, **more):
    """Train, evaluate on the held-out items if there are any, publish. run: an OpenRun. Returns the path of the model folder."""
    evaluation, folder, stop = None, run.folder, stop or distributed.Signals()
    if eval_items:
        held_out = batches_in_order(eval_items, eval_collate)
        evaluation = lambda: evaluate(model, loss_fn, held_out, device, stop)
    with stop:
        publish = lambda model, step: weights.save(folder / "checkpoints" / f"step-{step}", model, tokenizer)
        model = train(model, num_steps, batches, loss_fn, settings, folder, device, evaluation, run.state, title=stage, stop=stop, publish=publish, **more)
        if distributed.is_main() and evaluation:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            last = [line for line in lines if "eval/loss" in line][-1]
            write_json(folder / "eval.json", {k.removeprefix("eval/"): v for k, v in last.items() if k.startswith("eval/")})
        weights.save(folder / "model", model, tokenizer)
        if stop.any_rank(device):
            raise distributed.Stopped(f"stopped by a signal; {folder / 'model'} is finished", stop.agreed())
    return folder / "model"


# ---- the stages --------------------------------------------------------------------------------------------------------------------

def fitting(settings, model):
    """Tokens that an example may have."""
    return min(settings.max_length, model.config.max_position_embeddings)


def pretrain(model, tokenizer, data, settings, out, device, eval_data=(), resume=False, source=None, stage="pretrain"):
    """Next-token training on {"text"} (every token) and on conversations (answers only). SFT is the same thing on conversations."""
    limit = fitting(settings, model)
    examples = load_examples(data, tokenizer, settings, limit)
    held_out = load_examples(eval_data, tokenizer, settings, limit) if eval_data else []
    slots = slots_of(examples + held_out)
    pad = lambda items: collate(items, tokenizer.pad_id, slots)
    num_steps, batches = make_batches(examples, pad, settings)
    with open_run(out, stage, settings, data, resume, tokenizer, source, {"model": model}, num_steps) as run:
        return run_stage(stage, model, tokenizer, num_steps, batches, sft_loss, settings, run, device, held_out, pad)


def sft(*args, **kwargs):
    return pretrain(*args, stage="sft", **kwargs)


def reward(model, tokenizer, data, settings, out, device, eval_data=(), resume=False, source=None):
    """Bradley-Terry training of a reward model on preference pairs; accuracy per language in the metrics."""
    limit = fitting(settings, model)
    pairs = load_pairs(data, tokenizer, settings, limit)
    held_out = load_pairs(eval_data, tokenizer, settings, limit) if eval_data else []
    slots = slots_of(pairs + held_out)
    pad = lambda items: collate_pairs(items, tokenizer.pad_id, slots)
    num_steps, batches = make_batches(pairs, pad, settings)
    with open_run(out, "reward", settings, data, resume, tokenizer, source, {"model": model}, num_steps) as run:
        return run_stage("reward", model, tokenizer, num_steps, batches, reward_loss(settings.lm_weight), settings, run, device, held_out, pad)


def dpo(model, tokenizer, data, settings, out, device, eval_data=(), resume=False, source=None, reference_logps=None):
    """DPO against the model as it is at the start, whose log-probs are computed once and kept in RUN/reference.safetensors, or in the file
    reference_logps, which runs that differ in other settings can share. The first loss must be ln 2."""
    limit = fitting(settings, model)
    pairs = load_pairs(data, tokenizer, settings, limit)
    held_out = load_pairs(eval_data, tokenizer, settings, limit) if eval_data else []
    slots = slots_of(pairs + held_out)
    pad = lambda items: collate_pairs(items, tokenizer.pad_id, slots)
    num_steps, batches = make_batches(pairs, pad, settings)

    def loss_is_ln2(metrics):
        tolerance = 1e-4 if settings.dtype == "float32" else 1e-2
        if abs(metrics["dpo_loss"] - math.log(2)) > tolerance:
            raise ValueError(f"the first DPO loss is {metrics['dpo_loss']:.6f}, not ln 2 = {math.log(2):.6f}: policy and reference differ at the start")

    with open_run(out, "dpo", settings, data, resume, tokenizer, source, {"model": model}, num_steps) as run:
        path, model = Path(reference_logps or run.folder / "reference.safetensors"), spread(model, settings, device)
        store_reference(model, pairs + held_out, tokenizer.pad_id, device, settings, path, run.prints["model"])
        return run_stage("dpo", model, tokenizer, num_steps, batches, preference_loss(settings.beta, settings.nll_weight), settings, run, device, held_out, pad,
                         check_first=loss_is_ln2)


def twin(model, settings, device):
    """A second model of the same weights, sharded alike, to look back at."""
    with torch.device("meta"):
        other = CohereForCausalLM(model.config)
    distributed.shard(other, getattr(torch, settings.dtype), settings.replicate, settings.cpu_offload)
    other.to_empty(device="cpu" if settings.cpu_offload else device)
    for own, theirs in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
        distributed.own_rows(own)[0].copy_(distributed.own_rows(theirs)[0])
    return other


def rloo(model, tokenizer, data, settings, out, device, reward_model, resume=False, source=None):
    """Online RLOO: each step samples k completions of fresh prompts from a plain copy of the policy, scores them, subtracts the KL to
    the starting model, and takes one policy-gradient step. The reward model must share the policy's tokenizer. On several ranks the copy
    that samples is whole on each, in fp32; policy, reference and reward model are sharded."""
    positions = model.config.max_position_embeddings
    room = positions - settings.max_new_tokens
    of_row = lambda row: tokenizer.encode_prompt(row["prompt_messages"])
    prompts = fit_prompts(load_prompts(data, settings, tokenizer), lambda row: len(of_row(row)), room,
                          settings.too_long, f"the model's {positions} positions less --max-new-tokens")
    prompt_ids = [cut_left(of_row(row), room) for row in prompts]
    slots = (*sorted({p["language"] for p in prompts if p.get("language")} - {"other"}), "other")
    if settings.num_samples < 2:
        raise ValueError(f"--num-samples {settings.num_samples}: RLOO needs at least 2 samples a prompt for its baseline")
    sampler = Sampler([len(ids) for ids in prompt_ids], settings.batch_size, settings.seed)
    num_steps = count_steps(len(prompts), settings)
    stop = distributed.Signals()
    k = settings.num_samples

    def sampled_example(i, answer, row):
        ids = prompt_ids[i]
        mask = [False] * len(ids) + [True] * len(answer["ids"])                                # exactly the sampled tokens, the stop token included
        ids = np.array(ids + answer["ids"], np.int32)
        return Example(ids, np.array(mask), row.get("language") or "other", row["prompt_where"])

    def batches(step):
        for own, theirs in zip(policy.state_dict().values(), model.state_dict().values(), strict=True):
            own.copy_(distributed.full(theirs))                                                # one whole tensor at a time
        chosen = sampler.take(step * settings.batch_size, settings.batch_size)                 # the same on every rank
        rows = [prompts[i] for i in chosen]
        cut = {"cut_left": True} if settings.too_long == "cut-left" else {}
        answers = answer_rows(policy, tokenizer, rows, k, settings.max_new_tokens,
                              seed=settings.seed * 1_000_003 + step, **cut)
        if stop.any_rank(device):
            return []
        flat = [(i, row, a) for i, row, group in zip(chosen, rows, answers) for a in group]
        examples = [sampled_example(i, a, row) for i, row, a in flat]
        rewards = torch.tensor(score_texts(reward_model, tokenizer, [{**row, **a} for _, row, a in flat])).view(-1, k)      # (P, k)
        of_model = lambda m: answer_logps(m, examples, tokenizer.pad_id, device, settings).view(-1, k)
        ref = of_model(reference)                                                              # (P, k) nats
        now = torch.tensor([a["logp"] for _, _, a in flat]).view(-1, k) if settings.dtype == "float32" else of_model(model)   # in bf16 both are rounded alike
        advantages = rloo_advantages(kl_shaped_rewards(rewards, now, ref, settings.beta))
        mine = torch.arange(len(flat))[distributed.rank()::distributed.num_ranks()]
        made = []
        for part in mine.split(settings.micro_batch_size * k or len(mine)):
            batch = collate([examples[i] for i in part], tokenizer.pad_id, slots)
            batch.count, batch.ref_logps = len(part), ref.flatten()[part]
            batch.advantages, batch.rewards = advantages.flatten()[part], rewards.flatten()[part]
            made.append(batch)
        return made

    with open_run(out, "rloo", settings, data, resume, tokenizer, source, {"model": model, "reward_model": reward_model}, num_steps) as run:
        model, reward_model = spread(model, settings, device), spread(reward_model, replace(settings, dtype="float32"), device)
        reference, policy = twin(model, settings, device), CohereForCausalLM(model.config).to(device)
        return run_stage("rloo", model, tokenizer, num_steps, batches, policy_gradient_loss, settings, run, device, stop=stop)
