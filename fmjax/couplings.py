"""Couplings: who is paired with whom before the interpolant is drawn. Host-side (numpy), for the input pipeline.

A coupling rearranges a batch of sources ``x0`` and targets ``x1`` that were drawn independently; the condition (a
label, a pytree of arrays ``[B, ...]``) belongs to ``x1`` and follows it. Both marginals are kept exactly (without
replacement) or in law (with replacement), so flow matching stays valid whatever the coupling. The law of ``x0`` *given
the condition* is another matter: see ``minibatch_ot``. Pairs given once and for all (reflow) need no coupling but
``arrays.batches(x, source=x0)``.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fmjax.types import Cond

Coupling = Callable[[np.random.Generator, np.ndarray, np.ndarray, Cond], tuple[np.ndarray, np.ndarray, Cond]]

METHODS = ("exact", "sinkhorn")

UNCONDITIONAL = (
    "minibatch_ot is given a condition and does not look at it: x0 given the condition is then not N(0, I), which is "
    "what a sampler starts from (arXiv 2503.10636). Set by_class=True for labels, condition_weight for continuous "
    "conditions, or by_class=False if the model does not use the condition"
)


def independent() -> Coupling:
    """The product coupling: every ``x0`` stays with the ``x1`` it was drawn beside (I-CFM, arXiv 2302.00482)."""

    def couple(rng: np.random.Generator, x0: np.ndarray, x1: np.ndarray, cond: Cond = None):
        _check_batch(x0, x1, cond)
        return x0, x1, cond

    return couple


def minibatch_ot(
    *,
    method: str = "exact",
    replacement: bool = False,
    epsilon: float = 0.05,
    max_iterations: int = 2000,
    by_class: bool | None = None,
    condition_weight: float = 0.0,
) -> Coupling:
    """Pairs a batch by optimal transport of the squared Euclidean distance (OT-CFM, arXiv 2302.00482, 2304.14772).

    ``min_P sum_ij P_ij |x0_i - x1_j|^2`` over plans with uniform marginals ``1/B``, on flattened ``[B, ...]`` examples.

    * ``replacement=False``: the permutation of ``x0`` that attains the minimum; ``x1`` and ``cond`` stay in place.
      Exact only: a Sinkhorn plan is no permutation, and its most likely permutation is again the exact one.
    * ``replacement=True``: ``B`` index pairs drawn independently from the flattened plan, as torchcfm does; examples
      repeat and vanish within a batch.
    * ``method="sinkhorn"``: entropic plan by ott-jax, ``epsilon`` in units of the standard deviation of the cost. (The
      mean is no scale for it: in high dimension all costs lie near their mean, and a fraction of it is larger than all
      that tells them apart.)

    **Conditions.** A sampler draws ``x0 ~ N(0, I)`` whatever the condition. OT that does not look at it teaches another
    law: targets of a class take the noise on their side of space, and a conditional model meets at sampling what it
    never saw (arXiv 2503.10636; in one dimension and for two distant classes, each only sees one half of the Gaussian).
    So a batch with a condition raises a ``UserWarning``, once a coupling, unless one of these is given:

    * ``by_class=True``: an ``x0`` only goes to an ``x1`` of the class of the one it was drawn beside, that is where all
      integer leaves of the condition are equal: OT within each class, and ``x0`` given the class stays N(0, I) exactly.
      It gains what OT of ``B / classes`` examples gains. Floating leaves are not looked at.
    * ``condition_weight=w > 0``, for floating leaves: ``w |c_i - c_j|^2`` is added to the cost, ``c_i`` being the
      condition that ``x0_i`` was drawn beside. A compromise for conditions of which no two are equal: ``w = 0`` is
      plain OT, ``w -> infinity`` the independent coupling, and the bias of ``x0`` given ``c`` falls in between. The
      unit of ``w`` is squared data per squared condition; the paper takes a cosine distance and seeks the ``w`` that
      leaves a wanted share of partners. Both options together: classes by the integer leaves, weight by the floating.
    * ``by_class=False``: plain OT, knowingly. Right where the model does not use the condition.

    Cost of one batch in ms, in brackets the excess of the transport cost over exact and the share of the exact gain
    over random pairing (``python -m launch.bench --suite=couplings``: medians of 15 interleaved repeats on 2 CPU cores,
    jax 0.10.2; N(0, I) against 8x8 digits at d = 64, against random fields with a 1/f spectrum at d = 3072)::

           d     B   scipy, host   POT emd, host   optax, jit   ott 0.05 std, jit      ott 0.05 mean, jit
          64   128      0.7            1.4            3.2         1.5 (0.4 %, 0.98)     0.4 ( 9 %, 0.59)
          64   256      2.9            6.2             15         6.6 (0.6 %, 0.98)     1.3 (10 %, 0.55)
          64   512       16             36             84          10 (0.6 %, 0.98)     2.9 (12 %, 0.54)
        3072   128      1.7            2.7            7.5         2.7 (0.07 %, 0.98)    1.6 (3.0 %, 0.11)
        3072   256      5.3            9.3             40          12 (0.08 %, 0.98)    6.7 (3.4 %, 0.10)
        3072   512       29             43            228          26 (0.08 %, 0.98)     15 (3.7 %, 0.10)

    Hence the default: exact assignment on the host is as fast as an approximation up to B = 512 and runs ahead of the
    step in the input pipeline's thread; ``optax.assignment`` inside the step is 4 to 8 times slower and is not offered.

    Raises ``ValueError`` for an unknown method, sinkhorn without replacement, ``epsilon <= 0``, a negative weight,
    batches of unequal size or shape, examples that are not finite, and a condition without the leaves asked for;
    ``RuntimeError`` where Sinkhorn has not converged.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown method {method!r} of minibatch_ot; choose one of {METHODS}, did you mean {near!r}?")
    if method == "sinkhorn" and not replacement:
        raise ValueError(
            "method='sinkhorn' gives a plan, not a permutation: set replacement=True to draw pairs from it, "
            "or method='exact'"
        )
    if not epsilon > 0 or max_iterations < 1:
        raise ValueError(f"epsilon={epsilon} and max_iterations={max_iterations} must be positive")
    if not 0 <= condition_weight < np.inf:
        raise ValueError(
            f"condition_weight={condition_weight} must be 0 or more and finite; by_class=True is the infinite one"
        )
    conditional, warned = bool(by_class) or condition_weight > 0, False

    def couple(rng: np.random.Generator, x0: np.ndarray, x1: np.ndarray, cond: Cond = None):
        nonlocal warned
        _check_batch(x0, x1, cond)
        if cond is not None and by_class is None and not conditional and not warned:
            warned = True
            warnings.warn(UNCONDITIONAL, stacklevel=2)
        cost = squared_cost(x0, x1)
        if condition_weight:
            needed = "condition_weight > 0 needs a floating leaf in cond; by_class=True is for labels"
            c = leaves_of(cond, kind="floating", otherwise=needed)
            cost = cost + condition_weight * squared_cost(c, c, names=("cond", "cond"))
        groups = classes(cond) if by_class else [np.arange(len(x1))]
        if method == "sinkhorn":
            cost = _within(groups, cost)
            return _draw_pairs(rng, sinkhorn_plan(cost, epsilon=epsilon, max_iterations=max_iterations), x0, x1, cond)
        source = np.empty(len(x1), int)
        for group in groups:
            source[group] = group[assignment(cost[np.ix_(group, group)])]
        if not replacement:
            return x0[source], x1, cond
        # The exact plan puts mass 1/B on each matched pair: a draw from it is a draw of the target's index.
        j = rng.integers(len(x1), size=len(x1))
        return x0[source[j]], x1[j], _take(cond, j)

    return couple


