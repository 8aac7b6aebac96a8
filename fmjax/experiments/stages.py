"""The stages of a run: all stages are checked before the first stage runs, and complete stages are read."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fmjax import checks, correction
from fmjax.checks import Refusal
from fmjax.experiments import assemble, marginals, records, workdir
from fmjax.experiments.results import Result, best_average, finished, read_trained
from fmjax.experiments.settings import Settings
from fmjax.experiments.workdir import WorkdirError
from fmjax.metrics import classifier
from fmjax.storage import checkpoint, lock
from fmjax.training import hooks, logs, loop, plans, sharding
from fmjax.types import Params

COMPARING = ("pushes", "samples", "comparison")  # after the trained stages; computed again when anything changes
HELD_OUT = 5  # 1 of 5 marginal examples is held out from a classifier, for its score and for early stopping


class Stage(NamedTuple):
    """One part of a run.

    Attributes:
        name: unique in the run, such as ``"correctors.score"``.
        needs: names of the stages whose results the stage takes.
        fields: the config fields that the result depends on, by dotted name.
        check: raises for fields that cannot work; called before any stage runs.
        run: ``run(results, folder) -> Result`` does the work, or the missing part of the work.
        read: ``read(results, folder) -> Result | None`` reads a complete result.
        data: facts of the data set that samplers need, see ``networks.data_facts``.
        derived: whether the stage is computed again when the results that it needs change; a training is not.
        plan: the training, of a stage that trains.
        size: ``size() -> int``, the bytes of its files on disk.
    """

    name: str
    needs: tuple[str, ...]
    fields: Mapping[str, Any]
    check: Callable[[], None]
    run: Callable[[dict[str, Result], Path], Result]
    read: Callable[[dict[str, Result], Path], Result | None]
    data: Mapping[str, Any] | None = None
    derived: bool = False
    plan: loop.Plan | None = None
    size: Callable[[], int] = lambda: 0

    def digest(self, results: Mapping[str, Result]) -> str:
        """Return the digest of the fields and of the results that the stage depends on."""
        parts = [self.name, workdir.plain(self.fields), [results[name].digest for name in self.needs]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def complete(self, results: dict[str, Result], path: Path) -> Result | None:
        """Return the complete result in a run folder, if there is one; refuse one that was made from other results."""
        if not self.derived:
            workdir.check_needs(path, self.name, {name: results[name].digest for name in self.needs})
        sharding.barrier(f"before {self.name}")  # no process reads what another one already writes
        result = self.read(results, workdir.stage_folder(path, self.name))
        sharding.barrier(f"at {self.name}")
        if result is not None:  # its record may be lost
            self.begin(results, path)
        return result

    def work(self, results: dict[str, Result], path: Path) -> Result:
        """Do the work of the stage, or what is left of it, in a run folder."""
        result = self.run(results, self.begin(results, path))
        lock.check_owned()
        return result

    def begin(self, results: Mapping[str, Result], path: Path) -> Path:
        """Make the folder of the stage with its record; return the folder."""
        record = self.record(results)
        return workdir.begin_stage(path, self.name, record["fields"], record["data"], record["needs"])

    def record(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Return what the stage is made from: its config fields, facts of its data, and digests of what it needs."""
        needs = {} if self.derived else {name: results[name].digest for name in self.needs}
        return records.stage_record(self.name, workdir.plain(self.fields), self.data, needs)


def check_stages(stages: Sequence[Stage], name: str | None = None) -> None:
    """Check stages before anything is written.

    Args:
        stages: all stages of the run.
        name: check this stage alone.

    Raises:
        ValueError: no such stage, or what a stage would refuse while it works.
    """
    by_name = {stage.name: stage for stage in stages}
    if name is not None:
        checks.check_choice("stage", name, by_name, "stage of this config")
    for stage in stages if name is None else [by_name[name]]:
        stage.check()


