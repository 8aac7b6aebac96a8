"""Flow map matching: the two-time map learned directly, from interpolants and its own inverse."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net


def flow_map_matching(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=times.uniform,
    pair=times.either_order,
    diagonal: float = 0.0,
    round_trip: float = 1.0,
    anneal: float = 0.0,
) -> Method:
    """``|d/dt X_{s,t}(X_{t,s}(I_t)) - dI_t|^2 + round_trip |X_{s,t}(X_{t,s}(I_t)) - I_t|^2``.

    Flow map matching (arXiv 2406.07507, eq. 3.17). ``s`` and ``t`` come in both orders: the map is its own inverse,
    ``X_{s,t} o X_{t,s} = id``, and jumps from data to noise as well. There is no teacher. The time
    derivative is taken with ``y = X_{t,s}(I_t)`` held; the gradient of the loss passes through ``y`` too. Near
    ``s = t`` the round trip says nothing, so ``pair`` keeps them 0.02 apart; a share ``diagonal`` of the batch has
    ``|u(I_t, t, t) - dI_t|^2`` instead. Dropout acts there only. ``anneal`` as in
    ``lagrangian``. ``aux``: ``s``, ``t``, ``residual``, and which term an example has. Raises ``ValueError`` for
    ``round_trip <= 0``, which leaves the inverse free, and shares that are none, or not whole in the batch.
    """
    path = path or paths.linear()
    c.check_times(path, time)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)
    if not round_trip > 0:
        raise ValueError(f"round_trip={round_trip} must be positive, or nothing makes the map its own inverse")

    def inverting(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        x, velocity = c.interpolant(path, k_x, batch, t)
        y, jump = c.jump(net)(params)(x, t, s, batch.cond), c.jump(c.with_jvp(net))(params)
        back, along = jax.jvp(lambda t: jump(y, s, t, batch.cond), (t,), (jnp.ones_like(t),))
        return c.Term(s, t, c.mse(along, velocity) + round_trip * c.mse(back, x))

    return c.two_time(net, c.two_terms(c.matching(net, path, time), inverting, diagonal))
