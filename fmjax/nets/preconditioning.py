"""Networks as denoisers ``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)``, and denoisers as velocities.

EDM's state is ``x1 + sigma x0`` (arXiv 2206.00364); its denoiser is one of the linear path at ``t = 1 / (1 + sigma)``:

    net = preconditioned(from_linen(SongUNet(...)).net, edm())     # a Net whose diagonal is the velocity

In a config it is an option of any network: ``{"name": "song_unet", "preconditioning": "edm", ...}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.types import Net, expand, over_batch

Coefficients = tuple[Array, Array, Array, Array]
Denoiser = Callable[..., Array]


class Preconditioner(NamedTuple):
    """``coefficients(sigma) -> (c_skip, c_out, c_in, c_noise)`` for noise levels ``sigma_min .. sigma_max``."""

    coefficients: Callable[[Array], Coefficients]
    sigma_min: float
    sigma_max: float


def edm(*, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Preconditioner:
    """EDM's own: ``c_skip = d^2 / r^2``, ``c_out = sigma d / r``, ``c_in = 1 / r``, ``c_noise = ln(sigma) / 4``.

    ``r^2 = sigma^2 + d^2``, ``d = sigma_data`` the standard deviation of the data: inputs and targets of the network
    have variance one (arXiv 2206.00364, table 1). Raises ``ValueError`` unless ``sigma_data > 0`` and
    ``0 < sigma_min < sigma_max``.
    """
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"edm needs sigma_data > 0, the standard deviation of the data, got {sigma_data}")

    def coefficients(sigma):
        total = sigma**2 + sigma_data**2
        root = jnp.sqrt(total)
        return sigma_data**2 / total, sigma * sigma_data / root, 1 / root, jnp.log(sigma) / 4

    return _checked("edm", coefficients, sigma_min, sigma_max)


def vp(*, beta_min: float = 0.1, beta_d: float = 19.9, steps: int = 1000, epsilon: float = 1e-5) -> Preconditioner:
    """A noise prediction of the VP SDE: ``c_skip = 1``, ``c_out = -sigma``, ``c_in = 1 / sqrt(sigma^2 + 1)``.

    ``c_noise = (steps - 1) tau``, ``tau`` the SDE's time of ``sigma = sqrt(exp(beta_d tau^2 / 2 + beta_min tau) - 1)``,
    from ``epsilon`` to 1 (arXiv 2206.00364, table 1). Raises ``ValueError`` for levels that do not rise.
    """
    sigma_of = lambda tau: math.sqrt(math.expm1(beta_d * tau**2 / 2 + beta_min * tau))

    def coefficients(sigma):
        tau = (jnp.sqrt(beta_min**2 + 2 * beta_d * jnp.log1p(sigma**2)) - beta_min) / beta_d
        return jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), (steps - 1) * tau

    return _checked("vp", coefficients, sigma_of(epsilon), sigma_of(1.0))


def ve(*, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Preconditioner:
    """The score of the VE SDE: ``c_skip = 1``, ``c_out = sigma``, ``c_in = 1``, ``c_noise = ln(sigma / 2)``.

    arXiv 2206.00364, table 1. Raises ``ValueError`` unless ``0 < sigma_min < sigma_max``.
    """
    return _checked(
        "ve",
        lambda sigma: (jnp.ones_like(sigma), sigma, jnp.ones_like(sigma), jnp.log(sigma / 2)),
        sigma_min,
        sigma_max,
    )


def iddpm(*, steps: int = 1000, least_ratio: float = 0.001, shift: float = 0.008) -> Preconditioner:
    """The noise prediction of improved DDPM: ``vp``'s but for ``c_noise``, its step ``steps - 1 - j`` of level ``u_j``.

    ``u_steps = 0``, ``u_(j-1)^2 = (u_j^2 + 1) / max(a_(j-1) / a_j, least_ratio) - 1`` with ``a_j = sin^2(pi / 2 j /
    (steps (1 + shift)))``; ``j`` is that of the level nearest to ``sigma`` (arXiv 2206.00364, table 1 and appendix
    C.3.4). So the network is constant between levels in its second input, and no derivative in time sees it.
    """
    a = np.sin(np.pi / 2 * np.arange(steps + 1) / (steps * (1 + shift))) ** 2
    u = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(a[j - 1] / a[j], least_ratio) - 1)

    def coefficients(sigma):
        nearest = jnp.argmin(jnp.abs(sigma[..., None] - jnp.asarray(u, sigma.dtype)), -1)
        label = (steps - 1 - nearest).astype(sigma.dtype)
        return jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), label

    return _checked("iddpm", coefficients, float(u[steps - 1]), float(u[0]))


def denoiser(net: Net, how: Preconditioner) -> Denoiser:
    """``D(params, x, sigma, cond=None, key=None, jump=0.0)``: ``E[x1 | x]`` at ``x = x1 + sigma x0``, ``sigma: [B]``.

    The network sees ``c_in x`` at the "times" ``c_noise`` and ``c_noise + jump``; any level is taken as it is.
    """

    def denoise(params, x, sigma, cond=None, key=None, jump=0.0):
        sigma = over_batch(sigma, x)
        skip, out, scale, label = how.coefficients(sigma)
        f = net(params, expand(scale, x) * x, label, label + jump, cond, key)
        return expand(skip, x) * x + expand(out, x) * f

    return denoise


def preconditioned(net: Net, how: Preconditioner) -> Net:
    """The denoiser of a network as a ``Net`` on the linear path, the velocity on its diagonal.

    ``v(x, t) = (D(x / t; sigma) - x) / (1 - t)``, ``sigma = (1 - t) / t``, for ``sigma`` in the preconditioner's range.
    Before it (``t < 1 / (1 + sigma_max)``) ``D`` is that of ``sigma_max``, beyond it the noise ``(x - D) / sigma`` is
    that of ``sigma_min``: finite at both ends, off by ``O(1 / sigma_max)`` and ``O(sigma_min)`` there. To stay within
    the range start at that ``t`` from ``(1 - t) x0`` (``schedules.edm_grid``).

    The jump goes to the network as it is: that of ``t - s``, in the linear path's time. On another path it is a
    parametrisation like others, and not the velocity; ``paths.change`` carries its velocity there.
    """

    def make(net: Net) -> Net:
        denoise = denoiser(net, how)

        def average(params, x, s, t, cond=None, key=None):
            s, t = over_batch(s, x), over_batch(t, x)
            at = lambda x, sigma: denoise(params, x, sigma, cond, key, t - s)
            return _velocity(at, x, s, how.sigma_min, how.sigma_max)

        return average

    made = make(net)
    if hasattr(net, "with_jvp"):
        made.with_jvp = make(net.with_jvp)
    return made


def _velocity(denoise: Callable[[Array, Array], Array], x: Array, t: Float[Array, " b"], low: float, high: float):
    """``v = (D - x) / alpha`` in the noisy half, ``(x - e) / beta`` in the other; ``x = alpha e + beta D``."""
    within = jnp.clip(t, 1 / (1 + high), 1 / (1 + low))
    sigma, early = (1 - within) / within, t < 0.5
    alpha, beta = jnp.where(early, 1 - t, 1.0), jnp.where(early, 1.0, t)  # of the half that is not taken: no matter
    scale = jnp.where(early, alpha / sigma, beta)  # (1 - t, t) = scale (sigma, 1), but for the ends
    alpha, beta, early, scale, level = (expand(a, x) for a in (alpha, beta, early, scale, sigma))
    data = denoise(x / scale, sigma)
    return jnp.where(early, (data - x) / alpha, (x - (x / scale - data) / level) / beta)


def _checked(name: str, coefficients: Callable[[Array], Coefficients], low: float, high: float) -> Preconditioner:
    _check_range(name, low, high)
    return Preconditioner(coefficients, low, high)


def _check_range(name: str, low: float, high: float) -> None:
    if not 0 < low < high < math.inf:
        raise ValueError(f"{name} needs noise levels 0 < sigma_min < sigma_max, got {low} and {high}")
