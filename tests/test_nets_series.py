"""Networks on series, and conditions that are floats or arrays."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import nets, sampling
from fmjax.nets import dit
from fmjax.types import Method, is_null, with_null

RNG = np.random.default_rng(0)
S, T = jnp.linspace(0, 0.5, 2), jnp.linspace(0.5, 1, 2)
draw = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)
close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


def random_parameters(model, x, cond=None):
    """Parameters without zeros: an output layer that starts at zero would hide everything."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, cond)
    return jax.tree.map(lambda a: 0.3 * draw(*a.shape), shapes)


SIZES = [(4, {"attention": (4,)}), (8, {"resample": "block", "film": False})]


@pytest.mark.parametrize(("length", "options"), SIZES)
def test_a_unet_of_series_is_the_unet_of_images_with_equal_rows(length, options):
    """Kernels of images whose middle row is the kernel of series see no other row."""
    model = nets.from_linen(nets.UNet(channels=8, multipliers=(1, 2), heads=2, **options))
    x = draw(2, length, 3)
    params = random_parameters(model, x)
    middle = lambda k: jnp.zeros((3, *k.shape)).at[1].set(k) if k.ndim == 3 else k
    rows = jnp.repeat(x[:, None], length, 1)
    series = jax.jit(model.net)(params, x, S, T)
    images = jax.jit(model.net)(jax.tree.map(middle, params), rows, S, T)
    assert np.abs(series).max() > 0.1
    close(images, jnp.repeat(series[:, None], length, 1))


def test_a_classifier_of_series_has_one_logit_an_example():
    model = nets.from_linen(nets.Encoder(channels=8, multipliers=(1,), heads=2))
    x = draw(2, 4, 3)
    params = random_parameters(model, x)
    net = jax.jit(model.net)
    both = net(params, x, S, T)
    assert both.shape == (2,)
    close(net(params, x[::-1], S[::-1], T[::-1]), both[::-1])


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (2, 6, 3)])
def test_patches_are_put_back(shape):
    x = draw(*shape)
    patches = dit._patches(x, 2)
    np.testing.assert_array_equal(dit._whole(patches, 2, x.shape), x)
    first = x[:, :2, :2] if len(shape) == 4 else x[:, :2]
    np.testing.assert_array_equal(patches[:, 0], first.reshape(2, -1))


def test_a_dit_of_series_knows_the_order_of_its_patches():
    model = nets.from_linen(nets.DiT(width=8, depth=1, heads=2))
    x = draw(2, 6, 3)
    params = random_parameters(model, x)
    net = jax.jit(model.net)
    turned = x.reshape(2, 3, 2, 3)[:, ::-1].reshape(x.shape)
    back = net(params, turned, S, T).reshape(2, 3, 2, 3)[:, ::-1].reshape(x.shape)
    assert np.abs(back - net(params, x, S, T)).max() > 1e-2
    table = dit.positions_of_series(5, 8)
    assert table[3, 0] == np.sin(3) and table[3, 4] == np.cos(3) and table[2, 3] == np.sin(2 * 1e4**-0.75)
    same = dit.positions(1, 5, 16)[:, 8:]  # the columns of a grid of one row
    np.testing.assert_allclose(dit.positions_of_series(5, 8), same)


NETS = {
    "mlp": (nets.MLP(width=8, depth=1, floats=True), (4, 2)),
    "unet": (nets.UNet(channels=8, multipliers=(1,), middle=False, floats=True), (4, 2)),
    "dit": (nets.DiT(width=8, depth=1, heads=1, floats=True), (4, 4, 2)),
}
CONDS = {
    "number": lambda grid: draw(2),
    "vector": lambda grid: draw(2, 5),
    "grid": lambda grid: draw(2, *grid, 3),
    "both": lambda grid: {"past": draw(2, *grid, 1), "mean": draw(2)},
}


PAIRS = [("mlp", "number"), ("mlp", "vector"), ("mlp", "both"), ("unet", "both"), ("dit", "grid"), ("dit", "both")]


