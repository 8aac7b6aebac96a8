"""Reflow and half-straightening of a flow: a teacher, its trajectories, students on their chords, and a comparison.

``main(cfg, workdir)`` runs what is left of it. ``cfg.straighten`` has the fields of a training stage and

* ``seed``: of the trajectories' noise and of the students;
* ``bounds``, ``parts``, ``sharing``, ``full``: see ``straightening.models``;
* ``grid`` (``"even"`` or ``"edm"``), ``grid_steps``, ``solver``, ``examples``: how the teacher's trajectories are made;
* ``allocations``: numbers of Euler steps in each segment; ``reference_steps``: of the solver, for what samples are
  paired with;
* ``baselines``: evaluations a sample at which other samplers of the teacher are compared;
* ``probes``: examples of ``straightening.measures``.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import checks, sampling, straightening
from fmjax.correction import marginals, trajectories
from fmjax.data import arrays
from fmjax.experiments import assemble, evaluate, report, specs, workdir
from fmjax.experiments import marginals as marginal_sets
from fmjax.experiments.report import Row
from fmjax.keys import fold_in, normal
from fmjax.metrics import spectrum
from fmjax.metrics.two_sample import mean_se
from fmjax.sampling import diffusion, grids
from fmjax.storage import checkpoint, files
from fmjax.straightening import segments
from fmjax.straightening.models import FULL, TEACHER
from fmjax.training import logs, loop
from fmjax.types import Batch, Method, Params

GRIDS = ("even", "edm")
GITS = {"n": 60, "examples": 256, "growth": 1.15}
STAGE = "straighten"
SHOWN = 12  # examples of each sampler, of the same noise
NOTES = [
    *evaluate.NOTES,
    "Paired error: the mean square difference of a sample from the teacher's own, of the same noise and many steps.",
    "(m, n): m Euler steps in the first segment and n in the second; a step is one evaluation.",
]


class Setup(NamedTuple):
    """All that the stages need, checked."""

    data: arrays.Splits
    flow: loop.Plan
    models: list[straightening.Model]
    students: dict[str, dict[str, Any]]


def setup(cfg) -> Setup:
    """Assembles and checks everything; raises ``ValueError`` of one sentence before any work."""
    if STAGE not in cfg:
        raise ValueError(f"this config has no {STAGE!r}; configs/half_straightening_digits.py has one")
    if cfg.classes:
        raise ValueError(f"classes={cfg.classes}: trajectories have no labels; straighten a flow without classes")
    if cfg.path != "linear":
        raise ValueError(f"path={cfg.path!r}: this comparison is on the linear path; use methods.straighten on others")
    s = cfg.straighten
    if s.grid not in GRIDS:
        raise ValueError(f"straighten.grid={s.grid!r} must be one of {', '.join(GRIDS)}{checks.nearest(s.grid, GRIDS)}")
    trajectories.check_how("forward", s.solver, "reverse")
    data = specs.data(cfg.data)
    evaluate.check_sampling(cfg.sampling, data)
    models, students = straightening.models(s.bounds, s.parts.to_dict(), s.sharing, full=s.full)
    for counts in s.allocations:
        segments.grid(s.bounds, counts)
    if s.bounds[0] != 0 or s.bounds[-1] != 1:
        raise ValueError(
            f"straighten.bounds={tuple(s.bounds)} must go from 0 to 1: samples start in noise and end as data"
        )
    flow = assemble.assemble(cfg, data=data)
    x = np.resize(data.train_x, (s.batch_size, *data.train_x.shape[1:]))
    still = Batch(x1=x, x0=x, t=np.full(len(x), s.bounds[0], np.float32))
    for options in students.values():
        _plan(cfg, options, lambda n: still)
    return Setup(data, flow, models, students)


def main(cfg, path: str | Path) -> None:
    """Trains what is missing of teacher and students in the workdir ``path`` and compares them.

    Writes ``straightened.json`` and ``report.html``; prints a line a stage. Raises as ``setup``, ``run.train``,
    ``workdir.open_workdir`` and ``marginals.build`` do; ``ValueError`` on several processes: start one.
    """
    if jax.process_count() > 1:
        raise ValueError("the comparison runs in one process (on all its devices); train on several with launch.train")
    ready = setup(cfg)
    path = workdir.open_workdir(path, cfg.to_dict(), free=assemble.free(cfg))
    if (path / "report.html").exists() and (path / "straightened.json").exists():
        print(f"the run in {path} is complete: open {path / 'report.html'}")
        return
    methods, params = fit(cfg, ready, path)
    with logs.stage("comparison") as tell:
        found, shown = compare(cfg, ready, methods, params)
        files.write_json(path / "straightened.json", found | {"environment": workdir.environment()})
        report.write(path / "report.html", _contents(cfg, path, ready, found, shown))
        tell(f"{len(found['rows'])} samplers; open {path / 'report.html'}")


def fit(cfg, ready: Setup, path: Path) -> tuple[dict[str, Method], dict[str, Params]]:
    """The methods and the averaged parameters of teacher and students by name, trained in ``path`` or read there."""
    with logs.stage(TEACHER) as tell:
        flow = loop.train(ready.flow, path / "flow").ema
        tell(f"{ready.flow.steps} steps")
    with logs.stage("trajectories") as tell:
        ends = _trajectories(cfg, ready, flow, path / "trajectories")
        tell(f"{len(ends.x)} of the teacher, at {', '.join(f'{t:g}' for t in ends.ts)}")
    params, methods = {TEACHER: flow}, {TEACHER: ready.flow.method}
    with logs.stage("students") as tell:
        for name, options in ready.students.items():
            plan = _plan(cfg, options, _batches(cfg, ready.data, ends, options))
            folder = path / "students" / files.slug(name)
            params[name] = loop.train(plan, folder, params=flow, teacher=flow).ema
            methods[name] = plan.method
        tell(f"{len(ready.students)} of {cfg.straighten.steps} steps")
    return methods, params


def _plan(cfg, options: dict[str, Any], batch) -> loop.Plan:
    """The plan of a student."""
    cfg = copy.deepcopy(cfg)
    with cfg.unlocked(), cfg.ignore_type():
        cfg.straighten.method = {**cfg.straighten.method.to_dict(), **options}
    return assemble.assemble(cfg, STAGE, batch=batch)._replace(seed=cfg.straighten.seed)


def _batches(cfg, data: arrays.Splits, ends: marginals.Marginals, options: dict[str, Any]):
    """The batches of a student; half of each is real data in the kept segments, where it is held to the teacher."""
    s, keep = cfg.straighten, options.get("keep", ())
    how = {"keep": keep, "real": data.train_x, "kept_share": 0.5 if options.get("retention", 1.0) else 0.0}
    how = how if keep else {}
    return segments.batches(ends, options["bounds"], batch_size=s.batch_size, seed=s.seed, **how)


def teacher_grid(kind: str, steps: int, bounds) -> tuple[np.ndarray, tuple[int, ...]]:
    """The teacher's grid from 0 to 1, even or EDM's, with the bounds among its points, and their indices."""
    ts = grids.uniform_grid(steps) if kind == "even" else np.append(np.float32(0), grids.edm_grid(steps))
    return segments.inserted(ts, bounds)


def _trajectories(cfg, ready: Setup, flow: Params, directory: Path) -> marginals.Marginals:
    """The teacher's states at the bounds, built or read."""
    s, digest = cfg.straighten, checkpoint.digest(flow)
    ts, index = teacher_grid(s.grid, s.grid_steps, s.bounds)
    make = functools.partial(
        marginals.build, ready.flow.method.velocity, flow, ts, directory=directory, direction="forward", flow=digest,
        count=s.examples, shape=ready.data.train_x.shape[1:], seed=s.seed, solver=s.solver, steps=index,
        mesh=ready.flow.mesh,
    )  # fmt: skip
    marginal_sets.with_bar(make, "forward")
    return marginals.read(directory, expect={"flow": digest, "ts": ts})


