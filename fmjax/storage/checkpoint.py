"""Checkpoints: orbax's ``CheckpointManager``, with a digest of every array that is verified before the array is used.

orbax writes a checkpoint under a temporary name and renames it, so that a kill in the middle leaves the former one
intact. What orbax does not notice are wrong bytes: it restores flipped bits in a data file without a word. The digest
finds them.

A state is a dict or NamedTuple of *parts* (``step``, ``params``, ``ema``, ``opt_state`` ...). Any part can be restored
alone, so that a flow's checkpoint gives its ``ema`` to another run that has another optimiser.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fmjax.storage import files, lock
from fmjax.storage.digests import digest, digest_rows, flatten, names
from fmjax.storage.reports import one_report

__all__ = [
    "CheckpointError", "all_steps", "check_space", "check_written", "digest", "digest_rows", "latest_step",
    "read_metadata", "restore", "save", "writer",
]  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint is missing, torn or holds wrong bytes, or cannot be written."""


def all_steps(directory: str | Path) -> list[int]:
    """Return the steps that have a finished checkpoint.

    Args:
        directory: the folder of the checkpoints; it need not exist.

    Returns:
        The steps, rising.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name == str(_number(p.name)))


def latest_step(directory: str | Path) -> int | None:
    """Return the newest step that has a finished checkpoint; only ``restore`` finds out whether it is damaged.

    Args:
        directory: the folder of the checkpoints; it need not exist.

    Returns:
        The step, or ``None`` where there is no checkpoint.
    """
    return next(reversed(all_steps(directory)), None)


def check_space(directory: str | Path, state: Any, *, keep: int = 2) -> None:
    """Check that the disk has space for the checkpoints of a run.

    Args:
        directory: the folder of the checkpoints; it need not exist.
        state: the arrays of one checkpoint, or their ``jax.ShapeDtypeStruct``.
        keep: the number of checkpoints that ``writer`` keeps.

    Raises:
        CheckpointError: less is free than ``keep + 1`` checkpoints need, those that exist already counted.
    """
    directory = Path(directory).absolute()
    place = next(folder for folder in (directory, *directory.parents) if folder.is_dir())
    bytes_each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    need, free = max(1, keep + 1 - len(all_steps(directory))) * bytes_each, shutil.disk_usage(place).free
    if need > free:
        raise CheckpointError(
            f"{directory}: checkpoints need {need / 1e9:.3g} GB and {free / 1e9:.3g} GB are free. Free space, choose "
            "another folder, or lower keep."
        )


@contextlib.contextmanager
def writer(directory: str | Path, *, keep: int = 2, after: int | None = None) -> Iterator[Any]:
    """Own a folder for ``save``, and wait at the end of the block for what is still being written.

    What a killed save left is deleted, under the lock of the folder. Checkpoints later than ``after``, damaged ones
    that a fallback skipped, are renamed to ``STEP.set-aside``, so that the run can write those steps again.

    Args:
        directory: the folder of the checkpoints, made where it is missing.
        keep: the number of newest checkpoints that are kept.
        after: the step that the run was restored from; ``None`` for a new run.

    Yields:
        The manager that ``save`` takes.

    Raises:
        CheckpointError: the folder cannot be made, or holds checkpoints although ``after`` is ``None``.
        Owned: another process writes there.
        ValueError: ``keep`` is less than 1.
    """
    import orbax.checkpoint as ocp

    if keep < 1:
        raise ValueError(f"keep={keep}: it is the number of checkpoints kept. Give at least 1.")
    directory = Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoints to {directory}: {error.strerror}") from error
    with lock.owned(directory), one_report():
        _sweep(directory, after)
        manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep))
        try:
            yield manager
        except BaseException:
            with contextlib.suppress(Exception):  # the first error counts
                manager.close()
            raise
        with _writing(directory):
            manager.close()


def check_written(manager: Any) -> None:
    """Check that no save in the background has failed so far.

    Args:
        manager: what ``writer`` yields.

    Raises:
        CheckpointError: a checkpoint cannot be written, for instance since the disk is full.
    """
    with _writing(manager.directory):
        manager.check_for_errors()


@contextlib.contextmanager
def _writing(directory: Any) -> Iterator[None]:
    """Turn the errors of orbax and tensorstore, which are of many types, into one line with the folder."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        why = why if len(why) < 200 else f"... {why[-160:]}"
        raise CheckpointError(f"cannot write a checkpoint to {directory}: {why}") from error


