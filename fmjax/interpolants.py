"""The interpolant of a path, ``I_t = alpha_t x0 + beta_t x1 (+ gamma_t z)``: its coefficients, derivative and latent.

Derivatives of the coefficients come from ``jax.jvp``. Users call these functions as ``fmjax.paths.NAME``; the paths
themselves (``linear``, ``vp``, ...) are in ``fmjax.paths``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.types import expand, over_batch


class Path(NamedTuple):
    """An interpolant between the source ``x0`` and the data ``x1``, with ``beta_t / alpha_t`` increasing in time.

    Without a latent ``I_t = alpha_t x0 + beta_t x1``. With a latent ``I_t = alpha_t x0 + beta_t x1 + gamma_t z``, where
    ``z ~ N(0, I)`` is independent of the pair ``(x0, x1)``, whatever the distribution of the pair.

    Attributes:
        coefficients: ``coefficients(t) -> (alpha_t, beta_t)``, for times of any shape. ``(1, 0)`` at ``t = 0`` and
            ``(0, 1)`` at ``t = 1``, unless the docstring of the path says otherwise.
        gamma: ``gamma(t) -> gamma_t``, the scale of the latent, zero at both ends; ``None``: no latent.
        span: first and last time at which the velocity of the flow is finite, as far as float32 can tell: where a
            sampler starts and ends. (Training times of a path with a latent can need a margin: ``times.interior``.)
    """

    coefficients: Callable[[Array], tuple[Array, Array]]
    gamma: Callable[[Array], Array] | None = None
    span: tuple[float, float] = (0.0, 1.0)

    @property
    def source_scale(self) -> float:
        """Return ``alpha`` at the start of the path: a sampler starts from ``source_scale * x0``.

        1 for most paths, 50 for ``ve``, where ``beta_0 = 1`` and the data are small beside the noise.
        """
        with jax.ensure_compile_time_eval():
            return float(self.coefficients(jnp.float32(self.span[0]))[0])


def coefficients(path: Path, x: Array, t) -> tuple[Array, Array, Array, Array]:
    """Evaluate the coefficients of a path and their time derivatives.

    Args:
        path: the path.
        x: examples ``[B, ...]``; only the shape and type are used.
        t: times ``[B]`` or a scalar.

    Returns:
        ``(alpha, beta, d alpha/dt, d beta/dt)``, each ``[B, 1, ..., 1]``, to multiply ``x``.

    >>> from fmjax import paths
    >>> [c.item() for c in coefficients(paths.linear(), jnp.zeros((1, 2)), 0.25)]
    [0.75, 0.25, -1.0, 1.0]
    """
    t = expand(over_batch(t, x), x)
    (alpha, beta), (d_alpha, d_beta) = jax.jvp(path.coefficients, (t,), (jnp.ones_like(t),))
    return alpha, beta, d_alpha, d_beta


def latent(path: Path, x: Array, t) -> tuple[Array, Array]:
    """Evaluate the scale of the latent of a path and its time derivative.

    Args:
        path: a path with a latent.
        x: examples ``[B, ...]``; only the shape and type are used.
        t: times ``[B]`` or a scalar.

    Returns:
        ``(gamma, d gamma/dt)``, each ``[B, 1, ..., 1]``; the derivative of a Brownian latent is infinite at both ends.

    Raises:
        ValueError: the path has no latent.

    >>> from fmjax import paths
    >>> [c.item() for c in latent(paths.two_sided(), jnp.zeros((1, 2)), 0.5)]
    [0.5, 0.0]
    """
    if path.gamma is None:
        raise ValueError("path.gamma=None: the path has no latent. Use paths.two_sided or paths.schroedinger_bridge.")
    t = expand(over_batch(t, x), x)
    return jax.jvp(path.gamma, (t,), (jnp.ones_like(t),))


def latent_variance(path: Path, x: Array, t) -> tuple[Array, Array]:
    """Evaluate the variance ``gamma^2`` of the latent of a path and its time derivative.

    Args:
        path: any path.
        x: examples ``[B, ...]``; only the shape and type are used.
        t: times ``[B]`` or a scalar.

    Returns:
        ``(gamma^2, d gamma^2/dt)``, each ``[B, 1, ..., 1]``; finite at both ends, too, and zero without a latent.

    >>> from fmjax import paths
    >>> [c.item() for c in latent_variance(paths.two_sided(), jnp.zeros((1, 2)), 0.5)]
    [0.25, 0.0]
    """
    t = expand(over_batch(t, x), x)
    if path.gamma is None:
        return jnp.zeros_like(t), jnp.zeros_like(t)
    return jax.jvp(_square(path.gamma), (t,), (jnp.ones_like(t),))


def _square(gamma: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Return ``gamma^2`` with a finite derivative: at an end, where ``2 gamma gamma'`` is ``0 inf``, the limit."""

    @jax.custom_jvp
    def square(t):
        return jnp.square(gamma(t))

    @square.defjvp
    def _rate(primals, tangents):
        (t,), (dt,) = primals, tangents
        eps = jnp.finfo(t.dtype).eps
        inside = t + jax.lax.stop_gradient(jnp.clip(t, eps, 1 - eps) - t)
        return square(t), jax.jvp(lambda t: jnp.square(gamma(t)), (inside,), (dt,))[1]

    return square


