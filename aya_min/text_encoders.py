"""Three small encoders of one size, pre-trained in three ways, and the head that classifies with any of them
("On Scientific Debt in NLP", arXiv 2306.02870, holds the three originals against each other).

    both-ways   ELMo: a forward and a backward LSTM, each of num_layers; either predicts the next token of its
                direction, from tokens before it alone (torch's own LSTM)
    causal      GPT-1: a transformer whose tokens see those before them; next-token prediction
    masked      BERT: a transformer whose tokens see all; prediction of the tokens that `mask_tokens` hides

The transformers are the decoder's llama block (model.py) with learned positions; masked only gives it another
attention mask. All share the tied embedding of width W and the norm before it. Numbers of parameters are
within PARITY of each other (`units`). Departures: no characters as ELMo's, no second sentence as BERT's.
B batch, T tokens, W width, S the states' size.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .classifier import mean_of
from .model import Block
from .norms import RMSNorm
from .sequence_models import EPS, config_of

KINDS = ("both-ways", "causal", "masked")
PARITY = 0.03                   # what numbers of parameters may differ, as a share
MASKED = 0.15                   # of the tokens are predicted (BERT, section 3.1); of these
TO_MASK, TO_RANDOM = 0.8, 0.1   # become the mask or a random token; the rest stays as it is
WINDOW = 16                     # batches that are drawn together (`batches`)
STD = 0.08                      # of the embeddings at first, as in preset tiny


def units(width, num_layers, num_places):
    """The LSTMs' hidden units h, for which two LSTMs of L layers, the first 4 h (W + h + 2) and the others
    4 h (2 h + 2), and the projection h W have as many parameters as L llama blocks, L (10 W^2 + 2 W), and
    the positions."""
    wanted = num_layers * (10 * width ** 2 + 2 * width) + num_places * width
    size = lambda h: (8 * h * (width + h + 2) + (num_layers - 1) * 16 * h * (h + 1) + h * width)
    return min(range(1, 3 * width), key=lambda h: abs(size(h) - wanted))


def mask_tokens(ids, is_text, mask_id, num_ids, first_id, generator):
    """(ids (B, T) with hidden tokens, is_hidden (B, T)). Each token of the text is hidden with probability
    MASKED; a random token is one from first_id on, as control tokens stand before it."""
    u = torch.rand(2, *ids.shape, generator=generator)
    hidden = (u[0] < MASKED) & is_text
    others = torch.randint(first_id, num_ids, ids.shape, generator=generator)
    seen = torch.where(hidden & (u[1] < TO_MASK), mask_id, ids)
    return torch.where(hidden & (u[1] >= TO_MASK) & (u[1] < TO_MASK + TO_RANDOM), others, seen), hidden


def turned(x, lengths):
    """Each row's first `lengths` places in reverse; padding stays behind. Its own inverse. x (B, T, ...)"""
    places = torch.arange(x.shape[1])
    order = torch.where(places < lengths[:, None], lengths[:, None] - 1 - places, places)   # (B, T)
    return x.gather(1, order[(...,) + (None,) * (x.ndim - 2)].expand_as(x))


class BothWays(nn.Module):
    """(B, T, W) -> the states after each token of the LSTM that reads forward and of that which reads
    backward, (2, B, T, h)."""

    def __init__(self, width, h, num_layers):
        super().__init__()
        make = lambda: nn.LSTM(width, h, num_layers, batch_first=True)
        self.forward_lstm, self.backward_lstm = make(), make()

    def forward(self, x, lengths):
        backward = turned(self.backward_lstm(turned(x, lengths))[0], lengths)
        return torch.stack((self.forward_lstm(x)[0], backward))


