"""Small models of sequences of vectors, of one interface: a transformer of the decoder's own blocks
(model.py), torch's LSTM, a diagonal state space and a RetNet (recurrent.py); and the loop that trains them on
batches drawn without end.

A batch is (inputs (B, T, inputs), targets (B, T)): a target is the number of a class, or NONE where nothing
is asked. Symbols are one-hot vectors. The transformer is the llama block in sequence, with learned embeddings
of positions in place of rotary ones, as the papers' models have them (claims/separations.py, in_context.py).
They read no text and are in no model folder, so that they are none of the stages'.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .model import MLP, Block
from .model_config import ModelConfig
from .norms import RMSNorm
from .recurrent import DiagonalStateSpace, Retention

KINDS = ("transformer", "LSTM", "state space", "RetNet")
NONE = -1
EPS = 1e-6


def config_of(width, num_layers, num_heads=2):
    """The decoder's sizes, by which a block is built. The vocabulary is not used."""
    return ModelConfig(model_type="llama", vocab_size=1, hidden_size=width, intermediate_size=2 * width,
                       num_hidden_layers=num_layers, num_attention_heads=num_heads,
                       max_position_embeddings=1, rms_norm_eps=EPS)


class RecurrentBlock(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x): the transformer's block with another layer in attention's
    place."""

    def __init__(self, mixer, config):
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(config.hidden_size, EPS) for _ in range(2))
        self.mixer, self.mlp = mixer, MLP(config)

    def forward(self, x):
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class SequenceModel(nn.Module):
    """(B, T, inputs) -> logits (B, T, outputs), each from the vectors up to its own.

    num_places: the longest sequence, which a transformer has embeddings of positions for.
    """

    def __init__(self, kind, num_layers, width, inputs, outputs, num_places, num_heads=2):
        super().__init__()
        assert kind in KINDS, kind
        config = config_of(width, num_layers, num_heads)
        make = {"transformer": lambda: Block(config),
                "state space": lambda: RecurrentBlock(DiagonalStateSpace(width), config),
                "RetNet": lambda: RecurrentBlock(Retention(width, num_heads), config)}
        self.embed, self.head = nn.Linear(inputs, width, bias=False), nn.Linear(width, outputs, bias=False)
        nn.init.normal_(self.embed.weight, std=0.5)
        if kind == "transformer":
            self.places = nn.Parameter(0.5 * torch.randn(num_places, width))
        self.kind, self.norm = kind, RMSNorm(width, EPS)
        self.layers = (nn.LSTM(width, width, num_layers, batch_first=True) if kind == "LSTM" else
                       nn.ModuleList(make[kind]() for _ in range(num_layers)))

    def forward(self, inputs):
        x = self.embed(inputs)                                              # (B, T, W)
        if self.kind == "transformer":
            x = x + self.places[:x.shape[1]]
        if self.kind == "LSTM":
            x = self.layers(x)[0]
        else:
            for layer in self.layers:
                x = layer(x)
        return self.head(self.norm(x))


def new_model(seed, *args, **more):
    """A SequenceModel whose weights are drawn with the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceModel(*args, **more)


def right(model, inputs, targets):
    """Whether each answer is right, where one is asked: (B, T), NaN elsewhere."""
    with torch.no_grad():
        found = (model(inputs).argmax(-1) == targets).float()
    return found.masked_fill(targets == NONE, float("nan"))


def interleaved(xs, ys):
    """x_1 y_1 x_2 y_2 ...: vectors (B, n, d) and labels 0 or 1 (B, n) -> (B, 2 n, d + 1), with the labels as
    +-1 in a column of their own."""
    labels = F.pad(2.0 * ys[..., None] - 1, (xs.shape[2], 0))
    return torch.stack((F.pad(xs, (0, 1)), labels), 2).flatten(1, 2)


def in_batches(draw, size, pieces=64):
    """Batches of `size` without end, of draw(number) -> (inputs, targets), which is asked for many at once:
    some tasks take as long to draw one sequence as a thousand."""
    while True:
        inputs, targets = draw(size * pieces)
        order = torch.arange(len(inputs)).view(size, pieces).T.flatten()    # each has some of all halves
        yield from zip(inputs[order].split(size), targets[order].split(size))


def fit(model, batches, steps, learning_rate):
    """Train on an iterator of batches, with Adam: the rate rises over the first tenth of the steps and then
    falls to 0 by a line, and gradients are clipped to a norm of 1. -> {"loss": of the last step, in nats,
    "training_steps", "tokens": the places that were read}"""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), fused=True)
    warm = max(1, steps // 10)
    loss, tokens = None, 0
    for step in range(steps):
        for each in optimizer.param_groups:
            each["lr"] = learning_rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        inputs, targets = next(batches)
        tokens += targets.numel()
        asked = targets != NONE
        loss = F.cross_entropy(model(inputs)[asked], targets[asked], reduction="sum") / asked.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {"loss": loss.item(), "training_steps": steps, "tokens": tokens}
