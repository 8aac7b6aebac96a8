"""Figures of a report: distances, losses, marginals, samples and trajectories."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fmjax.experiments import charts
from fmjax.experiments.charts import PageFigure
from fmjax.storage.images import check_finite_values

REFERENCE = "data"  # the family of rows of training data, which show the floor of a distance
COLUMNS = 16  # times shown of a trajectory
LINES = 16  # series or vectors drawn in one picture


class Row(NamedTuple):
    """One row of the table: a sampler, or the training data.

    Attributes:
        name: unique in the table.
        family: samplers that differ only in their number of steps have the same family. Rows of family ``"data"``
            compare training data with test data: their NFE is 0, and they are never the best.
        nfe: network evaluations per sample.
        corrections: corrections per sample.
        distances: (mean, standard error over seeds) by metric; the error is nan for one seed.
        control: whether the row shows the noise of a correction without the corrector.
    """

    name: str
    family: str
    nfe: int
    corrections: int
    distances: dict[str, tuple[float, float]]
    control: bool = False


def colours(rows: Iterable[Row]) -> dict[str, int | None]:
    """Return the index of a colour for every family.

    Args:
        rows: the rows of the table.

    Returns:
        An index into ``Theme.colours`` by family; a family with corrections has the index of the family without them,
        and the training data have none.
    """
    bases = list(dict.fromkeys(_base(row.family) for row in rows if row.family != REFERENCE))
    count = len(charts.LIGHT.colours)
    return {r.family: None if r.family == REFERENCE else bases.index(_base(r.family)) % count for r in rows}


def _base(family: str) -> str:
    """Return the family without corrections: ``"rk4"`` of ``"rk4 + corrections"``."""
    return family.split(" + ")[0]


def distance_chart(metric: str, rows: Sequence[Row], alt: str) -> PageFigure:
    """Draw a chart of one distance against NFE, one line per family.

    Args:
        metric: the distance.
        rows: the rows of the table, in order.
        alt: text for readers who do not see the chart.

    Returns:
        The figure; the training data are a horizontal line with a band of one standard error.
    """
    colour = colours(rows)
    bases = list(dict.fromkeys(_base(row.family) for row in rows if row.family != REFERENCE))
    rows = [row for row in rows if metric in row.distances and math.isfinite(row.distances[metric][0])]

    def draw(axes, theme):
        for family, members in itertools.groupby(rows, key=lambda row: row.family):
            nfe, mean, se, names = zip(*((r.nfe, *r.distances[metric], r.name) for r in members), strict=True)
            if family == REFERENCE:
                for level, error, name in zip(mean, np.nan_to_num(se), names, strict=True):
                    axes.axhline(level, color=theme.muted, linestyle=":", linewidth=1.4, label=charts.escaped(name))
                    axes.axhspan(level - error, level + error, color=theme.muted, alpha=0.18, linewidth=0)
                continue
            paint = theme.colours[colour[family]]
            # Corrected samplers differ in steps and in corrections: a line between them would have no meaning.
            corrected = family != _base(family)
            again = bases.index(_base(family)) // len(theme.colours)  # number of earlier families of this colour
            plain = {"marker": "o^vD"[again % 4], "linestyle": ("-", "--", "-.", ":")[again % 4]}
            style = {"linestyle": "", "marker": "s", "markerfacecolor": "none"} if corrected else plain
            axes.errorbar(nfe, mean, se, color=paint, linestyle="", capsize=2.5, linewidth=1.2)
            axes.plot(nfe, mean, color=paint, label=charts.escaped(family), markersize=5, linewidth=1.6, **style)
        axes.set_xscale("log")
        charts.value_scale(axes, [row.distances[metric][0] for row in rows])
        ticks: list[int] = []
        for nfe in sorted({row.nfe for row in rows if row.family != REFERENCE}):
            if not ticks or nfe >= 1.35 * ticks[-1]:  # closer labels would overlap
                ticks.append(nfe)
        axes.set_xticks(ticks, [str(nfe) for nfe in ticks])
        axes.minorticks_off()
        axes.set(xlabel="NFE (network evaluations per sample)", ylabel=charts.escaped(metric))

    return charts.chart(draw, metric, alt, size=(4.6, 3.7))


def loss_chart(name: str, step, loss) -> PageFigure:
    """Draw a chart of one training loss against the step, on a log axis, with a moving mean.

    Args:
        name: the network that is trained.
        step: steps ``[n]``.
        loss: losses ``[n]``.

    Returns:
        The figure.
    """
    step, loss = np.asarray(step, np.float64), np.asarray(loss, np.float64)
    fine = np.isfinite(loss)
    step, loss = step[fine], loss[fine]
    smooth = moving_mean(loss, max(1, len(loss) // 40))

    def draw(axes, theme):
        axes.plot(step, loss, color=theme.colours[1], alpha=0.3, linewidth=0.8)
        axes.plot(step, smooth, color=theme.colours[1], linewidth=1.8, marker="." if len(step) < 20 else None)
        charts.value_scale(axes, loss, log=True)
        axes.set(xlabel="step", ylabel="loss")

    left_out = int((~fine).sum())
    remark = f"{left_out} non-finite values are left out." if left_out else ""
    alt = f"Chart of the training loss of {name}, without finite values."
    if len(step):
        alt = (
            f"Chart of the training loss of {name}, log axis: from {smooth[0]:.3g} at step {step[0]:g} "
            f"to {smooth[-1]:.3g} at step {step[-1]:g}, smoothed."
        )
    return charts.chart(draw, name, alt, size=(4.6, 2.9), remark=remark)


def gap_chart(lines: dict[str, Sequence]) -> PageFigure:
    """Draw a chart of the distance between ``p_n`` and ``q_n`` against time.

    Args:
        lines: ``(t_n, distance, standard error)`` by name of the line, each ``[n]``.

    Returns:
        The figure.
    """
    caption = "Distance between the forward marginals p_n and the backward marginals q_n"
    return _over_time(lines, caption, "distance of $p_n$ and $q_n$", "the distance between p_n and q_n")


def influence_chart(lines: dict[str, Sequence]) -> PageFigure:
    """Draw a chart of the distance of samples that are corrected once, against the time of the correction.

    Args:
        lines: ``(t_n, distance, standard error)`` by name of the line, each ``[n]``.

    Returns:
        The figure.
    """
    caption = "Effect of a single correction, by the time of the correction"
    return _over_time(lines, caption, "distance of the samples", "the distance of samples corrected once")


def _over_time(lines: dict[str, Sequence], caption: str, label: str, what: str) -> PageFigure:
    lines = {name: [np.asarray(a, np.float64) for a in gap] for name, gap in lines.items()}

    def draw(axes, theme):
        for i, (name, (t, distance, se)) in enumerate(lines.items()):
            paint = theme.colours[i % len(theme.colours)]
            style = {"color": paint, "marker": "o", "markersize": 4, "capsize": 2.5, "linewidth": 1.6}
            axes.errorbar(t, distance, se, label=charts.escaped(name), **style)
        charts.value_scale(axes, np.concatenate([distance for _, distance, _ in lines.values()]))
        axes.set(xlabel="time $t_n$ (0: noise, 1: data)", ylabel=label)

    ends = "; ".join(
        f"{name} from {d[0]:.3g} at t = {t[0]:g} to {d[-1]:.3g} at t = {t[-1]:g}" for name, (t, d, _) in lines.items()
    )
    return charts.chart(draw, caption, f"Chart of {what} against time: {ends}.", size=(6.4, 3.6))


def sample_figure(caption: str, x: np.ndarray, clouds: Sequence[np.ndarray]) -> PageFigure:
    """Draw samples by their kind.

    Args:
        caption: the caption.
        x: images ``[n, H, W, C]`` as a grid, points ``[n, 2]`` as a scatter plot, series ``[n, L, C]`` and vectors
            ``[n, d]`` as lines.
        clouds: all sets of points of a page, which are drawn in the same frame.

    Returns:
        The figure.
    """
    if x.ndim == 4:
        n, height, width = x.shape[:3]
        return charts.contact_sheet(
            x, None, caption, f"{n} samples of {width} by {height} pixels in a grid: {caption}."
        )
    if x.ndim == 3 or x.shape[1] != 2:
        return _lines(caption, x)
    # The same frame for all sets of points, so that they can be compared; a few outliers do not change the frame.
    low, high = (np.array([np.percentile(c, q, axis=0) for c in clouds]) for q in (1, 99))
    low, high = low.min(0), high.max(0)
    margin = 0.15 * (high - low).max() or 1.0

    def draw(axes, theme):
        axes.scatter(*x.T, s=5, color=theme.colours[1], alpha=0.5, linewidths=0)
        axes.set_aspect("equal")
        axes.set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin))

    outside = int(((x < low - margin) | (x > high + margin)).any(1).sum())
    remark = f"{outside} of {len(x)} points lie outside the frame." if outside else ""
    return charts.chart(draw, caption, f"Scatter plot of {len(x)} points: {caption}.", size=(4, 4), remark=remark)


def _lines(caption: str, x: np.ndarray) -> PageFigure:
    """Draw series with one line per example and one colour per channel; vectors as series over their entries."""
    series, vectors = (x[..., None], True) if x.ndim == 2 else (x, False)
    n, length, channels = series.shape

    def draw(axes, theme):
        for channel in range(min(channels, len(theme.colours))):
            paint = theme.colours[channel]
            marker = {"marker": "o", "markersize": 2.5} if vectors and length <= 64 else {}
            axes.plot(series[:LINES, :, channel].T, color=paint, alpha=0.35, linewidth=0.9, **marker)
        axes.set(xlabel="entry" if vectors else "time step")

    what = f"vectors of {length} entries" if vectors else f"series of {length} steps and {channels} channels"
    remark = f"The first {LINES} of {n}." if n > LINES else ""
    return charts.chart(draw, caption, f"{n} {what} as lines: {caption}.", size=(4.6, 3.0), remark=remark)


def trajectory_figure(caption: str, x: np.ndarray) -> PageFigure:
    """Draw trajectories by the kind of the examples.

    Args:
        caption: the caption.
        x: images ``[T, n, H, W, C]`` as a grid with one example per row, or points ``[T, n, 2]`` as lines in the plane.

    Returns:
        The figure.
    """
    times, n = x.shape[:2]
    if x.ndim == 5:
        keep = np.unique(np.linspace(0, times - 1, min(times, COLUMNS)).round().astype(int))
        alt = f"{n} trajectories, one per row, at {len(keep)} times from left to right: {caption}."
        thinned = f"; {len(keep)} of {times} times" if len(keep) < times else ""
        remark = f"One example per row, time from left to right{thinned}."
        return charts.contact_sheet(x[keep].swapaxes(0, 1).reshape(-1, *x.shape[2:]), len(keep), caption, alt, remark)

    def draw(axes, theme):
        axes.plot(*x.transpose(2, 0, 1), color=theme.muted, alpha=0.35, linewidth=0.8)
        for i, label in ((0, "start"), (-1, "end")):
            axes.scatter(*x[i].T, s=10, color=theme.colours[i], zorder=3, linewidths=0, label=label)
        axes.set_aspect("equal", adjustable="datalim")

    alt = f"{n} trajectories of {times} points as lines in the plane: {caption}."
    return charts.chart(draw, caption, alt, size=(4.8, 4.8))


def moving_mean(y: np.ndarray, half: int) -> np.ndarray:
    """Return the moving mean of a series.

    Args:
        y: values ``[n]``.
        half: largest distance, in places, of the values in a mean; the means at the ends have fewer values.

    Returns:
        Means ``[n]``.
    """
    i, total = np.arange(len(y)), np.concatenate([[0.0], np.cumsum(y)])
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(y))
    return (total[high] - total[low]) / (high - low)


def check_rows(name: str, x: np.ndarray) -> None:
    """Refuse an array that is neither vectors nor series of finite values.

    Args:
        name: name of the array, for messages.
        x: the array, ``[n, d]`` or ``[n, L, C]``.

    Raises:
        ValueError: another shape, or non-finite values.
    """
    if x.ndim not in (2, 3) or 0 in x.shape:
        raise ValueError(f"{name}={list(x.shape)}: not a kind of samples. Give [n, d], [n, L, C] or [n, H, W, C].")
    check_finite_values(name, x)


def check_points(name: str, x: np.ndarray, shape: str) -> None:
    """Refuse an array that does not hold finite points in the plane.

    Args:
        name: name of the array, for messages.
        x: the array, ``[..., 2]``.
        shape: the expected shape in words, for messages.

    Raises:
        ValueError: another shape, or non-finite values.
    """
    if x.shape[-1] != 2 or 0 in x.shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; points are {shape}, images have a channel axis of 1 or 3")
    check_finite_values(name, x)
