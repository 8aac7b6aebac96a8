"""Solves through diffrax: whole trajectories on a grid or with adaptive steps, and adaptive steps of a sampler.

This is the only module that knows diffrax. Importing diffrax costs half a second, so functions import it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fmjax.checks import nearest
from fmjax.sampling import grids
from fmjax.sampling.explicit import TABLEAUS, tableau
from fmjax.sampling.states import time_dtype, wide_state
from fmjax.types import Cond, Costed, VelocityFn, expand, over_batch


def diffrax_solver(solver: Any) -> Any:
    """Return a diffrax solver by its name.

    Args:
        solver: the name of a Runge-Kutta method of this package (``"rk4"``) or of a diffrax solver (``"Tsit5"``), a
            diffrax solver, or its class.

    Returns:
        A ``diffrax.AbstractSolver``.

    Raises:
        ValueError: for an unknown name, with the nearest one.

    >>> type(diffrax_solver("Tsit5")).__name__, type(diffrax_solver("rk4")).__name__
    ('Tsit5', 'rk4')
    """
    import diffrax

    if isinstance(solver, diffrax.AbstractSolver):
        return solver
    if isinstance(solver, str) and solver in TABLEAUS:
        return _explicit(solver)
    kind = getattr(diffrax, solver, None) if isinstance(solver, str) else solver
    if isinstance(kind, type) and issubclass(kind, diffrax.AbstractSolver):
        return kind()
    names = [*TABLEAUS, "Tsit5", "Dopri5", "Dopri8", "Bosh3", "Ralston"]
    raise ValueError(
        f"solver={solver!r}: no such solver{nearest(str(solver), names)}. Use one of {', '.join(TABLEAUS)}, or any "
        "diffrax solver by its name."
    )


def integrate(
    velocity: VelocityFn,
    x: Array,
    ts: Any,
    *,
    solver: Any = "rk4",
    cond: Cond = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 4096,
) -> tuple[Array, Any]:
    """Solve ``dx/dt = v(x, t)`` and return the states at all times of a grid, rising or falling.

    Without tolerances each interval of the grid is one step. With both tolerances the steps are adaptive, and the error
    is the largest over the batch (a mean would dilute the hardest example). A failed solve raises nothing under jit,
    where a host callback would force collectives and defeat the compilation cache: pass both results to
    ``checked_solve`` outside of jit.

    Args:
        velocity: ``v(x, t, cond)``.
        x: states ``[B, ...]`` at ``ts[0]``.
        ts: the grid ``[N + 1]``, or the number ``N`` of its uniform steps.
        solver: see ``diffrax_solver``.
        cond: the condition of the velocity.
        rtol: relative tolerance.
        atol: absolute tolerance.
        max_steps: largest number of adaptive steps in one interval.

    Returns:
        The states ``[N + 1, B, ...]`` and a ``diffrax.RESULTS``.

    Raises:
        ValueError: for a bad grid, an unknown solver, and one tolerance without the other.

    >>> import jax.numpy as jnp
    >>> xs, result = integrate(lambda x, t, cond=None: -x, jnp.ones((1, 1)), 2, solver="euler")
    >>> checked_solve(xs, result)[:, 0, 0].tolist()
    [1.0, 0.5, 0.25]
    """
    import diffrax

    x, dtype = wide_state("x", x)
    ts = grids.check_grid(ts, dtype=time_dtype(x))
    if (rtol is None) != (atol is None):
        raise ValueError(f"rtol={rtol}, atol={atol}: one without the other. Give both tolerances, or neither.")
    grid = jnp.asarray(ts)
    if rtol is not None:

        def interval(carry, now):
            y, worst = carry
            solution = _between(velocity, y, *now, cond, solver, rtol, atol, max_steps)
            result = diffrax.RESULTS.where(worst == diffrax.RESULTS.successful, solution.result, worst)
            return (solution.ys[-1], result), solution.ys[-1]

        start = (x, diffrax.RESULTS.successful)
        (_, result), xs = jax.lax.scan(interval, start, (grid[:-1], grid[1:]))
        return jnp.concatenate([x[None], xs]).astype(dtype), result

    class Grid(diffrax.StepTo):
        """``StepTo`` without its checks, which put callbacks into the program; ``check_grid`` has made them."""

        def wrap(self, direction):
            return type(self)(ts=self.ts * direction)

        def init(self, *args):
            return self.ts[1], 2

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, c: velocity(y, over_batch(t, y), c).astype(y.dtype)),
        diffrax_solver(solver), t0=grid[0], t1=grid[-1], dt0=None, y0=x, args=cond, max_steps=len(ts) - 1, throw=False,
        saveat=diffrax.SaveAt(t0=True, steps=True), stepsize_controller=Grid(ts=grid),
    )  # fmt: skip
    return solution.ys.astype(dtype), solution.result


def checked_solve(xs: Array, result: Any, *, what: str = "the solve") -> Array:
    """Raise an error for a failed solve, outside of jit, or return its states.

    Args:
        xs: the states ``[N + 1, B, ...]`` of ``integrate``.
        result: the ``diffrax.RESULTS`` of ``integrate``, or ``None``.
        what: name of the solve in the error.

    Returns:
        ``xs``.

    Raises:
        RuntimeError: with diffrax's reason, or with the first time index whose states are not all finite.

    >>> import jax.numpy as jnp
    >>> checked_solve(jnp.ones((2, 1, 1)), None).shape
    (2, 1, 1)
    """
    import diffrax

    if result is not None and result != diffrax.RESULTS.successful:
        raise RuntimeError(f"{what} failed: {diffrax.RESULTS[result]} Loosen rtol and atol, or raise max_steps.")
    finite = np.asarray(jnp.isfinite(xs).reshape(xs.shape[0], -1).all(1))
    if not finite.all():
        raise RuntimeError(f"{what} has non-finite values at time index {int(np.argmin(finite))} of {len(finite) - 1}.")
    return xs


def from_diffrax(
    velocity: VelocityFn,
    *misplaced: Any,
    solver: Any = "Tsit5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
) -> Costed:
    """Return a step that solves from ``s`` to ``t`` adaptively with any diffrax solver.

    Each example has its own interval; the hardest example of the batch sets the adaptive steps. The number of network
    evaluations depends on the state, so the cost of this step is unknown.

    Args:
        velocity: ``v(x, t, cond)``.
        solver: see ``diffrax_solver``.
        rtol: relative tolerance.
        atol: absolute tolerance.
        max_steps: largest number of adaptive steps from ``s`` to ``t``.

    Returns:
        A step ``(x, s, t, cond, key) -> x``; ``nan`` where the solve fails.

    Raises:
        TypeError: for a solver that is not passed by name.
        ValueError: for an unknown solver.

    >>> import jax.numpy as jnp
    >>> step = from_diffrax(lambda x, t, cond=None: -x)
    >>> round(float(step(jnp.ones((1, 1)), 0.0, 0.5)[0, 0]), 3)
    0.607
    """
    if misplaced:
        raise TypeError(f"solver={misplaced[0]}: options are passed by name. Write from_diffrax(velocity, solver=...).")
    diffrax_solver(solver)

    def step(x, s, t, cond=None, key=None):
        import diffrax

        (x, dtype), s, h = wide_state("x", x), over_batch(s, x), over_batch(t, x) - over_batch(s, x)

        def over_interval(y, fraction, cond):
            return expand(h, y).astype(y.dtype) * velocity(y, s + fraction * h, cond)

        first, last = jnp.zeros((), s.dtype), jnp.ones((), s.dtype)
        solution = _between(over_interval, x, first, last, cond, solver, rtol, atol, max_steps)
        return jnp.where(solution.result == diffrax.RESULTS.successful, solution.ys[-1], jnp.nan).astype(dtype)

    return Costed(step)


def _explicit(name: str):
    """A diffrax solver from one of the tableaus."""
    import diffrax

    native = {"euler": diffrax.Euler, "midpoint": diffrax.Midpoint, "heun": diffrax.Heun}
    if name in native:
        return native[name]()
    method = tableau(name)
    butcher = diffrax.ButcherTableau(
        a_lower=tuple(np.asarray(row, np.float64) for row in method.a[1:]),
        b_sol=np.asarray(method.b, np.float64),
        b_error=np.zeros(len(method.b)),
        c=np.asarray(method.c[1:], np.float64),
    )

    class Solver(diffrax.AbstractERK):
        tableau = butcher
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms):
            return 4

    Solver.__name__ = name
    return Solver()


def _max_rms(y):
    """The largest root-mean-square over the batch: the hardest example sets the step, not the average example."""
    return jnp.max(jnp.sqrt(jnp.mean(jnp.square(y), axis=tuple(range(1, y.ndim)))), initial=0.0)


def _between(velocity: VelocityFn, x, s, t, cond, solver, rtol: float, atol: float, max_steps: int):
    """An adaptive solve from ``s`` to ``t``, a diffrax solution, without the callback of ``SaveAt(ts=...)``."""
    import diffrax

    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, c: velocity(y, over_batch(t, y), c).astype(y.dtype)),
        diffrax_solver(solver), t0=s, t1=t, dt0=None, y0=x, args=cond, max_steps=max_steps, throw=False,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, norm=_max_rms),
    )  # fmt: skip
