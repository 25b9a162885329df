"""The families of decoders: one table, which model.py, engine.py and model_config.py read.

                    cohere       cohere2      llama     qwen2     qwen3     mistral   gemma2     gemma3_text
    block           parallel     parallel     sequence  sequence  sequence  sequence  sandwich   sandwich
    norm            layer        layer        rms       rms       rms       rms       rms + 1    rms + 1
    rotary pairs    interleaved  interleaved  halves    halves    halves    halves    halves     halves
    rotary layers   all          sliding      all       all       all       all       all        all, 2 thetas
    rope scaling    -            -            linear, llama3, yarn ......................        full layers
    q, k, v bias    -            -            -         yes       -         -         -          -
    q, k norm       as asked     -            -         -         each head -         -          each head
    windows         -            1 - 3 of 4   -         as asked  as asked  all       1 of 2     5 of 6
    softmax scale   D^-1/2       D^-1/2       D^-1/2    D^-1/2    D^-1/2    D^-1/2    asked      asked
    soft caps       -            -            -         -         -         -         both       logits'
    embedding       -            -            -         -         -         -         sqrt(hidden_size)
    activation      silu         silu         silu      silu      silu      silu      gelu_tanh  gelu_tanh
    head            tied         tied         as asked  as asked  as asked  as asked  tied       tied
    logit_scale     yes          yes          -         -         -         -         -          -

"as asked": config.json says it. Blocks, with A attention, M the MLP and N norms (models/*/modeling_*.py of
transformers 5.24, from which every row was read):

    parallel        x + A(N1 x) + M(N1 x)
    sequence        y = x + A(N1 x),        y + M(N2 y)
    sandwich        y = x + N2 A(N1 x),     y + N4 M(N3 y)

Models: cohere is Aya Expanse, Aya 23, Command R; cohere2 Command R7B, Command A, Tiny Aya; llama Llama 2 and
3; mistral also Mistral Small's text part, gemma3_text that of Gemma 3; ministral3 (the text part of Ministral
3) is mistral with yarn, and with queries that grow with their positions. Known gaps: Gemma 4 and mixtures of
experts are refused.
"""

from dataclasses import dataclass

# {block: the names of its norms}
NORMS = {"parallel": ("input_layernorm",),
         "sequence": ("input_layernorm", "post_attention_layernorm"),
         "sandwich": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                      "post_feedforward_layernorm")}
# {rope_type: {key: (type, interval, whether it may be absent)}}; rope.py has the equations.
SCALINGS = {
    "linear": {"factor": (float, "[1, inf)", False)},
    "llama3": {"factor": (float, "[1, inf)", False), "low_freq_factor": (float, "(0, inf)", False),
               "high_freq_factor": (float, "(0, inf)", False),
               "original_max_position_embeddings": (int, "[1, 2147483648)", True)},
    "yarn": {"factor": (float, "[1, inf)", False), "beta_fast": (float, "(0, inf)", True),
             "beta_slow": (float, "(0, inf)", True), "attention_factor": (float, "(0, inf)", True),
             "mscale": (float, "[0, inf)", True), "mscale_all_dim": (float, "[0, inf)", True),
             "original_max_position_embeddings": (int, "[1, 2147483648)", True),
             "truncate": (bool, None, True)}}


@dataclass(frozen=True)
class Family:
    """A row. defaults: {field of ModelConfig: value} where config.json does not have the key, as in
    transformers' configuration classes; fields that are not among them do not exist in the family.

    grows: whether queries grow with their positions, by llama_4_scaling_beta (rope.growth).
    windows: how layer_types follows from config.json if it lacks them: "never", "pattern" (every
    sliding_window_pattern-th layer is full), "late" (from max_window_layers on, if use_sliding_window), or
    "all". published: the beginning of its classes' names.
    """
    published: str
    defaults: dict
    block: str = "sequence"
    norm: str = "rms"
    interleaved: bool = False
    rotates: str = "all"                # or "sliding": only those layers
    scalings: tuple = ("linear", "llama3", "yarn")
    grows: bool = False
    qkv_bias: bool = False
    qk_norm: str = "never"              # or "asked" (use_qk_norm, a weight for each head), or "head"
    windows: str = "never"
    scales_embedding: bool = False
    activation: tuple = ("hidden_act", "silu")
    only: tuple = ()                    # more pairs of ONLY
    classifier: str = ""                # the beginning of its ForSequenceClassification, if it is another

    def class_named(self, task):
        """The name of a published class, such as LlamaForCausalLM."""
        return (task == "ForSequenceClassification" and self.classifier or self.published) + task


