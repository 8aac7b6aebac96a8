"""Consistency models in discrete time: two neighbours on a trajectory have one end."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods.alpha_flow import alpha_flow
from fmjax.types import Method, Net, expand

DISTANCES = ("pseudo_huber", "squared")
WEIGHTS = ("gap", "none")


def consistency(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=times.noise_level,
    diagonal: float = 0.0,
    teacher: Net | None = None,
    velocity: str = "chord",
    solver: str = "euler",
    share=times.ect_fraction,
    distance: str = "pseudo_huber",
    scale: float = 5.4e-4,
    weight: str = "gap",
    bootstrap: str = "params",
) -> Method:
    """``dist(X_{s,1}(x_s), sg X_{m,1}(x_m))``, ``s < m`` neighbours: the map to the data (arXiv 2303.01469).

    It is ``alpha_flow`` with ``t = 1``, ``s ~ time`` and ``m`` from ``share``, and ``cost`` for the cost.

    ===============================  ===========================================================================
    method                           arguments
    ===============================  ===========================================================================
    ECT (2406.14548)                 the defaults, from a flow: at the start ``X_{s,1}`` is one Euler step of it
    training (CT)                    ``share=times.level_fraction, distance="squared", weight="none"``, and with a
                                     moving average as the target ``bootstrap="target"``
    improved training (2310.14189)   ``share=times.level_fraction``
    distillation (CD)                as CT with ``velocity="own", solver="heun"``, ``target`` frozen
    ===============================  ===========================================================================

    ``x_m`` is the interpolant of the same pair (``"chord"``) or one step of a solver along the teacher's velocity,
    ``teacher(target, x, s, s, cond)``. ``X_{s,t}`` is trained for ``t = 1`` only, the velocity on the share
    ``diagonal`` of the batch (``|u(I_t, t, t) - dI_t|^2``, ``t ~ time``): without one, sample in a jump, or in several
    with noise between them. Noise levels are those of the linear path,
    ``sigma = (1 - s) / s``. Dropout acts on the diagonal only. ``aux`` as that of ``alpha_flow``. Raises ``ValueError``
    as ``alpha_flow`` and ``cost`` do.
    """
    return alpha_flow(
        net, path=path, time=time, pair=functools.partial(times.to_data, time=time), diagonal=diagonal, teacher=teacher,
        velocity=velocity, solver=solver, share=share, bootstrap=bootstrap,
        cost=cost(distance=distance, scale=scale, weight=weight),
    )  # fmt: skip


def cost(*, distance: str = "pseudo_huber", scale: float = 5.4e-4, weight: str = "gap") -> Callable[..., Array]:
    """The cost ``(d, s, t, a) -> [B]`` of ``X_{s,t} - X_{m,t} = (t - s) d``, ``m = s + a (t - s)``.

    Its mean square ``q`` (``"squared"``) or ``sqrt(q + scale^2) - scale`` (``"pseudo_huber"``; sums over the ``n``
    dimensions, as papers write it, have the scale ``sqrt(n) scale``), times ``1 / (sigma - sigma')`` of the noise
    levels ``sigma = (1 - s) / s`` with ``weight="gap"``. Raises ``ValueError`` for unknown choices and ``scale <= 0``.
    """
    checks.check_choice("distance", distance, DISTANCES)
    checks.check_choice("weight", weight, WEIGHTS)
    if not scale > 0:
        raise ValueError(f"scale={scale} must be positive: at zero the distance has no gradient")

    def of(d, s, t, a):
        apart = expand(t - s, d) * d
        q = c.mse(apart, jnp.zeros_like(apart))
        if distance == "pseudo_huber":
            q = c.pseudo_huber(q, scale)
        gap = a * (t - s)  # sigma - sigma' = (m - s) / (s m)
        return q * s * (s + gap) / jnp.maximum(gap, 1e-12) if weight == "gap" else q

    return of
