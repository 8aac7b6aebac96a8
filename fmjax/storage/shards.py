"""Large arrays on disk that survive a kill at any moment: ArrayRecord shards, and manifests that describe them.

A shard is written under a temporary name, flushed, renamed and only then entered in a manifest with its SHA-256: a
shard with its final name is complete. Record ``i`` is example ``i``.

Shard ``i`` belongs to process ``i mod P``. Each of ``P`` processes enters its shards in its own manifest: no file has
two writers. One process alone writes ``manifest.json``. A shard is complete where any manifest names its SHA-256.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax import checks
from fmjax.storage import columns, files

VERSION = 1
MANIFEST = "manifest.json"
BLOCK = 2**16  # bytes: the unit of ArrayRecord's files
OPTIONS = "group_size:1,uncompressed"  # noise does not compress, and the bytes depend on no compressor's version
log = logging.getLogger(__name__)


class Unfinished(RuntimeError):
    """A set of which shards are missing or torn; the same build completes it."""


class Shard(NamedTuple):
    """A complete shard.

    Attributes:
        file: its name in the directory.
        count: the number of its records.
        sha256: the digest of its bytes.
    """

    file: str
    count: int
    sha256: str


class Manifest(NamedTuple):
    """A description of a directory of marginals: everything that its numbers depend on, and its complete shards.

    Attributes:
        version: the version of this format.
        direction: ``"forward"`` (from noise) or ``"backward"`` (from data).
        flow: digest of the flow's parameters.
        solver: name of the solver.
        backward_map: how data are carried backward; ``None`` for the forward direction.
        ts: the whole rising time grid.
        steps: the indices of ``ts`` whose states are stored.
        dtype: dtype of the records.
        shape: shape of one example at one time.
        count: the number of examples, ``M``.
        seed: seed of the starts; ``None`` where data are.
        data: SHA-256 of the examples that solves start from; ``None`` where they are drawn from the seed.
        shard_size: examples in a shard; the last one may hold fewer.
        cond: description of an example's conditions (``columns.describe``); ``None`` for a set without conditions.
        cond_digest: SHA-256 of all conditions; ``None`` for a set without conditions.
        start: name of the function that drew the starts; ``None`` for starts from N(0, I).
        shards: the complete shards.
    """

    version: int
    direction: str
    flow: str
    solver: str
    backward_map: str | None
    ts: tuple[float, ...]
    steps: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    count: int
    seed: int | None
    data: str | None
    shard_size: int
    cond: str | None = None
    cond_digest: str | None = None
    start: str | None = None
    shards: tuple[Shard, ...] = ()


IDENTITY = Manifest._fields[:-1]
OPTIONAL = ("cond", "cond_digest", "start")  # left out of the file where they are None


def ranges(m: Manifest) -> dict[str, tuple[int, int]]:
    """Return the file name of every shard with the examples that it holds.

    Args:
        m: the manifest, complete or not.

    Returns:
        File names with ``(start, stop)``: examples ``start .. stop - 1``, in order.
    """
    n = -(-m.count // m.shard_size)
    bounds = [(i * m.shard_size, min((i + 1) * m.shard_size, m.count)) for i in range(n)]
    return {f"shard-{i:05d}-of-{n:05d}.array_record": b for i, b in enumerate(bounds)}


def size(m: Manifest, names: Iterable[str]) -> int:
    """Return an upper bound of the bytes that some shards take on disk.

    Args:
        m: the manifest.
        names: file names of shards.

    Returns:
        Bytes, at most two blocks of 64 KiB a shard too many.
    """
    record = len(m.steps) * math.prod(m.shape) * np.dtype(m.dtype).itemsize + 64  # with its header and index
    record += 0 if m.cond is None else columns.row_bytes(m.cond) + 64
    counts = (stop - start for start, stop in (ranges(m)[name] for name in names))
    return sum(BLOCK * (2 + math.ceil(count * record * (1 + 32 / BLOCK) / BLOCK)) for count in counts)


def own(m: Manifest, process_index: int, process_count: int) -> dict[str, tuple[int, int]]:
    """Return the shards that a process builds.

    Args:
        m: the manifest.
        process_index: the number of the process.
        process_count: how many processes build.

    Returns:
        A part of ``ranges(m)``; the parts of all processes are disjoint and cover it.
    """
    return dict(list(ranges(m).items())[process_index::process_count])


def resume(directory: str | os.PathLike, m: Manifest, names: Iterable[str]) -> dict[str, Shard]:
    """Make the directory, and return the shards that earlier builds of the same manifest completed.

    Args:
        directory: the folder of the shards.
        m: the manifest of the build.
        names: file names of shards to look for.

    Returns:
        The complete ones by name. The log names each shard that is missing or torn.

    Raises:
        OSError: the directory cannot be written.
        ValueError: the directory holds something else; the message names each field that differs.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError("no permission")
    except OSError as e:
        raise OSError(f"cannot write to {directory}: {e}; choose a directory that can be written") from e
    unlisted = sorted(directory.glob("shard-*.array_record"))  # before the manifests: other processes write those first
    old = read_manifest(directory)
    if old is None:
        if unlisted:
            what = f"{directory} holds {unlisted[0].name} but no {MANIFEST}"
            raise ValueError(f"{what}; delete it, or build in an empty directory")
        return {}
    check_manifest(directory, old, {name: getattr(m, name) for name in IDENTITY})
    good = {}
    for name in {shard.file for shard in old.shards}.intersection(names):
        shard = _verify(directory, name, old)
        if isinstance(shard, Shard):
            good[name] = shard
        else:
            log.warning("%s %s; building it again", directory / name, shard)
    return good


