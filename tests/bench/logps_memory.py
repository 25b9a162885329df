"""Memory and time of the log-probs of N supervised tokens against the vocabulary V, forward and backward,
beside log_softmax of whole logits.

python tests/bench/logps_memory.py [--hidden 512] [--most 4096]          (each row a process of its own; on a
GPU if there is one)
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from aya_min.token_logps import token_logps


def whole(hidden, weight, targets):
    """What a training loop does that knows no better: (N, V) logits, their fp32 log_softmax, one number a
    row of it."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def peak(device):
    """The most bytes held so far: by torch on a GPU, by the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def child(way, N, V, D):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    function = {"chunks": token_logps, "whole": whole}[way]
    weight = (
        0.02 * torch.randn(V, D, device=device, dtype=dtype)
    ).requires_grad_()  # with weights of size 1 most probabilities are denormal numbers: 40x as slow on a CPU
    hidden, targets = torch.randn(N, D, device=device, dtype=dtype, requires_grad=True), torch.randint(
        V, (N,), device=device
    )
    function(hidden[:128], weight, targets[:128]).sum().backward()  # libraries loaded, gradients there
    before, started = peak(device), time.perf_counter()
    function(hidden, weight, targets).sum().backward()
    hidden.grad.sum().item()
    print(json.dumps([peak(device) - before, time.perf_counter() - started]))


def measure(*arguments):
    done = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, arguments)], capture_output=True, text=True
    )
    return json.loads(done.stdout) if done.returncode == 0 else None        # None: out of memory


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--most", type=int, default=4096, help="tokens of the largest case")
    args = parser.parse_args()
    print(
        f"hidden size {args.hidden}, torch {torch.__version__},"
        f" {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}\n\n| tokens | vocabulary |"
        " whole logits, GB | log_softmax: GB more, s | by chunks: GB more, s |\n|---|---|---|---|---|"
    )
    for N, V in (
        (args.most // 4, 256_000),
        (args.most // 2, 256_000),
        (args.most, 256_000),
        (args.most, 128_000),
        (args.most, 64_000),
    ):
        cells = [
            (
                f"{done[0] / 1e9:.2f}, {done[1]:.1f}"
                if (done := measure(way, N, V, args.hidden))
                else "out of memory"
            )
            for way in ("whole", "chunks")
        ]
        print(f"| {N:,} | {V:,} | {4 * N * V / 1e9:.1f} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    child(sys.argv[2], *map(int, sys.argv[3:])) if sys.argv[1:2] == ["--child"] else main()
