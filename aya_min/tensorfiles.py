"""The tensors of a model folder on disk: one model.safetensors, or shards with an index. Headers are read first, tensors one by one.

Nothing here knows an architecture. No pickle is read, no file outside the folder is opened (the hub's cache apart), and memory does not grow with the files.
"""

import json
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .files import depth, own_file, read_json, write_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}    # safetensors' names
CODES = {dtype: code for code, dtype in DTYPES.items()}
MOST_LEVELS = 40            # of a config.json
SHARD_BYTES = 5_000_000_000                                                          # the largest file, as on the hub


# ---- in ----------------------------------------------------------------------------------------------------------------------------

def read_config(folder):
    """The config.json of a model folder, as it is."""
    path = own_file(folder, "config.json")
    if not path:
        raise ValueError(f"{folder}: not a model folder (no config.json); give a folder that a stage wrote "
                         "or that was downloaded whole")
    config = read_json(path)
    if depth(config) > MOST_LEVELS:
        raise ValueError(f"{path}: objects within objects, more than {MOST_LEVELS} levels; this is no "
                         f"model's configuration")
    return config


def read_header(folder):
    """{tensor name: (file, safetensors dtype, shape)} of a model folder; no weights are read."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    sharded = own_file(folder, index.name) is not None
    if (own_file(folder, single.name) is not None) == sharded:
        raise ValueError(f"{folder}: {'both' if sharded else 'no'} model.safetensors {'and' if sharded else 'or'} {index.name}; there must be one of "
                         "them (only safetensors are read, never pickles such as pytorch_model.bin)")
    weight_map = read_json(index).get("weight_map") if sharded else {}
    if not (isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())):
        raise ValueError(f"{index}: no weight_map of tensor names and file names in it; download the model again")
    names = sorted(set(weight_map.values())) if sharded else [single.name]
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file in its own folder; do "
                             f"not use this model")
        own_file(folder, name)
    header, found = {}, set()
    for file in [folder / name for name in names]:
        try:
            with safe_open(file, "pt") as tensors:
                parts = {name: tensors.get_slice(name) for name in tensors.keys()}
                header |= {name: (file, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from None
        found |= {(name, file.name) for name in parts}
    if sharded and (wrong := weight_map.items() ^ found):
        raise ValueError(f"{index}: it and the shards disagree on {first_of(sorted({name for name, _ in wrong}), ' ')}; download the model again")
    return header


def read(header, name, rows=None):
    """A tensor, or those of its rows. It is mapped from the file and read when it is used; opened anew each time, so that its pages go with it."""
    with safe_open(header[name][0], "pt") as tensors:
        return tensors.get_tensor(name) if rows is None else tensors.get_slice(name)[rows]


def places(header):
    """{tensor name: (file, safetensors dtype, offset of its first byte, number of elements)}, for read_piece."""
    found, parts = {}, {}
    for name, (path, code, shape) in header.items():
        if path not in parts:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                parts[path] = 8 + length, json.loads(file.read(length))
        begin, entries = parts[path]
        found[name] = path, code, begin + entries[name]["data_offsets"][0], prod(shape)
    return found


def read_piece(place, start, count):
    """Elements start to start + count of a tensor, flat. They are copied: mapped pages would count as memory of the process until they are unmapped."""
    path, code, offset, _ = place
    piece = torch.empty(count, dtype=DTYPES[code])                                   # (count,)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset + start * piece.itemsize)
        if file.readinto(piece.view(torch.uint8).numpy()) != piece.nbytes:
            raise ValueError(f"{path}: ends early; it changed while it was read")
    return piece


def equal(header, name, other, other_name, piece=1 << 20):
    """Whether two tensors of one shape and dtype hold the same numbers."""
    one, two = (places({key: part[key]})[key] for part, key in ((header, name), (other, other_name)))
    return all(torch.equal(read_piece(one, start, count), read_piece(two, start, count))
               for start in range(0, one[3], piece) for count in [min(piece, one[3] - start)])


def drop_tied_head(header):
    """Take lm_head.weight, which some write all the same, out of the header of a tied model. Whether it was the embedding, if both are there."""
    embedding, head = header.get("model.embed_tokens.weight"), header.get("lm_head.weight")
    if not (embedding and head):
        return True
    alike = head[1:] == embedding[1:] and head[1] in DTYPES and equal(header, "lm_head.weight", header, "model.embed_tokens.weight")
    del header["lm_head.weight"]
    return alike


def first_of(words, between, most=20):
    """The first twenty, and how many more there are, for one line on standard error."""
    return between.join(words[:most]) + (f"{between}and {len(words) - most} more" if len(words) > most else "")


# ---- out ---------------------------------------------------------------------------------------------------------------------------

def num_bytes(code, shape):
    return prod(shape) * DTYPES[code].itemsize


def plan(specs, shard_bytes=SHARD_BYTES):
    """{tensor name: (safetensors dtype, shape)} -> {file name: those in it}: names in order, a new file when the next one would make it too large."""
    shards, size = [{}], 0
    for name, spec in sorted(specs.items()):
        if shards[-1] and size + num_bytes(*spec) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += num_bytes(*spec)
    shards = [dict(sorted(part.items(), key=lambda item: -DTYPES[item[1][0]].itemsize)) for part in shards]     # wide first: all aligned
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": part for i, part in enumerate(shards, 1)}


def write(folder, files, tensors):
    """Write the files of a plan, tensor by tensor, and their index if there are several. tensors: an iterable in the plan's order."""
    for place, tensor in zip(create(folder, files).values(), tensors, strict=True):
        write_piece(place, 0, tensor.contiguous().flatten())
    seal(folder, files)


def create(folder, files):
    """The files of a plan, empty, at their full size -> the places of their tensors, which may be written in any order. Not readable before `seal`."""
    found = {}
    for name, specs in files.items():
        text, end = file_header(specs), 0
        for tensor, (code, shape) in specs.items():
            found[tensor] = folder / name, code, len(text) + end, prod(shape)
            end += num_bytes(code, shape)
        with open(folder / name, "wb") as file:
            file.truncate(len(text) + end)
    return found


def write_piece(place, start, piece):
    """Elements start to start + len(piece) of a tensor, flat."""
    path, _, offset, _ = place
    with open(path, "r+b") as file:
        file.seek(offset + start * piece.itemsize)
        file.write(piece.view(torch.uint8).numpy())


def seal(folder, files):
    """Write the headers, without which no reader takes a file, and the index of a plan whose tensors are all written."""
    for name, specs in files.items():
        with open(folder / name, "r+b") as file:
            file.write(file_header(specs))
    if len(files) > 1:
        size = sum(num_bytes(*spec) for specs in files.values() for spec in specs.values())
        weight_map = {name: file for file, specs in files.items() for name in specs}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def file_header(specs):
    """The first bytes of a safetensors file: their length (u64, little-endian) and JSON padded with spaces to 8 bytes; the tensors follow without gaps."""
    header, end = {"__metadata__": {"format": "pt"}}, 0                              # transformers refuses a file without the format
    for name, (code, shape) in specs.items():
        begin, end = end, end + num_bytes(code, shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
