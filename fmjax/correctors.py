"""Corrections of a sample at one time, to interleave with solver steps: ``corrector(key, x, t, cond) -> (x, info)``.

``info["noised"]`` is the state after the noise and before the push (what a parallel sampler steps from);
``info["moved"]: [B]`` is the root-mean-square displacement of the push.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from fmjax import paths
from fmjax.types import Corrector, DirectionFn, VelocityFn, expand, normal, over_batch, split


def _at(value: float | Callable[[Array], Array], t: Array, x: Array) -> Array | float:
    return expand(value(t), x) if callable(value) else value


def _rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.reshape(x.shape[0], -1)), 1))


def marginal_matching(
    direction: DirectionFn,
    *,
    alpha: float | Callable[[Array], Array],
    beta: float | Callable[[Array], Array] = 0.0,
) -> Corrector:
    """Marginal matching: ``x~ = x + beta z``, then ``x' = x~ + alpha h(x~, t)`` (OpenReview kRjLBXWn1T, Algorithm 1).

    ``direction`` is ``h`` in displacement units (for a score corrector ``h = sigma^2 S``, so that ``alpha = 1`` is
    Tweedie's step, ``alpha = 1/2`` the W2-matched one, and ``beta = sigma, alpha = 1/2`` a Langevin step that leaves
    the backward marginal fixed). ``alpha`` and ``beta`` are numbers or functions of the time ``[B]``. ``beta = 0``
    draws no noise at all. Raises ``ValueError`` for a negative ``beta``.
    """
    if not callable(beta) and beta < 0:
        raise ValueError(f"beta is a standard deviation and cannot be negative, got {beta}")

    def correct(key, x, t, cond=None):
        t = over_batch(t, x)
        noised = x
        if callable(beta) or beta != 0:
            noised = x + _at(beta, t, x) * normal(key, x.shape[1:], x.dtype)
        if not callable(alpha) and alpha == 0:
            return noised, {"noised": noised, "moved": jnp.zeros(x.shape[0])}
        push = _at(alpha, t, x) * direction(noised, t, cond)
        return noised + push, {"noised": noised, "moved": _rms(push)}

    return correct


def langevin(score: DirectionFn, *, step: float | Callable[[Array], Array], steps: int = 1) -> Corrector:
    """Unadjusted Langevin: ``x <- x + h S(x, t) + sqrt(2 h) z``, ``steps`` times, ``S`` the score of the law at ``t``.

    Stationary at the law whose score is ``S`` up to the discretisation (for ``N(0, b^2)`` the stationary variance is
    ``b^2 / (1 - h / (2 b^2))``). ``step`` is ``h`` in units of squared displacement, a number or a function of time.
    Raises ``ValueError`` for ``h <= 0`` or ``steps < 1``.
    """
    if not callable(step) and step <= 0:
        raise ValueError(f"the Langevin step must be positive, got {step}")
    if steps < 1:
        raise ValueError(f"langevin needs at least one step, got steps={steps}")

    def correct(key, x, t, cond=None):
        t = over_batch(t, x)
        h = _at(step, t, x)
        start = x
        for k in split(key, steps):
            x = x + h * score(x, t, cond) + jnp.sqrt(2 * h) * normal(k, x.shape[1:], x.dtype)
        return x, {"moved": _rms(x - start)}

    return correct


def score_of(velocity: VelocityFn, *, path: paths.Path | None = None) -> DirectionFn:
    """The score of the law at ``t < 1`` from the velocity itself (``paths.score``): no second network."""
    path = path or paths.linear()
    return lambda x, t, cond=None: paths.score(path, x, velocity(x, t, cond), t)
