"""Files of a run: written whole or not at all, and read with the line that is wrong."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache() -> Path:
    """Where what can be made again is kept between runs: ``$XDG_CACHE_HOME/fmjax``, by default ``~/.cache/fmjax``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmjax"


def slug(name: str) -> str:
    """A name as one of a file: letters and digits, and a dash for all else."""
    return "".join(c if c.isalnum() else "-" for c in name)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all: a temporary neighbour, flushed to disk, then renamed over it."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """``value`` as sorted, indented JSON, written whole or not at all; arrays become lists, paths strings."""
    write_bytes(path, (json.dumps(value, sort_keys=True, indent=2, default=_as_json) + "\n").encode())


def append_jsonl(path: str | Path, record: Mapping[str, Any]) -> None:
    """Appends one record as one line of JSON."""
    with open(path, "a") as file:
        file.write(json.dumps(dict(record), default=_as_json) + "\n")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All records; a torn last line (the run was killed while writing it) is left out, a missing file has none.

    Raises ``ValueError`` naming the line where one before the last is not JSON.
    """
    return [json.loads(line) for line in _lines(Path(path))]


def truncate_jsonl(path: str | Path, step: int) -> None:
    """Drops records whose ``step`` is greater than ``step``, and a torn last line; what stays, stays byte for byte.

    A run resumed from ``step`` calls it, so that its records are those of an uninterrupted run.
    """
    path = Path(path)
    if path.exists():
        kept = [line for line in _lines(path) if json.loads(line).get("step", step) <= step]
        write_bytes(path, "".join(line + "\n" for line in kept).encode())


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    *whole, torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, 1):
        try:
            json.loads(line)
        except ValueError as error:
            if number == len(whole) and not torn:
                return [line.decode() for line in whole[:-1]]
            raise ValueError(f"{path}, line {number} is not JSON: {line[:80]!r}") from error
    return [line.decode() for line in whole]


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not plain JSON: {value!r:.80}")
