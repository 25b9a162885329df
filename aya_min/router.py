"""The learned router of multilingual arbitrage (arXiv 2408.14960): a small model that chooses, from the
prompt alone, the one teacher that shall answer it, so that generation costs 1/M of asking all M teachers.

It learns from candidates with rewards, which a reward route has made:

    loss(x) = KL(softmax(rewards / tau) || router(x))

The paper publishes neither tau nor how the target is made. Ours: a teacher's reward for a prompt is the mean
over its usable answers, which is what one answer of it is worth. A teacher without one (empty, cut, in the
wrong language, without a score) has the reward -inf and the target 0. The model is model.Router, the loss
losses.router_loss.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import distributed
from .command import shortened
from .data import Example, batches_in_order, collate, in_step, load_prompts
from .lengths import cut_left, fit_prompts
from .model import RouterConfig
from .preferences import usable
from .rows import read_jsonl


@dataclass
class RoutedPrompt(Example):
    """A prompt, of which no token is supervised, and what each of the teachers is worth on it."""
    teachers: tuple = ()
    rewards: tuple = ()         # the mean reward of each teacher's usable answers, -inf without one
    tokens: tuple = ()          # tokens that one answer of each teacher takes, by the router's tokenizer
    samples: float = 1.0        # answers of each teacher


# ---- candidates become items -------------------------------------------------------------------------------

def candidates_of(row, where):
    """The candidates of a row. ValueError unless each has a teacher, a completion, and a reward or null."""
    found = row.get("candidates")
    if not isinstance(found, list) or not found:
        raise ValueError(f"{where}: no 'candidates' in keys {sorted(row)}; give the file that generate.py "
                         "--models A B --candidates FILE wrote")
    for i, c in enumerate(found):
        texts = isinstance(c, dict) and all(isinstance(c.get(key), str) for key in ("teacher", "completion"))
        reward = c.get("reward") if texts else None
        if not texts or not (reward is None or type(reward) in (int, float) and math.isfinite(reward)):
            raise ValueError(f"{where}: candidates[{i}] {shortened(c)} needs a teacher, a completion and a "
                             "reward (a finite number, or null for none)")
    return found


def teachers_in(paths, reading=None):
    """The teachers of all candidates in files, sorted. ValueError for fewer than two, or without rewards."""
    candidates = [c for path in paths for where, row in read_jsonl(path, reading)
                  for c in candidates_of(row, where)]
    names, files = sorted({c["teacher"] for c in candidates}), " ".join(map(str, paths))
    if len(names) < 2:
        raise ValueError(f"{files}: all candidates are of the teacher {names[0]}; a router chooses among two "
                         "or more")
    if all(c.get("reward") is None for c in candidates):
        raise ValueError(f"{files}: no candidate has a reward; score them: generate.py --models ... "
                         "--arbiter RM --candidates FILE")
    return names


def head(paths, settings):
    """The function config -> RouterConfig for the teachers of these files. Without files (a dry run) there
    are two teachers: the head is small beside the decoder."""
    names = teachers_in(paths, settings) if paths else ["A", "B"]

    def to_config(config):
        before = getattr(config, "teachers", names)
        if before != names:
            raise ValueError(f"--model is a router for other teachers ({' '.join(before)}) than those of the "
                             f"candidates ({' '.join(names)}); give a language model")
        return RouterConfig.of(config, teachers=names, tau=settings.tau)
    return to_config


def prompt_example(tokenizer, row, room):
    """An Example of a row's prompt, which loses its oldest tokens if it is longer than `room`."""
    ids = cut_left(tokenizer.encode_prompt(row["prompt_messages"]), room)
    return Example(np.array(ids, np.int32), np.zeros(len(ids), bool), row.get("language") or "other",
                   row.get("prompt_where", ""))


