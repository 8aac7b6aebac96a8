"""Ways to sample one flow, drawn from the same noise and compared with held-out data.

``main(cfg, workdir)`` evaluates the flow that ``run.fit`` trained there. A ``Setting`` names a sampler, ``draw`` runs
it for every seed, ``compare`` turns samples into rows and verdicts of a report. Positions of the corrections are steps
of the setting's own grid.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import checks, paths, sampling
from fmjax.correction import correctors
from fmjax.data import arrays
from fmjax.experiments import assemble, report, specs, workdir
from fmjax.experiments.report import Row, Verdict
from fmjax.keys import as_keys, fold_in, normal
from fmjax.metrics import features, two_sample
from fmjax.metrics.frechet import frechet
from fmjax.metrics.two_sample import mean_se
from fmjax.sampling import grids
from fmjax.storage import checkpoint, files
from fmjax.training import logs
from fmjax.types import Corrector, FlowMapFn, Method, Params

FLOW_MAP = "flow_map"  # the solver of settings that jump with the learned map
SDES = ("euler_maruyama", "stochastic_heun", "reverse_diffusion")
# corrections that nobody trains, and their options with what stands for one that is not given (None: it must be)
UNTRAINED = {"drift": {"alpha": None, "bandwidth": None, "beta": 0.0}, "restart": {"to": None, "inner": 1, "loops": 1}}
SHOWN = 36  # examples in a grid of samples
CHUNK = 512  # examples in flight: no sample depends on it
Metric = Callable[[np.ndarray], float]
Strength = float | tuple[float, ...]  # for all corrected steps, or for each


NOTES = [
    "NFE counts network evaluations a sample. All samplers of a seed start from the same noise.",
    "FD-small is a Frechet distance in 32 features of a small classifier trained here on the training images. "
    "It is not FID and compares with nothing but itself at the same sample count.",
    "A distance means something beside its floor: that of as many training examples to the same held-out data.",
]


class Setting(NamedTuple):
    """A sampler: ``steps`` of ``solver`` (or of the flow map), corrected at the steps ``at`` by ``by``.

    ``by`` is the name of a trained corrector or of one that needs no training: ``"drift"``, the kernel drift between
    stored marginals with the ``bandwidth``, and ``"restart"``, back to the time ``to`` and forth by ``inner`` of the
    setting's own steps, ``loops`` times. ``alpha`` and ``beta`` are those of ``correctors.marginal_matching``, one for
    all steps or one for each of ``at``; ``alpha = 0`` is the noise of a correction alone. ``each`` counts the network
    evaluations of a direction. ``baseline`` names the setting that it is judged against.
    """

    name: str
    family: str
    solver: str
    steps: int
    at: tuple[int, ...] = ()
    alpha: Strength = 0.0
    beta: Strength = 0.0
    baseline: str | None = None
    by: str = "score"
    each: int = 1
    bandwidth: float = 0.0
    to: float = 0.0
    inner: int = 1
    loops: int = 1

    def cost(self) -> sampling.Cost:
        """NFE and corrections; a step of a flow map evaluates its network once."""
        each_step = 1 if self.solver == FLOW_MAP else stages(self.solver)
        if self.by == "restart":
            each = correctors.nfe("restart", each=each_step, steps=self.inner, loops=self.loops)
            return sampling.cost(each_step, self.steps, self.at, each)
        return sampling.cost(each_step, self.steps, self.at if self.alpha else (), self.each)


def stages(solver: str) -> int:
    """Return the network evaluations of one step of a solver by name."""
    return sampling.evaluations(specs.step(solver)(lambda x, t, cond=None: x))


class Models(NamedTuple):
    """The methods of a flow, its map and its correctors, and their parameters under the same names.

    ``params["drift"]`` holds the banks ``p`` and ``q`` of the kernel drift, stored at the times ``ts``. With
    ``classes`` the ``i``-th sample has the label ``i mod classes``. ``path`` is the flow's, for SDE steps and restarts.
    """

    flow: Method
    flow_map: Method | None
    correctors: dict[str, Method]
    params: dict[str, Params]
    shape: tuple[int, ...]
    classes: int = 0
    path: paths.Path | None = None
    ts: np.ndarray | None = None


def settings(
    plain: dict[str, Sequence[int]], corrected: dict[str, dict[str, Any]], trained: dict[str, int] | None = None
) -> list[Setting]:
    """The settings of a config: ``plain`` maps solvers to numbers of steps, ``corrected`` names to their options.

    ``trained`` are the names of trained correctors and what a direction of each costs in network evaluations.

    A correction that adds noise comes with a control, the same noise without the push, and is judged against it: noise
    alone can help a flow that is too narrow, and the corrector shall have no credit for that. The control, and a
    correction without noise, are judged against the plain sampler.

    Raises ``ValueError`` for an unknown solver or corrector (with the nearest), steps that are not positive, ``at``
    outside ``0 .. steps``, options of another corrector, and a corrected setting whose plain one is not among
    ``plain``.
    """
    trained = trained or {}
    words = lambda solver, n: f"{title(solver)}, {n} step{'s' if n > 1 else ''}"
    found = []
    for solver, counts in plain.items():
        solver == FLOW_MAP or stages(solver)
        for n in counts:
            grids.uniform_grid(n)
            found.append(Setting(words(solver, n), title(solver), solver, n))
    names = [s.name for s in found]
    fewest_first = lambda item: (item[1]["solver"], item[1]["by"], len(item[1]["at"]), tuple(item[1]["at"]))
    for key, c in sorted(corrected.items(), key=fewest_first):
        solver, n, at = c["solver"], c["steps"], sampling.check_at(c["at"], c["steps"])
        base = words(solver, n)
        if base not in names:
            known = ", ".join(names)
            raise ValueError(f"correction {key!r} needs its plain sampler {base!r} to be drawn too; there are {known}")
        where = "at every step" if len(at) == n + 1 else f"at {', '.join(map(str, at))}"
        options = _options_of(key, c, trained)
        push = Setting(f"{base}, {c['by']} {where}", f"{title(solver)} + corrections", solver, n, at, baseline=base)
        push = push._replace(by=c["by"], each=trained.get(c["by"], 0), **options)
        if np.any(push.beta):
            told = ", ".join(f"{beta:g}" for beta in np.atleast_1d(push.beta))
            noise = push._replace(name=f"{base}, noise {told} {where}", alpha=0.0, baseline=base)
            noise = noise._replace(by="noise", each=0, bandwidth=0.0)
            push = push._replace(baseline=noise.name)
            if noise not in found:
                found.append(noise)
        found.append(push)
    repeated = sorted({s.name for s in found if [other.name for other in found].count(s.name) > 1})
    if repeated:
        raise ValueError(f"two samplers are both {repeated[0]!r}; drop one")
    return found


def _options_of(key: str, c: dict[str, Any], trained: dict[str, int]) -> dict[str, Any]:
    """The options of a correction, complete, checked by those who take them."""
    known = {**dict.fromkeys(trained, {"alpha": None, "beta": 0.0}), **UNTRAINED}
    if c["by"] not in known:
        near = checks.nearest(c["by"], known)
        raise ValueError(f"correction {key!r}: no corrector {c['by']!r}{near} (there are {', '.join(known)})")
    wanted, given = known[c["by"]], {k: v for k, v in c.items() if k not in ("solver", "steps", "at", "by")}
    if wrong := [name for name in given if name not in wanted]:
        raise ValueError(f"correction {key!r}: {c['by']!r} has no {wrong[0]!r}; it takes {', '.join(wanted)}")
    if missing := [name for name, value in wanted.items() if value is None and name not in given]:
        raise ValueError(f"correction {key!r}: {c['by']!r} needs {missing[0]!r}")
    options = wanted | given
    if "alpha" in options:
        for name in ("alpha", "beta"):
            options[name] = _strength(f"correction {key!r}: {name}", options[name], c["at"])
        for alpha, beta in np.broadcast(options["alpha"], options["beta"]):
            correctors.marginal_matching(lambda x, t, cond=None: x, alpha=float(alpha), beta=float(beta))
    else:
        grid = grids.uniform_grid(c["steps"])[list(c["at"])]
        correctors.restart(lambda x, s, t, cond=None, key=None: x, to=options["to"], loops=options["loops"]).check(grid)
    if not (c["at"] and np.any(options.get("alpha", 1))):
        raise ValueError(f"correction {key!r} corrects nothing: give steps in 'at' and alpha other than 0")
    return options


def _strength(what: str, value: Any, at: Sequence[int]) -> Strength:
    """A number, or one a step, which must rise."""
    if np.ndim(value) == 0:
        return value
    if len(value) != len(at) or sorted(set(at)) != list(at):
        raise ValueError(f"{what}={tuple(value)} has one number a step: as many as steps that rise, not at={tuple(at)}")
    return tuple(float(a) for a in value)


def check_sampling(s, data: arrays.Splits) -> None:
    """``ValueError`` where ``s.seeds`` and ``s.samples`` cannot be compared with the data."""
    if s.seeds < 1 or not 2 <= s.samples <= len(data.train_x):
        raise ValueError(
            f"sampling.seeds={s.seeds} must be 1 or more, sampling.samples={s.samples} in 2..{len(data.train_x)} "
            "(each seed is compared with as many training examples)"
        )


def main(cfg, path: str | Path) -> None:
    """Draws the plain samplers of ``cfg.sampling`` from the averaged flow in ``path`` and compares them with the data.

    ``"flow_map"`` among them jumps with the map that the run's method learned, where it learned one.

    Of data on disk at most 50,000 training and 10,000 held-out examples, drawn at random, are compared with.
    Writes ``evaluation.json`` (mean and standard error over seeds of every distance), ``report.html`` and the samples;
    prints the rows. ``cfg.sampling`` and ``cfg.guidance`` may differ from the training's. NFE counts all evaluations.
    Raises ``ValueError`` for settings that cannot be drawn, ``CheckpointError`` where no flow is.
    """
    data, s = specs.data(cfg.data), cfg.sampling
    check_sampling(s, data)
    plan, along = assemble.assemble(cfg, data=data), specs.path(cfg.path)
    jumps = plan.method.flow_map is not None
    told = assemble.told_the_scale(cfg.net)
    if jumps and FLOW_MAP in s and cfg.guidance != 1 and not told:
        raise ValueError(
            f"guidance={cfg.guidance} is of the velocity: a learned map has none; take sampling.flow_map=()"
        )
    left_out = ("seeds", "samples") if jumps else ("seeds", "samples", FLOW_MAP)
    solve = {name: steps for name, steps in s.items() if name not in left_out}
    found = settings(solve, {})
    sde = [name for name in solve if name in SDES]
    if sde and along.gamma is None and cfg.coupling != "independent":
        raise ValueError(
            f"{sde[0]} takes its score from the velocity, which has it for coupling='independent' only; take a solver "
            "of the ODE, or learn the score (stochastic_interpolant)"
        )
    data = arrays.in_memory(data, train=50_000, test=10_000, seed=cfg.seed)
    step, flow, metadata = checkpoint.restore(Path(path) / "checkpoints", part="ema", fallback=True)
    path = workdir.open_workdir(path, cfg.to_dict(), free=(*assemble.free(cfg), *assemble.SAMPLING))
    models = Models(plan.method, plan.method, {}, {"flow": flow, FLOW_MAP: flow}, plan.shape, plan.classes, along)
    identity = f"{metadata['digest']['ema']} guidance {cfg.guidance}"
    drawn = {}
    with logs.bar("samples", len(found), unit="sampler") as progress:
        for setting in found:
            drawn[setting] = draw(
                setting, models, seeds=s.seeds, samples=s.samples, seed=cfg.seed, directory=path / "draws",
                identity=identity,
            )  # fmt: skip
            progress.update()
    metrics, net = distances(data)
    rows, _ = compare(drawn, metrics, training_samples(data, seeds=s.seeds, samples=s.samples, seed=cfg.seed))
    # guidance asks the network twice, and an SDE step on a path with a latent once more, for the score
    latent = lambda row: models.path.gamma is not None and row.family in SDES
    rows = [row._replace(nfe=row.nfe * (1 + (cfg.guidance != 1 and not told) + latent(row))) for row in rows]
    facts = {"step": str(step), "guidance": str(cfg.guidance), "samples": f"{s.seeds} seeds of {s.samples}"}
    if net is not None:
        accuracy = features.accuracy(net, data.test_x, data.test_y)
        facts["classifier of FD-small"] = f"held-out accuracy {accuracy:.3f}, weights {net.weights[:12]}"
    files.write_json(
        path / "evaluation.json", {"rows": [r._asdict() for r in rows], **facts, "environment": workdir.environment()}
    )
    records = files.read_jsonl(path / "metrics.jsonl")
    curve = tuple(np.array([r[name] for r in records]) for name in ("step", "loss"))
    curves = {"flow": curve} if records else {}  # a converted network was not trained here
    shown = {"held-out data": data.test_x[:SHOWN]} | {s.name: x[0, :SHOWN] for s, x in drawn.items()}
    facts |= {"config": json.dumps(cfg.to_dict(), indent=1, default=list)}
    title = f"fmjax: {cfg.data if isinstance(cfg.data, str) else cfg.data.name}"
    grids = shown if len(plan.shape) == 3 or plan.shape == (2,) else {}
    contents = report.Contents(title, best(rows), rows, [], grids, {}, curves, {}, facts, NOTES)
    report.write(path / "report.html", contents)
    for row in rows:
        told = ", ".join(f"{metric} {report.plus_minus(*d)}" for metric, d in row.distances.items())
        print(f"{row.name} ({row.nfe} NFE): {told}")
    print(f"open {path / 'report.html'}")


def best(rows: Sequence[Row]) -> list[str]:
    """A sentence for each distance: the sampler with the least, beside the floor."""
    floor, sentences = next(row for row in rows if row.family == report.REFERENCE), []
    for metric, (mean, se) in floor.distances.items():
        least = report.best_row(rows, metric)
        if least:
            told = report.plus_minus(*least.distances[metric])
            limit = report.plus_minus(mean, se)
            sentences.append(f"{metric}: least for {least.name} at {least.nfe} NFE, {told} (floor {limit}).")
    return sentences


def title(solver: str) -> str:
    """The family of a solver, as the report has it."""
    return {FLOW_MAP: "flow map"}.get(solver, solver)


def sampler(setting: Setting, models: Models, *, trajectory: bool = False) -> Callable[..., jax.Array]:
    """``draw(params, keys, cond=None)``, jitted: samples ``[B, ...]`` (or all states) from example keys ``[B]``.

    The noise depends on the keys alone, so that settings compare example by example. ``strengths``, arrays ``alpha``
    and ``beta`` of one value for each of ``setting.at``, replace the setting's own: one program serves a search.
    """

    @jax.jit
    def draw(params: dict[str, Params], keys, cond=None, strengths=None):
        x0 = normal(fold_in(keys, 0), models.shape)
        if setting.solver == FLOW_MAP:
            step = models.flow_map.flow_map(params["flow_map"])
        else:
            score = models.flow.score(params["flow"]) if models.flow.score else None
            step = specs.step(setting.solver, path=models.path, score=score)(models.flow.velocity(params["flow"]))
        alpha, beta = strengths or (setting.alpha, setting.beta)
        pushed = setting._replace(alpha=alpha, beta=beta)
        fix = _correction(pushed, models, step, params) if setting.at else None
        grid = grids.uniform_grid(setting.steps)
        return sampling.sample(
            step, x0, grid, key=fold_in(keys, 1), cond=cond, corrector=fix, at=setting.at, trajectory=trajectory
        )

    return draw


def _correction(setting: Setting, models: Models, step: FlowMapFn, params: dict[str, Params]) -> Corrector:
    """The corrector of a setting; ``step`` is the setting's own."""
    if setting.by == "restart":
        return correctors.restart(step, to=setting.to, steps=setting.inner, loops=setting.loops, path=models.path)
    if setting.by == "noise":
        direction = lambda x, t, cond=None: x
    elif setting.by == "drift":
        direction = correctors.kernel_drift(**params["drift"], ts=models.ts, bandwidth=setting.bandwidth)
    else:
        direction = models.correctors[setting.by].direction(params[setting.by])
    ts = grids.uniform_grid(setting.steps)[list(setting.at)]
    over = lambda strength: grids.per_step(ts, strength) if np.ndim(strength) else strength
    return correctors.marginal_matching(direction, alpha=over(setting.alpha), beta=over(setting.beta))


