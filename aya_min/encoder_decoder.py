"""The encoder-decoder of T5 v1.1, mT5 and umT5 (arXiv 1910.10683, 2010.11934; Aya 101: 2402.07827), as in
transformers' modeling_t5, modeling_mt5 and modeling_umt5. Parameter names are those of the published files.

It differs from the decoders of model.py: RMS norms before each part and after each stack; attention WITHOUT
1/sqrt(D), on scores to which a learned number for the distance of query and key is added; no such number in
cross-attention; gelu_new times a second product in the MLP; no biases.

A row of a batch is a source and the target after it, (source, target): data.Example's mask is True on the
target, and so every loss on log-probs of answers (sft, dpo, kto) computes here what it does for a decoder.
B rows, S source tokens, U target tokens, T of either, H heads, D head width, N tokens of a line (line.py).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .encoder_decoder_config import TASK
from .line import Line
from .linear import Linear, linear
from .norms import RMSNorm
from .token_logps import token_logps

ACTIVATIONS = {"gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu}


def buckets(distance, is_bidirectional, num_buckets, max_distance):
    """The bucket of each distance, key - query in tokens, an integer tensor -> the same shape.

    Half of the buckets hold one distance each; in the others they grow as the logarithm up to max_distance,
    beyond which all distances share the last one. An encoder has one half of the buckets for keys before the
    query and one for those after it; in a decoder keys after the query, which it never sees, count as 0.
    """
    first = torch.zeros_like(distance)
    if is_bidirectional:
        num_buckets //= 2
        first, distance = (distance > 0).long() * num_buckets, distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def distance_bias(table, num_tokens, config, is_bidirectional):
    """What is added to the scores of num_tokens queries and as many keys: (H, T, T), from the table
    (num_buckets, H)."""
    places = torch.arange(num_tokens, device=table.device)
    index = buckets(places - places[:, None], is_bidirectional, config.relative_attention_num_buckets,
                    config.relative_attention_max_distance)                 # (T, T)
    return F.embedding(index, table).permute(2, 0, 1)


def attend(q, k, v, bias, hidden):
    """Softmax attention without a scale. q (B, T, H, D), k and v (B, S, H, D), bias (1, H, T, S) or None,
    hidden (B or 1, 1, T or 1, S) bool, True where a query does not see a key, or None -> (B, T, H, D).

    Scores are fp32.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = (q @ k.transpose(-1, -2)).float()                              # (B, H, T, S)
    scores = scores if bias is None else scores + bias
    scores = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


class Attention(nn.Module):
    """Attention without biases; one with a table of distances computes the bias of its stack."""

    def __init__(self, config, has_table=False):
        super().__init__()
        d, width = config.d_model, config.num_heads * config.d_kv
        self.H, self.config = config.num_heads, config
        self.q, self.k, self.v = (Linear(d, width, bias=False) for _ in range(3))
        self.o = Linear(width, d, bias=False)
        if has_table:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, self.H)

    def heads(self, project, x):
        return project(x).unflatten(-1, (self.H, -1))


class SelfAttentionPart(nn.Module):
    def __init__(self, config, has_table, is_decoder):
        super().__init__()
        self.SelfAttention, self.is_decoder = Attention(config, has_table), is_decoder
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x, bias, texts):
        """x (B, T, d_model) or (N, d_model), bias (1, H, T, T) or None -> both, the bias computed if this
        layer has the table."""
        own, h = self.SelfAttention, self.layer_norm(x)
        if hasattr(own, "relative_attention_bias"):
            bias = distance_bias(own.relative_attention_bias.weight, texts.num_tokens, own.config,
                                 not self.is_decoder).float()[None]
        q, k, v = (texts.unpack(own.heads(each, h)) for each in (own.q, own.k, own.v))
        y = attend(q, k, v, bias, texts.after if self.is_decoder else texts.padding)
        return x + own.o(texts.pack(y).flatten(-2)), bias


