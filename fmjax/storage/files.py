"""Files of a run: written whole or not at all, and verified when they are read.

Every file of a run goes through this module (checkpoints and shards have their own, ``storage.checkpoint`` and
``storage.shards``). A file is written under a temporary name, flushed to disk and renamed, so that a kill at any moment
leaves the old file or the new one. A file that is missing or damaged raises ``DamagedFile`` with its path.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.storage import untrusted
from fmjax.storage.names import cache_folder, hidden, local_path, naming, slug

__all__ = [
    "DamagedFile", "append_jsonl", "as_json", "cache_folder", "commit", "file_digest", "local_path", "read_array",
    "read_json", "read_jsonl", "seal", "slug", "sync", "truncate_jsonl", "write_array", "write_bytes", "write_json",
    "write_npz",
]  # fmt: skip

CHUNK = 2**24  # bytes written at a time
ABANDONED = 24 * 3600  # seconds: no write takes longer
NUMBERS = "biufc"  # kinds of dtypes: booleans, integers, floats, complex numbers
SEAL = "sha256"  # the name of the digest in a JSON object
_MARK = b"\nsha256:"  # between the data of an array and its digest


class DamagedFile(ValueError):
    """A file is missing, torn, or holds other bytes or another kind of content than was written.

    Attributes:
        path: the file.
        problem: what is wrong with it.
    """

    def __init__(self, path: str | Path, problem: str):
        self.path, self.problem = Path(path), untrusted.one_line(problem, 110)
        name = untrusted.short_path(path)
        super().__init__(f"{name} {self.problem}. Restore it from a copy, or delete it and run the command again.")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Args:
        path: the file, in a folder that exists.
        data: the content.
    """
    _write(Path(path), [data])


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write an object as sorted, indented JSON, whole or not at all.

    The field ``sha256`` is the digest of the file's name and the object: a copy under another name is no such file.

    Args:
        path: the file, in a folder that exists.
        value: plain values, dicts and lists by name; arrays become lists, paths strings.
    """
    write_bytes(path, (json.dumps(seal(value, Path(path).name), sort_keys=True, indent=2) + "\n").encode())


def read_json(path: str | Path, *, sealed: bool = True) -> dict[str, Any]:
    """Read an object that ``write_json`` wrote, and verify its digest.

    Args:
        path: the file.
        sealed: whether the file must have a digest; false for JSON that another library wrote.

    Returns:
        The object, without its digest.

    Raises:
        DamagedFile: the file is missing, is not JSON, holds another kind of value, or was changed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "config.json"
    >>> write_json(path, {"steps": 100})
    >>> read_json(path)
    {'steps': 100}
    """
    with _open(Path(path)) as file:
        content = file.read(untrusted.JSON_BYTES + 1)
    try:
        value = untrusted.parse_json(content)
    except ValueError as error:
        raise DamagedFile(path, f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DamagedFile(path, f"holds a {type(value).__name__} where a dict is expected")
    if sealed and (problem := _broken_seal(value, Path(path).name)) is not None:
        raise DamagedFile(path, problem)
    return {name: part for name, part in value.items() if not (sealed and name == SEAL)}


def seal(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object as plain JSON with the digest of its name and content in the field ``sha256``.

    Args:
        value: plain values, dicts and lists by name; arrays become lists, paths strings.
        name: the name of its file.

    Returns:
        The sealed object.

    Raises:
        ValueError: the object has a field ``sha256`` already.
    """
    if SEAL in value:
        raise ValueError(f"{SEAL}={value[SEAL]!r:.20}: the name of the digest. Choose another name.")
    plain = json.loads(json.dumps(dict(value), default=as_json))
    return {**plain, SEAL: _sha256([name.encode(), json.dumps(plain, sort_keys=True).encode()])}


def write_array(path: str | Path, array: Any, *, content: str = "") -> str:
    """Write an array as a ``.npy`` file with its digest, whole or not at all.

    ``numpy.load`` reads the file too. The digest, a SHA-256 of the content's name, the header and the data, follows
    them.

    Args:
        path: the file, in a folder that exists.
        array: numbers or booleans ``[...]``, on the host or on a device.
        content: what the array is, such as the digest of its sampler; ``read_array`` accepts no other.

    Returns:
        The digest, 64 hexadecimal characters: equal for equal arrays.

    Raises:
        TypeError: the array holds something else than numbers that numpy knows.
    """
    array = np.asarray(array)
    if array.dtype.kind not in NUMBERS:
        raise TypeError(f"array.dtype={array.dtype}: a file holds numbers only. Convert the array to float32 or int64.")
    array = np.asarray(array, order="C")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    parts = [header.getvalue(), *_chunks(array)]
    digest = _sha256([content.encode(), *parts])
    _write(Path(path), [*parts, _MARK + digest.encode()])
    return digest


def write_npz(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays as an ``.npz`` file that ``numpy.load`` reads, whole or not at all.

    Args:
        path: the file, in a folder that exists.
        arrays: arrays by name.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(array) for name, array in arrays.items()})
    write_bytes(path, buffer.getvalue())


