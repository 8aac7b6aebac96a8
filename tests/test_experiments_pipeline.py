"""The pipeline on points: what it writes, what a second run reads, and that no interruption changes a number."""

import shutil

import numpy as np
import pytest
from laboratory import (
    CLASSIFIER,
    CORRECTIONS,
    MAP,
    RK4,
    SCORE,
    WHOLE,
    digest,
    no_checkpoint,
    numbers,
    read,
    records,
    run,
    stamps,
    whole_run,
)
from laboratory import laboratory as laboratory  # a fixture

from fmjax import correction
from fmjax.experiments import build, pipeline, workdir
from fmjax.storage import checkpoint, files
from fmjax.training import loop

pytestmark = pytest.mark.usefixtures("laboratory")
TRAINED = ("flow", "correctors/score", "correctors/classifier", "flow_map")


@pytest.fixture(scope="module")
def finished(laboratory, tmp_path_factory):
    return whole_run(tmp_path_factory)


def test_every_stage_leaves_its_work(finished):
    for stage in TRAINED:
        assert [r["step"] for r in files.read_jsonl(finished / stage / "metrics.jsonl")] == [4, 8]
    forward, backward = (correction.read_marginals(finished / "marginals" / d) for d in ("forward", "backward"))
    assert forward.x.shape == (64, 3, 2) and backward.x.shape == (240, 3, 2)
    np.testing.assert_array_equal(backward.x[:, -1], build.data(read().common.data).train.x)
    assert forward.manifest.flow == backward.manifest.flow == digest(finished / "flow")
    assert {"config.json", "environment.json", "metrics.json", "report.html"} <= {p.name for p in finished.iterdir()}
    assert not (finished / "owner.lock").exists()


def test_the_numbers_have_costs_errors_floor_and_verdicts(finished):
    found = numbers(finished)
    rows = {r["name"]: r for r in found["rows"]}
    assert {n: r["nfe"] for n, r in rows.items()} == {
        "euler, 2 steps": 2, "rk4, 2 steps": 8, "flow map, 1 step": 1, "flow map, 2 steps": 2,
        "rk4, 2 steps, noise 0.1 at 2": 8, "rk4, 2 steps, score at 2": 9, "rk4, 2 steps, classifier at 1, 2": 12,
        "flow map, 2 steps, drift at 2": 2, "flow map, 2 steps, restart at 1": 3, "training data": 0,
    }  # fmt: skip
    floor = rows["training data"]["distances"]
    assert set(floor) == {"sliced W2", "energy distance"}
    for name, row in rows.items():
        assert all(se > 0 for _, se in row["distances"].values())
        assert name == "training data" or row["distances"]["sliced W2"][0] > floor["sliced W2"][0], name
    assert {(v["name"], v["baseline"]) for v in found["verdicts"]} == {
        ("rk4, 2 steps, noise 0.1 at 2", "rk4, 2 steps"), ("rk4, 2 steps, score at 2", "rk4, 2 steps, noise 0.1 at 2"),
        ("rk4, 2 steps, classifier at 1, 2", "rk4, 2 steps"), ("flow map, 2 steps, drift at 2", "flow map, 2 steps"),
        ("flow map, 2 steps, restart at 1", "flow map, 2 steps"),
    }  # fmt: skip
    gap, floor = found["gaps"]["p_n and q_n"], found["gaps"]["floor: p_n and other samples of p_n"]
    assert gap["t"] == [0.0, 0.5, 1.0]
    assert gap["distance"][-1] > 1.5 * floor["distance"][-1], "an untrained flow does not end at the data"
    test = build.data(read().common.data).test.x
    assert found["variance"]["test data"] == pytest.approx(test.var(0).sum(), rel=1e-5)
    assert len(found["auc"]["classifier"]) == 3 and found["straightness"][0] == found["straightness"][-1] == 0.0


