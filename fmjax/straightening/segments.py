"""Parts of the time axis: grids that hold their bounds, trajectories to train on, samplers with a step for each part.

Segments are told by their bounds ``b_0 < b_1 < ... < b_K`` (``methods.straighten``). A teacher's states at the bounds
are forward marginals on a grid with the bounds among its points, ``steps`` the indices of these; the states that data
come from are backward ones. A round of reflow is

    marginals.build(method.velocity, params, ts, directory=d, direction="forward", steps=at, ...)  # ts, at = inserted()
    batch = segments.batches(marginals.read(d), bounds, batch_size=256, seed=0)
    # train straighten(net, bounds=bounds) on batch(0), batch(1), ...

and the next one the same with its ``method`` and ``params``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from fmjax import paths, sampling
from fmjax.checks import check_bounds
from fmjax.correction import trajectories
from fmjax.correction.marginals import Marginals
from fmjax.keys import example_keys, fold_in, normal, split
from fmjax.sampling import grids
from fmjax.types import Batch, FlowMapFn, Multistep, Params, VelocityFn, over_batch


def grid(bounds: Sequence[float], counts: Sequence[int]) -> np.ndarray:
    """The grid that takes ``counts[k]`` equal steps in segment ``k``; every bound is a point of it, to the bit.

    Raises ``ValueError`` for bounds that do not rise within [0, 1], and unless there is a positive count a segment.
    """
    edges = check_bounds(bounds)
    if len(counts) != len(edges) - 1 or min(counts) < 1:
        raise ValueError(f"counts={tuple(counts)} must be {len(edges) - 1} positive numbers of steps, one a segment")
    parts = [np.linspace(s, t, n, endpoint=False) for s, t, n in zip(edges, edges[1:], counts, strict=False)]
    return grids.check_grid(np.append(np.concatenate(parts), edges[-1]).astype(np.float32))


def inserted(ts, bounds: Sequence[float]) -> tuple[np.ndarray, tuple[int, ...]]:
    """A teacher's rising grid with the bounds among its points, and their indices: ``ts[i] == bound`` to the bit.

    A point nearer to a bound than a tenth of its interval moves there, so that no step is tiny; the ends of the grid
    stay. Raises ``ValueError`` for a bound outside the grid.
    """
    ts, edges = grids.check_grid(ts), check_bounds(bounds)
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
    return grids.check_grid(ts), index


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
    m: Marginals | Sequence[Marginals],
    bounds: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    shares: Sequence[float] | None = None,
    longest: float = 0.0,
    keep: Sequence[int] = (),
    real: np.ndarray | None = None,
    kept_share: float = 0.5,
) -> Callable[[int], Batch]:
    """Batches for ``straighten``: ``Batch(x0=x_{b_k}, x1=x_{b_{k+1}}, t=b_k)`` of a teacher's trajectories.

    The segment is uniform over those not in ``keep``. Of several sets every example comes from one, by chances
    ``shares`` (equal ones by default): backward sets, which end in data, beside forward ones (arXiv 2405.20320 G,
    2510.25229). Of each set the share ``longest`` of its trajectories is left out, those whose ends are farthest apart
    (0.1 in 2511.23342). With ``real`` data a share of the batch is in the segments ``keep``: ``x1 = (1 - t) z + t x``
    at a uniform time ``t`` of theirs, for the retention. Stateless in the step. Raises ``ValueError`` where a bound is
    not stored, for sets of several shapes, and shares that are none.
    """
    edges, sets = check_bounds(bounds), (m,) if isinstance(m, Marginals) else tuple(m)
    missing = [float(b) for one in sets for b in edges if b not in one.ts]
    if missing:
        raise ValueError(f"the trajectories have no state at t={missing[0]:g}; give build the steps of inserted()")
    if len(shapes := {tuple(one.x.shape[2:]) for one in sets}) != 1:
        raise ValueError(f"the sets to mix must have examples of one shape, got {sorted(shapes)}")
    if bool(keep) != (real is not None):
        raise ValueError(f"keep={tuple(keep)} and real data, which the kept segments are tried on, need each other")
    shares = np.ones(len(sets)) if shares is None else np.asarray(shares, float)
    if shares.shape != (len(sets),) or (shares < 0).any() or not 0 < shares.sum() < np.inf:
        raise ValueError(
            f"shares={shares.tolist()} must be {len(sets)} numbers, one a set, none negative, not all zero"
        )
    if not 0 <= longest < 1:
        raise ValueError(f"longest={longest}, the share of trajectories to leave out, must lie in [0, 1)")
    at = [np.array([np.flatnonzero(one.ts == b)[0] for b in edges]) for one in sets]
    rows = [_shortest(one, steps[0], steps[-1], longest) for one, steps in zip(sets, at, strict=True)]
    straight = np.array([k for k in range(len(edges) - 1) if k not in keep])
    kept = round(kept_share * batch_size) if keep else 0

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        of, k = rng.choice(len(sets), batch_size, p=shares / shares.sum()), rng.choice(straight, batch_size)
        example = rng.integers(np.array([len(index) for index in rows])[of])
        x0, x1 = np.empty((2, batch_size, *sets[0].x.shape[2:]), np.float32)
        for n, one in enumerate(sets):
            mine = np.flatnonzero(of == n)
            i = rows[n][example[mine]]
            x0[mine], x1[mine] = (one.x[i, at[n][k[mine] + d]] for d in (0, 1))
        t = edges[k].copy()
        if kept:
            index = np.linspace(0, batch_size, kept, endpoint=False).astype(int)  # spread over the devices
            k = rng.choice(np.asarray(keep), kept)
            t[index] = r = edges[k] + (edges[k + 1] - edges[k]) * rng.random(kept, np.float32)
            r, x = r.reshape(-1, *(1,) * (x1.ndim - 1)), real[rng.integers(len(real), size=kept)]
            x1[index] = (1 - r) * rng.standard_normal(x.shape, np.float32) + r * x
            x0[index] = x1[index]
        return Batch(x1=x1, x0=x0, t=t)

    return batch


def _shortest(m: Marginals, first, last, longest: float) -> np.ndarray:
    """The examples, in order, without the share ``longest`` of greatest ``|x_last - x_first|``."""
    count = len(m.x)
    if not longest:
        return np.arange(count)
    length = np.empty(count)
    for start in range(0, count, trajectories.CHUNK):
        x = np.asarray(m.x[start : start + trajectories.CHUNK], np.float32)
        length[start : start + len(x)] = ((x[:, last] - x[:, first]).reshape(len(x), -1) ** 2).sum(1)
    return np.sort(np.argsort(length, kind="stable")[: count - int(longest * count)])


def from_data(
    real: Callable[[int], Batch],
    step: Callable[[Params], FlowMapFn | Multistep],
    params: Params,
    bounds: Sequence[float],
    *,
    steps: int,
    seed: int,
    path: paths.Path | None = None,
    mesh: Mesh | None = None,
    process_index: int = 0,
) -> Callable[[int], Batch]:
    """Batches for ``straighten`` whose segments start in noised data and are solved as they are asked for.

    PeRFlow (arXiv 2405.07510): ``x0 = alpha z + beta x`` at ``b_k``, ``x`` of ``real(n).x1`` (``data.arrays.batches``),
    its segment ``k`` uniform, and ``x1`` what ``steps`` equal steps of ``step(params)`` make of it at ``b_{k+1}``, such
    as ``lambda params: diffusion.ddim(method.velocity(params))``; the conditions are those of ``real``, which the
    teacher is given. So no segment depends on an earlier one's errors, and nothing is stored. Stateless in the step;
    compiled once. ``mesh`` has one axis ``"data"`` (default one device), and ``process_index`` tells which part of the
    global batch ``real`` gives; draws do not depend on either. Raises ``ValueError`` for a path with a latent, bounds
    that do not rise in [0, 1], no steps, and batches that the mesh does not divide.
    """
    edges, path = check_bounds(bounds), path or paths.linear()
    paths.refuse_latent("straightening", path)
    if steps < 1:
        raise ValueError(f"a segment is solved in steps={steps} of the teacher: at least 1")
    count = len(real(0).x1)
    mesh, _ = trajectories.fit(mesh, count, count, count)
    params, index = trajectories.place(mesh, params), process_index * count + np.arange(count, dtype=np.int32)
    grids = np.stack([np.linspace(s, t, steps + 1, dtype=np.float32) for s, t in zip(edges, edges[1:], strict=False)])

    def solve(given, rows):
        (params, n), (index, x, cond) = given, rows
        k_segment, k_noise, k_step = split(example_keys(jax.random.fold_in(jax.random.key(seed), n), index), 3)
        k = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(grids)))(k_segment)
        ts = jnp.asarray(grids)[k].T
        start, _ = paths.with_velocity(path, normal(k_noise, x.shape[1:], x.dtype), x, ts[0])
        init, move = sampling.with_memory(step(params))

        def body(carry, now):
            (x, memory), (i, s, t) = carry, now
            return move(memory, x, s, t, cond, fold_in(k_step, i)), None

        (end, _), _ = jax.lax.scan(body, (start, init(start)), (jnp.arange(steps), ts[:-1], ts[1:]))
        return Batch(x1=end, x0=start, cond=cond, t=ts[0])

    solve = trajectories.by_rows(solve, mesh)

    def batch(n: int) -> Batch:
        found = real(n)
        return jax.device_get(solve((params, np.int32(n)), (index, np.asarray(found.x1, np.float32), found.cond)))

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
