"""MNIST (LeCun, Cortes and Burges, 1998): 60,000 + 10,000 handwritten digits, 28x28."""

from __future__ import annotations

from fmjax.data import images
from fmjax.data.dataset import Dataset

ORIGINAL = images.Original(
    name="mnist",
    registered="url_checksums/mnist.txt",
    train=(("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),),
    test=(("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),),
    shape=(28, 28, 1),
    read=images.read_idx,
)


def mnist(
    *,
    validation: int = 5000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    verify: bool = True,
    stream: bool = False,
) -> Dataset:
    """The digits ``[n, 28, 28, 1]`` with labels 0..9, the official test split held out; see ``images.load``."""
    return images.load(
        ORIGINAL, validation=validation, source_dir=source_dir, data_dir=data_dir, verify=verify, stream=stream
    )
