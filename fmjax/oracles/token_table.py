"""The closed form of discrete data: a table of probabilities, its marginals and conditionals along a path."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax.sampling.jumps import Rates, generator_rows
from fmjax.tokens import TokenPath
from fmjax.types import over_batch


class TokenTable(NamedTuple):
    """Discrete data of a few sites, with everything that methods of tokens learn.

    Attributes:
        sample: ``sample(key, n)`` draws data ``[n, D]``.
        marginal: ``marginal(t)``, the probabilities of all states at ``t``, ``[states] * D``.
        log_probs: ``log_probs(x, t, cond=None)``, ``log p(x1^i = c | x_t)``, ``[B, D, K]``.
        log_conditionals: ``log_conditionals(x, t, cond=None)``, ``log p_t(x^i = c | x^-i)``, ``[B, D, states]``.
        states: all states in the order of ``marginal``, ``[states^D, D]``.
    """

    sample: Callable[[Array, int], Int[Array, "n d"]]
    marginal: Callable[[Array], Array]
    log_probs: Callable[..., Array]
    log_conditionals: Callable[..., Array]
    states: Int[np.ndarray, "n d"]


def token_table(probabilities: Float[Array, "*sites"], path: TokenPath) -> TokenTable:
    """Return the closed form of discrete data along a path.

    Args:
        probabilities: the data, an array ``[K] * D`` of positive numbers, normalised here; ``K = path.classes``.
        path: the path.

    Returns:
        The table. Its cost grows as ``states^D``.

    Raises:
        ValueError: a table of another shape.

    >>> from fmjax.tokens import token_path
    >>> table = token_table(jnp.array([[3.0, 1.0], [1.0, 3.0]]), token_path(classes=2, source="uniform"))
    >>> jnp.exp(table.log_probs(jnp.array([[0, 0]]), 1.0)).tolist(), table.marginal(0.0).tolist()
    ([[[1.0, 0.0], [1.0, 0.0]]], [[0.25, 0.25], [0.25, 0.25]])
    """
    p = jnp.asarray(probabilities, jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
    if p.shape != (path.classes,) * p.ndim:
        raise ValueError(f"probabilities={list(p.shape)}: the path has K={path.classes}. Give an array [K] * D.")
    p = p / p.sum()
    sites, shown = p.ndim, jnp.eye(path.classes, path.states, dtype=p.dtype)
    hidden = jnp.full((path.classes, path.states), 1 / path.classes, p.dtype)
    if path.source == "mask":
        hidden = jnp.zeros_like(hidden).at[:, -1].set(1)

    def kernel(t):
        k = path.kept(t)[0].astype(p.dtype)
        return k * shown + (1 - k) * hidden

    def carried(t, *, but: int | None = None):
        """Return the joint probabilities of the states at ``t``; the site ``but`` keeps its data."""
        q = p
        for site in range(sites):
            if site != but:
                q = jnp.moveaxis(jnp.tensordot(q, kernel(t), (site, 0)), -1, site)
        return q

    def lines(q, x, site):
        """Return ``q`` along a site at the other sites of ``x``, ``[K or states]``."""
        index = [x[i] for i in range(sites)]
        index[site] = slice(None)
        return q[tuple(index)]

    def each(x, t):
        data = jnp.stack([lines(carried(t, but=i), x, i) * kernel(t)[:, x[i]] for i in range(sites)])
        now = jnp.stack([lines(carried(t), x, i) for i in range(sites)])
        return tuple(jnp.log(a / a.sum(-1, keepdims=True)) for a in (data, now))

    view = lambda n: lambda x, t, cond=None: jax.vmap(each)(x, over_batch(t, x, tokens=True))[n]

    def sample(key, n):
        flat = jax.random.choice(key, p.size, (n,), p=p.ravel())
        return jnp.stack(jnp.unravel_index(flat, p.shape), -1).astype(jnp.int32)

    states = np.stack([a.ravel() for a in np.indices((path.states,) * sites)], -1)
    return TokenTable(sample, carried, view(0), view(1), states)


def kolmogorov_residual(table: TokenTable, rates: Rates, path: TokenPath, t: float) -> Array:
    """Return ``dp_t/dt - p_t Q_t``, which is zero for rates that carry the marginals of the path.

    Args:
        table: the closed form.
        rates: rates of a jump process.
        path: the path.
        t: a time inside (0, 1).

    Returns:
        The residual of every state, ``[states] * D``.

    >>> from fmjax import sampling
    >>> from fmjax.tokens import token_path
    >>> path = token_path(classes=2)
    >>> table = token_table(jnp.array([[3.0, 1.0], [1.0, 3.0]]), path)
    >>> rates = sampling.flow_rates(table.log_probs, path)
    >>> bool(abs(kolmogorov_residual(table, rates, path, 0.5)).max() < 1e-6)
    True
    """
    p, slope = jax.jvp(table.marginal, (jnp.asarray(t),), (jnp.ones(()),))
    rows = generator_rows(rates, path, jnp.asarray(table.states), t).reshape(*p.shape, p.ndim, path.states)
    return slope - token_flux(p, rows)


def token_flux(p: Array, rows: Array) -> Array:
    """Return ``p Q``, the change of the probabilities of all states by jumps of single sites.

    Args:
        p: probabilities ``[states] * D``.
        rows: rates from each state to every value of each site, ``[states] * D + [D, states]``.

    Returns:
        ``[states] * D``.

    >>> token_flux(jnp.array([0.5, 0.5]), jnp.array([[[-1.0, 1.0]], [[0.0, 0.0]]])).tolist()
    [-0.5, 0.5]
    """
    total = jnp.zeros_like(p)
    for site in range(p.ndim):
        flow = (p[..., None] * rows[..., site, :]).sum(site)
        total += jnp.moveaxis(flow, -1, site)
    return total
