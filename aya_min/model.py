"""The Cohere decoder, as in transformers' modeling_cohere (Aya Expanse, Aya 23, Command R) and modeling_cohere2 (Command R7B, Tiny Aya).

What sets it apart: one bias-free LayerNorm per block feeding attention and MLP in PARALLEL, interleaved rotary pairs (GPT-J style),
logits scaled by `logit_scale`, head tied to the embedding. In cohere2 most layers look back over a window only, and only they have
rotary embeddings. Parameter names are those of the published safetensors.
B batch, T tokens, H heads, K key-value heads, D head width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .linear import Linear, linear
from .losses import sum_by_row, token_logps


class LayerNorm(nn.Module):
    """Mean-centred, scaled, without bias; fp32 inside. weight: (D,), or (H, D) for the optional query-key norm."""

    def __init__(self, shape, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x):
        if self.weight.dim() == 1:
            return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), None, self.eps).to(x.dtype)
        return (F.layer_norm(x.float(), x.shape[-1:], None, None, self.eps) * self.weight.float()).to(x.dtype)


def rotary(config, positions):
    """cos and sin of the rotary angles of the pairs, in fp32. positions (B, T) -> 2 x (B, T, 1, D/2)."""
    D = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)      # (D/2,)
    angles = (positions[..., None].float() * frequencies)[:, :, None]                                                  # (B, T, 1, D/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate the interleaved pairs: x0 + i x1 -> (x0 + i x1)(cos + i sin). x (B, T, H, D); cos, sin (B, T, 1, D/2)."""
    pairs = x.float().unflatten(-1, (-1, 2))                                               # (B, T, H, D/2, 2)
    if torch.compiler.is_compiling():                                                      # it fuses the products, and knows no complex numbers
        x0, x1 = pairs.unbind(-1)
        turned = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1)
    else:                                                                                  # eager on a CPU in a fifth of the time
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


def window_mask(config, num_tokens, device):
    """Who sees whom (True) in a sliding layer: the sliding_window tokens up to itself. (T, T), or None where plain causal attention is the same."""
    if config.sliding_window is None or num_tokens <= config.sliding_window:
        return None
    places = torch.arange(num_tokens, device=device)
    back = places[:, None] - places                                                        # (T, T)
    return (back >= 0) & (back < config.sliding_window)


class Line:
    """Where the tokens of a micro-batch stand when it is packed: all documents in one line (N,), without padding, positions counted in each.

    Attention alone sees them as rows: each token attends within its own document. lengths (B,), right-padded rows of T tokens.
    repeats (2, B), see data.Batch: what a row has in common with an earlier one, a pair's prompt, stands in the line, and is computed, once.
    """

    def __init__(self, lengths, num_tokens, repeats=None):
        places = torch.arange(num_tokens, device=lengths.device)
        there = places < lengths[:, None]                                                  # (B, T)
        own = there & (places >= repeats[1][:, None]) if repeats is not None else there
        self.shape, self.lengths, self.once = (len(lengths), num_tokens), lengths, repeats is None
        self.own = own.flatten().nonzero()[:, 0]                                           # (N,) where in the rows each token stands
        self.positions = self.own % num_tokens
        if not self.once:
            at = torch.zeros_like(there, dtype=torch.long).masked_scatter(own, torch.arange(len(self.own), device=lengths.device))
            self.at = torch.where(own, at, at[repeats[0]])                                 # (B, T) where in the line each token stands
            self.documents, self.first = self.at[there], own[there]                        # (M,) the rows one after the other; which of them are own

    def unpack(self, x):
        """(N, ...) -> (B, T, ...); what stands in the padding is not to be looked at."""
        if self.once:
            return x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.own, x).unflatten(0, self.shape)
        return x.index_select(0, self.at.flatten()).unflatten(0, self.shape)

    def pack(self, x):
        """(B, T, ...) -> (N, ...)"""
        return x.flatten(0, 1).index_select(0, self.own)                                   # x[rows, places] is 4x as slow in its backward on a CPU

    def attend(self, q, k, v, window):
        """torch's variable-length attention, on GPUs in half precision. q (N, H, D), k, v (N, K, D) -> (N, H, D)."""
        from torch.nn.attention.varlen import varlen_attn
        ends = F.pad(self.lengths.cumsum(0), (1, 0)).int()                                 # (B + 1,) where documents begin and end
        if not self.once:
            q, k, v = q[self.documents], k[self.documents], v[self.documents]              # (M, H or K, D)
        y = varlen_attn(q, k, v, ends, ends, self.shape[1], self.shape[1], window_size=(window - 1 if window else -1, 0), enable_gqa=k.shape[1] != q.shape[1])
        return y if self.once else y[self.first]


