"""Metrics in a feature space that a config can name: ``{"name": "frechet_to", "features": "random_network"}``.

``features`` is a spec: an extractor of ``fmjax.metrics.extractors`` with or without options, or a factory outside the
package.
Reference features of a slow extractor are summed up once and kept in a file, see ``reference_moments``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np

from fmjax.checks import Positive, Range, Refusal
from fmjax.metrics import extractors, scores
from fmjax.metrics.extractors import FID_WEIGHTS, Extractor, checked_features, feature_facts
from fmjax.metrics.features import embed
from fmjax.metrics.frechet import frechet_distance, moments
from fmjax.metrics.metric import DataLike, ExamplesLike, Metric
from fmjax.metrics.references import reference_rows
from fmjax.metrics.statistics import read_statistics, reference_moments
from fmjax.storage import files

BIAS = "upwards, by about c / (number of samples); frechet_infinity_to extrapolates"


def frechet_to(
    data: DataLike,
    reference: ExamplesLike,
    *,
    features: Extractor = extractors.random_network,
    statistics: str | None = None,
    cache_dir: str | None = None,
) -> Metric:
    """Return the Frechet distance to some examples in a feature space: FID with the Inception network of 2015.

    Args:
        data: the data set.
        reference: the examples compared with.
        features: the extractor.
        statistics: a file of published reference statistics in place of ``reference``: ``.npz`` with ``mu`` and
            ``sigma``, as clean-fid and EDM publish them. They must be of the same network and resize.
        cache_dir: the folder of reference statistics; ``None`` takes ``statistics`` in ``storage.files.cache_folder()``
            for slow extractors, and no folder for others.

    Returns:
        The metric: ``"FID[legacy]"`` or ``"FID[clean]"`` with the public weights of the Inception network, otherwise
        ``"FD[...]"`` with the name of the extractor.

    Raises:
        ValueError: for too few reference examples (more than there are features are needed), and damaged files.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((50, 2))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> metric = frechet_to(data, data.train)
    >>> metric.name, metric.distance(y) < 1e-6 < metric.distance(y / 2)
    ('FD[random]', True)
    """
    net = checked_features(features, data)
    facts = feature_facts(net) | {"bias": BIAS}
    if statistics is None:
        mean, covariance, count = reference_moments(net, data, reference, cache_dir=cache_dir)
        facts["reference"] = f"{count} examples"
    else:
        mean, covariance = read_statistics(statistics)
        facts["reference"] = f"{Path(statistics).name}, sha256 {files.file_digest(statistics)[:12]}"
    name = f"FID[{net.name.removeprefix('inception-')}]" if net.weights == FID_WEIGHTS else f"FD[{net.name}]"

    def distance(x):
        sample_mean, sample_covariance = moments(embed(net, x))
        return frechet_distance(sample_mean, sample_covariance, mean, covariance)

    return Metric(name, distance, facts, len(mean) + 1)


def frechet_infinity_to(
    data: DataLike,
    reference: ExamplesLike,
    *,
    features: Extractor = extractors.random_network,
    counts: Annotated[int, Range(low=3)] = 8,
    seed: int = 0,
) -> Metric:
    """Return the Frechet distance to some examples, extrapolated to infinitely many samples (``frechet_infinity``).

    Args:
        data: the data set.
        reference: the examples compared with.
        features: the extractor.
        counts: the number of subsets of samples.
        seed: the seed of the subsets.

    Returns:
        The metric ``"FD_inf[...]"`` with the name of the extractor.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((200, 2))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> frechet_infinity_to(data, data.train).least
    161
    """
    net = checked_features(features, data)
    b = embed(net, reference_rows(data, reference))
    distance = lambda x: scores.frechet_infinity(embed(net, x), b, counts=counts, seed=seed)[0]
    facts = feature_facts(net) | {"fit": f"{counts} subsets, seed {seed}", "reference": f"{len(b)} examples"}
    return Metric(f"FD_inf[{net.name}]", distance, facts, 5 * b.shape[1] + 1)


def kid_to(
    data: DataLike,
    reference: ExamplesLike,
    *,
    features: Extractor = extractors.random_network,
    subsets: Positive = 100,
    size: Annotated[int, Range(low=3)] = 1000,
    seed: int = 0,
) -> Metric:
    """Return the kernel distance KID to some examples, see ``kid``.

    Features of other extractors than Inception are divided by one number first, so that the reference has a mean square
    of 1; the cubic kernel needs this scale.

    Args:
        data: the data set.
        reference: the examples compared with, at least ``size``.
        features: the extractor.
        subsets: the number of random subsets.
        size: the number of samples in a subset.
        seed: the seed of the subsets.

    Returns:
        The metric ``"KID[...]"`` with the name of the extractor.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((50, 2))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> metric = kid_to(data, data.train, size=40, subsets=5)
    >>> metric.name, metric.distance(y / 3) > metric.distance(y)
    ('KID[random]', True)
    """
    net = checked_features(features, data)
    b = embed(net, reference_rows(data, reference, least=size))
    scale = 1.0 if net.name.startswith("inception") else float(np.sqrt((b**2).mean())) or 1.0
    distance = lambda x: scores.kid(embed(net, x) / scale, b / scale, subsets=subsets, size=size, seed=seed)[0]
    facts = feature_facts(net) | {"subsets": f"{subsets} of {size}, seed {seed}", "scale": f"{scale:.4g}"}
    return Metric(f"KID[{net.name}]", distance, facts, size)


def inception_score_to(
    data: DataLike,
    reference: ExamplesLike,
    *,
    features: Extractor = extractors.small_network,
    splits: Positive = 10,
    seed: int = 0,
) -> Metric:
    """Return how far the Inception score of samples lies below the score of some examples, see ``inception_score``.

    Args:
        data: the data set.
        reference: the examples compared with.
        features: an extractor that classifies: ``inception`` gives the published score.
        splits: the number of parts that samples are dealt to.
        seed: the seed of the parts.

    Returns:
        The metric ``"IS gap[...]"``: the score of the reference, which its facts state, minus the score of the samples.

    Raises:
        ValueError: for an extractor without logits.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((200, 4))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="vector", levels=None, classes=0)
    >>> net = lambda data: extractors.Features(lambda x: x, lambda x: 9 * x, None, "none", "plain")
    >>> inception_score_to(data, data.train, features=net).distance(0 * y) > 1
    True
    """
    net = checked_features(features, data)
    if net.logits is None:
        raise Refusal(
            "features", net.name, "gives no logits to score", "Take an extractor that classifies, 'inception'"
        )
    logits = net._replace(features=net.logits)
    score = lambda x: scores.inception_score(embed(logits, x), splits=splits, seed=seed)[0]
    real = score(reference_rows(data, reference, least=10 * splits))
    facts = feature_facts(net) | {"score of the reference": f"{real:.4f}", "parts": f"{splits}, seed {seed}"}
    return Metric(f"IS gap[{net.name}]", lambda x: real - score(x), facts, 10 * splits)


def mind_to(
    data: DataLike,
    reference: ExamplesLike,
    *,
    features: Extractor = extractors.random_network,
    directions: Positive = 1000,
    seed: int = 0,
) -> Metric:
    """Return the Monge Inception distance to some examples, see ``mind``.

    Args:
        data: the data set.
        reference: the examples compared with.
        features: the extractor.
        directions: the number of random directions.
        seed: the seed of the directions.

    Returns:
        The metric ``"MIND[...]"`` with the name of the extractor.

    >>> from types import SimpleNamespace
    >>> y = np.arange(8.0).reshape(4, 2)
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> mind_to(data, data.train, features=extractors.raw).distance(y[::-1])
    0.0
    """
    net = checked_features(features, data)
    b = embed(net, reference_rows(data, reference))
    distance = lambda x: scores.mind(embed(net, x), b, directions=directions, seed=seed)
    return Metric(f"MIND[{net.name}]", distance, feature_facts(net) | {"directions": f"{directions}, seed {seed}"})
