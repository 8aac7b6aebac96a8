"""Correctors from velocities against closed forms: second flows, variance descent, moves, corrected marginals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import correction, oracles, paths, sampling
from fmjax.experiments import samplers
from fmjax.keys import as_keys

KEY = jax.random.key(3)


def test_a_second_flow_takes_the_samples_to_the_data_in_one_step():
    """Samples N(0.3, 0.8^2), data N(0, 1), coupled by transport: the velocity is exact along straight lines."""
    a = 1 / 0.8
    velocity = lambda x, t, cond=None: (a - 1) * (x - 0.3 * (1 - t)[:, None]) / (1 + t * (a - 1))[:, None] - 0.3
    x = 0.3 + 0.8 * jax.random.normal(KEY, (1000, 1))
    fix = correction.second_flow(sampling.euler(velocity))
    for steps in (1, 4):
        y, info = correction.second_flow(sampling.euler(velocity), steps=steps)(KEY, x, 1.0)
        np.testing.assert_allclose(y, a * (x - 0.3), atol=1e-5)
    np.testing.assert_allclose(info["moved"], np.abs(y - x)[:, 0], rtol=1e-5)
    step = sampling.euler(lambda x, t, cond=None: 0 * x)
    result = sampling.sample(step, x, 2, corrector=fix, at=(2,), key=KEY)
    np.testing.assert_allclose(result, a * (x - 0.3), atol=1e-5)
    with pytest.raises(ValueError, match="^ts="):
        sampling.sample(step, x, 2, corrector=fix, at=(1,), key=KEY)
    assert sampling.cost(step, 2, at=(2,), corrector=fix).nfe == 3


def test_variance_descent_follows_the_gradient_of_the_posterior_variance(x64):
    """``div v = t / (1-t)^3 tr Cov(x1 | x) - d / (1-t)``: by the covariance of a mixture, differentiated apart."""
    means, std, t = jnp.array([[-1.0, 0.5], [1.2, -0.3]]), 0.3, 0.55
    oracle = oracles.mixture(means, std)
    x = jax.random.normal(KEY, (7, 2)).astype(float)
    y, info = correction.variance_descent(oracle.velocity, strength=0.02)(KEY, x, t)

    def spread(x):  # tr Cov(x1 | x) of one example, by the responsibilities
        var = t**2 * std**2 + (1 - t) ** 2
        w = jax.nn.softmax(-jnp.sum((x - t * means) ** 2, 1) / (2 * var))
        each = means + t * std**2 / var * (x - t * means)
        inner = 2 * (std**2 - (t * std**2) ** 2 / var)
        middle = w @ each
        return inner + w @ jnp.sum((each - middle) ** 2, 1)

    expected = -0.02 * t / (1 - t) ** 3 * jax.vmap(jax.grad(spread))(x)
    np.testing.assert_allclose(y - x, expected, rtol=1e-8)
    assert (jax.vmap(spread)(y) < jax.vmap(spread)(x)).all()
    np.testing.assert_allclose(info["moved"], np.sqrt(np.mean((y - x) ** 2, 1)), rtol=1e-10)
    still = correction.variance_descent(oracles.gaussian(0.3, 0.5).velocity, strength=1.0)
    np.testing.assert_allclose(still(KEY, x, t)[0], x, atol=1e-12)


def test_probes_estimate_the_descent():
    oracle = oracles.mixture(jnp.array([[-1.0, 0.5], [1.2, -0.3]]), 0.3)
    x = jnp.broadcast_to(jnp.array([0.2, 0.1]), (2000, 2))
    exact = correction.variance_descent(oracle.velocity, strength=0.1)(KEY, x[:1], 0.5)[0] - x[:1]
    moved = np.asarray(
        jax.jit(correction.variance_descent(oracle.velocity, strength=0.1, probes=1))(KEY, x, 0.5)[0] - x
    )
    assert (np.abs(moved.mean(0) - exact[0]) < 4.5 * moved.std(0) / 2000**0.5 + 1e-6).all() and moved.std() > 0


def test_the_density_of_a_push_is_that_of_the_oracle():
    """``log N(y) + log det`` of a mixture, whose divergence changes along the way and with the example."""
    oracle = oracles.mixture(jnp.array([[-0.9], [0.9]]), 0.4)
    x = jnp.linspace(-2, 2, 9)[:, None]
    y, log_det = sampling.push_with_log_det(oracle.velocity, x, np.linspace(1, 0, 17))
    density = log_det - 0.5 * (y[:, 0] ** 2 + np.log(2 * np.pi))
    np.testing.assert_allclose(density, oracle.log_density(x, 1.0), atol=2e-4)
    half = sampling.push_with_log_det(oracle.velocity, x, np.linspace(1, 0, 17), until=jnp.full(9, 0.5))
    density = half[1] - 0.5 * (half[0][:, 0] ** 2 + np.log(2 * np.pi))
    np.testing.assert_allclose(density, oracle.log_density(x, 0.5), atol=2e-4)


def test_moves_of_a_flow_leave_its_distribution_alone():
    """At the end, of a mixture: its second moment and its mass between the modes, from there and from elsewhere."""
    oracle, n = oracles.mixture(jnp.array([[-0.9], [0.9]]), 0.4), 4000
    x = oracle.sample(jax.random.key(1), n)
    fix = correction.flow_mala(oracle.velocity, step=0.08, steps=25, solver_steps=5)
    y, info = jax.jit(fix)(KEY, x, 1.0)
    assert 0.5 < info["accepted"].mean() < 1 and np.corrcoef(np.abs(x[:, 0]), np.abs(y[:, 0]))[0, 1] < 0.5
    narrow = jax.jit(fix)(KEY, jnp.sign(x) * 0.9, 1.0)[0]  # of the modes alone
    for z in (y, narrow):
        for moment, exact in ((z**2, 0.9**2 + 0.4**2), (jnp.abs(z) < 0.5, 0.15865 - 0.00023)):
            values = np.asarray(moment, float)
            assert abs(values.mean() - exact) < 4.5 * values.std() / n**0.5 + 0.003
    with pytest.raises(ValueError, match="^path="):
        correction.flow_mala(oracle.velocity, step=0.1, path=paths.ve())


def test_marginals_of_the_corrected_sampler_are_its_own(tmp_path):
    """Halving at the steps 1 and 3 of a flow with a known scale: stored states are those that a corrector meets."""
    halve = lambda key, x, t, cond=None: (x / 2 + 0.1, {})
    ts = np.linspace(0, 1, 5)
    view = lambda params: correction.corrected_step(
        sampling.euler(lambda x, t, cond=None: params * x), halve, ts=ts, at=(1, 3)
    )
    correction.build_marginals(
        view, 0.4, ts, directory=tmp_path, direction="forward", flow="halved", count=5, shape=(2,), solver="flow_map"
    )
    x = correction.read_marginals(tmp_path).x
    grow, expected = 1.1, [np.asarray(x[:, 0])]
    for n in range(4):
        now = expected[-1] / 2 + 0.1 if n in (1, 3) else expected[-1]
        expected.append(grow * now)
    np.testing.assert_allclose(x, np.stack(expected, 1), rtol=1e-5)
    step = sampling.euler(lambda x, t, cond=None: 0.4 * x)
    sampled = sampling.sample(step, x[:, 0], ts, corrector=halve, at=(1, 3), key=KEY)
    np.testing.assert_allclose(x[:, -1], sampled, rtol=1e-5)
    with pytest.raises(ValueError, match="^at="):
        correction.corrected_step(step, halve, ts=ts, at=(4,))


def test_noise_of_a_corrected_step_belongs_to_the_example():
    noise = correction.marginal_matching(lambda x, t, cond=None: 0 * x, alpha=0.0, beta=1.0)
    still = sampling.euler(lambda x, t, cond=None: 0 * x)
    step = correction.corrected_step(still, noise, ts=[0.0, 0.5, 1.0], at=(1,))
    x = jax.random.normal(KEY, (2000, 3))
    moved = step(x, 0.5, 1.0) - x
    assert abs(float(moved.std()) - 1) < 0.05 and abs(float(jnp.mean(moved * x))) < 0.06
    np.testing.assert_array_equal(step(x[7:9], 0.5, 1.0) - x[7:9], moved[7:9])
    np.testing.assert_array_equal(step(x, 0.0, 0.5), x)
    keyed = functools.partial(step, key=as_keys(KEY, 2000))
    assert np.abs(keyed(x, 0.5, 1.0) - x - moved).max() > 0.1


@pytest.mark.parametrize("by", ["variance_descent", "flow_mala"])
def test_a_config_names_the_correctors_of_a_velocity(by):
    factory = samplers.corrector_factory("corrections.end", by, ())
    assert factory is getattr(correction, by)
    with pytest.raises(ValueError, match="second_flow"):
        samplers.corrector_factory("corrections.end", "second_flow", ())
