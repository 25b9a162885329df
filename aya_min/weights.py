"""Model folders as transformers and vLLM read them: config.json, generation_config.json, tokenizer.json,
tokenizer_config.json and model.safetensors (or shards with model.safetensors.index.json).

No pickle is read and nothing outside the folder is opened. A source folder's other files that are not weights
are copied along. A folder is written under a temporary name and renamed, so an existing one is whole.
Parameters have the published names.

transformers has no class for a reward model of this family, so config.json names one of ours. transformers
loads the language model inside it by AutoModelForCausalLM.from_pretrained(FOLDER); the two heads are tensors
of the same files (tests/test_transformers.py computes the score this way):

    score = h_end @ score.weight[0] + score_logps.weight[0] @ (mean, min of the answer's log-probs)

where h_end is the last hidden state (after the norm) of the last token.
"""

import os
import re
from pathlib import Path

import torch

from . import distributed, quantized, tensorfiles
from .alike import files_along
from .checkpoint import others_in, replace_folder
from .classifier import Classifier, SideNet
from .families import FAMILIES, WRAPPERS
from .model_config import MIXTURE_OF, ModelConfig, stop_ids
from .encoder_decoder import EncoderDecoder
from .encoder_decoder_config import PUBLISHED, TASK, EncoderDecoderConfig
from .files import new_folder, own_file, read_bytes, read_json
from .model import CohereForCausalLM, RewardModel, Router, SequenceClassifier, initial_value
from .tokenizer import FILES, load_tokenizer
from .tokenizer_text import NO_BYTES, load_text_tokenizer

# transformers has no ForSequenceClassification of Cohere's two; older folders of ours are called so.
TASKS = {"ForCausalLM": CohereForCausalLM, "RewardModel": RewardModel,
         "ForSequenceClassification": SequenceClassifier, "Router": Router, "Classifier": Classifier,
         "SideNet": SideNet}
ARCHITECTURES = {family.class_named(task): RewardModel if family.block == "parallel" and
                 build is SequenceClassifier else build
                 for task, build in TASKS.items() for family in FAMILIES.values()}
ARCHITECTURES |= {f"Mixture{task}": build for task, build in TASKS.items()}
KINDS = {CohereForCausalLM: "language model", EncoderDecoder: "encoder-decoder", RewardModel: "reward model",
         SequenceClassifier: "reward model", Router: "router", Classifier: "classifier", SideNet: "SideNet"}
ONE = {build: f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for build, name in KINDS.items()}
SPEAKERS = CohereForCausalLM, EncoderDecoder        # what answers
FLOATS = "F32", "BF16", "F16", "F64"
USUAL_HEAD_LACKS = "score_logps.weight"         # a head on the last token only computes as if this were 0
# The tensors of a language model inside another model, by older and newer names.
WRAPPED = re.compile(r"(language_model\.model|model\.language_model)\.(?P<rest>.*)"
                     r"|(language_model\.)?(?P<head>lm_head\.)(?P<weight>weight)")
# A table that some published encoder-decoders hold for cross-attention, where none is added.
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
LAYER = re.compile(r"(?:model\.layers|(?:en|de)coder\.block)\.(\d{1,9})\.")

# The files that `save` writes anew instead of copying them.
WRITTEN = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", *FILES}


def name_of(folder):
    """The name of a model folder, or of the run folder that holds it."""
    path = Path(os.path.abspath(folder))
    return path.name if path.name != "model" else path.parent.name


