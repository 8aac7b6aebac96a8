"""Training-free correctors against closed forms: Metropolis's stationarity, restart's contraction, kernel densities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import stats

from fmjax import correction, oracles, paths, sampling
from fmjax.correction import correctors
from fmjax.keys import as_keys, normal, split
from fmjax.sampling import grids, likelihood
from fmjax.training import sharding
from fmjax.types import Costed, stated

N = 40_000
V, H = 1.7, 1.2  # the published case of a Langevin step that is too long: unadjusted it ends at a variance of 2.6


def gauss(scale=1.0, var=V):
    """A score, right for ``scale=1``, and the log-density up to a constant, of ``N(0, var)``."""
    return lambda x, t, cond=None: -scale * x / var, lambda x, t, cond=None: -(x**2).sum(-1) / (2 * var)


def assert_moments(x, mean, var):
    """z-tests of the mean and the variance of Gaussian samples ``[n, d]``, coordinate by coordinate."""
    x = np.asarray(x, np.float64)
    assert np.abs((x.mean(0) - mean) / np.sqrt(var / len(x))).max() < 4.5
    assert np.abs((x.var(0) / var - 1) * (len(x) / 2) ** 0.5).max() < 4.5


@pytest.mark.parametrize("snr", [0.16, lambda t: 0.1 + t])
def test_snr_is_the_ratio_of_push_and_noise_of_each_example(snr, x64, key):
    """From ``x' - x = h S + sqrt(2h) z``, solved for its two coefficients: ``|h S| / |sqrt(2h) z| = snr``."""
    scale = jnp.array([1.0, 1e-2, 1e4])[:, None, None]  # no example's score may set another's step
    score = lambda x, t, cond=None: -scale[: len(x)] * x
    keys, x, t = as_keys(key, 3), jax.random.normal(key, (3, 4, 2), jnp.float64), jnp.array([0.2, 0.5, 0.9])
    y, _ = correctors.langevin(score, snr=snr)(keys, x, t)
    z = normal(split(keys, 1)[0], (4, 2), jnp.float64)
    for i in range(3):
        push, noise = score(x, t)[i].ravel(), z[i].ravel()
        (h, root), *_ = np.linalg.lstsq(np.stack([push, noise], 1), (y - x)[i].ravel(), rcond=None)
        assert root**2 == pytest.approx(2 * h, rel=1e-9)
        ratio = h * np.linalg.norm(push) / (root * np.linalg.norm(noise))
        assert ratio == pytest.approx(snr(float(t[i])) if callable(snr) else snr, rel=1e-9)


def acceptance(h, var):
    """``E min(1, r)`` of one Metropolis-adjusted step in equilibrium, by the trapezoidal rule over x and y."""
    x = np.linspace(-12, 12, 1201) * var**0.5
    log_p = stats.norm.logpdf(x, 0, var**0.5)
    log_way = stats.norm.logpdf(x[None, :], (1 - h / var) * x[:, None], (2 * h) ** 0.5)  # from x (rows) to y
    flow = log_p[:, None] + log_way
    return np.exp(np.minimum(flow, flow.T)).sum() * (x[1] - x[0]) ** 2


def test_metropolis_keeps_the_distribution_that_langevin_leaves(key):
    """Variance 1.7 after three long steps, accepted at the published .87; unadjusted they reach the closed form."""
    keys, x = as_keys(key, N), V**0.5 * normal(as_keys(jax.random.key(1), N), (1,))
    y, info = jax.jit(correctors.mala(*gauss(), step=H, steps=3))(keys, x, 0.5)
    assert_moments(y, 0, V)
    rate = acceptance(H, V)
    assert rate == pytest.approx(0.87, abs=0.005)
    share = np.asarray(info["accepted"], np.float64)
    assert set(np.unique(share.round(3))) == {0.0, 0.333, 0.667, 1.0}
    assert abs(share.mean() - rate) < 4.5 * share.std() / N**0.5
    free, _ = jax.jit(correctors.langevin(gauss()[0], step=H, steps=3))(keys, x, 0.5)
    limit = V / (1 - H / (2 * V))
    assert limit == pytest.approx(2.62, abs=0.01)
    assert_moments(free, 0, limit + (V - limit) * (1 - H / V) ** 6)


