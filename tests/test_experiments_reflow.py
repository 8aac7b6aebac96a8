"""Half-straightening as a run: stages, students, what is compared, and what is refused before any work."""

import json
import shutil

import jax
import numpy as np
import pytest
from laboratory import POINTS, base, config, digest, no_checkpoint, numbers, stamps
from laboratory import laboratory as laboratory  # a fixture

from fmjax.experiments import build, reflow, settings, straightened
from fmjax.storage import files

pytestmark = pytest.mark.usefixtures("laboratory")
STUDENTS = {
    "steps": 4, "warmup": 0, "grid": "even", "grid_steps": 4, "solver": "heun", "examples": 64, "reference_steps": 4,
    "baselines": (2,), "probes": 16, "allocations": ((1, 1), (1, 2)), "sharing": ("shared", "gated"),
    "parts": {"noise half": (0,), "data half": (1,)},
}  # fmt: skip


def straighten(**changes):
    """Return the settings of a small half-straightening of points."""
    c = config(data=POINTS)
    with c.unlocked(), c.ignore_type():
        c.straighten = base.straighten(c, **STUDENTS | changes)
    return settings.read(c)


@pytest.fixture(scope="module")
def finished(laboratory, tmp_path_factory):
    path = tmp_path_factory.mktemp("straightened")
    reflow.main(straighten(), path)
    return path


def test_every_stage_leaves_its_work(finished):
    _, students, _ = reflow.student_stages(straighten(), build.data(straighten().common.data))
    assert {p.name for p in (finished / "straighten").iterdir()} == {files.slug(name) for name in students}
    for folder in (finished / "flow", *(finished / "straighten").iterdir()):
        assert files.read_jsonl(folder / "metrics.jsonl")[-1]["step"] in (4, 8)
    assert (finished / "report.html").exists()


def test_the_rows_have_costs_paired_errors_and_drifts(finished):
    record = numbers(finished, "straightened.json")
    rows = {f"{r['family']} {r['name']}": r for r in record["rows"]}
    teacher = rows["teacher (1, 2)"]
    assert teacher["NFE"] == 3 and len(teacher["drift"]) == 1
    assert all(np.isfinite(r["paired error"][0]) for r in record["rows"])
    many = next(r for name, r in rows.items() if name.startswith("teacher, heun"))
    assert many["paired error"][0] == 0 and many["NFE"] == 2 * 4
    assert {m["sharing"] for m in record["segments"]} == {"teacher", "shared", "gated", "full reflow"}


def test_a_second_run_reads_everything(finished, capsys):
    before = {p: t for p, t in stamps(finished).items() if p.name not in ("config.json", "environment.json")}
    reflow.main(straighten(), finished)
    after = {p: t for p, t in stamps(finished).items() if p.name not in ("config.json", "environment.json")}
    assert before == after and "complete" in capsys.readouterr().out


def test_a_run_that_lost_a_student_trains_it_again_to_the_bit(finished):
    folder = next((finished / "straighten").iterdir())
    former = digest(folder)
    shutil.rmtree(folder)
    (finished / "report.html").unlink()
    reflow.main(straighten(), finished)
    assert digest(folder) == former


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"bounds": (0.0, 0.5, 0.9)}, "straighten.bounds"),
        ({"sharing": ("share",)}, "sharing='share'"),
        ({"parts": {"late": (2,)}}, "parts"),
        ({"examples": -1}, "straighten.examples=-1"),
        ({"baselines": ("a",)}, "straighten.baselines"),
        ({"grid": "edn"}, "straighten.grid='edn'"),
        ({"solver": "rk5"}, "rk5"),
        ({"allocations": ((0, 1),)}, "counts|allocations"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(changes, line, tmp_path):
    with pytest.raises(ValueError, match=line) as caught:
        reflow.main(straighten(**changes), tmp_path / "w")
    assert "\n" not in str(caught.value) and no_checkpoint(tmp_path)


def test_a_config_without_students_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^straighten"):
        reflow.main(settings.read(config()), tmp_path / "w")


def test_the_teacher_s_grid_has_the_bounds_to_the_bit():
    for kind in ("even", "edm"):
        ts, index = straightened.teacher_grid(kind, 7, (0.0, 0.5, 1.0))
        assert [float(ts[i]) for i in index] == [0.0, 0.5, 1.0] and (np.diff(ts) > 0).all()


def test_the_straightened_record_is_plain_json(finished):
    record = json.loads((finished / "straightened.json").read_text())
    assert {"rows", "floor", "segments", "spectra", "digest"} <= set(record)
    assert jax.tree.leaves(record["floor"]) and build.data(straighten().common.data).kind == "points"
