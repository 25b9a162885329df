"""A run's folder: its lock, its config.json, and whether a resume fits it.

    config.json (settings, versions, commit, SHA-256 of model, tokenizer and data), metrics.jsonl, eval.json,
    state/ (to resume from), model/ (to publish)
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Optional

import torch

from . import __version__, checkpoint, config, distributed, linear
from .command import shortened
from .config import check_training
from .data import count_steps
from .files import own_file, read_json, sha256, write_json, write_whole
from .loop import learning_rate, read_metrics
from .mixture_rows import Mixture

# The settings that a resume may change: they choose neither the examples nor the loss. check_schedule checks
# those of the schedule. irreducible and replay are paths, whose contents must be the same.
MAY_CHANGE = ("learning_rate", "max_steps", "epochs", "warmup_steps", "schedule", "final_learning_rate",
              "save_every", "publish_every", "eval_every", "micro_batch_size", "packing", "compile",
              "activation_checkpointing", "replicate", "cpu_offload", "profile", "irreducible", "replay")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
OURS = ("config.json", "metrics.jsonl", "eval.json", "reference.safetensors", "profile.json",
        "selected.jsonl", *TOKENIZER)


@dataclass
class RunFolder:
    """A run folder whose lock this process holds.

    state: the folder of the state to start from, or None.
    prints: {name: distributed.fingerprint of the model}.
    """
    path: Path
    state: Optional[Path]
    prints: dict


def versions():
    root = Path(__file__).resolve().parent.parent
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    return {"aya_min": __version__, "commit": commit, "python": platform.python_version(),
            "torch": torch.__version__, "machine": platform.machine()}


def lock(folder):
    """Lock a run folder. Returns the file .lock, which names this process; the lock ends when it is closed or
    the process ends, even by kill -9. Raises ValueError if another process holds it."""
    path = own_file(folder, ".lock") or folder / ".lock"
    number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    file = open(number, "r+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is writing here ({file.read()}); wait for it or stop it, or "
                         "give another folder") from None
    except OSError as error:
        print(f"{folder}: this file system has no locks ({error.strerror}): two runs in one folder will not "
              "be noticed", file=sys.stderr)
    if (text := file.read(1000)) and not re.fullmatch(r"process \d+ on .*", text):
        raise ValueError(f"{path}: not the lock of a run; move it elsewhere, or give another folder")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def check_writable(folder, files=(), folders=()):
    """Raise ValueError unless `folder` is a folder that can be written, or can be made as one, in which these
    names are files, or folders, or not taken."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} exists and is no folder; give a new folder")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ValueError(f"{folder}: {nearest} is no folder that can be written; give another --out")
    for kind, names in (("file", files), ("folder", folders)):
        for path in map(folder.joinpath, names):
            right = path.is_file() if kind == "file" else path.is_dir()
            if os.path.lexists(path) and not right:
                raise ValueError(f"{path} is no {kind}, and the run writes its own there; move it elsewhere, "
                                 "or give another --out")


def check_new(folder):
    """Raise ValueError unless `folder` is an empty folder or can be made as one, and no run holds it."""
    if (folder / ".lock").is_file():
        lock(folder).close()
    check_writable(folder)
    if folder.exists() and {path.name for path in folder.iterdir()} - {".lock"}:
        raise ValueError(f"{folder} exists and is not empty; give a new folder, or --resume {folder} to "
                         "continue its run")


def tell_no_effect(args, settings):
    """Name on standard error the flags that have no effect beside the others."""
    holds_out = getattr(settings, "held_out", 0)            # a stage that needs no --eval-data
    if args.eval_every and not args.eval_data and not holds_out:
        distributed.say("--eval-every has no effect without --eval-data")
    if getattr(args, "held_out", None) is not None and args.eval_data:
        distributed.say("--held-out has no effect beside --eval-data")
    if args.epochs and settings.max_steps:
        distributed.say(f"--epochs has no effect beside --max-steps {settings.max_steps}")


