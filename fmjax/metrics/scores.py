"""Measures of features: KID, Inception score, MIND, the Frechet distance without bias, and the change by a correction.

Features are rows ``[n, d]`` of any extractor (``fmjax.metrics.extractors``); float64 numpy on the host.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, Num

from fmjax.checks import Positive, PositiveFloat, Range, check_hints
from fmjax.keys import generator
from fmjax.metrics import checking, two_sample
from fmjax.metrics.frechet import frechet_distance, moments

Features = Num[np.ndarray | jax.Array, "n d"]
Others = Num[np.ndarray | jax.Array, "m d"]
Logits = Num[np.ndarray | jax.Array, "n classes"]
Several = Annotated[int, Range(low=3)]


def kid(
    features_a: Features, features_b: Others, *, subsets: Positive = 100, size: Several = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the kernel distance KID (arXiv 1801.01401, section 4): an unbiased squared MMD with a cubic kernel.

    The kernel is ``(a.b / d + 1)^3``. It needs features of the order of one in each dimension, as Inception's: divide
    other features by one number first, ``sqrt(mean |b|^2 / d)`` of the reference.

    Args:
        features_a: ``[n, d]``, at least ``size`` rows.
        features_b: ``[m, d]``, at least ``size`` rows.
        subsets: the number of random subsets of both sides.
        size: the number of rows in a subset, drawn without replacement.
        seed: the seed of the subsets.

    Returns:
        The mean over the subsets, and the standard deviation over the subsets. The mean can be negative.

    Raises:
        ValueError: for fewer rows than ``size``, and for features of different dimensions.

    >>> x = np.random.default_rng(0).standard_normal((60, 2))
    >>> kid(x, x + 2, subsets=5, size=50)[0] > 10 * abs(kid(x, x[::-1], subsets=5, size=50)[0])
    True
    """
    check_hints(kid, {"subsets": subsets, "size": size})
    a, b = _pair(features_a, features_b, size, "size")
    rng, d = generator(seed), a.shape[1]
    values = []
    for _ in range(subsets):
        x, y = (rows[rng.permutation(len(rows))[:size]] for rows in (a, b))
        xx, yy, xy = ((p @ q.T / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        values.append(within - 2 * xy.mean())
    return float(np.mean(values)), float(np.std(values))


def inception_score(logits: Logits, *, splits: Positive = 10, seed: int = 0) -> tuple[float, float]:
    """Return the Inception score ``exp E KL(p(y|x) || p(y))`` (arXiv 1606.03498, section 4).

    The published score takes the logits of the Inception network without the bias of its last layer.

    Args:
        logits: ``[n, classes]``, at least ``splits`` rows.
        splits: the number of parts; ``p(y)`` is the mean over the rows of a part.
        seed: the seed of the order in which rows are dealt to the parts.

    Returns:
        The mean over the parts, and the standard deviation over the parts; at most the number of classes.

    Raises:
        ValueError: for fewer rows than ``splits``.

    >>> score, _ = inception_score(1e3 * np.eye(4).repeat(2, 0), splits=1)
    >>> round(score, 6)
    4.0
    """
    from scipy.special import log_softmax, logsumexp

    check_hints(inception_score, {"splits": splits})
    rows = checking.finite_rows("logits", logits, least=splits)
    if rows.ndim != 2:
        raise ValueError(
            f"logits={list(rows.shape)}: one row of logits an example is needed. Give logits [n, classes]."
        )
    log_p = log_softmax(rows[generator(seed).permutation(len(rows))], axis=1)
    values = []
    for part in np.array_split(log_p, splits):
        log_q = logsumexp(part, axis=0) - np.log(len(part))
        values.append(np.exp((np.exp(part) * (part - log_q)).sum(1).mean()))
    return float(np.mean(values)), float(np.std(values))


def mind(features_a: Features, features_b: Others, *, directions: Positive = 1000, seed: int = 0) -> float:
    """Return the Monge Inception distance ``3 d SW2^2`` (arXiv 2605.06797): a sliced distance, no covariance.

    Its floor falls faster with the number of samples than the floor of a Frechet distance.

    Args:
        features_a: ``[n, d]``.
        features_b: ``[m, d]``.
        directions: the number of random directions.
        seed: the seed of the directions; values compare if it is the same.

    Returns:
        The distance; for a translation by ``v`` about ``3 |v|^2``.

    Raises:
        ValueError: for features of different dimensions.

    >>> x = np.arange(6.0)[:, None]
    >>> round(mind(x, x + 2), 6)
    12.0
    """
    a, b = _pair(features_a, features_b, 2, "n")
    return 3 * a.shape[1] * two_sample.sliced_w2(a, b, directions=directions, seed=seed) ** 2


def frechet_infinity(
    features: Features, reference: Others, *, counts: Several = 8, seed: int = 0
) -> tuple[float, float]:
    """Return the Frechet distance extrapolated to infinitely many samples (arXiv 1911.07023, section 5).

    The distance of ``n`` samples is biased upwards by about ``c / n``. It is measured on random subsets of ``n / 5`` to
    ``n`` samples, and the line through the values over ``1 / n`` is followed to zero. The bias by the finite number of
    reference examples remains.

    Args:
        features: features of the samples ``[n, d]``, more than ``5 d`` rows.
        reference: features of the reference examples ``[m, d]``, more than ``d`` rows.
        counts: the number of subsets.
        seed: the seed of the subsets.

    Returns:
        The distance, which can be negative, and the standard error of the fit.

    Raises:
        ValueError: for ``5 d`` samples or fewer: a subset would have a singular covariance.

    >>> x = np.random.default_rng(0).standard_normal((2000, 2))
    >>> abs(frechet_infinity(x[:1000], x[1000:])[0]) < 0.02
    True
    """
    from scipy.stats import linregress

    check_hints(frechet_infinity, {"counts": counts})
    a, b = _pair(features, reference, 2, "n")
    n, d = a.shape
    if n <= 5 * d or len(b) <= d:
        raise ValueError(
            f"n={n}: features of {d} dimensions are extrapolated from more than {5 * d} samples and {d} reference "
            "examples. Draw more, or take an extractor of fewer dimensions."
        )
    target, rng = moments(b), generator(seed)
    sizes = np.linspace(n / 5, n, counts).round().astype(int)
    values = [frechet_distance(*moments(a[rng.permutation(n)[:size]]), *target) for size in sizes]
    line = linregress(1 / sizes, values)
    return float(line.intercept), float(line.intercept_stderr)


class FeatureChange(NamedTuple):
    """How far a correction moves samples in a feature space, sample by sample.

    Attributes:
        distances: the distance of each pair, divided by the median distance of reference examples, ``[n]``.
        counts: the histogram of the distances, ``[bins]``; the last bin holds what lies above the range.
        edges: the edges of its bins, ``[bins + 1]``.
    """

    distances: Float[np.ndarray, " n"]
    counts: Int[np.ndarray, " bins"]
    edges: Float[np.ndarray, " edges"]


def feature_change(
    corrected: Features, plain: Features, reference: Others, *, bins: Positive = 20, top: PositiveFloat = 1.0
) -> FeatureChange:
    """Return the histogram of the feature change between corrected and plain samples of the same noise.

    A distance of one is as far as two random reference examples: such a correction replaces a sample by another. A
    correction that repairs samples has most of its mass far below one.

    Args:
        corrected: features of corrected samples ``[n, d]``.
        plain: features of the samples of the same noise without the correction ``[n, d]``.
        reference: features of reference examples ``[m, d]``, which give the unit.
        bins: the number of bins.
        top: the upper end of the last bin but for what lies above.

    Returns:
        The distances and their histogram.

    Raises:
        ValueError: for sets of different sizes or dimensions.

    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> feature_change(x + 0.25, x, x, bins=4).counts.tolist()
    [0, 3, 0, 0]
    """
    check_hints(feature_change, {"bins": bins, "top": top})
    a, b = _pair(corrected, plain, 1, "n")
    if len(a) != len(b):
        raise ValueError(f"corrected=[{len(a)}]: there are {len(b)} plain samples. Give the samples of the same noise.")
    unit = two_sample.median_distance(_pair(reference, plain, 2, "n")[0])
    distances = np.linalg.norm(a - b, axis=1) / unit
    edges = np.linspace(0, top, bins + 1)
    return FeatureChange(distances, np.histogram(np.minimum(distances, top), edges)[0], edges)


def paired_error(x: Num[np.ndarray | jax.Array, "n ..."], teacher: Num[np.ndarray | jax.Array, "n ..."]) -> float:
    """Return the mean squared error to a teacher's samples of the same noise, ``E |x - y|^2 / d``.

    Args:
        x: samples of a student ``[n, ...]``.
        teacher: samples of the teacher ``[n, ...]`` from the same noise, in the same order.

    Returns:
        The mean squared error. Its floor is the teacher against the teacher with twice as many steps.

    Raises:
        ValueError: for sets of different sizes or shapes.

    >>> paired_error(np.ones((2, 3)), np.zeros((2, 3)))
    1.0
    """
    a, b = checking.pair(x, teacher, ("x", "teacher"))
    if len(a) != len(b):
        raise ValueError(f"x=[{len(a)}]: the teacher has {len(b)} samples. Give the samples of the same noise.")
    return float(((a - b) ** 2).mean())


def bits_per_dimension(
    log_density: Num[np.ndarray | jax.Array, " n"], dimensions: Positive, *, level: PositiveFloat | None = None
) -> Float[np.ndarray, " n"]:
    """Return the code length of examples in bits per dimension, ``-log2 p(x) / d - log2(level)``.

    Args:
        log_density: natural logarithms of the density at dequantised examples ``[n]``.
        dimensions: the number of coordinates of an example.
        level: the distance of two grey levels in the units of the density: ``2 / 255`` for 8-bit images in [-1, 1]
            (an offset of 6.994); ``None`` for examples without levels.

    Returns:
        Bits per dimension ``[n]``; of dequantised examples an upper bound.

    >>> bits_per_dimension(np.array([-784 * np.log(2)]), 784, level=2 / 256).tolist()
    [8.0]
    """
    check_hints(bits_per_dimension, {"dimensions": dimensions, "level": level})
    nats = -np.asarray(log_density, np.float64) / dimensions
    return nats / np.log(2) - (np.log2(level) if level is not None else 0.0)


def _pair(a, b, least: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return two sets of features in float64, after a check of their shapes and counts."""
    a, b = checking.pair(a, b, ("features", "reference features"))
    if a.ndim != 2:
        raise ValueError(f"features={list(a.shape)}: a row an example is needed. Give features [n, d].")
    if min(len(a), len(b)) < least:
        raise ValueError(f"{name}={least}: there are {len(a)} and {len(b)} rows. Give as many, or a smaller {name}.")
    return a, b
