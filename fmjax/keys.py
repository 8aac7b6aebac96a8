"""Randomness belongs to the example: one typed key per example, folded from the run's key and the global index."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def is_key(key) -> bool:
    """Whether ``key`` is a typed PRNG key (or an array of them)."""
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def example_keys(key: Key[Array, ""], index: Int[Array, " b"]) -> Key[Array, " b"]:
    """One key per example: ``key`` folded with the example's global index.

    >>> import jax, jax.numpy as jnp
    >>> k = example_keys(jax.random.key(0), jnp.arange(8))
    >>> bool((k[3:5] == example_keys(jax.random.key(0), jnp.array([3, 4]))).all())
    True
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def as_keys(key, batch: int):
    """The door for users: a single key becomes ``[batch]`` example keys, an array ``[batch]`` of keys passes through.

    Raises ``TypeError`` for anything but a typed key (``jax.random.key``) and ``ValueError`` for a wrong length.
    """
    if not is_key(key):
        raise TypeError(f"key must be a typed PRNG key from jax.random.key(seed), got {type(key).__name__}")
    if key.ndim == 0:
        return example_keys(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"key has shape {key.shape}; give one key, or one per example: shape ({batch},)")
    return key


def split(key: Key[Array, " b"], n: int) -> tuple[Key[Array, " b"], ...]:
    """``n`` independent keys per example, each ``[B]``."""
    keys = jax.vmap(lambda k: jax.random.split(k, n))(key)
    return tuple(keys[:, i] for i in range(n))


def fold_in(key: Key[Array, " b"], data) -> Key[Array, " b"]:
    """Every example's key folded with one integer (a step's number)."""
    return jax.vmap(jax.random.fold_in, (0, None))(key, data)


def normal(key: Key[Array, " b"], shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, "b ..."]:
    """Standard normal noise ``[B, *shape]``, example by example; ``shape`` is that of one example."""
    return jax.vmap(lambda k: jax.random.normal(k, shape, dtype))(key)
