"""From a velocity to a step, and the one place that knows diffrax.

A step has the signature of a flow map, ``step(x, s, t, cond, key) -> x``, so that a sampler cannot tell it from a
learned jump. Explicit Runge-Kutta steps are written here from their tableau, and steps of the SDEs that share the
marginals of the ODE; ``integrate`` runs a whole solve through diffrax, forward or backward in time, on a fixed grid or
adaptively.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import paths
from fmjax.keys import normal
from fmjax.sampling import fixed_point, grids
from fmjax.types import Cond, FlowMapFn, VelocityFn, expand, over_batch


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: ``k_i = v(x + h sum_j a_ij k_j, t + c_i h)``, ``x + h sum_i b_i k_i``."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]


EULER = Tableau(((),), (1,), (0,))
MIDPOINT = Tableau(((), (1 / 2,)), (0, 1), (0, 1 / 2))
HEUN = Tableau(((), (1,)), (1 / 2, 1 / 2), (0, 1))
RK4 = Tableau(((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0, 1 / 2, 1 / 2, 1))
RK38 = Tableau(((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), (0, 1 / 3, 2 / 3, 1))
TABLEAUS = {"euler": EULER, "midpoint": MIDPOINT, "heun": HEUN, "rk4": RK4, "rk38": RK38}
SDE_STAGES = {"euler_maruyama": 1, "stochastic_heun": 2, "reverse_diffusion": 1}
DIFFUSION_STAGES = {"ddim": 1, "edm_heun": 2, "dpmpp_2m": 1, "ipndm": 1, "initial_noise": 1}


def tableau(name: str) -> Tableau:
    """The tableau of a fixed-step method by name; ``ValueError`` with the nearest name otherwise."""
    if name in TABLEAUS:
        return TABLEAUS[name]
    near = difflib.get_close_matches(name, TABLEAUS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no fixed-step solver {name!r}{hint} (there are {', '.join(TABLEAUS)})")


def nfe(solver: str) -> int:
    """Network evaluations of one step (of an SDE step without a ``score`` of its own); those of ``diffusion`` too."""
    return (SDE_STAGES | DIFFUSION_STAGES).get(solver) or len(tableau(solver).b)


def runge_kutta(velocity: VelocityFn, method: Tableau) -> FlowMapFn:
    """One explicit Runge-Kutta step from ``s`` to ``t`` (either direction); times ``[B]`` or scalars.

    The stages are a loop, so that the network is compiled once whatever their number.
    """
    stages = len(method.b)
    lower = np.zeros((stages, stages))
    for i, row in enumerate(method.a):
        lower[i, : len(row)] = row

    def step(x, s, t, cond=None, key=None):
        s, h = over_batch(s, x), over_batch(t, x) - over_batch(s, x)
        wide_h = expand(h, x).astype(x.dtype)
        if stages == 1:
            return x + wide_h * velocity(x, s, cond)

        def stage(ks, row):
            i, a, c = row
            at = x + wide_h * jnp.tensordot(a, ks, 1)
            return ks.at[i].set(velocity(at, s + c * h, cond)), None

        rows = (jnp.arange(stages), jnp.asarray(lower, x.dtype), jnp.asarray(method.c, s.dtype))
        # zeros_like of x, not zeros: inside shard_map the carry must vary over devices as x does
        ks, _ = jax.lax.scan(stage, jnp.stack([jnp.zeros_like(x)] * stages), rows)
        return x + wide_h * jnp.tensordot(jnp.asarray(method.b, x.dtype), ks, 1)

    return step


def euler(velocity: VelocityFn) -> FlowMapFn:
    """``x + (t - s) v(x, s)``: order 1, 1 evaluation."""
    return runge_kutta(velocity, EULER)


def midpoint(velocity: VelocityFn) -> FlowMapFn:
    """``x + h v(x + h/2 v(x, s), s + h/2)``: order 2, 2 evaluations."""
    return runge_kutta(velocity, MIDPOINT)


def heun(velocity: VelocityFn) -> FlowMapFn:
    """The explicit trapezoidal rule: order 2, 2 evaluations."""
    return runge_kutta(velocity, HEUN)


def rk4(velocity: VelocityFn) -> FlowMapFn:
    """The classical Runge-Kutta method: order 4, 4 evaluations."""
    return runge_kutta(velocity, RK4)


def rk38(velocity: VelocityFn) -> FlowMapFn:
    """Kutta's 3/8 rule: order 4, 4 evaluations. It is what torchdiffeq calls ``rk4``."""
    return runge_kutta(velocity, RK38)


