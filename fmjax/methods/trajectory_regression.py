"""Trajectory regression: learn the map from the source to every time of a teacher's stored trajectories."""

from __future__ import annotations

import jax.numpy as jnp

from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.types import Method, Net


def trajectory_regression(net: Net) -> Method:
    """Train ``X_{0,t}`` by regression on stored states, ``E |x_0 + t u(x_0, 0, t) - x_t|^2``, the plain operator loss.

    Forward marginals hold the pairs ``(x_0, x_t)`` (``correction.operator_batches``), so that no teacher is
    evaluated in training; the minimiser is the teacher's solver itself, ``C_t^{1/2}`` for Gaussian data. It is the
    one-time-at-a-time form of DSNO (arXiv 2211.13449), whose network decodes all times at once
    (``methods.neural_operator``).

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, evaluated at ``s = 0`` alone.

    Returns:
        A method with ``flow_map``, valid from ``s = 0``. Batches have in ``x0`` the source, in ``x1`` the state at the
        time in ``t``. ``aux`` has ``s`` and ``t``.

    Raises:
        ValueError: in the loss, a batch without ``x0`` or ``t``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.trajectory_regression(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    flow_map = views.flow_map_view(net)

    @c.keyed
    def loss(params, target, batch, key):
        for name in ("x0", "t"):
            if getattr(batch, name) is None:
                raise ValueError(f"batch.{name}=None: trajectories start in x0 and are at time t in x1. Give both.")
        s = jnp.zeros_like(batch.t)
        return c.reduce(c.mse(flow_map(params)(batch.x0, s, batch.t, batch.cond), batch.x1), s=s, t=batch.t)

    return Method(loss, flow_map=flow_map, batches="trajectories")
