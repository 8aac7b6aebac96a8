"""Checks of samples, one wording for all metrics: finite rows, enough of them, and examples of one shape."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def finite_rows(name: str, x: Any, *, least: int = 2) -> np.ndarray:
    """Return samples in float64 after a check of their number and of every value.

    Args:
        name: the name of the samples, for the error.
        x: samples ``[n, ...]``.
        least: the least number of samples.

    Returns:
        The samples ``[n, ...]``, float64.

    Raises:
        ValueError: for fewer samples, a row that is not finite, and samples that are not floating.
    """
    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}={x.dtype}[{_sizes(x)}]: samples are floating. Convert and scale them like the data.")
    x = x.astype(np.float64)
    if not x.ndim or len(x) < least:
        raise ValueError(f"{name}=[{_sizes(x)}]: {least} samples or more are needed. Give an array [n, ...].")
    finite = np.isfinite(x).reshape(len(x), -1).all(1)
    if not finite.all():
        rows = np.flatnonzero(~finite)
        raise ValueError(f"{name}=[{_sizes(x)}]: {len(rows)} rows are not finite, the first is row {rows[0]}.")
    return x


def pair(x: Any, y: Any, names: tuple[str, str] = ("x", "y"), *, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return two sets of samples in float64 after a check of both, and of the shape of their examples.

    Args:
        x: samples ``[n, ...]``.
        y: samples ``[m, ...]``.
        names: the names of both, for the error.
        least: the least number of samples of each.

    Returns:
        Both sets, float64.

    Raises:
        ValueError: for examples of different shapes, and as ``finite_rows`` raises.
    """
    x, y = (finite_rows(name, a, least=least) for name, a in zip(names, (x, y), strict=True))
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"{names[0]}=[{_sizes(x)}]: its examples differ in shape from {names[1]}, [{_sizes(y)}]. Give one shape."
        )
    return x, y


def _sizes(x: np.ndarray) -> str:
    return ", ".join(map(str, x.shape))
