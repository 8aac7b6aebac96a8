"""Suites of ``launch.bench``: whole processes and whole runs."""

import functools
import importlib
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fmjax.experiments import report
from launch.bench.measure import FOLDER, Spent, interleaved


def imports(repeats: int) -> list[dict]:
    """Import time in fresh processes: every module of fmjax but ``report``, ``metrics`` and ``data``. Goal: 1.3."""
    import fmjax

    names = (m.name for m in pkgutil.walk_packages(fmjax.__path__, "fmjax."))
    ours = [m for m in names if not m.startswith(("fmjax.experiments", "fmjax.metrics", "fmjax.data"))]
    imports = {"jax, flax, optax, diffrax": ["jax", "flax", "optax", "diffrax"], "fmjax": ["fmjax", *ours]}

    def run(modules):
        clocks = "(time.perf_counter(), time.process_time())"
        code = f"import time; a = {clocks}; import {', '.join(modules)}; b = {clocks}; print(b[0] - a[0], b[1] - a[1])"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        return Spent(*(1e3 * float(s) for s in out.split()))

    spent = interleaved({name: functools.partial(run, modules) for name, modules in imports.items()}, repeats)
    first = next(iter(spent.values()))
    return [{"modules": name, "ms": t.ms} | t.over(first) | {"goal": 1.3} for name, t in spent.items()]


def start(repeats: int) -> list[dict]:
    """From the start of a process to its first training step on the digits, the compilation cache cold and warm."""
    times_s = {"cold": [], "warm": []}
    memory = dict.fromkeys(times_s, 0.0)
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
            for cache in times_s:
                log = Path(folder, cache, "flow", "metrics.jsonl")
                command = [
                    sys.executable,
                    "-m",
                    "launch.train",
                    "--config=configs/digits.py",
                    f"--workdir={log.parents[1]}",
                ]
                began = time.perf_counter()
                output = Path(folder, f"{cache}.txt")
                with output.open("w") as errors:
                    process = subprocess.Popen([*command, "--config.steps=1"], env=environment, stderr=errors)
                while not (log.exists() and log.read_text().endswith("\n")):
                    if process.poll() is not None:
                        raise RuntimeError(f"{' '.join(command)} ended before its first step: {output.read_text()}")
                    time.sleep(0.01)
                times_s[cache].append(time.perf_counter() - began)
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                memory[cache] = max(memory[cache], usage.ru_maxrss / 2**10)
    return [{"cache": c, "s": statistics.median(times_s[c]), "peak_MB": memory[c]} for c in times_s]


