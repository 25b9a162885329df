"""What a CUDA GPU computes beside the CPU: every stage's steps, compiled and not, packed, sharded, resumed;
the engine's recorded step; scores and merges. All of it is skipped without a GPU."""

import shutil

import pytest
import torch
from small import EVERY, assert_close, language_model, logged, reward_model, run, tokenizer

from aya_min import distributed, loop, weights
from aya_min.data import load_prompts
from aya_min.fused import Fused
from aya_min.reward import score_texts
from aya_min.sampling import answer_rows, generate

pytestmark = [pytest.mark.usefixtures("every_stage"),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CUDA = torch.device("cuda")
WINDOWS = dict(model_type="cohere2", sliding_window=16, num_hidden_layers=4, logit_scale=0.25)
_SLIDES = dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=16)
FAMILIES = {"cohere": {}, "cohere2": WINDOWS,
            "llama": dict(model_type="llama", tie_word_embeddings=False, rope_scaling={
                "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32}),
            "qwen2": dict(model_type="qwen2"), "qwen3": dict(model_type="qwen3", head_dim=16),
            "mistral": dict(model_type="mistral", sliding_window=16),
            "gemma2": dict(_SLIDES, model_type="gemma2"),
            "gemma3": dict(_SLIDES, model_type="gemma3_text", sliding_window_pattern=2)}
each_family = pytest.mark.parametrize("family", FAMILIES)


def same_steps(rows, others, rtol, keys=("step", "loss", "grad_norm", "tokens", "lr")):
    assert_close(*([{key: row[key] for key in keys} for row in each] for each in (rows, others)), rtol=rtol,
                 atol=1e-6)


@pytest.mark.parametrize("changes", [dict(compile=False), dict(), dict(compile=False, packing=True,
                                     activation_checkpointing=1)], ids=["eager", "compiled", "packed"])
@pytest.mark.parametrize("stage", EVERY)
def test_a_stage_takes_the_steps_that_it_takes_on_the_cpu(stage, changes, world, tmp_path):
    """In fp32. The samples of rl are the same; its loss is a small sum of large terms."""
    expected = logged(run(stage, world, tmp_path / "cpu"))
    found = logged(run(stage, world, tmp_path / "cuda", device=CUDA, **changes))
    same_steps(expected, found, 1e-3 if stage == "rl" else 2e-4)


@each_family
def test_a_family_takes_the_steps_that_it_takes_on_the_cpu(family, world, tmp_path):
    expected = logged(run("dpo", world, tmp_path / "cpu", architecture=FAMILIES[family]))
    found = logged(run("dpo", world, tmp_path / "cuda", device=CUDA, architecture=FAMILIES[family]))
    same_steps(expected, found, 5e-4)


@pytest.mark.parametrize("stage, family", [("reward", "cohere"), *(("dpo", family) for family in FAMILIES)])
def test_bfloat16_without_padding_is_bfloat16_with_it_and_near_fp32(stage, family, world, tmp_path):
    """Packed rows go through variable-length attention, which a CPU does not have."""
    def first(name, compile=False, **changes):
        return logged(run(stage, world, tmp_path / name, device=CUDA, compile=compile, max_steps=1,
                          architecture=FAMILIES[family], **changes))
    exact, padded = first("fp32"), first("padded", dtype="bfloat16")
    packed = first("packed", dtype="bfloat16", packing=True)
    same_steps(exact, padded, 0.05)
    same_steps(padded, packed, 0.05)
    same_steps(exact, first("compiled", None, dtype="bfloat16", packing=True), 0.05)


@pytest.mark.parametrize("changes", [dict(), dict(cpu_offload=True)], ids=["on the GPU", "offloaded"])
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_one_rank_that_shards_takes_the_same_steps(stage, changes, world, tmp_path, monkeypatch):
    """fully_shard over NCCL on a mesh of one."""
    expected = logged(run(stage, world, tmp_path / "plain", device=CUDA, compile=False))
    shard = distributed.shard

    def on_a_mesh(*args, **kwargs):
        return shard(*args, **kwargs, mesh=distributed.make_mesh())
    monkeypatch.setattr(distributed, "shard", on_a_mesh)
    try:
        found = logged(run(stage, world, tmp_path / "sharded", device=CUDA, compile=False, **changes))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    same_steps(expected, found, 1e-3 if stage == "rl" else 2e-4)


@pytest.mark.parametrize("stage", ["dpo", "rl"])
def test_a_resumed_run_takes_the_steps_of_one_that_never_stopped(stage, world, tmp_path):
    settings = dict(device=CUDA, max_steps=4, save_every=2)
    whole = run(stage, world, tmp_path / "whole", **settings)
    expected = logged(whole)
    shutil.copytree(whole, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "state" / "step-4")
    same_steps(expected, logged(run(stage, world, tmp_path / "stopped", resume=True, **settings)), 1e-4)


@each_family
@pytest.mark.parametrize("settings", [dict(temperature=0, num_samples=2),
                                      dict(temperature=0.7, top_p=0.9, batch_size=3)], ids=str)
def test_the_engine_answers_as_on_the_cpu(family, settings):
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(13, tokenizer().vocab_size, (n,), generator=rng).tolist()
               for n in (5, 100, 1, 40, 7, 2, 17, 64)]
    settings = dict(max_new_tokens=24, stop_ids=[20, 30, 40], seed=1) | settings
    model = language_model(**FAMILIES[family])
    expected = generate(model, prompts, **settings)
    found = generate(model.to(CUDA), prompts, **settings)
    assert [[c.ids for c in group] for group in found] == [[c.ids for c in group] for group in expected]
    for group, others in zip(found, expected):
        for c, other in zip(group, others):
            assert c.logp == pytest.approx(other.logp, rel=1e-4, abs=1e-3)


@torch.no_grad()
@each_family
def test_in_bfloat16_the_log_probs_are_those_of_the_plain_forward(family):
    model = language_model(**FAMILIES[family]).to(CUDA, torch.bfloat16)
    prompts = [list(range(20, 20 + n)) for n in (3, 30, 90)]
    exact = language_model(**FAMILIES[family]).to(CUDA)
    for prompt, [c] in zip(prompts, generate(Fused(model), prompts, max_new_tokens=20, temperature=1.0)):
        logits = exact(torch.tensor([prompt + c.ids], device=CUDA))[0].float().log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) + len(c.ids) - 1, device=CUDA)
        plain = logits[at, torch.tensor(c.ids, device=CUDA)].sum().item()
        assert c.logp == pytest.approx(plain, abs=0.1 * len(c.ids))


