"""Convert weight files of other libraries into run folders, and the network of a run folder into a file."""

from __future__ import annotations

import importlib
import json
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fmjax import checks
from fmjax.checks import Refusal
from fmjax.convert import edm, parts, states, torchcfm, weights
from fmjax.experiments import build, command_line, networks, records, specs, workdir
from fmjax.storage import checkpoint, files, untrusted
from fmjax.types import Params

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
    taken = "the whole file" if record["part"] is None else f"part {record['part']}"
    print(f"{record['parameters']:,} parameters of kind {record['kind']} in {workdir}")
    print(f"they were taken from {taken} of {record['source']}")
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
        part: the entry of a checkpoint that is the state dict; by default the only one that can be meant
            (``fmjax.convert.parts``).
        options: options of ``torchcfm.unet`` or ``edm.network_parameters``.
        shape: shape of one example, so that samples can be drawn from the folder alone.

    Returns:
        A record of the file, also in ``converted.json``: ``net`` and ``classes`` (``None`` where the file has none),
        ``kind``, ``part``, ``source``, ``shape`` and the number of ``parameters``.

    Raises:
        ValueError: a file that is not of the kind, or an option that cannot work.
        CheckpointError: ``path`` has checkpoints.
    """
    source, path = files.local_path("source", source), workdir.local(path)
    if options is not None and not isinstance(options, Mapping):
        raise Refusal("options", options, "not a mapping", 'Give {"heads": 4}, or leave it out')
    if shape is not None and (not shape or not all(isinstance(n, numbers.Integral) and 1 <= n <= 2**20 for n in shape)):
        raise Refusal("shape", shape, "not the shape of an example", "Give positive sizes, as in 32,32,3")
    if kind is not None:
        checks.check_choice("kind", kind, KINDS)
    try:
        recognised, taken, params, net, classes = _network(source, kind, part, dict(options or {}))
    except ValueError as error:
        if source.name in str(error):
            raise
        raise ValueError(untrusted.one_line(f"{untrusted.short_path(source)}: {error}")) from error
    shape = None if shape is None else [int(n) for n in shape]
    if shape and net is not None:
        _check_shape(net, params, shape, classes)
    record = {
        "kind": recognised, "source": source.name, "part": taken, "net": net, "classes": classes, "shape": shape,
        "parameters": _count(params),
    }  # fmt: skip
    folder = workdir.stage_folder(path, "flow")
    data = {"shape": shape, "kind": None, "classes": classes or 0, "levels": None, "name": source.name}
    metadata = {"stage": "flow", "run": records.stage_record("flow", {}, data)}
    with checkpoint.writer(folder / "checkpoints") as manager:
        checkpoint.save(manager, 0, {"ema": params}, metadata=metadata)
    workdir.begin_stage(path, "flow", {}, data)
    files.write_json(path / RECORD, record)
    if net is not None:
        files.write_json(path / workdir.CONFIG, workdir.plain(_run_config(net, bool(classes))))
    return record


def _check_shape(net: Mapping[str, Any], params: Params, shape: Sequence[int], classes: int | None) -> None:
    """Refuse the shape of an example that the network does not take, or does not return."""
    x, cond = jnp.zeros((1, *shape)), jnp.zeros(1, int) if classes else None
    try:
        out = jax.eval_shape(lambda p: build.net(net).net(p, x, 0.0, 0.0, cond), params).shape
    except Exception as error:  # a network fails in its own words
        line = untrusted.one_line(error, 60)
        raise Refusal("shape", shape, f"the network does not take it ({line})", "Give another") from error
    if out[:-1] != x.shape[:-1]:
        raise Refusal("shape", shape, f"the network returns {list(out[1:])}", "Give the shape of an example")


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
    file = files.local_path("to", file)
    if file.suffix != ".safetensors":
        raise Refusal("to", str(file), "weights are written as .safetensors", "Give FILE.safetensors")
    folder = workdir.network_folder(path)
    _, params, _ = checkpoint.restore(folder / "checkpoints", part="ema", fallback=True)
    extra: dict[str, Any] = {}
    config = next((f / workdir.CONFIG for f in (folder, folder.parent) if (f / workdir.CONFIG).exists()), None)
    if config is not None:
        classes = networks.example_facts(folder)["classes"]
        read = files.read_json(config)
        extra = {"net": json.dumps(read["net"]), "classes": json.dumps(classes if read["conditional"] else 0)}
    weights.write(file, _flatten(params), metadata={"format": "fmjax", **extra})
    return _count(params)


def _network(source: Path, kind: str | None, part: str | None, options: dict[str, Any]) -> tuple[Any, ...]:
    """Read the network of a file: its kind, the entry that was taken, parameters, the config's net, label classes."""
    taken = None
    if source.suffix == ".pkl" and part is None:
        state, origin = edm.read_snapshot(source)
        recognised, options = "edm", {**origin, **options}
    else:
        state, taken = parts.state_dict(weights.read_weights(source), part=part)
        recognised = parts.network_kind(state) or "safetensors"
    if kind not in (None, recognised):
        raise Refusal("kind", kind, f"the names in {source.name} are names of {recognised!r}", "Leave kind out")
    params, net = _BY_KIND[recognised](state, source, options)
    classes = None if net is None else net.pop("classes", 0)
    if net is not None:
        build.net(net, classes=classes)  # refuses what cannot be built
    return recognised, taken, params, net, classes


def _torchcfm(state, source: Path, options) -> tuple[Params, dict[str, Any]]:
    params, fields = specs.call(torchcfm.unet, options, state, field="options")
    return params, {"name": "unet", **fields}


def _edm(state, source: Path, options) -> tuple[Params, dict[str, Any]]:
    return specs.call(edm.network_parameters, options, state, field="options")


def _own(state, source: Path, options) -> tuple[Params, dict[str, Any] | None]:
    """Return the parameters and the network of a file that ``export`` wrote."""
    extra = weights.metadata(source) if source.suffix == ".safetensors" else {}
    if extra.get("format") != "fmjax":
        names = ", ".join(f"{name:.40}" for name in sorted(state)[:3])
        raise Refusal(
            "source", source.name, f"{names} are names of neither torchcfm, EDM nor fmjax", "Give another file"
        )
    if options:
        raise Refusal("options", sorted(options), "a file that fmjax wrote takes none", "Leave them out")
    for name, array in state.items():
        states.check_tensor(name, array)
    if "net" not in extra:
        return _nest(state), None
    net, classes = (untrusted.parse_json(extra.get(name, "null").encode()) for name in ("net", "classes"))
    if not isinstance(net, str | dict) or type(classes) is not int or not 0 <= classes < 10**6:
        raise Refusal("source", source.name, "its metadata describe no network", "Export it again")
    _check_names(net, source)
    return _nest(state), {**({"name": net} if isinstance(net, str) else net), "classes": classes}


def _check_names(spec: Any, source: Path) -> None:
    """Refuse a spec from a file that leads outside fmjax: to build it would execute code of a stranger."""
    if isinstance(spec, dict | list):
        for part in spec.values() if isinstance(spec, dict) else spec:
            _check_names(part, source)
    elif isinstance(spec, str) and re.search(r"[^\w.+-]|\.py", spec):
        wrong = f"its network names {spec[:40]!r}, code outside fmjax that would be executed"
        raise Refusal("source", source.name, wrong, "Convert it by a function of your own")


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
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node or len(parents) > 50:
            raise ValueError(f"state: {name[:60]!r} has no place in a tree of parameters. Export it again.")
        node[last] = a
    return tree
