"""The tensors of a model folder on disk: one model.safetensors, or shards with an index.

Headers are read first, then the tensors one by one, so memory does not grow with the files. Nothing here
knows an architecture. No pickle is read, and no file outside the folder is opened, except in the hub's cache.
"""

import json
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .files import depth, own_file, read_json, write_json

# by their names in safetensors
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MOST_LEVELS = 40                    # nested objects in a config.json
SHARD_BYTES = 5_000_000_000         # the largest file, as on the hub


# ---- reading -----------------------------------------------------------------------------------------------

def read_config(folder):
    """The config.json of a model folder, as a dict that is not checked further."""
    path = own_file(folder, "config.json")
    if not path:
        raise ValueError(f"{folder}: not a model folder (no config.json); give a folder that a stage wrote "
                         "or that was downloaded whole")
    config = read_json(path)
    inside = Path(folder) / "model"
    if not config.keys() & {"model_type", "architectures"} and (inside / "config.json").is_file():
        raise ValueError(f"{folder} is the folder of a run; give its model, {inside}")
    if depth(config) > MOST_LEVELS:
        raise ValueError(f"{path}: more than {MOST_LEVELS} levels of nested objects; this is not a model's "
                         "configuration; download the model again")
    return config


def read_header(folder):
    """{tensor name: (file, safetensors dtype, shape)} of a model folder; no weights are read.

    ValueError if a file is missing, damaged or outside the folder, or if index and shards disagree.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    sharded = own_file(folder, index.name) is not None
    if (own_file(folder, single.name) is not None) == sharded:
        found = f"both {single.name} and" if sharded else f"no {single.name} or"
        raise ValueError(f"{folder}: {found} {index.name}; exactly one of them must exist (only safetensors "
                         "are read, never pickles such as pytorch_model.bin)")
    weight_map = read_json(index).get("weight_map") if sharded else {}
    if not (isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())):
        raise ValueError(f"{index}: no weight_map of tensor names and file names in it; download the model "
                         "again")
    names = sorted(set(weight_map.values())) if sharded else [single.name]
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file in its own folder; do "
                             "not use this model")
        own_file(folder, name)
    header, found = {}, set()
    for file in [folder / name for name in names]:
        try:
            with safe_open(file, "pt") as tensors:
                parts = {name: tensors.get_slice(name) for name in tensors.keys()}
                header |= {name: (file, part.get_dtype(), tuple(part.get_shape()))
                           for name, part in parts.items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}); copy or download it "
                             "again") from None
        found |= {(name, file.name) for name in parts}
    if sharded and (wrong := weight_map.items() ^ found):
        names = first_of(sorted({name for name, _ in wrong}), " ")
        raise ValueError(f"{index}: it and the shards disagree on {names}; download the model again")
    return header


def read(header, name, rows=None, stored=None):
    """A tensor of a header, or a slice of its rows (of distributed.own_rows), mapped from the file and read
    when it is used. stored: its name in the file, if that is another.

    The file is opened anew each time, so that the mapped pages are freed with the tensor.
    """
    with safe_open(header[name][0], "pt") as tensors:
        stored = stored or name
        return tensors.get_tensor(stored) if rows is None else tensors.get_slice(stored)[rows]


def places(header):
    """{tensor name: its place: (file, safetensors dtype, offset in bytes, number of elements)}."""
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
    """Elements start to start + count of a tensor, flat: (count,).

    They are copied, because mapped pages count as memory of the process until they are unmapped.
    """
    path, code, offset, _ = place
    piece = torch.empty(count, dtype=DTYPES[code])      # (count,)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset + start * piece.itemsize)
        if file.readinto(piece.view(torch.uint8).numpy()) != piece.nbytes:
            raise ValueError(f"{path}: ends early; it changed while it was read")
    return piece


def equal(header, name, other, other_name, piece=1 << 20):
    """Whether tensor `name` of one header equals `other_name` of another; both have one shape and dtype."""
    one = places({name: header[name]})[name]
    two = places({other_name: other[other_name]})[other_name]
    return all(torch.equal(read_piece(one, start, count), read_piece(two, start, count))
               for start in range(0, one[3], piece) for count in [min(piece, one[3] - start)])


def drop_tied_head(header):
    """Remove lm_head.weight, which some programs write all the same, from the header of a tied model.

    Returns False if its numbers were not those of the embedding.
    """
    embedding = header.get("model.embed_tokens.weight")
    head = header.get("lm_head.weight")
    if not (embedding and head):
        return True
    same = same_as(header, "lm_head.weight", "model.embed_tokens.weight")
    del header["lm_head.weight"]
    return same


def same_as(header, name, other):
    """Whether two tensors of a header are the same numbers, in files of the same dtype."""
    if other not in header or header[name][1:] != header[other][1:] or header[name][1] not in DTYPES:
        return False
    return equal(header, name, header, other)


def first_of(words, between, most=20):
    """The first words and the number of those left out, for one line on standard error."""
    more = f"{between}and {len(words) - most} more" if len(words) > most else ""
    return between.join(words[:most]) + more


# ---- writing -----------------------------------------------------------------------------------------------

def num_bytes(code, shape):
    """The size of a tensor in bytes."""
    return prod(shape) * DTYPES[code].itemsize


def assign_files(specs, shard_bytes=SHARD_BYTES):
    """{file name: {tensor name: (safetensors dtype, shape)}} for specs = {tensor name: (dtype, shape)}.

    Tensors are assigned in the order of their names; a new file begins where one would exceed shard_bytes.
    """
    shards, size = [{}], 0
    for name, spec in sorted(specs.items()):
        if shards[-1] and size + num_bytes(*spec) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += num_bytes(*spec)
    # With the widest dtypes first every tensor is aligned.
    shards = [dict(sorted(part.items(), key=lambda item: -DTYPES[item[1][0]].itemsize)) for part in shards]
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": part for i, part in enumerate(shards, 1)}


def write(folder, files, tensors):
    """Write the files of `assign_files`, tensor by tensor, and the index of several.

    tensors: an iterable in the order of `files`.
    """
    for place, tensor in zip(create(folder, files).values(), tensors, strict=True):
        write_piece(place, 0, tensor.contiguous().flatten())
    seal(folder, files)


def create(folder, files):
    """Create the files of `assign_files`, empty, at their full size. Returns {tensor name: its place}.

    The tensors may be written in any order; no reader accepts the files before `seal`.
    """
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
    """Write elements start to start + len(piece) of a tensor. piece: flat, (n,), on the CPU."""
    path, _, offset, _ = place
    with open(path, "r+b") as file:
        file.seek(offset + start * piece.itemsize)
        file.write(piece.view(torch.uint8).numpy())


def seal(folder, files):
    """Write the headers, without which no reader accepts the files, and the index of several files."""
    for name, specs in files.items():
        with open(folder / name, "r+b") as file:
            file.write(file_header(specs))
    if len(files) > 1:
        size = sum(num_bytes(*spec) for specs in files.values() for spec in specs.values())
        weight_map = {name: file for file, specs in files.items() for name in specs}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def file_header(specs):
    """The first bytes of a safetensors file: the length of its JSON (u64, little-endian), then the JSON,
    padded with spaces to 8 bytes. The tensors follow without gaps.

    It is written here because safetensors.torch.save_file takes all tensors of a file at once, in memory.
    """
    header = {"__metadata__": {"format": "pt"}}         # transformers refuses a file without the format
    end = 0
    for name, (code, shape) in specs.items():
        begin, end = end, end + num_bytes(code, shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
