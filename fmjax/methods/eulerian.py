"""Eulerian flow maps: a map that is constant along the trajectories that lead into it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net, expand

STOPS = ("all", "jacobian", "velocity")
VELOCITIES = ("own", "conditional")


def eulerian(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=times.uniform,
    pair=times.ordered_pair,
    diagonal: float = 0.75,
    teacher: Net | None = None,
    velocity: str = "own",
    tangent: str = "own",
    guide: Callable | None = None,
    stop: str = "all",
    anneal: float = 0.0,
    warmup: float = 0.0,
    limit: float = 1.0,
    normalise: float = 0.0,
) -> Method:
    """``d/ds X_{s,t}(x) + v(x, s) . grad X_{s,t}(x) = 0``, that is ``u = v + (t - s) (d/ds + v . grad) u``.

    On a share ``diagonal`` of the batch ``|u(I_t, t, t) - dI_t|^2``, on the rest ``|g|^2`` of the residual
    ``g = u - v - r (t - s) du``, ``du = (d/ds + w . grad) u(I_s, s, t)`` by one jvp, ``r = 1``
    (arXiv 2505.18825, Algorithm 2). The velocity ``v`` that is regressed on and the direction ``w`` of the derivative
    are ``sg[u(I_s, s, s)]`` of the parameters ``target`` (``"own"``) or ``dI_s`` (``"conditional"``):

    ================================  ==========================================================================
    method                            arguments
    ================================  ==========================================================================
    self-distillation (ESD)           ``stop="jacobian"`` as published
    distillation (EMD, 2406.07507)    ``diagonal=0, stop="velocity"``, ``target`` frozen: ``v`` of ``teacher``
    mean flow (2505.13447)            ``velocity="conditional", tangent="conditional"`` (``mean_flow``)
    improved mean flow (2512.02012)   ``velocity="conditional"`` (``improved_mean_flow``)
    AYF-EMD (2506.14603)              ``diagonal=0, normalise=0.1, warmup, limit=0.99`` (``align_your_flow``)
    consistency, continuous time      ``diagonal=0, pair=times.to_data, tangent="conditional"``, ...
    ================================  ==========================================================================

    ``stop`` says what has no gradient beside ``v``: ``"all"`` of ``du`` (the gradient is ``g`` times that of ``u``, no
    backward pass through a jvp), ``"jacobian"`` the part ``w . grad u`` of it (through the spatial Jacobian it is
    unstable on images), ``"velocity"`` nothing more (ESD ``convex``). Both of the latter cost a backward pass through
    a jvp. Only ``"velocity"`` descends a loss: a small error ``exp(i (k s + q x))`` of the map shrinks under it at the
    rate ``(k + q v)^2``, under ``"jacobian"`` at ``k (k + q v)``, which is growth between ``k = 0`` and ``k = -q v``:
    networks that resolve fine detail in space diverge so.

    ``guide(target, batch, x, t, dI_t)``, where given, is what stands for ``dI_t`` on and off the diagonal, without a
    gradient: a guided velocity. ``teacher(target, x, s, s, cond)`` is the net that the own velocity comes from, by
    default ``net``. ``r`` grows to ``limit`` over the share ``warmup`` of the training, ``min(limit, progress /
    warmup)``; ``normalise = c`` makes ``g / (|g| + c)`` of it (with ``stop="all"``); ``anneal`` as in ``lagrangian``.
    Dropout acts on the diagonal only.
    ``aux``: ``s``, ``t``, ``residual`` (the mean of ``g^2``), and which term an example has. Raises ``ValueError`` for
    unknown choices, shares that are none, or not whole in the batch.
    """
    path, teacher = path or paths.linear(), teacher or net
    c.check_times(path, time)
    for what, value, known in (
        ("velocity", velocity, VELOCITIES),
        ("tangent", tangent, VELOCITIES),
        ("stop", stop, STOPS),
    ):
        checks.check_choice(what, value, known)
    checks.check_fraction(diagonal=diagonal, anneal=anneal, warmup=warmup, limit=limit)
    if normalise < 0 or (normalise and stop != "all"):
        raise ValueError(f"normalise={normalise} must be positive, and needs stop='all', got stop={stop!r}")

    def conserving(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        x, conditional = c.interpolant(path, k_x, batch, s)
        if "conditional" in (velocity, tangent):
            conditional = c.guided(guide, target, batch, x, s, conditional)
        own = None
        if "own" in (velocity, tangent):
            own = jax.lax.stop_gradient(teacher(target, x, s, s, batch.cond))
        v, w = (own if choice == "own" else conditional for choice in (velocity, tangent))
        u_at = lambda x, s: c.with_jvp(net)(params, x, s, t, batch.cond)
        if stop == "jacobian":  # ``u`` and its rate share a backward pass; XLA merges the primals of an unrolled net
            u, in_time = jax.jvp(lambda s: u_at(x, s), (s,), (jnp.ones_like(s),))
            _, in_space = jax.jvp(lambda x: u_at(x, s), (x,), (w,))
            du = jax.lax.stop_gradient(in_space) + in_time
        else:
            u, du = jax.jvp(u_at, (x, s), (w, jnp.ones_like(s)))
        g = u - v - expand(c.warmed(batch, warmup, limit) * (t - s), x) * du
        if stop == "all":
            return c.Term(s, t, *c.semigradient(u, g, normalise))
        return c.Term(s, t, c.mse(g, jnp.zeros_like(g)))

    return c.two_time(net, c.two_terms(c.matching(net, path, time, guide), conserving, diagonal))
