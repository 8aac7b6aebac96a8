"""Choose the steps and the strengths of the corrections of a finished run.

Steps and strengths are chosen on validation examples and reported on test examples, with different noise. Where the
source is a data set, the search starts from its validation examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np

from fmjax import checks, correction
from fmjax.checks import Finite, NonNegativeFloat, Positive, Range, Refusal, check_hints
from fmjax.experiments import assemble, build, comparison, drawing, networks, pages, report, samplers, workdir
from fmjax.experiments.compared import draw_compared
from fmjax.experiments.drawing import Draws, Models
from fmjax.experiments.samplers import FLOW, Sampler
from fmjax.experiments.settings import Settings
from fmjax.keys import as_keys
from fmjax.metrics import Metric
from fmjax.storage import files
from fmjax.training import logs

# by whether the corrector is a classifier
ALPHAS = {True: (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0), False: (0.1, 0.25, 0.5, 0.75, 1.0)}
BETAS = (0.0, 0.5, 1.0, 2.0)  # multiples of the noise level of a score corrector
TUNING = 4  # purpose of the keys of the search


@workdir.owner
def main(
    settings: Settings,
    path: Path,
    *,
    by: str,
    solver: str,
    solver_steps: Annotated[int, Range(1, 100_000)],
    metric: str | None = None,
    most: Positive | None = 3,
    seeds: Annotated[int, Range(2, 1e6)] = 4,
    alpha: Sequence[Finite] | None = None,
    beta: Sequence[NonNegativeFloat] | None = None,
) -> None:
    """Tune a corrector of a finished run for one plain sampler.

    The search evaluates single corrections of every step over ``alpha x beta``, then adds steps greedily
    (``correction.choose``), by the mean of a distance over ``seeds`` runs of ``sampling.samples``. The winner, its
    noise without the corrector, and the sampler without correction are then compared on ``sampling.seeds`` other runs.
    Results lie in ``path/tuning``, and a killed search continues. Prints the entry for ``corrections`` of a config.

    Args:
        settings: the config.
        path: the run folder.
        by: the corrector.
        solver: the solver, or ``"flow_map"``.
        solver_steps: number of steps of the solver.
        metric: name of the distance; by default the first of the config's.
        most: largest number of corrections.
        seeds: number of runs per mean.
        alpha: candidate strengths.
        beta: candidate noise levels.

    Raises:
        ValueError: a corrector or distance that does not exist (with the nearest), or too few runs.
        WorkdirError: a run that is not complete.
    """
    check_hints(main, {"solver_steps": solver_steps, "most": most, "seeds": seeds, "alpha": alpha, "beta": beta})
    data = build.data(settings.common.data)
    checks.check_choice("by", by, settings.correctors, "corrector")
    if settings.sampling.seeds < 3:
        raise Refusal("sampling.seeds", settings.sampling.seeds, "errors need more runs", "Give 3 or more")
    steps, space = solver_steps, _search_space(settings, by, solver_steps, alpha or (), beta or ())
    everywhere = Sampler("tuned", "tuned", solver, steps, None, space.steps, by, {"alpha": 1.0, "beta": 0.0})
    workdir.network_folder(path)
    workdir.open_workdir(path, settings.config, {FLOW: assemble.flow_fields(settings)})
    models, identity, _ = networks.load_models(settings, path)
    if by not in models.methods:
        raise workdir.WorkdirError(f"workdir={path}: its corrector {by!r} is not trained. Complete launch.pipeline.")
    distance = _chosen_metric(comparison.distances(settings, data, data.validation), metric)
    plain = samplers.plain_samplers({solver: (steps,)})[0]
    folder = path / "tuning" / files.slug(f"{by} {plain.name} {distance.name}")
    draws = comparison.draws_of(settings, data)
    searched = models._replace(source=settings.common.origin.tuning)
    choice = _search(everywhere, searched, draws, distance, space, most, seeds, folder, identity)
    best = choice.chosen.placement
    entry = {"solver": solver, "steps": steps, "by": by, **{k: list(v) for k, v in best._asdict().items()}}
    tuned = samplers.corrected_samplers({"tuned": entry} if best.at else {}, [plain], [by])
    names = [plain, *tuned]
    drawn = draw_compared(names, models, draws, directory=path / "draws", identity=identity)
    metrics = comparison.distances(settings, data, data.test)
    table = comparison.compare(names, drawn.x, drawn.costs, metrics, comparison.training_runs(data, draws))
    contents = pages.tuning(data, choice, distance.name, plain.name, table, drawn.x, entry)
    report.write_report(folder / "report.html", contents)
    for sentence in contents.summary:
        print(sentence)
    print(f"corrections.tuned = {entry}" if best.at else "corrections: none")
    print(f"open {folder / 'report.html'}")


def _search_space(settings: Settings, by: str, steps: int, alphas, betas) -> correction.Space:
    """Return the steps, strengths and noise levels of the search; refuse a negative noise level."""
    part = settings.correctors[by]
    classifies = assemble.gives_logit(settings.flow.net if part.net is None else part.net)
    method = part.method
    level = float(np.max(method["sigma"])) if hasattr(method, "items") and "sigma" in method else 0.0
    betas = tuple(betas) or tuple(beta * level for beta in BETAS[: None if level else 1])
    if min(betas) < 0:
        raise Refusal("beta", betas, "a standard deviation is not negative", "Give 0 or more")
    return correction.Space(steps, tuple(range(steps + 1)), tuple(alphas) or ALPHAS[classifies], betas)


def _chosen_metric(metrics: Sequence[Metric], name: str | None) -> Metric:
    """Return the metric of a name, by default the first."""
    by_name = {metric.name: metric for metric in metrics}
    if name is None:
        return metrics[0]
    checks.check_choice("metric", name, by_name, "distance")
    return by_name[name]


def _search(
    everywhere: Sampler, models: Models, draws: Draws, metric: Metric, space, most, seeds: int, folder: Path, identity
):
    """Search the space; values are stored in ``folder`` and are not computed twice."""
    program, steps = drawing.program(everywhere, models), everywhere.steps
    runs = len(space.steps) * len(space.alpha) * len(space.beta) * seeds
    words = f"{draws.samples} samples for single corrections, then the runs of the greedy search"
    print(f"{everywhere.solver}, {steps} steps, {everywhere.by}: {runs} runs of {words}")
    with logs.bar("runs", runs, unit="run") as progress:

        def distance(at, key) -> float:
            alpha, beta = map(jnp.asarray, at.dense(steps))
            options, keys = {"alpha": alpha, "beta": beta}, as_keys(key, draws.samples)
            run = lambda keys, cond: program(models.params, keys, cond, options)
            progress.update()
            return metric.distance(drawing.in_chunks(run, keys, draws.cond))

        key = lambda n, purpose: jnp.stack([drawing.run_key(draws.seed, i, purpose) for i in range(n)])
        what = {"samples": draws.samples, "params": identity, "by": everywhere.by, "metric": metric.name}
        value = correction.Evaluations(
            distance, tuning=key(seeds, TUNING), reporting=key(draws.seeds, 3), directory=folder,
            identity=what | {"solver": everywhere.solver, "steps": steps},
        )  # fmt: skip
        return correction.choose(value, space, most=most, record=folder / "choice.json")
