"""Workdirs: what they refuse, and that no interruption leaves half a file."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest
from plans import plan

from fmjax import training
from fmjax.experiments import forks, workdir
from fmjax.nets import Model
from fmjax.storage import checkpoint, files

CONFIG = {"seed": 0, "steps": 100, "net": {"name": "mlp", "width": 256}, "at": (0, 5), "clip": None}


def contents(path):
    return {p.relative_to(path): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(path.rglob("*")) if p.is_file()}


STAGES = {"flow": {"seed": 0, "steps": 100, "schedule": "cosine"}}


def test_a_new_run_folder_holds_config_and_environment(tmp_path):
    path = workdir.open_workdir(tmp_path / "a" / "b", CONFIG, STAGES)
    assert path.is_absolute() and sorted(p.name for p in path.iterdir()) == ["config.json", "environment.json"]
    text = (path / "config.json").read_text()
    assert json.loads(text).items() >= (CONFIG | {"at": [0, 5]}).items()
    assert text.index('"at"') < text.index('"clip"') < text.index('"seed"')
    environment = json.loads((path / "environment.json").read_text())
    assert environment["versions"]["jax"] == version("jax")
    assert environment["versions"]["orbax-checkpoint"] == version("orbax-checkpoint")
    assert environment["devices"].startswith(f"{len(jax.devices())} x ") and environment["earlier"] == []
    assert workdir.read_config(path) == CONFIG | {"at": [0, 5]}


def test_a_stage_of_another_config_is_refused_and_nothing_is_touched(tmp_path):
    workdir.open_workdir(tmp_path, CONFIG, STAGES)
    workdir.begin_stage(tmp_path, "flow", STAGES["flow"] | {"net": {"width": 256}, "clip": None})
    before = contents(tmp_path)
    other = {"seed": 1, "steps": 200, "schedule": "cosine", "net": {"width": 512, "depth": 3}}
    with pytest.raises(workdir.WorkdirError, match="^workdir=.*'flow'") as caught:
        workdir.open_workdir(tmp_path, CONFIG | {"seed": 1}, {"flow": other})
    line = str(caught.value)
    for part in ("clip is null there, absent here", "net.depth is absent there, 3 here", "net.width is 256 there"):
        assert part in line
    assert "and 1 more" in line and "schedule is" not in line and "--fork" in line and "\n" not in line
    one = STAGES["flow"] | {"seed": 1, "net": {"width": 256}, "clip": None}
    with pytest.raises(workdir.WorkdirError, match="seed is 0 there, 1 here. Set this back"):
        workdir.open_workdir(tmp_path, CONFIG, {"flow": one})
    assert contents(tmp_path) == before


def test_fields_that_no_begun_stage_depends_on_may_change(tmp_path):
    workdir.open_workdir(tmp_path, CONFIG, STAGES)
    workdir.begin_stage(tmp_path, "flow", STAGES["flow"])
    both = STAGES | {"correctors.score": {"correctors.score.steps": 7}}
    workdir.open_workdir(tmp_path, CONFIG | {"at": (1,)}, both)
    assert workdir.read_config(tmp_path)["at"] == [1]
    workdir.begin_stage(tmp_path, "correctors.score", both["correctors.score"])
    with pytest.raises(workdir.WorkdirError, match="correctors.score.steps is 7 there, 8 here"):
        workdir.open_workdir(tmp_path, CONFIG, STAGES | {"correctors.score": {"correctors.score.steps": 8}})


@pytest.mark.parametrize(
    ("schedule", "steps", "refused"), [("constant", 200, False), ("constant", 50, True), ("cosine", 200, True)]
)
def test_steps_may_grow_where_the_learning_rate_is_constant(tmp_path, schedule, steps, refused):
    fields = {"steps": 100, "schedule": schedule}
    workdir.begin_stage(tmp_path, "flow", fields)
    open_again = lambda: workdir.open_workdir(tmp_path, CONFIG, {"flow": fields | {"steps": steps}})
    if refused:
        with pytest.raises(workdir.WorkdirError, match=f"steps is 100 there, {steps} here"):
            open_again()
    else:
        open_again()


def test_numbers_that_differ_in_type_alone_differ(tmp_path):
    workdir.begin_stage(tmp_path, "flow", {"flag": True})
    with pytest.raises(workdir.WorkdirError, match="flag is true there, 1 here"):
        workdir.open_workdir(tmp_path, CONFIG, {"flow": {"flag": 1}})
    workdir.open_workdir(tmp_path, CONFIG, {"flow": {"flag": np.bool_(True)}})


def test_a_changed_environment_is_kept_beside_the_new_one(tmp_path):
    workdir.open_workdir(tmp_path, CONFIG, STAGES)
    path = tmp_path / "environment.json"
    now = files.read_json(path)
    old = {k: v for k, v in now.items() if k != "earlier"} | {"python": "3.0"}
    files.write_json(path, old)
    for _ in range(2):
        workdir.open_workdir(tmp_path, CONFIG, STAGES)
        assert files.read_json(path) == now | {"earlier": [old]}


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(workdir.WorkdirError, match="^workdir=.*cannot be written"):
            workdir.open_workdir(path, CONFIG, STAGES)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(workdir.WorkdirError, match="^workdir=gs://bucket/run"):
        workdir.open_workdir("gs://bucket/run", CONFIG, STAGES)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody can write to")
def test_a_read_only_file_system_says_so():
    with pytest.raises(workdir.WorkdirError, match="^workdir=/proc/fmjax"):
        workdir.open_workdir("/proc/fmjax", CONFIG, STAGES)


def test_what_is_no_run_folder_says_so(tmp_path):
    with pytest.raises(workdir.WorkdirError, match="^workdir=.*no run folder"):
        workdir.read_config(tmp_path)
    folder = workdir.begin_stage(tmp_path, "flow", {})
    with pytest.raises(workdir.WorkdirError, match="^workdir=.*folder of a stage"):
        workdir.read_config(folder)
    with pytest.raises(workdir.WorkdirError, match="^workdir=.*no checkpoint"):
        workdir.network_folder(tmp_path)
    for torn in ('{"seed": 0, "st', "[]", "3", ""):
        (tmp_path / "config.json").write_text(torn)
        with pytest.raises(files.DamagedFile, match="config.json"):
            workdir.read_config(tmp_path)


def test_code_outside_the_package_needs_trust(tmp_path):
    files.write_json(tmp_path / "config.json", {"net": {"name": "pkg.nets:make"}, "metrics": ["a/b.py:far"]})
    with pytest.raises(workdir.WorkdirError, match="^metrics.0='a/b.py:far'.*--trust"):
        workdir.read_config(tmp_path)
    assert workdir.read_config(tmp_path, trust=True)["net"] == {"name": "pkg.nets:make"}


def test_a_config_that_is_not_plain_is_named(tmp_path):
    with pytest.raises(ValueError, match="^config: holds a object"):
        workdir.open_workdir(tmp_path / "w", {"net": object()}, {})
    assert not (tmp_path / "w").exists()
    named = workdir.plain({"net": workdir.local})["net"]
    assert named == "fmjax.experiments.workdir:local"


def test_a_fork_has_the_whole_state_and_leaves_what_is_there(tmp_path):
    old, new, fields = tmp_path / "old", tmp_path / "new", {"net": {"name": "mlp"}, "steps": 7}
    state = training.train(plan(steps=7), workdir.begin_stage(old, "flow", fields))
    for _ in range(2):
        forks.fork(old, new, "flow", fields | {"steps": 9}, plan(steps=9))()
    step, copy, metadata = checkpoint.restore(new / "flow" / "checkpoints")
    assert step == 7 and metadata["forked"].endswith("old/flow") and "given" not in metadata
    assert metadata["run"]["fields"]["steps"] == 9 and metadata["digest"]["params"] == checkpoint.digest(state.params)
    assert (new / "flow" / "metrics.jsonl").read_bytes() == (old / "flow" / "metrics.jsonl").read_bytes()
    with pytest.raises(workdir.WorkdirError, match="^fork="):
        forks.fork(tmp_path / "none", tmp_path / "other", "flow", fields, plan(steps=9))
    with pytest.raises(workdir.WorkdirError, match="^fork=.*has taken 7 steps of 7"):
        forks.fork(old, tmp_path / "other", "flow", fields, plan(steps=7))
    other = plan().replace(model=Model(lambda key, x, cond=None: {"w": np.ones(2, np.float32)}, plan().model.net))
    with pytest.raises(workdir.WorkdirError, match="^fork=.*net.name differs"):
        forks.fork(old, tmp_path / "other", "flow", fields | {"net": {"name": "unet"}}, other)


def test_a_run_folder_has_one_owner(tmp_path):
    seen = []

    @workdir.owner
    def main(settings, path):
        seen.append(sorted(p.name for p in path.iterdir()))

    main(None, tmp_path / "w")
    assert not (tmp_path / "w").exists()  # a new folder that stays empty is taken away
    (tmp_path / "w").mkdir()
    main(None, tmp_path / "w")
    assert seen == [["owner.lock"]] * 2 and not list((tmp_path / "w").iterdir())


def test_the_commit_is_that_of_the_package_and_of_no_other_checkout(tmp_path):
    def git(*args):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    package = tmp_path / "fmjax"
    installed = tmp_path / ".venv" / "site-packages" / "fmjax"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("1")
    assert workdir._commit(package) is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    head = git("rev-parse", "HEAD")
    assert workdir._commit(package) == head
    assert workdir._commit(installed) is None
    (package / "a.py").write_text("2")
    assert workdir._commit(package) == head + "+"
