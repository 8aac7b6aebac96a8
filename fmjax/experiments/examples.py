"""Figures of examples: samples, trajectories, differences, nearest training examples, marginals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmjax.experiments import charts
from fmjax.experiments.charts import PageFigure
from fmjax.storage.images import check_finite_values

COLUMNS = 16  # times shown of a trajectory
LINES = 16  # series or vectors drawn in one picture
ENTRIES = 4  # entries of vectors in a plot of pairs
LEAST = 0.02  # scale of a picture of differences: a few levels of 256; smaller differences stay grey
ARROWS = 150  # points whose differences are drawn
PAIRS = 8  # examples beside their differences or nearest training examples


def sample_figure(
    caption: str, x: np.ndarray, clouds: Sequence[np.ndarray], data: np.ndarray | None = None, *, side: float = 4.0
) -> PageFigure:
    """Draw samples by their kind.

    Args:
        caption: the caption.
        x: images ``[n, H, W, C]`` as a grid, points ``[n, 2]`` as a scatter plot, series ``[n, L, C]`` as lines, and
            vectors ``[n, d]`` as scatter plots of pairs of entries.
        clouds: all sets of points of a page, which are drawn in the same frame.
        data: examples of the data, which are drawn behind vectors.
        side: width and height of a scatter plot of points, in units of 100 pixels.

    Returns:
        The figure.
    """
    if x.ndim == 4:
        n, height, width = x.shape[:3]
        return charts.contact_sheet(
            x, None, caption, f"{n} samples of {width} by {height} pixels in a grid: {caption}."
        )
    if x.ndim == 3 or x.shape[1] == 1:
        return _lines(caption, x)
    if x.shape[1] > 2:
        return _pairs(caption, x, x if data is None else data)
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
    return charts.chart(draw, caption, f"Scatter plot of {len(x)} points: {caption}.", size=(side, side), remark=remark)


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


def _pairs(caption: str, x: np.ndarray, data: np.ndarray) -> PageFigure:
    """Draw vectors as scatter plots of all pairs of the first entries, and a histogram of each entry."""
    d = min(x.shape[1], ENTRIES)
    low, high = np.percentile(data, 0.5, axis=0), np.percentile(data, 99.5, axis=0)
    low, high = low - 0.2 * (high - low) - 1e-3, high + 0.2 * (high - low) + 1e-3

    def draw(every, theme):
        for i, j in np.ndindex(d, d):
            axes = every[i, j]
            if j > i:
                axes.set_axis_off()
            elif i == j:
                bins = np.linspace(low[i], high[i], 25)
                for values, paint in ((data, theme.muted), (x, theme.colours[1])):
                    axes.hist(values[:, i], bins, density=True, histtype="step", color=paint, linewidth=1)
                axes.set_yticks([])
            else:
                for values, paint, strong in ((data, theme.muted, 0.35), (x, theme.colours[1], 0.5)):
                    axes.scatter(values[:, j], values[:, i], s=3, color=paint, alpha=strong, linewidths=0)
                axes.set(xlim=(low[j], high[j]), ylim=(low[i], high[i]))
            if i == d - 1:
                axes.set_xlabel(f"entry {j}")
            if j == 0 and i:
                axes.set_ylabel(f"entry {i}")

    n, entries = x.shape
    alt = f"Scatter plots of the pairs of {d} of {entries} entries, {n} vectors over the data: {caption}."
    remark = f"The first {d} of {entries} entries; grey: data." if d < entries else "Grey: data."
    return charts.chart(draw, caption, alt, size=(4.6, 4.6), remark=remark, panels=(d, d))


def difference_figure(name: str, baseline: str, x: np.ndarray, y: np.ndarray) -> PageFigure:
    """Draw what a correction changes: samples with and without it, from the same noise, and their differences.

    Args:
        name: the corrected sampler.
        baseline: the sampler without the correction.
        x: samples with the correction, ``[n, ...]``.
        y: samples without the correction, of the same noise.

    Returns:
        The figure: for images three rows (without, with, difference); for points arrows; else lines of differences.
    """
    caption, size = f"{name} minus {baseline}", float(np.sqrt(np.mean((x - y) ** 2)))
    remark, alt = f"Root mean square difference: {size:.3g}.", f"Differences of samples from the same noise: {caption}."
    if x.ndim == 4:
        x, y = x[:PAIRS], y[:PAIRS]
        scale = max(float(np.abs(x - y).max()), LEAST)
        sheet = np.concatenate([y, x, (x - y) / scale])
        rows = f"Rows: without, with, difference (grey: none; black and white: ∓{scale:.2g}). {remark}"
        return charts.contact_sheet(sheet, len(x), caption, f"{alt} {remark}", rows)
    if x.ndim == 2 and x.shape[1] == 2:
        x, y = x[:ARROWS], y[:ARROWS]
        move = x - y

        def draw(axes, theme):
            style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.004}
            axes.quiver(*y.T, *move.T, color=theme.colours[1], **style)
            axes.set_aspect("equal", adjustable="datalim")
            axes.update_datalim(np.concatenate([x, y]))
            axes.autoscale_view()

        return charts.chart(draw, caption, alt, size=(4, 4), remark=f"Arrows from without to with. {remark}")
    return _lines(caption, x - y)._replace(alt=f"{alt} {remark}", remark=remark)


def nearest_training(x: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest training example of each example, by Euclidean distance.

    Args:
        x: examples ``[n, ...]``.
        train: training examples ``[m, ...]``.

    Returns:
        Indices ``[n]`` and distances ``[n]``.

    >>> nearest_training(np.array([[0.9, 0.0]]), np.array([[0.0, 0.0], [1.0, 0.0]]))[0]
    array([1])
    """
    flat = train.reshape(len(train), -1).astype(np.float64)
    rows = x.reshape(len(x), 1, -1).astype(np.float64)
    squares = np.stack([((flat - row) ** 2).sum(1) for row in rows])
    at = squares.argmin(1)
    return at, np.sqrt(squares[np.arange(len(x)), at])


