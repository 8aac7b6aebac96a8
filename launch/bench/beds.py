"""Test beds of the suites on corrections: a flow, its marginals, correctors, and samplers with tuned strengths.

A test bed is a trained flow, its marginals on grids of 10 and of 50 steps, and correctors trained on each grid. The
networks are stored in ``workdir/bench/NAME_corrected``, and a stopped suite continues there. Strengths are chosen on
validation data by the first metric, with tuning keys; the tables use test data and other keys. All rows of a table
start from the same noise.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from fmjax import correction, metrics, sampling
from fmjax.correction import Evaluations, Marginals, Placement
from fmjax.data import Dataset, in_memory
from fmjax.experiments import assemble, build, comparison, drawing, measuring, report, settings
from fmjax.experiments.drawing import Draws, Models
from fmjax.experiments.samplers import DRIFT, FLOW, Sampler
from fmjax.keys import as_keys
from fmjax.metrics import Metric
from fmjax.storage import checkpoint, files
from fmjax.training import loop
from fmjax.types import Method, Params
from launch.bench import runs
from launch.bench.measure import FOLDER

SIGMA, SHORT, LONG, LANGEVIN = 0.2, 10, 50, 20  # noise level of the score; steps of the grids, and of Langevin
ALL = tuple(range(SHORT + 1))
AT = {"score": ((10,), (0, 5, 10), ALL), "classifier": ((10,), (0, 5, 10), (0, 2, 5, 8, 10), ALL)}
AT["plain classifier"] = ((10,), ALL)  # not robust, an ablation
ALPHAS = {
    "score": (0.1, 0.25, 0.5, 1.0),
    "classifier": (0.05, 0.2, 1.0, 4.0),
    "plain classifier": (0.01, 0.05, 0.2, 1.0),
    "drift": (0.25, 0.5, 1.0),
}
BETAS = (0.0, SIGMA / 2, SIGMA)  # noise levels of the score corrector; other correctors add no noise
TUNING, REPORTING = 11, 12  # seeds of the runs of samples
BANDWIDTH = 1.0  # of the kernel drift


class Problem(NamedTuple):
    """Data, networks and sizes of a test bed.

    Attributes:
        config: name of the config.
        fields: config fields that differ.
        score: network of the score corrector.
        classifier: network of the classifiers.
        steps: training steps by kind of network.
        examples: number of examples of the marginals, for the grids of 10 and of 50 steps.
        samples: samples per run.
        base: numbers of steps of samplers without corrections.
        seeds: number of runs in the table.
        tuning: number of runs of the search.
        at: corrected steps of the grid of 10, by kind of corrector.
        at_long: corrected steps of the grid of 10 whose times are corrected on the grid of 50.
        fractions: factors of alpha that are tried where correctors of one grid are used on another grid.
        betas: noise levels that are tried for the score corrector.
    """

    config: str
    fields: dict[str, Any]
    score: dict[str, Any]
    classifier: dict[str, Any]
    steps: dict[str, int]
    examples: tuple[int, int]
    samples: int
    base: tuple[int, ...]
    seeds: int = 3
    tuning: int = 2
    at: dict[str, tuple] = AT
    at_long: dict[str, tuple] = AT
    fractions: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    betas: tuple[float, ...] = BETAS


MLP = {"name": "mlp", "width": 256, "depth": 4}
PROBLEMS = {
    "digits": Problem(
        "digits",
        {"coupling": "independent"},
        MLP,
        {"name": "mlp", "width": 128, "depth": 3, "logit": True},
        {"score": 1500, "classifier": 600, "residual": 1500},
        (1257, 1257),
        360,
        (10, 11, 12, 13, 15, 20, 50, 100),
        seeds=4,
    ),
    "mnist": Problem(
        "mnist",
        runs.MNIST,
        runs.SMALL_DIT,
        {"name": "mlp", "width": 256, "depth": 3, "logit": True},
        {"score": 1500, "classifier": 1500, "residual": 1000},
        (3000, 1000),
        250,
        (10, 11, 12, 15, 50, 100),
        tuning=1,
        at={kind: AT[kind] for kind in ("score", "classifier")},
        at_long={"score": ((10,), ALL), "classifier": (ALL,)},
        fractions=(0.5, 1.0),
        betas=BETAS[:2],
    ),
    "straightened": Problem(
        "half_straightening_digits",
        {},
        MLP,
        {"name": "mlp", "width": 128, "depth": 3, "logit": True},
        {"score": 1500, "classifier": 600},
        (4000, 0),
        1250,
        (),
    ),
}


class Bed(NamedTuple):
    """A trained test bed.

    Attributes:
        problem: data, networks and sizes.
        plan: training plan of the flow.
        data: the data set.
        flow: parameters of the flow.
        metrics: metrics to test data, for the tables.
        choosing: metric to validation data, for the choice of strengths.
        folder: folder of all stages.
    """

    problem: Problem
    plan: loop.Plan
    data: Dataset
    flow: Params
    metrics: list[Metric]
    choosing: Metric
    folder: Path


def bed(name: str, folder: Path | None = None) -> Bed:
    """Train the flow of a problem in ``folder / "flow"``, or read the flow."""
    problem, folder = PROBLEMS[name], folder or FOLDER / f"{name}_corrected"
    config = configured(problem)
    data = build.data(config.common.data)
    plan = assemble.flow_plan(config, data)
    flow = loop.train(plan, folder / "flow").ema
    data = in_memory(data, train=20_000, validation=2_000, test=2_000, seed=0)
    choosing = comparison.distances(config, data, data.validation)[0]
    distances = comparison.distances(config, data, data.test)
    cache = files.cache_folder() / "features"
    net = metrics.small_classifier(data.train.x, data.train.cond, cache_dir=cache, levels=data.levels)
    embed = lambda x: net.features(metrics.quantise(x, data.levels))
    real = embed(data.test.x)
    for i, name in enumerate(("precision", "recall")):
        value = lambda x, i=i: metrics.precision_recall(real[: len(x)], embed(x)[: len(real)])[i]
        distances.append(Metric(name, value))
    apart = float(nearest(data.test.x, data.train.x))  # below 1: samples are nearer to training data than test data are
    distances.append(Metric("to training", lambda x: float(nearest(x, data.train.x)) / apart))
    return Bed(problem, plan, data, flow, distances, choosing, folder)


def configured(problem: Problem, **changes) -> settings.Settings:
    """Return the checked config of a problem."""
    return settings.read(runs.config(problem.config, problem.fields | changes))


@jax.jit
def nearest(x, others):
    """Return the mean distance of examples to the nearest of other examples."""
    x, others = (a.reshape(len(a), -1) for a in (x, others))
    square = (x**2).sum(1)[:, None] - 2 * x @ others.T + (others**2).sum(1)
    return jnp.sqrt(jnp.maximum(square.min(1), 0)).mean()


def sets(b: Bed, name: str, view, params: Params, ts, count: int, **options) -> tuple[Marginals, Marginals]:
    """Build forward and backward marginals at the times of the grid of ten steps, or at all times of a shorter grid."""
    n = len(ts) - 1
    common = {"flow": checkpoint.digest(params), "steps": range(0, n + 1, max(1, n // SHORT)), **options}
    starts = {
        "forward": {"count": count, "shape": b.data.train.x.shape[1:], "seed": 1},
        "backward": {"data": b.data.train.x[:count]},
    }
    for direction, start in starts.items():
        folder = b.folder / "marginals" / name / direction
        correction.build_marginals(view, params, ts, directory=folder, direction=direction, **common, **start)
    return tuple(correction.read_marginals(b.folder / "marginals" / name / direction) for direction in starts)


def corrector(b: Bed, kind: str, name: str, p: Marginals, q: Marginals) -> tuple[Method, Params]:
    """Train a corrector on a pair of marginals, or read the corrector."""
    classifier = lambda **options: {
        "method": {"name": "classifier_corrector", **options}, "net": b.problem.classifier, "weight_decay": 0.05
    }  # fmt: skip
    fields = {
        "score": {"method": {"name": "score_corrector", "sigma": SIGMA}, "net": b.problem.score},
        "classifier": classifier(eps=0.5, steps=3),
        "plain classifier": classifier(eps=0.0),
    }[kind]
    fields |= {"steps": b.problem.steps[kind.removeprefix("plain ")], "learning_rate": 1e-3}
    stage = base.stage(runs.config(b.problem.config, b.problem.fields), **fields)
    batch = correction.marginal_pairs(p, q, batch_size=stage["batch_size"], seed=0)
    plan = assemble.corrector_plan(configured(b.problem, correctors={kind: stage}), kind, b.data, batch)
    return plan.method, loop.train(plan, b.folder / f"{kind}-{name}").ema


def residual(b: Bed) -> tuple[Method, Params]:
    """Train the residual velocity over the frozen flow, or read it."""
    fields = {"method": "residual", "target": "frozen", "teacher": str(b.folder / "flow")}
    config = configured(b.problem, steps=b.problem.steps["residual"], learning_rate=1e-3, **fields)
    plan = assemble.flow_plan(config, b.data)
    start = loop.merge_parameters(plan, {"base": b.flow})
    return plan.method, loop.train(plan, b.folder / "residual", params=start, teacher=start).ema


def networks(b: Bed, methods: Mapping[str, Method] = {}, params: Mapping[str, Params] = {}, *, ts=None) -> Models:
    """Return the flow and other trained networks for samplers; ``ts`` are the times of the bank of marginals."""
    path = build.path("linear")
    return Models({FLOW: b.plan.method, **methods}, {FLOW: b.flow, **params}, b.data.train.x.shape[1:], path, ts)


def bank(p: Marginals, q: Marginals) -> dict[str, Params]:
    """Return marginals as the parameters of the kernel drift."""
    return {DRIFT: {"p": jnp.asarray(p.x), "q": jnp.asarray(q.x)}}


def plain(solver: Any, grid: Any) -> Sampler:
    """Return a sampler without corrections; ``grid`` is a number of uniform steps or an array of times."""
    if isinstance(grid, int):
        return Sampler("plain", "plain", solver, grid)
    return Sampler("plain", "plain", solver, len(grid) - 1, lambda n: grid)


def corrected(sampler: Sampler, by: str, at: tuple[int, ...], **options) -> Sampler:
    """Return a sampler with corrections at some steps; without options the strengths are to be chosen."""
    strengths = {"alpha": 1.0, "beta": 0.0} | ({"bandwidth": BANDWIDTH} if by == DRIFT else {})
    return sampler._replace(by=by, at=tuple(at), options=options or strengths)


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        label: the first columns.
        draw: ``draw(key, placement)`` returns a run of samples.
        params: the parameters, for the identity of stored evaluations.
        steps: number of solver steps.
        at: corrected steps.
        cost: network evaluations per sample.
        evaluations: FLOPs of a sample divided by the FLOPs of one evaluation of the flow.
        kind: the corrector; strengths are chosen for the kinds of ``ALPHAS``.
        candidates: strengths to choose from; by default ``ALPHAS`` and the noise levels of the problem.
        group: the change of the metric is relative to the first row of the same group; by default of the same steps.
    """

    label: dict[str, Any]
    draw: Callable[[Any, Placement], np.ndarray]
    params: Mapping[str, Params]
    steps: int
    at: tuple[int, ...]
    cost: sampling.Cost
    evaluations: float
    kind: str = "none"
    candidates: tuple[Placement, ...] = ()
    group: str = ""


