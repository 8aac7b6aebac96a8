"""EDM's networks: converted weights compute what PyTorch computed.

Reference outputs are those of ``../shared/parity`` (tiny networks of NVlabs/edm, run in PyTorch); where that folder is
absent those tests are skipped.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from fmjax import sampling
from fmjax.convert import edm
from fmjax.experiments import build
from fmjax.nets import preconditioning, song_unet, unet
from fmjax.nets.adapters import from_linen

PARITY = Path(__file__).parents[2] / "shared" / "parity"
MODULES = {"song_unet": song_unet.SongUNet, "unet": unet.UNet}
QUICK = {"xla_backend_optimization_level": 0}  # to compile
recorded = pytest.mark.skipif(not PARITY.is_dir(), reason=f"needs the reference outputs in {PARITY}")


@functools.cache
def reference(name):
    """Arguments and output of a network, images with colours last; its state dict and its constructor's arguments."""
    with np.load(PARITY / f"edm_{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    last = lambda a: jnp.asarray(a.transpose(0, 2, 3, 1))
    state = {key[2:]: a for key, a in arrays.items() if key.startswith("w/")}
    return {**arrays, "x": last(arrays["x"]), "y": last(arrays["y"])}, state, json.loads(str(arrays["config"]))


def close(got, want):
    """To 1e-4 of the largest number of each image."""
    for a, b in zip(np.asarray(got), np.asarray(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
    assert np.abs(want).max() > 0.5


@recorded
@pytest.mark.parametrize("name", ["ddpmpp_uncond", "ncsnpp_cond_aug", "adm_cond"])
def test_converted_weights_give_what_edm_computed(name):
    given, state, config = reference(name)
    params, spec = edm.network_parameters(state, preconditioning=None)
    assert spec["channels"] == config["model_channels"] and spec["multipliers"] == tuple(config["channel_mult"])
    assert spec["attention"] == tuple(config["attn_resolutions"]) and spec["classes"] == config["label_dim"]
    module = MODULES[spec.pop("name")](**spec)
    s, augment = jnp.asarray(given["noise_labels"]), given.get("augment_labels")
    cond = given["class_labels"].argmax(1) if spec["classes"] else None
    more = () if augment is None else (augment,)
    apply = jax.jit(module.apply, compiler_options=QUICK)
    close(apply({"params": params}, given["x"], s, s, cond, *more), given["y"])
    assert (params["TwoTimes_0"]["jump"]["kernel"] == 0).all()


@functools.cache
def jitted(**fields):
    """The four preconditioned networks are one."""
    return jax.jit(from_linen(song_unet.SongUNet(**fields)).net, compiler_options=QUICK)


@recorded
@pytest.mark.parametrize("name", ["edm", "vp", "ve", "iddpm"])
def test_preconditioned_networks_give_what_edm_computed(name):
    """As denoisers, and, at the levels that they know, as velocities."""
    given, state, _ = reference(f"precond_{name}precond")
    params, spec = edm.network_parameters(state, preconditioning=name)
    assert spec.pop("preconditioning") == name and spec.pop("name") == "song_unet"
    raw, how, sigma = jitted(**spec), getattr(preconditioning, name)(), jnp.asarray(given["sigma"])
    net = preconditioning.preconditioned(raw, how)
    also = sampling.denoiser(lambda x, t, cond: net(params, x, t, t, cond))(jnp.asarray(given["x"]), sigma)
    known = (sigma >= how.sigma_min) & (sigma <= how.sigma_max)
    assert known.sum() >= 4
    for got, where in (
        (preconditioning.preconditioned_denoiser(raw, how)(params, given["x"], sigma), slice(None)),
        (also, known),
    ):
        for a, b in zip(np.asarray(got[where]), np.asarray(given["y"][where]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def names(*, size, channels, mult, blocks, attention, colours=3, labels=0, augment=0, song=True, ncsn=False, noise=1):
    """The state dict of a network of EDM, name by name; numbers at random."""
    rng, shapes, width = np.random.default_rng(0), {}, 4 * channels
    taps = np.array([1.0, 3, 3, 1] if ncsn else [1.0, 1])
    filters = np.outer(taps, taps)[None, None] / taps.sum() ** 2

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def block(name, i, o, attend=False, resample=False):
        layer(f"{name}.norm0", i)
        layer(f"{name}.conv0", o, i, 3, 3)
        layer(f"{name}.affine", o if song else 2 * o, width)
        layer(f"{name}.norm1", o)
        layer(f"{name}.conv1", o, o, 3, 3)
        if resample:
            shapes[f"{name}.conv0.resample_filter"] = shapes[f"{name}.skip.resample_filter"] = None
        if i != o or (resample and song):
            layer(f"{name}.skip", o, i, 1, 1)
        if attend:
            layer(f"{name}.norm2", o)
            layer(f"{name}.qkv", 3 * o, o, 1, 1)
            layer(f"{name}.proj", o, o, 1, 1)

    seen = noise * channels
    if ncsn:
        shapes["map_noise.freqs"] = (seen // 2,)
    if labels:
        layer("map_label", seen if song else width, labels, bias=song)
    if augment:
        layer("map_augment", seen, augment, bias=False)
    layer("map_layer0", width, seen)
    layer("map_layer1", width, width)
    now = channels if song else channels * mult[0]
    layer(f"enc.{size}x{size}_conv", now, colours, 3, 3)
    skips, pyramid = [now], colours
    for level, m in enumerate(mult):
        r = size >> level
        if level:
            block(f"enc.{r}x{r}_down", now, now, resample=True)
            skips.append(now)
            if ncsn:
                layer(f"enc.{r}x{r}_aux_residual", now, pyramid, 3, 3)
                shapes[f"enc.{r}x{r}_aux_residual.resample_filter"] = None
                pyramid = now
        for i in range(blocks):
            block(f"enc.{r}x{r}_block{i}", now, m * channels, r in attention)
            now = m * channels
            skips.append(now)
    for level, m in reversed(list(enumerate(mult))):
        r = size >> level
        if level == len(mult) - 1:
            block(f"dec.{r}x{r}_in0", now, now, True)
            block(f"dec.{r}x{r}_in1", now, now)
        else:
            block(f"dec.{r}x{r}_up", now, now, resample=True)
        for i in range(blocks + 1):
            block(
                f"dec.{r}x{r}_block{i}", now + skips.pop(), m * channels, r in attention and (not song or i == blocks)
            )
            now = m * channels
    layer(*(("out_norm", now) if not song else (f"dec.{size}x{size}_aux_norm", now)))
    layer("out_conv" if not song else f"dec.{size}x{size}_aux_conv", colours, now, 3, 3)
    draw = lambda shape: filters if shape is None else rng.standard_normal(shape).astype("f")
    return {name: np.float32(draw(shape)) for name, shape in shapes.items()}


TINY = {"size": 8, "channels": 8, "mult": (1, 2), "blocks": 1, "attention": (4,)}
NCSN = {**TINY, "labels": 2, "augment": 9, "ncsn": True, "noise": 2}
ADM = {**TINY, "channels": 32, "mult": (2, 4), "labels": 3, "song": False}


def test_the_published_networks_have_as_many_entries_as_the_names_say():
    """434 of CIFAR-10's NCSN++ with labels, 553 of ImageNet-64's ADM, counted in PyTorch; the widths here are small."""
    sizes = {"channels": 4, "mult": (2, 2, 2), "blocks": 4, "attention": (16,)}
    assert len(names(size=32, **sizes, labels=10, augment=9, ncsn=True, noise=2)) == 434
    sizes = {"channels": 4, "mult": (1, 2, 3, 4), "blocks": 3, "attention": (32, 16, 8)}
    assert len(names(size=64, **sizes, labels=1000, song=False)) == 553


@pytest.mark.parametrize("sizes", [TINY, NCSN, ADM], ids=["ddpm++", "ncsn++", "adm"])
def test_all_of_a_state_dict_has_its_place_with_and_without_a_prefix(sizes):
    state = names(**sizes)
    params, spec = edm.network_parameters({f"model.{name}": a for name, a in state.items()}, dropout=0.2)
    again, same = edm.network_parameters(state, dropout=0.2)
    assert spec == same and spec["preconditioning"] == "edm" and spec["dropout"] == 0.2
    jax.tree.map(np.testing.assert_array_equal, params, again)
    jump = params["TwoTimes_0"]["jump"]["kernel"].size
    null = sizes.get("labels") and not sizes.get("song", True) and 4 * sizes["channels"]
    filters = sum(a.size for name, a in state.items() if "resample_filter" in name)
    count = sum(a.size for a in jax.tree.leaves(params))
    assert count - jump - (null or 0) == sum(a.size for a in state.values()) - filters
    model = build.net(spec)
    labels = jnp.zeros(1, int) if sizes.get("labels") else None
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), labels)
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, params)


@pytest.mark.parametrize("heads", [1, 2])
def test_queries_keys_and_values_are_every_third_channel_of_a_head(heads, key):
    """EDM's formula: ``qkv.reshape(B heads, C / heads, 3, HW)``, softmax of ``q^T k / sqrt(C / heads)``."""
    c, x = 8, np.asarray(jax.random.normal(key, (2, 3, 3, 8)))
    shapes = {"norm2.weight": (c,), "norm2.bias": (c,), "qkv.weight": (3 * c, c, 1, 1), "qkv.bias": (3 * c,)}
    shapes |= {"proj.weight": (c, c, 1, 1), "proj.bias": (c,)}
    rng = np.random.default_rng(0)
    state = {f"b.{name}": rng.standard_normal(shape).astype("f") for name, shape in shapes.items()}
    module = unet.Attention(heads, groups=1)
    got = jax.jit(module.apply)({"params": edm._State(state, "").attention("b", heads)}, jnp.asarray(x))
    y = (x - x.mean((1, 2, 3), keepdims=True)) / np.sqrt(x.var((1, 2, 3), keepdims=True) + 1e-5)
    y = (y * state["b.norm2.weight"] + state["b.norm2.bias"]).transpose(0, 3, 1, 2).reshape(2, c, 9)
    qkv = np.einsum("oc,bcn->bon", state["b.qkv.weight"][:, :, 0, 0], y) + state["b.qkv.bias"][:, None]
    q, k, v = np.moveaxis(qkv.reshape(2 * heads, c // heads, 3, 9), 2, 0)
    w = special.softmax(np.einsum("ncq,nck->nqk", q, k) / np.sqrt(c // heads), -1)
    out = np.einsum("nqk,nck->ncq", w, v).reshape(2, c, 9)
    out = np.einsum("oc,bcn->bon", state["b.proj.weight"][:, :, 0, 0], out) + state["b.proj.bias"][:, None]
    np.testing.assert_allclose(got, x + out.reshape(2, c, 3, 3).transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


def test_labels_are_scaled_and_no_label_is_the_bias():
    """A SongUNet sees ``W onehot sqrt(n) + b``, an ADM ``W onehot``."""
    for sizes, root in ((NCSN, np.sqrt(2)), (ADM, 1.0)):
        state = names(**sizes)
        table = edm.network_parameters(state)[0]["Embed_0"]["embedding"]
        b = state.get("map_label.bias", 0 * state["map_label.weight"][:, 0])
        np.testing.assert_allclose(table[:-1], root * state["map_label.weight"].T + b, rtol=1e-6)
        np.testing.assert_allclose(table[-1], b)


def test_a_learned_variance_is_dropped_with_iddpm_and_refused_without():
    state = names(**TINY)
    for part in ("weight", "bias"):
        name = f"dec.8x8_aux_conv.{part}"
        state[name] = np.concatenate([state[name], 7 + state[name]])
    state["u"] = np.zeros(1001)
    params, spec = edm.network_parameters(state, preconditioning={"name": "iddpm", "steps": 500})
    np.testing.assert_array_equal(params["output"]["bias"], state["dec.8x8_aux_conv.bias"][:3])
    assert spec["preconditioning"] == {"name": "iddpm", "steps": 500}
    with pytest.raises(ValueError, match=r"\['output'\]\['bias'\] has shape \(6,\), and \(3,\)"):
        edm.network_parameters(state)


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        (TINY, lambda s: s.pop("dec.8x8_up.norm0.bias"), "state: 'dec.8x8_up.norm0.bias' is missing"),
        (TINY, lambda s: s.clear(), r"state: 'enc.32x32_conv.weight' is missing \(nothing left\)"),
        (TINY, lambda s: s.update({"enc.4x4_aux_skip.weight": np.zeros((8, 3, 1, 1))}),
         r"state: enc.4x4_aux_skip.weight has no place in SongUNet\(channels=8, multipliers=\(1, 2\)"),
        (ADM, lambda s: s.update({"map_augment.weight": np.zeros((32, 9))}), "map_augment.weight has no place in"),
        (TINY, lambda s: s.update({"enc.4x4_down.skip.resample_filter": np.ones((1, 1, 2, 2))}),
         r"a resampling filter differs from .* \(1, 1\)"),
        (TINY, lambda s: s.update({"map_layer0.weight": np.zeros((32, 12))}), "state: the noise multiplier is 12/8"),
        (TINY, lambda s: s.update({"map_layer1.bias": np.zeros(5)}),
         r"\['mix'\]\['bias'\] has shape \(5,\), and \(32"),
        ({**ADM, "channels": 48, "mult": (1, 1)}, lambda s: None, "state: an ADM .* 48 channels in groups"),
    ],
)  # fmt: skip
def test_what_is_no_such_network_is_refused_by_name(sizes, change, message):
    state = names(**sizes)
    change(state)
    with pytest.raises(ValueError, match=message):
        edm.network_parameters(state)
