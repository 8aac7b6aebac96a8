"""Hooks of the training loop: keep the best parameters by a held-out score, draw pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fmjax import sampling
from fmjax.keys import as_keys, normal
from fmjax.sampling import grids, solvers
from fmjax.storage import checkpoint, images
from fmjax.training.loop import Hook, Plan
from fmjax.training.step import State
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


def pictures(plan: Plan, directory: str | Path, *, every: int, count: int = 36, steps: int = 16) -> Hook:
    """A hook that writes ``samples/step-N.png`` every ``every`` records' steps: samples of the averaged parameters.

    Those of a flow map are one jump (of a method whose map knows other jumps only, a bad picture), those of a flow
    ``steps`` Euler steps.
    Labels, where there are any, follow one another: 0, 1, ... Nothing for ``every = 0`` and for examples that are not
    images ``[H, W, C]``.
    """

    folder = Path(directory) / "samples"
    keys = as_keys(jax.random.fold_in(jax.random.key(plan.seed), 2), count)
    labels = jnp.arange(count) % plan.classes if plan.classes else None

    @jax.jit
    def draw(params):
        if plan.method.flow_map is not None:
            step, n = plan.method.flow_map(params), 1
        else:
            step, n = solvers.euler(plan.method.velocity(params)), steps
        return sampling.sample(step, normal(keys, plan.shape), grids.uniform_grid(n), cond=labels)

    def hook(n: int, state: State) -> None:
        if every and n % every == 0 and len(plan.shape) == 3:
            drawn = draw(state.ema)
            if jax.process_index() == 0:
                folder.mkdir(exist_ok=True)
                images.save_png(folder / f"step-{n:07d}.png", jax.device_get(drawn))

    return hook
