"""Steps of SDEs: weak order by exact moments, the marginals of the ODE for every strength, memory and its absence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from affine import MEAN, STD, moments, slopes

from fmjax import oracles, paths, sampling
from fmjax.experiments import specs
from fmjax.keys import as_keys, normal
from fmjax.sampling import grids
from fmjax.types import over_batch

STEPS = {"euler_maruyama": sampling.euler_maruyama, "stochastic_heun": sampling.stochastic_heun}
PLAIN = {"euler_maruyama": sampling.euler, "stochastic_heun": sampling.heun}
ORDER = {"euler_maruyama": 1, "stochastic_heun": 2}
STRENGTHS = {"0.5": 0.5, "2": 2.0, "rising": lambda t: 0.5 + t**2, "memoryless": "memoryless"}
every_step = pytest.mark.parametrize("name", STEPS)
MEANS, STDS, WEIGHTS = jnp.array([[2.0, 0.5], [-1.5, 1.0], [0.3, -2.0]]), jnp.array([0.3, 0.4, 0.6]), (0.5, 0.2, 0.3)


@every_step
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(("start", "stop"), [(0.1, 0.9), (0.9, 0.1)])
def test_moments_converge_to_the_marginals_at_the_weak_order(name, strength, start, stop, x64):
    path = paths.trigonometric()  # on the linear one both steps carry the mean without error
    oracle = oracles.gaussian(MEAN, STD, path=path)
    step = STEPS[name](oracle.velocity, strength=STRENGTHS[strength], path=path)
    order, error = slopes(step, path, start, stop)
    np.testing.assert_allclose(order, ORDER[name], atol=0.2)
    assert (error < 0.02).all()


def test_heuns_order_holds_to_the_data_where_the_score_is_open(x64):
    path = paths.trigonometric()
    oracle = oracles.gaussian(MEAN, STD, path=path)
    step = sampling.stochastic_heun(oracle.velocity, strength=0.8, path=path)
    order, _ = slopes(step, path, 0.1, 1.0, n=320)
    assert (order > 1.8).all(), order


@every_step
def test_one_step_is_the_formula(name, x64, key):
    """Written out from the score of the oracle, one interval an example, forward and backward."""
    oracle = oracles.gaussian(MEAN, STD)
    g = lambda t: 0.3 + t
    x, keys = jax.random.normal(key, (2, 1)), as_keys(key, 2)
    s, t = jnp.array([0.2, 0.7]), jnp.array([0.5, 0.4])
    h, sign = (t - s)[:, None], jnp.array([[1.0], [-1.0]])
    slope = lambda x, t: oracle.velocity(x, t) + sign * (g(t) ** 2 / 2)[:, None] * oracle.score(x, t)
    noise = lambda t: g(t)[:, None] * jnp.sqrt(abs(h)) * normal(keys, (1,), jnp.float64)
    if name == "euler_maruyama":
        want = x + h * slope(x, s) + noise(s)
    else:
        end = x + h * slope(x, s) + noise((s + t) / 2)
        want = x + h / 2 * (slope(x, s) + slope(end, t)) + noise((s + t) / 2)
    got = STEPS[name](oracle.velocity, strength=g)(x, s, t, None, keys)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    given = STEPS[name](oracle.velocity, strength=g, score=lambda x, t, cond=None: oracle.score(x, t))
    np.testing.assert_allclose(given(x, s, t, None, keys), want, rtol=1e-12)


@every_step
def test_without_diffusion_it_is_the_step_of_the_ode(name, key):
    oracle = oracles.mixture(MEANS, STDS)
    x, keys = jax.random.normal(key, (5, 2)), as_keys(key, 5)
    plain, none = (jax.jit(f) for f in (PLAIN[name](oracle.velocity), STEPS[name](oracle.velocity, strength=0.0)))
    zero = jax.jit(STEPS[name](oracle.velocity, strength=jnp.zeros_like))
    for s, t in ((0.0, 0.3), (0.4, 1.0), (1.0, 0.7)):
        want = plain(x, s, t)
        np.testing.assert_array_equal(none(x, s, t), want)
        silent = zero(x, s, t, None, keys)
        np.testing.assert_allclose(silent, want, rtol=1e-6, atol=1e-6)


def masses(x):
    """Shares of the samples nearest to each mode, and first and second moments, with standard errors."""
    near = np.argmin(((x[:, None] - np.asarray(MEANS)) ** 2).sum(-1), 1)
    columns = np.concatenate([near[:, None] == np.arange(3), x, x**2, x[:, :1] * x[:, 1:]], 1)
    return columns.mean(0), columns.std(0) / len(x) ** 0.5


@pytest.mark.parametrize("strength", STRENGTHS)
def test_every_strength_has_the_marginals_of_the_mixture(strength, key):
    """Mode weights and moments within standard errors of samples of the data, halfway and at the end."""
    n, weights = 10_000, jnp.array(WEIGHTS)
    oracle = oracles.mixture(MEANS, STDS, weights)
    x0, data = jax.random.normal(key, (n, 2)), oracle.sample(jax.random.key(1), n)
    grid = np.concatenate([[0.0], np.geomspace(0.01, 0.1, 12)[:-1], np.linspace(0.1, 1.0, 91)])
    step = sampling.stochastic_heun(oracle.velocity, strength=STRENGTHS[strength])
    run = jax.jit(lambda x, key: sampling.sample(step, x, grid, key=key, trajectory=True)[jnp.array([57, -1])])
    middle, end = np.asarray(run(x0, jax.random.key(2)), np.float64)
    t = grid[57]
    noised = t * data + (1 - t) * jax.random.normal(jax.random.key(3), (n, 2))
    for got, want in ((middle, np.asarray(noised, np.float64)), (end, np.asarray(data, np.float64))):
        (a, sa), (b, sb) = masses(got), masses(want)
        z = (a - b) / np.hypot(sa, sb)
        assert np.abs(z).max() < 4, (strength, z)


@every_step
def test_memoryless_ends_do_not_depend_on_their_start(name, x64):
    """The exact covariance of ``x1`` and ``x0``, from the first step, of the ODE, on: it falls with its length."""
    oracle = oracles.gaussian(MEAN, STD)
    grid = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 200)])
    correlation = lambda m: m[2] / m[1] ** 0.5  # the source has variance 1
    even = [grids.uniform_grid(100)]
    ((mean, var, memory),) = moments(STEPS[name](oracle.velocity, strength="memoryless"), [grid], 0.0, 1.0)
    assert abs(memory / var**0.5) < 1e-3
    np.testing.assert_allclose([mean, var], [MEAN, STD**2], rtol=0.05)
    assert correlation(moments(PLAIN[name](oracle.velocity), even, 0.0, 1.0)[0]) > 0.99
    half = moments(STEPS[name](oracle.velocity, strength=0.5), even, 0.0, 1.0)[0]
    assert 0.1 < correlation(half) < 0.9


def test_memoryless_samples_are_uncorrelated_with_their_noise(key):
    n = 10_000
    oracle = oracles.mixture(MEANS, STDS)
    x0 = jax.random.normal(key, (n, 2))
    grid = np.concatenate([[0.0], np.geomspace(1e-3, 1.0, 120)])
    step = sampling.euler_maruyama(oracle.velocity, strength="memoryless")
    x1 = np.asarray(jax.jit(lambda x, key: sampling.sample(step, x, grid, key=key))(x0, jax.random.key(1)))
    between = np.corrcoef(np.concatenate([x0, x1], 1).T)[:2, 2:]
    assert np.abs(between).max() < 4 / n**0.5


def test_the_memoryless_strength_is_the_published_one(x64):
    t = jnp.linspace(0.1, 0.9, 5)
    np.testing.assert_allclose(sampling.memoryless()(t) ** 2, 2 * (1 - t) / t, rtol=1e-12)
    tau = 1 - t  # the VP SDE's own diffusion, nu(tau), and the VE SDE's (arXiv 2011.13456, appendix C)
    np.testing.assert_allclose(sampling.memoryless(paths.vp())(t) ** 2, 0.1 + 19.9 * tau, rtol=1e-10)
    sigma = 0.01 * 5000**tau
    np.testing.assert_allclose(sampling.memoryless(paths.ve())(t) ** 2, 2 * jnp.log(5000.0) * sigma**2, rtol=1e-10)


@every_step
def test_where_strength_or_score_has_no_value_a_step_is_one_of_the_ode(name, x64, key):
    oracle = oracles.mixture(MEANS.astype(float), STDS.astype(float))
    x, keys = jax.random.normal(key, (3, 2)), as_keys(key, 3)
    start = jax.jit(STEPS[name](oracle.velocity, strength="memoryless"))(x, 0.0, 0.1, None, keys)
    np.testing.assert_allclose(start, jax.jit(PLAIN[name](oracle.velocity))(x, 0.0, 0.1), rtol=1e-12)
    for path in (paths.linear(), paths.trigonometric()):
        velocity = oracles.mixture(MEANS.astype(float), STDS.astype(float), path=path).velocity
        step = jax.jit(STEPS[name](velocity, strength=1.0, path=path))
        np.testing.assert_allclose(
            step(x, 1.0, 0.9, None, keys), jax.jit(PLAIN[name](velocity))(x, 1.0, 0.9), rtol=1e-12
        )
        assert np.isfinite(step(x, 0.9, 1.0, None, keys)).all()


@every_step
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_the_bridge_sde_of_the_entropic_plan_is_the_schroedinger_bridge(name, sigma, x64):
    """Its ends are coupled as the plan: the pair's covariance is ``(sqrt(4 a b + sigma^4) - sigma^2) / 2``."""
    a, b = 1.0, 0.49
    across = (np.sqrt(4 * a * b + sigma**4) - sigma**2) / 2
    path = paths.schroedinger_bridge(sigma=sigma)
    oracle = oracles.coupled(jnp.zeros(1), jnp.full(1, MEAN), jnp.array([[a, across], [across, b]]), path=path)
    step = STEPS[name](oracle.velocity, strength=sigma, path=path, score=lambda x, t, cond=None: oracle.score(x, t))
    grids = [np.linspace(0, 1, n + 1) for n in (100, 200)]
    coarse, fine = np.abs(moments(step, grids, 0.0, a) - [MEAN, b, across])
    assert max(fine[[0, 2]]) < 1e-12  # the drift of a bridge is a martingale: means, given the start, go straight
    np.testing.assert_allclose(np.log2(coarse[1] / fine[1]), ORDER[name], atol=0.1)
    assert fine[1] < 0.01
    plain = moments(PLAIN[name](oracle.velocity), grids[1:], 0.0, a)
    assert abs(plain[0, 2] - across) > 0.1  # the ODE has the marginals, not the coupling


