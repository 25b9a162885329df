"""Merging as pure tensor functions: one parameter tensor of several models in, one merged fp32 tensor out.

linear           weighted model soups (arXiv 2203.05482): the operator that Aya Expanse uses after every stage
slerp            spherical interpolation of two models (Shoemake 1985; applied to models in arXiv 2410.10801)
task_arithmetic  base + lambda * sum of task vectors, tau_i = theta_i - base (arXiv 2212.04089, section 2)
model_stock      base + t * (average - base), t from the angle between the task vectors (arXiv 2403.19522)
ties             trim the task vectors, elect a sign, average those that agree (arXiv 2306.01708, algorithm 1)
dare_linear      drop entries of task vectors at random, rescale (arXiv 2311.03099), then task_arithmetic
dare_ties        drop and rescale in the same way, then the last two steps of ties

linear, slerp, task_arithmetic and model_stock are weighted sums of the models, whose weights may depend on
inner products over the tensor. ties, dare_linear and dare_ties share one pipeline: make the task vectors
sparse (trim or drop), then combine them (a plain sum, or the mean of those that have the elected sign).

Tensors are merged in pieces, so memory does not grow with their size. A method is called with `over_pieces`
and its settings, and has two phases. It may first scan the tensor: over_pieces(work) calls
work(start, tensors) on every piece and yields the results (over_pieces(work, every=n): on every n-th piece).
Then it returns merge_piece(start, tensors), which is called on each piece. merge_config.METHODS declares
whether a method scans. tensors: the pieces of the N models, then the base's if the method takes a base; flat,
each in its own floating dtype. start: index of the piece's first element.

An infinity or NaN of any model must come out as one: merge_folders looks for it in the result alone. (A
median would lose it.)

All arithmetic is fp32. Accumulated in bf16, the average of 3 to 7 copies of one model differs from that model
in 13-52% of its weights. Where the base cancels, models are summed instead of their differences from the
base: a weight far smaller than the base's would lose its digits.

convention: "paper", or "mergekit" where mergekit 0.1.5 does something else; each function says what. The
weights in ties and dare_ties are ours.
"""

import hashlib
import math
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F


def merge(method, tensors, base=None, **settings):
    """Apply a method to whole tensors in memory: any shape and floating dtype in, fp32 of the same shape out.

    merge_folders.py does the same piece by piece.
    """
    inputs = [tensor.flatten() for tensor in tensors]
    if base is not None:
        inputs.append(base.flatten())

    def over_pieces(work, every=1):
        return [work(0, inputs)]
    return method(over_pieces, **settings)(0, inputs).view(tensors[0].shape)


# ---- weighted sums -----------------------------------------------------------------------------------------

def fp32(tensors):
    return [tensor.float() for tensor in tensors]


def weighted_sum(tensors, weights):
    """sum_i w_i x_i in fp32. torch widens half precision exactly as it adds, which is cheaper than a copy."""
    total = tensors[0].float() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def linear(over_pieces, weights, normalize=True):
    """theta = sum_i a_i theta_i with sum_i a_i = 1 (arXiv 2410.10801).

    Equal weights give the uniform soup of arXiv 2203.05482.
    normalize: divide the weights by their sum first; without it they are used as given.
    """
    scale = sum(weights) if normalize else 1.0
    return lambda start, tensors: weighted_sum(tensors, [weight / scale for weight in weights])


def task_arithmetic(over_pieces, weights, lam=1.0, normalize=False):
    """theta = base + lambda * sum_i w_i tau_i (arXiv 2212.04089, section 2). A negative w_i negates."""
    scale = lam / (sum(weights) if normalize else 1.0)
    scaled = [scale * weight for weight in weights]
    base_weight = 1 - scale * sum(weights)
    return lambda start, tensors: weighted_sum(tensors, [*scaled, base_weight])


def gram(vectors):
    """Inner products of N vectors, (N, N), in fp64. The results of several pieces add up.

    fp32 sums of 20 million squares were seen to be off by 1e-3.
    """
    stacked = torch.stack(vectors).double()             # (N, elements)
    return stacked @ stacked.T


def sum_over(over_pieces, work, every=1):
    """The sum of work(start, tensors) over all pieces, or over every `every`-th piece."""
    return reduce(torch.add, over_pieces(work, every))


