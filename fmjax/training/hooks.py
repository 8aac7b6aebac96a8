"""Hooks of the training loop: keep the best parameters by a held-out score, draw samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import sampling
from fmjax.keys import as_keys, from_seed, normal
from fmjax.storage import checkpoint
from fmjax.training import pictures
from fmjax.training.loop import Hook, Plan
from fmjax.training.step import State
from fmjax.types import Params


def keep_best(
    directory: str | Path, score: Callable[[Params], float], *, record: Mapping[str, Any] | None = None
) -> Callable[[int, Any], None]:
    """Return a hook that keeps the averaged parameters with the lowest score so far.

    The score is computed at every record (``log_every``). Of equal scores the first is kept; a score that is not
    finite never is. What is kept does not depend on interruptions: a resumed run meets the scores of the uninterrupted
    one again. Read it with ``load_average(plan, directory)``; the checkpoint's metadata hold the ``score``.

    Args:
        directory: the folder of the best parameters.
        score: a function of the averaged parameters, of examples that the run does not train on; for a classifier
            ``lambda ema: metrics.classifier.by_step(net, ema, ...).bce.mean()``.
        record: plain values that the metadata hold too, such as ``{"stage": "correctors.classifier.best"}``.

    Returns:
        The hook.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> hook = keep_best(folder, lambda ema: abs(float(ema["w"])))
    >>> for n, w in enumerate((3.0, 1.0, 2.0), 1):
    ...     hook(n, State(np.int32(n), None, None, {"w": np.float32(w)}))
    >>> checkpoint.all_steps(folder / "checkpoints")
    [2]
    """
    checkpoints = Path(directory) / "checkpoints"
    best: list[tuple[int, float]] = []

    def hook(n: int, state: Any) -> None:
        if not best and checkpoint.latest_step(checkpoints) is not None:
            step, _, metadata = checkpoint.restore(checkpoints, stage=(record or {}).get("stage"), fallback=True)
            best.append((step, metadata["score"]))
        value = float(score(state.ema))
        step, least = best[-1] if best else (None, float("inf"))
        if value < least:
            with checkpoint.writer(checkpoints, keep=1, after=step) as manager:
                checkpoint.save(manager, n, {"ema": state.ema}, metadata={**(record or {}), "score": value})
            best[:] = [(n, value)]

    return hook


def draw_samples(
    plan: Plan,
    directory: str | Path,
    *,
    every: int,
    draw: Callable[[Params], Any] | None = None,
    write: Callable[[Path, np.ndarray], Any] | None = None,
) -> Hook:
    """Return a hook that writes a picture ``samples/step-N.png`` of samples of the averaged parameters.

    Args:
        plan: the run.
        directory: the folder of the run.
        every: steps between two pictures, a multiple of ``log_every``; 0 draws none.
        draw: samples ``[n, ...]`` of the averaged parameters; by default ``average_samples(plan)``.
        write: writes samples to a path; by default ``pictures.writer_for`` the shape of the examples, and no picture
            for vectors.

    Returns:
        The hook.

    >>> import optax
    >>> from fmjax.methods import flow_matching
    >>> from fmjax.nets.adapters import Model
    >>> from fmjax.types import Batch
    >>> from fmjax.training import loop
    >>> model = Model(lambda key, x, cond: {"w": jnp.zeros(2)}, lambda p, x, s, t, cond=None, key=None: p["w"] * x)
    >>> data = loop.TrainingData(lambda n: Batch(np.ones((8, 2), np.float32)), batch_size=8, shape=(2,))
    >>> parts = {"optimiser": loop.Optimiser(optax.sgd(0.1)), "data": data, "schedule": loop.Schedule(steps=2)}
    >>> plan = Plan(name="flow", model=model, method=flow_matching(model.net), **parts)
    >>> hook = draw_samples(plan, "workdir", every=1000)  # for loop.train(..., hooks=[hook])
    """
    kind, folder = pictures.writer_for(plan.data.shape), Path(directory) / "samples"
    write = write or (kind and kind.write)
    draw = draw or (kind and average_samples(plan, count=kind.count))

    def hook(n: int, state: State) -> None:
        if every and n % every == 0 and write is not None:
            samples = draw(state.ema)
            if jax.process_index() == 0:
                folder.mkdir(exist_ok=True)
                write(folder / f"step-{n:07d}.png", jax.device_get(samples))

    return hook


def average_samples(plan: Plan, *, count: int = 36, steps: int = 16) -> Callable[[Params], Any]:
    """Return a function that draws samples from N(0, I): one jump of a flow map, or Euler steps of a flow.

    One jump is a bad picture of a method whose map knows other jumps only; a path that does not start at N(0, I) needs
    another function.

    Args:
        plan: the run.
        count: the number of samples; conditions ``plan.data.cond`` are taken in turn.
        steps: the number of Euler steps of a flow.

    Returns:
        ``draw(params) -> [count, ...]``, the same noise in every call.

    >>> import optax
    >>> from fmjax.methods import flow_matching
    >>> from fmjax.nets.adapters import Model
    >>> from fmjax.types import Batch
    >>> from fmjax.training import loop
    >>> model = Model(lambda key, x, cond: {"w": jnp.zeros(2)}, lambda p, x, s, t, cond=None, key=None: p["w"] * x)
    >>> data = loop.TrainingData(lambda n: Batch(np.ones((8, 2), np.float32)), batch_size=8, shape=(2,))
    >>> parts = {"optimiser": loop.Optimiser(optax.sgd(0.1)), "data": data, "schedule": loop.Schedule(steps=2)}
    >>> plan = Plan(name="flow", model=model, method=flow_matching(model.net), **parts)
    >>> average_samples(plan, count=4, steps=2)({"w": jnp.zeros(2)}).shape
    (4, 2)
    """
    keys = as_keys(jax.random.fold_in(from_seed(plan.seed), 2), count)
    cond = jax.tree.map(lambda a: jnp.asarray(a)[jnp.arange(count) % len(a)], plan.data.cond)

    @jax.jit
    def draw(params):
        if plan.method.flow_map is not None:
            step, n = plan.method.flow_map(params), 1
        else:
            step, n = sampling.euler(plan.method.velocity(params)), steps
        return sampling.sample(step, normal(keys, plan.data.shape), sampling.uniform_grid(n), cond=cond)

    return draw
