"""How well a classifier separates two sets of examples: cross-entropy, AUC and accuracy, along the steps of a flow.

The first set is the positive class (backward marginals, real examples). Both classes have the same weight, whatever
their sizes. Give examples that the classifier was not trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fmjax.metrics import checking
from fmjax.types import Cond, LogitNet, Params

Logits = Float[np.ndarray, " n"]
Others = Float[np.ndarray, " m"]


def bce(positive: Logits, negative: Others) -> tuple[float, float]:
    """Return the balanced cross-entropy ``(E softplus(-f) + E softplus(f)) / 2`` and its standard error.

    A constant logit of zero has ``log 2``; the log-odds of two distributions have ``log 2`` minus the Jensen-Shannon
    divergence of the distributions.

    Args:
        positive: logits ``[n]`` of the positive examples.
        negative: logits ``[m]`` of the negative examples.

    Returns:
        The cross-entropy and its error, in nats.

    >>> round(bce(np.zeros(4), np.zeros(4))[0], 6) == round(float(np.log(2)), 6)
    True
    """
    positive, negative = _pair(positive, negative)
    terms = np.logaddexp(0, -positive), np.logaddexp(0, negative)
    return float(sum(a.mean() for a in terms) / 2), float(np.sqrt(sum(a.var(ddof=1) / len(a) for a in terms)) / 2)


def auc(positive: Logits, negative: Others) -> float:
    """Return ``P(f(positive) > f(negative)) + P(f(positive) = f(negative)) / 2``, by the ranks of all pairs.

    Args:
        positive: logits ``[n]`` of the positive examples.
        negative: logits ``[m]`` of the negative examples.

    Returns:
        The area under the ROC curve, in [0, 1].

    >>> auc(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
    0.875
    """
    positive, negative = _pair(positive, negative)
    below = lambda side: np.searchsorted(np.sort(negative), positive, side).sum()
    return float((below("left") + below("right")) / (2 * len(positive) * len(negative)))


def accuracy(positive: Logits, negative: Others) -> float:
    """Return the balanced accuracy: the mean over both classes of the fraction on the right side of zero.

    Args:
        positive: logits ``[n]`` of the positive examples.
        negative: logits ``[m]`` of the negative examples.

    Returns:
        The accuracy, in [0, 1].

    >>> accuracy(np.array([1.0, -1.0]), np.array([-2.0]))
    0.75
    """
    positive, negative = _pair(positive, negative)
    return float((np.mean(positive > 0) + np.mean(negative < 0)) / 2)


class ByStep(NamedTuple):
    """The numbers of a classifier at each step of a flow, arrays ``[steps]``.

    Attributes:
        ts: the times of the steps.
        bce: the balanced cross-entropy, in nats.
        bce_se: its standard error.
        auc: the area under the ROC curve.
        accuracy: the balanced accuracy.
        robust_accuracy: the balanced accuracy under attack; ``None`` without an attack.
    """

    ts: np.ndarray
    bce: np.ndarray
    bce_se: np.ndarray
    auc: np.ndarray
    accuracy: np.ndarray
    robust_accuracy: np.ndarray | None = None


def by_step(
    net: LogitNet,
    params: Params,
    positive: Float[np.ndarray, "n ..."],
    negative: Float[np.ndarray, "m ..."],
    ts: Float[np.ndarray, " steps"],
    *,
    positive_cond: Cond = None,
    negative_cond: Cond = None,
    attack: Callable | None = None,
    batch: int = 512,
) -> ByStep:
    """Evaluate a classifier on held-out marginals, step by step, on its diagonal ``s = t``.

    For exact inverse marginals the best classifier has equal cross-entropy and AUC at every step.

    Args:
        net: a network with one logit an example.
        params: its parameters.
        positive: marginals ``[n, steps, ...]`` of the positive class.
        negative: marginals ``[m, steps, ...]`` of the negative class.
        ts: the times ``[steps]``.
        positive_cond: conditions ``[n, ...]`` of the positive class, for a network that takes them.
        negative_cond: conditions ``[m, ...]`` of the negative class.
        attack: ``attack(margin, x)`` returns the perturbations under which ``robust_accuracy`` is measured:
            ``functools.partial(attacks.pgd, eps=0.5)``. The other numbers are measured on clean examples.
        batch: the number of examples evaluated at a time.

    Returns:
        The numbers at each step.

    Raises:
        ValueError: if the marginals have another number of steps than ``ts``, conditions another number of examples,
            or a logit is not finite.

    >>> net = lambda params, x, s, t, cond=None, key=None: x
    >>> steps = by_step(net, None, np.ones((3, 2), np.float32), -np.ones((3, 2), np.float32), np.array([0.0, 1.0]))
    >>> steps.accuracy.tolist()
    [1.0, 1.0]
    """
    if not positive.shape[1] == negative.shape[1] == len(ts):
        raise ValueError(
            f"ts=[{len(ts)}]: the marginals are {positive.shape} and {negative.shape}. Give [n, steps, ...]."
        )
    for name, x, cond in (("positive", positive, positive_cond), ("negative", negative, negative_cond)):
        for leaf in jax.tree.leaves(cond):
            if np.shape(leaf)[:1] != (len(x),):
                raise ValueError(f"{name}_cond={np.shape(leaf)}: there are {len(x)} examples. Give one row for each.")
    rows, sides = [], ((positive, positive_cond, 1.0), (negative, negative_cond, -1.0))
    for n, t in enumerate(ts):
        logits = [_logits(net, attack, params, x[:, n], cond, t, y, batch) for x, cond, y in sides]
        (p, robust_p), (q, robust_q) = logits
        rows.append([*bce(p, q), auc(p, q), accuracy(p, q), accuracy(robust_p, robust_q)])
    *clean, robust = np.array(rows).T
    return ByStep(np.asarray(ts), *clean, None if attack is None else robust)


def _pair(positive, negative) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of both classes in float64, after a check: one number each, all finite."""
    pair = [checking.finite_rows(n, a, least=1) for n, a in (("positive", positive), ("negative", negative))]
    for name, logits in zip(("positive", "negative"), pair, strict=True):
        if logits.ndim != 1:
            raise ValueError(f"{name}={logits.shape}: a classifier gives one logit an example. Give logits [n].")
    return tuple(pair)


def _logits(net, attack, params, x, cond: Cond, t, y: float, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of clean and of attacked examples, a batch at a time."""
    padded = np.minimum(np.arange(-(-len(x) // batch) * batch), len(x) - 1)  # one shape, one compilation
    take = lambda rows: (np.asarray(x[rows], np.float32), jax.tree.map(lambda a: np.asarray(a[rows]), cond))
    parts = map(take, padded.reshape(-1, batch))
    logits = [_evaluate(net, attack, params, *part, np.float32(t), np.float32(y)) for part in parts]
    return tuple(np.concatenate(f)[: len(x)] for f in zip(*jax.device_get(logits), strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(net, attack, params, x, cond, t, y):
    t = jnp.full(len(x), t)
    logit = lambda x: net(params, x, t, t, cond)
    f = logit(x)
    return f, f if attack is None else logit(x + attack(lambda x: y * logit(x), x))
