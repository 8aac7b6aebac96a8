"""SongUNet: its filters, blocks and embedding against their formulas, its parameters against the published counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_nets_unet import conv, dense, random_like, silu

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
    x, y = jax.random.normal(jax.random.key(0), (2, 8, 6, 3)), jax.random.normal(jax.random.key(1), (2, 4, 3, 3))
    small = song_unet.halve(x, taps)
    np.testing.assert_allclose(small, filtered(np.asarray(x), taps, (len(taps) - 1) // 2), atol=1e-12)
    large = song_unet.double(y, taps)
    assert small.shape == y.shape and large.shape == x.shape
    np.testing.assert_allclose(jnp.vdot(large, x), 4 * jnp.vdot(y, small), rtol=1e-12)


def test_two_equal_taps_are_the_mean_of_four_pixels_and_each_pixel_four_times(x64, key):
    x = jax.random.normal(key, (1, 4, 4, 2))
    blocks = np.asarray(x).reshape(1, 2, 2, 2, 2, 2)
    np.testing.assert_allclose(song_unet.halve(x, (1, 1)), blocks.mean((2, 4)), atol=1e-15)
    np.testing.assert_allclose(song_unet.double(x, (1, 1)), np.asarray(x).repeat(2, 1).repeat(2, 2), atol=1e-15)


def group_norm(x, p, groups):
    b, h, w, _ = x.shape
    y = x.reshape(b, h * w, groups, -1)
    mean, var = y.mean((1, 3), keepdims=True), y.var((1, 3), keepdims=True)
    return ((y - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]


@pytest.mark.parametrize(("resample", "features"), [("down", 12), (None, 12), (None, 8)])
def test_a_block_is_its_formula(resample, features, x64, key):
    """Groups of four channels, three of twelve; both branches filtered, their sum over the root of two."""
    x, e = jax.random.normal(key, (2, 4, 6, 12), jnp.float64), jax.random.normal(key, (2, 5), jnp.float64)
    module = song_unet.Block(features, dtype="float64", taps=(1, 3, 3, 1), resample=resample)
    params = random_like(jax.eval_shape(module.init, key, x, e)["params"])
    assert ("skip" in params) == (resample is not None or features != 12)
    p = jax.tree.map(np.asarray, params)
    x, e = np.asarray(x), np.asarray(e)
    change = (lambda a: filtered(a, (1, 3, 3, 1), 1)) if resample else lambda a: a
    h = conv(change(silu(group_norm(x, p["GroupNorm_0"], 3))), p["first"]) + dense(e, p["shift"])[:, None, None]
    h = conv(silu(group_norm(h, p["GroupNorm_1"], features // 4)), p["second"])
    want = (h + (dense(change(x), p["skip"]) if "skip" in p else x)) / np.sqrt(2)
    got = module.apply({"params": params}, jnp.asarray(x), jnp.asarray(e))
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


def test_what_is_embedded_is_used_zero_augmentations_are_none_and_frequencies_are_not_trained(key):
    """The jump alone is not seen where its kernel is zero, and nowhere on the diagonal."""
    sizes = {"channels": 8, "multipliers": (1,), "blocks": 0, "middle": False, "embedding": "fourier", "augment": 9}
    module, x, s = song_unet.SongUNet(**sizes), jax.random.normal(key, (2, 4, 4, 1)), jnp.array([-1.0, 0.7])
    params = random_like(jax.eval_shape(module.init, key, x, s, s)["params"])
    out = jax.jit(lambda p, a, t=s: module.apply({"params": p}, x, s, t, None, a))
    without, zeros, ones = (out(params, a) for a in (None, jnp.zeros((2, 9)), jnp.ones((2, 9))))
    kernel = params["TwoTimes_0"]["jump"]["kernel"]
    still = params | {"TwoTimes_0": params["TwoTimes_0"] | {"jump": {"kernel": 0 * kernel}}}
    np.testing.assert_array_equal(out(still, None, s + 0.5), out(still, None, s))
    np.testing.assert_array_equal(out(still, None, s), out(params, None, s))
    assert np.abs(out(params, None, s + 0.5) - without).max() > 0.01
    np.testing.assert_allclose(without, zeros, rtol=1e-5, atol=1e-5)
    other = out(params | {"freqs": params["freqs"] + 0.1}, jnp.zeros((2, 9)))
    assert np.abs(ones - zeros).max() > 0.01 and np.abs(other - zeros).max() > 0.01
    grads = jax.jit(jax.grad(lambda p: jnp.sum(out(p, None) ** 2)))(params)
    assert (grads["freqs"] == 0).all() and (grads["TwoTimes_0"]["source"]["kernel"] != 0).any()


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
