"""The engine of sampling for an encoder-decoder: sampling.complete and the server's batch call it as they
call engine.Engine.

A prompt is encoded once, and each decoder layer's cross keys and values are computed once for all samples of
it. A row of the batch then has two caches: its prompt's cross keys and values, which do not change, and those
of its own tokens. Both run over a multiple of BLOCK keys, so that on a CPU in fp32 no bit depends on the
other rows. P prompts, B or n rows, N tokens, H heads, D head width, S source tokens, T keys, V vocabulary.

Known gap: on a GPU a step is not recorded as a CUDA graph, and launches its kernels one by one.
"""

import numpy as np
import torch
import torch.nn.functional as F

from .encoder_decoder import ACTIVATIONS, buckets, distance_bias
from .engine import choose, round_up
from .fused import can_pack, multiplier, rms_normalizer
from .patience import Patience


class FusedPart:
    """The products of a block's attention and MLP that read the same input, joined."""

    def __init__(self, attention, mlp, pack):
        def joined(*projections):
            return multiplier(torch.cat([p.weight.detach() for p in projections]), pack)
        self.qkv, self.o = joined(attention.q, attention.k, attention.v), joined(attention.o)
        wide = (mlp.wi_0, mlp.wi_1) if hasattr(mlp, "wi_0") else (mlp.wi,)
        self.wi, self.wo, self.is_gated = joined(*wide), joined(mlp.wo), len(wide) == 2
        self.joined = joined


class FusedBlock(FusedPart):
    """A block of the encoder, or of the decoder with its cross-attention, as the engine reads it."""

    def __init__(self, block, config, pack):
        parts = block.layer
        super().__init__(parts[0].SelfAttention, parts[-1].DenseReluDense, pack)
        self.norms = [rms_normalizer(part.layer_norm.weight.detach(), config.layer_norm_epsilon)
                      for part in parts]
        self.act = ACTIVATIONS[config.activation]
        if len(parts) == 3:
            cross = parts[1].EncDecAttention
            self.cross_q, self.cross_o = self.joined(cross.q), self.joined(cross.o)
            self.cross_kv = self.joined(cross.k, cross.v)

    def mlp(self, x):
        h = self.wi(self.norms[-1](x))
        if not self.is_gated:
            return self.wo(self.act(h))
        gate, up = h.chunk(2, -1)
        return self.wo(self.act(gate).mul_(up))


class FusedEncoderDecoder:
    """The weights of a plain model as the engine reads them (fused.Fused): must be made again when they have
    changed."""

    def __init__(self, model):
        c, parameters = model.config, list(model.parameters())
        self.config, self.device, self.dtype = c, parameters[0].device, parameters[0].dtype
        pack = can_pack(self.device, self.dtype, sum(p.nbytes for p in parameters))
        self.patience, self.embed = Patience(self.device), model.shared.forward
        self.encoder, self.decoder = ([FusedBlock(block, c, pack) for block in stack.block]
                                      for stack in (model.encoder, model.decoder))
        eps = c.layer_norm_epsilon
        self.encoder_norm = rms_normalizer(model.encoder.final_layer_norm.weight.detach(), eps)
        last = model.decoder.final_layer_norm.weight.detach() * c.output_scale
        self.decoder_norm = rms_normalizer(last, eps)
        self.head = multiplier(model.head_weight.detach(), pack)
        self.encoder_tables, self.decoder_tables = (
            [table.weight.detach() for block in stack.block
             if (table := getattr(block.layer[0].SelfAttention, "relative_attention_bias", None)) is not None]
            for stack in (model.encoder, model.decoder))


class Cache:
    """Keys, transposed, and values of one layer: (slots, H, D, size) and (slots, H, size, D)."""

    def __init__(self, config, slots, dtype, device):
        self.shape, self.dtype, self.device = (slots, config.num_heads, config.d_kv), dtype, device
        self.size = 0
        self.keys, self.values = self.made(0)

    def made(self, size):
        slots, H, D = self.shape
        return (torch.zeros(shape, dtype=self.dtype, device=self.device)
                for shape in ((slots, H, D, size), (slots, H, size, D)))

    def reach(self, num_tokens, most=0):
        """Make room for that many tokens a row; twice as many as before, up to `most`."""
        if num_tokens > self.size:
            size = round_up(max(num_tokens, min(2 * self.size, most)))
            keys, values = self.made(size)
            keys[..., :self.size], values[:, :, :self.size] = self.keys, self.values
            self.keys, self.values, self.size = keys, values, size

    def first(self, n, T):
        """Views of the first T tokens of rows 0 .. n-1: (n H, D, T) and (n H, T, D)."""
        return self.keys[:n, ..., :T].flatten(0, 1), self.values[:n, :, :T].flatten(0, 1)

    def move(self, source, target, num_tokens):
        self.keys[target, ..., :num_tokens] = self.keys[source, ..., :num_tokens]
        self.values[target, :, :num_tokens] = self.values[source, :, :num_tokens]


