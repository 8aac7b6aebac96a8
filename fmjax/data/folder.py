"""A data set from a folder of image files; its sub-folders are the labels."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax.checks import Seed, check_hints
from fmjax.data import preparation, splits
from fmjax.data.arrays import SPLITS, Mapped
from fmjax.data.dataset import Dataset, Examples, Part, dataset
from fmjax.data.decoding import Channels, Size, decode_image
from fmjax.data.images import scale_pixels
from fmjax.storage import files as storage_files
from fmjax.storage import untrusted
from fmjax.storage.files import local_path

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
LARGE = 2**28  # bytes of decoded pixels: beyond, they are records on disk
OTHER_SPLITS = {"train", "training", "validation", "valid", "val", "test", "testing"}


class _Files(NamedTuple):
    """Image files, in order, and the names of the sub-folders that are their labels."""

    paths: list[Path]
    labels: list[int] | None
    names: tuple[str, ...]


def folder(
    *,
    path: str,
    size: Size | None = None,
    channels: Channels = 3,
    validation: Part = 0.1,
    test: Part = 0.1,
    seed: Seed = 0,
    stream: bool | None = None,
    data_dir: str | None = None,
) -> Dataset:
    """Load a data set from a folder of PNG, JPEG and WebP files.

    The images lie in the folder, or all in its sub-folders, whose names in alphabetical order are the labels 0, 1, ...
    They are split at random. Or the folder holds ``train``, ``validation`` and ``test``, each a folder of this form.
    Hidden files and files with other endings are not read. ``decoding.decode_image`` states what becomes of grey,
    16-bit and transparent images, and ``decoding.fit_image`` of other sizes.

    Args:
        path: the folder.
        size: height and width of the examples; ``None`` takes the size of the files, which is then one size.
        channels: 1 for grey, 3 for colours.
        validation: the fraction of the images for validation, in (0, 1).
        test: the fraction of the images for testing, in (0, 1).
        seed: the seed of the split.
        stream: whether the decoded images are kept as records on disk, which later calls read, and are read batch by
            batch; ``None`` does so where they take more than 256 MB.
        data_dir: the folder of the records; ``None`` takes the folder of TFDS.

    Returns:
        Images ``[n, size, size, channels]`` in [-1, 1], of 256 levels, with labels where there are sub-folders.

    Raises:
        FileNotFoundError: for a missing folder.
        ValueError: for a folder of another form, and for a file that cannot be decoded, naming it.

    >>> import tempfile
    >>> from PIL import Image
    >>> place = Path(tempfile.mkdtemp())
    >>> for i in range(40):
    ...     (place / "ab"[i % 2]).mkdir(exist_ok=True)
    ...     Image.new("RGB", (9, 7), (i, 0, 255)).save(place / "ab"[i % 2] / f"{i}.png")
    >>> data = folder(path=str(place), size=4)
    >>> data.train.x.shape, data.classes, data.labels
    ((32, 4, 4, 3), 2, ('a', 'b'))
    """
    check_hints(folder, dict(locals()))
    place = local_path("path", path)
    parts = _list_splits(place)
    shape = (size, size, channels) if size else _common_shape(parts, channels)
    count = sum(len(part.paths) for part in parts.values())
    stream = count * int(np.prod(shape)) > LARGE if stream is None else stream
    records = local_path("data_dir", data_dir) if data_dir else _records_folder() if stream else None
    loaded = {}
    for name, part in parts.items():
        pixels = _stored(part, shape, size, place, records) if stream else _decoded(part, shape, size)
        x = Mapped(pixels) if stream else scale_pixels(pixels)
        loaded[name] = Examples(x, None if part.labels is None else np.array(part.labels, np.int32))
    try:
        three = splits.complete(loaded, validation=validation, test=test, seed=seed)
        names = parts["train"].names
        data = dataset(*three, levels=256, classes=len(names) or None, name=place.name)
    except ValueError as error:
        raise ValueError(untrusted.one_line(f"{error} The folder is {untrusted.short_path(place)}.")) from error
    return data._replace(labels=names)


def _list_splits(place: Path) -> dict[str, _Files]:
    """Return the files of the splits: ``"train"`` alone where the folder has no splits."""
    if not place.is_dir():
        problem = "is not a folder" if place.exists() else "there is no such folder"
        raise FileNotFoundError(f"path={untrusted.short_path(place)}: {problem}. Give a folder of images.")
    inside = {entry.name for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith(".")}
    named = inside & OTHER_SPLITS
    if named and inside != set(SPLITS):
        wrong = f"its sub-folders {', '.join(sorted(named))} look like splits, not labels"
        raise ValueError(f"path={untrusted.short_path(place)}: {wrong}. Have exactly {', '.join(SPLITS)}, or rename.")
    if not named:
        return {"train": _list_files(place)}
    parts = {name: _list_files(place / name) for name in SPLITS}
    for name, part in parts.items():
        if part.names != parts["train"].names:
            raise ValueError(f"path={untrusted.short_path(place / name)}: its labels differ from those in train.")
    return parts


def _list_files(place: Path) -> _Files:
    """Return the image files of a folder, or of its sub-folders, sorted by name."""
    direct = _images_in(place)
    below = sorted(entry.name for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith("."))
    by_label = [(name, _images_in(place / name)) for name in below]
    by_label = [(name, paths) for name, paths in by_label if paths]
    where = f"path={untrusted.short_path(place)}"
    if direct and by_label:
        raise ValueError(f"{where}: images lie in it and in its sub-folders, so some have no label. Move them.")
    if not direct and not by_label:
        raise ValueError(f"{where}: it holds no {', '.join(ENDINGS)} file. Give a folder of images.")
    if direct:
        return _Files(direct, None, ())
    labels = [i for i, (_, paths) in enumerate(by_label) for _ in paths]
    return _Files([path for _, paths in by_label for path in paths], labels, tuple(name for name, _ in by_label))


def _images_in(place: Path) -> list[Path]:
    names = (entry.name for entry in os.scandir(place) if not entry.is_dir())
    return [place / name for name in sorted(names) if name.lower().endswith(ENDINGS) and not name.startswith(".")]


def _common_shape(parts: dict[str, _Files], channels: int) -> tuple[int, int, int]:
    """Return the shape of the first image; ``_decode`` refuses images of other shapes."""
    return _decode(parts["train"].paths[0], None, channels).shape


def _decode(path: Path, size: int | None, channels: int) -> np.ndarray:
    try:
        with untrusted.open_file(path) as file:
            return decode_image(file, size=size, channels=channels)
    except ValueError as error:
        line = untrusted.one_line(error, 120)
        raise ValueError(f"path={untrusted.short_path(path)}: {line}. Repair or remove this file.") from error


def _each_decoded(part: _Files, shape: tuple[int, ...], size: int | None) -> Iterator[np.ndarray]:
    """Yield the decoded images in order, by a few threads: Pillow decodes without Python's lock."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(part.paths), 256):  # a few in memory at a time
            paths = part.paths[start : start + 256]
            for path, pixels in zip(paths, pool.map(lambda p: _decode(p, size, shape[2]), paths), strict=True):
                if pixels.shape != shape:
                    sizes = f"{pixels.shape[0]} x {pixels.shape[1]} pixels, and the first image {shape[0]} x {shape[1]}"
                    raise ValueError(f"path={untrusted.short_path(path)}: has {sizes}. Set size, or resize this file.")
                yield pixels


