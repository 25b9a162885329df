"""What I publish: a model folder as transformers and vLLM read it. config.json, generation_config.json,
tokenizer.json, tokenizer_config.json and model.safetensors (or shards with model.safetensors.index.json). No
pickle; nothing outside the folder is opened. A source folder's other files that are not weights go along.

A folder is written under a temporary name and renamed, so one that exists is whole. Parameter names need no
map.

transformers has no class for a reward model of this family, so config.json names one of ours. What it loads
is the language model within, AutoModelForCausalLM.from_pretrained(FOLDER); the two heads are tensors of the
same files:

    score = h_end @ score.weight[0] + score_logps.weight[0] @ (mean, min of the answer's log-probs)

where h_end is the last hidden state (after the norm) of the last token (tests/test_transformers.py does
this).
"""

import re
from pathlib import Path

import torch

from . import distributed, tensorfiles
from .alike import files_along
from .checkpoint import others_in, replace_folder
from .config import ModelConfig, stop_ids
from .files import new_folder, own_file, read_bytes, read_json
from .model import CohereForCausalLM, RewardModel, initial_value
from .tokenizer import FILES, load_tokenizer

ARCHITECTURES = {"CohereForCausalLM": CohereForCausalLM, "Cohere2ForCausalLM": CohereForCausalLM,
                 "CohereRewardModel": RewardModel, "Cohere2RewardModel": RewardModel,
                 "CohereForSequenceClassification": RewardModel,
                 "Cohere2ForSequenceClassification": RewardModel}
USUAL_HEAD_LACKS = "score_logps.weight"         # a head that reads the last token only: as if this were 0
LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")

# What `save` writes anew.
WRITTEN = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", *FILES}


def read_config(folder):
    """(ModelConfig, class of the model) of a model folder."""
    raw, path = tensorfiles.read_config(folder), Path(folder) / "config.json"
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ValueError(f"{path}: architectures {named!r:.80} is not a list of names; download the model "
                         "again")
    plain = str(raw.get("model_type")).capitalize() + "ForCausalLM"         # what transformers takes it for
    architecture = (named or [plain])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r:.80} is not supported; supported: "
                         f"{' '.join(ARCHITECTURES)}")
    config = ModelConfig.from_published(raw, where=str(path))
    if not re.fullmatch(f"{config.model_type}(For.*|RewardModel)", architecture, re.IGNORECASE):
        raise ValueError(f"{path}: architecture {architecture} does not go with model_type "
                         f"{config.model_type}; download the model again")
    return config, ARCHITECTURES[architecture]


def read_generation(folder):
    """The generation_config.json of a model folder, its ids checked; {} if there is none."""
    path = own_file(folder, "generation_config.json")
    found = read_json(path) if path else {}
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        try:
            if found.get(name) is not None:
                stop_ids(found[name], name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return found


def read_stop_ids(folder):
    """The ids that end an answer by generation_config.json and by config.json: those of both, sorted."""
    named = read_generation(folder), tensorfiles.read_config(folder)
    config, _ = read_config(folder)                 # checks what config.json says
    found = [stop_ids(each["eos_token_id"]) for each in named if each.get("eos_token_id") is not None]
    return sorted({i for ids in found for i in ids if i < config.vocab_size})


def read_others(folder):
    """{path within: bytes} of the files of a model folder that go along with its weights."""
    return {path: read_bytes(Path(folder) / path) for path in files_along(folder) if str(path) not in WRITTEN}


def look_into(folder, trunk=False):
    """(model without weights, tokenizer, header) of a model folder whose files fit together, see
    tensorfiles.read_header; no weights are read (but of a head that a tied model repeats).

    trunk: a reward model whatever the folder holds; if it is a language model, the decoder is there and the
    head is missing.
    """
    config, model_class = read_config(folder)
    header = tensorfiles.read_header(folder)
    num_layers = 1 + max((int(match[1]) for match in map(LAYER.match, header) if match), default=-1)
    if config.num_hidden_layers > max(num_layers, 1):       # before a model of that many is built
        raise ValueError(f"{folder}: the tensors do not fit config.json: they are of {num_layers} layers, "
                         f"num_hidden_layers is {config.num_hidden_layers}")
    tokenizer = load_tokenizer(folder)
    if max(tokenizer.vocab_size - 1, tokenizer.largest_id) >= config.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the largest id "
                         f"{tokenizer.largest_id}, config.json a vocabulary of {config.vocab_size}; they are "
                         "of different models")
    tokenizer.stop_ids = sorted({*tokenizer.stop_ids, *read_stop_ids(folder)})
    with torch.device("meta"):
        found, model = model_class(config), (RewardModel if trunk else model_class)(config)
    own = found.state_dict()
    alike = not config.tie_word_embeddings or tensorfiles.drop_tied_head(header)
    problems = [] if alike else [
        "lm_head.weight is not model.embed_tokens.weight, to which config.json ties it"]
    problems += [f"{name} is missing" for name in sorted(own.keys() - header.keys() - {USUAL_HEAD_LACKS})]
    problems += [f"{name} is extra" for name in sorted(header.keys() - own.keys())]
    for name in sorted(header.keys() & own.keys()):
        _, code, shape = header[name]
        if shape != tuple(own[name].shape):
            problems.append(f"{name} has shape {shape}, config.json wants {tuple(own[name].shape)}")
        elif code not in ("F32", "BF16", "F16", "F64"):
            problems.append(f"{name} is {code}, quantized weights are not read")
    if problems:
        listed = tensorfiles.first_of(problems, "; ")
        raise ValueError(f"{folder}: the tensors do not fit config.json: {listed}")
    return model, tokenizer, header


