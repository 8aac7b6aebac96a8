"""What a training run records: means over a window of steps, in ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from fmjax.storage import checkpoint, files
from fmjax.training.step import GAPS

BLOWN_UP = 1e3  # a term this many times the first step's loss is no training any more


class Diverged(RuntimeError):
    """A loss, one of its terms or a gradient is not finite, or has blown up."""


class Window:
    """The running means since the last record, how fast the steps went, and the first step's loss."""

    def __init__(self, sums: dict | None = None, count: int = 0, first: float | None = None):
        self.sums, self.count, self.first = dict(sums or {}), count, first
        self.since, self.timed = None, 0

    def add(self, steps: list[dict]) -> None:
        if self.first is None and steps:
            self.first = abs(float(steps[0]["loss"]))
        for metrics in steps:
            for name, value in metrics.items():
                self.sums[name] = (np.asarray(self.sums.get(name, 0.0)) + np.asarray(value, np.float64)).tolist()
        self.count += len(steps)
        if self.since is None:
            self.since = time.perf_counter()  # after the first fetch: compilation is no part of the speed
        else:
            self.timed += len(steps)

    def close(self) -> tuple[dict[str, float], float]:
        """The means and the steps a second; the window starts anew. Residuals by gap are means over their examples."""
        now = time.perf_counter()
        speed = self.timed / (now - self.since) if self.timed else 0.0
        means = {}
        for name, total in self.sums.items():
            if name == "by_gap":
                means |= {gap: a / n for gap, a, n in zip(GAPS, *total, strict=True) if n}
            else:
                means[name] = total / self.count
        self.sums, self.count, self.since, self.timed = {}, 0, now, 0
        return means, speed

    def saved(self) -> dict:
        return {"sums": self.sums, "count": self.count, "first": self.first}

    def blown_up(self, means: dict[str, float]) -> list[str]:
        """The terms of a loss that are more than ``BLOWN_UP`` times the loss of the first step, or than one.

        An annealed or a distilled loss may well begin at nothing.
        """
        limit = BLOWN_UP * max(self.first, 1.0)
        return [name for name, value in means.items() if name != "grad_norm" and abs(value) > limit]


@contextlib.contextmanager
def recorder(directory: Path, start: int) -> Iterator[Callable[[dict], None]]:
    """Appends records to ``metrics.jsonl`` and TensorBoard, both cut back to ``start`` first; on one process only."""
    if jax.process_index() != 0:
        yield lambda record: None
        return
    from tensorboardX import SummaryWriter

    files.truncate_jsonl(directory / "metrics.jsonl", start)
    with SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1 if start else None) as board:

        def write(record: dict) -> None:
            files.append_jsonl(directory / "metrics.jsonl", record)
            for name, value in record.items():
                if name != "step":
                    board.add_scalar(name, value, record["step"])

        yield write


def check_finite(n: int, metrics: dict, name: str, manager, checkpoints: Path) -> None:
    """Raises ``Diverged`` for metrics of step ``n`` that are not finite, by name."""
    bad = {term: float(np.sum(value)) for term, value in metrics.items() if not np.isfinite(value).all()}
    if bad:
        diverged(n, bad, name, manager, checkpoints)


def diverged(n: int, bad: dict[str, float], name: str, manager, checkpoints: Path) -> None:
    """Raises ``Diverged``, saying what is ``bad`` and which checkpoint is good."""
    manager.wait_until_finished()
    good = checkpoint.latest_step(checkpoints)
    kept = f"the last good checkpoint is step {good} in {checkpoints}" if good else "there is no checkpoint yet"
    values = ", ".join(f"{term} is {value:.4g}" for term, value in bad.items())
    raise Diverged(f"{name} diverged at step {n}: {values}; {kept}; lower learning_rate or set clip")


@contextlib.contextmanager
def stage(name: str) -> Iterator[Callable[[str], None]]:
    """Prints a line at the end of a stage: its name, what ``tell(words)`` was told, and the seconds it took."""
    told, start = [], time.perf_counter()
    yield told.append
    print(f"{name}: {told[0]} ({time.perf_counter() - start:.1f} s)", flush=True)


def bar(name: str, total: int, start: int = 0, unit: str = "step"):
    """A progress bar on stderr; on one process only, and with few lines where stderr is a file."""
    from tqdm import tqdm

    calm = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total, initial=start, desc=name, unit=unit, dynamic_ncols=True, mininterval=calm,
        disable=jax.process_index() != 0,
    )  # fmt: skip
