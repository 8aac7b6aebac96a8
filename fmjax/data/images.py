"""Published image sets: original files, checked against TFDS's checksums, become ArrayRecord files and then arrays.

No TensorFlow is imported: the builder stores ``Tensor`` features and Python reads the archives. What an image set adds
(its files and how they are read) is an ``Original`` in a file of its own.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax.data.dataset import Dataset, Examples, dataset

RECORDS = "1.0.0"  # the version of the records: a change of what they hold needs another
DAMAGED = (EOFError, OSError, tarfile.TarError, zipfile.BadZipFile, zlib.error, ValueError, KeyError)


class Original(NamedTuple):
    """An image set as it was published.

    * ``name``: its name here; ``registered``: the file of the ``tensorflow_datasets`` package that lists its files'
      addresses, sizes and SHA-256.
    * ``train``, ``test``: the files of each split: one tuple of names for each ArrayRecord file that is made of them.
    * ``shape``: of one image ``[H, W, C]``, uint8.
    * ``read``: ``(paths, split)`` of one such tuple to ``(image, label)`` in order; the label is 0 where there is none.
    """

    name: str
    registered: str
    train: tuple[tuple[str, ...], ...]
    test: tuple[tuple[str, ...], ...]
    shape: tuple[int, int, int]
    read: Callable[[Sequence[Path], str], Iterable[tuple[np.ndarray, int]]]
    labelled: bool = True

    def files(self) -> list[str]:
        """All files, each once."""
        return list(dict.fromkeys(name for names in self.train + self.test for name in names))


class Records:
    """Images on disk as if they were an array ``[n, H, W, C]`` in [-1, 1]: ``x[rows]`` reads those rows, as float32.

    ``arrays.batches`` takes it for an array. ``source`` is a TFDS data source (which grain takes too).
    """

    dtype, ndim = np.dtype(np.float32), 4

    def __init__(self, source, shape: tuple[int, int, int]):
        self.source, self.shape = source, (len(source), *shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> np.ndarray:
        """``rows``: a slice, or indices ``[k]``."""
        rows = range(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows).tolist()
        images = [record["image"] for record in self.source.__getitems__(rows)]
        return scaled(np.stack(images)) if images else np.empty((0, *self.shape[1:]), np.float32)

    def part(self, start: int, stop: int) -> Records:
        """The images of the rows ``start .. stop - 1``."""
        return Records(_Part(self.source, range(start, stop)), self.shape[1:])

    def __array__(self, *args, **kwargs):
        raise ValueError(
            f"{len(self)} images on disk are read by rows, x[rows]; for an array in memory set stream=False"
        )


class _Part:
    """Consecutive records of a data source, as a data source."""

    def __init__(self, source, rows: range):
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row):
        return self.source[self.rows[row]]

    def __getitems__(self, rows):
        return self.source.__getitems__([self.rows[row] for row in rows])


def load(
    original: Original,
    *,
    validation: int = 5000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    verify: bool = True,
    stream: bool = False,
) -> Dataset:
    """The training and the test images, ``x = pixel / 127.5 - 1`` in float32, in the published order.

    The first call prepares records in ``data_dir`` (default: TFDS's own, ``$TFDS_DATA_DIR`` or
    ``~/tensorflow_datasets``) from the original files, which are those of ``source_dir``, or downloaded where it is
    None. Later calls read the records only. A preparation takes its name when it is complete, so a killed one leaves
    nothing that could be mistaken for one; processes that share ``data_dir`` wait for the first.

    * ``verify``: the files must have the sizes and SHA-256 that TFDS registers. Without it any files of the same names
      and format in ``source_dir`` will do; their records are kept apart, by the files' sizes and times of change.
    * ``stream``: the images stay on disk (``Records``) and are read batch by batch; otherwise they are arrays.

    Raises ``FileNotFoundError`` for a missing file, ``ValueError`` for a file of another checksum or a damaged one,
    ``OSError`` where nothing can be downloaded (TFDS tries for minutes) or written, ``RuntimeError`` for records that
    cannot be read.
    """
    if "://" in str(data_dir or ""):
        raise ValueError(f"data_dir={data_dir} is a URL; give a folder of a local or mounted file system")
    if not verify and source_dir is None:
        raise ValueError("verify=False needs source_dir, the folder of the files; a download is always verified")
    name = original.name
    if not verify:
        name += "_unverified_" + _fingerprint(_local(original, source_dir))
    builder = _builder(original, name, source_dir, verify, data_dir)
    if not builder.data_path.exists():
        with _alone(Path(builder.data_path).parent):
            if not builder.data_path.exists():
                _prepare(builder)
        builder = _builder(original, name, source_dir, verify, data_dir)
    try:
        parts = {}
        for split in ("train", "test"):
            x = Records(builder.as_data_source(split=split), original.shape)
            y = np.load(Path(builder.data_path) / f"{split}-labels.npy")
            x[np.array([0, len(x) - 1])]  # a torn file shows when it is read; there are two at most
            if len(y) != len(x):
                raise ValueError(f"{len(x)} images, but {len(y)} labels")
            parts[split] = Examples(x if stream else _in_memory(x), y if original.labelled else None)
    except Exception as error:  # what TFDS and ArrayRecord raise for torn and missing files has no common type
        raise RuntimeError(
            f"the records in {builder.data_path} cannot be read ({_line(error)}); remove this folder and start again"
        ) from error
    train, held_out = _divide(parts["train"], validation, original.name)
    return dataset(train, held_out, parts["test"], levels=256, name=original.name)


def _divide(examples: Examples, validation: int, name: str) -> tuple[Examples, Examples]:
    """The training images in their published order without the last ``validation`` of them, and these."""
    most = examples.count - 2
    if not 2 <= validation <= most:
        raise ValueError(
            f"validation={validation}: {name} has {examples.count} training images. Keep 2..{most} for validation."
        )
    bounds = (0, examples.count - validation), (examples.count - validation, examples.count)
    x, y = examples
    parts = (x.part(a, b) if isinstance(x, Records) else x[a:b] for a, b in bounds)
    return tuple(Examples(part, None if y is None else y[a:b]) for part, (a, b) in zip(parts, bounds, strict=True))


def registered(original: Original) -> dict[str, tuple[str, Any]]:
    """Each file's address and its ``size`` in bytes and ``checksum`` (SHA-256), as the installed TFDS lists them."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    listed = checksums.load_url_infos(tfds.core.tfds_path() / original.registered)
    found = {info.filename: (url, info) for url, info in listed.items()}
    return {name: found[name] for name in original.files()}


