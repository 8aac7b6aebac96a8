"""The effect of each correction: one row of a table, one dot of a chart, and the table of distances as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fmjax.experiments import charts
from fmjax.experiments.charts import PageFigure
from fmjax.experiments.figures import Row
from fmjax.metrics import FeatureChange

SMALL = 0.01  # relative changes below this are shown in grey


class Change(NamedTuple):
    """The change of one distance by a correction.

    Attributes:
        relative: change divided by the distance without the correction; nan where that distance is not positive.
        error: standard error of ``relative``; nan for one run.
        kind: ``"helps"``, ``"harms"`` or ``"none"``: no significant change, or less than one percent.
    """

    relative: float
    error: float
    kind: str


class Effect(NamedTuple):
    """The effect of one correction.

    Attributes:
        row: the corrected sampler.
        baseline: the sampler that it is compared with.
        changes: the changes by metric.
    """

    row: Row
    baseline: Row
    changes: dict[str, Change]


def effects(verdicts: Sequence, rows: Mapping[str, Row]) -> list[Effect]:
    """Return the effect of each correction, in the order of the verdicts; controls (noise alone) are last.

    Args:
        verdicts: the verdicts of a report (``report.Verdict``).
        rows: the rows of the table by name.

    Returns:
        One effect for each pair of a corrected sampler and its baseline.

    >>> from fmjax.experiments.report import Verdict
    >>> rows = {n: Row(n, "rk4", 4, 0, {"W2": (d, 0.01)}) for n, d in (("plain", 0.5), ("fixed", 0.4))}
    >>> effects([Verdict("fixed", "plain", "W2", -0.1, 0.02, "helps")], rows)[0].changes
    {'W2': Change(relative=-0.2, error=0.04, kind='helps')}
    """
    pairs: dict[tuple[str, str], dict[str, Change]] = {}
    for v in verdicts:
        pairs.setdefault((v.name, v.baseline), {})[v.metric] = _change(v, rows[v.baseline].distances[v.metric][0])
    result = [Effect(rows[name], rows[baseline], changes) for (name, baseline), changes in pairs.items()]
    return sorted(result, key=lambda effect: effect.row.control)


def _change(v, level: float) -> Change:
    relative, error = (v.difference / level, v.se / level) if level > 0 else (math.nan, math.nan)
    seen = v.verdict != "no difference seen" and not abs(relative) < SMALL
    return Change(relative, error, v.verdict if seen else "none")


def percent(change: Change) -> str:
    """Return a change in words: ``−12.5 ± 1.3 %``.

    Args:
        change: the change.

    Returns:
        The text; ``n/a`` for a change that is not a number.

    >>> percent(Change(-0.125, 0.013, "helps")), percent(Change(0.001, float("nan"), "none"))
    ('−12.5 ± 1.3 %', '+0.1 %')
    """
    if not math.isfinite(change.relative):
        return "n/a"
    error = f" ± {100 * change.error:.1f}" if math.isfinite(change.error) else ""
    return f"{100 * change.relative:+.1f}{error} %".replace("-", "−")


def effect_chart(metric: str, every: Sequence[Effect]) -> PageFigure | None:
    """Draw one dot per correction: the relative change of a distance, with an interval of two standard errors.

    Args:
        metric: the distance.
        every: the effects.

    Returns:
        The figure; ``None`` where no correction has a finite change of the metric.
    """
    shown = [e for e in every if metric in e.changes and math.isfinite(e.changes[metric].relative)]
    if not shown:
        return None

    def draw(axes, theme):
        colour = {"helps": theme.colours[2], "harms": theme.colours[4], "none": theme.muted}
        for place, effect in enumerate(shown):
            change = effect.changes[metric]
            error = 200 * change.error if math.isfinite(change.error) else 0.0
            fill = "none" if effect.row.control else colour[change.kind]
            style = {"color": colour[change.kind], "fmt": "o", "markersize": 5, "capsize": 2.5, "markerfacecolor": fill}
            axes.errorbar(100 * change.relative, place, xerr=error, **style)
        axes.axvline(0, color=theme.muted, linewidth=1)
        names = [charts.escaped(f"{e.row.name} ({e.row.nfe})") for e in shown]
        axes.set_yticks(range(len(shown)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel=f"change of {charts.escaped(metric)} in %, ± 2 standard errors")

    words = "; ".join(f"{e.row.name} {percent(e.changes[metric])}" for e in shown)
    size = (6.8, 1.1 + 0.27 * len(shown))
    remark = (
        "Left of the line is better. In brackets: NFE. Hollow: noise alone. Grey: no significant change, or below 1 %."
    )
    return charts.chart(draw, f"Effect of corrections on {metric}", f"{words}.", size=size, remark=remark)


def change_chart(changes: Mapping[str, FeatureChange]) -> PageFigure:
    """Draw the histogram of the feature change of each correction, one line a corrected sampler.

    Args:
        changes: the changes by name of the corrected sampler, at least one.

    Returns:
        The figure.
    """

    def draw(axes, theme):
        for i, (name, change) in enumerate(changes.items()):
            colour = theme.colours[i % len(theme.colours)]
            heights = change.counts / change.counts.sum()
            axes.stairs(heights, change.edges, color=colour, label=charts.escaped(name), linewidth=1.5)
        axes.set(xlabel="distance to the sample without the correction", ylabel="fraction of samples", ylim=(0, None))

    words = "; ".join(f"{name}: median {np.median(c.distances):.2g}" for name, c in changes.items())
    remark = (
        "In features of a random network; 1 is the median distance of two test examples, and the last bin holds what "
        "is farther. Samples of one run, from the same noise."
    )
    return charts.chart(draw, "How far corrections move samples", f"{words}.", size=(6.8, 3.4), remark=remark)


def as_csv(rows: Sequence[Row]) -> str:
    """Return the table of distances as comma-separated values.

    Args:
        rows: the rows of the table.

    Returns:
        One line per sampler with mean and standard error of each distance.

    >>> print(as_csv([Row("rk4, 8 steps", "rk4", 32, 0, {"W2": (0.5, 0.01)})]).strip())
    sampler,family,NFE,corrections,control,W2 mean,W2 standard error
    "rk4, 8 steps",rk4,32,0,False,0.5,0.01
    """
    metrics = list(dict.fromkeys(m for row in rows for m in row.distances))
    names = [f"{m} {part}" for m in metrics for part in ("mean", "standard error")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["sampler", "family", "NFE", "corrections", "control", *names])
    for row in rows:
        values = [value for m in metrics for value in row.distances.get(m, ("", ""))]
        writer.writerow([row.name, row.family, row.nfe, row.corrections, row.control, *values])
    return out.getvalue()
