"""The Cohere decoder, as in transformers' modeling_cohere (Aya Expanse, Aya 23, Command R) and
modeling_cohere2 (Command R7B, Tiny Aya), and the other families of families.FAMILIES.

Cohere's differs from other decoders in four points: one bias-free LayerNorm per block feeds attention and MLP
in PARALLEL, rotary pairs are interleaved (GPT-J style), logits are scaled by `logit_scale`, and the head is
tied to the embedding. In cohere2 most layers attend within a sliding window, and only those have rotary
embeddings. How the others differ stands in the families' table. Parameter names are those of the published
safetensors.
B batch, T tokens, H heads, K key-value heads, D head width, V vocabulary.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .dropout import dropped, dropped_attention
from .families import NORMS
from .line import Line
from .linear import Linear, linear
from .model_config import ModelConfig, RewardConfig
from .moe import AttentionExperts, MixtureMLP
from .norms import norm_of
from .rope import growth, rotary, rotate
from .token_logps import capped, sum_by_row, token_logps


def window_mask(config, num_tokens, device):
    """The attention mask (T, T) of a sliding layer: True where a query sees a key, which are the last
    `sliding_window` tokens up to its own. None where plain causal attention is the same."""
    if config.sliding_window is None or num_tokens <= config.sliding_window:
        return None
    positions = torch.arange(num_tokens, device=device)
    distance = positions[:, None] - positions                               # (T, T)
    return (distance >= 0) & (distance < config.sliding_window)


def explicit_attention(q, k, v, mask, scale, cap=None, dropout=None):
    """Attention with a tensor of all probabilities, for what no fused kernel of torch's computes: scores of
    cap tanh(score / cap), and dropout with our own masks. Scores are fp32.

    q (B, H, T, D), k and v (B, K, T, D), mask (T, T) or None for causal, scale or None for D^-1/2, dropout
    with keys (B, T) -> (B, H, T, D).
    """
    if mask is None:
        mask = torch.ones(q.shape[-2], q.shape[-2], device=q.device, dtype=torch.bool).tril()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = q.unflatten(1, (k.shape[1], -1))                                    # (B, K, H/K, T, D)
    scores = capped((q @ k[:, :, None].transpose(-1, -2)).float() * scale, cap)
    probs = dropped_attention(scores.masked_fill(~mask, float("-inf")).softmax(-1), dropout)
    return (probs.to(v.dtype) @ v[:, :, None]).flatten(1, 2)


class Attention(nn.Module):
    """Grouped-query attention, causal, within a window if one is given."""

    def __init__(self, config, window=None):
        super().__init__()
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        family = config.family
        self.H, self.K, self.D, self.window = H, K, D, window
        self.q_proj = Linear(config.hidden_size, H * D, bias=family.qkv_bias)
        self.k_proj = Linear(config.hidden_size, K * D, bias=family.qkv_bias)
        self.v_proj = Linear(config.hidden_size, K * D, bias=family.qkv_bias)
        self.o_proj = Linear(H * D, config.hidden_size, bias=False)
        self.has_qk_norm = config.has_qk_norm
        if self.has_qk_norm:
            shapes = [D, D] if family.qk_norm == "head" else [(H, D), (K, D)]
            self.q_norm, self.k_norm = (norm_of(config, shape) for shape in shapes)
        self.interleaved, self.cap = family.interleaved, config.attn_logit_softcapping
        # None is D^-1/2.
        self.scale = config.softmax_scale if config.query_pre_attn_scalar else None

    def forward(self, x, cos=None, sin=None, mask=None, line=None, grown=None, dropout=None):
        """x (B, T, hidden_size), or (N, hidden_size) with a Line -> the same shape.

        cos, sin: of rotary(), None in a layer without rotary embeddings.
        mask: (T, T) of window_mask(), or None for plain causal attention. grown: of growth(). dropout: of the
        layer, or None.
        """
        q, k, v = self.heads(x)
        if cos is not None:
            q, k = rotate(q, cos, sin, self.interleaved), rotate(k, cos, sin, self.interleaved)
        if grown is not None:
            q = q * grown.to(q.dtype)
        explicit = self.cap or dropout is not None and dropout.attention
        if line and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and not explicit:
            return self.output(line.attend(q, k, v, self.window, self.scale).flatten(-2), x)
        if line:
            q, k, v = line.unpack(q), line.unpack(k), line.unpack(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, H or K, T, D)
        if explicit:
            dropout = dropout.unpacked(line) if dropout is not None and line else dropout
            y = explicit_attention(q, k, v, mask, self.scale, self.cap, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                               scale=self.scale, enable_gqa=k.shape[1] != q.shape[1])
        y = y.transpose(1, 2)                                               # (B, T, H, D)
        return self.output((line.pack(y) if line else y).flatten(-2), x)

    def heads(self, x):
        """Queries (..., H, D), keys and values (..., K, D), normed where the family does that."""
        q = self.q_proj(x).unflatten(-1, (self.H, self.D))
        k = self.k_proj(x).unflatten(-1, (self.K, self.D))
        v = self.v_proj(x).unflatten(-1, (self.K, self.D))
        return (self.q_norm(q), self.k_norm(k), v) if self.has_qk_norm else (q, k, v)

    def output(self, y, x):
        """The heads' outputs y (..., H D) for the input x, projected."""
        return self.o_proj(y)


