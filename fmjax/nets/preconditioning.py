"""Denoisers of a network, ``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)``, and denoisers as velocities.

EDM's state is ``x1 + sigma x0`` (arXiv 2206.00364). Its denoiser is a denoiser of the linear path at
``t = 1 / (1 + sigma)``:

    net = preconditioned(from_linen(SongUNet(...)).net, edm())     # a network whose diagonal is the velocity

In a config a preconditioner is an option of any network: ``{"name": "song_unet", "preconditioning": "edm", ...}``.
These names are selected within this module: ``preconditioning.vp`` and ``paths.vp`` are different functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.checks import PositiveFloat, Range, check_hints
from fmjax.types import Net, Network, expand, network, over_batch

Coefficients = tuple[Array, Array, Array, Array]
Denoiser = Callable[..., Array]
Steps = Annotated[int, Range(1, 100_000)]
Rate = Annotated[float, Range(0, 400, open_low=True)]


class Preconditioner(NamedTuple):
    """The coefficients of a denoiser, and the noise levels at which its network was trained.

    Attributes:
        coefficients: ``coefficients(sigma) -> (c_skip, c_out, c_in, c_noise)``, elementwise.
        sigma_min: lowest noise level.
        sigma_max: highest noise level.
    """

    coefficients: Callable[[Array], Coefficients]
    sigma_min: float
    sigma_max: float


def edm(
    *, sigma_data: PositiveFloat = 0.5, sigma_min: PositiveFloat = 0.002, sigma_max: PositiveFloat = 80.0
) -> Preconditioner:
    """Return EDM's preconditioner: ``c_skip = d^2 / r^2``, ``c_out = sigma d / r``, ``c_in = 1 / r``.

    ``c_noise = ln(sigma) / 4``, ``r^2 = sigma^2 + d^2`` and ``d = sigma_data``: inputs and targets of the network have
    variance one.

    Args:
        sigma_data: standard deviation of the data.
        sigma_min: lowest noise level.
        sigma_max: highest noise level.

    Returns:
        The preconditioner.

    Raises:
        ValueError: an argument is not positive, or ``sigma_min >= sigma_max``.

    Source: arXiv 2206.00364, table 1.
    """
    check_hints(edm, {"sigma_data": sigma_data})

    def coefficients(sigma):
        total = sigma**2 + sigma_data**2
        root = jnp.sqrt(total)
        return sigma_data**2 / total, sigma * sigma_data / root, 1 / root, jnp.log(sigma) / 4

    return _preconditioner(coefficients, sigma_min, sigma_max)


def vp(
    *,
    beta_min: Rate = 0.1,
    beta_d: Rate = 19.9,
    steps: Steps = 1000,
    epsilon: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 1e-5,
) -> Preconditioner:
    """Return the preconditioner of a noise prediction of the VP SDE: ``c_skip = 1``, ``c_out = -sigma``.

    ``c_in = 1 / sqrt(sigma^2 + 1)`` and ``c_noise = (steps - 1) tau``, where ``tau`` is the SDE's time of the level
    ``sigma = sqrt(exp(beta_d tau^2 / 2 + beta_min tau) - 1)``.

    Args:
        beta_min: rate of the SDE at ``tau = 0``.
        beta_d: increase of the rate from ``tau = 0`` to ``tau = 1``.
        steps: number of noise labels of the network.
        epsilon: time of the lowest noise level; the highest has ``tau = 1``.

    Returns:
        The preconditioner.

    Raises:
        ValueError: an argument is outside its range.

    Source: arXiv 2206.00364, table 1.
    """
    check_hints(vp, {"beta_min": beta_min, "beta_d": beta_d, "steps": steps, "epsilon": epsilon})
    sigma_of = lambda tau: math.sqrt(math.expm1(beta_d * tau**2 / 2 + beta_min * tau))

    def coefficients(sigma):
        tau = (jnp.sqrt(beta_min**2 + 2 * beta_d * jnp.log1p(sigma**2)) - beta_min) / beta_d
        return jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), (steps - 1) * tau

    return _preconditioner(coefficients, sigma_of(epsilon), sigma_of(1.0))


def ve(*, sigma_min: PositiveFloat = 0.02, sigma_max: PositiveFloat = 100.0) -> Preconditioner:
    """Return the preconditioner of the VE SDE: ``c_skip = 1``, ``c_out = sigma``, ``c_in = 1``.

    ``c_noise = ln(sigma / 2)``; the network predicts the score.

    Args:
        sigma_min: lowest noise level.
        sigma_max: highest noise level.

    Returns:
        The preconditioner.

    Raises:
        ValueError: a level is not positive, or ``sigma_min >= sigma_max``.

    Source: arXiv 2206.00364, table 1.
    """

    def coefficients(sigma):
        return jnp.ones_like(sigma), sigma, jnp.ones_like(sigma), jnp.log(sigma / 2)

    return _preconditioner(coefficients, sigma_min, sigma_max)


def iddpm(*, steps: Steps = 1000, least_ratio: PositiveFloat = 0.001, shift: PositiveFloat = 0.008) -> Preconditioner:
    """Return the preconditioner of improved DDPM: as ``vp``, but ``c_noise`` is the step of the nearest noise level.

    The levels are ``u_steps = 0`` and ``u_(j-1)^2 = (u_j^2 + 1) / max(a_(j-1) / a_j, least_ratio) - 1`` with
    ``a_j = sin^2(pi / 2 j / (steps (1 + shift)))``; the level nearest to ``sigma`` has ``c_noise = steps - 1 - j``. The
    network is therefore constant between levels in its second input, and its derivative in time is zero there.

    Args:
        steps: number of noise levels.
        least_ratio: least ratio of consecutive ``a_j``.
        shift: offset of the cosine schedule.

    Returns:
        The preconditioner.

    Raises:
        ValueError: an argument is outside its range.

    Source: arXiv 2206.00364, table 1 and appendix C.3.4.
    """
    check_hints(iddpm, {"steps": steps, "least_ratio": least_ratio, "shift": shift})
    a = np.sin(np.pi / 2 * np.arange(steps + 1) / (steps * (1 + shift))) ** 2
    u = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(a[j - 1] / a[j], least_ratio) - 1)

    def coefficients(sigma):
        nearest = jnp.argmin(jnp.abs(sigma[..., None] - jnp.asarray(u, sigma.dtype)), -1)
        label = (steps - 1 - nearest).astype(sigma.dtype)
        return jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), label

    return _preconditioner(coefficients, float(u[steps - 1]), float(u[0]))


def preconditioned_denoiser(net: Net, preconditioner: Preconditioner) -> Denoiser:
    """Return the denoiser of a network, an estimate of ``E[x1 | x]`` at ``x = x1 + sigma x0``.

    Args:
        net: the network ``F``, evaluated at ``c_in x`` and at the "times" ``c_noise`` and ``c_noise + jump``.
        preconditioner: the coefficients; its range of noise levels is not used.

    Returns:
        ``denoise(params, x, sigma, cond=None, key=None, jump=0.0) -> [B, ...]`` with ``sigma: [B]``.
    """

    def denoise(params, x, sigma, cond=None, key=None, jump=0.0):
        sigma = over_batch(sigma, x)
        skip, out, scale, label = preconditioner.coefficients(sigma)
        f = net(params, expand(scale, x) * x, label, label + jump, cond, key)
        return expand(skip, x) * x + expand(out, x) * f

    return denoise


def preconditioned(net: Net, preconditioner: Preconditioner) -> Network:
    """Return the denoiser of a network as a network on the linear path, with the velocity on its diagonal.

    ``v(x, t) = (D(x / t; sigma) - x) / (1 - t)`` with ``sigma = (1 - t) / t``, for noise levels in the
    preconditioner's range. For ``t < 1 / (1 + sigma_max)`` the denoiser ``D`` is evaluated at ``sigma_max``; beyond
    ``1 / (1 + sigma_min)`` the noise ``(x - D) / sigma`` is evaluated at ``sigma_min``. The velocity is finite at both
    ends, with errors of ``O(1 / sigma_max)`` and ``O(sigma_min)`` there. To stay in the range, start at
    ``t = 1 / (1 + sigma_max)`` from ``(1 - t) x0`` (``sampling.edm_grid``).

    The network gets the jump ``t - s`` unchanged, in the time of the linear path. On another path the result is a
    parametrisation and not the velocity; ``paths.change`` carries the velocity there.

    Args:
        net: the network ``F``.
        preconditioner: coefficients and range of noise levels.

    Returns:
        The network; its ``for_jvp`` is preconditioned too.
    """

    def average(net):
        denoise = preconditioned_denoiser(net, preconditioner)

        def apply(params, x, s, t, cond=None, key=None):
            s, t = over_batch(s, x), over_batch(t, x)
            at = lambda x, sigma: denoise(params, x, sigma, cond, key, t - s)
            return _velocity(at, x, s, preconditioner.sigma_min, preconditioner.sigma_max)

        return apply

    return network(net).wrap(average)


def _velocity(denoise: Callable[[Array, Array], Array], x: Array, t: Float[Array, " b"], low: float, high: float):
    """Return ``v = (D - x) / alpha`` in the noisy half, ``(x - e) / beta`` in the other; ``x = alpha e + beta D``."""
    within = jnp.clip(t, 1 / (1 + high), 1 / (1 + low))
    sigma, early = (1 - within) / within, t < 0.5
    alpha, beta = jnp.where(early, 1 - t, 1.0), jnp.where(early, 1.0, t)  # 1 where the half is not used
    scale = jnp.where(early, alpha / sigma, beta)  # (1 - t, t) = scale (sigma, 1), except at the ends
    alpha, beta, early, scale, level = (expand(a, x) for a in (alpha, beta, early, scale, sigma))
    data = denoise(x / scale, sigma)
    return jnp.where(early, (data - x) / alpha, (x - (x / scale - data) / level) / beta)


def _preconditioner(coefficients: Callable[[Array], Coefficients], low: float, high: float) -> Preconditioner:
    check_hints(edm, {"sigma_min": low, "sigma_max": high})
    if low >= high:
        raise ValueError(f"sigma_min={low}: not below sigma_max={high}. Give 0 < sigma_min < sigma_max.")
    return Preconditioner(coefficients, low, high)
