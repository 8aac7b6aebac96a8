"""Two processes on loopback train the stages of a run and evaluate it like one process."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from laboratory import CLASSIFIER, RK4, ROOT, SCORE, config_file, numbers, records, run
from laboratory import laboratory as laboratory  # a fixture

from fmjax import correction
from fmjax.storage import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("laboratory")]
CHANGES = {
    "correctors": {"score": SCORE, "classifier": CLASSIFIER},
    "corrections": {
        "end": {**RK4, "at": (2,), "by": "score", "alpha": 0.5},
        "apart": {**RK4, "at": (1,), "by": "classifier", "alpha": 0.1},
    },
}
STAGES = ("flow", "marginals", "correctors.score", "correctors.classifier")


def both(command, *arguments):
    """Run a command as two processes with one device each; return what the first prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    env |= {"FMJAX_DISTRIBUTED": "1", "FMJAX_COORDINATOR": address, "FMJAX_PROCESSES": "2"}
    start = [sys.executable, "-m", f"launch.{command}", *map(str, arguments)]
    children = [
        subprocess.Popen(start, cwd=ROOT, env=env | {"FMJAX_PROCESS": str(i)}, stdout=-1, stderr=-1, text=True)
        for i in range(2)
    ]
    out = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], [err[-2000:] for _, err in out]
    lines = [[line for line in stdout.splitlines() if "[Gloo]" not in line] for stdout, _ in out]
    assert not lines[1], "the second process prints nothing"
    return "\n".join(lines[0])


@pytest.fixture(scope="module")
def folders(laboratory, tmp_path_factory):
    """The same run by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    file, one, two = config_file(folder, **CHANGES), folder / "one", folder / "two"
    for stage in STAGES:
        run("train", f"--config={file}", f"--workdir={one}", f"--stage={stage}")
        both("train", f"--config={file}", f"--workdir={two}", f"--stage={stage}")
    run("evaluate", f"--workdir={one}")
    both("evaluate", f"--workdir={two}")
    return one, two


def test_two_processes_train_every_stage_like_one(folders):
    """The rows of a batch are the same, and only the order of sums differs."""
    for stage in ("flow", "correctors/score", "correctors/classifier"):
        one, two = (records(folder / stage) for folder in folders)
        assert [r["step"] for r in two] == [4, 8]
        for a, b in zip(one, two, strict=True):
            assert a == pytest.approx(b, rel=1e-4), stage
        trees = [checkpoint.restore(folder / stage / "checkpoints", part="ema")[1] for folder in folders]
        flat = [np.concatenate([a.ravel() for a in jax.tree.leaves(tree)]) for tree in trees]
        np.testing.assert_allclose(*flat, atol=2e-5)
    best = [checkpoint.latest_step(folder / "correctors" / "classifier" / "best" / "checkpoints") for folder in folders]
    assert best[0] == best[1]


def test_two_processes_build_and_draw_like_one(folders):
    for direction in ("forward", "backward"):
        one, two = (correction.read_marginals(folder / "marginals" / direction).x for folder in folders)
        np.testing.assert_allclose(one, two, atol=1e-4)
    one, two = ({r["name"]: r for r in numbers(folder, "evaluation.json")["rows"]} for folder in folders)
    assert list(one) == list(two) and len(one) == 5
    for name, row in one.items():
        for metric, (mean, se) in row["distances"].items():
            assert two[name]["distances"][metric] == pytest.approx((mean, se), rel=1e-3, abs=1e-5), name


def test_two_processes_run_the_pipeline_and_sample(folders, tmp_path):
    """What both processes trained is read by both, and the rest is done once."""
    one, two = folders
    run("pipeline", f"--workdir={one}")
    printed = both("pipeline", f"--workdir={two}")
    assert "report.html" in printed and "[1/6] flow" in printed
    names = {r["name"]: r["distances"]["sliced W2"][0] for r in numbers(one)["rows"]}
    assert {r["name"]: r["distances"]["sliced W2"][0] for r in numbers(two)["rows"]} == pytest.approx(names, rel=1e-3)
    arguments = ["--count=600", "--solver=euler", "--solver_steps=2"]
    run("sample", f"--workdir={two}", f"--out={tmp_path / 'one.npz'}", *arguments)
    both("sample", f"--workdir={two}", f"--out={tmp_path / 'two.npz'}", *arguments)
    x, y = (np.load(tmp_path / f"{name}.npz")["x"] for name in ("one", "two"))
    np.testing.assert_allclose(x, y, atol=1e-6)
