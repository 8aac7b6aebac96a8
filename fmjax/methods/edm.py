"""EDM: flow matching weighted evenly over noise levels, for a network that is a preconditioned denoiser."""

from __future__ import annotations

import functools
import math

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net


def edm(
    net: Net,
    *,
    path: paths.Path | None = None,
    sigma_data: float = 0.5,
    time=functools.partial(times.noise_level, mean=-1.2, std=1.2),
) -> Method:
    """``E lambda(sigma) |D(x1 + sigma x0; sigma) - x1|^2``, ``lambda = 1 / c_out^2`` (arXiv 2206.00364).

    ``log sigma ~ N(-1.2, 1.2^2)``; ``sigma_data`` is the data's standard deviation, as fed. At ``t = 1 / (1 + sigma)``
    on the linear path ``D = x + (1 - t) v``, so that this is ``E ((1 - t)^2 / sigma_data^2 + t^2) |v - dI_t|^2``, and
    ``net``'s diagonal is ``v``: the parameters start any flow or flow map. With ``nets.preconditioning.edm`` of the
    same ``sigma_data`` (``"preconditioning": {"name": "edm", "sigma_data": ...}`` in a network's spec) it is the
    unit-variance ``|F - F*|^2`` that EDM calls for.

    ``velocity`` and ``score`` are those on ``path``, linear by default, after ``paths.change``: the path is of no
    consequence to the training. ``time`` is a law of times of the linear path. ``aux``: ``t`` and ``residual``, the
    squared error of the velocity. Raises ``ValueError`` for ``sigma_data <= 0`` and a path with a latent.
    """
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data={sigma_data}, the standard deviation of the data, must be positive")
    linear = paths.linear()
    paths.refuse_latent("edm", path or linear)

    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x, u = c.interpolant(linear, k_x, batch, t)
        residual = c.mse(net(params, x, t, t, batch.cond, k_net), u)
        return c.reduce(((1 - t) ** 2 / sigma_data**2 + t**2) * residual, t=t, residual=residual)

    straight = c.diagonal(net)
    velocity = straight if path is None else lambda params: paths.change(straight(params), linear, path)
    return Method(loss, velocity=velocity, score=c.score(path or linear, velocity))
