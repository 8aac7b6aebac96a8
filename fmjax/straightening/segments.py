"""Segments of the time axis: grids that hold their bounds, piecewise steps, batches of trajectories to train on.

Segments are given by their bounds ``b_0 < b_1 < ... < b_K`` (``methods.straighten``). A teacher's states at the bounds
are forward marginals on a grid that contains the bounds, ``steps`` the indices of the bounds; trajectories that end in
data are backward marginals. One round of reflow is

    ts, at = inserted(ts, bounds)
    build_marginals(method.velocity, params, ts, directory=d, direction="forward", steps=at, ...)
    batch = segment_batches(read_marginals(d), bounds, batch_size=256, seed=0)
    # train straighten(net, bounds=bounds) on batch(0), batch(1), ...

and the next round is the same with the ``method`` and ``params`` of this one. Conditions travel with the trajectories.
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
from fmjax.correction.marginals import Marginals, take_conditions
from fmjax.data.dataset import Rows
from fmjax.keys import example_keys, fold_in, from_seed, generator, normal, split
from fmjax.sampling import grids
from fmjax.sources import Source
from fmjax.types import Batch, Cond, FlowMapFn, Multistep, Params, VelocityFn, expand, over_batch


def segment_grid(bounds: Sequence[float], counts: Sequence[int]) -> np.ndarray:
    """Return a grid with equal steps in each segment; every bound is a point of the grid, to the bit.

    Args:
        bounds: bounds of the segments, rising within [0, 1].
        counts: number of steps of each segment.

    Returns:
        Times ``[sum(counts) + 1]``, float32.

    Raises:
        ValueError: bounds that do not rise, or counts that are not one positive number per segment.

    >>> segment_grid((0.0, 0.5, 1.0), (1, 2)).tolist()
    [0.0, 0.5, 0.75, 1.0]
    """
    edges = check_bounds(bounds)
    if len(counts) != len(edges) - 1 or min(counts) < 1:
        raise ValueError(f"counts={tuple(counts)}: there are {len(edges) - 1} segments. Give one positive number each.")
    parts = [np.linspace(s, t, n, endpoint=False) for s, t, n in zip(edges, edges[1:], counts, strict=False)]
    return grids.check_grid(np.append(np.concatenate(parts), edges[-1]), dtype=np.float32)


def inserted(ts, bounds: Sequence[float]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Insert the bounds of the segments into a teacher's grid.

    A point nearer to a bound than a tenth of its interval moves to the bound, so that no step is tiny; the ends of the
    grid stay.

    Args:
        ts: rising times ``[N + 1]``.
        bounds: bounds of the segments, within the grid.

    Returns:
        The grid, and the indices of the bounds in it: ``ts[i] == bound`` to the bit.

    Raises:
        ValueError: a bound outside the grid.

    >>> ts, at = inserted([0.0, 0.4, 1.0], (0.0, 0.5, 1.0))
    >>> ts.round(2).tolist(), at
    ([0.0, 0.4000000059604645, 0.5, 1.0], (0, 2, 3))
    """
    ts, edges = grids.check_grid(ts, dtype=np.float32).copy(), check_bounds(bounds)
    if ts[0] > ts[-1] or edges[0] < ts[0] or edges[-1] > ts[-1]:
        raise ValueError(
            f"bounds={tuple(bounds)}: the teacher's grid goes from {ts[0]:g} to {ts[-1]:g}. Give bounds within it, and "
            "a rising grid."
        )
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
    return grids.check_grid(ts, dtype=np.float32), index


