"""Seconds and peak memory of merge.py and of mergekit on the same checkpoints: each command as a process of
its own, in turn, several rounds.

    pip install mergekit (in an environment of its own), then
    python tests/bench/merge_speed.py --mergekit /path/to/mergekit-yaml [--rounds 3] [--layers 16] [--methods
    linear ties dare_ties] [--place /tmp]

Makes three Cohere checkpoints in bf16 (502M parameters, 1.0 GB each, with use_qk_norm: mergekit 0.1.5 refuses
others) in a temporary folder; linear averages
the three, the other methods take the first as the base. Each configuration is printed by merge.py and given
to both. Every output is removed before the next
command; the inputs stay in the page cache. Figures are medians with minimum and maximum. Without --mergekit,
merge.py alone. merge.py runs twice: as it is,
with the SHA-256 of its inputs in the record of provenance, and with --no-hashes, which is what mergekit does.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = ("linear", "task_arithmetic")                            # where merge.py takes no convention


def make(folder, seed, num_layers):
    """A model folder of bf16 weights, a little away from those of the other seeds. Prints its number of
    parameters.

    In a process of its own: the peak that the system reports of a child is at least what its parent held when
    it started.
    """
    sys.path.insert(0, str(ROOT))
    import torch

    from aya_min import tensorfiles
    from aya_min.model_config import ModelConfig
    from aya_min.model import CohereForCausalLM
    from aya_min.tokenizer import train_tokenizer
    config = ModelConfig(
        vocab_size=65536,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=num_layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        use_qk_norm=True,
    )
    with torch.device("meta"):
        specs = {name: ("BF16", tuple(t.shape)) for name, t in CohereForCausalLM(config).state_dict().items()}
    files = tensorfiles.assign_files(specs)
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensorfiles.write(
        folder,
        files,
        (
            (
                (0.02 * torch.randn(shape, generator=common)) + 0.001 * torch.randn(shape, generator=own)
            ).bfloat16()
            for part in files.values()
            for _, shape in part.values()
        ),
    )
    tensorfiles.write_json(folder / "config.json", config.published(dtype="bfloat16"))
    train_tokenizer(["a few words are enough for the bytes"], 300).save(folder)
    print(sum(tensorfiles.num_bytes(*spec) for spec in specs.values()) // 2, torch.__version__)


def measure(command):
    """(seconds, CPU seconds, GB of peak resident memory, mapped pages included) of a command as a process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed: {errors[-2000:]}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def floor(file, place):
    """Seconds of one core that no linear merge of three such files goes below: import torch, hash and read
    three, write one (in the page cache, no arithmetic)."""
    chunk, size, rates = memoryview(bytearray(1 << 22)), file.stat().st_size, {}
    for what in ("sha256", "read", "write"):
        digest, started = hashlib.sha256(), time.process_time()
        with open(
            place / "floor" if what == "write" else file, "wb" if what == "write" else "rb", buffering=0
        ) as stream:
            for _ in range(0, size, len(chunk)):
                stream.write(chunk) if what == "write" else stream.readinto(chunk)
                digest.update(chunk) if what == "sha256" else None
        rates[what] = time.process_time() - started
    (place / "floor").unlink()
    imported = measure([sys.executable, "-c", "import torch"])[1]
    print(
        "one core:"
        f" {', '.join(f'{what} {size / seconds / 1e9:.2f} GB/s' for what, seconds in rates.items())}, import"
        f" torch {imported:.1f} s; together for three models"
        f" {imported + 3 * rates['sha256'] + 3 * rates['read'] + rates['write']:.1f} s of CPU"
    )


def spread(values, digits=1):
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", help="the executable mergekit-yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["linear", "ties", "dare_ties"],
        choices=["linear", "slerp", "task_arithmetic", "model_stock", "ties", "dare_linear", "dare_ties"],
    )
    parser.add_argument("--place", help="where to make the temporary folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS of both")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with TemporaryDirectory(dir=args.place) as place:
        place = Path(place)
        models = [str(place / name) for name in "ABC"]
        for seed, model in enumerate(models):
            made = subprocess.run(
                [sys.executable, __file__, "--make", model, str(seed), str(args.layers)],
                check=True,
                capture_output=True,
                text=True,
            )
        num_parameters, torch_version = int(made.stdout.split()[0]), made.stdout.split()[1]
        version = (
            subprocess.run(
                [str(Path(args.mergekit).with_name("pip")), "show", "mergekit"],
                capture_output=True,
                text=True,
            ).stdout.split()[3]
            if args.mergekit
            else "none"
        )
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} threads,"
            f" torch {torch_version}, mergekit {version}; 3 models of {num_parameters / 1e6:.0f}M parameters,"
            f" {2 * num_parameters / 1e9:.2f} GB each; load at the start {os.getloadavg()[0]:.1f}"
        )
        floor(Path(models[0]) / "model.safetensors", place)
        print(
            "| method | merge.py, s | its CPU s | peak GB | without hashes, s | its CPU s | peak GB |"
            " mergekit, s | its CPU s | peak GB | times as fast | without hashes"
            " |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
        )
        for method in args.methods:
            flags = {"density": 0.5} if method.endswith("ties") or method == "dare_linear" else {}
            based = method not in ("linear", "slerp")
            taken = models[1:] if based else models[:2] if method == "slerp" else models
            config = {
                "merge_method": method,
                "models": [
                    {
                        "model": model,
                        "parameters": {} if method in ("slerp", "model_stock") else {"weight": 1.0, **flags},
                    }
                    for model in taken
                ],
                "parameters": {"t": 0.3} if method == "slerp" else {},
                "dtype": "bfloat16",
                **({} if method == "linear" else {"base_model": models[0]}),
            }
            theirs, ours, out = place / "theirs.json", place / "ours.json", place / "out"
            theirs.write_text(json.dumps(config))
            ours.write_text(
                json.dumps(
                    config
                    | {
                        "parameters": config["parameters"]
                        | ({} if method in NOT_OURS else {"convention": "paper"})
                    }
                )
            )
            commands = {
                "ours": [sys.executable, str(ROOT / "merge.py"), "--config", str(ours), "--out", str(out)]
            }
            commands["unhashed"] = [*commands["ours"], "--no-hashes"]
            if args.mergekit:
                commands["theirs"] = [args.mergekit, str(theirs), str(out)]
            found = {name: [] for name in commands}
            for _ in range(args.rounds):
                for name, command in commands.items():
                    found[name].append(measure(command))
                    shutil.rmtree(out)
            columns = {name: list(zip(*rows)) for name, rows in found.items()}
            cells = [
                spread(column, digits)
                for name in commands
                for column, digits in zip(columns[name], (1, 1, 2))
            ]
            if args.mergekit:
                cells += [
                    spread([theirs / ours for theirs, ours in zip(columns["theirs"][0], columns[name][0])])
                    for name in ("ours", "unhashed")
                ]
            print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    make(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])) if sys.argv[1:2] == ["--make"] else main()
