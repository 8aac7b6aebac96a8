"""Reflow as a run, tiny, on digits: students that learnt nothing are the teacher; it resumes to the same bits."""

import importlib
import json
import shutil

import numpy as np
import pytest

from fmjax import correction, straightening
from fmjax.experiments import assemble, reflow
from fmjax.sampling import grids
from fmjax.storage import checkpoint, files
from fmjax.straightening import segments
from fmjax.training import loop

SHRUNK = {
    "net.width": 16, "net.depth": 1, "batch_size": 32, "steps": 30, "save_every": 15, "straighten.batch_size": 32,
    "straighten.steps": 2, "straighten.learning_rate": 1e-12, "straighten.examples": 64, "straighten.grid_steps": 6,
    "straighten.reference_steps": 20, "straighten.allocations": ((1, 1), (4, 4)), "straighten.baselines": (4,),
    "straighten.parts": {"noise half": (0,)}, "straighten.sharing": ("shared", "retained", "told", "gated"),
    "sampling.seeds": 2, "sampling.samples": 48,
}  # fmt: skip


def config(**changes):
    c = importlib.import_module("configs.half_straightening_digits").get_config()
    with c.unlocked(), c.ignore_type():
        for name, value in (SHRUNK | changes).items():
            *folders, last = name.split(".")
            part = c
            for folder in folders:
                part = part[folder]
            part[last] = value
    return c


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        path = tmp_path_factory.mktemp("reflow")
        reflow.main(config(), path)
    return path


@pytest.fixture(autouse=True)
def small_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def numbers(path):
    found = json.loads((path / "straightened.json").read_text())
    del found["environment"]
    return found


def test_untrained_students_are_the_teacher_at_every_allocation(finished):
    """Whatever their parameters serve, all started from the teacher: one table of numbers."""
    rows = [r for r in numbers(finished)["rows"] if r["counts"]]
    teacher = {tuple(r["counts"]): r for r in rows if r["family"] == "teacher"}
    assert len(rows) == 2 * (1 + 4 + 1) and set(teacher) == {(1, 1), (4, 4)}
    for r in rows:
        same = teacher[tuple(r["counts"])]
        assert r["NFE"] == sum(r["counts"])
        for name in ("FD-small", "sliced W2", "paired error"):
            assert r[name] == pytest.approx(same[name], rel=2e-3, abs=1e-5), (r["family"], name)
        assert r["drift"] == pytest.approx(same["drift"], rel=1e-3)
    (coarse,), (fine,) = teacher[1, 1]["drift"], teacher[4, 4]["drift"]
    assert 0 < fine < coarse / 4 and fine < 0.01  # of the state at the bound, by Euler steps of 1/2 and of 1/8


def test_errors_are_paired_with_the_teachers_own_end(finished):
    found = numbers(finished)
    error = {(r["family"], r["name"]): r["paired error"][0] for r in found["rows"]}
    assert [e for (family, _), e in error.items() if family == "teacher, heun"] == [0]
    assert error["teacher", "(1, 1)"] > error["teacher", "(4, 4)"] > 0
    assert error["teacher", "(4, 4)"] < 0.05  # of samples whose own mean square is near 0.5
    # four even steps are (2, 2); one step of them all is near no other
    even = error["teacher, Euler", "4 even steps"]
    assert even < error["teacher", "(1, 1)"]
    assert even == pytest.approx(error["full reflow, Euler", "4 even steps"], rel=1e-3)


def test_baselines_cost_no_more_than_they_are_compared_at(finished):
    nfe = {r["family"].removeprefix("teacher, "): r["NFE"] for r in numbers(finished)["rows"] if not r["counts"]}
    assert nfe.pop("heun") == 2 * 22  # EDM's 20 levels, pure noise before them and the bound among them
    # EDM's Heun takes 2 N - 1
    assert nfe == {"Euler": 4, "Euler on EDM's grid": 4, "EDM's Heun": 3, "DPM-Solver++(2M)": 4, "DDIM": 4} | {
        "full reflow, Euler": 4
    }


def test_every_model_takes_its_steps_in_every_segment():
    models, _ = straightening.comparison_models((0.0, 0.5, 1.0), {"late": (1,)}, ("gated",))
    found = reflow._allocated(config(**{"straighten.allocations": ((1, 3), (2, 2))}), models, {})
    assert [(s.family, s.name, s.nfe) for s in found[2:4]] == [
        ("late, gated", "(1, 3)", 4),
        ("late, gated", "(2, 2)", 4),
    ]
    for one in found:
        np.testing.assert_array_equal(one.ts, segments.segment_grid((0.0, 0.5, 1.0), one.counts))


def test_samples_start_in_the_noise_of_their_grids_first_time():
    noise, ts = np.ones((3, 2), np.float32), grids.edm_grid(2)
    stay = lambda params: lambda x, s, t, cond=None, key=None: params * x
    states = reflow.draw(stay, 1.0, noise, ts, (0, 1, 2), chunk=2)
    np.testing.assert_allclose(states, np.full((3, 3, 2), 80 / 81), rtol=1e-6)
    np.testing.assert_allclose(reflow.draw(stay, 2.0, noise, ts, (2,)), np.full((1, 3, 2), 320 / 81), rtol=1e-6)


