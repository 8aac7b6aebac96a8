"""Randomness belongs to the example: one typed key per example, folded from the run's key and the global index."""

from __future__ import annotations

import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

SEEDS = 2**32


def from_seed(seed: int, field: str = "seed") -> Key[Array, ""]:
    """Return the key of a seed.

    Args:
        seed: an integer in [0, 2^32); JAX would take others for one of these.
        field: the name of the argument, for the message.

    Returns:
        One typed key, ``jax.random.key(seed)``.

    Raises:
        ValueError: another number.

    >>> bool(from_seed(3) == jax.random.key(3))
    True
    """
    return jax.random.key(check_seed(seed, field))


def generator(seed: int, *more: int) -> np.random.Generator:
    """Return the numpy generator of a seed and further numbers, such as a step.

    Args:
        seed: an integer in [0, 2^32).
        *more: non-negative integers.

    Returns:
        ``numpy.random.default_rng([seed, *more])``.

    Raises:
        ValueError: another seed.

    >>> int(generator(0, 1).integers(100)) == int(np.random.default_rng([0, 1]).integers(100))
    True
    """
    seed = check_seed(seed)
    return np.random.default_rng([seed, *more] if more else seed)


def check_seed(seed: int, field: str = "seed") -> int:
    """Return a seed as an integer; refuse anything else.

    Args:
        seed: an integer in [0, 2^32).
        field: the name of the argument, for the message.

    Returns:
        The seed.

    Raises:
        ValueError: another number.

    >>> check_seed(2**32)
    Traceback (most recent call last):
    ValueError: seed=4294967296: not a whole number in [0, 4294967295]. Give one of these.
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < SEEDS:
        raise ValueError(f"{field}={seed!r:.40}: not a whole number in [0, {SEEDS - 1}]. Give one of these.")
    return int(seed)


def is_key(key) -> bool:
    """Return whether an object is a typed PRNG key, or an array of typed PRNG keys.

    Args:
        key: any object.

    Returns:
        ``True`` for ``jax.random.key(0)``; ``False`` for ``jax.random.PRNGKey(0)``, an integer or ``None``.

    >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0)), is_key(0)
    (True, False, False)
    """
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def check_key(key) -> None:
    """Refuse anything but a typed PRNG key.

    Args:
        key: the argument of a public function.

    Raises:
        TypeError: ``key`` is an integer, ``None`` or a key of the old style (``jax.random.PRNGKey``).

    >>> check_key(jax.random.key(0))
    """
    if not is_key(key):
        raise TypeError(f"key={key!r:.80}: not a typed PRNG key. Give jax.random.key(seed).")


def example_keys(key: Key[Array, ""], index: Int[Array, " b"]) -> Key[Array, " b"]:
    """Return one key per example: the run's key folded with the global index of the example.

    Args:
        key: one key.
        index: global indices of the examples, ``[B]``.

    Returns:
        Keys ``[B]``. The key of an example does not depend on the other examples of the batch.

    >>> import jax, jax.numpy as jnp
    >>> k = example_keys(jax.random.key(0), jnp.arange(8))
    >>> bool((k[3:5] == example_keys(jax.random.key(0), jnp.array([3, 4]))).all())
    True
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def as_keys(key, batch: int) -> Key[Array, " b"]:
    """Normalise the key of a public function: one key becomes keys ``[batch]``; keys ``[batch]`` pass through.

    Args:
        key: one key, or one key per example.
        batch: number of examples.

    Returns:
        Keys ``[batch]``; of one key, ``example_keys(key, arange(batch))``.

    Raises:
        TypeError: ``key`` is not a typed key.
        ValueError: ``key`` has another shape.

    >>> as_keys(jax.random.key(0), 4).shape
    (4,)
    """
    check_key(key)
    if key.ndim == 0:
        return example_keys(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"key.shape={key.shape}: not one key per example. Give one key, or keys of shape ({batch},).")
    return key


def per_example(draw: Callable[[Array], Array], key) -> Array:
    """Apply a function of one key to every key.

    Args:
        draw: function of one key.
        key: one key, or keys ``[B]``.

    Returns:
        ``draw(key)`` for one key; for keys ``[B]`` the results stacked, ``[B, ...]``.

    Raises:
        TypeError: ``key`` is not a typed key.

    >>> per_example(jax.random.uniform, as_keys(jax.random.key(0), 3)).shape
    (3,)
    """
    check_key(key)
    return jax.vmap(draw)(key) if key.ndim else draw(key)


def split(key: Key[Array, "*b"], n: int) -> tuple[Key[Array, "*b"], ...]:
    """Split the key of every example into independent keys.

    Args:
        key: one key, or keys ``[B]``.
        n: number of keys to make from each.

    Returns:
        A tuple of ``n`` keys, each of the shape of ``key``.

    >>> [k.shape for k in split(as_keys(jax.random.key(0), 4), 2)]
    [(4,), (4,)]
    """
    keys = per_example(lambda k: jax.random.split(k, n), key)
    return tuple(keys[..., i] for i in range(n))


def fold_in(key: Key[Array, "*b"], data: int | Int[Array, ""]) -> Key[Array, "*b"]:
    """Fold one integer (the number of a step) into the key of every example.

    Args:
        key: one key, or keys ``[B]``.
        data: the integer, the same for all examples.

    Returns:
        Keys of the shape of ``key``.

    >>> fold_in(as_keys(jax.random.key(0), 4), 7).shape
    (4,)
    """
    return per_example(lambda k: jax.random.fold_in(k, data), key)


def normal(key: Key[Array, "*b"], shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, ...]:
    """Draw standard normal noise, example by example.

    Args:
        key: one key, or keys ``[B]``.
        shape: shape of one example, without the batch axis.
        dtype: floating type of the noise.

    Returns:
        Noise ``[B, *shape]``, or ``[*shape]`` for one key.

    >>> normal(as_keys(jax.random.key(0), 4), (2, 3)).shape
    (4, 2, 3)
    """
    return per_example(lambda k: jax.random.normal(k, shape, dtype), key)
