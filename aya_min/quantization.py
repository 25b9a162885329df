"""Numbers of 8 and 4 bits for the weights of linear layers, after training (arXiv 2407.03211, section 3): the
schemes, and the two ways to choose the integers. Pure functions on tensors.

    scheme      weights (N out, K in), symmetric, no zero point        activations
    w8          int8, one scale for each output                        as they are
    w8a8        int8, one scale for each output                        int8, one scale for each token
    llm-int8    int8, one scale for each output                        the same, without outliers (2208.07339)
    w4          int4, one scale for each output                        as they are
    w4-g32/64/128   int4, one scale for each output and g inputs       as they are
    nf4         16 quantiles of a normal distribution (2305.14314),    as they are
                one absolute maximum for each 64 inputs

What a folder holds (quantized.py reads and writes it; N, K as above, G groups):

    w8 w4 w4-g*  compressed-tensors, format pack-quantized     weight_packed int32 (N, ceil(K bits / 32)),
                                                               weight_scale (N, G), weight_shape int64 (2)
    w8a8         compressed-tensors, format int-quantized      weight int8 (N, K), weight_scale (N, 1)
    llm-int8     bitsandbytes, load_in_8bit                    weight int8 (N, K), SCB fp32 (N), the absolute
                                                               maximum of each row, weight_format u8 ()
    nf4          bitsandbytes, load_in_4bit                    weight uint8 (N K / 2, 1), weight.absmax fp32
                                                               (N K / 64), weight.quant_map fp32 (16),
                                                               weight.quant_state.bitsandbytes__nf4 u8 (JSON)

compressed-tensors has no NF4 and no outlier columns, so those two are written as bitsandbytes writes them:
every folder is in a layout that transformers loads. config.json's `quantization_config` says which.
A Scheme of the layout "rounded", which is in no table, leaves a plain folder, whose weights are what the
codes stand for: it shows what any number of bits costs, and saves nothing.

The scale of integers is the absolute maximum / 127 or 7, so that weights on such a grid are kept exactly.
(compressed-tensors' own observers divide by 127.5 and 7.5, which clips the largest weight by half a step.)
"""

import json
import re
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F

# The quantiles of a standard normal distribution between -1 and 1 (2305.14314, appendix E), as bitsandbytes
# has them.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
       1.0]
# Weights that are worked on at a time: 32 MB in fp32, which glibc gives back at once when they are freed.
PIECE = 1 << 23
DAMP = 0.01             # of the Hessian's mean diagonal, added to its diagonal (2210.17323, section 3.3)


@dataclass(frozen=True)
class Scheme:
    """How the weights of a linear layer are held.

    group: inputs that share a scale; None: all of an output's. activations: the bits of the inputs, None for
    inputs as they are. outliers: the size from which an input is kept as it is (llm-int8).
    layout: what the folder holds, see above.
    """
    name: str
    bits: int
    layout: str = "pack-quantized"
    group: Optional[int] = None
    activations: Optional[int] = None
    outliers: Optional[float] = None

    @property
    def largest(self):
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1

    def groups(self, width):
        return width // (self.group or width)

    def check(self, name, shape):
        """ValueError for a matrix (N, K) whose rows are not whole groups."""
        if self.group and shape[1] % self.group:
            raise ValueError(f"{name} has {shape[1]} inputs, which groups of {self.group} do not divide; "
                             "give a scheme with another group, or w8 or w4, which have none")


SCHEMES = {scheme.name: scheme for scheme in [
    Scheme("w8", 8), Scheme("w8a8", 8, "int-quantized", activations=8),
    Scheme("llm-int8", 8, "bitsandbytes", activations=8, outliers=6.0), Scheme("w4", 4),
    *(Scheme(f"w4-g{group}", 4, group=group) for group in (32, 64, 128)),
    Scheme("nf4", 4, "bitsandbytes", group=64)]}


# ---- codes and scales --------------------------------------------------------------------------------------

