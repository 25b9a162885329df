"""Linear layers whose weights stay packed (quantization.py): what config.json says of them, and their
products by torch's own kernels. Nothing here unpacks a model: at most PIECE numbers of a matrix at a time.

    weights         where                     the product
    8 bits          CPU, CUDA in bf16         torch._weight_int8pack_mm
    8 bits          CPU in fp32, many rows    torch._int_mm, of the inputs' three digits
    4 bits          CPU, CUDA in bf16         torch._weight_int4pack_mm_for_cpu, torch._weight_int4pack_mm
    8 bits, and
    8-bit inputs    everywhere                torch._int_mm, exact in int32, then the two scales
    all others      NF4, fp32, odd shapes     unpacked piece by piece, then torch's product

torch has no kernel for NF4. On a CPU its kernels for 8 and 4 bits compute number by number in fp32 (four to
fifteen times the time of the unpacked product), so that 4 bits in fp32 unpack.
"""

from dataclasses import replace

import torch
from torch import nn

from .linear import product
from .quantization import SCHEMES, check_tensors, dequantize, from_tensors, pack, specs_of, unpack

# The layers that stay whole, by the end of the architecture's name; of all others it is the head.
KEPT = {"Classifier": ["score"], "ForSequenceClassification": ["score"], "SideNet": ["hidden", "out"]}
PIECE = 1 << 20                     # numbers unpacked at a time: 4 MB in fp32, which stay in a core's cache
MANY = 8                            # rows, from which digits are faster than the kernel in bf16 on a CPU
INNER_TILES = 2                     # of the CUDA kernel's layout; the CPU's has none


# ---- config.json -------------------------------------------------------------------------------------------

def kept(raw):
    """The layers that a quantized folder keeps whole, if not asked otherwise. raw: its config.json."""
    named = raw.get("architectures")
    named = str(named[0]) if isinstance(named, list) and named else ""
    return next((layers for end, layers in KEPT.items() if named.endswith(end)), ["lm_head"])


def published(scheme, head=False, embedding=False, whole=("lm_head",)):
    """The quantization_config of a folder. head, embedding: whether those are quantized too. whole: of
    `kept`."""
    if scheme.layout == "bitsandbytes":
        four = scheme.bits == 4
        return {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four,
                "bnb_4bit_quant_type": "nf4" if four else "fp4", "bnb_4bit_use_double_quant": False,
                "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": "float32",
                "llm_int8_threshold": scheme.outliers or SCHEMES["llm-int8"].outliers,
                "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": list(whole),
                "llm_int8_enable_fp32_cpu_offload": False}
    of = {"type": "int", "symmetric": True}
    weights = {"num_bits": scheme.bits, **of, "strategy": "group" if scheme.group else "channel",
               "group_size": scheme.group, "dynamic": False}
    inputs = {"num_bits": scheme.activations, **of, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear", "Embedding"] if embedding else ["Linear"], "weights": weights,
             "input_activations": inputs if scheme.activations else None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": scheme.layout,
            "quantization_status": "compressed", "config_groups": {"group_0": group},
            "ignore": [] if head else list(whole)}


def read(raw, where):
    """(Scheme, whether the head is quantized, whether the embedding is) of a config.json (a dict), None
    without a quantization_config. ValueError for one that `published` does not write, or nearly so."""
    given = raw.get("quantization_config")
    if given is None:
        return None
    for scheme in SCHEMES.values():
        for head, embedding in ((False, False), (True, False), (False, True), (True, True)):
            one, ours = scheme, published(scheme, head, embedding, kept(raw))
            if isinstance(given, dict) and scheme.outliers and type(given.get("llm_int8_threshold")) is float:
                one = replace(scheme, outliers=given["llm_int8_threshold"] or float("inf"))
                ours["llm_int8_threshold"] = given["llm_int8_threshold"]
            if agree(given, ours):
                return one, head, embedding
    raise ValueError(f"{where}: quantization_config {given!r:.80} is not supported; supported are "
                     "compressed-tensors (pack-quantized and int-quantized, symmetric, 8 or 4 bits) and "
                     "bitsandbytes (8 bits; nf4 without double quantization)")


# Keys that change nothing of what is computed here, and what the others are where they are left out.
NEUTRAL = {"global_compression_ratio", "version", "observer", "observer_kwargs", "actorder", "zp_dtype",
           "scale_dtype", "format", "quant_method", "bnb_4bit_compute_dtype", "_load_in_4bit",
           "_load_in_8bit", "llm_int8_enable_fp32_cpu_offload"}
