"""A training run: assembled from a config, then trained step by step, resumable after a kill at any moment.

    plan = run.assemble(cfg)                  # every name and shape is checked here, before anything is compiled
    state = run.train(plan, "workdir/flow")   # metrics.jsonl, tensorboard/, checkpoints/ under that folder

``fit(cfg, workdir)`` is both, in a workdir that remembers its config. Below ``assemble`` nothing receives a config.
"""

from __future__ import annotations

import contextlib
import functools
import json
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

from fmjax import build, checkpoint, guidance, logs, samplers, sharding, solvers, times, weighting, workdir
from fmjax import train as training
from fmjax.data import arrays
from fmjax.logs import Window
from fmjax.nets.adapters import Model
from fmjax.types import Batch, Method, Params, as_keys, example_keys, normal

# what the method of a stage must give
NEEDS = {"flow": "velocity", "correctors": "direction", "flow_map": "flow_map", "straighten": "velocity"}
FREE = ("log_every", "save_every", "sample_every", "keep")  # no number of a run depends on them: a resume may change
PREDICTIONS = ("denoising",)  # methods whose network is no velocity, of which they make one
# no number of a flow's training depends on how it is sampled, nor on the grid of its marginals
SAMPLING = ("sampling", "guidance", "solver", "solver_steps", "backward_map")
FETCH = 32  # steps between two looks at the metrics: NaN is found soon, and few steps are in flight
TERMINATED = 143  # exit status after SIGTERM, as a shell has it

Hook = Callable[[int, training.State], Any]


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


def fit(cfg, path: str | Path) -> training.State:
    """Trains the flow of a config in the workdir ``path`` and returns its last state; resumes what is there.

    Raises as ``assemble``, ``workdir.open_workdir`` and ``train`` do, the first two before anything is written.
    """
    plan = assemble(cfg)
    start, teacher = (_named(plan, cfg, name) for name in ("init", "teacher"))
    path = workdir.open_workdir(path, cfg.to_dict(), free=(*free(cfg), *SAMPLING))
    hooks = [pictures(plan, path, every=cfg.sample_every)]
    return train(plan, path, params=start, teacher=teacher, hooks=hooks)


def _named(plan: Plan, cfg, name: str) -> Params | None:
    """``given`` of a config's field; ``ValueError`` where a prediction's network would be taken for a velocity's."""
    if not cfg[name]:
        return None
    file = Path(cfg[name]) / "config.json"
    kinds = {_name(cfg.method), _name(json.loads(file.read_text())["method"]) if file.is_file() else _name(cfg.method)}
    if len(kinds) > 1 and kinds & set(PREDICTIONS):
        told = " and ".join(map(repr, sorted(kinds)))
        what = f"{name}={cfg[name]!r}: networks of {told} are not of one kind"
        raise ValueError(f"{what}; diffusion.as_flow makes a flow's of a prediction's, in Python")
    return given(plan, cfg[name], name)


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


def free(cfg) -> tuple[str, ...]:
    """The fields that may change when a run is resumed: ``FREE``, and where files of known checksums lie."""
    verified = "verify" in getattr(cfg.data, "keys", tuple)() and cfg.data.verify
    return (*FREE, "data.source_dir", "data.data_dir") if verified else FREE


def assemble(
    cfg, stage: str = "flow", *, data: arrays.Splits | None = None, batch: Callable[[int], Batch] | None = None
) -> Plan:
    """The plan of one stage of a config: ``"flow"`` reads the config's own fields, the others those of ``cfg.STAGE``.

    ``"correctors.NAME"`` is ``cfg.correctors.NAME``. ``data`` saves loading the data set again; ``batch`` replaces the
    stage's batches (a corrector trains on marginals). All names, options, numbers and shapes are checked, the loss
    being traced on one device's share of a batch. Raises ``ValueError`` of one sentence, before anything is compiled.
    """
    part = cfg if stage == "flow" else functools.reduce(lambda part, name: part[name], stage.split("."), cfg)
    mesh = sharding.make_mesh()
    for name, value in [("steps", part.steps), *((name, cfg[name]) for name in ("log_every", "save_every", "keep"))]:
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    sharding.check_batch(part.batch_size, mesh)
    if batch is None and data is None:
        data = build.data(cfg.data)
    classes = cfg.classes if batch is None else 0
    spec = part.net if "net" in part else cfg.net  # without one of its own a stage starts from the flow's parameters
    model = build.net(spec, classes=classes)
    mean = None if data is None else functools.partial(arrays.mean, data.train_x)
    told = told_the_scale(spec)  # of guidance
    null = classes if told else None
    method = build.method(part.method, model.net, path=build.path(cfg.path), mean=mean, null=null)
    if part.weighting:
        method = build.from_spec("weighting", part.weighting, method, takes=("method",))
        model = weighting.with_log_variance(model) if _name(part.weighting) == "learned" else model
    method = _conditional(method, cfg, classes, told)
    needed = NEEDS[stage.split(".")[0]]
    if getattr(method, needed) is None:
        raise ValueError(
            f"the method of the stage {stage!r} must give a {needed}, which {_name(part.method)!r} does not"
        )
    if stage == "flow" and (part.target == "frozen") != bool(cfg.teacher):
        raise ValueError(
            f"target={part.target!r} and teacher={cfg.teacher!r}: target='frozen' needs a teacher, the workdir of a "
            "run, and no other target has one"
        )
    schedule = {"steps": part.steps, "warmup": part.warmup, "schedule": part.schedule}
    tx = build.optimiser(
        learning_rate=part.learning_rate, clip=part.clip, beta2=part.beta2, weight_decay=part.weight_decay, **schedule
    )
    if batch is None:
        x, y = data.train_x, _labels(data.train_y, classes)
        # the independent coupling is none: then the loss draws its source
        independent = part.coupling == "independent"
        couple = None if independent else build.coupling(part.coupling, x, y, flip=cfg.flip, seed=cfg.seed)
        batch = arrays.batches(
            x, y, batch_size=part.batch_size, seed=cfg.seed, couple=couple, negatives=cfg.negatives, flip=cfg.flip,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
    plan = Plan(
        stage, model, method, tx, functools.partial(build.learning_rate_at, peak=part.learning_rate, **schedule), batch,
        batch(0).x1.shape[1:], classes, part.batch_size, part.steps, cfg.seed, part.ema, part.target, cfg.fsdp,
        cfg.log_every, cfg.save_every, cfg.keep, mesh,
    )  # fmt: skip
    _step(plan)
    _trace(plan)
    return plan


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
) -> training.State:
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
    state = training.init(initial(plan) if params is None else params, plan.tx, mesh=plan.mesh, fsdp=plan.fsdp)
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
        contextlib.closing(arrays.prefetch(functools.partial(_batch, plan), first, plan.steps)) as batches,
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


