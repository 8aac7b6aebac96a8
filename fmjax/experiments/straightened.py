"""Compare a teacher with straightened students: distances, paired errors, spectra and straightness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import sampling, straightening
from fmjax.data import Dataset
from fmjax.experiments import build, comparison, drawing, measuring, report
from fmjax.experiments.compared import Page
from fmjax.experiments.drawing import Draws
from fmjax.experiments.report import Row
from fmjax.experiments.settings import Settings, Straighten
from fmjax.keys import fold_in
from fmjax.metrics import mean_se, spectrum
from fmjax.sampling import grids
from fmjax.straightening import FULL, TEACHER, SegmentedModel
from fmjax.training import logs
from fmjax.types import Method, Params, stated

GITS = {
    "n": 60,
    "examples": 256,
    "growth": 1.15,
}  # fine grid, examples and option of the search for a time grid by dynamic programming
SHOWN = 12  # examples of each sampler in the report, from the same noise
COLUMNS = ("family", "name", "NFE", "counts", "drift")  # fields of a row that are not distances
NOTES = [
    "Paired error: mean squared difference from the sample of the teacher with the same noise and many steps.",
    "(m, n): m Euler steps in the first segment and n in the second segment; one evaluation per step.",
]


class Compared(NamedTuple):
    """A sampler of the comparison.

    Attributes:
        family: the network and the solver.
        name: the time grid, in words.
        step_of: the solver step as a function of the parameters.
        ts: the time grid; the state at ``ts[0]`` is ``1 - ts[0]`` times the noise.
        nfe: network evaluations per sample.
        counts: Euler steps in each segment; empty for a sampler without segments.
    """

    family: str
    name: str
    step_of: Callable[[Mapping[str, Params]], Any]
    ts: np.ndarray
    nfe: int
    counts: tuple[int, ...] = ()


def compare_students(
    settings: Settings,
    data: Dataset,
    draws: Draws,
    models: Sequence[SegmentedModel],
    methods: Mapping[str, Method],
    params: Mapping[str, Params],
    curves: Mapping[str, Any],
) -> Page:
    """Measure teacher and students; all samplers start from the same noise.

    Args:
        settings: the config, with ``straighten``.
        data: its data set.
        draws: number of runs and of samples per run.
        models: the models that are compared.
        methods: methods by network.
        params: averaged parameters by network.
        curves: losses by network, for the report.

    Returns:
        The report: rows, measures of every model, spectra of the errors, and samples.
    """
    _, s = settings.straighten
    shape = data.train.x.shape[1:]
    keys = [fold_in(drawing.sample_keys(draws.seed, i, draws.samples), 0) for i in range(draws.seeds)]
    source = settings.common.origin.sampling
    noise = jnp.concatenate([source.examples(k, shape) for k in keys])
    cond = jax.tree.map(lambda a: np.concatenate([a] * draws.seeds), draws.cond)
    flow = methods[TEACHER].velocity
    ts, index = teacher_grid(s.grid, s.reference_steps, s.bounds)
    solve = lambda params: build.step(s.solver)(flow(params[TEACHER]))
    reference = _states_at(solve, params, noise, cond, ts, index)
    metrics = comparison.distances(settings, data, data.test)
    by_run = lambda x: x.reshape(draws.seeds, draws.samples, *x.shape[1:])
    rows, spectra = [], {}
    nfe = (stated(solve(params)).nfe or 1) * (len(ts) - 1)
    many = Compared(f"{TEACHER}, {s.solver}", f"{len(ts) - 1} steps", solve, ts, nfe)
    shown = {"test data": np.asarray(data.test.x[:SHOWN]), f"{many.family}, {many.name}": reference[-1]}

    def measure(sampler: Compared, states: np.ndarray) -> None:
        x = by_run(states[-1])
        each = measuring.measure(x, metrics)
        each["paired error"] = [float(np.mean((a - b) ** 2)) for a, b in zip(x, by_run(reference[-1]), strict=True)]
        row = {"family": sampler.family, "name": sampler.name, "NFE": sampler.nfe, "counts": sampler.counts}
        rows.append(row | {name: mean_se(values) for name, values in each.items()})
        if len(states) > 1:  # at the inner bounds
            inner = zip(states[1:-1], reference[1:-1], strict=True)
            rows[-1]["drift"] = [float(np.mean((a - b) ** 2)) for a, b in inner]

    samplers = [*_allocated(s, models, methods), *_baselines(s, methods, params, noise, cond)]
    with logs.bar("samplers", len(samplers), unit="sampler") as progress:
        for sampler in samplers:
            at = tuple(np.cumsum((0, *sampler.counts))) if sampler.counts else (len(sampler.ts) - 1,)
            states = _states_at(sampler.step_of, params, noise, cond, sampler.ts, at)
            measure(sampler, states)
            shown[f"{sampler.family}, {sampler.name}"] = states[-1]
            if data.kind == "image" and sampler.counts:
                frequency, power = spectrum.radial(states[-1] - reference[-1])
                spectra[f"{sampler.family}, {sampler.name}"] = {"frequency": frequency, "power": power}
            progress.update()
    measure(many, reference[-1:])
    floor = measuring.measure(comparison.training_runs(data, draws), metrics)
    floor = {name: mean_se(values) for name, values in floor.items()}
    along = _segment_measures(settings, data, draws, models, methods, params, reference, cond)
    record = {"rows": rows, "floor": floor, "segments": along, "spectra": spectra}
    facts = _facts(along, spectra) | comparison.facts(settings, data, metrics)
    table = [
        Row(f"{r['family']} {r['name']}", r["family"], r["NFE"], 0, {k: v for k, v in r.items() if k not in COLUMNS})
        for r in rows
    ] + [Row("training data", report.REFERENCE, 0, 0, floor)]
    contents = report.Contents(
        title=f"fmjax: half-straightening of {data.name}", summary=comparison.best_lines(table), rows=table,
        verdicts=[], grids={k: np.asarray(x[:SHOWN]) for k, x in shown.items()}, trajectories={}, curves=dict(curves),
        gaps={}, facts=facts, notes=[*comparison.notes(metrics), *NOTES],
    )  # fmt: skip
    return Page(contents, record, contents.summary)


def teacher_grid(kind: str, steps: int, bounds) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the time grid of the teacher from 0 to 1, with the bounds of the segments among its points.

    Args:
        kind: ``"even"``, or ``"edm"`` for the grid of EDM.
        steps: number of steps before the bounds are inserted.
        bounds: bounds of the segments.

    Returns:
        Times ``[n + 1]``, and the indices of the bounds.
    """
    ts = grids.uniform_grid(steps) if kind == "even" else np.append(np.float32(0), grids.edm_grid(steps))
    return straightening.inserted(ts, bounds)


