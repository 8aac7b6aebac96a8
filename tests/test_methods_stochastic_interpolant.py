"""Velocity and denoiser of paths with a latent: the published losses, coupled Gaussians, [SF]2M and its bridge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, sampling, times
from fmjax.keys import as_keys
from fmjax.methods.stochastic_interpolant import stochastic_interpolant
from fmjax.sampling import grids
from fmjax.types import Batch, expand, over_batch

SIGMA = 0.8
BRIDGE = paths.schroedinger_bridge(sigma=SIGMA)
ROOT = np.random.default_rng(0).normal(size=(4, 6)) / 2
PAIRS = (jnp.array([0.5, -1.0]), jnp.array([1.0, -2.0]), jnp.asarray(ROOT @ ROOT.T))


def exact(oracle, path):
    """The closed-form net of two heads, ``(v, E[z|x] = -gamma S)``."""

    def net(params, x, s, t, cond=None, key=None):
        return jnp.concatenate([oracle.velocity(x, t), -paths.latent(path, x, t)[0] * oracle.score(x, t)], -1)

    return net


def features(x, t):
    t = expand(t, x)
    return jnp.stack([jnp.ones_like(x), x, x[:, ::-1], jnp.sin(2 * x), t * x])


def around(net):
    """The net plus ``sum_k params[head, k] phi_k``."""

    def off(params, x, s, t, cond=None, key=None):
        phi = features(x, over_batch(t, x))
        return net(None, x, s, t) + jnp.concatenate([jnp.tensordot(p, phi, 1) for p in params], -1)

    return off


def line(params, x, s, t, cond=None, key=None):
    t = expand(over_batch(t, x), x)
    return jnp.concatenate([jnp.tanh(params[0] * x + params[1] * t), params[2] * x - params[3] * t], -1)


def setting(n=8, d=2):
    x0, x1 = jax.random.normal(jax.random.key(0), (2, n, d))
    return jnp.array([0.3, -0.7, 0.5, 0.2]), Batch(x1, x0), as_keys(jax.random.key(1), n)


def drawn(method, batch, keys, path):
    """Times, latents and targets of a loss, from nets that return where they are evaluated, and zero."""
    seen = []

    def spy(params, x, s, t, cond=None, key=None):
        seen.append((x, t))
        return jnp.concatenate([x, x], -1) * 0

    method(spy).loss(None, None, batch, keys)
    ((x, t),) = seen
    gamma, _ = paths.latent(path, x, t)
    alpha, beta, *_ = paths.coefficients(path, x, t)
    z = (x - alpha * batch.x0 - beta * batch.x1) / gamma
    return x, t, z, paths.with_velocity(path, batch.x0, batch.x1, t, z)[1]


@pytest.mark.parametrize("path", [BRIDGE, paths.two_sided(latent="sine_squared", schedule="trigonometric")])
def test_the_gradients_are_those_of_the_published_losses(path, x64):
    """``|v|^2/2 - dI v``, and ``|n|^2/2 - z n``, ``gamma^2 |S + z/gamma|^2`` or [SF]2M's score; 2 / d apart."""
    params, batch, keys = setting()
    params, batch = params.astype(float), jax.tree.map(lambda a: a.astype(float), batch)
    make = functools.partial(stochastic_interpolant, path=path, weight=0.7)
    x, t, z, u = drawn(make, batch, keys, path)
    d = x.shape[-1]
    gamma, _ = paths.latent(path, x, t)
    heads = lambda p: jnp.split(line(p, x, t, t), 2, -1)
    per = lambda a: a.sum(-1).mean()
    velocity = lambda p: per(heads(p)[0] ** 2 / 2 - u * heads(p)[0])
    denoiser = lambda p: per(heads(p)[1] ** 2 / 2 - z * heads(p)[1])
    score = lambda p: per(gamma**2 * (-heads(p)[1] / gamma + z / gamma) ** 2) / 2
    weight = 2 * gamma / SIGMA**2  # lambda; the score head of [SF]2M is s = sigma^2 S / 2
    sf2m = lambda p: per((weight * (SIGMA**2 / 2 * -heads(p)[1] / gamma) + z) ** 2) / 2
    actual = jax.jit(jax.grad(lambda p: make(line).loss(p, None, batch, keys)[0]))(params)
    for second in (denoiser, score, sf2m):
        expected = jax.jit(jax.grad(lambda p, second=second: 2 / d * (velocity(p) + 0.7 * second(p))))(params)
        np.testing.assert_allclose(actual, expected, rtol=1e-9)