def write_shard(directory: str | os.PathLike, name: str, records: Iterable[bytes], cond: Iterable[bytes] = ()) -> Shard:
    """Write one shard; ``write_manifest`` then enters it in the manifest.

    Args:
        directory: the folder of the shards.
        name: the shard's file name.
        records: the bytes of its examples.
        cond: the bytes of their conditions, which follow the examples in the same file.

    Returns:
        The shard's entry.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    count, unfinished = 0, Path(directory) / f"{name}.tmp"
    with contextlib.closing(ArrayRecordWriter(str(unfinished), OPTIONS)) as writer:
        for record in records:
            writer.write(record)
            count += 1
        for row in cond:
            writer.write(row)
    shard = Shard(name, count, files.file_digest(unfinished))
    files.commit(unfinished, Path(directory) / name)
    return shard


def write_manifest(
    directory: str | os.PathLike,
    m: Manifest,
    shards: dict[str, Shard],
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Manifest:
    """Write the manifest of one process, whole or not at all.

    Args:
        directory: the folder of the shards.
        m: the manifest of the build.
        shards: the complete shards by name.
        process_index: the number of the process.
        process_count: how many processes build.

    Returns:
        The manifest with these shards.
    """
    m = m._replace(shards=tuple(shards[name] for name in sorted(shards)))
    name = MANIFEST if process_count == 1 else f"manifest-{process_index:05d}-of-{process_count:05d}.json"
    fields = {key: value for key, value in m._asdict().items() if key not in OPTIONAL or value is not None}
    files.write_json(Path(directory) / name, fields | {"shards": [shard._asdict() for shard in m.shards]})
    return m


def read_manifest(directory: str | os.PathLike) -> Manifest | None:
    """Read all manifests of a directory as one.

    Args:
        directory: the folder of the shards.

    Returns:
        The manifest, or ``None`` where the directory holds none. It may name a shard twice, where another process
        built it again.

    Raises:
        ValueError: a manifest cannot be used, or the manifests contradict each other.
    """
    directory = Path(directory)
    manifests = [_read_manifest(path) for path in sorted(directory.glob("manifest*.json"))]
    for m in manifests:
        check_manifest(directory, m, {name: getattr(manifests[0], name) for name in IDENTITY})
    if not manifests:
        return None
    return manifests[0]._replace(shards=tuple(sorted({shard for m in manifests for shard in m.shards})))


def _read_manifest(path: Path) -> Manifest:
    try:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in files.read_json(path).items()}
        if fields["version"] != VERSION:
            raise ValueError(f"format version {fields['version']}; this library reads {VERSION}")
        return Manifest(**fields)._replace(shards=tuple(Shard(**shard) for shard in fields["shards"]))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        problem = getattr(e, "problem", e)
        raise ValueError(
            f"{path} cannot be used ({problem}); remove {path.parent} and build the marginals again"
        ) from e


def check_manifest(directory: str | os.PathLike, m: Manifest, expect: dict[str, Any]) -> None:
    """Check that a manifest has the expected fields.

    Args:
        directory: the folder of the shards, for the message.
        m: the manifest.
        expect: expected values by field name; sequences compare as tuples, ``ts`` in float32.

    Raises:
        ValueError: fields differ (the message names each with both values), or a manifest has no such field.
    """
    different = []
    for name, value in expect.items():
        if name not in IDENTITY:
            hint = checks.nearest(name, IDENTITY)
            raise ValueError(f"a manifest has no field {name!r}{hint} (its fields: {', '.join(IDENTITY)})")
        stored, value = (_plain(name, a) for a in (getattr(m, name), value))
        if stored != value:
            different.append(f"{name}: {_short(stored)} stored, {_short(value)} requested")
    if different:
        raise ValueError(
            f"{directory} holds marginals built with different settings ({'; '.join(different)}); use another "
            "directory, or request the stored settings"
        )


class _Rows:
    """One part of every record of a set as an array ``[M, ...]`` on disk: ``x[rows]`` reads it."""

    def __init__(self, source, m: Manifest, second: bool, start: int, stop: int | None, shape, dtype):
        self.source, self.shape, self.dtype, self.ndim = source, (m.count, *shape), np.dtype(dtype), 1 + len(shape)
        self._second, self._span, self._size = second, slice(start, stop), None if m.cond is None else m.shard_size

    def __len__(self) -> int:
        return self.shape[0]

    def _numbers(self, rows: np.ndarray) -> np.ndarray:
        """Return the record of each example: in a shard all examples come first, then all their conditions."""
        if self._size is None:
            return rows
        start = rows // self._size * self._size
        return start + rows + (np.minimum(self._size, len(self) - start) if self._second else 0)

    def __getitem__(self, rows) -> np.ndarray:
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        rows = np.where(rows < 0, rows + len(self), rows)
        records = self.source.__getitems__(self._numbers(rows.ravel()).tolist()) if rows.size else []
        x = np.frombuffer(b"".join(record[self._span] for record in records), self.dtype)
        return x.reshape(*rows.shape, *self.shape[1:])

    def __array__(self, *args, **kwargs):
        raise ValueError(f"{len(self)} examples on disk are read by rows, x[rows]; for an array set stream=False")


class StoredArray(_Rows):
    """A complete set of shards as an array ``[M, steps, ...]`` that stays on disk.

    ``x[rows]`` reads examples, ``x[rows, n]`` one step of each; ``rows`` is a slice, indices ``[k]`` or one index, so
    that the object is a source for grain too. Every shard is verified when the set is opened.

    Args:
        directory: the folder of the shards.
        m: its manifest.

    Attributes:
        cond: the conditions, a pytree whose leaves are read by ``[rows]`` too; ``None`` in a set without conditions.

    Raises:
        Unfinished: a shard is missing or torn; the message names it.
    """

    def __init__(self, directory: str | os.PathLike, m: Manifest):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        directory, again, entered = Path(directory), "run the same build again", {shard.file for shard in m.shards}
        if missing := [name for name in ranges(m) if name not in entered]:
            raise Unfinished(
                f"the marginals in {directory} are unfinished: {len(missing)} of {len(ranges(m))} shards are missing, "
                f"first {missing[0]}; {again} to continue it"
            )
        for name in ranges(m):
            if isinstance(fault := _verify(directory, name, m), str):
                raise Unfinished(f"{directory / name} {fault}; {again}, it rebuilds this shard alone")
        source = ArrayRecordDataSource([str(directory / name) for name in ranges(m)])
        super().__init__(source, m, False, 0, None, (len(m.steps), *m.shape), m.dtype)
        self.cond, self._shard_size = None, m.shard_size
        if m.cond is not None:
            parts = columns.layout(m.cond)
            self.cond = columns.rebuild(m.cond, [_Rows(source, m, True, *c[:2], c.shape, c.dtype) for c in parts])

    def __getitem__(self, at) -> np.ndarray:
        rows, n = at if isinstance(at, tuple) else (at, None)
        x = super().__getitem__(rows)
        if n is None:
            return x
        return x[n] if x.ndim < self.ndim else x[np.arange(len(x)), n]

    def load(self) -> np.ndarray:
        """Return all examples ``[M, steps, ...]`` in memory, read a shard at a time."""
        x = np.empty(self.shape, self.dtype)
        for start in range(0, len(x), self._shard_size):
            x[start : start + self._shard_size] = self[start : start + self._shard_size]
        return x


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple, range, np.ndarray)):
        return tuple(np.asarray(value, np.float32 if name == "ts" else None).tolist())  # times agree in float32
    return value


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-30:]}"


def _verify(directory: Path, name: str, m: Manifest) -> Shard | str:
    """Return the manifest's entry that agrees with the shard's bytes, or the fault of the file."""
    path, entries = directory / name, [shard for shard in m.shards if shard.file == name]
    if not path.exists():
        return "is missing"
    actual = files.file_digest(path)
    expected = ", ".join(shard.sha256[:12] for shard in entries)
    torn = f"is torn or was changed (sha256 {actual[:12]}, not {expected})"
    return next((shard for shard in entries if shard.sha256 == actual), torn)
