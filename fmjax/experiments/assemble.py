"""Assemble training plans from settings: every name, shape and number is checked here, before anything is compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import sampling
from fmjax.data import Dataset, batches, mean
from fmjax.experiments import build, specs, workdir
from fmjax.experiments.settings import SECTIONS, Common, Settings, Training
from fmjax.experiments.specs import refusal
from fmjax.methods import weighting
from fmjax.methods.residual import BASE, with_base
from fmjax.nets import Model
from fmjax.sampling import guidance
from fmjax.storage import checkpoint, files
from fmjax.training import loop, sharding
from fmjax.types import Batch, Cond, Method, Params

# the view that the method of a stage must have
NEEDS = {"flow": "velocity", "correctors": "direction", "flow_map": "flow_map", "straighten": "velocity"}
# the batches that a stage gives; guidance by a discriminator, which takes others, is a velocity and no corrector
BATCHES = {"flow": "data", "correctors": "marginals", "flow_map": "data", "straighten": "trajectories"}
PREDICTIONS = ("denoising",)  # methods whose network predicts something else than a velocity
FREE = ("log_every", "save_every", "sample_every", "keep")  # no number depends on these
SAMPLING = ("guidance", "solver", "solver_steps", "backward_map", "forward_examples")  # no training of a flow does
PICTURES = 36  # conditions kept for sample pictures
STORED = ("data.source_dir", "data.data_dir")  # where verified files lie


def flow_plan(settings: Settings, data: Dataset) -> loop.Plan:
    """Return the plan of the flow: it trains on the data.

    Raises:
        ValueError: a name, option or shape that cannot work, or a frozen target without a teacher.
    """
    common, part = settings.common, settings.flow
    if (part.target == "frozen") != bool(common.teacher):
        way = "Set teacher to a run folder, or another target" if not common.teacher else "Set target='frozen'"
        raise refusal("target", part.target, f"with teacher={common.teacher!r}", way)
    ready = plan("flow", common, part, part.net, data)
    if ready.method.frozen and not common.teacher:
        way = "Set teacher to a run folder and target='frozen'"
        raise refusal("method", specs.name_of(part.method), "corrects a frozen flow, and there is none", way)
    return ready


def flow_map_plan(settings: Settings, data: Dataset) -> loop.Plan:
    """Return the plan of the flow map: it trains on the data and starts from the flow."""
    part = settings.flow_map
    return plan("flow_map", settings.common, part, part.net or settings.flow.net, data)


def corrector_plan(settings: Settings, name: str, data: Dataset, batch: Callable[[int], Batch] | None = None):
    """Return the plan of a corrector: it trains on pairs of marginals.

    Args:
        settings: the config.
        name: the corrector.
        data: the data set, for the shapes.
        batch: the batches; by default zeros of the right shapes, for the checks.
    """
    part = settings.correctors[name]
    batch = batch or marginal_batch(settings.common, data, part.batch_size)
    return plan(f"correctors.{name}", settings.common, part, part.net or settings.flow.net, data, batch=batch)


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
        common: fields that all stages share.
        part: fields of this training.
        net: spec of its network.
        data: the data set.
        batch: batches as a function of the step; by default batches of the training data.
        seed: of the parameters and batches; by default the config's.

    Returns:
        The plan, its loss traced on one device's part of a batch.

    Raises:
        ValueError: a name, option or shape that cannot work.
    """
    prefix = "" if name == "flow" else f"{name}."
    mesh, seed = sharding.make_mesh(), common.seed if seed is None else seed
    sharding.check_batch(part.batch_size, mesh)
    classes = label_classes(common, data)
    model, method = network(name, common, part, net, classes, functools.partial(mean, data.train.x))
    if batch is None:
        batch = data_batches(common, part, data, f"{prefix}coupling")
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
        data=loop.TrainingData(batch, part.batch_size, data.train.x.shape[1:], example_conditions(common, data)),
        schedule=loop.Schedule(part.steps, common.log_every, common.save_every, common.keep),
        seed=seed,
        ema=part.ema,
        target=part.target,
        fsdp=common.fsdp,
        mesh=mesh,
    )
    loop.check_plan(ready)
    return ready


