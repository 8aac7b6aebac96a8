import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths
from fmjax.keys import normal
from fmjax.types import over_batch

MEANS = jnp.array([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]])


JOINT = jax.random.normal(jax.random.key(2), (4, 6)) / 2
JOINT = JOINT @ JOINT.T  # of (x0, x1), 2 x 2 coordinates: their cross covariance is not symmetric


def fields(oracle, x, t):
    """Velocity, score and log-density, in one program."""
    return jax.jit(lambda x, t: (oracle.velocity(x, t), oracle.score(x, t), oracle.log_density(x, t)))(x, t)


def oracles_on(path):
    return {
        "coupled": oracles.coupled(jnp.array([0.5, -1.0]), jnp.array([1.0, -2.0]), JOINT, path=path),
        "gaussian": oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]), path=path),
        "mixture": oracles.mixture(MEANS, jnp.array([0.3, 0.5, 0.8]), jnp.array([0.2, 0.5, 0.3]), path=path),
    }


@pytest.mark.parametrize("make", [paths.linear, paths.trigonometric, paths.schroedinger_bridge, paths.two_sided])
@pytest.mark.parametrize("name", ["gaussian", "mixture", "coupled"])
def test_continuity_equation(make, name, x64, key):
    """d/dt log p + v . grad log p + div v = 0, in float64."""
    oracle = oracles_on(make())[name]
    x, t = jax.random.normal(key, (5, 2)), jnp.linspace(0.05, 0.95, 5)

    @jax.jit
    def residual(x, t):
        dt = jax.jvp(lambda t: oracle.log_density(x, t), (t,), (jnp.ones_like(t),))[1]
        jac = jax.vmap(jax.jacfwd(lambda x, t: oracle.velocity(x[None], t[None])[0]))(x, t)
        transport = (oracle.velocity(x, t) * oracle.score(x, t)).sum(-1)
        return dt + transport + jnp.trace(jac, axis1=1, axis2=2)

    np.testing.assert_allclose(residual(x, t), 0, atol=1e-9)


def test_gaussian_flow_map_solves_the_ode_and_composes(x64, key):
    oracle = oracles_on(paths.trigonometric())["gaussian"]
    x = jax.random.normal(key, (4, 2))
    s, m, t = jnp.array([0.0, 0.1, 0.5, 0.9]), jnp.array([0.3, 0.5, 0.6, 0.4]), jnp.array([1.0, 0.7, 0.2, 0.0])
    _, dy = jax.jvp(lambda t: oracle.flow_map(x, s, t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(dy, oracle.velocity(oracle.flow_map(x, s, t), t), atol=1e-12)
    there = oracle.flow_map(oracle.flow_map(x, s, m), m, t)
    np.testing.assert_allclose(there, oracle.flow_map(x, s, t), atol=1e-12)
    np.testing.assert_allclose(oracle.flow_map(oracle.flow_map(x, s, t), t, s), x, atol=1e-12)


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_velocity_is_the_conditional_expectation(name, key):
    """E[(dI_t - v(I_t)) phi(I_t)] = 0 for test functions phi: a z-test with the sample's own standard error."""
    path = paths.linear()
    oracle = oracles_on(path)[name]
    n = 200_000
    x1, x0 = oracle.sample(key, n), jax.random.normal(jax.random.key(1), (n, 2))
    t = jax.random.uniform(jax.random.key(2), (n,))
    x, u = paths.with_velocity(path, x0, x1, t)
    gap = u - oracle.velocity(x, t)
    for phi in (jnp.ones_like(x), x, jnp.sin(2 * x), t[:, None] * jnp.cos(x[:, ::-1])):
        z = (gap * phi).mean(0) / ((gap * phi).std(0) / n**0.5)
        assert np.abs(z).max() < 4.5
    wrong = (gap + 0.05) * 1.0
    assert np.abs(wrong.mean(0) / (wrong.std(0) / n**0.5)).max() > 4.5


def test_mixture_of_one_is_the_gaussian(x64, key):
    x, t = jax.random.normal(key, (9, 2)), jnp.linspace(0, 1, 9)
    mixture = oracles.mixture(MEANS[:1].astype(jnp.float64), 0.7)
    gaussian = oracles.gaussian(MEANS[0].astype(jnp.float64), jnp.full((2,), 0.7))
    chex.assert_trees_all_close(fields(mixture, x, t), fields(gaussian, x, t), atol=1e-12)


@pytest.mark.parametrize("latent", ["brownian", "quadratic"])
def test_an_independent_normal_source_gives_the_gaussian_oracle(latent, x64, key):
    path = paths.two_sided(latent=latent, scale=0.8)
    x, t = jax.random.normal(key, (9, 2)), jnp.linspace(0, 1, 9)
    mean, std = jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0])
    joint = jnp.diag(jnp.concatenate([jnp.ones(2), std**2]))
    pairs, data = oracles.coupled(jnp.zeros(2), mean, joint, path=path), oracles.gaussian(mean, std, path=path)
    chex.assert_trees_all_close(fields(pairs, x, t), fields(data, x, t), atol=1e-11)


