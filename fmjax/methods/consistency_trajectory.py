"""Consistency trajectory models: jumps compared where they end in the data."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods.alpha_flow import BOOTSTRAPS, stepping
from fmjax.types import Method, Net, expand


def consistency_trajectory(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=times.uniform,
    pair=times.ordered_pair,
    diagonal: float = 0.5,
    teacher: Net | None = None,
    velocity: str = "own",
    solver: str = "heun",
    share=times.exponential_fraction,
    power: float = 1.0,
    bootstrap: str = "params",
    anneal: float = 0.0,
) -> Method:
    """``a^-power |sg[X_{t,1}](X_{s,t}(I_s)) - sg X_{t,1}(X_{m,t}(x_m))|^2``, ``x_m`` a solver step from ``I_s``.

    Consistency trajectory models (arXiv 2310.02279): the semigroup with a step of the teacher in its first part, both
    sides mapped on to the data by a map whose parameters, not its input, are stopped. On a share ``diagonal`` of the
    batch ``|u(I_t, t, t) - dI_t|^2`` instead. ``velocity``, ``solver``, ``teacher`` over ``target``, ``a = share(s, t,
    progress) = (m - s) / (t - s)`` and ``bootstrap`` (whose parameters stopped maps have) as in ``alpha_flow``, which
    compares at ``t``. In the paper ``target`` is a frozen flow and ``power`` zero, with longer steps of many parts: one
    part needs to be short, and its loss the weight. The perceptual distance and the adversarial term are left out.
    ``anneal`` as in ``lagrangian``. Dropout acts on the diagonal only. ``aux`` as that of
    ``alpha_flow``. Raises ``ValueError`` as it does.
    """
    path = path or paths.linear()
    c.check_times(path, time)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)
    checks.check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    if power < 0:
        raise ValueError(f"power={power} cannot be negative: the loss is weighted by a^-power")
    step = stepping(path, teacher or net, velocity, solver)

    def comparing(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        a = share(s, t, c.progress(batch))
        m = jnp.minimum(s + a * (t - s), t)  # not past t by rounding
        x, v = step(target, batch, k_x, s, m)
        still = jax.lax.stop_gradient(target if bootstrap == "target" else params)
        bound, cond, end = c.jump(net), batch.cond, jnp.ones_like(t)
        jump, jump_still = bound(params), bound(still)
        aim = jump_still(jump_still(x + expand(m - s, x) * v, m, t, cond), t, end, cond)
        apart = c.mse(jump_still(jump(x, s, t, cond), t, end, cond), jax.lax.stop_gradient(aim))
        return c.Term(s, t, apart / a**power, apart / a**2)

    return c.two_time(net, c.two_terms(c.matching(net, path, time), comparing, diagonal))
