"""The whole road on digits, tiny: what it writes, that it resumes to the same numbers, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
from test_training_loop import config

from fmjax import correction
from fmjax.experiments import pipeline, specs
from fmjax.storage import checkpoint, files
from fmjax.training import loop

TINY = {
    "batch_size": 16, "flow_map.batch_size": 32, "correctors.score.batch_size": 16, "steps": 4,
    "correctors.score.steps": 4, "correctors.classifier.batch_size": 16, "correctors.classifier.steps": 4,
    "flow_map.steps": 4, "solver_steps": 2, "sampling.seeds": 2, "sampling.samples": 64, "sampling.euler": (2,),
    "sampling.rk4": (2,), "sampling.flow_map": (1, 2),
    "corrections": {
        "end": {"solver": "rk4", "steps": 2, "at": (2,), "by": "score", "alpha": 0.5, "beta": 0.1},
        "apart": {"solver": "rk4", "steps": 2, "at": (1, 2), "by": "classifier", "alpha": 0.1},
        "drift": {"solver": "flow_map", "steps": 2, "at": (2,), "by": "drift", "alpha": 0.5, "bandwidth": 1.0},
        "restart": {"solver": "flow_map", "steps": 2, "at": (1,), "by": "restart", "to": 0.25},
    },
}  # fmt: skip
STAGES = ("flow", "correctors/score", "correctors/classifier", "flow_map")


@pytest.fixture(autouse=True)
def small_cache(tmp_path_factory, monkeypatch):
    """The classifier is trained once a session, outside the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def tiny():
    return config(**TINY)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        path = tmp_path_factory.mktemp("road")
        pipeline.main(tiny, path)
    return path


def numbers(path):
    found = json.loads((path / "metrics.json").read_text())
    del found["environment"]
    return found


def test_every_stage_leaves_its_work(finished, tiny):
    for stage in STAGES:
        assert [r["step"] for r in files.read_jsonl(finished / stage / "metrics.jsonl")] == [4]
    forward, backward = (correction.read_marginals(finished / "marginals" / d) for d in ("forward", "backward"))
    assert forward.x.shape == (128, 3, 8, 8, 1) and backward.x.shape == (1257, 3, 8, 8, 1)
    np.testing.assert_array_equal(backward.x[:, -1], specs.data(tiny.data).train.x)
    assert forward.manifest.flow == backward.manifest.flow and forward.manifest.solver == "rk4"


def test_corrector_and_flow_map_are_trained_from_what_came_before(finished, tiny, tmp_path):
    """The corrector on the flow's backward marginals, the flow map from the flow's average: the same bits by hand."""
    ready = pipeline.setup(tiny)
    digest = lambda path: checkpoint.restore(path / "checkpoints", part="ema")[2]["digest"]["ema"]
    backward = correction.read_marginals(finished / "marginals" / "backward")
    forward = correction.read_marginals(finished / "marginals" / "forward")
    draws = correction.marginal_pairs(forward, backward, batch_size=16, seed=tiny.seed)
    loop.train(ready.correctors["score"].replace(batch=draws), tmp_path / "correctors" / "score")
    _, flow, _ = checkpoint.restore(finished / "flow" / "checkpoints", part="ema")
    loop.train(ready.flow_map, tmp_path / "flow_map", params=flow)
    for stage in ("correctors/score", "flow_map"):
        assert digest(tmp_path / stage) == digest(finished / stage)


def test_the_numbers_are_there_with_errors_floor_and_verdicts(finished):
    found = numbers(finished)
    rows = {r["name"]: r for r in found["rows"]}
    assert {n: r["nfe"] for n, r in rows.items()} == {
        "euler, 2 steps": 2, "rk4, 2 steps": 8, "flow map, 1 step": 1, "flow map, 2 steps": 2,
        "rk4, 2 steps, noise 0.1 at 2": 8, "rk4, 2 steps, score at 2": 9, "rk4, 2 steps, classifier at 1, 2": 12,
        "flow map, 2 steps, drift at 2": 2, "flow map, 2 steps, restart at 1": 3, "training data": 0,
    }  # fmt: skip
    floor = rows["training data"]["distances"]
    for name, row in rows.items():
        for metric in ("FD-small", "sliced W2", "energy distance"):
            mean, se = row["distances"][metric]
            assert se > 0 and (name == "training data" or mean > 3 * abs(floor[metric][0])), (name, metric)
    assert {v["metric"] for v in found["verdicts"]} == {"FD-small", "sliced W2", "energy distance"}
    gap, floor = found["gaps"]["p_n and q_n"], found["gaps"]["floor: p_n and more of p_n"]
    assert gap["t"] == [0.0, 0.5, 1.0]
    assert gap["distance"][-1] > 2 * floor["distance"][-1], "an untrained flow does not end at the data"
    held_out = specs.data("digits").test.x
    assert found["variance"]["held-out images"] == pytest.approx(held_out.var(0).sum(), rel=1e-5)
    assert found["variance"].keys() == rows.keys() - {"training data"} | {"held-out images"}
    assert found["accuracy"] > 0.9 and found["straightness"][0] == found["straightness"][-1] == 0.0