def scales_of(weight, scheme, dtype=torch.float32):
    """The scales (N, G), fp32, of a weight (N, K), rounded to the dtype that the folder keeps them in."""
    largest = weight.float().unflatten(1, (scheme.groups(weight.shape[1]), -1)).abs().amax(2)
    scales = (largest if scheme.name == "nf4" else largest / scheme.largest).to(dtype).float()
    return scales.masked_fill_(scales == 0, 1)          # of zeros, and where the dtype has nothing so small


def nearest(scaled, scheme):
    """The int8 codes of weights divided by their scales: integers, or the places in NF4."""
    if scheme.name == "nf4":
        levels = torch.tensor(NF4, device=scaled.device)
        return torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.int8)
    return scaled.round().clamp_(-scheme.largest - 1, scheme.largest).to(torch.int8)


def values(codes, scheme, dtype=torch.float32):
    """What the codes stand for, before their scales."""
    if scheme.name == "nf4":
        return torch.tensor(NF4, device=codes.device).to(dtype)[codes.int()]
    return codes.to(dtype)


def round_to_nearest(weight, scheme, dtype=torch.float32):
    """(codes (N, K), scales (N, G)) of a weight (N, K), each number by itself."""
    scales = scales_of(weight, scheme, dtype)
    scaled = weight.float().unflatten(1, (scales.shape[1], -1)) / scales[..., None]
    return nearest(scaled, scheme).flatten(1), scales


def dequantize(codes, scales, scheme, dtype=torch.float32):
    """The weight (N, K) that codes (N, K) and scales (N, G) stand for."""
    found = values(codes, scheme, dtype).unflatten(1, (scales.shape[1], -1))
    return found.mul_(scales[..., None].to(dtype)).flatten(1)


# ---- with what the layer reads -----------------------------------------------------------------------------

def loss(weight, rounded, hessian):
    """sum_x |(W - Q) x|^2 of each output, (N,), up to the scale of the Hessian (K, K) = sum_x x x^T."""
    error = weight - rounded
    return (error @ hessian).mul_(error).sum(1)


