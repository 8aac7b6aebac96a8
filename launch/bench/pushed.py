"""Suites of ``launch.bench``: smooth pushes where the error is known, against their theory, and on digits."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import correction, metrics
from fmjax.correction import Push
from fmjax.experiments import (
    build,
    comparison,
    drawing,
    evaluate,
    measuring,
    networks,
    pushes,
    report,
    settings,
    train,
    workdir,
)
from fmjax.experiments.samplers import PUSHES, Sampler, corrected_samplers, plain_samplers
from fmjax.oracles import mismatch
from launch.bench import runs
from launch.bench.measure import FOLDER
from launch.bench.mismatch import ERRORS, REPORTING, RING, SAMPLES, STEPS, TUNING, distance, line, uncorrected

SIZES, LAMS = (1.0, 0.5, 0.25), (0.1, 0.5, 2.0)  # of the error; of the push
WAVES = 200  # test functions


def moved(push: Push, x):
    """The states after a push at the end, at its natural strength."""
    return x + correction.sobolev_drift(push, ts=[1.0])(x, jnp.ones(len(x)))


@jax.jit
def ends(push: Push, x):
    """Move the ends of a flow."""
    return moved(push, x)


@jax.jit
def exact_kl(push: Push, x, log_p):
    """Terms of the KL of pushed ends ``x`` of log-density ``log_p`` to the data."""
    y, log_p = mismatch.pushed(functools.partial(moved, push), x, log_p)
    return log_p - RING.log_density(y, 1.0)


def fit(coefficients, solver: str, n: int, kind: str, lam: float | None = None) -> Push:
    """Fit a push on samples of a solver with ``n`` steps and as many data."""
    x, _ = uncorrected(coefficients, TUNING[0], solver=solver, n=n, exact=False)
    data = RING.sample(TUNING[1], SAMPLES)
    return correction.fit_push(np.asarray(x)[:, None], np.asarray(data)[:, None], lam=lam, **PUSHES[kind])


def pushed_toy(repeats: int) -> list[dict]:
    """Sliced W2 to the data and exact KL against it of fitted pushes, as in ``correction_toy``.

    Every push is fitted on 20,000 other samples of its sampler and 20,000 other data, at strength 1 and the default
    ``lam``: nothing is tuned. Mean and standard error over three sampling seeds.
    """
    rows = []
    for error, coefficients in ERRORS.items():
        for solver in ("rk4", "euler"):
            values = {name: ({}, {}) for name in ("none", *PUSHES)}
            for n in STEPS:
                fits = {kind: fit(coefficients, solver, n, kind) for kind in PUSHES}
                for key in REPORTING:
                    x, known = uncorrected(coefficients, key, solver=solver, n=n, exact=solver == "rk4")
                    for name, (w2, kl) in values.items():
                        w2.setdefault(n, []).append(distance(x if name == "none" else ends(fits[name], x)))
                        terms = np.nan
                        if known is not None and name == "none":
                            terms = float((known[1] - RING.log_density(known[0], 1.0)).mean())
                        elif known is not None:
                            terms = float(exact_kl(fits[name], *known).mean())
                        kl.setdefault(n, []).append(terms)
            rows += [line(error, solver, name, float(name != "none"), *values[name]) for name in values]
    floor = {n: [distance(RING.sample(key, SAMPLES)) for key in REPORTING] for n in STEPS}
    return [*rows, line("-", "-", "perfect samples", 0.0, floor, {n: [np.nan] for n in STEPS})]


def pushed_lam(repeats: int) -> list[dict]:
    """The push of ``pushed_toy`` after ten RK4 steps by ``lam``; the modes have variance 0.04, the data 2.04."""
    rows = []
    for error, coefficients in ERRORS.items():
        for lam in (0.001, 0.005, 0.04, 0.3, None):
            push, values = fit(coefficients, "rk4", 10, "push", lam), {"W2": [], "KL": []}
            for key in REPORTING:
                x, known = uncorrected(coefficients, key, solver="rk4", n=10, exact=True)
                values["W2"].append(distance(ends(push, x)))
                values["KL"].append(float(exact_kl(push, *known).mean()))
            signal, noise = float(push.signal[0, 0]), push.noise[0, 0].tolist()
            cells = {name: report.plus_minus(*metrics.mean_se(v)) for name, v in values.items()}
            rows.append({"error": error, "lam": lam or "variance"} | cells | {"signal": signal, "noise": sum(noise)})
    return rows


def potential(push: Push, x: np.ndarray) -> np.ndarray:
    """The function whose gradient is the push, up to a constant."""
    z = (x - push.centre[0]) @ push.basis[0].T
    y = z[:, : push.quadratic.shape[-1]]
    waves = np.cos(z @ push.waves[0].T + push.phases[0]) @ push.amplitudes[0, 0]
    return z @ push.linear[0, 0] + ((y @ push.quadratic[0, 0]) * y).sum(1) / 2 + waves


def push_theory(repeats: int) -> list[dict]:
    """What is left after a push against ``q - m f / (8 lam)``, in 200 test functions, by size of the error and ``lam``.

    The test functions are cosines of frequencies up to 4; the flow has the mixed error of ``correction_toy`` times a
    factor and ends of 20 Runge-Kutta steps. Left over is the root mean square of ``E_{p'} - E_q``, in units of the root
    mean square of ``E_p - E_q``; predicted is the same of ``-E_m f / (8 lam)``; apart is their difference. The last
    column is the same of 20,000 other data.
    """
    rows, rng = [], np.random.default_rng(0)
    waves, phases = 1.5 * rng.standard_normal((WAVES, 2)), rng.uniform(0, 2 * np.pi, WAVES)
    means = lambda x, weights=None: np.average(np.cos(x @ waves.T + phases), 0, weights)
    weighted = lambda x, f: (np.cos(x @ waves.T + phases) * f[:, None]).mean(0)
    rms = lambda a: float(np.sqrt((a**2).mean()))
    q = np.asarray(RING.sample(TUNING[1], SAMPLES), np.float64)
    for size in SIZES:
        coefficients = jax.tree.map(lambda c, size=size: size * c, ERRORS["mixed"])
        p, _ = uncorrected(coefficients, TUNING[0], solver="rk4", n=20, exact=False)
        p = np.asarray(p, np.float64)
        gap = means(p) - means(q)
        for lam in LAMS:
            push = correction.fit_push(p[:, None], q[:, None], lam=lam, ridge=1e-6, gram=SAMPLES)
            after = np.asarray(ends(push, jnp.asarray(p, jnp.float32)), np.float64)
            f_p, f_q = potential(push, p), potential(push, q)
            f_p, f_q = (f - (f_p.mean() + f_q.mean()) / 2 for f in (f_p, f_q))
            predicted = -(weighted(p, f_p) + weighted(q, f_q)) / 2 / (8 * lam)
            left = means(after) - means(q)
            noise = means(np.asarray(RING.sample(REPORTING[0], SAMPLES))) - means(q)
            rows.append({
                "error": f"mixed x {size:g}", "lam": lam, "left over": rms(left) / rms(gap),
                "predicted": rms(predicted) / rms(gap), "apart": rms(left - predicted) / rms(gap),
                "sampling noise": rms(noise) / rms(gap),
            })  # fmt: skip
    return rows


JUMPS = (("flow_map", 1), ("flow_map", 2), ("flow_map", 4), ("rk4", 2))


def pushed_digits(repeats: int) -> list[dict]:
    """Variants of a push on the networks of the quickstart: ``lam``, mid-path, two rounds; distances to test digits.

    The run of ``configs/digits.py`` lies in ``workdir/bench/digits_pushed`` and is made where it is missing. All rows
    of a sampler start from the same noise: mean and standard error over 4 seeds of 400.
    """
    folder = FOLDER / "digits_pushed"
    command = [sys.executable, "-m", "launch.pipeline", "--config=configs/digits.py", f"--workdir={folder}"]
    if not (folder / "metrics.json").exists():
        subprocess.run(command, check=True)
    config = settings.read(workdir.read_config(folder))
    models, identity, _ = networks.load_models(config, folder)
    data = build.data(config.common.data)
    distances, draws = comparison.distances(config, data, data.test), comparison.draws_of(config, data)
    rows = []
    for solver, n in JUMPS:
        plain = plain_samplers({solver: (n,)})[0]
        variants = {"none": plain} | {name: _pushed(plain, **options) for name, options in _variants(n).items()}
        for name, sampler in variants.items():
            fits = pushes.fit_all(config, data, [sampler], models, folder / pushes.STAGE)
            ready = pushes.add(models, fits)
            drawn = comparison.draw_all([sampler], ready, draws, directory=folder / "draws", identity=identity)
            cost = drawing.sampler_cost(sampler, ready)
            rows.append(_row(plain, name, cost.nfe, drawn[sampler.name], distances))
            if name == "affine, then push":
                again = _second_round(config, data, sampler, ready, drawn[sampler.name])
                rows.append(_row(plain, "affine, then push, twice", cost.nfe, again, distances))
    floor = measuring.measure(comparison.training_runs(data, draws), distances)
    cells = {name: report.plus_minus(*metrics.mean_se(values)) for name, values in floor.items()}
    return [*rows, {"sampler": "training data", "correction": "-", "NFE": "-"} | cells]


def _variants(n: int) -> dict[str, dict]:
    """Return the options of the corrections of a sampler of ``n`` steps, by name."""
    middle = (n // 2, n) if n > 1 else (0, 1)
    both = {"by": "affine_push", "at": (n,)}
    return {
        "affine": {"by": "affine", "at": (n,)}, "push": {"by": "push", "at": (n,)}, "affine, then push": both,
        "affine, then push, lam / 8": both | {"lam": 0.035}, "affine, then push, 8 lam": both | {"lam": 2.2},
        f"affine, then push, at {middle[0]} and {n}": both | {"at": middle},
    }  # fmt: skip


def _pushed(plain: Sampler, *, by: str, at: tuple[int, ...], **options) -> Sampler:
    entry = {"solver": plain.solver, "steps": plain.steps, "at": at, "by": by, **options}
    return corrected_samplers({"push": entry}, [plain], [])[-1]


def _row(plain: Sampler, name: str, nfe: int, x: np.ndarray, distances) -> dict:
    values = measuring.measure(x, distances)
    cells = {metric: report.plus_minus(*metrics.mean_se(v)) for metric, v in values.items()}
    return {"sampler": plain.name, "correction": name, "NFE": nfe} | cells


def _second_round(config, data, sampler: Sampler, models, drawn: np.ndarray) -> np.ndarray:
    """Return drawn samples ``[runs, n, ...]`` after a second push, fitted on other samples after the first."""
    program = drawing.program(sampler, models)
    keys = drawing.sample_keys(config.common.seed, 2, sampler.options["examples"], pushes.PURPOSE)
    x = drawing.in_chunks(lambda keys: program(models.params, keys), keys)
    target, _ = pushes.examples(config, data)
    push = correction.fit_push(x[:, None], target[:, None], **PUSHES[sampler.by])
    return np.stack([np.asarray(ends(push, jnp.asarray(run))) for run in drawn])


FASHION = {"net": {"name": "mlp", "width": 512, "depth": 4}, "batch_size": 128, "steps": 3000, "learning_rate": 1e-3}


def pushed_fashion(repeats: int) -> list[dict]:
    """Pushes of 28 x 28 pixels: an MLP's flow of Fashion-MNIST, a weak one, with few and with more steps.

    ``FASHION_MNIST`` in the environment names the folder of the original files, which are downloaded otherwise. Mean
    and standard error over 3 seeds of 1000 samples against the test images; pushes are fitted on 15,000 other samples
    and the 55,000 training images. The run is kept in ``workdir/bench``.
    """
    plain = (("euler", 4), ("rk4", 2), ("rk4", 8))
    corrections = {
        f"{by}_{solver}_{n}": {"solver": solver, "steps": n, "at": (n,), "by": by}
        for solver, n in plain
        for by in PUSHES
    }
    fields = FASHION | {"samplers": {"euler": (4,), "rk4": (2, 8)}, "corrections": corrections, "correctors": {}}
    fields |= {"flow_map": {}, "sampling": {"seeds": 3, "samples": 1000}}
    config, folder = settings.read(runs.config("fashion_mnist", fields)), FOLDER / "fashion_pushed"
    train.main(config, folder)
    evaluate.main(config, folder)
    return runs.table_of(folder / "evaluation.json")


SUITES = (pushed_toy, pushed_lam, push_theory, pushed_digits, pushed_fashion)
