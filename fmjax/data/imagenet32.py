"""ImageNet at 32x32 for whoever has its archives: 1,281,167 + 50,000 photographs, labelled or not."""

from __future__ import annotations

from fmjax.data import images
from fmjax.data.dataset import Dataset
from fmjax.data.imagenet64 import original


def imagenet32(
    *,
    validation: int = 5000,
    source_dir: str | None = None,
    data_dir: str | None = None,
    archive: str = "resized",
    verify: bool = True,
    stream: bool = True,
) -> Dataset:
    """The photographs ``[n, 32, 32, 3]``, the validation split held out, read from disk; see ``imagenet64``.

    ``archive="resized"``: ``Imagenet32_train_npz.zip`` and ``Imagenet32_val_npz.zip`` (3.7 GB), with labels 0..999.
    ``"downsampled"``: ``train_32x32.tar`` and ``valid_32x32.tar`` (4.3 GB), without. The records take 4 GB.
    """
    return images.load(
        original(32, archive),
        validation=validation,
        source_dir=source_dir,
        data_dir=data_dir,
        verify=verify,
        stream=stream,
    )
