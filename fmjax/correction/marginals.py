"""Build and read the marginals of a flow on a solver's grid: data sets on disk, sharded and resumable.

With forward steps ``Phi_n`` from ``t_n`` to ``t_{n+1}`` and backward steps ``Psi_n``, forward marginals start at the
source, ``p_0 = N(0, I)`` or other, ``p_{n+1} = Phi_n # p_n``, and backward marginals start at the data, ``q_N = data``,
``q_n = Psi_n # q_{n+1}``. ``Psi_n`` is the solver with a negative step (``reverse``) or the exact inverse of ``Phi_n``
(``inverse``; then every f-divergence of ``p_n`` and ``q_n`` is the same for all ``n``). With ``solver="flow_map"`` a
learned jump ``X_{s,t}`` takes the place of the solver's step; ``reverse`` is then ``X_{t,s}``, for flow maps that were
trained in both directions.

Conditions travel with their examples: forward examples are drawn *for* given conditions (``draw_conditions`` draws
them with the frequencies of the data), backward examples keep the conditions of the data.

A directory holds manifests and shards (``fmjax.storage.shards``); record ``i`` is example ``i``, ``[steps, ...]``. The
numbers of a shard depend on the examples of that shard only. A build that was killed therefore resumes exactly, and
several processes can build shards of one set at the same time.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.correction import trajectories
from fmjax.correction.trajectories import View
from fmjax.data.dataset import Rows
from fmjax.keys import as_keys, check_seed, normal
from fmjax.storage import checkpoint, columns, shards
from fmjax.storage.shards import Manifest
from fmjax.types import Cond, Params


class Marginals(NamedTuple):
    """A set of marginals.

    Attributes:
        x: examples ``[M, steps, ...]``: an array, or rows that are read from disk.
        ts: times of the stored steps, ``[steps]``.
        manifest: what the set was built from.
        cond: conditions of the examples, arrays (or rows on disk) ``[M, ...]``; ``None`` for a set without conditions.
    """

    x: Rows
    ts: np.ndarray
    manifest: Manifest
    cond: Cond = None


class Estimate(NamedTuple):
    """The cost of a build.

    Attributes:
        count: number of examples.
        bytes: size on disk, an upper bound.
        nfe: network evaluations per example; ``None`` for an implicit diffrax solver.
        evaluations: network evaluations of the whole build; ``None`` with ``nfe``.
        seconds: time of these evaluations; ``None`` with ``nfe``.
    """

    count: int
    bytes: int
    nfe: int | None
    evaluations: int | None
    seconds: float | None


def build_marginals(
    view: View,
    params: Params,
    ts,
    *,
    directory: str | os.PathLike,
    direction: str,
    flow: str,
    data=None,
    count: int | None = None,
    shape: tuple[int, ...] | None = None,
    cond: Cond = None,
    start: Callable = normal,
    seed: int = 0,
    solver: str = "rk4",
    backward_map: str = "reverse",
    steps: Iterable[int] | None = None,
    mesh: Mesh | None = None,
    batch: int = 512,
    shard_size: int = 1024,
    dtype: str = "float32",
    tol: float = 1e-4,
    progress: Callable[[int, int], Any] | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Manifest:
    """Build the marginals of a flow, or resume a build that was stopped.

    Complete shards are kept; torn shards are named in the log and built again; a complete set solves nothing. On
    several processes each builds its own shards on its own devices and waits for no other: the set is complete when all
    processes have returned.

    Args:
        view: ``view(params)`` is a velocity, or with ``solver="flow_map"`` a flow map.
        params: parameters of the network.
        ts: rising times ``[N + 1]`` in [0, 1], the grid of the sampler; one solver step per interval.
        directory: folder of the set.
        direction: ``"forward"`` (from the source at ``ts[0]``) or ``"backward"`` (from the data at ``ts[-1]``).
        flow: name of the parameters, usually their digest (``storage.checkpoint.digest``).
        data: examples ``[M, ...]`` of the data (backward) or of the source at ``ts[0]`` (forward, in place of count,
            shape and start): floats in the units of the network, an array or rows on disk.
        count, shape: number of examples and shape of one example (forward).
        cond: conditions, arrays ``[M, ...]`` (backward: of the data) or ``[count, ...]`` (forward: to draw examples
            for; see ``draw_conditions``).
        start: ``start(keys, shape)`` draws the source ``[B, *shape]`` at ``ts[0]`` from ``[B]`` keys (forward); by
            default N(0, I). The manifest stores the name of another function.
        seed: seed of the source (forward); example ``i`` is drawn from its own key.
        solver: name of a solver, or ``"flow_map"``.
        backward_map: ``"reverse"`` or ``"inverse"``.
        steps: grid indices to store; by default all.
        mesh: mesh with the one axis ``"data"``; by default one device. The solve has no communication.
        batch: examples per solve, split over the devices.
        shard_size: examples per file.
        dtype: ``"float32"`` or ``"float16"``, of the stored examples.
        tol: largest residual of inverse steps, a root mean square relative to the state.
        progress: ``progress(done, total)``, called with numbers of examples.
        process_index: index of this process; by default from ``jax.distributed``.
        process_count: number of processes; by default from ``jax.distributed``.

    Returns:
        The manifest, with all shards that are complete.

    Raises:
        ValueError: before any work, for arguments that cannot work, or a directory that holds another set.
        OSError: a folder that cannot be written, or a disk without space for the missing shards.
        RuntimeError: a solve that is not finite, or inverse steps that did not converge; the examples are named.

    >>> import tempfile
    >>> shift = lambda params: lambda x, t, cond=None: params + 0 * x
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     m = build_marginals(
    ...         shift, 2.0, [0.0, 0.5, 1.0], directory=folder, direction="backward", flow="shift",
    ...         data=np.ones((3, 1), np.float32), cond=np.arange(3), solver="euler",
    ...     )
    ...     built = read_marginals(folder)
    >>> built.x[0, :, 0].tolist(), built.cond.tolist()
    ([-1.0, 0.0, 1.0], [0, 1, 2])

    Source: marginal matching (OpenReview kRjLBXWn1T).
    """
    m, data, cond = _specify(
        ts, direction=direction, flow=flow, data=data, count=count, shape=shape, cond=cond, start=start, seed=seed,
        solver=solver, backward_map=backward_map, steps=steps, shard_size=shard_size, dtype=dtype,
    )  # fmt: skip
    mesh, batch = trajectories.fit_mesh(mesh, batch, m.count, m.shard_size)
    process = _process(process_index, process_count)
    parts = shards.own(m, **process)
    good, total = shards.resume(directory, m, parts), sum(stop - start for start, stop in parts.values())
    done = sum(shard.count for shard in good.values())
    if progress:
        progress(done, total)
    if len(good) < len(parts):
        _check_space(directory, m)
        params, rows = trajectories.place_params(mesh, params), NamedSharding(mesh, P("data"))
        # a velocity or a solver that cannot work fails here, before a file is written
        solve = trajectories.lower_solve(view, params, m, mesh, batch, start)
        shards.write_manifest(directory, m, good, **process)
        solve = solve.compile()

    def records(first, stop):
        nonlocal done
        for low in range(first, stop, batch):
            high = min(low + batch, stop)
            index = np.minimum(np.arange(low, low + batch, dtype=np.int32), stop - 1)  # one shape: pad, then drop
            x = index if data is None else np.asarray(data[index], np.float32)
            inputs = jax.device_put((x, take_conditions(cond, index)), rows)
            x, *outcome = solve(params, inputs)
            trajectories.check_solved(x, *outcome, index[: high - low], m, tol)
            yield from (example.tobytes() for example in np.asarray(x)[: high - low])
            done += high - low
            if progress:
                progress(done, total)

    for name, (first, stop) in parts.items():
        if name not in good:
            good[name] = shards.write_shard(
                directory, name, records(first, stop), columns.condition_rows(cond, first, stop)
            )
            shards.write_manifest(directory, m, good, **process)
    known = {shard.file: shard for shard in getattr(shards.read_manifest(directory), "shards", ())} | good
    return m._replace(shards=tuple(known[name] for name in sorted(known)))


def estimate_cost(
    view: View,
    params: Params,
    ts,
    *,
    direction: str,
    count: int,
    shape: tuple[int, ...],
    cond: Cond = None,
    solver: str = "rk4",
    backward_map: str = "reverse",
    steps: Iterable[int] | None = None,
    mesh: Mesh | None = None,
    batch: int = 512,
    shard_size: int = 1024,
    dtype: str = "float32",
    process_count: int | None = None,
) -> Estimate:
    """Estimate what ``build_marginals`` costs on all processes together, before any solve.

    The seconds are the time of the network evaluations, measured here on a few warm calls; compilation is not included.

    Args:
        view: ``view(params)`` is a velocity, or with ``solver="flow_map"`` a flow map.
        params: parameters of the network.
        ts: rising times ``[N + 1]``.
        direction: ``"forward"`` or ``"backward"``.
        count: number of examples.
        shape: shape of one example.
        cond: conditions, arrays ``[count, ...]``.
        solver: name of a solver, or ``"flow_map"``.
        backward_map: ``"reverse"`` or ``"inverse"``.
        steps: grid indices to store; by default all.
        mesh: mesh with the one axis ``"data"``; by default one device.
        batch: examples per solve.
        shard_size: examples per file.
        dtype: ``"float32"`` or ``"float16"``.
        process_count: number of processes; by default from ``jax.distributed``.

    Returns:
        The estimate.

    Raises:
        ValueError: as ``build_marginals``.

    >>> zero = lambda params: lambda x, t, cond=None: 0 * x
    >>> estimate_cost(zero, None, [0.0, 0.5, 1.0], direction="forward", count=10, shape=(2,)).evaluations
    80
    """
    start = {"count": count, "shape": shape, "data": None}
    if direction == "backward":
        start = {"count": None, "shape": None, "data": np.broadcast_to(np.float32(0), (count, *shape))}
    m, *_ = _specify(
        ts, direction=direction, flow="", **start, cond=cond, start=normal, seed=0, solver=solver,
        backward_map=backward_map, steps=steps, shard_size=shard_size, dtype=dtype,
    )  # fmt: skip
    mesh, batch = trajectories.fit_mesh(mesh, batch, m.count, m.shard_size)
    processes = _process(None, process_count)["process_count"]
    nfe = trajectories.solve_nfe(len(m.ts) - 1, direction=direction, solver=solver, backward_map=m.backward_map)
    size = shards.size(m, shards.ranges(m))
    if nfe is None:
        return Estimate(m.count, size, None, None, None)
    call_seconds = trajectories.network_seconds(view, trajectories.place_params(mesh, params), m, mesh, batch)
    calls = sum(math.ceil((stop - start) / batch) for start, stop in shards.own(m, 0, processes).values())
    return Estimate(m.count, size, nfe, nfe * m.count, nfe * calls * call_seconds)


def read_marginals(directory: str | os.PathLike, *, expect: dict | None = None, stream: bool = False) -> Marginals:
    """Read a complete set, every shard checked against its SHA-256.

    Args:
        directory: folder of the set.
        expect: manifest fields that must agree, for example ``{"flow": digest, "solver": "rk4", "ts": ts}``.
        stream: leave examples and conditions on disk and read rows on demand (``storage.shards.StoredArray``), for sets
            that are larger than memory.

    Returns:
        The set, with its conditions where it has any.

    Raises:
        FileNotFoundError: a folder without a manifest.
        ValueError: manifest fields that differ from ``expect``.
        Unfinished: an unfinished set, or a shard that is missing or torn.

    >>> read_marginals("/nowhere")
    Traceback (most recent call last):
    FileNotFoundError: directory=/nowhere: no manifest.json. Build the marginals there first.
    """
    m = shards.read_manifest(directory)
    if m is None:
        raise FileNotFoundError(f"directory={directory}: no {shards.MANIFEST}. Build the marginals there first.")
    shards.check_manifest(directory, m, expect or {})
    x = shards.StoredArray(directory, m)
    cond = x.cond if stream else jax.tree.map(lambda column: column[:], x.cond)
    return Marginals(x if stream else x.load(), np.asarray(m.ts, np.float32)[list(m.steps)], m, cond)


def draw_conditions(key, cond: Cond, *, count: int) -> Cond:
    """Draw conditions of forward examples with the frequencies of the data.

    Args:
        key: one key, or ``[count]`` keys.
        cond: conditions of the data, arrays ``[n, ...]``.
        count: number of conditions to draw.

    Returns:
        Numpy arrays ``[count, ...]``: rows of ``cond``, each row equally likely. Condition ``i`` depends on key ``i``
        and ``n`` only.

    Raises:
        ValueError: ``count`` below 1, or conditions that are not arrays with rows.

    >>> draw_conditions(jax.random.key(0), np.array([3, 3, 3]), count=2).tolist()
    [3, 3]
    """
    if count < 1:
        raise ValueError(f"count={count}: nothing to draw. Give at least 1.")
    leaves = jax.tree.leaves(cond)
    if not leaves or not len(leaves[0]):
        raise ValueError(f"cond={cond!r}: no rows to draw from. Give the conditions of the data, arrays [n, ...].")
    n = len(leaves[0])
    index = jax.vmap(functools.partial(jax.random.randint, shape=(), minval=0, maxval=n))(as_keys(key, count))
    return take_conditions(columns.as_columns(cond, n), np.asarray(index))


def take_conditions(cond: Cond, index: np.ndarray) -> Cond:
    """Return the conditions of some examples.

    Args:
        cond: arrays (or rows on disk) ``[M, ...]``, or ``None``.
        index: indices ``[B]``.

    Returns:
        Arrays ``[B, ...]``.
    """
    return jax.tree.map(lambda column: np.asarray(column[index]), cond)


def _specify(
    ts, *, direction, flow, data, count, shape, cond, start, seed, solver, backward_map, steps, shard_size, dtype
) -> tuple[Manifest, Any, Cond]:
    """Return the checked manifest (without shards) of a build, its data, and its conditions as numpy arrays."""
    ts = trajectories.check_rising(ts)
    n = len(ts) - 1
    steps = tuple(range(n + 1)) if steps is None else tuple(sorted({int(i) for i in steps}))
    if not steps or steps[0] < 0 or steps[-1] > n:
        raise ValueError(f"steps={steps}: the grid has the indices 0 .. {n}. Give some of these, or None for all.")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype={dtype!r}: unknown. Give 'float32' or 'float16'.")
    trajectories.check_options(direction, solver, backward_map)
    backward = direction == "backward"
    if data is not None and count is None and shape is None and start is normal:
        data = data if isinstance(data, Rows) and not isinstance(data, jax.Array) else np.asarray(data)
        if data.ndim < 1 or not np.issubdtype(data.dtype, np.floating):
            raise ValueError(f"data={data.dtype}{data.shape}: not floats [M, ...]. Give the units of the network.")
        count, shape, seed = data.shape[0], data.shape[1:], None
    elif backward:
        raise ValueError("direction='backward': a solve starts at data. Give data, and no count, shape or start.")
    elif data is not None or count is None or shape is None:
        wrong = "direction='forward': a solve starts at the source."
        raise ValueError(f"{wrong} Give count and shape and no data, or data (examples of it) alone.")
    if count < 1 or shard_size < 1:
        raise ValueError(f"count={count}, shard_size={shard_size}: empty. Give at least 1 of each.")
    seed = check_seed(seed) if data is None else None
    cond = columns.as_columns(cond, count) if jax.tree.leaves(cond) else None
    m = Manifest(
        version=shards.VERSION, direction=direction, flow=flow, solver=solver,
        backward_map=backward_map if backward else None, ts=tuple(ts.tolist()), steps=steps, dtype=dtype,
        shape=tuple(int(i) for i in shape), count=int(count), seed=seed, shard_size=shard_size,
        data=None if data is None else checkpoint.digest_rows(data),
        cond=None if cond is None else columns.describe(cond),
        cond_digest=None if cond is None else checkpoint.digest(cond),
        start=None if start is normal else _function_name(start),
    )  # fmt: skip
    return m, data, cond


def _function_name(function: Callable) -> str:
    """Return module and name of a function, with the arguments of a ``functools.partial``."""
    if isinstance(function, functools.partial):
        arguments = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in sorted(function.keywords.items()))]
        return f"{_function_name(function.func)}({', '.join(arguments)})"
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}.{owner.__qualname__}"


def _process(index: int | None, count: int | None) -> dict[str, int]:
    count = jax.process_count() if count is None else count
    index = min(jax.process_index(), count - 1) if index is None else index
    if not 0 <= index < count:
        raise ValueError(f"process_index={index}: process_count={count}. Give an index from 0 to {count - 1}.")
    return {"process_index": index, "process_count": count}


def _check_space(directory: str | os.PathLike, m: Manifest) -> None:
    """Refuse a disk that cannot take the shards that no manifest has yet."""
    built = {shard.file for shard in getattr(shards.read_manifest(directory), "shards", ())}
    need, free = shards.size(m, set(shards.ranges(m)) - built), shutil.disk_usage(directory).free
    if need > free:
        raise OSError(
            f"directory={directory}: the {m.direction} marginals need {need / 1e9:.3g} GB, {free / 1e9:.3g} GB are "
            "free. Use another disk, fewer examples or steps, or dtype='float16'."
        )
