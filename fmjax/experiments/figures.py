"""Pictures as PNG in text: contact sheets of images, point clouds, trajectories, and charts for light and dark pages.

Equal data give equal bytes. Nothing global is touched: figures are made by ``Figure()``, not pyplot.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fmjax.storage.images import check_finite_values, image_grid, png_bytes

REFERENCE = "data"  # the family of rows that are no sampler: training data against held-out data
COLUMNS = 16  # times shown of a trajectory
LINES = 16  # series or vectors drawn in one picture


class Row(NamedTuple):
    """One sampler setting: ``distances`` maps a metric to (mean, standard error over seeds; nan for one seed).

    ``family`` is one of ``report.FAMILIES``, or another; rows of ``"data"`` (training data against held-out data) are
    the reference: they have no NFE (0) and are not candidates for the best value.
    """

    name: str
    family: str
    nfe: int
    corrections: int
    distances: dict[str, tuple[float, float]]


class Picture(NamedTuple):
    """A figure of the page, base64 PNG; ``dark`` is None where one picture suits both schemes."""

    caption: str
    alt: str
    width: int
    height: int
    light: str
    dark: str | None = None
    remark: str = ""


class Theme(NamedTuple):
    """Colours of a scheme; the page's style sheet is filled from them, so that charts and page agree."""

    ink: str
    muted: str
    line: str
    page: str
    card: str
    colours: tuple[str, ...]


LIGHT = Theme(
    *("#1b2330", "#566074", "#d9dee7", "#f5f7fa", "#ffffff"),
    ("#b45309", "#1d4ed8", "#047857", "#7c3aed", "#be123c", "#0e7490"),
)
DARK = Theme(
    *("#e6eaf1", "#a3adbd", "#333d4d", "#10151d", "#19202b"),
    ("#fbbf24", "#7aa8ff", "#34d399", "#c4a1ff", "#fb7185", "#22d3ee"),
)


def colours(rows: Iterable[Row]) -> dict[str, int | None]:
    """A colour's number per family; a family and the same with corrections share one, the reference has none."""
    bases = list(dict.fromkeys(base(row.family) for row in rows if row.family != REFERENCE))
    count = len(LIGHT.colours)
    return {r.family: None if r.family == REFERENCE else bases.index(base(r.family)) % count for r in rows}


def base(family: str) -> str:
    """The family without corrections: ``"rk4"`` of ``"rk4 + corrections"``."""
    return family.split(" + ")[0]


def distances(metric: str, rows: Sequence[Row], alt: str) -> Picture:
    """A chart of one distance against NFE, a line a family (``rows`` in order), the reference as a level and a band."""
    colour = colours(rows)
    bases = list(dict.fromkeys(base(row.family) for row in rows if row.family != REFERENCE))
    rows = [row for row in rows if metric in row.distances and math.isfinite(row.distances[metric][0])]

    def draw(axes, theme):
        for family, members in itertools.groupby(rows, key=lambda row: row.family):
            nfe, mean, se, names = zip(*((r.nfe, *r.distances[metric], r.name) for r in members), strict=True)
            if family == REFERENCE:
                for level, error, name in zip(mean, np.nan_to_num(se), names, strict=True):
                    axes.axhline(level, color=theme.muted, linestyle=":", linewidth=1.4, label=_plain(name))
                    axes.axhspan(level - error, level + error, color=theme.muted, alpha=0.18, linewidth=0)
                continue
            paint = theme.colours[colour[family]]
            # No line joins corrected samplers: they differ in steps and in corrections, so it would mean nothing.
            corrected = family != base(family)
            again = bases.index(base(family)) // len(theme.colours)  # how often the colour was used before
            plain = {"marker": "o^vD"[again % 4], "linestyle": ("-", "--", "-.", ":")[again % 4]}
            style = {"linestyle": "", "marker": "s", "markerfacecolor": "none"} if corrected else plain
            axes.errorbar(nfe, mean, se, color=paint, linestyle="", capsize=2.5, linewidth=1.2)
            axes.plot(nfe, mean, color=paint, label=_plain(family), markersize=5, linewidth=1.6, **style)
        axes.set_xscale("log")
        _value_scale(axes, [row.distances[metric][0] for row in rows])
        ticks: list[int] = []
        for nfe in sorted({row.nfe for row in rows if row.family != REFERENCE}):
            if not ticks or nfe >= 1.35 * ticks[-1]:  # labels nearer than that touch each other
                ticks.append(nfe)
        axes.set_xticks(ticks, [str(nfe) for nfe in ticks])
        axes.minorticks_off()
        axes.set(xlabel="NFE (network evaluations a sample)", ylabel=_plain(metric))

    return _chart(draw, metric, alt, size=(4.6, 3.7))


