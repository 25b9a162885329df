"""The settings of a model, named as in the published config.json, and the sizes of some published models."""

import json
from dataclasses import InitVar, asdict, dataclass, fields
from typing import Optional, Union

from .command import describe, in_range
from .families import FAMILIES, ONLY, ONLY_PARALLEL, SCALINGS

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
         "head_dim", "max_position_embeddings", "query_pre_attn_scalar")
ABOVE_0 = ("layer_norm_eps", "rms_norm_eps", "rope_theta", "rope_local_base_freq", "attn_logit_softcapping",
           "final_logit_softcapping", "logit_scale", "initializer_range")
INTERVALS = {**dict.fromkeys(SIZES, (int, "[1, 2147483648)")), "num_hidden_layers": (int, "[1, 100000)"),
             **dict.fromkeys(ABOVE_0, (float, "(0, inf)"))}
# Fields whose null is a value of its own. Of others null means the family's default, as an absent key does.
NULLABLE = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
# Fields that every family has, beside those with a default of its own.
EVERYWHERE = {"model_type", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling",
              "initializer_range", "pad_token_id", "bos_token_id", "mixture"}
KINDS = ("sliding_attention", "full_attention")
# What stands before the seed's model_type in a mixture's config.json. By the plain name transformers (5.24)
# would load the folder as a dense model, with a warning and random MLPs.
MIXTURE_OF = "mixture_of_"


@dataclass
class Mixture:
    """What a mixture of experts (moe.py) has beside its seed's config: the "mixture" of its config.json.

    attention: experts of the attention too (BAM), with keys and values of their "own" or "shared" ones.
    """
    experts: list                               # their names
    router: str = "linear"                      # or "nexus", which projects domain embeddings
    top_k: int = 1                              # experts of the MLP that a token is sent to
    shared: bool = False                        # the seed's MLP is added for every token
    attention: Optional[str] = None
    attention_top_k: int = 0                    # experts of the attention that count for a token; 0: all
    domain_size: Optional[int] = None           # numbers in a domain's embedding, of nexus only

    def __post_init__(self):
        """Refuse a value of a wrong type or outside its range."""
        names, E = self.experts, len(self.experts) if isinstance(self.experts, list) else 0
        if not (E and all(isinstance(name, str) and name for name in names) and len(set(names)) == E):
            raise ValueError(f"mixture: experts {names!r:.80} must be a list of names, each once")
        for name, known in (("router", ("linear", "nexus")), ("attention", (None, "own", "shared")),
                            ("shared", (True, False))):
            value = getattr(self, name)
            if not any(type(value) is type(right) and value == right for right in known):
                raise ValueError(f"mixture: {name} {value!r:.80} must be one of "
                                 f"{' '.join(json.dumps(value) for value in known)}")
        if self.attention is None and self.attention_top_k != 0:
            raise ValueError(f"mixture: attention_top_k {self.attention_top_k!r:.80} goes with attention own "
                             "or shared; leave it out")
        sizes = {"top_k": f"[1, {E}]", "attention_top_k": f"[0, {E}]"}
        sizes |= {"domain_size": "[1, 2147483648)"} if self.router == "nexus" else {}
        for name, interval in sizes.items():
            value = getattr(self, name)
            if not (type(value) is int and in_range(value, interval)):
                of = f"; there are {E} experts" if "top_k" in name else ""
                raise ValueError(f"mixture: {name} {value!r:.80} must be {describe(int, interval)}{of}")
        if self.router != "nexus" and self.domain_size is not None:
            raise ValueError(f"mixture: domain_size {self.domain_size!r:.80} goes with router nexus, not "
                             f"{self.router}")

    @classmethod
    def from_published(cls, raw):
        """A Mixture from the "mixture" of a config.json. ValueError for a key or value that is wrong."""
        if isinstance(raw, cls):
            return raw
        if not isinstance(raw, dict):
            raise ValueError(f"mixture {raw!r:.80} must be an object")
        if unknown := sorted(map(str, raw.keys() - {f.name for f in fields(cls)})):
            raise ValueError(f"mixture: unknown key {' '.join(unknown):.80}; known: "
                             f"{' '.join(f.name for f in fields(cls))}")
        if "experts" not in raw:
            raise ValueError("mixture: experts, the list of their names, is missing")
        return cls(**raw)


