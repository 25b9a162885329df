"""The training stages side by side: pretrain, sft, reward, dpo, rloo. Each is (model, batches, loss function, evaluation); loop.train does the rest.

Every stage takes a model (with its tokenizer), JSONL files, settings and a run folder, leaves config.json, metrics.jsonl, eval.json, state/ and
model/ in the folder, and returns the path of model/.
"""

import fcntl
import hashlib
import math
import os
import platform
import re
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from . import __version__, checkpoint, config, distributed, weights
from .config import check_training
from .data import (Example, Pair, Sampler, batches_in_order, by_language, collate, collate_pairs, count_steps,
                   in_step, load_examples, load_pairs, load_prompts, make_batches, slots_of)
from .files import own_file, publish_file, read_json, scratch, sha256, write_json, write_whole
from .lengths import cut_left, fit_prompts
from .loop import autocast, evaluate, learning_rate, read_metrics, spread, train
from .losses import bradley_terry_loss, dpo_loss, kl_shaped_rewards, rloo_advantages, sum_by_row
from .model import CohereForCausalLM
from .reward import score_texts
from .sampling import answer_rows

# on resume: what chooses neither examples nor their loss; for the schedule see check_schedule
MAY_CHANGE = ("learning_rate", "max_steps", "epochs", "warmup_steps", "schedule", "final_learning_rate",
              "save_every", "publish_every", "eval_every", "micro_batch_size", "packing", "compile",
              "activation_checkpointing", "replicate", "cpu_offload", "profile")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
OURS = ("config.json", "metrics.jsonl", "eval.json", "reference.safetensors", "profile.json", *TOKENIZER)


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
    log |= {} if batch.cut is None else {"cut": batch.cut}
    return losses.sum(), {k: by_language(batch, v, ones) for k, v in log.items()}


# ---- reference log-probs -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def answer_logps(model, items, pad_id, device, settings, size=64, name="the reference"):
    """Log-probs (nats, summed over supervised tokens) of each example, (N,), or of each pair's two answers, (N, 2), under a plain or sharded model,
    on every rank; the work is split over ranks, `size` rows at a time.

    In the training's own dtype: another one would put the rounding of every token into the ratio.
    name: of the model, for the refusal of a log-prob that is not finite."""
    was_training, done = model.training, []
    model.eval()
    model.model.packing = settings.packing
    in_pairs = isinstance(items[0], Pair)
    batches = batches_in_order(items, lambda some: (collate_pairs if in_pairs else collate)(some, pad_id), size // (1 + in_pairs))
    for indices, batch in in_step(batches):
        batch = batch.to(device)
        with autocast(model, settings, device):
            logps = model(batch.input_ids, batch.mask, batch.lengths, batch.repeats)       # (tokens,)
        sums = sum_by_row(logps, batch.mask)                                               # (rows,)
        done += zip(indices, (sums.view(2, -1).T if in_pairs else sums).tolist())
    model.train(was_training)
    logps = dict(sum(distributed.gather_objects(done), []))
    logps = torch.tensor([logps[i] for i in range(len(items))])
    check_logps(logps, items, name)
    return logps


def check_logps(logps, items, name):
    """Refuse log-probs of these items that are not finite, by model and row."""
    bad = [i for i, fine in enumerate(logps.isfinite().view(len(items), -1).all(1).tolist()) if not fine]
    if bad:
        first = items[bad[0]].chosen if isinstance(items[bad[0]], Pair) else items[bad[0]]
        raise ValueError(f"{first.where}: its log-prob under {name} is {logps[bad[0]].tolist()}, not finite "
                         f"({len(bad)} of {len(items)} rows); look at the weights of {name} and at this row")


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
        if not os.path.lexists(path):
            return None
        try:
            with safe_open(path, "pt") as file:
                logps, about = file.get_tensor("ref_logps"), file.metadata() or {}
        except (SafetensorError, OSError):
            logps, about = torch.empty(0), {}
        if (about.get("key"), about.get("sha256")) != (key, sha256_of(logps)):
            raise ValueError(f"{path}: not the reference log-probs of this model, these pairs and {settings.dtype}; remove it, or give another file")
        check_logps(logps, pairs, f"the reference ({path})")
        return logps

    def write(logps):
        with scratch(path) as folder:
            try:
                save_file({"ref_logps": logps}, folder / "file", {"key": key, "sha256": sha256_of(logps)})
            except SafetensorError as error:
                raise ValueError(f"{path}: the reference log-probs cannot be written ({error}); make room, "
                                 "or give another file") from None
            if os.path.lexists(path):                   # another run was faster
                read()
            else:
                publish_file(folder / "file", path)

    logps = distributed.from_main(read)
    if logps is None:
        distributed.from_main(lambda: check_place(path))
        logps = answer_logps(model, pairs, pad_id, device, settings, reference_rows(settings))           # (pairs, 2)
        distributed.from_main(lambda: write(logps))
    for pair, both in zip(pairs, logps):
        pair.ref_logps = both.numpy()


def check_place(path):
    """Refuse, before the reference pass, a file that could not be written after it."""
    if not path.parent.is_dir():
        raise ValueError(f"--reference-logps {path}: there is no such folder; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--reference-logps {path}: its folder cannot be written; give another file")


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
    path = own_file(folder, ".lock") or folder / ".lock"
    number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    file = open(number, "r+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is writing here ({file.read()}); wait for it or stop it, or give another folder") from None
    except OSError as error:
        print(f"{folder}: no locks on this file system ({error.strerror}): two runs in one folder will not be noticed", file=sys.stderr)
    if (text := file.read(1000)) and not re.fullmatch(r"process \d+ on .*", text):
        raise ValueError(f"{path}: not the lock of a run; move it elsewhere, or give another folder")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def check_new(folder):
    """Refuse a folder that a run is writing, or that holds anything."""
    if (folder / ".lock").is_file():
        lock(folder).close()
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} exists and is no folder; give a new folder")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ValueError(f"{folder}: {there} is no folder that can be written; give another --out")
    if folder.exists() and {path.name for path in folder.iterdir()} - {".lock"}:
        raise ValueError(f"{folder} exists and is not empty; give a new folder, or --resume {folder} to go on with it")


