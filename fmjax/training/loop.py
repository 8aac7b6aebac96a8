"""The training loop: from the newest good checkpoint to the last step."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fmjax.data import prefetch
from fmjax.keys import example_keys
from fmjax.nets.adapters import Model
from fmjax.storage import checkpoint
from fmjax.training import logs
from fmjax.training.logs import Window
from fmjax.training.step import State, init, make_step
from fmjax.types import Batch, Method, Params

FETCH = 32  # steps between two looks at the metrics: NaN is found soon, and few steps are in flight


TERMINATED = 143  # exit status after SIGTERM, as a shell has it


Hook = Callable[[int, State], Any]


class Plan(NamedTuple):
    """A training run, ready to start: a method over a model, an optimiser, and batches as a function of the step.

    ``shape`` is that of one example, ``classes`` the number of labels (0: no conditions), ``rate(n)`` the learning rate
    of step ``n``.
    """

    name: str
    model: Model
    method: Method
    tx: optax.GradientTransformation
    rate: Callable[[int], Any]
    batch: Callable[[int], Batch]
    shape: tuple[int, ...]
    classes: int
    batch_size: int
    steps: int
    seed: int
    ema: float
    target: str
    fsdp: bool
    log_every: int
    save_every: int
    keep: int
    mesh: Mesh


def given(plan: Plan, path: str | Path, what: str = "init") -> Params:
    """The averaged parameters of the run in ``path`` for the plan's network; what only the latter has is as at first.

    So a flow's checkpoint starts a flow map whose network asks for more (a scale of guidance, weights of the loss).
    Raises ``CheckpointError`` where there is no run, ``ValueError`` where its network is another one.
    """
    _, found, _ = checkpoint.restore(Path(path) / "checkpoints", part="ema", fallback=True)
    return grafted(plan, found, f"{what}={str(path)!r}")


def grafted(plan: Plan, found: Params, what: str = "what was given") -> Params:
    """``found`` as parameters of the plan's model, with the first values of those that it lacks.

    Raises ``ValueError`` where it has others, or of another shape.
    """
    wanted = jax.eval_shape(lambda: initial(plan))
    told = lambda tree: {jax.tree_util.keystr(k): a for k, a in jax.tree_util.tree_leaves_with_path(tree)}
    have, want = told(found), told(wanted)
    wrong = [k for k, a in have.items() if k not in want or a.shape != want[k].shape]
    if wrong:
        k = wrong[0]
        here = f"of shape {want[k].shape}" if k in want else "not there"
        raise ValueError(f"{what} is a run of another network: its {k} {have[k].shape} is {here} in this one")
    if len(have) < len(want):
        have = told(initial(plan)) | have
    return jax.tree.unflatten(jax.tree.structure(wanted), [have[k] for k in want])


def initial(plan: Plan) -> Params:
    """The parameters before the first step, drawn from the plan's seed."""
    return plan.model.init(jax.random.fold_in(jax.random.key(plan.seed), 0), *_example(plan))


