"""The data set: examples to train on, to choose settings by and to report on, checked once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from fmjax.checks import Range, check_hints
from fmjax.types import Cond

KINDS = ("image", "points", "vector", "series")
Count = Annotated[int, Range(2, 1e8)]  # the number of examples in one split
Part = Annotated[float, Range(0, 1, open_low=True, open_high=True)]  # the fraction of the examples in one split

Labels = Annotated[int, Range(1, 1e6)]  # the number of label classes

_ROWS = 4096  # examples read at a time


@runtime_checkable
class Rows(Protocol):
    """Examples that can be indexed: an array ``[n, ...]``, or a file whose rows are read when they are needed.

    Attributes:
        shape: ``(n, ...)``.
        dtype: the floating dtype of the rows that indexing returns.
        ndim: ``len(shape)``.
    """

    shape: Any
    dtype: Any
    ndim: Any

    def __len__(self) -> int: ...

    def __getitem__(self, rows, /) -> Any:
        """Return the examples of the indices ``rows: [k]``, or of a slice, as a new array ``[k, ...]``."""


class Examples(NamedTuple):
    """Examples of one split, with their conditions.

    Attributes:
        x: the examples ``[n, ...]``, floating; images are ``[n, H, W, C]`` in [-1, 1].
        cond: integer labels ``[n]``, floats ``[n, ...]``, a pytree of arrays ``[n, ...]``, or ``None`` for no
            condition.
    """

    x: Rows
    cond: Cond = None

    @property
    def count(self) -> int:
        """The number of examples."""
        return len(self.x)


class Dataset(NamedTuple):
    """A data set in three disjoint splits. ``dataset`` makes one from arrays and checks them.

    Attributes:
        train: the examples to train on.
        validation: the examples to choose settings by (strengths of correctors, checkpoints); never trained on.
        test: the examples to report distances to; never trained on and never chosen by.
        kind: ``"image"`` (an example is ``[H, W, C]``), ``"points"`` (``[2]``), ``"vector"`` (``[d]``) or ``"series"``
            (``[L, C]``).
        levels: the number of grey levels of a pixel (8-bit images: 256), or ``None`` for continuous values.
        classes: the number of label classes if the conditions are integer labels, else 0.
        name: the name of the data set.
        labels: the names of the classes, where they have names.
        units: how the examples were standardised (``units.Units``), which samples undo; ``None`` for examples in
            their own units.
    """

    train: Examples
    validation: Examples
    test: Examples
    kind: str
    levels: int | None = None
    classes: int = 0
    name: str = ""
    labels: tuple[str, ...] = ()
    units: Any = None


def kind_of(shape: tuple[int, ...]) -> str:
    """Return the kind of data of one example's shape.

    Args:
        shape: the shape of one example, without the axis of examples.

    Returns:
        ``"image"`` for ``(H, W, C)``, ``"points"`` for ``(2,)``, ``"vector"`` for other ``(d,)`` and ``"series"`` for
        ``(L, C)``.

    Raises:
        ValueError: for a shape of no axis or of more than three axes.

    >>> kind_of((28, 28, 1)), kind_of((2,)), kind_of((16,)), kind_of((128, 3))
    ('image', 'points', 'vector', 'series')
    """
    kinds = {1: "vector", 2: "series", 3: "image"}
    if tuple(shape) == (2,):
        return "points"
    if len(shape) not in kinds:
        raise ValueError(
            f"shape={tuple(shape)}: an example has 1 to 3 axes. Give (d,), (L, C) or (H, W, C), each example alone."
        )
    return kinds[len(shape)]


def dataset(
    train: Examples,
    validation: Examples,
    test: Examples,
    *,
    levels: Annotated[int, Range(low=2)] | None = None,
    classes: Labels | None = None,
    name: str = "",
) -> Dataset:
    """Return a data set of three splits after a check of every value.

    The check reads all rows, on disk too, unless the rows state ``from_bytes = True``: they are scaled from uint8 when
    they are read, so that they are finite and in [-1, 1]. ``Dataset(...)`` itself checks nothing.

    Args:
        train: the examples to train on, at least 2, as in every split.
        validation: the examples to choose settings by.
        test: the examples to report on.
        levels: the number of grey levels of a pixel, or ``None`` for continuous values.
        classes: the number of label classes, where labels are integers ``[n]``; by default the largest label plus one.
        name: the name of the data set.

    Returns:
        The data set; its ``kind`` follows from the shape of one example.

    Raises:
        ValueError: for values that are not finite (naming the split and the row), examples that are not floating or
            of different shapes, images outside [-1, 1], conditions of another length or structure, labels out of range,
            and splits of fewer than 2 examples.

    >>> import numpy as np
    >>> x, y = np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2), np.array([0, 1, 0, 1, 0, 1])
    >>> data = dataset(Examples(x[:2], y[:2]), Examples(x[2:4], y[2:4]), Examples(x[4:], y[4:]))
    >>> data.kind, data.classes, data.train.count
    ('points', 2, 2)
    """
    check_hints(dataset, {"levels": levels, "classes": classes})
    splits = {"train": train, "validation": validation, "test": test}
    for split, examples in splits.items():
        _check_examples(split, examples)
        if examples.x.shape[1:] != train.x.shape[1:]:
            raise ValueError(
                f"{split}.x=[{_sizes(examples.x.shape)}]: its examples differ in shape from train.x, "
                f"[{_sizes(train.x.shape)}]. Give examples of one shape in all splits."
            )
    kind = kind_of(train.x.shape[1:])
    if kind == "image":
        _check_pixels(splits)
    return Dataset(train, validation, test, kind, levels, _classes(splits, classes), name)


def is_labels(cond: Cond) -> bool:
    """Return whether conditions are integer labels ``[n]``.

    Args:
        cond: conditions as in ``Examples.cond``.

    Returns:
        ``True`` for one integer array of one axis.

    >>> is_labels(np.array([0, 2, 1])), is_labels(np.array([0.5, 1.0])), is_labels(None)
    (True, False, False)
    """
    return isinstance(cond, (np.ndarray, jax.Array)) and np.issubdtype(cond.dtype, np.integer) and cond.ndim == 1


def check_conditions(field: str, cond: Cond, count: int) -> None:
    """Check that conditions are numbers, finite, and one for each example.

    Args:
        field: the name of the conditions, for the error.
        cond: conditions as in ``Examples.cond``.
        count: the number of examples.

    Raises:
        ValueError: for conditions of another length, of another type or with a value that is not finite.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(cond):
        name, leaf = field + jax.tree_util.keystr(path), np.asarray(leaf)
        if leaf.shape[:1] != (count,):
            raise ValueError(
                f"{name}=[{_sizes(leaf.shape)}]: there are {count} examples. Give an array with one row an example."
            )
        if leaf.dtype.kind not in "biuf":
            raise ValueError(f"{name}={leaf.dtype}: conditions are integer labels or floats. Convert them first.")
        row = first_not_finite(leaf)
        if row is not None:
            raise ValueError(f"{name}: row {row} is not finite. Repair or remove this example.")


