"""Log-density of a flow or of a flow map with source ``N(0, I)``, its divergence, and bits per dimension.

``log p_t(x_t) = log N(x_0) - int_0^t div v(x_r, r) dr`` along the flow (arXiv 1806.07366, 1810.01367). The state and
the integral are one solve. A velocity must treat its examples apart, as every network here does.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fmjax.keys import as_keys, normal
from fmjax.sampling import grids, solvers
from fmjax.types import Cond, FlowMapFn, VelocityFn, over_batch

COLUMNS = 64  # jvps side by side: bounds the memory of an exact divergence


class Density(NamedTuple):
    """``log_p: [B]`` in nats, the noise ``x0: [B, ...]`` that flows to ``x``, and how far to trust them: see ``check``.

    ``halved: [B]`` is ``log_p`` with every step halved (``None`` when steps are adaptive), ``result`` diffrax's
    (``None`` where nothing was solved).
    """

    log_p: Array
    x0: Array
    halved: Array | None
    result: Any


def _along(velocity: VelocityFn, x, t, cond, directions, reduce) -> tuple[Array, Array]:
    """``v``, and ``<e, J e>: [n, B]`` reduced over ``directions: [n, ...]``, each shaped as ``x`` or as one example."""
    v, jvp = jax.linearize(lambda x: velocity(x, over_batch(t, x), cond), x)

    def quadratic(e):
        e = jnp.broadcast_to(e, x.shape)
        return (e * jvp(e)).reshape(x.shape[0], -1).sum(1)

    return v, reduce(jax.lax.map(quadratic, directions, batch_size=min(COLUMNS, len(directions))), 0)


def divergence(velocity: VelocityFn, x: Float[Array, "b ..."], t, cond: Cond = None) -> tuple[Array, Array]:
    """``v(x, t)`` and its exact divergence ``sum_i dv_i/dx_i: [B]``: one evaluation, ``d`` derivatives along axes."""
    axes = jnp.eye(math.prod(x.shape[1:]), dtype=x.dtype).reshape(-1, *x.shape[1:])
    return _along(velocity, x, t, cond, axes, jnp.sum)


def hutchinson(
    velocity: VelocityFn, x: Float[Array, "b ..."], t, probes: Float[Array, "k b ..."], cond: Cond = None
) -> tuple[Array, Array]:
    """``v(x, t)`` and Hutchinson's estimate ``mean_k <e_k, (dv/dx) e_k>: [B]`` of its divergence.

    Unbiased for probes of mean 0 and covariance ``I``. With ``A`` the symmetric part of the Jacobian, one Rademacher
    probe has the variance ``2 sum_{i != j} A_ij^2`` (0 for a diagonal Jacobian), one Gaussian probe ``2 |A|_F^2``.
    """
    return _along(velocity, x, t, cond, probes, jnp.mean)


def draw_probes(
    key: Key[Array, " b"], n: int, shape: tuple[int, ...], *, law: str = "rademacher", dtype=jnp.float32
) -> Float[Array, "n b ..."]:
    """``n`` probes per example, ``[n, B, *shape]``: signs (``"rademacher"``) or ``"gaussian"``. ``ValueError`` else."""
    if law not in ("rademacher", "gaussian"):
        raise ValueError(f"no law of probes {law!r}; there are 'rademacher' (the smaller variance) and 'gaussian'")
    if n < 1:
        raise ValueError(f"Hutchinson's estimate needs at least one probe, got {n}; probes=None is exact")
    if law == "gaussian":
        return jnp.moveaxis(normal(key, (n, *shape), dtype), 1, 0)
    return jnp.moveaxis(jax.vmap(lambda k: jax.random.rademacher(k, (n, *shape), dtype))(key), 1, 0)


def log_density(
    velocity: VelocityFn,
    x: Float[Array, "b ..."],
    cond: Cond = None,
    key=None,
    *,
    probes: int | None = None,
    law: str = "rademacher",
    ts=(1.0, 0.0),
    solver="Dopri5",
    rtol: float | None = 1e-5,
    atol: float | None = 1e-5,
    max_steps: int = 4096,
) -> Density:
    """``log p(x)`` under the flow, by one solve from the time of ``x`` back to the noise at 0.

    ``probes=None`` takes the exact divergence (``d`` derivatives an evaluation: small ``d``); an integer that many
    Hutchinson probes per example, drawn from ``key`` (one, or ``[B]``) and fixed over the solve, so that the field is
    still an ODE. ``ts`` falls from the time of ``x`` to 0. With tolerances (the default, scipy's and score_sde's 1e-5)
    steps are adaptive. With ``rtol=None, atol=None`` every interval of ``ts`` is one step, and the solve is repeated
    with halved steps, since a few fixed steps give no likelihood: ``check`` compares the two.

    Nothing is raised under jit for a failed solve: give the ``Density`` to ``check`` or to ``bits_per_dim`` outside it.
    Differentiable in reverse mode. Raises ``ValueError`` for a grid that does not fall to 0, a key without probes or
    probes without a key, and what ``solvers.integrate`` refuses.
    """
    ts = grids.check_grid(ts)
    if ts[-1] != 0 or ts[0] < 0:
        raise ValueError(f"ts must fall from the time of x to the noise at 0, got {ts[0]:g} to {ts[-1]:g}")
    if (probes is None) != (key is None):
        raise ValueError(f"Hutchinson's estimate needs probes and key, the exact one neither, got {probes=}, {key=}")
    b, shape = x.shape[0], x.shape[1:]
    e = None if probes is None else draw_probes(as_keys(key, b), probes, shape, law=law, dtype=x.dtype)

    def augmented(y, t, cond=None):
        at = y[:, :-1].reshape(x.shape)
        v, div = divergence(velocity, at, t, cond) if e is None else hutchinson(velocity, at, t, e, cond)
        return jnp.concatenate([v.reshape(b, -1), div[:, None]], 1).astype(y.dtype)

    def solve(ts):
        start = jnp.concatenate([x.reshape(b, -1), jnp.zeros((b, 1), x.dtype)], 1)
        ys, result = solvers.integrate(
            augmented, start, ts, solver=solver, cond=cond, rtol=rtol, atol=atol, max_steps=max_steps
        )
        x0, gain = ys[-1, :, :-1], ys[-1, :, -1]  # backwards in time: the integral comes with its minus sign
        return -0.5 * (x0**2 + math.log(2 * math.pi)).sum(1) + gain, x0.reshape(x.shape), result

    log_p, x0, result = solve(ts)
    if rtol is not None:
        return Density(log_p, x0, None, result)
    return Density(log_p, x0, solve(np.insert(ts, np.arange(1, len(ts)), (ts[:-1] + ts[1:]) / 2))[0], result)


def flow_map_log_density(
    flow_map: FlowMapFn, x: Float[Array, "b ..."], *, ts=(0.0, 1.0), cond: Cond = None, tolerance: float = 0.01
) -> Density:
    """``log p(x) = log N(z) + log|det dz/dx|`` with ``z = X_{1,0}(x)`` by one jump of a map that is its own inverse.

    The change of variables with the exact Jacobian (``d`` derivatives: small ``d``). ``ts`` are the times of the noise
    and of ``x``. It holds only where ``X_{0,1}(X_{1,0}(x)) = x``, which a map that was trained for ``s <= t`` alone
    knows nothing of: the round trip is taken on these ``x``. Not under jit. Raises ``ValueError``, before any
    derivative, where the worst example returns at a root mean square distance from ``x`` above ``tolerance`` of that of
    ``x``, with the distance and what to do, and for ``ts`` that do not rise from 0.
    """
    ts = grids.check_grid(ts)
    if len(ts) != 2 or ts[0] != 0 or not ts[1] > 0:
        raise ValueError(f"ts must be the time of the noise, 0, and that of x, got {ts.tolist()}")
    start, stop = ts
    b, d, to_noise = x.shape[0], math.prod(x.shape[1:]), lambda x: flow_map(x, stop, start, cond)
    z, push = jax.linearize(to_noise, x)
    off = jnp.sqrt(jnp.square(flow_map(z, start, stop, cond) - x).reshape(b, d).mean(1).max() / jnp.square(x).mean())
    if not off <= tolerance:
        raise ValueError(
            f"this flow map is not its own inverse on x: the round trip to the noise and back is off by {off:.3g} of "
            f"the size of x (tolerance {tolerance:g}), so it has no density here; train both orders of times with "
            "flow_map_matching, or use log_density of the velocity"
        )
    axes = jnp.eye(d, dtype=x.dtype).reshape(d, *x.shape[1:])
    columns = jax.lax.map(lambda e: push(jnp.broadcast_to(e, x.shape)), axes, batch_size=min(COLUMNS, d))
    jacobian = columns.reshape(d, b, d).swapaxes(0, 1)  # transposed, which no determinant sees
    log_p = -0.5 * (z.reshape(b, d) ** 2 + math.log(2 * math.pi)).sum(1) + jnp.linalg.slogdet(jacobian)[1]
    return Density(log_p, z, None, None)


def check(density: Density, *, tolerance: float = 0.01) -> Float[Array, " b"]:
    """``log_p`` of a solve that can be trusted, outside jit.

    Raises ``RuntimeError`` when the solve failed, when a value is not finite, and when halving fixed steps changes
    ``log p`` by ``tolerance`` bits per dimension or more, on average over the batch of the absolute changes
    (``tolerance=inf`` asks for it all the same: eight Euler steps of a good image model can "give" minus ten bits).
    """
    log_p = solvers.check(density.log_p[None], density.result, what="the solve of the log-density")[0]
    if density.halved is not None:
        d = math.prod(density.x0.shape[1:])
        change = float(jnp.abs(density.halved - log_p).mean()) / (d * math.log(2))
        if not change < tolerance:
            raise RuntimeError(
                f"fixed steps are too few for a likelihood: halving them changes it by {change:.3g} bits/dim "
                f"(tolerance {tolerance:g}); refine ts, give rtol and atol, or raise tolerance to have it all the same"
            )
    return log_p


def bits_per_dim(density: Density, *, level: float, tolerance: float = 0.01) -> Float[Array, " b"]:
    """Bits per dimension of each example, ``-log p(x) / (d ln 2) - log2(level)``, after ``check``.

    ``level`` is the size of one grey level in the units of ``x``: the density is per level, not per unit of ``x``. For
    ``x = u / 128 - 1`` it is ``1 / 128`` and the offset 7 bits, for ``x = u / 127.5 - 1`` it is ``1 / 127.5`` and the
    offset ``log2(127.5) = 6.994``; ``level=1`` leaves the density of continuous data. With ``x`` from ``dequantise``
    the mean bounds from above the code length of the discrete data (arXiv 1511.01844). State with a figure the solver
    and its tolerances, the number of probes, of dequantisation draws, and of images. Raises ``ValueError`` for a level
    that is not positive, and as ``check`` does.
    """
    if not level > 0:
        raise ValueError(f"level is the size of one grey level in units of x, got {level}; x = u/127.5 - 1: 1/127.5")
    d = math.prod(density.x0.shape[1:])
    return -check(density, tolerance=tolerance) / (d * math.log(2)) - math.log2(level)


def dequantise(key, x: Float[Array, "b ..."], *, level: float) -> Float[Array, "b ..."]:
    """Uniform dequantisation ``x + level * U[0, 1)``; ``key`` is one key or one per example, ``level`` as above."""
    uniform = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype))
    return x + level * uniform(as_keys(key, x.shape[0]))
