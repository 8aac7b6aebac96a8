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
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.storage import files

AXIS = "data"
SMALLEST_SPLIT = 2**14  # entries; gathering smaller arrays costs more than keeping them


def start() -> None:
    """Prepare a launched process before its first computation: the compilation cache, and the other processes.

    With ``FMJAX_DISTRIBUTED=1`` it joins the other processes through ``jax.distributed``, which finds them on Cloud
    TPU, GKE, Slurm and Open MPI; elsewhere ``FMJAX_COORDINATOR`` (``host:port``), ``FMJAX_PROCESSES`` and
    ``FMJAX_PROCESS`` (this one's number) describe them. Compiled programs are kept in ``JAX_COMPILATION_CACHE_DIR``, by
    default ``~/.cache/fmjax/xla``.

    Raises:
        ValueError: one of these variables has a value that cannot work.
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


def barrier(name: str) -> None:
    """Wait until all processes have come here; one process alone does not wait.

    Args:
        name: the place in the code, the same on all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with one axis, ``"data"``.

    Args:
        devices: the devices; by default all devices of all processes.

    Returns:
        The mesh.

    >>> dict(make_mesh(jax.devices()[:1]).shape)
    {'data': 1}
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), (AXIS,))  # Mesh gives Auto axes, as Linen needs


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Check that the devices divide a batch.

    Args:
        batch_size: examples in a global batch.
        mesh: the devices.

    Raises:
        ValueError: they do not; the message names the nearest sizes that work.
    """
    n = mesh.size
    if batch_size < 1 or batch_size % n:
        down = batch_size // n * n
        near = f"{down} or {down + n}" if down > 0 else f"{n}"
        raise ValueError(f"batch_size={batch_size} is not divisible by {n} devices; use {near}")


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole.

    Args:
        mesh: the devices.

    Returns:
        The sharding.
    """
    return NamedSharding(mesh, P())


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Place a host batch as global arrays whose rows are split over the mesh.

    Args:
        batch: arrays ``[b, ...]``, this process's rows of the global batch.
        mesh: the devices.

    Returns:
        The same tree of global arrays ``[B, ...]``.

    Raises:
        ValueError: the devices do not divide the batch.
    """
    rows = NamedSharding(mesh, P(AXIS))
    local = len({d for d in mesh.devices.flat if d.process_index == jax.process_index()})
    leaves = jax.tree.leaves(batch)
    for leaf in leaves[:1]:
        check_batch(leaf.shape[0] * mesh.size // max(local, 1), mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(rows, np.asarray(a)), batch)


def specs(tree: Any, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """Return how each array lies on the mesh: whole, or with ``fsdp`` split along the largest axis that fits.

    Args:
        tree: arrays, or their ``jax.ShapeDtypeStruct``.
        mesh: the devices.
        fsdp: split arrays of at least ``SMALLEST_SPLIT`` entries along an axis that the mesh divides.

    Returns:
        A ``PartitionSpec`` for each array.
    """

    def spec(a):
        fits = [axis for axis, size in enumerate(a.shape) if size % mesh.size == 0]
        if not fsdp or a.size < SMALLEST_SPLIT or not fits:
            return P()
        axis = max(fits, key=lambda i: a.shape[i])
        return P(*(AXIS if i == axis else None for i in range(a.ndim)))

    return jax.tree.map(spec, tree)


def gather(tree: Any, spec: Any) -> Any:
    """Return whole arrays on every device, inside ``shard_map``.

    They vary over the mesh, so that gradients with respect to them are local: not yet summed over the devices, which
    ``shard_map`` does by itself for arrays that do not vary.

    Args:
        tree: the parts of the arrays that lie on this device.
        spec: how each array lies, of ``specs``.

    Returns:
        The whole arrays.
    """
    whole = lambda a, s: (
        jax.lax.all_gather(a, AXIS, axis=s.index(AXIS), tiled=True)
        if AXIS in s
        else jax.lax.pcast(a, AXIS, to="varying")
    )
    return jax.tree.map(whole, tree, spec)


def scatter_mean(tree: Any, spec: Any) -> Any:
    """Return the mean over devices of local arrays, inside ``shard_map``, split as ``gather`` takes them.

    Args:
        tree: whole arrays, different on every device.
        spec: how each mean is to lie, of ``specs``.

    Returns:
        The parts of the means that lie on this device.
    """
    mean = lambda a, s: (
        jax.lax.psum_scatter(a, AXIS, scatter_dimension=s.index(AXIS), tiled=True) / jax.lax.axis_size(AXIS)
        if AXIS in s
        else jax.lax.pmean(a, AXIS)
    )
    return jax.tree.map(mean, tree, spec)
