"""Forks: a stage of a new run that starts from the whole state of another run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from fmjax.experiments import workdir
from fmjax.storage import checkpoint, files

FORGOTTEN = ("given", "step", "digest", "leaves")  # metadata of a state that a run that starts from it drops


def fork(source: str | Path, target: Path, stage: str, fields: Mapping[str, Any]) -> Callable[[], None]:
    """Prepare to start a stage of a new run from the whole state (parameters, optimiser, average, step) of another run.

    Args:
        source: run folder to continue from.
        target: the new run folder; a stage that has checkpoints already is left as it is.
        stage: the stage.
        fields: the fields of the stage in the new run, by dotted name.

    Returns:
        What copies the state, once the new run folder is open.

    Raises:
        WorkdirError: ``source`` has no checkpoint of the stage, or the state of another network.
    """
    folder, origin = workdir.stage_folder(target, stage), workdir.stage_folder(workdir.local(source), stage)
    if checkpoint.latest_step(folder / "checkpoints") is not None:
        return lambda: None
    if checkpoint.latest_step(origin / "checkpoints") is None:
        raise workdir.WorkdirError(
            f"fork={source}: has no checkpoint of {stage!r}. Give the folder of a run that was trained."
        )
    a, b = workdir.flat(files.read_json(origin / workdir.STAGE)["fields"]), workdir.flat(workdir.plain(fields))
    differing = [field for field in sorted(a.keys() | b.keys()) if _of_network(field) and a.get(field) != b.get(field)]
    if differing:
        raise workdir.WorkdirError(
            f"fork={source}: is the state of another network, {differing[0]} differs. Keep the network, or start from "
            "the averaged parameters by init."
        )
    return lambda: _copy_state(origin, folder)


def _of_network(field: str) -> bool:
    """Return whether the parameters of a stage change their shapes with a field."""
    return "net." in field or field.rpartition(".")[2] in ("net", "weighting", "conditional")


def _copy_state(origin: Path, folder: Path) -> None:
    """Copy the newest good state of a stage, its records and, of a classifier, its best parameters."""
    if jax.process_index() != 0:
        return
    step, state, metadata = checkpoint.restore(origin / "checkpoints", fallback=True)
    kept = {key: value for key, value in metadata.items() if key not in FORGOTTEN}
    if (origin / "metrics.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(origin / "metrics.jsonl", folder / "metrics.jsonl")
    if (origin / "best").exists():
        shutil.copytree(origin / "best", folder / "best", dirs_exist_ok=True)
    with checkpoint.writer(folder / "checkpoints") as manager:
        checkpoint.save(manager, step, state, metadata=kept | {"forked": str(origin)})
