"""Draw samples of a run folder into a file of arrays, a folder of images, or one picture."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax.checks import Range, Refusal, check_range
from fmjax.data.arrays import read_arrays
from fmjax.experiments import records
from fmjax.experiments.drawing import CHUNK, hash_arrays
from fmjax.experiments.run import Run
from fmjax.experiments.settings import Settings
from fmjax.storage import files, images
from fmjax.storage.names import hidden
from fmjax.training import logs, pictures, sharding


def main(
    settings: Settings,
    path: Path,
    *,
    count: int,
    out: str,
    seed: int = 0,
    label: int | str | None = None,
    cond: str | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    solver_steps: int | None = None,
    corrections: str | None = None,
) -> None:
    """Draw samples and write them; a killed command continues where it stopped.

    Each of several processes draws a part. Sample ``i`` of a seed does not depend on ``count``.

    Args:
        settings: the config of the run.
        path: the run folder.
        count: number of samples.
        out: ``x.npz`` (``x`` and ``cond``), ``x.png`` (one picture), or a folder (one image per sample).
        seed: seed of the noise.
        label: one label for all samples, a number or the name of a class; by default labels one after the other.
        cond: a file of float conditions, ``.npy``, or ``.npz`` with ``cond`` or ``y``, in the units of the data; sample
            ``i`` has row ``i`` modulo the number of rows.
        guidance: guidance scale; by default the config's.
        solver: solver, as JSON or a name, or ``"flow_map"``.
        solver_steps: number of steps.
        corrections: a correction as JSON, such as ``{"at": [0, 4], "by": "score", "alpha": 0.5}``.

    Raises:
        ValueError: an output or an option that cannot work, before anything is drawn.
        WorkdirError: no trained flow.
    """
    run, target = Run(settings, path), files.local_path("out", out)
    label = int(label) if isinstance(label, str) and label.lstrip("-").isdigit() else label
    rows = _read_conditions(cond)
    options: dict[str, Any] = {"guidance": guidance, "solver": _json("solver", solver), "steps": solver_steps}
    options["corrections"] = _json("corrections", corrections)
    check_range("count", count, Range(1, 1e9))
    check_range("seed", seed, Range(0, 2**32 - 1))
    kind = target.suffix
    if kind not in (".npz", ".png", ""):
        raise Refusal("out", out, "neither a .npz file, a .png file nor a folder", "Give samples.npz or grid.png")
    if kind == "" and len(run.models.shape) != 3:
        raise Refusal("out", out, "a folder holds images, and these samples are not images", "Give samples.npz")
    if kind == ".png" and pictures.writer_for(run.models.shape) is None:
        raise Refusal("out", out, f"vectors {list(run.models.shape)} are not drawn", "Give samples.npz")
    sampler = run.sampler(options["solver"], solver_steps, None, options["corrections"])
    part_of = lambda i, n: None if rows is None else rows[np.arange(i, i + n) % len(rows)]
    first = min(count, CHUNK)
    run.prepare(sampler, guidance, run.conditions(first, label, part_of(0, first)))
    what = {"sampler": sampler.fields(), "seed": seed, "label": label, "guidance": guidance, "run": run.identity}
    what |= {} if rows is None else {"cond": hash_arrays(rows)}
    _check_space(target, count, run.models.shape)
    parts = target.with_name(f"{hidden(target.name)}{hash_arrays([np.frombuffer(repr(what).encode(), np.uint8)])[:12]}")
    starts, content = list(range(0, count, CHUNK)), repr(what)
    parts.mkdir(parents=True, exist_ok=True)
    with logs.bar("samples", count, unit="sample") as progress:
        for i in starts[jax.process_index() :: jax.process_count()]:
            n = min(CHUNK, count - i)
            if not _complete(parts / f"{i}-{n}.npy", f"{content} {i}"):
                x = run.sample(n, seed=seed, label=label, cond=part_of(i, n), first=i, **options)
                files.write_array(parts / f"{i}-{n}.npy", x, content=f"{content} {i}")
            progress.update(n)
    sharding.barrier("samples")
    if jax.process_index() == 0:
        part = lambda i: files.read_array(parts / f"{i}-{min(CHUNK, count - i)}.npy", content=f"{content} {i}")
        x = np.concatenate([part(i) for i in starts])
        _write(target, x, run.conditions(count, label, part_of(0, count)))
        shutil.rmtree(parts)
        print(f"{count} samples of {sampler.name} in {target}")


def _check_space(target: Path, count: int, shape: tuple[int, ...]) -> None:
    """Refuse a number of samples that the disk has no space for: they are written in parts, then as one file."""
    folder = next(folder for folder in target.parents if folder.is_dir())
    need, free = 8 * count * math.prod(shape), shutil.disk_usage(folder).free
    if need > free:
        line = f"disk too small: {need / 1e9:.3g} GB are needed in {folder}, {free / 1e9:.3g} GB are free"
        raise Refusal("count", count, line, "Ask for less, or take another disk")


def _write(target: Path, x: np.ndarray, cond: Any) -> None:
    """Write samples ``[n, ...]`` as arrays (``.npz``), as one picture (``.png``), or as a folder of images."""
    if target.suffix == ".npz":
        files.write_npz(target, {"x": x} | ({} if cond is None else {"cond": cond}))
    elif target.suffix == ".png":
        pictures.writer_for(x.shape[1:]).write(target, x)
    else:
        target.mkdir(parents=True, exist_ok=True)
        digits = max(6, len(str(len(x) - 1)))
        for i, image in enumerate(x):
            images.save_image(target / f"{i:0{digits}d}.png", image)


def _read_conditions(path: str | None) -> np.ndarray | None:
    """Return the conditions in a file of arrays; nothing in the file is executed."""
    if path is None:
        return None
    content = read_arrays("cond", path)
    names = [name for name in ("cond", "y", "x") if name in content]
    if not names or content[names[0]].ndim < 1 or not len(content[names[0]]):
        raise Refusal("cond", path, f"it holds {', '.join(content)[:60] or 'nothing'}", "Give cond or y, [n, ...]")
    values = content[names[0]]
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def _json(field: str, text: str | None) -> Any:
    """Parse a value as JSON; a solver may be a bare name, and a correction must be a mapping."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if field == "corrections" and not (isinstance(value, dict) and value):
        raise Refusal(field, text, "not a mapping in JSON", 'Give {"at": [0], "by": "score", "alpha": 0.5}')
    return value


def _complete(path: Path, content: str) -> bool:
    """Return whether a part is there; say so where it is damaged."""
    try:
        files.read_array(path, content=content)
    except files.DamagedFile as error:
        if path.exists():
            records.tell(error.path, error.problem, "drawn again")
        return False
    return True
