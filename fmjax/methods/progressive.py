"""Progressive flow maps: one jump equals several shorter ones."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.types import FlowMapMethod, Net, expand

SPLITS = ("equal", "uniform")
STEPS = ("jumps", "euler")
COMPARISONS = ("velocities", "maps")


def progressive(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
    pair: Callable = times.ordered_pair,
    diagonal: float = 0.75,
    teacher: Net | None = None,
    substeps: int = 2,
    split: str = "equal",
    step: str = "jumps",
    compare: str = "velocities",
    finest: float = 0.0,
    anneal: float = 0.0,
) -> FlowMapMethod:
    """Train a flow map whose jumps are the composition of shorter jumps, ``X_{s,t} = X_{m_K,t} o ... o X_{s,m_1}``.

    A fraction ``diagonal`` of the batch has the flow-matching loss ``|u(I_t, t, t) - dI_t|^2``, the rest ``|u(I_s, s,
    t) - sg sum_k w_k u(x_k, m_k, m_{k+1})|^2`` with ``w_k = (m_{k+1} - m_k) / (t - s)`` and ``x_{k+1} =
    X_{m_k,m_{k+1}}(x_k)``, at the parameters ``target`` (arXiv 2505.18825, Algorithm 3). The loss compares average
    velocities, as means over elements; PFMM compares maps, which weighs it by ``(t - s)^2``. Since no derivative is
    taken, every attention kernel works.

    ==================================  =======================================================================
    method                              arguments
    ==================================  =======================================================================
    self-distillation (PSD-M)           the defaults
    self-distillation (PSD-U)           ``split="uniform"``
    distillation (PFMM, 2406.07507)     ``diagonal=0, compare="maps"``, ``target`` frozen, ``substeps=K``; the
                                        first round from a velocity with ``step="euler"``, the next with longer
                                        pairs
    shortcut models (2410.12557)        ``pair=times.dyadic, diagonal=7/8, finest=1/128`` (``shortcut``)
    progressive distillation            ``diagonal=0``, ``pair=times.grid_pair`` of one round, ``target`` frozen
    mid-training (CMT, 2509.24526)      ``diagonal=0, substeps=16, step="euler"``, ``target`` frozen
    ==================================  =======================================================================

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``. Dropout acts on the diagonal.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``.
        pair: distribution of ``(s, t)`` off the diagonal.
        diagonal: fraction of the batch on the diagonal; times the batch per device it must be whole.
        teacher: network of the sub-steps, evaluated as ``teacher(target, x, s, t, cond)``; ``net`` by default.
        substeps: number ``K`` of sub-steps, at least 2 (1 for ``step="euler"``).
        split: ``"equal"`` sub-steps, or sub-steps drawn ``"uniform"``-ly at random in ``[s, t]``.
        step: ``"jumps"`` of the teacher, or ``"euler"`` steps of its diagonal ``u(x, m, m)``, for a teacher that is a
            velocity and not a map.
        compare: ``"velocities"``, or ``"maps"``, which multiplies the error by ``(t - s)^2``.
        finest: length of the jump that flow matching trains and that is the velocity: ``u(x, t, t + finest)`` in place
            of ``u(x, t, t)``.
        anneal: fraction of the training during which ``|t - s| <= progress / anneal``; 0 for no bound.

    Returns:
        A method with ``velocity`` and ``flow_map``. ``aux`` has ``s``, ``t`` and the masks of the two terms.

    Raises:
        ValueError: an unknown choice, too few sub-steps, a fraction outside [0, 1], or (in the loss) a batch that
            cannot be split.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.progressive(lambda params, x, s, t, cond=None, key=None: params * x, substeps=4)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    teacher = teacher or net
    c.check_times(path, time)
    checks.check_choice("split", split, SPLITS)
    checks.check_choice("step", step, STEPS)
    checks.check_choice("compare", compare, COMPARISONS)
    if not 0 <= finest < 1:
        raise ValueError(f"finest={finest}: not the length of a short jump. Give 0 or more, and less than 1.")
    checks.check_fraction(diagonal=diagonal, anneal=anneal)
    least = 2 if step == "jumps" else 1
    if substeps < least:
        raise ValueError(f"substeps={substeps}: too few for step={step!r}. Give at least {least}.")

    def weights(key):
        """Return ``w: [B, K]``, positive, of sum 1: uniform spacings are normalised exponentials."""
        if split == "equal":
            return jnp.full((key.shape[0], substeps), 1 / substeps)
        e = jax.vmap(lambda k: jax.random.exponential(k, (substeps,)))(key)
        return e / e.sum(1, keepdims=True)

    def composing(params, target, batch, key):
        k_t, k_x, k_split = c.split(key, 3)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        x, _ = c.interpolant(path, k_x, batch, s)
        y, mean, m, w = x, jnp.zeros_like(x), s, weights(k_split)
        for k in range(substeps):
            after = t if k == substeps - 1 else m + w[:, k] * (t - s)
            u = teacher(target, y, m, m if step == "euler" else after, batch.cond)
            y, mean, m = y + expand(after - m, x) * u, mean + expand(w[:, k], x) * u, after
        error = c.mse(net(params, x, s, t, batch.cond), jax.lax.stop_gradient(mean))
        return c.Term(s, t, (t - s) ** 2 * error, error) if compare == "maps" else c.Term(s, t, error)

    def shortest(params, x, s, t, cond=None, key=None):
        s = jnp.minimum(s, 1 - finest)
        return net(params, x, s, s + finest, cond, key)

    short = shortest if finest else net
    method = views.two_time(net, c.two_terms(c.matching(short, path, time), composing, diagonal))
    return method._replace(velocity=views.velocity_view(short))
