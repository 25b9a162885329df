"""Model folders in, one merged model folder out, or a table of how far two are apart: piece by piece, driven by the tensor names in the files.

Nothing here knows an architecture: reward models, tied heads or models of other families merge as well. Whatever differs between the
inputs (names, shapes, tokenizer, vocabulary) is refused before any work. The output is written beside its place and renamed, so an
interrupted merge leaves nothing that looks whole. The methods are in merging.py.

Memory does not grow with the models: each core has one piece of each model, read, merged and written by one thread. Integer and boolean
tensors, which have no average, must be equal in all inputs; so must a tied head and its embedding, and the head is not written.
"""

import fcntl
import hashlib
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from . import __version__, merging, tensorfiles
from .tensorfiles import DTYPES, first_of, num_bytes, places, read_config, read_header, read_piece, write_json

METHODS = {    # method: the settings it takes and their defaults, from the papers (DARE has none: ours); weights None: 1 each
    "linear": {"weights": None, "normalize": True},
    "slerp": {"t": 0.5, "convention": "paper"},
    "task-arithmetic": {"base": None, "weights": None, "lam": 1.0, "normalize": False},
    "model-stock": {"base": None, "convention": "paper"},
    "ties": {"base": None, "weights": None, "density": 0.2, "lam": 1.0, "normalize": True, "convention": "paper"},
    "dare-linear": {"base": None, "weights": None, "density": 0.5, "lam": 1.0, "normalize": False, "seed": 0, "convention": "paper"},
    "dare-ties": {"base": None, "weights": None, "density": 0.5, "lam": 1.0, "normalize": True, "seed": 0, "convention": "paper"},
}
OUTPUT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
COPIED = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
SAME = ["model_type", "vocab_size", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings"]     # shapes do not show all of these
PIECE = 1 << 18             # elements; DARE's masks depend on it


def merge_folders(folders, out, method, *, dtype=None, device="cpu", shard_bytes=tensorfiles.SHARD_BYTES, **settings):
    """Merge model folders into the new folder `out`; returns its Path.

    settings: METHODS. weights (one for each model), density (one for all, or one for each) and t may each be a number, a gradient such as
    [0, 0.5, 1] over the layers, or [{"filter": "self_attn", "value": ...}, ..., {"value": ...}], the first whose filter is in the tensor's name.
    dtype: one of OUTPUT_DTYPES; None keeps that of each tensor of the first folder, whatever the others have.
    """
    folders, out = [Path(folder) for folder in folders], Path(out)
    settings = check_settings(method, settings, len(folders), dtype)
    inputs = folders + [Path(settings["base"])] if "base" in settings else folders
    if out.resolve() in [folder.resolve() for folder in inputs]:
        raise ValueError(f"{out} is one of the models to merge; give another folder as the output")
    if os.path.lexists(out):
        raise ValueError(f"{out} exists already; remove it or give another folder as the output")
    configs, headers = look_into(inputs)
    last_layer = max(1, *(layer_of(name) or 0 for name in headers[0]))
    values = {name: settings_of(name, (layer_of(name) or 0) / last_layer, method, settings) for name in float_names(headers[0])}
    specs = {name: (OUTPUT_DTYPES[dtype] if dtype and is_float(code) else code, shape) for name, (_, code, shape) in headers[0].items()}
    files, size = tensorfiles.plan(specs, shard_bytes), sum(num_bytes(*spec) for spec in specs.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(out.parent).free):
        raise ValueError(f"{out} needs {size / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; make room or give another folder as the output")

    with partial_folder(out) as partial, ThreadPoolExecutor(1) as hasher:
        try:
            digests = {file: hasher.submit(sha256, file) for header in headers for file, _, _ in header.values()}
            merge_files(partial, files, headers, method, settings, values, device)
            write_the_rest(folders[0], partial, configs[0], dtype)
            write_json(partial / "merge.json", {
                "config": to_config(folders, method, settings, dtype),
                "inputs": [{"folder": str(folder), "sha256": {file.name: digests[file].result() for file in sorted({file for file, _, _ in header.values()})}}
                           for folder, header in zip(inputs, headers)],       # the base, where there is one, is the last
                "versions": {"aya_min": __version__, "torch": torch.__version__}})
        finally:
            hasher.shutdown(cancel_futures=True)
    return out


@contextmanager
def partial_folder(out):
    """A folder beside `out` that becomes it at the end, or goes away; one left by a merge that was killed is emptied."""
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)                                             # the system frees it when the process ends, however it does
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{partial}: another merge is writing to it; wait for it or give another folder as the output") from None
        try:
            for file in partial.iterdir():
                file.unlink()
            yield partial
            partial.rename(out)
        except BaseException:                                                        # Ctrl-C and a full disk too
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


