"""Rows become examples, pairs and prompts; examples become right-padded batches in a seeded order.

rows.py decides what a line of JSONL means, lengths.py what is left out. Right padding needs no attention
mask: under the causal mask no real token attends to the padding after it.
"""

from dataclasses import dataclass, field, replace
from typing import Optional

import numpy as np
import torch

from . import critiques, distributed
from .config import Reading
from .control_tokens import Spelled
from .lengths import EARLIER_CUT, NOT_SUPERVISED, WAS_CUT, LeftOut, fitting_example, fitting_pair
from .rows import is_plain_text, learned_of, pair_of, prompt_of, read_jsonl
from .rows_keys import CRITIQUES, ENDINGS, OF_PAIRS, SHAPES
from .span_corruption import corrupted

SKIP = Reading(too_long="skip")     # how load_examples and load_pairs read by default
EQUAL_SHARE = 0.5                   # a file is refused if more of its pairs have two equal answers


# ---- examples ----------------------------------------------------------------------------------------------

@dataclass
class Example:
    ids: np.ndarray             # (T,) int32
    mask: np.ndarray            # (T,) bool, True where the token is supervised
    language: str               # its code, "other" without one
    where: str = ""             # "file:line", for messages
    prompt_key: str = ""        # equal in examples that share a prompt; "" is shared with none (repeats_of)
    critique: int = field(default=0, kw_only=True)      # tokens of a critique, which follow the answer's end

    @property
    def sides(self):
        """The rows that it becomes in a batch."""
        return (self,)


@dataclass
class Pair:
    chosen: Example
    rejected: Example
    ref_logps: Optional[np.ndarray] = None      # (2,) the reference's log-probs of the answers, summed, nats

    @property
    def sides(self):
        return self.chosen, self.rejected


def encode_example(tokenizer, messages, row, where="", prompt_key="", critique=None):
    """An Example of a prompt and its answer, the last message. Only the answer is supervised. critique: a
    text about the answer, which is read after it."""
    ids, mask = tokenizer.encode_chat(messages[:-1], generation_prompt=True, where=where)
    answer = tokenizer.encode_answer(messages[-1]["content"])
    more = critiques.encode(tokenizer, critique) if critique is not None else []
    rest = tokenizer.after + more
    mask = np.array([False] * len(mask) + [True] * len(answer) + [False] * len(rest))
    ids = np.array(ids + answer + rest, np.int32)
    return Example(ids, mask, row.get("language") or "other", where, prompt_key, critique=len(more))


def encode_conversation(tokenizer, messages, supervised, language, where):
    """An Example of a whole conversation. supervised: a bool for each assistant turn."""
    answers = iter(supervised)
    of_turns = [message["role"] == "assistant" and next(answers) for message in messages]
    ids, mask = tokenizer.encode_chat(messages, supervised=of_turns, where=where)
    # A row that is drawn twice into one batch is stored once.
    return Example(np.array(ids, np.int32), np.array(mask), language, where, prompt_key=where)


def conversations_of(tokenizer, messages, supervised):
    """[(messages, supervised), ...]: a conversation as the examples that it becomes. An encoder-decoder has
    one for each answer that is supervised, with the turns before it; a decoder has one for all."""
    if not getattr(tokenizer, "one_answer", False):
        return [(messages, supervised)]
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [(messages[:end + 1], [False] * n + [True]) for n, end in enumerate(ends) if supervised[n]]


def pieces_of(tokenizer, text, limit, language, where, seed=0):
    """[Example, ...] of at most `limit` tokens: a text and its end token, all supervised but for each BOS. Of
    an encoder-decoder: sources from which spans are missing, and targets that say what they were."""
    if getattr(tokenizer, "one_answer", False):
        made = corrupted(tokenizer.encode(text), tokenizer.sentinels, tokenizer.end_of_turn_id, limit, seed,
                         where)
        return [Example(np.array(source + target, np.int32), np.arange(len(source + target)) >= len(source),
                        language, where) for source, target in made]
    ids = tokenizer.encode(text) + [tokenizer.end_of_turn_id]
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = limit - len(begin)
    pieces = [np.array(begin + ids[start:start + room], np.int32) for start in range(0, len(ids), room)]
    return [Example(piece, np.arange(len(piece)) > 0, language, where, prompt_key=where) for piece in pieces]


