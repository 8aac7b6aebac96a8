"""The features of smooth pushes and their linear system, in float64 on the host.

A ``Subspace`` has the leading directions of two sets of states; the features are functions of the coordinates ``z``
there: the coordinates, products of the first of them, and cosines ``cos(omega . z + b)``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fmjax.keys import generator

CHUNK = 4096  # rows in float64 at a time
WIDEST, SQUARE = 1024, 2048  # most directions of a space; most dimensions of a covariance matrix
AFFINE = 256  # most directions whose covariance an affine map changes
TINY = 1e-8  # added to covariances, relative to the mean variance


class Subspace(NamedTuple):
    """The leading directions of two sets of states.

    Attributes:
        centre: origin ``[d]``.
        basis: orthonormal rows ``[L, d]``, by falling variance.
        spread: variance of the mixture along the rows ``[L]``.
        variance: variance of the second set, averaged over the ``d`` dimensions.
    """

    centre: Float[np.ndarray, " d"]
    basis: Float[np.ndarray, "l d"]
    spread: Float[np.ndarray, " l"]
    variance: float

    def project(self, x: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m l"]:
        """Return the coordinates of states."""
        parts = [(x[i : i + CHUNK].astype(np.float64) - self.centre) @ self.basis.T for i in range(0, len(x), CHUNK)]
        return np.concatenate(parts)


def subspace(p: Float[np.ndarray, "m d"], q: Float[np.ndarray, "n d"]) -> Subspace:
    """Return the leading directions of the mixture of two sets, half each.

    Args:
        p: states ``[m, d]``.
        q: states ``[n, d]``.

    Returns:
        All directions up to ``WIDEST``; in more than ``SQUARE`` dimensions they come from a block power iteration.

    >>> subspace(np.zeros((2, 3)), np.array([[1.0, 0, 0], [-1, 0, 0]])).spread.round(3).tolist()
    [0.5, 0.0, 0.0]
    """
    mean_p, mean_q = (x.mean(0, dtype=np.float64) for x in (p, q))
    centre, d = (mean_p + mean_q) / 2, p.shape[1]
    variance = float(sum(((q[i : i + CHUNK] - mean_q) ** 2).sum() for i in range(0, len(q), CHUNK)) / q.size)
    apply = lambda v: (_scatter(p, centre, v) + _scatter(q, centre, v)) / 2
    if d <= SQUARE:
        spread, vectors = np.linalg.eigh(apply(np.eye(d)))
    else:
        vectors = np.linalg.qr(generator(0).standard_normal((d, WIDEST)))[0]
        for _ in range(4):
            vectors = np.linalg.qr(apply(vectors))[0]
        spread, turn = np.linalg.eigh(vectors.T @ apply(vectors))
        vectors = vectors @ turn
    keep = np.argsort(spread, kind="stable")[::-1][:WIDEST]
    return Subspace(centre, vectors[:, keep].T, np.maximum(spread[keep], 0.0), variance)


def _scatter(x: np.ndarray, centre: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return ``E (x - centre) (x - centre)^T v``."""
    total = np.zeros_like(v)
    for i in range(0, len(x), CHUNK):
        a = x[i : i + CHUNK].astype(np.float64) - centre
        total += a.T @ (a @ v)
    return total / len(x)