def read_array(path: str | Path, *, content: str = "", digest: str | None = None) -> np.ndarray:
    """Read an array that ``write_array`` wrote, and verify its digest.

    Args:
        path: the file.
        content: what the array is, as it was written.
        digest: what ``write_array`` returned, where a record of the run holds it; ``None`` believes the file's own.

    Returns:
        The array, on the host.

    Raises:
        DamagedFile: the file is missing, cut, changed, or another array than the one with this digest.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "samples.npy"
    >>> digest = write_array(path, np.arange(3.0))
    >>> read_array(path, digest=digest)
    array([0., 1., 2.])
    """
    path = Path(path)
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            shape, columns_first, dtype, start = untrusted.read_header(file, size - len(_MARK) - 64)
        except ValueError as error:
            raise DamagedFile(path, f"is not an array that was written here ({error})") from error
        if columns_first:
            raise DamagedFile(path, "holds an array in Fortran's order, which was not written here")
        array = np.fromfile(file, dtype, math.prod(shape)).reshape(shape)
        mark = file.read(len(_MARK) + 65)
        file.seek(0)
        actual = _sha256([content.encode(), file.read(start), *_chunks(array)])
    if mark != _MARK + actual.encode():
        raise DamagedFile(path, "was changed after it was written, or is another file's")
    if digest not in (None, actual):
        raise DamagedFile(path, f"holds another array (sha256 {actual[:12]}, not {digest[:12]})")
    return array


def append_jsonl(path: str | Path, record: Mapping[str, Any], *, sealed: bool = False) -> None:
    """Append one record as one line of JSON; ``sync`` makes it survive a crash of the machine.

    Args:
        path: the file, made where it is missing.
        record: plain values; arrays become lists, paths strings.
        sealed: whether the line has its own digest, for files that no checkpoint seals.
    """
    with naming(path), open(path, "a") as file:
        file.write(json.dumps(seal(record, Path(path).name) if sealed else dict(record), default=as_json) + "\n")


def read_jsonl(path: str | Path, *, sealed: bool = False) -> list[dict[str, Any]]:
    """Read all records of a file of JSON lines.

    Args:
        path: the file; a missing one holds no records.
        sealed: whether each line has its own digest, which is verified.

    Returns:
        The records. A torn last line, which a killed run leaves, is left out.

    Raises:
        DamagedFile: a line before the last is not a JSON object, or a digest is wrong; the message names the line.
    """
    records = [record for _, record in _records(Path(path))]
    for number, record in enumerate(records if sealed else (), 1):
        if (problem := _broken_seal(record, Path(path).name)) is not None:
            raise DamagedFile(path, f"line {number} {problem}")
        del record[SEAL]
    return records


def truncate_jsonl(path: str | Path, step: int) -> None:
    """Drop the records after a step, and a torn last line; the other lines keep their bytes.

    A run resumed from ``step`` calls it, so that its records are the records of an uninterrupted run.

    Args:
        path: the file; a missing one stays missing.
        step: records with a greater ``step`` are dropped; records without ``step`` stay.
    """
    path = Path(path)
    if os.path.lexists(path):
        kept = b"".join(line for line, record in _records(path) if record.get("step", step) <= step)
        if len(kept) != path.stat().st_size:
            write_bytes(path, kept)


def sync(path: str | Path) -> None:
    """Flush a file or folder to disk, so that a crash of the machine does not lose it.

    Args:
        path: the file or folder; a missing one is left alone.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def commit(unfinished: str | Path, path: str | Path) -> None:
    """Rename a finished file to its final name: the content is flushed to disk first, then the name.

    Args:
        unfinished: the file under its temporary name, closed.
        path: the final name in the same folder; an older file of this name is replaced.
    """
    sync(unfinished)
    os.replace(unfinished, path)
    sync(Path(path).parent)


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Args:
        path: the file.

    Returns:
        64 hexadecimal characters.

    Raises:
        DamagedFile: the file is missing.
    """
    with _open(Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(value: Any) -> Any:
    """Return a value as plain JSON has it: the ``default`` of ``json.dumps`` for records and configs.

    Args:
        value: a mapping, an array, a scalar of numpy or JAX, or a path.

    Returns:
        A dict, a list, a number or a string.

    Raises:
        TypeError: the value is something else.

    >>> as_json(np.arange(2)), as_json(np.float32(0.5)), as_json(Path("a"))
    ([0, 1], 0.5, 'a')
    """
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not plain JSON: {value!r:.80}")


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a temporary neighbour, then give it the file's name; delete neighbours that killed processes left."""
    for old in path.parent.glob(f"{glob.escape(hidden(path.name))}*"):
        if time.time() - old.stat().st_mtime > ABANDONED:
            old.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=hidden(path.name))
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            file.writelines(parts)
        os.chmod(temporary, 0o644)
        commit(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _broken_seal(value: dict[str, Any], name: str) -> str | None:
    """Return what is wrong with a sealed object, or ``None``."""
    content = {name: part for name, part in value.items() if name != SEAL}
    actual = _sha256([name.encode(), json.dumps(content, sort_keys=True).encode()])
    return None if value.get(SEAL) == actual else "was changed after it was written, or is another file"


def _open(path: Path) -> io.IOBase:
    """Open a regular file; a pipe or a device would never end."""
    try:
        return untrusted.open_file(path)
    except FileNotFoundError as error:
        raise DamagedFile(path, "is missing") from error
    except ValueError as error:
        raise DamagedFile(path, str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise DamagedFile(path, f"cannot be read ({error.strerror})") from error


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the whole lines of a file of JSON objects, and the objects."""
    if not os.path.lexists(path):
        return
    with _open(path) as file:
        line = file.readline(untrusted.JSON_BYTES + 1)
        number = 1
        while line:
            following = file.readline(untrusted.JSON_BYTES + 1)
            if not following and not line.endswith(b"\n"):  # torn
                return
            try:
                record = untrusted.parse_json(line)
                if not isinstance(record, dict):
                    raise ValueError("another kind")
            except ValueError as error:
                if not following:
                    return
                raise DamagedFile(path, f"line {number} is not a JSON object: {line[:60]!r}") from error
            yield line, record
            line, number = following, number + 1


def _chunks(array: np.ndarray) -> list[memoryview]:
    """The bytes of a contiguous array, ``CHUNK`` at a time, without a copy."""
    content = memoryview(array.reshape(-1).view(np.uint8))
    return [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()
