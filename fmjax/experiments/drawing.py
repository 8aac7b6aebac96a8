"""Draw samples of trained networks: one function for ``sample``, ``evaluate``, ``pipeline``, ``tune`` and ``reflow``.

``program`` makes the jitted function of a ``Sampler``; ``draw`` runs it in chunks for every seed and keeps the samples,
each file with its digest.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fmjax import correction, paths, sampling
from fmjax.experiments import build, specs
from fmjax.experiments.samplers import DRIFT, FLOW, FLOW_MAP, NOISE, Sampler, corrector_factory, time_grid
from fmjax.experiments.specs import refusal
from fmjax.keys import as_keys, fold_in
from fmjax.sampling import grids
from fmjax.storage import files
from fmjax.types import Cond, FlowMapFn, Method, Multistep, Params

CHUNK = 512  # examples drawn at a time; no sample depends on it


class Models(NamedTuple):
    """Trained networks, as samplers draw with them.

    Attributes:
        methods: the methods by name: ``"flow"``, perhaps ``"flow_map"``, and the correctors.
        params: their parameters by the same names; ``"drift"`` has the arguments of ``correction.kernel_drift``.
        shape: shape of one example.
        path: the flow's interpolant.
        ts: the times of the marginals in ``params["drift"]``.
    """

    methods: dict[str, Method]
    params: dict[str, Params]
    shape: tuple[int, ...]
    path: paths.Path
    ts: np.ndarray | None = None


class Draws(NamedTuple):
    """How many samples are drawn, and from which keys.

    Attributes:
        seeds: number of runs, which give the errors.
        samples: samples a run.
        seed: of the keys.
        cond: conditions ``[samples, ...]``, the same in every run, or ``None``.
    """

    seeds: int
    samples: int
    seed: int
    cond: Cond = None


def step_of(sampler: Sampler, models: Models, params: dict[str, Params]) -> FlowMapFn | Multistep:
    """Return the solver step of a sampler, bound to parameters."""
    if sampler.solver == FLOW_MAP:
        return models.methods[FLOW_MAP].flow_map(params[FLOW_MAP])
    flow = models.methods[FLOW]
    score = flow.score(params[FLOW]) if flow.score else None
    return build.step(sampler.solver, path=models.path, score=score)(flow.velocity(params[FLOW]))


def corrector_of(sampler: Sampler, models: Models, params: dict[str, Params], options=None):
    """Return the corrector of a sampler, bound to parameters; ``None`` for a plain one.

    Args:
        sampler: what is drawn.
        models: the networks.
        params: their parameters.
        options: in place of the sampler's own; values may be traced arrays, one a corrected step.
    """
    if not sampler.at:
        return None
    options = dict(sampler.options if options is None else options)
    ts = time_grid(sampler.grid, sampler.steps, models.path)[list(sampler.at)]
    over = lambda value: grids.per_step(ts, jnp.asarray(value)) if np.ndim(value) else value
    options = {name: over(value) for name, value in options.items()}
    if sampler.by == NOISE:
        direction = lambda x, t, cond=None: x
    elif sampler.by == DRIFT:
        bank, bandwidth = params[DRIFT], options.pop("bandwidth")
        labels = bank.get("p_labels"), bank.get("q_labels")
        direction = correction.kernel_drift(bank["p"], bank["q"], *labels, ts=models.ts, bandwidth=bandwidth)
    elif sampler.by in models.methods:
        direction = models.methods[sampler.by].direction(params[sampler.by])
    else:
        return _training_free(sampler, models, params, options)
    return correction.marginal_matching(direction, **options)


def cost(sampler: Sampler, models: Models) -> sampling.Cost:
    """Return the network evaluations and corrections of one sample."""
    step, corrector = step_of(sampler, models, models.params), corrector_of(sampler, models, models.params)
    return sampling.cost(step, sampler.steps, sampler.at, corrector=corrector, parallel=sampler.parallel)


def program(sampler: Sampler, models: Models, *, trajectory: bool = False) -> Callable[..., jax.Array]:
    """Return ``draw(params, keys, cond=None, options=None)``, jitted, which draws one sample a key.

    Args:
        sampler: what is drawn.
        models: the networks; their parameters are an argument of the function.
        trajectory: return all states ``[steps + 1, B, ...]`` in place of the last.

    Returns:
        A function of parameters by name, keys ``[B]`` and conditions ``[B, ...]`` that returns samples ``[B, ...]``.
        The noise depends on the keys alone, so that samplers compare example by example. ``options`` replaces the
        corrector's: one program serves a search of strengths.
    """
    ts = time_grid(sampler.grid, sampler.steps, models.path)

    @jax.jit
    def draw(params: dict[str, Params], keys, cond=None, options=None):
        return sampling.sample(
            step_of(sampler, models, params),
            source(models.path, keys, models.shape, ts[0]),
            ts,
            key=fold_in(keys, 1),
            cond=cond,
            corrector=corrector_of(sampler, models, params, options),
            at=sampler.at,
            parallel=sampler.parallel,
            trajectory=trajectory,
        )

    return draw


def source(path: paths.Path, keys, shape: tuple[int, ...], t: float = 0.0) -> jax.Array:
    """Return states ``[B, ...]`` at the time ``t`` where sampling starts: ``alpha_t`` times standard normal noise."""
    return sampling.source_sample(path, fold_in(keys, 0), (len(keys), *shape), start=float(t))


def source_scale(path: paths.Path, t: float = 0.0) -> float:
    """Return ``alpha_t``, the scale of the source in the interpolant at the time ``t``."""
    with jax.ensure_compile_time_eval():
        return float(paths.one_sided(path).coefficients(np.float32(t))[0])


def check(sampler: Sampler, models: Models, *, cond: Cond = None) -> None:
    """Trace a sampler on shapes alone: what it would refuse while drawing, it refuses now.

    Args:
        sampler: what would be drawn.
        models: the networks; ``params`` may hold shapes (``jax.eval_shape``) in place of arrays.
        cond: conditions ``[n, ...]``.

    Raises:
        ValueError: the sampler cannot be drawn with these networks.
    """
    if sampler.solver == FLOW_MAP and FLOW_MAP not in models.methods:
        raise refusal("samplers.flow_map", sampler.steps, "no flow map is trained here", "Take it out")
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *np.shape(a)[1:]), np.asarray(a).dtype), cond)
    keys = jax.eval_shape(lambda: as_keys(jax.random.key(0), 2))
    try:
        jax.eval_shape(program(sampler, models), models.params, keys, rows)
    except ValueError as error:
        raise ValueError(f"{sampler.name}: {error}") from error


def draw(sampler: Sampler, models: Models, draws: Draws, *, directory: Path, identity: str) -> np.ndarray:
    """Draw the samples ``[seeds, samples, ...]`` of a sampler, or read those that ``directory`` holds.

    One file a seed, verified by its digest and drawn again where it is damaged. Of several processes each draws its
    part of the seeds; all read all.

    Args:
        sampler: what is drawn.
        models: the networks.
        draws: how many, and from which keys.
        directory: where samples are kept.
        identity: names what the numbers depend on beside the sampler: the parameters' digests.

    Returns:
        The samples, float32.
    """
    cond = jax.tree.map(np.asarray, draws.cond)
    what = [sampler.fields(), draws.samples, draws.seed, identity, hash_arrays(cond)]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=files.as_json).encode()).hexdigest()[:12]
    folder = directory / f"{files.slug(sampler.name)}-{digest}"
    run = functools.cache(lambda: program(sampler, models))
    for i in range(jax.process_index(), draws.seeds, jax.process_count()):
        if _read(folder, i) is None:
            folder.mkdir(parents=True, exist_ok=True)
            files.write_array(folder / f"{i}.npy", _of_seed(run(), models, draws, i, cond))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"samples {digest}")
    return np.stack([files.read_array(folder / f"{i}.npy") for i in range(draws.seeds)])


def in_chunks(function: Callable[..., Any], *rows: Any, size: int = CHUNK) -> Any:
    """Apply a function to rows ``[n, ...]`` in chunks and join the results on the host.

    Args:
        function: takes the same rows of each argument.
        *rows: pytrees of arrays ``[n, ...]``; ``None`` stays ``None``.
        size: rows a chunk.

    Returns:
        A pytree of numpy arrays ``[n, ...]``.
    """
    n = jax.tree.leaves(rows)[0].shape[0]
    parts = []
    for i in range(0, n, size):
        out = function(*jax.tree.map(lambda a, i=i: a[i : i + size], rows))
        parts.append(jax.tree.map(np.asarray, out))
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


def example_keys(seed: int, run: int, samples: int, purpose: int = 3):
    """Return the keys ``[samples]`` of a run of samples, apart from the keys of training and of other purposes."""
    return as_keys(run_key(seed, run, purpose), samples)


def run_key(seed: int, run: int, purpose: int = 3):
    """Return the key of a run of samples."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), run)


