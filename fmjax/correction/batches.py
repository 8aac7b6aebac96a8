"""Draw training batches from sets of marginals: pure functions of the step, with the conditions of the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import numpy as np

from fmjax.correction.marginals import Marginals, take_conditions
from fmjax.keys import generator
from fmjax.types import Batch, Cond

LARGE = 2**62  # an integer below it, modulo the size of a group, is uniform to 1e-9


def marginal_batches(
    m: Marginals,
    *,
    batch_size: int,
    seed: int,
    steps: Iterable[int] | None = None,
    examples: slice | range | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], Batch]:
    """Return training batches of one set: the example and its step are uniform.

    A batch depends on the seed and the step only, so that a resumed run draws what the uninterrupted run would draw.

    Args:
        m: the set.
        batch_size: examples per batch, over all processes.
        seed: seed of the draws.
        steps: grid indices to draw from; by default all that are stored.
        examples: examples to draw from; by default all. ``slice(None, -500)`` trains, ``slice(-500, None)`` is held
            out.
        process_index: index of this process.
        process_count: number of processes; each gets a slice of the same draw.

    Returns:
        A function of the step that gives ``Batch(x1=x, t=t_n, cond=cond)``, float32, ``[batch_size / process_count]``
        examples.

    Raises:
        ValueError: a batch that the processes do not divide, steps that are not stored, examples outside the set.

    >>> m = Marginals(np.zeros((3, 2, 1)), np.array([0.0, 1.0], np.float32), None, cond=np.array([7, 7, 7]))
    >>> batch = marginal_batches(m, batch_size=4, seed=0)(0)
    >>> batch.x1.shape, batch.t.shape, batch.cond.tolist()
    ((4, 1), (4,), [7, 7, 7, 7])
    """
    draw = _draw(batch_size, seed, process_index, process_count)
    columns, rows = _columns(m, steps), _examples(m, examples)

    def batch(step: int) -> Batch:
        example, n = draw(step, len(rows), len(columns))
        example, n = rows.start + rows.step * example, columns[n]
        return Batch(x1=m.x[example, n].astype(np.float32), t=m.ts[n], cond=take_conditions(m.cond, example))

    return batch


def operator_batches(m: Marginals, *, batch_size: int, seed: int) -> Callable[[int], Batch]:
    """Return pairs of a source and a later state of its stored trajectory, for ``methods.trajectory_regression``.

    Args:
        m: forward marginals that store their start; every other stored time is drawn equally often.
        batch_size: examples per batch.
        seed: seed of the draws.

    Returns:
        A function of the step that gives ``Batch(x0=x_0, x1=x_{t_n}, t=t_n, cond=cond)``, float32.

    Raises:
        ValueError: a set of one time.

    >>> m = Marginals(np.arange(3.0).reshape(1, 3, 1), np.array([0.0, 0.5, 1.0], np.float32), None)
    >>> batch = operator_batches(m, batch_size=2, seed=0)(0)
    >>> batch.x0.tolist(), (batch.x1[:, 0] == 2 * batch.t).tolist()
    ([[0.0], [0.0]], [True, True])
    """
    if len(m.ts) < 2:
        raise ValueError(f"m has {len(m.ts)} stored time: nothing to regress on. Store the start and later steps.")

    def batch(step: int) -> Batch:
        rng = generator(seed, step)
        i, n = rng.integers(len(m.x), size=batch_size), rng.integers(1, len(m.ts), size=batch_size)
        x0, x1 = (np.asarray(m.x[i, at], np.float32) for at in (np.zeros_like(n), n))
        return Batch(x1=x1, x0=x0, t=m.ts[n], cond=take_conditions(m.cond, i))

    return batch


def marginal_pairs(
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
    """Return batches of backward and forward examples, for a classifier that tells ``q_n`` from ``p_n``.

    Both examples of a row are at one step. With conditions both have the same condition: the backward example is
    uniform, the forward example is uniform among those with its condition, so that only ``q_n(x | cond)`` and ``p_n(x |
    cond)`` differ. Otherwise the two examples are independent.

    Args:
        p: forward set.
        q: backward set.
        batch_size: rows per batch, over all processes.
        seed: seed of the draws.
        steps: grid indices to draw from; by default all that are stored.
        examples: examples of each set to draw from; by default all.
        process_index: index of this process.
        process_count: number of processes; each gets a slice of the same draw.

    Returns:
        A function of the step that gives ``Batch(x1=x of q_n, x0=x of p_n, t=t_n, cond=cond)``, float32.

    Raises:
        ValueError: as ``marginal_batches``; sets of different flows or grids; a backward condition that no forward
            example has.

    >>> import types
    >>> manifest = types.SimpleNamespace(ts=(0, 1), steps=(0, 1), flow="a", solver="rk4", shape=(1,), cond=None)
    >>> q = Marginals(np.ones((3, 2, 1)), np.array([0.0, 1.0], np.float32), manifest)
    >>> batch = marginal_pairs(q._replace(x=0 * q.x), q, batch_size=2, seed=0)(0)
    >>> batch.x1.tolist(), batch.x0.tolist()
    ([[1.0], [1.0]], [[0.0], [0.0]])

    Source: marginal matching (OpenReview kRjLBXWn1T), the classifier corrector.
    """
    for name in ("ts", "steps", "flow", "solver", "shape", "cond"):
        forward, backward = getattr(p.manifest, name), getattr(q.manifest, name)
        if forward != backward:
            raise ValueError(
                f"{name}={_short(forward)}: the backward set has {_short(backward)}. Build both sets for one flow on "
                "one grid, both with conditions or both without."
            )
    draw = _draw(batch_size, seed, process_index, process_count)
    columns, of_p, of_q = _columns(q, steps), _examples(p, examples), _examples(q, examples)
    partners = None if q.cond is None else _partners(p.cond, of_p, q.cond, of_q)

    def batch(step: int) -> Batch:
        i, n, j = draw(step, len(of_q), len(columns), len(of_p) if partners is None else LARGE)
        if partners is not None:
            order, first, count = partners
            j = order[first[i] + j % count[i]]
        i, n, j = of_q.start + of_q.step * i, columns[n], of_p.start + of_p.step * j
        x1, x0 = q.x[i, n].astype(np.float32), p.x[j, n].astype(np.float32)
        return Batch(x1=x1, x0=x0, t=q.ts[n], cond=take_conditions(q.cond, i))

    return batch


def _partners(p_cond: Cond, of_p: range, q_cond: Cond, of_q: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the forward examples sorted by condition; for each backward example, its first partner and their number.

    All are positions in ``of_p`` and ``of_q``.
    """
    group = np.concatenate([_condition_bytes(p_cond, of_p), _condition_bytes(q_cond, of_q)])
    _, group = np.unique(group, axis=0, return_inverse=True)
    forward, backward = np.split(group.reshape(-1), [len(of_p)])
    order = np.argsort(forward, kind="stable")
    first = np.searchsorted(forward[order], backward, side="left")
    count = np.searchsorted(forward[order], backward, side="right") - first
    if (count == 0).any():
        i = of_q[int(np.argmin(count))]
        cond = str(take_conditions(q_cond, np.array(i))).replace("\n", " ")
        raise ValueError(
            f"cond={cond[:60]}: backward example {i} has it, no forward example does. Build the forward set for the "
            "data's conditions (draw_conditions), or with more examples."
        )
    return order, first, count


