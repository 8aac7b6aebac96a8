"""Closed forms to test methods against: velocity, score, density and flow map of known distributions along a path.

The source ``x0 ~ N(0, I)`` is independent of the data (except in ``coupled``), and ``I_t = alpha x0 + beta x1``, plus
``gamma z`` where the path has a latent. All fields take ``x: [B, d]`` (or ``[B, ...]`` where every coordinate is
independent) and times ``[B]`` or a scalar. The velocity of the mixture is in arXiv 2302.00482; the flow map of the
Gaussian is the monotone rescaling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import paths
from fmjax.types import FlowMapFn, Net, VelocityFn, expand, over_batch


class Oracle(NamedTuple):
    """A data distribution and the exact fields of the distribution of ``I_t`` along a path.

    Attributes:
        sample: ``sample(key, n)`` draws data ``[n, d]`` by one key (``coupled``: pairs ``(x0, x1)``).
        velocity: ``velocity(x, t, cond=None)``, ``E[dI_t | I_t = x]``, of the shape of ``x``.
        score: ``score(x, t)``, ``grad log p_t(x)``, of the shape of ``x``.
        log_density: ``log_density(x, t)``, ``log p_t(x)``, ``[B]``.
        flow_map: ``flow_map(x, s, t)``, ``X_{s,t}(x)``; ``None`` where no closed form exists.
    """

    sample: Callable[[Array, int], Any]
    velocity: VelocityFn
    score: Callable[[Array, Array], Array]
    log_density: Callable[[Array, Array], Array]
    flow_map: FlowMapFn | None = None


def _noise(path: paths.Path, x: Array, t) -> tuple[Array, Array, Array, Array]:
    """Return ``beta, d beta/dt``, and the variance ``alpha^2 + gamma^2`` of the noise with its time derivative."""
    alpha, beta, d_alpha, d_beta = paths.coefficients(path, x, t)
    latent, d_latent = paths.latent_variance(path, x, t)
    return beta, d_beta, alpha**2 + latent, 2 * alpha * d_alpha + d_latent


def gaussian(mean: Array | float, std: Array | float, *, path: paths.Path = paths.linear()) -> Oracle:
    """Return the fields of Gaussian data ``N(mean, diag(std^2))``.

    With ``C_t = alpha^2 + gamma^2 + beta^2 std^2``, the variance of ``I_t``:

    ``v = beta' mean + C'/(2C) (x - beta mean)``, ``S = -(x - beta mean) / C``,
    ``X_{s,t}(x) = beta_t mean + sqrt(C_t / C_s) (x - beta_s mean)``.

    Args:
        mean: mean of the data, ``[d]`` or a scalar (then examples may have any shape).
        std: standard deviation of every coordinate, ``[d]`` or a scalar.
        path: path of the fields.

    Returns:
        The oracle, with a flow map.

    >>> oracle = gaussian(jnp.zeros(2), 0.5)
    >>> oracle.flow_map(jnp.ones((1, 2)), 0.0, 1.0).tolist()
    [[0.5, 0.5]]
    """
    mean, std = jnp.asarray(mean), jnp.asarray(std)

    def moments(x, t):
        beta, d_beta, noise, d_noise = _noise(path, x, t)
        return beta, d_beta, noise + beta**2 * std**2, d_noise + 2 * beta * d_beta * std**2

    def velocity(x, t, cond=None):
        beta, d_beta, var, d_var = moments(x, t)
        return d_beta * mean + d_var / (2 * var) * (x - beta * mean)

    def score(x, t):
        beta, _, var, _ = moments(x, t)
        return -(x - beta * mean) / var

    def log_density(x, t):
        beta, _, var, _ = moments(x, t)
        terms = -0.5 * ((x - beta * mean) ** 2 / var + jnp.log(2 * jnp.pi * var))
        return terms.reshape(x.shape[0], -1).sum(1)

    def flow_map(x, s, t, cond=None, key=None):
        (beta_s, _, var_s, _), (beta_t, _, var_t, _) = moments(x, s), moments(x, t)
        return beta_t * mean + jnp.sqrt(var_t / var_s) * (x - beta_s * mean)

    def sample(key, n):
        return mean + std * jax.random.normal(key, (n, *jnp.broadcast_shapes(mean.shape, std.shape)))

    return Oracle(sample, velocity, score, log_density, flow_map)


def mixture(
    means: Float[Array, "k d"],
    std: Float[Array, " k"] | float,
    weights: Float[Array, " k"] | None = None,
    *,
    path: paths.Path = paths.linear(),
) -> Oracle:
    """Return the fields of a Gaussian mixture ``sum_k w_k N(m_k, s_k^2 I)``.

    With ``C_k = alpha^2 + gamma^2 + beta^2 s_k^2`` and the responsibilities ``r_k(x)``:

    ``v = sum_k r_k [beta' m_k + C_k'/(2 C_k) (x - beta m_k)]``, ``S = -sum_k r_k (x - beta m_k) / C_k``.

    Args:
        means: means ``m_k`` of the modes, ``[K, d]``.
        std: standard deviations ``s_k``, ``[K]`` or a scalar; 0 gives a finite data set, whose fields are infinite at
            ``t = 1``.
        weights: weights ``w_k`` of the modes, ``[K]``, normalised here; ``None``: equal.
        path: path of the fields.

    Returns:
        The oracle, without a flow map.

    >>> oracle = mixture(jnp.array([[-1.0], [1.0]]), 0.1)
    >>> oracle.velocity(jnp.zeros((1, 1)), 0.5).tolist()
    [[0.0]]
    """
    means = jnp.asarray(means)
    k, d = means.shape
    std = jnp.broadcast_to(jnp.asarray(std, means.dtype), (k,))
    weights = jnp.full((k,), 1 / k, means.dtype) if weights is None else jnp.asarray(weights)
    log_w = jnp.log(weights / weights.sum())

    def joint(x, t):
        """Return offsets ``x - beta m_k: [B, d, K]``, log joint ``[B, K]``, variances ``[B, K]``, derivatives."""
        beta, d_beta, noise, d_noise = _noise(path, x, t)
        var, d_var = noise + beta**2 * std**2, d_noise + 2 * beta * d_beta * std**2
        offset = x[:, :, None] - beta[..., None] * means.T  # the modes last: twice as fast as the coordinates last
        log_joint = log_w - 0.5 * ((offset**2).sum(1) / var + d * jnp.log(2 * jnp.pi * var))
        return offset, log_joint, var, d_var, d_beta

    def velocity(x, t, cond=None):
        offset, log_joint, var, d_var, d_beta = joint(x, t)
        r = jax.nn.softmax(log_joint, -1)
        return d_beta * (r @ means) + ((r * d_var / (2 * var))[:, None] * offset).sum(-1)

    def score(x, t):
        offset, log_joint, var, _, _ = joint(x, t)
        return -((jax.nn.softmax(log_joint, -1) / var)[:, None] * offset).sum(-1)

    def log_density(x, t):
        return jax.nn.logsumexp(joint(x, t)[1], -1)

    def sample(key, n):
        k_mode, k_noise = jax.random.split(key)
        mode = jax.random.choice(k_mode, k, (n,), p=weights / weights.sum())
        return means[mode] + std[mode][:, None] * jax.random.normal(k_noise, (n, d))

    return Oracle(sample, velocity, score, log_density)


def finite(points: Float[Array, "k d"], *, path: paths.Path = paths.linear()) -> Oracle:
    """Return the fields of a finite data set, which a network that memorises its training set would learn.

    ``v = beta' E[x1|x] + alpha' E[x0|x]``, a softmax over the points; every sample ends on a point.

    Args:
        points: the data set ``[K, d]``.
        path: path of the fields.

    Returns:
        The oracle, without a flow map; its fields are infinite at ``t = 1``.

    >>> oracle = finite(jnp.array([[-1.0], [1.0]]))
    >>> oracle.velocity(jnp.array([[0.9]]), 0.9).round(3).tolist()
    [[1.0]]
    """
    return mixture(points, 0.0, path=path)


def ring(*, radius: float = 2.0, std: float = 0.2, modes: int = 8) -> Oracle:
    """Return the fields of equal Gaussians on a circle, ``radius (cos, sin)(2 pi k / modes) + std N(0, I)``.

    The defaults are the distribution of ``data.draw_eight_gaussians``, on the linear path.

    Args:
        radius: radius of the circle.
        std: standard deviation of every mode.
        modes: number of modes.

    Returns:
        The oracle, without a flow map.

    >>> ring(modes=4).sample(jax.random.key(0), 3).shape
    (3, 2)
    """
    angle = jnp.arange(modes) * (2 * jnp.pi / modes)
    return mixture(radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1), std)


def coupled(
    mean0: Float[Array, " d"],
    mean1: Float[Array, " d"],
    covariance: Float[Array, "d2 d2"],
    *,
    path: paths.Path = paths.linear(),
) -> Oracle:
    """Return the fields of jointly Gaussian pairs ``(x0, x1) ~ N((m0, m1), [[A, B], [B^T, D]])``.

    Any linear coupling and any Gaussian source:
    ``C_t = alpha^2 A + alpha beta (B + B^T) + beta^2 D + gamma^2 I`` is the covariance of ``I_t``, and

    ``v = m' + Cov(dI_t, I_t) C_t^-1 (x - m)``, ``score = -C_t^-1 (x - m)``, ``m = alpha m0 + beta m1``,
    ``Cov(dI, I) = alpha alpha' A + alpha' beta B + alpha beta' B^T + beta beta' D + gamma gamma' I``.

    The denoiser of the latent is ``E[z|x] = -gamma score``. All fields are finite at both ends.

    Args:
        mean0: mean ``m0`` of the source, ``[d]``.
        mean1: mean ``m1`` of the data, ``[d]``.
        covariance: covariance of ``(x0, x1)``, ``[2d, 2d]``, symmetric and positive definite.
        path: path of the fields.

    Returns:
        The oracle, without a flow map; ``sample`` draws pairs.

    Raises:
        ValueError: ``covariance`` has another shape.

    >>> oracle = coupled(jnp.zeros(1), jnp.ones(1), jnp.eye(2))
    >>> oracle.velocity(jnp.array([[0.5]]), 0.5).tolist()
    [[1.0]]
    """
    mean0, mean1, joint = jnp.asarray(mean0), jnp.asarray(mean1), jnp.asarray(covariance)
    d = mean0.shape[0]
    if joint.shape != (2 * d, 2 * d):
        raise ValueError(f"covariance.shape={joint.shape}: not of pairs of {d} coordinates. Give {(2 * d, 2 * d)}.")
    a, b, c = joint[:d, :d], joint[:d, d:], joint[d:, d:]

    def moments(x, t):
        """Return ``C^-1 (x - m)``, ``x - m``, ``C``, ``m'`` and ``Cov(dI, I)``."""
        alpha, beta, d_alpha, d_beta = paths.coefficients(path, x, t)
        latent, d_latent = paths.latent_variance(path, x, t)
        wide = lambda *values: (v[..., None] for v in values)
        offset, d_mean = x - alpha * mean0 - beta * mean1, d_alpha * mean0 + d_beta * mean1
        alpha, beta, d_alpha, d_beta, latent, d_latent = wide(alpha, beta, d_alpha, d_beta, latent, d_latent)
        cov = alpha**2 * a + alpha * beta * (b + b.T) + beta**2 * c + latent * jnp.eye(d)
        mixed = alpha * d_alpha * a + d_alpha * beta * b + alpha * d_beta * b.T + beta * d_beta * c
        return jnp.linalg.solve(cov, offset[..., None]), offset, cov, d_mean, mixed + d_latent / 2 * jnp.eye(d)

    def velocity(x, t, cond=None):
        solved, _, _, d_mean, mixed = moments(x, t)
        return d_mean + (mixed @ solved)[..., 0]

    def score(x, t):
        return -moments(x, t)[0][..., 0]

    def log_density(x, t):
        solved, offset, cov, *_ = moments(x, t)
        return -0.5 * ((offset * solved[..., 0]).sum(-1) + jnp.linalg.slogdet(2 * jnp.pi * cov)[1])

    def sample(key, n):
        z = jax.random.normal(key, (n, 2 * d), joint.dtype) @ jnp.linalg.cholesky(joint).T
        return mean0 + z[:, :d], mean1 + z[:, d:]

    return Oracle(sample, velocity, score, log_density)


