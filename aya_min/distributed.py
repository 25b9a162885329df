"""Ranks: the process group, FSDP2 sharding, sums over ranks. torch's own `fully_shard` does the work.

One process (plain `python`, or torchrun with one rank) needs no process group: every function here is then the identity.
With one rank `shard` leaves the model alone, because FSDP2's bookkeeping costs more than half a step at toy size.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from datetime import timedelta
from math import ceil, prod

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard

from . import linear
from .command import OUR_FAULT, number, one_line

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}        # by device; with --cpu-offload gradients are normed on the CPU


def setup(timeout=1800):
    """Start the process group if torchrun started more than one rank. Returns the device of this rank.

    timeout: seconds that a rank waits in a collective for the others, before it takes them for dead and the run goes down."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if 0 < len(missing) < 3:
        raise ValueError(f"the environment has some of torchrun's variables but not {' '.join(missing)}; start with torchrun, or unset them")
    cuda = torch.cuda.is_available()
    ranks = from_environment("WORLD_SIZE", 1, "[1, 1000000]")
    rank = from_environment("RANK", 0, f"[0, {ranks - 1}]")
    local_rank = from_environment("LOCAL_RANK", 0, f"[0, {torch.cuda.device_count() - 1 if cuda else rank}]")
    restart_count()
    if cuda:
        torch.cuda.set_device(local_rank)
    if ranks > 1 and not dist.is_initialized():
        from_environment("MASTER_PORT", None, "[0, 65535]")
        limit = timedelta(seconds=timeout)
        try:
            store, rank, ranks = next(rendezvous("env://", timeout=limit))
            # torchrun (2.13) keeps one store over restarts, with the dead ranks' addresses in it
            own = dist.PrefixStore(f"restart {restart_count()}", store)
            backend = BACKENDS["cuda" if cuda else "cpu"]
            dist.init_process_group(backend, store=own, rank=rank, world_size=ranks, timeout=limit)
        except dist.DistNetworkError as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(f"rank {rank} of {ranks}: no way to the others over MASTER_ADDR:MASTER_PORT "
                             f"{place} ({str(error).splitlines()[0]}); start with torchrun") from None
        if not cuda:
            linear.choose(from_main(linear.chosen))         # so that all ranks round alike
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def from_environment(name, default, interval):
    """A whole number of torchrun's environment. ValueError names the variable, its value and its range."""
    if name not in os.environ and default is not None:
        return default
    try:
        return number(int, interval)(os.environ.get(name, ""))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"the environment variable {name}={error}; start with torchrun, or unset its "
                         "variables") from None


def close():
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(command, timeout=1800):
    """Run command(device) as a program does: start the ranks, leave the group, say what went wrong and end with a code that tells it.

    2: a user's mistake or a full disk, one line on standard error. 143, 130: stopped by SIGTERM, SIGINT where it can go on from (Stopped).
    Anything else is ours: its traceback, which torchrun repeats for the rank that failed first. Under torchrun any of them is a failure:
    it stops the other ranks, and with --max-restarts starts all of them again."""
    @record
    def run():
        try:
            command(setup(timeout))
        except Stopped as stopped:
            if is_main():
                print(stopped, file=sys.stderr)
            leave(128 + stopped.number)
        except (ValueError, OSError) as error:
            if not is_main():           # nearly always rank 0 says the same, and torchrun then ends this one in its sleep
                time.sleep(2)
            print(f"error{'' if is_main() else f' on rank {rank()}'}: {one_line(error)}", file=sys.stderr)
            leave(2, group=False)           # the other ranks may still wait in a collective of the group
        except Exception:
            first = f"rank {rank()} failed; if no other did so before it, " if num_ranks() > 1 else ""
            print(f"error: {first}{OUR_FAULT}", file=sys.stderr)
            raise
        leave(0)
    run()


def leave(code, group=True):
    """End with this exit code (one process with code 0: return). group: leave the process group first, which
    waits for the others. One of several ranks ends without Python's own clearing up: gloo's
    threads were seen to abort a rank in it (exit code -6), after all its work and after a refusal alike."""
    several = num_ranks() > 1
    if group:
        close()
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def restart_count():
    """How often torchrun --max-restarts has started this very command again, after a rank of it had failed."""
    return from_environment("TORCHELASTIC_RESTART_COUNT", 0, "[0, 1000000000]")


class Stopped(Exception):
    """A signal ended the run, on all ranks at the same place. number: the signal's."""

    def __init__(self, message, number):
        super().__init__(message)
        self.number = number