def classes(cond: Cond) -> list[np.ndarray]:
    """The rows of every class: where all integer (and boolean) leaves of ``cond``, ``[B, ...]``, are equal.

    Raises ``ValueError`` where there is no such leaf.
    """
    needed = "by_class=True needs an integer leaf in cond; condition_weight is for floats"
    table = leaves_of(cond, kind="integer", otherwise=needed)
    _, member = np.unique(table, axis=0, return_inverse=True)
    member = member.reshape(-1)  # numpy 2.0 gives [B, 1]
    return [np.flatnonzero(member == c) for c in range(member.max() + 1)]


def leaves_of(cond: Cond, *, kind: str, otherwise: str) -> np.ndarray:
    """The ``"integer"`` (with booleans) or ``"floating"`` leaves of ``cond`` side by side: ``[B, k]``, of 64 bits.

    Raises ``ValueError`` with the sentence ``otherwise`` where there is none.
    """
    kinds, dtype = ((jnp.floating,), np.float64) if kind == "floating" else ((jnp.integer, jnp.bool_), np.int64)
    found = [np.asarray(leaf) for leaf in jax.tree.leaves(cond)]
    wanted = [leaf for leaf in found if any(jnp.issubdtype(leaf.dtype, k) for k in kinds)]
    if not wanted:
        raise ValueError(f"{otherwise} (its leaves are {[str(leaf.dtype) for leaf in found]})")
    return np.concatenate([leaf.reshape(len(leaf), -1).astype(dtype) for leaf in wanted], 1)


