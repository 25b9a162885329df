"""How I resume: model, optimizer and position of a run in RUN/state/step-N, the last two kept. safetensors and JSON, no pickle anywhere.

torch.distributed.checkpoint does the sharding, through its safetensors storage: every rank writes and reads its own rows, nothing is gathered,
and what is on disk is one logical state at any number of ranks. (DCP's own storage keeps a pickle, .metadata, which a user's folder could bring.)
The rest is done here. A state is written in a marked scratch folder, fsynced, read back, sealed by a manifest
of the files' SHA-256, published by a rename, and only then is an older one removed: a step-N that is there is
whole unless the disk harmed it, which the hashes tell. All ranks must see the folder. A state that holds a
NaN or an infinity is not written. What is no state of ours in RUN/state is never removed.

The data order needs no state beyond the step (data.Sampler), and training draws no random numbers.
"""

import os
import re
import shutil
import sys
import warnings
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException

from . import distributed
from .files import MARK, dumps, publish_folder, read_json, scratch, sha256, write_and_sync

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

def not_finite(tensors):
    """The name of the first of {name: tensor} that holds a NaN or an infinity on any rank, or None.

    A collective. A sum that is finite has finite terms; only where it is not, every element is looked at.
    """
    own = {name: distributed.own_rows(tensor)[0] for name, tensor in tensors.items()}
    sums = torch.stack([tensor.sum() for tensor in own.values()]).isfinite().tolist()
    bad = {name for name, fine in zip(own, sums) if not fine and not own[name].isfinite().all()}
    bad = set.union(*distributed.gather_objects(bad))
    return next((name for name in tensors if name in bad), None)


def save_state(folder, model, optimizer, step):
    """Publish the state after `step` optimizer steps as folder/step-N. A collective: all ranks write.

    If it fails, those before are as they were. A state that is not finite is refused."""
    folder, tensors, needed = Path(folder), state_tensors(model, optimizer), state_bytes(model)
    check_finite(tensors, step, folder)
    ends = accumulate(t.numel() * t.itemsize for t in tensors.values())
    places = {name: 1 + end // (FILE_BYTES * distributed.num_ranks()) for name, end in zip(tensors, ends)}     # which of a rank's files

    def begin():
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f".state.*{MARK}"):     # of a kill before there was a mark; the run is locked
            remove_unmarked(path)
        aside = held.enter_context(scratch(folder / "state"))       # the next save removes what a kill leaves
        check_room(folder, needed)
        (aside / f"step-{step}").mkdir()
        return aside

    def seal(files):
        if unread := [f"{name}: {size}" for name, (size, digest) in files.items() if not digest]:
            raise OSError(unread[0])
        there = sum(size - 8 - int.from_bytes(open(made / name, "rb").read(8), "little")
                    for name, (size, _) in files.items())
        assert there == needed, f"{made}: {there} bytes of tensors were written instead of {needed}"
        write_and_sync(made / "manifest.json", dumps({"step": step, "files": files}))
        target = folder / f"step-{step}"
        if is_state(target):
            target.rename(aside / "replaced")
        publish(made, target)
        for i, old in enumerate(left_over(folder)):
            old.rename(aside / f"old-{i}")              # half of a state must not look like one

    with ExitStack() as held:
        try:
            aside = distributed.from_main(begin)
            made = aside / f"step-{step}"
            writer = dcp.HuggingFaceStorageWriter(made, places, save_distributed=True)
            with warnings.catch_warnings(action="ignore"):              # that one process is one process
                dcp.save(tensors, storage_writer=writer, no_dist=distributed.num_ranks() == 1)
            files = look(made, distributed.from_main(lambda: sorted(path.name for path in made.iterdir())))
            distributed.from_main(lambda: seal(files))
        except (CheckpointException, OSError) as error:
            parts = error.failures.values() if isinstance(error, CheckpointException) else [[error]]
            free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
            raise ValueError(f"{folder}: the state of step {step} could not be written "
                             f"({next(iter(parts))[0]}); it needs {needed:,} bytes and {free:,} are free. "
                             f"{newest_name(folder)}; make room and --resume") from None