def network(
    name: str, common: Common, part: Training, net: Any, classes: int, average: Callable[[], np.ndarray] | None = None
) -> tuple[Model, Method]:
    """Return the network and the method of a stage, without its data.

    Args:
        name: the stage.
        common: fields that all stages share.
        part: fields of its training.
        net: spec of the network.
        classes: number of label classes; 0 without labels.
        average: gives the mean of the training data, for methods that take it.

    Returns:
        The network with its initialiser, and the method.
    """
    kind, prefix = name.partition(".")[0], "" if name == "flow" else f"{name}."
    model, guided = build.net(net, classes=classes, field=f"{prefix}net"), takes_scale(net)
    method = build.method(
        part.method, model.net, path=build.path(common.path), mean=average, null=classes if guided else None,
        field=f"{prefix}method",
    )  # fmt: skip
    if method.batches != BATCHES[kind]:
        wrong = f"trains on batches of {method.batches}, and the stage {name!r} gives {BATCHES[kind]}"
        way = "Take another method, or state Method(batches=...) in a method of your own"
        raise refusal(f"{prefix}method", specs.name_of(part.method), wrong, way)
    if method.frozen:
        model = with_base(model)
    if part.weighting:
        method = specs.build(specs.WEIGHTING, part.weighting, method, field=f"{prefix}weighting")
        if specs.name_of(part.weighting) == "learned":
            model = weighting.with_log_variance(model)
    if kind in ("flow", "flow_map"):
        method = conditional(method, common, classes, guided)
    if getattr(method, NEEDS[kind]) is None:
        wrong = f"gives no {NEEDS[kind].replace('_', ' ')}, which the stage {name!r} needs"
        raise refusal(f"{prefix}method", specs.name_of(part.method), wrong, "Take another method")
    return model, method


def label_classes(common: Common, data: Dataset) -> int:
    """Return the number of label classes that networks are conditioned on; 0 without labels.

    Raises:
        ValueError: a conditional run on data without conditions, or guidance without labels or label dropout.
    """
    if common.conditional and data.train.cond is None:
        raise refusal("conditional", True, f"the data set {data.name!r} has no labels", "Set conditional=False")
    if not common.conditional and (common.label_dropout or common.guidance != 1):
        field = "label_dropout" if common.label_dropout else "guidance"
        raise refusal(field, getattr(common, field), "needs a conditional network", "Set conditional=True")
    if common.guidance != 1 and not common.label_dropout:
        raise refusal("guidance", common.guidance, "needs a network that knows the null label", "Set label_dropout=0.1")
    return data.classes if common.conditional else 0


def conditional(method: Method, common: Common, classes: int, guided: bool) -> Method:
    """Return a method with label dropout in its loss and guidance in its views.

    Args:
        method: the method.
        common: fields that all stages share.
        classes: the null label.
        guided: whether the network takes the guidance scale as an input.
    """
    if guided and not common.label_dropout:
        raise refusal("net.guided", True, "needs a network that knows the null label", "Set label_dropout=0.1")
    if guided:
        method = sampling.random_scale(method)
    if common.label_dropout:
        method = sampling.label_dropout(method, rate=common.label_dropout, null=classes)
    if guided:
        at = lambda view: view and (lambda params: guidance.at_scale(view(params), common.guidance))
        return method._replace(velocity=at(method.velocity), flow_map=at(method.flow_map), score=None)
    if common.guidance == 1 or method.velocity is None:
        return method
    guide = lambda params: guidance.classifier_free(method.velocity(params), null=classes, scale=common.guidance)
    return method._replace(velocity=guide)


def gives_logit(net: Any) -> bool:
    """Return whether the network of a spec gives a logit, which makes its corrector a classifier."""
    return bool(hasattr(net, "items") and dict(net.items()).get("logit", False))


def data_facts(data: Dataset) -> dict[str, Any]:
    """Return what samplers must know of a data set: shape, kind, classes, levels, name."""
    shape = list(data.train.x.shape[1:])
    return {"shape": shape, "kind": data.kind, "classes": data.classes, "levels": data.levels, "name": data.name}


