"""Reflow and half-straightening: a teacher, trajectories of the teacher, students on the chords, and a comparison."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import correction, straightening
from fmjax.checks import refusal
from fmjax.data import Dataset
from fmjax.experiments import (
    assemble,
    build,
    comparison,
    pipeline,
    records,
    report,
    specs,
    stages,
    straightened,
    workdir,
)
from fmjax.experiments.marginals import with_bar
from fmjax.experiments.results import Result, curves, finished, page_record, read_trained
from fmjax.experiments.samplers import FLOW
from fmjax.experiments.settings import Settings, Straighten
from fmjax.experiments.stages import Stage
from fmjax.keys import example_keys, from_seed
from fmjax.storage import checkpoint, files
from fmjax.storage.shards import Unfinished
from fmjax.straightening import TEACHER, SegmentedModel
from fmjax.training import loop, plans, sharding

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
    stages.check_space(every, path)
    stages.check_stages(every)
    fields = {stage.name: stage.fields for stage in trained}
    path = workdir.open_workdir(path, settings.config, fields, stages.grows(every))
    results = stages.run_all(every, path)
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
        raise refusal("path", settings.common.path, "the comparison is on the linear path", "Set path='linear'")
    if s.bounds[0] != 0 or s.bounds[-1] != 1:
        raise refusal("straighten.bounds", s.bounds, "samples go from 0 to 1", "Begin with 0 and end with 1")
    try:
        models, options = straightening.comparison_models(s.bounds, s.parts, s.sharing, full=s.full)
    except ValueError as error:
        raise ValueError(f"straighten.{error}") from error
    if s.baselines and not settings.common.normal_source:
        wrong = "these samplers of the teacher (DDIM, DPM-Solver++, ...) need the source N(0, I)"
        raise refusal("straighten.baselines", s.baselines, wrong, "Set straighten.baselines=()")
    if not options:
        raise refusal("straighten.sharing", s.sharing, "trains no student", "Give ('gated',), or set straighten.full")
    flow = assemble.flow_plan(settings, data)
    students = {name: (_student(settings, name, option, data), option) for name, option in options.items()}
    trained = [pipeline.flow_stage(settings, data, flow), _trajectories(settings, flow, data)]
    trained += [_student_stage(settings, data, plan, option) for plan, option in students.values()]
    return trained, students, models


def _student(settings: Settings, name: str, options: Mapping[str, Any], data: Dataset) -> loop.Plan:
    """Return the training plan of a student, with batches of the right shapes for the checks."""
    part, s = settings.straighten
    specs.check_spec(specs.METHOD, part.method, field="straighten.method")
    method = {**dict(part.method.items() if hasattr(part.method, "items") else {"name": part.method}), **options}
    part = dataclasses.replace(part, method=method)
    batch = assemble.marginal_batch(settings.common, data, part.batch_size, t=float(s.bounds[0]))
    net = settings.flow.net if part.net is None else part.net
    return assemble.plan(f"straighten.{name}", settings.common, part, net, data, batch=batch, seed=s.seed)


def _student_stage(settings: Settings, data: Dataset, plan: loop.Plan, options: Mapping[str, Any]) -> Stage:
    """Return the stage that trains a student on trajectories of the teacher, from the teacher's parameters.

    Half of each batch is real data in the kept segments, where the loss compares the student with the teacher.
    """
    _, s = settings.straighten
    keep = tuple(options.get("keep", ()))
    kept = {"kept_fraction": 0.5 if options.get("retention", 1.0) else 0.0}
    real = {"keep": keep, "real": data.train.x, "real_cond": assemble.conditions(settings.common, data), **kept}
    real["source"] = None if settings.common.normal_source else settings.common.origin.training

    def work(results: dict[str, Result], folder: Path) -> Result:
        flow, ends = results[FLOW].value, results["trajectories"].value
        batch = straightening.segment_batches(
            ends, options["bounds"], batch_size=plan.data.batch_size, seed=s.seed, **(real if keep else {})
        )
        size = plan.data.batch_size // jax.process_count()
        part = slice(jax.process_index() * size, (jax.process_index() + 1) * size)  # all draw the whole batch
        ready = plan.replace(batch=lambda step: jax.tree.map(lambda a: a[part], batch(step)))
        state = loop.train(ready, folder, params=flow, teacher=flow, record=stage.record(results))
        return finished(state.ema, plan, folder)

    def complete(results: dict[str, Result], folder: Path) -> Result | None:
        flow = results[FLOW].value
        return read_trained(plan, folder, {"params": flow, "teacher": flow})

    fields = _training_only(assemble.stage_fields(settings, "straighten") | {"student": plan.name})
    size, needs = functools.partial(plans.checkpoint_bytes, plan), (FLOW, "trajectories")
    stage = Stage(plan.name, needs, fields, lambda: None, work, complete, plan=plan, size=size)
    return stage


def _training_only(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a student without the fields that only the comparison depends on."""
    compared = ("allocations", "reference_steps", "baselines", "probes", "parts", "sharing", "full")
    return {k: v for k, v in fields.items() if not any(k.startswith(f"straighten.{name}") for name in compared)}


