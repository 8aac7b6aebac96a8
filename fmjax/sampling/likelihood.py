"""Log-density of a flow or of a flow map, its divergence, and bits per dimension.

``log p_t(x_t) = log p_0(x_0) - int_0^t div v(x_r, r) dr`` along the flow (arXiv 1806.07366, 1810.01367). The state and
the integral are one solve. A velocity must treat its examples independently, as every network of ``nets`` does.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import checks, paths
from fmjax.keys import as_keys, normal
from fmjax.sampling import adaptive, grids
from fmjax.sampling.states import wide_state
from fmjax.sources import Source
from fmjax.types import Cond, FlowMapFn, VelocityFn, over_batch

COLUMNS = 64  # jvps side by side: bounds the memory of an exact divergence
PROBES = ("rademacher", "gaussian")


class Density(NamedTuple):
    """Log-densities and how far to trust them; pass it to ``checked_density`` or ``bits_per_dim``.

    Attributes:
        log_p: log-density of each example in nats, ``[B]``.
        x0: the state at ``t = 0`` that flows to ``x``, ``[B, ...]``.
        halved: ``log_p`` with every step halved, ``[B]``; ``None`` where steps are adaptive.
        result: a ``diffrax.RESULTS``; ``None`` where nothing was solved.
        outside: whether ``x0`` lies where the density of the source is zero, ``[B]``; ``None`` for N(0, I).
    """

    log_p: Array
    x0: Array
    halved: Array | None
    result: Any
    outside: Array | None = None


def divergence(velocity: VelocityFn, x: Float[Array, "b ..."], t: Any, cond: Cond = None) -> tuple[Array, Array]:
    """Return a velocity and its exact divergence ``sum_i dv_i/dx_i``: 1 evaluation, ``d`` derivatives along axes.

    Args:
        velocity: ``v(x, t, cond)``.
        x: states ``[B, ...]``.
        t: times ``[B]``, or one time.
        cond: the condition of the velocity.

    Returns:
        ``v(x, t)`` and its divergence ``[B]``.

    >>> import jax.numpy as jnp
    >>> divergence(lambda x, t, cond=None: -x, jnp.ones((1, 3)), 0.5)[1].tolist()
    [-3.0]
    """
    axes = jnp.eye(math.prod(x.shape[1:]), dtype=x.dtype).reshape(-1, *x.shape[1:])
    return _along(velocity, x, t, cond, axes, jnp.sum)


def hutchinson(
    velocity: VelocityFn, x: Float[Array, "b ..."], t: Any, probes: Float[Array, "k b ..."], cond: Cond = None
) -> tuple[Array, Array]:
    """Return a velocity and Hutchinson's estimate ``mean_k <e_k, (dv/dx) e_k>`` of its divergence.

    Unbiased for probes of mean 0 and covariance ``I``. With ``A`` the symmetric part of the Jacobian, one Rademacher
    probe has the variance ``2 sum_{i != j} A_ij^2`` (0 for a diagonal Jacobian), one Gaussian probe ``2 |A|_F^2``.

    Args:
        velocity: ``v(x, t, cond)``.
        x: states ``[B, ...]``.
        t: times ``[B]``, or one time.
        probes: ``e``, ``[K, B, ...]``, of ``draw_probes``.
        cond: the condition of the velocity.

    Returns:
        ``v(x, t)`` and the estimate ``[B]``.

    >>> import jax.numpy as jnp
    >>> hutchinson(lambda x, t, cond=None: -x, jnp.ones((1, 3)), 0.5, jnp.ones((2, 1, 3)))[1].tolist()
    [-3.0]
    """
    return _along(velocity, x, t, cond, probes, jnp.mean)


def draw_probes(
    key, n: int, shape: tuple[int, ...], *, distribution: str = "rademacher", dtype: Any = jnp.float32
) -> Float[Array, "n b ..."]:
    """Draw the probes of Hutchinson's estimate.

    Args:
        key: keys ``[B]``.
        n: number of probes for each example, 1 or more.
        shape: the shape of one example.
        distribution: ``"rademacher"`` (random signs, of smaller variance) or ``"gaussian"``.
        dtype: the type of the probes.

    Returns:
        Probes ``[n, B, *shape]``.

    Raises:
        ValueError: for another distribution and for ``n < 1``.

    >>> import jax
    >>> draw_probes(jax.random.split(jax.random.key(0), 4), 2, (3,)).shape
    (2, 4, 3)
    """
    checks.check_choice("distribution", distribution, PROBES)
    if n < 1:
        raise ValueError(
            f"probes={n}: Hutchinson's estimate needs at least 1. Use probes=None for the exact divergence."
        )
    if distribution == "gaussian":
        return jnp.moveaxis(normal(key, (n, *shape), dtype), 1, 0)
    return jnp.moveaxis(jax.vmap(lambda k: jax.random.rademacher(k, (n, *shape), dtype))(key), 1, 0)


def log_density(
    velocity: VelocityFn,
    x: Array,
    cond: Cond = None,
    key=None,
    *,
    path: paths.Path = paths.linear(),
    source: Source | None = None,
    probes: int | None = None,
    distribution: str = "rademacher",
    ts: Any = None,
    solver: Any = "Dopri5",
    rtol: float | None = 1e-5,
    atol: float | None = 1e-5,
    max_steps: int = 4096,
) -> Density:
    """Return the log-density of states under a flow, by one solve from the time of ``x`` back to the noise.

    With tolerances (the default 1e-5 is that in scipy and score_sde) steps are adaptive. With ``rtol=None, atol=None``
    every interval of ``ts`` is one step, and the solve is repeated with halved steps, since a few fixed steps give no
    likelihood: ``checked_density`` compares the two. A failed solve raises nothing under jit. Differentiable in reverse
    mode.

    Args:
        velocity: ``v(x, t, cond)``.
        x: states ``[B, ...]`` at ``ts[0]``.
        cond: the condition of the velocity.
        key: one key, or keys ``[B]``, of the probes.
        path: the path of the velocity. The density at ``ts[-1]`` is the density of ``alpha x0``, so what the path
            keeps of the data (``beta``) must be small.
        source: the distribution of ``x0``, with a density; by default N(0, I).
        probes: number of Hutchinson probes for each example, fixed over the solve. ``None`` takes the exact divergence:
            ``d`` derivatives an evaluation, for small ``d``.
        distribution: of the probes, see ``draw_probes``.
        ts: times that fall from the time of ``x`` to the noise; by default from the end of ``default_grid(path, 1)`` to
            its start, 1 to 0 on most paths.
        solver: see ``diffrax_solver``.
        rtol: relative tolerance.
        atol: absolute tolerance.
        max_steps: largest number of adaptive steps in one interval.

    Returns:
        Log-densities ``[B]`` in nats and what tells how far to trust them.

    Raises:
        ValueError: for a grid that does not fall to the noise, a key without probes or probes without a key, a source
            without a density, and for everything that ``integrate`` refuses.

    >>> import jax.numpy as jnp
    >>> density = log_density(lambda x, t, cond=None: 0 * x, jnp.zeros((1, 2)))
    >>> round(float(density.log_p[0]), 4)
    -1.8379
    """
    x, _ = _states(x)
    _check_density(source, x.shape[1:])
    noise, data = path.span
    ts = grids.check_grid((data, noise) if ts is None else ts)
    if not grids.is_traced(ts) and (ts[-1] > noise + grids.SAME or ts[0] < ts[-1]):
        raise ValueError(f"ts={ts[0]:g} .. {ts[-1]:g}: must fall from the time of x to the noise at {noise:g}.")
    if (probes is None) != (key is None):
        what = "key=None" if key is None else "probes=None"
        raise ValueError(
            f"{what}: Hutchinson's estimate needs probes and key, the exact divergence neither. Give both."
        )
    b, shape, scale = x.shape[0], x.shape[1:], path.source_scale
    d = math.prod(shape)
    e = None if probes is None else draw_probes(
        as_keys(key, b), probes, shape, distribution=distribution, dtype=x.dtype
    )  # fmt: skip

    def augmented(y, t, cond=None):
        at = y[:, :-1].reshape(x.shape)
        v, div = divergence(velocity, at, t, cond) if e is None else hutchinson(velocity, at, t, e, cond)
        return jnp.concatenate([v.reshape(b, d), div[:, None]], 1).astype(y.dtype)

    def solve(ts):
        start = jnp.concatenate([x.reshape(b, d), jnp.zeros((b, 1), x.dtype)], 1)
        ys, result = adaptive.integrate(
            augmented, start, ts, solver=solver, cond=cond, rtol=rtol, atol=atol, max_steps=max_steps
        )
        x0, gain = ys[-1, :, :-1], ys[-1, :, -1]  # backwards in time: the integral comes with its minus sign
        x0 = x0.reshape(x.shape)
        return _log_source(source, x0, scale) + gain, x0, result

    log_p, x0, result = solve(ts)
    outside = None if source is None else jnp.isneginf(log_p) & jnp.isfinite(x0.reshape(b, d)).all(1)
    if rtol is not None:
        return Density(log_p, x0, None, result, outside)
    middle = (ts[:-1] + ts[1:]) / 2
    finer = jnp.stack([ts[:-1], middle], 1).ravel() if grids.is_traced(ts) else np.stack([ts[:-1], middle], 1).ravel()
    finer = (jnp if grids.is_traced(ts) else np).append(finer, ts[-1])
    return Density(log_p, x0, solve(finer)[0], result, outside)


def flow_map_log_density(
    flow_map: FlowMapFn,
    x: Float[Array, "b ..."],
    *,
    ts: Any = (0.0, 1.0),
    cond: Cond = None,
    source: Source | None = None,
    tolerance: float = 0.01,
) -> Density:
    """Return the log-density of states under a flow map that is its own inverse, by one jump to the noise.

    ``log p(x) = log p_0(z) + log|det dz/dx|`` with ``z = X_{1,0}(x)``: the change of variables with the exact Jacobian
    (``d`` derivatives, for small ``d``). It holds only where ``X_{0,1}(X_{1,0}(x)) = x``, which a map that was trained
    for ``s <= t`` does not satisfy: the round trip is checked on these ``x``. Not under jit.

    Args:
        flow_map: ``X(x, s, t, cond)``.
        x: states ``[B, ...]`` at ``ts[1]``.
        ts: the times of the noise, 0, and of ``x``.
        cond: the condition of the flow map.
        source: the distribution ``p_0``, with a density; by default N(0, I).
        tolerance: largest distance of the round trip, relative to the size of ``x``, of the worst example.

    Returns:
        Log-densities ``[B]`` in nats and the noise.

    Raises:
        ValueError: before any derivative, where the round trip is off by more than ``tolerance``, and for other times.

    >>> import jax.numpy as jnp
    >>> density = flow_map_log_density(lambda x, s, t, cond=None: x, jnp.zeros((1, 2)) + 1e-3)
    >>> round(float(density.log_p[0]), 4)
    -1.8379
    """
    (x, _), ts = _states(x), grids.check_grid(ts)
    _check_density(source, x.shape[1:])
    if len(ts) != 2 or ts[0] != 0 or not ts[1] > 0:
        raise ValueError(f"ts={ts.tolist()}: must be the time of the noise, 0, and the time of x. Give (0, t).")
    start, stop = ts.tolist()
    b, d, to_noise = x.shape[0], math.prod(x.shape[1:]), lambda x: flow_map(x, stop, start, cond)
    z, push = jax.linearize(to_noise, x)
    off = jnp.sqrt(jnp.square(flow_map(z, start, stop, cond) - x).reshape(b, d).mean(1).max() / jnp.square(x).mean())
    if not off <= tolerance:
        raise ValueError(
            f"tolerance={tolerance:g}: the round trip of x to the noise and back is off by {off:.3g} of its size: "
            "this flow map is not its own inverse. Train both orders with flow_map_matching, or use log_density."
        )
    axes = jnp.eye(d, dtype=x.dtype).reshape(d, *x.shape[1:])
    columns = jax.lax.map(lambda e: push(jnp.broadcast_to(e, x.shape)), axes, batch_size=min(COLUMNS, d))
    jacobian = columns.reshape(d, b, d).swapaxes(0, 1)  # transposed, which no determinant sees
    log_p = _log_source(source, z, 1.0) + jnp.linalg.slogdet(jacobian)[1]
    return Density(log_p, z, None, None, None if source is None else jnp.isneginf(log_p))


def checked_density(density: Density, *, tolerance: float = 0.01) -> Float[Array, " b"]:
    """Raise an error for a log-density that cannot be trusted, outside of jit, or return it.

    Args:
        density: the result of ``log_density`` or ``flow_map_log_density``.
        tolerance: largest change of ``log p`` in bits per dimension when fixed steps are halved, the mean of the
            absolute changes over the batch. With ``inf`` any change passes.

    Returns:
        ``log_p: [B]`` in nats; ``-inf`` where the density of the source is zero.

    Raises:
        RuntimeError: where the solve failed, a value is not finite, or fixed steps are too few.

    >>> import jax.numpy as jnp
    >>> checked_density(Density(jnp.zeros(2), jnp.ones((2, 1)), None, None)).tolist()
    [0.0, 0.0]
    """
    outside = jnp.zeros(len(density.log_p), bool) if density.outside is None else density.outside
    finite = jnp.where(outside, 0.0, density.log_p)
    adaptive.checked_solve(finite[None], density.result, what="the solve of the log-density")
    if density.halved is not None:
        d = math.prod(density.x0.shape[1:])
        change = float(jnp.abs(jnp.where(outside, 0.0, density.halved) - finite).mean()) / (d * math.log(2))
        if not change < tolerance:
            raise RuntimeError(
                f"tolerance={tolerance:g}: halving the fixed steps changes the likelihood by {change:.3g} bits/dim, so "
                "they are too few. Refine ts, give rtol and atol, or raise tolerance."
            )
    return density.log_p


def bits_per_dim(density: Density, *, level: float, tolerance: float = 0.01) -> Float[Array, " b"]:
    """Return the bits per dimension of each example, ``-log p(x) / (d ln 2) - log2(level)``, after ``checked_density``.

    For ``x = u / 128 - 1`` the level is ``1 / 128`` and the offset 7 bits, for ``x = u / 127.5 - 1`` ``1 / 127.5`` and
    ``log2(127.5) = 6.994``; ``level=1`` leaves the density of continuous data. With ``x`` from
    ``dequantise`` the mean bounds from above the code length of the discrete data (arXiv 1511.01844). State with a
    figure the solver and its tolerances, the number of probes, of dequantisation draws, and of images.

    Args:
        density: the result of ``log_density``.
        level: the size of one grey level in the units of ``x``: the density is per level, not per unit of ``x``.
        tolerance: as for ``checked_density``.

    Returns:
        Bits per dimension ``[B]``.

    Raises:
        ValueError: for a level that is not positive.
        RuntimeError: as ``checked_density`` does.

    >>> import jax.numpy as jnp
    >>> bits_per_dim(Density(jnp.zeros(1), jnp.ones((1, 1)), None, None), level=1 / 128).tolist()
    [7.0]
    """
    if not level > 0:
        raise ValueError(f"level={level}: not positive. Give the size of a grey level: 1/127.5 for x = u/127.5 - 1.")
    d = math.prod(density.x0.shape[1:])
    return -checked_density(density, tolerance=tolerance) / (d * math.log(2)) - math.log2(level)


def dequantise(key, x: Float[Array, "b ..."], *, level: float) -> Float[Array, "b ..."]:
    """Return data with uniform dequantisation noise, ``x + level * U[0, 1)``.

    Args:
        key: one key, or keys ``[B]``.
        x: data ``[B, ...]`` on grey levels.
        level: the size of one grey level in the units of ``x``.

    Returns:
        Data ``[B, ...]``.

    >>> import jax, jax.numpy as jnp
    >>> noisy = dequantise(jax.random.key(0), jnp.zeros((2, 3)), level=0.5)
    >>> bool(((noisy >= 0) & (noisy < 0.5)).all())
    True
    """
    checks.check_state("x", x)
    checks.check_range("level", level, checks.Range(low=0, open_low=True))
    uniform = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype))
    return x + level * uniform(as_keys(key, x.shape[0]))


def _states(x: Any) -> tuple[Array, Any]:
    """Return states as ``wide_state`` does, at least one."""
    x, dtype = wide_state("x", x)
    if not len(x):
        raise ValueError(f"x={x.dtype}{list(x.shape)}: no example. Give at least one.")
    return x, dtype


def _check_density(source: Source | None, shape: tuple[int, ...]) -> None:
    """Refuse a source without a density, or of another shape."""
    if source is not None:
        source.check_shape(shape)
        if source.log_density is None:
            wrong = "has no density, which a likelihood needs"
            raise checks.Refusal("source", source.name, wrong, "Take a source with one, such as gaussian_noise")


def _log_source(source: Source | None, z: Array, scale: float) -> Array:
    """Return the log-density of ``scale x0`` at states ``z: [B, ...]``; of N(0, I) without a source."""
    d = math.prod(z.shape[1:])
    if source is not None:
        return source.log_density(z / scale) - d * math.log(scale)
    return -0.5 * ((z.reshape(len(z), d) / scale) ** 2 + math.log(2 * math.pi)).sum(1) - d * math.log(scale)


def _along(velocity: VelocityFn, x, t, cond, directions, reduce) -> tuple[Array, Array]:
    """``v``, and ``<e, J e>: [n, B]`` reduced over ``directions: [n, ...]``, each shaped as ``x`` or as one example."""
    v, jvp = jax.linearize(lambda x: velocity(x, over_batch(t, x), cond), x)

    def quadratic(e):
        e = jnp.broadcast_to(e, x.shape)
        return (e * jvp(e)).reshape(x.shape[0], math.prod(x.shape[1:])).sum(1)

    return v, reduce(jax.lax.map(quadratic, directions, batch_size=min(COLUMNS, len(directions))), 0)
