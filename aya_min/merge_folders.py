"""Model folders in, one merged model folder out, or numbers of how far two are apart: piece by piece, by the tensor names in the files.

Nothing here knows an architecture: reward models, tied heads or models of other families merge as well. Whatever differs between the
inputs (names, shapes, configuration, tokenizer: alike.py) is refused before any work. The output is written
beside its place and published whole, so an interrupted merge leaves nothing that looks whole. The methods
are in merge_methods.py, their settings in merge_config.py.

Memory does not grow with the models: each core has one piece of each model, read, merged and written by one thread. Integer and boolean
tensors, which have no average, must be equal in all inputs; so must a tied head and its embedding, and the head is not written.
"""

import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from . import __version__, command, merge_methods, tensorfiles
from .alike import config_differences, different, files_along, meaning, remarks, shown, tokenizer_differences
from .command import one_line
from .files import Digests, new_folder, write_json
from .merge_config import OUTPUT_DTYPES, check_settings, layer_of, settings_by_tensor, to_config
from .tokenizer import files_to_publish
from .tensorfiles import DTYPES, drop_tied_head, equal, first_of, num_bytes, places, read_config, read_header, read_piece

PIECE = 1 << 19             # elements; DARE's masks depend on it


def merge_folders(folders, out, method, *, dtype=None, device="cpu", shard_bytes=tensorfiles.SHARD_BYTES,
                  hashes=True, digests=None, progress=True, allow_config_differences=False, **settings):
    """Merge model folders into the new folder `out`; returns its Path.

    settings: mergeconfig.METHODS. Each of the weights (one for each model), density (one for all, or a list of one for each), t and lam
    may be a number, a gradient such as [0, 0.5, 1] over the layers, or filters by name, see mergeconfig.number_at.
    dtype: one of OUTPUT_DTYPES; None keeps that of each tensor of the first folder, whatever the others have.
    hashes: put the SHA-256 of every input into merge.json. digests: the Digests of the models' files, if
    begun before. progress: show a bar, and say what differs and is taken from the first model.
    allow_config_differences: where the configurations differ too.
    """
    folders, out = [Path(folder) for folder in folders], Path(out)
    settings = check_settings(method, settings, len(folders), dtype)
    inputs = folders + [Path(settings["base"])] if "base" in settings else folders
    if out.resolve() in [folder.resolve() for folder in inputs]:
        raise ValueError(f"{out} is one of the models to merge; give another folder as the output")
    if os.path.lexists(out):
        raise in_the_way(out)
    configs, headers, said = look_into(inputs, allow_config_differences)
    values = settings_by_tensor(method, settings, float_names(headers[0]))
    specs = {name: (OUTPUT_DTYPES[dtype] if dtype and is_float(code) else code, shape) for name, (_, code, shape) in headers[0].items()}
    files, along = tensorfiles.assign_files(specs, shard_bytes), files_along(folders[0])
    size = sum(num_bytes(*spec) for spec in specs.values())
    size += sum((folders[0] / name).stat().st_size for name in along)

    with output_folder(out, size) as made, digests or Digests() as digests:
        if progress:
            tell(said)
        files_of = {folder: sorted({file for file, _, _ in header.values()}) for folder, header in zip(inputs, headers)}
        if hashes:
            digests.begin(sum(files_of.values(), []))                                # beside the merge
        merge_files(made, files, headers, method, settings, values, device, progress)
        write_the_rest(folders[0], along, made, configs[0], dtype)
        write_json(made / "merge.json", {
            "config": to_config(folders, method, settings, dtype, allow_config_differences),
            "inputs": [{"folder": str(folder), "sha256": {file.name: digests[file] if hashes else None for file in files_of[folder]}} for folder in inputs],    # the base is the last
            "versions": {"aya_min": __version__, "torch": torch.__version__}})
    return out


def in_the_way(out):
    """The error for an output folder that is there."""
    return ValueError(f"{out} exists already; remove it or give another folder as the output")


