"""Convert EDM's networks, SongUNet and DhariwalUNet, from pickles that are read without executing them.

EDM (NVlabs/edm) pickles its networks with their source code, which unpickling executes. Here a function that only keeps
the class name and the state of an object replaces that code. The weights have the licence CC BY-NC-SA 4.0; converted
weights have it, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from fmjax.convert import weights
from fmjax.convert.budgets import Fixed
from fmjax.convert.states import StateDict, damage
from fmjax.nets.song_unet import SongUNet
from fmjax.nets.unet import UNet, groups_of
from fmjax.storage import untrusted
from fmjax.types import Params

# EDM's preconditioners: name and options in nets.preconditioning
PRECONDITIONERS = {
    "EDMPrecond": ("edm", {"sigma_data": "sigma_data"}),
    "VPPrecond": ("vp", {"beta_min": "beta_min", "beta_d": "beta_d", "M": "steps", "epsilon_t": "epsilon"}),
    "VEPrecond": ("ve", {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
    "iDDPMPrecond": ("iddpm", {"M": "steps", "C_1": "least_ratio", "C_2": "shift"}),
}


MOST = 10_000  # modules, and tensors, of a network


class _Modules(dict):
    """The state of a ``torch.nn.ModuleDict``."""

    def __setstate__(self, state):
        self.update(state)


class _Dtype(Fixed):
    """The type of a numpy number, little-endian; a pickle cannot change it."""

    __slots__ = ("kind",)

    def __init__(self, kind: str, *_):
        if kind not in ("f8", "f4", "i8", "i4", "b1"):
            raise ValueError(f"it holds a numpy number of type {kind!r}, which is not read here")
        self.kind = np.dtype(kind).newbyteorder("<")

    def __setstate__(self, state):
        if state[1] not in ("<", "|"):
            raise ValueError("it was written on a big-endian machine, and this reader is for little-endian files")


def _persistent(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an object of ``torch_utils.persistence`` with its class name, without its source code."""
    state = meta["state"]
    if type(state) is not dict:
        raise ValueError("it holds a module whose state is not a dictionary")
    state["class"] = meta["class_name"]
    return state


def _number(dtype: _Dtype, data: bytes) -> int | float | bool:
    return np.frombuffer(data, dtype.kind, 1)[0].item()


STAND_INS = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.nn.modules.container.ModuleDict": _Modules,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}


