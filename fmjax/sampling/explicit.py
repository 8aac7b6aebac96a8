"""Explicit Runge-Kutta steps of a velocity, from their tableau.

A step has the signature of a flow map, ``step(x, s, t, cond, key) -> x``, so that a sampler cannot tell it from a
learned jump. All steps here go in both directions of time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax.checks import check_choice
from fmjax.sampling.costs import evaluations
from fmjax.types import Costed, VelocityFn, expand, over_batch


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: ``k_i = v(x + h sum_j a_ij k_j, t + c_i h)``, then ``x + h sum_i b_i k_i``.

    Attributes:
        a: rows of the strictly lower triangular matrix; row ``i`` has up to ``i`` numbers.
        b: weights of the stages.
        c: times of the stages, as fractions of the step.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]


EULER = Tableau(((),), (1,), (0,))
MIDPOINT = Tableau(((), (1 / 2,)), (0, 1), (0, 1 / 2))
HEUN = Tableau(((), (1,)), (1 / 2, 1 / 2), (0, 1))
RK4 = Tableau(((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0, 1 / 2, 1 / 2, 1))
RK38 = Tableau(((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), (0, 1 / 3, 2 / 3, 1))
TABLEAUS = {"euler": EULER, "midpoint": MIDPOINT, "heun": HEUN, "rk4": RK4, "rk38": RK38}


def tableau(name: str) -> Tableau:
    """Return the tableau of a Runge-Kutta method by its name.

    Args:
        name: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"rk38"``.

    Returns:
        The tableau; ``len(tableau(name).b)`` is its number of stages.

    Raises:
        ValueError: for another name, with the nearest one.

    >>> tableau("midpoint").c
    (0, 0.5)
    """
    check_choice("solver", name, TABLEAUS, "Runge-Kutta method")
    return TABLEAUS[name]


def runge_kutta(velocity: VelocityFn, method: Tableau) -> Costed:
    """Return the explicit Runge-Kutta step of a tableau.

    The stages are a loop, so that the network is compiled once, whatever their number.

    Args:
        velocity: ``v(x, t, cond)``.
        method: the tableau.

    Returns:
        A step ``(x, s, t, cond, key) -> x`` for times ``[B]`` or scalars, rising or falling; one evaluation a stage.

    >>> import jax.numpy as jnp
    >>> step = runge_kutta(lambda x, t, cond=None: -x, tableau("heun"))
    >>> step(jnp.ones((1, 1)), 0.0, 0.5).tolist(), step.nfe
    ([[0.625]], 2)
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

    return Costed(step, evaluations(velocity, calls=stages))


def euler(velocity: VelocityFn) -> Costed:
    """Return Euler's step ``x + (t - s) v(x, s)``: order 1, 1 evaluation.

    Args:
        velocity: ``v(x, t, cond)``.

    Returns:
        A step ``(x, s, t, cond, key) -> x``.

    >>> import jax.numpy as jnp
    >>> euler(lambda x, t, cond=None: -x)(jnp.ones((1, 1)), 0.0, 0.5).tolist()
    [[0.5]]
    """
    return runge_kutta(velocity, EULER)


def midpoint(velocity: VelocityFn) -> Costed:
    """Return the midpoint step ``x + h v(x + h/2 v(x, s), s + h/2)``: order 2, 2 evaluations.

    Args:
        velocity: ``v(x, t, cond)``.

    Returns:
        A step ``(x, s, t, cond, key) -> x``.

    >>> import jax.numpy as jnp
    >>> midpoint(lambda x, t, cond=None: -x)(jnp.ones((1, 1)), 0.0, 0.5).tolist()
    [[0.625]]
    """
    return runge_kutta(velocity, MIDPOINT)


def heun(velocity: VelocityFn) -> Costed:
    """Return Heun's step, the explicit trapezoidal rule: order 2, 2 evaluations.

    Args:
        velocity: ``v(x, t, cond)``.

    Returns:
        A step ``(x, s, t, cond, key) -> x``.

    >>> import jax.numpy as jnp
    >>> heun(lambda x, t, cond=None: -x)(jnp.ones((1, 1)), 0.0, 0.5).tolist()
    [[0.625]]
    """
    return runge_kutta(velocity, HEUN)


def rk4(velocity: VelocityFn) -> Costed:
    """Return the step of the classical Runge-Kutta method: order 4, 4 evaluations.

    Args:
        velocity: ``v(x, t, cond)``.

    Returns:
        A step ``(x, s, t, cond, key) -> x``.

    >>> import jax.numpy as jnp
    >>> step = rk4(lambda x, t, cond=None: -x)
    >>> round(float(step(jnp.ones((1, 1)), 0.0, 0.5)[0, 0]), 4), step.nfe
    (0.6068, 4)
    """
    return runge_kutta(velocity, RK4)


def rk38(velocity: VelocityFn) -> Costed:
    """Return the step of Kutta's 3/8 rule, which torchdiffeq calls ``rk4``: order 4, 4 evaluations.

    Args:
        velocity: ``v(x, t, cond)``.

    Returns:
        A step ``(x, s, t, cond, key) -> x``.

    >>> import jax.numpy as jnp
    >>> round(float(rk38(lambda x, t, cond=None: -x)(jnp.ones((1, 1)), 0.0, 0.5)[0, 0]), 4)
    0.6068
    """
    return runge_kutta(velocity, RK38)