def with_velocity(
    path: Path, x0: Float[Array, "b ..."], x1: Float[Array, "b ..."], t, z: Float[Array, "b ..."] | None = None
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Evaluate the interpolant and its time derivative, the regression target of flow matching.

    ``I_t = alpha x0 + beta x1``, ``dI_t = alpha' x0 + beta' x1``; with a latent plus ``gamma z`` and ``gamma' z``.

    Args:
        path: the path.
        x0: source ``[B, ...]``.
        x1: data ``[B, ...]``.
        t: times ``[B]`` or a scalar.
        z: latent ``[B, ...]``, drawn from ``N(0, I)``; exactly for paths with a latent.

    Returns:
        ``(I_t, dI_t)``, each ``[B, ...]``.

    Raises:
        ValueError: the path has a latent and ``z`` is missing, or the reverse.

    >>> from fmjax import paths
    >>> x, v = with_velocity(paths.linear(), jnp.zeros((1, 2)), jnp.ones((1, 2)), 0.25)
    >>> x.tolist(), v.tolist()
    ([[0.25, 0.25]], [[1.0, 1.0]])
    """
    if path.gamma is not None and z is None:
        raise ValueError("z=None: the path has a latent gamma(t) z. Give z ~ N(0, I) of the shape of x1.")
    if path.gamma is None and z is not None:
        raise ValueError("z=array: the path has no latent gamma(t) z. Leave z out.")
    alpha, beta, d_alpha, d_beta = coefficients(path, x1, t)
    x, velocity = alpha * x0 + beta * x1, d_alpha * x0 + d_beta * x1
    if z is None:
        return x, velocity
    gamma, d_gamma = latent(path, x1, t)
    return x + gamma * z, velocity + d_gamma * z


def latent_score(path: Path, z: Float[Array, "b ..."], t) -> Float[Array, "b ..."]:
    """Return the score ``grad log p_t(x) = -E[z | I_t = x] / gamma_t`` from the denoiser of the latent.

    True for any distribution of the pair ``(x0, x1)``; infinite at both ends, where ``gamma = 0`` (arXiv 2303.08797).

    Args:
        path: a path with a latent.
        z: the denoiser ``E[z | I_t = x]``, ``[B, ...]``.
        t: times ``[B]`` or a scalar.

    Returns:
        The score ``[B, ...]``.

    Raises:
        ValueError: the path has no latent.

    >>> from fmjax import paths
    >>> latent_score(paths.two_sided(), jnp.ones((1, 2)), 0.5).tolist()
    [[-2.0, -2.0]]
    """
    return -z / latent(path, z, t)[0]


def one_sided(path: Path) -> Path:
    """Merge the latent of a path into its source: ``alpha -> sqrt(alpha^2 + gamma^2)``.

    Only for a source ``x0 ~ N(0, I)`` independent of the data: then ``alpha x0 + gamma z`` is one Gaussian, and the new
    path has the same distributions and the same velocity. So ``convert`` and ``change`` apply to a velocity that was
    learned with the latent.

    Args:
        path: any path.

    Returns:
        A path without a latent; a path without a latent is returned unchanged.

    >>> from fmjax import paths
    >>> merged = one_sided(paths.two_sided())
    >>> merged.gamma is None, round(float(merged.coefficients(jnp.float32(0.5))[0]) ** 2, 4)
    (True, 0.5)
    """
    if path.gamma is None:
        return path
    square = _square(path.gamma)

    def merged(t):
        alpha, beta = path.coefficients(t)
        return jnp.sqrt(jnp.square(alpha) + square(t)), beta

    return Path(merged, span=path.span)


def refuse_latent(what: str, *several: Path) -> None:
    """Refuse paths with a latent, on behalf of a function that is defined by ``alpha`` and ``beta`` alone.

    Args:
        what: name of the function, for the message.
        several: the paths.

    Raises:
        ValueError: one of the paths has a latent.

    >>> from fmjax import paths
    >>> refuse_latent("convert", paths.linear())
    """
    if any(path.gamma is not None for path in several):
        raise ValueError(
            f"path with gamma: {what} needs a path without a latent. Learn the denoiser E[z|x] with "
            "methods.stochastic_interpolant or, for a source N(0, I) independent of the data, use paths.one_sided."
        )


def renoise(path: Path, x: Float[Array, "b ..."], z: Float[Array, "b ..."], t, earlier) -> Float[Array, "b ..."]:
    """Add noise to go back from ``t`` to an earlier time ``s`` of the path.

    ``x_s = c x + sqrt(alpha_s^2 - c^2 alpha_t^2) z`` with ``c = beta_s / beta_t``. Where ``x`` has the distribution of
    the path at ``t``, the result has its distribution at ``s``, for a source ``N(0, I)`` independent of the data.

    Args:
        path: the path; a latent is not used.
        x: states ``[B, ...]`` at time ``t``.
        z: fresh noise ``[B, ...]`` from ``N(0, I)``.
        t: times ``[B]`` or a scalar, where ``beta_t > 0``; elsewhere (``t = 0``) the result is ``nan``.
        earlier: the times ``s <= t``, ``[B]`` or a scalar.

    Returns:
        States ``[B, ...]`` at time ``s``.

    >>> from fmjax import paths
    >>> renoise(paths.linear(), jnp.ones((1, 2)), jnp.zeros((1, 2)), 1.0, 0.25).tolist()
    [[0.25, 0.25]]
    """
    alpha, beta, *_ = coefficients(path, x, t)
    alpha_s, beta_s, *_ = coefficients(path, x, earlier)
    kept = beta_s / beta
    return kept * x + jnp.sqrt(jnp.maximum(alpha_s**2 - (kept * alpha) ** 2, 0)) * z
