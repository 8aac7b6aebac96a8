"""MNIST and Fashion-MNIST: 60,000 + 10,000 grey images each, 28x28, of ten classes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fmjax.data import images, preparation
from fmjax.data.dataset import Count, Dataset
from fmjax.storage import untrusted


def mnist(
    *,
    validation: Count = 5000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    verify: bool = True,
    stream: bool = False,
) -> Dataset:
    """Load MNIST (LeCun, Cortes and Burges, 1998): handwritten digits; see ``images.load_images``.

    Args:
        validation: the number of images, the last of the training files, that are kept for validation.
        source_dir: the folder of the published files; ``None`` downloads them.
        data_dir: the folder of the prepared records; ``None`` takes the folder of TFDS.
        verify: whether the files must have the registered checksums.
        stream: whether the images stay on disk.

    Returns:
        Images ``[n, 28, 28, 1]`` with labels 0..9, the digits.

    >>> mnist(verify=False)
    Traceback (most recent call last):
    ValueError: verify=False: a download is always verified. Set source_dir to the folder of the files.
    """
    return images.load_images(
        MNIST, validation=validation, source_dir=source_dir, data_dir=data_dir, verify=verify, stream=stream
    )


def fashion_mnist(
    *,
    validation: Count = 5000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    verify: bool = True,
    stream: bool = False,
) -> Dataset:
    """Load Fashion-MNIST (arXiv 1708.07747): articles of clothing; see ``images.load_images``.

    Args:
        validation: the number of images, the last of the training files, that are kept for validation.
        source_dir: the folder of the published files; ``None`` downloads them.
        data_dir: the folder of the prepared records; ``None`` takes the folder of TFDS.
        verify: whether the files must have the registered checksums.
        stream: whether the images stay on disk.

    Returns:
        Images ``[n, 28, 28, 1]`` with labels 0..9: t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker,
        bag, ankle boot.

    >>> fashion_mnist(data_dir="gs://bucket/data")
    Traceback (most recent call last):
    ValueError: data_dir=gs://bucket/data: is a URL. Give a place in a local or mounted file system.
    """
    return images.load_images(
        FASHION_MNIST, validation=validation, source_dir=source_dir, data_dir=data_dir, verify=verify, stream=stream
    )


def read_idx(paths: Sequence[Path], split: str) -> Iterable[tuple[np.ndarray, int]]:
    """Read the images and labels of gzipped ``idx3`` and ``idx1`` files (big-endian sizes, then bytes).

    Args:
        paths: the file of the images and the file of the labels.
        split: not used; the files hold one split.

    Returns:
        Pairs of an image ``[H, W, 1]`` uint8 and a label, in the order of the files.

    Raises:
        ValueError: for files of another format, or of different lengths.
    """
    pixels, labels = (_idx(path, axes) for path, axes in zip(paths, (3, 1), strict=True))
    if len(pixels) != len(labels):
        raise ValueError(f"{len(pixels)} images, but {len(labels)} labels")
    return zip(pixels[..., None], labels, strict=True)


def _idx(path: Path, axes: int) -> np.ndarray:
    with untrusted.open_file(path) as file:
        data = untrusted.Unpacked(file, os.fstat(file.fileno()).st_size).read()
    head = 4 * (1 + axes)
    magic, *shape = np.frombuffer(data[:head], ">u4").tolist() if len(data) >= head else (None,)
    if magic != 0x0800 + axes or len(data) != head + math.prod(shape):
        raise ValueError(f"{os.path.basename(path)} is no idx file of unsigned bytes with {axes} axes")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


MNIST = preparation.Original(
    name="mnist",
    registered="url_checksums/mnist.txt",
    train=(("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),),
    test=(("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),),
    shape=(28, 28, 1),
    read=read_idx,
    classes=10,
)
FASHION_MNIST = MNIST._replace(name="fashion_mnist", registered="url_checksums/fashion_mnist.txt")
