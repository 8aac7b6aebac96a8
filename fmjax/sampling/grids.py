"""Time grids: uniform, even in a noise level, on the interval of a path; their checks and their look-ups.

A grid is a numpy array ``[N + 1]`` of times, in float64, for ``N`` solver steps: rising from noise to data, or falling.
Samplers round it to the precision of the state. Grids for large images are in ``shifted_grids``, grids
that are fitted to a teacher in ``grid_search``.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fmjax import paths
from fmjax.checks import Range, check_range
from fmjax.types import Costed

SAME = 1e-6  # times closer than this are equal: float32 grids of other lengths differ by a rounding error


def uniform_grid(n: int, *, start: float = 0.0, stop: float = 1.0) -> np.ndarray:
    """Return ``n + 1`` evenly spaced times from ``start`` to ``stop``.

    Args:
        n: number of steps, 1 or more.
        start: first time, in [0, 1].
        stop: last time, in [0, 1]; smaller than ``start`` for a falling grid.

    Returns:
        Times ``[n + 1]``, float64.

    Raises:
        ValueError: for ``n < 1``, and for times outside [0, 1] or that are equal.

    >>> uniform_grid(4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    check_steps(n)
    check_range("start", start, Range(0, 1))
    check_range("stop", stop, Range(0, 1))
    if start == stop:
        raise ValueError(f"stop={stop}: a grid from {start} to itself has no steps. Give two times.")
    return np.linspace(start, stop, operator.index(n) + 1)


def default_grid(path: paths.Path, n: int) -> np.ndarray:
    """Return the uniform grid of ``n`` steps on the interval where the velocity of a path is finite.

    That is the ``span`` of the path: [0, 1] for most paths, and [0, 0.999] for ``paths.vp``, as in arXiv 2011.13456.

    Args:
        path: the path of the velocity.
        n: number of steps, 1 or more.

    Returns:
        Rising times ``[n + 1]``, float64.

    Raises:
        ValueError: for ``n < 1``.

    >>> from fmjax import paths
    >>> default_grid(paths.linear(), 2).tolist(), default_grid(paths.vp(), 1).tolist()
    ([0.0, 0.5, 1.0], [0.0, 0.999])
    """
    start, stop = path.span
    return uniform_grid(n, start=start, stop=stop)


def edm_grid(
    n: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    path: paths.Path = paths.linear(),
) -> np.ndarray:
    """Return the grid of EDM: ``n`` noise levels even in ``sigma^(1 / rho)``, then the data (arXiv 2206.00364, eq. 5).

    ``sigma_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho``, ``sigma_n = 0``, at the
    times of these levels on ``path``: ``t = 1 / (1 + sigma)`` on the linear path. Start from
    ``source_sample(path, key, shape, start=ts[0])``. Without its last time the grid stops at ``sigma_min``, which on
    ``ve`` must exceed the path's smallest level. A larger ``rho`` puts more steps near the data.

    Args:
        n: number of steps, 1 or more.
        sigma_min: smallest noise level ``alpha / beta`` above 0.
        sigma_max: largest noise level, at the first time.
        rho: exponent of the spacing.
        path: the path whose times are returned.

    Returns:
        Rising times ``[n + 1]``, float64; the last time is 1.

    Raises:
        ValueError: for ``n < 1``, ``rho <= 0``, levels that the path does not have, and a path with a latent.

    >>> edm_grid(3).round(4).tolist()
    [0.0123, 0.2845, 0.998, 1.0]
    """
    _check_levels(n, sigma_min, sigma_max)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho={rho}: not positive and finite. The limit of large rho is log_snr_grid.")
    return _at_levels(path, np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho)


def log_snr_grid(
    n: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, path: paths.Path = paths.linear()
) -> np.ndarray:
    """Return ``n`` noise levels even in ``log sigma``, then the data (arXiv 2206.00927).

    Even in ``log sigma`` is even in the log signal-to-noise ratio ``-2 log sigma``.

    Args:
        n: number of steps, 1 or more.
        sigma_min: smallest noise level ``alpha / beta`` above 0.
        sigma_max: largest noise level, at the first time.
        path: the path whose times are returned.

    Returns:
        Rising times ``[n + 1]``, float64; the last time is 1.

    Raises:
        ValueError: for ``n < 1``, levels that the path does not have, and a path with a latent.

    >>> log_snr_grid(3, sigma_min=0.1, sigma_max=10.0).round(4).tolist()
    [0.0909, 0.5, 0.9091, 1.0]
    """
    _check_levels(n, sigma_min, sigma_max)
    return _at_levels(path, np.geomspace(sigma_max, sigma_min, n))


def check_grid(ts: Any, *, dtype: Any = np.float64) -> np.ndarray | Array:
    """Return a time grid, checked: at least two times in [0, 1] that rise or fall strictly.

    Args:
        ts: times ``[N + 1]``, or the number ``N`` of uniform steps from 0 to 1. A traced array is accepted where its
            length is static; of a traced grid only the shape is checked.
        dtype: precision of the grid; the times must differ in this precision.

    Returns:
        The times ``[N + 1]`` as a numpy array (a traced grid stays a jax array).

    Raises:
        ValueError: for a grid that cannot be stepped.

    >>> check_grid([1, 0.25, 0]).tolist(), len(check_grid(10))
    ([1.0, 0.25, 0.0], 11)
    """
    if isinstance(ts, (int, np.integer)) and not isinstance(ts, bool):
        return uniform_grid(operator.index(ts)).astype(dtype)
    traced_dtype = jax.dtypes.canonicalize_dtype(dtype)
    if isinstance(ts, (list, tuple)) and any(map(is_traced, ts)):
        ts = jnp.stack([jnp.asarray(t, traced_dtype) for t in ts])
    ts = (ts if is_traced(ts) else _numbers(ts)).astype(traced_dtype if is_traced(ts) else dtype)
    if ts.ndim != 1 or ts.size < 2:
        raise ValueError(f"ts={_short(ts)}: shape {ts.shape}, but a grid is one axis of two times or more. Add times.")
    if is_traced(ts):
        return ts
    if not np.isfinite(ts).all():
        raise ValueError(f"ts={_short(ts)}: not all times are finite. Remove nan and inf.")
    if ts.min() < 0 or ts.max() > 1:
        outside = ts[(ts < 0) | (ts > 1)][0]
        raise ValueError(f"ts={outside:g}: outside [0, 1]. Time runs from 0 (noise) to 1 (data); rescale the grid.")
    steps = np.diff(ts)
    if not ((steps > 0).all() or (steps < 0).all()):
        n = int(np.argmax(np.sign(steps) != np.sign(steps[0]))) if steps[0] != 0 else 0
        raise ValueError(
            f"ts[{n}]={ts[n]:g}: followed by ts[{n + 1}]={ts[n + 1]:g}, but a grid rises or falls strictly "
            f"(in {np.dtype(dtype)}). Sort it, or drop the repeated time."
        )
    return ts


def is_traced(value: Any) -> bool:
    """Return whether a value is known only while a compiled program runs.

    Args:
        value: any value.

    Returns:
        ``True`` for an array under ``jax.jit``, ``jax.grad`` and other transformations.

    >>> is_traced(0.5)
    False
    """
    return isinstance(value, jax.core.Tracer)


def steps_at(ts: Any, t: Any) -> tuple[int, ...]:
    """Return the indices of times in a grid.

    Args:
        ts: the grid ``[S]``.
        t: the times to look up, ``[K]``.

    Returns:
        ``K`` indices into ``ts``.

    Raises:
        ValueError: for the first time that the grid does not contain (to ``1e-6``).

    >>> steps_at(uniform_grid(4), [0.5, 1.0])
    (2, 4)
    """
    ts, t = np.asarray(ts, np.float64), np.asarray(t, np.float64)
    gap = np.abs(t[:, None] - ts)
    if (gap > SAME).all(1).any():
        k = int(np.argmax((gap > SAME).all(1)))
        raise ValueError(
            f"t={t[k]:g}: not among these {len(ts)} times (the nearest is {ts[gap[k].argmin()]:g}). Take a grid that "
            "contains it: uniform_grid(n) contains all times of uniform_grid(m) where m divides n."
        )
    return tuple(gap.argmin(1).tolist())


def check_at(at: Iterable[int], n: int) -> tuple[int, ...]:
    """Return the corrected steps of a grid, sorted, each once.

    Args:
        at: indices of steps; correction ``i`` comes before step ``i``, and correction ``n`` after the last step.
        n: number of steps of the grid.

    Returns:
        The sorted indices.

    Raises:
        ValueError: for an index outside ``0 .. n``, and for what is no index.

    >>> check_at([10, 0, 5, 5], 10)
    (0, 5, 10)
    """
    whole = lambda i: isinstance(i, numbers.Integral) and not isinstance(i, (bool, np.bool_))
    steps = list(at) if isinstance(at, Iterable) and not isinstance(at, (str, bytes)) else [at]
    if not isinstance(at, Iterable) or not all(map(whole, steps)):
        wrong = next((i for i in steps if not whole(i)), at)
        raise ValueError(f"at={wrong!r:.80}: not a step. Give a list of whole numbers from 0 to {n}.")
    at = tuple(sorted({int(i) for i in steps}))
    outside = [i for i in at if not 0 <= i <= n]
    if outside:
        raise ValueError(f"at={outside[0]}: no such step. With {n} solver steps, correct at 0 .. {n}.")
    return at


def same_times(at: Iterable[int], ts: Any, other: Any) -> tuple[int, ...]:
    """Return the steps of the grid ``other`` at the times that ``at`` names on the grid ``ts``.

    So correctors that were trained at some ``N`` serve a sampler with another number of steps.

    Args:
        at: indices of steps of ``ts``.
        ts: the grid that ``at`` refers to, or its number of uniform steps.
        other: the grid to look up in, or its number of uniform steps.

    Returns:
        Indices of steps of ``other``.

    Raises:
        ValueError: for ``at`` outside ``ts``, and for the first time that ``other`` does not contain.

    >>> same_times((0, 5, 10), 10, 50)
    (0, 25, 50)
    """
    ts, other = check_grid(ts), check_grid(other)
    return steps_at(other, ts[list(check_at(at, len(ts) - 1))])


def per_step(ts: Any, values: Any) -> Costed:
    """Return the schedule that is ``values[n]`` at the time ``ts[n]``, and ``nan`` at other times.

    For ``alpha`` and ``beta`` of a correction that are arrays ``[steps]`` over the solver's grid. The schedule works on
    any grid that contains the times where it is evaluated; its ``check`` refuses other times. ``values`` may be traced:
    new values compile nothing.

    Args:
        ts: times ``[S]``.
        values: numbers ``[S]``.

    Returns:
        A function of times of any shape, a ``types.Costed`` without network evaluations.

    Raises:
        ValueError: unless there is one value for each time.

    >>> import jax.numpy as jnp
    >>> per_step(uniform_grid(2), [0.0, 0.25, 0.5])(jnp.array([1.0, 0.5, 0.7])).tolist()
    [0.5, 0.25, nan]
    """
    ts, values = _numbers(ts).astype(np.float64), jnp.asarray(values)
    if ts.ndim == 1 and not ((ts >= 0) & (ts <= 1)).all():
        raise ValueError(f"ts={_short(ts)}: times lie in [0, 1]. Give the times of a grid.")
    if ts.shape != values.shape or ts.ndim != 1:
        raise ValueError(f"values={values.shape}: not the shape {ts.shape} of the times. Give one value a time.")

    def schedule(t):
        gap = jnp.abs(t[..., None] - ts.astype(t.dtype))
        value = values.astype(t.dtype)[jnp.argmin(gap, -1)]
        return jnp.where(jnp.min(gap, -1) <= SAME, value, jnp.nan)

    return Costed(schedule, nfe=0, check=lambda t: steps_at(ts, t))


def _numbers(ts: Any) -> np.ndarray:
    """Return times as an array of numbers; strings would be parsed, and booleans taken for 0 and 1."""
    known = isinstance(ts, (list, tuple, range, float, np.ndarray, np.generic, jax.Array))
    array = np.asarray(ts if known else None)
    if array.dtype.kind not in "fiu" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"ts={ts!r:.80}: not times. Give a list or an array of numbers in [0, 1].")
    return array


