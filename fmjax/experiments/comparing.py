"""The stages of a pipeline that fit pushes, draw the samples of all samplers, and compare them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fmjax.data import Dataset
from fmjax.experiments import comparison, drawing, networks, pages, pushes
from fmjax.experiments.compared import draw_compared
from fmjax.experiments.drawing import Draws
from fmjax.experiments.networks import Plans
from fmjax.experiments.results import Result, page_record, write_page
from fmjax.experiments.samplers import DRIFT, FLOW, Sampler
from fmjax.experiments.settings import Settings
from fmjax.experiments.stages import Stage


def comparing_stages(
    settings: Settings, data: Dataset, plans: Plans, names: Sequence[Sampler], needs: Sequence[str]
) -> list[Stage]:
    """Return the stages ``"pushes"`` (where a sampler takes one), ``"samples"`` and ``"comparison"``.

    Args:
        settings: the config.
        data: its data set.
        plans: its training plans by network.
        names: the samplers.
        needs: the stages that train the networks.

    Returns:
        The stages.
    """
    fitted = []
    if pushes.fitted(names):
        ready = lambda results: _networks(settings, plans, results)[0]
        fitted, needs = [pushes.push_stage(settings, data, names, needs, ready)], [*needs, pushes.STAGE]
    draws = comparison.draws_of(settings, data)
    fields = {"samplers": [sampler._asdict() for sampler in names], "draws": draws[:3], "metrics": settings.metrics}
    files_of = lambda folder: (folder.parent / "metrics.json", folder.parent / "report.html")
    samples = _samples_stage(settings, data, plans, names, draws, fields, needs)

    def check() -> None:
        x = data.train.x[: draws.samples]
        for metric in comparison.distances(settings, data, data.test, names=names):
            metric.distance(*[x] * (1 if metric.teacher is None else 2))
        comparison.choosing_distances(settings, data, names)

    def write(results: dict[str, Result], folder: Path) -> Result:
        page, digest = pages.pipeline(settings, data, draws, names, results, folder.parent), stage.digest(results)
        write_page(*files_of(folder), digest, page, lines=page.lines)
        return Result(page.lines, digest, f"{len(page.contents.rows)} rows in metrics.json")

    def read(results: dict[str, Result], folder: Path) -> Result | None:
        record = page_record(*files_of(folder), stage.digest(results))
        return record and Result(record["lines"], record["digest"], "complete")

    stage = Stage("comparison", (*needs, "samples"), fields, check, write, read, derived=True)
    return [*fitted, samples, stage]


def _networks(settings: Settings, plans: Plans, results: Mapping[str, Result]) -> tuple[drawing.Models, str]:
    """Return the networks of complete stages in the form that samplers use, and the name of their parameters."""
    value = {name: results[networks.stage_name(name)].value for name in plans}
    params = {name: v[0] if name in settings.correctors else v for name, v in value.items()}
    if "marginals" in results:
        params[DRIFT] = networks.bank(*results["marginals"].value)
    return networks.models(settings, plans, params), networks.identity(settings, params)


def _samples_stage(
    settings: Settings,
    data: Dataset,
    plans: Plans,
    names: Sequence[Sampler],
    draws: Draws,
    fields,
    needs: Sequence[str],
) -> Stage:
    """Return the stage that draws the samples of all samplers; its value is ``Drawn``."""

    def check() -> None:
        models = pushes.with_stand_ins(networks.shapes(settings, plans), names, data)
        for sampler in names:
            drawing.check_sampler(sampler, models, cond=draws.cond)

    def run(results: dict[str, Result], folder: Path) -> Result:
        models, identity = _networks(settings, plans, results)
        models = pushes.add(models, results[pushes.STAGE].value if pushes.STAGE in results else {})
        drawn = draw_compared(names, models, draws, directory=folder, identity=identity)
        summary = f"{len(drawn.x)} samplers x {draws.seeds} runs x {draws.samples} samples"
        return Result(drawn, identity, summary)

    size = lambda: 4 * len(names) * draws.seeds * draws.samples * math.prod(plans[FLOW].data.shape)
    return Stage("samples", tuple(needs), fields, check, run, lambda results, folder: None, size=size, derived=True)
