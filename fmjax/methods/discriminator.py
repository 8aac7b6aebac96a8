"""Discriminator guidance: a classifier of real against generated examples, both put on the path."""

from __future__ import annotations

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.methods.classifier_corrector import classifier_corrector
from fmjax.types import Batch, LogitNet, Method


def discriminator(net: LogitNet, *, path: paths.Path | None = None, time=times.uniform) -> Method:
    """The plain ``classifier_corrector`` on ``alpha_t z + beta_t x`` of real and of generated ``x`` (arXiv 2211.17091).

    ``batch.x1`` are real examples, ``batch.x0`` generated ones; each gets its own ``z ~ N(0, I)``, both the time ``t``
    drawn by ``time``. The optimum is ``f = log(p_t / p~_t)``, ``p_t`` the law of noised data and ``p~_t`` that of
    noised samples; the direction is ``grad f``, what ``guidance.density_ratio`` adds to the velocity. A latent of
    ``path`` is noise too (``paths.one_sided``). ``aux`` as there. Raises ``ValueError`` for a batch without generated
    examples and a net that is no logit.
    """
    path = paths.one_sided(path or paths.linear())
    classifier = classifier_corrector(net, eps=0.0)

    def loss(params, target, batch, key):
        if batch.x0 is None:
            raise ValueError("the discriminator needs generated examples in Batch.x0, beside real ones in Batch.x1")
        k_t, k_real, k_made, k_net = c.split(key, 4)
        t = time(k_t)
        noised = lambda key, x: c.interpolant(path, key, Batch(x), t)[0]
        pair = batch._replace(x1=noised(k_real, batch.x1), x0=noised(k_made, batch.x0), t=t)
        return classifier.loss(params, target, pair, k_net)

    return Method(loss, direction=classifier.direction)
