"""The settings of an encoder-decoder, named as in the published config.json of T5 v1.1, mT5 and umT5, and the
sizes of some published models. Aya 101 (arXiv 2402.07827) is mT5-xxl, under the model_type t5.

How the three differ (models/t5, mt5 and umt5 of transformers 5.24, from which every line was read):

                        t5                              mt5             umt5
    bias table          layer 0's, for all layers       the same        one for each layer
    feed_forward_proj   relu if config.json is silent   gated-gelu      gated-gelu
    output scaled       unless tie_word_embeddings      never           unless tie_word_embeddings
    by d_model^-1/2     is false                                        is false

Whether the head is the embedding is said by the tensors, not by config.json: transformers 5 writes
tie_word_embeddings true for all three, and keeps a lm_head.weight that differs from shared.weight.
"""

from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Optional, Union

from .command import describe, in_range
from .model_config import stop_ids

PUBLISHED = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}          # the beginning of their classes' names
TASK = "ForConditionalGeneration"
# {feed_forward_proj: (the activation, whether a second matrix multiplies it)}. gated-gelu is gelu_new.
FEED_FORWARDS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True), "gated-relu": ("relu", True),
                 "gated-silu": ("silu", True)}
SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "relative_attention_max_distance")
INTERVALS = {**dict.fromkeys(SIZES, (int, "[1, 2147483648)")),
             "num_layers": (int, "[1, 100000)"), "num_decoder_layers": (int, "[1, 100000)"),
             "relative_attention_num_buckets": (int, "[4, 2147483648)"),
             "layer_norm_epsilon": (float, "(0, inf)"), "initializer_factor": (float, "(0, inf)"),
             "dropout_rate": (float, "[0, 1)")}
# Keys that have one accepted value, beside null, because another would be another model.
ONLY = {"is_decoder": False, "is_encoder_decoder": True, "quantization_config": None, "mixture": None}
# The names that transformers takes for the same settings.
ALSO = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
        "head_dim": "d_kv"}
# Positions are distances, of which the far ones share a bucket: no text is too long for the model.
ANY_LENGTH = 1 << 30


