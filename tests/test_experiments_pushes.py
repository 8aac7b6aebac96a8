"""Fitted pushes of the laboratory: what they are fitted on, where they are kept, and that they correct the sampler."""

import shutil

import numpy as np
import pytest
from laboratory import JUMP, RK4, WHOLE, numbers, read, run, stamps, whole_run
from laboratory import laboratory as laboratory  # a fixture

from fmjax import correction, load, metrics
from fmjax.experiments import build, drawing, measuring, networks, pipeline, pushes, recommend, samplers
from fmjax.experiments.samplers import corrected_samplers, plain_samplers
from fmjax.storage import files
from fmjax.types import Method

pytestmark = pytest.mark.usefixtures("laboratory")
SIZE = {"examples": 600}
CORRECTIONS = {
    "end": {**RK4, "at": (2,), "by": "affine_push", **SIZE},
    "jump": {**JUMP, "at": (1, 2), "by": "push", **SIZE},
}
CONFIG = WHOLE | {"corrections": CORRECTIONS}
NAMES = ("rk4, 2 steps, affine_push at 2", "flow map, 2 steps, push at 1, 2")


@pytest.fixture(scope="module")
def finished(laboratory, tmp_path_factory):
    path = shutil.copytree(whole_run(tmp_path_factory), tmp_path_factory.mktemp("pushes") / "w")
    pipeline.main(read(**CONFIG), path)
    return path


def strip(entry):
    """A correction without its solver and steps."""
    return {k: v for k, v in entry.items() if k not in ("solver", "steps")}


def drawn(path, name):
    (folder,) = (path / "samples").glob(f"{files.slug(name)}-" + "[0-9a-f]" * 12)
    return np.stack([np.load(folder / f"{i}.npy") for i in range(2)])


def of(corrections, plain=None):
    plain = plain_samplers(plain or {"rk4": (2,), "flow_map": (2,), "euler": (2,)})
    return [s for s in corrected_samplers(corrections, plain, ["score"]) if s.by in samplers.PUSHES]


def test_a_push_repairs_the_sampler_that_it_was_fitted_on(finished):
    """An untrained flow is far from the data; its samples end at their mean and covariance."""
    rows, found = {r["name"]: r for r in numbers(finished)["rows"]}, numbers(finished)
    data = build.data(read().common.data)
    trained = load(finished)
    for name, plain, entry in zip(NAMES, ("rk4, 2 steps", "flow map, 2 steps"), CORRECTIONS.values(), strict=True):
        assert rows[name]["nfe"] == rows[plain]["nfe"]
        setting = {k: entry[k] for k in ("solver", "steps")}
        x = [trained.sample(2000, seed=1, **setting, corrections=c) for c in (None, strip(entry))]
        before, after = (metrics.frechet(y, data.train.x) for y in x)
        assert after < 0.25 * before, name
        assert found["pushes"][name]["signal"][-1][0] > 3 * found["pushes"][name]["noise"][-1][0][0]
    page = (finished / "report.html").read_text()
    assert "fitted on 600 samples" in page
    assert "Chosen on validation examples" not in page  # one correction each: nothing to choose


def test_the_fit_is_that_of_the_library_on_states_of_the_sampler(finished):
    config = read(**CONFIG)
    models, *_ = networks.load_models(config, finished)
    data = build.data(config.common.data)
    jump, end = sorted(of(CORRECTIONS), key=lambda s: s.solver)
    keys = drawing.sample_keys(0, 0, 600, pushes.PURPOSE)
    plain = end._replace(at=(), by=None, options={})
    states = np.asarray(drawing.program(plain, models)(models.params, keys))
    expected = correction.fit_push(states[:, None], data.train.x[:, None], affine=True)
    actual = pushes.stored(end, models, config, finished / "pushes")
    np.testing.assert_allclose(actual.stretch, expected.stretch, atol=1e-4)
    np.testing.assert_allclose(actual.linear, expected.linear, atol=1e-4)
    # the second push sees states that the first one has corrected
    push = pushes.stored(jump, models, config, finished / "pushes")
    x = drawing.program(jump._replace(at=(), by=None, options={}), models, stop=1)(models.params, keys)
    first = correction.sobolev_drift(jump_at(push, 0), ts=[0.5])
    y = models.methods["flow_map"].flow_map(models.params["flow_map"])(x + first(x, 0.5), 0.5, 1.0)
    again = correction.fit_push(np.asarray(y)[:, None], data.train.x[:, None])
    np.testing.assert_allclose(push.signal[1], again.signal[0], rtol=1e-3)


