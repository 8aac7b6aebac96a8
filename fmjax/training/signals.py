"""Signals that end a run: the first one lets it save, a second one kills."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, a scheduler's warning, a terminal that closed


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], signal.Signals | None]]:
    """Catch the first signal that asks the process to end; a second one kills it.

    Several processes agree on the step through ``jax.distributed``, which catches SIGTERM; other signals are passed on
    to it as SIGTERM. A signal that is ignored (``nohup``) stays ignored, and in a thread other than the main one, which
    alone may set handlers, the caller's own handlers apply.

    Yields:
        ``stop(step)``, to be called after every step: the signal that came, or ``None``. A shell reports the status
        ``128 + signal``.

    >>> with stop_signals() as stop:
    ...     first = stop(1)
    ...     signal.raise_signal(signal.SIGTERM)
    ...     first, stop(2).name
    (None, 'SIGTERM')
    """
    several = jax.process_count() > 1
    received: list[signal.Signals] = []

    def receive(number, frame):
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(signal.Signals(number))
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(step: int) -> signal.Signals | None:
        if several:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return received[0] if received else None

    names = [name for name in NAMES if hasattr(signal, name) and not (several and name == "SIGTERM")]
    caught = [number for number in map(signal.Signals.__getitem__, names) if signal.getsignal(number) != signal.SIG_IGN]
    former = {}
    try:
        for number in caught:
            former[number] = signal.signal(number, receive)
    except ValueError:  # not the main thread
        pass
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
