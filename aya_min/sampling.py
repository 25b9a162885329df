"""Sampling: logits to token, prefill and decode on a static KV cache, and the engine that keeps a batch full (continuous batching).

A finished row is replaced by a waiting prompt at once; k samples of one prompt share its prefill. What a request produces does not depend
on what else is in the batch: its random numbers come from (seed, request number), its cache row is its own, and attention always runs over
a multiple of BLOCK keys, so that on the CPU in fp32 even the last bit of a log-prob is the same in any company (tests/test_sampling.py).
"""

import math
from collections import deque, namedtuple
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from . import command, distributed
from .lengths import cut_left as shorten
from .linear import packed
from .model import rotary, window_mask
from .patience import Patience

Completion = namedtuple("Completion", "ids logp finish_reason")     # ids end with the stop token if finish_reason is "stop"; logp: nats, of all ids
BLOCK = 32                  # keys: attention kernels sum in vectors and blocks; over whole ones, masked keys change nothing
PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}     # padded tokens that are prefilled together; more leave the CPU's caches (LOG.md)
LEAST_TEMPERATURE = 1e-6    # logits of some thousands, divided by it, are far from the end of fp32
PACK_BYTES = 4e9            # on the CPU, models up to this size are kept a second time in oneDNN's own layout


# ---- logits to token ---------------------------------------------------------------------------------------------------------------

def filtered(logits, top_k, top_p, min_p):
    """Logits (B, V) with what top-k, top-p (nucleus) and min-p leave out set to -inf. 0, 1.0 and 0.0 switch them off."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        drop = (probs.cumsum(-1) - probs >= top_p).scatter(1, order, probs.cumsum(-1) - probs >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    if min_p > 0.0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), float("-inf"))
    return logits


def choose(logits, uniforms, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Next tokens (B,) and their log-probs (B,) at this temperature, before any filter. Greedy at temperature 0 (log-probs at 1).

    logits (B, V) in fp32 may be overwritten; uniforms (B,) in [0, 1): the inverse of the cumulative distribution, so one number per row decides.
    """
    if temperature == 0:
        top, tokens = logits.max(-1)                                                            # (B,) twice
        return tokens, -logits.sub_(top[:, None]).exp_().sum(-1).log()
    if temperature != 1:
        logits /= temperature
    probs = logits.softmax(-1)                                                                  # (B, V)
    kept = probs if (top_k, top_p, min_p) == (0, 1.0, 0.0) else filtered(logits, top_k, top_p, min_p).softmax(-1)
    cumulative = kept.cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniforms[:, None].to(cumulative) * cumulative[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def check_sampling(temperature, top_k, top_p, min_p):
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature} must be 0 (greedy) or at least {LEAST_TEMPERATURE}: "
                         "logits divided by less leave the range of fp32")
    if not top_k >= 0:
        raise ValueError(f"top-k {top_k} must be at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p {top_p} must be above 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min-p {min_p} must be at least 0 and at most 1")


# ---- the engine --------------------------------------------------------------------------------------------------------------------

