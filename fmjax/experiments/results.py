"""Results of stages: of a finished training, of a comparison, and what a report shows of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fmjax.experiments import records, report, workdir
from fmjax.experiments.workdir import WorkdirError
from fmjax.storage import checkpoint, files
from fmjax.training import logs, loop
from fmjax.types import Params


class Result(NamedTuple):
    """The result of a stage.

    Attributes:
        value: parameters, marginals or samples.
        digest: digest of the numbers, for the stages that need the result.
        summary: one line for the log.
    """

    value: Any
    digest: str
    summary: str


def finished(value: Any, plan: loop.Plan, folder: Path) -> Result:
    """Return the result of a training.

    Args:
        value: the averaged parameters, or a tuple that begins with them.
        plan: the training.
        folder: the folder of the stage, for the last recorded loss.

    Returns:
        The result, with the digest of the parameters.
    """
    params = value[0] if isinstance(value, tuple) and not hasattr(value, "_fields") else value
    lines = files.read_jsonl(folder / logs.RECORDS)
    loss = f", loss {lines[-1]['loss']:.4f}" if lines else ""
    return Result(value, checkpoint.digest(params), f"{plan.schedule.steps} steps of {plan.data.batch_size}{loss}")


def read_trained(plan: loop.Plan, folder: Path, inputs: Mapping[str, Params | None]) -> Result | None:
    """Read the result of a training that has reached the last step.

    Args:
        plan: the training.
        folder: the folder of the stage.
        inputs: ``"params"`` (initial parameters) and ``"teacher"``; they must equal the recorded ones.

    Returns:
        The result; ``None`` where steps are missing.

    Raises:
        WorkdirError: the training had other initial parameters or another teacher.
    """
    if (checkpoint.latest_step(folder / "checkpoints") or 0) < plan.schedule.steps:
        return None
    step, params, metadata = checkpoint.restore(folder / "checkpoints", part="ema", stage=plan.name, fallback=True)
    if step < plan.schedule.steps:  # the last checkpoint is damaged: the training goes on from this one
        return None
    recorded = metadata.get("given", {})
    for what, value in inputs.items():
        if value is not None and recorded.get(what) not in (None, checkpoint.digest(value)):
            raise WorkdirError(
                f"workdir={folder}: {plan.name!r} was trained with another flow ({what}). Delete this folder to train "
                "it again, or take another --workdir."
            )
    if jax.process_index() == 0:
        logs.mend_records(folder / logs.RECORDS, step, metadata.get("records"))
    return finished(loop.merge_parameters(plan, params, plan.name), plan, folder)


def best_average(plan: loop.Plan, folder: Path) -> Params:
    """Return the averaged parameters of a classifier at the step with the best score.

    Args:
        plan: its training.
        folder: the folder of the stage.

    Returns:
        Parameters of the plan's model.

    Raises:
        WorkdirError: they are missing or damaged.
    """
    place = folder / "best" / "checkpoints"
    try:
        _, params, _ = checkpoint.restore(place, part="ema", stage=f"{plan.name}.best", fallback=True)
    except checkpoint.CheckpointError as error:
        raise WorkdirError(f"{error}. The whole stage is needed: delete {folder} to train it again.") from None
    return loop.merge_parameters(plan, params, plan.name)


def write_page(json_file: Path, html_file: Path, digest: str, page: Any, **more: Any) -> None:
    """Write the page of a comparison and its numbers, on the first process; ``page_record`` reads the numbers.

    Args:
        json_file: the numbers.
        html_file: the page.
        digest: of the results that both depend on.
        page: ``contents`` of the page and their ``record``.
        **more: further plain values of the record.
    """
    if jax.process_index() == 0:
        report.write_report(html_file, page.contents)
        files.write_json(json_file, page.record | more | {"digest": digest, "page": files.file_digest(html_file)})


def page_record(json_file: Path, html_file: Path, digest: str) -> dict[str, Any] | None:
    """Return the numbers of a comparison where they and its page are whole and of the results of now.

    Args:
        json_file: the numbers, with the digest of what they depend on and of the page.
        html_file: the page.
        digest: of the results of now.

    Returns:
        The record; ``None`` where the comparison is to be computed (again), which is said.
    """
    if not json_file.exists() and not html_file.exists():
        return None
    try:
        record = files.read_json(json_file)
        if record.get("digest") != digest:
            records.tell(json_file, "is of other samplers or networks", "computed again")
            return None
        if files.file_digest(html_file) != record.get("page"):
            raise files.DamagedFile(html_file, "was changed after it was written")
    except files.DamagedFile as error:
        records.tell(error.path, error.problem, "computed again")
        return None
    return record


def curves(path: Path, names: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the loss curves of the stages that have records, for the report.

    Args:
        path: the run folder.
        names: names of the stages.

    Returns:
        (step, loss), each ``[n]``, by name of the network.
    """
    losses = {}
    for name in names:
        lines = files.read_jsonl(workdir.stage_folder(path, name) / logs.RECORDS)
        if lines:
            label = name.rpartition(".")[2].replace("_", " ")
            losses[label] = tuple(np.array([r[key] for r in lines]) for key in ("step", "loss"))
    return losses


def parameter_counts(params: Mapping[str, Params]) -> str:
    """Return the number of parameters of each network as text.

    Args:
        params: parameters by name of the network.

    Returns:
        The text.
    """
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    return ", ".join(f"{name} {count(tree):,}" for name, tree in params.items())
