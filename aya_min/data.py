"""JSONL in, batches out: reading with errors that name file and line, the seeded order of examples, right-padded batches.

Shapes of a line (extra keys are kept, other shapes refused):
    {"messages": [{"role", "content"}, ...]}   {"prompt", "completion"}   {"inputs", "targets"}   {"prompt", "chosen", "rejected"}
    {"prompt"} or {"inputs"} (a prompt alone)  {"text"}                   each may carry "language"
Right padding needs no attention mask: under a causal mask no real token sees what follows it.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from . import distributed
from .languages import LANGUAGES, language_code

LANGUAGE_SLOTS = list(LANGUAGES) + ["other"]        # per-language metrics are vectors over these; examples without a language go last
EQUAL_SHARE = 0.05                                  # of pairs with two equal answers: more are refused


# ---- reading ---------------------------------------------------------------------------------------------------------------------

def read_jsonl(path, reading=None):
    """[(where, object), ...] of a JSONL file; where is "file:line". The first malformed line is refused."""
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give an existing JSONL file") from None
    if lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: the file is empty; it needs one JSON object a line")
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=_no_json)
            row = {{theirs: ours for ours, theirs in ((reading.columns if reading else None) or {}).items()}.get(k, k): v for k, v in row.items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8 without a byte-order mark") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not a JSON object ({error}); one whole object a line, no empty lines") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON {type(row).__name__}, not an object; one object a line")
        if row.get("language") is not None:
            code = language_code(row["language"]) if isinstance(row["language"], str) else None
            if code is None:
                raise ValueError(f"{where}: unknown language {row['language']!r}; known: {' '.join(LANGUAGES)} (or leave the key out)")
            row["language"] = code
        rows.append((where, row))
    return rows


def _no_json(name):
    raise ValueError(f"{name} is no JSON")


def _text(value, key, where):
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be a string, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where}: {key!r} is empty; remove the line or fill it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {key!r} holds half a surrogate pair, which is not text; remove it") from None
    return value


def _messages(value, key, where):
    """Checked [{"role", "content"}]: an optional system turn, then user and assistant in turn."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {key!r} must be a non-empty list of {{role, content}}")
    for i, m in enumerate(value):
        if not isinstance(m, dict) or m.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: {key}[{i}] needs a role of system, user or assistant")
        _text(m.get("content"), f"{key}[{i}].content", where)
    turns = value[1:] if value[0]["role"] == "system" else value
    for i, m in enumerate(turns):
        if m["role"] != ("user", "assistant")[i % 2]:
            raise ValueError(f"{where}: {key}: after an optional system turn, user and assistant must alternate, user first")
    return value


def _prompt_messages(value, where):
    messages = [{"role": "user", "content": _text(value, "prompt", where)}] if isinstance(value, str) else _messages(value, "prompt", where)
    if messages[-1]["role"] != "user":
        raise ValueError(f"{where}: the prompt must end with a user turn, got {messages[-1]['role']!r}")
    return messages


def _answer(value, prompt, key, where):
    """The answer's text: a string, or messages that are one assistant turn, alone or after the prompt."""
    if isinstance(value, list):
        turns = value[len(prompt):] if value[:len(prompt)] == prompt else value
        if len(turns) != 1 or not isinstance(turns[0], dict) or turns[0].get("role") != "assistant":
            raise ValueError(f"{where}: {key!r} must be one assistant turn, alone or after the same prompt, got {len(turns)} turns; put earlier turns in the prompt")
        value = turns[0].get("content")
    return _text(value, key, where)


def conversation(row, where):
    """The messages of a supervised example, the last one the assistant's."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages", where)
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: the last message must be the assistant's answer, got {messages[-1]['role']!r}")
        return messages
    for prompt, answer in (("prompt", "completion"), ("inputs", "targets")):
        if prompt in row and answer in row:
            messages = _prompt_messages(row[prompt], where)
            return messages + [{"role": "assistant", "content": _answer(row[answer], messages, answer, where)}]
    raise ValueError(f"{where}: no example in keys {sorted(row)}; needs messages, or prompt + completion, or inputs + targets")


def preference(row, where):
    """(prompt messages, chosen text, rejected text)."""
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing or ("prompt" not in row and not isinstance(row.get("chosen"), list)):
        raise ValueError(f"{where}: no preference pair in keys {sorted(row)}; needs prompt, chosen, rejected")
    # Without a prompt it is TRL's implicit one: chosen and rejected are whole conversations, equal but for the answer.
    prompt = _prompt_messages(row["prompt"] if "prompt" in row else row["chosen"][:-1], where)
    return prompt, _answer(row["chosen"], prompt, "chosen", where), _answer(row["rejected"], prompt, "rejected", where)


def prompt_of(row, where):
    """The prompt messages of any known shape."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages", where)
        return _prompt_messages(messages[:-1] if messages[-1]["role"] == "assistant" else messages, where)
    for key in ("prompt", "inputs"):
        if key in row:
            return _prompt_messages(row[key], where)
    raise ValueError(f"{where}: no prompt in keys {sorted(row)}; needs prompt, inputs or messages")