_COHERE = dict(vocab_size=256000, hidden_size=8192, intermediate_size=22528, num_hidden_layers=40,
               num_attention_heads=64, max_position_embeddings=8192, layer_norm_eps=1e-5, logit_scale=0.0625,
               tie_word_embeddings=True, pad_token_id=0, bos_token_id=5, eos_token_id=255001)
_LLAMA = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
              num_attention_heads=32, max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0,
              tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
_QWEN = dict(_LLAMA, vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
             max_position_embeddings=32768, sliding_window=4096, bos_token_id=None, eos_token_id=None)
_GEMMA = dict(vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
              num_attention_heads=8, num_key_value_heads=4, head_dim=256, max_position_embeddings=8192,
              rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=4096, sliding_window_pattern=2,
              query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
              tie_word_embeddings=True, pad_token_id=0, bos_token_id=2, eos_token_id=1)
_PARALLEL = dict(block="parallel", norm="layer", interleaved=True, scalings=())
_SANDWICH = dict(block="sandwich", norm="rms + 1", windows="pattern", scales_embedding=True,
                 activation=("hidden_activation", "gelu_pytorch_tanh"))
FAMILIES = {
    "cohere": Family("Cohere", dict(_COHERE, rope_theta=500000.0, use_qk_norm=False), qk_norm="asked",
                     **_PARALLEL),
    "cohere2": Family("Cohere2", dict(_COHERE, rope_theta=10000.0, use_qk_norm=False, sliding_window=4096,
                                      sliding_window_pattern=4),
                      rotates="sliding", windows="pattern", **_PARALLEL),
    "llama": Family("Llama", _LLAMA),
    "qwen2": Family("Qwen2", _QWEN, qkv_bias=True, windows="late"),
    "qwen3": Family("Qwen3", dict(_QWEN, head_dim=128), qk_norm="head", windows="late"),
    "mistral": Family("Mistral", dict(_LLAMA, intermediate_size=14336, num_key_value_heads=8,
                                      max_position_embeddings=131072, sliding_window=4096), windows="all"),
    "ministral3": Family("Ministral3", dict(
        _LLAMA, vocab_size=131072, intermediate_size=14336, num_hidden_layers=34, num_key_value_heads=8,
        head_dim=128, max_position_embeddings=262144, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None,
        pad_token_id=11, rope_scaling=dict(
            rope_type="yarn", factor=16.0, original_max_position_embeddings=16384, beta_fast=32.0,
            beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)),
        windows="all", scalings=("yarn",), grows=True),
    "gemma2": Family("Gemma2", _GEMMA, only=(("sliding_window_pattern", 2),), **_SANDWICH),
    "gemma3_text": Family("Gemma3", dict(
        _GEMMA, vocab_size=262208, max_position_embeddings=131072, rope_theta=1e6, sliding_window_pattern=6,
        rope_local_base_freq=10000.0, attn_logit_softcapping=None, final_logit_softcapping=None),
        qk_norm="head", classifier="Gemma3Text", only=(("attn_logit_softcapping", None),), **_SANDWICH)}

# Keys of config.json that have one accepted value, beside null. Those of ModelConfig's fields are honoured.
# Others are read by no class of the family in transformers and change nothing there; nor do they here. (It
# reads neither gemma2's pattern of layers nor gemma3's cap of scores, which could mean another model.)
ONLY = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0,
        "use_bidirectional_attention": False, "partial_rotary_factor": 1, "rotary_pct": 1,
        "quantization_config": None, "compression_config": None}
# Cohere's own files say these too.
ONLY_PARALLEL = {"use_parallel_block": True, "use_gated_activation": True,
                 "position_embedding_type": "rope_gptj"}
# Whose text part is read: {architecture: the model types that its text_config may have}. Its tensors are
# named language_model.* or, by transformers 5, model.language_model.*
WRAPPERS = {"Gemma3ForConditionalGeneration": ("gemma3_text",),
            "Mistral3ForConditionalGeneration": ("mistral", "ministral3")}
