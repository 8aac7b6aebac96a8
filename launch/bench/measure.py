"""Clocks, interleaved medians and tables, for the suites of ``launch.bench``."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

FOLDER = Path(os.environ.get("FMJAX_BENCH", "workdir/bench"))  # runs that suites keep and resume


class Spent(NamedTuple):
    """Wall time and processor time of all threads, in ms; other programs on the machine change only the wall time."""

    ms: float
    cpu_ms: float

    def over(self, other: "Spent", times: float = 1) -> dict[str, float]:
        """Return the columns ``ratio`` and ``cpu_ratio``: this against ``times`` of the other."""
        return {"ratio": self.ms / (times * other.ms), "cpu_ratio": self.cpu_ms / (times * other.cpu_ms)}


def now() -> Spent:
    """Read both clocks."""
    return Spent(1e3 * time.perf_counter(), 1e3 * time.process_time())


def since(start: Spent) -> Spent:
    """Return the time spent since ``start``."""
    return Spent(*(b - a for a, b in zip(start, now(), strict=True)))


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, Spent]:
    """Return the median times of each function over interleaved repeats, after one call to compile and warm up.

    A function that returns ``Spent`` measures its time itself.
    """
    taken = {name: [] for name in functions}
    for repeat in range(-1, repeats):
        for name, function in functions.items():
            start = now()
            result = function()
            if not isinstance(result, Spent):
                jax.block_until_ready(result)
                result = since(start)
            if repeat >= 0:
                taken[name].append(result)
    return {name: Spent(*map(statistics.median, zip(*values, strict=True))) for name, values in taken.items()}


def markdown(rows: list[dict]) -> str:
    """Format rows as a markdown table."""

    def show(v):
        return f"{v:.3g}" if isinstance(v, float) and abs(v) < 1000 else f"{v:.0f}" if isinstance(v, float) else str(v)

    head = list(rows[0])
    lines = [head, ["---"] * len(head)] + [[show(row[k]) for k in head] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
