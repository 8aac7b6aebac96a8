"""Progressive flow maps: one jump equals several shorter ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.types import Method, Net, expand

SPLITS = ("equal", "uniform")
STEPS = ("jumps", "euler")


def progressive(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=times.uniform,
    pair=times.ordered_pair,
    diagonal: float = 0.75,
    teacher: Net | None = None,
    substeps: int = 2,
    split: str = "equal",
    step: str = "jumps",
    anneal: float = 0.0,
) -> Method:
    """``X_{s,t} = X_{m_K,t} o ... o X_{s,m_1}``: the jump's ``u`` is the weighted mean of those of ``K`` sub-steps.

    On a share ``diagonal`` of the batch ``|u(I_t, t, t) - dI_t|^2``, on the rest
    ``|u(I_s, s, t) - sg sum_k w_k u(x_k, m_k, m_{k+1})|^2``, ``w_k = (m_{k+1} - m_k) / (t - s)``,
    ``x_{k+1} = X_{m_k,m_{k+1}}(x_k)``, of the parameters ``target`` (arXiv 2505.18825, Algorithm 3).

    ==================================  =======================================================================
    method                              arguments
    ==================================  =======================================================================
    self-distillation (PSD-M)           the defaults
    self-distillation (PSD-U)           ``split="uniform"``
    distillation (PFMM, 2406.07507)     ``diagonal=0``, ``target`` frozen, ``substeps=K``; the first round from a
                                        velocity with ``step="euler"``, the next with longer pairs
    shortcut models (2410.12557)        ``pair=times.dyadic, diagonal=7/8`` (``shortcut``)
    progressive distillation            ``diagonal=0, pair=times.grid_pair``, ``target`` frozen
    mid-training (CMT, 2509.24526)      ``diagonal=0, substeps=16, step="euler"``, ``target`` frozen
    ==================================  =======================================================================

    Sub-steps are ``"equal"``, or lie ``"uniform"``-ly at random in ``[s, t]``. ``step="euler"`` takes Euler steps of
    the diagonal, ``u(x, m, m)``, where the teacher is a velocity and no map. No derivative is taken: any attention
    kernel serves. ``teacher(target, x, s, t, cond)`` is the net the sub-steps come from, by default ``net``; ``anneal``
    as in ``lagrangian``. Dropout acts on the diagonal only. ``aux``: ``s``, ``t``, ``residual``, and which term an
    example has. Raises ``ValueError`` for unknown choices, less than one sub-step (two jumps), shares that are none, or
    not whole in the batch.
    """
    path, teacher = path or paths.linear(), teacher or net
    c.check_times(path, time)
    checks.check_choice("split", split, SPLITS)
    checks.check_choice("step", step, STEPS)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)
    if substeps < (2 if step == "jumps" else 1):
        raise ValueError(f"substeps={substeps} must be at least 2 (1 for step='euler')")

    def shares(key):
        """``w: [B, K]``, positive, of sum one: the spacings of a uniform sample are those of exponentials."""
        if split == "equal":
            return jnp.full((key.shape[0], substeps), 1 / substeps)
        e = jax.vmap(lambda k: jax.random.exponential(k, (substeps,)))(key)
        return e / e.sum(1, keepdims=True)

    def composing(params, target, batch, key):
        k_t, k_x, k_split = c.split(key, 3)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        x, _ = c.interpolant(path, k_x, batch, s)
        y, mean, m, w = x, jnp.zeros_like(x), s, shares(k_split)
        for k in range(substeps):
            after = t if k == substeps - 1 else m + w[:, k] * (t - s)
            u = teacher(target, y, m, m if step == "euler" else after, batch.cond)
            y, mean, m = y + expand(after - m, x) * u, mean + expand(w[:, k], x) * u, after
        return c.Term(s, t, c.mse(net(params, x, s, t, batch.cond), jax.lax.stop_gradient(mean)))

    return c.two_time(net, c.two_terms(c.matching(net, path, time), composing, diagonal))
