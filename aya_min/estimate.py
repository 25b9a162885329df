"""What a stage will need, before it runs and without a GPU: `--dry-run`. Memory of one rank part by part, communication, tokens and operations a step.

Nothing about the model, its loss or FSDP is written down here a second time as a formula: a step is run, on torch's fake tensors, which have a shape
and no numbers, beside torch's fake process group, which stands for the other ranks. `Watch` adds up the storages that come and go. (torch's own
MemTracker gives the same totals; it takes fifteen times as long and does not tell FSDP's buffers, and the logits, from the rest.)

Known gaps: the step is eager, torch.compile keeps less; the kernels are the CPU's. Not counted: what CUDA, NCCL and cuBLAS take, and holes in the
allocator. A card that is sold as 80 GB has 85, one of 141 has 150: those 6 percent are left for them.
"""

import inspect
import json
import weakref
from collections import Counter
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from . import distributed, stages
from .data import Pair, batches_in_order, collate, collate_pairs, length_of
from .loop import make_optimizer, training_flops
from .losses import sft_loss
from .reference import answer_logps, reference_rows
from .sampling import answer_rows, cache_sizes, round_up

CARDS = (80, 141)           # GB: A100 and H100, H200
PARTS = ("parameters", "gradients", "optimizer moments", "activations", "logits chunk", "gathered by FSDP", "work of the backward")


def tensors_in(values):
    return [t for value in values for t in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(t, torch.Tensor)]


