"""The pipeline: flow, marginals, correctors, flow map, samples, comparison and report, as a list of stages."""

from __future__ import annotations

import time
from pathlib import Path

import jax

from fmjax.data import Dataset, describe_data
from fmjax.experiments import assemble, build, comparison, marginals, networks, stages, workdir
from fmjax.experiments.comparing import comparing_stages
from fmjax.experiments.networks import Plans
from fmjax.experiments.samplers import FLOW, FLOW_MAP
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
    every = [*trained, *comparing_stages(settings, data, plans, names, [stage.name for stage in trained])]
    began = time.perf_counter()
    results, path = stages.run_checked(every, path, settings.config, line=f"data {data.name}: {describe_data(data)}")
    if jax.process_index() == 0:
        for line in results["comparison"].value:
            print(line)
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
        frozen = lambda results: start(results) if plan.target in ("frozen", "both") else None
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