@dataclass
class ModelConfig:
    """A decoder as its config.json describes it: a row of families.FAMILIES, and its sizes.

    Defaults are those of the family in transformers (5.24). A field that the family does not have is None.
    """
    model_type: str = "cohere"
    vocab_size: Optional[int] = None
    hidden_size: Optional[int] = None
    intermediate_size: Optional[int] = None
    num_hidden_layers: Optional[int] = None
    num_attention_heads: Optional[int] = None
    num_key_value_heads: Optional[int] = None   # else num_attention_heads
    head_dim: Optional[int] = None              # else hidden_size / num_attention_heads
    max_position_embeddings: Optional[int] = None
    layer_norm_eps: Optional[float] = None
    rms_norm_eps: Optional[float] = None
    rope_theta: Optional[float] = None
    rope_scaling: Optional[dict] = None         # {"rope_type", ...} of families.SCALINGS
    rope_local_base_freq: Optional[float] = None    # rope_theta of gemma3's sliding layers
    sliding_window: Optional[int] = ...         # tokens that a sliding layer sees
    layer_types: Optional[list] = None          # "sliding_attention" or "full_attention" per layer
    query_pre_attn_scalar: Optional[int] = None     # the softmax scale is this^-1/2; None: head_dim^-1/2
    attn_logit_softcapping: Optional[float] = ...
    final_logit_softcapping: Optional[float] = ...
    logit_scale: Optional[float] = None         # 1 where the family has none
    initializer_range: float = 0.02
    use_qk_norm: Optional[bool] = None
    tie_word_embeddings: Optional[bool] = None
    pad_token_id: Optional[int] = None
    bos_token_id: Optional[int] = None
    eos_token_id: Union[int, list, None] = None     # a sorted list if there are several
    mixture: Optional[Mixture] = None           # of a mixture of experts
    sliding_window_pattern: InitVar[int] = None     # older form of layer_types: every n-th layer is full

    def __post_init__(self, sliding_window_pattern):
        if not isinstance(self.model_type, str):
            raise ValueError(f"model_type {self.model_type!r:.80} must be a name")
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type {self.model_type!r} is not supported; supported: "
                             f"{' '.join(FAMILIES)}")
        defaults = self.family.defaults
        for f in fields(self):
            value = getattr(self, f.name)
            if value is ... or value is None and f.name not in NULLABLE:
                setattr(self, f.name, defaults.get(f.name))
        if self.mixture is not None:
            self.mixture = Mixture.from_published(self.mixture)
        self.check_types()
        self.logit_scale = self.logit_scale or 1.0
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary embeddings turn pairs")
        if self.eos_token_id is not None:
            ids = stop_ids(self.eos_token_id)
            self.eos_token_id = ids if len(ids) > 1 else ids[0]
        if self.use_qk_norm and self.family.qk_norm != "asked":
            raise ValueError(f"use_qk_norm is not known in {self.model_type}, only in cohere")
        pattern = sliding_window_pattern
        self.set_layers(defaults.get("sliding_window_pattern") if pattern is None else pattern)

    def check_types(self):
        """Refuse a field of a wrong type or outside its interval; ints for floats become floats."""
        given = {name: getattr(self, name) for name in INTERVALS if getattr(self, name) is not None}
        wrong = [name for name, value in given.items() if not (
            type(value) in (int, INTERVALS[name][0]) and in_range(value, INTERVALS[name][1]))]
        if wrong:
            named = ", ".join(f"{name} {given[name]!r:.80}" for name in wrong)
            raise ValueError(f"{named}: must be {', '.join(describe(*INTERVALS[name]) for name in wrong)}")
        for name, value in given.items():
            setattr(self, name, INTERVALS[name][0](value))          # transformers refuses 1 for 1.0
        for name in ("use_qk_norm", "tie_word_embeddings"):
            if type(getattr(self, name)) not in (bool, type(self.family.defaults.get(name))):
                raise ValueError(f"{name} {getattr(self, name)!r:.80} must be true or false")
        for name in ("pad_token_id", "bos_token_id"):
            if type(getattr(self, name)) not in (int, type(None)):
                raise ValueError(f"{name} {getattr(self, name)!r:.80} must be a token's number")
        if self.rope_scaling is not None:
            self.rope_scaling = checked_scaling(self.rope_scaling, self)

    def set_layers(self, pattern):
        """Fill in layer_types, and refuse a wrong one or a wrong sliding_window."""
        windows, num = self.family.windows, self.num_hidden_layers
        if windows == "never":
            self.sliding_window = self.layer_types = None
            return
        if windows == "all":
            self.layer_types = [KINDS[self.sliding_window is None]] * num
        if self.layer_types is None:
            self.layer_types = [KINDS[1]] * num if windows == "late" else layer_pattern(num, pattern)
        kinds = self.layer_types
        if not (isinstance(kinds, list) and len(kinds) == num and all(kind in KINDS for kind in kinds)):
            raise ValueError(f"layer_types {kinds!r:.80} must be sliding_attention or full_attention for "
                             f"each of {num} layers")
        whole = type(self.sliding_window) is int and self.sliding_window > 0
        if "sliding_attention" in kinds and not whole:
            raise ValueError(f"sliding_window {self.sliding_window!r} must be a whole number above 0")

    @property
    def family(self):
        """The row of families.FAMILIES."""
        return FAMILIES[self.model_type]

    def class_named(self, task):
        """The name of the class that a config.json says, such as LlamaForCausalLM or MixtureForCausalLM."""
        return f"Mixture{task}" if self.mixture else self.family.class_named(task)

    @property
    def num_heads(self):
        """(heads of queries, heads of keys and values) of a layer, over all experts of its attention."""
        experts = len(self.mixture.experts) if self.mixture and self.mixture.attention else 1
        own = experts if self.mixture and self.mixture.attention == "own" else 1
        return experts * self.num_attention_heads, own * self.num_key_value_heads

    @property
    def key_width(self):
        """Numbers in the keys of a token, and in its values, in a layer."""
        return self.num_heads[1] * self.head_dim

    @property
    def norm_eps(self):
        return self.layer_norm_eps or self.rms_norm_eps

    @property
    def has_qk_norm(self):
        return self.family.qk_norm == "head" or bool(self.use_qk_norm)

    @property
    def softmax_scale(self):
        """What scores are multiplied by."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    def window(self, i):
        """The number of tokens that a token attends to in layer i, itself included; None: all before it."""
        slides = self.layer_types and self.layer_types[i] == "sliding_attention"
        return self.sliding_window if slides else None

    def rope(self, i):
        """The field with the theta by which layer i rotates its queries and keys; None: it does not."""
        slides = self.window(i) is not None
        if slides and self.rope_local_base_freq:
            return "rope_local_base_freq"
        return "rope_theta" if slides or self.family.rotates == "all" else None

    @property
    def ropes(self):
        """The different rope(i) of all layers."""
        return {self.rope(i) for i in range(self.num_hidden_layers)} - {None}

    @classmethod
    def of(cls, config, **own):
        """The config on the decoder of `config`, whose head may be another. own: the fields of the head."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(ModelConfig)}, **own)

    @classmethod
    def from_published(cls, raw, where="config.json"):
        """A ModelConfig from a published config.json (a dict), whichever key holds rope_theta.

        ValueError, with `where` as the file's name, for a value that is wrong or not supported.
        """
        kind = "cohere" if raw.get("model_type") is None else raw["model_type"]
        if isinstance(kind, str) and raw.get("mixture") is not None:
            kind = kind.removeprefix(MIXTURE_OF)
        family = FAMILIES.get(kind) if isinstance(kind, str) else None
        try:
            if not family:
                return cls(model_type=kind)                 # which says what is supported
            refuse_others(raw, family)
            names = own_fields(family) | {f.name for f in fields(cls)} - {f.name for f in fields(ModelConfig)}
            names -= {"rope_theta", "rope_scaling", "rope_local_base_freq", "model_type"}
            given = {"model_type": kind} | {k: raw[k] for k in names - NULLABLE if raw.get(k) is not None}
            given |= {k: raw[k] for k in names & NULLABLE if k in raw}
            if family.windows == "late":
                given |= late_windows(raw, given, family)
            return cls(**given | rope_of(raw, family))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None

    def published(self, task="ForCausalLM", dtype="float32"):
        """The config.json to publish (a dict): the fields, and keys that old or new transformers read."""
        names, num = own_fields(self.family), self.num_hidden_layers
        own = {k: v for k, v in asdict(self).items() if v is not None and (
            k in names or k not in ModelConfig.__dataclass_fields__) or k in names & NULLABLE}
        patterns = [p for p in range(1, num + 2) if layer_pattern(num, p) == self.layer_types]
        is_read = "sliding_window_pattern" not in dict(self.family.only)
        if patterns and is_read and self.family.windows == "pattern":
            own["sliding_window_pattern"] = patterns[0]         # all that transformers 4.48-4.52 read
        if self.family.windows == "late":
            slides = "sliding_attention" in self.layer_types
            first = self.layer_types.index("sliding_attention") if slides else num
            own |= {"use_sliding_window": slides, "max_window_layers": first}
        plain = {"rope_theta": self.rope_theta, "rope_type": "default"}
        rope = plain | (self.rope_scaling or {})
        if self.rope_local_base_freq:
            local = plain | {"rope_theta": self.rope_local_base_freq}
            rope = {"full_attention": rope, "sliding_attention": local}
        if self.mixture:
            own["model_type"] = MIXTURE_OF + self.model_type
        name, act = self.family.activation
        return {"architectures": [self.class_named(task)], **own, "attention_bias": False,
                "attention_dropout": 0.0, name: act, "rope_parameters": rope, "use_cache": True,
                "dtype": dtype, "torch_dtype": dtype}


