"""EDM's networks: converted weights compute what PyTorch computed, and a snapshot is read without executing it.

Reference outputs are those of ``../shared/parity`` (tiny networks of NVlabs/edm, run in PyTorch); where that folder is
absent those tests are skipped. Snapshots are made here as ``torch_utils.persistence`` makes them: the same calls, in
modules that stand for PyTorch's while they are pickled.
"""

import contextlib
import functools
import json
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from test_convert_weights import Calls, number, text

from fmjax import build
from fmjax.convert import edm
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
    params, spec = edm.network(state, preconditioning=None)
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
    params, spec = edm.network(state, preconditioning=name)
    assert spec.pop("preconditioning") == name and spec.pop("name") == "song_unet"
    raw, how, sigma = jitted(**spec), getattr(preconditioning, name)(), jnp.asarray(given["sigma"])
    net = preconditioning.preconditioned(raw, how)
    also = preconditioning.from_velocity(lambda x, t, cond: net(params, x, t, t, cond))(given["x"], sigma)
    known = (sigma >= how.sigma_min) & (sigma <= how.sigma_max)
    assert known.sum() >= 4
    for got, where in ((preconditioning.denoiser(raw, how)(params, given["x"], sigma), slice(None)), (also, known)):
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
    params, spec = edm.network({f"model.{name}": a for name, a in state.items()}, dropout=0.2)
    again, same = edm.network(state, dropout=0.2)
    assert spec == same and spec["preconditioning"] == "edm" and spec["dropout"] == 0.2
    jax.tree.map(np.testing.assert_array_equal, params, again)
    jump = params["TwoTimes_0"]["jump"]["kernel"].size
    null = sizes.get("labels") and not sizes.get("song", True) and 4 * sizes["channels"]
    filters = sum(a.size for name, a in state.items() if "resample_filter" in name)
    count = sum(a.size for a in jax.tree.leaves(params))
    assert count - jump - (null or 0) == sum(a.size for a in state.values()) - filters
    model = build.net(spec)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1, int))
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
        table = edm.network(state)[0]["Embed_0"]["embedding"]
        b = state.get("map_label.bias", 0 * state["map_label.weight"][:, 0])
        np.testing.assert_allclose(table[:-1], root * state["map_label.weight"].T + b, rtol=1e-6)
        np.testing.assert_allclose(table[-1], b)


def test_a_learned_variance_is_dropped_with_iddpm_and_refused_without():
    state = names(**TINY)
    for part in ("weight", "bias"):
        name = f"dec.8x8_aux_conv.{part}"
        state[name] = np.concatenate([state[name], 7 + state[name]])
    state["u"] = np.zeros(1001)
    params, spec = edm.network(state, preconditioning={"name": "iddpm", "steps": 500})
    np.testing.assert_array_equal(params["output"]["bias"], state["dec.8x8_aux_conv.bias"][:3])
    assert spec["preconditioning"] == {"name": "iddpm", "steps": 500}
    with pytest.raises(ValueError, match=r"\['output'\]\['bias'\] has shape \(6,\) here and \(3,\)"):
        edm.network(state)


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        (TINY, lambda s: s.pop("dec.8x8_up.norm0.bias"), "EDM's U-Nets: it has no 'dec.8x8_up.norm0.bias'"),
        (TINY, lambda s: s.clear(), r"it has no 'enc.32x32_conv.weight' \(nothing left\)"),
        (TINY, lambda s: s.update({"enc.4x4_aux_skip.weight": np.zeros((8, 3, 1, 1))}),
         r"more than EDM's U-Nets: enc.4x4_aux_skip.weight has no place in SongUNet\(channels=8, multipliers=\(1, 2\)"),
        (ADM, lambda s: s.update({"map_augment.weight": np.zeros((32, 9))}), "map_augment.weight has no place in"),
        (TINY, lambda s: s.update({"enc.4x4_down.skip.resample_filter": np.ones((1, 1, 2, 2))}),
         r"is not the one of whole weights \(1, 1\)"),
        (TINY, lambda s: s.update({"map_layer0.weight": np.zeros((32, 12))}), "the noise multiplier of .* is 12/8"),
        (TINY, lambda s: s.update({"map_layer1.bias": np.zeros(5)}),
         r"\['mix'\]\['bias'\] has shape \(5,\) here and \(32"),
        ({**ADM, "channels": 48, "mult": (1, 1)}, lambda s: None, "is no ADM with .* 48 channels in groups"),
    ],
)  # fmt: skip
def test_what_is_no_such_network_is_refused_by_name(sizes, change, message):
    state = names(**sizes)
    change(state)
    with pytest.raises(ValueError, match=message):
        edm.network(state)


