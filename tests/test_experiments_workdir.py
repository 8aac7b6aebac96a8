"""Workdirs: what they refuse, and that no interruption leaves half a file."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.experiments import workdir

CONFIG = {"seed": 0, "steps": 100, "net": {"name": "mlp", "width": 256}, "at": (0, 5), "clip": None}


def contents(path):
    return {p.relative_to(path): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_new_workdir_holds_config_and_environment(tmp_path):
    path = workdir.open_workdir(tmp_path / "a" / "b", CONFIG)
    assert path.is_absolute() and sorted(p.name for p in path.iterdir()) == ["config.json", "environment.json"]
    text = (path / "config.json").read_text()
    assert json.loads(text) == CONFIG | {"at": [0, 5]}
    assert text.index('"at"') < text.index('"clip"') < text.index('"seed"')
    environment = json.loads((path / "environment.json").read_text())
    assert environment["versions"]["jax"] == version("jax")
    assert environment["versions"]["orbax-checkpoint"] == version("orbax-checkpoint")
    assert environment["devices"].startswith(f"{len(jax.devices())} x ") and environment["earlier"] == []


def test_the_same_config_opens_again_whatever_its_types(tmp_path):
    ml_collections = pytest.importorskip("ml_collections")
    workdir.open_workdir(tmp_path, CONFIG)
    workdir.open_workdir(tmp_path, CONFIG | {"at": np.array([0, 5]), "seed": jnp.int32(0)})
    nested = ml_collections.ConfigDict(CONFIG)
    workdir.open_workdir(tmp_path, nested.to_dict())


def test_another_config_is_refused_with_every_field_and_nothing_touched(tmp_path):
    workdir.open_workdir(tmp_path, CONFIG)
    before = contents(tmp_path)
    other = {"seed": 1, "steps": 200, "net": {"name": "mlp", "width": 512, "depth": 3}, "at": (0, 5)}
    with pytest.raises(workdir.WorkdirError) as caught:
        workdir.open_workdir(tmp_path, other, free=("steps",))
    message = str(caught.value)
    for part in ("clip is null there, absent here", "net.depth is absent there, 3 here", "seed is 0 there, 1 here"):
        assert part in message
    assert "net.width is 256 there, 512 here" in message
    assert "steps" not in message and "net.name" not in message and "at is" not in message
    assert contents(tmp_path) == before


def test_free_fields_may_change_and_the_new_value_is_kept(tmp_path):
    workdir.open_workdir(tmp_path, CONFIG)
    with pytest.raises(workdir.WorkdirError, match="steps is 100 there, 300 here"):
        workdir.open_workdir(tmp_path, CONFIG | {"steps": 300}, free=("step", "net"))
    workdir.open_workdir(tmp_path, CONFIG | {"steps": 300, "net": "unet"}, free=("steps", "net"))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 300


def test_numbers_that_differ_in_type_alone_differ(tmp_path):
    workdir.open_workdir(tmp_path, {"flag": True})
    with pytest.raises(workdir.WorkdirError, match="flag is true there, 1 here"):
        workdir.open_workdir(tmp_path, {"flag": 1})


def test_a_changed_environment_is_kept_beside_the_new_one(tmp_path):
    workdir.open_workdir(tmp_path, CONFIG)
    path = tmp_path / "environment.json"
    now = json.loads(path.read_text())
    old = {k: v for k, v in now.items() if k != "earlier"} | {"python": "3.0"}
    path.write_text(json.dumps(old))
    for _ in range(2):
        workdir.open_workdir(tmp_path, CONFIG)
        assert json.loads(path.read_text()) == now | {"earlier": [old]}


def test_a_workdir_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(workdir.WorkdirError, match="cannot be written: .*choose another one"):
            workdir.open_workdir(path, CONFIG)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(workdir.WorkdirError, match="is a URL"):
        workdir.open_workdir("gs://bucket/run", CONFIG)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"seed": 0, "st')
    with pytest.raises(workdir.WorkdirError, match=r"config.json is unreadable"):
        workdir.open_workdir(tmp_path / "torn", CONFIG)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody can write to")
def test_a_read_only_file_system_says_so():
    with pytest.raises(workdir.WorkdirError, match="/proc/fmjax cannot be written"):
        workdir.open_workdir("/proc/fmjax", CONFIG)


def test_config_that_is_not_plain_is_named(tmp_path):
    with pytest.raises(TypeError, match="function is not plain JSON"):
        workdir.open_workdir(tmp_path / "w", {"net": test_free_fields_may_change_and_the_new_value_is_kept})
    assert not (tmp_path / "w").exists()


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
