"""SongUNet: its filters, blocks and embedding against their formulas, its parameters against the published counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_nets_unet import conv, dense, draw, random_like, silu

from fmjax.nets import adapters, song_unet
from fmjax.nets.unet import UNet

CIFAR = {"multipliers": (2, 2, 2), "dropout": 0.13}
NCSNPP = {"embedding": "fourier", "noise": 2, "encoder": "residual", "taps": (1, 3, 3, 1)}
ADM = UNet(
    channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), classes=1000, head_channels=64,
    spectrum="slow", resample="block",
)  # fmt: skip


def filtered(x, taps, padding):
    """Every second pixel of a correlation with ``taps`` both ways, by its definition."""
    k = np.outer(taps, taps) / sum(taps) ** 2
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    rows, columns = ((n - len(taps)) // 2 + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), rows, columns, x.shape[-1]))
    for i, j in np.ndindex(rows, columns):
        here = x[:, 2 * i : 2 * i + len(taps), 2 * j : 2 * j + len(taps)]
        out[:, i, j] = np.einsum("bhwc,hw->bc", here, k)
    return out


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4), (1, 0, 2, 2, 0, 3)])
def test_halving_is_a_filter_and_doubling_four_times_its_transpose(taps, x64):
    x, y = draw((2, 8, 6, 3), (2, 4, 3, 3))
    both = jax.jit(lambda x, y: (song_unet.halve(x, taps), song_unet.double(y, taps)))
    small, large = map(np.asarray, both(x, y))
    np.testing.assert_allclose(small, filtered(x, taps, (len(taps) - 1) // 2), atol=1e-12)
    assert small.shape == y.shape and large.shape == x.shape
    np.testing.assert_allclose(np.vdot(large, x), 4 * np.vdot(y, small), rtol=1e-12)


def test_two_equal_taps_average_four_pixels_or_repeat_each_pixel(x64):
    (x,) = draw((1, 4, 4, 2))
    blocks = x.reshape(1, 2, 2, 2, 2, 2)
    half, double = jax.jit(lambda x: (song_unet.halve(x, (1, 1)), song_unet.double(x, (1, 1))))(x)
    np.testing.assert_allclose(half, blocks.mean((2, 4)), atol=1e-15)
    np.testing.assert_allclose(double, x.repeat(2, 1).repeat(2, 2), atol=1e-15)


def group_norm(x, p, groups):
    b, h, w, _ = x.shape
    y = x.reshape(b, h * w, groups, -1)
    mean, var = y.mean((1, 3), keepdims=True), y.var((1, 3), keepdims=True)
    return ((y - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]


@pytest.mark.parametrize(("resample", "features"), [("down", 12), (None, 12), (None, 8)])
def test_a_block_is_its_formula(resample, features, x64, key):
    """Groups of four channels, three of twelve; both branches filtered, their sum over the root of two."""
    x, e = draw((2, 4, 6, 12), (2, 5))
    module = song_unet.Block(features, dtype="float64", taps=(1, 3, 3, 1), resample=resample)
    p = random_like(jax.eval_shape(module.init, key, jnp.asarray(x), jnp.asarray(e))["params"])
    assert ("skip" in p) == (resample is not None or features != 12)
    change = (lambda a: filtered(a, (1, 3, 3, 1), 1)) if resample else lambda a: a
    h = conv(change(silu(group_norm(x, p["GroupNorm_0"], 3))), p["first"]) + dense(e, p["shift"])[:, None, None]
    h = conv(silu(group_norm(h, p["GroupNorm_1"], features // 4)), p["second"])
    want = (h + (dense(change(x), p["skip"]) if "skip" in p else x)) / np.sqrt(2)
    got = jax.jit(module.apply)({"params": p}, jnp.asarray(x), jnp.asarray(e))
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("module", "size", "published"),
    [
        (song_unet.SongUNet(**CIFAR, augment=9), 32, 55_733_891),
        (song_unet.SongUNet(**CIFAR), 32, 55_732_739),
        (song_unet.SongUNet(**CIFAR, augment=9, classes=10), 32, 55_735_299),
        (song_unet.SongUNet(**CIFAR, **NCSNPP, augment=9), 32, 56_397_827),
        (song_unet.SongUNet(**CIFAR, **NCSNPP, augment=9, classes=10), 32, 56_400_643),
        (song_unet.SongUNet(augment=9), 64, 61_805_571),
        (song_unet.SongUNet(augment=9, **NCSNPP), 64, 62_761_091),
        (ADM, 64, 295_899_267),
    ],
)
def test_the_published_networks_have_the_published_number_of_parameters(module, size, published, key):
    """Beside those of the jump; PyTorch does not count Fourier frequencies, and its ADM has no null label."""
    cond = jnp.zeros(1, "int32") if module.classes else None
    params = jax.eval_shape(adapters.from_linen(module).init, key, jnp.zeros((1, size, size, 3)), cond)
    jump = params["TwoTimes_0"].pop("jump")["kernel"]
    assert jump.shape == (64, 4 * module.channels)
    params.pop("freqs", None)
    null = 4 * 192 if module is ADM else 0
    assert sum(a.size for a in jax.tree.leaves(params)) == published + null


def test_every_embedding_is_used_and_fourier_frequencies_are_not_trained(key):
    """Zero augmentations are no augmentation. The jump has no effect where its kernel is zero, nor on the diagonal."""
    sizes = {"channels": 8, "multipliers": (1,), "blocks": 0, "middle": False, "embedding": "fourier", "augment": 9}
    module, s = song_unet.SongUNet(**sizes), np.array([-1.0, 0.7], "float32")
    x = jnp.asarray(draw((2, 4, 4, 1))[0], "float32")
    params = jax.tree.map(np.float32, random_like(jax.eval_shape(module.init, key, x, s, s)["params"]))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(p, augment, s, t):
        out = module.apply({"params": p}, x, s, t, None, augment)
        return jnp.sum(out**2), out

    out = lambda p, augment, t=s: np.asarray(loss(p, augment, s, t)[0][1])
    zero = np.zeros((2, 9), "float32")
    (_, without), grads = loss(params, None, s, s)
    zeros, ones = out(params, zero), out(params, zero + 1)
    kernel = params["TwoTimes_0"]["jump"]["kernel"]
    still = params | {"TwoTimes_0": params["TwoTimes_0"] | {"jump": {"kernel": 0 * kernel}}}
    np.testing.assert_array_equal(out(still, zero, s + np.float32(0.5)), out(still, zero))
    np.testing.assert_array_equal(out(still, zero), zeros)
    assert np.abs(out(params, zero, s + np.float32(0.5)) - zeros).max() > 0.01
    np.testing.assert_allclose(without, zeros, rtol=1e-5, atol=1e-5)
    other = out(params | {"freqs": params["freqs"] + np.float32(0.1)}, zero)
    assert np.abs(ones - zeros).max() > 0.01 and np.abs(other - zeros).max() > 0.01
    assert not np.any(grads["freqs"]) and np.asarray(grads["TwoTimes_0"]["source"]["kernel"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multipliers": (1, 1, 1)}, r"multipliers=\(1, 1, 1\): .* divisible by 4, .*\(1, 6, 6, 1\)"),
        ({"multipliers": ()}, r"multipliers=\(\)"),
        ({"embedding": "fouier"}, "embedding='fouier': .*did you mean 'fourier'"),
        ({"encoder": "skip"}, "encoder='skip'"),
        ({"taps": (1, 2, 1)}, r"taps=\(1, 2, 1\)"),
        ({"taps": (1, -1)}, r"taps=\(1, -1\)"),
        ({"channels": 33}, "channels.* 33 channels in 8 groups"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_sentence(options, message, key):
    with pytest.raises(ValueError, match=message):
        module = song_unet.SongUNet(**{"channels": 8, "multipliers": (1,), "blocks": 1, **options})
        jax.eval_shape(adapters.from_linen(module).init, key, jnp.zeros((1, 6, 6, 1)))
