"""Compare the reports of two run folders: rows, differences with errors, samples, costs and configs side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax.checks import Refusal
from fmjax.experiments import comparison, records, report, stored, workdir
from fmjax.experiments.contents import VERDICTS, Contents, Verdict
from fmjax.experiments.figures import REFERENCE, Row
from fmjax.experiments.spending import Spent
from fmjax.storage import files

NUMBERS = ("metrics.json", "evaluation.json")  # of a pipeline, else of an evaluation
PAGE = "side_by_side.html"


class Measured(NamedTuple):
    """What a run folder measured.

    Attributes:
        label: the name of the run on the page.
        path: the run folder.
        record: the numbers of its report.
        rows: the rows of its table.
        config: its config by dotted name.
    """

    label: str
    path: Path
    record: dict[str, Any]
    rows: list[Row]
    config: dict[str, Any]


def main(run: Sequence[str], out: str = PAGE) -> None:
    """Write the report of two runs side by side and print its summary.

    Args:
        run: two run folders, each with the numbers of a pipeline or of an evaluation.
        out: the HTML file.

    Raises:
        ValueError: not two folders, or an output that cannot be written.
        WorkdirError: a folder without numbers, or with damaged numbers.
    """
    if len(run) != 2:
        raise Refusal("run", list(run), "not two run folders", "Give two, such as launch.report W1 W2")
    target = files.local_path("out", out)
    if target.suffix != ".html" or not target.absolute().parent.is_dir():
        raise Refusal("out", out, "not an .html file in a folder that exists", f"Give a file such as {PAGE}")
    first, second = (measured(path, label) for path, label in zip(run, labels(run), strict=True))
    contents = page(first, second)
    report.write_report(target, contents)
    for line in [*contents.advice, *contents.summary]:
        print(line)
    print(f"open {target.absolute()}")


def labels(paths: Sequence[str]) -> list[str]:
    """Return short names of run folders: the parts of their paths in which the folders differ.

    Args:
        paths: two folders.

    Returns:
        Their names.

    >>> labels(["runs/a/digits", "runs/b/digits"]), labels(["w", "w"])
    (['a', 'b'], ['w (1)', 'w (2)'])
    """
    parts = [Path(os.path.abspath(p)).parts for p in paths]
    for a, b in zip(*(reversed(p) for p in parts), strict=False):
        if a != b:
            return [a, b]
    return [f"{p[-1]} ({i})" for i, p in enumerate(parts, 1)]


def measured(path: str | Path, label: str) -> Measured:
    """Read the numbers of a run folder.

    Args:
        path: the run folder.
        label: the name of the run on the page.

    Returns:
        The numbers.

    Raises:
        WorkdirError: there are none, or they are damaged.
    """
    folder = workdir.local(path)
    names = [name for name in NUMBERS if (folder / name).exists()]
    if not names:
        raise workdir.WorkdirError(
            f"workdir={folder}: has no {' or '.join(NUMBERS)}. Complete launch.pipeline or launch.evaluate."
        )
    try:
        record = files.read_json(folder / names[0])
        rows = [Row(**row) for row in record["rows"]]
        config = workdir.flat(files.read_json(folder / workdir.CONFIG))
    except (files.DamagedFile, KeyError, TypeError) as error:
        what = str(error) if isinstance(error, files.DamagedFile) else f"{folder / names[0]} has no table"
        raise workdir.WorkdirError(f"{what}. Run launch.pipeline or launch.evaluate there again.") from error
    return Measured(label, folder, record, rows, config)


def welch(name: str, baseline: str, metric: str, new: Sequence[float], old: Sequence[float], runs) -> Verdict:
    """Compare two means with standard errors over different runs by Welch's two-sided test at level 0.05.

    Args:
        name: the row of the second run.
        baseline: the row of the first run.
        metric: the distance.
        new: mean and standard error of the second run.
        old: mean and standard error of the first run.
        runs: number of runs of samples behind the two means, second and first.

    Returns:
        The verdict; no difference is seen where an error is unknown.
    """
    from scipy.special import stdtrit

    difference, se = float(new[0] - old[0]), math.hypot(new[1], old[1])
    if not (math.isfinite(difference) and math.isfinite(se)) or min(runs) < 2 or se == 0:
        return Verdict(name, baseline, metric, difference, math.nan, VERDICTS[1])
    freedom = se**4 / sum(e**4 / (k - 1) for e, k in zip((new[1], old[1]), runs, strict=True))
    seen = abs(difference) > stdtrit(freedom, 0.975) * se
    return Verdict(name, baseline, metric, difference, se, VERDICTS[1 + int(np.sign(difference)) * seen])


def page(first: Measured, second: Measured) -> Contents:
    """Return the report of two runs side by side.

    Args:
        first: the baseline.
        second: the run that is compared with it.

    Returns:
        The contents of the page; differences are the second run minus the first.
    """
    both = (first, second)
    rows = [_renamed(row, part.label) for part in both for row in part.rows]
    by_name = [{row.name: row for row in part.rows} for part in both]
    common = [n for n, row in by_name[0].items() if n in by_name[1] and row.family != REFERENCE]
    runs = [int(part.record.get("runs", 1)) for part in (second, first)]
    label = lambda part, name: f"{part.label}: {name}"
    verdicts = [
        welch(label(second, n), label(first, n), m, by_name[1][n].distances[m], by_name[0][n].distances[m], runs)
        for n in common
        for m in by_name[0][n].distances
        if m in by_name[1][n].distances
    ]
    advised = [part.record.get("recommendation", {}) for part in both]
    advice = [label(p, a["sentences"][0]) for p, a in zip(both, advised, strict=True) if a]
    grids = _grids(both, common, [a["sampler"] for a in advised if a])
    shown = [label(p, a["sampler"]) for p, a in zip(both, advised, strict=True) if a]
    costs = {label(p, name): Spent(**cost) for p in both for name, cost in p.record.get("costs", {}).items()}
    differing = records.differing_values(first.config, second.config)
    facts = {part.label: str(part.path) for part in both}
    facts |= {f: f"{a} in {first.label}; {b} in {second.label}" for f, (a, b) in differing.items()}
    question = (
        f"How does {second.label} differ from {first.label}?",
        f"Each sampler of {second.label} is compared with the sampler of this name of {first.label}, by Welch's test.",
        f"Samplers of {second.label}",
    )
    summary = [
        f"{len(common)} samplers are in both runs; {len(differing)} fields of the configs differ.",
        report.count_line(verdicts, question[2]),
    ]
    return Contents(
        title=f"fmjax: {first.label} and {second.label}", summary=summary, rows=rows, verdicts=verdicts, grids=grids,
        trajectories={}, curves={}, gaps={}, facts=facts, notes=comparison.NOTES[:1], advice=advice,
        first=[name for name in shown if name in grids], question=question, costs=costs,
        command=f"python -m launch.report {first.path} {second.path}",
    )  # fmt: skip


def _renamed(row: Row, label: str) -> Row:
    family = row.family if row.family == REFERENCE else f"{label}: {row.family}"
    distances = {name: tuple(value) for name, value in row.distances.items()}
    return row._replace(name=f"{label}: {row.name}", family=family, distances=distances)


def _grids(both: Sequence[Measured], common: Sequence[str], recommended: Sequence[str]) -> dict[str, np.ndarray]:
    """Return stored samples of the plain samplers that both runs have, and of the recommended ones, side by side."""
    plain = {row.name for part in both for row in part.rows if not row.corrections}
    grids = {}
    for name in dict.fromkeys([*recommended, *(n for n in common if n in plain)]):
        for part in both:
            place = _inside(part.path, part.record.get("draws", {}), name)
            x = place and stored.read_first(place)
            if x is not None and np.isfinite(x).all():
                grids[f"{part.label}: {name}"] = x[: comparison.CLOUD if x.ndim == 2 else comparison.SHOWN["image"]]
    return grids


def _inside(path: Path, draws: Mapping[str, str], name: str) -> Path | None:
    """Return the folder of the samples of a sampler; ``None`` where it is not inside the run folder."""
    place = (path / str(draws.get(name, ".."))).resolve()
    return place if place.is_relative_to(path.resolve()) else None