@dataclass
class RewardConfig(ModelConfig):
    """A decoder's config with what its reward model reads. critiques: whether it was trained with critiques
    beside the answers (critiques.py), which it then needs."""
    critiques: Optional[bool] = None

    def __post_init__(self, sliding_window_pattern):
        super().__post_init__(sliding_window_pattern)
        if self.critiques is not None and type(self.critiques) is not bool:
            raise ValueError(f"critiques {self.critiques!r:.80} must be true or false")
        self.critiques = self.critiques or None

    @classmethod
    def on(cls, config):
        """The config itself, or this class's on the decoder of another."""
        return config if isinstance(config, cls) else cls.of(config)


# ---- how a config.json says it -----------------------------------------------------------------------------

def own_fields(family):
    """The fields that a family's config.json has."""
    return EVERYWHERE | family.defaults.keys() | ({"layer_types"} if family.windows in ("pattern", "late")
                                                  else set())


def refuse_others(raw, family):
    """Refuse a key of families.ONLY with another value."""
    only = ONLY | dict(family.only) | (ONLY_PARALLEL if family.block == "parallel" else {})
    act, value = family.activation
    for name, value in {**only, act: value}.items():
        if raw.get(name) is None and name != act or raw.get(name, value) == value:
            continue
        raise ValueError(f"{name} {raw[name]!r:.80} is not supported; supported: {value}")


