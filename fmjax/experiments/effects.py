"""The effect of each correction: one row of a table, one dot on an axis, and the table of distances as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fmjax.experiments import charts
from fmjax.experiments.charts import PageFigure
from fmjax.experiments.contents import Verdict
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


class Dot(NamedTuple):
    """A dot with its interval of two standard errors, in percent of the length of an axis.

    Attributes:
        at: the change.
        low: the lower end of the interval.
        high: the upper end of the interval.
        zero: no change.
    """

    at: float
    low: float
    high: float
    zero: float


def effects(verdicts: Sequence[Verdict], rows: Mapping[str, Row]) -> list[Effect]:
    """Return the effect of each correction, in the order of the verdicts; controls (noise alone) are last.

    Args:
        verdicts: the verdicts of a report.
        rows: the rows of the table by name.

    Returns:
        One effect for each pair of a corrected sampler and its baseline.

    >>> rows = {n: Row(n, "rk4", 4, 0, {"W2": (d, 0.01)}) for n, d in (("plain", 0.5), ("fixed", 0.4))}
    >>> effects([Verdict("fixed", "plain", "W2", -0.1, 0.02, "helps")], rows)[0].changes
    {'W2': Change(relative=-0.2, error=0.04, kind='helps')}
    """
    pairs: dict[tuple[str, str], dict[str, Change]] = {}
    for v in verdicts:
        pairs.setdefault((v.name, v.baseline), {})[v.metric] = relative_change(
            v, rows[v.baseline].distances[v.metric][0]
        )
    result = [Effect(rows[name], rows[baseline], changes) for (name, baseline), changes in pairs.items()]
    return sorted(result, key=lambda effect: effect.row.control)


def relative_change(v: Verdict, level: float) -> Change:
    """Return the relative change that a verdict is about.

    Args:
        v: the verdict.
        level: the distance of its baseline.

    Returns:
        The change.
    """
    relative, error = (v.difference / level, v.se / level) if level > 0 else (math.nan, math.nan)
    seen = v.verdict != "no difference seen" and not abs(relative) < SMALL
    return Change(relative, error, v.verdict if seen else "none")


def percent(c: Change) -> str:
    """Return a change in words: ``−12.5 ± 1.3 %``.

    Args:
        c: the change.

    Returns:
        The text; ``n/a`` for a change that is not a number.

    >>> percent(Change(-0.125, 0.013, "helps")), percent(Change(0.001, float("nan"), "none"))
    ('−12.5 ± 1.3 %', '+0.1 %')
    """
    if not math.isfinite(c.relative):
        return "n/a"
    error = f" ± {100 * c.error:.1f}" if math.isfinite(c.error) else ""
    return f"{100 * c.relative:+.1f}{error} %".replace("-", "−")


def axis(metric: str, every: Sequence[Effect]) -> tuple[float, float]:
    """Return the ends of the axis on which the dots of a distance lie.

    Args:
        metric: the distance.
        every: the effects.

    Returns:
        The least and the largest relative change with two standard errors, and 0; within -1 and 1.
    """
    ends = [0.0]
    for e in every:
        if metric in e.changes and math.isfinite(e.changes[metric].relative):
            c = e.changes[metric]
            ends += [c.relative - 2 * _error(c), c.relative + 2 * _error(c)]
    low, high = max(-1.0, min(ends)), min(1.0, max(ends))
    margin = 0.04 * (high - low) or 0.01
    return low - margin, high + margin


def dot(c: Change, ends: tuple[float, float]) -> Dot | None:
    """Return where the dot of a change lies on an axis.

    Args:
        c: the change.
        ends: the ends of the axis.

    Returns:
        Places in percent of the axis; ``None`` for a change that is not a number. A dot beyond an end lies at the end.
    """
    if not math.isfinite(c.relative):
        return None
    place = lambda v: round(100 * (min(max(v, ends[0]), ends[1]) - ends[0]) / (ends[1] - ends[0]), 2)
    return Dot(place(c.relative), place(c.relative - 2 * _error(c)), place(c.relative + 2 * _error(c)), place(0.0))


def _error(c: Change) -> float:
    return c.error if math.isfinite(c.error) else 0.0


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
