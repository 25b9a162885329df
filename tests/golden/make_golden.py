"""Make golden.safetensors and configs.json: logits of transformers' own models over small random
configurations, for tests/test_golden.py.

    python tests/golden/make_golden.py          (needs transformers, which nothing else here does; the files
    say its version)

Weights and tokens are not stored: both sides make them from the functions below. Of the 400 logits of each
position every seventh is kept.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

HERE = Path(__file__).parent
VOCAB, KEPT = 400, slice(None, None, 7)                 # as many words as the tests' tokenizer has
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    logit_scale=0.5,
    eos_token_id=9,
    rope_theta=100.0,
)
SLIDING, FULL = "sliding_attention", "full_attention"
CASES = {
    "cohere: grouped heads": dict(),
    "cohere: query-key norm, as many key-value heads as heads": dict(use_qk_norm=True, num_key_value_heads=4),
    "cohere: untied head, one key-value head": dict(tie_word_embeddings=False, num_key_value_heads=1),
    "cohere: a head width of its own, query-key norm, untied head": dict(
        head_dim=10, use_qk_norm=True, tie_word_embeddings=False
    ),
    "cohere: another rope_theta, logit_scale and epsilon": dict(
        rope_theta=4e6, logit_scale=0.0625, layer_norm_eps=1e-3
    ),
    "cohere: transformers' own rope_theta": dict(rope_theta=None),
    "cohere2: three sliding layers of four, beyond the window": dict(
        model_type="cohere2", num_hidden_layers=4, sliding_window=8
    ),
    "cohere2: layers in an unusual order, untied head": dict(
        model_type="cohere2",
        num_hidden_layers=5,
        sliding_window=8,
        tie_word_embeddings=False,
        layer_types=[FULL, SLIDING, FULL, SLIDING, SLIDING],
    ),
    "cohere2: every second layer, as many key-value heads as heads": dict(
        model_type="cohere2", sliding_window=8, sliding_window_pattern=2, num_key_value_heads=4
    ),
    "cohere2: full layers only": dict(model_type="cohere2", sliding_window=8, layer_types=[FULL, FULL]),
    "cohere2: a window of one token": dict(
        model_type="cohere2", sliding_window=1, layer_types=[SLIDING, FULL]
    ),
    "cohere2: within the window, transformers' own rope_theta": dict(
        model_type="cohere2", layer_types=[SLIDING, SLIDING], rope_theta=None
    ),
    "cohere2: a head width of its own, another rope_theta and logit_scale": dict(
        model_type="cohere2",
        num_hidden_layers=4,
        sliding_window=8,
        head_dim=10,
        rope_theta=5e4,
        logit_scale=1.0,
    ),
}


def settings(case):
    """(model type, what to give to transformers' config) of a case."""
    values = {**SIZES, **CASES[case]}
    return values.pop("model_type", "cohere"), {
        name: value for name, value in values.items() if value is not None
    }


def tensors(shapes, seed):
    """{name: random tensor}, fp32: matrices around 0, norms around 1. RandomState's numbers are fixed for
    good, unlike a Generator's."""
    draw = np.random.RandomState(seed)
    return {
        name: ((1 if "norm" in name else 0) + 0.3 * draw.standard_normal(shape)).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def tokens(seed):
    """(input_ids (3, 24), mask (3, 24)): rows of 24, 17 and 5 tokens, padded on the right."""
    ids, mask = np.random.RandomState(seed).randint(10, VOCAB, (3, 24)), np.arange(24) < np.array(
        [[24], [17], [5]]
    )
    return np.where(mask, ids, 0), mask


def written(model):
    """The config.json that transformers writes for a model or a config."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def main():
    import torch
    import transformers
    from safetensors.numpy import save_file
    golden, configs = {}, {
        kind: written(transformers.AutoConfig.for_model(kind)) for kind in ("cohere", "cohere2")
    }  # the defaults
    for seed, case in enumerate(CASES):
        model_type, values = settings(case)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **values), attn_implementation="eager"
        ).eval()
        shapes = {
            name: tuple(p.shape) for name, p in model.named_parameters()
        }  # a tied head is not among them
        missing, unexpected = model.load_state_dict(
            {name: torch.tensor(t) for name, t in tensors(shapes, seed).items()}, strict=False
        )
        assert not unexpected and missing == ["lm_head.weight"] * model.config.tie_word_embeddings
        ids, mask = (torch.tensor(t) for t in tokens(seed))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask.long()).logits
        golden[case] = np.ascontiguousarray(logits[mask][:, KEPT].numpy())  # (46 real positions, 58)
        configs[case] = written(model)
    save_file(
        golden,
        HERE / "golden.safetensors",
        metadata={"transformers": transformers.__version__, "torch": torch.__version__},
    )
    (HERE / "configs.json").write_text(json.dumps(configs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
