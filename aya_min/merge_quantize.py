"""A model folder in fewer bits (quantization.py), layer by layer: at any time one layer's weights, or a piece
of one tensor, are in memory. The output is written in a scratch folder and published whole, as a merge is.

With a calibration text (GPTQ, SmoothQuant) its tokens run through each layer twice: once to see what its
linear layers read, and once with the quantized weights, to give what the next layer reads
(arXiv 2210.17323, section 4).

GPTQ holds a layer in fp32, the text's states, and a Hessian for each of the three inputs of its linear
layers; of the matrix at work only some outputs at a time. Of a model of 8B (hidden_size 4096,
intermediate_size 14336; 16,384 tokens) that is 0.9 + 0.3 + 1.0 GB. One such layer took 2.97 GB at its peak,
torch itself (0.3) and a tokenizer of 255,000 tokens (0.25) included.
"""

import os
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

import torch

from . import __version__, command, quantization, quantized, tensorfiles
from .alike import files_along
from .classifier import Classifier, SideNet
from .config import Reading
from .data import load_examples
from .files import Digests, write_json
from .merge_folders import already_exists, output_folder, write_the_rest
from .model import CohereForCausalLM, scaled, window_mask
from .quantization import PIECE, SCHEMES, Scheme
from .rope import growth, rotary
from .tensorfiles import DTYPES, num_bytes, read_piece, write_piece
from .weights import ONE, load_meta

