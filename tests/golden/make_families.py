"""Make families.safetensors and families.json: logits of transformers' own models of other families than
Cohere's over small random configurations, for tests/test_families.py.

    python tests/golden/make_families.py        (needs transformers; the file says its version)

Weights and tokens are those of make_golden.py, whose logits of Cohere's two families stay as they are.
"""

import json
from pathlib import Path

import numpy as np
from make_golden import KEPT, SIZES, tensors, tokens, written

HERE = Path(__file__).parent
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", factor=2.0)
OURS = ("logit_scale",)                                 # of SIZES, which only Cohere's families have
CASES = {
    "llama: untied": dict(model_type="llama"),
    "llama: tied, a head width of its own, llama3": dict(
        model_type="llama", tie_word_embeddings=True, head_dim=10, rope_scaling=LLAMA3),
    "llama: linear": dict(model_type="llama", rope_scaling=LINEAR),
    "qwen2: yarn": dict(model_type="qwen2", rope_scaling=YARN),
    "qwen2: the second layer slides, tied": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1,
        tie_word_embeddings=True),
    "qwen3: a head width of its own, yarn with its length": dict(
        model_type="qwen3", head_dim=10, rope_scaling=YARN | dict(attention_factor=1.3)),
    "qwen3: the second layer slides, tied": dict(
        model_type="qwen3", head_dim=6, use_sliding_window=True, sliding_window=5, max_window_layers=1,
        tie_word_embeddings=True),
    "mistral: all layers slide": dict(model_type="mistral", sliding_window=5, head_dim=10),
    "mistral: no window, yarn with every setting": dict(
        model_type="mistral", sliding_window=None, rope_scaling=YARN | dict(
            mscale=1.0, mscale_all_dim=0.7, beta_fast=4.0, beta_slow=0.5, truncate=False)),
    "gemma2: both kinds of layers": dict(
        model_type="gemma2", head_dim=10, sliding_window=5, query_pre_attn_scalar=7,
        attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    "gemma2: no caps, untied": dict(
        model_type="gemma2", head_dim=6, sliding_window=5, attn_logit_softcapping=None,
        final_logit_softcapping=None, tie_word_embeddings=False),
    "gemma3_text: both kinds of layers, linear": dict(
        model_type="gemma3_text", head_dim=10, num_hidden_layers=3, sliding_window=5,
        sliding_window_pattern=3, query_pre_attn_scalar=7, rope_local_base_freq=50.0,
        rope_scaling=LINEAR),
    "gemma3_text: full layers, final cap": dict(
        model_type="gemma3_text", head_dim=6, layer_types=["full_attention"] * 2,
        final_logit_softcapping=5.0),
    "ministral3: queries grow": dict(
        model_type="ministral3", head_dim=10, rope_parameters=YARN | dict(
            rope_theta=500.0, llama_4_scaling_beta=0.6, original_max_position_embeddings=8)),
    "ministral3: all layers slide, tied": dict(
        model_type="ministral3", head_dim=6, sliding_window=5, tie_word_embeddings=True),
}


def settings(case):
    """What to give to transformers' config of a case, model_type included."""
    return {name: value for name, value in {**SIZES, **CASES[case]}.items() if name not in OURS}


def weights_of(case, shapes):
    """{name: random tensor} of a case. Gemma's norms multiply by 1 + w."""
    made = tensors(shapes, list(CASES).index(case))
    return {name: tensor - ("norm" in name and case.startswith("gemma")) for name, tensor in made.items()}


def main():
    import torch
    import transformers
    from safetensors.numpy import save_file
    golden, configs = {}, {}
    for kind in sorted({case["model_type"] for case in CASES.values()}):
        configs[kind] = written(transformers.AutoConfig.for_model(kind))        # the defaults
    for seed, case in enumerate(CASES):
        config = transformers.AutoConfig.for_model(**settings(case))
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        made = {name: torch.tensor(t) for name, t in weights_of(case, shapes).items()}
        missing, unexpected = model.load_state_dict(made, strict=False)
        assert not unexpected and missing == ["lm_head.weight"] * config.tie_word_embeddings
        ids, mask = (torch.tensor(t) for t in tokens(seed))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask.long()).logits
        golden[case] = np.ascontiguousarray(logits[mask][:, KEPT].numpy())      # (46 real positions, 58)
        configs[case] = written(model)
    save_file(golden, HERE / "families.safetensors",
              metadata={"transformers": transformers.__version__, "torch": torch.__version__})
    (HERE / "families.json").write_text(json.dumps(configs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
