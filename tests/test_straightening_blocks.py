"""Blocks of local flow matching and JKO-iFlow on Gaussian data: variances, maps, the published sizes, sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import methods, oracles, sampling, straightening
from fmjax.methods.jko import SIZES
from fmjax.sampling import push_with_log_det
from fmjax.types import Batch

KEY = jax.random.key(6)
VARIANCE = np.array([3.0, 0.2])
GAMMAS = (0.2, 0.4, 0.6)


def linear(params):
    """The velocity between jointly Gaussian ends: ``params`` are the variances of data and noise side, and theirs."""
    data, noise, both = params

    def velocity(x, t, cond=None):
        t = t[:, None]
        var = t**2 * data + (1 - t) ** 2 * noise + 2 * t * (1 - t) * both
        return (t * data - (1 - t) * noise + (1 - 2 * t) * both) / var * x

    return velocity


@pytest.mark.parametrize("coupled", [True, False])
def test_blocks_have_the_variances_of_the_noising_chain(coupled, tmp_path):
    """Fitted by moments on batches, pushed by marginals: e^{-2G} C + 1 - e^{-2G}; sampling leads back to C."""
    n, seen = 20_000, []
    data = np.sqrt(VARIANCE).astype(np.float32) * np.random.default_rng(0).standard_normal((n, 2), np.float32)

    def fit(k, params, x):
        seen.append((params, x))
        batch = straightening.ornstein_uhlenbeck(x, GAMMAS[k], batch_size=n, seed=k, coupled=coupled)(0)
        return np.stack([np.mean(batch.x1**2, 0), np.mean(batch.x0**2, 0), np.mean(batch.x0 * batch.x1, 0)])

    blocks = straightening.fit_blocks(fit, linear, data, count=3, directory=tmp_path, steps=8, batch=4096)
    assert seen[0][0] is None and seen[2][0] is blocks[1]
    for k in range(3):
        exact = np.array([oracles.block_variance(v, GAMMAS[:k]) for v in VARIANCE.tolist()])
        assert np.abs(seen[k][1].var(0) / exact - 1).max() < 0.05
        np.testing.assert_allclose(blocks[k][0], exact, rtol=0.06)
        np.testing.assert_allclose(blocks[k][2], exact * np.exp(-GAMMAS[k]) if coupled else 0, rtol=0.06, atol=0.05)
    scale = np.abs(seen[1][1] / data)  # of the block map: sqrt(c_s / c_d), whatever the coupling
    np.testing.assert_allclose(scale, np.broadcast_to(np.sqrt(blocks[0][1] / blocks[0][0]), scale.shape), rtol=2e-3)
    step = straightening.block_step([sampling.rk4(linear(b)) for b in blocks])
    start = np.sqrt(blocks[2][1]) * np.random.default_rng(1).standard_normal((n, 2), np.float32)
    grid = straightening.segment_grid(straightening.block_bounds(3), (6, 6, 6))
    x = jax.jit(lambda x: sampling.sample(step, x, grid))(jnp.asarray(start, jnp.float32))
    np.testing.assert_allclose(np.var(x, 0), VARIANCE, rtol=0.06)


def test_a_free_block_starts_in_noise():
    x = np.full((7, 2), 5.0, np.float32)
    batch = straightening.ornstein_uhlenbeck(x, np.inf, batch_size=4000, seed=0)(0)
    assert np.abs(batch.x0.mean(0)).max() < 0.1 and abs(batch.x0.std() - 1) < 0.05 and (batch.x1 == 5).all()


@pytest.mark.parametrize(("variance", "size"), [(3.0, 0.25), (0.3, 1.0), (1.7, 2.64)])
def test_the_minimiser_of_the_jko_loss_is_its_closed_form(variance, size, x64):
    """A linear block ``x -> a x``: the gradient is zero at the root, points back beside it, and probes are exact."""
    x = jax.random.normal(KEY, (4000, 2)).astype(float)
    x = x * jnp.sqrt(variance / jnp.mean(x**2))
    method = methods.jko(lambda params, x, s, t, cond=None, key=None: params * x, size=size, steps=20)
    w = -np.log(oracles.jko_scale(variance, size))
    slope = lambda w: jax.grad(lambda p: method.loss(p, None, Batch(x), KEY)[0])(w)
    assert abs(slope(w)) < 1e-5 < 0.01 < slope(w + 0.05) and slope(w - 0.05) < -0.01
    exact = methods.jko(lambda params, x, s, t, cond=None, key=None: params * x, size=size, steps=20, probes=None)
    np.testing.assert_allclose(exact.loss(w, None, Batch(x), KEY)[0], method.loss(w, None, Batch(x), KEY)[0])
    a = np.exp(-w)
    expected = a**2 * variance / 2 - np.log(a) + (a - 1) ** 2 * variance / (2 * size)
    np.testing.assert_allclose(method.loss(w, None, Batch(x), KEY)[0], expected, rtol=1e-6)


def test_the_published_sizes_take_variance_three_to_one():
    """Blocks that are trained by Newton's method on the loss, and pushed in turn."""
    variance, trained = 3.0, jnp.sqrt(3.0)  # one point whose square is the variance: the loss needs no more
    assert len(SIZES) == 8

    @jax.jit
    def fitted(x, size):
        def value(w):
            y, log_det = push_with_log_det(lambda x, t, cond=None: w * x, x, np.linspace(1, 0, 4))
            return jnp.mean(y**2 / 2 - log_det[:, None] + (y - x) ** 2 / (2 * size))

        w = jnp.zeros(())
        for _ in range(6):
            w = w - jax.grad(value)(w) / jax.grad(jax.grad(value))(w)
        return push_with_log_det(lambda x, t, cond=None: w * x, x, np.linspace(1, 0, 4))[0]

    x = trained.reshape(1, 1)
    for size in SIZES:
        variance *= oracles.jko_scale(variance, size) ** 2
        x = fitted(x, size)
        np.testing.assert_allclose(x[0, 0] ** 2, variance, rtol=2e-3)
    assert abs(variance - 1) < 5e-4


def test_sizes_that_cannot_work_are_refused():
    for call in (lambda: methods.jko(linear, size=0.0), lambda: methods.jko(linear, probes=0)):
        with pytest.raises(ValueError, match="^size="):
            call()
    with pytest.raises(ValueError, match="^gamma=0"):
        straightening.ornstein_uhlenbeck(np.ones((2, 1), np.float32), 0.0, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="^count=0"):
        straightening.fit_blocks(lambda k, p, x: p, linear, np.ones((2, 1), np.float32), count=0, directory=".")