def round_up(n, multiple=BLOCK):
    return -(-n // multiple) * multiple


def product(weight, pack):
    """x -> x W^T."""
    return packed(weight) if pack else lambda x: F.linear(x, weight)


def join(projections, dim, pack):
    """Projections that read the same input (dim 0), or whose outputs are added (dim 1), as one product. Unpacked, the parameters become
    views of the joined matrix, so that nothing is held twice."""
    joined = torch.cat([p.weight.detach() for p in projections], dim)
    if not pack:
        for p, part in zip(projections, joined.split([p.weight.shape[dim] for p in projections], dim)):
            p.weight.data = part
    return product(joined, pack)


class Fused:
    """The weights of a plain model as the engine reads them. Made once for many calls; one made before the weights changed may be out of date.

    In the parallel block q, k, v, gate and up read the same normed input, and o and down are added: two matmuls a layer.
    """

    def __init__(self, model):
        parameters = list(model.parameters())
        self.config, self.device, self.dtype = model.config, parameters[0].device, parameters[0].dtype
        pack = self.device.type == "cpu" and sum(p.nbytes for p in parameters) <= PACK_BYTES and torch.backends.mkldnn.is_available() and (
            self.dtype == torch.float32 or self.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self.patience = Patience(self.device)
        self.layers = []
        for block in model.model.layers:
            a, m = block.self_attn, block.mlp
            norms = [n.weight.detach() for n in ([a.q_norm, a.k_norm] if self.config.use_qk_norm else [])]
            self.layers.append((block.input_layernorm.weight.detach(), norms, join([a.q_proj, a.k_proj, a.v_proj, m.gate_proj, m.up_proj], 0, pack),
                                join([a.o_proj, m.down_proj], 1, pack)))
        self.embedding, self.norm, self.head = model.model.embed_tokens.weight.detach(), model.model.norm.weight.detach(), product(model.head_weight.detach(), pack)


class Engine:
    """A static KV cache of `slots` rows with room for `max_tokens` tokens each, and the two forwards that fill it and go on from it.

    Rows 0 .. n-1 are in use. Layers with a sliding window keep a ring of that many positions. The same mathematics as model.py, without padding:
    tokens of all rows stand in one line (N,), only attention sees them as rows.
    """

    def __init__(self, fused, slots, max_tokens, max_new_tokens, temperature=1.0, filters=(0, 1.0, 0.0)):
        config, self.slots, self.max_tokens, self.temperature, self.filters = fused.config, slots, round_up(max_tokens), temperature, filters
        self.fused, self.config, self.device, dtype = fused, config, fused.device, fused.dtype
        cos, sin = rotary(config, torch.arange(self.max_tokens, device=self.device)[None])
        self.turns = torch.complex(cos[0], sin[0])                          # (max_tokens, 1, D/2): an interleaved pair is a complex number
        self.by_hand = self.device.type == "cpu" and dtype == torch.float32
        K, D, new = config.num_key_value_heads, config.head_dim, lambda *shape: torch.zeros(shape, device=self.device, dtype=dtype)
        self.cache = [(new(slots, K, D, size).transpose(2, 3) if self.by_hand else new(slots, K, size, D), new(slots, K, size, D))
                      for size in cache_sizes(config, self.max_tokens)]                         # keys, values of each layer: (slots, K, size, D)
        self.by_position = [(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in self.cache]      # views, (slots, size, K, D) each
        zeros = lambda *shape, dtype=torch.long: torch.zeros(shape, device=self.device, dtype=dtype)
        self.tokens, self.lengths, self.counts = zeros(slots), zeros(slots), zeros(slots)       # last token, tokens in the cache, tokens sampled
        self.uniforms = zeros(slots, max_new_tokens if temperature else 1, dtype=torch.float32)
        self.sizes, self.looking_at = cache_sizes(config, self.max_tokens), None
        self.rows, self.keys, self.graph = torch.arange(slots, device=self.device), torch.arange(self.max_tokens, device=self.device), None
        if self.device.type == "cuda":
            self.capture()

    def forward(self, ids, positions, attend, last=None):
        """Logits (N, V) in fp32 of tokens ids (N,) at positions (N,), or those at the indices `last`. attend(layer, q (N, H, D), k, v (N, K, D)) -> (N, H D)."""
        c = self.config
        H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        x, turns = F.embedding(ids, self.fused.embedding), self.turns[positions]                      # (N, hidden), (N, 1, D/2)
        for i, (norm, qk_norms, project_in, project_out) in enumerate(self.fused.layers):
            h = F.layer_norm(x, x.shape[-1:], norm, None, c.layer_norm_eps)
            heads, gate, up = project_in(h).split_with_sizes([(H + 2 * K) * D, c.intermediate_size, c.intermediate_size], -1)
            heads = heads.view(-1, H + 2 * K, D)                                                # queries, keys, values
            qk = heads[:, :H + K]
            if qk_norms:
                qk.copy_(F.layer_norm(qk.float(), (D,), eps=c.layer_norm_eps) * torch.cat(qk_norms).float())
            if c.has_rope(i):
                pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2))).mul_(turns)    # (N, H + K, D/2); in place when qk is fp32
                if qk.dtype != torch.float32:
                    qk.copy_(torch.view_as_real(pairs).flatten(-2))
            q, k, v = heads.split_with_sizes((H, K, K), 1)
            x = x + project_out(torch.cat((attend(i, q, k, v), F.silu(gate).mul_(up)), 1))
        x = F.layer_norm(x if last is None else x[last], x.shape[-1:], self.fused.norm, None, c.layer_norm_eps)
        return self.fused.head(x).float().mul_(c.logit_scale)

    @torch.inference_mode()
    def prefill(self, prompts):
        """Logits (P, V) after each prompt (lists of ids), and for each layer their keys and values, (P, K, T, D) each."""
        H, K, lengths = self.config.num_attention_heads, self.config.num_key_value_heads, [len(p) for p in prompts]
        P, T = len(prompts), round_up(max(lengths))
        to = lambda array: torch.from_numpy(array).to(self.device)
        ids, rows = to(np.concatenate([np.asarray(p, np.int64) for p in prompts])), to(np.repeat(np.arange(P), lengths))
        positions, last = to(np.concatenate([np.arange(n) for n in lengths])), to(np.cumsum(lengths) - 1)
        kept, band = [], window_mask(self.config, T, self.device)

        def attend(i, q, k, v):
            q, k, v = (x.new_zeros(P, T, *x.shape[1:]).index_put_((rows, positions), x).transpose(1, 2) for x in (q, k, v))    # (P, H or K, T, D)
            kept.append((k, v))
            mask = band if self.config.window(i) else None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=K != H)
            return y.transpose(1, 2)[rows, positions].flatten(1)
        return self.forward(ids, positions, attend, last), kept

    def look_at(self, n, T):
        """Make views of the first T positions of rows 0 .. n-1, unless the step before had the same."""
        if self.looking_at != (n, T):
            self.looking_at, self.views = (n, T), []
            for keys, values in self.cache:
                keys, values = keys[:n, :, :T], values[:n, :, :T]                               # (n, K, T or size, D)
                self.views.append((keys, values, keys.transpose(2, 3).flatten(0, 1) if self.by_hand else None, values.flatten(0, 1) if self.by_hand else None))

    def decode(self, n, T):
        """One token more for rows 0 .. n-1, attending to the first T positions of the cache, as look_at(n, T) has them:
        tokens (n,), log-probs (n,)."""
        K, D, rows, positions = self.config.num_key_value_heads, self.config.head_dim, self.rows[:n], self.lengths[:n].clamp(max=self.max_tokens - 1)
        mask = self.uniforms.new_zeros(n, T).masked_fill_(self.keys[:T] > positions[:, None], float("-inf")).to(self.fused.dtype)[:, None]   # (n, 1, T)
        by_key_head = mask.repeat_interleave(K, 0) if self.by_hand else None                    # (n K, 1, T)

        def attend(i, q, k, v):
            """The H/K queries that share a key head stand as its rows: (n, K, H/K, D)."""
            keys, values, flat_keys, flat_values = self.views[i]
            size = self.sizes[i]
            place = positions if size == self.max_tokens else positions % size                  # a window is a ring: position p lies at p mod size
            self.by_position[i][0].index_put_((rows, place), k)
            self.by_position[i][1].index_put_((rows, place), v)
            if self.by_hand:                                                                    # 2.5 times as fast as the fused kernel on two CPU cores
                scores = torch.baddbmm(by_key_head if T <= size else by_key_head[..., :size], q.reshape(n * K, -1, D), flat_keys, alpha=D ** -0.5)
                return torch.bmm(scores.softmax(-1), flat_values).view(n, -1)
            return F.scaled_dot_product_attention(q.unflatten(1, (K, -1)), keys, values, attn_mask=mask[:, None, :, :size]).flatten(1)
        logits = self.forward(self.tokens[:n], positions, attend)
        uniforms = self.uniforms[:n].gather(1, self.counts[:n, None].clamp(max=self.uniforms.shape[1] - 1))[:, 0] if self.temperature else None
        tokens, logps = choose(logits, uniforms, self.temperature, *self.filters)
        self.tokens[:n] = tokens
        self.lengths[:n] += 1
        self.counts[:n] += 1
        return tokens, logps

    def capture(self):
        """Record one step of all the slots over the whole cache as a CUDA graph: shapes never change, so nothing is compiled or recorded again."""
        self.look_at(self.slots, self.max_tokens)
        step = torch.compile(self.decode, dynamic=False)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(self.slots, self.max_tokens)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = step(self.slots, self.max_tokens)
        self.graph = graph

    def step(self, n, longest):
        """Lists of n tokens and n log-probs; `longest` is the number of tokens of the longest row, the new one included."""
        if self.graph:
            self.graph.replay()
            tokens, logps = (t[:n] for t in self.output)
        else:
            T = min(round_up(longest), self.max_tokens)
            self.fused.patience.begin()
            with torch.inference_mode():                                                        # lighter than no_grad, but not for torch.compile
                self.look_at(n, T)
                tokens, logps = self.decode(n, T)
            self.fused.patience.end()
        return tokens.tolist(), logps.tolist()

    def place(self, slot, row, kept, p):
        """Put a prefilled row, whose keys and values are row p of `kept`, into a slot."""
        length = row.length - 1
        for layer, new in zip(self.cache, kept):
            for cache, tensor in zip(layer, new):
                size = cache.shape[2]
                if length <= size:
                    cache[slot, :, :length] = tensor[p, :, :length]
                else:                                                                           # the last `size` positions, each at its place in the ring
                    positions = torch.arange(length - size, length, device=self.device)
                    cache[slot, :, positions % size] = tensor[p, :, positions]
        self.tokens[slot], self.lengths[slot], self.counts[slot] = row.ids[-1], length, len(row.ids)
        if self.temperature:
            self.uniforms[slot, :len(row.uniforms)] = torch.from_numpy(row.uniforms)

    def move(self, source, target):
        """Copy a slot to another."""
        for tensor in (*sum(self.cache, ()), self.tokens, self.lengths, self.counts, self.uniforms):
            tensor[target] = tensor[source]


