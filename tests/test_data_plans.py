"""Planning with a point mass: trajectories with returns as float conditions, against the Gaussian closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import correction, data, oracles, sampling
from fmjax.experiments import build

T, N = 8, 20_000
_, COV = data.point_mass_moments(length=T, memory=0.3)
FULL = np.kron(COV, np.eye(2))  # of [T, 2] positions, flattened
RETURN = np.zeros((1, 2 * T))
RETURN[0, 0], RETURN[0, -2] = -1.0, 1.0


def conditional(known, functional):
    """Mean and covariance of ``N(0, FULL)`` given ``functional x = known``."""
    gain = FULL @ functional.T @ np.linalg.inv(functional @ FULL @ functional.T)
    return gain @ known, FULL - gain @ functional @ FULL


def test_the_trajectories_have_the_closed_moments():
    made = data.point_mass(train=N, validation=10, test=10, length=T, memory=0.3)
    x = made.train.x
    np.testing.assert_allclose(np.cov(x[..., 0].T), COV, atol=5 * COV.max() / N**0.5)
    np.testing.assert_allclose(np.cov(x[..., 0].T, x[..., 1].T)[:T, T:], 0, atol=5 * COV.max() / N**0.5)
    np.testing.assert_allclose(made.train.cond[:, 0], x.reshape(N, -1) @ RETURN[0], atol=1e-6)
    step = np.diff(x, axis=1)
    np.testing.assert_allclose(step.std((0, 2)), T**-0.5, rtol=0.03)  # stationary velocities, of correlation 0.3
    np.testing.assert_allclose((step[:, 1:] * step[:, :-1]).mean() * T, 0.3, atol=0.02)


def test_a_config_reads_them_as_series_with_float_conditions():
    made = build.data({"name": "point_mass", "train": 16, "validation": 4, "test": 4, "length": 8})
    assert (made.kind, made.classes, made.train.cond.dtype) == ("series", 0, np.float32)


@pytest.mark.parametrize("value", [-1.5, 2.0])
def test_plans_conditioned_on_a_return_have_that_return(value):
    """The exact velocity, a float condition for each plan: mean, covariance and return of the conditional Gaussian."""
    velocity = oracles.linear_condition(jnp.asarray(FULL, jnp.float32), jnp.asarray(RETURN, jnp.float32))
    x0, cond = jax.random.normal(jax.random.key(0), (4000, T, 2)), jnp.full((4000, 1), value)
    x = jax.jit(lambda x0: sampling.sample(sampling.midpoint(velocity), x0, 48, cond=cond))(x0)
    flat = np.asarray(x).reshape(4000, -1)
    mean, cov = conditional(np.array([value]), RETURN)
    np.testing.assert_allclose(flat @ RETURN[0], value, atol=0.02)
    np.testing.assert_allclose(flat.mean(0), mean, atol=4 * FULL.max() ** 0.5 / 4000**0.5)
    np.testing.assert_allclose(np.cov(flat.T), cov, atol=6 * FULL.max() / 4000**0.5)


def test_a_null_condition_is_the_unconditioned_flow_and_guidance_goes_past(x64):
    """Guidance of a linear condition moves the mean by the scale: both velocities are affine."""
    velocity = oracles.linear_condition(jnp.asarray(FULL), jnp.asarray(RETURN))
    x, t = jax.random.normal(jax.random.key(0), (3, T, 2), jnp.float64), jnp.full(3, 0.4)
    null = velocity(x, t, jnp.full((3, 1), jnp.nan))
    np.testing.assert_allclose(null, velocity(x, t), rtol=1e-12)
    c_t = 0.6**2 * np.eye(2 * T) + 0.4**2 * FULL
    exact = np.linalg.solve(c_t, np.asarray(x).reshape(3, -1).T).T @ (0.4 * FULL - 0.6 * np.eye(2 * T))
    np.testing.assert_allclose(null.reshape(3, -1), exact, rtol=1e-9, atol=1e-12)
    guided = sampling.classifier_free(velocity, null=jnp.nan, scale=2.0)
    cond = jnp.array([[0.0], [1.0], [2.0]])
    np.testing.assert_allclose(guided(x, t, cond), 2 * velocity(x, t, cond) - null, rtol=1e-12)


def test_start_and_goal_are_kept_and_the_way_between_is_conditional():
    """Clamped at every step, with Langevin steps between: ``N(0, FULL)`` given both ends, for each plan."""
    start, goal = np.array([-0.8, 0.3]), np.array([1.0, -0.5])
    mask = jnp.zeros((T, 1), bool).at[jnp.array([0, -1])].set(True)
    known = jnp.zeros((T, 2)).at[0].set(start).at[-1].set(goal)
    velocity = oracles.linear_condition(jnp.asarray(FULL, jnp.float32), jnp.asarray(RETURN, jnp.float32))

    def score(x, t, cond=None):
        t = t[:, None, None]
        c_t = (1 - t) ** 2 * jnp.eye(2 * T) + t**2 * jnp.asarray(FULL, jnp.float32)
        return -jnp.linalg.solve(c_t, x.reshape(len(x), -1, 1)).reshape(x.shape)

    fix = correction.in_turn(correction.langevin(score, step=0.02), correction.clamp(known, mask), times=10)
    x0, steps = jax.random.normal(jax.random.key(0), (1500, T, 2)), 24
    draw = lambda corrector: jax.jit(
        lambda x0: sampling.sample(
            sampling.heun(velocity), x0, steps, key=jax.random.key(1), corrector=corrector, at=range(steps + 1)
        )
    )(x0)
    x, plain = draw(fix), draw(correction.clamp(known, mask))
    np.testing.assert_array_equal(x[:, 0], np.broadcast_to(np.float32(start), (1500, 2)))
    np.testing.assert_array_equal(x[:, -1], np.broadcast_to(np.float32(goal), (1500, 2)))
    ends = np.zeros((4, 2 * T))
    ends[[0, 1, 2, 3], [0, 1, -2, -1]] = 1
    mean, cov = conditional(np.concatenate([start, goal]), ends)
    error = lambda x: abs(np.asarray(x).reshape(1500, -1).mean(0) - mean).max()
    assert error(x) < 0.08 < 0.3 < error(plain), (error(x), error(plain))
    np.testing.assert_allclose(np.cov(np.asarray(x).reshape(1500, -1).T), cov, atol=0.06)
