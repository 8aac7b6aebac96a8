"""The residual velocity: what a frozen velocity lacks, learned by flow matching of the sum."""

from __future__ import annotations

from collections.abc import Callable

import jax

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.types import FlowMethod, Net


def residual(
    net: Net, *, path: paths.Path = paths.linear(), time: Callable = times.uniform, base: Net | None = None
) -> FlowMethod:
    """Train a correction ``r`` of a frozen velocity ``v``, ``E |sg[v(I_t, t)] + r(I_t, t) - dI_t|^2``.

    This is the baseline of marginal matching (OpenReview kRjLBXWn1T). The minimiser is ``r = v* - v``. A network whose
    last layer is initialised with zeros, as in all of ``fmjax.nets``, starts at the frozen flow. The coupling is chosen
    as in ``flow_matching``.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, whose diagonal is ``r``.
        path: interpolant ``I_t``.
        time: distribution of ``t``, ``key: [B] -> [B]``.
        base: network whose diagonal at the parameters ``target`` is ``v``; ``net`` by default.

    Returns:
        A method whose ``velocity`` is ``r`` alone: ``sampling.added`` makes the sum, at the cost of one evaluation of
        each network. ``aux`` has ``t``.

    Raises:
        ValueError: ``time`` reaches the ends of a path where its velocity is infinite.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.residual(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.velocity(0.0)(jnp.ones((1, 2)), 0.5)
    Array([[0., 0.]], dtype=float32)
    """
    base = base or net
    c.check_times(path, time)

    @c.keyed
    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x, u = c.interpolant(path, k_x, batch, t)
        v = jax.lax.stop_gradient(base(target, x, t, t, batch.cond))
        return c.reduce(c.mse(v + net(params, x, t, t, batch.cond, k_net), u), t=t)

    return FlowMethod(loss, velocity=views.velocity_view(net))
