"""Whether model folders belong together, judged by the meaning of config.json, the tokenizer and other files.

Nothing here knows how a model computes. Every key of a config.json is compared, except those of a list that
change nothing in the computation. Older and newer files write one meaning in several ways (rope_theta moved,
layer_types was a pattern, merges were strings); such files count as equal.
"""

import os
from pathlib import Path

from .families import FAMILIES
from .model_config import ModelConfig, layer_pattern, stop_ids
from .files import own_file, parse_json, parse_object, read_bytes, read_json, sha256

# ---- config.json -------------------------------------------------------------------------------------------

# Names, versions, dtypes, sampling defaults, and settings of training only. `is_neutral` adds the keys that
# begin with _, which are private to a library.
CHANGE_NOTHING = set("""
    name_or_path transformers_version torch_dtype dtype use_cache initializer_range initializer_factor
    auto_map custom_pipelines problem_type finetuning_task task_specific_params torchscript use_bfloat16
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores
    gradient_checkpointing attn_implementation pretraining_tp chunk_size_feed_forward cache_implementation
    tokenizer_class unsloth_fixed unsloth_version temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_beams num_beam_groups
    diversity_penalty num_return_sequences max_length min_length max_new_tokens do_sample early_stopping
    begin_suppress_tokens suppress_tokens remove_invalid_values exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id router_aux_loss_coef output_router_logits router_jitter_noise
    peft_type model_name bos_token tf_legacy_loss""".split())
# An absent one is off.
FLAGS_OFF = {"use_mrope", "is_decoder", "is_encoder_decoder", "add_cross_attention", "rope_interleaved",
             "use_sliding_window", "attention_bias", "mlp_bias", "qkv_bias", "use_bidirectional_attention"}
TRAINING_ONLY = ("dropout", "dropout_prob", "dropout_p", "pdrop", "layerdrop")         # endings of their keys
# Differences in these are reported, not refused. So are those of max_position_embeddings without scaled rope,
# where it is only a limit.
REPORTED = {"eos_token_id", "bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"}
# Compared only if both files have the key: the tensors show the value, or older files leave it out.
IF_BOTH = {"architectures", "layer_types", "model_type", "tie_word_embeddings", "vocab_size",
           "num_attention_heads", "num_key_value_heads"}
# Keys by which ModelConfig may refuse a model; without them it knows the defaults of the others.
NOT_OURS = ("attention_bias", "attention_dropout", "hidden_act", "hidden_activation", "mlp_bias",
            "rope_parameters", "rope_scaling")
# Keys that the fields of a ModelConfig say in other words.
SAID = ("rope_parameters", "use_sliding_window", "max_window_layers", "max_position_embeddings")
OLD_NAMES = {"CohereForSequenceClassification": "CohereRewardModel",
             "Cohere2ForSequenceClassification": "Cohere2RewardModel"}
PLAIN_ROPE = [("type", "default"), ("rope_type", "default")]
MOST_LAYERS = 10_000


def config_differences(folder, config, first, first_config):
    """The differences that change the computation, one text per key: "B: logit_scale is 0.5, in A 0.0625"."""
    one, two = meaning(first_config), meaning(config)
    return [f"{folder}: {key} is {shown(two.get(key))}, in {first} {shown(one.get(key))}"
            for key in different(one, two)]


def different(one, two):
    """The keys in which two results of `meaning` differ."""
    return [key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key) and not (
        key.rpartition(".")[2] in IF_BOTH and (key not in one or key not in two))]


