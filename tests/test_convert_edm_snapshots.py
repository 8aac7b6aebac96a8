"""Snapshots of EDM: they are read without executing them, and other files are refused.

The tests make snapshots as ``torch_utils.persistence`` does: by the same calls, in modules that replace PyTorch's while
they are pickled.
"""

import contextlib
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest
from test_convert_edm import NCSN, TINY, names
from test_convert_weights import Calls, number, text

from fmjax.convert import edm
from fmjax.experiments import specs
from fmjax.nets import preconditioning


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
    got, how = edm.read_snapshot("a.pkl")
    assert how == {"preconditioning": {"name": "edm", "sigma_data": 0.5}, "dropout": 0.13}
    assert set(got) == {f"model.{name}" for name in state}
    for name, a in state.items():
        np.testing.assert_array_equal(got[f"model.{name}"], a)
    assert os.listdir() == ["a.pkl"]
    params, spec = edm.network_parameters(got, **how)
    want, same = edm.network_parameters(state, dropout=0.13)
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
    how = edm.read_snapshot(tmp_path / "a.pkl")[1]["preconditioning"]
    assert how == want
    name = how.pop("name")
    default = getattr(preconditioning, name)()
    built = specs.call(getattr(preconditioning, name), how, field="preconditioning")
    assert (built.sigma_min, built.sigma_max) == (default.sigma_min, default.sigma_max)


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
def test_a_snapshot_that_names_another_function_is_refused_unexecuted(call, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.pkl").write_bytes(snapshot({"w": np.zeros(1)}, evil=call))
    with pytest.raises(ValueError, match=f"a.pkl cannot be read as weights: it names {name}, which does not rebuild"):
        edm.read_snapshot("a.pkl")
    assert os.listdir() == ["a.pkl"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"net": 1}), "not a snapshot of EDM, it holds no ema"),
        (pickle.dumps([1]), "not a snapshot of EDM, it holds no ema"),
        (pickle.dumps({"ema": {"class": "Generator"}}), "an ema of class 'Generator'. Known are EDMPrecond"),
        (pickle.dumps({"ema": {"class": "EDMPrecond"}}), "its network lacks '_parameters'"),
        (pickle.dumps({"ema": {"class": "EDMPrecond", "_parameters": 3}}), "not a snapshot of EDM"),
        (b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R.", "cannot be read as weights"),
        (b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\nN\x85R.", "cannot be read as weights"),
        (b"\x80\x02cnumpy\ndtype\n" + text("O8") + b"\x85R.", "a numpy number of type 'O8'"),
        (b"\x80\x02cnumpy\ndtype\n" + text("f8") + b"\x85R(K\x03" + text(">") + b"tb.", "big-endian"),
        (b"\x80\x02ctorch.nn.modules.container\nModuleDict\n)\x81}(" + text("a") + b"h\x00ub.", "cannot be read"),
        (b"\x80\x02ctorch.nn.modules.container\nModuleDict\nN}" + text("update") + b"Ns\x86b.", "cannot be read"),
    ],
)
def test_a_pickle_of_something_else_is_refused(data, message, tmp_path):
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        edm.read_snapshot(tmp_path / "a.pkl")
    assert "update" not in vars(edm._Modules)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_snapshot_is_refused(fraction, tmp_path):
    data = snapshot(names(**TINY))
    (tmp_path / "a.pkl").write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        edm.read_snapshot(tmp_path / "a.pkl")
