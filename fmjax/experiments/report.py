"""Write a report: one self-contained HTML file with distances, verdicts, samples, trajectories and losses.

``Contents`` holds the data and ``write_report`` writes the file. Equal contents give equal bytes. All figures are
inside the file, so that the page opens without an internet connection.
"""

from __future__ import annotations

import difflib
import importlib.resources
import math
import os
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax.experiments import effects, figures
from fmjax.experiments.charts import DARK, LIGHT
from fmjax.experiments.figures import REFERENCE, Row
from fmjax.metrics import FeatureChange
from fmjax.storage import images
from fmjax.storage.files import write_bytes

# order of the rows; other families follow, and "data" is last
FAMILIES = ("euler", "euler + corrections", "rk4", "rk4 + corrections", "flow map", "flow map + corrections")
VERDICTS = ("helps", "no difference seen", "harms")


class Verdict(NamedTuple):
    """The comparison of a corrected sampler with the same sampler without the correction.

    Attributes:
        name: the corrected sampler.
        baseline: the sampler without the correction.
        metric: the distance.
        difference: mean over seeds of the distance with the correction minus the distance without.
        se: standard error of ``difference``.
        verdict: one of ``VERDICTS``; a correction helps if the distance falls.
    """

    name: str
    baseline: str
    metric: str
    difference: float
    se: float
    verdict: str


class Contents(NamedTuple):
    """The contents of a report; an empty part is left out of the page.

    Attributes:
        title: the title.
        summary: sentences that are shown first.
        rows: the rows of the table.
        verdicts: the verdicts on corrections.
        grids: examples by caption: images ``[n, H, W, C]`` in [-1, 1], points ``[n, 2]``, series or vectors.
        trajectories: trajectories by caption: ``[T, n, H, W, C]`` (one example per row, time to the right) or
            ``[T, n, 2]`` (lines).
        curves: (step, loss) by stage.
        gaps: (``t_n``, distance of ``p_n`` to ``q_n``, standard error or 0) by name of the line.
        facts: text by name of the fact; long text is folded.
        notes: sentences that are shown last.
        influence: (``t_n``, distance, standard error or 0) by name of the line, for samples that are corrected only at
            ``t_n``.
        changes: how far corrections move samples, by name of the corrected sampler.
    """

    title: str
    summary: list[str]
    rows: list[Row]
    verdicts: list[Verdict]
    grids: dict[str, np.ndarray]
    trajectories: dict[str, np.ndarray]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    gaps: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    facts: dict[str, str]
    notes: list[str]
    influence: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    changes: dict[str, FeatureChange] = {}


