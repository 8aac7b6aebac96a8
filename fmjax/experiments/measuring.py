"""Measure samples: every metric of every run, and its error over runs or by the bootstrap."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence

import numpy as np

from fmjax.data import Dataset
from fmjax.experiments.samplers import Sampler
from fmjax.metrics import FeatureChange, Metric, bootstrap_se, embed, extractors, feature_change, mean_se


def measure(
    x: np.ndarray, distances: Sequence[Metric], drawn: Mapping[str, np.ndarray] = types.MappingProxyType({})
) -> dict[str, list[float]]:
    """Return every distance of every run.

    Args:
        x: samples ``[runs, samples, ...]``.
        distances: the metrics.
        drawn: samples ``[runs, samples, ...]`` by name of the sampler, for metrics with a teacher.

    Returns:
        One value per run by name of the metric; infinite where samples are not finite.
    """
    finite = lambda rows: all(np.isfinite(a).all() for a in rows)
    runs = lambda m: zip(x, *([] if m.teacher is None else [drawn[m.teacher]]), strict=True)
    return {m.name: [m.distance(*rows) if finite(rows) else float("inf") for rows in runs(m)] for m in distances}


def measure_all(drawn: Mapping[str, np.ndarray], distances: Sequence[Metric]) -> dict[str, dict[str, list[float]]]:
    """Return every distance of every run of every sampler.

    Args:
        drawn: samples ``[runs, samples, ...]`` by name of the sampler.
        distances: the metrics.

    Returns:
        One value per run by metric by name of the sampler.
    """
    return {name: measure(x, distances, drawn) for name, x in drawn.items()}


def errors(
    metric: Metric, x: np.ndarray, values: Sequence[float], drawn: Mapping[str, np.ndarray], *, resamples: int
) -> tuple[float, float]:
    """Return the mean of a metric and its standard error: over runs, or of a single run by the bootstrap.

    Args:
        metric: the metric.
        x: samples ``[runs, samples, ...]``.
        values: the values of the runs.
        drawn: samples by name of the sampler, for a metric with a teacher.
        resamples: the number of resamples of the samples, not of the reference; 0 for no bootstrap.

    Returns:
        Mean and standard error; the error of a single run is nan without the bootstrap.
    """
    if len(values) > 1 or not resamples or not np.isfinite(values).all():
        return mean_se(values)
    paired = () if metric.teacher is None else (drawn[metric.teacher][0],)
    return float(values[0]), bootstrap_se(metric.distance, x[0], *paired, resamples=resamples)


def correction_changes(
    names: Sequence[Sampler], drawn: Mapping[str, np.ndarray], data: Dataset
) -> dict[str, FeatureChange]:
    """Return how far each correction moves the samples of the first run, in features of a random network.

    Args:
        names: the samplers.
        drawn: samples ``[runs, samples, ...]`` by name of the sampler; all start from the same noise.
        data: the data set; its test examples give the unit, the distance of two of them.

    Returns:
        The changes by name of the corrected sampler; nothing for samples that are not finite.
    """
    base = lambda s: (s.solver, s.steps, s.grid)
    plain = {base(s): s.name for s in names if not s.at}
    pairs = {s.name: plain[base(s)] for s in names if s.at and base(s) in plain}
    first = {name: drawn[name][0] for name in {*pairs, *pairs.values()} if np.isfinite(drawn[name][0]).all()}
    if not first:
        return {}
    net = extractors.random_network(data)
    features, unit = {name: embed(net, x) for name, x in first.items()}, embed(net, np.asarray(data.test.x))
    whole = {a: b for a, b in pairs.items() if a in first and b in first}
    return {a: feature_change(features[a], features[b], unit) for a, b in whole.items()}