def neighbour_figure(caption: str, x: np.ndarray, near: np.ndarray, remark: str) -> PageFigure:
    """Draw samples above their nearest training examples.

    Args:
        caption: the caption.
        x: samples ``[n, ...]``.
        near: the nearest training example of each.
        remark: a sentence below the caption.

    Returns:
        The figure: for images two rows, else samples and training examples as lines or points.
    """
    x, near = x[:PAIRS], near[:PAIRS]
    alt = f"{len(x)} samples and the nearest training example of each: {caption}. {remark}"
    if x.ndim == 4:
        words = f"Above: samples; below: the nearest training example. {remark}"
        return charts.contact_sheet(np.concatenate([x, near]), len(x), caption, alt, words)
    points = x.ndim == 2 and x.shape[1] == 2

    def draw(axes, theme):
        if points:
            axes.plot(*np.stack([x, near], 1).transpose(2, 1, 0), color=theme.muted, linewidth=0.8)
        for values, paint, label in ((near, theme.muted, "nearest training example"), (x, theme.colours[1], "sample")):
            if points:
                axes.scatter(*values.T, s=14, color=paint, linewidths=0, label=label)
            else:
                lines = values.reshape(len(values), values.shape[1], -1)[..., 0].T
                axes.plot(lines, color=paint, linewidth=1, label=[label] + ["_nolegend_"] * (lines.shape[1] - 1))
        if not points:
            axes.set(xlabel="entry" if x.ndim == 2 else "time step, first channel")

    return charts.chart(draw, caption, alt, size=(4.6, 3.8), remark=remark)


def marginal_figure(name: str, ts: np.ndarray, p: np.ndarray, q: np.ndarray) -> PageFigure:
    """Draw marginals along time: forward above, backward below, in one frame.

    Args:
        name: the caption.
        ts: times ``[T]``.
        p: forward marginals ``[n, T, ...]``.
        q: backward marginals ``[m, T, ...]``.

    Returns:
        The figure: points as scatter plots, all else as histograms of all entries; images are pictured by the
        trajectories, and their histograms show the levels.
    """
    keep = np.unique(np.linspace(0, len(ts) - 1, min(len(ts), 6)).round().astype(int))
    points = p.ndim == 3 and p.shape[2] == 2
    both = np.concatenate([a[:, keep].reshape(-1, *a.shape[2:]) for a in (p, q)])
    low, high = np.percentile(both, 0.5), np.percentile(both, 99.5)
    low, high = low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3

    def draw(every, theme):
        for column, k in enumerate(keep):
            for row, (label, x, paint) in enumerate((("$p_n$", p, theme.colours[1]), ("$q_n$", q, theme.colours[0]))):
                axes = every[row, column]
                if points:
                    axes.scatter(*x[:600, k].T, s=3, color=paint, alpha=0.5, linewidths=0)
                    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
                else:
                    axes.hist(x[:600, k].ravel(), np.linspace(low, high, 40), density=True, color=paint, alpha=0.8)
                    axes.set_yticks([])
                if row == 0:
                    axes.set_title(f"t = {ts[k]:.3g}")
                if column == 0:
                    axes.set_ylabel(label)

    what = "scatter plots" if points else "histograms of all entries"
    alt = f"{what.capitalize()} of forward (above) and backward (below) marginals at {len(keep)} times: {name}."
    size = (1.55 * len(keep) + 0.4, 3.4 if points else 2.8)
    return charts.chart(draw, name, alt, size=size, panels=(2, len(keep)), remark=f"{what.capitalize()}.")


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