class Tensor:
    """A tensor as PyTorch pickles one: its storage by ``_load_from_bytes``, the former format of ``torch.save``."""

    def __init__(self, array, parameter):
        self.array, self.parameter = array, parameter

    def __reduce__(self):
        torch, a = sys.modules["torch"], np.ascontiguousarray(self.array, "<f4")
        strides = tuple(n // 4 for n in a.strides)
        tensor = (torch._utils._rebuild_tensor_v2, (Storage(a), 0, a.shape, strides, False, OrderedDict()))
        if not self.parameter:
            return tensor
        return torch._utils._rebuild_parameter, (Tensor(a, False), False, OrderedDict())


class Storage:
    """The elements of a tensor."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, machine))
        kind = b"(" + text("storage") + b"ctorch\nFloatStorage\n"
        body = b"\x80\x02" + kind + text("94") + text("cpu") + number(self.array.size) + b"NtQ."
        tail = pickle.dumps(["94"], 2) + self.array.size.to_bytes(8, "little") + self.array.tobytes()
        return sys.modules["torch"].storage._load_from_bytes, (head + body + tail,)


class Persistent:
    """An object of a class with its source code, which would leave a file where it is executed."""

    def __init__(self, name, state):
        self.name, self.state = name, state

    def __reduce__(self):
        source = "open('ran', 'w').close()\nimport torch\n"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": self.name, "state": self.state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


@contextlib.contextmanager
def stood_in():
    """Modules by whose names a pickle of PyTorch calls; nothing of them is called here."""
    called = {
        "torch": (), "torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter"),
        "torch.storage": ("_load_from_bytes",),
        "torch_utils": (), "torch_utils.persistence": ("_reconstruct_persistent_obj",),
        "torch.nn": (), "torch.nn.modules": (), "torch.nn.modules.container": ("ModuleDict",),
    }  # fmt: skip
    made = {}
    for module, functions in called.items():
        made[module] = types.ModuleType(module)
        parent, _, name = module.rpartition(".")
        if parent:
            setattr(made[parent], name, made[module])
        for function in functions:
            what = type(function, (), {}) if function == "ModuleDict" else lambda *_: None
            what.__module__, what.__qualname__ = module, function
            setattr(made[module], function, what)
    with pytest.MonkeyPatch.context() as patch:
        for module, stand_in in made.items():
            patch.setitem(sys.modules, module, stand_in)
        yield made["torch.nn.modules.container"].ModuleDict


def module(parameters=None, buffers=None, modules=None, **fields):
    """The state of a ``torch.nn.Module``."""
    hooks = {f"_{when}_hooks": OrderedDict() for when in ("backward", "forward", "forward_pre", "state_dict")}
    parts = {"_parameters": parameters or {}, "_buffers": buffers or {}, "_modules": modules or {}}
    return {"training": False, "_non_persistent_buffers_set": set(), **hooks, **map_ordered(parts), **fields}


def map_ordered(parts):
    return {name: OrderedDict(part) for name, part in parts.items()}


def snapshot(state, *, kind="EDMPrecond", protocol=4, given=(), **extra):
    """The bytes of a snapshot whose averaged network has this state dict; ``extra`` goes into its state."""
    tree: dict = {}
    for name, a in state.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = a
    with stood_in() as dictionary:

        def made(node, name="Conv2d", **fields):
            arrays = {key: a for key, a in node.items() if not isinstance(a, dict)}
            buffers = {key: Tensor(a, False) for key, a in arrays.items() if key in ("resample_filter", "freqs", "u")}
            parameters = {key: Tensor(a, True) for key, a in arrays.items() if key not in buffers} | {"none": None}
            inner = {key: made(value, scale=np.sqrt(0.5)) for key, value in node.items() if isinstance(value, dict)}
            for key in {"enc", "dec"} & inner.keys():
                inner[key] = dictionary()
                inner[key].__dict__.update(module(modules={k: made(v, "UNetBlock") for k, v in node[key].items()}))
            kept = {"_init_args": (), "_init_kwargs": {"init_attn": {"init_weight": np.sqrt(0.2)}}, **fields}
            return Persistent(name, module(parameters, buffers, inner, **kept))

        model = made(tree, "SongUNet", _init_kwargs={"model_channels": 8, "dropout": 0.13}, map_label=None)
        fields = {
            "sigma_min": 0,
            "sigma_max": float("inf"),
            "sigma_data": 0.5,
            "img_resolution": 8,
            **dict(given),
            **extra,
        }
        loss = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5})
        whole = {"ema": Persistent(kind, module(modules={"model": model}, **fields)), "loss_fn": loss}
        whole |= {"augment_pipe": Persistent("AugmentPipe", {"p": 0.12}), "dataset_kwargs": {"path": "cifar10.zip"}}
        return pickle.dumps(whole, protocol)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_snapshot_is_read_and_its_source_is_not_executed(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = names(**NCSN)
    Path("a.pkl").write_bytes(snapshot(state, protocol=protocol))
    got, how = edm.read("a.pkl")
    assert how == {"preconditioning": {"name": "edm", "sigma_data": 0.5}, "dropout": 0.13}
    assert set(got) == {f"model.{name}" for name in state}
    for name, a in state.items():
        np.testing.assert_array_equal(got[f"model.{name}"], a)
    assert os.listdir() == ["a.pkl"]
    params, spec = edm.network(got, **how)
    want, same = edm.network(state, dropout=0.13)
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert spec == {**same, "preconditioning": how["preconditioning"]}


@pytest.mark.parametrize(
    ("kind", "given", "want"),
    [
        ("VPPrecond", {"beta_min": 0.1, "beta_d": 19.9, "M": 1000, "epsilon_t": 1e-5},
         {"name": "vp", "beta_min": 0.1, "beta_d": 19.9, "steps": 1000, "epsilon": 1e-5}),
        ("VEPrecond", {"sigma_min": 0.02, "sigma_max": 100}, {"name": "ve", "sigma_min": 0.02, "sigma_max": 100}),
        ("iDDPMPrecond", {"M": 1000, "C_1": 0.001, "C_2": 0.008},
         {"name": "iddpm", "steps": 1000, "least_ratio": 0.001, "shift": 0.008}),
    ],
)  # fmt: skip
def test_a_snapshot_tells_its_preconditioning(kind, given, want, tmp_path):
    (tmp_path / "a.pkl").write_bytes(snapshot({"w": np.zeros(1)}, kind=kind, given=given))
    how = edm.read(tmp_path / "a.pkl")[1]["preconditioning"]
    assert how == want
    name = how.pop("name")
    default = getattr(preconditioning, name)()
    made = build.call(getattr(preconditioning, name), how)
    assert (made.sigma_min, made.sigma_max) == (default.sigma_min, default.sigma_max)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Calls(os.system, "touch ran"), "(posix|nt).system"),
        (Calls(eval, "open('ran', 'w')"), "builtins.eval"),
        (Calls(getattr, "x", "upper"), "builtins.getattr"),
        (Calls(exec, Calls(os.system, "touch ran")), "builtins.exec"),
        (Calls(__import__, "os"), "builtins.__import__"),
        (Calls(np.ndarray, (3,)), "numpy.ndarray"),
        (Persistent("Conv2d", Calls(os.system, "touch ran")), "(posix|nt).system"),
        (Persistent(Calls(os.system, "touch ran"), {}), "(posix|nt).system"),
    ],
)
def test_a_snapshot_that_asks_for_anything_else_is_refused_by_name_and_nothing_runs(call, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.pkl").write_bytes(snapshot({"w": np.zeros(1)}, evil=call))
    with pytest.raises(ValueError, match=f"a.pkl cannot be read as weights: it asks for {name}, which is not among"):
        edm.read("a.pkl")
    assert os.listdir() == ["a.pkl"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"net": 1}), "it holds no ema"),
        (pickle.dumps([1]), "it holds no ema"),
        (pickle.dumps({"ema": {"class": "Generator"}}), "an ema of class 'Generator', and known are EDMPrecond"),
        (pickle.dumps({"ema": {"class": "EDMPrecond"}}), "its network lacks '_parameters'"),
        (pickle.dumps({"ema": {"class": "EDMPrecond", "_parameters": 3}}), "no snapshot of EDM"),
        (b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R.", "cannot be read as weights"),
        (b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\nN\x85R.", "cannot be read as weights"),
        (b"\x80\x02cnumpy\ndtype\n" + text("O8") + b"\x85R.", "a number of numpy's type 'O8'"),
        (b"\x80\x02cnumpy\ndtype\n" + text("f8") + b"\x85R(K\x03" + text(">") + b"tb.", "big-endian"),
        (b"\x80\x02ctorch.nn.modules.container\nModuleDict\n)\x81}(" + text("a") + b"h\x00ub.", "cannot be read"),
        (b"\x80\x02ctorch.nn.modules.container\nModuleDict\nN}" + text("update") + b"Ns\x86b.", "cannot be read"),
    ],
)
def test_a_pickle_of_something_else_is_refused(data, message, tmp_path):
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        edm.read(tmp_path / "a.pkl")
    assert "update" not in vars(edm._Modules)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_snapshot_is_refused(share, tmp_path):
    data = snapshot(names(**TINY))
    (tmp_path / "a.pkl").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        edm.read(tmp_path / "a.pkl")
