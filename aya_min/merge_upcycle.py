"""Dense models that were trained from one seed, made into a mixture of experts (moe.py), and a mixture that
grows by a model: Nexus (arXiv 2408.15901, sections 2 and 3) and BAM (arXiv 2408.08274, section 3).

    kind    router  shared MLP   experts of                    the mean of
    nexus   nexus   the seed's   the models' MLPs              the models
    linear  linear  the seed's   the models' MLPs              the models
    btx     linear  none         the models' and the seed's    the models and the seed
    bam     linear  none         those, and their attentions   the models and the seed

All that is no expert is a mean, in fp32. Routers are drawn from a seed. The folders are read and written
piece by piece, as merge_folders.py does it, so memory does not grow with the models or their number.
"""

import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from . import __version__, command, tensorfiles
from .alike import config_differences, files_along, remarks, tokenizer_differences
from .command import in_range, shortened
from .files import Digests, write_json
from .merge_config import OUTPUT_DTYPES
from .merge_embed import EMBEDDER, refuse_other_embedder
from .merge_folders import (already_exists, is_finite, output_folder, over_pieces_of, print_tolerated,
                            refuse_infinite, workers, write_the_rest)
from .merge_methods import weighted_sum
from .model import CohereForCausalLM, initial_value
from .model_config import Mixture
from .tensorfiles import DTYPES, first_of, num_bytes, places, write_piece
from .weights import ONE, load_meta

KINDS = ("nexus", "linear", "btx", "bam")
SEED = "seed"                       # the name of the expert that the seed model is, of btx and bam


class Source:
    """A model folder: its config, its header (tensorfiles.read_header) and {tensor name: place}."""

    def __init__(self, folder, mixture=False):
        """mixture: whether it must be a mixture of experts. ValueError if it is not that, or no language
        model."""
        self.folder = Path(folder)
        model, _, self.header = load_meta(folder)
        self.config = model.config
        if type(model) is not CohereForCausalLM:
            raise ValueError(f"{folder} is {ONE[type(model)]}; mixtures are made of language "
                             "models")
        if bool(self.config.mixture) != mixture:
            raise ValueError(f"{folder} is a mixture of experts already; merge.py extend adds a model to it"
                             if not mixture else f"{folder} is a dense model; give a mixture of experts")
        stored = {name: model.stored.get(name, name) for name in self.header}
        found = places({stored[name]: entry for name, entry in self.header.items()})
        self.places = {name: found[stored[name]] for name in self.header}


def refuse_unlike(sources):
    """Refuse models that differ from the first in what they compute or in their tokenizers; print other
    differences. A mixture is compared as the dense model that its config describes."""
    first, problems, tolerated = sources[0], [], []
    published = [replace(source.config, mixture=None).published() for source in sources]
    for source, config in zip(sources[1:], published[1:]):
        about = source.folder, config, first.folder, published[0]
        problems += config_differences(*about) + tokenizer_differences(source.folder, first.folder)
        tolerated += remarks(*about)
    if problems:
        raise ValueError(f"no mixture can be made of these models: {first_of(problems, '; ')}")
    print_tolerated(tolerated)


def checked_vector(name, vector, size=None):
    """A domain's embedding. ValueError unless it is a list of `size` finite numbers. The expert's embedding
    grows with their squares, so they must be far from the end of fp32."""
    if not (isinstance(vector, list) and vector and all(
            type(x) in (int, float) and in_range(x, "[-1e6, 1e6]") for x in vector)):
        raise ValueError(f"domain {name}: {shortened(vector)} is not a list of finite numbers of at most 1e6")
    if size not in (None, len(vector)):
        raise ValueError(f"domain {name}: an embedding of {len(vector)} numbers, where the others have "
                         f"{size}; embed all domains with one model")
    return vector


def refuse_alike(vectors):
    """ValueError if two of {name: embedding} are equal, or one is all zeros: no training of Nexus' router
    could then tell these experts apart."""
    seen = {}
    for name, vector in vectors.items():
        if not any(vector):
            raise ValueError(f"domain {name}: an embedding of zeros, by which no router is trained; embed "
                             "texts")
        if (first := seen.setdefault(tuple(vector), name)) != name:
            raise ValueError(f"the domains {first} and {name} have the same embedding, so that no router "
                             "tells them apart; embed other texts")


