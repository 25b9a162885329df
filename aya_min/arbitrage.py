"""Multilingual data arbitrage (arXiv 2408.14960; step 2 of Aya Expanse, arXiv 2412.04261):

    y*(x) = argmax over teachers m of r(x, y_m),   y_m ~ pi_m(. | x)

Prompts x teachers -> candidates -> a route -> SFT data. Routes: "reward" (the arbiter's best), "random",
"fixed" (a table language -> teacher; with one teacher for all it is the single-teacher baseline).
"""

import random
from collections import Counter, defaultdict

from . import distributed
from .preferences import ANSWER, count_cut, usable
from .rows import conversation, finish_reason, prompt_of, read_jsonl
from .control_tokens import Spelled


def candidates_from(rows, answers, scores=None):
    """Rows with "candidates": [{"teacher", "completion", "reward", "finish_reason"}].

    answers: {teacher: for each row {"completion", "finish_reason"}}; scores: {teacher: for each row a number,
    or None where it has no score}.
    """
    def candidate(teacher, i):
        answer, reward = answers[teacher][i], scores[teacher][i] if scores else None
        return {"teacher": teacher, "completion": answer["completion"], "reward": reward,
                "finish_reason": answer.get("finish_reason")}
    return [{**row, "candidates": [candidate(t, i) for t in answers]} for i, row in enumerate(rows)]


def read_answers(path, rows, reading=None, tokenizer=None):
    """Answers made elsewhere, {"completion", "finish_reason"}: for each prompt row the file's answer to the
    same prompt, in the same language where both say theirs. Of several the first, and that is said."""
    exact, first = {}, {}       # (prompt, language) -> answer; prompt -> its first answer in any language
    spelled, found, again = Spelled(tokenizer), read_jsonl(path, reading), []
    for where, row in found:
        prompt, text = repr(prompt_of(row, where)), conversation(row, where)[-1]["content"]
        spelled.look([text], where)
        answer = {"completion": text, "finish_reason": finish_reason(row, where)}
        if exact.setdefault((prompt, row.get("language")), answer)["completion"] != text:
            again.append(where)
        first.setdefault(prompt, answer)
    spelled.report([path], len(found), reading)
    if again:
        distributed.say(f"{len(again)} rows answer a prompt again, otherwise, and are not taken; the first: "
                        f"{again[0]}", [path])
    keys = [(repr(r["prompt_messages"]), r.get("language")) for r in rows]
    found = [exact.get((prompt, code), exact.get((prompt, None))) if code else first.get(prompt)
             for prompt, code in keys]
    missing = [r for r, answer in zip(rows, found) if answer is None]
    if missing:
        code, text = missing[0].get("language"), missing[0]["prompt_messages"][-1]["content"]
        raise ValueError(f"{path}: no answer for {len(missing)} of {len(rows)} prompts, the first: "
                         f"{missing[0].get('prompt_where', '')} {text[:60]!r} in {code or 'no language'}; "
                         "a teacher's file needs one line for each prompt, in its language if it says one")
    return found


def route(rows, how, seed=0, table=None, keep_cut=False, same=None):
    """Choose one candidate per prompt. how: "reward", "random" or "fixed" (table: language -> teacher).

    Returns (SFT rows with "completion", "teacher" and "finish_reason", counts: prompts, wins per language and
    teacher, ties of the best reward, prompts whose candidates are all equal by same(text), prompts left out
    as all their answers are empty, were cut, or have no score). A tie is broken by the seed. Empty answers
    are never chosen, those that were cut at their limit only with keep_cut.
    """
    rng, same = random.Random(f"route/{how}/{seed}"), same or str.strip
    chosen, wins = [], defaultdict(Counter)
    counts = Counter(ties=0, equal_texts=0, empty=0, cut_prompts=0, unscored=0)
    for row in rows:
        if how == "fixed":
            teacher = table[row.get("language")]
            row = {**row, "candidates": [c for c in row["candidates"] if c["teacher"] == teacher]}
        options, some_cut = usable(row, keep_cut)
        scored = [c for c in options if how != "reward" or c["reward"] is not None]
        if not scored:
            counts["unscored" if options else "cut_prompts" if some_cut else "empty"] += 1
            continue
        counts["equal_texts"] += len(scored) > 1 and len({same(c["completion"]) for c in scored}) == 1
        if how == "reward":
            best = max(c["reward"] for c in scored)
            scored = [c for c in scored if c["reward"] == best]
            counts["ties"] += len({same(c["completion"]) for c in scored}) > 1
        winner = rng.choice(scored)
        wins[row.get("language") or "other"][winner["teacher"]] += 1
        kept = {k: v for k, v in row.items() if k not in ANSWER}
        chosen.append({**kept, **{k: winner.get(k) for k in ("completion", "teacher", "finish_reason")}})
    wins = {code: dict(c) for code, c in wins.items()}
    return chosen, {"prompts": len(rows), "wins": wins, **counts, **count_cut(rows)}


def wins_table(wins, teachers):
    """Text lines: how often each teacher won in each language, in percent."""
    names = [t[-12:] for t in teachers]
    lines = ["language  " + "  ".join(f"{n:>12}" for n in names)]
    for code in sorted(wins):
        total = sum(wins[code].values())
        shares = (100 * wins[code].get(t, 0) / total for t in teachers)
        lines.append(f"{code:<10}" + "  ".join(f"{share:11.0f}%" for share in shares))
    return "\n".join(lines)
