"""A file of weights becomes the workdir of a run, to start from (``init``) or to learn from (``teacher``), and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import checks
from fmjax.convert import edm, torchcfm, weights
from fmjax.experiments import specs
from fmjax.storage import checkpoint, files
from fmjax.types import Params

TOLD = "converted.json"
PARTS = ("ema_model", "ema", "net_model", "net", "model", "state_dict")  # where checkpoints have theirs, best first
KINDS = ("torchcfm", "edm", "safetensors")


def convert(
    source: str | Path,
    path: str | Path,
    *,
    kind: str | None = None,
    part: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The network in the file ``source`` as the averaged parameters of a workdir ``path``, at step 0.

    ``kind`` is ``"torchcfm"`` or ``"edm"`` (of PyTorch's files, see ``weights.read``) or ``"safetensors"`` (of
    ``export``), by default what the names of the arrays tell; ``part`` names the entry of a checkpoint that is the
    state dict, by default the first there is of ``PARTS``; ``options`` are those of ``torchcfm.unet`` or
    ``edm.network``. Returns, and writes to ``converted.json``, ``net`` and ``classes`` (fields of a config; ``None``
    where a file does not tell), kind, source and number of parameters.

    Raises ``ValueError`` for a file that is not of its kind, and ``CheckpointError`` where ``path`` has checkpoints.
    """
    source = Path(source)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}{checks.nearest(kind, KINDS)}")
    options = dict(options or {})
    if source.suffix == ".pkl":
        state, how = edm.read(source)
        found, options = "edm", {**how, **options}
    else:
        state = _state(weights.read(source), source, part)
        found = _kind(state)
    if kind not in (None, found):
        raise ValueError(f"{source} is no file of kind {kind!r}: its names are those of {found!r}")
    params, net = _BY_KIND[found](state, source, options)
    classes = None if net is None else net.pop("classes", 0)
    if net is not None:
        specs.net(net, classes=classes)  # refuses what cannot be built
    told = {"kind": found, "source": source.name, "net": net, "classes": classes, "parameters": _count(params)}
    directory = Path(path)
    with checkpoint.writer(directory / "checkpoints") as manager:
        checkpoint.save(manager, 0, {"ema": params}, metadata={"stage": "converted"})
    files.write_json(directory / TOLD, told)
    return told


def export(path: str | Path, file: str | Path) -> int:
    """Writes the averaged parameters of the run in ``path`` as ``.safetensors``; returns how many numbers these are.

    Names are those of the tree, joined by ``/``; the network's options and its classes are told beside them, so that
    ``convert`` reads all of it. Raises ``ValueError`` for another ending, ``CheckpointError`` where no run is.
    """
    path, file = Path(path), Path(file)
    if file.suffix != ".safetensors":
        raise ValueError(f"weights are written as .safetensors, not {file.suffix or 'without an ending'}: {file}")
    _, params, _ = checkpoint.restore(path / "checkpoints", part="ema", fallback=True)
    told: dict[str, Any] = {}
    for name in (TOLD, "config.json"):  # of a converted run, or one that was trained there
        if (path / name).exists():
            config = json.loads((path / name).read_text())
            told = {key: json.dumps(config[key]) for key in ("net", "classes")} if config["net"] else {}
    weights.write(file, _flatten(params), metadata={"format": "fmjax", **told})
    return _count(params)


def _state(found: Any, source: Path, part: str | None) -> dict[str, np.ndarray]:
    """The state dict of a checkpoint: all of it, or an entry."""
    arrays = lambda value: isinstance(value, dict) and any(isinstance(a, np.ndarray) for a in value.values())
    if part is None and arrays(found):
        return found
    entries = found if isinstance(found, dict) else {}
    offered = [name for name in entries if arrays(entries[name])]
    chosen = [name for name in ((part,) if part else PARTS) if name in offered]
    if not chosen:
        asked, there = part or f"one of {', '.join(PARTS)}", ", ".join(map(str, offered)) or "none"
        raise ValueError(f"{source} has no state dict as its part {asked}; parts that are one: {there}")
    return entries[chosen[0]]


def _kind(state: Mapping[str, Any]) -> str:
    names = {name.removeprefix("module.").removeprefix("model.") for name in state}
    return "edm" if "map_layer0.weight" in names else "torchcfm" if "time_embed.0.weight" in names else "safetensors"


def _torchcfm(state, source: Path, options) -> tuple[Params, dict[str, Any]]:
    params, fields = specs.call(torchcfm.unet, options, state)
    return params, {"name": "unet", **fields}


def _edm(state, source: Path, options) -> tuple[Params, dict[str, Any]]:
    return specs.call(edm.network, options, state)


def _own(state, source: Path, options) -> tuple[Params, dict[str, Any] | None]:
    """What ``export`` wrote."""
    told = weights.metadata(source) if source.suffix == ".safetensors" else {}
    if told.get("format") != "fmjax":
        raise ValueError(
            f"{source} is none of torchcfm, EDM and fmjax's own: {', '.join(sorted(state)[:3])} are not their names"
        )
    if options:
        raise ValueError(f"a file of fmjax's own takes no options, got {', '.join(options)}")
    if "net" not in told:
        return _nest(state), None
    net = json.loads(told["net"])
    return _nest(state), {**({"name": net} if isinstance(net, str) else net), "classes": json.loads(told["classes"])}


_BY_KIND: dict[str, Callable[..., Any]] = {"torchcfm": _torchcfm, "edm": _edm, "safetensors": _own}


def _count(params: Params) -> int:
    return sum(int(a.size) for a in jax.tree.leaves(params))


def _flatten(params: Params) -> dict[str, Any]:
    named = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(jax.tree_util.keystr((k,), simple=True) for k in key): a for key, a in named}


def _nest(flat: Mapping[str, Any]) -> Params:
    tree: dict[str, Any] = {}
    for name, a in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = a
    return tree
