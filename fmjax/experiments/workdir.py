"""The run folder: config, environment, and one folder per stage with the config fields that the stage depends on."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from fmjax.experiments import places, records
from fmjax.experiments.records import STAGE
from fmjax.storage import checkpoint, files, lock

PACKAGES = ("fmjax", "jax", "jaxlib", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")
CONFIG = "config.json"
SHOWN = 120  # characters of a refusal that name fields that differ
GROWS = "steps"  # a training may get more steps if the schedule does not depend on their number


class WorkdirError(RuntimeError):
    """A folder that cannot be written, is not a run folder, or has stages of another config."""


def open_workdir(
    path: str | Path,
    config: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Any]],
    grows: Callable[[str], bool] = lambda name: True,
) -> Path:
    """Create the folder of a run, or check that an existing folder belongs to this config.

    Writes ``config.json`` and ``environment.json`` (versions, devices; earlier ones under ``earlier``). Fields that no
    existing stage depends on may change, and the steps of a training with a constant learning rate may grow. What a
    stage depends on is read from its ``stage.json`` and from its checkpoints.

    Args:
        path: the folder.
        config: the config as plain values.
        stages: fields that the result of a stage depends on, with their values by dotted name; by stage.
        grows: whether more steps of a stage give the numbers of a longer run, where the learning rate is constant.

    Returns:
        The absolute path.

    Raises:
        WorkdirError: before anything is written, for a stage of another config, with every field that differs, both
            values and what to do; and for a folder that cannot be written.
    """
    path = local(path)
    config = plain(config)
    for name, fields in stages.items():
        _check_stage(path, name, plain(fields), grows)
    begun = any(stage_folder(path, name).exists() for name in stages)
    if jax.process_index() == 0:
        try:
            path.mkdir(parents=True, exist_ok=True)
            _write_environment(path / "environment.json", begun)
            _read_again(path / CONFIG, begun)
            files.write_json(path / CONFIG, config)
        except OSError as error:
            at = f" ({error.filename2 or error.filename})" if error.filename else ""
            raise WorkdirError(f"workdir={path}: cannot be written: {error.strerror}{at}. Choose another.") from error
    return path


def owner(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate ``main(settings, path, ...)`` so that one process owns the run folder while it works.

    Args:
        main: the command.

    Returns:
        The command under the lock of the folder.

    Raises:
        storage.lock.Owned: another process works in the folder; the message names its host and process id.
    """

    @functools.wraps(main)
    def owned_main(settings: Any, path: str | Path, *args: Any, **kwargs: Any) -> Any:
        path = local(path)
        new = not path.exists()
        try:
            with lock.owned(path):
                return main(settings, path, *args, **kwargs)
        except OSError as error:
            place = str(error.filename2 or error.filename)
            if not place.startswith(str(path)):
                raise
            raise WorkdirError(
                f"workdir={path}: cannot be written: {error.strerror} ({place}). Repair that and run the command again."
            ) from error
        finally:
            if new and path.is_dir() and not any(path.iterdir()):  # refused before anything was written
                path.rmdir()

    return owned_main


def begin_stage(
    path: Path,
    name: str,
    fields: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    needs: Mapping[str, str] | None = None,
) -> Path:
    """Create the folder of a stage and record what the result depends on.

    Args:
        path: the run folder.
        name: the stage, such as ``"correctors.score"``.
        fields: dotted names of config fields with their values.
        data: facts of the data set that samplers need, see ``networks.data_facts``.
        needs: digests of the results that the stage is made from, by the names of their stages.

    Returns:
        The folder of the stage.
    """
    folder = stage_folder(path, name)
    if jax.process_index() == 0:
        lock.check_owned()
        folder.mkdir(parents=True, exist_ok=True)
        records.write_record(folder, records.stage_record(name, plain(fields), data, needs))
    return folder


def check_needs(path: Path, name: str, needs: Mapping[str, str]) -> None:
    """Refuse a stage that was begun with other results of the stages that it needs.

    Args:
        path: the run folder.
        name: the stage.
        needs: digests of the results that it needs now, by the names of their stages.

    Raises:
        WorkdirError: one of them has changed since.
    """
    folder = stage_folder(path, name)
    before = (records.read_record(folder, name) or {}).get("needs", {})
    changed = [need for need, digest in needs.items() if before.get(need, digest) != digest]
    if changed:
        raise WorkdirError(
            f"workdir={path}: its stage {name!r} was made from another result of {changed[0]!r}. Delete {folder} "
            "to make it again, or take another --workdir."
        )


def stage_folder(path: str | Path, name: str) -> Path:
    """Return the folder of a stage.

    Args:
        path: the run folder.
        name: the stage; ``"correctors.score"`` lies in ``correctors/score``.

    Returns:
        The folder.
    """
    first, _, rest = name.partition(".")
    return Path(path) / first / files.slug(rest) if rest else Path(path) / first


