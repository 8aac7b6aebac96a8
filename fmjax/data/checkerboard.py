"""The checkerboard in the plane as a data set: a toy that shows what a flow does to sharp edges."""

from __future__ import annotations

import jax
import numpy as np

from fmjax.data import toy
from fmjax.data.arrays import Splits


def checkerboard(*, train: int = 100_000, test: int = 10_000, seed: int = 0) -> Splits:
    """Points ``[n, 2]`` drawn by ``toy.checkerboard`` (uniform on 8 of 16 cells of [-1, 1)^2), labels 0.

    Raises ``ValueError`` for less than one point on a side or a negative seed.
    """
    if train < 1 or test < 1 or seed < 0:
        raise ValueError(f"train={train} and test={test} must be at least 1, seed={seed} not negative")
    x = np.asarray(toy.checkerboard(jax.random.key(seed), train + test))
    y = np.zeros(train + test, np.int32)
    return Splits(x[:train], y[:train], x[train:], y[train:])