def train(
    plan: Plan,
    directory: str | Path,
    *,
    params: Params | None = None,
    teacher: Params | None = None,
    hooks: Sequence[Hook] = (),
) -> State:
    """Trains to ``plan.steps`` in ``directory``, from its newest good checkpoint or from ``params`` (default drawn).

    Every ``log_every`` steps a record goes to ``metrics.jsonl`` and TensorBoard: the step, the means since the last
    record of the loss, its terms and the gradient norm, the learning rate, and the steps and examples a second. Then
    ``hook(step, state)`` is called for each hook. Every ``save_every`` steps and at the end a checkpoint is written. A
    resumed run gives the numbers of an uninterrupted one, bit for bit (speeds apart). SIGTERM saves and exits with
    status 143.

    Raises ``Diverged`` where a number is not finite, or a term of the loss in a record 1000 times the larger of one and
    the first step's loss, naming step and term: nothing is saved after that step. Raises ``ValueError`` where start or
    teacher are not those that a run began with, ``CheckpointError`` and ``ValueError`` as ``checkpoint.restore`` does.
    """
    directory = Path(directory)
    checkpoints = directory / "checkpoints"
    state = init(initial(plan) if params is None else params, plan.tx, mesh=plan.mesh, fsdp=plan.fsdp)
    start, window = None, Window()
    digests = {k: checkpoint.digest(v) for k, v in (("params", params), ("teacher", teacher)) if v is not None}
    if checkpoint.latest_step(checkpoints) is not None:
        start, state, metadata = checkpoint.restore(checkpoints, state, fallback=True)
        window = Window(**metadata["window"])
        changed = [k for k, v in digests.items() if metadata.get("given", digests).get(k) != v]
        if changed:
            raise ValueError(
                f"the {changed[0]} given to {plan.name} are not those that the run in {directory} began with; "
                "take another workdir"
            )
        if start >= plan.steps:
            return state
    first = start or 0
    step = _step(plan)
    key = jax.random.fold_in(jax.random.key(plan.seed), 1)
    pending: list[tuple[int, dict]] = []

    def fetch():
        fetched = jax.device_get(pending)
        for n, metrics in fetched:
            logs.check_finite(n, metrics, plan.name, manager, checkpoints)
        window.add([metrics for _, metrics in fetched])
        pending.clear()

    with (
        checkpoint.writer(checkpoints, keep=plan.keep, after=start) as manager,
        logs.recorder(directory, first) as record,
        _sigterm() as stop,
        contextlib.closing(prefetch(functools.partial(_batch, plan), first, plan.steps)) as batches,
        logs.bar(plan.name, plan.steps, first) as progress,
    ):
        for n, batch in enumerate(batches, first + 1):
            state, metrics = step(state, batch, key, teacher)
            pending.append((n, metrics))
            log, last, stopping = n % plan.log_every == 0, n == plan.steps, stop(n)
            save = n % plan.save_every == 0 or last or stopping
            if len(pending) == FETCH or log or save:
                fetch()
            progress.update()
            if log or last:
                means, speed = window.close()
                blown_up = {name: means[name] for name in window.blown_up(means)}
                if blown_up:
                    logs.diverged(n, blown_up, plan.name, manager, checkpoints)
                progress.set_postfix(loss=f"{means['loss']:.4f}")
                rates = {"learning_rate": float(plan.rate(n - 1)), "steps_per_s": speed}
                record({"step": n, **means, **rates, "examples_per_s": speed * plan.batch_size})
                for hook in hooks:
                    hook(n, state)
            if save:
                checkpoint.save(
                    manager, n, state, metadata={"stage": plan.name, "window": window.saved(), "given": digests}
                )
            if stopping and not last:
                break
        else:
            return state
    print(f"{plan.name}: SIGTERM after step {n}; saved in {checkpoints}, run again to resume", file=sys.stderr)
    sys.exit(TERMINATED)


def _step(plan: Plan):
    return make_step(plan.method.loss, plan.tx, mesh=plan.mesh, ema=plan.ema, target=plan.target, fsdp=plan.fsdp)


def _batch(plan: Plan, n: int) -> Batch:
    """The plan's batch of step ``n``, told how far the training is."""
    found = plan.batch(n)
    return found._replace(progress=np.full(len(found.x1), n / plan.steps, np.float32))


def _example(plan: Plan) -> tuple[jax.Array, Any]:
    """Zeros in the shape of one example and of its condition."""
    return jnp.zeros((1, *plan.shape)), jnp.zeros(1, jnp.int32) if plan.classes else None


def _trace(plan: Plan) -> None:
    """Traces model and loss on one device's rows: what they refuse, they refuse now."""
    rows = plan.batch_size // plan.mesh.size
    params = jax.eval_shape(plan.model.init, jax.random.key(0), *_example(plan))
    share = lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype)
    keys = jax.eval_shape(lambda: example_keys(jax.random.key(0), jnp.arange(rows)))
    jax.eval_shape(plan.method.loss, params, params, jax.tree.map(share, _batch(plan, 0)), keys)


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """``stop(step)``: whether SIGTERM has come. Several processes agree on the step through ``jax.distributed``."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came = []
    try:
        former = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    except ValueError:  # not the main thread, which alone may set handlers: then the caller's own applies
        yield lambda step: False
        return
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, former)
