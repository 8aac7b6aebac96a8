"""Figures of a report: distances, losses, marginals, samples and trajectories."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fmjax.experiments import charts
from fmjax.experiments.charts import PageFigure

REFERENCE = "data"  # the family of rows of training data, which show the floor of a distance


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


def point_labels(rows: Sequence[Row]) -> dict[str, str]:
    """Return a short label for the point of each sampler in a chart.

    Args:
        rows: the rows of the table.

    Returns:
        The name without the family, or of a corrected sampler without the name of the plain sampler.

    >>> plain = Row("rk4, 8 steps", "rk4", 32, 0, {})
    >>> point_labels([plain, Row("rk4, 8 steps, score at 8", "rk4 + corrections", 33, 1, {})])
    {'rk4, 8 steps': '8 steps', 'rk4, 8 steps, score at 8': 'score at 8'}
    """
    plain = sorted((r.name for r in rows if r.family == _base(r.family)), key=len, reverse=True)
    heads = lambda row: [row.family] if row.family == _base(row.family) else plain
    short = lambda row: next((row.name[len(h) + 2 :] for h in heads(row) if row.name.startswith(f"{h}, ")), row.name)
    return {row.name: short(row) for row in rows if row.family != REFERENCE}


def distance_chart(metric: str, rows: Sequence[Row], alt: str, *, labelled: bool = False) -> PageFigure:
    """Draw a chart of one distance against NFE, one line per family.

    Args:
        metric: the distance.
        rows: the rows of the table, in order.
        alt: text for readers who do not see the chart.
        labelled: draw a larger chart with a label at every point.

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
        if not labelled:
            return None
        axes.margins(x=0.1, y=0.12)
        shown = [row for row in rows if row.family != REFERENCE]
        names = point_labels(rows)
        words = [charts.escaped(names[row.name]) for row in shown]
        inks = [theme.colours[colour[row.family]] for row in shown]
        return lambda axes: charts.place_labels(axes, [(r.nfe, r.distances[metric][0]) for r in shown], words, inks)

    return charts.chart(draw, metric, alt, size=(7.0, 5.2) if labelled else (4.6, 3.7))


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
