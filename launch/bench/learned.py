"""Suites of ``launch.bench``: flow maps trained by every method with equal networks and equal training FLOPs.

A run is ``python -m launch.bench.learned PROBLEM METHOD SEED`` in a separate process, pinned to one core on a CPU, so
that one run per core can proceed at the same time. Runs are kept in ``workdir/bench/PROBLEM`` and continue there.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.bench.measure import FOLDER

SEEDS = (0, 1, 2)
STEPS = (1, 2, 4, 8, 16)
LONG = 6  # times the budget, for the rows with a longer training
# KL of LSD on the checkerboard, at the best checkpoint of each N (arXiv 2505.18825, table 1), and what as many perfect
# samples as there, 64,000, score in its bins
PUBLISHED, PUBLISHED_FLOOR = dict(zip(STEPS, (0.086, 0.077, 0.071, 0.070, 0.071), strict=True)), 0.067


class Recipe(NamedTuple):
    """The training of a row of a table, in rounds.

    Attributes:
        methods: a method for each round; the rounds divide the budget equally.
        taught: whether half of the budget is used for a teacher, a flow. The teacher of a later round is the network
            of the round before.
        times: multiple of the budget of the problem, and of the teacher.
        solver: solver of the steps of a flow.
    """

    methods: tuple[dict[str, Any], ...]
    taught: bool = False
    times: int = 1
    solver: str = "euler"


def recipe(name: str, *, taught: bool = False, **options: Any) -> Recipe:
    """A recipe of one round."""
    return Recipe(({"name": name, **options},), taught)


def rounds() -> Recipe:
    """PFMM: four Euler steps of the flow make jumps of 1/8, two of these one of 1/4, and so on to 1."""
    gap = lambda g: {"name": "ordered_pair", "gap": g}
    first = {"name": "progressive", "diagonal": 0.0, "substeps": 4, "step": "euler", "pair": gap(1 / 8)}
    return Recipe(
        (first, *({"name": "progressive", "diagonal": 0.0, "pair": gap(g)} for g in (1 / 4, 1 / 2, 1.0))), True
    )


RECIPES = {
    "flow": recipe("flow_matching"),
    "flow by RK4": recipe("flow_matching")._replace(solver="rk4"),
    "LSD": recipe("lagrangian"),
    "LSD, tangent stopped": recipe("lagrangian", stop="tangent"),
    "ESD": recipe("eulerian", stop="jacobian"),
    "ESD, velocity stopped": recipe("eulerian", stop="velocity"),
    "ESD, all stopped": recipe("eulerian"),
    "mean flow": recipe("mean_flow", time="uniform", pair="ordered_pair", power=0.0),
    "PSD-M": recipe("progressive"),
    "PSD-U": recipe("progressive", split="uniform"),
    "FMM": recipe("flow_map_matching"),
    "LMD": recipe("lagrangian", taught=True, diagonal=0.0),
    "EMD": recipe("eulerian", taught=True, diagonal=0.0, stop="velocity"),
    "PFMM": rounds(),
}
BOARD = tuple(RECIPES)
RECIPES |= {
    "iMF": recipe("improved_mean_flow", time="uniform", pair="ordered_pair", power=0.0),
    "TVM": recipe("terminal_velocity_matching"),
    "AlphaFlow": recipe("alpha_flow"),
    "SoFlow": recipe("soflow"),
    "shortcut": recipe("shortcut"),
    "AYF-EMD": recipe("align_your_flow", taught=True),
    "ECT": recipe("consistency"),
    "sCT": recipe("continuous_consistency"),
}
ORACLES = tuple(row for row in RECIPES if row != "flow by RK4")
LONGER = tuple(f"{name}, {LONG} times as long" for name in ("flow by RK4", "LSD", "LMD"))
RECIPES |= {row: RECIPES[row.split(",")[0]]._replace(times=LONG) for row in LONGER}
TEACHERS = {1: "teacher", LONG: f"teacher, {LONG} times as long"}
RECIPES |= {row: RECIPES["flow"]._replace(times=times) for times, row in TEACHERS.items()}
TO_DATA = ("ECT", "sCT")  # maps to t = 1 only


class Problem(NamedTuple):
    """Data, network and budget of a table.

    Attributes:
        net: spec of the network.
        batch_size: examples per step.
        budget: FLOPs of a run, in steps of flow matching.
        batch: ``batch(seed, step)`` returns fresh data.
        evaluate: ``evaluate(method, params, seed, solver)`` returns the result of a run.
        methods: rows of the table.
        history: evaluate also at the quarters of the last round; an interrupted round then starts again.
    """

    net: dict[str, Any]
    batch_size: int
    budget: int
    batch: Callable[[int, int], Any]
    evaluate: Callable[[Any, Any, int, str], dict]
    methods: tuple[str, ...]
    history: bool = False


def drawn(sample: Callable, batch_size: int, seed: int, n: int):
    """Batch ``n``: fresh data, on the host."""
    import jax

    from fmjax.types import Batch

    return Batch(np.asarray(sample(jax.random.fold_in(jax.random.key(seed + 1000), n), batch_size)))


def drawer(method, params, n: int, solver: str):
    """Return ``draw(keys) -> [B, 2]``: ``n`` equal jumps of a learned map, or steps of a flow."""
    from fmjax.experiments import build, drawing
    from fmjax.experiments.drawing import Models
    from fmjax.experiments.samplers import FLOW, FLOW_MAP, Sampler

    name = FLOW_MAP if method.flow_map else solver
    models = Models({FLOW: method, FLOW_MAP: method}, {FLOW: params, FLOW_MAP: params}, (2,), build.path("linear"))
    program = drawing.program(Sampler("samples", "samples", name, n), models)
    return lambda keys: program(models.params, keys)


def board() -> Problem:
    """The checkerboard: KL by ``metrics.histogram`` and exact W2 of 2,048 samples, for every number of steps."""
    import jax

    from fmjax.data import densities
    from fmjax.experiments import drawing
    from fmjax.metrics import histogram, two_sample

    sample = jax.jit(densities.draw_checkerboard, static_argnums=1)

    def evaluate(method, params, seed, solver):
        result = {}
        real = np.asarray(sample(jax.random.key(seed + 2000), 2048))
        for n in STEPS:
            keys = drawing.sample_keys(seed, 0, samples(n))
            x = drawing.in_chunks(drawer(method, params, n, solver), keys, size=1 << 14)
            result[str(n)] = {"KL": histogram.checkerboard_kl(x), "W2": two_sample.w2_exact(x[:2048], real)}
        return result

    return Problem({"name": "plain"}, 512, 6000, functools.partial(drawn, sample, 512), evaluate, (*BOARD, *LONGER))


def samples(n: int) -> int:
    """Samples that a KL at ``n`` steps is estimated from: a million for up to four steps, a quarter of it beyond."""
    return 1 << (20 if n <= 4 else 18)


def oracle(name: str) -> Problem:
    """A distribution with a known map: the relative error of the jump from 0 to 1 and of jumps at uniform times."""
    import jax
    import jax.numpy as jnp

    from fmjax import interpolants, oracles, paths, sampling, times
    from fmjax.keys import as_keys, normal, split
    from fmjax.types import expand

    corners = 0.7 * jnp.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    data = (
        oracles.mixture(corners, 0.25)
        if name == "mixture"
        else oracles.gaussian(jnp.array([0.75, -0.5]), jnp.array([0.3, 1.2]))
    )

    def exact(x, s, t):
        if data.flow_map is not None:
            return data.flow_map(x, s, t)
        step, n = sampling.rk4(data.velocity), 200
        body = lambda k, x: step(x, s + (t - s) * k / n, s + (t - s) * (k + 1) / n)
        return jax.lax.fori_loop(0, n, body, x)

    def errors(method, params):
        keys = split(as_keys(jax.random.key(7), 1 << 12), 3)
        x0, x1 = normal(keys[0], (2,)), data.sample(jax.random.key(8), 1 << 12)
        s, t = times.ordered_pair(keys[1])
        x, _ = interpolants.with_velocity(paths.linear(), x0, x1, s)
        zero, ones = jnp.zeros_like(s), jnp.ones_like(s)
        learned = method.flow_map(params) if method.flow_map else None
        jump = learned or (lambda x, s, t: x + expand(t - s, x) * method.velocity(params)(x, s))
        relative = lambda a, b: jnp.sqrt(jnp.sum((a - b) ** 2) / jnp.sum(b**2))
        return {
            "0 to 1": relative(jump(x0, zero, ones), exact(x0, zero, ones)),
            "s to t": relative(jump(x, s, t), exact(x, s, t)),
        }

    summary = lambda method, params, seed, solver: {
        k: float(v) for k, v in jax.jit(functools.partial(errors, method))(params).items()
    }
    sample = jax.jit(data.sample, static_argnums=1)
    return Problem(
        {"name": "plain", "width": 64, "waves": 0},
        256,
        3000,
        functools.partial(drawn, sample, 256),
        summary,
        ORACLES,
        history=True,
    )


PROBLEMS = {
    "checkerboard": board,
    "gaussian": functools.partial(oracle, "gaussian"),
    "mixture": functools.partial(oracle, "mixture"),
}


def plan_of(problem: Problem, method: dict, *, steps: int, seed: int, teacher: Path | None):
    """The plan of one round of ``steps``."""
    from configs.checkerboard import get_config
    from fmjax.experiments import assemble, build, settings

    c = get_config()
    with c.unlocked(), c.ignore_type():
        c.net, c.method, c.batch_size, c.seed, c.steps = problem.net, method, problem.batch_size, seed, steps
        c.save_every = c.log_every = max(1, steps // 4)
        c.teacher = str(teacher or "") or None
        c.target, c.learning_rate = "frozen" if teacher else "self", 3e-3
        c.data.train, c.data.test = 1000, 100  # for the shape alone: batches are drawn afresh
    s = settings.read(c)
    batch = functools.partial(problem.batch, seed)
    return assemble.plan("flow", s.common, s.flow, s.flow.net, build.data(s.common.data), batch=batch)


def cost(problem: Problem, method: dict) -> float:
    """FLOPs of a step's loss and gradient, by XLA, relative to flow matching."""
    import jax
    import jax.numpy as jnp

    from fmjax.keys import example_keys

    def flops(method):
        plan = plan_of(problem, method, steps=1, seed=0, teacher=None)
        from fmjax.training import loop

        args = (
            loop.initial_parameters(plan),
            loop.initial_parameters(plan),
            plan.data.batch(0),
            example_keys(jax.random.key(0), jnp.arange(plan.data.batch_size)),
        )
        compiled = jax.jit(jax.value_and_grad(plan.method.loss, has_aux=True)).lower(*args).compile()
        return compiled.cost_analysis()["flops"]

    return flops(method) / flops(RECIPES["flow"].methods[0])


