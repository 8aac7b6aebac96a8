"""The solves of ``fmjax.marginals``: examples carried along a whole grid, by a velocity's solver or a flow map.

Forward steps are ``Phi_n`` from ``t_n`` to ``t_{n+1}``, backward ones ``Psi_n``: ``reverse``, the solver with a
negative step or the map's jump ``X_{t,s}``, or ``inverse``, the exact inverse of ``Phi_n``.
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
from fmjax.data.arrays import Rows
from fmjax.keys import example_keys, normal
from fmjax.sampling import grids
from fmjax.storage.shards import Manifest
from fmjax.types import FlowMapFn, Params, VelocityFn, over_batch

FLOW_MAP = "flow_map"  # the solver of what is a flow map itself
CHUNK = 1024  # examples in memory, where all are looked at
ITERATIONS = {True: 40, False: 20}  # of the inverse of a jump and of a solver's step: jumps are longer, and cheaper


def carry(
    bound: VelocityFn | FlowMapFn, x: Float[Array, "b ..."], ts: np.ndarray, *, direction, solver, backward_map
) -> tuple[Float[Array, "n b ..."], Any, Float[Array, " b"] | None]:
    """Carries ``x`` along the rising grid from its start (forward) or its end: ``(xs: [N+1, B, ...], result, defect)``.

    ``bound`` is a velocity, or with ``solver="flow_map"`` a flow map. ``xs`` is in the order of the grid. ``result`` is
    diffrax's, where it solved. ``defect: [B]`` (inverse only) is the worst residual ``Phi_n(x_n) - x_{n+1}``, its rms
    relative to ``1 + rms(x_{n+1})``: the fixed point has no other way to say that it did not converge. Raises
    ``ValueError`` for a function whose values are not of ``x``'s shape or dtype.
    """
    learned = solver == FLOW_MAP
    time, what = over_batch(0.0, x), "flow map" if learned else "velocity"
    out = jax.eval_shape(bound, x, time, time) if learned else jax.eval_shape(bound, x, time)
    if out.shape != x.shape or jnp.promote_types(out.dtype, x.dtype) != x.dtype:
        raise ValueError(f"the {what} of x {x.dtype}{x.shape} must have its shape and fit its dtype, got {out}")
    backward, exact = direction == "backward", backward_map == "inverse"
    grid = ts[::-1] if backward else ts
    if backward and exact:
        # a map need not know the way back, from which a solver's step starts
        step = bound if learned else sampling.runge_kutta(bound, sampling.tableau(solver))
        start = (lambda y, s, t, cond=None, key=None: y) if learned else None
        back = sampling.inverse(step, iterations=ITERATIONS[learned], start=start)
        xs = sampling.sample(back, x, grid, trajectory=True)[::-1]
        rms = lambda y: jnp.sqrt(jnp.mean(y.reshape(len(y), -1) ** 2, 1))
        residual = lambda a, b, s, t: rms(step(a, over_batch(s, x), over_batch(t, x)) - b) / (1 + rms(b))
        rows = (xs[:-1], xs[1:], jnp.asarray(ts[:-1]), jnp.asarray(ts[1:]))
        defect = jax.lax.map(lambda row: residual(*row), rows)
        return xs, None, defect.max(0)
    if learned:
        xs, result = sampling.sample(bound, x, grid, trajectory=True), None
    else:
        xs, result = sampling.integrate(bound, x, grid, solver=solver)
    return xs[::-1] if backward else xs, result, None


def nfe(n: int, *, direction: str, solver: str, backward_map: str | None) -> int | None:
    """Network evaluations of an example over ``n`` intervals; ``None`` for a diffrax solver that is not explicit."""
    learned = solver == FLOW_MAP
    if direction == "backward" and backward_map == "inverse":
        starts, steps = (0 if learned else 1), ITERATIONS[learned] + 2  # the residuals, and the defect's
        return n * (starts + steps) * (1 if learned else len(sampling.tableau(solver).b))
    if learned:
        return n
    tableau = getattr(sampling.diffrax_solver(solver), "tableau", None)
    if not hasattr(tableau, "b_sol") or getattr(tableau, "a_diagonal", None) is not None:
        return None
    # its last stage is the next step's first, which the first step has to evaluate
    return n * (tableau.num_stages - 1) + 1 if tableau.fsal else n * tableau.num_stages


def lower(view: Callable[[Params], VelocityFn | FlowMapFn], params: Params, m: Manifest, mesh: Mesh, batch: int):
    """The traced solve of one batch; takes ``(params, index [B])`` forward and ``(params, x [B, ...])`` backward.

    Parameters are an argument: captured, they would go into the program text. Each device solves its own rows: left to
    the partitioner, diffrax's buffers of times were split and summed over devices.
    """
    ts, steps = np.asarray(m.ts, np.float32), np.asarray(m.steps)

    def solve(params, start):
        if m.direction == "forward":
            start = normal(example_keys(jax.random.key(m.seed), start), m.shape, jnp.float32)
        how = {"direction": m.direction, "solver": m.solver, "backward_map": m.backward_map}
        xs, result, defect = carry(view(params), start, ts, **how)
        x = jnp.moveaxis(xs[steps], 0, 1).astype(m.dtype)
        finite = jnp.isfinite(x).reshape(*x.shape[:2], -1).all(-1)
        return x, finite, jax.tree.map(jnp.atleast_1d, result), defect  # a result a device

    start = ((), np.int32) if m.direction == "forward" else (m.shape, np.float32)
    return by_rows(solve, mesh).lower(params, jax.ShapeDtypeStruct((batch, *start[0]), start[1]))


def straightness(x: Rows, ts: np.ndarray) -> Float[np.ndarray, " n"]:
    """``(E |(1 - k_n) x_0 + k_n x_N - x_n|^2)^(1/2)`` of trajectories ``x: [M, N + 1, ...]``, some at a time."""
    k, total = fractions(ts)[:, None], np.zeros(len(ts))
    for start in range(0, len(x), CHUNK):
        xs = np.asarray(x[start : start + CHUNK], np.float32)
        xs = xs.reshape(*xs.shape[:2], -1)
        total += (((1 - k) * xs[:, :1] + k * xs[:, -1:] - xs) ** 2).sum(-1).sum(0, dtype=np.float64)
    return np.sqrt(total / len(x))


def fractions(ts: np.ndarray) -> Float[np.ndarray, " n"]:
    """``k_n``, the fraction of time that has passed at each of the times."""
    return (ts - ts[0]) / (ts[-1] - ts[0])


def seconds(view: Callable[[Params], VelocityFn | FlowMapFn], params: Params, m: Manifest, mesh: Mesh, batch: int):
    """Seconds of one evaluation of the network on a batch: the median of three, after one that compiles."""

    def call(params, x):
        t = over_batch(0.5, x)
        return view(params)(x, t, t) if m.solver == FLOW_MAP else view(params)(x, t)

    x = jax.device_put(np.zeros((batch, *m.shape), np.float32), NamedSharding(mesh, P("data")))
    run, taken = by_rows(call, mesh), []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(run(params, x))
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[1]


def fit(mesh: Mesh | None, batch: int, count: int, shard_size: int) -> tuple[Mesh, int]:
    """This process's part of the mesh, and a batch that is no larger than a shard."""
    mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",)) if mesh is None else mesh
    if mesh.axis_names != ("data",):
        raise ValueError(f"the mesh must have the one axis 'data', got {mesh.axis_names}")
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if not local:
        raise ValueError("no device of the mesh is this process's own; give the mesh of all of them, or of its own")
    if batch < 1 or batch % len(local):
        raise ValueError(f"batch={batch} must be a positive multiple of the mesh's {len(local)} devices")
    return Mesh(np.array(local), ("data",)), min(batch, -(-min(shard_size, count) // len(local)) * len(local))


def place(mesh: Mesh, params: Params) -> Params:
    """The parameters on this process's devices; they may come from a mesh of all processes."""
    params = jax.device_get(params) if jax.process_count() > 1 else params
    return jax.device_put(params, NamedSharding(mesh, P()))


def by_rows(function: Callable, mesh: Mesh):
    """``function(params, rows)``, jitted, each device of the mesh computing its own rows, without communication."""
    one, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    local = jax.shard_map(function, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    return jax.jit(local, in_shardings=(one, rows), out_shardings=rows)


def check_rising(ts) -> np.ndarray:
    """The grid, float32; raises ``ValueError`` where it does not rise."""
    ts = grids.check_grid(ts)
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
    if solver == FLOW_MAP:
        return
    if direction == "backward" and backward_map == "inverse":
        sampling.tableau(solver)  # only these steps can be inverted
    sampling.diffrax_solver(solver)


def check_solved(x, finite, result, defect, index: np.ndarray, m: Manifest, tol: float) -> None:
    """Turns a failed solve into an error that names the examples, outside jit (padding is not looked at)."""
    what = f"the {m.direction} solve ({m.solver}, {len(m.ts) - 1} steps)"
    finite = np.asarray(finite)[: len(index)]
    if not finite.all():
        bad, at = index[~finite.all(1)], np.asarray(m.steps)[~finite.all(0)][0 if m.direction == "forward" else -1]
        hint = "" if m.dtype == "float32" else f", or use dtype='float32' ({m.dtype} ends at {np.finfo(m.dtype).max:g})"
        raise RuntimeError(f"{what} left finite numbers at step {at} in {_name(bad)}; check the parameters{hint}")
    if result is not None:
        worst = jax.tree.map(jnp.max, result)  # over devices; success is the least code
        sampling.check_solve(x, worst, what=f"{what} of examples {index[0]} .. {index[-1]}")
    if defect is None:
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