def _condition_bytes(cond: Cond, rows: range) -> np.ndarray:
    """Return the conditions of some examples as bytes ``[n, bytes]``."""
    leaves = jax.tree.leaves(take_conditions(cond, np.arange(rows.start, rows.stop, rows.step)))
    flat = [np.ascontiguousarray(leaf.reshape(len(leaf), -1)).view(np.uint8) for leaf in leaves]
    return np.concatenate(flat, 1)


def _short(value) -> str:
    return text if len(text := str(value)) <= 60 else f"{text[:40]} ... {text[-15:]}"


def _draw(batch_size: int, seed: int, process_index: int, process_count: int):
    """Return ``draw(step, *sizes)``: for each size, this process's part of uniform indices below it."""
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size={batch_size}, process_index={process_index}: process_count={process_count}. Give a positive "
            f"multiple of {process_count}, and an index from 0 to {process_count - 1}."
        )
    size = batch_size // process_count
    part = slice(process_index * size, (process_index + 1) * size)

    def draw(step: int, *sizes: int) -> list[np.ndarray]:
        rng = generator(seed, step)
        return [rng.integers(size, size=batch_size)[part] for size in sizes]

    return draw


def _columns(m: Marginals, steps: Iterable[int] | None) -> np.ndarray:
    """Return the positions of grid indices among the stored steps."""
    if steps is None:
        return np.arange(len(m.ts))
    steps, stored = sorted({int(n) for n in steps}), list(m.manifest.steps)
    if not steps or not set(steps) <= set(stored):
        raise ValueError(f"steps={tuple(steps)}: the set stores {tuple(stored)}. Give some of these.")
    return np.array([stored.index(n) for n in steps])


def _examples(m: Marginals, examples: slice | range | None) -> range:
    if not isinstance(examples, range):
        examples = range(len(m.x))[slice(None) if examples is None else examples]
    if not examples or not 0 <= min(examples) <= max(examples) < len(m.x):
        raise ValueError(f"examples={examples}: the set has the examples 0 .. {len(m.x) - 1}. Give some of these.")
    return examples
