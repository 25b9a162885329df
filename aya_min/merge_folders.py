"""Model folders in, one merged model folder out, or numbers that say how far two models are apart.

The work is done piece by piece, by the tensor names in the files. Nothing here knows an architecture: reward
models, tied heads or models of other families merge as well. Every difference between the inputs (names,
shapes, configuration, tokenizer: alike.py) is refused before any work. The output is written in a scratch
folder and published whole, so an interrupted merge leaves nothing that looks complete. The methods are in
merge_methods.py, their settings and needs in merge_config.py.

Memory does not grow with the models: each core holds one piece of each model, read, merged and written by one
thread. Integer and boolean tensors have no average and must be equal in all inputs, and so must the domains'
embeddings of mixtures of experts. So must a tied head and its embedding; the head is not written.
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
from .merge_config import METHODS, OUTPUT_DTYPES, check_settings, layer_of, settings_by_tensor, to_config
from .tokenizer import files_to_publish
from .tensorfiles import (DTYPES, drop_tied_head, equal, first_of, num_bytes, places, read_config,
                          read_header, read_piece)

PIECE = 1 << 19             # elements; DARE's masks depend on it


def merge_folders(folders, out, method, *, dtype=None, device="cpu", shard_bytes=tensorfiles.SHARD_BYTES,
                  hashes=True, digests=None, progress=True, allow_config_differences=False, **settings):
    """Merge model folders into the new folder `out`; returns its Path.

    settings: those of merge_config.METHODS. Each of the weights (one for each model), each density (one for
    all, or a list of one for each model), t and lam may be a number, a gradient over the layers (for example
    [0, 0.5, 1]), or filters by name: see merge_config.number_at.
    dtype: one of OUTPUT_DTYPES; None keeps each tensor's dtype in the first folder.
    hashes: record the SHA-256 of every input in merge.json. digests: the Digests of the models' files, if
    already begun. progress: show a bar, and name the tolerated differences from the first model.
    allow_config_differences: accept configurations that differ, and take the first model's.
    Raises ValueError, before any work, if the settings have no meaning, the models do not match or `out`
    exists; later, if a value is not finite or the disk is full. Then nothing stays.
    """
    folders, out = [Path(folder) for folder in folders], Path(out)
    settings = check_settings(method, settings, len(folders), dtype)
    inputs = folders + [Path(settings["base"])] if "base" in settings else folders      # the base is the last
    if out.resolve() in [folder.resolve() for folder in inputs]:
        raise ValueError(f"{out} is one of the models to merge; give another folder as the output")
    if os.path.lexists(out):
        raise already_exists(out)
    configs, headers, tolerated = read_sources(inputs, allow_config_differences)
    values = settings_by_tensor(method, settings, averaged_names(headers[0]))
    specs = {name: (OUTPUT_DTYPES[dtype] if dtype and has_average(name, code) else code, shape)
             for name, (_, code, shape) in headers[0].items()}
    files = tensorfiles.assign_files(specs, shard_bytes)
    along = files_along(folders[0])
    size = sum(num_bytes(*spec) for spec in specs.values())
    size += sum((folders[0] / name).stat().st_size for name in along)

    with output_folder(out, size) as made, digests or Digests() as digests:
        if progress:
            print_tolerated(tolerated)
        files_of = {folder: sorted({file for file, _, _ in header.values()})
                    for folder, header in zip(inputs, headers)}
        if hashes:
            digests.begin(sum(files_of.values(), []))           # in the background of the merge
        merge_files(made, files, headers, method, settings, values, device, progress)
        write_the_rest(folders[0], along, made, configs[0], dtype)
        sources = [{"folder": str(folder),
                    "sha256": {file.name: digests[file] if hashes else None for file in files_of[folder]}}
                   for folder in inputs]
        write_json(made / "merge.json", {
            "config": to_config(folders, method, settings, dtype, allow_config_differences),
            "inputs": sources,
            "versions": {"aya_min": __version__, "torch": torch.__version__}})
    return out


def already_exists(out):
    """The error for an output folder that exists."""
    return ValueError(f"{out} exists already; remove it or give another folder as the output")


@contextmanager
def output_folder(out, size=0):
    """files.new_folder that also makes the parent folders; after an error all of them are removed.

    size: bytes that the folder will need. Raises ValueError if the disk has less, or if a write fails.
    """
    parents = (out.parent, *out.parent.parents)
    missing = [folder for folder in parents if not folder.exists()]
    existing = next(folder for folder in (out.absolute().parent, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise ValueError(f"{out} needs {size / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; make room "
                         f"or give another folder as the output")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as made:
            yield made
    except BaseException as error:                  # Ctrl-C and a full disk too
        for folder in missing:
            try:
                folder.rmdir()
            except OSError:                         # another process put something into it
                break
        if isinstance(error, OSError):
            why = f"{out} could not be made ({one_line(error)}); nothing of it was kept"
            raise ValueError(why) from error
        raise


# ---- what is refused ---------------------------------------------------------------------------------------

def read_sources(inputs, allow_config_differences=False):
    """(configs, headers, tolerated) of model folders that can be merged.

    Raises one ValueError with all differences that make a merge meaningless (up to 20 are named). tolerated:
    texts about those that do not, for example generation settings, ids of end and padding, chat templates.
    """
    configs = [read_config(folder) for folder in inputs]
    experts = [experts_of(config) for config in configs]
    for folder, its in zip(inputs, experts):
        if its != experts[0]:
            raise ValueError(f"these models cannot be merged: {folder} is {kind_of(its)}, {inputs[0]} "
                             f"{kind_of(experts[0])}")
    for folder, config in zip(inputs, configs):
        if config.get("quantization_config"):
            raise ValueError(f"{folder} is quantized: its codes can be neither merged nor compared; give the "
                             "model that it was made of")
    headers = [read_header(folder) for folder in inputs]
    problems, tolerated, first = [], [], inputs[0]
    for folder, config, header in zip(inputs, configs, headers):
        for name in [name for name in header if name.endswith("rotary_emb.inv_freq")]:
            del header[name]                        # older Llama checkpoints repeat rope_theta in this form
        problems += [f"{folder}: {name} is {code}, which cannot be merged"
                     for name, (_, code, _) in header.items() if code not in DTYPES]
        if config.get("tie_word_embeddings") and not drop_tied_head(header):
            problems.append(f"{folder}: lm_head.weight is not model.embed_tokens.weight, to which its "
                            "config.json ties it")
    for folder, config, header in zip(inputs[1:], configs[1:], headers[1:]):
        problems += tensor_differences(folder, header, first, headers[0])
        try:
            problems += tokenizer_differences(folder, first)
            changed = config_differences(folder, config, first, configs[0])
            tolerated += remarks(folder, config, first, configs[0])
        except RecursionError:
            raise ValueError(f"{folder} or {first}: the objects of a JSON file are nested too deeply to "
                             f"compare; download them again") from None
        if allow_config_differences:
            tolerated += [f"{one}; the first is taken" for one in changed]
        elif changed:
            problems += [*changed[:-1], f"{changed[-1]} (--allow-config-differences takes that of {first})"]
    if problems:
        raise ValueError(f"these models cannot be merged: {first_of(problems, '; ')}")
    return configs, headers, tolerated


def experts_of(config):
    """The experts that a config.json names, or what stands in their place; None of a dense model."""
    mixture = config.get("mixture")
    return mixture.get("experts", mixture) if isinstance(mixture, dict) else mixture


def kind_of(experts):
    return "a dense model" if experts is None else f"a mixture of {shown(experts)}"


def print_tolerated(tolerated):
    """Print the tolerated differences that read_sources returns on standard error, each once."""
    for text in dict.fromkeys(tolerated):
        print(one_line(text), file=sys.stderr)


def tensor_differences(folder, header, first, first_header):
    """Texts that say how the tensors of two folders differ: names, shapes, or values without an average."""
    problems = [f"{folder} lacks {name}" for name in sorted(first_header.keys() - header.keys())]
    problems += [f"{folder} has {name}, which {first} lacks"
                 for name in sorted(header.keys() - first_header.keys())]
    for name in sorted(first_header.keys() & header.keys()):
        _, first_code, first_shape = first_header[name]
        _, code, shape = header[name]
        if shape != first_shape:
            problems.append(f"{folder}: {name} is {list(shape)}, in {first} {list(first_shape)}")
        elif {code, first_code} <= DTYPES.keys() and not (has_average(name, code)
                                                          and has_average(name, first_code)):
            if code != first_code or not equal(first_header, name, header, name):
                problems.append(f"{folder}: {name} is {code}, has no average, and differs from that of "
                                f"{first}")
    return problems


def has_average(name, code):
    """Whether a tensor of this safetensors dtype is merged, and not the same in all models."""
    return DTYPES[code].is_floating_point and name != "model.domains"


def averaged_names(header):
    return [name for name, (_, code, _) in header.items() if has_average(name, code)]


def is_finite(tensor):
    """Check the sum first (20x faster); if it is not finite it may only have overflowed, so then check every
    element."""
    # bf16 has fp32's range, and its own sum takes a third of the time
    dtype = None if tensor.dtype == torch.bfloat16 else torch.float32
    return bool(tensor.sum(dtype=dtype).isfinite() or tensor.isfinite().all())


def refuse_infinite(name, inputs, merged):
    """Raise a ValueError that names the input with the NaN or infinity that came out of a merge.

    No method loses such a value on the way. merged: what to name if all inputs are finite.
    """
    for place in [part[name] for part in inputs]:
        if not all(is_finite(read_piece(place, *span)) for span in spans(place[3])):
            raise ValueError(f"{name} in {place[0]} holds NaN or infinite values; mend that model")
    raise ValueError(f"{merged} holds NaN or infinite values, which no model has; choose a wider --dtype, or "
                     "smaller weights")


# ---- the work ----------------------------------------------------------------------------------------------

def spans(size):
    return [(start, min(PIECE, size - start)) for start in range(0, size, PIECE)]


@contextmanager
def workers():
    """A pool of as many threads as torch has, at most 8; meanwhile torch computes on one thread in each.

    While one thread reads or writes, another computes.
    """
    num_threads = torch.get_num_threads()
    # once this is freed, glibc keeps what smaller tensors free: 30x fewer page faults
    torch.empty(31 << 20, dtype=torch.uint8)
    torch.set_num_threads(1)
    # each thread holds a piece of every model, and Python's lock lets few more run
    pool = ThreadPoolExecutor(min(8, num_threads))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


def over_pieces_of(names, inputs, pool, device, bar):
    """The `over_pieces` of merge_methods.py: a function that calls work(start, tensors) on the pieces of
    these tensors and yields the results in order.

    inputs: tensorfiles.places of each model, the base last.
    """
    def over_pieces(work, every=1):
        for name in names:
            def read_and_work(span):
                tensors = [read_piece(place[name], *span).to(device) for place in inputs]
                return work(span[0], tensors), span[1]

            _, code, _, size = inputs[0][name]
            for result, count in pool.map(read_and_work, spans(size)[::every]):
                bar.update(count * DTYPES[code].itemsize if every == 1 else 0)
                yield result
    return over_pieces


def merge_files(folder, files, headers, method, settings, values, device, progress):
    """Merge all tensors into the files that tensorfiles.assign_files returned.

    settings: checked, of the whole merge. values: {name of a floating tensor: the settings that it has}.
    """
    entry, convention = METHODS[method], settings.get("convention", "paper")
    function = getattr(merge_methods, method.replace("-", "_"))
    inputs = [places(header) for header in headers]
    outputs = tensorfiles.create(folder, files)
    size = entry.passes(convention) * sum(num_bytes(*headers[0][name][1:]) for name in values)
    bar = command.progress(total=size, desc="merge", unit="B", unit_scale=True, disable=not progress)
    with bar, workers() as pool:
        scanned = {}
        if convention in entry.model_scans:
            scan = getattr(merge_methods, entry.model_scans[convention])
            scanned = scan(over_pieces_of(list(values), inputs, pool, device, bar), **settings)
        for name, place in outputs.items():
            if name not in values:                  # read_sources found them equal
                for span in spans(place[3]):
                    piece = read_piece(inputs[0][name], *span)
                    if not is_finite(piece):
                        refuse_infinite(name, inputs, name)
                    tensorfiles.write_piece(place, span[0], piece)
            elif place[3]:
                over_pieces = over_pieces_of([name], inputs, pool, device, bar)
                merge_piece = function(over_pieces, **values[name], **scanned)

                def write(start, tensors):
                    piece = merge_piece(start, tensors).to(DTYPES[place[1]]).cpu()
                    if not is_finite(piece):
                        refuse_infinite(name, inputs, f"{name}, merged, as {piece.dtype},")
                    tensorfiles.write_piece(place, start, piece)
                for _ in over_pieces(write):
                    pass
    tensorfiles.seal(folder, files)


def write_the_rest(first, along, out, config, dtype):
    """Write all files of the model folder except the weights, from the first model's; config.json names the
    dtype that is on disk."""
    for name in along:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(first / name, out / name)
    for name, data in files_to_publish(first).items():      # an older folder of ours names the wrong class
        (out / name).write_bytes(data)
    if dtype:
        config = config | {key: dtype for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}}
    write_json(out / "config.json", config)


# ---- how far two models are apart --------------------------------------------------------------------------

def compare_folders(first, second, base=None, device="cpu"):
    """Rows {"what", "distance", "cosine"} for each tensor, each kind of tensor over the layers, each layer,
    and all tensors together.

    distance: |b - a| / |a|. With a base, also of the task vectors a - base and b - base: "task_cosine", and
    "same_sign", the share of the parameters moved by both that moved in the same direction. A number is None
    where a length is 0. The rows of `config_rows` come first.
    """
    folders = [Path(folder) for folder in (first, second, base) if folder is not None]
    configs, headers, _ = read_sources(folders, allow_config_differences=True)
    names = [name for name in averaged_names(headers[0]) if math.prod(headers[0][name][2])]
    inputs = [places(header) for header in headers]
    found = {}
    size = sum(num_bytes(*headers[0][name][1:]) for name in names)
    with command.progress(total=size, desc="diff", unit="B", unit_scale=True) as bar, workers() as pool:
        for name in names:
            sums = merge_methods.sum_over(over_pieces_of([name], inputs, pool, device, bar), sums_of)
            if not sums.isfinite().all():
                refuse_infinite(name, inputs, f"the difference of {name}")
            for row in rows_of(name):
                found[row] = found.get(row, 0) + sums
    rows = [numbers_of(what, sums) for (_, _, what), sums in sorted(found.items())]
    return [*config_rows(configs), *rows]


def rows_of(name):
    """(block, layer, what) of each row that a tensor counts in, in the order of the rows when sorted."""
    rows = [(0, 0, name), (3, 0, "all")]
    layer = layer_of(name)
    if layer is not None:
        rows += [(1, 0, re.sub(r"\.\d+\.", ".*.", name, count=1)),
                 (2, layer, re.sub(r"(\.\d+)\..*", r"\1", name))]
    return rows


def config_rows(configs):
    """{"what": "config.json: KEY", "first", "second"} (and "base"), the values as text, for each key that
    changes the computation and differs between any of them."""
    meant = [meaning(config) for config in configs]
    keys = sorted({key for other in meant[1:] for key in different(meant[0], other)})
    rows = []
    for key in keys:
        values = [shown(one.get(key)) for one in meant]
        rows.append({"what": f"config.json: {key}", **dict(zip(("first", "second", "base"), values))})
    return rows


def sums_of(start, tensors):
    """Numbers that add up over pieces, fp64: the inner products of a, b, b - a and, with a base, the two task
    vectors (9 or 25); then how many parameters both moved in the same direction, and how many both moved."""
    a, b, *base = tensors = merge_methods.fp32(tensors)
    tasks = merge_methods.task_vectors(tensors) if base else []
    directions = tasks[0].sign() * tasks[1].sign() if base else torch.zeros(1)
    products = merge_methods.gram([a, b, b - a, *tasks]).flatten().cpu()
    counts = torch.tensor([(directions > 0).sum(), (directions != 0).sum()], dtype=torch.float64)
    return torch.cat([products, counts])


def numbers_of(what, sums):
    """The row of compare_folders that these sums give."""
    products = sums[:-2].view(math.isqrt(len(sums) - 2), -1)
    alike, moved = sums[-2:].tolist()
    lengths = products.diagonal().sqrt().tolist()

    def cosine(i, j):
        return products[i, j].item() / (lengths[i] * lengths[j]) if lengths[i] * lengths[j] else None

    row = {"what": what, "distance": lengths[2] / lengths[0] if lengths[0] else None, "cosine": cosine(0, 1)}
    if len(lengths) == 5:
        row |= {"task_cosine": cosine(3, 4), "same_sign": alike / moved if moved else None}
    return row


def difference_table(rows):
    """The rows of compare_folders as lines of text, safe to print whatever the tensors' names hold."""
    configs = [row for row in rows if "first" in row]
    rows = [row for row in rows if "first" not in row]
    columns = [key for key in rows[0] if key != "what"] if rows else []
    lines = [[column.replace("_", " ") for column in columns] + [""]]
    lines += [["-" if row[column] is None else f"{row[column]:.6f}" for column in columns]
              + [one_line(row["what"])] for row in rows]
    text = ["".join(f"{cell:>13}" for cell in cells) + f"  {what}" for *cells, what in lines]
    for row in reversed(configs):
        values = ", ".join(f"{value} in the {name}" for name, value in row.items() if name != "what")
        text.insert(0, one_line(f"{row['what']} is {values}"))
    return "\n".join(text)