def test_the_page_stands_alone_and_names_every_sampler(finished):
    page = (finished / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    for row in numbers(finished)["rows"]:
        assert row["name"] in page
    for picture in (
        "held-out images",
        "forward: from noise",
        "backward: from training",
        "classifier",
        "energy distance",
    ):
        assert picture in page


def test_a_second_run_says_that_it_is_complete(finished, tiny, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    pipeline.main(tiny, finished)
    assert f"the run in {finished} is complete: open {finished / 'report.html'}" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    changed = {p.name for p in before if before[p] != after.get(p)}
    assert changed <= {"environment.json", "config.json"} and before.keys() == after.keys()


def test_other_corrections_are_compared_on_the_same_networks(finished, tiny, tmp_path, capsys):
    path = shutil.copytree(finished, tmp_path / "again")
    trained = {p: p.read_bytes() for stage in STAGES for p in (path / stage).rglob("metrics.jsonl")}
    other = tiny.copy_and_resolve_references().unlock()
    other.corrections = {"each": {**TINY["corrections"]["apart"], "alpha": (0.1, 0.3)}}
    pipeline.main(other, path)
    assert "is of other corrections: it is made anew" in capsys.readouterr().out
    old, new = ({r["name"]: r["distances"] for r in numbers(p)["rows"]} for p in (finished, path))
    assert set(new) == {name for name in old if " at " not in name} | {"rk4, 2 steps, classifier at 1, 2"}
    assert all((old[name] == new[name]) == (" at " not in name) for name in new)
    assert trained == {p: p.read_bytes() for p in trained}
    pipeline.main(other, path)
    assert "is complete" in capsys.readouterr().out
    page, write = (path / "report.html").read_text(), files.write_json
    other.corrections.each.alpha = (0.1, 0.2)
    with pytest.MonkeyPatch.context() as patch:  # killed where all but the last file is written
        patch.setattr(files, "write_json", lambda file, *a: write(file, *a) if file.name != "metrics.json" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.main(other, path)
    assert (path / "report.html").read_text() != page
    pipeline.main(other, path)
    assert "is complete" not in capsys.readouterr().out


def test_a_road_that_lost_its_end_goes_on_to_the_same_numbers(finished, tiny, tmp_path, capsys):
    """Corrector, samples and comparison are lost, and a shard is torn; flow and flow map are read, not trained."""
    parts = tmp_path / "parts"
    shutil.copytree(finished, parts)
    shutil.rmtree(parts / "correctors")
    shutil.rmtree(parts / "samples")
    (parts / "metrics.json").unlink()
    shard = next((parts / "marginals" / "backward").glob("shard*"))
    shard.write_bytes(shard.read_bytes()[:-9])
    pipeline.main(tiny, parts)
    assert numbers(parts) == numbers(finished)
    assert "[6/6]" in capsys.readouterr().out


def test_marginals_of_another_flow_are_refused(finished, tiny, tmp_path):
    parts = tmp_path / "parts"
    shutil.copytree(finished, parts)
    (parts / "metrics.json").unlink()
    shutil.rmtree(parts / "flow")
    other = loop.train(pipeline.setup(tiny).flow._replace(seed=1), parts / "flow")
    assert int(other.step) == 4
    with pytest.raises(ValueError, match="holds marginals built with different settings .flow: "):
        pipeline.main(tiny, parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correctors.score.method": {"name": "score_corector", "sigma": 0.1}}, "did you mean 'score_corrector'"),
        ({"flow_map.batch_size": 16}, "cannot be split at 0.75"),
        ({"solver_steps": 0}, "at least one step"),
        ({"sampling.samples": 10_000}, r"sampling.samples=10000 in 2..1257"),
        ({"sampling.seeds": 0}, "sampling.seeds=0 must be 1 or more"),
        ({"solver": "rk5"}, "did you mean 'rk4'"),
        ({"backward_map": "revers"}, "backward_map='revers' is not one of"),
        ({"corrections": {"x": {"solver": "rk4", "steps": 2, "at": (5,), "by": "score", "alpha": 0.5}}}, "at=5 is not"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_before_the_first(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pipeline.main(config(**TINY | changes), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_config_of_a_flow_alone_is_sent_to_the_trainer(tmp_path):
    from configs import checkerboard

    with pytest.raises(ValueError, match="trains a flow alone .* start it by launch.train"):
        pipeline.main(checkerboard.get_config(), tmp_path / "w")
    with pytest.raises(ValueError, match="classes=10: the pipeline has no labels"):
        pipeline.main(config(**TINY, classes=10), tmp_path / "w")
    with pytest.raises(ValueError, match="the pipeline trains its own flow: leave init and teacher empty"):
        pipeline.main(config(**TINY, init=str(tmp_path)), tmp_path / "w")
    assert not (tmp_path / "w").exists()
