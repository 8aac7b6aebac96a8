"""Measures by configs: every name reaches its factory with options and extractors; what means nothing is refused."""

import json
import os

import numpy as np
import pytest
from laboratory import read

from fmjax import metrics
from fmjax.data import Examples, dataset
from fmjax.experiments import build, comparison, effects, measuring, pipeline, specs
from fmjax.experiments.samplers import Sampler
from fmjax.metrics import Metric, extractors

EULER, RK4 = Sampler("euler, 2 steps", "euler", "euler", 2, None), Sampler("rk4, 2 steps", "rk4", "rk4", 2, None)
TEACHER = {"name": "paired_error_to", "teacher": "rk4, 2 steps"}
OWN = """
import numpy as np
from fmjax.metrics import Features

def radius(data, *, power: float = 1.0):
    norm = lambda x: np.linalg.norm(np.asarray(x).reshape(len(x), -1), axis=1)[:, None] ** power
    return Features(norm, None, None, f"power {power}", "radius")
"""


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    return dataset(*[Examples(rng.standard_normal((n, 2)).astype(np.float32)) for n in (240, 150, 150)])


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py:radius"


def test_every_measure_is_offered_and_takes_its_options_from_a_config(points):
    names = {n for n in metrics.__all__ if n.endswith("_to")}
    assert set(specs.offers(specs.METRIC)) == names and len(names) == 22
    special = {"fd_small_to", "fd_random_to", "autocorrelation_to", "inception_score_to"}
    for name in names - special:
        teacher = {"teacher": "rk4, 2 steps"} if "teacher" in specs.options_of(getattr(metrics, name)) else {}
        size = {"size": 100, "subsets": 2} if name == "kid_to" else {"steps": 4} if name == "c2st_to" else {}
        metric = build.metric({"name": name, **teacher, **size}, points, points.test)
        x = [np.asarray(points.train.x, np.float64)] * (2 if metric.teacher else 1)
        assert np.isfinite(metric.distance(*x)) and metric.least <= 240


@pytest.mark.parametrize("name", ["frechet_to", "mind_to", "memorised_to", "teacher_frechet_to", "kid_to"])
def test_an_extractor_is_a_spec(name, points, own):
    more = {"teacher": "t"} if name.startswith("teacher") else {"size": 100} if name == "kid_to" else {}
    label = lambda features: build.metric({"name": name, "features": features, **more}, points, points.test).name
    assert label("raw").count("[raw") == 1 and label({"name": "random_network", "seed": 3}).count("[random") == 1
    assert label(own).count("[radius") == 1 and label({"name": own, "power": 2.0}).count("[radius") == 1
    for spec, message in (
        ("random_netwrok", r"^metrics\.features='random_netwrok': .*random_network"),
        ({"name": "random_network", "sede": 3}, r"^metrics\.features\.sede=3: .*seed"),
        ({"name": "random_network", "seed": -1}, r"^metrics\.features\.seed=-1: "),
        ("inception", "^metrics.features: inception needs the option 'weights'"),
        ({"name": "inception", "weights": "x.pth"}, r"^kind='points': "),
        (own.replace("radius", "radios"), r"^metrics\.features=.*'radius'"),
    ):
        with pytest.raises(ValueError, match=message):
            label(spec)


def test_the_options_of_an_own_extractor_reach_it(points, own):
    metric = build.metric({"name": "frechet_to", "features": {"name": own, "power": 2.0}}, points, points.test)
    squared = lambda x: (np.asarray(x) ** 2).sum(1)[:, None]
    x = points.validation.x
    assert metric.distance(x) == pytest.approx(metrics.frechet(squared(x), squared(points.test.x)), rel=1e-5)


def test_fewer_samples_than_a_measure_needs_are_refused_before_any_work(points):
    named = read(**{"metrics": ("sliced_w2_to", {"name": "precision_to"}), "sampling.samples": 99})
    with pytest.raises(ValueError, match=r"^sampling\.samples=99: 1 - precision\[random\] .* 100 samples"):
        comparison.distances(named, points, points.test)
    enough = read(**{"metrics": ("sliced_w2_to", {"name": "precision_to"}), "sampling.samples": 100})
    assert len(comparison.distances(enough, points, points.test)) == 2
    images = dataset(*[Examples(np.random.default_rng(0).uniform(-1, 1, (60, 8, 8, 1)))] * 3)
    count = lambda n: [m.name for m in comparison.distances(read(**{"sampling.samples": n}), images, images.test)]
    assert count(33) == ["FD-random", *count(32)] and count(32) == ["sliced W2", "energy distance"]


def test_a_teacher_is_a_sampler_of_the_comparison(points):
    settings = read(metrics=(TEACHER,))
    assert comparison.distances(settings, points, points.test, names=[EULER, RK4])[0].teacher == "rk4, 2 steps"
    for names, message in (([EULER], "There are euler, 2 steps"), ([], "There are none")):
        with pytest.raises(ValueError, match=f"^metrics.teacher='rk4, 2 steps': .*{message}"):
            comparison.distances(settings, points, points.test, names=names)