def write_report(path: str | os.PathLike, contents: Contents) -> Path:
    """Write a report; a failure leaves an earlier file as it is.

    Args:
        path: the HTML file.
        contents: what the report shows.

    Returns:
        The path.

    Raises:
        ValueError: contents that cannot be shown, see ``check_contents``; nothing is drawn.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; make it before writing {path.name}")
    check_contents(contents)
    write_bytes(path, render(contents).encode())
    return path


def render(contents: Contents) -> str:
    """Return the page of a report.

    Args:
        contents: what the report shows, checked by ``check_contents``.

    Returns:
        HTML.
    """
    import jinja2

    rows = in_order(contents.rows)
    metrics = list(dict.fromkeys(m for row in rows for m in row.distances))
    best = {m: best_row(rows, m) for m in metrics}
    charts = [figures.distance_chart(m, rows, _chart_words(m, row)) for m, row in best.items() if row]
    clouds = [x for x in contents.grids.values() if np.ndim(x) == 2 and np.shape(x)[1] == 2]
    first = [row.name for row in list(best.values())[:1] if row and row.name in contents.grids]
    look = [name for name in contents.grids if name in ("test data", *first)] if first else []
    pictures = {name: figures.sample_figure(name, np.asarray(x), clouds) for name, x in contents.grids.items()}
    every = effects.effects(contents.verdicts, {row.name: row for row in rows})
    dots = [effects.effect_chart(m, every) for m in metrics]
    dots += [effects.change_chart(contents.changes)] if contents.changes else []
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = (importlib.resources.files("fmjax.experiments") / "report.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(
        title=contents.title,
        schemes=(LIGHT, DARK),
        summary=contents.summary,
        metrics=metrics,
        rows=_table(rows, best),
        look=[pictures[name] for name in look],
        csv=urllib.parse.quote(effects.as_csv(rows)),
        charts=charts,
        effects=every,
        effect_charts=[chart for chart in dots if chart],
        percent=effects.percent,
        count=count_line(contents.verdicts),
        verdicts=_verdict_groups(contents.verdicts, {row.name: row for row in rows}),
        grids=[picture for name, picture in pictures.items() if name not in look],
        trajectories=[figures.trajectory_figure(name, np.asarray(x)) for name, x in contents.trajectories.items()],
        curves=[figures.loss_chart(name, *curve) for name, curve in contents.curves.items()],
        gaps=[figures.gap_chart(contents.gaps)] if contents.gaps else [],
        influence=[figures.influence_chart(contents.influence)] if contents.influence else [],
        facts=contents.facts,
        notes=contents.notes,
    )


def plus_minus(mean: float, se: float) -> str:
    """Return ``mean ± se`` with one or two digits of the error and the mean to the same place.

    The rule of the Particle Data Group: two digits of an error that begins with 100 to 354, one digit up to 949; above
    949 the error is rounded up to 1000 and keeps two digits. Numbers below 1e-4 and from 1e6 get a common power of ten.

    Args:
        mean: the mean.
        se: the standard error; nan is shown as n/a.

    Returns:
        The text.

    >>> plus_minus(0.82731, 0.1193), plus_minus(0.82731, 0.3672), plus_minus(0.5, float("nan"))
    ('0.83 ± 0.12', '0.8 ± 0.4', '0.500 ± n/a')
    """
    if not math.isfinite(mean):
        return "n/a" if math.isnan(mean) else "∞" if mean > 0 else "−∞"
    error = abs(se) if math.isfinite(se) else 0.0
    if error < 1e-6 * abs(mean):  # rounding of equal values, or an unknown error
        error = 0.0
    size = max(abs(mean), error)
    power = 0 if size == 0 or 1e-4 <= size < 1e6 else math.floor(math.log10(size))
    mean, error = mean / 10**power, error / 10**power
    if error:
        exponent = math.floor(math.log10(error))
        place = exponent - 1 if error / 10**exponent < 3.55 else exponent
    else:
        place = math.floor(math.log10(abs(mean))) - 2 if mean else 0
    shown = "n/a" if not math.isfinite(se) else _fixed(error, place) if error else "0"
    text = f"{_fixed(mean, place)} ± {shown}"
    return text if power == 0 else f"({text}) × 10{str(power).translate(_RAISED)}"


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Return rows by family, then NFE and corrections.

    Args:
        rows: rows in any order.

    Returns:
        The rows: families of ``FAMILIES`` first, then other families in their order, then the training data.
    """
    rows = list(rows)
    order = {family: i for i, family in enumerate(dict.fromkeys([*FAMILIES, *(row.family for row in rows)]))}
    order[REFERENCE] = len(order)
    return sorted(rows, key=lambda row: (order[row.family], row.nfe, row.corrections))


def best_row(rows: Iterable[Row], metric: str) -> Row | None:
    """Return the sampler with the smallest finite mean of a metric; rows of training data do not compete.

    Args:
        rows: the rows of the table.
        metric: the metric.

    Returns:
        The row; ``None`` where no sampler has a finite mean.
    """
    rows = [r for r in rows if r.family != REFERENCE and math.isfinite(r.distances.get(metric, (math.nan,))[0])]
    return min(rows, key=lambda row: row.distances[metric][0], default=None)


