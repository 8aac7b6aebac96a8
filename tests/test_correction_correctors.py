"""Corrections against closed forms: Gaussians, Tweedie's formula, W2 on the line, the ULA's stationary variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from fmjax import correction, oracles, paths, sampling
from fmjax.correction import correctors
from fmjax.keys import as_keys, normal, split
from fmjax.sampling import grids
from fmjax.types import expand

N = 100_000


def gaussian_direction(b, sigma, mean=0.0):
    """``sigma^2`` times the score of ``N(mean, b^2 + sigma^2)``."""
    return lambda x, t, cond=None: -(sigma**2) * (x - mean) / (b**2 + sigma**2)


def assert_std(x, expected):
    """A z-test of the second moment of centred Gaussian samples: relative standard error sqrt(2 / n)."""
    x = np.asarray(x, np.float64).ravel()
    assert abs((x**2).mean() / expected**2 - 1) < 4.5 * (2 / x.size) ** 0.5


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8])
@pytest.mark.parametrize(("a", "b", "sigma"), [(1.0, 1.0, 0.5), (1.4, 0.7, 0.3), (0.5, 1.2, 1.0)])
def test_a_corrected_gaussian_has_the_closed_form_std(alpha, beta, a, b, sigma, key):
    """``sqrt(a^2 + beta^2) |1 - alpha sigma^2 / (b^2 + sigma^2)|``: noise first, then the push at the noised point."""
    fix = correctors.marginal_matching(gaussian_direction(b, sigma), alpha=alpha, beta=beta)
    x = a * normal(as_keys(jax.random.key(1), N), (1,))
    y, info = fix(as_keys(key, N), x, 0.5)
    assert_std(y, np.sqrt(a**2 + beta**2) * abs(1 - alpha * sigma**2 / (b**2 + sigma**2)))
    assert_std(info["noised"], np.sqrt(a**2 + beta**2))
    np.testing.assert_allclose(info["moved"], np.abs(y - info["noised"])[:, 0], atol=1e-6)
    ratio = (1 + beta**2 / a**2) * (1 - alpha * sigma**2 / (b**2 + sigma**2)) ** 2
    measured = float(correction.dispersion_ratio(x, y))
    assert measured == pytest.approx(ratio, rel=1e-4 if beta == 0 else 4.5 * (4 / N) ** 0.5)


def linear_part(fix, key, x, t=0.5):
    """``A`` and ``B`` of a linear corrector ``A x + B z`` with the key's own noise ``z``."""
    z = normal(key, x.shape[1:], x.dtype)
    (a,) = np.unique(np.round(fix(key, x, t)[0] - fix(key, 0 * x, t)[0], 14) / x)
    return a, np.asarray(fix(key, 0 * x, t)[0] / z).mean()


def test_the_langevin_preset_leaves_a_gaussian_fixed_to_leading_order(x64, key):
    """``beta = sigma``, ``alpha = 1/2``: std after ``b (1 + (sigma/b)^4 / 8 + ...)``; halving sigma divides by 16."""
    keys, x = as_keys(key, 3), jnp.ones((3, 1))
    excess = []
    for sigma in (0.2, 0.1):
        fix = correctors.marginal_matching(gaussian_direction(1.0, sigma), **correctors.preset("langevin", sigma))
        a, b = linear_part(fix, keys, x)
        excess.append(np.sqrt(a**2 + b**2) - 1)
        assert excess[-1] == pytest.approx(sigma**4 / 8, rel=2 * sigma**2)
    assert excess[0] / excess[1] == pytest.approx(16, rel=0.1)
    noisy = correctors.marginal_matching(gaussian_direction(1.0, 0.1), alpha=1.0, beta=0.1)
    a, b = linear_part(noisy, keys, x)
    assert np.sqrt(a**2 + b**2) - 1 == pytest.approx(-(0.1**2) / 2, rel=0.02)  # contracts at the second order


