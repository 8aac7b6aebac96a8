"""EDM: a preconditioned denoiser, trained evenly over noise levels, which is a velocity of the linear path."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net, expand, over_batch


def edm(
    net: Net,
    *,
    path: paths.Path | None = None,
    sigma_data: float = 0.5,
    time=functools.partial(times.noise_level, mean=-1.2, std=1.2),
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Method:
    """``E lambda(sigma) |D(x1 + sigma x0; sigma) - x1|^2``, ``lambda = 1 / c_out^2`` (arXiv 2206.00364).

    ``D(y; sigma) = c_skip y + c_out F(c_in y; c_noise)``, ``log sigma ~ N(-1.2, 1.2^2)``; ``sigma_data`` is the data's
    standard deviation, as fed. ``t = 1 / (1 + sigma)`` and ``x = t y`` make ``D`` a velocity of the linear path,
    ``v = (D - x) / (1 - t)``: see ``preconditioned``, the net that flow maps start from. The loss is the unit-variance
    ``|F - F*|^2`` that EDM calls for, in which ``|v - dI_t|^2`` counts ``((1 - t)^2 / sigma_data^2 + t^2)`` times.

    ``velocity`` and ``score`` are those on ``path``, linear by default, after ``paths.change``: the path is of no
    consequence to the training. ``time`` is a law of times of the linear path. ``aux``: ``t`` and ``residual``, the
    squared error of the velocity. Raises ``ValueError`` for ``sigma_data <= 0``, levels that are not ``0 < sigma_min <
    sigma_max`` and a path with a latent.
    """
    linear = paths.linear()
    flow = preconditioned(net, sigma_data=sigma_data, sigma_min=sigma_min, sigma_max=sigma_max)
    paths.refuse_latent("edm", path or linear)

    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x, u = c.interpolant(linear, k_x, batch, t)
        residual = c.mse(flow(params, x, t, t, batch.cond, k_net), u)
        return c.reduce(((1 - t) ** 2 / sigma_data**2 + t**2) * residual, t=t, residual=residual)

    straight = c.diagonal(flow)
    velocity = straight if path is None else lambda params: paths.change(straight(params), linear, path)
    return Method(loss, velocity=velocity, score=c.score(path or linear, velocity))


def preconditioned(net: Net, *, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Net:
    """EDM's network ``F`` as a ``Net`` whose diagonal is the velocity on the linear path.

    With ``sigma = (1 - t) / t``, ``C = (1 - t)^2 + sigma_data^2 t^2`` (the variance of ``x`` for data of variance
    ``sigma_data^2``), what ``(c_skip x / t + c_out F(c_in x / t; log(sigma) / 4) - x) / (1 - t)`` comes to is

    ``v(x, t) = C' / (2 C) x + sigma_data / sqrt(C) F(x / sqrt(C); log(sigma) / 4)``,

    the exact velocity of such Gaussian data and a correction of unit variance; finite at both ends, where the level
    that ``F`` is told stays within ``[sigma_min, sigma_max]``. The parameters are those of ``F``. Off the diagonal
    ``F`` is told both levels: a jump is one Euler step where it ignores the second. Raises ``ValueError`` as ``edm``.
    """
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data={sigma_data}, the standard deviation of the data, must be positive")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"noise levels need 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, {sigma_max=}")

    def told(t):
        return jnp.log(jnp.clip((1 - t) / jnp.maximum(t, jnp.finfo(t.dtype).tiny), sigma_min, sigma_max)) / 4

    def flow(params, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        at = expand(s, x).astype(x.dtype)
        var = (1 - at) ** 2 + (sigma_data * at) ** 2
        half_rate = sigma_data**2 * at - (1 - at)  # C' / 2
        f = net(params, x / jnp.sqrt(var), told(s), told(t), cond, key)
        return half_rate / var * x + sigma_data / jnp.sqrt(var) * f

    return flow