def takes_scale(net: Any) -> bool:
    """Return whether the network of a spec takes the guidance scale as an input."""
    return bool(hasattr(net, "items") and dict(net.items()).get("guided", False))


def conditions(common: Common, data: Dataset) -> Cond:
    """Return the conditions of the training data where the network takes them."""
    return data.train.cond if common.conditional else None


def example_conditions(common: Common, data: Dataset) -> Cond:
    """Return conditions for pictures: labels one after the other, other conditions those of training examples."""
    if not common.conditional:
        return None
    if data.classes:
        return np.arange(data.classes, dtype=np.int32)
    return jax.tree.map(lambda a: np.asarray(a[:PICTURES]), data.train.cond)


def data_batches(common: Common, part: Training, data: Dataset, field: str) -> Callable[[int], Batch]:
    """Return the batches of the training data as a function of the step."""
    x, y = data.train.x, conditions(common, data)
    couple = build.coupling(part.coupling, x, y, flip=common.flip, seed=common.seed, field=field)
    return batches(
        x, y, batch_size=part.batch_size, seed=common.seed, couple=couple, negatives=common.negatives,
        flip=common.flip, process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def marginal_batch(common: Common, data: Dataset, batch_size: int, t: float = 0.0) -> Callable[[int], Batch]:
    """Return batches of the shapes that a training on marginals has, for the checks."""
    rows = np.arange(batch_size) % len(data.train.x)
    x = np.asarray(data.train.x[rows])
    cond = jax.tree.map(lambda a: np.asarray(a)[rows], conditions(common, data))
    still = Batch(x1=x, x0=x, cond=cond, t=np.full(batch_size, t, np.float32))
    return lambda step: still


def start_of(plan: loop.Plan, settings: Settings, field: str) -> Params | None:
    """Return the averaged parameters of the run that ``init`` or ``teacher`` names, or ``None``.

    Raises:
        ValueError: a network of another kind (a velocity for a prediction) or of other shapes.
    """
    place = getattr(settings.common, field)
    if not place:
        return None
    folder = workdir.network_folder(place)
    method = _method_of(folder, settings)
    kinds = {specs.name_of(settings.flow.method), method}
    if len(kinds) > 1 and kinds & set(PREDICTIONS):
        wrong = f"networks of {' and '.join(sorted(kinds))} predict different things"
        raise refusal(field, place, wrong, "sampling.as_flow converts a prediction to a flow, in Python")
    if field == "teacher" and plan.method.frozen:
        return loop.merge_parameters(plan, {BASE: average(folder)}, f"{field}={str(place)!r}")
    return loop.load_average(plan, folder, field)


def _method_of(folder: Path, settings: Settings) -> str:
    """The name of the method that trained a folder's network; of a converted one that of these settings."""
    config = next((f / workdir.CONFIG for f in (folder, folder.parent) if (f / workdir.CONFIG).exists()), None)
    spec = files.read_json(config).get("method") if config else None
    return specs.name_of(spec if spec else settings.flow.method)


def flow_fields(settings: Settings) -> dict[str, Any]:
    """Return the config fields that the flow's numbers depend on, by dotted name."""
    top = {name: value for name, value in settings.config.items() if name not in (*FREE, *SAMPLING, *SECTIONS)}
    fields = workdir.flat(workdir.plain(top))
    if fields.get("data.verify"):
        fields = {name: value for name, value in fields.items() if name not in STORED}
    return fields


def stage_fields(settings: Settings, name: str) -> dict[str, Any]:
    """Return the config fields that the numbers of a stage depend on, beside the stages that it needs."""
    part: Any = settings.config
    for key in name.split("."):
        part = part[key]
    shared = {key: settings.config[key] for key in ("seed", "flip", "path", "conditional")}
    return workdir.flat(workdir.plain({name: part})) | workdir.plain(shared)


def average(folder: Path) -> Params:
    """Return the averaged parameters of the newest good checkpoint of a stage's folder."""
    return checkpoint.restore(folder / "checkpoints", part="ema", fallback=True)[1]
