"""Measures of single channels and of time: the distribution of each channel, and the autocorrelation of series."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Float, Num

from fmjax.checks import Positive, check_hints
from fmjax.metrics import checking
from fmjax.metrics.two_sample import quantile_gap

Samples = Num[np.ndarray | jax.Array, "n ..."]
Others = Num[np.ndarray | jax.Array, "m ..."]
Series = Num[np.ndarray | jax.Array, "n length channels"]


def channel_w2(x: Samples, y: Others) -> Float[np.ndarray, " channels"]:
    """Return the exact W2 distance of the values of each channel, over all samples and all places.

    It sees each channel alone: two sets with equal channels and other dependences have distance 0.

    Args:
        x: samples ``[n, ..., channels]``: coordinates of vectors and points, channels of series, colours of images.
        y: samples ``[m, ..., channels]``.

    Returns:
        The distances ``[channels]``, in the units of the samples.

    Raises:
        ValueError: for samples of different shapes, or without a channel.

    >>> x = np.arange(6.0).reshape(3, 2)
    >>> channel_w2(x, x + [1.0, 5.0]).tolist()
    [1.0, 5.0]
    """
    x, y = checking.pair(x, y)
    if x.ndim < 2:
        raise ValueError(f"x={list(x.shape)}: samples have no channel. Give samples [n, ..., channels].")
    return np.sqrt(quantile_gap(*(a.reshape(-1, a.shape[-1]) for a in (x, y))))


def autocorrelation(x: Series, *, lags: Positive) -> Float[np.ndarray, "lags channels"]:
    """Return the autocorrelation of each channel at lags 0 to ``lags``.

    ``r(k) = E c_t c_(t+k) / E c_t^2`` over all series and times, with ``c`` the value minus the mean of the channel.

    Args:
        x: series ``[n, length, channels]``.
        lags: the largest lag, below ``length``.

    Returns:
        The autocorrelation ``[lags + 1, channels]``; 1 at lag 0, and nan for a constant channel.

    Raises:
        ValueError: for samples that are not series, and for lags of the length or more.

    >>> autocorrelation(np.array([[[1.0], [-1.0], [1.0], [-1.0]]] * 2), lags=2)[:, 0].tolist()
    [1.0, -1.0, 1.0]
    """
    check_hints(autocorrelation, {"lags": lags})
    x = checking.finite_rows("x", x)
    if x.ndim != 3:
        raise ValueError(
            f"x={list(x.shape)}: an autocorrelation is taken of series. Give series [n, length, channels]."
        )
    length = x.shape[1]
    if lags >= length:
        raise ValueError(f"lags={lags}: the series have a length of {length}. Give {length - 1} or less.")
    c = x - x.mean((0, 1))
    products = [(c[:, : length - k] * c[:, k:]).mean((0, 1)) for k in range(lags + 1)]
    with np.errstate(invalid="ignore"):
        return np.stack(products) / products[0]


def autocorrelation_error(x: Series, y: Num[np.ndarray | jax.Array, "m length channels"], *, lags: Positive) -> float:
    """Return the root mean square difference of two autocorrelations, over lags 1 to ``lags`` and channels.

    Args:
        x: series ``[n, length, channels]``.
        y: series ``[m, length, channels]``.
        lags: the largest lag, below ``length``.

    Returns:
        The difference; channels that are constant on both sides are left out.

    Raises:
        ValueError: for series of different shapes, and as ``autocorrelation`` raises.

    >>> x = np.array([[[1.0], [-1.0], [1.0], [-1.0]]] * 2)
    >>> autocorrelation_error(x, x, lags=2)
    0.0
    """
    x, y = checking.pair(x, y)
    a, b = (autocorrelation(s, lags=lags)[1:] for s in (x, y))
    constant = np.isnan(a).all(0) & np.isnan(b).all(0)
    gap = np.nan_to_num(a[:, ~constant]) - np.nan_to_num(b[:, ~constant])
    return float(np.sqrt((gap**2).mean())) if gap.size else 0.0