@pytest.mark.parametrize(("name", "alpha"), [("tweedie", 1.0), ("w2", 0.5)])
def test_presets_without_noise_contract_a_perfect_model(name, alpha, x64, key):
    """The summed variance over coordinates, each of which contracts by its own ``1 - alpha s^2 / (b^2 + s^2)``."""
    b, sigma = jnp.array([0.5, 2.0]), 0.6
    q = b * normal(as_keys(key, 1000), (2,), jnp.float64)
    fix = correctors.marginal_matching(gaussian_direction(b, sigma), **correctors.preset(name, sigma))
    var, shrunk = np.var(q, 0), 1 - alpha * sigma**2 / (np.asarray(b) ** 2 + sigma**2)
    ratio = float(correction.dispersion_ratio(q, fix(None, q, 0.5)[0]))
    assert ratio == pytest.approx(float((var * shrunk**2).sum() / var.sum()), rel=1e-9) and ratio < 0.95
    images = lambda x: (x + 3).reshape(-1, 2, 1)
    assert float(correction.dispersion_ratio(images(q), images(q))) == pytest.approx(1)


def test_presets_by_name():
    assert correctors.preset("tweedie", 0.3) == {"alpha": 1.0, "beta": 0.0}
    assert correctors.preset("transport", lam=0.3) == {"alpha": 8 * 0.3, "beta": 0.0}
    for options in ({}, {"sigma": 0.3}, {"sigma": 0.3, "lam": 1.0}, {"lam": 1.0, "alpha": 1.0}, {"lam": 0.0}):
        with pytest.raises(ValueError, match="^lam="):
            correctors.preset("transport", **options)
    with pytest.raises(ValueError, match="^sigma=None"):
        correctors.preset("w2", lam=0.3)
    assert correctors.preset("w2", 0.3) == {"alpha": 0.5, "beta": 0.0}
    assert correctors.preset("langevin", 0.3) == {"alpha": 0.5, "beta": 0.3}
    assert correctors.preset("paper", 0.3, alpha=0.7, beta=0.1) == {"alpha": 0.7, "beta": 0.1}
    sigma = lambda t: 0.1 + t
    assert correctors.preset("langevin", sigma)["beta"] is sigma
    with pytest.raises(ValueError, match="preset='langevn'.*did you mean 'langevin'"):
        correctors.preset("langevn", 0.3)
    with pytest.raises(ValueError, match="alpha=0.5, beta=None: preset 'paper'"):
        correctors.preset("paper", 0.3, alpha=0.5)
    with pytest.raises(ValueError, match="alpha=0.5, beta=None: preset 'w2'"):
        correctors.preset("w2", 0.3, alpha=0.5)
    with pytest.raises(ValueError, match="sigma=0.0"):
        correctors.preset("langevin", 0.0)


def test_the_langevin_preset_steps_towards_q_other_sizes_temper_it(x64, key):
    """``KL(p|q)`` falls by ``a I(p|q)``, ``a = sigma^2 / 2``, as after ``langevin(step=a)``, but for ``O(a^2)``.

    At ``alpha`` and ``beta`` of other sizes the step rests at the variance of ``q^(2 alpha sigma^2 / beta^2)``.
    """
    b, wide = 1.0, 1.4
    keys, x = as_keys(key, 3), jnp.ones((3, 1))
    kl = lambda var: (var / b**2 - 1 - np.log(var / b**2)) / 2
    fisher = wide**2 * (1 / b**2 - 1 / wide**2) ** 2

    def squares(fix, k):
        """``A^2`` and ``B^2`` of ``A x + B z``."""
        still, moved = (np.asarray(fix(keys, c * x, 0.5)[0]) for c in (0, 1))
        return ((moved - still) ** 2).mean(), ((still / np.asarray(normal(k, (1,), jnp.float64))) ** 2).mean()

    off, apart = [], []
    for sigma in (0.2, 0.1):
        h = sigma**2 / 2
        fix = correctors.marginal_matching(gaussian_direction(b, sigma), **correctors.preset("langevin", sigma))
        kept, noise = squares(fix, keys)
        off.append((kl(wide**2 * kept + noise) - kl(wide**2)) / h + fisher)
        plain = correctors.langevin(lambda x, t, cond=None: -x / b**2, step=h)
        kept_, noise_ = squares(plain, split(keys, 1)[0])
        apart.append(wide**2 * (kept - kept_) + noise - noise_)
    assert off[0] / off[1] == pytest.approx(4, rel=0.15)  # of order a, so nothing is left at a = 0
    assert apart[0] / apart[1] == pytest.approx(16, rel=0.15)  # of order a^2

    sigma, beta, alpha = 0.1, 0.1, 1.5
    kept, noise = squares(correctors.marginal_matching(gaussian_direction(b, sigma), alpha=alpha, beta=beta), keys)
    assert noise / (1 - kept) == pytest.approx(b**2 * beta**2 / (2 * alpha * sigma**2), rel=0.03)


