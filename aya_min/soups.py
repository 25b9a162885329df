"""Model folders in, one merged model folder out: tensor by tensor, driven by the tensor names that the files hold.

Nothing here knows an architecture: reward models, tied heads or models of other families merge as well. Whatever differs between the
inputs (names, shapes, tokenizer, vocabulary) is refused before any work. The output is written beside its place and renamed, so an
interrupted merge leaves nothing that looks whole. The methods are in merging.py.

Integer and boolean tensors, which have no average, must be equal in all inputs. Memory: one tensor of each model, widened to fp32 by
all methods but linear (working inside large tensors by pieces is left to the issue on merging).
"""

import hashlib
import math
import os
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from . import __version__, merging, tensorfiles
from .tensorfiles import DTYPES, first_of, read, read_config, read_header, write_json

METHODS = {    # method: the settings it takes and their defaults, from the papers (DARE has none: ours); weights None: 1 each
    "linear": {"weights": None},
    "slerp": {"t": 0.5},
    "task-arithmetic": {"base": None, "weights": None, "lam": 1.0},
    "ties": {"base": None, "weights": None, "density": 0.2, "lam": 1.0},
    "dare-linear": {"base": None, "weights": None, "density": 0.5, "lam": 1.0, "seed": 0},
    "dare-ties": {"base": None, "weights": None, "density": 0.5, "lam": 1.0, "seed": 0},
}
OUTPUT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
COPIED = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]


def merge_folders(folders, out, method, *, weights=None, base=None, density=None, lam=1.0, t=0.5, seed=0, dtype=None,
                  shard_bytes=tensorfiles.SHARD_BYTES):
    """Merge model folders into the new folder `out`; returns its Path.

    method, and which of the settings it looks at: METHODS. density None: the method's default.
    dtype: one of OUTPUT_DTYPES; None keeps that of each tensor of the first folder, whatever the others have.
    """
    folders, out = [Path(folder) for folder in folders], Path(out)
    given = {"weights": weights, "base": base, "density": density, "lam": lam, "t": t, "seed": seed}
    settings = check_settings(method, given, len(folders), dtype)
    inputs = folders + [Path(base)] if "base" in settings else folders
    if out.resolve() in [folder.resolve() for folder in inputs]:
        raise ValueError(f"{out} is one of the models to merge; give another folder as the output")
    if os.path.lexists(out):
        raise ValueError(f"{out} exists already; remove it or give another folder as the output")
    configs, headers = [read_config(folder) for folder in inputs], [read_header(folder) for folder in inputs]
    refuse_differences(inputs, configs, headers)
    specs = {name: (OUTPUT_DTYPES[dtype] if dtype and is_float(code) else code, shape) for name, (_, code, shape) in headers[0].items()}
    files, size = tensorfiles.plan(specs, shard_bytes), sum(tensorfiles.num_bytes(*spec) for spec in specs.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    if size > shutil.disk_usage(out.parent).free:
        raise ValueError(f"{out} needs {size / 1e9:.1f} GB, more than its disk has free; make room or give another folder as the output")

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)                                       # left by a merge that was killed
    try:
        partial.mkdir()
        with tqdm(total=size, desc="merge", unit="B", unit_scale=True, disable=os.environ.get("RANK", "0") != "0") as bar:
            tensorfiles.write(partial, files, merged_tensors(files, headers, method, settings, bar))
        write_the_rest(folders[0], partial, configs[0], dtype)
        write_record(partial, inputs, headers, method, settings, dtype)
        partial.rename(out)
    except BaseException:                                                            # Ctrl-C and a full disk too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def check_settings(method, given, num_models, dtype):
    """{setting: value} of those that the method takes; ValueError for a value with which it has no meaning."""
    if method not in METHODS:
        raise ValueError(f"unknown merge method {method!r}; choose one of {', '.join(METHODS)}")
    if dtype not in [None, *OUTPUT_DTYPES]:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(OUTPUT_DTYPES)}")
    if num_models < 1 or (method == "slerp" and num_models != 2):
        raise ValueError(f"{method} merges {'exactly two models' if method == 'slerp' else 'one model or more'}, not {num_models}")
    settings = {name: default if given[name] is None else given[name] for name, default in METHODS[method].items()}
    if "base" in settings:
        if settings["base"] is None:
            raise ValueError(f"{method} needs the model that the others were trained from; give it with --base DIR")
        settings["base"] = str(settings["base"])
    if not 0 <= settings.get("t", 0) <= 1:
        raise ValueError(f"t is {settings['t']}; give a number from 0 (the first model) to 1 (the second)")
    if not 0 < settings.get("density", 1) <= 1:
        raise ValueError(f"density is {settings['density']}; give the share of each task vector to keep, above 0 and at most 1")
    if not math.isfinite(settings.get("lam", 1)):
        raise ValueError(f"lambda is {settings['lam']}; give a finite number")
    if "weights" in settings:
        settings["weights"] = [1.0] * num_models if settings["weights"] is None else [float(weight) for weight in settings["weights"]]
        refuse_weights(method, settings["weights"], num_models)
    return settings


