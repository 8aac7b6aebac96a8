"""Samples on disk: drawn once for each sampler and seed, with a digest for each file and the time that they took."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from fmjax.experiments import drawing, records
from fmjax.experiments.drawing import Draws, Models
from fmjax.experiments.samplers import Sampler
from fmjax.storage import files, lock
from fmjax.types import Cond


def draw(sampler: Sampler, models: Models, draws: Draws, *, directory: Path, identity: str) -> np.ndarray:
    """Draw the samples of a sampler, or read the samples that ``directory`` already holds.

    One file per seed; a file with a wrong digest is drawn again. Each of several processes draws a part of the seeds,
    and every process reads all files.

    Args:
        sampler: the sampler.
        models: the networks.
        draws: how many samples, and from which keys.
        directory: folder of the stored samples.
        identity: digest of everything else that the samples depend on, such as the parameters.

    Returns:
        Samples ``[seeds, samples, ...]``, float32.
    """
    cond, folder = (
        jax.tree.map(np.asarray, draws.cond),
        folder_of(sampler, draws, directory=directory, identity=identity),
    )
    digest = folder.name.rpartition("-")[2]
    run, begun = functools.cache(lambda: drawing.program(sampler, models)), folder.exists()
    for i in range(jax.process_index(), draws.seeds, jax.process_count()):
        if _read(folder / f"{i}.npy", f"{digest} {i}", begun) is None:
            lock.check_owned()
            folder.mkdir(parents=True, exist_ok=True)
            content = f"{digest} {i}"
            began = time.perf_counter()
            x = _of_seed(run(), models, draws, i, cond)
            files.write_json(folder / f"{i}.json", {"seconds": time.perf_counter() - began})
            files.write_array(folder / f"{i}.npy", x, content=content)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"samples {digest}")
    return np.stack([_array(folder, i) for i in range(draws.seeds)])


def folder_of(sampler: Sampler, draws: Draws, *, directory: Path, identity: str) -> Path:
    """Return the folder of the samples of a sampler.

    Args:
        sampler: the sampler.
        draws: how many samples, and from which keys.
        directory: folder of the stored samples.
        identity: digest of everything else that the samples depend on, such as the parameters.

    Returns:
        The folder; the name ends with a digest.
    """
    cond = jax.tree.map(np.asarray, draws.cond)
    what = [sampler.fields(), draws.samples, draws.seed, identity, drawing.hash_arrays(cond)]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=files.as_json).encode()).hexdigest()[:12]
    return directory / f"{files.slug(sampler.name)}-{digest}"


def seconds(folder: Path, seeds: int) -> float:
    """Return the time that one run of samples took.

    Args:
        folder: the folder of the samples.
        seeds: number of runs.

    Returns:
        The least number of seconds over the runs, so that compilation counts with one run only; nan where no time is
        recorded.
    """
    times = []
    for i in range(seeds):
        try:
            times.append(float(files.read_json(folder / f"{i}.json")["seconds"]))
        except (files.DamagedFile, KeyError, TypeError, ValueError):
            continue
    return min(times, default=math.nan)


def read_first(folder: Path) -> np.ndarray | None:
    """Read the samples of the first seed in a folder.

    Args:
        folder: the folder of the samples of a sampler.

    Returns:
        Samples ``[samples, ...]``; ``None`` where they are missing or damaged.
    """
    try:
        return _array(folder, 0)
    except files.DamagedFile:
        return None


def _array(folder: Path, i: int) -> np.ndarray:
    return files.read_array(folder / f"{i}.npy", content=f"{folder.name.rpartition('-')[2]} {i}")


def _of_seed(run, models: Models, draws: Draws, i: int, cond: Cond) -> np.ndarray:
    keys = drawing.sample_keys(draws.seed, i, draws.samples)
    return drawing.in_chunks(lambda keys, cond: run(models.params, keys, cond), keys, cond)


def _read(path: Path, content: str, begun: bool) -> np.ndarray | None:
    """Return the samples of a seed; ``None`` where the file is missing or damaged, which is said."""
    try:
        return files.read_array(path, content=content)
    except files.DamagedFile as error:
        if begun:
            records.tell(error.path, error.problem, "drawn again")
        return None
