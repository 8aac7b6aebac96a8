"""Lagrangian flow maps: a map that solves the ODE of a velocity, its own diagonal's or a teacher's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net, expand

STOPS = ("velocity", "tangent", "none")


def lagrangian(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=times.uniform,
    pair=times.ordered_pair,
    diagonal: float = 0.75,
    teacher: Net | None = None,
    stop: str = "velocity",
    anneal: float = 0.0,
) -> Method:
    """``d/dt X_{s,t}(x) = v(X_{s,t}(x), t)``, with ``v(x, t) = u(x, t, t)`` of the parameters ``target``.

    On a share ``diagonal`` of the batch ``|u(I_t, t, t) - dI_t|^2``, on the rest
    ``|d/dt X_{s,t}(I_s) - sg[v(sg X_{s,t}(I_s), t)]|^2`` (arXiv 2505.18825, eq. 12 and Algorithm 1).

    ================================  ==========================================================================
    method                            arguments
    ================================  ==========================================================================
    self-distillation (LSD)           the defaults, ``target`` the parameters themselves
    distillation (LMD, 2406.07507)    ``diagonal=0``, ``target`` frozen: ``v`` is the velocity of ``teacher``
    AYF-LMD (2506.14603)              ``diagonal=0, stop="tangent"``, ``target`` frozen
    physics-informed (PID)            as LMD, ``pair=times.from_source``
    ================================  ==========================================================================

    ``teacher(target, x, t, t, cond)`` is the net ``v`` comes from, by default ``net`` itself. ``stop`` says what has
    no gradient: ``"velocity"`` only ``v``, whose input is stopped too; ``"tangent"`` also ``d/dt u``, a cheaper
    gradient of another kind (``residual * grad u``); ``"none"`` takes the gradient through ``v``'s input. While the
    share ``anneal`` of the training lasts, ``t - s`` is bounded by ``progress / anneal``. Dropout acts on the diagonal
    only. ``aux``: ``s``, ``t``, ``residual``, and which term an example has. Raises ``ValueError`` for an unknown
    ``stop`` and shares that are none, or not whole in the batch.
    """
    path, teacher = path or paths.linear(), teacher or net
    c.check_times(path, time)
    checks.check_choice("stop", stop, STOPS)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)

    def following(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        x, _ = c.interpolant(path, k_x, batch, s)
        gap = expand(t - s, x)
        u, du = jax.jvp(lambda t: c.with_jvp(net)(params, x, s, t, batch.cond), (t,), (jnp.ones_like(t),))
        y, dy = x + gap * u, u + gap * (jax.lax.stop_gradient(du) if stop == "tangent" else du)
        v = teacher(target, y if stop == "none" else jax.lax.stop_gradient(y), t, t, batch.cond)
        return c.Term(s, t, c.mse(dy, v if stop == "none" else jax.lax.stop_gradient(v)))

    return c.two_time(net, c.two_terms(c.matching(net, path, time), following, diagonal))
