"""The marginal sets of a config's flow, as the command line and the pipeline build them.

``main(cfg, workdir)`` builds forward and backward marginals of the flow that ``run.fit`` trained there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fmjax import correction
from fmjax.correction import trajectories
from fmjax.correction.marginals import Estimate, View
from fmjax.experiments import assemble, specs, workdir
from fmjax.sampling import grids
from fmjax.storage import checkpoint
from fmjax.training import logs, loop
from fmjax.types import Method

DIRECTIONS = ("forward", "backward")
FIELDS = ("solver", "solver_steps", "backward_map")
BATCH = 512
MEASURED = 256  # examples that the round trip and the straightness of a set are measured on


def main(
    cfg,
    path: str | Path,
    *,
    direction: str = "both",
    out: str | Path | None = None,
    steps: Iterable[int] | None = None,
    dtype: str = "float32",
    tol: float = 1e-4,
) -> None:
    """Builds the marginals of the averaged flow in ``path`` into ``out/forward`` and ``out/backward``.

    The grid is ``cfg.solver_steps`` uniform steps of ``cfg.solver``, or jumps of the map that the run's method learned
    (``"flow_map"``); ``cfg.backward_map``, ``steps``, ``dtype`` and ``tol`` are as for ``build_marginals``.
    ``out`` is by default ``path/marginals``. Prints what it will cost, and at the end the round-trip error and the straightness
    defect of the training data. Goes on where it was killed. On several processes each builds its share.

    Raises ``ValueError`` for a config that cannot be built from, ``CheckpointError`` where no flow is, and as
    ``correction.build_marginals`` does.
    """
    directions = DIRECTIONS if direction == "both" else (direction,)
    check(cfg, *directions)
    plan = assemble.assemble(cfg, data=(data := specs.data(cfg.data)))
    view, ts = view_of(plan.method, cfg.solver), grids.uniform_grid(cfg.solver_steps)
    step, flow, metadata = checkpoint.restore(Path(path) / "checkpoints", part="ema", fallback=True)
    path = workdir.open_workdir(path, cfg.to_dict(), free=(*assemble.free(cfg), *assemble.SAMPLING))
    out = path / "marginals" if out is None else Path(out)
    given = recipe(cfg, plan, data.train_x)
    stored = {"steps": None if steps is None else tuple(steps), "dtype": dtype}
    estimates = {d: correction.estimate_cost(view, flow, ts, **sizes(given[d]), **stored) for d in directions}
    told = print if jax.process_index() == 0 else lambda *_, **__: None
    for d, estimate in estimates.items():
        told(f"{d}: {sentence(estimate)}, into {out / d}", flush=True)
    for d in directions:
        common = {"flow": metadata["digest"]["ema"], "tol": tol} | stored
        with_bar(
            functools.partial(correction.build_marginals, view, flow, ts, directory=out / d, **common, **given[d]), d
        )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"marginals {out}")
    if jax.process_index() == 0:
        how = {"solver": cfg.solver, "backward_map": cfg.backward_map}
        x = jnp.asarray(data.train_x[:MEASURED])
        error = correction.round_trip(view, flow, x, ts, **how)
        down = jax.jit(lambda params, x: trajectories.carry(view(params), x, ts, direction="backward", **how)[0])
        defect = trajectories.chord_distance(np.moveaxis(np.asarray(down(flow, x)), 0, 1), ts)
        told(f"of the flow of step {step}, on {len(x)} training examples: round-trip error {error:.2e}")
        told(f"straightness defect {', '.join(f'{s:.3g}' for s in defect)} along the grid")


def check(cfg, *directions: str) -> None:
    """``ValueError`` of one sentence for a config whose marginals cannot be built."""
    missing = [name for name in FIELDS if name not in cfg]
    if missing:
        raise ValueError(
            f"this config has no {', '.join(missing)}: give it the fields solver, solver_steps and backward_map, as "
            "configs/digits.py has them"
        )
    if cfg.classes:
        raise ValueError(f"classes={cfg.classes}: marginals have no labels; build them for a flow without classes")
    for direction in directions or DIRECTIONS:
        trajectories.check_options(direction, cfg.solver, cfg.backward_map)


def view_of(method: Method, solver: str) -> View:
    """What of a method a solver carries along: its velocity, or its flow map; ``ValueError`` where it has none."""
    name = "flow_map" if solver == trajectories.FLOW_MAP else "velocity"
    if getattr(method, name) is None:
        raise ValueError(f"solver={solver!r} needs a method with a {name.replace('_', ' ')}, which this run's has not")
    return getattr(method, name)


def recipe(cfg, plan: loop.Plan, x) -> dict[str, dict[str, Any]]:
    """Arguments of ``correction.build_marginals`` for both directions.

    Backward from the training data, with ``flip`` also mirrored; as many forward as ``cfg.sampling`` draws.
    """
    local = sum(d.process_index == jax.process_index() for d in plan.mesh.devices.flat)
    common = {"solver": cfg.solver, "mesh": plan.mesh, "batch": max(1, BATCH // local) * local}
    count = cfg.sampling.seeds * cfg.sampling.samples
    return {
        "forward": {"direction": "forward", "count": count, "shape": x.shape[1:], "seed": cfg.seed} | common,
        "backward": {"direction": "backward", "data": np.concatenate([x, x[:, :, ::-1]]) if cfg.flip else x}
        | {"backward_map": cfg.backward_map}
        | common,
    }


def sizes(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``correction.build_marginals`` as ``correction.estimate_cost`` takes them."""
    if "data" in given:
        given = given | {"count": len(given["data"]), "shape": given["data"].shape[1:]}
    return {name: value for name, value in given.items() if name not in ("data", "seed")}


def sentence(e: Estimate) -> str:
    """An estimate in words."""
    unit, scale = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if e.bytes >= s or u == "kB")
    told = f"{e.count} examples, at most {e.bytes / scale:.3g} {unit}"
    if e.nfe is None:
        return f"{told}, evaluations not known for this solver"
    seconds = f"{e.seconds:.2g}" if e.seconds < 100 else f"{e.seconds:.0f}"
    return f"{told}, {e.nfe} NFE each ({e.evaluations:.3g} evaluations), about {seconds} s"


def with_bar(build_set: Callable[..., Any], direction: str) -> Any:
    """Calls ``build_set(progress=...)`` under a progress bar of examples."""
    with logs.bar(f"{direction} marginals", 0, unit="example") as bar:

        def tick(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return build_set(progress=tick)
