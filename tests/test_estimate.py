"""What --dry-run says, against a process that trains and the kernel's count of its memory, torch's count of
operations, and sums by hand.

This file is also what the tests start, alone and under torchrun, to be measured.
"""

import gc
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from small import CPU, on_ranks, program
from torch.utils.flop_counter import FlopCounterMode

from aya_min import distributed, estimate
from aya_min.losses import sft_loss
from aya_min.stages import STAGES, blank_example, builder
from aya_min.config import DPO, KTO, RL, SFT, Classify, Pretrain, Reward, Routing, Side
from aya_min.model_config import ModelConfig
from aya_min.data import collate
from aya_min.flops import training_flops
from aya_min.loop import train
from aya_min.model import CohereForCausalLM, init_weights

LARGE = dict(
    vocab_size=8000,
    hidden_size=256,
    intermediate_size=2048,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    logit_scale=1.0,
)
SMALL = dict(
    vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
)
CASES = {
    "plain": dict(),
    "recomputed": dict(activation_checkpointing=1, micro_batch_size=1),  # this one in two micro-batches
    "mixture": dict(),
}
MIXTURE = dict(mixture=dict(experts=["A", "B", "C", "D"], top_k=1, shared=True, attention="own"))


def sized(sizes, name):
    """The ModelConfig of a case."""
    return ModelConfig(**sizes, **(MIXTURE if name == "mixture" else {}))


def large(changes, ranks):
    """(settings, one micro-batch, how many a rank has) of a case: two rows of 256 tokens on each rank."""
    settings = SFT(
        batch_size=2 * ranks, max_length=256, max_steps=9, packing=False, **changes
    )  # the dry run is of a GPU's default
    size = settings.micro_batch_size or 2
    return settings, collate([blank_example(None, 256, settings)] * size), 2 // size


# ---- the process that is measured --------------------------------------------------------------------------

def memory(name):
    """VmRSS or VmHWM (the most it was) of this process in bytes."""
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))


class Enough(Exception):
    pass


def bytes_taken(config, changes, folder):
    """What two steps of training add to the memory of this process."""
    settings, batch, num_micro_batches = large(changes, distributed.num_ranks())

    def batches(step):
        if step == 2:
            raise Enough
        return [batch] * num_micro_batches
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")           # the most is from now on
    before = memory("VmRSS")
    model = init_weights(CohereForCausalLM(config), torch.Generator().manual_seed(0))
    with suppress(Enough):
        train(model, 9, batches, sft_loss, settings, folder, CPU)
    return memory("VmHWM") - before


def all_cases(folder):
    for sizes in (SMALL, LARGE):  # what a first step loads is there before the second round
        taken = {
            name: bytes_taken(sized(sizes, name), changes, folder) for name, changes in CASES.items()
        }
    return taken


def main():
    by_rank = on_ranks(int(sys.argv[1]), all_cases, Path(sys.argv[2]))
    print(json.dumps({name: max(taken[name] for taken in by_rank) for name in CASES}))


