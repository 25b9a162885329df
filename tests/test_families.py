"""The families of decoders beside Cohere's: logits that transformers recorded (tests/golden), and that every
way to compute them here says the same."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small import tokenizer

from aya_min import model_config, weights
from aya_min.families import FAMILIES
from aya_min.model import CohereForCausalLM
from aya_min.model_config import ModelConfig
from aya_min.sampling import generate

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from make_families import CASES, YARN, settings, weights_of
from make_golden import KEPT, tokens

CONFIGS = json.loads((GOLDEN / "families.json").read_text(encoding="utf-8"))
LENGTHS = torch.tensor([24, 17, 5])


def model_of(case, **changes):
    """The model of a golden case."""
    model = CohereForCausalLM(ModelConfig.from_published(CONFIGS[case] | changes))
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(t) for name, t in weights_of(case, shapes).items()})
    return model


def write(folder, case):
    """The model folder of a case, config.json as transformers wrote it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[case]), encoding="utf-8")
    save_file(model_of(case).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_transformers(case, tmp_path):
    model, _ = weights.load(write(tmp_path / "model", case))
    ids, mask = tokens(list(CASES).index(case))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).numpy()[mask][:, KEPT]
    with safe_open(GOLDEN / "families.safetensors", "numpy") as file:
        golden = file.get_tensor(case)
    assert golden.std() > 0.05 and np.abs(logits - golden).max() <= 1e-5


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if not name.startswith("cohere")])
def test_every_family_has_golden_cases_and_what_a_config_leaves_out_has_transformers_default(model_type):
    assert sum(case["model_type"] == model_type for case in CASES.values()) > 1
    assert ModelConfig.from_published({"model_type": model_type}) == ModelConfig.from_published(
        CONFIGS[model_type])


@pytest.mark.parametrize("case", CASES)
def test_a_config_survives_publishing_and_reading_as_older_files_say_it_too(case):
    config = ModelConfig.from_published(CONFIGS[case])
    published = json.loads(json.dumps(config.published()))
    assert ModelConfig.from_published(published) == config
    assert ModelConfig.from_published(settings(case)) == ModelConfig.from_published(
        {**published, **{name: CONFIGS[case].get(name) for name in ("bos_token_id", "pad_token_id")}})
    del published["rope_parameters"]
    assert ModelConfig.from_published(published) == config


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_have_the_logits_log_probs_and_gradients_of_padded_ones(case):
    model = model_of(case)
    ids, mask = map(torch.from_numpy, tokens(0))
    mask[:, 0] = False
    model.model.packing = False
    padded = model(ids, mask=mask)
    torch.testing.assert_close(padded, model(ids).log_softmax(-1)[:, :-1].gather(
        2, ids[:, 1:, None])[..., 0][mask[:, 1:]], atol=2e-5, rtol=1e-5)
    of_padded = torch.autograd.grad(padded.sum(), list(model.parameters()))
    model.model.packing = True
    packed = model(ids, mask=mask, lengths=LENGTHS)
    torch.testing.assert_close(packed, padded)
    for one, two in zip(torch.autograd.grad(packed.sum(), list(model.parameters())), of_padded):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_engine_says_what_the_model_says_without_a_cache_alone_and_beside_other_rows(case):
    """Beyond the window, and in any batch the same, to the last bit where a head has 8 numbers or more."""
    model = model_of(case)
    ids, _ = tokens(0)
    prompts = [ids[0, :9].tolist(), ids[1, :3].tolist(), ids[1, :17].tolist(), ids[2, :5].tolist()]
    together = generate(model, prompts, max_new_tokens=24, temperature=0, batch_size=3)
    for prompt, [answer] in zip(prompts, together):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer.ids])).log_softmax(-1)[0, len(prompt) - 1:-1]
        assert logps.argmax(-1).tolist() == answer.ids
        assert logps.amax(-1).sum().item() == pytest.approx(answer.logp, abs=2e-4)
        [[alone]] = generate(model, [prompt], max_new_tokens=24, temperature=0)
        assert alone.ids == answer.ids and alone.logp == (
            answer.logp if model.config.head_dim >= 8 else pytest.approx(answer.logp, abs=2e-5))


@pytest.mark.parametrize("case", ["llama: untied", "qwen2: yarn", "qwen3: the second layer slides, tied",
                                  "gemma2: both kinds of layers",
                                  "gemma3_text: both kinds of layers, linear"])
def test_in_bf16_the_engine_and_the_model_agree_with_fp32(case):
    model, (ids, _) = model_of(case), tokens(0)
    prompt = ids[0, :9].tolist()
    with torch.no_grad():
        exact = model(torch.tensor([prompt]))[0]
        half = model.bfloat16()
        torch.testing.assert_close(half(torch.tensor([prompt]))[0].float(), exact, rtol=0.1, atol=0.5)
    from aya_min.engine import Engine, Fused
    logits, _ = Engine(Fused(half), 1, 32, 8, 0).prefill([prompt])
    torch.testing.assert_close(logits[0], exact[-1], rtol=0.1, atol=0.5)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_we_save_unchanged_and_computes_the_same(case, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; it is needed by this comparison only")
    model, its_tokenizer = weights.load(write(tmp_path / "model", case))
    weights.save(tmp_path / "saved", model, its_tokenizer)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    ids, mask = map(torch.from_numpy, tokens(0))
    with torch.no_grad():
        difference = theirs(input_ids=ids, attention_mask=mask.long()).logits[mask] - model(ids)[mask]
    assert difference.abs().max() <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = model_config.ModelConfig.from_published(
        json.loads((tmp_path / "theirs" / "config.json").read_text()))
    assert again == model.config


LLAMA, GEMMA3 = dict(model_type="llama"), dict(model_type="gemma3_text")


@pytest.mark.parametrize("raw, says", [
    (LLAMA | {"attention_bias": True}, "attention_bias True"), (LLAMA | {"mlp_bias": True}, "mlp_bias True"),
    (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "only linear llama3 yarn"),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "no factor"),
    (LLAMA | {"rope_scaling": YARN | {"beta_middle": 3}}, "with beta_middle"),
    (LLAMA | {"rope_scaling": YARN | {"factor": 0.5}}, "with factor"),
    (LLAMA | {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "with partial_rotary_factor"),
    (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                               "high_freq_factor": 4.0}}, "low_freq_factor must be below"),
    (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "for each layer type"),
    (GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "scaled rope of sliding layers"),
    (GEMMA3 | {"hidden_activation": "silu"}, "hidden_activation 'silu'"),
    (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA3 | {"final_logit_softcapping": -1.0}, "final_logit_softcapping -1.0"),
    ({"model_type": "qwen2", "use_sliding_window": "yes"}, "use_sliding_window 'yes'"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window 0"),
    ({"model_type": "gemma4_text"}, "model_type 'gemma4_text' is not supported")])
def test_what_would_be_computed_wrongly_is_refused_by_name(raw, says):
    with pytest.raises(ValueError, match="^config.json: ") as error:
        ModelConfig.from_published(raw)
    assert says in str(error.value)