@contextmanager
def output_folder(out, size=0):
    """files.new_folder with the folders above it; or all of them go away. size: bytes that it will need."""
    above = [place for place in (out.parent, *out.parent.parents) if not place.exists()]
    there = next(place for place in (out.absolute().parent, *out.absolute().parents) if place.exists())
    if size > (free := shutil.disk_usage(there).free):
        raise ValueError(f"{out} needs {size / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; make room "
                         f"or give another folder as the output")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as made:
            yield made
    except BaseException as error:                                                   # Ctrl-C and a full disk too
        for place in above:
            try:
                place.rmdir()
            except OSError:                         # another process put something there
                break
        if isinstance(error, OSError):
            why = f"{out} could not be made ({one_line(error)}); nothing of it was kept"
            raise ValueError(why) from error
        raise


# ---- what is refused ---------------------------------------------------------------------------------------------------------------

def look_into(inputs, allow_config_differences=False):
    """(configs, headers, what to `tell`) of model folders that belong together.

    One ValueError names (up to 20 of) all differences that make a merge meaningless. Told are those that do
    not, such as generation settings, ids of end and padding, chat templates.
    """
    configs, headers = [read_config(folder) for folder in inputs], [read_header(folder) for folder in inputs]
    problems, said, first = [], [], inputs[0]
    for folder, config, header in zip(inputs, configs, headers):
        for name in [name for name in header if name.endswith("rotary_emb.inv_freq")]:
            del header[name]                        # older Llama checkpoints carry what rope_theta says
        problems += [f"{folder}: {name} is {code}, which cannot be merged" for name, (_, code, _) in header.items() if code not in DTYPES]
        if config.get("tie_word_embeddings") and not drop_tied_head(header):
            problems.append(f"{folder}: lm_head.weight is not model.embed_tokens.weight, to which its config.json ties it")
    for folder, config, header in zip(inputs[1:], configs[1:], headers[1:]):
        problems += differences(folder, header, first, headers[0])
        try:
            problems += tokenizer_differences(folder, first)
            changed = config_differences(folder, config, first, configs[0])
            said += remarks(folder, config, first, configs[0])
        except RecursionError:
            raise ValueError(f"{folder} or {first}: a JSON file of objects within objects, too deep to "
                             f"compare; download them again") from None
        if allow_config_differences:
            said += [f"{one}; the first is taken" for one in changed]
        elif changed:
            problems += [*changed[:-1], f"{changed[-1]} (--allow-config-differences takes that of {first})"]
    if problems:
        raise ValueError(f"these models cannot be merged: {first_of(problems, '; ')}")
    return configs, headers, said


def tell(said):
    for text in dict.fromkeys(said):
        print(one_line(text), file=sys.stderr)


def differences(folder, header, first, first_header):
    problems = [f"{folder} lacks {name}" for name in sorted(first_header.keys() - header.keys())]
    problems += [f"{folder} has {name}, which {first} lacks" for name in sorted(header.keys() - first_header.keys())]
    for name in sorted(first_header.keys() & header.keys()):
        (_, code, shape), (_, other_code, other_shape) = first_header[name], header[name]
        if shape != other_shape:
            problems.append(f"{folder}: {name} is {list(other_shape)}, in {first} {list(shape)}")
        elif code in DTYPES and other_code in DTYPES and not (is_float(code) and is_float(other_code)):
            if code != other_code or not equal(first_header, name, header, name):
                problems.append(f"{folder}: {name} is {other_code}, has no average, and differs from that of {first}")
    return problems


def is_float(code):
    return DTYPES[code].is_floating_point


def float_names(header):
    return [name for name, (_, code, _) in header.items() if is_float(code)]


def is_finite(tensor):
    """A sum is finite if all are, but for overflow, and 20x as fast to look at."""
    dtype = None if tensor.dtype == torch.bfloat16 else torch.float32               # bf16 has fp32's range, and its own sum is 3x as fast
    return bool(tensor.sum(dtype=dtype).isfinite() or tensor.isfinite().all())


