"""Rates of discrete consistency training: the bias of the number of steps, and how many steps suffice."""

from __future__ import annotations

import math

import numpy as np


def consistency_maps(variance: float, steps: int) -> np.ndarray:
    """Return the linear maps to data that discrete consistency training learns for ``N(0, variance)``.

    ``x_t = t x1 + (1 - t) x0`` on the grid ``t_i = 1 - i / N``, with the same pair at both times. The regression of
    ``a_{i-1} x_{t_{i-1}}`` on ``x_{t_i}`` gives

    ``a_i = a_{i-1} (t_{i-1} t_i variance + (1 - t_{i-1}) (1 - t_i)) / (t_i^2 variance + (1 - t_i)^2)``, ``a_0 = 1``.

    The exact map has ``a_N = sqrt(variance)``: consistency training shrinks the variance by ``O(1 / N)``.

    Args:
        variance: variance of the data, positive.
        steps: ``N``.

    Returns:
        ``a_0 .. a_N``, float64.

    >>> bias = [abs(consistency_maps(0.5, n)[-1] - 0.5**0.5) for n in (100, 200)]
    >>> round(float(bias[0]), 4), round(float(bias[0] / bias[1]), 2)
    (0.0094, 1.99)
    """
    t = 1 - np.arange(steps + 1) / steps
    together = t[:-1] * t[1:] * variance + (1 - t[:-1]) * (1 - t[1:])
    return np.cumprod(np.append(1.0, together / (t[1:] ** 2 * variance + (1 - t[1:]) ** 2)))


def sufficient_steps(dim: int, accuracy: float, *, lipschitz: float = 1.0, constant: float = 1.0) -> int:
    """Return the smallest number of discretisation steps that a theorem on consistency training needs.

    ``constant L^3 d^{5/2} log(T)^5 / T <= accuracy``, the bound on the distance ``W1`` of samples without the errors of
    the network (arXiv 2402.07802). The constant is not known: compare numbers with one another.

    Args:
        dim: number of dimensions of the data.
        accuracy: the distance, positive.
        lipschitz: Lipschitz constant of the map.
        constant: the constant of the theorem.

    Returns:
        ``T``, beyond ``e^5``, from where the bound falls.

    Raises:
        ValueError: a number that is not positive.

    >>> sufficient_steps(8, 1.0) > 2 * sufficient_steps(4, 1.0)
    True
    """
    if min(dim, accuracy, lipschitz, constant) <= 0:
        raise ValueError(f"dim={dim}, accuracy={accuracy}: not positive. Give positive numbers.")
    bound = lambda t: constant * lipschitz**3 * dim**2.5 * math.log(t) ** 5 / t
    low, high = math.ceil(math.e**5), 2 * math.ceil(math.e**5)
    if bound(low) <= accuracy:
        return low
    while bound(high) > accuracy:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle) <= accuracy else (middle, high)
    return high
