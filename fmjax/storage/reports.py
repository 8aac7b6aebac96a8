"""One report of an error that several threads of another library meet."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def one_report() -> Iterator[None]:
    """Keep the threads of orbax from printing tracebacks; their errors are raised where a save or a read ends.

    Yields:
        Nothing.
    """
    quiet = lambda record: not (record.exc_info and "orbax" in record.pathname)
    closed = lambda problem: isinstance(problem.exc_value, RuntimeError) and "loop is closed" in str(problem.exc_value)
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    logger.addFilter(quiet)
    sys.unraisablehook = lambda problem: None if closed(problem) else hook(problem)  # other parts of a failed save
    try:
        yield
    finally:
        logger.removeFilter(quiet)
        sys.unraisablehook = hook