class Signals:
    """SIGTERM and SIGINT inside a `with`: remembered, to be acted on where all ranks can do it together. A second SIGINT ends the process at once."""

    def __init__(self):
        self.received = 0                                       # the signal's number

    def __enter__(self):
        self.before = {number: signal.signal(number, self.remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def remember(self, number, frame):
        self.received = int(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)        # the kernel's, which also ends a process that waits inside a collective
        if is_main():
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step, then saving\n".encode())

    def any_rank(self, device):
        """Whether any rank was signalled. A collective."""
        return bool(sum_over_ranks(torch.tensor(float(self.received), device=device)).item())

    def agreed(self):
        """The number of the signal that some rank got. A collective."""
        return max(gather_objects(self.received))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def say(text, paths=()):
    """One line on standard error, of rank 0. paths: the files that it is about."""
    if is_main():
        about = f"{' '.join(map(str, paths))}: " if paths else ""
        print(one_line(about + text), file=sys.stderr)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def make_mesh(replicate=1, device_type=None):
    """The ranks as a DeviceMesh: one line, or (replicate, shard) where there are several copies of the model (HSDP)."""
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():                                                        # one process with --cpu-offload
        dist.init_process_group(BACKENDS[device_type], store=dist.HashStore(), rank=0, world_size=1)
    if replicate == 1:
        return init_device_mesh(device_type, (num_ranks(),), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicate, num_ranks() // replicate), mesh_dim_names=("replicate", "shard"))


def shard(model, dtype=torch.float32, replicate=1, cpu_offload=False, mesh=None):
    """Shard parameters, gradients and optimizer state over the ranks: every decoder block, then the rest, in place.

    fp32 masters; `dtype` is the compute dtype of the gathered weights; gradients are reduced in fp32. A sharded model is left alone.
    replicate: so many copies, each sharded over its part of the ranks. cpu_offload: the shards stay in the CPU's memory, where the model must be.
    """
    if (num_ranks() == 1 and not cpu_offload and not mesh) or isinstance(model, FSDPModule):
        return model
    how = {"mesh": mesh or make_mesh(replicate), "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
           "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)       # cos and sin stay fp32
           if dtype != torch.float32 else MixedPrecisionPolicy()}
    for block in model.model.layers:
        fully_shard(block, **how)
    fully_shard(model, **how)
    return model


def own_rows(tensor):
    """(what this rank holds of a parameter, which rows of the whole these are); all of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(0, len(tensor))
    assert tensor.placements[-1] == Shard(0) and all(p.is_replicate() for p in tensor.placements[:-1]), tensor.placements
    mesh, last = tensor.device_mesh, tensor.device_mesh.ndim - 1
    local, part, parts = tensor.to_local(), mesh.get_local_rank(last), mesh.size(last)
    num_rows = ceil(len(tensor) / parts)                                                 # cut as torch.chunk does: the last ranks may have less
    start, end = min(part * num_rows, len(tensor)), min((part + 1) * num_rows, len(tensor))
    assert len(local) == end - start, (local.shape, start, end)
    return local, slice(start, end)


def full(tensor):
    """The whole tensor of a shard (a collective: every rank must call it); a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(model):
    """{name: whole tensor on the CPU} of a sharded or plain model. A collective; every rank holds the result."""
    return {name: full(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}


def blame(model):
    """"; its parameter NAME holds values that are not finite", of the first that does; "" if none does."""
    for name, parameter in model.named_parameters():
        if not own_rows(parameter.detach())[0].isfinite().all():
            return f"; its parameter {name} holds values that are not finite: copy or train it again"
    return ""


def fingerprint(model):
    """A short text that no other architecture and no other weights have: of each tensor's name, shape, type and the sum of its bits, the same at
    any number of ranks. Quick, where the weights are; it is to tell mistakes, not forgeries. A collective."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    about, sums = [], []
    for name, tensor in model.state_dict().items():
        sharded = isinstance(tensor, DTensor)
        copies = prod(n for n, p in zip(tensor.device_mesh.shape, tensor.placements) if p.is_replicate()) if sharded else num_ranks()
        about.append([name, list(tensor.shape), str(tensor.dtype), copies])
        sums.append((tensor.to_local() if sharded else tensor).view(bits[tensor.itemsize]).sum(dtype=torch.int64).item())
    totals = [sum(column) // row.pop() for column, row in zip(zip(*gather_objects(sums)), about)]
    return hashlib.sha256(json.dumps([about, totals]).encode()).hexdigest()


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
    """Call `make` on rank 0 only and give its result to all. A ValueError or OSError there is raised on every rank."""
    box = [None]
    if is_main():
        try:
            box = [make()]
        except (ValueError, OSError) as error:
            box = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if isinstance(box[0], (ValueError, OSError)):
        raise box[0]
    return box[0]
