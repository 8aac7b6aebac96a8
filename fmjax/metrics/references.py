"""Metrics that a config can name: each factory fixes the reference examples and what can be computed from them once.

A factory takes the data set (for its features, levels and kind) and the examples compared with: validation examples to
choose settings by, test examples to report. All examples are read into memory.
"""

from __future__ import annotations

import numpy as np

from fmjax.checks import NonNegative, Positive, Refusal
from fmjax.keys import generator
from fmjax.metrics import checking, extractors, features, series, two_sample
from fmjax.metrics.frechet import frechet
from fmjax.metrics.metric import DataLike, ExamplesLike, Metric
from fmjax.metrics.two_sample_test import LEAST, c2st


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
    y = reference_rows(data, reference)
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
    y = reference_rows(data, reference)
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
    y = reference_rows(data, reference)
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
    y = reference_rows(data, reference)
    net = extractors.small_network(data, cache_dir=cache_dir)
    facts = {"classifier": f"weights {net.weights[:12]}"}
    if reference.cond is not None:
        accuracy = features.label_accuracy(net, y, reference.cond)
        facts["classifier"] = f"accuracy {accuracy:.3f} on the reference, {facts['classifier']}"
    return Metric("FD-small", _frechet_to(net, y), facts, features.RECIPE["features"] + 1)


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
    y = reference_rows(data, reference)
    net = features.random_features(y.shape[1:], levels=data.levels, seed=seed)
    facts = {"features": f"random network, weights {net.weights[:12]}"}
    return Metric("FD-random", _frechet_to(net, y), facts, features.RECIPE["features"] + 1)


def w2_to(data: DataLike, reference: ExamplesLike, *, count: Positive = 2000, seed: int = 0) -> Metric:
    """Return the exact W2 distance to some examples, of random subsets of one size, see ``w2_exact``.

    Args:
        data: the data set.
        reference: the examples compared with.
        count: the largest number of examples of each side; the time is cubic in it.
        seed: the seed of the subsets.

    Returns:
        The metric ``"W2"``. It falls with the number of samples: compare values of one number only.

    >>> from types import SimpleNamespace
    >>> y = np.arange(8.0).reshape(4, 2)
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> round(w2_to(data, data.train).distance(y + 1), 6) == round(2**0.5, 6)
    True
    """
    y = reference_rows(data, reference)

    def distance(x):
        size, rng = min(count, len(x), len(y)), generator(seed)
        return two_sample.w2_exact(*(np.asarray(a)[rng.permutation(len(a))[:size]] for a in (x, y)))

    return Metric("W2", distance, {"subsets": f"{min(count, len(y))} at most, seed {seed}"})


def c2st_to(data: DataLike, reference: ExamplesLike, *, steps: Positive = 600, seed: int = 0) -> Metric:
    """Return the accuracy of a classifier that separates samples from some examples, see ``c2st``.

    Args:
        data: the data set; of images the pixels are compared.
        reference: the examples compared with, at least 100.
        steps: the number of training steps of the classifier.
        seed: the seed of the classifier.

    Returns:
        The metric ``"C2ST accuracy"``: 0.5 for equal distributions.

    Raises:
        ValueError: for fewer reference examples.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((200, 2))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> c2st_to(data, data.train, steps=40).distance(y + 9)
    1.0
    """
    y = reference_rows(data, reference, least=LEAST)
    distance = lambda x: c2st(x, y, steps=steps, seed=seed).accuracy
    return Metric("C2ST accuracy", distance, {"classifier": f"{steps} steps, seed {seed}; 0.5 is best"}, LEAST)


def channel_w2_to(data: DataLike, reference: ExamplesLike, *, channel: NonNegative | None = None) -> Metric:
    """Return the W2 distance of the values of single channels to some examples, see ``channel_w2``.

    Args:
        data: the data set.
        reference: the examples compared with.
        channel: the number of a channel; ``None`` takes the root mean square over all channels.

    Returns:
        The metric ``"channel W2"``, with the number of the channel if one is chosen.

    Raises:
        ValueError: for a channel that does not exist.

    >>> from types import SimpleNamespace
    >>> y = np.arange(8.0).reshape(4, 2)
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> channel_w2_to(data, data.train, channel=1).distance(y + [0.0, 3.0])
    3.0
    """
    y = reference_rows(data, reference)
    if channel is not None and channel >= y.shape[-1]:
        raise Refusal("channel", channel, f"the data have {y.shape[-1]} channels", "Give a smaller number, or None")
    squared = lambda x: series.channel_w2(x, y) ** 2
    pick = (lambda d: d.mean()) if channel is None else (lambda d: d[channel])
    name = "channel W2" if channel is None else f"channel W2 [{channel}]"
    return Metric(name, lambda x: float(np.sqrt(pick(squared(x)))), {"channels": str(y.shape[-1])})


def autocorrelation_to(data: DataLike, reference: ExamplesLike, *, lags: Positive | None = None) -> Metric:
    """Return the root mean square error of the autocorrelation of series, see ``autocorrelation_error``.

    Args:
        data: a data set of series.
        reference: the series compared with.
        lags: the largest lag; ``None`` takes a quarter of the length.

    Returns:
        The metric ``"autocorrelation error"``.

    Raises:
        ValueError: for data that are not series, and for lags of the length or more.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((50, 8, 2))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="series", levels=None, classes=0)
    >>> autocorrelation_to(data, data.train).distance(y[::-1]) < 1e-12
    True
    """
    if data.kind != "series":
        raise Refusal("kind", data.kind, "an autocorrelation is taken of series", "Use channel_w2_to")
    y = reference_rows(data, reference)
    lags = max(1, y.shape[1] // 4) if lags is None else lags
    series.autocorrelation(y, lags=lags)  # refuses lags that do not fit
    distance = lambda x: series.autocorrelation_error(x, y, lags=lags)
    return Metric("autocorrelation error", distance, {"lags": str(lags)})


def reference_rows(data: DataLike, reference: ExamplesLike, *, least: int = 2) -> np.ndarray:
    """Return the reference examples in memory, after a check that they are examples of the data set, and enough.

    Args:
        data: the data set.
        reference: the examples.
        least: the least number of examples.

    Returns:
        The examples ``[m, ...]``, float64.

    Raises:
        ValueError: for too few examples, another shape, and values that are not finite.
    """
    y = checking.pair(reference.x[:], data.train.x[:2], ("reference.x", "data.train.x"))[0]
    if len(y) < least:
        raise Refusal("reference", len(y), f"the measure needs {least} examples or more", "Enlarge the split")
    return y


def _frechet_to(net: features.Features, y: np.ndarray):
    embedded = features.embed(net, y)
    return lambda x: frechet(features.embed(net, checking.pair(x, y, ("samples", "reference"))[0]), embedded)
