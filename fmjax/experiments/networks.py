"""The networks of a config: their training plans, and what samplers draw with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fmjax.correction import marginals as sets
from fmjax.data import Dataset
from fmjax.experiments import assemble, build, workdir
from fmjax.experiments.drawing import Models
from fmjax.experiments.samplers import DRIFT, FLOW, FLOW_MAP, time_grid
from fmjax.experiments.settings import Settings
from fmjax.storage import checkpoint
from fmjax.training import loop
from fmjax.types import Params

Plans = Mapping[str, loop.Plan]


def plans(settings: Settings, data: Dataset) -> dict[str, loop.Plan]:
    """Return the training plans of a config by network: the flow, its flow map, and each corrector.

    Args:
        settings: the config.
        data: its data set.

    Raises:
        ValueError: one line, for anything that cannot work.
    """
    found = {FLOW: assemble.flow_plan(settings, data)}
    found |= {name: assemble.corrector_plan(settings, name, data) for name in settings.correctors}
    return found | ({FLOW_MAP: assemble.flow_map_plan(settings, data)} if settings.flow_map else {})


def stage_name(network: str) -> str:
    """Return the stage that trains a network: a corrector's is ``"correctors.NAME"``."""
    return network if network in (FLOW, FLOW_MAP) else f"correctors.{network}"


def models(settings: Settings, plans: Plans, params: Mapping[str, Params]) -> Models:
    """Return what samplers draw with.

    A flow whose own method learned a map jumps with it where no flow map is trained apart.

    Args:
        settings: the config.
        plans: the plans by network.
        params: their averaged parameters, and ``"drift"`` for the stored marginals ``p`` and ``q``.
    """
    methods, params = {name: plan.method for name, plan in plans.items()}, dict(params)
    if FLOW_MAP not in methods and methods[FLOW].flow_map is not None:
        methods[FLOW_MAP], params[FLOW_MAP] = methods[FLOW], params[FLOW]
    return Models(methods, params, plans[FLOW].shape, build.path(settings.common.path))


def shapes(settings: Settings, plans: Plans) -> Models:
    """Return what samplers draw with before anything is trained: shapes in place of parameters."""
    params = {name: jax.eval_shape(lambda plan=plan: loop.initial_parameters(plan)) for name, plan in plans.items()}
    ts = time_grid(None, settings.marginals.solver_steps)
    bank = jax.ShapeDtypeStruct((4, len(ts), *plans[FLOW].shape), np.float32)
    return models(settings, plans, params | {DRIFT: {"p": bank, "q": bank, "ts": ts}})


def bank(forward: sets.Marginals, backward: sets.Marginals) -> Params:
    """Return two marginals as the kernel drift takes them."""
    return {"p": jnp.asarray(forward.x), "q": jnp.asarray(backward.x), "ts": forward.ts}


def load(settings: Settings, plans: Plans, path: Path) -> tuple[Models, str, int]:
    """Read the networks of a run folder, as far as they are trained.

    Args:
        settings: the config.
        plans: the plans by network.
        path: the run folder; a flow's, a pipeline's or a converted one.

    Returns:
        What samplers draw with, the digest of the parameters, and the flow's step.

    Raises:
        WorkdirError: no flow is trained there.
    """
    found, step = {}, 0
    for name, plan in plans.items():
        folder = workdir.stage_folder(path, stage_name(name))
        folder = folder / "best" if (folder / "best").exists() else folder
        if name == FLOW:
            folder = workdir.network_folder(path)
            step = checkpoint.latest_step(folder / "checkpoints")
        elif checkpoint.latest_step(folder / "checkpoints") is None:
            continue
        found[name] = loop.load_average(plan, folder, name)
    ready = {name: plan for name, plan in plans.items() if name in found}
    sets_folder = workdir.stage_folder(path, "marginals")
    if all((sets_folder / direction).is_dir() for direction in ("forward", "backward")):
        try:
            found[DRIFT] = bank(*(sets.read_marginals(sets_folder / d) for d in ("forward", "backward")))
        except FileNotFoundError:
            pass  # being built
    return models(settings, ready, found), checkpoint.digest(found), step
