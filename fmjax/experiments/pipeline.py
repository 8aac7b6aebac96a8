"""The pipeline: flow, marginals, correctors, flow map, samples, comparison and report, as a list of stages."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from fmjax.data import Dataset
from fmjax.experiments import assemble, build, comparison, drawing, marginals, networks, pages, stages, workdir
from fmjax.experiments.drawing import Draws
from fmjax.experiments.networks import Plans
from fmjax.experiments.results import Result, page_record, write_page
from fmjax.experiments.samplers import DRIFT, FLOW, FLOW_MAP, Sampler
from fmjax.experiments.settings import Settings
from fmjax.experiments.stages import Stage
from fmjax.training import loop


@workdir.owner
def main(settings: Settings, path: Path) -> None:
    """Run the missing stages of the pipeline in a run folder and write the report.

    Args:
        settings: the config.
        path: the run folder.

    Raises:
        ValueError: one line, before the first stage works, for anything that cannot work.
        WorkdirError: a folder whose stages belong to another config.
    """
    data = build.data(settings.common.data)
    plans = networks.plans(settings, data)
    trained = training_stages(settings, data, plans)
    names = comparison.read_samplers(settings, flow_map=FLOW_MAP in networks.shapes(settings, plans).methods)
    every = [*trained, *_comparing_stages(settings, data, plans, names, [stage.name for stage in trained])]
    began = time.perf_counter()
    results, path = stages.run_checked(every, path, settings.config)
    if jax.process_index() == 0:
        for line in results["comparison"].value:
            print(f"      {line}")
        print(f"done in {time.perf_counter() - began:.0f} s: open {path / 'report.html'}")


def training_stages(settings: Settings, data: Dataset, plans: Plans) -> list[Stage]:
    """Return the stages that train: flow, marginals, correctors, flow map.

    Args:
        settings: the config.
        data: its data set.
        plans: its training plans by network.

    Returns:
        The stages; every stage comes after the stages that it needs.
    """
    trained = [flow_stage(settings, data, plans[FLOW])]
    if settings.correctors:
        recipe = marginals.recipe(settings, plans[FLOW], data)
        trained.append(stages.marginal_sets(recipe))
        trained += [stages.corrector(settings, name, plans[name], recipe) for name in settings.correctors]
    if FLOW_MAP in plans:
        plan = plans[FLOW_MAP]
        start = lambda results: loop.merge_parameters(plan, results[FLOW].value, "the flow")
        frozen = lambda results: start(results) if plan.target == "frozen" else None
        fields = assemble.stage_fields(settings, FLOW_MAP)
        trained.append(stages.trained(plan, fields, needs=(FLOW,), start=start, teacher=frozen))
    return trained


def flow_stage(settings: Settings, data: Dataset, plan: loop.Plan | None = None) -> Stage:
    """Return the stage that trains the flow, with the initial parameters of ``init`` and the teacher of ``teacher``.

    Args:
        settings: the config.
        data: its data set.
        plan: the flow's plan; by default assembled here.

    Returns:
        The stage; its value is the averaged parameters.

    Raises:
        ValueError: one line, for anything that cannot work.
    """
    plan = plan or assemble.flow_plan(settings, data)
    begin, teacher = (assemble.start_of(plan, settings, field) for field in ("init", "teacher"))
    if plan.method.frozen and begin is None:  # the teacher's parameters are part of the network's
        begin = teacher
    return stages.trained(
        plan, assemble.flow_fields(settings), start=lambda results: begin, teacher=lambda results: teacher,
        pictures=settings.common.sample_every, picture=networks.picture(settings, plan),
        data=networks.data_facts(settings, data),
    )  # fmt: skip


def _comparing_stages(
    settings: Settings, data: Dataset, plans: Plans, names: Sequence[Sampler], needs: Sequence[str]
) -> list[Stage]:
    """Return the stages ``"samples"`` and ``"comparison"``; ``needs`` are the stages that train the networks."""
    draws = comparison.draws_of(settings, data)
    fields = {"samplers": [sampler._asdict() for sampler in names], "draws": draws[:3], "metrics": settings.metrics}
    files_of = lambda folder: (folder.parent / "metrics.json", folder.parent / "report.html")
    samples = _samples_stage(settings, plans, names, draws, fields, needs)

    def check() -> None:
        for metric in comparison.distances(settings, data, data.test):
            metric.distance(data.train.x[: draws.samples])

    def write(results: dict[str, Result], folder: Path) -> Result:
        page, digest = pages.pipeline(settings, data, draws, names, results, folder.parent), stage.digest(results)
        write_page(*files_of(folder), digest, page, lines=page.lines)
        return Result(page.lines, digest, f"{len(page.contents.rows)} rows in metrics.json")

    def read(results: dict[str, Result], folder: Path) -> Result | None:
        record = page_record(*files_of(folder), stage.digest(results))
        return record and Result(record["lines"], record["digest"], "complete")

    stage = Stage("comparison", (*needs, "samples"), fields, check, write, read, derived=True)
    return [samples, stage]


def _samples_stage(
    settings: Settings, plans: Plans, names: Sequence[Sampler], draws: Draws, fields, needs: Sequence[str]
) -> Stage:
    """Return the stage that draws the samples of all samplers; its value is ``(samples, costs, models)``."""

    def check() -> None:
        models = networks.shapes(settings, plans)
        for sampler in names:
            drawing.check_sampler(sampler, models, cond=draws.cond)

    def run(results: dict[str, Result], folder: Path) -> Result:
        value = {name: results[networks.stage_name(name)].value for name in plans}
        params = {name: v[0] if name in settings.correctors else v for name, v in value.items()}
        if "marginals" in results:
            params[DRIFT] = networks.bank(*results["marginals"].value)
        models, identity = networks.models(settings, plans, params), networks.identity(settings, params)
        drawn = comparison.draw_all(names, models, draws, directory=folder, identity=identity)
        costs = {sampler.name: drawing.sampler_cost(sampler, models) for sampler in names}
        summary = f"{len(drawn)} samplers x {draws.seeds} runs x {draws.samples} samples"
        return Result((drawn, costs, models), identity, summary)

    size = lambda: 4 * len(names) * draws.seeds * draws.samples * math.prod(plans[FLOW].data.shape)
    return Stage("samples", tuple(needs), fields, check, run, lambda results, folder: None, size=size, derived=True)
