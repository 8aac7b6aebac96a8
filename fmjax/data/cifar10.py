"""CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 colour photographs of ten classes, 32x32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fmjax.data import images, preparation
from fmjax.data.dataset import Count, Dataset
from fmjax.storage import untrusted

SHAPE = (32, 32, 3)
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}


def cifar10(
    *,
    validation: Count = 5000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    verify: bool = True,
    stream: bool = False,
) -> Dataset:
    """Load CIFAR-10 from ``cifar-10-binary.tar.gz`` (170 MB); see ``images.load_images``.

    In memory the images take 0.74 GB.

    Args:
        validation: the number of images, the last of the training files, that are kept for validation.
        source_dir: the folder of the published file; ``None`` downloads it.
        data_dir: the folder of the prepared records; ``None`` takes the folder of TFDS.
        verify: whether the file must have the registered checksum.
        stream: whether the images stay on disk.

    Returns:
        Images ``[n, 32, 32, 3]`` with labels 0..9: airplane, automobile, bird, cat, deer, dog, frog, horse, ship,
        truck.

    >>> cifar10(validation=1)
    Traceback (most recent call last):
    ValueError: validation=1: outside the allowed range. Give a number in [2, 100000000].
    """
    return images.load_images(
        CIFAR10, validation=validation, source_dir=source_dir, data_dir=data_dir, verify=verify, stream=stream
    )


def read_binary(paths: Sequence[Path], split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Read the images and labels of the binary version: a byte of label, then the pixels channel by channel.

    Args:
        paths: the archive.
        split: ``"train"`` or ``"test"``.

    Yields:
        Pairs of an image ``[32, 32, 3]`` uint8 and a label, in the order of the files.
    """
    with untrusted.open_tar(paths[0]) as tar:
        contents = {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}
    for name in FILES[split]:
        for record in np.frombuffer(contents[name], np.uint8).reshape(-1, 1 + np.prod(SHAPE)):
            yield record[1:].reshape(SHAPE[2], *SHAPE[:2]).transpose(1, 2, 0), record[0]


CIFAR10 = preparation.Original(
    name="cifar10",
    registered="url_checksums/cifar10.txt",
    train=(("cifar-10-binary.tar.gz",),),
    test=(("cifar-10-binary.tar.gz",),),
    shape=SHAPE,
    read=read_binary,
    classes=10,
)