def read_config(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Read the config of a run folder.

    Args:
        path: the folder.
        trust: run code outside the package that the config names. The folder may be a stranger's.

    Returns:
        The config as plain values.

    Raises:
        WorkdirError: no run folder, a damaged one, or code outside the package without ``trust``.
    """
    path = local(path)
    if not (path / CONFIG).exists():
        what = "is the folder of a stage" if (path / STAGE).exists() else "is no run folder (it has no config.json)"
        owner = next((str(p) for p in path.parents[:2] if (p / CONFIG).exists()), "the folder that launch.train wrote")
        raise WorkdirError(f"workdir={path}: {what}. Give {owner}, or --config=FILE.")
    config = files.read_json(path / CONFIG)
    _refuse_outside(config, path, trust=trust)
    return config


def _refuse_outside(config: Mapping[str, Any], path: str | Path, *, trust: bool) -> None:
    """Refuse a run folder whose config names code outside the package, unless ``trust``."""
    if not trust:
        for field, place in places.outside_places(config):
            raise WorkdirError(
                f"{field}={place!r}: the config in {path} runs code outside fmjax. Read that code, then give --trust "
                "(trust=True in Python)."
            )


def network_folder(path: str | Path) -> Path:
    """Return the folder of a trained network: a stage's folder, or the flow of a run folder.

    Args:
        path: ``W`` for the flow of the run in ``W``, or a stage's folder such as ``W/flow_map``.

    Returns:
        The folder that has ``checkpoints``.

    Raises:
        WorkdirError: nothing is trained there.
    """
    path = local(path)
    for folder in (path, path / "flow"):
        if checkpoint.latest_step(folder / "checkpoints") is not None:
            return folder
    raise WorkdirError(f"workdir={path}: has no checkpoint of a flow. Train one with launch.train --workdir={path}.")


def environment() -> dict[str, Any]:
    """Return versions, commit and devices of this process.

    Returns:
        Versions of packages, git commit (with ``+`` for uncommitted changes), Python, platform, devices, processes.
    """
    devices = jax.devices()
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": jax.process_count(),
    }


def local(path: str | Path) -> Path:
    """Return the absolute path of a folder, with ``~`` expanded; refuse a URL.

    Args:
        path: the folder.

    Returns:
        The absolute path.

    Raises:
        WorkdirError: a URL.
    """
    try:
        return files.local_path("workdir", path)
    except ValueError as error:
        raise WorkdirError(str(error)) from None


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as JSON values: tuples become lists, objects become their names.

    Args:
        config: the config.

    Returns:
        Plain values.

    Raises:
        ValueError: an object without a name, which a later command could not restore.
    """
    return json.loads(json.dumps(dict(config), default=_as_json))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of a nested config by dotted name.

    Args:
        tree: the config.
        prefix: prefix of the names.

    Returns:
        Values by dotted name.
    """
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        if hasattr(value, "items") and value:
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def _check_stage(path: Path, name: str, new: dict[str, Any], grows: Callable[[str], bool]) -> None:
    """Refuse a stage that was begun with other fields, as its ``stage.json`` and its checkpoints say."""
    folder, most = stage_folder(path, name), {}
    for record in (records.read_record(folder, name), *records.checkpoint_records(folder).values()):
        if record is None or record["stage"] != name or not record["fields"]:
            continue  # a checkpoint of another stage counts as damaged; a converted network depends on no field
        a, b = flat(record["fields"]), flat(new)
        differing = records.differing(a, b)
        for field in [f for f in differing if f.rpartition(".")[2] == GROWS and f in a and f in b and b[f] > a[f]]:
            if b.get(field.removesuffix(GROWS) + "schedule") == "constant" and grows(name):
                del differing[field]
        _refuse_differing(path, name, list(differing.values()))
        for field in (f for f in a if f.rpartition(".")[2] == GROWS):
            most[field] = max(a[field], most.get(field, 0))
    for field, steps in most.items():
        if new[field] > steps:
            _refuse_dependents(path, name, field, new[field])


def _refuse_differing(path: Path, name: str, gaps: list[str]) -> None:
    if gaps:
        shown = [gap for i, gap in enumerate(gaps) if sum(map(len, gaps[: i + 1])) <= SHOWN]
        shown = shown or [f"{gaps[0].partition(' ')[0]} differs"]
        more = f"; and {len(gaps) - len(shown)} more" if len(gaps) > len(shown) else ""
        raise WorkdirError(
            f"workdir={path}: its stage {name!r} was begun with another config: {'; '.join(shown)}{more}. Set this "
            f"back, or start from its state by launch.train with --fork and another --workdir."
        )


def _refuse_dependents(path: Path, name: str, field: str, steps: int) -> None:
    """Refuse more steps of a stage that other stages were made from."""
    folders = sorted({file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/{STAGE}")})
    begun = filter(None, map(records.read_record, folders))
    dependents = [record["stage"] for record in begun if name in record["needs"]]
    if dependents:
        raise WorkdirError(
            f"{field}={steps}: {', '.join(dependents)} in {path} are made from fewer steps of {name!r}. Delete their "
            f"folders, or start from its state by launch.train with --fork and another --workdir."
        )


def _as_json(value: Any) -> Any:
    if hasattr(value, "items"):
        return dict(value.items())
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    try:
        return files.as_json(value)
    except TypeError:
        kind = type(value).__name__
        raise ValueError(
            f"config: holds a {kind}, which config.json cannot store. Give 'package.module:factory', or call "
            "experiments.assemble and training.train without a run folder."
        ) from None


def _write_environment(path: Path, begun: bool) -> None:
    """Write the environment, with earlier ones."""
    now, before = environment(), _read_again(path, begun)
    earlier = before.pop("earlier", []) if before else []
    if before not in (None, now):
        earlier.append(before)
    files.write_json(path, {**now, "earlier": earlier})


def _read_again(path: Path, begun: bool) -> dict[str, Any] | None:
    """Read a file of the run folder that is written again now; say what is wrong with it."""
    try:
        return files.read_json(path)
    except files.DamagedFile as error:
        if begun or path.exists():
            records.tell(path, error.problem, "written again")
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(package: Path) -> str | None:
    """Return the commit of the package's checkout; ``None`` for a package installed inside another checkout."""
    git = lambda *args: subprocess.run(
        ["git", "-C", str(package), *args], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.resolve().parent:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