def _decoded(part: _Files, shape: tuple[int, ...], size: int | None) -> np.ndarray:
    out = np.empty((len(part.paths), *shape), np.uint8)
    for i, pixels in enumerate(_each_decoded(part, shape, size)):
        out[i] = pixels
    return out


def _stored(part: _Files, shape: tuple[int, ...], size: int | None, place: Path, records: Path) -> np.ndarray:
    """Return the decoded images as a memory-mapped array, which is written unless it exists.

    Its name has a digest of the names, sizes and times of change of the files, so that a changed folder is decoded
    again. The file receives its name when it is complete.
    """
    stats = [(str(path.relative_to(place)), *_stamp(path)) for path in part.paths]
    digest = hashlib.sha256(json.dumps([stats, shape, size]).encode()).hexdigest()[:16]
    file = records / f"fmjax_folder_{digest}.npy"
    whole = (len(part.paths), *shape)
    with preparation.alone(records):
        if (ready := _open_records(file, whole)) is not None:
            return ready
        unfinished = file.with_suffix(".unfinished.npy")
        try:
            array = np.lib.format.open_memmap(unfinished, "w+", np.uint8, whole)
            for i, pixels in enumerate(_each_decoded(part, shape, size)):
                array[i] = pixels
            array.flush()
            del array
            storage_files.commit(unfinished, file)
        except OSError as error:
            wrong = untrusted.one_line(error.strerror or error, 100)
            raise OSError(
                f"data_dir={untrusted.short_path(records)}: {wrong}. Give a folder with free space."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
    return _open_records(file, whole)


def _open_records(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return records; ``None`` where there are none of this shape, whole."""
    try:
        with untrusted.open_file(file) as opened:
            header = untrusted.read_header(opened, os.fstat(opened.fileno()).st_size)
    except (OSError, ValueError):
        return None
    if header.shape != shape or header.dtype != np.uint8 or header.columns_first:
        return None
    return np.memmap(file, np.uint8, "r", header.start, shape)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _records_folder() -> Path:
    import tensorflow_datasets as tfds

    return Path(tfds.core.constants.DATA_DIR).expanduser() / "fmjax_folders"
