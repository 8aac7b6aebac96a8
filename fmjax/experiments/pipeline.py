"""The whole road, resumable: flow, marginals, correctors, flow map, samples, comparison and report.

Everything is checked before the first step of the first stage. A stage that is complete is read, not run again;
the last two are where ``corrections`` changed.
"""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import correction
from fmjax.data import arrays
from fmjax.experiments import assemble, evaluate, report, specs, workdir
from fmjax.experiments import marginals as marginal_sets
from fmjax.experiments.evaluate import Models, Setting
from fmjax.metrics import classifier, features, two_sample
from fmjax.sampling import grids
from fmjax.storage import checkpoint, files
from fmjax.training import hooks, logs, loop
from fmjax.types import Batch

ROWS = 8  # trajectories shown
HELD_OUT = 5  # one of so many examples of each set is kept from a classifier, to say how well it tells them apart
NOTES = [
    *evaluate.NOTES,
    "An RK4 step costs 4 NFE, a step of the flow map 1, a score's correction 1, a classifier's 2 (forward and "
    "backward), a kernel drift 0, a restart what its steps cost; a correction is judged by paired differences.",
    "Backward marginals q_n start at the training images and follow the flow back in time; forward marginals p_n start "
    "at noise. For a perfect flow both are one law.",
]


class Setup(NamedTuple):
    """All that the stages need, checked."""

    data: arrays.Splits
    flow: loop.Plan
    correctors: dict[str, loop.Plan]
    flow_map: loop.Plan
    settings: list[Setting]
    ts: np.ndarray


def setup(cfg) -> Setup:
    """Assembles and checks every stage of a config; raises ``ValueError`` of one sentence."""
    missing = [name for name in ("solver_steps", "correctors", "flow_map", "corrections") if name not in cfg]
    if missing:
        raise ValueError(f"this config trains a flow alone (it has no {missing[0]}); start it by launch.train")
    if cfg.classes:
        raise ValueError(f"classes={cfg.classes}: the pipeline has no labels; train and evaluate with launch.train")
    data = specs.data(cfg.data)
    ts = grids.uniform_grid(cfg.solver_steps)
    marginal_sets.check(cfg)
    s = cfg.sampling
    evaluate.check_sampling(s, data)
    if cfg.init or cfg.teacher:
        raise ValueError("the pipeline trains its own flow: leave init and teacher empty, or use launch.train")
    flow = assemble.assemble(cfg, "flow", data=data)
    marginal_sets.view_of(flow.method, cfg.solver)
    plain = {solver: s[solver] for solver in ("euler", "rk4", evaluate.FLOW_MAP)}
    trained = {}
    for name, part in cfg.correctors.items():
        x = np.resize(data.train_x, (part.batch_size, *data.train_x.shape[1:]))
        marginal = Batch(x1=x, x0=x, t=np.resize(ts, part.batch_size))
        trained[name] = assemble.assemble(cfg, f"correctors.{name}", batch=lambda step, marginal=marginal: marginal)
    return Setup(
        data,
        flow,
        trained,
        assemble.assemble(cfg, "flow_map", data=data),
        evaluate.settings(
            plain, cfg.corrections.to_dict(), {name: 1 + classifies(plan) for name, plan in trained.items()}
        ),
        ts,
    )