class MixtureAttention(AttentionExperts, Attention):
    """The attention experts of a mixture: their heads side by side in one attention (moe.py)."""

    def __init__(self, config, window=None):
        Attention.__init__(self, config, window)
        self.set_experts(config)


def activation(config):
    """The function of the MLP's gate."""
    return {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}[
        config.family.activation[1]]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), or with the family's activation in place of silu."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = activation(config)

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(LN(x)) + mlp(LN(x)), the parallel block with one norm, or one of the two blocks in
    sequence (families.py)."""

    def __init__(self, config, window=None):
        super().__init__()
        self.kind = config.family.block
        for name in NORMS[self.kind]:
            setattr(self, name, norm_of(config, config.hidden_size))
        mixture = config.mixture
        self.self_attn = (MixtureAttention if mixture and mixture.attention else Attention)(config, window)
        self.mlp = MixtureMLP(config, MLP, activation(config)) if mixture else MLP(config)

    def forward(self, x, *inputs, dropout=None):
        """x, the inputs and the dropout are those of Attention."""
        return self.joined(x, self.mlp, *inputs, dropout=dropout)

    def joined(self, x, mlp, *inputs, dropout):
        h = self.input_layernorm(x)
        attended = self.self_attn(h, *inputs, dropout=dropout)
        if self.kind == "parallel":
            return x + dropped(attended, dropout, 1) + dropped(mlp(h), dropout, 2)
        if self.kind == "sequence":
            x = x + dropped(attended, dropout, 1)
            return x + dropped(mlp(self.post_attention_layernorm(x)), dropout, 2)
        x = x + dropped(self.post_attention_layernorm(attended), dropout, 1)
        h = mlp(self.pre_feedforward_layernorm(x))
        return x + dropped(self.post_feedforward_layernorm(h), dropout, 2)


class MixtureBlock(Block):
    """A block whose MLP is a mixture of experts, and its attention too if the config says so."""

    def forward(self, x, counted, domains, *inputs, dropout=None):
        """x, the inputs and the dropout are those of Attention, counted and domains those of MixtureMLP. ->
        (x, moe's routing_sums)"""
        sums = []

        def mlp(h):
            y, routed = self.mlp(h, counted, domains)
            sums.append(routed)
            return y
        return self.joined(x, mlp, *inputs, dropout=dropout), sums[0]


def scaled(config, x):
    """Embeddings times sqrt(hidden_size), rounded to their precision, where the family scales them."""
    return x * x.new_full((), config.hidden_size ** 0.5) if config.family.scales_embedding else x


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the `model.` part of the published names.

    packing: whether padding is left out of the computation, and shared prefixes are computed once (see
    Line), when the lengths are given. None: on a CPU only.
    activation_checkpointing: which blocks are recomputed in the backward: 0 none, 1 all, n every n-th.
    dropout: that of the step (dropout.of_step), or None; it is for training mode only.
    routing: of a mixture of experts, what the last forward leaves for the losses on it: moe.routing_sums of
    each layer, (layers, 2 E + 1).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        block, mixture = (MixtureBlock if config.mixture else Block), config.mixture
        self.layers = nn.ModuleList(block(config, config.window(i)) for i in range(config.num_hidden_layers))
        if mixture and mixture.router == "nexus":
            # Not a parameter, because it is fixed, but published.
            self.register_buffer("domains", torch.zeros(len(mixture.experts), mixture.domain_size))
        self.norm = norm_of(config, config.hidden_size)
        self.packing = None
        self.activation_checkpointing = 0
        self.dropout = None
        self.routing = None

    def forward(self, input_ids, lengths=None, repeats=None):
        """input_ids (B, T) -> hidden states (B, T, hidden_size).

        Rows are padded on the right, so the causal mask hides the padding from every real token.
        """
        dropout = self.dropout.of_text(input_ids) if self.dropout and self.training else None
        return self.through(self.embedded(input_ids), lengths, repeats, dropout=dropout)

    def embedded(self, input_ids):
        """input_ids (B, T) -> (B, T, hidden_size), the hidden states after layer 0."""
        return scaled(self.config, self.embed_tokens(input_ids))

    def through(self, x, lengths=None, repeats=None, first=0, last=None, dropout=None):
        """The hidden states (B, T, hidden_size) after layer `first` -> those after layer `last`, or without
        it those after all layers and the final norm. Layers count from 1. dropout: with the keys of the
        text."""
        T, config = x.shape[1], self.config
        packing = x.device.type == "cpu" if self.packing is None else self.packing
        line = Line(lengths, T, repeats) if packing and lengths is not None else None
        positions = torch.arange(T, device=x.device)[None]
        angles = {theta: rotary(config, positions, theta) for theta in config.ropes}    # 2 x (1, T, 1, D/2)
        grown = growth(config, positions)                                   # (1, T, 1, 1) or None
        if line:
            dropout = dropout and dropout.packed(line)
            grown = None if grown is None else grown[0, line.positions]     # (N, 1, 1)
            x = line.pack(x)                                                # (N, hidden_size)
            angles = {theta: [each[0, line.positions] for each in both]     # 2 x (N, 1, D/2)
                      for theta, both in angles.items()}
        mask = window_mask(config, T, x.device)
        every, more, routing = self.activation_checkpointing if self.training else 0, (), []
        if config.mixture:
            more = self.times(line, lengths, T), getattr(self, "domains", None)
        for i, block in list(enumerate(self.layers))[first:last]:
            cos, sin = angles.get(config.rope(i), (None, None))
            inputs = (*more, cos, sin, mask if config.window(i) else None, line, grown)
            own = dropout and dropout.of_layer(i)
            if every and i % every == 0:
                x = checkpoint(block, x, *inputs, dropout=own, use_reentrant=False)
            else:
                x = block(x, *inputs, dropout=own)
            if config.mixture:
                x, sums = x
                routing.append(sums)
        self.routing = torch.stack(routing) if routing else None
        x = self.norm(x) if last is None else x
        return line.unpack(x) if line else x

    def times(self, line, lengths, num_tokens):
        """How often each token that is computed counts: once for each row that it stands in, padding not. A
        flat tensor in fp32, or None where that is once for all."""
        if line or lengths is None:
            return line.times() if line else None
        places = torch.arange(num_tokens, device=lengths.device)
        return (places < lengths[:, None]).flatten().float()


class CohereForCausalLM(nn.Module):
    """The decoder with the language model's head. config.model_type says whether the published class is
    CohereForCausalLM or that of another family."""
    task = "ForCausalLM"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids, mask=None, lengths=None, repeats=None):
        """Logits (B, T, V). With `mask` (B, T) instead the log-probs (N,) of the masked tokens, each given
        the tokens before it, in nats and in the order of mask.nonzero(). The first token has no such
        log-prob: mask[:, 0] is False.

        lengths (B,) and repeats (2, B) are for packing. FSDP gathers the weights around a forward only, so
        log-probs come from this call too (losses.supervised_logps).
        """
        x = self.model(input_ids, lengths, repeats)
        if mask is not None:
            # The selected states have no name here, so that they are freed once token_logps has padded them.
            return token_logps(x[:, :-1][mask[:, 1:]], self.head_weight, input_ids[mask],
                               self.config.logit_scale, cap=self.config.final_logit_softcapping)
        return capped(linear(x, self.head_weight) * self.config.logit_scale,
                      self.config.final_logit_softcapping)