def refuse_infinite(name, inputs, merged):
    """Say whose NaN or infinity it is that came out of a merge; no method loses one on the way."""
    for place in [part[name] for part in inputs]:
        if not all(is_finite(read_piece(place, *span)) for span in spans(place[3])):
            raise ValueError(f"{name} in {place[0]} holds NaN or infinite values; mend that model")
    raise ValueError(f"{merged} holds NaN or infinite values, which no model has; choose a wider --dtype, or smaller weights")


# ---- the work ----------------------------------------------------------------------------------------------------------------------

def spans(size):
    return [(start, min(PIECE, size - start)) for start in range(0, size, PIECE)]


@contextmanager
def workers():
    """A pool of as many threads as torch has now, 8 at most, with torch on one thread in each: while one reads or writes, another computes."""
    num_threads = torch.get_num_threads()
    torch.empty(31 << 20, dtype=torch.uint8)            # freed at once, it makes glibc keep what smaller tensors free: 30x fewer page faults
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(8, num_threads))      # each holds pieces of all models, and Python's lock lets few more run
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


def over(names, inputs, pool, device, bar):
    """merge_methods.py's `over`: a function that runs work(start, tensors) on all pieces of these tensors, in order. inputs: places, the base's last."""
    def run(work, every=1):
        for name in names:
            one = lambda span: (work(span[0], [read_piece(place[name], *span).to(device) for place in inputs]), span[1])      # noqa: E731
            for result, count in pool.map(one, spans(inputs[0][name][3])[::every]):
                bar.update(count * DTYPES[inputs[0][name][1]].itemsize if every == 1 else 0)
                yield result
    return run


def merge_files(folder, files, headers, method, settings, values, device, progress):
    """Merge all tensors into the files of a plan. values: their settings."""
    paper_ties = method == "ties" and settings["convention"] == "paper"
    passes = {"slerp": 2, "model-stock": 2, "ties": 2}.get(method, 1) + ("seed" in settings and settings["convention"] == "mergekit")
    size = passes * sum(num_bytes(*headers[0][name][1:]) for name in values)
    function, inputs, outputs = getattr(merge_methods, method.replace("-", "_")), [places(header) for header in headers], tensorfiles.create(folder, files)
    bar = command.progress(total=size, desc="merge", unit="B", unit_scale=True, disable=not progress)
    with bar, workers() as pool:
        limits = merge_methods.thresholds(over(list(values), inputs, pool, device, bar), settings["density"]) if paper_ties else None
        for name, place in outputs.items():
            if name not in values:                                                   # look_into found them equal
                for span in spans(place[3]):
                    tensorfiles.write_piece(place, span[0], read_piece(inputs[0][name], *span))
            elif place[3]:
                pieces = over([name], inputs, pool, device, bar)
                merged = function(pieces, **values[name], **({"limits": limits} if paper_ties else {}))

                def write(start, tensors):
                    piece = merged(start, tensors).to(DTYPES[place[1]]).cpu()
                    if not is_finite(piece):
                        refuse_infinite(name, inputs, f"{name}, merged, as {piece.dtype},")
                    tensorfiles.write_piece(place, start, piece)
                for _ in pieces(write):
                    pass
    tensorfiles.seal(folder, files)


def write_the_rest(first, along, out, config, dtype):
    """Everything of the model folder but the weights, from the first model; config.json says the dtype that is on disk."""
    for name in along:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(first / name, out / name)
    for name, data in files_to_publish(first).items():      # an older folder of ours names the wrong class
        (out / name).write_bytes(data)
    if dtype:
        config = config | {key: dtype for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}}
    write_json(out / "config.json", config)


# ---- how far two models are apart --------------------------------------------------------------------------------------------------

