"""Weights of a loss against their gradients in closed form and the optimum of the learned one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmjax import oracles
from fmjax.keys import as_keys
from fmjax.methods import weighting
from fmjax.methods.flow_matching import flow_matching
from fmjax.nets.adapters import Model
from fmjax.types import Batch, Method, expand

D = 3


def line(params, x, s, t, cond=None, key=None):
    return params["a"] * x + expand(params["b"] * t, x)


PARAMS = {"a": np.array([0.3, -1.2, 0.8]), "b": np.array(0.7)}


def setting(n=16):
    return Batch(jax.random.normal(jax.random.key(0), (n, D))), as_keys(jax.random.key(1), n)


def each(method, params=PARAMS):
    """Per-example losses, their gradients, and ``aux``, one example at a time."""
    batch, keys = setting()
    example_loss = lambda params, batch, key: method.loss(
        params, None, jax.tree.map(lambda a: a[None], batch), key[None]
    )
    aux = method.loss(params, None, batch, keys)[1]
    value, grads = jax.jit(jax.vmap(jax.value_and_grad(lambda *a: example_loss(*a)[0]), (None, 0, 0)))(
        params, batch, keys
    )
    return value, grads, aux


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_an_adaptive_gradient_is_the_plain_one_times_its_weight(power, x64):
    method = flow_matching(line)
    r, plain, _ = each(method)
    value, grads, aux = each(weighting.adaptive(method, power=power, floor=0.05))
    weight = D * (D * r + 0.05) ** -power
    jax.tree.map(lambda g, p: np.testing.assert_allclose(g, expand(weight, p) * p, rtol=1e-12), grads, plain)
    np.testing.assert_allclose(value, weight * r, rtol=1e-12)
    np.testing.assert_allclose(aux["per_example"], weight * r, rtol=1e-12)
    np.testing.assert_allclose(aux["residual"], r, rtol=1e-12)


def test_with_power_one_it_is_the_gradient_of_the_logarithm(x64):
    _, grads, _ = each(weighting.adaptive(flow_matching(line)))
    logarithm = lambda p: jnp.log(D * flow_matching(line).loss(p, None, *setting())[1]["per_example"] + 1e-2)
    expected = jax.jacobian(logarithm)(PARAMS)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10), grads, expected)


def test_a_residual_of_the_method_itself_is_kept_and_the_value_is_the_mean():
    own = Method(
        lambda *a: (0.0, {"per_example": jnp.arange(1.0, 17), "residual": jnp.full(16, 7.0), "t": jnp.ones(16)})
    )
    params = PARAMS | {"log_variance": weighting.init_log_variance()}
    for wrapped in (weighting.adaptive(own), weighting.learned(own)):
        value, aux = wrapped.loss(params, None, *setting())
        assert (aux["residual"] == 7).all()
        np.testing.assert_allclose(value, aux["per_example"].mean(), rtol=1e-6)


def known(r):
    """A method whose mean square at times ``(s, t)``, uniform, is ``r(s, t)``, and its times."""

    def loss(params, target, batch, key):
        s, t = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(key).T
        return None, {"per_example": r(s, t), "s": s, "t": t}

    return Method(loss)


def test_the_learned_weight_is_stationary_at_the_log_of_the_error_only(x64):
    """``w = log d r`` for ``r = exp(1 + .7 cos(2 pi s) - .4 cos(3 pi t))``; a step away, descent points back."""
    r = lambda s, t: jnp.exp(1 + 0.7 * jnp.cos(2 * jnp.pi * s) - 0.4 * jnp.cos(3 * jnp.pi * t))
    best = weighting.init_log_variance()
    best["bias"] = best["bias"] + 1 + np.log(D)
    best |= {"s": best["s"].at[1].set(0.7), "t": best["t"].at[2].set(-0.4)}
    loss = lambda w: weighting.learned(known(r)).loss({"log_variance": w}, None, *setting(4000))
    gradient, aux = jax.grad(loss, has_aux=True)(best)
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradient)) < 1e-12
    np.testing.assert_allclose(aux["log_variance"], np.log(D * r(aux["s"], aux["t"])), rtol=1e-12)
    np.testing.assert_allclose(aux["per_example"], 1 + aux["log_variance"], rtol=1e-12)
    away, _ = jax.grad(loss, has_aux=True)(best | {"bias": best["bias"] + 0.3})
    np.testing.assert_allclose(away["bias"], 1 - np.exp(-0.3), rtol=1e-12)


def test_training_finds_the_logarithm_of_the_error():
    """Of noise, ``E r = exp(1 + .7 cos(2 pi t))``: by Adam, within the standard error of what it saw."""

    def loss(params, target, batch, key):
        t, z = (
            jax.vmap(jax.random.uniform)(key),
            jax.vmap(lambda k: jax.random.exponential(jax.random.split(k)[0]))(key),
        )
        return None, {"per_example": z * jnp.exp(1 + 0.7 * jnp.cos(2 * jnp.pi * t)), "t": t}

    method, n, steps = weighting.learned(Method(loss)), 1000, 400
    tx = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    batch, params = Batch(jnp.zeros((n, D))), {"log_variance": weighting.init_log_variance()}

    def step(carry, i):
        params, state = carry
        keys = as_keys(jax.random.fold_in(jax.random.key(0), i), n)
        gradient = jax.grad(lambda p: method.loss(p, None, batch, keys)[0])(params)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))((params, tx.init(params)))
    t = jnp.linspace(0, 1, 50)
    actual = weighting.log_variance(params["log_variance"], t, t)
    expected = 1 + 0.7 * jnp.cos(2 * jnp.pi * t) + np.log(D)
    # 65 coefficients from some 100 steps' 1e5 examples of relative standard deviation 1, amplified at the ends by 2
    assert np.abs(actual - expected).max() < 4.5 * 2 * (65 / 1e5) ** 0.5


def test_a_learned_weight_leaves_the_minimiser_where_it_is(x64):
    """The gradient of a closed-form flow's perturbation is zero in the mean, whatever ``w``."""
    oracle = oracles.gaussian(jnp.array([0.75]), jnp.array([0.5]))
    features = lambda x, t: jnp.stack([jnp.ones_like(x), x, jnp.sin(2 * x), expand(t, x)])
    net = lambda p, x, s, t, cond=None, key=None: oracle.velocity(x, t) + jnp.tensordot(p["net"], features(x, t), 1)
    weight = jax.tree.map(lambda a: a + 0.1, weighting.init_log_variance())
    loss = weighting.learned(flow_matching(net)).loss
    example_loss = lambda p, x, key: loss({"net": p, "log_variance": weight}, None, Batch(x[None]), key[None])[0]
    n = 20_000
    x, keys = oracle.sample(jax.random.key(3), n), as_keys(jax.random.key(4), n)
    z = lambda p: (
        (g := np.asarray(jax.jit(jax.vmap(jax.grad(example_loss), (None, 0, 0)))(p, x, keys))).mean(0)
        / (g.std(0) / n**0.5)
    )
    assert np.abs(z(jnp.zeros(4))).max() < 4.5
    assert (z(0.2 * jnp.ones(4)) > 4.5).any()


