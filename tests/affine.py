"""Exact moments of a sampler whose steps are affine in the state and in their noise: Gaussian data, no draws."""

import jax
import jax.numpy as jnp
import numpy as np

from fmjax.keys import as_keys, normal

MEAN, STD = 0.7, 0.4


def rows(step, s, t):
    """``x' = a x + b + c z``: three examples an interval give ``a, b, c``, as ``[intervals, 3]``."""
    keys = as_keys(jax.random.key(3), 2)
    z = np.asarray(normal(keys, (1,), jnp.float64))[:, 0]
    x = np.repeat([0.0, 0.0, 1.0], len(s))[:, None]
    moved = jax.jit(step)(x, np.tile(s, 3), np.tile(t, 3), None, jnp.repeat(keys[jnp.array([0, 1, 0])], len(s)))
    first, second, unit = np.asarray(moved).reshape(3, len(s))
    c = (second - first) / (z[1] - z[0])
    return np.stack([unit - first, first - c * z[0], c], 1)


def moments(step, grids, mean, var):
    """Mean and variance at the end of each grid, and the covariance with the start."""
    s, t = (np.concatenate([np.asarray(grid, float)[i] for grid in grids]) for i in (slice(-1), slice(1, None)))
    ends = []
    for part in np.split(rows(step, s, t), np.cumsum([len(grid) - 1 for grid in grids])[:-1]):
        m, v, memory = mean, var, var
        for a, b, c in part:
            m, v, memory = a * m + b, a**2 * v + c**2, a * memory
        ends.append([m, v, memory])
    return np.array(ends)


def marginal(path, t):
    """Mean and variance of ``I_t`` for data ``N(MEAN, STD^2)``."""
    alpha, beta = path.coefficients(jnp.asarray(t, float))
    return float(beta * MEAN), float(alpha**2 + (beta * STD) ** 2)


def slopes(step, path, start, stop, n=160):
    """Orders at which the errors of mean and variance fall from ``n`` steps to ``2 n``, and the errors there."""
    grids = [np.linspace(start, stop, n + 1), np.linspace(start, stop, 2 * n + 1)]
    coarse, fine = np.abs(moments(step, grids, *marginal(path, start))[:, :2] - marginal(path, stop))
    return np.log2(coarse / fine), fine
