"""The score corrector's minimiser, at one noise level and at one that changes, against Gaussians and quadrature."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fmjax.experiments import build
from fmjax.keys import as_keys
from fmjax.methods.score_corrector import noise_level_at, score_corrector
from fmjax.types import Batch, expand

N, B = 40_000, 0.8
TIMES = np.array([0.0, 0.25, 0.5, 1.0], np.float32)


@pytest.mark.parametrize("sigma", [0.1, 0.6, 2.0, (0.2, 0.5, 1.5)])
def test_the_minimiser_on_a_gaussian_is_its_score(sigma, key):
    """A linear model ``eps = a_n x`` a step: the loss is a parabola, least at ``a = sigma / (b^2 + sigma^2)``."""
    step = jnp.arange(N) % len(TIMES)
    batch = Batch(B * jax.random.normal(jax.random.key(1), (N, 1)), t=TIMES[step])
    slope = lambda a, t: a[jnp.searchsorted(TIMES, t)]
    method = score_corrector(lambda a, x, s, t, cond=None, key=None: expand(slope(a, s), x) * x, sigma=sigma)
    loss = jax.jit(jax.grad(lambda a: method.loss(a, a, batch, as_keys(key, N))[0]))
    at_zero, at_one = loss(jnp.zeros(len(TIMES))), loss(jnp.ones(len(TIMES)))
    a = at_zero / (at_zero - at_one)

    sigmas = np.interp(TIMES, np.linspace(0, 1, np.size(sigma)), np.ravel(sigma)) if np.size(sigma) > 1 else sigma
    var = B**2 + sigmas**2
    se = B / var / (N / len(TIMES)) ** 0.5  # what is left of z is independent of x, of variance b^2 / var
    assert (np.abs(a - sigmas / var) < 4.5 * se).all()
    x = jnp.ones((len(TIMES), 1))
    exact = jnp.asarray(sigmas / var * np.ones(len(TIMES)), jnp.float32)
    np.testing.assert_allclose(method.direction(exact)(x, jnp.array(TIMES))[:, 0], -(sigmas**2) / var, rtol=1e-6)
    np.testing.assert_allclose(method.score(exact)(x, jnp.array(TIMES))[:, 0], -1 / var, rtol=1e-6)


MEANS, STDS, WEIGHTS = np.array([-1.5, 0.2, 2.0]), np.array([0.5, 0.8, 0.4]), np.array([0.3, 0.5, 0.2])


@pytest.mark.parametrize("sigma", [0.2, 0.7, (0.4, 1.0)])
def test_the_mean_square_error_identity_of_a_mixture(sigma, key):
    """``E |x~ + sigma^2 S(x~) - x|^2 = sigma^2 - sigma^4 J``, the loss ``1 - sigma^2 J``: ``J`` by quadrature."""
    t = 0.3
    s = 0.58 if np.size(sigma) > 1 else sigma  # 0.4 + 0.3 (1.0 - 0.4)
    density = lambda x: (WEIGHTS * stats.norm.pdf(x[..., None], MEANS, np.sqrt(STDS**2 + s**2))).sum(-1)
    grid = np.linspace(-9, 9, 20_001)
    fisher = np.trapezoid(np.gradient(density(grid), grid) ** 2 / density(grid), grid)

    def eps(params, x, s_, t_, cond=None, key=None):
        pull, var = x - MEANS, STDS**2 + s**2
        r = jax.nn.softmax(jnp.log(WEIGHTS) - pull**2 / (2 * var) - jnp.log(var) / 2, -1)
        return s * (r * pull / var).sum(-1, keepdims=True)

    method, rng = score_corrector(eps, sigma=sigma), np.random.default_rng(0)
    mode = rng.choice(3, N, p=WEIGHTS)
    x = jnp.asarray((MEANS[mode] + STDS[mode] * rng.standard_normal(N))[:, None], jnp.float32)
    _, aux = method.loss(None, None, Batch(x, t=jnp.full(N, t)), as_keys(key, N))
    noised = x + s * rng.standard_normal((N, 1))
    left = (noised + method.direction(None)(noised, t) - x) ** 2
    for losses, expected in ((aux["per_example"], 1 - s**2 * fisher), (left[:, 0], s**2 - s**4 * fisher)):
        losses = np.asarray(losses, np.float64)
        assert abs(losses.mean() - expected) < 4.5 * losses.std() / N**0.5


def test_levels_are_the_steps_of_a_uniform_grid_and_come_from_json(key):
    sigmas = json.loads("[0.1, 0.4, 0.2, 0.3]")
    grid = jnp.arange(4, dtype=jnp.float32) / 3
    np.testing.assert_allclose(noise_level_at(sigmas, grid), sigmas, rtol=1e-6)
    np.testing.assert_allclose(noise_level_at(0.7, grid), 0.7 * np.ones(4, np.float32))
    built = build.method({"name": "score_corrector", "sigma": sigmas}, lambda params, x, s, t, cond=None, key=None: x)
    x = jax.random.normal(key, (4, 2))
    np.testing.assert_allclose(built.direction(None)(x, grid), -np.array(sigmas)[:, None] * x, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), (), (0.1, 0.0)])
def test_levels_that_are_not_positive_are_refused(sigma):
    with pytest.raises(ValueError, match=re.escape(f"sigma={sigma}")):
        score_corrector(lambda *a: None, sigma=sigma)
