"""Host memory of weights.load: the peak of resident memory (mapped pages count) over the size of the files,
on a made checkpoint in bf16.

OMP_NUM_THREADS=1 python tests/bench/load_memory.py [LAYERS]         (8 layers: 1.2 GB, in a temporary folder;
16: 2.2 GB)
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from aya_min import distributed, tensorfiles, weights
from aya_min.model_config import ModelConfig
from aya_min.model import CohereForCausalLM
from aya_min.tokenizer import train_tokenizer

GB, LARGE, SMALL = 1e9, 10 ** 12, 300_000_000


def resident(key):
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def make(folder, num_layers, shard_bytes):
    """A model folder of random bf16 weights, written tensor by tensor; its bytes, and those of its largest
    tensor."""
    config = ModelConfig(
        vocab_size=65536,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        specs = {name: ("BF16", tuple(t.shape)) for name, t in CohereForCausalLM(config).state_dict().items()}
    files = tensorfiles.assign_files(specs, shard_bytes)
    folder.mkdir()
    tensorfiles.write(
        folder,
        files,
        (torch.randn(shape).bfloat16() for part in files.values() for _, shape in part.values()),
    )
    tensorfiles.write_json(folder / "config.json", config.published(dtype="bfloat16"))
    train_tokenizer(["a few words are enough for the bytes"], 300).save(folder)
    sizes = [tensorfiles.num_bytes(*spec) for spec in specs.values()]
    return sum(sizes), max(sizes)


def child(folder, dtype, sharded):
    """Load once and say what it took."""
    distributed.setup()
    before = resident("VmRSS")
    model, _ = weights.load(folder, dtype=getattr(torch, dtype), sharded=sharded == "1")
    held = sum(distributed.own_rows(t)[0].nbytes for t in model.state_dict().values())
    print(json.dumps([distributed.rank(), before, resident("VmHWM"), held]), flush=True)
    distributed.leave(0)


def measure(folder, dtype, ranks):
    """[(bytes before, at most, held)] rank by rank."""
    command = [sys.executable, __file__, "--child", str(folder), dtype, str(int(ranks > 1))]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return [
        row[1:]
        for row in sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    ]


def main():
    num_layers = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    print(
        "| files | loaded as | ranks | files, GB | largest tensor | torch and imports | peak | peak less"
        " imports | over files | over what is held |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for what, shard_bytes in (("one", LARGE), ("shards of 0.3 GB", SMALL)):
        with TemporaryDirectory() as place:
            size, largest = make(Path(place) / "model", num_layers, shard_bytes)
            for dtype, ranks in (("bfloat16", 1), ("float32", 1), ("float32", 2)):
                for before, peak, held in measure(Path(place) / "model", dtype, ranks):
                    print(
                        f"| {what} | {dtype} | {ranks} | {size / GB:.2f} | {largest / GB:.2f} |"
                        f" {before / GB:.2f} | {peak / GB:.2f} | {(peak - before) / GB:.2f} |"
                        f" {(peak - before) / size:.2f} | {(peak - before) / held:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
