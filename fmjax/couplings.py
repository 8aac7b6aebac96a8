"""Couplings: who is paired with whom before the interpolant is drawn. Host-side (numpy), for the input pipeline.

A coupling rearranges a batch of sources ``x0`` and targets ``x1`` that were drawn independently; the condition (a
label, a pytree of arrays ``[B, ...]``) belongs to ``x1`` and follows it. Both marginals are kept exactly (without
replacement) or in law (with replacement), so flow matching stays valid whatever the coupling. The law of ``x0`` *given
the condition* is another matter: see ``minibatch_ot``. Pairs given once and for all (reflow) need no coupling but
``data.batches(x, source=x0)``.
"""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.keys import is_key
from fmjax.types import Cond

Coupling = Callable[[np.random.Generator, np.ndarray, np.ndarray, Cond], tuple[np.ndarray, np.ndarray, Cond]]

METHODS = ("exact", "sinkhorn")

UNCONDITIONAL = (
    "{} is given a condition and does not look at it: x0 given the condition is then not N(0, I), which is what a "
    "sampler starts from (arXiv 2503.10636). Set by_class=True for labels{}, or by_class=False if the model does not "
    "use the condition"
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
    absolute: bool = False,
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
    * ``method="sinkhorn"``: entropic plan by ott-jax, ``epsilon`` in units of the standard deviation of the cost, or of
      the cost itself where ``absolute``: [SF]2M's of the bridge of diffusion ``sigma`` is then ``2 sigma^2``. (The
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
            warnings.warn(
                UNCONDITIONAL.format("minibatch_ot", ", condition_weight for continuous conditions"), stacklevel=2
            )
        cost = squared_cost(x0, x1)
        if condition_weight:
            needed = "condition_weight > 0 needs a floating leaf in cond; by_class=True is for labels"
            c = leaves_of(cond, kind="floating", otherwise=needed)
            cost = cost + condition_weight * squared_cost(c, c, names=("cond", "cond"))
        groups = classes(cond) if by_class else [np.arange(len(x1))]
        if method == "sinkhorn":
            cost = _within(groups, cost)
            plan = sinkhorn_plan(cost, epsilon=epsilon, absolute=absolute, max_iterations=max_iterations)
            return _draw_pairs(rng, plan, x0, x1, cond)
        source = np.empty(len(x1), int)
        for group in groups:
            source[group] = group[assignment(cost[np.ix_(group, group)])]
        if not replacement:
            return x0[source], x1, cond
        # The exact plan puts mass 1/B on each matched pair: a draw from it is a draw of the target's index.
        j = rng.integers(len(x1), size=len(x1))
        return x0[source[j]], x1[j], _take(cond, j)

    return couple


def semidiscrete(
    x1: Float[np.ndarray, "n ..."],
    potentials: Float[Array | np.ndarray, " m"],
    cond: Cond = None,
    *,
    by_class: bool | None = None,
) -> Coupling:
    """Pairs fresh noise with the whole data set ``x1`` by its optimal transport map (arXiv 2509.25519).

    ``x0 -> y_{j*}``, ``j* = argmax_j <x0, y_j> - |y_j|^2 / 2 + g_j`` with ``g = fit_semidiscrete(key, x1)``: the map
    that carries N(0, I) to the uniform law on ``x1`` at the least mean squared distance, which no minibatch attains.

    * Of a batch only ``x0`` is used: targets (and their rows of ``cond``) come from ``x1``, drawn with replacement and
      uniform as far as ``g`` has converged. So they are not in the order of the epochs, and a batch that is not from
      ``x1`` is refused: for mirrored images (``flip=True``) give ``np.concatenate([x, x[:, :, ::-1]])`` here and to
      ``fit_semidiscrete``.
    * ``by_class``: as in ``minibatch_ot``; with ``True`` noise drawn beside an example goes to one of its class, and
      ``g`` must have been fitted so.

    A batch of 128 takes 0.3 to 0.5 ms for n = 1437, d = 64 and 0.22 to 0.39 s for n = 60000, d = 784 (12 GFLOP; in
    proportion to ``n d``), on the host: the best calls of three runs on 2 CPU cores with a load of 7 to 20. Raises
    ``ValueError`` for shapes that do not match.
    """
    flat, n = x1.reshape(len(x1), -1), len(x1)
    bias = np.asarray(potentials, np.float64)
    if bias.shape != (n,):
        raise ValueError(f"potentials have shape {bias.shape}; give one for each of the {n} examples of x1")
    bias = (bias - np.einsum("nd,nd->n", flat, flat, dtype=np.float64) / 2).astype(flat.dtype)
    _check_leading(cond, n)
    if cond is not None and by_class is None:
        warnings.warn(UNCONDITIONAL.format("semidiscrete", ""), stacklevel=2)
    member = _members(cond) if by_class else np.zeros(n, int)
    rows_of = {}
    for row, example in enumerate(flat):
        rows_of.setdefault(hash(example.tobytes()), row)

    def couple(rng: np.random.Generator, x0: np.ndarray, batch_x1: np.ndarray, batch_cond: Cond = None):
        _check_batch(x0, batch_x1, batch_cond)
        rows = np.array([rows_of.get(hash(example.tobytes()), -1) for example in batch_x1])
        if (rows < 0).any() or (batch_cond is None) != (cond is None):
            what = f"row {np.argmin(rows)} of the batch is" if (rows < 0).any() else "the batch's condition is"
            raise ValueError(
                f"{what} not from the data set of semidiscrete: give it the x (flipped too) and y of batches"
            )
        j = np.empty(len(x0), int)
        for c in np.unique(member[rows]):
            mine, atoms = np.flatnonzero(member[rows] == c), np.flatnonzero(member == c)
            pool = flat if len(atoms) == n else flat[atoms]
            j[mine] = atoms[np.argmax(x0[mine].reshape(len(mine), -1) @ pool.T + bias[atoms], 1)]
        return x0, x1[j], _take(cond, j)

    return couple


def fit_semidiscrete(
    key,
    x1: Float[np.ndarray, "n ..."],
    cond: Cond = None,
    weights: Float[np.ndarray, " m"] | None = None,
    *,
    by_class: bool = False,
    draws: int = 500,
    batch_size: int = 1024,
    rate: float = 0.1,
) -> Float[Array, " n"]:
    """The dual potentials ``g`` of optimal transport from N(0, I) to the data set ``x1`` (arXiv 2509.25519).

    They maximise the semidual ``sum_j b_j g_j - E_x max_j (<x, y_j> - |y_j|^2 / 2 + g_j)``, ``b`` the ``weights``
    (uniform), by stochastic gradient ascent (1605.08527) on ``draws`` samples of ``x`` an example, ``batch_size`` a
    step. Steps fall as ``rate / sqrt(1 + 20 k / steps)``, in units of the spread of the data and of ``1 / b_j`` (at
    most ``batch_size``); the result is the mean of the later half.

    What is left is the error of the targets' shares ``n P(j* = j) - 1``: its root mean square was within a tenth of
    ``sqrt(2 / draws)`` for 1437 digits and 3000 MNIST images, ``draws`` from 50 to 360 (6 % for the default); a third
    of the rate or three times as much changed little, but that 50 draws are too few for 0.03. The default takes 4.4 s
    for the digits (n = 1437, d = 64, 702 steps) and 3.3 s a step of its 29,297 steps, 27 hours, for MNIST (n = 60000,
    d = 784), at best on the same busy cores. It grows as ``n^2 d draws``: fit large sets on an accelerator, once.

    ``by_class=True`` solves one problem per class (integer leaves of ``cond``), all in one. Raises ``ValueError`` for
    options out of range and weights that are not positive.
    """
    if not is_key(key) or key.ndim:
        raise TypeError("fit_semidiscrete needs one typed PRNG key: jax.random.key(seed)")
    if draws < 1 or batch_size < 1 or not rate > 0:
        raise ValueError(f"draws={draws}, batch_size={batch_size} and rate={rate} must be positive")
    n = len(x1)
    _check_leading(cond, n)
    b = np.full(n, 1 / n) if weights is None else np.asarray(weights, np.float64)
    if b.shape != (n,) or not (b > 0).all() or not np.isfinite(b).all():
        raise ValueError(f"weights must be {n} positive numbers, one an example")
    y = jnp.asarray(np.reshape(x1, (n, -1)))
    b = jnp.asarray(b / b.sum(), y.dtype)
    member = jnp.asarray(_members(cond)) if by_class else None
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


def classes(cond: Cond) -> list[np.ndarray]:
    """The rows of every class: where all integer (and boolean) leaves of ``cond``, ``[B, ...]``, are equal.

    Raises ``ValueError`` where there is no such leaf.
    """
    member = _members(cond)
    return [np.flatnonzero(member == c) for c in range(member.max() + 1)]


def _members(cond: Cond) -> np.ndarray:
    needed = "by_class=True needs an integer leaf in cond; condition_weight is for floats"
    table = leaves_of(cond, kind="integer", otherwise=needed)
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)  # numpy 2.0 gives [B, 1]


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
    cost: Float[np.ndarray, "n m"], *, epsilon: float = 0.05, absolute: bool = False, max_iterations: int = 2000
) -> Float[np.ndarray, "n m"]:
    """The entropic plan ``argmin_P <P, cost> - eps H(P)`` with uniform marginals; ``eps = epsilon * std(cost)``.

    ``absolute``: ``eps = epsilon``.

    A pair of infinite cost gets no mass and has no part in the standard deviation. Log-domain Sinkhorn of ott-jax
    (arXiv 2201.12324) on a CPU device, normalised to sum one in float64.

    Raises ``RuntimeError`` when ``max_iterations`` pass without convergence.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plan, converged = _sinkhorn(cost, epsilon=epsilon, absolute=absolute, max_iterations=max_iterations)
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


def _sinkhorn_plan(cost, *, epsilon, absolute, max_iterations):
    unit = 1.0 if absolute else cost.std(where=jnp.isfinite(cost))
    out = sinkhorn(cost, eps=epsilon * unit, max_iterations=max_iterations)
    return out.matrix, out.converged


_sinkhorn = jax.jit(_sinkhorn_plan, static_argnames=("epsilon", "absolute", "max_iterations"))


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
    _check_leading(cond, len(x1))


def _check_leading(cond: Cond, size: int) -> None:
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(cond)}
    if sizes - {(size,)}:
        raise ValueError(f"cond has leaves of leading size {sorted(sizes)}; each must be [B, ...] with B={size}")
