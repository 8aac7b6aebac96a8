import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths

PATHS = [paths.linear, paths.trigonometric]


@pytest.mark.parametrize("make", PATHS)
def test_end_points_of_the_path_are_source_and_data(make, x64):
    x0, x1 = jnp.arange(6.0).reshape(3, 2), -jnp.ones((3, 2))
    np.testing.assert_allclose(paths.with_velocity(make(), x0, x1, 0.0)[0], x0, atol=1e-15)
    np.testing.assert_allclose(paths.with_velocity(make(), x0, x1, 1.0)[0], x1, atol=1e-15)


@pytest.mark.parametrize("make", PATHS)
def test_velocity_is_the_time_derivative(make, x64, key):
    x0, x1 = jax.random.normal(key, (2, 5, 3))
    t = jnp.linspace(0.1, 0.9, 5)
    h = 1e-6
    _, u = paths.with_velocity(make(), x0, x1, t)
    numeric = (paths.with_velocity(make(), x0, x1, t + h)[0] - paths.with_velocity(make(), x0, x1, t - h)[0]) / (2 * h)
    np.testing.assert_allclose(u, numeric, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", PATHS)
def test_endpoints_invert_with_velocity(make, x64, key):
    x0, x1 = jax.random.normal(key, (2, 7, 2, 2, 1))
    t = jnp.linspace(0.0, 1.0, 7)
    got0, got1 = paths.endpoints(make(), *paths.with_velocity(make(), x0, x1, t), t)
    np.testing.assert_allclose(got0, x0, atol=1e-13)
    np.testing.assert_allclose(got1, x1, atol=1e-13)


@pytest.mark.parametrize("make", PATHS)
@pytest.mark.parametrize("law", ["gaussian", "mixture"])
def test_score_of_the_velocity_is_the_gradient_of_the_log_density(make, law, x64, key):
    path = make()
    if law == "gaussian":
        oracle = oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]), path=path)
    else:
        oracle = oracles.mixture(jax.random.normal(key, (4, 2)) * 2, jnp.array([0.3, 0.2, 1.0, 0.7]), path=path)
    x = jax.random.normal(jax.random.key(1), (6, 2)) * 1.5
    t = jnp.array([0.0, 0.2, 0.5, 0.8, 0.95, 0.99])
    from_density = jax.grad(lambda x: oracle.log_density(x, t).sum())(x)
    np.testing.assert_allclose(oracle.score(x, t), from_density, rtol=1e-10)
    np.testing.assert_allclose(paths.score(path, x, oracle.velocity(x, t), t), from_density, rtol=1e-9, atol=1e-9)
