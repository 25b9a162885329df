"""Classifiers: a decoder with a head of several labels, and the SideNet that may answer before it.

SideNet: "Add a SideNet to your MainNet" (arXiv 2007.13512): a small net of one hidden layer on a large,
frozen one (the MainNet), which answers where its largest probability passes a threshold; else the rest of the
MainNet is computed (early_exit.py). The paper's MainNets are ResNets and BERT. Where ours departs, or where
we do not know what the paper does:
- it reads the mean of the hidden states of a layer, or of the embeddings (layer 0);
- that mean is normed without weights, because the size of the states grows from layer to layer;
- its output layer begins with zeros, so that all labels are equally likely at first.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .linear import Linear
from .model import Decoder
from .model_config import ModelConfig

POOLINGS = ("mean", "last-token")


def check_labels(labels):
    """ValueError unless labels is a list of two different names or more."""
    names = labels if isinstance(labels, list) else []
    named = all(isinstance(name, str) and name.strip() for name in names)
    if not named or not len(set(names)) == len(names) > 1:
        raise ValueError(f"labels {labels!r:.80} must be two names or more, each once")


@dataclass
class ClassifierConfig(ModelConfig):
    """A decoder's config with a classifier's head: the labels in the order of its rows, and what it reads."""
    labels: list = field(default_factory=list)
    pooling: str = "last-token"

    def __post_init__(self, sliding_window_pattern):
        super().__post_init__(sliding_window_pattern)
        check_labels(self.labels)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {self.pooling!r:.80} must be one of {' '.join(POOLINGS)}")


def mean_of(x, lengths):
    """The mean of each row's hidden states without padding, fp32: (B, T, hidden_size) -> (B, hidden_size)."""
    is_padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.float().masked_fill(is_padding[..., None], 0).sum(1) / lengths[:, None]


class Classifier(nn.Module):
    """The decoder with a linear head on the mean of a text's hidden states, or on the last token's, which is
    transformers' ForSequenceClassification. The first token (BOS) counts in the mean."""
    task = "Classifier"
    config_class = ClassifierConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.score = Linear(config.hidden_size, len(config.labels), bias=False)

    def forward(self, input_ids, lengths, repeats=None):
        """Logits (B, M) of the M labels, fp32."""
        return self.head(self.model(input_ids, lengths, repeats), lengths)

    def head(self, x, lengths):
        """The logits for the last, normed hidden states (B, T, hidden_size)."""
        if self.config.pooling == "mean":
            pooled = mean_of(x, lengths)
        else:
            pooled = x[torch.arange(len(x), device=x.device), lengths - 1].float()
        return F.linear(pooled, self.score.weight.float()).float()


@dataclass
class SideNetConfig(ClassifierConfig):
    """The config of the MainNet whose first `sidenet_layer` layers the SideNet reads, and the number of its
    hidden units."""
    sidenet_layer: int = 0
    sidenet_size: int = 1

    def __post_init__(self, sliding_window_pattern):
        super().__post_init__(sliding_window_pattern)
        layer, size, num = self.sidenet_layer, self.sidenet_size, self.num_hidden_layers
        if type(layer) is not int or not 0 <= layer < num:
            raise ValueError(f"sidenet_layer {layer!r:.80} must be from 0 (the embeddings) to {num - 1}: the "
                             f"model has {num} layers, and after the last nothing is left to save")
        if type(size) is not int or size < 1:
            raise ValueError(f"sidenet_size {size!r:.80} must be a whole number above 0")


class SideNet(nn.Module):
    """softmax(W2 relu(W1 norm(mean h) + b1) + b2), where h are the MainNet's hidden states after a layer.

    `model` is the MainNet up to that layer, frozen, so that a SideNet's folder is a classifier by itself.
    """
    task = "SideNet"
    config_class = SideNetConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        del self.model.layers[config.sidenet_layer:], self.model.norm
        self.model.requires_grad_(False)
        self.hidden = Linear(config.hidden_size, config.sidenet_size)
        self.out = Linear(config.sidenet_size, len(config.labels))

    def train(self, mode=True):
        """The MainNet is not trained, so nothing of it may behave as in training."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, input_ids, lengths, repeats=None):
        """Logits (B, M) of the M labels, fp32."""
        x = self.model.embedded(input_ids)
        return self.head(self.model.through(x, lengths, repeats, last=self.config.sidenet_layer), lengths)

    def head(self, x, lengths):
        """The logits for the hidden states (B, T, hidden_size) after the layer."""
        pooled = mean_of(x, lengths)
        pooled = F.layer_norm(pooled, pooled.shape[-1:])
        units = F.linear(pooled, self.hidden.weight.float(), self.hidden.bias.float()).relu()
        return F.linear(units, self.out.weight.float(), self.out.bias.float()).float()