def examples_of(row, where, tokenizer, limit, reading, left_out, spelled):
    """[Example, ...] of a row: a conversation gives one, a {"text"} its pieces. [] if it is left out.

    left_out, spelled: LeftOut and Spelled, which count the row. ValueError if it is wrong.
    """
    left_out.total += 1
    language = row.get("language") or "other"
    messages, supervised, cut = learned_of(row, where)
    spelled.look([message["content"] for message in messages], where)
    if any(cut[:-1]) and not reading.keep_cut:
        left_out.add(EARLIER_CUT, where)
        supervised = [one and not other for one, other in zip(supervised, cut)]
    if cut[-1] and not reading.keep_cut:
        left_out.languages[language] += 1
        left_out.add(WAS_CUT, where)
        return []
    if not any(supervised):
        left_out.add(NOT_SUPERVISED, where)
        return []
    if is_plain_text(row):
        seed = getattr(reading, "seed", 0)
        return pieces_of(tokenizer, messages[0]["content"], limit, language, where, seed)
    examples = []
    for some, marks in conversations_of(tokenizer, messages, supervised):
        example = encode_conversation(tokenizer, some, marks, language, where)
        examples += fitting_example(tokenizer, example, some[-1]["content"], left_out)
    return examples


def load_examples(paths, tokenizer, limit, reading=SKIP):
    """[Example, ...] of the rows that fit into `limit` tokens: conversations and {"text"}.

    What is left out is counted and reported. ValueError at the first wrong row, or if nothing is left.
    """
    examples, left_out, spelled = [], LeftOut(paths, reading, limit), Spelled(tokenizer)
    for path in paths:
        for where, row in read_jsonl(path, reading):
            examples += examples_of(row, where, tokenizer, limit, reading, left_out, spelled)
    spelled.report(paths, left_out.total, reading)
    left_out.report(len(examples), "examples")
    return examples


def load_pairs(paths, tokenizer, limit, reading=SKIP, with_critiques=False):
    """[Pair, ...] of the rows whose two sides fit into `limit` tokens. with_critiques: whether those of the
    rows are read (critiques.py).

    What is left out is counted and reported. Pairs of answers with the same ids teach nothing and are left
    out too. ValueError at the first wrong row, if more than EQUAL_SHARE of the pairs are such, or if nothing
    is left.
    """
    pairs, equal, left_out, spelled = [], [], LeftOut(paths, reading, limit), Spelled(tokenizer)
    for path in paths:
        for where, row in read_jsonl(path, reading, critiques.OF_PAIR if with_critiques else ()):
            left_out.total += 1
            prompt, *answers, cut, supervised = pair_of(row, where)
            told = critiques.critiques_of_pair(row, where) if with_critiques else (None, None)
            texts = [*answers, *filter(None, told)]
            spelled.look([*(message["content"] for message in prompt), *texts], where)
            sides = [encode_example(tokenizer, prompt + [{"role": "assistant", "content": text}], row, where,
                                    where, critique) for text, critique in zip(answers, told)]
            if np.array_equal(*(side.ids[:len(side.ids) - side.critique] for side in sides)):
                equal.append(where)
            elif not supervised:
                left_out.add(NOT_SUPERVISED, where)
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
            raise ValueError(f"{text}; that is more than {EQUAL_SHARE:.0%}; check how the pairs were made")
        distributed.say(f"{text}; they are left out", paths)
    left_out.report(len(pairs), "pairs")
    return pairs


# ---- prompts -----------------------------------------------------------------------------------------------

# These keys describe the answer that a row had, or hold its prompt in another shape. A new answer has none.
NOT_OF_PROMPTS = {*SHAPES, *ENDINGS, *OF_PAIRS, *CRITIQUES, "system", "weight", "train"}


def load_prompts(paths, reading=None, tokenizer=None):
    """[row, ...] with "prompt", "prompt_messages" and "prompt_where" ("file:line"), from rows of any shape.

    The row's other keys are kept, but for NOT_OF_PROMPTS.
    """
    rows, spelled = [], Spelled(tokenizer)
    for path in paths:
        for where, row in read_jsonl(path, reading):
            messages = prompt_of(row, where)
            spelled.look([message["content"] for message in messages], where)
            if tokenizer:
                tokenizer.turns.texts(messages, where)
            # A label of true or false (KTO) judges the answer; another one says something of the prompt.
            dropped = NOT_OF_PROMPTS | ({"label"} if type(row.get("label")) is bool else set())
            kept = {key: value for key, value in row.items() if key not in dropped}
            prompt = messages[0]["content"] if len(messages) == 1 else messages
            rows.append({**kept, "prompt": prompt, "prompt_messages": messages, "prompt_where": where})
    spelled.report(paths, len(rows), reading)
    return rows


