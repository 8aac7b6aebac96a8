"""Optimal transport between batches and to a whole data set: costs, exact and entropic plans, dual potentials.

Host-side (numpy); ott-jax and the ascent of ``fit_semidiscrete`` run under JAX. ``fmjax.couplings`` pairs examples with
these plans.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.checks import Positive, PositiveFloat, Range, check_range
from fmjax.keys import check_key
from fmjax.types import Cond


def squared_cost(
    x0: Float[np.ndarray, "n ..."],
    x1: Float[np.ndarray, "m ..."],
    *,
    centred: bool = False,
    names: tuple[str, str] = ("x0", "x1"),
) -> Float[np.ndarray, "n m"]:
    """Return the matrix of squared Euclidean distances ``|x0_i - x1_j|^2`` between flattened examples.

    Args:
        x0: examples ``[n, ...]``.
        x1: examples ``[m, ...]``.
        centred: subtract the mean of each side first. This adds a constant to every row and to every column of the
            matrix, which changes no optimal plan, and keeps the digits of the differences for data far from zero.
        names: names of both sides, for the message.

    Returns:
        Costs ``[n, m]``, in the precision of the examples.

    Raises:
        ValueError: a cost is not finite; the message names the side and the example.

    >>> squared_cost(np.zeros((1, 2)), np.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
    [[25.0, 1.0]]
    """
    a, b = x0.reshape(len(x0), -1), x1.reshape(len(x1), -1)
    if centred:
        a, b = a - a.mean(0), b - b.mean(0)
    cost = np.einsum("nd,nd->n", a, a)[:, None] + np.einsum("md,md->m", b, b)[None] - 2 * (a @ b.T)
    if not np.isfinite(cost).all():
        for name, x in zip(names, (x0, x1), strict=True):
            rows = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))
            if len(rows):
                raise ValueError(
                    f"{name}[{rows[0]}]: has NaN or infinity, as {len(rows)} example(s) in all. Give finite examples."
                )
        raise ValueError(f"cost={cost.dtype} infinity: the squared distances overflow. Scale the data.")
    return np.maximum(cost, 0)


def assignment(cost: Float[np.ndarray, "b b"]) -> np.ndarray:
    """Return the exact assignment: the sources that minimise ``sum_j cost[source[j], j]``.

    Args:
        cost: costs of sources (rows) and targets (columns), ``[B, B]``.

    Returns:
        The index of the source of every target, ``[B]``.

    >>> assignment(np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [1, 0]
    """
    from scipy.optimize import linear_sum_assignment

    # A constant added to a row or a column moves no optimum. Centred costs are a good start for the dual variables of
    # scipy's shortest augmenting paths: up to four times as fast in high dimension.
    cost = cost.astype(np.float64)
    rows, columns = linear_sum_assignment(cost - cost.mean(0) - cost.mean(1, keepdims=True))
    return rows[np.argsort(columns)]


def sinkhorn_plan(
    cost: Float[np.ndarray, "n m"],
    *,
    epsilon: PositiveFloat = 0.05,
    absolute: bool = False,
    max_iterations: Positive = 2000,
) -> Float[np.ndarray, "n m"]:
    """Return the entropic plan ``argmin_P <P, cost> - eps H(P)`` with uniform marginals.

    Log-domain Sinkhorn of ott-jax (arXiv 2201.12324) on a CPU device. The marginal of the columns (targets) is exact,
    the marginal of the rows is met up to a total error of 1e-3.

    Args:
        cost: costs ``[n, m]``. A pair of infinite cost gets no mass and no part in the standard deviation.
        epsilon: ``eps`` in units of the standard deviation of the costs; of 1 where the costs are constant.
        absolute: take ``eps = epsilon``, in units of the cost.
        max_iterations: number of iterations after which the solver gives up.

    Returns:
        The plan ``[n, m]``, of total mass one, float64.

    Raises:
        RuntimeError: the solver did not converge in ``max_iterations``.

    >>> sinkhorn_plan(np.ones((1, 2), np.float32)).tolist()
    [[0.5, 0.5]]
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plan, converged = _sinkhorn(cost, epsilon=epsilon, absolute=absolute, max_iterations=max_iterations)
    if not bool(converged):
        raise RuntimeError(
            f"max_iterations={max_iterations}: Sinkhorn did not converge at epsilon={epsilon}. "
            "Raise either, or use method='exact'."
        )
    plan = np.asarray(plan, np.float64)
    return plan / (plan.sum(0) * plan.shape[1])  # the solver stops with single columns off by a few per cent


def sinkhorn(cost: Array, *, eps: float | Array, max_iterations: int = 2000):
    """Solve entropic optimal transport with uniform marginals by ott-jax; traceable.

    Args:
        cost: costs ``[n, m]``.
        eps: strength of the entropy, in units of the cost.
        max_iterations: number of iterations after which the solver gives up.

    Returns:
        The ``SinkhornOutput`` of ott-jax, with ``matrix: [n, m]`` and ``converged``.

    >>> sinkhorn(jnp.zeros((2, 2)), eps=1.0).matrix.tolist()
    [[0.25, 0.25], [0.25, 0.25]]
    """
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as solver

    problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=eps))
    return solver.Sinkhorn(max_iterations=max_iterations)(problem)