def refuse_weights(method, weights, num_models):
    if len(weights) != num_models:
        raise ValueError(f"{len(weights)} weights for {num_models} models; give one weight for each model, in the same order")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights {weights} are not all finite numbers")
    if method == "linear" and abs(sum(weights)) < 1e-6:
        raise ValueError(f"weights {weights} sum to 0, so they cannot be normalised; for differences of models use task-arithmetic")
    if method in ("ties", "dare-ties") and (min(weights) < 0 or max(weights) == 0):
        raise ValueError(f"weights {weights} of {method} must not be negative nor all 0; for negation use task-arithmetic or dare-linear")


def refuse_differences(inputs, configs, headers):
    """One ValueError that names (up to 20 of) all differences which make a merge of these folders meaningless."""
    problems, first, header = [], inputs[0], headers[0]
    for folder, config, other in zip(inputs, configs, headers):
        problems += [f"{folder}: {name} is {code}, which cannot be merged" for name, (_, code, _) in other.items() if code not in DTYPES]
        problems += [f"{folder} lacks {name}" for name in sorted(header.keys() - other.keys())]
        problems += [f"{folder} has {name}, which {first} lacks" for name in sorted(other.keys() - header.keys())]
        for name in sorted(header.keys() & other.keys()):
            (_, code, shape), (_, other_code, other_shape) = header[name], other[name]
            if shape != other_shape:
                problems.append(f"{folder}: {name} is {list(other_shape)}, in {first} {list(shape)}")
            elif code in DTYPES and other_code in DTYPES and not (is_float(code) and is_float(other_code)):
                if code != other_code or not torch.equal(read(header, name), read(other, name)):
                    problems.append(f"{folder}: {name} is {other_code}, has no average, and differs from that of {first}")
        if sha256(folder / "tokenizer.json") != sha256(first / "tokenizer.json"):
            problems.append(f"{folder}: tokenizer.json is not that of {first}")
        if config.get("vocab_size") != configs[0].get("vocab_size"):
            problems.append(f"{folder}: vocab_size is {config.get('vocab_size')}, in {first} {configs[0].get('vocab_size')}")
    if problems:
        raise ValueError(f"these models cannot be merged: {first_of(problems, '; ')}")


def is_float(code):
    return DTYPES[code].is_floating_point


def sha256(path):
    """Hex digest of a file, None if there is none."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def merged_tensors(files, headers, method, settings, bar):
    """The tensors of a plan in its order, each merged when it is its turn."""
    for specs in files.values():
        for name, (code, _) in specs.items():
            tensor = merge_one(name, headers, method, settings, DTYPES[code])
            bar.update(tensor.nbytes)
            yield tensor


def merge_one(name, headers, method, settings, dtype):
    """The merged tensor of one name, in the output dtype. The base, where there is one, is the last of the headers."""
    tensors = [read(header, name) for header in headers]
    if not dtype.is_floating_point:
        return tensors[0]                                                            # refuse_differences found them equal
    for tensor, header in zip(tensors, headers):
        refuse_infinite(tensor, f"{name} in {header[name][0]}")
    merged = combine(name, tensors, method, settings).to(dtype)
    refuse_infinite(merged, f"{name}, merged, as {dtype}")
    return merged


def combine(name, tensors, method, settings):
    if method == "linear":
        return merging.linear(tensors, settings["weights"])
    if method == "slerp":
        return merging.slerp(*tensors, settings["t"])
    *tensors, base = tensors
    weights, lam = settings["weights"], settings["lam"]
    if method == "task-arithmetic":
        return merging.task_arithmetic(tensors, base, weights, lam)
    if method == "ties":
        return merging.ties(tensors, base, weights, settings["density"], lam)
    dare = {"dare-linear": merging.dare_linear, "dare-ties": merging.dare_ties}[method]
    return dare(tensors, base, weights, settings["density"], lam, settings["seed"], name)


def refuse_infinite(tensor, what):
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():   # TIES would turn a NaN into the base's value
        raise ValueError(f"{what} holds NaN or infinite values; mend that model, or choose a wider --dtype")


def write_the_rest(first, out, config, dtype):
    """Everything of the model folder but the weights, from the first model; config.json says the dtype that is on disk."""
    for name in COPIED:
        if (first / name).exists():
            shutil.copyfile(first / name, out / name)
    if dtype:
        config = config | {key: dtype for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}}
    write_json(out / "config.json", config)


def write_record(out, inputs, headers, method, settings, dtype):
    """merge.json: where this model came from. The base, where there is one, is the last of the inputs."""
    digests = [{file.name: sha256(file) for file in sorted({file for file, _, _ in header.values()})} for header in headers]
    write_json(out / "merge.json", {
        "method": method, "settings": settings, "dtype": dtype or "as the first input",
        "inputs": [{"folder": str(folder), "sha256": digest} for folder, digest in zip(inputs, digests)],
        "versions": {"aya_min": __version__, "torch": torch.__version__}})