def curve(name: str, step, loss) -> Picture:
    """A chart of one loss against the step on a log axis, each value and a moving mean."""
    step, loss = np.asarray(step, np.float64), np.asarray(loss, np.float64)
    fine = np.isfinite(loss)
    step, loss = step[fine], loss[fine]
    smooth = moving_mean(loss, max(1, len(loss) // 40))

    def draw(axes, theme):
        axes.plot(step, loss, color=theme.colours[1], alpha=0.3, linewidth=0.8)
        axes.plot(step, smooth, color=theme.colours[1], linewidth=1.8, marker="." if len(step) < 20 else None)
        _value_scale(axes, loss, log=True)
        axes.set(xlabel="step", ylabel="loss")

    left_out = int((~fine).sum())
    remark = f"{left_out} values that are not finite are left out." if left_out else ""
    alt = f"Chart of the training loss of {name}, without finite values."
    if len(step):
        alt = (
            f"Chart of the training loss of {name}, log axis: from {smooth[0]:.3g} at step {step[0]:g} "
            f"to {smooth[-1]:.3g} at step {step[-1]:g}, smoothed."
        )
    return _chart(draw, name, alt, size=(4.6, 2.9), remark=remark)


def gaps(lines: dict[str, Sequence]) -> Picture:
    """A chart of ``(t_n, distance, se)`` of ``p_n`` and ``q_n`` against time, a line a name."""
    caption = "How far the forward marginals p_n are from the backward marginals q_n"
    return _over_time(lines, caption, "distance of $p_n$ and $q_n$", "the distance between p_n and q_n")


def influence(lines: dict[str, Sequence]) -> Picture:
    """A chart of ``(t_n, distance, se)`` of samples that were corrected once, at ``t_n``, a line a name."""
    caption = "What one correction does alone, by the time it is made at"
    return _over_time(lines, caption, "distance of the samples", "the distance of samples corrected once")


def _over_time(lines: dict[str, Sequence], caption: str, label: str, what: str) -> Picture:
    lines = {name: [np.asarray(a, np.float64) for a in gap] for name, gap in lines.items()}

    def draw(axes, theme):
        for i, (name, (t, distance, se)) in enumerate(lines.items()):
            paint = theme.colours[i % len(theme.colours)]
            style = {"color": paint, "marker": "o", "markersize": 4, "capsize": 2.5, "linewidth": 1.6}
            axes.errorbar(t, distance, se, label=_plain(name), **style)
        _value_scale(axes, np.concatenate([distance for _, distance, _ in lines.values()]))
        axes.set(xlabel="time $t_n$ (0: noise, 1: data)", ylabel=label)

    ends = "; ".join(
        f"{name} from {d[0]:.3g} at t = {t[0]:g} to {d[-1]:.3g} at t = {t[-1]:g}" for name, (t, d, _) in lines.items()
    )
    return _chart(draw, caption, f"Chart of {what} against time: {ends}.", size=(6.4, 3.6))


def samples(caption: str, x: np.ndarray, clouds: Sequence[np.ndarray]) -> Picture:
    """Draw samples by their kind.

    Args:
        caption: what they are.
        x: images ``[n, H, W, C]`` as a grid, points ``[n, 2]`` as a scatter plot, series ``[n, L, C]`` and vectors
            ``[n, d]`` as lines.
        clouds: all points of a page, which share one frame.
    """
    if x.ndim == 4:
        n, height, width = x.shape[:3]
        return _sheet(x, None, caption, f"{n} samples of {width} by {height} pixels in a grid: {caption}.")
    if x.ndim == 3 or x.shape[1] != 2:
        return _lines(caption, x)
    # One frame for all clouds, so that they compare; a few points far off do not decide it.
    low, high = (np.array([np.percentile(c, q, axis=0) for c in clouds]) for q in (1, 99))
    low, high = low.min(0), high.max(0)
    margin = 0.15 * (high - low).max() or 1.0

    def draw(axes, theme):
        axes.scatter(*x.T, s=5, color=theme.colours[1], alpha=0.5, linewidths=0)
        axes.set_aspect("equal")
        axes.set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin))

    outside = int(((x < low - margin) | (x > high + margin)).any(1).sum())
    remark = f"{outside} of {len(x)} points lie outside the frame." if outside else ""
    return _chart(draw, caption, f"Scatter plot of {len(x)} points: {caption}.", size=(4, 4), remark=remark)


