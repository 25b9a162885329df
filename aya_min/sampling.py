"""Sampling: continuous batching on the engine, and completions of many prompts on all ranks.

A waiting prompt takes a finished row's slot at once, and the k samples of a prompt share its prefill. A
request's answer does not depend on the rest of the batch: its random numbers come from (seed, request
number), its cache row is its own, and the engine's arithmetic gives the same bits in any batch.
"""

import math
from collections import deque, namedtuple
from dataclasses import dataclass, field

import numpy as np
import torch

from . import command, distributed
from .encoder_decoder import EncoderDecoder
from .encoder_decoder_engine import EncoderDecoderEngine, FusedEncoderDecoder
from .engine import Engine, cache_sizes, check_sampling, choose, round_up
from .fused import Fused
from .lengths import cut_left as shorten

# ids end with the stop token if finish_reason is "stop"; logp is the sum over all ids in nats.
Completion = namedtuple("Completion", "ids logp finish_reason")
# Padded tokens that are prefilled together. More do not fit the CPU's caches (LOG.md).
PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}


# ---- continuous batching -----------------------------------------------------------------------------------

@dataclass
class Row:
    """One request while it is decoded: sample number `sample` of prompt number `prompt` (in serve_batch.py of
    the Request `prompt`).

    length: tokens of prompt and answer. limit: the most tokens that the answer may have.
    uniforms: (limit,) in [0, 1), or None if greedy. logp: nats, summed over ids.
    """
    prompt: int
    sample: int
    length: int
    limit: int
    uniforms: np.ndarray
    ids: list = field(default_factory=list)
    logp: float = 0.0
    finish_reason: str = None

    def add(self, token, logp, stop_ids, stopped):
        """Append a token. Returns whether the row has ended. stopped: see stop_test."""
        self.ids.append(token)
        self.length += 1
        self.logp += logp
        if token in stop_ids or stopped and stopped(self.ids):
            self.finish_reason = "stop"
        elif len(self.ids) == self.limit:
            self.finish_reason = "length"
        return self.finish_reason is not None


def uniforms_of(seed, number, limit):
    """The random numbers (limit,) of request `number`, fp32 in [0, 1): one decides each of its tokens."""
    return np.random.default_rng([seed, number]).random(limit, np.float32)


def next_group(waiting, length_of, num_tokens):
    """Take prompts from the deque `waiting`, as many as num_tokens padded tokens hold but at least one."""
    group, longest = [], 0
    while waiting:
        longest = max(longest, length_of(waiting[0]))
        if group and (len(group) + 1) * round_up(longest) > num_tokens:
            break
        group.append(waiting.popleft())
    return group


def complete(engine, prompts, limits, num_samples, numbers, seed, stop_ids, stopped, fault=None):
    """Decode all prompts. A generator that yields, after each step, (rows in progress, rows that just ended).

    The prompts with the highest limits come first, so that the batch stays full to the end. A group of
    prompts is prefilled when a slot is free and no prefilled row waits. fault: (prompt, step, what) -> the
    error to raise where logits or a log-prob are not finite.
    """
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-limits[i], -len(prompts[i]))))
    # ready: (row, keys and values of its group, its index in them). The row of slot i is rows[i].
    ready, rows = deque(), []

    def row_of(i, sample):
        uniforms = None
        if engine.temperature:
            uniforms = uniforms_of(seed, numbers[i] * num_samples + sample, limits[i])
        return Row(i, sample, len(prompts[i]), limits[i], uniforms)

    def prefill_some():
        """Prefill the next prompts and choose the first token of each sample. Returns the rows it ends."""
        group = next_group(waiting, lambda i: len(prompts[i]), PREFILL_TOKENS[engine.device.type])
        logits, kept = engine.prefill([prompts[i] for i in group])
        made = [(row_of(i, sample), p) for p, i in enumerate(group) for sample in range(num_samples)]
        first = None
        if engine.temperature:
            first = torch.tensor([row.uniforms[0] for row, _ in made], device=engine.device)
        finite = logits.isfinite().all(-1).tolist()
        tokens, logps = choose(logits.repeat_interleave(num_samples, 0), first, engine.temperature,
                               *engine.filters)
        for (row, p), logp in zip(made, logps.tolist()):
            if fault and not (finite[p] and math.isfinite(logp)):
                raise fault(row.prompt, 0, "the logits")
        ended = []
        for (row, p), token, logp in zip(made, tokens.tolist(), logps.tolist()):
            if row.add(token, logp, stop_ids, stopped):
                ended.append(row)
            else:
                ready.append((row, kept, p))
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
        gone = [slot for slot, (row, token, logp) in enumerate(zip(rows, tokens, logps))
                if row.add(token, logp, stop_ids, stopped)]
        ended = free_slots(engine, rows, gone)
        yield rows, ended