@dataclass
class Row:
    """One request as it grows."""
    prompt: int                     # index of its prompt
    sample: int
    length: int                     # tokens of prompt and answer
    limit: int                      # tokens that the answer may have
    uniforms: np.ndarray            # (limit,) in [0, 1), or None when greedy
    ids: list = field(default_factory=list)
    logp: float = 0.0
    finish_reason: str = None

    def add(self, token, logp, stop_ids, stopped):
        """Append a token; True if the row has ended. stopped(ids) says whether a stop string has come."""
        self.ids.append(token)
        self.length += 1
        self.logp += logp
        if token in stop_ids or stopped and stopped(self.ids):
            self.finish_reason = "stop"
        elif len(self.ids) == self.limit:
            self.finish_reason = "length"
        return self.finish_reason is not None


def run(engine, prompts, limits, num_samples, numbers, seed, stop_ids, stopped, fault=None):
    """Decode all prompts; a generator that yields, after each step, (rows that go on, rows that have just ended).

    Prompts with the most to do go first, so that the batch stays full to the end. A group of prompts is
    prefilled ahead when a slot is free and no prefilled row waits. fault(prompt, step, what): the error to
    raise where logits or a log-prob are not finite.
    """
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-limits[i], -len(prompts[i]))))
    ready, rows = deque(), []                                                                   # (row, kept, its row in kept); row in slot i

    def uniforms(request, limit):
        return np.random.default_rng([seed, request]).random(limit, np.float32) if engine.temperature else None

    def prefill_some():
        """Prefill the next prompts and choose the first token of each of their samples. Returns the rows that this ends."""
        group = [waiting.popleft()]
        while waiting and (len(group) + 1) * round_up(max(len(prompts[i]) for i in (*group, waiting[0]))) <= PREFILL_TOKENS[engine.device.type]:
            group.append(waiting.popleft())
        logits, kept = engine.prefill([prompts[i] for i in group])
        made = [(Row(i, s, len(prompts[i]), limits[i], uniforms(numbers[i] * num_samples + s, limits[i])), p) for p, i in enumerate(group) for s in range(num_samples)]
        first = torch.tensor([row.uniforms[0] for row, _ in made], device=engine.device) if engine.temperature else None
        finite = logits.isfinite().all(-1).tolist()
        tokens, logps = choose(logits.repeat_interleave(num_samples, 0), first, engine.temperature, *engine.filters)
        for (row, p), logp in zip(made, logps.tolist()):
            if fault and not (finite[p] and math.isfinite(logp)):
                raise fault(row.prompt, 0, "the logits")
        ended = []
        for (row, p), token, logp in zip(made, tokens.tolist(), logps.tolist()):
            ended.append(row) if row.add(token, logp, stop_ids, stopped) else ready.append((row, kept, p))
        return ended

    while waiting or ready or rows:
        ended = []
        while len(rows) < engine.slots and (ready or waiting):
            if not ready:
                ended += prefill_some()
            while ready and len(rows) < engine.slots:
                row, kept, p = ready.popleft()
                engine.place(len(rows), row, kept, p)
                rows.append(row)
        if ended or not rows:
            yield rows, ended
            continue
        tokens, logps = engine.step(len(rows), max(row.length for row in rows))
        if fault and not math.isfinite(sum(logps)):
            slot = next(i for i, logp in enumerate(logps) if not math.isfinite(logp))
            raise fault(rows[slot].prompt, len(rows[slot].ids), "the log-prob")
        gone = [slot for slot, (row, token, logp) in enumerate(zip(rows, tokens, logps)) if row.add(token, logp, stop_ids, stopped)]
        ended = [rows[slot] for slot in gone]
        for slot in reversed(gone):                                                             # the last row moves into the hole
            if slot < len(rows) - 1:
                engine.move(len(rows) - 1, slot)
                rows[slot] = rows[-1]
            rows.pop()
        yield rows, ended


