"""The progress of a loop: a bar in a terminal or a notebook, a line a minute in a log file."""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import jax

LINE_EVERY = 60.0  # seconds


class Progress:
    """Progress of a loop on stderr, on the first process only.

    The first unit compiles, so its time counts neither in the speed nor in the time that is left; these follow the
    recent speed.

    Args:
        name: what makes progress.
        total: the number of units at the end.
        n: the number of units that are done already.
        unit: the name of one unit.

    Attributes:
        n: the number of units that are done.
        total: the number of units at the end; it may be set while the loop runs.
    """

    def __init__(self, name: str, total: int, n: int = 0, unit: str = "step"):
        self.name, self.n, self.total, self.unit = name, n, total, unit
        self._silent = jax.process_index() != 0
        self._values: dict[str, Any] = {}
        self._began = self._last = time.perf_counter()
        self._first: float | None = None  # seconds of the first unit
        self._lines, self._at = 0, n
        self._bar = None if self._silent or not (sys.stderr.isatty() or _in_notebook()) else self._open()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, error, *_) -> None:
        if self._bar is not None:
            self._bar.close()
        elif error is None and self._lines:
            self._print(f"done in {time.perf_counter() - self._began:.0f} s")

    def update(self, count: int = 1) -> None:
        """Count units as done."""
        self.n += count
        now = time.perf_counter()
        if self._first is None:
            self._first, self._last, self._at = now - self._began, now, self.n
            if self._bar is not None:
                self._bar.unpause()
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.update(count)
        elif now - max(self._last, self._began) >= LINE_EVERY and self.n > self._at:
            speed = (self.n - self._at) / (now - self._last)
            left = f"{_duration((self.total - self.n) / speed)} left"
            self._print(*self._shown(), f"{speed:.3g} {self.unit}s/s", left, *self._compiled())
            self._last, self._at = now, self.n

    def set_postfix(self, **values: Any) -> None:
        """Show values beside the progress, such as ``loss="0.53"``."""
        self._values = values
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def _shown(self) -> list[str]:
        return [f"{name} {value}" for name, value in self._values.items()]

    def _compiled(self) -> list[str]:
        """Return the time of the first unit, for the first line alone."""
        return [] if self._lines else [f"first {self.unit} {_duration(self._first or 0)}"]

    def _print(self, *parts: str) -> None:
        if not self._silent:
            of = f" of {self.total}" if self.total else ""
            print(f"{self.name}: {self.unit} {self.n}{of}, {', '.join(parts)}", file=sys.stderr, flush=True)
        self._lines += 1

    def _open(self):
        from tqdm.std import tqdm as text

        options = {
            "total": self.total, "initial": self.n, "desc": self.name, "unit": self.unit, "dynamic_ncols": True,
        }  # fmt: skip
        try:
            with warnings.catch_warnings():  # a notebook without widgets
                warnings.simplefilter("ignore")
                from tqdm.auto import tqdm

                return tqdm(**options)
        except Exception:  # whatever a notebook's widgets raise
            return text(**options)


def _in_notebook() -> bool:
    """Return whether stderr is shown in a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _duration(seconds: float) -> str:
    """Return a time to be read: ``42 s``, ``3 min``, ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