def read_config(folder):
    """(ModelConfig, class of the model) of a model folder. ValueError if either is not supported."""
    path = Path(folder) / "config.json"
    whole = tensorfiles.read_config(folder)
    if quantized.read(whole, path):                         # what it says is of the tensors: `load_meta`
        del whole["quantization_config"]
    raw, named = text_part(whole, path)
    if raw.get("model_type") == "byt5" or raw.get("tokenizer_class") == "ByT5Tokenizer":
        raise ValueError(f"{path}: {NO_BYTES}")
    if isinstance(kind := raw.get("model_type"), str) and kind in PUBLISHED:
        wanted = PUBLISHED[kind] + TASK
        if named and named[0] != wanted:
            raise ValueError(f"{path}: architecture {named[0]!r:.80} is not supported; supported for "
                             f"model_type {kind}: {wanted}")
        return EncoderDecoderConfig.from_published(raw, where=str(path)), EncoderDecoder
    family = FAMILIES.get(str(raw.get("model_type")).removeprefix(MIXTURE_OF))
    plain = "Mixture" if raw.get("mixture") else family.published if family else raw.get("model_type")
    architecture = named[0] if named else f"{plain}ForCausalLM"             # transformers' default
    if architecture not in ARCHITECTURES:
        known = [name for name, build in ARCHITECTURES.items() if build is CohereForCausalLM]
        raise ValueError(f"{path}: architecture {architecture!r:.80} is not supported; supported: "
                         f"{' '.join(known)}, and the reward models, routers and classifiers of these "
                         "families")
    built, head = ARCHITECTURES[architecture], {}
    if built is SequenceClassifier and len(names := labels_of(raw, path)) > 1:
        built, head = Classifier, {"labels": names, "pooling": "last-token"}
    config_class = getattr(built, "config_class", ModelConfig)
    config = config_class.from_published(raw | head, where=str(path))
    if architecture not in map(config.class_named, TASKS):
        kind = "the key mixture" if config.mixture else f"model_type {config.model_type}"
        kind = "a config without the key mixture" if architecture.startswith("Mixture") else kind
        raise ValueError(f"{path}: architecture {architecture} does not go with {kind}; download the model "
                         "again")
    return config, built


def labels_of(raw, path):
    """The labels of a ForSequenceClassification, in the order of its head's rows: a reward model has one, a
    classifier more. raw: its config.json, at `path`."""
    named, num = raw.get("id2label"), raw.get("num_labels")
    if named is None or type(num) is int and num != len(named):     # transformers' defaults
        return [f"LABEL_{i}" for i in range(num if type(num) is int and num > 0 else 2)]
    numbers = [str(i) for i in range(len(named))] if isinstance(named, dict) else []
    if not numbers or sorted(named) != sorted(numbers):
        raise ValueError(f"{path}: id2label {named!r:.80} must name the labels 0, 1, ...; download the model "
                         "again")
    if len(named) > 1 and raw.get("problem_type") not in (None, "single_label_classification"):
        raise ValueError(f"{path}: problem_type {raw['problem_type']!r:.80} is not supported; supported: "
                         "single_label_classification")
    return [named[number] for number in numbers]


def text_part(raw, path):
    """(config.json of a language model, the names of its class) of a config.json. That of a model that sees
    images too (families.WRAPPERS) has it in its text_config."""
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ValueError(f"{path}: architectures {named!r:.80} is not a list of names; download the model "
                         "again")
    if not named or named[0] not in WRAPPERS:
        return raw, named
    text, kinds = raw.get("text_config"), WRAPPERS[named[0]]
    if not isinstance(text, dict) or text.get("model_type") not in kinds:
        raise ValueError(f"{path}: the text_config of {named[0]} must be of model_type {' or '.join(kinds)}")
    above = {key: raw[key] for key in ("quantization_config", "tie_word_embeddings", "eos_token_id")
             if raw.get(key) is not None}
    return above | text, None


def text_tensors(folder, header):
    """(header, {name: name in the files}) of the language model among the tensors of a model that sees images
    too (families.WRAPPERS); of another model the whole header and {}."""
    if not (tensorfiles.read_config(folder).get("architectures") or [""])[0] in WRAPPERS:
        return header, {}
    parts = {name: WRAPPED.fullmatch(name) for name in header}
    stored = {(match["head"] or "model.") + (match["rest"] or match["weight"]): name
              for name, match in parts.items() if match}
    others = len(header) - len(stored)
    distributed.say(f"{folder}: {others} tensors of images are left out; a model made of it is text alone")
    return {name: header[old] for name, old in stored.items()}, stored


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
    """The ids that end an answer according to generation_config.json or config.json, sorted."""
    named = read_generation(folder), tensorfiles.read_config(folder)
    config, _ = read_config(folder)                 # checks what config.json says
    found = [stop_ids(each["eos_token_id"]) for each in named if each.get("eos_token_id") is not None]
    return sorted({i for ids in found for i in ids if i < config.vocab_size})


