"""Categorical ratio matching (SDDM): learn the token of each site from all other sites."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp

from fmjax import times
from fmjax.methods import common as c
from fmjax.methods.discrete_flow_matching import cross_entropy, log_softmax_view
from fmjax.tokens import TokenPath, corrupt, token_path
from fmjax.types import Method, Net


def categorical_ratio_matching(
    net: Net, *, path: TokenPath = token_path(classes=2, source="uniform"), time: Callable = times.uniform
) -> Method:
    """Train ``p_t(x^d | x^-d)`` at all times by its cross-entropy, ``-E sum_d log p_d(x_t^d | x_t^-d)``.

    This is score-based continuous-time discrete diffusion (SDDM, arXiv 2211.16750, eq. 15); the ratios of these
    probabilities are the rates of the reversed noising chain (``sampling.reverse_rates``). The loss is a mean over
    sites, and the schedule is the path's, ``k_t = exp(-int_t^1 beta)``.

    Args:
        net: logits ``net(params, x, s, t, cond, key) -> [B, ..., K]`` whose values at a site do not depend on the token
            of that site, such as ``nets.TokenNet(hollow=True)``: any other network learns to copy its input.
        path: a path with the uniform source.
        time: distribution of ``t``, ``key: [B] -> [B]``.

    Returns:
        A method with ``log_probs``, the probabilities of a site given all other sites. ``aux`` has ``t``.

    Raises:
        ValueError: another source.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import methods
    >>> from fmjax.types import Batch
    >>> even = lambda params, x, s, t, cond=None, key=None: jnp.zeros((*x.shape, 2))
    >>> method = methods.categorical_ratio_matching(even)
    >>> round(float(method.loss(None, None, Batch(jnp.zeros((4, 3), int)), jax.random.key(0))[0]), 4)
    0.6931
    """
    if path.source != "uniform":
        raise ValueError(f"source={path.source!r}: only uniform noise is reversed. Take source='uniform'.")

    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x = corrupt(path, k_x, batch.x1, t)
        each = cross_entropy(net(params, x, t, t, batch.cond, k_net), x)
        return c.reduce(jnp.mean(each.reshape(len(x), -1), 1), t=t)

    log_probs = functools.partial(log_softmax_view, net)
    return Method(c.keyed(loss, tokens=True), log_probs=log_probs, batches="tokens")