def verdict(name: str, baseline: str, metric: str, with_, without) -> Verdict:
    """Compare a correction with its baseline by paired distances, one per seed.

    ``difference`` is the mean of ``d_i = with_[i] - without[i]`` over ``k`` seeds and ``se`` is the standard error of
    the mean. The verdict is Student's two-sided paired test at level 0.05 (``scipy.stats.ttest_rel``): beyond the 0.975
    quantile of ``k - 1`` degrees of freedom a lower distance helps and a higher distance harms. Otherwise, and always
    with one seed (``se`` is then nan) or a distance that is not finite, the verdict is that no difference is seen.

    Args:
        name: the corrected sampler.
        baseline: the sampler without the correction.
        metric: the distance.
        with_: distances with the correction, one per seed.
        without: distances without the correction, of the same seeds in the same order.

    Returns:
        The verdict.

    Raises:
        ValueError: lists that are empty or differ in length.
    """
    from scipy.special import stdtrit

    a, b = np.asarray(with_, np.float64), np.asarray(without, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(
            f"{name!r} against {baseline!r} has distances of shapes {a.shape} with and {b.shape} without corrections; "
            "give one per seed for both, of the same seeds in the same order"
        )
    d, k = a - b, len(a)
    if k == 1 or not np.isfinite(d).all():
        return Verdict(name, baseline, metric, float(d.mean()), math.nan, "no difference seen")
    mean, se = float(d.mean()), float(d.std(ddof=1) / math.sqrt(k))
    seen = abs(mean) > stdtrit(k - 1, 0.975) * se
    return Verdict(name, baseline, metric, mean, se, VERDICTS[1 + int(np.sign(mean)) * seen])


def count_line(verdicts: Sequence[Verdict]) -> str:
    """Return one sentence: how often corrections lower the distance, raise it, or make no difference.

    Args:
        verdicts: the verdicts.

    Returns:
        The sentence.
    """
    helps, nothing, harms = (sum(v.verdict == kind for v in verdicts) for kind in VERDICTS)
    comparisons = f"{len(verdicts)} paired comparison{'' if len(verdicts) == 1 else 's'}"
    return (
        f"Corrections and noise controls lower the distance in {helps} of {comparisons}, raise the distance in "
        f"{harms}, and make no significant difference in {nothing}."
    )


def verdict_words(v: Verdict) -> str:
    """Return the change of the metric in words.

    Args:
        v: the verdict.

    Returns:
        For example ``FD-small is lower by 0.12 ± 0.03``.
    """
    if v.verdict == "no difference seen":
        return f"{v.metric} differs by {plus_minus(v.difference, v.se)}"
    return f"{v.metric} is {'lower' if v.verdict == 'helps' else 'higher'} by {plus_minus(abs(v.difference), v.se)}"


def check_contents(contents: Contents) -> None:
    """Refuse contents that cannot be shown; nothing is drawn.

    Args:
        contents: what the report shows.

    Raises:
        ValueError: arrays of the wrong shape, images that are not finite, a verdict on a row that does not exist, or a
            verdict against the sign of its difference.
    """
    rows: dict[str, Row] = {}
    for row in contents.rows:
        if row.name in rows:
            raise ValueError(f"two rows are named {row.name!r}; verdicts refer to rows by name, so make names differ")
        if row.corrections < 0 or row.nfe < (row.family != REFERENCE):
            raise ValueError(
                f"row {row.name!r} has nfe={row.nfe} and corrections={row.corrections}; a sampler needs nfe >= 1 and "
                f"corrections >= 0, and only family {REFERENCE!r} has nfe=0"
            )
        for metric, (_, se) in row.distances.items():
            if se < 0:
                raise ValueError(
                    f"row {row.name!r}, {metric}: the standard error {se} is negative; give 0, more, or nan"
                )
        rows[row.name] = row
    for v in contents.verdicts:
        _check_verdict(v, rows)
    for caption, x in contents.grids.items():
        if np.ndim(x) == 4:
            images.check_pictures(f"grid {caption!r}", np.asarray(x), ndim=4)
        else:
            figures.check_rows(f"grid {caption!r}", np.asarray(x))
    for caption, x in contents.trajectories.items():
        if np.ndim(x) == 3:
            figures.check_points(f"trajectory {caption!r}", np.asarray(x), "[T, n, 2]")
        else:
            images.check_pictures(f"trajectory {caption!r}", np.asarray(x), ndim=5)
    for name, curve in contents.curves.items():
        _check_lines(f"curve {name!r}", curve, "(step, loss)")
    for name, gap in (contents.gaps | contents.influence).items():
        _check_lines(f"gap {name!r}", gap, "(t_n, distance, se)")
        if (np.asarray(gap[2]) < 0).any():
            raise ValueError(f"gap {name!r} has a negative standard error; give zeros for an unknown error")


def _check_verdict(v: Verdict, rows: dict[str, Row]) -> None:
    if v.verdict not in VERDICTS:
        raise ValueError(f"verdict {v.verdict!r} of {v.name!r} must be one of {', '.join(VERDICTS)}")
    for name in (v.name, v.baseline):
        if name not in rows:
            near = "".join(f"; nearest: {row!r}" for row in difflib.get_close_matches(name, rows, 1, 0))
            raise ValueError(f"a verdict names {name!r}, which is not in rows{near}")
        if v.metric not in rows[name].distances:
            known = ", ".join(rows[name].distances)
            raise ValueError(f"a verdict on {v.metric!r} needs it in row {name!r}, which has {known or 'none'}")
    if not {"helps": v.difference < 0, "harms": v.difference > 0}.get(v.verdict, True):
        raise ValueError(
            f"{v.name!r} {v.verdict} by a difference of {v.difference:g} in {v.metric}; "
            "differences are the distance with corrections minus the one without, so helping ones are negative"
        )


def _check_lines(name: str, arrays: Sequence, fields: str) -> None:
    shapes = [np.shape(a) for a in arrays]
    if len(shapes) != fields.count(",") + 1 or len(set(shapes)) != 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ValueError(f"{name} has shapes {shapes}; give {fields}, each [n] of one length n >= 1")


def _table(rows: list[Row], best: dict[str, Row | None]) -> list[dict]:
    colour, smallest = figures.colours(rows), {m: row and row.distances[m][0] for m, row in best.items()}
    table = []
    for row in rows:
        reference, cells = row.family == REFERENCE, []
        for m, least in smallest.items():
            mean, se = row.distances.get(m, (math.nan, math.nan))
            cells.append({"text": plus_minus(mean, se), "best": not reference and mean == least, "value": float(mean)})
        table.append({"row": row, "cells": cells, "colour": colour[row.family], "reference": reference})
    return table


def _chart_words(metric: str, best: Row) -> str:
    return (
        f"Chart of {metric} against NFE with error bars, one line per family; the smallest is "
        f"{plus_minus(*best.distances[metric])} for {best.name} at {best.nfe} NFE. The table shows all values."
    )


def _verdict_groups(verdicts: Sequence[Verdict], rows: dict[str, Row]) -> list[tuple[str, int, list]]:
    """Return ``(kind, count, [(corrected row, baseline row, [words])])``, the metrics of one comparison together."""
    groups = []
    for kind in VERDICTS:
        pairs: dict[tuple[str, str], list[str]] = {}
        for v in verdicts:
            if v.verdict == kind:
                pairs.setdefault((v.name, v.baseline), []).append(verdict_words(v))
        entries = [(rows[name], rows[baseline], words) for (name, baseline), words in pairs.items()]
        if entries:
            groups.append((kind, sum(len(words) for _, _, words in entries), entries))
    return groups


def _fixed(x: float, place: int) -> str:
    """Return ``x`` rounded to a multiple of ``10**place``, with a true minus sign and no negative zero."""
    text = f"{round(x, -place):.{max(0, -place)}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
