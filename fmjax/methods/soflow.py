"""SoFlow: discrete Eulerian flow maps with a short first step."""

from __future__ import annotations

from collections.abc import Callable

from fmjax import paths, times
from fmjax.methods.alpha_flow import alpha_flow
from fmjax.types import FlowMapMethod, Net


def soflow(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
    pair: Callable = times.ordered_pair,
    diagonal: float = 0.75,
    fraction: Callable = times.exponential_fraction,
) -> FlowMapMethod:
    """Train a flow map by ``|X_{s,t}(I_s) - sg X_{m,t}(I_s + (m - s) dI_s)|^2 / (m - s)^2`` (arXiv 2512.15657).

    It is ``alpha_flow`` with the weight ``a^-2``, where ``a = (m - s) / (t - s)`` falls from 0.1 to 0.002 during the
    training. It departs from the authors' code: the gradient off the diagonal is larger by ``1 / a`` (``alpha_flow``
    with ``power=1`` has theirs up to a constant), the adaptive weight is left out, and so are their times, a
    logit-normal ``time`` of mean 0.2 and std 1 with pairs of logit-normal starts (-0.2, 0.8) and ends (1, 0.8):
    ``times.two_times``.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``.
        pair: distribution of ``(s, t)`` off the diagonal.
        diagonal: fraction of the batch with the flow-matching loss ``|u(I_t, t, t) - dI_t|^2``.
        fraction: schedule of ``a``, ``(s, t, progress) -> [B]``.

    Returns:
        A method with ``velocity`` and ``flow_map``; ``aux`` as in ``alpha_flow``.

    Raises:
        ValueError: as ``alpha_flow``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.soflow(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    return alpha_flow(net, path=path, time=time, pair=pair, diagonal=diagonal, fraction=fraction, power=2.0)