def shown(value):
    """A value for a message, at most 80 characters."""
    text = "absent" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def meaning(config):
    """{key: value} of a config.json, of the keys that change the computation, with known defaults filled in.

    Keys of inner objects are joined with points. null counts as absent.
    """
    found, kind = flat(config), config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if not family or not few_layers(config):
        return found
    plain = {key: value for key, value in config.items()
             if key not in NOT_OURS} | {"rope_theta": found.get("rope_theta")}
    for given, said in ((config, SAID), (plain, ())):
        try:
            ours = vars(ModelConfig.from_published(given))
            break
        except ValueError:              # a model that our own class does not support can still be merged
            continue
    else:
        return found
    found = {key: value for key, value in found.items() if key not in ours and not key.startswith(said)}
    ours = {key: value for key, value in flat(ours).items() if key != "max_position_embeddings"}
    act, function = family.activation
    return {act: function} | found | ours


def few_layers(config):
    """Whether num_hidden_layers is absent or a whole number of at most MOST_LAYERS."""
    num = config.get("num_hidden_layers")
    return num is None or type(num) is int and 0 < num <= MOST_LAYERS


def flat(config, before=""):
    """`meaning` without the defaults of the model types that ModelConfig knows."""
    if config.get("use_sliding_window") is False:
        config = {key: value for key, value in config.items() if key not in ("sliding_window", "layer_types")}
    # A mixture's top_k is the number of its experts, elsewhere top_k is of sampling.
    config = {key: value for key, value in config.items()
              if value is not None and (before == "mixture." or not is_neutral(key, value))}
    if isinstance(names := config.get("architectures"), list):
        config["architectures"] = [OLD_NAMES.get(name, name) if isinstance(name, str) else name
                                   for name in names]
    given = [config.pop(key, None) for key in ("rope_scaling", "rope_parameters")]
    rope = next((part for part in given if part), {})
    if isinstance(rope, dict):
        theta, rope = rope.get("rope_theta", config.get("rope_theta")), plain_rope(rope)
        config |= {"rope_theta": theta} if theta is not None else {}
    config |= {"rope_parameters": rope} if rope else {}
    if not rope:
        config.pop("max_position_embeddings", None)
    heads, size = config.get("num_attention_heads"), config.get("hidden_size")
    if type(heads) is int and heads > 0:
        config.setdefault("num_key_value_heads", heads)
        if type(size) is int:
            config.setdefault("head_dim", size // heads)
    pattern = config.pop("sliding_window_pattern", config.pop("_sliding_window_pattern", None))
    if pattern is not None and "layer_types" not in config:
        num = config.get("num_hidden_layers")
        whole = type(num) is int and few_layers(config) and type(pattern) is int and pattern > 0
        pattern = layer_pattern(num, pattern) if whole else f"a sliding_window_pattern of {pattern}"
        config["layer_types"] = pattern
    kinds = config.get("layer_types") or []
    if not config.get("sliding_window") and all(kind == "full_attention" for kind in kinds):
        config.pop("layer_types", None)                     # the default without a window
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return found


def is_neutral(key, value):
    """Whether a key of config.json changes nothing in the computation."""
    private = key.startswith("_") and key != "_sliding_window_pattern"
    return (private or key in CHANGE_NOTHING | REPORTED or key.endswith(TRAINING_ONLY)
            or key in FLAGS_OFF and value in (False, 0))


def plain_rope(rope):
    """rope_scaling or rope_parameters without rope_theta; {} if rope is not scaled.

    The older key "type" becomes "rope_type".
    """
    found = {}
    for key, value in rope.items():
        if isinstance(value, dict):                         # one per layer type
            value = plain_rope(value) | {"rope_theta": value.get("rope_theta")}
        if value is not None and key != "rope_theta" and (key, value) not in PLAIN_ROPE:
            found["rope_type" if key == "type" else key] = value
    return found


# ---- the tokenizer -----------------------------------------------------------------------------------------

ID_FILES = ("vocab.json", "added_tokens.json")              # JSON {token: id}
LINE_FILES = ("merges.txt", "vocab.txt")
BINARY_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", *BINARY_FILES)
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
# Keys of tokenizer_config.json that change ids.
CHANGE_IDS = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case")
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
# Keys of tokenizer.json that are not compared. What post_processor adds around a plain text is only reported
# (`remarks`), as turns are written out here anyway.
NOT_OF_MEANING = ("version", "padding", "truncation", "post_processor")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")        # of an added token


def tokenizer_differences(folder, first):
    """The differences by which two tokenizers give other ids, one text per file.

    For example "B: tokenizer.json is not that of A (3 tokens only in A, such as 'x')".
    """
    have = [{name for name in VOCABULARIES if own_file(place, name)} for place in (first, folder)]
    if any(have) and not have[0] & have[1]:
        lacking, other = (folder, first) if have[0] else (first, folder)
        return [f"{lacking} has no {' or '.join(sorted(have[0] or have[1]))}, which {other} has; copy it "
                "if both models use it"]
    found = {name: how for name in ("tokenizer.json", *ID_FILES, *LINE_FILES, *BINARY_FILES, SETTINGS[0])
             if (how := file_difference(folder, first, name))}
    return [f"{folder}: {name} is not that of {first} ({how})" for name, how in found.items()]


def file_difference(folder, first, name):
    """How a tokenizer's file differs in two folders, in words.

    None if both files mean the same, or if a folder has none.
    """
    paths = [own_file(place, name) for place in (first, folder)]
    if None in paths:
        return None
    a, b = map(read_bytes, paths)
    if a == b:
        return None
    if name in BINARY_FILES:
        return "the bytes differ"
    if name in LINE_FILES:
        return lines_differ(*(lines_of(text) for text in (a, b)), first)
    if name == "tokenizer.json":
        return how_they_differ(*(tokenizer_of(text, path) for text, path in zip((a, b), paths)), first,
                               folder)
    one, two = (parse_object(text, path) for text, path in zip((a, b), paths))
    if name in ID_FILES:
        return ids_differ(one, two, first, folder)
    keys = [f"{key} is {two[key]}, in {first} {one[key]}" for key in CHANGE_IDS if key in one and key in two
            and one[key] != two[key]]
    both = [{part.get("content"): number for number, part in decoder.items() if isinstance(part, dict)}
            for about in (one, two) if isinstance(decoder := about.get("added_tokens_decoder"), dict)]
    if len(both) == 2:      # a program that saves again may list more of them; tokenizer.json has them all
        shared = both[0].keys() & both[1].keys()
        both = [{token: part[token] for token in shared} for part in both]
    how = ids_differ(*both, first, folder) if len(both) == 2 else None
    return "; ".join(filter(None, [*keys, how])) or None


def tokenizer_of(text, path):
    """tokenizer.json (a dict) as the tokenizers library reads and writes it, without NOT_OF_MEANING.

    A file that the library cannot read is returned as it is, and compared as JSON.
    """
    raw = parse_object(text, path)
    from tokenizers import Tokenizer    # takes 0.1 s, which equal files do not need
    try:
        read = Tokenizer.from_str(text.decode("utf-8-sig"))
        read.no_padding()
        read.no_truncation()
        raw = parse_json(read.to_str().encode(), path)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        pass                # a bare Exception, or Rust's PanicException, which is not an Exception
    if isinstance(model := raw.get("model"), dict):             # an absent affix is written as null or ""
        raw["model"] = {key: value for key, value in model.items() if key not in AFFIXES or value}
    return {key: value for key, value in raw.items() if key not in NOT_OF_MEANING}


def how_they_differ(a, b, first, folder):
    """How two results of `tokenizer_of` differ, in words; None if they do not."""
    if a == b:
        return None
    models = [each.get("model") if isinstance(each.get("model"), dict) else {} for each in (a, b)]
    added = [[token for token in each.get("added_tokens") or [] if isinstance(token, dict)]
             for each in (a, b)]
    ids = [vocabulary(model) | {token.get("content"): token.get("id") for token in tokens}
           for model, tokens in zip(models, added)]
    how = [ids_differ(*ids, first, folder)]
    scores = [model.get("vocab") if isinstance(model.get("vocab"), list) else None for model in models]
    if ids[0] == ids[1] and scores[0] != scores[1]:
        how.append("the scores of the tokens differ")
    how.append(lines_differ(*(model.get("merges") or [] for model in models), first, "merge"))
    one, two = ({token.get("content"): [token.get(flag) for flag in FLAGS] for token in tokens}
                for tokens in added)
    if changed := sorted(str(token) for token in one.keys() & two.keys() if one[token] != two[token]):
        how.append(f"{' '.join(FLAGS)} of {changed[0]!r} differ")
    if one.keys() != two.keys() and ids[0] == ids[1]:
        how.append(f"added tokens differ, such as {sorted(map(str, one.keys() ^ two.keys()))[0]!r}")
    model = sorted(key for key in models[0].keys() | models[1].keys() if key not in ("vocab", "merges")
                   and models[0].get(key) != models[1].get(key))
    rest = sorted(key for key in a.keys() | b.keys() if key not in ("model", "added_tokens")
                  and a.get(key) != b.get(key))
    how += [f"the {key} differs" for key in [f"model's {key}" for key in model] + rest]
    return "; ".join(filter(None, how)) or "they mean something else"


def vocabulary(model):
    """{token: id} of the "model" of a tokenizer.json."""
    vocab = model.get("vocab")
    if isinstance(vocab, list):         # Unigram: [token, score]
        return {part[0]: number for number, part in enumerate(vocab) if isinstance(part, list) and part
                and isinstance(part[0], str)}
    return dict(vocab) if isinstance(vocab, dict) else {}


def ids_differ(one, two, first, folder):
    """How two dicts {token: id} differ, in words; None if they do not."""
    how = []
    for place, mine, other in ((first, one, two), (folder, two, one)):
        if only := sorted((str(token) for token in mine.keys() - other.keys()),
                          key=lambda token: (len(token), token)):
            how.append(f"{len(only)} tokens only in {place}, such as {only[0]!r}")
    moved = sorted((str(one[token]).zfill(12), str(token)) for token in one.keys() & two.keys()
                   if str(one[token]) != str(two[token]))
    if moved:
        token = moved[0][1]
        how.append(f"ids of {len(moved)} tokens differ; the first is {token!r}, with {two.get(token)} and in "
                   f"{first} {one.get(token)}")
    return "; ".join(how) or None


def lines_of(text):
    """The lines of a vocabulary's or merges' file, without its version."""
    return [line for line in text.decode("utf-8", "replace").splitlines() if not line.startswith("#version")]


def lines_differ(one, two, first, what="line"):
    """How two lists differ, in words; None if they do not. what: the name of an item."""
    if one == two:
        return None
    at = next((i for i, pair in enumerate(zip(one, two)) if pair[0] != pair[1]), min(len(one), len(two)))
    return f"{len(two)} {what}s, in {first} {len(one)}; {what} {at + 1} is the first that differs"


# ---- differences that are reported, not refused ------------------------------------------------------------

def remarks(folder, config, first, first_config):
    """The differences that leave the computation as it is, as a list of at most one text.

    The output of a merge takes all of this from the first folder.
    """
    said = [key for key in sorted(REPORTED | {"max_position_embeddings"})
            if ids_of(config.get(key)) != ids_of(first_config.get(key))]
    said += ["layer_types"] * (("layer_types" in config) != ("layer_types" in first_config))
    said = [f"{key} of config.json" for key in said]
    one, two = (json_of(place, "generation_config.json", ("transformers_version", "_from_model_config"))
                for place in (first, folder))
    said += ["generation_config.json"] if one != two else []
    one, two = (chat_template(place) for place in (first, folder))
    said += ["the chat template"] if one != two else []
    one, two = (json_of(place, "tokenizer.json").get("post_processor") for place in (first, folder))
    said += ["what tokenizer.json adds around a text (post_processor)"] if one != two else []
    for name in SETTINGS:
        if own_file(first, name) and own_file(folder, name):
            one, two = (json_of(place, name, ("chat_template", "added_tokens_decoder", "name_or_path"))
                        for place in (first, folder))
            if keys := sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key)):
                said.append(f"{' '.join(keys[:6])}{' ...' if len(keys) > 6 else ''} of {name}")
    code = sorted(path.name for path in Path(first).glob("*.py") if own_file(folder, path.name))
    said += [name for name in code if read_bytes(own_file(first, name)) != read_bytes(own_file(folder, name))]
    return [f"{folder} differs from {first} in {', '.join(said)}; the latter's is taken"] if said else []


