"""Metrics that a config can name: each factory fixes the reference examples and what can be computed from them once.

A factory takes the data set (for its features, levels and kind) and the examples compared with: validation examples to
choose settings by, test examples to report. All examples are read into memory.
"""

from __future__ import annotations

import numpy as np

from fmjax.checks import Positive
from fmjax.metrics import checking, features, two_sample
from fmjax.metrics.frechet import frechet
from fmjax.metrics.metric import DataLike, ExamplesLike, Metric
from fmjax.storage import files


def sliced_w2_to(data: DataLike, reference: ExamplesLike, *, directions: Positive = 512, seed: int = 0) -> Metric:
    """Return the sliced W2 distance to some examples, see ``sliced_w2``.

    Args:
        data: the data set.
        reference: the examples compared with.
        directions: the number of random directions.
        seed: the seed of the directions.

    Returns:
        The metric ``"sliced W2"``.

    >>> from types import SimpleNamespace
    >>> y = np.arange(8.0).reshape(4, 2)
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> metric = sliced_w2_to(data, data.train, directions=16)
    >>> metric.name, metric.distance(y[::-1])
    ('sliced W2', 0.0)
    """
    y = _reference(data, reference)
    distance = lambda x: two_sample.sliced_w2(x, y, directions=directions, seed=seed)
    return Metric("sliced W2", distance, {"directions": f"{directions}, seed {seed}"})


def energy_to(data: DataLike, reference: ExamplesLike) -> Metric:
    """Return the energy distance to some examples, see ``energy_distance``.

    Args:
        data: the data set.
        reference: the examples compared with.

    Returns:
        The metric ``"energy distance"``.

    >>> from types import SimpleNamespace
    >>> y = np.arange(8.0).reshape(4, 2)
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> energy_to(data, data.train).distance(y + 100) > 250
    True
    """
    y = _reference(data, reference)
    within = two_sample.mean_distance(y)  # quadratic in the reference, and the same for all samples
    return Metric("energy distance", lambda x: two_sample.energy_distance(x, y, within=within), {"kind": "unbiased"})


def mmd_to(data: DataLike, reference: ExamplesLike, *, bandwidth: float | None = None) -> Metric:
    """Return the squared maximum mean discrepancy to some examples, see ``mmd``.

    Args:
        data: the data set.
        reference: the examples compared with.
        bandwidth: the standard deviation of the kernel; ``None`` takes the median distance of the reference examples.

    Returns:
        The metric ``"MMD^2"``.

    >>> from types import SimpleNamespace
    >>> y = np.arange(8.0).reshape(4, 2)
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> mmd_to(data, data.train, bandwidth=1.0).distance(y + 100) > 0
    True
    """
    y = _reference(data, reference)
    width = two_sample.median_distance(y) if bandwidth is None else bandwidth
    within = two_sample.mean_kernel(y, bandwidth=width)
    distance = lambda x: two_sample.mmd(x, y, bandwidth=width, within=within)
    return Metric("MMD^2", distance, {"bandwidth": f"{width:.4g}"})


def fd_small_to(data: DataLike, reference: ExamplesLike, *, cache_dir: str | None = None) -> Metric:
    """Return FD-small to some images: the Frechet distance in features of a small classifier, see ``fd_small``.

    The classifier is trained on the training split, or read from the cache.

    Args:
        data: a data set of images with labels of two classes or more.
        reference: the images compared with.
        cache_dir: the folder of trained classifiers; ``None`` takes ``features`` in ``storage.files.cache_folder()``.

    Returns:
        The metric ``"FD-small"``. Its facts are the classifier and, where the reference has labels, its accuracy there.

    Raises:
        ValueError: for data that are not images, or that have fewer than two classes.

    >>> from types import SimpleNamespace
    >>> split = SimpleNamespace(x=np.zeros((4, 8, 8, 1)), cond=None)
    >>> fd_small_to(SimpleNamespace(train=split, kind="image", levels=None, classes=0), split)
    Traceback (most recent call last):
    ValueError: classes=0: FD-small trains a classifier, which needs two classes or more. Use fd_random_to.
    """
    if data.kind != "image":
        raise ValueError(f"kind={data.kind!r}: FD-small is a distance of images. Use sliced_w2_to or energy_to.")
    if data.classes < 2:
        raise ValueError(
            f"classes={data.classes}: FD-small trains a classifier, which needs two classes or more. Use fd_random_to."
        )
    y = _reference(data, reference)
    folder = files.cache_folder() / "features" if cache_dir is None else cache_dir
    net = features.small_classifier(data.train.x[:], data.train.cond, cache_dir=folder, levels=data.levels)
    facts = {"classifier": f"weights {net.weights[:12]}"}
    if reference.cond is not None:
        accuracy = features.label_accuracy(net, y, reference.cond)
        facts["classifier"] = f"accuracy {accuracy:.3f} on the reference, {facts['classifier']}"
    return Metric("FD-small", _frechet_to(net, y), facts)


def fd_random_to(data: DataLike, reference: ExamplesLike, *, seed: int = 0) -> Metric:
    """Return the Frechet distance to some images in features of a random network, which needs no labels.

    Args:
        data: a data set of images.
        reference: the images compared with.
        seed: the seed of the network.

    Returns:
        The metric ``"FD-random"``, see ``random_features``.

    Raises:
        ValueError: for data that are not images.

    >>> from types import SimpleNamespace
    >>> split = SimpleNamespace(x=np.random.default_rng(0).uniform(-1, 1, (40, 8, 8, 1)), cond=None)
    >>> metric = fd_random_to(SimpleNamespace(train=split, kind="image", levels=None, classes=0), split)
    >>> metric.name, metric.distance(split.x) < 1e-6 < metric.distance(split.x / 2)
    ('FD-random', True)
    """
    if data.kind != "image":
        raise ValueError(f"kind={data.kind!r}: FD-random is a distance of images. Use sliced_w2_to or energy_to.")
    y = _reference(data, reference)
    net = features.random_features(y.shape[1:], levels=data.levels, seed=seed)
    return Metric("FD-random", _frechet_to(net, y), {"features": f"random network, weights {net.weights[:12]}"})


def _frechet_to(net: features.Features, y: np.ndarray):
    embed = lambda x: net.features(features.quantise(x, net.levels) if net.levels else x)
    embedded = embed(y)
    return lambda x: frechet(embed(checking.pair(x, y, ("samples", "reference"))[0]), embedded)


def _reference(data: DataLike, reference: ExamplesLike) -> np.ndarray:
    """Return the reference examples in memory, after a check that they are examples of this data set."""
    return checking.pair(reference.x[:], data.train.x[:2], ("reference.x", "data.train.x"))[0]
