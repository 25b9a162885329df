"""Merging as pure tensor functions: the same parameter tensor of several models in, one merged fp32 tensor out.

linear           model soups (arXiv 2203.05482) with weights: the operator that Aya Expanse uses after every stage
slerp            spherical interpolation of two models (Shoemake 1985; as an operator on models: arXiv 2410.10801)
task_arithmetic  base + lambda * sum of task vectors, tau_i = theta_i - base (arXiv 2212.04089, section 2)
model_stock      base + t * (average - base), t from the angle between the task vectors (arXiv 2403.19522)
ties             task vectors trimmed, a sign elected, those that agree averaged (arXiv 2306.01708, algorithm 1)
dare_linear      task vectors dropped at random and rescaled (arXiv 2311.03099), then task_arithmetic; or
dare_ties        the last two steps of ties

Two families. The first four are a weighted sum of the models, whose weights may come from the tensor's inner products. The last three are
one pipeline with two switches: what makes a task vector sparse (trim, drop), and what combines them (a sum; an elected sign and a mean).

A tensor is merged in pieces, so memory does not grow with it. Each method takes `over`, which runs a function work(start, tensors) on all
pieces (over(work, every=n): on each n-th) and yields what it returns, for what must be known of the whole tensor (inner products,
thresholds); it returns such a function, which merges one piece. tensors: the N models' pieces and then the base's, if the method has one, flat, in
their own floating dtypes; start: the first's place.

All arithmetic is fp32: accumulated in bf16, an average of 3 to 7 copies of one model differs from it in 13-52% of its weights. Models are
summed, not their differences from the base, wherever the base cancels: a weight far smaller than the base's would lose its digits.

convention: "paper", or "mergekit" where mergekit 0.1.5 does otherwise; each function says how. Weights in ties and dare_ties are ours.
"""

import hashlib
import math
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F


def merge(method, tensors, base=None, **settings):
    """A method on whole tensors in memory, any shape and floating dtype -> fp32. What merge_folders does piece by piece."""
    inputs = [tensor.flatten() for tensor in [*tensors, *([] if base is None else [base])]]
    return method(lambda work, every=1: [work(0, inputs)], **settings)(0, inputs).view(tensors[0].shape)


# ---- weighted sums -----------------------------------------------------------------------------------------------------------------

def fp32(tensors):
    return [tensor.float() for tensor in tensors]


def weighted_sum(tensors, weights):
    """sum_i w_i x_i, fp32. torch widens a tensor in half precision exactly as it adds it, for less than a copy."""
    total = tensors[0].float() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def linear(over, weights, normalize=True):
    """theta = sum_i a_i theta_i with sum_i a_i = 1 (arXiv 2410.10801; equal weights: the uniform soup of 2203.05482).

    normalize: divide the weights by their sum first; without it they are taken as they are.
    """
    scale = sum(weights) if normalize else 1.0
    return lambda start, tensors: weighted_sum(tensors, [weight / scale for weight in weights])


def task_arithmetic(over, weights, lam=1.0, normalize=False):
    """theta = base + lambda * sum_i w_i tau_i (arXiv 2212.04089, section 2: addition; a negative weight is its negation)."""
    scale = lam / (sum(weights) if normalize else 1.0)
    return lambda start, tensors: weighted_sum(tensors, [scale * weight for weight in weights] + [1 - scale * sum(weights)])


def gram(vectors):
    """Inner products of N vectors, (N, N), in fp64: fp32 sums of 20 million squares were seen to be off by 1e-3. Adds up over pieces."""
    stacked = torch.stack(vectors).double()             # (N, elements)
    return stacked @ stacked.T


def total(over, work, every=1):
    """The sum of work(start, tensors) over all pieces, or each `every`-th."""
    return reduce(torch.add, over(work, every))


