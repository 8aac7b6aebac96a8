"""Reflow and half-straightening: a teacher, trajectories of the teacher, students on the chords, and a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fmjax import straightening
from fmjax.checks import Refusal
from fmjax.data import Dataset
from fmjax.experiments import assemble, build, comparison, pipeline, specs, stages, straightened, workdir
from fmjax.experiments.results import Result, curves, page_record, write_page
from fmjax.experiments.samplers import FLOW
from fmjax.experiments.settings import Settings, Straighten
from fmjax.experiments.stages import Stage
from fmjax.experiments.students import student, student_plan, trajectories
from fmjax.straightening import TEACHER, SegmentedModel
from fmjax.training import loop

Students = Mapping[str, tuple[loop.Plan, dict[str, Any]]]


@workdir.owner
def main(settings: Settings, path: Path) -> None:
    """Train teacher and students in a run folder, compare teacher and students, and write the report.

    Args:
        settings: the config, with ``straighten``.
        path: the run folder.

    Raises:
        ValueError: one line, before any work, for anything that cannot work.
        WorkdirError: a folder of another config.
    """
    data = build.data(settings.common.data)
    trained, students, models = student_stages(settings, data)
    flow = assemble.flow_plan(settings, data)
    every = [*trained, _comparing_stage(settings, data, flow, students, models, [stage.name for stage in trained])]
    results, path = stages.run_checked(every, path, settings.config)
    if jax.process_index() == 0:
        print(f"{results['comparison'].summary}; open {path / 'report.html'}")


def student_stages(settings: Settings, data: Dataset) -> tuple[list[Stage], Students, list[SegmentedModel]]:
    """Return the stages that train teacher and students.

    Args:
        settings: the config, with ``straighten``.
        data: its data set.

    Returns:
        The stages, the students (plan and options of the method) by name, and the models of the comparison.

    Raises:
        ValueError: one line, for anything that cannot work.
    """
    if settings.straighten is None:
        raise ValueError("straighten: the config has none. Add straighten(c), as configs/half_straightening_digits.py.")
    part, s = settings.straighten
    if specs.name_of(settings.common.path) != "linear":
        raise Refusal("path", settings.common.path, "the comparison is on the linear path", "Set path='linear'")
    if s.bounds[0] != 0 or s.bounds[-1] != 1:
        raise Refusal("straighten.bounds", s.bounds, "samples go from 0 to 1", "Begin with 0 and end with 1")
    try:
        models, options = straightening.comparison_models(s.bounds, s.parts, s.sharing, full=s.full)
    except ValueError as error:
        raise ValueError(f"straighten.{error}") from error
    if s.baselines and not settings.common.normal_source:
        wrong = "these samplers of the teacher (DDIM, DPM-Solver++, ...) need the source N(0, I)"
        raise Refusal("straighten.baselines", s.baselines, wrong, "Set straighten.baselines=()")
    if not options:
        raise Refusal("straighten.sharing", s.sharing, "trains no student", "Give ('gated',), or set straighten.full")
    flow = assemble.flow_plan(settings, data)
    students = {name: (student_plan(settings, name, option, data), option) for name, option in options.items()}
    trained = [pipeline.flow_stage(settings, data, flow), trajectories(settings, flow, data)]
    trained += [student(settings, data, plan, option) for plan, option in students.values()]
    return trained, students, models


def _comparing_stage(
    settings: Settings, data: Dataset, flow: loop.Plan, students: Students, models: list[SegmentedModel], needs
) -> Stage:
    """Return the stage that compares teacher and students and writes ``straightened.json`` and the report."""
    _, s = settings.straighten
    methods = {TEACHER: flow.method} | {name: plan.method for name, (plan, _) in students.items()}
    draws = comparison.draws_of(settings, data)
    compared = {name: getattr(s, name) for name in Straighten.__dataclass_fields__}
    fields = workdir.plain({"straighten": compared, "draws": draws[:3], "metrics": settings.metrics})

    def check() -> None:
        specs.build(specs.SOLVER, s.solver, lambda x, t, cond=None: x, field="straighten.solver")
        comparison.distances(settings, data, data.test)

    def work(results: dict[str, Result], folder: Path) -> Result:
        path = folder.parent
        params = {TEACHER: results[FLOW].value}
        params |= {name: results[plan.name].value for name, (plan, _) in students.items()}
        page = straightened.compare_students(settings, data, draws, models, methods, params, curves(path, results))
        digest = stage.digest(results)
        write_page(path / "straightened.json", path / "report.html", digest, page)
        return Result(None, digest, f"{len(page.record['rows'])} samplers")

    def read(results: dict[str, Result], folder: Path) -> Result | None:
        path = folder.parent
        record = page_record(path / "straightened.json", path / "report.html", stage.digest(results))
        return record and Result(None, record["digest"], "complete")

    stage = Stage("comparison", tuple(needs), fields, check, work, read, derived=True)
    return stage
