"""Distances of sample sets against exact values, closed forms and scipy."""

import functools
import math
import sys

import numpy as np
import pytest
import scipy.stats

from fmjax.metrics import two_sample


def test_sliced_w2_in_one_dimension_is_exact():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 1)), rng.exponential(size=(50, 1))
    exact = np.sqrt(np.mean((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2))
    assert two_sample.sliced_w2(x, y, directions=3) == pytest.approx(exact, rel=1e-12)
    assert two_sample.w2_exact(x, y) == pytest.approx(exact, rel=1e-9)


def test_sliced_w2_of_unequal_counts_is_exact():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((12, 1)), rng.standard_normal((20, 1)) + 0.3
    # The same two distributions as sets of lcm(12, 20) = 60 points each.
    same = two_sample.w2_exact(np.repeat(x, 5, 0), np.repeat(y, 3, 0))
    assert two_sample.sliced_w2(x, y, directions=2) == pytest.approx(same, rel=1e-9)


def test_sliced_w2_of_a_translation():
    rng = np.random.default_rng(2)
    x, shift, directions = rng.standard_normal((40, 6)), rng.standard_normal(6), 5000
    value = two_sample.sliced_w2(x, x + shift, directions=directions) ** 2
    mean = (shift**2).sum() / 6
    # (u . shift)^2 = |shift|^2 Beta(1/2, (d - 1)/2), of variance 2 (d - 1) / (d^2 (d + 2)).
    se = (shift**2).sum() * math.sqrt(2 * 5 / (36 * 8)) / math.sqrt(directions)
    assert abs(value - mean) < 4 * se


def test_sliced_w2_is_zero_for_one_set_in_any_order_and_flattens_images():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 30, 8, 8, 1))
    assert two_sample.sliced_w2(x, x[rng.permutation(30)]) < 1e-12
    assert two_sample.sliced_w2(x, y) == two_sample.sliced_w2(x.reshape(30, 64), y.reshape(30, 64))
    with pytest.raises(ValueError, match=r"^x=\[30, 8, 8, 1\]: .*\[30, 64\]"):
        two_sample.sliced_w2(x, y.reshape(30, 64))
    assert two_sample.sliced_w2(x, y, seed=1) != two_sample.sliced_w2(x, y)


@pytest.mark.parametrize("pot", [True, False])
def test_exact_w2_of_a_translation_is_its_length(pot, monkeypatch):
    if pot:
        pytest.importorskip("ot")
    else:
        monkeypatch.setitem(sys.modules, "ot", None)  # an import of None raises ImportError
    rng = np.random.default_rng(4)
    x, shift = rng.standard_normal((200, 8, 8, 1)), rng.standard_normal((8, 8, 1))
    value = two_sample.w2_exact(x, x[rng.permutation(200)] + shift)
    assert value == pytest.approx(np.linalg.norm(shift), rel=1e-9)


def test_exact_w2_is_at_least_the_sliced_one():
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((100, 5)), rng.uniform(-2, 2, (100, 5))
    assert two_sample.sliced_w2(x, y) < two_sample.w2_exact(x, y)


def test_energy_distance_equals_scipy_up_to_the_diagonal():
    """scipy's is the square root of half the V-statistic, which counts the zero distance of a point to itself."""
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal(40), rng.standard_normal(60) + 1
    within = [np.abs(a[:, None] - a[None]).mean() for a in (x, y)]
    v_statistic = 2 * scipy.stats.energy_distance(x, y) ** 2 / 2
    u_statistic = v_statistic - within[0] * (40 / 39 - 1) - within[1] * (60 / 59 - 1)
    assert two_sample.energy_distance(x[:, None], y[:, None]) == pytest.approx(u_statistic, rel=1e-7)


def test_energy_distance_of_equal_distributions_has_mean_zero():
    rng = np.random.default_rng(7)
    values = [two_sample.energy_distance(*rng.standard_normal((2, 30, 4))) for _ in range(400)]
    mean, se = two_sample.mean_se(values)
    assert abs(mean) < 4 * se and min(values) < 0 < max(values)


def test_energy_distance_of_two_gaussians():
    """In one dimension E|N(m, v)| = sqrt(2 v / pi) exp(-m^2 / 2v) + m erf(m / sqrt(2 v))."""

    def absolute(m, v):
        return math.sqrt(2 * v / math.pi) * math.exp(-(m**2) / (2 * v)) + m * math.erf(m / math.sqrt(2 * v))

    m, s1, s2 = 0.7, 1.0, 1.5
    closed = 2 * absolute(m, s1**2 + s2**2) - absolute(0, 2 * s1**2) - absolute(0, 2 * s2**2)
    rng = np.random.default_rng(8)
    draw = lambda: (s1 * rng.standard_normal((50, 1)), m + s2 * rng.standard_normal((40, 1)))
    mean, se = two_sample.mean_se([two_sample.energy_distance(*draw()) for _ in range(1000)])
    assert se < 0.03 * closed and abs(mean - closed) < 4 * se