def _states_at(step_of, params, noise, cond, ts, at) -> np.ndarray:
    """Return the states ``[len(at), n, ...]`` at the indices ``at`` of the grid, from ``1 - ts[0]`` times the noise."""
    alone = tuple(at) == (len(ts) - 1,)

    @jax.jit
    def states(x0, cond):
        x = sampling.sample(step_of(params), (1 - ts[0]) * x0, ts, cond=cond, trajectory=not alone)
        return x[:, None] if alone else jnp.moveaxis(x[np.asarray(at)], 0, 1)

    return np.moveaxis(drawing.in_chunks(states, noise, cond), 1, 0)


def _allocated(s: Straighten, models: Sequence[SegmentedModel], methods) -> list[Compared]:
    """Return every model with every allocation of Euler steps."""
    compared = []
    for model in models:
        family = model.sharing if model.sharing in (TEACHER, FULL) else f"{model.part}, {model.sharing}"

        def step_of(params, model=model):
            each = straightening.segment_velocities(model, methods, params)
            return straightening.segmented_step(each, s.bounds)

        for counts in map(tuple, s.allocations):
            grid, words = straightening.segment_grid(s.bounds, counts), ", ".join(map(str, counts))
            compared.append(Compared(family, f"({words})", step_of, grid, sum(counts), counts))
    return compared


