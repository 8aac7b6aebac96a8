"""Paths from source to data, ``I_t = alpha_t x0 + beta_t x1``, and all functions on paths.

The factories here make a ``Path``: ``linear``, ``trigonometric``, the diffusion schedules ``vp``, ``sub_vp``, ``ve``,
and paths with a latent ``+ gamma_t z``: Schroedinger bridges and two-sided stochastic interpolants. What a path
computes (``with_velocity``, ``score``, ``convert``, ``change``, ...) is written in ``fmjax.interpolants`` and
``fmjax.predictions`` and available here under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from fmjax import checks
from fmjax.checks import NonNegativeFloat, PositiveFloat
from fmjax.interpolants import (
    Path,
    coefficients,
    latent,
    latent_score,
    latent_variance,
    one_sided,
    refuse_latent,
    renoise,
    with_velocity,
)
from fmjax.predictions import PREDICTIONS, change, convert, endpoints, match_snr, score

__all__ = [
    "LATENTS", "PREDICTIONS", "Path", "change", "coefficients", "convert", "endpoints", "latent", "latent_score",
    "latent_variance", "linear", "match_snr", "one_sided", "refuse_latent", "renoise", "schroedinger_bridge", "score",
    "sub_vp", "target_conditional", "trigonometric", "two_sided", "ve", "vp", "with_velocity",
]  # fmt: skip

LATENTS: dict[str, Callable[[Array], Array]] = {
    "brownian": lambda t: jnp.sqrt(t * (1 - t)),
    "quadratic": lambda t: t * (1 - t),
    "sine_squared": lambda t: jnp.sin(jnp.pi * t) ** 2,
}
SCHEDULES: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "linear": lambda t: (1 - t, t),
    "trigonometric": lambda t: (jnp.cos(jnp.pi / 2 * t), jnp.sin(jnp.pi / 2 * t)),
}


def linear() -> Path:
    """Return the linear path ``I_t = (1 - t) x0 + t x1`` (flow matching, arXiv 2210.02747; rectified flow, 2209.03003).

    Returns:
        The path. All calls return equal paths, so that what is compiled for one serves all.

    >>> [c.item() for c in linear().coefficients(jnp.float32(0.25))]
    [0.75, 0.25]
    """
    return Path(SCHEDULES["linear"])


def trigonometric() -> Path:
    """Return the path ``I_t = cos(pi t / 2) x0 + sin(pi t / 2) x1``, which preserves the variance (arXiv 2303.08797).

    Returns:
        The path. All calls return equal paths.

    >>> [round(c.item(), 4) for c in trigonometric().coefficients(jnp.float32(0.5))]
    [0.7071, 0.7071]
    """
    return Path(SCHEDULES["trigonometric"])


def vp(*, beta_min: PositiveFloat = 0.1, beta_max: PositiveFloat = 20.0) -> Path:
    """Return the path of the variance-preserving SDE (arXiv 2011.13456, appendix C), with data at ``t = 1``.

    With ``tau = 1 - t``: ``beta_t = exp(-tau^2 (beta_max - beta_min) / 4 - tau beta_min / 2)``,
    ``alpha_t = sqrt(1 - beta_t^2)``.

    The path does not start in pure noise: ``beta_0 = exp(-(beta_min + beta_max) / 4)``, 0.0066 for the defaults. At
    ``t = 1`` the coefficients are (0, 1), but ``alpha'`` and the velocity are infinite (as ``(1 - t)^-1/2``): the span
    of the path ends at ``1 - 1e-3``, where the sampler of the paper ends.

    Args:
        beta_min: noise rate of the SDE at the data.
        beta_max: noise rate of the SDE at the source, at least ``beta_min``.

    Returns:
        The path, of span ``(0, 1 - 1e-3)``.

    Raises:
        ValueError: not ``0 < beta_min <= beta_max < inf``.

    >>> vp().span
    (0.0, 0.999)
    """
    log_beta = _vp_log_beta(beta_min, beta_max)
    schedule = lambda t: (jnp.sqrt(-jnp.expm1(2 * log_beta(t))), jnp.exp(log_beta(t)))
    return Path(schedule, span=(0.0, 1 - 1e-3))


def sub_vp(*, beta_min: PositiveFloat = 0.1, beta_max: PositiveFloat = 20.0) -> Path:
    """Return the path of the sub-VP SDE (arXiv 2011.13456, appendix C), with data at ``t = 1``.

    ``beta_t`` as in ``vp`` and ``alpha_t = 1 - beta_t^2``. As ``vp``, the path starts at
    ``beta_0 = exp(-(beta_min + beta_max) / 4)``; at ``t = 1`` all is finite.

    Args:
        beta_min: noise rate of the SDE at the data.
        beta_max: noise rate of the SDE at the source, at least ``beta_min``.

    Returns:
        The path.

    Raises:
        ValueError: not ``0 < beta_min <= beta_max < inf``.

    >>> [c.item() for c in sub_vp().coefficients(jnp.float32(1.0))]
    [0.0, 1.0]
    """
    log_beta = _vp_log_beta(beta_min, beta_max)
    return Path(lambda t: (-jnp.expm1(2 * log_beta(t)), jnp.exp(log_beta(t))))


def _vp_log_beta(beta_min: float, beta_max: float) -> Callable[[Array], Array]:
    checks.check_range("beta_min", beta_min, checks.Range(0, math.inf, open_low=True))
    checks.check_range("beta_max", beta_max, checks.Range(beta_min))
    return lambda t: -((1 - t) ** 2) * (beta_max - beta_min) / 4 - (1 - t) * beta_min / 2


def ve(*, sigma_min: PositiveFloat = 0.01, sigma_max: PositiveFloat = 50.0) -> Path:
    """Return the path of the variance-exploding SDE (arXiv 2011.13456, appendix C), with data at ``t = 1``.

    ``beta_t = 1``, ``alpha_t = sigma_min (sigma_max / sigma_min)^(1 - t)``: noise is added, and the data keep their
    scale. The path reaches neither end: ``I_0 = x1 + sigma_max x0``, so that a sampler starts from ``sigma_max x0``
    (``path.source_scale``), and ``I_1`` is data with noise ``sigma_min``.

    Args:
        sigma_min: noise level at ``t = 1``.
        sigma_max: noise level at ``t = 0``, above ``sigma_min``.

    Returns:
        The path.

    Raises:
        ValueError: not ``0 < sigma_min < sigma_max < inf``.

    >>> round(ve().source_scale, 3)
    50.0
    """
    checks.check_range("sigma_min", sigma_min, checks.Range(0, math.inf, open_low=True))
    checks.check_range("sigma_max", sigma_max, checks.Range(sigma_min, math.inf, open_low=True))
    return Path(lambda t: (sigma_min * (sigma_max / sigma_min) ** (1 - t), jnp.ones_like(t)))


def target_conditional(*, sigma_min: NonNegativeFloat = 1e-4) -> Path:
    """Return the path of conditional flow matching, ``alpha_t = 1 - (1 - sigma_min) t`` and ``beta_t = t``.

    Source at ``t = 0``, data with noise ``sigma_min`` at ``t = 1`` (arXiv 2210.02747, eq. 20).

    Args:
        sigma_min: noise level at ``t = 1``, in [0, 1); 0 is the linear path.

    Returns:
        The path.

    Raises:
        ValueError: ``sigma_min`` outside [0, 1).

    >>> [round(c.item(), 4) for c in target_conditional(sigma_min=0.1).coefficients(jnp.float32(1.0))]
    [0.1, 1.0]
    """
    checks.check_range("sigma_min", sigma_min, checks.Range(0, 1, open_high=True))
    return Path(lambda t: (1 - (1 - sigma_min) * t, t))


def schroedinger_bridge(*, sigma: PositiveFloat = 1.0) -> Path:
    """Return Brownian bridges of diffusion ``sigma`` between the pair: linear, ``gamma_t = sigma sqrt(t (1 - t))``.

    SB-CFM (arXiv 2302.00482, eq. 20) and [SF]2M (2307.03672): with pairs of the entropic plan of regularisation
    ``2 sigma^2`` the distribution of ``I_t`` is the Schroedinger bridge. The path is ``two_sided(scale=sigma)``; the
    remarks there on the ends apply.

    Args:
        sigma: diffusion of the bridge.

    Returns:
        A path with a latent.

    Raises:
        ValueError: ``sigma`` is not positive and finite.

    >>> schroedinger_bridge(sigma=2.0).gamma(jnp.float32(0.5)).item()
    1.0
    """
    checks.check_range("sigma", sigma, checks.Range(0, math.inf, open_low=True))
    return two_sided(scale=sigma)


def two_sided(*, latent: str = "brownian", scale: PositiveFloat = 1.0, schedule: str = "linear") -> Path:
    """Return a two-sided stochastic interpolant ``alpha_t x0 + beta_t x1 + gamma_t z`` (arXiv 2303.08797).

    The derivative ``gamma'`` of the Brownian latent is infinite at both ends, and so is ``dI_t`` (``I_t`` is exact):
    the variance of the regression target grows as ``scale^2 / 4t``. Training times must keep away from the ends
    (``times.interior``). The velocity itself stays finite, ``E[gamma' z | x] = -gamma gamma' S`` with the score ``S``.

    Args:
        latent: ``gamma_t / scale``: ``"brownian"`` is ``sqrt(t (1 - t))``, ``"quadratic"`` is ``t (1 - t)``,
            ``"sine_squared"`` is ``sin^2(pi t)``.
        scale: scale of the latent. (Without a latent use the path of the schedule.)
        schedule: ``alpha`` and ``beta``: ``"linear"`` or ``"trigonometric"``.

    Returns:
        A path with a latent.

    Raises:
        ValueError: ``scale`` is not positive and finite; ``latent`` or ``schedule`` is unknown.

    >>> two_sided(latent="quadratic").gamma(jnp.float32(0.5)).item()
    0.25
    """
    checks.check_choice("latent", latent, tuple(LATENTS))
    checks.check_choice("schedule", schedule, tuple(SCHEDULES))
    checks.check_range("scale", scale, checks.Range(0, math.inf, open_low=True))
    return Path(SCHEDULES[schedule], gamma=lambda t: scale * LATENTS[latent](t))
