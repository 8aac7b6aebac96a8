"""Diffusion models as flows: networks that predict noise, data or scores as velocities, and EDM's denoiser.

A path without a latent, ``x = alpha x0 + beta x1`` with ``x0 ~ N(0, I)`` independent of ``x1``, is a diffusion at the
noise level ``sigma = alpha / beta``: ``x / beta = x1 + sigma x0`` is the state of EDM (arXiv 2206.00364).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from fmjax import paths
from fmjax.checks import check_choice
from fmjax.sampling.costs import evaluations
from fmjax.sampling.diffusion import path_at
from fmjax.types import Cond, Costed, Net, VelocityFn, expand, over_batch


def as_flow(net: Net, *, predicts: str, path: paths.Path = paths.linear(), onto: paths.Path = paths.linear()) -> Net:
    """Return a network that predicts noise, data or the score on ``path`` as a flow's network on ``onto``.

    The diagonal of the result is the velocity on ``onto``: ``paths.convert`` and ``paths.change`` of the prediction,
    exact where both paths are finite. ``net`` keeps its parameters, so that a diffusion model initialises a
    flow, or any flow map, which trains on. Off the diagonal the network is evaluated at the matching pair of times;
    ``X_{s,t}`` is one Euler step where the network ignores its second time.

    Args:
        net: the network; ``net(params, x, t, t, cond, key)`` is its prediction at the time ``t`` of ``path``.
        predicts: one of ``paths.PREDICTIONS``, for example ``"noise"``.
        path: the path on which the network was trained.
        onto: the path of the velocity.

    Returns:
        A network with the signature of ``net``.

    Raises:
        ValueError: for an unknown prediction and for a path with a latent.

    >>> import jax.numpy as jnp
    >>> flow = as_flow(lambda params, x, s, t, cond=None, key=None: 0 * x, predicts="noise")
    >>> t = jnp.array([0.5])
    >>> flow(None, jnp.ones((1, 1)), t, t).round(4).tolist()
    [[2.0]]
    """
    check_choice("predicts", predicts, paths.PREDICTIONS, "prediction")
    paths.refuse_latent("a diffusion model", path, onto)

    def flow(params, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        end, _ = paths.match_snr(path, onto, t)

        def velocity(y, start, cond):
            predicted = net(params, y, start, jnp.where(s == t, start, end), cond, key)
            return paths.convert(path, y, predicted, start, kind=predicts, to="velocity")

        return paths.change(velocity, path, onto)(x, s, cond)

    return flow


def denoiser(flow: VelocityFn, *, path: paths.Path = paths.linear()) -> Costed:
    """Return EDM's denoiser ``D(x; sigma) = E[x1 | x1 + sigma x0 = x]`` of a velocity (arXiv 2206.00364).

    The data prediction of the velocity at the time of the noise level, ``t = 1 / (1 + sigma)`` on the linear path, and
    at the state ``beta x``.

    Args:
        flow: the velocity ``v(x, t, cond)``.
        path: the path of the velocity.

    Returns:
        ``D(x, sigma, cond)`` for noise levels ``sigma: [B]``.

    Raises:
        ValueError: for a path with a latent.

    >>> import jax.numpy as jnp
    >>> denoise = denoiser(lambda x, t, cond=None: -x)
    >>> denoise(jnp.ones((1, 1)), 1.0).round(4).tolist()
    [[0.25]]
    """
    paths.refuse_latent("a denoiser", path)

    def denoise(x, sigma, cond: Cond = None):
        t, _ = paths.match_snr(path, paths.linear(), 1 / (1 + over_batch(sigma, x)))
        x = path_at(path, x, t)[1] * x
        return paths.convert(path, x, flow(x, t, cond), t, kind="velocity", to="data")

    return Costed(denoise, evaluations(flow))


def velocity_of(denoise: Callable, *, path: paths.Path = paths.linear()) -> Costed:
    """Return the velocity on a path of EDM's denoiser ``D(x; sigma)``.

    On the linear path it is ``(D(x / t; (1 - t) / t) - x) / (1 - t)``. The noise level must be finite and positive: the
    velocity has no value at ``t = 0`` and ``t = 1`` of the linear path. (``nets.preconditioning`` has values there.)

    Args:
        denoise: ``D(x, sigma, cond)``.
        path: the path of the velocity.

    Returns:
        The velocity ``v(x, t, cond)``.

    Raises:
        ValueError: for a path with a latent.

    >>> import jax.numpy as jnp
    >>> velocity = velocity_of(lambda x, sigma, cond=None: 0 * x)
    >>> velocity(jnp.ones((1, 1)), 0.5).round(4).tolist()
    [[-2.0]]
    """
    paths.refuse_latent("a denoiser", path)

    def velocity(x, t, cond: Cond = None):
        t = over_batch(t, x)
        alpha, beta = path.coefficients(t)
        data = denoise(x / expand(beta, x), alpha / beta, cond)
        return paths.convert(path, x, data, t, kind="data", to="velocity")

    return Costed(velocity, evaluations(denoise))
