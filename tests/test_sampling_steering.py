"""Posterior samples, GLASS transitions and control by a reward, against the closed forms of Gaussians and mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, sampling
from fmjax.experiments import build
from fmjax.keys import as_keys
from fmjax.sampling import steering

PATHS = {"linear": paths.linear(), "trigonometric": paths.trigonometric(), "ve": paths.ve()}
MEANS, STDS, WEIGHTS = (
    np.array([[-1.5, 0.3], [1.0, -0.6], [0.0, 2.0]]),
    np.array([0.5, 0.7, 0.2]),
    np.array([0.4, 0.3, 0.3]),
)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("t", "r"), [(0.4, 0.0), (0.4, 0.7), (0.9, 0.3)])
def test_two_observations_are_one(name, t, r, x64):
    """``E[x1 | x, y]`` of a mixture, from the product of both Gaussian likelihoods, is the data prediction."""
    path = PATHS[name]
    oracle = oracles.mixture(jnp.asarray(MEANS), jnp.asarray(STDS), jnp.asarray(WEIGHTS), path=path)
    (a, b), (a_r, b_r) = path.coefficients(jnp.float64(t)), (1 - r, r)
    x, y = np.random.default_rng(0).normal(size=(2, 6, 2))
    x = float(a + b) * x
    inner = steering.posterior_velocity(oracle.velocity, jnp.asarray(x), t, path=path)
    data = paths.convert(paths.linear(), jnp.asarray(y), inner(jnp.asarray(y), r), r, kind="velocity", to="data")
    a, b = float(a), float(b)
    snr = b**2 / a**2 + b_r**2 / a_r**2
    seen = (b * x / a**2 + b_r * y / a_r**2) / snr  # one observation of x1 of the variance 1 / snr
    offset = seen[:, None] - MEANS
    log_r = np.log(WEIGHTS) - np.log(STDS**2 + 1 / snr) - 0.5 * (offset**2).sum(2) / (STDS**2 + 1 / snr)
    weight = np.exp(log_r - log_r.max(1, keepdims=True))
    each = MEANS + offset * (STDS**2 / (STDS**2 + 1 / snr))[:, None]
    expected = (weight[..., None] * each).sum(1) / weight.sum(1)[:, None]
    np.testing.assert_allclose(data, expected, atol=1e-9 if name == "linear" else 1e-7)


def test_the_inner_flow_ends_in_the_posterior(x64):
    """Gaussian data: ``N(mean, var)``, ``1 / var = 1 / std^2 + SNR``; the inner flow is affine, so two points tell."""
    oracle, t, x = oracles.gaussian(0.5, 0.8), 0.6, jnp.full((2, 1), 0.9)
    snr = t**2 / (1 - t) ** 2
    var = 1 / (1 / 0.8**2 + snr)
    mean = var * (0.5 / 0.8**2 + t * 0.9 / (1 - t) ** 2)
    inner = steering.posterior_velocity(oracle.velocity, x, t)
    errors = []
    for n in (16, 32):
        end = sampling.sample(sampling.midpoint(inner), jnp.array([[0.0], [1.0]]), n)[:, 0]
        errors.append(max(abs(end[0] - mean), abs(end[1] - end[0] - var**0.5)))
    assert errors[1] < 1e-3 and errors[0] / errors[1] > 3, errors


@pytest.mark.parametrize("rho", [0.0, 0.6, 1.0])
def test_a_transition_keeps_the_marginals_and_correlates_the_noise(rho):
    """``Var x_t = a_t^2 + b_t^2 var`` and ``Cov(x_s, x_t) = b_s b_t var + rho a_s a_t``, in one step."""
    oracle, n = oracles.gaussian(0.3, 0.5), 40_000
    s, t = 0.3, 0.8
    start = oracle.flow_map(jax.random.normal(jax.random.key(0), (n, 1)), 0.0, s)
    step = jax.jit(steering.glass(oracle.velocity, steps=32, correlation=rho))
    end = step(start, s, t, key=as_keys(jax.random.key(1), n))
    want = [0.3 * t, (1 - t) ** 2 + t**2 / 4, s * t / 4 + rho * (1 - s) * (1 - t)]
    both = np.cov(np.asarray(start)[:, 0], np.asarray(end)[:, 0])
    np.testing.assert_allclose([end.mean(), both[1, 1], both[0, 1]], want, atol=4 * 0.6 / n**0.5)


def test_two_transitions_from_noise_sample_a_mixture():
    """The number of transitions has no error of its own: two and five give the same distribution."""
    oracle = oracles.mixture(jnp.array([[-1.5], [1.5]]), 0.3, jnp.array([0.3, 0.7]))
    x0 = jax.random.normal(jax.random.key(0), (8_000, 1))
    step = steering.glass(oracle.velocity, steps=20)
    for n in (2, 5):
        x = jax.jit(lambda x, n=n: sampling.sample(step, x, n, key=jax.random.key(1)))(x0)
        np.testing.assert_allclose([(x > 0).mean(), x.mean(), x.var()], [0.7, 0.6, 0.09 + 2.25 * 0.84], atol=0.07)


@pytest.mark.parametrize("through", [False, True])
def test_three_evaluations_reach_a_tilted_gaussian(through, x64):
    """A linear reward moves Gaussian data by ``std^2 slope``; the scale that does so is known."""
    std, slope, t = 0.7, jnp.array([1.5, -0.5]), 0.6
    oracle = oracles.gaussian(jnp.array([0.2, 0.1]), std)
    calls = []

    def flow_map(x, s, t, cond=None, key=None):
        jax.debug.callback(lambda: calls.append(1))
        return oracle.flow_map(x, s, t)

    carried = std / np.sqrt((1 - t) ** 2 + t**2 * std**2)  # of X_{t,1}
    scale = std**2 / (carried * t * (std if through else 1.0))
    step = steering.controlled(flow_map, lambda x, cond=None: x @ slope, scale=scale, through=through)
    x0 = jax.random.normal(jax.random.key(0), (5, 2), jnp.float64)
    x = sampling.sample(step, x0, [0.0, t, 1.0])
    jax.effects_barrier()
    np.testing.assert_allclose(x, oracle.flow_map(x0, 0.0, 1.0) + std**2 * slope, rtol=1e-12)
    assert len(calls) == 3


def test_ascent_climbs_a_quadratic_reward(x64):
    """``y <- y - rate (y - 2)``: the distance to the top shrinks by ``(1 - rate)^n``."""
    oracle, t = oracles.gaussian(0.0, 1.0), 0.5
    step = steering.controlled(
        oracle.flow_map, lambda x, cond=None: -((x - 2) ** 2).sum(1) / 2, scale=3.0, ascent=4, rate=0.25
    )
    x = jnp.array([[0.4]])
    end = oracle.flow_map(x, 0.0, 1.0)
    want = oracle.flow_map(x, 0.0, t) + t * 3.0 * (2 - end) * (1 - 0.75**4)
    np.testing.assert_allclose(step(x, 0.0, t), want, rtol=1e-12)


def test_a_jump_to_the_data_is_free_beside_others(x64):
    """Times of each example: where the jump ends at 1 there is no push, whatever the others do."""
    step = steering.controlled(ORACLE.flow_map, REWARD, scale=1.0)
    x, s, t = jnp.ones((2, 1)), jnp.array([0.2, 0.5]), jnp.array([0.6, 1.0])
    free = ORACLE.flow_map(x, s, t)
    np.testing.assert_allclose(step(x, s, t) - free, [[0.6], [0.0]], atol=1e-12)


REWARD = lambda x, cond=None: x.sum(1)
ORACLE = oracles.gaussian(0.0, 1.0)


@pytest.mark.parametrize(
    ("field", "run"),
    {
        "steps": lambda: steering.glass(ORACLE.velocity, steps=0),
        "correlation": lambda: steering.glass(ORACLE.velocity, correlation=1.5),
        "solver.correlation": lambda: build.step({"name": "glass", "correlation": 2.0}),
        "solver.steps": lambda: build.step({"name": "glass", "steps": 0}),
        "solver.solver": lambda: build.step({"name": "reflected", "solver": "huen"}),
        "key": lambda: steering.glass(ORACLE.velocity)(jnp.ones((1, 1)), 0.0, 0.5),
        "rate": lambda: steering.controlled(ORACLE.flow_map, REWARD, scale=1.0, rate=np.nan),
        "scale": lambda: steering.controlled(ORACLE.flow_map, REWARD, scale=np.inf),
        "ascent": lambda: steering.controlled(ORACLE.flow_map, REWARD, scale=1.0, ascent=0),
    }.items(),
)
def test_what_cannot_work_is_refused(field, run):
    with pytest.raises(ValueError, match=f"^{field}="):
        run()
