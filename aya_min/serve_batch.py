"""The server's requests on the engine: they join a batch while it runs, and leave it when they are done.

As in sampling.complete, a free row takes the next request at once, the samples of a prompt share its prefill,
and an answer does not depend on the other rows. Here each row has its own sampling settings, requests arrive
while others run, and one that nobody waits for any more gives its rows back.

One thread, the Worker, owns the models. Requests come to it in a deque, and it tells of news by a function.
"""

import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass

import torch

from .command import OUR_FAULT
from .distributed import say
from .engine import choose
from .sampling import (PREFILL_TOKENS, Row, engine_of, free_slots, fused_of, next_group, not_finite,
                       stop_test, uniforms_of)

# Seconds between two pieces of a streamed answer, and the pieces that all answers together get in a second.
# To send each token by itself takes the model's thread its time: Python runs one thread at once.
PIECE_SECONDS, PIECES_PER_SECOND = 0.05, 500
# Steps in which prompts gather before their prefill while most rows are busy: one prefill of three prompts
# takes little longer than that of one.
GATHER = 3


@dataclass(eq=False)
class Request:
    """num_samples answers to a prompt (ids), each of at most `limit` tokens.

    sampling: temperature, top-k, top-p, min-p. num_top: the likeliest tokens whose log-probs are kept at each
    place, None for no log-probs at all.
    """
    prompt: list
    num_samples: int
    limit: int
    sampling: tuple
    seed: int
    stop_strings: tuple
    num_top: int | None
    is_streamed: bool

    def __post_init__(self):
        def uniforms(sample):
            return uniforms_of(self.seed, sample, self.limit) if self.sampling[0] else None
        self.rows = [Row(self, i, len(self.prompt), self.limit, uniforms(i)) for i in range(self.num_samples)]
        # Of each sample, for each of its tokens: (log-prob in nats, [(likely id, log-prob), ...]).
        self.logps = [[] for _ in self.rows]
        self.stopped = None         # see sampling.stop_test
        self.error = None           # why the model could not answer
        self.is_left = False        # nobody waits for the answers any more
        self.due = 0.0              # the time at which the next piece is told of

    def is_over(self):
        return self.is_left or self.error is not None

    def is_done(self):
        return self.error is not None or all(row.finish_reason for row in self.rows)


