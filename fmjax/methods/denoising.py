"""Diffusion models that predict the noise, the data or "v": one regression, seen as a velocity afterwards."""

from __future__ import annotations

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net, expand, over_batch

PREDICTS = ("noise", "data", "v_prediction")


def denoising(net: Net, *, path: paths.Path | None = None, time=times.uniform, predict: str = "v_prediction") -> Method:
    """``E |u(I_t, t, t) - y|^2`` with ``y = beta x0 - alpha x1``, or ``"noise"`` ``x0``, or ``"data"`` ``x1``.

    These are the three of arXiv 2202.00512; ``"noise"`` on ``paths.vp`` is DDPM's simple loss (2006.11239). At equal
    ``x`` the errors are those of the noise times 1, ``(alpha / beta)^2`` (data) and ``beta^2 (1 + (alpha / beta)^2)^2``
    (v): what differs is the weight of a time, and where the velocity can be read off (``paths.convert``): with
    ``"noise"`` where ``beta > 0``, so not at ``t = 0`` of the linear path, with ``"data"`` where ``alpha > 0``, with
    ``"v_prediction"`` everywhere. Nothing in the loss is infinite at the data's end of ``vp``, as its velocity is. The
    source must be N(0, I), independent of the data, for the ``score``. Raises ``ValueError`` for another prediction
    (``flow_matching`` predicts the velocity) and a path with a latent.
    """
    path = path or paths.linear()
    paths.refuse_latent("denoising", path)
    checks.check_choice("predict", predict, PREDICTS)

    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t, x0 = time(k_t), c.source(k_x, batch)
        alpha, beta = (expand(a, x0) for a in path.coefficients(t))
        y = {"noise": x0, "data": batch.x1, "v_prediction": beta * x0 - alpha * batch.x1}[predict]
        return c.reduce(c.mse(net(params, alpha * x0 + beta * batch.x1, t, t, batch.cond, k_net), y), t=t)

    def read(params, x, t, cond, to):
        t = over_batch(t, x)
        return paths.convert(path, x, net(params, x, t, t, cond), t, kind=predict, to=to)

    return Method(
        loss,
        velocity=lambda params: lambda x, t, cond=None: read(params, x, t, cond, "velocity"),
        score=lambda params: lambda x, t, cond=None: read(params, x, t, cond, "score"),
    )
