"""Evaluate the networks of a run folder: draw its samplers and compare them with test data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from fmjax.data import Dataset, in_memory
from fmjax.experiments import assemble, build, comparison, drawing, networks, pushes, report, workdir
from fmjax.experiments.compared import Drawn, compare_drawn, draw_compared
from fmjax.experiments.drawing import Models
from fmjax.experiments.results import curves
from fmjax.experiments.samplers import DRIFT, FLOW, FLOW_MAP, NOISE, Sampler
from fmjax.experiments.settings import Settings
from fmjax.storage import files
from fmjax.training import sharding

TRAIN, HELD_OUT = 50_000, 10_000  # examples of streamed data that samples are compared with


@workdir.owner
def main(settings: Settings, path: Path) -> None:
    """Draw the samplers of a config with the newest networks of a run folder, compare them, and write a report.

    Writes ``evaluation.json`` (mean and standard error over runs of every distance), ``evaluation.html`` and the
    samples into ``draws``; prints one line per sampler, and the number of samplers whose networks are not trained.

    Args:
        settings: the config; fields that no training depends on may differ from the fields of the run.
        path: the run folder of a flow, of a pipeline, or of a converted network.

    Raises:
        ValueError: a sampler that cannot be drawn.
        WorkdirError: no flow in the folder, or a flow of another config.
    """
    data = build.data(settings.common.data)
    draws = comparison.draws_of(settings, data)
    names = comparison.read_samplers(settings, flow_map=True)
    pushes.check(settings, data, names)
    workdir.network_folder(path)
    if jax.process_index() == 0:
        held = _in_memory_data(data, settings)
        metrics = comparison.distances(settings, held, held.test, names=names)
        comparison.choosing_distances(settings, held, names)
    workdir.open_workdir(path, settings.config, {FLOW: assemble.flow_fields(settings)})
    drift, shape = any(s.by == DRIFT for s in names), tuple(data.train.x.shape[1:])
    models, identity, step = networks.load_models(settings, path, drift=drift, shape=shape)
    names = _drawable(names, models, settings.correctors)
    if jax.process_index() == 0:
        comparison.check_teachers(metrics, names)
    for sampler in names:
        drawing.check_sampler(sampler, pushes.with_stand_ins(models, names, data), cond=draws.cond)
    models = pushes.add(models, pushes.fit_all(settings, data, names, models, path / pushes.STAGE))
    drawn = draw_compared(names, models, draws, directory=path / "draws", identity=identity)
    if jax.process_index() == 0:
        _write(settings, path, held, names, drawn, step)
    sharding.barrier("evaluation")


def _write(settings: Settings, path: Path, data: Dataset, names: list[Sampler], drawn: Drawn, step: int) -> None:
    """Compare the samples, write ``evaluation.json`` and ``evaluation.html``, and print the rows and the summary."""
    draws = comparison.draws_of(settings, data)
    page = compare_drawn(settings, data, draws, names, drawn, path)
    facts = {"step of the flow": str(step), "guidance": str(settings.common.guidance)}
    facts |= page.contents.facts | pushes.push_facts(drawn.models, names)
    files.write_json(path / "evaluation.json", page.record | {"step": step, "lines": page.lines})
    contents = page.contents._replace(curves=curves(path, [FLOW]), facts=facts)
    report.write_report(path / "evaluation.html", contents)
    for line in [*comparison.row_lines(contents.rows), *page.lines]:
        print(line)
    print(f"open {path / 'evaluation.html'}")


def _drawable(names: list[Sampler], models: Models, correctors: Iterable[str]) -> list[Sampler]:
    """Return the samplers whose networks are trained, with their baselines; print how many are left out."""
    missing = {FLOW_MAP, DRIFT, *correctors} - {*models.methods, *models.params}
    drawn = [s for s in names if s.by not in missing and not (s.solver == FLOW_MAP and FLOW_MAP in missing)]
    kept = {s.name for s in drawn}
    drawn = [s for s in drawn if s.baseline in (None, *kept)]
    controlled = {s.baseline for s in drawn}
    drawn = [s for s in drawn if s.by != NOISE or s.name in controlled]
    left = len(names) - len(drawn)
    if left and jax.process_index() == 0:
        print(f"{left} samplers of the config need networks that are not trained here; they are left out")
    return drawn


def _in_memory_data(data, settings: Settings):
    """Return the data set in memory; of streamed data a random part."""
    if isinstance(data.train.x, np.ndarray):
        return data
    return in_memory(data, train=TRAIN, validation=HELD_OUT, test=HELD_OUT, seed=settings.common.seed)
