"""Build the marginals of a flow: forward from the source (p_n) and backward from data (q_n), on a solver's grid."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fmjax import correction
from fmjax.checks import Refusal
from fmjax.correction import trajectories
from fmjax.data import Dataset
from fmjax.experiments import assemble, build, drawing, records, samplers, workdir
from fmjax.experiments.settings import Settings
from fmjax.experiments.workdir import WorkdirError
from fmjax.keys import example_keys, from_seed, normal
from fmjax.storage import checkpoint, files
from fmjax.storage.shards import Unfinished
from fmjax.training import logs, loop
from fmjax.types import Params

DIRECTIONS = ("forward", "backward")
BATCH = 512
MEASURED = 256  # examples for the round-trip error and the straightness


class Recipe(NamedTuple):
    """The settings from which the marginals of a flow are built.

    Attributes:
        view: the velocity or the flow map as a function of the parameters.
        ts: time grid.
        options: arguments of ``correction.build_marginals`` by direction.
        fields: the config fields that the sets depend on, by dotted name.
        measured: training examples and their conditions, for the round trip.
    """

    view: Callable
    ts: np.ndarray
    options: Mapping[str, Mapping[str, Any]]
    fields: Mapping[str, Any]
    measured: tuple[Any, Any]

    def check(self) -> None:
        """Refuse a solver or a backward map that cannot work."""
        for direction, options in self.options.items():
            trajectories.check_options(direction, options["solver"], options.get("backward_map", "reverse"))

    def build(self, flow: Params, folder: Path, *, directions: Iterable[str] = DIRECTIONS, **stored: Any):
        """Build what is missing of the marginals and return a set per direction, by default ``(forward, backward)``."""
        digest = checkpoint.digest(flow)
        for direction in directions:
            make = functools.partial(
                correction.build_marginals, self.view, flow, self.ts, directory=folder / direction, flow=digest,
                **self.options[direction], **stored,
            )  # fmt: skip
            with_bar(make, direction)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"marginals {folder}")
        expect = {"flow": digest} if stored.get("steps") else {"flow": digest, "ts": self.ts}
        return tuple(correction.read_marginals(folder / direction, expect=expect) for direction in directions)

    def read(self, flow: Params, folder: Path):
        """Return ``(forward, backward)``; ``None`` where a set is incomplete or belongs to another flow."""
        if not all((folder / direction).is_dir() for direction in DIRECTIONS):
            return None
        digest = checkpoint.digest(flow)
        try:
            return tuple(correction.read_marginals(folder / d, expect=self.manifest(digest, d)) for d in DIRECTIONS)
        except (FileNotFoundError, Unfinished) as error:
            records.tell(folder, str(error), "built again")
            return None
        except ValueError as error:
            raise WorkdirError(f"{error}. Delete {folder} to build the marginals again.") from None

    def manifest(self, flow: str, direction: str) -> dict[str, Any]:
        """Return the fields of the manifest of a set that tell it from others, but for digests of the data."""
        options = self.options[direction]
        named = {
            name: options[name] for name in ("direction", "solver", "seed", "count", "backward_map") if name in options
        }
        if "data" in options:
            named["count"] = len(options["data"])
        return {**named, "flow": flow, "ts": self.ts, "steps": range(len(self.ts)), "dtype": "float32"}

    def size(self) -> int:
        """Return the bytes of all sets on disk."""
        counts = (o["count"] if "count" in o else len(o["data"]) for o in self.options.values())
        return 4 * sum(counts) * len(self.ts) * int(np.prod(self.measured[0].shape[1:]))

    def stand_ins(self) -> tuple[correction.Marginals, correction.Marginals]:
        """Return marginals of zeros with the numbers of examples and the conditions of the sets, for checks."""
        manifest = types.SimpleNamespace(ts=(), steps=tuple(range(len(self.ts))), flow="", solver="", shape=(), cond=())

        def zeros(options: Mapping[str, Any]) -> correction.Marginals:
            count = options["count"] if "count" in options else len(options["data"])
            x = np.broadcast_to(np.float32(0), (count, len(self.ts), 1))
            return correction.Marginals(x, self.ts, manifest, options["cond"])

        return zeros(self.options["forward"]), zeros(self.options["backward"])

    def digest(self, pair) -> str:
        """Return the digest of ``(forward, backward)``."""
        return hashlib.sha256(repr([m.manifest for m in pair]).encode()).hexdigest()

    def round_trip(self, flow: Params) -> float:
        """Return the round-trip error of training examples: backward, then forward, compared with the examples."""
        x, cond = self.measured
        way = {name: self.options["backward"][name] for name in ("solver", "backward_map")}
        return float(correction.round_trip(self.view, flow, jnp.asarray(x), self.ts, cond=cond, **way))


def recipe(settings: Settings, plan: loop.Plan, data: Dataset) -> Recipe:
    """Return the settings from which the marginals of a config's flow are built.

    Backward marginals start at the training data, with ``flip`` also at mirrored images; forward marginals start at
    the source, with the conditions of training examples where the flow is conditional.

    Args:
        settings: the config.
        plan: the flow's plan.
        data: the data set.

    Returns:
        The recipe.

    Raises:
        ValueError: a solver for which the method of the flow has no view.
    """
    sets, common = settings.marginals, settings.common
    view = "flow_map" if sets.solver == samplers.FLOW_MAP else "velocity"
    if getattr(plan.method, view) is None:
        raise Refusal(
            "solver", sets.solver, f"the flow's method has no {view.replace('_', ' ')}", "Take another solver"
        )
    x, cond = data.train.x, assemble.conditions(common, data)
    local = sum(d.process_index == jax.process_index() for d in plan.mesh.devices.flat)
    shared = {"solver": sets.solver, "mesh": plan.mesh, "batch": max(1, BATCH // local) * local}
    take = lambda index: jax.tree.map(lambda a: np.asarray(a)[index], cond)
    forward = {
        "direction": "forward", "count": sets.forward_examples, "shape": x.shape[1:], "seed": common.seed,
        "cond": cond if cond is None else take(np.arange(sets.forward_examples) % len(x)),
    }  # fmt: skip
    along = build.path(common.path)
    alpha = drawing.source_scale(along)
    if not common.normal_source:
        keys = example_keys(from_seed(common.seed), jnp.arange(sets.forward_examples))
        x0 = np.asarray(common.origin.training.examples(keys, x.shape[1:]))
        forward = {"direction": "forward", "data": np.float32(alpha) * x0, "cond": forward["cond"]}
    elif alpha != 1:
        forward["start"] = functools.partial(_scaled_noise, alpha=alpha)
    both = lambda a: np.concatenate([a, a])
    backward = {
        "direction": "backward",
        "data": np.concatenate([x, x[:, :, ::-1]]) if common.flip else x,
        "cond": jax.tree.map(both, cond) if common.flip else cond,
        "backward_map": sets.backward_map,
    }
    named = {name: getattr(sets, name) for name in ("solver", "solver_steps", "backward_map", "forward_examples")}
    fields = named | {"guidance": common.guidance, "seed": common.seed, "flip": common.flip} | common.source_field()
    return Recipe(
        getattr(plan.method, view),
        samplers.time_grid(None, sets.solver_steps, along),
        {"forward": forward | shared, "backward": backward | shared},
        fields,
        (x[:MEASURED], take(slice(MEASURED))),
    )


def _scaled_noise(keys, shape: tuple[int, ...], *, alpha: float):
    """Return ``alpha`` times standard normal noise ``[B, *shape]``: the source of a path with ``alpha_0 = alpha``."""
    return alpha * normal(keys, shape)


@workdir.owner
def main(
    settings: Settings,
    path: Path,
    *,
    direction: str = "both",
    out: str | Path | None = None,
    keep: Iterable[int] | None = None,
    dtype: str = "float32",
    tol: float = 1e-4,
) -> None:
    """Build the marginals of the averaged flow in a run folder, and print cost, round-trip error and straightness.

    A killed build continues where it stopped. Each of several processes builds a part.

    Args:
        settings: the config.
        path: the run folder.
        direction: ``"forward"``, ``"backward"`` or ``"both"``.
        out: folder of the marginals; by default ``path/marginals``.
        keep: indices of the grid to store; by default all.
        dtype: dtype of the stored numbers.
        tol: largest residual of an inverse step.

    Raises:
        ValueError: a config whose marginals cannot be built.
        WorkdirError: no flow in the folder.
    """
    data = build.data(settings.common.data)
    plan = assemble.flow_plan(settings, data)
    plans = recipe(settings, plan, data)
    plans.check()
    folder = workdir.network_folder(path)
    stages = {samplers.FLOW: assemble.flow_fields(settings)} | ({} if out is not None else {"marginals": plans.fields})
    workdir.open_workdir(path, settings.config, stages)
    step, flow, _ = checkpoint.restore(folder / "checkpoints", part="ema", fallback=True)
    flow = loop.merge_parameters(plan, flow)
    directions = DIRECTIONS if direction == "both" else (direction,)
    stored = {"steps": None if keep is None else tuple(keep), "dtype": dtype}
    needs = {samplers.FLOW: checkpoint.digest(flow)}
    if out is None:
        out = workdir.begin_stage(path, "marginals", plans.fields, needs=needs)
    else:
        out = files.local_path("out", out)
    first = jax.process_index() == 0
    for name in directions:
        estimate = correction.estimate_cost(plans.view, flow, plans.ts, **_build_sizes(plans.options[name]), **stored)
        if first:
            print(f"{name}: {_sentence(estimate)}, into {out / name}", flush=True)
    plans.build(flow, out, directions=directions, tol=tol, **stored)
    if first:
        x, cond = plans.measured
        way = {name: plans.options["backward"][name] for name in ("solver", "backward_map")}
        down = jax.jit(
            lambda params, x: trajectories.carry(
                plans.view(params), x, plans.ts, direction="backward", cond=cond, **way
            )[0]
        )
        states = np.moveaxis(np.asarray(down(flow, jnp.asarray(x))), 0, 1)
        defect = trajectories.chord_distance(states, plans.ts)
        print(f"flow of step {step}, {len(x)} training examples: round-trip error {plans.round_trip(flow):.2e}")
        print(f"straightness defect {', '.join(f'{s:.3g}' for s in defect)} along the grid")


def _build_sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``build_marginals`` in the form that ``estimate_cost`` takes."""
    options = dict(options)
    if "data" in options:
        options |= {"count": len(options["data"]), "shape": options["data"].shape[1:]}
    return {name: value for name, value in options.items() if name not in ("data", "seed", "start")}


def _sentence(estimate) -> str:
    """Return the estimated cost of a build in words."""
    unit, scale = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if estimate.bytes >= s or u == "kB")
    words = f"{estimate.count} examples, at most {estimate.bytes / scale:.3g} {unit}"
    if estimate.nfe is None:
        return f"{words}, evaluations not known for this solver"
    seconds = f"{estimate.seconds:.2g}" if estimate.seconds < 100 else f"{estimate.seconds:.0f}"
    return f"{words}, {estimate.nfe} NFE each ({estimate.evaluations:.3g} evaluations), about {seconds} s"


def with_bar(build_set: Callable[..., Any], direction: str) -> Any:
    """Build a set under a progress bar of examples.

    Args:
        build_set: ``build_set(progress=...)``; ``progress(done, total)`` is called during the build.
        direction: ``"forward"`` or ``"backward"``, for the label of the bar.

    Returns:
        The result of ``build_set``.
    """
    with logs.bar(f"{direction} marginals", 0, unit="example") as bar:

        def tick(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return build_set(progress=tick)
