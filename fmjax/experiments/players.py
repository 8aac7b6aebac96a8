"""Trajectories that a page can play: a film of images, or points that move."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fmjax.experiments import charts, examples
from fmjax.experiments.charts import PageFigure

FRAMES = 24  # times of a film
SIDE = 300.0  # width of the view of points


class Player(NamedTuple):
    """A trajectory with a slider over time.

    Attributes:
        still: the figure of the whole trajectory, which needs no script.
        frames: number of times.
        times: the index of each frame in the trajectory.
        total: number of times of the trajectory.
        film: frames of images side by side; ``None`` for points.
        points: for points, ``"x,y x,y ...;..."``: places of each frame in a square of 300 units; else empty.
    """

    still: PageFigure
    frames: int
    times: tuple[int, ...]
    total: int
    film: PageFigure | None
    points: str


def player(caption: str, x: np.ndarray) -> Player:
    """Return a trajectory in a form that the page plays.

    Args:
        caption: the caption.
        x: images ``[T, n, H, W, C]`` or points ``[T, n, 2]``.

    Returns:
        The player; its last frame is shown before the slider moves.

    >>> line = np.linspace(0, 1, 3)[:, None, None] * np.ones((1, 2, 2))
    >>> player("line", line).points.split(";")[1]
    '150.0,150.0 150.0,150.0'
    """
    still = examples.trajectory_figure(caption, x)
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), FRAMES)).round().astype(int))
    times, frames = tuple(int(k) for k in keep), x[keep]
    if x.ndim == 5:
        columns = -(-x.shape[1] // 2) if x.shape[1] > 3 else x.shape[1]
        sheets = [charts.image_grid(frame, columns=columns) for frame in frames]
        return Player(still, len(times), times, len(x), charts.strip(sheets, caption), "")
    low, high = frames.min((0, 1)), frames.max((0, 1))
    scale, middle = (SIDE - 20) / (float((high - low).max()) or 1.0), (low + high) / 2
    places = SIDE / 2 + scale * (frames - middle) * np.array([1, -1])
    text = ";".join(" ".join(f"{a:.1f},{b:.1f}" for a, b in frame) for frame in places)
    return Player(still, len(times), times, len(x), None, text)
