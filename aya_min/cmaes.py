"""CMA-ES, a search without gradients: draw points from a Gaussian, keep the best half, then move and reshape
the Gaussian towards them.

It follows Hansen's tutorial (arXiv 1604.00772, figure 6 and table 1) with the default constants and negative
weights. Here values are maximised. Two functions, ask and tell, share a State of plain numbers. The draws
come from (seed, generation), so the same asks and tells give the same search.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class State:
    """The Gaussian N(mean, sigma^2 C) over n coordinates, and what the next update needs."""
    mean: np.ndarray            # (n,)
    sigma: float                # step size, in the units of the coordinates
    C: np.ndarray               # (n, n), symmetric
    path_sigma: np.ndarray      # (n,) evolution path of the step size, in coordinates where C is the identity
    path_c: np.ndarray          # (n,) evolution path of C
    generation: int = 0


def start(mean, sigma):
    """The State before the first generation. mean: (n,)."""
    n = len(mean)
    return State(np.array(mean, dtype=float), sigma, np.eye(n), np.zeros(n), np.zeros(n))


def default_popsize(n):
    """Table 1's number of points in a generation."""
    return 4 + int(3 * math.log(n))


def constants(n, popsize):
    """Table 1: (weights (popsize,), mu, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu). c_m is 1."""
    raw = math.log((popsize + 1) / 2) - np.log(np.arange(1, popsize + 1))   # (popsize,), the best point first
    mu = popsize // 2
    mu_eff, mu_eff_negative = (part.sum() ** 2 / (part ** 2).sum() for part in (raw[:mu], raw[mu:]))
    c_sigma = (mu_eff + 2) / (n + mu_eff + 5)
    d_sigma = 1 + 2 * max(0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma
    c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)
    c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)
    c_mu = min(1 - c_1, 2 * (1 / 4 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff))
    # what the negative weights may sum to, without their sign
    most = min(1 + c_1 / c_mu, 1 + 2 * mu_eff_negative / (mu_eff + 2), (1 - c_1 - c_mu) / (n * c_mu))
    weights = np.where(raw >= 0, raw / raw[raw > 0].sum(), most * raw / -raw[raw < 0].sum())
    return weights, mu, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu


def roots(C):
    """C^(1/2) and C^(-1/2), both symmetric: B D B^T and B D^-1 B^T of the tutorial."""
    squares, B = np.linalg.eigh(C)
    D = np.sqrt(np.maximum(squares, 1e-20))
    return (B * D) @ B.T, (B / D) @ B.T


def ask(state, seed, popsize):
    """The points of the next generation, (popsize, n)."""
    z = np.random.default_rng([seed, state.generation]).standard_normal((popsize, len(state.mean)))
    return state.mean + state.sigma * z @ roots(state.C)[0]


def tell(state, points, values):
    """The next State. points: those of a generation, (popsize, n); values: (popsize,), larger is better."""
    popsize, n = points.shape
    weights, mu, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu = constants(n, popsize)
    inverse = roots(state.C)[1]                                         # C^(-1/2)
    t = state.generation + 1
    best_first = np.argsort(-np.asarray(values), kind="stable")
    y = ((points - state.mean) / state.sigma)[best_first]               # (popsize, n)
    step = weights[:mu] @ y[:mu]                                        # (n,)

    path_sigma = ((1 - c_sigma) * state.path_sigma
                  + math.sqrt(c_sigma * (2 - c_sigma) * mu_eff) * inverse @ step)
    length = np.linalg.norm(path_sigma)
    usual = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))         # E |N(0, I)|
    # h = 0 stalls path_c while the steps are long
    h = float(length / math.sqrt(1 - (1 - c_sigma) ** (2 * t)) < (1.4 + 2 / (n + 1)) * usual)
    path_c = (1 - c_c) * state.path_c + h * math.sqrt(c_c * (2 - c_c) * mu_eff) * step

    # the scale of the negative weights keeps C positive definite
    scaled = np.where(weights >= 0, weights, weights * n / np.maximum(((y @ inverse) ** 2).sum(1), 1e-20))
    C = ((1 + c_1 * (1 - h) * c_c * (2 - c_c) - c_1 - c_mu * weights.sum()) * state.C
         + c_1 * np.outer(path_c, path_c) + c_mu * (y.T * scaled) @ y)
    sigma = float(state.sigma * math.exp(c_sigma / d_sigma * (length / usual - 1)))
    return State(state.mean + state.sigma * step, sigma, (C + C.T) / 2, path_sigma, path_c, t)