def mixture_of(names, kind, kv, domains, top_k, attention_top_k):
    """The Mixture of experts with these names, see `upcycle`. ValueError for settings without a meaning."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of mixture {shortened(kind)}; choose one of {', '.join(KINDS)}")
    if kv is not None and kind != "bam":
        raise ValueError(f"--kv {kv} goes with kind bam, not {kind}; leave it out")
    if (domains is not None) != (kind == "nexus"):
        raise ValueError("kind nexus needs the domains' embeddings; make them with merge.py embed, and give "
                         "them with --domains" if kind == "nexus" else
                         f"the domains' embeddings go with kind nexus, not {kind}; leave them out")
    size = None
    for name in names if domains is not None else []:
        if name not in domains:
            raise ValueError(f"no embedding of the domain {name}; the embeddings are of {', '.join(domains)}")
        size = len(checked_vector(name, domains[name], size))
    refuse_alike({name: domains[name] for name in names if domains is not None})
    shared = kind in ("nexus", "linear")
    if not shared and SEED in names:
        raise ValueError(f"an expert is named {SEED}, as the seed model's own; give it another name")
    return Mixture([*names] if shared else [*names, SEED], "nexus" if kind == "nexus" else "linear", top_k,
                   shared, (kv or "own") if kind == "bam" else None, attention_top_k, size)


def upcycle(experts, seed_model, out, kind, kv=None, domains=None, top_k=1, attention_top_k=0, seed=0,
            dtype=None, embedder=None):
    """Make the new folder `out`, a mixture of the experts {name: folder} and the seed; returns its Path.

    kv: of bam, whether each attention expert has its "own" keys and values (None too), or they are "shared".
    domains: of nexus, {name: embedding, a list of numbers}; further names are not used. seed: of the routers.
    dtype: one of OUTPUT_DTYPES; None keeps that of each tensor in the seed's folder. embedder: of
    merge_embed.py, what made the embeddings, to be kept. Raises ValueError, before any work, for models that
    do not fit together and settings without a meaning.
    """
    out = Path(out)
    mixture = mixture_of(experts, kind, kv, domains, top_k, attention_top_k)
    refuse_place(out, dtype)
    first, sources = Source(seed_model), [Source(folder) for folder in experts.values()]
    refuse_unlike([first, *sources])
    inputs, sources = [first, *sources], sources if mixture.shared else [*sources, first]
    config, header = replace(first.config, mixture=mixture), first.header
    generator, weights = torch.Generator().manual_seed(seed), [1 / len(sources)] * len(sources)
    plan, codes = {}, {}
    for name, shape in shapes_of(config).items():
        dense = dense_name(name)
        code = header.get(dense, header["model.embed_tokens.weight"])[1]
        codes[name] = OUTPUT_DTYPES[dtype] if dtype else code
        if name == "model.domains":
            plan[name] = partial(torch.tensor, [domains[expert] for expert in experts], dtype=torch.float32)
        elif dense not in header:
            plan[name] = partial(initial_value, config, name, shape, generator)
        elif "mlp.shared." in name:
            plan[name] = [([first.places[dense]], [1.0])]
        elif len(shape) > len(header[dense][2]):
            plan[name] = [([source.places[dense]], [1.0]) for source in sources]
        else:
            plan[name] = [([source.places[name] for source in sources], weights)]
    about = {"upcycle": {"kind": kind, "experts": {name: str(folder) for name, folder in experts.items()},
                         "seed_model": str(seed_model), "mixture": asdict(mixture), "seed": seed}}
    return build(out, inputs, config, plan, codes, about, embedder)


def extend(moe, new, out, name, vector=None, seed=0, embedder=None):
    """Make the new folder `out`, the mixture `moe` with the dense model `new` as one more expert `name`;
    returns its Path.

    With n experts before and l = 1 / (n + 1), what is neither expert, shared nor router becomes
    (1 - l) moe + l new (arXiv 2408.15901, section 3). Nexus' routers stay, and project the new domain's
    embedding, which `embedder` made: `vector`, or a function that returns it. Linear routers are drawn anew
    from the seed. Raises ValueError as `upcycle` does, and if another model made the other embeddings.
    """
    out = Path(out)
    refuse_place(out)
    refuse_other_embedder(moe, embedder or {})
    moe, new = Source(moe, mixture=True), Source(new)
    mixture, n = moe.config.mixture, len(moe.config.mixture.experts)
    if name in mixture.experts:
        raise ValueError(f"{moe.folder} has an expert named {name} already; give another name")
    if (vector is None) == (mixture.router == "nexus"):
        raise ValueError(f"the router of {moe.folder} is {mixture.router}, which "
                         f"{'needs an' if vector is None else 'takes no'} embedding of the domain {name}")
    refuse_unlike([moe, new])
    if vector is not None:
        vector = checked_vector(name, vector() if callable(vector) else vector, mixture.domain_size)
        before = tensorfiles.read(moe.header, "model.domains")
        if not is_finite(before):
            raise ValueError(f"{moe.folder}: model.domains holds NaN or infinite values; mend that model")
        vectors = torch.cat((before, torch.tensor([vector], dtype=before.dtype)))
        refuse_alike(dict(zip([*mixture.experts, name], vectors.tolist())))
    config = replace(moe.config, mixture=replace(mixture, experts=[*mixture.experts, name]))
    # Not the numbers that the routers began with, if the seed is the same.
    generator, share, plan = torch.Generator().manual_seed(seed + n), 1 / (n + 1), {}
    for tensor, shape in shapes_of(config).items():
        dense, mine = dense_name(tensor), moe.places[tensor]
        if tensor == "model.domains":
            plan[tensor] = lambda: vectors
        elif dense not in new.header and shape != moe.header[tensor][2]:
            plan[tensor] = partial(initial_value, config, tensor, shape, generator)
        elif dense not in new.header or "mlp.shared." in tensor:
            plan[tensor] = [([mine], [1.0])]
        elif len(shape) > len(new.header[dense][2]):
            plan[tensor] = [([mine], [1.0]), ([new.places[dense]], [1.0])]
        else:
            plan[tensor] = [([mine, new.places[tensor]], [1 - share, share])]
    codes = {tensor: moe.header[tensor][1] for tensor in plan}
    about = {"extend": {"mixture": str(moe.folder), "name": name, "model": str(new.folder), "seed": seed}}
    return build(out, [moe, new], config, plan, codes, about)


def refuse_place(out, dtype=None):
    """ValueError for an output that exists, and for an unknown dtype."""
    if os.path.lexists(out):
        raise already_exists(out)
    if dtype not in (None, *OUTPUT_DTYPES):
        raise ValueError(f"unknown dtype {shortened(dtype)}; choose one of {', '.join(OUTPUT_DTYPES)}")


def shapes_of(config):
    """{tensor name: shape} of a language model."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in CohereForCausalLM(config).state_dict().items()}