# ---- settings ----------------------------------------------------------------------------------------------------------------------

def check_settings(method, given, num_models, dtype):
    """{setting: value} of all that the method takes, weights and density as a list of one for each model; ValueError for what has no meaning."""
    if method not in METHODS:
        raise ValueError(f"unknown merge method {method!r}; choose one of {', '.join(METHODS)}")
    if unknown := given.keys() - METHODS[method].keys():
        raise ValueError(f"{method} takes no {', '.join(sorted(unknown))}; it takes {', '.join(METHODS[method])}")
    if dtype not in [None, *OUTPUT_DTYPES]:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(OUTPUT_DTYPES)}")
    if num_models < 1 or (method == "slerp" and num_models != 2):
        raise ValueError(f"{method} merges {'exactly two models' if method == 'slerp' else 'one model or more'}, not {num_models}")
    settings = {name: default if given.get(name) is None else given[name] for name, default in METHODS[method].items()}
    if "base" in settings and settings["base"] is None:
        raise ValueError(f"{method} needs the model that the others were trained from; give it with --base DIR")
    if settings.get("convention", "paper") not in ("paper", "mergekit"):
        raise ValueError(f"unknown convention {settings['convention']!r}; choose paper or mergekit")
    if not math.isfinite(settings.get("lam", 1)):
        raise ValueError(f"lambda is {settings['lam']}; give a finite number")
    if "weights" in settings:
        settings["weights"] = list(settings["weights"] or [1.0] * num_models)
    if "density" in settings:
        density = settings["density"] if isinstance(settings["density"], (list, tuple)) else [settings["density"]]
        settings["density"] = list(density) * (num_models if len(density) == 1 else 1)
    for name in settings.keys() & {"weights", "density"}:
        if len(settings[name]) != num_models:
            raise ValueError(f"{len(settings[name])} {name} for {num_models} models; give one for each model, in the same order")
    return settings


def settings_of(name, depth, method, settings):
    """The settings of one tensor, as merging.py takes them: numbers in the place of gradients and filters."""
    values = {key: value for key, value in settings.items() if key != "base"}
    values |= {key: [number_at(value, name, depth) for value in values[key]] for key in values.keys() & {"weights", "density"}}
    values |= {key: number_at(values[key], name, depth) for key in values.keys() & {"t"}}
    where = f" (at {name})"
    if not 0 <= values.get("t", 0) <= 1:
        raise ValueError(f"t is {values['t']}; give a number from 0 (the first model) to 1 (the second)" + where)
    for density in values.get("density", []):
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}; give the share of each task vector to keep, above 0 and at most 1" + where)
    weights = values.get("weights", [1.0])
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights {weights} are not all finite numbers" + where)
    if method in ("ties", "dare-ties") and (min(weights) < 0 or max(weights) == 0):
        raise ValueError(f"weights {weights} of {method} must not be negative nor all 0; for negation use task-arithmetic or dare-linear" + where)
    if values.get("normalize") and abs(sum(weights)) < 1e-6:
        raise ValueError(f"weights {weights} sum to 0, so they cannot be normalised; for differences of models use task-arithmetic" + where)
    if method == "ties" and settings["convention"] == "paper" and values["density"] != settings["density"]:
        raise ValueError("density by layer or by name needs tensors that are trimmed one by one; add --convention mergekit, or give one number for each model")
    return values | ({"name": name} if "seed" in values else {})


