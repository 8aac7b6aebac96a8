"""Arrays on disk that survive a kill at any moment: ArrayRecord shards and a manifest of what they were made from.

A shard is written under a temporary name, synced, renamed and only then entered in ``manifest.json`` with its SHA-256,
so that a name means a whole file. Record ``i`` is example ``i``.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

VERSION = 1
MANIFEST = "manifest.json"
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
    (backward); ``shape`` is that of one example at one time.
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
    shards: tuple[Shard, ...] = ()


IDENTITY = Manifest._fields[:-1]


def ranges(m: Manifest) -> dict[str, tuple[int, int]]:
    """Every shard's file name, and the examples ``start .. stop - 1`` it holds."""
    n = -(-m.count // m.shard_size)
    bounds = [(i * m.shard_size, min((i + 1) * m.shard_size, m.count)) for i in range(n)]
    return {f"shard-{i:05d}-of-{n:05d}.array_record": b for i, b in enumerate(bounds)}


def resume(directory: str | os.PathLike, m: Manifest) -> dict[str, Shard]:
    """The complete shards of an earlier build of ``m``; one that is missing or torn is named in the log and left out.

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
    old = load(directory)
    if old is None:
        if stray := sorted(directory.glob("shard-*.array_record")):
            raise ValueError(f"{directory} holds {stray[0].name} but no {MANIFEST}; build in an empty directory")
        return {}
    check(directory, old, {name: getattr(m, name) for name in IDENTITY})
    good = {}
    for shard in old.shards:
        if fault := _fault(directory, shard):
            log.warning("%s %s; building it again", directory / shard.file, fault)
        else:
            good[shard.file] = shard
    return good


def write(directory: str | os.PathLike, name: str, records: Iterable[bytes]) -> Shard:
    """Writes one shard and gives it its name; what it returns is yet to be entered in the manifest (``save``)."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path, count = Path(directory) / name, 0
    unfinished = path.with_name(f"{name}.tmp")
    with contextlib.closing(ArrayRecordWriter(str(unfinished), OPTIONS)) as writer:
        for record in records:
            writer.write(record)
            count += 1
    shard = Shard(name, count, _sha256(unfinished))
    _commit(unfinished, path)
    return shard


def save(directory: str | os.PathLike, m: Manifest, shards: dict[str, Shard]) -> Manifest:
    """Writes the manifest of ``m`` with the complete ``shards``, atomically, and returns it."""
    m = m._replace(shards=tuple(shards[name] for name in sorted(shards)))
    path = Path(directory) / MANIFEST
    unfinished = path.with_name(f"{MANIFEST}.tmp")
    fields = m._asdict() | {"shards": [shard._asdict() for shard in m.shards]}
    unfinished.write_text(json.dumps(fields, indent=1) + "\n")
    _commit(unfinished, path)
    return m


def load(directory: str | os.PathLike) -> Manifest | None:
    """The manifest of a directory, ``None`` without one; ``ValueError`` for one that cannot be used."""
    path = Path(directory) / MANIFEST
    if not path.exists():
        return None
    try:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}
        if fields["version"] != VERSION:
            raise ValueError(f"format version {fields['version']}; this library reads {VERSION}")
        return Manifest(**fields)._replace(shards=tuple(Shard(**shard) for shard in fields["shards"]))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{path} cannot be used ({e}); remove {directory} and build the marginals again") from e


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


def read(directory: str | os.PathLike, m: Manifest) -> np.ndarray:
    """All records ``[M, steps, ...]``, every shard checked; ``RuntimeError`` naming one that is missing or torn."""
    from array_record.python.array_record_module import ArrayRecordReader

    directory, parts, shards = Path(directory), ranges(m), {shard.file: shard for shard in m.shards}
    again = "run the same build again"
    if missing := [name for name in parts if name not in shards]:
        raise RuntimeError(
            f"the marginals in {directory} are unfinished: {len(missing)} of {len(parts)} shards are to be built, "
            f"first {missing[0]}; {again}, it goes on from there"
        )
    x = np.empty((m.count, len(m.steps), *m.shape), m.dtype)
    for name, (start, stop) in parts.items():
        if fault := _fault(directory, shards[name]):
            raise RuntimeError(f"{directory / name} {fault}; {again}, it rebuilds this shard alone")
        records = ArrayRecordReader(str(directory / name)).read_all()
        x[start:stop] = np.frombuffer(b"".join(records), m.dtype).reshape(stop - start, *x.shape[1:])
    return x


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-30:]}"


def _fault(directory: Path, shard: Shard) -> str | None:
    path = directory / shard.file
    if not path.exists():
        return "is missing"
    found = _sha256(path)
    return None if found == shard.sha256 else f"is torn or was changed (sha256 {found[:12]}, not {shard.sha256[:12]})"


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
