"""Ranks: the process group, FSDP2 sharding by torch's `fully_shard`, sums over ranks, signals, exit codes.

One process (plain `python`, or torchrun with one rank) needs no process group: sums and gathers are then the
identity. With one rank `shard` leaves the model alone, because FSDP2's bookkeeping costs more than half a
step at toy size.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from math import ceil, prod

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from . import linear
from .command import OUR_FAULT, flush_output, named, number, one_line

# With --cpu-offload the gradient norm is computed on the CPU, so a GPU run needs gloo too.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def setup(timeout=1800):
    """Start the process group if torchrun started more than one rank. Returns the device of this rank.

    timeout: seconds that a rank waits in a collective before it takes the other ranks for dead and the run
    ends. ValueError if torchrun's environment variables are incomplete or wrong.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if 0 < len(missing) < 3:
        raise ValueError(f"the environment has some of torchrun's variables but not {' '.join(missing)}; "
                         "start with torchrun, or unset them")
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
            # torchrun (2.13) keeps one store over restarts, and the dead ranks' addresses are in it.
            own = dist.PrefixStore(f"restart {restart_count()}", store)
            backend = BACKENDS["cuda" if cuda else "cpu"]
            dist.init_process_group(backend, store=own, rank=rank, world_size=ranks, timeout=limit)
        except dist.DistNetworkError as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(f"rank {rank} of {ranks}: no connection to the other ranks at MASTER_ADDR:"
                             f"MASTER_PORT {place} ({str(error).splitlines()[0]}); start with "
                             "torchrun") from None
        if not cuda:
            linear.choose(from_main(linear.chosen))         # so that all ranks round alike
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def from_environment(name, default, interval):
    """A whole number from one of torchrun's environment variables. ValueError names it and its range."""
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
    """Set up this rank, run command(device), leave the group and end the process with an exit code.

    2: a user's mistake or a full disk, with one line on standard error. 143, 130: stopped by SIGTERM, SIGINT
    at a place from which it can resume (Stopped). Any other exception is a fault of this program: its
    traceback is shown, and torchrun repeats that of the rank that failed first. torchrun takes every code but
    0 for a failure: it stops the other ranks, and with --max-restarts starts all of them again.
    """
    @record
    def program():
        try:
            command(setup(timeout))
            flush_output()
        except Stopped as stopped:
            if is_main():
                print(stopped, file=sys.stderr)
            leave(128 + stopped.number)
        except (ValueError, OSError) as error:
            if not is_main():
                # Rank 0 nearly always reports the same error, and torchrun then ends this rank in its sleep.
                time.sleep(2)
            print(f"error{'' if is_main() else f' on rank {rank()}'}: {one_line(named(error))}",
                  file=sys.stderr)
            leave(2, group=False)           # other ranks may still wait in a collective of the group
        except Exception:
            first = f"rank {rank()} failed; if no other did so before it, " if num_ranks() > 1 else ""
            print(f"error: {first}{OUR_FAULT}", file=sys.stderr)
            raise
        leave(0)
    program()


def leave(code, group=True):
    """End the process with this exit code; a single process with code 0 returns instead.

    group: leave the process group first. One of several ranks ends without Python's cleanup, in which gloo's
    threads were seen to abort a rank (exit code -6), after all its work as well as after a refusal.
    """
    if group:
        close()
    if os.environ.get("WORLD_SIZE", "1") != "1":        # the group may have been left before
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def restart_count():
    """How often torchrun --max-restarts has restarted this command after a rank failed."""
    return from_environment("TORCHELASTIC_RESTART_COUNT", 0, "[0, 1000000000]")


class Stopped(Exception):
    """A signal ended the run, on all ranks at the same place. number: the signal's number."""

    def __init__(self, message, number):
        super().__init__(message)
        self.number = number


