"""Multilingual data arbitrage (arXiv 2408.14960; step 2 of Aya Expanse, arXiv 2412.04261):

    y*(x) = argmax over teachers m of r(x, y_m),   y_m ~ pi_m(. | x)

Every teacher answers every prompt, a route chooses one of these candidates, and the choices are SFT data.
Routes: "reward" (the answer that the arbiter r scores highest), "random", and "fixed" (a table language ->
teacher; with one teacher for all languages it is the single-teacher baseline).
"""

import random
from collections import Counter, defaultdict

from . import distributed
from .control_tokens import Spelled
from .preferences import ANSWER, count_cut, usable
from .rows import conversation_of, finish_reason, prompt_of, read_jsonl


def candidates_from(rows, answers, scores=None):
    """The rows with "candidates": [{"teacher", "completion", "reward", "finish_reason"}, ...].

    answers: {teacher: [{"completion", "finish_reason"} for each row]}.
    scores: {teacher: [number, or None for no score, for each row]}.
    """
    def candidate(teacher, i):
        answer = answers[teacher][i]
        reward = scores[teacher][i] if scores else None
        return {"teacher": teacher, "completion": answer["completion"], "reward": reward,
                "finish_reason": answer.get("finish_reason")}
    return [{**row, "candidates": [candidate(t, i) for t in answers]} for i, row in enumerate(rows)]


def read_answers(path, rows, reading=None, tokenizer=None):
    """A teacher's answers from a file: {"completion", "finish_reason"} for each prompt row, in their order.

    An answer belongs to the row with the same prompt and, if both name one, the same language. Of several
    answers to a prompt the first is taken, and the number of others is printed. ValueError if a row has none.
    """
    exact = {}                  # (prompt, language) -> answer
    in_any_language = {}        # prompt -> its first answer
    spelled, again = Spelled(tokenizer), []
    lines = read_jsonl(path, reading)
    for where, row in lines:
        prompt = repr(prompt_of(row, where))
        text = conversation_of(row, where)[0][-1]["content"]
        spelled.look([text], where)
        answer = {"completion": text, "finish_reason": finish_reason(row, where)}
        if exact.setdefault((prompt, row.get("language")), answer)["completion"] != text:
            again.append(where)
        in_any_language.setdefault(prompt, answer)
    spelled.report([path], len(lines), reading)
    if again:
        distributed.say(f"{len(again)} rows answer a prompt again with another text and are not taken; the "
                        f"first: {again[0]}", [path])

    def answer_to(prompt, language):
        if not language:
            return in_any_language.get(prompt)
        return exact.get((prompt, language), exact.get((prompt, None)))

    found = [answer_to(repr(row["prompt_messages"]), row.get("language")) for row in rows]
    missing = [row for row, answer in zip(rows, found) if answer is None]
    if missing:
        code, text = missing[0].get("language"), missing[0]["prompt_messages"][-1]["content"]
        raise ValueError(f"{path}: no answer for {len(missing)} of {len(rows)} prompts, the first: "
                         f"{missing[0].get('prompt_where', '')} {text[:60]!r} in {code or 'no language'}; "
                         "a teacher's file needs one line for each prompt, in its language if it names one")
    if others := in_any_language.keys() - {repr(row["prompt_messages"]) for row in rows}:
        distributed.say(f"{len(others)} of {len(in_any_language)} prompts were not asked; their answers are "
                        "not taken", [path])
    return found


def route(rows, how, seed=0, table=None, keep_cut=False, same=None):
    """Choose one candidate per prompt. how: "reward", "random" or "fixed" (table: {language: teacher}).

    Returns (SFT rows with "completion", "teacher" and "finish_reason"; counts). Counted are prompts, wins by
    language and teacher, ties of the best reward, prompts whose candidates are all equal by same(text), and
    prompts left out because all their answers are empty, were cut or have no score. The seed breaks a tie.
    Empty answers are never chosen; answers that were cut at their limit are chosen only with keep_cut.
    """
    same = same or str.strip
    rng = random.Random(f"route/{how}/{seed}")
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
        of_prompt = {k: v for k, v in row.items() if k not in ANSWER}
        chosen.append({**of_prompt, **{k: winner.get(k) for k in ("completion", "teacher", "finish_reason")}})
    wins = {code: dict(by_teacher) for code, by_teacher in wins.items()}
    return chosen, {"prompts": len(rows), "wins": wins, **counts, **count_cut(rows)}


def wins_table(wins, teachers):
    """Text lines: how often each teacher won in each language, in percent."""
    lines = ["language  " + "  ".join(f"{teacher[-12:]:>12}" for teacher in teachers)]
    for code in sorted(wins):
        total = sum(wins[code].values())
        shares = (100 * wins[code].get(teacher, 0) / total for teacher in teachers)
        lines.append(f"{code:<10}" + "  ".join(f"{share:11.0f}%" for share in shares))
    return "\n".join(lines)