class Layers(nn.Module):
    """(B, T, W) -> (B, T, W): llama blocks with positions, causal or not."""

    def __init__(self, width, num_layers, num_places, is_causal, num_heads=2):
        super().__init__()
        config = config_of(width, num_layers, num_heads)
        self.places = nn.Parameter(STD * torch.randn(num_places, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(num_layers))
        self.is_causal = is_causal

    def forward(self, x, lengths):
        T = x.shape[1]
        x = x + self.places[:T]
        # None is plain causal attention, which padding on the right never enters.
        mask = None if self.is_causal else (torch.arange(T) < lengths[:, None])[:, None, None]  # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, None, None, mask)
        return x


class Encoder(nn.Module):
    """Token ids (B, T), each row BOS, text, EOS and padding, with lengths (B,), to states and losses."""

    def __init__(self, kind, num_ids, width, num_layers, num_places):
        super().__init__()
        assert kind in KINDS, kind
        self.kind, self.embed = kind, nn.Embedding(num_ids, width)
        nn.init.normal_(self.embed.weight, std=STD)
        self.norm = RMSNorm(width, EPS)
        if kind == "both-ways":
            h = units(width, num_layers, num_places)
            self.layers = BothWays(width, h, num_layers)
            self.project, self.state_size = nn.Linear(h, width, bias=False), 2 * h
        else:
            self.layers, self.state_size = Layers(width, num_layers, num_places, kind == "causal"), width

    def states(self, ids, lengths):
        """(B, T, S), of which a classifier reads, each state normed."""
        x = self.layers(self.embed(ids), lengths)
        if self.kind != "both-ways":
            return self.norm(x)
        return F.rms_norm(torch.cat((*x,), -1), (self.state_size,), eps=EPS)

    def logps_of(self, x, targets):
        """Log-probs (N,) in nats of targets (N,) under the states x (N, W)."""
        return -F.cross_entropy(self.norm(x) @ self.embed.weight.T, targets, reduction="none")

    def next_logps(self, ids, lengths):
        """Log-probs (2 or 1, B, T - 1) of the tokens 1.. given those before and, both-ways, of the tokens
        ..T - 2 given those after. Places beyond a text hold 0."""
        x = self.layers(self.embed(ids), lengths)
        inside = torch.arange(ids.shape[1] - 1) < lengths[:, None] - 1      # (B, T - 1)
        if self.kind == "both-ways":
            x = self.project(x)                                             # (2, B, T, W)
            pairs = (x[0][:, :-1], ids[:, 1:]), (x[1][:, 1:], ids[:, :-1])
        else:
            pairs = ((x[:, :-1], ids[:, 1:]),)
        empty = x.new_zeros(inside.shape)
        return torch.stack([empty.masked_scatter(inside, self.logps_of(some[inside], targets[inside]))
                            for some, targets in pairs])

    def masked_logps(self, seen, hidden, ids, lengths):
        """Log-probs (N,) of the hidden tokens given all that is seen, in the order of hidden.nonzero()."""
        return self.logps_of(self.layers(self.embed(seen), lengths)[hidden], ids[hidden])

    def loss(self, ids, lengths, generator, mask_id, first_id):
        """(sum of nats, number of predictions) of a batch. Only masked draws from the generator."""
        if self.kind != "masked":
            logps = self.next_logps(ids, lengths)
            return -logps.sum(), len(logps) * int((lengths - 1).sum())
        places = torch.arange(ids.shape[1])
        is_text = (places > 0) & (places < lengths[:, None] - 1)            # neither BOS nor EOS
        seen, hidden = mask_tokens(ids, is_text, mask_id, len(self.embed.weight), first_id, generator)
        return -self.masked_logps(seen, hidden, ids, lengths).sum(), int(hidden.sum())


class WithHead(nn.Module):
    """An encoder with a linear head on the mean of a text's states: ids, lengths -> logits (B, M), fp32.
    frozen: the encoder is not trained, as ELMo's first use had it."""

    def __init__(self, encoder, num_labels, frozen=False):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.state_size, num_labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        encoder.requires_grad_(not frozen)

    def forward(self, ids, lengths):
        return self.head(mean_of(self.encoder.states(ids, lengths), lengths))


# ---- batches and training ----------------------------------------------------------------------------------

def padded(rows, pad_id):
    """Lists of ids -> ids (B, T), lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, pad_id), lengths


def batches(lengths, size, steps, generator):
    """The row numbers of each of `steps` batches: passes over all rows, each in another order. Of WINDOW
    batches each holds rows of similar lengths, so that little is padding, and their order is drawn."""
    order = []
    for begin in range(0, steps, WINDOW):
        while len(order) < size * WINDOW:
            order += torch.randperm(len(lengths), generator=generator).tolist()
        window, order = sorted(order[:size * WINDOW], key=lengths.__getitem__), order[size * WINDOW:]
        for i in torch.randperm(WINDOW, generator=generator).tolist()[:steps - begin]:
            yield window[i * size:(i + 1) * size]


def fit(model, losses, learning_rate):
    """Train on an iterable of functions () -> (sum of nats, count), one a step, by AdamW with a decay of
    0.01. The rate rises over a tenth of the steps and falls to 0 by a line; gradients are clipped to a norm
    of 1. -> the mean loss of the last tenth of the steps, in nats."""
    losses, found = list(losses), []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    steps, warm = len(losses), max(1, len(losses) // 10)
    for step, loss_of in enumerate(losses):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        nats, count = loss_of()
        optimizer.zero_grad()
        (nats / max(count, 1)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        found.append((nats.item(), count))
    last = found[-warm:]
    return sum(nats for nats, _ in last) / max(1, sum(count for _, count in last))