def refuse_links(folder):
    """Refuse a run folder whose files or folders are links to elsewhere, which would be read or replaced."""
    for name in OURS:
        own_file(folder, name)
    for path in [*map(folder.joinpath, ("state", "model", "checkpoints")), *folder.glob("state/step-*")]:
        if path.is_symlink() and re.fullmatch(r"state|model|checkpoints|step-\d+", path.name):
            raise ValueError(f"{path}: a link; if you trust it, put the folder itself there")


def read_run(folder):
    """The config.json of a run folder, its types checked. ValueError names the file and the key at fault."""
    path = own_file(folder, "config.json") if Path(folder).is_dir() else None
    if not path:
        raise ValueError(f"--resume {folder}: no config.json there; give the run folder of a stage, or start "
                         "one with --out")
    about = read_json(path)
    if "recipe" in about:
        raise ValueError(f"--resume {folder}: a run of the recipe, which goes on by the same command with "
                         "--out; give the run folder of a stage")

    def text(value):
        return isinstance(value, str)

    def texts(value):
        return isinstance(value, list) and all(map(text, value))

    right = {"stage": lambda value: text(value) and value in STAGES, "data": texts,
             "settings": lambda value: isinstance(value, dict),
             "sha256": lambda value: isinstance(value, dict) and texts(value.get("data", []))}
    optional = {"model": text, "reward_model": text, "eval_data": texts,
                "resumed": lambda value: isinstance(value, list)}
    wrong = [key for key, fits in right.items() if not fits(about.get(key))]
    wrong += [key for key, fits in optional.items() if about.get(key) is not None and not fits(about[key])]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is not as a stage writes it; give the run folder of a stage, "
                         "or start anew with --out")
    known = {f.name for f in fields(STAGES[about["stage"]][1])}
    if unknown := sorted(about["settings"].keys() - known):
        raise ValueError(f"{path}: unknown setting {' '.join(unknown)}; resume with the version that made "
                         "it, or start anew with --out")
    try:
        settings_before(about)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return about


def settings_before(about):
    """The settings of a config.json as the stage's object; what an older run lacks is the default."""
    return config.settings_from(STAGES[about["stage"]][1], about["settings"])


def differences(before, now):
    """({setting: its value before} that a resume may change, [what it may not]) between the config.json of a run and what is given now."""
    if before["stage"] != now["stage"]:
        return {}, [f"stage {before['stage']}, not {now['stage']}"]
    was = asdict(settings_before(before))
    changed = {name: was[name] for name, value in now["settings"].items() if was[name] != value}
    wrong = [f"{name} {value}, not {now['settings'][name]}" for name, value in changed.items() if name not in MAY_CHANGE]
    old, new = before["sha256"], now["sha256"]
    wrong += [f"another {name.replace('_', ' ')}" for name in new.keys() - {"data"} if old.get(name) != new[name]]
    if old.get("data") != new["data"]:
        other = [path for path, a, b in zip(now["data"], old.get("data", []), new["data"]) if a != b]
        wrong.append(f"other data: {' '.join(other) or 'another number of files'}")
    return {name: value for name, value in changed.items() if name in MAY_CHANGE}, wrong


