"""Modules of other libraries as networks: the same function, the same gradients, scalar times, refusals."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from fmjax import nets
from fmjax.keys import as_keys
from fmjax.nets import adapters
from fmjax.types import Net, Network, network

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)
S, T = jnp.linspace(0, 0.5, 4), jnp.linspace(0.5, 1, 4)
KERNEL, BIAS = RNG.standard_normal((5, 3)).astype("f"), RNG.standard_normal(3).astype("f")
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


class Affine(nn.Module):
    """``W [x, s, t] + cond``, negated in training, with noise from the dropout stream."""

    @nn.compact
    def __call__(self, x, s, t, cond=None, *, train=False):
        y = nn.Dense(x.shape[1], name="w")(jnp.concatenate([x, s[:, None], t[:, None]], 1))
        y = y if cond is None else y + cond
        return -y + jax.random.normal(self.make_rng("dropout"), y.shape) if train else y


class AffineNNX(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.w = nnx.Linear(5, 3, rngs=rngs)
        self.w.kernel[...], self.w.bias[...] = KERNEL, BIAS
        self.shift = nnx.Variable(jnp.full((3,), 0.25))  # not a parameter: a constant
        self.drop, self.again = nnx.Dropout(rate, rngs=rngs), nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, s, t, cond=None):
        y = self.w(jnp.concatenate([x, s[:, None], t[:, None]], 1)) + self.shift[...]
        y = y if cond is None else y + cond
        return y + (self.drop(jnp.ones_like(y)) - 1) + 100 * (self.again(jnp.ones_like(y)) - 1)


class AffineEquinox(eqx.Module):
    """One example: no batch axis."""

    w: eqx.nn.Linear
    drop: eqx.nn.Dropout

    def __init__(self, rate=0.0):
        linear = eqx.nn.Linear(5, 3, key=jax.random.key(0))
        self.w = eqx.tree_at(lambda w: (w.weight, w.bias), linear, (jnp.asarray(KERNEL.T), jnp.asarray(BIAS)))
        self.drop = eqx.nn.Dropout(rate)

    def __call__(self, x, s, t, cond=None, *, key=None):
        y = self.w(jnp.concatenate([x, s[None], t[None]]))
        y = y if cond is None else y + cond
        return y + self.drop(jnp.ones_like(y), key=key) - 1


def formula(x, s, t, kernel=KERNEL, bias=BIAS):
    columns = [np.full((len(x), 1), a) if np.ndim(a) == 0 else np.asarray(a)[:, None] for a in (s, t)]
    return np.concatenate([x, *columns], 1) @ kernel + bias


def test_a_linen_module_is_its_function_and_trains_when_it_gets_a_key(key):
    model = nets.from_linen(Affine())
    params = {"w": {"kernel": KERNEL, "bias": BIAS}}
    assert jax.tree.map(np.shape, model.init(key, X)) == jax.tree.map(np.shape, params)
    net = jax.jit(model.net)
    assert isinstance(model.net, Net) and isinstance(model.net, Network)
    plain = formula(X, S, T)
    close(net(params, X, S, T), plain)
    close(net(params, X, S, T, 2.0), plain + 2)
    close(net(params, X, 0.5, 0.75), formula(X, 0.5, 0.75))
    keys = as_keys(jax.random.key(1), 4)
    noise = net(params, X, S, T, None, keys) + plain
    assert np.abs(noise).min() > 0
    close(net(params, X, S, T, 1.0, keys), noise - plain - 1)
    np.testing.assert_array_equal(net(params, X, S, T, None, jax.random.key(1)), net(params, X, S, T, None, keys))
    assert np.abs(noise - plain - net(params, X, S, T, None, as_keys(jax.random.key(2), 4))).min() > 0


ADAPTED = {
    "nnx": (lambda rate=0.0: nets.from_nnx(AffineNNX(nnx.Rngs(0), rate)), lambda p: (p["w"]["kernel"][...], 0.25)),
    "equinox": (lambda rate=0.0: nets.from_equinox(AffineEquinox(rate)), lambda p: (p["w"]["weight"].T, 0.0)),
}


@pytest.mark.parametrize("library", ADAPTED)
def test_an_initialised_module_is_the_same_function_of_its_parameters(library, key):
    make, read = ADAPTED[library]
    model = make()
    params = model.init(key, X)
    _, shift = read(params)
    assert isinstance(model.net, Network) and sum(a.size for a in jax.tree.leaves(params)) == 5 * 3 + 3
    net = jax.jit(model.net)
    close(net(params, X, S, T), formula(X, S, T) + shift)
    close(net(params, X, 0.2, 0.3, np.full(4, 2.0, "f")[:, None]), formula(X, 0.2, 0.3) + shift + 2)
    moved = jax.tree.map(lambda a: 2 * a, params)  # the parameters given are used, not the module's
    close(net(moved, X, S, T), formula(X, S, T, 2 * KERNEL, 2 * BIAS) + shift)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(model.net(p, X, S, T) ** 2)))(params)
    inputs = np.concatenate([X, S[:, None], T[:, None]], 1)
    np.testing.assert_allclose(read(grads)[0], 2 * inputs.T @ (formula(X, S, T) + shift), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("library", ADAPTED)
def test_dropout_of_an_adapted_module_is_on_exactly_with_a_key(library, key):
    """Under jit and grad; every dropout layer, and for Equinox every example, has its own mask."""
    make, read = ADAPTED[library]
    model = make(rate=0.5)
    params = model.init(key, X)
    net, keys = jax.jit(model.net), as_keys(key, 4)
    plain = formula(X, S, T) + read(params)[1]
    close(net(params, X, S, T), plain)
    masks = net(params, X, S, T, None, keys) - plain
    np.testing.assert_array_equal(net(params, X, S, T, None, keys) - plain, masks)
    np.testing.assert_array_equal(net(params, X, S, T, None, key) - plain, masks)
    close(model.net(params, X, S, T, None, keys) - plain, masks)
    assert np.abs(net(params, X, S, T, None, as_keys(jax.random.key(9), 4)) - plain - masks).max() > 0.5
    if library == "nnx":  # a mask is -1 or 1; two layers give four values
        assert {*np.rint(np.ravel(masks)).astype(int)} > {-99, 99} and np.abs(np.rint(masks) - masks).max() < 1e-4
    else:
        assert {*np.rint(np.ravel(masks)).astype(int)} == {-1, 1} and not (masks == masks[:1]).all()
        halves = net(params, X[2:], S[2:], T[2:], None, keys[2:]) - plain[2:]
        close(halves, masks[2:])
    chex.assert_tree_all_finite(jax.jit(jax.grad(lambda p: jnp.sum(model.net(p, X, S, T, None, keys))))(params))


class NormedEquinox(AffineEquinox):
    norm: eqx.nn.BatchNorm

    def __init__(self):
        super().__init__()
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nets.from_linen(nn.Dense(3)), r"module=Dense\(inputs.*: from_linen calls .* takes \(x, s, t, cond"),
        (lambda: nets.from_nnx(nnx.Linear(3, 3, rngs=nnx.Rngs(0))), r"module=Linear\(inputs.*: from_nnx calls"),
        (lambda: nets.from_equinox(eqx.nn.Linear(3, 3, key=jax.random.key(0))), r"module=Linear\(.*: from_equinox"),
        (lambda: nets.from_equinox(NormedEquinox()), "module=NormedEquinox: it has state.*batch_state"),
    ],
)
def test_modules_that_cannot_work_are_refused_in_one_sentence(make, match):
    with pytest.raises(ValueError, match=match) as error:
        make()
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


def test_a_textbook_velocity_takes_the_start_of_the_jump():
    """So ``X_{s,t}`` is an Euler step from ``s``, and the diagonal is the velocity."""
    net = nets.one_time(lambda params, x, t: params * x + t[:, None])
    want = 2 * X + S[:, None]
    for t in (S, jnp.ones(4), 0.7):
        np.testing.assert_array_equal(net(2.0, X, S, t), want)
    np.testing.assert_array_equal(net(2.0, X, 0.5, 1.0, "ignored", "ignored"), 2 * X + 0.5)


def test_a_trigonometric_network_turns_and_its_fields_stay():
    inner = Network(lambda params, x, s, t, cond=None, key=None: params * x, logit=True).replace(
        for_jvp=lambda params, x, s, t, cond=None, key=None: 3 * params * x
    )
    net = nets.trigonometric_velocity(inner, sigma=0.5)
    a = np.pi / 2 * (T - S)[:, None]
    turned = lambda f: np.cos(a) * X - np.sin(a) * f * X
    close(X + (T - S)[:, None] * net(0.4, X, S, T), turned(0.4))
    close(X + (T - S)[:, None] * net.for_jvp(0.4, X, S, T), turned(1.2))
    close(net(0.4, X, S, S), -np.pi / 2 * 0.4 * X)
    assert net.logit
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"sigma={sigma}"):
            nets.trigonometric_velocity(inner, sigma=sigma)


# --- Network


def linear(params, x, s, t, cond=None, key=None):
    return params * x


STATED = Network(linear, for_jvp=lambda *args: 2 * linear(*args), logit=True, encoder=lambda *args: 3 * linear(*args))


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, functools.partial, lambda f: jax.jit(functools.partial(f))])
def test_fields_of_a_network_are_read_through_jit_and_partial(outer):
    net = network(outer(STATED))
    assert net.logit
    for f, factor in ((net, 1), (net.for_jvp, 2), (net.encoder, 3), (outer(STATED), 1)):
        np.testing.assert_array_equal(f(2.0, X, 0.0, 0.0), 2 * factor * X)


def test_a_partial_binds_its_arguments_in_both_forms():
    net = network(functools.partial(STATED, 2.0))
    np.testing.assert_array_equal(net.apply(X, 0.0, 0.0), 2 * X)
    np.testing.assert_array_equal(net.for_jvp(X, 0.0, 0.0), 4 * X)


def test_an_unknown_wrapper_keeps_all_but_the_form_for_a_jvp():
    """``functools.wraps`` may surround another function: the inner ``for_jvp`` would be another network."""

    @functools.wraps(STATED)
    def negated(*args):
        return -STATED(*args)

    net = network(negated)
    assert net.logit and net.encoder is STATED.encoder and net.for_jvp is None and net.apply is negated


def test_a_plain_function_is_a_network_without_fields():
    net = network(linear)
    assert net == Network(linear) and network(net) is net and not net.logit and net.for_jvp is net.encoder is None


def test_an_encoder_lies_beside_a_network_and_its_parameters_are_apart(key):
    flow = adapters.Model(lambda key, x, cond=None: {"a": 2.0}, Network(lambda p, x, *_: float(len(p)) * p["a"] * x))
    fused = flow._replace(net=flow.net.replace(for_jvp=lambda p, x, *_: -float(len(p)) * p["a"] * x))
    joint = nets.with_encoder(fused, flow)
    params = joint.init(key, X)
    assert params == {"a": 2.0, "encoder": {"a": 2.0}}
    for own in (params, {"a": 2.0}):  # a checkpoint of the flow alone also works
        np.testing.assert_array_equal(joint.net(own, X, 0, 0), 2 * X)
        np.testing.assert_array_equal(joint.net.for_jvp(own, X, 0, 0), -2 * X)
    np.testing.assert_array_equal(joint.net.encoder(params | {"encoder": {"a": 5.0}}, X, 0, 0), 5 * X)
    assert nets.with_encoder(flow, flow).net.for_jvp is None