def check_disk(stages: Sequence[Stage], path: Path) -> None:
    """Check that the disk has space for what the stages will write, before the first one works.

    Args:
        stages: the stages that will run.
        path: the run folder; it need not exist.

    Raises:
        WorkdirError: the disk is too small; the message names the largest stage.
    """
    place = next(folder for folder in (path, *path.parents) if folder.is_dir())
    held = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir()) if path.is_dir() else 0
    sizes = {stage.name: stage.size() for stage in stages}
    need, free = sum(sizes.values()) - held, shutil.disk_usage(place).free
    if need > free:
        largest = max(sizes, key=sizes.__getitem__)
        raise WorkdirError(
            f"workdir={path}: disk too small: {need / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free. The "
            f"largest part is {largest!r} with {sizes[largest] / 1e9:.3g} GB. Ask for less, or take another disk."
        )


def grows(stages: Sequence[Stage]) -> Callable[[str], bool]:
    """Return the function that tells whether more steps of a stage give the numbers of a longer run.

    Args:
        stages: all stages of the run.

    Returns:
        ``grows(name)``, false for a training whose loss sees its progress.
    """
    training = {stage.name: stage.plan for stage in stages}
    return lambda name: training[name] is None or not plans.uses_progress(training[name])


def run_all(stages: Sequence[Stage], path: Path) -> dict[str, Result]:
    """Run stages in order and read complete stages; print one line per stage.

    Args:
        stages: the stages; every stage comes after the stages that it needs.
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


def run_checked(
    stages: Sequence[Stage], path: Path, config: Mapping[str, Any], *, line: str = ""
) -> tuple[dict[str, Result], Path]:
    """Check all stages, open the run folder, and run the stages that are missing there.

    Args:
        stages: the stages; every stage comes after the stages that it needs.
        path: the run folder; it need not exist.
        config: the config, which the folder keeps.
        line: what is said once the checks have passed.

    Returns:
        The results by stage, and the absolute path of the folder.

    Raises:
        ValueError: one line, before the first stage works, for anything that cannot work.
        WorkdirError: a folder whose stages belong to another config, or a disk that is too small.
    """
    check_disk(stages, path)
    check_stages(stages)
    fields = {stage.name: stage.fields for stage in stages if stage.name not in COMPARING}
    path = workdir.open_workdir(path, config, fields, grows(stages))
    if line:
        logs.say(line)
    return run_all(stages, path), path


def run_one(stages: Sequence[Stage], name: str, path: Path) -> Result:
    """Run one stage; the stages that the stage needs are read and must be complete.

    Args:
        stages: all stages of the run.
        name: the stage.
        path: the run folder.

    Returns:
        The result.

    Raises:
        ValueError: no such stage.
        WorkdirError: a stage that the stage needs is not complete.
    """
    by_name = {stage.name: stage for stage in stages}
    results = _read_complete(stages, by_name[name].needs, path)
    return by_name[name].complete(results, path) or by_name[name].work(results, path)


def _read_complete(stages: Sequence[Stage], names: Iterable[str], path: Path) -> dict[str, Result]:
    """Return the results of complete stages and of the stages that they need.

    Raises:
        WorkdirError: a stage that is not complete, with the command that completes the stage.
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
        fields: the config fields that the training depends on.
        needs: the stages whose results ``start`` and ``teacher`` take.
        start: initial parameters; by default drawn at random.
        teacher: parameters of a frozen target.
        pictures: number of steps between pictures of samples; 0 draws none.
        picture: draws the samples of a picture; by default from N(0, I).
        data: facts of the data set that samplers need.

    Returns:
        The stage; its value is the averaged parameters.
    """

    def work(results: dict[str, Result], folder: Path) -> Result:
        initial = {"params": start(results), "teacher": teacher(results)}
        watchers = [hooks.draw_samples(plan, folder, every=pictures, draw=picture)] if pictures else []
        state = loop.train(plan, folder, hooks=watchers, record=stage.record(results), **initial)
        return finished(state.ema, plan, folder)

    def complete(results: dict[str, Result], folder: Path) -> Result | None:
        return read_trained(plan, folder, {"params": start(results), "teacher": teacher(results)})

    size = functools.partial(plans.checkpoint_bytes, plan)
    stage = Stage(plan.name, tuple(needs), fields, lambda: None, work, complete, data, plan=plan, size=size)
    return stage


def corrector(
    settings: Settings,
    name: str,
    plan: loop.Plan,
    recipe: marginals.Recipe,
    *,
    needs: Sequence[str] = ("flow", "marginals"),
) -> Stage:
    """Return the stage that trains a corrector on pairs of marginals.

    For a classifier, the result holds the averaged parameters with the best held-out cross-entropy of the training, and
    the held-out area under the curve (AUC) at every time.

    Args:
        settings: the config.
        name: the corrector.
        plan: the training plan, with batches of the right shapes.
        recipe: how the marginals are built, for the checks.
        needs: the stages of the flow and of its marginals.

    Returns:
        The stage; its value is ``(averaged parameters, AUC by time or None)``.
    """
    classifies = _is_classifier(plan)

    def on_pairs(forward: correction.Marginals, backward: correction.Marginals) -> loop.Plan:
        part = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        rows = _held_out(forward, backward) if classifies else None
        pairs = correction.marginal_pairs(
            forward, backward, batch_size=plan.data.batch_size, seed=plan.seed, examples=rows, **part
        )
        return plan.replace(batch=pairs)

    def check() -> None:
        try:
            on_pairs(*recipe.stand_ins())
        except ValueError as error:
            raise Refusal(
                "forward_examples", settings.marginals.forward_examples, f"{name!r} cannot train on these ({error})",
                "Give as many as there are training examples",
            ) from error  # fmt: skip

    def frozen(results: dict[str, Result]) -> Params | None:
        return results[needs[0]].value if plan.target in ("frozen", "both") else None

    def areas(results: dict[str, Result], params: Params):
        forward, backward = results[needs[1]].value
        stop = _held_out(forward, backward).stop
        conds = (jax.tree.map(lambda a: a[stop:], m.cond) for m in (backward, forward))
        cond = dict(zip(("positive_cond", "negative_cond"), conds, strict=True))
        return classifier.by_step(plan.model.net, params, backward.x[stop:], forward.x[stop:], forward.ts, **cond)

    def work(results: dict[str, Result], folder: Path) -> Result:
        ready = on_pairs(*results[needs[1]].value)
        if not classifies:
            params = loop.train(ready, folder, teacher=frozen(results), record=stage.record(results)).ema
            return finished((params, None), plan, folder)
        if (step := checkpoint.latest_step(folder / "checkpoints")) is not None and step >= plan.schedule.log_every:
            best_average(plan, folder)  # refuses a training that has lost it
        best = {"stage": f"{plan.name}.best", "run": stage.record(results)}
        keep = hooks.keep_best(folder / "best", lambda ema: float(areas(results, ema).bce.mean()), record=best)
        loop.train(ready, folder, teacher=frozen(results), hooks=[keep], record=best["run"])
        params = best_average(plan, folder)
        return finished((params, areas(results, params).auc), plan, folder)

    def complete(results: dict[str, Result], folder: Path) -> Result | None:
        last = read_trained(plan, folder, {"teacher": frozen(results)})
        if last is None or not classifies:
            return last and last._replace(value=(last.value, None))
        params = best_average(plan, folder)
        return finished((params, areas(results, params).auc), plan, folder)

    fields = assemble.stage_fields(settings, f"correctors.{name}")
    size = functools.partial(plans.checkpoint_bytes, plan)
    stage = Stage(plan.name, tuple(needs), fields, check, work, complete, plan=plan, size=size)
    return stage


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
        pair = recipe.read(results[needs[0]].value, folder)
        return pair and report(pair)

    def report(pair) -> Result:
        forward, backward = pair
        digest = recipe.digest(pair)
        summary = f"{len(forward.x)} forward, {len(backward.x)} backward on {len(recipe.ts)} times"
        return Result(pair, digest, summary)

    return Stage("marginals", tuple(needs), recipe.fields, recipe.check, work, complete, size=recipe.size)


def _held_out(forward, backward) -> slice:
    """Return the rows of two marginals that a classifier trains on; the other rows are held out."""
    cut = lambda m: -(len(m.x) // HELD_OUT)
    return slice(None, max(cut(forward), cut(backward)))


def _is_classifier(plan: loop.Plan) -> bool:
    """Return whether the network of a plan outputs one logit per example."""
    return bool(getattr(plan.model.net, "logit", False))
