"""Pictures of samples by the kind of data: a grid of images, a scatter plot of points, lines of series."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax.storage import files, images


class PictureKind(NamedTuple):
    """How samples of one kind of data are shown.

    Attributes:
        write: ``write(path, samples)`` writes a PNG file.
        count: the number of samples that make a good picture.
    """

    write: Callable[[Path, np.ndarray], Any]
    count: int


def writer_for(shape: tuple[int, ...]) -> PictureKind | None:
    """Return how samples of one shape are shown.

    Args:
        shape: the shape of one example: ``(H, W, C)`` with ``C`` 1 or 3, ``(2,)`` or ``(L, C)``.

    Returns:
        The picture, or ``None`` for vectors and other shapes.

    >>> writer_for((28, 28, 1)).count, writer_for((2,)).count, writer_for((64, 1)).count, writer_for((5,))
    (36, 1024, 8, None)
    """
    if len(shape) == 3 and shape[-1] in (1, 3):
        return PictureKind(images.save_png, 36)
    if tuple(shape) == (2,):
        return PictureKind(write_scatter, 1024)
    return PictureKind(write_lines, 8) if len(shape) == 2 else None


def write_scatter(path: str | Path, points: np.ndarray) -> None:
    """Write a scatter plot of points in the plane as a PNG file.

    Args:
        path: the file, in a folder that exists.
        points: ``[n, 2]``; points that are not finite are left out, and counted in the title.
    """
    points = np.asarray(points, np.float64)
    finite = points[np.isfinite(points).all(1)]
    figure, (axes,) = _figure(1)
    axes.plot(*finite.T, ".", markersize=2, alpha=0.6)
    axes.set_aspect("equal", adjustable="datalim")
    if len(finite) < len(points):
        axes.set_title(f"{len(points) - len(finite)} of {len(points)} samples are not finite", fontsize=8)
    _write(path, figure)


def write_lines(path: str | Path, series: np.ndarray) -> None:
    """Write line plots of series as a PNG file: one row a series, one line a channel.

    Args:
        path: the file, in a folder that exists.
        series: ``[n, L, C]``.
    """
    series = np.asarray(series, np.float64)
    figure, rows = _figure(len(series))
    for axes, one_series in zip(rows, series, strict=True):
        axes.plot(one_series, linewidth=0.8)
        axes.tick_params(labelsize=6)
    _write(path, figure)


def _figure(rows: int):
    """Return a figure, drawn without a display, and its axes below one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4) if rows == 1 else (6, rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0]


def _write(path: str | Path, figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    files.write_bytes(path, buffer.getvalue())
