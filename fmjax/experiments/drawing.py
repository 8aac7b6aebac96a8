"""Draw samples of trained networks: one implementation for all commands and for the benchmarks.

``program`` returns the jitted function of a ``Sampler``; ``stored.draw`` runs the function in chunks for every seed and
stores the samples.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import correction, paths, sampling
from fmjax.checks import Refusal
from fmjax.experiments import build, samplers, specs
from fmjax.experiments.samplers import FLOW, FLOW_MAP, Sampler, corrector_factory, push_key, time_grid
from fmjax.keys import as_keys, fold_in, from_seed
from fmjax.sampling import grids
from fmjax.sources import Source, gaussian_noise
from fmjax.types import Cond, Costed, FlowMapFn, Method, Multistep, Params, over_batch

CHUNK = 512  # examples per call of a program; no sample depends on this number


class Models(NamedTuple):
    """The trained networks that samplers use.

    Attributes:
        methods: the methods by name: ``"flow"``, perhaps ``"flow_map"``, and the correctors.
        params: their parameters by the same names; ``"drift"`` has the arguments of ``correction.kernel_drift``,
            ``"push"`` the fitted pushes by ``samplers.push_key``.
        shape: shape of one example.
        path: the flow's interpolant.
        ts: the times of the marginals in ``params["drift"]``.
        source: what samples start from.
    """

    methods: dict[str, Method]
    params: dict[str, Params]
    shape: tuple[int, ...]
    path: paths.Path
    ts: np.ndarray | None = None
    source: Source = gaussian_noise()


class Draws(NamedTuple):
    """The number of samples and their keys.

    Attributes:
        seeds: number of runs; standard errors are over runs.
        samples: samples per run.
        seed: seed of the keys.
        cond: conditions ``[samples, ...]``, the same in every run, or ``None``.
    """

    seeds: int
    samples: int
    seed: int
    cond: Cond = None


def solver_step(sampler: Sampler, models: Models, params: dict[str, Params]) -> FlowMapFn | Multistep:
    """Return the solver step of a sampler, bound to parameters.

    Args:
        sampler: the sampler.
        models: the networks.
        params: parameters by name of the network, possibly traced.

    Returns:
        The step; for ``"flow_map"`` the learned jump.
    """
    if sampler.solver == FLOW_MAP:
        return models.methods[FLOW_MAP].flow_map(params[FLOW_MAP])
    flow = models.methods[FLOW]
    score = flow.score(params[FLOW]) if flow.score else None
    if not models.source.normal and build.uses_noise(sampler.solver, models.path):
        models.source.check_normal(
            f"the solver {specs.name_of(sampler.solver)!r}", "Take 'heun', 'rk4' or 'from_diffrax'"
        )
    return build.step(sampler.solver, path=models.path, score=score)(flow.velocity(params[FLOW]))


def _corrector(sampler: Sampler, models: Models, params: dict[str, Params], options=None):
    """Return the corrector of a sampler, bound to parameters; ``None`` for a plain sampler.

    Args:
        sampler: the sampler.
        models: the networks.
        params: parameters by name of the network.
        options: replace options of the sampler; values may be traced arrays with one number per grid point.
    """
    if not sampler.at:
        return None
    options = {**sampler.options, **(options or {})}
    if sampler.by in samplers.PUSHES:
        options = {name: options[name] for name in ("alpha", "beta")}
    ts = time_grid(sampler.grid, sampler.steps, models.path)[list(sampler.at)]
    over = lambda value: grids.per_step(ts, jnp.asarray(value)) if np.ndim(value) else value
    options = {name: over(value) for name, value in options.items()}
    if sampler.by == samplers.NOISE:
        direction = Costed(lambda x, t, cond=None: jnp.zeros_like(x), 0)
    elif sampler.by == samplers.DRIFT:
        bank, bandwidth = params[samplers.DRIFT], options.pop("bandwidth")
        labels = bank.get("p_labels"), bank.get("q_labels")
        direction = correction.kernel_drift(bank["p"], bank["q"], *labels, ts=models.ts, bandwidth=bandwidth)
    elif sampler.by in samplers.PUSHES:
        direction = correction.sobolev_drift(params[samplers.PUSH][push_key(sampler)], ts=ts)
    elif sampler.by in models.methods:
        direction = models.methods[sampler.by].direction(params[sampler.by])
    else:
        return _training_free(sampler, models, params, options)
    return correction.marginal_matching(direction, **options)


def sampler_cost(sampler: Sampler, models: Models) -> sampling.Cost:
    """Return the network evaluations and corrections of one sample.

    Args:
        sampler: the sampler.
        models: the networks.

    Returns:
        The cost.
    """
    step, corrector = solver_step(sampler, models, models.params), _corrector(sampler, models, models.params)
    return sampling.cost(step, sampler.steps, sampler.at, corrector=corrector, parallel=sampler.parallel)


def program(
    sampler: Sampler, models: Models, *, trajectory: bool = False, stop: int | None = None
) -> Callable[..., jax.Array]:
    """Return ``draw(params, keys, cond=None, options=None)``, jitted, which draws one sample per key.

    Args:
        sampler: the sampler.
        models: the networks; parameters are an argument of the returned function.
        trajectory: return all states ``[steps + 1, B, ...]`` in place of the last.
        stop: return the states before step ``stop`` and its correction; by default the samples.

    Returns:
        A function of parameters by name, keys ``[B]`` and conditions ``[B, ...]`` that returns samples ``[B, ...]``.
        The start depends on the keys alone, so that samplers can be compared example by example. ``options`` replaces
        options of the corrector, so that a search over strengths compiles one program.
    """
    ts = time_grid(sampler.grid, sampler.steps, models.path)
    ts = ts if stop is None else ts[: stop + 1]

    @jax.jit
    def solve(params: dict[str, Params], keys, x0, cond, options):
        start = starts(models, keys, float(ts[0])) if x0 is None else x0
        if len(ts) == 1:
            return start
        return sampling.sample(
            solver_step(sampler, models, params),
            start,
            ts,
            key=fold_in(keys, 1),
            cond=cond,
            corrector=_corrector(sampler, models, params, options),
            at=sampler.at,
            parallel=sampler.parallel,
            trajectory=trajectory,
        )

    def draw(params: dict[str, Params], keys, cond=None, options=None):
        # N(0, I) is drawn in the program; examples of another source, perhaps of a data set, are its argument
        x0 = None if models.source.normal else starts(models, keys, float(ts[0]))
        return solve(params, keys, x0, cond, options)

    return draw


def starts(models: Models, keys, t: float = 0.0) -> jax.Array:
    """Return the states at which samples start.

    Args:
        models: the networks, with the path and the source.
        keys: one key per sample, ``[B]``.
        t: the first time of the grid.

    Returns:
        States ``[B, ...]``: ``alpha_t`` times examples of the source, plus the latent of the path.
    """
    shape = (len(keys), *models.shape)
    if isinstance(keys, jax.core.Tracer) and not models.source.normal:  # a check on shapes
        return jnp.zeros(shape, jnp.float32)
    return sampling.source_sample(models.path, fold_in(keys, 0), shape, start=float(t), source=models.source)


def source_scale(path: paths.Path, t: float = 0.0) -> float:
    """Return ``alpha_t``, the scale of the source in the interpolant.

    Args:
        path: the interpolant.
        t: a time.

    Returns:
        The scale.
    """
    with jax.ensure_compile_time_eval():
        return float(paths.one_sided(path).coefficients(np.float32(t))[0])


def check_sampler(sampler: Sampler, models: Models, *, cond: Cond = None) -> None:
    """Trace a sampler on shapes alone, so that a sampler that cannot work is refused before anything is drawn.

    Args:
        sampler: the sampler.
        models: the networks; ``params`` may hold shapes (``jax.eval_shape``) in place of arrays.
        cond: conditions ``[n, ...]``.

    Raises:
        ValueError: the sampler cannot be drawn with these networks.
    """
    if sampler.solver == FLOW_MAP and FLOW_MAP not in models.methods:
        raise Refusal("samplers.flow_map", sampler.steps, "no flow map is trained here", "Take it out")
    if sampler.by == samplers.DRIFT and samplers.DRIFT not in models.params:
        raise Refusal("by", samplers.DRIFT, "this run folder has no marginals", "Build them by launch.marginals")
    if sampler.by in samplers.PUSHES and push_key(sampler) not in models.params.get(samplers.PUSH, {}):
        raise Refusal("by", sampler.by, "it was not fitted for this sampler", "Fit it by launch.evaluate")
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *np.shape(a)[1:]), np.asarray(a).dtype), cond)
    keys = jax.eval_shape(lambda: as_keys(jax.random.key(0), 2))
    try:
        jax.eval_shape(program(sampler, models), models.params, keys, rows)
    except ValueError as error:
        raise ValueError(f"{'corrections' if sampler.at else 'samplers'}[{sampler.name!r}]: {error}") from error


def in_chunks(function: Callable[..., Any], *rows: Any, size: int = CHUNK) -> Any:
    """Apply a function to rows ``[n, ...]`` in chunks and join the results on the host.

    Args:
        function: takes a chunk of each argument; conditions and arrays have the same rows.
        *rows: pytrees of arrays ``[n, ...]``; ``None`` stays ``None``.
        size: rows per chunk.

    Returns:
        A pytree of numpy arrays ``[n, ...]``.
    """
    n = jax.tree.leaves(rows)[0].shape[0]
    parts = []
    for i in range(0, n, size):
        out = function(*jax.tree.map(lambda a, i=i: a[i : i + size], rows))
        parts.append(jax.tree.map(np.asarray, out))
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


def sample_keys(seed: int, run: int, samples: int, purpose: int = 3):
    """Return one key per sample of a run; the keys differ from the keys of training and of other purposes.

    Args:
        seed: the seed of the config.
        run: index of the run.
        samples: number of samples.
        purpose: a number that separates uses of one seed (3: samples that are reported).

    Returns:
        Keys ``[samples]``.
    """
    return as_keys(run_key(seed, run, purpose), samples)


def run_key(seed: int, run: int, purpose: int = 3):
    """Return the key of a run of samples.

    Args:
        seed: the seed of the config.
        run: index of the run.
        purpose: a number that separates uses of one seed.

    Returns:
        One key.
    """
    return jax.random.fold_in(jax.random.fold_in(from_seed(seed), purpose), run)


def first(cond: Cond, n: int) -> Cond:
    """Return the first conditions.

    Args:
        cond: a pytree of arrays ``[B, ...]``, or ``None``.
        n: number of conditions.

    Returns:
        Arrays ``[n, ...]``, or ``None``.
    """
    return jax.tree.map(lambda a: a[:n], cond)


def hash_arrays(tree: Any) -> str:
    """Return the SHA-256 digest of the arrays of a tree.

    Args:
        tree: a pytree of arrays.

    Returns:
        Hexadecimal digits; an empty string for a tree without arrays.
    """
    leaves = jax.tree.leaves(tree)
    data = hashlib.sha256()
    for leaf in leaves:
        data.update(f"{leaf.dtype}{leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes())
    return data.hexdigest() if leaves else ""


def _training_free(sampler: Sampler, models: Models, params, options: dict[str, Any]):
    """Return a training-free corrector, built from the flow alone."""
    factory = corrector_factory("corrections", sampler.by, [])
    velocity = models.methods[FLOW].velocity(params[FLOW])
    score = models.methods[FLOW].score
    names = [p.name for p in inspect.signature(factory).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needs_score = not score and bool({"score", "direction"} & set(names))
    if needs_score or "path" in specs.options_of(factory):
        models.source.check_normal(f"the corrector {specs.name_of(sampler.by)!r}", "Take a trained corrector")
    sources = {
        "step": lambda: solver_step(sampler, models, params),
        "velocity": lambda: velocity,
        "score": lambda: score(params[FLOW]) if score else correction.score_of(velocity, path=models.path),
        "direction": lambda: score(params[FLOW]) if score else correction.score_of(velocity, path=models.path),
        "log_density": lambda: _log_density(velocity, models.path, models.source),
    }
    if "path" in specs.options_of(factory):
        options["path"] = models.path
    return factory(*(sources[name]() for name in names), **options)


def _log_density(velocity, path: paths.Path, source: Source):
    """Return the log-density of the flow, ``(x, t, cond) -> [B]``, by the change of variables; one time for all."""

    def log_density(x, t, cond=None):
        ts, start = [over_batch(t, x)[0], path.span[0]], None if source.normal else source
        return sampling.log_density(velocity, x, cond, path=path, ts=ts, source=start).log_p

    return log_density
