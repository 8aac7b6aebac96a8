"""Train one stage of a config in a run folder, on any number of processes."""

from __future__ import annotations

from pathlib import Path

import jax

from fmjax.data import Dataset
from fmjax.experiments import build, forks, networks, pipeline, reflow, stages, workdir
from fmjax.experiments.settings import Settings
from fmjax.experiments.stages import Stage
from fmjax.training import sharding


@workdir.owner
def main(settings: Settings, path: Path, *, stage: str = "flow", fork: str | None = None) -> None:
    """Train a stage, or continue a training; the stages that the stage needs must be complete in the folder.

    Args:
        settings: the config.
        path: the run folder.
        stage: ``"flow"``, ``"marginals"``, ``"correctors.NAME"``, ``"flow_map"``, ``"trajectories"`` or
            ``"straighten.NAME"``.
        fork: run folder whose state of this stage a new run starts from.

    Raises:
        ValueError: one line, before anything is written.
        WorkdirError: a folder of another config, or a needed stage that is not complete.
    """
    data = build.data(settings.common.data)
    every = [pipeline.flow_stage(settings, data)] if stage == "flow" else _trained_stages(settings, data)
    stages.check_stages(every, stage)
    (chosen,) = (s for s in every if s.name == stage)
    stages.check_disk([chosen], path)
    fields = {s.name: s.fields for s in every}
    copy_state = forks.fork(fork, path, stage, fields[stage], chosen.plan) if fork else None
    workdir.open_workdir(path, settings.config, fields, stages.grows(every))
    if copy_state:
        copy_state()
        sharding.barrier("fork")
    result = stages.run_one(every, stage, path)
    if jax.process_index() == 0:
        print(f"{stage}: {result.summary}, in {workdir.stage_folder(path, stage)}")


def _trained_stages(settings: Settings, data: Dataset) -> list[Stage]:
    """Return all stages of a config that train: the stages of the pipeline and of half-straightening."""
    trained = pipeline.training_stages(settings, data, networks.plans(settings, data))
    if settings.straighten is None:
        return trained
    return trained + [s for s in reflow.student_stages(settings, data)[0] if s.name != "flow"]