# ---- memory ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def taken(ranks, tmp_path_factory):
    """{"recomputed": bytes, ...} on this number of ranks. Large blocks go back to the kernel when they are
    freed, so that it counts what is alive."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = program(__file__, ranks, tmp_path_factory.mktemp("run"), env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from /proc")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)], scope="module")
def test_the_estimated_memory_is_within_a_tenth_of_what_the_kernel_counts_for_a_training_process(
    ranks, name, taken
):
    settings, batch, num_micro_batches = large(CASES[name], ranks)
    watch = estimate.simulate(
        CohereForCausalLM, sized(LARGE, name), settings, sft_loss, batch, ranks, num_micro_batches
    )
    assert sum(watch.peak.values()) == pytest.approx(taken[name], rel=0.1)
    assert (
        sum(watch.peak.values()) > 100e6
    )  # so that the interpreter's own comings and goings are small beside it


def simulated(ranks=1, num_micro_batches=1, sizes=SMALL, tokens=64, **changes):
    batch = collate([blank_example(None, tokens, None)] * 2)
    return estimate.simulate(
        CohereForCausalLM, ModelConfig(**sizes), SFT(**changes), sft_loss, batch, ranks, num_micro_batches
    )


def test_weights_and_moments_by_hand_are_divided_over_the_ranks_of_one_copy():
    """400 x 64 + 64 and two blocks of 64 + 4 x 64 x 64 + 3 x 64 x 128 parameters of 4 bytes."""
    weights = 4 * (400 * 64 + 64 + 2 * (64 + 4 * 64 * 64 + 3 * 64 * 128))
    for ranks, changes, parts, num_micro_batches in (
        (1, {}, 1, 1),
        (8, {}, 8, 2),
        (8, {"replicate": 2}, 4, 1),
        (8, {"replicate": 2}, 4, 2),
    ):
        watch = simulated(ranks, num_micro_batches, **changes)
        most, blocks = watch.most, 4 * 2 * (64 + 4 * 64 * 64 + 3 * 64 * 128)
        assert (
            most["parameters"] == weights // parts
            and weights // parts <= most["gradients"] <= (weights + blocks) // parts
        )
        assert most["optimizer moments"] - 2 * weights // parts in range(
            18 * 64
        )  # and a count of steps for each parameter


def test_recomputing_every_block_keeps_one_hidden_state_of_each_and_every_second_one_lies_between():
    B, T, D, layers = 2, 512, 64, 4
    none, every_second, all_blocks = (
        simulated(sizes={**SMALL, "num_hidden_layers": layers}, tokens=T, activation_checkpointing=n).most[
            "activations"
        ]
        for n in (0, 2, 1)
    )
    hidden = B * T * D * 4
    assert (
        (layers + 1) * hidden < all_blocks < (layers + 1 + 20) * hidden
    )  # the block that is computed right now has its own
    assert none - every_second == pytest.approx(every_second - all_blocks, rel=0.35)
    assert none > 3 * all_blocks


# ---- communication -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks, replicate, num_micro_batches, dtype",
    [
        (2, 1, 1, "float32"),
        (8, 1, 3, "float32"),
        (8, 1, 1, "bfloat16"),
        (8, 2, 1, "float32"),
        (8, 2, 3, "float32"),
    ],
)
def test_communication_by_hand(ranks, replicate, num_micro_batches, dtype):
    """Each block is gathered for the forward and again for the backward, the rest once; the gradients are
    reduced in fp32; each but for a rank's own part.
    Between two copies the shards' gradients go over once, in a ring."""
    blocks, rest, parts = 2 * (64 + 4 * 64 * 64 + 3 * 64 * 128), 400 * 64 + 64, ranks // replicate
    traffic = simulated(ranks, num_micro_batches, replicate=replicate, dtype=dtype).traffic
    assert traffic["all-gathered"] == num_micro_batches * (2 * blocks + rest) * (parts - 1) // parts * (
        2 if dtype == "bfloat16" else 4
    )
    assert traffic["reduce-scattered"] == num_micro_batches * (blocks + rest) * (parts - 1) // parts * 4
    assert traffic["all-reduced"] == (replicate - 1) * (blocks + rest) // parts * 4


# ---- operations --------------------------------------------------------------------------------------------

def test_operations_by_hand_with_a_window_and_two_lengths():
    """A block has 8 (8 + 4 + 4 + 8) + 3 x 8 x 16 weights, the head 8 x 10. The full layer sees 10 and 3
    pairs, the one with a window of 3 sees 9 and 3."""
    config = ModelConfig(
        model_type="cohere2",
        vocab_size=10,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    )
    assert (
        training_flops(config, [4, 2], 4)
        == 6 * (2 * 576 * 6 + 80 * 4) + 12 * 2 * 4 * (10 + 3 + 9 + 3)
        == 45792
    )


