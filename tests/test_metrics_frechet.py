"""Frechet distance against closed forms, invariances, and three ways to the same trace."""

import numpy as np
import pytest

from fmjax.metrics.frechet import frechet, frechet_distance, moments, trace_sqrt_features, trace_sqrt_product

D = 24


def rotation(rng, d=D):
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def covariance(rng, d=D, rank=None):
    a = rng.standard_normal((d, rank or 2 * d)) * np.exp(rng.uniform(-2, 2, (d, 1)))
    return a @ a.T / a.shape[1]


def test_commuting_covariances_have_a_closed_form():
    rng = np.random.default_rng(0)
    q, a, b = rotation(rng), rng.uniform(0.1, 3, D), rng.uniform(0.1, 3, D)
    m1, m2 = rng.standard_normal((2, D))
    closed = ((m1 - m2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(m1, q * a @ q.T, m2, q * b @ q.T) == pytest.approx(closed, rel=1e-12)


def test_two_dimensions_have_a_closed_form():
    rng = np.random.default_rng(1)
    s1, s2 = covariance(rng, 2), covariance(rng, 2)
    # tr sqrt(M) of a 2x2 matrix with positive eigenvalues is sqrt(tr M + 2 sqrt(det M)).
    trace = np.sqrt(np.trace(s1 @ s2) + 2 * np.sqrt(np.linalg.det(s1) * np.linalg.det(s2)))
    zero = np.zeros(2)
    closed = np.trace(s1 + s2) - 2 * trace
    assert frechet_distance(zero, s1, zero, s2) == pytest.approx(closed, rel=1e-10)


@pytest.mark.parametrize("rank", [None, 5])
def test_zero_for_equal_and_symmetric_and_rotation_invariant(rank):
    rng = np.random.default_rng(2)
    s1, s2, q = covariance(rng, rank=rank), covariance(rng), rotation(rng)
    m1, m2 = rng.standard_normal((2, D))
    fd = frechet_distance
    assert abs(fd(m1, s1, m1, s1)) < 1e-7 * np.trace(s1)
    value = fd(m1, s1, m2, s2)
    assert fd(m2, s2, m1, s1) == pytest.approx(value, rel=1e-7)
    assert fd(q @ m1, q @ s1 @ q.T, q @ m2, q @ s2 @ q.T) == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("n", [10, 24, 200])
@pytest.mark.parametrize("dead", [0, 8])
def test_three_forms_of_the_trace_agree(n, dead):
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((n, D)) * np.linspace(0.1, 2, D), rng.standard_normal((n + 3, D)) + 1
    a[:, :dead], b[:, :dead] = 0.5, 0.5
    s1, s2 = moments(a)[1], moments(b)[1]
    eigh, cholesky = (trace_sqrt_product(s1, s2, form=form) for form in ("eigh", "cholesky"))
    nuclear, trace = trace_sqrt_features(a, b), np.trace(s1) + np.trace(s2)
    # The nuclear norm takes no root of a small eigenvalue: exact. The others leave sqrt(1e-16) for each null direction.
    assert abs(eigh - nuclear) < 1e-7 * trace and abs(cholesky - nuclear) < 1e-7 * trace
    assert abs(frechet(a, b) - frechet_distance(*moments(a), *moments(b))) < 2e-7 * trace


def test_above_512_dimensions_the_default_is_cholesky_and_equals_eigh():
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((700, 520)), 1.2 * rng.standard_normal((700, 520))
    s1, s2 = moments(a)[1], moments(b)[1]
    default, eigh = trace_sqrt_product(s1, s2), trace_sqrt_product(s1, s2, form="eigh")
    assert default == trace_sqrt_product(s1, s2, form="cholesky")
    assert default == pytest.approx(eigh, rel=1e-7)


def test_moments_survive_a_large_mean():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((500, 3))
    mu, s = moments(x + 1e6)
    np.testing.assert_allclose(mu, x.mean(0) + 1e6, rtol=1e-15)
    np.testing.assert_allclose(s, np.cov(x.T), atol=1e-8)  # rounding of x + 1e6 is 1e-10


def test_bias_falls_as_one_over_n():
    """Equal distributions: the mean over seeds is positive and proportional to 1/n."""
    rng = np.random.default_rng(6)
    mean = {
        n: np.mean([frechet(rng.standard_normal((n, 8)), rng.standard_normal((n, 8))) for _ in range(200)])
        for n in (200, 800)
    }
    # Relative standard error of each mean is below 3 %.
    assert mean[200] / mean[800] == pytest.approx(4, rel=0.15)


def test_bad_input_is_named():
    x = np.ones((5, 3))
    with pytest.raises(ValueError, match=r"^features=\[1, 3\]"):
        moments(x[:1])
    with pytest.raises(ValueError, match=r"^features_b=\[5, 3\]: 1 rows .* row 2"):
        frechet(x, np.where(np.arange(5)[:, None] == 2, np.inf, x))
    with pytest.raises(ValueError, match=r"^features_a=\[5, 3\]: .*\[5, 2\]"):
        frechet(x, x[:, :2])
    with pytest.raises(ValueError, match="^form='sqrtm'"):
        trace_sqrt_product(np.eye(2), np.eye(2), form="sqrtm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu2": np.zeros(1)}, r"^mu2=\(1,\)"),
        ({"mu2": np.zeros((4, 1))}, r"^mu2=\(4, 1\)"),
        ({"mu1": np.zeros((4, 1))}, r"^mu1=\(4, 1\)"),
        ({"s1": np.eye(3)}, r"^s1=\(3, 3\)"),
        ({"s2": np.ones(4)}, r"^s2=\(4,\)"),
    ],
)
def test_moments_of_different_shapes_are_refused(change, message):
    """Broadcasting would give a number: 0 for means [4] and [1], 40 for means [4] and [4, 1]."""
    good = {"mu1": np.zeros(4), "s1": np.eye(4), "mu2": np.zeros(4), "s2": np.eye(4)}
    with pytest.raises(ValueError, match=message):
        frechet_distance(**(good | change))
