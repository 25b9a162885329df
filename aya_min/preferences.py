"""Preference pairs from scored candidates: best against worst, of a pool of teachers (offline DPO) or of the model's own samples (online).

Aya Expanse, arXiv 2412.04261 and launch blog: "the highest and lowest reward responses from the Arbitrage stage as the chosen and
rejected completions"; online, "we sample multiple online generations for each prompt [...], rank these generations with a Reward Model".
"""

from collections import Counter


def best_worst(rows, margin=0.0, keep_cut=False, same=None):
    """(pairs, counts). rows carry "candidates" with "completion" and "reward"; a pair needs two different texts whose rewards differ
    by more than `margin`. Prompts that give no pair are counted: equal_texts, small_margin."""
    pairs, counts = [], Counter(pairs=0, equal_texts=0, small_margin=0, cut=0)
    same, cut_by_language = same or str.strip, Counter()
    for row in rows:
        cut = [c for c in row["candidates"] if c.get("finish_reason") == "length"]
        counts["cut"] += len(cut)
        cut_by_language[row.get("language") or "other"] += len(cut)
        options = [c for c in row["candidates"] if c["completion"].strip() and (keep_cut or c not in cut)]
        if len({same(c["completion"]) for c in options}) < 2:
            counts["equal_texts"] += 1
            continue
        best, worst = max(options, key=lambda c: c["reward"]), min(options, key=lambda c: c["reward"])
        if same(best["completion"]) == same(worst["completion"]) or best["reward"] - worst["reward"] <= margin:
            counts["small_margin"] += 1
            continue
        kept = {k: v for k, v in row.items() if k != "candidates"}
        pairs.append({**kept, "chosen": best["completion"], "rejected": worst["completion"], "chosen_reward": best["reward"],
                      "rejected_reward": worst["reward"], "chosen_teacher": best.get("teacher"), "rejected_teacher": worst.get("teacher")})
        counts["pairs"] += 1
    return pairs, {**counts, "cut_by_language": dict(+cut_by_language)}
