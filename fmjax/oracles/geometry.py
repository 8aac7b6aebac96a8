"""The geometric view of diffusion (arXiv 2305.19947): the denoiser of a data set is one step of Gaussian mean shift."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import checks, paths
from fmjax.types import Cond, DirectionFn, VelocityFn, over_batch


def kernel_mean(
    x: Float[Array, "b ..."], points: Float[Array, "k ..."], sigma: float | Float[Array, " b"]
) -> Float[Array, "b ..."]:
    """Return the mean of the points under a Gaussian kernel: the denoiser of a finite data set, one mean-shift step.

    ``D(x; sigma) = softmax(-|x - x_k|^2 / (2 sigma^2)) X``, and ``D - x = sigma^2 grad log p`` of the kernel density of
    the width ``sigma``. Repeated at a fixed ``sigma``, it climbs to a mode; Euler steps of the flow from ``sigma`` to
    ``sigma'``, ``(sigma' / sigma) x + (1 - sigma' / sigma) D``, are annealed mean shift.

    Args:
        x: states ``[B, ...]``, with noise of the level ``sigma``: ``x1 + sigma x0``.
        points: the data set ``[K, ...]``.
        sigma: kernel width, positive: a number, or one for each state.

    Returns:
        The means ``[B, ...]``, convex combinations of the points.

    >>> kernel_mean(jnp.array([[0.0]]), jnp.array([[-1.0], [1.0], [9.0]]), 1.0).round(4).tolist()
    [[0.0]]
    """
    flat, data = x.reshape(len(x), -1), points.reshape(len(points), -1)
    # |x|^2 cancels in the softmax
    score = flat @ data.T - 0.5 * jnp.sum(jnp.square(data), 1)
    weights = jax.nn.softmax(score / jnp.square(over_batch(sigma, x))[:, None], 1)
    return (weights @ data).reshape(x.shape)


def mean_shift(points: Float[Array, "k ..."], *, bandwidth: float) -> DirectionFn:
    """Return the direction of mean shift to a data set: a training-free corrector for the end of a sampler.

    ``h(x) = D(x; bandwidth) - x``; ``correction.marginal_matching(mean_shift(points, bandwidth=...), alpha=...)`` moves
    samples to the nearest modes of the kernel density. With ``alpha = 1`` and a small bandwidth every sample becomes a
    training example: look at ``memorisation``.

    Args:
        points: the data set ``[K, ...]``, at the time of the correction.
        bandwidth: width of the kernel, positive.

    Returns:
        The direction ``(x, t, cond)``.

    Raises:
        ValueError: a bandwidth that is not positive.

    >>> mean_shift(jnp.array([[1.0]]), bandwidth=0.5)(jnp.zeros((1, 1)), 1.0).tolist()
    [[1.0]]
    """
    checks.check_range("bandwidth", bandwidth, checks.Range(low=0, open_low=True))
    return lambda x, t, cond=None: kernel_mean(x, points, bandwidth) - x


def memorisation(
    velocity: VelocityFn,
    x: Float[Array, "b ..."],
    t,
    points: Float[Array, "k ..."],
    *,
    path: paths.Path = paths.linear(),
    cond: Cond = None,
) -> Float[Array, " b"]:
    """Return the distance of a model's data prediction from the prediction of its memorised training set.

    ``|D_model(x, t) - D_points(x, t)| / |x1 - E x1|``, the latter the root mean square over the points. 0 for a network
    that memorises; a network that generalises keeps away from 0 at small noise.

    Args:
        velocity: ``v(x, t, cond)``.
        x: states ``[B, ...]`` at ``t``, such as noised test examples.
        t: times ``[B]`` or a scalar, between 0 and 1.
        points: the training set ``[K, ...]``.
        path: the path of the velocity, without a latent.
        cond: the condition of the velocity.

    Returns:
        One number for each state, ``[B]``.

    Raises:
        ValueError: a path with a latent.

    >>> from fmjax import oracles
    >>> points = jnp.array([[-1.0], [1.0]])
    >>> bool(memorisation(oracles.finite(points).velocity, jnp.full((1, 1), 0.2), 0.5, points)[0] < 1e-6)
    True

    Source: the measure is chosen here; the comparison of both denoisers is in arXiv 2305.19947.
    """
    t = over_batch(t, x)
    alpha, beta, *_ = paths.coefficients(path, x, t)
    model = paths.convert(path, x, velocity(x, t, cond), t, kind="velocity", to="data")
    level = (alpha / beta).reshape(t.shape)
    gap = (model - kernel_mean(x / beta, points, level)).reshape(len(x), -1)
    spread = jnp.sqrt(jnp.sum(jnp.var(points.reshape(len(points), -1), 0)))
    return jnp.sqrt(jnp.sum(jnp.square(gap), 1)) / spread
