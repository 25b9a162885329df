"""Saved states: model, optimizer and step of a run in RUN/state/step-N, of which the last two are kept.

torch.distributed.checkpoint (DCP) shards the state, through its safetensors storage: every rank writes and
reads its own rows, nothing is gathered, and the files are one logical state at any number of ranks. (DCP's
default storage keeps a pickle, .metadata, which a folder from elsewhere could bring; no pickle is read here.)

The rest is done here. A state is written in a marked scratch folder, fsynced, read back, sealed by a manifest
of the files' SHA-256 and published by a rename; only then is an older one removed. So an existing step-N is
whole unless the disk damaged it, which the hashes show. All ranks must see the folder. A state with a NaN or
an infinity is not written. Whatever in RUN/state is not a state of ours is never removed.

The data order needs no state beyond the step (data.Sampler), and training draws no random numbers.
"""

import os
import re
import shutil
import sys
import warnings
from contextlib import ExitStack
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import distributed
from .files import MARK, dumps, publish_folder, read_json, scratch, sha256, write_and_sync

FILE_BYTES = 1 << 30            # about the largest file; DCP copies a file in memory while it writes


def distributed_checkpoint():
    """torch.distributed.checkpoint, imported where a state is written or read: that takes a second."""
    import torch.distributed.checkpoint
    return torch.distributed.checkpoint


def state_tensors(model, optimizer):
    """{name: parameter, name|exp_avg and name|exp_avg_sq: its moments (Adafactor's: name|rows, name|columns,
    name|variance)}, sharded or plain, not copied.

    The optimizer's step is not among them: it is the state's step, without those that were skipped
    (loss_scale.py).
    """
    tensors = dict(model.state_dict())
    for name, p in trained(model).items():
        tensors |= {f"{name}|{key}": value for key, value in optimizer.state[p].items() if key != "step"}
    return tensors


