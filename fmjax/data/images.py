"""Published image sets: arrays, or records on disk, made from the original files.

What an image set adds (its files and how they are read) is an ``Original`` of ``preparation.py`` beside its factory:
see ``mnist.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fmjax.checks import check_hints
from fmjax.data import preparation
from fmjax.data.dataset import Count, Dataset, Examples, dataset
from fmjax.storage.files import local_path


class Records:
    """Images on disk that are indexed like an array ``[n, H, W, C]`` float32 in [-1, 1]: ``x[rows]`` reads the rows.

    ``data.batches`` accepts records in place of an array.

    Attributes:
        source: a TFDS data source, which grain accepts, too.
        shape: ``(n, H, W, C)``.
        from_bytes: all rows are scaled from uint8, so that they are finite and in [-1, 1].
    """

    dtype, ndim = np.dtype(np.float32), 4
    from_bytes = True

    def __init__(self, source, shape: tuple[int, int, int]):
        self.source, self.shape = source, (len(source), *shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> np.ndarray:
        """Read the images of a slice, or of indices ``[k]``."""
        rows = range(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows).tolist()
        images = [record["image"] for record in self.source.__getitems__(rows)]
        return scale_pixels(np.stack(images)) if images else np.empty((0, *self.shape[1:]), np.float32)

    def part(self, start: int, stop: int) -> Records:
        """Return the records of the rows ``start .. stop - 1``."""
        return self.select(range(start, stop))

    def select(self, rows) -> Records:
        """Return the records of some rows."""
        return Records(_Part(self.source, rows), self.shape[1:])

    def __array__(self, *args, **kwargs):
        raise ValueError(
            f"stream=True: {len(self)} images on disk are read by rows, x[rows]. For arrays set stream=False."
        )


class _Part:
    """Some records of a data source, as a data source."""

    def __init__(self, source, rows):
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row):
        return self.source[self.rows[row]]

    def __getitems__(self, rows):
        return self.source.__getitems__([self.rows[row] for row in rows])


def load_images(
    original: preparation.Original,
    *,
    validation: Count = 5000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    verify: bool = True,
    stream: bool = False,
) -> Dataset:
    """Load a published image set: ``x = pixel / 127.5 - 1`` in float32, in the published order.

    The first call prepares records in ``data_dir`` from the original files; later calls read the records only. A
    preparation receives its name when it is complete, so that a killed one leaves nothing that looks complete;
    processes with the same ``data_dir`` wait for the first.

    Args:
        original: the set.
        validation: the number of images, the last of the training files, that are kept for validation.
        source_dir: the folder of the original files; ``None`` downloads them.
        data_dir: the folder of the records; ``None`` takes the folder of TFDS, ``$TFDS_DATA_DIR`` or
            ``~/tensorflow_datasets``.
        verify: whether the files must have the sizes and SHA-256 that TFDS registers. If not, any files of these names
            and of this format in ``source_dir`` are accepted; their records are kept apart, by the files' sizes and
            times of change.
        stream: whether the images stay on disk (``Records``) and are read batch by batch; otherwise they are arrays.

    Returns:
        The data set of 256 levels; the published test files are the test split.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a damaged file, a file of another checksum, or options that cannot work.
        OSError: if a file cannot be downloaded (TFDS tries for minutes) or written.
        RuntimeError: for records that cannot be read.
    """
    check_hints(load_images, {"validation": validation})
    data_dir = None if data_dir is None else str(local_path("data_dir", data_dir))
    if not verify and source_dir is None:
        raise ValueError("verify=False: a download is always verified. Set source_dir to the folder of the files.")
    builder = preparation.prepare(original, source_dir=source_dir, data_dir=data_dir, verify=verify)
    splits = {}
    try:
        for split in ("train", "test"):
            x = Records(builder.as_data_source(split=split), original.shape)
            x[np.array([0, len(x) - 1])]  # a torn file shows when it is read; there are two at most
            y = preparation.read_labels(Path(builder.data_path), split, x.source)
            splits[split] = Examples(x if stream else _in_memory(x), y if original.classes else None)
    except Exception as error:  # what TFDS and ArrayRecord raise for torn and missing files has no common type
        raise preparation.unreadable(builder.data_path, error) from error
    train, held_out = _divide(splits["train"], validation, original.name)
    classes = original.classes or None
    return dataset(train, held_out, splits["test"], levels=256, classes=classes, name=original.name)


def _divide(examples: Examples, validation: int, name: str) -> tuple[Examples, Examples]:
    """Return the training examples without the last ``validation`` of them, and these."""
    most = examples.count - 2
    if validation > most:
        raise ValueError(f"validation={validation}: {name} has {examples.count} training images. Keep {most} or fewer.")
    x, y = examples
    first = examples.count - validation
    rows = lambda a, b: x.part(a, b) if isinstance(x, Records) else x[a:b]
    labels = lambda a, b: None if y is None else y[a:b]
    bounds = (0, first), (first, examples.count)
    return tuple(Examples(rows(*ends), labels(*ends)) for ends in bounds)


def _in_memory(x: Records, chunk: int = 4096) -> np.ndarray:
    out = np.empty(x.shape, np.float32)
    for start in range(0, len(x), chunk):
        out[start : start + chunk] = x[start : start + chunk]
    return out


def scale_pixels(pixels: np.ndarray) -> np.ndarray:
    """Scale 8-bit pixels to [-1, 1]: ``pixel / 127.5 - 1``.

    Args:
        pixels: uint8, of any shape.

    Returns:
        float32 of the same shape.
    """
    out = pixels.astype(np.float32)
    out /= np.float32(127.5)
    out -= np.float32(1)
    return out
