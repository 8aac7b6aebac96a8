"""The residual velocity: what a frozen velocity lacks, learned by flow matching of the sum."""

from __future__ import annotations

import jax

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net


def residual(net: Net, *, path: paths.Path | None = None, time=times.uniform, base: Net | None = None) -> Method:
    """``E |sg[v(I_t, t)] + r(I_t, t) - dI_t|^2``, the baseline of marginal matching (kRjLBXWn1T).

    ``v(x, t)`` is the diagonal of ``base`` (by default ``net``) at the parameters ``target``, the flow to correct,
    which is frozen; ``r`` is that of ``net``. The minimiser is ``r = v* - v``. A net whose last layer starts at zero,
    as all of ``fmjax.nets`` do, starts at the flow itself. ``velocity`` is ``r`` alone: ``guidance.added`` makes the
    sum, whose cost is an evaluation of each. Path, coupling and ``time`` as in ``flow_matching``. ``aux``: ``t`` and
    the error per example. Raises ``ValueError`` for times that reach the infinite ends of a path.
    """
    path, base = path or paths.linear(), base or net
    c.check_times(path, time)

    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x, u = c.interpolant(path, k_x, batch, t)
        v = jax.lax.stop_gradient(base(target, x, t, t, batch.cond))
        return c.reduce(c.mse(v + net(params, x, t, t, batch.cond, k_net), u), t=t)

    return Method(loss, velocity=c.diagonal(net))