def layer_of(name):
    """The number of a tensor's layer, None outside the layers."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def number_at(value, name, depth):
    """A number, a gradient at this depth (0 the first layer, 1 the last; tensors outside the layers have 0, as in mergekit), or the first filter that fits."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{value!r} is not a number, a list of numbers over the layers, or a list of filters")
    if not isinstance(value[0], dict):
        points = [number_at(point, name, depth) for point in value]
        place = depth * (len(points) - 1)
        low = min(int(place), len(points) - 2) if len(points) > 1 else 0
        return points[low] + (place - low) * (points[min(low + 1, len(points) - 1)] - points[low])
    for entry in value:
        if entry.get("filter") is None or entry["filter"] in name:
            return number_at(entry["value"], name, depth)
    raise ValueError(f"no filter of {value} is in the name {name}; add an entry without a filter")


CONFIG = {"merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source"}


def from_config(config):
    """mergekit's configuration (a dict) -> the arguments of merge_folders but `out`. mergekit's defaults, and its convention where none is given."""
    method = str(config.get("merge_method")).replace("_", "-")
    if method not in METHODS:
        raise ValueError(f"merge_method {config.get('merge_method')!r} is not supported; supported: {', '.join(METHODS).replace('-', '_')}")
    takes, models, common = METHODS[method], config.get("models"), config.get("parameters") or {}
    if not (isinstance(models, list) and models and all(isinstance(model, dict) and isinstance(model.get("model"), str) for model in models)):
        raise ValueError('models is not a list of {"model": FOLDER, "parameters": {...}}')
    unknown = config.keys() - CONFIG | {f"models.{key}" for model in models for key in model.keys() - {"model", "parameters"}}
    own = {"weights": "weight", "density": "density"}                                # setting: its name for each model
    known = {own.get(key, {"lam": "lambda"}.get(key, key)) for key in takes} - {"base"} | {"int8_mask"} | ({"rescale"} if "seed" in takes else set())
    unknown |= {f"parameters.{key}" for one in [common, *(model.get("parameters") or {} for model in models)] for key in one.keys() - known}
    if unknown:
        raise ValueError(f"{method} cannot honour {', '.join(sorted(unknown))}; remove it")
    if config.get("tokenizer_source", "base") != "base" or common.get("rescale", True) is not True:
        raise ValueError("tokenizer_source must be base, and rescale true, or absent")
    base = config.get("base_model")
    if (base is None) == ("base" in takes or method == "slerp"):
        raise ValueError(f"{method} {'needs' if base is None else 'takes no'} base_model")
    if "base" in takes:
        models = [model for model in models if model["model"] != base]
    elif method == "slerp":                                                          # t = 0 is the base
        models = sorted(models, key=lambda model: model["model"] != base)
    settings = {"convention": "mergekit", "normalize": method in ("linear", "ties"), "density": 1.0, "lam": common.get("lambda", 1.0), "base": base}
    settings = {key: common.get(key, value) for key, value in settings.items() if key in takes} | {key: common[key] for key in common.keys() & {"seed", "t"}}
    for key in own.keys() & takes:
        settings[key] = [(model.get("parameters") or {}).get(own[key], common.get(own[key], settings.get(key))) for model in models]
    if None in settings.get("weights", []) or (method == "slerp" and "t" not in settings):
        raise ValueError(f"{method} needs a {'t' if method == 'slerp' else 'weight for each model'} in its parameters")
    return {"folders": [model["model"] for model in models], "method": method, "dtype": config.get("out_dtype") or config.get("dtype"), **settings}


def to_config(folders, method, settings, dtype):
    """mergekit's configuration of a merge (checked settings). mergekit does not know the parameters seed and convention, and passes them over."""
    own = {"weights": "weight", "density": "density"}
    models = [{"model": str(folder), "parameters": {own[key]: settings[key][i] for key in own if key in settings}} for i, folder in enumerate(folders)]
    parameters = {{"lam": "lambda"}.get(key, key): value for key, value in settings.items() if key not in {"base", *own}}
    base = {"base_model": str(folders[0] if method == "slerp" else settings["base"])} if method == "slerp" or "base" in settings else {}
    return {"merge_method": method.replace("-", "_"), "models": models, **base, "parameters": parameters, **({"dtype": "float32", "out_dtype": dtype} if dtype else {})}


# ---- what is refused ---------------------------------------------------------------------------------------------------------------