def refuse_links(folder):
    """Raise ValueError if a file or folder of the run is a link: its target would be read or replaced."""
    for name in OURS:
        own_file(folder, name)
    for path in [*map(folder.joinpath, ("state", "model", "checkpoints")), *folder.glob("state/step-*")]:
        if path.is_symlink() and re.fullmatch(r"state|model|checkpoints|step-\d+", path.name):
            raise ValueError(f"{path}: a link; if you trust it, put the folder itself there")


def read_run(folder, stage, settings_class):
    """The config.json of this stage's run folder, with its types checked. Raises ValueError with the file and
    the wrong key."""
    path = own_file(folder, "config.json") if Path(folder).is_dir() else None
    if not path:
        raise ValueError(f"--resume {folder}: no config.json in it; give the run folder of a stage, or start "
                         "one with --out")
    about = read_json(path, "copy it again, or start anew with another --out")
    if "recipe" in about:
        raise ValueError(f"--resume {folder}: a run of the recipe, which the same command with --out "
                         "continues; give the run folder of a stage")

    def text(value):
        return isinstance(value, str)

    def texts(value):
        return isinstance(value, list) and all(map(text, value))

    right = {"stage": text, "data": texts,
             "settings": lambda value: isinstance(value, dict),
             "sha256": lambda value: isinstance(value, dict) and texts(value.get("data", []))}
    optional = {"model": text, "reward_model": text, "eval_data": texts,
                "products": lambda value: value in linear.LIBRARIES,
                "resumed": lambda value: isinstance(value, list)}
    wrong = [key for key, fits in right.items() if not fits(about.get(key))]
    wrong += [key for key, fits in optional.items() if about.get(key) is not None and not fits(about[key])]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is not as a stage writes it; give the run folder of a stage, "
                         "or start anew with --out")
    if OLD_STAGES.get(about["stage"], about["stage"]) != stage:
        raise ValueError(f"--resume {folder}: that is a run of {shortened(about['stage'])}, not {stage!r}")
    known = {f.name for f in fields(settings_class)}
    if unknown := sorted(about["settings"].keys() - known):
        raise ValueError(f"{path}: unknown setting {' '.join(unknown)}; resume with the version that made "
                         "it, or start anew with --out")
    try:
        settings_before(about, settings_class)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return about


def products_before(path):
    """The library of the matrix products (linear.chosen) of the run with this config.json. Versions that did
    not record it took oneDNN where the processor was not Intel's."""
    cpu = Path("/proc/cpuinfo")
    intel = cpu.is_file() and "GenuineIntel" in cpu.read_text()
    products = read_json(path).get("products") or ("default" if intel else "onednn")
    if products not in linear.LIBRARIES:
        raise ValueError(f"{path}: products {shortened(products)} are not known; known: "
                         f"{' '.join(linear.LIBRARIES)}; write one of them there, or start anew with another "
                         "--out")
    return products


def tell_missing(path, values, known):
    """Name the settings that a run's config.json does not hold, and the values that they take."""
    if missing := [name for name in values if name not in known]:
        taken = ", ".join(f"{name} {shortened(values[name])}" for name in missing)
        print(f"{path} does not hold {taken}: today's default is taken", file=sys.stderr)


# {name of a stage in older versions: its name}
OLD_STAGES = {"rloo": "rl"}
# {setting: value} of settings that an older run's config.json lacks, where the value that reproduces the old
# behaviour is not today's default.
AS_BEFORE = {}


def settings_before(about, settings_class):
    """The settings of a config.json as an object of the stage's class. It may be of an older version."""
    return config.settings_from(settings_class, {**AS_BEFORE, **about["settings"]})