class RewardModel(nn.Module):
    """The decoder with a scalar head on the last token's hidden state and on the answer's log-probs:

        r(x, y) = w . h_end + v . (mean_t, min_t) log p(y_t | x, y_<t)

    The second term departs from the usual last-token head, which is what remains without `score_logps` in
    the folder, and all that SequenceClassifier has. At a million parameters a last-token head learns form and
    language but not correctness (LOG.md), and the least likely token is where a wrong word shows.
    """
    task = "RewardModel"
    config_class = RewardConfig

    def __init__(self, config):
        super().__init__()
        self.config = config = RewardConfig.on(config)
        self.model = Decoder(config)
        self.score = Linear(config.hidden_size, 1, bias=False)
        self.score_logps = Linear(2, 1, bias=False)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    head_weight = CohereForCausalLM.head_weight

    def forward(self, input_ids, lengths, mask, repeats=None):
        """Scores (B,) in fp32, read at position lengths - 1, and the log-probs (N,) of the masked (answer)
        tokens, in nats and in the order of mask.nonzero()."""
        x = self.model(input_ids, lengths, repeats)
        ends = x[torch.arange(len(x), device=x.device), lengths - 1]        # (B, hidden_size)
        logps = token_logps(x[:, :-1][mask[:, 1:]], self.head_weight, input_ids[mask],
                            self.config.logit_scale, cap=self.config.final_logit_softcapping)
        rows = mask.nonzero()[:, 0]                                         # (N,)
        mean = sum_by_row(logps, mask) / mask.sum(1)                        # (B,)
        # An answer's minimum starts at 0, which no log-prob exceeds.
        least = logps.new_zeros(len(x)).scatter_reduce(0, rows, logps, "amin")      # (B,)
        features = torch.stack((mean, least), 1)                            # (B, 2)
        scores = F.linear(ends.float(), self.score.weight.float())          # (B, 1)
        scores = scores + F.linear(features, self.score_logps.weight.float())
        # FSDP warns when an output is a view.
        return scores[:, 0].clone(), logps


