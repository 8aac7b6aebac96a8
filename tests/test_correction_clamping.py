"""A clamped sampler: what is known stays to the bit, and the rest has its conditional distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import correction, oracles, paths, sampling

N, RHO = 4096, 0.8
MASK = jnp.array([True, False])
COV = jnp.array([[1.0, RHO], [RHO, 1.0]])


def score(x, t, cond=None):
    """Of N(0, (1 - t)^2 + t^2 COV), the marginal of a linear path."""
    t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1])
    cov = (1 - t)[:, None, None] ** 2 * jnp.eye(2) + t[:, None, None] ** 2 * COV
    return -jnp.linalg.solve(cov, x[..., None])[..., 0]


def drawn(velocity, corrector, steps=32):
    ts = sampling.uniform_grid(steps)
    x0 = jax.random.normal(jax.random.key(0), (N, 2))
    at = tuple(range(steps + 1))
    fix = jax.jit(
        lambda x0: sampling.sample(sampling.heun(velocity), x0, ts, key=jax.random.key(1), corrector=corrector, at=at)
    )
    return np.asarray(fix(x0))


def test_independent_parts_keep_their_distribution():
    velocity = oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 1.5])).velocity
    x = drawn(velocity, correction.clamp(jnp.array([3.0, 99.0]), MASK))
    np.testing.assert_array_equal(x[:, 0], 3.0)
    assert abs(x[:, 1].mean() + 2.0) < 4 * 1.5 / np.sqrt(N) + 0.01
    assert abs(x[:, 1].std() / 1.5 - 1) < 4 / np.sqrt(2 * N) + 0.01


def test_langevin_steps_between_clamps_give_the_conditional_distribution():
    """N(rho k, 1 - rho^2), which clamping alone misses."""
    velocity = lambda x, t, cond=None: paths.convert(
        paths.linear(), score(x, t), x, jnp.clip(t, 1e-3), kind="score", to="velocity"
    )
    known = jnp.array([1.5, 0.0])
    fix = correction.in_turn(correction.langevin(score, step=0.02), correction.clamp(known, MASK), times=8)
    assert fix.nfe == 8
    exact, plain = drawn(velocity, fix), drawn(velocity, correction.clamp(known, MASK))
    np.testing.assert_array_equal(exact[:, 0], 1.5)
    error = 4 * np.sqrt(1 - RHO**2) / np.sqrt(N)
    assert abs(exact[:, 1].mean() - RHO * 1.5) < error + 0.05
    assert abs(exact[:, 1].std() / np.sqrt(1 - RHO**2) - 1) < 0.06
    assert abs(plain[:, 1].mean() - RHO * 1.5) > 0.1


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_known_values_lie_on_their_interpolant(t, key):
    x0, known = jax.random.normal(key, (5, 4)), jnp.linspace(-1, 1, 20).reshape(5, 4)
    mask = jnp.arange(4) < 2
    y, info = correction.clamp(known, mask, x0)(key, 9 * jnp.ones((5, 4)), t)
    np.testing.assert_allclose(y[:, :2], ((1 - t) * x0 + t * known)[:, :2], atol=1e-6)
    np.testing.assert_array_equal(y[:, 2:], 9.0)
    assert info["moved"].shape == (5,)


def test_nothing_to_apply_is_refused():
    with pytest.raises(ValueError, match="^times=1: of 0 correctors"):
        correction.in_turn()
