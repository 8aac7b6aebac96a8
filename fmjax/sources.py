"""Sources: the distribution of ``x0`` at ``t = 0``, from which a flow starts. N(0, I) unless a source is given.

A ``Source`` draws examples from keys, one key per example. Where it has a density, the log-likelihood of a flow is
known; where it is N(0, I), velocities contain scores, and diffusion samplers apply. All other parts of the library
take any source: batches (``data.batches(x, source=...)``), couplings, samplers (``sampling.source_sample``),
likelihood, marginals and reflow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fmjax.checks import Refusal
from fmjax.keys import example_keys, from_seed, normal, per_example

PURPOSE = 6  # separates the keys of training batches from the other keys of a seed


@dataclasses.dataclass(frozen=True)
class Source:
    """A distribution of ``x0``.

    Attributes:
        name: name for messages.
        draw: ``draw(key, shape) -> x0``: from keys ``[B]`` examples ``[B, *shape]``, float32. Example ``i`` depends on
            key ``i`` alone. It is called outside of ``jax.jit``, so that a data set stays on the host.
        log_density: ``log_density(x0) -> [B]`` in nats, traceable; ``None`` for a source without a density.
        shape: the shape of one example; ``None`` for any shape.
        normal: whether the source is N(0, I).
    """

    name: str
    draw: Callable[[Key[Array, " b"], tuple[int, ...]], Any]
    log_density: Callable[[Array], Array] | None = None
    shape: tuple[int, ...] | None = None
    normal: bool = False

    def examples(self, key: Key[Array, " b"], shape: Sequence[int]) -> Float[Array | np.ndarray, "b ..."]:
        """Draw examples and check their shape and type.

        Args:
            key: keys ``[B]``.
            shape: the shape of one example.

        Returns:
            ``x0``, ``[B, *shape]``, float32.

        Raises:
            ValueError: the source draws examples of another shape or type.
        """
        shape = tuple(shape)
        self.check_shape(shape)
        x = self.draw(key, shape)
        if x.shape != (*key.shape, *shape) or x.dtype != jnp.float32:
            wrong = f"drew {x.dtype} {list(x.shape)} from {list(key.shape)} keys, not float32 of examples {list(shape)}"
            raise Refusal("source", self.name, wrong, "Return one example per key from draw(key, shape)")
        return x

    def rows(self, seed: int, step: int, rows: Any, shape: Sequence[int]) -> Float[np.ndarray, "b ..."]:
        """Draw the examples of some rows of a training batch.

        Args:
            seed: seed of the training.
            step: number of the step.
            rows: rows of the global batch, ``[B]``.
            shape: the shape of one example.

        Returns:
            ``x0``, ``[B, *shape]``, float32, in memory.
        """
        key = jax.random.fold_in(jax.random.fold_in(from_seed(seed), PURPOSE), step)
        return np.asarray(self.examples(example_keys(key, jnp.asarray(rows, jnp.int32)), shape))

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse data of another shape.

        Args:
            shape: the shape of one example of the data.

        Raises:
            ValueError: the source has examples of another shape.
        """
        if self.shape is not None and tuple(shape) != tuple(self.shape):
            wrong = f"has examples {list(self.shape)}, and the data have {list(shape)}"
            raise Refusal("source", self.name, wrong, "Take a source of the shape of the data")

    def check_normal(self, what: str, way_out: str) -> None:
        """Refuse a source other than N(0, I), on behalf of what needs N(0, I).

        Args:
            what: what needs the source N(0, I).
            way_out: what to do in place of it, without a full stop.

        Raises:
            ValueError: the source is not N(0, I).

        >>> gaussian_noise().check_normal("DDIM", "Take 'heun'")
        """
        if not self.normal:
            raise Refusal("source", self.name, f"{what} needs the source N(0, I)", way_out)


def gaussian_noise(*, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0) -> Source:
    """Return the Gaussian source ``N(mean, std^2 I)``.

    Args:
        mean: a number, or an array of the shape of an example.
        std: standard deviation, positive: a number, or one for each coordinate.

    Returns:
        The source; ``gaussian_noise()`` is N(0, I).

    Raises:
        ValueError: numbers that are not finite, ``std`` that is not positive, or arrays of different shapes.

    >>> source = gaussian_noise(mean=2.0, std=0.5)
    >>> round(float(source.log_density(jnp.full((1, 1), 2.0))[0]), 4)
    -0.2258
    """
    m, s, shape = _pair("mean", mean, "std", std)
    _check_positive("std", s)
    if not m.any() and (s == 1).all():
        return Source("gaussian_noise", normal, _log_normal, shape, True)
    m32, s32 = np.float32(m), np.float32(s)
    draw = lambda key, shape: m32 + s32 * normal(key, shape)

    def log_density(x):
        return _log_normal((x - m.astype(x.dtype)) / s.astype(x.dtype)) - _total(np.log(s), x)

    return Source("gaussian_noise", _jitted(draw), log_density, shape)


def uniform_noise(*, low: float | Sequence[float] = -1.0, high: float | Sequence[float] = 1.0) -> Source:
    """Return the uniform source on a box.

    Args:
        low: lower bound: a number, or one for each coordinate.
        high: upper bound, above ``low``.

    Returns:
        The source; its log-density is ``-inf`` outside of the box.

    Raises:
        ValueError: bounds that are not finite, do not rise, or have different shapes.

    >>> density = uniform_noise(low=0.0, high=2.0).log_density(jnp.array([[1.0], [3.0]]))
    >>> [round(float(d), 4) for d in density]
    [-0.6931, -inf]
    """
    a, b, shape = _pair("low", low, "high", high)
    if not (a < b).all():
        raise ValueError(f"high={high}: not above low={low}. Give bounds that rise.")
    a32, b32 = np.float32(a), np.float32(b)
    each = lambda k, shape: jax.random.uniform(k, shape, jnp.float32, a32, b32)
    draw = lambda key, shape: per_example(lambda k: each(k, shape), key)

    def log_density(x):
        inside = ((x >= a.astype(x.dtype)) & (x <= b.astype(x.dtype))).reshape(len(x), -1).all(1)
        return jnp.where(inside, -_total(np.log(b - a), x), -jnp.inf)

    return Source("uniform_noise", _jitted(draw), log_density, shape)