def check_schedule(folder, old, settings, num_items, done):
    """Refuse settings whose schedule differs from the run's in a step that is done: the rate would go back.

    Rates are compared as shares of the peak: another --learning-rate from here on is the user's choice."""
    def share(step, each):
        return learning_rate(step, count_steps(num_items, each), each) / each.learning_rate

    def told(each):
        return f"{each.schedule}, {count_steps(num_items, each)} steps, {each.warmup_steps} of warm-up"

    for step in range(done):
        was, now = share(step, old), share(step, settings)
        if not math.isclose(was, now, rel_tol=1e-9):
            raise ValueError(f"--resume {folder}: the schedule of these settings ({told(settings)}) is another "
                             f"than the run had ({told(old)}): step {step} of {done} was at {was:.3g} of the "
                             f"peak, not {now:.3g}. Start anew from {folder / 'model'}; "
                             "a run with --schedule constant can be made longer once it is warm")


@contextmanager
def open_run(out, stage, settings, data, resume, tokenizer, source, models, num_items):
    """Hold a run folder while its stage runs. A new one gets config.json and the tokenizer before step 0; one to resume must be of the same run.

    source: what else a resume needs to start from the same place ("model", "eval_data", "reward_model").
    models: {name: model as it is at the start}. num_items: how many examples, pairs or prompts there are.
    A new folder in which nothing was done when a mistake ended the stage is removed."""
    check_training(settings, distributed.num_ranks())
    num_steps = count_steps(num_items, settings)
    if settings.profile is not None and settings.profile >= num_steps:
        raise ValueError(f"--profile {settings.profile}: steps are counted from 0, and there are "
                         f"{num_steps}; profile an earlier one")
    folder, prints = Path(out), {name: distributed.fingerprint(model) for name, model in models.items()}
    made = []                                           # what a refused command must not leave behind

    def look():
        """(config.json as it was, what is given now, {setting: its value before}); refuses, and holds the folder."""
        before = read_run(folder) if resume else {}
        digests = {**prints, "tokenizer": hashlib.sha256(tokenizer.bpe.to_str().encode()).hexdigest(), "data": [sha256(path) for path in data]}
        now = {"stage": stage, "settings": asdict(settings), "data": [str(p) for p in data], **(source or {}), "sha256": digests}
        changes, wrong = differences(before, now) if resume else ({}, [])
        if wrong:
            raise ValueError(f"--resume {folder}: that run had {'; '.join(wrong)}. Give the same, or start anew with --out")
        if resume:
            refuse_links(folder)
            read_metrics(folder / "metrics.jsonl")
        else:
            check_new(folder)
            if "model" in models:
                checkpoint.check_room(folder / "state", checkpoint.state_bytes(models["model"]))
            if not folder.exists():
                folder.mkdir(parents=True)
                made.append(folder)
        held.enter_context(lock(folder))
        if not resume:
            made.append(folder / ".lock")
        return before, now, changes

    def begin(state):
        done = checkpoint.step_of(state) if state else 0
        if done > num_steps:
            raise ValueError(f"--resume {folder}: that run has done {done} steps, more than the {num_steps} that are asked for; raise --max-steps or --epochs")
        this = {"versions": versions(), "ranks": distributed.num_ranks(), "command": " ".join(sys.argv)}
        if resume:
            check_schedule(folder, settings_before(before), settings, num_items, done)
            new = [f"{name} {now['settings'][name]} (was {value})" for name, value in changes.items()]
            print(f"{folder}: goes on {f'after step {done}' if state else 'from the start, no state was saved'}{' with ' if new else ''}{', '.join(new)}", file=sys.stderr)
            about = {**before, **{key: now[key] for key in ("settings", "eval_data") if key in now},
                     "resumed": (before.get("resumed") or []) + [{"step": done, **this}]}
            forget_after(folder / "metrics.jsonl", done, num_steps)
        else:
            about = {**now, **this}
            made.extend(folder / name for name in ("config.json", *TOKENIZER))
        write_json(folder / "config.json", about)
        try:
            tokenizer.save(folder)
        except OSError as error:                        # a full disk does not say which file it was
            raise OSError(error.errno, error.strerror, str(folder / "tokenizer.json")) from None

    def clean_up():
        """Remove a new folder in which nothing was done, so that it is not in the way of the next attempt."""
        files = [path for path in made if path != folder]
        if made and set(folder.iterdir()) <= set(files):
            for path in files:
                path.unlink(missing_ok=True)
            if folder in made:
                folder.rmdir()

    with ExitStack() as held:
        try:
            before, now, changes = distributed.from_main(look)
            state = checkpoint.newest_state(folder / "state") if resume else None
            distributed.from_main(lambda: begin(state))
            yield OpenRun(folder, state, prints)
        except (ValueError, OSError):
            if distributed.is_main():
                clean_up()
            raise