@dataclass
class EncoderDecoderConfig:
    """An encoder-decoder as its config.json describes it. Defaults are those of transformers (5.24).

    tie_word_embeddings: whether the head is the embedding, as the tensors say. scale_decoder_outputs: whether
    the decoder's output is multiplied by d_model^-1/2. dropout_rate is kept and published, but not read: the
    stages' own settings decide on dropout.
    """
    model_type: str = "t5"
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: Optional[int] = None                # else num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    dropout_rate: float = 0.1
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: Optional[bool] = None
    pad_token_id: int = 0
    eos_token_id: Union[int, list] = 1
    decoder_start_token_id: Optional[int] = None            # else pad_token_id

    # What the rest of the house asks of a config.
    mixture: ClassVar = None
    max_position_embeddings: ClassVar[int] = ANY_LENGTH

    def __post_init__(self):
        if not (isinstance(self.model_type, str) and self.model_type in PUBLISHED):
            raise ValueError(f"model_type {self.model_type!r:.80} is no encoder-decoder that is supported; "
                             f"supported: {' '.join(PUBLISHED)}")
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.model_type != "mt5" and self.tie_word_embeddings is not False
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id
        self.check_types()
        ids = stop_ids(self.eos_token_id)
        self.eos_token_id = ids if len(ids) > 1 else ids[0]
        if self.model_type == "mt5" and self.scale_decoder_outputs:
            raise ValueError("scale_decoder_outputs true is not known in mt5, whose output is never scaled")
        exact = self.relative_attention_num_buckets // 2
        if self.relative_attention_max_distance <= exact:
            raise ValueError(f"relative_attention_max_distance {self.relative_attention_max_distance} must "
                             f"be above {exact}, half of relative_attention_num_buckets")

    def check_types(self):
        """Refuse a field of a wrong type or outside its interval; ints for floats become floats."""
        for name, (kind, interval) in INTERVALS.items():
            value = getattr(self, name)
            if not (type(value) in (int, kind) and in_range(value, interval)):
                raise ValueError(f"{name} {value!r:.80}: must be {describe(kind, interval)}")
            setattr(self, name, kind(value))
        for name in ("tie_word_embeddings", "scale_decoder_outputs"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} {getattr(self, name)!r:.80} must be true or false")
        for name in ("pad_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            if not (type(value) is int and 0 <= value < self.vocab_size):
                raise ValueError(f"{name} {value!r:.80} must be a token's number, below vocab_size "
                                 f"{self.vocab_size}")
        if not (isinstance(self.feed_forward_proj, str) and self.feed_forward_proj in FEED_FORWARDS):
            raise ValueError(f"feed_forward_proj {self.feed_forward_proj!r:.80} is not supported; supported: "
                             f"{' '.join(FEED_FORWARDS)}")

    @property
    def activation(self):
        return FEED_FORWARDS[self.feed_forward_proj][0]

    @property
    def is_gated(self):
        return FEED_FORWARDS[self.feed_forward_proj][1]

    @property
    def hidden_size(self):
        return self.d_model

    @property
    def num_hidden_layers(self):
        """Layers with a cache, which are the decoder's."""
        return self.num_decoder_layers

    @property
    def key_width(self):
        """Numbers in the keys of a token, and in its values, in a layer."""
        return self.num_heads * self.d_kv

    @property
    def output_scale(self):
        return self.d_model ** -0.5 if self.scale_decoder_outputs else 1.0

    def window(self, i):
        """No layer has a sliding window (model_config.ModelConfig.window)."""
        return None

    def class_named(self, task):
        return PUBLISHED[self.model_type] + task

    @classmethod
    def from_published(cls, raw, where="config.json"):
        """An EncoderDecoderConfig from a published config.json (a dict). ValueError, with `where` as the
        file's name, for a value that is wrong or not supported."""
        kind = raw.get("model_type")
        given = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        if kind in ("mt5", "umt5"):
            given = dict(MT5_SMALL) | given
        try:
            for name, only in ONLY.items():
                if raw.get(name) is not None and raw[name] != only:
                    raise ValueError(f"{name} {raw[name]!r:.80} is not supported, only {only!r}")
            if kind == "mt5":                       # whose official files say true and mean nothing by it
                given.pop("scale_decoder_outputs", None)
            config = cls(**given)
            said = {name: getattr(config, ours) for name, ours in ALSO.items()}
            said |= {"is_gated_act": config.is_gated, "dense_act_fn": config.activation}
            for name, value in said.items():
                if raw.get(name) is not None and raw[name] != value:
                    raise ValueError(f"{name} {raw[name]!r:.80} does not go with the rest, which says "
                                     f"{value!r}")
            return config
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None

    def published(self, task=TASK, dtype="float32"):
        """The config.json to publish (a dict), with what transformers 5 derives and older versions read.

        An untied head without scaling is tie_word_embeddings false, as in the published files; whatever is
        tied says true, because older versions would not find its head."""
        named = asdict(self)
        if self.model_type == "mt5":
            del named["scale_decoder_outputs"]
        tied = self.tie_word_embeddings or self.scale_decoder_outputs
        return {"architectures": [self.class_named(task)], **named, "tie_word_embeddings": tied,
                "is_encoder_decoder": True, "is_gated_act": self.is_gated, "dense_act_fn": self.activation,
                "use_cache": True, "dtype": dtype, "torch_dtype": dtype}

    def training_flops(self, lengths, num_supervised):
        """Operations of forward and backward over texts of these lengths (tokens of source and target), as
        flops.training_flops counts them. The targets are num_supervised tokens; for the attention alone each
        text is taken to have the same share of them."""
        total, width, d = sum(lengths), self.key_width, self.d_model
        target, source = num_supervised, sum(lengths) - num_supervised
        mlp, attention = (2 + self.is_gated) * d * self.d_ff, 4 * d * width
        weights = self.num_layers * source * (attention + mlp)
        weights += self.num_decoder_layers * (target * (attention + mlp + 2 * d * width)
                                              + source * 2 * d * width)
        share, squares = target / max(total, 1), sum(T * T for T in lengths)
        pairs = self.num_layers * (1 - share) ** 2 * squares
        pairs += self.num_decoder_layers * (share ** 2 / 2 + share * (1 - share)) * squares
        return round(3 * (2 * weights + 4 * width * pairs + 2 * d * self.vocab_size * target))


MT5_SMALL = dict(model_type="mt5", vocab_size=250112, d_model=512, d_kv=64, d_ff=1024, num_layers=8,
                 num_heads=6, feed_forward_proj="gated-gelu")
_UNTIED = dict(MT5_SMALL, tie_word_embeddings=False)
_XXL = dict(_UNTIED, d_model=4096, d_ff=10240, num_layers=24, num_heads=64)
# The published sizes; tiny-t5 is our own, for the embedded world.
PRESETS = {
    "tiny-t5": dict(model_type="t5", vocab_size=6144, d_model=96, d_kv=32, d_ff=256, num_layers=3,
                    num_heads=3, feed_forward_proj="gated-gelu"),
    "mt5-small": _UNTIED,
    "mt5-base": dict(_UNTIED, d_model=768, d_ff=2048, num_layers=12, num_heads=12),
    "mt5-large": dict(_UNTIED, d_model=1024, d_ff=2816, num_layers=24, num_heads=16),
    "mt5-xl": dict(_UNTIED, d_model=2048, d_ff=5120, num_layers=24, num_heads=32),
    "mt5-xxl": _XXL,
    "aya-101": dict(_XXL, model_type="t5"),
}