def folder(problem: str, method: str, seed: int) -> Path:
    """Return the folder of a run."""
    return FOLDER / problem / f"{''.join(c if c.isalnum() else '-' for c in method)}-{seed}"


def train_one(name: str, row: str, seed: int) -> None:
    """Train and evaluate one run; the last file that the run writes is ``result.json``."""
    from fmjax.storage import files
    from fmjax.training import logs, loop

    problem, recipe, path = PROBLEMS[name](), RECIPES[row], folder(name, row, seed)
    if (path / "result.json").exists():
        return
    teacher = folder(name, TEACHERS[recipe.times], seed) / "round-0" if recipe.taught else None
    budget = recipe.times * problem.budget / (2 if recipe.taught or row in TEACHERS.values() else 1)
    history = []
    for i, method in enumerate(recipe.methods):
        place = path / f"round-{i}"
        steps = round(budget / len(recipe.methods) / cost(problem, method))
        plan = plan_of(problem, method, steps=steps, seed=seed, teacher=teacher)
        start = loop.load_average(plan, teacher, "teacher") if teacher else None
        last = i == len(recipe.methods) - 1

        def hook(n, state, plan=plan, steps=steps):
            history.append([n / steps, problem.evaluate(plan.method, state.ema, seed, recipe.solver)])

        hooks = [hook] if last and problem.history else []
        if hooks:
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        try:
            state = loop.train(plan, place, params=start, teacher=start, hooks=hooks)
        except logs.Diverged as error:  # a result like another
            return files.write_json(path / "result.json", {"result": {"diverged": str(error)}, "history": []})
        teacher = place
    result = {"result": problem.evaluate(plan.method, state.ema, seed, recipe.solver), "history": history}
    files.write_json(path / "result.json", result)


