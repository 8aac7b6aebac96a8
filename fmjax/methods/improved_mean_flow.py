"""Improved mean flow: the net's own velocity as the direction of the derivative, guidance of every scale."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods import weighting
from fmjax.methods.eulerian import eulerian
from fmjax.methods.mean_flow import LAW, where_guided
from fmjax.types import Cond, Method, Net, expand


def improved_mean_flow(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=functools.partial(times.earlier, time=LAW),
    pair=functools.partial(times.ordered_pair, time=LAW),
    diagonal: float = 0.5,
    anneal: float = 0.0,
    power: float = 1.0,
    floor: float = 1e-2,
    head: bool = False,
    null: Cond = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Method:
    """``|V - v_g|^2`` with ``V = u(I_s, s, t) - (t - s) sg[(d/ds + w . grad) u]`` (arXiv 2512.02012).

    The direction ``w`` is the velocity of ``target`` at ``(I_s, s)``, of much less variance than ``dI_s``. It is the
    diagonal ``u(I_s, s, s)``: then this is ``eulerian(velocity="conditional")`` under ``weighting.adaptive(power=power,
    floor=floor)``. With ``head`` the net has ``2 C`` channels (``outputs=2``), ``u`` and a velocity ``v(x, s, t)``, and
    ``w = v(I_s, s, s)``; the loss is that weighted error plus the weighted ``|v(I_s, s, t) - v_g|^2``, of one
    evaluation. ``velocity`` and ``flow_map`` are those of ``u``. Times as in ``mean_flow``.

    ``v_g = dI_s``, or, where ``null`` is given, a guided velocity of the scale in the condition ``(labels, w)`` (of
    ``guidance.random_scale``, over a net that is told the scale, ``guided=True``):

    ``v_g = dI_s + (1 - 1/w) (v(I_s, s; labels, w) - v(I_s, s; null, 1))``, ``low <= s <= high``,

    whose fixed point is ``v_null + w (v_labels - v_null)``. Rows whose label is ``null`` (``guidance.label_dropout``)
    have ``v_g = dI_s``. One interval holds for all: the published net is told its ends, drawn at random. Sample with
    ``guidance.at_scale``. ``aux`` as in ``eulerian``.

    Raises ``ValueError`` for an empty interval, a scale without ``null`` and the reverse, a net without the two heads;
    else as ``eulerian`` and ``weighting.adaptive``.
    """
    path = path or paths.linear()
    c.check_times(path, time)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)

    def heads(params, x, s, t, cond=None, key=None, net=net):
        return c.two_heads("head=True", net(params, x, s, t, cond, key), x)

    first = (lambda *args: heads(*args)[0]) if head else net
    own = (lambda *args: heads(*args)[1]) if head else net

    def towards(target, batch, x, s, v):
        if not isinstance(batch.cond, tuple):
            raise ValueError("null is given and the condition has no scale: wrap the method in guidance.random_scale")
        goal, base = (own(target, x, s, s, cond) for cond in (batch.cond, c.unconditional(batch.cond, null)))
        return v + expand(1 - 1 / batch.cond[1], x) * (goal - base)

    def plain(target, batch, x, s, v):
        if isinstance(batch.cond, tuple):
            raise ValueError("the condition has a guidance scale: improved_mean_flow needs null, the label of none")
        return v

    guide = plain if null is None else where_guided(towards, null, low, high)
    if not head:
        method = eulerian(
            net, path=path, time=time, pair=pair, diagonal=diagonal, anneal=anneal, velocity="conditional", guide=guide
        )
        return weighting.adaptive(method, power=power, floor=floor)

    def errors(s, t, mapped, velocity, goal):
        adapted = lambda r: weighting.adapted(goal[0].size * r, power, floor)
        r, r_v = c.mse(mapped, goal), c.mse(velocity, goal)
        return c.Term(s, t, adapted(r) + adapted(r_v), r)

    def on(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x, v = c.interpolant(path, k_x, batch, t)
        goal = c.guided(guide, target, batch, x, t, v)
        return errors(t, t, *heads(params, x, t, t, batch.cond, k_net), goal)

    def off(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        x, v = c.interpolant(path, k_x, batch, s)
        goal = c.guided(guide, target, batch, x, s, v)
        w = jax.lax.stop_gradient(own(target, x, s, s, batch.cond))
        u_at = lambda x, s: heads(params, x, s, t, batch.cond, net=c.with_jvp(net))
        u, du, v = jax.jvp(u_at, (x, s), (w, jnp.ones_like(s)), has_aux=True)
        return errors(s, t, u - expand(t - s, x) * jax.lax.stop_gradient(du), v, goal)

    weighting.adapted(jnp.ones(1), power, floor)
    return c.two_time(first, c.two_terms(on, off, diagonal))