def look_into(inputs):
    """(configs, headers) of model folders that belong together. One ValueError names (up to 20 of) all differences that make a merge meaningless."""
    configs, headers = [read_config(folder) for folder in inputs], [read_header(folder) for folder in inputs]
    problems, first = [], inputs[0]
    for folder, config, header in zip(inputs, configs, headers):
        problems += [f"{folder}: {name} is {code}, which cannot be merged" for name, (_, code, _) in header.items() if code not in DTYPES]
        head, embedding = header.get("lm_head.weight"), header.get("model.embed_tokens.weight")
        if config.get("tie_word_embeddings") and head and embedding:
            if head[1:] != embedding[1:] or not equal(header, "lm_head.weight", header, "model.embed_tokens.weight"):
                problems.append(f"{folder}: lm_head.weight is not model.embed_tokens.weight, to which its config.json ties it")
            del header["lm_head.weight"]
    for folder, config, header in zip(inputs[1:], configs[1:], headers[1:]):
        problems += differences(folder, config, header, first, configs[0], headers[0])
    if problems:
        raise ValueError(f"these models cannot be merged: {first_of(problems, '; ')}")
    return configs, headers


def differences(folder, config, header, first, first_config, first_header):
    problems = [f"{folder} lacks {name}" for name in sorted(first_header.keys() - header.keys())]
    problems += [f"{folder} has {name}, which {first} lacks" for name in sorted(header.keys() - first_header.keys())]
    for name in sorted(first_header.keys() & header.keys()):
        (_, code, shape), (_, other_code, other_shape) = first_header[name], header[name]
        if shape != other_shape:
            problems.append(f"{folder}: {name} is {list(other_shape)}, in {first} {list(shape)}")
        elif code in DTYPES and other_code in DTYPES and not (is_float(code) and is_float(other_code)):
            if code != other_code or not equal(first_header, name, header, name):
                problems.append(f"{folder}: {name} is {other_code}, has no average, and differs from that of {first}")
    if sha256(folder / "tokenizer.json") != sha256(first / "tokenizer.json"):
        problems.append(f"{folder}: tokenizer.json is not that of {first}")
    return problems + [f"{folder}: {key} is {config[key]}, in {first} {first_config[key]}"
                       for key in SAME if key in config and key in first_config and config[key] != first_config[key]]


def equal(header, name, other, other_name):
    """Whether two tensors of one shape and dtype are the same, bit for bit in value."""
    (one, two), size = (places({key: part[key]})[key] for part, key in ((header, name), (other, other_name))), math.prod(header[name][2])
    return all(torch.equal(read_piece(one, start, count), read_piece(two, start, count)) for start, count in spans(size))


def is_float(code):
    return DTYPES[code].is_floating_point


def float_names(header):
    return [name for name, (_, code, _) in header.items() if is_float(code)]


def sha256(path):
    """Hex digest of a file, None if there is none."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_infinite(tensor, what):
    """TIES would turn a NaN into the base's value. A sum is finite if all are, but for overflow, and 20x as fast to look at."""
    if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinite values; mend that model, or choose a wider --dtype")


# ---- the work ----------------------------------------------------------------------------------------------------------------------

def spans(size):
    return [(start, min(PIECE, size - start)) for start in range(0, size, PIECE)]


