"""Discriminator guidance: a classifier of real against generated examples, both put on the path."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jaxtyping import Array

from fmjax import paths
from fmjax.keys import per_example
from fmjax.methods import common as c
from fmjax.methods.classifier_corrector import classifier_corrector
from fmjax.types import Batch, CorrectorMethod, LogitNet


def even_noise_level(key: Array, *, low: float = 1e-3, high: float = 152.0) -> Array:
    """Draw times ``t = 1 / (1 + sigma)`` of noise levels that are uniform in ``log sigma``.

    The defaults are the times of discriminator guidance, from 1e-5 to 1 on its variance-preserving path.

    Args:
        key: one key, or keys ``[B]``.
        low: lowest noise level.
        high: highest noise level.

    Returns:
        Times of the shape of ``key``, of the linear path.
    """
    level = lambda k: jax.random.uniform(k, minval=math.log(low), maxval=math.log(high))
    return jax.nn.sigmoid(-per_example(level, key))


def discriminator(
    net: LogitNet, *, path: paths.Path = paths.linear(), time: Callable = even_noise_level
) -> CorrectorMethod:
    """Train a classifier of real against generated examples, both noised to ``alpha_t z + beta_t x``.

    This is the cross-entropy of discriminator guidance (arXiv 2211.17091) with the noise levels of the authors' code,
    on the linear path instead of a variance-preserving one, which only scales ``x``. It departs from the code: a pair
    of a real and a generated example has one time ``t``, and ``net`` takes noised examples, not the features of a
    classifier. Real and generated examples each get a ``z ~ N(0, I)``. The optimum is ``f = log(p_t / p~_t)``, where
    ``p_t`` is the distribution of noised data and ``p~_t`` the distribution of noised samples. It is
    ``classifier_corrector`` without an attack.

    Args:
        net: logit ``f(params, x, s, t, cond, key)``, ``[B]``, evaluated where ``s = t``.
        path: interpolant. A latent of the path is noise too (``paths.one_sided``).
        time: distribution of ``t``, ``key: [B] -> [B]``.

    Returns:
        A method with ``direction``, ``grad f``, which ``sampling.density_ratio`` adds to the velocity. Batches have
        real examples in ``x1`` and generated examples in ``x0``. ``aux`` as in ``classifier_corrector``.

    Raises:
        ValueError: in the loss, a batch without generated examples, or a network that is no logit.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.discriminator(lambda params, x, s, t, cond=None, key=None: params * x.sum(-1))
    >>> method.direction(2.0)(jnp.ones((1, 2)), 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    path = paths.one_sided(path)
    classifier = classifier_corrector(net, eps=0.0)

    @c.keyed
    def loss(params, target, batch, key):
        if batch.x0 is None:
            raise ValueError("batch.x0=None: no generated examples. Put them in x0, beside real examples in x1.")
        k_t, k_real, k_generated, k_net = c.split(key, 4)
        t = time(k_t)
        noised = lambda key, x: c.interpolant(path, key, Batch(x), t)[0]
        pair = batch._replace(x1=noised(k_real, batch.x1), x0=noised(k_generated, batch.x0), t=t)
        return classifier.loss(params, target, pair, k_net)

    return CorrectorMethod(loss, direction=classifier.direction, batches="ends", normal_source=True)