def squared_cost(
    x0: Float[np.ndarray, "n ..."], x1: Float[np.ndarray, "m ..."], *, names: tuple[str, str] = ("x0", "x1")
) -> Float[np.ndarray, "n m"]:
    """The matrix ``|x0_i - x1_j|^2`` of flattened examples, in the examples' precision.

    Raises ``ValueError`` where an entry is not finite, naming the side and the example.
    """
    a, b = x0.reshape(len(x0), -1), x1.reshape(len(x1), -1)
    cost = np.einsum("nd,nd->n", a, a)[:, None] + np.einsum("md,md->m", b, b)[None] - 2 * (a @ b.T)
    if not np.isfinite(cost).all():
        side, x = (names[0], a) if not np.isfinite(a).all() else (names[1], b)
        rows = np.flatnonzero(~np.isfinite(x).all(1))
        what = (
            f"{side} has NaN or infinity in {len(rows)} example(s), first at row {rows[0]}"
            if len(rows)
            else (f"the cost overflows {cost.dtype}; scale the data")
        )
        raise ValueError(f"minibatch OT needs finite distances: {what}")
    return np.maximum(cost, 0)


def assignment(cost: Float[np.ndarray, "b b"]) -> np.ndarray:
    """The exact assignment: for every target ``j`` the source, so that ``sum_j cost[source[j], j]`` is least."""
    from scipy.optimize import linear_sum_assignment

    # A constant added to a row or a column moves no optimum. Centred costs are a good start for the dual variables of
    # scipy's shortest augmenting paths: up to four times as fast in high dimension.
    cost = cost.astype(np.float64)
    rows, columns = linear_sum_assignment(cost - cost.mean(0) - cost.mean(1, keepdims=True))
    return rows[np.argsort(columns)]


def sinkhorn_plan(
    cost: Float[np.ndarray, "n m"], *, epsilon: float = 0.05, max_iterations: int = 2000
) -> Float[np.ndarray, "n m"]:
    """The entropic plan ``argmin_P <P, cost> - eps H(P)`` with uniform marginals; ``eps = epsilon * std(cost)``.

    A pair of infinite cost gets no mass and has no part in the standard deviation. Log-domain Sinkhorn of ott-jax
    (arXiv 2201.12324) on a CPU device, normalised to sum one in float64.

    Raises ``RuntimeError`` when ``max_iterations`` pass without convergence.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plan, converged = _sinkhorn(cost, epsilon=epsilon, max_iterations=max_iterations)
    if not bool(converged):
        raise RuntimeError(
            f"Sinkhorn did not converge in max_iterations={max_iterations} at epsilon={epsilon}: "
            "raise either, or use method='exact'"
        )
    plan = np.asarray(plan, np.float64)
    return plan / plan.sum()


def sinkhorn(cost, *, eps, max_iterations: int = 2000):
    """ott-jax's solution for a cost matrix and an absolute ``eps``; traceable."""
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as solver

    problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=eps))
    return solver.Sinkhorn(max_iterations=max_iterations)(problem)


def _sinkhorn_plan(cost, *, epsilon, max_iterations):
    out = sinkhorn(cost, eps=epsilon * cost.std(where=jnp.isfinite(cost)), max_iterations=max_iterations)
    return out.matrix, out.converged


_sinkhorn = jax.jit(_sinkhorn_plan, static_argnames=("epsilon", "max_iterations"))


def _within(groups: list[np.ndarray], cost: np.ndarray) -> np.ndarray:
    """The cost with infinity between rows and columns of different groups."""
    out = np.full_like(cost, np.inf)
    for group in groups:
        out[np.ix_(group, group)] = cost[np.ix_(group, group)]
    return out


def _draw_pairs(rng, plan, x0, x1, cond):
    n, m = plan.shape
    i, j = np.divmod(rng.choice(n * m, size=len(x1), p=plan.ravel()), m)
    return x0[i], x1[j], _take(cond, j)


def _take(cond: Cond, index: np.ndarray) -> Cond:
    return jax.tree.map(lambda leaf: leaf[index], cond)


def _check_batch(x0, x1, cond) -> None:
    if x0.shape != x1.shape:
        raise ValueError(f"x0 {x0.shape} and x1 {x1.shape} must have one shape [B, ...] to be paired")
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(cond)}
    if sizes - {x1.shape[:1]}:
        raise ValueError(f"cond has leaves of leading size {sorted(sizes)}; each must be [B, ...] with B={len(x1)}")