def read_others(folder):
    """{relative path: bytes} of the files of a model folder that are copied along with its weights."""
    return {path: read_bytes(Path(folder) / path) for path in files_along(folder) if str(path) not in WRITTEN}


def check_packed(folder, model_class, config):
    """Refuse a quantized folder of a model that cannot be one. Returns what quantized.read says of it."""
    found = quantized.read(tensorfiles.read_config(folder), Path(folder) / "config.json")
    speaks = model_class is CohereForCausalLM
    if found and (model_class not in (CohereForCausalLM, Classifier, SideNet) or config.mixture
                  or found[1] and not speaks):
        raise ValueError(f"{folder}: quantized ({found[0].name}); only language models are read so, and "
                         "classifiers and SideNets but for their heads, and no mixtures of experts")
    if found and (found[1] or found[2]) and config.tie_word_embeddings and speaks:
        raise ValueError(f"{folder}: the head or the embedding is quantized, and config.json ties them; "
                         "quantize the model again")
    return found


def load_meta(folder, trunk=False, packed=False):
    """(model on the meta device, tokenizer, header of tensorfiles.read_header) of a model folder.

    No weights are read, except a head that a tied model stores beside its embeddings. ValueError if the
    folder's files do not fit together. trunk: what the model is although the folder may hold another on the
    same decoder: a function of its config, such as Router's, or True for a reward model. The header then
    lacks the head. packed: whether a quantized folder is taken; its linear layers stay packed
    (quantized.py), and nothing but answering can be done with them.
    """
    config, model_class = read_config(folder)
    scheme = check_packed(folder, model_class, config)
    if scheme and (trunk or not packed):
        raise ValueError(f"{folder} is quantized ({scheme[0].name}), which is for answering alone "
                         "(generate.py, evaluate quantized and early-exit); give the model that it was "
                         "made of")
    header, stored = text_tensors(folder, tensorfiles.read_header(folder))
    if model_class is EncoderDecoder:
        take_heads(folder, header, config)
    num_layers = 1 + max((int(match[1]) for match in map(LAYER.match, header) if match), default=-1)
    expected = max(config.num_hidden_layers, getattr(config, "num_layers", 0))          # of an encoder too
    expected = getattr(config, "sidenet_layer", expected)
    if expected > max(num_layers, 1):                       # checked before that many layers are built
        name = "num_hidden_layers"
        if model_class is EncoderDecoder:
            name = "num_layers" if config.num_layers == expected else "num_decoder_layers"
        elif model_class is SideNet:
            name = "sidenet_layer"
        raise ValueError(f"{folder}: the tensors do not fit config.json: they are of {num_layers} layers, "
                         f"{name} is {expected}")
    tokenizer = (load_text_tokenizer if model_class is EncoderDecoder else load_tokenizer)(folder)
    if max(tokenizer.vocab_size - 1, tokenizer.largest_id) >= config.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the largest id is "
                         f"{tokenizer.largest_id}, config.json has a vocabulary of {config.vocab_size}; "
                         "they belong to different models")
    tokenizer.stop_ids = sorted({*tokenizer.stop_ids, *read_stop_ids(folder)})
    if trunk and model_class is EncoderDecoder:
        raise ValueError(f"{folder}: an encoder-decoder, which has no decoder that stands alone; give a "
                         "language model of another family")
    if trunk and model_class is SideNet:
        raise ValueError(f"{folder}: a SideNet, which has only the first layers of its MainNet; give that")
    with torch.device("meta"):
        build = RewardModel if trunk is True else trunk or model_class
        found, model = model_class(config), build(config)
    model.packed = quantized.put_packed(model, *scheme) if scheme else {}
    if isinstance(model, SequenceClassifier) and model_class is not SequenceClassifier:
        model.config.pad_token_id = tokenizer.pad_id    # which is published, see write_descriptions
    own = (model if scheme else found).state_dict()
    packs = {name: spec for at, module in model.packed.items() for name, spec in module.specs(at).items()}
    alike = (model_class is EncoderDecoder or not config.tie_word_embeddings or stored
             or tensorfiles.drop_tied_head(header))
    problems = [] if alike else [
        "lm_head.weight is not model.embed_tokens.weight, to which config.json ties it"]
    names = own.keys() | packs.keys()
    problems += [f"{name} is missing" for name in sorted(names - header.keys() - {USUAL_HEAD_LACKS})]
    problems += [f"{name} is extra" for name in sorted(header.keys() - names)]
    problems += [f"{name} is {code} {shape}, its scheme says {(*packs[name],)}" for name, (_, code, shape) in
                 sorted(header.items()) if name in packs and not fits(code, shape, *packs[name])]
    for name in sorted(header.keys() & own.keys()):
        _, code, shape = header[name]
        if shape != tuple(own[name].shape):
            problems.append(f"{name} has shape {shape}, config.json says {tuple(own[name].shape)}")
        elif code not in FLOATS:
            problems.append(f"{name} is {code}, quantized weights are not read")
    problems += [f"{name} has shape {header[name][2]}, {ONE[type(model)]} made of it {tuple(t.shape)}"
                 for name, t in model.state_dict().items() if name in own and own[name].shape != t.shape]
    if problems:
        listed = tensorfiles.first_of(problems, "; ")
        raise ValueError(f"{folder}: the tensors do not fit config.json: {listed}")
    model.stored = stored
    return model, tokenizer, header


