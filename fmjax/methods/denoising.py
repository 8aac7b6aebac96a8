"""Diffusion models that predict the noise, the data or "v": one regression, seen as a velocity afterwards."""

from __future__ import annotations

from collections.abc import Callable

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.types import DiffusionMethod, Net, expand, over_batch

PREDICTS = ("noise", "data", "v_prediction")


def denoising(
    net: Net, *, path: paths.Path = paths.linear(), time: Callable = times.uniform, predict: str = "v_prediction"
) -> DiffusionMethod:
    """Train a diffusion model that predicts noise, data or "v", ``E |u(I_t, t, t) - y|^2``.

    ``y`` is ``x0``, ``x1`` or ``beta x0 - alpha x1`` (arXiv 2202.00512); ``"noise"`` on ``paths.vp`` is the simple loss
    of DDPM (2006.11239) in continuous time, where DDPM has 1,000 steps; errors are means over elements. At equal ``x``
    the errors are the error of the noise times 1 (noise), ``(alpha / beta)^2`` (data) and
    ``beta^2 (1 + (alpha / beta)^2)^2`` (v): the three weigh times differently. They also differ in where the velocity
    can be computed (``paths.convert``): with ``"noise"`` where ``beta > 0``, so not at ``t = 0`` of the linear path;
    with ``"data"`` where ``alpha > 0``; with ``"v_prediction"`` everywhere. Nothing in the loss is infinite at the data
    end of ``vp``, where the velocity is.

    Args:
        net: prediction ``u(params, x, s, t, cond, key)``, of the shape of ``x``, evaluated where ``s = t``.
        path: interpolant ``I_t = alpha x0 + beta x1``, without a latent.
        time: distribution of ``t``, ``key: [B] -> [B]``.
        predict: ``"noise"``, ``"data"`` or ``"v_prediction"``.

    Returns:
        A method with ``velocity`` and ``score``; the score assumes a source N(0, I) independent of the data. ``aux``
        has ``t``.

    Raises:
        ValueError: another prediction (``flow_matching`` predicts the velocity), or a path with a latent.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.denoising(lambda params, x, s, t, cond=None, key=None: params * x, predict="data")
    >>> method.velocity(2.0)(jnp.ones((1, 2)), 0.5)  # of the linear path: (data - x) / (1 - t)
    Array([[2., 2.]], dtype=float32)
    """
    paths.refuse_latent("denoising", path)
    checks.check_choice("predict", predict, PREDICTS)

    @c.keyed
    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t, x0 = time(k_t), c.draw_source(k_x, batch)
        alpha, beta = (expand(a, x0) for a in path.coefficients(t))
        y = {"noise": x0, "data": batch.x1, "v_prediction": beta * x0 - alpha * batch.x1}[predict]
        return c.reduce(c.mse(net(params, alpha * x0 + beta * batch.x1, t, t, batch.cond, k_net), y), t=t)

    def read(params, x, t, cond, to):
        t = over_batch(t, x)
        return paths.convert(path, x, net(params, x, t, t, cond), t, kind=predict, to=to)

    return DiffusionMethod(
        loss,
        velocity=lambda params: lambda x, t, cond=None: read(params, x, t, cond, "velocity"),
        score=lambda params: lambda x, t, cond=None: read(params, x, t, cond, "score"),
        normal_source=True,
    )