@torch.no_grad()
def load(folder, device="cpu", dtype=torch.float32, sharded=False, compute_dtype=torch.float32, trunk=False,
         replicate=1, cpu_offload=False):
    """(model, tokenizer) of a model folder, read tensor by tensor into the module that its config.json names.

    Its generation_config.json and its other files ride on the model, for `save`. sharded:
    distributed.shard(model, compute_dtype, replicate, cpu_offload) before anything is read: each rank reads
    and holds its rows only. trunk: a reward model on the folder's decoder; its head is drawn anew (seed 0) if
    the folder has none.
    """
    model, tokenizer, header = look_into(folder, trunk)
    model = model.to(dtype)
    model.came_with = read_generation(folder), read_others(folder)
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
    """Publish a plain or sharded model, tensor by tensor, with what came with it and its tokenizer.

    A collective: every rank calls it, rank 0 writes. An older folder of that name is replaced.
    """
    state = model.state_dict()
    specs = {name: (tensorfiles.CODES[dtype], tuple(tensor.shape)) for name, tensor in state.items()}
    files = tensorfiles.plan(specs, shard_bytes)
    tensors = (distributed.full(state[name]).to("cpu", dtype) for specs in files.values() for name in specs)
    if distributed.is_main():
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, replace_folder) as made:
            tensorfiles.write(made, files, tensors)
            write_descriptions(made, model, tokenizer, dtype)
    else:
        for _ in tensors:                       # gathering each is a collective
            pass
    distributed.barrier()


def check_place(folder, model, tokenizer):
    """Refuse, before any work, a place where `save` will not put the model: one with other files."""
    specs = {name: ("F32", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    names = {*tensorfiles.plan(specs), "model.safetensors.index.json", "config.json", *WRITTEN,
             *map(str, getattr(model, "came_with", ({}, {}))[1])}
    if others := others_in(Path(folder), names):
        raise ValueError(f"{others[0]} is in the way of the model that is published at the end; move it "
                         "elsewhere")


def write_descriptions(folder, model, tokenizer, dtype):
    """All of a model folder but the weights: what describes the model, its tokenizer, and what came along."""
    config = model.config.published(model.task, str(dtype).removeprefix("torch."))
    if isinstance(model, RewardModel):
        config["tie_word_embeddings"] = True        # its log-probs are those of the embeddings
    generation, others = getattr(model, "came_with", ({}, {}))
    eos = generation.get("eos_token_id")
    stops = stop_ids([*tokenizer.stop_ids, *(stop_ids(eos) if eos is not None else [])])
    generation = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id, **generation,
                  "eos_token_id": stops if len(stops) > 1 else stops[0]}
    tensorfiles.write_json(folder / "config.json", config)
    tensorfiles.write_json(folder / "generation_config.json", generation)
    for path, data in others.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    tokenizer.save(folder)
