"""Flows that several tests solve: a linear one, a nonlinear one in the plane, and Gaussians with labels."""

import jax.numpy as jnp
import numpy as np

from fmjax import oracles, paths
from fmjax.types import expand, over_batch

ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "rk38": 4}


def field(x, t, cond=None):
    """``dx/dt = cos(3t) x + t``: linear, smooth, and it depends on time in every term."""
    t = expand(over_batch(t, x), x)
    return jnp.cos(3 * t) * x + t


def toy():
    """Eight modes on a circle and a smooth error field: a nonlinear flow in two dimensions."""
    angle = np.arange(8) * np.pi / 4
    oracle = oracles.mixture(2 * jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], 1)), 0.2)

    def velocity(x, t, cond=None):
        a, b = x[:, 0], x[:, 1]
        error = 0.6 * x + 0.5 * jnp.stack([-b, a], 1) + 0.5 * jnp.stack([jnp.sin(2 * b), jnp.cos(2 * a)], 1)
        return oracle.velocity(x, t) + 0.35 * error

    return oracle, velocity


NULL = 2


def conditional(means, variances, path=paths.linear()):
    """The exact velocity given a label; the last law is the one of the null label."""
    means, variances = jnp.asarray(means), jnp.asarray(variances)

    def velocity(x, t, cond=None):
        cond = jnp.full(x.shape[0], NULL) if cond is None else cond
        mean, std = expand(means[cond], x), expand(jnp.sqrt(variances[cond]), x)
        return oracles.gaussian(mean, std, path=path).velocity(x, t)

    return velocity