# ---- examples --------------------------------------------------------------------------------------------------------------------

@dataclass
class Example:
    ids: np.ndarray             # (T,) int32
    mask: np.ndarray            # (T,) bool, True where the token is supervised
    language: int               # index into LANGUAGE_SLOTS
    where: str = ""             # "file:line"


@dataclass
class Pair:
    chosen: Example
    rejected: Example
    ref_logps: Optional[np.ndarray] = None      # (2,) nats: the reference's log-probs of the two answers


def language_slot(row):
    return LANGUAGE_SLOTS.index(row["language"]) if row.get("language") in LANGUAGE_SLOTS else len(LANGUAGE_SLOTS) - 1


def encode_example(tokenizer, messages, row, where=""):
    """Prompt and answer to ids and mask; the answer is the LAST turn only, earlier assistant turns are context."""
    ids, mask = tokenizer.encode_chat(messages[:-1], generation_prompt=True)
    answer = tokenizer.encode_answer(messages[-1]["content"])
    return Example(np.array(ids + answer, np.int32), np.array([False] * len(mask) + [True] * len(answer)), language_slot(row), where)


def _report_left_out(paths, kept, too_long, max_length):
    if not kept:
        raise ValueError(f"{' '.join(map(str, paths))}: no example fits into --max-length {max_length} tokens; raise it")
    if too_long and distributed.is_main():
        print(f"{' '.join(map(str, paths))}: {too_long} of {kept + too_long} examples are longer than --max-length {max_length} tokens and are left out",
              file=sys.stderr)


def _report_equal(equal, total):
    """A pair of equal answers teaches nothing. A few are named and left out; where there are many, something is wrong with the data."""
    if equal:
        text = f"{len(equal)} of {total} pairs have the same answer as chosen and rejected: {' '.join(equal[:10])}{' ...' if len(equal) > 10 else ''}"
        if len(equal) > EQUAL_SHARE * total:
            raise ValueError(f"{text}; that is more than {EQUAL_SHARE:.0%}, look at how the pairs were made")
        if distributed.is_main():
            print(f"{text}; they are left out", file=sys.stderr)


def load_examples(paths, tokenizer, max_length):
    """Supervised examples of JSONL files: conversations (every assistant turn supervised) and plain {"text"} (every token after BOS,
    cut into pieces of max_length). Too long conversations are left out, counted and reported."""
    examples, too_long = [], 0
    for path in paths:
        for where, row in read_jsonl(path):
            if "text" in row:
                ids = tokenizer.encode(_text(row["text"], "text", where)) + [tokenizer.end_of_turn_id]
                for start in range(0, len(ids), max_length - 1):
                    piece = np.array([tokenizer.bos_id] + ids[start:start + max_length - 1], np.int32)
                    examples.append(Example(piece, np.arange(len(piece)) > 0, language_slot(row), where))
                continue
            ids, mask = tokenizer.encode_chat(conversation(row, where))
            if len(ids) > max_length:
                too_long += 1
            else:
                examples.append(Example(np.array(ids, np.int32), np.array(mask), language_slot(row), where))
    _report_left_out(paths, len(examples), too_long, max_length)
    return examples


def load_pairs(paths, tokenizer, max_length):
    """Preference pairs of JSONL files; a pair with either side too long, or with the same answer twice, is left out, counted and reported."""
    pairs, too_long, equal = [], 0, []
    for path in paths:
        for where, row in read_jsonl(path):
            prompt, chosen, rejected = preference(row, where)
            both = [encode_example(tokenizer, prompt + [{"role": "assistant", "content": text}], row, where) for text in (chosen, rejected)]
            if chosen == rejected:
                equal.append(where)
            elif max(len(side.ids) for side in both) > max_length:
                too_long += 1
            else:
                pairs.append(Pair(*both))
    _report_equal(equal, len(pairs) + too_long + len(equal))
    _report_left_out(paths, len(pairs), too_long, max_length)
    return pairs


