"""Flow matching: regress the velocity on the time derivative of an interpolant."""

from __future__ import annotations

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net


def flow_matching(net: Net, *, path: paths.Path | None = None, time=times.uniform) -> Method:
    """Conditional flow matching, ``E |u(I_t, t, t) - dI_t/dt|^2`` (arXiv 2210.02747, 2302.00482 eq. 10).

    ``net``'s diagonal learns ``v(x, t) = E[dI_t | I_t = x]``. With a coupled ``batch.x0`` this is OT-CFM, without it
    I-CFM. ``time`` is a law of ``t: [B]``. ``aux``: ``t`` and the error per example.
    """
    path = path or paths.linear()

    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x, u = paths.with_velocity(path, c.source(k_x, batch), batch.x1, t)
        return c.reduce(c.mse(net(params, x, t, t, batch.cond, k_net), u), t=t)

    return Method(loss, velocity=c.diagonal(net))