class PushFeatures(NamedTuple):
    """The features: all coordinates, the products of the first ``products``, and cosines.

    Attributes:
        products: number of coordinates whose products are features.
        waves: frequencies ``[F, L]``.
        phases: phases ``[F]``.
    """

    products: int
    waves: Float[np.ndarray, "f l"]
    phases: Float[np.ndarray, " f"]

    def values(self, z: Float[np.ndarray, "m l"]) -> Float[np.ndarray, "m n"]:
        """Return the features of coordinates: linear, products, cosines."""
        i, j = np.triu_indices(self.products)
        return np.concatenate([z, z[:, i] * z[:, j], np.cos(z @ self.waves.T + self.phases)], 1)

    def sums(self, z: Float[np.ndarray, "m l"]) -> Float[np.ndarray, " n"]:
        """Return the sum of the features over all rows."""
        return sum(self.values(z[i : i + CHUNK]).sum(0) for i in range(0, len(z), CHUNK))

    def grams(self, z: Float[np.ndarray, "m l"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ``E phi``, ``E phi phi^T`` and ``E grad phi . grad phi^T`` over rows, ``[n]`` and ``[n, n]``."""
        phi, r, w = self.values(z), self.products, self.waves
        i, j = np.triu_indices(r)
        y, sines = z[:, :r], np.sin(z @ w.T + self.phases)
        mean, second, mixed = y.mean(0), y.T @ y / len(y), sines.T @ y / len(y)
        same = np.eye(z.shape[1])
        products = same[:, j] * mean[i] + same[:, i] * mean[j]
        ways = ((i, j), (j, i))
        pairs = sum(second[np.ix_(a, c)] * same[np.ix_(b, d)] for a, b in ways for c, d in ways)
        crossed = -(mixed[:, i] * w[:, j] + mixed[:, j] * w[:, i]).T
        linear = -(w * sines.mean(0)[:, None]).T
        cosines = (w @ w.T) * (sines.T @ sines / len(z))
        gradients = np.block([[same, products, linear], [products.T, pairs, crossed], [linear.T, crossed.T, cosines]])
        return phi.mean(0), phi.T @ phi / len(z), gradients

    def parts(self, weights: Float[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Return weights as ``linear [L]``, the symmetric ``quadratic [r, r]`` of the gradient, ``amplitudes [F]``."""
        size, (i, j) = self.waves.shape[1], np.triu_indices(self.products)
        linear, products, amplitudes = np.split(weights, [size, size + len(i)])
        quadratic = np.zeros((self.products, self.products))
        np.add.at(quadratic, (i, j), products)
        return {"linear": linear, "quadratic": quadratic + quadratic.T, "amplitudes": amplitudes}


def cosines(around: Subspace, count: int, scales: tuple[float, ...], rng: np.random.Generator):
    """Draw phases, and frequencies ``omega ~ N(0, k^2 / tr C)``: ``omega . z`` has the standard deviation ``k``.

    Args:
        around: the space; ``C`` is the covariance of the mixture.
        count: number of cosines, a multiple of the number of scales.
        scales: the values of ``k``, each for as many cosines.
        rng: generator.

    Returns:
        ``waves [count, L]`` and ``phases [count]``.
    """
    size = np.repeat(scales, count // len(scales)) / np.sqrt(around.spread.sum() + 1e-300)
    return size[:, None] * rng.standard_normal((count, len(around.spread))), rng.uniform(0, 2 * np.pi, count)


class Solution(NamedTuple):
    """Weights of the features; the mean squared length of the push without noise, and by the noise of either set."""

    weights: Float[np.ndarray, " n"]
    signal: float
    noise: tuple[float, float]


def solve(
    features: PushFeatures,
    p: Float[np.ndarray, "m l"],
    q: Float[np.ndarray, "k l"],
    *,
    lam: float,
    gram: int,
    ridge: float,
) -> Solution:
    """Solve the linear system of a push.

    ``(E_m [J J^T] + Cov_m phi / (8 lam)) w = E_q phi - E_p phi``, scaled to a unit diagonal, plus ``ridge``. The noise
    of a set comes from the difference of the pushes that its two halves give.

    Args:
        features: the features.
        p: coordinates of the states of the sampler.
        q: coordinates of the states where they should be.
        lam: squared length scale over 8.
        gram: number of rows of each set in the matrices.
        ridge: added to the unit diagonal.

    Returns:
        The solution.
    """
    from scipy.linalg import cho_factor, cho_solve

    p, q = (z[_order(z)] for z in (p, q))
    pairs = zip(features.grams(p[:gram]), features.grams(q[:gram]), strict=True)
    mean, values, slopes = (sum(pair) / 2 for pair in pairs)
    matrix = slopes + (values - np.outer(mean, mean)) / (8 * lam)  # f is determined up to a constant: E_m f = 0
    scale = np.sqrt(np.diag(matrix))
    scale = np.where(scale > 0, scale, 1.0)
    factor = cho_factor(matrix / np.outer(scale, scale) + ridge * np.eye(len(scale)), lower=True)
    of = lambda gap: cho_solve(factor, gap / scale) / scale
    weights, noise = 0.0, []
    for z, sign in ((p, -1), (q, 1)):
        halves = [features.sums(z[half::2]) for half in (0, 1)]
        weights = weights + sign * of(sum(halves) / len(z))
        apart = of(halves[0] / len(z[0::2]) - halves[1] / len(z[1::2]))
        noise.append(float(apart @ slopes @ apart) / 4)
    return Solution(weights, float(weights @ slopes @ weights) - sum(noise), tuple(noise))


def _order(z: np.ndarray) -> np.ndarray:
    """Return an order of rows that depends on their set alone, and is random along every direction."""
    rows = np.argsort(z @ generator(1).standard_normal(z.shape[1]), kind="stable")
    return rows[generator(2).permutation(len(z))]


def affine_map(p: Float[np.ndarray, "m l"], q: Float[np.ndarray, "k l"]) -> dict[str, np.ndarray]:
    """Return the optimal affine map between the moments of two sets of coordinates.

    ``z + shift + (T - I) (z - start)`` with ``T = C_p^{-1/2} (C_p^{1/2} C_q C_p^{1/2})^{1/2} C_p^{-1/2}`` on the first
    ``AFFINE`` directions: the optimal transport map between the Gaussians of these moments.

    Args:
        p: coordinates of the states of the sampler.
        q: coordinates of the states where they should be.

    Returns:
        ``start [L]``, ``shift [L]`` and ``stretch = T - I``, ``[R, R]``.

    >>> rng = np.random.default_rng(0)
    >>> p = rng.standard_normal((500, 2))
    >>> affine_map(p, 3 * p + 1)["stretch"].round(6).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    r = min(AFFINE, p.shape[1], len(p) // 2, len(q) // 2)
    moments = [(z.mean(0), np.cov(z[:, :r], rowvar=False, bias=True).reshape(r, r)) for z in (p, q)]
    (mean_p, c_p), (mean_q, c_q) = moments
    floor = TINY * (np.trace(c_p) + np.trace(c_q)) / (2 * r) * np.eye(r)
    values, vectors = np.linalg.eigh(c_p + floor)
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    inner, turn = np.linalg.eigh(root @ (c_q + floor) @ root)
    stretch = inverse @ ((turn * np.sqrt(np.maximum(inner, 0))) @ turn.T) @ inverse - np.eye(r)
    return {"start": mean_p, "shift": mean_q - mean_p, "stretch": (stretch + stretch.T) / 2}
