"""How well a classifier tells two sets of examples apart: cross-entropy, AUC and accuracy, along the steps of a flow.

The first set is the positive class (backward marginals, real examples). Classes count alike whatever their sizes. Give
examples that the classifier was not trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fmjax.types import LogitNet, Params

Logits = Float[np.ndarray, " n"]
Others = Float[np.ndarray, " m"]


def bce(positive: Logits, negative: Others) -> tuple[float, float]:
    """The balanced cross-entropy ``(E softplus(-f) + E softplus(f)) / 2`` in nats, and its standard error.

    ``log 2`` for a classifier that knows nothing; the log-odds of two laws give ``log 2`` minus their Jensen-Shannon
    divergence.
    """
    terms = np.logaddexp(0, -np.asarray(positive, np.float64)), np.logaddexp(0, np.asarray(negative, np.float64))
    return float(sum(a.mean() for a in terms) / 2), float(np.sqrt(sum(a.var(ddof=1) / len(a) for a in terms)) / 2)


def auc(positive: Logits, negative: Others) -> float:
    """``P(f(positive) > f(negative)) + P(f(positive) = f(negative)) / 2``, by the ranks of all pairs."""
    below = lambda side: np.searchsorted(np.sort(negative), positive, side).sum()
    return float((below("left") + below("right")) / (2 * len(positive) * len(negative)))


def accuracy(positive: Logits, negative: Others) -> float:
    """The mean of the shares of both classes on their own side of zero."""
    return float((np.mean(np.asarray(positive) > 0) + np.mean(np.asarray(negative) < 0)) / 2)


class ByStep(NamedTuple):
    """What ``by_step`` gives, ``[steps]`` each; ``robust_accuracy`` is ``None`` without an attack."""

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
    attack: Callable | None = None,
    batch: int = 512,
) -> ByStep:
    """The numbers of the classifier ``net``, its diagonal, on held-out marginals ``[examples, steps, ...]``, by step.

    For exact inverse marginals the best classifier has equal cross-entropy and AUC at every step. ``attack(margin, x)``
    gives the perturbations under which ``robust_accuracy`` is taken: ``functools.partial(attacks.pgd, eps=0.5)``. The
    rest is of clean examples. Raises ``ValueError`` where the steps are not as many as the times.
    """
    if not positive.shape[1] == negative.shape[1] == len(ts):
        raise ValueError(
            f"both sets hold examples [n, steps, ...] at {len(ts)} times, got {positive.shape} and {negative.shape}"
        )
    found = []
    for n, t in enumerate(ts):
        told = [_logits(net, attack, params, x[:, n], t, y, batch) for x, y in ((positive, 1.0), (negative, -1.0))]
        (p, robust_p), (q, robust_q) = told
        found.append([*bce(p, q), auc(p, q), accuracy(p, q), accuracy(robust_p, robust_q)])
    *clean, robust = np.array(found).T
    return ByStep(np.asarray(ts), *clean, None if attack is None else robust)


def _logits(net, attack, params, x, t, y: float, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the examples as they are and under attack, a batch at a time."""
    rows = np.minimum(np.arange(-(-len(x) // batch) * batch), len(x) - 1).reshape(
        -1, batch
    )  # one shape: pad, then drop
    told = [_evaluate(net, attack, params, np.asarray(x[i], np.float32), np.float32(t), np.float32(y)) for i in rows]
    return tuple(np.concatenate(f)[: len(x)] for f in zip(*jax.device_get(told), strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(net, attack, params, x, t, y):
    t = jnp.full(len(x), t)
    logit = lambda x: net(params, x, t, t)
    f = logit(x)
    return f, f if attack is None else logit(x + attack(lambda x: y * logit(x), x))
