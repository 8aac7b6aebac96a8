"""Half-straightening as a run: students that learn nothing are the teacher; others straighten their own segment."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from laboratory import base, config, digest, no_checkpoint, numbers, records, refused, run, stamps
from laboratory import laboratory as laboratory  # a fixture

from fmjax import correction, straightening
from fmjax.experiments import build, reflow, settings, straightened
from fmjax.sampling import grids
from fmjax.storage import files

pytestmark = pytest.mark.usefixtures("laboratory")
BOUNDS = (0.0, 0.5, 1.0)
STUDENTS = {
    "steps": 2, "learning_rate": 1e-12, "warmup": 0, "grid": "edm", "grid_steps": 6, "solver": "heun", "examples": 64,
    "reference_steps": 20, "baselines": (4,), "probes": 16, "allocations": ((1, 1), (4, 4)),
    "sharing": ("shared", "retained", "conditioned", "gated"), "parts": {"noise half": (0,)},
}  # fmt: skip
DIGITS = {"data": "digits", "metrics": ("sliced_w2_to", "energy_to"), "steps": 40, "learning_rate": 1e-2}


def straighten(changes=None, **fields):
    """Return the settings of a small half-straightening, of digits if nothing else is said."""
    c = config(**DIGITS | (changes or {}))
    with c.unlocked(), c.ignore_type():
        c.straighten = base.straighten(c, **STUDENTS | fields)
    return settings.read(c)


@pytest.fixture(scope="module")
def finished(laboratory, tmp_path_factory):
    path = tmp_path_factory.mktemp("straightened")
    reflow.main(straighten(), path)
    return path


@pytest.fixture(scope="module")
def measured(finished):
    return numbers(finished, "straightened.json")


def test_every_stage_leaves_its_work(finished):
    _, students, _ = reflow.student_stages(straighten(), build.data("digits"))
    assert {p.name for p in (finished / "straighten").iterdir()} == {files.slug(name) for name in students}
    assert [r["step"] for r in records(finished / "flow")] == list(range(4, 41, 4))
    for folder in (finished / "straighten").iterdir():
        assert [r["step"] for r in records(folder)] == [2]
    assert (finished / "report.html").exists()


def test_students_that_learn_nothing_are_the_teacher_at_every_allocation(measured):
    """Whatever their parameters serve, all start from the teacher: one table of numbers."""
    rows = [r for r in measured["rows"] if r["counts"]]
    teacher = {tuple(r["counts"]): r for r in rows if r["family"] == "teacher"}
    assert len(rows) == 2 * (1 + 4 + 1) and set(teacher) == {(1, 1), (4, 4)}
    for r in rows:
        same = teacher[tuple(r["counts"])]
        assert r["NFE"] == sum(r["counts"])
        for name in ("sliced W2", "energy distance", "paired error"):
            assert r[name] == pytest.approx(same[name], rel=2e-3, abs=1e-5), (r["family"], name)
        assert r["drift"] == pytest.approx(same["drift"], rel=1e-3)
    (coarse,), (fine,) = teacher[1, 1]["drift"], teacher[4, 4]["drift"]
    assert 0 < fine < coarse / 4  # of the state at the bound, by Euler steps of 1/2 and of 1/8


def test_errors_are_paired_with_the_teachers_own_end(measured):
    error = {(r["family"], r["name"]): r["paired error"][0] for r in measured["rows"]}
    assert [e for (family, _), e in error.items() if family == "teacher, heun"] == [0]
    assert error["teacher", "(1, 1)"] > 2 * error["teacher", "(4, 4)"] > 0
    # four even steps are (2, 2); one step of them all is near no other
    even = error["teacher, Euler", "4 even steps"]
    assert even < error["teacher", "(1, 1)"]
    assert even == pytest.approx(error["full reflow, Euler", "4 even steps"], rel=1e-3)


def test_baselines_cost_no_more_than_they_are_compared_at(measured):
    nfe = {r["family"].removeprefix("teacher, "): r["NFE"] for r in measured["rows"] if not r["counts"]}
    assert nfe.pop("heun") == 2 * 22  # EDM's 20 levels, pure noise before them and the bound among them
    # EDM's Heun takes 2 N - 1
    assert nfe == {"Euler": 4, "Euler on EDM's grid": 4, "EDM's Heun": 3, "DPM-Solver++(2M)": 4, "DDIM": 4} | {
        "full reflow, Euler": 4
    }


def test_the_measures_of_the_teacher_stand_beside_its_students(measured):
    teacher, *students = measured["segments"]
    assert teacher["part"] == "none" and teacher["departure"] == [0, 0] and len(students) == 5
    assert all(s > 0 for s in teacher["straightness"]) and len(teacher["jump"]) == 1
    for model in students:
        assert model["straightness"] == pytest.approx(teacher["straightness"], rel=1e-3)
        assert max(model["departure"]) < 1e-8


def test_the_spectrum_of_an_error_adds_up_to_it(measured):
    error = {f"{r['family']}, {r['name']}": r["paired error"][0] for r in measured["rows"]}
    assert len(measured["spectra"]) == 2 * 6
    for name, spectrum in measured["spectra"].items():
        assert sum(spectrum["power"]) == pytest.approx(error[name], rel=1e-5)


def test_every_model_takes_its_steps_in_every_segment():
    models, _ = straightening.comparison_models(BOUNDS, {"late": (1,)}, ("gated",))
    _, s = straighten(allocations=((1, 3), (2, 2))).straighten
    samplers = straightened._allocated(s, models, {})
    assert [(c.family, c.name, c.nfe) for c in samplers[2:4]] == [
        ("late, gated", "(1, 3)", 4),
        ("late, gated", "(2, 2)", 4),
    ]
    for sampler in samplers:
        np.testing.assert_array_equal(sampler.ts, straightening.segment_grid(BOUNDS, sampler.counts))


def test_samples_start_in_the_noise_of_their_grids_first_time(monkeypatch):
    noise, ts = np.ones((3, 2), np.float32), grids.edm_grid(2)
    stay = lambda params: lambda x, s, t, cond=None, key=None: params * x
    monkeypatch.setattr(straightened.drawing.in_chunks, "__kwdefaults__", {"size": 2})
    states = straightened._states_at(stay, 1.0, noise, None, ts, (0, 1, 2))
    np.testing.assert_allclose(states, np.full((3, 3, 2), 80 / 81), rtol=1e-6)
    end = straightened._states_at(stay, 2.0, noise, None, ts, (2,))
    np.testing.assert_allclose(end, np.full((1, 3, 2), 320 / 81), rtol=1e-6)


def test_trajectories_are_the_teachers_at_the_bounds(finished):
    stored = correction.read_marginals(finished / "trajectories")
    assert stored.ts.tolist() == [0, 0.5, 1] and stored.x.shape == (64, 3, 8, 8, 1)
    grid, index = straightened.teacher_grid("edm", 6, BOUNDS)
    assert grid[list(index)].tolist() == [0, 0.5, 1] and grid[0] == 0
    levels = grids.edm_grid(6).astype(np.float32)  # one of these is near the bound and moves there
    assert len(grid) == 8 and len(set(levels.tolist()) & set(grid.tolist())) == 6
    assert stored.manifest.solver == "heun" and stored.manifest.ts == pytest.approx(grid.tolist())
    even, at = straightened.teacher_grid("even", 3, BOUNDS)
    np.testing.assert_allclose(even, [0, 1 / 3, 0.5, 2 / 3, 1], rtol=1e-6)
    assert at == (0, 2, 4)


def test_a_second_run_reads_everything(finished, tmp_path, capsys):
    path = shutil.copytree(finished, tmp_path / "w")
    before = {p: t for p, t in stamps(path).items() if p.name not in ("config.json", "environment.json")}
    run("reflow", f"--workdir={path}")
    after = {p: t for p, t in stamps(path).items() if p.name not in ("config.json", "environment.json")}
    assert before == after and "comparison: complete" in capsys.readouterr().out


def test_a_digest_of_trajectories_is_the_same_in_every_process(finished):
    """``hash`` of a text is another number in every process, and then no comparison is ever complete."""
    (flow, trajectories, *_), *_ = reflow.student_stages(straighten(), build.data("digits"))
    results = {"flow": flow.complete({}, finished)}
    assert re.fullmatch("[0-9a-f]{64}", trajectories.complete(results, finished).digest)


def test_a_run_that_lost_its_end_goes_on_to_the_same_numbers(finished, measured, tmp_path):
    path = shutil.copytree(finished, tmp_path / "w")
    lost = path / "straighten" / files.slug("segment 0")
    former = digest(lost)
    shutil.rmtree(lost)
    (path / "straightened.json").unlink()
    run("train", f"--workdir={path}", "--stage=straighten.segment 0")
    assert digest(lost) == former
    run("reflow", f"--workdir={path}")
    assert numbers(path, "straightened.json") == measured


def test_other_comparisons_are_made_of_the_same_students(finished, tmp_path):
    """A corrected typo in the comparison costs no training."""
    path = shutil.copytree(finished, tmp_path / "w")
    before = stamps(path)
    assert refused("reflow", f"--workdir={path}", "--config.straighten.baselines=(0,)").startswith(
        "straighten.baselines"
    )
    run("reflow", f"--workdir={path}", "--config.straighten.allocations=((2, 1),)", "--config.straighten.baselines=()")
    counts = [r["counts"] for r in numbers(path, "straightened.json")["rows"] if r["counts"]]
    assert counts == [[2, 1]] * 6
    after = stamps(path)
    kept = [p for p in before if p.parts[0] in ("flow", "straighten", "trajectories") and p.name != "stage.json"]
    assert kept and all(before[p] == after[p] for p in kept)


@pytest.mark.slow
def test_students_straighten_their_own_segment_alone(laboratory, tmp_path):
    """A student with steps that count comes nearer to its chords, and only where it is trained."""
    points = {"data": {"name": "two_moons", "train": 240, "validation": 80, "test": 120}, "net.width": 32, "steps": 200}
    fields = {"learning_rate": 3e-3, "steps": 400, "ema": 0.9, "parts": {"noise half": (0,), "data half": (1,)}}
    fields |= {"full": False, "sharing": ("gated",), "examples": 256, "allocations": ((1, 1),), "baselines": ()}
    reflow.main(straighten(points | {"log_every": 200, "save_every": 400}, **fields), tmp_path)
    found = {m["part"]: m for m in numbers(tmp_path, "straightened.json")["segments"]}
    for part, segment in (("noise half", 0), ("data half", 1)):
        straight, kept = found[part]["straightness"], found["none"]["straightness"]
        assert straight[segment] < 0.5 * kept[segment] and straight[1 - segment] == pytest.approx(kept[1 - segment])
        assert found[part]["departure"][1 - segment] == 0 < found[part]["departure"][segment]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"bounds": (0.0, 0.5, 0.9)}, "straighten.bounds="),
        ({"bounds": (0.1, 0.5, 1.0)}, "straighten.bounds="),
        ({"sharing": ("share",)}, "straighten.sharing='share'"),
        ({"parts": {"late": (2,)}}, "straighten.parts="),
        ({"parts": ("late",)}, "straighten.parts="),
        ({"examples": -1}, "straighten.examples=-1"),
        ({"baselines": ("a",)}, "straighten.baselines"),
        ({"grid": "evn"}, "straighten.grid='evn': .*did you mean 'even'"),
        ({"solver": "huen"}, "straighten.solver='huen'"),
        ({"allocations": ((0, 1),)}, "straighten.counts="),
        ({"allocations": ((1, 1, 1),)}, "straighten.counts="),
        ({"method": {"name": "straighten", "distance": "huber"}}, "straighten.method.distance='huber'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(fields, line, tmp_path):
    with pytest.raises(ValueError, match=f"^{line}") as caught:
        reflow.main(straighten(**fields), tmp_path / "w")
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300 and no_checkpoint(tmp_path)


def test_another_path_or_too_few_samples_are_refused(tmp_path):
    for changes, line in (({"path": "vp"}, "path='vp'"), ({"sampling.samples": 1}, "sampling.samples=1")):
        with pytest.raises(ValueError, match=f"^{line}"):
            reflow.main(straighten(changes), tmp_path / "w")
    with pytest.raises(ValueError, match="^straighten: .*configs/half_straightening_digits.py"):
        reflow.main(settings.read(config()), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_the_straightened_record_is_plain_json(finished):
    record = json.loads((finished / "straightened.json").read_text())
    assert {"rows", "floor", "segments", "spectra", "digest"} <= set(record)
    assert jax.tree.leaves(record["floor"])
