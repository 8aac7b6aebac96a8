"""What a training run records: means over a window of steps, in ``metrics.jsonl`` and TensorBoard; its progress."""

from __future__ import annotations

import base64
import contextlib
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fmjax.storage import checkpoint, files
from fmjax.training.progress import Progress
from fmjax.training.step import GAPS
from fmjax.types import Batch

RECORDS = "metrics.jsonl"
COPIED = 2**22  # characters: the longest packed copy of the records that a checkpoint keeps
BLOWN_UP = 1e3  # a term this many times the first step's loss is no training any more


class Diverged(RuntimeError):
    """A loss, one of its terms or a gradient is not finite, or has blown up."""


class Window:
    """Running means since the last record, the speed of the steps, and the first step's loss.

    Args:
        sums: the sum of each metric, from a checkpoint.
        count: the number of steps in the sums.
        first: the loss of the first step of the run.
    """

    def __init__(self, sums: dict | None = None, count: int = 0, first: float | None = None):
        self.sums, self.count, self.first = dict(sums or {}), count, first
        self.since, self.timed = None, 0

    def add(self, steps: list[dict]) -> None:
        """Add the metrics of some steps, on the host."""
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

    def means(self) -> dict[str, float]:
        """Return the mean of each metric; residuals by gap are means over their examples."""
        means = {}
        for name, total in self.sums.items():
            if name == "by_gap":
                means |= {gap: a / n for gap, a, n in zip(GAPS, *total, strict=True) if n}
            else:
                means[name] = total / self.count
        return means

    def close(self) -> tuple[dict[str, float], float]:
        """Return the means and the steps a second, and start a new window."""
        now, means = time.perf_counter(), self.means()
        speed = self.timed / (now - self.since) if self.timed else 0.0
        self.sums, self.count, self.since, self.timed = {}, 0, now, 0
        return means, speed

    def saved(self) -> dict:
        """Return what a checkpoint keeps of the window: the arguments that build it again."""
        return {"sums": self.sums, "count": self.count, "first": self.first}


class Explosions(NamedTuple):
    """Checks that end a run whose numbers are no longer finite or have blown up.

    Attributes:
        name: the stage.
        manager: the writer of its checkpoints.
        checkpoints: their folder.
        batch: the batch of step ``n = 1 ..``, examined before the optimiser is blamed.
    """

    name: str
    manager: Any
    checkpoints: Path
    batch: Callable[[int], Batch]

    def finite(self, steps: list[tuple[int, dict]]) -> None:
        """Raise ``Diverged`` for the first step whose metrics are not all finite, naming them."""
        for n, metrics in steps:
            bad = {term: float(np.sum(value)) for term, value in metrics.items() if not np.isfinite(value).all()}
            if bad:
                self._fail(n, bad)

    def grown(self, n: int, window: Window) -> None:
        """Raise ``Diverged`` where a mean is more than ``BLOWN_UP`` times the first step's loss, or than one.

        The first loss of an annealed or distilled method may be nearly zero: hence the one.
        """
        limit = BLOWN_UP * max(window.first, 1.0)
        bad = {name: value for name, value in window.means().items() if name != "grad_norm" and abs(value) > limit}
        if bad:
            self._fail(n, bad)

    def _fail(self, n: int, bad: dict[str, float]) -> None:
        self.manager.wait_until_finished()
        good = checkpoint.latest_step(self.checkpoints)
        last = (
            f"the last good checkpoint is step {good} in {self.checkpoints}" if good else "there is no checkpoint yet"
        )
        values = ", ".join(f"{term} is {value:.4g}" for term, value in bad.items())
        leaves = jax.tree_util.tree_leaves_with_path(self.batch(n)._asdict())
        faults = [jax.tree_util.keystr(path, simple=True) for path, a in leaves if not np.isfinite(a).all()]
        advice = f"the batch of this step has {faults[0]} that is not finite: repair the data" if faults else ""
        advice = advice or "lower learning_rate or set clip, in another folder (launch.train --fork=THIS_RUN)"
        raise Diverged(f"{self.name} diverged at step {n}: {values}; {last}; {advice}")


