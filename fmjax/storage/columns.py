"""Conditions in records: a pytree of arrays ``[n, ...]``, described by one string, stored row by row as bytes.

The description is JSON: an array is a string of its dtype and the shape of one row (``"int32[]"``, ``"float32[3,4]"``),
a tuple is a list, a dict is an object, and ``None`` is null. A manifest holds it, so that a reader can rebuild the
conditions from bytes alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

NARROW = {"int64": np.int32, "float64": np.float32}  # what JAX computes in unless 64-bit numbers are enabled


class Column(NamedTuple):
    """One array of the conditions in the bytes of a row.

    Attributes:
        start: first byte in the row.
        stop: byte after the last.
        dtype: dtype of the elements.
        shape: shape of one row.
    """

    start: int
    stop: int
    dtype: np.dtype
    shape: tuple[int, ...]


def as_columns(cond: Any, count: int) -> Any:
    """Return conditions as numpy arrays ``[count, ...]``, 64-bit numbers as 32-bit ones.

    Args:
        cond: arrays ``[count, ...]`` of booleans, integers or floats; tuples and dicts of such arrays.
        count: number of examples.

    Returns:
        The same tree of numpy arrays ``[count, ...]``.

    Raises:
        ValueError: another container, another dtype, or an array that does not have ``count`` rows.
    """

    def column(leaf):
        if isinstance(leaf, (list, str)) or not hasattr(leaf, "__len__"):
            raise ValueError(f"cond={type(leaf).__name__}: not rows. Give arrays, or tuples or dicts of arrays.")
        array = np.asarray(leaf)
        array = array.astype(NARROW.get(array.dtype.name, array.dtype), copy=False)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"cond dtype={array.dtype}: not a number. Give integer labels, or float conditions.")
        if array.shape[0] != count:
            raise ValueError(f"cond rows={array.shape[0]}: the set has {count} examples. Give one row per example.")
        return array

    return _map(column, cond)


def describe(cond: Any) -> str:
    """Return the description of conditions (see the module).

    Args:
        cond: tree of arrays ``[n, ...]``.

    Returns:
        JSON text, the same for every ``n``.

    >>> describe({"label": np.zeros(5, np.int32), "text": np.zeros((5, 3), np.float32)})
    '{"label": "int32[]", "text": "float32[3]"}'
    """
    text = lambda leaf: f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape[1:]))}]"
    return json.dumps(_map(text, cond), sort_keys=True)


def layout(description: str) -> tuple[Column, ...]:
    """Return the columns of a description, in the order of the leaves of the tree.

    Args:
        description: what ``describe`` returns.

    Returns:
        One ``Column`` per array.

    Raises:
        ValueError: text that is not a description.
    """
    columns, start = [], 0
    for leaf in jax.tree.leaves(_parse(description)):
        match = re.fullmatch(r"(\w+)\[([\d,]*)\]", leaf)
        if not match:
            raise ValueError(f"cond={leaf!r}: not a dtype with a shape. Remove the folder and build the set again.")
        dtype, shape = np.dtype(match[1]), tuple(int(n) for n in match[2].split(",") if n)
        stop = start + math.prod(shape) * dtype.itemsize
        columns.append(Column(start, stop, dtype, shape))
        start = stop
    return tuple(columns)


def row_bytes(description: str | None) -> int:
    """Return the number of bytes of the conditions of one example.

    Args:
        description: what ``describe`` returns, or ``None`` for a set without conditions.

    Returns:
        The number of bytes, 0 without conditions.

    >>> row_bytes('{"label": "int32[]", "text": "float32[3]"}'), row_bytes(None)
    (16, 0)
    """
    return max((column.stop for column in layout(description)), default=0) if description is not None else 0


def condition_rows(cond: Any, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes of the conditions of the examples ``start .. stop - 1``; nothing without conditions.

    Args:
        cond: tree of arrays ``[n, ...]``.
        start: first example.
        stop: example after the last.

    Yields:
        One ``bytes`` per example.
    """
    leaves = jax.tree.leaves(cond)
    examples = range(start, stop) if leaves else ()
    return (b"".join(np.asarray(leaf[i]).tobytes() for leaf in leaves) for i in examples)


def rebuild(description: str, leaves: list[Any]) -> Any:
    """Return the tree of a description with the given leaves.

    Args:
        description: what ``describe`` returns.
        leaves: one object per column of ``layout(description)``.

    Returns:
        The tree.

    >>> rebuild('["int32[]", null]', [7])
    (7, None)
    """
    return jax.tree.unflatten(jax.tree.structure(_parse(description)), leaves)


def _map(function, cond: Any) -> Any:
    if type(cond) is tuple:
        return tuple(_map(function, part) for part in cond)
    if type(cond) is dict and all(isinstance(name, str) for name in cond):
        return {name: _map(function, part) for name, part in cond.items()}
    return None if cond is None else function(cond)


def _parse(description: str) -> Any:
    as_tuples = lambda node: (
        tuple(map(as_tuples, node)) if isinstance(node, list)
        else {name: as_tuples(part) for name, part in node.items()} if isinstance(node, dict)
        else node
    )  # fmt: skip
    return as_tuples(json.loads(description))
