"""ImageNet at 64x64 for whoever has its archives: 1,281,167 + 50,000 photographs, labelled or not."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fmjax.data import images
from fmjax.data.dataset import Dataset

SETS = ("resized", "downsampled")


def imagenet64(
    *,
    validation: int = 5000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    archive: str = "resized",
    verify: bool = True,
    stream: bool = True,
) -> Dataset:
    """The photographs ``[n, 64, 64, 3]``, the validation split held out, read from disk; see ``images.load``.

    ``archive`` says which of the two sets of this size, which are not the same pixels:

    * ``"resized"`` (arXiv 1707.08819): ``Imagenet64_train_part1_npz.zip``, ``..._part2_npz.zip`` and
      ``Imagenet64_val_npz.zip`` (14 GB), with labels 0..999. Preparing them takes 5 GB of memory.
    * ``"downsampled"`` (arXiv 1601.06759), on which likelihoods are reported: ``train_64x64.tar`` and
      ``valid_64x64.tar`` (12.6 GB), without labels (all 0).

    The records take 16 GB. image-net.org gives the archives to registered users only: name their folder in
    ``source_dir``.
    """
    return images.load(
        original(64, archive),
        validation=validation,
        source_dir=source_dir,
        data_dir=data_dir,
        verify=verify,
        stream=stream,
    )


def original(size: int, archive: str) -> images.Original:
    """The archives of one size of one set; raises ``ValueError`` for a set that is not of ``SETS``."""
    shape = (size, size, 3)
    if archive == "downsampled":
        train, test = (((f"{split}_{size}x{size}.tar",),) for split in ("train", "valid"))
        table = "datasets/downsampled_imagenet/checksums.tsv"
        return images.Original(f"downsampled_imagenet{size}", table, train, test, shape, read_tar, labelled=False)
    if archive == "resized":
        parts = ("train_part1", "train_part2") if size == 64 else ("train",)
        train = tuple((f"Imagenet{size}_{part}_npz.zip",) for part in parts)
        test = ((f"Imagenet{size}_val_npz.zip",),)
        table = "datasets/imagenet_resized/checksums.tsv"
        return images.Original(f"imagenet{size}", table, train, test, shape, read_npz)
    raise ValueError(f"archive={archive!r} must be one of {', '.join(SETS)}")


def read_npz(paths: Sequence[Path], split: str) -> Iterator[tuple[np.ndarray, int]]:
    """A zip of npz files of ``data: [n, 3 H W]``, channel by channel, and ``labels: [n]`` from 1."""
    with zipfile.ZipFile(paths[0]) as archive:
        for name in archive.namelist():
            if not name.endswith(".npz"):
                continue
            with np.load(io.BytesIO(archive.read(name)), allow_pickle=False) as batch:
                data, labels = batch["data"], batch["labels"]
            if len(data) != len(labels):
                raise ValueError(f"{name} has {len(data)} images, but {len(labels)} labels")
            size = round((data.shape[1] / 3) ** 0.5)
            for image, label in zip(data.reshape(-1, 3, size, size), labels, strict=True):
                yield image.transpose(1, 2, 0), label - 1


def read_tar(paths: Sequence[Path], split: str) -> Iterator[tuple[np.ndarray, int]]:
    """A tar of PNG files, in the archive's order."""
    from PIL import Image

    with tarfile.open(paths[0]) as tar:
        for member in tar:
            if member.name.endswith(".png"):
                with Image.open(tar.extractfile(member)) as image:
                    yield np.array(image.convert("RGB")), 0
            tar.members = []  # tarfile remembers all it has seen
