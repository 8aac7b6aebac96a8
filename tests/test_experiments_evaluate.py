"""The folder of a pipeline is enough for every later command, and all draw the same samples."""

import json
import re
import shutil

import numpy as np
import pytest
from laboratory import RK4, WHOLE, config_file, numbers, read, refused, run, stamps, whole_run
from laboratory import laboratory as laboratory  # a fixture
from PIL import Image

from fmjax.experiments import drawing, evaluate, sample
from fmjax.experiments.run import load
from fmjax.experiments.workdir import WorkdirError
from fmjax.storage import files

pytestmark = pytest.mark.usefixtures("laboratory")
DRAWS = "euler, 2 steps"


@pytest.fixture(scope="module")
def whole(laboratory, tmp_path_factory):
    return shutil.copytree(whole_run(tmp_path_factory), tmp_path_factory.mktemp("whole") / "w")


@pytest.fixture(scope="module")
def evaluated(whole):
    run("evaluate", f"--workdir={whole}")
    return whole


@pytest.fixture(scope="module")
def trained(whole):
    return load(whole)


def drawn(path, name):
    """The samples ``[seeds, samples, ...]`` that an evaluation kept."""
    (folder,) = (path / "draws").glob(f"{files.slug(name)}-" + "[0-9a-f]" * 12)
    return np.stack([np.load(folder / f"{i}.npy") for i in range(2)])


def test_an_evaluation_of_a_pipeline_gives_the_numbers_of_its_table(evaluated):
    rows = {r["name"]: r for r in numbers(evaluated, "evaluation.json")["rows"]}
    table = {r["name"]: r for r in numbers(evaluated)["rows"]}
    assert rows.keys() == table.keys() and json.loads((evaluated / "evaluation.json").read_text())["step"] == 8
    for name, row in rows.items():
        assert (row["nfe"], row["corrections"]) == (table[name]["nfe"], table[name]["corrections"])
        for metric, (mean, se) in row["distances"].items():
            assert (mean, se) == pytest.approx(table[name]["distances"][metric], rel=1e-5)
    assert (evaluated / "evaluation.html").exists() and numbers(evaluated)["verdicts"]


def test_a_second_evaluation_draws_nothing(evaluated, monkeypatch):
    before = numbers(evaluated, "evaluation.json")
    monkeypatch.setattr(drawing, "in_chunks", None)  # a draw would fail
    run("evaluate", f"--workdir={evaluated}")
    assert numbers(evaluated, "evaluation.json") == before


def test_fields_that_no_training_depends_on_may_change(evaluated, tmp_path, capsys):
    """A drift takes the stored marginals with their own times, whatever the new number of solver steps."""
    path = shutil.copytree(evaluated, tmp_path / "w")
    name = "flow map, 2 steps, drift at 2"
    before, drift = stamps(path), drawn(path, name)
    shutil.rmtree(next((path / "draws").glob(f"{files.slug(name)}*")))
    changes = ["sampling.seeds=3", "log_every=3", "samplers.euler=(4,)", "solver_steps=5"]
    run("evaluate", f"--workdir={path}", *(f"--config.{c}" for c in changes))
    assert "euler, 4 steps" in {r["name"] for r in numbers(path, "evaluation.json")["rows"]}
    np.testing.assert_array_equal(drawn(path, name), drift)
    after = stamps(path)
    trained = ("flow", "flow_map", "correctors", "marginals")
    assert all(after[p] == t for p, t in before.items() if p.parts[0] in trained)
    assert json.loads((path / "config.json").read_text())["log_every"] == 3


