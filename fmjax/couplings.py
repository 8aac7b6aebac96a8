"""Couplings: how source and target samples are paired before the interpolant is drawn. Host-side (numpy).

A coupling is a function ``(rng, x0, x1, cond) -> (x0, x1, cond)`` for the input pipeline: it rearranges a batch of
sources ``x0`` and targets ``x1`` that were drawn independently. The condition (a label, a pytree of arrays
``[B, ...]``) belongs to ``x1`` and follows it. Both marginals are kept, exactly (without replacement) or in
distribution (with replacement), so that flow matching stays valid for every coupling. The distribution of ``x0``
*given the condition* can change: see ``minibatch_ot``. Fixed pairs (reflow) need no coupling but
``data.batches(x, source=x0)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float

from fmjax import transport
from fmjax.checks import NonNegativeFloat, Positive, PositiveFloat, Range, check_choice, check_range
from fmjax.types import Cond

Coupling = Callable[[np.random.Generator, np.ndarray, np.ndarray, Cond], tuple[np.ndarray, np.ndarray, Cond]]

METHODS = ("exact", "sinkhorn")

UNCONDITIONAL = (
    "cond of {}: the pairing ignores it, so that x0 given the condition is not N(0, I), from which a sampler starts "
    "(arXiv 2503.10636). Set by_class=True for labels{}, or by_class=False if the model ignores the condition."
)


def independent() -> Coupling:
    """Return the product coupling: every ``x0`` keeps the ``x1`` beside it (I-CFM, arXiv 2302.00482).

    Returns:
        The coupling, which changes nothing.

    >>> x0, x1, _ = independent()(np.random.default_rng(0), np.zeros((2, 1)), np.ones((2, 1)))
    >>> x0.tolist(), x1.tolist()
    ([[0.0], [0.0]], [[1.0], [1.0]])
    """

    def couple(rng: np.random.Generator, x0: np.ndarray, x1: np.ndarray, cond: Cond = None):
        _check_batch(x0, x1, cond)
        return x0, x1, cond

    return couple


def minibatch_ot(
    *,
    method: str = "exact",
    replacement: bool = False,
    epsilon: PositiveFloat = 0.05,
    absolute: bool = False,
    max_iterations: Positive = 2000,
    by_class: bool | None = None,
    condition_weight: NonNegativeFloat = 0.0,
) -> Coupling:
    """Pair every batch by optimal transport of the squared Euclidean distance (OT-CFM, arXiv 2302.00482, 2304.14772).

    ``min_P sum_ij P_ij |x0_i - x1_j|^2`` over plans with uniform marginals ``1/B``, on flattened ``[B, ...]`` examples.
    The means of ``x0`` and of ``x1`` are subtracted first, which changes no optimal plan.

    **Conditions.** A sampler draws ``x0 ~ N(0, I)`` whatever the condition. OT that ignores the condition trains on
    another distribution: targets of a class take the noise on their side of space, and a conditional model meets noise
    at sampling that it did not see in training (arXiv 2503.10636; in one dimension and for two distant classes, each
    class sees one half of the Gaussian). A batch with a condition therefore raises a ``UserWarning``, once per
    coupling, unless ``by_class`` or ``condition_weight`` is set.

    Cost of one batch in ms; in brackets the excess of the transport cost over exact and the fraction of the exact gain
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
    training step in the thread of the input pipeline; ``optax.assignment`` inside the step is 4 to 8 times slower and
    is not offered.

    Args:
        method: ``"exact"``, or ``"sinkhorn"``, the entropic plan of ott-jax, which needs ``replacement=True``: it is no
            permutation, and its most likely permutation is again the exact one.
        replacement: ``False``: the permutation of ``x0`` that attains the minimum; ``x1`` and ``cond`` stay in place.
            ``True``: ``B`` index pairs drawn independently from the plan, as torchcfm does; examples repeat and vanish
            within a batch.
        epsilon: strength of the entropy, in units of the standard deviation of the centred costs. (The mean is not a
            good unit: in high dimension all costs lie near their mean, and a fraction of the mean exceeds their
            differences.)
        absolute: take ``epsilon`` in units of the cost; [SF]2M with the bridge of diffusion ``sigma`` has
            ``2 sigma^2``.
        max_iterations: iterations after which Sinkhorn gives up.
        by_class: ``True``: an ``x0`` only goes to an ``x1`` of the class of the ``x1`` beside it (all integer leaves of
            the condition equal): OT within each class. ``x0`` given the class stays N(0, I) exactly, and the gain is
            the gain of OT of ``B / classes`` examples. ``False``: plain OT, for a model that ignores the condition.
        condition_weight: for floating conditions: adds ``w |c_i - c_j|^2`` to the cost, with ``c_i`` the condition
            beside ``x0_i``; in squared units of data per squared unit of condition. A compromise where no two
            conditions are equal: 0 is plain OT, infinity the independent coupling, and the bias of ``x0`` given the
            condition lies between. (The paper takes a cosine distance and tunes ``w`` to a fraction of partners.) With
            ``by_class=True``: classes by the integer leaves, weight by the floating leaves.

    Returns:
        The coupling.

    Raises:
        ValueError: an option outside its range. The coupling raises it for batches of unequal shape, examples that are
            not finite, and a condition without the leaves that the options need.
        RuntimeError: raised by the coupling where Sinkhorn did not converge.

    >>> x0, x1 = np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])
    >>> minibatch_ot()(np.random.default_rng(0), x0, x1)[0].tolist()
    [[0.0], [1.0]]
    """
    check_choice("method", method, METHODS)
    if method == "sinkhorn" and not replacement:
        raise ValueError(
            "method='sinkhorn': its plan is no permutation. Set replacement=True to draw pairs, or method='exact'."
        )
    check_range("epsilon", epsilon, Range(0, open_low=True))
    check_range("max_iterations", max_iterations, Range(1))
    if condition_weight == np.inf:
        raise ValueError("condition_weight=inf: is the coupling within classes. Set by_class=True.")
    check_range("condition_weight", condition_weight, Range(0))
    warned = by_class is not None or condition_weight > 0

    def couple(rng: np.random.Generator, x0: np.ndarray, x1: np.ndarray, cond: Cond = None):
        nonlocal warned
        _check_batch(x0, x1, cond)
        if cond is not None and not warned:
            warned = True
            warnings.warn(
                UNCONDITIONAL.format("minibatch_ot", ", condition_weight for continuous conditions"), stacklevel=2
            )
        cost = transport.squared_cost(x0, x1, centred=True)
        if condition_weight:
            needed = f"condition_weight={condition_weight}: needs a floating leaf in cond. Use by_class for labels."
            c = transport.leaves_of(cond, kind="floating", otherwise=needed)
            cost = cost + condition_weight * transport.squared_cost(c, c, names=("cond", "cond"))
        groups = _groups(cond) if by_class else [np.arange(len(x1))]
        if method == "sinkhorn":
            cost = _within(groups, cost)
            plan = transport.sinkhorn_plan(cost, epsilon=epsilon, absolute=absolute, max_iterations=max_iterations)
            return _draw_pairs(rng, plan, x0, x1, cond)
        source = np.empty(len(x1), int)
        for group in groups:
            source[group] = group[transport.assignment(cost[np.ix_(group, group)])]
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
    """Pair fresh noise with the whole data set by its optimal transport map (arXiv 2509.25519).

    ``x0 -> y_{j*}``, ``j* = argmax_j <x0, y_j> - |y_j|^2 / 2 + g_j`` with ``g = transport.fit_semidiscrete(key, x1)``:
    the map that carries N(0, I) to the uniform distribution on ``x1`` at the least mean squared distance, below the
    distance of every minibatch coupling.

    Of a batch only ``x0`` is used. Targets (and their rows of ``cond``) come from ``x1``, drawn with replacement and
    uniform as far as ``g`` has converged; they do not follow the order of the epochs. A batch that is not from ``x1``
    is refused: for mirrored images (``flip=True``) pass ``np.concatenate([x, x[:, :, ::-1]])`` here and to
    ``fit_semidiscrete``.

    A batch of 128 takes 0.3 to 0.5 ms for n = 1437, d = 64 and 0.22 to 0.39 s for n = 60000, d = 784 (12 GFLOP, in
    proportion to ``n d``), on the host: the best calls of three runs on 2 busy CPU cores.

    Args:
        x1: the data set ``[n, ...]``.
        potentials: the potentials ``g`` of ``transport.fit_semidiscrete``, ``[n]``.
        cond: conditions of the data, leaves ``[n, ...]``.
        by_class: as in ``minibatch_ot``: with ``True`` noise beside an example goes to an example of its class, and the
            potentials must be fitted with ``by_class=True``.

    Returns:
        The coupling.

    Raises:
        ValueError: shapes that do not match. The coupling raises it for a batch that is not from ``x1``.

    >>> couple = semidiscrete(np.array([[-1.0], [1.0]]), np.zeros(2))
    >>> couple(np.random.default_rng(0), np.array([[0.3], [-2.0]]), np.array([[1.0], [1.0]]))[1].tolist()
    [[1.0], [-1.0]]
    """
    flat, n = x1.reshape(len(x1), -1), len(x1)
    bias = np.asarray(potentials, np.float64)
    if bias.shape != (n,):
        raise ValueError(f"potentials.shape={bias.shape}: not one per example of x1. Give shape ({n},).")
    bias = (bias - np.einsum("nd,nd->n", flat, flat, dtype=np.float64) / 2).astype(flat.dtype)
    transport.check_leading(cond, n)
    if cond is not None and by_class is None:
        warnings.warn(UNCONDITIONAL.format("semidiscrete", ""), stacklevel=2)
    member = transport.class_index(cond) if by_class else np.zeros(n, int)
    rows_of = {}
    for row, example in enumerate(flat):
        rows_of.setdefault(hash(example.tobytes()), row)

    def couple(rng: np.random.Generator, x0: np.ndarray, batch_x1: np.ndarray, batch_cond: Cond = None):
        _check_batch(x0, batch_x1, batch_cond)
        rows = np.array([rows_of.get(hash(example.tobytes()), -1) for example in batch_x1])
        if (rows < 0).any() or (batch_cond is None) != (cond is None):
            what = f"x1[{np.argmin(rows)}]" if (rows < 0).any() else "cond"
            raise ValueError(
                f"{what} of the batch: not from the data set of semidiscrete. Give it the x (flipped too) and y."
            )
        j = np.empty(len(x0), int)
        for c in np.unique(member[rows]):
            mine, atoms = np.flatnonzero(member[rows] == c), np.flatnonzero(member == c)
            pool = flat if len(atoms) == n else flat[atoms]
            j[mine] = atoms[np.argmax(x0[mine].reshape(len(mine), -1) @ pool.T + bias[atoms], 1)]
        return x0, x1[j], _take(cond, j)

    return couple


def _groups(cond: Cond) -> list[np.ndarray]:
    """Return the rows of every class."""
    member = transport.class_index(cond)
    return [np.flatnonzero(member == c) for c in range(member.max() + 1)]


def _within(groups: list[np.ndarray], cost: np.ndarray) -> np.ndarray:
    """Return the costs with infinity between rows and columns of different groups."""
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
        raise ValueError(f"x0.shape={x0.shape}: not the shape {x1.shape} of x1. Give one shape [B, ...] to both.")
    transport.check_leading(cond, len(x1))
