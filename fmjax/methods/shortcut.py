"""Shortcut models: progressive flow maps on dyadic jumps."""

from __future__ import annotations

from fmjax import paths, times
from fmjax.methods.progressive import progressive
from fmjax.types import Method, Net


def shortcut(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=times.uniform,
    pair=times.dyadic,
    diagonal: float = 7 / 8,
    teacher: Net | None = None,
) -> Method:
    """``u(x, s, s + 2d) = (u(x, s, s + d) + u(X_{s,s+d}(x), s + d, s + 2d)) / 2`` for ``2d = 2^-k`` (arXiv 2410.12557).

    It is ``progressive`` with two equal sub-steps, pairs of ``times.dyadic`` (``k = 0 .. 6`` in equal shares, ``s`` a
    multiple of ``2^-k``) and seven eighths of the batch on the diagonal, ``|u(I_t, t, t) - dI_t|^2``; the paper takes
    the shortest jump for the diagonal. ``target`` is the moving average of the parameters (0.999 there). Raises as
    ``progressive`` does.
    """
    return progressive(net, path=path, time=time, pair=pair, diagonal=diagonal, teacher=teacher)
