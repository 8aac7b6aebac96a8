"""Training for guidance: label dropout, random guidance scales, and guided teachers of flow maps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fmjax.keys import as_keys, split
from fmjax.sampling.guidance import Scale, autoguidance, check_scale
from fmjax.types import Cond, Method, Net, expand, is_null, network, over_batch, with_null


def label_dropout(method: Method, *, rate: float, null: Cond) -> Method:
    """Return the method whose loss replaces each condition by ``null`` with probability ``rate``.

    So one network learns ``v(x, t, cond)`` and ``v(x, t, null)``, which ``classifier_free`` needs (arXiv 2207.12598;
    0.1 is usual). Of a pair ``(labels, scale)`` the scale stays. ``aux`` gets ``is_unconditional: [B]``.

    Args:
        method: a method of conditions.
        rate: fraction of dropped conditions, in [0, 1).
        null: see ``classifier_free``.

    Returns:
        The method with another loss; ``method`` itself for ``rate=0``.

    Raises:
        ValueError: for a rate outside [0, 1), and in the loss for a batch without conditions.

    >>> from fmjax import methods, nets
    >>> method = methods.flow_matching(nets.from_linen(nets.MLP(width=4, depth=1, classes=3)).net)
    >>> label_dropout(method, rate=0.0, null=3) is method
    True
    """
    if not 0 <= rate < 1:
        raise ValueError(f"label_dropout={rate}: outside [0, 1). Give the fraction of dropped labels.")
    if rate == 0:
        return method

    def loss(params, target, batch, key):
        if batch.cond is None:
            raise ValueError("cond=None: label dropout needs labels. Give the batch labels (classes=... in a config).")
        k_drop, k_loss = split(as_keys(key, len(batch.x1)), 2)
        dropped = jax.vmap(lambda k: jax.random.bernoulli(k, rate))(k_drop)
        drop = lambda n, c: jnp.where(expand(dropped, c), n, c)
        cond = jax.tree.map(drop, with_null(batch.cond, null), batch.cond)
        value, aux = method.loss(params, target, batch._replace(cond=cond), k_loss)
        return value, aux | {"is_unconditional": dropped}

    return method._replace(loss=loss)


def random_scale(method: Method, *, low: float = 1.0, high: float = 8.0, power: float = 1.0) -> Method:
    """Return the method whose loss draws a guidance scale for each example and gets ``(cond, w)``.

    For methods that learn a flow for every scale in ``[low, high]``, over a network that takes the guidance scale
    (``guided=True``; arXiv 2512.02012).

    Args:
        method: a method of conditions ``(labels, w)``.
        low: smallest scale, positive.
        high: largest scale.
        power: the density of the scales is proportional to ``w^-power``.

    Returns:
        The method with another loss, for batches of labels.

    Raises:
        ValueError: unless ``0 < low < high``, and in the loss for a batch without conditions.

    >>> from fmjax import types
    >>> method = types.Method(lambda params, target, batch, key: (batch.cond[1].mean(), {}))
    >>> batch = types.Batch(jnp.zeros((4, 2)), cond=jnp.zeros(4, int))
    >>> scale, _ = random_scale(method, low=2.0, high=3.0).loss(None, None, batch, jax.random.key(0))
    >>> bool(2 < scale < 3)
    True
    """
    if not (0 < low < high < math.inf and math.isfinite(power)):
        raise ValueError(f"low={low}, high={high}, power={power}: out of range. Give 0 < low < high, finite power.")

    def loss(params, target, batch, key):
        if batch.cond is None:
            raise ValueError(
                "cond=None: a guidance scale needs labels. Give the batch labels (classes=... in a config)."
            )
        k_scale, k_loss = split(as_keys(key, len(batch.x1)), 2)
        u = jax.vmap(jax.random.uniform)(k_scale)
        if power == 1:
            scale = low * (high / low) ** u
        else:
            a, b = low ** (1 - power), high ** (1 - power)
            scale = (a + u * (b - a)) ** (1 / (1 - power))
        return method.loss(params, target, batch._replace(cond=(batch.cond, scale)), k_loss)

    return method._replace(loss=loss)


def guided_teacher(net: Net, *, null: Cond) -> Net:
    """Return the network of labels as one of pairs ``(labels, w)``: ``u(null) + w (u(labels) - u(null))``.

    The ``teacher`` of a flow map for every scale (arXiv 2505.18825, appendix on guidance): its diagonal is the guided
    velocity, which a map over a network that takes the scale follows (``lagrangian``, ``eulerian``; ``progressive``
    with ``step="euler"``). Rows whose label is ``null`` are not guided.

    Args:
        net: the network of labels.
        null: see ``classifier_free``.

    Returns:
        A network of two evaluations of ``net`` at the same times.

    Raises:
        ValueError: when evaluated, for a condition without scale.

    >>> teacher = guided_teacher(lambda p, x, s, t, cond=None, key=None: x + cond[:, None], null=2)
    >>> t = jnp.zeros(1)
    >>> teacher(None, jnp.zeros((1, 1)), t, t, (jnp.array([1]), jnp.array([3.0]))).tolist()
    [[-1.0]]
    """

    def guided(net):
        def apply(params, x, s, t, cond=None, key=None):
            if not isinstance(cond, tuple):
                raise ValueError("cond: a guided teacher needs (labels, scale). Wrap the method in random_scale.")
            labels, scale = cond
            base, goal = net(params, x, s, t, with_null(labels, null), key), net(params, x, s, t, labels, key)
            return jnp.where(expand(is_null(labels, null), x), goal, base + expand(scale, x) * (goal - base))

        return apply

    return network(net).wrap(guided)


def autoguided_teacher(net: Net, weak: Net | None = None, *, scale: Scale) -> Net:
    """Return the velocity of ``autoguidance`` as a network, for the ``teacher`` of a method (arXiv 2506.14603).

    Args:
        net: the network of the strong velocity.
        weak: the network of the weak velocity, by default ``net``.
        scale: a number, or a function of times ``[B]``; 1 is no guidance.

    Returns:
        A network, evaluated on the diagonal, of the parameters ``{"strong": ..., "weak": ...}``.

    Raises:
        ValueError: for a scale that is not finite.

    >>> teacher = autoguided_teacher(lambda p, x, s, t, cond=None, key=None: p * x, scale=3.0)
    >>> t = jnp.zeros(1)
    >>> teacher({"strong": 2.0, "weak": 1.0}, jnp.ones((1, 1)), t, t).tolist()
    [[4.0]]
    """
    check_scale(scale)
    at = lambda f, params: lambda x, t, cond=None: f(params, x, over_batch(t, x), over_batch(t, x), cond)

    def teacher(target, x, s, t, cond=None, key=None):
        return autoguidance(at(net, target["strong"]), at(weak or net, target["weak"]), scale=scale)(x, s, cond)

    return teacher