def load_candidates(paths, tokenizer, limit, settings):
    """[RoutedPrompt, ...] of files of rows with "candidates". Prompts without a usable answer that has a
    reward are counted and left out; --too-long decides on prompts of more than `limit` tokens."""
    names = teachers_in(paths, settings)
    rows = load_prompts(paths, settings, tokenizer)
    items = [(row, values_of(row, names, tokenizer, settings.keep_cut)) for row in rows]
    kept = [(row, values) for row, values in items if max(values["rewards"]) > -math.inf]
    if len(kept) < len(rows):
        say = f"{len(rows) - len(kept)} of {len(rows)} prompts have no usable answer with a reward"
        if not kept:
            raise ValueError(f"{' '.join(map(str, paths))}: {say}; nothing is left to learn from, see "
                             "--keep-cut")
        distributed.say(f"{say} and are left out", paths)
    lengths = {id(row): len(tokenizer.encode_prompt(row["prompt_messages"])) for row, _ in kept}
    fits = fit_prompts([row for row, _ in kept], lambda row: lengths[id(row)], limit, settings.too_long,
                       "the router's positions, or --max-length")
    fits = {id(row) for row in fits}
    return [RoutedPrompt(**vars(prompt_example(tokenizer, row, limit)), **values)
            for row, values in kept if id(row) in fits]


def values_of(row, names, tokenizer, keep_cut):
    """The fields of a RoutedPrompt that say what the teachers are worth on its row."""
    options, _ = usable(row, keep_cut)
    rewards, tokens = [], []
    for name in names:
        own = [c["reward"] for c in options if c["teacher"] == name and c.get("reward") is not None]
        rewards.append(sum(own) / len(own) if own else -math.inf)
        sizes = [len(tokenizer.encode_answer(c["completion"])) for c in row["candidates"]
                 if c["teacher"] == name]
        tokens.append(sum(sizes) / max(1, len(sizes)))
    return dict(teachers=tuple(names), rewards=tuple(rewards), tokens=tuple(tokens),
                samples=len(row["candidates"]) / len(names))


def blank(item, limit, settings):
    """The item, or a prompt of `limit` tokens with two teachers."""
    return item or RoutedPrompt(np.zeros(limit, np.int32), np.zeros(limit, bool), "other",
                                teachers=("A", "B"), rewards=(0.0, 0.0), tokens=(0.0, 0.0))


def collate_routed(items, pad_id=0, slots=("other",)):
    """A Batch of B prompts with their rewards (B, M); count is B."""
    rewards = torch.tensor([item.rewards for item in items], dtype=torch.float32)       # (B, M)
    return replace(collate(items, pad_id, slots), count=len(items), rewards=rewards)


def arrange(model, items, held_out, settings):
    """(items, held-out items) with the rewards in the order of the model's teachers. Without held-out items
    a share of the items is held out, which depends on --seed and on their number; a prompt that several
    items share stands on one side."""
    items, held_out = ([for_teachers(item, tuple(model.config.teachers)) for item in some]
                       for some in (items, held_out))
    if held_out:
        return items, held_out
    prompts = list(dict.fromkeys(item.ids.tobytes() for item in items))
    order = np.random.default_rng([settings.seed, 1]).permutation(len(prompts))
    size = round(settings.held_out * len(prompts))
    if settings.held_out and not 0 < size < len(prompts):
        raise ValueError(f"--held-out {settings.held_out} of {len(prompts)} prompts holds out {size}; give "
                         "more prompts, another share, or 0")
    chosen = {prompts[i] for i in order[:size]}
    sides = [item.ids.tobytes() in chosen for item in items]
    return tuple([item for item, is_held_out in zip(items, sides) if is_held_out == side]
                 for side in (False, True))


def for_teachers(item, names):
    """The item with its values in the order of `names`; ValueError for a teacher that is not among them."""
    if item.teachers == names:
        return item
    if other := set(item.teachers) - set(names):
        raise ValueError(f"{item.where}: its file has candidates of {' '.join(sorted(other))}, for which the "
                         f"router is not made; its teachers: {' '.join(names)}")
    rewards, tokens = (dict(zip(item.teachers, values)) for values in (item.rewards, item.tokens))
    return replace(item, teachers=names, rewards=tuple(rewards.get(name, -math.inf) for name in names),
                   tokens=tuple(tokens.get(name, 0.0) for name in names))


