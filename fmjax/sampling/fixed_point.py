"""Anderson acceleration for root finding, and the exact inverse of a solver step by it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import checks
from fmjax.checks import NonNegative, Positive
from fmjax.sampling.costs import evaluations
from fmjax.types import Costed, FlowMapFn, Multistep, stated


def anderson(
    residual: Callable[[Array], Array], x: Float[Array, "b ..."], *, iterations: NonNegative, memory: Positive = 5
) -> Float[Array, "b ..."]:
    """Solve ``residual(x) = 0`` for every example, by Anderson acceleration of ``x <- x + residual(x)``.

    With the last differences ``dx_j`` of the iterates and ``dr_j`` of their residuals ``r``, at most ``memory``,
    ``x <- x + r - sum_j g_j (dx_j + dr_j)``, ``g = argmin |r - sum_j g_j dr_j|``. For a linear residual this is GMRES,
    which needs no contraction (Walker and Ni, SIAM J. Numer. Anal. 49, 2011). Costs ``iterations + 1`` residuals.

    Args:
        residual: a function of states ``[B, ...]`` that treats its examples independently.
        x: the first iterate.
        iterations: number of iterations.
        memory: number of differences that are kept.

    Returns:
        The iterate of smallest residual of each example.

    >>> import jax.numpy as jnp
    >>> anderson(lambda x: 3 - 2 * x, jnp.zeros((1, 1)), iterations=3).tolist()
    [[1.5]]
    """
    checks.check_hints(anderson, {"iterations": iterations, "memory": memory})
    flat = lambda a: a.reshape(len(x), -1)
    at = lambda z: flat(residual(z.reshape(x.shape)))
    dot = lambda a, b: jnp.sum(a * b, 1, keepdims=True)

    def accelerate(r, dx, dr):
        """``r - sum_j g_j (dx_j + dr_j)``; least squares by Gram and Schmidt, since LAPACK would be a custom call."""
        move, basis = r, []
        for q, p in zip(dr, dx + dr, strict=True):
            norm = dot(q, q)
            for other, image, square in basis:
                g = dot(other, q) / square
                q, p = q - g * other, p - g * image
            # a direction that depends on the earlier ones, or that is still empty, gets weight 0
            square = jnp.where(dot(q, q) > jnp.finfo(x.dtype).eps * norm, dot(q, q), jnp.inf)
            basis.append((q, p, square))
            g = dot(q, r) / square
            r, move = r - g * q, move - g * p
        return move

    def improve(i, carry):
        (z, r), (best, least), dx, dr = carry
        moved = z + accelerate(r, dx, dr)
        new = at(moved)
        better = dot(new, new) < dot(least, least)
        kept = (jnp.where(better, moved, best), jnp.where(better, new, least))
        return (moved, new), kept, dx.at[i % memory].set(moved - z), dr.at[i % memory].set(new - r)

    start = (flat(x), at(flat(x)))
    empty = jnp.stack([jnp.zeros_like(start[0])] * memory)  # of x: inside shard_map they must vary as it does
    _, (best, _), *_ = jax.lax.fori_loop(0, iterations, improve, (start, start, empty, empty))
    return best.reshape(x.shape)


def inverse(step: FlowMapFn, *, iterations: int = 20, start: FlowMapFn | None = None) -> Costed:
    """Return the exact inverse of a step: ``inverse(step)(y, s, t)`` is the ``x`` with ``step(x, t, s) = y``.

    By the fixed point ``x <- x + (y - step(x))``, accelerated (``anderson``). It converges for small enough steps;
    where it does not converge, the iterate of smallest residual is returned.

    Args:
        step: a deterministic step without memory.
        iterations: number of iterations.
        start: the first iterate ``start(y, s, t)``; by default ``step`` itself in the reverse direction.

    Returns:
        A step of ``iterations + 1`` evaluations of ``step`` and one of ``start``.

    Raises:
        TypeError: for a multistep step.

    >>> import jax.numpy as jnp
    >>> from fmjax import sampling
    >>> step = sampling.euler(lambda x, t, cond=None: -x)
    >>> y = step(jnp.ones((1, 1)), 0.0, 0.5)
    >>> inverse(step)(y, 0.5, 0.0).tolist(), inverse(step).nfe
    ([[1.0]], 22)
    """
    inner = stated(step)
    if isinstance(inner, Multistep):
        raise TypeError("step=Multistep: a step with a memory has no inverse. Use a one-step solver, such as rk4.")
    start = step if start is None else start
    each, first = evaluations(step, calls=iterations + 1), evaluations(start)

    def back(y, s, t, cond=None, key=None):
        residual = lambda x: y - step(x, t, s, cond, key)
        return anderson(residual, start(y, s, t, cond, key), iterations=iterations)

    return Costed(back, None if None in (each, first) else each + first, lambda ts: inner.check(ts[::-1]))