class Recorder(NamedTuple):
    """Where records go.

    Attributes:
        write: append a record, a dict with its ``step``.
        seal: flush the records to disk and return what a checkpoint keeps of them: number, digest and a copy.
    """

    write: Callable[[dict], None]
    seal: Callable[[], dict[str, Any] | None]


def mend_records(path: Path, step: int, sealed: dict[str, Any] | None) -> None:
    """Cut records back to a step; where they are not as the checkpoint of that step sealed them, write its copy.

    Args:
        path: the file of records.
        step: the step.
        sealed: what ``Recorder.seal`` returned at that step; ``None`` where there was no record yet.

    Raises:
        DamagedFile: records are damaged and there is no copy.
    """
    try:
        files.truncate_jsonl(path, step)
        lost = None
    except files.DamagedFile as error:
        if sealed is None:
            raise
        lost = error.problem
    if sealed and lost is None and not path.exists():
        lost = "is missing"
    if sealed and lost is None and files.file_digest(path) != sealed["sha256"]:
        lost = f"is not as it was left at step {step}"
    if sealed and lost is not None:
        if "copy" not in sealed:
            raise files.DamagedFile(path, lost)
        files.write_bytes(path, unpack(sealed))
        warnings.warn(f"{path} {lost}: written again from the checkpoint of step {step}", stacklevel=3)


def unpack(sealed: dict[str, Any]) -> bytes:
    """Return the content of ``metrics.jsonl`` that ``Recorder.seal`` copied.

    Args:
        sealed: what it returned.

    Returns:
        The bytes of the file.
    """
    return zlib.decompress(base64.b64decode(sealed["copy"]))


@contextlib.contextmanager
def recorder(directory: Path, start: int, sealed: dict[str, Any] | None = None) -> Iterator[Recorder]:
    """Append records to ``metrics.jsonl`` and TensorBoard, both cut back to a step first; on the first process only.

    Args:
        directory: the folder of the run.
        start: the step that the run resumes from, or 0.
        sealed: what ``seal`` returned at that step; records that were lost since are written again.

    Yields:
        The recorder.
    """
    if jax.process_index() != 0:
        yield Recorder(lambda record: None, lambda: None)
        return
    from tensorboardX import SummaryWriter

    path = directory / RECORDS
    mend_records(path, start, sealed)

    def seal() -> dict[str, Any] | None:
        if not path.exists():
            return None
        files.sync(path)
        copy = base64.b64encode(zlib.compress(path.read_bytes())).decode()
        sealed = {"count": len(files.read_jsonl(path)), "sha256": files.file_digest(path)}
        return sealed | ({"copy": copy} if len(copy) <= COPIED else {})

    with SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1 if start else None) as board:

        def write(record: dict) -> None:
            files.append_jsonl(path, record)
            for name, value in record.items():
                if name != "step":
                    board.add_scalar(name, value, record["step"])

        yield Recorder(write, seal)


@contextlib.contextmanager
def stage(name: str) -> Iterator[Callable[[str], None]]:
    """Print a line at the end of a stage, on the first process: its name, a summary, and the seconds it took.

    Args:
        name: the stage.

    Yields:
        ``tell(summary)``, to be called once in the block.
    """
    summaries, start = [], time.perf_counter()
    yield summaries.append
    if jax.process_index() == 0:
        print(f"{name}: {summaries[0]} ({time.perf_counter() - start:.1f} s)", flush=True)


def say(line: str) -> None:
    """Print a line about the run on stderr, on the first process.

    Args:
        line: the line.
    """
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def bar(name: str, total: int, start: int = 0, unit: str = "step") -> Progress:
    """Show the progress of a loop on stderr; see ``Progress``.

    Args:
        name: what makes progress.
        total: the number of units at the end; it may be set later (``bar.total``).
        start: the number of units that are done already.
        unit: the name of one unit.

    Returns:
        A context manager with ``update(count=1)`` and ``set_postfix(loss="0.5")``.
    """
    return Progress(name, total, start, unit)
