"""How I resume: model, optimizer and position of a run in RUN/state/step-N, the last two kept. safetensors and JSON, no pickle anywhere.

torch.distributed.checkpoint does the sharding, through its safetensors storage: every rank writes and reads its own rows, nothing is gathered,
and what is on disk is one logical state at any number of ranks. (DCP's own storage keeps a pickle, .metadata, which a user's folder could bring.)
The rest is done here. A state is written beside, fsynced, read back, sealed by a manifest of the files' SHA-256, published by a rename, and only
then is an older one removed: a step-N that is there is whole unless the disk harmed it, which the hashes tell. All ranks must see the folder.

The data order needs no state beyond the step (data.Sampler), and training draws no random numbers.
"""

import json
import os
import re
import shutil
import sys
import warnings
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from . import distributed
from .files import sha256

FILE_BYTES = 1 << 30            # about the largest file: DCP holds a copy of one in memory while it writes


def state_tensors(model, optimizer):
    """{name: parameter, name|exp_avg, name|exp_avg_sq: its moments}: the tensors themselves, sharded or plain. AdamW's step is the state's own."""
    tensors = dict(model.state_dict())
    for name, p in model.named_parameters():
        tensors |= {f"{name}|{key}": value for key, value in optimizer.state[p].items() if key != "step"}
    return tensors


def state_bytes(model):
    """What a state takes on disk: each parameter and its two moments."""
    return 3 * sum(p.numel() * p.itemsize for p in model.parameters())


# ---- out ---------------------------------------------------------------------------------------------------------------------------

def save_state(folder, model, optimizer, step):
    """Publish the state after `step` optimizer steps as folder/step-N. A collective: every rank writes its part. If it fails, those before are as they were."""
    folder, tensors, needed = Path(folder), state_tensors(model, optimizer), state_bytes(model)
    temporary = folder / f"step-{step}.tmp"
    ends = accumulate(t.numel() * t.itemsize for t in tensors.values())
    places = {name: 1 + end // (FILE_BYTES * distributed.num_ranks()) for name, end in zip(tensors, ends)}     # which of a rank's files

    def begin():
        remove_leftovers(folder)
        check_room(folder, needed)
        temporary.mkdir(parents=True)

    def publish(files):
        if unread := [f"{name}: {size}" for name, (size, digest) in files.items() if not digest]:
            raise OSError(unread[0])
        there = sum(size - 8 - int.from_bytes(open(temporary / name, "rb").read(8), "little") for name, (size, _) in files.items())
        assert there == needed, f"{temporary}: {there} bytes of tensors were written instead of {needed}"
        (temporary / "manifest.json").write_text(json.dumps({"step": step, "files": files}), encoding="utf-8")
        replace_folder(temporary, folder / f"step-{step}")
        for old in published(folder)[:-2]:
            gone = old.rename(old.with_name(old.name + ".gone"))        # half of a state must not look like one
            shutil.rmtree(gone)

    try:
        distributed.from_main(begin)
        with warnings.catch_warnings(action="ignore"):                  # that one process is one process
            dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(temporary, places, save_distributed=True), no_dist=distributed.num_ranks() == 1)
        files = look(temporary, distributed.from_main(lambda: sorted(path.name for path in temporary.iterdir())))
        distributed.from_main(lambda: publish(files))
    except (CheckpointException, OSError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        free = shutil.disk_usage(folder).free
        distributed.from_main(lambda: remove_leftovers(folder))
        raise ValueError(f"{folder}: the state of step {step} could not be written ({cause}); it needs {needed:,} bytes and {free:,} are free. "
                         f"{newest_name(folder)}; make room and --resume") from None


def look(folder, names):
    """{name: (bytes, SHA-256)} of the files as they are on disk, (why it cannot be read, None) of one. A collective: the ranks share the reading."""
    def one(path):
        try:
            return path.stat().st_size, sha256(path)
        except OSError as error:
            return error.strerror, None
    rank, ranks = distributed.rank(), distributed.num_ranks()
    mine = names[rank * len(names) // ranks:(rank + 1) * len(names) // ranks]           # about those that it wrote
    return {name: seen for part in distributed.gather_objects({name: one(folder / name) for name in mine}) for name, seen in part.items()}


def check_room(folder, needed):
    """Refuse to begin what the disk has no room for."""
    there = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(f"{folder}: a state needs {needed:,} bytes and {free:,} are free. {newest_name(folder)}; make room and --resume")


def replace_folder(temporary, folder):
    """Publish a finished folder under its name, on disk before it is seen; an older one of the same name goes only after the new one is in place."""
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def sync(path):
    """A file, or a folder's list of names, is on disk when this returns."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_leftovers(folder):
    """What a kill or a full disk left half done, and what damage set aside."""
    for path in folder.glob("step-*.*"):
        shutil.rmtree(path)


# ---- in ----------------------------------------------------------------------------------------------------------------------------

def published(folder):
    """The states in a run's state/ folder, oldest first."""
    return sorted((path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def step_of(state):
    return int(state.name.removeprefix("step-"))


def newest_name(folder):
    names = [path.name for path in published(folder)]
    return f"The last saved state is {names[-1]}" if names else "No state was saved before"


def newest_state(folder):
    """The newest whole state in a run's state/ folder, or None if there never was one. A damaged one is named and set aside. A collective."""
    faults = {}

    def set_aside():
        for path, fault in faults.items():
            print(f"{path} is damaged ({fault}); going on from the state before it", file=sys.stderr)
            path.rename(path.with_name(path.name + ".damaged"))

    for path in distributed.from_main(lambda: published(folder)[::-1]):
        fault = damage(path)
        if not fault:
            distributed.from_main(set_aside)
            return path
        faults[path] = fault
    if faults:
        raise ValueError(f"{folder}: no state is whole ({'; '.join(f'{path.name}: {fault}' for path, fault in faults.items())}); start anew with another --out")


def damage(path):
    """What is wrong with a published state, in words, or None. A collective."""
    def listed():
        try:
            manifest = json.loads((path / "manifest.json").read_bytes())
            there = {file.name for file in path.iterdir()} - {"manifest.json"}
            if there == set(manifest["files"]) and manifest["step"] == step_of(path):
                return {name: (size, digest) for name, (size, digest) in sorted(manifest["files"].items())}
            return f"manifest.json does not list what is there: {' '.join(sorted(there ^ set(manifest['files']))) or 'another step'}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"manifest.json cannot be read: {error!r}"

    files = distributed.from_main(listed)
    if isinstance(files, str):
        return files
    for name, (size, digest) in look(path, list(files)).items():
        if size != files[name][0]:
            return f"{name} has {size:,} bytes instead of {files[name][0]:,}" if digest else f"{name} cannot be read: {size}"
        if digest != files[name][1]:
            return f"{name} has another SHA-256 than when it was written"


def load_state(path, model, optimizer):
    """Load a published state in place, before the first step, at any number of ranks. Returns the step to go on from."""
    for p in model.parameters():
        step = torch.tensor(float(step_of(path)), device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    with warnings.catch_warnings(action="ignore"):
        dcp.load(state_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=distributed.num_ranks() == 1)
    return step_of(path)
