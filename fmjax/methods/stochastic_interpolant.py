"""Stochastic interpolants: the velocity and the latent's denoiser, and with it the score, learned together."""

from __future__ import annotations

import jax.numpy as jnp

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net, over_batch

MARGIN = 1e-3


def stochastic_interpolant(
    net: Net, *, path: paths.Path | None = None, time=times.interior, weight: float = 1.0, antithetic: bool = False
) -> Method:
    """Velocity and denoiser of a path with a latent, ``E |v - dI_t|^2 + weight |n - z|^2`` (arXiv 2303.08797).

    ``I_t = alpha x0 + beta x1 + gamma z``, ``paths.two_sided()`` by default; the source ``batch.x0`` may have any law
    and any coupling (without it N(0, I) is drawn). The net has two heads: of its ``2 C`` last channels the first
    ``C`` are the velocity ``v = E[dI_t | I_t]``, the others the denoiser ``n = E[z | I_t]``, of size one at every
    time, where the score ``S = -n / gamma`` is infinite at the ends. The gradients are those of the source's losses,
    ``E[|v|^2 / 2 - dI_t v]`` and ``E[|n|^2 / 2 - z n]``, times two and divided by the number of elements.

    [SF]2M (arXiv 2307.03672) is this with ``paths.schroedinger_bridge(sigma)`` and pairs of the entropic plan of
    regularisation ``2 sigma^2``: its loss ``|lambda s + z|^2``, ``lambda = 2 gamma / sigma^2``, for
    ``s = sigma^2 S / 2`` is ``|n - z|^2``. Its SDE is ``sampling.euler_maruyama(velocity, score=score,
    strength=sigma)``; other strengths work too, best with zeros at both ends.

    ``antithetic`` averages over ``z`` and ``-z``: twice the evaluations, and the part of the gradient that grows as
    ``gamma'`` near the ends cancels. ``score`` is asked at the nearest time of ``[1e-3, 1 - 1e-3]``. ``aux``: ``t``
    and the errors ``velocity`` and ``denoiser``. Raises ``ValueError`` for a path without a latent, ``weight <= 0``,
    times that reach the infinite ends of a path, and a net without two heads.
    """
    path = path or paths.two_sided()
    if path.gamma is None:
        raise ValueError(
            "stochastic_interpolant learns the denoiser of a path's latent, and this path has none: use two_sided or "
            "schroedinger_bridge, or flow_matching, whose velocity has the score in it"
        )
    if not weight > 0:
        raise ValueError(f"the denoiser's weight must be positive, got {weight}; for the velocity alone: flow_matching")
    c.check_times(path, time)

    def heads(params, x, t, cond, key=None):
        return c.two_heads("stochastic_interpolant", net(params, x, t, t, cond, key), x)

    def loss(params, target, batch, key):
        k_t, k_source, k_latent, *k_net = c.split(key, 5)
        t, x0, z = time(k_t), c.source(k_source, batch), c.latent(k_latent, batch)

        def errors(z, key):
            x, u = paths.with_velocity(path, x0, batch.x1, t, z)
            v, noise = heads(params, x, t, batch.cond, key)
            return jnp.stack([c.mse(v, u), c.mse(noise, z)])

        both = errors(z, k_net[0])
        if antithetic:
            both = (both + errors(-z, k_net[1])) / 2
        return c.reduce(both[0] + weight * both[1], t=t, velocity=both[0], denoiser=both[1])

    def velocity(params):
        return lambda x, t, cond=None: heads(params, x, over_batch(t, x), cond)[0]

    def score(params):
        def at(x, t, cond=None):
            t = jnp.clip(over_batch(t, x), MARGIN, 1 - MARGIN)
            return paths.latent_score(path, heads(params, x, t, cond)[1], t)

        return at

    return Method(loss, velocity=velocity, score=score)