def dense_name(name):
    """The name that an expert's tensor has in a dense model."""
    return name.replace("mlp.experts.", "mlp.").replace("mlp.shared.", "mlp.")


def build(out, sources, config, plan, codes, about, embedder=None):
    """Write the model folder `out`, whose other files are those of the first Source.

    plan: for each tensor a function that makes it, or its parts, one after the other, each a weighted sum:
    (places, weights). codes: {tensor name: safetensors dtype}. about: what merge.json says beside the inputs.
    """
    shapes, first = shapes_of(config), sources[0].folder
    files = tensorfiles.assign_files({name: (codes[name], shapes[name]) for name in plan})
    along = files_along(first)
    size = sum(num_bytes(codes[name], shape) for name, shape in shapes.items())
    size += sum((first / name).stat().st_size for name in along)
    dtype = str(DTYPES[codes["model.embed_tokens.weight"]]).removeprefix("torch.")
    with output_folder(out, size) as made, Digests() as digests:
        of_source = {source: sorted({file for file, _, _ in source.header.values()}) for source in sources}
        digests.begin(sum(of_source.values(), []))
        outputs = tensorfiles.create(made, files)
        with command.progress(total=size, desc="build", unit="B", unit_scale=True) as bar, workers() as pool:
            for name, parts in plan.items():
                if callable(parts):
                    tensor = parts().to(DTYPES[codes[name]])
                    if not is_finite(tensor):
                        raise ValueError(f"{name}, as {tensor.dtype}, holds NaN or infinite values; choose a "
                                         "wider --dtype, or other embeddings")
                    write_piece(outputs[name], 0, tensor.flatten())
                else:
                    write_parts(name, outputs[name], parts, pool, bar)
        tensorfiles.seal(made, files)
        write_the_rest(first, along, made, config.published(dtype=dtype), None)
        if embedder:
            write_json(made / EMBEDDER, embedder)
        inputs = [{"folder": str(source.folder), "sha256": {file.name: digests[file] for file in of}}
                  for source, of in of_source.items()]
        versions = {"aya_min": __version__, "torch": torch.__version__}
        write_json(made / "merge.json", {**about, "inputs": inputs, "versions": versions})
    return out


def write_parts(name, place, parts, pool, bar):
    """Write a tensor of these parts, see `build`, piece by piece. ValueError if a value is not finite."""
    begin = 0
    for sources, weights in parts:
        inputs = [{name: source} for source in sources]

        def write(start, tensors):
            piece = weighted_sum(tensors, weights).to(DTYPES[place[1]])
            if not is_finite(piece):
                refuse_infinite(name, inputs, f"{name}, as {piece.dtype},")
            write_piece(place, begin + start, piece)
        for _ in over_pieces_of([name], inputs, pool, "cpu", bar)(write):
            pass
        begin += sources[0][3]
