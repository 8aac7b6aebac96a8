"""Records of published image sets: original files, checked against TFDS's checksums, become ArrayRecord files.

No TensorFlow is imported: the builder stores ``Tensor`` features, and Python reads the archives.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax.storage import files as storage_files
from fmjax.storage import untrusted
from fmjax.storage.files import local_path
from fmjax.storage.untrusted import one_line

RECORDS = "1.0.0"  # the version of the records: a change of their content needs another
log = logging.getLogger(__name__)


class Original(NamedTuple):
    """An image set as it was published.

    Attributes:
        name: the name of the set.
        registered: the file of the package ``tensorflow_datasets`` that lists addresses, sizes and SHA-256 of the set's
            files.
        train: the training files, one tuple of names for each ArrayRecord file that is made of them.
        test: the test files, in the same form.
        shape: the shape ``[H, W, C]`` of one image, uint8.
        read: ``read(paths, split)`` yields ``(image, label)`` in order, for the files of one such tuple; the label is 0
            in a set without labels.
        classes: the number of label classes, 0 for a set without labels.
    """

    name: str
    registered: str
    train: tuple[tuple[str, ...], ...]
    test: tuple[tuple[str, ...], ...]
    shape: tuple[int, int, int]
    read: Callable[[Sequence[Path], str], Iterable[tuple[np.ndarray, int]]]
    classes: int = 0

    def files(self) -> list[str]:
        """Return the names of all files, each once."""
        return list(dict.fromkeys(name for names in self.train + self.test for name in names))


def prepare(original: Original, *, source_dir: str | None, data_dir: str | None, verify: bool):
    """Return the TFDS builder of an image set, after preparing its records if there are none yet.

    Args:
        original: the image set.
        source_dir: the folder of the original files; ``None`` downloads them.
        data_dir: the folder of the records; ``None`` takes the folder of TFDS.
        verify: whether the files must have the registered checksums.

    Returns:
        A builder whose records exist.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a damaged file or a file of another checksum.
        OSError: if a file cannot be downloaded or written.
    """
    name = original.name
    if not verify:
        name += "_unverified_" + _fingerprint(_local(original, source_dir))
    builder = _builder(original, name, source_dir, verify, data_dir)
    if builder.data_path.exists():
        return builder
    with alone(Path(builder.data_path).parent):
        if not builder.data_path.exists():
            _prepare(builder)
    return _builder(original, name, source_dir, verify, data_dir)


def registered(original: Original) -> dict[str, tuple[str, Any]]:
    """Return what the installed TFDS registers of the files of an image set.

    Args:
        original: the image set.

    Returns:
        For each file the address and an object with its ``size`` in bytes and its ``checksum`` (SHA-256).
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    listed = checksums.load_url_infos(tfds.core.tfds_path() / original.registered)
    infos = {info.filename: (url, info) for url, info in listed.items()}
    return {name: infos[name] for name in original.files()}


def _builder(original: Original, name: str, source_dir: str | None, verify: bool, data_dir: str | None):
    """Return the TFDS builder of an image set; the class is local because importing TFDS costs half a second."""
    import tensorflow_datasets as tfds

    class Images(tfds.core.ShardBasedBuilder, skip_registration=True):
        """Images in their published order; the builder that shuffles needs TensorFlow above 1 GB."""

        VERSION = tfds.core.Version(RECORDS)

        def _info(self):
            image = tfds.features.Tensor(shape=original.shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
            features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.Scalar(np.int64)})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _shard_iterators_per_split(self, dl_manager):
            files = _downloaded(original, dl_manager) if source_dir is None else _local(original, source_dir)
            if verify and source_dir is not None:  # the download manager has verified what it fetched
                _verify(original, files)
            folder = Path(self.data_dir)  # the unfinished one, renamed when all is written
            return {split: _shards(original, files, split, folder) for split in ("train", "test")}

    Images.name = f"fmjax_{name}"
    Images.url_infos = dict(registered(original).values())  # what the download manager verifies by
    folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / Images.name / RECORDS
    try:
        _check_records(folder)
        return Images(data_dir=data_dir, file_format="array_record")
    except Exception as error:  # what TFDS raises for damaged descriptions has no common type
        if not folder.exists():
            raise
        raise unreadable(folder, error) from error


