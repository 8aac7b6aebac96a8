"""The smoothest push from the states of a sampler to their target, in closed form: one linear solve, no training.

With ``m`` the mixture of ``p`` (the states of a sampler) and ``q`` (where they should be), half each, ``f`` minimises

``E_p f - E_q f + E_m |grad f|^2 / 2 + E_m f^2 / (16 lam)``

over linear features, products of the leading directions and random cosines. Its gradient is the push: ``x + grad f``
has the distribution ``q - m f / (8 lam)`` to first order, so that details much finer than ``sqrt(8 lam)`` remain and
coarser ones are repaired. The strength is therefore 1, and ``lam`` is about the variance of the data per direction.
For ``p = N(0, b^2)`` a difference of Hermite degree ``k`` shrinks by the fraction ``8 lam k / (b^2 + 8 lam k)``.

The fit costs generated examples: a perfect model is moved by about ``tr C / M`` (squared) for ``M`` examples of
covariance ``C``. Fit on states of the very sampler (solver, number of steps) that is corrected.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fmjax.correction import features
from fmjax.correction.correctors import check_all
from fmjax.data.dataset import Rows
from fmjax.keys import generator
from fmjax.sampling import grids
from fmjax.types import Cond, Costed, DirectionFn, expand, over_batch

SCALES = (1.0, 2.0, 4.0)  # standard deviations of the phases of the random cosines
FEWEST = 16  # examples of a set, or of a label in a set


class Push(NamedTuple):
    """A fitted push at every time and for every label: arrays, an argument of a jitted function.

    ``L`` is the number of directions of the space, ``K`` the number of labels (1 without labels).

    Attributes:
        centre: origin of the space, ``[steps, d]``.
        basis: orthonormal rows, leading directions first, ``[steps, L, d]``.
        start: mean of ``p`` in the space, ``[steps, K, L]``.
        shift: mean of ``q`` minus mean of ``p`` (0 without the affine map), ``[steps, K, L]``.
        stretch: affine map minus identity on the first directions, ``[steps, K, R, R]``.
        linear: gradient of the linear features, ``[steps, K, L]``.
        quadratic: matrix of the gradient of the products of the first directions, ``[steps, K, r, r]``.
        amplitudes: coefficients of the cosines, ``[steps, K, F]``.
        waves: frequencies of the cosines, ``[steps, F, L]``.
        phases: phases of the cosines, ``[steps, F]``.
        signal: mean squared length of the push from ``p`` to ``q`` without the noise of the fit, ``[steps, K]``.
        noise: mean squared length that the noise of the fit adds, by the examples of ``p`` and of ``q``,
            ``[steps, K, 2]``.
        labels: the labels ``[K]``, or ``None``.
    """

    centre: Array
    basis: Array
    start: Array
    shift: Array
    stretch: Array
    linear: Array
    quadratic: Array
    amplitudes: Array
    waves: Array
    phases: Array
    signal: Array
    noise: Array
    labels: Array | None = None


def fit_push(
    p: Rows,
    q: Rows,
    p_labels: np.ndarray | None = None,
    q_labels: np.ndarray | None = None,
    *,
    lam: float | None = None,
    affine: bool = False,
    smooth: bool = True,
    products: int = 24,
    cosines: int = 510,
    gram: int = 4096,
    ridge: float = 0.01,
    seed: int = 0,
) -> Push:
    """Fit the smoothest push from ``p`` to ``q``, in float64 on the host; warn where it is mostly noise.

    Means are taken over all examples, the matrices of the linear system over ``gram`` examples of each set. Neither
    depends on the order of the examples. The features are scaled to a unit diagonal before ``ridge`` is added.

    Args:
        p: states of the sampler that is corrected ``[m, steps, ...]``, such as ``read_marginals(...).x``.
        q: where they should be, ``[n, steps, ...]``: backward marginals, at the end the data.
        p_labels: integer labels ``[m]`` of ``p``; with labels every label has a separate push.
        q_labels: integer labels ``[n]`` of ``q``.
        lam: squared length scale of the repair over 8; by default the variance of ``q`` per dimension, at every step.
            For data in clusters give the variance of a cluster: else the push tries to move mass between clusters.
        affine: first map mean and covariance of ``p`` onto the moments of ``q``, by the optimal affine map.
        smooth: fit the push, after the affine map if there is one.
        products: number of leading directions whose products are features; all directions are linear features.
        cosines: number of random cosines, a multiple of 3; their phases have standard deviations 1, 2 and 4.
        gram: number of examples of each set in the matrices.
        ridge: added to the unit diagonal.
        seed: seed of the cosines.

    Returns:
        The push, float32.

    Raises:
        ValueError: sets of different steps or shapes or with too few examples, labels that one set does not have,
            neither of the two maps, or a number out of range.

    >>> rng = np.random.default_rng(0)
    >>> p, q = rng.standard_normal((4000, 1, 2)), 0.5 + rng.standard_normal((4000, 1, 2))
    >>> push = fit_push(p, q, lam=10.0, products=0, cosines=0)
    >>> bool(abs(push.basis[0].T @ push.linear[0, 0] - 0.5).max() < 0.1)
    True

    Source: the linearised optimal transport of a screened Poisson equation; compare Sobolev descent (arXiv 1805.12062).
    """
    _check_sets(p, q)
    _check_numbers(lam, affine, smooth, products, cosines, gram, ridge)
    labels, groups = _groups(p_labels, q_labels, len(p), len(q))
    options = {"affine": affine, "smooth": smooth, "products": products, "gram": gram, "ridge": ridge}
    steps = [
        _fit_step(_step(p, n), _step(q, n), groups, lam, cosines, generator(seed, n), **options)
        for n in range(p.shape[1])
    ]
    push = Push(**{name: np.stack([step[name] for step in steps]).astype(np.float32) for name in steps[0]})
    _warn(push, len(p))
    return push._replace(labels=labels)


def _fit_step(p, q, groups, lam, cosines: int, rng, *, products: int, **options) -> dict[str, np.ndarray]:
    """Return the arrays of a push at one time, from ``p [m, d]`` to ``q [n, d]``."""
    space = features.subspace(p, q)
    waves, phases = features.cosines(space, cosines, SCALES, rng)
    phi = features.PushFeatures(min(products, len(space.spread)), waves, phases)
    z_p, z_q = space.project(p), space.project(q)
    lam = max(space.variance, 1e-12) if lam is None else lam
    parts = [_fit_group(phi, z_p[of_p], z_q[of_q], lam, **options) for of_p, of_q in groups]
    each = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    return each | {"centre": space.centre, "basis": space.basis, "waves": waves, "phases": phases}


def _fit_group(phi, p, q, lam: float, *, affine: bool, smooth: bool, gram: int, ridge: float) -> dict[str, Any]:
    """Return the affine map and the weights of one label, from coordinates ``p [m, L]`` to ``q [n, L]``."""
    options = {"lam": lam, "gram": gram, "ridge": ridge}
    solution = features.solve(phi, p, q, **options)
    facts = {"signal": solution.signal, "noise": solution.noise}
    first = features.affine_map(p, q)
    if not affine:
        first = {"start": first["start"], "shift": 0 * first["shift"], "stretch": 0 * first["stretch"][:1, :1]}
    elif smooth:
        size = len(first["stretch"])
        moved = p + first["shift"]
        moved[:, :size] += (p - first["start"])[:, :size] @ first["stretch"]
        solution = features.solve(phi, moved, q, **options)
    return facts | first | phi.parts(solution.weights if smooth else 0 * solution.weights)


def sobolev_drift(push: Push, *, ts) -> DirectionFn:
    """Return the direction of a fitted push, in displacement units: ``marginal_matching(direction, alpha=1)``.

    The push is a parameter: pass it as an argument of the jitted function around the direction. It costs two products
    with the basis and one with the cosines, and no network evaluation.

    Args:
        push: what ``fit_push`` returns, fitted on states of the sampler that is corrected.
        ts: times ``[steps]`` of the push.

    Returns:
        A direction ``h(x, t, cond)`` that costs no network evaluation. A push without labels is the same for all
        conditions. Its ``check`` refuses times that are not in ``ts``; at such times, and for a label that was not
        fitted, the result is ``nan``.

    Raises:
        ValueError: a push with another number of times; in the direction, samples without the labels that it needs.

    >>> p = np.random.default_rng(0).standard_normal((100, 1, 2))
    >>> push = fit_push(p, p + 1, affine=True, smooth=False)
    >>> sobolev_drift(push, ts=[1.0])(jnp.zeros((1, 2)), 1.0).round(3).tolist()
    [[1.0, 1.0]]
    """
    index = grids.per_step(ts, np.arange(len(ts)))
    if len(push.centre) != len(ts):
        raise ValueError(f"push={len(push.centre)} times: ts has {len(ts)}. Give the times of the fit.")
    apart = ("labels", "signal", "noise")
    arrays = {name: jnp.asarray(value) for name, value in push._asdict().items() if name not in apart}

    def drift(x, t, cond=None):
        t = over_batch(t, x)
        n, row = index(t), None if push.labels is None else _row(push.labels, cond, len(x))

        def visit(h, i):
            now = n == i
            at = lambda: {k: jax.lax.dynamic_index_in_dim(a, i, 0, keepdims=False) for k, a in arrays.items()}
            move = lambda: jnp.where(expand(now, x), _displacement(x, row, **at()), h)
            return jax.lax.cond(now.any(), move, lambda: h), None

        h = jax.lax.scan(visit, jnp.full_like(x, jnp.nan), jnp.arange(len(ts)))[0]
        return h if row is None else jnp.where(expand(row >= 0, x), h, jnp.nan)

    return Costed(drift, 0, check_all(index))


def _row(labels, cond: Cond, count: int) -> Array:
    """Return the row of each sample's label among the labels of the push, ``[B]``; -1 for a label without a push."""
    leaf = cond if isinstance(cond, (np.ndarray, jax.Array)) else np.zeros(0)
    if not jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.shape != (count,):
        raise ValueError(f"cond={type(cond).__name__}: the push has labels. Give integer labels of samples, [{count}].")
    same = jnp.asarray(cond)[:, None] == jnp.asarray(labels)
    return jnp.where(same.any(1), same.argmax(1), -1)


