"""Steps on a box: reflection, the heat kernel by two series, and exact flows that never leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, sampling, sources
from fmjax.keys import as_keys
from fmjax.oracles.heat_kernel import heat_kernel
from fmjax.types import Multistep

UNIT = {"low": 0.0, "high": 1.0}
X, Y = (np.random.default_rng(i).uniform(size=200) for i in (0, 1))


def test_both_series_are_one_function(x64):
    """At ``T = 0.01``, the time at which the authors' code changes the series."""
    x, y, sigma = jnp.asarray(X), jnp.asarray(Y), jnp.full(200, 0.02**0.5)
    images, cosines = (jnp.exp(heat_kernel(x, y, sigma, series=name, **UNIT)) for name in ("images", "cosines"))
    np.testing.assert_allclose(images, cosines, atol=5e-15)
    late = jnp.full(200, 0.2**0.5)
    a, b = (
        jax.vmap(jax.grad(lambda x, y, s, name=name: heat_kernel(x, y, s, series=name, **UNIT)))(x, y, late)
        for name in ("images", "cosines")
    )
    np.testing.assert_allclose(a, b, atol=1e-13)


@pytest.mark.parametrize("sigma", [0.03, 0.44, 0.46])
def test_the_kernel_is_a_density_without_slope_at_the_faces(sigma, x64):
    box = {"low": -1.0, "high": 2.0}
    x = np.linspace(-1, 2, 20001)
    log_p = lambda x: heat_kernel(x, jnp.asarray(0.4), jnp.asarray(3 * sigma), **box)
    p = np.exp(np.asarray(log_p(jnp.asarray(x))))
    np.testing.assert_allclose(np.trapezoid(p, x), 1, atol=1e-6)
    slope = jax.vmap(jax.grad(log_p))(jnp.array([-1.0, 2.0]))
    np.testing.assert_allclose(slope, 0, atol=1e-10)


def test_folded_noise_has_the_kernel_as_its_density():
    x1, sigma, n = 0.2, 0.7, 100_000
    x = sampling.fold(x1 + sigma * jax.random.normal(jax.random.key(0), (n, 1)), **UNIT)[:, 0]
    counts, edges = np.histogram(np.asarray(x), 20, (0, 1))
    middle = jnp.asarray((edges[1:] + edges[:-1]) / 2, jnp.float32)
    expected = n / 20 * np.exp(np.asarray(heat_kernel(middle, jnp.asarray(x1), jnp.asarray(sigma), **UNIT)))
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square, 20 bins: 45 has the probability 0.001


def test_fold_is_the_reflection(x64):
    x = jnp.linspace(-9, 9, 1001)
    once = jnp.where(x > 1, 2 - x, jnp.where(x < -1, -2 - x, x))
    for _ in range(8):
        once = jnp.where(once > 1, 2 - once, jnp.where(once < -1, -2 - once, once))
    np.testing.assert_allclose(sampling.fold(x), once, atol=1e-14)
    inside = jnp.linspace(-1, 1, 77)
    np.testing.assert_array_equal(sampling.fold(inside), inside)


def test_the_exact_reflected_flow_never_leaves(x64):
    """Three atoms, 400 Euler steps: no coordinate is folded, and the samples end on the atoms."""
    points = jnp.array([[0.1], [0.6], [0.95]])
    oracle = oracles.uniform_finite(points, **UNIT)
    x0 = jnp.asarray(np.linspace(0, 1, 2001)[:, None])
    step = sampling.folded(sampling.euler(oracle.velocity), **UNIT)
    x, info = jax.jit(lambda x: sampling.sample(step, x, 400, info=True))(x0)
    assert float(info.memory.folded.max()) == 0.0
    gap = jnp.abs(x - points.T)
    np.testing.assert_allclose(gap.min(1), 0, atol=1e-12)
    np.testing.assert_allclose(np.bincount(gap.argmin(1)) / 2001, 1 / 3, atol=0.01)


def test_the_velocity_of_a_box_is_the_conditional_mean():
    """Monte Carlo: the regression of ``x1 - x0`` on ``x_t`` in small cells."""
    points, n, t = jnp.array([[-0.6], [0.1], [0.8]]), 400_000, 0.3
    source = sources.uniform_noise()
    x0 = source.draw(as_keys(jax.random.key(0), n), (1,))
    oracle = oracles.uniform_finite(points)
    x1 = oracle.sample(jax.random.key(1), n)
    x = np.asarray((1 - t) * x0 + t * x1)[:, 0]
    for at in (-0.8, -0.2, 0.3, 0.85):
        cell = abs(x - at) < 0.01
        v = np.asarray(x1 - x0)[cell, 0]
        exact = oracle.velocity(jnp.array([[at]]), t)[0, 0]
        assert abs(v.mean() - exact) < 4 * v.std() / cell.sum() ** 0.5 + 0.02
        density = cell.mean() / 0.02
        np.testing.assert_allclose(density, np.exp(oracle.log_density(jnp.array([[at]]), t)[0]), rtol=0.05)


@pytest.mark.parametrize("name", ["euler", "reverse_diffusion"])
def test_reflected_diffusion_ends_in_the_data(name):
    """The probability flow and the reverse SDE carry the uniform source to the data, each point as often."""
    points, path = jnp.array([[-0.7, 0.5], [0.6, 0.9]]), paths.ve(sigma_min=0.02, sigma_max=6.0)
    oracle = oracles.reflected_diffusion(points, path=path)
    keys = as_keys(jax.random.key(0), 3000)
    x0 = sources.uniform_noise().draw(keys, (2,))
    inner = (
        sampling.euler(oracle.velocity) if name == "euler" else sampling.reverse_diffusion(oracle.velocity, path=path)
    )
    step = sampling.folded(inner)
    x, info = jax.jit(lambda x: sampling.sample(step, x, 100, key=keys, info=True))(x0)
    gap = np.linalg.norm(np.asarray(x)[:, None] - np.asarray(points), axis=-1)
    assert np.quantile(gap.min(1), 0.99) < 0.12 and abs(np.asarray(x)).max() <= 1
    np.testing.assert_allclose((gap.argmin(1) == 0).mean(), 0.5, atol=3 * 0.5 / 3000**0.5)
    assert (float(info.memory.folded.mean()) > 1) == (name == "reverse_diffusion")  # noise crosses faces, the ODE less


def test_a_folded_multistep_keeps_its_memory(x64):
    """Inside the box a folded step is the step, whatever its memory."""
    oracle = oracles.gaussian(0.0, 0.05)
    x0 = 0.5 * jnp.asarray(X[:10, None])
    plain = sampling.ipndm(oracle.velocity)
    inside = sampling.folded(plain)
    assert isinstance(inside, Multistep) and inside.nfe == plain.nfe
    np.testing.assert_array_equal(sampling.sample(inside, x0, 8), sampling.sample(plain, x0, 8))


@pytest.mark.parametrize(
    ("field", "run"),
    {
        "high": lambda: sampling.folded(lambda x, s, t, cond=None, key=None: x, low=1.0, high=1.0),
        "high ": lambda: heat_kernel(jnp.zeros(1), jnp.zeros(1), jnp.ones(1), low=1.0, high=0.0),
        "series": lambda: heat_kernel(jnp.zeros(1), jnp.zeros(1), jnp.ones(1), series="sines"),
    }.items(),
)
def test_what_cannot_work_is_refused(field, run):
    with pytest.raises(ValueError, match=f"^{field.strip()}="):
        run()
