"""Multilingual data arbitrage (arXiv 2408.14960; step 2 of Aya Expanse, arXiv 2412.04261):

    y*(x) = argmax over teachers m of r(x, y_m),   y_m ~ pi_m(. | x)

Prompts x teachers -> candidates -> a route -> SFT data. Routes: "reward" (the arbiter's best), "random", "fixed" (a table language ->
teacher; with one teacher for all it is the single-teacher baseline).
"""

import math
import random
from collections import Counter, defaultdict

from .data import conversation, prompt_of, read_jsonl


def candidates_from(rows, answers, scores=None):
    """Rows with "candidates": [{"teacher", "completion", "reward"}]. answers, scores: {teacher: one text, one reward per row}."""
    return [{**row, "candidates": [{"teacher": t, **answers[t][i], "reward": scores[t][i] if scores else None} for t in answers]}
            for i, row in enumerate(rows)]


def read_answers(path, rows, reading=None):
    """Completions made elsewhere: for each prompt row the file's answer to the same prompt, in the same language where both say theirs."""
    exact, first = {}, {}                   # (prompt, language) -> answer; prompt -> its first answer in any language
    for where, row in read_jsonl(path, reading):
        prompt = repr(prompt_of(row, where))
        answer = {"completion": conversation(row, where)[-1]["content"], "finish_reason": row.get("finish_reason")}
        exact.setdefault((prompt, row.get("language")), answer)
        first.setdefault(prompt, answer)
    keys = [(repr(r["prompt_messages"]), r.get("language")) for r in rows]
    found = [exact.get((prompt, code), exact.get((prompt, None))) if code else first.get(prompt) for prompt, code in keys]
    missing = [r for r, text in zip(rows, found) if text is None]
    if missing:
        raise ValueError(f"{path}: no answer for {len(missing)} of {len(rows)} prompts, the first: {missing[0]['prompt_messages'][-1]['content'][:60]!r}; "
                         "a teacher's file needs one line for each prompt")
    return found


def route(rows, how, seed=0, table=None, keep_cut=False, same=None):
    """Choose one candidate per prompt. how: "reward", "random" or "fixed" (table: language -> teacher).

    Returns (SFT rows with "completion" and "teacher", counts: prompts, wins per language and teacher, ties of the best reward,
    prompts whose candidates all have the same text). A tie is broken by the seed. Empty completions are never chosen.
    """
    rng, chosen, wins, counts = random.Random(f"route/{how}/{seed}"), [], defaultdict(Counter), Counter(ties=0, equal_texts=0, empty=0, cut=0)
    same, cut_by_language = same or str.strip, Counter()
    for row in rows:
        for c in row["candidates"]:
            if c["reward"] is not None and not math.isfinite(c["reward"]):
                raise ValueError(f"a reward of {c['teacher']} is not finite")
        cut = [c for c in row["candidates"] if c.get("finish_reason") == "length"]
        counts["cut"] += len(cut)
        cut_by_language[row.get("language") or "other"] += len(cut)
        options = [c for c in row["candidates"] if c["completion"].strip() and (keep_cut or c not in cut)]
        if how == "fixed":
            options = [c for c in options if c["teacher"] == table[row.get("language")]]
        if not options:
            counts["empty"] += 1
            continue
        counts["equal_texts"] += len(options) > 1 and len({same(c["completion"]) for c in options}) == 1
        if how == "reward":
            best = max(c["reward"] for c in options)
            options = [c for c in options if c["reward"] == best]
            counts["ties"] += len({same(c["completion"]) for c in options}) > 1
        winner = rng.choice(options)
        wins[row.get("language") or "other"][winner["teacher"]] += 1
        chosen.append({**{k: v for k, v in row.items() if k != "candidates"}, "completion": winner["completion"], "teacher": winner["teacher"]})
    return chosen, {"prompts": len(rows), "wins": {code: dict(c) for code, c in wins.items()},
                    "cut_by_language": dict(+cut_by_language), **counts}


def wins_table(wins, teachers):
    """Text lines: how often each teacher won in each language, in percent."""
    names = [t[-12:] for t in teachers]
    lines = ["language  " + "  ".join(f"{n:>12}" for n in names)]
    for code in sorted(wins):
        total = sum(wins[code].values())
        lines.append(f"{code:<10}" + "  ".join(f"{100 * wins[code].get(t, 0) / total:11.0f}%" for t in teachers))
    return "\n".join(lines)
