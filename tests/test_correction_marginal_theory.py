"""What the theory of marginal matching says, checked on flows whose error is known exactly.

The toy is eight modes (radius 2, std 0.2) and ``e = eps [0.6 x + 0.5 (-x2, x1) + 0.5 (sin 2 x2, cos 2 x1)]``. Integrals
over the plane are sums over a grid: exact to about 1e-6 at ``t = 1``, where every density is smooth on the scale of the
grid's spacing. Published figures are Monte Carlo of one random state; they are compared within four standard errors of
20,000 samples, whose variance is integrated too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fmjax import correction, oracles, sampling
from fmjax.correction import correctors
from fmjax.oracles import mismatch
from fmjax.sampling import grids

EPS = 0.15
MIXED = (0.6 * EPS, 0.5 * EPS, 0.5 * EPS)
SIGMA = 0.1
RING = oracles.ring()
BLURRED = oracles.ring(std=float(np.hypot(0.2, SIGMA)))  # q_N * N(0, sigma^2 I)
MONTE_CARLO = 20_000


def flow(coefficients):
    return mismatch.perturbed(RING, mismatch.field(*coefficients))


def plane(points, reach=5.0):
    """A square grid ``[points^2, 2]`` and the area of its cells."""
    axis = jnp.linspace(-reach, reach, points)
    return jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2), (2 * reach / (points - 1)) ** 2


def total(values, cell):
    return float(np.asarray(values, np.float64).sum() * cell)


def tweedie(x, t, cond=None):
    """The exact score corrector at the end, in displacement units."""
    return SIGMA**2 * BLURRED.score(x, 1.0)


@functools.partial(jax.jit, static_argnums=2)
def _after(coefficients, alphas, corrector):
    x, _ = plane(100)
    m = flow(coefficients)
    direction = mismatch.gradient(m.logit) if corrector == "classifier" else tweedie
    log_p = m.log_p(x, 1.0)

    def gain(alpha):
        fix = correctors.marginal_matching(direction, alpha=lambda t: jnp.full_like(t, alpha))
        y, after = mismatch.pushed(lambda x: fix(None, x, 1.0)[0], x, log_p)
        return after - RING.log_density(y, 1.0)

    return jnp.exp(log_p), (direction(x, 1.0) ** 2).sum(1), jax.vmap(gain)(alphas)


@functools.cache
def corrected(coefficients, alphas, corrector):
    """After one step at ``n = N``: ``KL(p+ || pi)`` and the variance of one sample of it, by alpha; ``E_p |h|^2``."""
    cell = plane(100)[1]
    p, square, gains = (
        np.asarray(v, np.float64) for v in _after(jnp.array(coefficients), jnp.array(alphas), corrector)
    )
    kl = {alpha: total(p * gain, cell) for alpha, gain in zip(alphas, gains, strict=True)}
    variance = {alpha: total(p * gain**2, cell) - kl[alpha] ** 2 for alpha, gain in zip(alphas, gains, strict=True)}
    return kl, variance, total(p * square, cell)


CLASSIFIER = (0.0, -1e-3, 1e-3, 0.03, 0.1)


def close(result, published, variance):
    return abs(result - published) < 4 * (variance / MONTE_CARLO) ** 0.5


@pytest.mark.slow
def test_every_f_divergence_is_the_same_at_all_times():
    """KL both ways and the loss of the best classifier, by integration of the densities, each of mass one.

    The grid of 200 points a side is exact to 1e-3 at t = 0, where q has the folds of the flow.
    """
    x, cell = plane(200)
    densities = jax.jit(lambda x, t: (flow(MIXED).log_p(x, t), flow(MIXED).log_q(x, t)))
    result = []
    for t in (0.0, 0.5, 1.0):
        log_p, log_q = (np.asarray(v, np.float64) for v in densities(x, t))
        p, q, logit = np.exp(log_p), np.exp(log_q), log_q - log_p
        np.testing.assert_allclose([total(p, cell), total(q, cell)], 1, atol=1e-3)
        cross_entropy = q * np.logaddexp(0, -logit) + p * np.logaddexp(0, logit)
        result.append([total(v, cell) for v in (-p * logit, q * logit, cross_entropy / 2)])
    np.testing.assert_allclose(result, [result[-1]] * 3, atol=1e-3)
    assert corrected(MIXED, CLASSIFIER, "classifier")[0][0.0] == pytest.approx(result[-1][0], abs=1e-5)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Forward and ``inverse`` backward marginals at five of 120 steps, as the library builds them.

    The inverse converges where ``Lip(Phi_n - id) < 1``: between two modes the flow grows at a rate of 100.
    """
    ts, m, steps = grids.uniform_grid(120), flow(MIXED), (0, 30, 60, 90, 120)
    settings = {"flow": "toy", "batch": 2048, "shard_size": 2048, "steps": steps}
    make = functools.partial(correction.build_marginals, lambda params: m.velocity, {}, ts, **settings)
    forward, backward = (tmp_path_factory.mktemp(name) for name in "pq")
    make(directory=forward, direction="forward", count=2048, shape=(2,))
    data = np.asarray(RING.sample(jax.random.key(1), 2048))
    make(directory=backward, direction="backward", backward_map="inverse", data=data)
    return correction.read_marginals(forward), correction.read_marginals(backward)