class Batch:
    """The rows of one model: `slots` of them, of max_tokens tokens each. `add` may be called in any thread,
    all other methods in the Worker's."""

    def __init__(self, name, model, tokenizer, slots, max_tokens):
        self.name, self.tokenizer, self.slots, self.max_tokens = name, tokenizer, slots, max_tokens
        self.stop_ids = set(tokenizer.stop_ids)
        with torch.no_grad():
            self.engine = engine_of(fused_of(model), slots, max_tokens, 1, None)
        self.fault = not_finite(model, name, ["the prompt"])
        # As in sampling.complete: ready holds (row, keys and values of its group, its index in them).
        self.waiting, self.ready, self.rows, self.gathered = deque(), deque(), [], 0
        self.joining = []           # the requests that are being prefilled

    def add(self, request):
        request.stopped = stop_test(request.stop_strings, self.tokenizer.decode)
        self.waiting.append(request)

    def is_busy(self):
        return bool(self.waiting or self.ready or self.rows)

    def step(self):
        """Let the next prompts in, if rows are free, and decode a token of each row. Returns the requests of
        which there is news. A prefill is short, so that the rows never wait long for their next token."""
        news = set()
        free_slots(self.engine, self.rows, [i for i, row in enumerate(self.rows) if row.prompt.is_over()])
        if len(self.rows) < self.slots and self.waiting and not self.ready:
            self.gathered += 1
            if self.gathered >= GATHER or 2 * len(self.rows) <= self.slots:
                self.gathered = 0
                self.prefill(news)
        while self.ready and len(self.rows) < self.slots:
            row, kept, p = self.ready.popleft()
            if not row.prompt.is_over():
                self.engine.place(len(self.rows), row, kept, p)
                self.rows.append(row)
        if self.rows:
            logits = self.engine.step(len(self.rows), max(row.length for row in self.rows))
            tokens = self.choose(logits, self.rows)
            self.engine.append(len(self.rows), tokens)
            ended = self.take(self.rows, tokens, news)
            free_slots(self.engine, self.rows, [i for i, has_ended in enumerate(ended) if has_ended])
        return news

    def prefill(self, news):
        group = next_group(self.waiting, lambda r: len(r.prompt), PREFILL_TOKENS[self.engine.device.type])
        self.joining = group = [request for request in group if not request.is_over()]
        if not group:
            return
        logits, kept = self.engine.prefill([request.prompt for request in group])
        made = [(row, p) for p, request in enumerate(group) for row in request.rows]
        rows = [row for row, _ in made]
        ended = self.take(rows, self.choose(logits[[p for _, p in made]], rows), news)
        self.ready.extend((row, kept, p) for (row, p), has_ended in zip(made, ended) if not has_ended)

    def choose(self, logits, rows):
        """The next tokens (n,) of rows from their logits (n, V), which are overwritten. Keeps the log-probs
        that were asked for: those of the model itself, at temperature 1 and before any filter."""
        wanted = [i for i, row in enumerate(rows) if row.prompt.num_top is not None]
        plain = logits[wanted].log_softmax(-1) if wanted else ()            # (wanted, V)
        tokens, finite = self.choose_in_groups(logits, rows)
        for row, is_finite in zip(rows, finite.tolist()):
            if not is_finite:
                row.prompt.error = str(self.fault(0, len(row.ids), "the log-prob"))
        for i, logps in zip(wanted, plain):
            request, likely = rows[i].prompt, logps.topk(min(rows[i].prompt.num_top, len(logps)))
            request.logps[rows[i].sample].append(
                (logps[tokens[i]].item(), [*zip(likely.indices.tolist(), likely.values.tolist())]))
        return tokens

    def choose_in_groups(self, logits, rows):
        """(tokens (n,), whether their log-probs are finite (n,)); rows of equal settings choose together."""
        groups = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.prompt.sampling, []).append(i)
        tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
        finite = torch.empty(len(rows), dtype=torch.bool, device=logits.device)
        for sampling, members in groups.items():
            uniforms = None
            if sampling[0]:
                drawn = [rows[i].uniforms[len(rows[i].ids)] for i in members]
                uniforms = torch.tensor(drawn, device=logits.device)
            tokens[members], logps = choose(logits if len(groups) == 1 else logits[members], uniforms,
                                            *sampling)
            finite[members] = logps.isfinite()
        return tokens, finite

    def take(self, rows, tokens, news):
        """Append tokens (n,) to the rows. Returns for each whether it has ended, and adds to `news`."""
        now, ended = time.monotonic(), []
        due = now + max(PIECE_SECONDS, len(self.rows) / PIECES_PER_SECOND)
        for row, token in zip(rows, tokens.tolist()):
            request = row.prompt
            has_ended = request.error is not None or row.add(token, 0.0, self.stop_ids, request.stopped)
            ended.append(has_ended)
            if has_ended or request.is_streamed and now >= request.due:
                request.due = due
                news.add(request)
        return ended

    def give_up(self, error):
        """After a fault of ours: end all requests with this error, and return them."""
        lost = {row.prompt for row in (*self.rows, *(row for row, _, _ in self.ready))} | set(self.joining)
        while self.waiting:
            lost.add(self.waiting.popleft())
        self.rows, self.ready, self.joining = [], deque(), []
        for request in lost:
            request.error = error
        return lost


class Worker(threading.Thread):
    """The thread that owns the models; of several, each busy one makes a step in turn.

    tell(requests): called in this thread with the requests of which there is news.
    """

    def __init__(self, batches, tell):
        super().__init__(name="models", daemon=True)
        self.batches, self.tell = batches, tell
        self.changed, self.is_closed = threading.Condition(), False

    def add(self, batch, request):
        with self.changed:
            batch.add(request)
            self.changed.notify()

    def close(self):
        """Let the thread end after its current step, and wait for it."""
        with self.changed:
            self.is_closed = True
            self.changed.notify()
        self.join()

    def run(self):
        with torch.inference_mode():
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.is_closed or any(b.is_busy() for b in self.batches))
                if self.is_closed:
                    return
                for batch in self.batches:
                    if batch.is_busy() and (news := self.step(batch)):
                        self.tell(news)

    def step(self, batch):
        """A step of a batch. After a fault of this program its requests end, and the server goes on."""
        try:
            return batch.step()
        except Exception as error:
            traceback.print_exc()
            say(f"{batch.name}: {OUR_FAULT}; its requests are answered with an error, the server goes on")
            return batch.give_up(f"{type(error).__name__}: a fault of the server, which shows it in full")