def forget_after(metrics, step, num_steps):
    """Drop the lines of metrics.jsonl that a run resumed at `step` writes again: all from there on, but not the evaluation made just
    after the state was saved. A line that a kill cut short has no end."""
    if metrics.exists():
        kept = [line for line, row in read_metrics(metrics)
                if row["step"] < step or (row["step"] == step < num_steps and "loss" not in row)]
        write_whole(metrics, "".join(kept))


def run_stage(stage, model, tokenizer, num_steps, batches, loss_fn, settings, run, device, eval_items=None,
              eval_collate=None, stop=None, evaluation=None, **more):
    """Train, evaluate on the held-out items if there are any (or by evaluation(), see loop.train), publish.

    run: an OpenRun. Returns the path of the model folder."""
    folder, stop = run.folder, stop or distributed.Signals()
    distributed.from_main(lambda: weights.check_place(folder / "model", model, tokenizer))
    if eval_items:
        held_out = batches_in_order(eval_items, eval_collate)
        evaluation = lambda: evaluate(model, loss_fn, held_out, device, stop, settings)
    with stop:
        publish = lambda model, step: save_model(folder / "checkpoints" / f"step-{step}", model, tokenizer)
        model = train(model, num_steps, batches, loss_fn, settings, folder, device, evaluation, run.state, title=stage, stop=stop, publish=publish, **more)
        if distributed.is_main() and evaluation:
            rows = [row for _, row in read_metrics(folder / "metrics.jsonl")]
            last = [row for row in rows if any(key.startswith("eval/") for key in row)][-1]
            write_json(folder / "eval.json", {k.removeprefix("eval/"): v for k, v in last.items() if k.startswith("eval/")})
        save_model(folder / "model", model, tokenizer)
        if stop.any_rank(device):
            raise distributed.Stopped(f"stopped by a signal; {folder / 'model'} is finished", stop.agreed())
    return folder / "model"


def save_model(folder, model, tokenizer):
    """Publish a model. What the system refuses is told with the folder's name and the way on."""
    try:
        weights.save(folder, model, tokenizer)
    except OSError as error:
        about = f"{folder}: the model could not be written ({error}); make room and --resume"
        raise ValueError(about) from None


# ---- the stages --------------------------------------------------------------------------------------------------------------------

def fitting(settings, model):
    """Tokens that an example may have."""
    return min(settings.max_length, model.config.max_position_embeddings)


def pretrain(model, tokenizer, data, settings, out, device, eval_data=(), resume=False, source=None, stage="pretrain"):
    """Next-token training on {"text"} (every token) and on conversations (answers only). SFT is the same thing on conversations."""
    limit = fitting(settings, model)
    examples = load_examples(data, tokenizer, limit, settings)
    held_out = load_examples(eval_data, tokenizer, limit, settings) if eval_data else []
    slots = slots_of(examples + held_out)
    pad = lambda items: collate(items, tokenizer.pad_id, slots)
    num_steps, batches = make_batches(examples, pad, settings)
    models = {"model": model}
    with open_run(out, stage, settings, data, resume, tokenizer, source, models, len(examples)) as run:
        return run_stage(stage, model, tokenizer, num_steps, batches, sft_loss, settings, run, device, held_out, pad)


def sft(*args, **kwargs):
    return pretrain(*args, stage="sft", **kwargs)


