"""The marginals of a flow on a solver's grid, as data sets on disk: built through diffrax, sharded, resumable.

With forward steps ``Phi_n`` from ``t_n`` to ``t_{n+1}`` and backward steps ``Psi_n``, forward marginals start at noise,
``p_0 = N(0, I)``, ``p_{n+1} = Phi_n # p_n``, and backward ones at data, ``q_N = data``, ``q_n = Psi_n # q_{n+1}``.
``Psi_n`` is the solver run with a negative step (``reverse``) or the exact inverse of ``Phi_n`` (``inverse``; then
every f-divergence of ``p_n`` and ``q_n`` is the same for all ``n``). ``Phi_n`` may be a learned jump, ``X_{s,t}``: with
``solver="flow_map"`` everything here takes a flow map for the velocity; ``reverse`` is then ``X_{t,s}``, for maps that
were trained both ways.

A directory holds manifests and shards (``fmjax.shards``); record ``i`` is example ``i``, ``[steps, ...]``. A shard's
numbers depend on its own examples only, so that a build killed at any moment goes on as if it had not been, and several
processes build shards of one set beside each other.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from fmjax.correction import trajectories
from fmjax.data.dataset import Rows
from fmjax.storage import checkpoint, shards
from fmjax.storage.shards import Manifest
from fmjax.types import Batch, FlowMapFn, Params, VelocityFn

View = Callable[[Params], VelocityFn | FlowMapFn]


class Marginals(NamedTuple):
    """A set: ``x: [M, steps, ...]``, an array or rows read from disk, the times ``ts: [steps]``, and the manifest."""

    x: Rows
    ts: np.ndarray
    manifest: Manifest


class Estimate(NamedTuple):
    """What a build costs in all: ``bytes`` on disk (from above), ``nfe`` an example, network ``evaluations``, seconds.

    The last three are ``None`` for a diffrax solver whose evaluations are not known beforehand (implicit ones).
    """

    count: int
    bytes: int
    nfe: int | None
    evaluations: int | None
    seconds: float | None


def build(
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
    """Builds, or goes on building, the marginals of the flow ``view(params)`` on the sampler's rising grid ``ts``.

    ``view`` gives a velocity, or with ``solver="flow_map"`` a flow map. Forward: ``count`` examples of ``shape`` from
    noise at ``ts[0]``, that of example ``i`` drawn from its own key (``seed``); backward: from ``data: [M, ...]``
    (floats in the network's units, an array or rows read when asked for) at ``ts[-1]``. One ``solver`` step a grid
    interval. ``steps`` are the grid indices to store (default all). ``mesh`` has one axis ``"data"`` (default one
    device); a batch is split over it and the solve has no communication. Complete shards are kept, torn ones named in
    the log and built again; a complete set solves nothing. ``progress(done, total)`` counts examples.

    On several processes (``process_index`` of ``process_count``, by default those of ``jax.distributed``) each builds
    its own shards, on its own devices of the mesh, and waits for none: the set is complete when all have returned.

    Returns the manifest, with all shards that are complete. Raises ``ValueError`` before any work for bad arguments, a
    batch that the mesh does not divide, or a directory built from something else (naming each field that differs);
    ``OSError`` where the disk has no room for what is still to be built; ``RuntimeError`` naming the examples whose
    solve was not finite, or whose inverse steps did not converge to ``tol`` (relative rms residual).
    """
    m, data = _specify(ts, direction, flow, data, count, shape, seed, solver, backward_map, steps, shard_size, dtype)
    mesh, batch = trajectories.fit(mesh, batch, m.count, m.shard_size)
    who = _process(process_index, process_count)
    parts = shards.own(m, **who)
    good, total = shards.resume(directory, m, parts), sum(stop - start for start, stop in parts.values())
    done = sum(shard.count for shard in good.values())
    if progress:
        progress(done, total)
    if len(good) < len(parts):
        _check_room(directory, m)
        params, rows = trajectories.place(mesh, params), NamedSharding(mesh, P("data"))
        # traces: a bad velocity or solver fails before a file is written
        solve = trajectories.lower(view, params, m, mesh, batch)
        shards.save(directory, m, good, **who)
        solve = solve.compile()

    def records(start, stop):
        nonlocal done
        for low in range(start, stop, batch):
            high = min(low + batch, stop)
            index = np.minimum(np.arange(low, low + batch, dtype=np.int32), stop - 1)  # one shape: pad, then drop
            given = index if data is None else np.asarray(data[index], np.float32)
            x, *outcome = solve(params, jax.device_put(given, rows))
            trajectories.check_solved(x, *outcome, index[: high - low], m, tol)
            yield from (one.tobytes() for one in np.asarray(x)[: high - low])
            done += high - low
            if progress:
                progress(done, total)

    for name, (start, stop) in parts.items():
        if name not in good:
            good[name] = shards.write(directory, name, records(start, stop))
            shards.save(directory, m, good, **who)
    found = {shard.file: shard for shard in getattr(shards.load(directory), "shards", ())} | good
    return m._replace(shards=tuple(found[name] for name in sorted(found)))


def estimate(
    view: View,
    params: Params,
    ts,
    *,
    direction: str,
    count: int,
    shape: tuple[int, ...],
    solver: str = "rk4",
    backward_map: str = "reverse",
    steps: Iterable[int] | None = None,
    mesh: Mesh | None = None,
    batch: int = 512,
    shard_size: int = 1024,
    dtype: str = "float32",
    process_count: int | None = None,
) -> Estimate:
    """What ``build`` would cost on all of ``process_count`` processes, before any of it.

    The seconds are those of as many calls of the network as will be made, of which a few are timed here, warm;
    compiling the solve comes on top.
    """
    given = {"forward": {"count": count, "shape": shape, "data": None}}
    given = given.get(
        direction, {"count": None, "shape": None, "data": np.broadcast_to(np.float32(0), (count, *shape))}
    )
    how = {"solver": solver, "backward_map": backward_map, "steps": steps, "shard_size": shard_size, "dtype": dtype}
    m, _ = _specify(ts, direction, "", seed=0, **given, **how)
    mesh, batch = trajectories.fit(mesh, batch, m.count, m.shard_size)
    who = _process(None, process_count)
    nfe = trajectories.nfe(len(m.ts) - 1, direction=direction, solver=solver, backward_map=m.backward_map)
    size = shards.size(m, shards.ranges(m))
    if nfe is None:
        return Estimate(m.count, size, None, None, None)

    call_seconds = trajectories.seconds(view, trajectories.place(mesh, params), m, mesh, batch)
    batches = sum(math.ceil((stop - start) / batch) for start, stop in shards.own(m, 0, who["process_count"]).values())
    return Estimate(m.count, size, nfe, nfe * m.count, nfe * batches * call_seconds)


def read(directory: str | os.PathLike, *, expect: dict | None = None, stream: bool = False) -> Marginals:
    """Reads a complete set, every shard checked against its SHA-256.

    ``expect`` holds manifest fields that must agree, for example ``{"flow": digest, "solver": "rk4", "ts": ts}``.
    With ``stream`` the examples stay on disk and are read when asked for (``shards.Records``), so that a set may be
    larger than memory. Raises ``FileNotFoundError`` without a manifest, ``ValueError`` naming the fields that differ,
    and ``RuntimeError`` naming an unfinished set, or a shard that is missing or torn, with the fix.
    """
    m = shards.load(directory)
    if m is None:
        raise FileNotFoundError(f"no marginals in {directory}: {shards.MANIFEST} is missing; build them there first")
    shards.check(directory, m, expect or {})
    x = shards.Records(directory, m) if stream else shards.read(directory, m)
    return Marginals(x, np.asarray(m.ts, np.float32)[list(m.steps)], m)


def batches(
    m: Marginals,
    *,
    batch_size: int,
    seed: int,
    steps: Iterable[int] | None = None,
    examples: slice | range | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], Batch]:
    """Training batches ``Batch(x1=x, t=t_n)`` as a function of the step: example and stored step index both uniform.

    Stateless, so that a resumed run sees what the uninterrupted one would have. ``steps`` are grid indices to draw
    from (default all that are stored), ``examples`` those to draw from (default all): ``slice(None, -500)`` trains,
    ``slice(-500, None)`` is held out. ``batch_size`` is over all processes; each gets its slice of the same draw.
    Raises ``ValueError`` for a batch that the processes do not divide, steps not stored, examples that are not there.
    """
    draw = _draw(batch_size, seed, process_index, process_count)
    columns, rows = _columns(m, steps), _examples(m, examples)

    def batch(step: int) -> Batch:
        example, n = draw(step, len(rows), len(columns))
        n = columns[n]
        return Batch(x1=m.x[rows.start + rows.step * example, n].astype(np.float32), t=m.ts[n])

    return batch


def pairs(
    p: Marginals,
    q: Marginals,
    *,
    batch_size: int,
    seed: int,
    steps: Iterable[int] | None = None,
    examples: slice | range | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], Batch]:
    """Batches ``Batch(x1=x of q_n, x0=x of p_n, t=t_n)`` for what tells backward ``q`` from forward marginals ``p``.

    Both examples of a row are at one step ``n`` and independent otherwise; ``steps``, ``examples`` (of each set) and
    the rest as ``batches`` has them. Raises ``ValueError`` as it does, and naming what differs where ``p`` and ``q``
    are not sets of one flow on one grid.
    """
    for name in ("ts", "steps", "flow", "solver", "shape"):
        if getattr(p.manifest, name) != (other := getattr(q.manifest, name)):
            raise ValueError(
                f"the forward and the backward set differ in {name}: {getattr(p.manifest, name)} and {other}; build "
                "both for one flow on one grid"
            )
    draw = _draw(batch_size, seed, process_index, process_count)
    columns, of_p, of_q = _columns(q, steps), _examples(p, examples), _examples(q, examples)

    def batch(step: int) -> Batch:
        i, n, j = draw(step, len(of_q), len(columns), len(of_p))
        n = columns[n]
        take = lambda m, rows, i: m.x[rows.start + rows.step * i, n].astype(np.float32)
        return Batch(x1=take(q, of_q, i), x0=take(p, of_p, j), t=q.ts[n])

    return batch


def round_trip(
    view: View,
    params: Params,
    x: Float[Array, "b ..."],
    ts,
    *,
    solver: str = "rk4",
    backward_map: str = "reverse",
) -> float:
    """The round-trip error ``(E |Phi(Psi(x)) - x|^2)^(1/2)`` of data ``x`` down the whole grid and up again.

    ``|.|`` is the norm over an example; zero to rounding for ``inverse`` where that converges. Raises ``RuntimeError``
    where it is not finite.
    """
    ts = trajectories.check_rising(ts)
    trajectories.check_how("backward", solver, backward_map)

    @jax.jit
    def run(params, x):
        how = {"solver": solver, "backward_map": backward_map}
        down, *_ = trajectories.carry(view(params), x, ts, direction="backward", **how)
        up, *_ = trajectories.carry(view(params), down[0], ts, direction="forward", **how)
        return jnp.sqrt(jnp.mean(jnp.sum((up[-1] - x).reshape(len(x), -1) ** 2, 1)))

    error = float(run(params, x))
    if not np.isfinite(error):
        raise RuntimeError(f"the round trip through {len(ts) - 1} {solver} steps left finite numbers; use a finer grid")
    return error


def straightness_defect(m: Marginals) -> Float[np.ndarray, " steps"]:
    """``s_n = (E |(1 - k_n) x_0 + k_n x_N - x_n|^2)^(1/2)``, ``k_n`` the fraction of time passed at step ``n``.

    Zero at both ends, and throughout for a straight flow; it bounds the W2 distance between the marginals and those
    interpolated from their ends. Raises ``ValueError`` unless both ends of the grid are stored.
    """
    last = len(m.manifest.ts) - 1
    if m.manifest.steps[0] != 0 or m.manifest.steps[-1] != last:
        raise ValueError(f"the straightness defect needs steps 0 and {last}, but the set stores {m.manifest.steps}")
    return trajectories.straightness(m.x, m.ts)


def _specify(ts, direction, flow, data, count, shape, seed, solver, backward_map, steps, shard_size, dtype):
    """The checked manifest (without shards) of a build, and its data as an array."""
    ts = trajectories.check_rising(ts)
    n = len(ts) - 1
    steps = tuple(range(n + 1)) if steps is None else tuple(sorted({int(i) for i in steps}))
    if not steps or steps[0] < 0 or steps[-1] > n:
        raise ValueError(
            f"steps={steps} must be some of the grid's indices 0 .. {n}; give steps=None to store them all"
        )
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype={dtype!r} is not one of 'float32', 'float16'")
    trajectories.check_how(direction, solver, backward_map)
    if direction == "forward":
        if data is not None or count is None or shape is None:
            raise ValueError("direction='forward' starts from noise: give count=, shape= (of one example), and no data")
    else:
        if data is None or count is not None or shape is not None:
            raise ValueError("direction='backward' starts from data: give data= [M, ...], and neither count nor shape")
        if isinstance(data, jax.Array) or not isinstance(data, Rows):
            data = np.asarray(data)
        if data.ndim < 1 or not np.issubdtype(data.dtype, np.floating):
            raise ValueError(
                f"data must be floats [M, ...] in the network's units (images in [-1, 1]), got {data.dtype}{data.shape}"
            )
        count, shape, seed = data.shape[0], data.shape[1:], None
    if count < 1 or shard_size < 1:
        raise ValueError(f"count={count} and shard_size={shard_size} must be at least 1")
    backward = direction == "backward"
    m = Manifest(
        version=shards.VERSION, direction=direction, flow=flow, solver=solver,
        backward_map=backward_map if backward else None, ts=tuple(ts.tolist()), steps=steps, dtype=dtype,
        shape=tuple(int(i) for i in shape), count=int(count), seed=seed, shard_size=shard_size,
        data=checkpoint.digest_rows(data) if backward else None,
    )  # fmt: skip
    return m, data


def _process(index: int | None, count: int | None) -> dict[str, int]:
    count = jax.process_count() if count is None else count
    index = min(jax.process_index(), count - 1) if index is None else index
    if not 0 <= index < count:
        raise ValueError(f"process_index={index} must be one of 0 .. {count - 1}, process_count={count} at least 1")
    return {"process_index": index, "process_count": count}


def _check_room(directory: str | os.PathLike, m: Manifest) -> None:
    """Refuses a disk that cannot take the shards that no manifest has yet."""
    built = {shard.file for shard in getattr(shards.load(directory), "shards", ())}
    need, free = shards.size(m, set(shards.ranges(m)) - built), shutil.disk_usage(directory).free
    if need > free:
        raise OSError(
            f"the {m.direction} marginals need {need / 1e9:.3g} GB more in {directory}, where {free / 1e9:.3g} GB are "
            "free; choose a disk with room, fewer examples or steps, or dtype='float16'"
        )


def _draw(batch_size: int, seed: int, process_index: int, process_count: int):
    """``draw(step, *sizes)``: for each size this process's share of uniform indices below it, of the step alone."""
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of process_count={process_count}, and "
            f"process_index={process_index} one of 0 .. {process_count - 1}"
        )
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)

    def draw(step: int, *sizes: int) -> list[np.ndarray]:
        rng = np.random.default_rng([seed, step])
        return [rng.integers(size, size=batch_size)[mine] for size in sizes]

    return draw


def _columns(m: Marginals, steps: Iterable[int] | None) -> np.ndarray:
    """Where the grid indices ``steps`` are stored."""
    if steps is None:
        return np.arange(len(m.ts))
    steps, stored = sorted({int(n) for n in steps}), list(m.manifest.steps)
    if not steps or not set(steps) <= set(stored):
        raise ValueError(f"steps={tuple(steps)} must be some of those that the set stores, {tuple(stored)}")
    return np.array([stored.index(n) for n in steps])


def _examples(m: Marginals, examples: slice | range | None) -> range:
    if not isinstance(examples, range):
        examples = range(len(m.x))[slice(None) if examples is None else examples]
    if not examples or not 0 <= min(examples) <= max(examples) < len(m.x):
        raise ValueError(f"examples={examples} must be some of the set's 0 .. {len(m.x) - 1}")
    return examples