def draw(
    setting: Setting, models: Models, *, seeds: int, samples: int, seed: int, directory: Path, identity: str
) -> np.ndarray:
    """Samples ``[seeds, samples, ...]`` of a setting, read from ``directory`` where it holds those of ``identity``.

    ``identity`` names what the numbers depend on beside the setting: the parameters' digests.
    """
    told = f"{setting} {seeds} {samples} {seed} {identity}"
    file = directory / f"{files.slug(setting.name)}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.npy"
    if file.exists():
        return np.load(file, allow_pickle=False)
    sample = sampler(setting, models)
    labels = jnp.arange(samples) % models.classes if models.classes else None

    def of_seed(i: int) -> np.ndarray:
        keys, parts = keys_of(seed, i, samples), range(0, samples, CHUNK)
        cond = lambda a: None if labels is None else labels[a : a + CHUNK]
        return np.concatenate([np.asarray(sample(models.params, keys[a : a + CHUNK], cond(a))) for a in parts])

    x = np.stack([of_seed(i) for i in range(seeds)])
    buffer = io.BytesIO()
    np.save(buffer, x, allow_pickle=False)
    directory.mkdir(exist_ok=True)
    files.write_bytes(file, buffer.getvalue())
    return x


def keys_of(seed: int, i: int, samples: int):
    """The example keys of the ``i``-th seed's samples, apart from those of training."""
    return as_keys(key_of(seed, i), samples)