def differences(before, now, settings_class):
    """Compare a run's config.json with what is given now. Returns ({setting: its value before} of changes
    that a resume may make, [a text for each change that it may not make])."""
    was = asdict(settings_before(before, settings_class))
    changed = {name: was[name] for name, value in now["settings"].items() if was[name] != value}
    wrong = [f"{name} {value}, not {now['settings'][name]}" for name, value in changed.items()
             if name not in MAY_CHANGE]
    old, new = before["sha256"], now["sha256"]
    wrong += [f"another {name.replace('_', ' ')}" for name in new.keys() - {"data"}
              if old.get(name) != new[name]]
    if old.get("data") != new["data"]:
        other = [path for path, a, b in zip(now["data"], old.get("data", []), new["data"]) if a != b]
        wrong.append(f"other data: {' '.join(other) or 'another number of files'}")
    return {name: value for name, value in changed.items() if name in MAY_CHANGE}, wrong


def check_schedule(folder, old, settings, num_items, done):
    """Raise ValueError if these settings give a finished step another learning rate than the run had: the
    rate would jump.

    Rates are compared as shares of the peak, because another --learning-rate is the user's choice."""
    def share(step, each):
        return learning_rate(step, count_steps(num_items, each), each) / each.learning_rate

    def told(each):
        return f"{each.schedule}, {count_steps(num_items, each)} steps, {each.warmup_steps} of warm-up"

    for step in range(done):
        was, now = share(step, old), share(step, settings)
        if not math.isclose(was, now, rel_tol=1e-9):
            raise ValueError(f"--resume {folder}: the schedule of these settings ({told(settings)}) is not "
                             f"that of the run ({told(old)}): step {step} of {done} was at {was:.3g} of the "
                             f"peak, not {now:.3g}. Start anew from {folder / 'model'}; only a run with "
                             "--schedule constant can be made longer, once its warm-up is over")


def forget_after(metrics, step, num_steps):
    """Drop the lines of metrics.jsonl that a run resumed at `step` writes again: those from `step` on, except
    the evaluation just after the state was saved, and a line that a kill cut short."""
    if metrics.exists():
        kept = [line for line, row in read_metrics(metrics)
                if row["step"] < step or (row["step"] == step < num_steps and "loss" not in row)]
        write_whole(metrics, "".join(kept))


# ---- the folder while its stage runs -----------------------------------------------------------------------

@contextmanager
def open_run(out, stage, settings, data, resume, tokenizer, source, models, num_items, files={}):
    """Hold a run folder (a RunFolder) while its stage runs. A new one gets config.json and the tokenizer
    before step 0; a resumed one must be of the same run.

    source: the paths that a resume needs besides the data ("model", "eval_data", "reward_model").
    models: {name: the model before training}. num_items: the number of examples, pairs or prompts. files:
    {name: path} of files besides, whose contents a resume must not change.
    A new folder is removed if the stage fails before it has written anything else."""
    check_training(settings, distributed.num_ranks())
    num_steps = count_steps(num_items, settings)
    if settings.profile is not None and settings.profile >= num_steps:
        raise ValueError(f"--profile {settings.profile}: steps are counted from 0, and there are "
                         f"{num_steps}; profile an earlier one")
    folder, prints = Path(out), {name: distributed.fingerprint(model) for name, model in models.items()}
    # Paths that a refused command must not leave behind.
    made = []

    def take():
        """Lock the folder. Returns (config.json before, what is given now, {changed setting: old value})."""
        before = read_run(folder, stage, type(settings)) if resume else {}
        digests = {**prints, "tokenizer": hashlib.sha256(tokenizer.bpe.to_str().encode()).hexdigest(),
                   "data": [path.sha256 if isinstance(path, Mixture) else sha256(path) for path in data],
                   **{name: sha256(path) for name, path in files.items()}}
        now = {"stage": stage, "settings": asdict(settings), "data": [str(p) for p in data],
               **(source or {}), "sha256": digests}
        changes = {}
        if resume:
            changes = check_same_run(folder, before, now, type(settings))
        else:
            made.extend(make_new(folder, models.get("model"), settings.optimizer))
        held.enter_context(lock(folder))
        made.extend([] if resume else [folder / ".lock"])
        return before, now, changes

    def write():
        this = {"versions": versions(), "ranks": distributed.num_ranks(), "command": " ".join(sys.argv)}
        done = checkpoint.step_of(state) if state else 0
        if resume:
            old = settings_before(before, type(settings))
            check_steps(folder, old, settings, num_items, done)
            tell_missing(folder / "config.json", asdict(old), {**AS_BEFORE, **before["settings"]})
            tell_resumed(folder, state, done, changes, now)
            about = {**before, **{key: now[key] for key in ("settings", "eval_data") if key in now},
                     "resumed": (before.get("resumed") or []) + [{"step": done, **this}]}
            forget_after(folder / "metrics.jsonl", done, num_steps)
        else:
            about = {**now, "products": linear.chosen(), **this}
            made.extend(folder / name for name in ("config.json", *TOKENIZER))
        write_json(folder / "config.json", about)
        save_tokenizer(folder, tokenizer)

    with ExitStack() as held:
        try:
            before, now, changes = distributed.from_main(take)
            if resume:
                linear.choose(distributed.from_main(lambda: products_before(folder / "config.json")))
            state = checkpoint.newest_state(folder / "state") if resume else None
            distributed.from_main(write)
            yield RunFolder(folder, state, prints)
        except (ValueError, OSError):
            if distributed.is_main():
                remove_new(folder, made)
            raise


