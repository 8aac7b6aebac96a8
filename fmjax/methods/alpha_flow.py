"""Discrete Eulerian flow maps: a jump equals a short step along a velocity, and the jump from there."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.types import Batch, Method, Net, Params, expand

VELOCITIES = ("conditional", "chord", "own")
SOLVERS = ("euler", "heun", "jump")
BOOTSTRAPS = ("params", "target")


def alpha_flow(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=times.uniform,
    pair=times.ordered_pair,
    diagonal: float = 0.75,
    teacher: Net | None = None,
    velocity: str = "conditional",
    solver: str = "euler",
    share=times.sigmoid_fraction,
    power: float = 1.0,
    bootstrap: str = "params",
    cost: Callable | None = None,
    anneal: float = 0.0,
) -> Method:
    """``X_{s,t}(x) = X_{m,t}(x + (m - s) v)``, ``m = s + a (t - s)``: no derivative, so any attention kernel serves.

    On a share ``diagonal`` of the batch ``|u(I_t, t, t) - dI_t|^2``, on the rest ``a^-power |d|^2`` of the difference
    ``d = u(I_s, s, t) - sg[a v + (1 - a) u(x_m, m, t)]``, ``x_m = I_s + (m - s) v`` (arXiv 2510.20771). In maps
    ``(t - s) d = X_{s,t}(I_s) - X_{m,t}(x_m)``, so ``d / a`` is a difference quotient, and the residual of ``eulerian``
    as ``a -> 0``. ``share(s, t, progress)`` is the law of ``a`` in ``times``.

    ================================  ==========================================================================
    method                            arguments
    ================================  ==========================================================================
    AlphaFlow (2510.20771)            the defaults: from flow matching on whole jumps (``a = 1``) to mean flow
    SoFlow (2512.15657)               ``share=times.exponential_fraction, power=2`` (``soflow``)
    progressive, ``u`` in two parts   ``velocity="own", solver="jump", bootstrap="target", power=0``
    consistency models                ``diagonal=0, pair=times.to_data``, another cost of ``d`` (``consistency``)
    ================================  ==========================================================================

    ``v`` is ``dI_s`` (``"conditional"``), ``(I_m - I_s) / (m - s)`` (``"chord"``; the same on the linear path), or
    ``"own"``, of ``teacher(target, x, s, t, cond)``, by default ``net``: by ``solver`` its velocity ``u(x, s, s)``, the
    mean of Heun's two velocities, or the ``"jump"``'s ``u(x, s, m)``. ``u(x_m, m, t)`` has the parameters ``bootstrap``
    names. ``cost(d, s, t, a): [B]`` takes the place of ``a^-power |d|^2``. ``anneal`` as in ``lagrangian``. Dropout
    acts on the diagonal only. ``aux``: ``s``, ``t``, ``residual`` (the mean of ``(d / a)^2``, to compare with that of
    ``eulerian``), and which term an example has. Raises ``ValueError`` for unknown choices, a solver without its own
    velocity, a negative ``power``, shares that are none, or not whole in the batch.
    """
    path = path or paths.linear()
    c.check_times(path, time)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)
    if power < 0:
        raise ValueError(f"power={power} cannot be negative: the loss is weighted by a^-power")
    step = stepping(path, teacher or net, velocity, solver)
    checks.check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    cost = cost or (lambda d, s, t, a: c.mse(d, jnp.zeros_like(d)) / a**power)

    def differing(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        a = share(s, t, c.progress(batch))
        m = jnp.minimum(s + a * (t - s), t)  # not past t by rounding
        x, v = step(target, batch, k_x, s, m)
        later = net(target if bootstrap == "target" else params, x + expand(m - s, x) * v, m, t, batch.cond)
        aim = jax.lax.stop_gradient(expand(a, x) * v + expand(1 - a, x) * later)
        d = net(params, x, s, t, batch.cond) - aim
        return c.Term(s, t, cost(d, s, t, a), c.mse(d, jnp.zeros_like(d)) / a**2)

    return c.two_time(net, c.two_terms(c.matching(net, path, time), differing, diagonal))


Step = Callable[[Params, Batch, Array, Array, Array], tuple[Array, Array]]


def stepping(path: paths.Path, teacher: Net, velocity: str, solver: str) -> Step:
    """``(target, batch, key, s, m) -> (I_s, v)``: a draw, and the mean velocity of a step from it to ``m``."""
    checks.check_choice("velocity", velocity, VELOCITIES)
    checks.check_choice("solver", solver, SOLVERS)
    if solver != "euler" and velocity != "own":
        raise ValueError(f"solver={solver!r} needs a velocity to evaluate: velocity='own', got {velocity!r}")

    def step(target, batch, key, s, m):
        if velocity == "chord":  # one draw, at two times
            (x, y), (v, _) = jax.vmap(lambda t: c.interpolant(path, key, batch, t))(jnp.stack([s, m]))
            moves = expand(m > s, x)
            return x, jnp.where(moves, (y - x) / jnp.where(moves, expand(m - s, x), 1), v)
        x, v = c.interpolant(path, key, batch, s)
        if velocity == "own":
            v = teacher(target, x, s, m if solver == "jump" else s, batch.cond)
        if solver == "heun":
            v = (v + teacher(target, x + expand(m - s, x) * v, m, m, batch.cond)) / 2
        return x, jax.lax.stop_gradient(v)

    return step
