"""Preference pairs from scored candidates: best against worst, of a pool of teachers (offline DPO) or of the model's own samples (online).

Aya Expanse, arXiv 2412.04261 and launch blog: "the highest and lowest reward responses from the Arbitrage stage as the chosen and
rejected completions"; online, "we sample multiple online generations for each prompt [...], rank these generations with a Reward Model".
"""

from collections import Counter


def best_worst(rows, margin=0.0):
    """(pairs, counts). rows carry "candidates" with "completion" and "reward"; a pair needs two different texts whose rewards differ
    by more than `margin`. Prompts that give no pair are counted: equal_texts, small_margin."""
    pairs, counts = [], Counter(pairs=0, equal_texts=0, small_margin=0)
    for row in rows:
        options = [c for c in row["candidates"] if c["completion"].strip()]
        if len({c["completion"] for c in options}) < 2:
            counts["equal_texts"] += 1
            continue
        best, worst = max(options, key=lambda c: c["reward"]), min(options, key=lambda c: c["reward"])
        if best["completion"] == worst["completion"] or best["reward"] - worst["reward"] <= margin:
            counts["small_margin"] += 1
            continue
        kept = {k: v for k, v in row.items() if k != "candidates"}
        pairs.append({**kept, "chosen": best["completion"], "rejected": worst["completion"], "chosen_reward": best["reward"],
                      "rejected_reward": worst["reward"], "chosen_teacher": best.get("teacher"), "rejected_teacher": worst.get("teacher")})
        counts["pairs"] += 1
    return pairs, dict(counts)
