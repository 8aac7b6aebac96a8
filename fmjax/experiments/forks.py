"""Forks: a stage of a new run that starts from the whole state of another run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from fmjax.experiments import records, workdir
from fmjax.experiments.workdir import WorkdirError
from fmjax.storage import checkpoint, files
from fmjax.training import logs, loop

FORGOTTEN = ("given", "run", "step", "digest", "leaves")  # metadata of a state that a run that starts from it drops


def fork(
    source: str | Path, target: Path, stage: str, fields: Mapping[str, Any], plan: loop.Plan | None
) -> Callable[[], None]:
    """Prepare to start a stage of a new run from the whole state (parameters, optimiser, average, step) of another run.

    Args:
        source: run folder to continue from.
        target: the new run folder; a stage that has checkpoints already is left as it is.
        stage: the stage.
        fields: the fields of the stage in the new run, by dotted name.
        plan: the training of the stage in the new run; ``None`` for a stage that does not train.

    Returns:
        A function that copies the state, to be called when the new run folder is open.

    Raises:
        WorkdirError: a stage that does not train; ``source`` has no checkpoint of the stage, has the state of another
            network or optimiser, or has taken all steps already.
    """
    folder, origin = workdir.stage_folder(target, stage), workdir.stage_folder(workdir.local(source), stage)
    if plan is None:
        raise WorkdirError(f"fork={source}: the stage {stage!r} is not a training. Leave fork out.")
    if checkpoint.latest_step(folder / "checkpoints") is not None:
        return lambda: None
    if checkpoint.latest_step(origin / "checkpoints") is None:
        raise WorkdirError(f"fork={source}: has no checkpoint of {stage!r}. Give the folder of a run that was trained.")
    before = records.read_record(origin, stage) or records.stage_record(stage, {}, None)
    options = {"stage": stage, "fallback": True}
    try:
        step, state, metadata = checkpoint.restore(origin / "checkpoints", loop.initial_state(plan), **options)
    except ValueError as error:
        new = workdir.flat(workdir.plain(fields))
        differing = list(records.differing(workdir.flat(before["fields"]), new))
        network = [field for field in differing if _of_network(field)]
        what = f"network, {network[0]} differs" if network else f"optimiser, as {', '.join(differing)} differ"
        raise WorkdirError(
            f"fork={source}: is the state of another {what}. Keep it, or start from the averaged parameters by init."
        ) from error
    if step >= plan.schedule.steps:
        steps = plan.schedule.steps
        raise WorkdirError(f"fork={source}: its {stage!r} has taken {step} steps of {steps} here. Give more steps.")
    record = records.stage_record(stage, workdir.plain(fields), before["data"])
    return lambda: _write_state(origin, folder, record, (step, state, metadata))


def _of_network(field: str) -> bool:
    """Return whether the parameters of a stage change their shapes with a field."""
    return "net." in field or field.rpartition(".")[2] in ("net", "weighting", "conditional")


def _write_state(origin: Path, folder: Path, record: Mapping[str, Any], saved: tuple[int, Any, dict[str, Any]]) -> None:
    """Write a state, its records and, of a classifier, its best parameters, for a new run."""
    step, state, metadata = saved
    kept = {key: value for key, value in metadata.items() if key not in FORGOTTEN}
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        records.write_record(folder, record)
        if "copy" in (kept.get("records") or {}):
            files.write_bytes(folder / logs.RECORDS, logs.unpack(kept["records"]))
        if (origin / "best").exists():
            shutil.copytree(origin / "best", folder / "best", dirs_exist_ok=True)
    with checkpoint.writer(folder / "checkpoints") as manager:
        checkpoint.save(manager, step, state, metadata=kept | {"run": dict(record), "forked": str(origin)})
