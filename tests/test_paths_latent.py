"""Paths with a latent, ``alpha x0 + beta x1 + gamma z``: against coupled Gaussians, torchcfm and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def pair_law():
    """Means and covariance of ``(x0, x1)``, correlated without symmetry."""
    root = np.random.default_rng(0).normal(size=(2 * D, 2 * D + 2)) / 2
    return jnp.array([0.5, -1.0]), jnp.array([1.0, -2.0]), jnp.asarray(root @ root.T)


def by_regression(path, t):
    """``v(x, t)`` and ``E[z|x]`` from the interpolant alone, asked for its linear maps of ``(x0, x1, z)``.

    ``I = M w``, ``dI = D w``, ``w ~ N(mu, Sigma)``: ``E[w|I] = mu + Sigma M^T (M Sigma M^T)^-1 (I - M mu)``.
    """
    mean0, mean1, joint = pair_law()
    unit = jnp.eye(3 * D).reshape(3 * D, 3, D)
    m, d = (a.T for a in paths.with_velocity(path, unit[:, 0], unit[:, 1], t, unit[:, 2]))
    mu = jnp.concatenate([mean0, mean1, jnp.zeros(D)])
    sigma = jax.scipy.linalg.block_diag(joint, jnp.eye(D))
    given = lambda x: mu + (sigma @ m.T @ jnp.linalg.solve(m @ sigma @ m.T, (x - m @ mu).T)).T
    return lambda x: (given(x) @ d.T, given(x)[:, 2 * D :])


@every_latent
@pytest.mark.parametrize("t", [1e-6, 0.1, 0.5, 0.8, 1 - 1e-6])
def test_velocity_and_score_are_those_of_coupled_gaussians(path, t, x64, key):
    oracle = oracles.coupled(*pair_law(), path=path)
    x = 2 * jax.random.normal(key, (5, D))
    v, z = by_regression(path, t)(x)
    np.testing.assert_allclose(v, oracle.velocity(x, t), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(paths.latent_score(path, z, t), oracle.score(x, t), rtol=1e-8, atol=1e-8)


@every_latent
def test_the_velocity_is_the_time_derivative_latent_included(path, x64, key):
    x0, x1, z = jax.random.normal(key, (3, 5, 3))
    t, h = jnp.linspace(0.1, 0.9, 5), 1e-6
    at = lambda t: paths.with_velocity(path, x0, x1, t, z)
    np.testing.assert_allclose(at(t)[1], (at(t + h)[0] - at(t - h)[0]) / (2 * h), rtol=1e-7, atol=1e-7)


@every_latent
def test_the_ends_are_the_pair_and_only_a_brownian_velocity_is_infinite_there(path, key):
    x0, x1, z = jax.random.normal(key, (3, 4, 3))
    brownian = not np.isfinite(jax.grad(path.gamma)(0.0))
    assert brownian == (path not in (LATENT["quadratic"], LATENT["sine_squared"]))
    for t, want in ((0.0, x0), (1.0, x1)):
        x, u = paths.with_velocity(path, x0, x1, t, z)
        np.testing.assert_allclose(x, want, atol=1e-6)  # cos(pi / 2) in float32
        assert np.isinf(u).all() if brownian else np.isfinite(u).all()
        variance, rate = paths.latent_variance(path, x, t)
        want = (1 - 2 * t) * np.square(path.gamma(0.5)) * 4 if brownian else 0.0
        np.testing.assert_allclose(variance, 0, atol=1e-12)
        np.testing.assert_allclose(rate, np.full_like(rate, want), rtol=1e-6, atol=1e-5)


def test_the_defaults_and_the_schedules_are_the_stated_ones(x64):
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
def test_with_an_independent_normal_source_it_is_a_path_without_latent(path, x64, key):
    """Laws, velocity, and with them every conversion; derivatives in time too."""
    merged = paths.one_sided(path)
    means, std = jnp.array([[2.0, 0.5], [-1.5, 1.0]]), jnp.array([0.3, 0.8])
    with_latent, without = (oracles.mixture(means, std, path=p) for p in (path, merged))
    x, t = jax.random.normal(key, (5, D)), jnp.linspace(0.0, 0.96, 5)
    for name in ("velocity", "score", "log_density"):
        np.testing.assert_allclose(
            getattr(with_latent, name)(x, t), getattr(without, name)(x, t), rtol=1e-10, atol=1e-10
        )
    score = paths.score(merged, x, with_latent.velocity(x, t), t)
    np.testing.assert_allclose(score, with_latent.score(x, t), rtol=1e-8, atol=1e-8)
    moved = paths.change(with_latent.velocity, merged, paths.linear())(x, t)
    np.testing.assert_allclose(moved, oracles.mixture(means, std).velocity(x, t), rtol=1e-7, atol=1e-7)
    assert paths.one_sided(paths.linear()).gamma is None and merged.gamma is None


def test_what_velocity_and_state_alone_do_not_say_is_refused(key):
    path, x = paths.schroedinger_bridge(), jnp.ones((2, 1))
    for ask in (
        lambda: paths.score(path, x, x, 0.5),
        lambda: paths.endpoints(path, x, x, 0.5),
        lambda: paths.convert(path, x, x, 0.5, kind="noise", to="noise"),
        lambda: paths.change(lambda x, t: x, path, paths.linear()),
        lambda: paths.change(lambda x, t: x, paths.linear(), path),
        lambda: paths.match_snr(paths.linear(), path, jnp.array([0.5])),
        lambda: guidance.interval(2.0, path=path),
    ):
        with pytest.raises(ValueError, match=r"needs a path without a latent, .* or, .*, use paths.one_sided\(path\)"):
            ask()
    with pytest.raises(ValueError, match="this path has no latent: gamma is None"):
        paths.latent_score(paths.linear(), x, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: paths.schroedinger_bridge(sigma=0.0), "sigma > 0, got sigma=0.0; without a latent it is 'linear'"),
        (lambda: paths.two_sided(scale=-1.0), "scale > 0, got scale=-1.0"),
        (
            lambda: paths.two_sided(latent="brown"),
            "no latent 'brown'; did you mean 'brownian'.*quadratic, sine_squared",
        ),
        (lambda: paths.two_sided(schedule="vp"), "no schedule 'vp'.*linear, trigonometric"),
        (lambda: paths.with_velocity(paths.two_sided(), jnp.ones((1, 1)), jnp.ones((1, 1)), 0.5), "give z ~ N"),
        (lambda: paths.with_velocity(paths.linear(), *jnp.ones((2, 1, 1)), 0.5, jnp.ones((1, 1))), "leave z out"),
    ],
)
def test_a_latent_that_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def net(params, x, s, t, cond=None, key=None):
    return params * x


def test_flow_matching_draws_the_latent_from_the_examples_key_and_learns_the_oracle(key):
    """At the closed-form velocity the residual has no correlation with functions of ``x``; a wrong one has."""
    path, n = LATENT["schroedinger_bridge"], 100_000
    oracle = oracles.coupled(*pair_law(), path=path)
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


def test_source_and_latent_are_drawn_from_keys_of_their_own(key):
    method, batch = flow_matching(net, path=LATENT["quadratic"]), Batch(jnp.zeros((8, 2)))
    with jax.debug_key_reuse(True):
        method.loss(jnp.float32(0.0), None, batch, jax.random.clone(as_keys(key, 8)))


def test_times_up_to_the_infinite_ends_are_refused_and_smooth_latents_take_them():
    with pytest.raises(ValueError, match="infinite at t = 0 and 1.*use times.interior"):
        flow_matching(net, path=paths.schroedinger_bridge())
    flow_matching(net, path=LATENT["quadratic"])
    batch = Batch(jnp.ones((64, 2)), jnp.zeros((64, 2)))
    loss, aux = flow_matching(net, path=LATENT["quadratic"]).loss(
        jnp.float32(0.0), None, batch, as_keys(jax.random.key(0), 64)
    )
    z = aux["per_example"] - 1  # what is beyond |x1 - x0|^2 = 1 comes from the latent, one draw an example
    assert np.isfinite(loss) and len(np.unique(np.asarray(z))) == 64


def test_score_is_offered_where_the_velocity_has_it(x64, key):
    oracle = oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]))
    method = flow_matching(oracles.average_velocity(oracle))
    x, t = jax.random.normal(key, (4, 2)), jnp.array([0.0, 0.3, 0.6, 0.9])
    np.testing.assert_allclose(method.score(None)(x, t), oracle.score(x, t), rtol=1e-11, atol=1e-11)
    assert flow_matching(net, path=LATENT["quadratic"]).score is None


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_interpolant_and_target_are_torchcfms(sigma):
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