def key_of(seed: int, i: int, what: int = 3):
    """The key of the ``i``-th run of samples."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), what), i)


def distances(data: arrays.Splits) -> tuple[dict[str, Metric], features.Features | None]:
    """Distances of samples ``[n, ...]`` to the held-out data, and the classifier of FD-small (images only)."""
    metrics, net = {}, None
    if data.train_x.ndim == 4:
        cache = files.cache() / "features"
        net = features.small_classifier(data.train_x, data.train_y, cache_dir=cache, levels=data.levels)
        reference = net.features(features.quantise(data.test_x, data.levels))
        metrics["FD-small"] = lambda x: frechet(net.features(features.quantise(x, data.levels)), reference)
    metrics["sliced W2"] = lambda x: two_sample.sliced_w2(x, data.test_x)
    within = two_sample.mean_distance(data.test_x)  # quadratic in the held-out data, and the same for all samples
    metrics["energy distance"] = lambda x: two_sample.energy_distance(x, data.test_x, within=within)
    return metrics, net


def training_samples(data: arrays.Splits, *, seeds: int, samples: int, seed: int) -> np.ndarray:
    """Training data ``[seeds, samples, ...]``, for each seed drawn at random without replacement: the floor."""
    rng = np.random.default_rng(seed)
    return np.stack([data.train_x[rng.permutation(len(data.train_x))[:samples]] for _ in range(seeds)])


def compare(
    drawn: dict[Setting, np.ndarray], metrics: dict[str, Metric], data: np.ndarray
) -> tuple[list[Row], list[Verdict]]:
    """Rows (mean and standard error over seeds) of all settings and of ``data``, and a verdict for each correction.

    ``drawn[setting]`` and ``data`` (training data, the floor) are ``[seeds, samples, ...]``.
    """
    each = {s.name: _distances(x, metrics) for s, x in drawn.items()}
    rows = [
        Row(s.name, s.family, s.cost().nfe, s.cost().corrections, {m: mean_se(v) for m, v in each[s.name].items()})
        for s in drawn
    ]
    floor = {m: mean_se(v) for m, v in _distances(data, metrics).items()}
    rows.append(Row("training data", report.REFERENCE, 0, 0, floor))
    verdicts = [
        report.verdict(s.name, s.baseline, m, each[s.name][m], each[s.baseline][m])
        for s in drawn
        for m in metrics
        if s.baseline
    ]
    return rows, verdicts


def _distances(x: np.ndarray, metrics: dict[str, Metric]) -> dict[str, list[float]]:
    finite = np.isfinite(x).reshape(len(x), -1).all(1)
    return {m: [f(a) if ok else float("inf") for a, ok in zip(x, finite, strict=True)] for m, f in metrics.items()}
