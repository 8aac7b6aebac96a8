"""Solve a batch of examples along the whole grid of marginals, with a velocity's solver or a flow map.

Forward steps ``Phi_n`` go from ``t_n`` to ``t_{n+1}``. Backward steps ``Psi_n`` are either ``reverse``, the solver with
a negative step (for a flow map, the jump ``X_{t,s}``), or ``inverse``, the exact inverse of ``Phi_n``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from fmjax import sampling
from fmjax.data.dataset import Rows
from fmjax.keys import example_keys, from_seed, normal
from fmjax.sampling import grids
from fmjax.storage import columns
from fmjax.storage.shards import Manifest
from fmjax.types import Cond, FlowMapFn, Params, VelocityFn, over_batch

FLOW_MAP = "flow_map"  # the name of the solver for a function that is a flow map already
CHUNK = 1024  # examples in memory at a time, where a whole set is read
ITERATIONS = {True: 40, False: 20}  # of the inverse of a jump and of a solver's step: jumps are longer, and cheaper
View = Callable[[Params], VelocityFn | FlowMapFn]


def carry(
    bound: VelocityFn | FlowMapFn,
    x: Float[Array, "b ..."],
    ts: np.ndarray,
    cond: Cond = None,
    *,
    direction: str,
    solver: str,
    backward_map: str | None,
) -> tuple[Float[Array, "n b ..."], Any, Float[Array, " b"] | None]:
    """Solve from the start of a rising grid (forward) or from its end (backward).

    Args:
        bound: velocity, or with ``solver="flow_map"`` a flow map.
        x: states ``[B, ...]`` at ``ts[0]`` (forward) or ``ts[-1]`` (backward).
        ts: rising times ``[N + 1]``.
        cond: conditions of the examples, arrays ``[B, ...]``.
        direction: ``"forward"`` or ``"backward"``.
        solver: name of a solver, or ``"flow_map"``.
        backward_map: ``"reverse"`` or ``"inverse"`` (backward only).

    Returns:
        ``(xs, result, defect)``: the states ``[N + 1, B, ...]`` in the order of the grid; the result of diffrax, where
        diffrax solved; and ``defect: [B]`` (inverse only), the largest residual ``Phi_n(x_n) - x_{n+1}`` over the
        steps, its root mean square relative to ``1 + rms(x_{n+1})``. A large defect means that the fixed point did not
        converge.

    Raises:
        ValueError: a function whose values do not have the shape of ``x``, or a wider dtype.
    """
    is_map = solver == FLOW_MAP
    t0, kind = over_batch(0.0, x), "flow map" if is_map else "velocity"
    out = jax.eval_shape(bound, x, t0, t0, cond) if is_map else jax.eval_shape(bound, x, t0, cond)
    if out.shape != x.shape or jnp.promote_types(out.dtype, x.dtype) != x.dtype:
        raise ValueError(f"the {kind} of x {x.dtype}{x.shape} returned {out.dtype}{out.shape}. Return the shape of x.")
    if direction == "backward" and backward_map == "inverse":
        return _invert(bound, x, ts, cond, solver)
    grid = ts[::-1] if direction == "backward" else ts
    if is_map:
        xs, result = sampling.sample(bound, x, grid, cond=cond, trajectory=True), None
    else:
        xs, result = sampling.integrate(bound, x, grid, solver=solver, cond=cond)
    return xs[::-1] if direction == "backward" else xs, result, None


def _invert(bound, x, ts, cond, solver):
    """Return the states of exact inverse steps from the end of the grid, no result, and the defect ``[B]``."""
    is_map = solver == FLOW_MAP
    step = bound if is_map else sampling.runge_kutta(bound, sampling.tableau(solver))
    # the reverse step of a solver is a good first guess; a flow map may know no way back
    guess = (lambda y, s, t, cond=None, key=None: y) if is_map else None
    back = sampling.inverse(step, iterations=ITERATIONS[is_map], start=guess)
    xs = sampling.sample(back, x, ts[::-1], cond=cond, trajectory=True)[::-1]
    rms = lambda y: jnp.sqrt(jnp.mean(y.reshape(len(y), -1) ** 2, 1))

    def residual(interval):
        before, after, s, t = interval
        return rms(step(before, over_batch(s, x), over_batch(t, x), cond) - after) / (1 + rms(after))

    defect = jax.lax.map(residual, (xs[:-1], xs[1:], jnp.asarray(ts[:-1]), jnp.asarray(ts[1:])))
    return xs, None, defect.max(0)


def solve_nfe(n: int, *, direction: str, solver: str, backward_map: str | None) -> int | None:
    """Return the number of network evaluations per example of a solve.

    Args:
        n: number of intervals of the grid.
        direction: ``"forward"`` or ``"backward"``.
        solver: name of the solver, or ``"flow_map"``.
        backward_map: ``"reverse"`` or ``"inverse"`` (backward only).

    Returns:
        The number, or ``None`` for a diffrax solver that is not explicit.
    """
    is_map = solver == FLOW_MAP
    if direction == "backward" and backward_map == "inverse":
        guesses, steps = (0 if is_map else 1), ITERATIONS[is_map] + 2  # the residuals, and the defect's
        return n * (guesses + steps) * (1 if is_map else len(sampling.tableau(solver).b))
    if is_map:
        return n
    tableau = getattr(sampling.diffrax_solver(solver), "tableau", None)
    if not hasattr(tableau, "b_sol") or getattr(tableau, "a_diagonal", None) is not None:
        return None
    # first same as last: the last stage of a step is the first stage of the next
    return n * (tableau.num_stages - 1) + 1 if tableau.fsal else n * tableau.num_stages


def lower_solve(view: View, params: Params, m: Manifest, mesh: Mesh, batch: int, start: Callable = normal):
    """Trace the solve of one batch.

    Parameters are an argument: captured, they would become a part of the program. Each device solves its own rows:
    left to the partitioner, the buffers of times in diffrax were split and summed over devices.

    Args:
        view: ``view(params)`` is a velocity, or a flow map.
        params: parameters of the network.
        m: manifest of the set, without shards.
        mesh: devices of this process, with the axis ``"data"``.
        batch: number of rows.
        start: ``start(keys, shape)`` draws the states ``[B, *shape]`` at ``ts[0]`` (forward).

    Returns:
        The lowered function of ``(params, (index [B] or x [B, ...], cond))``. Compiled, it returns ``(x, finite,
        result, defect)``: ``x [B, steps, ...]``, whether each step is finite ``[B, steps]``, and the others as in
        ``carry``.
    """
    ts, steps = np.asarray(m.ts, np.float32), np.asarray(m.steps)
    options = {"direction": m.direction, "solver": m.solver, "backward_map": m.backward_map}

    def solve(params, rows):
        x, cond = rows
        if m.data is None:
            index, x = x, start(example_keys(from_seed(m.seed), x), m.shape)
            if x.shape != (len(index), *m.shape) or x.dtype != jnp.float32:
                source = f"float32{(len(index), *m.shape)}"
                raise ValueError(f"start={m.start}: it returned {x.dtype}{x.shape}. Return the source, {source}.")
        xs, result, defect = carry(view(params), x, ts, cond, **options)
        x = jnp.moveaxis(xs[steps], 0, 1).astype(m.dtype)
        finite = jnp.isfinite(x).reshape(*x.shape[:2], -1).all(-1)
        return x, finite, jax.tree.map(jnp.atleast_1d, result), defect  # one result per device

    x = jax.ShapeDtypeStruct((batch,), np.int32)
    if m.data is not None:
        x = jax.ShapeDtypeStruct((batch, *m.shape), np.float32)
    return by_rows(solve, mesh).lower(params, (x, _cond_structs(m.cond, batch)))


def _cond_structs(description: str | None, batch: int) -> Cond:
    """Return the shapes and dtypes of a batch of conditions."""
    if description is None:
        return None
    structs = [jax.ShapeDtypeStruct((batch, *c.shape), c.dtype) for c in columns.layout(description)]
    return columns.rebuild(description, structs)


def chord_distance(x: Rows, ts: np.ndarray) -> Float[np.ndarray, " n"]:
    """Return how far trajectories are from the chords between their ends, at every time.

    Args:
        x: trajectories ``[M, N + 1, ...]``, read ``CHUNK`` examples at a time.
        ts: their times ``[N + 1]``.

    Returns:
        ``(E |(1 - k_n) x_0 + k_n x_N - x_n|^2)^(1/2)``, ``[N + 1]``.
    """
    k, total = elapsed_fractions(ts)[:, None], np.zeros(len(ts))
    for start in range(0, len(x), CHUNK):
        xs = np.asarray(x[start : start + CHUNK], np.float32)
        xs = xs.reshape(*xs.shape[:2], -1)
        total += (((1 - k) * xs[:, :1] + k * xs[:, -1:] - xs) ** 2).sum(-1).sum(0, dtype=np.float64)
    return np.sqrt(total / len(x))


def elapsed_fractions(ts: np.ndarray) -> Float[np.ndarray, " n"]:
    """Return the elapsed fraction of the time axis at each time, ``k_n``.

    Args:
        ts: times ``[n]``.

    Returns:
        ``(t_n - t_0) / (t_N - t_0)``, ``[n]``.

    >>> elapsed_fractions(np.array([0.5, 0.75, 1.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return (ts - ts[0]) / (ts[-1] - ts[0])


def network_seconds(view: View, params: Params, m: Manifest, mesh: Mesh, batch: int) -> float:
    """Measure one evaluation of the network on a batch.

    Args:
        view: ``view(params)`` is a velocity, or a flow map.
        params: parameters of the network, on the devices of the mesh.
        m: manifest of the set.
        mesh: devices of this process.
        batch: number of rows.

    Returns:
        Seconds: the median of three calls, after one that compiles.
    """

    def call(params, rows):
        x, cond = rows
        t = over_batch(0.5, x)
        return view(params)(x, t, t, cond) if m.solver == FLOW_MAP else view(params)(x, t, cond)

    zeros = lambda s: np.zeros(s.shape, s.dtype)
    rows = np.zeros((batch, *m.shape), np.float32), jax.tree.map(zeros, _cond_structs(m.cond, batch))
    rows = jax.device_put(rows, NamedSharding(mesh, P("data")))
    run, seconds = by_rows(call, mesh), []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(run(params, rows))
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[1]


def fit_mesh(mesh: Mesh | None, batch: int, count: int, shard_size: int) -> tuple[Mesh, int]:
    """Return the part of a mesh that belongs to this process, and a batch that fits a shard.

    Args:
        mesh: mesh with the one axis ``"data"``; ``None`` for one device.
        batch: number of rows per batch.
        count: number of examples.
        shard_size: number of examples per shard.

    Returns:
        The mesh of this process's devices, and the batch size, at most a shard rounded up to the number of devices.

    Raises:
        ValueError: another axis, a mesh without a device of this process, or a batch that the devices do not divide.
    """
    mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",)) if mesh is None else mesh
    if mesh.axis_names != ("data",):
        raise ValueError(f"mesh axes={mesh.axis_names}: the solve is split by rows. Give a mesh with the axis 'data'.")
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if not local:
        raise ValueError(f"mesh={mesh.devices.size} devices: none of this process. Give the mesh of all devices.")
    if batch < 1 or batch % len(local):
        raise ValueError(
            f"batch={batch}: the mesh has {len(local)} devices. Give a positive multiple of {len(local)} rows."
        )
    return Mesh(np.array(local), ("data",)), min(batch, -(-min(shard_size, count) // len(local)) * len(local))


def place_params(mesh: Mesh, params: Params) -> Params:
    """Copy parameters to every device of this process; they may come from a mesh of all processes.

    Args:
        mesh: devices of this process.
        params: parameters.

    Returns:
        The same tree of arrays, replicated over the mesh.
    """
    params = jax.device_get(params) if jax.process_count() > 1 else params
    return jax.device_put(params, NamedSharding(mesh, P()))


def by_rows(function: Callable, mesh: Mesh) -> Callable:
    """Return a jitted function of which each device computes its own rows, without communication.

    Args:
        function: ``function(params, rows)``; every array of ``rows`` and of the result has the batch first.
        mesh: devices of this process, with the axis ``"data"``.

    Returns:
        The function with the same arguments.
    """
    replicated, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    local = jax.shard_map(function, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    return jax.jit(local, in_shardings=(replicated, rows), out_shardings=rows)


def check_rising(ts) -> np.ndarray:
    """Return the grid of a set of marginals, checked.

    Args:
        ts: times ``[N + 1]``.

    Returns:
        The times, float32.

    Raises:
        ValueError: times that do not rise strictly, or lie outside [0, 1].
    """
    ts = grids.check_grid(ts, dtype=np.float32)
    if ts[0] > ts[-1]:
        raise ValueError(
            f"ts={ts[0]:g} .. {ts[-1]:g}: marginals need the rising grid of the sampler. Give ts[::-1]; direction "
            "says at which end a solve starts."
        )
    return ts


def check_options(direction: str, solver: str, backward_map: str) -> None:
    """Check the direction, the solver and the backward map of a set of marginals.

    Args:
        direction: ``"forward"`` or ``"backward"``.
        solver: name of a solver, or ``"flow_map"``.
        backward_map: ``"reverse"`` or ``"inverse"``.

    Raises:
        ValueError: an unknown name, or a solver whose steps cannot be inverted.
        TypeError: a solver that is not a name.
    """
    for name, value, allowed in (
        ("direction", direction, ("forward", "backward")),
        ("backward_map", backward_map, ("reverse", "inverse")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: unknown. Give one of {', '.join(map(repr, allowed))}.")
    if not isinstance(solver, str):
        raise TypeError(f"solver={solver!r}: the manifest stores a name. Give the name, such as 'rk4' or 'Tsit5'.")
    if solver == FLOW_MAP:
        return
    if direction == "backward" and backward_map == "inverse":
        sampling.tableau(solver)  # only these steps can be inverted
    sampling.diffrax_solver(solver)


def check_solved(x, finite, result, defect, index: np.ndarray, m: Manifest, tol: float) -> None:
    """Raise an error that names the examples of a failed solve, outside jit.

    Args:
        x: states ``[B, steps, ...]``; rows after ``len(index)`` are padding and ignored.
        finite: whether each state is finite, ``[B, steps]``.
        result: the result of diffrax, or ``None``.
        defect: the residual of inverse steps ``[B]``, or ``None``.
        index: indices of the examples in the set.
        m: manifest of the set.
        tol: the largest residual of inverse steps.

    Raises:
        RuntimeError: values that are not finite, or inverse steps that did not converge.
    """
    solve = f"the {m.direction} solve ({m.solver}, {len(m.ts) - 1} steps)"
    finite = np.asarray(finite)[: len(index)]
    if not finite.all():
        bad, at = index[~finite.all(1)], np.asarray(m.steps)[~finite.all(0)][0 if m.direction == "forward" else -1]
        limit = np.finfo(m.dtype).max
        hint = "" if m.dtype == "float32" else f", or use dtype='float32' ({m.dtype} ends at {limit:g})"
        raise RuntimeError(f"{solve} has non-finite values at step {at} in {_name(bad)}; check the parameters{hint}")
    if result is not None:
        worst = jax.tree.map(jnp.max, result)  # over devices; success is the smallest code
        sampling.checked_solve(x, worst, what=f"{solve} of examples {index[0]} .. {index[-1]}")
    if defect is None:
        return
    defect = np.asarray(defect)[: len(index)]
    if (stuck := ~(defect <= tol)).any():
        raise RuntimeError(
            f"{solve}: the inverse steps did not converge in {_name(index[stuck])}: residual {defect.max():.1e} > "
            f"tol={tol:g}; use more steps, backward_map='reverse', or a larger tol"
        )


def _name(index: np.ndarray) -> str:
    more = f" and {len(index) - 8} more" if len(index) > 8 else ""
    return f"example{'s' if len(index) > 1 else ''} {', '.join(map(str, index[:8]))}{more}"
