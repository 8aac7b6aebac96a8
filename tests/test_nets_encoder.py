"""The encoder: the U-Net's own way down, pooled as its formulas say, and the logits of the other networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.nets import adapters, encoder, mlp, plain, unet

SIZES = {"channels": 8, "multipliers": (1, 2), "attention": (2,), "heads": 2}
X = (2, 4, 4, 3)


@functools.cache
def make(kind="float32", **options):
    """An encoder, its parameters moved from their first values, and a batch of arguments; cond are labels."""
    module = encoder.Encoder(**(SIZES | options), classes=2, dtype=kind)
    rng = np.random.default_rng(0)
    x, t = jnp.asarray(rng.standard_normal(X), kind), jnp.array([0.2, 0.7], kind)
    args = (x, t, t, jnp.array([0, 1]))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    params = jax.tree.map(lambda a: np.asarray(0.4 * rng.standard_normal(a.shape), kind), shapes)
    return module, params, args


def test_its_way_down_is_the_unets_name_by_name(key):
    """Parameters of input, levels, middle and times have the U-Net's names and shapes: it can start from a flow's."""
    t = jnp.zeros(2)
    shape = lambda module: jax.eval_shape(module.init, key, jnp.zeros(X), t, t, jnp.zeros(2, "int32"))["params"]
    net, half = shape(unet.UNet(**SIZES, classes=2)), shape(encoder.Encoder(**SIZES, classes=2))
    own = {"pool_q", "pool_kv", "pool_out", "GroupNorm_0", "output"}
    assert set(half) - own == {name for name in net if not name.startswith(("out", "up", "GroupNorm"))}
    for name in set(half) - own:
        assert jax.tree.map(np.shape, half[name]) == jax.tree.map(np.shape, net[name])
    assert half["output"]["kernel"].shape == (16, 1)


@pytest.mark.parametrize("pool", ("attention", "mean"))
def test_the_pooling_is_its_formula(pool):
    module, params, args = make(pool=pool)
    last_norm = lambda m, _: isinstance(m, unet.GroupNorm) and m.path == ("GroupNorm_0",)
    got, state = jax.jit(functools.partial(module.apply, capture_intermediates=last_norm))({"params": params}, *args)
    (h,) = state["intermediates"]["GroupNorm_0"]["__call__"]
    p, h = jax.tree.map(np.asarray, params), np.asarray(h, np.float64)
    dense = lambda a, name: a @ p[name]["kernel"] + p[name]["bias"]
    pixels = (h / (1 + np.exp(-h))).reshape(2, 4, 16)
    pooled = pixels.mean(1)
    if pool == "attention":
        q = dense(pooled, "pool_q").reshape(2, 2, 8)
        k, v = (a.reshape(2, 4, 2, 8) for a in np.split(dense(pixels, "pool_kv"), 2, -1))
        score = np.exp(np.einsum("bhc,bphc->bph", q, k) / np.sqrt(8))
        pooled = np.einsum("bph,bphc->bhc", score / score.sum(1, keepdims=True), v).reshape(2, 16)
        pooled = dense(pooled, "pool_out")
    assert got.shape == (2,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, dense(pooled, "output")[:, 0], rtol=1e-4, atol=1e-5)


def test_the_gradient_in_x_is_the_finite_difference_and_rows_are_apart(x64):
    """What a classifier's direction takes; jax's attention, which has its softmax in float32, is left out."""
    module, params, (x, s, t, cond) = make("float64", pool="mean", middle=False, attention=())
    x, t = np.asarray(x), np.asarray(t)

    @jax.jit
    def compiled(x, t):
        values, pull = jax.vjp(lambda x: module.apply({"params": params}, x, t, t, cond), x)
        return values, pull(jnp.ones_like(values))[0]

    f = lambda x, t: np.asarray(compiled(x, t)[0])
    towards, h = np.cos(np.arange(x.size)).reshape(x.shape), 1e-5
    fine = (f(x + h * towards, t) - f(x - h * towards, t)) / (2 * h)
    np.testing.assert_allclose((np.asarray(compiled(x, t)[1]) * towards).sum((1, 2, 3)), fine, rtol=1e-7)
    moved = f(x + np.array([0.0, 1.0])[:, None, None, None], t)
    assert moved[0] == f(x, t)[0] and abs(moved[1] - f(x, t)[1]) > 1e-3
    assert (np.abs(f(x, 0.9 * t) - f(x, t)) > 1e-4).all()


@pytest.mark.parametrize(
    "module",
    [
        encoder.Encoder(channels=8, multipliers=(1,), heads=2),
        mlp.MLP(width=8, depth=1, logit=True),
        plain.Plain(width=8, depth=2, logit=True),
    ],
)
def test_a_logit_is_one_number_an_example_and_starts_at_zero(module, key):
    model = adapters.from_linen(module)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(X), "float32")
    f = jax.jit(model.net)(model.init(key, x), x, 0.3, 0.3)
    assert f.shape == (2,) and f.dtype == x.dtype and not f.any() and model.net.logit


@pytest.mark.parametrize("module", [mlp.MLP, plain.Plain])
def test_of_a_number_the_logit_is_the_network_itself(module, key):
    """For ``x: [B, 1]`` both have the same parameters: the one gives ``[B, 1]``, the other ``[B]``."""
    field, logit = (adapters.from_linen(module(width=8, depth=2, logit=logit)) for logit in (False, True))
    x, t = jnp.asarray(np.random.default_rng(0).standard_normal((5, 1)), "float32"), jnp.linspace(0, 1, 5)
    shapes = jax.eval_shape(field.init, key, x)
    params = jax.tree.map(lambda a: np.asarray(0.3 * np.cos(np.arange(a.size)).reshape(a.shape), "float32"), shapes)
    values, logits = jax.jit(lambda *args: (field.net(*args), logit.net(*args)))(params, x, t, t)
    np.testing.assert_array_equal(np.asarray(values)[:, 0], logits)
    assert not field.net.logit and np.asarray(values).all()


def test_bad_options_are_refused(key):
    x = jnp.zeros(X)
    with pytest.raises(ValueError, match="pool='max'"):
        encoder.Encoder(pool="max")
    with pytest.raises(ValueError, match=r"multipliers=\(1, 1, 1\): .* divisible by 4"):
        jax.eval_shape(adapters.from_linen(encoder.Encoder(multipliers=(1, 1, 1))).init, key, x[:, :3])
    with pytest.raises(ValueError, match="outputs=2: a logit"):
        mlp.MLP(logit=True, outputs=2)