def jump_at(push, i):
    return correction.Push(*(None if a is None else a[i : i + 1] for a in push))


def test_a_run_an_evaluation_and_the_pipeline_draw_the_same(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "w")
    expected = {name: drawn(path, name)[0, :5] for name in NAMES}
    kept = {p: t for p, t in stamps(path).items() if p.parts[0] == "pushes"}
    run("evaluate", f"--workdir={path}")
    assert {p: t for p, t in stamps(path).items() if p.parts[0] == "pushes"} == kept
    rows, table = (
        {r["name"]: r["distances"] for r in numbers(path, n)["rows"]} for n in ("evaluation.json", "metrics.json")
    )
    assert rows.keys() == table.keys()
    trained = load(path)
    entry = strip(CORRECTIONS["end"])
    np.testing.assert_allclose(trained.sample(5, **RK4, corrections=entry), expected[NAMES[0]], atol=1e-5)
    shutil.rmtree(path / "pushes")  # fitted again, and not stored
    again = load(path).sample(5, **RK4, corrections=entry)
    np.testing.assert_allclose(again, expected[NAMES[0]], atol=1e-4)
    assert not (path / "pushes").exists()


@pytest.mark.slow
def test_a_second_run_reads_and_a_damaged_push_is_fitted_again(finished, tmp_path, capsys):
    path = shutil.copytree(finished, tmp_path / "w")
    before = stamps(path)
    pipeline.main(read(**CONFIG), path)
    changed = {str(p) for p, time in stamps(path).items() if before.get(p) != time}
    assert changed <= {"environment.json", "config.json", "samples/stage.json", "pushes/stage.json"}
    other = CORRECTIONS | {"end": CORRECTIONS["end"] | {"lam": 0.5}}  # the run's networks are kept
    pipeline.main(read(**CONFIG | {"corrections": other}), path)
    assert len(list((path / "pushes").glob("rk4*/linear.npy"))) == 2
    pipeline.main(read(**CONFIG), path)
    file = next(path / p for p in before if p.parts[0] == "pushes" and p.name == "linear.npy" and "rk4" in str(p))
    content = file.read_bytes()
    file.write_bytes(content[:-80] + b"\x00" + content[-79:])
    pipeline.main(read(**CONFIG), path)
    assert "fitted again" in capsys.readouterr().err
    assert file.read_bytes() == content


