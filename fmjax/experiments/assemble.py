"""A training run: assembled from a config, then trained step by step, resumable after a kill at any moment.

    plan = run.assemble(cfg)                  # every name and shape is checked here, before anything is compiled
    state = run.train(plan, "workdir/flow")   # metrics.jsonl, tensorboard/, checkpoints/ under that folder

``fit(cfg, workdir)`` is both, in a workdir that remembers its config. Below ``assemble`` nothing receives a config.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax

from fmjax import sampling, training
from fmjax.data import arrays
from fmjax.experiments import specs, workdir
from fmjax.methods import weighting
from fmjax.sampling import guidance
from fmjax.training import sharding
from fmjax.training.hooks import pictures
from fmjax.training.loop import Plan, _step, _trace, given, train
from fmjax.types import Batch, Method, Params

# what the method of a stage must give
NEEDS = {"flow": "velocity", "correctors": "direction", "flow_map": "flow_map", "straighten": "velocity"}
FREE = ("log_every", "save_every", "sample_every", "keep")  # no number of a run depends on them: a resume may change
PREDICTIONS = ("denoising",)  # methods whose network is no velocity, of which they make one
# no number of a flow's training depends on how it is sampled, nor on the grid of its marginals
SAMPLING = ("sampling", "guidance", "solver", "solver_steps", "backward_map")


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
        data = specs.data(cfg.data)
    classes = cfg.classes if batch is None else 0
    spec = part.net if "net" in part else cfg.net  # without one of its own a stage starts from the flow's parameters
    model = specs.net(spec, classes=classes)
    mean = None if data is None else functools.partial(arrays.mean, data.train_x)
    told = told_the_scale(spec)  # of guidance
    null = classes if told else None
    method = specs.method(part.method, model.net, path=specs.path(cfg.path), mean=mean, null=null)
    if part.weighting:
        method = specs.from_spec("methods.weighting", part.weighting, method, takes=("method",))
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
    tx = specs.optimiser(
        learning_rate=part.learning_rate, clip=part.clip, beta2=part.beta2, weight_decay=part.weight_decay, **schedule
    )
    if batch is None:
        x, y = data.train_x, _labels(data.train_y, classes)
        # the independent coupling is none: then the loss draws its source
        independent = part.coupling == "independent"
        couple = None if independent else specs.coupling(part.coupling, x, y, flip=cfg.flip, seed=cfg.seed)
        batch = arrays.batches(
            x, y, batch_size=part.batch_size, seed=cfg.seed, couple=couple, negatives=cfg.negatives, flip=cfg.flip,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
    plan = Plan(
        stage, model, method, tx, functools.partial(specs.learning_rate_at, peak=part.learning_rate, **schedule), batch,
        batch(0).x1.shape[1:], classes, part.batch_size, part.steps, cfg.seed, part.ema, part.target, cfg.fsdp,
        cfg.log_every, cfg.save_every, cfg.keep, mesh,
    )  # fmt: skip
    _step(plan)
    _trace(plan)
    return plan


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
        method = sampling.random_scale(method)
    method = sampling.label_dropout(method, rate=cfg.label_dropout, null=classes)
    if told:
        at = lambda view: view and (lambda params: guidance.at_scale(view(params), cfg.guidance))
        return method._replace(velocity=at(method.velocity), flow_map=at(method.flow_map), score=None)
    if cfg.guidance == 1 or method.velocity is None:
        return method
    guided = lambda params: guidance.classifier_free(method.velocity(params), null=classes, scale=cfg.guidance)
    return method._replace(velocity=guided)


def _labels(y, classes: int):
    """The labels of a data set where a config asks for them, checked against its number of classes."""
    if not classes:
        return None
    if not (0 <= y.min() and y.max() < classes):
        raise ValueError(f"classes={classes} is too few: the data have labels {y.min()} .. {y.max()}")
    return y