class Watch(TorchDispatchMode):
    """The bytes that are alive, by part, while operations run, and what they were when they were most."""

    def __init__(self, config):
        super().__init__()
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.storages, self.alive, self.part = weakref.WeakKeyDictionary(), Counter(), "activations"    # part: of what is made now
        self.peak, self.most, self.traffic, self.resize = {}, Counter(), Counter(), torch.UntypedStorage.resize_        # most: of each part by itself

    def __enter__(self):
        def resize(storage, size):                              # how FSDP gives back what it gathered: no operation tells
            self.resize(storage, size)
            if storage in self.storages:
                self.count(storage)
        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def count(self, storage, part=None):
        """Count a storage in its part, or again if its size or part is another now."""
        if storage not in self.storages:
            self.storages[storage] = [part or self.part, 0]
            weakref.finalize(storage, self.forget, self.storages[storage])
        entry = self.storages[storage]
        self.alive[entry[0]] -= entry[1]
        entry[:] = part or entry[0], storage.nbytes()
        self.alive[entry[0]] += entry[1]
        self.most[entry[0]] = max(self.most[entry[0]], self.alive[entry[0]])
        if self.alive.total() > sum(self.peak.values()):
            self.peak = dict(self.alive)

    def forget(self, entry):
        self.alive[entry[0]] -= entry[1]

    def mark(self, tensors, part):
        for tensor in tensors:
            self.count((tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage(), part)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = operation.name(), kwargs or {}
        if name == "prim::device":                              # most of all calls
            return args[0].device if type(args[0]) is torch.Tensor else args[0].fake_device
        given = tensors_in([*args, *kwargs.values()])
        if all(type(t) is torch.Tensor for t in given) and (given or name.startswith("aten::arange")):
            with unset_fake_temporarily():                      # the batch has numbers, and with them which tokens are supervised, and how many
                return operation(*args, **kwargs)
        if name == "aten::index.Tensor":
            with unset_fake_temporarily():
                args = args[0], [i for mask in args[1] for i in (mask.nonzero().unbind(1) if mask is not None and mask.dtype == torch.bool else [mask])]
        made = operation(*args, **kwargs)
        if name.startswith("c10d::_"):
            out, own = args[:2]
            gathers = out.numel() > own.numel()
            self.traffic["all-gathered" if gathers else "reduce-scattered"] += abs(out.nbytes - own.nbytes)
            self.mark([out], "gathered by FSDP" if gathers else "gradients")
        elif name == "c10d::allreduce_":
            self.traffic["all-reduced"] += sum(t.nbytes for t in args[0])
        elif name.startswith("fsdp::"):                         # the weights that are copied out of what was gathered
            self.mark(tensors_in([kwargs.get("out")]), "gathered by FSDP")
        for tensor in tensors_in([made]):
            if isinstance(tensor, FakeTensor):
                is_logits = tensor.dim() == 2 and tensor.shape[1] == self.vocab_size and tensor.shape[0] != self.hidden_size
                self.count(tensor.untyped_storage(), "logits chunk" if is_logits and tensor.untyped_storage() not in self.storages else None)
        return made


def simulate(model_class, config, settings, loss_fn, batch, ranks, num_micro_batches=1):
    """A Watch of one optimizer step of rank 0, its peak and its traffic; `batch` (plain tensors) stands for each of the micro-batches.

    The moments are there, and the gradients of earlier micro-batches if there are any, so that one tells; of HSDP two, where FSDP keeps those in a way of its own.
    """
    mesh, watch, fake = None, Watch(config), FakeTensorMode(allow_non_fake_inputs=True)
    if ranks > 1 or settings.cpu_offload:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        mesh = distributed.make_mesh(settings.replicate, "cpu")
    try:
        with fake:
            model = model_class(config).train()
            if mesh:
                distributed.shard(model, getattr(torch, settings.dtype), settings.replicate, mesh=mesh)
        model.model.activation_checkpointing, model.model.packing = settings.activation_checkpointing, bool(settings.packing)
        optimizer = make_optimizer(model, settings)
        with fake, watch:
            watch.mark(model.parameters(), "parameters")
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(lambda p: watch.mark([p.grad], "gradients"))
                p.grad = torch.zeros_like(p)
                watch.mark([p.grad], "gradients")
            optimizer.step()
            watch.mark((t for state in optimizer.state.values() for t in state.values()), "optimizer moments")
            rounds = min(2, num_micro_batches) if settings.replicate > 1 else 1
            if rounds == 2 or num_micro_batches == 1:
                optimizer.zero_grad()
            watch.peak, watch.most = {}, Counter(watch.alive)
            for last in [False, True][-rounds:]:
                if mesh:
                    model.set_requires_all_reduce(last)
                watch.part, loss_sum = "activations", None
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16" and not mesh):
                    loss_sum = loss_fn(model, batch)[0]
                watch.part = "work of the backward"
                loss_sum.backward()                             # clipping and a fused AdamW work in place: the peak is behind
    finally:
        if mesh:
            distributed.close()
    watch.traffic = Counter({name: size * num_micro_batches / rounds if name != "all-reduced" else size for name, size in watch.traffic.items()})
    watch.traffic["all-reduced"] *= 2 * (settings.replicate - 1) / settings.replicate          # a ring sends and receives everything twice, but for its own part
    return watch


def forward_bytes(model_class, config, settings, loss_fn, batch, sharded):
    """The most bytes that a forward without gradients takes beside the weights. A plain one in bf16 keeps a cast copy of them all (autocast's)."""
    fake, watch = FakeTensorMode(allow_non_fake_inputs=True), Watch(config)
    with fake:
        model = model_class(config).eval()
        model = model.bfloat16() if sharded and settings.dtype == "bfloat16" else model
    with fake, watch, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16" and not sharded):
        watch.mark(model.parameters(), "parameters")
        loss_fn(model, batch)
    return sum(watch.peak.values()) - sum(p.nbytes for p in model.parameters())


# ---- what a stage trains on, and what else it holds ----------------------------------------------------------------------------------

def items_of(stage, settings, data, tokenizer):
    """The examples or pairs that the stage would train on, or one of --max-length tokens without data."""
    loaded = stage.load(data, tokenizer, settings.max_length, settings) if data else [None]
    return [stage.blank(item, settings.max_length, settings) for item in loaded]


def rows_of(item, samples=1):
    """The rows of a batch that an item becomes."""
    return [item.chosen, item.rejected] if isinstance(item, Pair) else [item] * samples


def largest(items, size, samples=1):
    """The largest batch of this many items: the longest together."""
    longest = sorted(items * -(-size // len(items)), key=length_of)[-size:]
    if isinstance(longest[0], Pair):
        return collate_pairs(longest)
    batch = collate([row for item in longest for row in rows_of(item, samples)])
    return replace(batch, ref_logps=(zeros := torch.zeros(len(batch.mask))), advantages=zeros, rewards=zeros)      # as rloo's have


def default(function, name):
    return inspect.signature(function).parameters[name].default


def cache_bytes(config, settings, items, ranks):
    """The KV cache while rloo samples: the rows of one rank, in fp32, as in sampling.plan."""
    rows = min(default(answer_rows, "batch_size"), -(-settings.batch_size // ranks) * settings.num_samples)
    return rows * sum(cache_sizes(config, round_up(max(map(length_of, items))))) * 2 * config.num_key_value_heads * config.head_dim * 4


# ---- the table -----------------------------------------------------------------------------------------------------------------------

def dry_run(command, name, model, settings, data, eval_data, tokenizer, ranks, reward_model=None):
    """The text of --dry-run. model, reward_model: on the meta device; without a reward model rloo is taken to have one of the policy's size."""
    stage = stages.stage_named(command)
    config, fitting = model.config, replace(settings, max_length=stages.fitting(settings, model))
    items, loss_fn = items_of(stage, fitting, data, tokenizer), stage.loss(settings)
    share, samples = settings.batch_size // ranks, settings.num_samples if stage.samples else 1
    size = settings.micro_batch_size or share
    batch = largest(items, size, samples)
    watch = simulate(type(model), config, settings, loss_fn, batch, ranks, share // size)
    forward = lambda loss_fn, items, size: forward_bytes(type(model), config, settings, loss_fn, largest(items, size), ranks > 1)
    plain = lambda model: sum(4 * p.numel() for p in model.parameters())                    # bytes of a whole copy in fp32
    shards = ranks // settings.replicate
    step = {part: watch.peak.get(part, 0) for part in PARTS}
    on_cpu = sum(step.pop(part) for part in PARTS[:3]) if settings.cpu_offload else 0
    if stage.samples:
        step |= {"policy, whole, to sample from": plain(model), "reference": plain(model) // shards, "reward model": plain(reward_model or model) // shards}
        if settings.cpu_offload:
            on_cpu += step.pop("reference") + step.pop("reward model")
    held = sum(step.get(part, 0) for part in ("parameters", "optimizer moments", "policy, whole, to sample from", "reference", "reward model"))
    later = lambda part, size: f", {watch.most[part] / 1e9:.2f} at another moment" if watch.most[part] > 1.05 * size + 1e7 else ""
    phases = {"in all, in a training step": sum(step.values())}
    if eval_data:
        held_out = items_of(stage, fitting, eval_data, tokenizer)
        size_of_batch = default(batches_in_order, "size")
        phases["in all, in an evaluation"] = held + forward(loss_fn, held_out, size_of_batch)
    texts = [row for item in items for row in rows_of(item, samples)]
    if stage.start:
        sharded = sum(step.get(part, 0) for part in ("parameters", "gathered by FSDP"))
        phases["in all, in the reference pass before"] = sharded + forward(sft_loss, texts, reference_rows(settings))
    if stage.samples:
        cache = cache_bytes(config, settings, items, ranks)
        largest_tensor = max(4 * p.numel() for p in model.parameters()) if ranks > 1 else 0         # gathered one by one for the copy that samples
        sampling = max(cache, largest_tensor, step.get("gathered by FSDP", 0) + forward(sft_loss, texts, default(answer_logps, "size")))
        phases[f"in all, while it samples; {cache / 1e9:.2f} of KV cache"] = held + sampling
    peak = max(phases.values())
    lengths, supervised = [len(text.ids) for text in texts], sum(int(text.mask.sum()) for text in texts)
    flops = settings.batch_size / len(items) * training_flops(config, lengths, supervised)
    of = "the data" if data else "--max-length" if not stage.samples else "--max-length, the answer included"
    return "\n".join([
        f"{command} of {name}: {sum(p.numel() for p in model.parameters()):,} parameters on {ranks} ranks, {settings.dtype}, activation checkpointing {settings.activation_checkpointing}",
        f"the largest of {share // size} micro-batches: {' x '.join(map(str, batch.mask.shape))} tokens, {int(batch.mask.sum()):,} supervised; lengths from {of}",
        "", "    GB  on each rank", *(f"{size / 1e9:6.2f}  {part}{later(part, size)}" for part, size in step.items() if size or watch.most[part]), *(f"{size / 1e9:6.2f}  {phase}" for phase, size in phases.items()),
        *([f"{on_cpu / 1e9:6.2f}  parameters, gradients, moments in the CPU's memory"] if on_cpu else []),
        "        " + ", ".join(f"{'fits' if peak <= card * 1e9 else 'does not fit'} {card} GB" for card in CARDS),
        "", "        a step", *(f"{size / 1e9:6.2f}  {what} by each rank" for what, size in watch.traffic.items() if size),
        f"{settings.batch_size * sum(lengths) / len(items):,.0f} tokens: {settings.batch_size} x {sum(lengths) / len(items):,.1f}, the longest text {max(lengths):,}",
        f"{flops:.3g} floating-point operations of the model, {flops / ranks:.3g} on each rank",
        f"settings {json.dumps(asdict(settings))}"])