def piecewise(steps: Sequence[FlowMapFn], bounds: Sequence[float]) -> FlowMapFn:
    """Return a step that is ``steps[k]`` in segment ``k``; a bound belongs to the segment that starts there.

    Each example takes the step of its starting time. A step that no example takes is not computed, so that sampling on
    a ``segment_grid`` costs one network per step.

    Args:
        steps: one step per segment.
        bounds: bounds of the segments.

    Returns:
        The step; where all ``steps`` are one object, this object.

    Raises:
        ValueError: another number of steps than segments.

    >>> move = lambda speed: lambda x, s, t, cond=None, key=None: x + speed * expand(t - s, x)
    >>> step = piecewise([move(1.0), move(10.0)], (0.0, 0.5, 1.0))
    >>> step(jnp.zeros((2, 1)), jnp.array([0.0, 0.5]), jnp.array([0.5, 1.0])).tolist()
    [[0.5], [5.0]]
    """
    edges = check_bounds(bounds)
    if len(steps) != len(edges) - 1:
        raise ValueError(f"steps={len(steps)} steps: there are {len(edges) - 1} segments. Give one step per segment.")
    if all(each is steps[0] for each in steps):
        return steps[0]

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        at = jnp.clip(jnp.searchsorted(jnp.asarray(edges), s, side="right") - 1, 0, len(steps) - 1)
        for k, each in enumerate(steps):
            mask = expand(at == k, x)
            take = lambda x, each=each, mask=mask: jnp.where(mask, each(x, s, t, cond, key), x)
            # masks are of the starting times: what an earlier step moved is no input of a later one
            x = jax.lax.cond(jnp.any(at == k), take, lambda x: x, x)
        return x

    return step


def segment_batches(
    m: Marginals | Sequence[Marginals],
    bounds: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    fractions: Sequence[float] | None = None,
    longest: float = 0.0,
    keep: Sequence[int] = (),
    real: Rows | None = None,
    real_cond: Cond = None,
    kept_fraction: float = 0.5,
    path: paths.Path = paths.linear(),
    source: Source | None = None,
) -> Callable[[int], Batch]:
    """Return batches for ``straighten``: ``Batch(x0=x_{b_k}, x1=x_{b_{k+1}}, t=b_k)`` of a teacher's trajectories.

    The segment is uniform over those not in ``keep``. A batch depends on the seed and the step only.

    Args:
        m: a set of marginals that stores the bounds, or several: forward sets, and backward sets, which end in data
            (arXiv 2405.20320, G; 2510.25229). Every example comes from one set.
        bounds: bounds of the segments.
        batch_size: examples per batch.
        seed: seed of the draws.
        fractions: relative frequencies of the sets; by default equal.
        longest: fraction of the trajectories of each set to leave out, those whose ends are farthest apart (0.1 in
            arXiv 2511.23342).
        keep: segments that are not straightened, for the retention loss.
        real: data ``[n, ...]`` for the segments ``keep``: ``x1 = alpha_t x0 + beta_t x`` at a uniform time ``t``.
        real_cond: conditions of ``real``, where the sets have conditions.
        kept_fraction: fraction of the batch in the segments ``keep``.
        path: path of the flow, for ``real``.
        source: the distribution of ``x0``, for ``real``; by default N(0, I).

    Returns:
        A function of the step that gives a batch, float32, with the conditions of the examples.

    Raises:
        ValueError: a bound that is not stored, sets of different shapes or conditions, or a fraction out of range.

    >>> ts = np.array([0.0, 0.5, 1.0], np.float32)
    >>> line = Marginals(np.arange(3.0).reshape(1, 3, 1), ts, None)
    >>> batch = segment_batches(line, (0.0, 0.5, 1.0), batch_size=2, seed=0)(0)
    >>> (batch.x1 - batch.x0).tolist()
    [[1.0], [1.0]]
    """
    edges, sets = check_bounds(bounds), (m,) if isinstance(m, Marginals) else tuple(m)
    weights = _check_sets(sets, edges, fractions, longest)
    if bool(keep) != (real is not None):
        raise ValueError(f"keep={tuple(keep)}: kept segments and real data need each other. Give both, or none.")
    if real is not None and (real_cond is None) != (sets[0].cond is None):
        raise ValueError(f"real_cond={type(real_cond).__name__}: both sets and data have conditions, or none of them.")
    at = [np.array([np.flatnonzero(each.ts == b)[0] for b in edges]) for each in sets]
    rows = [_shortest(each, steps[0], steps[-1], longest) for each, steps in zip(sets, at, strict=True)]
    straight = np.array([k for k in range(len(edges) - 1) if k not in keep])
    kept = round(kept_fraction * batch_size) if keep else 0

    def batch(step: int) -> Batch:
        rng = generator(seed, step)
        chosen, k = rng.choice(len(sets), batch_size, p=weights), rng.choice(straight, batch_size)
        example = rng.integers(np.array([len(index) for index in rows])[chosen])
        x0, x1 = np.empty((2, batch_size, *sets[0].x.shape[2:]), np.float32)
        cond = jax.tree.map(lambda c: np.empty((batch_size, *c.shape[1:]), c.dtype), sets[0].cond)
        for n, each in enumerate(sets):
            place = np.flatnonzero(chosen == n)
            i = rows[n][example[place]]
            x0[place], x1[place] = (each.x[i, at[n][k[place] + d]] for d in (0, 1))
            _put(cond, place, each.cond, i)
        t = edges[k].copy()
        if kept:
            place = np.linspace(0, batch_size, kept, endpoint=False).astype(int)  # spread over the devices
            k = rng.choice(np.asarray(keep), kept)
            t[place] = r = edges[k] + (edges[k + 1] - edges[k]) * rng.random(kept, np.float32)
            i = rng.integers(len(real), size=kept)
            alpha, beta = (np.asarray(c).reshape(-1, *(1,) * (x1.ndim - 1)) for c in path.coefficients(jnp.asarray(r)))
            x = real[i]
            default = source is None or source.normal
            z = rng.standard_normal(x.shape, np.float32) if default else source.rows(seed, step, place, x.shape[1:])
            x1[place] = alpha * z + beta * x
            x0[place] = x1[place]
            _put(cond, place, real_cond, i)
        return Batch(x1=x1, x0=x0, t=t, cond=cond)

    return batch


