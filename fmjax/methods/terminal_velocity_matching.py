"""Terminal velocity matching: the Lagrangian flow map and flow matching on every example, guidance in the target."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.methods.lagrangian import lagrangian
from fmjax.types import Cond, Method, Net, expand, is_null


def terminal_velocity_matching(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=functools.partial(times.logit_normal, mean=0.4),
    pair=times.terminal_pair,
    guidance: float = 1.0,
    scaled: bool = False,
    null: Cond = None,
) -> Method:
    """``w^-2 (|d/dt X_{s,t}(I_s) - sg[c u(X_{s,t}(I_s), t, t)]|^2 + |c u(I_r, r, r) - v_g|^2)`` (arXiv 2511.19797).

    ``X_{s,t}(x) = x + (t - s) c u(x, s, t)``; the stopped ``u`` is that of ``target``, best an average of decay 0.99
    (``target="ema"``). The first term is the residual of ``lagrangian``, gradient through the tangent and all, with
    pairs of the law ``pair``; the second is flow matching at ``r ~ time``. Every example has both. With ``w = 1`` the
    sum of the two is all there is to it.

    The scale ``w`` is ``guidance``, or that of conditions ``(labels, w)`` (``guidance.random_scale``; the paper draws
    ``1/w``), and 1 where the label is ``null`` (``guidance.label_dropout``):
    ``v_g = w dI_r + (1 - w) c u(I_r, r, r; null)``. ``scaled`` makes ``c = w``, so that the net's numbers stay of one
    size, else ``c = 1``; ``velocity`` and ``flow_map`` are guided, and have ``c`` in them. ``aux``: ``s``, ``t``,
    ``residual``, the mean square of the first term, and both terms, ``terminal`` and ``matching``, as they are summed.

    Raises ``ValueError`` for guidance that is not positive, a scale without ``null``, and a batch without labels then.
    """
    path = path or paths.linear()
    c.check_times(path, time)
    if not 0 < guidance < math.inf:
        raise ValueError(f"guidance={guidance} must be positive and finite; 1 is no guidance")
    if guidance != 1 and null is None:
        raise ValueError(f"guidance={guidance} needs null, the label of a dropped condition")

    def scale(x, cond):
        """``w: [B]``, or ``None`` for one throughout."""
        if isinstance(cond, tuple):
            if null is None:
                raise ValueError("the condition has a guidance scale: null, the label of none, must be given")
            return jnp.where(is_null(cond, null), 1, cond[1])
        if guidance == 1:
            return None
        if cond is None:
            raise ValueError("guidance needs labels: give the batch conditions (classes=... in a config)")
        return jnp.where(is_null(cond, null), 1, guidance)

    def slope(params, x, s, t, cond=None, key=None):
        u, w = net(params, x, s, t, cond, key), scale(x, cond) if scaled else None
        return u if w is None else expand(w, x) * u

    def guide(target, batch, x, t, v):
        w = scale(x, batch.cond)
        if w is None:
            return v
        away = slope(target, x, t, t, c.unconditional(batch.cond, null))
        return expand(w, x) * v + expand(1 - w, x) * away

    jumps = lagrangian(slope, path=path, time=time, pair=pair, diagonal=0.0).loss
    on_diagonal = c.matching(slope, path, time, guide)

    def loss(params, target, batch, key):
        k_jump, k_diagonal = c.split(key, 2)
        _, jump = jumps(params, target, batch, k_jump)
        residual = jnp.where(jump["s"] == jump["t"], 0, jump["per_example"])
        matching = on_diagonal(params, target, batch, k_diagonal).per_example
        if (w := scale(batch.x1, batch.cond)) is not None:
            terminal, matching = residual / w**2, matching / w**2
        else:
            terminal = residual
        return c.reduce(
            terminal + matching, s=jump["s"], t=jump["t"], residual=residual, terminal=terminal, matching=matching
        )

    return c.two_time(slope, loss)