def _builder(original: Original, name: str, source_dir: str | None, verify: bool, data_dir: str | None):
    """The TFDS builder of an image set; its class is made here, since importing TFDS costs half a second."""
    import tensorflow_datasets as tfds

    class Images(tfds.core.ShardBasedBuilder, skip_registration=True):
        """Images as they were published, in their order; the builder that shuffles needs TensorFlow above 1 GB."""

        VERSION = tfds.core.Version(RECORDS)

        def _info(self):
            image = tfds.features.Tensor(shape=original.shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
            features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.Scalar(np.int64)})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _shard_iterators_per_split(self, dl_manager):
            files = _downloaded(original, dl_manager) if source_dir is None else _local(original, source_dir)
            if verify and source_dir is not None:  # the download manager has verified what it fetched
                _verify(original, files)
            folder = Path(self.data_dir)  # the unfinished one: its name is given when all is written
            return {split: _shards(original, files, split, folder) for split in ("train", "test")}

    Images.name = f"fmjax_{name}"
    Images.url_infos = dict(registered(original).values())  # what the download manager verifies by
    return Images(data_dir=data_dir, file_format="array_record")


def _shards(original: Original, files: Mapping[str, Path], split: str, folder: Path) -> list[Callable[[], Iterator]]:
    """What makes each ArrayRecord file of a split; the labels are also kept as one array."""
    labels = []

    def examples(paths):
        try:
            for image, label in original.read(paths, split):
                if image.shape != original.shape:
                    raise ValueError(f"image {len(labels)} has shape {image.shape}, not {original.shape}")
                example = {"image": np.ascontiguousarray(image), "label": int(label)}
                yield len(labels), example
                labels.append(int(label))
                example.clear()  # it is written; TFDS keeps it to count it, and all images would stay in memory
        except DAMAGED as error:
            told = ", ".join(map(str, paths))
            raise ValueError(f"{told}: damaged, or not the files of {original.name} ({_line(error)})") from error
        np.save(folder / f"{split}-labels.npy", np.array(labels, np.int32))

    parts = [[files[name] for name in names] for names in getattr(original, split)]
    return [functools.partial(examples, paths) for paths in parts]


