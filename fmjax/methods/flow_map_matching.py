"""Flow map matching: the two-time map learned directly, from interpolants and its own inverse."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.types import FlowMapMethod, Net


def flow_map_matching(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
    pair: Callable = times.either_order,
    diagonal: float = 0.0,
    round_trip: float = 1.0,
    anneal: float = 0.0,
) -> FlowMapMethod:
    """Train a flow map without a teacher, ``|d/dt X_{s,t}(y) - dI_t|^2 + round_trip |X_{s,t}(y) - I_t|^2``.

    Here ``y = X_{t,s}(I_t)``, and errors are means over elements (arXiv 2406.07507, eq. 3.17, where they are sums). It
    departs from the paper in its times, which are uniform on the square without the strip ``|t - s| < 0.02``. ``s`` and
    ``t`` come in both orders: the map becomes its own inverse, ``X_{s,t} o X_{t,s} = id``, and also jumps from data to
    noise. The time derivative is taken with ``y`` held; the gradient of the loss passes through ``y`` too.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``. Dropout acts on the diagonal.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``.
        pair: distribution of ``(s, t)`` off the diagonal. Near ``s = t`` the round trip carries no information; the
            default keeps ``s`` and ``t`` 0.02 apart.
        diagonal: fraction of the batch with the flow-matching loss ``|u(I_t, t, t) - dI_t|^2``.
        round_trip: weight of the round trip.
        anneal: fraction of the training during which ``|t - s| <= progress / anneal``; 0 for no bound.

    Returns:
        A method with ``velocity`` and ``flow_map``. ``aux`` has ``s``, ``t`` and the masks of the two terms.

    Raises:
        ValueError: ``round_trip <= 0``, a fraction outside [0, 1], or (in the loss) a batch that cannot be split.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.flow_map_matching(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 1.0, 0.5)  # a jump back
    Array([[0., 0.]], dtype=float32)
    """
    c.check_times(path, time)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)
    if not round_trip > 0:
        raise ValueError(f"round_trip={round_trip}: nothing makes the map its own inverse. Give a positive number.")

    def inverting(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        x, velocity = c.interpolant(path, k_x, batch, t)
        y = views.flow_map_view(net)(params)(x, t, s, batch.cond)
        jump = views.flow_map_view(views.for_jvp(net))(params)
        back, along = jax.jvp(lambda t: jump(y, s, t, batch.cond), (t,), (jnp.ones_like(t),))
        return c.Term(s, t, c.mse(along, velocity) + round_trip * c.mse(back, x))

    return views.two_time(net, c.two_terms(c.matching(net, path, time), inverting, diagonal))
