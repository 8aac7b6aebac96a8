"""Distances between two sets of samples in their own space, and errors over seeds; float64 numpy on the host.

Samples are ``[n, ...]`` and are flattened. A distance means something only beside its floor: the same distance, at the
same counts, between held-out data and the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import numpy as np
from jaxtyping import Float, Num

from fmjax.checks import Finite, Positive, PositiveFloat, Range, check_hints
from fmjax.keys import generator
from fmjax.metrics import checking

Samples = Num[np.ndarray | jax.Array, "n ..."]
Others = Num[np.ndarray | jax.Array, "m ..."]


def sliced_w2(x: Samples, y: Others, *, directions: Positive = 512, seed: int = 0) -> float:
    """Return the sliced 2-Wasserstein distance: ``sqrt(E_u W2^2(u.x, u.y))`` over random unit vectors ``u``.

    ``d * sliced_w2**2`` is comparable with ``W2**2`` in ``d`` dimensions. The one-dimensional distances are exact, also
    for unequal counts.

    Args:
        x: samples ``[n, ...]``.
        y: samples ``[m, ...]``.
        directions: the number of unit vectors.
        seed: the seed of the unit vectors; values compare if it is the same.

    Returns:
        The distance, in the units of the samples.

    >>> x = np.arange(6.0)[:, None]
    >>> sliced_w2(x, x + 2, directions=4)
    2.0
    """
    check_hints(sliced_w2, {"directions": directions})
    x, y = _flat_pair(x, y)
    u = generator(seed).standard_normal((x.shape[1], directions))
    u /= np.linalg.norm(u, axis=0)
    blocks = np.split(u, range(64, directions, 64), axis=1)
    total = sum(float(quantile_gap(x @ block, y @ block).sum()) for block in blocks)
    return float(np.sqrt(total / directions))


def quantile_gap(x: Float[np.ndarray, "n k"], y: Float[np.ndarray, "m k"]) -> Float[np.ndarray, " k"]:
    """Return the exact squared W2 distance of each column, a set of numbers, by its quantiles.

    Args:
        x: numbers ``[n, k]``.
        y: numbers ``[m, k]``.

    Returns:
        The squared distances ``[k]``.
    """
    n, m = len(x), len(y)
    # Both quantile functions are constant between the knots i/n, j/m; in units of 1/(nm) these are integers.
    knots = np.unique(np.concatenate([np.arange(n + 1) * m, np.arange(m + 1) * n]))
    weight, i, j = np.diff(knots) / (n * m), knots[:-1] // m, knots[:-1] // n
    return weight @ (np.sort(x, 0)[i] - np.sort(y, 0)[j]) ** 2


def w2_exact(x: Samples, y: Others) -> float:
    """Return the exact 2-Wasserstein distance of two sets of equal size: ``min_s sqrt(mean_i |x_i - y_s(i)|^2)``.

    The time is cubic in n: for n up to about 10,000. POT's network simplex is used where it is installed, else scipy's
    assignment.

    Args:
        x: samples ``[n, ...]``.
        y: samples ``[n, ...]``.

    Returns:
        The distance, in the units of the samples.

    Raises:
        ValueError: for sets of unequal size.

    >>> x = np.arange(6.0).reshape(3, 2)
    >>> round(w2_exact(x, x[::-1] + 3), 6) == round(3 * 2**0.5, 6)
    True
    """
    x, y = _flat_pair(x, y)
    if len(x) != len(y):
        raise ValueError(
            f"x=[{len(x)}]: w2_exact compares sets of equal size, and y has {len(y)}. Take a random subset."
        )
    cost = _squared_distances(x, y)
    try:
        import ot
    except ImportError:
        from scipy.optimize import linear_sum_assignment

        return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))
    uniform = np.full(len(x), 1 / len(x))
    return float(np.sqrt(ot.emd2(uniform, uniform, cost, numItermax=10_000_000)))


def energy_distance(x: Samples, y: Others, *, within: Finite | None = None, block: Positive = 1024) -> float:
    """Return the energy distance ``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, unbiased.

    The expectations are over pairs of distinct samples: for equal distributions the mean is 0, and a value can be
    negative.

    Args:
        x: samples ``[n, ...]``.
        y: samples ``[m, ...]``.
        within: ``mean_distance(y)``, if it is known: it is quadratic in m.
        block: the number of rows at a time; the memory is ``block * max(n, m)`` numbers.

    Returns:
        The distance, in the units of the samples.

    >>> energy_distance(np.array([[0.0], [1.0]]), np.array([[10.0], [11.0]]))
    18.0
    """
    check_hints(energy_distance, {"within": within, "block": block})
    x, y = _flat_pair(x, y)
    within = mean_distance(y, block=block) if within is None else within
    return 2 * _sum(x, y, np.sqrt, block) / (len(x) * len(y)) - mean_distance(x, block=block) - within


def mean_distance(y: Samples, *, block: Positive = 1024) -> float:
    """Return ``E|Y - Y'|`` over the pairs of distinct samples.

    Args:
        y: samples ``[m, ...]``.
        block: the number of rows at a time.

    Returns:
        The mean distance.

    >>> mean_distance(np.array([[0.0], [3.0]]))
    3.0
    """
    check_hints(mean_distance, {"block": block})
    y, _ = _flat_pair(y, y)
    # The distance of a sample to itself is zero up to rounding (1e-8 of the scale), so the sum is one over pairs.
    return _sum(y, y, np.sqrt, block) / (len(y) * (len(y) - 1))


def median_distance(y: Samples, *, count: Annotated[int, Range(low=2)] = 1000, seed: int = 0) -> float:
    """Return the median distance of distinct samples, the usual bandwidth of a kernel.

    Args:
        y: samples ``[m, ...]``.
        count: the largest number of samples compared, drawn at random.
        seed: the seed of the draw.

    Returns:
        The median distance.

    >>> median_distance(np.array([[0.0], [1.0], [3.0]]))
    2.0
    """
    check_hints(median_distance, {"count": count})
    y, _ = _flat_pair(y, y)
    y = y[generator(seed).permutation(len(y))[:count]]
    return float(np.median(np.sqrt(_squared_distances(y, y)[np.triu_indices(len(y), 1)])))


def mmd(
    x: Samples, y: Others, *, bandwidth: PositiveFloat, within: Finite | None = None, block: Positive = 1024
) -> float:
    """Return the squared maximum mean discrepancy with a Gaussian kernel, unbiased (Gretton et al., 2012, eq. 3).

    ``E k(X, X') + E k(Y, Y') - 2 E k(X, Y)`` with ``k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2))``, over pairs of
    distinct samples: for equal distributions the mean is 0, and a value can be negative.

    Args:
        x: samples ``[n, ...]``.
        y: samples ``[m, ...]``.
        bandwidth: the standard deviation of the kernel, positive (``median_distance(y)``).
        within: ``mean_kernel(y)``, if it is known: it is quadratic in m.
        block: the number of rows at a time; the memory is ``block * max(n, m)`` numbers.

    Returns:
        The squared discrepancy.

    Raises:
        ValueError: for a bandwidth that is not positive.

    >>> x = np.zeros((2, 1))
    >>> round(mmd(x, x + 1e3, bandwidth=1.0), 12)
    2.0
    """
    check_hints(mmd, {"bandwidth": bandwidth, "within": within, "block": block})
    x, y = _flat_pair(x, y)
    within = mean_kernel(y, bandwidth=bandwidth, block=block) if within is None else within
    across = _sum(x, y, _kernel(bandwidth), block) / (len(x) * len(y))
    return mean_kernel(x, bandwidth=bandwidth, block=block) + within - 2 * across


def mean_kernel(y: Samples, *, bandwidth: PositiveFloat, block: Positive = 1024) -> float:
    """Return ``E k(Y, Y')`` over the pairs of distinct samples, with the kernel of ``mmd``.

    Args:
        y: samples ``[m, ...]``.
        bandwidth: the standard deviation of the kernel, positive.
        block: the number of rows at a time.

    Returns:
        The mean of the kernel.

    Raises:
        ValueError: for a bandwidth that is not positive.

    >>> mean_kernel(np.zeros((3, 1)), bandwidth=1.0)
    1.0
    """
    check_hints(mean_kernel, {"bandwidth": bandwidth, "block": block})
    y, _ = _flat_pair(y, y)
    return (_sum(y, y, _kernel(bandwidth), block) - len(y)) / (len(y) * (len(y) - 1))


def mean_se(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the mean over seeds and its standard error ``std(ddof=1) / sqrt(k)``.

    Args:
        values: k numbers.

    Returns:
        The mean and its error, ``nan`` for the error of a single value.

    >>> mean_se([1.0, 3.0])
    (2.0, 1.0)
    """
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or not len(v):
        raise ValueError(f"values=[{', '.join(map(str, v.shape))}]: a mean is taken over a list of numbers. Give one.")
    return float(v.mean()), float(v.std(ddof=1) / np.sqrt(len(v))) if len(v) > 1 else float("nan")


def bootstrap_se(
    statistic: Callable[..., float],
    samples: Samples,
    *paired: Samples,
    resamples: Annotated[int, Range(low=2)] = 100,
    seed: int = 0,
) -> float:
    """Return the standard error of a statistic: its standard deviation over resamples with replacement.

    Resample the samples, not the reference. The *mean* over resamples is biased for a distance (they repeat points):
    report the value of all samples with this error.

    Args:
        statistic: a function of samples.
        samples: samples ``[n, ...]``.
        *paired: further arguments of the statistic ``[n, ...]``, resampled by the same rows.
        resamples: the number of resamples.
        seed: the seed of the resamples.

    Returns:
        The standard error.

    >>> bootstrap_se(lambda x: float(x.mean()), np.ones((4, 1)))
    0.0
    """
    check_hints(bootstrap_se, {"resamples": resamples})
    samples = np.asarray(samples)
    checking.finite_rows("samples", samples, least=1)
    rng = generator(seed)
    n = len(samples)
    draws = (rng.integers(n, size=n) for _ in range(resamples))
    return float(np.std([statistic(*(np.asarray(a)[rows] for a in (samples, *paired))) for rows in draws], ddof=1))


def _flat_pair(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = (a.reshape(len(a), -1) for a in checking.pair(x, y))
    centre = x.mean(0)  # distances do not change, and the expansion of the square loses fewer digits
    return x - centre, y - centre


def _kernel(bandwidth: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda squared: np.exp(squared / (-2 * bandwidth**2))


def _sum(x, y, function: Callable[[np.ndarray], np.ndarray], block: int) -> float:
    """Return the sum over all pairs of a function of the squared distance."""
    return sum(float(function(_squared_distances(x[i : i + block], y)).sum()) for i in range(0, len(x), block))


def _squared_distances(x, y) -> np.ndarray:
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)
