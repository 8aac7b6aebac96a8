"""Test beds of the suites on corrections: a flow, its marginals, correctors, samplers whose strength is chosen.

A test bed is a flow by a network, its marginals on grids of 10 and of 50 steps, and correctors trained on each. All is
kept in ``workdir/bench/NAME_corrected`` and resumed there. Strengths are chosen on seeds of their own (``fmjax.tune``)
by the first metric, and what is reported is measured on others, from the same noise in every row.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import correction, sampling
from fmjax.correction import correctors, search
from fmjax.correction.marginals import Marginals
from fmjax.data import Dataset, in_memory
from fmjax.experiments import assemble, evaluate, report, specs
from fmjax.keys import as_keys, fold_in, normal
from fmjax.metrics import features, neighbours, two_sample
from fmjax.sampling import grids
from fmjax.storage import checkpoint, files
from fmjax.training import loop
from fmjax.types import Method, Params
from launch.bench import runs
from launch.bench.measure import FOLDER

SIGMA, SHORT, LONG, LANGEVIN = 0.2, 10, 50, 20  # the score's noise; steps of the grids, and of Langevin
ALL = tuple(range(SHORT + 1))
AT = {"score": ((10,), (0, 5, 10), ALL), "classifier": ((10,), (0, 5, 10), (0, 2, 5, 8, 10), ALL)}
AT["plain classifier"] = ((10,), ALL)  # not robust, an ablation
ALPHAS = {
    "score": (0.1, 0.25, 0.5, 1.0),
    "classifier": (0.05, 0.2, 1.0, 4.0),
    "plain classifier": (0.01, 0.05, 0.2, 1.0),
    "drift": (0.25, 0.5, 1.0),
}
BETAS = (0.0, SIGMA / 2, SIGMA)  # of the score; others draw no noise
TUNING, SEED = 11, 12


class Problem(NamedTuple):
    """Data, networks and sizes. ``examples``: number per set of marginals, for the grids of 10 and 50 steps.

    ``at`` are the corrected steps of the grid of 10, ``at_long`` the steps at the same times of the grid of 50. The
    fractions ``shares`` of alpha are tried where correctors of one grid serve another. ``tuning`` is the number of
    tuning seeds.
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
    shares: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
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
        shares=(0.5, 1.0),
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
    """A trained test bed: methods and parameters by name, metrics, and the features of the real examples."""

    problem: Problem
    plan: loop.Plan
    data: Dataset
    flow: Params
    metrics: dict[str, Callable]
    folder: Path


def bed(name: str, folder: Path | None = None) -> Bed:
    """Train the flow in ``folder / "flow"``, or reads it."""
    problem, folder = PROBLEMS[name], folder or FOLDER / f"{name}_corrected"
    cfg = config(problem)
    data = specs.data(cfg.data)
    plan = assemble.assemble(cfg, data=data)
    flow = loop.train(plan, folder / "flow").ema
    # to compare with, and to start backward from
    data = in_memory(data, train=20_000, validation=2_000, test=2_000, seed=0)
    metrics, net = evaluate.distances(data)
    embed = lambda x: net.features(features.quantise(x, data.levels))
    real = embed(data.test.x)
    for i, metric in enumerate(("precision", "recall")):
        metrics[metric] = lambda x, i=i: neighbours.precision_recall(real[: len(x)], embed(x)[: len(real)])[i]
    away = float(nearest(data.test.x, data.train.x))
    metrics["to training"] = lambda x: float(nearest(x, data.train.x)) / away  # below 1: nearer than held-out data are
    return Bed(problem, plan, data, flow, metrics, folder)


def config(problem: Problem, **changes):
    """Return the config of a problem."""
    return runs.config(problem.config, problem.fields | changes)


@jax.jit
def nearest(x, others):
    """Return the mean distance of examples to the nearest of other examples."""
    x, others = (a.reshape(len(a), -1) for a in (x, others))
    square = (x**2).sum(1)[:, None] - 2 * x @ others.T + (others**2).sum(1)
    return jnp.sqrt(jnp.maximum(square.min(1), 0)).mean()


def sets(b: Bed, name: str, view, params: Params, ts, count: int, **options) -> tuple[Marginals, Marginals]:
    """Build forward and backward marginals at the times of the grid of ten steps, or at all of a shorter one."""
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
    """Train a corrector on a pair of sets, or read it."""
    apart = lambda **options: {
        "method": {"name": "classifier_corrector", **options}, "net": b.problem.classifier, "weight_decay": 0.05
    }  # fmt: skip
    spec = {
        "score": {"method": {"name": "score_corrector", "sigma": SIGMA}, "net": b.problem.score},
        "classifier": apart(eps=0.5, steps=3),
        "plain classifier": apart(eps=0.0),
    }[kind]
    same = "weighting coupling batch_size target warmup schedule clip beta2 weight_decay ema".split()
    part = {field: b_field for field, b_field in config(b.problem).items() if field in same}
    part |= {"steps": b.problem.steps[kind.removeprefix("plain ")], "learning_rate": 1e-3, **spec}
    batch = correction.marginal_pairs(p, q, batch_size=part["batch_size"], seed=0)
    plan = assemble.assemble(config(b.problem, correctors={kind: part}), f"correctors.{kind}", batch=batch)
    return plan.method, loop.train(plan, b.folder / f"{kind}-{name}").ema


def residual(b: Bed) -> tuple[Method, Params]:
    """Train the residual velocity over the frozen flow, or read it."""
    fields = {"method": "residual", "target": "frozen", "teacher": str(b.folder / "flow")}
    cfg = config(b.problem, steps=b.problem.steps["residual"], learning_rate=1e-3, **fields)
    plan = assemble.assemble(cfg, data=b.data)
    start = loop.merge_parameters(plan, {"base": b.flow})
    return plan.method, loop.train(plan, b.folder / "residual", params=start, teacher=start).ema