def without_added_keys(row):
    """The row without the keys that `load_prompts` and arbitrage add to it."""
    return {k: v for k, v in row.items() if k not in ("prompt_messages", "prompt_where", "candidates")}


# ---- batches -----------------------------------------------------------------------------------------------

@dataclass
class Batch:
    input_ids: torch.Tensor                         # (B, T), right-padded
    mask: torch.Tensor                              # (B, T) bool, supervised tokens
    lengths: torch.Tensor                           # (B,) tokens
    languages: torch.Tensor                         # (B,) index into slots
    count: int                                      # what the loss sums over: tokens, pairs or completions
    ref_logps: Optional[torch.Tensor] = None        # (2, B/2) pairs, or (B,) completions; summed, nats
    advantages: Optional[torch.Tensor] = None       # rl: (B,), or (N,) of all supervised tokens
    rewards: Optional[torch.Tensor] = None          # rl: (B,), for the log; router: (B, M) of M teachers
    cut: Optional[torch.Tensor] = None              # rl: (B,) 1.0 where the answer was cut, for the log
    rewards_so_far: Optional[torch.Tensor] = None   # reinforce: (2,) sum and number, this batch included
    trained: Optional[torch.Tensor] = None          # with a critic: (B,) 0.0 where the answer has no gradient
    returns: Optional[torch.Tensor] = None          # with a critic: (N,) what it should say
    old_logps: Optional[torch.Tensor] = None        # with a critic: (N,) under the policy that sampled
    critic_errors: Optional[torch.Tensor] = None    # with a critic: (2, B), for the log, see rollouts.py
    # (2, B): an earlier row with the same beginning (or the row itself), and the tokens that both begin with.
    # None if no row shares its beginning with an earlier one.
    repeats: Optional[torch.Tensor] = None
    slots: tuple = ("other",)                       # the languages of the metrics, see slots_of
    where: tuple = ()                               # B times "file:line", for messages

    @property
    def num_tokens(self):
        return int(self.lengths.sum())

    def to(self, device):
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)})


def slots_of(*lists):
    """The languages of all items, which are the columns of a run's metrics: sorted, "other" last.

    A list that reads its items when they are used (mixture_stream.Stream) knows its languages."""
    codes = set()
    for items in lists:
        known = getattr(items, "languages", None)
        codes |= {item.sides[0].language for item in items} if known is None else known
    return (*sorted(codes - {"other"}), "other")


def rows_of(items):
    """The rows of a batch of these items: examples as they are; of pairs all chosen sides, then all rejected
    ones."""
    return [side for sides in zip(*(item.sides for item in items)) for side in sides]


