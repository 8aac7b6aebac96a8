"""Parts of the time axis: grids that hold their bounds, trajectories to train on, samplers with a step for each part.

Segments are told by their bounds ``b_0 < b_1 < ... < b_K`` (``methods.straighten``). A teacher's states at the bounds
are forward marginals on a grid with the bounds among its points, ``steps`` the indices of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import times
from fmjax.marginals import Marginals
from fmjax.methods.straighten import check_bounds
from fmjax.types import Batch, FlowMapFn, VelocityFn, over_batch


def grid(bounds: Sequence[float], counts: Sequence[int]) -> np.ndarray:
    """The grid that takes ``counts[k]`` equal steps in segment ``k``; every bound is a point of it, to the bit.

    Raises ``ValueError`` for bounds that do not rise within [0, 1], and unless there is a positive count a segment.
    """
    edges = check_bounds(bounds)
    if len(counts) != len(edges) - 1 or min(counts) < 1:
        raise ValueError(f"counts={tuple(counts)} must be {len(edges) - 1} positive numbers of steps, one a segment")
    parts = [np.linspace(s, t, n, endpoint=False) for s, t, n in zip(edges, edges[1:], counts, strict=False)]
    return times.check_grid(np.append(np.concatenate(parts), edges[-1]).astype(np.float32))


def inserted(ts, bounds: Sequence[float]) -> tuple[np.ndarray, tuple[int, ...]]:
    """A teacher's rising grid with the bounds among its points, and their indices: ``ts[i] == bound`` to the bit.

    A point nearer to a bound than a tenth of its interval moves there, so that no step is tiny; the ends of the grid
    stay. Raises ``ValueError`` for a bound outside the grid.
    """
    ts, edges = times.check_grid(ts), check_bounds(bounds)
    if ts[0] > ts[-1] or edges[0] < ts[0] or edges[-1] > ts[-1]:
        raise ValueError(f"bounds={tuple(bounds)} must lie within the teacher's rising grid, {ts[0]:g} to {ts[-1]:g}")
    for bound in edges:
        i = int(np.argmin(np.abs(ts - bound)))
        gap = np.min(np.diff(ts)[max(i - 1, 0) : i + 1])
        if ts[i] == bound:
            continue
        if abs(ts[i] - bound) < 0.1 * gap and 0 < i < len(ts) - 1 and ts[i] not in edges:
            ts[i] = bound
        else:
            ts = np.insert(ts, np.searchsorted(ts, bound), bound)
    index = tuple(int(np.flatnonzero(ts == bound)[0]) for bound in edges)
    return times.check_grid(ts), index


def piecewise(steps: Sequence[FlowMapFn], bounds: Sequence[float]) -> FlowMapFn:
    """A step that is ``steps[k]`` where it starts in segment ``k``; a bound belongs to the segment that starts there.

    For a grid that holds the bounds (``grid``). Each example takes the step of its own time; a step that no example
    takes is not computed, so that sampling costs one network a step. Raises ``ValueError`` unless there is one step a
    segment.
    """
    edges = check_bounds(bounds)
    if len(steps) != len(edges) - 1:
        raise ValueError(f"{len(edges) - 1} segments need as many steps, got {len(steps)}")
    if all(one is steps[0] for one in steps):
        return steps[0]

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        at = jnp.clip(jnp.searchsorted(jnp.asarray(edges), s, side="right") - 1, 0, len(steps) - 1)
        for k, one in enumerate(steps):
            mine = (at == k).reshape(-1, *(1,) * (x.ndim - 1))
            take = lambda x, one=one, mine=mine: jnp.where(mine, one(x, s, t, cond, key), x)
            # what earlier steps moved is no input of a later one: the masks are of the starting times
            x = jax.lax.cond(jnp.any(at == k), take, lambda x: x, x)
        return x

    return step


def batches(
    m: Marginals,
    bounds: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    keep: Sequence[int] = (),
    real: np.ndarray | None = None,
    kept_share: float = 0.5,
) -> Callable[[int], Batch]:
    """Batches for ``straighten``: ``Batch(x0=x_{b_k}, x1=x_{b_{k+1}}, t=b_k)`` of a teacher's trajectories.

    The segment is uniform over those not in ``keep``. With ``real`` data a share of the batch is in the segments
    ``keep``: ``x1 = (1 - t) z + t x`` at a uniform time ``t`` of theirs, for the retention. Stateless in the step.
    Raises ``ValueError`` where a bound is not stored.
    """
    edges = check_bounds(bounds)
    missing = [float(b) for b in edges if b not in m.ts]
    if missing:
        raise ValueError(f"the trajectories have no state at t={missing[0]:g}; give build the steps of inserted()")
    if bool(keep) != (real is not None):
        raise ValueError(f"keep={tuple(keep)} and real data, which the kept segments are tried on, need each other")
    at = [int(np.flatnonzero(m.ts == b)[0]) for b in edges]
    straight = np.array([k for k in range(len(edges) - 1) if k not in keep])
    kept = round(kept_share * batch_size) if keep else 0

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        example, k = rng.integers(len(m.x), size=batch_size), rng.choice(straight, batch_size)
        x0, x1 = (np.stack([m.x[i, at[j + d]] for i, j in zip(example, k, strict=True)]) for d in (0, 1))
        x0, x1, t = x0.astype(np.float32), x1.astype(np.float32), edges[k].copy()
        if kept:
            rows = np.linspace(0, batch_size, kept, endpoint=False).astype(int)  # spread over the devices
            k = rng.choice(np.asarray(keep), kept)
            t[rows] = r = edges[k] + (edges[k + 1] - edges[k]) * rng.random(kept, np.float32)
            r, x = r.reshape(-1, *(1,) * (x1.ndim - 1)), real[rng.integers(len(real), size=kept)]
            x1[rows] = (1 - r) * rng.standard_normal(x.shape, np.float32) + r * x
            x0[rows] = x1[rows]
        return Batch(x1=x1, x0=x0, t=t)

    return batch


def straightness(velocity: VelocityFn, x: Float[Array, "b ..."], s: float, t: float, *, steps: int = 32) -> Array:
    """``E int |v - chord|^2 / E |chord|^2``, time's mean over a segment, from states ``x`` at ``s``, by Euler steps."""
    grid_, h = jnp.linspace(s, t, steps + 1)[:-1], (t - s) / steps

    def body(x, r):
        v = velocity(x, over_batch(r, x))
        return x + h * v, v

    end, vs = jax.lax.scan(body, x, grid_)
    chord = (end - x) / (t - s)
    return jnp.mean(jnp.square(vs - chord)) / jnp.mean(jnp.square(chord))


def jump(before: VelocityFn, after: VelocityFn, x: Float[Array, "b ..."], t: float) -> Array:
    """The jump of a piecewise velocity at a bound, ``E |v(t+) - v(t-)|^2``, mean over elements, of states ``x``."""
    t = over_batch(t, x)
    return jnp.mean(jnp.square(after(x, t) - before(x, t)))