def gptq(weight, hessian, scheme, dtype=torch.float32, block=128, piece=PIECE):
    """(codes, scales) by GPTQ (2210.17323, algorithm 1): inputs in order, and the error of each is made good
    by those that are still to come. A group's scale is chosen when its turn comes.

    weight (N, K); hessian (K, K) = sum_x x x^T, which is overwritten, because of a large layer no second one
    fits beside it. `block` inputs are worked on at a time, of the outputs, which do not depend on each other,
    as many as have `piece` weights. Where an output is nearer to its weights by plain rounding, in the loss
    that GPTQ lowers, it is rounded: GPTQ itself does not promise never to be worse.
    """
    (N, K), of_plain = weight.shape, []
    rows = max(1, piece // K)
    cuts = [slice(start, start + rows) for start in range(0, N, rows)]
    codes = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty(N, scheme.groups(K), device=weight.device)
    for cut in cuts:
        codes[cut], scales[cut] = round_to_nearest(weight[cut], scheme, dtype)
        of_plain.append(loss(weight[cut], dequantize(codes[cut], scales[cut], scheme), hessian))
    added = dampen(hessian)
    U = inverse_factor(hessian)
    for cut, its_loss in zip(cuts, of_plain):
        *found, found_loss = in_order(weight[cut].float(), U, added, scales[cut], scheme, dtype, block)
        wins = found_loss <= its_loss
        for whole, part in zip((codes, scales), found):
            whole[cut][wins] = part[wins]
    return codes, scales


def in_order(weight, U, added, scales, scheme, dtype, block):
    """(codes, scales, loss (N,)) of GPTQ. U: of inverse_factor; added: of dampen; scales: those without
    groups.

    The loss needs no Hessian: the errors E are those for which W - Q = E U, where U is the upper Cholesky
    factor of the inverse of the damped Hessian, so that sum_j E_j^2 is the loss, and what the damping adds.
    """
    W, scales, K = weight.clone(), scales.clone(), weight.shape[1]
    codes, found = torch.empty_like(W, dtype=torch.int8), W.new_zeros(len(W))
    width = scheme.group or K
    for start in range(0, K, block):
        end = min(start + block, K)
        errors = torch.empty_like(W[:, start:end])
        for j in range(start, end):
            if scheme.group and j % width == 0:
                # The block's own errors have reached its end, those beyond it wait: so bring them up to date.
                ahead = W[:, j:j + width]
                if j + width > end and j > start:
                    ahead = ahead.clone()
                    ahead[:, end - j:] -= errors[:, :j - start] @ U[start:j, end:j + width]
                scales[:, j // width] = scales_of(ahead, scheme, dtype)[:, 0]
            scale = scales[:, j // width]
            codes[:, j] = nearest(W[:, j] / scale, scheme)
            rounded = values(codes[:, j], scheme) * scale
            errors[:, j - start] = (W[:, j] - rounded) / U[j, j]
            found += errors[:, j - start].square() - added[j] * (weight[:, j] - rounded).square()
            W[:, j:end] -= errors[:, j - start, None] * U[j, j:end]
        W[:, end:].addmm_(errors, U[start:end, end:], alpha=-1)
    return codes, scales, found


def dampen(hessian):
    """Add DAMP of the mean diagonal of a Hessian (K, K) to its diagonal, in place; an input that is always 0
    gets the mean, too. Returns what was added, (K,)."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    added = torch.where(diagonal == 0, mean, 0) + DAMP * mean if mean else torch.ones_like(diagonal)
    diagonal += added
    return added


def inverse_factor(hessian):
    """The upper Cholesky factor of the inverse of a Hessian (K, K), which is overwritten: row j holds, up to
    its scale, how the inputs after j make good an error at j."""
    # LAPACK's matrices have their columns in a row; of others torch makes a copy.
    columns = hessian.t()
    torch.linalg.cholesky(columns, out=columns)
    torch.cholesky_inverse(columns, out=columns)
    return torch.linalg.cholesky(columns, upper=True, out=columns)


def smoothing(inputs, weights, alpha):
    """SmoothQuant's factors (K,), eq. 4 of 2211.10438: what the layer reads is divided by them, its weights
    are multiplied. inputs, weights (K,): the absolute maxima of each input, and of its weights."""
    factors = inputs.float() ** alpha / weights.float().clamp_min(1e-5) ** (1 - alpha)
    return torch.where((inputs == 0) | (weights == 0), 1, factors.clamp_min(1e-5))


# ---- packing -----------------------------------------------------------------------------------------------

def pack(codes, bits):
    """int8 codes (N, K) as unsigned numbers of 4 or 8 bits, the first in the lowest: int32 (N, K bits / 32),
    rounded up."""
    raised = codes.view(torch.uint8) + 2 ** (bits - 1)                      # modulo 256
    raised = F.pad(raised, (0, -raised.shape[1] % (32 // bits)))
    if bits == 4:
        raised = raised[:, ::2] | raised[:, 1::2] << 4
    return raised.contiguous().view(torch.int32)


def unpack(packed, bits, width):
    """The codes (N, width) of `pack`, or of its bytes."""
    raised = packed.view(torch.uint8)
    if bits == 4:
        raised = torch.stack((raised & 15, raised >> 4), -1).flatten(1)
    return (raised[:, :width] - 2 ** (bits - 1)).view(torch.int8)


def specs_of(name, shape, scheme, code):
    """{tensor name: (safetensors dtype, shape)} of a quantized weight "NAME.weight" (N, K) on disk. code: the
    dtype of the scales; None: any, and bitsandbytes' description may have any length, too."""
    N, K = shape
    scheme.check(f"{name}.weight", shape)
    if scheme.name == "nf4":
        length = len(state_of(shape)) if code else None
        return {f"{name}.weight": ("U8", (N * K // 2, 1)), f"{name}.weight.absmax": ("F32", (N * K // 64,)),
                f"{name}.weight.quant_map": ("F32", (16,)),
                f"{name}.weight.quant_state.bitsandbytes__nf4": ("U8", (length,))}
    if scheme.name == "llm-int8":
        return {f"{name}.weight": ("I8", (N, K)), f"{name}.SCB": ("F32", (N,)),
                f"{name}.weight_format": ("U8", ())}
    if scheme.layout == "int-quantized":
        return {f"{name}.weight": ("I8", (N, K)), f"{name}.weight_scale": (code, (N, 1))}
    if scheme.layout == "rounded":
        return {f"{name}.weight": (code, (N, K))}
    return {f"{name}.weight_packed": ("I32", (N, -(-K * scheme.bits // 32))),
            f"{name}.weight_scale": (code, (N, scheme.groups(K))), f"{name}.weight_shape": ("I64", (2,))}


def state_of(shape):
    """The bytes of bitsandbytes' description of an NF4 tensor."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(shape)}
    return json.dumps(state).encode()


def fixed_tensors(name, shape, scheme):
    """Those of `tensors_of` that are of the whole matrix (N, K), not of its rows."""
    if scheme.name == "nf4":
        state = torch.frombuffer(bytearray(state_of(shape)), dtype=torch.uint8)
        return {f"{name}.weight.quant_map": torch.tensor(NF4),
                f"{name}.weight.quant_state.bitsandbytes__nf4": state}
    if scheme.name == "llm-int8":
        return {f"{name}.weight_format": torch.zeros((), dtype=torch.uint8)}
    return {f"{name}.weight_shape": torch.tensor(shape)} if scheme.layout == "pack-quantized" else {}


def check_tensors(name, found, shape, scheme):
    """ValueError for tensors of a folder that say something else than its scheme, or have impossible scales.

    The dtype in bitsandbytes' description is that of the unpacked weight, which is chosen anew here."""
    for each, wanted in fixed_tensors(name, shape, scheme).items():
        same = torch.equal(found[each], wanted)
        if each.endswith("nf4"):
            text = bytes(found[each].tolist()).decode(errors="replace")
            same = re.sub('"dtype": "[a-z0-9]*"', '"dtype": "float32"', text).encode() == state_of(shape)
        if not same:
            raise ValueError(f"{each} does not say what the scheme {scheme.name} and the shape {(*shape,)} "
                             "do; copy or download it again")
    for each in (f"{name}.weight_scale", f"{name}.SCB", f"{name}.weight.absmax"):
        if each in found and not (found[each].isfinite() & (found[each] >= 0)).all():
            raise ValueError(f"{each} holds scales that are negative or not finite; quantize the model again")


def tensors_of(name, codes, scales, scheme):
    """{tensor name: tensor} of `specs_of` but for `fixed_tensors`, the scales still in fp32. Of some rows
    they are those rows of the tensors."""
    if scheme.name == "nf4":
        flat = codes.flatten().to(torch.uint8)
        return {f"{name}.weight": (flat[::2] << 4 | flat[1::2])[:, None],
                f"{name}.weight.absmax": scales.flatten()}
    if scheme.name == "llm-int8":
        return {f"{name}.weight": codes, f"{name}.SCB": scales[:, 0] * scheme.largest}
    if scheme.layout == "int-quantized":
        return {f"{name}.weight": codes, f"{name}.weight_scale": scales}
    if scheme.layout == "rounded":
        return {f"{name}.weight": dequantize(codes, scales, scheme)}
    return {f"{name}.weight_packed": pack(codes, scheme.bits), f"{name}.weight_scale": scales}


def from_tensors(name, found, shape, scheme):
    """(codes (N, K), scales (N, G)) of the tensors of a folder."""
    if scheme.name == "nf4":
        pairs = found[f"{name}.weight"].flatten()
        codes = torch.stack((pairs >> 4, pairs & 15), 1).view(shape).to(torch.int8)
        return codes, found[f"{name}.weight.absmax"].view(shape[0], -1)
    if scheme.name == "llm-int8":
        return found[f"{name}.weight"], found[f"{name}.SCB"][:, None] / scheme.largest
    if scheme.layout == "int-quantized":
        return found[f"{name}.weight"], found[f"{name}.weight_scale"]
    return unpack(found[f"{name}.weight_packed"], scheme.bits, shape[1]), found[f"{name}.weight_scale"]