class CrossAttentionPart(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.EncDecAttention = Attention(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x, texts, states, sources):
        """x of the targets `texts`, states of the encoder on `sources` -> as x."""
        own, h = self.EncDecAttention, self.layer_norm(x)
        q = texts.unpack(own.heads(own.q, h))
        k, v = (sources.of_rows(sources.unpack(own.heads(each, states))) for each in (own.k, own.v))
        y = attend(q, k, v, None, sources.of_rows(sources.padding))
        return x + own.o(texts.pack(y).flatten(-2))


class Gated(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wi_0, self.wi_1 = (Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo, self.act = Linear(config.d_ff, config.d_model, bias=False), ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.wo(self.act(self.wi_0(x)) * self.wi_1(x))


class Plain(nn.Module):
    """The MLP of T5 v1.0."""

    def __init__(self, config):
        super().__init__()
        self.wi, self.wo = (Linear(*sizes, bias=False) for sizes in (
            (config.d_model, config.d_ff), (config.d_ff, config.d_model)))
        self.act = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.wo(self.act(self.wi(x)))


class FeedForwardPart(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.DenseReluDense = (Gated if config.is_gated else Plain)(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x):
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    """Self-attention, in a decoder cross-attention, and the MLP. FSDP shards it by itself, so that the bias
    of the table in block 0 is computed and returned by that block."""

    def __init__(self, config, has_table, is_decoder):
        super().__init__()
        cross = [CrossAttentionPart(config)] if is_decoder else []
        self.layer = nn.ModuleList([SelfAttentionPart(config, has_table, is_decoder), *cross,
                                    FeedForwardPart(config)])

    def forward(self, x, bias, texts, *encoded):
        """encoded: a decoder's states and sources, see CrossAttentionPart. -> (x, bias)"""
        x, bias = self.layer[0](x, bias, texts)
        if encoded:
            x = self.layer[1](x, texts, *encoded)
        return self.layer[-1](x), bias


class Stack(nn.Module):
    """The blocks of the encoder or the decoder, and a norm."""

    def __init__(self, config, num_layers, is_decoder):
        super().__init__()
        every = config.model_type == "umt5"
        self.block = nn.ModuleList(Block(config, every or i == 0, is_decoder) for i in range(num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x, texts, *encoded, recompute=0):
        """recompute: which blocks the backward computes again, see EncoderDecoder."""
        bias = None
        for i, block in enumerate(self.block):
            if recompute and i % recompute == 0:
                x, bias = checkpoint(block, x, bias, texts, *encoded, use_reentrant=False)
            else:
                x, bias = block(x, bias, texts, *encoded)
        return self.final_layer_norm(x)


class Texts:
    """Right-padded texts (B, T), or a line of their tokens (N,) without the padding.

    lengths (B,), num_tokens T. rows: of which text each of the batch's rows reads, or None: its own.
    padding (B, 1, 1, T) and after (1, 1, T, T): what no query, or no query before it, sees.
    """

    def __init__(self, lengths, num_tokens, is_line, rows=None):
        places = torch.arange(num_tokens, device=lengths.device)
        self.num_tokens, self.rows = num_tokens, rows
        self.is_text = places < lengths[:, None]                            # (B, T)
        self.padding = ~self.is_text[:, None, None]
        self.after = (places > places[:, None])[None, None]
        self.line = Line(lengths, num_tokens) if is_line else None

    def pack(self, x):
        return self.line.pack(x) if self.line else x

    def unpack(self, x):
        return self.line.unpack(x) if self.line else x

    def of_rows(self, x):
        """(texts, ...) -> (rows, ...)"""
        return x if self.rows is None else x.index_select(0, self.rows)


def equal_sources(source_lengths, repeats):
    """(the rows whose source is no earlier row's (E,), the index among these of each row's source (B,)) of
    data.Batch.repeats."""
    first, shared = repeats
    same = (shared >= source_lengths) & (source_lengths == source_lengths[first])
    own = (~same).nonzero()[:, 0]                                           # (E,)
    index = (~same).cumsum(0) - 1                                           # (B,)
    return own, torch.where(same, index[first], index)


def initial_value(config, name, shape, generator):
    """The initial value of the parameter `name`, by T5's rule (transformers' _init_weights), times
    initializer_factor: embeddings Normal(0, 1), matrices Normal(0, inputs^-1/2), queries smaller by D^-1/2,
    which stands in for the missing scale of the scores.

    Departure: an untied head is d_model^-1/2, as any other matrix; transformers' 1 would give logits of
    deviation d_model^1/2 at the start.
    """
    d, D, H, factor = config.d_model, config.d_kv, config.num_heads, config.initializer_factor
    if "layer_norm" in name:
        return torch.full(shape, factor)
    std = {"shared": 1.0, "q": (d * D) ** -0.5, "o": (H * D) ** -0.5, "wo": config.d_ff ** -0.5}.get(
        name.split(".")[-2], d ** -0.5)
    return torch.randn(shape, generator=generator) * (factor * std)


class EncoderDecoder(nn.Module):
    """The whole model. packing and activation_checkpointing are those of model.Decoder."""
    task = TASK
    # What a decoder may have and this has not.
    dropout = routing = None
    initial_value = staticmethod(initial_value)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, config.num_layers, is_decoder=False)
        self.decoder = Stack(config, config.num_decoder_layers, is_decoder=True)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.packing, self.activation_checkpointing = None, 0

    @property
    def model(self):
        """What the training loop and FSDP call the trunk."""
        return self

    @property
    def layers(self):
        return [*self.encoder.block, *self.decoder.block]

    @property
    def head_weight(self):
        return self.shared.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids, mask, lengths, repeats=None):
        """The log-probs (N,) of the target's tokens, in nats and in the order of mask.nonzero().

        input_ids (B, T): in each row a source, its target and padding. mask (B, T): True on the target.
        lengths (B,): of both together. repeats: data.Batch's; equal sources are encoded once.
        """
        target_lengths = mask.sum(1)
        source_lengths, rows, sources = lengths - target_lengths, None, input_ids
        U = int(target_lengths.max())
        at = source_lengths[:, None] + torch.arange(U, device=input_ids.device)
        targets = input_ids.gather(1, at.clamp(max=input_ids.shape[1] - 1))             # (B, U)
        own_lengths = source_lengths
        if repeats is not None:
            own, rows = equal_sources(source_lengths, repeats)
            sources, own_lengths = input_ids[own], source_lengths[own]
        x, texts = self.states(sources, own_lengths, targets, target_lengths, rows)
        is_text = texts.is_text
        hidden = x if texts.line else x[is_text]                            # (N, d_model)
        return token_logps(hidden, self.head_weight, targets[is_text], self.config.output_scale)

    def logits(self, sources, source_lengths, targets, target_lengths):
        """Logits (B, U, V) of padded sources (B, S) and targets (B, U); those of the padding mean nothing."""
        x, texts = self.states(sources, source_lengths, targets, target_lengths)
        return linear(texts.unpack(x) * self.config.output_scale, self.head_weight)

    def states(self, sources, source_lengths, targets, target_lengths, rows=None):
        """(the decoder's normed states (N, d_model) or (B, U, d_model), the Texts of the targets). Each
        target's token is predicted from the tokens before it, of which the first is the decoder's start.
        rows: Texts' of the sources, or None."""
        is_line = sources.device.type == "cpu" if self.packing is None else self.packing
        recompute = self.activation_checkpointing if self.training else 0
        S = int(source_lengths.max())
        encoded = Texts(source_lengths, S, is_line, rows)
        states = self.encoder(self.shared(encoded.pack(sources[:, :S])), encoded, recompute=recompute)
        texts = Texts(target_lengths, targets.shape[1], is_line)
        before = F.pad(targets[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        x = self.decoder(self.shared(texts.pack(before)), texts, states, encoded, recompute=recompute)
        return x, texts
