"""Read files of strangers: regular files only, and within a memory that follows from the file's size.

A file from somebody else may be a pipe, a device, a bomb that unpacks to terabytes, or a table that lies about its
sizes. What this module opens and unpacks takes at most ``EXPANSION`` times the size of the file plus ``SLACK`` bytes.
Nothing in a file is executed. A refusal is a ``ValueError`` of one line; the caller adds the path.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

EXPANSION = 3  # times the size of a packed file: what its content may take
SLACK = 2**25  # bytes that a packed file may take beyond that
DIRECTORY = 2**21  # bytes of the list of the members of a zip archive: about 20,000 members
HEADER = 2**16  # bytes of the header of an array
JSON_BYTES = 2**23  # bytes of a JSON text
JSON_PARTS = 400_000  # lists, objects and entries of a JSON text
LINE = 300  # characters of a message
PATH = 120  # characters of a path in a message


class Header(NamedTuple):
    """What the header of a ``.npy`` file states.

    Attributes:
        shape: shape of the array.
        columns_first: whether the array is stored in Fortran's order.
        dtype: dtype of the numbers.
        start: first byte of the data.
    """

    shape: tuple[int, ...]
    columns_first: bool
    dtype: np.dtype
    start: int


def one_line(message: Any, limit: int = LINE) -> str:
    """Return a text as one printable line of bounded length.

    Args:
        message: text, an exception or a path.
        limit: the greatest number of characters.

    Returns:
        The text with single spaces; other characters that cannot be printed become question marks.

    >>> one_line("two\\nlines"), one_line("x" * 100, 10)
    ('two lines', 'xxxxxxxx …')
    """
    text = " ".join(str(message)[: 4 * limit].split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 2] + " …"


def short_path(path: str | os.PathLike) -> str:
    """Return a path for a message: one line, the beginning of a long path left out.

    Args:
        path: the path.

    Returns:
        The whole path, or its last ``PATH`` characters.

    >>> short_path("runs/a/config.json")
    'runs/a/config.json'
    """
    text = one_line(os.fspath(path), 10**5)
    return text if len(text) <= PATH else "…" + text[1 - PATH :]


def open_file(path: str | os.PathLike) -> io.IOBase:
    """Open a regular file for reading; a pipe, a device, a socket or a folder is refused without waiting for it.

    Args:
        path: the file, or a link to it.

    Returns:
        The open file.

    Raises:
        ValueError: ``path`` is not a regular file.
        OSError: the file cannot be opened.
    """
    kind = os.stat(path).st_mode  # before opening: to open a device can have an effect
    if stat.S_ISREG(kind):
        file = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
        if stat.S_ISREG(kind := os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    names = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    raise ValueError(f"is a {names.get(stat.S_IFMT(kind), 'device')}, not a file")


def size_of(file: io.IOBase) -> int:
    """Return the size of an open file in bytes; refuse a file larger than the memory of this machine.

    Args:
        file: an open regular file.

    Returns:
        The number of bytes.

    Raises:
        ValueError: the file is empty, or larger than the memory.
    """
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise ValueError("is empty")
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else size
    if size > memory > 0:
        raise ValueError(f"has {size} bytes, and this machine has a memory of {memory}")
    return size


def parse_json(text: bytes) -> Any:
    """Read a JSON text whose objects fit into a bounded memory.

    Args:
        text: UTF-8, at most ``JSON_BYTES`` long, with at most ``JSON_PARTS`` lists, objects and entries.

    Returns:
        The value.

    Raises:
        ValueError: the text is not JSON, has a name twice in one object, or is too large.

    >>> parse_json(b'{"steps": [1, 2]}')
    {'steps': [1, 2]}
    """
    if len(text) > JSON_BYTES:
        raise ValueError(f"its JSON has {len(text)} bytes, more than {JSON_BYTES}")
    parts = sum(text.count(mark) for mark in (b"[", b"{", b","))
    if parts > JSON_PARTS:
        raise ValueError(f"its JSON has {parts} parts, more than {JSON_PARTS}")
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("its JSON has a name twice in one object")
    return content


@contextlib.contextmanager
def open_zip(file: io.IOBase, size: int, *, packed: bool) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive whose members fit into a bounded memory and have different names.

    Args:
        file: the open archive.
        size: its number of bytes.
        packed: whether members may be compressed (deflate).

    Yields:
        The archive. ``archive.read(name)`` reads at most the size that the archive states.

    Raises:
        ValueError: the archive is damaged or unpacks to more than is allowed.
    """
    directory = _Directory(file)
    try:
        archive = zipfile.ZipFile(directory)
    except zipfile.BadZipFile as error:
        raise ValueError("not a zip archive") from error
    with archive:
        directory.limit = None
        members = archive.infolist()
        unpacked = sum(info.file_size for info in members)
        if packed and unpacked > EXPANSION * size + SLACK:
            raise ValueError(f"it unpacks to {unpacked} bytes from {size}, more than {EXPANSION} times its size")
        if not packed and unpacked > size:
            raise ValueError(f"it unpacks to {unpacked} bytes from {size}, and PyTorch does not compress its archives")
        if len({info.filename for info in members}) != len(members):
            raise ValueError("it holds two members of one name")
        allowed = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) if packed else (zipfile.ZIP_STORED,)
        for info in members:
            if info.compress_type not in allowed or info.flag_bits & 1:
                raise ValueError(f"its member {info.filename:.60} is compressed or encrypted in a way not read here")
        yield archive