MOST_PIECE = 512                # tokens of a calibration text that are read together
# The linear layers of a block that read the same input, and the norm that the input comes from.
READERS = {"parallel": [("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                             "mlp.gate_proj", "mlp.up_proj"])]}
READERS["sequence"] = [("input_layernorm", READERS["parallel"][0][1][:3]),
                       ("post_attention_layernorm", READERS["parallel"][0][1][3:])]
READERS["sandwich"] = [READERS["sequence"][0], ("pre_feedforward_layernorm", READERS["parallel"][0][1][3:])]
ALONE = [(None, ["self_attn.o_proj"]), (None, ["mlp.down_proj"])]


@dataclass
class Calibration:
    """The text of GPTQ and SmoothQuant. languages: equally many tokens of each of these; none: of each that
    the files have. tokens: of all together. reading: how the files are read."""
    files: list
    languages: list = field(default_factory=list)
    tokens: int = 16384
    reading: Reading = field(default_factory=lambda: Reading(too_long="skip"))


def quantize_folder(folder, out, scheme, *, method="rtn", smooth=None, calibration=None, head=False,
                    embedding=False, device="cpu", hashes=True, progress=True,
                    shard_bytes=tensorfiles.SHARD_BYTES):
    """Quantize the language model, classifier or SideNet in `folder` into the new folder `out`; returns its
    Path. Of the last two the heads stay whole.

    scheme: a name of quantization.SCHEMES, or a Scheme of the layout "rounded". method: "rtn" (round to
    nearest) or "gptq". smooth: SmoothQuant's alpha, or None. calibration: a Calibration, for gptq and smooth.
    head, embedding: quantize them, too; a head that is tied to the embedding becomes a matrix of its own.
    hashes: record the SHA-256 of the input. Raises ValueError, before any work, for what cannot be done.
    """
    folder, out = Path(folder), Path(out)
    scheme = scheme if isinstance(scheme, Scheme) else SCHEMES[scheme]
    if os.path.lexists(out):
        raise already_exists(out)
    check(folder, scheme, method, smooth, calibration, head, embedding)
    model, tokenizer, header = load_meta(folder)
    speaks = isinstance(model, CohereForCausalLM)
    known = isinstance(model, (CohereForCausalLM, Classifier, SideNet))
    if not known or model.config.mixture or model.stored:
        kind = "a mixture of experts" if model.config.mixture else (
            "a model that sees images" if model.stored else ONE[type(model)])
        raise ValueError(f"{folder}: {kind} is not quantized here; give a plain language model, a classifier "
                         "or a SideNet")
    if head and not speaks:
        raise ValueError(f"{folder}: --head is for language models, and this is {ONE[type(model)]}, "
                         "whose head stays as it is; leave it out")
    tied = speaks and model.config.tie_word_embeddings
    if embedding and tied and not head:
        raise ValueError(f"{folder}: the head is tied to the embedding; give --head too, or neither")
    work = Work(model, header, scheme, method, smooth, head, embedding, device)
    texts = read_calibration(calibration, tokenizer, model.config) if calibration else None
    specs = work.specs()
    files, along = tensorfiles.assign_files(specs, shard_bytes), files_along(folder)
    size = sum(num_bytes(*spec) for spec in specs.values())
    sources = sorted({file for file, _, _ in header.values()})
    with output_folder(out, size) as made, Digests() as digests:
        if hashes:
            digests.begin(sources)
        work.outputs = tensorfiles.create(made, files)
        with command.progress(total=len(work.inputs), desc="quantize", unit="tensor",
                              disable=not progress) as work.bar:
            if texts:
                work.by_layer(texts)
            else:
                for name in list(work.inputs):
                    work.whole(name)
        tensorfiles.seal(made, files)
        config = tensorfiles.read_config(folder)
        if scheme.layout != "rounded":
            config["quantization_config"] = quantized.published(scheme, head, embedding,
                                                                quantized.kept(config))
        write_the_rest(folder, along, made, config | ({"tie_word_embeddings": False} if head else {}), None)
        settings = {"scheme": scheme.name, "method": method, "smooth": smooth, "head": head,
                    "embedding": embedding, "calibration": calibration and asdict(calibration)}
        write_json(made / "quantize.json", {
            "config": settings, "tokens": {code: sum(map(len, some)) for code, some in (texts or {}).items()},
            "inputs": [{"folder": str(folder),
                        "sha256": {file.name: digests[file] if hashes else None for file in sources}}],
            "versions": {"aya_min": __version__, "torch": torch.__version__}})
    return out


def check(folder, scheme, method, smooth, calibration, head, embedding):
    """ValueError for settings that do not go together, or a folder that is quantized already."""
    raw = tensorfiles.read_config(folder)
    if raw.get("quantization_config"):
        raise ValueError(f"{folder} is quantized already; give the model that it was made of")
    needs = ["--method gptq"] * (method == "gptq") + ["--smooth"] * (smooth is not None)
    if needs and not calibration:
        raise ValueError(f"{needs[0]} needs a text to calibrate with; give --calibration F.jsonl")
    if calibration and not needs:
        raise ValueError("--calibration changes nothing of rounding to nearest; give --method gptq or "
                         "--smooth, or leave it out")
    if (head or embedding) and (scheme.layout != "pack-quantized"):
        only = " ".join(name for name, each in SCHEMES.items() if each.layout == "pack-quantized")
        raise ValueError(f"--head and --embedding go with {only}, not with {scheme.name}, whose layout keeps "
                         "them")


# ---- the text ----------------------------------------------------------------------------------------------

def read_calibration(calibration, tokenizer, config):
    """{language: [ids (T,), ...]}, tokens / languages of each. ValueError where a file has fewer."""
    limit = min(MOST_PIECE, config.max_position_embeddings)
    examples, found = load_examples(calibration.files, tokenizer, limit, calibration.reading), {}
    for example in examples:
        found.setdefault(example.language, []).append(torch.from_numpy(example.ids).long())
    languages = list(dict.fromkeys(calibration.languages)) or sorted(found)
    share = calibration.tokens // len(languages)
    if not share:
        raise ValueError(f"--calibration-tokens {calibration.tokens} are no token for each of "
                         f"{len(languages)} languages; give more")
    taken = {}
    for code in languages:
        texts, left = found.get(code, []), share
        if sum(map(len, texts)) < share:
            raise ValueError(f"{' '.join(calibration.files)}: the calibration text is too short: "
                             f"{sum(map(len, texts))} tokens of {code!r}, {share} are wanted; give more "
                             "text, or fewer --calibration-tokens")
        taken[code] = []
        for text in texts:
            if left:
                taken[code].append(text[:left])
                left -= len(taken[code][-1])
    return taken


# ---- the work ----------------------------------------------------------------------------------------------

class Work:
    """The tensors of a folder on their way into another.

    inputs: {name: place of tensorfiles.places}; outputs: the same of the new folder's; wanted: {name of a
    module: its shape} of those that are quantized.
    """

    def __init__(self, model, header, scheme, method, smooth, head, embedding, device):
        self.model, self.config, self.scheme, self.header = model, model.config, scheme, header
        self.method, self.smooth, self.device = method, smooth, torch.device(device)
        self.inputs, self.bar, self.outputs = tensorfiles.places(header), None, None
        self.wanted = {name: module.weight.shape for name, module in quantized.linears(model).items()}
        self.tied = head and model.config.tie_word_embeddings
        if head:
            self.wanted["lm_head"] = model.head_weight.shape
        if embedding:
            self.wanted["model.embed_tokens"] = model.model.embed_tokens.weight.shape

    def specs(self):
        """{tensor name: (dtype, shape)} of the new folder. The scales have the dtype that the weight had."""
        found = {}
        for name, (_, code, shape) in self.header.items():
            module = name.removesuffix(".weight")
            if module in self.wanted and name.endswith(".weight"):
                found |= quantization.specs_of(module, shape, self.scheme, code)
            else:
                found[name] = code, shape
        if self.tied:
            _, code, shape = self.header["model.embed_tokens.weight"]
            found |= quantization.specs_of("lm_head", shape, self.scheme, code)
        return found

    def dtype(self, name):
        """The dtype of a tensor, in which its scales are kept."""
        return DTYPES[self.inputs[name][1]] if self.scheme.layout != "bitsandbytes" else torch.float32

    def whole(self, name):
        """Copy or quantize one tensor, piece by piece."""
        place, module = self.inputs[name], name.removesuffix(".weight")
        N, K = place[3], 1
        targets = []
        if name.endswith(".weight"):
            targets = [module] * (module in self.wanted)
            targets += ["lm_head"] * (self.tied and name == "model.embed_tokens.weight")
        if targets:
            N, K = self.wanted[targets[0]]
        rows = max(1, PIECE // K)
        for start in range(0, N, rows):
            piece = read_piece(place, start * K, min(rows, N - start) * K)
            if module not in self.wanted or not targets:
                write_piece(self.outputs[name], start * K, piece)
            if targets:
                refuse_infinite(name, piece)
                rounded = quantization.round_to_nearest(piece.view(-1, K).to(self.device), self.scheme,
                                                        self.dtype(name))
                for target in targets:
                    self.put(target, start, *rounded)
        self.bar.update()

    def put(self, module, start, codes, scales):
        """Write the codes and scales of rows from `start` on."""
        N = self.wanted[module][0]
        found = quantization.tensors_of(module, codes.cpu(), scales.cpu(), self.scheme)
        of_all = quantization.specs_of(module, self.wanted[module], self.scheme, None)
        whole = quantization.fixed_tensors(module, self.wanted[module], self.scheme)
        for name, tensor in (found | whole).items():
            place = self.outputs[name]
            at = 0 if name in whole else start * (prod(of_all[name][1]) // N)
            write_piece(place, at, tensor.to(DTYPES[place[1]]).contiguous().flatten())

    # ---- with a text

    def tensor(self, name):
        _, _, shape = self.header[name]
        piece = read_piece(self.inputs[name], 0, self.inputs[name][3])
        refuse_infinite(name, piece)
        return piece.view(shape)

    @torch.no_grad()
    def by_layer(self, texts):
        """All tensors, those of a layer with what it reads of the text."""
        texts = [ids for some in texts.values() for ids in some]
        # mapped: only the rows are read
        matrix = tensorfiles.read(self.header, "model.embed_tokens.weight")
        states = [scaled(self.config, matrix[ids].float()).to(self.device) for ids in texts]    # (T, h) each
        del matrix
        for i, block in enumerate(self.model.model.layers):
            prefix = f"model.layers.{i}."
            block.to_empty(device=self.device)
            for name, target in block.state_dict().items():
                target.copy_(self.tensor(prefix + name))
            seen = self.look(i, block, states)
            self.layer(prefix, block, seen)
            for number, x in enumerate(self.run(i, block, states)):
                states[number] = x
            block.to("meta")
        for name in list(self.inputs):
            if not name.startswith("model.layers."):
                self.whole(name)

    def run(self, i, block, states):
        """What the layer makes of each text's states, one after the other."""
        config = self.config
        for x in states:
            positions = torch.arange(len(x), device=self.device)[None]
            theta = config.rope(i)
            angles = rotary(config, positions, theta) if theta else (None, None)
            mask = window_mask(config, len(x), self.device) if config.window(i) else None
            yield block(x[None], *angles, mask, None, growth(config, positions))[0]

    def readers(self, block):
        return [*READERS[block.kind], *ALONE]

    def look(self, i, block, states):
        """{the first of the linear layers with one input: (largest |x| (K,), sum x x^T (K, K) or None)}."""
        seen, hooks = {}, []

        def watch(name):
            def see(_, inputs):
                x = inputs[0].flatten(0, -2)                                # (T, K)
                largest, gram = seen.get(name, (x.new_zeros(x.shape[1]), None))
                if self.method == "gptq":
                    gram = x.new_zeros(x.shape[1], x.shape[1]) if gram is None else gram
                    gram.addmm_(x.t(), x)
                seen[name] = torch.maximum(largest, x.abs().amax(0)), gram
            return see

        for _, names in self.readers(block):
            hooks.append(block.get_submodule(names[0]).register_forward_pre_hook(watch(names[0])))
        for _ in self.run(i, block, states):
            pass
        for hook in hooks:
            hook.remove()
        return seen

    def smoothed(self, prefix, norm, weight, factors):
        """Divide the gains of a norm by factors (h,), and round them to the dtype in which they are written.
        Returns what they are then divided by."""
        plus = int(self.config.family.norm == "rms + 1")
        before = weight + plus
        weight.copy_((before / factors - plus).to(DTYPES[self.inputs[f"{prefix}{norm}.weight"][1]]))
        after = weight + plus
        return torch.where(after == 0, factors, before / after)

    def layer(self, prefix, block, seen):
        """Smooth, quantize and write the linear layers of a block, and leave in it what they stand for."""
        for norm, names in self.readers(block):
            largest, gram = seen.pop(names[0])
            layers = [block.get_submodule(name) for name in names]
            if self.smooth is not None and norm:
                weights = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0)
                factors = self.smoothed(prefix, norm, block.get_submodule(norm).weight,
                                        quantization.smoothing(largest, weights, self.smooth))
                for layer in layers:
                    layer.weight.mul_(factors)
                if gram is not None:
                    gram /= factors[:, None] * factors
            for name, layer in zip(names, layers):
                whole = prefix + name
                arguments = layer.weight, self.scheme, self.dtype(f"{whole}.weight")
                if self.method == "gptq":               # which overwrites the Hessian
                    own = gram if name == names[-1] else gram.clone()
                    rounded = quantization.gptq(layer.weight, own, *arguments[1:])
                else:
                    rounded = quantization.round_to_nearest(*arguments)
                self.put(whole, 0, *rounded)
                rows = max(1, PIECE // layer.weight.shape[1])
                for part, *its in zip(*(each.split(rows) for each in (layer.weight, *rounded))):
                    part.copy_(quantization.dequantize(*its, self.scheme))
                self.bar.update()
        for name, tensor in block.state_dict().items():
            if prefix + name.removesuffix(".weight") not in self.wanted:
                place = self.outputs[prefix + name]
                write_piece(place, 0, tensor.cpu().to(DTYPES[place[1]]).flatten())
                self.bar.update()


def refuse_infinite(name, piece):
    if not piece.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values; mend that model")