def test_the_best_classifier_has_one_loss_at_all_built_steps(built):
    """The logit is constant along trajectories, so that even these finite samples have one loss and one AUC."""
    p, q = built
    logit = jax.jit(flow(MIXED).logit)
    losses, aucs = [], []
    for n, t in enumerate(p.ts):
        f_p, f_q = (np.asarray(logit(m.x[:, n], t), np.float64) for m in (p, q))
        losses.append((np.logaddexp(0, -f_q).mean() + np.logaddexp(0, f_p).mean()) / 2)
        aucs.append((f_q[:, None] > f_p).mean())
    np.testing.assert_allclose(losses, losses[-1], atol=3e-5)  # the rms error of the logit
    np.testing.assert_allclose(aucs, aucs[-1], atol=3e-5)
    assert 0.5 < aucs[0] and losses[0] < np.log(2)


def test_the_gradient_of_the_logit_is_pulled_back_by_the_flow(x64, key):
    """``grad log q_n/p_n (x) = J_F(x)^T grad log q_N/p_N (F(x))``, ``F`` the flow from ``t_n`` to the end."""
    m = mismatch.perturbed(RING, mismatch.field(*MIXED), steps=200)
    x, t = jax.random.normal(key, (16, 2)), 0.3

    @jax.jit
    def both(x):
        carry = lambda x: sampling.sample(sampling.rk4(m.velocity), x, np.linspace(t, 1, 401))
        push = mismatch.gradient(m.logit)
        end, pull = jax.vjp(carry, x)
        return push(x, t), pull(push(end, 1.0))[0]

    local_gradient, pulled = both(x)
    assert jnp.abs(local_gradient - pulled).max() < 1e-6 * jnp.abs(local_gradient).max()


@pytest.mark.slow
def test_the_classifier_step_descends_the_kl_at_the_fisher_rate():
    """``d KL / d alpha = -I(p|q)`` at 0; the published slope is -5.16 (0.02)."""
    kl, variance, fisher = corrected(MIXED, CLASSIFIER, "classifier")
    assert close(kl[0.0], 0.0872, variance[0.0])
    assert (kl[1e-3] - kl[-1e-3]) / 2e-3 == pytest.approx(-fisher, rel=1e-3)  # the third derivative, and float32
    assert fisher == pytest.approx(5.16, abs=3 * 0.02)
    assert kl[0.03] < 0.15 * kl[0.0] and kl[0.1] > kl[0.0]  # it goes far, and too far
    perfect, *_ = corrected((0.0, 0.0, 0.0), CLASSIFIER, "classifier")
    assert max(map(abs, perfect.values())) < 1e-6  # it does no harm