def _check_examples(split: str, examples: Examples) -> None:
    x = examples.x
    if not (hasattr(x, "dtype") and getattr(x, "ndim", 0)):
        raise ValueError(f"{split}.x={type(x).__name__}: not an array of examples. Give an array [n, ...].")
    where = f"{split}.x={np.dtype(x.dtype).name} [{_sizes(x.shape)}]"
    if not np.issubdtype(x.dtype, np.floating):
        advice = "x / 127.5 - 1 scales uint8 images" if x.dtype == np.uint8 else "x.astype(np.float32)"
        raise ValueError(f"{where}: the examples are not floating. Convert them first ({advice}).")
    if len(x) < 2:
        raise ValueError(f"{where}: a split needs at least 2 examples. Give more, or another split.")
    row = first_not_finite(x)
    if row is not None:
        raise ValueError(f"{where}: row {row} has a value that is not finite. Repair or remove this example.")
    check_conditions(f"{split}.cond", examples.cond, len(x))


def _check_pixels(splits: dict[str, Examples]) -> None:
    shape = splits["train"].x.shape
    if shape[1] in (1, 3, 4) and shape[2] == shape[3] > 4:
        advice = "images are [n, H, W, C]. Give x.transpose(0, 2, 3, 1)"
        raise ValueError(f"train.x=[{_sizes(shape)}]: the channels come first; {advice}.")
    lows, highs = zip(*[_range(examples.x) for examples in splits.values()], strict=True)
    low, high = min(lows), max(highs)
    if low >= -1 and high <= 1 and not (low >= 0 and high > 0):
        return
    if low >= 0:
        advice = "2 * x - 1" if high <= 1 else "x / 127.5 - 1" if high <= 255 else f"2 * x / {high:g} - 1"
    else:
        advice = f"x / {max(-low, high):g}"
    raise ValueError(f"train.x in [{low:g}, {high:g}]: images lie in [-1, 1]. Scale all splits alike: {advice}.")


