"""Consistency models in discrete time: two neighbours on a trajectory have one end."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods.alpha_flow import difference
from fmjax.types import FlowMapMethod, Net, expand

DISTANCES = ("pseudo_huber", "squared")
WEIGHTS = ("gap", "none")


def consistency(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = times.noise_level,
    diagonal: float = 0.0,
    teacher: Net | None = None,
    velocity: str = "chord",
    solver: str = "euler",
    fraction: Callable = times.ect_fraction,
    distance: str = "pseudo_huber",
    scale: float = 0.0,
    weight: str = "gap",
    bootstrap: str = "params",
) -> FlowMapMethod:
    """Train a consistency model, ``dist(X_{s,1}(x_s), sg X_{m,1}(x_m))`` for neighbours ``s < m`` (arXiv 2303.01469).

    The defaults are easy consistency tuning (ECT, arXiv 2406.14548): the norm of the difference, divided by the gap of
    the noise levels. It departs from the authors' code: the norm is a root mean square, so the loss is smaller by the
    square root of the number of elements, and the network is no preconditioned denoiser (``nets.preconditioning``
    makes one). Under a norm large errors count less: in low dimension the map leans to a median of the data. The map
    is trained for ``t = 1`` only, and the velocity only on the fraction ``diagonal`` of the batch. Where
    ``diagonal=0``, sample in one jump, or in several jumps with noise between them.

    It is ``alpha_flow`` with ``t = 1``, ``s ~ time``, ``m`` from ``fraction`` and ``consistency_cost``.

    ===============================  ===========================================================================
    method                           arguments
    ===============================  ===========================================================================
    ECT (2406.14548)                 the defaults, initialised with a flow: ``X_{s,1}`` is then its Euler step
    training (CT)                    ``fraction=times.level_fraction, distance="squared", weight="none"``; with a
                                     moving average as ``target`` also ``bootstrap="target"``
    improved training (2310.14189)   ``fraction=times.level_fraction, scale=5.4e-4``
    distillation (CD)                as CT with ``velocity="own", solver="heun"``, ``target`` frozen
    ===============================  ===========================================================================

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``. Dropout acts on the diagonal.
        path: interpolant ``I_t``. Noise levels are ``sigma = (1 - s) / s``, the levels of the linear path.
        time: distribution of ``s``, and of ``t`` on the diagonal, ``key: [B] -> [B]``.
        diagonal: fraction of the batch with the flow-matching loss ``|u(I_t, t, t) - dI_t|^2``.
        teacher: network of the own velocity, evaluated as ``teacher(target, x, s, s, cond)``; ``net`` by default.
        velocity: how ``x_m`` is made. ``"chord"``: the interpolant of the same pair. ``"own"``: one solver step along
            the velocity of the teacher. ``"conditional"``: one step along ``dI_s``.
        solver: solver of the own velocity, ``"euler"``, ``"heun"`` or ``"jump"``.
        fraction: schedule of ``(m - s) / (1 - s)``, ``(s, t, progress) -> [B]``.
        distance: ``"pseudo_huber"`` or ``"squared"``.
        scale: scale of the pseudo-Huber distance, per element; 0 for the norm.
        weight: ``"gap"``: ``1 / (sigma - sigma')`` of the two noise levels. ``"none"``.
        bootstrap: parameters of ``X_{m,1}``, ``"params"`` or ``"target"``.

    Returns:
        A method with ``velocity`` and ``flow_map``; ``aux`` as in ``alpha_flow``.

    Raises:
        ValueError: as ``alpha_flow`` and ``consistency_cost``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.consistency(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.5, 1.0)
    Array([[2., 2.]], dtype=float32)
    """
    return difference(
        net, path=path, time=time, pair=functools.partial(times.to_data, time=time), diagonal=diagonal, teacher=teacher,
        velocity=velocity, solver=solver, fraction=fraction, bootstrap=bootstrap,
        cost=consistency_cost(distance=distance, scale=scale, weight=weight),
    )  # fmt: skip


def consistency_cost(
    *, distance: str = "pseudo_huber", scale: float = 0.0, weight: str = "gap"
) -> Callable[..., Array]:
    """Return the cost of ``X_{s,t} - X_{m,t} = (t - s) d``, ``m = s + a (t - s)``, for ``alpha_flow``.

    Args:
        distance: ``"squared"``: the mean square ``q``. ``"pseudo_huber"``: ``sqrt(q + scale^2) - scale``. Papers write
            sums over the ``n`` elements of an example; their scale is ``sqrt(n) scale``.
        scale: scale of the pseudo-Huber distance; 0 for the norm.
        weight: ``"gap"``: times ``1 / (sigma - sigma')`` of the noise levels ``sigma = (1 - s) / s``. ``"none"``.

    Returns:
        ``cost(d, s, t, a) -> [B]``.

    Raises:
        ValueError: an unknown choice, or ``scale < 0``.
    """
    checks.check_choice("distance", distance, DISTANCES)
    checks.check_choice("weight", weight, WEIGHTS)
    if not scale >= 0:
        raise ValueError(f"scale={scale}: not the scale of a distance. Give 0 for the norm, or a positive number.")

    def cost(d, s, t, a):
        apart = expand(t - s, d) * d
        q = c.mse(apart, jnp.zeros_like(apart))
        if distance == "pseudo_huber":
            q = c.pseudo_huber(q, scale)
        gap = a * (t - s)  # sigma - sigma' = (m - s) / (s m)
        return q * s * (s + gap) / jnp.maximum(gap, 1e-12) if weight == "gap" else q

    return cost
