"""Improved mean flow: the network's own velocity as the direction of the derivative, guidance of every scale."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods import views, weighting
from fmjax.methods.eulerian import eulerian
from fmjax.methods.mean_flow import LOGIT_NORMAL, where_guided
from fmjax.types import Cond, FlowMapMethod, Net, expand


def improved_mean_flow(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = functools.partial(times.earlier, time=LOGIT_NORMAL),
    pair: Callable = functools.partial(times.ordered_pair, time=LOGIT_NORMAL),
    diagonal: float = 0.5,
    anneal: float = 0.0,
    power: float | None = None,
    floor: float = 1e-2,
    head: bool = False,
    null: Cond = None,
    low: float = 0.0,
    high: float = 1.0,
) -> FlowMapMethod:
    """Train an average velocity by improved mean flow, ``|V - v_g|^2`` with ``V = u(I_s, s, t) - (t - s) sg[du]``.

    ``du = (d/ds + w . grad) u`` (arXiv 2512.02012). The direction ``w`` is the velocity of ``target`` at ``(I_s, s)``,
    of much less variance than ``dI_s``. It departs from the paper in examples of less than 64 elements, where the
    adaptive weight is left out (see ``mean_flow``; ``power=1`` for it), and in the interval of guidance, whose ends the
    published network takes as inputs, drawn at random: here all examples have one. Without ``head``, ``w`` is the
    diagonal ``u(I_s, s, s)``: ``eulerian(velocity="conditional")`` under ``weighting.adaptive``. With ``head`` the
    network has ``2 C`` channels (``outputs=2``), ``u`` and a velocity ``v(x, s, t)``, and ``w = v(I_s, s, s)``; the
    loss is the weighted error plus the weighted ``|v(I_s, s, t) - v_g|^2``, from one evaluation.

    ``v_g = dI_s``. Where ``null`` is given, it is a guided velocity of the scale ``w`` in the condition ``(labels, w)``
    (of ``sampling.random_scale``, over a network that takes the scale as an input, ``guided=True``):

    ``v_g = dI_s + (1 - 1/w) (v(I_s, s; labels, w) - v(I_s, s; null, 1))`` where ``low <= s <= high``,

    whose fixed point is ``v_null + w (v_labels - v_null)``. Rows whose label is ``null`` (``sampling.label_dropout``)
    have ``v_g = dI_s``. Sample with ``sampling.at_scale``.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x`` (two heads with ``head``).
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``, as in ``mean_flow``.
        pair: distribution of ``(s, t)`` off the diagonal, as in ``mean_flow``.
        diagonal: fraction of the batch on the diagonal; times the batch per device it must be whole.
        anneal: fraction of the training during which ``|t - s| <= progress / anneal``; 0 for no bound.
        power: power of the adaptive weight; 0 for no weight, ``None``: 1 from 64 elements on, else 0.
        floor: constant of the adaptive weight.
        head: whether the network has a second head, the velocity.
        null: label of a dropped condition, for guidance.
        low: least guided time.
        high: greatest guided time.

    Returns:
        A method with the ``velocity`` and the ``flow_map`` of ``u``; ``aux`` as in ``eulerian``, with ``residual``, the
        unweighted error.

    Raises:
        ValueError: an empty interval, or (in the loss) a scale without ``null``, ``null`` without a scale, or a network
            without the two heads; else as ``eulerian`` and ``weighting.adaptive``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.improved_mean_flow(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 1.0)
    Array([[3., 3.]], dtype=float32)
    """
    c.check_times(path, time)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)
    weighting.check_adaptive(power, floor)

    def heads(params, x, s, t, cond=None, key=None, net=net):
        return c.two_heads("head=True", net(params, x, s, t, cond, key), x)

    def own(*args):
        return heads(*args)[1] if head else net(*args)

    def towards(target, batch, x, s, v):
        if not isinstance(batch.cond, tuple):
            raise ValueError(f"null={null}: the condition has no scale. Wrap the method in sampling.random_scale.")
        goal, base = (own(target, x, s, s, cond) for cond in (batch.cond, c.unconditional(batch.cond, null)))
        return v + expand(1 - 1 / batch.cond[1], x) * (goal - base)

    def plain(target, batch, x, s, v):
        if isinstance(batch.cond, tuple):
            raise ValueError(
                "null=None: the condition has a guidance scale. Give null, the label of a dropped condition."
            )
        return v

    guide = plain if null is None else where_guided(towards, null, low, high)
    if not head:
        method = eulerian(
            net, path=path, time=time, pair=pair, diagonal=diagonal, anneal=anneal, velocity="conditional", guide=guide
        )
        return weighting.adaptive(method, power=power, floor=floor)

    def errors(s, t, mapped, velocity, goal):
        adapted = lambda r: weighting.adapted(goal[0].size * r, weighting.exponent(power, goal), floor)
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
        u_at = lambda x, s: heads(params, x, s, t, batch.cond, net=views.for_jvp(net))
        u, du, v = jax.jvp(u_at, (x, s), (w, jnp.ones_like(s)), has_aux=True)
        return errors(s, t, u - expand(t - s, x) * jax.lax.stop_gradient(du), v, goal)

    def first(params, x, s, t, cond=None, key=None):
        return heads(params, x, s, t, cond, key)[0]

    return views.two_time(first, c.two_terms(on, off, diagonal))
