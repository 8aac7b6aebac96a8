"""EDM: flow matching weighted evenly over noise levels, for a network that is a preconditioned denoiser."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.types import DiffusionMethod, Net

_LINEAR = paths.linear()


def edm(
    net: Net,
    *,
    path: paths.Path = _LINEAR,
    sigma_data: float = 0.5,
    time: Callable = functools.partial(times.noise_level, mean=-1.2, std=1.2),
) -> DiffusionMethod:
    """Train a velocity with the loss of EDM, ``E lambda(sigma) |D(x1 + sigma x0; sigma) - x1|^2`` (arXiv 2206.00364).

    ``lambda = 1 / c_out^2`` and ``log sigma ~ N(-1.2, 1.2^2)``: the published loss as a mean over elements, where the
    authors' code has a sum. At ``t = 1 / (1 + sigma)`` on the linear path
    ``D = x + (1 - t) v``, so this is ``E ((1 - t)^2 / sigma_data^2 + t^2) |v - dI_t|^2``, and the diagonal of ``net``
    is ``v``: the parameters can initialise any flow or flow map. With ``nets.preconditioning.edm`` of the same
    ``sigma_data`` (``"preconditioning": {"name": "edm", "sigma_data": ...}`` in the spec of a network) it is the
    unit-variance loss ``|F - F*|^2`` of EDM.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)`` of the linear path, evaluated where ``s = t``.
        path: interpolant of the views, by ``paths.change``. The training does not depend on it.
        sigma_data: standard deviation of the data, as fed.
        time: distribution of ``t`` on the linear path, ``key: [B] -> [B]``.

    Returns:
        A method with ``velocity`` and ``score`` on ``path``. ``aux`` has ``t`` and ``residual``, the squared error of
        the velocity.

    Raises:
        ValueError: ``sigma_data <= 0``, or a path with a latent.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.edm(lambda params, x, s, t, cond=None, key=None: params * x, sigma_data=1.0)
    >>> method.velocity(2.0)(jnp.ones((1, 2)), 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data={sigma_data}: not a standard deviation of data. Give a positive number.")
    paths.refuse_latent("edm", path)

    @c.keyed
    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x, u = c.interpolant(_LINEAR, k_x, batch, t)
        residual = c.mse(net(params, x, t, t, batch.cond, k_net), u)
        return c.reduce(((1 - t) ** 2 / sigma_data**2 + t**2) * residual, t=t, residual=residual)

    straight = views.velocity_view(net)
    velocity = straight if path is _LINEAR else lambda params: paths.change(straight(params), _LINEAR, path)
    score = views.score_view(path, velocity)
    return DiffusionMethod(loss, velocity=velocity, score=score, normal_source=True)