def test_operations_are_those_that_torch_counts():
    """torch counts attention over all pairs, seen or not."""
    config, mask = (
        ModelConfig(**SMALL),
        torch.arange(129).expand(2, 129) > 0,
    )  # 256 supervised tokens: no chunk is padded
    model = init_weights(
        CohereForCausalLM(config), torch.Generator().manual_seed(0)
    ).bfloat16()  # in fp32 the products are oneDNN's, which torch does not count
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(2, 129, dtype=torch.int64), mask).sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    of_attention = 12 * 64 * 2 * 2 * 129 * 130 // 2
    assert counted == pytest.approx(training_flops(config, [129, 129], 256) - of_attention, rel=0.02)


# ---- the table ---------------------------------------------------------------------------------------------

MADE = {"pretrain": Pretrain, "sft": SFT, "reward": Reward, "dpo": DPO, "kto": KTO, "rl": RL,
        "router": Routing, "classify": Classify, "sidenet": Side}


def told(stage, ranks=2, **changes):
    with torch.device("meta"):
        settings = MADE[stage](batch_size=8, max_length=128, **changes)
        model = builder(stage, None, settings)(ModelConfig(**SMALL))
    return estimate.dry_run(stage, "small", model, settings, None, None, None, ranks)


@pytest.mark.parametrize("stage", MADE)
def test_every_stage_says_what_it_needs_without_data_a_gpu_or_weights(stage):
    text = told(stage)
    assert "fits 80 GB, fits 141 GB" in text and all(
        word in text
        for word in ("optimizer moments", "all-gathered", "tokens:", "operations")
    )
    assert ("logits chunk" in text) == (stage not in ("router", "classify", "sidenet"))
    assert ("reference pass" in text) == (stage in ("dpo", "kto"))
    assert ("KV cache" in text) == (stage == "rl")


def test_simpo_is_told_no_reference_pass():
    assert "reference pass" not in told("dpo", loss="simpo", simpo_gamma=1.0)


def test_a_critic_is_counted_with_its_moments_and_gradients():
    """A critic of the policy's size, but for one row of the head."""
    def gigabytes(text, part):
        return float(re.search(rf"^ *([\d.]+)  {part}", text, re.MULTILINE)[1])

    sizes = dict(SMALL, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)
    with torch.device("meta"):
        model = CohereForCausalLM(ModelConfig(**sizes))
    both = (RL(batch_size=8, max_length=128, algorithm=algorithm) for algorithm in ("rloo", "ppo"))
    rloo, ppo = (estimate.dry_run("rl", "M", model, each, None, None, None, 2) for each in both)
    for part in ("parameters", "gradients", "optimizer moments"):
        assert gigabytes(ppo, part) == pytest.approx(2 * gigabytes(rloo, part), abs=0.011), part
    assert "a critic of the size of the reward model" in ppo


def test_the_kv_cache_by_hand():
    """16 rows of a rank (8 prompts x 4 samples over 2 ranks), 128 tokens, keys and values, 2 layers of 64
    numbers, fp32."""
    items = estimate.items_of(STAGES["rl"], RL(max_length=128), None, None)
    assert (
        estimate.cache_bytes(ModelConfig(**SMALL), RL(batch_size=8), items, 2) == 16 * 128 * 2 * 2 * 64 * 4
    )


def test_with_cpu_offload_weights_gradients_and_moments_are_counted_in_the_cpus_memory():
    plain, offloaded = told("sft"), told("sft", cpu_offload=True)
    assert (
        "in the CPU's memory" in offloaded
        and "in the CPU's memory" not in plain
        and "optimizer moments" not in offloaded
    )


def test_a_model_that_does_not_fit_is_said_not_to_fit(monkeypatch):
    monkeypatch.setattr(estimate, "CARDS", (0.001, 80))
    assert "does not fit 0.001 GB, fits 80 GB" in told("sft")


if __name__ == "__main__":
    main()