MEANS, STD, WEIGHTS = np.array([-1.5, 0.2, 2.0]), np.array([0.5, 0.8, 0.4]), np.array([0.3, 0.5, 0.2])


def smoothed(sigma):
    """The mixture convolved with ``N(0, sigma^2)``, and ``sigma^2`` times its score."""
    oracle = oracles.mixture(jnp.asarray(MEANS[:, None]), jnp.sqrt(STD**2 + sigma**2), jnp.asarray(WEIGHTS))
    return oracle, lambda x, t, cond=None: sigma**2 * oracle.score(x, 1.0)


def cdf(x, sigma=0.0):
    return (WEIGHTS * stats.norm.cdf(np.asarray(x)[..., None], MEANS, np.sqrt(STD**2 + sigma**2))).sum(-1)


def pdf(x, sigma=0.0):
    return (WEIGHTS * stats.norm.pdf(np.asarray(x)[..., None], MEANS, np.sqrt(STD**2 + sigma**2))).sum(-1)


def test_tweedies_step_is_the_posterior_mean(x64, key):
    """``x + sigma^2 S(x) = E[x_b | x]``, the mean by numerical integration over the clean ``x_b``."""
    sigma = 0.6
    x = jnp.linspace(-3, 3, 13)[:, None]
    y, _ = correctors.marginal_matching(smoothed(sigma)[1], alpha=1.0)(None, x, 1.0)
    clean = np.linspace(-9, 9, 20_001)  # the trapezoidal rule is exact to rounding for such integrands
    weight = pdf(clean) * stats.norm.pdf(np.asarray(x), clean, sigma)
    np.testing.assert_allclose(y[:, 0], (weight * clean).sum(1) / weight.sum(1), atol=1e-12)


def test_half_of_tweedies_step_is_the_one_that_matches_in_w2(x64, key):
    """``W2(T_alpha q^sigma, q) = |1/2 - alpha| sigma^2 sqrt(J) + o(sigma^2)``, ``J`` the Fisher information of q."""
    grid = np.linspace(-6, 6, 40_001)
    fine = np.linspace(-7, 7, 400_001)
    score = np.gradient(pdf(grid), grid) / pdf(grid)
    fisher = np.trapezoid(score**2 * pdf(grid), grid)
    left = {}
    for sigma in (0.1, 0.05):
        quantile = np.interp(cdf(grid, sigma), cdf(fine), fine)  # of q, at the level of the smoothed distribution
        for alpha in (0.0, 0.5, 1.0):
            fix = correctors.marginal_matching(smoothed(sigma)[1], alpha=alpha)
            y = np.asarray(fix(None, jnp.asarray(grid[:, None]), 1.0)[0])[:, 0]
            assert (np.diff(y) > 0).all()  # monotone, so it is optimal between its marginals
            left[alpha, sigma] = np.sqrt(np.trapezoid((y - quantile) ** 2 * pdf(grid, sigma), grid))
    for alpha in (0.0, 1.0):
        assert left[alpha, 0.05] == pytest.approx(0.05**2 / 2 * np.sqrt(fisher), rel=0.03)
    assert left[0.5, 0.05] < left[0.0, 0.05] / 50
    assert left[0.5, 0.1] / left[0.5, 0.05] == pytest.approx(16, rel=0.1)  # of order sigma^4


def test_unadjusted_langevin_has_its_stationary_variance(key):
    """``V = b^2 / (1 - h / (2 b^2))`` stays; from a point, ``k`` steps reach ``V (1 - (1 - h/b^2)^{2k})``."""
    b, h = 1.3, 0.8
    score = lambda x, t, cond=None: -x / b**2
    var = b**2 / (1 - h / (2 * b**2))
    keys = as_keys(key, N)
    start = var**0.5 * normal(as_keys(jax.random.key(1), N), (2,))
    run = lambda n: jax.jit(correctors.langevin(score, step=h, steps=n))
    y, info = run(3)(keys, start, 0.5)
    assert_std(y, var**0.5)
    np.testing.assert_allclose(info["moved"], np.sqrt(((y - start) ** 2).mean(1)), rtol=1e-5)
    for k in (1, 2):
        y, _ = run(k)(keys, jnp.zeros((N, 2)), 0.5)
        assert_std(y, np.sqrt(var * (1 - (1 - h / b**2) ** (2 * k))))


