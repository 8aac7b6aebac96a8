"""Weighted particles: the equation of the weighted SDE at single points, and tilted mixtures in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, sampling
from fmjax.keys import as_keys
from fmjax.sampling import particles, tilts

MEANS, STDS, WEIGHTS = np.array([[-1.5, 0.3], [1.5, -0.6]]), np.array([0.5, 0.7]), np.array([0.4, 0.6])
PATHS = {"linear": paths.linear(), "trigonometric": paths.trigonometric(), "vp": paths.vp()}


def mixtures(path=paths.linear()):
    return (
        oracles.mixture(jnp.asarray(MEANS), jnp.asarray(STDS), jnp.asarray(WEIGHTS), path=path),
        oracles.mixture(jnp.asarray(MEANS[::-1] + 1), jnp.asarray(STDS), jnp.asarray(WEIGHTS), path=path),
    )


def reward(x, cond=None):
    return jnp.sin(x).sum(1) + 0.3 * x[:, 0] * x[:, 1]


def cases(path):
    """Each tilt with the log of its unnormalised density ``(x, t)``; the Gaussian one has an exact flow map."""
    one, two = mixtures(path)
    normal = oracles.gaussian(jnp.array([0.5, -1.0]), jnp.array([0.6, 1.3]), path=path)
    bent = lambda x, s, t, cond=None, key=None: normal.flow_map(x, s, t) * (1 + 0.2 * (1 - s)[:, None] * x)
    ahead = lambda jump: lambda x, t: normal.log_density(x, t) + t**2 * reward(jump(x, t, jnp.ones_like(t)))
    powers = lambda p, q: lambda x, t: p * one.log_density(x, t) + q * two.log_density(x, t)
    product = functools.partial(tilts.power_product, path=path)
    rewarded = functools.partial(tilts.reward_tilt, strength=lambda t: t**2, path=path)
    pick = lambda x, t, cond: jnp.where((cond == 0)[:, None], two.velocity(x, t), one.velocity(x, t))
    return {
        "annealed": (product([one.velocity], [3.0]), powers(3.0, 0.0)),
        "annealed, divergence": (product([one.velocity], [3.0], divergence=True), powers(3.0, 0.0)),
        "product": (product([one.velocity, two.velocity], [1.0, 1.0]), powers(1.0, 1.0)),
        "product, divergence": (product([one.velocity, two.velocity], [1.5, 0.7], divergence=True), powers(1.5, 0.7)),
        "geometric": (product([one.velocity, two.velocity], [0.3, 0.7]), powers(0.3, 0.7)),
        "guided": (tilts.guided_tilt(pick, null=0, scale=2.5, path=path), powers(2.5, -1.5)),
        "reward": (rewarded(one.velocity, reward), lambda x, t: one.log_density(x, t) + t**2 * reward(x)),
        "look-ahead": (rewarded(normal.velocity, reward, flow_map=normal.flow_map), ahead(normal.flow_map)),
        "look-ahead, wrong map": (rewarded(normal.velocity, reward, flow_map=bent, exact_map=False), ahead(bent)),
    }


EVERY = [(name, "linear") for name in cases(paths.linear())] + [("product", "vp"), ("reward", "trigonometric")]


@pytest.mark.parametrize(("name", "path"), EVERY)
def test_the_weighted_sde_has_the_tilt_as_marginals(name, path, x64):
    """``d/dt log p + div a + a.S - g^2/2 (div S + |S|^2) - r`` is the same number at every point, for every g."""
    tilt, log_p = cases(PATHS[path])[name]
    cond, x = jnp.ones(24, jnp.int32), 2 * jax.random.normal(jax.random.key(0), (24, 2), jnp.float64)

    @jax.jit
    def terms(x, t):
        base, score, rate = tilt.fields(x, t, cond)
        div = lambda i: sampling.divergence(lambda x, t, cond=None: tilt.fields(x, t, cond)[i], x, t, cond)[1]
        moved = jax.jvp(lambda t: log_p(x, t), (t,), (jnp.ones_like(t),))[1]
        return base, score, rate, jax.grad(lambda x: log_p(x, t).sum())(x), moved, div(0), div(1)

    base, score, rate, slope, moved, div_base, div_score = terms(x, jnp.full(24, 0.6))
    np.testing.assert_allclose(score, slope, atol=1e-11)
    for g in (0.0, 0.7, 2.0):
        a, div_a = base + g**2 / 2 * score, div_base + g**2 / 2 * div_score
        left = moved + div_a + (a * slope).sum(1) - g**2 / 2 * (div_score + (slope**2).sum(1)) - rate
        assert float(left.max() - left.min()) < 1e-12 * max(10, float(abs(rate).max())), name
    if name in ("annealed", "product", "reward"):  # the weights carry something
        assert float(rate.max() - rate.min()) > 0.1


def test_power_one_has_no_weights_and_the_drift_of_the_flow(x64):
    one, _ = mixtures()
    x, t = jax.random.normal(jax.random.key(1), (5, 2), jnp.float64), jnp.full(5, 0.4)
    for divergence in (False, True):
        base, score, rate = tilts.power_product([one.velocity], [1.0], divergence=divergence).fields(x, t, None)
        np.testing.assert_array_equal(rate, 0)
        np.testing.assert_allclose(base, one.velocity(x, t), rtol=1e-15)
        np.testing.assert_allclose(score, one.score(x, t), rtol=1e-12)


LINE = oracles.mixture(jnp.array([[-1.5], [1.5]]), 0.65, jnp.array([0.4, 0.6]))
PLAIN = tilts.power_product([LINE.velocity], [2.0])
GRID = np.linspace(-8, 8, 40001)


def positive(log_p, x=GRID):
    """``P(x > 0)`` of an unnormalised log-density on a grid, and the mean and the log of its integral."""
    p = np.exp(np.asarray(log_p, np.float64))
    return p[x > 0].sum() / p.sum(), (p * x).sum() / p.sum(), np.log(p.sum() * (x[1] - x[0]))


def groups_of(tilt, ts, groups=24, k=512, **options):
    """``P(x > 0)`` and the mean by weights of each group, and the memory."""
    keys = particles.particle_keys(jax.random.key(7), groups, k)
    x0 = tilt.start * sampling.source_sample(paths.linear(), keys, (groups * k, 1), start=float(ts[0]))
    step = particles.weighted(tilt, particles=k, **options)
    run = jax.jit(lambda x0: sampling.sample(step, x0, ts, key=as_keys(keys, len(x0)), info=True))
    x, info = run(x0)
    w = np.asarray(jax.nn.softmax(info.memory.log_weights.reshape(groups, k), 1), np.float64)
    x = np.asarray(x, np.float64).reshape(groups, k)
    return (w * (x > 0)).sum(1), (w * x).sum(1), x, info.memory


def within(values, exact, bias=0.0):
    return abs(values.mean() - exact) < 3 * values.std(ddof=1) / np.sqrt(len(values)) + bias


def test_the_cube_of_a_mixture():
    exact, *_ = positive(3 * LINE.log_density(jnp.asarray(GRID, jnp.float32)[:, None], jnp.ones(len(GRID))))
    np.testing.assert_allclose(exact, 0.7709, atol=2e-4)
    tilt = tilts.power_product([LINE.velocity], [3.0], divergence=True)
    mass, _, plain, memory = groups_of(tilt, np.linspace(0, 1, 201))
    assert within(mass, exact), (mass.mean(), exact)
    assert mass.std() / np.sqrt(len(mass)) < 0.005
    assert (memory.lowest_ess > 100).all() and (memory.lowest_ess < 512).all()
    scaled = tilt._replace(fields=lambda x, t, cond=None: (*tilt.fields(x, t, cond)[:2], jnp.zeros(len(x))))
    wrong, *_ = groups_of(scaled, np.linspace(0, 1, 201))
    assert not within(wrong, exact), wrong.mean()
    assert abs(wrong.mean() - exact) > 0.05


def test_the_cube_without_a_divergence_needs_resampling():
    exact, *_ = positive(3 * LINE.log_density(jnp.asarray(GRID, jnp.float32)[:, None], jnp.ones(len(GRID))))
    tilt = tilts.power_product([LINE.velocity], [3.0])
    mass, _, _, memory = groups_of(
        tilt, sampling.log_snr_grid(300, sigma_min=0.01, sigma_max=30.0), strength=sampling.memoryless()
    )
    assert within(mass, exact, bias=0.01), (mass.mean(), exact)
    assert (np.asarray(memory.resamplings) > 0).all()


def test_a_product_of_two_mixtures_is_a_mixture():
    """Both experts have two modes; the product keeps their common mode. Resampled at every step."""
    other = oracles.mixture(jnp.array([[1.2], [4.0]]), 0.8, jnp.array([0.5, 0.5]))
    log_p = sum(o.log_density(jnp.asarray(GRID, jnp.float32)[:, None], jnp.ones(len(GRID))) for o in (LINE, other))
    exact, mean, log_z = positive(log_p)
    tilt = tilts.power_product([LINE.velocity, other.velocity], [1.0, 1.0], divergence=True)
    mass, means, _, memory = groups_of(tilt, np.linspace(0, 1, 201), threshold=1.0)
    assert within(mass, exact) and within(means, mean), (means.mean(), mean)
    # the constant: the tilt of the source is N(0, 1)^2, of integral (2 sqrt(pi))^-1
    ratio = np.exp(np.asarray(memory.log_constant(), np.float64) - log_z) / (2 * np.sqrt(np.pi))
    assert within(ratio, 1.0), ratio.mean()
    assert (memory.resamplings > 100).all()


def test_guidance_with_weights_reaches_the_tilted_gaussian():
    """Guidance alone ends at the variance ``V0^(1-w) Vc^w``, the tilt has ``1 / ((1-w)/V0 + w/Vc)``."""
    base, goal = oracles.gaussian(0.0, 1.2**0.5), oracles.gaussian(1.5, 0.3**0.5)
    pick = lambda x, t, cond: jnp.where((cond == 1)[:, None], goal.velocity(x, t), base.velocity(x, t))
    groups, k, w = 24, 512, 3.0
    keys = particles.particle_keys(jax.random.key(3), groups, k)
    x0, cond = jax.random.normal(jax.random.key(4), (groups * k, 1)), jnp.ones(groups * k, jnp.int32)
    step = particles.weighted(tilts.guided_tilt(pick, null=0, scale=w), particles=k)
    x, info = jax.jit(lambda x: sampling.sample(step, x, 300, key=keys, cond=cond, info=True))(x0)
    weights = jax.nn.softmax(info.memory.log_weights.reshape(groups, k), 1)
    x = x.reshape(groups, k)
    means, squares = (weights * x).sum(1), (weights * (x - 1.8) ** 2).sum(1)
    assert within(np.asarray(means), 1.8, 0.01) and within(np.asarray(squares), 0.12, 0.003), (
        means.mean(),
        squares.mean(),
    )
    ode = sampling.sample(
        sampling.heun(sampling.classifier_free(pick, null=0, scale=w)), x0[:4096], 64, cond=cond[:4096]
    )
    np.testing.assert_allclose([ode.mean(), ode.var()], [2.25, 0.01875], atol=0.01)


@pytest.mark.parametrize("ahead", ["reward", "look-ahead", "wrong map"])
def test_a_reward_tilts_a_mixture(ahead):
    """``exp(R)``, ``R`` linear, moves mass between the modes of a mixture, and moves the modes."""
    log_p = LINE.log_density(jnp.asarray(GRID, jnp.float32)[:, None], jnp.ones(len(GRID))) - jnp.asarray(GRID)
    exact, mean, log_z = positive(log_p)
    fine = lambda x, s, t, cond=None: _flow(x, s)
    jump = {
        "reward": None,
        "look-ahead": fine,
        "wrong map": lambda x, s, t, cond=None: x + (1 - s)[:, None] * LINE.velocity(x, s),
    }
    tilt = tilts.reward_tilt(
        LINE.velocity, lambda x, cond=None: -x[:, 0], flow_map=jump[ahead], exact_map=ahead != "wrong map"
    )
    mass, means, _, memory = groups_of(tilt, np.linspace(0, 1, 101), groups=16, k=256)
    assert within(mass, exact, 0.004) and within(means, mean, 0.01), (mass.mean(), exact, means.mean(), mean)
    ratio = np.exp(np.asarray(memory.log_constant(), np.float64) - log_z)
    assert within(ratio, 1.0, 0.01), ratio.mean()


def _flow(x, s):
    """The flow map to ``t = 1`` of the mixture, by 4 steps of RK4."""
    times = s[None] + (1 - s[None]) * jnp.linspace(0, 1, 5)[:, None]
    step = sampling.rk4(LINE.velocity)
    return jax.lax.scan(lambda x, now: (step(x, *now), None), x, (times[:-1], times[1:]))[0]


def test_systematic_resampling_rounds_the_expected_counts(x64):
    log_w = 2 * jax.random.normal(jax.random.key(0), (400, 16), jnp.float64)
    index = particles.systematic(jax.random.split(jax.random.key(1), 400), log_w)
    counts = np.stack([np.bincount(row, minlength=16) for row in np.asarray(index)])
    mean = 16 * np.asarray(jax.nn.softmax(log_w, 1))
    assert (counts >= np.floor(mean)).all() and (counts <= np.ceil(mean)).all()
    same = particles.systematic(jax.random.split(jax.random.key(2), 4000), jnp.tile(log_w[:1], (4000, 1)))
    often = np.bincount(np.asarray(same).ravel(), minlength=16) / 4000
    np.testing.assert_allclose(often, mean[0], atol=4 * 0.5 / np.sqrt(4000))


def test_the_effective_sample_size():
    assert particles.effective_sample_size(jnp.zeros((2, 8))).tolist() == [8.0, 8.0]
    assert abs(particles.effective_sample_size(jnp.log(jnp.array([1.0, 3.0]))) - 1.6) < 1e-6


def test_a_group_does_not_depend_on_the_other_groups():
    tilt = tilts.power_product([LINE.velocity], [3.0], divergence=True)
    step = particles.weighted(tilt, particles=8, threshold=1.0)
    keys = particles.particle_keys(jax.random.key(0), 3, 8)
    x0 = jax.random.normal(jax.random.key(1), (24, 1))
    whole, info = sampling.sample(step, x0, 4, key=keys, info=True)
    part, alone = sampling.sample(step, x0[8:16], 4, key=keys[8:16], info=True)
    np.testing.assert_allclose(whole[8:16], part, rtol=1e-6)
    np.testing.assert_allclose(info.memory.log_mean[1], alone.memory.log_mean[0], rtol=1e-5)
    assert (
        len(set(np.asarray(whole[:8, 0]).tolist())) > 1 and (info.memory.resamplings >= 3).all()
    )  # weights are equal at t = 0


@pytest.mark.parametrize(
    ("field", "run"),
    {
        "particles": lambda: particles.weighted(PLAIN, particles=0),
        "threshold": lambda: particles.weighted(PLAIN, particles=2, threshold=1.5),
        "strength": lambda: particles.weighted(PLAIN, particles=2, strength=-1.0),
        "powers": lambda: tilts.power_product([LINE.velocity], [2.0, 1.0]),
        "powers ": lambda: tilts.power_product([LINE.velocity] * 2, [2.0, -2.0]),
        "scale": lambda: tilts.guided_tilt(LINE.velocity, null=0, scale=np.inf),
        "ts": lambda: draw([2.0], [0.0, 1.0], 4),
        "ts ": lambda: draw([1.0], [1.0, 0.5], 4),
        "particles ": lambda: draw([1.0], [0.5, 1.0], 3),
    }.items(),
)  # fmt: skip
def test_what_cannot_work_is_refused(field, run):
    with pytest.raises(ValueError, match=f"^{field.strip()}="):
        run()


def draw(powers, ts, n):
    step = particles.weighted(tilts.power_product([LINE.velocity], powers), particles=2)
    return sampling.sample(step, jnp.zeros((n, 1)), ts, key=jax.random.key(0))
