"""The contents of the reports of a pipeline and of a search of corrections."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fmjax import correction
from fmjax.data import Dataset
from fmjax.experiments import comparison, drawing, measuring, pushes, report, samplers, spending, workdir
from fmjax.experiments.compared import Drawn, Page, compare_drawn
from fmjax.experiments.drawing import Draws, Models
from fmjax.experiments.results import Result, curves, parameter_counts
from fmjax.experiments.samplers import FLOW_MAP, Sampler
from fmjax.experiments.settings import Settings
from fmjax.metrics import mean_se, sliced_w2
from fmjax.sampling import grids

ROWS = {"image": 8, "points": 128}  # number of trajectories shown, by kind of data
DRAWN = ("image", "points")  # kinds of data whose trajectories are shown
NOTES = [
    "Forward marginals p_n start at the source and follow the flow; backward marginals q_n start at the training "
    "examples and follow the flow back in time. For a perfect flow p_n and q_n are the same distribution.",
    "Each correction is compared with its baseline by paired differences over runs.",
]
CHOSEN = "Steps, alpha and beta were chosen on validation data with other noise than in the table."


def pipeline(
    settings: Settings,
    data: Dataset,
    draws: Draws,
    names: Sequence[Sampler],
    results: Mapping[str, Result],
    path: Path,
) -> Page:
    """Compare the samples of a pipeline.

    Args:
        settings: the config.
        data: its data set.
        draws: number of runs and of samples per run.
        names: the samplers.
        results: the results of all other stages.
        path: the run folder.

    Returns:
        The page.
    """
    samples: Drawn = results["samples"].value
    page, models = compare_drawn(settings, data, draws, names, samples, path), samples.models
    trajectories: dict[str, np.ndarray] = {}
    facts, record, gaps, marginals = dict(page.contents.facts), page.record, {}, {}
    networks = {name: params for name, params in models.params.items() if name in models.methods}
    facts["parameters"] = parameter_counts(networks)
    spread = {"test data": np.asarray(data.test.x)} | {s.name: samples.x[s.name] for s in names}
    record["variance"] = {name: _total_variance(x, data.train.x.shape[1:]) for name, x in spread.items()}
    facts["summed variance"] = "; ".join(f"{name}: {v:.3g}" for name, v in record["variance"].items())
    for name in settings.correctors:
        if (areas := results[f"correctors.{name}"].value[1]) is not None:
            facts[f"AUC of the {name} on held-out marginals"] = _numbers(areas) + " along the grid"
            record.setdefault("auc", {})[name] = areas
    if changes := measuring.correction_changes(names, samples.x, data):
        record["feature change"] = {
            name: {"counts": c.counts.tolist(), "edges": c.edges.tolist(), "median": float(np.median(c.distances))}
            for name, c in changes.items()
        }
    facts |= pushes.push_facts(models, names)
    for sampler in pushes.fitted(names):
        push = models.params[samplers.PUSH][samplers.push_key(sampler)]
        record.setdefault("pushes", {})[sampler.name] = {"signal": push.signal.tolist(), "noise": push.noise.tolist()}
    if "marginals" in results:
        forward, backward = results["marginals"].value
        gaps = _distances_of_marginals(forward, backward, draws.seeds)
        straightness = correction.straightness_defect(backward)
        facts["straightness defect"] = _numbers(straightness) + " along the grid"
        record["straightness"] = straightness
        record["gaps"] = {n: dict(zip(("t", "distance", "se"), gap, strict=True)) for n, gap in gaps.items()}
        marginals = {"forward p_n and backward q_n": (forward.ts, *(np.asarray(m.x) for m in (forward, backward)))}
        if data.kind in DRAWN:
            shown = ROWS[data.kind]
            trajectories = {
                "forward: from the source along the flow": np.asarray(forward.x[:shown]).swapaxes(0, 1),
                "backward: from training data along the flow (source first)": backward.x[:shown].swapaxes(0, 1),
            }
    trajectories |= _states(names, models, draws, ROWS[data.kind]) if data.kind in DRAWN else {}
    contents = page.contents._replace(
        trajectories=trajectories, curves=curves(path, results), gaps=gaps, facts=facts, marginals=marginals,
        changes=changes,        trainings=spending.trainings(path, results), notes=[*page.contents.notes, *NOTES],
        command="python -m launch.pipeline --workdir=W",
    )  # fmt: skip
    return Page(contents, record, page.lines)


def tuning(data: Dataset, choice: correction.Choice, metric: str, sampler: str, table, drawn, entry) -> report.Contents:
    """Return the report of a search of corrections.

    Args:
        data: the data set.
        choice: the result of the search.
        metric: name of the distance.
        sampler: name of the sampler without corrections.
        table: rows and verdicts of the comparison.
        drawn: samples ``[seeds, samples, ...]`` by name of the sampler.
        entry: the chosen correction as an entry of ``corrections`` of a config.

    Returns:
        The contents of the page.
    """
    rows, verdicts = table
    ts, best, level = grids.uniform_grid(len(choice.influence) - 1), choice.chosen.placement, choice.path[0].value
    where = "; ".join(f"alpha {a:g}, beta {b:g} at step {i}" for i, a, b in zip(*best, strict=True)) or "none"
    alone = np.array([trial.value for trial in choice.influence])
    lines = {"one correction of best strength": alone, "no correction": np.full(len(ts), level)}
    with_error = lambda r: report.plus_minus(r.mean, r.error)
    return report.Contents(
        title=f"fmjax: corrections of {sampler}",
        summary=[
            f"{sampler}, {metric}: {with_error(choice.plain)} without corrections, {with_error(choice.reported)} with "
            f"{where} (validation data, noise of the table).",
            f"On the noise of the search: {level:.4g} without, {choice.chosen.value:.4g} with.",
        ],
        rows=rows,
        verdicts=verdicts,
        grids=comparison.grids(data, drawn),
        trajectories={},
        curves={},
        gaps={},
        facts={
            "greedy search, number of corrections: value": "; ".join(
                f"{len(t.placement.at)}: {t.value:.4g}" for t in choice.path
            ),
            "value where all alphas are multiplied": json.dumps(choice.sensitivity),
            "corrections of a config": json.dumps({"tuned": entry}),
            "environment": json.dumps(workdir.environment(), indent=1),
        },
        notes=[*comparison.NOTES, CHOSEN],
        influence={name: (ts, y, np.zeros(len(ts))) for name, y in lines.items() if np.isfinite(y).all()},
    )


def _states(names: Sequence[Sampler], models: Models, draws: Draws, count: int) -> dict[str, np.ndarray]:
    """Return the states of the plain flow-map sampler with the most steps, for a few examples."""
    plain = [s for s in names if s.solver == FLOW_MAP and not s.at]
    if not plain:
        return {}
    longest = max(plain, key=lambda s: s.steps)
    keys = drawing.sample_keys(draws.seed, 0, min(count, draws.samples))
    cond = drawing.first(draws.cond, len(keys))
    states = drawing.program(longest, models, trajectory=True)(models.params, keys, cond)
    return {longest.name: np.asarray(states)}


def _distances_of_marginals(
    forward: correction.Marginals, backward: correction.Marginals, runs: int
) -> dict[str, tuple]:
    """Return the sliced W2 distance of p_n to q_n along the grid, with errors over parts of p_n, and its floor."""
    size = len(forward.x) // runs
    p = np.asarray(forward.x[: size * runs]).reshape(runs, size, *forward.x.shape[1:])
    rest = lambda i, n: np.delete(p[:, :, n], i, 0).reshape(-1, *p.shape[3:])
    pairs = {"p_n and q_n": lambda i, n: np.asarray(backward.x[:, n])}
    if runs > 1:
        pairs["floor: p_n and other samples of p_n"] = rest
    gaps = {}
    for name, other in pairs.items():
        each = [[sliced_w2(p[i, :, n], other(i, n)) for i in range(runs)] for n in range(len(forward.ts))]
        mean, se = zip(*map(mean_se, each), strict=True)
        gaps[name] = (forward.ts, np.array(mean), np.nan_to_num(np.array(se)))
    return gaps


def _total_variance(x: np.ndarray, shape: tuple[int, ...]) -> float:
    """Return the variance of examples, summed over their dimensions."""
    return float(np.asarray(x).reshape(-1, int(np.prod(shape))).var(0).sum())


def _numbers(values) -> str:
    """Return numbers as text with three digits."""
    return ", ".join(f"{v:.3g}" for v in values)