def reward(model, tokenizer, data, settings, out, device, eval_data=(), resume=False, source=None):
    """Bradley-Terry training of a reward model on preference pairs; accuracy per language in the metrics."""
    limit = fitting(settings, model)
    pairs = load_pairs(data, tokenizer, limit, settings)
    held_out = load_pairs(eval_data, tokenizer, limit, settings) if eval_data else []
    slots = slots_of(pairs + held_out)
    pad = lambda items: collate_pairs(items, tokenizer.pad_id, slots)
    num_steps, batches = make_batches(pairs, pad, settings)
    models = {"model": model}
    with open_run(out, "reward", settings, data, resume, tokenizer, source, models, len(pairs)) as run:
        return run_stage("reward", model, tokenizer, num_steps, batches, reward_loss(settings.lm_weight), settings, run, device, held_out, pad)


def dpo(model, tokenizer, data, settings, out, device, eval_data=(), resume=False, source=None, reference_logps=None):
    """DPO against the model as it is at the start, whose log-probs are computed once and kept in RUN/reference.safetensors, or in the file
    reference_logps, which runs that differ in other settings can share. The first loss must be ln 2."""
    limit = fitting(settings, model)
    pairs = load_pairs(data, tokenizer, limit, settings)
    held_out = load_pairs(eval_data, tokenizer, limit, settings) if eval_data else []
    slots = slots_of(pairs + held_out)
    pad = lambda items: collate_pairs(items, tokenizer.pad_id, slots)
    num_steps, batches = make_batches(pairs, pad, settings)

    def loss_is_ln2(metrics):
        tolerance = 1e-4 if settings.dtype == "float32" else 1e-2
        if abs(metrics["dpo_loss"] - math.log(2)) > tolerance:
            raise ValueError(f"the first DPO loss is {metrics['dpo_loss']:.6f}, not ln 2 = {math.log(2):.6f}: policy and reference differ at the start")

    with open_run(out, "dpo", settings, data, resume, tokenizer, source, {"model": model}, len(pairs)) as run:
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


