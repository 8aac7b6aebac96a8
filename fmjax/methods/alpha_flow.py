"""Discrete Eulerian flow maps: a jump equals a short step along a velocity, and the jump from there."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods import views, weighting
from fmjax.methods.mean_flow import LOGIT_NORMAL
from fmjax.types import Batch, FlowMapMethod, Net, Params, expand

VELOCITIES = ("conditional", "chord", "own")
SOLVERS = ("euler", "heun", "jump")
BOOTSTRAPS = ("params", "target")


def alpha_flow(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = LOGIT_NORMAL,
    pair: Callable = functools.partial(times.ordered_pair, time=LOGIT_NORMAL),
    diagonal: float = 0.5,
    teacher: Net | None = None,
    velocity: str = "conditional",
    solver: str = "euler",
    fraction: Callable = times.sigmoid_fraction,
    power: float = 1.0,
    adaptive: float | None = None,
    floor: float = 1e-3,
    limit: float = 5e-3,
    bootstrap: str = "params",
    anneal: float = 0.0,
) -> FlowMapMethod:
    """Train a flow map by ``X_{s,t}(x) = X_{m,t}(x + (m - s) v)`` with ``m = s + a (t - s)``, without a derivative.

    This is AlphaFlow (arXiv 2510.20771), from flow matching on whole jumps (``a = 1``) to mean flow. Half of the batch
    has the flow-matching error ``|u(I_t, t, t) - dI_t|^2``, the rest ``a^-1 |d|^2`` of the difference
    ``d = u(I_s, s, t) - sg[a v + (1 - a) u(x_m, m, t)]``, ``x_m = I_s + (m - s) v``. With the published weights both
    are divided by ``|.|^2 + 1e-3``, and ``|d|^2`` has the factor ``a``; all norms are means over elements. The times
    are mean flow's, logit-normal of mean 0.4, two in order for jumps, but one on the diagonal: the file of the authors'
    own times was not found, and two repositories that derive from theirs have these. It departs from the paper:
    examples of less than 64 elements have no published weight (``weighting.exponent``; ``adaptive=1`` for it), no
    target is clipped, and the last ``a`` is 0.005 and not 0, where the authors' code changes to the derivative and the
    weight of mean flow: there ``d / a`` stands for the residual of mean flow, in the weight, too.

    In maps, ``(t - s) d = X_{s,t}(I_s) - X_{m,t}(x_m)``: ``d / a`` is a difference quotient, and the residual of
    ``eulerian`` as ``a -> 0``. Since no derivative is taken, every attention kernel works. ``soflow`` and
    ``consistency`` have other costs of ``d``; ``progressive`` in two parts is
    ``velocity="own", solver="jump", bootstrap="target", power=0`` at ``a = 1/2``.

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
        adaptive: exponent of the published weight: errors are divided by ``(|.|^2 + floor)^adaptive``, and ``|d|^2`` is
            multiplied by ``a^(2 adaptive)``; 0 for no weight, ``None``: 1 from 64 elements on, else 0.
        floor: constant of the published weight.
        limit: largest ``a`` at which the weight is mean flow's, ``(|d / a|^2 + floor)^-adaptive``; 0 for never.
        bootstrap: parameters of ``u(x_m, m, t)``, ``"params"`` or ``"target"``.
        anneal: fraction of the training during which ``|t - s| <= progress / anneal``; 0 for no bound.

    Returns:
        A method with ``velocity`` and ``flow_map``. ``aux`` has ``s``, ``t``, the masks of the two terms and
        ``residual``, the unweighted error: off the diagonal the mean of ``(d / a)^2``, which compares with the residual
        of ``eulerian``.

    Raises:
        ValueError: an unknown choice, a solver without an own velocity, a negative ``power``, a fraction outside [0,
            1], as ``weighting.adaptive``, or (in the loss) a batch that cannot be split.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.alpha_flow(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    check_power(power)
    checks.check_fraction(limit=limit)
    weighting.check_adaptive(adaptive, floor)

    def cost(d, s, t, a):
        p = weighting.exponent(adaptive, d)
        square = c.mse(d, jnp.zeros_like(d))
        early = a ** (2 * p - power) * weighting.adapted(square, p, floor)
        return jnp.where(a <= limit, a ** (2 - power) * weighting.adapted(square / a**2, p, floor), early)

    def matching_cost(error, x):
        return weighting.adapted(error, weighting.exponent(adaptive, x), floor)

    return difference(
        net, path=path, time=time, pair=pair, diagonal=diagonal, teacher=teacher, velocity=velocity, solver=solver,
        fraction=fraction, bootstrap=bootstrap, anneal=anneal, cost=cost, matching_cost=matching_cost,
    )  # fmt: skip


def difference(
    net: Net,
    *,
    path: paths.Path,
    time: Callable,
    pair: Callable,
    diagonal: float,
    fraction: Callable,
    cost: Callable[..., Array],
    matching_cost: Callable[..., Array] | None = None,
    teacher: Net | None = None,
    velocity: str = "conditional",
    solver: str = "euler",
    bootstrap: str = "params",
    anneal: float = 0.0,
) -> FlowMapMethod:
    """Train a flow map by a cost of the difference ``d`` of ``alpha_flow``.

    Args:
        net: as in ``alpha_flow``, and so are all arguments that are not listed here.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal.
        pair: distribution of ``(s, t)`` off the diagonal.
        diagonal: fraction of the batch on the diagonal.
        fraction: schedule of ``a``.
        cost: ``cost(d, s, t, a) -> [B]``, the loss off the diagonal.
        matching_cost: ``matching_cost(error, x) -> [B]``, the loss on the diagonal, of the mean squared error ``[B]``;
            by default the error itself.
        teacher: network of the own velocity.
        velocity: ``"conditional"``, ``"chord"`` or ``"own"``.
        solver: ``"euler"``, ``"heun"`` or ``"jump"``.
        bootstrap: ``"params"`` or ``"target"``.
        anneal: fraction of the training during which jumps are bounded.

    Returns:
        A method with ``velocity`` and ``flow_map``.

    Raises:
        ValueError: as ``alpha_flow``.
    """
    c.check_times(path, time)
    checks.check_fraction(diagonal=diagonal, anneal=anneal)
    step = stepping(path, teacher or net, velocity, solver)
    checks.check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    matching = c.matching(net, path, time)

    def on(params, target, batch, key):
        term = matching(params, target, batch, key)
        if matching_cost is None:
            return term
        return term._replace(per_example=matching_cost(term.per_example, batch.x1), residual=term.per_example)

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

    return views.two_time(net, c.two_terms(on, differing, diagonal))


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