def test_a_draw_belongs_to_its_example_and_its_step(key):
    oracle = oracles.mixture(MEANS, STDS)
    x = jax.random.normal(key, (6, 2))
    step = sampling.stochastic_heun(oracle.velocity)
    run = lambda x, keys: sampling.sample(step, x, grids.uniform_grid(4), key=keys)
    keys = as_keys(jax.random.key(4), 6)
    np.testing.assert_allclose(run(x[2:4], keys[2:4]), run(x, keys)[2:4], rtol=1e-5)
    noise = lambda n: sampling.sample(
        sampling.euler_maruyama(lambda x, t, cond=None: 0 * x, score=lambda x, t, cond=None: 0 * x),
        jnp.zeros((1, 2)), grids.uniform_grid(n), key=jax.random.key(5), trajectory=True,
    )  # fmt: skip
    increments = np.diff(np.asarray(noise(8))[:, 0], axis=0)
    assert len(np.unique(increments)) == 16


def test_a_condition_reaches_velocity_and_score(key):
    x, keys = jnp.zeros((2, 1)), as_keys(key, 2)
    cond = jnp.array([1.0, -3.0])
    tell = lambda x, t, cond: cond[:, None] + 0 * x
    for make in STEPS.values():
        step = make(tell, score=lambda x, t, cond: 4 * tell(x, t, cond), strength=1.0)
        noise = make(lambda x, t, cond: 0 * x, score=lambda x, t, cond: 0 * x, strength=1.0)(x, 0.2, 0.3, cond, keys)
        np.testing.assert_allclose(step(x, 0.2, 0.3, cond, keys) - noise, 0.1 * 3 * cond[:, None], rtol=1e-5)


