"""Three splits of examples that come without them, and one line that says what a data set is."""

from __future__ import annotations

import numpy as np

from fmjax.data.dataset import Dataset, Examples, Rows, first_not_finite
from fmjax.keys import generator


def divide(x: Rows, y: np.ndarray | None, *, validation: float, test: float, seed: int) -> list[Examples]:
    """Split examples at random into training, validation and test examples.

    Args:
        x: the examples ``[n, ...]``, an array, or rows on disk with a method ``select(rows)``.
        y: their conditions ``[n, ...]``, or ``None``.
        validation: the fraction for validation; 0 for no such split.
        test: the fraction for testing; 0 for no such split.
        seed: the seed of the split.

    Returns:
        The three splits, each in the order of ``x``.

    Raises:
        ValueError: for a split of fewer than two examples, conditions of another length, or examples that are not
            finite.

    >>> [part.count for part in divide(np.zeros((40, 2)), None, validation=0.1, test=0.2, seed=0)]
    [28, 4, 8]
    """
    counts = round(validation * len(x)), round(test * len(x))
    needed = [count for count, fraction in zip(counts, (validation, test), strict=True) if fraction]
    if min([*needed, len(x) - sum(counts)]) < 2:
        raise ValueError(
            f"validation={validation}, test={test}: of {len(x)} examples a split has fewer than 2. Change them."
        )
    if y is not None and len(y) != len(x):
        raise ValueError(f"y=[{len(y)}]: there are {len(x)} examples. Give one condition an example.")
    row = first_not_finite(x)
    if row is not None:
        raise ValueError(f"x=[{len(x)}]: row {row} has a value that is not finite. Repair or remove this example.")
    order = generator(seed).permutation(len(x))
    held_out, tested, trained = (np.sort(part) for part in np.split(order, np.cumsum(counts)))
    return [take(x, y, part) for part in (trained, held_out, tested)]


def take(x: Rows, y: np.ndarray | None, rows: np.ndarray) -> Examples:
    """Return some examples; those on disk stay there.

    Args:
        x: the examples ``[n, ...]``.
        y: their conditions, or ``None``.
        rows: the rows ``[k]``.

    Returns:
        The examples ``[k, ...]``.
    """
    chosen = x[rows] if isinstance(x, np.ndarray) else x.select(rows)
    return Examples(chosen, None if y is None else y[rows])


def complete(splits: dict[str, Examples], *, validation: float, test: float, seed: int) -> list[Examples]:
    """Return three splits; the splits that do not exist are drawn from the training examples.

    Args:
        splits: the existing splits by name, ``"train"`` among them.
        validation: the fraction of the training examples for a missing validation split.
        test: the fraction for a missing test split.
        seed: the seed of the draw.

    Returns:
        Training, validation and test examples.

    >>> whole = Examples(np.zeros((40, 2)))
    >>> [part.count for part in complete({"train": whole, "test": whole}, validation=0.1, test=0.1, seed=0)]
    [36, 4, 40]
    """
    parts = {"validation": validation, "test": test}
    missing = {name: 0.0 if name in splits else fraction for name, fraction in parts.items()}
    if not any(missing.values()):
        return [splits[name] for name in ("train", "validation", "test")]
    train, *drawn = divide(*splits["train"], seed=seed, **missing)
    return [train, *(splits.get(name, part) for name, part in zip(parts, drawn, strict=True))]


def describe_data(data: Dataset) -> str:
    """Return one line about a data set: its examples, splits, conditions and units.

    Args:
        data: the data set.

    Returns:
        The line, without the name.

    >>> from fmjax.data import two_moons
    >>> describe_data(two_moons(train=8, validation=4, test=4, labels=True))
    'points [2]; 8 for training, 4 for validation, 4 for testing; labels 0..1'
    """
    sizes = ", ".join(map(str, data.train.x.shape[1:]))
    counts = f"{data.train.count} for training, {data.validation.count} for validation, {data.test.count} for testing"
    parts = [f"{data.kind} [{sizes}]", counts]
    if data.classes:
        names = ", ".join(f"{i} {name:.20}" for i, name in enumerate(data.labels[:8]))
        more = ", ..." if len(data.labels) > 8 else ""
        parts.append(f"labels 0..{data.classes - 1}" + (f" ({names}{more})" if names else ""))
    elif data.train.cond is not None:
        parts.append("conditions are arrays")
    if data.units is not None:
        parts.append("standardised by its training examples, which samples undo")
    return "; ".join(parts)
