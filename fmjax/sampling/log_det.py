"""Carry states along a velocity together with the logarithm of the determinant of the map."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.sampling.explicit import rk4
from fmjax.sampling.likelihood import divergence, hutchinson
from fmjax.sampling.sample import sample
from fmjax.types import Cond, VelocityFn, expand


def push_with_log_det(
    velocity: VelocityFn,
    x: Float[Array, "b ..."],
    ts: Any,
    cond: Cond = None,
    *,
    until: Float[Array, " b"] | None = None,
    probes: Float[Array, "k b ..."] | None = None,
) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    """Return states at the end of a grid and ``log |det dX/dx|``, by one RK4 step of both in each interval.

    Args:
        velocity: ``v(x, t, cond)``.
        x: states ``[B, ...]`` at ``ts[0]``.
        ts: the grid, rising or falling.
        cond: conditions.
        until: times ``[B]`` by which the grid is multiplied, one for each example; by default 1.
        probes: ``e``, ``[K, B, ...]``, for Hutchinson's estimate; ``None`` for the exact divergence.

    Returns:
        ``(X(x), log det)``, ``[B, ...]`` and ``[B]``.

    >>> import jax.numpy as jnp
    >>> y, log_det = push_with_log_det(lambda x, t, cond=None: -x, jnp.ones((1, 2)), [0.0, 0.5, 1.0])
    >>> [round(float(v), 3) for v in (y[0, 0], log_det[0])]
    [0.368, -2.0]
    """
    shape = x.shape
    scale = jnp.ones(len(x), x.dtype) if until is None else until.astype(x.dtype)

    def joint(z, u, cond=None):
        y = z[:, :-1].reshape(shape)
        if probes is None:
            v, div = divergence(velocity, y, u * scale, cond)
        else:
            v, div = hutchinson(velocity, y, u * scale, probes, cond)
        return expand(scale, z) * jnp.concatenate([v.reshape(len(z), -1), div[:, None]], 1)

    flat = x.reshape(len(x), -1)
    z = sample(rk4(joint), jnp.concatenate([flat, jnp.zeros_like(flat[:, :1])], 1), ts, cond=cond)
    return z[:, :-1].reshape(shape), z[:, -1]
