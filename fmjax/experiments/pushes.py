"""Fit the pushes of corrected samplers on samples of these very samplers, and keep them in the run folder.

A push at step ``n`` goes from the states of the sampler there to their target: at the end the training data, before
the backward marginals of this solver and this number of steps, or the interpolant. Pushes at several steps are fitted
one after the other, on states that the earlier ones have corrected.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import correction, paths, sampling
from fmjax.checks import Refusal
from fmjax.correction import Push, trajectories
from fmjax.data import Dataset
from fmjax.experiments import assemble, drawing, records, specs, workdir
from fmjax.experiments.drawing import Models
from fmjax.experiments.results import Result
from fmjax.experiments.samplers import FLOW, FLOW_MAP, PUSH, PUSHES, Sampler, push_key, time_grid
from fmjax.experiments.settings import Common, Settings
from fmjax.experiments.stages import Stage
from fmjax.keys import fold_in
from fmjax.storage import checkpoint, files, lock
from fmjax.training import sharding
from fmjax.types import Cond

PURPOSE = 6  # of the keys of the samples that pushes are fitted on
MOST = 60_000  # training examples in a fit
STAGE = "pushes"
RECORD = "push.json"


def fitted(names: Sequence[Sampler]) -> list[Sampler]:
    """Return the samplers that are corrected by a fitted push.

    Args:
        names: samplers.

    Returns:
        Some of them.
    """
    return [sampler for sampler in names if sampler.by in PUSHES]


def check(settings: Settings, data: Dataset, names: Sequence[Sampler]) -> None:
    """Refuse pushes that cannot be fitted, before anything is trained.

    Args:
        settings: the config.
        data: its data set.
        names: samplers; those without a push are not looked at.

    Raises:
        ValueError: a target that this solver or coupling does not give, or a push per class without classes.
    """
    for sampler in fitted(names):
        field, target = f"corrections[{sampler.name!r}]", sampler.options["target"]
        if sampler.options["per_class"] and not (settings.common.conditional and data.classes):
            raise Refusal(f"{field}.per_class", True, "the samples have no labels", "Leave it out")
        if sampler.at[0] == sampler.steps:
            continue
        if target == "interpolant" and specs.name_of(settings.flow.coupling) != "independent":
            wrong = f"under coupling={settings.flow.coupling!r} its distribution is not known"
            raise Refusal(f"{field}.target", target, wrong, "Take 'backward', or correct the end alone")
        if target == "backward" and sampler.solver != FLOW_MAP:
            try:
                sampling.diffrax_solver(sampler.solver)
            except (TypeError, ValueError):
                wrong = f"solver {specs.name_of(sampler.solver)!r} does not run backwards"
                raise Refusal(
                    f"{field}.target", target, wrong, "Correct the end alone, or take 'interpolant'"
                ) from None


def with_stand_ins(models: Models, names: Sequence[Sampler], data: Dataset) -> Models:
    """Return networks with pushes of zeros, for the checks before training.

    Args:
        models: the networks.
        names: samplers.
        data: the data set, for its labels.

    Returns:
        The networks with a push for every sampler that needs one.
    """
    pushes, zeros = {}, lambda *shape: np.zeros(shape, np.float32)
    for sampler in fitted(names):
        n, d = len(sampler.at), int(np.prod(models.shape))
        labels = np.arange(data.classes, dtype=np.int32) if sampler.options["per_class"] else None
        kinds = 1 if labels is None else len(labels)
        vector, matrix, wave = zeros(n, kinds, 1), zeros(n, kinds, 1, 1), zeros(n, 1, 1)
        facts = {"signal": vector[..., 0], "noise": zeros(n, kinds, 2), "labels": labels}
        pushes[push_key(sampler)] = Push(
            centre=zeros(n, d), basis=zeros(n, 1, d), start=vector, shift=vector, stretch=matrix,
            linear=vector,
            quadratic=matrix, amplitudes=vector, waves=wave, phases=wave[..., 0], **facts,
        )  # fmt: skip
    return add(models, pushes)


def add(models: Models, pushes: Mapping[str, Push]) -> Models:
    """Return networks with pushes.

    Args:
        models: the networks.
        pushes: pushes by ``samplers.push_key``.

    Returns:
        The networks, for the samplers of these pushes.
    """
    return models._replace(params=models.params | {PUSH: dict(pushes)}) if pushes else models


def push_identity(pushes: Mapping[str, Push], sampler: Sampler) -> str:
    """Return what the samples of a sampler depend on beside the networks: the digest of its push.

    Args:
        pushes: the pushes.
        sampler: the sampler.

    Returns:
        A digest after a space; empty for a sampler without a push.
    """
    if sampler.by not in PUSHES:
        return ""
    return f" {drawing.hash_arrays(pushes[push_key(sampler)]._replace(labels=None))}"


def push_stage(settings: Settings, data: Dataset, names: Sequence[Sampler], needs: Sequence[str], models_of) -> Stage:
    """Return the stage that fits the pushes of all samplers that need one.

    Args:
        settings: the config.
        data: its data set.
        names: the samplers.
        needs: the stages that train the networks.
        models_of: returns the networks from the results of these stages.

    Returns:
        The stage; its value is the pushes by ``samplers.push_key``.
    """
    chosen = fitted(names)

    def result(pushes: dict[str, Push]) -> Result:
        digest = hashlib.sha256("".join(push_identity(pushes, s) for s in chosen).encode()).hexdigest()
        return Result(pushes, digest, f"{len(pushes)} fitted on samples of their samplers")

    def run(results: dict[str, Result], folder: Path) -> Result:
        return result(fit_all(settings, data, chosen, models_of(results), folder))

    def read(results: dict[str, Result], folder: Path) -> Result | None:
        models, sets = models_of(results), examples(settings, data)
        pushes = {push_key(s): stored(s, models, settings, folder, sets) for s in chosen}
        return None if None in pushes.values() else result(pushes)

    fields = {"pushes": [sampler._asdict() for sampler in chosen]}
    return Stage(STAGE, tuple(needs), fields, lambda: check(settings, data, chosen), run, read, derived=True)


def fit_all(
    settings: Settings, data: Dataset, names: Sequence[Sampler], models: Models, folder: Path
) -> dict[str, Push]:
    """Fit the pushes of samplers and store them, or read the ones that a folder already holds.

    Args:
        settings: the config.
        data: its data set.
        names: samplers.
        models: the networks.
        folder: folder of the stored pushes.

    Returns:
        The pushes by ``samplers.push_key``.
    """
    pushes, sets, drawn = {}, examples(settings, data), {}
    for sampler in sorted(fitted(names), key=lambda s: (str(s.solver), s.steps, s.at)):
        if jax.process_index() == 0 and stored(sampler, models, settings, folder, sets) is None:
            lock.check_owned()
            _write(fit(sampler, models, settings, *sets, drawn=drawn), sampler, models, settings, folder, sets)
        sharding.barrier(f"push {push_key(sampler)}")
        pushes[push_key(sampler)] = stored(sampler, models, settings, folder, sets)
    return pushes


def fit(
    sampler: Sampler,
    models: Models,
    settings: Settings,
    data: np.ndarray,
    cond: Cond,
    *,
    drawn: dict[str, np.ndarray] | None = None,
) -> Push:
    """Fit the push of a sampler on states that it generates; warn where the push is mostly noise.

    Args:
        sampler: a sampler whose ``by`` is one of ``PUSHES``.
        models: the networks.
        settings: the config.
        data: training examples ``[n, ...]``.
        cond: their conditions, or ``None``.
        drawn: states of the last fit by name, which are used again where they are the same.

    Returns:
        The push at the steps ``sampler.at``.
    """
    options, seed = sampler.options, settings.common.seed
    keys = drawing.sample_keys(seed, 0, options["examples"], PURPOSE)
    take = lambda index: jax.tree.map(lambda a: np.asarray(a)[index], cond)
    drawn_cond = take(np.arange(len(keys)) % len(data))
    targets, parts, drawn = _targets(sampler, models, settings, data, cond), [], {} if drawn is None else drawn
    for i, n in enumerate(sampler.at):
        before = sampler._replace(at=sampler.at[:i], options=_first(options, i))
        ready = add(models, {push_key(before): _join(parts)}) if parts else models
        program = drawing.program(before, ready, stop=n)
        name = repr((n, len(keys), before.fields() if i else (sampler.solver, sampler.steps, sampler.grid)))
        if name not in drawn:
            drawn.clear()  # one set in memory
            drawn[name] = drawing.in_chunks(lambda k, c: program(ready.params, k, c), keys, drawn_cond)  # noqa: B023
        states = drawn[name]
        labels = (drawn_cond, cond) if options["per_class"] else ()
        arguments = {"lam": options["lam"], "seed": seed, **PUSHES[sampler.by]}
        parts.append(correction.fit_push(states[:, None], targets[n][:, None], *labels, **arguments))
    return _join(parts)


def _first(options: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the options of the first corrected steps."""
    return {name: v[:count] if isinstance(v, (list, tuple)) else v for name, v in options.items()}