def digits(repeats: int) -> list[dict]:
    """The table of ``launch.pipeline`` on the digits: mean and standard error over seeds, against test digits."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch.pipeline", "--config=configs/digits.py", f"--workdir={folder}/w"]
        subprocess.run(command, check=True)
        return table_of(Path(folder, "w", "metrics.json"))


def fashion_mnist(repeats: int) -> list[dict]:
    """I-CFM and OT-CFM on Fashion-MNIST, each trained by ``configs/fashion_mnist.py`` and sampled by Euler steps.

    The runs are kept in ``workdir/bench`` and resumed there; ``FASHION_MNIST`` in the environment names the folder of
    the original files, which are downloaded otherwise.
    """
    rows = []
    for name, coupling in (("I-CFM", "independent"), ("OT-CFM", "minibatch_ot")):
        folder = str(FOLDER / f"fashion_mnist_{coupling}")
        command = ["--config=configs/fashion_mnist.py", f"--workdir={folder}", f"--config.coupling={coupling}"]
        if "FASHION_MNIST" in os.environ:
            command.append(f"--config.data.source_dir={os.environ['FASHION_MNIST']}")
        for launcher in ("train", "evaluate"):
            subprocess.run([sys.executable, "-m", f"launch.{launcher}", *command], check=True)
        table = table_of(Path(folder, "evaluation.json"))
        rows += [{"method": name} | {k: v for k, v in row.items() if k != "corrections"} for row in table]
    floor = next(row for row in rows if not row["NFE"]) | {"method": "-"}
    return [row for row in rows if row["NFE"]] + [floor]


MAPS = {
    "LSD": {"name": "lagrangian"},
    "ESD, all stopped": {"name": "eulerian"},
    "PSD-M": {"name": "progressive"},
}
JUMPS = (1, 2, 4, 8)


def digits_maps(repeats: int) -> list[dict]:
    """Flow maps of the digits, 2,000 steps from a flow by I-CFM, beside that flow at equal and at 16 times the NFE."""
    fields = {"coupling": "independent"}
    return _maps("digits", "digits_flow", fields, steps=2000, learning_rate=1e-3, seeds=4, samples=360)


SMALL_DIT = {"name": "dit", "width": 128, "depth": 4, "heads": 4, "patch": 7}  # 16 tokens an image, for a CPU
MNIST = {"net": SMALL_DIT, "coupling": "minibatch_ot", "steps": 5000, "learning_rate": 2e-3}


def mnist_maps(repeats: int) -> list[dict]:
    """The same on MNIST with a small transformer, 800 steps from a flow by OT-CFM.

    ``MNIST`` in the environment names the folder of the original files, which are downloaded otherwise.
    """
    return _maps("mnist", "mnist_flow", MNIST, steps=800, learning_rate=5e-4, seeds=3, samples=500)


def config(name: str, fields: dict):
    """Return a config with changed fields; ``MNIST`` and so on in the environment name folders of original files."""
    c = importlib.import_module(f"configs.{name}").get_config()
    with c.unlocked(), c.ignore_type():
        c.sample_every = 0
        if c.data.name.upper() in os.environ:
            c.data.source_dir = os.environ[c.data.name.upper()]
        for field, value in fields.items():
            c[field] = value
    return c


def _maps(
    name: str, flow: str, fields: dict, *, steps: int, learning_rate: float, seeds: int, samples: int
) -> list[dict]:
    """Return rows of the flow and of every map that starts from the flow; the runs are kept in ``workdir/bench``."""
    from fmjax.experiments import evaluate, settings, train

    rows, start, compared = (
        [],
        str(FOLDER / flow),
        {"sampling": {"seeds": seeds, "samples": samples}, "corrections": {}},
    )
    euler = sorted({*JUMPS, *(16 * n for n in JUMPS)})
    runs = {"flow": (start, config(name, fields | compared | {"samplers": {"euler": euler}}))}
    for method, spec in MAPS.items():
        changes = {"init": start, "method": spec, "steps": steps, "learning_rate": learning_rate}
        folder = f"{start}_{''.join(a for a in method if a.isalnum())}"
        runs[method] = (folder, config(name, fields | compared | changes | {"samplers": {"flow_map": JUMPS}}))
    for method, (folder, changed) in runs.items():
        checked = settings.read(changed)
        train.main(checked, Path(folder))
        evaluate.main(checked, Path(folder))
        table = table_of(Path(folder, "evaluation.json"))
        rows += [
            {"method": method} | {k: v for k, v in row.items() if k != "corrections"} for row in table if row["NFE"]
        ]
    return rows + [
        {"method": "-"} | {k: v for k, v in row.items() if k != "corrections"} for row in table if not row["NFE"]
    ]


def table_of(file: Path) -> list[dict]:
    """The rows of a run's ``metrics.json`` or ``evaluation.json`` with their distances as ``mean ± se``."""
    table = json.loads(file.read_text())
    cells = lambda row: {metric: report.plus_minus(*d) for metric, d in row.distances.items()}
    rows = report.in_order(report.Row(**row) for row in table["rows"])
    return [{"sampler": r.name, "NFE": r.nfe, "corrections": r.corrections} | cells(r) for r in rows]


SUITES = (imports, start, digits, fashion_mnist, digits_maps, mnist_maps)