ABSENT = {"dynamic": False, "symmetric": True, "ignore": [], "load_in_4bit": False, "load_in_8bit": False,
          "llm_int8_skip_modules": ["lm_head"], "bnb_4bit_use_double_quant": False,
          "bnb_4bit_quant_storage": "uint8", "llm_int8_has_fp16_weight": False, "type": "int",
          "llm_int8_threshold": SCHEMES["llm-int8"].outliers}


def agree(given, ours, top=True):
    """Whether two quantization_configs mean the same."""
    if not (isinstance(given, dict) and isinstance(ours, dict)):
        return given == ours
    keys = (given.keys() | ours.keys()) - NEUTRAL
    if top and any(given.get(key) != ours.get(key) for key in ("format", "quant_method")):
        return False
    if top and ours["quant_method"] == "bitsandbytes":      # what is said of the other number of bits
        keys -= {"llm_int8_threshold"} if ours["load_in_4bit"] else {"bnb_4bit_quant_type"}
    for key in keys:
        one, other = (ABSENT.get(key) if each.get(key) is None else each[key] for each in (given, ours))
        one, other = ({} if each is None and key in ("sparsity_config", "transform_config") else each
                      for each in (one, other))
        if not agree(one, other, False):
            return False
    return True


# ---- layers ------------------------------------------------------------------------------------------------

class Packed(nn.Module):
    """A matrix (N, K) of a scheme. `fill` gives it its numbers, which are no parameter; `weight` unpacks
    them."""

    def __init__(self, scheme, shape, bias=None):
        super().__init__()
        self.scheme, self.shape, self.bias = scheme, tuple(shape), bias

    def specs(self, name):
        return specs_of(name, self.shape, self.scheme, None)

    def fill(self, name, found, dtype, device):
        """Take the tensors of a folder. dtype: of what the layer reads and returns. ValueError where they
        cannot be those of the scheme."""
        check_tensors(name, found, self.shape, self.scheme)
        codes, scales = from_tensors(name, found, self.shape, self.scheme)
        self.keep(codes.to(device), scales.to(device, dtype))

    def keep(self, codes, scales):
        """codes int8 (N, K), scales (N, G) in the dtype of the products."""
        self.scales, self.four = scales, self.scheme.bits == 4
        self.codes = pack(codes - 8 if self.scheme.name == "nf4" else codes, 4) if self.four else codes

    def rows(self, which):
        """Rows of the weight, unpacked: a slice or indices -> (n, K)."""
        codes = self.codes[which]
        if self.four:
            codes = unpack(codes, 4, self.shape[1])
            codes = codes + 8 if self.scheme.name == "nf4" else codes
        return dequantize(codes, self.scales[which], self.scheme, self.scales.dtype)

    @property
    def weight(self):
        """The whole weight, unpacked anew."""
        return self.rows(slice(None))


class PackedEmbedding(Packed):
    def forward(self, ids):
        return self.rows(ids.flatten()).view(*ids.shape, -1)


class PackedLinear(Packed):
    def keep(self, codes, scales):
        self.multiply, self.like = kernel_of(self.scheme, codes, scales) or self.by_pieces, scales
        if self.scheme.bits == 8 or self.multiply == self.by_pieces:
            super().keep(codes, scales)             # the kernels for 8 bits read the same codes

    @property
    def weight(self):
        if hasattr(self, "codes"):
            return super().weight
        return self.multiply(torch.eye(self.shape[1]).to(self.like)).t()

    def by_pieces(self, x):
        """x (M, K) -> (M, N)"""
        size = max(1, PIECE // self.shape[1])
        return torch.cat([product(x, self.rows(slice(start, start + size)))
                          for start in range(0, self.shape[0], size)], 1)

    def forward(self, x):
        # torch's kernels for 4 bits refuse a part of a wider matrix, which fused.added gives them.
        y = self.multiply(x.reshape(-1, self.shape[1]).contiguous()).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# ---- torch's kernels ---------------------------------------------------------------------------------------

def kernel_of(scheme, codes, scales):
    """The function (M, K) -> (M, N) of a kernel of torch's, None where there is none."""
    device, half = codes.device.type, scales.dtype == torch.bfloat16
    if scheme.activations:
        return of_int8_inputs(scheme, codes, scales)
    if scheme.bits == 8 and device == "cpu":
        digits = of_digits(codes, scales)
        if not half:
            return digits
        scales = scales[:, 0].contiguous()
        return lambda x: digits(x) if len(x) >= MANY else torch._weight_int8pack_mm(x, codes, scales)
    if not half or scheme.name == "nf4" or device not in ("cpu", "cuda"):
        return None
    if scheme.bits == 8:
        op = "aten::_weight_int8pack_mm"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op, device.upper()):
            return None
        scales = scales[:, 0].contiguous()
        return lambda x: torch._weight_int8pack_mm(x, codes, scales)
    return int4_kernel(scheme, codes, scales)