def rloo(model, tokenizer, data, settings, out, device, reward_model, eval_data=(), resume=False,
         source=None):
    """Online RLOO: each step samples k completions of fresh prompts from a plain copy of the policy, scores them, subtracts the KL to
    the starting model, and takes one policy-gradient step. The reward model must share the policy's tokenizer. On several ranks the copy
    that samples is whole on each, in fp32; policy, reference and reward model are sharded.

    eval_data: held-out prompts, each answered once with the same random numbers at every evaluation.
    Answers that are cut at --max-new-tokens are kept and scored as they are; their share is logged: "cut"."""
    if settings.keep_cut:
        raise ValueError("rloo keeps answers that are cut and scores them as they are; leave keep_cut out")
    most = most_tokens(model, reward_model, settings)
    prompts = prompts_that_fit(load_prompts(data, settings, tokenizer), tokenizer, most, settings)
    held_out = prompts_that_fit(load_prompts(eval_data, settings, tokenizer), tokenizer, most, settings)
    slots = (*sorted({row["language"] for row in prompts if row.get("language")} - {"other"}), "other")
    if settings.num_samples < 2:
        raise ValueError(f"--num-samples {settings.num_samples}: RLOO needs at least 2 samples a prompt for its baseline")
    sampler = Sampler([len(row["prompt_ids"]) for row in prompts], settings.batch_size, settings.seed)
    num_steps = count_steps(len(prompts), settings)
    stop = distributed.Signals()
    k, told = settings.num_samples, False

    def sampled_example(answer, row):
        ids = row["prompt_ids"]
        mask = [False] * len(ids) + [True] * len(answer["ids"])         # what was sampled, the stop included
        ids = np.array(ids + answer["ids"], np.int32)
        return Example(ids, np.array(mask), row.get("language") or "other", row["prompt_where"])

    def sample(rows, k, seed):
        """(rows, answers, examples, rewards, the policy's and the reference's log-probs in nats) of k answers
        to each row, one after the other; None after a signal."""
        nonlocal told
        for own, theirs in zip(policy.state_dict().values(), model.state_dict().values(), strict=True):
            own.copy_(distributed.full(theirs))                         # one whole tensor at a time
        cuts = settings.too_long == "cut-left"
        answers = answer_rows(policy, tokenizer, rows, k, settings.max_new_tokens, seed=seed, cut_left=cuts)
        if stop.any_rank(device):
            return None
        flat = [(row, answer) for row, group in zip(rows, answers) for answer in group]
        rows, answers = [row for row, _ in flat], [answer for _, answer in flat]
        num_cut = sum(answer["finish_reason"] == "length" for answer in answers)
        if num_cut and not told and distributed.is_main():
            tqdm.write(f"{num_cut} of {len(answers)} answers were cut at --max-new-tokens "
                       f"{settings.max_new_tokens}: they are kept and scored as they are; metrics.jsonl has "
                       "their share of each step (cut)", file=sys.stderr)
        told = told or num_cut > 0
        examples = [sampled_example(answer, row) for row, answer in flat]
        scores = score_texts(reward_model, tokenizer, [{**row, **answer} for row, answer in flat],
                             too_long="cut-left" if cuts else "refuse")
        rewards = torch.tensor(scores)
        of_model = lambda m, name: answer_logps(m, examples, tokenizer.pad_id, device, settings, name=name)
        ref, now = of_model(reference, "the reference"), torch.tensor([answer["logp"] for answer in answers])
        if settings.dtype != "float32":
            now = of_model(model, "the policy")                         # so that both are rounded alike
        return rows, answers, examples, rewards, now, ref

    def batches(step):
        chosen = sampler.take(step * settings.batch_size, settings.batch_size)     # the same on every rank
        sampled = sample([prompts[i] for i in chosen], k, settings.seed * 1_000_003 + step)
        if sampled is None:
            return []
        _, answers, examples, rewards, now, ref = sampled               # (P k,)
        cut = torch.tensor([float(answer["finish_reason"] == "length") for answer in answers])
        shaped = kl_shaped_rewards(rewards.view(-1, k), now.view(-1, k), ref.view(-1, k), settings.beta)
        advantages = rloo_advantages(shaped).flatten()
        mine = torch.arange(len(examples))[distributed.rank()::distributed.num_ranks()]
        made = []
        for part in mine.split(settings.micro_batch_size * k or len(mine)):
            batch = collate([examples[i] for i in part], tokenizer.pad_id, slots)
            batch.count, batch.ref_logps, batch.cut = len(part), ref[part], cut[part]
            batch.advantages, batch.rewards = advantages[part], rewards[part]
            made.append(batch)
        return made

    def evaluation():
        sampled = sample(held_out, 1, settings.seed)
        if sampled is None:
            return None
        rows, answers, _, rewards, now, ref = sampled
        by_row = {"reward": rewards.tolist(), "kl": (now - ref).tolist(),
                  "length": [len(answer["ids"]) for answer in answers],
                  "cut": [float(answer["finish_reason"] == "length") for answer in answers]}
        means = {name: sum(values) / len(values) for name, values in by_row.items()}
        for code in sorted({row["language"] for row in rows if row.get("language")}):
            for name in ("reward", "cut"):
                values = [value for row, value in zip(rows, by_row[name]) if row.get("language") == code]
                means[f"{name}/{code}"] = sum(values) / len(values)
        return means

    models = {"model": model, "reward_model": reward_model}
    with open_run(out, "rloo", settings, data, resume, tokenizer, source, models, len(prompts)) as run:
        model = spread(model, settings, device)
        reward_model = spread(reward_model, replace(settings, dtype="float32"), device)
        reference = twin(model, settings, device)
        policy = CohereForCausalLM(replace(model.config, max_position_embeddings=most)).to(device)
        return run_stage("rloo", model, tokenizer, num_steps, batches, policy_gradient_loss, settings, run,
                         device, stop=stop, evaluation=evaluation if held_out else None)


def most_tokens(model, reward_model, settings):
    """Tokens of the longest prompt with its answer: --max-length, or a model's positions if fewer."""
    positions = [each.config.max_position_embeddings for each in (model, reward_model)]
    return min(settings.max_length, *positions)


def prompts_that_fit(rows, tokenizer, most, settings):
    """The rows of load_prompts with their "prompt_ids". Those that are longer than `most` tokens with
    --max-new-tokens are treated as --too-long says."""
    new, room = settings.max_new_tokens, most - settings.max_new_tokens
    what = f"the {most} tokens (--max-length, or a model's positions) less --max-new-tokens {new}"
    rows = [{**row, "prompt_ids": tokenizer.encode_prompt(row["prompt_messages"])} for row in rows]
    rows = fit_prompts(rows, lambda row: len(row["prompt_ids"]), room, settings.too_long, what)
    return [{**row, "prompt_ids": cut_left(row["prompt_ids"], room)} for row in rows]


# name of a stage: its function and the class of its settings
STAGES = {"pretrain": (pretrain, config.Pretrain), "sft": (sft, config.SFT),
          "reward": (reward, config.Reward), "dpo": (dpo, config.DPO), "rloo": (rloo, config.RLOO)}