def first(cond: Cond, n: int) -> Cond:
    """Return the first ``n`` conditions."""
    return jax.tree.map(lambda a: a[:n], cond)


def hash_arrays(tree: Any) -> str:
    """Return a digest of the arrays of a tree; of an empty one the empty string."""
    leaves = jax.tree.leaves(tree)
    data = hashlib.sha256()
    for leaf in leaves:
        data.update(f"{leaf.dtype}{leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes())
    return data.hexdigest() if leaves else ""


def _of_seed(run, models: Models, draws: Draws, i: int, cond: Cond) -> np.ndarray:
    keys = example_keys(draws.seed, i, draws.samples)
    return in_chunks(lambda keys, cond: run(models.params, keys, cond), keys, cond)


def _read(folder: Path, i: int) -> np.ndarray | None:
    """The samples of a seed, or nothing where they are missing or damaged."""
    path = folder / f"{i}.npy"
    if not path.exists():
        return None
    try:
        return files.read_array(path)
    except files.DamagedFile as error:
        print(f"{error.path} {error.problem}: drawn again")
        return None


def _training_free(sampler: Sampler, models: Models, params, options: dict[str, Any]):
    """A corrector that is made from the flow alone."""
    factory = corrector_factory("corrections", sampler.by, [])
    velocity = models.methods[FLOW].velocity(params[FLOW])
    score = models.methods[FLOW].score
    sources = {
        "step": lambda: step_of(sampler, models, params),
        "velocity": lambda: velocity,
        "score": lambda: score(params[FLOW]) if score else correction.score_of(velocity, path=models.path),
        "direction": lambda: score(params[FLOW]) if score else correction.score_of(velocity, path=models.path),
        "log_density": lambda: _log_density(velocity),
    }
    if "path" in specs.options_of(factory):
        options["path"] = models.path
    names = [p.name for p in inspect.signature(factory).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return factory(*(sources[name]() for name in names), **options)


def _log_density(velocity):
    """The flow's own log-density at the end, by the change of variables."""
    ts = np.linspace(1.0, 0.0, 2, dtype=np.float32)
    return lambda x, t, cond=None: sampling.log_density(velocity, x, ts, cond=cond).log_p
