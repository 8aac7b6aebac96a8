"""Lagrangian flow maps: a map that solves the ODE of a velocity."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.types import FlowMapMethod, Net, expand

STOPS = ("velocity", "tangent", "none")


def lagrangian(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
    pair: Callable = times.ordered_pair,
    diagonal: float = 0.75,
    teacher: Net | None = None,
    stop: str = "velocity",
    anneal: float = 0.0,
) -> FlowMapMethod:
    """Train a flow map to solve the ODE of a velocity, ``d/dt X_{s,t}(x) = v(X_{s,t}(x), t)``.

    A fraction ``diagonal`` of the batch has the flow-matching loss ``|u(I_t, t, t) - dI_t|^2``, the rest
    ``|d/dt X_{s,t}(I_s) - sg[v(sg X_{s,t}(I_s), t)]|^2``, with ``v(x, t) = u(x, t, t)`` at the parameters ``target``
    (arXiv 2505.18825, eq. 12 and Algorithm 1): the defaults are self-distillation as published, and the errors means
    over elements, where the authors sum (a clip of the gradient sees it), without their learned weight
    (``weighting.learned`` adds it). Lagrangian distillation as published (2406.07507) takes the gradient through the
    input of ``v`` too: ``stop="none"``.

    ================================  ==========================================================================
    method                            arguments
    ================================  ==========================================================================
    self-distillation (LSD)           the defaults; ``target`` is the parameters themselves
    distillation (LMD, 2406.07507)    ``diagonal=0, stop="none"``, ``target`` frozen: ``v`` comes from ``teacher``
    AYF-LMD (2506.14603)              ``diagonal=0, stop="tangent"``, ``target`` frozen
    physics-informed (PID)            as LMD, ``pair=times.from_source``
    ================================  ==========================================================================

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``. Dropout acts on the diagonal.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``.
        pair: distribution of ``(s, t)`` off the diagonal.
        diagonal: fraction of the batch on the diagonal; times the batch per device it must be whole.
        teacher: network of ``v``, evaluated as ``teacher(target, x, t, t, cond)``; ``net`` by default.
        stop: what has no gradient. ``"velocity"``: ``v`` and its input. ``"tangent"``: also ``d/dt u``, which is
            cheaper and gives another gradient (``residual * grad u``). ``"none"``: nothing; the gradient passes through
            the input of ``v``.
        anneal: fraction of the training during which ``|t - s| <= progress / anneal``; 0 for no bound.

    Returns:
        A method with ``velocity`` and ``flow_map``. ``aux`` has ``s``, ``t`` and the masks of the two terms.

    Raises:
        ValueError: an unknown ``stop``, a fraction outside [0, 1], or (in the loss) a batch that cannot be split.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import methods
    >>> from fmjax.types import Batch
    >>> method = methods.lagrangian(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> loss, aux = jax.jit(method.loss)(2.0, 2.0, Batch(jnp.ones((4, 2))), jax.random.key(0))
    >>> aux["is_on_diagonal"].sum(), method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 1.0)  # x + (1 - 0) u(x, 0, 1)
    (Array(3, dtype=int32), Array([[3., 3.]], dtype=float32))
    """
    teacher = teacher or net
    c.check_times(path, time)
    checks.check_choice("stop", stop, STOPS)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)

    def following(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        x, _ = c.interpolant(path, k_x, batch, s)
        gap = expand(t - s, x)
        u, du = jax.jvp(lambda t: views.for_jvp(net)(params, x, s, t, batch.cond), (t,), (jnp.ones_like(t),))
        y, dy = x + gap * u, u + gap * (jax.lax.stop_gradient(du) if stop == "tangent" else du)
        v = teacher(target, y if stop == "none" else jax.lax.stop_gradient(y), t, t, batch.cond)
        return c.Term(s, t, c.mse(dy, v if stop == "none" else jax.lax.stop_gradient(v)))

    return views.two_time(net, c.two_terms(c.matching(net, path, time), following, diagonal))