class _Directory(io.RawIOBase):
    """An open file that does not read more than ``limit`` bytes at once, while ``zipfile`` lists its members."""

    def __init__(self, file: io.IOBase):
        self.file, self.limit = file, DIRECTORY

    def read(self, count: int = -1) -> bytes:
        if self.limit is not None and (count is None or not 0 <= count <= self.limit):
            if count is None or count < 0:  # the end of the file, where the directory is found
                count = self.limit
            else:
                raise ValueError(f"the list of its members has {count} bytes, more than {self.limit}")
        return self.file.read(count)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


class Unpacked(io.RawIOBase):
    """The content of a gzip file, or of a plain one, which ends with an error once it is larger than is allowed.

    Attributes:
        most: the greatest number of bytes, ``EXPANSION`` times the size of the file plus ``SLACK``.
    """

    def __init__(self, file: io.IOBase, size: int, *, plain: bool = False):
        """Take an open file and its size; ``plain`` reads it as it is where it is not a gzip file."""
        self.most = EXPANSION * size + SLACK
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._file = file if plain and not packed else gzip.GzipFile(fileobj=file)

    def read(self, count: int | None = -1) -> bytes:
        """Read bytes; ``ValueError`` where the content goes on beyond the limit."""
        rest = self.most - self._file.tell() + 1
        data = self._file.read(rest if count is None or count < 0 else min(count, rest))
        if self._file.tell() > self.most:
            raise ValueError(f"it unpacks to more than {self.most} bytes")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to another place within the limit."""
        if whence == 0 and offset > self.most:
            raise ValueError(f"it unpacks to more than {self.most} bytes")
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place in the content."""
        return self._file.tell()

    def readinto(self, buffer) -> int:
        """Read bytes into a buffer; return how many."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True


@contextlib.contextmanager
def open_tar(path: str | os.PathLike) -> Iterator[tarfile.TarFile]:
    """Open a tar archive, packed by gzip or not, that ends with an error where it unpacks to more than is allowed.

    Args:
        path: the archive.

    Yields:
        The archive.

    Raises:
        ValueError: another kind of file, or too much content.
    """
    with open_file(path) as file:
        content = Unpacked(file, os.fstat(file.fileno()).st_size, plain=True)
        with tarfile.open(fileobj=io.BufferedReader(content, 2**16), mode="r:") as tar:
            yield tar


def read_header(file: io.IOBase, size: int) -> Header:
    """Read the header of a ``.npy`` file of numbers and compare it with the size of the file.

    Args:
        file: the file, or a member of an archive, at its beginning.
        size: its number of bytes.

    Returns:
        The header; the data that follow have exactly the bytes that it states.

    Raises:
        ValueError: another format, objects or text in place of numbers, or a shape that does not fit the size.
    """
    prefix = file.read(8)
    length = 4 if prefix[6:7] > b"\x01" else 2
    if len(prefix) < 8 or prefix[:6] != b"\x93NUMPY" or prefix[6] > 3:
        raise ValueError("it does not begin as a .npy file")
    prefix += file.read(length)
    stated = int.from_bytes(prefix[8:], "little")
    if stated > HEADER:
        raise ValueError(f"its header has {stated} bytes, more than {HEADER}")
    head = io.BytesIO(prefix + file.read(stated))
    head.seek(8)
    reader = np.lib.format.read_array_header_1_0 if length == 2 else np.lib.format.read_array_header_2_0
    try:
        shape, columns_first, dtype = reader(head)
    except Exception as error:  # what Python's parser and numpy make of a hostile header
        raise ValueError(f"its header is damaged ({type(error).__name__})") from error
    start = len(prefix) + stated
    if dtype.kind not in "biufc" or dtype.hasobject:
        raise ValueError(f"it holds {str(dtype):.40}, and only numbers are read")
    if len(shape) > 32 or any(type(n) is not int or not 0 <= n < 2**62 for n in shape):
        raise ValueError("its header states an impossible shape")
    if math.prod(shape) * dtype.itemsize != size - start:
        raise ValueError("its header states another size than the data have")
    return Header(shape, columns_first, dtype, start)


def read_npy(file: io.IOBase, size: int) -> np.ndarray:
    """Read an array of numbers from a ``.npy`` file or a member of an archive.

    Args:
        file: the open file, at its beginning.
        size: its number of bytes.

    Returns:
        The array.

    Raises:
        ValueError: as ``read_header``, or the data are cut.
    """
    header = read_header(file, size)
    array = np.empty(math.prod(header.shape), header.dtype)
    content, place = memoryview(array.view(np.uint8)), 0
    while place < len(content):
        part = file.read(min(2**20, len(content) - place))
        if not part:
            raise ValueError("its data are cut")
        content[place : place + len(part)] = part
        place += len(part)
    file.read(1)  # the end of a member of an archive, where its checksum is compared
    return array.reshape(header.shape, order="F" if header.columns_first else "C")


def npz_arrays(file: io.IOBase, size: int) -> dict[str, np.ndarray]:
    """Read the arrays of an ``.npz`` file, compressed or not.

    Args:
        file: the open file.
        size: its number of bytes.

    Returns:
        Arrays by name.

    Raises:
        ValueError: the archive is damaged, or holds something else than arrays of numbers.
    """
    with open_zip(file, size, packed=True) as archive:
        arrays = {}
        for info in archive.infolist():
            with archive.open(info) as member:
                try:
                    arrays[info.filename.removesuffix(".npy")] = read_npy(member, info.file_size)
                except ValueError as error:
                    raise ValueError(f"{one_line(info.filename, 40)}: {error}") from error
    return arrays
