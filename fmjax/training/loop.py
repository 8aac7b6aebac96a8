"""The training loop: from the newest good checkpoint to the last step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fmjax.data import prefetch
from fmjax.keys import example_keys, from_seed
from fmjax.nets.adapters import Model
from fmjax.storage import checkpoint, files, owned
from fmjax.storage.lock import check_owned
from fmjax.training import logs, sharding
from fmjax.training.signals import stop_signals
from fmjax.training.step import State, init, make_step, stand_in
from fmjax.types import Batch, Cond, Method, Params

FETCH = 32  # steps between two looks at the metrics: NaN is found soon, and few steps are in flight

Hook = Callable[[int, State], Any]


class Optimiser(NamedTuple):
    """How parameters change.

    Attributes:
        tx: the optax transformation.
        rate: the learning rate of step ``n``, for the records; ``None`` records none.
    """

    tx: optax.GradientTransformation
    rate: Callable[[int], Any] | None = None


class TrainingData(NamedTuple):
    """What a run trains on.

    Attributes:
        batch: the batch of step ``n = 0 ..``, this process's rows of it: a pure function of the step.
        batch_size: examples in a step, over all processes.
        shape: the shape of one example.
        cond: conditions ``[n, ...]`` of sample pictures, drawn in turn; the network is initialised for conditions like
            the first. ``None`` for a network without conditions.
    """

    batch: Callable[[int], Batch]
    batch_size: int
    shape: tuple[int, ...]
    cond: Cond = None


class Schedule(NamedTuple):
    """How long a run trains, and how often it reports.

    Attributes:
        steps: the number of steps.
        log_every: steps between two records.
        save_every: steps between two checkpoints.
        keep: the number of newest checkpoints that are kept.
    """

    steps: int
    log_every: int = 100
    save_every: int = 1000
    keep: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """A training run, ready to start.

    Attributes:
        name: the name of the stage, for messages.
        model: the network and how its parameters are drawn.
        method: the objective.
        optimiser: the transformation of gradients.
        data: batches as a function of the step.
        schedule: how long it trains and how often it reports.
        seed: seed of parameters and noise.
        ema: decay of the averaged parameters.
        target: whose parameters are the teacher's: ``"self"``, ``"ema"``, ``"frozen"`` or ``"both"``.
        fsdp: split large arrays of parameters, optimiser and average over the devices.
        mesh: the devices; by default all of them.
    """

    name: str
    model: Model
    method: Method
    optimiser: Optimiser
    data: TrainingData
    schedule: Schedule
    seed: int = 0
    ema: float = 0.999
    target: str = "self"
    fsdp: bool = False
    mesh: Mesh = dataclasses.field(default_factory=sharding.make_mesh)

    def replace(self, **changes: Any) -> Plan:
        """Return a plan with other fields; fields of its parts go by their own names (``steps=10``, ``batch=f``)."""
        for name in ("optimiser", "data", "schedule"):
            part = changes.get(name, getattr(self, name))
            changes[name] = part._replace(**{key: changes.pop(key) for key in part._fields if key in changes})
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        steps, size, devices = self.schedule.steps, self.data.batch_size, self.mesh.size
        shape = list(self.data.shape)
        return f"Plan({self.name}: {steps} steps of {size} examples {shape} on {devices} devices, seed {self.seed})"


def initial_parameters(plan: Plan) -> Params:
    """Draw the parameters before the first step from the plan's seed.

    Args:
        plan: the run.

    Returns:
        The parameters of its model.

    >>> from fmjax.methods import flow_matching
    >>> model = Model(lambda key, x, cond: {"w": jnp.zeros(2)}, lambda p, x, s, t, cond=None, key=None: p["w"] * x)
    >>> data = TrainingData(lambda n: Batch(np.ones((8, 2), np.float32)), batch_size=8, shape=(2,))
    >>> method, sgd = flow_matching(model.net), Optimiser(optax.sgd(0.1))
    >>> plan = Plan(name="flow", model=model, method=method, optimiser=sgd, data=data, schedule=Schedule(steps=2))
    >>> initial_parameters(plan)["w"].shape
    (2,)
    """
    return plan.model.init(jax.random.fold_in(from_seed(plan.seed), 0), *_example(plan))


def load_average(plan: Plan, directory: str | Path, field: str = "directory") -> Params:
    """Load the averaged parameters of a run for the network of a plan.

    Args:
        plan: the run that starts from them, or has them as its teacher.
        directory: the folder of the finished run.
        field: the name of the setting that names the folder, for messages.

    Returns:
        The parameters of the plan's model; see ``merge_parameters``.

    Raises:
        CheckpointError: the folder holds no good checkpoint.
        ValueError: the run has another network.

    >>> from fmjax.methods import flow_matching
    >>> model = Model(lambda key, x, cond: {"w": jnp.zeros(2)}, lambda p, x, s, t, cond=None, key=None: p["w"] * x)
    >>> data = TrainingData(lambda n: Batch(np.ones((8, 2), np.float32)), batch_size=8, shape=(2,))
    >>> method, sgd = flow_matching(model.net), Optimiser(optax.sgd(0.1))
    >>> plan = Plan(name="flow", model=model, method=method, optimiser=sgd, data=data, schedule=Schedule(steps=2))
    >>> load_average(plan, "/nowhere")
    Traceback (most recent call last):
    fmjax.storage.checkpoint.CheckpointError: no checkpoint in /nowhere/checkpoints, which does not exist
    """
    _, average, _ = checkpoint.restore(Path(directory) / "checkpoints", part="ema", fallback=True)
    return merge_parameters(plan, average, f"{field}={str(directory)!r}")


def merge_parameters(plan: Plan, params: Params, source: str = "params") -> Params:
    """Return parameters for the plan's model: the given ones, and initial values where the model has more.

    So a flow's parameters start a flow map whose network has further inputs (a guidance scale, weights of the loss).

    Args:
        plan: the run.
        params: parameters of the same network or of a smaller one.
        source: where they come from, for messages.

    Returns:
        A tree of the model's structure and dtypes.

    Raises:
        ValueError: the model lacks one of the parameters, or has it in another shape.

    >>> from fmjax.methods import flow_matching
    >>> model = Model(lambda key, x, cond: {"w": jnp.zeros(2)}, lambda p, x, s, t, cond=None, key=None: p["w"] * x)
    >>> data = TrainingData(lambda n: Batch(np.ones((8, 2), np.float32)), batch_size=8, shape=(2,))
    >>> method, sgd = flow_matching(model.net), Optimiser(optax.sgd(0.1))
    >>> plan = Plan(name="flow", model=model, method=method, optimiser=sgd, data=data, schedule=Schedule(steps=2))
    >>> merge_parameters(plan, {})["w"].shape
    (2,)
    """
    template = jax.eval_shape(lambda: initial_parameters(plan))
    by_name = lambda tree: {jax.tree_util.keystr(k): a for k, a in jax.tree_util.tree_leaves_with_path(tree)}
    leaves, model = by_name(params), by_name(template)
    for name, leaf in leaves.items():
        if name not in model or leaf.shape != model[name].shape:
            problem = f"has shape {model[name].shape} in this one" if name in model else "does not exist in this one"
            raise ValueError(
                f"{source}: a run of another network, whose parameter {name} {leaf.shape} {problem}. Give a run of "
                "the same network."
            )
    if len(leaves) < len(model):
        leaves = by_name(initial_parameters(plan)) | leaves
    cast = lambda leaf, like: leaf if leaf.dtype == like.dtype else leaf.astype(like.dtype)
    return jax.tree.unflatten(jax.tree.structure(template), [cast(leaves[k], like) for k, like in model.items()])


def check_plan(plan: Plan) -> None:
    """Check a plan before any work: schedule, batch size, options of the step; trace the loss on one device's rows.

    Args:
        plan: the run.

    Raises:
        ValueError: a number or an option that cannot work, or whatever the model or the loss refuses.

    >>> from fmjax.methods import flow_matching
    >>> model = Model(lambda key, x, cond: {"w": jnp.zeros(2)}, lambda p, x, s, t, cond=None, key=None: p["w"] * x)
    >>> data = TrainingData(lambda n: Batch(np.ones((8, 2), np.float32)), batch_size=8, shape=(2,))
    >>> method, sgd = flow_matching(model.net), Optimiser(optax.sgd(0.1))
    >>> plan = Plan(name="flow", model=model, method=method, optimiser=sgd, data=data, schedule=Schedule(steps=2))
    >>> check_plan(plan)
    >>> check_plan(plan.replace(steps=0))
    Traceback (most recent call last):
    ValueError: steps=0: must be at least 1
    """
    for name, value in plan.schedule._asdict().items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    sharding.check_batch(plan.data.batch_size, plan.mesh)
    _make_step(plan)
    rows = plan.data.batch_size // plan.mesh.size
    params = jax.eval_shape(plan.model.init, jax.random.key(0), *_example(plan))
    part = lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype)
    keys = jax.eval_shape(lambda: example_keys(jax.random.key(0), jnp.arange(rows)))
    jax.eval_shape(
        plan.method.loss, params, stand_in(plan.target, params), jax.tree.map(part, numbered_batch(plan, 0)), keys
    )


def initial_state(plan: Plan, params: Params | None = None) -> State:
    """Return the state before the first step.

    Args:
        plan: the run.
        params: the parameters to start from; by default drawn from the plan's seed.

    Returns:
        Parameters, average and optimiser, on the devices of the plan.
    """
    params = initial_parameters(plan) if params is None else params
    return init(params, plan.optimiser.tx, mesh=plan.mesh, fsdp=plan.fsdp)


def train(
    plan: Plan,
    directory: str | Path,
    *,
    params: Params | None = None,
    teacher: Params | None = None,
    hooks: Sequence[Hook] = (),
    record: Mapping[str, Any] | None = None,
) -> State:
    """Train to the last step of a plan, from the newest good checkpoint in a folder or from the start.

    Every ``log_every`` steps a record goes to ``metrics.jsonl`` and TensorBoard: the step, the means since the last
    record of the loss, its terms and the gradient norm, the learning rate, and the steps and examples a second. Then
    ``hook(step, state)`` is called for each hook. Every ``save_every`` steps and at the end a checkpoint is written. A
    resumed run gives the numbers of an uninterrupted one, bit for bit (speeds apart). SIGINT (Ctrl-C), SIGTERM and
    SIGHUP save and exit with the status that a shell expects (130, 143, 129); a second signal kills.

    Args:
        plan: the run.
        directory: the folder of its records and checkpoints.
        params: the parameters to start from; by default drawn from the plan's seed.
        teacher: the parameters of a frozen teacher, where ``plan.target`` is ``"frozen"`` or ``"both"``.
        hooks: functions of step and state, called at each record.
        record: plain values that each checkpoint keeps as the ``"run"`` of its metadata, such as a config.

    Returns:
        The state after the last step.

    Raises:
        Diverged: a number is not finite, or a term of the loss is 1000 times the first step's loss (or than one); the
            message names step and term. Nothing is saved after that step.
        ValueError: start or teacher differ from those that the run in the folder began with.
        CheckpointError: no checkpoint can be read or written, or the disk has no space for them.
        Owned: another process trains in the folder.
        Lost: the folder was deleted while the run worked.

    >>> import tempfile
    >>> from fmjax.methods import flow_matching
    >>> model = Model(lambda key, x, cond: {"w": jnp.zeros(2)}, lambda p, x, s, t, cond=None, key=None: p["w"] * x)
    >>> data = TrainingData(lambda n: Batch(np.ones((8, 2), np.float32)), batch_size=8, shape=(2,))
    >>> method, sgd = flow_matching(model.net), Optimiser(optax.sgd(0.1))
    >>> plan = Plan(name="flow", model=model, method=method, optimiser=sgd, data=data, schedule=Schedule(steps=2))
    >>> train(plan, tempfile.mkdtemp())
    State(step=2, params=2 numbers in 1 arrays)
    """
    directory = Path(directory)
    checkpoints = directory / "checkpoints"
    state = initial_state(plan, params)
    steps, log_every, save_every, keep = plan.schedule
    start, window, records, log = None, logs.Window(), None, directory / logs.RECORDS
    digests = {k: checkpoint.digest(v) for k, v in (("params", params), ("teacher", teacher)) if v is not None}
    if checkpoint.latest_step(checkpoints) is not None:
        start, state, metadata = checkpoint.restore(checkpoints, state, stage=plan.name, fallback=True)
        window, records = logs.Window(**metadata["window"]), metadata.get("records")
        changed = [k for k, v in digests.items() if metadata.get("given", digests).get(k) != v]
        if changed:
            raise ValueError(
                f"{changed[0]}: differ from those that {plan.name} in {directory} began with. Take another workdir."
            )
        if jax.process_index() == 0:
            logs.mend_records(log, start, records)
        if start >= steps:
            return state
        if jax.process_index() == 0 and metadata.get("early"):  # the last record of a shorter run, in mid-window
            files.truncate_jsonl(log, start - 1)
        logs.say(f"{plan.name}: goes on from step {start} of {steps} in {checkpoints}")
    elif files.read_jsonl(log):
        logs.say(f"{plan.name}: begins again: {checkpoints} has no checkpoint, and {log} has records")
    checkpoint.check_space(checkpoints, state, keep=keep)
    first = start or 0
    step = _make_step(plan)
    key = jax.random.fold_in(from_seed(plan.seed), 1)
    pending: list[tuple[int, dict]] = []

    with (
        owned(directory),
        checkpoint.writer(checkpoints, keep=keep, after=start) as manager,
        logs.recorder(directory, first) as recorder,
        stop_signals() as stop,
        contextlib.closing(prefetch(functools.partial(numbered_batch, plan), first, steps)) as batches,
        logs.bar(plan.name, steps, first) as progress,
    ):
        check = logs.Explosions(plan.name, manager, checkpoints, lambda n: plan.data.batch(n - 1))
        for n, batch in enumerate(batches, first + 1):
            state, metrics = step(state, batch, key, teacher)
            pending.append((n, metrics))
            due, last, signal = n % log_every == 0, n == steps, stop(n)
            save = n % save_every == 0 or last or signal is not None
            if len(pending) == FETCH or due or save:
                fetched = jax.device_get(pending)
                check.finite(fetched)
                window.add([metrics for _, metrics in fetched])
                pending.clear()
            if due or save:
                check.grown(n, window)
                check_owned()
            progress.update()
            kept = window.saved()
            if due or last:
                means, speed = window.close()
                checkpoint.check_written(manager)  # a full disk is known soon
                progress.set_postfix(loss=f"{means['loss']:.4f}")
                rate = {"learning_rate": float(plan.optimiser.rate(n - 1))} if plan.optimiser.rate else {}
                speeds = {"steps_per_s": speed, "examples_per_s": speed * plan.data.batch_size}
                recorder.write({"step": n, **means, **rate, **speeds})
                for hook in hooks:
                    hook(n, state)
            if save:
                metadata = {"stage": plan.name, "given": digests, "records": recorder.seal(), "run": dict(record or {})}
                metadata |= {"window": window.saved() if due else kept, "early": last and not due}
                checkpoint.save(manager, n, state, metadata=metadata)
            if signal is not None and not last:
                break
        else:
            return state
    print(f"{plan.name}: {signal.name} after step {n}; saved in {checkpoints}, run again to resume", file=sys.stderr)
    sys.exit(128 + signal)


def _make_step(plan: Plan):
    options = {"mesh": plan.mesh, "ema": plan.ema, "target": plan.target, "fsdp": plan.fsdp}
    return make_step(plan.method.loss, plan.optimiser.tx, **options)


def numbered_batch(plan: Plan, n: int) -> Batch:
    """Return the plan's batch of a step, with the fraction of the training that is done.

    Args:
        plan: the run.
        n: the number of the step, from 0.

    Returns:
        The batch, with ``progress`` ``[B]``.
    """
    batch = plan.data.batch(n)
    return batch._replace(progress=np.full(len(batch.x1), n / plan.schedule.steps, np.float32))


def _example(plan: Plan) -> tuple[jax.Array, Cond]:
    """Return zeros in the shape of one example and of its condition."""
    zeros = lambda a: jnp.zeros((1, *np.shape(a)[1:]), jnp.asarray(a).dtype)
    return jnp.zeros((1, *plan.data.shape)), jax.tree.map(zeros, plan.data.cond)
