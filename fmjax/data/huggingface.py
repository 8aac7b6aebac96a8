"""A data set in the formats of Hugging Face: a local folder of Arrow or Parquet files with images or arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fmjax.checks import Seed, check_hints
from fmjax.data import table
from fmjax.data.dataset import Dataset, Part
from fmjax.data.decoding import Channels, Size
from fmjax.storage import untrusted
from fmjax.storage.files import local_path

SPLIT_OF = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


def huggingface(
    *,
    path: str,
    x: str | None = None,
    y: str | None = None,
    size: Size | None = None,
    channels: Channels | None = None,
    validation: Part = 0.1,
    test: Part = 0.1,
    seed: Seed = 0,
    standardise: bool = False,
    stream: bool = False,
) -> Dataset:
    """Load a data set from a local folder that the package ``datasets`` saved (Arrow), or of Parquet files.

    ``pip install 'fmjax[huggingface]'`` installs the package. Nothing is downloaded, and no code in the folder is run.
    The splits of Parquet and Arrow files follow from their names (``train-00000.parquet``, ``test/0.parquet``). Splits
    that do not exist are drawn from the training split at random.

    Args:
        path: the folder.
        x: the column of the examples; ``None`` takes the only images or, without images, the only float arrays.
        y: the column of the labels or other conditions; ``None`` takes the only class label, if there is one.
        size: height and width of images; see ``decoding.fit_image``. ``None`` takes the size of the first image.
        channels: 1 for grey, 3 for colours; ``None`` takes 3.
        validation: the fraction of the training split for validation, where there is no such split.
        test: the fraction of the training split for testing, where there is no such split.
        seed: the seed of the splits.
        standardise: see ``arrays``.
        stream: whether the examples stay on disk and are read batch by batch.

    Returns:
        The data set.

    Raises:
        RuntimeError: without the package ``datasets``.
        FileNotFoundError: for a missing folder.
        ValueError: for a folder of another form, or one without such columns.

    >>> huggingface(path="/nowhere")
    Traceback (most recent call last):
    FileNotFoundError: path=/nowhere: there is no such folder. Give a folder of Arrow or Parquet files.
    """
    check_hints(huggingface, {"size": size, "channels": channels, "validation": validation, "test": test, "seed": seed})
    place = local_path("path", path)
    where = f"path={untrusted.short_path(place)}"
    if not place.is_dir():
        raise FileNotFoundError(f"{where}: there is no such folder. Give a folder of Arrow or Parquet files.")
    loaded = _load(place, where)
    first = next(iter(loaded.values()))
    features = {name: _feature(feature, first, name) for name, feature in first.features.items()}
    x, y = table.choose_columns(features, x, y)
    shape, pixels, decode = table.examples_of(features[x], size=size, channels=channels)
    parts = {}
    try:
        for split, rows in loaded.items():
            parts[split] = _columns(rows, x, y, features, shape, pixels, decode)
    except (OSError, KeyError, TypeError) as error:  # what Arrow raises for torn files and for other columns
        line = untrusted.one_line(error, 100) or type(error).__name__
        raise ValueError(f"{where}: it cannot be read ({line}). Save it again with datasets.") from error
    return table.from_columns(
        parts, names=features[y].names if y else (), validation=validation, test=test, seed=seed,
        standardise=standardise, stream=stream, name=place.name,
    )  # fmt: skip


def _load(place: Path, where: str) -> dict[str, Any]:
    """Return the tables by split."""
    try:
        import datasets
    except ImportError as error:
        way = "Install it: pip install 'fmjax[huggingface]'"
        raise RuntimeError(f"data=huggingface: it needs the package datasets. {way}.") from error
    try:
        if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
            loaded = datasets.load_from_disk(str(place))
            return {SPLIT_OF.get(k, k): v for k, v in loaded.items()} if hasattr(loaded, "items") else {"train": loaded}
        for ending, read in ((".parquet", datasets.Dataset.from_parquet), (".arrow", datasets.Dataset.from_file)):
            groups = _by_split(place, ending)
            if groups:
                return {k: datasets.concatenate_datasets([read(str(f)) for f in v]) for k, v in groups.items()}
    except Exception as error:  # Arrow and datasets raise many kinds for damaged files
        line = untrusted.one_line(error, 100) or type(error).__name__
        raise ValueError(f"{where}: it cannot be read ({line}). Save it again with datasets.") from error
    raise ValueError(f"{where}: it holds no .parquet and no .arrow file. Give a folder of Arrow or Parquet files.")


def _by_split(place: Path, ending: str) -> dict[str, list[Path]]:
    """Return the files of a folder by split, which the beginning of a file's or of its folder's name says."""
    groups: dict[str, list[Path]] = {}
    for file in sorted(place.rglob(f"*{ending}")):
        heads = [part.replace(".", "-").split("-")[0] for part in reversed(file.relative_to(place).parts)]
        split = next((SPLIT_OF[head] for head in heads if head in SPLIT_OF), "train")
        groups.setdefault(split, []).append(file)
    return groups


def _feature(feature: Any, rows: Any, name: str) -> table.Feature:
    """Return what a column holds; shapes that the table does not state are those in its first row."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return table.Feature("label", (), np.int32, tuple(feature.names))
    if isinstance(feature, datasets.Image):
        image = rows[0][name]
        return table.Feature("image", (image.height, image.width, 3), np.uint8)
    try:
        value = np.asarray(rows.with_format("numpy")[0][name])
    except (TypeError, ValueError):
        return table.Feature("")
    return table.Feature("array", value.shape, value.dtype) if value.dtype.kind in "biuf" else table.Feature("")


def _columns(rows, x, y, features, shape, pixels, decode) -> tuple[table.TableRows, np.ndarray | None]:
    """Return the examples of a split, on disk, and its conditions."""
    import datasets

    if features[x].kind == "image":
        stored = rows.select_columns([x]).cast_column(x, datasets.Image(decode=False))
        value = lambda entry: decode(entry["bytes"] if entry["bytes"] is not None else _content(entry["path"]))
    else:
        stored, value = rows.select_columns([x]).with_format("numpy"), lambda entry: decode(np.asarray(entry))
    fetch = lambda index: [value(entry) for entry in stored[index][x]] if index else []
    values = None if y is None else np.asarray(rows.select_columns([y]).with_format("numpy")[:][y])
    if values is not None and values.dtype.kind in "iu":
        values = values.astype(np.int32)
    return table.TableRows(fetch, np.arange(len(rows)), shape, pixels), values


def _content(path: str) -> bytes:
    with untrusted.open_file(path) as file:
        return file.read()
