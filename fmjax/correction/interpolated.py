"""Marginals between their two ends: only the backward image of the data at the start of the grid is stored."""

from __future__ import annotations

import numpy as np

from fmjax.correction.marginals import Marginals
from fmjax.correction.trajectories import fractions
from fmjax.data.dataset import Rows
from fmjax.storage import checkpoint


class Between:
    """``(1 - k_n) x_0 + k_n x_N`` as if it were an array ``[M, N + 1, ...]``, computed where ``x[rows, n]`` asks."""

    def __init__(self, x: Rows, data: Rows | None, k: np.ndarray):
        self.x, self.data, self.k = x, data, k
        self.shape, self.dtype = (len(x), len(k), *x.shape[2:]), np.dtype(np.float32)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at) -> np.ndarray:
        rows, n = at if isinstance(at, tuple) else (at, slice(None))
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        some = np.atleast_1d(rows)
        stored = self.x[some]
        start, end = stored[:, 0], stored[:, -1] if self.data is None else self.data[some]
        k = self.k[n]
        if isinstance(n, slice):
            start, end = start[:, None], end[:, None]
        k = k.reshape(*k.shape, *(1,) * (self.ndim - 2 if isinstance(n, slice) else start.ndim - k.ndim))
        between = (1 - k) * start + k * end
        return between.astype(self.dtype).reshape(*np.shape(rows), *between.shape[1:])


def marginals(m: Marginals, *, data: Rows | None = None) -> Marginals:
    """All marginals ``x_n = (1 - k_n) x_0 + k_n x_N`` of a set that stores its ends, or its start beside its ``data``.

    ``k_n`` is the fraction of time passed at step ``n``. Exact at both ends; nothing is copied, examples are mixed when
    they are asked for. How far they are from the flow's own, ``marginals.straightness_defect`` tells. Raises
    ``ValueError`` where an end is missing, or for data that the set was not built from.
    """
    last, steps = len(m.manifest.ts) - 1, m.manifest.steps
    if steps[0] != 0 or (steps[-1] != last) == (data is None):
        raise ValueError(
            f"marginals are interpolated from steps 0 and {last}, or from step 0 and data=; the set stores {steps}"
            f"{'' if data is None else ', and data were given'}"
        )
    if data is not None and checkpoint.digest_rows(data) != m.manifest.data:
        raise ValueError(f"the data [{len(data)}, ...] are not those that the set was built from; give those")
    ts = np.asarray(m.manifest.ts, np.float32)
    return Marginals(Between(m.x, data, fractions(ts)), ts, m.manifest._replace(steps=tuple(range(last + 1))))
