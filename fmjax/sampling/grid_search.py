"""Time grids fitted to a teacher: even in curvature, or best under a cost by dynamic programming.

All need trajectories of the teacher: ``sample(..., trajectory=True)`` on a fine grid. ``curvature`` and ``jump_costs``
can be traced: with a large network jit them with its parameters as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import checks
from fmjax.sampling.grids import check_grid
from fmjax.types import Cond, FlowMapFn, VelocityFn, over_batch

COSTS = ("chord", "distance")


def curvature(velocity: VelocityFn, xs: Float[Array, "s b ..."], ts: Any, *, cond: Cond = None) -> Float[Array, " s"]:
    """Return ``E |d^2 x / dt^2|^2`` along trajectories of a flow, by the jvp ``v_t + (v . grad) v``.

    Norms are over an example, the mean is over the batch. The result is zero everywhere where a flow is straight.

    Args:
        velocity: ``v(x, t, cond)``.
        xs: trajectories ``[S, B, ...]``.
        ts: their times ``[S]``.
        cond: the condition of the velocity.

    Returns:
        One number ``>= 0`` for each time, ``[S]``.

    >>> import jax.numpy as jnp
    >>> curvature(lambda x, t, cond=None: -x, jnp.ones((2, 3, 1)), [0.0, 1.0]).tolist()
    [1.0, 1.0]
    """
    ts = check_grid(ts)

    def at(now):
        x, t = now
        t = over_batch(t, x)
        v = lambda x, t: velocity(x, t, cond)
        _, bend = jax.jvp(v, (x, t), (v(x, t), jnp.ones_like(t)))
        return jnp.mean(jnp.sum(jnp.square(bend).reshape(len(x), -1), 1))

    return jax.lax.map(at, (xs, jnp.asarray(ts)))


def even_grid(n: int, ts: Any, density: Any) -> np.ndarray:
    """Return ``n`` steps with equal parts of ``int density dt``, from ``ts[0]`` to ``ts[-1]`` (either order).

    With ``curvature`` as density every step gets the same part of the curvature. With its fourth root,
    ``sqrt |d^2 x / dt^2|``, Euler's errors ``h^2 |d^2 x / dt^2| / 2`` are equal, and their sum is smallest.

    Args:
        n: number of steps, 1 or more.
        ts: times ``[S]`` at which the density is known; over each interval it is taken as its mean.
        density: numbers ``>= 0``, ``[S]``; where all are zero (a straight flow) the times are even.

    Returns:
        Times ``[n + 1]``, float64.

    Raises:
        ValueError: for ``n < 1``, and for densities that are negative, not finite, or not one for each time.

    >>> even_grid(2, [0.0, 0.5, 1.0], [3.0, 3.0, 0.0]).round(4).tolist()
    [0.0, 0.375, 1.0]
    """
    ts, density = check_grid(ts), np.asarray(density, np.float64)
    if density.shape != ts.shape or not (np.isfinite(density) & (density >= 0)).all():
        raise ValueError(
            f"density={str(density.tolist())[:100]}: not one number >= 0 for each of {len(ts)} times. Correct it."
        )
    if n < 1:
        raise ValueError(f"n={n}: not a number of steps. Give 1 or more.")
    density = density if density.any() else np.ones_like(density)
    mass = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2 * np.abs(np.diff(ts))))
    return check_grid(np.interp(np.linspace(0, 1, n + 1) * mass[-1], mass, ts))


def jump_costs(
    step: FlowMapFn, xs: Float[Array, "s b ..."], ts: Any, *, cost: str = "chord", cond: Cond = None
) -> Float[Array, "s s"]:
    """Return the error of a single step between every two times of a teacher's trajectories.

    ``c[i, j]`` is the error of one step from ``xs[i]`` to ``ts[j]``, the mean over the batch of

    * ``"chord"``, of GITS (arXiv 2405.11326): the distance of the jumped point from the line through the ends of the
      trajectory, less the distance of ``xs[j]`` from it; it may be negative;
    * ``"distance"``, of BOSS (arXiv 2312.16414): ``|jump - xs[j]|``, the local error.

    GITS jumps by Euler in ``sigma``, ``ddim``. The network is evaluated once a time for steps of one evaluation.

    Args:
        step: a deterministic step without memory.
        xs: trajectories ``[S, B, ...]``.
        ts: their times ``[S]``.
        cost: ``"chord"`` or ``"distance"``.
        cond: the condition of the step.

    Returns:
        Costs ``[S, S]``, infinite for ``j <= i``.

    Raises:
        ValueError: for an unknown cost.

    >>> import jax.numpy as jnp
    >>> xs = jnp.array([[[0.0]], [[1.0]], [[4.0]]])
    >>> jump_costs(lambda x, s, t, cond=None: x, xs, [0.0, 0.5, 1.0], cost="distance")[0].tolist()
    [inf, 1.0, 4.0]
    """
    checks.check_choice("cost", cost, COSTS)
    ts = check_grid(ts)
    flat = lambda x: x.reshape(*x.shape[:2], -1)
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), -1))
    chord = flat(xs[-1:] - xs[:1])
    chord = chord / norm(chord)[..., None]

    def off_chord(y):
        y = flat(y - xs[:1])
        return norm(y - jnp.sum(y * chord, -1, keepdims=True) * chord)

    def row(now):
        x, s = now
        # the network at the start of the jump does not depend on the end, so vmap does not repeat it
        jumped = jax.vmap(lambda t: step(x, over_batch(s, x), over_batch(t, x), cond))(jnp.asarray(ts))
        error = norm(flat(jumped - xs)) if cost == "distance" else off_chord(jumped) - off_chord(xs)
        return error.mean(1)

    costs = jax.lax.map(row, (xs, jnp.asarray(ts)))
    return jnp.where(jnp.tri(len(ts), dtype=bool), jnp.inf, costs)


def best_steps(costs: Any, n: int, *, growth: float = 1.0, through: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the ``n`` jumps of smallest total cost over the points of a teacher, by dynamic programming.

    ``0 = i_0 < i_1 < ... < i_n = S - 1`` with the smallest ``sum_k growth^k c[i_k, i_{k+1}]``, from the end:
    ``V_j^k = min_{i > j} c[j, i] + growth V_i^{k-1}``. The grid is ``ts[list(indices)]``.

    Args:
        costs: costs ``[S, S]`` of ``jump_costs``.
        n: number of steps.
        growth: factor from one step to the next; above 1 (GITS: 1.15) it counts later errors more.
        through: indices that the grid must contain, for example bounds of segments.

    Returns:
        ``n + 1`` indices.

    Raises:
        ValueError: for costs that are not square or contain nan, an ``n`` that does not fit, and ``growth <= 0``.

    >>> best_steps(np.array([[np.inf, 1, 5], [np.inf, np.inf, 1], [np.inf, np.inf, np.inf]]), 2)
    (0, 1, 2)
    """
    costs = np.array(costs, np.float64)
    points = len(costs)
    if costs.ndim != 2 or costs.shape != (points, points) or np.isnan(costs[np.triu_indices(points, 1)]).any():
        raise ValueError(f"costs={costs.shape}: not a square matrix without nan. Give the result of jump_costs.")
    inner = sorted({int(b) for b in through} - {0, points - 1})
    if not all(0 < b < points - 1 for b in inner):
        raise ValueError(f"through={tuple(through)}: not among the {points} points. Give indices 0 .. {points - 1}.")
    if not len(inner) < n < points:
        raise ValueError(
            f"n={n}: impossible over {points} points through {tuple(through)}. Give {len(inner) + 1} to {points - 1}."
        )
    if not 0 < growth < math.inf:
        raise ValueError(f"growth={growth}: not positive and finite. Use 1 to count all errors alike.")
    costs[np.tril_indices(points)] = np.inf
    for bound in inner:
        costs[:bound, bound + 1 :] = np.inf  # no jump across it
    best, ahead = np.full(points, np.inf), []
    best[-1] = 0
    for _ in range(n):
        total = costs + growth * best
        ahead.append(total.argmin(1))
        best = total.min(1)
    index = [0]
    for choice in reversed(ahead):
        index.append(int(choice[index[-1]]))
    return tuple(index)


def steps_per_segment(index: Sequence[int], through: Sequence[int]) -> tuple[int, ...]:
    """Return the number of steps that ``best_steps`` gives to each segment.

    Args:
        index: the result of ``best_steps(..., through=through)``.
        through: indices of the inner bounds of the segments.

    Returns:
        One number of steps for each segment.

    >>> steps_per_segment((0, 4, 6, 7, 9), (6,))
    (2, 2)
    """
    inner = [b for b in sorted(set(through)) if index[0] < b < index[-1]]
    places = [list(index).index(b) for b in (index[0], *inner, index[-1])]
    return tuple(np.diff(places).tolist())