def pictures(plan: Plan, directory: str | Path, *, every: int, count: int = 36, steps: int = 16) -> Hook:
    """A hook that writes ``samples/step-N.png`` every ``every`` records' steps: samples of the averaged parameters.

    Those of a flow map are one jump (of a method whose map knows other jumps only, a bad picture), those of a flow
    ``steps`` Euler steps.
    Labels, where there are any, follow one another: 0, 1, ... Nothing for ``every = 0`` and for examples that are not
    images ``[H, W, C]``.
    """
    from fmjax import figures

    folder = Path(directory) / "samples"
    keys = as_keys(jax.random.fold_in(jax.random.key(plan.seed), 2), count)
    labels = jnp.arange(count) % plan.classes if plan.classes else None

    @jax.jit
    def draw(params):
        if plan.method.flow_map is not None:
            step, n = plan.method.flow_map(params), 1
        else:
            step, n = solvers.euler(plan.method.velocity(params)), steps
        return samplers.sample(step, normal(keys, plan.shape), times.uniform_grid(n), cond=labels)

    def hook(n: int, state: training.State) -> None:
        if every and n % every == 0 and len(plan.shape) == 3:
            images = draw(state.ema)
            if jax.process_index() == 0:
                folder.mkdir(exist_ok=True)
                figures.save_png(folder / f"step-{n:07d}.png", jax.device_get(images))

    return hook


def _step(plan: Plan):
    return training.make_step(
        plan.method.loss, plan.tx, mesh=plan.mesh, ema=plan.ema, target=plan.target, fsdp=plan.fsdp
    )


def _name(spec) -> str:
    return spec if isinstance(spec, str) else spec["name"]


def told_the_scale(net) -> bool:
    """Whether the network of a spec is told the scale of guidance, so that one evaluation is guided."""
    return "guided" in getattr(net, "keys", tuple)() and net["guided"]


def _conditional(method: Method, cfg, classes: int, told: bool) -> Method:
    """The method with label dropout in its loss and guidance in its views, as the config has them."""
    if not classes and (cfg.label_dropout or cfg.guidance != 1 or told):
        raise ValueError(
            f"label_dropout={cfg.label_dropout}, guidance={cfg.guidance} and a guided net ({told}) need labels: set "
            "classes, or 0, 1 and False here"
        )
    if (cfg.guidance != 1 or told) and not cfg.label_dropout:
        what = "a guided net" if told else f"guidance={cfg.guidance}"
        raise ValueError(f"{what} needs a network that knows the null label: set label_dropout=0.1")
    if told:
        method = guidance.random_scale(method)
    method = guidance.label_dropout(method, rate=cfg.label_dropout, null=classes)
    if told:
        at = lambda view: view and (lambda params: guidance.at_scale(view(params), cfg.guidance))
        return method._replace(velocity=at(method.velocity), flow_map=at(method.flow_map), score=None)
    if cfg.guidance == 1 or method.velocity is None:
        return method
    guided = lambda params: guidance.classifier_free(method.velocity(params), null=classes, scale=cfg.guidance)
    return method._replace(velocity=guided)


def _batch(plan: Plan, n: int) -> Batch:
    """The plan's batch of step ``n``, told how far the training is."""
    found = plan.batch(n)
    return found._replace(progress=np.full(len(found.x1), n / plan.steps, np.float32))


def _labels(y, classes: int):
    """The labels of a data set where a config asks for them, checked against its number of classes."""
    if not classes:
        return None
    if not (0 <= y.min() and y.max() < classes):
        raise ValueError(f"classes={classes} is too few: the data have labels {y.min()} .. {y.max()}")
    return y


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
