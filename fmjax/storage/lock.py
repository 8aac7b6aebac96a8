"""The owner of a folder: one run at a time writes there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

FILE = "owner.lock"
ATTEMPTS = 20  # a lock that vanishes while it is examined is tried again
_guard = threading.Lock()
_held: dict[tuple[int, Path], list[int]] = {}  # (process, folder): the open lock file, and how many blocks own it


class Owned(RuntimeError):
    """Another process owns the folder; the message names its host and process id."""


@contextlib.contextmanager
def owned(directory: str | Path) -> Iterator[Path]:
    """Own a folder until the block ends, so that no other run writes there.

    The lock is the file ``owner.lock``, which names host and process. A hard link creates it, which succeeds for one
    process alone, on shared file systems too; where the file system has ``flock``, the owner also holds that. A lock
    whose process has ended on this host is taken over. A lock of another host is believed: only a person knows whether
    that run is dead. Blocks of one process may nest. Of the processes of ``jax.distributed`` the first one owns the
    folder for all.

    Args:
        directory: the folder, made where it is missing; a block that fails and leaves it empty removes it again.

    Yields:
        The folder's absolute path.

    Raises:
        Owned: another process owns the folder.
        OSError: the folder cannot be written.

    >>> folder = tempfile.mkdtemp()
    >>> with owned(folder):
    ...     os.listdir(folder)
    ['owner.lock']
    >>> os.listdir(folder)
    []
    """
    directory = Path(directory).absolute()
    if jax.process_index() != 0:
        yield directory
        return
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    path, key = directory / FILE, (os.getpid(), directory.resolve())
    with _guard:
        if key not in _held:
            _held[key] = [_acquire(path), 0]
        _held[key][1] += 1
    failed = True
    try:
        yield directory
        failed = False
    finally:
        with _guard:
            _held[key][1] -= 1
            if not _held[key][1]:
                _release(path, _held.pop(key)[0])
        if failed:
            with contextlib.suppress(OSError):  # a folder that is not empty
                for folder in missing:
                    folder.rmdir()


def _acquire(path: Path) -> int:
    """Create the lock file, or take it over from a dead process; return it open."""
    for _ in range(ATTEMPTS):
        created = _create(path)
        if created is not None:
            return created
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            text = os.read(handle, 4096)
            if not _flock(handle) or _alive(text, time.time() - os.fstat(handle).st_mtime):
                raise Owned(_message(path, text))
            if _same(handle, path):  # not the lock of a process that was quicker to take over
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)
        time.sleep(0.01)
    raise Owned(f"{path.parent} changes hands all the time. Start again when no other run starts there.")


def _release(path: Path, handle: int) -> None:
    """Remove the lock file, unless the folder was deleted or another process has taken over."""
    try:
        if _same(handle, path):
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _create(path: Path) -> int | None:
    """Create the lock file with its content, already locked, and return it open; ``None`` where there is one."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "since": now}
    text = (json.dumps(owner) + "\n").encode()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{FILE}.")
    try:
        _flock(handle)
        os.write(handle, text)
        os.fchmod(handle, 0o644)
        os.fsync(handle)
        os.link(temporary, path)
        return handle
    except FileExistsError:
        os.close(handle)
        return None
    except OSError as error:
        os.close(handle)
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        return _create_without_link(path, text)
    finally:
        os.unlink(temporary)


def _create_without_link(path: Path, text: bytes) -> int | None:
    """Create the lock file on a file system that has no hard links: it may be read before its content is there."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    _flock(handle)
    os.write(handle, text)
    return handle


def _flock(handle: int) -> bool:
    """Take the advisory lock of an open file; return False only where another process holds it."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # a system or file system without it: the lock file alone decides
        pass
    return True


def _alive(text: bytes, age: float) -> bool:
    """Return whether the owner that a lock file names may still run; ``age`` is the file's, in seconds."""
    owner = _parse(text)
    if not owner:
        return age < 60  # a lock that is being written
    if owner.get("host") != socket.gethostname():
        return True
    return owner.get("pid") != os.getpid() and _started(owner.get("pid")) == owner.get("started") is not None


def _started(pid: Any) -> str | None:
    """Return what tells a process from others that had its number before; ``None`` where there is no process."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, TypeError, OverflowError):
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return "running"  # no /proc: its number alone


def _parse(text: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _same(handle: int, path: Path) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _message(path: Path, text: bytes) -> str:
    owner = _parse(text)
    who = f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})" if owner else "another run"
    return f"{path.parent} is in use by {who}. Wait for it or choose another folder; if it is dead, delete {path.name}."