def ids_of(value):
    """A token id or a list of them as a sorted list; any other value as it is."""
    try:
        return stop_ids(value)
    except ValueError:
        return value


def json_of(folder, name, without=()):
    """The JSON object of a folder's file, without nulls and the given keys; {} if the file does not exist."""
    path = own_file(folder, name)
    found = read_json(path) if path else {}
    return {key: value for key, value in found.items() if key not in without and value is not None}


def chat_template(folder):
    """The chat template of a folder: chat_template.jinja's, else that of a JSON file; None without."""
    if path := own_file(folder, "chat_template.jinja"):
        return read_bytes(path).decode("utf-8", "replace").strip()
    names = ("chat_template.json", "tokenizer_config.json")
    template = next(filter(None, (json_of(folder, name).get("chat_template") for name in names)), None)
    if isinstance(template, list):      # several, by name
        named = {part["name"]: part.get("template") for part in template if isinstance(part, dict)
                 and "name" in part}
        template = named.get("default", template)
    return template.strip() if isinstance(template, str) else template


# ---- which model answers -----------------------------------------------------------------------------------

def identity(folder, header):
    """{path: a value that changes with the file} of the files that decide what a model answers.

    For files with weights it is [size in bytes, mtime in ns], for the small ones the SHA-256. header: see
    tensorfiles.read_header.
    """
    weights = sorted({file for file, _, _ in header.values()})
    names = ("config.json", "generation_config.json", "chat_template.jinja", *VOCABULARIES, *ID_FILES,
             *LINE_FILES, *SETTINGS)
    found = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in weights}
    return found | {str(path): sha256(path) for name in dict.fromkeys(names)
                    if (path := own_file(folder, name))}


