"""The lasso from sums: closed forms, the conditions of its minimum, and what the authors of arXiv 2309.16349
printed about their ratings."""

import numpy as np
import pytest

from aya_min.claims.human_feedback import ratings
from aya_min.lasso import Sums, coordinate_descent, lasso, resampled


def drawn(num=60, P=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, P)) @ rng.normal(size=(P, P)) + rng.normal(size=P)
    return x, x @ rng.normal(size=P) + 3 + rng.normal(size=num)


def test_one_input_by_hand():
    """x = 0 0 1 1, y = 1 3 5 7: of 4 examples the slope of least squares is 4 and x varies by 1/4; the lasso
    takes alpha over that variance off it."""
    sums = Sums.of(np.array([[0.0], [0.0], [1.0], [1.0]]), np.array([1.0, 3.0, 5.0, 7.0]))
    assert lasso(sums, 0.0) == pytest.approx([4.0]) and lasso(sums, 0.25) == pytest.approx([3.0])
    assert sums.intercept(np.array([3.0])) == pytest.approx(2.5)        # the mean 4 less 3 times 1/2
    assert sums.r2(np.array([4.0])) == pytest.approx(0.8)               # 16 of 20 are between the groups
    assert (lasso(sums, 1.0) == 0).all() and sums.r2(np.zeros(1)) == 0


def test_of_orthogonal_inputs_it_is_the_soft_threshold_of_least_squares():
    x = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=float)       # columns: mean 0
    y = x @ [2.0, -0.5, 0.1] + 7
    assert lasso(Sums.of(x, y), 0.3) == pytest.approx([1.7, -0.2, 0.0], abs=1e-12)


def test_without_a_penalty_it_is_least_squares_whose_sums_are_enough():
    x, y = drawn()
    whole = np.linalg.lstsq(np.c_[np.ones(len(y)), x], y, rcond=None)[0]
    sums = Sums.of(x, y)
    found = lasso(sums, 0.0)
    assert np.r_[sums.intercept(found), found] == pytest.approx(whole, rel=1e-6)
    rest = y - whole[0] - x @ whole[1:]
    assert sums.r2(found) == pytest.approx(1 - rest.var() / y.var())


@pytest.mark.parametrize("alpha", [0.05, 0.5, 2.0])
def test_the_gradient_is_alpha_where_a_weight_is_and_less_where_none_is(alpha):
    x, y = drawn()
    sums = Sums.of(x, y)
    b = lasso(sums, alpha)
    gradient = (x - x.mean(0)).T @ (y - y.mean() - (x - x.mean(0)) @ b) / len(y)
    assert gradient[b != 0] == pytest.approx(alpha * np.sign(b[b != 0]), abs=1e-9)
    assert (np.abs(gradient[b == 0]) <= alpha + 1e-9).all()


def test_drawn_anew_the_weights_vary_as_those_of_least_squares_do():
    """Without a penalty their covariance is that of the textbook: variance * inverse of gram."""
    x, y = drawn(num=80)
    sums = Sums.of(x, y)
    fit = lasso(sums, 0.0)
    rest = y - sums.intercept(fit) - x @ fit
    expected = rest @ rest / (80 - 5) * np.linalg.inv(sums.gram)
    found = resampled(sums, 0.0, 4000, seed=0)
    assert found.mean(0) == pytest.approx(fit, abs=4 * np.sqrt(np.diag(expected) / 4000).max())
    assert np.cov(found.T) == pytest.approx(expected, abs=0.1 * np.diag(expected).max())
    assert (found == resampled(sums, 0.0, 4000, seed=0)).all()


def test_the_authors_printed_digits_come_out_of_the_sums():
    """Printed by scikit-learn, whose descent ends earlier: six digits of its intercept are those of the
    minimum. The inputs there are 0 to 1, not standardised."""
    sums, names, printed = ratings()
    b = -lasso(sums, 0.01)
    assert {name: round(float(each), 2) + 0 for name, each in zip(names, b)} == printed["weights"]
    assert sums.intercept(-b) == pytest.approx(printed["intercept"], abs=5e-7)
    assert sums.r2(-b) == pytest.approx(printed["r2"], abs=5e-7)


def test_bad_sums_and_settings_are_refused():
    x, y = drawn()
    good = Sums.of(x, y)
    with pytest.raises(ValueError, match="alpha -1 must be 0 or more"):
        lasso(good, -1)
    with pytest.raises(ValueError, match="alpha nan"):
        lasso(good, float("nan"))
    with pytest.raises(ValueError, match="at least one example"):
        Sums(0, good.x, good.y, good.xx, good.xy, good.yy)
    with pytest.raises(ValueError, match="shapes"):
        Sums(60, good.x, good.y, good.xx[:2], good.xy, good.yy)
    with pytest.raises(ValueError, match="that no examples have"):
        Sums(60, 100 * good.x, good.y, good.xx, good.xy, good.yy)
    with pytest.raises(ValueError, match="not come to rest in 2 rounds"):
        coordinate_descent(good.gram, good.cross, 0.0, max_rounds=2)