# ---- many prompts ------------------------------------------------------------------------------------------------------------------

def cache_sizes(config, max_tokens):
    """Positions that each layer keeps: all of them, or its sliding window."""
    return [min(max_tokens, config.window(i) or max_tokens) for i in range(config.num_hidden_layers)]


def free_bytes(device):
    """Memory that is free on a device; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except OSError:
        return None


def check_lengths(config, lengths, limits, places=None):
    """Refuse prompts that leave no room for their answers within the positions that the model knows."""
    for i, (length, limit) in enumerate(zip(lengths, limits)):
        if length + limit > config.max_position_embeddings:
            place = places[i] if places else f"prompt {i}"
            raise ValueError(f"{place} has {length} tokens; with {limit} new ones it passes the model's "
                             f"{config.max_position_embeddings}; shorten it or lower --max-new-tokens")


def not_finite(model, name, places=None):
    """fault(prompt, step, what) of `run`: an error that names the model, the prompt, the step and, where one
    is to blame, the parameter."""
    def fault(prompt, step, what):
        place = places[prompt] if places else f"prompt {prompt}"
        about = distributed.blame(model) if isinstance(model, torch.nn.Module) else ""
        verb = "are" if what.endswith("s") else "is"
        return ValueError(f"{name}: {what} of new token {step + 1} of {place} {verb} not finite{about}")
    return fault


def plan(config, lengths, limits, num_samples, batch_size, device="cpu", dtype=torch.float32):
    """(slots, tokens of a slot, bytes of the KV cache) for prompts of these lengths with at most these numbers of new tokens. Refuses, before
    anything runs, a prompt that passes the positions which the model knows, and a cache that does not fit the free memory."""
    check_lengths(config, lengths, limits)
    slots, max_tokens = min(batch_size, len(lengths) * num_samples), round_up(max(map(sum, zip(lengths, limits)), default=0))
    per_token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    prefilled = max(PREFILL_TOKENS[torch.device(device).type], round_up(max(lengths, default=0))) * config.num_hidden_layers * per_token
    per_slot, free = sum(cache_sizes(config, max_tokens)) * per_token, free_bytes(device)
    if free is not None and slots * per_slot + prefilled > free:
        most = int((free - prefilled) // per_slot)
        raise ValueError(f"the KV cache of {slots} rows of {max_tokens} tokens needs {(slots * per_slot + prefilled) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                         + (f"lower --batch-size to {most} or less" if most > 0 else "shorten the prompts or lower --max-new-tokens"))
    return slots, max_tokens, slots * per_slot


def check_counts(prompts, limits, num_samples, batch_size, seed):
    for what, least, number in [
            ("num_samples", 1, num_samples), ("batch_size", 1, batch_size), ("seed", 0, seed),
            *(("max_new_tokens", 1, limit) for limit in limits)]:
        if number < least:
            raise ValueError(f"{what} {number} must be at least {least}")
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompt {empty[0]} has no tokens; give each at least one")


def stop_test(stop_strings, decode):
    """stopped(ids): has one of the strings come at the end of what ids say? Only as many tokens are decoded
    as the longest string has bytes, and a few."""
    if not stop_strings:
        return None
    if isinstance(stop_strings, str) or not all(isinstance(s, str) and s for s in stop_strings):
        raise ValueError(f"the stop strings {stop_strings!r} must be a list of texts, none of them empty")
    tail = max(len(s.encode()) for s in stop_strings) + 4
    return lambda ids: any(s in decode(ids[-tail:]) for s in stop_strings)


@torch.no_grad()
def generate(model, prompts, num_samples=1, max_new_tokens=64, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stop_ids=(), stop_strings=(), decode=None,
             seed=0, batch_size=256, numbers=None, progress=None, on_done=None, on_ready=None,
             name="the model", places=None):
    """Completions of many prompts by a plain (never a sharded) model, or its Fused weights: a list of num_samples Completions for each prompt.

    prompts: lists of ids. max_new_tokens: a number, or one for each prompt. stop_strings need decode(ids) -> text.
    numbers: the request number of each prompt (default its index), which with `seed` fixes its random numbers. batch_size: rows decoded together.
    progress: text of a tqdm bar on rank 0, or None. on_done(i, completions) is called as soon as prompt i has all of them,
    on_ready() when the engine has been built (on a GPU: compiled). name, places: what messages call the model
    and each prompt.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    numbers = range(len(prompts)) if numbers is None else numbers
    check_counts(prompts, limits, num_samples, batch_size, seed)
    stopped = stop_test(stop_strings, decode)
    fused = model if isinstance(model, Fused) else Fused(model)
    slots, max_tokens, _ = plan(fused.config, [len(p) for p in prompts], limits, num_samples, batch_size, fused.device, fused.dtype)
    if not prompts:
        return []
    engine = Engine(fused, slots, max_tokens, max(limits), temperature, (top_k, top_p, min_p))
    if on_ready:
        on_ready()
    results = [[None] * num_samples for _ in prompts]
    off = progress is None or not distributed.is_main()
    steps = run(engine, prompts, limits, num_samples, numbers, seed, set(stop_ids), stopped,
                not_finite(model, name, places))
    with command.progress(total=len(prompts), desc=progress, unit="prompt", disable=off) as bar:
        for _, ended in steps:
            for row in ended:
                results[row.prompt][row.sample] = Completion(row.ids, row.logp, row.finish_reason)
                if None not in results[row.prompt]:
                    bar.update()
                    if on_done:
                        on_done(row.prompt, results[row.prompt])
    return results