def _check_records(folder: Path) -> None:
    """Refuse prepared records whose descriptions are not small JSON files, or that hold something else than files."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.name.startswith("."):
            untrusted.open_file(path).close()
    for name in ("dataset_info.json", "features.json"):
        if (folder / name).exists():
            storage_files.read_json(folder / name, sealed=False)


def _shards(original: Original, files: Mapping[str, Path], split: str, folder: Path) -> list[Callable[[], Iterator]]:
    """Return the function that yields the examples of each ArrayRecord file; the labels are also kept as one array."""
    labels = []

    def examples(paths):
        try:
            for image, label in original.read(paths, split):
                if image.shape != original.shape:
                    raise ValueError(f"image {len(labels)} has shape {image.shape}, not {original.shape}")
                example = {"image": np.ascontiguousarray(image), "label": int(label)}
                yield len(labels), example
                labels.append(int(label))
                example.clear()  # TFDS keeps what it has written, to count it: all images would stay in memory
        except Exception as error:  # what a hostile archive or image raises has no common type
            names = ", ".join([untrusted.short_path(paths[0]), *(path.name for path in paths[1:])])
            line = one_line(error, 100) or type(error).__name__
            raise ValueError(
                f"{names}: damaged, or not the files of {original.name} ({line}). Fetch it again."
            ) from error
        storage_files.write_array(folder / _labels_file(split), np.array(labels, np.int32))

    parts = [[files[name] for name in names] for names in getattr(original, split)]
    return [functools.partial(examples, paths) for paths in parts]


def read_labels(folder: Path, split: str, source: Any) -> np.ndarray:
    """Read the labels of prepared records; labels that are damaged are made again from the records, which have them.

    Args:
        folder: the folder of the records.
        split: ``"train"`` or ``"test"``.
        source: the data source of the split.

    Returns:
        Labels ``[n]`` int32.

    Raises:
        ValueError: records without labels.
    """
    file = folder / _labels_file(split)
    try:
        y = storage_files.read_array(file)
        if y.shape != (len(source),) or y.dtype != np.int32:
            raise storage_files.DamagedFile(file, f"holds {y.dtype} {list(y.shape)}, not {len(source)} labels")
        return y
    except storage_files.DamagedFile as error:
        log.warning("%s: made again from the records", one_line(error))
    rows = [range(start, min(start + 4096, len(source))) for start in range(0, len(source), 4096)]
    y = np.array([record["label"] for part in rows for record in source.__getitems__(list(part))], np.int32)
    with contextlib.suppress(OSError):  # a folder that cannot be written: made again each time
        storage_files.write_array(file, y)
    return y


def _labels_file(split: str) -> str:
    return f"{split}-labels.npy"


def unreadable(folder: Any, error: Exception) -> RuntimeError:
    """Return the error of prepared records that cannot be read.

    Args:
        folder: the folder of the records.
        error: what reading them raised.

    Returns:
        The error, to be raised.
    """
    line = one_line(error, 90) or type(error).__name__
    name = untrusted.short_path(folder)
    return RuntimeError(f"data_dir={name}: the records cannot be read ({line}). Remove this folder and start again.")


def _prepare(builder) -> None:
    path = Path(builder.data_path)
    for left in path.parent.glob(f"incomplete.*_{path.name}"):
        shutil.rmtree(left)  # of a preparation that was killed: the lock is held
    with contextlib.redirect_stdout(sys.stderr):  # TFDS prints its progress
        builder.download_and_prepare()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created; it is released when the process ends, in whatever way.

    Args:
        folder: the folder.

    Yields:
        Nothing, while no other process holds the lock.

    Raises:
        OSError: the folder cannot be written.
    """
    import fcntl  # not on Windows, which has no ArrayRecord either

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise OSError(
            f"data_dir={folder}: {error.strerror}. Give a folder with free space that you may write to."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _local(original: Original, source_dir: str) -> dict[str, Path]:
    folder = local_path("source_dir", source_dir)
    files = {name: folder / name for name in original.files()}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"source_dir={source_dir}: {', '.join(missing)} of {original.name} not found. Put the original files there "
            "as they were published (not unpacked), or leave source_dir out to download them."
        )
    return files


def _downloaded(original: Original, dl_manager) -> dict[str, Path]:
    """Download the files with TFDS's download manager, which keeps them and unpacks nothing."""
    urls = {name: url for name, (url, _) in registered(original).items()}
    try:
        return {name: Path(path) for name, path in dl_manager.download(urls).items()}
    except Exception as error:  # the errors of requests, urllib and TFDS have no common type
        raise OSError(
            f"cannot download {original.name} ({type(error).__name__}: {one_line(error, 1000)}). Fetch "
            f"{', '.join(urls.values())} and set source_dir to their folder."
        ) from error


def _verify(original: Original, files: Mapping[str, Path]) -> None:
    for name, (_, info) in registered(original).items():
        path = files[name]
        size, sha256 = path.stat().st_size, _sha256(path)
        if (size, sha256) != (info.size, info.checksum):
            raise ValueError(
                f"{path}: {size} bytes of SHA-256 {sha256}, but the published file has {info.size:d} bytes of "
                f"{info.checksum}. Fetch it again, or set verify=False for another copy."
            )


def _fingerprint(files: Mapping[str, Path]) -> str:
    stats = sorted((name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items())
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
