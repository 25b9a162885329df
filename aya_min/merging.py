"""Merging as pure tensor functions: the same parameter tensor of several models in, one merged fp32 tensor out.

linear          model soups (arXiv 2203.05482) with weights: the operator that Aya Expanse uses after every stage
slerp           spherical interpolation of two models (Shoemake 1985; as an operator on models: arXiv 2410.10801)
task_arithmetic base + lambda * sum of task vectors, tau_i = theta_i - base (arXiv 2212.04089, section 2)
ties            the same with trimming and an elected sign (arXiv 2306.01708, algorithm 1)
dare_linear     task_arithmetic, and
dare_ties       ties, with random drop-and-rescale (arXiv 2311.03099) in the place of trimming

The last four are one pipeline with two switches: what makes a task vector sparse (nothing, trim, dare), and what combines
the task vectors (a weighted sum; an elected sign and the mean of those that agree).

Input tensors may be of any floating dtype; all arithmetic is fp32, and what leaves here is fp32: accumulated in bf16, an average of 3
to 7 copies of one model differs from that model in 13-52% of its weights.

Departure from the papers: TIES trims the task vector of the whole model, here each tensor is trimmed by itself, because tensors are
merged one at a time. The weights are ours too: TIES and DARE have none, that is, all 1.
"""

import hashlib
import math

import numpy as np
import torch


def weighted_sum(tensors, weights):
    """sum_i w_i x_i in fp32. tensors: N tensors of one shape, any dtype; weights: N numbers."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)                       # widened to fp32 on the fly: no fp32 copy of the input
    return total


def linear(tensors, weights, normalize=True):
    """Weighted average, theta = sum_i a_i theta_i with sum_i a_i = 1 (arXiv 2410.10801; equal weights: the uniform soup of 2203.05482).

    normalize: divide the weights by their sum first; without it they are taken as they are.
    """
    scale = sum(weights) if normalize else 1.0
    assert scale != 0, f"weights {weights} sum to 0"
    return weighted_sum(tensors, [weight / scale for weight in weights])


def norm(tensor):
    """Euclidean length as a Python float, added up in fp64: fp32 sums of 20 million squares were seen to be off by 1e-3."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def slerp(first, second, t):
    """Spherical interpolation (Shoemake 1985) of two tensors seen as vectors; t=0 is the first, t=1 the second.

    theta = sin((1-t)W)/sin(W) theta_1 + sin(tW)/sin(W) theta_2, W = angle between the two, radians. Near-parallel tensors, whose arc
    is the straight line to within fp32, exactly opposite ones, which have no single arc, and zeros, which have no angle, are
    interpolated linearly.
    """
    first, second = first.float(), second.float()
    lengths = norm(first), norm(second)
    sine = 0.0
    if all(lengths):
        u, v = first / lengths[0], second / lengths[1]
        angle = 2 * math.atan2(norm(u - v), norm(u + v))       # exact near 0 and pi too, where arccos of a dot product is not
        sine = math.sin(angle)
    if sine < 1e-4:                                            # lerp and slerp differ by at most angle^2 / 8 near 0
        return weighted_sum([first, second], [1 - t, t])
    return weighted_sum([first, second], [math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine])


def task_vectors(tensors, base):
    """tau_i = theta_i - theta_base (arXiv 2212.04089, section 2), fp32."""
    return [tensor.float() - base.float() for tensor in tensors]


def task_arithmetic(tensors, base, weights, lam=1.0):
    """theta = theta_base + lambda * sum_i w_i tau_i (arXiv 2212.04089, section 2: addition; a negative weight is its negation)."""
    return base.float() + lam * weighted_sum(task_vectors(tensors, base), weights)


def trim(delta, density):
    """TIES step 1 (arXiv 2306.01708, algorithm 1, "keep top-k"): zero all but the largest |delta|, a share `density` of them, at least one.

    The threshold is the exact k-th largest magnitude, found by selection in linear time. Entries equal to it all stay, so the
    result does not depend on their order (and bf16 task vectors, which have few distinct values, keep somewhat more than asked).
    """
    num_dropped = delta.numel() - max(1, round(density * delta.numel()))
    if num_dropped <= 0:
        return delta
    magnitude = delta.abs()
    threshold = np.partition(magnitude.flatten().numpy(), num_dropped)[num_dropped]    # 15x as fast as torch.kthvalue on a CPU
    return torch.where(magnitude >= threshold.item(), delta, 0.0)


def elect_and_average(deltas, weights):
    """TIES steps 2 and 3 (arXiv 2306.01708, algorithm 1): elect a sign for each parameter, average the deltas that have it.

    gamma = sgn(sum_i delta_i), A = {i: sgn(delta_i) = gamma}, tau = sum_{i in A} w_i delta_i / sum_{i in A} w_i, and 0 where A is empty.
    A sum of exactly 0 elects no sign and leaves 0, as the formula says. The weights (not in the paper; w_i >= 0) take no part in
    the election, except that a model of weight 0 has no vote.
    """
    elected = weighted_sum(deltas, [float(weight > 0) for weight in weights]).sign()
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta * elected > 0
        total.add_(delta * agrees, alpha=weight)
        mass.add_(agrees, alpha=weight)
    return torch.where(mass > 0, total / mass, 0.0)


def ties(tensors, base, weights, density=0.2, lam=1.0):
    """theta = theta_base + lambda * tau: trim, elect sign, disjoint mean (arXiv 2306.01708, algorithm 1; defaults: top 20%, lambda 1)."""
    trimmed = [trim(delta, density) for delta in task_vectors(tensors, base)]
    return base.float() + lam * elect_and_average(trimmed, weights)


def mask_generator(seed, name, delta):
    """The generator of one model's DARE mask for one tensor, from the seed, the tensor's name and the delta's own bits.

    So the mask is the same however the files are sharded, wherever they lie, and in whatever order the models are given.
    """
    content = delta.contiguous().view(torch.int32).sum(dtype=torch.int64).item()
    key = hashlib.sha256(f"{seed} {name} {content}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))


def dare(delta, density, seed, name):
    """DARE (arXiv 2311.03099): m ~ Bernoulli(p), delta~ = (1 - m) * delta, delta^ = delta~ / (1 - p), with 1 - p = density.

    So the expectation over masks is delta. `name` is the tensor's; see mask_generator.
    """
    keep = torch.rand(delta.shape, generator=mask_generator(seed, name, delta)) < density
    return delta * keep / density


def dare_linear(tensors, base, weights, density=0.5, lam=1.0, seed=0, name=""):
    """theta = theta_base + lambda * sum_i w_i dare(tau_i): DARE, then task arithmetic (arXiv 2311.03099)."""
    dropped = [dare(delta, density, seed, name) for delta in task_vectors(tensors, base)]
    return base.float() + lam * weighted_sum(dropped, weights)


def dare_ties(tensors, base, weights, density=0.5, lam=1.0, seed=0, name=""):
    """theta = theta_base + lambda * tau: DARE in the place of TIES's trim, then elect sign and disjoint mean.

    That is what merging tools, and so arXiv 2410.10801, call DARE-TIES. The DARE paper runs it before all of TIES, trimming included.
    """
    dropped = [dare(delta, density, seed, name) for delta in task_vectors(tensors, base)]
    return base.float() + lam * elect_and_average(dropped, weights)
