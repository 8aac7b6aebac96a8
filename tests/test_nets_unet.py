"""The U-Net: its blocks against numpy and scipy, its parameters against their count, sizes it cannot halve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal, special

from fmjax.nets import adapters, unet


def groups(c, least=4):
    return max(g for g in (1, 2, 4, 8, 16, 32) if c % g == 0 and (g == 1 or c // g >= least))


def group_norm(x, p, least=4):
    b, h, w, c = x.shape
    y = x.reshape(b, h * w, groups(c, least), -1)
    mean, var = y.mean((1, 3), keepdims=True), y.var((1, 3), keepdims=True)
    return ((y - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * p["scale"] + p["bias"]


def conv(x, p):
    """Correlation with zero padding, channel by channel, by scipy."""
    out = np.zeros((*x.shape[:3], p["kernel"].shape[-1]))
    for b, i, o in np.ndindex(len(x), x.shape[-1], out.shape[-1]):
        out[b, :, :, o] += signal.correlate2d(x[b, :, :, i], p["kernel"][:, :, i, o], mode="same")
    return out + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def silu(x):
    return x * special.expit(x)


def random_like(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: 0.5 * rng.standard_normal(a.shape), params)


def draw(*shapes):
    """Standard normal arrays in float64, as numpy."""
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape) for shape in shapes]


@pytest.mark.parametrize("features", [8, 4])
def test_a_residual_block_is_its_formula(features, x64, key):
    x, e = draw((2, 4, 3, 8), (2, 6))
    module = unet.Block(features, dtype="float64")
    first = jax.jit(lambda x, e: module.init(key, x, e)["params"]["second"]["kernel"])(jnp.asarray(x), jnp.asarray(e))
    p = random_like(jax.eval_shape(module.init, key, jnp.asarray(x), jnp.asarray(e))["params"])
    assert not np.any(first) and ("skip" in p) == (features != 8)
    h = conv(silu(group_norm(x, p["GroupNorm_0"])), p["first"])
    scale, shift = np.split(dense(e, p["film"])[:, None, None], 2, -1)
    h = conv(silu(group_norm(h, p["GroupNorm_1"]) * (1 + scale) + shift), p["second"])
    want = h + (x if features == 8 else dense(x, p["skip"]))
    got = jax.jit(module.apply)({"params": p}, jnp.asarray(x), jnp.asarray(e))
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_group_norm_has_32_groups_or_as_many_as_the_channels_allow(x64):
    for c, least, n in [(64, 1, 32), (64, 4, 16), (12, 4, 2), (7, 1, 1)]:
        assert groups(c, least) == n
        x = 3 + 2 * draw((2, 3, 2, c))[0]
        p = {"scale": np.linspace(0.5, 2, c), "bias": np.linspace(-1, 1, c)}
        got = jax.jit(unet.GroupNorm(least, "float64").apply)({"params": p}, jnp.asarray(x))
        np.testing.assert_allclose(got, group_norm(x, p, least), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("resample", ["down", "up"])
def test_a_block_without_film_that_halves_or_doubles_is_its_formula(resample, x64, key):
    """The embedding is added before the second norm; means of four pixels, or each pixel four times."""
    x, e = draw((2, 4, 6, 4), (2, 6))
    module = unet.Block(8, dtype="float64", film=False, per_group=2, resample=resample)
    p = random_like(jax.eval_shape(module.init, key, jnp.asarray(x), jnp.asarray(e))["params"])
    if resample == "down":
        change = lambda a: (a[:, ::2, ::2] + a[:, 1::2, ::2] + a[:, ::2, 1::2] + a[:, 1::2, 1::2]) / 4
    else:
        change = lambda a: a.repeat(2, 1).repeat(2, 2)
    h = conv(change(silu(group_norm(x, p["GroupNorm_0"], 2))), p["first"]) + dense(e, p["shift"])[:, None, None]
    want = dense(change(x), p["skip"]) + conv(silu(group_norm(h, p["GroupNorm_1"], 2)), p["second"])
    got = jax.jit(module.apply)({"params": p}, jnp.asarray(x), jnp.asarray(e))
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_attention_is_softmax_of_scaled_products_head_by_head(x64, key):
    """And its jvp is that of the formula, by central differences; to float32, in which jax takes the softmax."""
    x, dx = draw((2, 2, 2, 3, 8))[0]
    module = unet.Attention(2, dtype="float64")
    p = random_like(jax.eval_shape(module.init, key, jnp.asarray(x))["params"])

    def formula(x):
        qkv = dense(group_norm(x, p["GroupNorm_0"]), p["qkv"]).reshape(2, 6, 24)
        heads = []
        for head in range(2):
            q, k, v = (qkv[:, :, 8 * i + 4 * head : 8 * i + 4 * head + 4] for i in range(3))
            heads.append(special.softmax(q @ k.swapaxes(1, 2) / np.sqrt(4), -1) @ v)
        return x + dense(np.concatenate(heads, -1), p["out"]).reshape(x.shape)

    rate = jax.jit(lambda x, dx: jax.jvp(lambda x: module.apply({"params": p}, x), (x,), (dx,)))
    y, dy = rate(jnp.asarray(x), jnp.asarray(dx))
    h = 1e-5
    np.testing.assert_allclose(y, formula(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dy, (formula(x + h * dx) - formula(x - h * dx)) / (2 * h), rtol=1e-5, atol=1e-4)


def count(height, colours, *, channels, multipliers, blocks, attention, middle, classes):
    """Level by level: what comes down is kept for what goes up."""
    width = 4 * channels
    c3 = lambda i, o: 9 * i * o + o
    linear = lambda i, o: i * o + o
    block = lambda i, o: 2 * i + c3(i, o) + linear(width, 2 * o) + 2 * o + c3(o, o) + (linear(i, o) if i != o else 0)
    attend = lambda c: 2 * c + linear(c, 3 * c) + linear(c, c)
    total = linear(64, width) + 64 * width + linear(width, width) + ((classes + 1) * width if classes else 0)
    now = channels * multipliers[0]
    total, kept = total + c3(colours, now), [now]
    for level, m in enumerate(multipliers):
        if level:
            total, height = total + c3(now, now), height // 2
            kept.append(now)
        for _ in range(blocks):
            total += block(now, m * channels) + (attend(m * channels) if height in attention else 0)
            now = m * channels
            kept.append(now)
    total += block(now, now) + (attend(now) + block(now, now) if middle else 0)
    for level in reversed(range(len(multipliers))):
        for _ in range(blocks + 1):
            out = multipliers[level] * channels
            total += block(now + kept.pop(), out) + (attend(out) if height in attention else 0)
            now = out
        if level:
            total, height = total + c3(now, now), height * 2
    assert not kept
    return total + 2 * now + c3(now, colours)


@pytest.mark.parametrize(
    ("height", "colours", "options"),
    [
        (8, 1, {"channels": 8, "multipliers": (1, 2),
         "blocks": 1, "attention": (), "middle": True, "classes": 0}),
        (8, 3, {"channels": 8, "multipliers": (1, 2, 4),
         "blocks": 2, "attention": (4, 2), "middle": False, "classes": 10}),
        (32, 3, {"channels": 128, "multipliers": (1, 2, 2, 2),
         "blocks": 2, "attention": (16,), "middle": True, "classes": 0}),
        (5, 1, {"channels": 16, "multipliers": (2,),
         "blocks": 1, "attention": (5,), "middle": True, "classes": 0}),
    ],
)  # fmt: skip
def test_the_number_of_parameters(height, colours, options, key):
    model = adapters.from_linen(unet.UNet(**options))
    labels = jnp.zeros((1,), jnp.int32) if options["classes"] else None
    params = jax.eval_shape(model.init, key, jnp.zeros((1, height, height, colours)), labels)
    assert sum(a.size for a in jax.tree.leaves(params)) == count(height, colours, **options)


@pytest.mark.parametrize(("size", "levels"), [((8, 6), 3), ((7, 8), 2), ((9, 9), 2)])
def test_sizes_that_cannot_be_halved_are_refused(size, levels, key):
    model = adapters.from_linen(unet.UNet(channels=4, multipliers=(1,) * levels, heads=1))
    with pytest.raises(ValueError, match=rf"multipliers=\(1.*divisible by {2 ** (levels - 1)}, .*\(1, {size[0]}, "):
        jax.eval_shape(model.init, key, jnp.zeros((1, *size, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample": "pool"}, "resample='pool'"),
        ({"heads": 3}, "heads=3: .* 4 channels"),
        ({"head_channels": 8}, "head_channels=8: .* 4 channels"),
        ({"spectrum": "slower"}, "spectrum='slower': .*did you mean 'slow'"),
        ({"remat": "half"}, "remat='half'"),
        ({"multipliers": ()}, r"multipliers=\(\)"),
        ({"multipliers": (1, 0)}, r"multipliers\[1\]=0"),
        ({"attention": (0,)}, r"attention\[0\]=0"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_sentence(options, message, key):
    with pytest.raises(ValueError, match=message):
        model = adapters.from_linen(unet.UNet(**{"channels": 4, "multipliers": (1,), **options}))
        jax.eval_shape(model.init, key, jnp.zeros((1, 4, 4, 1)))
