"""Write a report: one self-contained HTML file with a recommendation, distances, verdicts, samples and costs.

``Contents`` holds the data and ``write_report`` writes the file. Equal contents give equal bytes. All figures are
inside the file, so that the page opens without an internet connection.
"""

from __future__ import annotations

import importlib.resources
import math
import os
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fmjax.experiments import effects, examples, figures, players, spending
from fmjax.experiments.charts import DARK, LIGHT
from fmjax.experiments.contents import CORRECTIONS, VERDICTS, Contents, Verdict, check_contents
from fmjax.experiments.figures import REFERENCE, Row
from fmjax.storage.files import write_bytes

LOOK = 16  # examples of the data and of the recommended sampler on the first screen
# order of the rows; other families follow, and "data" is last
FAMILIES = ("euler", "euler + corrections", "rk4", "rk4 + corrections", "flow map", "flow map + corrections")


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
    by_name = {row.name: row for row in rows}
    metrics = list(dict.fromkeys(m for row in rows for m in row.distances))
    best = {m: best_row(rows, m) for m in metrics}
    drawn = [m for m, row in best.items() if row]
    charts = [figures.distance_chart(m, rows, _chart_words(m, best[m]), labelled=m == drawn[0]) for m in drawn]
    every = effects.effects(contents.verdicts, by_name)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals |= {"percent": effects.percent, "dot": effects.dot, "number": spending.number}
    template = (importlib.resources.files("fmjax.experiments") / "report.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(
        c=contents,
        schemes=(LIGHT, DARK),
        metrics=metrics,
        rows=_table(rows, best),
        look=_look(contents, [best[m].name for m in drawn[:1]]),
        csv=urllib.parse.quote(effects.as_csv(rows)),
        config=urllib.parse.quote(contents.config),
        charts=charts,
        groups=[("", [e for e in every if not e.row.control]), ("noise alone", [e for e in every if e.row.control])],
        axes={m: effects.axis(m, every) for m in metrics},
        count=count_line(contents.verdicts, contents.question[2]),
        verdicts=_verdict_groups(contents.verdicts, by_name),
        costs=[(row.name, contents.costs[row.name]) for row in rows if row.name in contents.costs],
        sections=_sections(contents),
        players=[players.player(name, np.asarray(x)) for name, x in contents.trajectories.items()],
    )


def _look(contents: Contents, best: Sequence[str]) -> list[figures.PageFigure]:
    """Return a few examples of the grids that stand first, else test data beside the best sampler."""
    shown = contents.first or [name for name in best if name in contents.grids]
    names = contents.first or [name for name in ("test data", *shown) if name in contents.grids and shown]
    grids = {name: np.asarray(contents.grids[name]) for name in names}
    few = {name: x[:LOOK] if x.ndim == 4 else x for name, x in grids.items()}
    return [examples.sample_figure(name, x, _clouds(few), few.get("test data"), side=2.6) for name, x in few.items()]


def _clouds(grids: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [x for x in grids.values() if np.ndim(x) == 2 and np.shape(x)[1] == 2]


def _sections(contents: Contents) -> list[tuple[str, str, str, list, list]]:
    """Return the sections that hold figures alone: anchor, heading, hint, figures, folded figures."""
    grids = {name: np.asarray(x) for name, x in contents.grids.items()}
    clouds, data = _clouds(grids), grids.get("test data")
    gaps = [figures.gap_chart(contents.gaps)] if contents.gaps else []
    drawn = lambda name: examples.sample_figure(name, grids[name], clouds, data)
    corrected = [row.name for row in contents.rows if row.corrections and row.name in grids]
    changes = [effects.change_chart(contents.changes)] if contents.changes else []
    pairs = [(a, b) for a, b in contents.differences if grids[a].shape == grids[b].shape]
    return [
        ("samples", "Samples", "Samples of all samplers start from the same noise.",
         [drawn(name) for name in grids if name not in corrected], [drawn(name) for name in corrected]),
        ("differences", "What corrections change", "Each sample with the correction minus the sample without it.",
         [examples.difference_figure(a, b, grids[a], grids[b]) for a, b in pairs] + changes, []),
        ("neighbours", "Nearest training examples", "Samples that repeat a training example are much nearer to it than "
         "test examples are to theirs.",
         [examples.neighbour_figure(name, *values) for name, values in contents.neighbours.items()], []),
        ("marginals", "Marginals along t", "Forward marginals follow the flow from the source, backward marginals "
         "follow it back from the data; they are the same for a perfect flow.",
         [examples.marginal_figure(name, *values) for name, values in contents.marginals.items()] + gaps, []),
        ("influence", "Effect of one correction", "",
         [figures.influence_chart(contents.influence)] if contents.influence else [], []),
        ("training", "Training", "Losses on a log axis: single values (faint) and a moving mean (solid).",
         [figures.loss_chart(name, *curve) for name, curve in contents.curves.items()], []),
    ]  # fmt: skip


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


def count_line(verdicts: Sequence[Verdict], subject: str = CORRECTIONS[2]) -> str:
    """Return one sentence: how often corrections lower the distance, raise it, or make no difference.

    Args:
        verdicts: the verdicts.
        subject: what lowers or raises the distance.

    Returns:
        The sentence.
    """
    helps, nothing, harms = (sum(v.verdict == kind for v in verdicts) for kind in VERDICTS)
    comparisons = f"{len(verdicts)} comparison{'' if len(verdicts) == 1 else 's'}"
    return (
        f"{subject} lower the distance in {helps} of {comparisons}, raise the distance in "
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