STEPS: dict[str, Callable[[VelocityFn], FlowMapFn]] = {
    "euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4, "rk38": rk38
}  # fmt: skip


Strength = float | str | Callable[[Array], Array]


def euler_maruyama(
    velocity: VelocityFn,
    *,
    strength: Strength = 1.0,
    path: paths.Path | None = None,
    score: VelocityFn | None = None,
) -> FlowMapFn:
    """``x + h v + |h| g^2/2 S + g sqrt|h| z``, ``z ~ N(0, I)`` from the example's key: weak order 1, 1 evaluation.

    A step of ``dX = (v + g^2/2 S) dt + g dW``, whose marginals are the ODE's for every ``g_t >= 0`` (arXiv 2303.08797,
    2011.13456), from ``s`` to ``t = s + h``; falling times take the SDE that runs backward, ``v - g^2/2 S``.

    * ``strength`` is ``g``: a number (0 is ``euler`` itself), a function of times ``[B]``, or ``"memoryless"``
      (``memoryless(path)``, which makes ``x1`` independent of ``x0``).
    * ``score`` is ``S(x, t, cond)``; it costs evaluations of its own. Without it ``S`` comes from the velocity by
      ``paths.score`` along ``path`` (linear by default; it must be the velocity's own), which takes the source to be
      N(0, I) and independent of the data. With a coupling, or a latent in the path, learn the score.

    A step that starts where ``g`` is infinite (memoryless: ``t = 0``) or where ``alpha = 0`` leaves the score out of
    the velocity (``t = 1``, going backward) is one of the ODE: no noise and no score. Needs a key. Raises
    ``ValueError`` for a negative or unknown strength, for a path with a latent and no score, and without a key.
    """
    if not callable(strength) and strength == 0:
        return euler(velocity)
    fields, gain = _sde(velocity, strength, path, score)

    def step(x, s, t, cond=None, key=None):
        s, h = over_batch(s, x), over_batch(t, x) - over_batch(s, x)
        g, _ = gain(s)
        v, push = fields(x, s, g, cond)
        wide = lambda a: expand(a, x).astype(x.dtype)
        return x + wide(h) * v + wide(jnp.abs(h)) * push + wide(g * jnp.sqrt(jnp.abs(h))) * draw_noise(key, x)

    return step


def stochastic_heun(
    velocity: VelocityFn,
    *,
    strength: Strength = 1.0,
    path: paths.Path | None = None,
    score: VelocityFn | None = None,
) -> FlowMapFn:
    """Heun's step for additive noise, options as ``euler_maruyama``'s: weak order 2, 2 evaluations.

    With ``b = h v + |h| g^2/2 S`` and ``n = g((s+t)/2) sqrt|h| z``: ``y = x + b(x, s) + n``, then
    ``x + (b(x, s) + b(y, t)) / 2 + n``. Where a step ends at such a place as ``euler_maruyama`` names, the score of
    its start serves for both; one such step keeps the order of the whole. Strength 0 is ``heun`` itself.
    """
    if not callable(strength) and strength == 0:
        return heun(velocity)
    fields, gain = _sde(velocity, strength, path, score)

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        wide = lambda a: expand(a, x).astype(x.dtype)
        h, (g_s, noisy), (g_t, open_) = wide(t - s), gain(s), gain(t)
        middle = jnp.where(noisy, gain((s + t) / 2)[0], 0)
        noise = wide(middle * jnp.sqrt(jnp.abs(t - s))) * draw_noise(key, x)

        def stage(carry, now):
            y, before, moved = carry
            time, g, told = now
            v, push = fields(y, time, g, cond)
            push = jnp.where(expand(told, x), push, before)
            move = h * v + jnp.abs(h) * push
            return (x + move + noise, push, moved + move / 2), None

        rows = (jnp.stack([s, t]), jnp.stack([g_s, g_t]), jnp.stack([noisy, noisy & open_]))
        (_, _, moved), _ = jax.lax.scan(stage, (x, jnp.zeros_like(x), jnp.zeros_like(x)), rows)
        return x + moved + noise

    return step


