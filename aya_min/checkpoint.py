"""How I resume: model, optimizer and position of a run, whole, in safetensors and JSON. No pickle anywhere.

One logical state whatever the number of ranks: tensors are gathered, rank 0 writes them under a temporary name and renames the
folder, so `state/` is whole or absent. The data order needs no state beyond the step (data.Sampler), and training draws no random numbers.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from . import distributed


def save_state(folder, model, optimizer, step):
    """Write the state after `step` optimizer steps. A collective: every rank calls it, rank 0 writes."""
    weights = distributed.full_state(model)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if distributed.is_main():
        moments = {f"{name}|{key}": value.contiguous() for name, values in state["state"].items() for key, value in values.items()}
        folder = Path(folder)
        temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        temporary.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, temporary / "model.safetensors", metadata={"format": "pt"})
        save_file(moments, temporary / "optimizer.safetensors")
        groups = [{k: v for k, v in group.items() if not torch.is_tensor(v)} for group in state["param_groups"]]
        (temporary / "state.json").write_text(json.dumps({"step": step, "param_groups": groups}), encoding="utf-8")
        replace_folder(temporary, folder)
    distributed.barrier()


def replace_folder(temporary, folder):
    """Publish a finished folder under its name; an older one of the same name goes only after the new one is in place."""
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def load_state(folder, model, optimizer):
    """Load a state in place, before or after sharding, at any number of ranks. Returns the step to go on from."""
    folder = Path(folder)
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    weights, flat = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    state = {}
    for name, value in flat.items():
        parameter, key = name.split("|")
        state.setdefault(parameter, {})[key] = value
    load_weights(model, weights)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": saved["param_groups"]}, options=options)
    return saved["step"]


@torch.no_grad()
def load_weights(model, weights):
    """Copy whole tensors {name: tensor} into a plain or sharded model, in place; names and shapes must be the same."""
    own = model.state_dict()
    differ = {(name, tensor.shape) for name, tensor in own.items()} ^ {(name, tensor.shape) for name, tensor in weights.items()}
    assert not differ, sorted(differ)
    for name, target in own.items():
        local, rows = distributed.own_rows(target)
        local.copy_(weights[name][rows])
