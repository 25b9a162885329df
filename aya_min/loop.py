"""The one training loop: optimizer, schedule, metrics, evaluation, saving and stopping, for every stage.

The contract with a stage: its loss function returns a SUM over units (tokens, pairs, completions) and its
batch says how many units it has. The counts of all micro-batches on all ranks are added before the first
backward, so the same global batch gives the same loss and gradient norm however it is cut into micro-batches
or ranks.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from . import checkpoint, distributed, dropout
from .adafactor import Adafactor
from .balance import Auxiliary
from .command import progress
from .config import Training
from .data import in_step
from .files import parse_json
from .flops import training_flops
from .loss_scale import LossScale
from .patience import Patience

# Metrics that are logged for each language too.
PER_LANGUAGE = ("loss", "accuracy", "rewards/accuracies", "reward", "cut", "agreement", "selected")

# Dense bf16 peak, TFLOP/s, from NVIDIA's data sheets. The first name that the card's name contains counts.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250}


def learning_rate(step, num_steps, settings):
    """Linear warm-up, then constant or a cosine, which reaches `final_learning_rate` (a share of the peak) at
    the last step."""
    peak, warmup = settings.learning_rate, min(settings.warmup_steps, num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, num_steps - 1 - warmup)
    floor = settings.final_learning_rate
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, settings):
    """torch's fused AdamW of what is trained, or Adafactor, with weight decay on matrices only. Tied weights
    are one parameter. A group's "scale" is its learning rate as a multiple of the policy's: a critic may have
    its own."""
    of_critic = getattr(settings, "critic_learning_rate", None) or settings.learning_rate
    groups = []
    for part, peak in zip(distributed.parts(model), (settings.learning_rate, of_critic)):
        # The biases of stacked experts, (E, out), are no matrices.
        is_matrix = {p: p.dim() > 1 and not name.endswith("bias") for name, p in part.named_parameters()
                     if p.requires_grad}
        matrices = [p for p, yes in is_matrix.items() if yes]
        vectors = [p for p, yes in is_matrix.items() if not yes]
        scale = peak / settings.learning_rate
        groups += [{"params": matrices, "weight_decay": settings.weight_decay, "scale": scale},
                   {"params": vectors, "weight_decay": 0.0, "scale": scale}]
    if settings.optimizer == "adafactor":
        return Adafactor(groups, lr=settings.learning_rate)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.adam_beta2), fused=True)


def peak_flops(device, dtype):
    """The device's dense peak in operations per second in bf16, and in fp16, where it is the same. None for
    an unknown device, and in fp32."""
    if device.type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def start_profiler(device):
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)
    profiler.start()
    return profiler


def write_profile(profiler, path):
    """Stop the profiler and write a Chrome trace to `path`. Print the ten operations with the most time of
    their own (on a GPU: of the GPU's time) on standard error."""
    profiler.stop()
    profiler.export_chrome_trace(str(path))
    events = list(profiler.key_averages())
    on_device = sum(e.self_device_time_total for e in events)
    own = [e.self_device_time_total if on_device else e.self_cpu_time_total for e in events]    # microseconds
    first = sorted(zip(own, events), key=lambda pair: -pair[0])[:10]
    lines = [f"{t / 1000:10.1f} ms {t / sum(own):6.1%} {e.count:7} x  {e.key[:80]}" for t, e in first]
    lines.insert(0, f"{path}: open it in ui.perfetto.dev or chrome://tracing")
    tqdm.write("\n".join(lines), file=sys.stderr)


def add_metrics(total, metrics):
    """Add {name: (2, languages) sums and counts} to `total`, in place."""
    for name, value in metrics.items():
        total[name] = total[name] + value if name in total else value
    return total


def reduced(metrics, slots):
    """Sum {name: (2, slots)} over ranks and divide: {"loss": mean, "loss/fr": mean, ...} as plain floats.
    What nothing was counted for is left out. A collective."""
    names = list(metrics)
    table = torch.stack([metrics[name] for name in names])                  # (metrics, 2, slots)
    table = distributed.sum_over_ranks(table)
    row = {}
    for name, (sums, counts) in zip(names, table.tolist()):
        if sum(counts) > 0:
            row[name] = sum(sums) / sum(counts)
        if name in PER_LANGUAGE:
            by_slot = zip(slots, sums, counts)
            row.update({f"{name}/{code}": s / c for code, s, c in by_slot if c > 0 and code != "other"})
    return row


def autocast(model, settings, device):
    """The context in which a model computes in --dtype. FSDP casts a sharded model by itself."""
    dtype = torch.bfloat16 if settings.dtype == "float32" else getattr(torch, settings.dtype)
    enabled = settings.dtype != "float32" and not distributed.is_sharded(model)
    return torch.autocast(device.type, dtype, enabled=enabled)


@torch.no_grad()
def evaluate(model, loss_fn, batches, device, stop=None, settings=Training()):
    """Held-out metrics, overall and per language: {"loss": ..., "loss/fr": ...}. None after a signal.

    batches: this rank's [(indices, batch)]. stop: distributed.Signals. settings: those of the training, whose
    dtype is used. Raises ValueError for a metric that is not finite."""
    model.eval()
    total, bad = {}, []
    for indices, batch in in_step(batches):
        if stop and stop.any_rank(device):
            model.train()
            return None
        with autocast(model, settings, device):
            loss, metrics = loss_fn(model, batch.to(device))
        add_metrics(total, metrics if indices else {k: torch.zeros_like(v) for k, v in metrics.items()})
        bad += [] if loss.isfinite() or not indices else dict.fromkeys(batch.where)
    model.train()
    values, bad = reduced(total, batch.slots), sum(distributed.gather_objects(bad), [])
    wrong = ["loss"] if bad else [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        found = f"the held-out {' '.join(wrong)} of this model is not finite"
        if fault := checkpoint.weights_fault(model):
            raise ValueError(f"{found}: {fault}; lower --learning-rate, or copy or train the model again")
        rows = f" in a batch with {first_names(bad)}" if bad else ""
        raise ValueError(f"{found}{rows}; lower --learning-rate, or look at these rows and at the model")
    return values


def json_line(row):
    """One line of metrics.jsonl. Floats have seven digits; NaN and infinity, not JSON, become strings."""
    def clean(value):
        if not isinstance(value, float):
            return value
        return float(f"{value:.7g}") if math.isfinite(value) else str(value)
    return json.dumps({key: clean(value) for key, value in row.items()}, ensure_ascii=False) + "\n"


def write_metrics(path, row):
    """Append a line to metrics.jsonl. A symbolic link is not followed."""
    if distributed.is_main():
        try:
            number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            with open(number, "w", encoding="utf-8") as f:
                f.write(json_line(row))
        except OSError as error:
            # The error of a full disk does not name the file.
            about = f"{error.strerror}; the line of step {row['step']} is not logged, make room and --resume"
            raise OSError(error.errno, about, str(path)) from None


def read_metrics(path):
    """[(line, row), ...] of metrics.jsonl, without a last line that a kill cut short. [] without the file.

    Raises ValueError with file and line for a line that the loop did not write."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = [parse_json(line, f"{path}:{number}", "remove the line") for number, line in enumerate(lines, 1)]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f"{path}:{number}: not a row of metrics with its step; remove the line")
    return [(line.decode() + "\n", row) for line, row in zip(lines, rows)]


def evaluated(path, step):
    """Whether the evaluation before `step` is already logged, in which case it is the last line."""
    last = [row for _, row in read_metrics(path)][-1:]
    return bool(last) and last[0]["step"] == step and "loss" not in last[0]


def origin(model, losses, micro_batches):
    """A text that says where a loss or gradient that is not finite comes from: ranks and their examples, or
    else the first parameter. A collective."""
    mine = [name for loss, batch in zip(losses, micro_batches) if not loss.isfinite()
            for name in dict.fromkeys(batch.where)]
    by_rank = distributed.gather_objects(mine)
    if any(by_rank):
        return "; ".join(f"rank {rank}, examples {first_names(names)}"
                         for rank, names in enumerate(by_rank) if names)
    bad = {name for name, p in model.named_parameters()
           if p.grad is not None and not distributed.own_rows(p.grad)[0].isfinite().all()}
    bad = set.union(*distributed.gather_objects(bad))
    for name, _ in model.named_parameters():
        if name in bad:
            return f"the losses are finite, the gradient of {name} is not"
    return "the losses and each parameter's gradient are finite, the norm of all gradients is not"


def first_names(names):
    return f"{' '.join(names[:8])}{' ...' if len(names) > 8 else ''}"


def spread(model, settings, device):
    """The model on the device where it trains, and sharded if several ranks share it. A model that already is
    stays as it is."""
    model = model.to("cpu" if settings.cpu_offload else device)
    return distributed.shard(model, getattr(torch, settings.dtype), settings.replicate, settings.cpu_offload)


def made_ready(model, settings, device):
    """The model spread for training, with packing, activation checkpointing and torch.compile set."""
    model = spread(model, settings, device)
    for part in distributed.parts(model):
        part.model.packing = settings.packing
        part.model.activation_checkpointing = settings.activation_checkpointing
        if settings.compile or (settings.compile is None and device.type == "cuda"):
            for block in part.model.layers:
                # torch (2.13) compiles a mixture's grouped products in bf16 only.
                whole = not part.config.mixture or settings.dtype == "bfloat16"
                (block if whole else block.self_attn).compile(dynamic=True)
    return model


def counted(model, micro_batches, stop, device):
    """A step's [units of the loss, tokens, floating-point operations, a number that is not 0 after a signal],
    added over all ranks. A collective."""
    policy, *critic = distributed.parts(model)
    flops = sum(training_flops(part.config, b.lengths.tolist(), int(b.mask.sum()) if part is policy else 0)
                for part in (policy, *critic) for b in micro_batches)
    units, tokens = sum(b.count for b in micro_batches), sum(b.num_tokens for b in micro_batches)
    counts = torch.tensor([units, tokens, flops, stop.received], dtype=torch.float64, device=device)
    return distributed.sum_over_ranks(counts).tolist()


def gradients(model, micro_batches, loss_fn, count, settings, stop, device, scale):
    """Forward and backward of a step. p.grad becomes the gradient of the loss, which is the sum over all
    ranks divided by `count`. scale: the LossScale of the backward.

    Returns (loss, this rank's sums by micro-batch, gradient norm, metrics, what a mixture of experts logs, a
    number that is not 0 after a signal on any rank)."""
    ranks, losses, total = distributed.num_ranks(), [], {}

    def forward(batch):
        with autocast(model, settings, device):
            return loss_fn(model, batch.to(device))
    auxiliary = Auxiliary(model, micro_batches, settings, device, forward)
    for i, batch in enumerate(micro_batches):
        if distributed.is_sharded(model):
            # Every micro-batch's gradients are reduced to shards at once, because whole ones may not fit in
            # memory. HSDP's copies exchange theirs only after the last micro-batch.
            model.set_requires_all_reduce(i == len(micro_batches) - 1)
        loss_sum, logged = forward(batch)
        loss_sum = loss_sum + count * auxiliary.loss()
        # FSDP averages gradients over ranks; the factor `ranks` makes that a sum.
        (loss_sum * (ranks / count * scale.scale)).backward()
        losses.append(loss_sum.detach())
        add_metrics(total, logged)
    stopping = torch.tensor(stop.received, dtype=torch.float64, device=device)
    sums = torch.stack([sum(loss.double() for loss in losses), stopping])
    loss, stopping = distributed.sum_over_ranks(sums).tolist()
    scale.unscale(model)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return loss / count, losses, norm, total, auxiliary.logged(), stopping


def refuse_infinite(step, loss, grad_norm, model, losses, micro_batches, settings, folder):
    """Raise ValueError, on all ranks together, if the loss or the gradient norm is not finite."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    if fault := checkpoint.weights_fault(model):
        remedy = "lower --learning-rate" if step else "copy or train the model again"
        raise ValueError(f"step {step}: loss {loss}: before the step {fault}. "
                         f"{checkpoint.newest_name(folder / 'state')}; {remedy}")
    first = step // settings.gradient_steps * settings.batch_size
    last = first + settings.batch_size - 1
    remedy = ", or take --dtype bfloat16" if settings.dtype == "float16" else ""
    raise ValueError(
        f"step {step}: loss {loss}, gradient norm {grad_norm} ({origin(model, losses, micro_batches)}; "
        f"positions {first} to {last} of the data order): stopped before the weights moved. "
        f"{checkpoint.newest_name(folder / 'state')}; lower --learning-rate, or look at the data{remedy}")


class Keeper:
    """Writes what a training keeps (states, evaluations, published models), and ends it after a signal.

    saved: the number of steps after which a state was last saved."""

    def __init__(self, folder, model, optimizer, scale, num_steps, settings, evaluation, publish, stop,
                 saved):
        self.folder, self.model, self.optimizer, self.num_steps = folder, model, optimizer, num_steps
        self.settings, self.evaluation, self.publish = settings, evaluation, publish
        self.scale, self.stop, self.saved = scale, stop, saved

    def save(self, done):
        if done > self.saved:
            checkpoint.save_state(self.folder / "state", self.model, self.optimizer, done, self.scale)
            self.saved = done

    def leave(self, done):
        """Save and raise Stopped, on all ranks together, after a signal."""
        self.save(done)
        number = self.stop.agreed()
        raise distributed.Stopped(
            f"stopped by {signal.Signals(number).name} after {done} of {self.num_steps} steps. "
            f"{checkpoint.newest_name(self.folder / 'state')}; --resume {self.folder} continues (a recipe: "
            "the same command)", number)

    def evaluate(self, done):
        """Evaluate after `done` steps and log the metrics as eval/..."""
        values = self.evaluation()
        if values is None:
            self.leave(done)
        row = {"step": done, **{f"eval/{k}": v for k, v in values.items()}}
        write_metrics(self.folder / "metrics.jsonl", row)
        name = next(iter(values))
        if distributed.is_main():
            tqdm.write(f"after {done:,} of {self.num_steps:,} steps: held-out {name} {values[name]:.3f}",
                       file=sys.stderr)

    def is_due(self, done):
        """Whether to evaluate after `done` steps. The evaluation after the last step is not decided here."""
        every = self.settings.eval_every
        return self.evaluation and done < self.num_steps and (done == 0 or every and done % every == 0)

    def after(self, done, stopping):
        """Publish, save, stop and evaluate as is due after `done` steps. The model is published before the
        state is saved, so that a run resumed from the state has published it. A run ends only where all
        gradient steps of a batch are done (config.RL)."""
        if self.settings.publish_every and done % self.settings.publish_every == 0:
            checkpoint.check_finite(dict(self.model.named_parameters()), done, self.folder / "state")
            self.publish(self.model, done)
        if self.settings.save_every and done % self.settings.save_every == 0:
            self.save(done)
        if stopping and done % self.settings.gradient_steps == 0:
            self.leave(done)
        if self.is_due(done):
            self.evaluate(done)


def train(model, num_steps, batches, loss_fn, settings, folder, device, evaluation=None, state=None,
          check_first=None, title="train", stop=None, publish=None):
    """Train the model in place, from the start or from a saved state (the path of its folder). Returns it.

    batches(step) -> this rank's micro-batches. loss_fn(model, batch) -> (loss_sum, {name: (2, languages) sums
    and counts}). evaluation() -> {name: value} is called before the first step, every `eval_every` steps and
    after the last, and logged as eval/... check_first(metrics) may refuse the very first step.
    publish(model, step) is called every `publish_every` steps. stop: the distributed.Signals to poll.

    Raises ValueError, on all ranks together, before a step whose loss or gradient norm is not finite and
    before a save whose weights are not. After SIGTERM or SIGINT on any rank, all ranks finish the step, save
    and raise Stopped; an evaluation in progress is abandoned and redone on resume."""
    folder, stop, model = Path(folder), stop or distributed.Signals(), made_ready(model, settings, device)
    optimizer, scale = make_optimizer(model, settings), LossScale(settings.dtype)
    needed = checkpoint.state_bytes(model, settings.optimizer)
    distributed.from_main(lambda: checkpoint.check_room(folder / "state", needed))
    if scale.is_dynamic:
        # A state may be saved before the first step that is not skipped.
        checkpoint.begin_moments(model, optimizer)
    first = checkpoint.load_state(state, model, optimizer, scale) if state else 0
    keeper = Keeper(folder, model, optimizer, scale, num_steps, settings, evaluation, publish, stop, first)
    if keeper.is_due(first) and not distributed.from_main(lambda: evaluated(folder / "metrics.jsonl", first)):
        keeper.evaluate(first)
    model.train()
    peak, is_main = peak_flops(device, settings.dtype), distributed.is_main()
    patience = Patience(device)
    bar = progress(range(first, num_steps), initial=first, total=num_steps, desc=title, unit="step",
                   disable=not is_main)
    for step in bar:
        profiler = start_profiler(device) if step == settings.profile and is_main else None
        patience.begin()
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, settings) * group["scale"]
        micro_batches = batches(step)
        count, tokens, flops, stopping = counted(model, micro_batches, stop, device)
        if stopping and step % settings.gradient_steps == 0:
            keeper.leave(step)
        distributed.parts(model)[0].model.dropout = dropout.of_step(settings, step)
        loss, losses, norm, total, routed, stopping = gradients(model, micro_batches, loss_fn, count,
                                                                settings, stop, device, scale)
        grad_norm = distributed.full(norm).item()
        taken = scale.takes(step, loss, grad_norm)
        if taken:
            refuse_infinite(step, loss, grad_norm, model, losses, micro_batches, settings, folder)
        if taken and settings.max_grad_norm:
            nn.utils.clip_grads_with_norm_(model.parameters(), settings.max_grad_norm, norm)
        metrics = reduced(total, micro_batches[0].slots)
        if step == 0 and check_first:
            check_first(metrics)
        if taken:
            optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        patience.end()
        row = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"],
               "tokens": int(tokens), "seconds": seconds, "tokens_per_second": tokens / seconds}
        row |= {**routed, **scale.logged()}
        row |= {"mfu": flops / (seconds * distributed.num_ranks() * peak)} if peak else {}
        write_metrics(folder / "metrics.jsonl", {"step": step, **metrics, **row})
        shown = {"mfu": f"{row['mfu']:.0%}"} if peak else {}
        bar.set_postfix(loss=f"{loss:.3f}", norm=f"{grad_norm:.2f}", tok_s=f"{tokens / seconds:.0f}", **shown,
                        refresh=False)
        if profiler:
            write_profile(profiler, folder / "profile.json")
        keeper.after(step + 1, stopping)
    keeper.save(num_steps)
    if evaluation:
        keeper.evaluate(num_steps)
    return model
