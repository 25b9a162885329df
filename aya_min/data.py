"""Rows in, batches out: what is supervised, the seeded order, right-padded batches.

rows.py says what a line means, lengths.py what is left out. Right padding needs no attention mask: under a
causal mask no real token sees what follows it.
"""

from dataclasses import dataclass, replace
from typing import Optional

import numpy as np
import torch

from . import distributed
from .config import Reading
from .lengths import EARLIER_CUT, NOT_LEARNT, WAS_CUT, LeftOut, fitting_example, fitting_pair
from .rows import (ENDINGS, OF_PAIRS, SHAPES, is_cut, is_plain_text, pair_of, plain_text, prompt_of, read_jsonl,
                   supervised, trained)
from .control_tokens import Spelled

SKIP = Reading(too_long="skip")                     # how examples are read where nothing else is said
EQUAL_SHARE = 0.5                                   # of pairs with two equal answers: more are refused


# ---- examples ----------------------------------------------------------------------------------------------

@dataclass
class Example:
    ids: np.ndarray             # (T,) int32
    mask: np.ndarray            # (T,) bool, True where the token is supervised
    language: str               # its code, "other" without one
    where: str = ""             # "file:line"


@dataclass
class Pair:
    chosen: Example
    rejected: Example
    ref_logps: Optional[np.ndarray] = None      # (2,) nats: the reference's log-probs of the two answers


def encode_example(tokenizer, messages, row, where=""):
    """Prompt and answer to ids and mask; the answer is the LAST turn only, earlier ones are context."""
    ids, mask = tokenizer.encode_chat(messages[:-1], generation_prompt=True)
    answer = tokenizer.encode_answer(messages[-1]["content"])
    mask = np.array([False] * len(mask) + [True] * len(answer))
    return Example(np.array(ids + answer, np.int32), mask, row.get("language") or "other", where)


def encode_conversation(tokenizer, messages, learnt, language, where):
    """A conversation to ids and mask. learnt: for each assistant turn, whether it is supervised."""
    ids, mask = tokenizer.encode_chat(messages)
    mask = np.array(mask)
    if not all(learnt):
        turns = np.cumsum(np.diff(mask, prepend=False) & mask) - 1      # (T,) the answer that a token is of
        mask &= np.array(learnt)[turns]
    return Example(np.array(ids, np.int32), mask, language, where)


def pieces_of(tokenizer, text, limit, language, where):
    """A plain text and its end in pieces of at most `limit` tokens, all supervised but for each BOS."""
    ids = tokenizer.encode(text) + [tokenizer.end_of_turn_id]
    pieces = [np.array([tokenizer.bos_id] + ids[start:start + limit - 1], np.int32)
              for start in range(0, len(ids), limit - 1)]
    return [Example(piece, np.arange(len(piece)) > 0, language, where) for piece in pieces]


def load_examples(paths, tokenizer, limit, reading=SKIP):
    """Supervised examples of JSONL files that fit into `limit` tokens: conversations (see rows.supervised)
    and plain {"text"}. What is left out is counted and reported."""
    examples, left_out, spelled = [], LeftOut(paths, reading, limit), Spelled(tokenizer)
    for path in paths:
        for where, row in read_jsonl(path, reading):
            left_out.total += 1
            language = row.get("language") or "other"
            if is_plain_text(row):
                text = plain_text(row, where)
                messages, learnt = [{"content": text}], [trained(row, "", where) is not False]
                cut = [is_cut(row)]
            else:
                messages, learnt, cut = supervised(row, where)
            spelled.look([message["content"] for message in messages], where)
            if any(cut[:-1]) and not reading.keep_cut:
                left_out.add(EARLIER_CUT, where)
                learnt = [one and not other for one, other in zip(learnt, cut)]
            if cut[-1] and not reading.keep_cut:
                left_out.languages[language] += 1
                left_out.add(WAS_CUT, where)
            elif not any(learnt):
                left_out.add(NOT_LEARNT, where)
            elif is_plain_text(row):
                examples += pieces_of(tokenizer, text, limit, language, where)
            else:
                example = encode_conversation(tokenizer, messages, learnt, language, where)
                examples += fitting_example(tokenizer, example, messages[-1]["content"], left_out)
    spelled.report(paths, left_out.total, reading)
    left_out.report(len(examples), "examples")
    return examples