@pytest.mark.parametrize("path", [BRIDGE, paths.two_sided()], ids=["bridge", "default"])
def test_coupled_gaussians_are_the_stationary_point_of_both_heads(path):
    n, k = 20_000, 5
    oracle = oracles.coupled(*PAIRS, path=path)
    x0, x1 = oracle.sample(jax.random.key(2), n)
    options = {} if path is not BRIDGE else {"path": path}
    loss = stochastic_interpolant(around(exact(oracle, path)), **options).loss
    each = lambda p, b, key: loss(p, None, jax.tree.map(lambda a: a[None], b), key[None])[0]
    gradient = jax.jit(jax.vmap(jax.grad(each), (None, 0, 0)))
    z = lambda p: (lambda g: g.mean(0) / (g.std(0) / n**0.5))(
        np.asarray(gradient(p, Batch(x1, x0), as_keys(jax.random.key(3), n)), np.float64)
    )
    assert np.abs(z(jnp.zeros((2, k)))).max() < 4.5
    for head in (0, 1):
        off = z(jnp.zeros((2, k)).at[head, 1].set(0.2))
        assert off[head, 1] > 4.5  # descent returns
        assert np.abs(off[1 - head]).max() < 4.5  # and the other head does not notice


def test_views_are_velocity_and_score_and_the_score_is_finite_at_the_ends(x64, key):
    oracle = oracles.coupled(*PAIRS, path=BRIDGE)
    method = stochastic_interpolant(exact(oracle, BRIDGE), path=BRIDGE)
    x, t = jax.random.normal(key, (6, 2)), jnp.linspace(0, 1, 6)
    np.testing.assert_allclose(method.velocity(None)(x, t), oracle.velocity(x, t), rtol=1e-12)
    inside = jnp.clip(t, 1e-3, 1 - 1e-3)
    np.testing.assert_allclose(method.score(None)(x, t), oracle.score(x, inside), rtol=1e-9)
    np.testing.assert_allclose(method.score(None)(x, 0.5), oracle.score(x, 0.5), rtol=1e-9)


def test_the_sde_of_both_views_carries_the_pairs_law_and_its_coupling(key):
    """[SF]2M: pairs of the entropic plan, strength sigma; means and all covariances within standard errors."""
    n, a, b = 20_000, 1.0, 0.49
    across = (np.sqrt(4 * a * b + SIGMA**4) - SIGMA**2) / 2
    oracle = oracles.coupled(jnp.zeros(1), jnp.full(1, 0.7), jnp.array([[a, across], [across, b]]), path=BRIDGE)
    method = stochastic_interpolant(exact(oracle, BRIDGE), path=BRIDGE)
    step = sampling.stochastic_heun(method.velocity(None), score=method.score(None), strength=SIGMA)
    x0, _ = oracle.sample(key, n)
    x1 = jax.jit(lambda x, key: sampling.sample(step, x, grids.uniform_grid(50), key=key))(x0, jax.random.key(1))
    x0, x1 = np.asarray(x0[:, 0], np.float64), np.asarray(x1[:, 0], np.float64)
    for values, expected in ((x1, 0.7), ((x1 - 0.7) ** 2, b), (x0 * (x1 - 0.7), across)):
        assert abs(values.mean() - expected) < 4 * values.std() / n**0.5


