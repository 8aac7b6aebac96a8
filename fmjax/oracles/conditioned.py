"""Gaussian data with a float condition: the exact velocity of a flow that is conditioned on a linear functional."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import paths
from fmjax.types import Cond, VelocityFn, expand, over_batch


def linear_condition(
    covariance: Float[Array, "d d"], functional: Float[Array, "m d"], *, path: paths.Path = paths.linear()
) -> VelocityFn:
    """Return the velocity of Gaussian data ``x1 ~ N(0, K)`` given ``c = A x1``, for float conditions ``c: [B, m]``.

    ``x1 | c ~ N(G c, K_c)`` with ``G = K A^T (A K A^T)^-1``, ``K_c = K - G A K``, so on the linear path

    ``v = G c + (t K_c - (1 - t) I) C_t^-1 (x - t G c)``, ``C_t = (1 - t)^2 I + t^2 K_c``.

    Conditions on returns, on a start and a goal, or on pixels. ``A x1`` is known, so the velocity is infinite at
    ``t = 1`` along the rows of ``A``: use solvers that do not evaluate the end, such as ``euler`` and ``midpoint``.

    Args:
        covariance: ``K``, ``[d, d]``.
        functional: ``A``, ``[m, d]``, of linearly independent rows.
        path: the path of the velocity, without a latent.

    Returns:
        ``v(x, t, cond)`` for states of any shape ``[B, ...]`` with ``d`` elements. ``cond=None``, and rows with NaN
        (the null condition of floats), give the velocity of the unconditioned data.

    Raises:
        ValueError: a path with a latent.

    >>> velocity = linear_condition(jnp.eye(2), jnp.array([[1.0, 0.0]]))
    >>> velocity(jnp.zeros((1, 2)), 0.0, jnp.array([[3.0]])).tolist()
    [[3.0, 0.0]]
    """
    paths.refuse_latent("linear_condition", path)
    k, a = jnp.asarray(covariance), jnp.asarray(functional)
    gain = jnp.linalg.solve(a @ k @ a.T, a @ k).T

    def axes(matrix):
        values, vectors = jnp.linalg.eigh(matrix)
        return jnp.where(values > 8 * jnp.finfo(values.dtype).eps * values[-1] * len(values), values, 0), vectors

    every, rest = axes(k), axes(k - gain @ a @ k)

    def gaussian_velocity(x, t, mean, spectrum):
        values, vectors = spectrum
        alpha, beta, d_alpha, d_beta = paths.coefficients(path, x, t)
        slope = (alpha * d_alpha + beta * d_beta * values) / (alpha**2 + beta**2 * values)
        return d_beta * mean + (slope * ((x - beta * mean) @ vectors)) @ vectors.T

    def velocity(x, t, cond: Cond = None):
        flat, t = x.reshape(len(x), -1), over_batch(t, x)
        plain = gaussian_velocity(flat, t, jnp.zeros_like(flat), every)
        if cond is None:
            return plain.reshape(x.shape)
        null = jnp.isnan(cond).any(1)
        mean = jnp.where(null[:, None], 0, cond) @ gain.T
        return jnp.where(expand(null, flat), plain, gaussian_velocity(flat, t, mean, rest)).reshape(x.shape)

    return velocity
