"""Compare drawn samples: the common part of the reports of a pipeline and of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax import sampling
from fmjax.data import Dataset
from fmjax.experiments import comparison, drawing, examples, measuring, recommend, report, spending, stored, workdir
from fmjax.experiments.drawing import Draws, Models
from fmjax.experiments.samplers import Sampler
from fmjax.experiments.settings import Settings
from fmjax.storage import files

NEAREST = 64  # samples whose nearest training examples are sought
TRAIN = 20_000  # training examples among which they are sought


class Page(NamedTuple):
    """A report and its numbers.

    Attributes:
        contents: the contents of the HTML page.
        record: the same numbers as plain values.
        lines: the summary, also printed by the command.
    """

    contents: report.Contents
    record: dict[str, Any]
    lines: list[str]


class Drawn(NamedTuple):
    """The samples of a comparison.

    Attributes:
        x: samples ``[seeds, samples, ...]`` by name of the sampler.
        costs: costs by name of the sampler.
        models: the networks that drew them.
        identity: digest of the parameters of the networks.
        directory: folder of the stored samples.
    """

    x: dict[str, np.ndarray]
    costs: dict[str, sampling.Cost]
    models: Models
    identity: str
    directory: Path


def draw_compared(names: Sequence[Sampler], models: Models, draws: Draws, *, directory: Path, identity: str) -> Drawn:
    """Draw the samples of all samplers, or read the samples that a folder already holds.

    Args:
        names: the samplers.
        models: the networks.
        draws: how many samples, and from which keys.
        directory: folder of the stored samples.
        identity: digest of the parameters.

    Returns:
        The samples with their costs.
    """
    drawn = comparison.draw_all(names, models, draws, directory=directory, identity=identity)
    costs = {sampler.name: drawing.sampler_cost(sampler, models) for sampler in names}
    return Drawn(drawn, costs, models, identity, directory)


def compare_drawn(
    settings: Settings, data: Dataset, draws: Draws, names: Sequence[Sampler], samples: Drawn, path: Path
) -> Page:
    """Compare samplers, recommend one of them, and return what every report on samples shows.

    Args:
        settings: the config.
        data: its data set, in memory.
        draws: number of runs and of samples per run.
        names: the samplers.
        samples: the samples.
        path: the folder of the run.

    Returns:
        The page: rows, verdicts, a recommendation, samples, differences, nearest training examples and costs.
    """
    drawn, costs, models = samples.x, samples.costs, samples.models
    metrics = comparison.distances(settings, data, data.test, names=names)
    test, floor = measuring.measure_all(drawn, metrics), comparison.training_runs(data, draws)
    bootstrap = settings.sampling.bootstrap
    rows, verdicts = comparison.compare(names, drawn, costs, metrics, floor, bootstrap=bootstrap, each=test)
    validation = measuring.measure_all(drawn, comparison.choosing_distances(settings, data, names))
    chosen = recommend.recommend(names, costs, validation, test)
    advised = recommend.advice(chosen, costs, test) if chosen else []
    lines = recommend.five_lines(rows, verdicts, advised)
    record = comparison.as_record(rows, verdicts) | {"environment": workdir.environment()}
    operations = spending.sampler_flops(names, models, costs, draws.cond)
    identity = lambda s: comparison.sample_identity(s, models, samples.identity)
    place = lambda s: stored.folder_of(s, draws, directory=samples.directory, identity=identity(s))
    spent = {}
    for s in names:
        time = stored.seconds(place(s), draws.seeds) * 1000 / draws.samples
        spent[s.name] = spending.Spent(costs[s.name].nfe, operations[s.name], time)
    record["runs"] = draws.seeds
    record["costs"] = {name: cost._asdict() for name, cost in spent.items()}
    record["draws"] = {s.name: str(place(s).relative_to(path)) for s in names}
    near = {}
    if chosen:
        record["recommendation"] = {
            "sampler": chosen.sampler.name, "baseline": chosen.baseline and chosen.baseline.name,
            "changes": [v._asdict() for v in chosen.changes], "sentences": advised,
        }  # fmt: skip
        near, record["neighbours"] = _neighbours(data, chosen.sampler.name, drawn[chosen.sampler.name][0])
    contents = report.Contents(
        title=f"fmjax: {data.name}", summary=lines[2:], rows=rows, verdicts=verdicts,
        grids=comparison.source_grid(models, draws) | comparison.grids(data, drawn), trajectories={}, curves={},
        gaps={}, facts=comparison.facts(settings, data, metrics), notes=comparison.notes(metrics), advice=lines[:2],
        first=["test data", chosen.sampler.name] if chosen else [], choices=recommend.choices(names, validation, test),
        differences=[(s.name, s.baseline) for s in names if s.baseline], neighbours=near, costs=spent,
        config=json.dumps(files.seal(workdir.plain(settings.config), workdir.CONFIG), indent=1),
    )  # fmt: skip
    return Page(contents, record, lines)


def _neighbours(data: Dataset, name: str, x: np.ndarray) -> tuple[dict, dict]:
    """Return samples with their nearest training examples for the page, and the median distances as a record."""
    train = np.asarray(data.train.x[:TRAIN])
    if not np.isfinite(x).all():
        return {}, {}
    at, distance = examples.nearest_training(x[:NEAREST], train)
    _, of_test = examples.nearest_training(np.asarray(data.test.x[:NEAREST]), train)
    record = {"sampler": name, "median": float(np.median(distance)), "median of test data": float(np.median(of_test))}
    remark = (
        f"Median distance to the nearest training example: {record['median']:.3g}; of test examples "
        f"{record['median of test data']:.3g}."
    )
    return {name: (x[:NEAREST], train[at], remark)}, record
