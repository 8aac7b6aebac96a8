"""ImageNet at 32x32 and 64x64, from its archives: 1,281,167 + 50,000 photographs, with or without labels.

There are two sets of each size, and their pixels differ:

* ``archive="resized"`` (arXiv 1707.08819) has labels 0..999.
* ``archive="downsampled"`` (arXiv 1601.06759), on which likelihoods are reported, has no labels.

image-net.org gives the archives to registered users only: put them into a folder and name it in ``source_dir``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fmjax.checks import nearest
from fmjax.data import images, preparation
from fmjax.data.dataset import Count, Dataset
from fmjax.storage import untrusted

ARCHIVES = ("resized", "downsampled")
LARGEST = 64  # pixels: the side of an image


def imagenet32(
    *,
    validation: Count = 50_000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    archive: str = "resized",
    verify: bool = True,
    stream: bool = True,
) -> Dataset:
    """Load ImageNet at 32x32, read from disk batch by batch; see ``images.load_images``.

    The files of ``"resized"`` are ``Imagenet32_train_npz.zip`` and ``Imagenet32_val_npz.zip`` (3.7 GB), the files of
    ``"downsampled"`` ``train_32x32.tar`` and ``valid_32x32.tar`` (4.3 GB). The records take 4 GB.

    Args:
        validation: the number of images, the last of the training files, that are kept for validation. The published
            validation files are the test split.
        source_dir: the folder of the archives.
        data_dir: the folder of the prepared records; ``None`` takes the folder of TFDS.
        archive: ``"resized"`` or ``"downsampled"``.
        verify: whether the archives must have the registered checksums.
        stream: whether the images stay on disk.

    Returns:
        Images ``[n, 32, 32, 3]`` with labels 0..999, or without labels.

    Raises:
        ValueError: for another ``archive``.

    >>> imagenet32(archive="small")
    Traceback (most recent call last):
    ValueError: archive='small': it must be one of resized, downsampled
    """
    return images.load_images(
        archives(32, archive),
        validation=validation,
        source_dir=source_dir,
        data_dir=data_dir,
        verify=verify,
        stream=stream,
    )


def imagenet64(
    *,
    validation: Count = 50_000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    archive: str = "resized",
    verify: bool = True,
    stream: bool = True,
) -> Dataset:
    """Load ImageNet at 64x64, read from disk batch by batch; see ``images.load_images``.

    The files of ``"resized"`` are ``Imagenet64_train_part1_npz.zip``, ``Imagenet64_train_part2_npz.zip`` and
    ``Imagenet64_val_npz.zip`` (14 GB; preparing them takes 5 GB of memory), the files of ``"downsampled"``
    ``train_64x64.tar`` and ``valid_64x64.tar`` (12.6 GB). The records take 16 GB.

    Args:
        validation: the number of images, the last of the training files, that are kept for validation. The published
            validation files are the test split.
        source_dir: the folder of the archives.
        data_dir: the folder of the prepared records; ``None`` takes the folder of TFDS.
        archive: ``"resized"`` or ``"downsampled"``.
        verify: whether the archives must have the registered checksums.
        stream: whether the images stay on disk.

    Returns:
        Images ``[n, 64, 64, 3]`` with labels 0..999, or without labels.

    Raises:
        ValueError: for another ``archive``.

    >>> imagenet64(archive="resizd")
    Traceback (most recent call last):
    ValueError: archive='resizd': it must be one of resized, downsampled; did you mean 'resized'?
    """
    return images.load_images(
        archives(64, archive),
        validation=validation,
        source_dir=source_dir,
        data_dir=data_dir,
        verify=verify,
        stream=stream,
    )


def archives(size: int, archive: str) -> preparation.Original:
    """Return the description of the archives of one size and one set.

    Args:
        size: 32 or 64, pixels.
        archive: ``"resized"`` or ``"downsampled"``.

    Returns:
        The files and their reader.

    Raises:
        ValueError: for another ``archive``.
    """
    shape = (size, size, 3)
    if archive == "downsampled":
        train, test = (((f"{split}_{size}x{size}.tar",),) for split in ("train", "valid"))
        table = "datasets/downsampled_imagenet/checksums.tsv"
        return preparation.Original(f"downsampled_imagenet{size}", table, train, test, shape, read_tar)
    if archive == "resized":
        parts = ("train_part1", "train_part2") if size == 64 else ("train",)
        train = tuple((f"Imagenet{size}_{part}_npz.zip",) for part in parts)
        test = ((f"Imagenet{size}_val_npz.zip",),)
        table = "datasets/imagenet_resized/checksums.tsv"
        return preparation.Original(f"imagenet{size}", table, train, test, shape, read_npz, classes=1000)
    raise ValueError(f"archive={archive!r}: it must be one of {', '.join(ARCHIVES)}{nearest(archive, ARCHIVES)}")


def read_npz(paths: Sequence[Path], split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Read a zip of npz files of ``data: [n, 3 H W]``, channel by channel, and ``labels: [n]`` from 1.

    Args:
        paths: the archive.
        split: not used; an archive holds one split.

    Yields:
        Pairs of an image ``[H, W, 3]`` uint8 and a label from 0, in the order of the archive.

    Raises:
        ValueError: for a file whose numbers of images and labels differ.
    """
    with (
        untrusted.open_file(paths[0]) as file,
        untrusted.open_zip(file, os.fstat(file.fileno()).st_size, packed=True) as archive,
    ):
        for name in archive.namelist():
            if not name.endswith(".npz"):
                continue
            content = archive.read(name)
            batch = untrusted.npz_arrays(io.BytesIO(content), len(content))
            data, labels = batch["data"], batch["labels"]
            if len(data) != len(labels):
                raise ValueError(f"{name} has {len(data)} images, but {len(labels)} labels")
            size = round((data.shape[1] / 3) ** 0.5)
            for image, label in zip(data.reshape(-1, 3, size, size), labels, strict=True):
                yield image.transpose(1, 2, 0), label - 1


def read_tar(paths: Sequence[Path], split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Read the PNG files of a tar.

    Args:
        paths: the archive.
        split: not used; an archive holds one split.

    Yields:
        Pairs of an image ``[H, W, 3]`` uint8 and the label 0, in the order of the archive.
    """
    from PIL import Image

    with untrusted.open_tar(paths[0]) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".png"):
                with Image.open(tar.extractfile(member), formats=["PNG"]) as image:
                    if max(image.size) > LARGEST:  # a small file can unpack to gigabytes
                        raise ValueError(f"{member.name:.60} is an image of {image.size} pixels")
                    yield np.array(image.convert("RGB")), 0
            tar.members = []  # tarfile remembers every member it has read