def test_antithetic_latents_keep_the_gradient_and_tame_its_variance(x64):
    n = 20_000
    oracle = oracles.coupled(*PAIRS, path=BRIDGE)
    x0, x1 = oracle.sample(jax.random.key(2), n)
    at = lambda key: jnp.full(key.shape, 1e-3)
    params = 0.3 * jnp.ones((2, 5))

    def gradients(antithetic):
        loss = stochastic_interpolant(around(exact(oracle, BRIDGE)), path=BRIDGE, time=at, antithetic=antithetic).loss
        each = lambda p, b, key: loss(p, None, jax.tree.map(lambda a: a[None], b), key[None])[0]
        return np.asarray(
            jax.jit(jax.vmap(jax.grad(each), (None, 0, 0)))(params, Batch(x1, x0), as_keys(jax.random.key(3), n))
        )

    plain, tame = gradients(False), gradients(True)
    error = np.hypot(plain.std(0), tame.std(0)) / n**0.5
    assert (np.abs(plain.mean(0) - tame.mean(0)) < 4.5 * error).all()
    assert (tame[:, 0].var(0) < plain[:, 0].var(0) / 10).all()  # gamma'^2 is 160 here, the rest of the target about 2


def test_without_a_source_one_is_drawn_and_no_key_is_used_twice(key):
    batch, keys = Batch(jnp.zeros((4000, 1))), as_keys(key, 4000)
    at = lambda key: jnp.full(key.shape, 0.5)
    seen = []

    def spy(params, x, s, t, cond=None, key=None):
        seen.append(x)
        return jnp.concatenate([x, x], -1) + (0 if key is None else jax.vmap(lambda k: jax.random.normal(k, (2,)))(key))

    with jax.debug_key_reuse(True):
        stochastic_interpolant(spy, time=at, antithetic=True).loss(None, None, batch, jax.random.clone(keys))
    first, second = (np.asarray(x, np.float64)[:, 0] for x in seen)
    np.testing.assert_allclose(first.var(), 0.5, atol=4.5 * 0.5 * np.sqrt(2 / 4000))  # alpha^2 + gamma^2
    np.testing.assert_allclose((first * second).mean(), 0, atol=4.5 * 0.5 / np.sqrt(4000))  # alpha^2 - gamma^2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": paths.linear()}, "path.*latent.*two_sided"),
        ({"weight": 0.0}, "weight=0.0.*flow_matching"),
        ({"time": times.uniform}, "time=times.uniform.*times.interior"),
    ],
)
def test_what_cannot_be_learned_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stochastic_interpolant(line, **options)


def test_a_net_of_one_head_is_refused(key):
    one_head = lambda params, x, s, t, cond=None, key=None: x
    with pytest.raises(ValueError, match=r"stochastic_interpolant.*\(3, 2\) into \(3, 2\).*outputs=2"):
        stochastic_interpolant(one_head).loss(None, None, Batch(jnp.ones((3, 2))), as_keys(key, 3))


def test_the_denoisers_loss_is_torchcfms_weighted_score_loss():
    """With the same noise and ``s = sigma^2 S / 2``: ``|lambda s + z|^2`` to their 1e-8."""
    peer = pytest.importorskip("torchcfm.conditional_flow_matching", reason="compares with torchcfm (the torch extra)")
    import torch

    params, batch, keys = setting(64)
    x, t, z, _ = drawn(functools.partial(stochastic_interpolant, path=BRIDGE), batch, keys, BRIDGE)
    gamma, _ = paths.latent(BRIDGE, x, t)
    n = jnp.split(line(params, x, t, t), 2, -1)[1]
    theirs = peer.SchrodingerBridgeConditionalFlowMatcher(sigma=SIGMA).compute_lambda(torch.tensor(np.asarray(t)))
    s = SIGMA**2 / 2 * -n / gamma
    expected = np.mean((theirs.numpy()[:, None] * np.asarray(s) + np.asarray(z)) ** 2, 1)
    aux = stochastic_interpolant(line, path=BRIDGE).loss(params, None, batch, keys)[1]
    np.testing.assert_allclose(aux["denoiser"], expected, rtol=1e-3, atol=1e-5)