def load_pairs(paths, tokenizer, limit, reading=SKIP):
    """Preference pairs of JSONL files whose two sides fit into `limit` tokens. What is left out is counted
    and reported: also pairs of answers with the same ids, which teach nothing. Many of these are refused."""
    pairs, equal, left_out, spelled = [], [], LeftOut(paths, reading, limit), Spelled(tokenizer)
    for path in paths:
        for where, row in read_jsonl(path, reading):
            left_out.total += 1
            prompt, *answers, cut, learnt = pair_of(row, where)
            spelled.look([*(message["content"] for message in prompt), *answers], where)
            sides = [encode_example(tokenizer, prompt + [{"role": "assistant", "content": text}], row, where)
                     for text in answers]
            if np.array_equal(sides[0].ids, sides[1].ids):
                equal.append(where)
            elif not learnt:
                left_out.add(NOT_LEARNT, where)
            elif cut and not reading.keep_cut:
                left_out.languages[sides[0].language] += 1
                left_out.add(WAS_CUT, where)
            else:
                fits = fitting_pair(tokenizer, sides, answers, left_out)
                pairs += [Pair(*fits)] if fits else []
    spelled.report(paths, left_out.total, reading)
    if equal:
        text = (f"{len(equal)} of {left_out.total} pairs have the same answer as chosen and rejected: "
                f"{' '.join(equal[:10])}{' ...' if len(equal) > 10 else ''}")
        if len(equal) > EQUAL_SHARE * left_out.total:
            raise ValueError(f"{text}; that is more than {EQUAL_SHARE:.0%}, look at how the pairs were made")
        distributed.say(f"{text}; they are left out", paths)
    left_out.report(len(pairs), "pairs")
    return pairs


# ---- prompts -----------------------------------------------------------------------------------------------

# What belongs to the answer that a row had, or says the prompt another way: a new answer has none of it.
NOT_OF_PROMPTS = {*SHAPES, *ENDINGS, *OF_PAIRS, "system", "weight", "train"}


def load_prompts(paths, reading=None, tokenizer=None):
    """[row, ...] with "prompt", its "prompt_messages" and its "prompt_where", whatever the shape in the file.

    Keys that are not part of an example are kept."""
    rows, spelled = [], Spelled(tokenizer)
    for path in paths:
        for where, row in read_jsonl(path, reading):
            messages = prompt_of(row, where)
            spelled.look([message["content"] for message in messages], where)
            unwanted = NOT_OF_PROMPTS | ({"label"} if type(row.get("label")) is bool else set())
            kept = {key: value for key, value in row.items() if key not in unwanted}
            prompt = messages[0]["content"] if len(messages) == 1 else messages
            rows.append({**kept, "prompt": prompt, "prompt_messages": messages, "prompt_where": where})
    spelled.report(paths, len(rows), reading)
    return rows


def plain(row):
    """A row without what `load_prompts` and arbitrage add to it."""
    return {k: v for k, v in row.items() if k not in ("prompt_messages", "prompt_where", "candidates")}


# ---- batches ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    input_ids: torch.Tensor                         # (B, T), right-padded
    mask: torch.Tensor                              # (B, T) bool, supervised tokens
    lengths: torch.Tensor                           # (B,) tokens
    languages: torch.Tensor                         # (B,) index into slots
    count: int                                      # units that the loss sums over: supervised tokens, pairs or completions
    ref_logps: Optional[torch.Tensor] = None        # (2, B/2) pairs, or (B,) completions, nats
    advantages: Optional[torch.Tensor] = None       # (B,) RLOO
    rewards: Optional[torch.Tensor] = None          # (B,) RLOO, for the log
    cut: Optional[torch.Tensor] = None              # (B,) RLOO, 1 where the answer was cut, for the log
    repeats: Optional[torch.Tensor] = None          # (2, B) an earlier row, or itself, and how many tokens both begin with; None if no two begin alike
    slots: tuple = ("other",)                       # the languages that metrics are told apart by: slots_of
    where: tuple = ()                               # (B,) "file:line" of each row, to name it when its loss is not finite

    @property
    def num_tokens(self):
        return int(self.lengths.sum())

    def to(self, device):
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)})


def slots_of(items):
    """The languages of all items of a run, which are the columns of its metrics: sorted, "other" last."""
    codes = {(item.chosen if isinstance(item, Pair) else item).language for item in items}
    return (*sorted(codes - {"other"}), "other")


def collate(examples, pad_id=0, slots=("other",)):
    """Right-padded batch of supervised examples; count = supervised tokens. What is not in `slots` is other.

    The width is a multiple of 16 tokens: matmul libraries prepare and keep code for each shape they meet."""
    lengths = np.array([len(e.ids) for e in examples])
    places = {code: i for i, code in enumerate(slots)}
    input_ids = np.full((len(examples), -(-lengths.max() // 16) * 16), pad_id, np.int64)
    mask = np.zeros(input_ids.shape, bool)
    for i, e in enumerate(examples):
        input_ids[i, :len(e.ids)], mask[i, :len(e.ids)] = e.ids, e.mask
    languages = torch.tensor([places.get(e.language, places["other"]) for e in examples])
    tensors = (torch.from_numpy(array) for array in (input_ids, mask, lengths))
    return Batch(*tensors, languages, int(mask.sum()), repeats=repeats_of(examples), slots=tuple(slots),
                 where=tuple(e.where for e in examples))


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


def collate_pairs(pairs, pad_id=0, slots=("other",)):
    """2P rows: the chosen answers, then the rejected ones; count = pairs."""
    batch = collate([p.chosen for p in pairs] + [p.rejected for p in pairs], pad_id, slots)
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
