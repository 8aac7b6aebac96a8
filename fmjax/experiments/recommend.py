"""Choose a sampler on validation examples, state its gain on test examples, and sum up a comparison in five lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmjax.experiments import effects, report
from fmjax.experiments.report import Row, Verdict
from fmjax.experiments.samplers import NOISE, Sampler

Values = Mapping[str, Mapping[str, Sequence[float]]]  # one value per run by metric by name of the sampler


class Recommendation(NamedTuple):
    """The sampler to use first.

    Attributes:
        sampler: the sampler with the least mean rank over all distances to validation examples.
        baseline: the sampler without corrections that it is compared with; ``None`` where there is no other.
        cheaper: whether ``baseline`` needs at most as many evaluations.
        changes: comparisons with ``baseline`` on test examples, paired over runs, one per distance.
        candidates: number of samplers among which the choice was made.
    """

    sampler: Sampler
    baseline: Sampler | None
    cheaper: bool
    changes: tuple[Verdict, ...]
    candidates: int


def mean_ranks(names: Sequence[Sampler], values: Values) -> np.ndarray:
    """Return the rank of each sampler, averaged over the distances.

    Args:
        names: the samplers.
        values: one value per run by metric by name of the sampler.

    Returns:
        Mean ranks ``[n]``, 0 for the sampler that is the least in every distance; infinite for non-finite values
        and where there are no distances.
    """
    if not any(values.values()):
        return np.full(len(names), np.inf)
    means = np.array([[np.mean(v) for v in values[s.name].values()] for s in names])
    ranks = np.argsort(np.argsort(means, 0, kind="stable"), 0, kind="stable").mean(1)
    return np.where(np.isfinite(means).all(1), ranks, np.inf)


def recommend(
    names: Sequence[Sampler], costs: Mapping[str, Any], validation: Values, test: Values
) -> Recommendation | None:
    """Choose the sampler to use first.

    The choice sees validation examples only. The gain is measured on test examples, against the sampler without
    corrections that is best on validation examples among the samplers with at most as many evaluations.

    Args:
        names: the samplers, with corrected samplers and controls.
        costs: costs by name of the sampler, with ``nfe``.
        validation: distances to validation examples.
        test: distances to test examples.

    Returns:
        The recommendation; ``None`` where no sampler has finite distances.
    """
    ranks = dict(zip((s.name for s in names), mean_ranks(names, validation), strict=True))
    key = lambda s: (ranks[s.name], costs[s.name].nfe)
    best = min(names, key=key)
    if not np.isfinite(ranks[best.name]):
        return None
    others = [s for s in names if not s.at and s is not best and np.isfinite(ranks[s.name])]
    cheaper = [s for s in others if costs[s.name].nfe <= costs[best.name].nfe]
    baseline = min(cheaper, key=key) if cheaper else min(others, key=lambda s: costs[s.name].nfe, default=None)
    changes = () if baseline is None else _changes(best, baseline, test)
    return Recommendation(best, baseline, bool(cheaper), changes, len(names))


def advice(choice: Recommendation, costs: Mapping[str, Any], test: Values) -> list[str]:
    """Return the recommendation in two sentences: the sampler with its cost, and its gain.

    Args:
        choice: the recommendation.
        costs: costs by name of the sampler.
        test: distances to test examples.

    Returns:
        The sentences.
    """
    cost = lambda s: f"{s.name} (NFE {costs[s.name].nfe})"
    alone = ", a control: noise alone, no corrector is better" if choice.sampler.by == NOISE else ""
    first = (
        f"Use first: {cost(choice.sampler)}{alone}; the best of {choice.candidates} samplers on validation examples."
    )
    if choice.baseline is None:
        return [first, "Gain: there is no other sampler without corrections to compare with."]
    words = []
    for v in choice.changes:
        level = float(np.mean(test[choice.baseline.name][v.metric]))
        seen = "" if v.verdict != "no difference seen" else " (no significant difference)"
        words.append(f"{v.metric} {effects.percent(effects.relative_change(v, level))}{seen}")
    what = "the best without corrections at no more NFE" if choice.cheaper else "the cheapest without corrections"
    return [first, f"Gain on test examples against {cost(choice.baseline)}, {what}: {', '.join(words)}."]


def choices(names: Sequence[Sampler], validation: Values, test: Values) -> list[str]:
    """Return one sentence per plain sampler that has several corrections: which one to use first, and what it changes.

    The correction is chosen by distances to validation examples (the least mean rank over all of them) among the plain
    sampler, its corrections and their controls; the changes are of distances to test examples, paired over runs.

    Args:
        names: the samplers.
        validation: distances to validation examples.
        test: distances to test examples.

    Returns:
        The sentences.
    """
    sentences = []
    for plain in (s for s in names if not s.at and any(validation.values())):
        same = [s for s in names if s.at and (s.solver, s.steps, s.grid) == (plain.solver, plain.steps, plain.grid)]
        if len(same) < 2:
            continue
        best = (plain, *same)[int(np.argmin(mean_ranks((plain, *same), validation)))]
        first = f"Chosen on validation examples among {len(same)} corrections and controls of {plain.name}"
        if best is plain:
            sentences.append(f"{first}: none, use {plain.name} as it is.")
            continue
        words = "; ".join(report.verdict_words(v) for v in _changes(best, plain, test))
        sentences.append(f"{first}: {best.name}. On test examples {words}.")
    return sentences


def five_lines(rows: Sequence[Row], verdicts: Sequence[Verdict], advised: Sequence[str]) -> list[str]:
    """Return the summary of a comparison, which a command prints: five lines.

    Args:
        rows: the rows of the table.
        verdicts: the verdicts on corrections.
        advised: the two sentences of ``advice``; none where no sampler has finite distances.

    Returns:
        Five lines: recommendation, gain, the best of each distance, corrections, and the floor of each distance.
    """
    advised = advised or ["Use first: none is chosen, which needs two samplers with finite distances.", "Gain: none."]
    floor = next(row for row in rows if row.family == report.REFERENCE)
    best = {metric: report.best_row(rows, metric) for metric in floor.distances}
    words = [
        f"{metric} {report.plus_minus(*row.distances[metric])} by {row.name} (NFE {row.nfe}{_control(row)})"
        for metric, row in best.items()
        if row
    ]
    real = ", ".join(f"{metric} {report.plus_minus(*value)}" for metric, value in floor.distances.items())
    return [
        *advised,
        f"Least on test examples: {'; '.join(words) or 'none is finite'}.",
        report.count_line(verdicts) if verdicts else "Corrections: none are compared.",
        f"Floor, training examples in place of samples: {real}.",
    ]


def _changes(sampler: Sampler, baseline: Sampler, test: Values) -> tuple[Verdict, ...]:
    """Return the comparison of two samplers by each distance, paired over runs."""
    a, b = test[sampler.name], test[baseline.name]
    return tuple(report.verdict(sampler.name, baseline.name, metric, a[metric], b[metric]) for metric in a)


def _control(row: Row) -> str:
    return ", noise alone" if row.control else ""
