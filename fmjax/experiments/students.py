"""The stages of half-straightening: trajectories of a teacher, and students that train on their chords."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import correction, straightening
from fmjax.data import Dataset
from fmjax.experiments import assemble, records, specs, straightened, workdir
from fmjax.experiments.marginals import with_bar
from fmjax.experiments.results import Result, finished, read_trained
from fmjax.experiments.samplers import FLOW
from fmjax.experiments.settings import Settings
from fmjax.experiments.stages import Stage
from fmjax.storage import checkpoint
from fmjax.storage.shards import Unfinished
from fmjax.training import loop, plans, sharding


def student_plan(settings: Settings, name: str, options: Mapping[str, Any], data: Dataset) -> loop.Plan:
    """Return the training plan of a student, with batches of the right shapes for the checks.

    Args:
        settings: the config, with ``straighten``.
        name: the student.
        options: options of the method.
        data: the data set.

    Returns:
        The checked plan.

    Raises:
        ValueError: a name, option or shape that cannot work.
    """
    part, s = settings.straighten
    specs.check_spec(specs.METHOD, part.method, field="straighten.method")
    method = {**dict(part.method.items() if hasattr(part.method, "items") else {"name": part.method}), **options}
    part = dataclasses.replace(part, method=method)
    batch = assemble.marginal_batch(settings.common, data, part.batch_size, t=float(s.bounds[0]))
    net = settings.flow.net if part.net is None else part.net
    return assemble.plan(f"straighten.{name}", settings.common, part, net, data, batch=batch, seed=s.seed)


def student(settings: Settings, data: Dataset, plan: loop.Plan, options: Mapping[str, Any]) -> Stage:
    """Return the stage that trains a student on trajectories of the teacher, from the teacher's parameters.

    Half of each batch is real data in the kept segments, where the loss compares the student with the teacher.

    Args:
        settings: the config, with ``straighten``.
        data: the data set.
        plan: the student's training plan.
        options: options of its method.

    Returns:
        The stage; its value is the averaged parameters.
    """
    _, s = settings.straighten
    keep = tuple(options.get("keep", ()))
    kept = {"kept_fraction": 0.5 if options.get("retention", 1.0) else 0.0}
    real = {"keep": keep, "real": data.train.x, "real_cond": assemble.conditions(settings.common, data), **kept}

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


def trajectories(settings: Settings, flow: loop.Plan, data: Dataset) -> Stage:
    """Return the stage that solves the teacher's ODE from noise and stores the states at the bounds.

    Args:
        settings: the config, with ``straighten``.
        flow: the training plan of the teacher.
        data: the data set, for the conditions.

    Returns:
        The stage; its value is the states as marginals.
    """
    _, s = settings.straighten
    ts, index = straightened.teacher_grid(s.grid, s.grid_steps, s.bounds)
    cond = assemble.conditions(settings.common, data)
    repeat = lambda a: np.asarray(a)[np.arange(s.examples) % data.train.count]
    options = {
        "direction": "forward", "count": s.examples, "shape": flow.data.shape, "seed": s.seed, "solver": s.solver,
        "steps": index, "mesh": flow.mesh, "cond": jax.tree.map(repeat, cond),
    }  # fmt: skip

    def read(folder: Path, digest: str) -> Result:
        named = {name: options[name] for name in ("direction", "count", "seed", "solver", "steps")}
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
    fields = {f"straighten.{name}": getattr(s, name) for name in names}
    size = lambda: 4 * s.examples * len(index) * math.prod(flow.data.shape)
    return Stage("trajectories", (FLOW,), fields, check, work, complete, size=size)
