"""The one training loop. A stage is (model, batches, loss function); everything else about training is here, once.

The contract that keeps gradients right: a loss function returns a SUM over its units and a batch says how many units it has. The
counts of all micro-batches on all ranks are added up before the first backward, so the same global batch gives the same loss and
gradient norm however it is cut into micro-batches or ranks.
"""

import json
import math
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from . import checkpoint, distributed
from .data import LANGUAGE_SLOTS

PER_LANGUAGE = ("loss", "accuracy", "rewards/accuracies", "reward")     # metrics that are logged for each language too


def learning_rate(step, num_steps, settings):
    """Linear warm-up, then constant, or a cosine down to `final_learning_rate` of the peak at the last step."""
    peak, warmup = settings.learning_rate, min(settings.warmup_steps, num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, num_steps - 1 - warmup)
    floor = settings.final_learning_rate
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, settings):
    """AdamW; weight decay on matrices only. Tied weights are one parameter."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.adam_beta2), fused=True)


def add_metrics(total, metrics):
    """Add {name: (2, languages) sums and counts} into `total`."""
    for name, value in metrics.items():
        total[name] = total[name] + value if name in total else value
    return total


def reduced(metrics, languages=True):
    """Sum {name: (2, languages)} over ranks and divide: {"loss": mean, "loss/fr": mean, ...} as plain floats."""
    names = list(metrics)
    table = distributed.sum_over_ranks(torch.stack([metrics[name] for name in names]))             # (M, 2, languages)
    row = {}
    for name, (sums, counts) in zip(names, table.tolist()):
        row[name] = sum(sums) / max(sum(counts), 1e-12)
        if languages and name in PER_LANGUAGE and sum(c > 0 for c in counts[:-1]):
            row.update({f"{name}/{code}": s / c for code, s, c in zip(LANGUAGE_SLOTS, sums, counts) if c > 0 and code != "other"})
    return row


@torch.no_grad()
def evaluate(model, loss_fn, batches, device):
    """Held-out metrics, overall and per language: {"loss": ..., "loss/fr": ...}. batches: this rank's [(indices, batch)].

    A sharded model's forward is a collective, so every rank runs as many batches as the busiest, repeating its last for nothing.
    """
    model.eval()
    total = {}
    rounds = max(distributed.gather_objects(len(batches)))
    for i in range(rounds):
        indices, batch = batches[min(i, len(batches) - 1)]
        _, metrics = loss_fn(model, batch.to(device))
        add_metrics(total, metrics if indices and i < len(batches) else {k: torch.zeros_like(v) for k, v in metrics.items()})
    model.train()
    return reduced(total)


def json_line(row):
    """One line of metrics.jsonl: floats to seven digits, never a bare NaN (it is not JSON)."""
    clean = {k: (float(f"{v:.7g}") if math.isfinite(v) else str(v)) if isinstance(v, float) else v for k, v in row.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"


def write_metrics(path, row):
    if distributed.is_main():
        with open(path, "a", encoding="utf-8") as f:
            f.write(json_line(row))


def train(model, num_steps, batches, loss_fn, settings, run, device, evaluation=None, resume=False, check_first=None, title="train"):
    """Train in place.

    batches(step) -> this rank's micro-batches; loss_fn(model, batch) -> (loss_sum, {name: (2, languages) sums and counts});
    evaluation() -> {name: value} is called before the first step, every `eval_every` steps and after the last, and logged as eval/...;
    check_first(metrics) may refuse the very first step. Raises ValueError, on all ranks together and before the optimizer
    moves, when a loss or gradient norm is not finite.
    """
    run = Path(run)
    model = distributed.shard(model.to(device), getattr(torch, settings.dtype))
    model.model.packing = settings.packing
    model.model.activation_checkpointing = settings.activation_checkpointing
    if settings.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)
    optimizer = make_optimizer(model, settings)
    first = checkpoint.load_state(run / "state", model, optimizer) if resume else 0
    sharded = distributed.num_ranks() > 1
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16" and not sharded)

    def log_evaluation(step):
        write_metrics(run / "metrics.jsonl", {"step": step, **{f"eval/{k}": v for k, v in evaluation().items()}})

    if evaluation and first == 0:
        log_evaluation(0)
    model.train()
    bar = tqdm(range(first, num_steps), initial=first, total=num_steps, desc=title, unit="step", disable=not distributed.is_main(), leave=False, mininterval=1)
    for step in bar:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, settings)
        micro_batches = batches(step)
        counts = torch.tensor([sum(b.count for b in micro_batches), sum(b.num_tokens for b in micro_batches)], dtype=torch.float64, device=device)
        count, tokens = distributed.sum_over_ranks(counts).tolist()
        loss, total = torch.zeros((), dtype=torch.float64, device=device), {}
        for i, batch in enumerate(micro_batches):
            if sharded:
                model.set_requires_gradient_sync(i == len(micro_batches) - 1)
            with autocast:
                loss_sum, logged = loss_fn(model, batch.to(device))
            (loss_sum * (distributed.num_ranks() / count)).backward()          # FSDP averages over ranks: undo that
            loss += loss_sum.detach()
            add_metrics(total, logged)
        loss = distributed.sum_over_ranks(loss).item() / count
        grad_norm = distributed.full(nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise ValueError(f"step {step}: loss {loss}, gradient norm {grad_norm}: stopped before the weights moved; lower --learning-rate, or look at the data")
        metrics = reduced(total)
        if step == 0 and check_first:
            check_first(metrics)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        row = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], "tokens": int(tokens),
               "seconds": seconds, "tokens_per_second": tokens / seconds, **metrics}
        write_metrics(run / "metrics.jsonl", row)
        bar.set_postfix(loss=f"{loss:.3f}", norm=f"{grad_norm:.2f}", tok_s=f"{tokens / seconds:.0f}", refresh=False)
        done = step + 1
        if evaluation and done < num_steps and settings.eval_every and done % settings.eval_every == 0:
            log_evaluation(done)
        if settings.save_every and done < num_steps and done % settings.save_every == 0:
            checkpoint.save_state(run / "state", model, optimizer, done)
    if evaluation:
        log_evaluation(num_steps)
    checkpoint.save_state(run / "state", model, optimizer, num_steps)
    return model