# ---- the router at work ------------------------------------------------------------------------------------

@torch.no_grad()
def choices(model, examples, pad_id=0, batch_size=64):
    """The teacher that a Router gives the largest probability, for each Example: a list of names on every
    rank. A collective. Of equal probabilities the first teacher's counts."""
    model.eval()
    device, done = next(model.parameters()).device, []
    for indices, batch in in_step(batches_in_order(examples, lambda some: collate(some, pad_id), batch_size)):
        batch = batch.to(device)
        logps = model(batch.input_ids, batch.lengths, batch.repeats)        # (B, M)
        if not logps.isfinite().all():
            raise ValueError("the router's log-probs are not finite" + distributed.blame(model))
        done += zip(indices, logps.argmax(1).tolist())
    found = dict(sum(distributed.gather_objects(done), []))
    return [model.config.teachers[found[i]] for i in range(len(examples))]


def best_of(items):
    """The teacher with the largest mean reward over items; a prompt without its usable answer adds nothing
    to its mean."""
    table = np.array([item.rewards for item in items])                      # (N, M)
    answered = np.isfinite(table)
    means = np.where(answered, table, 0).sum(0) / np.maximum(answered.sum(0), 1)
    return items[0].teachers[int(np.where(answered.any(0), means, -np.inf).argmax())]


def compare_routes(items, held_out, chosen):
    """{route: {"reward", "regret", "answered", "agreement", "tokens"}} on held-out items, all in means.

    chosen: the router's teacher for each held-out item. The routes: "reward" asks all teachers; "fixed" asks
    the best of the language, and "single" the best of all, as of the training items; "random" any.
    reward: of the prompts that the route answers (their share is answered). regret: what that is short of
    the reward route on them. agreement: how often the route asks the teacher of the best reward.
    tokens: generated for a prompt.
    """
    single, by_language = best_of(items), {}
    for item in items:
        by_language.setdefault(item.language, []).append(item)
    by_language = {code: best_of(some) for code, some in by_language.items()}
    nobody, table = [None] * len(held_out), [by_language.get(item.language, single) for item in held_out]
    asked = {"reward": nobody, "fixed": table, "learned": chosen, "random": nobody,
             "single": [single] * len(held_out)}
    return {route: route_figures(route, held_out, teachers) for route, teachers in asked.items()}


def route_figures(route, items, teachers):
    """The figures of one route, see `compare_routes`. teachers: whom it asks for each item."""
    rewards, regrets, agrees, tokens = [], [], [], []
    for item, teacher in zip(items, teachers):
        best, M = max(item.rewards), len(item.rewards)
        places = {"reward": [int(np.argmax(item.rewards))], "random": range(M)}.get(route)
        places = places or [item.teachers.index(teacher)]
        values = [item.rewards[i] for i in places if math.isfinite(item.rewards[i])]
        rewards.append((sum(values), len(values), len(places)))
        regrets.append(sum(best - value for value in values))
        agrees.append(sum(item.rewards[i] == best for i in places) / len(places))
        cost = sum(item.tokens) * item.samples if route == "reward" else sum(
            item.tokens[i] for i in places) / len(places)
        tokens.append(cost)
    total, count, asked = (sum(column) for column in zip(*rewards))
    return {"reward": total / max(count, 1), "regret": sum(regrets) / max(count, 1),
            "answered": count / asked, "agreement": sum(agrees) / len(items),
            "tokens": sum(tokens) / len(items)}


def routes_table(figures):
    """Text lines of `compare_routes`."""
    lines = [f"{'route':<10}{'reward':>9}{'regret':>9}{'answered':>10}{'agrees':>8}{'tokens a prompt':>17}"]
    for route, f in figures.items():
        lines.append(f"{route:<10}{f['reward']:9.3f}{f['regret']:9.3f}{f['answered']:10.1%}"
                     f"{f['agreement']:8.1%}{f['tokens']:17.1f}")
    return lines