class SequenceClassifier(RewardModel):
    """The usual reward model, transformers' ForSequenceClassification with one label: w . h_end alone. The
    end is the last token that is not config.pad_token_id, even if that token ends the text."""
    task = "ForSequenceClassification"

    def __init__(self, config):
        nn.Module.__init__(self)
        self.config = config = RewardConfig.on(config)
        self.model = Decoder(config)
        self.score = Linear(config.hidden_size, 1, bias=False)

    def forward(self, input_ids, lengths, mask, repeats=None):
        """Scores (B,) in fp32, and None in place of log-probs."""
        x = self.model(input_ids, lengths, repeats)
        places = torch.arange(input_ids.shape[1], device=x.device)
        is_text = places < lengths[:, None]                                 # (B, T)
        if self.config.pad_token_id is not None:
            is_text &= input_ids != self.config.pad_token_id
        last = (places * is_text).amax(1)                                   # (B,)
        ends = x[torch.arange(len(x), device=x.device), last]               # (B, hidden_size)
        return F.linear(ends.float(), self.score.weight.float())[:, 0].clone(), None


@dataclass
class RouterConfig(ModelConfig):
    """A decoder's config with the router's head: the teachers in the order of its rows, and the temperature
    of the targets that it was trained on."""
    teachers: list = field(default_factory=list)
    tau: float = 1.0

    def __post_init__(self, sliding_window_pattern):
        super().__post_init__(sliding_window_pattern)
        names, tau = self.teachers, self.tau
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)
                and len(set(names)) == len(names) > 1):
            raise ValueError(f"teachers {names!r:.80} must be a list of two names or more, each once")
        if type(tau) not in (int, float) or not 0 < tau < math.inf:
            raise ValueError(f"tau {tau!r:.80} must be a finite number above 0")


class Router(nn.Module):
    """The decoder with a linear head on the prompt's last hidden state: log p(teacher | x) of each teacher
    (arXiv 2408.14960, learned routing). It reads the prompt alone."""
    task = "Router"
    config_class = RouterConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.router = Linear(config.hidden_size, len(config.teachers), bias=False)

    def forward(self, input_ids, lengths, repeats=None):
        """Log-probs (B, M) of the M teachers, fp32, read at position lengths - 1."""
        x = self.model(input_ids, lengths, repeats)
        ends = x[torch.arange(len(x), device=x.device), lengths - 1]        # (B, hidden_size)
        return F.linear(ends.float(), self.router.weight.float()).float().log_softmax(-1)


def initial_value(config, name, shape, generator):
    """The initial value of the parameter `name`.

    Matrices: Normal(0, initializer_range), output projections scaled by 1/sqrt(2 layers) (GPT-2).
    Norms multiply by 1; biases are 0. Reward head: Normal with deviation 1/sqrt(hidden_size + 1) (arXiv
    2009.01325, appendix), and so a classifier's; its weights for log-probs: 0.5. The heads of a router and of
    a SideNet: zeros, so that all teachers or labels begin equally likely.
    """
    std = config.initializer_range
    if len(shape) == 1 or "norm" in name or name.endswith("bias"):
        return torch.full(shape, float("norm" in name and config.family.norm != "rms + 1"))
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= (2 * config.num_hidden_layers) ** 0.5
    if name == "model.domains":
        std = shape[1] ** -0.5
    if name in ("score.weight", "hidden.weight"):
        std = (config.hidden_size + 1) ** -0.5
    if name == "score_logps.weight":
        return torch.full(shape, 0.5)
    if name in ("router.weight", "out.weight"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * std


@torch.no_grad()
def init_weights(model, generator):
    """Fill every tensor with its initial_value (an encoder-decoder has its own), which depends on `generator`
    only, not on the device."""
    value = getattr(model, "initial_value", initial_value)
    for name, tensor in model.state_dict().items():
        tensor.copy_(value(model.config, name, tensor.shape, generator))
    return model