def test_energy_distance_does_not_depend_on_the_block_or_the_origin():
    rng = np.random.default_rng(9)
    x, y = rng.standard_normal((50, 3)), rng.standard_normal((37, 3)) + 0.5
    whole = two_sample.energy_distance(x, y)
    assert two_sample.energy_distance(x, y, within=two_sample.mean_distance(y)) == pytest.approx(whole, rel=1e-7)
    assert two_sample.energy_distance(x, y, block=7) == pytest.approx(whole, rel=1e-7)
    assert two_sample.energy_distance(x + 100, y + 100) == pytest.approx(whole, rel=1e-6)


MMD = functools.partial(two_sample.mmd, bandwidth=1.0)


def test_mmd_of_two_gaussians():
    """E k(X, Y) of X - Y ~ N(m, v) is b / sqrt(b^2 + v) exp(-m^2 / (2 (b^2 + v))) in one dimension."""
    m, s1, s2, b = 0.7, 1.0, 1.5, 0.8
    kernel = lambda m, v: b / math.sqrt(b**2 + v) * math.exp(-(m**2) / (2 * (b**2 + v)))
    closed = kernel(0, 2 * s1**2) + kernel(0, 2 * s2**2) - 2 * kernel(m, s1**2 + s2**2)
    rng = np.random.default_rng(11)
    draw = lambda: (s1 * rng.standard_normal((50, 1)), m + s2 * rng.standard_normal((40, 1)))
    mean, se = two_sample.mean_se([two_sample.mmd(*draw(), bandwidth=b) for _ in range(1000)])
    assert se < 0.03 * closed and abs(mean - closed) < 4 * se


def test_mmd_equals_the_sum_over_all_pairs_in_any_blocks():
    rng = np.random.default_rng(12)
    x, y = rng.standard_normal((9, 3)), rng.standard_normal((7, 3)) + 0.4
    kernel = lambda a, b: math.exp(-((a - b) ** 2).sum() / (2 * 1.3**2))
    within = [np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    exact = sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    for options in ({}, {"block": 4}, {"within": within[1]}):
        assert two_sample.mmd(x, y, bandwidth=1.3, **options) == pytest.approx(exact, rel=1e-12)
    assert two_sample.mean_kernel(x, bandwidth=1.3) == pytest.approx(within[0], rel=1e-12)


def test_the_median_distance_of_a_line_is_known():
    y = np.array([[0.0], [1.0], [3.0], [7.0]])  # distances 1, 2, 3, 4, 6, 7
    assert two_sample.median_distance(y) == pytest.approx(3.5)
    assert two_sample.median_distance(np.tile(y, (500, 1)), count=400) == pytest.approx(3, abs=1)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.inf, math.nan])
def test_a_kernel_without_width_is_refused(bandwidth):
    with pytest.raises(ValueError, match=f"^bandwidth={bandwidth}: "):
        two_sample.mmd(np.ones((5, 3)), np.ones((5, 3)), bandwidth=bandwidth)


def test_mean_se():
    assert two_sample.mean_se([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, math.sqrt(5 / 3 / 4)))
    mean, se = two_sample.mean_se([3.0])
    assert mean == 3.0 and math.isnan(se)
    with pytest.raises(ValueError, match=r"^values=\[0\]"):
        two_sample.mean_se([])


def test_bootstrap_error_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(10).standard_normal((400, 1))
    se = two_sample.bootstrap_se(lambda s: float(s.mean()), x, resamples=1000)
    # A standard deviation from 1000 resamples has a relative error of 1 / sqrt(2000) = 2.2 %.
    assert se == pytest.approx(x.std() / 20, rel=4 * 0.0224)


@pytest.mark.parametrize("metric", [two_sample.sliced_w2, two_sample.w2_exact, two_sample.energy_distance, MMD])
def test_bad_input_is_named(metric):
    x = np.ones((5, 3))
    with pytest.raises(ValueError, match=r"^x=\[5, 3\]: .*\[5, 2\]"):
        metric(x, np.ones((5, 2)))
    with pytest.raises(ValueError, match=r"^y=\[5, 3\]: 1 rows .* row 4"):
        metric(x, np.where(np.arange(5)[:, None] == 4, np.nan, x))
    with pytest.raises(ValueError, match=r"^x=\[1, 3\]: 2 samples"):
        metric(x[:1], x[:1])


def test_exact_w2_of_unequal_counts_is_refused():
    with pytest.raises(ValueError, match=r"^x=\[5\]: .* y has 4"):
        two_sample.w2_exact(np.ones((5, 3)), np.ones((4, 3)))