def late_windows(raw, given, family):
    """qwen2 and qwen3: layer_types from max_window_layers on, if use_sliding_window; else no window."""
    slides, first = raw.get("use_sliding_window") or False, raw.get("max_window_layers")
    first = 28 if first is None else first          # transformers' default
    if type(slides) is not bool or type(first) is not int:
        raise ValueError(f"use_sliding_window {slides!r:.80} must be true or false, max_window_layers "
                         f"{first!r:.80} a whole number")
    window = given.get("sliding_window", family.defaults["sliding_window"]) if slides else None
    num = given.get("num_hidden_layers", family.defaults["num_hidden_layers"])
    if "layer_types" in given or window is None or type(num) is not int or num > 100_000:
        return {"sliding_window": window}
    return {"sliding_window": window, "layer_types": [KINDS[i < first] for i in range(num)]}


def rope_of(raw, family):
    """{field: value} of the rope of a config.json: theta and scaling may stand in rope_parameters, where
    newer files keep them, or in rope_scaling; gemma3's rope_parameters have a part for each layer type.

    ValueError for rope that is partial, of an unknown kind, or set for each layer type elsewhere.
    """
    scaling, rope, found = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}, {}
    two = "rope_local_base_freq" in family.defaults
    if two and isinstance(rope, dict) and isinstance(scaling, dict):
        local = rope.get("sliding_attention") or {}
        scaling = {**(rope.get("full_attention") or {}), **scaling}
        if rope.keys() - set(KINDS) or local.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters {rope!r:.80}: scaled rope of sliding layers is not supported")
        found["rope_local_base_freq"] = local.get("rope_theta") or raw.get("rope_local_base_freq")
    rope = scaling or ({} if two else rope)
    if isinstance(rope, dict) and rope and all(isinstance(part, dict) for part in rope.values()):
        raise ValueError("rope_parameters for each layer type are not supported, nor is scaled rope")
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling or rope_parameters {rope!r:.80}: scaled rope is not supported")
    plain, theta = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}, "rope_theta"
    if family.grows:            # its default is a whole rope_parameters, with a key that nothing reads
        plain["max_position_embeddings"] = rope.get("max_position_embeddings")
    found[theta] = rope.get(theta) or (raw.get(theta) if rope or not family.grows else None)
    more = {key: value for key, value in rope.items()
            if key != theta and value is not None and value != plain.get(key)}
    if more or rope and family.grows:
        kind = more.pop("rope_type", None) or more.get("type")
        more.pop("type", None)
        found["rope_scaling"] = {"rope_type": kind, **more}
    return found


