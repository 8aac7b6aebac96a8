"""Assemble training plans from settings: every name, shape and number is checked here, before anything is compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fmjax import sampling
from fmjax.checks import Refusal
from fmjax.data import Dataset, batches, mean
from fmjax.experiments import build, sources, specs, workdir
from fmjax.experiments.settings import SECTIONS, Common, Settings, Training
from fmjax.methods import weighting
from fmjax.methods.residual import BASE, with_base
from fmjax.nets import Model
from fmjax.storage import checkpoint, files
from fmjax.training import loop, sharding
from fmjax.types import Batch, Cond, Method, Params

# the view that the method of a stage must have
NEEDS = {"flow": "velocity", "correctors": "direction", "flow_map": "flow_map", "straighten": "velocity"}
# the batches that a stage gives; guidance by a discriminator, which takes others, is a velocity and no corrector
BATCHES = {"flow": "data", "correctors": "marginals", "flow_map": "data", "straighten": "trajectories"}
PREDICTIONS = ("denoising",)  # methods whose network predicts noise, data or v, not a velocity
FREE = ("log_every", "save_every", "sample_every", "keep")  # no number depends on these
SAMPLING = (
    "guidance",
    "solver",
    "solver_steps",
    "backward_map",
    "forward_examples",
)  # no training of a flow uses these
PICTURES = 36  # conditions kept for sample pictures
STORED = tuple(f"data.{name}" for name in sources.STORED)  # where verified files lie


def flow_plan(settings: Settings, data: Dataset) -> loop.Plan:
    """Return the training plan of the flow, which trains on the data.

    Args:
        settings: the config.
        data: its data set.

    Returns:
        The checked plan.

    Raises:
        ValueError: a name, option or shape that cannot work, or a frozen target without a teacher.
    """
    common, part = settings.common, settings.flow
    if (part.target in ("frozen", "both")) != bool(common.teacher):
        way = "Set teacher to a run folder, or another target" if not common.teacher else "Set target='frozen'"
        raise Refusal("target", part.target, f"with teacher={common.teacher!r}", way)
    ready = plan("flow", common, part, part.net, data)
    if ready.method.frozen and not common.teacher:
        way = "Set teacher to a run folder and target='frozen'"
        raise Refusal("method", specs.name_of(part.method), "corrects a frozen flow, and no teacher is named", way)
    return ready


def flow_map_plan(settings: Settings, data: Dataset) -> loop.Plan:
    """Return the training plan of the flow map, which trains on the data and starts from the flow.

    Args:
        settings: the config, with ``flow_map``.
        data: its data set.

    Returns:
        The checked plan.

    Raises:
        ValueError: a name, option or shape that cannot work.
    """
    part = settings.flow_map
    return plan("flow_map", settings.common, part, settings.flow.net if part.net is None else part.net, data)


def corrector_plan(settings: Settings, name: str, data: Dataset, batch: Callable[[int], Batch] | None = None):
    """Return the training plan of a corrector, which trains on pairs of marginals.

    Args:
        settings: the config.
        name: the corrector.
        data: the data set, for the shapes.
        batch: batches as a function of the step; by default constant batches of the right shapes, for the checks.

    Returns:
        The checked plan.

    Raises:
        ValueError: a name, option or shape that cannot work.
    """
    part = settings.correctors[name]
    batch = batch or marginal_batch(settings.common, data, part.batch_size)
    return plan(
        f"correctors.{name}",
        settings.common,
        part,
        settings.flow.net if part.net is None else part.net,
        data,
        batch=batch,
    )


def plan(
    name: str,
    common: Common,
    part: Training,
    net: Any,
    data: Dataset,
    *,
    batch: Callable[[int], Batch] | None = None,
    seed: int | None = None,
) -> loop.Plan:
    """Return the plan of one training stage.

    Args:
        name: the stage, ``"flow"``, ``"flow_map"``, ``"correctors.NAME"`` or ``"straighten.NAME"``.
        common: fields common to all stages.
        part: fields of this training.
        net: spec of the network that is trained.
        data: the data set.
        batch: batches as a function of the step; by default batches of the training data.
        seed: seed of the parameters and batches; by default the seed of the config.

    Returns:
        The plan, its loss traced on one device's part of a batch.

    Raises:
        ValueError: a name, option or shape that cannot work.
    """
    prefix = _prefix(name)
    mesh, seed = sharding.make_mesh(), common.seed if seed is None else seed
    sharding.check_batch(part.batch_size, mesh)
    classes = _label_classes(common, data)
    build.check_net(net, data, conditional=common.conditional, field=f"{prefix}net")
    model, method = network_and_method(name, common, part, net, classes, functools.partial(mean, data.train.x))
    if batch is None:
        batch = _data_batches(common, part, data, f"{prefix}coupling")
    else:
        build.check_coupling(part.coupling, field=f"{prefix}coupling")
    rate = {"steps": part.steps, "warmup": part.warmup, "schedule": part.schedule}
    decay = {"clip": part.clip, "beta2": part.beta2, "weight_decay": part.weight_decay}
    ready = loop.Plan(
        name=name,
        model=model,
        method=method,
        optimiser=loop.Optimiser(
            build.unfrozen(build.optimiser(learning_rate=part.learning_rate, **decay, **rate), method.frozen),
            functools.partial(build.learning_rate_at, peak=part.learning_rate, **rate),
        ),
        data=loop.TrainingData(batch, part.batch_size, data.train.x.shape[1:], _example_conditions(common, data)),
        schedule=loop.Schedule(part.steps, common.log_every, common.save_every, common.keep),
        seed=seed,
        ema=part.ema,
        target=part.target,
        fsdp=common.fsdp,
        mesh=mesh,
    )
    try:
        loop.check_plan(ready)
    except ValueError as error:
        raise ValueError(f"{prefix}{str(error).removeprefix(prefix)}") from error
    return ready


def _prefix(name: str) -> str:
    """Return what the fields of a stage begin with; all students of half-straightening have the same fields."""
    return "" if name == "flow" else "straighten." if name.startswith("straighten.") else f"{name}."


def network_and_method(
    name: str, common: Common, part: Training, net: Any, classes: int, average: Callable[[], np.ndarray] | None = None
) -> tuple[Model, Method]:
    """Return the network and the method of a stage; a data set is not needed.

    Args:
        name: the stage.
        common: fields common to all stages.
        part: fields of the training of the stage.
        net: spec of the network.
        classes: number of label classes; 0 without labels.
        average: returns the mean of the training data, for methods that take the mean.

    Returns:
        The network with its initialiser, and the method.

    Raises:
        ValueError: a name or option that cannot work, or a method without the view that the stage needs.
    """
    kind, prefix = name.partition(".")[0], _prefix(name)
    floats = common.conditional and not classes
    model, guided = build.net(net, classes=classes, floats=floats, field=f"{prefix}net"), _takes_scale(net)
    method = build.method(
        part.method, model.net, path=build.path(common.path), mean=average, null=classes if guided else None,
        field=f"{prefix}method",
    )  # fmt: skip
    if method.batches != BATCHES[kind]:
        wrong = f"trains on batches of {method.batches}, and the stage {name!r} gives {BATCHES[kind]}"
        way = "Take another method, or state Method(batches=...) in a method of your own"
        raise Refusal(f"{prefix}method", specs.name_of(part.method), wrong, way)
    if method.frozen:
        model = with_base(model)
    if part.weighting is not None:
        method = specs.build(specs.WEIGHTING, part.weighting, method, field=f"{prefix}weighting")
        if specs.name_of(part.weighting) == "learned":
            model = weighting.with_log_variance(model)
    if kind in ("flow", "flow_map"):
        method = _conditional(method, common, classes, guided)
        if not common.normal_source:
            path, called = build.path(common.path), specs.name_of(part.method)
            method = sources.limited(method, common.source, name=called, path=path)
    if getattr(method, NEEDS[kind]) is None:
        wrong = f"gives no {NEEDS[kind].replace('_', ' ')}, which the stage {name!r} needs"
        raise Refusal(f"{prefix}method", specs.name_of(part.method), wrong, "Take another method")
    return model, method


def _label_classes(common: Common, data: Dataset) -> int:
    """Return the number of label classes that networks are conditioned on; 0 without labels."""
    if common.conditional and data.train.cond is None:
        raise Refusal("conditional", True, f"the data set {data.name!r} has no labels", "Set conditional=False")
    if common.conditional and data.classes == 1:
        raise Refusal("conditional", True, f"the data set {data.name!r} has one class", "Set conditional=False")
    if not common.conditional and (common.label_dropout or common.guidance != 1):
        field = "label_dropout" if common.label_dropout else "guidance"
        raise Refusal(field, getattr(common, field), "needs a conditional network", "Set conditional=True")
    if common.guidance != 1 and not common.label_dropout:
        raise Refusal("guidance", common.guidance, "needs a network that knows the null label", "Set label_dropout=0.1")
    return data.classes if common.conditional else 0


def _conditional(method: Method, common: Common, classes: int, guided: bool) -> Method:
    """Return the method with label dropout in its loss and guidance in its views.

    ``classes`` is the null label, and NaN the null condition of floats.
    """
    null = classes or np.nan
    if guided and not common.label_dropout:
        raise Refusal("net.guided", True, "needs a network that knows the null label", "Set label_dropout=0.1")
    if guided:
        method = sampling.random_scale(method)
    if common.label_dropout:
        method = sampling.label_dropout(method, rate=common.label_dropout, null=null)
    if guided:
        at = lambda view: view and (lambda params: sampling.at_scale(view(params), common.guidance))
        return method._replace(velocity=at(method.velocity), flow_map=at(method.flow_map), score=None)
    if common.guidance == 1 or method.velocity is None:
        return method
    guide = lambda params: sampling.classifier_free(method.velocity(params), null=null, scale=common.guidance)
    return method._replace(velocity=guide)


def gives_logit(net: Any) -> bool:
    """Return whether the network of a spec outputs one logit per example, as a classifier does.

    Args:
        net: spec of the network.

    Returns:
        The option ``logit`` of the spec.
    """
    return bool(hasattr(net, "items") and dict(net.items()).get("logit", False))


def _takes_scale(net: Any) -> bool:
    """Return whether the network of a spec takes the guidance scale as an input."""
    return bool(hasattr(net, "items") and dict(net.items()).get("guided", False))


def conditions(common: Common, data: Dataset) -> Cond:
    """Return the conditions of the training examples of a conditional run.

    Args:
        common: fields common to all stages.
        data: the data set.

    Returns:
        A pytree of arrays ``[n, ...]``; ``None`` where the run is not conditional.
    """
    return data.train.cond if common.conditional else None


def _example_conditions(common: Common, data: Dataset) -> Cond:
    """Return conditions for pictures: every label once, or the conditions of the first training examples."""
    if not common.conditional:
        return None
    if data.classes:
        return np.arange(data.classes, dtype=np.int32)
    return jax.tree.map(lambda a: np.asarray(a[:PICTURES]), data.train.cond)


def _data_batches(common: Common, part: Training, data: Dataset, field: str) -> Callable[[int], Batch]:
    """Return the batches of the training data as a function of the step."""
    x, y = data.train.x, conditions(common, data)
    source = None if common.normal_source else common.origin.training
    if source and specs.name_of(part.coupling) == build.SEMIDISCRETE:
        source.check_normal("the coupling 'semidiscrete'", "Take coupling='minibatch_ot'")
    couple = build.coupling(part.coupling, x, y, flip=common.flip, seed=common.seed, field=field)
    return batches(
        x, y, batch_size=part.batch_size, seed=common.seed, couple=couple, source=source, negatives=common.negatives,
        flip=common.flip, process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def marginal_batch(common: Common, data: Dataset, batch_size: int, t: float = 0.0) -> Callable[[int], Batch]:
    """Return constant batches of the shapes of a training on marginals, for the checks before training.

    Args:
        common: fields common to all stages.
        data: the data set.
        batch_size: examples of a batch.
        t: time of every example.

    Returns:
        Batches as a function of the step, with ``x0`` and ``x1`` ``[batch_size, ...]`` and ``t`` ``[batch_size]``.
    """
    rows = np.arange(batch_size) % len(data.train.x)
    x = np.asarray(data.train.x[rows])
    cond = jax.tree.map(lambda a: np.asarray(a)[rows], conditions(common, data))
    still = Batch(x1=x, x0=x, cond=cond, t=np.full(batch_size, t, np.float32))
    return lambda step: still


def start_of(plan: loop.Plan, settings: Settings, field: str) -> Params | None:
    """Return the averaged parameters of the run folder that the field ``init`` or ``teacher`` names.

    Args:
        plan: the training that takes the parameters.
        settings: the config.
        field: ``"init"`` or ``"teacher"``.

    Returns:
        The parameters; ``None`` where the field is empty.

    Raises:
        ValueError: the network there predicts something else (noise, not a velocity) or has other shapes.
    """
    place = getattr(settings.common, field)
    if not place:
        return None
    try:
        folder = workdir.network_folder(place)
    except workdir.WorkdirError as error:
        raise Refusal(field, place, "has no checkpoint of a flow", "Give the folder of a trained run") from error
    config = next((f / workdir.CONFIG for f in (folder, folder.parent) if (f / workdir.CONFIG).exists()), None)
    trained = files.read_json(config) if config else {}  # a converted network may have no config
    if field == "teacher" and not sources.same(trained.get("source", "gaussian_noise"), settings.common.source):
        raise Refusal(field, place, "its flow starts from another source", "Set source to the source of the teacher")
    kinds = {specs.name_of(part) for part in (settings.flow.method, trained.get("method") or settings.flow.method)}
    if len(kinds) > 1 and kinds & set(PREDICTIONS):
        wrong = f"networks of {' and '.join(sorted(kinds))} predict different things"
        raise Refusal(field, place, wrong, "sampling.as_flow converts a prediction to a flow, in Python")
    if field == "teacher" and plan.method.frozen:
        _, base, _ = checkpoint.restore(folder / "checkpoints", part="ema", fallback=True)
        return loop.merge_parameters(plan, {BASE: base}, f"{field}={str(place)!r}")
    return loop.load_average(plan, folder, field)


def flow_fields(settings: Settings) -> dict[str, Any]:
    """Return the config fields that the training of the flow depends on.

    Args:
        settings: the config.

    Returns:
        Plain values by dotted name.
    """
    dropped = (*FREE, *SAMPLING, *SECTIONS, "source")
    top = {name: value for name, value in settings.config.items() if name not in dropped}
    fields = workdir.flat(workdir.plain(top | settings.common.source_field()))
    if fields.get("data.verify"):
        fields = {name: value for name, value in fields.items() if name not in STORED}
    return fields


def stage_fields(settings: Settings, name: str) -> dict[str, Any]:
    """Return the config fields that a stage depends on, in addition to the results of the stages that it needs.

    Args:
        settings: the config.
        name: the stage, which is also the dotted name of its section.

    Returns:
        Plain values by dotted name.
    """
    part: Any = settings.config
    for key in name.split("."):
        part = part[key]
    shared = {key: settings.config[key] for key in ("seed", "flip", "path", "conditional")}
    shared |= settings.common.source_field()
    return workdir.flat(workdir.plain({name: part})) | workdir.plain(shared)