def test_scores_are_those_of_the_cpu(world):
    rows = load_prompts([world / "prompts.jsonl"])[:9]
    model, judge = language_model(), reward_model()
    texts = [{**row, **group[0]} for row, group in
             zip(rows, answer_rows(model, tokenizer(), rows, 1, 12, temperature=0))]
    expected = score_texts(judge, tokenizer(), texts, batch_size=4)
    found = score_texts(judge.to(CUDA), tokenizer(), texts, batch_size=4)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare-ties", "model-stock"])
def test_a_merge_on_the_gpu_is_the_merge_on_the_cpu(method, tmp_path, in_process):
    import merge
    for i in range(3):
        weights.save(tmp_path / str(i), language_model(i), tokenizer())
    models = [tmp_path / "0", tmp_path / "1"]
    base = [] if method in ("linear", "slerp") else ["--base", tmp_path / "2"]
    for device in ("cpu", "cuda"):
        words = (method, *models, *base, "--device", device, "--out", tmp_path / device)
        code, _, err = in_process(merge, *words)
        assert code == 0, err
    (one, _), (other, _) = (weights.load(tmp_path / device) for device in ("cpu", "cuda"))
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")


def test_mfu_is_below_1_and_logged(world, tmp_path):
    row = logged(run("sft", world, tmp_path / "run", device=CUDA, dtype="bfloat16", compile=False))[-1]
    peak = loop.peak_flops(CUDA, "bfloat16")
    assert peak is None or 0 < row["mfu"] < 1