class EncoderDecoderEngine:
    """`slots` rows, of max_tokens tokens of prompt and answer each. Arguments and methods are those of
    engine.Engine; the caches grow as rows need them."""

    def __init__(self, fused, slots, max_tokens, max_new_tokens, temperature=1.0, filters=(0, 1.0, 0.0)):
        c, self.device, dtype = fused.config, fused.device, fused.dtype
        self.fused, self.config, self.slots, self.max_tokens = fused, c, slots, round_up(max_tokens)
        self.temperature, self.filters, self.dtype = temperature, filters, dtype
        self.max_new_tokens = max_new_tokens
        self.own, self.cross = (
            [Cache(c, slots, dtype, self.device) for _ in fused.decoder] for _ in range(2))
        self.tokens, self.counts, self.source_lengths = (
            torch.zeros(slots, dtype=torch.long, device=self.device) for _ in range(3))
        self.uniforms = torch.zeros(slots, max_new_tokens if temperature else 1, device=self.device)
        self.rows, self.far = torch.arange(slots, device=self.device), {}
        # The same numbers of each slot, where Python asks for them.
        self.made, self.sources = [0] * slots, [0] * slots
        self.looking_at = None

    # ---- prefill ----

    @torch.inference_mode()
    def prefill(self, prompts):
        """Logits (P, V) of the first token of each prompt's answer, and for each decoder layer the cross keys
        (P, H, D, S) and values (P, H, S, D), and the keys and values (P, H, D) of the start token."""
        c, lengths = self.config, [len(prompt) for prompt in prompts]
        H, D, P, T = c.num_heads, c.d_kv, len(prompts), round_up(max(lengths))

        def on_device(array):
            return torch.from_numpy(array).to(self.device)
        ids = on_device(np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts]))       # (N,)
        rows = on_device(np.repeat(np.arange(P), lengths))
        places = on_device(np.concatenate([np.arange(n) for n in lengths]))
        hidden = torch.arange(T, device=self.device) >= on_device(np.array(lengths))[:, None]       # (P, T)
        masked = torch.zeros(P, 1, 1, T, device=self.device, dtype=self.dtype)
        masked.masked_fill_(hidden[:, None, None], float("-inf"))

        def as_rows(x):
            """(N, ...) -> (P, T, ...)"""
            return x.new_zeros(P, T, *x.shape[1:]).index_put_((rows, places), x)
        biases = [distance_bias(table, T, c, True)[None] + masked for table in self.fused.encoder_tables]
        x = self.fused.embed(ids)                                           # (N, d_model)
        for i, layer in enumerate(self.fused.encoder):
            q, k, v = as_rows(layer.qkv(layer.norms[0](x)).view(-1, 3, H, D)).permute(2, 0, 3, 1, 4)
            bias = biases[min(i, len(biases) - 1)]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)      # (P, H, T, D)
            x = x + layer.o(y.transpose(1, 2)[rows, places].flatten(1))
            x = x + layer.mlp(x)
        states = self.fused.encoder_norm(x)
        kept, masked = [], masked.expand(P, H, 1, T).reshape(P * H, 1, T)
        x = self.fused.embed(torch.full((P,), c.decoder_start_token_id, device=self.device))
        for layer in self.fused.decoder:
            k, v = as_rows(layer.cross_kv(states).view(-1, 2, H, D)).permute(2, 0, 3, 1, 4)
            _, own_k, own_v = layer.qkv(layer.norms[0](x)).view(P, 3, H, D).unbind(1)
            kept.append((k.transpose(2, 3).contiguous(), v.contiguous(), own_k, own_v))
            x = x + layer.o(own_v.flatten(1))               # a token that sees itself alone
            x = self.rest(layer, x, masked, kept[-1][0].flatten(0, 1), kept[-1][1].flatten(0, 1))
        return self.logits(x), kept

    def rest(self, layer, x, masked, keys, values):
        """Cross-attention and MLP of a decoder layer. x (n, d_model), masked (n H, 1, S), keys (n H, D, S),
        values (n H, S, D) -> as x."""
        q = layer.cross_q(layer.norms[1](x)).view(-1, 1, self.config.d_kv)
        x = x + layer.cross_o(self.attend(q, masked, keys, values))
        return x + layer.mlp(x)

    def attend(self, q, masked, keys, values):
        """(n H, 1, D), what is added to the scores, keys and values -> (n, H D)"""
        scores = torch.baddbmm(masked, q, keys)
        probs = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(probs, values).view(len(q) // self.config.num_heads, -1)

    def logits(self, x):
        return self.fused.head(self.fused.decoder_norm(x)).float()

    # ---- decode ----

    def distances(self, T):
        """For each table (H, T + 1) the bias of a key 0, 1, ... T - 1 tokens before the query, and -inf for
        one after it."""
        if T not in self.far:
            c = self.config
            index = buckets(-torch.arange(T, device=self.device), False, c.relative_attention_num_buckets,
                            c.relative_attention_max_distance)
            self.far = {T: [F.pad(table[index].t(), (0, 1), value=float("-inf"))
                            for table in self.fused.decoder_tables]}
        return self.far[T]

    def look_at(self, n, T, S):
        """Make views and the mask of the sources, unless the last step had the same."""
        if self.looking_at == (n, T, S):
            return
        H = self.config.num_heads
        self.looking_at = n, T, S
        self.views = [(own.first(n, T), cross.first(n, S)) for own, cross in zip(self.own, self.cross)]
        hidden = torch.arange(S, device=self.device) >= self.source_lengths[:n, None]       # (n, S)
        masked = torch.zeros(n, S, device=self.device, dtype=self.dtype).masked_fill_(hidden, float("-inf"))
        self.masked = masked[:, None].expand(n, H, S).reshape(n * H, 1, S)
        # Where the key of a token of each row is written: keys (slots, size, H, D), values the same.
        self.by_place = [(own.keys.permute(0, 3, 1, 2), own.values.transpose(1, 2)) for own in self.own]

    def decode(self, n, T):
        """Append one token to rows 0 .. n-1. Returns tokens (n,) and log-probs (n,) in nats."""
        H, D = self.config.num_heads, self.config.d_kv
        rows, places = self.rows[:n], self.counts[:n]
        distance = places[:, None] - torch.arange(T, device=self.device)    # (n, T)
        index = distance.where(distance >= 0, T)[:, None].expand(n, H, T)
        biases = [far.expand(n, H, T + 1).gather(2, index).view(n * H, 1, T) for far in self.distances(T)]
        x = self.fused.embed(self.tokens[:n])                               # (n, d_model)
        for i, layer in enumerate(self.fused.decoder):
            q, k, v = layer.qkv(layer.norms[0](x)).view(n, 3, H, D).unbind(1)
            keys, values = self.by_place[i]
            keys.index_put_((rows, places), k)
            values.index_put_((rows, places), v)
            own, cross = self.views[i]
            y = self.attend(q.reshape(n * H, 1, D), biases[min(i, len(biases) - 1)], *own)
            x = self.rest(layer, x + layer.o(y), self.masked, *cross)
        logits = self.logits(x)
        if self.temperature is None:
            return logits
        uniforms = None
        if self.temperature:
            column = places[:, None].clamp(max=self.uniforms.shape[1] - 1)
            uniforms = self.uniforms[:n].gather(1, column)[:, 0]
        tokens, logps = choose(logits, uniforms, self.temperature, *self.filters)
        self.append(n, tokens)
        return tokens, logps

    def append(self, n, tokens):
        """Append tokens (n,) to rows 0 .. n-1, of which the next step computes the keys and values."""
        self.tokens[:n] = tokens
        self.counts[:n] += 1
        self.made[:n] = [made + 1 for made in self.made[:n]]

    def step(self, n, longest):
        """As engine.Engine.step; `longest` is not needed, because prompts and answers are kept apart."""
        T, S = round_up(max(self.made[:n]) + 1), round_up(max(self.sources[:n]))
        if T > self.own[0].size:
            self.looking_at = None
        for cache in self.own:
            cache.reach(T, self.max_new_tokens)
        self.fused.patience.begin()
        with torch.inference_mode():
            self.look_at(n, T, S)
            made = self.decode(n, T)
        self.fused.patience.end()
        if self.temperature is None:
            return made
        tokens, logps = made
        return tokens.tolist(), logps.tolist()

    # ---- rows ----

    def place(self, slot, row, kept, p):
        """Copy a prefilled row into a slot: row p of `kept`."""
        length, self.looking_at = row.length - len(row.ids), None
        for own, cross, (keys, values, own_k, own_v) in zip(self.own, self.cross, kept):
            cross.reach(length)
            own.reach(1)
            cross.keys[slot, ..., :length] = keys[p, ..., :length]
            cross.values[slot, :, :length] = values[p, :, :length]
            own.keys[slot, ..., 0], own.values[slot, :, 0] = own_k[p], own_v[p]
        self.tokens[slot], self.counts[slot], self.source_lengths[slot] = row.ids[-1], len(row.ids), length
        self.made[slot], self.sources[slot] = len(row.ids), length
        if self.temperature:
            self.uniforms[slot, :len(row.uniforms)] = torch.from_numpy(row.uniforms)

    def move(self, source, target, length):
        """Copy a slot over another one. length: its tokens, which it knows itself."""
        self.looking_at = None
        for own, cross in zip(self.own, self.cross):
            own.move(source, target, self.made[source])
            cross.move(source, target, self.sources[source])
        for each in (self.tokens, self.counts, self.source_lengths, self.uniforms, self.made, self.sources):
            each[target] = each[source]
