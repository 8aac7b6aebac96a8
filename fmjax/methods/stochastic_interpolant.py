"""Stochastic interpolants: the velocity and the denoiser of the latent, and with it the score, learned together."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.types import DiffusionMethod, Net, over_batch

MARGIN = 1e-3


def stochastic_interpolant(
    net: Net,
    *,
    path: paths.Path = paths.two_sided(),
    time: Callable = times.interior,
    weight: float = 1.0,
    antithetic: bool = False,
) -> DiffusionMethod:
    """Train velocity and denoiser of a path with a latent, ``E |v - dI_t|^2 + weight |n - z|^2`` (arXiv 2303.08797).

    On ``I_t = alpha x0 + beta x1 + gamma z`` the network has two heads. The first half of its channels is the velocity
    ``v = E[dI_t | I_t]``, the second half the denoiser ``n = E[z | I_t]``, which has size one at every time, while the
    score ``S = -n / gamma`` is infinite at the ends. The source ``batch.x0`` may have any distribution and any
    coupling; a batch without ``x0`` gets N(0, I). The gradients are the gradients of the losses of the paper,
    ``E[|v|^2 / 2 - dI_t v]`` and ``E[|n|^2 / 2 - z n]``, times two and divided by the number of elements. It departs
    from the paper in its times, which stay 1e-3 away from 0 and 1, where the velocity of a Brownian latent is infinite.

    [SF]2M (arXiv 2307.03672) is this method with ``paths.schroedinger_bridge(sigma)`` and pairs of the entropic plan of
    regularisation ``2 sigma^2``: its loss ``|lambda s + z|^2``, ``lambda = 2 gamma / sigma^2``, is ``|n - z|^2`` for
    ``s = sigma^2 S / 2``. Its SDE is ``sampling.euler_maruyama(velocity, score=score, strength=sigma)``; other
    strengths are possible too, best with strength zero at both ends.

    Args:
        net: two fields ``(params, x, s, t, cond, key) -> [B, ..., 2 C]`` (``outputs=2``), evaluated where ``s = t``.
        path: interpolant with a latent.
        time: distribution of ``t``, ``key: [B] -> [B]``.
        weight: weight of the denoiser.
        antithetic: average over ``z`` and ``-z``: twice the evaluations, and the part of the gradient that grows as
            ``gamma'`` near the ends cancels.

    Returns:
        A method with ``velocity`` and ``score``; the score is evaluated at the nearest time of ``[1e-3, 1 - 1e-3]``.
        ``aux`` has ``t`` and the errors ``velocity`` and ``denoiser``.

    Raises:
        ValueError: a path without a latent, ``weight <= 0``, ``time`` reaches the ends of a path where its velocity is
            infinite, or (in the loss) a network without two heads.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> net = lambda params, x, s, t, cond=None, key=None: jnp.concatenate([params * x, x], -1)
    >>> method = methods.stochastic_interpolant(net)
    >>> method.velocity(2.0)(jnp.ones((1, 2)), 0.5), method.score(2.0)(jnp.ones((1, 2)), 0.5)  # -n / sqrt(t (1 - t))
    (Array([[2., 2.]], dtype=float32), Array([[-2., -2.]], dtype=float32))
    """
    if path.gamma is None:
        raise ValueError(
            "path: has no latent to denoise. Use paths.two_sided or paths.schroedinger_bridge, or flow_matching, whose "
            "velocity contains the score."
        )
    if not weight > 0:
        raise ValueError(f"weight={weight}: not positive. For the velocity alone use flow_matching.")
    c.check_times(path, time)

    def heads(params, x, t, cond, key=None):
        return c.two_heads("stochastic_interpolant", net(params, x, t, t, cond, key), x)

    @c.keyed
    def loss(params, target, batch, key):
        k_t, k_source, k_latent, *k_net = c.split(key, 5)
        t, x0, z = time(k_t), c.draw_source(k_source, batch), c.draw_latent(k_latent, batch)

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
        def inside(x, t, cond=None):
            t = jnp.clip(over_batch(t, x), MARGIN, 1 - MARGIN)
            return paths.latent_score(path, heads(params, x, t, cond)[1], t)

        return inside

    return DiffusionMethod(loss, velocity=velocity, score=score)