def _sweep(directory: Path, after: int | None) -> None:
    """Delete what killed saves left in a folder, and set later checkpoints aside."""
    later = [step for step in all_steps(directory) if after is None or step > after]
    if later and after is None:
        raise CheckpointError(
            f"{directory} already holds step {later[-1]}: restore it and pass after=STEP, or choose another folder"
        )
    if jax.process_index() == 0:
        for torn in directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(torn)
        for step in later:
            aside = directory / f"{step}.set-aside"
            shutil.rmtree(aside, ignore_errors=True)
            (directory / str(step)).rename(aside)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoint.writer {directory}")


def save(manager: Any, step: int | np.integer, state: Any, *, metadata: dict[str, Any] | None = None) -> bool:
    """Save a state with JSON metadata, in the background: its arrays may be donated as soon as this returns.

    Args:
        manager: what ``writer`` yields.
        step: the number of steps taken; a step that is already the newest is left alone.
        state: a dict or NamedTuple of parts.
        metadata: plain values to store beside it; the digest of every part is added.

    Returns:
        Whether a checkpoint is written.

    Raises:
        ValueError: the step is older than the newest, a metadata name is reserved, or the state has no named parts.
        TypeError: the state holds a typed PRNG key.
        Lost: the folder was deleted while the run worked.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with writer(folder) as manager:
    ...     save(manager, 3, {"params": {"w": np.ones(2)}})
    True
    >>> step, state, metadata = restore(folder)
    >>> step, state
    (3, {'params': {'w': array([1., 1.])}})
    """
    import orbax.checkpoint as ocp

    step, newest = int(step), manager.latest_step()
    if newest == step:
        return False
    if newest is not None and step < newest:
        raise ValueError(f"step={step}: checkpoints are saved in rising order and the newest is step {newest}")
    if not isinstance(state, dict) and not hasattr(state, "_asdict"):
        raise ValueError(f"state={type(state).__name__}: a state is a dict or NamedTuple of parts")
    parts = dict(state) if isinstance(state, dict) else state._asdict()
    parts = {name: part for name, part in parts.items() if jax.tree.leaves(part)}
    record = dict(metadata or {})
    if reserved := sorted({"step", "digest", "leaves"} & set(record)):
        raise ValueError(f"metadata={reserved[0]!r}: save writes this name itself. Choose another one.")
    flat = flatten(parts)
    record |= {"step": step, "digest": {name: digest(part) for name, part in parts.items()}}
    record["leaves"] = [[path, _spec(leaf)] for path, leaf in flat.items()]
    record = json.loads(json.dumps(record, default=files.as_json))
    lock.check_owned()  # orbax would make a deleted folder again
    arrays = {path: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for path, leaf in flat.items()}
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(_nest(arrays)),
        metadata=ocp.args.JsonSave({"record": record, "sha256": _sha(record)}),
    )
    with _writing(manager.directory):
        return manager.save(step, args=args, force=True)


def restore(
    directory: str | Path,
    template: Any = None,
    *,
    part: str | None = None,
    step: int | None = None,
    stage: str | None = None,
    fallback: bool = False,
) -> tuple[int, Any, dict[str, Any]]:
    """Restore a checkpoint, every digest verified.

    Args:
        directory: the folder of the checkpoints.
        template: a tree of arrays or ``jax.ShapeDtypeStruct`` with the structure, shapes, dtypes and shardings to
            restore (the shardings may differ from the saved ones); ``None`` gives nested dicts of numpy arrays.
        part: restore this part alone, such as ``"ema"``; ``template`` is then a template of the part.
        step: the step to restore; ``None`` for the newest.
        stage: the ``"stage"`` that the metadata must name; a checkpoint of another stage counts as damaged.
        fallback: where that checkpoint is damaged, restore the newest good one before it, with a warning.

    Returns:
        The step, the state, and the metadata, whose ``"digest"`` maps parts to digests.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged; the message names the last good step.
        ValueError: the template differs from what was saved; the message names the first leaves that differ. Another
            network is no damage, and never falls back.
    """
    directory = Path(directory).absolute()
    steps = all_steps(directory)
    if not steps:
        raise CheckpointError(f"no checkpoint in {directory}{'' if directory.is_dir() else ', which does not exist'}")
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {directory}; there are steps {steps}")
    newest, *older = [s for s in reversed(steps) if step is None or s <= step]
    try:
        return newest, *_read(directory / str(newest), template, part, stage)
    except CheckpointError as error:
        damage = error
    for good in older:
        try:
            state, metadata = _read(directory / str(good), template if fallback else None, part, stage)
        except CheckpointError as error:
            damage = CheckpointError(f"{damage}; {error}")
            continue
        if not fallback:
            raise CheckpointError(
                f"{damage}; the last good step is {good}: restore it with step={good} or fallback=True"
            ) from damage.__cause__
        warnings.warn(f"{damage}; falling back to step {good}", stacklevel=2)
        return good, state, metadata
    raise CheckpointError(
        f"{damage}; no good checkpoint is left in {directory}. Restore it from a copy, or delete that folder to begin "
        "again"
    ) from damage.__cause__


