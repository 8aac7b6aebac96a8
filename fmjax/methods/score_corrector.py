"""The score corrector: denoise the backward marginals, at one noise level or at one that changes along the flow."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.keys import normal
from fmjax.methods import common as c
from fmjax.types import Method, Net, expand, over_batch


def score_corrector(net: Net, *, sigma: float | Sequence[float]) -> Method:
    """Score of the noised backward marginal ``q_n * N(0, sigma^2 I)`` by denoising (marginal matching, kRjLBXWn1T).

    ``E |eps(x + sigma z, t_n) - z|^2`` over ``x ~ q_n`` (``batch.x1``, its time ``batch.t``) and ``z ~ N(0, I)``; the
    net's diagonal predicts the noise. The direction is ``sigma^2 S = -sigma eps``, in displacement units: Tweedie's
    step to ``E[x_b | x]``; ``score`` is ``S`` itself, of the noised law. ``sigma`` is a number, or its values along the
    flow (``level``). Raises ``ValueError`` for ``sigma <= 0`` or a batch without times.
    """
    values = np.ravel(sigma)
    if not len(values) or not (values > 0).all():
        raise ValueError(f"sigma is the corrector's noise level and must be positive, got {sigma}")

    def loss(params, target, batch, key):
        if batch.t is None:
            raise ValueError("the score corrector trains on marginals: its batches need their times in Batch.t")
        k_noise, k_net = c.split(key, 2)
        z, t = normal(k_noise, batch.x1.shape[1:], batch.x1.dtype), over_batch(batch.t, batch.x1)
        noised = batch.x1 + expand(level(sigma, t), z) * z
        return c.reduce(c.mse(net(params, noised, t, t, batch.cond, k_net), z), t=t)

    def over_sigma(power):  # -sigma^power eps: the displacement for 1, the score for -1
        def bind(params):
            def field(x, t, cond=None):
                t = over_batch(t, x)
                return -(expand(level(sigma, t), x) ** power) * net(params, x, t, t, cond)

            return field

        return bind

    return Method(loss, direction=over_sigma(1), score=over_sigma(-1))


def level(sigma: float | Sequence[float], t: Float[Array, " b"]) -> Float[Array, " b"]:
    """``sigma(t)``: a number, or values at equally spaced times from 0 to 1 and linear in between.

    With one value a step of a uniform grid, ``N + 1`` of them, these are ``sigma_n`` at ``t_n = n / N``.

    >>> import jax.numpy as jnp
    >>> level((0.25, 0.75), jnp.array([0.0, 0.25, 1.0])).tolist()
    [0.25, 0.375, 0.75]
    """
    if np.ndim(sigma) == 0:
        return jnp.full_like(t, sigma)
    values = jnp.asarray(sigma, t.dtype)
    return jnp.interp(t, jnp.linspace(0, 1, len(values), dtype=t.dtype), values)
