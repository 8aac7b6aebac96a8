"""The score corrector: denoise the backward marginals at one constant noise level."""

from __future__ import annotations

from fmjax.methods import common as c
from fmjax.types import Method, Net, normal, over_batch


def score_corrector(net: Net, *, sigma: float) -> Method:
    """Score of the noised backward marginal ``q_n * N(0, sigma^2 I)`` by denoising (marginal matching, kRjLBXWn1T).

    ``E |eps(x + sigma z, t_n) - z|^2`` over ``x ~ q_n`` (``batch.x1``, its time ``batch.t``) and ``z ~ N(0, I)``; the
    net's diagonal predicts the noise. The direction is ``sigma^2 S = -sigma eps``, in displacement units: Tweedie's
    step to ``E[x_b | x]``. Raises ``ValueError`` for ``sigma <= 0`` or a batch without times.
    """
    if sigma <= 0:
        raise ValueError(f"sigma is the corrector's noise level and must be positive, got {sigma}")

    def loss(params, target, batch, key):
        if batch.t is None:
            raise ValueError("the score corrector trains on marginals: its batches need their times in Batch.t")
        k_noise, k_net = c.split(key, 2)
        z = normal(k_noise, batch.x1.shape[1:], batch.x1.dtype)
        noise = net(params, batch.x1 + sigma * z, batch.t, batch.t, batch.cond, k_net)
        return c.reduce(c.mse(noise, z), t=batch.t)

    def direction(params):
        def push(x, t, cond=None):
            t = over_batch(t, x)
            return -sigma * net(params, x, t, t, cond)

        return push

    return Method(loss, direction=direction)
