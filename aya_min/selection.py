"""Choosing what to train on while training: RHO-LOSS (arXiv 2206.07137), its relatives, and what one run
chose, replayed by another (Goldilocks, arXiv 2107.02565).

Each step draws a large batch, select_from times as many examples as it will train on, evenly at random. The
model as it is scores them without a gradient, and the best are trained on, as if the data had held just them:

    rho            L(y | x; model) - L(y | x; irreducible-loss model)       eq. 3 of the paper
    loss           L(y | x; model)
    irreducible    - L(y | x; irreducible-loss model)                       easy examples first
    grad-norm      the mean of the norms of the gradients at the logits     arXiv 1803.00942, eq. 20
    uniform        a number drawn by seed and step

L is the mean over the example's supervised tokens, not their sum: by the sum, long answers would be chosen
for their length, whatever a token of them teaches. For a class label, the paper's case, both are the same.

The norm of the gradient of L is at most the mean over the tokens of |softmax(z_t) - onehot(y_t)|, times a
factor that is taken to be alike for all examples. It is left out, as are logit_scale and a soft cap's slope.

--select-tokens chooses tokens by the same scores, each token's own, from a plain batch (RHO-1, arXiv
2404.07965). A departure: there a token is chosen among those of a forward; here among those of the step.

The scores are gathered from all ranks and one order is made of them, so that a step chooses the same at any
number of ranks and micro-batches and after a resume. They are rounded to ROUNDING nats, because the same
example scored in another batch differs in its last bits; equal scores go to the lower index. What was chosen
is written to RUN/selected.jsonl: a line that names the examples, then a line for each step.
"""

import hashlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from . import checkpoint, distributed, irreducible
from .data import Batch, Sampler, batches_in_order, collate, in_step, length_of
from .files import parse_object, read_bytes, write_whole
from .loop import autocast, json_line, write_metrics
from .reference import answer_logps, check_logps, reference_rows
from .token_logps import CHUNK_LOGITS

ROUNDING = 1e-5             # nats
FILE = "selected.jsonl"
# What a step logs besides. scoring_seconds: of drawing, scoring and choosing, which `seconds` contains.
# selection/score: the mean score of what was chosen; selection/score_of_all: of the large batch, or of all
# tokens. selected/LANGUAGE: which share of the large batch's examples (or tokens) of a language was chosen.
METRICS = ("selected", "selection/score", "selection/score_of_all", "scoring_seconds")


@dataclass
class SelectedBatch(Batch):
    selection: Optional[torch.Tensor] = None    # (METRICS, 2, slots) sums and counts, in one batch of a step


@dataclass
class Choice:
    """What a step trains on. examples: indices, in order of length. tokens: None, or for each example the
    positions that are supervised still. units: [(index of its example, score, whether it is chosen), ...] of
    all that was drawn, examples or tokens; [] where nothing was."""
    examples: list
    tokens: Optional[list] = None
    units: list = field(default_factory=list)


# ---- scores ------------------------------------------------------------------------------------------------

def gradients_at_logits(model, batch):
    """The norm of softmax(z) - onehot(y) at each supervised token, (tokens,)."""
    logits = model(batch.input_ids, None, batch.lengths, batch.repeats)             # (B, T, V)
    gradient = logits[:, :-1][batch.mask[:, 1:]].float().softmax(-1)                # (tokens, V)
    gradient[torch.arange(len(gradient)), batch.input_ids[batch.mask]] -= 1
    return gradient.norm(dim=-1)