def _baselines(s: Straighten, methods, params, noise, cond) -> list[Compared]:
    """Return other samplers of the teacher, and Euler steps of the full reflow, at equal numbers of evaluations."""
    if not s.baselines:
        return []
    flow, fine = methods[TEACHER].velocity, grids.edm_grid(GITS["n"])
    of = lambda make: lambda params: make(flow(params[TEACHER]))
    few = GITS["examples"]
    along = _states_at(of(sampling.edm_heun), params, noise[:few], drawing.first(cond, few), fine, range(len(fine)))
    jump_costs = lambda params, xs, cond: sampling.jump_costs(sampling.ddim(flow(params)), xs, fine, cond=cond)
    costs = np.asarray(jax.jit(jump_costs)(params[TEACHER], along, drawing.first(cond, few)))
    compared = []
    for n in s.baselines:
        even, levels, heun = grids.uniform_grid(n), grids.edm_grid(n), grids.edm_grid((n + 1) // 2)
        best = fine[list(sampling.best_steps(costs, n, growth=GITS["growth"]))]
        compared += [
            Compared(f"{TEACHER}, Euler", f"{n} even steps", of(sampling.euler), even, n),
            Compared(f"{TEACHER}, Euler on EDM's grid", f"of {n}", of(sampling.euler), levels, n),
            Compared(
                f"{TEACHER}, EDM's Heun", f"grid of {len(heun) - 1}", of(sampling.edm_heun), heun, 2 * len(heun) - 3
            ),
            Compared(f"{TEACHER}, DPM-Solver++(2M)", f"grid of {n}", of(sampling.dpmpp_2m), levels, n),
            Compared(f"{TEACHER}, DDIM", f"GITS's grid of {n}", of(sampling.ddim), best, n),
        ]
        if s.full:
            reflowed = lambda params: sampling.euler(methods[FULL].velocity(params[FULL]))
            compared.append(Compared(f"{FULL}, Euler", f"{n} even steps", reflowed, even, n))
    return compared


def _segment_measures(
    settings: Settings, data, draws: Draws, models, methods, params, reference, cond
) -> list[dict[str, Any]]:
    """Return ``straightening.segment_measures`` of every model."""
    _, s = settings.straighten
    count = min(s.probes, data.train.count, reference.shape[1])
    keys = drawing.sample_keys(draws.seed, draws.seeds, count)
    real, source = np.asarray(data.train.x[:count]), settings.common.origin.training
    x0 = None if source.normal else source.examples(keys, real.shape[1:])
    conds = drawing.first(cond, count), drawing.first(data.train.cond if cond is not None else None, count)

    def of(model: SegmentedModel):
        @jax.jit
        def measure(params, states, real, x0):
            each = straightening.segment_velocities(model, methods, params)
            teacher = methods[TEACHER].velocity(params[TEACHER])
            return straightening.segment_measures(each, teacher, s.bounds, states, real, keys, *conds, x0)

        return jax.tree.map(float, measure(params, reference[:, :count], real, x0))

    return [model._asdict() | of(model) for model in models]


def _facts(along: Sequence[Mapping[str, Any]], spectra: Mapping[str, Any]) -> dict[str, str]:
    """Return the measures of the segments and of the spectra as text."""
    words = lambda m: "; ".join(
        f"{n} {', '.join(f'{v:.3g}' for v in m[n])}" for n in ("straightness", "jump", "departure")
    )
    facts = {"along the time axis": "\n".join(f"{m['part']}, {m['sharing']}: {words(m)}" for m in along)}
    low = [f"{name}: {spectrum.low_fraction(**values):.3f}" for name, values in spectra.items()]
    return facts | ({"fraction of the error below 1/5 cycle a pixel": "\n".join(low)} if low else {})