def _classes(splits: dict[str, Examples], classes: int | None) -> int:
    """Check that the splits have conditions of one structure, and return the number of label classes."""
    form = lambda cond: jax.tree.map(lambda leaf: (leaf.shape[1:], np.dtype(leaf.dtype).kind), cond)
    conditions = {split: examples.cond for split, examples in splits.items()}
    for split, cond in conditions.items():
        if form(cond) != form(conditions["train"]):
            raise ValueError(f"{split}.cond: its form differs from train.cond. Give conditions of one form, or none.")
    cond = conditions["train"]
    if not is_labels(cond):
        if isinstance(cond, (np.ndarray, jax.Array)) and np.issubdtype(cond.dtype, np.integer):
            raise ValueError(f"train.cond=[{_sizes(cond.shape)}]: integer labels have one axis. Give labels [n].")
        if classes:
            raise ValueError(f"classes={classes}: the conditions are not integer labels [n]. Leave classes out.")
        return 0
    low, high = min(int(y.min()) for y in conditions.values()), max(int(y.max()) for y in conditions.values())
    count = high + 1 if classes is None else classes
    if low >= 0 and classes is None:
        check_hints(dataset, {"classes": count})
    for split, labels in conditions.items():
        wrong = np.flatnonzero((np.asarray(labels) < 0) | (np.asarray(labels) >= count))
        if len(wrong):
            raise ValueError(
                f"{split}.cond={int(labels[wrong[0]])} at row {wrong[0]}: labels lie in 0..{count - 1}. "
                f"The labels are {low}..{high}; correct them, or set classes."
            )
    return count


def first_not_finite(x: Rows) -> int | None:
    """Return the first row with a value that is not finite, or ``None``.

    Args:
        x: examples or conditions ``[n, ...]``.

    Returns:
        The number of the row.
    """
    for start, part in _parts(x):
        finite = np.isfinite(part).reshape(len(part), -1).all(1)
        if not finite.all():
            return start + int(np.flatnonzero(~finite)[0])
    return None


def _range(x: Rows) -> tuple[float, float]:
    ranges = np.array([(part.min(), part.max()) for _, part in _parts(x)])
    return float(ranges[:, 0].min()), float(ranges[:, 1].max())


def _parts(x: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """Yield ``(first row, rows)``, a part at a time; of rows made from bytes the first row only."""
    stop = 1 if getattr(x, "from_bytes", False) else len(x)
    for start in range(0, stop, _ROWS):
        yield start, np.asarray(x[start : min(start + _ROWS, stop)])


def _sizes(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
