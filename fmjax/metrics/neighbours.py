"""Precision and recall of samples by nearest neighbours in a feature space."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from fmjax.checks import Positive, check_hints
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
