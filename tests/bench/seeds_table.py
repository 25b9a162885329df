"""The tables of results/README.md: what the recipe gains, over several seeds' run folders.

    python tests/bench/seeds_table.py runs/seed-4 runs/seed-5 runs/seed-6
"""

import json
import sys
from pathlib import Path

QUESTIONS = [
    ("mix", "random", "reward routing against random routing (one model each)"),
    ("mix", "single", "reward routing against the single best teacher"),
    ("mix", "base", "SFT on the arbitrage against the base"),
    ("family", "random", "family routing against random routing"),
    ("sft", "mix", "clusters merged against one model on the mix, same steps"),
    ("no-shared", "sft", "clusters without shared languages against with"),
    ("offline", "sft", "offline DPO against its SFT start"),
    ("online-1", "previous", "online DPO, round 1, against the round before (offline)"),
    ("online-2", "previous", "online DPO, round 2, against round 1"),
    ("online-3", "previous", "online DPO, round 3, against round 2"),
    ("online-3", "offline", "three rounds of online DPO against their start"),
    ("online-3", "sft", "offline, then online DPO against SFT"),
    ("online-only-3", "sft", "online DPO alone against SFT"),
    ("rloo", "sft", "RLOO against SFT"),
    ("online-3", "single", "the final model against the single-teacher student"),
    ("online-3", "base", "the final model against the base"),
]


def cell(win_rates):
    return f"{win_rates['win_rate']:.1f} [{win_rates['ci95'][0]:.1f}, {win_rates['ci95'][1]:.1f}]"


folders = list(map(Path, sys.argv[1:]))
runs = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
seeds = [json.loads((folder / "config.json").read_text(encoding="utf-8"))["seed"] for folder in folders]
models = [{m["name"]: m for m in run["models"]} for run in runs]
HEAD = " | ".join(f"{decoding}, seed {seed}" for decoding in ("greedy", "sampled") for seed in seeds)
RULE = "|---|" + "---|" * (2 * len(runs))
print(f"| win rate, % [95% interval] | {HEAD} |\n{RULE}")
for a, b, title in QUESTIONS:
    if any(a not in by_name for by_name in models):            # fewer rounds, or only the main arms
        continue
    cells = []
    for decoding in ("greedy", "sampled"):
        for by_name in models:
            versus = by_name[a][decoding]["versus"]
            cells.append(cell(versus[b]))
    print(f"| {title} | " + " | ".join(cells) + " |")
print(f"\n| mean oracle grade (0-3); win rate against the base | {HEAD} |\n{RULE}")
for name, model in models[0].items():
    print(
        f"| {model['title'].split(' (')[0]} | "
        + " | ".join(
            f"{by_name[name][d]['grade']:.2f}"
            + ("" if name == "base" else f"; {cell(by_name[name][d]['versus']['base'])}")
            for d in ("greedy", "sampled")
            for by_name in models
        )
        + " |"
    )
print(
    "\narbiter's held-out accuracy, overall / right against wrong: "
    + ", ".join(
        f"{r['reward_model']['accuracy']:.3f} / {r['reward_model']['right_vs_wrong']:.3f}" for r in runs
    )
)
print("seconds of all steps: " + ", ".join(f"{r['total_seconds']:.0f}" for r in runs))