class Sampler(NamedTuple):
    """A row: a step of the parameters, its grid, and evaluations a sample. It starts from ``(1 - ts[0])`` noise."""

    family: str
    name: str
    step_of: Any
    ts: np.ndarray
    nfe: int
    counts: tuple[int, ...] = ()


def compare(cfg, ready: Setup, methods: dict[str, Method], params: dict[str, Params]) -> tuple[dict, dict]:
    """Rows, measures of every model, spectra of the errors; and samples to look at.

    All are of the same noise; means and errors are over ``cfg.sampling.seeds`` batches of ``cfg.sampling.samples``.
    """
    s, shape = cfg.straighten, ready.data.train_x.shape[1:]
    noise = jnp.concatenate(
        [
            normal(fold_in(evaluate.keys_of(cfg.seed, i, cfg.sampling.samples), 0), shape)
            for i in range(cfg.sampling.seeds)
        ]
    )
    flow = methods[TEACHER].velocity
    ts, index = teacher_grid(s.grid, s.reference_steps, s.bounds)
    reference = draw(lambda params: specs.step(s.solver)(flow(params[TEACHER])), params, noise, ts, index)
    metrics, _ = evaluate.distances(ready.data)
    by_seed = lambda x: x.reshape(cfg.sampling.seeds, cfg.sampling.samples, *x.shape[1:])
    nfe = evaluate.stages(s.solver) * (len(ts) - 1)
    many = Sampler(f"{TEACHER}, {s.solver}", f"{len(ts) - 1} steps", None, ts, nfe)
    rows, spectra = [], {}
    shown = {"held-out data": ready.data.test_x, f"{many.family}, {many.name}": reference[-1]}
    found = [*_allocated(cfg, ready.models, methods), *_baselines(cfg, ready, methods, params, noise)]

    def measured(sampler: Sampler, states) -> None:
        x = by_seed(states[-1])
        row = {"family": sampler.family, "name": sampler.name, "NFE": sampler.nfe, "counts": sampler.counts}
        each = {name: [f(a) for a in x] for name, f in metrics.items()}
        each["paired error"] = [float(np.mean((a - b) ** 2)) for a, b in zip(x, by_seed(reference[-1]), strict=True)]
        rows.append(row | {name: mean_se(values) for name, values in each.items()})
        if len(states) > 1:  # at the inner bounds
            rows[-1]["drift"] = [
                float(np.mean((a - b) ** 2)) for a, b in zip(states[1:-1], reference[1:-1], strict=True)
            ]

    with logs.bar("samplers", len(found), unit="sampler") as progress:
        for one in found:
            at = tuple(np.cumsum((0, *one.counts))) if one.counts else (len(one.ts) - 1,)
            states = draw(one.step_of, params, noise, one.ts, at)
            measured(one, states)
            shown[f"{one.family}, {one.name}"] = states[-1]
            if len(shape) == 3 and one.counts:
                frequency, power = spectrum.radial(states[-1] - reference[-1])
                spectra[f"{one.family}, {one.name}"] = {"frequency": frequency, "power": power}
            progress.update()
    measured(many, reference[-1:])
    floor = evaluate.training_samples(ready.data, seeds=cfg.sampling.seeds, samples=cfg.sampling.samples, seed=cfg.seed)
    floors = {name: mean_se([f(x) for x in floor]) for name, f in metrics.items()}
    along = _measures(cfg, ready, methods, params, reference)
    return {"rows": rows, "floor": floors, "segments": along, "spectra": spectra}, shown


