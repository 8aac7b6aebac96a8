"""Steps of diffusion samplers with a memory of earlier steps, on any path without a latent (see ``diffusion``)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmjax import paths
from fmjax.sampling.costs import evaluations
from fmjax.sampling.diffusion import along_sigma, no_level, path_at
from fmjax.types import Multistep, VelocityFn, over_batch


def ipndm(velocity: VelocityFn, *, path: paths.Path = paths.linear(), order: int = 4, even: bool = True) -> Multistep:
    """Return the step of iPNDM, Adams-Bashforth in ``sigma``: 1 evaluation (arXiv 2202.09778, 2204.13902).

    ``x_t / beta_t = x_s / beta_s + (sigma_t - sigma_s) sum_j w_j E_j`` with the last ``order`` noise predictions
    ``E_j``, fewer in the first steps. iPNDM takes the weights of equal steps, (55, -59, 37, -9) / 24 for four, on every
    grid: of order 2 at most where steps are not equal, and better with few steps. ``even=False`` integrates the
    polynomial through the ``E_j`` over the step itself: of order ``order`` on smooth grids, except for the first step,
    which is Euler's and counts little where a grid starts in noise. A step out of or into pure noise is Euler's too.
    With equal weights a start in pure noise is the limit of starts at large noise levels. Rising or falling grids.

    Args:
        velocity: ``v(x, t, cond)``.
        path: the path of the velocity.
        order: number of noise predictions, 1 to 4.
        even: whether to use the weights of equal steps.

    Returns:
        A step with a memory: noise predictions ``[order - 1, B, ...]`` and noise levels ``[order - 1, B]``.

    Raises:
        ValueError: for another order and for a path with a latent.

    >>> import jax.numpy as jnp
    >>> from fmjax import sampling
    >>> sampling.sample(ipndm(lambda x, t, cond=None: -x), jnp.ones((2, 3)), 4).shape
    (2, 3)
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order={order}: not available. Use 1, 2, 3 or 4.")
    paths.refuse_latent("ipndm", path)

    def init(x):
        past = [None] * (order - 1)
        stack = lambda a: jnp.stack([a for _ in past]) if past else jnp.zeros((0, *a.shape), a.dtype)
        return stack(jnp.zeros_like(x)), stack(no_level(x, -1.0))

    def step(memory, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        noise, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        (alpha_s, beta_s), (alpha, beta) = path.coefficients(s), path.coefficients(t)
        slopes = jnp.concatenate([noise[None], memory[0]])
        levels = jnp.concatenate([(alpha_s / beta_s)[None], memory[1]])
        weights = _adams(levels, alpha / beta, even).astype(x.dtype)
        slope = jnp.sum(weights.reshape(weights.shape + (1,) * (x.ndim - 1)) * slopes, 0)
        return along_sigma(path, x, noise, data, slope, s, t), (slopes[:-1], levels[:-1])

    return Multistep(init, step, evaluations(velocity))


def initial_noise(velocity: VelocityFn, *, path: paths.Path = paths.linear(), heun: bool = False) -> Multistep:
    """Return the step of 2-rectified flow++, which keeps the noise of the start: 1 evaluation (arXiv 2405.20320).

    ``x_t = beta_t D + alpha_t x0`` with the data ``D`` predicted at ``s`` and the noise ``x0`` predicted by the first
    step: the start itself out of pure noise. On the linear path ``D = x_s + (1 - s) v(x_s, s)`` and
    ``x_t = t D + (1 - t) x0``. Exact for straight flows, whatever the grid. For other flows it is no solver: more
    steps do not converge to the ODE's end. Corrections between the steps do not change ``x0``. Rising or falling grids.

    Args:
        velocity: ``v(x, t, cond)``.
        path: the path of the velocity.
        heun: whether to average the velocity of the linear path with its value at the end of the step: 2 evaluations,
            1 for a step into the data.

    Returns:
        A step with a memory: the noise ``[B, ...]`` of the first step.

    Raises:
        ValueError: for a path with a latent.

    >>> import jax.numpy as jnp
    >>> from fmjax import sampling
    >>> sampling.sample(initial_noise(lambda x, t, cond=None: -2 * jnp.ones_like(x)), jnp.ones((1, 1)), 3).tolist()
    [[-1.0]]
    """
    paths.refuse_latent("initial_noise", path)

    def step(memory, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        (alpha_s, beta_s), (alpha, beta) = path_at(path, x, s), path_at(path, x, t)
        noise, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        first = jnp.where(jnp.isfinite(memory), memory, noise)

        def averaged():
            # a step into the data keeps the first evaluation: a second one may be infinite there
            inner = alpha > 0
            later_t = jnp.where(inner.reshape(t.shape), t, s)
            later_x = jnp.where(inner, beta * data + alpha * first, x)
            later = paths.endpoints(path, later_x, velocity(later_x, later_t, cond), later_t)
            slope = (data - noise + later[1] - later[0]) / 2
            return jnp.where(inner, (x + alpha_s * slope) / (alpha_s + beta_s), data)

        if heun:
            data = jax.lax.cond(jnp.any(alpha > 0), averaged, lambda: data)
        return beta * data + alpha * first, first

    calls = 2 if heun else 1
    return Multistep(lambda x: jnp.full_like(x, jnp.inf), step, evaluations(velocity, calls=calls))


def _adams(levels: Array, end: Array, even: bool) -> Array:
    """``w_j = int_0^1 prod_{i != j} (u - u_i) / (u_j - u_i) du: [k, B]``, ``u`` the level: 0 at ``s``, 1 at the end.

    Over the levels ``[k, B]``, the newest first, that are not negative (no step) and, unless ``even``, not infinite
    (pure noise); by Gauss's rule of two points, exact for ``k <= 4``. Into pure noise, an infinite ``end``, only the
    newest has weight.
    """
    k = levels.shape[0]
    known = ((levels >= 0) & (even | jnp.isfinite(levels)) & jnp.isfinite(end)).at[0].set(True)
    equal = -jnp.arange(k, dtype=levels.dtype)[:, None] * jnp.ones_like(end)
    u = (levels - levels[0]) / (end - levels[0])
    u = equal if even else jnp.where(known & jnp.isfinite(u), u, equal)
    gauss = jnp.asarray([0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6], levels.dtype)[:, None, None, None]
    same = jnp.eye(k, dtype=bool)[:, :, None]  # [j, i, B]
    factors = jnp.where(known & ~same, (gauss - u) / jnp.where(same, 1, u[:, None] - u), 1)
    return jnp.where(known, factors.prod(2).mean(0), 0)
