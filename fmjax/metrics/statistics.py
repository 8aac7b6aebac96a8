"""Reference statistics of a Frechet distance: kept by data set, split, preprocessing and digest, or published."""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float

from fmjax.checks import Refusal
from fmjax.metrics.features import Features, embed
from fmjax.metrics.frechet import moments
from fmjax.metrics.metric import DataLike, ExamplesLike
from fmjax.metrics.references import reference_rows
from fmjax.storage import files, untrusted

SPLITS = ("train", "validation", "test")


def reference_moments(
    net: Features, data: DataLike, reference: ExamplesLike, *, cache_dir: str | None = None
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"], int]:
    """Return the mean and the covariance of the features of reference examples, from a file where there is one.

    The file is ``<data>-<split>-<extractor and preprocessing>-<digest>.npz``; the digest is of the examples, the
    weights and the preprocessing, so that other data or weights have another file. A damaged file is named in a warning
    and replaced.

    Args:
        net: the features.
        data: the data set.
        reference: the examples.
        cache_dir: the folder; ``None`` takes ``statistics`` in ``storage.files.cache_folder()`` for slow extractors,
            and computes the statistics of others each time.

    Returns:
        Mean ``[d]``, covariance ``[d, d]``, and the number of examples.

    Raises:
        ValueError: for examples fewer than features, whose covariance is singular.
    """
    y = reference_rows(data, reference)
    if cache_dir is None and not net.slow:
        return _moments(net, y)
    folder = files.cache_folder() / "statistics" if cache_dir is None else Path(cache_dir)
    digest = hashlib.sha256(f"{net.name} {net.weights} {net.levels} {y.shape}".encode() + y.tobytes()).hexdigest()
    split = next((s for s in SPLITS if getattr(data, s, None) is reference), "reference")
    words = [re.sub(r"[^A-Za-z0-9]+", "_", w) or "data" for w in (getattr(data, "name", ""), split, net.name)]
    file = folder / f"{'-'.join(words)}-{digest[:16]}.npz"
    if file.exists():
        try:
            return _read(file, digest)
        except (ValueError, OSError, KeyError) as error:
            warnings.warn(f"reference statistics {file} are damaged ({error}): computed again", stacklevel=2)
    mean, covariance, count = _moments(net, y)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        seal = np.frombuffer(_seal(digest, mean, covariance, count), np.uint8)
        files.write_npz(file, {"mu": mean, "sigma": covariance, "count": np.int64(count), "sha256": seal})
    except OSError as error:
        raise Refusal("cache_dir", str(folder), str(error), "Give a folder that can be written") from error
    return mean, covariance, count


def read_statistics(path: str) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Read published reference statistics: a mean ``mu`` and a covariance ``sigma``.

    Args:
        path: an ``.npz`` file of numbers, such as EDM's ``cifar10-32x32.npz`` and clean-fid's.

    Returns:
        Mean ``[d]`` and covariance ``[d, d]``.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    try:
        with untrusted.open_file(path) as file:
            arrays = untrusted.npz_arrays(file, untrusted.size_of(file))
    except (ValueError, OSError) as error:
        wrong = untrusted.one_line(getattr(error, "strerror", None) or error, 120)
        raise Refusal("statistics", path, wrong, "Give an .npz file with mu and sigma") from error
    shapes = {name: arrays[name].shape if name in arrays else None for name in ("mu", "sigma")}
    d = shapes["mu"][0] if shapes["mu"] and len(shapes["mu"]) == 1 else -1
    if shapes["sigma"] != (d, d):
        raise Refusal("statistics", path, f"its arrays have shapes {shapes}", "Give mu [d] and sigma [d, d]")
    return arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)


def _moments(net: Features, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    features = embed(net, y)
    count, d = features.shape
    if count <= d:
        wrong = f"a covariance of {d} features needs {d + 1} examples or more"
        raise Refusal("reference", count, wrong, "Enlarge the split, or take an extractor of fewer features")
    return *moments(features), count


def _seal(digest: str, mean: np.ndarray, covariance: np.ndarray, count: int) -> bytes:
    return hashlib.sha256(f"{digest} {count}".encode() + mean.tobytes() + covariance.tobytes()).digest()


def _read(file: Path, digest: str) -> tuple[np.ndarray, np.ndarray, int]:
    with untrusted.open_file(file) as f:
        arrays = untrusted.npz_arrays(f, untrusted.size_of(f))
    mean, covariance, count = arrays["mu"], arrays["sigma"], int(arrays["count"])
    if arrays["sha256"].tobytes() != _seal(digest, mean, covariance, count):
        raise ValueError("its numbers do not have the digest that it states")
    return mean, covariance, count
