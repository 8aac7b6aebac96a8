"""Directions and scores that need no training: a drift between stored marginals, and the score inside a velocity."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import paths
from fmjax.correction.correctors import Schedule, at_time, check_all, check_positive
from fmjax.sampling import evaluations, grids
from fmjax.types import Cond, Costed, DirectionFn, VelocityFn, expand, over_batch


def kernel_drift(
    p: Float[Array | np.ndarray, "m _ ..."],
    q: Float[Array | np.ndarray, "n _ ..."],
    p_labels: Cond = None,
    q_labels: Cond = None,
    *,
    ts,
    bandwidth: Schedule,
) -> DirectionFn:
    """Return the drift from stored forward marginals ``p`` to backward marginals ``q``, without training.

    ``V(x) = sum_j w_j(x) q_j - sum_i w_i(x) p_i``, with ``w`` the softmax of ``-|x - y|^2 / (2 h^2)`` over the examples
    ``y`` of one set at the time of ``x``, and ``h`` the bandwidth. With labels only the examples of the label of ``x``
    take part: the drift of each class is the drift between the marginals of that class.

    ``V`` is ``h^2 (grad log q_h - grad log p_h)``, with the kernel density estimates ``q_h`` and ``p_h`` (arXiv
    2603.07514): a step of the classifier's kind, in displacement units, blind below ``h``. For Gaussians of variance
    ``C`` the mean moves by ``alpha h^2 / (C + h^2)`` of the gap, with the ``alpha`` of ``marginal_matching``. Where
    ``h`` is far below the distance between neighbours, which happens early for images, ``V`` is the difference of two
    single examples.

    Banks and labels are parameters: pass them as arguments of the jitted function around the drift. One example costs
    about ``4 (m + n) d`` operations and no network evaluation. Only the banks of times in the batch are read.

    Args:
        p: forward marginals ``[m, steps, ...]``, ``read_marginals(...).x``; must not hold ``x`` itself.
        q: backward marginals ``[n, steps, ...]``; must not hold ``x`` itself.
        p_labels: integer labels ``[m, ...]`` of ``p``, or a pytree of them, ``read_marginals(...).cond``.
        q_labels: labels of ``q``, ``[n, ...]``, of the same structure.
        ts: times ``[steps]`` of both sets.
        bandwidth: ``h``: a number, or a function of the times ``[B]``.

    Returns:
        A direction that costs no network evaluation. It takes ``cond`` exactly when there are labels. Its ``check``
        refuses times that are not in ``ts``; at such times, and for a label that a bank does not have, the result is
        ``nan``.

    Raises:
        ValueError: banks of different steps or shapes, labels that do not fit, or a bandwidth that is not positive.

    >>> p, q = jnp.zeros((2, 1, 1)), jnp.array([[[1.0]], [[5.0]]])
    >>> drift = kernel_drift(p, q, jnp.array([0, 1]), jnp.array([0, 1]), ts=[1.0], bandwidth=1.0)
    >>> drift(jnp.zeros((2, 1)), 1.0, jnp.array([0, 1])).tolist()
    [[1.0], [5.0]]

    Source: drifting models (arXiv 2602.04770), with a Gaussian kernel.
    """
    check_positive("bandwidth", bandwidth)
    index = grids.per_step(ts, np.arange(len(ts)))
    if not p.shape[1:] == q.shape[1:] == (len(ts), *q.shape[2:]):
        raise ValueError(
            f"p={p.shape}, q={q.shape}: ts has {len(ts)} times. Give banks [examples, {len(ts)}, ...] of one shape."
        )
    labelled = p_labels is not None or q_labels is not None
    if labelled:
        _check_labels("p_labels", p_labels, len(p), like=q_labels)
        _check_labels("q_labels", q_labels, len(q), like=p_labels)

    def drift(x, t, cond=None):
        t = over_batch(t, x)
        _check_cond(cond, p_labels, labelled)
        n, h = index(t), jnp.reshape(jnp.asarray(at_time(bandwidth, t, x), x.dtype), (-1, 1))
        same = lambda labels: _same_label(cond, labels) if labelled else None
        same_q, same_p = same(q_labels), same(p_labels)

        def visit(v, i):
            now = n == i
            bank = lambda y: jax.lax.dynamic_index_in_dim(y, i, 1, keepdims=False)
            gap = lambda: _mean_shift(x, bank(q), h, same_q) - _mean_shift(x, bank(p), h, same_p)
            return jax.lax.cond(now.any(), lambda: jnp.where(expand(now, x), gap(), v), lambda: v), None

        return jax.lax.scan(visit, jnp.full_like(x, jnp.nan), jnp.arange(len(ts)))[0]

    return Costed(drift, 0, check_all(index, bandwidth))


def _mean_shift(x: Array, y: Array, h: Array, same: Array | None) -> Array:
    """Return the kernel-weighted mean of the bank ``y [n, ...]`` around each ``x [B, ...]``, over ``same [B, n]``."""
    flat, y = x.reshape(len(x), -1), y.reshape(len(y), -1).astype(x.dtype)
    inner = jnp.matmul(flat, y.T, precision="highest") - jnp.sum(jnp.square(y), 1) / 2  # |x|^2 is the same for all y
    inner = inner if same is None else jnp.where(same, inner, -jnp.inf)
    return jnp.matmul(jax.nn.softmax(inner / h**2, 1), y, precision="highest").reshape(x.shape)


def _same_label(cond: Cond, labels: Cond) -> Array:
    """Return which examples of a bank have the label of each sample, ``[B, n]``."""

    def same(c, y):
        c, y = jnp.asarray(c), jnp.asarray(y)
        return (c.reshape(len(c), 1, -1) == y.reshape(1, len(y), -1)).all(-1)

    return functools.reduce(jnp.logical_and, jax.tree.leaves(jax.tree.map(same, cond, labels)))


def _check_labels(name: str, labels: Cond, count: int, *, like: Cond) -> None:
    """Refuse labels that are missing, do not fit their bank, or are not integers."""
    leaves = jax.tree.leaves(labels)
    if not leaves or jax.tree.structure(labels) != jax.tree.structure(like):
        raise ValueError(f"{name}={type(labels).__name__}: the other bank has other labels. Give labels to both banks.")
    for leaf in leaves:
        if not (jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool) or len(leaf) != count:
            raise ValueError(
                f"{name}={leaf.dtype}{tuple(leaf.shape)}: the bank has {count} examples. Give one integer label each."
            )


def _check_cond(cond: Cond, labels: Cond, labelled: bool) -> None:
    """Refuse samples with labels for a bank without, and the reverse."""
    if not labelled and cond is not None:
        raise ValueError(
            "cond=given: the banks of kernel_drift have no labels, so that it would mix the classes. Give p_labels and "
            "q_labels."
        )
    if labelled and jax.tree.structure(cond) != jax.tree.structure(labels):
        raise ValueError(
            f"cond={type(cond).__name__}: the banks of kernel_drift have labels. Give the labels of the samples, of "
            "the same structure."
        )


def score_of(velocity: VelocityFn, *, path: paths.Path = paths.linear()) -> DirectionFn:
    """Return the score of the marginal at ``t < 1``, computed from the velocity (``paths.score``).

    Valid only for a source N(0, I) that is independent of the data. Under an optimal transport coupling the velocity
    does not determine the score: the result is then the score of no distribution, nothing here can detect it, and
    Langevin steps along it change the marginals. (For pairs ``x1 = a x0``, with ``m = 1 - t + a t``, the result is
    ``-x / ((1 - t) m)``, the score is ``-x / m^2``: too steep for every ``a > 0``, and infinite at the end.) In that
    case train a score network instead: ``methods.score_corrector``, ``methods.stochastic_interpolant``.

    Args:
        velocity: ``v(x, t, cond)``.
        path: path of the flow, without a latent.

    Returns:
        The score ``S(x, t, cond)``, ``[B, ...]``, which costs what ``velocity`` costs. Its ``check`` refuses times at
        which ``alpha_t = 0``, the end.

    Raises:
        ValueError: a path with a latent.

    >>> still = lambda x, t, cond=None: -x  # the velocity at t = 0 of data at 0
    >>> score_of(still)(jnp.ones((1, 1)), 0.0).tolist()
    [[-1.0]]
    """
    paths.refuse_latent("score_of", path)

    def check(ts):
        for t, alpha in zip(ts, np.asarray(path.coefficients(jnp.asarray(ts))[0]), strict=True):
            if not abs(alpha) > 8 * np.finfo(np.float32).eps:  # cos(pi / 2) is not exactly 0 in floating point
                raise ValueError(f"t={t:g}: without noise the velocity does not determine the score. Correct earlier.")

    score = lambda x, t, cond=None: paths.score(path, x, velocity(x, t, cond), t)
    return Costed(score, evaluations(velocity), check_all(velocity, also=check))
