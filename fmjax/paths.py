"""Interpolants ``I_t = alpha_t x0 + beta_t x1`` and everything one solve gives from them: data, noise and score.

Derivatives of the coefficients come from ``jax.jvp``; conversions come from one 2x2 solve (``endpoints``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.types import expand, over_batch


class Path(NamedTuple):
    """An interpolant: ``coefficients(t) -> (alpha_t, beta_t)``, ``(1, 0)`` at ``t = 0`` and ``(0, 1)`` at ``t = 1``."""

    coefficients: Callable[[Array], tuple[Array, Array]]


def linear() -> Path:
    """The linear path ``I_t = (1 - t) x0 + t x1`` (flow matching, arXiv 2210.02747; rectified flow, 2209.03003)."""
    return Path(lambda t: (1 - t, t))


def trigonometric() -> Path:
    """The variance-preserving path ``I_t = cos(pi t / 2) x0 + sin(pi t / 2) x1`` (arXiv 2303.08797)."""
    return Path(lambda t: (jnp.cos(jnp.pi / 2 * t), jnp.sin(jnp.pi / 2 * t)))


def coefficients(path: Path, x: Array, t) -> tuple[Array, Array, Array, Array]:
    """``(alpha, beta, d alpha/dt, d beta/dt)`` at ``t: [B]``, each shaped to multiply ``x: [B, ...]``."""
    t = expand(over_batch(t, x), x)
    (alpha, beta), (d_alpha, d_beta) = jax.jvp(path.coefficients, (t,), (jnp.ones_like(t),))
    return alpha, beta, d_alpha, d_beta


def with_velocity(
    path: Path, x0: Float[Array, "b ..."], x1: Float[Array, "b ..."], t
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """The interpolant and its time derivative: ``I_t = alpha x0 + beta x1``, ``dI_t = alpha' x0 + beta' x1``."""
    alpha, beta, d_alpha, d_beta = coefficients(path, x1, t)
    return alpha * x0 + beta * x1, d_alpha * x0 + d_beta * x1


def endpoints(
    path: Path, x: Float[Array, "b ..."], v: Float[Array, "b ..."], t
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Noise and data predictions ``(E[x0 | x], E[x1 | x])`` of a velocity ``v = E[dI_t | I_t = x]``.

    The solution of ``[alpha, beta; alpha', beta'] [x0; x1] = [x; v]`` by Cramer's rule; its determinant, the Wronskian
    ``alpha beta' - alpha' beta``, is 1 for the linear path and ``pi/2`` for the trigonometric one, at every ``t``.
    """
    alpha, beta, d_alpha, d_beta = coefficients(path, x, t)
    wronskian = alpha * d_beta - d_alpha * beta
    return (d_beta * x - beta * v) / wronskian, (alpha * v - d_alpha * x) / wronskian


def score(path: Path, x: Float[Array, "b ..."], v: Float[Array, "b ..."], t) -> Float[Array, "b ..."]:
    """The score ``grad log p_t(x) = -E[x0 | x] / alpha_t`` of a velocity with source ``N(0, I)``.

    Infinite at ``t = 1``, where ``alpha_t = 0``: the score of the data law is not in the velocity.
    """
    noise, _ = endpoints(path, x, v, t)
    alpha, *_ = coefficients(path, x, t)
    return -noise / alpha
