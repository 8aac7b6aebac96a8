"""A distance of samples to reference examples, and the metrics that suit a kind of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Metric(NamedTuple):
    """A distance of samples to fixed reference examples.

    Attributes:
        name: the name in tables and reports.
        distance: ``distance(samples)``, samples ``[n, ...]`` to a number; the smaller the better, for equal
            distributions the floor of as many samples. With a teacher ``distance(samples, theirs)``.
        facts: what a reader needs to compare two values of it, in words.
        least: the least number of samples for which the number means something.
        teacher: the name of a sampler whose samples of the same noise are ``theirs``; ``None`` for a distance to data.
    """

    name: str
    distance: Callable[..., float]
    facts: dict[str, str] = {}
    least: int = 2
    teacher: str | None = None


@runtime_checkable
class ExamplesLike(Protocol):
    """Examples of one split, such as ``data.Examples``.

    Attributes:
        x: the examples ``[n, ...]``.
        cond: their conditions, or ``None``.
    """

    x: Any
    cond: Any


@runtime_checkable
class DataLike(Protocol):
    """A data set, such as ``data.Dataset``.

    Attributes:
        train: the examples that features are trained on.
        kind: ``"image"``, ``"points"``, ``"vector"`` or ``"series"``.
        levels: the number of grey levels of a pixel, or ``None``.
        classes: the number of label classes, 0 for data without labels.
    """

    train: Any
    kind: str
    levels: int | None
    classes: int


def defaults(kind: str, classes: int = 0) -> tuple[str, ...]:
    """Return the names of the metrics that suit a kind of data.

    Args:
        kind: ``"image"``, ``"points"``, ``"vector"`` or ``"series"``.
        classes: the number of label classes, 0 for data without labels.

    Returns:
        Names of factories of ``fmjax.metrics``, the most telling first.

    >>> defaults("points"), defaults("image", classes=10)
    (('sliced_w2_to', 'energy_to'), ('fd_small_to', 'sliced_w2_to', 'energy_to'))
    """
    general = ("sliced_w2_to", "energy_to")
    if kind != "image":
        return general
    return ("fd_small_to" if classes > 1 else "fd_random_to", *general)
