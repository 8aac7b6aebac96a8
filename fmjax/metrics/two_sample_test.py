"""The classifier two-sample test: how well a small network, trained for the purpose, separates two sets of samples."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from fmjax.checks import Positive, PositiveFloat, check_hints
from fmjax.keys import from_seed, generator
from fmjax.metrics import checking, classifier

LEAST = 100  # samples of each set, of which half are held out


class TwoSampleTest(NamedTuple):
    """The result of a classifier two-sample test on held-out samples.

    Attributes:
        accuracy: the balanced accuracy; 0.5 for equal distributions.
        auc: the area under the ROC curve; 0.5 for equal distributions.
        p_value: the probability of so many right answers or more under equal distributions (binomial).
        count: the number of held-out samples of each set.
    """

    accuracy: float
    auc: float
    p_value: float
    count: int


def c2st(
    x: Num[np.ndarray | jax.Array, "n ..."],
    y: Num[np.ndarray | jax.Array, "m ..."],
    *,
    steps: Positive = 600,
    width: Positive = 64,
    batch: Positive = 512,
    learning_rate: PositiveFloat = 3e-3,
    seed: int = 0,
) -> TwoSampleTest:
    """Train a classifier on half of two sets of samples, and test it on the other half (arXiv 1610.06545).

    The classifier is a network of two hidden layers on flattened samples in units of their standard deviation. Half of
    its first layer is a sine of random frequencies, which sees fine structure. A large set is cut at random to the size
    of the smaller. Give features in place of images.

    Args:
        x: samples ``[n, ...]``, at least 100.
        y: samples ``[m, ...]``, at least 100.
        steps: the number of training steps (Adam).
        width: the number of hidden units in a layer.
        batch: the number of samples of each set in a step.
        learning_rate: the step size of Adam, which falls to 0 as a cosine.
        seed: the seed of the halves, the weights and the batches.

    Returns:
        Accuracy, AUC, p-value and the number of held-out samples.

    Raises:
        ValueError: for fewer samples, and for samples of different shapes.

    >>> x = np.random.default_rng(0).standard_normal((200, 2))
    >>> c2st(x, x + 9, steps=40).accuracy
    1.0
    """
    from scipy.stats import binom

    check_hints(c2st, {"steps": steps, "width": width, "batch": batch, "learning_rate": learning_rate})
    x, y = checking.pair(x, y)
    count = min(len(x), len(y))
    if count < LEAST:
        raise ValueError(f"x=[{len(x)}]: a classifier is trained on {LEAST} samples of both sets or more. Draw more.")
    rng = generator(seed)
    x, y = (a[rng.permutation(len(a))[:count]].reshape(count, -1) for a in (x, y))
    half = count // 2
    train = np.concatenate([x[:half], y[:half]])
    centre, scale = train.mean(0), train.std(0)
    unit = lambda a: ((a - centre) / np.where(scale > 0, scale, 1)).astype(np.float32)
    fit = _fit(steps, width, min(batch, half), float(learning_rate))
    params = fit(from_seed(seed), unit(x[:half]), unit(y[:half]))
    positive, negative = (np.asarray(_logit(params, unit(a[half:])), np.float64) for a in (x, y))
    right, held = int((positive > 0).sum() + (negative < 0).sum()), count - half
    return TwoSampleTest(
        classifier.accuracy(positive, negative),
        classifier.auc(positive, negative),
        float(binom.sf(right - 1, 2 * held, 0.5)),
        held,
    )


@jax.jit
def _logit(params: dict, x):
    dot = functools.partial(jnp.dot, precision="highest")
    z = dot(x, params["w0"]) + params["b0"]
    fine, coarse = jnp.split(z, 2, axis=-1)
    h = jnp.concatenate([jnp.sin(4 * fine), jnp.tanh(coarse)], -1)
    h = jnp.tanh(dot(h, params["w1"]) + params["b1"])
    return dot(h, params["w2"])[:, 0] + params["b2"]


@functools.cache
def _fit(steps: int, width: int, batch: int, learning_rate: float):
    """Return ``fit(key, x, y)``, one compiled program for all tests of a size."""
    import optax

    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def init(key, d):
        keys, width_ = jax.random.split(key, 3), 2 * -(-width // 2)
        normal = lambda k, shape: jax.random.normal(k, shape) / np.sqrt(shape[0])
        weights = [normal(k, s) for k, s in zip(keys, ((d, width_), (width_, width_), (width_, 1)), strict=True)]
        biases = [jnp.zeros(width_), jnp.zeros(width_), jnp.zeros(())]
        return {f"{n}{i}": a for n, arrays in (("w", weights), ("b", biases)) for i, a in enumerate(arrays)}

    def loss(params, x, y):
        return (jax.nn.softplus(-_logit(params, x)) + jax.nn.softplus(_logit(params, y))).mean()

    @jax.jit
    def fit(key, x, y):
        k_init, k_steps = jax.random.split(key)
        params = init(k_init, x.shape[1])

        def step(carry, key):
            params, state = carry
            k_x, k_y = jax.random.split(key)
            rows = lambda k, a: a[jax.random.randint(k, (batch,), 0, len(a))]
            updates, state = tx.update(jax.grad(loss)(params, rows(k_x, x), rows(k_y, y)), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(k_steps, steps))
        return params

    return fit