def slerp(over, t, convention="paper"):
    """theta = sin((1-t)W)/sin(W) theta_1 + sin(tW)/sin(W) theta_2, W = angle between the two tensors, radians; t=0 is the first, 1 the second.

    Near-parallel tensors, whose arc is the straight line to within fp32, exactly opposite ones, which have no single arc, and zeros,
    which have no angle, are interpolated linearly (mergekit: all whose cosine is beyond 0.9995, as that of most models with one base).
    """
    (aa, ab), (_, bb) = total(over, lambda start, tensors: gram(tensors)).tolist()
    cosine = ab / math.sqrt(aa * bb) if aa * bb > 0 else 1.0
    if convention == "paper" and cosine < NEARLY_OPPOSITE:
        return slerp_of_opposite(over, t, math.sqrt(aa), math.sqrt(bb))
    sine = math.sqrt(max(0.0, 1 - cosine ** 2))
    weights = [1 - t, t]
    if sine > (1e-4 if convention == "paper" else math.sqrt(1 - 0.9995 ** 2)):          # lerp and slerp differ by at most angle^2 / 8 near 0
        angle = math.atan2(sine, cosine)
        weights = [math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine]
    return lambda start, tensors: weighted_sum(tensors, weights)


NEARLY_OPPOSITE = -0.99


def slerp_of_opposite(over, t, length_a, length_b):
    """`slerp` where 1 + cos(W) has lost its digits: W from the lengths of the sum and the difference of the
    unit vectors, and fp64 throughout.

    |u + v| = 2 cos(W/2) and |u - v| = 2 sin(W/2). The two weights are large and nearly cancel: in fp32 so
    would the result's digits.
    """
    def squares(start, tensors):
        u, v = tensors[0].double() / length_a, tensors[1].double() / length_b
        return torch.stack([(u + v).square().sum(), (u - v).square().sum()])

    together, apart = total(over, squares).sqrt().tolist()
    if together < 1e-6:                 # opposite to within the rounding of fp32 weights
        weights = [1 - t, t]
    else:
        angle, sine = 2 * math.atan2(apart, together), together * apart / 2
        weights = [math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine]
    return lambda start, tensors: (tensors[0].double() * weights[0]
                                   + tensors[1].double() * weights[1]).float()


def model_stock(over, convention="paper"):
    """theta = t * mean_i theta_i + (1 - t) * base, t = N cos / (1 + (N - 1) cos), cos the mean over pairs of task vectors (arXiv 2403.19522, section 4).

    The paper's picture has acute angles; where the mean cosine of a tensor is not above 0, it stays the base's (mergekit extrapolates).
    """
    products = total(over, lambda start, tensors: gram(task_vectors(tensors)))          # (N, N)
    num, lengths = len(products), products.diagonal().sqrt().clamp(min=1e-300)
    cosines = products / torch.outer(lengths, lengths)
    cosine = (cosines.sum() - cosines.trace()).item() / max(1, num * (num - 1))
    t = num * cosine / (1 + (num - 1) * cosine) if cosine > 0 or convention == "mergekit" else 0.0
    return lambda start, tensors: weighted_sum(tensors, [t / num] * num + [1 - t])


# ---- sparse task vectors -----------------------------------------------------------------------------------------------------------

def task_vectors(tensors):
    """tau_i = theta_i - base (arXiv 2212.04089, section 2), fp32."""
    *models, base = fp32(tensors)
    return [model - base for model in models]


BINS = 1 << 16              # of a count; with the 15 bits that a coarse one leaves out, the 31 bits of a magnitude
COARSE = 15                 # bits
SAMPLED = 64                # each 64th piece is enough to guess where a threshold lies


def count_magnitudes(delta, first=0, shift=COARSE):
    """How many |delta|, their bits read as integers, are below `first`; in each of BINS bins of width 2^shift from there on; above. (BINS + 2,), adds up.

    The bits of fp32 numbers that are not negative, read as integers, are in the order of the numbers.
    """
    bits = delta.abs().view(torch.int32).sub_(first - (1 << shift))
    return torch.bincount((bits >> shift if shift else bits).clamp_(0, BINS + 1), minlength=BINS + 2)


