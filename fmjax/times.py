"""Laws of training times, example by example, and grids of sampling times."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fmjax.types import fold_in


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


def _two(key, first, second) -> tuple[Array, Array]:
    return first(fold_in(key, 0)), second(fold_in(key, 1))


def _uniform(key) -> Array:
    return jax.vmap(jax.random.uniform)(key)


def uniform_grid(n: int, *, start: float = 0.0, stop: float = 1.0) -> np.ndarray:
    """``n + 1`` evenly spaced times from ``start`` to ``stop``: ``n`` solver steps. Raises ``ValueError`` for n < 1.

    >>> uniform_grid(4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if n < 1:
        raise ValueError(f"a grid needs at least one step, got n={n}")
    return np.linspace(start, stop, n + 1, dtype=np.float32)


def check_grid(ts) -> np.ndarray:
    """``ts`` as a numpy array ``[N + 1]``, float32, checked: at least two times, finite, strictly monotone.

    Grids are static: they decide the program (how many steps, in which direction). Raises ``ValueError``, or
    ``TypeError`` for a traced grid.
    """
    if isinstance(ts, jax.core.Tracer):
        raise TypeError("a grid of times is static: pass a numpy array or a list from outside jit, not a traced array")
    ts = np.asarray(ts, np.float32)
    if ts.ndim != 1 or ts.size < 2:
        raise ValueError(f"a grid needs at least two times in one axis, got shape {ts.shape}: {ts.tolist()}")
    if not np.isfinite(ts).all():
        raise ValueError(f"a grid needs finite times, got {ts.tolist()}")
    steps = np.diff(ts)
    if not ((steps > 0).all() or (steps < 0).all()):
        n = int(np.argmax(np.sign(steps) != np.sign(steps[0]))) if steps[0] != 0 else 0
        raise ValueError(
            f"a grid must rise or fall strictly, but ts[{n}]={ts[n]:g} is followed by ts[{n + 1}]={ts[n + 1]:g}; "
            "sort it, or drop the repeated time"
        )
    return ts
