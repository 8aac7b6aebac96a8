"""Precision, recall, density, coverage and memorisation by nearest neighbours in a feature space."""

from __future__ import annotations

import itertools
from typing import Annotated, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Num

from fmjax.checks import NonNegative, Positive, Range, check_hints
from fmjax.metrics import checking

Features = Float[np.ndarray, "n d"]
Others = Float[np.ndarray, "m d"]


def precision_recall(real: Features, samples: Others, *, k: Positive = 3) -> tuple[float, float]:
    """Return improved precision and recall (arXiv 1904.06991, eq. 2).

    The support of a set is the union of balls around its points; each ball reaches to the ``k``-th nearest other point
    of the set, and a point at that very distance is inside, as in the paper. Precision is the fraction of samples in
    the support of the real examples; recall is the fraction of real examples in the support of the samples. Both depend
    on the sizes of the sets: give sets of one size.

    Args:
        real: features of real examples ``[n, d]``, more than ``k``.
        samples: features of samples ``[m, d]``, more than ``k``.
        k: the number of the neighbour that a ball reaches to.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: for sets of ``k`` points or fewer, and of different dimensions.

    >>> x = np.arange(5.0)[:, None]
    >>> precision_recall(x, x + 100, k=1), precision_recall(x, x + 0.5, k=1)
    ((0.0, 0.0), (1.0, 1.0))
    """
    from sklearn.neighbors import NearestNeighbors

    check_hints(precision_recall, {"k": k})
    real, samples = checking.pair(real, samples, ("real", "samples"))
    if min(len(real), len(samples)) <= k:
        raise ValueError(f"k={k}: there are {len(real)} real examples and {len(samples)} samples. Give more than {k}.")

    def covered(centres, points) -> float:
        radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, -1]  # itself is the first
        # any ball may be the one that contains a point, so that all are tried
        reach = NearestNeighbors(radius=float(radii.max())).fit(points).radius_neighbors(centres)
        inside = np.zeros(len(points), bool)
        for distance, index, radius in zip(*reach, radii, strict=True):
            inside[index[distance <= radius]] = True
        return float(inside.mean())

    return covered(real, samples), covered(samples, real)


def density_coverage(
    real: Features, samples: Others, *, k: Positive = 5, block: Positive = 1024
) -> tuple[float, float]:
    """Return density and coverage (arXiv 2002.09797, eq. 3 and 6).

    The ball of a real example reaches to its ``k``-th nearest other real example, without the points at that very
    distance, as in the authors' code. Density is the mean number of balls that a sample lies in, divided by ``k``;
    coverage is the fraction of balls with a sample in them.

    Args:
        real: features of real examples ``[n, d]``, more than ``k``.
        samples: features of samples ``[m, d]``.
        k: the number of the neighbour that a ball reaches to.
        block: the number of real examples at a time; the memory is ``block * max(n, m)`` numbers.

    Returns:
        Density, which is 1 in the mean for equal distributions, and coverage in [0, 1].

    Raises:
        ValueError: for ``k`` real examples or fewer, and for features of different dimensions.

    >>> x = np.arange(5.0)[:, None]
    >>> density_coverage(x, x + 100, k=1), density_coverage(x, x, k=1)
    ((0.0, 0.0), (1.0, 1.0))
    """
    check_hints(density_coverage, {"k": k, "block": block})
    real, samples = checking.pair(real, samples, ("real", "samples"))
    real, samples = (a - real.mean(0) for a in (real, samples))
    if len(real) <= k:
        raise ValueError(f"k={k}: there are {len(real)} real examples. Give more than {k}.")
    inside = covered = 0
    for i in range(0, len(real), block):
        centres = real[i : i + block]
        radii = np.partition(_squared(centres, real), k, 1)[:, k]  # itself is the first
        distances = _squared(centres, samples)
        inside += int((distances < radii[:, None]).sum())
        covered += int((distances.min(1) < radii).sum())
    return inside / (k * len(samples)), covered / len(real)


