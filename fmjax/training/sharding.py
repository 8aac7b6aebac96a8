"""Devices and processes: the mesh, where arrays lie on it, and how several processes start as one.

One mesh axis, ``"data"``. Batches are split over it. Parameters are replicated or, with ``fsdp``, each large array is
split along one of its axes, gathered where it is used and its gradient scattered back (ZeRO-3, arXiv 1910.02054).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.storage import files

AXIS = "data"
SMALLEST_SPLIT = 2**14  # entries; gathering smaller arrays costs more than keeping them


def start() -> None:
    """Prepares a launched process, before its first computation: compilation cache, and the other processes.

    With ``FMJAX_DISTRIBUTED=1`` it joins them through ``jax.distributed``, which finds them on Cloud TPU, GKE, Slurm
    and Open MPI; elsewhere ``FMJAX_COORDINATOR`` (``host:port``), ``FMJAX_PROCESSES`` and ``FMJAX_PROCESS`` say who is
    who.
    Compiled programs are kept in ``JAX_COMPILATION_CACHE_DIR``, by default ``~/.cache/fmjax/xla``.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(files.cache_folder() / "xla"))
    distributed = os.environ.get("FMJAX_DISTRIBUTED", "0")
    if distributed not in ("0", "1", ""):
        raise ValueError(f"FMJAX_DISTRIBUTED={distributed!r} must be 0 or 1")
    if distributed != "1" or jax.distributed.is_initialized():
        return
    if "FMJAX_COORDINATOR" not in os.environ:
        jax.distributed.initialize()
        return
    missing = [name for name in ("FMJAX_PROCESSES", "FMJAX_PROCESS") if not os.environ.get(name, "").isdigit()]
    if missing:
        raise ValueError(f"FMJAX_COORDINATOR is set, so {missing[0]} must be a number too")
    jax.distributed.initialize(
        os.environ["FMJAX_COORDINATOR"], int(os.environ["FMJAX_PROCESSES"]), int(os.environ["FMJAX_PROCESS"])
    )


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of one axis ``"data"`` over the given devices, by default all of all processes."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), (AXIS,))  # Mesh gives Auto axes, as Linen needs


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises ``ValueError``, with the nearest sizes that work, where the devices do not divide a global batch."""
    n = mesh.size
    if batch_size < 1 or batch_size % n:
        down = batch_size // n * n
        near = f"{down} or {down + n}" if down > 0 else f"{n}"
        raise ValueError(f"batch_size={batch_size} is not divisible by {n} devices; use {near}")


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A host batch (this process's rows of it) as global arrays split over the mesh."""
    rows = NamedSharding(mesh, P(AXIS))
    local = len({d for d in mesh.devices.flat if d.process_index == jax.process_index()})
    leaves = jax.tree.leaves(batch)
    for leaf in leaves[:1]:
        check_batch(leaf.shape[0] * mesh.size // max(local, 1), mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(rows, np.asarray(a)), batch)


def specs(tree: Any, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """A ``PartitionSpec`` per array: ``P()``, or with ``fsdp`` the largest axis that the mesh divides.

    Arrays of fewer than ``SMALLEST_SPLIT`` entries stay whole.
    """

    def spec(a):
        fits = [axis for axis, size in enumerate(a.shape) if size % mesh.size == 0]
        if not fsdp or a.size < SMALLEST_SPLIT or not fits:
            return P()
        axis = max(fits, key=lambda i: a.shape[i])
        return P(*(AXIS if i == axis else None for i in range(a.ndim)))

    return jax.tree.map(spec, tree)


def gather(tree: Any, spec: Any) -> Any:
    """Inside ``shard_map``: whole arrays on every device, varying over it, so that gradients with respect to them are

    local: not yet summed over devices (which ``shard_map`` does by itself for arrays that do not vary).
    """
    whole = lambda a, s: (
        jax.lax.all_gather(a, AXIS, axis=s.index(AXIS), tiled=True)
        if AXIS in s
        else jax.lax.pcast(a, AXIS, to="varying")
    )
    return jax.tree.map(whole, tree, spec)


def scatter_mean(tree: Any, spec: Any) -> Any:
    """Inside ``shard_map``: the mean over devices of local arrays, laid out as ``gather`` found them."""
    mean = lambda a, s: (
        jax.lax.psum_scatter(a, AXIS, scatter_dimension=s.index(AXIS), tiled=True) / jax.lax.axis_size(AXIS)
        if AXIS in s
        else jax.lax.pmean(a, AXIS)
    )
    return jax.tree.map(mean, tree, spec)
