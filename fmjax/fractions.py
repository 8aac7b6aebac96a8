"""Fractions of a jump: how far a self-consistency loss first goes from ``s`` towards ``t``, during training.

A schedule is a function ``(s, t, progress) -> fraction`` with values in (0, 1]: the loss compares the jump from ``s``
to ``t`` with a jump over ``fraction (t - s)`` followed by the rest. ``progress`` is the fraction of the training that
is done. Users call these functions as ``fmjax.times.NAME``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.checks import Positive, PositiveFloat, Range, check_range

JumpFraction = Float[Array, " b"]
_PART = Range(0, 1, open_low=True)


def constant_fraction(s: Array, t: Array, progress: Array, *, value: float = 0.5) -> JumpFraction:
    """Return the same fraction throughout the training.

    Args:
        s: starts of the jumps, ``[B]``.
        t: ends of the jumps, ``[B]``.
        progress: fraction of the training that is done, ``[B]``.
        value: the fraction, in (0, 1].

    Returns:
        Fractions ``[B]``.

    Raises:
        ValueError: ``value`` outside (0, 1].

    >>> constant_fraction(jnp.zeros(2), jnp.ones(2), jnp.zeros(2)).tolist()
    [0.5, 0.5]
    """
    check_range("value", value, _PART)
    return jnp.full_like(s, value)


def sigmoid_fraction(
    s: Array,
    t: Array,
    progress: Array,
    *,
    rate: float = 25.0,
    start: float = 0.0,
    stop: float = 1.0,
    least: float = 5e-3,
) -> JumpFraction:
    """Decrease the fraction from 1 to ``least`` along a sigmoid (alpha flow, arXiv 2510.20771).

    ``sigmoid(rate (1/2 - (progress - start) / (stop - start)))``, replaced by ``least`` below ``least`` and by 1 above
    ``1 - least``.

    Args:
        s: starts of the jumps, ``[B]``.
        t: ends of the jumps, ``[B]``.
        progress: fraction of the training that is done, ``[B]``.
        rate: steepness of the sigmoid.
        start: progress at which the decrease begins.
        stop: progress at which the decrease ends.
        least: the smallest fraction, in (0, 1).

    Returns:
        Fractions ``[B]``.

    Raises:
        ValueError: ``stop`` not above ``start``, or ``least`` outside (0, 1).

    >>> sigmoid_fraction(jnp.zeros(3), jnp.ones(3), jnp.array([0.0, 0.5, 0.5])).tolist()
    [1.0, 0.5, 0.5]
    """
    check_range("stop", stop, Range(start, open_low=True))
    check_range("least", least, Range(0, 1, open_low=True, open_high=True))
    fraction = jax.nn.sigmoid(rate * (0.5 - (progress - start) / (stop - start)))
    return jnp.where(fraction > 1 - least, 1, jnp.maximum(fraction, least)).astype(s.dtype)


def exponential_fraction(
    s: Array, t: Array, progress: Array, *, first: float = 0.1, last: float = 2e-3, gap: PositiveFloat = 1e-4
) -> JumpFraction:
    """Decrease the fraction at an exponential rate, but step over at least ``gap`` (SoFlow, arXiv 2512.15657).

    Args:
        s: starts of the jumps, ``[B]``.
        t: ends of the jumps, ``[B]``.
        progress: fraction of the training that is done, ``[B]``.
        first: fraction at the start of the training, in (0, 1].
        last: fraction at the end of the training, in (0, 1].
        gap: least length of the first part of the jump, in time.

    Returns:
        Fractions ``[B]``.

    Raises:
        ValueError: ``first`` or ``last`` outside (0, 1], or ``gap`` not positive.

    >>> [round(f, 4) for f in exponential_fraction(jnp.zeros(2), jnp.ones(2), jnp.array([0.0, 1.0])).tolist()]
    [0.1, 0.002]
    """
    check_range("first", first, _PART)
    check_range("last", last, _PART)
    check_range("gap", gap, Range(0, open_low=True))
    fraction = first * (last / first) ** progress
    return jnp.clip(fraction, gap / jnp.maximum(t - s, gap), 1).astype(s.dtype)


def level_fraction(
    s: Array, t: Array, progress: Array, *, levels: Positive = 10, last: Positive = 1280, rho: PositiveFloat = 7.0,
    sigma_min: PositiveFloat = 0.002, sigma_max: PositiveFloat = 80.0,
) -> JumpFraction:  # fmt: skip
    """Return one step of a grid of noise levels, which becomes finer during training (consistency models).

    The noise level is ``sigma = (1 - s) / s``. The step leads to ``sigma'`` with ``sigma'^(1/rho) = sigma^(1/rho) -
    (sigma_max^(1/rho) - sigma_min^(1/rho)) / N`` (arXiv 2303.01469), or to the data (``t = 1``) from less than one step
    above ``sigma_min``. ``N`` doubles from ``levels`` to ``last`` in equal parts of the training (arXiv 2310.14189).

    Args:
        s: starts of the jumps, ``[B]``.
        t: ends of the jumps, ``[B]``; taken to be 1.
        progress: fraction of the training that is done, ``[B]``.
        levels: steps ``N`` of the grid at the start of the training.
        last: steps ``N`` of the grid at the end of the training, at least ``levels``.
        rho: exponent of the grid; the grid is even in ``sigma^(1/rho)``.
        sigma_min: lowest noise level.
        sigma_max: highest noise level, above ``sigma_min``.

    Returns:
        Fractions ``[B]``.

    Raises:
        ValueError: an option outside its range.

    >>> round(level_fraction(jnp.array([0.5]), jnp.ones(1), jnp.zeros(1)).item(), 3)
    0.502
    """
    check_range("levels", levels, Range(1))
    check_range("last", last, Range(levels))
    check_range("rho", rho, Range(0, open_low=True))
    check_range("sigma_min", sigma_min, Range(0, open_low=True))
    check_range("sigma_max", sigma_max, Range(sigma_min, open_low=True))
    doublings = math.log2(last / levels)
    n = jnp.minimum(levels * 2.0 ** jnp.floor(progress * (math.floor(doublings) + 1)), last)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigma = jnp.clip((1 - s) / jnp.maximum(s, 1e-6), 0, sigma_max)
    root = sigma ** (1 / rho) - (high - low) / n
    return _fraction_to_level(s, sigma, jnp.where(root < low * (1 - 1e-5), 0, root**rho))


def ect_fraction(
    s: Array, t: Array, progress: Array, *, stages: Positive = 8, base: float = 2.0, k: float = 8.0, b: float = 1.0
) -> JumpFraction:
    """Return the step of easy consistency tuning (arXiv 2406.14548).

    ``sigma' = sigma relu(1 - base^-(j + 1) (1 + k sigmoid(-b sigma)))`` with the noise level ``sigma = (1 - s) / s``
    and the stage ``j = floor(stages progress)``, at most ``stages - 1``. Where ``sigma' = 0`` the step ends in the
    data, at ``t = 1``.

    Args:
        s: starts of the jumps, ``[B]``.
        t: ends of the jumps, ``[B]``; taken to be 1.
        progress: fraction of the training that is done, ``[B]``.
        stages: number of stages of the training.
        base: factor by which the step shrinks from stage to stage, above 1.
        k: strength of the dependence on the noise level.
        b: rate of the dependence on the noise level.

    Returns:
        Fractions ``[B]``.

    Raises:
        ValueError: ``stages`` below 1, or ``base`` not above 1.

    >>> round(ect_fraction(jnp.array([0.5]), jnp.ones(1), jnp.ones(1)).item(), 3)
    0.006
    """
    check_range("stages", stages, Range(1))
    check_range("base", base, Range(1, open_low=True))
    sigma = (1 - s) / jnp.maximum(s, 1e-6)
    stage = jnp.minimum(jnp.floor(stages * progress), stages - 1)
    after = sigma * jax.nn.relu(1 - base ** -(stage + 1) * (1 + k * jax.nn.sigmoid(-b * sigma)))
    return _fraction_to_level(s, sigma, after)


def _fraction_to_level(s: Array, sigma: Array, after: Array) -> JumpFraction:
    """Return the fraction of the way from ``s`` to the data at which the noise level is ``after``."""
    fraction = (sigma - after) / (jnp.maximum(sigma, 1e-12) * (1 + after))
    return jnp.where(after > 0, jnp.clip(fraction, 1e-6, 1), 1).astype(s.dtype)
