"""Frechet distance between Gaussians fitted to two sets of features: float64 numpy on the host, never complex."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
from jaxtyping import Float, Num

Features = Num[np.ndarray | jax.Array, "n d"]
Others = Num[np.ndarray | jax.Array, "m k"]
Vector = Float[np.ndarray, " d"]
Matrix = Float[np.ndarray, "d d"]


def moments(features: Features) -> tuple[Vector, Matrix]:
    """Mean ``[d]`` and covariance ``[d, d]`` (divisor ``n - 1``) in float64; subtracts the mean before squaring.

    Raises ``ValueError`` for fewer than two rows or entries that are not finite.
    """
    x = _checked(features)
    mu = x.mean(0)
    x = x - mu
    return mu, x.T @ x / (len(x) - 1)


def frechet_distance(mu1: Vector, s1: Matrix, mu2: Vector, s2: Matrix) -> float:
    """``|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)``: squared W2 of two Gaussians (arXiv 1706.08500).

    Can be negative by rounding alone, of the order 1e-8 of the trace; it is returned as it is.
    """
    mu1, s1, mu2, s2 = (np.asarray(a, np.float64) for a in (mu1, s1, mu2, s2))
    return float(((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * trace_sqrt_product(s1, s2))


def frechet(features_a: Features, features_b: Others) -> float:
    """Frechet distance of two sets of features ``[n, d]``, ``[m, d]``.

    Biased upwards by about ``c/n``: print ``n`` beside it and compare only values of one ``n``. With fewer samples than
    dimensions the covariances are singular and the exact nuclear-norm form is used.
    Raises ``ValueError`` as ``moments`` does, and where the dimensions differ.
    """
    a, b = _checked(features_a), _checked(features_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and of {b.shape[1]} dimensions have no distance")
    if max(len(a), len(b)) > a.shape[1]:
        return frechet_distance(*moments(a), *moments(b))
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(shift + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * trace_sqrt_features(a, b))


def trace_sqrt_product(s1: Matrix, s2: Matrix, *, form: str | None = None) -> float:
    """``tr (S1 S2)^(1/2)`` of covariances, singular or not: roots of the eigenvalues of ``R^T S2 R``, ``R R^T = S1``.

    ``form="eigh"``: ``R`` the symmetric root. ``form="cholesky"``: ``R`` the Cholesky factor, twice as fast at
    d = 2048; ``eigh`` where S1 is singular (a ridge would be faster and wrong by up to 1e-6 of the trace, which a small
    distance feels). ``None``: eigh up to d = 512, where it costs nothing.
    """
    form = form or ("eigh" if len(s1) <= 512 else "cholesky")
    if form not in ("eigh", "cholesky"):
        raise ValueError(f"unknown form {form!r}: 'eigh', 'cholesky' or None")
    root = None
    if form == "cholesky":
        with contextlib.suppress(np.linalg.LinAlgError):
            root = np.linalg.cholesky(s1)
    if root is None:
        w, v = np.linalg.eigh(s1)
        root = v * np.sqrt(np.clip(w, 0, None)) @ v.T
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(root.T @ s2 @ root), 0, None)).sum())


def trace_sqrt_features(features_a: Features, features_b: Others) -> float:
    """The same number as the nuclear norm of ``A B^T``, features centred and divided by ``sqrt(n - 1)``."""
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (_checked(features_a), _checked(features_b)))
    return float(np.linalg.norm(a @ b.T, "nuc"))


def _checked(features) -> np.ndarray:
    x = np.asarray(features, np.float64)
    if len(x) < 2:
        raise ValueError(f"a covariance needs at least two samples, got {len(x)}")
    if not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x).all(1))
        raise ValueError(f"{len(rows)} of {len(x)} samples are not finite, first at row {rows[0]}")
    return x
