"""`--dry-run`: what a stage will need, computed before it runs and without a GPU: the memory of one rank part
by part, and communication, tokens and operations per step.

No formula here repeats the model, its loss or FSDP. One step runs on torch's fake tensors, which have shapes
but no values, with torch's fake process group in place of other ranks, and `Watch` adds up the storages that
are alive. (torch's own MemTracker gives the same totals, but takes fifteen times as long and does not
separate FSDP's buffers and the logits from the rest.)

Known gaps: the step is eager, whereas torch.compile keeps less, and its kernels are the CPU's. The memory of
CUDA, NCCL and cuBLAS and the allocator's fragmentation are not counted. The 6 percent that a card has beyond
its name (85 GB for 80, 150 for 141) are left for them.
"""

import inspect
import json
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from . import balance, checkpoint, distributed, stages
from .config import WITH_CRITIC
from .critic import Critic, Learner
from .data import batches_in_order, collate, count_steps, length_of
from .dropout import of_step
from .engine import cache_sizes, round_up
from .flops import training_flops
from .loop import autocast, make_optimizer
from .losses import sft_loss
from .mixture_stream import Stream
from .reference import answer_logps, reference_rows
from .sampling import answer_rows
from .selection import Selector, gradients_at_logits, rows_at_once

# GB of an A100 or H100, and of an H200.
CARDS = (80, 141)
# The examples of a mixture's stream whose lengths are looked at.
SAMPLE = 1000
PARTS = ("parameters", "gradients", "optimizer moments", "activations", "logits chunk", "gathered by FSDP",
         "work of the backward")
# Parts that a rollout stage holds besides.
POLICY_COPY, REFERENCE, REWARD_MODEL = "policy, whole, to sample from", "reference", "reward model"


def tensors_in(values):
    """The tensors among the values and in lists or tuples among them."""
    flat = [each for value in values for each in (value if isinstance(value, (list, tuple)) else (value,))]
    return [each for each in flat if isinstance(each, torch.Tensor)]


