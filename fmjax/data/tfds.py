"""Any data set of TensorFlow Datasets with images or arrays, read without TensorFlow."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.checks import Refusal, Seed, check_hints
from fmjax.data import preparation, table
from fmjax.data.dataset import Dataset, Part
from fmjax.data.decoding import Channels, Size
from fmjax.storage.files import local_path
from fmjax.storage.untrusted import one_line

NAME = re.compile(r"[a-z]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", re.ASCII)


def tfds(
    *,
    dataset: str,
    x: str | None = None,
    y: str | None = None,
    size: Size | None = None,
    channels: Channels | None = None,
    validation: Part = 0.1,
    test: Part = 0.1,
    seed: Seed = 0,
    standardise: bool = False,
    stream: bool = False,
    data_dir: str | None = None,
) -> Dataset:
    """Load a data set of TensorFlow Datasets: its images or float arrays, and its labels.

    TensorFlow is not needed to read a set that is stored as ArrayRecord files. A set that is not there yet is
    downloaded and prepared; some sets need TensorFlow for that, once. Splits that the set does not have are drawn from
    its training split at random.

    Args:
        dataset: the name, as ``"cifar100"``, ``"name/config"`` or ``"name:1.0.0"``.
        x: the feature of the examples; ``None`` takes the only images or, without images, the only float array.
        y: the feature of the labels or other conditions; ``None`` takes the only class label, if there is one.
        size: height and width of images; see ``decoding.fit_image``. ``None`` keeps their size.
        channels: 1 for grey, 3 for colours; ``None`` keeps grey images, and makes all others colours.
        validation: the fraction of the training split for validation, where there is no such split.
        test: the fraction of the training split for testing, where there is no such split.
        seed: the seed of the splits.
        standardise: see ``arrays``.
        stream: whether the examples stay on disk and are read batch by batch.
        data_dir: the folder of TFDS; ``None`` takes ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.

    Returns:
        The data set.

    Raises:
        ValueError: for a name that TFDS does not have, or a set without such features.
        RuntimeError: for a set that cannot be prepared here, or whose files cannot be read.

    >>> tfds(dataset="https://example.org/x")
    Traceback (most recent call last):
    fmjax.checks.Refusal: dataset='https://example.org/x': not a name of TFDS. Give a name, such as 'cifar100'.
    """
    check_hints(tfds, {"size": size, "channels": channels, "validation": validation, "test": test, "seed": seed})
    if not NAME.fullmatch(dataset):
        raise Refusal("dataset", dataset, "not a name of TFDS", "Give a name, such as 'cifar100'")
    builder = _prepared(dataset, None if data_dir is None else str(local_path("data_dir", data_dir)))
    features = {name: _feature(feature) for name, feature in builder.info.features.items()}
    x, y = table.choose_columns(features, x, y)
    shape, pixels, decode = table.examples_of(features[x], size=size, channels=channels)
    parts = {}
    try:
        for split in builder.info.splits:
            parts[split] = _columns(builder, split, x, y, features, shape, pixels, decode)
    except Exception as error:  # what TFDS and ArrayRecord raise for torn and missing files has no common type
        raise preparation.unreadable(builder.data_path, error) from error
    return table.from_columns(
        parts, names=features[y].names if y else (), validation=validation, test=test, seed=seed,
        standardise=standardise, stream=stream, name=builder.name,
    )  # fmt: skip


def _prepared(name: str, data_dir: str | None) -> Any:
    """Return the builder of a set whose records exist."""
    import tensorflow_datasets as library

    try:
        builder = library.builder(name, data_dir=data_dir)
        if not Path(builder.data_path).exists():
            builder = library.builder(name, data_dir=data_dir, file_format="array_record")
    except (library.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        wrong = f"TFDS cannot give it ({one_line(error, 120)})"
        raise Refusal("dataset", name, wrong, "Give a registered name, or data_dir") from error
    if not Path(builder.data_path).exists():
        try:
            with contextlib.redirect_stdout(sys.stderr):  # TFDS prints its progress
                builder.download_and_prepare()
        except Exception as error:  # downloads, archives and TensorFlow fail in many ways
            way = f"Prepare it once where this works: tfds build {name} --file_format=array_record"
            wrong = f"it cannot be prepared here ({type(error).__name__}: {one_line(error, 80)})"
            raise RuntimeError(f"dataset={name}: {wrong}. {way}.") from error
    stored = builder.info.file_format
    if stored is not None and stored.value != "array_record":
        way = f"tfds build {name} --file_format=array_record"
        raise RuntimeError(f"dataset={name}: it is stored as {stored.value}, which needs TensorFlow. Run {way}.")
    return builder


def _feature(feature: Any) -> table.Feature:
    from tensorflow_datasets import features as kinds

    if isinstance(feature, kinds.ClassLabel):
        return table.Feature("label", (), np.int32, tuple(feature.names or ()))
    if type(feature) is kinds.Image:
        return table.Feature("image", feature.shape, np.uint8)
    if type(feature) in (kinds.Tensor, kinds.Scalar) and np.dtype(feature.np_dtype).kind in "biuf":
        return table.Feature("array", feature.shape, feature.np_dtype)
    return table.Feature("")


def _columns(builder, split, x, y, features, shape, pixels, decode) -> tuple[table.TableRows, np.ndarray | None]:
    """Return the examples of a split, on disk, and its conditions; image files stay as they are until they are read."""
    from tensorflow_datasets import decode as decoders

    raw = {name: decoders.SkipDecoding() for name, feature in features.items() if feature.kind == "image"}
    source = builder.as_data_source(split=split, decoders=raw or None)
    fetch = lambda rows: [decode(record[x]) for record in source.__getitems__(rows)]
    if not y:
        return table.TableRows(fetch, np.arange(len(source)), shape, pixels), None
    starts = range(0, len(source), 4096)
    rows = [list(range(start, min(start + 4096, len(source)))) for start in starts]
    values = np.array([record[y] for part in rows for record in source.__getitems__(part)])
    values = values.astype(np.int32) if values.dtype.kind in "iu" else values
    return table.TableRows(fetch, np.arange(len(source)), shape, pixels), values
