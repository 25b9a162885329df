"""What I publish: a model folder as transformers and vLLM read it. config.json, generation_config.json, tokenizer.json,
tokenizer_config.json and model.safetensors (or shards with model.safetensors.index.json). No pickle; nothing outside the folder is opened.

A folder is written under a temporary name and renamed, so one that exists is whole. Parameter names need no map.
"""

import os
from pathlib import Path

import torch

from . import distributed, tensorfiles
from .checkpoint import replace_folder
from .config import ModelConfig, stop_ids
from .model import CohereForCausalLM, RewardModel, initial_value
from .tokenizer import load_tokenizer

ARCHITECTURES = {"CohereForCausalLM": CohereForCausalLM, "Cohere2ForCausalLM": CohereForCausalLM,
                 "CohereForSequenceClassification": RewardModel, "Cohere2ForSequenceClassification": RewardModel}
USUAL_HEAD_LACKS = "score_logps.weight"         # a head that reads the last token only: as if this were 0


def read_config(folder):
    """(ModelConfig, class of the model) of a model folder."""
    raw, path = tensorfiles.read_config(folder), Path(folder) / "config.json"
    architecture = (raw.get("architectures") or ["?"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; supported: {' '.join(ARCHITECTURES)}")
    config = ModelConfig.from_published(raw, where=str(path))
    if config.model_type.capitalize() + ARCHITECTURES[architecture].task != architecture:
        raise ValueError(f"{path}: architecture {architecture} does not go with model_type {config.model_type}; download the model again")
    return config, ARCHITECTURES[architecture]


def read_stop_ids(folder):
    """The ids that end an answer, sorted: those of generation_config.json if it names any, else those of config.json."""
    path = Path(folder) / "generation_config.json"
    eos = tensorfiles.read_json(path).get("eos_token_id") if path.exists() else None
    if eos is None:
        return stop_ids(read_config(folder)[0].eos_token_id)
    try:
        return stop_ids(eos)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def look_into(folder, trunk=False):
    """(model without weights, tokenizer, header) of a model folder whose files fit together, see tensorfiles.read_header; no weights are read
    (but of a head that a tied model repeats).

    trunk: a reward model whatever the folder holds; if it is a language model, the decoder is there and the head is missing.
    """
    config, model_class = read_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, config.json a vocabulary of {config.vocab_size}; they are of different models")
    with torch.device("meta"):
        found, model = model_class(config), (RewardModel if trunk else model_class)(config)
    header, own = tensorfiles.read_header(folder), found.state_dict()
    alike = not config.tie_word_embeddings or tensorfiles.drop_tied_head(header)
    problems = [] if alike else ["lm_head.weight is not model.embed_tokens.weight, to which config.json ties it"]
    problems += [f"{name} is missing" for name in sorted(own.keys() - header.keys() - {USUAL_HEAD_LACKS})]
    problems += [f"{name} is extra" for name in sorted(header.keys() - own.keys())]
    for name in sorted(header.keys() & own.keys()):
        _, code, shape = header[name]
        if shape != tuple(own[name].shape):
            problems.append(f"{name} has shape {shape}, config.json wants {tuple(own[name].shape)}")
        elif code not in ("F32", "BF16", "F16", "F64"):
            problems.append(f"{name} is {code}, quantized weights are not read")
    if problems:
        raise ValueError(f"{folder}: the tensors do not fit config.json: {tensorfiles.first_of(problems, '; ')}")
    return model, tokenizer, header


@torch.no_grad()
def load(folder, device="cpu", dtype=torch.float32, sharded=False, compute_dtype=torch.float32, trunk=False, replicate=1, cpu_offload=False):
    """(model, tokenizer) of a model folder, read tensor by tensor into the module that its config.json names.

    sharded: distributed.shard(model, compute_dtype, replicate, cpu_offload) before anything is read, so that each rank reads and holds its rows only.
    trunk: a reward model on the folder's decoder; its head is drawn anew (seed 0) if the folder has none.
    """
    model, tokenizer, header = look_into(folder, trunk)
    model = model.to(dtype)
    if sharded:
        distributed.shard(model, compute_dtype, replicate, cpu_offload)
    generator = torch.Generator().manual_seed(0)
    for name, target in model.to_empty(device=device).state_dict().items():
        local, rows = distributed.own_rows(target)
        if name in header:
            local.copy_(tensorfiles.read(header, name, rows))
        elif name == USUAL_HEAD_LACKS and "score.weight" in header:
            local.zero_()
        else:
            local.copy_(initial_value(model.config, name, target.shape, generator)[rows])
    return model, tokenizer


def save(folder, model, tokenizer, dtype=torch.float32, shard_bytes=tensorfiles.SHARD_BYTES):
    """Publish a plain or sharded model, tensor by tensor. A collective: every rank calls it, rank 0 writes. An older folder of that name is replaced."""
    state = model.state_dict()
    files = tensorfiles.plan({name: (tensorfiles.CODES[dtype], tuple(tensor.shape)) for name, tensor in state.items()}, shard_bytes)
    tensors = (distributed.full(state[name]).to("cpu", dtype) for specs in files.values() for name in specs)
    if distributed.is_main():
        folder = Path(folder)
        temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        temporary.mkdir(parents=True)
        tensorfiles.write(temporary, files, tensors)
        config = model.config.published(model.task, str(dtype).removeprefix("torch."))
        if isinstance(model, RewardModel):
            config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        tensorfiles.write_json(temporary / "config.json", config)
        stops = stop_ids(tokenizer.stop_ids)
        generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else stops[0], "pad_token_id": tokenizer.pad_id}
        tensorfiles.write_json(temporary / "generation_config.json", generation)
        tokenizer.save(temporary)
        replace_folder(temporary, folder)
    else:
        for _ in tensors:                       # gathering each is a collective
            pass
    distributed.barrier()