def pushed(method: Method) -> Callable:
    """Return marginal matching with a trained direction, a function of ``(params, alpha, beta)``."""
    return lambda params, alpha, beta: correctors.marginal_matching(
        method.direction(params["fix"]), alpha=alpha, beta=beta
    )


def drifted(ts) -> Callable:
    """Return marginal matching with the drift between banks at the times ``ts``."""
    return lambda params, alpha, beta: correctors.marginal_matching(
        correction.kernel_drift(**params["bank"], ts=ts, bandwidth=1.0), alpha=alpha, beta=beta
    )


def restarted(step_of: Callable, to: float, steps: int = 1) -> Callable:
    """Return a restart by the steps of the sampler."""
    return lambda params, alpha, beta: correctors.restart(step_of(params), to=to, steps=steps)


class Sampler(NamedTuple):
    """A row: ``draw(params, keys, alpha, beta)`` with arrays over the grid, its cost, and the strengths to choose of.

    ``evaluations`` is the FLOPs of a sample divided by the FLOPs of one evaluation of the flow. A change is measured
    from the first row of the same ``group``, by default of the rows of as many steps.
    """

    name: dict[str, Any]
    draw: Callable
    params: Any
    n: int
    at: tuple[int, ...] = ()
    kind: str = "none"
    cost: sampling.Cost | None = None
    evaluations: float = 0.0
    candidates: tuple[search.Placement, ...] = ()
    group: str = ""


def sampler(b: Bed, step_of: Callable, n, at=(), fix_of: Callable | None = None) -> Callable:
    """``step_of(params)`` from the noise of the keys over a grid or ``n`` uniform steps, corrected by ``fix_of``."""
    ts, shape = grids.uniform_grid(n) if isinstance(n, int) else n, b.data.train.x.shape[1:]

    @jax.jit
    def draw(params, keys, alpha, beta):
        over = lambda values: grids.per_step(ts, values)
        fix = fix_of(params, over(alpha), over(beta)) if at else None
        x0 = normal(fold_in(keys, 0), shape)
        return sampling.sample(step_of(params), x0, ts, key=fold_in(keys, 1), corrector=fix, at=at if at else None)

    return draw


def distances(b: Bed, s: Sampler, setting: search.Placement, key) -> dict[str, float]:
    """Return every metric of one run of samples."""
    keys, (alpha, beta) = as_keys(key, b.problem.samples), setting.dense(s.n)
    x = np.concatenate(
        [np.asarray(s.draw(s.params, keys[i : i + evaluate.CHUNK], alpha, beta)) for i in range(0, len(keys), 512)]
    )
    return {name: metric(x) for name, metric in b.metrics.items()}


def chosen(b: Bed, s: Sampler) -> search.Placement:
    """Return the best strength on the tuning seeds by the first metric; every evaluation is kept in a file."""
    first = next(iter(b.metrics))
    same = lambda a, c: search.Placement(s.at, (a,) * len(s.at), (c,) * len(s.at))
    candidates = s.candidates or tuple(
        same(a, c) for a in ALPHAS.get(s.kind, ()) for c in (b.problem.betas if s.kind == "score" else (0.0,))
    )
    if not candidates:
        return same(0.0, 0.0)
    value = search.Evaluations(
        lambda setting, key: distances(b, s, setting, key)[first],
        tuning=keys(TUNING, b.problem.tuning),
        reporting=keys(SEED, b.problem.seeds),
        directory=b.folder / "tuning" / "-".join(files.slug(str(v)) for v in s.name.values()),
        identity={"params": checkpoint.digest(s.params), "samples": b.problem.samples},
    )
    return value.best(candidates).placement


def keys(seed: int, n: int):
    """Return the keys of ``n`` runs of samples."""
    return jax.random.split(jax.random.key(seed), n)


def measured(b: Bed, rows: list[Sampler]) -> list[dict]:
    """Return the table: distances on the reporting seeds, and the change of the first from the plain row."""
    first, table, plain = next(iter(b.metrics)), [], {}
    text = lambda values: report.plus_minus(*two_sample.mean_se(values))
    for s in rows:
        setting = chosen(b, s)
        each = [distances(b, s, setting, key) for key in keys(SEED, b.problem.seeds)]
        before = plain.setdefault(s.group or s.n, each)
        change = [d[first] - plain[first] for d, plain in zip(each, before, strict=True)]
        strength = f"{setting.alpha[0]:g}, {setting.beta[0]:g}" if s.kind in ALPHAS else "-"
        costs = {"NFE": s.cost.nfe, "FLOPs / flow": round(s.evaluations, 1), "alpha, beta": strength}
        cells = {name: text([d[name] for d in each]) for name in b.metrics}
        table.append(s.name | costs | cells | {f"{first}, change": "-" if s.kind == "none" else text(change)})
    floor = evaluate.training_samples(b.data, seeds=b.problem.seeds, samples=b.problem.samples, seed=0)
    blank = dict.fromkeys(table[0], "-") | {next(iter(table[0])): "training data"}
    return [*table, blank | {name: text([metric(x) for x in floor]) for name, metric in b.metrics.items()}]


def flops(f: Callable, params: Params, b: Bed) -> float:
    """Return the FLOPs of an evaluation, counted by XLA."""
    x = jnp.zeros((8, *b.data.train.x.shape[1:]))
    return jax.jit(lambda params, x: f(params)(x, jnp.full(8, 0.5))).lower(params, x).compile().cost_analysis()["flops"]
