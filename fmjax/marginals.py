"""The marginals of a flow on a solver's grid, as data sets on disk: built through diffrax, sharded, resumable.

With forward steps ``Phi_n`` from ``t_n`` to ``t_{n+1}`` and backward steps ``Psi_n``, forward marginals start at noise,
``p_0 = N(0, I)``, ``p_{n+1} = Phi_n # p_n``, and backward ones at data, ``q_N = data``, ``q_n = Psi_n # q_{n+1}``.
``Psi_n`` is the solver run with a negative step (``reverse``) or the exact inverse of ``Phi_n`` (``inverse``; then
every f-divergence of ``p_n`` and ``q_n`` is the same for all ``n``).

A directory holds a manifest and shards (``fmjax.shards``); record ``i`` is example ``i``, ``[steps, ...]``. A shard's
numbers depend on its own examples only, so that a build killed at any moment goes on as if it had not been.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from fmjax import checkpoint, samplers, shards, solvers, times
from fmjax.shards import Manifest
from fmjax.types import Batch, Params, VelocityFn, example_keys, normal, over_batch


class Marginals(NamedTuple):
    """A set in memory: ``x: [M, steps, ...]``, the times ``ts: [steps]`` stored, and the manifest."""

    x: np.ndarray
    ts: np.ndarray
    manifest: Manifest


def _trajectory(velocity: VelocityFn, x, ts: np.ndarray, *, direction, solver, backward_map):
    """Carries ``x`` along the rising grid from its start (forward) or its end: ``(xs: [N+1, B, ...], result, defect)``.

    ``xs`` is in the order of the grid. ``defect: [B]`` (inverse only) is the worst residual ``Phi_n(x_n) - x_{n+1}``,
    its rms relative to ``1 + rms(x_{n+1})``: the fixed point has no other way to say that it did not converge.
    """
    out = jax.eval_shape(velocity, x, over_batch(0.0, x))
    if out.shape != x.shape or jnp.promote_types(out.dtype, x.dtype) != x.dtype:
        raise ValueError(f"the velocity of x {x.dtype}{x.shape} must have its shape and fit its dtype, got {out}")
    if direction == "forward":
        return *solvers.integrate(velocity, x, ts, solver=solver), None
    if backward_map == "reverse":
        xs, result = solvers.integrate(velocity, x, ts[::-1], solver=solver)
        return xs[::-1], result, None
    step = solvers.runge_kutta(velocity, solvers.tableau(solver))
    xs = samplers.sample(solvers.inverse(step), x, ts[::-1], trajectory=True)[::-1]
    rms = lambda y: jnp.sqrt(jnp.mean(y.reshape(len(y), -1) ** 2, 1))
    residual = lambda now: rms(step(now[0], now[2], now[3]) - now[1]) / (1 + rms(now[1]))
    defect = jax.lax.map(residual, (xs[:-1], xs[1:], jnp.asarray(ts[:-1]), jnp.asarray(ts[1:])))
    return xs, None, defect.max(0)


def _lower(velocity, params, m: Manifest, mesh: Mesh, batch: int):
    """The traced solve of one batch; takes ``(params, index [B])`` forward and ``(params, x [B, ...])`` backward.

    Parameters are an argument: captured, they would go into the program text. Each device solves its own rows: left to
    the partitioner, diffrax's buffers of times were split and summed over devices.
    """
    ts, steps = np.asarray(m.ts, np.float32), np.asarray(m.steps)

    def solve(params, start):
        if m.direction == "forward":
            start = normal(example_keys(jax.random.key(m.seed), start), m.shape, jnp.float32)
        how = {"direction": m.direction, "solver": m.solver, "backward_map": m.backward_map}
        xs, result, defect = _trajectory(velocity(params), start, ts, **how)
        x = jnp.moveaxis(xs[steps], 0, 1).astype(m.dtype)
        finite = jnp.isfinite(x).reshape(*x.shape[:2], -1).all(-1)
        return x, finite, jax.tree.map(jnp.atleast_1d, result), defect  # a result a device

    one, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    local = jax.shard_map(solve, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    solve = jax.jit(local, in_shardings=(one, rows), out_shardings=rows)
    start = ((), np.int32) if m.direction == "forward" else (m.shape, np.float32)
    return solve.lower(params, jax.ShapeDtypeStruct((batch, *start[0]), start[1]))


def build(
    velocity: Callable[[Params], VelocityFn],
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
) -> Manifest:
    """Builds, or goes on building, the marginals of the flow ``velocity(params)`` on the sampler's rising grid ``ts``.

    Forward: ``count`` examples of ``shape`` from noise at ``ts[0]``, that of example ``i`` drawn from its own key
    (``seed``); backward: from ``data: [M, ...]`` (floats in the network's units) at ``ts[-1]``. One ``solver`` step a
    grid interval. ``steps`` are the grid indices to store (default all). ``mesh`` has one axis ``"data"`` (default one
    device); a batch is split over it and the solve has no communication. Complete shards are kept, torn ones named in
    the log and built again; a complete set solves nothing. ``progress(done, total)`` counts examples.

    Returns the manifest. Raises ``ValueError`` before any work for bad arguments, a batch that the mesh does not
    divide, or a directory built from something else (naming each field that differs); ``RuntimeError`` naming the
    examples whose solve was not finite, or whose inverse steps did not converge to ``tol`` (relative rms residual).
    """
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",)) if mesh is None else mesh
    m, data = _specify(ts, direction, flow, data, count, shape, seed, solver, backward_map, steps, shard_size, dtype)
    _check_mesh(mesh, batch)
    parts, good = shards.ranges(m), shards.resume(directory, m)
    done = sum(shard.count for shard in good.values())
    if progress:
        progress(done, m.count)
    if len(good) == len(parts):
        return m._replace(shards=tuple(good[name] for name in parts))
    batch = min(batch, -(-min(m.shard_size, m.count) // mesh.size) * mesh.size)
    params, rows = jax.device_put(params, NamedSharding(mesh, P())), NamedSharding(mesh, P("data"))
    solve = _lower(velocity, params, m, mesh, batch)  # traces: a bad velocity or solver fails before a file is written
    shards.save(directory, m, good)
    solve = solve.compile()

    def records(start, stop):
        nonlocal done
        for low in range(start, stop, batch):
            high = min(low + batch, stop)
            index = np.minimum(np.arange(low, low + batch, dtype=np.int32), stop - 1)  # one shape: pad, then drop
            given = index if data is None else np.asarray(data[index], np.float32)
            x, *outcome = solve(params, jax.device_put(given, rows))
            _check_solved(x, *outcome, index[: high - low], m, tol)
            yield from (one.tobytes() for one in np.asarray(x)[: high - low])
            done += high - low
            if progress:
                progress(done, m.count)

    for name, (start, stop) in parts.items():
        if name not in good:
            good[name] = shards.write(directory, name, records(start, stop))
            m = shards.save(directory, m, good)
    return m


def read(directory: str | os.PathLike, *, expect: dict | None = None) -> Marginals:
    """Reads a complete set, every shard checked against its SHA-256.

    ``expect`` holds manifest fields that must agree, for example ``{"flow": digest, "solver": "rk4", "ts": ts}``.
    Raises ``FileNotFoundError`` without a manifest, ``ValueError`` naming the fields that differ, and ``RuntimeError``
    naming an unfinished set, or a shard that is missing or torn, with the fix.
    """
    m = shards.load(directory)
    if m is None:
        raise FileNotFoundError(f"no marginals in {directory}: {shards.MANIFEST} is missing; build them there first")
    shards.check(directory, m, expect or {})
    return Marginals(shards.read(directory, m), np.asarray(m.ts, np.float32)[list(m.steps)], m)


def batches(
    m: Marginals, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> Callable[[int], Batch]:
    """Training batches ``Batch(x1=x, t=t_n)`` as a function of the step: example and stored step index both uniform.

    Stateless, so that a resumed run sees what the uninterrupted one would have. ``batch_size`` is over all processes;
    each gets its slice of the same draw. Raises ``ValueError`` for a batch that the processes do not divide.
    """
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of process_count={process_count}, and "
            f"process_index={process_index} one of 0 .. {process_count - 1}"
        )
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        example, n = (rng.integers(len(m.x), size=batch_size)[mine], rng.integers(len(m.ts), size=batch_size)[mine])
        return Batch(x1=m.x[example, n].astype(np.float32), t=m.ts[n])

    return batch


def round_trip(
    velocity: Callable[[Params], VelocityFn],
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
    ts = _check_rising(ts)
    check_how("backward", solver, backward_map)

    @jax.jit
    def run(params, x):
        v, how = velocity(params), {"solver": solver, "backward_map": backward_map}
        down, *_ = _trajectory(v, x, ts, direction="backward", **how)
        up, *_ = _trajectory(v, down[0], ts, direction="forward", **how)
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
    x = m.x.reshape(*m.x.shape[:2], -1).astype(np.float32)
    k = ((m.ts - m.ts[0]) / (m.ts[-1] - m.ts[0]))[:, None]
    return np.sqrt((((1 - k) * x[:, :1] + k * x[:, -1:] - x) ** 2).sum(-1).mean(0))


def _specify(ts, direction, flow, data, count, shape, seed, solver, backward_map, steps, shard_size, dtype):
    """The checked manifest (without shards) of a build, and its data as an array."""
    ts = _check_rising(ts)
    n = len(ts) - 1
    steps = tuple(range(n + 1)) if steps is None else tuple(sorted({int(i) for i in steps}))
    if not steps or steps[0] < 0 or steps[-1] > n:
        raise ValueError(
            f"steps={steps} must be some of the grid's indices 0 .. {n}; give steps=None to store them all"
        )
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype={dtype!r} is not one of 'float32', 'float16'")
    check_how(direction, solver, backward_map)
    if direction == "forward":
        if data is not None or count is None or shape is None:
            raise ValueError("direction='forward' starts from noise: give count=, shape= (of one example), and no data")
    else:
        if data is None or count is not None or shape is not None:
            raise ValueError("direction='backward' starts from data: give data= [M, ...], and neither count nor shape")
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
        data=checkpoint.digest(data) if backward else None,
    )  # fmt: skip
    return m, data


def _check_rising(ts) -> np.ndarray:
    ts = times.check_grid(ts)
    if ts[0] > ts[-1]:
        raise ValueError(
            f"marginals are built on the sampler's rising grid, got ts from {ts[0]:g} to {ts[-1]:g}; give ts[::-1] "
            "(the direction says which end to start from)"
        )
    return ts


def check_how(direction: str, solver: str, backward_map: str) -> None:
    """Raises ``ValueError`` (``TypeError`` for a solver that is no name) for what ``build`` would refuse of these."""
    for name, value, allowed in (
        ("direction", direction, ("forward", "backward")),
        ("backward_map", backward_map, ("reverse", "inverse")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
    if not isinstance(solver, str):
        raise TypeError(f"the manifest names the solver, so give it by name ('rk4', 'Tsit5'), not {solver!r}")
    if direction == "backward" and backward_map == "inverse":
        solvers.tableau(solver)  # only these steps can be inverted
    solvers.diffrax_solver(solver)


def _check_mesh(mesh: Mesh, batch: int) -> None:
    if mesh.axis_names != ("data",):
        raise ValueError(f"the mesh must have the one axis 'data', got {mesh.axis_names}")
    if batch < 1 or batch % mesh.size:
        raise ValueError(f"batch={batch} must be a positive multiple of the mesh's {mesh.size} devices")
    if any(d.process_index != jax.process_index() for d in mesh.devices.flat):
        raise ValueError("the mesh spans several processes; build in one process, on a mesh of jax.local_devices()")


def _check_solved(x, finite, result, defect, index: np.ndarray, m: Manifest, tol: float) -> None:
    """Turns a failed solve into an error that names the examples, outside jit (padding is not looked at)."""
    what = f"the {m.direction} solve ({m.solver}, {len(m.ts) - 1} steps)"
    finite = np.asarray(finite)[: len(index)]
    if not finite.all():
        bad, at = index[~finite.all(1)], np.asarray(m.steps)[~finite.all(0)][0 if m.direction == "forward" else -1]
        hint = "" if m.dtype == "float32" else f", or use dtype='float32' ({m.dtype} ends at {np.finfo(m.dtype).max:g})"
        raise RuntimeError(f"{what} left finite numbers at step {at} in {_name(bad)}; check the parameters{hint}")
    if result is not None:
        worst = jax.tree.map(jnp.max, result)  # over devices; success is the least code
        solvers.check(x, worst, what=f"{what} of examples {index[0]} .. {index[-1]}")
        return
    defect = np.asarray(defect)[: len(index)]
    if (stuck := ~(defect <= tol)).any():
        raise RuntimeError(
            f"{what}: the inverse steps did not converge in {_name(index[stuck])}: residual {defect.max():.1e} > "
            f"tol={tol:g}; use more steps, backward_map='reverse', or a larger tol"
        )


def _name(index: np.ndarray) -> str:
    more = f" and {len(index) - 8} more" if len(index) > 8 else ""
    return f"example{'s' if len(index) > 1 else ''} {', '.join(map(str, index[:8]))}{more}"