@pytest.mark.parametrize(
    ("eps", "published"),
    [
        (0.05, {0.0: 0.0199, 0.25: 0.0172, 0.5: 0.0255, 1.0: 0.077}),
        (-0.05, {0.0: 0.0207, 0.25: 0.0308, 0.5: 0.0511, 1.0: 0.125}),
        (0.0, {0.0: 0.0, 1.0: 0.088}),
    ],
)
def test_the_deterministic_score_step_helps_an_over_dispersed_flow_only(eps, published):
    result, variance, _ = corrected((eps, 0.0, 0.0), tuple(published), "score")
    for alpha, kl in result.items():
        assert close(kl, published[alpha], variance[alpha]) or kl == pytest.approx(published[alpha], abs=1e-6)
    rises = np.diff(list(result.values())) > 0
    assert list(rises) == ([False, True, True] if eps > 0 else [True] * len(rises))


@pytest.mark.parametrize(("beta", "alpha", "std"), [(0, 1, 0.159), (0, 0.5, 0.179), (1, 1, 0.179), (1, 0.5, 0.201)])
def test_the_presets_leave_these_widths_of_the_modes_of_a_perfect_model(beta, alpha, std, key):
    """``tweedie``, ``w2``, noise with a whole step, and ``langevin``, which keeps 0.2; published to one thousandth."""
    n = 50_000
    x = np.asarray(RING.sample(key, n), np.float64)
    fix = correctors.marginal_matching(tweedie, alpha=float(alpha), beta=float(beta * SIGMA))
    y = np.asarray(jax.jit(lambda x, key: fix(jax.random.split(key, n), x, 1.0)[0])(x, jax.random.key(1)), np.float64)
    angle = np.round(np.arctan2(y[:, 1], y[:, 0]) / (np.pi / 4)) * (np.pi / 4)
    width = np.sqrt(((y - 2 * np.stack([np.cos(angle), np.sin(angle)], 1)) ** 2).mean())
    assert abs(width - std) < 1e-3 + 4 * std / (4 * n) ** 0.5


LINE = jnp.linspace(-9, 9, 6001)[:, None]


def line(std, centre, blur=0.0):
    """Two modes on the line, convolved with ``N(0, blur^2)``."""
    return oracles.mixture(jnp.array([[-1.0], [1.5]]) + centre, float(np.hypot(std, blur)), jnp.array([0.4, 0.6]))


