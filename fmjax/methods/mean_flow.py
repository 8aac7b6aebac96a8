"""Mean flow: the average velocity from the conditional one, no teacher, guidance inside the target."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp

from fmjax import paths, times
from fmjax.methods import weighting
from fmjax.methods.eulerian import eulerian
from fmjax.types import Cond, Method, Net, expand, is_null, with_null

LAW = functools.partial(times.logit_normal, mean=0.4)


def mean_flow(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=functools.partial(times.earlier, time=LAW),
    pair=functools.partial(times.ordered_pair, time=LAW),
    diagonal: float = 0.75,
    anneal: float = 0.0,
    power: float = 1.0,
    floor: float = 1e-2,
    guidance: float = 1.0,
    mix: float = 0.0,
    null: Cond = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Method:
    """``u(I_s, s, t) = sg[v_g + (t - s) (d/ds + v_g . grad) u]`` in the mean (arXiv 2505.13447, Algorithm 1).

    ``v_g = dI_s`` without guidance: then this is ``eulerian(velocity="conditional", tangent="conditional")``, weighted
    by ``weighting.adaptive(power=power, floor=floor)``. ``time`` is the law on the share ``diagonal``, ``pair`` that
    of the rest, by default as on ImageNet: two logit-normal draws in order, on the diagonal the smaller of them.

    With guidance (section 4.2 and appendix B.1 there) the net learns the flow of

    ``v_g = guidance dI_s + (1 - guidance - mix) v(x, s, null) + mix v(x, s, cond)``, ``low <= s <= high``,

    ``v(x, s, c) = u(x, s, s, c)`` of ``target``: classifier-free guidance of the scale ``guidance / (1 - mix)`` in one
    evaluation a step. Rows whose label is ``null``, and times outside the interval, have ``v_g = dI_s``;
    ``guidance.label_dropout`` makes such rows, on and off the diagonal (the published code makes them on it alone). Do
    not guide the result again. Published pairs: (1, 0.5), (0.2, 0.92), (0.2, 0.92) with ``low`` 0, 0.2, 0.25.

    Raises ``ValueError`` for guidance that is not positive, ``mix`` outside [0, 1), an empty interval, guidance without
    ``null`` or a batch without labels; else as ``eulerian`` and ``weighting.adaptive``.
    """
    if not (0 < guidance < math.inf and 0 <= mix < 1):
        raise ValueError(f"mean_flow needs guidance > 0 and 0 <= mix < 1, got guidance={guidance} and mix={mix}")
    guide = None
    if guidance != 1 or mix:
        if null is None:
            raise ValueError(f"guidance={guidance} and mix={mix} need null, the label of a dropped condition")

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
    """``guide(target, batch, x, s, v)``, but ``v`` where the label is ``null`` or ``s`` outside ``[low, high]``.

    Raises ``ValueError`` for an empty interval, and, when called, for a batch without conditions.
    """
    if not low < high:
        raise ValueError(f"an interval of guided times needs low < high, got low={low}, high={high}")

    def velocity(target, batch, x, s, v):
        if batch.cond is None:
            raise ValueError("guidance needs labels: give the batch conditions (classes=... in a config)")
        here = (low <= s) & (s <= high) & ~is_null(batch.cond, null)
        return jnp.where(expand(here, x), guide(target, batch, x, s, v), v)

    return velocity