def gaussian_mixture(
    *, means: Sequence[Sequence[float]], std: float | Sequence[float] = 1.0, weights: Sequence[float] | None = None
) -> Source:
    """Return a mixture of Gaussians ``sum_k w_k N(mean_k, std_k^2 I)``.

    Args:
        means: the means, ``[K, ...]``, each of the shape of an example.
        std: standard deviation, positive: a number, or one for each Gaussian.
        weights: relative frequencies, positive; by default equal.

    Returns:
        The source.

    Raises:
        ValueError: numbers that are not finite, or numbers of deviations or weights other than ``K``.

    >>> source = gaussian_mixture(means=((-2.0,), (2.0,)), std=0.5)
    >>> source.draw(jax.random.split(jax.random.key(0), 3), (1,)).shape
    (3, 1)
    """
    m = _numbers("means", means)
    if m.ndim < 2 or not len(m):
        raise ValueError(f"means={means}: not means of examples. Give one array per Gaussian: ((-2.0,), (2.0,)).")
    k, shape, per_mean = len(m), m.shape[1:], (-1, *(1,) * (m.ndim - 1))
    s, w = (_numbers(name, value) for name, value in (("std", std), ("weights", 1.0 if weights is None else weights)))
    for name, value in (("std", s), ("weights", w)):
        _check_positive(name, value)
        if value.shape not in ((), (k,)):
            raise ValueError(f"{name}={value.tolist()}: there are {k} means. Give one number for each mean.")
    s, w = (np.broadcast_to(value, (k,)) for value in (s, w))
    log_w, m32, s32 = np.log(w / w.sum()), np.float32(m), np.float32(s)

    def example(key, shape):
        k_mode, k_noise = jax.random.split(key)
        mode = jax.random.categorical(k_mode, np.float32(log_w))
        return jnp.asarray(m32)[mode] + jnp.asarray(s32)[mode] * jax.random.normal(k_noise, shape, jnp.float32)

    def log_density(x):
        z = (x[:, None] - m.astype(x.dtype)) / s.reshape(per_mean).astype(x.dtype)
        height = log_w - math.prod(shape) * np.log(s)
        return jax.nn.logsumexp(jax.vmap(_log_normal)(z) + height.astype(x.dtype), axis=1)

    draw = lambda key, shape: per_example(lambda k: example(k, shape), key)
    return Source("gaussian_mixture", _jitted(draw), log_density, shape)


def rows_of(x: Any, *, name: str = "data") -> Source:
    """Return the source that draws the rows of a data set, each row equally likely, with replacement.

    Args:
        x: examples ``[n, ...]``, floating: an array, or rows on disk (``data.Rows``). They stay on the host.
        name: name for messages.

    Returns:
        The source, without a density.

    Raises:
        ValueError: no rows, or rows that are not floating.

    >>> source = rows_of(np.arange(6, dtype=np.float32).reshape(3, 2))
    >>> source.draw(jax.random.split(jax.random.key(0), 4), (2,)).shape
    (4, 2)
    """
    if not len(x) or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"x={x.dtype} {list(x.shape)}: not floating examples. Give an array [n, ...].")
    n, shape = len(x), tuple(x.shape[1:])
    index = jax.jit(lambda key: per_example(lambda k: jax.random.randint(k, (), 0, n), key))

    def draw(key, shape):
        if isinstance(key, jax.core.Tracer):
            raise TypeError("source: rows of a data set are drawn outside of jax.jit. Pass the examples to it.")
        return np.asarray(x[np.asarray(index(key))], np.float32)

    return Source(name, draw, None, shape)


def _jitted(draw: Callable) -> Callable:
    """Return ``draw(key, shape)``, compiled once per shape."""
    return functools.partial(jax.jit, static_argnums=1)(draw)


def _numbers(name: str, value: Any) -> np.ndarray:
    """Return numbers as a float64 array; refuse others."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = np.array(np.nan)
    if not np.isfinite(array).all():
        raise Refusal(name, value, "not finite numbers of one shape", "Give a number, or an array")
    return array


def _pair(first: str, a: Any, second: str, b: Any) -> tuple[np.ndarray, np.ndarray, tuple[int, ...] | None]:
    """Return two options as arrays, and the shape of an example; ``None`` where both are numbers."""
    a, b = _numbers(first, a), _numbers(second, b)
    if a.ndim and b.ndim and a.shape != b.shape:
        raise ValueError(f"{second}: its shape is {list(b.shape)}, and {first} has {list(a.shape)}. Give one shape.")
    shape = np.broadcast_shapes(a.shape, b.shape)
    return a, b, shape or None


def _check_positive(name: str, value: np.ndarray) -> None:
    if not (value > 0).all():
        raise Refusal(name, value.tolist(), "not positive", "Give positive numbers")


def _total(per_coordinate: Any, x: Array) -> float:
    """Return the sum over the coordinates of one example of ``x``, of numbers that broadcast to the example."""
    return float(np.broadcast_to(per_coordinate, x.shape[1:]).sum())


def _log_normal(z: Array) -> Array:
    """Return ``log N(z; 0, I)`` of examples ``[B, ...]``."""
    return -0.5 * (jnp.square(z) + math.log(2 * math.pi)).reshape(len(z), -1).sum(1)