def slerp(over_pieces, t, convention="paper"):
    """theta = sin((1-t)W)/sin(W) theta_1 + sin(tW)/sin(W) theta_2, W the angle between the two tensors.

    W is in radians; t = 0 is the first model, t = 1 the second. Three cases are interpolated linearly: nearly
    parallel tensors (the arc is straight to within fp32), exactly opposite ones (no unique arc) and zeros
    (no angle).
    mergekit: linear for every cosine beyond 0.9995, which holds for most models with a common base.
    """
    (aa, ab), (_, bb) = sum_over(over_pieces, lambda start, tensors: gram(tensors)).tolist()
    cosine = ab / math.sqrt(aa * bb) if aa * bb > 0 else 1.0
    if convention == "paper" and cosine < NEARLY_OPPOSITE:
        return slerp_of_opposite(over_pieces, t, math.sqrt(aa), math.sqrt(bb))
    sine = math.sqrt(max(0.0, 1 - cosine ** 2))
    # near angle 0, linear and spherical weights differ by at most angle^2 / 8
    smallest_sine = 1e-4 if convention == "paper" else math.sqrt(1 - 0.9995 ** 2)
    weights = [1 - t, t]
    if sine > smallest_sine:
        angle = math.atan2(sine, cosine)
        weights = [math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine]
    return lambda start, tensors: weighted_sum(tensors, weights)


NEARLY_OPPOSITE = -0.99     # cosine


def slerp_of_opposite(over_pieces, t, length_a, length_b):
    """`slerp` where 1 + cos(W) has lost its digits, in fp64 throughout.

    W comes from the sum and the difference of the unit vectors: |u + v| = 2 cos(W/2), |u - v| = 2 sin(W/2).
    Both weights are large and nearly cancel, so the result in fp32 would lose its digits too.
    """
    def squares(start, tensors):
        u = tensors[0].double() / length_a
        v = tensors[1].double() / length_b
        return torch.stack([(u + v).square().sum(), (u - v).square().sum()])

    sum_length, difference_length = sum_over(over_pieces, squares).sqrt().tolist()
    if sum_length < 1e-6:               # opposite to within the rounding of fp32 weights
        weights = [1 - t, t]
    else:
        angle = 2 * math.atan2(difference_length, sum_length)
        sine = sum_length * difference_length / 2
        weights = [math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine]
    return lambda start, tensors: (tensors[0].double() * weights[0]
                                   + tensors[1].double() * weights[1]).float()


def model_stock(over_pieces, convention="paper"):
    """theta = t * mean_i theta_i + (1 - t) * base, t = N cos / (1 + (N - 1) cos).

    arXiv 2403.19522, section 4; cos is the mean cosine over pairs of task vectors. The paper assumes acute
    angles; a tensor whose mean cosine is 0 or less keeps the base's values (mergekit extrapolates).
    """
    products = sum_over(over_pieces, lambda start, tensors: gram(task_vectors(tensors)))       # (N, N)
    num = len(products)
    lengths = products.diagonal().sqrt().clamp(min=1e-300)
    cosines = products / torch.outer(lengths, lengths)
    cosine = (cosines.sum() - cosines.trace()).item() / max(1, num * (num - 1))
    t = num * cosine / (1 + (num - 1) * cosine) if cosine > 0 or convention == "mergekit" else 0.0
    return lambda start, tensors: weighted_sum(tensors, [t / num] * num + [1 - t])


# ---- sparse task vectors -----------------------------------------------------------------------------------

def task_vectors(tensors):
    """tau_i = theta_i - base (arXiv 2212.04089, section 2), fp32."""
    *models, base = fp32(tensors)
    return [model - base for model in models]


# A magnitude has 31 bits: a coarse count looks at the upper 16, a fine count at all, in a narrow range.
BINS = 1 << 16
COARSE = 15                 # bits that a coarse count ignores
SAMPLED = 64                # a coarse count of every 64th piece is enough to guess where a threshold lies


def count_magnitudes(delta, first=0, shift=COARSE):
    """A histogram of |delta|, (BINS + 2,); the histograms of several pieces add up.

    The magnitudes are counted by their bits read as integers, which have the order of the numbers. Bin 0
    counts those below `first`, bins 1 to BINS have the width 2^shift, and the last bin counts those above.
    """
    bits = delta.abs().view(torch.int32).sub_(first - (1 << shift))
    bins = bits >> shift if shift else bits
    return torch.bincount(bins.clamp_(0, BINS + 1), minlength=BINS + 2)


