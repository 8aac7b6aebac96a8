"""Names of files and folders: what a person gave, what the user's caches are called, what a name may contain."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

LONGEST = 255  # bytes of the name of a file or folder


def cache_folder() -> Path:
    """Return the folder of files that can be recomputed: ``$XDG_CACHE_HOME/fmjax``, by default ``~/.cache/fmjax``.

    Returns:
        The folder, which need not exist.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmjax"


def local_path(field: str, path: str | Path) -> Path:
    """Return a path that a person gave as an absolute path, ``~`` expanded.

    Args:
        field: the name of the setting, for the message.
        path: a file or folder.

    Returns:
        The absolute path.

    Raises:
        ValueError: an empty name, a URL, or a name that no file system takes.

    >>> path = local_path("out", "~/a.npz")
    >>> path.is_absolute(), path.name
    (True, 'a.npz')
    """
    if "://" in str(path):
        raise ValueError(f"{field}={path}: is a URL. Give a place in a local or mounted file system.")
    if not str(path).strip():
        raise ValueError(f"{field}={str(path)!r}: names no file or folder. Give a path; the current folder is '.'.")
    if "\0" in str(path) or any(len(os.fsencode(part)) > LONGEST for part in Path(path).parts):
        raise ValueError(
            f"{field}={str(path)!r:.80}: no file system takes this name. Give names of at most {LONGEST} bytes."
        )
    return Path(path).expanduser().absolute()


def hidden(name: str) -> str:
    """Return the beginning of the names of a file's temporary neighbours; a long name is cut.

    Args:
        name: the name of the file.

    Returns:
        A dot, the name or its first 100 bytes, and a dot.

    >>> hidden("samples.npz")
    '.samples.npz.'
    """
    return f".{name.encode()[:100].decode(errors='ignore')}."


def slug(name: str) -> str:
    """Return a name as part of a file name: every character but letters and digits becomes a dash.

    Args:
        name: any text.

    Returns:
        The text of the same length.

    >>> slug("rk4, 8 steps")
    'rk4--8-steps'
    """
    return "".join(c if c.isalnum() else "-" for c in name)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an ``OSError`` that names no file, such as a full disk's, the name of one.

    Args:
        path: the file that is written.

    Yields:
        Nothing.

    Raises:
        OSError: with the file's name.

    >>> with naming("a.json"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'a.json'
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