def results(name: str) -> dict[str, list[dict]]:
    """Return the results of all runs of a problem; missing runs are trained, one per core at a time (one on a GPU)."""
    import jax

    methods = PROBLEMS[name]().methods
    cores = (
        sorted(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" and hasattr(os, "sched_getaffinity") else [0]
    )
    free = list(cores)

    def run_alone(row, seed):
        path = folder(name, row, seed)
        if (path / "result.json").exists():
            return
        path.mkdir(parents=True, exist_ok=True)
        core = free.pop()
        try:
            with (path / "log.txt").open("a") as log:
                pin = ["taskset", "-c", str(core)] if len(cores) > 1 else []
                command = [*pin, sys.executable, "-m", "launch.bench.learned", name, row, str(seed)]
                if subprocess.run(command, stdout=log, stderr=log).returncode:
                    raise RuntimeError(f"{row}, seed {seed} failed: see {path / 'log.txt'}")
        finally:
            free.append(core)

    with ThreadPoolExecutor(len(cores)) as pool:
        taught = {TEACHERS[RECIPES[row].times]: None for row in methods if RECIPES[row].taught}
        for rows in (tuple(taught), methods):
            list(pool.map(lambda args: run_alone(*args), [(row, seed) for seed in SEEDS for row in rows]))
    read = lambda row: [json.loads((folder(name, row, seed) / "result.json").read_text()) for seed in SEEDS]
    return {row: read(row) for row in methods}


def checkerboard_maps(repeats: int) -> list[dict]:
    """KL above the KL of as many perfect samples, and W2, by method and number of steps: mean and error over seeds."""
    from fmjax.experiments import report
    from fmjax.metrics import histogram, two_sample

    def text(runs, n, metric):
        if any("diverged" in r["result"] for r in runs):
            return "diverged"
        floor = histogram.checkerboard_floor(samples(n)) if metric == "KL" else 0
        return report.plus_minus(*two_sample.mean_se([r["result"][str(n)][metric] - floor for r in runs]))

    runs_of = results("checkerboard")
    rows = [
        {"method": row} | {f"{metric}, N={n}": text(runs, n, metric) for metric in ("KL", "W2") for n in STEPS}
        for row, runs in runs_of.items()
    ]
    apart = [two_sample.w2_exact(*perfect(seed)) for seed in SEEDS]
    floor = {f"KL, N={n}": f"({histogram.checkerboard_floor(samples(n)):.4f})" for n in STEPS}
    floor |= {f"W2, N={n}": report.plus_minus(*two_sample.mean_se(apart)) for n in STEPS}
    dash = {f"W2, N={n}": "-" for n in STEPS}
    theirs = {f"KL, N={n}": f"{kl - PUBLISHED_FLOOR:.3f}" for n, kl in PUBLISHED.items()} | dash
    return [*rows, {"method": "LSD as published", **theirs}, {"method": "perfect samples", **floor}]


def perfect(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of 2,048 points of the checkerboard."""
    import jax

    from fmjax.data import densities

    draw = lambda base: np.asarray(densities.draw_checkerboard(jax.random.key(seed + base), 2048))
    return draw(2000), draw(3000)


def oracle_maps(repeats: int) -> list[dict]:
    """``|X_hat - X| / |X|`` of trained maps against exact ones, at a quarter of the budget and at its end."""
    from fmjax.experiments import report
    from fmjax.metrics import two_sample

    runs_of, rows = {name: results(name) for name in ("gaussian", "mixture")}, []
    for row in ORACLES:
        cells = {"method": row}
        for name, runs in runs_of.items():
            if any("diverged" in r["result"] for r in runs[row]):
                cells |= dict.fromkeys((f"{name}, 1/4 of the budget", f"{name}, s to t", f"{name}, 0 to 1"), "diverged")
                continue
            text = lambda values: report.plus_minus(*two_sample.mean_se(values))
            early = text([r["history"][0][1]["s to t"] for r in runs[row]])
            cells[f"{name}, 1/4 of the budget"] = "-" if row in TO_DATA else early
            for where in ("s to t", "0 to 1"):
                cells[f"{name}, {where}"] = (
                    "-" if row in TO_DATA and where == "s to t" else text([r["result"][where] for r in runs[row]])
                )
        rows.append(cells)
    return rows


SUITES = (checkerboard_maps, oracle_maps)

if __name__ == "__main__":
    train_one(sys.argv[1], sys.argv[2], int(sys.argv[3]))