def _put(cond: Cond, place: np.ndarray, other: Cond, rows: np.ndarray) -> None:
    """Write the conditions of some rows into a batch."""
    for to, values in zip(jax.tree.leaves(cond), jax.tree.leaves(take_conditions(other, rows)), strict=True):
        to[place] = values


def _check_sets(sets: Sequence[Marginals], edges: np.ndarray, fractions, longest: float) -> np.ndarray:
    """Return the frequencies of the sets, which sum to 1; refuse sets that cannot be mixed."""
    missing = [float(b) for each in sets for b in edges if b not in each.ts]
    if missing:
        raise ValueError(f"bounds={missing[0]:g}: not among the stored times. Build the sets with steps of inserted().")
    if len(shapes := {tuple(each.x.shape[2:]) for each in sets}) != 1:
        raise ValueError(f"m shapes={sorted(shapes)}: examples of different shapes. Give sets of one shape.")
    kinds = {str(jax.tree.map(lambda c: (c.dtype.name, c.shape[1:]), each.cond)) for each in sets}
    if len(kinds) != 1:
        raise ValueError(f"m cond={sorted(kinds)}: different conditions. Give sets of one kind of conditions.")
    fractions = np.ones(len(sets)) if fractions is None else np.asarray(fractions, float)
    if fractions.shape != (len(sets),) or (fractions < 0).any() or not 0 < fractions.sum() < np.inf:
        raise ValueError(
            f"fractions={fractions.tolist()}: not frequencies of {len(sets)} sets. Give one number per set, none "
            "negative, not all zero."
        )
    if not 0 <= longest < 1:
        raise ValueError(f"longest={longest}: a fraction of the trajectories. Give a number in [0, 1).")
    return fractions / fractions.sum()


