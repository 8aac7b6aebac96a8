"""Standardise data for a network, and return its samples to the units of the data."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from fmjax.data.dataset import Dataset, Examples, Rows

_ROWS = 4096  # examples read at a time


class Units(NamedTuple):
    """The affine map between the units of the data and the units of the network: ``data = shift + scale network``.

    Attributes:
        shift: what is added, one number a column of a vector or a channel of a series.
        scale: what multiplies, of the same shape, positive.
        cond: the map of the conditions, or ``None`` for labels and for no conditions.
    """

    shift: np.ndarray
    scale: np.ndarray
    cond: Units | None = None

    def to_network(self, x: Any) -> np.ndarray:
        """Return data ``[..., C]`` in the units of the network, float32."""
        return ((np.asarray(x, np.float64) - self.shift) / self.scale).astype(np.float32)

    def to_data(self, x: Any) -> np.ndarray:
        """Return outputs of the network ``[..., C]`` in the units of the data, float32."""
        return (np.asarray(x, np.float64) * self.scale + self.shift).astype(np.float32)

    def to_record(self) -> dict[str, Any]:
        """Return the map as plain values."""
        cond = None if self.cond is None else self.cond.to_record()
        return {"shift": self.shift.tolist(), "scale": self.scale.tolist(), "cond": cond}


def from_record(record: Any) -> Units | None:
    """Return the map that ``Units.to_record`` wrote.

    Args:
        record: plain values, or ``None``.

    Returns:
        The map; ``None`` for ``None``.

    >>> from_record(Units(np.array([1.0]), np.array([2.0])).to_record()).to_data([[3.0]]).tolist()
    [[7.0]]
    """
    if record is None:
        return None
    shift, scale = (np.asarray(record[name], np.float64) for name in ("shift", "scale"))
    return Units(shift, scale, from_record(record["cond"]))


class Standardised:
    """Examples on disk that are standardised when they are read.

    Attributes:
        rows: the examples ``[n, ...]`` in the units of the data.
        units: the map.
        shape: the shape of ``rows``.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, rows: Rows, units: Units):
        self.rows, self.units, self.shape, self.ndim = rows, units, rows.shape, rows.ndim

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows) -> np.ndarray:
        """Read the rows of a slice, or of indices ``[k]``."""
        return self.units.to_network(self.rows[rows])


def measure_units(x: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the standard deviation of every column of vectors, or of every channel of series.

    Args:
        x: examples ``[n]``, ``[n, d]`` or ``[n, ..., C]``, in memory or on disk.

    Returns:
        Mean and standard deviation, float64, ``[]`` for ``[n]`` and otherwise of the last axis; the deviation of a
        constant column is 1.

    >>> measure_units(np.array([[0.0, 5.0], [2.0, 5.0]]))
    (array([1., 5.]), array([1., 1.]))
    """
    parts = lambda: (np.asarray(x[i : i + _ROWS], np.float64) for i in range(0, len(x), _ROWS))
    over = lambda a: tuple(range(max(1, a.ndim - 1)))
    sizes = np.shape(x)[1:-1] if len(np.shape(x)) > 1 else ()
    count = len(x) * int(np.prod(sizes))
    mean = sum(part.sum(over(part)) for part in parts()) / count
    variance = sum(((part - mean) ** 2).sum(over(part)) for part in parts()) / count
    spread = np.sqrt(variance)
    constant = spread <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
    return np.asarray(mean), np.where(constant, 1.0, spread)


def standardise(data: Dataset) -> Dataset:
    """Return a data set with columns of mean 0 and standard deviation 1 in its training examples.

    Float conditions are standardised, too. Labels and images stay as they are: images lie in [-1, 1].

    Args:
        data: the data set, in the units of the data.

    Returns:
        The data set in the units of the network, with ``units``, which samples undo.

    Raises:
        ValueError: for images, or for data that have units already.

    >>> from fmjax.data import two_moons
    >>> data = standardise(two_moons(train=64, validation=8, test=8))
    >>> bool(abs(data.train.x.mean()) < 1e-6), data.units.shift.shape
    (True, (2,))
    """
    if data.kind == "image" or data.units is not None:
        problem = "images lie in [-1, 1]" if data.kind == "image" else "these data are standardised already"
        raise ValueError(f"standardise=True: {problem}. Set standardise=False.")
    floats = data.train.cond is not None and not data.classes
    if floats and not isinstance(data.train.cond, np.ndarray):
        raise ValueError("standardise=True: the conditions are several arrays. Standardise the arrays yourself.")
    cond = Units(*measure_units(data.train.cond)) if floats else None
    units = Units(*measure_units(data.train.x), cond)

    def convert(examples: Examples) -> Examples:
        x = examples.x
        x = units.to_network(x) if isinstance(x, np.ndarray) else Standardised(x, units)
        return Examples(x, cond.to_network(examples.cond) if cond else examples.cond)

    splits = {name: convert(getattr(data, name)) for name in ("train", "validation", "test")}
    return data._replace(**splits, units=units)


def to_units(units: Units | None, x: Any, *, of: str, to: str) -> Any:
    """Return examples or conditions in other units; without units they stay as they are.

    Args:
        units: the map, or ``None``.
        x: examples or conditions ``[n, ...]``, or a pytree without units.
        of: ``"examples"`` or ``"conditions"``.
        to: ``"network"`` or ``"data"``.

    Returns:
        The converted values.

    >>> to_units(None, 3.0, of="examples", to="data")
    3.0
    """
    chosen = units if of == "examples" or units is None else units.cond
    if chosen is None or x is None:
        return x
    return jax.tree.map(chosen.to_network if to == "network" else chosen.to_data, x)