def _join(parts: Sequence[Push]) -> Push:
    """Return pushes at several steps as one."""
    labels = parts[0].labels
    joined = jax.tree.map(lambda *a: np.concatenate(a), *(part._replace(labels=None) for part in parts))
    return joined._replace(labels=labels)


def _targets(sampler: Sampler, models: Models, settings: Settings, data: np.ndarray, cond: Cond):
    """Return where the states should be by step: the data at the end, before it backward marginals or interpolant."""
    inner = [n for n in sampler.at if n < sampler.steps]
    targets = {sampler.steps: data}
    if not inner:
        return targets
    ts = time_grid(sampler.grid, sampler.steps, models.path)
    if sampler.options["target"] == "interpolant":
        keys = drawing.sample_keys(settings.common.seed, 1, len(data), PURPOSE)
        noise = np.asarray(models.source.examples(fold_in(keys, 0), data.shape[1:]))
        at = jax.jit(lambda x0, x1, t: paths.with_velocity(models.path, x0, x1, t)[0])
        return targets | {n: np.asarray(at(noise, data, np.full(len(data), ts[n], np.float32))) for n in inner}
    jumps = sampler.solver == FLOW_MAP
    name = FLOW_MAP if jumps else FLOW
    method, params = models.methods[name], models.params[name]
    arguments = {"direction": "backward", "solver": sampler.solver, "backward_map": "inverse" if jumps else "reverse"}

    @jax.jit
    def back(params, x, cond):
        bound = method.flow_map(params) if jumps else method.velocity(params)
        return trajectories.carry(bound, x, ts, cond, **arguments)[0][np.array(inner)].swapaxes(0, 1)

    states = drawing.in_chunks(functools.partial(back, params), data, cond)
    return targets | {n: states[:, i] for i, n in enumerate(inner)}


