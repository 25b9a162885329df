"""Multilingual data arbitrage (arXiv 2408.14960; step 2 of Aya Expanse, arXiv 2412.04261):

    y*(x) = argmax over teachers m of r(x, y_m),   y_m ~ pi_m(. | x)

Every teacher answers every prompt, a route chooses one of these candidates, and the choices are SFT data.
Routes: "reward" (the answer that the arbiter r scores highest), "random", "fixed" (a table language ->
teacher; with one teacher for all languages it is the single-teacher baseline), and "learned" (a router has
chosen the only teacher that was asked, see router.py).

Two corrections come before the choice. The language guard marks answers in another language than their
prompt's. Length control takes the reward's regression on length away.
"""

import random
from collections import Counter, defaultdict

import numpy as np

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
            return exact.get((prompt, None), in_any_language.get(prompt))
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
    """Choose one candidate per prompt. how: "reward", "random", "learned" (rows hold candidates of the chosen
    teacher only) or "fixed" (table: {language: teacher}).

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
            wrong = all(c.get("wrong_language") for c in row["candidates"])
            counts["unscored" if options else "cut_prompts" if some_cut
                   else "wrong_language" if wrong and row["candidates"] else "empty"] += 1
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
        if "num_tokens" in winner:
            chosen[-1] |= {"reward": winner["reward"], "num_tokens": winner["num_tokens"]}
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


# ---- language and length -----------------------------------------------------------------------------------

def language_guard(rows, detect):
    """Mark the candidates that are in another language than their row's, as "wrong_language": the language
    seen. No route chooses them, and they make no pairs.

    detect(row, text) -> code or None. It is given the row, because a right answer may be a word of another
    language (the world's task translate). A text without a known language is kept, and so is every answer to
    a row without one. Returns counts: {"wrong": {language: {teacher: number}}, "unknown": number}.
    """
    wrong, unknown = defaultdict(Counter), 0
    for row in (row for row in rows if row.get("language")):
        for c in (c for c in row["candidates"] if c["completion"].strip()):
            seen = detect(row, c["completion"])
            unknown += seen is None
            if seen not in (None, row["language"]):
                c["wrong_language"] = seen
                wrong[row["language"]][c["teacher"]] += 1
    return {"wrong": {code: dict(wrong[code]) for code in sorted(wrong)}, "unknown": unknown}


def length_fit(rows, keep_cut=False):
    """{language: {"slope", "mean_length", "correlation", "answers"}}: the least-squares line of the reward on
    the candidates' "num_tokens", over all usable answers with a reward. The slope is 0 where fewer than three
    answers, or answers of one length, allow no line."""
    points = defaultdict(list)
    for row in rows:
        points[row.get("language") or "other"] += [
            (c["num_tokens"], c["reward"]) for c in usable(row, keep_cut)[0] if c["reward"] is not None]
    fit = {}
    for code in sorted(points):
        x, y = np.array(points[code], np.float64).reshape(-1, 2).T
        slope = correlation = 0.0
        if len(x) > 2 and x.std() > 0:
            covariance = ((x - x.mean()) * (y - y.mean())).mean()
            slope = covariance / x.var()
            correlation = covariance / (x.std() * y.std()) if y.std() > 0 else 0.0
        fit[code] = {"slope": float(slope), "mean_length": float(x.mean()) if len(x) else 0.0,
                     "correlation": float(correlation), "answers": len(x)}
    return fit


def control_length(rows, fit):
    """Take the line of `length_fit` out of every reward, in place: reward - slope * (length - mean length).
    The reward before is kept as "raw_reward"."""
    for row in rows:
        line = fit.get(row.get("language") or "other")
        for c in (c for c in row["candidates"] if line and c["reward"] is not None):
            c["raw_reward"] = c["reward"]
            c["reward"] -= line["slope"] * (c["num_tokens"] - line["mean_length"])


def guard_table(counts, teachers):
    """Text lines of what the language guard found."""
    lines = [f"wrong language: {sum(sum(each.values()) for each in counts['wrong'].values())} answers, "
             f"language unknown: {counts['unknown']}"]
    if counts["wrong"]:
        lines.append("language  " + "  ".join(f"{teacher[-12:]:>12}" for teacher in teachers))
    return lines + [f"{code:<10}" + "  ".join(f"{by.get(teacher, 0):12}" for teacher in teachers)
                    for code, by in counts["wrong"].items()]


def fit_table(fit):
    """Text lines of `length_fit`."""
    return ["length control: reward less slope * (length - mean length)",
            f"{'language':<10}{'answers':>8}{'slope':>10}{'correlation':>13}{'mean length':>13}",
            *(f"{code:<10}{f['answers']:8}{f['slope']:10.4f}{f['correlation']:13.2f}{f['mean_length']:13.1f}"
              for code, f in fit.items())]


def worth(rows, chosen, keep_cut=False):
    """{language: {teacher or "chosen": {"reward", "length", "answers"}}}, with "all": means over the usable
    candidates of each teacher, and over the answers that a route chose. The reward is None where no answer
    has one, the length is the mean "num_tokens"."""
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for c in usable(row, keep_cut)[0]:
            found[row.get("language") or "other"][c["teacher"]].append(c)
    for row in chosen:
        found[row.get("language") or "other"]["chosen"].append(row)
    for code in sorted(found):
        for name, some in found[code].items():
            found["all"][name] += some

    def means(some):
        rewards = [c["reward"] for c in some if c.get("reward") is not None]
        return {"reward": sum(rewards) / len(rewards) if rewards else None,
                "length": sum(c["num_tokens"] for c in some) / len(some), "answers": len(some)}
    return {code: {name: means(some) for name, some in found[code].items()}
            for code in sorted(found, key=lambda code: (code == "all", code))}


def worth_table(found, teachers):
    """Text lines of `worth`: reward and length of each teacher's answers and of the chosen ones."""
    def cell(each):
        if not each:
            return f"{'-':>15}"
        reward = "     -" if each["reward"] is None else f"{each['reward']:6.2f}"
        return f"{reward} {each['length']:8.1f}"
    names = [*teachers, "chosen"]
    return ["reward and length of the answers, in tokens",
            "language  " + "  ".join(f"{name[-15:]:>15}" for name in names),
            *(f"{code:<10}" + "  ".join(cell(by.get(name)) for name in names)
              for code, by in found.items())]
