"""Lagrangian self-distillation: a flow map that solves the ODE of its own diagonal."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net, expand


def lagrangian(
    net: Net, *, path: paths.Path | None = None, time=times.uniform, pair=times.ordered_pair, diagonal: float = 0.75
) -> Method:
    """Lagrangian self-distillation, ``d/dt X_{s,t}(x) = v(X_{s,t}(x), t)`` with ``v`` the net's own diagonal.

    On a share ``diagonal`` of the batch ``|u(I_t, t, t) - dI_t|^2``, on the rest
    ``|d/dt X_{s,t}(I_s) - sg[u(sg X_{s,t}(I_s), t, t)]|^2`` (arXiv 2505.18825, eq. 12 and Algorithm 1, ``convex`` stop
    gradient), the gradient passing through the time derivative. The teacher ``u`` has the parameters ``target``
    (self, EMA or frozen). No example pays for a term it does not use. Dropout acts on the diagonal only.
    ``aux``: ``s``, ``t``, and which term an example has. Raises ``ValueError`` where a share of the batch is not whole.
    """
    path = path or paths.linear()

    def matching(params, batch, key):
        k_t, k_x, k_net = c.split(key, 3)
        t = time(k_t)
        x, u = paths.with_velocity(path, c.source(k_x, batch), batch.x1, t)
        return t, c.mse(net(params, x, t, t, batch.cond, k_net), u)

    def distilling(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s, t = pair(k_t)
        x, _ = paths.with_velocity(path, c.source(k_x, batch), batch.x1, s)
        flow = lambda t: x + expand(t - s, x) * net(params, x, s, t, batch.cond)
        y, dy = jax.jvp(flow, (t,), (jnp.ones_like(t),))
        v = jax.lax.stop_gradient(net(target, jax.lax.stop_gradient(y), t, t, batch.cond))
        return s, t, c.mse(dy, v)

    def loss(params, target, batch, key):
        on, off = c.split_rows(batch.x1.shape[0], diagonal)
        t_on, matched = matching(params, c.rows(batch, on), key[on])
        s_off, t_off, residual = distilling(params, target, c.rows(batch, off), key[off])
        join = lambda a, b: jnp.zeros(len(on) + len(off), a.dtype).at[on].set(a).at[off].set(b)
        on_diagonal = join(jnp.ones_like(matched, bool), jnp.zeros_like(residual, bool))
        s, t = join(t_on, s_off), join(t_on, t_off)
        return c.reduce(join(matched, residual), s=s, t=t, is_on_diagonal=on_diagonal, is_residual=~on_diagonal)

    return Method(loss, velocity=c.diagonal(net), flow_map=c.jump(net))
