"""Measure the shape of sampling trajectories, of ``sample(..., trajectory=True)`` (arXiv 2405.11326, 2305.19947)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import checks, paths
from fmjax.sampling.grids import check_grid
from fmjax.types import Cond, VelocityFn, over_batch


def chord_deviation(xs: Float[Array, "s b ..."]) -> Float[Array, "s b"]:
    """Return the distance of trajectories from the line through their ends, over the distance of the ends.

    Args:
        xs: trajectories ``[S, B, ...]``.

    Returns:
        One number for each time and trajectory, 0 at both ends and on a straight line.

    >>> bent = jnp.array([[[0.0, 0.0]], [[1.0, 1.0]], [[2.0, 0.0]]])
    >>> chord_deviation(bent)[:, 0].tolist()
    [0.0, 0.5, 0.0]
    """
    offset = _flat(xs - xs[:1])
    length = _norm(offset[-1])
    axis = offset[-1] / length[:, None]
    return _norm(offset - jnp.sum(offset * axis, -1, keepdims=True) * axis) / length


def length_ratio(xs: Float[Array, "s b ..."]) -> Float[Array, " b"]:
    """Return the length of trajectories over the distance of their ends: 1 for a straight line, else more.

    Args:
        xs: trajectories ``[S, B, ...]``, joined by segments.

    Returns:
        One number for each trajectory, at least 1.

    >>> length_ratio(jnp.array([[[0.0, 0.0]], [[4.0, 3.0]], [[8.0, 0.0]]])).tolist()
    [1.25]
    """
    flat = _flat(xs)
    return jnp.sum(_norm(jnp.diff(flat, axis=0)), 0) / _norm(flat[-1] - flat[0])


def component_fractions(xs: Float[Array, "s b ..."], *, count: int = 3) -> Float[Array, "b k"]:
    """Return the fractions of the variance of each trajectory in its largest principal components.

    The variance is over the points of one trajectory: a straight line has 1 component, a trajectory in a plane 2. The
    finding of the paper: three components hold nearly all, whatever the dimension.

    Args:
        xs: trajectories ``[S, B, ...]``.
        count: number of components, at most ``S``.

    Returns:
        Fractions ``[B, count]``, falling; their sum is at most 1.

    Raises:
        ValueError: a count outside ``1 .. S``.

    >>> line = jnp.linspace(0.0, 1.0, 5)[:, None, None] * jnp.ones((1, 1, 7))
    >>> component_fractions(line, count=2).round(3).tolist()
    [[1.0, 0.0]]
    """
    checks.check_range("count", count, checks.Range(1, len(xs)))
    flat = _flat(xs)
    centred = (flat - flat.mean(0)).swapaxes(0, 1)
    values = jnp.linalg.eigvalsh(centred @ centred.swapaxes(1, 2))[:, ::-1]
    return values[:, :count] / values.sum(1, keepdims=True)


def jump_distance(
    velocity: VelocityFn,
    xs: Float[Array, "s b ..."],
    ts: Any,
    *,
    path: paths.Path = paths.linear(),
    cond: Cond = None,
) -> Float[Array, " n"]:
    """Return how far the data prediction along trajectories is from their end: what an early jump to the data loses.

    ``(E |D(x_t, t) - x_1|^2)^(1/2)``, ``|.|`` the norm over an example. The "ODE jump" of the paper stops at ``t`` and
    returns ``D``: the grid of a sampler ends in ``(..., t, 1)``, and ``ddim``, or ``euler`` on the linear path, jumps.

    Args:
        velocity: ``v(x, t, cond)``.
        xs: trajectories ``[S, B, ...]``, the last time at the data.
        ts: their times ``[S]``, rising.
        path: the path of the velocity, without a latent.
        cond: the condition of the velocity.

    Returns:
        One number for each time before the last, ``[S - 1]``.

    Raises:
        ValueError: times that do not rise, or a path with a latent.

    >>> xs = jnp.array([[[0.0]], [[1.0]], [[2.0]]])
    >>> jump_distance(lambda x, t, cond=None: 2 * jnp.ones_like(x), xs, [0.0, 0.5, 1.0]).tolist()
    [0.0, 0.0]
    """
    ts = check_grid(ts)
    if len(ts) > 1 and ts[1] < ts[0]:
        raise checks.Refusal("ts", (float(ts[0]), float(ts[-1])), "a falling grid", "Give trajectories to the data")

    def loss(now):
        x, t = now
        t = over_batch(t, x)
        data = paths.convert(path, x, velocity(x, t, cond), t, kind="velocity", to="data")
        return jnp.sqrt(jnp.mean(_norm(_flat((data - xs[-1])[None])[0]) ** 2))

    return jax.lax.map(loss, (xs[:-1], jnp.asarray(ts[:-1], xs.dtype)))


def _flat(xs: Array) -> Array:
    return xs.reshape(*xs.shape[:2], -1)


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), -1))
