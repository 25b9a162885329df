"""Ranks: the process group, FSDP2 sharding, sums over ranks. torch's own `fully_shard` does the work.

One process (plain `python`, or torchrun with one rank) needs no process group: every function here is then the identity.
With one rank `shard` leaves the model alone, because FSDP2's bookkeeping costs more than half a step at toy size.
"""

import os
import sys
from datetime import timedelta
from math import ceil

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard


def setup():
    """Start the process group if torchrun started more than one rank. Returns the device of this rank."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if 0 < len(missing) < 3:
        raise ValueError(f"the environment has some of torchrun's variables but not {' '.join(missing)}; start with torchrun, or unset them")
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def close():
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(command):
    """Run command(device) as a program does: start the ranks, say a user's mistake in one line (exit code 2), leave the group."""
    try:
        command(setup())
    except (ValueError, OSError) as error:
        if is_main():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        close()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


def shard(model, dtype=torch.float32):
    """Shard parameters, gradients and optimizer state over the ranks: every decoder block, then the rest, in place.

    fp32 masters; `dtype` is the compute dtype of the gathered weights; gradients are reduced in fp32. A sharded model is left alone.
    """
    if num_ranks() == 1 or isinstance(model, FSDPModule):
        return model
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype != torch.float32 else MixedPrecisionPolicy()
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def own_rows(tensor):
    """(what this rank holds of a parameter, which rows of the whole these are); all of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(0, len(tensor))
    local, num_rows = tensor.to_local(), ceil(len(tensor) / num_ranks())                 # cut as torch.chunk does: the last ranks may have less
    start, end = min(rank() * num_rows, len(tensor)), min((rank() + 1) * num_rows, len(tensor))
    assert tensor.placements == (Shard(0),) and len(local) == end - start, (tensor.placements, local.shape, start, end)
    return local, slice(start, end)


def full(tensor):
    """The whole tensor of a shard (a collective: every rank must call it); a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(model):
    """{name: whole tensor on the CPU} of a sharded or plain model. A collective; every rank holds the result."""
    return {name: full(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}


def sum_over_ranks(tensor):
    """In-place sum of a tensor over all ranks; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(items):
    """[items of rank 0, items of rank 1, ...] on every rank; picklable Python objects made by ourselves."""
    if not dist.is_initialized():
        return [items]
    gathered = [None] * num_ranks()
    dist.all_gather_object(gathered, items)
    return gathered


def from_main(make):
    """Call `make` on rank 0 only and give its result to all. A ValueError there is raised on every rank."""
    box = [None]
    if is_main():
        try:
            box = [make()]
        except ValueError as error:
            box = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if isinstance(box[0], ValueError):
        raise box[0]
    return box[0]