class Watch(TorchDispatchMode):
    """Counts the bytes that are alive, by part, while operations run.

    part: the part of tensors made from now on. alive: {part: bytes} now. peak: {part: bytes} when their sum
    was largest. most: {part: the largest bytes at any time}. traffic: {kind of collective: bytes}.
    """

    def __init__(self, config):
        super().__init__()
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.storages, self.part = weakref.WeakKeyDictionary(), "activations"
        self.alive, self.most, self.traffic = Counter(), Counter(), Counter()
        self.peak = {}
        self.resize = torch.UntypedStorage.resize_

    def __enter__(self):
        # FSDP frees what it gathered by resizing storages, which is no operation that a dispatch mode sees.
        def resize(storage, size):
            self.resize(storage, size)
            if storage in self.storages:
                self.count(storage)
        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def count(self, storage, part=None):
        """Count a storage in its part. One that is already counted gets its present size and part."""
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
        """Count these tensors in `part`; of a DTensor this rank's shard."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self.count(local.untyped_storage(), part)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = operation.name(), kwargs or {}
        if name == "prim::device":
            # A short cut for the most frequent call.
            return args[0].device if type(args[0]) is torch.Tensor else args[0].fake_device
        given = tensors_in([*args, *kwargs.values()])
        if all(type(t) is torch.Tensor for t in given) and (given or name.startswith("aten::arange")):
            # The batch has values, so that the number of supervised tokens is known.
            with unset_fake_temporarily():
                return operation(*args, **kwargs)
        if name == "aten::index.Tensor":
            with unset_fake_temporarily():
                args = args[0], without_masks(args[1])
        made = operation(*args, **kwargs)
        if name.startswith("c10d::_"):
            out, own = args[:2]
            gathers = out.numel() > own.numel()
            self.traffic["all-gathered" if gathers else "reduce-scattered"] += abs(out.nbytes - own.nbytes)
            self.mark([out], "gathered by FSDP" if gathers else "gradients")
        elif name == "c10d::allreduce_":
            self.traffic["all-reduced"] += sum(t.nbytes for t in args[0])
        elif name.startswith("fsdp::"):
            # The weights that FSDP copies out of what it gathered.
            self.mark(tensors_in([kwargs.get("out")]), "gathered by FSDP")
        for tensor in tensors_in([made]):
            if isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                is_new = storage not in self.storages
                self.count(storage, "logits chunk" if is_new and self.is_logits(tensor) else None)
        return made

    def is_logits(self, tensor):
        shape = tensor.shape
        return len(shape) == 2 and shape[1] == self.vocab_size and shape[0] != self.hidden_size


def without_masks(indices):
    """Indices of a tensor with each boolean mask replaced by its coordinates, whose number is then known."""
    out = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        out += index.nonzero().unbind(1) if is_mask else [index]
    return out


def simulate(model_class, config, settings, loss_fn, batch, ranks, num_micro_batches=1, critic_config=None):
    """A Watch of one optimizer step of rank 0, with its peak and traffic. Every micro-batch is taken to be
    `batch` (plain tensors). critic_config: of the critic that is trained beside the model, or None.

    One micro-batch is simulated with optimizer moments and accumulated gradients already allocated; its peak
    equals the step's. With HSDP two are, because FSDP keeps accumulated gradients differently there.
    """
    mesh, watch, fake = None, Watch(config), FakeTensorMode(allow_non_fake_inputs=True)
    if ranks > 1 or settings.cpu_offload:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        mesh = distributed.make_mesh(settings.replicate, "cpu")
    try:
        with fake:
            model = model_class(config)
            model = (Learner(model, Critic(critic_config)) if critic_config else model).train()
            if mesh:
                distributed.shard(model, getattr(torch, settings.dtype), settings.replicate, mesh=mesh)
        for part in distributed.parts(model):
            part.model.activation_checkpointing = settings.activation_checkpointing
            part.model.packing = bool(settings.packing)
            if drops := of_step(settings, 0):
                with fake:                                  # so that the masks, made from the seed, count
                    part.model.dropout = drops._replace(seed=torch.zeros((), dtype=torch.int32))
        optimizer = make_optimizer(model, settings)
        with fake, watch:
            watch.mark(model.parameters(), "parameters")
            for p in checkpoint.trained(model).values():
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
                with autocast(model, settings, torch.device("cpu")):
                    loss_sum = loss_fn(model, batch)[0]
                watch.part = "work of the backward"
                # Clipping and the fused AdamW work in place, so the step's peak is reached here.
                loss_sum.backward()
    finally:
        if mesh:
            distributed.close()
    for name in watch.traffic:
        if name != "all-reduced":
            watch.traffic[name] *= num_micro_batches / rounds
    # A ring sends and receives everything twice, except each rank's own part.
    watch.traffic["all-reduced"] *= 2 * (settings.replicate - 1) / settings.replicate
    return watch


def forward_bytes(model_class, config, settings, loss_fn, batch, sharded):
    """The peak bytes of a forward without gradients, weights not included. In half precision the forward of
    an unsharded model keeps autocast's cast copies of all weights."""
    fake, watch = FakeTensorMode(allow_non_fake_inputs=True), Watch(config)
    with fake:
        model = model_class(config).eval()
        half = sharded and settings.dtype != "float32"
        model = model.to(getattr(torch, settings.dtype)) if half else model
    context = nullcontext() if sharded else autocast(model, settings, torch.device("cpu"))
    with fake, watch, torch.no_grad(), context:
        watch.mark(model.parameters(), "parameters")
        loss_fn(model, batch)
    return sum(watch.peak.values()) - sum(p.nbytes for p in model.parameters())


# ---- what a stage trains on, and what else it holds --------------------------------------------------------

