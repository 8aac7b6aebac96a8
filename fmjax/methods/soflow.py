"""SoFlow: discrete Eulerian flow maps with a short first step."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.methods import weighting
from fmjax.methods.alpha_flow import difference
from fmjax.types import FlowMapMethod, Net

START = functools.partial(times.logit_normal, mean=-0.2, std=0.8)
STOP = functools.partial(times.logit_normal, mean=1.0, std=0.8)


def soflow(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = functools.partial(times.logit_normal, mean=0.2),
    pair: Callable = functools.partial(times.two_times, start=START, stop=STOP, least=1e-4),
    diagonal: float = 0.75,
    fraction: Callable = times.exponential_fraction,
    power: float | None = None,
    floor: float = 1e-2,
) -> FlowMapMethod:
    """Train a flow map by the quotient ``q = |X_{s,t}(I_s) - sg X_{m,t}(I_s + (m - s) dI_s)|^2 / (m - s)^2`` of SoFlow.

    This is the published loss (arXiv 2512.15657): the flow-matching error on three quarters of the batch, ``a q / 2``
    on the rest, ``a = (m - s) / (t - s)``, both with the weight ``(|.|^2 + 0.01)^-power`` of their error ``|.|^2``, a
    mean over elements. ``a`` falls from 0.1 to 0.002 during the training. The gradient is the gradient of the authors'
    code, which writes the second term as a product without a division, so that its value there is another. It departs
    from the code: examples of less than 64 elements have no weight (``weighting.exponent``; ``power=1`` for it), and
    there is no guidance.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``. Dropout acts on the diagonal.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``; by default the authors' for ImageNet.
        pair: distribution of ``(s, t)`` off the diagonal, likewise.
        diagonal: fraction of the batch with the flow-matching loss ``|u(I_t, t, t) - dI_t|^2``.
        fraction: schedule of ``a``, ``(s, t, progress) -> [B]``.
        power: exponent of the weight; 0 for no weight, ``None``: 1 from 64 elements on, else 0.
        floor: constant of the weight.

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
    weighting.check_adaptive(power, floor)
    weighted = lambda error, x: weighting.adapted(error, weighting.exponent(power, x), floor)

    def cost(d, s, t, a):
        return a / 2 * weighted(c.mse(d, jnp.zeros_like(d)) / a**2, d)

    return difference(
        net, path=path, time=time, pair=pair, diagonal=diagonal, fraction=fraction, cost=cost, matching_cost=weighted
    )