def test_steps_are_named_in_a_config_with_their_strength(key):
    oracle = oracles.mixture(MEANS, STDS)
    x, keys = jax.random.normal(key, (3, 2)), as_keys(key, 3)
    for name, strength in (("euler_maruyama", 2.0), ("stochastic_heun", "memoryless"), ("stochastic_heun", 0.5)):
        spec = {"name": name, "strength": strength}
        step = jax.jit(specs.build(specs.SOLVER, spec, oracle.velocity, field="solver"))
        want = jax.jit(STEPS[name](oracle.velocity, strength=strength))(x, 0.2, 0.4, None, keys)
        np.testing.assert_array_equal(step(x, 0.2, 0.4, None, keys), want)
        seen = []

        def count(x, t, cond=None, seen=seen):
            jax.debug.callback(lambda: seen.append(1))
            return over_batch(t, x)[:, None] * x

        jax.block_until_ready(jax.jit(STEPS[name](count, strength=strength))(x, 0.2, 0.4, None, keys))
        jax.effects_barrier()
        assert len(seen) == STEPS[name](count, strength=strength).nfe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0: "),
        ({"strength": float("inf")}, "strength=inf: "),
        ({"strength": "memory"}, "strength='memory': "),
        ({"path": paths.two_sided()}, "the score of an SDE step.* latent"),
        (
            {"path": paths.two_sided(), "strength": "memoryless", "score": lambda x, t: x},
            "the memoryless strength.* latent",
        ),
    ],
)
@every_step
def test_what_cannot_be_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        STEPS[name](lambda x, t, cond=None: x, **options)


@every_step
def test_a_step_without_a_key_says_so(name):
    with pytest.raises(ValueError, match="key=None: "):
        sampling.sample(STEPS[name](lambda x, t, cond=None: x), jnp.zeros((2, 1)), [0.0, 0.5])
