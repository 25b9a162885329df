"""A mixture larger than memory should be: peak memory and start-up of `train.py sft --data spec.json` on a
generated file, with the index made (first start) and read (second start), beside the same on a small file.

    OMP_NUM_THREADS=1 python tests/bench/mixture_memory.py [GB]     (2 GB, in a temporary folder)

Start-up is the time from the command to its first step: imports, index, draw, the check of the run.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ["en", "tr", "hi", "ar", "zh", "ru"]
STEPS = 20


def generate(path, size):
    """A JSONL file of about `size` bytes: rows of 0.2 to 2 KB in six languages and ten data sets."""
    rng = random.Random(0)
    words = [f"{a}{b}{c} " for a in "bdkl" for b in "aeio" for c in "nrst"]
    texts = ["".join(rng.choices(words, k=rng.randint(40, 480))) for _ in range(500)]
    written = number = 0
    with open(path, "wb") as file:
        while written < size:
            row = {"prompt": f"question {number}", "completion": texts[number * 7 % 500],
                   "language": LANGUAGES[number % 6], "dataset_name": f"set {number % 10}"}
            written += file.write(json.dumps(row).encode() + b"\n")
            number += 1
    return number


def train(folder, spec, name, model):
    """(seconds until the first step, seconds of all, peak bytes, steps) of 20 steps on a spec."""
    out = folder / name
    command = [sys.executable, "train.py", "sft", "--model", model, "--data", spec, "--out", out,
               "--max-steps", STEPS, "--batch-size", 8, "--max-length", 512]
    began = time.time()
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=open(folder / f"{name}.log", "w"))
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.time() - began
    assert status == 0, (folder / f"{name}.log").read_text()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = (out / "config.json").stat().st_mtime - began
    return first, seconds, usage.ru_maxrss * 1024, len(rows)


def main():
    size = float(sys.argv[1]) * 1e9 if len(sys.argv) > 1 else 2e9
    with TemporaryDirectory() as place:
        folder = Path(place)
        sizes = {"small": 1e6, "large": size}
        rows = {name: generate(folder / f"{name}.jsonl", size) for name, size in sizes.items()}
        specs = {}
        for name in rows:
            specs[name] = folder / f"{name}.json"
            specs[name].write_text(json.dumps({"temperature": 0.5, "sources": {
                name: {"files": [f"{name}.jsonl"], "weight": 1}}}))
        command = ["pretrain", "--model", "smoke", "--data", folder / "small.jsonl", "--out", folder / "base",
                   "--max-steps", 1, "--batch-size", 8]
        subprocess.run([sys.executable, "train.py", *map(str, command)], cwd=ROOT, check=True,
                       capture_output=True)
        print("| start | file, GB | rows | until the first step, s | whole command, s | peak memory, GB |")
        print("|---|---|---|---|---|---|")
        for label, name in (("small file", "small"), ("first", "large"), ("second", "large")):
            first, seconds, peak, steps = train(folder, specs[name], label.replace(" ", "-"),
                                                folder / "base/model")
            assert steps == STEPS
            gb = (folder / f"{name}.jsonl").stat().st_size / 1e9
            print(f"| {label} | {gb:.2f} | {rows[name]:,} | {first:.1f} | {seconds:.1f} | {peak / 1e9:.2f} |",
                  flush=True)


if __name__ == "__main__":
    main()
