"""Precision and recall of samples by nearest neighbours in a feature space."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Features = Float[np.ndarray, "n d"]
Others = Float[np.ndarray, "m d"]


def precision_recall(real: Features, made: Others, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, eq. 2): who lies in the balls around the other set's points.

    A set's support is the union of balls around its points, each reaching to the ``k``-th nearest other point of the
    set. Precision is the share of ``made`` within the support of ``real``, recall that of ``real`` within the support
    of ``made``. They depend on the set sizes: give both alike. Raises ``ValueError`` for sets of ``k`` points or fewer.
    """
    from sklearn.neighbors import NearestNeighbors

    if min(len(real), len(made)) <= k:
        raise ValueError(f"k={k} neighbours need more than {k} points, got {len(real)} real and {len(made)} made")

    def covered(centres, points) -> float:
        radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, -1]  # itself is the first
        # the ball that reaches a point may be any, so all are asked
        reach = NearestNeighbors(radius=float(radii.max())).fit(points).radius_neighbors(centres)
        inside = np.zeros(len(points), bool)
        for distance, index, radius in zip(*reach, radii, strict=True):
            inside[index[distance <= radius]] = True
        return float(inside.mean())

    return covered(real, made), covered(made, real)
