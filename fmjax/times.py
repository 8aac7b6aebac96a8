"""Laws of training times, example by example, and grids of sampling times."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fmjax.keys import fold_in


def uniform(key: Key[Array, " b"], *, low: float = 0.0, high: float = 1.0) -> Float[Array, " b"]:
    """Training times ``t ~ U[low, high]``, one per example."""
    return jax.vmap(lambda k: jax.random.uniform(k, minval=low, maxval=high))(key)


def interior(key: Key[Array, " b"], *, margin: float = 1e-3) -> Float[Array, " b"]:
    """Training times ``t ~ U[margin, 1 - margin]``, for paths whose velocity is infinite at their ends.

    ``ValueError`` unless ``0 < margin < 1/2``.
    """
    if not 0 < margin < 0.5:
        raise ValueError(f"interior needs 0 < margin < 1/2, got margin={margin}")
    return uniform(key, low=margin, high=1 - margin)


def logit_normal(key: Key[Array, " b"], *, mean: float = 0.0, std: float = 1.0) -> Float[Array, " b"]:
    """Training times ``t = sigmoid(mean + std z)``, ``z ~ N(0, 1)`` (arXiv 2403.03206); data are at ``t = 1``."""
    return jax.vmap(lambda k: jax.nn.sigmoid(mean + std * jax.random.normal(k)))(key)


def u_shaped(key: Key[Array, " b"], *, sharpness: float = 4.0) -> Float[Array, " b"]:
    """Times with the density ``a (e^{a t} + e^{a (1 - t)}) / (2 (e^a - 1))``, most at both ends (arXiv 2405.20320).

    ``u = log(1 + U (e^a - 1)) / a`` for uniform ``U``, turned to ``1 - u`` half of the time. ``ValueError`` for
    ``sharpness = a <= 0``.
    """
    if not sharpness > 0:
        raise ValueError(f"u_shaped needs sharpness > 0, got {sharpness}")
    u, turn = _two(key, _uniform, _uniform)
    u = jnp.log1p(u * math.expm1(sharpness)) / sharpness
    return jnp.where(turn < 0.5, u, 1 - u)


def noise_level(key: Key[Array, " b"], *, mean: float = -1.1, std: float = 2.0) -> Float[Array, " b"]:
    """``t = 1 / (1 + sigma)``, ``log sigma ~ N(mean, std^2)``: noise levels of consistency models (arXiv 2406.14548).

    ``x1 + sigma x0`` is the linear path at ``t``, up to its scale. It is ``logit_normal`` with the mean's sign turned.
    """
    return logit_normal(key, mean=-mean, std=std)


def noise_angle(
    key: Key[Array, " b"], *, mean: float = -1.0, std: float = 1.4, sigma: float = 1.0
) -> Float[Array, " b"]:
    """``t = 1 - (2 / pi) arctan(e^z / sigma)``, ``z ~ N(mean, std^2)``, ``sigma`` the data's std (arXiv 2410.11081).

    The angle ``pi / 2 (1 - t)`` is zero at the data. Raises ``ValueError`` for ``sigma <= 0``.
    """
    if not sigma > 0:
        raise ValueError(f"noise_angle needs sigma > 0, the standard deviation of the data, got {sigma}")
    z = jax.vmap(jax.random.normal)(key)
    return 1 - 2 / jnp.pi * jnp.arctan(jnp.exp(mean + std * z) / sigma)


Pair = tuple[Float[Array, " b"], Float[Array, " b"]]  # times s and t of a jump


def ordered_pair(key: Key[Array, " b"], *, law=uniform, gap: float = 1.0, diagonal: float = 0.0) -> Pair:
    """Two independent draws of ``law`` in order, ``s <= t`` (arXiv 2505.18825, Algorithm 1).

    Then ``t <- min(t, s + gap)``, and with probability ``diagonal`` ``t <- s``, drawn for each example. Raises
    ``ValueError`` for ``gap <= 0`` and ``diagonal`` outside [0, 1].
    """
    if not gap > 0 or not 0 <= diagonal <= 1:
        raise ValueError(f"ordered_pair needs gap > 0 and diagonal in [0, 1], got gap={gap} and diagonal={diagonal}")
    a, b = _two(key, law, law)
    s, t = jnp.minimum(a, b), jnp.maximum(a, b)
    t = jnp.minimum(t, s + gap)
    return s, jnp.where(_uniform(fold_in(key, 2)) < diagonal, s, t)


def earlier(key: Key[Array, " b"], *, law=uniform) -> Float[Array, " b"]:
    """The smaller of two draws of ``law``, the ``s`` of ``ordered_pair``: the diagonal's times of mean flow."""
    a, b = _two(key, law, law)
    return jnp.minimum(a, b)


def two_laws(key: Key[Array, " b"], *, start=logit_normal, stop=logit_normal) -> Pair:
    """Independent ``s ~ start`` and ``t ~ stop``, ``t <- max(s, t)`` (mean flow, CIFAR-10: LN(.6, 1.6), LN(4, 1.6))."""
    s, t = _two(key, start, stop)
    return s, jnp.maximum(s, t)


