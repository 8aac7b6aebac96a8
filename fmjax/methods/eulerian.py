"""Eulerian flow maps: a map that is constant along the trajectories that lead into it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.types import FlowMapMethod, Net, expand

STOPS = ("all", "jacobian", "velocity")
VELOCITIES = ("own", "conditional")


def eulerian(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
    pair: Callable = times.ordered_pair,
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
) -> FlowMapMethod:
    """Train a flow map by ``d/ds X_{s,t}(x) + v(x, s) . grad X_{s,t}(x) = 0``, that is ``u = v + (t - s) du``.

    A fraction ``diagonal`` of the batch has the flow-matching loss ``|u(I_t, t, t) - dI_t|^2``, the rest ``|g|^2`` of
    the residual ``g = u - v - r (t - s) du``, where ``du = (d/ds + w . grad) u(I_s, s, t)`` is one jvp and ``r = 1``
    (arXiv 2505.18825, Algorithm 2). The velocity ``v`` of the regression and the direction ``w`` of the derivative are
    ``sg[u(I_s, s, s)]`` at the parameters ``target`` (``"own"``) or ``dI_s`` (``"conditional"``). By default no
    gradient passes through ``du``; the paper stops the spatial part only (``stop="jacobian"``). Errors are means over
    elements, where the authors sum.

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

    Only ``stop="velocity"`` descends a loss. A small error ``exp(i (k s + q x))`` of the map shrinks under it at the
    rate ``(k + q v)^2``; under ``"jacobian"`` the rate is ``k (k + q v)``, which is growth between ``k = 0`` and
    ``k = -q v``: networks that resolve fine detail in space diverge.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``. Dropout acts on the diagonal.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``.
        pair: distribution of ``(s, t)`` off the diagonal.
        diagonal: fraction of the batch on the diagonal; times the batch per device it must be whole.
        teacher: network of the own velocity, evaluated as ``teacher(target, x, s, s, cond)``; ``net`` by default.
        velocity: ``v``, ``"own"`` or ``"conditional"``.
        tangent: ``w``, ``"own"`` or ``"conditional"``.
        guide: ``guide(target, batch, x, t, dI_t)`` replaces ``dI_t`` on and off the diagonal, without a gradient: a
            guided velocity.
        stop: what has no gradient beside ``v``. ``"all"``: all of ``du``; the gradient is ``g`` times the gradient of
            ``u``, and no backward pass goes through a jvp. ``"jacobian"``: the part ``w . grad u`` of ``du``, whose
            gradient is unstable on images. ``"velocity"``: nothing more (``convex`` in ESD).
        anneal: fraction of the training during which ``|t - s| <= progress / anneal``; 0 for no bound.
        warmup: fraction of the training during which ``r = min(limit, progress / warmup)``; 0 for none.
        limit: value of ``r`` after the warm-up.
        normalise: ``c > 0`` replaces ``g`` by ``g / (|g| + c)``; it needs ``stop="all"``.

    Returns:
        A method with ``velocity`` and ``flow_map``. ``aux`` has ``s``, ``t``, the masks of the two terms and, with
        ``normalise``, ``residual``, the mean of ``g^2``.

    Raises:
        ValueError: an unknown choice, a fraction outside [0, 1], ``normalise`` that is negative or without
            ``stop="all"``, or (in the loss) a batch that cannot be split.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.eulerian(lambda params, x, s, t, cond=None, key=None: params * x, stop="jacobian")
    >>> method, method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 0.5)
    (FlowMapMethod(loss, velocity, flow_map), Array([[2., 2.]], dtype=float32))
    """
    teacher = teacher or net
    c.check_times(path, time)
    checks.check_choice("velocity", velocity, VELOCITIES)
    checks.check_choice("tangent", tangent, VELOCITIES)
    checks.check_choice("stop", stop, STOPS)
    checks.check_fraction(diagonal=diagonal, anneal=anneal, warmup=warmup, limit=limit)
    if normalise < 0:
        raise ValueError(f"normalise={normalise}: negative. Give a positive number, or 0 for none.")
    if normalise and stop != "all":
        raise ValueError(f"normalise={normalise}: not possible with stop={stop!r}. Use stop='all'.")

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
        u_at = lambda x, s: views.for_jvp(net)(params, x, s, t, batch.cond)
        if stop == "jacobian":  # ``u`` and its rate need one backward pass; XLA merges the primals of an unrolled net
            u, in_time = jax.jvp(lambda s: u_at(x, s), (s,), (jnp.ones_like(s),))
            _, in_space = jax.jvp(lambda x: u_at(x, s), (x,), (w,))
            du = jax.lax.stop_gradient(in_space) + in_time
        else:
            u, du = jax.jvp(u_at, (x, s), (w, jnp.ones_like(s)))
        g = u - v - expand(c.warmed(batch, warmup, limit) * (t - s), x) * du
        if stop == "all":
            return c.Term(s, t, *c.semigradient(u, g, normalise))
        return c.Term(s, t, c.mse(g, jnp.zeros_like(g)))

    return views.two_time(net, c.two_terms(c.matching(net, path, time, guide), conserving, diagonal))
