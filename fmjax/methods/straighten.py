"""Straightening: regress the velocity on the chords of a teacher's trajectories, segment by segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import checks, paths, times
from fmjax.checks import check_bounds
from fmjax.methods import common as c
from fmjax.types import FlowMethod, Net, expand, over_batch

DISTANCES = ("squared", "pseudo_huber")


def straighten(
    net: Net,
    *,
    bounds: Sequence[float] = (0.0, 1.0),
    keep: Sequence[int] = (),
    to_bound: bool = False,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
    distance: str = "squared",
    scale: float = 5.4e-4,
    retention: float = 1.0,
    perceptual: Callable | None = None,
) -> FlowMethod:
    """Straighten a flow, ``|v(x_r, r) - dx_r/dr|^2`` on arcs from ``x_{b_k}`` to ``x_{b_k+1}``; one segment is reflow.

    The arc has constant noise and data (arXiv 2209.03003 for one segment on the linear path),

    ``x0* = (beta_t x_s - beta_s x_t) / W``, ``x1* = (alpha_s x_t - alpha_t x_s) / W``,

    with ``W = alpha_s beta_t - alpha_t beta_s`` and ``x_r = alpha_r x0* + beta_r x1*``: on the linear path the chord,
    with ``v = (x_t - x_s) / (t - s)``; from any other path the same line after a change of path. In a segment of
    ``keep`` the loss is ``retention |(1 - t) (v - v_teacher)|^2``, where ``v_teacher`` is the diagonal at ``target``:
    without it one network for all segments forgets those segments. With one network per segment, train each on its
    ``bounds`` and join them by ``straightening.segments.piecewise``.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``.
        bounds: ``b_0 < b_1 < ...`` within [0, 1], the bounds of the segments.
        keep: numbers of the segments that keep the velocity of the teacher.
        to_bound: evaluate the network at ``(r, b_{k+1})`` instead of its diagonal. In a straight segment this is the
            average velocity to the end of the segment, so the network can jump there; in a kept segment it only marks
            which segment it is (on the diagonal ``(b, b)`` would belong to both sides of a bound).
        path: interpolant, without a latent.
        time: distribution of the position within a segment, ``key: [B] -> [B]``; 2405.20320 uses ``times.u_shaped``.
        distance: ``"squared"``, or ``"pseudo_huber"``, ``(sqrt(|e|^2 + c^2) - c) / d`` with ``c = scale d`` over ``d``
            elements (2405.20320).
        scale: scale of the pseudo-Huber distance.
        retention: weight of the kept segments.
        perceptual: ``perceptual(D, x1) -> [B]``, added in the last segment for the data ``D = x_r + (1 - r) v`` that
            the velocity points to (linear path; 2405.20320).

    Returns:
        A method with ``velocity``, of the segment that starts at ``t``. Batches have in ``x0`` and ``x1`` the states of
        a trajectory at the bounds of segment ``k`` and in ``t`` its start ``b_k``; in kept segments ``x1`` at any time
        ``t``. ``aux`` has ``t``, ``residual`` and, with kept segments, the masks ``is_straight`` and ``is_kept``.

    Raises:
        ValueError: bounds that do not rise within [0, 1], segments that do not exist or are all kept, a negative
            weight, a path with a latent, ``perceptual`` where the last segment does not give data, or (in the loss) a
            batch without ``x0`` or ``t``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.straighten(lambda params, x, s, t, cond=None, key=None: params * x, bounds=(0.0, 0.5, 1.0))
    >>> method.velocity(2.0)(jnp.ones((1, 2)), 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    edges = check_bounds(bounds)
    n = len(edges) - 1
    if not set(keep) < set(range(n)):
        raise ValueError(f"keep={tuple(keep)}: not some of the segments 0 .. {n - 1}. Leave at least one of them out.")
    checks.check_choice("distance", distance, DISTANCES)
    if retention < 0:
        raise ValueError(f"retention={retention}: a negative weight. Give 0 or more.")
    if scale <= 0:
        raise ValueError(f"scale={scale}: the distance has no gradient at zero. Give a positive number.")
    paths.refuse_latent("straightening", path)
    straight = np.array([k not in keep for k in range(n)])
    if perceptual and (edges[-1] < 1 or not straight[-1]):
        raise ValueError("perceptual: compares data. Let the last segment end at t = 1, and do not keep it.")

    def segment(t):
        """Return ``(k, is straight)`` of times ``[B]``; a bound belongs to the segment that starts there."""
        k = jnp.clip(jnp.searchsorted(jnp.asarray(edges), t, side="right") - 1, 0, n - 1)
        return k, jnp.asarray(straight)[k]

    def evaluate(params, x, t, cond=None, key=None, *, k):
        end = jnp.asarray(edges)[k + 1] if to_bound else t
        return net(params, x, t, end, cond, key)

    @c.keyed
    def loss(params, target, batch, key):
        for name in ("x0", "t"):
            if getattr(batch, name) is None:
                raise ValueError(f"batch.{name}=None: straightening trains on trajectories (straightening.segments).")
        k_time, k_net = c.split(key, 2)
        k, on = segment(batch.t)
        s, t = jnp.asarray(edges)[k], jnp.asarray(edges)[k + 1]
        r = jnp.where(on, s + (t - s) * time(k_time), batch.t)
        x, u = arc(path, batch.x0, batch.x1, s, t, r)
        x = jnp.where(expand(on, x), x, batch.x1)
        v = evaluate(params, x, r, batch.cond, k_net, k=k)
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
            return evaluate(params, x, t, cond, k=segment(t)[0])

        return v

    return FlowMethod(loss, velocity=velocity, batches="trajectories")


def arc(
    path: paths.Path, x_s: Float[Array, "b ..."], x_t: Float[Array, "b ..."], s, t, r
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Return the point at ``r``, and the velocity there, of the arc of constant noise and data between two states.

    Args:
        path: interpolant, without a latent.
        x_s: state at ``s``, ``[B, ...]``.
        x_t: state at ``t``, ``[B, ...]``.
        s: start times ``[B]``.
        t: end times ``[B]``, greater than ``s``.
        r: times ``[B]``.

    Returns:
        ``(x_r, dx_r/dr)``, ``[B, ...]`` each.
    """
    alpha_s, beta_s, *_ = paths.coefficients(path, x_s, s)
    alpha_t, beta_t, *_ = paths.coefficients(path, x_t, t)
    w = alpha_s * beta_t - alpha_t * beta_s
    x0, x1 = (beta_t * x_s - beta_s * x_t) / w, (alpha_s * x_t - alpha_t * x_s) / w
    return paths.with_velocity(path, x0, x1, r)
