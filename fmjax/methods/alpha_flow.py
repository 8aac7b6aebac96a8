"""Discrete Eulerian flow maps: a jump equals a short step along a velocity, and the jump from there."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.types import Batch, FlowMapMethod, Net, Params, expand

VELOCITIES = ("conditional", "chord", "own")
SOLVERS = ("euler", "heun", "jump")
BOOTSTRAPS = ("params", "target")


def alpha_flow(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
    pair: Callable = times.ordered_pair,
    diagonal: float = 0.75,
    teacher: Net | None = None,
    velocity: str = "conditional",
    solver: str = "euler",
    fraction: Callable = times.sigmoid_fraction,
    power: float = 1.0,
    bootstrap: str = "params",
    cost: Callable | None = None,
    anneal: float = 0.0,
) -> FlowMapMethod:
    """Train a flow map by ``X_{s,t}(x) = X_{m,t}(x + (m - s) v)`` with ``m = s + a (t - s)``, without a derivative.

    A fraction ``diagonal`` of the batch has the flow-matching loss ``|u(I_t, t, t) - dI_t|^2``, the rest
    ``a^-power |d|^2`` of the difference ``d = u(I_s, s, t) - sg[a v + (1 - a) u(x_m, m, t)]``,
    ``x_m = I_s + (m - s) v`` (arXiv 2510.20771). It departs from the paper: the published weight ``a / (|d|^2 + 1e-3)``
    is left out. In maps, ``(t - s) d = X_{s,t}(I_s) - X_{m,t}(x_m)``: ``d / a`` is a difference quotient, and the
    residual of ``eulerian`` as ``a -> 0``. Since no derivative is taken, every attention kernel works.

    ================================  ==========================================================================
    method                            arguments
    ================================  ==========================================================================
    AlphaFlow (2510.20771)            the defaults: from flow matching on whole jumps (``a = 1``) to mean flow
    SoFlow (2512.15657)               ``fraction=times.exponential_fraction, power=2`` (``soflow``)
    progressive, ``u`` in two parts   ``velocity="own", solver="jump", bootstrap="target", power=0``
    consistency models                ``diagonal=0, pair=times.to_data``, another cost of ``d`` (``consistency``)
    ================================  ==========================================================================

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``. Dropout acts on the diagonal.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``.
        pair: distribution of ``(s, t)`` off the diagonal.
        diagonal: fraction of the batch on the diagonal; times the batch per device it must be whole.
        teacher: network of the own velocity, at the parameters ``target``; ``net`` by default.
        velocity: ``v``. ``"conditional"``: ``dI_s``. ``"chord"``: ``(I_m - I_s) / (m - s)``, the same on the linear
            path. ``"own"``: from ``teacher``, by ``solver``.
        solver: how the own velocity is evaluated. ``"euler"``: ``u(x, s, s)``. ``"heun"``: the mean of the two
            velocities of Heun's step. ``"jump"``: ``u(x, s, m)``.
        fraction: schedule of ``a``, ``(s, t, progress) -> [B]``, from ``times``.
        power: exponent of the weight ``a^-power``.
        bootstrap: parameters of ``u(x_m, m, t)``, ``"params"`` or ``"target"``.
        cost: ``cost(d, s, t, a) -> [B]`` replaces ``a^-power |d|^2``.
        anneal: fraction of the training during which ``|t - s| <= progress / anneal``; 0 for no bound.

    Returns:
        A method with ``velocity`` and ``flow_map``. ``aux`` has ``s``, ``t``, the masks of the two terms and
        ``residual``, the mean of ``(d / a)^2``, which compares with the residual of ``eulerian``.

    Raises:
        ValueError: an unknown choice, a solver without an own velocity, a negative ``power``, a fraction outside [0,
            1], or (in the loss) a batch that cannot be split.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.alpha_flow(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    c.check_times(path, time)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)
    check_power(power)
    step = stepping(path, teacher or net, velocity, solver)
    checks.check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    cost = cost or (lambda d, s, t, a: c.mse(d, jnp.zeros_like(d)) / a**power)

    def differing(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s, t = c.draw_pair(pair, k_t, batch, anneal)
        a = fraction(s, t, c.progress(batch))
        m = jnp.minimum(s + a * (t - s), t)  # not past t by rounding
        x, v = step(target, batch, k_x, s, m)
        later = net(target if bootstrap == "target" else params, x + expand(m - s, x) * v, m, t, batch.cond)
        aim = jax.lax.stop_gradient(expand(a, x) * v + expand(1 - a, x) * later)
        d = net(params, x, s, t, batch.cond) - aim
        return c.Term(s, t, cost(d, s, t, a), c.mse(d, jnp.zeros_like(d)) / a**2)

    return views.two_time(net, c.two_terms(c.matching(net, path, time), differing, diagonal))


Step = Callable[[Params, Batch, Array, Array, Array], tuple[Array, Array]]


def check_power(power: float) -> None:
    """Refuse a negative exponent of the weight ``a^-power``.

    Args:
        power: the exponent.

    Raises:
        ValueError: it is negative.
    """
    if power < 0:
        raise ValueError(f"power={power}: negative, and the loss is weighted by a^-power. Give 0 or more.")


def stepping(path: paths.Path, teacher: Net, velocity: str, solver: str) -> Step:
    """Return the step from a drawn ``I_s`` to ``m``, as a point and a mean velocity.

    Args:
        path: interpolant.
        teacher: network of the own velocity.
        velocity: ``"conditional"``, ``"chord"`` or ``"own"`` (see ``alpha_flow``).
        solver: ``"euler"``, ``"heun"`` or ``"jump"``.

    Returns:
        ``(target, batch, key, s, m) -> (I_s, v)``, ``[B, ...]`` each; ``v`` has no gradient where it is learned.

    Raises:
        ValueError: an unknown choice, or a solver without an own velocity.
    """
    checks.check_choice("velocity", velocity, VELOCITIES)
    checks.check_choice("solver", solver, SOLVERS)
    if solver != "euler" and velocity != "own":
        raise ValueError(
            f"solver={solver!r}: evaluates a velocity, which velocity={velocity!r} does not have. Use velocity='own'."
        )

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