def read_snapshot(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the averaged network of a snapshot of EDM.

    Args:
        path: the pickle.

    Returns:
        ``(state, options)``: the state dict of the ``ema`` module, and its preconditioning and dropout, so that
        ``network_parameters(state, **options)`` converts it.

    Raises:
        ValueError: the file cannot be read (``weights.read_weights``), or holds something else.
    """
    content = weights.read_weights(path, extra=STAND_INS)
    module = content.get("ema") if isinstance(content, dict) else None
    name = module.get("class") if isinstance(module, dict) else None
    if not isinstance(name, str) or name not in PRECONDITIONERS:
        ema = f"an ema of class {name[:40]!r}" if isinstance(name, str) else "no ema"
        raise _other(path, f"it holds {ema}. Known are {', '.join(PRECONDITIONERS)}")
    try:
        state = _state_dict(module)
        ours, attributes = PRECONDITIONERS[name]
        options = {option: _finite(module[theirs]) for theirs, option in attributes.items()}
        dropout = _finite(module["_modules"]["model"]["_init_kwargs"].get("dropout", 0.1))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _other(path, f"its network lacks {error}") from error
    return state, {"preconditioning": {"name": ours, **options}, "dropout": dropout}


def _other(path: str | Path, problem: str) -> ValueError:
    line = f"{untrusted.short_path(path)}: not a snapshot of EDM, {untrusted.one_line(problem, 150)}."
    return ValueError(untrusted.one_line(line))


def _finite(value: Any) -> int | float:
    if type(value) not in (int, float) or not -1e12 < value < 1e12:
        raise ValueError("a finite number among its options")
    return value


def _state_dict(module: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a module and of the modules in it, by the names of the state dict.

    A module that is used in several places has several names; modules and arrays together are at most ``MOST``.
    """
    state, left, count = {}, [("", module)], 0
    while left:
        prefix, inner = left.pop()
        parts = [*inner["_parameters"].items(), *inner["_buffers"].items()]
        modules = inner["_modules"]
        count += 1 + len(parts) + len(modules)
        if count > MOST or len(prefix) > 500 or any(type(name) is not str for name in (*dict(parts), *modules)):
            raise ValueError(f"a bound: it has more than {MOST} modules or names that are too long")
        for name, a in parts:
            if isinstance(a, np.ndarray):
                state[f"{prefix}{name[:100]}"] = a
            elif a is not None:
                raise ValueError("tensors: it has other parameters")
        left += [(f"{prefix}{name[:100]}.", part) for name, part in reversed(modules.items()) if part is not None]
    return state


def network_parameters(
    state: Mapping[str, Any], *, preconditioning: Any = "edm", dropout: float = 0.0
) -> tuple[Params, dict[str, Any]]:
    """Convert a state dict of EDM's network.

    The jump starts at zero. EDM's zero label becomes the null label; for an ADM a row of zeros is added. A learned
    variance (``"iddpm"``) is dropped.

    Args:
        state: arrays by the names of the state dict; they determine the sizes. Prefixes of wrappers (``model.``,
            ``module.``, ``_orig_mod.``) are dropped.
        preconditioning: a spec of ``nets.preconditioning``, as which the network was trained; ``None``: the network
            without a preconditioner.
        dropout: dropout of the network, in training.

    Returns:
        ``(params, spec)``: the network of the config ``net = spec`` (``classes`` included) with ``params`` is EDM's
        denoiser, as a velocity on its diagonal.

    Raises:
        ValueError: a tensor is missing, left over (a decoder or an encoder of skips, an ADM of augmentations), or of
            another shape.
    """
    with damage("EDM's U-Nets"):
        return _network(_State(state, "EDM's U-Nets"), preconditioning, dropout)


def _network(state: _State, preconditioning: Any, dropout: float) -> tuple[Params, dict[str, Any]]:
    state.left.pop("u", None)  # the levels of iDDPM, which follow from its options
    adm = "out_norm.weight" in state
    size, fields = _fields(state, adm)
    module: nn.Module = UNet(**fields, dropout=dropout) if adm else SongUNet(**fields, dropout=dropout)
    params = {**_mapping(state, module), **_blocks(state, module, size)}
    if not isinstance(preconditioning, str | None):
        preconditioning = dict(preconditioning)
    if (preconditioning.get("name") if isinstance(preconditioning, dict) else preconditioning) == "iddpm":
        params["output"] = {name: a[..., : a.shape[-1] // 2] for name, a in params["output"].items()}
    params = state.checked(module, params, size)
    spec = {"name": "unet" if adm else "song_unet", **fields, "dropout": dropout}
    return params, spec if preconditioning is None else {**spec, "preconditioning": preconditioning}


class _State(StateDict):
    """A state dict whose blocks become parameters of ``unet.Block`` (``film``) or ``song_unet.Block``."""

    def block(self, name: str, film: bool) -> Params:
        p = {"GroupNorm_0": self.norm(f"{name}.norm0"), "first": self.conv(f"{name}.conv0")}
        p["film" if film else "shift"] = self.dense(f"{name}.affine")
        p |= {"GroupNorm_1": self.norm(f"{name}.norm1"), "second": self.conv(f"{name}.conv1")}
        return p | ({"skip": self.dense(f"{name}.skip")} if f"{name}.skip.weight" in self else {})

    def attention(self, name: str, heads: int) -> Params:
        """Return an attention, its ``qkv`` reordered from (head, channel, 3) to (3, head, channel)."""
        qkv = self.dense(f"{name}.qkv")
        for key, a in qkv.items():
            parts = a.reshape(*a.shape[:-1], heads, -1, 3)
            qkv[key] = np.moveaxis(parts, -1, -3).reshape(a.shape)
        return {"GroupNorm_0": self.norm(f"{name}.norm2"), "qkv": qkv, "out": self.dense(f"{name}.proj")}


def _fields(state: _State, adm: bool) -> tuple[int, dict[str, Any]]:
    """The height of the images, and the fields that a state dict determines: all but the dropout."""
    first = [match for name in state.left if (match := re.fullmatch(r"enc\.(\d{1,4})x\1_conv\.weight", name))]
    if len(first) != 1:
        state.shape("enc.32x32_conv.weight")  # raises
    size = int(first[0][1])
    channels = state.shape("map_layer0.weight")[1] if adm else state.shape(first[0][0])[0]
    levels = 1
    while f"enc.{size >> levels}x{size >> levels}_down.norm0.weight" in state:
        levels += 1
    heights = [size >> level for level in range(levels)]
    blocks = 0
    while f"enc.{size}x{size}_block{blocks}.norm0.weight" in state:
        blocks += 1
    widths = [state.shape(f"enc.{r}x{r}_block0.conv0.weight")[0] for r in heights]
    noise = state.shape("map_layer0.weight")[1]
    for name, value in [("a channel multiplier", w) for w in widths] + [("the noise multiplier", noise)]:
        if value % channels:
            raise ValueError(f"state: {name} is {value}/{channels}, not a whole number. fmjax cannot represent it.")
    fields: dict[str, Any] = {
        "channels": channels,
        "multipliers": tuple(w // channels for w in widths),
        "blocks": blocks,
        "attention": tuple(r for r in heights if f"enc.{r}x{r}_block0.qkv.weight" in state),
        "classes": state.shape("map_label.weight")[1] if "map_label.weight" in state else 0,
    }
    taps = _taps(state)
    if adm:
        norms = [a.size for name, a in state.left.items() if re.search(r"norm\d?\.weight$", name)]
        odd = [c for c in norms if groups_of(c, 4) != min(32, c // 4)]
        if odd or taps != (1, 1):
            raise ValueError(
                f"state: an ADM with the filter {taps} and {odd[0] if odd else 0} channels in groups. "
                "fmjax's U-Net has the filter (1, 1) and a power of two as the number of groups."
            )
        return size, {**fields, "head_channels": 64, "spectrum": "slow", "resample": "block"}
    return size, fields | {
        "embedding": "fourier" if "map_noise.freqs" in state else "positional",
        "noise": noise // channels,
        "encoder": "residual" if any("aux_residual" in name for name in state.left) else "standard",
        "taps": taps,
        "augment": state.shape("map_augment.weight")[1] if "map_augment.weight" in state else 0,
    }


def _taps(state: _State) -> tuple[int, ...]:
    """The weights of the resampling filters, all of which are ``outer(taps, taps) / sum(taps)^2``."""
    filters = [state.take(name) for name in [*state.left] if name.endswith("resample_filter")]
    if not filters:
        return (1, 1)
    line = filters[0].sum((0, 1, 2)) / filters[0].sum((0, 1, 2)).min()
    taps = tuple(int(k) for k in np.rint(line))
    whole = np.outer(taps, taps) / sum(taps) ** 2
    if any(f.shape[2:] != whole.shape or np.abs(f - whole).max() > 1e-6 for f in filters):
        raise ValueError(f"state: a resampling filter differs from the filter of whole weights {taps}.")
    return taps


def _mapping(state: _State, module: nn.Module) -> Params:
    """The embeddings of time and label; the embedding of the jump is zero."""
    p = {"source": state.dense("map_layer0"), "mix": state.dense("map_layer1")}
    p["jump"] = {"kernel": np.zeros((64, 4 * module.channels), np.float32)}
    p, song = {"TwoTimes_0": p}, isinstance(module, SongUNet)
    if song and module.embedding == "fourier":
        p["freqs"] = state.take("map_noise.freqs")
    if song and module.augment:
        p["augment_labels"] = {"kernel": state.take("map_augment.weight").T}
    if module.classes:
        table = state.take("map_label.weight").T
        zero = np.zeros_like(table[:1])
        if song:
            table, zero = (a + state.left["map_label.bias"] for a in (np.sqrt(len(table)) * table, zero))
            state.take("map_label.bias")
        p["Embed_0"] = {"embedding": np.concatenate([table, zero]).astype(np.float32)}
    return p


def _blocks(state: _State, module: nn.Module, size: int) -> Params:
    song, params = isinstance(module, SongUNet), {}
    at = lambda level: f"{size >> level}x{size >> level}"

    def put(name: str, theirs: str) -> None:
        """Convert a block and its attention, if it has one: inside a SongUNet's block, after a U-Net's."""
        params[name] = state.block(theirs, not song)
        if f"{theirs}.qkv.weight" in state:
            heads = 1 if song else state.shape(f"{theirs}.proj.weight")[0] // 64
            attention = state.attention(theirs, heads)
            if song:
                params[name]["attention"] = attention
            else:
                params["middle_attention" if name == "middle_0" else f"{name}_attention"] = attention

    params["input"] = state.conv(f"enc.{at(0)}_conv")
    levels = len(module.multipliers)
    for level in range(levels):
        if level:
            put(f"down_{level}", f"enc.{at(level)}_down")
            if song and module.encoder == "residual":
                params[f"residual_{level}"] = state.conv(f"enc.{at(level)}_aux_residual")
        for i in range(module.blocks):
            put(f"in_{level}_{i}", f"enc.{at(level)}_block{i}")
    for i in (0, 1):
        put(f"middle_{i}", f"dec.{at(levels - 1)}_in{i}")
    for level in reversed(range(levels)):
        for i in range(module.blocks + 1):
            put(f"out_{level}_{i}", f"dec.{at(level)}_block{i}")
        if level:
            put(f"up_{level}", f"dec.{at(level - 1)}_up")
    norm, conv = (f"dec.{at(0)}_aux_norm", f"dec.{at(0)}_aux_conv") if song else ("out_norm", "out_conv")
    return params | {"GroupNorm_0": state.norm(norm), "output": state.conv(conv)}
