"""Distances between two sets of samples in their own space: sliced and exact W2, energy distance; errors over seeds.

Samples are ``[n, ...]`` and are flattened; everything is float64 numpy on the host. A distance means something only
beside its floor: the same distance, at the same counts, between held-out data and the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Num

Samples = Num[np.ndarray | jax.Array, "n ..."]
Others = Num[np.ndarray | jax.Array, "m ..."]


def sliced_w2(x: Samples, y: Others, *, directions: int = 512, seed: int = 0) -> float:
    """``sqrt(E_u W2^2(u.x, u.y))`` over ``directions`` unit vectors fixed by ``seed`` (shared by all that is compared).

    ``d * sliced_w2**2`` is comparable with ``W2**2``. The one-dimensional distances are exact, also for unequal counts.
    """
    x, y = _flat_pair(x, y)
    n, m = len(x), len(y)
    u = np.random.default_rng(seed).standard_normal((x.shape[1], directions))
    u /= np.linalg.norm(u, axis=0)
    # Both quantile functions are constant between the knots i/n, j/m; in units of 1/(nm) these are integers.
    knots = np.unique(np.concatenate([np.arange(n + 1) * m, np.arange(m + 1) * n]))
    weight, i, j = np.diff(knots) / (n * m), knots[:-1] // m, knots[:-1] // n
    total = 0.0
    for block in np.split(u, range(64, directions, 64), axis=1):
        gap = np.sort(x @ block, 0)[i] - np.sort(y @ block, 0)[j]
        total += float((weight @ gap**2).sum())
    return float(np.sqrt(total / directions))


def w2_exact(x: Samples, y: Others) -> float:
    """``min_sigma sqrt(mean_i |x_i - y_sigma(i)|^2)``: exact 2-Wasserstein distance of two sets of equal size.

    Cubic in n (POT's network simplex where it is installed, else scipy's assignment); for n up to about 10k.
    """
    x, y = _flat_pair(x, y)
    if len(x) != len(y):
        raise ValueError(f"w2_exact needs two sets of equal size, got {len(x)} and {len(y)}: take a random subset")
    cost = _squared_distances(x, y)
    try:
        import ot
    except ImportError:
        from scipy.optimize import linear_sum_assignment

        return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))
    uniform = np.full(len(x), 1 / len(x))
    return float(np.sqrt(ot.emd2(uniform, uniform, cost, numItermax=10_000_000)))


def energy_distance(x: Samples, y: Others, *, within: float | None = None, block: int = 1024) -> float:
    """``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, unbiased (pairs of distinct samples): mean 0 for equal laws, may be < 0.

    Computed in blocks of ``block`` rows: memory is ``block * max(n, m)``. ``within`` is ``mean_distance(y)``, for those
    who compare many ``x`` with one large ``y``.
    """
    x, y = _flat_pair(x, y)
    within = mean_distance(y, block=block) if within is None else within
    return 2 * _sum(x, y, block) / (len(x) * len(y)) - mean_distance(x, block=block) - within


def mean_distance(y: Samples, *, block: int = 1024) -> float:
    """``E|Y - Y'|`` over the pairs of distinct samples."""
    y, _ = _flat_pair(y, y)
    # The distance of a sample to itself is zero up to rounding (1e-8 of the scale), so the sum is one over pairs.
    return _sum(y, y, block) / (len(y) * (len(y) - 1))


def mean_se(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean over seeds and its standard error ``std(ddof=1) / sqrt(k)``; ``nan`` for the error of a single value."""
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or not len(v):
        raise ValueError(f"mean_se needs a list of numbers, got shape {v.shape}")
    return float(v.mean()), float(v.std(ddof=1) / np.sqrt(len(v))) if len(v) > 1 else float("nan")


def bootstrap_se(
    statistic: Callable[[np.ndarray], float], samples: Samples, *, resamples: int = 100, seed: int = 0
) -> float:
    """Standard error of ``statistic(samples)``: its standard deviation over resamples with replacement.

    Resample the samples, not the reference. The resamples' *mean* is biased for a distance (they repeat points): quote
    the value itself with this error.
    """
    rng = np.random.default_rng(seed)
    n = len(samples)
    return float(np.std([statistic(samples[rng.integers(n, size=n)]) for _ in range(resamples)], ddof=1))


def _flat_pair(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, y))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"samples of {x.shape[1]} and of {y.shape[1]} dimensions have no distance")
    for name, a in (("x", x), ("y", y)):
        if len(a) < 2:
            raise ValueError(f"{name} has {len(a)} sample(s); a distance of laws needs at least two")
        if not np.isfinite(a).all():
            rows = np.flatnonzero(~np.isfinite(a).all(1))
            raise ValueError(f"{name}: {len(rows)} of {len(a)} samples are not finite, first at row {rows[0]}")
    centre = x.mean(0)  # distances do not feel it; the expansion of the square loses fewer digits
    return x - centre, y - centre


def _sum(x, y, block: int) -> float:
    """The sum of all distances."""
    return sum(float(np.sqrt(_squared_distances(x[i : i + block], y)).sum()) for i in range(0, len(x), block))


def _squared_distances(x, y) -> np.ndarray:
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)
