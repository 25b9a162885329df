"""What I publish: a model folder as transformers and vLLM read it. config.json, generation_config.json, tokenizer.json,
tokenizer_config.json and model.safetensors (or shards with model.safetensors.index.json). No pickle; nothing outside the folder is opened.

A folder is written under a temporary name and renamed, so one that exists is whole. Parameter names need no map.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import distributed
from .checkpoint import replace_folder
from .config import ModelConfig
from .model import CohereForCausalLM, RewardModel, init_weights
from .tokenizer import load_tokenizer

ARCHITECTURES = {"CohereForCausalLM": CohereForCausalLM, "CohereForSequenceClassification": RewardModel}
USUAL_HEAD_LACKS = "score_logps.weight"         # a head that reads the last token only: as if this were 0


def tensor_files(folder):
    """{tensor name: file} of a model folder, single file or sharded; an index that names a file outside the folder is refused."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{index}: no weight_map of tensor names and files in it; download the model again") from None
        for name in set(weight_map.values()):
            if Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{index}: shard {name!r} is not a file in the folder; download the model again")
        return {tensor: folder / name for tensor, name in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{folder}: no model.safetensors and no model.safetensors.index.json; only safetensors are read, never pickles")
    try:
        with safe_open(single, "pt") as f:
            return {name: single for name in f.keys()}
    except SafetensorError as error:
        raise ValueError(f"{single}: not a whole safetensors file ({error}); copy or download it again") from None


def read_config(folder):
    """(ModelConfig, architecture name) of a model folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: not a model folder (no config.json); give a folder that a stage wrote or that was downloaded whole")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    architecture = (raw.get("architectures") or ["?"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; supported: {' '.join(ARCHITECTURES)}")
    return ModelConfig.from_published(raw, where=str(path)), architecture


def look_into(folder):
    """(model without weights, tokenizer, {tensor name: file}) of a model folder whose files fit together; no weights are read."""
    config, architecture = read_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, config.json a vocabulary of {config.vocab_size}; they are of different models")
    with torch.device("meta"):
        model = ARCHITECTURES[architecture](config)
    files, own = tensor_files(folder), model.state_dict()
    missing, extra = sorted(own.keys() - files.keys() - {USUAL_HEAD_LACKS}), sorted(files.keys() - own.keys())
    if missing or extra:
        raise ValueError(f"{folder}: the tensors do not fit config.json: " + "; ".join(
            f"{len(names)} {what}: {' '.join(names[:10])}" for what, names in (("missing", missing), ("extra", extra)) if names))
    return model, tokenizer, files


@torch.no_grad()
def load(folder, device="cpu", dtype=torch.float32):
    """(model, tokenizer) of a model folder, read tensor by tensor into the module that its config.json names."""
    model, tokenizer, files = look_into(folder)
    model = model.to_empty(device=device).to(dtype)
    own = model.state_dict()
    for path in sorted(set(files.values())):
        try:
            with safe_open(path, "pt", device=str(device)) as f:
                differ = sorted({name for name, file in files.items() if file == path} ^ set(f.keys()))
                if differ:
                    raise ValueError(f"{path}: does not hold what the index says: {' '.join(differ[:10])}; download the model again")
                for name in f.keys():
                    shape = tuple(f.get_slice(name).get_shape())
                    if shape != tuple(own[name].shape):
                        raise ValueError(f"{path}: {name} has shape {shape}, config.json wants {tuple(own[name].shape)}")
                    own[name].copy_(f.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None
    if USUAL_HEAD_LACKS in own.keys() - files.keys():
        own[USUAL_HEAD_LACKS].zero_()
    return model, tokenizer


def load_trunk(folder, device="cpu"):
    """A reward model on a language model's (or reward model's) decoder, its head drawn anew (seed 0) if the folder has none."""
    model, tokenizer = load(folder, device)
    if isinstance(model, RewardModel):
        return model, tokenizer
    reward_model = init_weights(RewardModel(model.config), torch.Generator().manual_seed(0)).to(device)
    reward_model.model = model.model
    return reward_model, tokenizer


def save(folder, model, tokenizer, dtype=torch.float32):
    """Publish a plain or sharded model. A collective: every rank calls it, rank 0 writes. `folder` must not exist."""
    state = distributed.full_state(model)
    if distributed.is_main():
        folder = Path(folder)
        temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        temporary.mkdir(parents=True)
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, temporary / "model.safetensors", metadata={"format": "pt"})
        config = model.config.published(model.architecture, str(dtype).removeprefix("torch."))
        if isinstance(model, RewardModel):
            config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        (temporary / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.end_of_turn_id, "pad_token_id": tokenizer.pad_id}
        (temporary / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
        tokenizer.save(temporary)
        replace_folder(temporary, folder)
    distributed.barrier()