# ---- files that are copied along ---------------------------------------------------------------------------

WEIGHTS = tuple("""
    .safetensors .bin .pt .pth .ckpt .h5 .hdf5 .msgpack .gguf .ggml .onnx .onnx_data .npz .npy .pkl .pickle
    .tflite .mlmodel .ot .distcp .nemo .llamafile .index.json""".split())
# Files that are written anew, or that describe other weights, another run or another merge.
NOT_ALONG = {"config.json", "adapter_config.json", "merge.json", "quantize.json", "search.json",
             "evaluations.jsonl", "metrics.jsonl", "eval.json", "done.json", "summary.json", "profile.json",
             "report.html", "report.md", "trainer_state.json"}


def files_along(folder):
    """The relative paths of the files of a model folder that are copied along with its weights.

    Files with weights, hidden ones, NOT_ALONG and subfolders that are models are left out. ValueError for a
    link out of the folder.
    """
    folder, found = Path(folder), []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders
                            if not name.startswith(".") and not is_model(Path(place) / name))
        for name in folders:
            if (Path(place) / name).is_symlink():
                raise ValueError(f"{Path(place) / name}: a link to a folder; if you trust it, put the folder "
                                 "itself there")
        for name in sorted(names):
            path = (Path(place) / name).relative_to(folder)
            if not name.startswith(".") and not name.lower().endswith(WEIGHTS) and str(path) not in NOT_ALONG:
                own_file(folder, path)
                found.append(path)
    return found


def is_model(folder):
    """Whether a subfolder is a model of its own, for example a trainer's checkpoint-500."""
    return (folder / "config.json").exists() and any(path.name.lower().endswith(WEIGHTS)
                                                     for path in folder.iterdir())