def draw(step_of, params, noise, ts, at, chunk: int = evaluate.CHUNK) -> np.ndarray:
    """The states ``[len(at), n, ...]`` at the indices ``at`` of the grid, from ``(1 - ts[0])`` times the noise."""

    @jax.jit
    def states(params, x0):
        alone = tuple(at) == (len(ts) - 1,)
        x = sampling.sample(step_of(params), (1 - ts[0]) * x0, ts, trajectory=not alone)
        return x[None] if alone else x[np.asarray(at)]

    parts = [np.asarray(states(params, noise[i : i + chunk])) for i in range(0, len(noise), chunk)]
    return np.concatenate(parts, 1)


def _allocated(cfg, models, methods) -> list[Sampler]:
    """Every model with every allocation of Euler steps."""
    s, found = cfg.straighten, []
    for model in models:
        family = model.sharing if model.sharing in (TEACHER, FULL) else f"{model.part}, {model.sharing}"

        def step_of(params, model=model):
            return straightening.step(straightening.velocities(model, methods, params), s.bounds)

        for counts in map(tuple, s.allocations):
            grid, told = segments.grid(s.bounds, counts), ", ".join(map(str, counts))
            found.append(Sampler(family, f"({told})", step_of, grid, sum(counts), counts))
    return found


def _baselines(cfg, ready: Setup, methods, params, noise) -> list[Sampler]:
    """Other samplers of the teacher, and Euler steps of the full reflow, at equal numbers of evaluations."""
    s, flow = cfg.straighten, methods[TEACHER].velocity
    if not s.baselines:
        return []
    found = []
    of = lambda make: lambda params: make(flow(params[TEACHER]))
    fine = grids.edm_grid(GITS["n"])
    along = draw(of(diffusion.edm_heun), params, noise[: GITS["examples"]], fine, range(len(fine)))
    of_jumps = lambda params, xs: sampling.jump_costs(diffusion.ddim(flow(params)), xs, fine)
    costs = np.asarray(jax.jit(of_jumps)(params[TEACHER], along))
    for n in s.baselines:
        even, levels = grids.uniform_grid(n), grids.edm_grid(n)
        heun = grids.edm_grid((n + 1) // 2)
        best = fine[list(sampling.best_steps(costs, n, growth=GITS["growth"]))]
        found += [
            Sampler(f"{TEACHER}, Euler", f"{n} even steps", of(sampling.euler), even, n),
            Sampler(f"{TEACHER}, Euler on EDM's grid", f"of {n}", of(sampling.euler), levels, n),
            Sampler(
                f"{TEACHER}, EDM's Heun", f"grid of {len(heun) - 1}", of(diffusion.edm_heun), heun, 2 * len(heun) - 3
            ),
            Sampler(f"{TEACHER}, DPM-Solver++(2M)", f"grid of {n}", of(sampling.dpmpp_2m), levels, n),
            Sampler(f"{TEACHER}, DDIM", f"GITS's grid of {n}", of(diffusion.ddim), best, n),
        ]
        if s.full:
            reflowed = lambda params: sampling.euler(methods[FULL].velocity(params[FULL]))
            found.append(Sampler(f"{FULL}, Euler", f"{n} even steps", reflowed, even, n))
    return found


def _measures(cfg, ready: Setup, methods, params, reference) -> list[dict[str, Any]]:
    """``straightening.measures`` of every model."""
    s, real = cfg.straighten, ready.data.train_x
    count = min(s.probes, len(real), reference.shape[1])
    keys = evaluate.keys_of(cfg.seed, cfg.sampling.seeds, count)

    def of(model):
        @jax.jit
        def measure(params, states, real):
            each = straightening.velocities(model, methods, params)
            teacher = methods[TEACHER].velocity(params[TEACHER])
            return straightening.measures(each, teacher, s.bounds, states, real, keys)

        return jax.tree.map(float, measure(params, reference[:, :count], real[:count]))

    return [model._asdict() | of(model) for model in ready.models]


def _contents(cfg, path: Path, ready: Setup, found, shown) -> report.Contents:
    """The page: rows, samples, losses, measures."""
    told = ("family", "name", "NFE", "counts", "drift")
    rows = [
        Row(f"{r['family']} {r['name']}", r["family"], r["NFE"], 0, {k: v for k, v in r.items() if k not in told})
        for r in found["rows"]
    ]
    rows.append(Row("training data", report.REFERENCE, 0, 0, found["floor"]))
    curves = {}
    for folder in (path / "flow", *sorted((path / "students").iterdir())):
        records = files.read_jsonl(folder / "metrics.jsonl")
        curves[folder.name] = tuple(np.array([r[name] for r in records]) for name in ("step", "loss"))
    measured = [
        f"{m['part']}, {m['sharing']}: "
        + "; ".join(
            f"{name} {', '.join(f'{v:.3g}' for v in m[name])}" for name in ("straightness", "jump", "departure")
        )
        for m in found["segments"]
    ]
    low = [f"{name}: {spectrum.low_share(**one):.3f}" for name, one in found["spectra"].items()]
    facts = {"along the time axis": "\n".join(measured)}
    facts |= {"share of the error below 1/5 cycle a pixel": "\n".join(low)} if low else {}
    facts |= {
        "environment": json.dumps(workdir.environment(), indent=1),
        "config": json.dumps(cfg.to_dict(), indent=1, default=list),
    }
    shape = ready.data.train_x.shape[1:]
    grids = {k: x[:SHOWN] for k, x in shown.items()} if len(shape) == 3 or shape == (2,) else {}
    title = f"fmjax: {cfg.data if isinstance(cfg.data, str) else cfg.data.name}, straightened"
    return report.Contents(title, evaluate.best(rows), rows, [], grids, {}, curves, {}, facts, NOTES)