def _lines(caption: str, x: np.ndarray) -> Picture:
    """Series, a line an example and a colour a channel; vectors as series of one channel over their entries."""
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
    return _chart(draw, caption, f"{n} {what} as lines: {caption}.", size=(4.6, 3.0), remark=remark)


def trajectory(caption: str, x: np.ndarray) -> Picture:
    """Images as a grid, an example a row and time to the right; points as lines in the plane."""
    times, n = x.shape[:2]
    if x.ndim == 5:
        keep = np.unique(np.linspace(0, times - 1, min(times, COLUMNS)).round().astype(int))
        alt = f"{n} trajectories, one a row, at {len(keep)} times from left to right: {caption}."
        thinned = f"; {len(keep)} of {times} times" if len(keep) < times else ""
        remark = f"One example a row, time from left to right{thinned}."
        return _sheet(x[keep].swapaxes(0, 1).reshape(-1, *x.shape[2:]), len(keep), caption, alt, remark)

    def draw(axes, theme):
        axes.plot(*x.transpose(2, 0, 1), color=theme.muted, alpha=0.35, linewidth=0.8)
        for i, label in ((0, "start"), (-1, "end")):
            axes.scatter(*x[i].T, s=10, color=theme.colours[i], zorder=3, linewidths=0, label=label)
        axes.set_aspect("equal", adjustable="datalim")

    alt = f"{n} trajectories of {times} points as lines in the plane: {caption}."
    return _chart(draw, caption, alt, size=(4.8, 4.8))


def moving_mean(y: np.ndarray, half: int) -> np.ndarray:
    """The mean of the values up to ``half`` places away, at the ends of as many as there are."""
    i, total = np.arange(len(y)), np.concatenate([[0.0], np.cumsum(y)])
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(y))
    return (total[high] - total[low]) / (high - low)


def check_rows(name: str, x: np.ndarray) -> None:
    """Refuse what is neither vectors ``[n, d]`` nor series ``[n, L, C]`` of finite values."""
    if x.ndim not in (2, 3) or 0 in x.shape:
        raise ValueError(f"{name}={list(x.shape)}: not a kind of samples. Give [n, d], [n, L, C] or [n, H, W, C].")
    check_finite_values(name, x)


def check_points(name: str, x: np.ndarray, shape: str) -> None:
    """Raises ``ValueError`` unless ``x`` is finite points ``[.., 2]``; ``shape`` says in words what was wanted."""
    if x.shape[-1] != 2 or 0 in x.shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; points are {shape}, images have a channel axis of 1 or 3")
    check_finite_values(name, x)


def _chart(draw: Callable, caption: str, alt: str, *, size, remark: str = "") -> Picture:
    """``draw(axes, theme)`` on a transparent figure, once a scheme; ``size`` in inches of 100 pixels of the page."""
    from matplotlib.figure import Figure

    pngs = []
    for theme in (LIGHT, DARK):
        figure = Figure(size, layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.tick_params(which="both", colors=theme.muted, labelsize=9, length=3)
        axes.grid(True, color=theme.line, linewidth=0.7)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set(visible=side in ("left", "bottom"), color=theme.line)
        draw(axes, theme)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=theme.ink, fontsize=10)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            style = {"frameon": False, "fontsize": 9, "labelcolor": theme.ink, "ncols": 2}
            figure.legend(handles, labels, loc="outside upper left", **style)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, facecolor="none", metadata={"Software": None})
        pngs.append(base64.b64encode(buffer.getvalue()).decode())
    return Picture(caption, alt, round(size[0] * 100), round(size[1] * 100), *pngs, remark)


def _value_scale(axes, values, *, log: bool = False) -> None:
    """A log axis where asked for or where values span a decade or more; a linear one if any is not positive."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0 or not (log or values.max() > 10 * values.min()):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 1e3 * values.min() else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _sheet(images: np.ndarray, columns: int | None, caption: str, alt: str, remark: str = "") -> Picture:
    sheet = image_grid(images, columns=columns)
    return Picture(
        caption, alt, sheet.shape[1], sheet.shape[0], base64.b64encode(png_bytes(sheet)).decode(), None, remark
    )


def _plain(text: str) -> str:
    """Text for matplotlib that is not read as mathematics; names that begin with ``_`` still enter the legend."""
    return "\u200b" * text.startswith("_") + text.replace("$", r"\$")
