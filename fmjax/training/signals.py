"""Signals that end a run: the first one lets it save, a second one kills."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, a scheduler's warning, a terminal that closed


class Interrupted(BaseException):
    """A signal came that ends the process, while no training ran; the argument is the ``signal.Signals``."""


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Raise ``Interrupted`` at the first signal that asks the process to end; a second one kills it.

    So locks are given back and temporary files deleted. ``stop_signals`` replaces it while a training runs. A signal
    that is ignored stays ignored; of several processes SIGTERM is left to ``jax.distributed``.

    Yields:
        Nothing.

    Raises:
        Interrupted: at the first signal.

    >>> try:
    ...     with interrupts():
    ...         signal.raise_signal(signal.SIGTERM)
    ... except Interrupted as interrupted:
    ...     interrupted.args[0].name
    'SIGTERM'
    """

    def receive(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(signal.Signals(number))

    with _handlers(receive, several=jax.process_count() > 1):
        yield


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

    with _handlers(receive, several=several):
        yield stop


@contextlib.contextmanager
def _handlers(receive: Callable[..., None], *, several: bool) -> Iterator[None]:
    """Set the handler of each signal in ``NAMES`` that is not ignored, and set the former ones back."""
    names = [name for name in NAMES if hasattr(signal, name) and not (several and name == "SIGTERM")]
    caught = [number for number in map(signal.Signals.__getitem__, names) if signal.getsignal(number) != signal.SIG_IGN]
    former = {}
    try:
        for number in caught:
            former[number] = signal.signal(number, receive)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
