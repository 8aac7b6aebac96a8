"""Arrays on disk that survive a kill at any moment: ArrayRecord shards and manifests of what they were made from.

A shard is written under a temporary name, synced, renamed and only then entered in a manifest with its SHA-256, so that
a name means a whole file. Record ``i`` is example ``i``.

Shard ``i`` belongs to process ``i mod P``. Each of ``P`` processes enters its shards in a manifest of its own, so that
no file has two writers and nobody waits; one process writes ``manifest.json``. What is there is what any manifest of
the directory names with the SHA-256 that the file has, whatever ``P`` was.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax.storage import columns

VERSION = 1
MANIFEST = "manifest.json"
BLOCK = 2**16  # bytes: what ArrayRecord's files are made of
OPTIONS = "group_size:1,uncompressed"  # noise does not compress, and the bytes depend on no compressor's version
log = logging.getLogger(__name__)


class Shard(NamedTuple):
    """A complete shard: its file, the number of its records and the SHA-256 of its bytes."""

    file: str
    count: int
    sha256: str


class Manifest(NamedTuple):
    """What a directory of marginals is: all that its numbers depend on, and the shards that are complete.

    ``flow`` names the parameters (a digest), ``ts`` is the whole rising grid and ``steps`` the indices stored; ``seed``
    is that of the noise (forward), ``data`` the SHA-256 of the data and ``backward_map`` how they were carried
    (backward); ``shape`` is that of one example at one time. ``cond`` describes the conditions of an example
    (``columns.describe``) and ``cond_digest`` is the SHA-256 of all of them; ``start`` names the function that drew
    the starts. The last three are ``None`` for a set without conditions and for starts from N(0, I), and are then left
    out of the file.
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
OPTIONAL = ("cond", "cond_digest", "start")


def ranges(m: Manifest) -> dict[str, tuple[int, int]]:
    """Every shard's file name, and the examples ``start .. stop - 1`` it holds."""
    n = -(-m.count // m.shard_size)
    bounds = [(i * m.shard_size, min((i + 1) * m.shard_size, m.count)) for i in range(n)]
    return {f"shard-{i:05d}-of-{n:05d}.array_record": b for i, b in enumerate(bounds)}


def size(m: Manifest, names: Iterable[str]) -> int:
    """Bytes of these shards on disk, from above, within two blocks of 64 KiB a shard."""
    record = len(m.steps) * math.prod(m.shape) * np.dtype(m.dtype).itemsize + 64  # and its header and index
    record += 0 if m.cond is None else columns.row_bytes(m.cond) + 64
    counts = (stop - start for start, stop in (ranges(m)[name] for name in names))
    return sum(BLOCK * (2 + math.ceil(count * record * (1 + 32 / BLOCK) / BLOCK)) for count in counts)


def own(m: Manifest, process_index: int, process_count: int) -> dict[str, tuple[int, int]]:
    """The ``ranges`` that a process builds."""
    return dict(list(ranges(m).items())[process_index::process_count])


def resume(directory: str | os.PathLike, m: Manifest, names: Iterable[str]) -> dict[str, Shard]:
    """Those of the shards ``names`` that earlier builds of ``m`` completed; a missing or torn one is named in the log.

    Makes the directory. Raises ``OSError`` where it cannot be written, ``ValueError`` (naming each field that differs)
    where it holds something else.
    """
    directory = Path(directory)
    advice = "choose a directory that can be written"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(f"cannot write to {directory}: {e}; {advice}") from e
    if not os.access(directory, os.W_OK):
        raise OSError(f"cannot write to {directory}: no permission; {advice}")
    stray = sorted(directory.glob("shard-*.array_record"))  # before the manifests: other processes write theirs first
    old = load(directory)
    if old is None:
        if stray:
            raise ValueError(f"{directory} holds {stray[0].name} but no {MANIFEST}; build in an empty directory")
        return {}
    check(directory, old, {name: getattr(m, name) for name in IDENTITY})
    good, told = {}, _told(old)
    for name in names:
        if name in told:
            found = _whole(directory, name, told[name])
            if isinstance(found, Shard):
                good[name] = found
            else:
                log.warning("%s %s; building it again", directory / name, found)
    return good


def write(directory: str | os.PathLike, name: str, records: Iterable[bytes], cond: Iterable[bytes] = ()) -> Shard:
    """Writes one shard and gives it its name; what it returns is yet to be entered in the manifest (``save``).

    The conditions ``cond``, one ``bytes`` per example, follow the examples in the same file.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path, count = Path(directory) / name, 0
    unfinished = path.with_name(f"{name}.tmp")
    with contextlib.closing(ArrayRecordWriter(str(unfinished), OPTIONS)) as writer:
        for record in records:
            writer.write(record)
            count += 1
        for row in cond:
            writer.write(row)
    shard = Shard(name, count, _sha256(unfinished))
    _commit(unfinished, path)
    return shard


def save(
    directory: str | os.PathLike,
    m: Manifest,
    shards: dict[str, Shard],
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Manifest:
    """Writes a process's manifest of ``m`` with the complete ``shards``, atomically, and returns it."""
    m = m._replace(shards=tuple(shards[name] for name in sorted(shards)))
    name = MANIFEST if process_count == 1 else f"manifest-{process_index:05d}-of-{process_count:05d}.json"
    path = Path(directory) / name
    unfinished = path.with_name(f"{name}.tmp")
    fields = m._asdict() | {"shards": [shard._asdict() for shard in m.shards]}
    fields = {key: value for key, value in fields.items() if key not in OPTIONAL or value is not None}
    unfinished.write_text(json.dumps(fields, indent=1) + "\n")
    _commit(unfinished, path)
    return m


def load(directory: str | os.PathLike) -> Manifest | None:
    """What a directory's manifests say together, ``None`` without one; ``ValueError`` for what cannot be used.

    A shard that was built again, by another process, may be named twice.
    """
    directory = Path(directory)
    found = {path.name: _load(path) for path in sorted(directory.glob("manifest*.json"))}
    if not found:
        return None
    first, *others = found.values()
    for m in others:
        check(directory, m, {name: getattr(first, name) for name in IDENTITY})
    return first._replace(shards=tuple(sorted({shard for m in found.values() for shard in m.shards})))


def _load(path: Path) -> Manifest:
    try:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}
        if fields["version"] != VERSION:
            raise ValueError(f"format version {fields['version']}; this library reads {VERSION}")
        return Manifest(**fields)._replace(shards=tuple(Shard(**shard) for shard in fields["shards"]))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{path} cannot be used ({e}); remove {path.parent} and build the marginals again") from e


