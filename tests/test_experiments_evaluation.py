"""``launch.evaluate``: the samplers of a run folder, their costs and distances, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from laboratory import WHOLE, numbers, read, refused, run, whole_run
from laboratory import laboratory as laboratory  # a fixture

import fmjax
from fmjax.experiments import comparison, drawing, evaluate, samplers, train, workdir
from fmjax.metrics import Metric

pytestmark = pytest.mark.usefixtures("laboratory")
LABELS = {
    "data": {"name": "eight_gaussians", "train": 240, "validation": 80, "test": 120, "labels": True},
    "conditional": True, "label_dropout": 0.2, "net": {"name": "mlp", "width": 8, "depth": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(laboratory, tmp_path_factory):
    path = tmp_path_factory.mktemp("copy") / "w"
    shutil.copytree(whole_run(tmp_path_factory), path)
    evaluate.main(read(**WHOLE), path)
    return path


def test_a_pipeline_s_folder_gives_the_pipeline_s_numbers(finished):
    """The same networks, keys and samplers: the same table."""
    ours, theirs = (
        {r["name"]: r["distances"] for r in numbers(finished, name)["rows"]}
        for name in ("evaluation.json", "metrics.json")
    )
    assert ours.keys() == theirs.keys()
    for name, distances in theirs.items():
        np.testing.assert_allclose([*ours[name].values()], [*distances.values()], rtol=1e-6)
    assert (finished / "evaluation.html").exists()


def test_a_second_evaluation_draws_nothing(finished, monkeypatch):
    monkeypatch.setattr(drawing, "in_chunks", None)  # a draw would fail
    before = numbers(finished, "evaluation.json")
    evaluate.main(read(**WHOLE), finished)
    assert numbers(finished, "evaluation.json") == before


def test_damaged_samples_are_drawn_again_and_that_is_said(finished, capsys):
    before = numbers(finished, "evaluation.json")
    file = next((finished / "draws").rglob("0.npy"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    evaluate.main(read(**WHOLE), finished)
    assert "drawn again" in capsys.readouterr().out
    assert numbers(finished, "evaluation.json") == before


def test_samples_are_the_same_by_every_way(finished, tmp_path):
    """Sample i of seed 0: by the object with any n, by the command, and in the draws of the evaluation."""
    trained = fmjax.load(finished)
    alone = trained.sample(3, solver="euler", steps=2, first=5)
    many = trained.sample(9, solver="euler", steps=2)
    np.testing.assert_array_equal(alone, many[5:8])
    drawn = next((finished / "draws").glob("euler--2-steps-*/0.npy"))
    np.testing.assert_allclose(np.load(drawn)[:9], many, atol=1e-6)
    out = tmp_path / "x.npz"
    run("sample", f"--workdir={finished}", "--count=9", f"--out={out}", "--solver=euler", "--solver_steps=2")
    with np.load(out) as stored:
        np.testing.assert_array_equal(stored["x"], many)


def test_a_flow_alone_leaves_out_what_is_not_trained(laboratory, tmp_path, capsys):
    settings = read(**WHOLE)
    train.main(settings, tmp_path)
    evaluate.main(settings, tmp_path)
    said = capsys.readouterr().out
    names = [r["name"] for r in numbers(tmp_path, "evaluation.json")["rows"]]
    assert "euler, 2 steps" in names and not [n for n in names if "flow map" in n or "score" in n]
    assert "left out" in said


def test_labels_and_guidance_are_conditions_of_the_samples(laboratory, tmp_path):
    settings = read(**LABELS)
    train.main(settings, tmp_path)
    evaluate.main(settings, tmp_path)
    evaluate.main(read(**LABELS, guidance=2.0), tmp_path)
    rows = {r["name"]: r["nfe"] for r in json.loads((tmp_path / "evaluation.json").read_text())["rows"]}
    assert rows["euler, 2 steps"] == 4 and rows["rk4, 2 steps"] == 16  # a guided evaluation is two
    trained = fmjax.load(tmp_path)
    three, four = (trained.sample(4, label=label, solver="euler", steps=2) for label in (3, 4))
    assert np.abs(three - four).max() > 0
    for changes, line in (({"label": 8}, "label=8"), ({"label": -1}, "label=-1")):
        with pytest.raises(ValueError, match=f"^{line}"):
            trained.sample(2, **changes)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("samplers.euler=(0,)", "samplers.euler"),
        ("sampling.samples=241", "sampling.samples=241"),
        ("sampling.samples=1", "sampling.samples=1"),
        ("sampling.seeds=0", "sampling.seeds=0"),
        ("metrics=('sliced',)", "metrics='sliced'"),
        ("seed=1", "workdir="),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(override, line, finished):
    assert refused("evaluate", f"--workdir={finished}", f"--config.{override}").startswith(line)


def test_stochastic_steps_need_the_independent_coupling():
    settings = read(samplers={"euler_maruyama": (4,)}, coupling="minibatch_ot")
    with pytest.raises(ValueError, match="^samplers.euler_maruyama.*coupling"):
        comparison.read_samplers(settings, flow_map=False)
    comparison.read_samplers(read(samplers={"euler_maruyama": (4,)}), flow_map=False)


def test_no_flow_is_said(tmp_path):
    with pytest.raises(workdir.WorkdirError, match="no checkpoint"):
        evaluate.main(read(), tmp_path / "w")


def test_rows_and_judgements_are_of_paired_runs():
    """Two runs, one distance: means, standard errors, and the judgement of a correction against its baseline."""
    plain = samplers.Sampler("plain", "f", "euler", 2)
    fixed = samplers.Sampler("fixed", "f + corrections", "euler", 2, at=(2,), by="noise", baseline="plain")
    runs = lambda *means: np.stack([np.full((3, 1), m) for m in means])
    mean = Metric("mean", lambda x: float(x.mean()), {})
    costs, floor = dict.fromkeys(("plain", "fixed"), fmjax.sampling.cost(1, 2)), runs(1.0, 1.0, 1.0)
    drawn = {"plain": runs(3.0, 5.0, 4.0), "fixed": runs(2.0, 4.1, 2.9)}
    rows, (verdict,) = comparison.compare([plain, fixed], drawn, costs, [mean], floor)
    assert rows[0].distances["mean"] == pytest.approx((4.0, 1 / np.sqrt(3)))
    assert rows[-1].name == "training data" and rows[-1].distances["mean"] == (1.0, 0.0)
    assert verdict.difference == pytest.approx(-1.0) and verdict.verdict == "helps"
    drawn["fixed"][1, 0] = np.nan
    rows, (verdict,) = comparison.compare([plain, fixed], drawn, costs, [mean], floor)
    assert np.isinf(rows[1].distances["mean"][0]) and verdict.verdict == "no difference seen"
