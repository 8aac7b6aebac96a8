"""PSD models against quadrature, counts and their own values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import psd
from fmjax.keys import as_keys

KEY = jax.random.key(2)
RNG = np.random.default_rng(1)
ROOT = RNG.normal(size=(5, 3))
MODEL = psd.PSDModel(ROOT @ ROOT.T, RNG.uniform(-1, 1, size=(5, 2)), np.array([0.9, 2.0]))
LOW, HIGH = np.array([-1.2, -0.7]), np.array([0.4, 1.5])


def test_the_integral_of_a_box_is_that_of_gauss_legendre(x64):
    nodes, weights = np.polynomial.legendre.leggauss(60)
    a, b = [(low + high) / 2 + (high - low) / 2 * nodes for low, high in zip(LOW, HIGH, strict=True)]
    grid = np.stack(np.meshgrid(a, b, indexing="ij"), -1).reshape(-1, 2)
    values = MODEL.values(jnp.asarray(grid)).reshape(60, 60)
    expected = weights @ values @ weights * np.prod((HIGH - LOW) / 2)
    np.testing.assert_allclose(MODEL.integral(jnp.asarray(LOW), jnp.asarray(HIGH)), expected, rtol=1e-12)
    everywhere = MODEL.integral(jnp.full(2, -9.0), jnp.full(2, 9.0))
    assert float(everywhere) > expected > 0


def test_draws_have_the_integrals_of_the_cells():
    """Counts in 4 x 4 cells of the box against the closed form, by chi-squared."""
    n = 4000
    x = np.asarray(jax.jit(lambda k: psd.draw_psd(MODEL, k, LOW, HIGH, side=0.02))(as_keys(KEY, n)))
    assert (x >= LOW - 1e-6).all() and (x <= HIGH + 1e-6).all()
    edges = [np.linspace(low, high, 5) for low, high in zip(LOW, HIGH, strict=True)]
    counts, *_ = np.histogram2d(*x.T, bins=edges)
    corner = lambda i, j: jnp.array([edges[0][i], edges[1][j]])
    mass = np.array([[MODEL.integral(corner(i, j), corner(i + 1, j + 1)) for j in range(4)] for i in range(4)])
    p = mass / mass.sum()
    statistic = np.sum((counts - n * p) ** 2 / (n * p))
    assert statistic < 45  # 15 degrees of freedom: 7e-5
    assert np.sum((n / 16 - n * p) ** 2 / (n * p)) > 300  # a uniform draw is far from it


def test_the_fit_recovers_a_model_and_stays_positive():
    """At its own centres the values of a model are fitted; a wrong function below zero is cut there."""
    x = RNG.uniform(-1.5, 1.5, size=(400, 2))
    values = np.asarray(MODEL.values(jnp.asarray(x)))
    fitted = psd.fit_psd(x, values, centres=MODEL.centres, eta=MODEL.eta, ridge=0.0, steps=4000)
    held_out = jnp.asarray(RNG.uniform(-1.5, 1.5, size=(200, 2)))
    np.testing.assert_allclose(fitted.values(held_out), MODEL.values(held_out), atol=0.01 * values.max())
    assert np.linalg.eigvalsh(fitted.a).min() > -1e-9
    negative = psd.fit_psd(x, -values, centres=MODEL.centres, eta=MODEL.eta)
    np.testing.assert_allclose(negative.a, 0, atol=1e-12)


def test_a_model_is_a_source_with_its_density():
    source = psd.psd_source(MODEL, low=LOW, high=HIGH)
    x = source.examples(as_keys(KEY, 8), (2,))
    inside = jnp.log(MODEL.values(x) / MODEL.integral(jnp.asarray(LOW), jnp.asarray(HIGH)))
    np.testing.assert_allclose(source.log_density(x), inside, rtol=1e-5)
    assert source.log_density(jnp.full((1, 2), 3.0))[0] == -jnp.inf and not source.normal
    with pytest.raises(ValueError, match="psd"):
        source.examples(as_keys(KEY, 8), (3,))


def test_what_does_not_fit_is_refused_by_its_name():
    x = np.zeros((3, 2))
    with pytest.raises(ValueError, match="^x="):
        psd.fit_psd(x, np.zeros(4), centres=x, eta=np.ones(2))
    with pytest.raises(ValueError, match="^eta="):
        psd.fit_psd(x, np.zeros(3), centres=x, eta=np.zeros(2))
    with pytest.raises(ValueError, match="^side=0"):
        psd.draw_psd(MODEL, as_keys(KEY, 2), LOW, HIGH, side=0.0)
