"""Which entry of a checkpoint is its network, and the names of its tensors."""

import functools
import json
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_convert_edm import NCSN, TINY, names
from test_convert_edm_snapshots import snapshot
from test_convert_torchcfm import FILE, RECORDED, draw
from test_convert_weights import FOUR, archive, number, text

from fmjax.convert import edm, parts, torchcfm, weights
from fmjax.experiments import convert

EDM = {"map_layer0.weight": np.ones((2, 2), np.float32)}
UNET = {"time_embed.0.weight": np.ones((2, 2), np.float32)}
TABLE = {"exp_avg": np.ones(3)}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (EDM, None),
        ({"model": EDM}, "model"),
        ({"model": EDM, "sigma": np.ones(3)}, "model"),
        ({"model": EDM, "sigma": np.ones(3), "optimizer": TABLE, "epoch": 3}, "model"),
        ({"anything": UNET, "optimizer": {"state": {0: TABLE}}}, "anything"),
        ({"net_model": EDM, "ema_model": EDM, "step": 7}, "ema_model"),
        ({"ema_model": UNET}, "ema_model"),
        ({**EDM, "step": np.array(3)}, None),
        ({"a/b": np.ones(2)}, None),
        ({"state_dict": {"layer.weight": np.ones(2)}}, "state_dict"),
        ({"ema": {"module": EDM}, "epoch": 3}, "ema.module"),
        ({"run": {"state": {"model": EDM}}, "optimizer": {"state": {0: TABLE}}}, "run.state.model"),
    ],
)
def test_the_only_network_of_a_checkpoint_is_taken(content, part):
    state, taken = parts.state_dict(content)
    assert taken == part
    expected = content if part is None else functools.reduce(lambda entry, name: entry[name], part.split("."), content)
    assert state.keys() == expected.keys() and all(state[name] is expected[name] for name in state)


@pytest.mark.parametrize("averaged", ["model_ema", "net_ema", "state_dict_ema", "ema_state_dict", "ema", "average"])
@pytest.mark.parametrize("raw", ["model", "net", "state_dict"])
def test_a_choice_between_raw_and_averaged_weights_is_the_users(raw, averaged):
    content = {raw: EDM, averaged: EDM, "step": 7}
    with pytest.raises(ValueError, match=f"part=None: .*several networks, {raw}, {averaged}. Give one .* --part"):
        parts.state_dict(content)
    assert parts.state_dict(content, part=averaged)[0]["map_layer0.weight"] is EDM["map_layer0.weight"]
    assert parts.state_dict(content, part=averaged)[1] == averaged


@pytest.mark.parametrize(
    ("content", "part", "message"),
    [
        ([1], None, "the file has no state dict"),
        ({}, None, "the file has no state dict"),
        ({"epoch": 3, "optimizer": {"state": {}}}, None, "the file has no state dict"),
        ({**EDM, "ema": EDM}, None, "several networks, the file itself, ema"),
        ({"a": TABLE, "b": TABLE}, None, "several networks, a, b"),
        ({"model": EDM, "ema": {"module": {**EDM}}}, None, "several networks, model, ema.module"),
        ({"ema": {"shadow": {**EDM}, "decay": 0.999}, "model": EDM}, None, "several networks, model, ema.shadow"),
        ({"model": EDM}, "optim", "part='optim': .*it has model"),
        ({"n" * 10**6: EDM, "m" * 10**6: EDM}, None, "several networks, n{40}, m{40}"),
    ],
)
def test_a_file_without_one_network_is_refused(content, part, message):
    with pytest.raises(ValueError, match=message) as caught:
        parts.state_dict(content, part=part)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.net.",
        "ema_model.module.",
        "_fsdp_wrapped_module.",
    ],
)
def test_prefixes_of_wrappers_are_dropped(prefix):
    """From DataParallel, torch.compile, both in either order, and Lightning; a counter of AveragedModel beside them."""
    state = names(**TINY)
    wrapped = {f"{prefix}{name}": a for name, a in state.items()} | {"n_averaged": np.array(7)}
    assert parts.network_kind(wrapped) == "edm"
    expected, spec = edm.network_parameters(state)
    params, same = edm.network_parameters(wrapped)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert spec == same