def test_noise_and_half_a_step_are_a_langevin_step_to_first_order(x64):
    """``beta = sigma``, ``a = sigma^2 / 2``: ``Delta KL(p||q) = -a I(p|q) + O(a^2)``, and half of ``a``."""
    q = line(0.6, 0.0)
    p = line(0.8, 0.3)
    integrate = lambda f: np.trapezoid(np.asarray(f), np.asarray(LINE[:, 0]))
    density = jnp.exp(p.log_density(LINE, 1.0))
    before = integrate(density * (p.log_density(LINE, 1.0) - q.log_density(LINE, 1.0)))
    fisher = integrate(density * (p.score(LINE, 1.0) - q.score(LINE, 1.0))[:, 0] ** 2)
    left = []
    for a in (0.01, 0.005):
        sigma = np.sqrt(2 * a)
        noised = line(0.8, 0.3, sigma).log_density(LINE, 1.0)
        direction = lambda x, t, cond=None, s=sigma: s**2 * line(0.6, 0.0, s).score(x, 1.0)
        fix = correctors.marginal_matching(direction, alpha=0.5)
        y, log_p = mismatch.pushed(lambda x, fix=fix: fix(None, x, 1.0)[0], LINE, noised)
        after = integrate(jnp.exp(noised) * (log_p - q.log_density(y, 1.0)))
        left.append(after - before + a * fisher)
    assert abs(left[0]) < 0.25 * 0.01 * fisher
    assert left[0] / left[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("eps", [0.2, -0.2])
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_the_best_steps_of_two_gaussians_are_the_closed_ones(eps, t, x64):
    """Logit: ``a b^2 / (a + b)``. Score: ``(b^2 + sigma^2) (1 - b / a)``, which is negative for a < b. Both give b."""
    m = mismatch.scaled(0.5, eps, dim=1)
    scale = lambda f: np.exp(-2 * float(f(jnp.zeros((1, 1)), t)[0]) - np.log(2 * np.pi)) ** 0.5
    a, b = scale(m.log_p), scale(m.log_q)
    x = jnp.array([[1.0]])
    step = lambda direction, alpha: correctors.marginal_matching(direction, alpha=alpha)(None, x, t)[0]
    np.testing.assert_allclose(a * step(mismatch.gradient(m.logit), a * b**2 / (a + b)), b, rtol=1e-10)
    score = lambda x, t, cond=None: -x / (b**2 + SIGMA**2)
    best = (b**2 + SIGMA**2) * (1 - b / a)
    np.testing.assert_allclose(a * step(score, best), b, rtol=1e-10)
    assert (best > 0) == (eps > 0)


def w2(x, y):
    """``W2`` of two sets of points and the pairs of an optimal coupling."""
    cost = ((x[:, None] - y) ** 2).sum(-1)
    pairs = linear_sum_assignment(cost)
    return np.sqrt(cost[pairs].mean()), pairs


def growth(t):
    """``sup |grad v*|`` of the ring at times ``t``: ``A + t (1-t) R^2 / c^2`` against ``|A|``."""
    c = (1 - t) ** 2 + 0.04 * t**2
    a = (0.04 * t - (1 - t)) / c
    return np.maximum(np.abs(a), np.abs(a + 4 * t * (1 - t) / c**2))


def test_the_recursion_and_the_transported_coupling_bound_the_distance(key):
    """On empirical distributions both hold without slack; the first is vacuous over the whole flow, the second is not.

    ``D+ <= Lip(T) D- + chi`` for the score step at the end, ``D_{n+1} <= Lambda_n D_n``, and for a classifier step at
    t = 0.75, the last, ``D_N^2 <= E |F(x) - F(y)|^2`` over the optimal coupling there.
    """
    n, ts = 400, grids.uniform_grid(40)
    m = flow(tuple(0.35 / EPS * c for c in MIXED))
    step = sampling.rk4(m.velocity)
    run = functools.partial(sampling.sample, step, trajectory=True)
    p = np.asarray(jax.jit(lambda x: run(x, ts))(jax.random.normal(key, (n, 2))), np.float64)
    there_and_back = jax.jit(lambda x: run(sampling.sample(step, x, ts[::-1]), ts))  # one bijection carries p and q
    q = np.asarray(there_and_back(RING.sample(jax.random.key(1), n)), np.float64)
    distance = {i: w2(p[i], q[i])[0] for i in (0, 20, 30, 39, 40)}

    fine = np.linspace(0, 1, 200_001)
    assert np.trapezoid(growth(fine), fine) == pytest.approx(48.74, abs=5e-3)
    z = (growth(np.linspace(ts[39], 1, 101)).max() + 0.35 * (0.6 + 0.5 + 1.0)) / 40  # |grad e| <= 0.35 (0.6 + 0.5 + 1)
    assert distance[40] <= (1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24) * distance[39] + 1e-4
    assert np.exp(48.74) * distance[0] > 1e20 * distance[40]

    c = 0.2**2 + SIGMA**2
    lipschitz = max(abs(1 - SIGMA**2 / 2 / c), abs(1 - SIGMA**2 / 2 / c + SIGMA**2 / 2 * 4 / c**2))
    halfway = lambda x: np.asarray(x + 0.5 * tweedie(jnp.asarray(x), 1.0), np.float64)
    assert w2(halfway(p[40]), q[40])[0] <= lipschitz * distance[40] + w2(halfway(q[40]), q[40])[0]

    fix = correctors.marginal_matching(mismatch.gradient(m.logit), alpha=0.02)
    moved = jax.jit(lambda x: fix(None, x, ts[30])[0])(jnp.asarray(p[30], jnp.float32))
    ends = np.asarray(jax.jit(lambda x: sampling.sample(step, x, ts[30:]))(moved), np.float64)
    after, (i, j) = w2(np.asarray(moved, np.float64), q[30])
    bound = np.sqrt(((ends[i] - q[40][j]) ** 2).sum(1).mean())
    measured = w2(ends, q[40])[0]
    assert measured <= bound + 1e-4 and bound < 2 * measured
    assert after < distance[30] and measured < distance[40]
