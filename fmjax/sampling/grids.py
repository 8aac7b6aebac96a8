"""Grids of sampling times: even in a noise level, even in curvature, or the best of a teacher's by dynamic programming.

They are rising float32 arrays for ``samplers.sample`` (``times.uniform_grid`` is the even one in time). The last three
need a teacher's trajectories once: ``samplers.sample(..., trajectory=True)`` on a fine grid. ``curvature`` and
``jump_costs`` can be traced: with a large network jit them with its parameters as an argument.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import paths
from fmjax.types import Cond, Costed, FlowMapFn, VelocityFn, over_batch

COSTS = ("chord", "distance")


def edm_grid(
    n: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, path: paths.Path | None = None
) -> np.ndarray:
    """``n`` noise levels even in ``sigma^(1 / rho)``, then the data (EDM, arXiv 2206.00364, eq. 5): ``n`` steps.

    ``sigma_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho``, ``sigma_n = 0``, at the
    times of these levels on ``path``: ``t = 1 / (1 + sigma)`` on the linear one. Samples start from ``alpha x0`` at the
    first time, ``(1 - ts[0]) x0``; without the last time the grid stops at ``sigma_min`` (which on ``ve`` must be more
    than the path's own). Larger ``rho`` puts more steps near the data. Raises ``ValueError`` for ``n < 1``, levels that
    are not ``0 < sigma_min < sigma_max`` or that the path does not have, ``rho <= 0``, and a path with a latent.

    >>> edm_grid(3).round(4).tolist()
    [0.012299999594688416, 0.28110000491142273, 0.9980000257492065, 1.0]
    """
    _check_levels(n, sigma_min, sigma_max)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho={rho} must be positive and finite; the limit of large rho is log_snr_grid")
    return _at_levels(path, np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho)


def log_snr_grid(
    n: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, path: paths.Path | None = None
) -> np.ndarray:
    """As ``edm_grid``, levels even in ``log sigma``, that is in the log SNR ``-2 log sigma`` (arXiv 2206.00927)."""
    _check_levels(n, sigma_min, sigma_max)
    return _at_levels(path, np.geomspace(sigma_max, sigma_min, n))


def curvature(velocity: VelocityFn, xs: Float[Array, "s b ..."], ts, *, cond: Cond = None) -> Float[Array, " s"]:
    """``E |d^2 x / dt^2|^2`` along the flow's trajectories ``xs`` at the times ``ts``; a jvp, ``v_t + (v . grad) v``.

    Norms are over an example, the mean over the batch. Zero all along where a flow is straight.
    """
    ts = check_grid(ts)

    def at(now):
        x, t = now
        t = over_batch(t, x)
        v = lambda x, t: velocity(x, t, cond)
        _, bend = jax.jvp(v, (x, t), (v(x, t), jnp.ones_like(t)))
        return jnp.mean(jnp.sum(jnp.square(bend).reshape(len(x), -1), 1))

    return jax.lax.map(at, (xs, jnp.asarray(ts)))


def even_grid(n: int, ts, density) -> np.ndarray:
    """``n`` steps with equal shares of ``int density dt``, from ``ts[0]`` to ``ts[-1]`` (either order).

    ``density`` is known at the times ``ts`` and taken as its mean over each interval. With ``curvature`` every step has
    the same share of it; with its fourth root, ``sqrt |d^2 x / dt^2|``, Euler's errors ``h^2 |d^2 x / dt^2| / 2`` are
    equal, and their sum is least. Where the density is zero everywhere, a straight flow, the times are even. Raises
    ``ValueError`` for ``n < 1`` and densities that are negative, not finite or not one a time.
    """
    ts, density = check_grid(ts), np.asarray(density, np.float64)
    if density.shape != ts.shape or not (np.isfinite(density) & (density >= 0)).all():
        raise ValueError(f"even_grid needs a density >= 0 for each of {len(ts)} times, got {density.tolist()}")
    if n < 1:
        raise ValueError(f"a grid needs at least one step, got n={n}")
    at, density = ts.astype(np.float64), density if density.any() else np.ones_like(density)
    mass = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2 * np.abs(np.diff(at))))
    return check_grid(np.interp(np.linspace(0, 1, n + 1) * mass[-1], mass, at))


def jump_costs(
    step: FlowMapFn, xs: Float[Array, "s b ..."], ts, *, cost: str = "chord", cond: Cond = None
) -> Float[Array, "s s"]:
    """``c[i, j]``: what one ``step`` from the teacher's ``xs[i]`` to ``ts[j]`` gets wrong; infinite for ``j <= i``.

    The mean over the batch of

    * ``"chord"``, of GITS (arXiv 2405.11326): the distance of the jumped point from the line through the ends of the
      trajectory, less that of ``xs[j]``; it may be negative;
    * ``"distance"``, of BOSS (arXiv 2312.16414): ``|jump - xs[j]|``, the local error.

    GITS jumps by Euler in ``sigma``, ``diffusion.ddim``; other steps, or jumps of a flow map, give grids of their own.
    The network is evaluated once a time for steps of one evaluation. Raises ``ValueError`` for an unknown cost.
    """
    if cost not in COSTS:
        near = difflib.get_close_matches(str(cost), COSTS, 1, 0.0)[0]
        raise ValueError(f"cost={cost!r} must be one of {', '.join(COSTS)}; did you mean {near!r}?")
    ts = check_grid(ts)
    flat = lambda x: x.reshape(*x.shape[:2], -1)
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), -1))
    chord = flat(xs[-1:] - xs[:1])
    chord = chord / norm(chord)[..., None]

    def off_chord(y):
        y = flat(y - xs[:1])
        return norm(y - jnp.sum(y * chord, -1, keepdims=True) * chord)

    def row(now):
        x, s = now
        # what does not depend on the end of the jump, the network at its start, is not repeated by vmap
        jumped = jax.vmap(lambda t: step(x, over_batch(s, x), over_batch(t, x), cond))(jnp.asarray(ts))
        wrong = norm(flat(jumped - xs)) if cost == "distance" else off_chord(jumped) - off_chord(xs)
        return wrong.mean(1)

    costs = jax.lax.map(row, (xs, jnp.asarray(ts)))
    return jnp.where(jnp.tri(len(ts), dtype=bool), jnp.inf, costs)


def best_steps(costs, n: int, *, growth: float = 1.0, through: Sequence[int] = ()) -> tuple[int, ...]:
    """The ``n`` jumps ``0 = i_0 < i_1 < ... < i_n = S - 1`` of least ``sum_k growth^k c[i_k, i_{k+1}]``, as indices.

    By dynamic programming from the end, ``V_j^k = min_{i > j} c[j, i] + growth V_i^{k-1}``. ``growth`` above 1 (GITS:
    1.15) counts later errors more. Every index in ``through``, the bound of a segment, is one of the points. The grid
    is ``ts[list(indices)]``. Raises ``ValueError`` for costs that are not square or not numbers, ``n`` that there are
    no points for, or too few for ``through``, and ``growth <= 0``.

    >>> best_steps(np.array([[np.inf, 1, 5], [np.inf, np.inf, 1], [np.inf, np.inf, np.inf]]), 2)
    (0, 1, 2)
    """
    costs = np.array(costs, np.float64)
    points = len(costs)
    if costs.ndim != 2 or costs.shape != (points, points) or np.isnan(costs[np.triu_indices(points, 1)]).any():
        raise ValueError(f"best_steps needs a square matrix of costs without nan, got shape {costs.shape}")
    inner = sorted({int(b) for b in through} - {0, points - 1})
    if not len(inner) < n < points or not all(0 < b < points - 1 for b in inner):
        raise ValueError(
            f"n={n} steps over {points} points must be from {len(inner) + 1} to {points - 1}, through={tuple(through)} "
            "some of the points"
        )
    if not 0 < growth < math.inf:
        raise ValueError(f"growth={growth} must be positive and finite; 1 counts all errors alike")
    costs[np.tril_indices(points)] = np.inf
    for bound in inner:
        costs[:bound, bound + 1 :] = np.inf  # no jump across it
    best, ahead = np.full(points, np.inf), []
    best[-1] = 0
    for _ in range(n):
        total = costs + growth * best
        ahead.append(total.argmin(1))
        best = total.min(1)
    index = [0]
    for choice in reversed(ahead):
        index.append(int(choice[index[-1]]))
    return tuple(index)


def steps_per_segment(index: Sequence[int], through: Sequence[int]) -> tuple[int, ...]:
    """How many steps of ``best_steps(..., through=through)`` each segment got.

    >>> steps_per_segment((0, 4, 6, 7, 9), (6,))
    (2, 2)
    """
    inner = [b for b in sorted(set(through)) if index[0] < b < index[-1]]
    places = [list(index).index(b) for b in (index[0], *inner, index[-1])]
    return tuple(np.diff(places).tolist())


def _check_levels(n: int, sigma_min: float, sigma_max: float) -> None:
    if n < 1:
        raise ValueError(f"a grid needs at least one step, got n={n}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"noise levels need 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, {sigma_max=}")


def _at_levels(path: paths.Path | None, sigma: np.ndarray) -> np.ndarray:
    """The times of falling noise levels on a path, and ``t = 1``."""
    t = 1 / (1 + sigma)
    if path is not None:
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            t, _ = (np.asarray(a) for a in paths.match_snr(path, paths.linear(), jnp.asarray(t)))
            alpha, beta = (np.asarray(a) for a in path.coefficients(jnp.asarray(t)))
        if (missing := np.abs(alpha - sigma * beta) > 1e-6 * (alpha + sigma * beta)).any():
            raise ValueError(
                f"the path has no noise level {sigma[missing][0]:g}; give sigma_min and sigma_max within its own"
            )
    return check_grid(np.append(t, 1.0))


def uniform_grid(n: int, *, start: float = 0.0, stop: float = 1.0) -> np.ndarray:
    """``n + 1`` evenly spaced times from ``start`` to ``stop``: ``n`` solver steps. Raises ``ValueError`` for n < 1.

    >>> uniform_grid(4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if n < 1:
        raise ValueError(f"a grid needs at least one step, got n={n}")
    return np.linspace(start, stop, n + 1, dtype=np.float32)


SAME = 1e-6  # times closer than this are one: float32 grids of other lengths differ by a rounding error


def steps_at(ts, t) -> tuple[int, ...]:
    """The indices of the times ``t: [K]`` in the grid ``ts: [S]``; ``ValueError`` for the first that is not there."""
    ts, t = np.asarray(ts, np.float32), np.asarray(t, np.float32)
    gap = np.abs(t[:, None] - ts)
    if (gap > SAME).all(1).any():
        k = int(np.argmax((gap > SAME).all(1)))
        raise ValueError(
            f"t={t[k]:g} is not among these {len(ts)} times, whose nearest is {ts[gap[k].argmin()]:g}; take a grid "
            "that has it (uniform_grid(n) has all times of uniform_grid(m) where m divides n)"
        )
    return tuple(gap.argmin(1).tolist())


def per_step(ts, values) -> Callable[[Array], Array]:
    """A schedule given step by step: the function of time that is ``values[n]`` at ``ts[n]``, and ``nan`` elsewhere.

    For ``alpha`` and ``beta`` of a correction that are arrays ``[steps]`` over the solver's grid. It is one on any
    grid that has the times that are asked for; its ``check(t)`` raises ``ValueError`` for others. ``values`` may be
    traced: a change compiles nothing. Raises ``ValueError`` for values that are not one a time.

    >>> per_step(uniform_grid(2), [0.0, 0.25, 0.5])(jnp.array([1.0, 0.5, 0.7])).tolist()
    [0.5, 0.25, nan]
    """
    ts, values = np.asarray(ts, np.float32), jnp.asarray(values)
    if ts.shape != values.shape or ts.ndim != 1:
        raise ValueError(f"per_step needs one value a time, got values {values.shape} for times {ts.shape}")

    def at(t):
        gap = jnp.abs(t[..., None] - ts)
        value = values.astype(t.dtype)[jnp.argmin(gap, -1)]
        return jnp.where(jnp.min(gap, -1) <= SAME, value, jnp.nan)

    return Costed(at, nfe=0, check=lambda t: steps_at(ts, t))


def check_grid(ts) -> np.ndarray:
    """``ts`` as a numpy array ``[N + 1]``, float32, checked: at least two times, finite, strictly monotone.

    Grids are static: they decide the program (how many steps, in which direction). Raises ``ValueError``, or
    ``TypeError`` for a traced grid.
    """
    if isinstance(ts, jax.core.Tracer):
        raise TypeError("a grid of times is static: pass a numpy array or a list from outside jit, not a traced array")
    ts = np.asarray(ts, np.float32)
    if ts.ndim != 1 or ts.size < 2:
        raise ValueError(f"a grid needs at least two times in one axis, got shape {ts.shape}: {ts.tolist()}")
    if not np.isfinite(ts).all():
        raise ValueError(f"a grid needs finite times, got {ts.tolist()}")
    steps = np.diff(ts)
    if not ((steps > 0).all() or (steps < 0).all()):
        n = int(np.argmax(np.sign(steps) != np.sign(steps[0]))) if steps[0] != 0 else 0
        raise ValueError(
            f"a grid must rise or fall strictly, but ts[{n}]={ts[n]:g} is followed by ts[{n + 1}]={ts[n + 1]:g}; "
            "sort it, or drop the repeated time"
        )
    return ts