def bin_of(counts, rank):
    """The bin that holds the number of this rank; rank 0 is the smallest number."""
    return torch.searchsorted(counts.cumsum(0), rank, right=True).item()


def thresholds(over_pieces, density):
    """For each model the smallest |tau| among the largest `density` share of them; exact, without a sort.

    A coarse count of some pieces guesses where the threshold lies; a fine count of all pieces around the
    guess finds it, mostly in one full scan. If the guess was wrong, a coarse count of all pieces replaces it.
    over_pieces: of one tensor, or of all tensors. density: one share for each model.
    """
    def find_bins(firsts, shift, every=1):
        def count(start, tensors):
            return torch.stack([count_magnitudes(tau, first, shift)
                                for tau, first in zip(task_vectors(tensors), firsts)])

        counts = sum_over(over_pieces, count, every)           # (N, BINS + 2)
        size = counts[0].sum().item()
        return [bin_of(row, size - max(1, int(share * size)))
                for row, share in zip(counts, density, strict=True)]

    for every in (SAMPLED, 1):
        coarse = find_bins([0] * len(density), COARSE, every)
        # the fine bins span two coarse ones and begin half a coarse bin early
        firsts = [(number - 1 << COARSE) - BINS // 4 for number in coarse]
        fine = find_bins(firsts, 0)
        if all(1 <= number <= BINS for number in fine):
            break
    bits = [first + number - 1 for first, number in zip(firsts, fine)]
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()


def trim(delta, threshold):
    """TIES step 1 (arXiv 2306.01708, algorithm 1, "keep top-k"): set all |delta| below the threshold to 0.

    All entries equal to the threshold stay, so the result does not depend on their order. mergekit keeps
    exactly k of them, which matters in bf16 with its few distinct values.
    """
    # hardshrink keeps what is strictly above its limit; 10x as fast as where
    return F.hardshrink(delta, np.nextafter(np.float32(threshold), np.float32(-1)).item())


DRAWS = 1 << 16             # DARE's densities are multiples of 1 / DRAWS


def bernoulli(size, chances, generator):
    """`size` bytes, each 1 with probability chances / DRAWS, else 0; 64 draws at once from numpy's raw words.

    Process the probability's binary digits from the least significant: OR with a random bit maps p to
    (1 + p) / 2, AND maps it to p / 2.
    """
    words = np.full((size + 63) // 64, -(chances == DRAWS), np.int64)
    for digit in reversed(f"{chances % DRAWS:016b}".rstrip("0")):
        combine = np.bitwise_or if digit == "1" else np.bitwise_and
        combine(words, generator.random_raw(len(words)).view(np.int64), out=words)
    return np.unpackbits(words.view(np.uint8), count=size)


def drop(delta, density, seed, name, start=0):
    """DARE's m * delta, m ~ Bernoulli(density) (arXiv 2311.03099, 1 - p = density), before the rescaling.

    density: a multiple of 1 / DRAWS. The mask depends on the seed, the tensor's name, the place in it and the
    delta's own bits; so it is the same for any sharding, any folder and any order of the models. SFC64's raw
    stream is the same in all versions of numpy and on all devices.
    """
    size = len(delta)
    # summed two floats at a time, 6x as fast as one by one; the last one again, for odd sizes
    content = delta[:size // 2 * 2].view(torch.int64).sum().item() + delta[-1:].view(torch.int32).item()
    key = hashlib.sha256(f"{seed} {name} {start} {content}".encode()).digest()
    mask = bernoulli(size, round(density * DRAWS), np.random.SFC64(int.from_bytes(key[:16], "little")))
    return torch.from_numpy(mask).to(delta).mul_(delta)


def sparse_merge(sparse, tensors, weights, scales, lam, normalize, elected, convention):
    """theta = base + lambda * sum_{i in A} w_i s_i tau_i / W, for each parameter.

    sparse: N sparse task vectors, overwritten here. tensors: N models and the base, fp32. scales: the s_i.
    A: the models whose sparse tau_i is not 0 and, if `elected`, has the sign gamma = sgn(sum_i tau_i) (TIES
    steps 2 and 3). A sum of exactly 0 elects no sign. The weights (w_i >= 0) do not count in the election,
    except that a model of weight 0 has no vote. mergekit: gamma = sgn(sum_i w_i tau_i), and 0 elects +.
    W: 1; if `normalize`, sum_{i in A} w_i where `elected`, else sum_i w_i (mergekit's).
    """
    *models, base = tensors
    if elected:
        votes = [scale * (weight if convention == "mergekit" else weight > 0)
                 for weight, scale in zip(weights, scales)]
        gamma = weighted_sum(sparse, votes)
        gamma = (gamma >= 0) * 2.0 - 1 if convention == "mergekit" else gamma.sign_()
    merged = torch.zeros_like(base)                     # sum_{i in A} w_i s_i theta_i
    mass = torch.zeros_like(base)                       # sum_{i in A} w_i
    one_scale = len(set(scales)) == 1                   # then moved = scale * mass
    moved = None if one_scale else torch.zeros_like(base)           # sum_{i in A} w_i s_i
    for model, delta, weight, scale in zip(models, sparse, weights, scales, strict=True):
        # 1 where the model is in A, else 0
        agrees = delta.sign_().mul_(gamma).clamp_(min=0) if elected else delta.sign_().abs_()
        merged.addcmul_(model, agrees, value=lam * weight * scale)
        mass.add_(agrees, alpha=weight)
        if not one_scale:
            moved.add_(agrees, alpha=weight * scale)
    if one_scale:
        moved = mass
        lam = lam * scales[0]
    if normalize:
        # where A is empty, the least weight stands in for W: 0 divided by it is 0
        divisor = mass.clamp(min=min(weight for weight in weights if weight > 0)) if elected else sum(weights)
        merged = merged.div_(divisor)
        moved = moved.div_(divisor)
    # the models' terms hold w s theta, not w s tau; so the base enters with 1 - lambda/W * sum w s
    return merged.addcmul_(torch.rsub(moved, 1, alpha=lam), base)


def ties(over_pieces, weights, density, lam=1.0, normalize=True, limits=None, convention="paper"):
    """theta = base + lambda * tau: trim, elect sign, disjoint mean (arXiv 2306.01708, algorithm 1).

    The paper's defaults: top 20%, lambda 1. limits: the thresholds of `ties_limits`, because the paper trims
    the task vector of the whole model; None: the thresholds of this tensor alone, as in mergekit.
    """
    limits = thresholds(over_pieces, density) if limits is None else limits

    def merge_piece(start, tensors):
        tensors = fp32(tensors)
        sparse = [trim(delta, limit) for delta, limit in zip(task_vectors(tensors), limits, strict=True)]
        return sparse_merge(sparse, tensors, weights, [1.0] * len(weights), lam, normalize, True, convention)
    return merge_piece


def ties_limits(over_pieces, density, **others):
    """The `limits` of ties in the paper's convention. over_pieces: of all tensors of the models."""
    return {"limits": thresholds(over_pieces, density)}


def dare_linear(over_pieces, weights, density, lam=1.0, normalize=False, seed=0, name="", convention="paper",
                elected=False):
    """theta = base + lambda * sum_i w_i m_i tau_i / density: DARE, then task arithmetic (arXiv 2311.03099).

    The density is rounded to 1 / DRAWS, in the mask and in the division, so the mean over masks is the task
    vector. mergekit: no division by the density; each tensor is rescaled to its sum of magnitudes before.
    """
    density = [max(1, round(share * DRAWS)) / DRAWS for share in density]

    def dropped(start, tensors):
        return [drop(delta, share, seed, name, start)
                for delta, share in zip(task_vectors(tensors), density, strict=True)]

    def magnitudes(start, tensors):
        return torch.stack([torch.stack([delta.abs().sum(dtype=torch.float64) for delta in deltas])
                            for deltas in (task_vectors(tensors), dropped(start, tensors))])        # (2, N)

    scales = [1 / share for share in density]
    if convention == "mergekit":
        sums = sum_over(over_pieces, magnitudes)
        scales = [before / after if after > 0 else 1.0 for before, after in sums.T.tolist()]

    def merge_piece(start, tensors):
        tensors = fp32(tensors)
        sparse = dropped(start, tensors)
        return sparse_merge(sparse, tensors, weights, scales, lam, normalize, elected, convention)
    return merge_piece


def dare_ties(over_pieces, weights, density, lam=1.0, normalize=True, seed=0, name="", convention="paper"):
    """DARE instead of TIES's trim, then elect sign and disjoint mean.

    Merging tools, and so arXiv 2410.10801, call this DARE-TIES. The DARE paper runs DARE before all of TIES,
    trimming included.
    """
    return dare_linear(over_pieces, weights, density, lam, normalize, seed, name, convention, elected=True)