def _displacement(x, row, *, centre, basis, start, shift, stretch, linear, quadratic, amplitudes, waves, phases):
    """Return the displacement ``[B, ...]`` of ``x`` at one time: the affine map, then the push."""
    dot = functools.partial(jnp.einsum, precision="highest")
    take = lambda a: a[:1] if row is None else a[jnp.maximum(row, 0)]  # of the label of each sample

    def add(z, matrix, y):
        """Add the product of a matrix with the first coordinates ``y`` to the first coordinates of ``z``."""
        size = matrix.shape[-1]
        y = y[:, :size]
        moved = dot("bj,ij->bi", y, matrix[0]) if row is None else dot("bj,bij->bi", y, take(matrix))
        return z.at[:, :size].add(moved)

    z = dot("bd,ld->bl", x.reshape(len(x), -1) - centre, basis)
    y = add(z + take(shift), stretch, z - take(start))
    waving = take(amplitudes) * jnp.sin(dot("bl,fl->bf", y, waves) + phases)
    end = add(y + take(linear), quadratic, y) - dot("bf,fl->bl", waving, waves)
    return dot("bl,ld->bd", end - z, basis).reshape(x.shape).astype(x.dtype)


def _step(x: Rows, n: int) -> np.ndarray:
    """Return the states of one time ``[m, d]``, of an array or of rows on disk."""
    rows = range(0, len(x), features.CHUNK)
    parts = [np.asarray(x[i : i + features.CHUNK])[:, n] for i in rows]
    return np.concatenate([part.reshape(len(part), -1) for part in parts])


