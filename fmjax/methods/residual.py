"""The residual velocity: what a frozen velocity lacks, learned by flow matching of the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.types import FlowMethod, Net, Params, over_batch

BASE, RESIDUAL = "base", "residual"


def residual(
    net: Net, *, path: paths.Path = paths.linear(), time: Callable = times.uniform, base: Net | None = None
) -> FlowMethod:
    """Train a correction ``r`` of a frozen velocity ``v``, ``E |sg[v(I_t, t)] + r(I_t, t) - dI_t|^2``.

    This is the baseline of marginal matching (OpenReview kRjLBXWn1T); the loss is a mean over elements. The minimiser
    is ``r = v* - v``. The parameters are ``{"base": ..., "residual": ...}``, of ``v`` and of ``r``, so that the view
    ``velocity`` is the sum ``v + r``. The base has no gradient; an optimiser with weight decay must leave it out
    (``Method.frozen``). A network whose last layer is initialised with zeros, as in all of ``fmjax.nets``, starts at
    the frozen flow. The coupling is chosen as in ``flow_matching``.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, whose diagonal is ``r``.
        path: interpolant ``I_t``.
        time: distribution of ``t``, ``key: [B] -> [B]``.
        base: network whose diagonal is ``v``; ``net`` by default.

    Returns:
        A method with ``velocity``, at the cost of one evaluation of each network. ``aux`` has ``t``.

    Raises:
        ValueError: ``time`` reaches the ends of a path where its velocity is infinite, or (in the loss and in
            ``velocity``) parameters without the two entries.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.residual(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.velocity({"base": 2.0, "residual": 0.5})(jnp.ones((1, 2)), 0.5)
    Array([[2.5, 2.5]], dtype=float32)
    """
    base = base or net
    c.check_times(path, time)

    def summed(params, x, t, cond, key=None):
        check_parameters(params)
        v = base(jax.lax.stop_gradient(params[BASE]), x, t, t, cond)
        return v + net(params[RESIDUAL], x, t, t, cond, key)

    @c.keyed
    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x, u = c.interpolant(path, k_x, batch, t)
        return c.reduce(c.mse(summed(params, x, t, batch.cond, k_net), u), t=t)

    def velocity(params):
        check_parameters(params)
        return lambda x, t, cond=None: summed(params, x, over_batch(t, x), cond)

    return FlowMethod(loss, velocity=velocity, frozen=(BASE,))


def check_parameters(params: Params) -> None:
    """Refuse parameters that do not hold both networks of a residual velocity.

    Args:
        params: the parameters.

    Raises:
        ValueError: they are not a dictionary with the entries ``"base"`` and ``"residual"``.
    """
    if not (isinstance(params, dict) and {BASE, RESIDUAL} <= set(params)):
        raise ValueError(
            "params: lack 'base' or 'residual', and one network alone is no flow. Give both in a dictionary."
        )


def with_base(model: Any) -> Any:
    """Return a model whose parameters hold a base beside the residual, of the same network.

    Args:
        model: a ``nets.Model``.

    Returns:
        The model whose ``init`` makes ``{"base": ..., "residual": ...}``; its ``net`` takes one of the two.
    """

    def init(key, x, cond=None):
        params = model.init(key, x, cond)
        return {BASE: params, RESIDUAL: params}

    return model._replace(init=init)
