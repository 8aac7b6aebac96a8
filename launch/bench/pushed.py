"""Suites of ``launch.bench``: smooth pushes on flows whose error is known, and against the theory of the push."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import correction
from fmjax.correction import Push
from fmjax.experiments.samplers import PUSHES
from fmjax.oracles import mismatch
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


def fit(coefficients, solver: str, n: int, kind: str) -> Push:
    """Fit a push on samples of a solver with ``n`` steps and as many data."""
    x, _ = uncorrected(coefficients, TUNING[0], solver=solver, n=n, exact=False)
    data = RING.sample(TUNING[1], SAMPLES)
    return correction.fit_push(np.asarray(x)[:, None], np.asarray(data)[:, None], **PUSHES[kind])


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


SUITES = (pushed_toy, push_theory)