def examples(settings: Settings, data: Dataset) -> tuple[np.ndarray, Cond]:
    """Return the training examples of a fit and their conditions, with mirrored images where training has them.

    Args:
        settings: the config.
        data: the data set.

    Returns:
        Examples ``[n, ...]`` and conditions.
    """
    rows = np.linspace(0, data.train.count - 1, min(MOST, data.train.count)).astype(int)
    x, cond = np.asarray(data.train.x[rows], np.float32), assemble.conditions(settings.common, data)
    cond = jax.tree.map(lambda a: np.asarray(a)[rows], cond)
    if not settings.common.flip:
        return x, cond
    return np.concatenate([x, x[:, :, ::-1]]), jax.tree.map(lambda a: np.concatenate([a, a]), cond)


def _digest(sampler: Sampler, models: Models, settings: Settings) -> str:
    """Return the digest of what a push is fitted with beside the data: sampler, network, guidance, seed."""
    network = models.params[FLOW_MAP if sampler.solver == FLOW_MAP else FLOW]
    common = settings.common
    what = [sampler.fields(), checkpoint.digest(network), common.guidance, common.seed, workdir.plain(_source(common))]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=files.as_json).encode()).hexdigest()


def _source(common: Common) -> dict[str, Any]:
    """Return the source where it is not N(0, I), with the split of a data set."""
    return {} if common.normal_source else {"source": common.source}


def _folder(sampler: Sampler, digest: str, folder: Path) -> Path:
    return folder / f"{files.slug(sampler.name)}-{digest[:12]}"


def _write(push: Push, sampler: Sampler, models: Models, settings: Settings, folder: Path, sets) -> None:
    digest = _digest(sampler, models, settings)
    place = _folder(sampler, digest, folder)
    place.mkdir(parents=True, exist_ok=True)
    arrays = {name: a for name, a in push._asdict().items() if a is not None}
    digests = {name: files.write_array(place / f"{name}.npy", a, content=digest) for name, a in arrays.items()}
    facts = {"sampler": sampler.name, "examples": sampler.options["examples"], "data": drawing.hash_arrays(sets)}
    files.write_json(place / RECORD, facts | {"digest": digest, "arrays": digests})


def stored(sampler: Sampler, models: Models, settings: Settings, folder: Path, sets=None) -> Push | None:
    """Return the stored push of a sampler.

    Args:
        sampler: the sampler.
        models: the networks; a push of others is not read.
        settings: the config.
        folder: folder of the stored pushes.
        sets: training examples and conditions that the push must be fitted to; ``None`` for any.

    Returns:
        The push; ``None`` where it is missing, damaged (which is said), or of other data.
    """
    digest = _digest(sampler, models, settings)
    place = _folder(sampler, digest, folder)
    if not place.is_dir():
        return None
    try:
        record = files.read_json(place / RECORD)
        if sets is not None and record["data"] != drawing.hash_arrays(sets):
            records.tell(place, "is of other data", "fitted again")
            return None
        read = lambda name, sha: files.read_array(place / f"{name}.npy", content=digest, digest=sha)
        return Push(**{name: read(name, sha) for name, sha in record["arrays"].items()})
    except files.DamagedFile as error:
        records.tell(error.path, error.problem, "fitted again")
        return None


def push_facts(models: Models, names: Sequence[Sampler]) -> dict[str, str]:
    """Return what a report says of the pushes.

    Args:
        models: the networks with the pushes.
        names: samplers.

    Returns:
        A sentence by name of each sampler with a push.
    """
    return {s.name: _sentence(models.params[PUSH][push_key(s)], s) for s in fitted(names)}


def _sentence(push: Push, sampler: Sampler) -> str:
    """Return what a push was fitted on and how far it moves the states, in words."""
    squares = (push.signal.mean(1), push.noise[..., 0].mean(1), push.noise[..., 1].mean(1))
    lengths = zip(sampler.at, *(np.sqrt(np.maximum(a, 0)) for a in squares), strict=True)
    words = ", ".join(f"{a:.2g} at {n} (noise of the samples {b:.1g}, of the data {c:.1g})" for n, a, b, c in lengths)
    return f"fitted on {sampler.options['examples']} samples; length {words}"