def row(b: Bed, label: dict, sampler: Sampler, models: Models, evaluations: float, kind="none", **more) -> Row:
    """Return the row of a sampler; its program is compiled once for all strengths."""
    program = drawing.program(sampler, models)

    def draw(key, placement: Placement) -> np.ndarray:
        strengths = {"alpha": jnp.asarray(placement.alpha), "beta": jnp.asarray(placement.beta)}
        options = strengths if "alpha" in sampler.options else {}
        run = lambda keys: program(models.params, keys, None, options)
        return drawing.in_chunks(run, as_keys(key, b.problem.samples))

    cost = drawing.sampler_cost(sampler, models)
    return Row(label, draw, models.params, sampler.steps, sampler.at, cost, evaluations, kind, **more)


def chosen(b: Bed, r: Row) -> Placement:
    """Return the best strength on the tuning keys; every evaluation is stored in a file."""
    same = lambda alpha, beta: Placement(r.at, (alpha,) * len(r.at), (beta,) * len(r.at))
    betas = b.problem.betas if r.kind == "score" else (0.0,)
    candidates = r.candidates or tuple(same(alpha, beta) for alpha in ALPHAS.get(r.kind, ()) for beta in betas)
    if not candidates:
        return same(0.0, 0.0)
    value = Evaluations(
        lambda placement, key: b.choosing.distance(r.draw(key, placement)),
        tuning=keys(TUNING, b.problem.tuning),
        reporting=keys(REPORTING, b.problem.seeds),
        directory=b.folder / "tuning" / "-".join(files.slug(str(v)) for v in r.label.values()),
        identity={"params": checkpoint.digest(r.params), "samples": b.problem.samples},
    )
    return value.best(candidates).placement