def test_the_page_stands_alone_and_names_every_sampler(finished):
    page = (finished / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    for row in numbers(finished)["rows"]:
        assert row["name"] in page
    for part in ("test data", "backward: from training data", "energy distance", "AUC of the classifier"):
        assert part in page


def test_a_second_run_reads_everything(finished, tmp_path, capsys):
    path = shutil.copytree(finished, tmp_path / "w")
    before = stamps(path)
    pipeline.main(read(**WHOLE), path)
    changed = {str(p) for p, time in stamps(path).items() if before.get(p) != time}
    assert changed <= {"environment.json", "config.json", "samples/stage.json"}
    assert "[7/7] comparison: complete" in capsys.readouterr().out


def test_other_corrections_are_compared_on_the_same_networks(finished, tmp_path, capsys, monkeypatch):
    path = shutil.copytree(finished, tmp_path / "again")
    before = stamps(path)
    each = {"each": {**CORRECTIONS["apart"], "alpha": (0.1, 0.3)}}
    write = files.write_json
    with monkeypatch.context() as patch:  # killed where all but the last file is written
        patch.setattr(files, "write_json", lambda file, *a: write(file, *a) if file.name != "metrics.json" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.main(read(**WHOLE | {"corrections": each}), path)
    pipeline.main(read(**WHOLE | {"corrections": each}), path)
    assert "metrics.json is of other samplers or networks: computed again" in capsys.readouterr().err
    old, new = ({r["name"]: r["distances"] for r in numbers(p)["rows"]} for p in (finished, path))
    assert set(new) == {name for name in old if " at " not in name} | {"rk4, 2 steps, classifier at 1, 2"}
    assert all((old[name] == new[name]) == (" at " not in name) for name in new)
    after = stamps(path)
    kept = [p for p in before if p.parts[0] in ("flow", "marginals", "correctors", "flow_map")]
    assert kept and all(after[p] == before[p] for p in kept)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def rebuilt(finished, tmp_path_factory):
    """A run that lost all but its flow, a shard torn: stages alone by commands, one killed, then the pipeline."""
    path = shutil.copytree(finished, tmp_path_factory.mktemp("rebuilt") / "w")
    for folder in ("correctors", "flow_map", "samples", "comparison"):
        shutil.rmtree(path / folder)
    (path / "metrics.json").unlink()
    shard = next((path / "marginals" / "backward").glob("shard*"))
    shard.write_bytes(shard.read_bytes()[:-9])
    save = checkpoint.save

    def save_until_killed(manager, step, state, **options):
        if options["metadata"]["stage"] == "correctors.score" and step == 8:
            raise Killed
        return save(manager, step, state, **options)

    run("train", f"--workdir={path}", "--stage=marginals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_until_killed)
        with pytest.raises(Killed):
            run("train", f"--workdir={path}", "--stage=correctors.score")
    assert checkpoint.latest_step(path / "correctors" / "score" / "checkpoints") == 4
    for stage in ("correctors.score", "flow_map"):
        run("train", f"--workdir={path}", f"--stage={stage}")
    return path


@pytest.mark.parametrize("stage", ["correctors/score", "flow_map"])
def test_a_stage_alone_is_what_the_pipeline_trains_to_the_bit(stage, rebuilt, finished):
    assert digest(rebuilt / stage) == digest(finished / stage)
    assert records(rebuilt / stage) == records(finished / stage)


def test_a_run_that_lost_its_end_goes_on_to_the_same_numbers(rebuilt, finished, capsys):
    before = stamps(rebuilt)
    run("pipeline", f"--workdir={rebuilt}")
    assert numbers(rebuilt) == numbers(finished)
    after = stamps(rebuilt)
    assert all(after[p] == t for p, t in before.items() if p.parts[0] in ("flow", "flow_map", "marginals"))
    assert digest(rebuilt / "correctors" / "classifier") == digest(finished / "correctors" / "classifier")


def test_a_stage_of_another_flow_is_refused_and_deleting_it_is_a_way_on(finished, tmp_path):
    """The flow is trained again from another seed behind the back of the run folder."""
    path = shutil.copytree(finished, tmp_path / "w")
    shutil.rmtree(path / "flow")
    other = read(seed=1)
    stage = pipeline.flow_stage(other, build.data(other.common.data))
    loop.train(stage.plan, workdir.begin_stage(path, "flow", pipeline.assemble.flow_fields(read()), stage.data))
    with pytest.raises(workdir.WorkdirError, match="'marginals' was made from another result of 'flow'"):
        pipeline.main(read(**WHOLE), path)
    for name in ("marginals", "correctors"):
        shutil.rmtree(path / name)
    with pytest.raises(workdir.WorkdirError, match="'flow_map' was made from another result of 'flow'"):
        pipeline.main(read(**WHOLE | {"correctors": {}, "corrections": {}}), path)
    shutil.rmtree(path / "flow_map")
    pipeline.main(read(samplers={"euler": (2,)}), path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correctors": {"score": {"method": {"name": "score_corector"}}}}, "correctors.score.method='score_corector'"),
        ({"correctors": {"score": {"method": "flow_matching"}}}, "correctors.score.method='flow_matching'"),
        ({"correctors": {"x": CLASSIFIER | {"batch_size": 0}}}, "correctors.x.batch_size=0"),
        ({"flow_map": MAP | {"method": "flow_matching"}}, "flow_map.method='flow_matching'"),
        ({"flow_map": MAP | {"batch_size": 30}}, "cannot be split at 0.75"),
        ({"solver_steps": 0}, "solver_steps=0"),
        ({"sampling.samples": 10_000}, "sampling.samples=10000: .* there are 240"),
        ({"sampling.seeds": 0}, "sampling.seeds=0"),
        ({"solver": "rk5", "correctors": {"score": SCORE}}, "solver='rk5'"),
        ({"backward_map": "revers", "correctors": {"score": SCORE}}, "backward_map='revers'"),
        ({"samplers": {"rk5": (2,)}}, "samplers.rk5='rk5'"),
        ({"samplers": {"flow_map": (2,)}}, "samplers.flow_map="),
        ({"samplers": {}}, "samplers="),
        ({"samplers": {"heun": {"steps": (2,), "grid": "edm_gird"}}}, "samplers.heun.grid='edm_gird'"),
        ({"metrics": ("sliced_w3_to",)}, "metrics='sliced_w3_to'"),
        ({"metrics": ("fd_small_to",)}, "FD-small"),
        ({"corrections": {"x": {**RK4, "at": (5,), "by": "score", "alpha": 0.5}}}, "corrections.x.at=5"),
        ({"corrections": {"x": {**RK4, "at": (2,), "by": "drift", "alpha": 0.5, "bandwidth": -1.0}}}, "bandwidth"),
        ({"corrections": {"x": {**RK4, "at": (0,), "by": "restart", "to": 0.5}}}, "restart"),
        ({"data": "eight_gausians"}, "data='eight_gausians'.*did you mean 'eight_gaussians'"),
        ({"target": "frozen"}, "target='frozen'"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_before_the_first(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        pipeline.main(read(**changes), tmp_path / "w")
    assert no_checkpoint(tmp_path) and "\n" not in str(caught.value) and len(str(caught.value)) <= 300
    assert not (tmp_path / "w").exists()