@pytest.mark.parametrize("scale", [0.3, -0.2])
def test_a_wrong_score_costs_acceptance_and_not_the_law(scale, key):
    """From a point, 60 steps; the score decides only where to look."""
    fix = jax.jit(correctors.mala(*gauss(scale), step=1.0, steps=60))
    y, info = fix(as_keys(key, N // 2), jnp.zeros((N // 2, 1)), 0.5)
    assert_moments(y, 0, V)
    assert 0.3 < info["accepted"].mean() < 1


def test_metropolis_keeps_a_law_with_an_edge(key):
    """Uniform on an interval, whose log-density outside is -inf or no number: what leaves it is not taken."""
    x = jax.vmap(jax.random.uniform)(as_keys(jax.random.key(1), N))[:, None]
    for outside in (-jnp.inf, jnp.nan):
        density = lambda x, t, cond=None: jnp.where((0 <= x) & (x <= 1), 0.0, outside)[:, 0]  # noqa: B023
        still = lambda x, t, cond=None: jnp.zeros_like(x)
        y, info = jax.jit(correctors.mala(still, density, step=0.05, steps=4))(as_keys(key, N), x, 0.5)
        assert stats.kstest(np.asarray(y)[:, 0], "uniform").pvalue > 1e-4
        never = np.asarray(info["accepted"]) == 0
        assert 0 < never.sum() < N / 10 and (y[never] == x[never]).all() and (info["moved"][never] == 0).all()


def test_metropolis_with_the_likelihood_of_the_flow_itself(x64, key):
    """At the end of the sampler, jitted: the same as with the closed form, step by step."""
    oracle = oracles.gaussian(jnp.array([0.5, -1.0]), jnp.array([0.4, 1.5]))
    ts = grids.uniform_grid(4)
    exact = lambda x, t, cond=None: oracle.log_density(x, t)
    flow = lambda x, t, cond=None: likelihood.log_density(oracle.velocity, x, cond).log_p
    score = lambda x, t, cond=None: oracle.score(x, t)
    run = lambda density: jax.jit(
        lambda x: sampling.sample(
            oracle.flow_map, x, ts, key=key, at=(4,), corrector=correctors.mala(score, density, step=0.15, steps=3)
        )
    )(normal(as_keys(key, 64), (2,), jnp.float64))
    np.testing.assert_allclose(run(flow), run(exact), rtol=1e-12)


PATHS = {"linear": paths.linear(), "trigonometric": paths.trigonometric(), "vp": paths.vp(), "ve": paths.ve()}


def variances(path, t, var):
    alpha, beta = (float(a) for a in path.coefficients(jnp.asarray(t)))
    return beta, alpha**2 + beta**2 * var


@pytest.mark.parametrize(("name", "loops"), [("linear", 1), ("linear", 3), ("trigonometric", 1), ("vp", 1), ("ve", 2)])
def test_restart_keeps_the_law_and_contracts_as_in_the_closed_form(name, loops, x64, key):
    """One jump of the exact map: the marginal at ``t`` stays; two chains of the same noise approach by ``c sqrt(C/C)``.

    .482 a loop for a variance of .6 from .8 back to .4 on the linear path; ``sqrt((V + low^2) / (V + high^2))`` on VE.
    """
    path, var, mean, late, early = PATHS[name], 0.6, 1.5, 0.8, 0.4
    oracle = oracles.gaussian(mean, var**0.5, path=path)
    fix = jax.jit(correctors.restart(oracle.flow_map, to=early, loops=loops, path=path))
    (b_late, c_late), (b_early, c_early) = variances(path, late, var), variances(path, early, var)
    keys = as_keys(key, N)
    x = b_late * mean + c_late**0.5 * normal(as_keys(jax.random.key(1), N), (1,), jnp.float64)
    y, info = fix(keys, x, late)
    assert_moments(y, b_late * mean, c_late)
    np.testing.assert_allclose(info["moved"], jnp.abs(y - x)[:, 0], atol=1e-12)
    factor = b_early / b_late * (c_late / c_early) ** 0.5
    np.testing.assert_allclose(fix(keys[:5], x[:5] + 1, late)[0] - y[:5], factor**loops, rtol=2e-6)
    if name == "linear":
        assert factor == pytest.approx(0.482, abs=5e-4)
    if name == "ve":
        low, high = (0.01 * 5000.0 ** (1 - t) for t in (late, early))
        assert factor == pytest.approx(((var + low**2) / (var + high**2)) ** 0.5, rel=1e-5)


def test_restart_by_ode_steps_goes_to_restart_by_the_exact_map(x64, key):
    """With the order of the step: 4. Each example has its own times."""
    oracle = oracles.gaussian(jnp.array([0.5, -1.0]), jnp.array([0.3, 1.2]))
    keys, x, t = as_keys(key, 3), jax.random.normal(key, (3, 2), jnp.float64), jnp.array([0.5, 0.9, 1.0])
    run = lambda step, n: jax.jit(correctors.restart(step, to=lambda t: t / 2, steps=n, loops=2))(keys, x, t)[0]
    expected = run(oracle.flow_map, 1)
    np.testing.assert_allclose(run(oracle.flow_map, 7), expected, rtol=1e-12)  # a map composes
    errors = [np.abs(run(sampling.rk4(oracle.velocity), n) - expected).max() for n in (20, 40, 80)]
    assert np.log2(np.array(errors[:-1]) / errors[1:]) == pytest.approx(4, abs=0.4)


def test_restart_keeps_a_mixture(key):
    """By RK4 along the exact velocity: the distribution function at t = .7 before and after, 20,000 samples."""
    means, std, weights, t = np.array([-1.5, 0.2, 2.0]), 0.3, np.array([0.3, 0.5, 0.2]), 0.7
    oracle = oracles.mixture(jnp.asarray(means)[:, None], std, jnp.asarray(weights))
    x1, x0 = oracle.sample(jax.random.key(1), 20_000), jax.random.normal(jax.random.key(2), (20_000, 1))
    x = t * x1 + (1 - t) * x0
    spread = ((1 - t) ** 2 + (t * std) ** 2) ** 0.5
    cdf = lambda x: (weights * stats.norm.cdf(np.asarray(x)[..., None], t * means, spread)).sum(-1)
    fix = correctors.restart(sampling.rk4(oracle.velocity), to=0.2, steps=10, loops=2)
    y, _ = jax.jit(fix)(as_keys(key, len(x)), x, t)
    assert stats.kstest(np.asarray(y)[:, 0], cdf).pvalue > 1e-4
    assert np.corrcoef(x[:, 0], y[:, 0])[0, 1] < 0.5  # and it was no identity


def test_restart_from_the_start_draws_again_and_checks_times(key):
    oracle = oracles.gaussian(1.0, 0.5)
    x, keys, ts = jnp.full((4, 1), 7.0), as_keys(key, 4), grids.uniform_grid(4)
    fresh = correctors.restart(oracle.flow_map, to=0.0)
    np.testing.assert_array_equal(
        jax.jit(fresh)(keys, x, 0.5)[0], jax.jit(fresh)(keys, -x, 0.5)[0]
    )  # nothing is left of x
    run = lambda fix, at: jax.jit(lambda x: sampling.sample(oracle.flow_map, x, ts, key=key, corrector=fix, at=at))(x)
    assert np.isfinite(run(fresh, (1, 4))).all()
    with pytest.raises(ValueError, match="to=0: restart at t=0 needs an earlier time"):
        run(fresh, (0, 4))
    with pytest.raises(ValueError, match="to=0.5: restart at t=0.25"):
        run(correctors.restart(oracle.flow_map, to=0.5), range(1, 5))
    with pytest.raises(ValueError, match="to=-0.1: restart at t=0.5"):
        run(correctors.restart(oracle.flow_map, to=lambda t: t - 0.6), (2,))
    with pytest.raises(ValueError, match="t=0.75: not among these 2 times"):
        run(correctors.restart(oracle.flow_map, to=grids.per_step([0.5, 1.0], [0.1, 0.9])), (2, 3))
    y, _ = jax.jit(correctors.restart(oracle.flow_map, to=0.5))(keys, x, jnp.array([0.4, 0.5, 0.6, 1.0]))
    np.testing.assert_array_equal(np.isnan(y[:, 0]), [True, True, False, False])
    for to in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"to={to}"):
            correctors.restart(oracle.flow_map, to=to)
    with pytest.raises(ValueError, match="restart needs a path without a latent"):
        correctors.restart(oracle.flow_map, to=0.5, path=paths.two_sided())
    for name in ("steps", "loops"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            correctors.restart(oracle.flow_map, to=0.5, **{name: 0})


def banks(key, shape, m=40, n=50, steps=3, dtype=jnp.float64):
    k_p, k_q = jax.random.split(key)
    return jax.random.normal(k_p, (m, steps, *shape), dtype), 1 + 0.5 * jax.random.normal(
        k_q, (n, steps, *shape), dtype
    )


@pytest.mark.parametrize("shape", [(2,), (3, 2, 1)])
@pytest.mark.parametrize("bandwidth", [0.4, lambda t: 0.3 + t])
def test_the_kernel_drift_is_a_difference_of_scores_of_densities(shape, bandwidth, x64, key):
    """``h^2 (grad log q_h - grad log p_h)`` by autodiff, every example at another time, in any order."""
    (p, q), ts = banks(key, shape), [0.0, 0.5, 1.0]
    x, step = jax.random.normal(jax.random.key(1), (5, *shape), jnp.float64), [2, 0, 1, 2, 0]
    t = jnp.asarray(ts)[jnp.asarray(step)]
    actual = jax.jit(correction.kernel_drift(p, q, ts=ts, bandwidth=bandwidth))(x, t)
    for i, n in enumerate(step):
        h = bandwidth(t[i]) if callable(bandwidth) else bandwidth
        log_kde = lambda x, bank: jax.nn.logsumexp(
            -((x - bank) ** 2).reshape(len(bank), -1).sum(1) / (2 * h**2)  # noqa: B023
        )
        expected = h**2 * (jax.grad(log_kde)(x[i], q[:, n]) - jax.grad(log_kde)(x[i], p[:, n]))
        np.testing.assert_allclose(actual[i], expected, rtol=1e-9, atol=1e-12)


def test_equal_banks_do_not_drift_and_far_points_stay_finite(key):
    p, q = banks(key, (2,), dtype=jnp.float32)
    x = 30 * jax.random.normal(jax.random.key(1), (7, 2))
    drift = functools.partial(correction.kernel_drift, ts=[0.0, 0.5, 1.0], bandwidth=0.05)
    np.testing.assert_array_equal(jax.jit(drift(p, p))(x, 0.5), 0 * x)
    moved = jax.jit(drift(p, q))(x, 0.5)
    assert np.isfinite(moved).all() and (moved != 0).all()


def test_the_mean_of_a_shifted_gaussian_moves_by_its_share_of_the_gap(key):
    """``a h^2 / (C + h^2)`` of the gap, over 32 independent pairs of banks; at the wrong step nothing moves."""
    gap, var, h, a, m = 0.8, 0.5, 0.7, 0.6, 2000
    moved = []
    fixed = jax.jit(  # the banks are arguments
        lambda p, q, x, key: correctors.marginal_matching(
            correction.kernel_drift(p, q, ts=[0.0, 1.0], bandwidth=h), alpha=a
        )(as_keys(key, len(x)), x, 1.0)[0]
    )
    for k in jax.random.split(key, 32):
        kp, kq, kx = jax.random.split(k, 3)
        p, q = var**0.5 * jax.random.normal(kp, (m, 2, 1)), var**0.5 * jax.random.normal(kq, (m, 2, 1))
        x = var**0.5 * jax.random.normal(kx, (500, 1))
        moved.append(float((fixed(p, q.at[:, 1].add(gap), x, k) - x).mean()))
    moved = np.array(moved)
    expected = a * h**2 / (var + h**2) * gap
    assert abs(moved.mean() - expected) < 4.5 * moved.std(ddof=1) / 32**0.5 < 0.05 * expected


def test_banks_are_arguments_and_bad_ones_are_refused(key):
    (p, q), x = banks(key, (2,), dtype=jnp.float32), jnp.zeros((4, 2))
    ts, grid = [0.0, 0.5, 1.0], grids.uniform_grid(4)
    direction = lambda p, q: correction.kernel_drift(p, q, ts=ts, bandwidth=0.5)

    def run(p, q, x, at=(0, 2, 4)):
        fix = correctors.marginal_matching(direction(p, q), alpha=0.5, beta=0.1)
        return sampling.sample(lambda x, s, t, cond=None, key=None: x, x, grid, key=key, corrector=fix, at=at)

    assert max((np.size(c) for c in jax.make_jaxpr(run)(p, q, x).consts), default=0) < 20
    assert np.isfinite(jax.jit(run)(p, q, x)).all()
    with pytest.raises(ValueError, match="t=0.25: not among these 3 times"):
        jax.jit(functools.partial(run, at=(0, 1)))(p, q, x)
    assert np.isnan(jax.jit(direction(p, q))(x, 0.25)).all()
    for bad in ((p[:, :2], q), (p, q[:, :2]), (p[..., :1], q)):
        with pytest.raises(ValueError, match=r"p=.*, q=.*3 times"):
            direction(*bad)
    with pytest.raises(ValueError, match="bandwidth=0.0"):
        correction.kernel_drift(p, q, ts=ts, bandwidth=0.0)


def everything(counted=lambda name, f: f):
    """Every corrector that draws, over a Gaussian oracle, by name, with the evaluations that it must state."""
    oracle = oracles.gaussian(0.5, 0.7)
    score = counted("score", lambda x, t, cond=None: oracle.score(x, t))
    density = counted("density", lambda x, t, cond=None: oracle.log_density(x, t))
    velocity = counted("velocity", oracle.velocity)
    p, q = banks(jax.random.key(3), (2,), steps=1, dtype=jnp.float32)
    drift = correction.kernel_drift(p, q, ts=[0.75], bandwidth=0.5)
    twice = Costed(lambda x, t, cond=None: score(x, t) + score(x, t), nfe=2)  # as a classifier: forward and backward
    return {
        "score": (correctors.marginal_matching(score, alpha=0.5, beta=0.2), 1),
        "twice": (correctors.marginal_matching(twice, alpha=0.5, beta=0.2), 2),
        "drift": (correctors.marginal_matching(drift, alpha=0.5, beta=0.2), 0),
        "langevin": (correctors.langevin(score, step=0.05, steps=3), 3),
        "of velocity": (correctors.langevin(correction.score_of(velocity), step=0.05, steps=2), 2),
        "snr": (correctors.langevin(score, snr=0.2, steps=2), 2),
        "mala": (correctors.mala(score, density, step=0.2, steps=3), 8),
        "ode": (correctors.restart(Costed(sampling.rk4(velocity), nfe=4), to=0.3, steps=3, loops=2), 24),
        "map": (correctors.restart(sampling.euler(velocity), to=0.3, loops=2), 2),
        "sde": (correctors.restart(sampling.euler_maruyama(velocity), to=0.3, steps=2), 2),
    }


@pytest.mark.parametrize("name", everything())
def test_a_correction_is_the_examples_own(name, key):
    """Whatever stands beside it, and on whichever device; by its key alone; one example's noise is not another's."""
    fix, *_ = everything()[name]
    keys, x = as_keys(key, 16), jax.random.normal(jax.random.key(1), (16, 2))
    whole, info = jax.jit(fix)(keys, x, 0.75)
    close = lambda actual, expected: np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)
    close(jax.jit(fix)(keys[3:5], x[3:5], 0.75)[0], whole[3:5])
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    local = jax.shard_map(fix, mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P("data"))
    spread, diagnostics = jax.jit(local)(keys, x, jnp.float32(0.75))
    close(spread, whole)
    for field in info:
        close(diagnostics[field], info[field])
        assert info[field].shape == ((16, 2) if field == "noised" else (16,))
    np.testing.assert_array_equal(jax.jit(fix)(keys, x, 0.75)[0], whole)
    other, _ = jax.jit(fix)(as_keys(jax.random.key(7), 16), x, 0.75)
    same, _ = jax.jit(fix)(keys, jnp.ones_like(x), 0.75)
    for draws in (jnp.abs(other - whole).max(1), jnp.abs(same[1:] - same[:-1]).max(1)):
        assert (draws != 0).mean() > (0.5 if name == "mala" else 0.99)  # what Metropolis rejects stays where it was


@pytest.mark.parametrize("name", everything())
def test_correctors_state_the_evaluations_that_they_make(name, key):
    """Counted on the host while the compiled program runs."""
    count = []

    def counted(_, f):
        def g(*args):
            jax.debug.callback(lambda: count.append(1))
            return f(*args)

        return g

    fix, nfe = everything(counted)[name]
    jax.block_until_ready(jax.jit(fix)(as_keys(key, 2), jnp.ones((2, 2)), 0.75))
    jax.effects_barrier()
    assert len(count) == nfe == fix.nfe == stated(jax.jit(fix)).nfe


def test_bad_steps_of_correctors_are_refused():
    score, density = gauss()
    for options in ({}, {"step": 0.1, "snr": 0.1}):
        with pytest.raises(ValueError, match=f"step={options.get('step')}, snr={options.get('snr')}"):
            correctors.langevin(score, **options)
    with pytest.raises(ValueError, match="snr=-1.0"):
        correctors.langevin(score, snr=-1.0)
    with pytest.raises(ValueError, match="step=0.0"):
        correctors.mala(score, density, step=0.0)
    with pytest.raises(ValueError, match="steps=0"):
        correctors.mala(score, density, step=0.1, steps=0)


def test_one_key_serves_a_batch_and_other_keys_are_refused(key):
    """A corrector takes one key or one per example, with the same draws."""
    x = jnp.ones((4, 2))
    for name in ("score", "langevin", "mala", "map"):
        fix = jax.jit(everything()[name][0])
        np.testing.assert_array_equal(fix(key, x, 0.75)[0], fix(as_keys(key, 4), x, 0.75)[0], err_msg=name)
    with pytest.raises(ValueError, match="key"):
        fix(as_keys(key, 3), x, 0.75)
    with pytest.raises(TypeError, match="key"):
        fix(jnp.zeros(2), x, 0.75)


def test_a_corrector_checks_the_times_of_all_its_parts():
    """The direction's, each schedule's and the step's own; through jit and partial."""
    refuse = lambda what: Costed(lambda *args, **kwargs: args[0], check=lambda ts: pytest.fail(what))
    half = grids.per_step([0.5], [0.1])
    score, density = gauss()
    late = correction.score_of(lambda x, t, cond=None: x)
    drift = correction.kernel_drift(
        *banks(jax.random.key(0), (2,), steps=1, dtype=jnp.float32), ts=[0.5], bandwidth=1.0
    )
    for fix in (
        correctors.marginal_matching(late, alpha=0.1), correctors.langevin(late, step=0.1),
        correctors.mala(late, density, step=0.1), correctors.marginal_matching(score, alpha=half),
        correctors.marginal_matching(score, alpha=0.1, beta=half), correctors.langevin(score, snr=half),
        correctors.mala(score, density, step=half), correctors.restart(lambda x, *_: x, to=half),
        correctors.marginal_matching(drift, alpha=1.0),
    ):  # fmt: skip
        stated(jax.jit(fix)).check(np.float32([0.5]))
        with pytest.raises(ValueError, match="t=1|among"):
            stated(functools.partial(fix)).check(np.float32([0.5, 1.0]))
    with pytest.raises(pytest.fail.Exception, match="step"):
        correctors.restart(refuse("step"), to=0.1).check(np.float32([0.5]))