class Signals:
    """Remembers SIGTERM and SIGINT inside a `with`, so that all ranks can act on them at the same place.

    A second SIGINT ends the process at once.
    """

    def __init__(self):
        self.received = 0           # the signal's number

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self.remember) for number in numbers}
        return self

    def __exit__(self, *error):
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def remember(self, number, frame):
        self.received = int(number)
        if number == signal.SIGINT:
            # The kernel's handler also ends a process that waits inside a collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if is_main():
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step, then saving\n".encode())

    def any_rank(self, device):
        """Whether any rank was signalled. A collective."""
        return bool(sum_over_ranks(torch.tensor(float(self.received), device=device)).item())

    def agreed(self):
        """The largest number of a signal that a rank received, 0 if none did. A collective."""
        return max(gather_objects(self.received))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def say(text, paths=()):
    """Print one line on standard error, on rank 0 only. paths: the files that the line is about."""
    if is_main():
        about = f"{' '.join(map(str, paths))}: " if paths else ""
        print(one_line(about + text), file=sys.stderr)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def make_mesh(replicate=1, device_type=None):
    """The ranks as a DeviceMesh: (shard,), or (replicate, shard) for several copies of the model (HSDP)."""
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():               # one process with --cpu-offload
        dist.init_process_group(BACKENDS[device_type], store=dist.HashStore(), rank=0, world_size=1)
    if replicate == 1:
        return init_device_mesh(device_type, (num_ranks(),), mesh_dim_names=("shard",))
    shape = (replicate, num_ranks() // replicate)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def parts(model):
    """The modules that are sharded each by itself: the model, or those that it lists (critic.Learner)."""
    return getattr(model, "parts", [model])


def is_sharded(thing):
    """Whether a model or a tensor is in shards.

    FSDP and DTensor take 0.7 s to import (sympy is among what they import), so that they are imported only
    where something is sharded."""
    thing = parts(thing)[0]
    kinds = {"torch.distributed.fsdp": "FSDPModule", "torch.distributed.tensor": "DTensor"}
    return any(isinstance(thing, getattr(sys.modules[name], kind))
               for name, kind in kinds.items() if name in sys.modules)


def shard(model, dtype=torch.float32, replicate=1, cpu_offload=False, mesh=None):
    """Shard parameters, gradients and optimizer state over the ranks, in place: each block, then the rest.

    Master weights are fp32, `dtype` is the compute dtype of the gathered weights, and gradients are reduced
    in fp32. A model that is sharded already is left alone. replicate: the number of copies, each sharded over
    its part of the ranks. cpu_offload: the shards stay in the CPU's memory, where the model must be.
    """
    if (num_ranks() == 1 and not cpu_offload and not mesh) or is_sharded(model):
        return model
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    precision = MixedPrecisionPolicy()
    if dtype != torch.float32:
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                         cast_forward_inputs=False)         # cos and sin stay fp32
    how = {"mesh": mesh or make_mesh(replicate), "mp_policy": precision,
           "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy()}
    num_shards = how["mesh"].size(how["mesh"].ndim - 1)
    how["shard_placement_fn"] = lambda parameter: shard_dimension(parameter, num_shards)
    for part in parts(model):
        for block in part.model.layers:
            fully_shard(block, **how)
        fully_shard(part, **how)
    return model


def shard_dimension(parameter, num_shards):
    """How FSDP cuts a parameter: None for the rows; the rows of each expert's matrix (E, out, in) where the
    experts do not divide over the ranks, and the rows do."""
    from torch.distributed.tensor import Shard
    by_rows = parameter.dim() == 3 and parameter.shape[0] % num_shards and not parameter.shape[1] % num_shards
    return Shard(1) if by_rows else None


def own_rows(tensor):
    """(this rank's part of a parameter, the slice of its rows); a plain tensor with all its rows. Of a
    parameter that is cut along dimension 1 (shard_dimension) the slices of both dimensions."""
    if not is_sharded(tensor):
        return tensor, slice(0, len(tensor))
    *others, cut = tensor.placements
    assert cut.is_shard() and cut.dim in (0, 1) and all(p.is_replicate() for p in others), tensor.placements
    mesh, size = tensor.device_mesh, tensor.shape[cut.dim]
    part, parts = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    local = tensor.to_local()
    num_rows = ceil(size / parts)               # cut as by torch.chunk: the last ranks may have fewer
    rows = slice(min(part * num_rows, size), min((part + 1) * num_rows, size))
    assert local.shape[cut.dim] == rows.stop - rows.start, (local.shape, rows)
    return local, (slice(None), rows) if cut.dim else rows


def full(tensor):
    """The whole tensor of a sharded one; a plain tensor as it is. A collective: every rank must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def full_state(model):
    """{name: whole tensor on the CPU} of a sharded or plain model, on every rank. A collective."""
    return {name: full(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}


def blame(model):
    """The end of a message that names the first parameter with values that are not finite; "" if none has."""
    for name, parameter in model.named_parameters():
        if not own_rows(parameter.detach())[0].isfinite().all():
            return f"; its parameter {name} holds values that are not finite: copy or train it again"
    return ""


def fingerprint(model):
    """A hash of each tensor's name, shape, dtype and sum of bits. A collective.

    It is the same at any number of ranks, and quick, as it is computed where the weights are. It is meant to
    detect mistakes, not forgeries.
    """
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    about, sums, copies = [], [], []        # copies: how many ranks hold the same rows
    for name, tensor in model.state_dict().items():
        sharded = is_sharded(tensor)
        if sharded:
            places = zip(tensor.device_mesh.shape, tensor.placements)
            copies.append(prod(size for size, placement in places if placement.is_replicate()))
        else:
            copies.append(num_ranks())
        about.append([name, list(tensor.shape), str(tensor.dtype)])
        local = tensor.to_local() if sharded else tensor
        sums.append(local.view(bits[tensor.itemsize]).sum(dtype=torch.int64).item())
    totals = [sum(column) // count for column, count in zip(zip(*gather_objects(sums)), copies)]
    return hashlib.sha256(json.dumps([about, totals]).encode()).hexdigest()


def sum_over_ranks(tensor):
    """Sum a tensor over all ranks in place; returns it. A collective."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(items):
    """[items of rank 0, items of rank 1, ...] on every rank; picklable objects of our own. A collective."""
    if not dist.is_initialized():
        return [items]
    gathered = [None] * num_ranks()
    dist.all_gather_object(gathered, items)
    return gathered


def patiently(work, every=1.0):
    """[what work() returns on rank 0, on rank 1, ...] on every rank. A collective for work that may take one
    rank hours longer than another, more than a collective waits: work runs in a thread, and the ranks meet
    every so many seconds until all are done.

    A ValueError or OSError of one rank ends it on all.
    """
    if not dist.is_initialized():
        return [work()]
    found = []                                  # [(result, error)]

    def one():
        try:
            found.append((work(), None))
        except Exception as error:              # it is raised below
            found.append((None, error))
    thread = threading.Thread(target=one, daemon=True)
    thread.start()
    while True:
        thread.join(every)
        error = found[0][1] if found else None
        if error and not isinstance(error, (ValueError, OSError)):
            raise error
        states = gather_objects((bool(found), error))
        for _, error in states:
            if error:
                raise error
        if all(done for done, _ in states):
            return gather_objects(found[0][0])


def from_main(make):
    """Call `make` on rank 0 only and return its result on every rank. A collective.

    A ValueError or OSError of `make` is raised on every rank.
    """
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
