"""PSD models: densities ``k(x)^T A k(x)`` with a positive semi-definite ``A``, exact box integrals, and a sampler.

``f(x) = sum_ij A_ij k(x, x_i) k(x, x_j)`` with ``k(x, y) = exp(-sum_k eta_k (x_k - y_k)^2)`` (arXiv 2110.10527): for a
few dimensions, as a density or as the source of a flow. The cost grows as ``M^2`` in the number of centres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.keys import per_example
from fmjax.sources import Source


class PSDModel(NamedTuple):
    """A non-negative function of few dimensions.

    Attributes:
        a: the positive semi-definite matrix ``[M, M]``.
        centres: the points ``x_i``, ``[M, d]``.
        eta: the inverse squared widths of the kernel, ``[d]``.
    """

    a: Float[Array | np.ndarray, "m m"]
    centres: Float[Array | np.ndarray, "m d"]
    eta: Float[Array | np.ndarray, " d"]

    def values(self, x: Float[Array, "b d"]) -> Float[Array, " b"]:
        """Return ``f(x)``.

        Args:
            x: points ``[B, d]``.

        Returns:
            Values ``[B]``, not negative.
        """
        k = _kernel(x, jnp.asarray(self.centres, x.dtype), jnp.asarray(self.eta, x.dtype))
        return jnp.einsum("bi,ij,bj->b", k, jnp.asarray(self.a, x.dtype), k)

    def integral(self, low: Float[Array, " d"], high: Float[Array, " d"]) -> Float[Array, ""]:
        """Return the integral of ``f`` over a box, in closed form.

        Args:
            low: lower corner ``[d]``.
            high: upper corner ``[d]``.

        Returns:
            The integral, a product of error functions for each pair of centres.
        """
        eta, x = jnp.asarray(self.eta, low.dtype), jnp.asarray(self.centres, low.dtype)
        middle, root = (x[:, None] + x) / 2, jnp.sqrt(2 * eta)
        apart = jnp.exp(-0.5 * jnp.sum(eta * (x[:, None] - x) ** 2, -1))
        erf = jax.scipy.special.erf
        sides = jnp.sqrt(jnp.pi / (8 * eta)) * (erf(root * (high - middle)) - erf(root * (low - middle)))
        return jnp.sum(jnp.asarray(self.a, low.dtype) * apart * jnp.prod(sides, -1))


def fit_psd(
    x: Float[Array | np.ndarray, "_ _"],
    values: Float[Array | np.ndarray, " _"],
    *,
    centres: Float[Array | np.ndarray, "_ _"],
    eta: Float[Array | np.ndarray, " _"],
    ridge: float = 1e-6,
    steps: int = 500,
) -> PSDModel:
    """Fit a PSD model to the values of a function by least squares, ``|f(x_n) - values_n|^2 / n + ridge |B|^2``.

    ``B`` is ``A`` in coordinates in which the kernels are orthonormal. The problem is convex: accelerated projected
    gradients, on the host, in float64. The projection sets negative eigenvalues to zero.

    Args:
        x: points ``[n, d]``.
        values: values of the function, for example of a density up to a factor, ``[n]``.
        centres: centres ``[M, d]``, for example some of the points.
        eta: inverse squared widths ``[d]``, positive.
        ridge: weight of ``|B|^2``, not negative.
        steps: number of gradient steps.

    Returns:
        The model.

    Raises:
        ValueError: widths that are not positive, or arrays that do not fit.

    >>> x = np.linspace(-3, 3, 61)[:, None]
    >>> model = fit_psd(x, np.exp(-x[:, 0] ** 2), centres=x[::10], eta=np.ones(1))
    >>> bool(abs(model.values(jnp.zeros((1, 1)))[0] - 1) < 0.05)
    True
    """
    x, values, centres, eta = (np.asarray(a, np.float64) for a in (x, values, centres, eta))
    if values.shape != x.shape[:1] or centres.shape[1:] != x.shape[1:] or eta.shape != x.shape[1:]:
        shapes = f"x={list(x.shape)}, values={list(values.shape)}, centres={list(centres.shape)}, eta={list(eta.shape)}"
        raise ValueError(f"{shapes}: do not fit. Give [n, d], [n], [M, d] and [d].")
    if not (eta > 0).all() or ridge < 0:
        raise ValueError(f"eta={eta.tolist()}, ridge={ridge}: eta must be positive, and ridge not negative.")
    near = lambda x: np.exp(-np.sum(eta * (x[:, None] - centres) ** 2, -1))
    # coordinates in which the kernels are orthonormal: the problem is then well conditioned
    root = np.linalg.inv(np.linalg.cholesky(near(centres) + 1e-6 * np.eye(len(centres))))
    k = near(x) @ root.T
    curvature, v = (k @ k.T) ** 2, np.ones(len(x))  # its largest eigenvalue, by power iterations: it is positive
    for _ in range(30):
        v = curvature @ v / np.linalg.norm(v)
    speed = 1 / (2.02 * np.linalg.norm(v) / len(x) + 2 * ridge)
    b = momentum = np.zeros((len(centres),) * 2)
    weight = 1.0
    for _ in range(steps):
        residual = np.sum((k @ momentum) * k, 1) - values
        gradient = 2 * (k.T * residual) @ k / len(x) + 2 * ridge * momentum
        eigenvalues, vectors = np.linalg.eigh(momentum - speed * gradient)
        new = (vectors * np.maximum(eigenvalues, 0)) @ vectors.T
        next_weight = (1 + math.sqrt(1 + 4 * weight**2)) / 2
        b, momentum, weight = new, new + (weight - 1) / next_weight * (new - b), next_weight
    return PSDModel(root.T @ b @ root, centres, eta)


def draw_psd(
    model: PSDModel,
    key,
    low: Float[Array | np.ndarray, " d"],
    high: Float[Array | np.ndarray, " d"],
    *,
    side: float = 1e-2,
) -> Float[Array, "b d"]:
    """Draw from a PSD model on a box by halving the box, each half with the probability of its integral.

    Args:
        model: the model.
        key: keys ``[B]``.
        low: lower corner ``[d]``.
        high: upper corner ``[d]``.
        side: the draw is uniform in a box whose sides are at most this long.

    Returns:
        Points ``[B, d]``. The cost is ``O(M^2 d log(1 / side))`` for each.

    Raises:
        ValueError: a side that is not positive, or a box that is empty.

    >>> model = PSDModel(np.ones((1, 1)), np.zeros((1, 1)), np.ones(1))
    >>> x = draw_psd(model, jax.random.split(jax.random.key(0), 500), -4 * jnp.ones(1), 4 * jnp.ones(1))
    >>> bool(abs(x.std() - 0.5) < 0.1)
    True
    """
    if not side > 0 or not bool((np.asarray(high) > np.asarray(low)).all()):
        raise ValueError(f"side={side}, low={low}, high={high}: nothing to halve. Give a box and a positive side.")
    halvings = [max(0, math.ceil(math.log2(s / side))) for s in (np.asarray(high) - np.asarray(low)).tolist()]
    axes = np.array([axis for axis, n in enumerate(halvings) for _ in range(n)], int)
    low, high = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)

    def example(key):
        k_half, k_inside = jax.random.split(key)

        def halve(box, now):
            (low, high, mass), (axis, u) = box, now
            middle = (low[axis] + high[axis]) / 2
            left = model.integral(low, high.at[axis].set(middle))
            take = u * mass < left
            low, high = jnp.where(take, low, low.at[axis].set(middle)), jnp.where(take, high.at[axis].set(middle), high)
            return (low, high, jnp.where(take, left, mass - left)), None

        now = (jnp.asarray(axes), jax.random.uniform(k_half, (len(axes),)))
        (a, b, _), _ = jax.lax.scan(halve, (low, high, model.integral(low, high)), now)
        return a + (b - a) * jax.random.uniform(k_inside, low.shape)

    return per_example(example, key)


def psd_source(
    model: PSDModel, *, low: Sequence[float] | np.ndarray, high: Sequence[float] | np.ndarray, side: float = 1e-2
) -> Source:
    """Return a PSD model on a box as the source of a flow, with its density.

    Args:
        model: the model.
        low: lower corner ``[d]``.
        high: upper corner ``[d]``.
        side: as in ``draw_psd``.

    Returns:
        The source; its log-density is normalised by the integral over the box and ``-inf`` outside.

    >>> model = PSDModel(np.ones((1, 1)), np.zeros((1, 1)), np.ones(1))
    >>> source = psd_source(model, low=(-4.0,), high=(4.0,))
    >>> round(float(source.log_density(jnp.zeros((1, 1)))[0]), 3)  # of N(0, 1/4)
    -0.226
    """
    a, b = (np.asarray(v, np.float32) for v in (low, high))
    draw = jax.jit(lambda key: draw_psd(model, key, a, b, side=side))
    mass = model.integral(jnp.asarray(a), jnp.asarray(b))

    def log_density(x):
        inside = ((x >= a) & (x <= b)).all(-1)
        return jnp.where(inside, jnp.log(model.values(x) / mass), -jnp.inf)

    return Source("psd", lambda key, shape: draw(key), log_density, a.shape)


def _kernel(x: Array, centres: Array, eta: Array) -> Array:
    return jnp.exp(-jnp.sum(eta * (x[:, None] - centres) ** 2, -1))