def take_heads(folder, header, config):
    """Set config.tie_word_embeddings of an encoder-decoder as its tensors say, and take from their header
    what repeats the embedding, or what no layer reads. ValueError for a repeated embedding that is another.

    As in transformers 5, a lm_head.weight that differs from the embedding is the head, whatever config.json
    says; an equal one is, if it says false."""
    header.pop(STRAY, None)
    if "shared.weight" not in header:
        raise ValueError(f"{folder}: shared.weight, the embedding, is missing; download the model again")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        if name in header and not tensorfiles.same_as(header, name, "shared.weight"):
            raise ValueError(f"{folder}: {name} is not shared.weight, which encoder and decoder share; "
                             "download the model again")
        header.pop(name, None)
    said = tensorfiles.read_config(folder).get("tie_word_embeddings")
    config.tie_word_embeddings = "lm_head.weight" not in header or (
        said is not False and tensorfiles.same_as(header, "lm_head.weight", "shared.weight"))
    if config.tie_word_embeddings:
        header.pop("lm_head.weight", None)


def fits(code, shape, wanted, wanted_shape):
    """Whether a packed tensor is what its scheme says; scales (None) are floating, a length None is any."""
    is_scale = wanted is None and code in FLOATS
    lengths = [num if one is None else one for one, num in zip(wanted_shape, shape)]
    return (code == wanted or is_scale) and list(shape) == lengths and len(shape) == len(wanted_shape)


@torch.no_grad()
def load(folder, device="cpu", dtype=torch.float32, sharded=False, compute_dtype=torch.float32, trunk=False,
         replicate=1, cpu_offload=False, packed=False):
    """(model, tokenizer) of a model folder, read tensor by tensor into the module that its config.json names.

    model.came_with keeps the folder's generation_config.json and other files for `save`, model.came_from its
    name for messages. sharded: the model is sharded first, by distributed.shard(model, compute_dtype,
    replicate, cpu_offload), and each rank reads and holds only its rows. trunk: see `load_meta`; a head that
    the folder lacks is drawn with seed 0. packed: see `load_meta`.
    """
    model, tokenizer, header = load_meta(folder, trunk, packed)
    if "cuda" in str(device) and any(module.scheme.outliers for module in model.packed.values()):
        raise ValueError(f"{folder}: llm-int8 is computed on a CPU only; quantize with --scheme w8a8 for a "
                         "GPU")
    model, stored = model.to(dtype), model.stored
    model.came_with, model.came_from = (read_generation(folder), read_others(folder)), str(folder)
    if sharded:
        distributed.shard(model, compute_dtype, replicate, cpu_offload)
    generator = torch.Generator().manual_seed(0)
    for name, target in model.to_empty(device=device).state_dict().items():
        local, rows = distributed.own_rows(target)
        if name in header:
            local.copy_(tensorfiles.read(header, name, rows, stored.get(name)))
        elif name == USUAL_HEAD_LACKS and "score.weight" in header:
            local.zero_()
        else:
            local.copy_(initial_value(model.config, name, target.shape, generator)[rows])
    for name, module in model.packed.items():
        found = {each: tensorfiles.read(header, each) for each in module.specs(name)}
        try:
            module.fill(name, found, dtype, device)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    return model, tokenizer