def place_of(counts, rank):
    """The bin that holds the number of this rank; rank 0 is the smallest."""
    return torch.searchsorted(counts.cumsum(0), rank, right=True).item()


def thresholds(over, density):
    """For each model the least |tau| that belongs to the largest, a share `density` of them: exact, and mostly in one counting pass, without a sort.

    Coarse bins of some of the pieces say about where it lies, fine ones there, of all pieces, what it is. Should it lie elsewhere, coarse bins
    of all pieces say where. over: the pieces of one tensor, or of all tensors. density: one for each model.
    """
    def places(firsts, shift, every=1):
        counts = total(over, lambda start, tensors: torch.stack([count_magnitudes(tau, first, shift) for tau, first in zip(task_vectors(tensors), firsts)]), every)
        size = counts[0].sum().item()                   # counts: (N, BINS + 2)
        return [place_of(row, size - max(1, int(share * size))) for row, share in zip(counts, density, strict=True)]

    for every in (SAMPLED, 1):
        firsts = [(place - 1 << COARSE) - BINS // 4 for place in places([0] * len(density), COARSE, every)]        # half a coarse bin before
        found = places(firsts, 0)
        if all(1 <= place <= BINS for place in found):
            break
    return torch.tensor([first + place - 1 for first, place in zip(firsts, found)], dtype=torch.int32).view(torch.float32).tolist()


def trim(delta, threshold):
    """TIES step 1 (arXiv 2306.01708, algorithm 1, "keep top-k"): zero all |delta| below the threshold.

    Entries equal to it all stay, so the result does not depend on their order (mergekit keeps just so many; bf16 has few distinct values).
    """
    return F.hardshrink(delta, np.nextafter(np.float32(threshold), np.float32(-1)).item())      # keeps what is above; 10x as fast as where


DRAWS = 1 << 16             # DARE's densities are multiples of 1 / DRAWS


def bernoulli(size, chances, generator):
    """`size` bytes, 1 with a probability of chances / DRAWS, else 0; 64 at once from numpy's raw words.

    With the digits of the probability, in base 2, from the last on: m or r has (1 + p) / 2 where m has p, m and r has p / 2, r a random bit.
    """
    words = np.full((size + 63) // 64, -(chances == DRAWS), np.int64)
    for digit in reversed(f"{chances % DRAWS:016b}".rstrip("0")):
        combine = np.bitwise_or if digit == "1" else np.bitwise_and
        combine(words, generator.random_raw(len(words)).view(np.int64), out=words)
    return np.unpackbits(words.view(np.uint8), count=size)


def drop(delta, density, seed, name, start=0):
    """DARE's m * delta, m ~ Bernoulli(density) (arXiv 2311.03099, 1 - p = density), not yet rescaled. density: a multiple of 1 / DRAWS.

    m comes from the seed, the tensor's name and place and the delta's own bits: the same however the files are sharded, wherever they
    lie, and in whatever order the models are given. SFC64's raw stream is the same in all versions of numpy and on all devices.
    """
    size = len(delta)
    content = delta[:size // 2 * 2].view(torch.int64).sum().item() + delta[-1:].view(torch.int32).item()      # by twos: 6x as fast as by ones
    key = hashlib.sha256(f"{seed} {name} {start} {content}".encode()).digest()
    mask = bernoulli(size, round(density * DRAWS), np.random.SFC64(int.from_bytes(key[:16], "little")))
    return torch.from_numpy(mask).to(delta).mul_(delta)


def sparse_merge(sparse, tensors, weights, scales, lam, normalize, elected, convention):
    """theta = base + lambda * sum_{i in A} w_i s_i tau_i / W, for each parameter.

    A: the models whose sparse tau_i is not 0 and, if `elected`, has the sign gamma = sgn(sum_i tau_i) (TIES steps 2 and 3); a sum of exactly
    0 elects no sign. The weights (w_i >= 0) take no part in the election, but a model of weight 0 has no vote.
    mergekit: sgn(sum_i w_i tau_i), and 0 elects +. W: 1; if `normalize`, sum_{i in A} w_i if `elected`, else sum_i w_i (mergekit's).
    """
    *models, base = tensors
    if elected:
        votes = [scale * (weight if convention == "mergekit" else weight > 0) for weight, scale in zip(weights, scales)]
        gamma = weighted_sum(sparse, votes)
        gamma = (gamma >= 0) * 2.0 - 1 if convention == "mergekit" else gamma.sign_()
    merged, mass = torch.zeros_like(base), torch.zeros_like(base)
    one_scale = len(set(scales)) == 1                   # then moved = scale * mass
    moved = None if one_scale else torch.zeros_like(base)
    for model, delta, weight, scale in zip(models, sparse, weights, scales, strict=True):
        agrees = delta.sign_().mul_(gamma).clamp_(min=0) if elected else delta.sign_().abs_()       # 1 or 0: the model is in A
        merged.addcmul_(model, agrees, value=lam * weight * scale)
        mass.add_(agrees, alpha=weight)
        if not one_scale:
            moved.add_(agrees, alpha=weight * scale)
    if one_scale:
        moved, lam = mass, lam * scales[0]
    if normalize:                                       # where A is empty, 0 / the least of the weights
        divisor = mass.clamp(min=min(weight for weight in weights if weight > 0)) if elected else sum(weights)
        merged, moved = merged.div_(divisor), moved.div_(divisor)
    return merged.addcmul_(torch.rsub(moved, 1, alpha=lam), base)                       # lambda/W * sum w s theta + (1 - lambda/W * sum w s) base


def ties(over, weights, density, lam=1.0, normalize=True, limits=None, convention="paper"):
    """theta = base + lambda * tau: trim, elect sign, disjoint mean (arXiv 2306.01708, algorithm 1; defaults of the paper: top 20%, lambda 1).

    limits: the thresholds; None: this tensor's own, as in mergekit (the paper trims the task vector of the whole model).
    """
    limits = thresholds(over, density) if limits is None else limits

    def piece(start, tensors):
        tensors = fp32(tensors)
        sparse = [trim(delta, limit) for delta, limit in zip(task_vectors(tensors), limits, strict=True)]
        return sparse_merge(sparse, tensors, weights, [1.0] * len(weights), lam, normalize, True, convention)
    return piece


def dare_linear(over, weights, density, lam=1.0, normalize=False, seed=0, name="", convention="paper", elected=False):
    """theta = base + lambda * sum_i w_i m_i tau_i / density: DARE, then task arithmetic (arXiv 2311.03099).

    The density is rounded to 1 / DRAWS, in the mask and in the division, so that the mean over masks stays the task vector.
    mergekit rescales so that the sum of magnitudes in each tensor stays what it was, where the paper divides by the density.
    """
    density = [max(1, round(share * DRAWS)) / DRAWS for share in density]

    def dropped(start, tensors):
        return [drop(delta, share, seed, name, start) for delta, share in zip(task_vectors(tensors), density, strict=True)]

    scales = [1 / share for share in density]
    if convention == "mergekit":
        sums = total(over, lambda start, tensors: torch.stack([torch.stack([delta.abs().sum(dtype=torch.float64) for delta in deltas])
                                                               for deltas in (task_vectors(tensors), dropped(start, tensors))]))
        scales = [before / after if after > 0 else 1.0 for before, after in sums.T.tolist()]

    def piece(start, tensors):
        tensors = fp32(tensors)
        return sparse_merge(dropped(start, tensors), tensors, weights, scales, lam, normalize, elected, convention)
    return piece


def dare_ties(over, weights, density, lam=1.0, normalize=True, seed=0, name="", convention="paper"):
    """DARE in the place of TIES's trim, then elect sign and disjoint mean.

    That is what merging tools, and so arXiv 2410.10801, call DARE-TIES. The DARE paper runs it before all of TIES, trimming included.
    """
    return dare_linear(over, weights, density, lam, normalize, seed, name, convention, elected=True)