def _prepare(builder) -> None:
    path = Path(builder.data_path)
    for left in path.parent.glob(f"incomplete.*_{path.name}"):
        shutil.rmtree(left)  # of a preparation that was killed: nobody else is at work here
    with contextlib.redirect_stdout(sys.stderr):  # TFDS says what it does
        builder.download_and_prepare()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it, however it ends."""
    import fcntl  # not on Windows, which has no ArrayRecord either

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}; give data_dir, a folder with room") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _local(original: Original, source_dir: str) -> dict[str, Path]:
    folder = Path(source_dir).expanduser()
    files = {name: folder / name for name in original.files()}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)} of {original.name} not found in source_dir={source_dir}; put the original files "
            "there as they were published (not unpacked), or leave source_dir out to download them"
        )
    return files


def _downloaded(original: Original, dl_manager) -> dict[str, Path]:
    """The files through TFDS's download manager, which keeps them and unpacks nothing."""
    urls = {name: url for name, (url, _) in registered(original).items()}
    try:
        return {name: Path(path) for name, path in dl_manager.download(urls).items()}
    except Exception as error:  # requests, urllib and TFDS's own, which have no common type
        raise OSError(
            f"cannot download {original.name} ({type(error).__name__}: {_line(error)}); fetch "
            f"{', '.join(urls.values())} and give their folder as source_dir"
        ) from error


def _verify(original: Original, files: Mapping[str, Path]) -> None:
    for name, (_, info) in registered(original).items():
        path = files[name]
        size, sha256 = path.stat().st_size, _sha256(path)
        if (size, sha256) != (info.size, info.checksum):
            raise ValueError(
                f"{path} is not the published file: {size} bytes of SHA-256 {sha256}, registered are {info.size:d} "
                f"bytes of {info.checksum}; fetch it again, or set verify=False for a copy that was made otherwise"
            )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _fingerprint(files: Mapping[str, Path]) -> str:
    stats = sorted((name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items())
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_memory(x: Records, chunk: int = 4096) -> np.ndarray:
    out = np.empty(x.shape, np.float32)
    for start in range(0, len(x), chunk):
        out[start : start + chunk] = x[start : start + chunk]
    return out


def scaled(pixels: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [-1, 1]: ``pixel / 127.5 - 1``."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def read_idx(paths: Sequence[Path], split: str) -> Iterable[tuple[np.ndarray, int]]:
    """Images and labels of the MNIST family: ``idx3`` and ``idx1`` files (big-endian sizes, then bytes), gzipped."""
    images, labels = (_idx(path, axes) for path, axes in zip(paths, (3, 1), strict=True))
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images, but {len(labels)} labels")
    return zip(images[..., None], labels, strict=True)


def _idx(path: Path, axes: int) -> np.ndarray:
    with gzip.open(path) as file:
        data = file.read()
    head = 4 * (1 + axes)
    magic, *shape = np.frombuffer(data[:head], ">u4").tolist() if len(data) >= head else (None,)
    if magic != 0x0800 + axes or len(data) != head + int(np.prod(shape)):
        raise ValueError(f"{os.path.basename(path)} is no idx file of unsigned bytes with {axes} axes")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)
