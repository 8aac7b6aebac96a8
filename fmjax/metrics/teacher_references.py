"""Metrics that compare samples with the samples of another sampler from the same noise: a teacher, or no correction."""

from __future__ import annotations

import numpy as np

from fmjax.metrics import extractors, scores
from fmjax.metrics.extractors import Extractor, checked_features, feature_facts
from fmjax.metrics.features import embed
from fmjax.metrics.frechet import frechet
from fmjax.metrics.metric import DataLike, ExamplesLike, Metric
from fmjax.metrics.references import reference_rows


def paired_error_to(data: DataLike, reference: ExamplesLike, *, teacher: str) -> Metric:
    """Return the mean squared error to the samples of another sampler from the same noise, see ``paired_error``.

    Args:
        data: the data set.
        reference: not used: the error is an error to the teacher.
        teacher: the name of a sampler of the config, as tables show it, such as ``"rk4, 32 steps"``.

    Returns:
        The metric ``"error to <teacher>"``.

    >>> from types import SimpleNamespace
    >>> split = SimpleNamespace(x=np.ones((4, 3)), cond=None)
    >>> data = SimpleNamespace(train=split, kind="vector", levels=None, classes=0)
    >>> metric = paired_error_to(data, split, teacher="rk4, 32 steps")
    >>> metric.name, metric.distance(np.ones((2, 3)), np.zeros((2, 3)))
    ('error to rk4, 32 steps', 1.0)
    """
    return Metric(
        f"error to {teacher}", scores.paired_error, {"kind": "mean square of each coordinate"}, teacher=teacher
    )


def teacher_frechet_to(
    data: DataLike, reference: ExamplesLike, *, teacher: str, features: Extractor = extractors.random_network
) -> Metric:
    """Return the Frechet distance to the samples of a teacher in place of data: T-FID, the error of a distillation.

    Args:
        data: the data set.
        reference: not used: the distance is a distance to the teacher.
        teacher: the name of a sampler of the config, as tables show it.
        features: the extractor.

    Returns:
        The metric ``"T-FD[<extractor>, <teacher>]"``. Its floor, of the teacher with other noise, is not zero.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((50, 2))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> teacher_frechet_to(data, data.train, teacher="rk4, 32 steps").distance(y, y) < 1e-6
    True
    """
    net = checked_features(features, data)
    distance = lambda x, theirs: frechet(embed(net, x), embed(net, theirs))
    least = embed(net, np.asarray(data.train.x[:2])).shape[1] + 1
    return Metric(f"T-FD[{net.name}, {teacher}]", distance, feature_facts(net), least, teacher)


def feature_change_to(
    data: DataLike, reference: ExamplesLike, *, teacher: str, features: Extractor = extractors.random_network
) -> Metric:
    """Return the median change of features from another sampler of the same noise, see ``feature_change``.

    It says how far a correction moves samples: 1 is the distance of two random examples of the data.

    Args:
        data: the data set.
        reference: the examples that give the unit.
        teacher: the name of the sampler without the correction, as tables show it.
        features: the extractor.

    Returns:
        The metric ``"change[<extractor>, <teacher>]"``.

    >>> from types import SimpleNamespace
    >>> y = np.random.default_rng(0).standard_normal((50, 2))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=y, cond=None), kind="points", levels=None, classes=0)
    >>> feature_change_to(data, data.train, teacher="rk4, 32 steps").distance(y, y)
    0.0
    """
    net = checked_features(features, data)
    unit = embed(net, reference_rows(data, reference))
    change = lambda x, theirs: scores.feature_change(embed(net, x), embed(net, theirs), unit)
    distance = lambda x, theirs: float(np.median(change(x, theirs).distances))
    return Metric(f"change[{net.name}, {teacher}]", distance, feature_facts(net), teacher=teacher)
