"""Metrics by nearest neighbours that a config can name: the support of the data, and repetition of training data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np

from fmjax.checks import NonNegative, Positive, Range, Refusal
from fmjax.metrics import extractors, neighbours
from fmjax.metrics.extractors import Extractor, checked_features, feature_facts
from fmjax.metrics.features import Features, embed, quantise
from fmjax.metrics.metric import DataLike, ExamplesLike, Metric
from fmjax.metrics.references import reference_rows

MANIFOLD = 100  # least number of samples and of examples


def precision_to(
    data: DataLike, reference: ExamplesLike, *, features: Extractor = extractors.random_network, k: Positive = 3
) -> Metric:
    """Return the fraction of samples outside the support of some examples, see ``precision_recall``.

    Args:
        data: the data set.
        reference: the examples compared with, at least 100.
        features: the extractor.
        k: the number of the neighbour that a ball reaches to.

    Returns:
        The metric ``"1 - precision[...]"``: the smaller the better, as all metrics.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((100, 2))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> precision_to(data, data.train, features=extractors.raw).distance(y + 99)
    1.0
    """
    measure = lambda real, x: 1 - neighbours.precision_recall(real, x, k=k)[0]
    return _neighbours("1 - precision", data, reference, features, k, measure)


def recall_to(
    data: DataLike, reference: ExamplesLike, *, features: Extractor = extractors.random_network, k: Positive = 3
) -> Metric:
    """Return the fraction of some examples outside the support of the samples, see ``precision_recall``.

    Args:
        data: the data set.
        reference: the examples compared with, at least 100.
        features: the extractor.
        k: the number of the neighbour that a ball reaches to.

    Returns:
        The metric ``"1 - recall[...]"``.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((100, 2))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> recall_to(data, data.train, features=extractors.raw).distance(y + 99)
    1.0
    """
    measure = lambda real, x: 1 - neighbours.precision_recall(real, x, k=k)[1]
    return _neighbours("1 - recall", data, reference, features, k, measure)


def density_to(
    data: DataLike, reference: ExamplesLike, *, features: Extractor = extractors.random_network, k: Positive = 5
) -> Metric:
    """Return how far the density of samples is from 1, the density of fresh examples, see ``density_coverage``.

    Args:
        data: the data set.
        reference: the examples compared with, at least 100.
        features: the extractor.
        k: the number of the neighbour that a ball reaches to.

    Returns:
        The metric ``"|1 - density|[...]"``.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((100, 2))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> density_to(data, data.train, features=extractors.raw).distance(y + 99)
    1.0
    """
    measure = lambda real, x: abs(1 - neighbours.density_coverage(real, x, k=k)[0])
    return _neighbours("|1 - density|", data, reference, features, k, measure)


def coverage_to(
    data: DataLike, reference: ExamplesLike, *, features: Extractor = extractors.random_network, k: Positive = 5
) -> Metric:
    """Return the fraction of some examples without a sample near them, see ``density_coverage``.

    Args:
        data: the data set.
        reference: the examples compared with, at least 100.
        features: the extractor.
        k: the number of the neighbour that a ball reaches to.

    Returns:
        The metric ``"1 - coverage[...]"``.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((100, 2))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> coverage_to(data, data.train, features=extractors.raw).distance(y + 99)
    1.0
    """
    measure = lambda real, x: 1 - neighbours.density_coverage(real, x, k=k)[1]
    return _neighbours("1 - coverage", data, reference, features, k, measure)


def memorised_to(
    data: DataLike,
    reference: ExamplesLike,
    *,
    features: Extractor = extractors.raw,
    quantile: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.05,
    shifts: NonNegative | None = None,
) -> Metric:
    """Return the fraction of samples that repeat training examples, see ``memorised``.

    Args:
        data: the data set; samples are compared with all of its training examples.
        reference: held-out examples, which say how near fresh examples are; at least ``1 / quantile``.
        features: the extractor; by default the examples themselves.
        quantile: the quantile of the distances of held-out examples below which a sample is a repetition.
        shifts: the number of pixels by which an image may be shifted against a training image; ``None`` takes 1 for
            images without an extractor, else 0.

    Returns:
        The metric ``"memorised[...]"``: ``quantile`` for fresh samples, 1 for copies of training examples (so that the
        row of training data has 1).

    Raises:
        ValueError: for too few reference examples, and for shifts of features.

    >>> from types import SimpleNamespace
    >>> x = np.random.default_rng(0).standard_normal((300, 3))
    >>> train, test = SimpleNamespace(x=x[:100], cond=None), SimpleNamespace(x=x[100:], cond=None)
    >>> data = SimpleNamespace(train=train, kind="vector", levels=None, classes=0)
    >>> memorised_to(data, test).distance(x[:50])
    1.0
    """
    net = checked_features(features, data)
    pixels = data.kind == "image" and net.name == "raw"
    shifts = int(pixels) if shifts is None else shifts
    if shifts and not pixels:
        raise Refusal("shifts", shifts, "features and data without pixels cannot be shifted", "Give 0")
    rounded = lambda x: quantise(x, net.levels) if net.levels else np.asarray(x)
    rows = rounded if pixels else lambda x: embed(net, x)
    train, held_out = rows(np.asarray(data.train.x[:])), rows(reference_rows(data, reference))
    measure = lambda x: neighbours.memorised(rows(x), train, held_out, quantile=quantile, shifts=shifts).fraction
    if len(held_out) * quantile < 1:
        wrong = f"a quantile of {quantile:g} needs {int(np.ceil(1 / quantile))} examples"
        raise Refusal("reference", len(held_out), wrong, "Enlarge the split")
    facts = feature_facts(net) | {"fresh samples": f"{quantile:g}", "shifts": f"{shifts} pixels"}
    return Metric(f"memorised[{net.name}]", measure, facts)


def _neighbours(
    name: str,
    data: DataLike,
    reference: ExamplesLike,
    features: Extractor,
    k: int,
    measure: Callable[[np.ndarray, np.ndarray], float],
) -> Metric:
    """Return a metric of neighbours; the reference is cut at random to the size of the samples."""
    net: Features = checked_features(features, data)
    real = embed(net, reference_rows(data, reference, least=max(MANIFOLD, k + 1)))
    order = np.random.default_rng(0).permutation(len(real))
    distance = lambda x: measure(real[order[: len(x)]], embed(net, x))
    facts = feature_facts(net) | {"neighbour": f"k = {k}", "reference": f"as many as samples, {len(real)} at most"}
    return Metric(f"{name}[{net.name}]", distance, facts, max(MANIFOLD, k + 1))