def test_paired_measures_compare_the_same_run_and_others_the_data():
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((2, 50, 2))
    drawn = {"rk4, 2 steps": teacher, "euler, 2 steps": teacher + np.array([0.1, 0.2])[:, None, None]}
    paired = Metric("error", metrics.paired_error, teacher="rk4, 2 steps")
    mean = Metric("mean", lambda x: float(x.mean()))
    values = measuring.measure(drawn["euler, 2 steps"], [paired, mean], drawn)
    assert values["error"] == pytest.approx([0.01, 0.04])
    assert values["mean"] == pytest.approx([x.mean() for x in drawn["euler, 2 steps"]])
    broken = drawn | {"rk4, 2 steps": teacher * np.array([1, np.nan])[:, None, None]}
    assert measuring.measure(teacher, [paired], broken)["error"] == [0, np.inf]


def test_the_error_of_a_single_run_is_by_the_bootstrap():
    """The mean of n numbers has the error s / sqrt n; several runs keep the error over runs."""
    x = np.random.default_rng(0).standard_normal((1, 400, 1))
    mean = Metric("mean", lambda x: float(x.mean()))
    value, error = measuring.errors(mean, x, [x.mean()], {}, resamples=400)
    assert value == x.mean() and error == pytest.approx(x.std() / 20, rel=0.15)
    assert np.isnan(measuring.errors(mean, x, [x.mean()], {}, resamples=0)[1])
    assert measuring.errors(mean, x, [1.0, 3.0], {}, resamples=400) == (2.0, 1.0)
    shift = Metric("shift", lambda x, y: float((x - y).mean()), teacher="t")
    error = measuring.errors(shift, x + 1, [1.0], {"t": x}, resamples=50)[1]
    assert error == pytest.approx(0, abs=1e-12)  # pairs stay pairs


def test_a_pipeline_writes_the_measures_of_its_config(tmp_path, own):
    named = (
        TEACHER, {"name": "frechet_to", "features": {"name": own, "power": 2.0}}, {"name": "c2st_to", "steps": 5},
        {"name": "channel_w2_to", "channel": 1}, {"name": "coverage_to", "features": "raw"}, "w2_to",
    )  # fmt: skip
    settings = read(metrics=named, sampling={"seeds": 1, "samples": 110, "bootstrap": 6})
    pipeline.main(settings, tmp_path / "run")
    rows = {r["name"]: r["distances"] for r in json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]}
    columns = ["error to rk4, 2 steps", "FD[radius]", "C2ST accuracy", "channel W2 [1]", "1 - coverage[raw]", "W2"]
    assert all(set(r) == set(columns) for r in rows.values()) and set(rows) == {EULER.name, RK4.name, "training data"}
    assert rows[RK4.name][columns[0]][0] == 0 < rows[EULER.name][columns[0]][0] < rows["training data"][columns[0]][0]
    assert all(0 < error < abs(value) + 1 for value, error in list(rows[EULER.name].values()))


def test_files_that_measures_name_are_read_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"weights")
    (tmp_path / "s.npz").write_bytes(b"statistics")
    named = {"name": "frechet_to", "features": {"name": "inception", "weights": "w.pth"}, "statistics": "s.npz"}
    (metric,) = read(metrics=(named,)).config["metrics"]
    assert metric["features"]["weights"] == os.path.join(tmp_path, "w.pth")
    assert metric["statistics"] == os.path.join(tmp_path, "s.npz") and metric["features"]["name"] == "inception"
    (kept,) = read(metrics=({**named, "statistics": "none.npz"},)).config["metrics"]
    assert kept["statistics"] == "none.npz"


def test_the_change_by_a_correction_is_against_the_plain_sampler_of_the_same_noise(points):
    x = np.asarray(points.train.x)[:100]
    end = RK4._replace(name="rk4, pushed", at=(2,), by="score", baseline="noise")
    noise = end._replace(name="noise", by="noise", baseline=RK4.name)
    drawn = {EULER.name: x[None] + 9, RK4.name: x[None], "noise": x[None] + 0.01, "rk4, pushed": x[None] + 0.5}
    changes = measuring.correction_changes([EULER, RK4, noise, end], drawn, points)
    assert set(changes) == {"noise", "rk4, pushed"}
    net = extractors.random_network(points)
    a, b, unit = (metrics.embed(net, y) for y in (x + np.float32(0.5), x, np.asarray(points.test.x)))
    expected = np.linalg.norm(a - b, axis=1) / metrics.median_distance(unit)
    np.testing.assert_allclose(changes["rk4, pushed"].distances, expected, rtol=1e-4)
    assert np.median(changes["noise"].distances) < 0.1 * np.median(expected)
    assert measuring.correction_changes([EULER, RK4], drawn, points) == {}
    broken = drawn | {"rk4, pushed": drawn["noise"] * np.nan}
    assert set(measuring.correction_changes([EULER, RK4, noise, end], broken, points)) == {"noise"}


def test_the_chart_of_changes_states_the_median_of_every_correction():
    change = metrics.feature_change(np.full((9, 1), 0.5), np.zeros((9, 1)), np.array([[0.0], [1.0], [2.0]]))
    figure = effects.change_chart({"rk4, pushed": change})
    assert figure.alt == "rk4, pushed: median 0.5." and "test examples" in figure.remark


def test_a_random_network_is_the_extractor_of_every_kind():
    for name in ("frechet_to", "frechet_infinity_to", "kid_to", "mind_to", "precision_to", "coverage_to"):
        assert specs.options_of(getattr(metrics, name))["features"] is extractors.random_network