def save_tokenizer(folder, tokenizer):
    try:
        tokenizer.save(folder)
    except OSError as error:
        # The error of a full disk does not name the file.
        raise OSError(error.errno, error.strerror, str(folder / "tokenizer.json")) from None


def check_same_run(folder, before, now, settings_class):
    """Raise ValueError if what is given now is not the run of `before`. Returns {changed setting: its value
    before}."""
    changes, wrong = differences(before, now, settings_class)
    if wrong:
        raise ValueError(f"--resume {folder}: that run had {'; '.join(wrong)}. Give the same, or start anew "
                         "with --out")
    refuse_links(folder)
    read_metrics(folder / "metrics.jsonl")
    return changes


def make_new(folder, model, optimizer):
    """Make a folder for a new run, after a check that the model's states fit the disk. Returns [the folder],
    or [] if it existed."""
    check_new(folder)
    if model is not None:
        checkpoint.check_room(folder / "state", checkpoint.state_bytes(model, optimizer))
    if folder.exists():
        return []
    folder.mkdir(parents=True)
    return [folder]


def check_steps(folder, old, settings, num_items, done):
    """Raise ValueError if a resume asks for fewer steps than are done, for another schedule of those, or to
    profile one of them."""
    num_steps = count_steps(num_items, settings)
    if done > num_steps:
        raise ValueError(f"--resume {folder}: that run has done {done} steps, more than the {num_steps} that "
                         "are asked for; raise --max-steps or --epochs")
    if settings.profile not in (None, old.profile) and settings.profile < done:
        raise ValueError(f"--profile {settings.profile}: {done} steps of {folder} are done, counted from 0; "
                         f"profile step {done} or a later one")
    check_schedule(folder, old, settings, num_items, done)


def tell_resumed(folder, state, done, changes, now):
    after = f"after step {done}" if state else "from the start, no state was saved"
    new = [f"{name} {now['settings'][name]} (was {value})" for name, value in changes.items()]
    print(f"{folder}: resumes {after}{' with ' if new else ''}{', '.join(new)}", file=sys.stderr)


def remove_new(folder, made):
    """Remove what a new run made, if nothing else is in its folder, so that the next attempt can use it."""
    files = [path for path in made if path != folder]
    if made and set(folder.iterdir()) <= set(files):
        for path in files:
            path.unlink(missing_ok=True)
        if folder in made:
            folder.rmdir()