def test_langevin_goes_to_the_law_of_its_score(key):
    """The gap of the means shrinks by ``(1 - h/b^2)^k``; a step that varies in time is each example's own."""
    score = lambda x, t, cond=None: -(x - 2.0)
    h = lambda t: 0.1 + 0.4 * t
    t = jnp.where(jnp.arange(N) % 2 == 0, 0.0, 1.0)
    y, _ = jax.jit(correctors.langevin(score, step=h, steps=2))(as_keys(key, N), jnp.zeros((N, 1)), t)
    for start, rate in ((0, 0.1), (1, 0.5)):
        half = np.asarray(y, np.float64)[start::2, 0]
        assert abs(half.mean() - 2 * (1 - (1 - rate) ** 2)) < 4.5 * half.std() / len(half) ** 0.5


def test_noise_is_independent_between_steps_and_examples(key):
    """Without a score the variance of three steps is ``3 x 2h`` (the same noise thrice would give ``9 x 2h``)."""
    h = 0.5
    still = lambda x, t, cond=None: 0 * x
    y, _ = jax.jit(correctors.langevin(still, step=h, steps=3))(as_keys(key, N), jnp.zeros((N, 2)), 0.5)
    assert_std(y, np.sqrt(3 * 2 * h))
    z, _ = jax.jit(correctors.marginal_matching(still, alpha=1.0, beta=0.5))(as_keys(key, N), jnp.zeros((N, 2)), 0.5)
    for draws in (np.asarray(y, np.float64), np.asarray(z, np.float64)):
        assert len(np.unique(draws[:, 0])) > 0.99 * N  # floats of 23 bits collide now and then
        scale = draws.std() ** 2
        for a, b in ((draws[1:, 0], draws[:-1, 0]), (draws[:, 0], draws[:, 1])):
            assert abs((a * b).mean()) / scale * len(a) ** 0.5 < 4.5


@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric()])
def test_the_score_of_a_velocity_is_the_score_of_its_law(path, x64, key):
    oracle = oracles.mixture(jnp.asarray(MEANS[:, None]), jnp.asarray(STD), jnp.asarray(WEIGHTS), path=path)
    x, t = jax.random.normal(key, (9, 1), jnp.float64), jnp.linspace(0.0, 0.99, 9)
    np.testing.assert_allclose(correction.score_of(oracle.velocity, path=path)(x, t), oracle.score(x, t), rtol=1e-9)
    linear = oracles.gaussian(1.0, 0.5)
    np.testing.assert_allclose(correction.score_of(linear.velocity)(x, t), linear.score(x, t), rtol=1e-9)


def test_under_a_coupling_what_the_velocity_gives_is_not_the_score(x64, key):
    """Pairs ``x1 = a x0``: ``-x / ((1 - t) m)``, ``m = 1 - t + a t``, in the place of ``-x / m^2``."""
    a, x, t = 1.6, jax.random.normal(key, (9, 1), jnp.float64), jnp.linspace(0.1, 0.9, 9)
    law = lambda rho: oracles.coupled(
        jnp.zeros(1), jnp.zeros(1), jnp.array([[1.0, rho * a], [rho * a, a**2]]), path=paths.linear()
    )
    free, bound = law(0.0), law(1.0)
    np.testing.assert_allclose(correction.score_of(free.velocity)(x, t), free.score(x, t), rtol=1e-9)
    m = (1 - t + a * t)[:, None]
    np.testing.assert_allclose(bound.score(x, t), -x / m**2, rtol=1e-9)
    np.testing.assert_allclose(correction.score_of(bound.velocity)(x, t), -x / (m * (1 - t)[:, None]), rtol=1e-9)


