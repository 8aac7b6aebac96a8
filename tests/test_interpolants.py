"""Interpolants: end points, derivatives, noise added back, and latents against coupled Gaussians and torchcfm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_paths import ALL

from fmjax import oracles, paths
from fmjax.keys import as_keys
from fmjax.methods.flow_matching import flow_matching
from fmjax.sampling import guidance
from fmjax.types import Batch

LATENT = {
    "schroedinger_bridge": paths.schroedinger_bridge(sigma=0.7),
    "two_sided": paths.two_sided(),
    "trigonometric": paths.two_sided(schedule="trigonometric", scale=0.5),
    "quadratic": paths.two_sided(latent="quadratic", scale=2.0),
    "sine_squared": paths.two_sided(latent="sine_squared", schedule="trigonometric"),
}
every_latent = pytest.mark.parametrize("path", LATENT.values(), ids=LATENT)
D = 2


def pair_moments():
    """Means and covariance of ``(x0, x1)``, correlated without symmetry."""
    root = np.random.default_rng(0).normal(size=(2 * D, 2 * D + 2)) / 2
    return jnp.array([0.5, -1.0]), jnp.array([1.0, -2.0]), jnp.asarray(root @ root.T)


def by_regression(path, t):
    """``v(x, t)`` and ``E[z|x]`` from the linear maps of ``(x0, x1, z)`` to the interpolant and its derivative.

    ``I = M w``, ``dI = D w``, ``w ~ N(mu, Sigma)``: ``E[w|I] = mu + Sigma M^T (M Sigma M^T)^-1 (I - M mu)``.
    """
    mean0, mean1, joint = pair_moments()
    unit = jnp.eye(3 * D).reshape(3 * D, 3, D)
    m, d = (a.T for a in paths.with_velocity(path, unit[:, 0], unit[:, 1], t, unit[:, 2]))
    mu = jnp.concatenate([mean0, mean1, jnp.zeros(D)])
    sigma = jax.scipy.linalg.block_diag(joint, jnp.eye(D))
    posterior = lambda x: mu + (sigma @ m.T @ jnp.linalg.solve(m @ sigma @ m.T, (x - m @ mu).T)).T
    return lambda x: (posterior(x) @ d.T, posterior(x)[:, 2 * D :])


@pytest.mark.parametrize("make", [paths.linear, paths.trigonometric])
def test_the_ends_of_an_interpolant_are_source_and_data(make, x64):
    x0, x1 = jnp.arange(6.0).reshape(3, 2), -jnp.ones((3, 2))
    np.testing.assert_allclose(paths.with_velocity(make(), x0, x1, 0.0)[0], x0, atol=1e-15)
    np.testing.assert_allclose(paths.with_velocity(make(), x0, x1, 1.0)[0], x1, atol=1e-15)


@pytest.mark.parametrize("make", [paths.linear, paths.trigonometric])
def test_the_velocity_is_the_time_derivative(make, x64, key):
    x0, x1 = jax.random.normal(key, (2, 5, 3))
    t, h = jnp.linspace(0.1, 0.9, 5), 1e-6
    at = jax.jit(lambda t: paths.with_velocity(make(), x0, x1, t))
    numeric = (at(t + h)[0] - at(t - h)[0]) / (2 * h)
    np.testing.assert_allclose(at(t)[1], numeric, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_renoising_is_the_kernel_of_the_path(path, x64):
    """Mean and variance at the earlier time; two steps are one step in distribution; no step is the identity."""

    @jax.jit
    def kernel(t, s):
        ones, zeros = jnp.ones((1, 1)), jnp.zeros((1, 1))
        return tuple(paths.renoise(path, a, b, t, s)[0, 0] for a, b in ((ones, zeros), (zeros, ones)))

    at = jax.jit(path.coefficients)
    for t, m, s in ((0.9, 0.6, 0.2), (0.5, 0.4, 0.1), (0.99, 0.3, 0.0)):
        (alpha, beta), (alpha_s, beta_s) = (map(float, at(jnp.asarray(r))) for r in (t, s))
        kept, noise = map(float, kernel(t, s))
        assert kept * beta == pytest.approx(beta_s, abs=1e-12)
        assert (kept * alpha) ** 2 + noise**2 == pytest.approx(alpha_s**2, rel=1e-12)
        (first, early), (second, late) = (tuple(map(float, kernel(*pair))) for pair in ((t, m), (m, s)))
        assert first * second == pytest.approx(kept, abs=1e-12)
        assert (second * early) ** 2 + late**2 == pytest.approx(noise**2, rel=1e-9)
        assert tuple(map(float, kernel(t, t))) == pytest.approx((1, 0), abs=1e-7)


@every_latent
def test_velocity_and_score_are_of_coupled_gaussians(path, x64, key):
    oracle = oracles.coupled(*pair_moments(), path=path)

    @jax.jit
    def fields(x, t):
        v, z = by_regression(path, t)(x)
        return v, oracle.velocity(x, t), paths.latent_score(path, z, t), oracle.score(x, t)

    x = 2 * jax.random.normal(key, (5, D))
    for t in (1e-6, 0.1, 0.5, 0.8, 1 - 1e-6):
        v, velocity, latent_score, score = fields(x, t)
        np.testing.assert_allclose(v, velocity, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(latent_score, score, rtol=1e-8, atol=1e-8)


@every_latent
def test_the_velocity_with_a_latent_is_the_time_derivative(path, x64, key):
    x0, x1, z = jax.random.normal(key, (3, 5, 3))
    t, h = jnp.linspace(0.1, 0.9, 5), 1e-6
    at = jax.jit(lambda t: paths.with_velocity(path, x0, x1, t, z))
    np.testing.assert_allclose(at(t)[1], (at(t + h)[0] - at(t - h)[0]) / (2 * h), rtol=1e-7, atol=1e-7)


@every_latent
def test_only_a_brownian_velocity_is_infinite_at_the_ends(path, key):
    x0, x1, z = jax.random.normal(key, (3, 4, 3))
    brownian = not np.isfinite(jax.grad(path.gamma)(0.0))
    at = jax.jit(lambda t: (paths.with_velocity(path, x0, x1, t, z), paths.latent_variance(path, x0, t)))
    assert brownian == (path not in (LATENT["quadratic"], LATENT["sine_squared"]))
    for t, want in ((0.0, x0), (1.0, x1)):
        (x, u), (variance, rate) = at(t)
        np.testing.assert_allclose(x, want, atol=1e-6)  # cos(pi / 2) in float32
        assert np.isinf(u).all() if brownian else np.isfinite(u).all()
        want = (1 - 2 * t) * np.square(path.gamma(0.5)) * 4 if brownian else 0.0
        np.testing.assert_allclose(variance, 0, atol=1e-12)
        np.testing.assert_allclose(rate, np.full_like(rate, want), rtol=1e-6, atol=1e-5)


def test_latents_and_schedules_are_the_stated_functions(x64):
    t = jnp.linspace(0.0, 1.0, 7)
    formula = {
        paths.schroedinger_bridge(): jnp.sqrt(t * (1 - t)),
        paths.two_sided(): jnp.sqrt(t * (1 - t)),
        paths.schroedinger_bridge(sigma=2.0): jnp.sqrt(4 * t * (1 - t)),
        paths.two_sided(latent="quadratic", scale=3.0): 3 * t * (1 - t),
        paths.two_sided(latent="sine_squared"): jnp.sin(jnp.pi * t) ** 2,
    }
    for path, gamma in formula.items():
        np.testing.assert_allclose(path.gamma(t), gamma, rtol=1e-13, atol=1e-15)
        np.testing.assert_array_equal(path.coefficients(t), paths.linear().coefficients(t))
    bent = paths.two_sided(schedule="trigonometric").coefficients(t)
    np.testing.assert_array_equal(bent, paths.trigonometric().coefficients(t))


@every_latent
def test_with_an_independent_normal_source_the_latent_merges(path, x64, key):
    """The same distributions, velocity and conversions as on the path without a latent."""
    merged = paths.one_sided(path)
    means, std = jnp.array([[2.0, 0.5], [-1.5, 1.0]]), jnp.array([0.3, 0.8])
    with_latent, without = (oracles.mixture(means, std, path=p) for p in (path, merged))
    x, t = jax.random.normal(key, (5, D)), jnp.linspace(0.0, 0.96, 5)

    @jax.jit
    def fields(x, t):
        of = lambda oracle: [oracle.velocity(x, t), oracle.score(x, t), oracle.log_density(x, t)]
        v = with_latent.velocity(x, t)
        moved = paths.change(with_latent.velocity, merged, paths.linear())(x, t)
        linear = oracles.mixture(means, std).velocity(x, t)
        return of(with_latent), of(without), paths.score(merged, x, v, t), moved, linear

    ours, expected, score, moved, linear = fields(x, t)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(score, ours[1], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(moved, linear, rtol=1e-7, atol=1e-7)
    assert paths.one_sided(paths.linear()).gamma is None and merged.gamma is None


def test_a_path_with_a_latent_is_refused_by_conversions(key):
    path, x = paths.schroedinger_bridge(), jnp.ones((2, 1))
    for call in (
        lambda: paths.score(path, x, x, 0.5),
        lambda: paths.endpoints(path, x, x, 0.5),
        lambda: paths.convert(path, x, x, 0.5, kind="noise", to="noise"),
        lambda: paths.change(lambda x, t: x, path, paths.linear()),
        lambda: paths.change(lambda x, t: x, paths.linear(), path),
        lambda: paths.match_snr(paths.linear(), path, jnp.array([0.5])),
        lambda: guidance.interval(2.0, path=path),
    ):
        with pytest.raises(ValueError, match="path with gamma: .*use paths.one_sided"):
            call()
    with pytest.raises(ValueError, match="path.gamma=None"):
        paths.latent_score(paths.linear(), x, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: paths.schroedinger_bridge(sigma=0.0), "sigma=0.0"),
        (lambda: paths.two_sided(scale=-1.0), "scale=-1.0"),
        (
            lambda: paths.two_sided(latent="brown"),
            "latent='brown'.*'brownian'.*quadratic, sine_squared",
        ),
        (lambda: paths.two_sided(schedule="vp"), "schedule='vp'.*linear, trigonometric"),
        (lambda: paths.with_velocity(paths.two_sided(), jnp.ones((1, 1)), jnp.ones((1, 1)), 0.5), "z=None"),
        (lambda: paths.with_velocity(paths.linear(), *jnp.ones((2, 1, 1)), 0.5, jnp.ones((1, 1))), "z=array"),
    ],
)
def test_bad_options_of_a_latent_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def net(params, x, s, t, cond=None, key=None):
    return params * x


def test_flow_matching_with_a_latent_learns_the_oracle(key):
    """At the closed-form velocity the residual has no correlation with functions of ``x``; a wrong one has."""
    path, n = LATENT["schroedinger_bridge"], 100_000
    oracle = oracles.coupled(*pair_moments(), path=path)
    x0, x1 = oracle.sample(key, n)
    features = lambda x, t: jnp.stack([jnp.ones_like(x), x, jnp.sin(2 * x), t[:, None] * x[:, ::-1]])
    off = lambda params, x, s, t, cond=None, key=None: oracle.velocity(x, t) + jnp.tensordot(params, features(x, t), 1)
    method = flow_matching(
        off, path=path, time=lambda key: jax.vmap(lambda k: jax.random.uniform(k, minval=0.02, maxval=0.98))(key)
    )
    keys = as_keys(jax.random.key(1), n)
    each = lambda p, x0, x1, k: method.loss(p, None, Batch(x1[None], x0[None]), k[None])[0]
    gradient = jax.jit(jax.vmap(jax.grad(each), (None, 0, 0, 0)))
    g = np.asarray(gradient(jnp.zeros(4), x0, x1, keys), np.float64)
    assert np.abs(g.mean(0) / (g.std(0) / n**0.5)).max() < 4.5
    wrong = np.asarray(gradient(0.2 * jnp.eye(4)[1], x0, x1, keys), np.float64)
    assert (wrong.mean(0) / (wrong.std(0) / n**0.5))[1] > 4.5


def test_source_and_latent_are_drawn_from_separate_keys(key):
    method, batch = flow_matching(net, path=LATENT["quadratic"]), Batch(jnp.zeros((8, 2)))
    with jax.debug_key_reuse(True):
        method.loss(jnp.float32(0.0), None, batch, jax.random.clone(as_keys(key, 8)))


def test_times_up_to_infinite_ends_are_refused():
    with pytest.raises(ValueError, match="time=times.uniform"):
        flow_matching(net, path=paths.schroedinger_bridge())
    flow_matching(net, path=LATENT["quadratic"])
    batch = Batch(jnp.ones((64, 2)), jnp.zeros((64, 2)))
    loss, aux = flow_matching(net, path=LATENT["quadratic"]).loss(
        jnp.float32(0.0), None, batch, as_keys(jax.random.key(0), 64)
    )
    z = aux["per_example"] - 1  # what is beyond |x1 - x0|^2 = 1 comes from the latent, one draw an example
    assert np.isfinite(loss) and len(np.unique(np.asarray(z))) == 64


def test_a_method_has_a_score_where_its_velocity_determines_it(x64, key):
    oracle = oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]))
    method = flow_matching(oracles.average_velocity(oracle))
    x, t = jax.random.normal(key, (4, 2)), jnp.array([0.0, 0.3, 0.6, 0.9])
    np.testing.assert_allclose(method.score(None)(x, t), oracle.score(x, t), rtol=1e-11, atol=1e-11)
    assert flow_matching(net, path=LATENT["quadratic"]).score is None


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_interpolant_and_target_are_equal_to_torchcfm(sigma):
    """The same pairs, times and noise; their 1e-8 in the Schroedinger bridge's denominator is below float32 here."""
    peer = pytest.importorskip("torchcfm.conditional_flow_matching", reason="compares with torchcfm (the torch extra)")
    import torch

    x0, x1, z = jax.random.normal(jax.random.key(3), (3, 16, 4))
    t = jnp.linspace(0.02, 0.98, 16)
    cases = {
        peer.SchrodingerBridgeConditionalFlowMatcher: lambda: paths.with_velocity(
            paths.schroedinger_bridge(sigma=sigma), x0, x1, t, z
        ),
        peer.TargetConditionalFlowMatcher: lambda: paths.with_velocity(
            paths.target_conditional(sigma_min=sigma) if sigma < 1 else paths.target_conditional(sigma_min=0.9),
            z,
            x1,
            t,
        ),
        peer.VariancePreservingConditionalFlowMatcher: lambda: paths.with_velocity(paths.trigonometric(), x0, x1, t),
        peer.ConditionalFlowMatcher: lambda: paths.with_velocity(paths.linear(), x0, x1, t),
    }
    for make, ours in cases.items():
        bridge = make is peer.SchrodingerBridgeConditionalFlowMatcher
        target = make is peer.TargetConditionalFlowMatcher
        theirs = make(sigma=sigma if bridge else min(sigma, 0.9) if target else 0.0)
        a, b, time, noise = (torch.tensor(np.asarray(v)) for v in (x0, x1, t, z))
        xt = theirs.sample_xt(a, b, time, noise)
        ut = theirs.compute_conditional_flow(a, b, time, xt)
        x, u = ours()
        np.testing.assert_allclose(x, xt.numpy(), rtol=1e-5, atol=1e-6, err_msg=make.__name__)
        # their target conditional velocity divides by 1 - (1 - sigma) t > 0.1, the bridge's by t (1 - t) > 0.02
        np.testing.assert_allclose(u, ut.numpy(), rtol=1e-4, atol=1e-4, err_msg=make.__name__)
