"""Runs that go on: more steps, a fork, a stage whose need is missing; every refusal's way on is followed."""

import re
import shutil

import pytest
from laboratory import MAP, SCORE, config_file, digest, records, refused, run, stamps
from laboratory import laboratory as laboratory  # a fixture

from fmjax.storage import checkpoint, files

pytestmark = pytest.mark.usefixtures("laboratory")
BOTH = {"correctors": {"score": SCORE}, "flow_map": MAP}


@pytest.fixture(scope="module")
def flow(laboratory, tmp_path_factory):
    """A flow of 8 steps, of a config that has more stages."""
    path = tmp_path_factory.mktemp("flow") / "w"
    run("train", f"--config={config_file(path.parent, **BOTH)}", f"--workdir={path}")
    return path


@pytest.fixture(scope="module")
def longer(laboratory, tmp_path_factory):
    """The same flow trained for 12 steps at once."""
    path = tmp_path_factory.mktemp("longer") / "w"
    run("train", f"--config={config_file(path.parent, **BOTH)}", f"--workdir={path}", "--config.steps=12")
    return path


def test_a_constant_rate_trains_longer_to_the_same_bits(flow, longer, tmp_path):
    path = shutil.copytree(flow, tmp_path / "w")
    run("train", f"--workdir={path}", "--config.steps=12")
    assert digest(path / "flow") == digest(longer / "flow")
    assert records(path / "flow") == records(longer / "flow")
    assert files.read_json(path / "config.json")["steps"] == 12
    line = refused("train", f"--workdir={path}", "--config.steps=8")
    assert "steps is 12 there, 8 here" in line


def test_another_field_is_refused_and_a_fork_is_a_way_on(flow, tmp_path):
    path, new = shutil.copytree(flow, tmp_path / "w"), tmp_path / "new"
    before = stamps(path)
    line = refused("train", f"--workdir={path}", "--config.learning_rate=0.1", "--config.steps=12")
    assert line.startswith(f"workdir={path}: its stage 'flow'") and "learning_rate is 0.002 there, 0.1 here" in line
    assert "--fork" in line and len(line) <= 300 and stamps(path) == before
    file = config_file(tmp_path, **BOTH)
    changes = ["--config.learning_rate=0.1", "--config.steps=12"]
    run("train", f"--config={file}", f"--workdir={new}", f"--fork={path}", *changes)
    old_records, new_records = records(path / "flow"), records(new / "flow")
    assert new_records[:2] == old_records and [r["step"] for r in new_records] == [4, 8, 12]
    assert new_records[2]["learning_rate"] == pytest.approx(0.1)
    assert checkpoint.latest_step(new / "flow" / "checkpoints") == 12
    run("train", f"--workdir={new}")  # complete: a second start needs no fork
    assert stamps(path) == before


def test_a_fork_without_changes_goes_on_as_the_run_itself(flow, longer, tmp_path):
    """The whole state: parameters, moments, average, step and the sums of the records."""
    file, new = config_file(tmp_path, **BOTH), tmp_path / "new"
    run("train", f"--config={file}", f"--workdir={new}", f"--fork={flow}", "--config.steps=12")
    assert digest(new / "flow") == digest(longer / "flow") and records(new / "flow") == records(longer / "flow")


def test_a_fork_of_nothing_is_refused(flow, tmp_path):
    file = config_file(tmp_path, **BOTH)
    line = refused("train", f"--config={file}", f"--workdir={tmp_path / 'new'}", f"--fork={tmp_path / 'none'}")
    assert line.startswith(f"fork={tmp_path / 'none'}: has no checkpoint of 'flow'")
    other = "--config.net.width=9"
    line = refused("train", f"--config={file}", f"--workdir={tmp_path / 'new'}", f"--fork={flow}", other)
    assert line.startswith(f"fork={flow}: is the state of another network, net.width differs")
    assert not (tmp_path / "new").exists()


def test_a_stage_whose_need_is_missing_is_refused_and_the_line_is_a_way_on(flow, tmp_path):
    """Follow what each line says until the corrector is trained."""
    path, commands = shutil.copytree(flow, tmp_path / "w"), []
    file = config_file(tmp_path, **BOTH)
    line = refused("train", f"--config={file}", f"--workdir={tmp_path / 'empty'}", "--stage=flow_map")
    assert line.startswith(f"workdir={tmp_path / 'empty'}: its stage 'flow' is not complete")
    while not (path / "correctors" / "score" / "checkpoints").exists():
        line = refused("train", f"--workdir={path}", "--stage=correctors.score") if not commands else ""
        if not line:
            run("train", f"--workdir={path}", "--stage=correctors.score")
            break
        command = re.search(r"launch\.(\w+) (--stage=\S+) (--workdir=\S+)\.$", line)
        commands.append(command[2])
        run(command[1], command[2], command[3])
    assert commands == ["--stage=marginals"]
    assert [r["step"] for r in records(path / "correctors" / "score")] == [4, 8]


def test_more_steps_under_stages_that_were_made_from_fewer_are_refused(flow, longer, tmp_path):
    path = shutil.copytree(flow, tmp_path / "w")
    run("train", f"--workdir={path}", "--stage=flow_map")
    before = stamps(path)
    for command in ("train", "evaluate", "pipeline"):
        line = refused(command, f"--workdir={path}", "--config.steps=12")
        assert line.startswith("steps=12: flow_map in ") and "Delete their folders" in line and len(line) <= 300
    assert stamps(path) == before
    shutil.rmtree(path / "flow_map")  # the way on
    run("train", f"--workdir={path}", "--config.steps=12")
    assert digest(path / "flow") == digest(longer / "flow")


def test_a_stage_that_does_not_exist_is_refused_with_the_nearest(flow):
    line = refused("train", f"--workdir={flow}", "--stage=correctors.scor")
    assert line.startswith("stage='correctors.scor': ") and "did you mean 'correctors.score'" in line
    assert "flow, marginals, correctors.score, flow_map" in line


def test_init_and_teacher_take_the_folder_of_a_run_or_of_a_stage(flow, tmp_path):
    distilled = {"method": MAP["method"], "target": "frozen", "teacher": str(flow), "init": str(flow / "flow")}
    file = config_file(tmp_path, **distilled)
    run("train", f"--config={file}", f"--workdir={tmp_path / 'w'}")
    assert checkpoint.restore(tmp_path / "w" / "flow" / "checkpoints")[2]["given"] == {
        "params": digest(flow / "flow"), "teacher": digest(flow / "flow"),
    }  # fmt: skip
    for field in ("init", "teacher"):
        file = config_file(tmp_path, **distilled | {field: str(tmp_path / "none")})
        line = refused("train", f"--config={file}", f"--workdir={tmp_path / 'v'}")
        assert line.startswith(f"{field}='{tmp_path / 'none'}': has no checkpoint of a flow")
    file = config_file(tmp_path, **distilled | {"net": {"name": "mlp", "width": 8, "depth": 1}})
    line = refused("train", f"--config={file}", f"--workdir={tmp_path / 'v'}")
    assert line.startswith("init='") and not (tmp_path / "v").exists()
