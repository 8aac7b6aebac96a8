"""Shortcut models: progressive flow maps on dyadic jumps."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array

from fmjax import paths, times
from fmjax.methods.progressive import progressive
from fmjax.types import FlowMapMethod, Net

STEPS = 128  # of the finest grid


def fine_time(key: Array) -> Array:
    """Draw a time of the grid ``0, 1/128, .., 127/128``.

    Args:
        key: one key, or keys ``[B]``.

    Returns:
        Times of the shape of ``key``.
    """
    return times.grid_pair(key, steps=STEPS, rounds=1)[0]


def shortcut(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = fine_time,
    pair: Callable = times.dyadic,
    diagonal: float = 7 / 8,
    teacher: Net | None = None,
) -> FlowMapMethod:
    """Train a shortcut model, ``u(x, s, s + 2d) = (u(x, s, s + d) + u(X_{s,s+d}(x), s + d, s + 2d)) / 2``.

    This is the published loss (arXiv 2410.12557): on seven eighths of the batch flow matching of the shortest jump,
    ``u(x, t, t + 1/128)``, at multiples of 1/128; on the rest jumps ``2d = 2^-k``, ``k = 0 .. 6`` equally often, that
    start at multiples of ``2^-k``. Errors are means over elements, as in the authors' code. It departs from the code,
    which clips states and targets to [-4, 4] and has ``1 - (1 - 1e-5) t`` for ``1 - t``: neither is done here. The
    velocity is the shortest jump; a jump between other times than these is not trained. It is ``progressive`` with two
    equal sub-steps, ``times.dyadic`` and ``finest=1/128``.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``.
        path: interpolant ``I_t``.
        time: distribution of the starts of the shortest jumps, ``key: [B] -> [B]``.
        pair: distribution of ``(s, t)`` of the other jumps.
        diagonal: fraction of the batch with the flow-matching loss ``|u(I_t, t, t + 1/128) - dI_t|^2``.
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
    return progressive(net, path=path, time=time, pair=pair, diagonal=diagonal, teacher=teacher, finest=1 / STEPS)
