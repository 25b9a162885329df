"""Make encoder_decoder.safetensors and encoder_decoder.json: logits, losses and gradients of transformers'
own T5, mT5 and umT5 over small random configurations, for tests/test_encoder_decoder.py.

    python tests/golden/make_encoder_decoder.py     (needs transformers; the file says its version)

Weights and tokens are not stored: both sides make them from the functions below. Sources are longer than
relative_attention_max_distance, and ragged.
"""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SIZES = dict(vocab_size=60, d_model=16, d_kv=6, d_ff=20, num_layers=2, num_decoder_layers=3, num_heads=3,
             relative_attention_num_buckets=8, relative_attention_max_distance=12, decoder_start_token_id=0)
SOURCES, TARGETS = (30, 7, 19, 1), (3, 24, 11, 16)          # lengths in tokens
CASES = {
    "t5: v1.1, as Aya 101": dict(model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5: v1.0, tied and scaled": dict(model_type="t5", feed_forward_proj="relu"),
    "t5: tied and scaled, another start": dict(
        model_type="t5", feed_forward_proj="gated-gelu", decoder_start_token_id=2),
    "mt5: untied": dict(model_type="mt5", tie_word_embeddings=False, num_decoder_layers=None),
    "mt5: tied, another epsilon": dict(model_type="mt5", layer_norm_epsilon=1e-2),
    "umt5: a table for each layer": dict(model_type="umt5", tie_word_embeddings=False),
    "umt5: tied and scaled, gated-silu": dict(model_type="umt5", feed_forward_proj="gated-silu"),
}


def weights_of(case, shapes):
    """{name: random tensor} for {name: shape}."""
    rng = np.random.default_rng(list(CASES).index(case))
    return {name: (rng.normal(0, 0.2, shapes[name]) + ("norm" in name)).astype(np.float32)
            for name in sorted(shapes)}


def tokens(case):
    """(sources (4, 30), targets (4, 24)): ids, 0 in the padding."""
    rng = np.random.default_rng(100 + list(CASES).index(case))
    made = []
    for lengths in (SOURCES, TARGETS):
        ids = rng.integers(3, SIZES["vocab_size"], (len(lengths), max(lengths)))
        made.append(np.where(np.arange(max(lengths)) < np.array(lengths)[:, None], ids, 0))
    return made


def main():
    import torch
    import transformers
    from safetensors.numpy import save_file
    golden, configs = {}, {}
    for case, changes in CASES.items():
        given = {key: value for key, value in {**SIZES, **changes}.items() if value is not None}
        config = transformers.AutoConfig.for_model(**given)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
        if changes.get("tie_word_embeddings") is False:
            model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.shared.weight))
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        made = {name: torch.tensor(t) for name, t in weights_of(case, shapes).items()}
        _, unexpected = model.load_state_dict(made, strict=False)
        assert not unexpected
        sources, targets = map(torch.tensor, tokens(case))
        out = model(input_ids=sources, attention_mask=(sources > 0).long(),
                    labels=targets.masked_fill(targets == 0, -100))
        (out.loss * (targets > 0).sum()).backward()
        logits = out.logits.detach()[targets > 0]                           # (54, 60)
        golden[f"{case}|logits"] = np.ascontiguousarray(logits.numpy())
        golden[f"{case}|loss"] = (out.loss.detach() * (targets > 0).sum()).numpy()[None]             # nats
        for name, p in model.named_parameters():
            golden[f"{case}|norm of {name}"] = p.grad.norm().numpy()[None]
            if "bias" in name or "norm" in name:
                golden[f"{case}|gradient of {name}"] = p.grad.numpy()
        # As their save_pretrained writes it, from which the head's kind cannot be told.
        configs[case] = json.loads(config.to_json_string()) | {"architectures": [type(model).__name__]}
    save_file(golden, HERE / "encoder_decoder.safetensors",
              metadata={"transformers": transformers.__version__, "torch": torch.__version__})
    (HERE / "encoder_decoder.json").write_text(json.dumps(configs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
