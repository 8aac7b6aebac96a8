"""Convert weight files of other libraries into run folders, and the network of a run folder into a file."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import checks
from fmjax.checks import refusal
from fmjax.convert import edm, torchcfm, weights
from fmjax.experiments import build, command_line, specs, workdir
from fmjax.storage import checkpoint, files
from fmjax.types import Params

PARTS = (
    "ema_model",
    "ema",
    "net_model",
    "net",
    "model",
    "state_dict",
)  # entries of a checkpoint that may be the state dict, preferred first
KINDS = ("torchcfm", "edm", "safetensors")
RECORD = "converted.json"


def main(
    *,
    workdir: str | None,
    source: str | None = None,
    to: str | None = None,
    kind: str | None = None,
    part: str | None = None,
    shape: str | None = None,
    options: str = "{}",
) -> None:
    """Convert a file into a run folder, or write the network of a run folder to a file, and print what was done.

    Args:
        workdir: the run folder.
        source: the file to convert.
        to: the file to write.
        kind: the kind of file; refused if the file is of another kind.
        part: the entry of a checkpoint that is the state dict.
        shape: shape of one example, ``"32,32,3"``, so that samples can be drawn from the folder alone.
        options: options of the converter, as JSON.
    """
    if workdir is None or (source is None) == (to is None):
        raise ValueError("source, to: give --workdir, and --source=FILE to convert, or --to=FILE to write.")
    if to is not None:
        return print(f"{export(workdir, to):,} parameters in {to}")
    try:
        chosen = json.loads(options)
        sizes = None if shape is None else [int(n) for n in shape.split(",")]
    except ValueError as error:
        raise ValueError(
            f"options={options!r}, shape={shape!r}: cannot be read ({error}). Give JSON and 32,32,3."
        ) from error
    record = convert_file(source, workdir, kind=kind, part=part, options=chosen, shape=sizes)
    print(f"{record['parameters']:,} parameters of kind {record['kind']} (part {record['part']}) in {workdir}")
    print(f"its config has net={record['net']}, conditional={bool(record['classes'])}, path='linear'")


def convert_file(
    source: str | Path,
    path: str | Path,
    *,
    kind: str | None = None,
    part: str | None = None,
    options: Mapping[str, Any] | None = None,
    shape: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Convert the network in a file to the averaged parameters of a run folder, at step 0.

    Args:
        source: file of PyTorch weights or an EDM snapshot (see ``fmjax.convert``), or ``.safetensors`` of ``export``.
        path: the run folder; it must have no checkpoints.
        kind: ``"torchcfm"``, ``"edm"`` or ``"safetensors"``; by default recognised by the names of the arrays.
        part: the entry of a checkpoint that is the state dict; by default the first of ``PARTS`` that the file has.
        options: options of ``torchcfm.unet`` or ``edm.network_parameters``.
        shape: shape of one example, so that samples can be drawn from the folder alone.

    Returns:
        A record of the file, also in ``converted.json``: ``net`` and ``classes`` (``None`` where the file has none),
        ``kind``, ``part``, ``source``, ``shape`` and the number of ``parameters``.

    Raises:
        ValueError: a file that is not of the kind, or an option that cannot work.
        CheckpointError: ``path`` has checkpoints.
    """
    source, path = Path(source).expanduser(), workdir.local(path)
    if kind is not None and kind not in KINDS:
        raise refusal("kind", kind, f"no such kind{checks.nearest(kind, KINDS)}", f"There are {', '.join(KINDS)}")
    options, taken = dict(options or {}), None
    if source.suffix == ".pkl":
        state, origin = edm.read_snapshot(source)
        recognised, options = "edm", {**origin, **options}
    else:
        state, taken = _state(weights.read_weights(source), source, part)
        recognised = _kind(state)
    if kind not in (None, recognised):
        raise refusal("kind", kind, f"the names in {source} are names of {recognised!r}", "Leave kind out")
    params, net = _BY_KIND[recognised](state, source, options)
    classes = None if net is None else net.pop("classes", 0)
    if net is not None:
        build.net(net, classes=classes)  # refuses what cannot be built
    shape = None if shape is None else [int(n) for n in shape]
    record = {
        "kind": recognised, "source": source.name, "part": taken, "net": net, "classes": classes, "shape": shape,
        "parameters": _count(params),
    }  # fmt: skip
    folder = workdir.stage_folder(path, "flow")
    with checkpoint.writer(folder / "checkpoints") as manager:
        checkpoint.save(manager, 0, {"ema": params}, metadata={"stage": "converted"})
    data = {"shape": shape, "kind": None, "classes": classes or 0, "levels": None, "name": source.name}
    workdir.begin_stage(path, "flow", {}, data)
    files.write_json(path / RECORD, record)
    if net is not None:
        files.write_json(path / workdir.CONFIG, workdir.plain(_run_config(net, bool(classes))))
    return record