def check(directory: str | os.PathLike, m: Manifest, expect: dict) -> None:
    """Raises ``ValueError`` where the manifest ``m`` differs from ``expect``, naming every field with both values."""
    wrong = []
    for name, want in expect.items():
        if name not in IDENTITY:
            near = difflib.get_close_matches(name, IDENTITY, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"a manifest has no field {name!r}{hint} (there are {', '.join(IDENTITY)})")
        if isinstance(want, (list, tuple, range, np.ndarray)):
            want = tuple(np.asarray(want, np.float32 if name == "ts" else None).tolist())
        if getattr(m, name) != want:
            wrong.append(f"{name}: {_short(getattr(m, name))} there, {_short(want)} asked for")
    if wrong:
        raise ValueError(
            f"the marginals in {directory} are others ({'; '.join(wrong)}); build these in another directory, or ask "
            "for what is there"
        )


class _Rows:
    """One part of every record of a set, as if it were an array ``[M, ...]``: ``x[rows]`` reads it."""

    def __init__(self, source, m: Manifest, second: bool, start: int, stop: int | None, shape, dtype):
        self.source, self.shape, self.dtype, self.ndim = source, (m.count, *shape), np.dtype(dtype), 1 + len(shape)
        self._second, self._span, self._size = second, slice(start, stop), None if m.cond is None else m.shard_size

    def __len__(self) -> int:
        return self.shape[0]

    def _numbers(self, rows: np.ndarray) -> np.ndarray:
        """The record of each example: in a shard all examples come first, then all their conditions."""
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


class Records(_Rows):
    """A set on disk as if it were an array ``[M, steps, ...]``: ``x[rows]`` reads examples, ``x[rows, n]`` one step.

    ``rows`` is a slice, indices ``[k]`` or one index, so that it is a source for grain too. ``cond`` holds the
    conditions, each array read by ``[rows]`` alike, ``None`` in a set without. Every shard is checked when the set is
    opened: ``RuntimeError`` naming one that is missing or torn.
    """

    def __init__(self, directory: str | os.PathLike, m: Manifest):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        directory, told, again = Path(directory), _told(m), "run the same build again"
        if missing := [name for name in ranges(m) if name not in told]:
            raise RuntimeError(
                f"the marginals in {directory} are unfinished: {len(missing)} of {len(ranges(m))} shards are to be "
                f"built, first {missing[0]}; {again}, it goes on from there"
            )
        for name in ranges(m):
            if isinstance(fault := _whole(directory, name, told[name]), str):
                raise RuntimeError(f"{directory / name} {fault}; {again}, it rebuilds this shard alone")
        source = ArrayRecordDataSource([str(directory / name) for name in ranges(m)])
        super().__init__(source, m, False, 0, None, (len(m.steps), *m.shape), m.dtype)
        self.cond = None
        if m.cond is not None:
            parts = columns.layout(m.cond)
            self.cond = columns.rebuild(m.cond, [_Rows(source, m, True, *c[:2], c.shape, c.dtype) for c in parts])

    def __getitem__(self, at) -> np.ndarray:
        rows, n = at if isinstance(at, tuple) else (at, None)
        x = super().__getitem__(rows)
        if n is None:
            return x
        return x[n] if x.ndim < self.ndim else x[np.arange(len(x)), n]


def read(directory: str | os.PathLike, m: Manifest) -> np.ndarray:
    """All records ``[M, steps, ...]``, every shard checked as ``Records`` does."""
    return in_memory(Records(directory, m), m)


def in_memory(records: Records, m: Manifest) -> np.ndarray:
    """All of an open set as an array, read a shard at a time."""
    x = np.empty(records.shape, records.dtype)
    for start, stop in ranges(m).values():
        x[start:stop] = records[start:stop]
    return x


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-30:]}"


def _told(m: Manifest) -> dict[str, list[Shard]]:
    """The entries of each shard."""
    told: dict[str, list[Shard]] = {}
    for shard in m.shards:
        told.setdefault(shard.file, []).append(shard)
    return told


def _whole(directory: Path, name: str, told: list[Shard]) -> Shard | str:
    """The entry that a shard's bytes agree with, or what is wrong with them."""
    path = directory / name
    if not path.exists():
        return "is missing"
    found = _sha256(path)
    expected = ", ".join(shard.sha256[:12] for shard in told)
    torn = f"is torn or was changed (sha256 {found[:12]}, not {expected})"
    return next((shard for shard in told if shard.sha256 == found), torn)


def _commit(unfinished: Path, path: Path) -> None:
    """Gives a written file its name: content first, then the name, each synced."""
    _sync(unfinished)
    os.replace(unfinished, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
