"""The score corrector: denoise the backward marginals, at one noise level or at one that changes along the flow."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.methods import common as c
from fmjax.types import Costed, Net, ScoreCorrectorMethod, expand, over_batch


def score_corrector(net: Net, *, sigma: float | Sequence[float]) -> ScoreCorrectorMethod:
    """Train the score of the noised backward marginal ``q_n * N(0, sigma^2 I)`` by denoising.

    ``E |eps(x + sigma z, t_n) - z|^2`` over ``x ~ q_n`` and ``z ~ N(0, I)`` (marginal matching, OpenReview kRjLBXWn1T);
    the diagonal of ``net`` predicts the noise ``eps``. Errors are means over elements. The paper has one noise level,
    whose value is not published; levels that change along the flow are an addition of this package.

    Args:
        net: prediction ``eps(params, x, s, t, cond, key)``, of the shape of ``x``, evaluated where ``s = t``.
        sigma: noise level, or its values at equally spaced times from 0 to 1 (``noise_level_at``).

    Returns:
        A method with ``direction``, ``sigma^2 S = -sigma eps`` in displacement units, which is Tweedie's step to
        ``E[x_b | x]``, and with ``score``, the score ``S`` of the noised distribution. Batches have backward examples
        in ``x1`` and their times in ``t``. ``aux`` has ``t``.

    Raises:
        ValueError: ``sigma <= 0``, or (in the loss) a batch without times.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.score_corrector(lambda params, x, s, t, cond=None, key=None: params * x, sigma=0.5)
    >>> method.direction(2.0)(jnp.ones((1, 2)), 0.0), method.score(2.0)(jnp.ones((1, 2)), 0.0)
    (Array([[-1., -1.]], dtype=float32), Array([[-4., -4.]], dtype=float32))
    """
    values = np.ravel(sigma)
    if not len(values) or not (values > 0).all():
        raise ValueError(f"sigma={sigma}: not a noise level. Give one positive number, or one per step.")

    @c.keyed
    def loss(params, target, batch, key):
        if batch.t is None:
            raise ValueError("batch.t=None: the score corrector trains on marginals. Put their times in t.")
        k_noise, k_net = c.split(key, 2)
        z, t = c.draw_latent(k_noise, batch), over_batch(batch.t, batch.x1)
        noised = batch.x1 + expand(noise_level_at(sigma, t), z) * z
        return c.reduce(c.mse(net(params, noised, t, t, batch.cond, k_net), z), t=t)

    def times_sigma(power):  # -sigma^power eps: the displacement for 1, the score for -1
        def bind(params):
            def field(x, t, cond=None):
                t = over_batch(t, x)
                return -(expand(noise_level_at(sigma, t), x) ** power) * net(params, x, t, t, cond)

            return Costed(field, nfe=1)

        return bind

    return ScoreCorrectorMethod(loss, direction=times_sigma(1), score=times_sigma(-1), batches="marginals")


def noise_level_at(sigma: float | Sequence[float], t: Float[Array, " b"]) -> Float[Array, " b"]:
    """Return ``sigma(t)``, linear between values at equally spaced times.

    With one value per step of a uniform grid, ``N + 1`` of them, the values are ``sigma_n`` at ``t_n = n / N``.

    Args:
        sigma: a number, or values at equally spaced times from 0 to 1.
        t: times ``[B]``.

    Returns:
        ``[B]``.

    >>> import jax.numpy as jnp
    >>> noise_level_at((0.25, 0.75), jnp.array([0.0, 0.25, 1.0])).tolist()
    [0.25, 0.375, 0.75]
    """
    if np.ndim(sigma) == 0:
        return jnp.full_like(t, jnp.asarray(sigma))
    values = jnp.asarray(sigma, t.dtype)
    return jnp.interp(t, jnp.linspace(0, 1, len(values), dtype=t.dtype), values)
