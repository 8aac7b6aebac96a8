"""The networks of a config: training plans, and trained networks for samplers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import correction
from fmjax.data import Dataset, mean
from fmjax.experiments import assemble, build, drawing, records, specs, workdir
from fmjax.experiments.drawing import Models
from fmjax.experiments.samplers import DRIFT, FLOW, FLOW_MAP, Sampler, time_grid
from fmjax.experiments.settings import Settings
from fmjax.storage import checkpoint
from fmjax.storage.shards import Unfinished
from fmjax.training import loop, pictures
from fmjax.types import Method, Params

Plans = Mapping[str, loop.Plan]


def plans(settings: Settings, data: Dataset) -> dict[str, loop.Plan]:
    """Return the training plans of a config by network: the flow, the flow map, and each corrector.

    Args:
        settings: the config.
        data: its data set.

    Returns:
        The plans; names of networks are ``"flow"``, ``"flow_map"`` and the names of the correctors.

    Raises:
        ValueError: one line, for anything that cannot work.
    """
    training_plans = {FLOW: assemble.flow_plan(settings, data)}
    training_plans |= {name: assemble.corrector_plan(settings, name, data) for name in settings.correctors}
    return training_plans | ({FLOW_MAP: assemble.flow_map_plan(settings, data)} if settings.flow_map else {})


def stage_name(network: str) -> str:
    """Return the stage that trains a network.

    Args:
        network: ``"flow"``, ``"flow_map"``, or the name of a corrector.

    Returns:
        The name itself, or ``"correctors.NAME"``.
    """
    return network if network in (FLOW, FLOW_MAP) else f"correctors.{network}"


def models(settings: Settings, plans: Plans, params: Mapping[str, Params]) -> Models:
    """Return trained networks in the form that samplers use.

    If no separate flow map is trained and the method of the flow has a flow map, that map is used.

    Args:
        settings: the config.
        plans: the plans by network.
        params: averaged parameters by network, and under ``"drift"`` the stored marginals ``p`` and ``q``.

    Returns:
        The networks.
    """
    return _combine(settings, {name: plan.method for name, plan in plans.items()}, dict(params), plans[FLOW].data.shape)


def _combine(
    settings: Settings, methods: dict[str, Method], params: dict[str, Params], shape: tuple[int, ...]
) -> Models:
    """Return methods and parameters by network in the form that samplers use; see ``models``."""
    if FLOW_MAP not in methods and methods[FLOW].flow_map is not None:
        methods[FLOW_MAP], params[FLOW_MAP] = methods[FLOW], params[FLOW]
    path = build.path(settings.common.path)
    return Models(methods, params, shape, path, time_grid(None, settings.marginals.solver_steps, path))


def shapes(settings: Settings, plans: Plans) -> Models:
    """Return untrained networks in the form that samplers use, for the checks before training.

    Args:
        settings: the config.
        plans: the plans by network.

    Returns:
        The networks, with ``jax.ShapeDtypeStruct`` in place of the arrays of the parameters.
    """
    params = {name: jax.eval_shape(lambda plan=plan: loop.initial_parameters(plan)) for name, plan in plans.items()}
    shape = (4, settings.marginals.solver_steps + 1, *plans[FLOW].data.shape)
    rows, cond = jax.ShapeDtypeStruct(shape, np.float32), plans[FLOW].data.cond
    labels = jax.tree.map(lambda a: jax.ShapeDtypeStruct((4, *np.shape(a)[1:]), np.asarray(a).dtype), cond)
    banks = {"p": rows, "q": rows} | ({} if cond is None else {"p_labels": labels, "q_labels": labels})
    return models(settings, plans, params | {DRIFT: banks})


def bank(forward: correction.Marginals, backward: correction.Marginals) -> Params:
    """Return two sets of marginals as the arguments of ``correction.kernel_drift``.

    Args:
        forward: examples of ``p_n``.
        backward: examples of ``q_n``.

    Returns:
        ``p`` and ``q``, ``[n, steps, ...]``, and with conditions ``p_labels`` and ``q_labels``, ``[n]``.
    """
    banks = {"p": jnp.asarray(forward.x), "q": jnp.asarray(backward.x)}
    if forward.cond is None:
        return banks
    return banks | {f"{n}_labels": jax.tree.map(jnp.asarray, m.cond) for n, m in (("p", forward), ("q", backward))}


def identity(settings: Settings, params: Mapping[str, Params]) -> str:
    """Return the name of everything that samples depend on beside the sampler.

    Args:
        settings: the config.
        params: the parameters by network, and the stored marginals where they are used.

    Returns:
        The digest of the parameters, and the guidance scale.
    """
    return f"{checkpoint.digest(params)} guidance {settings.common.guidance}"


def picture(settings: Settings, plan: loop.Plan) -> Callable[[Params], Any] | None:
    """Return a function that draws the samples of a picture while a flow trains: one jump, or 16 Euler steps.

    Args:
        settings: the config.
        plan: the flow's plan.

    Returns:
        ``draw(params) -> [n, ...]``, from the noise of the run's samples; ``None`` for data that cannot be shown.
    """
    kind = pictures.writer_for(plan.data.shape)
    if kind is None:
        return None
    jumps = plan.method.flow_map is not None
    sampler = Sampler("picture", "picture", FLOW_MAP if jumps else "euler", 1 if jumps else 16)
    methods = {FLOW: plan.method} | ({FLOW_MAP: plan.method} if jumps else {})
    program = drawing.program(sampler, _combine(settings, methods, {FLOW: None, FLOW_MAP: None}, plan.data.shape))
    keys = drawing.sample_keys(settings.common.seed, 0, kind.count)
    cond = jax.tree.map(lambda a: np.asarray(a)[np.arange(kind.count) % len(a)], plan.data.cond)
    return lambda params: program({FLOW: params, FLOW_MAP: params}, keys, cond)


def data_facts(settings: Settings, data: Dataset) -> dict[str, Any]:
    """Return what a sampler needs to know of a data set.

    Args:
        settings: the config.
        data: the data set.

    Returns:
        Plain values by name: ``shape`` of an example, ``kind``, ``classes``, ``levels``, ``name``, and ``mean`` of the
        training examples where a method of the config takes it.
    """
    shape = list(data.train.x.shape[1:])
    facts = {"shape": shape, "kind": data.kind, "classes": data.classes, "levels": data.levels, "name": data.name}
    parts = [settings.flow, *settings.correctors.values(), *([settings.flow_map] if settings.flow_map else [])]
    needed = any(_takes_mean(part.method) for part in parts)
    return facts | ({"mean": np.asarray(mean(data.train.x), np.float64).tolist()} if needed else {})


def _takes_mean(method: Any) -> bool:
    """Return whether the method of a spec takes the mean of the training examples."""
    if isinstance(method, Method):
        return False
    factory = specs.resolve(specs.METHOD, method, field="method")[0] if specs.is_spec(method) else method
    return "mean" in specs.options_of(factory)


def example_facts(path: Path) -> dict[str, Any]:
    """Return the recorded facts of the data set of a run.

    Args:
        path: the run folder.

    Returns:
        ``shape`` of an example, ``kind``, ``classes``, ``levels`` and ``name`` of the data set.
    """
    folder = workdir.network_folder(path)
    record = records.read_record(folder)
    if record is None:
        problem = "is missing or damaged, and no checkpoint has a copy. Run the command that trained the flow again"
        raise workdir.WorkdirError(f"{folder / workdir.STAGE} {problem}.")
    return record["data"]


def load_models(settings: Settings, path: Path, *, drift: bool = False) -> tuple[Models, str, int]:
    """Read the trained networks of a run folder; the data set is not needed.

    Args:
        settings: the config.
        path: the folder of a flow, of a pipeline, or of a converted network.
        drift: read the stored marginals too, which the kernel drift takes.

    Returns:
        The networks in the form that samplers use, their digest (see ``identity``), and the training step of the flow.

    Raises:
        WorkdirError: no flow is trained there.
    """
    facts = example_facts(path)
    shape, classes = tuple(facts["shape"]), facts["classes"] if settings.common.conditional else 0
    average = lambda: np.asarray(facts["mean"], np.float32)
    parts = {FLOW: settings.flow} | settings.correctors | ({FLOW_MAP: settings.flow_map} if settings.flow_map else {})
    methods, params = {}, {}
    steps: dict[str, int] = {}
    for name, part in parts.items():
        net = settings.flow.net if part.net is None else part.net
        best = name in settings.correctors and assemble.gives_logit(net)
        if (folder := _trained_folder(path, name, best)) is not None:
            stage = None if folder == path else f"{stage_name(name)}.best" if best else stage_name(name)
            options = {"part": "ema", "stage": stage, "fallback": True}
            steps[name], params[name], _ = checkpoint.restore(folder / "checkpoints", **options)
            _, methods[name] = assemble.network_and_method(
                stage_name(name), settings.common, part, net, classes, average
            )
    banks = stored_bank(path, params[FLOW]) if drift else None
    if banks is not None:
        params[DRIFT], ts = banks
    ready, name = _combine(settings, methods, params, shape), identity(settings, params)
    return ready if banks is None else ready._replace(ts=ts), name, steps[FLOW]


def _trained_folder(path: Path, name: str, best: bool) -> Path | None:
    """Return the folder of a network's checkpoints, of a classifier the best; ``None`` where it is not trained."""
    if name == FLOW:
        return workdir.network_folder(path)
    folder = workdir.stage_folder(path, stage_name(name))
    folder = folder / "best" if best else folder
    return folder if checkpoint.latest_step(folder / "checkpoints") is not None else None


def stored_bank(path: Path, flow: Params) -> tuple[Params, np.ndarray] | None:
    """Return the marginals of a run folder as the kernel drift takes them, with their times.

    Args:
        path: the run folder.
        flow: the averaged parameters of the flow that they must belong to.

    Returns:
        Arrays by name and times ``[steps]``; ``None`` where the marginals are incomplete or of another flow.
    """
    folders = [workdir.stage_folder(path, "marginals") / direction for direction in ("forward", "backward")]
    if not all(folder.is_dir() for folder in folders):
        return None
    try:
        expect = {"flow": checkpoint.digest(flow)}
        forward, backward = (correction.read_marginals(folder, expect=expect) for folder in folders)
        return bank(forward, backward), forward.ts
    except (FileNotFoundError, Unfinished, ValueError) as error:
        records.tell(folders[0].parent, f"has no marginals of this flow ({error})", "not used")
        return None
        return None