def memoryless(path: paths.Path | None = None) -> Callable[[Array], Array]:
    """The strength ``g^2 = 2 eta``, ``eta = alpha (alpha beta' - alpha' beta) / beta``: DDPM's (arXiv 2409.08861).

    With it ``x1`` does not depend on ``x0``. Linear path: ``g^2 = 2 (1 - t) / t``. Infinite where ``beta = 0``. Raises
    ``ValueError`` for a path with a latent.
    """
    path = path or paths.linear()
    paths.refuse_latent("the memoryless strength", path)

    def strength(t):
        (alpha, beta), (d_alpha, d_beta) = jax.jvp(path.coefficients, (t,), (jnp.ones_like(t),))
        return jnp.sqrt(2 * alpha * (alpha * d_beta - d_alpha * beta) / beta)

    return strength


def _sde(velocity, strength, path, score):
    """``fields(x, t, g, cond) -> (v, g^2/2 S)`` and ``gain(t) -> (g, whether g and the score have values at t)``."""
    own_path = path or paths.linear()
    if strength == "memoryless":
        strength = memoryless(own_path)
    elif isinstance(strength, str):
        raise ValueError(f"no strength {strength!r}: give a number, a function of time or 'memoryless'")
    elif not callable(strength) and not 0 <= strength < np.inf:
        raise ValueError(f"the strength of diffusion is a number g >= 0, got {strength}")
    if score is None:
        paths.refuse_latent("the score of an SDE step, where score=... is not given,", own_path)

    def gain(t):
        g = jnp.broadcast_to(jnp.asarray(strength(t) if callable(strength) else strength, t.dtype), t.shape)
        open_ = jnp.isfinite(g)
        if score is None:  # cos(pi / 2) in floating point is no zero
            open_ &= own_path.coefficients(t)[0] > 8 * jnp.finfo(t.dtype).eps
        return jnp.where(open_, g, 0), open_

    def fields(x, t, g, cond):
        v = velocity(x, t, cond)
        s = paths.score(own_path, x, v, t) if score is None else score(x, t, cond)
        g = expand(g, x).astype(x.dtype)
        return v, jnp.where(g == 0, 0, jnp.square(g) / 2 * s)

    return fields, gain


def draw_noise(key, x: Array) -> Array:
    """The noise of a step, ``N(0, I)`` of the shape of ``x`` from its keys ``[B]``; ``ValueError`` without them."""
    if key is None:
        raise ValueError("this step draws noise and needs a key: sample(..., key=jax.random.key(seed))")
    return normal(key, x.shape[1:], x.dtype)


def inverse(step: FlowMapFn, *, iterations: int = 20, start: FlowMapFn | None = None) -> FlowMapFn:
    """The exact inverse of a step: ``inverse(step)(y, s, t)`` finds ``x`` with ``step(x, t, s) = y``.

    The fixed point ``x <- x + (y - step(x))``, accelerated (``fixed_point.solve``), from ``start(y, s, t)``, by default
    the reverse step of ``y``. It converges for small enough steps; where it does not, what it found of least residual
    is returned. Costs ``iterations + 1`` steps beside the start.
    """
    start = step if start is None else start

    def back(y, s, t, cond=None, key=None):
        residual = lambda x: y - step(x, t, s, cond, key)
        return fixed_point.solve(residual, start(y, s, t, cond, key), iterations=iterations)

    return back


def _erk(name: str):
    """A diffrax solver from one of the tableaus; built on demand, since importing diffrax costs half a second."""
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


def diffrax_solver(solver):
    """A name of this module, a name of diffrax's (``"Tsit5"``), or a diffrax solver itself."""
    import diffrax

    if isinstance(solver, diffrax.AbstractSolver):
        return solver
    if solver in TABLEAUS:
        return _erk(solver)
    found = getattr(diffrax, solver, None)
    if isinstance(found, type) and issubclass(found, diffrax.AbstractSolver):
        return found()
    names = [*TABLEAUS, "Tsit5", "Dopri5", "Dopri8", "Bosh3", "Ralston"]
    near = difflib.get_close_matches(solver, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no solver {solver!r}{hint} (ours: {', '.join(TABLEAUS)}; or any diffrax solver by name)")


def _max_rms(y):
    """The largest root-mean-square over the batch: the hardest example sets the step, not the average one."""
    return jnp.max(jnp.sqrt(jnp.mean(jnp.square(y), axis=tuple(range(1, y.ndim)))))


def _between(velocity: VelocityFn, x, s, t, cond, solver, rtol: float, atol: float, max_steps: int):
    """An adaptive solve from ``s`` to ``t``, a diffrax solution; it has no callback, as ``SaveAt(ts=...)`` would."""
    import diffrax

    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, c: velocity(y, over_batch(t, y), c)),
        diffrax_solver(solver), t0=s, t1=t, dt0=None, y0=x, args=cond, max_steps=max_steps, throw=False,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, norm=_max_rms),
    )  # fmt: skip


