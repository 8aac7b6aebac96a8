"""Mean flow: the average velocity from the conditional one, no teacher, guidance inside the target."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp

from fmjax import paths, times
from fmjax.methods import weighting
from fmjax.methods.eulerian import eulerian
from fmjax.types import Cond, FlowMapMethod, Net, expand, is_null, with_null

LOGIT_NORMAL = functools.partial(times.logit_normal, mean=0.4)


def mean_flow(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = functools.partial(times.earlier, time=LOGIT_NORMAL),
    pair: Callable = functools.partial(times.ordered_pair, time=LOGIT_NORMAL),
    diagonal: float = 0.75,
    anneal: float = 0.0,
    power: float | None = None,
    floor: float = 1e-2,
    guidance: float = 1.0,
    mix: float = 0.0,
    null: Cond = None,
    low: float = 0.0,
    high: float = 1.0,
) -> FlowMapMethod:
    """Train an average velocity by mean flow, ``u(I_s, s, t) = sg[v_g + (t - s) (d/ds + v_g . grad) u]`` in the mean.

    This is the published loss (arXiv 2505.13447, Algorithm 1) for examples of 64 elements and more. It departs from the
    paper below: the adaptive weight, which there learns another velocity (relative error 0.68 on a mixture of four in
    the plane, 0.09 without it), is left out (``weighting.exponent``); give ``power=1`` for it. Without guidance
    ``v_g = dI_s``: ``eulerian(velocity="conditional", tangent="conditional")`` under ``weighting.adaptive``.

    With guidance (section 4.2 and appendix B.1 of the paper) the network learns the flow of

    ``v_g = guidance dI_s + (1 - guidance - mix) v(x, s, null) + mix v(x, s, cond)`` where ``low <= s <= high``,

    with ``v(x, s, c) = u(x, s, s, c)`` at the parameters ``target``: classifier-free guidance of the scale
    ``guidance / (1 - mix)`` with one evaluation per step. Rows whose label is ``null``, and times outside the interval,
    have ``v_g = dI_s``; ``sampling.label_dropout`` makes such rows, on and off the diagonal (the published code makes
    them on the diagonal only). Do not guide the result again. Published values of ``guidance`` and ``mix`` are (1,
    0.5), (0.2, 0.92) and (0.2, 0.92), with ``low`` 0, 0.2 and 0.25.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``. Dropout acts on the diagonal.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``; by default the smaller of two logit-normal
            draws, as on ImageNet.
        pair: distribution of ``(s, t)`` off the diagonal; by default two logit-normal draws in order.
        diagonal: fraction of the batch on the diagonal; times the batch per device it must be whole.
        anneal: fraction of the training during which ``|t - s| <= progress / anneal``; 0 for no bound.
        power: power of the adaptive weight; 0 for no weight, ``None``: 1 from 64 elements on, else 0.
        floor: constant of the adaptive weight.
        guidance: weight of ``dI_s`` in ``v_g``; 1 with ``mix=0`` is no guidance.
        mix: weight of the network's conditional velocity in ``v_g``.
        null: label of a dropped condition.
        low: least guided time.
        high: greatest guided time.

    Returns:
        A method with ``velocity`` and ``flow_map``; ``aux`` as in ``eulerian``, with ``residual``, the unweighted
        error.

    Raises:
        ValueError: ``guidance <= 0``, ``mix`` outside [0, 1), an empty interval, guidance without ``null``, or (in the
            loss) guidance without labels; else as ``eulerian`` and ``weighting.adaptive``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.mean_flow(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 1.0)
    Array([[3., 3.]], dtype=float32)
    """
    if not 0 < guidance < math.inf:
        raise ValueError(f"guidance={guidance}: not positive and finite. Give 1 for no guidance.")
    if not 0 <= mix < 1:
        raise ValueError(f"mix={mix}: out of range. Give a number in [0, 1).")
    guide = None
    if guidance != 1 or mix:
        if null is None:
            raise ValueError(f"guidance={guidance} and mix={mix}: need the label of a dropped condition. Give null.")

        def towards(target, batch, x, s, v):
            away = net(target, x, s, s, with_null(batch.cond, null))
            own = net(target, x, s, s, batch.cond) if mix else 0
            return guidance * v + (1 - guidance - mix) * away + mix * own

        guide = where_guided(towards, null, low, high)
    method = eulerian(
        net, path=path, time=time, pair=pair, diagonal=diagonal, anneal=anneal,
        velocity="conditional", tangent="conditional", guide=guide,
    )  # fmt: skip
    return weighting.adaptive(method, power=power, floor=floor)


def where_guided(guide: Callable, null: Cond, low: float = 0.0, high: float = 1.0) -> Callable:
    """Restrict a guide to labelled rows and to an interval of times.

    Args:
        guide: ``guide(target, batch, x, s, v) -> [B, ...]``.
        null: label of a dropped condition.
        low: least guided time.
        high: greatest guided time.

    Returns:
        The guide that gives ``v`` where the label is ``null`` or ``s`` lies outside ``[low, high]``. It raises
        ``ValueError`` for a batch without conditions.

    Raises:
        ValueError: an empty interval.
    """
    if not low < high:
        raise ValueError(f"low={low}, high={high}: an empty interval of guided times. Give low < high.")

    def velocity(target, batch, x, s, v):
        if batch.cond is None:
            raise ValueError(
                "batch.cond=None: guidance needs labels. Give the batch conditions (classes=... in a config)."
            )
        within = (low <= s) & (s <= high) & ~is_null(batch.cond, null)
        return jnp.where(expand(within, x), guide(target, batch, x, s, v), v)

    return velocity
