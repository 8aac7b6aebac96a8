"""Terminal velocity matching: the Lagrangian flow map and flow matching on every example, guidance in the target."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.methods.lagrangian import lagrangian
from fmjax.types import Cond, FlowMapMethod, Net, expand, is_null, network


def terminal_velocity_matching(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = functools.partial(times.logit_normal, mean=0.4),
    pair: Callable = times.terminal_pair,
    guidance: float = 1.0,
    scaled: bool = False,
    null: Cond = None,
) -> FlowMapMethod:
    """Train a flow map by terminal velocity matching: the Lagrangian residual and flow matching on every example.

    ``w^-2 (|d/dt X_{s,t}(I_s) - sg[c u(X_{s,t}(I_s), t, t)]|^2 + |c u(I_r, r, r) - v_g|^2)`` with
    ``X_{s,t}(x) = x + (t - s) c u(x, s, t)``. This is the published loss (arXiv 2511.19797), means over elements, with
    the authors' times and one noise for both terms of an example. The first term is the residual of ``lagrangian``,
    with the gradient through the tangent; the second is flow matching at ``r ~ time``. Without guidance ``w = c = 1``.

    The scale ``w`` is ``guidance``, or the scale in conditions ``(labels, w)`` (``sampling.random_scale``; the paper
    draws ``1/w``), and 1 where the label is ``null`` (``sampling.label_dropout``):
    ``v_g = w dI_r + (1 - w) c u(I_r, r, r; null)``.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``.
        path: interpolant ``I_t``.
        time: distribution of ``r``, ``key: [B] -> [B]``.
        pair: distribution of ``(s, t)``.
        guidance: guidance scale; 1 is no guidance.
        scaled: whether ``c = w``, so that the outputs of the network keep one size; else ``c = 1``.
        null: label of a dropped condition.

    Returns:
        A method with ``velocity`` and ``flow_map``, which are guided and include ``c``. The stopped ``u`` is at the
        parameters ``target``, best an average of decay 0.99 (``target="ema"``). ``aux`` has ``s``, ``t``, ``residual``,
        the mean square of the first term, and both terms as summed, ``terminal`` and ``matching``.

    Raises:
        ValueError: ``guidance <= 0``, a scale without ``null``, or (in the loss) guidance without labels.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.terminal_velocity_matching(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 1.0)
    Array([[3., 3.]], dtype=float32)
    """
    c.check_times(path, time)
    if not 0 < guidance < math.inf:
        raise ValueError(f"guidance={guidance}: not positive and finite. Give 1 for no guidance.")
    if guidance != 1 and null is None:
        raise ValueError(f"guidance={guidance}: needs the label of a dropped condition. Give null.")

    def scale(x, cond):
        """Return ``w: [B]``, or ``None`` where it is one throughout."""
        if isinstance(cond, tuple):
            if null is None:
                raise ValueError(
                    "null=None: the condition has a guidance scale. Give the label of a dropped condition."
                )
            return jnp.where(is_null(cond, null), 1, cond[1])
        if guidance == 1:
            return None
        if cond is None:
            raise ValueError(
                "batch.cond=None: guidance needs labels. Give the batch conditions (classes=... in a config)."
            )
        return jnp.where(is_null(cond, null), 1, guidance)

    def with_scale(inner):
        def slope(params, x, s, t, cond=None, key=None):
            u, w = inner(params, x, s, t, cond, key), scale(x, cond) if scaled else None
            return u if w is None else expand(w, x) * u

        return slope

    slope = network(net).wrap(with_scale)

    def guide(target, batch, x, t, v):
        w = scale(x, batch.cond)
        if w is None:
            return v
        away = slope(target, x, t, t, c.unconditional(batch.cond, null))
        return expand(w, x) * v + expand(1 - w, x) * away

    jumps = lagrangian(slope, path=path, time=time, pair=pair, diagonal=0.0).loss
    on_diagonal = c.matching(slope, path, time, guide)

    @c.keyed
    def loss(params, target, batch, key):
        k_source, k_jump, k_diagonal = c.split(key, 3)
        batch = batch._replace(x0=c.draw_source(k_source, batch))
        _, jump = jumps(params, target, batch, k_jump)
        residual = jnp.where(jump["s"] == jump["t"], 0, jump["per_example"])
        terminal, matching = residual, on_diagonal(params, target, batch, k_diagonal).per_example
        if (w := scale(batch.x1, batch.cond)) is not None:
            terminal, matching = terminal / w**2, matching / w**2
        return c.reduce(
            terminal + matching, s=jump["s"], t=jump["t"], residual=residual, terminal=terminal, matching=matching
        )

    return views.two_time(slope, loss)