def average_velocity(oracle: Oracle) -> Net:
    """Return an oracle as a network without parameters: ``u = (X_{s,t}(x) - x) / (t - s)``, ``v(x, s)`` where s = t.

    Differentiable in ``t`` and ``s``, on the diagonal, too: where ``|t - s|`` is too small to divide by it, the
    quotient is replaced by the mean of the velocities at both ends of the jump.

    Args:
        oracle: an oracle with a flow map.

    Returns:
        The network ``(params, x, s, t)``, which ignores ``params``.

    Raises:
        ValueError: the oracle has no flow map.

    >>> net = average_velocity(gaussian(jnp.zeros(2), 0.5))
    >>> net(None, jnp.ones((1, 2)), 0.0, 1.0).tolist()
    [[-0.5, -0.5]]
    """
    if oracle.flow_map is None:
        raise ValueError("oracle.flow_map=None: no closed form exists. Use oracles.gaussian.")

    def net(params, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        near = jnp.abs(t - s) < 1e-4
        t_far = jnp.where(near, s + 0.5, t)
        far = (oracle.flow_map(x, s, t_far) - x) / expand(t_far - s, x)
        middle = (oracle.velocity(x, s) + oracle.velocity(oracle.flow_map(x, s, t), t)) / 2
        return jnp.where(expand(near, x), middle, far)

    return net
