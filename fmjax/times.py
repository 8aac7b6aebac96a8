"""Laws of training times, example by example, and grids of sampling times."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key


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


def ordered_pair(key: Key[Array, " b"], *, law=uniform) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Two independent draws of ``law`` in order, ``s <= t`` (arXiv 2505.18825, Algorithm 1)."""
    halves = jax.vmap(lambda k: jax.random.split(k, 2))(key)
    a, b = law(halves[:, 0]), law(halves[:, 1])
    return jnp.minimum(a, b), jnp.maximum(a, b)


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
