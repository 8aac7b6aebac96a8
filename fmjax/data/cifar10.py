"""CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 colour photographs of ten classes, 32x32."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fmjax.data import images
from fmjax.data.dataset import Dataset

SHAPE = (32, 32, 3)
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}


def cifar10(
    *,
    validation: int = 5000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    verify: bool = True,
    stream: bool = False,
) -> Dataset:
    """The photographs ``[n, 32, 32, 3]`` with labels 0..9, the official test split held out; see ``images.load``.

    The source is ``cifar-10-binary.tar.gz`` (170 MB). In memory the images take 0.74 GB.
    """
    return images.load(
        ORIGINAL, validation=validation, source_dir=source_dir, data_dir=data_dir, verify=verify, stream=stream
    )


def read(paths: Sequence[Path], split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Images and labels of the binary version: a byte for the label, then 3 x 32 x 32 bytes, channel by channel."""
    with tarfile.open(paths[0]) as tar:
        found = {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}
    for name in FILES[split]:
        for record in np.frombuffer(found[name], np.uint8).reshape(-1, 1 + np.prod(SHAPE)):
            yield record[1:].reshape(SHAPE[2], *SHAPE[:2]).transpose(1, 2, 0), record[0]


ORIGINAL = images.Original(
    name="cifar10",
    registered="url_checksums/cifar10.txt",
    train=(("cifar-10-binary.tar.gz",),),
    test=(("cifar-10-binary.tar.gz",),),
    shape=SHAPE,
    read=read,
)
