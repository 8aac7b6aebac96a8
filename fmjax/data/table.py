"""Columns of tables on disk as examples: what ``tfds`` and ``huggingface`` do alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmjax.checks import Refusal, nearest
from fmjax.data import splits
from fmjax.data.dataset import Dataset, Examples, dataset
from fmjax.data.decoding import decode_image, fit_image
from fmjax.data.images import scale_pixels
from fmjax.data.units import standardise as standardised
from fmjax.storage.untrusted import one_line

_ROWS = 1024  # rows read at a time


class Feature(NamedTuple):
    """What a table states of one column.

    Attributes:
        kind: ``"image"`` for image files, ``"array"`` for numbers, ``"label"`` for class labels, ``""`` for others.
        shape: the shape of one value; unknown sizes are ``None``.
        dtype: the dtype of the numbers.
        names: the names of the classes.
    """

    kind: str
    shape: tuple[int | None, ...] = ()
    dtype: Any = None
    names: tuple[str, ...] = ()


class TableRows:
    """Examples that are read from a table, and decoded, when they are needed.

    Attributes:
        fetch: returns the values of some rows.
        index: the rows that are seen.
        shape: ``(len(index), ...)``.
        from_bytes: whether the values are uint8 pixels, which are scaled to [-1, 1].
    """

    dtype = np.dtype(np.float32)

    def __init__(self, fetch: Callable[[list[int]], list], index: np.ndarray, shape: tuple[int, ...], from_bytes: bool):
        self.fetch, self.index, self.from_bytes = fetch, index, from_bytes
        self.shape, self.ndim = (len(index), *shape), len(shape) + 1

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows) -> np.ndarray:
        """Read the rows of a slice, or of indices ``[k]``."""
        values = self.read(rows)
        return scale_pixels(values) if self.from_bytes else values.astype(np.float32)

    def read(self, rows) -> np.ndarray:
        """Read rows as they are stored."""
        chosen = self.index[rows].tolist()
        values = self.fetch(chosen)
        for row, value in zip(chosen, values, strict=True):
            if np.shape(value) != self.shape[1:]:
                wrong = f"row {row} has the shape {list(np.shape(value))}, not {list(self.shape[1:])}"
                raise ValueError(f"x: {wrong}. Set size for images, or give examples of one shape.")
        return np.stack(values) if values else np.empty((0, *self.shape[1:]), np.float32)

    def select(self, rows: np.ndarray) -> TableRows:
        """Return some of the rows, on disk as well."""
        return TableRows(self.fetch, self.index[rows], self.shape[1:], self.from_bytes)

    def load(self) -> np.ndarray:
        """Read all rows into memory."""
        parts = [self.read(slice(i, i + _ROWS)) for i in range(0, len(self), _ROWS)]
        whole = np.concatenate(parts)
        return scale_pixels(whole) if self.from_bytes else whole.astype(np.float32)


def choose_columns(features: Mapping[str, Feature], x: str | None, y: str | None) -> tuple[str, str | None]:
    """Return the columns of the examples and of the conditions.

    Args:
        features: the columns of a table.
        x: the column of the examples; ``None`` takes the only column of images or, without images, of float arrays.
        y: the column of the conditions; ``None`` takes the only column of class labels, if there is one.

    Returns:
        The two names; ``None`` for no conditions.

    Raises:
        ValueError: for a column that does not exist or holds neither images nor numbers, or no clear choice.

    >>> choose_columns({"image": Feature("image"), "label": Feature("label")}, None, None)
    ('image', 'label')
    """
    floats = lambda f: f.kind == "array" and f.shape and np.dtype(f.dtype).kind == "f"
    images = [name for name, f in features.items() if f.kind == "image"]
    choices = images or [name for name, f in features.items() if floats(f)]
    for field, name in (("x", x), ("y", y)):
        if name is not None and (name not in features or not features[name].kind):
            wrong = (
                "is no column of images or numbers" if name in features else f"no such column{nearest(name, features)}"
            )
            raise Refusal(field, name, wrong, f"There are {one_line(', '.join(features), 100)}")
    if x is None and len(choices) != 1:
        names = one_line(", ".join(features), 100)
        raise Refusal("x", None, f"{len(choices)} columns could be the examples, of {names}", "Name the column")
    labels = [name for name, f in features.items() if f.kind == "label"]
    return x or choices[0], y or (labels[0] if len(labels) == 1 else None)


def examples_of(feature: Feature, *, size: int | None, channels: int | None) -> tuple[tuple[int, ...], bool, Callable]:
    """Return what the examples of a column are.

    Args:
        feature: the column.
        size: height and width of images; ``None`` keeps the size.
        channels: channels of images; ``None`` keeps 1, and takes 3 otherwise.

    Returns:
        The shape of one example, whether it is uint8 pixels, and the function that decodes a stored value.

    Raises:
        ValueError: for images of several sizes without ``size``, and for whole numbers.

    >>> examples_of(Feature("image", (None, None, 3)), size=8, channels=None)[:2]
    ((8, 8, 3), True)
    """
    if feature.kind == "image" or (np.dtype(feature.dtype) == np.uint8 and len(feature.shape) in (2, 3)):
        planes = channels or (1 if len(feature.shape) == 2 or feature.shape[-1:] == (1,) else 3)
        if size is None and None in feature.shape[:2]:
            raise Refusal("size", None, "the images have several sizes", "Set size to the height of the examples")
        shape = (size, size, planes) if size else (*feature.shape[:2], planes)
        decode = decode_image if feature.kind == "image" else fit_image
        return shape, True, lambda value: decode(value, size=size, channels=planes)
    if np.dtype(feature.dtype).kind != "f" or None in feature.shape or not feature.shape:
        stated = f"{np.dtype(feature.dtype).name} {list(feature.shape)}"
        raise ValueError(f"x: the column holds {stated}. Take a column of images, or of float arrays of one shape.")
    return feature.shape, False, np.asarray


def from_columns(
    parts: Mapping[str, tuple[TableRows, np.ndarray | None]],
    *,
    names: Sequence[str],
    validation: float,
    test: float,
    seed: int,
    standardise: bool,
    stream: bool,
    name: str,
) -> Dataset:
    """Return a data set of the columns of a table by split; missing splits are drawn from the training rows.

    Args:
        parts: examples and conditions by split, ``"train"`` among them.
        names: the names of the classes.
        validation: see ``splits.complete``.
        test: see ``splits.complete``.
        seed: see ``splits.complete``.
        standardise: see ``units.standardise``.
        stream: whether the examples stay on disk.
        name: the name of the data set.

    Returns:
        The data set.

    Raises:
        ValueError: as ``dataset`` raises, and for a table without training rows.

    >>> column = TableRows(lambda rows: [np.ones(3, np.float32)] * len(rows), np.arange(20), (3,), False)
    >>> options = dict(names=(), validation=0.1, test=0.1, seed=0, standardise=False, stream=True, name="ones")
    >>> from_columns({"train": (column, None)}, **options).train.count
    16
    """
    if "train" not in parts:
        raise ValueError(f"path: its splits are {one_line(', '.join(parts), 80) or 'none'}. Give a split named train.")
    kept = {split: parts[split] for split in ("train", "validation", "test") if split in parts}
    loaded = {split: Examples(x if stream else x.load(), y) for split, (x, y) in kept.items()}
    three = splits.complete(loaded, validation=validation, test=test, seed=seed)
    levels = 256 if parts["train"][0].from_bytes else None
    data = dataset(*three, levels=levels, classes=len(names) or None, name=name)._replace(labels=tuple(names))
    return standardised(data) if standardise else data
