"""Interpolate marginals between their two ends: only the backward image of the data at the start is stored."""

from __future__ import annotations

import numpy as np

from fmjax.correction.marginals import Marginals
from fmjax.correction.trajectories import elapsed_fractions
from fmjax.data.dataset import Rows
from fmjax.storage import checkpoint


class Between:
    """``(1 - k_n) x_0 + k_n x_N`` as if it were an array ``[M, N + 1, ...]``, computed when ``x[rows, n]`` is read.

    Attributes:
        shape: ``(M, N + 1, ...)``.
        dtype: float32.
        ndim: number of axes.
    """

    def __init__(self, x: Rows, data: Rows | None, k: np.ndarray):
        self.x, self.data, self.k = x, data, k
        self.shape, self.dtype = (len(x), len(k), *x.shape[2:]), np.dtype(np.float32)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at) -> np.ndarray:
        rows, n = at if isinstance(at, tuple) else (at, slice(None))
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        examples = np.atleast_1d(rows)
        stored = self.x[examples]
        start, end = stored[:, 0], stored[:, -1] if self.data is None else self.data[examples]
        k = self.k[n]
        if isinstance(n, slice):
            start, end = start[:, None], end[:, None]
        k = k.reshape(*k.shape, *(1,) * (self.ndim - 2 if isinstance(n, slice) else start.ndim - k.ndim))
        between = (1 - k) * start + k * end
        return between.astype(self.dtype).reshape(*np.shape(rows), *between.shape[1:])


def interpolate_marginals(m: Marginals, *, data: Rows | None = None) -> Marginals:
    """Return all marginals of a set that stores the ends of its trajectories only, as straight lines between them.

    ``x_n = (1 - k_n) x_0 + k_n x_N``, ``k_n`` the elapsed fraction of time at step ``n``: exact at both ends. Nothing
    is copied; examples are mixed when they are read. ``straightness_defect`` measures the error.

    Args:
        m: a set with both ends of the grid, or with its start beside ``data``.
        data: the data ``[M, ...]`` that a backward set was built from, in place of a stored end.

    Returns:
        A set of all steps of the grid, with the same conditions.

    Raises:
        ValueError: a missing end, or data that the set was not built from.

    >>> from fmjax.storage.shards import Manifest
    >>> manifest = Manifest(1, "forward", "a", "rk4", None, (0.0, 0.5, 1.0), (0, 2), "float32", (1,), 1, 0, None, 1)
    >>> ends = Marginals(np.array([[[0.0], [4.0]]]), np.array([0.0, 1.0]), manifest)
    >>> interpolate_marginals(ends).x[0].tolist()
    [[0.0], [2.0], [4.0]]
    """
    last, steps = len(m.manifest.ts) - 1, m.manifest.steps
    if steps[0] != 0 or (steps[-1] != last) == (data is None):
        raise ValueError(
            f"steps={steps}, data={'None' if data is None else 'given'}: an end is missing or given twice. Give a set "
            f"with steps 0 and {last}, or one with step 0 and data=."
        )
    if data is not None and (m.manifest.direction, m.manifest.data) != ("backward", checkpoint.digest_rows(data)):
        raise ValueError(f"data={tuple(data.shape)}: the set was built from other data. Give the data of the set.")
    ts = np.asarray(m.manifest.ts, np.float32)
    manifest = m.manifest._replace(steps=tuple(range(last + 1)))
    return Marginals(Between(m.x, data, elapsed_fractions(ts)), ts, manifest, m.cond)
