"""``launch.marginals``: the sets of a trained flow, their costs first, what is refused."""

import re
import shutil

import numpy as np
import pytest
from laboratory import digest, read, refused, run
from laboratory import laboratory as laboratory  # a fixture

from fmjax import correction
from fmjax.experiments import assemble, build, marginals, train, workdir
from fmjax.sampling import grids
from fmjax.storage import checkpoint

pytestmark = pytest.mark.usefixtures("laboratory")
LABELS = {
    "data": {"name": "eight_gaussians", "train": 240, "validation": 80, "test": 120, "labels": True},
    "conditional": True, "net": {"name": "mlp", "width": 8, "depth": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(laboratory, tmp_path_factory):
    path = tmp_path_factory.mktemp("flow")
    train.main(read(), path)
    marginals.main(read(), path)
    return path


def test_the_sets_are_of_the_averaged_flow(finished, tmp_path):
    """The same bits by hand: forward from the seed, backward from the training data, on the config's grid."""
    data = build.data(read().common.data)
    plan = assemble.flow_plan(read(), data)
    flow = checkpoint.restore(finished / "flow" / "checkpoints", part="ema")[1]
    shared = {"flow": digest(finished / "flow"), "mesh": plan.mesh, "solver": "rk4"}
    starts = {"forward": {"count": 64, "shape": (2,), "seed": 0}, "backward": {"data": data.train.x}}
    for direction, start in starts.items():
        built = correction.read_marginals(finished / "marginals" / direction)
        view, ts = plan.method.velocity, grids.uniform_grid(2)
        folder = tmp_path / direction
        correction.build_marginals(view, flow, ts, directory=folder, direction=direction, **shared, **start)
        np.testing.assert_array_equal(built.x, correction.read_marginals(folder).x)
    np.testing.assert_array_equal(built.x[:, -1], data.train.x)


def test_costs_come_first_and_errors_last_and_nothing_is_built_twice(finished, capsys):
    stamps = {p: p.stat().st_mtime_ns for p in (finished / "marginals").rglob("shard*")}
    marginals.main(read(), finished)
    assert stamps == {p: p.stat().st_mtime_ns for p in (finished / "marginals").rglob("shard*")}
    forward, backward, trip, defect = capsys.readouterr().out.splitlines()
    assert re.match(r"forward: 64 examples, at most [\d.]+ kB, 8 NFE each \(512 evaluations\), about \S+ s", forward)
    assert backward.startswith("backward: 240 examples, at most ") and backward.endswith("marginals/backward")
    error = float(re.search(r"240 training examples: round-trip error (\S+)", trip)[1])
    assert 0 < error < 1 and len(defect.split(",")) == 3


def test_conditions_travel_with_the_sets(tmp_path):
    settings = read(**LABELS)
    train.main(settings, tmp_path)
    marginals.main(settings, tmp_path)
    data = build.data(settings.common.data)
    forward, backward = (correction.read_marginals(tmp_path / "marginals" / d) for d in ("forward", "backward"))
    np.testing.assert_array_equal(backward.cond, data.train.cond)
    np.testing.assert_array_equal(forward.cond, data.train.cond[:64])


def test_a_folder_is_enough_for_the_command(finished, tmp_path):
    shutil.copytree(finished / "flow", tmp_path / "w" / "flow")
    shutil.copy(finished / "config.json", tmp_path / "w")
    run("marginals", f"--workdir={tmp_path / 'w'}", "--direction=backward", f"--out={tmp_path / 'sets'}", "--keep=0")
    assert correction.read_marginals(tmp_path / "sets" / "backward").x.shape == (240, 1, 2)
    line = refused("marginals", f"--workdir={tmp_path / 'w'}", "--config.solver=rk5")
    assert "rk5" in line
    assert "backward_map" in refused("marginals", f"--workdir={tmp_path / 'w'}", "--config.backward_map=back")


def test_a_folder_without_a_flow_or_with_another_is_refused(finished, tmp_path):
    with pytest.raises(workdir.WorkdirError, match="no checkpoint"):
        marginals.main(read(), tmp_path / "w")
    with pytest.raises(ValueError, match="^solver='flow_map'"):
        marginals.main(read(solver="flow_map"), finished)