def rows_at_once(settings, config, items):
    """Rows of a forward that scores. Where it makes all logits, as few as CHUNK_LOGITS allows, at least 1."""
    if settings.select != "grad-norm":
        return reference_rows(settings)
    return max(1, min(reference_rows(settings),
                      CHUNK_LOGITS // (config.vocab_size * max(map(length_of, items)))))


@torch.no_grad()
def gradient_norms(model, items, pad_id, device, settings):
    """[gradients_at_logits of each example], on every rank; the ranks share the work. A collective."""
    was_training, done = model.training, []
    model.eval()
    size = rows_at_once(settings, model.config, items)
    for indices, batch in in_step(batches_in_order(items, lambda some: collate(some, pad_id), size)):
        batch = batch.to(device)
        with autocast(model, settings, device):
            norms = gradients_at_logits(model, batch).cpu()
        done += zip(indices, [each.clone() for each in norms.split(batch.mask.sum(1).tolist())])
    model.train(was_training)
    norms = dict(sum(distributed.gather_objects(done), []))
    return [norms[i] for i in range(len(items))]


def token_scores(model, items, pad_id, device, settings, known):
    """[(tokens,) of each example], in nats, of --select but uniform. known: its irreducible losses, or None.
    A collective; ValueError for a score that is not finite."""
    if settings.select == "irreducible":
        return [-losses for losses in known]
    if settings.select == "grad-norm":
        norms = gradient_norms(model, items, pad_id, device, settings)
        check_logps(torch.stack([each.sum() for each in norms]), items, "the model", model)
        return norms
    size = rows_at_once(settings, model.config, items)
    logps = answer_logps(model, items, pad_id, device, settings, size, "the model", by_token=True)
    return [-own - (losses if known else 0) for own, losses in zip(logps, known or logps)]


def rounded(scores):
    return [round(score / ROUNDING) * ROUNDING for score in scores]


def best(scores, indices, count):
    """The places of the `count` highest scores; equal ones go to the lower index, then to the earlier
    place."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], indices[place], place))
    return order[:count]


# ---- choosing ----------------------------------------------------------------------------------------------

def sha256_of_examples(items):
    return hashlib.sha256(irreducible.prints_of(items).numpy().tobytes()).hexdigest()


class Selector:
    """Chooses the examples, or tokens, of each step of a training.

    items: all Examples. limit: the most tokens of one. num_steps: of the training. Raises ValueError for
    files that are of other examples, and for a large batch that is more than all of them."""

    def __init__(self, items, tokenizer, limit, settings, num_steps):
        self.items, self.settings, self.pad_id = items, settings, tokenizer.pad_id
        self.known, self.replayed = None, None
        self.print = sha256_of_examples(items)
        size = settings.batch_size * (settings.select_from or 1)
        if size > len(items):
            parts = f"--batch-size {settings.batch_size}"
            parts += f" times --select-from {settings.select_from}" if settings.select_from else ""
            raise ValueError(f"{parts} is {size}, more than the {len(items)} examples; lower one of them, or "
                             "give more data")
        # Examples of one length are those of a few languages and tasks, so the large batch must not be drawn
        # by length as a plain batch is. For the Sampler all lengths are the same.
        self.size, self.sampler = size, Sampler(np.zeros(len(items)), size, settings.seed)
        if settings.irreducible:
            self.known = irreducible.read(settings.irreducible, items, tokenizer, limit)
        if settings.replay:
            self.replayed = distributed.from_main(lambda: self.read(Path(settings.replay), num_steps))

    @property
    def files(self):
        """{setting: path} of the files that it reads."""
        paths = {name: getattr(self.settings, name) for name in ("irreducible", "replay")}
        return {name: path for name, path in paths.items() if path}

    def choose(self, model, step, device):
        """The Choice of a step. A collective."""
        if self.replayed:
            line = self.replayed[step]
            return Choice(line["examples"], line.get("tokens"))
        drawn = self.sampler.take(step * self.size, self.size).tolist()
        if self.settings.select_tokens:
            return self.choose_tokens(drawn, self.scores(model, drawn, step, device))
        scores = rounded(float(each.mean()) for each in self.scores(model, drawn, step, device))
        chosen = set(best(scores, drawn, self.settings.batch_size))
        units = [(index, scores[i], i in chosen) for i, index in enumerate(drawn)]
        return Choice(sorted((drawn[i] for i in chosen), key=self.place), None, units)

    def scores(self, model, drawn, step, device):
        """[(tokens,) of each drawn example]; of uniform without --select-tokens one number for each."""
        items, settings = [self.items[i] for i in drawn], self.settings
        if settings.select == "uniform":
            rng = np.random.default_rng([settings.seed, step, 1])
            counts = [int(item.mask.sum()) if settings.select_tokens else 1 for item in items]
            return [torch.from_numpy(rng.random(count)) for count in counts]
        known = self.known and [self.known[i] for i in drawn]
        return token_scores(model, items, self.pad_id, device, settings, known)

    def place(self, index):
        """Where a chosen example stands in its batch: as in a plain one, ranks get similar lengths."""
        return length_of(self.items[index]), index

    def choose_tokens(self, drawn, scores):
        """The Choice of the best of a batch's supervised tokens. scores: (tokens,) of each drawn example."""
        owners = [i for i, each in enumerate(scores) for _ in each]
        flat = rounded(torch.cat(scores).tolist())
        positions = np.concatenate([np.flatnonzero(self.items[i].mask) for i in drawn]).tolist()
        indices = [drawn[i] for i in owners]
        chosen = set(best(flat, indices, max(1, round(self.settings.select_tokens * len(flat)))))
        kept = [[] for _ in drawn]
        for token in sorted(chosen):
            kept[owners[token]].append(positions[token])
        order = sorted(range(len(drawn)), key=lambda i: self.place(drawn[i]))
        units = [(index, score, token in chosen) for token, (index, score) in enumerate(zip(indices, flat))]
        return Choice([drawn[i] for i in order], [kept[i] for i in order], units)

    # ---- batches -------------------------------------------------------------------------------------------

    def batches(self, model, collate_fn, slots, device, folder):
        """batches(step) -> this rank's micro-batches of what is chosen, like those of data.make_batches. It
        also writes the choice to folder/selected.jsonl."""
        rank, ranks = distributed.rank(), distributed.num_ranks()

        def of_step(step):
            started = time.perf_counter()
            choice = self.choose(model, step, device)
            write_metrics(folder / FILE, {"step": step, **self.line(choice)})
            examples = [self.items[i] for i in choice.examples]
            if choice.tokens is not None:
                examples = [with_tokens(*both) for both in zip(examples, choice.tokens)]
            table = self.table(choice, slots, time.perf_counter() - started)
            # Every rank logs the same names, rank 0 the figures, which are those of the whole step.
            table = (table if rank == 0 else torch.zeros_like(table)).to(metrics_dtype(device))
            mine = examples[rank::ranks]
            size = self.settings.micro_batch_size or len(mine)
            parts = [collate_fn(mine[start:start + size]) for start in range(0, len(mine), size)]
            return [SelectedBatch(**vars(parts[0]), selection=table), *parts[1:]]
        return of_step

    def table(self, choice, slots, seconds):
        """(METRICS, 2, slots) sums and counts of a step, see METRICS; what it has no figures of is 0."""
        places = {code: i for i, code in enumerate(slots)}
        table = np.zeros((len(METRICS), 2, len(slots)))
        table[3, :, 0] = seconds, 1
        if choice.units:
            indices, scores, taken = zip(*choice.units)
            where = [places.get(self.items[i].language, places["other"]) for i in indices]
            scores, taken = np.array(scores), np.array(taken)
            ones = np.ones(len(where))
            pairs = [(taken, ones)]
            if self.settings.select != "uniform":           # whose scores are drawn
                pairs += [(scores * taken, taken), (scores, ones)]
            for row, pair in zip(table, pairs):
                row[:] = [np.bincount(where, values, len(slots)) for values in pair]
        return torch.from_numpy(table)

    # ---- the file ------------------------------------------------------------------------------------------

    def line(self, choice):
        """A step's line of selected.jsonl without its step. examples: their places among all that were read,
        from 0; where: the rows that they come from; tokens: see Choice."""
        where = [self.items[i].where for i in choice.examples]
        tokens = {} if choice.tokens is None else {"tokens": choice.tokens}
        return {"examples": choice.examples, "where": where, **tokens}

    def begin(self, folder, done):
        """Begin selected.jsonl, or after a resume keep the lines of the steps that are done. On rank 0."""
        path = folder / FILE
        lines = read_lines(path)[1:] if path.exists() else []
        if [line["step"] for line in lines[:done]] != list(range(done)):
            raise ValueError(f"{path}: not the lines of the {done} steps that are done; start anew with "
                             "--out")
        head = {"of": len(self.items), "sha256": self.print, "batch_size": self.settings.batch_size}
        write_whole(path, "".join(map(json_line, [head, *lines[:done]])))

    def read(self, path, num_steps):
        """The lines of the steps of another run's selected.jsonl. ValueError if they are not of these
        examples and --batch-size, or are too few."""
        head, *lines = read_lines(path)
        size = self.settings.batch_size
        if (head.get("of"), head.get("sha256")) != (len(self.items), self.print):
            raise ValueError(f"--replay {path}: chosen from other examples ({head.get('of')}, here "
                             f"{len(self.items)}); give the --data, --max-length and tokenizer of that run")
        if head.get("batch_size") != size:
            raise ValueError(f"--replay {path}: its batches have {head.get('batch_size')} examples; give "
                             "that as --batch-size")
        if len(lines) < num_steps:
            raise ValueError(f"--replay {path}: {len(lines)} steps, fewer than the {num_steps} of this run; "
                             f"give --max-steps {len(lines)}")
        for step, line in enumerate(lines):
            if not self.is_line(line, step):
                raise ValueError(f"{path}:{step + 2}: not what a run chose in step {step}; copy it again")
        return lines

    def is_line(self, line, step):
        """Whether it is a step's line as `line` writes it."""
        examples, tokens = line.get("examples"), line.get("tokens")
        right = line["step"] == step and is_list_of(examples, len(self.items))
        right = right and len(examples) == self.settings.batch_size
        if not right or tokens is None:
            return right
        return isinstance(tokens, list) and len(tokens) == len(examples) and any(tokens) and all(
            is_list_of(each, len(self.items[i].ids)) and self.items[i].mask[each].all()
            for i, each in zip(examples, tokens))


def is_list_of(value, end):
    """Whether a value is a list of whole numbers from 0 to end - 1."""
    return isinstance(value, list) and all(type(each) is int and 0 <= each < end for each in value)


def read_lines(path):
    """[the first line, the line of step 0, ...] of a selected.jsonl, without a last line that a kill cut
    short. ValueError for a file that is none."""
    lines = read_bytes(path).split(b"\n")[:-1]
    rows = [parse_object(line, f"{path}:{number}", "copy it again") for number, line in enumerate(lines, 1)]
    if not rows or "of" not in rows[0] or not all(type(row.get("step")) is int for row in rows[1:]):
        raise ValueError(f"{path}: not what a run chose; give the {FILE} of a run with --select")
    return rows


def with_tokens(example, positions):
    """The example with these positions supervised alone."""
    mask = np.zeros_like(example.mask)
    mask[positions] = True
    return replace(example, mask=mask)


def metrics_dtype(device):
    """That of losses.by_language."""
    return torch.float64 if device.type == "cpu" else torch.float32


def logged(loss_fn):
    """loss_fn(model, batch) that also returns METRICS, of a batch that has them."""
    def with_metrics(model, batch):
        loss, metrics = loss_fn(model, batch)
        table = getattr(batch, "selection", None)
        return loss, metrics if table is None else metrics | dict(zip(METRICS, table))
    return with_metrics


def begin(selector, model, loss_fn, collate_fn, slots, device, folder):
    """(batches, loss_fn) of a training in a runs.RunFolder that chooses by this Selector."""
    done = checkpoint.step_of(folder.state) if folder.state else 0
    distributed.from_main(lambda: selector.begin(folder.path, done))
    return selector.batches(model, collate_fn, slots, device, folder.path), logged(loss_fn)
