"""Inpainting, editing and forecasts by a mask: a corrector that writes the known part of each example."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmjax import paths
from fmjax.keys import as_keys, fold_in, normal
from fmjax.types import Corrector, Costed, expand, over_batch, stated


def clamp(known: Array, mask: Array, x0: Array | None = None, *, path: paths.Path = paths.linear()) -> Corrector:
    """Return a corrector that replaces the known part of ``x`` by its interpolant, ``alpha_t noise + beta_t known``.

    With ``at=range(len(ts))`` a sampler is clamped after every step: inpainting, where ``mask`` marks the pixels to
    keep, and forecasts, where it marks the past. At ``t = 1`` the known part is ``known`` to the bit. The rest follows
    the velocity, which sees the known part with its noise: its distribution is exact where the parts are independent,
    and approximate otherwise. More corrections at a time come closer: ``in_turn(langevin(...), clamp(...))`` samples
    the conditional distribution where the score is exact.

    Args:
        known: examples ``[B, ...]`` or ``[...]``; values outside the mask are not used.
        mask: ``True`` where ``known`` is kept, of a shape that broadcasts against ``x``.
        x0: the noise ``[B, ...]``; by default new noise at each correction.
        path: the interpolant of the velocity.

    Returns:
        A corrector without network evaluations; ``info`` has ``moved: [B]``.

    >>> fix = clamp(jnp.array([7.0, 0.0]), jnp.array([True, False]))
    >>> fix(jax.random.key(0), jnp.ones((1, 2)), 1.0)[0].tolist(), fix.nfe
    ([[7.0, 1.0]], 0)

    Source: arXiv 2201.09865 (RePaint), without its jumps back, which are ``restart``.
    """

    def correct(key, x, t, cond=None):
        alpha, beta = (expand(c, x).astype(x.dtype) for c in path.coefficients(over_batch(t, x))[:2])
        noise = normal(as_keys(key, len(x)), x.shape[1:], x.dtype) if x0 is None else x0
        kept = jnp.where(beta == 1, known, alpha * noise + beta * known)
        y = jnp.where(mask, kept, x)
        return y, {"moved": jnp.sqrt(jnp.mean(jnp.square(y - x).reshape(len(x), -1), 1))}

    return Costed(correct, 0)


def in_turn(*correctors: Corrector, times: int = 1) -> Corrector:
    """Return a corrector that applies several correctors one after another.

    Args:
        *correctors: the correctors, in order.
        times: how many times all of them are applied.

    Returns:
        A corrector with the sum of their costs, if all state them, and the ``info`` of the last one.

    Raises:
        ValueError: no corrector, or ``times`` below 1.

    >>> double = lambda key, x, t, cond=None: (2 * x, {})
    >>> in_turn(double, double)(jax.random.key(0), jnp.ones((1, 1)), 0.5)[0].tolist()
    [[4.0]]
    """
    if not correctors or times < 1:
        raise ValueError(f"times={times}: of {len(correctors)} correctors nothing is applied. Give both, 1 or more.")

    def correct(key, x, t, cond=None):
        def once(x, keys):
            info = {}
            for i, corrector in enumerate(correctors):
                x, info = corrector(fold_in(keys, i), x, t, cond)
            return x, info

        keys = as_keys(key, len(x))
        x, infos = jax.lax.scan(once, x, jax.vmap(functools.partial(fold_in, keys))(jnp.arange(times)))
        return x, jax.tree.map(lambda a: a[-1], infos)

    parts = [stated(corrector) for corrector in correctors]
    counts = [part.nfe for part in parts]

    def check(ts):
        for part in parts:
            part.check(ts)

    return Costed(correct, None if None in counts else times * sum(counts), check)
