"""Discriminator guidance: a classifier of real against generated examples, both put on the path."""

from __future__ import annotations

from collections.abc import Callable

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.methods.classifier_corrector import classifier_corrector
from fmjax.types import Batch, CorrectorMethod, LogitNet


def discriminator(
    net: LogitNet, *, path: paths.Path = paths.linear(), time: Callable = times.uniform
) -> CorrectorMethod:
    """Train a classifier of real against generated examples, both noised to ``alpha_t z + beta_t x``.

    It is ``classifier_corrector`` without an attack (arXiv 2211.17091). Real and generated examples each get a
    ``z ~ N(0, I)``; a pair has one time ``t``. The optimum is ``f = log(p_t / p~_t)``, where ``p_t`` is the
    distribution of noised data and ``p~_t`` the distribution of noised samples.

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

    return CorrectorMethod(loss, direction=classifier.direction)
