"""Flow matching: regress the velocity on the time derivative of an interpolant."""

from __future__ import annotations

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net


def flow_matching(net: Net, *, path: paths.Path | None = None, time=times.uniform) -> Method:
    """Conditional flow matching, ``E |u(I_t, t, t) - dI_t/dt|^2`` (arXiv 2210.02747, 2302.00482 eq. 10).

    ``net``'s diagonal learns ``v(x, t) = E[dI_t | I_t = x]``. ``time`` is a law of ``t: [B]``. What torchcfm has as
    classes are choices of ``path`` and of the input pipeline's coupling (of ``batch.x0``):

    ==========  ============================  =====================================================
    method      path                          coupling
    ==========  ============================  =====================================================
    I-CFM       ``linear``                    none: the loss draws the source
    OT-CFM      ``linear``                    ``minibatch_ot``
    target CFM  ``target_conditional``        none
    VP-CFM      ``trigonometric``             none
    SB-CFM      ``schroedinger_bridge``       ``minibatch_ot`` (exact by default there, entropic in theory)
    ==========  ============================  =====================================================

    A latent of the path is drawn from the example's key; a Brownian one needs ``time=times.interior``. ``score`` is
    that of ``paths.score`` and there where the path has no latent; it takes the source to be N(0, I) and independent
    of the data: with a coupling it is not the score. ``aux``: ``t`` and the error per example. Raises ``ValueError``
    for times that reach the infinite ends of a path.
    """
    path = path or paths.linear()
    c.check_times(path, time)

    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x, u = c.interpolant(path, k_x, batch, t)
        return c.reduce(c.mse(net(params, x, t, t, batch.cond, k_net), u), t=t)

    def score(params):
        velocity = c.diagonal(net)(params)
        return lambda x, t, cond=None: paths.score(path, x, velocity(x, t, cond), t)

    return Method(loss, velocity=c.diagonal(net), score=score if path.gamma is None else None)
