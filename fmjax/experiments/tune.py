"""Chooses where and how strongly the corrections of a finished run are made: ``fmjax.tune`` on ``fmjax.pipeline``'s.

What is chosen is chosen on noise of its own; the table of the page is of the noise of the run's own table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fmjax import checks
from fmjax.correction import search
from fmjax.experiments import assemble, evaluate, pipeline, report, workdir
from fmjax.keys import as_keys
from fmjax.sampling import grids
from fmjax.storage import checkpoint, files
from fmjax.training import logs

ALPHAS = {True: (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0), False: (0.1, 0.25, 0.5, 0.75, 1.0)}  # by whether it classifies
BETAS = (0.0, 0.5, 1.0, 2.0)  # of a score's noise level
TUNING = 4  # what its noise is drawn for, apart from what is reported
NOTES = [
    *evaluate.NOTES,
    "Steps, alpha and beta were chosen on other noise than the table's; influence and sensitivity are of that noise.",
]


def main(
    cfg,
    path: str | Path,
    *,
    by: str,
    solver: str,
    steps: int,
    metric: str | None = None,
    most: int | None = 3,
    seeds: int = 4,
    alphas: Sequence[float] = (),
    betas: Sequence[float] = (),
) -> None:
    """Tunes the corrector ``by`` of the run in ``path`` for ``steps`` of ``solver`` (or of its flow map).

    The best single correction of every step over ``alphas x betas``, greedy search for up to ``most`` steps
    (``tune.choose``), the distance ``metric`` (by default the first of the run's) meaned over ``seeds`` runs of
    ``cfg.sampling.samples``; then the table of the winner, of its noise alone and of no correction, of
    ``cfg.sampling.seeds`` other runs. All of it lies in ``path/tuning``, and is taken up again after a kill; printed is
    what a config's ``corrections`` take.

    Raises ``ValueError`` for a name that is not there (with the nearest), fewer than three seeds to report, a run that
    is not at its end; ``WorkdirError`` for one of another config, whose ``corrections`` may differ.
    """
    ready = pipeline.setup(cfg)
    plan = ready.correctors.get(by)
    if plan is None:
        raise ValueError(f"no corrector {by!r}{checks.nearest(by, ready.correctors)} ({_known(ready.correctors)})")
    if cfg.sampling.seeds < 3 or seeds < 1:
        raise ValueError(f"sampling.seeds={cfg.sampling.seeds} must be 3 or more, seeds={seeds} 1 or more")
    kind = pipeline.classifies(plan)
    noise = _noise(cfg.correctors[by].method)
    space = search.Space(
        steps,
        tuple(range(steps + 1)),
        tuple(alphas) or ALPHAS[kind],
        tuple(betas) or tuple(beta * noise for beta in BETAS[: None if noise else 1]),
    )
    if min(space.beta) < 0:
        raise ValueError(f"betas={space.beta} are standard deviations and cannot be negative")
    everywhere = {"solver": solver, "steps": steps, "at": space.steps, "by": by, "alpha": 1.0}
    (plain, setting) = evaluate.settings({solver: (steps,)}, {"tuned": everywhere}, {by: 1 + kind})
    models = pipeline.read_models(ready, Path(path))
    path = workdir.open_workdir(path, cfg.to_dict(), free=(*assemble.free(cfg), "corrections"))
    metrics, _ = evaluate.distances(ready.data)
    metric = metric or next(iter(metrics))
    if metric not in metrics:
        raise ValueError(f"no distance {metric!r}{checks.nearest(metric, metrics)} ({_known(metrics)})")

    count, identity = cfg.sampling.samples, checkpoint.digest(models.params)
    folder = path / "tuning" / files.slug(f"{by} {plain.name} {metric}")
    runs = len(space.steps) * len(space.alpha) * len(space.beta) * seeds
    print(f"{plain.name}, {by}: {runs} runs of {count} samples for single corrections, then those of the greedy search")
    draw = evaluate.sampler(setting, models)

    with logs.bar("runs", runs, unit="run") as progress:

        def distance(at: search.Placement, key) -> float:
            keys, strengths = as_keys(key, count), tuple(map(jnp.asarray, at.dense(steps)))
            parts = range(0, count, evaluate.CHUNK)
            x = [draw(models.params, keys[i : i + evaluate.CHUNK], None, strengths) for i in parts]
            progress.update()
            return metrics[metric](np.concatenate(x))

        what = {"samples": count, "params": identity, "by": by, "sampler": plain.name, "metric": metric}
        value = search.Evaluations(
            distance,
            tuning=_keys(cfg.seed, seeds, TUNING),
            reporting=_keys(cfg.seed, cfg.sampling.seeds),
            directory=folder,
            identity=what,
        )
        choice = search.choose(value, space, most=most, record=folder / "choice.json")

    best = choice.chosen.placement
    found = everywhere | best._asdict()
    settings = evaluate.settings({solver: (steps,)}, {"tuned": found} if best.at else {}, {by: 1 + kind})
    how = {"seeds": cfg.sampling.seeds, "samples": count, "seed": cfg.seed}
    drawn = {s: evaluate.draw(s, models, directory=path / "samples", identity=identity, **how) for s in settings}
    rows, verdicts = evaluate.compare(drawn, metrics, evaluate.training_samples(ready.data, **how))
    contents = _contents(ready, choice, metric, plain.name, rows, verdicts, drawn, found)
    page = report.write(folder / "report.html", contents)
    for sentence in contents.summary:
        print(sentence)
    print(f"corrections.tuned = {found}" if best.at else "corrections: none")
    print(f"open {page}")


def _noise(method: Any) -> float:
    """The largest noise level of a score corrector, zero of another."""
    return float(np.max(method["sigma"])) if "sigma" in getattr(method, "keys", tuple)() else 0.0


def _keys(seed: int, n: int, *what: int):
    return jnp.stack([evaluate.key_of(seed, i, *what) for i in range(n)])


def _known(names) -> str:
    return f"there are {', '.join(names)}"


def _contents(ready, choice: search.Choice, metric, sampler, rows, verdicts, drawn, found) -> report.Contents:
    n, ts = evaluate.SHOWN, grids.uniform_grid(len(choice.influence) - 1)
    told = lambda r: report.plus_minus(r.mean, r.error)
    best = choice.chosen.placement
    where = "; ".join(f"alpha {a:g}, beta {b:g} at step {i}" for i, a, b in zip(*best, strict=True)) or "none"
    level = choice.path[0].value
    alone = np.array([trial.value for trial in choice.influence])
    lines = {"one correction, its best strength": alone, "none": np.full(len(ts), level)}
    zeros = np.zeros(len(ts))
    shown = {"held-out data": ready.data.test_x[:n]} | {s.name: x[0, :n] for s, x in drawn.items()}
    steps = [f"{len(t.placement.at)}: {t.value:.4g}" for t in choice.path]
    return report.Contents(
        f"fmjax: corrections of {sampler}",
        [
            f"{sampler}: {metric} {told(choice.plain)} without corrections, {told(choice.reported)} with {where}.",
            f"On the noise that it was chosen on: {level:.4g} without, {choice.chosen.value:.4g} with.",
        ],
        rows,
        verdicts,
        shown if ready.data.train_x.ndim == 4 else {},
        {},
        {},
        {},
        {
            "greedy search, number of corrections: value": "; ".join(steps),
            "value where all alphas are multiplied": json.dumps(choice.sensitivity),
            "corrections of a config": json.dumps({"tuned": found}),
            "environment": json.dumps(workdir.environment(), indent=1),
        },
        NOTES,
        {name: (ts, y, zeros) for name, y in lines.items() if np.isfinite(y).all()},
    )
