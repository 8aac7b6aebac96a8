"""EDM's networks, SongUNet and DhariwalUNet: pickles are read without executing them, and become parameters.

EDM (NVlabs/edm) pickles its networks with their source code, which unpickling executes. Here what stands for that is a
function that keeps an object's class name and state. The weights are CC BY-NC-SA 4.0: converted ones are, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from fmjax.convert import weights
from fmjax.convert.states import State
from fmjax.nets.song_unet import SongUNet
from fmjax.nets.unet import UNet, groups_of
from fmjax.types import Params

# preconditioners: names of their attributes, as options of nets.preconditioning
KNOWN = {
    "EDMPrecond": ("edm", {"sigma_data": "sigma_data"}),
    "VPPrecond": ("vp", {"beta_min": "beta_min", "beta_d": "beta_d", "M": "steps", "epsilon_t": "epsilon"}),
    "VEPrecond": ("ve", {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
    "iDDPMPrecond": ("iddpm", {"M": "steps", "C_1": "least_ratio", "C_2": "shift"}),
}


class _Modules(dict):
    """A ``torch.nn.ModuleDict``, of which only the state is kept."""

    def __setstate__(self, state):
        self.update(state)


class _Dtype(weights._Fixed):
    """The type of a number of numpy, little-endian, whatever state the pickle sets."""

    __slots__ = ("kind",)

    def __init__(self, kind: str, *_):
        if kind not in ("f8", "f4", "i8", "i4", "b1"):
            raise ValueError(f"it holds a number of numpy's type {kind!r}")
        self.kind = np.dtype(kind).newbyteorder("<")

    def __setstate__(self, state):
        if state[1] not in ("<", "|"):
            raise ValueError("it was written on a big-endian machine, whose byte order is not read here")


def _persistent(meta: Mapping[str, Any]) -> dict[str, Any]:
    """An object of ``torch_utils.persistence``: its source code, ``meta["module_src"]``, is dropped."""
    return {"class": meta["class_name"], **meta["state"]}


def _number(dtype: _Dtype, data: bytes) -> int | float | bool:
    return np.frombuffer(data, dtype.kind, 1)[0].item()


STAND_INS = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.nn.modules.container.ModuleDict": _Modules,
    "builtins.set": set,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """``(state, how)`` of the averaged network in a snapshot of EDM: what ``network(state, **how)`` converts.

    ``state`` maps the names of the ``ema`` module's state dict to arrays; ``how`` holds its preconditioning and
    dropout. Raises ``ValueError`` as ``weights.read``, and for a pickle that holds something else.
    """
    found = weights.read(path, extra=STAND_INS)
    module = found.get("ema") if isinstance(found, dict) else None
    if not isinstance(module, dict) or module.get("class") not in KNOWN:
        what = f"an ema of class {module['class']!r}" if isinstance(module, dict) and "class" in module else "no ema"
        raise ValueError(f"{path} is no snapshot of EDM: it holds {what}, and known are {', '.join(KNOWN)}")
    try:
        state, inner = _state_dict(module), module["_modules"]["model"]
        name, attributes = KNOWN[module["class"]]
        options = {ours: module[theirs] for theirs, ours in attributes.items()}
        dropout = inner["_init_kwargs"].get("dropout", 0.1)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no snapshot of EDM: its network lacks {error}") from error
    return state, {"preconditioning": {"name": name, **options}, "dropout": dropout}


def _state_dict(module: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    here = {**module["_parameters"], **module["_buffers"]}
    found = {f"{prefix}{name}": a for name, a in here.items() if a is not None}
    for name, inner in module["_modules"].items():
        if inner is not None:
            found |= _state_dict(inner, f"{prefix}{name}.")
    return found


def network(
    state: Mapping[str, Any], *, preconditioning: Any = "edm", dropout: float = 0.0
) -> tuple[Params, dict[str, Any]]:
    """``(params, spec)`` such that ``build.net(spec)`` with ``params`` is EDM's denoiser, a velocity on its diagonal.

    ``state`` is a state dict of EDM's network, with or without the prefix ``model.``; it tells the sizes, and
    ``preconditioning``, a spec of ``nets.preconditioning`` (or ``None``: the network alone), what it was trained as.
    ``spec`` has all of it, ``classes`` too. The jump starts at zero. EDM's zero label is the null label: for an ADM a
    row of zeros is added. A learned variance (``"iddpm"``) is dropped. Raises ``ValueError`` for a name that is
    missing, left over (a decoder or an encoder of skips, an ADM of augmentations) or of another shape.
    """
    state = _State(state, "EDM's U-Nets", prefix="model.")
    state.left.pop("u", None)  # the levels of iDDPM, which follow from its options
    adm = "out_norm.weight" in state
    size, fields = _fields(state, adm)
    module: nn.Module = UNet(**fields, dropout=dropout) if adm else SongUNet(**fields, dropout=dropout)
    params = {**_mapping(state, module), **_blocks(state, module, size)}
    how = preconditioning if isinstance(preconditioning, str | None) else dict(preconditioning)
    if (how if isinstance(how, str) else (how or {}).get("name")) == "iddpm":
        params["output"] = {name: a[..., : a.shape[-1] // 2] for name, a in params["output"].items()}
    params = state.checked(module, params, size)
    spec = {"name": "unet" if adm else "song_unet", **fields, "dropout": dropout}
    return params, spec if how is None else {**spec, "preconditioning": how}


class _State(State):
    """Its blocks, as parameters of ``unet.Block`` (where ``film``) and ``song_unet.Block``."""

    def block(self, name: str, film: bool) -> Params:
        p = {"GroupNorm_0": self.norm(f"{name}.norm0"), "first": self.conv(f"{name}.conv0")}
        p["film" if film else "shift"] = self.dense(f"{name}.affine")
        p |= {"GroupNorm_1": self.norm(f"{name}.norm1"), "second": self.conv(f"{name}.conv1")}
        return p | ({"skip": self.dense(f"{name}.skip")} if f"{name}.skip.weight" in self else {})

    def attention(self, name: str, heads: int) -> Params:
        """What comes out of ``qkv`` goes from (head, channel, 3) to (3, head, channel)."""
        qkv = self.dense(f"{name}.qkv")
        for key, a in qkv.items():
            parts = a.reshape(*a.shape[:-1], heads, -1, 3)
            qkv[key] = np.moveaxis(parts, -1, -3).reshape(a.shape)
        return {"GroupNorm_0": self.norm(f"{name}.norm2"), "qkv": qkv, "out": self.dense(f"{name}.proj")}


def _fields(state: _State, adm: bool) -> tuple[int, dict[str, Any]]:
    """The height of the images, and what a state dict tells of its network: all but the dropout."""
    first = [found for name in state.left if (found := re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name))]
    if len(first) != 1:
        state.shape("enc.32x32_conv.weight")  # raises where there is none
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
            raise ValueError(f"{name} of this network is {value}/{channels}, and fmjax's networks have whole ones only")
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
                f"fmjax's U-Net is no ADM with a filter {taps} and {odd[0] if odd else 0} channels in groups: it has a "
                "mean of pixels, and groups that are powers of two"
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
    """The weights of the resampling filter, ``outer(taps, taps) / sum(taps)^2`` everywhere in the state dict."""
    filters = [state.take(name) for name in [*state.left] if name.endswith("resample_filter")]
    if not filters:
        return (1, 1)
    line = filters[0].sum((0, 1, 2)) / filters[0].sum((0, 1, 2)).min()
    taps = tuple(int(k) for k in np.rint(line))
    want = np.outer(taps, taps) / sum(taps) ** 2
    if any(f.shape[2:] != want.shape or np.abs(f - want).max() > 1e-6 for f in filters):
        raise ValueError(f"a resampling filter of this network is not the one of whole weights {taps}")
    return taps


def _mapping(state: _State, module: nn.Module) -> Params:
    """The embeddings of time and label; that of the jump is zero."""
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
        """A block and, where there is one, its attention: within the block of a SongUNet, after that of a U-Net."""
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
