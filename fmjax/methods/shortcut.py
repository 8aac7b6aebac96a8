"""Shortcut models: progressive flow maps on dyadic jumps."""

from __future__ import annotations

from collections.abc import Callable

from fmjax import paths, times
from fmjax.methods.progressive import progressive
from fmjax.types import FlowMapMethod, Net


def shortcut(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
    pair: Callable = times.dyadic,
    diagonal: float = 7 / 8,
    teacher: Net | None = None,
) -> FlowMapMethod:
    """Train a shortcut model, ``u(x, s, s + 2d) = (u(x, s, s + d) + u(X_{s,s+d}(x), s + d, s + 2d)) / 2``.

    The jumps ``2d = 2^-k``, ``k = 0 .. 6`` equally often, start at multiples of ``2^-k`` (arXiv 2410.12557):
    ``progressive`` with two equal sub-steps on the pairs of ``times.dyadic``, and seven eighths of the batch on the
    diagonal. It departs from the paper: the shortest jump of the recursion, 1/128, is never trained, and the diagonal
    ``s = t`` is trained in its place.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``.
        pair: distribution of ``(s, t)`` off the diagonal.
        diagonal: fraction of the batch with the flow-matching loss ``|u(I_t, t, t) - dI_t|^2``.
        teacher: network of the two halves, at the parameters ``target``; ``net`` by default. In the paper ``target`` is
            the moving average of the parameters, of decay 0.999.

    Returns:
        A method with ``velocity`` and ``flow_map``; ``aux`` as in ``progressive``.

    Raises:
        ValueError: as ``progressive``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.shortcut(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    return progressive(net, path=path, time=time, pair=pair, diagonal=diagonal, teacher=teacher)
