"""Reflected diffusion on a box: the heat kernel, and the exact fields of a finite data set (arXiv 2304.04740)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import checks, paths
from fmjax.oracles.closed_forms import Oracle
from fmjax.types import expand, over_batch

SERIES = ("auto", "images", "cosines")
CROSSING = 0.1  # of sigma^2 / 2 on the unit interval: both series are accurate there


def heat_kernel(
    x: Float[Array, ...],
    x1: Float[Array, ...],
    sigma: Float[Array, ...],
    *,
    low: float = -1.0,
    high: float = 1.0,
    series: str = "auto",
) -> Float[Array, ...]:
    """Return the log-density of ``x = fold(x1 + sigma z)``, ``z ~ N(0, 1)``, coordinate by coordinate.

    On the unit interval, with ``T = sigma^2 / 2``, the same function twice:

    * images: ``sum_k N(x - x1 + 2k; 0, sigma^2) + N(x + x1 + 2k; 0, sigma^2)``, few terms for small ``T``;
    * cosines: ``1 + 2 sum_k exp(-k^2 pi^2 T) cos(k pi x) cos(k pi x1)``, few terms for large ``T``.

    Its slope in ``x`` is 0 at both ends, and for large ``sigma`` it is uniform.

    Args:
        x: states in ``[low, high]``.
        x1: data in ``[low, high]``, of a shape that broadcasts against ``x``.
        sigma: positive noise levels that broadcast against ``x``.
        low: lower bound.
        high: upper bound, above ``low``.
        series: ``"auto"``: images where ``T <= 0.1``, cosines elsewhere; or one of both.

    Returns:
        Log-densities, one for each coordinate.

    Raises:
        ValueError: an unknown series, or bounds that do not rise.

    >>> kernel = heat_kernel(jnp.linspace(-1.0, 1.0, 3), jnp.array(0.3), jnp.array(9.0))
    >>> jnp.exp(kernel).round(4).tolist()
    [0.5, 0.5, 0.5]

    Source: arXiv 2304.04740, which changes the series at ``T = 0.01`` and guards a ratio by 1e-12; the images are
    summed as logarithms here, without a guard.
    """
    checks.check_choice("series", series, SERIES)
    width = high - low
    if not width > 0:
        raise checks.Refusal("high", high, f"not above low={low}", "Give bounds that rise")
    u, u1, level = (x - low) / width, (x1 - low) / width, sigma / width
    time = jnp.square(level) / 2

    def images(level):
        shifts = 2.0 * jnp.arange(-6, 7, dtype=u.dtype)
        offset = jnp.stack([u - u1, u + u1], -1)[..., None] + shifts
        terms = -0.5 * jnp.square(offset / level[..., None, None])
        return jax.nn.logsumexp(terms, (-2, -1)) - jnp.log(level) - 0.5 * jnp.log(2 * jnp.pi)

    def cosines(time):
        k = jnp.arange(1, 26, dtype=u.dtype)
        wave = lambda y: jnp.cos(k * jnp.pi * y[..., None])
        total = 2 * jnp.sum(jnp.exp(-jnp.square(k * jnp.pi) * time[..., None]) * wave(u) * wave(u1), -1)
        return jnp.log1p(total)

    level, time = (jnp.broadcast_to(a, jnp.broadcast_shapes(u.shape, u1.shape, level.shape)) for a in (level, time))
    if series == "images":
        return images(level) - jnp.log(width)
    if series == "cosines":
        return cosines(time) - jnp.log(width)
    small = time <= CROSSING  # the other branch gets a level at which it is finite, and so is its gradient
    near = images(jnp.where(small, level, (2 * CROSSING) ** 0.5))
    return jnp.where(small, near, cosines(jnp.where(small, CROSSING, time))) - jnp.log(width)


def reflected_diffusion(
    points: Float[Array, "k d"],
    *,
    low: float = -1.0,
    high: float = 1.0,
    path: paths.Path = paths.ve(sigma_min=0.01, sigma_max=10.0),
) -> Oracle:
    """Return the fields of a finite data set under reflected diffusion, ``x_t = fold(x1 + alpha_t z)``.

    ``p_t = 1/K sum_k prod_i heat_kernel(x_i, x1_ki, alpha_t)``, and the velocity is ``-alpha alpha' S``, on a path with
    ``beta = 1``. Both point along the faces at the faces, so that the flow stays inside. It starts from
    ``sources.uniform_noise``, which ``p_0`` is up to ``exp(-pi^2 alpha_0^2 / 2 (high - low)^2)``. Samplers:
    ``folded(euler(velocity))``, or ``folded(reverse_diffusion(velocity, path=path))``.

    Args:
        points: the data set ``[K, d]``, inside the box.
        low: lower bound of each coordinate.
        high: upper bound of each coordinate, above ``low``.
        path: a path with ``beta = 1`` (``paths.ve``).

    Returns:
        The oracle, without a flow map; ``sample`` draws points of the data set.

    Raises:
        ValueError: bounds that do not rise.

    >>> oracle = reflected_diffusion(jnp.array([[0.0], [0.9]]))
    >>> bool(abs(oracle.velocity(jnp.array([[1.0], [-1.0]]), 0.5)).max() < 1e-3)  # none through a face
    True
    """

    def log_density(x, t):
        alpha, *_ = path.coefficients(over_batch(t, x))
        each = heat_kernel(x[:, None], points, alpha[:, None, None], low=low, high=high).sum(-1)
        return jax.nn.logsumexp(each, 1) - jnp.log(len(points))

    def score(x, t):
        return jax.grad(lambda x: log_density(x, t).sum())(x)

    def velocity(x, t, cond=None):
        alpha, _, d_alpha, _ = paths.coefficients(path, x, t)
        return -alpha * d_alpha * score(x, t)

    return Oracle(lambda key, n: points[jax.random.choice(key, len(points), (n,))], velocity, score, log_density)


def uniform_finite(points: Float[Array, "k d"], *, low: float = -1.0, high: float = 1.0) -> Oracle:
    """Return the velocity of reflected flow matching of a finite data set, from the uniform source on a box.

    On the linear path ``v = E[x1 - x | x] / (1 - t)``, the mean over the points ``k`` that ``x`` can come from, those
    with ``(x - t x1_k) / (1 - t)`` in the box, or nearest to it. The flow never leaves the box, which is convex.

    Args:
        points: the data set ``[K, d]``, inside the box.
        low: lower bound of each coordinate.
        high: upper bound of each coordinate, above ``low``.

    Returns:
        The oracle, without a flow map; its density is constant on boxes, so its score is zero where it exists.

    >>> oracle = uniform_finite(jnp.array([[-0.5], [0.5]]))
    >>> oracle.velocity(jnp.array([[0.0], [0.75]]), 0.5).tolist()
    [[0.0], [-0.5]]

    Source: the field of arXiv 2405.16577 for a finite set.
    """

    def outside(x, t):
        """Return the largest distance of a coordinate of ``x0`` from the box, for each point: ``[B, K]``."""
        t = expand(over_batch(t, x), x)[..., None]
        start = (x[:, :, None] - t * points.T) / (1 - t)
        return jnp.maximum(jnp.maximum(low - start, start - high), 0).max(1)

    def velocity(x, t, cond=None):
        away = outside(x, t)
        # after an Euler step perhaps none is possible; the margin is above rounding
        weight = (away <= away.min(1, keepdims=True) + 1e-6 * (high - low)).astype(x.dtype)
        mean = weight @ points / weight.sum(1, keepdims=True)
        return (mean - x) / (1 - expand(over_batch(t, x), x))

    def log_density(x, t):
        d, t = x.shape[1], over_batch(t, x)
        return jnp.log((outside(x, t) == 0).mean(1)) - d * (jnp.log(high - low) + jnp.log1p(-t))

    sample = lambda key, n: points[jax.random.choice(key, len(points), (n,))]
    return Oracle(sample, velocity, lambda x, t: jnp.zeros_like(x), log_density)
