"""Suites of ``launch.bench``: half-straightened flows of the digits and of MNIST.

The runs come from ``launch.reflow`` with the configs of these names and three seeds; they are kept in
``workdir/bench``, and a stopped run continues there. ``MNIST`` in the environment names the folder of the original
files. On MNIST all seeds have the same teacher and the same noise.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np

from configs import base
from fmjax import correction, sampling, straightening
from fmjax.experiments import assemble, build, reflow, report, stages
from fmjax.experiments.samplers import DRIFT, FLOW, FLOW_MAP
from fmjax.keys import as_keys, fold_in, normal
from fmjax.metrics import spectrum, two_sample
from fmjax.storage import checkpoint, files
from fmjax.straightening import TEACHER, segments
from fmjax.training import loop
from fmjax.types import Method
from launch.bench import beds, runs
from launch.bench.measure import FOLDER

SEEDS = (0, 1, 2)
NAMES = ("digits", "mnist")
MAP_STEPS = 1500
FD, PAIRED = "FD-small", "paired error"


def numbers(name: str) -> list[dict]:
    """Return the numbers of the runs of a data set; incomplete runs are completed."""
    results, teacher = [], FOLDER / f"half_straightening_{name}-{SEEDS[0]}" / "flow"
    for seed in SEEDS:
        path = FOLDER / f"half_straightening_{name}-{seed}"
        command = [
            f"--config=configs/half_straightening_{name}.py",
            f"--workdir={path}",
            f"--config.straighten.seed={seed}",
        ]
        if name == "mnist":
            if seed != SEEDS[0] and not (path / "flow").exists():
                path.mkdir(parents=True, exist_ok=True)
                (path / "flow").symlink_to(teacher.absolute())
            if "MNIST" in os.environ:
                command.append(f"--config.data.source_dir={os.environ['MNIST']}")
        else:
            command.append(f"--config.seed={seed}")
        if not (path / "straightened.json").exists():
            subprocess.run([sys.executable, "-m", "launch.reflow", *command], check=True)
        results.append(json.loads((path / "straightened.json").read_text()))
    return results


def text(values) -> str:
    """Return mean and standard error over runs as text."""
    return report.plus_minus(*two_sample.mean_se(values))


def rows(results: list[dict]) -> dict[tuple[str, str], dict[str, list]]:
    """Return the means of all runs by metric, by ``(family, name)``."""
    metrics = (FD, PAIRED, "NFE", "counts", "drift")
    key = lambda r: (r["family"], r["name"])
    first = {key(r): {m: [] for m in metrics if m in r} for r in results[0]["rows"]}
    for result in results:
        for r in result["rows"]:
            for m, values in first[key(r)].items():
                values.append(r[m][0] if m in (FD, PAIRED) else r[m])
    return first


def table(name: str) -> list[dict]:
    """Every model with every allocation of Euler steps: ``FD-small / paired error``."""
    results = numbers(name)
    each, lines = rows(results), {}
    for (family, allocation), r in each.items():
        if r["counts"][0]:
            part, _, sharing = family.partition(", ")
            line = lines.setdefault(family, {"straightened": part, "parameters": sharing or "-"})
            line[allocation] = f"{text(r[FD])} / {np.mean(r[PAIRED]):.4f}"
    floor = text([result["floor"][FD][0] for result in results])
    best = next(r for (family, _), r in each.items() if r["NFE"][0] > 20)
    blank = dict.fromkeys(next(iter(lines.values())), "")
    ends = [
        blank | {"straightened": f"teacher, {best['NFE'][0]} NFE", "(9, 9)": f"{text(best[FD])} / 0"},
        blank | {"straightened": "training data", "(9, 9)": floor},
    ]
    return [*lines.values(), *ends]


def half_straightening_digits(repeats: int) -> list[dict]:
    """None, one or both halves straightened, by kind of common parameters, at four allocations of Euler steps."""
    return table("digits")


def half_straightening_mnist(repeats: int) -> list[dict]:
    """The same on MNIST."""
    return table("mnist")


def straightened_baselines(repeats: int) -> list[dict]:
    """Other samplers of the same teachers, the full reflow, and the best models at as many evaluations."""
    lines = []
    for name in NAMES:
        for (family, allocation), r in rows(numbers(name)).items():
            if not r["counts"][0] or (family.endswith("gated") and allocation in ("(1, 1)", "(1, 9)", "(9, 9)")):
                cells = {"NFE": r["NFE"][0], FD: text(r[FD]), PAIRED: text(r[PAIRED])}
                lines.append({"data": name, "sampler": f"{family}, {allocation}"} | cells)
    return sorted(lines, key=lambda line: (line["data"], line["NFE"]))


def straightened_segments(repeats: int) -> list[dict]:
    """How straight each half is, the jump of the velocity between them, the drift of the state there, the departure."""
    lines = []
    for name in NAMES:
        results = numbers(name)
        drift = {family: r["drift"] for (family, allocation), r in rows(results).items() if allocation == "(9, 9)"}
        for i, model in enumerate(results[0]["segments"]):
            family = (
                model["sharing"] if model["part"] in ("none", "all as one") else f"{model['part']}, {model['sharing']}"
            )
            at = lambda what, k, i=i: text([result["segments"][i][what][k] for result in results])  # noqa: B023
            lines.append({
                "data": name, "straightened": family,
                "straightness, noise half": at("straightness", 0), "data half": at("straightness", 1),
                "jump": at("jump", 0), "drift": text([d[0] for d in drift[family]]),
                "departure, noise half": at("departure", 0), "departure, data half": at("departure", 1),
            })  # fmt: skip
    return lines


def straightened_spectra(repeats: int) -> list[dict]:
    """The fraction of the power below 1/5 cycle a pixel: of the end-point error by allocation, of centred data."""
    lines, ends = {}, []
    for name in NAMES:
        data = build.data(runs.config(f"half_straightening_{name}", {}).data).train.x[:5000]
        ends.append(
            {"data": name, "straightened": "the data"}
            | {"(1, 1)": f"{spectrum.low_fraction(*spectrum.radial(data - data.mean(0))):.3f}"}
        )
        for result in numbers(name):
            for key, power in result["spectra"].items():
                family, _, counts = key.rpartition(", (")
                if family.endswith(("teacher", "gated", "reflow")):
                    line = lines.setdefault((name, family), {})
                    line.setdefault(f"({counts}", []).append(spectrum.low_fraction(power["frequency"], power["power"]))
    rows = [{"data": d, "straightened": f} | {c: text(v) for c, v in line.items()} for (d, f), line in lines.items()]
    return [*rows, *(dict.fromkeys(rows[0], "-") | end for end in ends)]


def straightened_corrected(repeats: int) -> list[dict]:
    """The first run of the digits: correctors at the bounds of half-straightened flows, and segments as flow maps.

    At a bound a perfect flow has the distribution of noised data: correctors are trained on noised data against states
    of the model. The map of a segment is distilled from the network of the segment, by LMD with times in the segment.
    """
    path = FOLDER / f"half_straightening_digits-{SEEDS[0]}"
    b = beds.bed("straightened", path)
    config = beds.configured(b.problem)
    trained_stages, students, compared = reflow.student_stages(config, b.data)
    results = stages.run_all(trained_stages, path)
    methods = {TEACHER: b.plan.method} | {name: plan.method for name, (plan, _) in students.items()}
    params = {TEACHER: results[FLOW].value} | {name: results[plan.name].value for name, (plan, _) in students.items()}
    bounds = tuple(config.straighten[1].bounds)
    models = {f"{m.part}, {m.sharing}": m for m in compared if m.sharing == "gated"}
    lines = []

    def add(name, step_of, parameters, counts, fixes=True):
        grid = segments.segment_grid(bounds, counts)
        n, inner, where = len(grid) - 1, tuple(int(i) for i in np.cumsum(counts)), ", ".join(map(str, counts))
        label = lambda corrector, at: {"sampler": f"{name} ({where})", "corrector": corrector, "at t": at}
        map_of = {FLOW_MAP: Method(None, flow_map=step_of)}  # a solver step is a flow map
        plain, group = beds.plain(FLOW_MAP, grid), f"{name} {where}"
        networks = beds.networks(b, map_of, {FLOW_MAP: parameters})
        lines.append(beds.row(b, label("none", "-"), plain, networks, n, group=group))
        if not fixes:
            return
        p, q = _sets(b, name, step_of, parameters, grid, inner)
        score, trained = beds.corrector(b, "score", files.slug(f"{name} {where}"), p, q)
        weight = beds.flops(score.direction, trained, b) / beds.flops(methods[TEACHER].velocity, params[TEACHER], b)
        drift = beds.networks(b, map_of, {FLOW_MAP: parameters, **beds.bank(p, q)}, ts=p.ts)
        scored = beds.networks(b, map_of | {"score": score}, {FLOW_MAP: parameters, "score": trained})
        for at in ((n,), inner):
            times = ", ".join(f"{grid[i]:g}" for i in at)
            for corrector, kind, used, worth in (("kernel drift", DRIFT, drift, 0), ("score", "score", scored, weight)):
                sampler, cost = beds.corrected(plain, kind, at), n + worth * len(at)
                lines.append(beds.row(b, label(corrector, times), sampler, used, cost, kind, group=group))
        restart = beds.corrected(plain, "restart", (n,), to=float(bounds[-2]), steps=counts[-1])
        words = label(f"restart to {bounds[-2]:g}", "1")
        lines.append(beds.row(b, words, restart, networks, n + counts[-1], "restart", group=group))

    for name, counts in (("noise half, gated", (1, 9)), ("both halves, gated", (1, 1))):
        of = lambda parameters, m=models[name]: straightening.segmented_step(
            straightening.segment_velocities(m, methods, parameters["students"]), bounds
        )
        used = {network: params[network] for network in models[name].networks}
        add(name, of, {"students": used}, counts)
    for name, networks in (
        ("maps of the teacher", (TEACHER,) * 2),
        ("maps of both halves", models["both halves, gated"].networks),
    ):
        maps = [_map(b, bounds, k, network, params[network]) for k, network in enumerate(networks)]
        of = lambda parameters, maps=maps: segments.piecewise(
            [method.flow_map(values) for (method, _), values in zip(maps, parameters["maps"], strict=True)], bounds
        )
        parameters = {"maps": [values for _, values in maps]}
        for counts in ((1, 1), (2, 2)):
            add(name, of, parameters, counts, fixes=counts == (1, 1) and "both" in name)
    euler = lambda parameters: sampling.euler(methods[TEACHER].velocity(parameters[TEACHER]))
    for counts in ((1, 1), (2, 2), (5, 5)):
        add("teacher, Euler", euler, {TEACHER: params[TEACHER]}, counts, fixes=False)
    return beds.measured(b, lines)


def _sets(
    b: beds.Bed, name: str, step_of, parameters, grid, inner
) -> tuple[correction.Marginals, correction.Marginals]:
    """Return states of a model at all bounds but the first, and noised training data: the exact distribution."""
    count, real = b.problem.examples[0], b.data.train.x
    folder = b.folder / "marginals" / files.slug(f"{name} {len(grid) - 1}")
    common = {
        "direction": "forward",
        "flow": checkpoint.digest(parameters),
        "solver": "flow_map",
        "steps": inner,
        "seed": 1,
    }
    correction.build_marginals(step_of, parameters, grid, directory=folder, count=count, shape=real.shape[1:], **common)
    p = correction.read_marginals(folder)
    keys = as_keys(jax.random.key(5), len(real))
    z = np.stack([np.asarray(normal(fold_in(keys, i), real.shape[1:])) for i in range(len(p.ts))], 1)
    t = p.ts.reshape(1, -1, 1, 1, 1)
    return p, p._replace(x=((1 - t) * z + t * real[:, None]).astype(np.float32))


def _map(b: beds.Bed, bounds, k: int, name: str, start):
    """Return the flow map of segment ``k``, distilled from the network ``name`` that it starts from."""
    low, high = bounds[k : k + 2]
    pair = {"name": "ordered_pair", "time": {"name": "uniform", "low": low, "high": high}}
    fields = {"method": {"name": "lagrangian", "diagonal": 0.0, "pair": pair}, "target": "frozen"}
    c = runs.config(b.problem.config, b.problem.fields)
    part = base.stage(c, steps=MAP_STEPS, learning_rate=5e-4, warmup=0, **fields)
    plan = assemble.flow_map_plan(beds.configured(b.problem, flow_map=part), b.data)
    return plan.method, loop.train(plan, b.folder / files.slug(f"map-{k}-{name}"), params=start, teacher=start).ema


SUITES = (
    half_straightening_digits,
    half_straightening_mnist,
    straightened_baselines,
    straightened_segments,
    straightened_spectra,
    straightened_corrected,
)
