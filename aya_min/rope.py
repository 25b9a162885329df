"""Rotary position embeddings: the angles, with the scalings by which models reach beyond the length that they
were trained on, and the rotation of pairs. T tokens, H heads, D head width.

The scalings are those of transformers' modeling_rope_utils.py: linear (position interpolation, arXiv
2306.15595), llama3 (Llama 3.1), yarn (arXiv 2309.00071).
"""

import math

import torch


def rotary(config, positions, theta="rope_theta"):
    """cos and sin of the rotary angles, in fp32. positions (B, T) -> 2 x (B, T, 1, D/2).

    theta: the field of the config that holds it; rope_scaling belongs to rope_theta.
    """
    D = config.head_dim
    exponents = torch.arange(0, D, 2, device=positions.device, dtype=torch.float32)
    frequencies = getattr(config, theta) ** (-exponents / D)                # (D/2,)
    scaling, length = config.rope_scaling if theta == "rope_theta" else None, 1.0
    if scaling:
        scale = {"linear": linear, "llama3": llama3, "yarn": yarn}[scaling["rope_type"]]
        frequencies, length = scale(frequencies, config.rope_theta, **scaling)
    angles = (positions[..., None].float() * frequencies)[:, :, None]       # (B, T, 1, D/2)
    if length == 1:
        return angles.cos(), angles.sin()
    return angles.cos() * length, angles.sin() * length


def linear(frequencies, theta, rope_type, factor):
    """Every frequency is divided by the factor."""
    return frequencies / factor, 1.0


def llama3(frequencies, theta, rope_type, factor, low_freq_factor, high_freq_factor,
           original_max_position_embeddings):
    """Waves longer than original / low are divided by the factor, those shorter than original / high stay,
    and between the two a line joins both."""
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original length
    kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    kept = kept.clamp(0, 1)                                                 # (D/2,)
    return kept * frequencies + (1 - kept) * frequencies / factor, 1.0


def yarn(frequencies, theta, rope_type, factor, original_max_position_embeddings, beta_fast=32.0,
         beta_slow=1.0, attention_factor=None, mscale=None, mscale_all_dim=None, truncate=True,
         llama_4_scaling_beta=None):
    """Pairs that turn more than beta_fast times in the original length stay, those that turn less than
    beta_slow times are divided by the factor, and between the two a line over the pairs joins both. cos and
    sin are lengthened, so that attention stays as sharp."""
    D = 2 * len(frequencies)

    def pair_of(turns):
        return D * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def sharpness(scale):
        return 0.1 * scale * math.log(factor) + 1.0
    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    high += 0.001 if low == high else 0
    pairs = torch.arange(D // 2, device=frequencies.device, dtype=torch.float32)
    divided = ((pairs - low) / (high - low)).clamp(0, 1)                    # (D/2,)
    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = sharpness(mscale) / sharpness(mscale_all_dim) if both else sharpness(1)
    return frequencies / factor * divided + frequencies * (1 - divided), attention_factor


def growth(config, positions):
    """What queries are multiplied by, (..., 1, 1) for positions (...): 1 + beta ln(1 + floor(p / original)),
    so that attention stays as sharp over more tokens. None in a family where they do not grow."""
    if not config.family.grows:
        return None
    beta = config.rope_scaling["llama_4_scaling_beta"]
    lengths = positions // config.rope_scaling["original_max_position_embeddings"]
    return (1 + beta * torch.log(1 + lengths.float()))[..., None, None]


def rotate(x, cos, sin, interleaved=True):
    """Rotate pairs: x0 + i x1 -> (x0 + i x1)(cos + i sin). A pair are neighbours (interleaved, GPT-J style),
    or a number of the first half and the one D/2 behind it (GPT-NeoX style).

    x (B, T, H, D); cos, sin (B, T, 1, D/2).
    """
    if not interleaved:
        return rotate_halves(x.float(), *doubled(cos, sin)).to(x.dtype)
    pairs = x.float().unflatten(-1, (-1, 2))                                # (B, T, H, D/2, 2)
    if torch.compiler.is_compiling():
        # Inductor fuses real products but does not support complex numbers.
        x0, x1 = pairs.unbind(-1)
        rotated = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1)
    else:
        # Complex numbers take a fifth of the time in eager mode on a CPU.
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return rotated.flatten(-2).to(x.dtype)


def doubled(cos, sin):
    """cos and sin as rotate_halves takes them. 2 x (..., D/2) -> 2 x (..., D)."""
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate_halves(x, cos, sin):
    """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for halves x0 and x1. cos, sin: of doubled().

    torch.addcmul rounds once or twice, as the shape has it; then a row's bits would depend on the batch.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
