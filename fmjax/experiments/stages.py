"""Stages of a run: each is checked before the first one works, and read where it is complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fmjax import checks, correction
from fmjax.experiments import assemble, marginals, workdir
from fmjax.experiments.settings import Settings
from fmjax.experiments.specs import refusal
from fmjax.experiments.workdir import WorkdirError
from fmjax.metrics import classifier
from fmjax.storage import checkpoint, files
from fmjax.training import hooks, logs, loop, sharding
from fmjax.types import Params

HELD_OUT = 5  # one of so many marginal examples is kept from a classifier, to measure it and to stop early


class Result(NamedTuple):
    """What a stage gives.

    Attributes:
        value: the result: parameters, marginals, samples.
        digest: of its numbers, for the stages that need it.
        summary: one line for a person.
    """

    value: Any
    digest: str
    summary: str


class Stage(NamedTuple):
    """One part of a run.

    Attributes:
        name: unique in the run, such as ``"correctors.score"``.
        needs: names of the stages whose results it takes.
        fields: the config fields that its numbers depend on, by dotted name.
        check: refuses, before any stage works, what this one would refuse.
        run: ``run(results, folder) -> Result``: does the work, or what is left of it.
        read: ``read(results, folder) -> Result | None``: the complete result, if there is one.
        data: what samplers must know of the data that the stage trains on.
        derived: whether it is computed again where the results that it needs have changed; a training is not.
    """

    name: str
    needs: tuple[str, ...]
    fields: Mapping[str, Any]
    check: Callable[[], None]
    run: Callable[[dict[str, Result], Path], Result]
    read: Callable[[dict[str, Result], Path], Result | None]
    data: Mapping[str, Any] | None = None
    derived: bool = False

    def digest(self, results: Mapping[str, Result]) -> str:
        """Return the digest of what the stage depends on: its fields and the results that it needs."""
        what = [self.name, workdir.plain(self.fields), [results[name].digest for name in self.needs]]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def complete(self, results: dict[str, Result], path: Path) -> Result | None:
        """Return the complete result in a run folder, if there is one; refuse one that was made from other results."""
        if not self.derived:
            workdir.check_needs(path, self.name, {name: results[name].digest for name in self.needs})
        sharding.barrier(f"before {self.name}")  # no process reads what another one already writes
        result = self.read(results, workdir.stage_folder(path, self.name))
        sharding.barrier(f"at {self.name}")
        return result

    def work(self, results: dict[str, Result], path: Path) -> Result:
        """Do the work of the stage, or what is left of it, in a run folder."""
        needs = {} if self.derived else {name: results[name].digest for name in self.needs}
        return self.run(results, workdir.begin_stage(path, self.name, self.fields, self.data, needs))


def check(stages: Sequence[Stage], name: str | None = None) -> None:
    """Check stages before anything is written.

    Args:
        stages: all stages of the run.
        name: check this stage alone.

    Raises:
        ValueError: no such stage, or what a stage would refuse while it works.
    """
    by_name = {stage.name: stage for stage in stages}
    if name is not None and name not in by_name:
        near = checks.nearest(name, by_name)
        raise refusal("stage", name, f"this config has no such stage{near}", f"It has {', '.join(by_name)}")
    for stage in stages if name is None else [by_name[name]]:
        stage.check()


def run(stages: Sequence[Stage], path: Path) -> dict[str, Result]:
    """Run the stages in order; a complete one is read. Print a line a stage. ``check`` them first.

    Args:
        stages: in an order in which each comes after the stages that it needs.
        path: the run folder.

    Returns:
        The results by stage.
    """
    results: dict[str, Result] = {}
    for i, stage in enumerate(stages, 1):
        with logs.stage(f"[{i}/{len(stages)}] {stage.name}") as tell:
            results[stage.name] = stage.complete(results, path) or stage.work(results, path)
            tell(results[stage.name].summary)
    return results


def run_one(stages: Sequence[Stage], name: str, path: Path) -> Result:
    """Run one stage; the stages that it needs are read and must be complete.

    Args:
        stages: all stages of the run.
        name: the stage.
        path: the run folder.

    Returns:
        The result.

    Raises:
        WorkdirError: a stage that it needs is not complete.
    """
    by_name = {stage.name: stage for stage in stages}
    results = read(stages, by_name[name].needs, path)
    return by_name[name].complete(results, path) or by_name[name].work(results, path)


def read(stages: Sequence[Stage], names: Iterable[str], path: Path) -> dict[str, Result]:
    """Read complete stages and the stages that they need.

    Args:
        stages: all stages of the run.
        names: the stages that are wanted.
        path: the run folder.

    Returns:
        Their results.

    Raises:
        WorkdirError: a stage that is not complete, with the command that completes it.
    """
    by_name = {stage.name: stage for stage in stages}
    results: dict[str, Result] = {}

    def visit(name: str) -> None:
        if name in results:
            return
        for need in by_name[name].needs:
            visit(need)
        result = by_name[name].complete(results, path)
        if result is None:
            raise WorkdirError(
                f"workdir={path}: its stage {name!r} is not complete. Complete it by launch.train --stage={name} "
                f"--workdir={path}."
            )
        results[name] = result

    for name in names:
        visit(name)
    return results


def trained(
    plan: loop.Plan,
    fields: Mapping[str, Any],
    *,
    needs: Sequence[str] = (),
    start: Callable[[dict[str, Result]], Params | None] = lambda results: None,
    teacher: Callable[[dict[str, Result]], Params | None] = lambda results: None,
    pictures: int = 0,
    picture: Callable[[Params], Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Stage:
    """Return the stage that trains a plan on batches that do not depend on other stages.

    Args:
        plan: the training, which was checked when it was assembled.
        fields: the config fields that it depends on.
        needs: the stages whose results ``start`` and ``teacher`` take.
        start: parameters to begin with, by default drawn.
        teacher: parameters of a frozen target.
        pictures: a picture of samples every so many steps; 0 draws none.
        picture: draws the samples of a picture; by default from N(0, I).
        data: what samplers must know of the data.

    Returns:
        The stage; its value is the averaged parameters.
    """

    def work(results: dict[str, Result], folder: Path) -> Result:
        given = {"params": start(results), "teacher": teacher(results)}
        watchers = [hooks.draw_samples(plan, folder, every=pictures, draw=picture)] if pictures else []
        return finished(loop.train(plan, folder, hooks=watchers, **given).ema, plan, folder)

    def complete(results: dict[str, Result], folder: Path) -> Result | None:
        return read_trained(plan, folder, {"params": start(results), "teacher": teacher(results)})

    return Stage(plan.name, tuple(needs), fields, lambda: None, work, complete, data)


def corrector(
    settings: Settings,
    name: str,
    plan: loop.Plan,
    recipe: marginals.Recipe,
    *,
    needs: Sequence[str] = ("flow", "marginals"),
) -> Stage:
    """Return the stage that trains a corrector on pairs of marginals.

    The averaged parameters of a classifier are the best of its training by the held-out cross-entropy; its held-out
    area under the curve, one a time, is part of the result.

    Args:
        settings: the config.
        name: the corrector.
        plan: its training, with batches of the right shapes.
        recipe: how the marginals are built, for the checks.
        needs: the stages of the flow and of its marginals.

    Returns:
        The stage; its value is ``(averaged parameters, areas or None)``.
    """
    classifies = is_classifier(plan)

    def on_pairs(forward: correction.Marginals, backward: correction.Marginals) -> loop.Plan:
        part = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        rows = held_out(forward, backward) if classifies else None
        pairs = correction.marginal_pairs(
            forward, backward, batch_size=plan.data.batch_size, seed=plan.seed, examples=rows, **part
        )
        return plan.replace(batch=pairs)

    def check() -> None:
        try:
            on_pairs(*recipe.stand_ins())
        except ValueError as error:
            raise refusal(
                "forward_examples", settings.marginals.forward_examples, f"{name!r} cannot train on these ({error})",
                "Give as many as there are training examples",
            ) from error  # fmt: skip

    def frozen(results: dict[str, Result]) -> Params | None:
        return results[needs[0]].value if plan.target == "frozen" else None

    def areas(results: dict[str, Result], params: Params):
        forward, backward = results[needs[1]].value
        stop = held_out(forward, backward).stop
        conds = (jax.tree.map(lambda a: a[stop:], m.cond) for m in (backward, forward))
        x, cond = (
            (backward.x[stop:], forward.x[stop:]),
            dict(zip(("positive_cond", "negative_cond"), conds, strict=True)),
        )
        return classifier.by_step(plan.model.net, params, *x, forward.ts, **cond)

    def work(results: dict[str, Result], folder: Path) -> Result:
        ready = on_pairs(*results[needs[1]].value)
        if not classifies:
            params = loop.train(ready, folder, teacher=frozen(results)).ema
            return finished((params, None), plan, folder)
        keep = hooks.keep_best(folder / "best", lambda ema: float(areas(results, ema).bce.mean()))
        loop.train(ready, folder, teacher=frozen(results), hooks=[keep])
        params = loop.load_average(plan, folder / "best", name)
        return finished((params, areas(results, params).auc), plan, folder)

    def complete(results: dict[str, Result], folder: Path) -> Result | None:
        if read_trained(plan, folder, {"teacher": frozen(results)}) is None:
            return None
        params = loop.load_average(plan, folder / "best" if classifies else folder, name)
        return finished((params, areas(results, params).auc if classifies else None), plan, folder)

    fields = assemble.stage_fields(settings, f"correctors.{name}")
    return Stage(f"correctors.{name}", tuple(needs), fields, check, work, complete)


def marginal_sets(recipe: marginals.Recipe, *, needs: Sequence[str] = ("flow",)) -> Stage:
    """Return the stage that builds the forward and backward marginals of the flow.

    Args:
        recipe: how they are built.
        needs: the stage of the flow.

    Returns:
        The stage; its value is ``(forward, backward)``.
    """

    def work(results: dict[str, Result], folder: Path) -> Result:
        return report(recipe.build(results[needs[0]].value, folder))

    def complete(results: dict[str, Result], folder: Path) -> Result | None:
        found = recipe.read(results[needs[0]].value, folder)
        return found and report(found)

    def report(found) -> Result:
        forward, backward = found
        digest = recipe.digest(found)
        summary = f"{len(forward.x)} forward, {len(backward.x)} backward on {len(recipe.ts)} times"
        return Result(found, digest, summary)

    return Stage("marginals", tuple(needs), recipe.fields, recipe.check, work, complete)


def held_out(forward, backward) -> slice:
    """Return the rows of two marginals that a classifier trains on; the rest measures it."""
    cut = lambda m: -(len(m.x) // HELD_OUT)
    return slice(None, max(cut(forward), cut(backward)))


def part_of_process(batch: Callable[[int], Any], size: int) -> Callable[[int], Any]:
    """Return this process's rows of batches that every process draws whole.

    Args:
        batch: whole batches by the step.
        size: their number of rows.
    """
    rows = size // jax.process_count()
    part = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    return lambda step: jax.tree.map(lambda a: a[part], batch(step))


def is_classifier(plan: loop.Plan) -> bool:
    """Return whether a corrector is a classifier: its network gives a logit."""
    return bool(getattr(plan.model.net, "logit", False))


def finished(value: Any, plan: loop.Plan, folder: Path) -> Result:
    """Return the result of a training."""
    params = value[0] if isinstance(value, tuple) and not hasattr(value, "_fields") else value
    records = files.read_jsonl(folder / "metrics.jsonl")
    loss = f", loss {records[-1]['loss']:.4f}" if records else ""
    return Result(value, checkpoint.digest(params), f"{plan.schedule.steps} steps of {plan.data.batch_size}{loss}")


def read_trained(plan: loop.Plan, folder: Path, given: Mapping[str, Params | None]) -> Result | None:
    """Return the result of a training that has reached its last step.

    Args:
        plan: the training.
        folder: its folder.
        given: parameters that it began with and of its teacher, which must be those of now.

    Returns:
        The result, or ``None`` where steps are left.

    Raises:
        WorkdirError: the training began with other parameters or another teacher.
    """
    step = checkpoint.latest_step(folder / "checkpoints")
    if step is None or step < plan.schedule.steps:
        return None
    _, params, metadata = checkpoint.restore(folder / "checkpoints", part="ema", fallback=True)
    recorded = metadata.get("given", {})
    for what, value in given.items():
        if value is not None and recorded.get(what) not in (None, checkpoint.digest(value)):
            raise WorkdirError(
                f"workdir={folder}: {plan.name!r} was trained with another flow ({what}). Delete this folder to train "
                "it again, or take another --workdir."
            )
    return finished(loop.merge_parameters(plan, params, plan.name), plan, folder)


def curves(path: Path, names: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the loss curves ``(step, loss)`` of the stages that have records, for the report."""
    found = {}
    for name in names:
        records = files.read_jsonl(workdir.stage_folder(path, name) / "metrics.jsonl")
        if records:
            label = name.rpartition(".")[2].replace("_", " ")
            found[label] = tuple(np.array([r[key] for r in records]) for key in ("step", "loss"))
    return found


def sizes(params: Mapping[str, Params]) -> str:
    """Return how many parameters each network has, in words."""
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    return ", ".join(f"{name} {count(tree):,}" for name, tree in params.items())