@pytest.mark.parametrize(("name", "cond"), PAIRS)
def test_float_conditions_act_on_their_own_example(name, cond):
    module, shape = NETS[name]
    model, x, cond = nets.from_linen(module), draw(2, *shape), CONDS[cond](shape[:-1])
    params = random_parameters(model, x, cond)
    net = jax.jit(model.net)
    out = net(params, x, S, T, cond)
    leaves, structure = jax.tree.flatten(cond)
    for i in range(len(leaves)):  # each array, too
        changed = [c.at[1].add(1.0) if j == i else c for j, c in enumerate(leaves)]
        other = net(params, x, S, T, jax.tree.unflatten(structure, changed))
        close(other[0], out[0])
        assert np.abs(other[1] - out[1]).max() > 1e-3
    nulls = with_null(cond, np.nan)
    missing = net(params, x, S, T, nulls)
    chex.assert_tree_all_finite(missing)
    assert is_null(nulls, np.nan).all() and not is_null(cond, np.nan).any()
    assert np.abs(missing - out).min(0).max() > 1e-3
    one_gap = jax.tree.map(lambda c: c.reshape(2, -1).at[1, 0].set(np.nan).reshape(c.shape), cond)
    part = net(params, x, S, T, one_gap)
    close(part[0], out[0])
    close(part[1], missing[1])
    chex.assert_tree_all_finite(jax.jit(jax.grad(lambda p: (net(p, x, S, T, one_gap) ** 2).sum()))(params))


def test_a_grid_condition_enters_where_it_lies():
    """Without attention and deep levels an output sees its neighbours' conditions only."""
    module = nets.UNet(channels=8, multipliers=(1,), blocks=0, middle=False, floats=True, per_group=8, dropout=0.0)
    model, x = nets.from_linen(module), draw(2, 32, 1)
    cond = draw(2, 32, 1)
    params = random_parameters(model, x, cond)
    grads = jax.jit(jax.grad(lambda c: model.net(params, x[:1], S[:1], T[:1], c)[0, 2, 0]))(cond[:1])[0, :, 0]
    near, far = np.abs(grads[:3]).max(), np.abs(grads[16:]).max()
    assert near > 10 * far  # group norms see the mean of all


@pytest.mark.parametrize(
    ("make", "cond", "match"),
    [
        (lambda: nets.MLP(width=8, depth=1, floats=True), None, "cond=None: this network has floats=True"),
        (lambda: nets.MLP(width=8, depth=1, floats=True), jnp.array([1, 2]), r"cond=int32\[2\]: a network with floats"),
        (lambda: nets.MLP(width=8, depth=1, floats=True), draw(3, 1), r"cond=float32\[3,1\]: a network with floats"),
        (lambda: nets.MLP(width=8, depth=1), draw(2), r"cond=float32\[2\]: .*classes=0"),
        (lambda: nets.MLP(width=8, depth=1, floats=True, classes=3), jnp.array([1, 2]), "floats=True, classes=3"),
    ],
)
def test_other_conditions_are_refused_in_one_sentence(make, cond, match):
    with pytest.raises(ValueError, match=f"^{match}") as caught:
        nets.from_linen(make()).init(jax.random.key(0), draw(2, 2), cond)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


@pytest.mark.parametrize("module", [nets.UNet(channels=8), nets.DiT(width=8, depth=1, heads=1)])
def test_vectors_are_refused_by_networks_of_a_grid(module):
    with pytest.raises(ValueError, match=r"takes images \[B, H, W, C\] or series \[B, L, C\].*'mlp'"):
        jax.eval_shape(nets.from_linen(module).init, jax.random.key(0), draw(2, 5))


def test_label_dropout_of_floats_drops_whole_rows_at_its_rate():
    seen = []
    method = Method(lambda params, target, batch, key: (0.0, seen.append(batch.cond) or {}))
    from fmjax.types import Batch

    cond = {"past": draw(4000, 3), "mean": draw(4000)}
    loss = sampling.label_dropout(method, rate=0.25, null=np.nan).loss
    _, aux = loss(None, None, Batch(draw(4000, 2), cond=cond), jax.random.key(0))
    (out,) = seen
    dropped = np.asarray(aux["is_unconditional"])
    assert abs(dropped.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    for name in cond:
        np.testing.assert_array_equal(np.isnan(out[name]).reshape(4000, -1).all(1), dropped)
        np.testing.assert_array_equal(out[name][~dropped], cond[name][~dropped])


def test_guidance_of_floats_is_the_formula():
    model, x, cond = nets.from_linen(NETS["mlp"][0]), draw(2, 4, 2), draw(2, 5)
    params = random_parameters(model, x, cond)
    velocity = lambda x, t, cond: model.net(params, x, jnp.full(2, t), jnp.full(2, t), cond)
    guided = sampling.classifier_free(velocity, null=np.nan, scale=3.0)
    base = velocity(x, 0.5, jnp.full((2, 5), np.nan))
    close(guided(x, 0.5, cond), base + 3 * (velocity(x, 0.5, cond) - base))
