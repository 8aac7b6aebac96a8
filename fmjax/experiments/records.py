"""What a stage of a run folder was begun with: ``stage.json``, and the copy of it in each checkpoint."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fmjax.storage import checkpoint, files

STAGE = "stage.json"
ABSENT = "absent"


def stage_record(
    name: str, fields: Mapping[str, Any], data: Mapping[str, Any] | None, needs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the record of a stage: its name, the config fields and results that it depends on, facts of its data.

    Args:
        name: the stage.
        fields: plain values by dotted name.
        data: facts of the data set that samplers need.
        needs: digests of the results that the stage is made from, by the names of their stages.

    Returns:
        The content of ``stage.json``, which each checkpoint keeps too.

    >>> stage_record("flow", {"seed": 0}, None)
    {'stage': 'flow', 'fields': {'seed': 0}, 'data': {}, 'needs': {}}
    """
    return {"stage": name, "fields": dict(fields), "data": dict(data or {}), "needs": dict(needs or {})}


def read_record(folder: Path, name: str | None = None) -> dict[str, Any] | None:
    """Read the record of a stage; where ``stage.json`` is missing or damaged, the copy in its newest checkpoint.

    Args:
        folder: the folder of the stage.
        name: the stage that the record must be of.

    Returns:
        The record; ``None`` where nothing tells.
    """
    try:
        record = files.read_json(folder / STAGE)
        if {"stage", "fields", "data", "needs"} <= record.keys() and name in (None, record["stage"]):
            return record
        tell(folder / STAGE, f"is of the stage {record.get('stage')!r}", "not used")
    except files.DamagedFile as error:
        if os.path.lexists(folder / STAGE):
            tell(folder / STAGE, error.problem, "not used")
    copies = checkpoint_records(folder)
    return copies[max(copies)] if copies else None


def checkpoint_records(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the records that the checkpoints of a stage keep, by step.

    Args:
        folder: the folder of the stage.

    Returns:
        The records; checkpoints without one (of ``training.train`` alone) are left out.
    """
    runs = {step: record.get("run") for step, record in checkpoint.read_metadata(folder / "checkpoints").items()}
    return {step: run for step, run in runs.items() if run}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a stage where it is not there; say so where the stage has worked before.

    Args:
        folder: the folder of the stage, which exists.
        record: the record.
    """
    if jax.process_index() != 0:
        return
    begun = any(entry.name != "owner.lock" for entry in folder.iterdir())
    try:
        if files.read_json(folder / STAGE) == json.loads(json.dumps(record)):
            return
    except files.DamagedFile as error:
        if begun:
            tell(folder / STAGE, error.problem, "written again")
    files.write_json(folder / STAGE, record)


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields in which two records of a stage differ.

    Args:
        old: fields of the folder.
        new: fields of now.

    Returns:
        A phrase per field, such as ``"steps is 100 there, 200 here"``.

    >>> differing({"seed": 0, "clip": 1.0}, {"seed": 1, "clip": 1.0})
    {'seed': 'seed is 0 there, 1 here'}
    """
    return {field: f"{field} is {a} there, {b} here" for field, (a, b) in differing_values(old, new).items()}


def differing_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the values of the fields in which two records differ.

    Args:
        old: fields of one record.
        new: fields of the other.

    Returns:
        Both values as JSON, ``"absent"`` where a record has no such field, by field.

    >>> differing_values({"seed": 0, "clip": 1.0}, {"seed": 1})
    {'clip': ('1.0', 'absent'), 'seed': ('0', '1')}
    """
    show = lambda fields, field: json.dumps(fields[field]) if field in fields else ABSENT
    both = {field: (show(old, field), show(new, field)) for field in sorted(old.keys() | new.keys())}
    return {field: (a, b) for field, (a, b) in both.items() if a != b}


def tell(path: Path, problem: str | None, done: str) -> None:
    """Print a line about a file of a run that is missing or damaged.

    Args:
        path: the file.
        problem: what is wrong with it.
        done: what was done about it.
    """
    if jax.process_index() == 0:
        print(f"{path} {problem}: {done}", file=sys.stderr, flush=True)