def main(cfg, path: str | Path) -> None:
    """Runs what is left of the road of a config in the workdir ``path``; prints a line a stage.

    Raises as ``run.fit`` and ``correction.build_marginals`` do; ``ValueError`` on several processes: start one.
    """
    if jax.process_count() > 1:
        raise ValueError("the pipeline runs in one process (on all its devices); train on several with launch.train")
    ready = setup(cfg)
    path = workdir.open_workdir(path, cfg.to_dict(), free=(*assemble.free(cfg), "corrections"))
    page, wanted = path / "report.html", [s._asdict() for s in ready.settings]
    if page.exists() and _samplers(path) == json.loads(json.dumps(wanted)):
        print(f"the run in {path} is complete: open {page}")
        return
    if page.exists() and (path / "metrics.json").exists():
        print(f"the table of the run in {path} is of other corrections: it is made anew, on the same networks")
    began = time.perf_counter()

    with _stage(1, "flow") as tell:
        plan = ready.flow
        pictures = [hooks.pictures(plan, path / "flow", every=cfg.sample_every)]
        flow = loop.train(plan, path / "flow", hooks=pictures).ema
        tell(f"{plan.steps} steps of {plan.batch_size}, {_last_loss(path / 'flow')}")

    with _stage(2, "marginals") as tell:
        forward, backward = _marginals(cfg, ready, path / "marginals", flow)
        start, how = jnp.asarray(ready.data.train_x[:256]), {"solver": cfg.solver, "backward_map": cfg.backward_map}
        view = marginal_sets.view_of(plan.method, cfg.solver)
        round_trip = correction.round_trip(view, flow, start, ready.ts, **how)
        counts = f"{len(forward.x)} forward, {len(backward.x)} backward"
        tell(f"{counts} on {len(ready.ts)} times, round trip {round_trip:.1e}")

    with _stage(3, "correctors") as tell:
        trained, told_apart = {}, {}
        for name, plan in ready.correctors.items():
            trained[name], told_apart[name] = _corrector(plan, path / "correctors" / name, forward, backward, flow)
        tell("; ".join(f"{name} {_last_loss(path / 'correctors' / name)}" for name in trained))

    with _stage(4, "flow map") as tell:
        plan = ready.flow_map
        start = loop.grafted(plan, flow)
        flow_map = loop.train(plan, path / "flow_map", params=start, teacher=_teacher(plan, start)).ema
        tell(f"{plan.steps} steps of {plan.batch_size}, {_last_loss(path / 'flow_map')}")

    with _stage(5, "samples") as tell:
        params = {"flow": flow, "flow_map": flow_map, **trained}
        if any(setting.by == "drift" for setting in ready.settings):
            params["drift"] = {"p": jnp.asarray(forward.x), "q": jnp.asarray(backward.x)}
        models = _models(ready, params)
        drawn = _draw(cfg, ready.settings, models, path / "samples")
        tell(f"{len(drawn)} samplers x {cfg.sampling.seeds} seeds x {cfg.sampling.samples}")

    with _stage(6, "comparison") as tell:
        found = _compare(cfg, ready.data, drawn, forward, backward)
        found |= {"round_trip": round_trip, "auc": {name: a for name, a in told_apart.items() if a is not None}}
        seconds = time.perf_counter() - began
        report.write(page, _contents(cfg, path, ready, models, drawn, forward, backward, found, seconds))
        told = {"samplers": wanted, "environment": workdir.environment()}
        # last: it says that the page is of these samplers
        files.write_json(path / "metrics.json", _as_json(found) | told)
        tell(report.count_line(found["verdicts"]))
    for sentence in [*_summary(found), *_verdicts(found)]:
        print(f"      {sentence}")
    print(f"done in {seconds:.0f} s: open {page}")


def read_models(ready: Setup, path: Path) -> Models:
    """The networks of a run that is at its end, without the banks of a drift; ``ValueError`` where it is not."""
    if not (path / "metrics.json").exists():
        raise ValueError(f"the run in {path} is not at its end: start it again by launch.pipeline")
    params = {"flow": loop.given(ready.flow, path / "flow"), "flow_map": loop.given(ready.flow_map, path / "flow_map")}
    for name, plan in ready.correctors.items():
        params[name] = loop.given(plan, path / "correctors" / name / ("best" if classifies(plan) else ""))
    return _models(ready, params)


def _models(ready: Setup, params: dict[str, Any]) -> Models:
    fixes = {name: plan.method for name, plan in ready.correctors.items()}
    shape = ready.data.train_x.shape[1:]
    return Models(ready.flow.method, ready.flow_map.method, fixes, params, shape, ts=ready.ts)


def _samplers(path: Path) -> list | None:
    """The samplers that the table of a run compares."""
    file = path / "metrics.json"
    return json.loads(file.read_text()).get("samplers") if file.exists() else None


def _stage(i: int, name: str):
    return logs.stage(f"[{i}/6] {name}")


