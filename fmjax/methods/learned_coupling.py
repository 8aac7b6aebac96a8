"""A learned coupling: an encoder of the data chooses the noise that makes the flow straight."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.methods.flow_matching import flow_matching
from fmjax.types import FlowMethod, Net, network, over_batch


def learned_coupling(
    net: Net, *, path: paths.Path = paths.linear(), time: Callable = times.uniform, weight: float = 20.0
) -> FlowMethod:
    """Train a velocity and its coupling together, ``|u(I_t, t, t) - dI_t|^2 + weight KL(q(x0|x1), N(0, I)) / d``.

    Flow matching whose source is ``x0 ~ q(x0|x1) = N(mu, diag e^l)``, where ``mu`` and ``l`` are the two heads of the
    encoder at ``x1``: the published loss (arXiv 2301.12003), means over elements as in the authors' code, whose
    weights are 10, 20 and 30. ``x0 = mu + e^{l/2} z`` carries the gradient of the flow's error to the
    encoder, which gives up crossing pairs at the price of the second term, ``sum (mu^2 + e^l - 1 - l) / 2`` over the
    ``d`` elements of an example. An encoder initialised with zeros starts at the independent coupling, and stays there
    as ``weight -> inf``. The sampler starts from N(0, I), which the source is close to where ``weight`` is large.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``, which carries the encoder
            (``nets.adapters.with_encoder``; in a config the option ``"noise_encoder"`` of the net).
        path: interpolant ``I_t``.
        time: distribution of ``t``, ``key: [B] -> [B]``.
        weight: weight of the divergence.

    Returns:
        A method with ``velocity`` (without the encoder) and without a score, because the coupling is not independent.
        ``aux`` has ``t``, ``residual``, the error of the flow, and ``kl``, the divergence per element before its
        weight.

    Raises:
        ValueError: a network without an encoder, ``weight <= 0``, or (in the loss) an encoder without two heads, or a
            batch with ``x0``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> from fmjax.types import Network
    >>> encoder = lambda params, x, s, t, cond=None, key=None: jnp.zeros((*x.shape[:-1], 2 * x.shape[-1]))
    >>> net = Network(lambda params, x, s, t, cond=None, key=None: params * x, encoder=encoder)
    >>> methods.learned_coupling(net).velocity(2.0)(jnp.ones((1, 2)), 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    flow = flow_matching(net, path=path, time=time)
    if (encoder := network(net).encoder) is None:
        raise ValueError(
            "net: has no encoder. Use nets.adapters.with_encoder(model, encoder), in a config "
            "net = {'name': ..., 'noise_encoder': 'mlp'}."
        )
    if not 0 < weight < math.inf:
        raise ValueError(f"weight={weight}: not positive and finite. For an infinite weight use flow_matching.")

    @c.keyed
    def loss(params, target, batch, key):
        if batch.x0 is not None:
            raise ValueError("batch.x0: already chosen, and the encoder draws it. Use no other coupling.")
        k_encoder, k_source, k_flow = c.split(key, 3)
        end = over_batch(1.0, batch.x1)
        out = encoder(params, batch.x1, end, end, None, k_encoder)
        mean, log_variance = c.two_heads("encoder", out, batch.x1)
        x0 = mean + jnp.exp(log_variance / 2) * c.draw_latent(k_source, batch)
        kl = jnp.mean((mean**2 + jnp.expm1(log_variance) - log_variance).reshape(len(x0), -1), 1) / 2
        _, aux = flow.loss(params, target, batch._replace(x0=x0), k_flow)
        residual = aux["per_example"]
        return c.reduce(residual + weight * kl, t=aux["t"], residual=residual, kl=kl)

    return flow._replace(loss=loss, score=None, normal_source=True)