def read_metadata(directory: str | Path) -> dict[int, dict[str, Any]]:
    """Read the metadata of all checkpoints of a folder whose metadata are whole, without their arrays.

    Args:
        directory: the folder of the checkpoints; it need not exist.

    Returns:
        What ``save`` was given, by step, rising.
    """
    records = {}
    for step in all_steps(directory):
        with contextlib.suppress(CheckpointError):
            records[step] = _record(Path(directory) / str(step))
    return records


def _read(path: Path, template: Any, part: str | None, stage: str | None) -> tuple[Any, dict[str, Any]]:
    record = _record(path)
    if stage is not None and record.get("stage", stage) != stage:
        raise CheckpointError(f"{path} is damaged: it is of the stage {record['stage']!r}, not {stage!r}")
    parts = record["digest"]
    if part is not None and part not in parts:
        raise ValueError(f"{path} holds no part {part!r}; it holds {', '.join(parts)}")
    stored = {tuple(p): spec for p, spec in record.pop("leaves") if part in (None, p[0])}
    if template is not None:
        _check_template(path, stored, template if part is None else {part: template})
    tree = _nest(_arrays(path / "state", stored))
    for name in parts if part is None else [part]:
        if digest(tree[name]) != parts[name]:
            raise CheckpointError(f"{path} is damaged: the bytes of {name!r} were changed")
    tree = tree if part is None else tree[part]
    if template is not None:
        flat = flatten(tree)
        places, treedef = jax.tree_util.tree_flatten_with_path(template)
        tree = jax.tree.unflatten(treedef, [_place(flat[names(p)], like) for p, like in places])
    return tree, record


def _number(name: str) -> int | None:
    """Return the step that a folder's name gives, or ``None``."""
    return int(name) if name.isascii() and name.isdigit() and len(name) < 19 else None


def _record(path: Path) -> dict[str, Any]:
    try:
        written = files.read_json(path / "metadata" / "metadata", sealed=False)
        record, sha = written["record"], written["sha256"]
        if _sha(record) == sha and record["step"] == int(path.name):
            return record
        why = f"it is of step {record['step']}" if _sha(record) == sha else "its bytes were changed"
        cause = None
    except files.DamagedFile as error:
        why, cause = f"it {error.problem}", error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # whatever a torn file makes of JSON
        why, cause = _first_line(error), error
    raise CheckpointError(f"{path} is damaged: metadata: {why}") from cause


def _arrays(path: Path, stored: dict) -> dict[tuple[str, ...], np.ndarray]:
    """Read the stored leaves whole on the host: a digest needs all their bytes, and any sharding is cut from them."""
    import orbax.checkpoint as ocp

    item = _nest(dict.fromkeys(stored, 0))
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    try:
        with one_report(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return flatten(checkpointer.restore(path, args=args))
    except Exception as error:  # orbax and tensorstore raise errors of many types for torn files
        raise CheckpointError(f"{path.parent} is damaged: {_first_line(error)}") from error


def _check_template(path: Path, stored: dict, template: Any) -> None:
    requested = {p: _spec(leaf) for p, leaf in flatten(template).items()}
    differ = [p for p in {**stored, **requested} if stored.get(p) != requested.get(p)]
    if differ:
        leaves = [
            f"{'/'.join(p)}: stored {stored.get(p, 'none')}, requested {requested.get(p, 'none')}" for p in differ
        ]
        more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ValueError(f"{path} holds another network: {'; '.join(leaves[:3])}{more}; build the one that was saved")


def _place(host: np.ndarray, like: Any) -> Any:
    """Place a host array as the template is: sharded, on the default device, or numpy."""
    if not isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        return host
    if like.sharding is None or not getattr(like, "committed", True):
        return jnp.asarray(host)
    return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index])


def _nest(flat: dict[tuple[str, ...], Any]) -> dict:
    tree: dict = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def _spec(leaf: Any) -> str:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype.name}{list(leaf.shape)}"


def _sha(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
