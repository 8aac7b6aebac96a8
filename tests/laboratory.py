"""Small runs of the laboratory: configs that differ from ``configs/base.py`` by dotted names, on one device."""

from __future__ import annotations

import functools
from pathlib import Path

from configs import base

ROOT = Path(__file__).parents[1]
SPEEDS = ("steps_per_s", "examples_per_s")
POINTS = {"name": "eight_gaussians", "train": 240, "validation": 80, "test": 120}
SMALL = {
    "data": POINTS, "net": {"name": "mlp", "width": 16, "depth": 1}, "batch_size": 32, "steps": 8, "warmup": 2,
    "log_every": 4, "save_every": 4, "sample_every": 0, "ema": 0.9, "schedule": "constant", "solver_steps": 2,
    "forward_examples": 64, "coupling": "independent", "sampling": {"seeds": 2, "samples": 40},
    "samplers": {"euler": (2,), "rk4": (2,)},
}  # fmt: skip


def config(**changes):
    """Return a small config of points, locked; dotted names change fields, and ``correctors`` name stages."""
    c = base.get_config()
    with c.ignore_type():
        for name, value in (SMALL | changes).items():
            *parents, last = name.split(".")
            functools.reduce(lambda node, part: node[part], parents, c)[last] = value
    return c.lock()