@functools.partial(jax.jit, static_argnames=("epsilon", "absolute", "max_iterations"))
def _sinkhorn(cost, *, epsilon, absolute, max_iterations):
    finite = jnp.isfinite(cost)
    spread = cost.std(where=finite)
    # a spread of the size of the rounding errors distinguishes no pairs
    rounding = 8 * jnp.finfo(cost.dtype).eps * jnp.abs(cost).max(where=finite, initial=0.0)
    unit = 1.0 if absolute else jnp.where(spread > rounding, spread, 1.0)
    lowest = jnp.min(cost, where=finite, initial=jnp.inf)  # a constant changes no plan, and costs digits
    out = sinkhorn(cost - lowest, eps=epsilon * unit, max_iterations=max_iterations)
    return out.matrix, out.converged


def fit_semidiscrete(
    key,
    x1: Float[np.ndarray, "n ..."],
    cond: Cond = None,
    weights: Float[np.ndarray, " m"] | None = None,
    *,
    by_class: bool = False,
    draws: Positive = 500,
    batch_size: Positive = 1024,
    rate: PositiveFloat = 0.1,
) -> Float[Array, " n"]:
    """Fit the dual potentials of optimal transport from N(0, I) to a data set (arXiv 2509.25519).

    The potentials ``g`` maximise the semidual ``sum_j b_j g_j - E_x max_j (<x, y_j> - |y_j|^2 / 2 + g_j)`` with the
    weights ``b``, by stochastic gradient ascent (1605.08527). Step sizes fall as ``rate / sqrt(1 + 20 k / steps)``, in
    units of the spread of the data and of ``1 / b_j`` (at most ``batch_size``); the result is the mean of the later
    half of the iterates.

    The remaining error ``n P(j* = j) - 1`` of the fractions of the targets has a root mean square within a tenth of
    ``sqrt(2 / draws)``, 6 % for the default: measured on 1437 digits and 3000 MNIST images with ``draws`` from 50 to
    360. A rate of a third or of three times as much changed little, except that 50 draws are too few for 0.03. The
    default takes 4.4 s for the digits (n = 1437, d = 64, 702 steps) and 3.3 s per step of its 29,297 steps, 27 hours,
    for MNIST (n = 60000, d = 784), on 2 busy CPU cores. The time grows as ``n^2 d draws``: fit large sets on an
    accelerator, once.

    Args:
        key: one key.
        x1: the data set ``[n, ...]``.
        cond: conditions of the data, leaves ``[n, ...]``.
        weights: weights of the examples ``[n]``, positive; ``None``: uniform.
        by_class: solve one problem per class (integer leaves of ``cond``), all in one ascent.
        draws: samples of ``x`` per example of the data set.
        batch_size: samples of ``x`` per step.
        rate: size of the first step.

    Returns:
        The potentials ``[n]``, for ``couplings.semidiscrete``.

    Raises:
        TypeError: ``key`` is not one typed key.
        ValueError: an option outside its range, or weights that are not positive.

    >>> g = fit_semidiscrete(jax.random.key(0), np.array([[-1.0], [1.0]], np.float32), draws=8, batch_size=4)
    >>> g.shape
    (2,)
    """
    check_key(key)
    if key.ndim:
        raise TypeError(f"key.shape={key.shape}: not one typed PRNG key. Give jax.random.key(seed).")
    check_range("draws", draws, Range(1))
    check_range("batch_size", batch_size, Range(1))
    check_range("rate", rate, Range(0, open_low=True))
    n = len(x1)
    check_leading(cond, n)
    b = np.full(n, 1 / n) if weights is None else np.asarray(weights, np.float64)
    if b.shape != (n,) or not (b > 0).all() or not np.isfinite(b).all():
        raise ValueError(f"weights of shape {b.shape}: not {n} positive numbers. Give one weight per example.")
    y = jnp.asarray(np.reshape(x1, (n, -1)))
    b = jnp.asarray(b / b.sum(), y.dtype)
    member = jnp.asarray(class_index(cond)) if by_class else None
    return _ascend(key, y, b, member, rate, steps=-(-draws * n // batch_size), batch_size=batch_size)


@functools.partial(jax.jit, static_argnames=("steps", "batch_size"))
def _ascend(key, y, b, member, rate, *, steps, batch_size):
    n, d = y.shape
    centred = y - b @ y  # the same maximiser for every x, and the potentials start near their values
    spread = jnp.sqrt(b @ jnp.square(centred).sum(1))

    def semidual(h, key):
        k_x, k_class = jax.random.split(key)
        x = jax.random.normal(k_x, (batch_size, d), y.dtype)
        scores = jnp.matmul(x, centred.T, precision="highest") + h
        if member is not None:
            own = member[jax.random.choice(k_class, n, (batch_size,), p=b)]
            scores = jnp.where(own[:, None] == member, scores, -jnp.inf)
        return b @ h - scores.max(1).mean()

    def step(carry, k):
        h, mean, late = carry
        size = rate * spread / jnp.sqrt(1 + 20 * k / steps) * jnp.minimum(batch_size, 1 / b)
        h = h + size.astype(h.dtype) * jax.grad(semidual)(h, jax.random.fold_in(key, k))
        late = late + (k >= steps // 2)
        return (h, jnp.where(late > 0, mean + (h - mean) / jnp.maximum(late, 1), mean), late), None

    start = jnp.zeros(n, y.dtype)
    (_, mean, _), _ = jax.lax.scan(step, (start, start, jnp.zeros((), y.dtype)), jnp.arange(steps))
    return mean + jnp.square(y).sum(1) / 2


def class_index(cond: Cond) -> np.ndarray:
    """Return the class of every example: examples are of one class where all integer leaves of ``cond`` are equal.

    Args:
        cond: conditions, leaves ``[B, ...]``; boolean leaves count as integers, floating leaves are ignored.

    Returns:
        Integers ``[B]``, from 0 in the order of the labels.

    Raises:
        ValueError: ``cond`` has no integer leaf.

    >>> class_index({"label": np.array([7, 3, 7])}).tolist()
    [1, 0, 1]
    """
    needed = "by_class=True: needs an integer leaf in cond. For floats use condition_weight."
    table = leaves_of(cond, kind="integer", otherwise=needed)
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)  # numpy 2.0 gives [B, 1]


def leaves_of(cond: Cond, *, kind: str, otherwise: str) -> np.ndarray:
    """Return the integer or the floating leaves of a condition, side by side.

    Args:
        cond: conditions, leaves ``[B, ...]``.
        kind: ``"integer"`` (with booleans) or ``"floating"``.
        otherwise: the message where ``cond`` has no such leaf.

    Returns:
        A table ``[B, k]``, int64 or float64.

    Raises:
        ValueError: ``cond`` has no leaf of this kind.

    >>> leaves_of((np.array([1, 2]), np.zeros(2)), kind="integer", otherwise="no labels").tolist()
    [[1], [2]]
    """
    kinds, dtype = ((jnp.floating,), np.float64) if kind == "floating" else ((jnp.integer, jnp.bool_), np.int64)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(cond)]
    matches = [leaf for leaf in leaves if any(jnp.issubdtype(leaf.dtype, k) for k in kinds)]
    if not matches:
        raise ValueError(f"{otherwise} (The types of its leaves: {[str(leaf.dtype) for leaf in leaves]}.)")
    return np.concatenate([leaf.reshape(len(leaf), -1).astype(dtype) for leaf in matches], 1)


def check_leading(cond: Cond, size: int) -> None:
    """Refuse conditions whose leaves do not have one entry per example.

    Args:
        cond: conditions, a pytree of arrays.
        size: number of examples.

    Raises:
        ValueError: a leaf has another leading size.

    >>> check_leading({"label": np.zeros(4)}, 4)
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(cond)}
    if sizes - {(size,)}:
        raise ValueError(f"cond of leading sizes {sorted(sizes)}: not [B, ...] with B={size}. Give one per example.")