def of_digits(codes, scales):
    """Inputs as integers of 24 bits, as many as fp32 has, in steps of a token's largest number: three digits
    of base 256, from -128 to 127, whose products are exact in int32."""
    columns, scales = codes.t(), scales[:, 0].float()

    def multiply(x):
        steps = x.float().abs().amax(1, keepdim=True) / (127 << 16)                         # (M, 1)
        steps.masked_fill_(steps == 0, 1)
        rest, digits = (x.float() / steps).round_().int(), []
        for _ in range(3):
            digits.append(((rest + 128) & 255) - 128)
            rest = (rest - digits[-1]) >> 8
        low, middle, high = torch._int_mm(torch.cat(digits).to(torch.int8), columns).float().chunk(3)
        return ((high * 65536 + middle * 256 + low) * steps * scales).to(x.dtype)
    return multiply


def int4_kernel(scheme, codes, scales):
    """The kernel adds a group's zero point, which is 0, to (code - 8) x scale."""
    (N, K), cuda = codes.shape, codes.is_cuda
    group = scheme.group or next((g for g in (256, 128, 64, 32) if K % g == 0), 0)
    if not group or N % (8 if cuda else 16) or cuda and K % (16 * INNER_TILES):
        return None
    scales = scales.repeat_interleave(K // group // scales.shape[1], 1).t()                 # (G, N)
    scales = torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()               # (G, N, 2)
    raised = codes.int() + 8
    if cuda:
        raised = (raised[:, ::2] << 4 | raised[:, 1::2]).to(torch.uint8)
        packed = torch._convert_weight_to_int4pack(raised, INNER_TILES)
        return lambda x: torch._weight_int4pack_mm(x, packed, group, scales)
    packed = torch._convert_weight_to_int4pack_for_cpu(raised, INNER_TILES)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group, scales)


def of_int8_inputs(scheme, codes, scales):
    """Inputs in 8 bits, one scale for each token, chosen when they come.

    LLM.int8 (2208.07339) keeps a whole input dimension of a batch where one of its numbers is an outlier.
    Here the outliers alone are kept, so that a token's result does not depend on the others beside it,
    but for the order of a sum in fp32.
    """
    columns, cuda = codes.t(), codes.is_cuda
    # compressed-tensors divides a token's largest number by 127.5, bitsandbytes by 127.
    largest = 127.5 if scheme.layout == "int-quantized" else 127
    scales = scales[:, 0].float()

    def multiply(x):
        numbers, kept = x.float(), None
        if scheme.outliers:
            is_outlier = numbers.abs() >= scheme.outliers
            which = is_outlier.any(0).nonzero()[:, 0]                                       # (k,)
            kept = (numbers * is_outlier)[:, which]                                         # (M, k)
            numbers = numbers.masked_fill(is_outlier, 0)
        steps = numbers.abs().amax(1, keepdim=True) / largest                               # (M, 1)
        steps.masked_fill_(steps == 0, 1)
        rounded = (numbers / steps).round_().clamp_(-128, 127).to(torch.int8)
        if cuda:                                # whose kernel wants more than 16 rows, in eights
            rounded = nn.functional.pad(rounded, (0, 0, 0, max(-len(x) % 8, 24 - len(x))))
        y = torch._int_mm(rounded, columns)[:len(x)].float() * steps * scales
        if kept is not None and len(which):
            y += kept @ (codes[:, which].float() * scales[:, None]).t()
        return y.to(x.dtype)
    return multiply


# ---- models ------------------------------------------------------------------------------------------------

def linears(model):
    """{name: Linear} of the layers of a decoder: what a scheme quantizes, beside head and embedding."""
    return {f"model.layers.{name}": module for name, module in model.model.layers.named_modules()
            if isinstance(module, nn.Linear)}


def put_packed(model, scheme, head, embedding):
    """Replace the linear layers of a model on the meta device by packed ones, which `fill` gives
    their numbers. Returns {name: module}."""
    wanted = {name: PackedLinear(scheme, module.weight.shape, module.bias)
              for name, module in linears(model).items()}
    if head:
        wanted["lm_head"] = PackedLinear(scheme, model.lm_head.weight.shape)
    if embedding:
        wanted["model.embed_tokens"] = PackedEmbedding(scheme, model.model.embed_tokens.weight.shape)
    for name, module in wanted.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)
    return wanted
