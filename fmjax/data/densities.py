"""Densities in the plane with exact sampling: pure functions of a key, with the label of each point on request."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmjax.keys import as_keys, is_key

Points = Float[Array, "{n} 2"]
Labelled = tuple[Points, Int[Array, "{n}"]]  # noqa: F821


@overload
def draw_eight_gaussians(
    key, n: int, *, radius: float = ..., std: float = ..., labels: Literal[False] = ...
) -> Points: ...
@overload
def draw_eight_gaussians(key, n: int, *, radius: float = ..., std: float = ..., labels: Literal[True]) -> Labelled: ...
def draw_eight_gaussians(
    key, n: int, *, radius: float = 2.0, std: float = 0.2, labels: bool = False
) -> Points | Labelled:
    """Draw points of eight equal Gaussians on a circle: ``radius (cos, sin)(k pi / 4) + std N(0, I)``, k = 0..7.

    The mean is 0, the covariance ``(radius^2 / 2 + std^2) I``.

    Args:
        key: one typed key for all points, or ``[n]`` keys, one for each point.
        n: the number of points.
        radius: the radius of the circle of means.
        std: the standard deviation of each Gaussian.
        labels: whether to return the number ``k`` of each point's Gaussian too.

    Returns:
        Points ``[n, 2]``; with ``labels`` the pair of points and labels ``[n]`` int32.

    >>> import jax
    >>> draw_eight_gaussians(jax.random.key(0), 3).shape
    (3, 2)
    """
    if not is_key(key) or key.ndim:
        return _by_point(functools.partial(draw_eight_gaussians, radius=radius, std=std, labels=labels), key, n)
    k_mode, k_noise = jax.random.split(key)
    mode = jax.random.randint(k_mode, (n,), 0, 8)
    angle = mode * (jnp.pi / 4)
    x = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1) + std * jax.random.normal(k_noise, (n, 2))
    return (x, mode) if labels else x


@overload
def draw_checkerboard(key, n: int, *, labels: Literal[False] = ...) -> Points: ...
@overload
def draw_checkerboard(key, n: int, *, labels: Literal[True]) -> Labelled: ...
def draw_checkerboard(key, n: int, *, labels: bool = False) -> Points | Labelled:
    """Draw points that are uniform on the cells of a 4x4 board on [-1, 1)^2 whose column and row have an even sum.

    The density is 1/2 on these 8 cells and 0 elsewhere; the mean is 0, the variances are 1/3, the covariance is 1/16.

    Args:
        key: one typed key for all points, or ``[n]`` keys, one for each point.
        n: the number of points.
        labels: whether to return the number of each point's cell too: ``2 column + row // 2``, 0..7.

    Returns:
        Points ``[n, 2]``; with ``labels`` the pair of points and labels ``[n]`` int32.

    >>> import jax
    >>> x, cell = draw_checkerboard(jax.random.key(0), 3, labels=True)
    >>> x.shape, cell.shape
    ((3, 2), (3,))
    """
    if not is_key(key) or key.ndim:
        return _by_point(functools.partial(draw_checkerboard, labels=labels), key, n)
    k_column, k_row, k_inside = jax.random.split(key, 3)
    column = jax.random.randint(k_column, (n,), 0, 4)
    half = jax.random.randint(k_row, (n,), 0, 2)
    corner = jnp.stack([column, 2 * half + column % 2], -1) / 2 - 1.0
    # Corners and half a uniform draw are multiples of 2^-24 in float32: the sum is exact and never leaves its cell.
    x = corner + jax.random.uniform(k_inside, (n, 2)) / 2
    return (x, 2 * column + half) if labels else x


@overload
def draw_two_moons(key, n: int, *, std: float = ..., labels: Literal[False] = ...) -> Points: ...
@overload
def draw_two_moons(key, n: int, *, std: float = ..., labels: Literal[True]) -> Labelled: ...
def draw_two_moons(key, n: int, *, std: float = 0.1, labels: bool = False) -> Points | Labelled:
    """Draw points of two interleaved half circles with equal probability, plus noise ``std N(0, I)``.

    The half circles are ``(cos a, sin a)`` and ``(1 - cos a, 1/2 - sin a)`` with ``a ~ U[0, pi]``, as in scikit-learn's
    ``make_moons``. The mean is (1/2, 1/4), the variances are ``3/4 + std^2`` and ``9/16 - 1/pi + std^2``, the
    covariance is ``1/8 - 1/pi``.

    Args:
        key: one typed key for all points, or ``[n]`` keys, one for each point.
        n: the number of points.
        std: the standard deviation of the noise.
        labels: whether to return the half circle of each point too: 0 lower, 1 upper.

    Returns:
        Points ``[n, 2]``; with ``labels`` the pair of points and labels ``[n]`` int32.

    >>> import jax
    >>> draw_two_moons(jax.random.key(0), 3).shape
    (3, 2)
    """
    if not is_key(key) or key.ndim:
        return _by_point(functools.partial(draw_two_moons, std=std, labels=labels), key, n)
    k_moon, k_angle, k_noise = jax.random.split(key, 3)
    angle = jax.random.uniform(k_angle, (n,), maxval=jnp.pi)
    upper = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    lower = jnp.array([1.0, 0.5]) - upper
    is_upper = jax.random.bernoulli(k_moon, shape=(n, 1))
    x = jnp.where(is_upper, upper, lower) + std * jax.random.normal(k_noise, (n, 2))
    return (x, is_upper[:, 0].astype(jnp.int32)) if labels else x


def _by_point(draw: Callable, key, n: int) -> Points | Labelled:
    """Draw each point from one key; refuse what is no key."""
    drawn = jax.vmap(lambda point_key: draw(point_key, 1))(as_keys(key, n))
    return jax.tree.map(lambda leaf: leaf[:, 0], drawn)