def test_the_measures_of_the_teacher_stand_beside_its_students(finished):
    found = numbers(finished)["segments"]
    teacher = found[0]
    assert teacher["part"] == "none" and teacher["departure"] == [0, 0] and len(found) == 6
    assert all(s > 0 for s in teacher["straightness"]) and len(teacher["jump"]) == 1
    for one in found[1:]:
        assert one["straightness"] == pytest.approx(teacher["straightness"], rel=1e-3)
        assert max(one["departure"]) < 1e-8


def test_the_spectrum_of_an_error_adds_up_to_it(finished):
    found = numbers(finished)
    error = {f"{r['family']}, {r['name']}": r["paired error"][0] for r in found["rows"]}
    assert len(found["spectra"]) == 2 * 6
    for name, one in found["spectra"].items():
        assert sum(one["power"]) == pytest.approx(error[name], rel=1e-5)


def test_trajectories_are_the_teachers_at_the_bounds(finished):
    stored = correction.read_marginals(finished / "trajectories")
    assert stored.ts.tolist() == [0, 0.5, 1] and stored.x.shape == (64, 3, 8, 8, 1)
    grid, index = reflow.teacher_grid("edm", 6, (0.0, 0.5, 1.0))
    assert grid[list(index)].tolist() == [0, 0.5, 1] and grid[0] == 0
    levels = grids.edm_grid(6)  # one of these is near the bound and moves there
    assert len(grid) == 8 and len(set(levels.tolist()) & set(grid.tolist())) == 6
    assert stored.manifest.solver == "heun" and stored.manifest.ts == pytest.approx(grid.tolist())
    even, at = reflow.teacher_grid("even", 3, (0.0, 0.5, 1.0))
    np.testing.assert_allclose(even, [0, 1 / 3, 0.5, 2 / 3, 1], rtol=1e-6)
    assert at == (0, 2, 4)


def test_a_run_that_lost_its_end_goes_on_to_the_same_numbers(finished, tmp_path, capsys):
    lost = tmp_path / "lost"
    shutil.copytree(finished, lost)
    for gone in ("straightened.json", "report.html"):
        (lost / gone).unlink()
    shutil.rmtree(lost / "students" / "segment-0")
    reflow.main(config(), lost)
    assert numbers(lost) == numbers(finished)
    capsys.readouterr()
    reflow.main(config(), lost)
    assert "complete" in capsys.readouterr().out


def test_students_train_on_their_segments_from_the_teacher(tmp_path):
    """A student with steps that count comes nearer to its chords, and only where it is trained."""
    changes = {"straighten.learning_rate": 3e-3, "straighten.steps": 600, "straighten.ema": 0.9}
    changes |= {"straighten.parts": {"noise half": (0,), "data half": (1,)}, "straighten.full": False}
    changes |= {"straighten.sharing": ("gated",), "straighten.examples": 256, "net.width": 64, "save_every": 300}
    cfg = config(**changes, **{"straighten.allocations": ((1, 1),), "straighten.baselines": ()})
    reflow.main(cfg, tmp_path)
    found = {m["part"]: m for m in numbers(tmp_path)["segments"]}
    for part, segment in (("noise half", 0), ("data half", 1)):
        straight, kept = found[part]["straightness"], found["none"]["straightness"]
        assert straight[segment] < 0.5 * kept[segment] and straight[1 - segment] == pytest.approx(kept[1 - segment])
        assert found[part]["departure"][1 - segment] == 0 < found[part]["departure"][segment]
    _, teacher, _ = checkpoint.restore(tmp_path / "flow" / "checkpoints", part="ema")
    plan = assemble.assemble(cfg)
    assert checkpoint.digest(loop.load_average(plan, tmp_path / "flow")) == checkpoint.digest(teacher)
    steps = [r["step"] for r in files.read_jsonl(tmp_path / "students" / "segment-1" / "metrics.jsonl")]
    assert steps[-1] == 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 10, "label_dropout": 0.1}, "classes=10: trajectories have no labels"),
        ({"path": "vp"}, "path='vp': this comparison is on the linear path"),
        ({"straighten.grid": "evn"}, "straighten.grid='evn' must be one of even, edm; did you mean 'even'"),
        ({"straighten.solver": "huen"}, "huen"),
        ({"straighten.allocations": ((1, 1, 1),)}, r"counts=\(1, 1, 1\) must be 2 positive numbers"),
        ({"straighten.bounds": (0.1, 0.5, 1.0)}, r"bounds=\(0.1, 0.5, 1.0\) must go from 0 to 1"),
        ({"straighten.sharing": ("gate",)}, "no sharing 'gate'"),
        ({"straighten.method": {"name": "straighten", "distance": "huber"}}, "distance='huber'"),
        ({"sampling.samples": 1}, "sampling.samples=1"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        reflow.main(config(**changes), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_config_without_the_stage_is_told_of_one(tmp_path):
    c = importlib.import_module("configs.digits").get_config()
    with pytest.raises(ValueError, match="has no 'straighten'; configs/half_straightening_digits.py has one"):
        reflow.main(c, tmp_path / "w")
