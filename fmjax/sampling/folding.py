"""Samplers on a box: any step, folded back by reflection at the faces (arXiv 2304.04740, 2405.16577)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.checks import Refusal
from fmjax.sampling.explicit import runge_kutta, tableau
from fmjax.sampling.sample import with_memory
from fmjax.types import FlowMapFn, Multistep, VelocityFn


class Folds(NamedTuple):
    """The memory of a folded step.

    Attributes:
        inner: the memory of the step inside; ``None`` for a step without memory.
        folded: number of coordinates that were folded, over the number of coordinates, summed over the steps, ``[B]``.
            An exact flow on the box has 0: reflection hides a wrong field, and this number shows it.
    """

    inner: Any
    folded: Array


def fold(x: Float[Array, "b ..."], *, low: float = -1.0, high: float = 1.0) -> Float[Array, "b ..."]:
    """Reflect states at the faces of a box until they lie inside.

    With ``y = (x - low) mod 2 (high - low)``: ``low + y``, or ``high`` less what ``y`` exceeds ``high - low`` by.

    Args:
        x: states ``[B, ...]``.
        low: lower bound of each coordinate.
        high: upper bound of each coordinate, above ``low``.

    Returns:
        States in ``[low, high]``; states inside are returned to the bit.

    Raises:
        ValueError: bounds that do not rise.

    >>> fold(jnp.array([0.5, 1.25, -1.5, 3.5])).tolist()
    [0.5, 0.75, -0.5, -0.5]
    """
    _check_box(low, high)
    width = high - low
    y = jnp.mod(x - low, 2 * width)
    inside = (x >= low) & (x <= high)
    return jnp.where(inside, x, jnp.clip(low + jnp.where(y > width, 2 * width - y, y), low, high))


def folded(step: FlowMapFn | Multistep, *, low: float = -1.0, high: float = 1.0) -> Multistep:
    """Return a step followed by reflection at the faces of a box.

    Around Euler-Maruyama it is the sampler of reflected diffusion, around an ODE step the sampler of reflected flow
    matching: start from ``sources.uniform_noise`` and use a velocity of paths that stay inside, such as the linear path
    between two points of the box. The flow of an exact velocity never leaves the box; the steps of a learned or guided
    one may.

    Args:
        step: a step ``(x, s, t, cond, key) -> x`` or a ``types.Multistep``.
        low: lower bound of each coordinate.
        high: upper bound of each coordinate, above ``low``.

    Returns:
        A step of the same cost and check, with the memory ``Folds``.

    Raises:
        ValueError: bounds that do not rise.

    >>> from fmjax import sampling
    >>> step = folded(sampling.euler(lambda x, t, cond=None: 3 * jnp.ones_like(x)))
    >>> x, info = sampling.sample(step, jnp.zeros((1, 1)), 2, info=True)  # 0, 1.5 folded to 0.5, 2 folded to 0
    >>> x.tolist(), info.memory.folded.tolist()
    ([[0.0]], [2.0])
    """
    _check_box(low, high)
    inner = with_memory(step)

    def init(x):
        return Folds(inner.init(x), jnp.zeros((len(x),), x.dtype))

    def move(memory, x, s, t, cond=None, key=None):
        y, new = inner.step(memory.inner, x, s, t, cond, key)
        outside = ((y < low) | (y > high)).astype(memory.folded.dtype)
        fraction = outside.mean(tuple(range(1, x.ndim)))
        return fold(y, low=low, high=high), Folds(new, memory.folded + fraction)

    return Multistep(init, move, inner.nfe, inner.check)


def reflected(
    velocity: VelocityFn,
    *,
    solver: Literal["euler", "midpoint", "heun", "rk4", "rk38"] = "euler",
    low: float = -1.0,
    high: float = 1.0,
) -> Multistep:
    """Return a Runge-Kutta step on a box, for configs: ``folded`` around a solver by its name.

    Args:
        velocity: ``v(x, t, cond)``.
        solver: name of the solver (``tableau``).
        low: lower bound of each coordinate.
        high: upper bound of each coordinate, above ``low``.

    Returns:
        A step with the memory ``Folds``.

    Raises:
        ValueError: bounds that do not rise, or another solver.

    >>> from fmjax import sampling
    >>> step = reflected(lambda x, t, cond=None: 3 * jnp.ones_like(x), solver="heun")
    >>> sampling.sample(step, jnp.zeros((1, 1)), 1).tolist(), step.nfe
    ([[-1.0]], 2)
    """
    return folded(runge_kutta(velocity, tableau(solver)), low=low, high=high)


def _check_box(low: float, high: float) -> None:
    if not low < high:
        raise Refusal("high", high, f"not above low={low}", "Give bounds that rise")