def _trajectories(settings: Settings, flow: loop.Plan, data: Dataset) -> Stage:
    """Return the stage that solves the teacher's ODE from the source and stores the states at the bounds."""
    _, s = settings.straighten
    ts, index = straightened.teacher_grid(s.grid, s.grid_steps, s.bounds)
    cond = assemble.conditions(settings.common, data)
    repeat = lambda a: np.asarray(a)[np.arange(s.examples) % data.train.count]
    options = {
        "direction": "forward", "count": s.examples, "shape": flow.data.shape, "seed": s.seed, "solver": s.solver,
        "steps": index, "mesh": flow.mesh, "cond": jax.tree.map(repeat, cond),
    }  # fmt: skip
    if not settings.common.normal_source:
        keys = example_keys(from_seed(s.seed), jnp.arange(s.examples))
        options["data"] = np.asarray(settings.common.origin.training.examples(keys, flow.data.shape))
        options = {name: value for name, value in options.items() if name not in ("count", "shape", "seed")}

    def read(folder: Path, digest: str) -> Result:
        named = {name: options[name] for name in ("direction", "count", "seed", "solver", "steps") if name in options}
        named |= {"data": checkpoint.digest_rows(options["data"])} if "data" in options else {}
        states = correction.read_marginals(folder, expect={"flow": digest, "ts": ts, **named})
        words = f"{len(states.x)} of the teacher, at {', '.join(f'{t:g}' for t in states.ts)}"
        return Result(states, hashlib.sha256(repr(states.manifest).encode()).hexdigest(), words)

    def work(results: dict[str, Result], folder: Path) -> Result:
        params = results[FLOW].value
        digest = checkpoint.digest(params)
        make = functools.partial(
            correction.build_marginals, flow.method.velocity, params, ts, directory=folder, flow=digest, **options
        )
        with_bar(make, "forward")
        sharding.barrier("trajectories")
        return read(folder, digest)

    def complete(results: dict[str, Result], folder: Path) -> Result | None:
        try:
            return read(folder, checkpoint.digest(results[FLOW].value))
        except FileNotFoundError:
            return None
        except Unfinished as error:
            records.tell(folder, str(error), "built again")
            return None
        except ValueError as error:
            raise workdir.WorkdirError(f"{error}. Delete {folder} to solve the trajectories again.") from None

    def check() -> None:
        try:
            correction.trajectories.check_options("forward", s.solver, "reverse")
            for counts in s.allocations:
                straightening.segment_grid(s.bounds, counts)
        except ValueError as error:
            raise ValueError(f"straighten.{error}") from error

    names = ("seed", "bounds", "grid", "grid_steps", "solver", "examples")
    fields = {f"straighten.{name}": getattr(s, name) for name in names} | settings.common.source_field()
    size = lambda: 4 * s.examples * len(index) * math.prod(flow.data.shape)
    return Stage("trajectories", (FLOW,), fields, check, work, complete, size=size)


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
        if jax.process_index() == 0:
            report.write_report(path / "report.html", page.contents)
            kept = {"digest": digest, "page": files.file_digest(path / "report.html")}
            files.write_json(path / "straightened.json", page.record | kept)
        return Result(None, digest, f"{len(page.record['rows'])} samplers")

    def read(results: dict[str, Result], folder: Path) -> Result | None:
        path = folder.parent
        record = page_record(path / "straightened.json", path / "report.html", stage.digest(results))
        return record and Result(None, record["digest"], "complete")

    stage = Stage("comparison", tuple(needs), fields, check, work, read, derived=True)
    return stage