def free_slots(engine, rows, slots):
    """Remove the rows of these slots (ascending) and return them. The last row moves into each free slot."""
    removed = [rows[slot] for slot in slots]
    for slot in reversed(slots):
        if slot < len(rows) - 1:
            engine.move(len(rows) - 1, slot, rows[-1].length)
            rows[slot] = rows[-1]
        rows.pop()
    return removed


def fused_of(model):
    """The weights of a plain model as its engine reads them; Fused ones stay as they are."""
    if isinstance(model, (Fused, FusedEncoderDecoder)):
        return model
    return (FusedEncoderDecoder if isinstance(model, EncoderDecoder) else Fused)(model)


def engine_of(fused, *settings):
    """The engine of a model's Fused weights. settings: those of Engine."""
    return (EncoderDecoderEngine if isinstance(fused, FusedEncoderDecoder) else Engine)(fused, *settings)


# ---- many prompts ------------------------------------------------------------------------------------------

def free_bytes(device):
    """Free memory of a device in bytes, or None if the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except OSError:
        return None


def check_lengths(config, lengths, limits, places=None):
    """Raise ValueError for a prompt that with its answer passes the model's positions. places: what messages
    call the prompts."""
    for i, (length, limit) in enumerate(zip(lengths, limits)):
        if length + limit > config.max_position_embeddings:
            place = places[i] if places else f"prompt {i}"
            raise ValueError(f"{place} has {length} tokens; with {limit} new ones it passes the model's "
                             f"{config.max_position_embeddings}; shorten it or lower --max-new-tokens")


def not_finite(model, name, places=None):
    """The `fault` of `complete`: an error that names the model, the prompt, the step and the parameter that
    is not finite, if one is."""
    def fault(prompt, step, what):
        place = places[prompt] if places else f"prompt {prompt}"
        about = distributed.blame(model) if isinstance(model, torch.nn.Module) else ""
        verb = "are" if what.endswith("s") else "is"
        return ValueError(f"{name}: {what} of new token {step + 1} of {place} {verb} not finite{about}")
    return fault


def engine_size(config, lengths, limits, num_samples, batch_size, device="cpu", dtype=torch.float32,
                shorter="shorten the prompts or lower --max-new-tokens"):
    """(slots, tokens per slot, bytes of the KV cache) for prompts of these lengths and limits of new tokens.

    Raises ValueError, before anything runs, for a prompt that passes the model's positions and for a cache
    that does not fit the free memory. shorter: the remedy where not even one slot fits."""
    check_lengths(config, lengths, limits)
    slots = min(batch_size, len(lengths) * num_samples)
    max_tokens = round_up(max(map(sum, zip(lengths, limits)), default=0))
    per_token = 2 * config.key_width * dtype.itemsize       # bytes in a layer
    group = max(PREFILL_TOKENS[torch.device(device).type], round_up(max(lengths, default=0)))
    prefilled = group * config.num_hidden_layers * per_token
    per_slot, free = sum(cache_sizes(config, max_tokens)) * per_token, free_bytes(device)
    needed = slots * per_slot + prefilled
    if free is not None and needed > free:
        most = int((free - prefilled) // per_slot)
        remedy = f"lower --batch-size to {most} or less"
        if most <= 0:
            remedy = shorter
        raise ValueError(f"the KV cache of {slots} rows of {max_tokens} tokens needs {needed / 1e9:.1f} GB, "
                         f"{free / 1e9:.1f} GB are free; {remedy}")
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
    """A function ids -> whether the decoded text now contains a stop string, or None without any. Only the
    last few tokens are decoded: four more than the longest string has bytes."""
    if not stop_strings:
        return None
    if isinstance(stop_strings, str) or not all(isinstance(s, str) and s for s in stop_strings):
        raise ValueError(f"the stop strings {stop_strings!r} must be a list of texts, none of them empty")
    tail = max(len(s.encode()) for s in stop_strings) + 4
    return lambda ids: any(s in decode(ids[-tail:]) for s in stop_strings)


@torch.no_grad()
def generate(model, prompts, num_samples=1, max_new_tokens=64, temperature=1.0, top_k=0, top_p=1.0,
             min_p=0.0, stop_ids=(), stop_strings=(), decode=None, seed=0, batch_size=256, numbers=None,
             progress=None, on_done=None, on_ready=None, name="the model", places=None):
    """Complete many prompts with a plain (never a sharded) model, or its Fused weights. Returns a list of
    num_samples Completions for each prompt.

    prompts: lists of ids. max_new_tokens: a number, or one for each prompt.
    stop_strings: they need decode(ids) -> text.
    numbers: the request number of each prompt (default its index); with `seed` it fixes the random numbers.
    batch_size: rows decoded together. progress: the text of a tqdm bar on rank 0, or None for no bar.
    on_done(i, completions) is called as soon as all samples of prompt i are finished, on_ready() when the
    engine has been built (on a GPU: its step recorded). name, places: what messages call the model and each
    prompt.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    numbers = range(len(prompts)) if numbers is None else numbers
    check_counts(prompts, limits, num_samples, batch_size, seed)
    stopped = stop_test(stop_strings, decode)
    fused = fused_of(model)
    lengths = [len(prompt) for prompt in prompts]
    slots, max_tokens, _ = engine_size(fused.config, lengths, limits, num_samples, batch_size, fused.device,
                                       fused.dtype)
    if not prompts:
        return []
    engine = engine_of(fused, slots, max_tokens, max(limits), temperature, (top_k, top_p, min_p))
    if on_ready:
        on_ready()
    results = [[None] * num_samples for _ in prompts]
    off = progress is None or not distributed.is_main()
    steps = complete(engine, prompts, limits, num_samples, numbers, seed, set(stop_ids), stopped,
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
    """Yield the ids of one completion as they are chosen, the stop token included. model: a plain model or
    its Fused weights."""
    check_sampling(temperature, top_k, top_p, min_p)
    check_counts([prompt], [max_new_tokens], 1, 1, seed)
    fused = fused_of(model)
    _, max_tokens, _ = engine_size(fused.config, [len(prompt)], [max_new_tokens], 1, 1, fused.device,
                                   fused.dtype)
    engine, sent = engine_of(fused, 1, max_tokens, max_new_tokens, temperature, (top_k, top_p, min_p)), 0
    steps = complete(engine, [prompt], [max_new_tokens], 1, [0], seed, set(stop_ids), None,
                     not_finite(model, name, ["the prompt"]))
    for rows, ended in steps:
        for row in rows + ended:
            yield from row.ids[sent:]
            sent = len(row.ids)


def cut_at(text, stop_strings):
    """The text before the first stop string."""
    return text[:min([text.find(s) for s in stop_strings if s in text], default=len(text))]


def answer_rows(model, tokenizer, rows, num_samples=1, max_new_tokens=64, temperature=1.0, seed=0,
                batch_size=256, progress=None, stop_ids=None, stop_strings=(), numbers=None, on_done=None,
                name="the model", cut_left=False, **more):
    """Answer rows that have "prompt_messages" or "prompt". The ranks share the work; the answers do not
    depend on their number. A collective.

    Returns on every rank, for each row in order, a list of {"completion", "ids" (the sampled tokens, the stop
    token included), "finish_reason", "logp" (nats)}.
    stop_ids: default the tokenizer's. numbers, more: see `generate`. on_done(i, answers): called for row i on
    the rank that made its answers. name: what messages call the model.
    cut_left: a prompt that leaves no room for its answer loses its oldest tokens. Otherwise all ranks raise
    ValueError.
    """
    numbers = range(len(rows)) if numbers is None else numbers
    places = [row.get("prompt_where") or f"prompt {number}" for number, row in zip(numbers, rows)]
    prompts = [tokenizer.encode_prompt(row.get("prompt_messages") or row["prompt"], place)
               for row, place in zip(rows, places)]
    room = model.config.max_position_embeddings - max_new_tokens
    if cut_left and room > 1:
        prompts = [shorten(ids, room) for ids in prompts]
    lengths = [len(ids) for ids in prompts]
    # Each rank checks all rows, so that all ranks raise together.
    check_lengths(model.config, lengths, [max_new_tokens] * len(rows), places)
    mine = list(range(distributed.rank(), len(rows), distributed.num_ranks()))

    def as_answers(group):
        return [{"completion": text_of(c.ids), "ids": c.ids, "finish_reason": c.finish_reason, "logp": c.logp}
                for c in group]

    def text_of(ids):
        """The text without NUL, which our readers refuse: it becomes U+FFFD, like bytes that are no text."""
        return cut_at(tokenizer.decode(ids), stop_strings).replace("\0", "\ufffd")

    samples, error = [], None
    try:
        samples = generate(
            model, [prompts[i] for i in mine], num_samples, max_new_tokens, temperature, seed=seed,
            batch_size=batch_size, progress=progress, stop_strings=stop_strings, decode=tokenizer.decode,
            stop_ids=tokenizer.stop_ids if stop_ids is None else stop_ids, numbers=[numbers[i] for i in mine],
            on_done=on_done and (lambda j, group: on_done(mine[j], as_answers(group))), name=name,
            places=[places[i] for i in mine], **more)
    except ValueError as found:
        # It is raised on every rank below, so that no rank waits for another.
        error = found
    done = dict(zip(mine, map(as_answers, samples)))
    parts = distributed.gather_objects((done, error))
    for _, error in parts:
        if error:
            raise error
    done = {i: answers for part, _ in parts for i, answers in part.items()}
    return [done[i] for i in range(len(rows))]