def save(folder, model, tokenizer, dtype=torch.float32, shard_bytes=tensorfiles.SHARD_BYTES):
    """Publish a plain or sharded model, tensor by tensor, with its tokenizer and what came with it.

    A collective: every rank calls it, rank 0 writes. An older version of the folder is replaced. ValueError
    for a quantized model, whose packed layers are no parameters.
    """
    if getattr(model, "packed", None):
        raise ValueError(f"{model.came_from} is quantized, and is copied, not saved; save the model that it "
                         "was made of")
    state = model.state_dict()
    specs = {name: (tensorfiles.CODES[dtype], tuple(tensor.shape)) for name, tensor in state.items()}
    files = tensorfiles.assign_files(specs, shard_bytes)
    tensors = (distributed.full(state[name]).to("cpu", dtype) for specs in files.values() for name in specs)

    def take_part():
        for _ in tensors:                       # gathering a tensor is a collective
            pass

    def write(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with new_folder(folder, replace_folder) as made:
                tensorfiles.write(made, files, tensors)
                write_descriptions(made, model, tokenizer, dtype)
        except (ValueError, OSError):
            take_part()
            raise

    if not distributed.is_main():
        take_part()
    distributed.from_main(lambda: write(Path(folder)))


def check_place(folder, model, tokenizer):
    """Refuse, before any work, a folder with other files, which `save` would refuse at the end."""
    ending = tokenizer.ending + tokenizer.after
    if isinstance(model, SequenceClassifier) and tokenizer.pad_id == ending[-1]:
        raise ValueError("the tokenizer's pad token is the one that ends a text, and transformers' "
                         "ForSequenceClassification looks before it; name another pad_token in "
                         "tokenizer_config.json, or take --head log-probs")
    specs = {name: ("F32", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    names = {*tensorfiles.assign_files(specs), "model.safetensors.index.json", "config.json", *WRITTEN,
             *map(str, getattr(model, "came_with", ({}, {}))[1])}
    if others := others_in(Path(folder), names):
        raise ValueError(f"{others[0]} is in the way of the model that is published at the end; move it "
                         "elsewhere")


def write_descriptions(folder, model, tokenizer, dtype):
    """Write all of a model folder but its weights: the configs, the tokenizer, the files of came_with."""
    is_reward = isinstance(model, SequenceClassifier)
    parallel = not isinstance(model, EncoderDecoder) and model.config.family.block == "parallel"
    task = "RewardModel" if is_reward and parallel else model.task
    usual = isinstance(model, Classifier) and model.config.pooling == "last-token" and not (
        parallel or model.config.mixture)
    task = "ForSequenceClassification" if usual else task
    config = model.config.published(task, str(dtype).removeprefix("torch."))
    if is_reward or isinstance(model, (Router, Classifier, SideNet)):
        config["tie_word_embeddings"] = True        # there is no lm_head
    if task == "ForSequenceClassification":
        names = config.pop("labels", ["LABEL_0"])
        config.pop("pooling", None)
        config |= {"id2label": {str(i): name for i, name in enumerate(names)},
                   "label2id": {name: i for i, name in enumerate(names)}, "pad_token_id": tokenizer.pad_id}
    generation, others = getattr(model, "came_with", ({}, {}))
    eos = generation.get("eos_token_id")
    stops = stop_ids([*tokenizer.stop_ids, *(stop_ids(eos) if eos is not None else [])])
    begins = {"decoder_start_token_id": model.config.decoder_start_token_id} if isinstance(
        model, EncoderDecoder) else {"bos_token_id": tokenizer.bos_id}
    generation = {**begins, "pad_token_id": tokenizer.pad_id, **generation,
                  "eos_token_id": stops if len(stops) > 1 else stops[0]}
    tensorfiles.write_json(folder / "config.json", config)
    tensorfiles.write_json(folder / "generation_config.json", generation)
    for path, data in others.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    tokenizer.save(folder)