def either_order(key: Key[Array, " b"], *, least: float = 0.02) -> Pair:
    """Uniform on the square ``[0, 1]^2`` but for the strip ``|t - s| < least``: jumps in both directions.

    Raises ``ValueError`` unless ``0 <= least < 1``.
    """
    if not 0 <= least < 1:
        raise ValueError(f"either_order needs 0 <= least < 1, got least={least}")
    gap = 1 - (1 - least) * jnp.sqrt(_uniform(fold_in(key, 0)))  # of density 2 (1 - gap) / (1 - least)^2
    low = _uniform(fold_in(key, 1)) * (1 - gap)
    falls = _uniform(fold_in(key, 2)) < 0.5
    return jnp.where(falls, low + gap, low), jnp.where(falls, low, low + gap)


def gap_pair(key: Key[Array, " b"], *, law=logit_normal) -> Pair:
    """The gap ``d ~ law``, ``s ~ U[0, 1 - d]``, ``t = s + d`` (align your flow, arXiv 2506.14603)."""
    gap, u = _two(key, law, uniform)
    s = u * (1 - gap)
    return s, s + gap


def terminal_pair(
    key: Key[Array, " b"], *, mean: float = 0.4, std: float = 1.0, gap_mean: float = -0.8, gap_std: float = 1.0
) -> Pair:
    """The gap ``d ~ LN(gap_mean, gap_std)``, ``t ~ LN(mean, std)`` given ``t >= d``, ``s = t - d`` (arXiv 2511.19797).

    The truncated law is drawn by its inverse distribution function, in the upper tail, where float32 keeps its digits.
    Raises ``ValueError`` unless both deviations are positive.
    """
    if not (std > 0 and gap_std > 0):
        raise ValueError(f"terminal_pair needs std > 0 and gap_std > 0, got std={std} and gap_std={gap_std}")
    gap, u = _two(key, functools.partial(logit_normal, mean=gap_mean, std=gap_std), uniform)
    above = jax.scipy.special.ndtr((mean - jax.scipy.special.logit(gap)) / std)  # P(t >= gap) of the whole law
    t = jax.nn.sigmoid(mean - std * jax.scipy.special.ndtri((1 - u) * above))
    t = jnp.maximum(t, gap)
    return t - gap, t


def to_data(key: Key[Array, " b"], *, law=uniform) -> Pair:
    """``s ~ law`` and ``t = 1``: the maps of consistency models."""
    s = law(key)
    return s, jnp.ones_like(s)


def from_source(key: Key[Array, " b"], *, law=uniform) -> Pair:
    """``s = 0`` and ``t ~ law``: jumps that start in the source."""
    t = law(key)
    return jnp.zeros_like(t), t


def dyadic(key: Key[Array, " b"], *, levels: int = 7) -> Pair:
    """Gaps ``2^-k``, ``k = 0 .. levels - 1`` in equal shares, and ``s`` a multiple of the gap (arXiv 2410.12557).

    Raises ``ValueError`` for less than one level.
    """
    if levels < 1:
        raise ValueError(f"dyadic needs at least one level, got levels={levels}")
    u, v = _two(key, uniform, uniform)
    count = 2.0 ** jnp.floor(u * levels)  # jumps of this length in [0, 1]
    s = jnp.floor(v * count) / count
    return s, s + 1 / count


def grid_pair(key: Key[Array, " b"], progress: Array | None = None, *, steps: int = 64, rounds: int = 7) -> Pair:
    """Jumps of a grid of ``steps / 2^r``, ``r`` the round that ``progress`` is in (progressive distillation).

    ``s`` is a multiple of ``gap = 2^r / steps`` and ``t = s + gap``; ``r = floor(rounds progress)``, the last round for
    ``progress=None``. Raises ``ValueError`` unless ``steps`` is a multiple of ``2^(rounds - 1)``.
    """
    if rounds < 1 or steps < 1 or steps % 2 ** (rounds - 1):
        raise ValueError(f"grid_pair halves its steps rounds - 1 times, which {steps=} and {rounds=} do not allow")
    done = jnp.ones(key.shape) if progress is None else progress
    count = steps / 2.0 ** jnp.minimum(jnp.floor(rounds * done), rounds - 1)
    s = jnp.floor(_uniform(key) * count) / count
    return s, s + 1 / count


Share = Float[Array, " b"]  # of a jump from s to t: the part of it that is taken first, in (0, 1]


def constant_share(s: Array, t: Array, progress: Array, *, value: float = 0.5) -> Share:
    """The same share all along. Raises ``ValueError`` unless ``0 < value <= 1``."""
    if not 0 < value <= 1:
        raise ValueError(f"constant_share needs 0 < value <= 1, got {value}")
    return jnp.full_like(s, value)


