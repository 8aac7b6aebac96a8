"""Consistency trajectory models: jumps compared where they end in the data."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.methods.alpha_flow import BOOTSTRAPS, check_power, stepping
from fmjax.types import FlowMapMethod, Net, expand


def consistency_trajectory(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
    pair: Callable = times.ordered_pair,
    diagonal: float = 0.5,
    teacher: Net | None = None,
    velocity: str = "own",
    solver: str = "heun",
    fraction: Callable = times.exponential_fraction,
    power: float = 1.0,
    bootstrap: str = "params",
    anneal: float = 0.0,
) -> FlowMapMethod:
    """Train a consistency trajectory model, ``a^-power |sg[X_{t,1}](X_{s,t}(I_s)) - sg X_{t,1}(X_{m,t}(x_m))|^2``.

    ``x_m`` is a solver step of the teacher from ``I_s``. Both sides are mapped on to the data by a map whose
    parameters, but not whose input, are stopped (arXiv 2310.02279). It departs from the paper: the distance is a mean
    square instead of a perceptual one, and the adversarial term is left out; in the paper ``power`` is 0 and ``x_m`` is
    up to 17 Heun steps away on a grid of 18 noise levels, while here times are uniform and one step must be short,
    which the weight ``a^-power`` makes up for; the denoising term is plain flow matching of uniform times, without the
    balance of its gradient.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``. Dropout acts on the diagonal.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``.
        pair: distribution of ``(s, t)`` off the diagonal.
        diagonal: fraction of the batch with the flow-matching loss ``|u(I_t, t, t) - dI_t|^2``.
        teacher: network of the own velocity, at the parameters ``target`` (a frozen flow in the paper); ``net`` by
            default.
        velocity: velocity of the step to ``x_m``, as in ``alpha_flow``.
        solver: solver of the own velocity, as in ``alpha_flow``.
        fraction: schedule of ``a = (m - s) / (t - s)``, ``(s, t, progress) -> [B]``.
        power: exponent of the weight ``a^-power``.
        bootstrap: parameters of the stopped maps, ``"params"`` or ``"target"``.
        anneal: fraction of the training during which ``|t - s| <= progress / anneal``; 0 for no bound.

    Returns:
        A method with ``velocity`` and ``flow_map``; ``aux`` as in ``alpha_flow``, which compares at ``t``.

    Raises:
        ValueError: as ``alpha_flow``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.consistency_trajectory(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.5, 1.0)
    Array([[2., 2.]], dtype=float32)
    """
    c.check_times(path, time)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)
    checks.check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    check_power(power)
    step = stepping(path, teacher or net, velocity, solver)

    def comparing(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        a = fraction(s, t, c.progress(batch))
        m = jnp.minimum(s + a * (t - s), t)  # not past t by rounding
        x, v = step(target, batch, k_x, s, m)
        still = jax.lax.stop_gradient(target if bootstrap == "target" else params)
        bound, cond, end = views.flow_map_view(net), batch.cond, jnp.ones_like(t)
        jump, jump_still = bound(params), bound(still)
        aim = jump_still(jump_still(x + expand(m - s, x) * v, m, t, cond), t, end, cond)
        apart = c.mse(jump_still(jump(x, s, t, cond), t, end, cond), jax.lax.stop_gradient(aim))
        return c.Term(s, t, apart / a**power, apart / a**2)

    return views.two_time(net, c.two_terms(c.matching(net, path, time), comparing, diagonal))