def keys(seed: int, n: int):
    """Return the keys of ``n`` runs of samples."""
    return jax.random.split(jax.random.key(seed), n)


def measured(b: Bed, rows: list[Row]) -> list[dict]:
    """Return the table: metrics on the reporting keys, and the change of the first metric from the plain row."""
    first, table, baselines = b.metrics[0].name, [], {}
    text = lambda values: report.plus_minus(*metrics.mean_se(values))
    for r in rows:
        placement = chosen(b, r)
        samples = np.stack([r.draw(key, placement) for key in keys(REPORTING, b.problem.seeds)])
        values = measuring.measure(samples, b.metrics)
        before = baselines.setdefault(r.group or r.steps, values[first])
        change = "-" if r.kind == "none" else text([x - y for x, y in zip(values[first], before, strict=True)])
        strength = f"{placement.alpha[0]:g}, {placement.beta[0]:g}" if r.kind in ALPHAS else "-"
        costs = {"NFE": r.cost.nfe, "FLOPs / flow": round(r.evaluations, 1), "alpha, beta": strength}
        table.append(
            r.label | costs | {name: text(each) for name, each in values.items()} | {f"{first}, change": change}
        )
    draws = Draws(b.problem.seeds, b.problem.samples, 0)
    floor = measuring.measure(comparison.training_runs(b.data, draws), b.metrics)
    blank = dict.fromkeys(table[0], "-") | {next(iter(table[0])): "training data"}
    return [*table, blank | {name: text(each) for name, each in floor.items()}]


def flops(f: Callable, params: Params, b: Bed) -> float:
    """Return the FLOPs of an evaluation, counted by XLA."""
    x = jnp.zeros((8, *b.data.train.x.shape[1:]))
    return jax.jit(lambda params, x: f(params)(x, jnp.full(8, 0.5))).lower(params, x).compile().cost_analysis()["flops"]
