"""Preference pairs from scored candidates: the best against the worst answer to a prompt.

The candidates come from a pool of teachers (offline DPO) or are samples of the model itself (online). Aya
Expanse, arXiv 2412.04261 and launch blog: "the highest and lowest reward responses from the Arbitrage stage
as the chosen and rejected completions"; online, "we sample multiple online generations for each prompt [...],
rank these generations with a Reward Model". One departure: answers that were cut at their limit are left out
unless keep_cut is set.

Or the pair is known without rewards: an answer written in the language against one translated from English
(`contrast_pairs`), as in "RLHF Can Speak Many Languages", arXiv 2407.02552.
"""

import math
from collections import Counter

from .rows import is_cut

ANSWER = ("candidates", "completion", "chosen", "rejected", "finish_reason")     # keys that no prompt keeps


def count_cut(rows):
    """How many of the rows' candidates were cut: {"cut": number, "cut_by_language": {language: number}}."""
    cut = Counter(row.get("language") or "other" for row in rows for c in row["candidates"] if is_cut(c))
    return {"cut": cut.total(), "cut_by_language": dict(sorted(cut.items()))}


def cut_line(rows):
    """One line of text: "cut: 12 of 240 (en 3, ja 9)"."""
    counts = count_cut(rows)
    total = sum(len(row["candidates"]) for row in rows)
    languages = ", ".join(f"{code} {count}" for code, count in counts["cut_by_language"].items())
    return f"cut: {counts['cut']} of {total}" + (f" ({languages})" if languages else "")


def usable(row, keep_cut):
    """(candidates that are not empty, not in a wrong language (see arbitrage.language_guard) and, unless
    keep_cut, not cut; whether cut ones were left out).

    ValueError for a reward that is not finite.
    """
    options = [c for c in row["candidates"] if c["completion"].strip() and not c.get("wrong_language")]
    for c in options:
        if c.get("reward") is not None and not math.isfinite(c["reward"]):
            raise ValueError(f"the reward {c['reward']} of {c.get('teacher') or 'a sample'} for the prompt "
                             f"{str(row.get('prompt'))[:60]!r} is not finite; look at the reward model")
    kept = [c for c in options if keep_cut or not is_cut(c)]
    return kept, len(kept) < len(options)


def best_worst(rows, margin=0.0, keep_cut=False, same=None):
    """(pairs, counts). rows carry "candidates" with "completion", "reward" and, if known, "finish_reason".

    A pair needs two different answers whose rewards differ by more than `margin`. Answers are equal if
    same(text) is; by default it is the text without outer white space. Prompts without a pair are counted
    under equal_texts, small_margin or cut_prompts (fewer than two different answers that were not cut).
    """
    same = same or str.strip
    pairs = []
    counts = Counter(pairs=0, equal_texts=0, small_margin=0, cut_prompts=0)
    for row in rows:
        options, some_cut = usable(row, keep_cut)
        options = [c for c in options if c["reward"] is not None]
        if len({same(c["completion"]) for c in options}) < 2:
            counts["cut_prompts" if some_cut else "equal_texts"] += 1
            continue
        best = max(options, key=lambda c: c["reward"])
        worst = min(options, key=lambda c: c["reward"])
        equal = same(best["completion"]) == same(worst["completion"])
        if equal or best["reward"] - worst["reward"] <= margin:
            counts["small_margin"] += 1
            continue
        pair = {k: v for k, v in row.items() if k not in ANSWER}
        pair |= {"chosen": best["completion"], "rejected": worst["completion"]}
        for key in ("reward", "teacher", "finish_reason"):
            pair |= {f"chosen_{key}": best.get(key), f"rejected_{key}": worst.get(key)}
        pairs.append(pair)
        counts["pairs"] += 1
    return pairs, {**counts, **count_cut(rows)}


def contrast_pairs(rows, chosen, rejected, keep_cut=False, same=None):
    """(pairs, counts) of prompt rows with their answers {"completion", "finish_reason"} from two lists.

    Prompts without a pair are counted under equal_texts (see `best_worst`), empty or cut_prompts.
    """
    same = same or str.strip
    pairs, counts = [], Counter(pairs=0, equal_texts=0, empty=0, cut_prompts=0)
    for row, best, worst in zip(rows, chosen, rejected, strict=True):
        if not best["completion"].strip() or not worst["completion"].strip():
            counts["empty"] += 1
        elif not keep_cut and (is_cut(best) or is_cut(worst)):
            counts["cut_prompts"] += 1
        elif same(best["completion"]) == same(worst["completion"]):
            counts["equal_texts"] += 1
        else:
            pair = {k: v for k, v in row.items() if k not in ANSWER}
            pair |= {"chosen": best["completion"], "rejected": worst["completion"]}
            pair |= {"chosen_finish_reason": best.get("finish_reason"),
                     "rejected_finish_reason": worst.get("finish_reason")}
            pairs.append(pair)
            counts["pairs"] += 1
    return pairs, dict(counts)