def items_of(stage, settings, data, tokenizer):
    """The examples or pairs that the stage would train on. Without data: a single one of --max-length
    tokens."""
    loaded = stage.load(data, tokenizer, settings.max_length, settings) if data else [None]
    if isinstance(loaded, Stream):
        distributed.say(f"the lengths are those of at most {SAMPLE:,} of {len(loaded):,} examples", data)
        loaded = loaded.sample(SAMPLE)
    return [stage.blank(item, settings.max_length, settings) for item in loaded]


def largest(items, size, collate_fn, samples=1):
    """The largest batch of `size` items, which is that of the longest, each with its samples."""
    longest = sorted(items * -(-size // len(items)), key=length_of)[-size:]
    return collate_fn([item for item in longest for _ in range(samples)])


def default(function, name):
    """The default of a function's parameter."""
    return inspect.signature(function).parameters[name].default


def cache_bytes(config, settings, items, ranks):
    """Bytes of one rank's KV cache in fp32 while rl samples, as in sampling.engine_size."""
    rows = min(default(answer_rows, "batch_size"), -(-settings.batch_size // ranks) * settings.num_samples)
    positions = sum(cache_sizes(config, round_up(max(map(length_of, items)))))         # of all layers
    return rows * positions * 2 * config.num_heads[1] * config.head_dim * 4


# ---- the table ---------------------------------------------------------------------------------------------

def plain_bytes(model):
    """Bytes of a whole copy of the model in fp32."""
    return sum(4 * p.numel() for p in model.parameters())


def idle_parameters(model):
    """The number of parameters of the experts to which a token is not sent."""
    mixture = model.config.mixture
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    return experts * (len(mixture.experts) - mixture.top_k) // len(mixture.experts) if mixture else 0


def num_scored(settings):
    """Examples that each step scores to choose from (config_selection.py)."""
    return getattr(settings, "num_scored", 0)


def phases_of(stage, model, settings, items, held_out, step, ranks):
    """{a phase of the stage: its peak bytes on one rank}. step: {part: bytes} of a training step."""
    config = model.config

    def forward(loss_fn, items, size, collate_fn=collate):
        batch = largest(items, size, collate_fn)
        return forward_bytes(type(model), config, settings, loss_fn, batch, ranks > 1)

    def size_of(*parts):
        return sum(step.get(part, 0) for part in parts)

    held = size_of("parameters", "optimizer moments", POLICY_COPY, REFERENCE, REWARD_MODEL)
    texts = [side for item in items for side in item.sides]
    phases = {"in all, in a training step": sum(step.values())}
    if held_out:
        peak = forward(stage.loss(settings), held_out, default(batches_in_order, "size"), stage.collate)
        phases["in all, in an evaluation"] = held + peak
    if stage.start and stages.has_reference(settings):
        peak = forward(sft_loss, texts, reference_rows(settings))
        phases["in all, in the reference pass before"] = size_of("parameters", "gathered by FSDP") + peak
    if num_scored(settings):
        score = gradients_at_logits if settings.select == "grad-norm" else sft_loss
        peak = forward(score, texts, rows_at_once(settings, config, texts))
        phases["in all, while it scores what to choose from"] = held + peak
    if stage.samples:
        cache = cache_bytes(config, settings, items, ranks)
        # The policy's tensors are gathered one by one for the copy that samples.
        largest_tensor = max(4 * p.numel() for p in model.parameters()) if ranks > 1 else 0
        scoring = size_of("gathered by FSDP") + forward(sft_loss, texts, default(answer_logps, "size"))
        name = f"in all, while it samples; {cache / 1e9:.2f} of KV cache"
        phases[name] = held + max(cache, largest_tensor, scoring)
    return phases


def dry_run(command, name, model, settings, data, eval_data, tokenizer, ranks, reward_model=None):
    """The text of --dry-run. model, reward_model: on the meta device. Without a reward model rl's is taken to
    have the policy's size."""
    stage = stages.stage_named(command)
    balance.weights_of(settings, model)
    fitting = replace(settings, max_length=stages.fitting(settings, model))
    items = items_of(stage, fitting, data, tokenizer)
    held_out = items_of(stage, fitting, eval_data, tokenizer) if eval_data else []
    if data and getattr(settings, "chooses", False):
        # It refuses what a run would refuse.
        Selector(items, tokenizer, fitting.max_length, settings, count_steps(len(items), settings))
    share, samples = settings.batch_size // ranks, settings.num_samples if stage.samples else 1
    size = settings.micro_batch_size or share
    batch = largest(items, size, stage.collate, samples)
    critic_config = None
    if stage.samples and settings.algorithm in WITH_CRITIC:
        critic_config = (reward_model or model).config
    watch = simulate(type(model), model.config, settings, stage.loss(settings), batch, ranks, share // size,
                     critic_config)
    step = {part: watch.peak.get(part, 0) for part in PARTS}
    on_cpu = sum(step.pop(part) for part in PARTS[:3]) if settings.cpu_offload else 0
    if stage.samples:
        shards = ranks // settings.replicate
        step[POLICY_COPY] = plain_bytes(model)
        step[REFERENCE] = plain_bytes(model) // shards
        step[REWARD_MODEL] = plain_bytes(reward_model or model) // shards
        if settings.cpu_offload:
            on_cpu += step.pop(REFERENCE) + step.pop(REWARD_MODEL)
    phases = phases_of(stage, model, settings, items, held_out, step, ranks)
    peak = max(phases.values())
    texts = [side for item in items for side in item.sides * samples]
    lengths, supervised = [len(text.ids) for text in texts], sum(int(text.mask.sum()) for text in texts)
    flops = settings.batch_size / len(items) * (
        training_flops(model.config, lengths, supervised)
        + (training_flops(critic_config, lengths, 0) if critic_config else 0))
    # A forward is a third of forward and backward.
    scoring = num_scored(settings) / len(items) * training_flops(model.config, lengths, supervised) / 3
    per_item = sum(lengths) / len(items)                                    # tokens
    source = "the data" if data else "--max-length" + (", the answer included" if stage.samples else "")
    fits = [f"{'fits' if peak <= card * 1e9 else 'does not fit'} {card} GB" for card in CARDS]

    def line(size, text):
        return f"{size / 1e9:6.2f}  {text}"

    def at_another_moment(part, size):
        most = watch.most[part]
        return f", {most / 1e9:.2f} at another moment" if most > 1.05 * size + 1e7 else ""

    total, idle = sum(p.numel() for p in model.parameters()), idle_parameters(model)
    active = f", {total - idle:,} of them active for a token" if idle else ""
    return "\n".join([
        f"{command} of {name}: {total:,} parameters{active}"
        f"{' and a critic of the size of the reward model' if critic_config else ''} on {ranks} ranks, "
        f"{settings.dtype}, activation checkpointing {settings.activation_checkpointing}",
        f"the largest of {share // size} micro-batches: {' x '.join(map(str, batch.mask.shape))} tokens, "
        f"{int(batch.mask.sum()):,} supervised; lengths from {source}",
        "", "    GB  on each rank",
        *(line(size, part + at_another_moment(part, size)) for part, size in step.items()
          if size or watch.most[part]),
        *(line(size, phase) for phase, size in phases.items()),
        *([line(on_cpu, "parameters, gradients, moments in the CPU's memory")] if on_cpu else []),
        "        " + ", ".join(fits), "", "        a step",
        *(line(size, f"{what} by each rank") for what, size in watch.traffic.items() if size),
        f"{settings.batch_size * per_item:,.0f} tokens: {settings.batch_size} x {per_item:,.1f}, "
        f"the longest text {max(lengths):,}",
        f"{flops:.3g} floating-point operations of the model, {flops / ranks:.3g} on each rank",
        *([f"{scoring:.3g} more to score {num_scored(settings):,} examples"] if scoring else []),
        f"settings {json.dumps(asdict(settings))}"])
