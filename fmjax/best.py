"""The best parameters of a run by a held-out score: early stopping that stops nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fmjax import checkpoint
from fmjax.types import Params


def keep(directory: str | Path, score: Callable[[Params], float]) -> Callable[[int, Any], None]:
    """A hook of ``run.train`` that keeps in ``directory`` the averaged parameters whose ``score`` was least so far.

    It is asked at every record (``log_every``). Of equal scores the first is kept, and one that is not finite never is.
    What is kept does not depend on interruptions: a resumed run meets the scores of the uninterrupted one again. Read
    it with ``run.given(plan, directory)``, or ``checkpoint.restore(directory / "checkpoints", part="ema")``, whose
    metadata tell the ``score``. ``score`` is of examples that the run is not trained on, for a classifier
    ``lambda ema: metrics.classifier.by_step(net, ema, ...).bce.mean()``.
    """
    checkpoints = Path(directory) / "checkpoints"
    kept: list[tuple[int, float]] = []

    def hook(n: int, state: Any) -> None:
        if not kept and checkpoint.latest_step(checkpoints) is not None:
            step, _, metadata = checkpoint.restore(checkpoints, fallback=True)
            kept.append((step, metadata["score"]))
        value = float(score(state.ema))
        step, least = kept[-1] if kept else (None, float("inf"))
        if value < least:
            with checkpoint.writer(checkpoints, keep=1, after=step) as manager:
                checkpoint.save(manager, n, {"ema": state.ema}, metadata={"score": value})
            kept[:] = [(n, value)]

    return hook