def compare_folders(first, second, base=None, device="cpu"):
    """Rows {"what", "distance", "cosine"} for each tensor, each kind of tensor over the layers, each layer, and all together.

    distance: |b - a| / |a|. With a base, of the task vectors a - base and b - base too: "task_cosine", and "same_sign", the share of the
    parameters moved by both that were moved to the same side. None where a length is 0. Before them, rows
    {"what", "first", "second"} (and "base") of the keys of config.json that change the computation and
    differ.
    """
    configs, headers, _ = look_into([Path(folder) for folder in (first, second, base) if folder is not None],
                                    True)
    names = [name for name in float_names(headers[0]) if math.prod(headers[0][name][2])]
    inputs, found = [places(header) for header in headers], {}
    size = sum(num_bytes(*headers[0][name][1:]) for name in names)
    with command.progress(total=size, desc="diff", unit="B", unit_scale=True) as bar, workers() as pool:
        for name in names:
            sums, layer = merge_methods.total(over([name], inputs, pool, device, bar), sums_of), layer_of(name)
            if not sums.isfinite().all():
                refuse_infinite(name, inputs, f"the difference of {name}")
            rows = [(0, 0, name), (3, 0, "all")]
            if layer is not None:
                rows += [(1, 0, re.sub(r"\.\d+\.", ".*.", name, count=1)), (2, layer, re.sub(r"(\.\d+)\..*", r"\1", name))]
            for row in rows:
                found[row] = found.get(row, 0) + sums
    return [*config_rows(configs), *(numbers_of(what, sums) for (_, _, what), sums in sorted(found.items()))]


def config_rows(configs):
    """{"what": "config.json: KEY", "first", "second"} (and "base"), the values as text, of each key that
    differs between any of them."""
    meant = [meaning(config) for config in configs]
    keys = sorted({key for other in meant[1:] for key in different(meant[0], other)})
    rows = []
    for key in keys:
        values = [shown(one.get(key)) for one in meant]
        rows.append({"what": f"config.json: {key}", **dict(zip(("first", "second", "base"), values))})
    return rows


def sums_of(start, tensors):
    """What adds up over pieces: inner products of a, b, b - a and, with a base, of the task vectors (25 or 9); parameters moved alike, and by both."""
    a, b, *base = tensors = merge_methods.fp32(tensors)
    tasks = merge_methods.task_vectors(tensors) if base else []
    sides = tasks[0].sign() * tasks[1].sign() if base else torch.zeros(1)
    return torch.cat([merge_methods.gram([a, b, b - a, *tasks]).flatten().cpu(), torch.tensor([(sides > 0).sum(), (sides != 0).sum()], dtype=torch.float64)])


def numbers_of(what, sums):
    products, (alike, moved) = sums[:-2].view(math.isqrt(len(sums) - 2), -1), sums[-2:].tolist()
    lengths = products.diagonal().sqrt().tolist()

    def cosine(i, j):
        return products[i, j].item() / (lengths[i] * lengths[j]) if lengths[i] * lengths[j] else None
    numbers = {"what": what, "distance": lengths[2] / lengths[0] if lengths[0] else None, "cosine": cosine(0, 1)}
    return numbers | ({"task_cosine": cosine(3, 4), "same_sign": alike / moved if moved else None} if len(lengths) == 5 else {})


def table(rows):
    """The rows as lines of text; no name of a tensor steers the terminal."""
    configs, rows = ([row for row in rows if ("first" in row) == of_config] for of_config in (True, False))
    columns = [key for key in rows[0] if key != "what"] if rows else []
    lines = [[column.replace("_", " ") for column in columns] + [""]]
    lines += [["-" if row[column] is None else f"{row[column]:.6f}" for column in columns]
              + [one_line(row["what"])] for row in rows]
    text = ["".join(f"{cell:>13}" for cell in cells) + f"  {what}" for *cells, what in lines]
    for row in reversed(configs):
        values = ", ".join(f"{value} in the {name}" for name, value in row.items() if name != "what")
        text.insert(0, one_line(f"{row['what']} is {values}"))
    return "\n".join(text)
