"""Measurements: ``python -m launch.bench --suite=couplings [--repeats=15] [--out=FILE.json]``.

A suite is a function ``name(repeats) -> list[dict]``, one row each; the repeats of what is compared are interleaved, so
that a busy moment of the machine falls on all alike, and medians are reported.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median wall time in ms of each function over interleaved repeats, after one call to compile and warm up."""
    times = {name: [] for name in functions}
    for repeat in range(-1, repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def image_like(rng: np.random.Generator, n: int) -> np.ndarray:
    """``[n, 32, 32, 3]`` in [-1, 1]: random fields with the 1/f amplitude spectrum of natural images, mostly grey."""
    f = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.rfftfreq(32)[None])
    amplitude = 1 / np.maximum(f, 1 / 32)

    def field(channels):
        white = np.fft.rfft2(rng.standard_normal((n, channels, 32, 32)))
        x = np.fft.irfft2(white * amplitude, s=(32, 32))
        return x / x.std()

    return np.tanh(0.55 * (field(1) + 0.3 * field(3))).transpose(0, 2, 3, 1).astype(np.float32)


def couplings(repeats: int) -> list[dict]:
    """Minibatch OT: time from two batches to the pairing or plan, and the transport cost attained.

    Sources are N(0, I); targets are the 8x8 digits (d = 64) or 1/f random fields (d = 3072). ``gain`` is the share of
    the exact gain over random pairing that is realised, ``(random - cost) / (random - exact)``.
    """
    import optax
    import ot
    from sklearn.datasets import load_digits

    from fmjax import couplings as c

    def jitted(solve):
        def run(x0, x1):
            cost = jnp.maximum((x0**2).sum(1)[:, None] + (x1**2).sum(1)[None] - 2 * x0 @ x1.T, 0)
            return solve(cost)

        return jax.jit(run)

    def hungarian(cost):
        i, j = optax.assignment.hungarian_algorithm(cost)
        return jnp.zeros_like(cost).at[i, j].set(1 / len(cost))

    def sinkhorn(scale):
        return jitted(lambda cost: c.sinkhorn(cost, eps=0.05 * scale(cost)).matrix)

    on_device = {
        "optax hungarian, jit": jitted(hungarian),
        "sinkhorn 0.05 std, jit": sinkhorn(jnp.std),
        "sinkhorn 0.05 mean, jit": sinkhorn(jnp.mean),
    }
    rng = np.random.default_rng(0)
    digits = load_digits().images.astype(np.float32) / 8 - 1
    rows = []
    for d in (64, 3072):
        for b in (128, 256, 512):
            data = digits[rng.permutation(len(digits))[:b]] if d == 64 else image_like(rng, b)
            x0, x1 = rng.standard_normal((b, d), dtype=np.float32), data.reshape(b, d)
            y0, y1 = jnp.asarray(x0), jnp.asarray(x1)
            uniform = np.full(b, 1 / b)

            def scipy_exact(x0=x0, x1=x1, b=b):
                plan = np.zeros((b, b))
                plan[c.assignment(c.squared_cost(x0, x1)), np.arange(b)] = 1 / b
                return plan

            functions = {
                "scipy assignment, host": scipy_exact,
                "POT emd, host": lambda x0=x0, x1=x1, u=uniform: ot.emd(u, u, c.squared_cost(x0, x1)),
            }
            functions |= {name: lambda f=f, y0=y0, y1=y1: f(y0, y1) for name, f in on_device.items()}
            ms = interleaved(functions, repeats)
            cost = c.squared_cost(x0.astype(np.float64), x1.astype(np.float64))
            plans = {name: np.asarray(f(), np.float64) for name, f in functions.items()}
            paid = {name: float((plan * cost).sum() / plan.sum()) for name, plan in plans.items()}
            exact, random = paid["scipy assignment, host"], float(cost.mean())
            for name in functions:
                excess, gain = paid[name] / exact - 1, (random - paid[name]) / (random - exact)
                rows.append({"d": d, "B": b, "method": name, "ms": ms[name], "excess_%": 100 * excess, "gain": gain})
    return rows


SUITES = {"couplings": couplings}

FLAGS = flags.FLAGS
flags.DEFINE_enum("suite", "couplings", sorted(SUITES), "What to measure.")
flags.DEFINE_integer("repeats", 15, "Interleaved repeats per measurement.", lower_bound=1)
flags.DEFINE_string("out", None, "Also write the rows as JSON to this file.")


def markdown(rows: list[dict]) -> str:
    """Rows as a markdown table."""

    def show(v):
        return f"{v:.3g}" if isinstance(v, float) and abs(v) < 1000 else f"{v:.0f}" if isinstance(v, float) else str(v)

    head = list(rows[0])
    lines = [head, ["---"] * len(head)] + [[show(row[k]) for k in head] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(_):
    """Runs the suite and prints its table."""
    load = os.getloadavg()[0]
    rows = SUITES[FLAGS.suite](FLAGS.repeats)
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, {jax.default_backend()}, load before {load:.2f}"
    print(f"{FLAGS.suite}: medians of {FLAGS.repeats} interleaved repeats; {machine}; jax {jax.__version__}\n")
    print(markdown(rows))
    if FLAGS.out:
        with open(FLAGS.out, "w") as file:
            json.dump(
                {"suite": FLAGS.suite, "repeats": FLAGS.repeats, "machine": machine, "rows": rows}, file, indent=1
            )


if __name__ == "__main__":
    app.run(main)
