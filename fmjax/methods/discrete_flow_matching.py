"""Discrete flow matching: learn the probabilities of the data at each site, given a corrupted state."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmjax import checks, times
from fmjax.methods import common as c
from fmjax.tokens import TokenPath, corrupt, token_path
from fmjax.types import Method, Net, Params, over_batch

WEIGHTS = ("none", "bound")


def discrete_flow_matching(
    net: Net, *, path: TokenPath = token_path(classes=2), time: Callable = times.uniform, weight: str = "none"
) -> Method:
    """Train ``p(x1^i = c | x_t)`` by its cross-entropy, ``-E sum_i log p_i(x1^i | x_t)`` (arXiv 2407.15595, eq. 28).

    Data are integers ``0 .. K - 1``, ``K = path.classes``. The loss is a mean over sites. On the path of masks only
    masked sites count: the others show their data, and no network is needed there, where the authors' loss also
    trains the network to copy. The minimiser is the same.

    Args:
        net: logits ``net(params, x, s, t, cond, key) -> [B, ..., K]`` of integer states ``[B, ...]``, evaluated on the
            diagonal ``s = t``, such as ``nets.TokenNet``.
        path: the path, with masks or uniform tokens as the source.
        time: distribution of ``t``, ``key: [B] -> [B]``.
        weight: ``"none"``. ``"bound"``: times ``k' / (1 - k)``; with masks and uniform times the loss is then the bound
            of ``sampling.token_bound`` in nats per site.

    Returns:
        A method with ``log_probs``, which ``sampling.flow_rates`` turns into a sampler. ``aux`` has ``t``.

    Raises:
        ValueError: an unknown weight, or ``"bound"`` with the uniform source.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import methods
    >>> from fmjax.types import Batch
    >>> method = methods.discrete_flow_matching(lambda params, x, s, t, cond=None, key=None: jnp.zeros((*x.shape, 2)))
    >>> loss, aux = method.loss(None, None, Batch(jnp.zeros((4, 3), int)), jax.random.key(0))
    >>> aux["per_example"].shape, method.log_probs(None)(jnp.zeros((1, 3), int), 0.5).shape
    ((4,), (1, 3, 2))
    """
    checks.check_choice("weight", weight, WEIGHTS)
    if weight == "bound" and path.source != "mask":
        raise ValueError("weight='bound': infinite at t = 1 for a uniform source. Take weight='none', or masks.")

    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x = corrupt(path, k_x, batch.x1, t)
        each = cross_entropy(net(params, x, t, t, batch.cond, k_net), batch.x1)
        if path.source == "mask":
            each = jnp.where(x == path.classes, each, 0.0)
        k, dk = path.kept(t)
        scale = dk / (1 - k) if weight == "bound" else 1.0
        return c.reduce(scale * jnp.mean(each.reshape(len(x), -1), 1), t=t)

    log_probs = functools.partial(log_softmax_view, net)
    return Method(c.keyed(loss, tokens=True), log_probs=log_probs, batches="tokens")


def cross_entropy(logits: Float[Array, "b ... k"], tokens: Int[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Return ``-log p(token)`` at each site.

    Args:
        logits: ``[B, ..., K]``.
        tokens: ``[B, ...]``.

    Returns:
        Nats ``[B, ...]``.

    Raises:
        ValueError: logits of another shape.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"net={logits.shape}: a network of tokens {tokens.shape} gives one logit for each token of each site. "
            f"Return [{', '.join(map(str, tokens.shape))}, K]."
        )
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None].astype(int), -1)[..., 0]


def log_softmax_view(net: Net, params: Params) -> Callable[..., Array]:
    """Return the normalised logits of a network on its diagonal.

    Args:
        net: logits ``[B, ..., K]``.
        params: parameters.

    Returns:
        ``log_probs(x, t, cond) -> [B, ..., K]``.
    """

    def log_probs(x, t, cond=None):
        t = over_batch(t, x, tokens=True)
        return jax.nn.log_softmax(net(params, x, t, t, cond))

    return log_probs
