"""Fashion-MNIST (arXiv 1708.07747): 60,000 + 10,000 articles of clothing, 28x28."""

from __future__ import annotations

from fmjax.data import images
from fmjax.data.dataset import Dataset
from fmjax.data.mnist import ORIGINAL as MNIST

ORIGINAL = MNIST._replace(name="fashion_mnist", registered="url_checksums/fashion_mnist.txt")


def fashion_mnist(
    *,
    validation: int = 5000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    verify: bool = True,
    stream: bool = False,
) -> Dataset:
    """The articles ``[n, 28, 28, 1]`` with labels 0..9, the official test split held out; see ``images.load``.

    The labels: t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot.
    """
    return images.load(
        ORIGINAL, validation=validation, source_dir=source_dir, data_dir=data_dir, verify=verify, stream=stream
    )
