"""``launch.marginals`` without its flags: the sets of a trained flow, what is told first, what is refused."""

import re
import shutil

import numpy as np
import pytest
from test_training_loop import config

from fmjax import correction
from fmjax.experiments import assemble, specs, workdir
from fmjax.experiments import marginals as marginal_sets
from fmjax.sampling import grids
from fmjax.storage import checkpoint

TINY = {"batch_size": 16, "steps": 4, "solver_steps": 2, "sampling.seeds": 2, "sampling.samples": 64}


@pytest.fixture(scope="module")
def tiny():
    return config(**TINY)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("flow")
    assemble.fit(tiny, path)
    return path


@pytest.fixture(scope="module")
def finished(tiny, trained):
    marginal_sets.main(tiny, trained)
    return trained


def test_the_sets_are_those_of_the_averaged_flow(finished, tiny, tmp_path):
    """The same bits by hand: forward from the seed, backward from the training data, on the config's grid."""
    plan, (_, flow, metadata) = assemble.assemble(tiny), checkpoint.restore(finished / "checkpoints", part="ema")
    how = {"flow": metadata["digest"]["ema"], "mesh": plan.mesh, "solver": "rk4"}
    train_x = specs.data(tiny.data).train_x
    starts = {"forward": {"count": 128, "shape": (8, 8, 1), "seed": tiny.seed}, "backward": {"data": train_x}}
    for direction, start in starts.items():
        found = correction.read_marginals(finished / "marginals" / direction)
        view, ts = plan.method.velocity, grids.uniform_grid(2)
        correction.build_marginals(view, flow, ts, directory=tmp_path / direction, direction=direction, **how, **start)
        np.testing.assert_array_equal(found.x, correction.read_marginals(tmp_path / direction).x)
        assert found.manifest == correction.read_marginals(tmp_path / direction).manifest
    np.testing.assert_array_equal(found.x[:, -1], train_x)


def test_it_tells_the_cost_first_and_the_errors_last_and_builds_nothing_twice(finished, tiny, capsys):
    stamps = {p: p.stat().st_mtime_ns for p in (finished / "marginals").rglob("*")}
    marginal_sets.main(tiny, finished)
    assert stamps == {p: p.stat().st_mtime_ns for p in (finished / "marginals").rglob("*")}
    forward, backward, trip, defect = capsys.readouterr().out.splitlines()
    size = sum(p.stat().st_size for p in (finished / "marginals" / "forward").glob("shard*"))
    told = re.match(
        r"forward: 128 examples, at most ([\d.]+) kB, 8 NFE each \(1.02e\+03 evaluations\), about \S+ s", forward
    )
    assert size <= 1000 * float(told[1]) * 1.005 < size + 2**17 + 5000
    assert backward.startswith("backward: 1257 examples, at most ") and backward.endswith("marginals/backward")
    plan, (_, flow, _) = assemble.assemble(tiny), checkpoint.restore(finished / "checkpoints", part="ema")
    x = specs.data(tiny.data).train_x[:256]
    found = correction.round_trip(plan.method.velocity, flow, marginal_sets.jnp.asarray(x), grids.uniform_grid(2))
    assert trip == f"of the flow of step 4, on 256 training examples: round-trip error {found:.2e}"
    whole = correction.read_marginals(finished / "marginals" / "backward")
    s = correction.straightness_defect(whole._replace(x=whole.x[:256]))
    np.testing.assert_allclose([float(n) for n in re.findall(r"[\d.e-]+(?=,| along)", defect)], s, rtol=1e-2)


def test_a_damaged_and_an_unfinished_set_are_mended(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "w")
    folder = tmp_path / "w" / "marginals"
    shutil.rmtree(folder / "forward")
    shard = next((folder / "backward").glob("shard-00001*"))
    shard.write_bytes(shard.read_bytes()[:-9])
    marginal_sets.main(tiny, tmp_path / "w")
    for path in (finished / "marginals").rglob("shard*"):
        assert path.read_bytes() == (folder / path.relative_to(finished / "marginals")).read_bytes()


def test_other_grids_and_stores_go_elsewhere(trained, finished, tmp_path, capsys):
    """A resume may change the grid, which no number of the flow depends on; a folder has one set."""
    other = config(**TINY | {"solver_steps": 3})
    with pytest.raises(ValueError, match="holds marginals built with different settings .ts: "):
        marginal_sets.main(other, trained, direction="forward")
    marginal_sets.main(other, trained, direction="backward", out=tmp_path / "o", steps=[0], dtype="float16")
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["backward"]
    x = specs.data(other.data).train_x
    m = correction.interpolate_marginals(correction.read_marginals(tmp_path / "o" / "backward", stream=True), data=x)
    np.testing.assert_array_equal(m.x[:5, 3], x[:5])
    assert len(re.findall("[0-9.e-]+,", capsys.readouterr().out.splitlines()[-1])) == 3  # the defect of all four times


def test_a_map_that_was_trained_is_carried_along_by_its_jumps(tmp_path):
    cfg = config(
        **TINY | {"batch_size": 32, "method": {"name": "lagrangian"}, "solver": "flow_map", "backward_map": "inverse"}
    )
    assemble.fit(cfg, tmp_path)
    marginal_sets.main(cfg, tmp_path, tol=0.05)
    p, q = (correction.read_marginals(tmp_path / "marginals" / direction) for direction in ("forward", "backward"))
    assert p.manifest.solver == q.manifest.solver == "flow_map" and q.manifest.backward_map == "inverse"
    plan, (_, flow, _) = assemble.assemble(cfg), checkpoint.restore(tmp_path / "checkpoints", part="ema")
    jump, ts = plan.method.flow_map(flow), grids.uniform_grid(2)
    for m in (p, q):
        for n in range(2):
            np.testing.assert_allclose(
                jump(marginal_sets.jnp.asarray(m.x[:, n]), ts[n], ts[n + 1]), m.x[:, n + 1], atol=1e-4
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "rk5"}, "did you mean 'rk4'"),
        ({"backward_map": "revers"}, "backward_map='revers' is not one of"),
        ({"classes": 10}, "classes=10: marginals have no labels"),
        ({"solver": "flow_map"}, "solver='flow_map' needs a method with a flow map"),
        ({"solver": "Tsit5", "backward_map": "inverse"}, "no fixed-step solver 'Tsit5'"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_read(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        marginal_sets.main(config(**TINY | changes), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_config_without_a_grid_and_a_workdir_without_a_flow_are_named(tiny, trained, tmp_path):
    from configs import checkerboard

    with pytest.raises(ValueError, match="this config has no solver, solver_steps, backward_map: give it the fields"):
        marginal_sets.main(checkerboard.get_config(), tmp_path / "w")
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in .*, which does not exist"):
        marginal_sets.main(tiny, tmp_path / "w")
    with pytest.raises(ValueError, match="direction='sideways' is not one of"):
        marginal_sets.main(tiny, trained, direction="sideways")
    with pytest.raises(workdir.WorkdirError, match="batch_size is 16 there, 32 here"):
        marginal_sets.main(config(**TINY | {"batch_size": 32}), trained)