def nearest_distance(
    x: Num[np.ndarray | jax.Array, "n ..."],
    train: Num[np.ndarray | jax.Array, "m ..."],
    *,
    shifts: NonNegative = 0,
    block: Positive = 256,
) -> tuple[Float[np.ndarray, " n"], np.ndarray]:
    """Return the distance of every example to the nearest training example, and which example that is.

    Args:
        x: examples ``[n, ...]``.
        train: training examples ``[m, ...]``.
        shifts: for images ``[n, h, w, c]``: the distance is the least over shifts of the image by up to so many pixels
            in both directions; pixels at the border are repeated.
        block: the number of examples at a time; the memory is ``block * m`` numbers.

    Returns:
        Distances ``[n]``, and indices into ``train``, ``[n]``.

    Raises:
        ValueError: for examples of different shapes, and for shifts of data that are not images.

    >>> nearest_distance(np.array([[0.0], [5.0]]), np.array([[1.0], [4.5], [9.0]]))[0].tolist()
    [1.0, 0.5]
    """
    check_hints(nearest_distance, {"shifts": shifts, "block": block})
    x, train = checking.pair(x, train, ("x", "train"), least=1)
    if shifts and x.ndim != 4:
        raise ValueError(f"shifts={shifts}: examples of shape {x.shape[1:]} have no pixels. Give images, or shifts=0.")
    centre = train.mean(0)  # distances do not change, and the expansion of the square loses fewer digits
    flat = (train - centre).reshape(len(train), -1)
    norms, moves = (flat**2).sum(1), range(-shifts, shifts + 1)
    best, index = np.full(len(x), np.inf), np.zeros(len(x), int)
    for i in range(0, len(x), block):
        rows = slice(i, i + block)
        for dy, dx in itertools.product(moves, moves):
            moved = (_shifted(x[rows], dy, dx) - centre).reshape(len(x[rows]), -1)
            nearest = (norms - 2 * moved @ flat.T).argmin(1)
            distance = np.linalg.norm(moved - flat[nearest], axis=1)
            index[rows] = np.where(distance < best[rows], nearest, index[rows])
            best[rows] = np.minimum(distance, best[rows])
    return best, index


class Memorisation(NamedTuple):
    """How near samples are to training examples, in comparison with held-out examples.

    Attributes:
        fraction: the fraction of samples nearer to a training example than all but a small fraction of held-out
            examples: that small fraction for fresh samples, 1 for copies.
        low: the lower end of its 95 % binomial interval.
        high: the upper end.
        ratio: the median distance of samples divided by the median distance of held-out examples; above 1 for samples
            off the data.
        nearest: the index of the nearest training example of each sample, ``[n]``.
    """

    fraction: float
    low: float
    high: float
    ratio: float
    nearest: np.ndarray


def memorised(
    samples: Num[np.ndarray | jax.Array, "n ..."],
    train: Num[np.ndarray | jax.Array, "m ..."],
    held_out: Num[np.ndarray | jax.Array, "k ..."],
    *,
    quantile: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.05,
    shifts: NonNegative = 0,
) -> Memorisation:
    """Return how many samples repeat training examples, by the distance to the nearest training example.

    Frechet distances, precision and recall call copies of training examples perfect.

    Args:
        samples: samples ``[n, ...]``, or their features.
        train: all training examples ``[m, ...]``, or their features.
        held_out: examples that were not trained on ``[k, ...]``, at least ``1 / quantile``.
        quantile: the quantile of the distances of held-out examples below which a sample counts as a repetition.
        shifts: for images, see ``nearest_distance``; a copy shifted by one pixel is not found without.

    Returns:
        The fraction with its interval, the ratio of the medians, and the nearest training examples.

    Raises:
        ValueError: for too few held-out examples, and examples of different shapes.

    >>> x = np.random.default_rng(0).standard_normal((200, 3))
    >>> memorised(x[:50], x[:100], x[100:]).fraction
    1.0
    """
    from scipy.stats import binomtest

    check_hints(memorised, {"quantile": quantile, "shifts": shifts})
    if len(held_out) * quantile < 1:
        raise ValueError(
            f"held_out=[{len(held_out)}]: too few for the quantile {quantile:g} of their distances. Give "
            f"{int(np.ceil(1 / quantile))} or more."
        )
    fresh, _ = nearest_distance(held_out, train, shifts=shifts)
    distances, nearest = nearest_distance(samples, train, shifts=shifts)
    near = int((distances < np.quantile(fresh, quantile)).sum())
    interval = binomtest(near, len(distances)).proportion_ci()
    middle = float(np.median(fresh))
    ratio = float(np.median(distances)) / middle if middle else float("inf")
    return Memorisation(near / len(distances), float(interval.low), float(interval.high), ratio, nearest)


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)


def _shifted(x: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Return images moved by some pixels, the border repeated."""
    if not dy and not dx:
        return x
    height, width = x.shape[1:3]
    rows, columns = (np.clip(np.arange(n) + d, 0, n - 1) for n, d in ((height, dy), (width, dx)))
    return x[:, rows][:, :, columns]
