"""What blocks of local flow matching and of JKO-iFlow do to Gaussian data."""

from __future__ import annotations

import math


def block_variance(variance: float, gammas: tuple[float, ...]) -> float:
    """Return the variance of ``N(0, variance)`` after Ornstein-Uhlenbeck blocks.

    Args:
        variance: variance of the data.
        gammas: sizes of the blocks.

    Returns:
        ``e^{-2 G} variance + 1 - e^{-2 G}`` with ``G`` the sum of the sizes.

    >>> round(block_variance(3.0, (0.5, 0.5)), 4)
    1.2707
    """
    kept = math.exp(-2 * sum(gammas))
    return kept * variance + 1 - kept


def jko_scale(variance: float, size: float) -> float:
    """Return the factor ``a`` of the optimal JKO block ``x -> a x`` on ``N(0, variance)``.

    The positive root of ``variance (1 + 1 / h) a^2 - (variance / h) a - 1 = 0``, the stationarity of
    ``a^2 variance / 2 - log a + (a - 1)^2 variance / (2 h)``; for each eigenvalue of a covariance.

    Args:
        variance: variance of the data of the block.
        size: ``h``.

    Returns:
        The factor.

    >>> jko_scale(1.0, 0.3)
    1.0
    """
    b = variance / size
    return (b + math.sqrt(b**2 + 4 * variance * (1 + 1 / size))) / (2 * variance * (1 + 1 / size))
