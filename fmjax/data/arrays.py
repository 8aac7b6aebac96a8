"""A data set from a file of arrays: points, vectors, series or images of the user."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Annotated

import numpy as np

from fmjax.checks import Positive, Range, Seed, check_hints
from fmjax.data import splits
from fmjax.data.dataset import Dataset, Examples, Part, Rows, dataset
from fmjax.data.images import scale_pixels
from fmjax.data.units import standardise as standardised
from fmjax.storage import untrusted
from fmjax.storage.files import local_path

SPLITS = ("train", "validation", "test")


def arrays(
    *,
    path: str,
    validation: Part = 0.1,
    test: Part = 0.1,
    seed: Seed = 0,
    levels: Annotated[int, Range(low=2)] | None = None,
    classes: Positive | None = None,
    standardise: bool = False,
    stream: bool = False,
) -> Dataset:
    """Load a data set from a ``.npz`` or ``.npy`` file.

    The file holds ``x: [n, ...]`` and, for conditional models, ``y: [n, ...]``, integer labels or floats, which are
    split at random. Or it holds the splits, ``x_train``, ``x_validation``, ``x_test`` (and ``y_train``, ...). The
    kind of data follows from the shape of one example. Images, in ``y`` too, are floats in [-1, 1], or uint8, which is
    scaled to [-1, 1].

    Args:
        path: the file; a ``.npy`` file holds ``x``.
        validation: the fraction of ``x`` for validation, in (0, 1).
        test: the fraction of ``x`` for testing, in (0, 1).
        seed: the seed of the split of ``x``.
        levels: the number of grey levels of a pixel; ``None`` takes 256 for uint8, and none for floats.
        classes: the number of label classes; ``None`` takes the largest label plus one.
        standardise: whether the columns of vectors, the channels of series and float conditions get mean 0 and standard
            deviation 1; samples are returned in the units of the file.
        stream: whether the examples stay on disk, memory-mapped, and are read batch by batch. The file must not be
            compressed: ``np.savez`` or ``np.save``. A compressed file may unpack to three times its size plus 32 MB.

    Returns:
        The data set, in float32.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a file that is not of this form, and as ``dataset`` raises.

    >>> import os, tempfile
    >>> file = os.path.join(tempfile.mkdtemp(), "points.npz")
    >>> np.savez(file, x=np.eye(40, 2), y=np.arange(40) % 4)
    >>> data = arrays(path=file)
    >>> data.kind, data.classes, data.train.count, data.validation.count
    ('points', 4, 32, 4)
    """
    check_hints(arrays, {"validation": validation, "test": test, "seed": seed, "levels": levels, "classes": classes})
    file = local_path("path", path)
    content = read_arrays("path", path, stream=stream)
    try:
        parts, raw = _parts(content, validation, test, seed, stream)
        levels = 256 if levels is None and raw else levels
        data = dataset(*parts, levels=levels, classes=classes, name=file.stem)
        return standardised(data) if standardise else data
    except ValueError as error:  # the file holds something else than examples
        raise ValueError(untrusted.one_line(f"{error} The file is {untrusted.short_path(file)}.")) from error


def _parts(
    content: dict[str, np.ndarray], validation: float, test: float, seed: int, stream: bool
) -> tuple[list[Examples], bool]:
    """Return the three splits of the arrays of a file, and whether all of them are bytes."""
    x = {name: array for name, array in content.items() if name.startswith("x")}
    raw = all(array.dtype == np.uint8 for array in x.values())
    x = {name: _converted(array, stream, f"{name:.30}") for name, array in x.items()}
    y = {name: array for name, array in content.items() if name.startswith("y")}
    y = {name: scale_pixels(array) if _is_pixels(array) else array for name, array in y.items()}
    needed = [f"x_{split}" for split in SPLITS]
    if "x" in x:
        return splits.divide(x["x"], y.get("y"), validation=validation, test=test, seed=seed), raw
    if all(name in x for name in needed):
        return [Examples(x[f"x_{split}"], y.get(f"y_{split}")) for split in SPLITS], raw
    names = untrusted.one_line(", ".join(f"{name:.30}" for name in sorted(content)[:9]), 100) or "nothing"
    raise ValueError(f"path: it holds {names}. Give x (and y), or all of {', '.join(needed)}.")


class Mapped:
    """Rows of a memory-mapped array that are converted to float32 when they are read; uint8 is scaled to [-1, 1].

    Attributes:
        array: the memory-mapped array.
        rows: the rows of ``array`` that are seen, in order.
        shape: ``(len(rows), ...)``.
        from_bytes: whether the array is uint8, so that all rows are finite and in [-1, 1].
    """

    dtype = np.dtype(np.float32)

    def __init__(self, array: np.ndarray, rows: np.ndarray | None = None):
        self.array, self.rows = array, np.arange(len(array)) if rows is None else rows
        self.shape, self.ndim = (len(self.rows), *array.shape[1:]), array.ndim
        self.from_bytes = array.dtype == np.uint8

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: np.ndarray) -> Mapped:
        """Return some of the rows, on disk as well."""
        return Mapped(self.array, self.rows[rows])

    def __getitem__(self, rows) -> np.ndarray:
        """Read the rows of a slice, or of indices ``[k]``."""
        part = np.asarray(self.array[self.rows[rows]])
        return scale_pixels(part) if self.from_bytes else part.astype(np.float32)


def read_arrays(field: str, path: str | Path, *, stream: bool = False) -> dict[str, np.ndarray]:
    """Read the arrays of a ``.npz`` or ``.npy`` file. Nothing in the file is executed.

    Args:
        field: the name of the option that names the file, for messages.
        path: the file; the array of a ``.npy`` file is named ``x``.
        stream: whether arrays whose name begins with ``x`` are memory-mapped.

    Returns:
        The arrays by name.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a file that cannot be read as arrays of numbers.
    """
    path = local_path(field, path)
    try:
        with untrusted.open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            single = file.read(6) == b"\x93NUMPY"
            file.seek(0)
            if single:
                return {
                    "x": _mapped(path, 0, untrusted.read_header(file, size))
                    if stream
                    else untrusted.read_npy(file, size)
                }
            return _mapped_npz(path, file, size) if stream else untrusted.npz_arrays(file, size)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{field}={untrusted.short_path(path)}: there is no such file. Give a .npz or .npy file."
        ) from error
    except Exception as error:  # a damaged file can fail anywhere
        line = untrusted.one_line(error, 100) or type(error).__name__
        raise ValueError(
            f"{field}={untrusted.short_path(path)}: it cannot be read as arrays ({line}). Write it with np.savez."
        ) from error


def _mapped_npz(path: Path, file: io.IOBase, size: int) -> dict[str, np.ndarray]:
    """Return the arrays of an uncompressed npz file, the examples among them memory-mapped."""
    arrays = {}
    with untrusted.open_zip(file, size, packed=True) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as member:
                if not name.startswith("x"):
                    arrays[name] = untrusted.read_npy(member, info.file_size)
                    continue
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{name:.40} is compressed, which stream=True cannot map")
                header = untrusted.read_header(member, info.file_size)
            file.seek(info.header_offset + 26)  # the local header of a member: 30 bytes, its name, an extra field
            start = info.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
            if start + info.file_size > size:
                raise ValueError(f"{name:.40} ends beyond the file")
            arrays[name] = _mapped(path, start, header)
    return arrays


def _mapped(path: Path, start: int, header: untrusted.Header) -> np.ndarray:
    order = "F" if header.columns_first else "C"
    return np.memmap(path, header.dtype, "r", start + header.start, header.shape, order)


def _is_pixels(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim == 4


def _converted(x: np.ndarray, stream: bool, field: str) -> Rows:
    """Return examples in float32, in memory or mapped; scale uint8 images."""
    if not x.ndim or x.dtype.kind != "f" and not _is_pixels(x):
        sizes = ", ".join(map(str, x.shape))
        raise ValueError(f"{field} is {x.dtype} [{sizes}]. Give floats, or uint8 images [n, H, W, C].")
    if stream:
        return Mapped(x)
    return scale_pixels(x) if x.dtype == np.uint8 else np.asarray(x, np.float32)