@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric(), paths.vp()])
def test_the_score_at_the_end_is_refused_where_it_is_asked_for(path, key):
    """By the sampler before it starts, jitted; a path that ends in noise has it."""
    x, ts = jnp.ones((2, 1)), grids.uniform_grid(4)
    oracle = oracles.gaussian(0.0, 0.5, path=path)

    def run(x, at, path=path):
        fix = correctors.langevin(correction.score_of(oracle.velocity, path=path), step=0.01)
        return sampling.sample(lambda x, s, t, cond=None, key=None: x, x, ts, key=key, corrector=fix, at=at)

    assert np.isfinite(jax.jit(run, static_argnums=1)(x, (1, 3))).all()
    with pytest.raises(ValueError, match="t=1: without noise"):
        jax.jit(run, static_argnums=1)(x, (1, 4))
    assert correction.score_of(oracle.velocity, path=paths.ve()).check(ts) is None
    with pytest.raises(ValueError, match="score_of needs a path without a latent"):
        correction.score_of(oracle.velocity, path=paths.two_sided())


def test_alpha_and_beta_may_depend_on_the_time_of_each_example(x64, key):
    direction = lambda x, t, cond=None: jnp.ones_like(x) * expand(10 * t, x)
    fix = correctors.marginal_matching(direction, alpha=lambda t: t**2, beta=lambda t: 1 - t)
    keys, x, t = as_keys(key, 3), jnp.arange(6.0).reshape(3, 2), jnp.array([0.0, 0.5, 1.0])
    z = normal(keys, (2,), jnp.float64)
    expected = x + jnp.array([[1.0], [0.5], [0.0]]) * z + jnp.array([[0.0], [1.25], [10.0]])
    np.testing.assert_allclose(fix(keys, x, t)[0], expected, rtol=1e-14)


def test_without_noise_no_key_is_touched(key):
    direction = lambda x, t, cond=None: -x
    keys, x = as_keys(key, 4), jax.random.normal(key, (4, 3))
    fix = correctors.marginal_matching(direction, alpha=0.3)
    np.testing.assert_array_equal(fix(None, x, 0.5)[0], x + 0.3 * -x)
    np.testing.assert_array_equal(fix(keys, x, 0.5)[0], fix(as_keys(jax.random.key(5), 4), x, 0.5)[0])
    vanishing = correctors.marginal_matching(direction, alpha=0.3, beta=lambda t: 0 * t)
    np.testing.assert_array_equal(vanishing(keys, x, 0.5)[0], fix(None, x, 0.5)[0])
    noisy = correctors.marginal_matching(direction, alpha=0.3, beta=0.1)
    assert (noisy(keys, x, 0.5)[0] != noisy(as_keys(jax.random.key(5), 4), x, 0.5)[0]).all()
    np.testing.assert_array_equal(noisy(keys, x, 0.5)[0], noisy(keys, x, 0.5)[0])


def test_bad_options_are_refused():
    direction = lambda x, t, cond=None: x
    with pytest.raises(ValueError, match="beta=-0.1"):
        correctors.marginal_matching(direction, alpha=1.0, beta=-0.1)
    for step in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"step={step}"):
            correctors.langevin(direction, step=step)
    with pytest.raises(ValueError, match="steps=0"):
        correctors.langevin(direction, step=0.1, steps=0)


def scaled(eps, s=0.5):
    """G1: the exact velocity of ``N(0, s^2)`` plus the error ``eps x``."""
    oracle = oracles.gaussian(0.0, s)
    return lambda x, t, cond=None: oracle.velocity(x, t) + eps * x


