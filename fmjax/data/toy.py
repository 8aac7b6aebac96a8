"""Densities in the plane with exact sampling: ``name(key, n) -> [n, 2]``, pure functions of a single key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def eight_gaussians(key: Key[Array, ""], n: int, *, radius: float = 2.0, std: float = 0.2) -> Float[Array, "{n} 2"]:
    """Eight equal Gaussians on a circle: ``radius (cos, sin)(k pi / 4) + std N(0, I)``, k = 0..7.

    Mean 0, covariance ``(radius^2 / 2 + std^2) I``.
    """
    k_mode, k_noise = jax.random.split(key)
    angle = jax.random.randint(k_mode, (n,), 0, 8) * (jnp.pi / 4)
    mode = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    return mode + std * jax.random.normal(k_noise, (n, 2))


def checkerboard(key: Key[Array, ""], n: int) -> Float[Array, "{n} 2"]:
    """Uniform on the 8 cells of a 4x4 board on [-1, 1)^2 whose column and row add up to an even number.

    Density 1/2 there and 0 elsewhere. Mean 0, variances 1/3, covariance 1/16.
    """
    k_column, k_row, k_inside = jax.random.split(key, 3)
    column = jax.random.randint(k_column, (n,), 0, 4)
    row = 2 * jax.random.randint(k_row, (n,), 0, 2) + column % 2
    corner = jnp.stack([column, row], -1) / 2 - 1.0
    # Corners and half a uniform draw are multiples of 2^-24 in float32: the sum is exact and never leaves its cell.
    return corner + jax.random.uniform(k_inside, (n, 2)) / 2


def two_moons(key: Key[Array, ""], n: int, *, std: float = 0.1) -> Float[Array, "{n} 2"]:
    """Two interleaved half circles (scikit-learn's ``make_moons``), equal shares, plus ``std N(0, I)``.

    ``(cos a, sin a)`` and ``(1 - cos a, 1/2 - sin a)`` with ``a ~ U[0, pi]``.
    Mean (1/2, 1/4), variances ``3/4 + std^2`` and ``9/16 - 1/pi + std^2``, covariance ``1/8 - 1/pi``.
    """
    k_moon, k_angle, k_noise = jax.random.split(key, 3)
    angle = jax.random.uniform(k_angle, (n,), maxval=jnp.pi)
    upper = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    lower = jnp.array([1.0, 0.5]) - upper
    x = jnp.where(jax.random.bernoulli(k_moon, shape=(n, 1)), upper, lower)
    return x + std * jax.random.normal(k_noise, (n, 2))
