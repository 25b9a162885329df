"""The engine of sampling: logits to token, and prefill and decode on a static KV cache with the weights of
fused.py. sampling.py keeps its rows full.

The mathematics is that of model.py without padding: the tokens of all rows stand one after the other,
(N, ...), and only attention sees them as rows. Attention always runs over a multiple of BLOCK keys, so that
on the CPU in fp32 not even the last bit of a log-prob depends on the other rows (tests/test_sampling.py).
B rows, N tokens, H heads, K key-value heads, D head width, V vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F

from .model import activation, explicit_attention, scaled, window_mask
from .rope import doubled, growth, rotary, rotate_halves
from .token_logps import capped

# Keys. Attention kernels add in vectors and blocks; over whole ones masked keys change no bit.
BLOCK = 32
# Logits are some thousands at most; divided by this they are far from the end of fp32.
LEAST_TEMPERATURE = 1e-6


# ---- logits to token ---------------------------------------------------------------------------------------

def filtered(logits, top_k, top_p, min_p):
    """Logits (B, V) in which the tokens that top-k, top-p (nucleus) or min-p exclude are -inf. The values 0,
    1.0 and 0.0 switch them off."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        excluded = probs.cumsum(-1) - probs >= top_p                        # (B, V) in sorted order
        logits = logits.masked_fill(excluded.scatter(1, order, excluded), float("-inf"))
    if min_p > 0.0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), float("-inf"))
    return logits


