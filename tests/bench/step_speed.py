"""Milliseconds of a training step of the recipe's base (preset tiny) and of a plain loop of the same model.

    python tests/bench/step_speed.py [--rounds 5] [--steps 40] [--loaded]
                                     [--packing yes no] [--library default onednn]

PlainModel and plain_loop are the Cohere decoder and its training in ordinary torch, as short as they can be
written. Both sides train from the same weights on the same batches, in turn in one process, and must have
the same losses. What aya_min does more in a step is in its time: metrics per language, checks for values
that are not finite, metrics.jsonl. Batches have different widths: a figure is the mean over the steps of
each one's fastest (and median) time over the rounds, without the first steps.
--loaded: another process keeps a core busy meanwhile; the plain loop then waits as patiently as we do, once
we have found out. --packing: whether padding is left out. --library: what linear.py computes products with;
its own choice unless given. Several values are measured in turn.
"""

import argparse
import copy
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch                                                                            # noqa: E402
import torch.nn.functional as F                                                         # noqa: E402
from torch import nn                                                                    # noqa: E402

from aya_min import config, linear, world_data                                          # noqa: E402
from aya_min.data import collate, load_examples, make_batches                           # noqa: E402
from aya_min.files import write_jsonl                                                   # noqa: E402
from aya_min.loop import train                                                          # noqa: E402
from aya_min.model import CohereForCausalLM, init_weights                               # noqa: E402
from aya_min.model_config import model_preset                                           # noqa: E402
from aya_min.losses import sft_loss                                                     # noqa: E402
from aya_min.tokenizer import train_tokenizer                                           # noqa: E402

WARM_UP = 5         # steps that are not counted


# ---- the plain loop ----------------------------------------------------------------------------------------

class PlainBlock(nn.Module):
    def __init__(self, hidden, wide, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(hidden, bias=False)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(hidden, wide, bias=False), nn.Linear(hidden, wide, bias=False)
        self.down = nn.Linear(wide, hidden, bias=False)

    def forward(self, x, cos, sin):
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2)) + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x, cos, sin):                                            # x (B, H, T, D); cos, sin (T, D/2)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class PlainModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.norm = nn.LayerNorm(c.hidden_size, bias=False)
        self.blocks = nn.ModuleList(PlainBlock(c.hidden_size, c.intermediate_size, c.num_attention_heads)
                                    for _ in range(c.num_hidden_layers))
        angles = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        self.angles = torch.arange(c.max_position_embeddings)[:, None] * angles     # (positions, D/2)

    def forward(self, ids):                                                 # (B, T) -> (B, T, hidden)
        x, angles = self.embed(ids), self.angles[:ids.shape[1]]
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.norm(x)


def plain_loop(model, batches, num_steps, learning_rate):
    """Losses (nats per token) and the times at which steps begin."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0,
                                  fused=True)
    losses, times = [], []
    for step in range(num_steps):
        times.append(time.perf_counter())
        [batch] = batches(step)
        hidden = model(batch.input_ids)[:, :-1][batch.mask[:, 1:]]                              # (N, hidden)
        loss = F.cross_entropy(hidden @ model.embed.weight.t(), batch.input_ids[batch.mask])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, times


# ---- the same by aya_min -----------------------------------------------------------------------------------

NAMES = {"embed_tokens": "embed", "layers": "blocks", "input_layernorm": "norm", "self_attn.": "", "mlp.": "",
         "_proj": "", "model.": ""}


def as_plain(model):
    """A PlainModel with the weights of ours."""
    plain, state = PlainModel(model.config), {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    plain.load_state_dict(state)
    return plain


def our_loop(model, batches, num_steps, settings):
    """As plain_loop, by the loop that every stage uses."""
    times = []

    def timed(step):
        times.append(time.perf_counter())
        return batches(step)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        train(model, num_steps, timed, sft_loss, settings, Path(folder), torch.device("cpu"))
        text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
    return [row["loss"] for row in rows], times


@contextmanager
def busy_process(wanted):
    """Another process that keeps one core busy, if wanted."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def base_batches(settings, recipe, num_rows=4000):
    """(model configuration, batches) of the recipe's first stage, on fewer rows of its data."""
    rows = world_data.corpus(num_rows, 0, recipe.level)
    texts = [text for row in rows if "prompt" in row for text in (row["prompt"], row["completion"])]
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        write_jsonl(Path(folder) / "base.jsonl", rows)
        examples = load_examples([Path(folder) / "base.jsonl"], tokenizer, settings.max_length, settings)
    slots = (*sorted({e.language for e in examples} - {"other"}), "other")
    _, batches = make_batches(examples, lambda some: collate(some, tokenizer.pad_id, slots), settings)
    return model_preset(recipe.model, tokenizer.vocab_size), batches


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--loaded", action="store_true")
    parser.add_argument("--packing", nargs="+", choices=["yes", "no"], default=["yes"])
    parser.add_argument("--library", nargs="+", choices=linear.LIBRARIES)
    args = parser.parse_args()
    recipe = config.Recipe()
    settings = config.Pretrain(batch_size=recipe.batch_size, max_length=recipe.max_length,
                               max_steps=args.steps, learning_rate=recipe.base_learning_rate, warmup_steps=0,
                               schedule="constant")
    model_config, batches = base_batches(settings, recipe)
    start = init_weights(CohereForCausalLM(model_config), torch.Generator().manual_seed(0))

    def ours(library, packing):
        linear.choose(library)
        settings.packing = packing == "yes"
        return our_loop(copy.deepcopy(start), batches, args.steps, settings)

    sides = {"plain loop": lambda: plain_loop(as_plain(start), batches, args.steps, settings.learning_rate)}
    for library in args.library or [linear.chosen()]:
        for packing in args.packing:
            sides[f"aya_min, {library}, packing {packing}"] = partial(ours, library, packing)
    some = [batch for step in range(args.steps) for batch in batches(step)]
    shares = [batch.lengths.sum().item() / batch.input_ids.numel() for batch in some]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, {sum(p.numel() for p in start.parameters()):,} parameters, "
          f"batch {settings.batch_size}, {1 - mean(shares):.0%} padding"
          f"{', beside a busy process' if args.loaded else ''}")
    seconds, losses = {name: [] for name in sides}, {}                      # seconds: rounds x steps
    with busy_process(args.loaded):
        for _ in range(args.rounds):
            for name, side in sides.items():
                losses[name], times = side()
                seconds[name].append([b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1:])])
    plain = losses["plain loop"]
    fastest = {name: 1e3 * mean(map(min, zip(*rounds))) for name, rounds in seconds.items()}    # ms
    middle = {name: 1e3 * mean(map(median, zip(*rounds))) for name, rounds in seconds.items()}
    for name in sides:
        apart = max(abs(a - b) / a for a, b in zip(plain[:WARM_UP], losses[name]))
        assert apart < 1e-3, f"{name}: losses {losses[name][:WARM_UP]}, plain loop {plain[:WARM_UP]}"
        print(f"{name:28} {fastest[name]:6.1f} ms a step (median {middle[name]:6.1f}), plain loop / this "
              f"{fastest['plain loop'] / fastest[name]:.2f} ({middle['plain loop'] / middle[name]:.2f}), "
              f"loss {losses[name][0]:.5f} to {losses[name][-1]:.3f}")


if __name__ == "__main__":
    main()