def trained(model):
    """{name: parameter} of those that are trained; the decoder below a SideNet is frozen."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def state_bytes(model, optimizer="adamw"):
    """The size of a state in bytes: each parameter, the moments of each that is trained, and buffers
    (critic.Learner)."""
    kept = sum(t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers()))
    return kept + sum(num_moments(p.shape, optimizer) * p.itemsize for p in trained(model).values())


def num_moments(shape, optimizer):
    """The numbers that an optimizer keeps of a parameter of this shape."""
    if optimizer == "adamw":
        return 2 * prod(shape)
    return shape[0] if len(shape) == 1 else prod(shape) // shape[-1] + prod(shape) // shape[-2]


# ---- saving ------------------------------------------------------------------------------------------------

def not_finite(tensors):
    """The name of the first of {name: tensor} that holds a NaN or an infinity on any rank, or None.

    A collective. The sum is checked first; if it is not finite it may only have overflowed, so then every
    element is checked.
    """
    own = {name: distributed.own_rows(tensor)[0] for name, tensor in tensors.items()}
    sums = torch.stack([tensor.sum().float() for tensor in own.values()]).isfinite().tolist()
    bad = {name for name, fine in zip(own, sums) if not fine and not own[name].isfinite().all()}
    bad = set.union(*distributed.gather_objects(bad))
    return next((name for name in tensors if name in bad), None)


def weights_fault(model):
    """A text that names the first parameter or buffer that is not finite and the folder of the model; "" if
    all are. A collective."""
    name = not_finite(model.state_dict())
    folder = getattr(distributed.parts(model)[0], "came_from", None)
    return f"its parameter {name} is not finite{f' (model {folder})' if folder else ''}" if name else ""


def save_state(folder, model, optimizer, step, scale=None):
    """Publish the state after `step` optimizer steps as folder/step-N. A collective: all ranks write.

    scale: the LossScale, whose state is part of it.
    ValueError if it cannot be written or is not finite; earlier states then stay as they were.
    """
    folder = Path(folder)
    own = scale.tensors() if scale else {}
    tensors = state_tensors(model, optimizer) | own
    needed = sum(t.numel() * t.itemsize for t in tensors.values())
    check_finite(tensors, step, folder)
    ends = accumulate(t.numel() * t.itemsize for t in tensors.values())
    per_file = FILE_BYTES * distributed.num_ranks()
    file_of = {name: 1 + end // per_file for name, end in zip(tensors, ends)}       # which of a rank's files

    def begin():
        folder.mkdir(parents=True, exist_ok=True)
        # A kill before the mark was written leaves these; no other process is at work, as the run is locked.
        for path in folder.glob(f".state.*{MARK}"):
            remove_unmarked(path)
        aside = held.enter_context(scratch(folder / "state"))       # the next save removes what a kill leaves
        check_room(folder, needed)
        (aside / f"step-{step}").mkdir()
        return aside

    def seal(files):
        if unread := [f"{name}: {size}" for name, (size, digest) in files.items() if not digest]:
            raise OSError(unread[0])
        written = sum(size - 8 - int.from_bytes(open(made / name, "rb").read(8), "little")
                      for name, (size, _) in files.items())         # without the headers
        assert written == needed, f"{made}: {written} bytes of tensors were written instead of {needed}"
        write_and_sync(made / "manifest.json", dumps({"step": step, "files": files}))
        target = folder / f"step-{step}"
        if is_state(target):
            target.rename(aside / "replaced")
        publish(made, target)
        for i, old in enumerate(left_over(folder)):
            old.rename(aside / f"old-{i}")              # a kill must not leave a part of it as step-N

    dcp = distributed_checkpoint()
    with ExitStack() as held:
        try:
            aside = distributed.from_main(begin)
            made = aside / f"step-{step}"
            writer = dcp.HuggingFaceStorageWriter(made, file_of, save_distributed=True)
            with warnings.catch_warnings(action="ignore"):              # about a save by a single process
                dcp.save(tensors, storage_writer=writer, no_dist=distributed.num_ranks() == 1)
            names = distributed.from_main(lambda: sorted(path.name for path in made.iterdir()))
            files = read_back(made, names)
            distributed.from_main(lambda: seal(files))
        except (dcp.api.CheckpointException, OSError) as error:
            parts = [[error]] if isinstance(error, OSError) else error.failures.values()
            free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
            raise ValueError(f"{folder}: the state of step {step} could not be written "
                             f"({next(iter(parts))[0]}); it needs {needed:,} bytes and {free:,} are free. "
                             f"{newest_name(folder)}; make room and --resume") from None


def check_finite(tensors, step, folder):
    """Raise ValueError if one of {name: tensor} after `step` steps is not finite. A collective."""
    if name := not_finite(tensors):
        raise ValueError(f"after step {step - 1}: {name.replace('|', ', ')} is not finite (NaN or infinity): "
                         f"nothing of it was saved. {newest_name(folder)}; lower --learning-rate")


def read_back(folder, names):
    """{name: (bytes, SHA-256)} of the files on disk, or {name: (reason, None)} of one that cannot be read.

    A collective: the ranks share the reading.
    """
    def one(path):
        try:
            return path.stat().st_size, sha256(path)
        except OSError as error:
            return error.strerror, None
    own = {name: one(folder / name) for name in part_of(names)}
    return {name: found for part in distributed.gather_objects(own) for name, found in part.items()}


def part_of(names):
    """This rank's share of a list of files, which are about those that it wrote."""
    rank, ranks = distributed.rank(), distributed.num_ranks()
    return names[rank * len(names) // ranks:(rank + 1) * len(names) // ranks]


def check_room(folder, needed):
    """Raise ValueError if the disk has no room for `needed` bytes."""
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        begun = (path.parent / "config.json").exists() or saved_states(folder)
        way = "--resume" if begun else "give the same command again"
        raise ValueError(f"{folder}: a state needs {needed:,} bytes and {free:,} are free. "
                         f"{newest_name(folder)}; make room and {way}")


def remove_unmarked(folder):
    """Remove a scratch folder that is empty or holds only an empty mark."""
    if folder.is_symlink() or not folder.is_dir():
        return
    inside = [*folder.iterdir()]
    if all(path.name == MARK and path.is_file() and path.stat().st_size == 0 for path in inside):
        for path in inside:
            path.unlink()
        folder.rmdir()


def publish(made, folder):
    """Fsync a finished folder, then give it its name. ValueError if the name is taken."""
    for path in (*made.rglob("*"), made):
        sync(path)
    publish_folder(made, folder)
    sync(folder.parent)


def replace_folder(made, folder):
    """Publish a finished model folder under its name.

    An older version is removed, by way of a scratch folder. ValueError if anything else has the name.
    """
    if os.path.lexists(folder) and not is_older(folder, made):
        raise ValueError(f"{folder} is in the way: not what this run wrote before; move it elsewhere")
    with ExitStack() as held:
        if folder.exists():
            folder.rename(held.enter_context(scratch(folder)) / "old")
        publish(made, folder)


def is_older(folder, made):
    """Whether a folder is an older version of the model folder `made`, or empty.

    An older version has no files that `made` has not, no links, and weights of the same size.
    """
    sizes = {str(path.relative_to(made)): path.stat().st_size for path in made.rglob("*") if path.is_file()}
    weights = [name for name in sizes if name.endswith(".safetensors") and (folder / name).is_file()]
    same_sizes = all((folder / name).stat().st_size == sizes[name] for name in weights)
    return same_sizes and not others_in(folder, sizes)


def others_in(folder, names):
    """The paths in a folder that are not files of these names, links and other folders included."""
    known = {*names, *(str(part) for name in names for part in Path(name).parents)}
    if not folder.is_dir() or folder.is_symlink():
        return [folder] if os.path.lexists(folder) else []
    return [path for path in sorted(folder.rglob("*"))
            if path.is_symlink() or str(path.relative_to(folder)) not in known]


def sync(path):
    """Fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_state(folder):
    """Whether save_state wrote this folder, be it whole or damaged: its manifest names all its files."""
    try:
        known = {"manifest.json", *read_manifest(folder)["files"]}
        return not folder.is_symlink() and {path.name for path in folder.iterdir()} <= known
    except (OSError, ValueError):
        return False


def left_over(folder):
    """The states that may be removed: all but the newest two, and those set aside as damaged."""
    whole = [path for path in saved_states(folder) if is_state(path)]
    damaged = [path for path in folder.glob("step-*.damaged*") if is_state(path)]
    return whole[:-2] + damaged


# ---- resuming ----------------------------------------------------------------------------------------------

def saved_states(folder):
    """The folders step-N in a run's state/ folder, oldest first, without links and files of such a name."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def step_of(state):
    """N of a folder step-N."""
    return int(state.name.removeprefix("step-"))


def newest_name(folder):
    """A sentence for messages that names the newest state."""
    names = [path.name for path in saved_states(folder)]
    return f"The last saved state is {names[-1]}" if names else "No state was saved before"


def newest_state(folder):
    """The newest whole state in a run's state/ folder, or None if it has no states. A collective.

    A damaged state is reported and renamed step-N.damaged. ValueError if all states are damaged.
    """
    faults = {}

    def set_aside():
        for path, fault in faults.items():
            names = [path.name + ".damaged", *(f"{path.name}.damaged-{i}" for i in range(1, 1000))]
            aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
            print(f"{path} is damaged ({fault}); resuming from the state before it", file=sys.stderr)
            path.rename(aside)

    for path in distributed.from_main(lambda: saved_states(folder)[::-1]):
        fault = damage(path)
        if not fault:
            distributed.from_main(set_aside)
            return path
        faults[path] = fault
    if faults:
        listed = "; ".join(f"{path.name}: {fault}" for path, fault in faults.items())
        raise ValueError(f"{folder}: no state is whole ({listed}); start anew with another --out")


def read_manifest(path):
    """{"step": N, "files": {name: [bytes, SHA-256]}} of a state's folder. ValueError if it has none."""
    manifest = read_json(path / "manifest.json")
    step, files = manifest.get("step"), manifest.get("files")
    right = type(step) is int and isinstance(files, dict) and all(
        isinstance(about, list) and [type(part) for part in about] == [int, str] for about in files.values())
    if not right:
        raise ValueError(f"{path / 'manifest.json'}: no step and files in it")
    return manifest


def damage(path):
    """What is wrong with a saved state, in words, or None. A collective.

    A state with tensors that are not finite, which an older version could save, counts as damaged.
    """
    def listed():
        try:
            manifest = read_manifest(path)
            names = {file.name for file in path.iterdir()} - {"manifest.json"}
            if links := [file.name for file in path.iterdir() if file.is_symlink()]:
                return f"{links[0]} is a link"
        except (OSError, ValueError) as error:
            return f"manifest.json cannot be read: {error}"
        if names == set(manifest["files"]) and manifest["step"] == step_of(path):
            return {name: (size, digest) for name, (size, digest) in sorted(manifest["files"].items())}
        other = " ".join(sorted(names ^ set(manifest["files"]))) or "another step"
        return f"manifest.json and the folder differ: {other}"

    files = distributed.from_main(listed)
    if isinstance(files, str):
        return files
    for name, (size, digest) in read_back(path, list(files)).items():
        expected = files[name]
        if not digest:
            return f"{name} cannot be read: {size}"
        if size != expected[0]:
            return f"{name} has {size:,} bytes instead of {expected[0]:,}"
        if digest != expected[1]:
            return f"{name} has another SHA-256 than when it was written"
    own = [fault for name in part_of(list(files)) for fault in faults_in(path / name)]
    return min(sum(distributed.gather_objects(own), []), default=None)


def faults_in(file):
    """A list of what is wrong with the tensors of a state's file, in words."""
    try:
        with safe_open(file, "pt") as tensors:
            return [f"{name} is not finite" for name in tensors.keys() for t in [tensors.get_tensor(name)]
                    if not t.sum().isfinite() and not t.isfinite().all()]
    except SafetensorError as error:
        return [f"{file.name} holds no tensors: {error}"]


def begin_moments(model, optimizer, steps=0.0):
    """Give the optimizer its state before its first step: moments of 0, and the number of steps it has
    done."""
    for p in trained(model).values():
        if hasattr(optimizer, "begin"):             # adafactor.py
            optimizer.state[p] = optimizer.begin(p, steps)
            continue
        optimizer.state[p] = {"step": torch.tensor(steps, device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}


def load_state(path, model, optimizer, scale=None):
    """Load a saved state in place, before the first step, at any number of ranks. Returns its step.

    scale: the LossScale, which is loaded too. ValueError if it is not a state of this model.
    """
    begin_moments(model, optimizer)
    own = scale.tensors() if scale else {}
    dcp = distributed_checkpoint()
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(state_tensors(model, optimizer) | own, storage_reader=dcp.HuggingFaceStorageReader(path),
                     no_dist=distributed.num_ranks() == 1)
    except dcp.api.CheckpointException as error:
        cause = " ".join(str(next(iter(error.failures.values()))[0]).split())
        raise ValueError(f"{path}: not a state of this model ({cause[:300]}); start anew") from None
    skipped = scale.load(own) if scale else 0
    for p in trained(model).values():
        optimizer.state[p]["step"].fill_(step_of(path) - skipped)
    return step_of(path)