def test_fields_of_coupled_gaussians_are_continuous_at_the_ends(x64, key):
    """There ``gamma gamma'`` is 0 times infinity; its limit is half the scale squared."""
    oracle = oracles.coupled(*MEANS[:2].astype(float), JOINT.astype(float), path=paths.schroedinger_bridge(sigma=0.7))
    x = jax.random.normal(key, (2, 2))
    at, near = oracle.velocity(x, jnp.array([0.0, 1.0])), oracle.velocity(x, jnp.array([1e-9, 1 - 1e-9]))
    np.testing.assert_allclose(at, near, atol=1e-6)
    flat = oracles.coupled(*MEANS[:2].astype(float), JOINT.astype(float)).velocity(x, jnp.array([0.0, 1.0]))
    step = at - flat  # what the latent adds: -gamma gamma' S
    np.testing.assert_allclose(
        step, -0.49 / 2 * np.array([[1], [-1]]) * oracle.score(x, jnp.array([0.0, 1.0])), atol=1e-9
    )


def test_pairs_have_the_stated_moments(key):
    n = 100_000
    x0, x1 = oracles_on(paths.linear())["coupled"].sample(key, n)
    pairs = np.concatenate([x0, x1], 1).astype(np.float64)
    centred = pairs - np.array([0.5, -1.0, 1.0, -2.0])
    assert (np.abs(centred.mean(0)) < 4.5 * np.sqrt(np.diag(JOINT) / n)).all()
    products = centred[:, :, None] * centred[:, None]
    assert (np.abs(products.mean(0) - JOINT) < 4.5 * products.std(0) / n**0.5).all()
    with pytest.raises(ValueError, match=r"covariance.shape=\(2, 2\).*\(4, 4\)"):
        oracles.coupled(jnp.zeros(2), jnp.zeros(2), jnp.eye(2))


def test_mixture_samples_have_the_stated_moments(key):
    oracle = oracles_on(paths.linear())["mixture"]
    n = 100_000
    x = np.asarray(oracle.sample(key, n), np.float64)
    w, means, std = np.array([0.2, 0.5, 0.3]), np.asarray(MEANS), np.array([0.3, 0.5, 0.8])
    mean = w @ means
    var = w @ (means**2 + std[:, None] ** 2) - mean**2
    assert (np.abs(x.mean(0) - mean) < 4 * np.sqrt(var / n)).all()
    fourth = ((x - mean) ** 4).mean(0)
    assert (np.abs(x.var(0) - var) < 4 * np.sqrt((fourth - var**2) / n)).all()


def test_finite_data_set_ends_on_its_points(x64, key):
    """Close to t = 1 the denoiser is the nearest point: one Euler step of what is left lands on it."""
    oracle = oracles.finite(MEANS.astype(jnp.float64))
    t = 0.999
    near = MEANS + 0.001 * jax.random.normal(key, MEANS.shape)
    x = t * near
    landed = x + (1 - t) * oracle.velocity(x, t)
    np.testing.assert_allclose(landed, MEANS, atol=1e-12)


def test_average_velocity_is_smooth_through_the_diagonal(x64, key):
    """On the diagonal it is v, and its derivative in t is half the acceleration: u = v + (t-s) (v_t + v.grad v)/2"""
    oracle = oracles_on(paths.linear())["gaussian"]
    net = oracles.average_velocity(oracle)
    x, s = jax.random.normal(key, (4, 2)), jnp.array([0.1, 0.4, 0.6, 0.8])
    u, du = jax.jvp(lambda t: net(None, x, s, t), (s,), (jnp.ones_like(s),))
    v, acceleration = jax.jvp(oracle.velocity, (x, s), (oracle.velocity(x, s), jnp.ones_like(s)))
    np.testing.assert_allclose(u, v, atol=1e-12)
    np.testing.assert_allclose(du, acceleration / 2, atol=1e-9)
    with pytest.raises(ValueError, match="gaussian"):
        oracles.average_velocity(oracles_on(paths.linear())["mixture"])


def test_noise_belongs_to_the_example():
    from fmjax.keys import as_keys

    keys = as_keys(jax.random.key(3), 8)
    assert (normal(keys, (2, 2))[3:5] == normal(keys[3:5], (2, 2))).all()
    assert over_batch(0.5, jnp.zeros((3, 2))).shape == (3,)