def collate(examples, pad_id=0, slots=("other",)):
    """A right-padded Batch of Examples; count is the number of supervised tokens.

    A language that is not in `slots` counts as "other". The width is a multiple of 16 tokens, because matmul
    libraries prepare and keep code for each shape they meet.
    """
    lengths = np.array([len(e.ids) for e in examples])
    places = {code: i for i, code in enumerate(slots)}
    width = -(-lengths.max() // 16) * 16
    input_ids = np.full((len(examples), width), pad_id, np.int64)
    mask = np.zeros(input_ids.shape, bool)
    for i, e in enumerate(examples):
        input_ids[i, :len(e.ids)] = e.ids
        mask[i, :len(e.ids)] = e.mask
    languages = torch.tensor([places.get(e.language, places["other"]) for e in examples])
    tensors = (torch.from_numpy(array) for array in (input_ids, mask, lengths))
    return Batch(*tensors, languages, int(mask.sum()), repeats=repeats_of(examples), slots=tuple(slots),
                 where=tuple(e.where for e in examples))


def repeats_of(examples):
    """Batch.repeats (2, B), or None. Only examples with the same prompt_key are compared.

    Such are the two sides of a pair, the samples of one prompt, and a row that was drawn twice.
    """
    first = []                      # for each example the first one with its key
    seen = {}
    for i, e in enumerate(examples):
        first.append(seen.setdefault(e.prompt_key or i, i))
    shared = [0 if i == j else common_start(examples[i].ids, examples[j].ids) for i, j in enumerate(first)]
    return torch.tensor([first, shared]) if any(shared) else None


def common_start(a, b):
    """The number of tokens that two texts begin with in common."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def collate_pairs(pairs, pad_id=0, slots=("other",)):
    """A Batch of 2P rows for P pairs: the chosen sides, then the rejected ones; count is P."""
    batch = collate(rows_of(pairs), pad_id, slots)
    batch.count = len(pairs)
    if pairs[0].ref_logps is not None:
        ref_logps = np.stack([p.ref_logps for p in pairs], 1).astype(np.float32)        # (2, P)
        batch.ref_logps = torch.from_numpy(ref_logps)
    return batch


def length_of(item):
    """Tokens of an Example, or of the longer side of a Pair."""
    return max(len(side.ids) for side in item.sides)


def lengths_of(items):
    """(N,) length_of each item. A list that reads its items when they are used estimates them."""
    known = getattr(items, "lengths", None)
    return [length_of(item) for item in items] if known is None else known


class Sampler:
    """The seeded order of a data set. Its state is one integer, the global position; all ranks agree on it.

    Each epoch is a permutation in which neighbours have similar lengths, so that padding is small: windows of
    16 batches (or of a quarter of a small data set) are sorted by length, then the batches are shuffled.
    Every example comes once an epoch, at any number of ranks.
    """

    def __init__(self, lengths, batch_size, seed):
        if len(lengths) < batch_size:
            raise ValueError(f"{len(lengths)} examples are fewer than one batch of {batch_size}; "
                             "lower --batch-size or give more data")
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self._epoch, self._order = None, None       # the epoch that was computed last, and its order

    def order(self, epoch):
        """(N,) the indices of all examples in the order of an epoch."""
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            shuffled = rng.permutation(len(self.lengths))
            size = self.batch_size * max(1, min(16, len(shuffled) // self.batch_size // 4))
            windows = np.split(shuffled, range(size, len(shuffled), size))
            flat = np.concatenate([w[np.argsort(self.lengths[w], kind="stable")] for w in windows])
            batches = np.split(flat, range(self.batch_size, len(flat), self.batch_size))
            # A last batch that is not whole stays the last.
            whole = len(batches) - (len(batches[-1]) < self.batch_size)
            batches = [batches[i] for i in rng.permutation(whole)] + batches[whole:]
            self._epoch, self._order = epoch, np.concatenate(batches)
        return self._order

    def take(self, position, count):
        """(count,) the indices of the examples from a global position on, across the ends of epochs."""
        indices, N = [], len(self.lengths)
        while count:
            epoch, offset = divmod(position, N)
            piece = self.order(epoch)[offset:offset + count]
            indices.append(piece)
            position += len(piece)
            count -= len(piece)
        return np.concatenate(indices)


def count_steps(num_items, settings):
    """The steps of a run: --max-steps, or else the steps that --epochs takes."""
    num_batches = -(-int(settings.epochs * num_items) // settings.batch_size)
    num_steps = settings.max_steps or num_batches * settings.gradient_steps
    if num_steps < 1:
        raise ValueError(f"--epochs {settings.epochs} of {num_items} examples is less than one example; "
                         "give more, or --max-steps")
    return num_steps


def make_batches(items, collate_fn, settings):
    """(num_steps, batches): batches(step) is the list of this rank's micro-batches of a step.

    It depends on the step alone, so that a run can resume anywhere. Rank r of n takes every n-th example of
    the global batch, from the r-th on, so that all ranks get similar lengths.
    """
    sampler = Sampler(lengths_of(items), settings.batch_size, settings.seed)
    num_steps = count_steps(len(items), settings)
    rank, ranks = distributed.rank(), distributed.num_ranks()

    def batches(step):
        mine = sampler.take(step * settings.batch_size, settings.batch_size)[rank::ranks]
        size = settings.micro_batch_size or len(mine)
        parts = [mine[start:start + size] for start in range(0, len(mine), size)]
        return [collate_fn([items[i] for i in part]) for part in parts]

    return num_steps, batches


def batches_in_order(items, collate_fn, size=64):
    """[(indices, batch), ...] of this rank's share of all items, sorted by length. Evaluation and reference
    log-probs use it."""
    mine = list(range(distributed.rank(), len(items), distributed.num_ranks()))
    mine.sort(key=lambda i: length_of(items[i]))
    if items and not mine:
        # A sharded forward needs all ranks: one without items runs a batch whose results nobody reads.
        return [([], collate_fn(items[:1]))]
    parts = [mine[start:start + size] for start in range(0, len(mine), size)]
    return [(part, collate_fn([items[i] for i in part])) for part in parts]


def in_step(batches):
    """Pads this rank's batches_in_order with repeats of its last batch, whose results nobody reads, so that
    all ranks run the same number of forwards (FSDP requires it)."""
    num_forwards = max(distributed.gather_objects(len(batches)))
    return batches + [([], batches[-1][1])] * (num_forwards - len(batches))