@pytest.mark.parametrize("n", [1, 3, 40])
def test_sample_i_of_a_seed_is_the_same_by_every_way(n, evaluated, trained, tmp_path):
    euler = {"solver": "euler", "steps": 2}
    expected = drawn(evaluated, DRAWS)[0]
    np.testing.assert_allclose(trained.sample(n, **euler), expected[:n], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(trained.sample(2, first=n - 1, **euler)[0], expected[n - 1], rtol=1e-5, atol=1e-6)
    file = tmp_path / "x.npz"
    run("sample", f"--workdir={evaluated}", f"--count={n}", f"--out={file}", "--solver=euler", "--solver_steps=2")
    with np.load(file) as content:
        assert list(content) == ["x"]
        np.testing.assert_allclose(content["x"], expected[:n], rtol=1e-5, atol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    assert np.abs(trained.sample(n, seed=1, **euler) - expected[:n]).min() > 1e-4


@pytest.mark.parametrize("by", ["end", "apart", "drift", "restart"])
def test_a_correction_of_the_config_is_drawn_alike_by_a_run(by, evaluated, trained):
    entry = {k: v for k, v in WHOLE["corrections"][by].items() if k not in ("solver", "steps")}
    solver = "rk4" if by in ("end", "apart") else "flow_map"
    name = {
        "end": "rk4, 2 steps, score at 2", "apart": "rk4, 2 steps, classifier at 1, 2",
        "drift": "flow map, 2 steps, drift at 2", "restart": "flow map, 2 steps, restart at 1",
    }[by]  # fmt: skip
    x = trained.sample(5, solver=solver, steps=2, corrections=entry)
    np.testing.assert_allclose(x, drawn(evaluated, name)[0, :5], rtol=1e-4, atol=1e-5)


def test_noise_that_comes_with_a_correction_is_not_taken_for_it(trained):
    """In the order of the names "classifier" comes before "noise"."""
    entry = {"at": (1,), "by": "classifier", "alpha": 0.5, "beta": 0.1}
    assert trained.sampler("rk4", 2, None, entry).by == "classifier"


def test_a_command_samples_with_corrections_and_draws_a_picture(evaluated, trained, tmp_path, monkeypatch):
    text = json.dumps({"at": [2], "by": "score", "alpha": 0.5, "beta": 0.1})
    arguments = ["--count=7", f"--workdir={evaluated}", "--solver=rk4", "--solver_steps=2", f"--corrections={text}"]
    run("sample", *arguments, f"--out={tmp_path / 'x.npz'}")
    expected = drawn(evaluated, "rk4, 2 steps, score at 2")[0, :7]
    np.testing.assert_allclose(np.load(tmp_path / "x.npz")["x"], expected, rtol=1e-5, atol=1e-6)
    run("sample", f"--workdir={evaluated}", "--count=7", f"--out={tmp_path / 'x.png'}")
    assert Image.open(tmp_path / "x.png").format == "PNG"


def test_a_killed_sampling_goes_on_where_it_stopped(evaluated, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "CHUNK", 4)
    calls = []
    write = files.write_array

    def write_twice(path, array, **options):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(path, array, **options)

    arguments = [
        f"--workdir={evaluated}",
        "--count=10",
        "--solver=euler",
        "--solver_steps=2",
        f"--out={tmp_path}/x.npz",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_array", write_twice)
        with pytest.raises(SystemExit, match="130"):
            run("sample", *arguments)
        run("sample", *arguments)
    assert calls == ["0-4.npy", "4-4.npy", "8-2.npy", "8-2.npy"]
    np.testing.assert_allclose(np.load(tmp_path / "x.npz")["x"], drawn(evaluated, DRAWS)[0, :10], rtol=1e-5, atol=1e-6)


def test_the_default_sampler_is_the_flow_map_and_any_solver_can_be_named(trained):
    assert trained.sampler(None, None, None, None).name == "flow map, 4 steps"
    shifted = trained.sampler({"name": "unipc", "order": 3}, 3, {"name": "shifted_grid", "shift": 2.0}, None)
    x = trained.sample(2, solver=shifted.solver, steps=3, grid=shifted.grid)
    assert x.shape == (2, 2) and np.isfinite(x).all()


def test_a_loaded_run_encodes_decodes_interpolates_and_has_a_density(trained):
    x = trained.sample(4, solver="rk4", steps=32)
    z = trained.encode(x, steps=32)
    np.testing.assert_allclose(trained.decode(z, steps=32), x, atol=1e-4)
    between = trained.interpolate(x[0], x[1], 3, steps=32)
    np.testing.assert_allclose(between[[0, -1]], x[:2], atol=1e-3)
    assert trained.velocity(x, 0.5).shape == x.shape
    assert repr(trained).startswith(f"Run({str(trained.path)!r}: flow, classifier, score, flow_map, step 8")
    log_p = trained.log_prob(x)
    shift = np.eye(2, dtype=np.float32) * 1e-2  # its gradient by differences, against a far point: p falls outwards
    assert log_p.shape == (4,) and (trained.log_prob(x * 0 + 9 + shift[0]) < log_p.min()).all()


def test_marginals_of_a_pipeline_are_complete(evaluated, capsys):
    before = stamps(evaluated / "marginals")
    run("marginals", f"--workdir={evaluated}")
    after = stamps(evaluated / "marginals")
    assert {str(p) for p in after if before.get(p) != after[p]} <= {"stage.json"}
    assert "flow of step 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("sample", ["--count=0"], "count=0"),
        ("sample", ["--seed=-1"], "seed=-1"),
        ("sample", ["--seed=4294967296"], "seed=4294967296"),
        ("sample", ["--out=x.jpg"], "out='x.jpg'"),
        ("sample", ["--out=folder"], "out='folder'"),
        ("sample", ["--label=3"], "label=3"),
        ("sample", ["--guidance=2"], "guidance=2.0"),
        ("sample", ["--solver=rk5"], "samplers.sample.solver='rk5'"),
        ("sample", ["--solver_steps=0"], "samplers.sample.steps=0"),
        ("sample", ["--corrections={"], "corrections='{'"),
        ("sample", ["--corrections=3"], "corrections='3'"),
        ("sample", ['--corrections={"at": [9], "by": "score", "alpha": 1}'], "corrections.sample.at=9"),
        ("evaluate", ["--config.net.width=9"], "workdir="),
        ("evaluate", ["--config.samplers.euler=(0,)"], "samplers.euler.steps=0"),
        ("evaluate", ["--config.sampling.samples=1000"], "sampling.samples=1000"),
        ("evaluate", ["--config.metrics=('far',)"], "metrics='far'"),
        ("marginals", ["--config.solver_steps=3"], "workdir="),
        ("marginals", ["--direction=sideways"], "argument --direction"),
        ("tune", ["--by=scor"], "by='scor': .*did you mean 'score'"),
        ("pipeline", ["--config.backward_map=revers"], "backward_map='revers'"),
    ],
)  # fmt: skip
def test_what_cannot_work_on_a_run_folder_is_one_line(command, arguments, message, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = stamps(whole)
    line = refused(command, f"--workdir={whole}", *arguments)
    assert re.match(message, line) and len(line) <= 300, line
    assert stamps(whole) == before and not list(tmp_path.iterdir())


def test_a_folder_of_a_stage_is_refused_and_the_run_folder_is_the_way_on(whole, tmp_path):
    line = refused("evaluate", f"--workdir={whole / 'flow'}")
    assert line.startswith(f"workdir={whole / 'flow'}: is the folder of a stage") and f"Give {whole}, or" in line
    assert refused("sample", f"--workdir={tmp_path / 'typo'}").startswith(
        f"workdir={tmp_path / 'typo'}: is no run folder"
    )
    file = config_file(tmp_path, **WHOLE | {"sampling.seeds": 3})
    for command in ("evaluate", "marginals", "tune", "sample"):
        line = refused(command, f"--config={file}", f"--workdir={tmp_path / 'typo'}")
        assert line.startswith(f"workdir={tmp_path / 'typo'}: has no checkpoint of a flow"), (command, line)
    assert not (tmp_path / "typo").exists()


def test_an_sde_sampler_needs_a_velocity_that_has_the_score(tmp_path):
    changes = {"samplers": {"euler_maruyama": (4,)}, "coupling": "minibatch_ot"}
    with pytest.raises(ValueError, match="^samplers.euler_maruyama=4: .*coupling='independent'"):
        evaluate.main(read(**changes), tmp_path / "w")
    with pytest.raises(WorkdirError, match="no checkpoint of a flow"):  # the way on is accepted
        evaluate.main(read(**changes | {"coupling": "independent"}), tmp_path / "w")


def test_samplers_whose_network_is_not_trained_are_left_out(whole, tmp_path, capsys):
    path = tmp_path / "w"
    shutil.copytree(whole / "flow", path / "flow")
    shutil.copy(whole / "config.json", path)
    run("evaluate", f"--workdir={path}")
    rows = [r["name"] for r in numbers(path, "evaluation.json")["rows"]]
    assert rows == ["euler, 2 steps", "rk4, 2 steps", "training data"]
    assert "7 samplers of the config" in capsys.readouterr().out
    teacher = {"name": "paired_error_to", "teacher": "flow map, 2 steps"}
    with pytest.raises(ValueError, match="^metrics.teacher='flow map, 2 steps': .*There are euler, 2 steps, rk4"):
        evaluate.main(read(**WHOLE | {"metrics": (teacher,)}), path)
    with pytest.raises(ValueError, match="^solver='flow_map'"):
        load(path).sample(1, solver="flow_map")
    with pytest.raises(ValueError, match="^by='drift': .*launch.marginals"):
        load(path).sample(1, solver="rk4", steps=2, corrections=WHOLE["corrections"]["drift"] | RK4)
    run("marginals", f"--workdir={path}")  # the way on
    assert load(path).sample(1, solver="rk4", steps=2, corrections=WHOLE["corrections"]["drift"] | RK4).shape == (1, 2)
