"""The settings of a model, named as in the published config.json, and the sizes of some published models."""

from dataclasses import InitVar, asdict, dataclass, fields
from typing import Optional, Union

from .command import describe, in_range

ROPE_THETA = {"cohere": 500000.0, "cohere2": 10000.0}       # {model type: rope_theta if config.json has none}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
         "head_dim", "max_position_embeddings")
INTERVALS = {**dict.fromkeys(SIZES, (int, "[1, 2147483648)")), "num_hidden_layers": (int, "[1, 100000)"),
             "layer_norm_eps": (float, "(0, inf)"), "rope_theta": (float, "(0, inf)"),
             "logit_scale": (float, "(0, inf)"), "initializer_range": (float, "(0, inf)")}
BOOLEANS = ("use_qk_norm", "tie_word_embeddings")
# Keys that transformers reads and this program does not, with the only value, beside null, that is accepted.
IGNORED = {"attention_bias": False, "attention_dropout": 0, "hidden_act": "silu",
           "partial_rotary_factor": 1, "rotary_pct": 1, "quantization_config": None,
           "compression_config": None}


@dataclass
class ModelConfig:
    """A Cohere decoder as its config.json describes it.

    Defaults are those of transformers' CohereConfig and Cohere2Config (5.23). model_type cohere: Aya Expanse,
    Aya 23, Command R. cohere2: Command R7B, Command A, Tiny Aya; there only the layers of type
    "sliding_attention" rotate queries and keys, and they attend to the last sliding_window tokens.
    """
    model_type: str = "cohere"
    vocab_size: int = 256000
    hidden_size: int = 8192
    intermediate_size: int = 22528
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    num_key_value_heads: Optional[int] = None   # default num_attention_heads
    head_dim: Optional[int] = None              # default hidden_size / num_attention_heads
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    rope_theta: Optional[float] = None          # default ROPE_THETA
    sliding_window: Optional[int] = 4096        # tokens that a sliding layer sees, or None in cohere
    layer_types: Optional[list] = None          # cohere2: "sliding_attention" or "full_attention" per layer
    logit_scale: float = 0.0625
    initializer_range: float = 0.02
    use_qk_norm: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    bos_token_id: int = 5
    eos_token_id: Union[int, list] = 255001     # a sorted list if there are several
    sliding_window_pattern: InitVar[int] = 4    # older form of layer_types: every n-th layer is full

    def __post_init__(self, sliding_window_pattern):
        self.check_types()
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.rope_theta = self.rope_theta or ROPE_THETA[self.model_type]
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary embeddings turn pairs")
        ids = stop_ids(self.eos_token_id)
        self.eos_token_id = ids if len(ids) > 1 else ids[0]
        if self.model_type == "cohere":
            self.sliding_window = self.layer_types = None
            return
        if self.use_qk_norm:
            raise ValueError("use_qk_norm is not known in cohere2, only in cohere")
        if self.layer_types is None:
            self.layer_types = layer_pattern(self.num_hidden_layers, sliding_window_pattern)
        self.check_layers()

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
        for name in BOOLEANS:
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} {getattr(self, name)!r:.80} must be true or false")
        for name in ("pad_token_id", "bos_token_id"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} {getattr(self, name)!r:.80} must be a token's number")
        if not isinstance(self.model_type, str):
            raise ValueError(f"model_type {self.model_type!r:.80} must be a name")
        if self.model_type not in ROPE_THETA:
            raise ValueError(f"model_type {self.model_type!r} is not supported; supported: "
                             f"{' '.join(ROPE_THETA)}")

    def check_layers(self):
        """Refuse a wrong layer_types or sliding_window of cohere2."""
        kinds = self.layer_types
        if not (isinstance(kinds, list) and len(kinds) == self.num_hidden_layers
                and all(kind in ("sliding_attention", "full_attention") for kind in kinds)):
            raise ValueError(f"layer_types {kinds!r:.80} must be sliding_attention or full_attention for "
                             f"each of {self.num_hidden_layers} layers")
        whole = type(self.sliding_window) is int and self.sliding_window > 0
        if "sliding_attention" in kinds and not whole:
            raise ValueError(f"sliding_window {self.sliding_window!r} must be a whole number above 0")

    def window(self, i):
        """The number of tokens that a token attends to in layer i, itself included; None: all before it."""
        slides = self.layer_types and self.layer_types[i] == "sliding_attention"
        return self.sliding_window if slides else None

    def has_rope(self, i):
        """Whether layer i rotates its queries and keys."""
        return self.model_type == "cohere" or self.window(i) is not None

    @classmethod
    def from_published(cls, raw, where="config.json"):
        """A ModelConfig from a published config.json (a dict), whichever key holds rope_theta.

        ValueError, with `where` as the file's name, for a value that is wrong or not supported.
        """
        for name, value in IGNORED.items():
            if raw.get(name) is None and name != "hidden_act" or raw.get(name, value) == value:
                continue
            raise ValueError(f"{where}: {name} {raw[name]!r:.80} is not supported; supported: {value}")
        known = {f.name for f in fields(cls)} | {"sliding_window_pattern"}
        given = {k: v for k, v in raw.items() if k in known and (v is not None or k == "sliding_window")}
        try:
            return cls(**given | {"rope_theta": rope_theta_of(raw)})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None

    def published(self, task="ForCausalLM", dtype="float32"):
        """The config.json to publish (a dict): the fields, and keys that old or new transformers read."""
        own = {k: v for k, v in asdict(self).items() if v is not None}
        patterns = [p for p in range(1, self.num_hidden_layers + 2)
                    if layer_pattern(self.num_hidden_layers, p) == self.layer_types]
        if patterns:
            own["sliding_window_pattern"] = patterns[0]         # all that transformers 4.48-4.52 read
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        return {"architectures": [self.model_type.capitalize() + task], **own, "attention_bias": False,
                "attention_dropout": 0.0, "hidden_act": "silu", "rope_parameters": rope, "use_cache": True,
                "dtype": dtype, "torch_dtype": dtype}


def rope_theta_of(raw):
    """The rope_theta of a config.json, which newer files keep in rope_parameters or rope_scaling, or None.

    ValueError for rope that is scaled, partial, or set for each layer type.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if isinstance(rope, dict) and rope and all(isinstance(part, dict) for part in rope.values()):
        raise ValueError("rope_parameters for each layer type are not supported, nor is scaled rope")
    plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
    if not isinstance(rope, dict) or any(value not in (None, plain.get(name))
                                         for name, value in rope.items() if name != "rope_theta"):
        raise ValueError(f"rope_scaling or rope_parameters {rope!r:.80}: scaled rope is not supported")
    return rope.get("rope_theta") or raw.get("rope_theta")


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
