"""Sampling: logits to token, prefill and decode on a static KV cache, and the batched engine over many prompts.

What one request produces does not depend on what else is in the batch: its random numbers come from (seed, request number), its
cache rows are its own, and padding is masked by length. k samples of one prompt share its prefill.
"""

from collections import namedtuple

import numpy as np
import torch
from tqdm import tqdm

from . import distributed

Completion = namedtuple("Completion", "ids logp finish_reason")     # ids end with the stop token if finish_reason is "stop"; logp: nats, of all ids


class KVCache:
    """Keys and values of B sequences of different lengths, each (layers, B, K, max_tokens, D); row b holds `lengths[b]` tokens.

    Prefill writes positions 0..T-1 of every row (right-padded, the padding is masked afterwards); each decode step writes one token at
    position lengths[b].
    """

    def __init__(self, config, batch_size, max_tokens, device, dtype):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_tokens, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.positions, self._layer, self._mask, self._rows, self._used = None, 0, None, torch.arange(batch_size, device=device), 0

    def layer(self, i):
        self._layer = i
        return self

    def start(self, num_tokens, longest):
        """Announce the next forward: `num_tokens` new tokens a row; `longest` is the longest row afterwards (a Python int, so no sync)."""
        self.prefilling = num_tokens > 1 or longest == 1
        offsets = torch.arange(num_tokens, device=self.lengths.device)
        self.positions = self.lengths[:, None] + offsets                                       # (B, T)
        self._used = longest
        keys = torch.arange(longest, device=self.lengths.device)
        self._mask = None if self.prefilling else (keys <= self.positions)[:, None, None]      # (B, 1, 1, longest)

    def update(self, k, v):
        """Store new k, v (B, K, T, D); return all keys, values and the mask for this layer (None: causal prefill)."""
        layer_k, layer_v = self.k[self._layer], self.v[self._layer]
        if self.prefilling:
            layer_k[:, :, :k.shape[2]], layer_v[:, :, :v.shape[2]] = k, v
            return k, v, None
        layer_k[self._rows, :, self.lengths] = k[:, :, 0]
        layer_v[self._rows, :, self.lengths] = v[:, :, 0]
        return layer_k[:, :, :self._used], layer_v[:, :, :self._used], self._mask

    def select(self, rows):
        """Keep (or repeat) the given rows."""
        self.k, self.v, self.lengths = self.k[:, rows], self.v[:, rows], self.lengths[rows]
        self._rows = torch.arange(len(self.lengths), device=self.lengths.device)


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

    logits (B, V); uniforms (B,) in [0, 1): the inverse of the cumulative distribution, so one number per row decides.
    """
    logits = logits.float() / (temperature or 1.0)
    log_z = logits.logsumexp(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cumulative = filtered(logits, top_k, top_p, min_p).softmax(-1).cumsum(-1)
        tokens = torch.searchsorted(cumulative, (uniforms[:, None].to(cumulative) * cumulative[:, -1:]), right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - log_z


@torch.no_grad()
def _generate_batch(model, prompts, requests, max_new_tokens, temperature, stop_ids, seed, filters, device, results):
    """Prefill the prompts, repeat each for its samples, decode until every row has stopped; finished rows leave the batch."""
    config, k = model.config, len(requests) // len(prompts)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    for i, p in enumerate(prompts):
        ids[i, :len(p)] = torch.as_tensor(p, device=device)
    cache = KVCache(config, len(prompts), longest + max_new_tokens, device, next(model.parameters()).dtype)
    cache.start(longest, longest)
    logits = model(ids, cache=cache, last=lengths - 1)                                         # (P, V)
    cache.lengths = lengths
    rows = torch.arange(len(prompts), device=device).repeat_interleave(k)
    cache.select(rows)
    logits, alive = logits[rows], np.arange(len(requests))
    uniforms = torch.from_numpy(np.stack([np.random.default_rng([seed, r]).random(max_new_tokens, np.float32) for r in requests])).to(device)   # (B, max_new)
    tokens_out = np.zeros((len(requests), max_new_tokens), np.int64)
    logp_out, num_out, stopped = np.zeros(len(requests)), np.zeros(len(requests), int), np.zeros(len(requests), bool)
    stop = torch.tensor(sorted(stop_ids), device=device)
    for step in range(max_new_tokens):
        tokens, logps = choose(logits, uniforms[:, step], temperature, *filters)
        ended = torch.isin(tokens, stop).cpu().numpy()
        tokens_out[alive, step], num_out[alive] = tokens.cpu().numpy(), step + 1
        logp_out[alive] += logps.double().cpu().numpy()
        stopped[alive] = ended
        if ended.all() or step + 1 == max_new_tokens:
            break
        if ended.any():                                                                        # finished rows leave the batch
            keep = torch.from_numpy(np.flatnonzero(~ended)).to(device)
            cache.select(keep)
            tokens, uniforms, alive = tokens[keep], uniforms[keep], alive[~ended]
        longest += 1
        cache.start(1, longest)
        logits = model(tokens[:, None], cache=cache)[:, 0]                                     # (B, V)
        cache.lengths = cache.lengths + 1
    for row, request in enumerate(requests):
        results[request] = Completion(tokens_out[row, :num_out[row]].tolist(), float(logp_out[row]), "stop" if stopped[row] else "length")


def check_lengths(model, prompts, max_new_tokens):
    """Refuse prompts that leave no room for their answers within the positions that the model knows."""
    limit = model.config.max_position_embeddings
    for i, p in enumerate(prompts):
        if len(p) + max_new_tokens > limit:
            raise ValueError(f"prompt {i} has {len(p)} tokens; with {max_new_tokens} new ones it passes the model's {limit}; shorten it or lower --max-new-tokens")


def generate(model, prompts, num_samples=1, max_new_tokens=64, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stop_ids=(), seed=0,
             batch_size=256, numbers=None, progress=None):
    """Completions of many prompts by a plain (never a sharded) model: a list of num_samples Completions for each prompt.

    prompts: lists of ids. numbers: the request number of each prompt (default its index), which with `seed` fixes its random numbers.
    batch_size: sequences decoded together. progress: text of a tqdm bar on rank 0, or None.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or not 0 <= min_p <= 1:
        raise ValueError(f"temperature {temperature} must be >= 0, top-p {top_p} in (0, 1], top-k {top_k} >= 0, min-p {min_p} in [0, 1]")
    check_lengths(model, prompts, max_new_tokens)
    numbers = range(len(prompts)) if numbers is None else numbers
    training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch, results = max(1, batch_size // num_samples), {}
    bar = tqdm(total=len(prompts), desc=progress, unit="prompt", leave=False, disable=progress is None or not distributed.is_main(), mininterval=1)
    for start in range(0, len(order), per_batch):
        chosen = order[start:start + per_batch]
        requests = [numbers[i] * num_samples + s for i in chosen for s in range(num_samples)]
        _generate_batch(model, [prompts[i] for i in chosen], requests, max_new_tokens, temperature, set(stop_ids), seed, (top_k, top_p, min_p), device, results)
        bar.update(len(chosen))
    bar.close()
    model.train(training)
    return [[results[numbers[i] * num_samples + s] for s in range(num_samples)] for i in range(len(prompts))]


def answer_rows(model, tokenizer, rows, num_samples=1, max_new_tokens=64, temperature=1.0, seed=0, batch_size=256, progress=None, **filters):
    """Answer rows that carry "prompt_messages" or "prompt", the work split over the ranks: on every rank, for each row in order, a list of
    {"completion", "ids" (the sampled tokens, the stop token included), "finish_reason", "logp"}. The answers do not depend on the number of ranks."""
    prompts = [tokenizer.encode_prompt(row.get("prompt_messages") or row["prompt"]) for row in rows]
    check_lengths(model, prompts, max_new_tokens)                                              # all of them, so that no rank is refused alone
    mine = list(range(distributed.rank(), len(rows), distributed.num_ranks()))
    samples = generate(model, [prompts[i] for i in mine], num_samples, max_new_tokens, temperature, stop_ids=[tokenizer.end_of_turn_id], seed=seed,
                       batch_size=batch_size, numbers=mine, progress=progress, **filters)
    done = [(i, [{"completion": tokenizer.decode(c.ids), "ids": c.ids, "finish_reason": c.finish_reason, "logp": c.logp} for c in group])
            for i, group in zip(mine, samples)]
    return [answers for _, answers in sorted(sum(distributed.gather_objects(done), []), key=lambda pair: pair[0])] if distributed.num_ranks() > 1 else [a for _, a in done]