class Attention(nn.Module):
    def __init__(self, config, window=None):
        super().__init__()
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.H, self.K, self.D, self.window = H, K, D, window
        self.q_proj = Linear(config.hidden_size, H * D, bias=False)
        self.k_proj = Linear(config.hidden_size, K * D, bias=False)
        self.v_proj = Linear(config.hidden_size, K * D, bias=False)
        self.o_proj = Linear(H * D, config.hidden_size, bias=False)
        if config.use_qk_norm:
            self.q_norm = LayerNorm((H, D), config.layer_norm_eps)
            self.k_norm = LayerNorm((K, D), config.layer_norm_eps)
        self.use_qk_norm = config.use_qk_norm

    def forward(self, x, cos=None, sin=None, mask=None, line=None):
        """x (B, T, hidden_size), or (N, hidden_size) along a Line; cos, sin: rotary(), None in a layer without; mask: (T, T) or None, causal."""
        q = self.q_proj(x).unflatten(-1, (self.H, self.D))
        k = self.k_proj(x).unflatten(-1, (self.K, self.D))
        v = self.v_proj(x).unflatten(-1, (self.K, self.D))
        if self.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if line and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return self.o_proj(line.attend(q, k, v, self.window).flatten(-2))
        if line:
            q, k, v = line.unpack(q), line.unpack(k), line.unpack(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                  # (B, H, T, D), (B, K, T, D) twice
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.K != self.H).transpose(1, 2)
        return self.o_proj((line.pack(y) if line else y).flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(LN(x)) + mlp(LN(x)): the parallel block, one norm."""

    def __init__(self, config, window=None):
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config, window)
        self.mlp = MLP(config)

    def forward(self, x, cos=None, sin=None, mask=None, line=None):
        h = self.input_layernorm(x)
        return x + self.self_attn(h, cos, sin, mask, line) + self.mlp(h)


class Decoder(nn.Module):
    """Embedding, blocks, final norm: the `model.` part of the published names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, config.window(i)) for i in range(config.num_hidden_layers))
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.packing = None                         # compute no padding, and common prompts once, where lengths are given; None: on a CPU
        self.activation_checkpointing = 0           # blocks that are recomputed in backward: 0 none, 1 all, n every n-th

    def forward(self, input_ids, lengths=None, repeats=None):
        """input_ids (B, T), right-padded: under the causal mask no real token sees the padding. -> (B, T, hidden_size)"""
        x, config = self.embed_tokens(input_ids), self.config
        packing = x.device.type == "cpu" if self.packing is None else self.packing
        line = Line(lengths, input_ids.shape[1], repeats) if packing and lengths is not None else None
        turn = rotary(config, torch.arange(input_ids.shape[1], device=x.device)[None])     # (1, T, 1, D/2) twice
        if line:
            x, turn = line.pack(x), [each[0, line.positions] for each in turn]             # (N, hidden_size), (N, 1, D/2) twice
        band = window_mask(config, input_ids.shape[1], x.device)
        every = self.activation_checkpointing if self.training else 0
        for i, block in enumerate(self.layers):
            inputs = (*(turn if config.has_rope(i) else (None, None)), band if config.window(i) else None, line)
            if every and i % every == 0:
                x = checkpoint(block, x, *inputs, use_reentrant=False)
            else:
                x = block(x, *inputs)
        x = self.norm(x)
        return line.unpack(x) if line else x


class CohereForCausalLM(nn.Module):
    """The decoder with the language model's head; config.model_type says whether it is CohereForCausalLM or Cohere2ForCausalLM."""
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
        """Logits (B, T, V); with `mask` (B, T) instead the log-probs of the masked tokens, (N,) in the order of mask.nonzero(),
        each given the tokens before it. lengths (B,) of the rows, repeats (2, B): for packing.

        Everything goes through this one call, because FSDP gathers the weights around a forward.
        """
        x = self.model(input_ids, lengths, repeats)
        if mask is not None:
            return token_logps(x[:, :-1][mask[:, 1:]], self.head_weight, input_ids[mask], self.config.logit_scale)
        return linear(x, self.head_weight) * self.config.logit_scale


class RewardModel(nn.Module):
    """The decoder with a scalar head: the last token's hidden state, and how likely the model itself finds the answer.

        r(x, y) = w . h_end + v . (mean_t, min_t) log p(y_t | x, y_<t)

    The second term is the departure from the usual last-token head. At a million parameters a last-token head learns form and language
    but not correctness (LOG.md); the least likely token is where a wrong word shows. Without `score_logps` in the folder it is the usual head.
    """
    task = "RewardModel"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.score = Linear(config.hidden_size, 1, bias=False)
        self.score_logps = Linear(2, 1, bias=False)

    def forward(self, input_ids, lengths, mask, repeats=None):
        """Scores (B,) in fp32, read at position lengths - 1, and the log-probs of the masked (answer) tokens, (N,) in the order of mask.nonzero()."""
        x = self.model(input_ids, lengths, repeats)
        ends = x[torch.arange(len(x), device=x.device), lengths - 1]                        # (B, hidden_size)
        logps = token_logps(x[:, :-1][mask[:, 1:]], self.model.embed_tokens.weight, input_ids[mask], self.config.logit_scale)
        rows = mask.nonzero()[:, 0]
        mean = sum_by_row(logps, mask) / mask.sum(1)                                        # (B,) nats
        least = logps.new_zeros(len(x)).scatter_reduce(0, rows, logps, "amin")              # (B,) nats, at most 0
        scores = F.linear(ends.float(), self.score.weight.float()) + F.linear(torch.stack((mean, least), 1), self.score_logps.weight.float())
        return scores[:, 0].clone(), logps      # under FSDP an output that is a view warns


def initial_value(config, name, shape, generator):
    """Normal(0, initializer_range) for matrices, ones for norms; output projections scaled by 1/sqrt(2 layers) (GPT-2);
    reward head 1/sqrt(hidden + 1) (arXiv 2009.01325, appendix)."""
    std = config.initializer_range
    if len(shape) == 1 or "norm" in name:
        return torch.ones(shape)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= (2 * config.num_hidden_layers) ** 0.5
    if name == "score.weight":
        std = (config.hidden_size + 1) ** -0.5
    if name == "score_logps.weight":
        return torch.full(shape, 0.5)
    return torch.randn(shape, generator=generator) * std


@torch.no_grad()
def init_weights(model, generator):
    """Fill every parameter with its initial_value. Deterministic in `generator`, on any device."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(model.config, name, parameter.shape, generator))
    return model
