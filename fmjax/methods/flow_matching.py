"""Flow matching: regress the velocity on the time derivative of an interpolant."""

from __future__ import annotations

from collections.abc import Callable

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.types import FlowMethod, Net


def flow_matching(net: Net, *, path: paths.Path = paths.linear(), time: Callable = times.uniform) -> FlowMethod:
    """Train a velocity by conditional flow matching, ``E |u(I_t, t, t) - dI_t/dt|^2``.

    The diagonal of ``net`` learns ``v(x, t) = E[dI_t | I_t = x]`` (arXiv 2210.02747, 2302.00482 eq. 10); the error is a
    mean over elements, as in the authors' code, ``t`` uniform. The classes of
    torchcfm correspond to choices of ``path`` and of the coupling in the input pipeline, which sets ``batch.x0``:

    ==========  ============================  =====================================================
    method      path                          coupling
    ==========  ============================  =====================================================
    I-CFM       ``linear``                    none: the loss draws the source
    OT-CFM      ``linear``                    ``minibatch_ot``
    target CFM  ``target_conditional``        none
    VP-CFM      ``trigonometric``             none
    SB-CFM      ``schroedinger_bridge``       ``minibatch_ot`` (torchcfm: exact by default; theory: entropic)
    ==========  ============================  =====================================================

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``.
        path: interpolant ``I_t``. Its latent, if any, is drawn from the example's key; a Brownian latent needs
            ``time=times.interior``.
        time: distribution of ``t``, ``key: [B] -> [B]``.

    Returns:
        A method with ``velocity``, and with ``score`` where the path has no latent. The score assumes a source N(0, I)
        that is independent of the data; with a coupling it is not the score. ``aux`` has ``t``.

    Raises:
        ValueError: ``time`` reaches the ends of a path where its velocity is infinite.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import methods
    >>> from fmjax.types import Batch
    >>> method = methods.flow_matching(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> loss, aux = jax.jit(method.loss)(2.0, 2.0, Batch(jnp.ones((4, 3))), jax.random.key(0))
    >>> loss.shape, aux["per_example"].shape, method.velocity(2.0)(jnp.ones((1, 3)), 0.5)
    ((), (4,), Array([[2., 2., 2.]], dtype=float32))
    """
    c.check_times(path, time)

    @c.keyed
    def loss(params, target, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x, u = c.interpolant(path, k_x, batch, t)
        return c.reduce(c.mse(net(params, x, t, t, batch.cond, k_net), u), t=t)

    velocity = views.velocity_view(net)
    score = views.score_view(path, velocity) if path.gamma is None else None
    return FlowMethod(loss, velocity=velocity, score=score)