@pytest.mark.parametrize("eps", [0.2, -0.2])
def test_a_score_step_mends_only_the_dispersion_of_a_scaling_error(eps, x64, key):
    """G1: std of ``p_t`` is ``sqrt(V_t) e^{eps t}``, of ``q_t`` ``sqrt(V_t) e^{-eps (1 - t)}``; one step after."""
    s, sigma = 0.5, 0.3
    ts = grids.uniform_grid(50)
    std = np.sqrt((1 - ts) ** 2 + ts**2 * s**2)
    x = jnp.array([[1.0], [-0.4]])
    forward, _ = sampling.integrate(scaled(eps), x, ts)
    np.testing.assert_allclose(forward / x, (std * np.exp(eps * ts))[:, None, None] * np.ones((1, 2, 1)), rtol=2e-6)
    back, _ = sampling.integrate(scaled(eps), x, ts[::-1])
    expected = std / s * np.exp(-eps * (1 - ts))
    np.testing.assert_allclose(back[::-1] / x, expected[:, None, None] * np.ones((1, 2, 1)), rtol=2e-6)

    @jax.jit
    def corrected(alpha):
        fix = correctors.marginal_matching(gaussian_direction(s, sigma), alpha=lambda t: jnp.full_like(t, alpha))
        return sampling.sample(sampling.rk4(scaled(eps)), x, ts, key=key, corrector=fix, at=(50,))[0, 0]

    a = s * np.exp(eps)
    best = (s**2 + sigma**2) * (1 - s / a) / sigma**2
    if eps > 0:
        assert corrected(best) == pytest.approx(s, rel=2e-6)
    else:  # an under-dispersed generator: every push of the score makes it worse
        assert corrected(0.0) == pytest.approx(a, rel=2e-6)
        assert best < 0 and s > corrected(0.0) > corrected(0.1) > corrected(1.0)


def test_a_shift_error_moves_the_means_as_in_the_closed_form(x64):
    """G2: ``m_t = b sqrt(V_t) int_0^t V_r^{-1/2} dr`` forwards, minus the rest of the integral backwards."""
    s, shift = 0.5, 0.7
    oracle = oracles.gaussian(0.0, s)
    velocity = lambda x, t, cond=None: oracle.velocity(x, t) + shift
    ts = grids.uniform_grid(50)
    node, weight = special.roots_legendre(60)
    root = lambda r: np.sqrt((1 - r) ** 2 + r**2 * s**2)
    until = np.array([t / 2 * (weight / root(t * (node + 1) / 2)).sum() for t in ts.astype(float)])
    start = jnp.zeros((1, 1))  # the mean of a Gaussian follows the flow, whose field is affine
    forward, _ = sampling.integrate(velocity, start, ts)
    np.testing.assert_allclose(forward[:, 0, 0], shift * root(ts.astype(float)) * until, atol=2e-6)
    back, _ = sampling.integrate(velocity, start, ts[::-1])
    expected = -shift * root(ts.astype(float)) * (until[-1] - until)
    np.testing.assert_allclose(back[::-1, 0, 0], expected, atol=2e-6)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "0.5", None, True, [0.5]])
def test_strengths_that_are_no_finite_numbers_are_refused(value):
    """In Python as in a config: ``nan`` would make every sample ``nan``."""
    pull = lambda x, t, cond=None: -x
    calls = {
        "alpha": lambda: correctors.marginal_matching(pull, alpha=value),
        "beta": lambda: correctors.marginal_matching(pull, alpha=0.1, beta=value),
        "step": lambda: correctors.langevin(pull, step=value, snr=0.1 if value is None else None),
        "sigma": lambda: correctors.preset("tweedie", value),
    }
    for name, call in calls.items():
        if (name, value) != ("step", None):
            with pytest.raises(ValueError, match=f"^{name}="):
                call()


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("count", [0, -1, 2.5, np.nan, "2", True, None])
def test_counts_that_are_no_whole_numbers_are_refused(count):
    pull = lambda x, t, cond=None: -x
    with pytest.raises(ValueError, match="^steps="):
        correctors.langevin(pull, step=0.1, steps=count)
    with pytest.raises(ValueError, match="^loops="):
        correctors.restart(lambda x, *_: x, to=0.5, loops=count)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_short_state_is_corrected_in_float32_and_cast_back(dtype, key):
    """A thousand small steps of Langevin would be lost to rounding."""
    pull = lambda x, t, cond=None: -x
    fixes = (correctors.langevin(pull, step=1e-4, steps=50), correctors.restart(lambda x, *_: 0.9 * x, to=0.5, steps=3))
    for fix in fixes:
        x = jnp.asarray([[1.0, -0.5]], dtype)
        short, wide = fix(key, x, 1.0)[0], fix(key, x.astype(jnp.float32), 1.0)[0]
        assert short.dtype == dtype and (short == wide.astype(dtype)).all()
        with pytest.raises(TypeError, match="^x="):
            fix(key, jnp.ones((1, 2), int), 1.0)