def test_prefixes_of_torchcfm_networks_are_dropped():
    with np.load(FILE) as file:
        state = draw(json.loads(str(file["labels shapes"])))
    expected, _ = torchcfm.unet(state, size=8)
    wrapped = {f"module._orig_mod.{name}": a for name, a in state.items()}
    jax.tree.map(np.testing.assert_array_equal, torchcfm.unet(wrapped, size=8)[0], expected)
    assert "labels" in RECORDED and parts.network_kind(wrapped) == "torchcfm"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_refused(value, dtype, tmp_path):
    state = names(**TINY)
    name = next(name for name in state if name.endswith("conv0.weight"))
    state[name] = state[name].astype(dtype)
    state[name].flat[3] = value
    weights.write(tmp_path / "a.safetensors", state)
    with pytest.raises(ValueError, match=f"a.safetensors: state: .*{name} has values that are not finite"):
        convert.convert_file(tmp_path / "a.safetensors", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_the_part_that_was_taken_is_printed(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.pt").touch()
    whole = {"model": names(**TINY), "model_ema": names(**TINY), "sigma": np.ones(3)}
    monkeypatch.setattr(weights, "read_weights", lambda path: whole)
    run = {"source": str(tmp_path / "a.pt"), "workdir": str(tmp_path / "w")}
    with pytest.raises(ValueError, match="a.pt: part=None: the file has several networks, model, model_ema"):
        convert.main(**run)
    convert.main(**run, part="model_ema")
    assert "they were taken from part model_ema of a.pt" in capsys.readouterr().out


def test_a_file_that_names_code_outside_is_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ran.py").write_text("open('ran', 'w')\ndef factory(): ...\n")
    for place in ("ran.py:factory", "os:getcwd", "ran:factory"):
        extra = {"format": "fmjax", "net": json.dumps({"name": place}), "classes": "0"}
        weights.write("a.safetensors", {"a/b": np.ones(2, np.float32)}, metadata=extra)
        with pytest.raises(ValueError, match="a.safetensors.*code outside fmjax"):
            convert.convert_file("a.safetensors", "w")
    assert not (tmp_path / "ran").exists()


def test_entries_that_torch_allows_are_read(tmp_path):
    """What ``torch.load(weights_only=True)`` reads: devices, dtypes, sets, counters, bytes, storages."""
    untyped = (
        b"(" + text("storage") + b"ctorch.storage\nUntypedStorage\n" + text("_0") + text("cpu") + number(16) + b"tQ"
    )
    typed = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("_0") + text("cpu") + number(4) + b"tQ"
    whole = b"K\0(K\4t(K\1t\x89N"
    entries = {
        "device": b"ctorch\ndevice\n" + text("cuda") + b"K\1\x86R",
        "cpu": b"ctorch\ndevice\n" + text("cpu") + b"\x85R",
        "dtype": b"ctorch\nfloat16\n",
        "set": b"c__builtin__\nset\n]" + text("a") + b"a\x85R",
        "counter": b"ccollections\nCounter\n}" + text("a") + b"K\3s\x85R",
        "bytes": b"c_codecs\nencode\n" + text("a\u00ff") + text("latin1") + b"\x86R",
        "bytearray": b"c__builtin__\nbytearray\nc_codecs\nencode\n" + text("ab") + text("latin1") + b"\x86R\x85R",
        "complex": b"c__builtin__\ncomplex\nG?\xf0\0\0\0\0\0\0G@\0\0\0\0\0\0\0\x86R",
        "size": b"ctorch\nSize\n(K\2K\3t\x85R",
        "v3": b"ctorch._utils\n_rebuild_tensor_v3\n(" + untyped + whole + b"ctorch\nfloat32\ntR",
        "v1": b"ctorch._utils\n_rebuild_tensor\n(" + typed + b"K\0(K\4t(K\1ttR",
        "state": b"ctorch._utils\n_rebuild_parameter_with_state\n(ctorch._utils\n_rebuild_tensor_v2\n("
        + typed + whole + b"tR\x88N}tR",
        "subclass": b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n("
        + typed + whole + b"t}tR",
        "ordered": b"ccollections\nOrderedDict\n)R(" + text("w") + b"K\1u}" + text("_metadata") + b"Nsb",
        "frozen": b"\x80\x04(" + text("a") + b"\x91",
    }  # fmt: skip
    entries = {name: body.replace(text("a\u00ff"), b"X\x03\0\0\0a\xc3\xbf") for name, body in entries.items()}
    program = b"\x80\x02}(" + b"".join(text(name) + body for name, body in entries.items()) + b"u."
    got = weights.read_weights(archive(tmp_path / "a.pt", program, _0=FOUR))
    for name in ("v3", "v1", "state", "subclass"):
        np.testing.assert_array_equal(got.pop(name), np.arange(4, dtype=np.float32))
    assert got == {
        "device": "cuda:1", "cpu": "cpu", "dtype": "torch.float16", "set": {"a"}, "counter": {"a": 3},
        "bytes": b"a\xff", "bytearray": b"ab", "complex": 1 + 2j, "size": (2, 3), "ordered": {"w": 1},
        "frozen": frozenset({"a"}),
    }  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol_are_read(protocol, tmp_path):
    value = {
        "text": "caf\u00e9\n\U0001f600", "numbers": [0, 1, -1, 255, 256, 2**31, -(2**40), 2**70, True, False, None],
        "floats": (0.5, -1e300, float("inf")), 3: (), "nested": [[], {}, ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))],
        "set": {1, 2}, "again": None,
    }  # fmt: skip
    value["again"] = value["nested"]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol))
    got = weights.read_weights(tmp_path / "a.pkl")
    assert got == value and got["again"] is got["nested"]


def test_a_storage_seen_as_another_type_is_the_same_bytes(tmp_path):
    see = lambda kind, count: (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage") + f"ctorch\n{kind}\n".encode() + text("_0") + text("cpu") + number(count) + b"tQK\0("
        + number(count) + b"t(K\1t\x89NtR"
    )  # fmt: skip
    program = (
        b"\x80\x02]" + see("FloatStorage", 4) + b"a" + see("IntStorage", 4) + b"a" + see("ByteStorage", 16) + b"a."
    )
    floats, integers, octets = weights.read_weights(archive(tmp_path / "a.pt", program, _0=FOUR))
    np.testing.assert_array_equal(floats, [0, 1, 2, 3])
    np.testing.assert_array_equal(integers, np.arange(4, dtype=np.float32).view(np.int32))
    assert octets.tobytes() == FOUR


def test_an_average_of_a_snapshot_is_read_whatever_its_modules_share(tmp_path):
    state = names(**NCSN)
    (tmp_path / "a.pkl").write_bytes(snapshot(state))
    got, _ = edm.read_snapshot(tmp_path / "a.pkl")
    assert len(got) == len(state)
    assert jnp.isfinite(jnp.concatenate([jnp.ravel(a) for a in got.values()])).all()