def load_prompts(paths, reading=None, tokenizer=None):
    """[row, ...] with "prompt" and its "prompt_messages", whatever the shape in the file; keys that are not part of an example are kept."""
    rows = []
    for path in paths:
        for where, row in read_jsonl(path, reading):
            messages = prompt_of(row, where)
            kept = {k: v for k, v in row.items() if k not in ("messages", "inputs", "targets", "text")}
            plain = messages[0]["content"] if len(messages) == 1 else messages
            rows.append({**kept, "prompt": plain, "prompt_messages": messages, "prompt_where": where})
    return rows


def fit_prompts(rows, length_of, room, policy, what):
    """The rows whose prompts leave room, by the policy refuse, skip or cut-left."""
    long = [row for row in rows if length_of(row) > room]
    if long and policy == "refuse":
        raise ValueError(f"{long[0].get('prompt_where')}: the prompt has {length_of(long[0])} tokens, {what} leaves room for {room}; "
                         "shorten it, or take --too-long skip or cut-left")
    if long and distributed.is_main():
        print(f"{len(long)} of {len(rows)} prompts are longer than {room} tokens, the first {long[0].get('prompt_where')}; "
              f"{'they are left out' if policy == 'skip' else 'their oldest tokens are cut'}", file=sys.stderr)
    return [row for row in rows if length_of(row) <= room] if policy == "skip" else rows


def cut_left(ids, room):
    return ids if len(ids) <= room else ids[:1] + ids[len(ids) - room + 1:]


def plain(row):
    """A row without what `load_prompts` and arbitrage add to it."""
    return {k: v for k, v in row.items() if k not in ("prompt_messages", "prompt_where", "candidates")}


# ---- batches ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    input_ids: torch.Tensor                         # (B, T), right-padded
    mask: torch.Tensor                              # (B, T) bool, supervised tokens
    lengths: torch.Tensor                           # (B,) tokens
    languages: torch.Tensor                         # (B,) index into LANGUAGE_SLOTS
    count: int                                      # units that the loss sums over: supervised tokens, pairs or completions
    ref_logps: Optional[torch.Tensor] = None        # (2, B/2) pairs, or (B,) completions, nats
    advantages: Optional[torch.Tensor] = None       # (B,) RLOO
    rewards: Optional[torch.Tensor] = None          # (B,) RLOO, for the log
    cut: Optional[torch.Tensor] = None              # (B,) RLOO, 1 where the answer was cut, for the log
    repeats: Optional[torch.Tensor] = None          # (2, B) an earlier row, or itself, and how many tokens both begin with; None if no two begin alike
    where: tuple = ()                               # (B,) "file:line" of each row, to name it when its loss is not finite

    @property
    def num_tokens(self):
        return int(self.lengths.sum())

    def to(self, device):
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)})