def _run_config(net: Mapping[str, Any], labelled: bool) -> Mapping[str, Any]:
    """Return the base config with a converted network; ``data`` is left for the user to set."""
    command_line.find_configs()
    c = importlib.import_module("configs.base").get_config()
    with c.unlocked(), c.ignore_type():
        c.net, c.conditional, c.coupling = dict(net), labelled, "independent"
        c.data = {"name": "arrays", "path": "set data.path to the data that samples are compared with"}
    return c.to_dict()


def export(path: str | Path, file: str | Path) -> int:
    """Write the averaged parameters of a run as ``.safetensors``.

    Names of arrays are the paths in the parameter tree, joined by ``/``. The options and the classes of the network are
    stored as metadata, so that ``convert_file`` rebuilds the network.

    Args:
        path: run folder, or the folder of a stage.
        file: the file to write.

    Returns:
        Number of parameters written.

    Raises:
        ValueError: another ending of the file.
        WorkdirError: no trained network in ``path``.
    """
    file = Path(file).expanduser()
    if file.suffix != ".safetensors":
        raise refusal("to", str(file), "weights are written as .safetensors", "Give FILE.safetensors")
    folder = workdir.network_folder(path)
    _, params, _ = checkpoint.restore(folder / "checkpoints", part="ema", fallback=True)
    extra: dict[str, Any] = {}
    config = next((f / workdir.CONFIG for f in (folder, folder.parent) if (f / workdir.CONFIG).exists()), None)
    if config is not None:
        classes = files.read_json(folder / workdir.STAGE)["data"]["classes"]
        read = files.read_json(config)
        extra = {"net": json.dumps(read["net"]), "classes": json.dumps(classes if read["conditional"] else 0)}
    weights.write(file, _flatten(params), metadata={"format": "fmjax", **extra})
    return _count(params)


def _state(content: Any, source: Path, part: str | None) -> tuple[dict[str, np.ndarray], str | None]:
    """Return the state dict of a checkpoint, and the name of the entry that holds it (``None``: the whole file)."""
    arrays = lambda value: isinstance(value, dict) and any(isinstance(a, np.ndarray) for a in value.values())
    if part is None and arrays(content):
        return content, None
    entries = content if isinstance(content, dict) else {}
    offered = [name for name in entries if arrays(entries[name])]
    chosen = [name for name in ((part,) if part else PARTS) if name in offered]
    if not chosen:
        wrong = f"no such state dict in {source.name}; it has {', '.join(map(str, offered)) or 'none'}"
        raise refusal("part", part or "/".join(PARTS), wrong, "Give --part=NAME")
    return entries[chosen[0]], chosen[0]


def _kind(state: Mapping[str, Any]) -> str:
    names = {name.removeprefix("module.").removeprefix("model.") for name in state}
    return "edm" if "map_layer0.weight" in names else "torchcfm" if "time_embed.0.weight" in names else "safetensors"


def _torchcfm(state, source: Path, options) -> tuple[Params, dict[str, Any]]:
    params, fields = specs.call(torchcfm.unet, options, state, field="options")
    return params, {"name": "unet", **fields}


def _edm(state, source: Path, options) -> tuple[Params, dict[str, Any]]:
    return specs.call(edm.network_parameters, options, state, field="options")


def _own(state, source: Path, options) -> tuple[Params, dict[str, Any] | None]:
    """Return the parameters and the network of a file that ``export`` wrote."""
    extra = weights.metadata(source) if source.suffix == ".safetensors" else {}
    if extra.get("format") != "fmjax":
        names = ", ".join(sorted(state)[:3])
        raise refusal(
            "source", source.name, f"{names} are names of neither torchcfm, EDM nor fmjax", "Give another file"
        )
    if options:
        raise refusal("options", sorted(options), "a file that fmjax wrote takes none", "Leave them out")
    if "net" not in extra:
        return _nest(state), None
    net = json.loads(extra["net"])
    return _nest(state), {**({"name": net} if isinstance(net, str) else net), "classes": json.loads(extra["classes"])}


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
