"""The log-likelihood of held-out data under the flow of a run folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import sampling
from fmjax.checks import Range, check_choice, check_range
from fmjax.data.units import to_units
from fmjax.experiments import build, drawing, workdir
from fmjax.experiments.run import Run
from fmjax.experiments.settings import Settings
from fmjax.metrics import bits_per_dimension, mean_se
from fmjax.storage import files
from fmjax.training import logs

CHUNK = 64  # examples per adaptive solve
PURPOSE = 6  # keys of dequantisation noise


def main(
    settings: Settings, path: Path, *, split: str = "test", count: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compute the log-likelihood of a split, print it, and write ``likelihood.json``.

    Images on grey levels get uniform noise within their level (dequantisation), and the result is in bits per
    dimension, an upper bound of the code length. Other data have nats per example, in the units of the data.

    Args:
        settings: the config of the run.
        path: the run folder.
        split: ``"test"``, ``"validation"`` or ``"train"``.
        count: the first examples of the split; by default all.
        seed: seed of the noise and of the probes.

    Returns:
        The content of the file: ``mean`` and ``standard_error``, ``unit``, ``split``, ``count``, ``seed``, ``probes``.

    Raises:
        ValueError: a path whose source is not standard normal, or a number out of range.
        RuntimeError: a solve failed.
        WorkdirError: no trained flow.
    """
    check_choice("split", split, ("test", "validation", "train"))
    check_range("seed", seed, Range(0, 2**32 - 1))
    run, data = Run(settings, path), build.data(settings.common.data)
    examples = getattr(data, split)
    count = examples.count if count is None else count
    check_range("count", count, Range(2, examples.count))
    level = None if data.levels is None or data.kind != "image" else 2 / (data.levels - 1)
    values = []
    with logs.bar("likelihood", count, unit="example") as progress:
        for i in range(0, count, CHUNK):
            rows = slice(i, min(i + CHUNK, count))
            values.append(_log_prob(run, examples, rows, level, seed))
            progress.update(rows.stop - rows.start)
    log_p = np.concatenate(values)
    d = math.prod(run.models.shape)
    bits = level is not None
    mean, error = mean_se(bits_per_dimension(log_p, d, level=level) if bits else log_p)
    unit = "bits per dimension" if bits else "nats per example"
    probes = 1 if d > 64 else None
    result = {"mean": mean, "standard_error": error, "unit": unit, "split": split, "count": count}
    result |= {"seed": seed, "probes": probes, "run": run.identity}
    if jax.process_index() == 0:
        files.write_json(workdir.local(path) / "likelihood.json", result)
        print(f"{split}: {mean:.4f} +- {error:.4f} {unit}, {count} examples")
    return result


def _log_prob(run: Run, examples, rows: slice, level: float | None, seed: int) -> np.ndarray:
    """Return the log-density of some examples; data sets hold the units of the network."""
    x = np.asarray(examples.x[rows])
    cond = jax.tree.map(lambda a: a[rows], examples.cond) if run.settings.common.conditional else None
    if level is not None:
        keys = drawing.sample_keys(seed, 0, rows.stop, PURPOSE)[rows]
        x = np.asarray(sampling.dequantise(keys, jax.numpy.asarray(x), level=level))
    x = to_units(run.units, x, of="examples", to="data")
    return run.log_prob(x, cond=to_units(run.units, cond, of="conditions", to="data"), seed=seed, first=rows.start)