def check_steps(n: int) -> None:
    """Refuse a number of steps that is not a positive integer.

    Args:
        n: number of steps.

    Raises:
        ValueError: for any other value.
    """
    if not isinstance(n, numbers.Integral) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n={n!r:.80}: not a number of steps. Give 1 or more.")


def at_times(path: paths.Path, linear: np.ndarray) -> np.ndarray:
    """Return the times on a path that have the noise levels of times of the linear path, and ``t = 1``.

    Args:
        path: a path without a latent.
        linear: rising times ``[n]`` of the linear path, below 1.

    Returns:
        Rising times ``[n + 1]``, float64.

    Raises:
        ValueError: for a noise level that the path does not have, and for a path with a latent.
    """
    if path == paths.linear():
        return check_grid(np.append(linear, 1.0))
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        t, _ = (np.asarray(a) for a in paths.match_snr(path, paths.linear(), jnp.asarray(linear)))
        alpha, beta = (np.asarray(a) for a in path.coefficients(jnp.asarray(t)))
    if (missing := np.abs(alpha * linear - (1 - linear) * beta) > 1e-6 * (alpha * linear + (1 - linear) * beta)).any():
        sigma = (1 - linear[missing][0]) / linear[missing][0] if linear[missing][0] else math.inf
        raise ValueError(f"sigma={sigma:g}: the path does not have this noise level. Take another grid or path.")
    return check_grid(np.append(t, 1.0))


def _short(ts: Any) -> str:
    return f"<{ts.dtype}>" if is_traced(ts) else str(ts.tolist())[:100]


def _check_levels(n: int, sigma_min: float, sigma_max: float) -> None:
    check_steps(n)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min={sigma_min}: 0 < sigma_min < sigma_max={sigma_max} < inf does not hold. Change them."
        )


def _at_levels(path: paths.Path, sigma: np.ndarray) -> np.ndarray:
    """The times of falling noise levels on a path, and ``t = 1``."""
    return at_times(path, 1 / (1 + sigma))