def integrate(
    velocity: VelocityFn,
    x: Float[Array, "b ..."],
    ts,
    *,
    solver="rk4",
    cond: Cond = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 4096,
) -> tuple[Float[Array, "n b ..."], Any]:
    """Solves ``dx/dt = v(x, t)`` through diffrax and saves ``x`` at every time of ``ts`` (rising or falling).

    Without tolerances each interval of ``ts`` is one step (``StepTo``). With ``rtol`` and ``atol`` steps are adaptive,
    at most ``max_steps`` an interval, the error being the largest over the batch (a mean would dilute the hardest
    example). Returns ``(xs, result)``, ``xs: [len(ts), B, ...]`` and a ``diffrax.RESULTS``; nothing is raised inside
    jit, where a host callback would force collectives and defeat the compilation cache: give both to ``check`` outside
    it. Raises ``ValueError`` for a bad grid or solver.
    """
    import diffrax

    ts = grids.check_grid(ts)
    if (rtol is None) != (atol is None):
        raise ValueError(f"give both rtol and atol or neither, got rtol={rtol}, atol={atol}")
    grid = jnp.asarray(ts, jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    if rtol is not None:

        def interval(carry, now):
            y, worst = carry
            solution = _between(velocity, y, *now, cond, solver, rtol, atol, max_steps)
            result = diffrax.RESULTS.where(worst == diffrax.RESULTS.successful, solution.result, worst)
            return (solution.ys[-1], result), solution.ys[-1]

        start = (x, diffrax.RESULTS.successful)
        (_, result), xs = jax.lax.scan(interval, start, (grid[:-1], grid[1:]))
        return jnp.concatenate([x[None], xs]), result

    class Grid(diffrax.StepTo):
        """``StepTo`` without its checks, which put callbacks into the program; ``check_grid`` has made them."""

        def wrap(self, direction):
            return type(self)(ts=self.ts * direction)

        def init(self, *args):
            return self.ts[1], 2

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, c: velocity(y, over_batch(t, y), c)),
        diffrax_solver(solver), t0=grid[0], t1=grid[-1], dt0=None, y0=x, args=cond, max_steps=len(ts) - 1, throw=False,
        saveat=diffrax.SaveAt(t0=True, steps=True), stepsize_controller=Grid(ts=grid),
    )  # fmt: skip
    return solution.ys, solution.result


def check(xs: Array, result, *, what: str = "the solve") -> Array:
    """Turns a failed solve into an error, outside jit: diffrax's result, if any, then finiteness, not checked by it.

    Returns ``xs``. Raises ``RuntimeError`` with diffrax's reason, or naming the first time index that is not finite.
    """
    import diffrax

    if result is not None and result != diffrax.RESULTS.successful:
        raise RuntimeError(f"{what} failed: {diffrax.RESULTS[result]} (loosen rtol/atol or raise max_steps)")
    finite = np.asarray(jnp.isfinite(xs).reshape(xs.shape[0], -1).all(1))
    if not finite.all():
        raise RuntimeError(f"{what} left finite numbers at time index {int(np.argmin(finite))} of {len(finite) - 1}")
    return xs


def from_diffrax(velocity: VelocityFn, *, solver="Tsit5", rtol: float = 1e-5, atol: float = 1e-5) -> FlowMapFn:
    """A step that solves from ``s`` to ``t`` adaptively with any diffrax solver; ``s`` and ``t`` are scalars."""

    def step(x, s, t, cond=None, key=None):
        import diffrax

        solution = _between(velocity, x, jnp.min(s), jnp.min(t), cond, solver, rtol, atol, 4096)
        return jnp.where(solution.result == diffrax.RESULTS.successful, solution.ys[-1], jnp.nan)

    return step