def _shortest(m: Marginals, first, last, longest: float) -> np.ndarray:
    """Return the examples, in order, without the fraction ``longest`` of largest ``|x_last - x_first|``."""
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
    path: paths.Path = paths.linear(),
    mesh: Mesh | None = None,
    process_index: int = 0,
) -> Callable[[int], Batch]:
    """Return batches for ``straighten`` whose segments start in noised data and are solved when they are drawn.

    ``x0 = alpha z + beta x`` at a bound ``b_k``, with ``x`` from ``real(n).x1`` and a uniform segment ``k``; ``x1`` is
    the state at ``b_{k+1}`` after ``steps`` equal steps of the teacher. No segment depends on the errors of an earlier
    one, and nothing is stored. A batch depends on the seed and the step only; the solve is compiled once.

    Args:
        real: batches of data as a function of the step (``data.batches``); the teacher gets their conditions.
        step: ``step(params)`` is a step of the teacher, such as ``diffusion.ddim(method.velocity(params))``.
        params: parameters of the teacher.
        bounds: bounds of the segments.
        steps: steps of the teacher per segment.
        seed: seed of the draws, which depend on neither the mesh nor the processes.
        path: path of the flow, without a latent.
        mesh: mesh with the one axis ``"data"``; by default one device.
        process_index: index of this process, whose part of the global batch ``real`` gives.

    Returns:
        A function of the step that gives ``Batch(x1, x0, cond, t=b_k)``.

    Raises:
        ValueError: a path with a latent, bounds that do not rise, ``steps`` below 1, or a batch that the devices do not
            divide.

    >>> still = lambda params: lambda x, s, t, cond=None, key=None: x
    >>> ones = lambda n: Batch(x1=np.ones((2, 1), np.float32))
    >>> batch = from_data(ones, still, None, (0.0, 1.0), steps=1, seed=0)(0)
    >>> bool((batch.x0 == batch.x1).all()), batch.t.tolist()
    (True, [0.0, 0.0])

    Source: PeRFlow (arXiv 2405.07510).
    """
    edges = check_bounds(bounds)
    paths.refuse_latent("straightening", path)
    if steps < 1:
        raise ValueError(f"steps={steps}: no step of the teacher. Give at least 1.")
    count = len(real(0).x1)
    mesh, _ = trajectories.fit_mesh(mesh, count, count, count)
    params = trajectories.place_params(mesh, params)
    index = process_index * count + np.arange(count, dtype=np.int32)
    times = np.stack([np.linspace(s, t, steps + 1, dtype=np.float32) for s, t in zip(edges, edges[1:], strict=False)])

    def solve(params_and_step, rows):
        (params, n), (index, x, cond) = params_and_step, rows
        k_segment, k_noise, k_step = split(example_keys(jax.random.fold_in(from_seed(seed), n), index), 3)
        k = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(times)))(k_segment)
        ts = jnp.asarray(times)[k].T
        start, _ = paths.with_velocity(path, normal(k_noise, x.shape[1:], x.dtype), x, ts[0])
        init, move, *_ = sampling.with_memory(step(params))

        def body(carry, now):
            (x, memory), (i, s, t) = carry, now
            return move(memory, x, s, t, cond, fold_in(k_step, i)), None

        (end, _), _ = jax.lax.scan(body, (start, init(start)), (jnp.arange(steps), ts[:-1], ts[1:]))
        return Batch(x1=end, x0=start, cond=cond, t=ts[0])

    solve = trajectories.by_rows(solve, mesh)

    def batch(n: int) -> Batch:
        data = real(n)
        return jax.device_get(solve((params, np.int32(n)), (index, np.asarray(data.x1, np.float32), data.cond)))

    return batch


def segment_straightness(
    velocity: VelocityFn, x: Float[Array, "b ..."], s: float, t: float, cond: Cond = None, *, steps: int = 32
) -> Array:
    """Return how far a flow is from its chords in a segment, ``E int |v - chord|^2 / E |chord|^2``.

    Args:
        velocity: ``v(x, t, cond)``.
        x: states ``[B, ...]`` at ``s``.
        s: start of the segment.
        t: end of the segment.
        cond: conditions of the states.
        steps: number of Euler steps.

    Returns:
        A scalar, the mean over time; 0 for straight trajectories of constant speed.

    >>> line = lambda x, t, cond=None: jnp.ones_like(x)
    >>> float(segment_straightness(line, jnp.zeros((2, 1)), 0.0, 1.0))
    0.0
    """
    grid, h = jnp.linspace(s, t, steps + 1)[:-1], (t - s) / steps

    def body(x, r):
        v = velocity(x, over_batch(r, x), cond)
        return x + h * v, v

    end, vs = jax.lax.scan(body, x, grid)
    chord = (end - x) / (t - s)
    return jnp.mean(jnp.square(vs - chord)) / jnp.mean(jnp.square(chord))


def velocity_jump(
    before: VelocityFn, after: VelocityFn, x: Float[Array, "b ..."], t: float, cond: Cond = None
) -> Array:
    """Return the jump of a piecewise velocity at a bound, ``E |v(t+) - v(t-)|^2``.

    Args:
        before: velocity of the earlier segment.
        after: velocity of the later segment.
        x: states ``[B, ...]`` at the bound.
        t: the bound.
        cond: conditions of the states.

    Returns:
        A scalar, the mean over examples and elements.

    >>> speed = lambda c: lambda x, t, cond=None: jnp.full_like(x, c)
    >>> float(velocity_jump(speed(1.0), speed(3.0), jnp.zeros((2, 1)), 0.5))
    4.0
    """
    t = over_batch(t, x)
    return jnp.mean(jnp.square(after(x, t, cond) - before(x, t, cond)))
