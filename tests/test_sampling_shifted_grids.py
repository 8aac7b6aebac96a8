"""Grids for large images against the schedules of SD3 and Flux, and against the noise levels of every path."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, sampling
from fmjax.sampling import grids, resolution_grid, shifted_grid


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 9216])
@pytest.mark.parametrize("n", [1, 4, 28])
def test_the_grid_of_flux_is_its_time_shift(tokens, n):
    """The authors' ``time_shift(mu, 1, t)`` and ``get_lin_function``, over ``linspace(1, 0, n + 1)``."""
    slope = (1.15 - 0.5) / (4096 - 256)
    mu = slope * tokens + (0.5 - slope * 256)
    t = np.linspace(1, 0, n + 1)[:-1]
    sigmas = np.append(math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** 1.0), 0)
    np.testing.assert_allclose(resolution_grid(n, tokens=tokens), 1 - sigmas, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [1, 4, 28])
def test_the_grid_of_sd3_is_its_schedule_with_the_last_level(n):
    """The authors' ``get_sigmas``: timesteps from the largest to the smallest shifted level, shifted again, then 0."""
    shift = 3.0
    sigma = lambda t: shift * t / (1 + (shift - 1) * t)
    last = sigma(1 / 1000)
    sigmas = np.append(sigma(np.linspace(sigma(1.0), last, n)), 0)
    np.testing.assert_allclose(shifted_grid(n, shift=shift, last=last), 1 - sigmas, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric(), paths.target_conditional(sigma_min=1e-3)])
@pytest.mark.parametrize("shift", [0.4, 1.0, 6.0])
def test_noise_levels_are_shifted_on_every_path(path, shift):
    even, ts = grids.uniform_grid(8)[1:-1], shifted_grid(8, shift=shift, path=path)
    with jax.enable_x64(True):
        alpha, beta = (np.asarray(a) for a in path.coefficients(jnp.asarray(ts)))
    np.testing.assert_allclose(alpha[1:-1] / beta[1:-1], shift * (1 - even) / even, rtol=1e-9)
    assert (ts[0], ts[-1], len(ts)) == (0, 1, 9)
    if shift == 1.0 and path == paths.linear():
        np.testing.assert_allclose(ts, grids.uniform_grid(8), atol=1e-15)
    assert jax.jit(lambda: jnp.asarray(shifted_grid(8, shift=shift, path=path)))().shape == (9,)  # static under jit


def test_a_shifted_grid_samples_and_inverts(key):
    law, x = oracles.gaussian(0.3, 0.5), jax.random.normal(key, (16, 2))
    ts = resolution_grid(50, tokens=4096)
    step = sampling.unipc(law.velocity)
    there = jax.jit(lambda x: sampling.sample(step, x, ts))(x)
    np.testing.assert_allclose(there, law.flow_map(x, 0.0, 1.0), atol=0.01)
    back = jax.jit(lambda x: sampling.sample(step, x, ts[::-1]))(there)
    np.testing.assert_allclose(back, x, atol=0.03)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (shifted_grid, {"n": 0}, "n=0: "),
        (shifted_grid, {"n": 4, "shift": 0.0}, "shift=0.0: "),
        (shifted_grid, {"n": 4, "shift": math.nan}, "shift=nan: "),
        (shifted_grid, {"n": 4, "last": 1.0}, "last=1.0: "),
        (shifted_grid, {"n": 4, "path": paths.vp()}, "sigma=inf: "),
        (shifted_grid, {"n": 4, "path": paths.ve()}, "sigma=inf: "),
        (shifted_grid, {"n": 4, "path": paths.two_sided()}, "latent"),
        (resolution_grid, {"n": 4, "tokens": 0}, "tokens=0: "),
        (resolution_grid, {"n": 4, "tokens": 10**9}, "tokens=1000000000: .*mu="),
        (resolution_grid, {"n": 4, "tokens": 64, "base_tokens": 4096}, "max_tokens=4096: equal"),
        (resolution_grid, {"n": 4, "tokens": 64, "max_shift": math.inf}, "max_shift=inf: "),
    ],
)
def test_what_cannot_be_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        make(**options)
    assert len(str(refused.value)) <= 300 and "\n" not in str(refused.value)
