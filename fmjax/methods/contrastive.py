"""Contrastive flow matching: regress on the example's own velocity and away from that of another example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.types import Batch, Method, Net


def contrastive(
    net: Net,
    *,
    mean: jax.Array | np.ndarray | float,
    weight: float = 0.05,
    path: paths.Path | None = None,
    time=times.uniform,
) -> Method:
    """Contrastive flow matching, ``E |u(I_t, t, t) - dI_t|^2 - weight |u(I_t, t, t) - dJ_t|^2`` (arXiv 2506.05350).

    ``dJ_t = alpha' y0 + beta' y1`` is the target of another example at the same time: ``y1 = batch.negative``, the
    ``x1`` of an independent one, and ``y0 ~ N(0, I)`` from the example's own key. Its mean is ``T_t = beta' E[x1]``
    whatever the condition, so the net learns ``(v(x, t, cond) - weight T_t) / (1 - weight)``, which does not transport
    to the data. ``velocity`` undoes that exactly, ``(1 - weight) u + weight beta' mean``, with ``mean = E[x1]`` over
    the training set (an array of an example's shape, or a number); ``score`` is that velocity's (see
    ``flow_matching``). Guidance acts on the velocity so corrected.

    ``weight = 0`` is flow matching. ``aux``: ``t``, the two errors ``matching`` and ``contrast``. Raises
    ``ValueError`` unless ``0 <= weight < 1`` (beyond, the loss has no minimum), for a batch without negatives, and for
    times that reach the infinite ends of a path.
    """
    path = path or paths.linear()
    c.check_times(path, time)
    if not 0 <= weight < 1:
        raise ValueError(f"contrastive needs 0 <= weight < 1, or its loss is unbounded below, got weight={weight}")

    def loss(params, target, batch, key):
        if batch.negative is None:
            raise ValueError("contrastive needs Batch.negative, the x1 of other examples: set negatives='any'")
        k_t, k_x, k_other, k_net = c.split(key, 4)
        t = time(k_t)
        x, u = c.interpolant(path, k_x, batch, t)
        _, away = c.interpolant(path, k_other, Batch(batch.negative), t)
        v = net(params, x, t, t, batch.cond, k_net)
        matching, contrast = c.mse(v, u), c.mse(v, away)
        return c.reduce(matching - weight * contrast, t=t, matching=matching, contrast=contrast)

    def velocity(params):
        biased = c.diagonal(net)(params)

        def unbiased(x, t, cond=None):
            *_, d_beta = paths.coefficients(path, x, t)
            return (1 - weight) * biased(x, t, cond) + weight * d_beta * jnp.asarray(mean, x.dtype)

        return unbiased

    return Method(loss, velocity=velocity, score=c.score(path, velocity))
