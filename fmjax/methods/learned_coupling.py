"""A learned coupling: an encoder of the data chooses the noise that makes the flow straight."""

from __future__ import annotations

import math

import jax.numpy as jnp

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.methods.flow_matching import flow_matching
from fmjax.types import Method, Net, over_batch


def learned_coupling(net: Net, *, path: paths.Path | None = None, time=times.uniform, weight: float = 20.0) -> Method:
    """``|u(I_t, t, t) - dI_t|^2 + weight KL(q(x0|x1), N(0, I)) / d``, ``x0 ~ q(x0|x1)``, learned together (2301.12003).

    Flow matching whose source is ``q(x0|x1) = N(mu, diag e^l)``, ``mu`` and ``l`` the two heads of ``net.encoder`` at
    ``x1`` (``nets.adapters.with_encoder``; in a config an option of the net, ``"noise_encoder"``). ``x0 = mu + e^{l/2}
    z`` takes the gradient of the flow's error to the encoder, which gives crossing pairs up for the price of the second
    term, ``sum (mu^2 + e^l - 1 - l) / 2`` over the ``d`` elements of an example. An encoder that starts at zero
    starts at the independent coupling, ``weight -> inf`` stays there; the source's law is N(0, I), which the sampler
    starts from, where ``weight`` is large.

    The views are those of ``flow_matching``, without the encoder and without a score: the coupling is not independent.
    ``aux``: ``t``, ``residual``, the flow's error, and ``kl``, per element, as summed before its weight. Raises
    ``ValueError`` for a net without an encoder or whose encoder has not two heads, a weight that is not positive, and
    a batch whose ``x0`` is already chosen.
    """
    flow = flow_matching(net, path=path, time=time)
    if (encoder := getattr(net, "encoder", None)) is None:
        raise ValueError(
            "learned_coupling needs a net with an encoder: nets.adapters.with_encoder(model, encoder), in a config "
            "net = {'name': ..., 'noise_encoder': 'mlp'}"
        )
    if not 0 < weight < math.inf:
        raise ValueError(f"weight={weight} of the divergence must be positive and finite; for infinity: flow_matching")

    def loss(params, target, batch, key):
        if batch.x0 is not None:
            raise ValueError("learned_coupling draws x0 from its encoder: give batches without it (no other coupling)")
        k_encoder, k_source, k_flow = c.split(key, 3)
        end = over_batch(1.0, batch.x1)
        out = encoder(params, batch.x1, end, end, None, k_encoder)
        mean, log_variance = c.two_heads("an encoder", out, batch.x1)
        x0 = mean + jnp.exp(log_variance / 2) * c.source(k_source, batch)
        kl = jnp.mean((mean**2 + jnp.expm1(log_variance) - log_variance).reshape(len(x0), -1), 1) / 2
        _, aux = flow.loss(params, target, batch._replace(x0=x0), k_flow)
        residual = aux["per_example"]
        return c.reduce(residual + weight * kl, t=aux["t"], residual=residual, kl=kl)

    return flow._replace(loss=loss, score=None)