@torch.no_grad()
def stream(model, prompt, max_new_tokens=256, temperature=0.3, top_k=0, top_p=1.0, min_p=0.0, stop_ids=(),
           seed=0, name="the model"):
    """The ids of one completion of a model, or its Fused weights, one by one as they are chosen; the stop
    token included, if it comes."""
    check_sampling(temperature, top_k, top_p, min_p)
    check_counts([prompt], [max_new_tokens], 1, 1, seed)
    fused = model if isinstance(model, Fused) else Fused(model)
    _, max_tokens, _ = plan(fused.config, [len(prompt)], [max_new_tokens], 1, 1, fused.device, fused.dtype)
    engine, sent = Engine(fused, 1, max_tokens, max_new_tokens, temperature, (top_k, top_p, min_p)), 0
    for rows, ended in run(engine, [prompt], [max_new_tokens], 1, [0], seed, set(stop_ids), None,
                           not_finite(model, name, ["the prompt"])):
        for row in rows + ended:
            yield from row.ids[sent:]
            sent = len(row.ids)


def cut_at(text, stop_strings):
    """The text before the first of the stop strings."""
    return text[:min([text.find(s) for s in stop_strings if s in text], default=len(text))]


def answer_rows(model, tokenizer, rows, num_samples=1, max_new_tokens=64, temperature=1.0, seed=0,
                batch_size=256, progress=None, stop_ids=None, stop_strings=(), numbers=None, on_done=None,
                name="the model", cut_left=False, **more):
    """Answer rows that carry "prompt_messages" or "prompt", the work split over the ranks: on every rank, for
    each row in order, a list of {"completion", "ids" (the sampled tokens, the stop token included),
    "finish_reason", "logp"}. The answers do not depend on the number of ranks.

    stop_ids: default the tokenizer's. numbers, on_done(i, answers): as in `generate`, i the index in rows;
    called on the rank that made the answers. cut_left: prompts that leave no room lose their oldest tokens,
    otherwise they are refused. name: what messages call the model.
    """
    numbers = range(len(rows)) if numbers is None else numbers
    places = [row.get("prompt_where") or f"prompt {number}" for number, row in zip(numbers, rows)]
    prompts = [tokenizer.encode_prompt(row.get("prompt_messages") or row["prompt"]) for row in rows]
    room = model.config.max_position_embeddings - max_new_tokens
    if cut_left and room > 1:
        prompts = [shorten(ids, room) for ids in prompts]
    lengths = [len(ids) for ids in prompts]
    check_lengths(model.config, lengths, [max_new_tokens] * len(rows), places)  # all: no rank is alone
    mine = list(range(distributed.rank(), len(rows), distributed.num_ranks()))

    def as_answers(group):
        return [{"completion": text_of(c.ids), "ids": c.ids, "finish_reason": c.finish_reason, "logp": c.logp}
                for c in group]

    def text_of(ids):
        """A NUL is no text, like the bytes for which `decode` puts U+FFFD: no reader here takes one."""
        return cut_at(tokenizer.decode(ids), stop_strings).replace("\0", "\ufffd")

    samples, error = [], None
    try:
        samples = generate(
            model, [prompts[i] for i in mine], num_samples, max_new_tokens, temperature, seed=seed,
            batch_size=batch_size, progress=progress, stop_strings=stop_strings, decode=tokenizer.decode,
            stop_ids=tokenizer.stop_ids if stop_ids is None else stop_ids, numbers=[numbers[i] for i in mine],
            on_done=on_done and (lambda j, group: on_done(mine[j], as_answers(group))), name=name,
            places=[places[i] for i in mine], **more)
    except ValueError as found:                 # to be raised on every rank, so that none waits for another
        error = found
    done = dict(zip(mine, map(as_answers, samples)))
    parts = distributed.gather_objects((done, error))
    for _, error in parts:
        if error:
            raise error
    done = {i: answers for part, _ in parts for i, answers in part.items()}
    return [done[i] for i in range(len(rows))]
