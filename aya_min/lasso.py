"""The lasso (Tibshirani, 1996) by coordinate descent, from sums over examples, without the examples.

    minimise over b0, b:  1/(2 N) sum_i (y_i - b0 - x_i b)^2  +  alpha sum_j |b_j|

This is the scale of alpha in scikit-learn. The sums of claims/human_feedback.py (arXiv 2309.16349, part 1)
are in results/data.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sums:
    """Sums over N examples with inputs x of P numbers and a target y. ValueError for sums of no examples."""
    num: int
    x: np.ndarray       # (P,)
    y: float
    xx: np.ndarray      # (P, P)
    xy: np.ndarray      # (P,)
    yy: float

    def __post_init__(self):
        shapes = {"x": self.x.shape, "xx": self.xx.shape, "xy": self.xy.shape}
        P = len(self.x)
        if self.num < 1 or shapes != {"x": (P,), "xx": (P, P), "xy": (P,)}:
            raise ValueError(f"sums over {self.num} examples of the shapes {shapes}; give those of at least "
                             "one example, with (P,), (P, P) and (P,)")
        if (self.variances < -1e-9).any() or not np.allclose(self.xx, self.xx.T):
            raise ValueError("sums that no examples have: a variance below 0, or xx is not symmetric")

    @classmethod
    def of(cls, x, y):
        """Of examples x (N, P) and y (N,)."""
        return cls(len(y), x.sum(0), float(y.sum()), x.T @ x, x.T @ y, float(y @ y))

    @property
    def gram(self):
        """Sums of products of the inputs less their means, (P, P)."""
        return self.xx - np.outer(self.x, self.x) / self.num

    @property
    def cross(self):
        """Sums of products of the inputs less their means with the target, (P,)."""
        return self.xy - self.x * self.y / self.num

    @property
    def total(self):
        """The sum of squares of the target less its mean."""
        return self.yy - self.y ** 2 / self.num

    @property
    def variances(self):
        return np.diag(self.gram) / self.num

    def intercept(self, weights):
        return float(self.y - self.x @ weights) / self.num

    def r2(self, weights):
        """The share of the target's variance that the weights (P,) explain, with their best intercept."""
        return float(1 - (self.total - 2 * weights @ self.cross + weights @ self.gram @ weights) / self.total)


def soft_threshold(values, limit):
    return np.sign(values) * np.maximum(np.abs(values) - limit, 0.0)


def coordinate_descent(gram, cross, penalty, tolerance=1e-12, max_rounds=10_000):
    """The minimum over b of b' gram b / 2 - cross b + penalty sum |b|. cross: (..., P), several at once.

    Rounds over the coordinates end when none moves by more than `tolerance`; ValueError if it takes more than
    max_rounds. An input that never varies gets 0."""
    b, held = np.zeros_like(cross), np.diag(gram) > 1e-12
    for _ in range(max_rounds):
        before = b.copy()
        for j in np.flatnonzero(held):
            rest = cross[..., j] - b @ gram[:, j] + b[..., j] * gram[j, j]
            b[..., j] = soft_threshold(rest, penalty) / gram[j, j]
        if np.abs(b - before).max() <= tolerance:
            return b
    raise ValueError(f"the lasso has not come to rest in {max_rounds} rounds; give a larger tolerance than "
                     f"{tolerance}")


def lasso(sums, alpha):
    """The weights (P,) of these Sums under alpha >= 0."""
    if not alpha >= 0:
        raise ValueError(f"alpha {alpha} must be 0 or more")
    return coordinate_descent(sums.gram, sums.cross, sums.num * alpha)


def resampled(sums, alpha, num_resamples, seed):
    """The lasso's weights (R, P) under targets drawn anew: a parametric bootstrap, as examples are not there.

    The targets are those of least squares plus normal noise of the residuals' variance, so that their
    products with the inputs are normal with the covariance variance * gram."""
    P, rng = len(sums.x), np.random.default_rng(seed)
    fit = coordinate_descent(sums.gram, sums.cross, 0.0)
    variance = (1 - sums.r2(fit)) * sums.total / max(1, sums.num - P - 1)
    values, vectors = np.linalg.eigh(sums.gram)
    root = vectors * np.sqrt(np.maximum(values, 0.0) * variance)                            # (P, P)
    return coordinate_descent(sums.gram, sums.cross + rng.standard_normal((num_resamples, P)) @ root.T,
                              sums.num * alpha)