def _groups(p_labels, q_labels, m: int, n: int):
    """Return the labels ``[K]`` and the rows of both sets for each of them; without labels ``None`` and all rows."""
    if p_labels is None and q_labels is None:
        return None, [(slice(None), slice(None))]
    for name, labels, count in (("p_labels", p_labels, m), ("q_labels", q_labels, n)):
        kind = None if labels is None else np.asarray(labels).dtype
        if kind is None or not np.issubdtype(kind, np.integer) or np.shape(labels) != (count,):
            raise ValueError(f"{name}={kind}{np.shape(labels)}: a push of every label needs integer labels [{count}].")
    values = np.unique(q_labels)
    groups = [(np.flatnonzero(p_labels == v), np.flatnonzero(q_labels == v)) for v in values]
    for value, rows in zip(values, groups, strict=True):
        if min(map(len, rows)) < FEWEST:
            raise ValueError(
                f"labels: {value} has {len(rows[0])} examples of p and {len(rows[1])} of q. Give at least {FEWEST} of "
                "each, or one push for all labels."
            )
    return values.astype(np.int32), groups


def _check_sets(p: Rows, q: Rows) -> None:
    if p.ndim < 2 or p.shape[1:] != q.shape[1:] or not math.prod(p.shape[1:]):
        raise ValueError(f"p={p.shape}, q={q.shape}: not sets of the same steps. Give [examples, steps, ...] of both.")
    if min(len(p), len(q)) < FEWEST:
        raise ValueError(f"p={p.shape}, q={q.shape}: too few examples for a fit. Give thousands, at least {FEWEST}.")


def _check_numbers(lam, affine, smooth, products, cosines, gram, ridge) -> None:
    if not (affine or smooth):
        raise ValueError("affine=False, smooth=False: nothing to fit. Set one of them.")
    if lam is not None and not 0 < lam < math.inf:
        raise ValueError(f"lam={lam}: not a squared length. Give a positive number, or None for the variance of q.")
    if products < 0 or cosines < 0 or cosines % len(SCALES):
        multiple = f"of cosines a multiple of {len(SCALES)}"
        raise ValueError(f"products={products}, cosines={cosines}: not counts of features. Give counts, {multiple}.")
    if gram < FEWEST or not 0 <= ridge < math.inf:
        raise ValueError(f"gram={gram}, ridge={ridge}: out of range. Give {FEWEST} or more, and 0 or more.")


def _warn(push: Push, m: int) -> None:
    """Say where the noise of the generated examples moves samples further than the push that it estimates."""
    signal, noise = push.signal.sum(1), push.noise[..., 0].sum(1)
    for i in np.flatnonzero(noise > signal):
        logging.getLogger(__name__).warning(
            "step %d of the push: its mean squared length is %.2g by noise of the %d generated examples, %.2g without "
            "noise. Generate more examples, or leave this correction out.", i, noise[i], m, max(signal[i], 0),
        )  # fmt: skip
