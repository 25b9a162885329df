"""Makes mergekit.safetensors: merges of small made checkpoints by mergekit. Run with the Python of an
environment that has mergekit:

    pip install mergekit==0.1.5 && python tests/golden/make_mergekit.py

Run by hand; the tests read only what it made. The checkpoints are a Llama of three layers: mergekit refuses
Cohere models without qk-norm.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def case(method, weights=None, density=None, base="base", models="ABC", **parameters):
    of_each = [
        {key: values[i] for key, values in (("weight", weights), ("density", density)) if values}
        for i in range(len(models))
    ]
    config = {
        "merge_method": method,
        "models": [{"model": name, "parameters": own} for name, own in zip(models, of_each)],
        "parameters": parameters,
        "dtype": "float32",
    }
    return config | ({"base_model": base} if base else {})


CASES = {  # name: mergekit's configuration; dropping at random is left out by density 1
    "linear": case("linear", [0.5, 0.3, 0.4], base=None),
    "linear, not normalized": case("linear", [0.5, 0.3, 0.4], base=None, normalize=False),
    "linear, gradients and filters": case(
        "linear",
        [
            [0.0, 1.0],
            [{"filter": "self_attn", "value": 0.25}, {"filter": "mlp", "value": [1.0, 0.5]}, {"value": 0.7}],
            0.5,
        ],
        base=None,
    ),
    "slerp": case("slerp", models="AB", base="A", t=0.3),
    "slerp, the base second": case(
        "slerp",
        models="AB",
        base="B",
        t=[
            {"filter": "self_attn", "value": [0, 0.5, 1]},
            {"filter": "mlp", "value": [1, 0.5, 0]},
            {"value": 0.5},
        ],
    ),
    "slerp, near-parallel": case("slerp", models=["base", "near"], base="base", t=0.4),
    "task_arithmetic": case("task_arithmetic", [0.5, 0.3, -0.2], **{"lambda": 0.7}),
    "task_arithmetic, normalized": case("task_arithmetic", [0.5, 0.3, 0.4], normalize=True),
    "model_stock": case("model_stock"),
    "model_stock, two": case("model_stock", models="AB"),
    "ties": case("ties", [1.0, 1.0, 1.0], [0.4, 0.4, 0.4]),
    "ties, weights, densities, lambda": case("ties", [0.5, 0.3, 0.2], [0.6, 0.3, 0.9], **{"lambda": 0.7}),
    "ties, not normalized, the base listed": case(
        "ties", [0.0, 0.5, 0.3], [1.0, 0.5, 0.25], models=["base", "A", "B"], normalize=False
    ),
    "ties, gradient of the density": case("ties", [1.0, 1.0], [[0.2, 0.9], 0.5], models="BC", int8_mask=True),
    "dare_linear": case("dare_linear", [0.5, 0.3, 0.4], [1.0, 1.0, 1.0]),
    "dare_ties": case("dare_ties", [0.5, 0.3, 0.4], [1.0, 1.0, 1.0], **{"lambda": 0.8}),
    "dare_ties, normalized": case("dare_ties", [0.5, 0.3, 0.4], [1.0, 1.0, 1.0], normalize=True),
}


def checkpoints():
    """{folder name: {tensor name: fp32 array}}: a base, three models trained a little away from it, and
    one very near."""
    shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (16, 8)}
    for i in range(CONFIG["num_hidden_layers"]):
        own = {
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (12, 8),
            "mlp.up_proj": (12, 8),
            "mlp.down_proj": (8, 12),
            "input_layernorm": (8,),
            "post_attention_layernorm": (8,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in own.items()}
    draws = {name: np.random.default_rng(seed) for seed, name in enumerate(["base", "A", "B", "C", "near"])}
    scales = {"A": 0.3, "B": 0.3, "C": 0.3, "near": 0.01}
    base = {name: draws["base"].standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {"base": base} | {
        model: {
            name: array + np.float32(scale) * draws[model].standard_normal(array.shape, dtype=np.float32)
            for name, array in base.items()
        }
        for model, scale in scales.items()
    }


def write(place):
    """The model folders of checkpoints() in a folder."""
    for model, state in checkpoints().items():
        (place / model).mkdir()
        save_file(state, place / model / "model.safetensors", metadata={"format": "pt"})
        (place / model / "config.json").write_text(json.dumps(CONFIG))


def located(name, place):
    """The configuration of a case, with the folders of `write`."""
    config = CASES[name]
    models = [model | {"model": str(place / model["model"])} for model in config["models"]]
    return (
        config
        | {"models": models}
        | ({"base_model": str(place / config["base_model"])} if "base_model" in config else {})
    )


def main():
    import mergekit
    version = (
        subprocess.run([sys.executable, "-m", "pip", "show", "mergekit"], capture_output=True, text=True)
        .stdout.splitlines()[1]
        .split()[1]
    )
    found = {}
    with TemporaryDirectory() as place:
        place = Path(place)
        write(place)
        for name in CASES:
            (place / "config.json").write_text(json.dumps(located(name, place)))
            subprocess.run(
                [
                    Path(sys.executable).with_name("mergekit-yaml"),
                    "config.json",
                    "out",
                    "--no-copy-tokenizer",
                    "--quiet",
                ],
                cwd=place,
                check=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            for file in (place / "out").glob("*.safetensors"):
                found |= {f"{name}|{tensor}": array for tensor, array in load_file(file).items()}
                file.unlink()
    save_file(found, Path(__file__).with_name("mergekit.safetensors"), metadata={"mergekit": version})
    print(f"{len(found)} tensors by mergekit {version} ({mergekit.__file__})")


if __name__ == "__main__":
    main()
