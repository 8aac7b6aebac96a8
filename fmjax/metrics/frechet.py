"""Frechet distance between Gaussians fitted to two sets of features: float64 numpy on the host, never complex."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
from jaxtyping import Float, Num

from fmjax.checks import check_choice
from fmjax.metrics import checking

Features = Num[np.ndarray | jax.Array, "n d"]
Others = Num[np.ndarray | jax.Array, "m k"]
Vector = Float[np.ndarray, " d"]
Matrix = Float[np.ndarray, "d d"]


def moments(features: Features) -> tuple[Vector, Matrix]:
    """Return the mean and the covariance of features; the mean is subtracted before squaring.

    Args:
        features: ``[n, d]``, at least two rows.

    Returns:
        The mean ``[d]`` and the covariance ``[d, d]`` (divisor ``n - 1``), float64.

    Raises:
        ValueError: for fewer than two rows or values that are not finite.

    >>> mean, covariance = moments(np.array([[0.0, 1.0], [2.0, 1.0]]))
    >>> mean.tolist(), covariance.tolist()
    ([1.0, 1.0], [[2.0, 0.0], [0.0, 0.0]])
    """
    x = checking.finite_rows("features", features)
    if x.ndim != 2:
        raise ValueError(f"features={x.shape}: a mean and a covariance are taken of rows. Give features [n, d].")
    mu = x.mean(0)
    x = x - mu
    return mu, x.T @ x / (len(x) - 1)


def frechet_distance(mu1: np.ndarray, s1: np.ndarray, mu2: np.ndarray, s2: np.ndarray) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians (arXiv 1706.08500).

    ``|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)``. The value can be negative by rounding, of the order 1e-8 of
    the trace; it is returned unchanged.

    Args:
        mu1: the mean ``[d]`` of the first Gaussian.
        s1: its covariance ``[d, d]``.
        mu2: the mean ``[d]`` of the second Gaussian.
        s2: its covariance ``[d, d]``.

    Returns:
        The squared distance.

    Raises:
        ValueError: for means and covariances whose shapes do not match, that are not finite, or are no covariances.

    >>> frechet_distance(np.zeros(2), np.eye(2), np.ones(2), 4 * np.eye(2))
    4.0
    """
    names = ("mu1", "s1", "mu2", "s2")
    mu1, s1, mu2, s2 = (_real(name, a) for name, a in zip(names, (mu1, s1, mu2, s2), strict=True))
    shapes = {"mu1": mu1.shape, "s1": s1.shape, "mu2": mu2.shape, "s2": s2.shape}
    d = mu1.shape[0] if mu1.ndim == 1 else -1
    for name, shape in {"mu1": (d,), "s1": (d, d), "mu2": (d,), "s2": (d, d)}.items():
        if shapes[name] != shape:
            raise ValueError(f"{name}={shapes[name]}: the shapes are {shapes}. Give means [d] and covariances [d, d].")
    return float(((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * trace_sqrt_product(s1, s2))


def frechet(features_a: Features, features_b: Others) -> float:
    """Return the Frechet distance of two sets of features.

    The value is biased upwards by about ``c/n``: print ``n`` beside it and compare only values of one ``n``. With fewer
    samples than dimensions the covariances are singular, and the exact nuclear-norm form is used.

    Args:
        features_a: ``[n, d]``, at least two rows.
        features_b: ``[m, d]``, at least two rows.

    Returns:
        The squared distance.

    Raises:
        ValueError: for features of different dimensions, and as ``moments`` raises.

    >>> a = np.array([[0.0], [2.0]])
    >>> round(frechet(a, a + 3), 9)
    9.0
    """
    a, b = checking.pair(features_a, features_b, ("features_a", "features_b"))
    if max(len(a), len(b)) > a.shape[1]:
        return frechet_distance(*moments(a), *moments(b))
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(shift + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * trace_sqrt_features(a, b))


def trace_sqrt_product(s1: Matrix, s2: Matrix, *, form: str | None = None) -> float:
    """Return ``tr (S1 S2)^(1/2)`` of two covariances, singular or not.

    The value is the sum of the roots of the eigenvalues of ``R^T S2 R`` with ``R R^T = S1``.

    Args:
        s1: a covariance ``[d, d]``.
        s2: a covariance ``[d, d]``.
        form: ``"eigh"``: ``R`` is the symmetric root. ``"cholesky"``: ``R`` is the Cholesky factor, twice as fast at
            d = 2048, and the symmetric root if ``s1`` is singular (a ridge would be faster, and wrong by up to 1e-6 of
            the trace, which changes a small distance). ``None``: ``"eigh"`` up to d = 512.

    Returns:
        The trace.

    Raises:
        ValueError: for another ``form``, and for matrices that are no covariances of one size.

    >>> trace_sqrt_product(np.eye(2), 4 * np.eye(2))
    4.0
    """
    s1, s2 = _covariance("s1", s1), _covariance("s2", s2)
    if s1.shape != s2.shape:
        raise ValueError(f"s2={s2.shape}: s1 is {s1.shape}. Give covariances of one size.")
    form = form or ("eigh" if len(s1) <= 512 else "cholesky")
    check_choice("form", form, ("eigh", "cholesky"))
    root = None
    if form == "cholesky":
        with contextlib.suppress(np.linalg.LinAlgError):
            root = np.linalg.cholesky(s1)
    if root is None:
        w, v = np.linalg.eigh(s1)
        root = v * np.sqrt(np.clip(w, 0, None)) @ v.T
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(root.T @ s2 @ root), 0, None)).sum())


def trace_sqrt_features(features_a: Features, features_b: Others) -> float:
    """Return ``tr (S1 S2)^(1/2)`` of the covariances of features, as the nuclear norm of ``A B^T``.

    ``A`` and ``B`` are the features, centred and divided by ``sqrt(n - 1)``.

    Args:
        features_a: ``[n, d]``, at least two rows.
        features_b: ``[m, d]``, at least two rows.

    Returns:
        The trace.

    Raises:
        ValueError: for features of different dimensions, and as ``moments`` raises.

    >>> a = np.array([[0.0], [2.0]])
    >>> round(trace_sqrt_features(a, 3 * a), 9)
    6.0
    """
    pair = checking.pair(features_a, features_b, ("features_a", "features_b"))
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in pair)
    return float(np.linalg.norm(a @ b.T, "nuc"))


def _real(name: str, a) -> np.ndarray:
    """Return finite real numbers in float64."""
    a = np.asarray(a)
    if a.dtype.kind not in "fiu" or not np.isfinite(a).all():
        raise ValueError(f"{name}={a.dtype}{list(a.shape)}: not finite real numbers. Take them from `moments`.")
    return a.astype(np.float64)


def _covariance(name: str, s) -> np.ndarray:
    """Return a covariance in float64, after a check of its shape, symmetry and variances."""
    s = _real(name, s)
    if s.ndim != 2 or s.shape[0] != s.shape[1] or not s.size:
        raise ValueError(f"{name}={s.shape}: a covariance is a square matrix. Give [d, d].")
    if (np.diag(s) < 0).any() or not np.allclose(s, s.T, rtol=1e-5, atol=1e-8 * np.abs(s).max(initial=0)):
        raise ValueError(f"{name}={s.shape}: not symmetric, or a variance below 0. Give a covariance of `moments`.")
    return s
