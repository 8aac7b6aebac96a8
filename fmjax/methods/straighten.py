"""Straightening: regress the velocity on the chords of a teacher's trajectories, part by part of the time axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import checks, paths, times
from fmjax.checks import check_bounds
from fmjax.methods import common as c
from fmjax.types import Method, Net, expand, over_batch

DISTANCES = ("squared", "pseudo_huber")


def straighten(
    net: Net,
    *,
    bounds: Sequence[float] = (0.0, 1.0),
    keep: Sequence[int] = (),
    told: bool = False,
    path: paths.Path | None = None,
    time=times.uniform,
    distance: str = "squared",
    scale: float = 5.4e-4,
    retention: float = 1.0,
    perceptual: Callable | None = None,
) -> Method:
    """``|v(x_r, r) - dx_r/dr|^2`` on the arc from ``x_{b_k}`` to ``x_{b_k+1}``; one segment is reflow (2209.03003).

    ``batch.x0, batch.x1`` are the states of a teacher's trajectory at the bounds of segment ``k`` and ``batch.t = b_k``
    (``fmjax.segments``); ``r`` is drawn in it by ``time``. The arc has constant noise and data,

    ``x0* = (beta_t x_s - beta_s x_t) / W``, ``x1* = (alpha_s x_t - alpha_t x_s) / W``,

    with ``W = alpha_s beta_t - alpha_t beta_s``, ``x_r = alpha_r x0* + beta_r x1*``: on the linear path the chord, with
    ``v = (x_t - x_s) / (t - s)``, and the same line after a change of path from any other. In the segments ``keep``
    the batch gives ``x1`` at any time ``t``, and the loss is ``retention |(1 - t) (v - v_teacher)|^2``, ``v_teacher``
    the target's diagonal: without it a network shared by all segments forgets them. ``told``: the network is asked for
    ``(r, b_{k+1})``, in a straight segment the average velocity to its end, in a kept one only a sign of which it is,
    so that it knows the segment and may jump at a bound. (Were kept ones asked for their diagonal, ``(b, b)`` would be
    on both sides of a bound after a straight one.) Otherwise it is asked for its diagonal.

    ``time=times.u_shaped`` and ``distance="pseudo_huber"``, ``(sqrt(|e|^2 + c^2) - c) / d`` with ``c = scale d`` over
    ``d`` elements, are those of 2405.20320, as is ``perceptual(D, x1) -> [B]``, added for the data ``D = x_r + (1 - r)
    v`` that the last segment points to (linear path). With one network a segment, train each by its own ``bounds`` and
    put them together by ``segments.piecewise``.

    ``velocity(params)`` is that of the segment that starts at ``t``. Raises ``ValueError`` for bounds that do not rise
    within [0, 1], segments that do not exist or are all kept, a negative weight, and ``perceptual`` where the last
    segment gives no data.
    """
    path, edges = path or paths.linear(), check_bounds(bounds)
    n = len(edges) - 1
    if not set(keep) < set(range(n)):
        raise ValueError(f"keep={tuple(keep)} must be some of the segments 0 .. {n - 1}, not all of them")
    checks.check_choice("distance", distance, DISTANCES)
    if retention < 0 or scale <= 0:
        raise ValueError(f"retention={retention} cannot be negative, scale={scale} must be positive")
    paths.refuse_latent("straightening", path)
    straight = np.array([k not in keep for k in range(n)])
    if perceptual and (edges[-1] < 1 or not straight[-1]):
        raise ValueError("perceptual compares data: the last segment must end at t = 1 and not be kept")

    def segment(t):
        """``(k, is straight)`` of times ``[B]``; a bound belongs to the segment that starts there."""
        k = jnp.clip(jnp.searchsorted(jnp.asarray(edges), t, side="right") - 1, 0, n - 1)
        return k, jnp.asarray(straight)[k]

    def ask(params, x, t, cond=None, key=None, *, k):
        end = jnp.asarray(edges)[k + 1] if told else t
        return net(params, x, t, end, cond, key)

    def loss(params, target, batch, key):
        if batch.t is None or batch.x0 is None:
            raise ValueError("straightening trains on trajectories: its batches need x0, x1 and t (fmjax.segments)")
        k_time, k_net = c.split(key, 2)
        k, on = segment(batch.t)
        s, t = jnp.asarray(edges)[k], jnp.asarray(edges)[k + 1]
        r = jnp.where(on, s + (t - s) * time(k_time), batch.t)
        x, u = arc(path, batch.x0, batch.x1, s, t, r)
        x = jnp.where(expand(on, x), x, batch.x1)
        v = ask(params, x, r, batch.cond, k_net, k=k)
        residual = c.mse(v, u)
        # |e|^2 is a sum in 2405.20320, and d = u[0].size elements
        error = residual if distance == "squared" else c.pseudo_huber(residual / u[0].size, scale)
        if perceptual:
            last = k == n - 1
            error += jnp.where(last, perceptual(x + expand(1 - r, x) * v, batch.x1), 0.0)
        if straight.all():
            return c.reduce(error, t=r, residual=residual)
        teacher = jax.lax.stop_gradient(net(target, x, r, r, batch.cond))
        kept = retention * (1 - r) ** 2 * c.mse(v, teacher)
        masks = {"is_straight": on, "is_kept": ~on}
        return c.reduce(jnp.where(on, error, kept), t=r, residual=jnp.where(on, residual, kept), **masks)

    def velocity(params):
        def v(x, t, cond=None):
            t = over_batch(t, x)
            return ask(params, x, t, cond, k=segment(t)[0])

        return v

    return Method(loss, velocity=velocity)


def arc(path: paths.Path, x_s, x_t, s, t, r):
    """``(x_r, dx_r/dr)`` on the arc of constant noise and data through ``x_s`` at ``s`` and ``x_t`` at ``t > s``."""
    alpha_s, beta_s, *_ = paths.coefficients(path, x_s, s)
    alpha_t, beta_t, *_ = paths.coefficients(path, x_t, t)
    w = alpha_s * beta_t - alpha_t * beta_s
    x0, x1 = (beta_t * x_s - beta_s * x_t) / w, (alpha_s * x_t - alpha_t * x_s) / w
    return paths.with_velocity(path, x0, x1, r)
