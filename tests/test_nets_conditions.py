"""What networks take and refuse: conditions, and the values of their fields."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import nets
from fmjax.nets import base, embedding

CLASSES = 3
E = jnp.linspace(-1, 1, 8).reshape(2, 4)
TABLE = jnp.asarray(np.random.default_rng(0).standard_normal((CLASSES + 1, 4)), jnp.float32)
WAVES = jnp.asarray(np.random.default_rng(1).standard_normal((64, 4)), jnp.float32)


class Conditioned(nn.Module):
    classes: int = CLASSES
    guided: bool = False

    @nn.compact
    def __call__(self, e, cond):
        return embedding.condition(e, cond, classes=self.classes, guided=self.guided)


def embed(cond, classes=CLASSES, guided=False):
    params = {"Embed_0": {"embedding": TABLE}, "scale": {"kernel": WAVES}}
    return Conditioned(classes, guided).apply({"params": params}, E, cond)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64"])
def test_labels_of_every_integer_type_select_their_row(dtype):
    labels = np.array([CLASSES, 1], dtype)
    for cond in (labels, jnp.asarray(labels)):
        np.testing.assert_array_equal(embed(cond), E + TABLE[jnp.array([CLASSES, 1])])
        np.testing.assert_array_equal(jax.jit(embed)(cond), E + TABLE[jnp.array([CLASSES, 1])])


@pytest.mark.parametrize("label", [-1, -2, -CLASSES - 1, -100, CLASSES + 1, CLASSES + 2, 2**31 - 1, -(2**31)])
def test_a_label_outside_the_classes_is_refused_or_gives_nan_under_jit(label):
    """It never wraps around to another class, and it leaves the other rows alone."""
    cond = jnp.array([1, label])
    with pytest.raises(ValueError, match=f"cond={label}: label outside 0..{CLASSES}"):
        embed(cond)
    rows = jax.jit(embed)(cond)
    np.testing.assert_array_equal(rows[0], E[0] + TABLE[1])
    assert jnp.isnan(rows[1]).all()
    np.testing.assert_array_equal(
        jnp.isnan(jax.jit(jax.vmap(embed))(cond[:, None].repeat(2, 1)))[:, :, 0].T, [[0, 1]] * 2
    )


def test_small_integer_types_do_not_overflow_many_classes():
    """127 classes and more do not fit the replacement of an outside label into int8."""

    class Many(nn.Module):
        @nn.compact
        def __call__(self, e, cond):
            return embedding.condition(e, cond, classes=300)

    params = {"Embed_0": {"embedding": jnp.arange(301.0)[:, None] * jnp.ones(4)}}
    rows = jax.jit(lambda cond: Many().apply({"params": params}, 0 * E, cond))
    np.testing.assert_array_equal(rows(jnp.array([100, -1], "int8"))[:, 0], [100, np.nan])
    np.testing.assert_array_equal(rows(jnp.array([255, 0], "uint8"))[:, 0], [255, 0])


@pytest.mark.parametrize(
    ("cond", "options", "match"),
    [
        (jnp.array([0, 1]), {"classes": 0}, r"cond=int32\[2\]: .*classes=0 .*Set classes"),
        ((jnp.array([0, 1]), jnp.ones(2)), {"classes": 0}, "cond=tuple of 2 parts: .*classes=0"),
        (None, {}, r"cond=None: .*classes=3 needs integer labels.*shape \(2,\) in 0..3"),
        (1, {}, "cond=1: .* integer labels"),
        ("cat", {}, "cond='cat': .* integer labels"),
        (jnp.ones(2), {}, r"cond=float32\[2\]: .* integer labels"),
        (jnp.array([True, False]), {}, r"cond=bool\[2\]: .* integer labels"),
        (jnp.eye(2, 3), {}, r"cond=float32\[2,3\]: .* integer labels"),
        (jnp.array([[0], [1]]), {}, r"cond=int32\[2,1\]: wrong shape for a batch of 2"),
        (jnp.array(1), {}, r"cond=int32\[\]: wrong shape for a batch of 2"),
        (jnp.array([0, 1, 2]), {}, r"cond=int32\[3\]: wrong shape for a batch of 2"),
        ((jnp.array([0, 1]), jnp.ones(2)), {}, "guided=False: .*Set guided=True"),
        ((jnp.array([0, 1]), 2.0), {"guided": True}, r"cond=\(labels, 2.0\): .*shape \(2,\)"),
        ((jnp.array([0, 1]), jnp.array([1, 2])), {"guided": True}, r"cond=\(labels, int32\[2\]\): .*float array"),
        ((None, jnp.ones(2)), {"guided": True}, "cond=None"),
        ((jnp.array([0, 1]),) * 3, {"guided": True}, "cond=tuple of 3 parts"),
        (None, {"classes": 0, "guided": True}, "guided=True: .*Set classes"),
    ],
)  # fmt: skip
def test_conditions_that_do_not_fit_are_refused_in_one_sentence(cond, options, match):
    with pytest.raises(ValueError, match=match) as error:
        embed(cond, **options)
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


NETS = {
    "mlp": (functools.partial(nets.MLP, width=4, depth=1), (2,)),
    "plain": (functools.partial(nets.Plain, width=4, depth=1), (2,)),
    "unet": (functools.partial(nets.UNet, channels=4, multipliers=(1,), middle=False), (4, 4, 1)),
    "encoder": (functools.partial(nets.Encoder, channels=4, multipliers=(1,), middle=False, pool="mean"), (4, 4, 1)),
    "song_unet": (functools.partial(nets.SongUNet, channels=4, multipliers=(1,), blocks=0, middle=False), (4, 4, 1)),
    "dit": (functools.partial(nets.DiT, width=4, depth=1, heads=1), (4, 4, 1)),
}


@pytest.mark.parametrize("name", NETS)
def test_a_network_without_classes_refuses_a_condition(name, key):
    make, shape = NETS[name]
    model, x = nets.from_linen(make()), jnp.zeros((2, *shape))
    params = jax.eval_shape(model.init, key, x)
    for cond in (jnp.zeros(2, int), jnp.zeros(2), {"label": 1}):
        with pytest.raises(ValueError, match="cond=.*takes no condition.*omit cond"):
            jax.eval_shape(lambda p, cond=cond: model.net(p, x, 0.0, 0.0, cond), params)


@pytest.mark.parametrize("name", sorted(NETS.keys() - {"plain"}))
def test_a_network_with_classes_needs_labels(name, key):
    make, shape = NETS[name]
    model, x = nets.from_linen(make(classes=2)), jnp.zeros((2, *shape))
    with pytest.raises(ValueError, match="cond=None: .*classes=2"):
        jax.eval_shape(model.init, key, x)


@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_a_guided_network_takes_labels_with_or_without_scales(name, key):
    make, shape = NETS[name]
    model, x, labels = nets.from_linen(make(classes=2, guided=True)), jnp.zeros((2, *shape)), jnp.array([0, 2])
    params = jax.eval_shape(model.init, key, x, labels)
    for cond in (labels, (labels, jnp.array([1.0, 3.0]))):
        assert jax.eval_shape(model.net, params, x, 0.0, 1.0, cond).shape == x.shape


# --- fields


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("mlp", "width", 0), ("mlp", "width", -1), ("mlp", "width", 10**11), ("mlp", "depth", 10**11),
        ("mlp", "dtype", "float23"), ("mlp", "dropout", 1.5), ("mlp", "dropout", float("nan")), ("mlp", "outputs", 0),
        ("mlp", "classes", -1), ("plain", "depth", 0), ("plain", "waves", 10**11), ("plain", "times", -1),
        ("unet", "channels", 0), ("unet", "blocks", 10**11), ("unet", "heads", 0), ("unet", "dtype", "int8"),
        ("unet", "per_group", 0), ("encoder", "channels", -4), ("song_unet", "noise", 0), ("song_unet", "augment", -1),
        ("dit", "patch", 0), ("dit", "depth", 10**11), ("dit", "width", -4), ("dit", "dtype", "bf16"),
    ],
)  # fmt: skip
def test_a_field_outside_its_range_is_refused_when_it_is_set(name, field, value):
    with pytest.raises(ValueError, match=f"{field}=(?s:.*): .*Give ") as error:
        NETS[name][0](**{field: value})
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["unet", "encoder", "song_unet", "dit"])
@pytest.mark.parametrize("shape", [(2, 8), (2, 128, 1), (2, 4, 4, 4, 1)])
def test_a_network_for_images_says_so_of_other_data(name, shape):
    """Called outside jaxtyping's checks, which are on in these tests only."""
    with pytest.raises(ValueError, match=rf"x of shape \({', '.join(map(str, shape))}\): .*\[B, H, W, C\]"):
        base.check_images(jnp.zeros(shape))


def test_a_network_traces_once_for_conditions_of_one_shape(key):
    model = nets.from_linen(NETS["mlp"][0](classes=2))
    params, x = model.init(key, jnp.zeros((2, 2)), jnp.zeros(2, int)), jnp.ones((2, 2))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def net(params, labels):
        return model.net(params, x, 0.0, 0.5, labels)

    for labels in ([0, 1], [2, 2], [1, 0]):
        chex.assert_tree_all_finite(net(params, jnp.array(labels)))