def choose(logits, uniforms, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Next tokens (B,) and their log-probs (B,) in nats, at this temperature and before any filter.
    Temperature 0 is greedy, with log-probs at temperature 1.

    logits (B, V) in fp32 may be overwritten. uniforms (B,) in [0, 1): the inverse of the cumulative
    distribution turns each into a token, so that one number per row decides. (torch.multinomial draws from
    one generator for all rows, so a row's token would depend on the other rows.)
    """
    if temperature == 0:
        top, tokens = logits.max(-1)                                        # (B,) twice
        return tokens, -logits.sub_(top[:, None]).exp_().sum(-1).log()
    if temperature != 1:
        logits /= temperature
    probs = kept = logits.softmax(-1)                                       # (B, V)
    if (top_k, top_p, min_p) != (0, 1.0, 0.0):
        kept = filtered(logits, top_k, top_p, min_p).softmax(-1)
    cumulative = kept.cumsum(-1)
    drawn = uniforms[:, None].to(cumulative) * cumulative[:, -1:]           # (B, 1)
    tokens = torch.searchsorted(cumulative, drawn, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def check_sampling(temperature, top_k, top_p, min_p):
    """Raise ValueError for a value outside its range."""
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature} must be 0 (greedy) or at least {LEAST_TEMPERATURE}: "
                         "logits divided by less leave the range of fp32")
    if not top_k >= 0:
        raise ValueError(f"top-k {top_k} must be at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p {top_p} must be above 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min-p {min_p} must be at least 0 and at most 1")


# ---- the engine --------------------------------------------------------------------------------------------

def round_up(n, multiple=BLOCK):
    return -(-n // multiple) * multiple


def cache_sizes(config, max_tokens):
    """Positions that each layer keeps: all of them, or those of its sliding window."""
    return [min(max_tokens, config.window(i) or max_tokens) for i in range(config.num_hidden_layers)]


class Engine:
    """A static KV cache of `slots` rows of `max_tokens` tokens each, and the two forwards on it: prefill,
    which fills it, and decode, which appends a token.

    Rows 0 .. n-1 are in use. A layer with a sliding window keeps a ring of that many positions: position p is
    stored at p mod window. filters: top-k, top-p, min-p. temperature None: `step` gives logits (n, V), and
    the caller, who chooses, gives the tokens to `append`.
    """

    def __init__(self, fused, slots, max_tokens, max_new_tokens, temperature=1.0, filters=(0, 1.0, 0.0)):
        config, self.device, dtype = fused.config, fused.device, fused.dtype
        self.fused, self.config, self.slots, self.max_tokens = fused, config, slots, round_up(max_tokens)
        self.temperature, self.filters = temperature, filters
        places = torch.arange(self.max_tokens, device=self.device)[None]
        # Complex numbers, one for each pair of neighbours, (max_tokens, 1, D/2), or cos and sin for halves.
        self.turns, self.act = {}, activation(config)
        for theta in config.ropes:
            cos, sin = (each[0] for each in rotary(config, places, theta))
            self.turns[theta] = [torch.complex(cos, sin)] if fused.pairs else doubled(cos, sin)
        self.ropes = [config.rope(i) for i in range(config.num_hidden_layers)]
        self.scale, self.cap = config.softmax_scale, config.attn_logit_softcapping
        self.by_hand = self.device.type == "cpu" and dtype == torch.float32
        (H, K), D = config.num_heads, config.head_dim
        self.num_heads = H + 2 * K                                          # queries, keys, values

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, device=self.device, dtype=dtype)

        # Keys and values of each layer, (slots, K, size, D). By hand the keys are stored transposed.
        self.sizes, self.cache = cache_sizes(config, self.max_tokens), []
        for size in self.sizes:
            keys = zeros(slots, K, D, size, dtype=dtype).transpose(2, 3) if self.by_hand else \
                zeros(slots, K, size, D, dtype=dtype)
            self.cache.append((keys, zeros(slots, K, size, D, dtype=dtype)))
        # Views of them, (slots, size, K, D).
        self.by_position = [(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in self.cache]
        # Of each slot: its last token, its tokens in the cache, and the tokens sampled.
        self.tokens, self.lengths, self.counts = zeros(slots), zeros(slots), zeros(slots)
        self.uniforms = zeros(slots, max_new_tokens if temperature else 1, dtype=torch.float32)
        self.rows = torch.arange(slots, device=self.device)
        self.keys = torch.arange(self.max_tokens, device=self.device)
        self.looking_at = self.graph = None
        if self.device.type == "cuda":
            self.capture()

    def forward(self, ids, positions, attend, last=None):
        """Logits (N, V) in fp32 of tokens ids (N,) at positions (N,), or only those at the indices `last`.

        attend: (layer, q (N, H, D), k and v (N, K, D)) -> (N, H D).
        """
        c, sizes = self.config, [self.num_heads * self.config.head_dim, *[self.config.intermediate_size] * 2]
        x = scaled(c, self.fused.embed(ids))                                # (N, hidden_size)
        turns = {theta: [each[positions] for each in both] for theta, both in self.turns.items()}
        grown = growth(c, positions)                                        # (N, 1, 1) or None
        for i, layer in enumerate(self.fused.layers):
            h, turned = layer.norms[0](x), turns.get(self.ropes[i])
            if layer.kind == "parallel" and not layer.routed:
                heads, gate, up = layer.project_in(h).split_with_sizes(sizes, -1)
                y = attend(i, *self.heads(layer, heads, turned, grown))
                x = x + layer.project_out(torch.cat((y, self.act(gate).mul_(up)), 1))
                continue
            y = attend(i, *self.heads(layer, layer.qkv(h), turned, grown))
            y = layer.o(layer.weigh(y, h) if layer.weigh else y)
            if layer.kind == "parallel":
                x = x + y + layer.routed(h)
                continue
            h, second = y, layer.norms[-1]
            if layer.kind == "sandwich":
                h, second = layer.norms[1](h), layer.norms[2]
            x = x + h
            if layer.routed:
                h = layer.routed(second(x))
            else:
                gate, up = layer.gate_up(second(x)).chunk(2, -1)
                h = layer.down(self.act(gate).mul_(up))
            x = x + (layer.norms[3](h) if layer.kind == "sandwich" else h)
        x = x if last is None else x[last]
        logits = self.fused.head(self.fused.norm(x)).float().mul_(c.logit_scale)
        return capped(logits, c.final_logit_softcapping)

    def heads(self, layer, heads, turned, grown):
        """q (N, H, D), k and v (N, K, D), normed and rotated, of the projections (N, (H + 2 K) D), which are
        overwritten. turned: the parts of self.turns at the tokens' positions, or None; grown: of growth()."""
        (H, K), D = self.config.num_heads, self.config.head_dim
        heads = heads.view(-1, H + 2 * K, D)                                # queries, keys, values
        qk = heads[:, :H + K]
        if layer.qk_norm:
            qk.copy_(layer.qk_norm(qk))
        if turned and self.fused.pairs:
            # In place if qk is fp32, because float() is then no copy.
            pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))                # (N, H + K, D/2)
            pairs.mul_(turned[0])
            if qk.dtype != torch.float32:
                qk.copy_(torch.view_as_real(pairs).flatten(-2))
        elif turned:
            qk.copy_(rotate_halves(qk.float(), *turned))
        if grown is not None:
            heads[:, :H] *= grown.to(heads.dtype)
        return heads.split_with_sizes((H, K, K), 1)

    @torch.inference_mode()
    def prefill(self, prompts):
        """Logits (P, V) after each prompt (a list of ids), and each layer's keys and values, (P, K, T, D)."""
        H, K = self.config.num_heads
        lengths = [len(prompt) for prompt in prompts]
        P, T = len(prompts), round_up(max(lengths))

        def on_device(array):
            return torch.from_numpy(array).to(self.device)

        ids = on_device(np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts]))       # (N,)
        rows = on_device(np.repeat(np.arange(P), lengths))                  # (N,)
        positions = on_device(np.concatenate([np.arange(n) for n in lengths]))                      # (N,)
        last = on_device(np.cumsum(lengths) - 1)                            # (P,)
        kept, band = [], window_mask(self.config, T, self.device)

        def as_rows(x):
            """(N, H or K, D) -> (P, H or K, T, D)"""
            return x.new_zeros(P, T, *x.shape[1:]).index_put_((rows, positions), x).transpose(1, 2)

        def attend(i, q, k, v):
            q, k, v = as_rows(q), as_rows(k), as_rows(v)
            kept.append((k, v))
            mask = band if self.config.window(i) else None
            if self.cap:
                y = explicit_attention(q, k, v, mask, self.scale, self.cap)
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                   scale=self.scale, enable_gqa=K != H)
            return y.transpose(1, 2)[rows, positions].flatten(1)
        return self.forward(ids, positions, attend, last), kept

    def look_at(self, n, T):
        """Make views of the first T positions of rows 0 .. n-1, unless the last step had the same."""
        if self.looking_at == (n, T):
            return
        self.looking_at, self.views = (n, T), []
        for keys, values in self.cache:
            keys, values = keys[:n, :, :T], values[:n, :, :T]               # (n, K, T or size, D)
            if self.by_hand:
                keys, values = keys.transpose(2, 3).flatten(0, 1), values.flatten(0, 1)     # (n K, ...)
            self.views.append((keys, values))

    def decode(self, n, T):
        """Append one token to rows 0 .. n-1, which attend to the first T positions of the cache. look_at(n,
        T) must come before. Returns tokens (n,) and log-probs (n,) in nats."""
        K, rows = self.config.num_heads[1], self.rows[:n]
        positions = self.lengths[:n].clamp(max=self.max_tokens - 1)         # (n,)
        hidden = self.keys[:T] > positions[:, None]                         # (n, T) keys not yet written
        mask = self.uniforms.new_zeros(n, T).masked_fill_(hidden, float("-inf"))
        mask = mask.to(self.fused.dtype)[:, None]                           # (n, 1, T)
        by_key_head = mask.repeat_interleave(K, 0) if self.by_hand else None        # (n K, 1, T)

        def attend(i, q, k, v):
            """The H/K queries that share a key head become its rows: (n, K, H/K, D)."""
            size = self.sizes[i]
            place = positions if size == self.max_tokens else positions % size
            self.by_position[i][0].index_put_((rows, place), k)
            self.by_position[i][1].index_put_((rows, place), v)
            keys, values = self.views[i]
            if self.by_hand:
                # Two batched products take two fifths of the fused kernel's time on two CPU cores (LOG.md).
                masked = by_key_head if T <= size else by_key_head[..., :size]
                q = q.reshape(n * K, -1, q.shape[-1])
                if self.cap:
                    scores = capped(torch.bmm(q, keys).mul_(self.scale), self.cap) + masked
                else:
                    scores = torch.baddbmm(masked, q, keys, alpha=self.scale)
                return torch.bmm(scores.softmax(-1), values).view(n, -1)
            q, masked = q.unflatten(1, (K, -1)), mask[:, None, :, :size]
            if self.cap:
                scores = capped((q @ keys.transpose(-1, -2)).float() * self.scale, self.cap) + masked
                return (scores.softmax(-1).to(values.dtype) @ values).flatten(1)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=masked,
                                                  scale=self.scale).flatten(1)
        logits = self.forward(self.tokens[:n], positions, attend)
        if self.temperature is None:
            return logits
        uniforms = None
        if self.temperature:
            column = self.counts[:n, None].clamp(max=self.uniforms.shape[1] - 1)
            uniforms = self.uniforms[:n].gather(1, column)[:, 0]            # (n,)
        tokens, logps = choose(logits, uniforms, self.temperature, *self.filters)
        self.append(n, tokens)
        return tokens, logps

    def append(self, n, tokens):
        """Append tokens (n,) to rows 0 .. n-1, of which the next step computes the keys and values."""
        self.tokens[:n] = tokens
        self.lengths[:n] += 1
        self.counts[:n] += 1

    def capture(self):
        """Record one step of all slots over the whole cache as a CUDA graph. Its shapes never change, so
        nothing is recorded again. Compiled, the step would be slower: Inductor copies what is written into
        the cache (LOG.md)."""
        self.look_at(self.slots, self.max_tokens)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.decode(self.slots, self.max_tokens)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = self.decode(self.slots, self.max_tokens)
        self.graph = graph

    def step(self, n, longest):
        """Decode one token of rows 0 .. n-1. Returns lists of n tokens and n log-probs in nats; without a
        temperature logits (n, V), which the caller may overwrite.

        longest: the tokens of the longest row, the new one included."""
        if self.graph:
            self.graph.replay()
            made = self.output
        else:
            T = min(round_up(longest), self.max_tokens)
            self.fused.patience.begin()
            with torch.inference_mode():
                self.look_at(n, T)
                made = self.decode(n, T)
            self.fused.patience.end()
        if self.temperature is None:
            return made[:n]
        tokens, logps = made
        return tokens[:n].tolist(), logps[:n].tolist()

    def place(self, slot, row, kept, p):
        """Copy a prefilled row into a slot. Its keys and values are row p of `kept`."""
        length = row.length - 1
        for layer, new in zip(self.cache, kept):
            for cache, tensor in zip(layer, new):
                size = cache.shape[2]
                if length <= size:
                    cache[slot, :, :length] = tensor[p, :, :length]
                else:
                    # The last `size` positions, each at its place in the ring.
                    positions = torch.arange(length - size, length, device=self.device)
                    cache[slot, :, positions % size] = tensor[p, :, positions]
        self.tokens[slot] = row.ids[-1]
        self.lengths[slot], self.counts[slot] = length, len(row.ids)
        if self.temperature:
            self.uniforms[slot, :len(row.uniforms)] = torch.from_numpy(row.uniforms)

    def move(self, source, target, length):
        """Copy a slot of `length` tokens over another one."""
        for size, (keys, values) in zip(self.sizes, self.cache):
            used = slice(min(length, size))
            keys[target, :, used], values[target, :, used] = keys[source, :, used], values[source, :, used]
        for tensor in (self.tokens, self.lengths, self.counts, self.uniforms):
            tensor[target] = tensor[source]
