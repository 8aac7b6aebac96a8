"""Compare samplers: distances to the data with errors over runs, judgements of corrections, and what a report shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fmjax import metrics
from fmjax.checks import Refusal, check_choice
from fmjax.data import Dataset, Examples
from fmjax.experiments import build, drawing, pushes, report, samplers, specs, stored, workdir
from fmjax.experiments.drawing import Draws, Models
from fmjax.experiments.measuring import errors, measure, measure_all
from fmjax.experiments.report import Row, Verdict
from fmjax.experiments.samplers import FLOW_MAP, NOISE, PUSH, Sampler
from fmjax.experiments.settings import Common, Settings
from fmjax.keys import generator
from fmjax.metrics import Metric
from fmjax.training import logs
from fmjax.types import Cond

SDE = ("euler_maruyama", "stochastic_heun")  # steps that need the score
CLASSIFIED = 128  # least number of labelled images whose classifier gives features
SHOWN = {"image": 36, "series": 36}  # examples that are shown, by kind of data
CLOUD = 400  # points or vectors that are shown
NOTES = [
    "NFE: network evaluations per sample. All samplers of a run start from the same noise.",
    "Compare each distance with its floor: the distance of as many training examples to the same test data.",
]
SMALL = (
    "FD-small is a Frechet distance in 32 features of a small classifier that is trained on the training images. It is "
    "not FID; compare it only with FD-small at the same number of samples."
)


def read_samplers(settings: Settings, *, flow_map: bool) -> list[Sampler]:
    """Return the samplers that a config compares, plain and corrected.

    Args:
        settings: the config.
        flow_map: whether a flow map is available; samplers with a flow map are refused without one.

    Returns:
        The plain samplers, then the corrected samplers and their controls.

    Raises:
        ValueError: no sampler, or a sampler that cannot be drawn.
    """
    plain = samplers.plain_samplers(settings.samplers)
    if not flow_map and any(s.solver == FLOW_MAP for s in plain):
        raise Refusal("samplers.flow_map", settings.samplers[FLOW_MAP], "no flow map is trained", "Take it out")
    if not plain:
        raise Refusal("samplers", settings.samplers, "nothing to draw", "Give a solver, such as {'euler': (8,)}")
    _check_scores(settings, plain)
    return plain + samplers.corrected_samplers(settings.corrections, plain, list(settings.correctors))


def _check_scores(settings: Settings, plain: Sequence[Sampler]) -> None:
    """Refuse stochastic steps under a coupling for which the velocity does not determine the score."""
    path = build.path(settings.common.path)
    independent = specs.name_of(settings.flow.coupling) == "independent"
    for sampler in plain:
        name = specs.name_of(sampler.solver)
        if name in SDE and path.gamma is None and not independent:
            raise Refusal(
                f"samplers.{name}", sampler.steps,
                f"takes its score from the velocity, which has it for coupling='independent', not "
                f"{settings.flow.coupling!r}", "Take a solver of the ODE, or learn the score (stochastic_interpolant)",
            )  # fmt: skip


def draws_of(settings: Settings, data: Dataset) -> Draws:
    """Return how many samples a config draws, after a check that there are as many training examples to compare with.

    Args:
        settings: the config.
        data: its data set.

    Returns:
        Number of runs and samples, seed, and conditions.

    Raises:
        ValueError: more samples than training examples.
    """
    s = settings.sampling
    if s.samples > data.train.count:
        wrong = f"each run is compared with as many training examples, and there are {data.train.count}"
        raise Refusal("sampling.samples", s.samples, wrong, "Give fewer")
    return Draws(s.seeds, s.samples, settings.common.seed, _sample_conditions(settings.common, data, s.samples))


def _sample_conditions(common: Common, data: Dataset, count: int) -> Cond:
    """Return the conditions of ``count`` samples: labels one after the other, or the conditions of test examples."""
    if not common.conditional:
        return None
    if data.classes:
        return np.arange(count, dtype=np.int32) % data.classes
    return jax.tree.map(lambda a: np.asarray(a)[np.arange(count) % len(a)], data.test.cond)


def distances(settings: Settings, data: Dataset, reference: Examples, *, names: Sequence[Sampler] = ()) -> list[Metric]:
    """Return the distances of a config to reference examples.

    Without ``metrics`` in the config these are the distances that suit the kind of data and the number of samples.

    Args:
        settings: the config.
        data: its data set.
        reference: the reference examples: validation examples to choose, test examples to report.
        names: the samplers that are compared; a metric of paired samples names its teacher among them.

    Returns:
        The metrics.

    Raises:
        ValueError: an unknown metric or option, too few samples for a metric, or a teacher that is not drawn.
    """
    classes = data.classes if data.train.count >= CLASSIFIED else 0  # fewer do not train a classifier
    described, samples = settings.metrics or metrics.defaults(data.kind, classes), settings.sampling.samples
    built = [build.metric(spec, data, reference, field="metrics") for spec in described]
    if not settings.metrics:
        return [m for m in built if samples >= m.least]
    for m in built:
        if samples < m.least:
            wrong = f"{m.name} means nothing below {m.least} samples"
            raise Refusal("sampling.samples", samples, wrong, "Draw more, or take it out of metrics")
    check_teachers(built, names)
    return built


def check_teachers(distances: Sequence[Metric], names: Sequence[Sampler]) -> None:
    """Refuse a metric whose teacher is not drawn.

    Args:
        distances: the metrics.
        names: the samplers that are drawn.

    Raises:
        ValueError: a teacher that is not among the samplers.
    """
    for m in distances:
        if m.teacher is not None:
            check_choice("metrics.teacher", m.teacher, [s.name for s in names], "sampler in this comparison")


def choosing_distances(settings: Settings, data: Dataset, names: Sequence[Sampler]) -> list[Metric]:
    """Return the distances to validation examples by which a sampler and its correction are chosen.

    Args:
        settings: the config.
        data: its data set.
        names: the samplers that are compared.

    Returns:
        The metrics without a teacher for which the split is large enough; nothing for a single sampler.

    Raises:
        ValueError: corrections are to be chosen, and the split is too small for every metric.
    """
    if len(names) < 2:
        return []
    kept, small = [], None
    for spec in settings.metrics or (None,):
        single = settings._replace(metrics=(spec,)) if spec is not None else settings
        try:
            kept += distances(single, data, data.validation, names=names)
        except Refusal as error:
            if not str(error).startswith("reference="):
                raise
            small = error
    if small and not kept and any(s.at for s in names):
        raise small
    return [m for m in kept if m.teacher is None]


def draw_all(names: Sequence[Sampler], models: Models, draws: Draws, *, directory, identity: str):
    """Draw the samples of all samplers under a progress bar.

    Args:
        names: the samplers.
        models: the networks.
        draws: how many samples, and from which keys.
        directory: folder of the stored samples.
        identity: digest of the parameters.

    Returns:
        Samples ``[seeds, samples, ...]`` by name of the sampler.
    """
    drawn = {}
    with logs.bar("samples", len(names), unit="sampler") as progress:
        for sampler in names:
            what = sample_identity(sampler, models, identity)
            drawn[sampler.name] = stored.draw(sampler, models, draws, directory=directory, identity=what)
            progress.update()
    return drawn


def sample_identity(sampler: Sampler, models: Models, identity: str) -> str:
    """Return the digest of the parameters that the samples of a sampler depend on, with a fitted push.

    Args:
        sampler: the sampler.
        models: the networks.
        identity: digest of the parameters of the networks.

    Returns:
        The digest.
    """
    return identity + pushes.push_identity(models.params.get(PUSH, {}), sampler)


def training_runs(data: Dataset, draws: Draws) -> np.ndarray:
    """Return training examples in place of samples, for the floor of a distance.

    Args:
        data: the data set.
        draws: how many runs and samples.

    Returns:
        Examples ``[seeds, samples, ...]``, in each run drawn without replacement.
    """
    rng = generator(draws.seed)
    rows = [np.sort(rng.permutation(data.train.count)[: draws.samples]) for _ in range(draws.seeds)]
    return np.stack([np.asarray(data.train.x[r]) for r in rows])


def compare(
    names: Sequence[Sampler],
    drawn: Mapping[str, np.ndarray],
    costs: Mapping[str, Any],
    distances: Sequence[Metric],
    floor: np.ndarray,
    *,
    bootstrap: int = 0,
    each: Mapping[str, Mapping[str, list[float]]] | None = None,
) -> tuple[list[Row], list[Verdict]]:
    """Measure all samplers.

    Args:
        names: the samplers.
        drawn: samples ``[seeds, samples, ...]`` by name of the sampler.
        costs: costs by name of the sampler.
        distances: the metrics.
        floor: training examples ``[seeds, samples, ...]``.
        bootstrap: the number of resamples of the samples of a single run, see ``errors``.
        each: the distances of every run by name of the sampler, where they are measured already.

    Returns:
        A row for each sampler and for the training data (mean and standard error), and a verdict on each correction by
        each metric.
    """
    each = each or measure_all(drawn, distances)
    summary = lambda x, values: {m.name: errors(m, x, values[m.name], drawn, resamples=bootstrap) for m in distances}
    rows = [
        Row(
            s.name, s.family, costs[s.name].nfe, costs[s.name].corrections, summary(drawn[s.name], each[s.name]),
            s.by == NOISE,
        )
        for s in names
    ]  # fmt: skip
    rows.append(Row("training data", report.REFERENCE, 0, 0, summary(floor, measure(floor, distances, drawn))))
    verdicts = [
        report.verdict(s.name, s.baseline, m.name, each[s.name][m.name], each[s.baseline][m.name])
        for s in names
        for m in distances
        if s.baseline
    ]
    return rows, verdicts


def best_lines(rows: Sequence[Row]) -> list[str]:
    """Return one sentence per metric: the best sampler, its cost, and the floor.

    Args:
        rows: the table of a comparison.

    Returns:
        The sentences.
    """
    floor, sentences = next(row for row in rows if row.family == report.REFERENCE), []
    for metric, limit in floor.distances.items():
        least = report.best_row(rows, metric)
        if least:
            control = ", control without corrector" if least.control else ""
            value, real = report.plus_minus(*least.distances[metric]), report.plus_minus(*limit)
            sentences.append(f"Best {metric} {value}: {least.name} (NFE {least.nfe}{control}); real data {real}.")
    return sentences


def row_lines(rows: Sequence[Row]) -> list[str]:
    """Return one line per sampler: its cost and its distances.

    Args:
        rows: the table of a comparison.

    Returns:
        The lines.
    """
    words = lambda row: ", ".join(f"{m} {report.plus_minus(*d)}" for m, d in row.distances.items())
    return [f"{row.name} ({row.nfe} NFE): {words(row)}" for row in rows]


def as_record(rows: Sequence[Row], verdicts: Sequence[Verdict] = ()) -> dict[str, Any]:
    """Return rows and verdicts as plain values.

    Args:
        rows: the table of a comparison.
        verdicts: the verdicts on corrections.

    Returns:
        ``{"rows": [...], "verdicts": [...]}``.
    """
    return {"rows": [r._asdict() for r in rows], "verdicts": [v._asdict() for v in verdicts]}


def facts(settings: Settings, data: Dataset, distances: Sequence[Metric]) -> dict[str, str]:
    """Return the facts of a report: data, samples, metrics, environment, config.

    Args:
        settings: the config.
        data: its data set.
        distances: the metrics.

    Returns:
        Text by name of the fact.
    """
    s, d = settings.sampling, data
    units = {} if d.units is None else {"units": "standardised by the training examples, distances too"}
    return units | {
        "data": f"{d.name}: {d.train.count} training, {d.validation.count} validation, {d.test.count} test examples",
        "samples": f"{s.seeds} runs of {s.samples}",
        **{f"{m.name}: {name}": value for m in distances for name, value in m.facts.items()},
        "environment": json.dumps(workdir.environment(), indent=1),
        "config": json.dumps(workdir.plain(settings.config), indent=1),
    }


def notes(distances: Sequence[Metric]) -> list[str]:
    """Return the remarks at the end of a report.

    Args:
        distances: the metrics, some of which need a remark.

    Returns:
        The sentences.
    """
    return [*NOTES, *([SMALL] if any(m.name == "FD-small" for m in distances) else [])]


def grids(data: Dataset, drawn: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the examples that a report shows: test examples, then samples that all start from the same noise.

    Args:
        data: the data set.
        drawn: samples ``[seeds, samples, ...]`` by name of the sampler.

    Returns:
        Examples ``[n, ...]`` by caption.
    """
    count = SHOWN.get(data.kind, CLOUD)
    return {"test data": np.asarray(data.test.x[:count])} | {name: x[0, :count] for name, x in drawn.items()}


def source_grid(models: Models, draws: Draws) -> dict[str, np.ndarray]:
    """Return the examples of the source from which the shown samples start.

    Args:
        models: the networks.
        draws: how many samples, and from which keys.

    Returns:
        Examples ``[n, ...]`` by caption; nothing for the source N(0, I).
    """
    if models.source.normal:
        return {}
    count = CLOUD if len(models.shape) == 1 else SHOWN["image"]
    keys = drawing.sample_keys(draws.seed, 0, min(count, draws.samples))
    return {f"source: {models.source.name}": np.asarray(drawing.starts(models, keys))}