def test_a_recommendation_is_chosen_on_validation_and_reported_on_test():
    """Two corrections, one nearer to validation and one nearer to test examples: the first, with its loss on test."""
    plain = plain_samplers({"rk4": (2,), "euler": (2,)})
    names = plain + of({k: {**RK4, "at": (2,), "by": k} for k in ("push", "affine")})
    of_name = lambda by: next(s.name for s in names if s.by == by)
    values = {plain[0].name: 0.5, plain[1].name: 0.0, of_name("push"): 1.0, of_name("affine"): 0.4}
    drawn = {name: v + np.array([-0.01, 0.01]).reshape(2, 1, 1) * np.ones((2, 5, 1)) for name, v in values.items()}
    away = lambda name, target: metrics.Metric(name, lambda x: abs(float(x.mean()) - target))
    validation, test = [away("a", 0.9), away("b", 1.1)], [away("a", 0.0), away("b", 0.0)]
    values = lambda distances: measuring.measure_all(drawn, distances)
    (line,) = recommend.choices(names, values(validation), values(test))
    assert line.startswith("Chosen on validation examples among 2 corrections and controls of rk4, 2 steps: ")
    assert "rk4, 2 steps, push at 2. On test examples a is higher by 0.500" in line
    (line,) = recommend.choices(names, values([away("a", 0.5)]), values(test))
    assert line.endswith("none, use rk4, 2 steps as it is.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 100}, "corrections.x.examples=100"), ({"examples": 1e4}, "corrections.x.examples=10000.0"),
        ({"lam": -1.0}, "corrections.x.lam=-1.0"), ({"lam": "1"}, "corrections.x.lam='1'"),
        ({"alpha": 0.0}, "corrections.x.alpha=0.0"), ({"beta": -1.0}, "corrections.x.beta=-1.0"),
        ({"per_class": 1}, "corrections.x.per_class=1"), ({"target": "data"}, "corrections.x.target='data'"),
        ({"bandwidth": 1.0}, "corrections.x.bandwidth=1.0: 'push' has no such option"),
        ({"at": ()}, r"corrections.x.at=\(\)"),
    ],
)  # fmt: skip
def test_bad_pushes_are_refused_by_field_and_value(change, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        of({"x": {**RK4, "at": (2,), "by": "push", **change}})
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_a_push_that_has_no_target_is_refused_before_training(tmp_path):
    data, config = build.data(read().common.data), read(coupling="minibatch_ot")
    end = {**RK4, "at": (1,), "by": "push"}
    with pytest.raises(ValueError, match=r"target='interpolant': .*minibatch_ot"):
        pushes.check(config, data, of({"x": end | {"target": "interpolant"}}))
    with pytest.raises(ValueError, match="per_class=True"):
        pushes.check(config, data, of({"x": end | {"per_class": True}}))
    stochastic = {"solver": "ddim", "steps": 2, "at": (1,), "by": "push"}
    with pytest.raises(ValueError, match="target='backward': solver 'ddim'"):
        pushes.check(config, data, of({"x": stochastic}, {"ddim": (2,)}))
    pushes.check(config, data, of({"x": stochastic | {"at": (2,)}}, {"ddim": (2,)}))


@pytest.mark.parametrize("target", ["backward", pytest.param("interpolant", marks=pytest.mark.slow)])
def test_a_push_in_mid_path_has_its_target(target, finished):
    """On the known flow ``dx = x dt``: the data times ``e^{-1/2}`` at step 1 of 2, or the interpolant at the time."""
    config, data = read(**CONFIG), build.data(read().common.data)
    models, *_ = networks.load_models(config, finished)
    known = Method(None, velocity=lambda params: lambda x, t, cond=None: x + 0 * params)
    models = models._replace(methods={"flow": known}, params={"flow": np.zeros(())})
    (sampler,) = of({"x": {**RK4, "at": (1, 2), "by": "affine", "target": target, **SIZE}})
    push = pushes.fit(sampler, models, config, *pushes.examples(config, data))
    x = drawing.program(sampler._replace(at=(), by=None, options={}), models, stop=1)
    x = x(models.params, drawing.sample_keys(0, 0, 600, pushes.PURPOSE))
    y = np.asarray(x + correction.sobolev_drift(jump_at(push, 0), ts=[0.5])(x, 0.5))
    mean, covariance = data.train.x.mean(0), np.cov(data.train.x.T)
    if target == "interpolant":
        mean, covariance, tolerance = mean / 2, covariance / 4 + np.eye(2) / 4, 0.15
    else:
        mean, covariance, tolerance = mean * np.exp(-0.5), covariance * np.exp(-1), 0.02
    np.testing.assert_allclose(y.mean(0), mean, atol=tolerance)
    np.testing.assert_allclose(np.cov(y.T), covariance, rtol=tolerance, atol=tolerance)
