"""Distributions of training times, drawn example by example: of one time, of the two times of a jump.

A time distribution is a function ``key -> t``: one key gives one time, keys ``[B]`` give times ``[B]``. A distribution
of pairs gives ``(s, t)``, start and end of a jump. The fractions of a jump (``constant_fraction``, ...), written in
``fmjax.fractions``, are available here under the same names. Grids of sampling times are in ``fmjax.sampling``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fmjax.checks import Fraction, Positive, PositiveFloat, Range, check_range
from fmjax.fractions import constant_fraction, ect_fraction, exponential_fraction, level_fraction, sigmoid_fraction
from fmjax.keys import fold_in, per_example

__all__ = [
    "Pair", "TimeDistribution", "constant_fraction", "dyadic", "earlier", "ect_fraction",
    "either_order", "exponential_fraction", "from_source", "gap_pair", "grid_pair", "interior", "level_fraction",
    "logit_normal", "noise_angle", "noise_level", "ordered_pair", "sigmoid_fraction", "terminal_pair", "to_data",
    "two_times", "u_shaped", "uniform",
]  # fmt: skip

TimeDistribution = Callable[[Array], Array]
Pair = tuple[Float[Array, "*b"], Float[Array, "*b"]]  # times s and t of a jump


def uniform(key: Key[Array, "*b"], *, low: float = 0.0, high: float = 1.0) -> Float[Array, "*b"]:
    """Draw times ``t ~ U[low, high]``.

    Args:
        key: one key, or keys ``[B]``.
        low: lowest time.
        high: highest time.

    Returns:
        Times of the shape of ``key``.

    >>> uniform(jax.random.split(jax.random.key(0), 3), low=0.5).shape
    (3,)
    """
    return per_example(lambda k: jax.random.uniform(k, minval=low, maxval=high), key)


def interior(key: Key[Array, "*b"], *, margin: float = 1e-3) -> Float[Array, "*b"]:
    """Draw times ``t ~ U[margin, 1 - margin]``, for paths whose regression target is infinite at their ends.

    Args:
        key: one key, or keys ``[B]``.
        margin: distance from both ends, in (0, 1/2).

    Returns:
        Times of the shape of ``key``.

    Raises:
        ValueError: ``margin`` outside (0, 1/2).

    >>> bool(abs(interior(jax.random.key(0), margin=0.4) - 0.5) <= 0.1)
    True
    """
    check_range("margin", margin, Range(0, 0.5, open_low=True, open_high=True))
    return uniform(key, low=margin, high=1 - margin)


def logit_normal(key: Key[Array, "*b"], *, mean: float = 0.0, std: float = 1.0) -> Float[Array, "*b"]:
    """Draw times ``t = sigmoid(mean + std z)``, ``z ~ N(0, 1)`` (arXiv 2403.03206).

    Args:
        key: one key, or keys ``[B]``.
        mean: mean of the logit of ``t``; positive means more times near the data (``t = 1``).
        std: standard deviation of the logit of ``t``.

    Returns:
        Times of the shape of ``key``.

    >>> round(logit_normal(jax.random.key(0), mean=0.2, std=0.0).item(), 4)
    0.5498
    """
    return per_example(lambda k: jax.nn.sigmoid(mean + std * jax.random.normal(k)), key)


def u_shaped(key: Key[Array, "*b"], *, sharpness: PositiveFloat = 4.0) -> Float[Array, "*b"]:
    """Draw times that are most frequent at both ends (arXiv 2405.20320).

    The density is ``a (e^{a t} + e^{a (1 - t)}) / (2 (e^a - 1))``, ``a = sharpness``: ``u = log(1 + U (e^a - 1)) / a``
    for uniform ``U``, mirrored to ``1 - u`` with probability 1/2.

    Args:
        key: one key, or keys ``[B]``.
        sharpness: the rate ``a``.

    Returns:
        Times of the shape of ``key``.

    Raises:
        ValueError: ``sharpness`` is not positive.

    >>> u_shaped(jax.random.split(jax.random.key(0), 3)).shape
    (3,)
    """
    check_range("sharpness", sharpness, Range(0, open_low=True))
    u, mirror = _two(key, uniform, uniform)
    u = jnp.log1p(u * math.expm1(sharpness)) / sharpness
    return jnp.where(mirror < 0.5, u, 1 - u)


def noise_level(key: Key[Array, "*b"], *, mean: float = -1.1, std: float = 2.0) -> Float[Array, "*b"]:
    """Draw times ``t = 1 / (1 + sigma)`` of log-normal noise levels, ``log sigma ~ N(mean, std^2)``.

    The noise levels of consistency models (arXiv 2406.14548): ``x1 + sigma x0`` is the linear path at ``t``, up to a
    scale. The distribution is ``logit_normal`` of mean ``-mean``.

    Args:
        key: one key, or keys ``[B]``.
        mean: mean of ``log sigma``.
        std: standard deviation of ``log sigma``.

    Returns:
        Times of the shape of ``key``.

    >>> noise_level(jax.random.key(0), mean=0.0, std=0.0).item()
    0.5
    """
    return logit_normal(key, mean=-mean, std=std)


def noise_angle(
    key: Key[Array, "*b"], *, mean: float = -1.0, std: float = 1.4, sigma: PositiveFloat = 1.0
) -> Float[Array, "*b"]:
    """Draw times ``t = 1 - (2 / pi) arctan(e^z / sigma)``, ``z ~ N(mean, std^2)`` (arXiv 2410.11081).

    The angle ``pi / 2 (1 - t)`` of the trigonometric path is zero at the data.

    Args:
        key: one key, or keys ``[B]``.
        mean: mean of ``z``.
        std: standard deviation of ``z``.
        sigma: standard deviation of the data.

    Returns:
        Times of the shape of ``key``.

    Raises:
        ValueError: ``sigma`` is not positive.

    >>> noise_angle(jax.random.key(0), mean=0.0, std=0.0).item()
    0.5
    """
    check_range("sigma", sigma, Range(0, open_low=True))
    z = per_example(jax.random.normal, key)
    return 1 - 2 / jnp.pi * jnp.arctan(jnp.exp(mean + std * z) / sigma)


def ordered_pair(
    key: Key[Array, "*b"], *, time: TimeDistribution = uniform, gap: PositiveFloat = 1.0, diagonal: Fraction = 0.0
) -> Pair:
    """Draw two independent times and sort them, ``s <= t`` (arXiv 2505.18825, Algorithm 1).

    Then ``t <- min(t, s + gap)``, and with probability ``diagonal`` (drawn for each example) ``t <- s``.

    Args:
        key: one key, or keys ``[B]``.
        time: distribution of both times.
        gap: longest jump.
        diagonal: probability of ``s = t``.

    Returns:
        Times ``(s, t)``, each of the shape of ``key``.

    Raises:
        ValueError: ``gap`` is not positive, or ``diagonal`` outside [0, 1].

    >>> s, t = ordered_pair(jax.random.key(0), gap=0.1)
    >>> bool(s <= t), bool(t <= s + 0.1)
    (True, True)
    """
    check_range("gap", gap, Range(0, math.inf, open_low=True))
    check_range("diagonal", diagonal, Range(0, 1))
    a, b = _two(key, time, time)
    s, t = jnp.minimum(a, b), jnp.maximum(a, b)
    t = jnp.minimum(t, s + gap)
    return s, jnp.where(uniform(fold_in(key, 2)) < diagonal, s, t)


def earlier(key: Key[Array, "*b"], *, time: TimeDistribution = uniform) -> Float[Array, "*b"]:
    """Draw the smaller of two independent times, the ``s`` of ``ordered_pair``: mean flow's times on the diagonal.

    Args:
        key: one key, or keys ``[B]``.
        time: distribution of both times.

    Returns:
        Times of the shape of ``key``.

    >>> bool(earlier(jax.random.key(0)) == ordered_pair(jax.random.key(0))[0])
    True
    """
    a, b = _two(key, time, time)
    return jnp.minimum(a, b)


def two_times(
    key: Key[Array, "*b"], *, start: TimeDistribution = logit_normal, stop: TimeDistribution = logit_normal,
    least: Fraction = 0.0,
) -> Pair:  # fmt: skip
    """Draw ``s ~ start`` and ``t ~ stop`` independently, then ``t <- max(s + least, t)``.

    Mean flow on CIFAR-10 uses logit-normal times of mean 0.6 and 4, both of standard deviation 1.6.

    Args:
        key: one key, or keys ``[B]``.
        start: distribution of ``s``.
        stop: distribution of ``t`` before the maximum.
        least: shortest jump.

    Returns:
        Times ``(s, t)``, each of the shape of ``key``.

    >>> bool(jnp.less_equal(*two_times(jax.random.key(0))))
    True
    """
    s, t = _two(key, start, stop)
    return s, jnp.maximum(s + least, t)


def either_order(key: Key[Array, "*b"], *, least: float = 0.02) -> Pair:
    """Draw jumps in both directions: uniform on the square ``[0, 1]^2`` without the strip ``|t - s| < least``.

    Args:
        key: one key, or keys ``[B]``.
        least: shortest jump, in [0, 1).

    Returns:
        Times ``(s, t)``, each of the shape of ``key``.

    Raises:
        ValueError: ``least`` outside [0, 1).

    >>> s, t = either_order(jax.random.key(0), least=0.5)
    >>> bool(abs(t - s) >= 0.5)
    True
    """
    check_range("least", least, Range(0, 1, open_high=True))
    gap = 1 - (1 - least) * jnp.sqrt(uniform(fold_in(key, 0)))  # of density 2 (1 - gap) / (1 - least)^2
    low = uniform(fold_in(key, 1)) * (1 - gap)
    falls = uniform(fold_in(key, 2)) < 0.5
    return jnp.where(falls, low + gap, low), jnp.where(falls, low, low + gap)


def gap_pair(key: Key[Array, "*b"], *, time: TimeDistribution = logit_normal) -> Pair:
    """Draw the length of a jump, ``d ~ time``, then ``s ~ U[0, 1 - d]`` and ``t = s + d`` (arXiv 2506.14603).

    Args:
        key: one key, or keys ``[B]``.
        time: distribution of the length, on [0, 1].

    Returns:
        Times ``(s, t)``, each of the shape of ``key``.

    >>> bool(jnp.less_equal(*gap_pair(jax.random.key(0))))
    True
    """
    gap, u = _two(key, time, uniform)
    s = u * (1 - gap)
    return s, s + gap


def terminal_pair(
    key: Key[Array, "*b"], *, mean: float = 0.4, std: PositiveFloat = 1.0, gap_mean: float = -0.8,
    gap_std: PositiveFloat = 1.0,
) -> Pair:  # fmt: skip
    """Draw a logit-normal length ``d``, then a logit-normal ``t >= d``, and ``s = t - d`` (arXiv 2511.19797).

    The truncated ``t`` is drawn by its inverse distribution function in the upper tail, where float32 keeps its digits.

    Args:
        key: one key, or keys ``[B]``.
        mean: mean of the logit of ``t``, before the truncation.
        std: standard deviation of the logit of ``t``, before the truncation.
        gap_mean: mean of the logit of ``d``.
        gap_std: standard deviation of the logit of ``d``.

    Returns:
        Times ``(s, t)``, each of the shape of ``key``.

    Raises:
        ValueError: ``std`` or ``gap_std`` is not positive.

    >>> s, t = terminal_pair(jax.random.key(0))
    >>> bool(0 <= s <= t <= 1)
    True
    """
    check_range("std", std, Range(0, open_low=True))
    check_range("gap_std", gap_std, Range(0, open_low=True))
    gap, u = _two(key, functools.partial(logit_normal, mean=gap_mean, std=gap_std), uniform)
    above = jax.scipy.special.ndtr((mean - jax.scipy.special.logit(gap)) / std)  # P(t >= gap) without the truncation
    t = jax.nn.sigmoid(mean - std * jax.scipy.special.ndtri((1 - u) * above))
    t = jnp.maximum(t, gap)
    return t - gap, t


def to_data(key: Key[Array, "*b"], *, time: TimeDistribution = uniform) -> Pair:
    """Draw jumps that end in the data, ``s ~ time`` and ``t = 1``: the maps of consistency models.

    Args:
        key: one key, or keys ``[B]``.
        time: distribution of ``s``.

    Returns:
        Times ``(s, t)``, each of the shape of ``key``.

    >>> to_data(jax.random.key(0))[1].item()
    1.0
    """
    s = time(key)
    return s, jnp.ones_like(s)


def from_source(key: Key[Array, "*b"], *, time: TimeDistribution = uniform) -> Pair:
    """Draw jumps that start in the source, ``s = 0`` and ``t ~ time``.

    Args:
        key: one key, or keys ``[B]``.
        time: distribution of ``t``.

    Returns:
        Times ``(s, t)``, each of the shape of ``key``.

    >>> from_source(jax.random.key(0))[0].item()
    0.0
    """
    t = time(key)
    return jnp.zeros_like(t), t


def dyadic(key: Key[Array, "*b"], *, levels: Positive = 7) -> Pair:
    """Draw jumps of length ``2^-k``, ``k = 0 .. levels - 1`` with equal probability (shortcut models, 2410.12557).

    ``s`` is a multiple of the length, uniform among the multiples below 1.

    Args:
        key: one key, or keys ``[B]``.
        levels: number of lengths.

    Returns:
        Times ``(s, t)``, each of the shape of ``key``.

    Raises:
        ValueError: ``levels`` below 1.

    >>> [a.item() for a in dyadic(jax.random.key(0), levels=1)]
    [0.0, 1.0]
    """
    check_range("levels", levels, Range(1))
    u, v = _two(key, uniform, uniform)
    count = 2.0 ** jnp.floor(u * levels)  # jumps of this length in [0, 1]
    s = jnp.floor(v * count) / count
    return s, s + 1 / count


def grid_pair(
    key: Key[Array, "*b"], progress: Array | None = None, *, steps: Positive = 64, rounds: Positive = 7
) -> Pair:
    """Draw a step of a grid that is halved from round to round (progressive distillation, arXiv 2202.00512).

    In round ``r = floor(rounds progress)`` the grid has ``steps / 2^r`` steps: ``s`` is a multiple of
    ``gap = 2^r / steps`` and ``t = s + gap``. With a frozen teacher each round is a run: ``rounds=1``.

    Args:
        key: one key, or keys ``[B]``.
        progress: fraction of the training that is done, of the shape of ``key``; ``None``: the last round.
        steps: steps of the grid in the first round, a multiple of ``2^(rounds - 1)``.
        rounds: number of rounds.

    Returns:
        Times ``(s, t)``, each of the shape of ``key``.

    Raises:
        ValueError: ``steps`` is not a multiple of ``2^(rounds - 1)``, or ``rounds`` below 1.

    >>> grid_pair(jax.random.key(0), steps=4, rounds=3)[1].item()
    1.0
    """
    check_range("rounds", rounds, Range(1))
    check_range("steps", steps, Range(1))
    if steps % 2 ** (rounds - 1):
        raise ValueError(f"steps={steps}: cannot be halved rounds - 1 = {rounds - 1} times. Give a multiple of it.")
    done = jnp.ones(key.shape) if progress is None else progress
    count = steps / 2.0 ** jnp.minimum(jnp.floor(rounds * done), rounds - 1)
    s = jnp.floor(uniform(key) * count) / count
    return s, s + 1 / count


def _two(key, first, second) -> tuple[Array, Array]:
    return first(fold_in(key, 0)), second(fold_in(key, 1))