def sigmoid_share(
    s: Array,
    t: Array,
    progress: Array,
    *,
    rate: float = 25.0,
    start: float = 0.0,
    stop: float = 1.0,
    least: float = 5e-3,
) -> Share:
    """From one to ``least``: ``sigmoid(rate (1/2 - (progress - start) / (stop - start)))`` (arXiv 2510.20771).

    Below ``least`` it is ``least``, above ``1 - least`` one. Raises ``ValueError`` unless ``start < stop`` and
    ``0 < least < 1``.
    """
    if not start < stop or not 0 < least < 1:
        raise ValueError(f"sigmoid_share needs start < stop and 0 < least < 1, got {start=}, {stop=} and {least=}")
    share = jax.nn.sigmoid(rate * (0.5 - (progress - start) / (stop - start)))
    return jnp.where(share > 1 - least, 1, jnp.maximum(share, least)).astype(s.dtype)


def exponential_share(
    s: Array, t: Array, progress: Array, *, first: float = 0.1, last: float = 2e-3, gap: float = 1e-4
) -> Share:
    """From ``first`` to ``last`` at an exponential rate, and no less than ``gap`` in time (SoFlow, arXiv 2512.15657).

    Raises ``ValueError`` for shares outside (0, 1] and ``gap <= 0``.
    """
    if not (0 < first <= 1 and 0 < last <= 1 and gap > 0):
        raise ValueError(f"exponential_share needs shares in (0, 1] and gap > 0, got {first=}, {last=} and {gap=}")
    share = first * (last / first) ** progress
    return jnp.clip(share, gap / jnp.maximum(t - s, gap), 1).astype(s.dtype)


def level_share(
    s: Array, t: Array, progress: Array, *, levels: int = 10, last: int = 1280, rho: float = 7.0,
    sigma_min: float = 0.002, sigma_max: float = 80.0,
) -> Share:  # fmt: skip
    """One step of a grid of ``N + 1`` noise levels even in ``sigma^(1/rho)``: consistency models (arXiv 2303.01469).

    ``sigma = (1 - s) / s`` goes to ``sigma'``, ``sigma'^(1/rho) = sigma^(1/rho) - (sigma_max^(1/rho) -
    sigma_min^(1/rho)) / N``, and to the data (``t = 1``) from less than a step above ``sigma_min``. ``N`` doubles from
    ``levels`` to ``last`` in equal parts of the training (arXiv 2310.14189). Raises ``ValueError`` unless
    ``1 <= levels <= last``, ``0 < sigma_min < sigma_max`` and ``rho > 0``.
    """
    if not (1 <= levels <= last and 0 < sigma_min < sigma_max and rho > 0):
        raise ValueError(
            f"level_share needs 1 <= levels <= last, 0 < sigma_min < sigma_max and rho > 0, got {levels=}, {last=}, "
            f"{sigma_min=}, {sigma_max=}, {rho=}"
        )
    doublings = math.log2(last / levels)
    n = jnp.minimum(levels * 2.0 ** jnp.floor(progress * (math.floor(doublings) + 1)), last)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigma = jnp.clip((1 - s) / jnp.maximum(s, 1e-6), 0, sigma_max)
    root = sigma ** (1 / rho) - (high - low) / n
    return _to_level(s, sigma, jnp.where(root < low * (1 - 1e-5), 0, root**rho))


def ect_share(
    s: Array, t: Array, progress: Array, *, stages: int = 8, base: float = 2.0, k: float = 8.0, b: float = 1.0
) -> Share:
    """The step of easy consistency tuning, ``sigma' = sigma relu(1 - base^-(j + 1) (1 + k sigmoid(-b sigma)))``.

    Levels are ``sigma = (1 - s) / s`` (arXiv 2406.14548). The stage ``j = floor(stages progress)`` is at most
    ``stages - 1``. Where ``sigma' = 0`` the step ends in the data, ``t = 1``. Raises ``ValueError`` for less than one
    stage and ``base <= 1``.
    """
    if stages < 1 or not base > 1:
        raise ValueError(f"ect_share needs stages >= 1 and base > 1, got {stages=} and {base=}")
    sigma = (1 - s) / jnp.maximum(s, 1e-6)
    stage = jnp.minimum(jnp.floor(stages * progress), stages - 1)
    return _to_level(s, sigma, sigma * jax.nn.relu(1 - base ** -(stage + 1) * (1 + k * jax.nn.sigmoid(-b * sigma))))


def _to_level(s: Array, sigma: Array, after: Array) -> Share:
    """The share of the way from ``s`` to the data at which the noise level is ``after``."""
    share = (sigma - after) / (jnp.maximum(sigma, 1e-12) * (1 + after))
    return jnp.where(after > 0, jnp.clip(share, 1e-6, 1), 1).astype(s.dtype)


def _two(key, first, second) -> tuple[Array, Array]:
    return first(fold_in(key, 0)), second(fold_in(key, 1))


def _uniform(key) -> Array:
    return jax.vmap(jax.random.uniform)(key)


def check_bounds(bounds: Sequence[float]) -> np.ndarray:
    """The bounds of segments as float32; ``ValueError`` unless they rise strictly within [0, 1]."""
    edges = np.asarray(bounds, np.float32)
    if edges.ndim != 1 or len(edges) < 2 or (np.diff(edges) <= 0).any() or edges[0] < 0 or edges[-1] > 1:
        raise ValueError(f"bounds={tuple(bounds)} must rise strictly within [0, 1], two of them at least")
    return edges
