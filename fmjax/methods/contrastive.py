"""Contrastive flow matching: regress on the example's velocity and away from the velocity of another example."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.types import Batch, FlowMethod, Net


def contrastive(
    net: Net,
    *,
    mean: jax.Array | np.ndarray | float,
    weight: float = 0.05,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
) -> FlowMethod:
    """Train a velocity by contrastive flow matching, ``E |u(I_t, t, t) - dI_t|^2 - weight |u(I_t, t, t) - dJ_t|^2``.

    This is the published loss, a mean over elements, with ``dJ_t = alpha' y0 + beta' y1``, the target of another
    example at the same time (arXiv 2506.05350): ``y1 = batch.negative``, the ``x1`` of an independent example, and ``y0
    ~ N(0, I)`` from the key of this example. Its mean is ``T_t = beta' E[x1]`` whatever the condition, so the network
    learns ``(v(x, t, cond) - weight T_t) / (1 - weight)``, which does not transport to the data. It departs from the
    paper: ``velocity`` undoes this bias exactly, ``(1 - weight) u + weight beta' mean``. Guidance acts on the velocity
    so corrected.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``.
        mean: ``E[x1]`` over the training set, an array of the shape of an example or a number.
        weight: weight of the contrast; 0 is flow matching.
        path: interpolant ``I_t``.
        time: distribution of ``t``, ``key: [B] -> [B]``.

    Returns:
        A method with ``velocity``, and with ``score`` where the path has no latent (see ``flow_matching``). ``aux`` has
        ``t`` and the errors ``matching`` and ``contrast``.

    Raises:
        ValueError: not ``0 <= weight < 1`` (beyond, the loss has no minimum), ``time`` reaches the ends of a path where
            its velocity is infinite, or (in the loss) a batch without negatives.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.contrastive(lambda params, x, s, t, cond=None, key=None: params * x, mean=4.0, weight=0.5)
    >>> method.velocity(2.0)(jnp.ones((1, 2)), 0.5)  # 0.5 * 2 + 0.5 * 4
    Array([[3., 3.]], dtype=float32)
    """
    c.check_times(path, time)
    if not 0 <= weight < 1:
        raise ValueError(f"weight={weight}: the loss is unbounded below. Give a number in [0, 1).")

    @c.keyed
    def loss(params, target, batch, key):
        if batch.negative is None:
            raise ValueError("batch.negative=None: contrastive needs x1 of other examples. Set negatives='any'.")
        k_t, k_x, k_other, k_net = c.split(key, 4)
        t = time(k_t)
        x, u = c.interpolant(path, k_x, batch, t)
        _, away = c.interpolant(path, k_other, Batch(batch.negative), t)
        v = net(params, x, t, t, batch.cond, k_net)
        matching, contrast = c.mse(v, u), c.mse(v, away)
        return c.reduce(matching - weight * contrast, t=t, matching=matching, contrast=contrast)

    def velocity(params):
        biased = views.velocity_view(net)(params)

        def unbiased(x, t, cond=None):
            *_, d_beta = paths.coefficients(path, x, t)
            return (1 - weight) * biased(x, t, cond) + weight * d_beta * jnp.asarray(mean, x.dtype)

        return unbiased

    score = views.score_view(path, velocity) if path.gamma is None else None
    return FlowMethod(loss, velocity=velocity, score=score, normal_source=True)
