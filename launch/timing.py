"""What the benchmarks share: two clocks, interleaved repeats, a table.

A suite is a function ``name(repeats) -> list[dict]``, one row each; the repeats of what is compared are interleaved, so
that a busy moment of the machine falls on all alike, and medians are reported. ``--into`` puts the table between the
lines ``<!-- SUITE -->`` and ``<!-- end -->`` of a file.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

Suites = dict[str, Callable[[int], list[dict]]]


class Spent(NamedTuple):
    """Wall time and processor time of all threads, in ms; the latter tells what is due to others on the machine."""

    ms: float
    cpu_ms: float

    def over(self, other: "Spent", times: float = 1) -> dict[str, float]:
        """Columns ``ratio`` and ``cpu_ratio``: this against ``times`` of the other."""
        return {"ratio": self.ms / (times * other.ms), "cpu_ratio": self.cpu_ms / (times * other.cpu_ms)}


def now() -> Spent:
    """Both clocks."""
    return Spent(1e3 * time.perf_counter(), 1e3 * time.process_time())


def since(start: Spent) -> Spent:
    """What was spent since ``start``."""
    return Spent(*(b - a for a, b in zip(start, now(), strict=True)))


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, Spent]:
    """Medians of each function over interleaved repeats, after one call to compile and warm up.

    A function that returns ``Spent`` has measured itself.
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


def define_flags(suites: Suites) -> None:
    """``--suite``, ``--repeats`` and ``--into``."""
    flags.DEFINE_enum("suite", None, sorted(suites), "What to measure.", required=True)
    flags.DEFINE_integer("repeats", 15, "Interleaved repeats per measurement.", lower_bound=1)
    flags.DEFINE_string("into", None, "Also put the table into this file, between its marks.")


def markdown(rows: list[dict]) -> str:
    """Rows as a markdown table."""

    def show(v):
        return f"{v:.3g}" if isinstance(v, float) and abs(v) < 1000 else f"{v:.0f}" if isinstance(v, float) else str(v)

    head = list(rows[0])
    lines = [head, ["---"] * len(head)] + [[show(row[k]) for k in head] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tabulate(module: str, suites: Suites) -> None:
    """Runs the suite that the flags name and prints its table."""
    chosen = flags.FLAGS
    name, before, after = chosen.suite, f"<!-- {chosen.suite} -->\n", "<!-- end -->"
    text = Path(chosen.into).read_text() if chosen.into else before + after
    if before not in text:
        raise SystemExit(f"error: {chosen.into} has no line {before.strip()}")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}, load {os.getloadavg()[0]:.1f}"
    table = markdown(suites[name](chosen.repeats))
    how = f"`python -m {module} --suite={name} --repeats={chosen.repeats}`; {machine}; jax {jax.__version__}"
    print(f"{how}\n\n{table}")
    if chosen.into:
        head, rest = text.split(before, 1)
        Path(chosen.into).write_text(f"{head}{before}\n{how}\n\n{table}\n\n{after}{rest.split(after, 1)[1]}")