def check_finite(tensors, step, folder):
    """Refuse {name: tensor} after `step` steps if one is not finite, before it is kept. A collective."""
    if name := not_finite(tensors):
        raise ValueError(f"after step {step - 1}: {name.replace('|', ', ')} is not finite (NaN or infinity): "
                         f"nothing of it was saved. {newest_name(folder)}; lower --learning-rate")


def look(folder, names):
    """{name: (bytes, SHA-256)} of the files as they are on disk, (why it cannot be read, None) of one. A collective: the ranks share the reading."""
    def one(path):
        try:
            return path.stat().st_size, sha256(path)
        except OSError as error:
            return error.strerror, None
    seen = {name: one(folder / name) for name in part_of(names)}
    return {name: seen for part in distributed.gather_objects(seen) for name, seen in part.items()}


def part_of(names):
    """This rank's share of a list of files: about those that it wrote."""
    rank, ranks = distributed.rank(), distributed.num_ranks()
    return names[rank * len(names) // ranks:(rank + 1) * len(names) // ranks]


def check_room(folder, needed):
    """Refuse to begin what the disk has no room for."""
    there = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        begun = (Path(folder).parent / "config.json").exists() or published(folder)
        way = "--resume" if begun else "give the same command again"
        raise ValueError(f"{folder}: a state needs {needed:,} bytes and {free:,} are free. "
                         f"{newest_name(folder)}; make room and {way}")


def remove_unmarked(folder):
    """Remove a scratch folder that holds nothing but an empty mark, or not even that."""
    if folder.is_symlink() or not folder.is_dir():
        return
    inside = [*folder.iterdir()]
    if all(path.name == MARK and path.is_file() and path.stat().st_size == 0 for path in inside):
        for path in inside:
            path.unlink()
        folder.rmdir()


def publish(made, folder):
    """Give a finished folder its name, on disk before it is seen. Whatever has that name is refused."""
    for path in (*made.rglob("*"), made):
        sync(path)
    publish_folder(made, folder)
    sync(folder.parent)


def replace_folder(made, folder):
    """Publish a finished model folder under its name.

    An older version of it goes into a scratch folder, and with that; anything else in the way is refused."""
    if os.path.lexists(folder) and not is_older(folder, made):
        raise ValueError(f"{folder} is in the way: not what this run wrote before; move it elsewhere")
    with ExitStack() as held:
        if folder.exists():
            folder.rename(held.enter_context(scratch(folder)) / "old")
        publish(made, folder)


def is_older(folder, made):
    """Whether a folder is an older version of the model folder `made`, or empty.

    It has no other files than that, no links, and weights of the same size."""
    sizes = {str(path.relative_to(made)): path.stat().st_size for path in made.rglob("*") if path.is_file()}
    weights = [name for name in sizes if name.endswith(".safetensors") and (folder / name).is_file()]
    same_sizes = all((folder / name).stat().st_size == sizes[name] for name in weights)
    return same_sizes and not others_in(folder, sizes)


def others_in(folder, names):
    """What lies in a folder beside the files of these names: paths, links and other folders among them."""
    known = {*names, *(str(part) for name in names for part in Path(name).parents)}
    if not folder.is_dir() or folder.is_symlink():
        return [folder] if os.path.lexists(folder) else []
    return [path for path in sorted(folder.rglob("*"))
            if path.is_symlink() or str(path.relative_to(folder)) not in known]


def sync(path):
    """A file, or a folder's list of names, is on disk when this returns."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def is_state(folder):
    """Whether a folder is a state that save_state wrote, whole or damaged: its manifest names its files."""
    try:
        known = {"manifest.json", *read_manifest(folder)["files"]}
        return not folder.is_symlink() and {path.name for path in folder.iterdir()} <= known
    except (OSError, ValueError):
        return False


def left_over(folder):
    """The states of ours that a new one makes needless: all but the newest two, and damaged ones."""
    whole, damaged = published(folder), folder.glob("step-*.damaged*")
    return [path for path in whole if is_state(path)][:-2] + [path for path in damaged if is_state(path)]


# ---- in ----------------------------------------------------------------------------------------------------------------------------

def published(folder):
    """The states in a run's state/ folder, oldest first. A link or a file of such a name is none."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


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
            names = [path.name + ".damaged", *(f"{path.name}.damaged-{i}" for i in range(1, 1000))]
            aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
            print(f"{path} is damaged ({fault}); going on from the state before it", file=sys.stderr)
            path.rename(aside)

    for path in distributed.from_main(lambda: published(folder)[::-1]):
        fault = damage(path)
        if not fault:
            distributed.from_main(set_aside)
            return path
        faults[path] = fault
    if faults:
        raise ValueError(f"{folder}: no state is whole ({'; '.join(f'{path.name}: {fault}' for path, fault in faults.items())}); start anew with another --out")


def read_manifest(path):
    """{"step", "files": {name: [bytes, SHA-256]}} of a state's folder. ValueError where there is none."""
    manifest = read_json(path / "manifest.json")
    step, files = manifest.get("step"), manifest.get("files")
    right = type(step) is int and isinstance(files, dict) and all(
        isinstance(about, list) and [type(part) for part in about] == [int, str] for about in files.values())
    if not right:
        raise ValueError(f"{path / 'manifest.json'}: no step and files in it")
    return manifest


def damage(path):
    """What is wrong with a published state, in words, or None. A collective.

    One whose tensors are not finite (an older version saved such) is damaged, too."""
    def listed():
        try:
            manifest = read_manifest(path)
            there = {file.name for file in path.iterdir()} - {"manifest.json"}
            if links := [file.name for file in path.iterdir() if file.is_symlink()]:
                return f"{links[0]} is a link"
        except (OSError, ValueError) as error:
            return f"manifest.json cannot be read: {error}"
        if there == set(manifest["files"]) and manifest["step"] == step_of(path):
            return {name: (size, digest) for name, (size, digest) in sorted(manifest["files"].items())}
        other = " ".join(sorted(there ^ set(manifest["files"]))) or "another step"
        return f"manifest.json does not list what is there: {other}"

    files = distributed.from_main(listed)
    if isinstance(files, str):
        return files
    for name, (size, digest) in look(path, list(files)).items():
        if size != files[name][0]:
            return f"{name} has {size:,} bytes instead of {files[name][0]:,}" if digest else f"{name} cannot be read: {size}"
        if digest != files[name][1]:
            return f"{name} has another SHA-256 than when it was written"
    mine = [fault for name in part_of(list(files)) for fault in spoiled(path / name)]
    return min(sum(distributed.gather_objects(mine), []), default=None)


def spoiled(file):
    """What is wrong with the tensors of a state's file, in words."""
    try:
        with safe_open(file, "pt") as tensors:
            return [f"{name} is not finite" for name in tensors.keys() for t in [tensors.get_tensor(name)]
                    if not t.sum().isfinite() and not t.isfinite().all()]
    except SafetensorError as error:
        return [f"{file.name} holds no tensors: {error}"]


def load_state(path, model, optimizer):
    """Load a published state in place, before the first step, at any number of ranks. Returns the step to go on from."""
    for p in model.parameters():
        step = torch.tensor(float(step_of(path)), device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(state_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(path),
                     no_dist=distributed.num_ranks() == 1)
    except CheckpointException as error:
        cause = " ".join(str(next(iter(error.failures.values()))[0]).split())
        raise ValueError(f"{path}: not a state of this model ({cause[:300]}); start anew") from None
    return step_of(path)
