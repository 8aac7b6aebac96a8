"""Digests of arrays and of trees of arrays."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fmjax.keys import is_key


def digest(tree: Any) -> str:
    """Return the SHA-256 of the arrays of a tree: sorted key paths, dtypes, shapes and bytes.

    It is the same for numpy and JAX arrays, for dicts and NamedTuples, and for every sharding. Where an array lies on
    several processes, all of them must call it.

    Args:
        tree: arrays or numbers in dicts, tuples and NamedTuples.

    Returns:
        64 hexadecimal characters.

    Raises:
        TypeError: the tree holds a typed PRNG key.

    >>> import jax.numpy as jnp, numpy as np
    >>> digest({"w": jnp.ones(3)}) == digest({"w": np.ones(3, np.float32)}) != digest({"w": jnp.zeros(3)})
    True
    """
    sha = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        array = _host(leaf)
        sha.update(json.dumps([path, array.dtype.name, array.shape]).encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def digest_rows(x: Any) -> str:
    """Return the ``digest`` of an array that may lie on disk, reading a part at a time.

    Args:
        x: an array ``[n, ...]``, or an object with ``shape``, ``dtype`` and ``x[i:j]``.

    Returns:
        64 hexadecimal characters, equal to ``digest(np.asarray(x))``.

    >>> digest_rows(np.arange(3.0)) == digest(np.arange(3.0))
    True
    """
    sha = hashlib.sha256(json.dumps([[], np.dtype(x.dtype).name, x.shape]).encode())
    part = max(1, 2**24 // max(1, math.prod(x.shape[1:]) * np.dtype(x.dtype).itemsize))
    for start in range(0, len(x), part):
        sha.update(np.asarray(x[start : start + part]).tobytes())
    return sha.hexdigest()


def names(path) -> tuple[str, ...]:
    """Return the names along a key path of a tree.

    Args:
        path: a key path of ``jax.tree_util``.

    Returns:
        One name per key.
    """
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    """Return the leaves of a tree by the names of their key paths.

    Args:
        tree: arrays or numbers in dicts, tuples and NamedTuples.

    Returns:
        The leaves by names.
    """
    return {names(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _host(leaf: Any) -> np.ndarray:
    if is_key(leaf):
        raise TypeError("a state holds no PRNG keys: fold them from the seed and the step, or save jax.random.key_data")
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
