"""Where a residual vanishes, by an accelerated fixed point: what the exact inverse of a step is found with."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def solve(
    residual: Callable[[Array], Array], x: Float[Array, "b ..."], *, iterations: int, memory: int = 5
) -> Float[Array, "b ..."]:
    """``x`` with ``residual(x) = 0``, example by example: Anderson's acceleration of ``x <- x + residual(x)``.

    With the last differences ``dx_j`` of the iterates and ``dr_j`` of their residuals ``r``, at most ``memory``,
    ``x <- x + r - sum_j g_j (dx_j + dr_j)``, ``g = argmin |r - sum_j g_j dr_j|``. For a linear residual it is GMRES, so
    that nothing need contract (Walker and Ni, SIAM J. Numer. Anal. 49, 2011). Returns each example's iterate of least
    residual. Costs ``iterations + 1`` residuals.
    """
    flat = lambda a: a.reshape(len(x), -1)
    at = lambda z: flat(residual(z.reshape(x.shape)))
    dot = lambda a, b: jnp.sum(a * b, 1, keepdims=True)

    def accelerate(r, dx, dr):
        """``r - sum_j g_j (dx_j + dr_j)``, the least squares by Gram and Schmidt (LAPACK would be a custom call)."""
        move, basis = r, []
        for q, p in zip(dr, dx + dr, strict=True):
            norm = dot(q, q)
            for other, image, square in basis:
                g = dot(other, q) / square
                q, p = q - g * other, p - g * image
            # what depends on those before it, or is not there yet, has no share
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
    none = jnp.stack([jnp.zeros_like(start[0])] * memory)  # of x: inside shard_map they must vary as it does
    _, (best, _), *_ = jax.lax.fori_loop(0, iterations, improve, (start, start, none, none))
    return best.reshape(x.shape)