@contextmanager
def workers():
    """A pool of as many threads as torch has now, with torch on one thread in each: while one reads or writes, another computes."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(num_threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


def over(names, inputs, pool, device, bar):
    """merging.py's `over`: a function that runs work(start, tensors) on all pieces of these tensors, in order. inputs: places, the base's last."""
    def read(place, name, start, count):
        piece = read_piece(place, start, count).to(device).float()
        refuse_infinite(piece, f"{name} in {place[0]}")
        return piece

    def run(work):
        for name in names:
            one = lambda span: (work(span[0], [read(place[name], name, *span) for place in inputs]), span[1])      # noqa: E731
            for result, count in pool.map(one, spans(inputs[0][name][3])):
                bar.update(count * DTYPES[inputs[0][name][1]].itemsize)
                yield result
    return run


def merge_files(folder, files, headers, method, settings, values, device):
    """Merge all tensors into the files of a plan. values: {name: settings_of(name)}."""
    paper_ties = method == "ties" and settings["convention"] == "paper"
    passes = {"slerp": 2, "model-stock": 2, "ties": 3}.get(method, 1) + ("seed" in settings and settings["convention"] == "mergekit")
    size = passes * sum(num_bytes(*headers[0][name][1:]) for name in values)
    function, inputs, outputs = getattr(merging, method.replace("-", "_")), [places(header) for header in headers], tensorfiles.create(folder, files)
    bar = tqdm(total=size, desc="merge", unit="B", unit_scale=True, disable=os.environ.get("RANK", "0") != "0")
    with bar, workers() as pool:
        limits = merging.thresholds(over(list(values), inputs, pool, device, bar), settings["density"]) if paper_ties else None
        for name, place in outputs.items():
            if name not in values:                                                   # look_into found them equal
                for start, count in spans(place[3]):
                    tensorfiles.write_piece(place, start, read_piece(inputs[0][name], start, count))
            elif place[3]:
                pieces = over([name], inputs, pool, device, bar)
                merged = function(pieces, **values[name], **({"limits": limits} if paper_ties else {}))

                def write(start, tensors):
                    piece = merged(start, tensors).to(DTYPES[place[1]]).cpu()
                    refuse_infinite(piece, f"{name}, merged, as {piece.dtype}")
                    tensorfiles.write_piece(place, start, piece)
                for _ in pieces(write):
                    pass
    tensorfiles.seal(folder, files)


def write_the_rest(first, out, config, dtype):
    """Everything of the model folder but the weights, from the first model; config.json says the dtype that is on disk."""
    for name in COPIED:
        if (first / name).exists():
            shutil.copyfile(first / name, out / name)
    if dtype:
        config = config | {key: dtype for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}}
    write_json(out / "config.json", config)


# ---- how far two models are apart --------------------------------------------------------------------------------------------------

def compare_folders(first, second, base=None, device="cpu"):
    """Rows {"what", "distance", "cosine"} for each tensor, each kind of tensor, each layer and all together.

    distance: |b - a| / |a|. With a base also, of the task vectors a - base and b - base: "task_cosine", and "same_sign", the share of
    parameters which both models moved that they moved to the same side.
    """
    inputs = [Path(folder) for folder in (first, second, base) if folder is not None]
    _, headers = look_into(inputs)

    def sums(start, tensors):
        a, b = tensors[:2]
        vectors, signs = [a, b, b - a], torch.zeros(2, device=a.device)
        if base is not None:
            vectors += merging.task_vectors(tensors)
            sides = vectors[3].sign() * vectors[4].sign()
            signs = torch.stack([(sides > 0).sum(), (sides != 0).sum()])
        return torch.cat([merging.gram(vectors).flatten(), signs.double()])

    found, names, inputs = {}, float_names(headers[0]), [places(header) for header in headers]
    size = sum(num_bytes(*headers[0][name][1:]) for name in names)
    with tqdm(total=size, desc="compare", unit="B", unit_scale=True) as bar, workers() as pool:
        for name in names:
            if math.prod(headers[0][name][2]):
                own = merging.total(over([name], inputs, pool, device, bar), sums)
                layer = layer_of(name)
                groups = [(0, 0, name), (3, 0, "all")]
                groups += [(1, 0, re.sub(r"\.\d+\.", ".*.", name)), (2, layer, re.sub(r"(\.\d+)\..*", r"\1", name))] if layer is not None else []
                for group in groups:
                    found[group] = found.get(group, 0) + own
    return [row(what, own, base is not None) for (_, _, what), own in sorted(found.items())]


def row(what, sums, with_base):
    products = sums[:-2].view(5 if with_base else 3, -1)

    def cosine(i, j):
        length = (products[i, i] * products[j, j]).sqrt()
        return (products[i, j] / length).item() if length > 0 else None

    a, distance = products[0, 0].sqrt(), products[2, 2].sqrt()
    result = {"what": what, "distance": (distance / a).item() if a > 0 else None, "cosine": cosine(0, 1)}
    if with_base:
        result |= {"task_cosine": cosine(3, 4), "same_sign": (sums[-2] / sums[-1]).item() if sums[-1] > 0 else None}
    return result
