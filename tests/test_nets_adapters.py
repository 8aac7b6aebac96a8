"""Networks of other kinds as ``Net``: the same function, the same gradients, scalar times."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from fmjax.keys import as_keys
from fmjax.nets import adapters
from fmjax.types import Net


class Affine(nn.Module):
    """``W [x, s, t] + cond``, negated in training, with noise from the dropout stream."""

    @nn.compact
    def __call__(self, x, s, t, cond=None, *, train=False):
        y = nn.Dense(x.shape[1], name="w")(jnp.concatenate([x, s[:, None], t[:, None]], 1))
        y = y if cond is None else y + cond
        return -y + jax.random.normal(self.make_rng("dropout"), y.shape) if train else y


class AffineNNX(nnx.Module):
    def __init__(self, d, rngs):
        self.w = nnx.Linear(d + 2, d, rngs=rngs)
        self.shift = nnx.Variable(jnp.full((d,), 0.25))  # not a parameter: it is carried, not trained

    def __call__(self, x, s, t, cond=None):
        y = self.w(jnp.concatenate([x, s[:, None], t[:, None]], 1)) + self.shift[...]
        return y if cond is None else y + cond


def formula(kernel, bias, x, s, t):
    one = np.ones(len(x))
    return np.concatenate([x, (s * one)[:, None], (t * one)[:, None]], 1) @ kernel + bias


def test_a_linen_module_is_its_function_with_training_on_when_a_key_is_given(key):
    model = adapters.from_linen(Affine())
    x = jax.random.normal(key, (4, 3))
    params = model.init(key, x)
    assert isinstance(model.net, Net)
    s, t = jnp.linspace(0, 0.5, 4), jnp.linspace(0.5, 1, 4)
    p = jax.tree.map(np.asarray, params["w"])
    want = formula(p["kernel"], p["bias"], np.asarray(x), np.asarray(s), np.asarray(t))
    np.testing.assert_allclose(model.net(params, x, s, t), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.net(params, x, s, t, 2.0), want + 2, rtol=1e-5, atol=1e-6)
    half = formula(p["kernel"], p["bias"], np.asarray(x), 0.5, 0.75)
    np.testing.assert_allclose(model.net(params, x, 0.5, 0.75), half, rtol=1e-5, atol=1e-6)
    keys = as_keys(jax.random.key(1), 4)
    noise = model.net(params, x, s, t, None, keys) + want
    assert np.abs(noise).min() > 0 and np.abs(noise - (model.net(params, x, s, t, 1.0, keys) + want + 1)).max() < 1e-5
    assert np.abs(noise - (model.net(params, x, s, t, None, as_keys(jax.random.key(2), 4)) + want)).min() > 0


def test_an_nnx_model_is_the_same_function_of_its_parameters(key):
    model = AffineNNX(3, nnx.Rngs(0))
    params, net = adapters.from_nnx(model)
    assert isinstance(net, Net) and sum(a.size for a in jax.tree.leaves(params)) == 5 * 3 + 3
    x, s, t = jax.random.normal(key, (4, 3)), jnp.linspace(0, 0.5, 4), jnp.linspace(0.5, 1, 4)
    linen = {"w": {"kernel": model.w.kernel[...], "bias": model.w.bias[...]}}
    twin = adapters.from_linen(Affine()).net
    np.testing.assert_allclose(jax.jit(net)(params, x, s, t), twin(linen, x, s, t) + 0.25, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        net(params, x, 0.2, 0.3, 2.0), twin(linen, x, 0.2, 0.3, 2.0) + 0.25, rtol=1e-5, atol=1e-6
    )
    loss = lambda f, p: jnp.sum((f(p, x, s, t) + (0.25 if f is twin else 0)) ** 2)
    got, want = jax.grad(lambda p: loss(net, p))(params), jax.grad(lambda p: loss(twin, p))(linen)
    np.testing.assert_allclose(got["w"]["kernel"][...], want["w"]["kernel"], rtol=1e-4, atol=1e-4)
    moved = jax.tree.map(lambda a: 2 * a, params)  # the parameters given are the ones used, not the model's own
    twice = jax.tree.map(lambda a: 2 * a, linen)
    np.testing.assert_allclose(net(moved, x, s, t), twin(twice, x, s, t) + 0.25, rtol=1e-5, atol=1e-6)


def test_a_textbook_velocity_takes_the_start_of_the_jump(key):
    """So ``X_{s,t}`` is an Euler step from ``s``, and the diagonal is the velocity."""
    net = adapters.one_time(lambda params, x, t: params * x + t[:, None])
    x, s = jax.random.normal(key, (3, 2)), jnp.array([0.1, 0.2, 0.3])
    want = 2 * x + s[:, None]
    assert isinstance(net, Net)
    for t in (s, jnp.ones(3), 0.7):
        np.testing.assert_array_equal(net(2.0, x, s, t), want)
    np.testing.assert_array_equal(net(2.0, x, 0.5, 1.0, "ignored", "ignored"), 2 * x + 0.5)
