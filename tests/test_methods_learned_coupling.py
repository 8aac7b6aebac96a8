"""The learned coupling against flow matching, quadrature, and the closed objective of linear encoders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmjax import oracles
from fmjax.experiments import build
from fmjax.keys import as_keys, example_keys, normal, split
from fmjax.methods.flow_matching import flow_matching
from fmjax.methods.learned_coupling import learned_coupling
from fmjax.nets import adapters
from fmjax.nets.mlp import MLP
from fmjax.straightening import segments
from fmjax.types import Batch, Network, expand

MEAN, STD = np.array([0.75, -0.5], np.float32), np.array([0.2, 1.5], np.float32)
LAW = oracles.gaussian(jnp.asarray(MEAN), jnp.asarray(STD))


def joined(velocity, encode):
    """A net ``velocity(params, x, t)`` with an encoder ``encode(params, x) -> (mean, log variance)``."""

    def net(params, x, s, t, cond=None, key=None):
        return velocity(params, x, s)

    return Network(net, encoder=lambda params, x, s, t, cond, key: jnp.concatenate(encode(params, x), -1))


def test_an_encoder_at_zero_gives_flow_matching_with_independent_noise(key):
    model = adapters.with_encoder(*(adapters.from_linen(MLP(8, 1, outputs=n)) for n in (1, 2)))
    x1 = LAW.sample(key, 64)
    params = jax.tree.map(lambda p: p + 0.1, model.init(key, x1)) | {"encoder": model.init(key, x1)["encoder"]}
    keys = as_keys(key, 64)
    _, k_source, k_flow = split(keys, 3)
    _, ours = learned_coupling(model.net, weight=1e6).loss(params, None, Batch(x1), keys)
    flow = flow_matching(model.net)
    _, theirs = flow.loss(params, None, Batch(x1, normal(k_source, (2,))), k_flow)
    np.testing.assert_array_equal(ours["kl"], 0)
    for name in ("per_example", "t"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
    np.testing.assert_array_equal(learned_coupling(model.net).velocity(params)(x1, 0.3), flow.velocity(params)(x1, 0.3))


def test_the_divergence_is_the_integral_of_the_log_ratio_of_densities(x64, key):
    """``log q - log p`` is a quadratic in ``x0``, which three points of Gauss and Hermite integrate exactly."""
    b, shape = 5, (3, 2)
    mean, log_variance = 2 * jax.random.normal(key, (b, *shape)), jnp.linspace(-3, 2, b * 6).reshape(b, *shape)
    net = joined(lambda params, x, t: jnp.zeros_like(x), lambda params, x: (mean, log_variance))
    _, aux = learned_coupling(net, weight=0.7).loss(None, None, Batch(jnp.zeros((b, *shape))), as_keys(key, b))
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    std, expected = jnp.exp(log_variance / 2), 0
    for z, w in zip(nodes, weights / weights.sum(), strict=True):
        x0 = mean + std * z
        ratio = jax.scipy.stats.norm.logpdf(x0, mean, std) - jax.scipy.stats.norm.logpdf(x0)
        expected += w * ratio.sum((1, 2)) / 6
    np.testing.assert_allclose(aux["kl"], expected, rtol=1e-10)
    np.testing.assert_allclose(aux["per_example"], aux["residual"] + 0.7 * aux["kl"], rtol=1e-12)


def variance(c, log, t):
    """Of ``I_t`` for ``x0 = c (x1 - m) + e^{l/2} z``, a coordinate each."""
    return (1 - t) ** 2 * (c**2 * STD**2 + jnp.exp(log)) + t**2 * STD**2 + 2 * t * (1 - t) * c * STD**2


def optimal(c, log):
    """The velocity that such an encoder makes the best: ``E[x1 - x0 | I_t = x]``."""

    def velocity(params, x, t):
        t = expand(t, x)
        cov = -(1 - t) * (c**2 * STD**2 + jnp.exp(log)) + t * STD**2 + (1 - 2 * t) * c * STD**2
        m = MEAN
        return m + cov / variance(c, log, t) * (x - t * m)

    return velocity


def test_the_gradient_reaches_the_encoder_through_the_noise_it_draws(x64, key):
    """At the best velocity the gradient of ``int e^l S^2 / var(t) dt + weight KL``.

    (``det`` of ``I_t, x1 - x0`` over ``x0, x1`` is one, so the variance of one given the other is ``e^l S^2 / var``.)
    """
    weight, at, n = 0.3, (jnp.array([0.4, 0.2]), jnp.array([-0.5, -1.0])), 40_000

    def objective(c, log):
        nodes, weights = np.polynomial.legendre.leggauss(40)
        unknown = sum(
            w / 2 * jnp.exp(log) * STD**2 / variance(c, log, (1 + u) / 2) for u, w in zip(nodes, weights, strict=True)
        )
        return jnp.mean(unknown + weight * (c**2 * STD**2 + jnp.exp(log) - 1 - log) / 2)

    encode = lambda params, x: (params[0] * (x - MEAN), jnp.broadcast_to(params[1], x.shape))
    loss, x1 = (
        learned_coupling(joined(optimal(*at), encode), weight=weight).loss,
        LAW.sample(key, n).astype(jnp.float64),
    )
    keys = as_keys(jax.random.key(1), n)
    example = lambda x, k: jax.value_and_grad(loss, has_aux=True)(at, None, Batch(x[None]), k[None])
    (value, _), grads = jax.jit(jax.vmap(example))(x1, keys)
    for actual, expected in ((value, objective(*at)), *zip(grads, jax.grad(objective, (0, 1))(*at), strict=True)):
        z = (actual.mean(0) - expected) / (actual.std(0) / np.sqrt(n))
        assert np.abs(z).max() < 4.5, z
        assert (np.abs(expected) > 20 * actual.std(0) / np.sqrt(n)).all()


@functools.cache
def straightness_after(name, steps=400):
    """Of the flow that a small network learns in a budget of steps, from noise."""
    net = MLP(32, 1)
    model = adapters.from_linen(net)
    if name == "learned":
        model = adapters.with_encoder(model, adapters.from_linen(MLP(32, 1, outputs=2)))
    method = learned_coupling(model.net, weight=0.05) if name == "learned" else flow_matching(model.net)
    key, tx = jax.random.key(0), optax.adam(3e-3)
    params = model.init(key, jnp.zeros((1, 2)))

    @jax.jit
    def train(params):
        def step(state, n):
            params, opt = state
            k = jax.random.fold_in(key, n)
            batch = Batch(LAW.sample(k, 128))
            grads, aux = jax.grad(method.loss, has_aux=True)(
                params, params, batch, example_keys(jax.random.fold_in(k, 1), jnp.arange(128))
            )
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(params, updates), opt), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        return params

    x0 = jax.random.normal(jax.random.key(9), (2000, 2))
    return float(segments.segment_straightness(method.velocity(train(params)), x0, 0.0, 1.0))


def test_training_makes_the_flow_straighter_than_flow_matching_does():
    ours, theirs = straightness_after("learned"), straightness_after("flow matching")
    exact = float(
        segments.segment_straightness(LAW.velocity, jax.random.normal(jax.random.key(9), (2000, 2)), 0.0, 1.0)
    )
    assert 0.7 < theirs / exact < 1.3 and ours < theirs / 3, (ours, theirs, exact)


def test_what_cannot_work_is_refused(key):
    plain = adapters.from_linen(MLP(8, 1))
    with pytest.raises(ValueError, match="net: has no encoder"):
        learned_coupling(plain.net)
    net = adapters.with_encoder(plain, plain).net
    for weight in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match=f"weight={weight}"):
            learned_coupling(net, weight=weight)
    x = jnp.zeros((4, 2))
    params = adapters.with_encoder(plain, plain).init(key, x)
    with pytest.raises(ValueError, match="encoder.*outputs=2"):
        learned_coupling(net).loss(params, None, Batch(x), as_keys(key, 4))
    with pytest.raises(ValueError, match="batch.x0"):
        learned_coupling(net).loss(params, None, Batch(x, x), as_keys(key, 4))


def test_a_config_has_the_encoder_as_an_option_of_the_net(key):
    spec, x = {"name": "mlp", "width": 8, "depth": 1}, jax.random.normal(key, (4, 3))
    model = build.net({**spec, "noise_encoder": {"name": "mlp", "width": 4, "depth": 1}})
    params = model.init(key, x)
    assert params["encoder"]["output"]["kernel"].shape == (4, 6) and params["output"]["kernel"].shape == (8, 3)
    method = build.method({"name": "learned_coupling", "weight": 2}, model.net)
    grads = jax.grad(lambda p: method.loss(p, None, Batch(x), as_keys(key, 4))[0])(params)
    assert np.abs(grads["encoder"]["output"]["kernel"]).max() > 0
    plain = build.net(spec).net
    params = jax.tree.map(lambda p: p + 0.1, params)
    without = {name: p for name, p in params.items() if name != "encoder"}
    for own in (params, without):  # the flow is the plain net's, and its checkpoint passes
        np.testing.assert_array_equal(model.net(own, x, 0.2, 0.7), plain(without, x, 0.2, 0.7))
    np.testing.assert_array_equal(model.net.for_jvp(params, x, 0.2, 0.7), plain(without, x, 0.2, 0.7))
    with pytest.raises(ValueError, match="net.noise_encoder='encoder'"):
        build.net({**spec, "noise_encoder": "encoder"})
    with pytest.raises(ValueError, match="net.noise_encoder=.mpl."):
        build.net({**spec, "noise_encoder": "mpl"})
    with pytest.raises(ValueError, match="net.noise_encoder.outputs=2"):
        build.net({**spec, "noise_encoder": {"name": "mlp", "outputs": 2}})