def collate(examples, pad_id=0):
    """Right-padded batch of supervised examples, a multiple of 16 tokens wide (matmul libraries prepare and keep code for each shape that they meet);
    count = supervised tokens."""
    lengths = np.array([len(e.ids) for e in examples])
    input_ids = np.full((len(examples), -(-lengths.max() // 16) * 16), pad_id, np.int64)
    mask = np.zeros(input_ids.shape, bool)
    for i, e in enumerate(examples):
        input_ids[i, :len(e.ids)], mask[i, :len(e.ids)] = e.ids, e.mask
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(mask), torch.from_numpy(lengths),
                 torch.tensor([e.language for e in examples]), int(mask.sum()), repeats=repeats_of(examples), where=tuple(e.where for e in examples))


def repeats_of(examples):
    """Batch.repeats: a pair's two answers, or the samples of one prompt, begin alike; so does what was drawn twice."""
    first, seen = [], {}
    for i, e in enumerate(examples):
        first.append(seen.setdefault(e.where or i, i))
    shared = [0 if i == j else common_start(examples[i].ids, examples[j].ids) for i, j in enumerate(first)]
    return torch.tensor([first, shared]) if any(shared) else None


def common_start(a, b):
    """How many tokens two texts begin with alike."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def collate_pairs(pairs, pad_id=0):
    """2P rows: the chosen answers, then the rejected ones; count = pairs."""
    batch = collate([p.chosen for p in pairs] + [p.rejected for p in pairs], pad_id)
    batch.count = len(pairs)
    if pairs[0].ref_logps is not None:
        batch.ref_logps = torch.from_numpy(np.stack([p.ref_logps for p in pairs], 1).astype(np.float32))     # (2, P)
    return batch


def length_of(item):
    return max(len(item.chosen.ids), len(item.rejected.ids)) if isinstance(item, Pair) else len(item.ids)


class Sampler:
    """The seeded order of a data set. Its whole state is one integer, the global position; every rank computes the same order.

    Each epoch is a permutation in which neighbours have similar lengths (sorted within windows of 16 batches, or of a quarter of a small
    data set; the batches shuffled), so that padding is small. Every example comes once an epoch, at any number of ranks.
    """

    def __init__(self, lengths, batch_size, seed):
        if len(lengths) < batch_size:
            raise ValueError(f"{len(lengths)} examples are fewer than one batch of {batch_size}; lower --batch-size or give more data")
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self._epoch, self._order = None, None

    def order(self, epoch):
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            shuffled = rng.permutation(len(self.lengths))
            window = self.batch_size * max(1, min(16, len(shuffled) // self.batch_size // 4))
            by_length = [w[np.argsort(self.lengths[w], kind="stable")] for w in np.split(shuffled, range(window, len(shuffled), window))]
            flat = np.concatenate(by_length)
            batches = np.split(flat, range(self.batch_size, len(flat), self.batch_size))
            whole = len(batches) - (len(batches[-1]) < self.batch_size)
            batches = [batches[i] for i in rng.permutation(whole)] + batches[whole:]
            self._epoch, self._order = epoch, np.concatenate(batches)
        return self._order

    def take(self, position, count):
        """Indices of the `count` examples from a global position on, across epoch borders."""
        indices, N = [], len(self.lengths)
        while count:
            epoch, offset = divmod(position, N)
            piece = self.order(epoch)[offset:offset + count]
            indices.append(piece)
            position, count = position + len(piece), count - len(piece)
        return np.concatenate(indices)


def count_steps(num_items, settings):
    """--max-steps, or as many as --epochs gives."""
    num_steps = settings.max_steps or -(-int(settings.epochs * num_items) // settings.batch_size)
    if num_steps < 1:
        raise ValueError(f"--epochs {settings.epochs} of {num_items} examples is less than one example; give more, or --max-steps")
    return num_steps


def make_batches(items, collate_fn, settings):
    """(num_steps, batches): batches(step) is this rank's list of micro-batches for a step, a pure function of the step.

    The ranks take every n-th example of the global batch, so that they get similar lengths.
    """
    sampler = Sampler([length_of(item) for item in items], settings.batch_size, settings.seed)
    num_steps = count_steps(len(items), settings)
    rank, ranks = distributed.rank(), distributed.num_ranks()

    def batches(step):
        mine = sampler.take(step * settings.batch_size, settings.batch_size)[rank::ranks]
        size = settings.micro_batch_size or len(mine)
        return [collate_fn([items[i] for i in mine[start:start + size]]) for start in range(0, len(mine), size)]

    return num_steps, batches


def batches_in_order(items, collate_fn, size=64):
    """[(indices, batch), ...] over this rank's share of all items, sorted by length; for evaluation and reference log-probs."""
    mine = sorted(range(distributed.rank(), len(items), distributed.num_ranks()), key=lambda i: length_of(items[i]))
    if items and not mine:                              # a rank without items gets a batch of none: a sharded forward takes all ranks
        return [([], collate_fn(items[:1]))]
    return [(mine[s:s + size], collate_fn([items[i] for i in mine[s:s + size]])) for s in range(0, len(mine), size)]


def in_step(batches):
    """This rank's batches_in_order, as many as the busiest rank has: its last again, for nothing. A sharded forward takes all ranks."""
    rounds = max(distributed.gather_objects(len(batches)))
    return batches + [([], batches[-1][1])] * (rounds - len(batches))


def by_language(batch, sums, counts):
    """(2, languages) sums and counts per language of per-row values; rows beyond the batch's languages wrap (pairs use row 0..P-1)."""
    out = torch.zeros(2, len(LANGUAGE_SLOTS), dtype=torch.float64 if sums.device.type == "cpu" else torch.float32, device=sums.device)
    languages = batch.languages[:len(sums)]
    out[0].index_add_(0, languages, sums.detach().to(out.dtype))
    out[1].index_add_(0, languages, counts.to(out.dtype))
    return out