def checked_scaling(rope, config):
    """A rope_scaling whose keys are those of families.SCALINGS, floats as floats. ValueError if not."""
    kind, family = rope.get("rope_type"), config.family
    keys = SCALINGS.get(kind) if isinstance(kind, str) and kind in family.scalings else None
    if keys is None:
        known = f"only {' '.join(family.scalings)}" if family.scalings else "it is not known in this family"
        raise ValueError(f"rope_scaling or rope_parameters {rope!r:.80}: scaled rope is not supported, "
                         f"{known}")
    if family.grows:
        keys = keys | {"llama_4_scaling_beta": (float, "[0, inf)", False)}
    given = {key: value for key, value in rope.items() if key != "rope_type"}
    wrong = sorted(given.keys() - keys.keys()) + [key for key, (type_, interval, _) in keys.items()
        if key in given and not (type(given[key]) in ({bool} if type_ is bool else {int, type_})
                                 and (type_ is bool or in_range(given[key], interval)))]
    missing = [key for key, (_, _, optional) in keys.items() if not optional and key not in given]
    if wrong or missing:
        raise ValueError(f"rope_scaling or rope_parameters {rope!r:.80}: scaled rope is not supported with "
                         f"{' '.join(wrong) or 'no ' + ' '.join(missing)}; keys of {kind}: "
                         f"{' '.join(keys)}")
    if "original_max_position_embeddings" in keys:
        given.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ValueError(f"rope_scaling {rope!r:.80}: low_freq_factor must be below high_freq_factor")
    return {"rope_type": kind, **{key: keys[key][0](value) for key, value in given.items()}}


def layer_pattern(num_layers, every):
    """The layer_types of num_layers layers in which every `every`-th is full."""
    if type(every) is not int or every < 1:
        raise ValueError(f"sliding_window_pattern {every!r} must be a whole number above 0")
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)]


def stop_ids(eos_token_id, name="eos_token_id"):
    """The ids that end an answer, as a sorted list, from the eos_token_id of config.json: an id or a list."""
    ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{name} {eos_token_id!r:.80} must be a token's number or a list of them")
    return sorted(set(ids))


# Presets have the sizes of the published config.json. Some values were read in independent ports instead: of
# command-r7b and tiny-aya rope_theta, logit_scale and max_position_embeddings, and tiny-aya's token ids.
# smoke, tiny and small are our own, for the embedded world.
_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
           num_key_value_heads=8)
# eos_token_id is <|END_OF_TURN_TOKEN|> of our own tokenizers
_SMALL = dict(rope_theta=1e4, logit_scale=1.0, max_position_embeddings=1024, eos_token_id=9)
MODEL_PRESETS = {
    "smoke": dict(_SMALL, initializer_range=0.08, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=2, vocab_size=1024),
    "tiny": dict(_SMALL, initializer_range=0.08, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                 num_attention_heads=3, vocab_size=6144),
    "small": dict(_SMALL, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                  num_attention_heads=12, num_key_value_heads=4, vocab_size=16384),
    "aya-expanse-8b": dict(_8B, rope_theta=1e4, logit_scale=0.125),
    "aya-expanse-32b": dict(intermediate_size=24576, num_key_value_heads=8, rope_theta=4e6),
    "aya-23-8b": dict(_8B, rope_theta=1e4),
    "aya-23-35b": dict(rope_theta=8e6),         # the sizes of Command R v01, which are the defaults
    "command-r7b": dict(_8B, model_type="cohere2", rope_theta=5e4, logit_scale=0.25,
                        max_position_embeddings=132096),
    "tiny-aya": dict(model_type="cohere2", hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                     num_attention_heads=16, num_key_value_heads=4, vocab_size=262144, rope_theta=5e4,
                     logit_scale=1.0, max_position_embeddings=500000, bos_token_id=2, eos_token_id=3),
}


def model_preset(name, vocab_size=None):
    """The ModelConfig of a preset, with the tokenizer's vocab_size if it is given."""
    config = ModelConfig(**MODEL_PRESETS[name])
    if vocab_size:
        config.vocab_size = vocab_size
    return config
