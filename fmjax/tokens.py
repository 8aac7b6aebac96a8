"""Paths of discrete data: tokens that a jump process carries from a source of masks or of uniform tokens to the data.

A state is an array of integers ``[B, ...]``, one token a site. Sites are corrupted independently of one another,
``p_t(x^i | x1) = k_t 1[x^i = x1^i] + (1 - k_t) source(x^i)`` with a schedule ``k_0 = 0``, ``k_1 = 1`` (arXiv
2407.15595). With the uniform source this is also the noising Markov chain of SDDM (2211.16750) of rate
``k'_t / k_t``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmjax import checks
from fmjax.keys import per_example, split
from fmjax.types import expand, over_batch

SOURCES = ("mask", "uniform")


class TokenPath(NamedTuple):
    """A path of discrete data.

    Attributes:
        classes: number ``K`` of tokens of the data, ``0 .. K - 1``.
        source: ``"mask"``: every site starts at the token ``K``, which no data have. ``"uniform"``: at a random token.
        schedule: ``k(t)``, rising from 0 to 1; it must be differentiable.
    """

    classes: int
    source: str
    schedule: Callable[[Array], Array]

    @property
    def states(self) -> int:
        """Number of values of a site: the tokens, and the mask if there is one."""
        return self.classes + (self.source == "mask")

    def kept(self, t) -> tuple[Array, Array]:
        """Return the probability ``k_t`` that a site shows its data, and its time derivative.

        Args:
            t: times, of any shape.

        Returns:
            ``(k, dk/dt)``, of the shape of ``t``.
        """
        t = jnp.asarray(t)
        return jax.jvp(self.schedule, (t,), (jnp.ones_like(t),))

    def time_of(self, k: Array) -> Array:
        """Return the times at which a site shows its data with the probabilities ``k``, by bisection.

        Args:
            k: probabilities, of any shape.

        Returns:
            Times of the shape of ``k``.
        """

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            below = self.schedule(middle) < k
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        return jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(k), jnp.ones_like(k)))[1]


def token_path(*, classes: int, source: str = "mask", power: float = 1.0) -> TokenPath:
    """Return the path whose sites show their data with the probability ``k_t = t^power``.

    Args:
        classes: number of tokens of the data.
        source: ``"mask"`` or ``"uniform"``.
        power: exponent of the schedule, positive; the paper takes 1, 2 and 3.

    Returns:
        The path.

    Raises:
        ValueError: fewer than two tokens, an unknown source, or a power that is not positive.

    >>> token_path(classes=3).states, token_path(classes=3, source="uniform").states
    (4, 3)
    """
    checks.check_choice("source", source, SOURCES)
    if classes < 2:
        raise ValueError(f"classes={classes}: nothing to tell apart. Give at least 2 tokens.")
    if not power > 0:
        raise ValueError(f"power={power}: the schedule does not rise. Give a positive number.")
    return TokenPath(classes, source, lambda t: t**power)


def source_tokens(path: TokenPath, key, shape: tuple[int, ...]) -> Int[Array, "b ..."]:
    """Draw the states that a sampler starts from.

    Args:
        path: the path.
        key: keys ``[B]``, one per example.
        shape: the shape of one example.

    Returns:
        Tokens ``[B, *shape]``, int32.

    >>> source_tokens(token_path(classes=3), jax.random.split(jax.random.key(0), 2), (2,)).tolist()
    [[3, 3], [3, 3]]
    """
    if path.source == "mask":
        return jnp.full((*key.shape, *shape), path.classes, jnp.int32)
    return per_example(lambda k: jax.random.randint(k, shape, 0, path.classes), key)


def corrupt(path: TokenPath, key, x1: Int[Array, "b ..."], t) -> Int[Array, "b ..."]:
    """Draw ``x_t`` for data: each site keeps its token with probability ``k_t``, and shows the source otherwise.

    Args:
        path: the path.
        key: keys ``[B]``.
        x1: data, tokens ``[B, ...]``.
        t: times ``[B]``, or a number.

    Returns:
        Tokens ``[B, ...]`` of the type of ``x1``.

    >>> path = token_path(classes=3)
    >>> corrupt(path, jax.random.split(jax.random.key(0), 1), jnp.array([[0, 1]]), 0.0).tolist()
    [[3, 3]]
    """
    k_keep, k_source = split(key, 2)
    u = per_example(lambda k: jax.random.uniform(k, x1.shape[1:]), k_keep)
    keep = u < expand(path.kept(over_batch(t, u))[0], u)
    return jnp.where(keep, x1, source_tokens(path, k_source, x1.shape[1:]).astype(x1.dtype))


def data_probabilities(path: TokenPath, log_probs: Float[Array, "b ... k"], x: Int[Array, "b ..."]) -> Array:
    """Return ``p(x1^i = c | x_t)`` over all values of a site, exactly where the state determines it.

    A site that shows a token on the path of masks shows its data; the mask is no token of the data.

    Args:
        path: the path.
        log_probs: log-probabilities of the tokens, ``[B, ..., K]``.
        x: states ``[B, ...]``.

    Returns:
        Probabilities ``[B, ..., states]``.

    >>> log_half = jnp.log(jnp.full((1, 2, 2), 0.5))
    >>> data_probabilities(token_path(classes=2), log_half, jnp.array([[2, 1]])).tolist()
    [[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]]
    """
    p = jnp.exp(log_probs)
    if path.source == "uniform":
        return p
    p = jnp.concatenate([p, jnp.zeros_like(p[..., :1])], -1)
    return jnp.where((x == path.classes)[..., None], p, jax.nn.one_hot(x, path.states, dtype=p.dtype))


def source_probabilities(path: TokenPath, p1: Array, x: Int[Array, "b ..."], t) -> Array:
    """Return ``p(x0^i = c | x_t)`` over all values of a site, from the probabilities of the data.

    On the uniform path a site at ``x`` hides its start if it shows its data, with
    ``p1(x) k / (k + (1 - k) / K)``: the start is then uniform. Otherwise the start is ``x`` itself.

    Args:
        path: the path.
        p1: ``data_probabilities``, ``[B, ..., states]``.
        x: states ``[B, ...]``.
        t: times ``[B]``.

    Returns:
        Probabilities ``[B, ..., states]``.

    >>> path = token_path(classes=2, source="uniform")
    >>> source_probabilities(path, jnp.array([[[1.0, 0.0]]]), jnp.array([[0]]), jnp.zeros(1)).tolist()
    [[[1.0, 0.0]]]
    """
    stay = jax.nn.one_hot(x, path.states, dtype=p1.dtype)
    if path.source == "mask":
        return jnp.broadcast_to(jax.nn.one_hot(path.classes, path.states, dtype=p1.dtype), p1.shape)
    k = expand(path.kept(t)[0], p1)
    own = jnp.take_along_axis(p1, x[..., None].astype(int), -1)
    hidden = own * k / (k + (1 - k) / path.classes)
    return hidden / path.classes + (1 - hidden) * stay