def classifies(plan: loop.Plan) -> bool:
    """Whether a corrector is a classifier."""
    return getattr(plan.model.net, "logit", False)


def _corrector(plan: loop.Plan, directory: Path, forward, backward, flow):
    """The averaged parameters of a corrector, and of a classifier its AUC on held-out examples, one a time.

    Those of a classifier are the best of its training by the held-out cross-entropy.
    """
    if not classifies(plan):
        plan = plan._replace(
            batch=correction.marginal_pairs(forward, backward, batch_size=plan.batch_size, seed=plan.seed)
        )
        return loop.train(plan, directory, teacher=_teacher(plan, flow)).ema, None
    cut = lambda m: -(len(m.x) // HELD_OUT)
    rows = slice(None, max(cut(forward), cut(backward)))
    draws = correction.marginal_pairs(forward, backward, batch_size=plan.batch_size, seed=plan.seed, examples=rows)
    apart = lambda params: classifier.by_step(
        plan.model.net, params, backward.x[rows.stop :], forward.x[rows.stop :], forward.ts
    )
    hook = hooks.keep(directory / "best", lambda ema: float(apart(ema).bce.mean()))
    loop.train(plan._replace(batch=draws), directory, teacher=_teacher(plan, flow), hooks=[hook])
    params = loop.given(plan, directory / "best")
    return params, apart(params).auc


def _teacher(plan: loop.Plan, flow):
    return flow if plan.target == "frozen" else None


def _last_loss(directory: Path) -> str:
    return f"loss {files.read_jsonl(directory / 'metrics.jsonl')[-1]['loss']:.4f}"


def _marginals(cfg, ready: Setup, directory: Path, flow):
    """The forward and backward sets of the flow, built or read."""
    view, digest = marginal_sets.view_of(ready.flow.method, cfg.solver), checkpoint.digest(flow)
    sets = []
    for direction, how in marginal_sets.recipe(cfg, ready.flow, ready.data.train_x).items():
        folder = directory / direction
        make = functools.partial(correction.build_marginals, view, flow, ready.ts, directory=folder, flow=digest, **how)
        marginal_sets.with_bar(make, direction)
        sets.append(correction.read_marginals(folder, expect={"flow": digest, "ts": ready.ts}))
    return sets


def _draw(cfg, settings: list[Setting], models: Models, directory: Path) -> dict[Setting, np.ndarray]:
    s, identity = cfg.sampling, checkpoint.digest(models.params)
    drawn = {}
    with logs.bar("samples", len(settings), unit="sampler") as progress:
        for setting in settings:
            drawn[setting] = evaluate.draw(
                setting, models, seeds=s.seeds, samples=s.samples, seed=cfg.seed, directory=directory, identity=identity
            )
            progress.update()
    return drawn


def _compare(cfg, data: arrays.Splits, drawn, forward, backward) -> dict[str, Any]:
    """Distances of all samples to the held-out images, and of p_n to q_n along the grid."""
    s, held_out = cfg.sampling, data.test_x
    metrics, net = evaluate.distances(data)
    floor = evaluate.training_samples(data, seeds=s.seeds, samples=s.samples, seed=cfg.seed)
    rows, verdicts = evaluate.compare(drawn, metrics, floor)

    p = forward.x.reshape(s.seeds, s.samples, *forward.x.shape[1:])
    rest = lambda i, n: np.delete(p[:, :, n], i, 0).reshape(-1, *p.shape[3:])
    pairs = {"p_n and q_n": lambda i, n: backward.x[:, n]} | (
        {"floor: p_n and more of p_n": rest} if s.seeds > 1 else {}
    )
    gaps = {}
    for name, other in pairs.items():
        each = [[two_sample.sliced_w2(p[i, :, n], other(i, n)) for i in range(s.seeds)] for n in range(len(forward.ts))]
        mean, se = zip(*map(two_sample.mean_se, each), strict=True)
        gaps[name] = (forward.ts, np.array(mean), np.nan_to_num(np.array(se)))
    spread = lambda x: float(x.reshape(len(x), -1).var(0).sum())
    variance = {"held-out images": spread(held_out)} | {
        s.name: spread(x.reshape(-1, *x.shape[2:])) for s, x in drawn.items()
    }
    return {
        "rows": rows, "verdicts": verdicts, "gaps": gaps, "variance": variance,
        "straightness": correction.straightness_defect(backward),
        "accuracy": features.accuracy(net, held_out, data.test_y), "features": net.weights,
    }  # fmt: skip


def _as_json(found: dict[str, Any]) -> dict[str, Any]:
    gaps = {name: dict(zip(("t", "distance", "se"), gap, strict=True)) for name, gap in found["gaps"].items()}
    named = {name: [x._asdict() for x in found[name]] for name in ("rows", "verdicts")}
    return found | named | {"gaps": gaps}


def _summary(found: dict[str, Any]) -> list[str]:
    """What a reader should know first: the best sampler of each distance beside its floor, and how corrections did."""
    return [*evaluate.best(found["rows"]), report.count_line(found["verdicts"])]


def _verdicts(found: dict[str, Any]) -> list[str]:
    """What each correction did, a line each; the page has the same in a section of its own."""
    sentences = []
    for row in found["rows"]:
        words = [f"{report.verdict_words(v)} ({v.verdict})" for v in found["verdicts"] if v.name == row.name]
        if words:
            sentences.append(f"{row.name}: {'; '.join(words)}.")
    return sentences


def _contents(cfg, path, ready, models, drawn, forward, backward, found, seconds) -> report.Contents:
    data, keys = ready.data, evaluate.keys_of(cfg.seed, 0, ROWS)
    n = evaluate.SHOWN
    grids = {"held-out images": data.test_x[:n]} | {s.name: x[0, :n] for s, x in drawn.items()}
    jumps = max((s for s in drawn if s.solver == evaluate.FLOW_MAP and not s.at), key=lambda s: s.steps)
    trajectories = {
        "forward: from noise along the flow": forward.x[:ROWS].swapaxes(0, 1),
        "backward: from training images along the flow (noise at the left)": backward.x[:ROWS].swapaxes(0, 1),
        jumps.name: np.asarray(evaluate.sampler(jumps, models, trajectory=True)(models.params, keys)),
    }
    curves = {}
    for stage in ("flow", *(f"correctors/{name}" for name in ready.correctors), "flow_map"):
        records = files.read_jsonl(path / stage / "metrics.jsonl")
        curves[stage.rpartition("/")[2].replace("_", " ")] = tuple(
            np.array([r[name] for r in records]) for name in ("step", "loss")
        )
    networks = {name: p for name, p in models.params.items() if name != "drift"}  # which has examples, no parameters
    sizes = {name: sum(a.size for a in jax.tree.leaves(p)) for name, p in networks.items()}
    facts = {
        "data": f"{len(data.train_x)} training, {len(data.test_x)} held-out images",
        "samples": f"{cfg.sampling.seeds} seeds of {cfg.sampling.samples}",
        "parameters": ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        "round trip": f"{found['round_trip']:.2e} (rms norm over an example, {cfg.solver}, {cfg.solver_steps} steps)",
        "straightness defect": ", ".join(f"{x:.3g}" for x in found["straightness"]) + " along the grid",
        **{
            f"AUC of the {name} on held-out marginals": ", ".join(f"{a:.3f}" for a in auc) + " along the grid"
            for name, auc in found["auc"].items()
        },
        "summed variance of the pixels": "; ".join(f"{name}: {x:.3g}" for name, x in found["variance"].items()),
        "classifier of FD-small": f"held-out accuracy {found['accuracy']:.3f}, weights {found['features'][:12]}",
        "time of this process": f"{seconds:.0f} s",
        "environment": json.dumps(workdir.environment(), indent=1),
        "config": json.dumps(cfg.to_dict(), indent=1, default=list),
    }
    return report.Contents(
        f"fmjax: {cfg.data.name}", _summary(found), found["rows"], found["verdicts"], grids, trajectories, curves,
        found["gaps"], facts, NOTES,
    )  # fmt: skip