def test_a_model_gets_the_parameters_of_the_weight_at_init(key):
    def strict(params, *args):
        assert set(params) == {"a", "b"}
        return line(params, *args)

    plain = Model(lambda key, x, cond=None: {"a": jax.random.normal(key, (D,)), "b": jnp.ones(())}, strict)
    model, x, t = weighting.with_log_variance(plain), jnp.ones((2, D)), jnp.ones(2)
    params = model.init(key, x)
    bare = plain.init(key, x)
    assert set(params) == {*bare, "log_variance"}
    assert not any(np.any(a) for a in jax.tree.leaves(params["log_variance"]))
    moved = jax.tree.map(lambda a: a + 0.1, bare)
    expected = plain.net(moved, x, t, t)
    for stored in (moved, moved | {"log_variance": params["log_variance"]}):
        np.testing.assert_array_equal(model.net(stored, x, t, t), expected)
    gradient = jax.grad(lambda p: weighting.learned(flow_matching(model.net)).loss(p, None, *setting())[0])(params)
    assert all(np.any(g) for g in jax.tree.leaves(gradient["log_variance"]))


def test_bad_weights_are_refused():
    for name, value in (("power", -0.5), ("power", float("nan")), ("floor", 0.0), ("floor", float("inf"))):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            weighting.adaptive(flow_matching(line), **{name: value})
    loss = functools.partial(weighting.learned(flow_matching(line)).loss, PARAMS, None)
    with pytest.raises(ValueError, match=r"params\['log_variance'\].*with_log_variance"):
        loss(*setting())
    timeless = weighting.learned(Method(lambda *a: (0.0, {"per_example": jnp.ones(16)})))
    with pytest.raises(ValueError, match=r"aux\['t'\]"):
        timeless.loss({"log_variance": weighting.init_log_variance()}, None, *setting())
